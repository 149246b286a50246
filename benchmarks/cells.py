"""What the report measures: one cell a run of a program that prints JSON. Runs are kept, so a report can be resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STORES = ("sqlite", "postgresql")
BATCHES = (1, 10, 100, 1_000, 10_000)
HEADLINE = 1_000
"""The batch at which everything else is measured too."""

BENCH = ("-m", "paycore.cli", "bench")

Told = dict[str, Any]


class CellError(Exception):
    """A cell gave no figures; the message says which and why."""


TWO_WORKERS = ("--workers", "2", "--connections", "4")


class Cell(NamedTuple):
    """A run. arguments: of Python. seconds: what it takes on the machine of the report, about."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    takes_folder: bool = True

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


def cells(scale: float, *, long: bool = False) -> list[Cell]:
    """All cells, with ``scale`` times their usual counts. long: those of minutes too."""

    def scaled(count: int) -> str:
        return str(max(1, int(count * scale)))

    def notify(name: str, store: str, batch: int, count: int, seconds: int, *more: str) -> Cell:
        arguments = (*BENCH, "notify", "--store", store, "--batch", str(batch))
        return Cell(f"{name}-{store}", (*arguments, "--count", scaled(count), *more), seconds)

    def peer(module: str, store: str, count: int, seconds: int) -> Cell:
        arguments = ("-m", f"benchmarks.peers.{module}", "--store", store, "--count", scaled(count))
        return Cell(f"peer-{module}-{store}", arguments, seconds)

    unary = ("-m", "benchmarks", "notify", "--count", scaled(10_000))
    everything = ("--mix", "dirty", "--open-loop", "half", "--idle")
    found: list[Cell] = []
    for store, factor in zip(STORES, (1, 2), strict=True):
        found += [
            notify("batch-1", store, 1, 30_000, 15 * factor),
            notify("batch-10", store, 10, 200_000, 15 * factor),
            notify("batch-100", store, 100, 500_000, 20 * factor),
            notify("batch-1000", store, HEADLINE, 1_000_000, 60 * factor, *everything),
            notify("batch-10000", store, 10_000, 1_000_000, 25 * factor),
            notify("deep", store, HEADLINE, 1_000_000, 20 * factor, "--in-flight", "16"),
            notify("workers-2", store, HEADLINE, 400_000, 20 * factor, "--in-flight", "16", *TWO_WORKERS),
            notify("evidence", store, HEADLINE, 200_000, 15 * factor, "--evidence"),
            Cell(f"startup-{store}", (*BENCH, "startup", "--store", store, "--count", scaled(1_000_000)), 30 * factor),
            peer("orm_row_lock", store, 20_000, 15),
            peer("redis_setnx", store, 20_000, 15),
        ]
    found += [
        peer("tigerbeetle", "sqlite", 500_000, 1),
        Cell("wire", (*BENCH, "wire", "--count", scaled(500_000)), 15, takes_folder=False),
        Cell("index", (*BENCH, "index", "--count", scaled(1_000_000), "--checks", scaled(1_000_000)), 30),
        Cell("unary", (*unary, "--runs", "5"), 90),
        Cell("unary-workers-2", (*unary, "--runs", "3", "--workers", "2"), 60),
    ]
    return [*found, *long_cells(scale)] if long else found


def long_cells(scale: float) -> list[Cell]:
    """What takes minutes each: ten million payments, in the database and in the index."""
    many, few = int(10_000_000 * scale), int(100_000 * scale)
    words = str(max(1, int(1_000_000 * scale)))
    found = [
        Cell(
            f"existing-{size}-{store}",
            (*BENCH, "notify", "--store", store, "--count", words, "--existing", str(existing)),
            seconds,
        )
        for store, slow in (("sqlite", 180), ("postgresql", 360))
        for size, existing, seconds in (("few", few, 60), ("many", many, slow))
    ]
    return [*found, Cell("index-many", (*BENCH, "index", "--count", str(max(1, many))), 300)]


class Results:
    """What was measured, one file a cell in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def forget(self) -> None:
        """Measure everything anew."""
        for path in self._folder.glob("*.json"):
            path.unlink()

    def get(self, name: str) -> Told | None:
        """What a cell told; None where it was not run, or had to be skipped."""
        path = self._folder / f"{name}.json"
        if not path.exists():
            return None
        told: Told = json.loads(path.read_text(encoding="utf-8"))
        return told

    def measure(self, every: Sequence[Cell], folder: Path | None) -> None:
        """Run the cells that are not there yet, one after another, and say how far it is. Raises CellError."""
        left = [cell for cell in every if self.get(cell.name) is None]
        print(f"{len(every) - len(left)} of {len(every)} cells are there already", file=sys.stderr)
        for place, cell in enumerate(left, start=1):
            seconds = sum(one.seconds for one in left[place - 1 :])
            print(f"[{place}/{len(left)}, about {seconds} s left] {cell.name}", file=sys.stderr, flush=True)
            started = time.monotonic()
            told = cell.run(folder) | {"seconds": round(time.monotonic() - started, 1)}
            # Renamed into place: an interrupted report resumes with the cell that was cut off.
            unfinished = self._folder / f"{cell.name}.unfinished"
            unfinished.write_text(json.dumps(told), encoding="utf-8")
            unfinished.rename(self._folder / f"{cell.name}.json")
