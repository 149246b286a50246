"""Measure everything and write it into docs: ``python -m benchmarks report``, or ``make bench-docs``.

Each cell's figures are kept in ``build/benchmarks``: a report that was interrupted goes on where it was, and
``--fresh`` measures everything anew. Then the tables between markers in docs/benchmarks.md and the chart beside it are
written, of nothing but those figures. A section whose cells were not all measured stays as it is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks import chart
from benchmarks.cells import BATCHES, HEADLINE, STORES, Cell, CellError, Results, Told, cells, chosen, minutes, shown

ROOT = Path(__file__).parents[1]
PAGE, CHART = ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks.svg"
KEPT = ROOT / "build" / "benchmarks"
INDEX_FACTS = ("memory each", "dict each", "longest", "load", "at limit")
LEFT_OUT = "Not measured here: `make bench-docs ARGS=--long` does."
NAMES = {"sqlite": "SQLite", "postgresql": "PostgreSQL"}


class Page:
    """The figures as they stand on the page."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self.missing: dict[str, str] = {}
        """Why a section cannot be made: name -> which cell was not measured."""

    def sections(self) -> dict[str, str]:
        """The text between each pair of markers, of those whose figures are all there."""
        every: dict[str, Callable[[], str]] = {
            "machine": self._machine,
            "batch": self._batch,
            "beyond": self._beyond,
            "peers": self._peers,
            "wire": self._wire,
            "startup": self._startup,
            "index": self._index,
            "many": self._many,
            "unary": self._unary,
            "refunds": self._refunds,
            "sweeps": self._sweeps,
            "audits": self._audits,
        }
        found = {}
        for name, make in every.items():
            try:
                found[name] = make()
            except CellError as missing:
                self.missing[name] = str(missing)
        return found

    def chart(self) -> str:
        """The chart of throughput and latency over batch size and store."""
        rates, latencies = [], []
        for kind, store in zip("ab", STORES, strict=True):
            told = [(batch, self._told(f"batch-{batch}-{store}")) for batch in BATCHES]
            rates.append(chart.Line(NAMES[store], kind, "", [(batch, one["rate"]) for batch, one in told]))
            limits = [(batch, one["limit_rate"]) for batch, one in told]
            rates.append(chart.Line(f"bare {NAMES[store]}", kind, "dashed", limits))
            for key, dash in (("p50_ms", ""), ("p99_ms", "dashed")):
                points = [(batch, one[key]) for batch, one in told]
                latencies.append(chart.Line(f"{NAMES[store]} {key[:3]}", kind, dash, points))
        panels = [
            chart.Panel("Durable notifications", "a second", rates),
            chart.Panel("Time to the durable answer", "ms", latencies),
        ]
        note = (
            "Client, server and database share 2 cores; fsync on. Dashed on the left: the same rows alone, the limit."
        )
        title = "paycore Notify and NotifyBatch over gRPC"
        return chart.render(panels, "notifications a message", title, note)

    def _told(self, name: str) -> Told:
        told = self._results.get(name)
        if told is None:
            raise CellError(f"{name} was not measured")
        return told

    def _machine(self) -> str:
        facts = {**self._told("unary")["machine"]}
        for store in STORES:
            own = self._told(f"batch-{HEADLINE}-{store}")["machine"]
            facts[store] = ", ".join(own[name] for name in ("database", "settings", "fsync") if name in own)
        for name in ("fsync", "sqlite"):
            facts.pop(name, None)
        facts["sqlite"] = self._told(f"batch-{HEADLINE}-sqlite")["machine"]["database"]
        facts["fsync"] = self._told(f"batch-{HEADLINE}-sqlite")["machine"]["fsync"]
        width = max(map(len, facts))
        return "```text\n" + "\n".join(f"{name:>{width}}  {value}" for name, value in facts.items()) + "\n```"

    def _batch(self) -> str:
        rows = []
        for store in STORES:
            for batch in BATCHES:
                told = self._told(f"batch-{batch}-{store}")
                rows.append(
                    (
                        NAMES[store],
                        f"{batch:,}",
                        f"**{told['rate']:,.0f}**",
                        f"{told['p50_ms']:.1f}",
                        f"{told['p99_ms']:.1f}",
                        f"{told['limit_rate']:,.0f}",
                        f"{told['rate'] / told['limit_rate']:.2f}",
                        f"{told['baseline_rate']:,.0f}",
                        f"{told['group']:,.0f}",
                        f"{told['count']:,}",
                    )
                )
        heads = ["store", "words a message", "a second", "p50 ms", "p99 ms", "bare store", "of it", "empty handler"]
        return table([*heads, "words a commit", "measured"], rows)

    def _beyond(self) -> str:
        rows = []
        for store in STORES:
            told = self._told(f"batch-{HEADLINE}-{store}")
            evidence = self._told(f"evidence-{store}")
            rate, name = told["rate"], NAMES[store]
            rows.append((name, "1% duplicates, 1% replays, 0.5% late, 0.1% unknown", rated(told["dirty_rate"], rate)))
            deep, workers = self._told(f"deep-{store}"), self._told(f"workers-2-{store}")
            rows.append((name, "16 messages in flight", rated(deep["rate"], rate)))
            rows.append((name, "16 messages in flight, `--workers 2`", rated(workers["rate"], rate)))
            rows.append((name, "words with the bank's body and headers, 503 bytes", rated(evidence["rate"], rate)))
            open_loop = f"{told['open_loop_rate']:,.0f}/s: {latency(told, 'open_loop_')}"
            open_loop += f"; of it client late {latency(told, 'open_loop_client_late_')}"
            rows.append((name, "half of that rate, at random moments (open loop)", open_loop))
            rows.append((name, "a NotifyBatch of one, one after another", latency(told, "idle_")))
            alone = f"{told['alone_rate']:,.0f}/s: {latency(told, 'alone_')}"
            rows.append((name, f"a message of {told['batch']:,}, one after another", alone))
        return table(["store", "what", "measured"], rows)

    def _peers(self) -> str:
        rows = []
        for store in STORES:
            orm = self._told(f"peer-orm_row_lock-{store}")
            redis = self._results.get(f"peer-redis_setnx-{store}") or {"skipped": "not measured"}
            own = self._told(f"batch-{HEADLINE}-{store}")
            own_meaning = f"{own['batch']:,} a message over gRPC, judged, with every rule"
            limit = {
                "rate": own["limit_rate"],
                "meaning": "the same rows, as many in a commit, nothing else: the limit",
            }
            for name, told in (
                ("ORM with row lock", orm),
                ("Redis `SET NX` + insert", redis),
                ("**paycore NotifyBatch**", own | {"meaning": own_meaning}),
                ("bare store", limit),
            ):
                rows.append(peer_row(name, NAMES[store], told, orm["rate"]))
        tiger = self._results.get("peer-tigerbeetle-sqlite") or {"skipped": "not measured"}
        rows.append(peer_row("TigerBeetle", "its own", tiger, None))
        return table(["", "store", "a second", "x the ORM", "what it is"], rows)

    def _wire(self) -> str:
        told = self._told("wire")
        rows = [
            (row["name"], f"{row['rate']:,.0f}", f"{row['rate'] / told['baseline_rate']:.1f}", row["meaning"])
            for row in told["results"]
        ]
        return table(["", "a second, one core", "x protobuf", "what it is"], rows)

    def _startup(self) -> str:
        rows = []
        for store in STORES:
            for row in self._told(f"startup-{store}")["results"]:
                ready = "" if row["p50_ms"] is None else f"{row['p50_ms']:,.0f}"
                rows.append((NAMES[store], row["name"], f"{row['rate']:,.0f}", f"{row['of_limit']:.2f}", ready))
        return table(["store", "", "payments a second", "of the scan", "ms"], rows)

    def _index(self) -> str:
        many = (self._results.get(name) for name in ("index-many", "index-most"))
        return "\n\n".join(index_part(told) for told in (self._told("index"), *many) if told)

    def _many(self) -> str:
        rows = []
        for store in STORES:
            few, many = (self._results.get(f"existing-{size}-{store}") for size in ("few", "many"))
            if few and many:
                rows += [
                    (NAMES[store], f"{told['existing']:,}", f"{told['rate']:,.0f}", f"{told['rate'] / few['rate']:.2f}")
                    for told in (few, many)
                ]
        if not rows:
            return LEFT_OUT
        return table(["store", "payments before", "a second", "of the first"], rows)

    def _refunds(self) -> str:
        rows = []
        for store in STORES:
            told = self._told(f"refund-{store}")
            for processes, rates in told["rates"].items():
                refunder, bare = rates["refunder"], rates["bare"]
                figures = (f"**{refunder:,.0f}**", f"{bare:,.0f}", f"{refunder / bare:.2f}", f"{told['count']:,}")
                rows.append((NAMES[store], processes, *figures))
        return table(["store", "processes", "refunds a second", "bare client", "of it", "measured"], rows)

    def _repairs(self) -> list[tuple[str, Told]]:
        """The runs with a million payments, and with ten where there are any; each with its store's name."""
        found = []
        for store in STORES:
            found.append((NAMES[store], self._told(f"repair-{store}")))
            if many := self._results.get(f"repair-many-{store}"):
                found.append((NAMES[store], many))
        return found

    def _sweeps(self) -> str:
        rows = []
        for store, told in self._repairs():
            full, scan = told["full_seconds"], told["scan_seconds"]
            passes = (f"{told['idle_seconds'] * 1e3:.0f}", f"{told['burst_seconds'] * 1e3:.0f}", f"**{full:.1f}**")
            figures = (f"{told['rate']:,.0f}", f"{scan:.1f}", f"{full / scan:.2f}")
            rows.append((store, f"{told['count']:,}", *passes, *figures))
        heads = ["store", "payments", "nothing new, ms", "after 10,000 new, ms", "full pass, s", "payments a second"]
        return table([*heads, "bare scan, s", "x the scan"], rows)

    def _audits(self) -> str:
        rows = []
        for store, run in self._repairs():
            told = run["audit"]
            seconds, scan = told["audit_seconds"], told["scan_seconds"]
            figures = (f"{told['rate']:,.0f}", f"{told['cpu_seconds']:.1f}", f"{scan:.1f}", f"{seconds / scan:.2f}")
            rows.append((store, f"{told['count']:,}", f"**{seconds:.1f}**", *figures))
        heads = ["store", "payments", "audit, s", "payments a second", "processor time, s", "bare scan, s"]
        return table([*heads, "x the scan"], rows)

    def _unary(self) -> str:
        rows = []
        for name, workers in (("unary", 1), ("unary-workers-2", 2)):
            for row in self._told(name)["results"]:
                cells_of = (f"{row[key]:.1f}" if row[key] is not None else "" for key in ("p50_ms", "p99_ms"))
                between = f"{row['slowest_rate']:,.0f}-{row['fastest_rate']:,.0f}"
                figures = (f"{row['rate']:,.0f}", between, f"{row['ratio']:.2f}", *cells_of)
                rows.append((str(workers), row["name"], *figures))
        return table(["workers", "", "calls a second", "range", "x empty", "p50 ms", "p99 ms"], rows)


def index_part(told: Told) -> str:
    """What was measured of an index of one size; alone, there is nothing to compare it with."""
    rows = [
        (
            row["name"],
            f"{row['rate']:,.0f}",
            f"{row['rate'] / told['baseline_rate']:.1f}" if told["baseline_rate"] else "",
            f"{row['of_limit']:.2f}" if row["of_limit"] else "",
        )
        for row in told["results"]
    ]
    heads = [f"{told['count']:,} payments", "checks a second", "x the dict", "of the limit"]
    facts = [f"- {name}: {told['machine'][name]}" for name in INDEX_FACTS if name in told["machine"]]
    return "\n".join([table(heads, rows), "", *facts])


def rated(rate: float, clean: float) -> str:
    """A rate and what it is of the clean stream's."""
    return f"{rate:,.0f}/s, {rate / clean:.2f} of the clean rate"


def latency(told: Told, prefix: str) -> str:
    """Two latencies."""
    return f"p50 {told[f'{prefix}p50_ms']:.2f} ms, p99 {told[f'{prefix}p99_ms']:.2f} ms"


def peer_row(name: str, store: str, told: Told, orm_rate: float | None) -> tuple[str, ...]:
    """A line of the table of peers; one that was skipped says why."""
    if "skipped" in told:
        return name, store, "skipped", "", told["skipped"]
    times = f"{told['rate'] / orm_rate:,.1f}" if orm_rate else ""
    return name, store, f"{told['rate']:,.0f}", times, told["meaning"]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; figures stand on the right."""
    every = [list(row) for row in rows]
    rules = ["---:" if all(map(is_figure, column)) else "---" for column in zip(*every, strict=True)]
    lines = [" | ".join(heads), " | ".join(rules), *(" | ".join(row) for row in every)]
    return "\n".join(f"| {line} |" for line in lines)


def is_figure(cell: str) -> bool:
    """Whether a cell holds a number, or none."""
    return re.fullmatch(r"[\d,.\-*]*|skipped", cell) is not None


def fill(page: str, sections: dict[str, str]) -> str:
    """Put each section between its markers. Raises ValueError where a pair of them is not there once."""
    for name, text in sections.items():
        pattern = rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)"
        page, found = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page, flags=re.DOTALL)  # type: ignore[misc]
        if found != 1:
            raise ValueError(f"docs/benchmarks.md has {found} places for {name}")
    return page


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="CELL",
        help="measure these anew and no others, long ones too; * stands for anything",
    )
    parser.add_argument("--long", action="store_true", help="measure with ten and fifty million payments too")
    parser.add_argument("--list", action="store_true", help="tell the cells, and how long each takes, and do nothing")
    parser.add_argument("--scale", type=float, default=1.0, help="of the usual counts; what is below 1 is a trial")
    parser.add_argument("--kept", type=Path, default=KEPT, help="where figures are kept (default: build/benchmarks)")
    parser.add_argument("--folder", type=Path, help="where databases are made: a local disk (default: TMPDIR)")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page that is filled in")
    parser.add_argument("--chart", type=Path, default=CHART, help="where the chart is written")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure what is left, and write the page and the chart."""
    options = parse(arguments)
    try:
        wanted = chosen(cells(options.scale), options.only, long=options.long)
        if options.list:
            list_cells(wanted)
            return 0
        results = Results(options.kept)
        if options.fresh:
            results.forget()
        for cell in wanted if options.only else ():
            results.drop(cell.name)
        results.measure(wanted, options.folder)
        write(Page(results), options.page, options.chart)
    except CellError as error:
        print(f"no report: {error}", file=sys.stderr)
        return 1
    return 0


def list_cells(wanted: Sequence[Cell]) -> None:
    """Print the cells, what each takes and all of them together, and their commands."""
    for cell in wanted:
        print(f"{minutes(cell.seconds):>8}  {cell.name}: {shown(cell.arguments)}")
    print(f"{minutes(sum(cell.seconds for cell in wanted)):>8}  in all")


def write(page: Page, path: Path, drawing: Path) -> None:
    """Fill the page and draw the chart, of what was measured; say what stays as it was."""
    path.write_text(fill(path.read_text(encoding="utf-8"), page.sections()), encoding="utf-8")
    for name, why in page.missing.items():
        print(f"{path}: {name} stays as it was: {why}", file=sys.stderr)
    if "batch" not in page.missing:
        drawing.write_text(page.chart(), encoding="utf-8")
    print(f"written: {path} and {drawing}", file=sys.stderr)
