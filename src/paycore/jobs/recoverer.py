"""Finds money whose notification was lost: asks channels about attempts of which no word has come.

A live attempt is asked about on its channel's ladder of waits, however its opening ended. After its expiry every
attempt without a capture is asked about once more, ended ones too (R8: money truth beats our state), and what is still
unpaid there is closed there. A success then is judged like any other: late or surplus money goes back.
"""

import asyncio
from collections.abc import Collection

from paycore.channels.protocol import was_asked
from paycore.domain.clock import Clock
from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState, TaskKind
from paycore.jobs.backoff import Draw
from paycore.jobs.gate import Account, ChannelGate
from paycore.jobs.slices import Slices
from paycore.jobs.task_job import DONE, Step, TaskJob
from paycore.metrics import Metrics
from paycore.store.protocol import Store
from paycore.store.rows import ChannelOrderRow, PaymentRecord, TaskRow
from paycore.usecases.attempts import Conversations
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

_log = QuietLog()


class Recoverer(TaskJob):
    """Works off the tasks of kind QUERY. unreachable_ms: how long after its expiry a last word is waited for."""

    name = "recoverer"
    kind = TaskKind.QUERY

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        accounts: Collection[Account],
        conversations: Conversations,
        schedule: Schedule,
        slices: Slices,
        gate: ChannelGate,
        clock: Clock,
        metrics: Metrics,
        draw: Draw,
        unreachable_ms: int,
    ) -> None:
        super().__init__(
            store=store, writer=writer, accounts=accounts, slices=slices, gate=gate, clock=clock, draw=draw
        )
        self._conversations = conversations.behind(gate.call)
        self._schedule = schedule
        self._metrics = metrics
        self._unreachable_ms = unreachable_ms

    def _is_finished(self, task: TaskRow, record: PaymentRecord | None) -> bool:
        return record is None or task.attempt not in record.attempts or task.attempt in record.captured_attempts()

    def _asks(self, task: TaskRow, record: PaymentRecord) -> set[Account]:
        attempt = record.attempts[task.attempt]
        return set() if self._only_waits(attempt) else {(attempt.channel, attempt.account)}

    async def _look(self, task: TaskRow, record: PaymentRecord) -> Step:
        attempt = record.attempts[task.attempt]
        last_at_ms = self._schedule.last_look_at_ms(attempt)
        if self._clock.now_ms() >= last_at_ms:
            # Asks, and closes at the channel what is unpaid there: an expired order may stay payable until it is told.
            await self._conversations.end(attempt)
            return DONE
        if self._only_waits(attempt):
            return Step(last_at_ms)
        queried = await self._conversations.query(attempt)
        if queried.captures and await self._is_judged(task):
            return DONE
        return Step(self._schedule.next_look_at_ms(attempt, self._clock.now_ms()))

    async def _is_judged(self, task: TaskRow) -> bool:
        """Whether what the channel said of money was judged; otherwise it lies in quarantine."""
        return self._is_finished(task, await asyncio.to_thread(self._store.load_record, task.payment_id))

    def _only_waits(self, attempt: ChannelOrderRow) -> bool:
        """Whether an attempt is ended already and its last look is still to come."""
        ended = AttemptState(attempt.state) in FINALLY_UNPAID
        return ended and self._clock.now_ms() < self._schedule.last_look_at_ms(attempt)

    def _without_word(self, task: TaskRow, record: PaymentRecord, unknown: Exception) -> Step:
        attempt, why = record.attempts[task.attempt], str(unknown)
        # Given up only where the channel was really asked: one that rests now may answer in a minute.
        if not was_asked(unknown) or self._clock.now_ms() <= attempt.expire_at_ms + self._unreachable_ms:
            return self._rest(task, why)
        self._metrics.attempts_given_up.labels(attempt.channel).inc()
        _log.warning("attempt_given_up", payment_id=task.payment_id, attempt=task.attempt, why=why)
        return Step(None, why)
