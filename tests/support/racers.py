"""Processes that race over one database, each held where a test wants it to be held.

Run as a module this is the racer itself: it takes commands as JSON lines, several at a time, and answers each with its
number. Every failpoint is armed with ``pause``; a gate that stands open (its ``.go`` file is there) holds nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import resource
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import structlog

from paycore.domain.errors import PaycoreError
from paycore.domain.verdicts import AttemptState, CloseReason
from paycore.store import engine, postgresql_server
from paycore.usecases.close import InsertClosed
from paycore.usecases.pay_open import OpenAttempt
from tests.support.clock import ShiftedClock
from tests.support.core import CHANNEL, LIMITS, Core, as_url, pay_command, read_all
from tests.support.quarantine import a_book, an_examiner, verdicts_of
from tests.support.repair import Repair
from tests.support.simbank import adapter
from tests.support.units import Load

REPOSITORY = Path(__file__).parents[2]

LOCKED_POINTS = ("store.begun", "judge.outcomes_inserted", "store.before_commit")
"""Where a process stands inside its transaction, and so holds SQLite's write lock, or the rows it has written."""

FREE_POINTS = ("writer.taken", "store.committed", "writer.before_answer")
"""Where a process stands before or after its transaction."""

POINTS = (*FREE_POINTS, *LOCKED_POINTS)
SECONDS = 20.0

LOCK_WAIT_MS = 100
"""A second process waits for the lock in steps that a test can afford which lets it wait in vain."""


class Racer:
    """One process with a writer of its own on the database. Its index starts cold.

    bank_url: where its banks are; none without. gates: more places where it can be held. failpoints: name -> action, in
    place of the pause there; ``name*N`` for the N-th passage. `lock_wait_ms`, which may be set until it is started: how
    long each of its five tries waits for somebody else's lock.
    """

    def __init__(
        self, database: Path | str, folder: Path, *, bank_url: str = "", gates: Sequence[str] = (), **failpoints: str
    ) -> None:
        self.lock_wait_ms = LOCK_WAIT_MS
        self._bank_url = bank_url
        self._gates = (*POINTS, *gates)
        self._url = as_url(database)
        self.on_postgresql = self._url.startswith("postgresql")
        self._folder = folder
        self._failpoints = failpoints
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> Self:
        self._folder.mkdir(exist_ok=True)
        for point in self._gates:
            self.open(point)
        pauses = dict.fromkeys(self._gates, f"pause:{self._folder}")
        for place in self._failpoints:
            pauses.pop(place.partition("*")[0], None)
        armed = ",".join(f"{place}={action}" for place, action in {**pauses, **self._failpoints}.items())
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.support.racers",
            self._url,
            self._bank_url,
            str(self.lock_wait_ms),
            cwd=REPOSITORY,
            env={**os.environ, "PAYCORE_FAILPOINTS": armed},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._reader = asyncio.create_task(self._read())
        await self.ask("ping")
        return self

    async def stop(self) -> None:
        assert self._process is not None
        for point in self._gates:
            self.open(point)
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await self._reader
        # The transport's pipes are closed by the loop's next turn.
        await asyncio.sleep(0)

    async def wait_dead(self) -> int:
        assert self._process is not None
        return await asyncio.wait_for(self._process.wait(), SECONDS)

    def open(self, point: str) -> None:
        """Let the process pass from now on."""
        (self._folder / f"{point}.go").touch()

    def shut(self, point: str) -> None:
        """Hold the process when it comes by."""
        (self._folder / f"{point}.reached").unlink(missing_ok=True)
        (self._folder / f"{point}.go").unlink()

    async def reached(self, point: str) -> None:
        """Wait until the process is held there."""
        async with asyncio.timeout(SECONDS):
            while not (self._folder / f"{point}.reached").exists():
                await asyncio.sleep(0.002)

    def ask(self, verb: str, **asked: Any) -> asyncio.Future[Any]:
        """Send a command; the future holds its answer. An error of paycore's comes back as its reason."""
        assert self._process is not None
        assert self._process.stdin is not None
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        self._process.stdin.write(json.dumps({"number": number, "verb": verb, **asked}).encode() + b"\n")
        return asyncio.ensure_future(asyncio.wait_for(future, SECONDS))

    async def met_the_lock(self, before: int) -> None:
        """Wait until the process has found the database held by another one more often than ``before``."""
        async with asyncio.timeout(SECONDS):
            while await self.ask("busy") == before:
                await asyncio.sleep(0.005)

    async def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            answer = json.loads(line)
            future = self._waiting.pop(answer["number"])
            if not future.done():
                future.set_result(answer["result"])
        for future in self._waiting.values():
            if not future.done():
                future.set_result("DEAD")
        self._waiting.clear()


@contextlib.asynccontextmanager
async def two_racers(database: Path | str, folder: Path) -> AsyncIterator[tuple[Racer, Racer]]:
    """Run two processes on one database."""
    first, second = Racer(database, folder / "first"), Racer(database, folder / "second")
    await asyncio.gather(first.start(), second.start())
    try:
        yield first, second
    finally:
        await asyncio.gather(first.stop(), second.stop())


def payment_rows(database: Path | str, payment_id: int) -> dict[str, list[Any]]:
    """Every row about one payment, sorted; tables without any are left out."""
    rows = {
        name: sorted(row for row in found if getattr(row, "payment_id", None) == payment_id)
        for name, found in read_all(database).items()
    }
    return {name: found for name, found in rows.items() if found}


class _Process:
    """The racer's own side."""

    def __init__(self, url: str, bank_url: str, lock_wait_ms: int) -> None:
        engine.BUSY_TIMEOUT_MS = postgresql_server.LOCK_TIMEOUT_MS = lock_wait_ms
        channels = {CHANNEL: adapter(bank_url, 5_000)} if bank_url else {}
        self.clock = ShiftedClock()
        self.core = Core(url, clock=self.clock, channels=channels)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=1 << 20)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        tasks = set()
        with self.core:
            async for line in reader:
                task = asyncio.create_task(self._answer(json.loads(line)))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def _answer(self, asked: dict[str, Any]) -> None:
        number, verb = asked.pop("number"), asked.pop("verb")
        try:
            result = await getattr(self, f"do_{verb}")(**asked)
        except PaycoreError as error:
            result = error.reason
        sys.stdout.write(json.dumps({"number": number, "result": result}) + "\n")
        sys.stdout.flush()

    async def do_ping(self) -> str:
        return "pong"

    async def do_limit(self, size: int) -> str:
        """Let no file grow beyond ``size`` bytes from now on; -1 lifts the limit. Python ignores SIGXFSZ."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        return "limited"

    async def do_busy(self) -> int:
        return self.core.count("paycore_commit_failures_total", cause="busy")

    async def do_notify(self, payment_id: int, attempt: int, trade_no: str, **changes: Any) -> list[Any]:
        """Return the outcome's name and whether it was a replay."""
        verdict = await self.core.notify(self.core.word(payment_id, attempt, trade_no, **changes))
        return [verdict.outcome.name, verdict.replayed]

    async def do_fail(self, payment_id: int, attempt: int) -> list[Any]:
        """Tell of a failure; return as ``notify`` does."""
        verdict = await self.core.notify(self.core.failure(payment_id, attempt))
        return [verdict.outcome.name, verdict.replayed]

    async def do_refund(self) -> str:
        """Make one pass of the refunder."""
        await self.core.refunder.run_once()
        return "passed"

    async def do_advance(self, by_ms: int) -> int:
        """Set the clock ahead; return what it says."""
        self.clock.advance(by_ms)
        return self.clock.now_ms()

    async def do_run(self, job: str) -> list[Any]:
        """Make one pass of a job about attempts; return what it came to."""
        return list((await Repair(self.core).run(job))[0])

    async def do_pay(self, order_no: str, account: str, within_ms: int = 8_000) -> list[Any]:
        """Pay; return what is to be done next, the payment and the attempt."""
        result = await self.core.pay(pay_command(order_no, account), within_ms=within_ms)
        return [result.next_action.name, result.payment.payment_id, result.attempt.attempt]

    async def do_make(self, attempts: list[str], ended: list[int]) -> int:
        """Return the id of a new payment whose attempts named in ``ended`` are finally unpaid."""
        return await self.core.make_payment(*attempts, states=dict.fromkeys(ended, AttemptState.CLOSED))

    async def do_warm(self, payment_id: int) -> bool:
        """Load a payment into the index; say whether it was cold."""
        was_cold = payment_id not in self.core.index
        await self.core.writer.run(Load(payment_id, self.core.registry.code))
        return was_cold

    async def do_close(self, payment_id: int) -> str:
        """Return the outcome's state that the payment has afterwards."""
        unit = InsertClosed(payment_id, CloseReason.MERCHANT, self.core.registry.code)
        return (await self.core.writer.run(unit)).state.name

    async def do_examine(self) -> list[int]:
        """Make one pass over quarantine; return how many rows it closed and left."""
        result = await an_examiner(self.core).run_once()
        return [result.done, result.put_off]

    async def do_confirm(self, quarantine_id: str) -> str:
        """Confirm evidence on a person's word; return the last verdict on record."""
        row = await a_book(self.core).resolve(quarantine_id, verdict="confirmed", reason="a test", who="tester")
        return verdicts_of(row)[-1]

    async def do_open(self, order_no: str, account: str) -> list[Any]:
        """Write what Pay writes first; return the step that it takes next, the payment and the attempt."""
        unit = OpenAttempt(
            pay_command(order_no, account),
            ids=self.core.ids,
            limits=LIMITS,
            accounts=self.core.registry.code,
            schedule=self.core.schedule,
            lease_token=os.urandom(8).hex(),
            lease_ms=60_000,
        )
        opened = await self.core.writer.run(unit)
        attempt = None if opened.attempt is None else opened.attempt.attempt
        return [opened.step.name, opened.record.payment.payment_id, attempt]


if __name__ == "__main__":
    # Standard output carries the answers.
    structlog.configure(
        logger_factory=structlog.WriteLoggerFactory(sys.stderr), wrapper_class=structlog.make_filtering_bound_logger(50)
    )
    asyncio.run(_Process(sys.argv[1], sys.argv[2], int(sys.argv[3])).serve())
