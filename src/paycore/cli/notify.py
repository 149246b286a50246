"""``paycore notify``: hands over what a channel said, as a gateway would."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from paycore.cli.output import (
    DEFAULT_SERVER,
    DEFAULT_TIMEOUT_MS,
    JsonOption,
    ServerOption,
    TimeoutOption,
    calling,
    outcome_name,
    print_fields,
    print_json,
)
from paycore.v1 import payment_pb2, payment_service_pb2

EPILOG = """
Example:

  paycore notify --channel simbank --account bank_a --channel-order-no 12345678901 \
--amount-minor 1999 --currency CNY --channel-trade-no T-1

Exit code 0 means that what the word means is durable: only then may a gateway acknowledge it \
to the channel. Next: paycore query --channel-order-no 12345678901
"""


class Result(StrEnum):
    """What the channel says happened."""

    SUCCESS = "success"
    FAILURE = "failure"


def notify(
    channel: Annotated[str, typer.Option(help="The channel that spoke.")],
    account: Annotated[str, typer.Option(help="The account that it spoke about.")],
    channel_order_no: Annotated[str, typer.Option(help="The number that the channel was sent.")],
    result: Annotated[Result, typer.Option(help="What the channel says happened.")] = Result.SUCCESS,
    amount_minor: Annotated[int, typer.Option(help="What it says it took, in the minor unit.")] = 0,
    currency: Annotated[str, typer.Option(help="ISO 4217 code.")] = "",
    channel_trade_no: Annotated[str, typer.Option(help="The number that the channel issued for the money.")] = "",
    paid_at_ms: Annotated[
        int | None, typer.Option(help="When the user paid, in ms since 1970 UTC; leave out if not said.")
    ] = None,
    raw_file: Annotated[Path | None, typer.Option(help="The message as it arrived, kept as evidence.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="A header it arrived with, NAME=VALUE; repeatable.")] = None,
    server: ServerOption = DEFAULT_SERVER,
    timeout_ms: TimeoutOption = DEFAULT_TIMEOUT_MS,
    as_json: JsonOption = False,
) -> None:
    """Hand over what a channel said about one of its orders, and print what it turned out to be."""
    with calling(server, timeout_ms) as client:
        response = client.notify(
            channel=channel,
            account=account,
            channel_order_no=channel_order_no,
            result=payment_pb2.ChannelResult.Value(f"CHANNEL_RESULT_{result.name}"),
            amount_minor=amount_minor,
            currency=currency,
            channel_trade_no=channel_trade_no,
            paid_at_ms=paid_at_ms,
            raw=_read(raw_file),
            headers=_headers(header or []),
        )
    print_json(response) if as_json else _print(response)


def _read(path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint="--raw-file") from None


def _headers(pairs: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{pair!r}: must be NAME=VALUE", param_hint="--header")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


def _print(response: payment_service_pb2.NotifyResponse) -> None:
    print_fields(
        [
            ("outcome", outcome_name(response.outcome) + (" (replayed)" if response.replayed else "")),
            ("paid_at", "not believed" if response.paid_at_untrusted else ""),
            ("payment_id", str(response.payment_id or "")),
            ("attempt", str(response.attempt or "")),
        ]
    )
