"""What the commands print: payments for people, JSON for programs, and every failure as one line with an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import grpc
import typer
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

from paycore.cli.exits import REFUSED, UNAVAILABLE, USAGE, fail, visible
from paycore.client import NO_RETRY, PaycoreClient, PaycoreRpcError
from paycore.domain.money import MINOR_DIGITS, format_amount
from paycore.v1 import payment_pb2

_UNAVAILABLE_CODES = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}

ServerOption = Annotated[
    str, typer.Option("--server", envvar="PAYCORE_SERVER", help="The server's address: host:port or unix:PATH.")
]
DEFAULT_SERVER = "127.0.0.1:50051"
TimeoutOption = Annotated[
    int, typer.Option(envvar="PAYCORE_TIMEOUT_MS", min=1, help="How long to wait for the answer, in milliseconds.")
]
DEFAULT_TIMEOUT_MS = 35_000
JsonOption = Annotated[bool, typer.Option("--json", help="Print the answer as protobuf JSON.")]


@contextmanager
def calling(server: str, timeout_ms: int) -> Iterator[PaycoreClient]:
    """Hand out a client; turn what goes wrong with a call into a line and an exit code."""
    try:
        # Whoever typed the command is told at once that nobody answers.
        with PaycoreClient(server, timeout_ms=timeout_ms, retry=NO_RETRY) as client:
            yield client
    except PaycoreRpcError as error:
        _fail_with(error, server)
    except ValueError as error:
        # A number that its field cannot hold, or a payment that is named twice or not at all.
        fail(f"USAGE: {error}", USAGE)


def _fail_with(error: PaycoreRpcError, server: str) -> NoReturn:
    lines = [f"{error.reason}: {error.message}"]
    if error.violations:
        lines = [f"{error.reason}: the request breaks {len(error.violations)} rule(s)"]
        lines += [f"  {field}: {rule}" for field, rule in error.violations]
    if error.reason == grpc.StatusCode.UNAVAILABLE.name:
        lines.append(f"  no server answers at {server}; start one: paycore serve")
    for line in lines:
        typer.echo(visible(line), err=True)
    raise typer.Exit(UNAVAILABLE if error.code in _UNAVAILABLE_CODES else REFUSED)


def print_json(message: Message) -> None:
    """Print a message as protobuf JSON, with the field names of the API; 64-bit integers are strings there."""
    typer.echo(MessageToJson(message, preserving_proto_field_name=True, ensure_ascii=False))


def print_fields(fields: list[tuple[str, str]]) -> None:
    """Print names and values, one a line; empty values are left out."""
    grid = Table.grid(padding=(0, 2))
    for name, value in fields:
        if value:
            grid.add_row(Text(name, style="dim"), Text(visible(value)))
    _console().print(grid)


def print_payment(payment: payment_pb2.Payment) -> None:
    """Print everything on record about a payment."""
    print_fields(
        [
            ("payment_id", str(payment.payment_id)),
            ("merchant order", f"{payment.merchant_id} / {payment.merchant_order_no}"),
            ("asked", f"{amount(payment.amount_minor, payment.currency)} for {payment.subject}"),
            ("state", _outcome(payment)),
            ("expires", instant(payment.expire_at)),
        ]
    )
    _print_table("attempts", ("attempt", "account", "method", "state", "pay at"), map(_attempt, payment.attempts))
    _print_table("excess", ("attempt", "trade", "amount", "why"), map(_excess, payment.excess))
    _print_table("refunds", ("trade", "amount", "why", "state", "tries", "last word"), map(_refund, payment.refunds))
    shown = len(payment.quarantine)
    title = "quarantine" if shown == payment.quarantine_total else f"quarantine: {shown} of {payment.quarantine_total}"
    _print_table(title, ("order", "trade", "amount", "why", "arrivals"), map(_evidence, payment.quarantine))


def _outcome(payment: payment_pb2.Payment) -> str:
    outcome, state = payment.outcome, payment_pb2.PaymentState.Name(payment.state)
    state = state.removeprefix("PAYMENT_STATE_")
    if payment.state == payment_pb2.PAYMENT_STATE_PAID:
        return f"{state} by attempt {outcome.attempt}, trade {outcome.channel_trade_no}"
    if payment.state == payment_pb2.PAYMENT_STATE_CLOSED:
        return f"{state} ({payment_pb2.CloseReason.Name(outcome.close_reason).removeprefix('CLOSE_REASON_')})"
    return state


_Row = tuple[str, ...]


def _attempt(one: payment_pb2.Attempt) -> _Row:
    method = payment_pb2.PayMethod.Name(one.method).removeprefix("PAY_METHOD_")
    state = payment_pb2.AttemptState.Name(one.state).removeprefix("ATTEMPT_STATE_")
    return str(one.attempt), f"{one.channel}/{one.account}", method, state, one.pay_url or one.qr_text


def _excess(one: payment_pb2.ExcessPayment) -> _Row:
    return str(one.attempt), one.channel_trade_no, amount(one.amount_minor, one.currency), outcome_name(one.reason)


def _refund(one: payment_pb2.Refund) -> _Row:
    state = payment_pb2.RefundState.Name(one.state).removeprefix("REFUND_STATE_")
    money = amount(one.amount_minor, one.currency)
    return one.channel_trade_no, money, outcome_name(one.reason), state, str(one.tries), one.last_error


def _evidence(one: payment_pb2.QuarantineEntry) -> _Row:
    money = amount(one.amount_minor, one.currency)
    return one.channel_order_no, one.channel_trade_no, money, outcome_name(one.reason), str(one.arrivals)


def _print_table(title: str, columns: _Row, rows: Iterator[_Row]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        # Folded, never cut: a number or a URL that cannot be copied is of no use.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    if table.row_count:
        _console().print(table)


def _console() -> Console:
    return Console(highlight=False, soft_wrap=True)


def outcome_name(outcome: payment_pb2.NotifyOutcome.ValueType) -> str:
    """Return an outcome's name without its prefix."""
    return payment_pb2.NotifyOutcome.Name(outcome).removeprefix("NOTIFY_OUTCOME_")


def amount(amount_minor: int, currency: str) -> str:
    """Write an amount for people; one in a currency that nobody knows as it came."""
    return format_amount(amount_minor, currency) if currency in MINOR_DIGITS else f"{amount_minor} {currency!r}"


def instant(timestamp: Timestamp) -> str:
    """Write an instant for people: RFC 3339, UTC."""
    return timestamp.ToJsonString()
