"""PostgreSQL goes away, at every step of the protocol: nothing is acknowledged that is not durable, nothing twice."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from paycore.domain.errors import InvalidArgumentError, StoreUnavailableError
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome, PaymentState
from paycore.store import postgresql_server
from paycore.usecases import writer as writer_module
from paycore.usecases.close import InsertClosed
from paycore.usecases.health import Heartbeat
from paycore.usecases.keys import ByPaymentId
from tests.support.clock import ManualClock
from tests.support.core import Core, change, check_money_rules, open_attempt
from tests.support.cutting import CuttingLink, When
from tests.support.databases import take_database
from tests.support.faults import can_mount, fill, small_disk
from tests.support.postgres import OwnServer, connected, end_connections, give_to_server, own_server, read_only
from tests.support.racers import payment_rows
from tests.support.units import Block, held

ACCEPTED, DUPLICATE, LATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.LATE


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_server, "LOCK_TIMEOUT_MS", 300)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return take_database("postgresql", tmp_path)


@pytest.fixture
def core(url: str) -> Iterator[Core]:
    with Core(url, clock=ManualClock()) as core:
        yield core


def failures(core: Core) -> dict[str, int]:
    """How often groups were not committed, by cause; the causes that did not occur are left out."""
    counts = {
        cause: core.count("paycore_commit_failures_total", cause=cause)
        for cause in ("busy", "commit_unknown", "unavailable", "refused")
    }
    return {cause: count for cause, count in counts.items() if count}


async def assert_unavailable(core: Core, word: Notification) -> None:
    """A success is answered UNAVAILABLE and leaves no mark in the index, and the health is down."""
    with pytest.raises(StoreUnavailableError) as refused:
        await core.notify(word)
    assert refused.value.retryable
    assert core.health[-1] is False


async def assert_recovered(core: Core, payment_id: int) -> None:
    """The same word sent again is the first that was taken in."""
    verdict = await core.notify(core.word(payment_id))
    assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)
    assert core.health[-1] is True
    await core.writer.run(Heartbeat())
    assert (await core.notify(core.word(payment_id))).replayed
    check_money_rules(core.snapshot())


# The connection is cut

# Words of the protocol; the zero ends a statement, where READ COMMITTED goes on.
STEPS: list[tuple[bytes, When, str]] = [
    (b"BEGIN", "instead", "busy"),
    (b"BEGIN", "answered", "busy"),
    (b"INSERT INTO payment_outcome", "instead", "busy"),
    (b"INSERT INTO payment_outcome", "answered", "busy"),
    (b"FOR NO KEY UPDATE", "answered", "busy"),
    (b"INSERT INTO excess_payment", "answered", "busy"),
    (b"INSERT INTO refund", "answered", "busy"),
    (b"COMMIT\0", "instead", "commit_unknown"),
    (b"COMMIT\0", "sent", "commit_unknown"),
    (b"COMMIT\0", "answered", "commit_unknown"),
]


@pytest.mark.parametrize(
    ("word", "when", "cause"), STEPS, ids=[f"{row[0].decode().strip(chr(0))}-{row[1]}" for row in STEPS]
)
async def test_connection_cut_at_any_step_is_settled_by_deciding_the_group_again(
    url: str, word: bytes, when: When, cause: str
) -> None:
    """One group: a first success, a duplicate of an older one, and a failure. Each is answered as if nothing was."""
    with CuttingLink(url) as link, Core(link.url, clock=ManualClock()) as core:
        ids = [await core.make_payment("bank_a", "bank_b") for _ in range(3)]
        await core.notify(core.word(ids[1]))
        words = [core.word(ids[0]), core.word(ids[1], 2, "T2"), core.failure(ids[2])]
        # A new connection, on which every statement goes out by its text.
        core.store.dispose()
        link.arm(word, when)
        verdicts = await asyncio.gather(*(core.notify(one) for one in words))
        assert [(verdict.outcome.name, verdict.replayed) for verdict in verdicts] == [
            ("ACCEPTED", False),
            ("DUPLICATE", False),
            ("RECORDED", False),
        ]
        assert (link.cuts, failures(core)) == (1, {cause: 1})
        rows = core.snapshot()
        assert len(rows["payment_outcome"]) == 2
        assert len(rows["excess_payment"]) == len(rows["refund"]) == len(rows["refund_try"]) == 1
        check_money_rules(rows)
        assert [(await core.notify(one)).replayed for one in words] == [True] * 3


async def test_connections_cut_between_groups_are_opened_anew_for_writer_and_readers(url: str) -> None:
    with CuttingLink(url) as link, Core(link.url, clock=ManualClock()) as core:
        ids = [await core.make_payment() for _ in range(2)]
        await asyncio.gather(*(core.query.find(ByPaymentId(payment_id)) for payment_id in ids))
        link.cut_all()
        assert (await core.notify(core.word(ids[0]))).outcome == ACCEPTED
        link.cut_all()
        found = await asyncio.gather(*(core.query.find(ByPaymentId(payment_id)) for payment_id in ids))
        assert [file.record.state for file in found] == [PaymentState.PAID, PaymentState.OPEN]
        assert core.health[-1] is True


@pytest.mark.parametrize("unit", ["pay", "close"])
async def test_unit_whose_commit_was_not_answered_is_done_once(url: str, unit: str) -> None:
    with CuttingLink(url) as link, Core(url, clock=ManualClock()) as core, Core(link.url, clock=core.clock) as cut:
        payment_id = await core.make_payment(states={1: AttemptState.CLOSED})
        link.arm(b"COMMIT\0", "answered")
        if unit == "pay":
            opened = await cut.writer.run(open_attempt(cut, "cut"))
            assert opened.step.name == "CREATE"
            payment_id = opened.record.payment.payment_id
        else:
            closing = InsertClosed(payment_id, CloseReason.MERCHANT, cut.registry.code)
            assert (await cut.writer.run(closing)).state == PaymentState.CLOSED
        assert failures(cut) == {"commit_unknown": 1}
        rows = payment_rows(url, payment_id)
        assert {name: len(found) for name, found in rows.items()} == {
            "merchant_order": 1,
            "payment": 1,
            "channel_order": 1,
            **({"task": 2} if unit == "pay" else {"payment_outcome": 1}),
        }


async def test_backend_that_is_terminated_inside_a_group_costs_a_try_and_nothing_else(core: Core, url: str) -> None:
    payment_id = await core.make_payment()
    block = Block()
    told = asyncio.ensure_future(core.notify(core.word(payment_id)))
    block_task = asyncio.ensure_future(core.writer.run(block))
    await asyncio.to_thread(block.entered.wait, 20)
    await asyncio.to_thread(end_connections, url)
    block.gate.set()
    await block_task
    verdict = await told
    assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)
    assert failures(core) == {"busy": 1}
    check_money_rules(core.snapshot())


async def test_process_that_stands_still_inside_a_group_is_cut_off_and_the_others_go_on(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_server, "IDLE_IN_TRANSACTION_MS", 700)
    with Core(url, clock=ManualClock()) as still, Core(url, clock=ManualClock()) as other:
        payment_id = await still.make_payment("bank_a", "bank_b")
        block = Block()
        frozen = asyncio.ensure_future(still.notify(still.word(payment_id)))
        blocked = asyncio.ensure_future(still.writer.run(block))
        await asyncio.to_thread(block.entered.wait, 20)
        verdict = await other.notify(other.word(payment_id, 2, "T2"))
        assert verdict.outcome == ACCEPTED
        assert failures(other).keys() == {"busy"}
        block.gate.set()
        # It wakes up, finds itself cut off, and decides its group again.
        assert (await frozen).outcome == DUPLICATE
        await blocked
        assert failures(still) == {"busy": 1}
        check_money_rules(still.snapshot())


# The server


@pytest.fixture(scope="module")
def own() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


async def test_server_that_dies_inside_a_group_and_comes_back_loses_nothing_and_counts_nothing_twice(
    own: OwnServer,
) -> None:
    with Core(own.fresh_database(), clock=ManualClock()) as core:
        ids = [await core.make_payment("bank_a", "bank_b") for _ in range(4)]
        assert (await core.notify(core.word(ids[0]))).outcome == ACCEPTED
        block = Block()
        caught = asyncio.ensure_future(core.notify(core.word(ids[1])))
        blocked = asyncio.ensure_future(core.writer.run(block))
        await asyncio.to_thread(block.entered.wait, 20)
        own.stop(signal.SIGQUIT)
        block.gate.set()
        for task in (caught, blocked):
            with pytest.raises(StoreUnavailableError):
                await task
        await assert_unavailable(core, core.word(ids[2]))
        with pytest.raises(StoreUnavailableError):
            await core.query.find(ByPaymentId(ids[0]))
        own.start()
        assert {row.payment_id for row in core.snapshot()["payment_outcome"]} == {ids[0]}
        for payment_id in ids[1:]:
            await assert_recovered(core, payment_id)
        assert (await core.notify(core.word(ids[0]))).replayed
        assert (await core.notify(core.word(ids[0], 2, "T2"))).outcome == DUPLICATE
        check_money_rules(core.snapshot())


async def test_commit_that_does_not_reach_its_standby_is_not_acknowledged(own: OwnServer) -> None:
    """A wait for the standby that is cut short is told by a warning alone: the driver takes it for a commit."""
    own.stop(signal.SIGINT)
    own.start("synchronous_standby_names=nobody", "synchronous_commit=local")
    try:
        url = own.fresh_database()
        with Core(url, clock=ManualClock()) as core:
            payment_id = await core.make_payment()
            core.store.dispose()
            own.server.run("ALTER ROLE paycore SET synchronous_commit = 'on'")
            waiting = asyncio.ensure_future(core.notify(core.word(payment_id)))
            cut_short = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            async with asyncio.timeout(20):
                while not waiting.done():
                    await asyncio.to_thread(own.server.run, cut_short)
            with pytest.raises(StoreUnavailableError):
                await waiting
            assert failures(core) == {"commit_unknown": 1, "busy": writer_module.MAX_TRIES - 1}
    finally:
        own.stop(signal.SIGQUIT)
        own.start("synchronous_commit=local")
        own.server.run("ALTER ROLE paycore RESET synchronous_commit")
        own.stop(signal.SIGINT)
        own.start()


async def test_database_that_turns_read_only_acknowledges_nothing_and_goes_on_when_it_is_writable(
    core: Core, url: str
) -> None:
    ids = [await core.make_payment() for _ in range(2)]
    await core.notify(core.word(ids[0]))
    with read_only(url):
        await assert_unavailable(core, core.word(ids[1]))
        assert (await core.query.find(ByPaymentId(ids[0]))).record.state == PaymentState.PAID
    await assert_recovered(core, ids[1])


async def test_table_that_is_gone_is_unavailable_and_no_row_of_the_group_is_blamed(core: Core, url: str) -> None:
    payment_id = await core.make_payment()
    with connected(url) as connection:
        connection.execute("ALTER TABLE payment_outcome RENAME TO hidden")
        await assert_unavailable(core, core.word(payment_id))
        connection.execute("ALTER TABLE hidden RENAME TO payment_outcome")
    assert failures(core) == {"unavailable": 1}
    await assert_recovered(core, payment_id)


async def test_table_locked_by_an_operator_is_busy_and_goes_on_when_it_is_let_go(core: Core, url: str) -> None:
    payment_id = await core.make_payment()
    with connected(url, autocommit=False) as connection:
        connection.execute("LOCK TABLE payment_outcome IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailableError) as refused:
            await core.notify(core.word(payment_id))
        connection.rollback()
    assert refused.value.reason == "STORE_BUSY"
    await assert_recovered(core, payment_id)


# Rows that only the database refuses

if can_mount():

    async def test_full_disk_acknowledges_nothing_and_goes_on_when_there_is_room(core: Core, url: str) -> None:
        ids = [await core.make_payment() for _ in range(3)]
        with small_disk(512) as folder, connected(url) as connection:
            folder.chmod(0o777)
            inside = folder / "space"
            inside.mkdir()
            give_to_server(inside)
            connection.execute(f"CREATE TABLESPACE small LOCATION '{inside}'")
            # Without a page of its own: the first row needs one.
            connection.execute("TRUNCATE payment_outcome")
            connection.execute("ALTER TABLE payment_outcome SET TABLESPACE small")
            try:
                filler = fill(folder)
                await assert_unavailable(core, core.word(ids[0]))
                assert failures(core) == {"unavailable": 1}
                filler.unlink()
                await assert_recovered(core, ids[0])
            finally:
                connection.execute("ALTER TABLE payment_outcome SET TABLESPACE pg_default")
                connection.execute("DROP TABLESPACE small")


async def test_poison_row_is_refused_alone_and_the_others_of_its_group_are_taken_in(core: Core) -> None:
    """A NUL is legal in the protocol and not in PostgreSQL; a check of an operator's own refuses another row."""
    ids = [await core.make_payment() for _ in range(9)]
    change(core.url, text("ALTER TABLE payment_outcome ADD CONSTRAINT own CHECK (channel_trade_no <> 'POISON')"))
    try:
        words = [core.word(payment_id, trade_no=f"T{place}") for place, payment_id in enumerate(ids)]
        words[3] = core.word(ids[3], trade_no="T\0")
        words[7] = core.word(ids[7], trade_no="POISON")
        async with held(core.writer):
            tasks = [asyncio.ensure_future(core.writer.notify(one)) for one in words]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        change(core.url, text("ALTER TABLE payment_outcome DROP CONSTRAINT own"))
    refused = [place for place, answer in enumerate(answers) if isinstance(answer, InvalidArgumentError)]
    assert refused == [3, 7]
    assert {answer.outcome for answer in answers if isinstance(answer, Verdict)} == {ACCEPTED}
    assert len(core.snapshot()["payment_outcome"]) == 7
    assert core.health[-1] is True
    check_money_rules(core.snapshot())


async def test_text_too_long_for_its_index_is_refused_alone(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id))
    too_long = "".join(chr(0x4E00 + number * 7_919 % 20_000) for number in range(9_000))
    with pytest.raises(InvalidArgumentError) as refused:
        await core.writer.notify(core.word(payment_id, 2, too_long))
    assert refused.value.reason == "ROW_REFUSED"
    assert (await core.notify(core.word(payment_id, 2, "T2"))).outcome == DUPLICATE
    check_money_rules(core.snapshot())
