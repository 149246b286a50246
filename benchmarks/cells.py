"""What the report measures: one cell a run of a program that prints JSON. Runs are kept, so a report can be resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

STORES = ("sqlite", "postgresql")
BATCHES = (1, 10, 100, 1_000, 10_000)
HEADLINE = 1_000
"""The batch at which everything else is measured too."""

BENCH = ("-m", "paycore.cli", "bench")

Told = dict[str, Any]


class CellError(Exception):
    """A cell gave no figures, or there is no such cell; the message says which and why."""


SCALED = ("--count", "--checks", "--existing")
REFUND = ("-m", "benchmarks", "refund")
REPAIR = ("-m", "benchmarks", "sweep", "--audit", "--burst", "10000")
TWO_WORKERS = ("--workers", "2", "--connections", "4")


class Cell(NamedTuple):
    """A run. arguments: of Python. seconds: what it takes on 2 cores, about. long: not part of every report."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    takes_folder: bool = True
    long: bool = False

    def run(self, folder: Path | None) -> Told:
        """Run it. Raises CellError."""
        command = [sys.executable, *self.arguments, "--json"]
        command += ["--folder", str(folder)] if folder and self.takes_folder else []
        ended = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ended.returncode != 0:
            raise CellError(f"{self.name}: {' '.join(command)}\n{ended.stderr[-3000:]}")
        told: Told = json.loads(ended.stdout)
        return told | {"command": shown(self.arguments)}


def shown(arguments: Sequence[str]) -> str:
    """A command as a reader types it."""
    return " ".join(arguments).replace("-m paycore.cli", "paycore").replace("-m ", "python -m ")


START_SECONDS = 5
"""What a cell takes that measures next to nothing."""


def cells(scale: float) -> list[Cell]:
    """All cells, with ``scale`` times their counts. Those of minutes are marked long."""
    every = [*notify_cells(), *alone_cells(), *repair_cells(), *long_cells()]
    return [cell._replace(arguments=scaled(cell, scale), seconds=duration(cell, scale)) for cell in every]


def scaled(cell: Cell, scale: float) -> tuple[str, ...]:
    """A cell's arguments with its counts scaled."""
    pairs = zip(("", *cell.arguments), cell.arguments, strict=False)
    return tuple(str(max(1, int(int(given) * scale))) if option in SCALED else given for option, given in pairs)


def duration(cell: Cell, scale: float) -> int:
    """About how many seconds a cell takes with its counts scaled."""
    return START_SECONDS + round(cell.seconds * scale)


def chosen(every: Sequence[Cell], patterns: Sequence[str] | None, *, long: bool) -> list[Cell]:
    """The cells that are named, ``*`` standing for anything; without names, all but the long ones. Raises CellError."""
    if patterns is None:
        return [cell for cell in every if long or not cell.long]
    for pattern in patterns:
        if not any(fnmatch(cell.name, pattern) for cell in every):
            raise CellError(f"no cell {pattern!r}; --list tells which there are")
    return [cell for cell in every if any(fnmatch(cell.name, pattern) for pattern in patterns)]


def notify(name: str, store: str, batch: int, count: int, seconds: int, *more: str) -> Cell:
    """Durable notifications over gRPC."""
    arguments = (*BENCH, "notify", "--store", store, "--batch", str(batch), "--count", str(count), *more)
    return Cell(f"{name}-{store}", arguments, seconds)


def notify_cells() -> list[Cell]:
    """What is measured of notifications on each store, and what it is compared with."""

    def peer(module: str, store: str, count: int, seconds: int) -> Cell:
        arguments = ("-m", f"benchmarks.peers.{module}", "--store", store, "--count", str(count))
        return Cell(f"peer-{module}-{store}", arguments, seconds)

    everything = ("--mix", "dirty", "--open-loop", "half", "--idle")
    found: list[Cell] = []
    for store, slow in zip(STORES, (1, 2), strict=True):
        startup = (*BENCH, "startup", "--store", store, "--count", "1000000")
        found += [
            notify("batch-1", store, 1, 30_000, 30),
            notify("batch-10", store, 10, 300_000, 30 * slow),
            notify("batch-100", store, 100, 1_000_000, 40 * slow),
            notify("batch-1000", store, HEADLINE, 1_000_000, 120 * slow, *everything),
            notify("batch-10000", store, 10_000, 1_000_000, 35 * slow),
            notify("deep", store, HEADLINE, 1_000_000, 35 * slow, "--in-flight", "16"),
            notify("workers-2", store, HEADLINE, 1_000_000, 35 * slow, "--in-flight", "16", *TWO_WORKERS),
            notify("evidence", store, HEADLINE, 1_000_000, 45 * slow, "--evidence"),
            Cell(f"startup-{store}", startup, 60 * slow),
            peer("orm_row_lock", store, 20_000, 40),
            peer("redis_setnx", store, 20_000, 40),
        ]
    return [*found, peer("tigerbeetle", "sqlite", 500_000, 20)]


def alone_cells() -> list[Cell]:
    """What needs no database, or makes a file of its own."""
    unary = ("-m", "benchmarks", "notify", "--count", "10000")
    return [
        Cell("wire", (*BENCH, "wire", "--count", "500000"), 40, takes_folder=False),
        Cell("index", (*BENCH, "index", "--count", "1000000", "--checks", "1000000"), 30),
        Cell("unary", (*unary, "--runs", "5"), 150),
        Cell("unary-workers-2", (*unary, "--runs", "3", "--workers", "2"), 90),
    ]


def repair_cells() -> list[Cell]:
    """Refunds through simulated banks, sweeps and audits, on a million payments."""
    return [
        cell
        for store, slow in zip(STORES, (1, 2), strict=True)
        for cell in (
            Cell(f"refund-{store}", (*REFUND, "--store", store, "--count", "2000", "--processes", "1,4"), 90),
            Cell(f"repair-{store}", (*REPAIR, "--store", store, "--count", "1000000"), 60 * slow),
        )
    ]


def long_cells() -> list[Cell]:
    """What takes minutes each: ten million payments in the database, ten and fifty million in the index."""
    found: list[Cell] = []
    for store, slow in zip(STORES, (1, 2), strict=True):
        found += [
            notify("existing-few", store, HEADLINE, 1_000_000, 40 * slow, "--existing", "100000"),
            notify("existing-many", store, HEADLINE, 1_000_000, 240 * slow, "--existing", "10000000"),
            Cell(f"repair-many-{store}", (*REPAIR, "--store", store, "--count", "10000000"), 600 * slow),
        ]
    found += [
        Cell("index-many", (*BENCH, "index", "--count", "10000000"), 300),
        Cell("index-most", (*BENCH, "index", "--count", "50000000", "--alone"), 300),
    ]
    return [cell._replace(long=True) for cell in found]


class Results:
    """What was measured, one file a cell in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def forget(self) -> None:
        """Measure everything anew."""
        for path in self._folder.glob("*.json"):
            path.unlink()

    def drop(self, name: str) -> None:
        """Measure one cell anew."""
        (self._folder / f"{name}.json").unlink(missing_ok=True)

    def get(self, name: str) -> Told | None:
        """What a cell told; None where it was not run, or had to be skipped."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        told: Told = json.loads(path.read_text(encoding="utf-8"))
        return told

    def _has(self, cell: Cell) -> bool:
        """Whether a cell was run as it would be run now: a trial with smaller counts is none."""
        told = self.get(cell.name)
        return told is not None and told["command"] == shown(cell.arguments)

    def measure(self, every: Sequence[Cell], folder: Path | None) -> None:
        """Run the cells that are not there yet, one after another, and say how far it is. Raises CellError."""
        left = [cell for cell in every if not self._has(cell)]
        print(f"{len(every) - len(left)} of {len(every)} cells are there already", file=sys.stderr)
        for place, cell in enumerate(left, start=1):
            seconds = sum(one.seconds for one in left[place - 1 :])
            about = f"about {cell.seconds} s, {minutes(seconds)} left in all"
            print(f"[{place}/{len(left)}] {cell.name}: {about}", file=sys.stderr, flush=True)
            started = time.monotonic()
            told = cell.run(folder) | {"seconds": round(time.monotonic() - started, 1)}
            # Renamed into place: an interrupted report resumes with the cell that was cut off.
            unfinished = self._folder / f"{cell.name}.unfinished"
            unfinished.write_text(json.dumps(told), encoding="utf-8")
            unfinished.rename(self._folder / f"{cell.name}.json")


def minutes(seconds: int) -> str:
    """A time that somebody waits for."""
    return f"{seconds} s" if seconds < 100 else f"{round(seconds / 60)} min"
