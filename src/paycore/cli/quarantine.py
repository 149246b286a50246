"""``paycore quarantine``: evidence that could not be judged, looked at, judged again and decided about by a person.

It works on the database itself, beside servers that run. What came from outside is made visible before it is printed.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from paycore.app.quarantine import open_book
from paycore.app.serving import StartRefusedError
from paycore.cli.exits import REFUSED, UNAVAILABLE, USAGE, fail, visible
from paycore.cli.logs import configure_logs
from paycore.cli.output import amount
from paycore.domain.errors import InvalidArgumentError, PaycoreError
from paycore.domain.verdicts import ChannelResult, NotifyOutcome
from paycore.settings import Settings, SettingsRefusedError, describe, load_settings
from paycore.store.engine import DatabaseRefusedError
from paycore.store.evidence import Place
from paycore.store.rows import QuarantineRow
from paycore.store.schema import open_store
from paycore.usecases.confirm import resolutions_of
from paycore.usecases.judge_again import Looked
from paycore.usecases.quarantine_book import (
    BEGINNING,
    BY_A_PERSON,
    MAX_PAGE,
    MAX_REASON,
    MAX_WHO,
    QuarantineBook,
    QuarantineReader,
    Wanted,
)

EPILOG = """
Examples:

  paycore quarantine list --db sqlite:///paycore.db

  paycore quarantine show 1f8a03bc

  paycore quarantine retry --all

  paycore quarantine resolve 1f8a03bc --verdict dismissed --reason "two serials of one payment, bank's mail of May 3" \
--who mary

Settings come from the environment, as those of paycore serve do; retry needs the channels. What each reason means and \
what to do: docs/operations.md, Quarantine.
"""

_SHOWN_ID = 12
_SHOWN_TEXT = 2_000
_RETRIED_AS = "retry"
_PAGE = 200

_T = TypeVar("_T")

app = typer.Typer(
    help="Look at evidence that could not be judged, judge it again, and decide about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

DbOption = Annotated[str | None, typer.Option(envvar="PAYCORE_DB", help=describe("db"))]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="An entry's id, or its first 8 digits or more.")]


@app.command("list")
def list_(
    db: DbOption = None,
    every: Annotated[bool, typer.Option("--all/--open", help="Resolved entries too, or those that are open.")] = False,
    reason: Annotated[str, typer.Option(help="Only entries of this reason: UNKNOWN, MISMATCH, ...")] = "",
    limit: Annotated[int, typer.Option(help=f"How many at most, up to {MAX_PAGE}.")] = 100,
    after: Annotated[str, typer.Option(help="Begin behind the entry of this id.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List entries, the oldest first. Changes nothing."""
    wanted = Wanted(only_open=not every, reason=reason, limit=limit)
    with _reading(_settings(db)) as reader:
        place = _place(reader.find(after)) if after else BEGINNING
        rows = reader.page(wanted, place)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(_as_object(row), ensure_ascii=True))
        return
    _print_rows(rows)
    if len(rows) == limit:
        typer.echo(f"there may be more: --after {rows[-1].quarantine_id[:_SHOWN_ID]}")


@app.command()
def show(quarantine_id: IdArgument, db: DbOption = None, as_json: JsonOption = False) -> None:
    """Print an entry with its raw message and everything that was decided about it. Changes nothing."""
    with _reading(_settings(db)) as reader:
        row = reader.find(quarantine_id)
    if as_json:
        typer.echo(json.dumps(_as_object(row, whole=True), ensure_ascii=True))
    else:
        _print_row(row)


@app.command()
def retry(
    quarantine_id: Annotated[str, typer.Argument(metavar="[ID]", help="An entry's id; or --all.")] = "",
    every: Annotated[bool, typer.Option("--all", help="Every open entry.")] = False,
    db: DbOption = None,
) -> None:
    """Judge one open entry, or all, again now: with the orders that are known by now, and by asking the channels."""
    if bool(quarantine_id) == every:
        fail("retry: give an ID, or --all", USAGE)
    settings = _settings(db)
    if every:
        _run(settings, _retry_all)
        return

    async def one(book: QuarantineBook) -> Looked:
        row = await asyncio.to_thread(book.reader.find, quarantine_id)
        (looked,) = await book.retry([row])
        return looked

    looked = _run(settings, one)
    typer.echo(
        f"{looked.quarantine_id[:_SHOWN_ID]}: {'resolved' if looked.resolved else 'stays'}: {visible(looked.why)}"
    )


@app.command()
def resolve(
    quarantine_id: IdArgument,
    verdict: Annotated[str, typer.Option(help=f"{' or '.join(BY_A_PERSON)}.")],
    reason: Annotated[str, typer.Option(help=f"Why, in up to {MAX_REASON} characters.")],
    who: Annotated[str, typer.Option(help=f"Who decides, in up to {MAX_WHO} characters.")],
    db: DbOption = None,
) -> None:
    """Decide about an entry: confirmed money goes back to the user; dismissed means no money."""

    async def decide(book: QuarantineBook) -> QuarantineRow:
        return await book.resolve(quarantine_id, verdict=verdict, reason=reason, who=who)

    _print_row(_run(_settings(db), decide))


async def _retry_all(book: QuarantineBook) -> None:
    counts: Counter[bool] = Counter()
    place, stays = BEGINNING, Counter[str]()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("entries", total=None)
        while rows := await asyncio.to_thread(book.reader.page, Wanted(limit=_PAGE), place):
            looked = await book.retry(rows)
            counts.update(one.resolved for one in looked)
            stays.update(one.why for one in looked if not one.resolved)
            place = _place(rows[-1])
            progress.update(bar, completed=counts.total())
    typer.echo(f"{counts[True]} resolved, {counts[False]} stay")
    for why, count in stays.most_common(10):
        typer.echo(f"  {count} stay: {visible(why)}")


def _settings(db: str | None) -> Settings:
    try:
        settings = load_settings({"db": db})
    except SettingsRefusedError as error:
        fail(str(error), USAGE)
    configure_logs(settings.log_format, settings.log_level)
    return settings


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn what goes wrong into lines and an exit code."""
    try:
        yield
    except (StartRefusedError, DatabaseRefusedError) as error:
        fail(str(error), UNAVAILABLE)
    except InvalidArgumentError as error:
        for field, rule in error.violations:
            typer.echo(visible(f"{field}: {rule}"), err=True)
        raise typer.Exit(USAGE) from None
    except PaycoreError as error:
        fail(f"{error.reason}: {error.message}", UNAVAILABLE if error.retryable else REFUSED)


@contextmanager
def _reading(settings: Settings) -> Iterator[QuarantineReader]:
    """Open the database for reading."""
    with _refusing():
        store = open_store(settings.db)
        try:
            yield QuarantineReader(store)
        finally:
            store.dispose()


def _run(settings: Settings, work: Callable[[QuarantineBook], Awaitable[_T]]) -> _T:
    async def run() -> _T:
        async with open_book(settings, _RETRIED_AS) as book:
            return await work(book)

    with _refusing():
        return asyncio.run(run())


def _place(row: QuarantineRow) -> Place:
    return Place(row.first_seen_at_ms, row.quarantine_id)


def _instant(at_ms: int) -> str:
    # Evidence may carry any number for an instant.
    if not 0 <= at_ms < 253_402_300_800_000:
        return f"{at_ms} ms"
    return datetime.fromtimestamp(at_ms // 1_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _print_rows(rows: Sequence[QuarantineRow]) -> None:
    table = Table()
    for column in ("id", "first seen", "why", "state", "account", "order", "trade", "amount", "arrivals"):
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (
            row.quarantine_id[:_SHOWN_ID],
            _instant(row.first_seen_at_ms),
            NotifyOutcome(row.reason).name,
            _state(row),
            f"{row.channel}/{row.account}",
            row.channel_order_no,
            row.channel_trade_no,
            amount(row.amount_minor, row.currency),
            str(row.arrivals),
        )
        table.add_row(*(Text(visible(cell)) for cell in cells))
    # As wide as it takes where nobody looks: a line for each entry.
    Console(highlight=False, width=None if sys.stdout.isatty() else 250).print(table)


def _state(row: QuarantineRow) -> str:
    decided = resolutions_of(row)
    return "open" if row.is_open else decided[-1].verdict.value


def _print_row(row: QuarantineRow) -> None:
    fields = [
        ("id", row.quarantine_id),
        ("why", NotifyOutcome(row.reason).name),
        ("state", _state(row)),
        ("says", ChannelResult(row.result).name),
        ("channel/account", f"{row.channel}/{row.account}"),
        ("order", row.channel_order_no),
        ("payment, attempt", f"{row.payment_id}, {row.attempt}" if row.payment_id else ""),
        ("trade", row.channel_trade_no),
        ("amount", amount(row.amount_minor, row.currency)),
        ("paid at", "" if row.paid_at_ms is None else _instant(row.paid_at_ms)),
        ("first seen", _instant(row.first_seen_at_ms)),
        ("last seen", f"{_instant(row.last_seen_at_ms)}, {row.arrivals} arrivals"),
        ("headers", _shown(row.headers)),
        (f"raw, {len(row.raw)} bytes", _shown(row.raw.decode(errors="replace"))),
    ]
    fields += [(_instant(one.at_ms), f"{one.verdict.value} by {one.who}: {one.reason}") for one in resolutions_of(row)]
    grid = Table.grid(padding=(0, 2))
    for name, value in fields:
        if value:
            grid.add_row(Text(name, style="dim"), Text(visible(value)))
    Console(highlight=False, soft_wrap=True).print(grid)


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_TEXT else f"{text[:_SHOWN_TEXT]} ... (--json has all of it)"


def _as_object(row: QuarantineRow, *, whole: bool = False) -> dict[str, Any]:
    """An entry as JSON. 64-bit ids are strings, as elsewhere in JSON of ours; raw bytes as hexadecimal digits."""
    names = row._asdict()
    for left_out in ("raw", "headers", "recorded_at_ms", "writer_no", "group_no"):
        del names[left_out]
    names |= {
        "reason": NotifyOutcome(row.reason).name,
        "result": ChannelResult(row.result).name,
        "payment_id": None if row.payment_id is None else str(row.payment_id),
        "is_open": bool(row.is_open),
        "resolutions": json.loads(row.resolutions),
    }
    return names | {"headers": row.headers, "raw_hex": row.raw.hex()} if whole else names
