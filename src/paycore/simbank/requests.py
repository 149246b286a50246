"""What may be asked of the bank: shapes and limits of every JSON body. Nothing else gets past the door."""

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MAX_INT64 = 2**63 - 1

ORDER_NO_PATTERN = r"^[0-9A-Za-z_\-]{1,64}$"
BANK_PATTERN = r"^[a-z][a-z0-9_]{0,31}$"


def _absolute_web_url_or_empty(url: str) -> str:
    parts = urlsplit(url)
    if url and not (parts.scheme in {"http", "https"} and parts.hostname):
        raise ValueError("must be an absolute http or https URL, or empty")
    if any(ord(character) <= 0x20 or character == "\x7f" for character in url):
        raise ValueError("must not hold spaces or control characters")
    return url


OrderNo = Annotated[str, Field(pattern=ORDER_NO_PATTERN)]
BankName = Annotated[str, Field(pattern=BANK_PATTERN)]
TradeNo = Annotated[str, Field(min_length=1, max_length=64)]
Currency = Annotated[str, Field(pattern=r"^[A-Z]{3}$")]
AmountMinor = Annotated[int, Field(ge=1, le=MAX_INT64)]
InstantMs = Annotated[int, Field(ge=0, le=MAX_INT64)]
WebUrl = Annotated[str, Field(max_length=2048), AfterValidator(_absolute_web_url_or_empty)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class OrderRequest(_Body):
    """POST /banks/{bank}/orders. Everything but order_no is compared when the number comes again."""

    order_no: OrderNo
    amount_minor: AmountMinor
    currency: Currency
    subject: Annotated[str, Field(min_length=1, max_length=256)]
    return_url: WebUrl
    method: Literal["redirect", "qr", "charge"]
    expire_at_ms: InstantMs


class RefundRequest(_Body):
    """POST /banks/{bank}/refunds. Everything but refund_no is compared when the number comes again."""

    refund_no: OrderNo
    order_no: OrderNo
    trade_no: TradeNo
    amount_minor: AmountMinor
    currency: Currency


class FaultMatch(_Body):
    """What a fault is for: one order number, all orders of one subject, or everything that the bank is asked."""

    order_no: OrderNo | None = None
    subject: str | None = None
    everything: Literal[True] | None = None


class FaultsRequest(_Body):
    """PUT /faults. ``faults`` is read by ``faults.parse``; an empty object takes back what stood there."""

    bank: BankName
    match: FaultMatch
    faults: dict[str, object]


class UserPayment(_Body):
    """The JSON body of a driver's POST to a pay page. ``faults`` hold for this payment only."""

    faults: dict[str, object] = {}


class ReturnRequest(_Body):
    """POST /returns: the bank sends a capture back by itself."""

    bank: BankName
    order_no: OrderNo
    trade_no: TradeNo


class HoldRequest(_Body):
    """POST /notifications/hold."""

    bank: BankName


class ReleaseRequest(_Body):
    """POST /notifications/release. With neither filter the hold of the bank ends too."""

    bank: BankName
    order_no: OrderNo | None = None
    notification_ids: Annotated[list[str], Field(max_length=1000)] | None = None


class ResendRequest(_Body):
    """POST /notifications/resend. Without trade_no: every notification of the order."""

    bank: BankName
    order_no: OrderNo
    trade_no: TradeNo | None = None
    times: Annotated[int, Field(ge=1, le=100)] = 1


def broken_rules(error: ValidationError) -> str:
    """Say which fields break which rules, without repeating what was sent."""
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc']) or 'body'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False)
    )
