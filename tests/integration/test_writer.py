"""The writer on each database: natural groups, a bounded queue, poison rows, lost answers, dying anywhere."""

from __future__ import annotations

import asyncio
import io
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from paycore.domain.errors import (
    InvalidArgumentError,
    PreconditionError,
    StoreUnavailableError,
    ThrottledError,
)
from paycore.domain.verdicts import CloseReason, NotifyOutcome, PaymentState
from paycore.store import engine, postgresql_server
from paycore.usecases import writer as writer_module
from paycore.usecases.close import InsertClosed
from tests.support.clock import ManualClock
from tests.support.core import Core, check_money_rules, read_all
from tests.support.databases import cure, held_database, poison
from tests.support.racers import Racer, payment_rows
from tests.support.units import Fail, held

ACCEPTED, DUPLICATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE


@pytest.fixture
def core(db_url: str) -> Iterator[Core]:
    with Core(db_url, clock=ManualClock()) as core:
        yield core


@pytest.fixture
async def start_racer(db_url: str, tmp_path: Path) -> AsyncIterator[Any]:
    """Starts a process with failpoints of its own; all are ended with the test."""
    racers: list[Racer] = []

    async def start(**failpoints: str) -> Racer:
        racer = Racer(db_url, tmp_path / f"racer{len(racers)}", **failpoints)
        racers.append(racer)
        return await racer.start()

    yield start
    for racer in racers:
        await racer.stop()


def as_tasks(*waiting: Any) -> list[asyncio.Task[Any]]:
    """Start what is to wait together, and let each reach the queue."""
    return [asyncio.ensure_future(one) for one in waiting]


async def queued(core: Core, depth: int) -> None:
    async with asyncio.timeout(10):
        while core.count("paycore_queue_depth") != depth:
            await asyncio.sleep(0)


# Groups


async def test_writes_that_waited_together_share_one_commit(core: Core) -> None:
    ids = [await core.make_payment() for _ in range(30)]
    async with held(core.writer):
        tasks = as_tasks(*(core.notify(core.word(payment_id)) for payment_id in ids))
        await queued(core, len(ids))
    verdicts = await asyncio.gather(*tasks)
    assert [verdict.outcome for verdict in verdicts] == [ACCEPTED] * 30
    assert len({(row.writer_no, row.group_no) for row in core.snapshot()["payment_outcome"]}) == 1
    assert core.metrics.registry.get_sample_value("paycore_commit_group_size_bucket", {"le": "20.0"}) == 31
    assert core.metrics.registry.get_sample_value("paycore_commit_group_size_bucket", {"le": "50.0"}) == 32


async def test_writes_of_an_idle_server_commit_one_by_one_in_growing_groups(core: Core) -> None:
    ids = [await core.make_payment() for _ in range(4)]
    for payment_id in ids:
        await core.notify(core.word(payment_id))
    rows = sorted(core.snapshot()["payment_outcome"])
    groups = [row.group_no for row in rows]
    assert groups == sorted(set(groups))
    assert {row.writer_no for row in rows} == {core.writer_no}


async def test_group_takes_no_more_than_its_limit(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_GROUP", 10)
    ids = [await core.make_payment() for _ in range(25)]
    async with held(core.writer):
        tasks = as_tasks(*(core.notify(core.word(payment_id)) for payment_id in ids))
        await queued(core, 25)
    await asyncio.gather(*tasks)
    sizes = Counter(row.group_no for row in core.snapshot()["payment_outcome"])
    assert [sizes[group] for group in sorted(sizes)] == [10, 10, 5]


async def test_successes_and_replays_in_one_group_are_judged_in_turn(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    words = [core.word(payment_id, 1, "A1"), core.word(payment_id, 2, "B1")] * 2
    async with held(core.writer):
        tasks = as_tasks(*(core.notify(word) for word in words))
        await queued(core, 4)
    verdicts = await asyncio.gather(*tasks)
    assert [(verdict.outcome, verdict.replayed) for verdict in verdicts] == [
        (ACCEPTED, False),
        (DUPLICATE, False),
        (ACCEPTED, True),
        (DUPLICATE, True),
    ]
    check_money_rules(core.snapshot())


async def test_unit_that_fails_undoes_its_own_writes_alone(core: Core) -> None:
    payment_id, closed_id = await core.make_payment(), await core.make_payment()
    async with held(core.writer):
        tasks = as_tasks(
            core.writer.run(Fail(PreconditionError("NO", "not so"))),
            core.notify(core.word(payment_id)),
            core.writer.run(InsertClosed(closed_id, CloseReason.MERCHANT, core.registry.code)),
        )
        await queued(core, 3)
    failed, verdict, still_live = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(failed, PreconditionError)
    assert isinstance(still_live, PreconditionError)
    assert still_live.reason == "ATTEMPT_STATE_UNKNOWN"
    assert not isinstance(verdict, BaseException)
    assert verdict.outcome == ACCEPTED
    assert "nobody" not in {row.merchant_id for row in core.snapshot()["merchant_order"]}


async def test_unit_that_breaks_unforeseen_fails_alone(core: Core) -> None:
    ids = [await core.make_payment() for _ in range(3)]
    async with held(core.writer):
        tasks = as_tasks(
            *(core.notify(core.word(payment_id)) for payment_id in ids), core.writer.run(Fail(RuntimeError("a defect")))
        )
        await queued(core, 4)
    *verdicts, broken = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(broken, RuntimeError)
    assert [verdict.outcome for verdict in verdicts if not isinstance(verdict, BaseException)] == [ACCEPTED] * 3
    assert "nobody" not in {row.merchant_id for row in core.snapshot()["merchant_order"]}


# The queue and its callers


async def test_queue_at_its_limit_throttles_at_once_and_takes_again(db_url: str) -> None:
    with Core(db_url, clock=ManualClock(), queue_limit=3) as core:
        ids = [await core.make_payment() for _ in range(4)]
        async with held(core.writer):
            tasks = as_tasks(*(core.notify(core.word(payment_id)) for payment_id in ids[:3]))
            await queued(core, 3)
            with pytest.raises(ThrottledError) as refused:
                await core.notify(core.word(ids[3]))
            with pytest.raises(ThrottledError):
                await core.make_payment()
            assert (refused.value.reason, refused.value.retryable) == ("QUEUE_FULL", True)
        assert [verdict.outcome for verdict in await asyncio.gather(*tasks)] == [ACCEPTED] * 3
        assert core.count("paycore_notify_total", channel="simbank", outcome="THROTTLED", replayed="false") == 1
        assert len(core.snapshot()["payment_outcome"]) == 3
        verdict = await core.notify(core.word(ids[3]))
        assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)


async def test_stop_commits_and_answers_everything_that_waits(core: Core) -> None:
    ids = [await core.make_payment() for _ in range(20)]
    async with held(core.writer):
        tasks = as_tasks(*(core.notify(core.word(payment_id)) for payment_id in ids))
        await queued(core, 20)
        stopping = threading.Thread(target=core.writer.stop)
        stopping.start()
        async with asyncio.timeout(10):
            while not core.writer._stopping:
                await asyncio.sleep(0)
        with pytest.raises(StoreUnavailableError) as refused:
            await core.notify(core.word(ids[0]))
    assert [verdict.outcome for verdict in await asyncio.gather(*tasks)] == [ACCEPTED] * 20
    await asyncio.to_thread(stopping.join)
    assert refused.value.reason == "SHUTTING_DOWN"
    assert len(core.snapshot()["payment_outcome"]) == 20


async def test_notification_whose_caller_hung_up_is_committed_all_the_same(core: Core) -> None:
    payment_id, other_id = await core.make_payment(), await core.make_payment()
    async with held(core.writer):
        hung_up, waits = as_tasks(core.notify(core.word(payment_id)), core.notify(core.word(other_id)))
        await queued(core, 2)
        hung_up.cancel()
        await asyncio.wait([hung_up])
    assert hung_up.cancelled()
    assert (await waits).outcome == ACCEPTED
    assert (await core.notify(core.word(payment_id))).replayed


async def test_notification_of_a_loop_that_has_closed_is_committed_and_the_writer_goes_on(core: Core) -> None:
    payment_id, other_id = await core.make_payment(), await core.make_payment()

    def ask_and_close() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(core.notify(core.word(payment_id)))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        loop.run_until_complete(asyncio.wait([task]))
        loop.close()

    async with held(core.writer):
        await asyncio.to_thread(ask_and_close)
    assert (await core.notify(core.word(other_id))).outcome == ACCEPTED
    assert (await core.notify(core.word(payment_id))).replayed


# Poison


@pytest.mark.parametrize("place", [0, 4, 8])
async def test_poison_row_is_refused_alone_and_the_rest_of_its_group_succeeds(
    core: Core, db_url: str, place: int
) -> None:
    ids = [await core.make_payment() for _ in range(9)]
    poison(db_url, "payment_outcome", "POISON")
    words = [
        core.word(payment_id, trade_no="POISON" if number == place else "T1") for number, payment_id in enumerate(ids)
    ]
    async with held(core.writer):
        tasks = as_tasks(*(core.notify(word) for word in words))
        await queued(core, 9)
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = answers.pop(place)
    assert isinstance(refused, InvalidArgumentError)
    assert refused.reason == "ROW_REFUSED"
    assert {answer.outcome for answer in answers if not isinstance(answer, BaseException)} == {ACCEPTED}
    assert {row.payment_id for row in core.snapshot()["payment_outcome"]} == set(ids) - {ids[place]}
    entry = core.index.get(ids[place])
    assert entry is not None
    assert (entry.state, entry.captured_mask) == (PaymentState.OPEN, 0)
    assert core.count("paycore_notify_total", channel="simbank", outcome="INVALID", replayed="false") == 1
    assert core.count("paycore_notify_total", channel="simbank", outcome="ACCEPTED", replayed="false") == 8
    assert all(core.health)


async def test_group_that_fails_after_its_marks_were_made_leaves_none(core: Core, db_url: str) -> None:
    """A second row of the same payment is refused: the first one's mark must go with its row."""
    payment_id = await core.make_payment("bank_a", "bank_b")
    poison(db_url, "excess_payment", "POISON")
    poison(db_url, "payment_outcome", "T1")
    with core.watch() as written:
        async with held(core.writer):
            tasks = as_tasks(
                core.notify(core.word(payment_id, 1, "T1")), core.notify(core.word(payment_id, 2, "POISON"))
            )
            await queued(core, 2)
        first, second = await asyncio.gather(*tasks, return_exceptions=True)
    # Halved, the second is no duplicate any more: it is the first word that the database takes.
    assert isinstance(first, InvalidArgumentError)
    assert not isinstance(second, BaseException)
    assert second.outcome == ACCEPTED
    assert written.names() == {"payment_outcome"}
    entry = core.index.get(payment_id)
    assert entry is not None
    assert (entry.kept_attempt, entry.captured_mask) == (2, 0b10)


async def test_poison_rows_of_several_tables_are_each_refused_alone(core: Core, db_url: str) -> None:
    poisoned = [await core.make_payment("bank_a", "bank_b") for _ in range(3)]
    sound = [await core.make_payment("bank_a", "bank_b") for _ in range(5)]
    for payment_id in poisoned[1:]:
        await core.notify(core.word(payment_id, 1, "A1"))
    for table, trade_no in (("payment_outcome", "P0"), ("excess_payment", "P1"), ("quarantine", "P2")):
        poison(db_url, table, trade_no)
    words = [core.word(payment_id, 1, "A1") for payment_id in sound]
    words[1:1] = [core.word(poisoned[0], 1, "P0"), core.word(poisoned[1], 2, "P1"), core.word(poisoned[2], 1, "P2")]
    async with held(core.writer):
        tasks = as_tasks(*(core.notify(word) for word in words))
        await queued(core, len(words))
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [isinstance(answer, InvalidArgumentError) for answer in answers]
    assert refused == [False, True, True, True, False, False, False, False]
    check_money_rules(core.snapshot())


async def test_poison_row_whose_cause_is_gone_is_accepted(core: Core, db_url: str) -> None:
    payment_id = await core.make_payment()
    poison(db_url, "payment_outcome", "P0")
    with pytest.raises(InvalidArgumentError):
        await core.notify(core.word(payment_id, trade_no="P0"))
    cure(db_url, "payment_outcome", "P0")
    verdict = await core.notify(core.word(payment_id, trade_no="P0"))
    assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)


# Durable before answered: R3 at every instruction


async def test_group_that_cannot_be_written_is_answered_unavailable_and_leaves_no_mark(
    db_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 10)
    monkeypatch.setattr(postgresql_server, "LOCK_TIMEOUT_MS", 10)
    with Core(db_url, clock=ManualClock()) as core:
        payment_id = await core.make_payment("bank_a", "bank_b")
        with held_database(db_url), pytest.raises(StoreUnavailableError) as refused:
            await core.notify(core.word(payment_id, 1, "A1"))
        assert refused.value.reason == "STORE_BUSY"
        entry = core.index.get(payment_id)
        assert entry is not None
        assert (entry.state, entry.captured_mask) == (PaymentState.OPEN, 0)
        assert core.count("paycore_commit_failures_total", cause="busy") == writer_module.MAX_TRIES
        assert core.health[-1] is False
        verdict = await core.notify(core.word(payment_id, 2, "B1"))
        assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)
        assert (await core.notify(core.word(payment_id, 1, "A1"))).outcome == DUPLICATE
        assert core.health[-1] is True


@pytest.mark.parametrize("point", ["judge.outcomes_inserted", "store.before_commit"])
async def test_notification_is_not_answered_before_it_is_durable(start_racer: Any, db_url: str, point: str) -> None:
    racer = await start_racer()
    payment_id = await racer.ask("make", attempts=["bank_a"], ended=[])
    racer.shut(point)
    answer = racer.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1")
    await racer.reached(point)
    assert await racer.ask("ping") == "pong"
    assert not answer.done()
    assert "payment_outcome" not in payment_rows(db_url, payment_id)
    racer.open(point)
    assert await answer == ["ACCEPTED", False]
    assert "payment_outcome" in payment_rows(db_url, payment_id)


@pytest.mark.parametrize(
    ("place", "durable"),
    [
        ("writer.taken*2", False),
        ("store.begun*2", False),
        ("judge.outcomes_inserted*2", False),
        ("store.before_commit*2", False),
        ("store.committed*2", True),
        ("writer.before_answer*2", True),
    ],
)
async def test_process_killed_on_the_way_answers_nothing_and_the_word_sent_again_is_right(
    start_racer: Any, db_url: str, place: str, durable: bool
) -> None:
    doomed = await start_racer(**{place: "crash"})
    payment_id = await doomed.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    assert await doomed.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == "DEAD"
    assert await doomed.wait_dead() == -9
    assert ("payment_outcome" in payment_rows(db_url, payment_id)) is durable
    heir = await start_racer()
    assert await heir.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == ["ACCEPTED", durable]
    assert await heir.ask("notify", payment_id=payment_id, attempt=2, trade_no="T2") == ["DUPLICATE", False]
    check_money_rules(read_all(db_url))


# A commit whose answer was lost


async def test_commit_whose_answer_was_lost_is_decided_again_and_is_no_replay(start_racer: Any, db_url: str) -> None:
    racer = await start_racer(**{"store.committed*2": "error"})
    payment_id = await racer.ask("make", attempts=["bank_a", "bank_b"], ended=[])
    assert await racer.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == ["ACCEPTED", False]
    rows = payment_rows(db_url, payment_id)
    assert len(rows["payment_outcome"]) == 1
    assert await racer.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == ["ACCEPTED", True]
    assert await racer.ask("notify", payment_id=payment_id, attempt=2, trade_no="T2") == ["DUPLICATE", False]
    (excess,) = payment_rows(db_url, payment_id)["excess_payment"]
    assert excess.writer_no > rows["payment_outcome"][0].writer_no, "a lost answer ends the stream of commits"


async def test_group_whose_commit_was_not_answered_is_answered_as_if_it_had_been(start_racer: Any, db_url: str) -> None:
    racer = await start_racer(**{"store.committed*3": "error"})
    ids = [await racer.ask("make", attempts=["bank_a", "bank_b"], ended=[]) for _ in range(2)]
    racer.shut("writer.taken")
    first = racer.ask("busy")
    waiting = racer.ask("warm", payment_id=ids[0])
    await first
    await racer.reached("writer.taken")
    told = [(ids[0], 1), (ids[0], 2), (ids[1], 2), (ids[0], 1), (ids[0], 2)]
    answers = [racer.ask("notify", payment_id=of, attempt=attempt, trade_no=f"T{attempt}") for of, attempt in told]
    assert await racer.ask("ping") == "pong"
    racer.open("writer.taken")
    await waiting
    assert await asyncio.gather(*answers) == [
        ["ACCEPTED", False],
        ["DUPLICATE", False],
        ["ACCEPTED", False],
        ["ACCEPTED", True],
        ["DUPLICATE", True],
    ]
    check_money_rules(read_all(db_url))


async def test_commits_that_are_never_answered_end_unavailable_and_are_replays_when_sent_again(
    start_racer: Any, db_url: str
) -> None:
    maker = await start_racer()
    payment_id = await maker.ask("make", attempts=["bank_a"], ended=[])
    racer = await start_racer(**{"store.committed": "error"})
    assert await racer.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == "STORE_BUSY"
    assert len(payment_rows(db_url, payment_id)["payment_outcome"]) == 1
    assert await maker.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == ["ACCEPTED", True]


async def test_close_whose_commit_was_not_answered_is_closed_once(start_racer: Any, db_url: str) -> None:
    racer = await start_racer(**{"store.committed*2": "error"})
    payment_id = await racer.ask("make", attempts=["bank_a"], ended=[1])
    assert await racer.ask("close", payment_id=payment_id) == "CLOSED"
    assert len(payment_rows(db_url, payment_id)["payment_outcome"]) == 1


async def test_pay_whose_commit_was_not_answered_makes_one_payment_and_one_attempt(
    start_racer: Any, db_url: str
) -> None:
    racer = await start_racer(**{"store.committed*1": "error"})
    step, payment_id, attempt = await racer.ask("open", order_no="lost", account="bank_a")
    assert (step, attempt) == ("CREATE", 1)
    rows = read_all(db_url)
    assert [len(rows[name]) for name in ("payment", "merchant_order", "channel_order")] == [1, 1, 1]
    assert next(iter(rows["payment"])).payment_id == payment_id


async def test_failure_whose_commit_was_not_answered_is_no_replay(start_racer: Any, db_url: str) -> None:
    racer = await start_racer(**{"store.committed*2": "error"})
    payment_id = await racer.ask("make", attempts=["bank_a"], ended=[])
    assert await racer.ask("fail", payment_id=payment_id, attempt=1) == ["RECORDED", False]


async def test_unknown_word_whose_commit_was_not_answered_is_counted_as_one_arrival(
    start_racer: Any, db_url: str
) -> None:
    racer = await start_racer(**{"store.committed*1": "error"})
    assert await racer.ask("notify", payment_id=77, attempt=1, trade_no="T1") == ["UNKNOWN", False]
    (row,) = read_all(db_url)["quarantine"]
    assert row.arrivals == 1


async def test_writer_that_breaks_outside_a_group_answers_and_goes_on(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment_id = await core.make_payment()
    left = [1]

    def break_once(name: str) -> None:
        if name == "writer.taken" and left:
            left.pop()
            raise RuntimeError("a defect")

    monkeypatch.setattr(writer_module, "failpoint", break_once)
    with pytest.raises(StoreUnavailableError) as refused:
        await asyncio.wait_for(core.notify(core.word(payment_id)), 10)
    assert refused.value.reason == "WRITER_BROKE"
    verdict = await asyncio.wait_for(core.notify(core.word(payment_id)), 10)
    assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)


async def test_log_that_cannot_be_written_costs_no_word_its_answer(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    gone = io.StringIO()
    gone.close()
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(gone), cache_logger_on_first_use=False)
    try:
        for attempt, outcome in ((1, ACCEPTED), (2, DUPLICATE)):
            verdict = await asyncio.wait_for(core.notify(core.word(payment_id, attempt)), 10)
            assert (verdict.outcome, verdict.replayed) == (outcome, False)
    finally:
        structlog.configure(**before)
    assert core.count("paycore_commit_failures_total", cause="refused") == 0
    check_money_rules(core.snapshot())
