"""``paycore audit``: proves the money rules over a whole database, and against a channel's own books."""

import asyncio
import json
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from paycore.app.clock import SystemClock
from paycore.channels.simbank_books import SimbankBooks
from paycore.cli.exits import REFUSED, UNAVAILABLE, USAGE, fail, visible
from paycore.domain.audit import AuditKind, Pending, Violation
from paycore.domain.errors import PaycoreError
from paycore.jobs.auditor import EXAMPLES, Auditor, Report
from paycore.metrics import Metrics, write_audit_file
from paycore.settings import Settings, describe
from paycore.store.engine import DatabaseRefusedError
from paycore.store.schema import open_store

EPILOG = """
Examples:

  paycore audit --db sqlite:///paycore.db

  paycore audit --db sqlite:///paycore.db --books http://127.0.0.1:8081

  paycore audit --json --metrics-file /var/lib/node_exporter/paycore_audit.prom

It reads only, a little at a time, beside servers that run. Exit codes: 0 nothing is wrong, 1 something is, 2 wrong \
usage, 3 the database or the books could not be read. What to do about each kind: docs/operations.md, Audit.
"""

_WIDE = 200

_BOOKS_TIMEOUT_MS = 30_000
"""For one page of the books: a bank with much to tell takes its time."""


def audit(
    db: Annotated[str, typer.Option(envvar="PAYCORE_DB", help=describe("db"))] = str(
        Settings.model_fields["db"].default
    ),
    books: Annotated[
        str | None,
        typer.Option(
            envvar="PAYCORE_SIMBANK_URL",
            help="The bank simulator's base URL: its own books are compared too. Empty: they are not.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, and show no progress.")] = False,
    limit: Annotated[int, typer.Option(min=0, help="How many breaks are named; all are counted.")] = EXAMPLES,
    metrics_file: Annotated[
        Path | None,
        typer.Option(help="Write paycore_audit_violations here too, for a textfile collector; replaced as a whole."),
    ] = None,
) -> None:
    """Prove that every capture is kept once or goes back once, over the whole database."""
    if books and not books.startswith(("http://", "https://")):
        fail(f"--books {visible(books)}: must be an http or https URL", USAGE)
    report = _audited(db, books or None, limit, watched=not as_json)
    if metrics_file is not None:
        _write_metrics(metrics_file, report)
    if as_json:
        typer.echo(json.dumps(as_object(report), ensure_ascii=False))
    else:
        # As wide as it takes where nobody looks: a line for each break.
        show(Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE), report)
    if report.books_error:
        typer.echo(visible(report.books_error), err=True)
    if report.violations_total or report.books_error:
        raise typer.Exit(REFUSED if report.violations_total else UNAVAILABLE)


def _audited(db: str, books: str | None, limit: int, *, watched: bool) -> Report:
    try:
        store = open_store(db)
    except DatabaseRefusedError as error:
        fail(str(error), UNAVAILABLE)
    auditor = Auditor(
        store=store,
        clock=SystemClock(),
        metrics=Metrics(),
        open_books=None if books is None else lambda: SimbankBooks(books, _BOOKS_TIMEOUT_MS),
        examples=limit,
    )
    try:
        return asyncio.run(_watch(auditor, watched=watched))
    except PaycoreError as error:
        fail(f"{error.reason}: {error.message}", UNAVAILABLE)
    finally:
        store.dispose()


async def _watch(auditor: Auditor, *, watched: bool) -> Report:
    """Audit with a bar on standard error, where that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    disable = not (watched and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        bar = progress.add_task("payments and orders", total=None)
        return await auditor.audit(lambda looked_at, known: progress.update(bar, completed=looked_at, total=known))


def _write_metrics(path: Path, report: Report) -> None:
    try:
        write_audit_file(str(path), every_kind(report), report.tally.payments, report.ended_at_ms)
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror})", UNAVAILABLE)


def every_kind(report: Report) -> dict[str, int]:
    """How often each kind was found, 0 where it was not."""
    return {kind.value: report.violation_counts.get(kind, 0) for kind in AuditKind}


def as_object(report: Report) -> dict[str, Any]:
    """The report as one JSON object. 64-bit ids are strings, as elsewhere in JSON of ours."""
    return {
        "violations_total": report.violations_total,
        "violation_counts": {kind.value: count for kind, count in report.violation_counts.items()},
        "violations": [_as_object(one) for one in report.violations],
        "pending_counts": {kind.value: count for kind, count in report.pending_counts.items()},
        "pending": [_as_object(one) for one in report.pending],
        "tally": report.tally._asdict(),
        "quarantine_open": report.quarantine_open,
        "oldest_quarantine_at_ms": report.oldest_quarantine_at_ms,
        "book_orders": report.book_orders,
        "books_error": report.books_error,
        "started_at_ms": report.started_at_ms,
        "ended_at_ms": report.ended_at_ms,
    }


def _as_object(one: Violation | Pending) -> dict[str, Any]:
    return {"kind": one.kind.value, "payment_id": str(one.payment_id), "details": dict(one.details)}


def show(console: Console, report: Report) -> None:
    """Print a report for people: what was looked at, what is on its way, what is wrong."""
    tally, seconds = report.tally, (report.ended_at_ms - report.started_at_ms) // 1_000
    console.print(
        f"{tally.payments:,} payments, {tally.kept:,} captures kept, {tally.excess:,} excess,"
        f" {tally.refunds:,} refunds; {seconds} s"
    )
    if report.book_orders is not None:
        console.print(f"{report.book_orders:,} orders in the books of simbank")
    _show_table(console, "on its way, not wrong", ("what", "how many", "oldest"), _waiting(report))
    _show_table(console, "on its way at the channel", ("what", "payment", "details"), map(_row, report.pending))
    _show_table(console, "wrong", ("kind", "payment", "details"), map(_row, report.violations))
    named = len(report.violations)
    if report.violations_total > named:
        console.print(f"{report.violations_total - named:,} more are wrong; --limit names more of them")
    counts = ", ".join(f"{kind.value} {count:,}" for kind, count in report.violation_counts.items())
    console.print(f"WRONG: {report.violations_total:,} ({counts})" if counts else "nothing is wrong")


def _waiting(report: Report) -> Iterable[tuple[str, str, str]]:
    tally = report.tally
    rows = (
        ("excess whose payment has no outcome yet", tally.waiting, tally.oldest_waiting_at_ms),
        ("refunds that are not finished", tally.unfinished, tally.oldest_unfinished_at_ms),
        ("refunds that a person was told of", tally.attention, None),
        ("evidence in quarantine, open", report.quarantine_open, report.oldest_quarantine_at_ms),
        *((kind.value, count, None) for kind, count in report.pending_counts.items()),
    )
    return ((what, f"{count:,}", _instant(at_ms)) for what, count, at_ms in rows if count)


def _instant(at_ms: int | None) -> str:
    if at_ms is None:
        return ""
    return datetime.fromtimestamp(at_ms // 1_000, UTC).isoformat().replace("+00:00", "Z")


def _row(one: Violation | Pending) -> tuple[str, str, str]:
    return one.kind.value, str(one.payment_id) if one.payment_id else "", _told(one.details)


def _told(details: Mapping[str, str | int | None]) -> str:
    return ", ".join(f"{name}={value}" for name, value in details.items())


def _show_table(console: Console, title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    table = Table(title=title, title_justify="left")
    for column in columns:
        # Folded, never cut: a number that cannot be copied is of no use.
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    if table.row_count:
        console.print(table)
