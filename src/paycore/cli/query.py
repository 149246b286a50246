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
from paycore.v1 import payment_service_pb2

EPILOG = """
Examples:

  paycore query --merchant-id shop --order-no 1001

  paycore query --payment-id 123456789 --json

  paycore query --merchant-id shop --order-no 1001 --refresh
"""

PaymentIdOption = Annotated[int | None, typer.Option(help="paycore's own number for the payment.")]
MerchantIdOption = Annotated[str | None, typer.Option(help="Who asked for it; goes with --order-no.")]
OrderNoOption = Annotated[str | None, typer.Option(help="The merchant's own number; goes with --merchant-id.")]


def query(
    payment_id: PaymentIdOption = None,
    merchant_id: MerchantIdOption = None,
    order_no: OrderNoOption = None,
    channel_order_no: Annotated[str | None, typer.Option(help="The number that the channel was sent.")] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Ask the channels first about what has no final word.")
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
    timeout_ms: TimeoutOption = DEFAULT_TIMEOUT_MS,
    as_json: JsonOption = False,
) -> None:
    """Print everything on record about one payment, named by one of its numbers."""
    with calling(server, timeout_ms) as client:
        ask = client.refresh if refresh else client.query
        answer = ask(
            payment_id=payment_id,
            merchant_id=merchant_id,
            merchant_order_no=order_no,
            channel_order_no=channel_order_no,
        )
    if isinstance(answer, payment_service_pb2.QueryResponse):
        for attempt in answer.unanswered_attempts:
            typer.echo(f"attempt {attempt}: its channel gave no answer; this is what is on record", err=True)
        answer = answer.payment
    print_json(answer) if as_json else print_payment(answer)
