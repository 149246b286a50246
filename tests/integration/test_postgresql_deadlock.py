"""Two sessions that wait for each other: PostgreSQL ends one (40P01), and its group is decided again."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from sqlalchemy import make_url

from paycore.domain.verdicts import NotifyOutcome
from paycore.store import postgresql_server
from paycore.store.protocol import WriteTransaction
from paycore.usecases.writer import UnindexedUnit
from tests.support.books import rows, run, someone_waits
from tests.support.clock import ManualClock
from tests.support.core import Core, check_money_rules
from tests.support.postgres import connected, fresh_postgres
from tests.support.simbank import wait_for
from tests.support.units import held

LOCK = "SELECT 1 FROM payment WHERE payment_id = %s FOR NO KEY UPDATE"


class LockOneThenOther(UnindexedUnit):
    """Locks a payment's row, waits until it may go on, and locks another one's."""

    def __init__(self, one: int, other: int) -> None:
        self._one, self._other = one, other
        self.has_one, self.go = threading.Event(), threading.Event()
        self.tries = 0

    def apply(self, transaction: WriteTransaction) -> int:
        self.tries += 1
        transaction.lock_records([self._one])
        self.has_one.set()
        assert self.go.wait(20)
        transaction.lock_records([self._other])
        return self.tries


async def test_deadlock_ends_a_group_that_is_decided_again_and_no_caller_hears_of_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    del tmp_path
    # The lock's own limit would end the wait as well.
    monkeypatch.setattr(postgresql_server, "LOCK_TIMEOUT_MS", 20_000)
    url = fresh_postgres()
    run(url, f'ALTER DATABASE "{make_url(url).database}" SET deadlock_timeout = 100')
    with Core(url, clock=ManualClock()) as core, connected(url, autocommit=False) as crossing:
        ids = [await core.make_payment() for _ in range(3)]
        # Who waits first notices last.
        crossing.execute("SET LOCAL deadlock_timeout = '20s'")
        crossing.execute(LOCK, [ids[1]])
        unit = LockOneThenOther(ids[0], ids[1])
        async with held(core.writer):
            told = asyncio.ensure_future(core.notify(core.word(ids[2])))
            locked = asyncio.ensure_future(core.writer.run(unit))
            await asyncio.sleep(0)
        await asyncio.to_thread(unit.has_one.wait, 20)
        waiting = asyncio.ensure_future(asyncio.to_thread(crossing.execute, LOCK, [ids[0]]))
        await asyncio.to_thread(wait_for, lambda: someone_waits(url), "the other session's wait")
        unit.go.set()
        await waiting
        crossing.rollback()
        assert await locked == 2
        verdict = await told
        assert (verdict.outcome, verdict.replayed) == (NotifyOutcome.ACCEPTED, False)
        assert core.count("paycore_commit_failures_total", cause="busy") == 1
        check_money_rules(core.snapshot())
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    wait_for(lambda: rows(url, deadlocks) == [(1,)], "the deadlock in the server's own count")
