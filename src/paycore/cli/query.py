"""``paycore query``: everything on record about one payment."""

from typing import Annotated

import typer

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

EPILOG = """
Examples:

  paycore query --merchant-id shop --order-no 1001

  paycore query --payment-id 123456789 --json
"""

PaymentIdOption = Annotated[int | None, typer.Option(help="paycore's own number for the payment.")]
MerchantIdOption = Annotated[str | None, typer.Option(help="Who asked for it; goes with --order-no.")]
OrderNoOption = Annotated[str | None, typer.Option(help="The merchant's own number; goes with --merchant-id.")]


def query(
    payment_id: PaymentIdOption = None,
    merchant_id: MerchantIdOption = None,
    order_no: OrderNoOption = None,
    channel_order_no: Annotated[str | None, typer.Option(help="The number that the channel was sent.")] = None,
    server: ServerOption = DEFAULT_SERVER,
    timeout_ms: TimeoutOption = DEFAULT_TIMEOUT_MS,
    as_json: JsonOption = False,
) -> None:
    """Print everything on record about one payment, named by one of its numbers. Changes nothing."""
    with calling(server, timeout_ms) as client:
        payment = client.query(
            payment_id=payment_id,
            merchant_id=merchant_id,
            merchant_order_no=order_no,
            channel_order_no=channel_order_no,
        )
    print_json(payment) if as_json else print_payment(payment)
