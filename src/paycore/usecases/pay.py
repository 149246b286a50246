"""Pay: asks a channel for money once. The attempt is written before the channel is called, never under a lock.

What the channel did when it gave no word is unknown: it is asked again under the same number (R6). A
synchronous charge that only says "accepted" is converted: Pay waits for the notification or asks
the channel until the caller's deadline; then the answer is WAIT, which is no failure.
"""

import asyncio
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from paycore.channels.protocol import ChannelUnknownError, Created, CreateResult, QueryState
from paycore.channels.registry import ChannelRegistry
from paycore.domain.clock import Clock
from paycore.domain.errors import ChannelUnavailableError, PreconditionError
from paycore.domain.ids import PaymentIds
from paycore.domain.verdicts import EXCESS_REASONS, AttemptState, CaptureSource, NotifyOutcome, PaymentState, PayMethod
from paycore.failpoint import failpoint
from paycore.store.protocol import Store
from paycore.store.rows import ChannelOrderRow, PaymentRecord, PaymentRow
from paycore.usecases.attempts import Conversations, SettleAttempt, channel_order
from paycore.usecases.pay_command import PayCommand, PayLimits, check_command
from paycore.usecases.pay_open import OpenAttempt, Step
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

ANSWER_MARGIN_MS = 100
"""Kept back from the caller's deadline, so that the answer arrives before it."""

_POLL_MS = 100
"""How often the database is asked whether a notification, here or in another process, settled the attempt."""

_FIRST_QUERY_MS = 200
_LONGEST_QUERY_MS = 2_000

_JUDGED = EXCESS_REASONS | {NotifyOutcome.ACCEPTED}

_log = QuietLog()


class NextAction(IntEnum):
    """What the caller should do next; numbered as in the API."""

    REDIRECT = 1
    SHOW_QR = 2
    NONE = 3
    WAIT = 4


class PayResult(NamedTuple):
    """What Pay answers. attempt: None when the payment was already paid."""

    payment: PaymentRow
    state: PaymentState
    attempt: ChannelOrderRow | None
    next_action: NextAction


class _FinallyUnpaidError(Exception):
    """The attempt turned out to be finally unpaid: the next one may be opened."""


class Pay:
    """Opens payments. ``lease_ms`` must outlast two channel calls; ``new_token`` names each call uniquely."""

    def __init__(
        self,
        store: Store,
        writer: Writer,
        conversations: Conversations,
        *,
        registry: ChannelRegistry,
        clock: Clock,
        ids: PaymentIds,
        limits: PayLimits,
        schedule: Schedule,
        new_token: Callable[[], str],
        lease_ms: int,
    ) -> None:
        self._store = store
        self._writer = writer
        self._conversations = conversations
        self._registry = registry
        self._clock = clock
        self._ids = ids
        self._limits = limits
        self._schedule = schedule
        self._new_token = new_token
        self._lease_ms = lease_ms
        self._running: set[asyncio.Task[PayResult]] = set()

    async def pay(self, command: PayCommand, *, deadline_ms: int) -> PayResult:
        """Open a payment, or find it again. deadline_ms: when the caller stops waiting, by the clock.

        A caller who hangs up stops nothing: what was begun with a channel is brought to its end and written down.

        Raises InvalidArgumentError, AlreadyExistsError (other terms), PreconditionError (PAYMENT_CLOSED,
        PAYMENT_EXPIRED, PAYMENT_EXPIRING, CHARGE_UNKNOWN, ATTEMPTS_EXHAUSTED, CHANNEL_REFUSED),
        ChannelUnavailableError (call again), StoreUnavailableError, ThrottledError.
        """
        check_command(command, self._limits, self._registry)
        answer_at_ms = deadline_ms - ANSWER_MARGIN_MS
        task = asyncio.create_task(self._drive(command, answer_at_ms))
        self._running.add(task)
        task.add_done_callback(self._forget)
        await asyncio.wait({task}, timeout=max(0, answer_at_ms - self._clock.now_ms()) / 1000)
        return task.result() if task.done() else await self._unfinished(command)

    async def drain(self) -> None:
        """Wait until every conversation that was begun is written down."""
        while self._running:
            await asyncio.wait(self._running)

    def _forget(self, task: asyncio.Task[PayResult]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Whoever still waits is answered with it; nobody may wait any more.
            _log.debug("pay_ended_with_error", error=repr(error))

    async def _unfinished(self, command: PayCommand) -> PayResult:
        """Answer at the deadline: the channel has not spoken yet."""
        payment_id = await asyncio.to_thread(
            self._store.find_payment_id, command.merchant_id, command.merchant_order_no
        )
        record = None if payment_id is None else await asyncio.to_thread(self._store.load_record, payment_id)
        if record is None:
            raise ChannelUnavailableError("DEADLINE", "the payment could not be written before the deadline")
        way = (command.channel, command.account, command.method)
        attempts = list(record.attempts.values())
        asked_for = [row for row in attempts if (row.channel, row.account, row.method) == way]
        newest = max(asked_for or attempts, key=lambda row: row.attempt, default=None)
        return PayResult(record.payment, record.state, newest, NextAction.WAIT)

    async def _drive(self, command: PayCommand, answer_at_ms: int) -> PayResult:
        while True:
            opened = await self._writer.run(self._open_attempt(command))
            if opened.attempt is None or opened.step in (Step.PAID, Step.READY):
                return _result(opened.record, opened.attempt)
            if opened.step == Step.WAIT:
                if self._clock.now_ms() >= answer_at_ms:
                    return PayResult(opened.record.payment, opened.record.state, opened.attempt, NextAction.WAIT)
                await asyncio.sleep(_POLL_MS / 1000)
                continue
            try:
                talk = self._create if opened.step == Step.CREATE else self._resume
                return await talk(opened.record.payment, opened.attempt, answer_at_ms)
            except _FinallyUnpaidError:
                continue

    def _open_attempt(self, command: PayCommand) -> OpenAttempt:
        return OpenAttempt(
            command,
            ids=self._ids,
            limits=self._limits,
            accounts=self._registry.code,
            schedule=self._schedule,
            lease_token=self._new_token(),
            lease_ms=self._lease_ms,
        )

    async def _create(self, payment: PaymentRow, attempt: ChannelOrderRow, answer_at_ms: int) -> PayResult:
        """Send the order, under the number and with the expiry that are on record."""
        failpoint("pay.before_create")
        try:
            created = await self._conversations.channel(attempt).create(channel_order(payment, attempt))
        except ChannelUnknownError as error:
            return await self._no_word(attempt, answer_at_ms, str(error))
        failpoint("pay.after_create")
        match created.result:
            case CreateResult.OPEN:
                credential = created.pay_url if attempt.method == PayMethod.REDIRECT else created.qr_text
                record = await self._settle(attempt, AttemptState.OPEN, credential=credential)
                return _result(record, record.attempts[attempt.attempt])
            case CreateResult.REFUSED:
                await self._settle(attempt, AttemptState.FAILED, code=created.code, message=created.message)
                raise _refused(created.code, created.message)
            case CreateResult.PAID:
                return await self._captured(attempt, created)
            case CreateResult.ACCEPTED:
                await self._settle(attempt, AttemptState.UNKNOWN)
                return await self._await_word(attempt, answer_at_ms)

    async def _resume(self, payment: PaymentRow, attempt: ChannelOrderRow, answer_at_ms: int) -> PayResult:
        """Query before sending again: the first sending may have arrived."""
        try:
            queried = await self._conversations.query(attempt)
        except ChannelUnknownError as error:
            return await self._no_word(attempt, answer_at_ms, str(error))
        if queried.captures:
            record = await self._settle(attempt, AttemptState.OPEN)
            return _result(record, record.attempts[attempt.attempt])
        if queried.state in (QueryState.CLOSED, QueryState.FAILED):
            raise _FinallyUnpaidError
        if attempt.method == PayMethod.CHARGE and queried.state != QueryState.NOT_EXIST:
            await self._settle(attempt, AttemptState.UNKNOWN)
            return await self._await_word(attempt, answer_at_ms)
        return await self._create(payment, attempt, answer_at_ms)

    async def _captured(self, attempt: ChannelOrderRow, created: Created) -> PayResult:
        assert created.capture is not None, "an adapter answers PAID with the capture"
        verdicts = await self._conversations.take_captures(attempt, [created.capture], CaptureSource.SYNC_ANSWER)
        judged = all(verdict.outcome in _JUDGED for verdict in verdicts)
        # Money that lies in quarantine leaves the charge without a final word.
        record = await self._settle(attempt, AttemptState.OPEN if judged else AttemptState.UNKNOWN)
        return _result(record, record.attempts[attempt.attempt])

    async def _no_word(self, attempt: ChannelOrderRow, answer_at_ms: int, why: str) -> PayResult:
        await self._settle(attempt, AttemptState.UNKNOWN)
        _log.warning("channel_gave_no_word", payment_id=attempt.payment_id, attempt=attempt.attempt, why=why)
        if attempt.method == PayMethod.CHARGE:
            return await self._await_word(attempt, answer_at_ms)
        raise ChannelUnavailableError(
            "CHANNEL_UNKNOWN", "the channel gave no answer; call Pay again: it is asked under the same number"
        )

    async def _await_word(self, attempt: ChannelOrderRow, answer_at_ms: int) -> PayResult:
        """Wait for a charge's final word: by notification, in whichever process, or by asking the channel."""
        query_every_ms = _FIRST_QUERY_MS
        query_at_ms = self._clock.now_ms() + query_every_ms
        while True:
            record = await asyncio.to_thread(self._store.load_record, attempt.payment_id)
            assert record is not None, "payments are never deleted"
            row = record.attempts[attempt.attempt]
            now_ms = self._clock.now_ms()
            if record.outcome is not None or row.state != AttemptState.UNKNOWN or now_ms >= answer_at_ms:
                return _result(record, row)
            if now_ms >= query_at_ms:
                await self._query_quietly(row)
                query_every_ms = min(2 * query_every_ms, _LONGEST_QUERY_MS)
                query_at_ms = self._clock.now_ms() + query_every_ms
                continue
            await asyncio.sleep(_POLL_MS / 1000)

    async def _query_quietly(self, attempt: ChannelOrderRow) -> None:
        try:
            await self._conversations.query(attempt)
        except ChannelUnknownError as error:
            _log.info("charge_still_unknown", payment_id=attempt.payment_id, attempt=attempt.attempt, why=str(error))

    async def _settle(
        self,
        attempt: ChannelOrderRow,
        state: AttemptState,
        *,
        credential: str = "",
        code: str = "",
        message: str = "",
    ) -> PaymentRecord:
        """Write down what the channel said, as the holder of the lease; return what is on record after it."""
        unit = SettleAttempt(
            attempt, state, lease_token=attempt.lease_token, credential=credential, code=code, message=message
        )
        return await self._writer.run(unit)


def _result(record: PaymentRecord, attempt: ChannelOrderRow | None) -> PayResult:
    """Answer from what is on record now. The outcome is read after the channel spoke, so no paid page is handed out."""
    payment = record.payment
    if record.state == PaymentState.PAID:
        return PayResult(payment, PaymentState.PAID, attempt, NextAction.NONE)
    if record.state == PaymentState.CLOSED:
        raise PreconditionError("PAYMENT_CLOSED", "the payment is closed")
    if attempt is not None and attempt.state == AttemptState.FAILED:
        raise _refused(attempt.failure_code, attempt.failure_message)
    if attempt is None or attempt.state != AttemptState.OPEN or attempt.method == PayMethod.CHARGE:
        return PayResult(payment, PaymentState.OPEN, attempt, NextAction.WAIT)
    action = NextAction.REDIRECT if attempt.method == PayMethod.REDIRECT else NextAction.SHOW_QR
    return PayResult(payment, PaymentState.OPEN, attempt, action)


def _refused(code: str, message: str) -> PreconditionError:
    return PreconditionError(
        "CHANNEL_REFUSED",
        f"the channel refused: {code} {message}".rstrip(),
        metadata={"channel_code": code, "channel_message": message},
    )
