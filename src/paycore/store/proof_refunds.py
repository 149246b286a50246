"""Which refund is of which excess, and whether each is what it must be: the part of the audit that derives numbers.

Pure: rows of one range come in, violations come out. A refund belongs to the excess that its number follows from,
else to the one whose capture it names.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from paycore.domain.audit import AuditKind, Details, Violation
from paycore.domain.ids import excess_refund_no
from paycore.domain.verdicts import PaymentState

_OF_MERCHANT = "M"
"""How the numbers of the merchant's own refunds begin; those of an excess never do."""


class ExcessFact(NamedTuple):
    """An excess capture beside its payment's outcome, which may not be there."""

    payment_id: int
    attempt: int
    channel_trade_no: str
    reason: int
    amount_minor: int
    currency: str
    recorded_at_ms: int
    state: int | None
    kept_attempt: int | None
    kept_trade_no: str | None

    @property
    def is_kept(self) -> bool:
        """Whether this very capture is kept: then no refund is owed, and another kind says what is wrong."""
        kept = self.kept_attempt == self.attempt and self.kept_trade_no == self.channel_trade_no
        return self.state == PaymentState.PAID and kept


class RefundFact(NamedTuple):
    """A refund beside its payment's outcome. done: the money is back; failed: finally refused, and no try follows."""

    payment_id: int
    refund_no: str
    attempt: int
    channel_trade_no: str
    reason: int
    amount_minor: int
    currency: str
    recorded_at_ms: int
    state: int | None
    kept_attempt: int | None
    kept_trade_no: str | None
    kept_minor: int | None
    kept_currency: str | None
    done: int
    failed: int

    @property
    def is_of_kept(self) -> bool:
        """Whether it names the capture that is kept."""
        kept = self.kept_attempt == self.attempt and self.kept_trade_no == self.channel_trade_no
        return self.state == PaymentState.PAID and kept

    @property
    def is_of_merchant(self) -> bool:
        """Whether the merchant asked for it."""
        return self.refund_no.startswith(_OF_MERCHANT)


def prove_refunds(excess: Iterable[ExcessFact], refunds: Iterable[RefundFact]) -> Iterator[Violation]:
    """Find what is wrong between the excess captures and the refunds of a range of payments."""
    excess_of: dict[int, list[ExcessFact]] = defaultdict(list)
    for capture in excess:
        excess_of[capture.payment_id].append(capture)
    refunds_of: dict[int, list[RefundFact]] = defaultdict(list)
    merchants_of: dict[int, list[RefundFact]] = defaultdict(list)
    for refund in refunds:
        (merchants_of if refund.is_of_merchant else refunds_of)[refund.payment_id].append(refund)
    for payment_id in sorted(excess_of.keys() | refunds_of.keys()):
        yield from _prove_payment(excess_of.get(payment_id, []), refunds_of.get(payment_id, []))
    for of_payment in merchants_of.values():
        yield from _prove_merchant(of_payment)


def _prove_payment(excess: list[ExcessFact], refunds: list[RefundFact]) -> Iterator[Violation]:
    by_number = {excess_refund_no(one.attempt, one.channel_trade_no): one for one in excess}
    by_capture = {(one.attempt, one.channel_trade_no): one for one in excess}
    owned: dict[ExcessFact, list[RefundFact]] = {one: [] for one in excess}
    for refund in refunds:
        owner = by_number.get(refund.refund_no) or by_capture.get((refund.attempt, refund.channel_trade_no))
        if owner is not None:
            owned[owner].append(refund)
        if refund.is_of_kept:
            yield _violation(AuditKind.REFUND_OF_KEPT, refund)
        elif owner is None:
            yield _violation(AuditKind.REFUND_WITHOUT_CAPTURE, refund)
    for capture, of_capture in owned.items():
        if not capture.is_kept:
            yield from _prove_capture(capture, [one for one in of_capture if not one.is_of_kept], bool(of_capture))


def _prove_capture(capture: ExcessFact, refunds: list[RefundFact], has_refund: bool) -> Iterator[Violation]:
    if not has_refund and capture.state is not None:
        yield Violation(
            AuditKind.REFUND_MISSING,
            capture.payment_id,
            {
                "attempt": capture.attempt,
                "channel_trade_no": capture.channel_trade_no,
                "amount_minor": capture.amount_minor,
                "currency": capture.currency,
            },
        )
    if len(refunds) > 1:
        numbers = " ".join(one.refund_no for one in refunds)
        yield _violation(AuditKind.REFUND_DOUBLED, refunds[0], refund_no=numbers)
        return
    for refund in refunds:
        yield from _prove_pair(capture, refund)


def _prove_pair(capture: ExcessFact, refund: RefundFact) -> Iterator[Violation]:
    if refund.state is None:
        yield _violation(AuditKind.REFUND_WITHOUT_OUTCOME, refund)
    names = ("attempt", "channel_trade_no", "amount_minor", "currency", "reason")
    differing = {name: getattr(capture, name) for name in names if getattr(capture, name) != getattr(refund, name)}
    if differing:
        found = {f"refund_{name}": getattr(refund, name) for name in differing}
        told = {f"excess_{name}": value for name, value in differing.items()}
        yield Violation(
            AuditKind.REFUND_TERMS_DIFFER, refund.payment_id, {"refund_no": refund.refund_no, **told, **found}
        )
    derived = excess_refund_no(capture.attempt, capture.channel_trade_no)
    if refund.refund_no != derived:
        yield _violation(AuditKind.REFUND_NUMBER_WRONG, refund, derived_no=derived)


def _prove_merchant(refunds: list[RefundFact]) -> Iterator[Violation]:
    """What the merchant sends back lies between nothing and the kept capture; every amount is above 0 by its rule."""
    standing = [one for one in refunds if not one.failed]
    astray = [one for one in standing if not one.is_of_kept or one.currency != one.kept_currency]
    reserved_minor = sum(one.amount_minor for one in standing)
    if astray:
        yield _violation(AuditKind.MERCHANT_REFUNDS_EXCEED, astray[0])
    elif standing and reserved_minor > (standing[0].kept_minor or 0):
        yield Violation(
            AuditKind.MERCHANT_REFUNDS_EXCEED,
            standing[0].payment_id,
            {"reserved_minor": reserved_minor, "kept_minor": standing[0].kept_minor},
        )


def _violation(kind: AuditKind, refund: RefundFact, **more: str) -> Violation:
    named: Details = {
        "refund_no": refund.refund_no,
        "attempt": refund.attempt,
        "channel_trade_no": refund.channel_trade_no,
        "amount_minor": refund.amount_minor,
    }
    return Violation(kind, refund.payment_id, {**named, **more})
