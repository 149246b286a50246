"""``paycore pay``: asks for a payment."""

from enum import StrEnum
from typing import Annotated

import typer

from paycore.cli.output import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_MS,
    JsonOption,
    ServerOption,
    TimeoutOption,
    calling,
    instant,
    print_fields,
    print_json,
)
from paycore.v1 import payment_pb2, payment_service_pb2

EPILOG = """
Example:

  paycore pay --merchant-id shop --order-no 1001 --amount-minor 1999 --currency CNY --subject "A book" \
--channel simbank --account bank_a

The same command again opens nothing new. Another --account opens a second attempt at the same payment. \
Next: pay on the page that it names, then paycore query --merchant-id shop --order-no 1001
"""


class Method(StrEnum):
    """How the user pays."""

    REDIRECT = "redirect"
    QR = "qr"
    CHARGE = "charge"


def pay(
    merchant_id: Annotated[str, typer.Option(help="Who asks: the merchant or calling service.")],
    order_no: Annotated[str, typer.Option(help="The merchant's own number for what is being paid.")],
    amount_minor: Annotated[int, typer.Option(help="What is to be paid, in the minor unit: 1999 is 19.99 CNY.")],
    currency: Annotated[str, typer.Option(help="ISO 4217 code, for example CNY.")],
    subject: Annotated[str, typer.Option(help="What the user reads on the channel's page.")],
    channel: Annotated[str, typer.Option(help="The channel to pay through, as configured at the server.")],
    account: Annotated[str, typer.Option(help="The account at that channel, as configured at the server.")],
    method: Annotated[Method, typer.Option(help="How the user pays.")] = Method.REDIRECT,
    return_url: Annotated[str, typer.Option(help="Where the channel's page sends the user afterwards.")] = "",
    validity_seconds: Annotated[
        int | None, typer.Option(help="How long it may be paid; the server's default if not given.")
    ] = None,
    server: ServerOption = DEFAULT_SERVER,
    timeout_ms: TimeoutOption = DEFAULT_TIMEOUT_MS,
    as_json: JsonOption = False,
) -> None:
    """Ask for a payment and open an attempt at a channel. The same call again returns the same payment."""
    with calling(server, timeout_ms) as client:
        response = client.pay(
            merchant_id=merchant_id,
            merchant_order_no=order_no,
            amount_minor=amount_minor,
            currency=currency,
            subject=subject,
            channel=channel,
            account=account,
            method=payment_pb2.PayMethod.Value(f"PAY_METHOD_{method.name}"),
            return_url=return_url,
            validity_ms=None if validity_seconds is None else validity_seconds * 1_000,
        )
    print_json(response) if as_json else _print(response)


def _print(response: payment_service_pb2.PayResponse) -> None:
    action = payment_service_pb2.PayNextAction.Name(response.next_action).removeprefix("PAY_NEXT_ACTION_")
    print_fields(
        [
            ("payment_id", str(response.payment_id)),
            ("state", payment_pb2.PaymentState.Name(response.state).removeprefix("PAYMENT_STATE_")),
            ("next", action),
            ("pay at", response.attempt.pay_url),
            ("show as QR", response.attempt.qr_text),
            ("channel order", response.attempt.channel_order_no),
            ("expires", instant(response.expire_at)),
        ]
    )
