"""The full pass: every payment that there is, a part of the ids at a time, by as many processes as there are.

The ids that exist when a pass begins are cut into ranges. A process holds one range at a time by a lease and writes
after each part how far it has come, so that a range that was left, by a crash or at the end of a lease, is gone on with
from there. Each part is compared inside the database, and only payments that do not look whole are read.
"""

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple

from paycore.domain.clock import Clock
from paycore.domain.ids import MAX_INT64
from paycore.failpoint import failpoint
from paycore.jobs.runner import Tell
from paycore.jobs.slices import Held, Slices
from paycore.jobs.sweep_findings import Moment
from paycore.jobs.sweep_look import NOTHING, Looked, Looker
from paycore.jobs.sweep_units import Note
from paycore.store import sweep_suspects, sweeps
from paycore.store.proofs import prepare
from paycore.store.protocol import Store
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

RANGES = 16
"""How many ranges the ids are cut into; no more than a job can hold shares."""

PART = 20_000
"""Payments that are compared at once."""

PARTS_A_RUN = 25
"""Parts after which a run ends, so that the job stops soon when it is told to."""

LAST_ID = MAX_INT64 - 1

_JOB = "sweep_full"
_FROM, _TO, _START = "full_from", "full_to", "full"
"""Names of marks: each range's next id and its last one; when the pass began, and what it expects of attempts."""
_BEGUN, _ATTEMPTS_AFTER = 0, 1

_log = QuietLog()


class Plan(NamedTuple):
    """A full pass as it stands. begun_at_ms: None where there never was one. ranges: number -> (next id, last id)."""

    begun_at_ms: int | None
    attempts_after_ms: int
    ranges: Mapping[int, tuple[int, int]]

    @property
    def unfinished(self) -> list[int]:
        """The ranges that have not been swept to their end."""
        return [number for number, (first, last) in self.ranges.items() if first <= last]


def read_plan(connection: Any) -> Plan:
    """Read how the full pass stands."""
    start = sweeps.marks(connection, _START)
    firsts, lasts = sweeps.marks(connection, _FROM), sweeps.marks(connection, _TO)
    ranges = {number: (firsts[number], last) for number, last in sorted(lasts.items())}
    return Plan(start.get(_BEGUN), start.get(_ATTEMPTS_AFTER, 0), ranges)


def cut(lowest: int, newest: int, count: int) -> dict[int, int]:
    """Cut the ids into ranges of one size; return each range's last id. All ids that there may be are in one."""
    size = max(1, (newest - lowest) // count)
    return {number: LAST_ID if number == count - 1 else lowest + size * (number + 1) for number in range(count)}


class FullPass:
    """Makes full passes, one every ``full_ms``."""

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        schedule: Schedule,
        slices: Slices,
        looker: Looker,
        clock: Clock,
        full_ms: int,
        part: int = PART,
        parts_a_run: int = PARTS_A_RUN,
    ) -> None:
        self._store = store
        self._writer = writer
        self._schedule = schedule
        self._slices = slices
        self._looker = looker
        self._clock = clock
        self._full_ms = full_ms
        self._part = part
        self._parts_a_run = parts_a_run

    async def run(self, tell: Tell) -> tuple[Looked, bool]:
        """Begin a pass where one is due, and sweep what is free of it; return what came of it, and whether more is.

        Raises StoreUnavailableError, ThrottledError.
        """
        looked, left = NOTHING, self._parts_a_run
        plan = await self._current()
        while unfinished := plan.unfinished:
            async with self._slices.take(_JOB, unfinished, 1) as held:
                for number in held.slices:
                    more, used = await self._sweep(number, held, left, tell)
                    looked, left = looked.and_also(more), left - used
            if not held.slices or left <= 0:
                # Other processes are at the rest, or it is left to the next run.
                return looked, bool(held.slices)
            plan = await self._read()
        return looked, False

    async def _read(self) -> Plan:
        return await asyncio.to_thread(self._store.read, read_plan)

    async def _current(self) -> Plan:
        """The pass that is under way; a new one where the last is done and long enough ago."""
        plan = await self._read()
        if not self._is_due(plan):
            return plan
        async with self._slices.take("sweeper", [1], 1) as held:
            plan = await self._read()
            if held.slices and self._is_due(plan):
                await self._begin(first_ever=plan.begun_at_ms is None)
                plan = await self._read()
        return plan

    def _is_due(self, plan: Plan) -> bool:
        if plan.begun_at_ms is None:
            return True
        # A beginning that lies ahead was written by a clock that has been set back since.
        return not plan.unfinished and not 0 <= self._clock.now_ms() - plan.begun_at_ms < self._full_ms

    async def _begin(self, *, first_ever: bool) -> None:
        now_ms = self._clock.now_ms()
        lowest, newest = await asyncio.to_thread(self._store.read, sweeps.ends)
        lasts = cut(lowest, newest, RANGES)
        firsts = {0: 0} | {number + 1: last + 1 for number, last in lasts.items() if number + 1 < RANGES}
        # The first pass also finds attempts from before there were tasks; later ones do not ask for what was done.
        start = {_BEGUN: now_ms, _ATTEMPTS_AFTER: 0 if first_ever else now_ms}
        await self._writer.run(Note(self._schedule, {_START: start, _FROM: firsts, _TO: lasts}, waiting={}))
        _log.info("full_sweep_begun", first_ever=first_ever)

    async def _sweep(self, number: int, held: Held, left: int, tell: Tell) -> tuple[Looked, int]:
        """Sweep parts of a range while its lease lasts; return what came of it and how many parts there were."""
        looked, used = NOTHING, 0
        plan = await self._read()
        while number in plan.unfinished and held.lasts() and used < left:
            looked = looked.and_also(await self._sweep_part(number, plan))
            used += 1
            plan = await self._read()
            tell(len(plan.ranges) - len(plan.unfinished), len(plan.ranges))
        if used and not plan.unfinished:
            _log.info("full_sweep_done", elapsed_ms=self._clock.now_ms() - (plan.begun_at_ms or 0))
        return looked, used

    async def _sweep_part(self, number: int, plan: Plan) -> Looked:
        first, last = plan.ranges[number]
        moment = Moment(self._clock.now_ms(), self._schedule.late_grace_ms, plan.attempts_after_ms)

        def suspects(connection: Any) -> tuple[int, set[int], set[int]]:
            prepare(connection)
            end = sweeps.end_of_part(connection, first, last, self._part)
            without = sweep_suspects.without_tasks(connection, first, end, plan.attempts_after_ms)
            found = without | sweep_suspects.not_whole(connection, first, end)
            return end, found, sweeps.pending_among(connection, found)

        end, found, pending = await asyncio.to_thread(self._store.read, suspects)
        # Those that are looked at again are looked at in every pass, but only here are contradictions told of again.
        looked = await self._looker.look(found - pending, moment)
        await self._looker.tell(pending, moment)
        failpoint("sweeper.before_full_mark")
        await self._writer.run(Note(self._schedule, {_FROM: {number: end + 1}}, waiting=looked.waiting))
        return looked
