"""The writes that take evidence out of quarantine. The evidence itself stays: nothing is ever deleted.

A row is closed only while it is as whoever decided has read it, so that a word that arrived meanwhile is not closed
unseen. What was decided is appended to what was decided before.
"""

import json
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from paycore._dedupe import Index
from paycore.domain.errors import NotFoundError, PreconditionError
from paycore.domain.verdicts import NotifyOutcome
from paycore.failpoint import failpoint
from paycore.store import evidence
from paycore.store.protocol import StoreBusyError, WriteTransaction
from paycore.store.rows import ExcessRow, PaymentRecord, QuarantineRow, RecordedCapture, Stamp
from paycore.usecases.judge import AccountCodes, index_payment
from paycore.usecases.keys import PAYMENT_NOT_FOUND
from paycore.usecases.refund import RefundIntent, derive_refunds, split_intents
from paycore.usecases.writer import UnindexedUnit

CONFIRMABLE = frozenset({NotifyOutcome.SECOND_CAPTURE, NotifyOutcome.MISMATCH})
"""The reasons of evidence that is a capture of its attempt beyond doubt once it is confirmed."""


_KEPT = "the payment keeps the capture of this trade number; one capture is never both kept and excess"
_OTHER_TERMS = "this trade number is on record as excess with another amount or currency"
_NOT_YET_JUDGED = "it is what the payment asks for, and nothing else is on record for its attempt: judge it again"


class ResolutionVerdict(StrEnum):
    """What was decided about evidence; the words are written into the database."""

    JUDGED = "judged"
    """Its order appeared, and the word went through the decision."""
    ON_RECORD = "on record"
    """This very capture is on record by now."""
    REFUTED = "refuted"
    """The channel itself tells something else under this trade number, which is on record."""
    CONFIRMED = "confirmed"
    """It is a capture that is not kept: excess, which goes back."""
    DISMISSED = "dismissed"
    """A person says that it means no money."""


class Resolution(NamedTuple):
    """One decision about evidence. who: a job's name or a person's; at_ms: when it was made."""

    verdict: ResolutionVerdict
    reason: str
    who: str
    at_ms: int


def resolutions_of(row: QuarantineRow) -> list[Resolution]:
    """Read what was decided about a row so far, oldest first."""
    return [
        Resolution(ResolutionVerdict(one["verdict"]), one["reason"], one["who"], one["at_ms"])
        for one in json.loads(row.resolutions)
    ]


def with_resolution(row: QuarantineRow, resolution: Resolution) -> str:
    """Write a row's resolutions and one more as JSON."""
    every = [*json.loads(row.resolutions), resolution._asdict()]
    return json.dumps(every, ensure_ascii=False, separators=(",", ":"))


def _close(transaction: WriteTransaction, row: QuarantineRow, resolution: Resolution) -> bool:
    """Close a row; False where it is not as it was read, unless an earlier try of ours has made it so."""
    written = with_resolution(row, resolution)
    if transaction.run(lambda connection: evidence.resolve(connection, row, written)):
        return True
    now = transaction.run(lambda connection: evidence.by_ids(connection, [row.quarantine_id]))
    return [one.resolutions for one in now if not one.is_open] == [written]


class ResolveEvidence(UnindexedUnit):
    """A write unit: rows are closed, each with what was decided about it. Returns the ids of those that were."""

    def __init__(self, decided: Sequence[tuple[QuarantineRow, Resolution]]) -> None:
        self._decided = sorted(decided)

    def apply(self, transaction: WriteTransaction) -> set[str]:
        """Close those that are as they were read."""
        return {row.quarantine_id for row, resolution in self._decided if _close(transaction, row, resolution)}


class Confirmed(NamedTuple):
    """What a confirmation came to. resolved: False where the row was not as it was read; then nothing was written."""

    resolved: bool
    refunds: Sequence[RefundIntent] = ()


class ConfirmExcess:
    """A write unit: the evidence is a capture that is not kept. It becomes excess, and its row is closed with it.

    The payment is held from before it is read until the commit, and where it has no outcome yet the outcome's key too:
    a first outcome is written either before, and then seen here, or after, and then sees this excess. So one capture is
    never both kept and excess. The refund is derived only where there is an outcome; otherwise the outcome releases it.
    """

    def __init__(self, row: QuarantineRow, resolution: Resolution, accounts: AccountCodes) -> None:
        self._row = row
        self._resolution = resolution
        self._accounts = accounts
        self._record: PaymentRecord | None = None

    def apply(self, transaction: WriteTransaction) -> Confirmed:
        """Write the excess unless it is on record. Raises PreconditionError where it must not become excess."""
        check_reason(self._row)
        record = self._lock(transaction)
        recorded = check_confirmable(self._row, record)
        # Before anything else is written: a row that is not as it was read leaves nothing behind.
        if not _close(transaction, self._row, self._resolution):
            return Confirmed(resolved=False)
        if recorded is not None:
            return Confirmed(resolved=True)
        if record.outcome is None and transaction.hold_open([record.payment.payment_id]):
            raise StoreBusyError("an outcome appeared while an excess capture was being confirmed")
        excess = _excess_row(self._row, transaction.stamp)
        transaction.insert_excess([excess])
        record.excess.append(excess)
        self._record = record
        intents = derive_refunds(record, [excess], transaction.stamp)
        if intents:
            transaction.insert_refunds(*split_intents(intents))
        failpoint("confirm.written")
        return Confirmed(resolved=True, refunds=intents)

    def _lock(self, transaction: WriteTransaction) -> PaymentRecord:
        payment_id = self._row.payment_id or 0
        record = transaction.lock_records([payment_id]).get(payment_id)
        if record is None or self._row.attempt not in record.attempts:
            raise NotFoundError(PAYMENT_NOT_FOUND, "no such payment or attempt")
        return record

    def committed(self, index: Index) -> None:
        """Tell the index of the attempt's capture."""
        if self._record is not None:
            index_payment(index, self._record, self._accounts)


def check_reason(row: QuarantineRow) -> None:
    """Raise PreconditionError, NOT_CONFIRMABLE, where evidence is of a kind that can only be dismissed."""
    if row.reason not in CONFIRMABLE:
        named = NotifyOutcome(row.reason).name
        raise PreconditionError("NOT_CONFIRMABLE", f"{named} can only be dismissed: it names no capture of an order")


def check_confirmable(row: QuarantineRow, record: PaymentRecord) -> RecordedCapture | None:
    """Return the equal capture that is on record as excess already; None where there is none yet.

    Raises PreconditionError: CAPTURE_KEPT, OTHER_TERMS_ON_RECORD, NOT_YET_JUDGED.
    """
    if record.is_kept(row.attempt or 0, row.channel_trade_no):
        raise PreconditionError("CAPTURE_KEPT", _KEPT)
    of_attempt = [capture for capture in record.captures() if capture.attempt == row.attempt]
    same_number = next((one for one in of_attempt if one.channel_trade_no == row.channel_trade_no), None)
    if same_number is not None and terms_of(same_number) != terms_of(row):
        raise PreconditionError("OTHER_TERMS_ON_RECORD", _OTHER_TERMS)
    if not of_attempt and terms_of(record.payment) == terms_of(row):
        raise PreconditionError("NOT_YET_JUDGED", _NOT_YET_JUDGED)
    return same_number


class _HasTerms(Protocol):
    @property
    def amount_minor(self) -> int: ...

    @property
    def currency(self) -> str: ...


def terms_of(one: _HasTerms) -> tuple[int, str]:
    """What money: amount and currency."""
    return one.amount_minor, one.currency


def _excess_row(row: QuarantineRow, stamp: Stamp) -> ExcessRow:
    assert row.payment_id is not None, "checked by the lock"
    assert row.attempt is not None, "checked by the lock"
    return ExcessRow(
        row.payment_id,
        row.attempt,
        row.channel_trade_no,
        row.reason,
        row.amount_minor,
        row.currency,
        row.paid_at_ms,
        row.first_seen_at_ms,
        row.source,
        *stamp,
    )
