"""TigerBeetle through its Python client: a pending transfer with a timeout a payment, then post_pending a success.

TIGERBEETLE_BINARY names the server's binary; the client of the very same release comes from PyPI
(``pip install tigerbeetle==RELEASE``). The pending transfers are made before anything is timed.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.peers.common import Options, Result, SkippedError, Success, Timed, expect, lot, main, successes
from paycore.bench.databases import Database
from paycore.bench.result import BenchError

IN_FLIGHT = 4
LARGEST_BATCH = 8_189
START_SECONDS = 60
BUYERS, MERCHANT = 1, 2
LEDGER, CODE = 1, 1
TIMEOUT_SECONDS = 86_400


def client_module() -> Any:
    """The client. Raises SkippedError where it is not installed."""
    try:
        return importlib.import_module("tigerbeetle")
    except ImportError:
        raise SkippedError("the Python client of TigerBeetle is not installed: pip install tigerbeetle") from None


def binary() -> str:
    """The server. Raises SkippedError where none is named."""
    named = os.environ.get("TIGERBEETLE_BINARY", "")
    if not named:
        raise SkippedError("TIGERBEETLE_BINARY names no server")
    return named


@contextmanager
def server(program: str, folder: Path) -> Iterator[str]:
    """Run one replica on a file of its own; hand out its address."""
    data, log = folder / "0_0.tigerbeetle", folder / "tigerbeetle.log"
    layout = ["--cluster=0", "--replica=0", "--replica-count=1"]
    made = subprocess.run([program, "format", *layout, str(data)], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        raise BenchError(f"tigerbeetle format: {made.stderr[-2000:]}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [program, "start", f"--addresses={address}", str(data)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        wait(process, address, log)
        yield address
    finally:
        process.terminate()
        process.wait()


def wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until it listens."""
    deadline = time.monotonic() + START_SECONDS
    host, _, port = address.partition(":")
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"tigerbeetle did not start: {log.read_text()[-2000:]}") from None
            time.sleep(0.05)
        else:
            return


def check(tb: Any, results: list[Any]) -> None:
    """Raise BenchError unless each was created."""
    refused = [result.status for result in results if result.status != tb.CreateTransferStatus.CREATED]
    if refused:
        raise BenchError(f"{len(refused)} transfers were refused, the first for {refused[0]!r}")


class Bench:
    """One client and what it sends."""

    def __init__(self, tb: Any, client: Any, batch: int) -> None:
        self._tb = tb
        self._client = client
        self._batch = batch

    async def make_accounts(self) -> None:
        """One account that is debited and one that is credited."""
        accounts = [self._tb.Account(id=number, ledger=LEDGER, code=CODE) for number in (BUYERS, MERCHANT)]
        await self._client.create_accounts(accounts)

    async def make_pending(self, words: list[Success]) -> None:
        """A transfer for each payment that waits for its success."""
        for start in range(0, len(words), self._batch):
            part = words[start : start + self._batch]
            check(self._tb, await self._client.create_transfers([self._pending(word) for word in part]))

    async def post(self, words: list[Success]) -> Timed:
        """Post them all, with so many batches in flight; made as objects while it runs, as a caller has to."""
        starts, latencies_ns = iter(range(0, len(words), self._batch)), []

        async def send() -> None:
            for start in starts:
                began_ns = time.perf_counter_ns()
                transfers = [self._posting(word) for word in words[start : start + self._batch]]
                check(self._tb, await self._client.create_transfers(transfers))
                latencies_ns.append(time.perf_counter_ns() - began_ns)

        started_ns = time.perf_counter_ns()
        await asyncio.gather(*(send() for _ in range(IN_FLIGHT)))
        return Timed((time.perf_counter_ns() - started_ns) / 1e9, sorted(latencies_ns))

    async def posted(self) -> int:
        """What the merchant was credited in all."""
        (account,) = await self._client.lookup_accounts([MERCHANT])
        return int(account.credits_posted)

    def _pending(self, word: Success) -> Any:
        return self._tb.Transfer(
            id=word.payment_id,
            debit_account_id=BUYERS,
            credit_account_id=MERCHANT,
            amount=word.amount_minor,
            timeout=TIMEOUT_SECONDS,
            ledger=LEDGER,
            code=CODE,
            flags=self._tb.TransferFlags.PENDING,
        )

    def _posting(self, word: Success) -> Any:
        return self._tb.Transfer(
            id=word.payment_id | 1 << 64,
            amount=word.amount_minor,
            pending_id=word.payment_id,
            flags=self._tb.TransferFlags.POST_PENDING_TRANSFER,
        )


async def run(tb: Any, address: str, options: Options, words: list[Success]) -> Timed:
    """Make everything, then post it."""
    client = tb.ClientAsync(cluster_id=0, replica_addresses=address)
    try:
        bench = Bench(tb, client, min(options.batch, LARGEST_BATCH))
        await bench.make_accounts()
        await bench.make_pending(words)
        timed = await bench.post(words)
        expect("what was credited", await bench.posted(), sum(word.amount_minor for word in words))
    finally:
        await client.close()
    return timed


def measure(options: Options, database: Database) -> Result:
    """Post all payments. The database is not used: TigerBeetle is one."""
    del database
    program, tb = binary(), client_module()
    words = successes(lot(options.size))
    with server(program, options.folder) as address:
        timed = asyncio.run(run(tb, address, options, words))
    version = subprocess.run([program, "version"], check=True, capture_output=True, text=True).stdout.strip()
    meaning = f"post_pending_transfer, {options.batch:,} a batch, {IN_FLIGHT} in flight, Python client"
    return timed.result("TigerBeetle", meaning, options.size, {"tigerbeetle": version})


if __name__ == "__main__":
    sys.exit(main(measure, batch=8_000, store="sqlite"))
