"""Close: a payment that nobody has paid is closed, after each of its attempts has been ended at its channel."""

import asyncio

from paycore._dedupe import Index
from paycore.channels.protocol import was_asked
from paycore.domain.errors import NotFoundError, PreconditionError
from paycore.domain.verdicts import CloseReason, PaymentState
from paycore.failpoint import failpoint
from paycore.store.protocol import Store, StoreBusyError, WriteTransaction
from paycore.store.rows import ChannelOrderRow, PaymentFile, PaymentRecord
from paycore.usecases.attempts import ATTEMPT_STATE_UNKNOWN, Conversations
from paycore.usecases.judge import AccountCodes, index_payment
from paycore.usecases.keys import PAYMENT_NOT_FOUND, PaymentKey, resolve
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.rare import closed_outcome
from paycore.usecases.refund import derive_refunds, split_intents
from paycore.usecases.writer import Writer

_MAX_ROUNDS = 3
"""How often attempts are ended anew because another was opened meanwhile."""

_log = QuietLog()


class InsertClosed:
    """A write unit: the outcome CLOSED, and the refunds that waited for it.

    Attempts are listed again under the lock of the payment's row: Pay inserts attempts under the same lock, so none can
    slip in between. A first outcome takes no lock; between it and this one the outcome's key decides.
    """

    def __init__(self, payment_id: int, reason: CloseReason, accounts: AccountCodes) -> None:
        self._payment_id = payment_id
        self._reason = reason
        self._accounts = accounts
        self._record: PaymentRecord | None = None

    def apply(self, transaction: WriteTransaction) -> PaymentRecord:
        """Close the payment unless it has an outcome. Raises PreconditionError while an attempt is live.

        UNREACHABLE alone closes it all the same: so long after its expiry that nobody waits for the channel any more.
        """
        self._record = record = transaction.lock_records([self._payment_id])[self._payment_id]
        if record.outcome is not None:
            return record
        live = record.live_attempts()
        if live and self._reason != CloseReason.UNREACHABLE:
            raise PreconditionError(
                ATTEMPT_STATE_UNKNOWN, f"attempt {live[0].attempt} may still be paid", retryable=True
            )
        stamp = transaction.stamp
        row = closed_outcome(self._payment_id, self._reason, stamp.recorded_at_ms, stamp)
        if transaction.insert_outcomes([row]):
            raise StoreBusyError("an outcome appeared while the payment was being closed")
        record.outcome = row
        intents = derive_refunds(record, record.excess, stamp)
        if intents:
            transaction.insert_refunds(*split_intents(intents))
        return record

    def committed(self, index: Index) -> None:
        """Tell the index that nothing is kept of this payment any more."""
        if self._record is not None:
            index_payment(index, self._record, self._accounts)


class Close:
    """Closes payments."""

    def __init__(self, store: Store, writer: Writer, conversations: Conversations, accounts: AccountCodes) -> None:
        self._store = store
        self._writer = writer
        self._conversations = conversations
        self._accounts = accounts

    async def close(self, key: PaymentKey) -> PaymentFile:
        """Close a payment for its merchant; a closed one is returned as it is.

        Raises PreconditionError: PAYMENT_PAID, or ATTEMPT_STATE_UNKNOWN (retryable) while a channel
        gives no final word about an attempt. NotFoundError, StoreUnavailableError.
        """
        payment_id = await asyncio.to_thread(resolve, self._store, key)
        record = await self.close_payment(payment_id, CloseReason.MERCHANT)
        if record.state == PaymentState.PAID:
            raise PreconditionError("PAYMENT_PAID", "the payment is paid and cannot be closed")
        file = await asyncio.to_thread(self._store.load_file, payment_id)
        assert file is not None, "a payment with an outcome exists"
        return file

    async def close_payment(self, payment_id: int, reason: CloseReason) -> PaymentRecord:
        """End the live attempts, then insert CLOSED; return the record with whichever outcome it has.

        Every live attempt is asked about, whatever the channel of another one says: any of them may be paid.
        Raises PreconditionError (ATTEMPT_STATE_UNKNOWN, ACCOUNT_NOT_CONFIGURED), NotFoundError, StoreUnavailableError.
        """
        refusal = PreconditionError(ATTEMPT_STATE_UNKNOWN, "no round was made", retryable=True)
        for _ in range(_MAX_ROUNDS):
            record = await self._load(payment_id)
            if record.outcome is not None:
                return record
            if unknown := [why for row in record.live_attempts() if (why := await self._why_not_ended(row))]:
                # Who was not asked comes first: nobody may take the others' silence for all there is to know.
                return await self._unless_paid_meanwhile(payment_id, min(unknown, key=was_asked))
            failpoint("close.attempts_ended")
            try:
                return await self._writer.run(InsertClosed(payment_id, reason, self._accounts))
            except PreconditionError as still_live:
                # Another attempt was opened meanwhile, or what the channel said lies in quarantine.
                _log.info("attempt_still_live", payment_id=payment_id, why=still_live.message)
                refusal = still_live
        raise refusal

    async def give_up(self, payment_id: int) -> PaymentRecord:
        """Close a payment although an attempt may still be paid; return the record with whichever outcome it has.

        A success that comes afterwards is LATE and goes back. Raises StoreUnavailableError.
        """
        return await self._writer.run(InsertClosed(payment_id, CloseReason.UNREACHABLE, self._accounts))

    async def _load(self, payment_id: int) -> PaymentRecord:
        record = await asyncio.to_thread(self._store.load_record, payment_id)
        if record is None:
            raise NotFoundError(PAYMENT_NOT_FOUND, "no such payment")
        return record

    async def _why_not_ended(self, attempt: ChannelOrderRow) -> PreconditionError | None:
        """Bring an attempt to its final word; where there is none, return why."""
        try:
            await self._conversations.end(attempt)
        except PreconditionError as refusal:
            return refusal
        return None

    async def _unless_paid_meanwhile(self, payment_id: int, refusal: PreconditionError) -> PaymentRecord:
        """What one channel said may have decided the payment; what another did not say matters no more then."""
        record = await self._load(payment_id)
        if record.outcome is None:
            raise refusal
        return record
