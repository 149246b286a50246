"""One run: traffic without a pause, a server that dies under it again and again, and judgement in the end."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.crash.calls import Calls
from tests.crash.judge import Finding, judge, read_books, report
from tests.crash.points import Plan, Tally
from tests.crash.stage import BROKEN, FOUND_BY_SWEEP, Server, Stage, set_up
from tests.crash.stories import Day, Users
from tests.crash.told import Told
from tests.crash.traffic import Traffic
from tests.support.core import read_all
from tests.support.server import START_SECONDS, clean_environment

AT_ONCE = 24
"""Stories under way at the same time."""

_STRIKES_WITHIN_SECONDS = 4.0
"""How long a point has to be reached; then the server is killed from outside."""

_PATIENCE_SECONDS = 180.0
"""How long the jobs have, after the last kill, to bring everything to its end."""

_STILL_SECONDS = 2.0
"""How long nothing more may happen after that: a refund that is doubled late is doubled too."""

_LONGER_THAN_ASKED = 2
"""A run goes on past the kills asked for while a point has not struck often enough, up to so many times as many."""

Say = Callable[[str], None]


class Verdict(NamedTuple):
    """What a run came to. missing: the points that struck too seldom. defects: lines of the server's own log.

    repaired: its lines about what a sweep found and put right, since nothing before it had. compared: how many of what.
    """

    tally: Tally
    findings: list[Finding]
    missing: dict[str, int]
    defects: list[str]
    repaired: list[str]
    compared: dict[str, int]
    stories: int
    seconds: float

    @property
    def survived(self) -> bool:
        """Whether every kill was survived, and every place was tried."""
        return not (self.findings or self.missing or self.defects)

    def text(self) -> str:
        """All of it for people."""
        strikes = self.tally.strikes()
        lines = [
            self.tally.table(),
            f"strikes of a place: {min(strikes)} at least, {statistics.median(strikes):g} in the middle",
            f"{self.stories} stories in {self.seconds:.0f} s; sweeps put right {len(self.repaired)} things",
            *self.repaired[:20],
            f"compared: {', '.join(f'{count} {what}' for what, count in self.compared.items())}",
        ]
        if self.missing:
            lines.append(f"struck too seldom: {self.missing}")
        lines += ["the server's log:", *self.defects[:20]] if self.defects else []
        lines.append(report(self.findings) if self.findings else "nothing lost, nothing doubled, nothing missing")
        return "\n".join(lines)


async def crash(url: str, folder: Path, *, kills: int, seed: int, say: Say = lambda _: None) -> Verdict:
    """Kill a server on a migrated, empty database at least so many times; return what became of the money."""
    started = time.monotonic()
    with set_up(url, folder) as stage:
        run = _Run(stage, random.Random(seed), say)
        try:
            await run.kill(kills)
            findings = await run.settle()
        finally:
            await run.aclose()
        log = stage.server.log().splitlines()
    defects = [line for line in log if any(word in line for word in BROKEN)]
    repaired = [line for line in log if FOUND_BY_SWEEP in line]
    seconds = time.monotonic() - started
    missing = run.tally.missing()
    return Verdict(run.tally, findings, missing, defects, repaired, run.compared, run.traffic.told, seconds)


class _Run:
    """Traffic, kills and judgement over one stage."""

    def __init__(self, stage: Stage, draw: random.Random, say: Say) -> None:
        self._server: Server = stage.server
        self._bank_url = stage.bank_url
        self._say = say
        self._told = Told()
        self.compared: dict[str, int] = {}
        self._calls = Calls(stage.server.address, self._told, draw)
        self._users = Users(stage.bank_url)
        self.tally = Tally(random.Random(draw.getrandbits(64)))
        self.traffic = Traffic(Day(self._calls, self._users, draw, f"{draw.getrandbits(32):08x}"), AT_ONCE)
        self._stories = asyncio.create_task(self.traffic.run())

    async def aclose(self) -> None:
        self._stories.cancel()
        await asyncio.gather(self._stories, return_exceptions=True)
        await self._users.aclose()
        await self._calls.__aexit__(None, None, None)

    # Kills

    async def kill(self, kills: int) -> None:
        """Kill until it is enough, and every point has struck often enough."""
        while self.tally.kills < kills or (self.tally.missing() and self.tally.kills < kills * _LONGER_THAN_ASKED):
            plan = self.tally.plan()
            self._calls.begin()
            self._server.begin(plan)
            struck = await self._die(plan)
            await self._mourn()
            self.tally.note(plan, struck=struck, cut_calls=self._calls.cut)
            self._say(f"{self.tally.kills} kills, {self.traffic.told} stories; {plan.point or 'a random moment'}")

    async def _die(self, plan: Plan) -> bool:
        """Wait for the server's death, or bring it about while calls wait; return whether it was by its point."""
        await self._wait(lambda: self._server.is_ready, START_SECONDS)
        if plan.point:
            await self._wait(lambda: False, _STRIKES_WITHIN_SECONDS)
        else:
            await asyncio.sleep(plan.after_ms / 1_000)
            await self._wait(lambda: self._calls.answered > 0 and self._calls.unanswered > 0, START_SECONDS)
        struck = self._server.is_dead
        self._server.kill()
        return struck

    async def _mourn(self) -> None:
        """Wait until all calls that it had in hand have learned of it: none may be counted for its successor."""
        seen = -1
        while self._calls.cut != seen:
            seen = self._calls.cut
            await asyncio.sleep(0.02)

    async def _wait(self, seen: Callable[[], bool], seconds: float) -> None:
        """Wait until something is seen, or the server is dead, or the time is over."""
        ends_at = time.monotonic() + seconds
        while not seen() and not self._server.is_dead and time.monotonic() < ends_at:
            if self._stories.done():
                # A story has failed, and all others with it.
                await self._stories
            await asyncio.sleep(0.002)

    # Judgement

    async def settle(self) -> list[Finding]:
        """Let the last server finish the work; return what is wrong when nothing happens any more."""
        self._server.begin(None)
        await asyncio.to_thread(self._server.wait_ready)
        self._calls.give_up_after(_PATIENCE_SECONDS)
        self.traffic.stop()
        await self._stories
        ends_at = time.monotonic() + _PATIENCE_SECONDS
        while (findings := await self._judge()) and time.monotonic() < ends_at:
            self._say(f"settling: {len(findings)} open")
            await asyncio.sleep(1)
        if findings:
            return findings
        await asyncio.sleep(_STILL_SECONDS)
        return [*await self._judge(), *await self._audit()]

    async def _audit(self) -> list[Finding]:
        """Ask paycore's own audit too: by now it must find nothing."""
        command = ["audit", "--db", self._server.url, "--books", self._bank_url, "--json"]
        process = await asyncio.create_subprocess_exec(
            *self._server.program,
            *command,
            env=clean_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        said, _ = await process.communicate()
        return [] if process.returncode == 0 else [Finding("paycore audit", said.decode(errors="replace"))]

    async def _judge(self) -> list[Finding]:
        books = read_books(await self._users.books())
        rows = await asyncio.to_thread(read_all, self._server.url)
        self.compared = {
            "payments": len(rows["payment"]),
            "captures": len(books.captures),
            "refunds at the banks": len(books.refunds),
            "notifications of the banks": len(books.notices),
            "words of clients": len(self._told.words),
        }
        return judge(books, rows, self._told, time.time_ns() // 1_000_000)
