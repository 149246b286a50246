"""Batches of notifications that are wrong, too many, or caught by a fault: each word gets its own answer, or none does.

Throughout: what is acknowledged is in the database, and ``paycore_notify_total`` counts every word that was answered
once.
"""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from paycore.domain.errors import StoreUnavailableError, ThrottledError
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import NotifyOutcome, PaymentState
from paycore.failpoint import FailpointError
from paycore.store import engine, postgresql, sqlite
from paycore.usecases import writer as writer_module
from paycore.usecases.words import verdict_at
from tests.support.clock import ManualClock
from tests.support.core import Core, change, check_money_rules
from tests.support.databases import KINDS, is_postgresql, take_database
from tests.support.faults import held_by_another_process
from tests.support.postgres import own_server
from tests.support.units import Block, held

ACCEPTED, DUPLICATE, RECORDED = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.RECORDED
INVALID, THROTTLED, UNKNOWN = NotifyOutcome.INVALID, NotifyOutcome.THROTTLED, NotifyOutcome.UNKNOWN
MISMATCH, SECOND_CAPTURE = NotifyOutcome.MISMATCH, NotifyOutcome.SECOND_CAPTURE

Told = tuple[NotifyOutcome, bool]
"""(outcome, replayed)."""


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return take_database(request.param, tmp_path)


@pytest.fixture
def core(url: str) -> Iterator[Core]:
    with Core(url, clock=ManualClock()) as core:
        yield core


@pytest.fixture
def on_sqlite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 20)
    take_database("sqlite", tmp_path)
    with Core(tmp_path / "paycore.db", clock=ManualClock()) as core:
        yield core


def plain(verdicts: Sequence[Verdict]) -> list[Told]:
    return [(verdict.outcome, verdict.replayed) for verdict in verdicts]


def counted(core: Core) -> Counter[Told]:
    """What ``paycore_notify_total`` says, over all channels."""
    found: Counter[Told] = Counter()
    for metric in core.metrics.registry.collect():
        for sample in metric.samples:
            if sample.name == "paycore_notify_total" and sample.value:
                outcome = NotifyOutcome[sample.labels["outcome"]]
                found[outcome, sample.labels["replayed"] == "true"] += int(sample.value)
    return found


def paid(core: Core) -> set[int]:
    rows = core.snapshot()
    check_money_rules(rows)
    return {row.payment_id for row in rows["payment_outcome"] if row.state == PaymentState.PAID}


# Wrong words among good ones

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"amount_minor": 0}, "amount_minor"),
    ({"amount_minor": -1}, "amount_minor"),
    ({"channel_trade_no": ""}, "channel_trade_no"),
    ({"channel_trade_no": "T\0"}, "channel_trade_no"),
    ({"currency": "C" * 17}, "currency"),
    ({"result": 7}, "result"),
    ({"raw": b"x" * 65_537}, "raw"),
]


@pytest.mark.parametrize(("wrong", "field"), BROKEN, ids=[row[1] + str(place) for place, row in enumerate(BROKEN)])
@pytest.mark.parametrize("place", [0, 2, 4])
async def test_word_that_is_no_evidence_is_invalid_with_its_field_and_the_others_count(
    on_sqlite: Core, wrong: dict[str, Any], field: str, place: int
) -> None:
    core = on_sqlite
    ids = [await core.make_payment() for _ in range(5)]
    words = [core.word(payment_id) for payment_id in ids]
    words[place] = words[place]._replace(**wrong)
    batch = core.writer.decoder.of_values(words)
    await core._notify.many(batch)
    outcomes = [verdict_at(batch, position).outcome for position in range(5)]
    assert outcomes == [INVALID if position == place else ACCEPTED for position in range(5)]
    assert field.encode() in batch.encode()
    assert paid(core) == set(ids) - {ids[place]}
    assert counted(core) == {(ACCEPTED, False): 4, (INVALID, False): 1}


async def test_several_invalid_words_and_nothing_but_invalid_words_are_answered_each(on_sqlite: Core) -> None:
    core = on_sqlite
    ids = [await core.make_payment() for _ in range(4)]
    words = [core.word(payment_id, amount_minor=1_234 if place % 2 else 0) for place, payment_id in enumerate(ids)]
    assert plain(await core.notify_many(*words)) == [(INVALID, False), (ACCEPTED, False)] * 2
    groups = core.metrics.registry.get_sample_value("paycore_commit_seconds_count")
    assert plain(await core.notify_many(words[0], words[2])) == [(INVALID, False)] * 2
    assert core.metrics.registry.get_sample_value("paycore_commit_seconds_count") == groups, "nothing to commit"
    assert counted(core) == {(ACCEPTED, False): 2, (INVALID, False): 4}


# One payment several times, and batches of several callers


async def test_words_about_one_payment_in_one_batch_are_judged_in_order_and_kept_once(core: Core) -> None:
    first, second = [await core.make_payment("bank_a", "bank_b") for _ in range(2)]
    words = [
        core.word(first, 1, "A1"),
        core.word(second, 2, "B9"),
        core.word(first, 1, "A1"),
        core.word(first, 2, "B1"),
        core.word(first, 1, "A1", amount_minor=1),
        core.word(first, 1, "A2"),
        core.word(first, 2, "B1"),
        core.failure(second, 1),
        core.word(second, 1, "A9"),
        core.word(second + 1),
        core.word(second + 1),
    ]
    assert plain(await core.notify_many(*words)) == [
        (ACCEPTED, False),
        (ACCEPTED, False),
        (ACCEPTED, True),
        (DUPLICATE, False),
        (MISMATCH, False),
        (SECOND_CAPTURE, False),
        (DUPLICATE, True),
        (RECORDED, False),
        (DUPLICATE, False),
        (UNKNOWN, False),
        (UNKNOWN, False),
    ]
    rows = core.snapshot()
    assert [len(rows[name]) for name in ("payment_outcome", "excess_payment", "refund", "refund_try")] == [2, 2, 2, 2]
    assert sorted(row.arrivals for row in rows["quarantine"]) == [1, 1, 2]
    assert paid(core) == {first, second}
    assert sum(counted(core).values()) == len(words)


async def test_batches_of_several_callers_in_one_group_get_their_own_answers(core: Core) -> None:
    ids = [await core.make_payment("bank_a", "bank_b") for _ in range(6)]
    batches = [
        [core.word(ids[0]), core.word(ids[1]), core.word(ids[2], amount_minor=0)],
        [core.word(ids[1], 2, "B1"), core.word(ids[3])],
        [core.word(ids[0])],
        [core.word(ids[4], amount_minor=9), core.word(ids[5])],
    ]
    before = core.metrics.registry.get_sample_value("paycore_commit_seconds_count")
    async with held(core.writer):
        tasks = [asyncio.ensure_future(core.notify_many(*batch)) for batch in batches]
        await asyncio.sleep(0)
    answers = await asyncio.gather(*tasks)
    # The block that held the writer is one commit, all the batches another.
    assert core.metrics.registry.get_sample_value("paycore_commit_seconds_count") == (before or 0) + 2
    assert [plain(one) for one in answers] == [
        [(ACCEPTED, False), (ACCEPTED, False), (INVALID, False)],
        [(DUPLICATE, False), (ACCEPTED, False)],
        [(ACCEPTED, True)],
        [(MISMATCH, False), (ACCEPTED, False)],
    ]
    for batch, answered in zip(batches, answers, strict=True):
        for word, verdict in zip(batch, answered, strict=True):
            if verdict.outcome != INVALID:
                assert word.channel_order_no == f"{verdict.payment_id}{verdict.attempt:02}"
    assert sum(counted(core).values()) == 8


async def test_batch_larger_than_a_group_is_one_commit_beside_its_neighbours(
    on_sqlite: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = on_sqlite
    monkeypatch.setattr(writer_module, "MAX_GROUP", 10)
    ids = [await core.make_payment() for _ in range(33)]
    batches = [ids[:4], ids[4:29], ids[29:]]
    async with held(core.writer):
        tasks = [asyncio.ensure_future(core.notify_many(*map(core.word, batch))) for batch in batches]
        await asyncio.sleep(0)
    answers = await asyncio.gather(*tasks)
    assert [plain(one) for one in answers] == [[(ACCEPTED, False)] * len(batch) for batch in batches]
    group = {row.payment_id: row.group_no for row in core.snapshot()["payment_outcome"]}
    assert [len({group[payment_id] for payment_id in batch}) for batch in batches] == [1, 1, 1]
    assert group[ids[0]] == group[ids[4]] != group[ids[29]]
    assert counted(core) == {(ACCEPTED, False): 33}


# A queue that is nearly full


async def test_words_beyond_the_room_of_the_queue_are_throttled_and_those_before_it_count(tmp_path: Path) -> None:
    with Core(take_database("sqlite", tmp_path), clock=ManualClock(), queue_limit=5) as core:
        ids = [await core.make_payment() for _ in range(8)]
        words = [core.word(payment_id) for payment_id in ids]
        async with held(core.writer):
            waiting = [asyncio.ensure_future(core.notify_many(*words[:2]))]
            await asyncio.sleep(0)
            waiting.append(asyncio.ensure_future(core.notify_many(*words[2:7])))
            await asyncio.sleep(0)
            assert plain(await core.notify_many(words[7], words[7])) == [(THROTTLED, False)] * 2
            with pytest.raises(ThrottledError) as refused:
                await core.notify(words[7])
        assert refused.value.reason == "QUEUE_FULL"
        answers = [plain(one) for one in await asyncio.gather(*waiting)]
        assert answers == [[(ACCEPTED, False)] * 2, [(ACCEPTED, False)] * 3 + [(THROTTLED, False)] * 2]
        assert paid(core) == set(ids[:5])
        assert counted(core) == {(ACCEPTED, False): 5, (THROTTLED, False): 5}
        assert plain(await core.notify_many(*words[3:])) == [(ACCEPTED, True)] * 2 + [(ACCEPTED, False)] * 3


# A caller that hangs up


async def test_batch_whose_caller_hung_up_is_committed_all_the_same(core: Core) -> None:
    ids = [await core.make_payment() for _ in range(3)]
    async with held(core.writer):
        task = asyncio.ensure_future(core.notify_many(*map(core.word, ids)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert plain(await core.notify_many(*map(core.word, ids))) == [(ACCEPTED, True)] * 3
    assert counted(core) == {(ACCEPTED, False): 3, (ACCEPTED, True): 3}


# Rows that the database refuses


def refuse_trade_no(url: str, trade_no: str) -> None:
    """Let no outcome of this trade number in."""
    if is_postgresql(url):
        change(url, text(f"ALTER TABLE payment_outcome ADD CONSTRAINT own CHECK (channel_trade_no <> '{trade_no}')"))
    else:
        refuses = f"WHEN new.channel_trade_no = '{trade_no}' BEGIN SELECT RAISE(ABORT, 'poison'); END"
        change(url, text(f"CREATE TRIGGER own BEFORE INSERT ON payment_outcome {refuses}"))


@pytest.fixture
def poisoned(core: Core) -> Iterator[Core]:
    refuse_trade_no(core.url, "POISON")
    yield core
    if is_postgresql(core.url):
        # The tests take turns on this database.
        change(core.url, text("ALTER TABLE payment_outcome DROP CONSTRAINT own"))


@pytest.mark.parametrize("places", [{0}, {4}, {8}, {0, 1, 8}], ids=str)
async def test_poison_word_in_a_batch_is_invalid_for_itself_and_the_rest_succeeds(
    poisoned: Core, places: set[int]
) -> None:
    core = poisoned
    ids = [await core.make_payment() for _ in range(9)]
    words = [
        core.word(payment_id, trade_no="POISON" if place in places else "T1") for place, payment_id in enumerate(ids)
    ]
    batch = core.writer.decoder.of_values(words)
    async with held(core.writer):
        tasks = [asyncio.ensure_future(core._notify.many(batch)), asyncio.ensure_future(core.notify_many(words[5]))]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    outcomes = [verdict_at(batch, place).outcome for place in range(9)]
    assert outcomes == [INVALID if place in places else ACCEPTED for place in range(9)]
    assert batch.encode().count(b"the database refuses it") == len(places)
    assert paid(core) == {payment_id for place, payment_id in enumerate(ids) if place not in places}
    assert counted(core) == {(ACCEPTED, False): 9 - len(places), (INVALID, False): len(places), (ACCEPTED, True): 1}
    for place in places:
        entry = core.index.get(ids[place])
        assert entry is not None
        assert (entry.state, entry.captured_mask) == (PaymentState.OPEN, 0)


# A commit whose answer was lost


def lose_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next commit is made, and its answer lost."""
    left = [1]

    def fail(name: str) -> None:
        if name == "store.committed" and left:
            left.pop()
            raise FailpointError(name)

    for module in (sqlite, postgresql):
        monkeypatch.setattr(module, "failpoint", fail)


async def test_batch_whose_commit_was_not_answered_is_answered_as_if_it_had_been(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [await core.make_payment("bank_a", "bank_b") for _ in range(3)]
    await core.notify(core.word(ids[2]))
    words = [
        core.word(ids[0]),
        core.word(ids[0], 2, "B1"),
        core.word(ids[0]),
        core.failure(ids[1]),
        core.word(ids[2], 2, "B3"),
        core.word(ids[2]),
        core.word(ids[2] + 1),
    ]
    before = counted(core)
    lose_an_answer(monkeypatch)
    expected = [
        *((ACCEPTED, False), (DUPLICATE, False), (ACCEPTED, True), (RECORDED, False)),
        *((DUPLICATE, False), (ACCEPTED, True), (UNKNOWN, False)),
    ]
    assert plain(await core.notify_many(*words)) == expected
    assert core.count("paycore_commit_failures_total", cause="commit_unknown") == 1
    assert counted(core) - before == Counter(expected)
    rows = core.snapshot()
    assert [len(rows[name]) for name in ("payment_outcome", "excess_payment", "refund")] == [2, 2, 2]
    assert [row.arrivals for row in rows["quarantine"]] == [1]
    check_money_rules(rows)


# A database that goes away in the middle of a group


async def assert_lost_and_sent_again(core: Core, ids: Sequence[int], away: Callable[[], object]) -> list[Notification]:
    """Take the database away under a group of batches: no word of them is answered, kept, marked or counted."""
    words = [core.word(payment_id) for payment_id in ids]
    before = counted(core)
    block = Block()
    blocked = asyncio.ensure_future(core.writer.run(block))
    await asyncio.to_thread(block.entered.wait, 20)
    caught = [asyncio.ensure_future(core.notify_many(*words[:3])), asyncio.ensure_future(core.notify_many(*words[3:]))]
    await asyncio.sleep(0)
    away()
    block.gate.set()
    for task in (*caught, blocked):
        with pytest.raises(StoreUnavailableError):
            await task
    with pytest.raises(StoreUnavailableError):
        await core.notify_many(*words)
    assert core.health[-1] is False
    assert counted(core) == before
    for payment_id in ids:
        entry = core.index.get(payment_id)
        assert entry is None or (entry.state, entry.captured_mask) == (PaymentState.OPEN, 0)
    return words


async def assert_taken_in_at_last(core: Core, words: Sequence[Notification]) -> None:
    before, known = counted(core), paid(core)
    assert plain(await core.notify_many(*words)) == [(ACCEPTED, False)] * len(words)
    assert counted(core) - before == {(ACCEPTED, False): len(words)}
    assert len(paid(core)) == len(known) + len(words)
    assert core.health[-1] is True


async def test_file_moved_away_in_the_middle_of_a_group_and_back_loses_nothing_and_counts_nothing_twice(
    on_sqlite: Core,
) -> None:
    core = on_sqlite
    ids = [await core.make_payment() for _ in range(6)]
    away = core.path.with_name("away.db")
    words = await assert_lost_and_sent_again(core, ids, lambda: core.path.rename(away))
    away.rename(core.path)
    await assert_taken_in_at_last(core, words)


async def test_server_stopped_in_the_middle_of_a_group_and_started_loses_nothing_and_counts_nothing_twice() -> None:
    with own_server() as own, Core(own.fresh_database(), clock=ManualClock()) as core:
        ids = [await core.make_payment() for _ in range(6)]
        words = await assert_lost_and_sent_again(core, ids, lambda: own.stop(signal.SIGQUIT))
        own.start()
        assert paid(core) == set()
        await assert_taken_in_at_last(core, words)


async def test_locked_file_answers_no_word_of_a_batch_until_it_is_let_go(on_sqlite: Core) -> None:
    core = on_sqlite
    words = [core.word(await core.make_payment()) for _ in range(4)]
    with held_by_another_process(core.path, "BEGIN IMMEDIATE"):
        with pytest.raises(StoreUnavailableError) as refused:
            await core.notify_many(*words)
        assert refused.value.reason == "STORE_BUSY"
        assert counted(core) == {}
    await assert_taken_in_at_last(core, words)


async def test_full_database_answers_no_word_of_a_batch_until_there_is_room(on_sqlite: Core) -> None:
    """SQLite's own limit on pages: the same error as a full disk, without one."""
    core = on_sqlite
    ids = [await core.make_payment() for _ in range(300)]
    words = [core.word(payment_id, trade_no=f"T{payment_id:040}") for payment_id in ids]
    with sqlite3.connect(core.path) as reading:
        (pages,) = reading.execute("PRAGMA page_count").fetchone()
    reading.close()
    writing = core.store._writer_connection()  # type: ignore[attr-defined]  # the limit is a connection's own
    writing.connection.driver_connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreUnavailableError):
        await core.notify_many(*words)
    assert (counted(core), paid(core)) == ({}, set())
    # An unusable connection was thrown away, and with it its limit.
    await assert_taken_in_at_last(core, words)
