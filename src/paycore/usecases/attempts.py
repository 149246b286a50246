"""One attempt's conversation with its channel: what it said is written down, and money goes through the decision."""

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext

from paycore.channels.protocol import (
    Capture,
    Channel,
    ChannelOrder,
    ChannelUnknownError,
    CloseResult,
    Queried,
    QueryState,
)
from paycore.channels.registry import ChannelRegistry
from paycore.domain.clock import Clock
from paycore.domain.errors import PreconditionError
from paycore.domain.ids import format_channel_order_no
from paycore.domain.leases import lease_holds
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState, CaptureSource, PayMethod
from paycore.failpoint import failpoint
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import ChannelOrderRow, PaymentRecord, PaymentRow
from paycore.usecases.told import NoteQueriedPaid, words_of
from paycore.usecases.words import verdict_at
from paycore.usecases.writer import UnindexedUnit, Writer

NOT_EXIST_MARGIN_MS = 60_000
"""How long past its absolute expiry an order unknown to its channel is still waited for before it counts as unpaid.

Some channels learn of an order only when the user scans (Alipay, docs/channels.md), so not-exist alone is no word.
"""

ATTEMPT_STATE_UNKNOWN = "ATTEMPT_STATE_UNKNOWN"

_IN_CONVERSATION = (AttemptState.CREATING, AttemptState.OPEN, AttemptState.UNKNOWN)

Gate = Callable[[str, str], AbstractAsyncContextManager[None]]
"""Entered, by the channel's and the account's name, for as long as a call takes. May wait, and may raise
ChannelUnknownError."""


def _open_gate(channel: str, account: str) -> AbstractAsyncContextManager[None]:
    """Let every call pass at once."""
    del channel, account
    return nullcontext()


def channel_order(payment: PaymentRow, attempt: ChannelOrderRow) -> ChannelOrder:
    """What the channel is asked for: identical each time it is asked."""
    return ChannelOrder(
        attempt.account,
        format_channel_order_no(attempt.payment_id, attempt.attempt),
        payment.amount_minor,
        payment.currency,
        payment.subject,
        payment.return_url,
        PayMethod(attempt.method),
        attempt.expire_at_ms,
    )


class SettleAttempt(UnindexedUnit):
    """A write unit: how the conversation stands now. Returns the payment's record after it.

    lease_token: only whoever holds the lease writes; None where no lease is needed.
    """

    def __init__(
        self,
        attempt: ChannelOrderRow,
        state: AttemptState,
        *,
        lease_token: str | None = None,
        credential: str = "",
        code: str = "",
        message: str = "",
    ) -> None:
        self._payment_id, self._attempt = attempt.payment_id, attempt.attempt
        self._state = state
        self._lease_token = lease_token
        self._credential = credential
        self._code, self._message = code, message

    def apply(self, transaction: WriteTransaction) -> PaymentRecord:
        """Write the state unless the conversation has ended or somebody else leads it."""
        # Held: what the update writes back is the row as it is, with whatever others have written to it.
        record = transaction.lock_records([self._payment_id])[self._payment_id]
        row = record.attempts[self._attempt]
        if self._lease_token is not None and row.lease_token != self._lease_token:
            return record
        settled = self._settled(row, transaction.stamp.recorded_at_ms)
        if transaction.update_channel_order(settled, expected=_IN_CONVERSATION):
            record.attempts[self._attempt] = settled
        return record

    def _settled(self, row: ChannelOrderRow, now_ms: int) -> ChannelOrderRow:
        failed = self._state == AttemptState.FAILED
        return row._replace(
            state=self._state,
            state_at_ms=now_ms,
            credential=self._credential or row.credential,
            failure_code=self._code if failed else row.failure_code,
            failure_message=self._message if failed else row.failure_message,
            failed_at_ms=now_ms if failed else row.failed_at_ms,
            lease_until_ms=0,
            lease_token="",
        )


class Conversations:
    """Talks to channels about attempts, and hands on what they say. gate: what calls to a channel must pass."""

    def __init__(self, registry: ChannelRegistry, writer: Writer, clock: Clock, gate: Gate = _open_gate) -> None:
        self._registry = registry
        self._writer = writer
        self._clock = clock
        self._gate = gate

    def behind(self, gate: Gate) -> "Conversations":
        """The same with a gate, for those who can wait."""
        return Conversations(self._registry, self._writer, self._clock, gate)

    def channel(self, attempt: ChannelOrderRow) -> Channel:
        """The attempt's channel. Raises PreconditionError when it is not configured here any more."""
        if not self._registry.code(attempt.channel, attempt.account):
            raise PreconditionError(
                "ACCOUNT_NOT_CONFIGURED",
                f"channel {attempt.channel}, account {attempt.account} is not configured on this server",
            )
        return self._registry.channel(attempt.channel)

    async def take_captures(
        self, attempt: ChannelOrderRow, captures: Sequence[Capture], source: CaptureSource
    ) -> list[Verdict]:
        """Put money that the channel told us of through the same decision as a notification, all in one commit."""
        return await self._judge(words_of(attempt, captures, source, self._clock.now_ms()))

    async def _judge(self, words: Sequence[Notification]) -> list[Verdict]:
        batch = self._writer.decoder.of_values(words)
        await self._writer.take(batch)
        return [verdict_at(batch, position) for position in range(len(words))]

    async def ask(self, attempt: ChannelOrderRow) -> Queried:
        """Ask how an attempt stands, and take nothing in. Raises ChannelUnknownError, PreconditionError."""
        channel, order_no = self.channel(attempt), format_channel_order_no(attempt.payment_id, attempt.attempt)
        failpoint("conversation.before_query")
        async with self._gate(attempt.channel, attempt.account):
            queried = await channel.query(attempt.account, order_no)
        failpoint("conversation.after_query")
        return queried

    async def query(self, attempt: ChannelOrderRow) -> Queried:
        """Ask how an attempt stands, and take in the money and the final words that the answer holds.

        Raises ChannelUnknownError, PreconditionError.
        """
        queried = await self.ask(attempt)
        if queried.captures:
            words = words_of(attempt, queried.captures, CaptureSource.QUERY, self._clock.now_ms())
            await self._writer.run(NoteQueriedPaid(attempt, words))
            failpoint("conversation.paid_noted")
            await self._judge(words)
        elif attempt.state in FINALLY_UNPAID:
            # What we called it stands; only money would be news.
            pass
        elif queried.state == QueryState.CLOSED:
            await self.settle(attempt, AttemptState.CLOSED)
        elif queried.state == QueryState.FAILED:
            await self.settle(attempt, AttemptState.FAILED, code=queried.code, message=queried.message)
        return queried

    async def settle(
        self, attempt: ChannelOrderRow, state: AttemptState, *, code: str = "", message: str = ""
    ) -> PaymentRecord:
        """Write down a state that needs no lease: the channel's own final word."""
        return await self._writer.run(SettleAttempt(attempt, state, code=code, message=message))

    async def end(self, attempt: ChannelOrderRow) -> None:
        """Bring an attempt to a final word: paid and taken in, or unpaid and closed at its channel.

        Query comes before close. Raises PreconditionError (ATTEMPT_STATE_UNKNOWN, retryable) where the channel
        gives no final word: an error, "in progress" and not-exist are neither paid nor unpaid.
        """
        if attempt.state == AttemptState.CREATING and lease_holds(attempt.lease_until_ms, self._clock.now_ms()):
            raise _unknown(attempt, "it is being opened")
        try:
            await self._end(attempt)
        except ChannelUnknownError as error:
            raise _unknown(attempt, str(error)) from error

    async def _end(self, attempt: ChannelOrderRow) -> None:
        queried = await self.query(attempt)
        if queried.captures or queried.state in (QueryState.CLOSED, QueryState.FAILED):
            return
        if queried.state == QueryState.NOT_PAID:
            await self._close_at_channel(attempt)
        elif queried.state == QueryState.NOT_EXIST and self._is_past(attempt):
            await self.settle(attempt, AttemptState.CLOSED)
        else:
            raise _unknown(attempt, f"the channel says {queried.state.name}")

    async def _close_at_channel(self, attempt: ChannelOrderRow) -> None:
        channel, order_no = self.channel(attempt), format_channel_order_no(attempt.payment_id, attempt.attempt)
        failpoint("conversation.before_close")
        async with self._gate(attempt.channel, attempt.account):
            result = await channel.close(attempt.account, order_no)
        failpoint("conversation.after_close")
        if result == CloseResult.CLOSED:
            await self.settle(attempt, AttemptState.CLOSED)
            return
        if result == CloseResult.ALREADY_PAID and (await self.query(attempt)).captures:
            return
        raise _unknown(attempt, f"the channel answers the close with {result.name}")

    def _is_past(self, attempt: ChannelOrderRow) -> bool:
        return self._clock.now_ms() > attempt.expire_at_ms + NOT_EXIST_MARGIN_MS


def _unknown(attempt: ChannelOrderRow, why: str) -> PreconditionError:
    return PreconditionError(
        ATTEMPT_STATE_UNKNOWN,
        f"attempt {attempt.attempt} may still be paid: {why}",
        retryable=True,
        metadata={"attempt": str(attempt.attempt)},
    )
