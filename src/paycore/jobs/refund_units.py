"""The refunder's writes."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from paycore.domain.ids import MAX_REFUND_TRIES
from paycore.domain.verdicts import REFUND_FINAL, RefundState
from paycore.jobs.gate import Account
from paycore.store import refunds
from paycore.store.protocol import DueRefund, WriteTransaction
from paycore.store.rows import RefundResultRow, RefundTryRow
from paycore.usecases.refund import new_try
from paycore.usecases.writer import UnindexedUnit


class ClaimDue(UnindexedUnit):
    """Leases tries of one share that were due at a time, so that no other process sends them meanwhile."""

    def __init__(
        self, slice_: int, due_ms: int, *, lease_token: str, lease_ms: int, limit: int, accounts: Collection[Account]
    ) -> None:
        self._slice = slice_
        self._due_ms = due_ms
        self._lease_token = lease_token
        self._lease_ms = lease_ms
        self._limit = limit
        self._accounts = accounts

    def apply(self, transaction: WriteTransaction) -> list[DueRefund]:
        """Return what is ours to send until the lease ends."""
        until_ms = transaction.stamp.recorded_at_ms + self._lease_ms
        return transaction.claim_refunds(
            [self._slice], self._due_ms, until_ms, self._lease_token, self._limit, self._accounts
        )


class ReleaseTries(UnindexedUnit):
    """Gives back tries that were claimed and not touched: they stay as due as they were."""

    def __init__(self, claimed: Sequence[DueRefund]) -> None:
        self._claimed = claimed

    def apply(self, transaction: WriteTransaction) -> None:
        """Write nothing where somebody else holds one by now."""
        moves = [(due.last_try, due.last_try._replace(lease_until_ms=0, lease_token="")) for due in self._claimed]
        transaction.run(lambda connection: refunds.move_tries(connection, moves))


class RaiseAttention(UnindexedUnit):
    """Marks refunds that a person is to be told of; one that has moved since it was read is left alone."""

    def __init__(self, old: Sequence[DueRefund]) -> None:
        self._old = old

    def apply(self, transaction: WriteTransaction) -> list[DueRefund]:
        """Return those that were marked, as they were before."""
        now_ms = transaction.stamp.recorded_at_ms
        moves = [
            (due.last_try, due.last_try._replace(state=RefundState.NEEDS_ATTENTION, state_at_ms=now_ms))
            for due in self._old
        ]
        written = {row[:3] for row in transaction.run(lambda connection: refunds.move_tries(connection, moves))}
        return [due for due in self._old if due.last_try[:3] in written]


class Progress(NamedTuple):
    """How a try stands after the channel was asked. delay_ms: until it is looked at again.

    attention: a person is told of the refund, or was already; a next try goes on from there.
    """

    state: RefundState
    asks: int
    delay_ms: int
    code: str = ""
    message: str = ""
    attention: bool = False


class RecordProgress(UnindexedUnit):
    """Writes how a try stands, where its lease is still held; a final word is written as a fact.

    Only a final refusal makes the next number (R6). lease_ms: how long the try is ours from now on; 0: no longer.
    """

    def __init__(self, due: DueRefund, progress: Progress, *, lease_ms: int = 0) -> None:
        self._due = due
        self._progress = progress
        self._lease_ms = lease_ms

    def apply(self, transaction: WriteTransaction) -> bool:
        """Return whether the lease was still ours; where it was not, nothing is written."""
        row = self._row(transaction.stamp.recorded_at_ms)
        if not transaction.update_refund_try(row, lease_token=self._due.last_try.lease_token):
            return False
        if self._progress.state in REFUND_FINAL:
            self._write_final(transaction)
        return True

    def _row(self, now_ms: int) -> RefundTryRow:
        progress, last_try = self._progress, self._due.last_try
        return last_try._replace(
            state=progress.state,
            state_at_ms=now_ms,
            asks=progress.asks,
            next_at_ms=now_ms + progress.delay_ms,
            lease_until_ms=now_ms + self._lease_ms if self._lease_ms else 0,
            lease_token=last_try.lease_token if self._lease_ms else "",
            last_error=self._error(),
        )

    def _error(self) -> str:
        return f"{self._progress.code} {self._progress.message}".strip()

    def _write_final(self, transaction: WriteTransaction) -> None:
        progress, last_try, stamp = self._progress, self._due.last_try, transaction.stamp
        transaction.insert_refund_result(
            RefundResultRow(
                last_try.payment_id,
                last_try.refund_no,
                last_try.seq,
                progress.state,
                progress.code,
                progress.message,
                *stamp,
            )
        )
        if progress.state == RefundState.REFUSED:
            self._write_next(transaction)

    def _write_next(self, transaction: WriteTransaction) -> None:
        seq, stamp = self._due.last_try.seq + 1, transaction.stamp
        assert seq <= MAX_REFUND_TRIES, "the last number of a refund is never given up"
        next_at_ms = stamp.recorded_at_ms + self._progress.delay_ms
        state = RefundState.NEEDS_ATTENTION if self._progress.attention else RefundState.PENDING
        next_try = new_try(self._due.refund, seq=seq, next_at_ms=next_at_ms, stamp=stamp, state=state)
        transaction.insert_refund_try(next_try._replace(last_error=self._error()))
