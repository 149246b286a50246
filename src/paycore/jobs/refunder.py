"""Sends back what is owed, once (R2), however often it is killed.

A pass moves every try that is due one step. The number of a try is on record before it is sent and stays the same until
the channel's final word; the channel is asked before anything is sent, so a try that was cut off between send and
answer goes on where it stood (R6), and money that the channel returned by itself is not sent again. Several processes
may run it at once: work is taken share by share, and a try is leased before it is touched.

Nothing is ever given up: a refund that is old, or that was refused under every number, is shown to a person
(NEEDS_ATTENTION) and goes on being asked about slowly, until it ends.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

from paycore.channels.protocol import (
    Channel,
    ChannelRestsError,
    ChannelUnknownError,
    RefundAnswer,
    Refunded,
    RefundOrder,
)
from paycore.domain.clock import Clock
from paycore.domain.errors import PreconditionError, StoreUnavailableError, ThrottledError
from paycore.domain.ids import MAX_REFUND_TRIES, format_channel_order_no
from paycore.domain.leases import lease_holds
from paycore.domain.verdicts import REFUND_DONE, NotifyOutcome, RefundState
from paycore.failpoint import failpoint
from paycore.jobs.backoff import Draw, backoff_ms
from paycore.jobs.gate import Account, ChannelGate
from paycore.jobs.refund_units import ClaimDue, Progress, RaiseAttention, RecordProgress, ReleaseTries
from paycore.jobs.runner import Pass, Tell, tell_nobody
from paycore.jobs.slices import Held, Slices
from paycore.metrics import Metrics
from paycore.store import refunds
from paycore.store.protocol import DueRefund, Store
from paycore.usecases.attempts import Conversations
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.writer import Writer

IN_FLIGHT = 64
"""Refunds that one process works on at the same time. How many calls it makes at once is the gate's to say."""

_OLD_BATCH = 500
_OLD_EVERY_MS = 10_000
"""How often is looked for old refunds that no pass comes to, as those of a channel that is down."""

_log = QuietLog()


class RefundLimits(NamedTuple):
    """Times in milliseconds.

    retry_ms: the first wait after an unfinished step, doubling with each up to longest_ms. attention_ms: how old an
    unfinished refund is when a person is told. lease_ms: must outlast two channel calls.
    """

    retry_ms: int
    longest_ms: int
    attention_ms: int
    lease_ms: int


class _Tally:
    """Counts a pass."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._known = 0
        self.done = 0
        self.put_off = 0

    def found(self, count: int) -> None:
        self._known += count
        self._tell(self.done + self.put_off, self._known)

    def count(self, *, done: bool) -> None:
        self.done += done
        self.put_off += not done
        self._tell(self.done + self.put_off, self._known)


class Refunder:
    """One pass at a time. accounts: those that this process can ask about; what is owed by others is left to processes
    that can. ``draw`` makes the jitter of waits."""

    name = "refunder"

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        accounts: Collection[Account],
        conversations: Conversations,
        slices: Slices,
        gate: ChannelGate,
        clock: Clock,
        metrics: Metrics,
        draw: Draw,
        limits: RefundLimits,
    ) -> None:
        self._store = store
        self._writer = writer
        self._accounts = accounts
        self._conversations = conversations
        self._slices = slices
        self._gate = gate
        self._clock = clock
        self._metrics = metrics
        self._draw = draw
        self._limits = limits
        self._looked_for_old_at_ms: int | None = None

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Make one pass over what is due now. Raises StoreUnavailableError or ThrottledError."""
        tally, due_ms = _Tally(tell), self._clock.now_ms()
        more = await self._work_off(due_ms, tally)
        await self._look_for_old()
        oldest_ms = await asyncio.to_thread(self._store.oldest_due_refund_ms, due_ms)
        return Pass(tally.done, tally.put_off, 0 if oldest_ms is None else due_ms - oldest_ms, more)

    # Taking work

    async def _work_off(self, due_ms: int, tally: _Tally) -> bool:
        """Work off what was due in every share that is free; return whether a lease ended before that was done."""
        worked: set[int] = set()
        more = False
        while wanted := await self._due_slices(due_ms, worked):
            async with self._slices.take(self.name, wanted) as held:
                worked.update(held.slices)
                more |= not await self._work(held, due_ms, tally)
            if not held.slices:
                # Other processes are at them.
                break
        return more

    async def _due_slices(self, due_ms: int, worked: Collection[int]) -> list[int]:
        due = await asyncio.to_thread(self._store.due_refund_slices, due_ms, self._awake())
        return [slice_ for slice_ in due if slice_ not in worked]

    def _awake(self) -> set[Account]:
        return {*self._accounts} - self._gate.silent()

    async def _work(self, held: Held, due_ms: int, tally: _Tally) -> bool:
        """Work on some tries at a time until the shares that are held have none left; return whether they have none."""
        left, left_out = deque(held.slices), set[Account]()
        under_way: set[asyncio.Task[DueRefund | None]] = set()
        untouched: list[DueRefund] = []
        try:
            while left or under_way:
                while left and held.lasts() and (room := self._room(len(under_way))):
                    left_out |= self._gate.silent()
                    claimed = await self._claim(left[0], due_ms, held.token, room)
                    tally.found(len(claimed))
                    under_way.update(asyncio.create_task(self._advance(due, tally)) for due in claimed)
                    if len(claimed) < room:
                        left.popleft()
                if not under_way:
                    break
                finished, under_way = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                untouched += [due for task in finished if (due := task.result()) is not None]
        finally:
            # None may go on talking to a channel after the shares were given back.
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
        if untouched:
            await self._writer.run(ReleaseTries(untouched))
        # What was left out may answer again by now.
        return not left and left_out <= self._gate.silent()

    def _room(self, under_way: int) -> int:
        """How many tries may be claimed now; an account that may be back is asked about one of them first."""
        if self._gate.recovering():
            return int(under_way < IN_FLIGHT)
        return IN_FLIGHT - under_way if 2 * under_way <= IN_FLIGHT else 0

    async def _claim(self, slice_: int, begun_ms: int, token: str, room: int) -> Sequence[DueRefund]:
        claim = ClaimDue(
            slice_,
            # Where the clock was set back meanwhile, what this pass moves lies before the time at which it began.
            min(begun_ms, self._clock.now_ms()),
            lease_token=token,
            lease_ms=self._limits.lease_ms,
            limit=room,
            accounts=self._awake(),
        )
        claimed = await self._writer.run(claim)
        failpoint("refunder.claimed")
        return claimed

    # One step of one try

    async def _advance(self, due: DueRefund, tally: _Tally) -> DueRefund | None:
        """Move a try one step; return it where it was not touched."""
        try:
            progress = await self._step(due)
        except ChannelRestsError:
            return due
        if progress is None:
            return due
        failpoint("refunder.looked")
        await self._record(due, progress)
        tally.count(done=progress.state in REFUND_DONE)
        return None

    async def _step(self, due: DueRefund) -> Progress | None:
        """Ask, and send where nothing went back yet; None where the lease is not ours any more."""
        try:
            answer = await self._ask_then_send(due)
        except ChannelRestsError:
            raise
        except ChannelUnknownError as unknown:
            return self._unfinished(due, RefundState.UNKNOWN, str(unknown))
        except PreconditionError as refusal:
            # The account is not configured here: another process, or this one later, has it.
            return self._unfinished(due, RefundState(due.last_try.state), refusal.message)
        except (StoreUnavailableError, ThrottledError):
            raise
        except Exception as defect:  # noqa: BLE001 - one that breaks must not keep the others from their turn
            _log.exception("refund_broke", payment_id=due.refund.payment_id, refund_no=due.refund.refund_no)
            return self._unfinished(due, RefundState.UNKNOWN, repr(defect))
        return None if answer is None else self._progress(due, answer)

    async def _ask_then_send(self, due: DueRefund) -> Refunded | None:
        """Return the channel's answer; None when the lease was lost before anything was sent.

        Raises ChannelRestsError where the channel was not even asked.
        """
        channel = self._conversations.channel(due.attempt)
        order = _refund_order(due)
        async with self._gate.call(due.attempt.channel, due.attempt.account):
            # The turn may have come late: whoever holds the try by now asks for itself.
            if not lease_holds(due.last_try.lease_until_ms, self._clock.now_ms()):
                return None
            known = await channel.query_refund(order)
        if known.answer != RefundAnswer.NOT_EXIST:
            return known
        async with self._gate.call(due.attempt.channel, due.attempt.account):
            # This turn may have come late too: the lease is renewed, if the try is still ours.
            if not await self._is_noted(due):
                return None
            return await self._send(channel, order)

    async def _is_noted(self, due: DueRefund) -> bool:
        """Write that it is being sent, before it is; return False where somebody else has taken the try over.

        From here on the answer may be lost, and the number never changes without one. Whether a person is to be told is
        left to the answer, so that being told is written with it.
        """
        told = due.last_try.state == RefundState.NEEDS_ATTENTION
        state = RefundState.NEEDS_ATTENTION if told else RefundState.UNKNOWN
        sending = Progress(state, due.last_try.asks + 1, self._delay_ms(due, attention=told), "", "being sent")
        return await self._writer.run(RecordProgress(due, sending, lease_ms=self._limits.lease_ms))

    async def _send(self, channel: Channel, order: RefundOrder) -> Refunded:
        failpoint("refunder.before_send")
        answer = await channel.refund(order)
        failpoint("refunder.after_send")
        return answer

    def _progress(self, due: DueRefund, answer: Refunded) -> Progress:
        match answer.answer:
            case RefundAnswer.REFUNDED:
                return self._final(due, RefundState.REFUNDED)
            case RefundAnswer.RETURNED:
                return self._final(due, RefundState.RETURNED_BY_CHANNEL)
            case RefundAnswer.REFUSED | RefundAnswer.NEEDS_NEW_NUMBER:
                return self._refused(due, answer)
            case RefundAnswer.ACCEPTED:
                return self._unfinished(due, RefundState.ACCEPTED, "accepted by the channel, money has not moved yet")
            case RefundAnswer.NOT_EXIST:
                return self._unfinished(due, RefundState.UNKNOWN, "the channel does not know what it was sent")

    def _final(self, due: DueRefund, state: RefundState) -> Progress:
        return Progress(state, due.last_try.asks + 1, 0)

    def _refused(self, due: DueRefund, answer: Refunded) -> Progress:
        if due.last_try.seq >= MAX_REFUND_TRIES:
            # There is no further number. It stays open all the same: the money may yet go back by other ways.
            why = f"refused under all {MAX_REFUND_TRIES} numbers: {answer.code} {answer.message}"
            return self._unfinished(due, RefundState.NEEDS_ATTENTION, why)
        attention = self._needs_attention(due)
        return Progress(
            RefundState.REFUSED,
            due.last_try.asks + 1,
            self._delay_ms(due, attention=attention),
            answer.code,
            answer.message,
            attention,
        )

    def _unfinished(self, due: DueRefund, state: RefundState, why: str) -> Progress:
        attention = state == RefundState.NEEDS_ATTENTION or self._needs_attention(due)
        return Progress(
            RefundState.NEEDS_ATTENTION if attention else state,
            due.last_try.asks + 1,
            self._delay_ms(due, attention=attention),
            "",
            why,
            attention,
        )

    def _needs_attention(self, due: DueRefund) -> bool:
        age_ms = self._clock.now_ms() - due.refund.recorded_at_ms
        return due.last_try.state == RefundState.NEEDS_ATTENTION or age_ms >= self._limits.attention_ms

    def _delay_ms(self, due: DueRefund, *, attention: bool) -> int:
        limits = self._limits
        # Tries count too: a channel that keeps refusing is asked less and less often.
        looks = due.last_try.asks + due.last_try.seq - 1
        first_ms = limits.longest_ms if attention else limits.retry_ms
        return backoff_ms(looks, first_ms, limits.longest_ms, self._draw)

    async def _record(self, due: DueRefund, progress: Progress) -> None:
        if not await self._writer.run(RecordProgress(due, progress)):
            return
        if progress.state != due.last_try.state:
            self._count(due.refund.reason, progress.state)
        if progress.attention and due.last_try.state != RefundState.NEEDS_ATTENTION:
            if progress.state != RefundState.NEEDS_ATTENTION:
                # This try was refused; what a person is told of goes on under the next number.
                self._count(due.refund.reason, RefundState.NEEDS_ATTENTION)
            self._tell_a_person(due, f"{progress.code} {progress.message}".strip())
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

    # Telling

    async def _look_for_old(self) -> None:
        """Tell a person of old refunds, those too that no pass comes to because their channel rests."""
        now_ms, looked_at_ms = self._clock.now_ms(), self._looked_for_old_at_ms
        if looked_at_ms is not None and 0 <= now_ms - looked_at_ms < _OLD_EVERY_MS:
            return
        self._looked_for_old_at_ms = now_ms
        owed_before_ms = now_ms - self._limits.attention_ms
        while old := await asyncio.to_thread(
            self._store.read, lambda connection: refunds.untold_refunds(connection, owed_before_ms, now_ms, _OLD_BATCH)
        ):
            marked = await self._writer.run(RaiseAttention(old))
            for due in marked:
                self._count(due.refund.reason, RefundState.NEEDS_ATTENTION)
                self._tell_a_person(
                    due,
                    due.last_try.last_error
                    or "the channel was not asked yet: it rests, or no process knows the account",
                )
            if not marked:
                break

    def _tell_a_person(self, due: DueRefund, why: str) -> None:
        _log.error(
            "refund_needs_attention",
            payment_id=due.refund.payment_id,
            refund_no=due.refund.refund_no,
            channel=due.attempt.channel,
            account=due.attempt.account,
            channel_refund_no=due.last_try.channel_refund_no,
            channel_trade_no=due.refund.channel_trade_no,
            amount_minor=due.refund.amount_minor,
            currency=due.refund.currency,
            age_ms=self._clock.now_ms() - due.refund.recorded_at_ms,
            why=why,
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
