"""The first write of Pay: payment, merchant order, the attempt that is to be opened, and repair's tasks about them.

All in one transaction, so that nothing is opened that repair does not know of.
"""

from enum import Enum
from typing import NamedTuple

from paycore._dedupe import Index
from paycore.domain.errors import AlreadyExistsError, PreconditionError
from paycore.domain.ids import MAX_ATTEMPTS, PaymentIds
from paycore.domain.leases import lease_holds
from paycore.domain.verdicts import AttemptState, PaymentState, PayMethod
from paycore.store.protocol import StoreBusyError, WriteTransaction
from paycore.store.rows import ChannelOrderRow, PaymentRecord, PaymentRow, Stamp, TaskRow
from paycore.usecases.judge import AccountCodes, index_payment
from paycore.usecases.pay_command import PayCommand, PayLimits
from paycore.usecases.tasks import Schedule

_MAX_DRAWS = 16
"""Ids drawn before giving up: each collision needs another live process with this node number."""


class Step(Enum):
    """What Pay has to do next."""

    PAID = "the payment is paid; nothing is opened"
    READY = "the attempt is open and its credential known"
    WAIT = "somebody else is talking to the channel about the attempt"
    CREATE = "the attempt is new and ours to open"
    RESUME = "an older try to open the attempt gave no word; ours to query, then to send again"


class Opened(NamedTuple):
    """What the first write found or made. attempt: None where step is PAID."""

    step: Step
    record: PaymentRecord
    attempt: ChannelOrderRow | None


class _LostRaceError(Exception):
    """Another writer inserted the merchant order first."""


class OpenAttempt:
    """A write unit: finds or makes the payment, finds or makes the attempt, and takes its lease.

    lease_token names this call: a second application after a lost commit finds its own attempt by it.
    """

    def __init__(
        self,
        command: PayCommand,
        *,
        ids: PaymentIds,
        limits: PayLimits,
        accounts: AccountCodes,
        schedule: Schedule,
        lease_token: str,
        lease_ms: int,
    ) -> None:
        self._command = command
        self._ids = ids
        self._limits = limits
        self._accounts = accounts
        self._schedule = schedule
        self._lease_token = lease_token
        self._lease_ms = lease_ms
        self._record: PaymentRecord | None = None

    def apply(self, transaction: WriteTransaction) -> Opened:
        """Raises AlreadyExistsError and PreconditionError; then nothing is written."""
        self._record = record = self._find_or_make(transaction)
        if record.state == PaymentState.PAID:
            return Opened(Step.PAID, record, None)
        self._refuse_unpayable(record, transaction.stamp.recorded_at_ms)
        same_way = self._live_same_way(record)
        if same_way is None or same_way.state != AttemptState.OPEN:
            # Whatever would make the channel open something, a page that was never opened included.
            self._refuse_beside_unknown_charge(record, same_way)
        if same_way is not None:
            return self._take_up(transaction, record, same_way)
        return Opened(Step.CREATE, record, self._insert_attempt(transaction, record))

    def committed(self, index: Index) -> None:
        """Tell the index of the payment and its attempts."""
        if self._record is not None:
            index_payment(index, self._record, self._accounts)

    def _find_or_make(self, transaction: WriteTransaction) -> PaymentRecord:
        command = self._command
        payment_id = transaction.find_payment_id(command.merchant_id, command.merchant_order_no)
        if payment_id is None:
            try:
                with transaction.savepoint():
                    return PaymentRecord(self._insert_payment(transaction))
            except _LostRaceError:
                payment_id = transaction.find_payment_id(command.merchant_id, command.merchant_order_no)
        if payment_id is None:
            raise StoreBusyError("a merchant order appeared and is not visible yet")
        # Held from here on: one call after another numbers attempts and supersedes them, and no close slips in.
        record = transaction.lock_records([payment_id])[payment_id]
        if record.payment.terms_digest != command.terms_digest():
            raise AlreadyExistsError(command.terms_that_differ(record.payment))
        return record

    def _insert_payment(self, transaction: WriteTransaction) -> PaymentRow:
        command, stamp = self._command, transaction.stamp
        validity_ms = self._limits.default_validity_ms if command.validity_ms is None else command.validity_ms
        for _ in range(_MAX_DRAWS):
            row = PaymentRow(
                self._ids.draw(),
                command.merchant_id,
                command.merchant_order_no,
                command.amount_minor,
                command.currency,
                command.subject,
                command.return_url,
                command.terms_digest(),
                stamp.recorded_at_ms + validity_ms,
                *stamp,
            )
            if transaction.insert_payment(row):
                break
        else:
            raise StoreBusyError(f"{_MAX_DRAWS} payment ids in a row were taken")
        if not transaction.insert_merchant_order(command.merchant_id, command.merchant_order_no, row.payment_id):
            raise _LostRaceError
        return row

    def _refuse_unpayable(self, record: PaymentRecord, now_ms: int) -> None:
        if record.state == PaymentState.CLOSED:
            raise PreconditionError("PAYMENT_CLOSED", "the payment is closed")
        if now_ms > record.payment.expire_at_ms:
            raise PreconditionError("PAYMENT_EXPIRED", "the payment's validity has passed")
        if record.attempts and now_ms + self._limits.min_remaining_ms > record.payment.expire_at_ms:
            raise PreconditionError("PAYMENT_EXPIRING", "too little of the payment's validity is left")

    def _live_same_way(self, record: PaymentRecord) -> ChannelOrderRow | None:
        command = self._command
        way = (command.channel, command.account, command.method)
        same = [row for row in record.live_attempts() if (row.channel, row.account, row.method) == way]
        return same[-1] if same else None

    def _take_up(self, transaction: WriteTransaction, record: PaymentRecord, attempt: ChannelOrderRow) -> Opened:
        now_ms = transaction.stamp.recorded_at_ms
        if attempt.lease_token == self._lease_token:
            return Opened(Step.CREATE, record, attempt)
        if lease_holds(attempt.lease_until_ms, now_ms):
            # Somebody opens it, or is about to close it at the channel: a page that is being closed is not handed out.
            return Opened(Step.WAIT, record, attempt)
        if attempt.state == AttemptState.OPEN:
            # The user is sent to it again, so it is no longer one to be closed.
            taken = attempt._replace(superseded_at_ms=None)
            step = Step.READY
        else:
            taken = attempt._replace(lease_until_ms=now_ms + self._lease_ms, lease_token=self._lease_token)
            step = Step.RESUME
        if taken != attempt:
            transaction.update_channel_order(taken, expected=(AttemptState(attempt.state),))
            record.attempts[attempt.attempt] = taken
        return Opened(step, record, taken)

    def _refuse_beside_unknown_charge(self, record: PaymentRecord, asked_for: ChannelOrderRow | None) -> None:
        # R6: money that a synchronous charge may have taken must be known before more is asked for.
        for row in record.live_attempts():
            if row.method == PayMethod.CHARGE and row is not asked_for:
                raise PreconditionError(
                    "CHARGE_UNKNOWN",
                    f"the charge of attempt {row.attempt} has no final word yet; ask Query, or call Pay for it again",
                    retryable=True,
                    metadata={"attempt": str(row.attempt)},
                )

    def _insert_attempt(self, transaction: WriteTransaction, record: PaymentRecord) -> ChannelOrderRow:
        attempt = max(record.attempts, default=0) + 1
        if attempt > MAX_ATTEMPTS:
            raise PreconditionError("ATTEMPTS_EXHAUSTED", f"a payment has at most {MAX_ATTEMPTS} attempts")
        command, stamp = self._command, transaction.stamp
        row = ChannelOrderRow(
            record.payment.payment_id,
            attempt,
            command.channel,
            command.account,
            command.method,
            record.payment.expire_at_ms,
            AttemptState.CREATING,
            stamp.recorded_at_ms,
            "",
            "",
            "",
            None,
            None,
            stamp.recorded_at_ms + self._lease_ms,
            self._lease_token,
            *stamp,
        )
        transaction.insert_channel_order(row)
        transaction.put_tasks(self._tasks(record, row, stamp))
        if attempt > 1:
            transaction.supersede_attempts(row.payment_id, attempt, stamp.recorded_at_ms)
        record.attempts[attempt] = row
        return row

    def _tasks(self, record: PaymentRecord, attempt: ChannelOrderRow, stamp: Stamp) -> list[TaskRow]:
        """What repair comes back to: the new attempt; its payment, which is as new as a first attempt; the older ones.

        Only attempts that are not queued yet: the task of the others is there, or was done.
        """
        schedule = self._schedule
        tasks = [schedule.to_query(attempt, stamp)]
        if not record.attempts:
            tasks.append(schedule.to_close(record.payment, stamp))
        older = [row for row in record.live_attempts() if row.superseded_at_ms is None]
        return tasks + [schedule.to_end(row, stamp) for row in older]
