"""Looks at open quarantine again as it grows older: what was unknown or doubtful may be known by now.

A row is looked at when it reaches an age of the ladder, and after the ladder once a day as long as its word came within
the last thirty days. The rows hold none of this: for each age the database holds how far, in the order in which
evidence was first seen, its looks have come. A pass looks at a bounded number of rows and goes on from there.
"""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple

from paycore.domain.clock import Clock
from paycore.failpoint import failpoint
from paycore.jobs.runner import Pass, Tell, tell_nobody
from paycore.jobs.slices import Held, Slices
from paycore.store import evidence
from paycore.store.evidence import Glance, Mark, Place
from paycore.store.protocol import Store, WriteTransaction
from paycore.usecases.judge_again import JudgeAgain, Looked
from paycore.usecases.writer import UnindexedUnit, Writer

LADDER_MS = (0, 5_000, 30_000, 120_000, 600_000, 3_600_000, 21_600_000)
"""The ages, since it was first seen, at which a row is looked at."""

ROUND_MS = 86_400_000
"""How often after that."""

ROUNDS_END_MS = 30 * ROUND_MS
"""A row whose word came last so long ago is left to a person."""

BATCH = 1_000
"""Rows of one age that a pass reads at most."""

ASKED_AT_MOST = 100
"""Attempts that a pass asks the channels about at most."""

_ROUND = len(LADDER_MS)
_START = Place(0, "")
# Behind every id.
_LAST_ID = "~"


class _NoteMarks(UnindexedUnit):
    def __init__(self, marks: Sequence[Mark]) -> None:
        self._marks = marks

    def apply(self, transaction: WriteTransaction) -> None:
        transaction.run(lambda connection: evidence.put_marks(connection, self._marks))


class _Rung(NamedTuple):
    """What is due at one age. until_ms: the youngest moment of first sight that has it; glances: the rows beyond the
    mark, oldest first, the first of them at least; is_news: whether there is anything to do or to note."""

    mark: Mark
    until_ms: int
    glances: Sequence[Glance]
    is_news: bool

    @property
    def is_full(self) -> bool:
        return len(self.glances) == BATCH

    def moved(self, left: set[str]) -> Mark:
        """The mark before the first row that was left, or behind all there was."""
        place = self.mark.place
        for glance in self.glances:
            if glance.place.quarantine_id in left:
                return self.mark._replace(place=place)
            place = glance.place
        if self.mark.rung == _ROUND and not self.is_full:
            place = Place(self.until_ms, _LAST_ID)
        return self.mark._replace(place=place)

    def waits_since_ms(self, left: set[str]) -> int | None:
        """When the oldest row that is due and was not looked at fell due; None where none is known."""
        place = self.moved(left).place
        waiting = self.is_full or any(glance.place.quarantine_id in left for glance in self.glances)
        if not waiting or self.mark.rung == _ROUND:
            return None
        return place.first_seen_at_ms + LADDER_MS[self.mark.rung]


class Examiner:
    """One pass at a time in all processes: whoever holds the lease makes it."""

    name = "examiner"

    def __init__(self, *, store: Store, writer: Writer, judge: JudgeAgain, slices: Slices, clock: Clock) -> None:
        self._store = store
        self._writer = writer
        self._judge = judge
        self._slices = slices
        self._clock = clock

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Make one pass. Raises StoreUnavailableError or ThrottledError; the next pass goes on from there."""
        now_ms = self._clock.now_ms()
        # Nothing is written while nothing is due.
        if not any(rung.is_news for rung in await self._rungs(now_ms)):
            return Pass()
        async with self._slices.take(self.name, [0], most=1) as held:
            if not held.slices:
                return Pass()
            # Read again: whoever held it before may have looked at them.
            return await self._look(await self._rungs(now_ms), held, tell)

    async def _rungs(self, now_ms: int) -> list[_Rung]:
        return await asyncio.to_thread(self._store.read, lambda connection: _read_rungs(connection, now_ms))

    async def _look(self, rungs: Sequence[_Rung], held: Held, tell: Tell) -> Pass:
        glances = {glance.place: glance for rung in rungs for glance in rung.glances}
        in_order = [glances[place] for place in sorted(glances)]
        tell(0, len(in_order))
        work = await self._judge.sort(in_order)
        asked = dict(list(work.asked.items())[:ASKED_AT_MOST])
        known = await self._judge.judge_known(work.known)
        answers = await self._judge.ask_all(asked, held.lasts)
        failpoint("examiner.looked")
        left = {id_ for order, ids in work.asked.items() if order not in answers for id_ in ids}
        await self._writer.run(_NoteMarks([rung.moved(left) for rung in rungs]))
        tell(len(in_order) - len(left), len(in_order))
        looked = [one for part in (known, *answers.values()) for one in part]
        return self._came_to(rungs, looked, left)

    def _came_to(self, rungs: Sequence[_Rung], looked: Sequence[Looked], left: set[str]) -> Pass:
        done = sum(one.resolved for one in looked)
        since = [at_ms for rung in rungs if (at_ms := rung.waits_since_ms(left)) is not None]
        lag_ms = max(0, self._clock.now_ms() - min(since)) if since else 0
        return Pass(done, len(looked) - done, lag_ms, bool(left) or any(rung.is_full for rung in rungs))


def _read_rungs(connection: Any, now_ms: int) -> list[_Rung]:
    stored = evidence.marks(connection)
    rungs = []
    for number, age_ms in enumerate(LADDER_MS):
        mark, until_ms = stored.get(number, Mark(number, _START, 0)), now_ms - age_ms
        # A clock that was far ahead has noted what is still to come: from here on it counts again.
        is_ahead = mark.place.first_seen_at_ms > until_ms
        if is_ahead:
            mark = mark._replace(place=Place(until_ms, ""))
        glances = evidence.open_between(connection, mark.place, until_ms, BATCH)
        rungs.append(_Rung(mark, until_ms, glances, is_ahead or bool(glances)))
    return [*rungs, _read_round(connection, stored.get(_ROUND, Mark(_ROUND, _START, 0)), now_ms)]


def _read_round(connection: Any, mark: Mark, now_ms: int) -> _Rung:
    is_new = not mark.round_at_ms <= now_ms < mark.round_at_ms + ROUND_MS
    if is_new:
        mark = Mark(_ROUND, _START, now_ms)
    until_ms, since_ms = mark.round_at_ms - LADDER_MS[-1], mark.round_at_ms - ROUNDS_END_MS
    glances = evidence.open_between(connection, mark.place, until_ms, BATCH, seen_since_ms=since_ms)
    return _Rung(mark, until_ms, glances, is_new or bool(glances))
