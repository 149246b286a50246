"""What a bank writes down and how it decides. Pure: no disk, no HTTP, no clock; time is an argument.

Amounts are integers in the currency's minor unit, instants ``*_at_ms`` milliseconds since the Unix epoch, UTC.
"""

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import NamedTuple

from paycore.simbank.faults import FaultBox
from paycore.simbank.requests import OrderRequest, RefundRequest


class OrderState(StrEnum):
    """How an order stands. Expiry changes no state: an expired order is NOT_PAID until it is closed."""

    NOT_PAID = "NOT_PAID"
    IN_PROGRESS = "IN_PROGRESS"
    PAID = "PAID"
    CLOSED = "CLOSED"
    FAILED = "FAILED"


class RefundState(StrEnum):
    """How a refund stands.

    ACCEPTED: reserved, the money has not moved. CLOSED: ended without money, another number may be sent (as WeChat Pay
    does). RETURNED: no merchant asked for it, the bank sent the capture back by itself.
    """

    ACCEPTED = "ACCEPTED"
    REFUNDED = "REFUNDED"
    REFUSED = "REFUSED"
    CLOSED = "CLOSED"
    RETURNED = "RETURNED"


UNMOVED = frozenset({RefundState.REFUSED, RefundState.CLOSED})
"""Ends in which no money moved."""

MOVED = frozenset({RefundState.REFUNDED, RefundState.RETURNED})
"""Ends in which the user has the money."""


class Order(NamedTuple):
    """One order. settle_*: when and how an accepted charge ends; None where nothing is pending."""

    bank: str
    order_no: str
    amount_minor: int
    currency: str
    subject: str
    return_url: str
    method: str
    expire_at_ms: int
    created_at_ms: int
    state: OrderState
    code: str
    settle_at_ms: int | None
    settle_succeeds: int | None


class Capture(NamedTuple):
    """Money that the bank took, under a trade number of its own."""

    trade_no: str
    bank: str
    order_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int


class Refund(NamedTuple):
    """Money on its way back, or why it is not. settle_*: as for an order."""

    bank: str
    refund_no: str
    order_no: str
    trade_no: str
    amount_minor: int
    currency: str
    created_at_ms: int
    state: RefundState
    code: str
    settle_at_ms: int | None
    settle_succeeds: int | None


class Notice(NamedTuple):
    """What is to be told to the merchant, before it has a number. copies: how many acknowledgements it takes."""

    result: str
    trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int | None
    copies: int
    due_at_ms: int | None
    held: bool


ORDER_TERMS = ("amount_minor", "currency", "subject", "return_url", "method", "expire_at_ms")
REFUND_TERMS = ("order_no", "trade_no", "amount_minor", "currency")


def differing_terms(recorded: Order | Refund, asked: OrderRequest | RefundRequest, terms: Iterable[str]) -> list[str]:
    """Name the terms in which a repeated request differs from what is on record."""
    return [term for term in terms if getattr(recorded, term) != getattr(asked, term)]


def open_order(bank: str, asked: OrderRequest, now_ms: int, box: FaultBox) -> Order:
    """Decide about a new order. A synchronous charge that succeeds comes back NOT_PAID: the money is taken next."""
    order = Order(bank, *_order_terms(asked), now_ms, OrderState.NOT_PAID, "", None, None)
    if refusal := box.take("refuse.create"):
        return order._replace(state=OrderState.FAILED, code=_code(refusal))
    if asked.expire_at_ms <= now_ms:
        return order._replace(state=OrderState.FAILED, code="EXPIRED")
    if asked.method == "charge" and (later := box.take_later("charge_accepted_only")):
        return order._replace(
            state=OrderState.IN_PROGRESS, settle_at_ms=now_ms + later.delay_ms, settle_succeeds=int(later.succeeds)
        )
    return order


def _order_terms(asked: OrderRequest) -> tuple[str, int, str, str, str, str, int]:
    return (
        asked.order_no,
        asked.amount_minor,
        asked.currency,
        asked.subject,
        asked.return_url,
        asked.method,
        asked.expire_at_ms,
    )


def _code(refusal: object) -> str:
    return refusal if isinstance(refusal, str) else "REFUSED"


def why_not_payable(order: Order, now_ms: int, box: FaultBox) -> str:
    """Return why the user cannot pay this order now, or "" when the money is to be taken."""
    if order.state is OrderState.CLOSED:
        return "" if box.take("take_after_close") else "CLOSED"
    if order.state is OrderState.PAID:
        return "ALREADY_PAID"
    if order.state is not OrderState.NOT_PAID:
        return str(order.state)
    if now_ms >= order.expire_at_ms and not box.take("take_after_expiry"):
        return "EXPIRED"
    return ""


def close_answer(state: OrderState) -> str:
    """Return what a close is answered. CLOSED and FAILED orders take no money any more, so both are closed."""
    if state is OrderState.PAID:
        return "ALREADY_PAID"
    return "IN_PROGRESS" if state is OrderState.IN_PROGRESS else "CLOSED"


def open_refund(
    bank: str,
    asked: RefundRequest,
    captures: Sequence[Capture],
    refunds: Iterable[Refund],
    now_ms: int,
    box: FaultBox,
) -> Refund:
    """Decide about a new refund. captures and refunds: those of the order that it names."""
    refund = Refund(
        bank,
        asked.refund_no,
        asked.order_no,
        asked.trade_no,
        asked.amount_minor,
        asked.currency,
        now_ms,
        RefundState.REFUNDED,
        "",
        None,
        None,
    )
    if refusal := box.take("refuse.refund"):
        return refund._replace(state=RefundState.REFUSED, code=_code(refusal))
    if box.take("refund_closed"):
        return refund._replace(state=RefundState.CLOSED, code="CLOSED")
    if code := _why_not_refundable(asked, captures, refunds):
        return refund._replace(state=RefundState.REFUSED, code=code)
    if later := box.take_later("refund_accepted_only"):
        return refund._replace(
            state=RefundState.ACCEPTED, settle_at_ms=now_ms + later.delay_ms, settle_succeeds=int(later.succeeds)
        )
    return refund


def return_of(capture: Capture, now_ms: int) -> Refund:
    """Return the entry of a capture that the bank sends back by itself, all of it."""
    return Refund(
        capture.bank,
        f"RETURN-{capture.trade_no}",
        capture.order_no,
        capture.trade_no,
        capture.amount_minor,
        capture.currency,
        now_ms,
        RefundState.RETURNED,
        "",
        None,
        None,
    )


def _why_not_refundable(asked: RefundRequest, captures: Sequence[Capture], refunds: Iterable[Refund]) -> str:
    capture = next((one for one in captures if one.trade_no == asked.trade_no), None)
    if capture is None:
        return "TRADE_NOT_EXIST"
    if capture.currency != asked.currency:
        return "CURRENCY_DIFFERS"
    if reserved_minor(capture.trade_no, refunds) + asked.amount_minor > capture.amount_minor:
        return "OVER_CAPTURED"
    return ""


def reserved_minor(trade_no: str, refunds: Iterable[Refund]) -> int:
    """Return what has gone back of a capture, with what is about to."""
    return sum(one.amount_minor for one in refunds if one.trade_no == trade_no and one.state not in UNMOVED)


def refunded_minor(trade_no: str, refunds: Iterable[Refund]) -> int:
    """Return what has gone back of a capture."""
    return sum(one.amount_minor for one in refunds if one.trade_no == trade_no and one.state in MOVED)


def kept_minor(captures: Iterable[Capture], refunds: Sequence[Refund]) -> int:
    """Return what the bank holds of one order's money: captured less refunded."""
    return sum(one.amount_minor - refunded_minor(one.trade_no, refunds) for one in captures)


def success_notices(captures: Iterable[Capture], now_ms: int, box: FaultBox) -> list[Notice]:
    """Return what the merchant is told of money taken at one moment, in the order in which it is sent."""
    copies = box.take_int("notify_times") or 1
    due_at_ms = None if box.take("notify_never") else now_ms + (box.take_int("notify_delay_ms") or 0)
    held = bool(box.take("notify_held"))
    wrong_amount, wrong_times = box.take_int("notify_amount_minor"), box.take_int("notify_wrong_amount_times")
    notices = []
    for one in captures:
        told = Notice("SUCCESS", one.trade_no, one.amount_minor, one.currency, one.paid_at_ms, copies, due_at_ms, held)
        if wrong_amount is not None:
            notices.append(told._replace(amount_minor=wrong_amount, copies=wrong_times or copies))
        if wrong_amount is None or wrong_times is not None:
            notices.append(told)
    if notices and box.take("notify_failure_after_success"):
        notices.append(notices[-1]._replace(result="FAILURE", trade_no="", paid_at_ms=None, copies=1))
    return notices[::-1] if box.take("notify_out_of_order") else notices


def failure_notice(order: Order, now_ms: int, box: FaultBox) -> Notice:
    """Return what the merchant is told when an accepted charge comes to nothing."""
    due_at_ms = None if box.take("notify_never") else now_ms + (box.take_int("notify_delay_ms") or 0)
    copies, held = box.take_int("notify_times") or 1, bool(box.take("notify_held"))
    return Notice("FAILURE", "", order.amount_minor, order.currency, None, copies, due_at_ms, held)
