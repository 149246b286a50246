"""``paycore close``: closes a payment that has not been paid."""

from paycore.cli.output import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_MS,
    JsonOption,
    ServerOption,
    TimeoutOption,
    calling,
    print_json,
    print_payment,
)
from paycore.cli.query import MerchantIdOption, OrderNoOption, PaymentIdOption

EPILOG = """
Example:

  paycore close --merchant-id shop --order-no 1001

Refused while an attempt's state is unknown (ATTEMPT_STATE_UNKNOWN: try again later) and once it is paid \
(PAYMENT_PAID). Money that arrives afterwards goes back by itself.
"""


def close(
    payment_id: PaymentIdOption = None,
    merchant_id: MerchantIdOption = None,
    order_no: OrderNoOption = None,
    server: ServerOption = DEFAULT_SERVER,
    timeout_ms: TimeoutOption = DEFAULT_TIMEOUT_MS,
    as_json: JsonOption = False,
) -> None:
    """Close a payment that has not been paid, after its attempts have been ended at their channels."""
    with calling(server, timeout_ms) as client:
        payment = client.close(payment_id=payment_id, merchant_id=merchant_id, merchant_order_no=order_no)
    print_json(payment) if as_json else print_payment(payment)
