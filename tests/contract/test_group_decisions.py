"""Groups of notifications over a real database, beside a judge who takes one word after the other."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paycore import _wire
from paycore.domain.decision import ABSENT_MS
from paycore.domain.notification import Notification
from paycore.domain.verdicts import ChannelResult, NotifyOutcome
from paycore.usecases import judge
from paycore.usecases.words import verdict_at
from tests.support.clock import ManualClock
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, Core, check_money_rules
from tests.support.databases import KINDS, take_database
from tests.support.plain_group import PlainJudge, PlainPayment
from tests.support.units import held

FAILURE = ChannelResult.FAILURE


class Told(NamedTuple):
    """A word as it is drawn. payment: which of the example's; one beyond them all is unknown. paid_at: by name."""

    payment: int
    attempt: int
    trade_no: str
    changes: dict[str, Any]
    paid_at: str


WRONG: list[dict[str, Any]] = [
    {"amount_minor": AMOUNT_MINOR + 1},
    {"currency": "JPY"},
    {"currency": "XXX"},
    {"account": "bank_c"},
    {"account": "bank_z"},
    {"channel": "", "account": ""},
    {"channel_order_no": "not one of ours"},
]
FAILED: dict[str, Any] = {"result": FAILURE, "channel_trade_no": ""}
ORDERS = 3
told = st.builds(
    Told,
    st.integers(0, ORDERS - 1) | st.integers(0, ORDERS),
    st.sampled_from([1, 1, 2, 2, 3]),
    st.sampled_from(["T1", "T1", "T1", "T2"]),
    st.sampled_from([{}] * 5 + [FAILED] * 3 + WRONG),
    st.sampled_from(["in time", "in time", "late", "absent", "ahead", "before"]),
)
groups = st.lists(st.lists(told, min_size=1, max_size=8), min_size=1, max_size=3)


class Desk:
    """A core, a clock that is past every payment's expiry, and the loop that both are asked on."""

    def __init__(self, url: str) -> None:
        self.clock = ManualClock()
        self.core = Core(url, clock=self.clock).start()
        self.runner = asyncio.Runner()

    def close(self) -> None:
        self.runner.close()
        self.core.stop()


@pytest.fixture(scope="module", params=KINDS)
def desk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    desk = Desk(take_database(request.param, tmp_path_factory.mktemp("group")))
    yield desk
    desk.close()


async def decide(desk: Desk, history: list[list[list[Told]]], *, cold: bool) -> None:
    """Tell groups, each of several batches, to the core and to the plain judge; compare the answers and the facts."""
    core, clock = desk.core, desk.clock
    ids = [await core.make_payment("bank_a", "bank_b") for _ in range(ORDERS)]
    plain = PlainJudge([PlainPayment(one, clock.now_ms() + VALIDITY_MS) for one in ids], clock.now_ms())
    made_at_ms = clock.now_ms()
    clock.advance(VALIDITY_MS + 1_000)
    moments = {
        "in time": made_at_ms + 5,
        "late": clock.now_ms(),
        "absent": ABSENT_MS,
        "ahead": clock.now_ms() + 400_000,
        "before": made_at_ms - 1,
    }
    before = core.snapshot()
    quarantined: Counter[str] = Counter()
    for batches in history:
        words = [[make_word(core, ids, one, moments) for one in batch] for batch in batches]
        if cold:
            core.forget()
        taken = [core.writer.decoder.of_values(batch) for batch in words]
        async with held(core.writer):
            tasks = [asyncio.ensure_future(core.writer.take_what_fits(batch)) for batch in taken]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        answers = [verdict_at(batch, place) for batch in taken for place in range(len(batch))]
        flat = [word for batch in words for word in batch]
        assert [(int(one.outcome) | int(one.flags), one.payment_id, one.attempt) for one in answers] == plain.judge(
            flat
        )
        quarantined.update(one.outcome.name for one in answers if 4 <= one.outcome <= 7 and not one.replayed)
    compare(core.snapshot(), before, ids, plain, quarantined)


def make_word(core: Core, ids: Sequence[int], one: Told, moments: dict[str, int]) -> Notification:
    payment_id = ids[one.payment] if one.payment < len(ids) else ids[-1] + 1
    word = core.word(payment_id, one.attempt, one.trade_no, paid_at_ms=moments[one.paid_at])
    return word._replace(**one.changes)


def compare(
    rows: dict[str, set[Any]],
    before: dict[str, set[Any]],
    ids: Sequence[int],
    plain: PlainJudge,
    quarantined: Counter[str],
) -> None:
    """The database holds what the plain judge has put down, and nothing more."""
    check_money_rules(rows)
    fresh = {name: sorted(rows[name] - before[name]) for name in rows}
    assert {row.payment_id: (row.state, row.attempt, row.channel_trade_no) for row in fresh["payment_outcome"]} == {
        one.payment_id: one.outcome for one in plain.payments.values() if one.outcome
    }
    assert {(row.payment_id, row.attempt, row.channel_trade_no, row.reason) for row in fresh["excess_payment"]} == {
        (one.payment_id, *excess) for one in plain.payments.values() for excess in one.excess
    }
    arrivals: Counter[str] = Counter()
    earlier = {row.quarantine_id: row.arrivals for row in before["quarantine"]}
    for row in fresh["quarantine"]:
        arrivals[NotifyOutcome(row.reason).name] += row.arrivals - earlier.get(row.quarantine_id, 0)
    assert arrivals == quarantined
    assert {row.payment_id for row in fresh["refund"]} <= set(ids)


@pytest.mark.parametrize("together", [judge.RARE_TOGETHER, 2], ids=["at_once", "in_parts"])
@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
def test_group_is_decided_as_one_word_after_the_other(
    desk: Desk, cold: bool, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "RARE_TOGETHER", together)

    @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(groups, min_size=1, max_size=3))
    def check(history: list[list[list[Told]]]) -> None:
        desk.runner.run(decide(desk, history, cold=cold))

    check()


@pytest.fixture
def allowance() -> Iterator[None]:
    """Let a test limit the allocations, and end that afterwards."""
    yield
    _wire._fail_allocation_after(-1)


@pytest.mark.usefixtures("allowance")
async def test_core_without_memory_answers_nobody_and_goes_on_when_there_is_some(tmp_path: Path) -> None:
    with Core(take_database("sqlite", tmp_path), clock=ManualClock()) as core:
        payment_id = await core.make_payment()
        batch = core.writer.decoder.of_values([core.word(payment_id)])
        _wire._fail_allocation_after(0)
        with pytest.raises(MemoryError):
            await core.writer.take_what_fits(batch)
        _wire._fail_allocation_after(-1)
        assert core.snapshot()["payment_outcome"] == set()
        assert (await core.notify(core.word(payment_id))).outcome == NotifyOutcome.ACCEPTED
