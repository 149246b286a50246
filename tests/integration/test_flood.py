"""A flood of invented order numbers: quarantine grows by each source's allowance, and every word is answered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import structlog
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # ships stubs without py.typed

from paycore.domain.errors import StoreUnavailableError, ThrottledError
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import NotifyOutcome
from paycore.failpoint import FailpointError
from paycore.store import engine, sqlite
from paycore.usecases.group_report import MAX_LINES
from paycore.usecases.quarantine import QuarantineLimits
from paycore.v1 import payment_service_pb2 as v1
from paycore.v1 import payment_service_pb2_grpc
from tests.support import facts
from tests.support.clock import ManualClock
from tests.support.core import Core, fresh_database
from tests.support.databases import KINDS, take_database
from tests.support.faults import held_by_another_process
from tests.support.server import ServerProcess

ACCEPTED, UNKNOWN, THROTTLED = NotifyOutcome.ACCEPTED, NotifyOutcome.UNKNOWN, NotifyOutcome.THROTTLED
LIMITS = QuarantineLimits(burst=5, per_minute=60)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=KINDS)
def core(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Core]:
    with Core(take_database(request.param, tmp_path), clock=clock, quarantine_limits=LIMITS) as core:
        yield core


@pytest.fixture
def on_sqlite(tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 20)
    with Core(fresh_database(tmp_path / "paycore.db"), clock=clock, quarantine_limits=LIMITS) as core:
        yield core


def invented(core: Core, first: int, count: int, **changes: Any) -> list[Notification]:
    """Words about orders that nobody made."""
    return [core.word(number, **changes) for number in range(first, first + count)]


def outcomes(verdicts: list[Verdict]) -> list[NotifyOutcome]:
    return [verdict.outcome for verdict in verdicts]


def rows(core: Core) -> int:
    return len(core.snapshot()["quarantine"])


def throttled(core: Core, channel: str = "simbank") -> tuple[int, int]:
    """What the two counters say."""
    return (
        core.count("paycore_quarantine_throttled_total", channel=channel),
        core.count("paycore_notify_total", channel=channel, outcome="THROTTLED", replayed="false"),
    )


async def test_flood_fills_its_allowance_and_the_rest_is_throttled_and_counted(core: Core) -> None:
    payment_id = await core.make_payment()
    words = invented(core, 100, 12)
    words.insert(9, core.word(payment_id))
    answers = await core.notify_many(*words)
    assert outcomes(answers) == [UNKNOWN] * 5 + [THROTTLED] * 4 + [ACCEPTED] + [THROTTLED] * 3
    assert (rows(core), throttled(core)) == (5, (7, 7))
    with pytest.raises(ThrottledError) as refused:
        await core.notify(core.word(999))
    assert (refused.value.reason, refused.value.retryable) == ("QUARANTINE_FULL", True)
    assert (rows(core), throttled(core)) == (5, (8, 8))


async def test_allowance_comes_back_with_time_and_the_word_sent_again_is_kept(core: Core, clock: ManualClock) -> None:
    words = invented(core, 100, 7)
    assert outcomes(await core.notify_many(*words)) == [UNKNOWN] * 5 + [THROTTLED] * 2
    clock.advance(999)
    assert outcomes(await core.notify_many(*words[5:])) == [THROTTLED] * 2
    clock.advance(1)
    assert outcomes(await core.notify_many(*words[5:])) == [UNKNOWN, THROTTLED]
    clock.advance(3_600_000)
    assert outcomes(await core.notify_many(*invented(core, 200, 6))) == [UNKNOWN] * 5 + [THROTTLED]
    assert rows(core) == 11


async def test_flood_of_one_source_throttles_no_other(core: Core) -> None:
    strangers = [*invented(core, 100, 6, account="bank_z"), *invented(core, 200, 2, channel="x", account="")]
    assert outcomes(await core.notify_many(*strangers)) == [UNKNOWN] * 5 + [THROTTLED] * 3
    assert throttled(core, "unconfigured") == (3, 3)
    for account in ("bank_a", "bank_b"):
        assert outcomes(await core.notify_many(*invented(core, 300, 6, account=account))) == [UNKNOWN] * 5 + [THROTTLED]
    assert rows(core) == 15


async def test_evidence_that_is_kept_already_takes_no_allowance_and_is_never_throttled(
    core: Core, clock: ManualClock
) -> None:
    word, others = core.word(100), invented(core, 200, 5)
    assert outcomes(await core.notify_many(word, *[word] * 9, *others)) == [UNKNOWN] * 14 + [THROTTLED]
    assert outcomes(await core.notify_many(word, others[4], word)) == [UNKNOWN, THROTTLED, UNKNOWN]
    arrivals = {row.channel_order_no: row.arrivals for row in core.snapshot()["quarantine"]}
    assert arrivals == {word.channel_order_no: 12, **{other.channel_order_no: 1 for other in others[:4]}}
    clock.advance(1_000)
    for _ in range(3):
        assert outcomes(await core.notify_many(word)) == [UNKNOWN]
    assert outcomes(await core.notify_many(others[4], core.word(999))) == [UNKNOWN, THROTTLED]


async def test_every_reason_of_quarantine_takes_from_the_same_allowance(core: Core) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id))
    wrong = [
        core.word(payment_id, trade_no="T2"),
        core.word(payment_id, amount_minor=1),
        core.word(payment_id, 2, account="bank_a"),
        core.word(payment_id + 1),
        core.word(payment_id, channel_order_no="nobody's"),
        core.word(payment_id, trade_no="T3"),
    ]
    answers = outcomes(await core.notify_many(*wrong))
    assert answers[-1] == THROTTLED
    assert THROTTLED not in answers[:-1]
    assert rows(core) == 5
    assert (await core.notify(core.word(payment_id))).replayed, "a replay adds nothing"


# Groups that are not committed, or twice


async def test_group_that_was_rolled_back_spends_nothing(on_sqlite: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core = on_sqlite
    words = invented(core, 100, 5)
    for _ in range(3):
        with held_by_another_process(core.path, "BEGIN IMMEDIATE"), pytest.raises(StoreUnavailableError):
            await core.notify_many(*words)
    fails(monkeypatch, "store.before_commit", 2)
    assert outcomes(await core.notify_many(*words)) == [UNKNOWN] * 5
    assert outcomes(await core.notify_many(core.word(999))) == [THROTTLED]
    assert rows(core) == 5


async def test_group_whose_commit_was_not_answered_spends_once(
    on_sqlite: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = on_sqlite
    fails(monkeypatch, "store.committed", 2)
    assert outcomes(await core.notify_many(*invented(core, 100, 4))) == [UNKNOWN] * 4
    assert core.count("paycore_commit_failures_total", cause="commit_unknown") == 2
    assert outcomes(await core.notify_many(*invented(core, 200, 2))) == [UNKNOWN, THROTTLED]
    assert sorted(row.arrivals for row in core.snapshot()["quarantine"]) == [1] * 5


def fails(monkeypatch: pytest.MonkeyPatch, point: str, times: int) -> None:
    """Let the next few groups fail at a named place."""
    left = [point] * times

    def fail(name: str) -> None:
        if name in left:
            left.remove(name)
            raise FailpointError(name)

    monkeypatch.setattr(sqlite, "failpoint", fail)


# Lines


async def test_log_of_a_flood_has_so_many_lines_a_group_and_one_that_counts_the_rest(on_sqlite: Core) -> None:
    words = invented(on_sqlite, 100, MAX_LINES + 30)
    with structlog.testing.capture_logs() as lines:
        await on_sqlite.notify_many(*words)
    events = [line["event"] for line in lines]
    assert events == ["notification_judged"] * MAX_LINES + ["notifications_judged"]
    assert (lines[-1]["more"], lines[-1]["outcomes"]) == (30, {"THROTTLED": 30})


# On the wire


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    env = {"PAYCORE_QUARANTINE_BURST": "3", "PAYCORE_QUARANTINE_PER_MINUTE": "1"}
    with ServerProcess(tmp_path_factory.mktemp("flood") / "paycore.db", env=env) as process:
        yield process


def test_flood_over_the_wire_is_throttled_item_by_item_and_resource_exhausted_when_unary(
    server: ServerProcess,
) -> None:
    def request(number: int) -> v1.NotifyRequest:
        return v1.NotifyRequest(
            channel="any",
            channel_order_no=f"invented-{number}",
            result=1,  # type: ignore[arg-type]  # a success
            amount_minor=1,
            currency="CNY",
            channel_trade_no="T",
        )

    with grpc.insecure_channel(server.address) as channel:
        stub = payment_service_pb2_grpc.PaymentServiceStub(channel)
        batch = v1.NotifyBatchRequest(notifications=[request(number) for number in range(6)])
        answer = stub.NotifyBatch(batch, timeout=20)
        assert [int(one.outcome) for one in answer.answers] == [UNKNOWN] * 3 + [THROTTLED] * 3
        with pytest.raises(grpc.RpcError) as refused:
            stub.Notify(request(9), timeout=20)
    error = cast(grpc.Call, refused.value)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info, retry = details(error.trailing_metadata())
    assert (info.reason, info.metadata["retryable"]) == ("QUARANTINE_FULL", "true")
    assert retry.retry_delay.seconds >= 1
    assert facts.select(server.db_path, "SELECT count(*) FROM quarantine") == [(3,)]


def details(metadata: Any) -> tuple[Any, Any]:
    """The ErrorInfo and the RetryInfo that came with a status."""
    (data,) = [value for name, value in metadata if name == "grpc-status-details-bin"]
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(data).details:
        for kind in (info, retry):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(kind)
    return info, retry
