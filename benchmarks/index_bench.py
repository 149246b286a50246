"""Checks of captures by the index: what ``paycore.bench.index`` measures, as a table or as one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paycore.bench import index, machine
from paycore.bench.result import NoProgress, Result


def show(console: Console, result: Result, rounds: int) -> None:
    """Print the facts and the table; rates beside the baseline's and the limit's."""
    for name, value in (machine.describe() | dict(result.facts)).items():
        console.print(f"[dim]{name:>13}[/dim]  {value}", highlight=False)
    table = Table(title=f"Checks of a capture at {result.size:,} payments, medians of {rounds} interleaved rounds")
    table.add_column("", no_wrap=True)
    for heading in ("checks/s", "ns/check", "range", "x the dict", "x the limit's time"):
        table.add_column(heading, justify="right")
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.rate:,.0f}",
            f"{row.more['ns']:.1f}",
            str(row.more["range ns"]),
            f"{row.more['x dict']:.1f}" if row.more["x dict"] else "",
            f"{1 / row.of_limit:.2f}" if row.of_limit else "",
        )
    console.print(table)
    for row in result.rows:
        console.print(f"{row.name}: {row.meaning}.", highlight=False, soft_wrap=True)


def at_least(low: int) -> Callable[[str], int]:
    """Make an argument's type: an integer of at least ``low``."""

    def integer(text: str) -> int:
        if (value := int(text)) < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}")
        return value

    return integer


def main(arguments: Sequence[str]) -> int:
    """Measure and print; ``--json`` prints one object instead of tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks index", description=__doc__)
    parser.add_argument(
        "--count", type=at_least(1), default=1_000_000, help="payments (default 1,000,000; 10,000,000 takes 5 GB)"
    )
    parser.add_argument("--checks", type=at_least(1), default=1_000_000, help="checks a round (default 1,000,000)")
    parser.add_argument("--rounds", type=at_least(5), default=7, help="rounds, at least 5 (default 7)")
    parser.add_argument("--alone", action="store_true", help="the index alone: 50,000,000 payments take 4 GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        asked = index.Options(options.count, options.checks, options.rounds, options.alone)
        result = index.main(asked, Path(folder), NoProgress())
    if options.json:
        print(json.dumps(result.as_object(machine.describe())))
        return 0
    show(Console(width=None if sys.stdout.isatty() else 120), result, options.rounds)
    return 0
