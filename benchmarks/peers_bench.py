"""paycore's NotifyBatch beside what people would use instead, each in a process of its own, in one table.

The peers are asked in their own process, with nothing to decode; paycore is asked over gRPC. What cannot run here is
named, with what is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import machine

PAYCORE = "paycore NotifyBatch"
ORM = "ORM with row lock"


class Contender(NamedTuple):
    """How one is run. share: of the notifications that it is given: a slow one needs fewer to be measured well."""

    name: str
    command: tuple[str, ...]
    share: float


class Row(NamedTuple):
    """What came of one; a skipped one has no figures."""

    name: str
    store: str
    rate: float | None
    p50_ms: float | None
    p99_ms: float | None
    size: int | None
    meaning: str


def contenders(store: str) -> list[Contender]:
    """Those that there are on a store."""

    def peer(name: str, module: str, share: float) -> Contender:
        return Contender(name, ("-m", f"benchmarks.peers.{module}", "--store", store), share)

    return [
        peer(ORM, "orm_row_lock", 0.02),
        peer("Redis SET NX + insert", "redis_setnx", 0.02),
        Contender(PAYCORE, ("-m", "paycore.cli", "bench", "notify", "--store", store), 1),
        peer("bare store", "bare_store", 1),
    ]


def everything(stores: Sequence[str]) -> list[tuple[str, Contender]]:
    """All that are measured: each on each store, and what is a store itself."""
    every = [(store, contender) for store in stores for contender in contenders(store)]
    return [*every, ("its own", Contender("TigerBeetle", ("-m", "benchmarks.peers.tigerbeetle"), 0.2))]


def measure(contender: Contender, store: str, count: int, folder: Path | None) -> Row:
    """Run one. Raises RuntimeError where it gives no figures."""
    own = max(1, int(count * contender.share))
    command = [sys.executable, *contender.command, "--count", str(own), "--json"]
    command += ["--folder", str(folder)] if folder else []
    ended = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode != 0:
        raise RuntimeError(f"{contender.name} on {store}: {ended.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(ended.stdout)
    if "skipped" in told:
        return Row(contender.name, store, None, None, None, None, f"SKIPPED: {told['skipped']}")
    meaning = told.get("meaning") or f"{told['batch']:,} a message over gRPC, {told['in_flight']} in flight"
    return Row(contender.name, store, told["rate"], told["p50_ms"], told["p99_ms"], told["count"], meaning)


def times(row: Row, rows: Sequence[Row]) -> float | None:
    """How many times as many a second as the ORM on the same store."""
    orm = next((other.rate for other in rows if other.name == ORM and other.store == row.store), None)
    return row.rate / orm if row.rate and orm else None


def show(console: Console, rows: Sequence[Row]) -> None:
    """Print a table; what was skipped stands in it."""
    table = Table(title="Durable notifications beside what people would use instead")
    for heading in ("", "store"):
        table.add_column(heading, no_wrap=True)
    for heading in ("a second", "x the ORM", "p50 ms", "p99 ms", "measured"):
        table.add_column(heading, justify="right")
    table.add_column("what it is")
    for row in rows:
        of_orm = times(row, rows)
        table.add_row(
            row.name,
            row.store,
            "skipped" if row.rate is None else f"{row.rate:,.0f}",
            "" if of_orm is None else f"{of_orm:,.1f}",
            *("" if value is None else f"{value:.2f}" for value in (row.p50_ms, row.p99_ms)),
            "" if row.size is None else f"{row.size:,}",
            row.meaning,
        )
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    """Measure all and print; ``--json`` prints one object instead of a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("--store", choices=("sqlite", "postgresql", "both"), default="both")
    parser.add_argument(
        "--count", type=int, default=1_000_000, help="notifications of the fast ones (default 1,000,000)"
    )
    parser.add_argument("--folder", type=Path, help="where files are made: a local disk (default: TMPDIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    described = machine.describe()
    stores = ("sqlite", "postgresql") if options.store == "both" else (options.store,)
    try:
        rows = [measure(contender, store, options.count, options.folder) for store, contender in everything(stores)]
    except RuntimeError as error:
        print(f"no figures: {error}", file=sys.stderr)
        return 1
    if options.json:
        told = [row._asdict() | {"times_orm": times(row, rows)} for row in rows]
        print(json.dumps({"benchmark": "peers", "machine": described, "results": told}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 150)
    machine.show(console)
    show(console, rows)
    return 0
