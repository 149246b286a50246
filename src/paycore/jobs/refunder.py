"""Sends back what is owed, once (R2), however often it is killed.

A pass adds the refunds that are missing, closes expired payments whose excess waits for an outcome, and moves
every due try one step. The number of a try is written before it is sent and stays the same until the channel's
final word; the channel is asked before anything is sent, so a try that was cut off between send and answer
goes on where it stood (R6). Several processes may run it at once: a try is leased before it is touched.
"""

import asyncio
from collections.abc import Callable

import structlog

from paycore.channels.protocol import ChannelUnknownError, RefundAnswer, Refunded, RefundOrder
from paycore.domain.clock import Clock
from paycore.domain.errors import PaycoreError
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import CloseReason, NotifyOutcome, RefundState
from paycore.failpoint import failpoint
from paycore.jobs.refund_units import ClaimDue, DeriveOwed, Progress, RecordProgress
from paycore.jobs.runner import Pass, Tell, tell_nobody
from paycore.metrics import Metrics
from paycore.store.protocol import DueRefund, Store
from paycore.usecases.attempts import Conversations
from paycore.usecases.close import Close
from paycore.usecases.writer import Writer

_BATCH = 100
"""Rows that one pass takes up of each kind."""

_AT_ONCE = 8
"""Refunds in flight at the channels at the same time."""

_LONGEST_DELAY_MS = 5 * 60_000

_SHORT_LOOK_MS = 50
_REST_PER_LOOK = 20
"""A look over all excess that takes longer than the first is made again only after so many times as long."""

_log = structlog.get_logger()


class Refunder:
    """One pass at a time. retry_ms: the first wait after an unfinished step; it doubles with each sending.

    lease_ms must outlast two channel calls. ``new_token`` names each pass uniquely.
    """

    def __init__(
        self,
        store: Store,
        writer: Writer,
        conversations: Conversations,
        close: Close,
        *,
        clock: Clock,
        metrics: Metrics,
        new_token: Callable[[], str],
        retry_ms: int,
        lease_ms: int,
        late_grace_ms: int,
    ) -> None:
        self._store = store
        self._writer = writer
        self._conversations = conversations
        self._close = close
        self._clock = clock
        self._metrics = metrics
        self._new_token = new_token
        self._retry_ms = retry_ms
        self._lease_ms = lease_ms
        self._late_grace_ms = late_grace_ms
        self._rests_until_ms = 0

    name = "refunder"

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Make one pass. Raises StoreUnavailableError or ThrottledError; the next pass goes on from there."""
        await self._look_over()
        await self._send_due()
        return Pass()

    async def _look_over(self) -> None:
        """Find what the notify path left undone. That reads all excess, so a long look is followed by a longer rest."""
        started_at_ms = self._clock.now_ms()
        if started_at_ms < self._rests_until_ms:
            return
        await self._add_missing()
        await self._close_expired()
        ended_at_ms = self._clock.now_ms()
        took_ms = ended_at_ms - started_at_ms
        self._rests_until_ms = ended_at_ms + took_ms * _REST_PER_LOOK if took_ms > _SHORT_LOOK_MS else 0

    async def _add_missing(self) -> None:
        # Looked for by a reader: the writer is asked only where there is something to write.
        if not await asyncio.to_thread(self._store.owes_refunds):
            return
        for intent in await self._writer.run(DeriveOwed(_BATCH)):
            self._count(intent.refund.reason, RefundState.PENDING)
            _log.warning("refund_was_missing", payment_id=intent.refund.payment_id, refund_no=intent.refund.refund_no)

    async def _send_due(self) -> None:
        if not await asyncio.to_thread(self._store.has_due_refunds, self._clock.now_ms()):
            return
        claim = ClaimDue(lease_token=self._new_token(), lease_ms=self._lease_ms, limit=_BATCH)
        gate = asyncio.Semaphore(_AT_ONCE)
        await asyncio.gather(*(self._advance(due, gate) for due in await self._writer.run(claim)))

    async def _close_expired(self) -> None:
        expired_before_ms = self._clock.now_ms() - self._late_grace_ms
        for payment_id in await asyncio.to_thread(self._store.expired_with_excess, expired_before_ms, _BATCH):
            try:
                await self._close.close_payment(payment_id, CloseReason.EXPIRED)
            except PaycoreError as error:
                # An attempt may still be paid: the excess keeps waiting, and the next pass asks again.
                _log.info("expired_payment_stays_open", payment_id=payment_id, why=error.message)

    async def _advance(self, due: DueRefund, gate: asyncio.Semaphore) -> None:
        async with gate:
            try:
                answer = await self._ask_then_send(due)
            except ChannelUnknownError as error:
                await self._record(due, self._unfinished(due, RefundState.UNKNOWN, str(error)))
            except PaycoreError as error:
                # The account is not configured here: another process, or this one later, has it.
                await self._record(due, self._unfinished(due, RefundState(due.last_try.state), error.message))
            else:
                if answer is not None:
                    await self._record(due, self._progress(due, answer))

    async def _ask_then_send(self, due: DueRefund) -> Refunded | None:
        """Return the channel's answer; None when the lease was lost before anything was sent."""
        channel = self._conversations.channel(due.attempt)
        order = _refund_order(due)
        known = await channel.query_refund(order)
        if known.answer != RefundAnswer.NOT_EXIST:
            return known
        # Written before it is sent: from here on the answer may be lost, and the number never changes without one.
        sending = Progress(RefundState.UNKNOWN, due.last_try.asks + 1, self._delay_ms(due), "", "being sent")
        if not await self._writer.run(RecordProgress(due, sending, keep_lease=True)):
            return None
        failpoint("refunder.before_send")
        answer = await channel.refund(order)
        failpoint("refunder.after_send")
        return answer

    def _progress(self, due: DueRefund, answer: Refunded) -> Progress:
        match answer.answer:
            case RefundAnswer.REFUNDED:
                return Progress(RefundState.REFUNDED, due.last_try.asks + 1, 0)
            case RefundAnswer.RETURNED:
                return Progress(RefundState.RETURNED_BY_CHANNEL, due.last_try.asks + 1, 0)
            case RefundAnswer.REFUSED | RefundAnswer.NEEDS_NEW_NUMBER:
                return Progress(
                    RefundState.REFUSED, due.last_try.asks + 1, self._delay_ms(due), answer.code, answer.message
                )
            case RefundAnswer.ACCEPTED:
                return self._unfinished(due, RefundState.ACCEPTED, "")
            case RefundAnswer.NOT_EXIST:
                return self._unfinished(due, RefundState.UNKNOWN, "the channel does not know what it was sent")

    def _unfinished(self, due: DueRefund, state: RefundState, why: str) -> Progress:
        return Progress(state, due.last_try.asks + 1, self._delay_ms(due), "", why)

    def _delay_ms(self, due: DueRefund) -> int:
        # Tries count too: a channel that keeps refusing is asked less and less often.
        doublings = min(due.last_try.asks + due.last_try.seq - 1, 16)
        return min(self._retry_ms << doublings, _LONGEST_DELAY_MS)

    async def _record(self, due: DueRefund, progress: Progress) -> None:
        if not await self._writer.run(RecordProgress(due, progress)):
            return
        if progress.state != due.last_try.state:
            self._count(due.refund.reason, progress.state)
        _log.info(
            "refund_advanced",
            payment_id=due.refund.payment_id,
            refund_no=due.refund.refund_no,
            channel_refund_no=due.last_try.channel_refund_no,
            channel_trade_no=due.refund.channel_trade_no,
            amount_minor=due.refund.amount_minor,
            currency=due.refund.currency,
            state=progress.state.name,
            why=progress.message,
        )

    def _count(self, reason: int, state: RefundState) -> None:
        self._metrics.count_refunds(NotifyOutcome(reason).name, state.name)


def _refund_order(due: DueRefund) -> RefundOrder:
    refund = due.refund
    return RefundOrder(
        due.attempt.account,
        due.last_try.channel_refund_no,
        format_channel_order_no(refund.payment_id, refund.attempt),
        refund.channel_trade_no,
        refund.amount_minor,
        refund.currency,
    )
