"""The database cannot be used: nothing is acknowledged, no mark stays, and it goes on when the cause is gone."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from paycore.domain.errors import StoreUnavailableError
from paycore.domain.verdicts import NotifyOutcome, PaymentState
from paycore.store import engine
from paycore.store.engine import DatabaseRefusedError
from paycore.store.protocol import StoreBusyError
from paycore.store.schema import open_store
from paycore.usecases.health import Heartbeat
from paycore.usecases.keys import ByPaymentId
from tests.support.clock import ManualClock
from tests.support.core import Core, check_money_rules, fresh_database, read_all
from tests.support.faults import (
    can_mount,
    checkpoint,
    damage,
    fill,
    held_by_another_process,
    mend,
    open_folder,
    read_only,
    small_disk,
)
from tests.support.racers import Racer, payment_rows

ACCEPTED = NotifyOutcome.ACCEPTED


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 20)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    with Core(fresh_database(tmp_path / "paycore.db"), clock=ManualClock()) as core:
        yield core


async def assert_unavailable(core: Core, payment_id: int, reason: str = "STORE_UNAVAILABLE") -> None:
    """A success is answered UNAVAILABLE, leaves no mark in the index, and the health is down."""
    with pytest.raises(StoreUnavailableError) as refused:
        await core.notify(core.word(payment_id))
    assert (refused.value.reason, refused.value.retryable) == (reason, True)
    entry = core.index.get(payment_id)
    assert entry is None or (entry.state, entry.captured_mask) == (PaymentState.OPEN, 0)
    assert core.health[-1] is False


async def assert_recovered(core: Core, payment_id: int) -> None:
    """The same word sent again is the first that was taken in."""
    verdict = await core.notify(core.word(payment_id))
    assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)
    assert core.health[-1] is True
    await core.writer.run(Heartbeat())
    assert (await core.notify(core.word(payment_id))).replayed
    check_money_rules(core.snapshot())


# Disk full


# Mounting needs rights that not every runner has. A limit on the file's size, below, shows the same everywhere.
if can_mount():

    async def test_full_disk_acknowledges_nothing_and_goes_on_when_there_is_room() -> None:
        """A file system of its own that has no room left."""
        with small_disk(1_024) as folder, Core(fresh_database(folder / "paycore.db"), clock=ManualClock()) as core:
            ids = [await core.make_payment() for _ in range(3)]
            await core.notify(core.word(ids[0]))
            # While a reader is connected the log is not folded into the file, which would make room.
            await core.query.find(ByPaymentId(ids[0]))
            filler = fill(folder)
            await beat_until_full(core)
            payment_id = ids[1]
            await assert_unavailable(core, payment_id)
            with pytest.raises(StoreUnavailableError):
                await core.writer.run(Heartbeat())
            assert {row.payment_id for row in core.snapshot()["payment_outcome"]} == {ids[0]}
            assert (await core.query.find(ByPaymentId(ids[0]))).record.state == PaymentState.PAID
            filler.unlink()
            await assert_recovered(core, payment_id)
            await assert_recovered(core, ids[2])


async def beat_until_full(core: Core) -> None:
    """The log has pages to spare; once the least write finds no more, the disk is full for all."""
    clock = core.clock
    assert isinstance(clock, ManualClock)
    for _ in range(200):
        # SQLite writes nothing where a row stays as it is.
        clock.advance(1)
        try:
            await core.writer.run(Heartbeat())
        except StoreUnavailableError:
            clock.advance(1)
            return
    pytest.fail("the disk never was full")


async def test_file_size_limit_acknowledges_nothing_and_goes_on_when_it_is_lifted(tmp_path: Path) -> None:
    path = fresh_database(tmp_path / "paycore.db")
    racer = await Racer(path, tmp_path / "racer").start()
    try:
        payment_id = await racer.ask("make", attempts=["bank_a", "bank_b"], ended=[])
        await racer.ask("limit", size=path.with_name("paycore.db-wal").stat().st_size)
        for _ in range(2):
            answer = await racer.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1")
            assert answer == "STORE_UNAVAILABLE"
        assert "payment_outcome" not in payment_rows(path, payment_id)
        await racer.ask("limit", size=-1)
        assert await racer.ask("notify", payment_id=payment_id, attempt=1, trade_no="T1") == ["ACCEPTED", False]
        assert await racer.ask("notify", payment_id=payment_id, attempt=2, trade_no="T2") == ["DUPLICATE", False]
    finally:
        await racer.stop()
    check_money_rules(read_all(path))


# Read-only


async def test_read_only_database_acknowledges_nothing_and_goes_on_when_it_is_writable(tmp_path: Path) -> None:
    with open_folder() as folder, Core(fresh_database(folder / "paycore.db"), clock=ManualClock()) as core:
        payment_id = await core.make_payment()
        # A file that is open for writing stays so: permissions count when it is opened anew.
        core.store.dispose()
        with read_only(core.path):
            await assert_unavailable(core, payment_id)
        await assert_recovered(core, payment_id)


def test_read_only_database_is_refused_at_the_start_and_told_what_to_do() -> None:
    with open_folder() as folder:
        path = fresh_database(folder / "paycore.db")
        with read_only(path), pytest.raises(DatabaseRefusedError, match=r"may be written|folder writable"):
            open_store(f"sqlite:///{path}")


# Locked


@pytest.mark.parametrize("begin", ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
async def test_locked_database_acknowledges_nothing_but_is_read_and_goes_on_when_it_is_let_go(
    core: Core, begin: str
) -> None:
    payment_id = await core.make_payment()
    with held_by_another_process(core.path, begin):
        await assert_unavailable(core, payment_id, "STORE_BUSY")
        assert (await core.query.find(ByPaymentId(payment_id))).record.state == PaymentState.OPEN
    await assert_recovered(core, payment_id)


async def test_database_held_exclusively_is_unavailable_to_readers_too(core: Core) -> None:
    payment_id = await core.make_payment()
    core.store.dispose()
    exclusively = ("PRAGMA locking_mode = EXCLUSIVE", "BEGIN EXCLUSIVE", "UPDATE writer SET seen_at_ms = 1", "COMMIT")
    with held_by_another_process(core.path, *exclusively):
        with pytest.raises(StoreUnavailableError) as refused:
            await core.query.find(ByPaymentId(payment_id))
        assert refused.value.retryable
        with pytest.raises(StoreUnavailableError):
            await core.notify(core.word(payment_id))
    await assert_recovered(core, payment_id)
    assert (await core.query.find(ByPaymentId(payment_id))).record.state == PaymentState.PAID


async def test_writer_cannot_start_on_a_locked_database(tmp_path: Path) -> None:
    path = fresh_database(tmp_path / "paycore.db")
    core = Core(path, clock=ManualClock())
    with held_by_another_process(path, "BEGIN IMMEDIATE"), pytest.raises((StoreUnavailableError, StoreBusyError)):
        core.writer.start()
    core.store.dispose()


# Damaged or gone


async def test_database_damaged_while_it_is_served_acknowledges_nothing_and_goes_on_when_it_is_mended(
    core: Core,
) -> None:
    payment_id = await core.make_payment()
    other_id = await core.make_payment()
    await core.notify(core.word(other_id))
    checkpoint(core.path)
    content = damage(core.path)
    core.forget()
    await assert_unavailable(core, payment_id)
    with pytest.raises(StoreUnavailableError):
        await core.query.find(ByPaymentId(payment_id))
    mend(core.path, content)
    await assert_recovered(core, payment_id)
    assert (await core.notify(core.word(other_id))).replayed


async def test_table_that_is_gone_is_unavailable_and_no_row_of_the_group_is_blamed(core: Core) -> None:
    payment_id = await core.make_payment()
    with sqlite3.connect(core.path) as connection:
        connection.execute("ALTER TABLE payment_outcome RENAME TO hidden")
    connection.close()
    await assert_unavailable(core, payment_id)
    with sqlite3.connect(core.path) as connection:
        connection.execute("ALTER TABLE hidden RENAME TO payment_outcome")
    connection.close()
    await assert_recovered(core, payment_id)


# File deleted or moved away


async def test_database_moved_away_while_it_is_served_acknowledges_nothing_and_goes_on_when_it_is_back(
    core: Core, tmp_path: Path
) -> None:
    """SQLite itself would go on committing to a file that nobody will ever find again."""
    first, second = [await core.make_payment() for _ in range(2)]
    await core.notify(core.word(first))
    away = tmp_path / "away.db"
    (tmp_path / "paycore.db").rename(away)
    await assert_unavailable(core, second)
    await assert_unavailable(core, second)
    away.rename(tmp_path / "paycore.db")
    await assert_recovered(core, second)
    assert (await core.notify(core.word(first))).replayed


async def test_database_replaced_by_its_backup_is_not_written_to_the_old_file(core: Core, tmp_path: Path) -> None:
    path = tmp_path / "paycore.db"
    payment_id = await core.make_payment()
    backup = sqlite3.connect(tmp_path / "backup.db")
    with sqlite3.connect(path) as source:
        source.backup(backup)
    source.close()
    backup.close()
    (tmp_path / "backup.db").rename(path)
    await assert_unavailable(core, payment_id)
    await assert_recovered(core, payment_id)
    with sqlite3.connect(path) as found:
        (count,) = found.execute("SELECT count(*) FROM payment_outcome").fetchone()
    found.close()
    assert count == 1
