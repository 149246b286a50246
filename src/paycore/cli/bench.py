"""``paycore bench``: measures what paycore does on this machine, beside a baseline and the limit of the same run."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from paycore.bench import index, machine, notify, startup, wire
from paycore.bench.result import BenchError, Progress, Result
from paycore.cli.exits import REFUSED, USAGE, fail

EPILOG = """
Examples:

  paycore bench notify                                     a new SQLite file, 1,000 words a message

  paycore bench notify --store postgresql --mix dirty      a PostgreSQL server started for it

  paycore bench notify --batch 100 --count 1000000 --json  one JSON object

  paycore bench wire                                       decoding, deciding and encoding alone

  paycore bench index                                      the index alone, beside bare C

  paycore bench startup --store postgresql                 a server's warm start

Each prints the machine, the versions, a baseline and the limit, all of the same run: their ratios travel between \
machines, the figures themselves do not. Where the counts are not what was sent there is no figure, and exit code 1.
"""

_NARROWEST = 120

app = typer.Typer(
    help="Measure what paycore does on this machine, beside a baseline and the limit of the same run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class StoreName(StrEnum):
    """Which database is measured on."""

    SQLITE = "sqlite"
    POSTGRESQL = "postgresql"


class Mix(StrEnum):
    """What the stream of words is."""

    CLEAN = "clean"
    DIRTY = "dirty"


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
StoreOption = Annotated[
    StoreName, typer.Option("--store", help="Make a database of this kind, and remove it afterwards.")
]
DbOption = Annotated[
    str | None,
    typer.Option(
        "--db",
        help="Use this one in place of it: a URL as of `paycore serve`, of a SQLite file that is not there yet or a"
        " PostgreSQL database without payments. What is measured stays in it.",
        show_default=False,
    ),
]
EvidenceOption = Annotated[
    bool, typer.Option("--evidence", help="Words with the bank's body and headers, 503 bytes each.")
]
FolderOption = Annotated[
    Path | None,
    typer.Option(help="Where files are made: a local disk; in memory nothing is durable.", show_default="TMPDIR"),
]


@app.command("notify", epilog=EPILOG)
def bench_notify(
    store: StoreOption = StoreName.SQLITE,
    db: DbOption = None,
    batch: Annotated[
        int, typer.Option(min=1, max=10_000, help="Words a message; 1 is Notify, more are NotifyBatch.")
    ] = 1_000,
    count: Annotated[int, typer.Option(min=1, help="Words that are measured.")] = 200_000,
    in_flight: Annotated[
        int | None, typer.Option(min=1, help="Messages in flight.", show_default="8 to 128, by the batch")
    ] = None,
    connections: Annotated[int, typer.Option(min=1, help="Connections that the messages take in turn.")] = 1,
    evidence: EvidenceOption = False,
    mix: Annotated[
        Mix,
        typer.Option(help="dirty: also a stream with 1% duplicates, 1% replays, 0.5% late and 0.1% unknown orders."),
    ] = Mix.CLEAN,
    open_loop: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="Also so many words a second at random moments whatever the server does, latencies from when each"
            " should have left; `half`: of the rate that was reached.",
            show_default=False,
        ),
    ] = None,
    idle: Annotated[
        bool,
        typer.Option("--idle", help="Also messages that are alone: a NotifyBatch of one, and one of --batch words."),
    ] = False,
    existing: Annotated[int, typer.Option(min=0, help="Payments, paid, that the database holds before.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes of `paycore serve`.")] = 1,
    pinned: Annotated[
        bool, typer.Option("--pinned", help="Server and load on a processor each; else they share all.")
    ] = False,
    server_flag: Annotated[
        list[str] | None,
        typer.Option(metavar="FLAG=VALUE", help="Another flag of `paycore serve`; more than once if need be."),
    ] = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Durable notifications a second through a real server, gRPC and database.

    Starts `paycore serve` on payments that were written beforehand, and
    sends it each payment's success from another process. The baseline
    is a gRPC handler that does nothing with the same messages; the
    limit is the same rows, as many in a commit, alone in a process.
    """

    def run(home: Path, progress: Progress) -> Result:
        return notify.main(
            notify.Options(
                store=store.value,
                folder=home,
                db=db,
                batch=batch,
                words=count,
                in_flight=in_flight,
                connections=max(connections, workers),
                evidence=evidence,
                dirty=mix is Mix.DIRTY,
                open_loop=_rate(open_loop),
                idle=idle,
                existing=existing,
                workers=workers,
                pinned=pinned,
                flags=tuple(f"--{flag.lstrip('-')}" for flag in server_flag or []),
            ),
            progress,
        )

    _measure(run, folder, as_json=as_json)


@app.command("wire", epilog=EPILOG)
def bench_wire(
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Words a message.")] = 1_000,
    count: Annotated[int, typer.Option(min=1, help="Words a round.")] = 200_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which medians are taken.")] = 7,
    evidence: EvidenceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Notifications from bytes to answers on one processor, without a database.

    The baseline is Python's protobuf library; the limit is the decoding
    alone, without deciding or answering.
    """
    options = wire.Options(batch=batch, words=count, rounds=rounds, evidence=evidence)
    _measure(lambda _home, progress: wire.main(options, progress), None, as_json=as_json)


@app.command("index", epilog=EPILOG)
def bench_index(
    count: Annotated[int, typer.Option(min=1, help="Payments; 10,000,000 take 5 GB.")] = 1_000_000,
    checks: Annotated[int, typer.Option(min=1, help="Checks a round.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=5, help="Rounds, of which medians are taken.")] = 7,
    alone: Annotated[
        bool, typer.Option("--alone", help="The index alone: neither baseline nor limit, and less memory.")
    ] = False,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """Checks of a capture by the index, and what a payment takes of memory.

    The baseline is the same check on a dict of tuples, the limit the same
    check in bare C, compiled now: it needs a C compiler.
    """
    options = index.Options(payments=count, checks=checks, rounds=rounds, alone=alone)
    _measure(lambda home, progress: index.main(options, home, progress), folder, as_json=as_json)


@app.command("startup", epilog=EPILOG)
def bench_startup(
    store: StoreOption = StoreName.SQLITE,
    db: DbOption = None,
    count: Annotated[int, typer.Option(min=1, help="Payments in the database.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the best counts.")] = 3,
    folder: FolderOption = None,
    as_json: JsonOption = False,
) -> None:
    """How fast a server reads its payments into the index before it takes calls.

    The baseline is reading record by record; the limit is a bare ordered
    scan of the same columns through the same driver.
    """

    def run(home: Path, progress: Progress) -> Result:
        return startup.main(startup.Options(store.value, home, db, count, rounds), progress)

    _measure(run, folder, as_json=as_json)


def _rate(text: str | None) -> int | None:
    if text is None or text == "half":
        return None if text is None else 0
    if not text.isdecimal() or int(text) < 1:
        fail(f"--open-loop {text}: must be a whole number of words a second, or half", USAGE)
    return int(text)


def _measure(run: Callable[[Path, Progress], Result], folder: Path | None, *, as_json: bool) -> None:
    """Run a measurement in a folder of its own, show how far it is, and print what came of it."""
    described = machine.describe()
    try:
        with tempfile.TemporaryDirectory(prefix="paycore-bench-", dir=folder) as home, _bars() as progress:
            result = run(Path(home), progress)
    except BenchError as error:
        typer.echo(f"no figures: {error}", err=True)
        raise typer.Exit(REFUSED) from None
    if as_json:
        typer.echo(json.dumps(result.as_object(described)))
        return
    show(Console(width=None if sys.stdout.isatty() else _NARROWEST), result, described | dict(result.facts))


class _Bars:
    """Shows each phase as a bar on the terminal; see ``Progress``."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("start", total=None)

    def phase(self, what: str, total: int) -> None:
        """Begin a phase."""
        self._bars.remove_task(self._task)
        self._task = self._bars.add_task(what, total=total or None)

    def done(self, steps: int) -> None:
        """Move the bar."""
        self._bars.update(self._task, completed=steps)


@contextmanager
def _bars() -> Iterator[_Bars]:
    # On standard error, and only where somebody looks: the figures alone are the output.
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        yield _Bars(bars)


def show(console: Console, result: Result, facts: dict[str, str]) -> None:
    """Print a result for people: what it was taken on, the table, and what each row means."""
    for name, value in facts.items():
        console.print(f"[dim]{name:>12}[/dim]  {value}", highlight=False)
    table = Table(title=f"bench {result.benchmark}: {result.size:,} {result.unit}")
    table.add_column("", no_wrap=True)
    extra = list(dict.fromkeys(key for row in result.rows for key in row.more))
    for heading in (f"{result.unit}/s", "x limit", "p50 ms", "p99 ms", *extra):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row.name,
            "" if row.rate is None else f"{row.rate:,.0f}",
            *("" if value is None else f"{value:.2f}" for value in (row.of_limit, row.p50_ms, row.p99_ms)),
            *(_cell(row.more.get(key, "")) for key in extra),
        )
    console.print(table)
    for row in result.rows:
        console.print(f"{row.name}: {row.meaning}.", highlight=False, soft_wrap=True)


def _cell(value: float | str) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else str(value)
