"""Closes payments that nobody paid in time, after asking about each attempt that may still be paid.

Money that turns up while it asks goes through the decision like a notification. Where a channel gives no final word the
payment stays open, and is come back to; past a limit it is closed as UNREACHABLE, and a success after that goes back.
"""

from collections.abc import Collection

from paycore.channels.protocol import was_asked
from paycore.domain.clock import Clock
from paycore.domain.errors import PreconditionError
from paycore.domain.verdicts import CloseReason, PaymentState, TaskKind
from paycore.jobs.backoff import Draw
from paycore.jobs.gate import Account, ChannelGate
from paycore.jobs.slices import Slices
from paycore.jobs.task_job import DONE, Step, TaskJob
from paycore.metrics import Metrics
from paycore.store.protocol import Store
from paycore.store.rows import PaymentRecord, TaskRow
from paycore.usecases.attempts import Conversations
from paycore.usecases.close import Close
from paycore.usecases.judge import AccountCodes
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

_log = QuietLog()


class Closer(TaskJob):
    """Works off the tasks of kind CLOSE. unreachable_ms: how long after its expiry a payment waits for a final word."""

    name = "closer"
    kind = TaskKind.CLOSE

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        conversations: Conversations,
        codes: AccountCodes,
        accounts: Collection[Account],
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
        self._close = Close(store, writer, conversations.behind(gate.call), codes)
        self._schedule = schedule
        self._metrics = metrics
        self._unreachable_ms = unreachable_ms

    def _is_finished(self, task: TaskRow, record: PaymentRecord | None) -> bool:
        return record is None or record.outcome is not None

    def _asks(self, task: TaskRow, record: PaymentRecord) -> set[Account]:
        return {(row.channel, row.account) for row in record.live_attempts()}

    async def _look(self, task: TaskRow, record: PaymentRecord) -> Step:
        close_at_ms = self._schedule.close_at_ms(record.payment)
        if self._clock.now_ms() < close_at_ms:
            # The clock was set back, or somebody made the task due too early.
            return Step(close_at_ms)
        try:
            closed = await self._close.close_payment(task.payment_id, CloseReason.EXPIRED)
        except PreconditionError as unknown:
            # Given up only where each channel was really asked: what rests now may answer in a minute.
            if not was_asked(unknown) or not self._is_past_waiting(record):
                raise
            closed = await self._close.give_up(task.payment_id)
            self._count_given_up(closed, unknown)
        _log.info("expired_payment_settled", payment_id=task.payment_id, state=closed.state.name)
        return DONE

    def _is_past_waiting(self, record: PaymentRecord) -> bool:
        return self._clock.now_ms() > record.payment.expire_at_ms + self._unreachable_ms

    def _count_given_up(self, record: PaymentRecord, why: PreconditionError) -> None:
        if record.state == PaymentState.CLOSED:
            self._metrics.closed_unreachable.inc()
            _log.warning("closed_unreachable", payment_id=record.payment.payment_id, why=why.message)
