"""What Pay is asked, and the rules it must keep before anything is written."""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.channels.registry import ChannelRegistry
from paycore.domain.errors import FieldViolation, InvalidArgumentError
from paycore.domain.ids import MAX_INT64, digest_fields
from paycore.domain.money import MINOR_DIGITS
from paycore.domain.texts import broken_rule, broken_url_rule
from paycore.domain.verdicts import PayMethod
from paycore.store.rows import PaymentRow

MAX_ORDER_NO_LENGTH = 64
MAX_SUBJECT_LENGTH = 128
MAX_RETURN_URL_LENGTH = 1_024


class PayLimits(NamedTuple):
    """How long a payment may be payable, and how much of that must be left to open another attempt."""

    min_validity_ms: int
    max_validity_ms: int
    default_validity_ms: int
    min_remaining_ms: int


class PayCommand(NamedTuple):
    """One call of Pay. validity_ms: None for the default. method: a PayMethod number, or one that is refused."""

    merchant_id: str
    merchant_order_no: str
    amount_minor: int
    currency: str
    subject: str
    return_url: str
    validity_ms: int | None
    channel: str
    account: str
    method: int

    def terms_digest(self) -> str:
        """A digest of what a repeated call must agree with."""
        return digest_fields(str(self.amount_minor), self.currency, self.subject, self.return_url)

    def terms_that_differ(self, payment: PaymentRow) -> list[str]:
        """Name the terms of this call that are not the payment's."""
        return [
            field
            for field in ("amount_minor", "currency", "subject", "return_url")
            if getattr(self, field) != getattr(payment, field)
        ]


def check_command(command: PayCommand, limits: PayLimits, registry: ChannelRegistry) -> None:
    """Raise InvalidArgumentError that names every field which breaks a rule."""
    found = [
        FieldViolation(field, rule)
        for field, rule in (*_text_rules(command), *_money_rules(command), *_way_rules(command, limits, registry))
        if rule is not None
    ]
    if found:
        raise InvalidArgumentError(found)


_Rules = Iterator[tuple[str, str | None]]


def _text_rules(command: PayCommand) -> _Rules:
    for field in ("merchant_id", "merchant_order_no"):
        yield field, broken_rule(getattr(command, field), min_length=1, max_length=MAX_ORDER_NO_LENGTH)
    yield "subject", broken_rule(command.subject, min_length=1, max_length=MAX_SUBJECT_LENGTH)
    if command.return_url:
        yield "return_url", broken_url_rule(command.return_url, max_length=MAX_RETURN_URL_LENGTH)


def _money_rules(command: PayCommand) -> _Rules:
    if not 1 <= command.amount_minor <= MAX_INT64:
        yield "amount_minor", f"must be 1 to {MAX_INT64}"
    if command.currency not in MINOR_DIGITS:
        yield "currency", "must be an ISO 4217 code in upper case"


def _way_rules(command: PayCommand, limits: PayLimits, registry: ChannelRegistry) -> _Rules:
    if not registry.has_channel(command.channel):
        yield "channel", "is not configured on this server"
    elif not registry.code(command.channel, command.account):
        yield "account", "is not configured for this channel"
    if command.method not in set(PayMethod):
        yield "method", "must be REDIRECT, QR or CHARGE"
    validity_ms = command.validity_ms
    if validity_ms is not None and not limits.min_validity_ms <= validity_ms <= limits.max_validity_ms:
        yield "validity", f"must be {limits.min_validity_ms} to {limits.max_validity_ms} ms"
