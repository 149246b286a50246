"""The ways to name a payment."""

from typing import NamedTuple

from paycore.domain.errors import FieldViolation, InvalidArgumentError, NotFoundError
from paycore.domain.ids import MAX_INT64, parse_channel_order_no
from paycore.store.protocol import Store


class ByPaymentId(NamedTuple):
    """By our own number."""

    payment_id: int


class ByMerchantOrder(NamedTuple):
    """By the caller's number."""

    merchant_id: str
    merchant_order_no: str


class ByChannelOrder(NamedTuple):
    """By the number that a channel was sent."""

    channel_order_no: str


PaymentKey = ByPaymentId | ByMerchantOrder | ByChannelOrder

PAYMENT_NOT_FOUND = "PAYMENT_NOT_FOUND"


def resolve(store: Store, key: PaymentKey) -> int:
    """Return the payment id that a key names; the payment itself may still be absent. Blocks on the database.

    Raises InvalidArgumentError for a key that can name nothing, NotFoundError for an unknown merchant order.
    """
    match key:
        case ByPaymentId(payment_id):
            if not 1 <= payment_id <= MAX_INT64:
                raise _invalid("payment_id", "must be positive")
            return payment_id
        case ByChannelOrder(channel_order_no):
            order = parse_channel_order_no(channel_order_no)
            if order is None:
                raise _invalid("channel_order_no", "must be a payment_id in decimal and two digits of the attempt")
            return order.payment_id
        case ByMerchantOrder(merchant_id, merchant_order_no):
            return _resolve_merchant_order(store, merchant_id, merchant_order_no)


def _resolve_merchant_order(store: Store, merchant_id: str, merchant_order_no: str) -> int:
    for field, text in (("merchant_id", merchant_id), ("merchant_order_no", merchant_order_no)):
        if not text or "\0" in text:
            raise _invalid(f"merchant_order.{field}", "must not be empty nor contain NUL")
    payment_id = store.find_payment_id(merchant_id, merchant_order_no)
    if payment_id is None:
        raise NotFoundError(PAYMENT_NOT_FOUND, "no payment was asked for under this merchant order")
    return payment_id


def _invalid(field: str, rule: str) -> InvalidArgumentError:
    return InvalidArgumentError([FieldViolation(field, rule)])
