"""The second line: finds what the writer, the index and the other jobs have left undone, and puts it right.

It trusts none of them and reads only what was committed. Each pass looks at what is new: the excess captures, refunds
and queried attempts that writers have added since, the payments that were made since, and those that it has to look at
again. Once in a while it looks at every payment there is (``jobs.sweep_full``). In a healthy system it finds nothing.

How far it has come is written after what it found was put right, so that a pass that is cut off is made again.
"""

import asyncio
from typing import Any, NamedTuple

from paycore.domain.clock import Clock
from paycore.domain.ids import first_id_at
from paycore.failpoint import failpoint
from paycore.jobs.gate import ChannelGate
from paycore.jobs.runner import Pass, Tell, tell_nobody
from paycore.jobs.slices import Slices
from paycore.jobs.sweep_findings import Moment
from paycore.jobs.sweep_full import LAST_ID, PART, PARTS_A_RUN, FullPass
from paycore.jobs.sweep_look import NOTHING, Looked, Looker
from paycore.jobs.sweep_units import Note
from paycore.metrics import Metrics
from paycore.store import sweep_suspects, sweeps
from paycore.store.proofs import prepare
from paycore.store.protocol import Store
from paycore.usecases.attempts import Conversations
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

SEEN_WITHIN_MS = 2 * 3_600_000
"""A writer that was not seen for so long is dead, even where a clock was an hour off."""

OVERLAP_MS = 60_000
"""How long a payment may take from its id to its commit, with what clocks differ by."""

_PENDING_TOGETHER = 500
_SEEN, _PAYMENTS = "seen", "payments"
"""Names of marks: when writers were looked for, and up to which id payments were read."""
_UP_TO, _GO_ON_FROM = 0, 1
"""Of payments: the id of the moment up to which they were seen; from where to go on, if a pass ended early, or 0."""


class _News(NamedTuple):
    """What is new of the writers' facts, and who is alive."""

    living: list[int]
    news: sweeps.News


class _Payments(NamedTuple):
    """What is new of payments. marks: how far they have been read. more: there are more."""

    looked: Looked
    marks: dict[int, int]
    more: bool


class Sweeper:
    """One pass at a time. full_ms: how long after the beginning of a full pass the next one begins."""

    name = "sweeper"

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        conversations: Conversations,
        schedule: Schedule,
        slices: Slices,
        gate: ChannelGate,
        clock: Clock,
        metrics: Metrics,
        full_ms: int,
        part: int = PART,
        parts_a_run: int = PARTS_A_RUN,
    ) -> None:
        self._store = store
        self._writer = writer
        self._schedule = schedule
        self._slices = slices
        self._clock = clock
        self._part = part
        self._parts_a_run = parts_a_run
        self._looker = Looker(
            store=store,
            writer=writer,
            conversations=conversations,
            schedule=schedule,
            gate=gate,
            clock=clock,
            metrics=metrics,
        )
        self._full = FullPass(
            store=store,
            writer=writer,
            schedule=schedule,
            slices=slices,
            looker=self._looker,
            clock=clock,
            full_ms=full_ms,
            part=part,
            parts_a_run=parts_a_run,
        )

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Look at what is new, then go on with the full pass. Raises StoreUnavailableError or ThrottledError."""
        news, more_news = NOTHING, False
        async with self._slices.take(self.name, [0], 1) as held:
            if held.slices:
                news, more_news = await self._look_at_news()
        swept, more = await self._full.run(tell)
        looked = news.and_also(swept)
        return Pass(looked.done, looked.put_off, looked.lag_ms, more or more_news)

    async def _look_at_news(self) -> tuple[Looked, bool]:
        now_ms = self._clock.now_ms()
        moment = Moment(now_ms, self._schedule.late_grace_ms, now_ms)
        living, news = await asyncio.to_thread(self._store.read, lambda connection: _read_news(connection, now_ms))
        again, whole = await self._look_again(moment)
        looked = await self._looker.look(news.payment_ids - again.waiting.keys() - whole, moment)
        payments = await self._look_at_payments(moment)
        failpoint("sweeper.before_mark")
        looked = looked.and_also(payments.looked).and_also(again)
        marks = {**news.marks, _SEEN: {0: now_ms}, _PAYMENTS: payments.marks}
        note = Note(self._schedule, marks, waiting=looked.waiting, whole=whole - looked.waiting.keys(), living=living)
        await self._writer.run(note)
        return looked, news.more or payments.more

    async def _look_again(self, moment: Moment) -> tuple[Looked, set[int]]:
        """Look at what had to wait; return what came of it, and what waits no more."""
        looked, whole, after = NOTHING, set[int](), 0
        while ids := await self._pending(after):
            after = ids[-1]
            again = await self._looker.look(ids, moment, again=ids)
            whole |= set(ids) - again.waiting.keys()
            looked = looked.and_also(again)
        return looked, whole

    async def _pending(self, after: int) -> list[int]:
        return await asyncio.to_thread(
            self._store.read, lambda connection: sweeps.pending(connection, after, _PENDING_TOGETHER)
        )

    async def _look_at_payments(self, moment: Moment) -> _Payments:
        """Look at the payments that were made since, part by part."""
        now_id = first_id_at(moment.now_ms + 1)
        overlap = now_id - first_id_at(moment.now_ms + 1 - OVERLAP_MS)
        first = await asyncio.to_thread(
            self._store.read, lambda connection: _payments_from(connection, now_id, overlap)
        )
        looked = NOTHING
        for _ in range(self._parts_a_run):
            end, payment_ids = await asyncio.to_thread(
                self._store.read, lambda connection, first=first: _untasked(connection, first, self._part, moment)
            )
            looked = looked.and_also(await self._looker.look(payment_ids, moment))
            if end == LAST_ID:
                return _Payments(looked, {_UP_TO: now_id, _GO_ON_FROM: 0}, more=False)
            first = end + 1
        return _Payments(looked, {_GO_ON_FROM: first}, more=True)


def _read_news(connection: Any, now_ms: int) -> _News:
    since_ms = min(now_ms, sweeps.marks(connection, _SEEN).get(0, now_ms))
    living = sweeps.living_writers(connection, since_ms - SEEN_WITHIN_MS)
    return _News(living, sweeps.news(connection, living))


def _payments_from(connection: Any, now_id: int, overlap: int) -> int:
    """The lowest id that may not have been seen. A mark that lies ahead was made by a clock that was set back since."""
    marks = sweeps.marks(connection, _PAYMENTS)
    return marks.get(_GO_ON_FROM) or max(0, min(marks.get(_UP_TO, now_id), now_id) - overlap)


def _untasked(connection: Any, first: int, part: int, moment: Moment) -> tuple[int, set[int]]:
    prepare(connection)
    end = sweeps.end_of_part(connection, first, LAST_ID, part)
    return end, sweep_suspects.without_tasks(connection, first, end, moment.attempts_after_ms)
