"""A kill -9 that takes the page cache along: what was not synced when the server died is gone.

``tests/crash/unsynced.c`` keeps writes in the process until they are synced. One process has the SQLite file.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from paycore.client.aio import AsyncPaycoreClient
from paycore.client.errors import PaycoreRpcError
from paycore.client.retrying import NO_RETRY
from paycore.store.schema import migrate
from paycore.v1 import payment_pb2
from tests.support.core import check_money_rules, read_all
from tests.support.facts import AMOUNT_MINOR, CURRENCY, put_payments
from tests.support.server import ServerProcess

SOURCE = Path(__file__).parents[1] / "crash" / "unsynced.c"
PAYMENTS = 1_500
CALLERS = 24
KILLS = 5
ANSWERED_BEFORE_KILL = 100


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler (Debian: apt-get install gcc): durability without a page cache is NOT shown here")
    library = tmp_path_factory.mktemp("shim") / "unsynced.so"
    command = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(library)]
    subprocess.run([*command, str(SOURCE), "-ldl", "-pthread"], check=True)
    return library


class _Bare(ServerProcess):
    """A server without the shim, or with it: ``dress`` it before it is started."""

    def dress(self, shim: Path | None, **env: str) -> None:
        """Say whether the next start loads the shim."""
        for name in ("LD_PRELOAD", "PAYCORE_UNSYNCED", "PAYCORE_UNSYNCED_NEVER"):
            self.env.pop(name, None)
        if shim is not None:
            self.env.update({"LD_PRELOAD": str(shim), "PAYCORE_UNSYNCED": str(self.db_path), **env})


async def tell(address: str, numbers: Sequence[str], told: set[str], enough: asyncio.Event, at: int) -> None:
    """Tell of the payment of each order from many callers at once; each stops at its first error."""
    waiting = iter(numbers)

    async def caller(client: AsyncPaycoreClient) -> None:
        for number in waiting:
            try:
                answer = await client.notify(
                    channel="simbank",
                    account="bank_a",
                    channel_order_no=number,
                    result=payment_pb2.CHANNEL_RESULT_SUCCESS,
                    amount_minor=AMOUNT_MINOR,
                    currency=CURRENCY,
                    channel_trade_no=f"T{number}",
                    paid_at_ms=None,
                )
            except PaycoreRpcError:
                return
            assert answer.outcome == payment_pb2.NOTIFY_OUTCOME_ACCEPTED
            told.add(f"T{number}")
            if len(told) >= at:
                enough.set()

    async with AsyncPaycoreClient(address, timeout_ms=10_000, retry=NO_RETRY) as client:
        await asyncio.gather(*(caller(client) for _ in range(CALLERS)))


async def kill_under_load(server: ServerProcess, numbers: Sequence[str]) -> set[str]:
    """Return the trade numbers that were acknowledged before the server died, with others still unanswered."""
    told: set[str] = set()
    enough = asyncio.Event()
    await asyncio.to_thread(server.start)
    load = asyncio.create_task(tell(server.address, numbers, told, enough, ANSWERED_BEFORE_KILL))
    await asyncio.wait_for(enough.wait(), 60)
    server.kill()
    await load
    assert ANSWERED_BEFORE_KILL <= len(told) < len(numbers), "it was killed under load"
    return told


def recorded(server: ServerProcess) -> set[str]:
    """The captures that are in the file, seen by a process that has no shim."""
    rows = read_all(server.url)
    check_money_rules(rows)
    return {row.channel_trade_no for row in rows["payment_outcome"]}


@pytest.fixture
def made(tmp_path: Path) -> tuple[_Bare, list[str]]:
    server = _Bare(tmp_path / "paycore.db")
    migrate(server.url)
    return server, put_payments(server.url, PAYMENTS)


async def test_server_that_dies_with_its_unsynced_writes_has_everything_it_acknowledged(
    made: tuple[_Bare, list[str]], shim: Path
) -> None:
    server, numbers = made
    told: set[str] = set()
    server.dress(shim)
    for _ in range(KILLS):
        told |= await kill_under_load(server, [number for number in numbers if f"T{number}" not in told])
        assert told <= recorded(server)
    # Another start, without the shim, reads the file as it lies on the disk.
    server.dress(None)
    await asyncio.to_thread(server.start)
    assert server.terminate() == 0
    assert told <= recorded(server)


async def test_disk_that_never_syncs_loses_what_was_acknowledged(made: tuple[_Bare, list[str]], shim: Path) -> None:
    server, numbers = made
    server.dress(shim, PAYCORE_UNSYNCED_NEVER="1")
    told = await kill_under_load(server, numbers)
    assert not told & recorded(server), "the control: the shim keeps what is not synced out of the file"


async def test_server_that_answers_before_it_commits_loses_what_it_acknowledged(
    made: tuple[_Bare, list[str]], shim: Path
) -> None:
    server, numbers = made
    server.program = [sys.executable, "-m", "tests.crash.hasty"]
    server.dress(shim)
    waiting = iter(numbers)
    for _ in range(KILLS):
        told = await kill_under_load(server, list(itertools.islice(waiting, PAYMENTS // KILLS)))
        if told - recorded(server):
            return
    raise AssertionError("the control: an answer before the commit is lost when the server dies in between")
