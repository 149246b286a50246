"""Checks a second and bytes a payment: the compiled index beside a dict of tuples and the check in bare C.

All contenders hold the same payments and judge the same captures in the same random order; their answers are compared
before anything is timed. Rounds are interleaved, and medians reported.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks import machine
from paycore._dedupe import Index
from paycore.domain.decision import Facts, Moment, decide
from paycore.domain.ids import ID_EPOCH_MS
from paycore.domain.verdicts import NotifyOutcome, PaymentState, Recorded, VerdictFlag

BATCH = 1_000
VALIDITY_MS = 1_800_000
ACCOUNTS = 3
CURRENCY_CODE = 30
PROBE_SOURCE = Path(__file__).with_name("index_probe.c")
COLUMN_KINDS = "qBBqBqqI"

Capture = tuple[int, int, int, int, int, int, int]
Columns = list["array[int]"]


class Load(NamedTuple):
    """Payments, each open with one attempt, and captures of them in random order."""

    payment_ids: list[int]
    amounts: list[int]
    accounts: list[int]
    captures: list[Capture]

    def columns(self) -> Columns:
        """The captures by column, with room for the verdicts."""
        rows = [*zip(*self.captures, strict=True), [0] * len(self.captures)]
        return [array(kind, row) for kind, row in zip(COLUMN_KINDS, rows, strict=True)]


class Contender(NamedTuple):
    """One way to check all captures once; ``bytes_per_payment``: 0 where another row says it."""

    name: str
    run: Callable[[], None]
    bytes_per_payment: float


class Result(NamedTuple):
    """What came of one contender: the median of the rounds, and the range of them."""

    name: str
    ns_per_check: float
    fastest_ns: float
    slowest_ns: float
    bytes_per_payment: float


def make_load(count: int, checks: int, seed: int = 1) -> Load:
    """Payments of a busy day, time-ordered ids as the server draws them, all captures in time."""
    chance = random.Random(seed)
    payment_ids = [(86_400_000 + i // 50) << 22 | 5 << 12 | i % 50 for i in range(count)]
    amounts = [chance.randrange(300, 10_000_000) for _ in range(count)]
    accounts = [1 + i % ACCOUNTS for i in range(count)]
    picked = chance.choices(range(count), k=checks)
    paid_at_ms = [(payment_ids[i] >> 22) + ID_EPOCH_MS + 60_000 for i in picked]
    columns = (
        array("q", (payment_ids[i] for i in picked)),
        array("B", [1]) * len(picked),
        array("B", (accounts[i] for i in picked)),
        array("q", (amounts[i] for i in picked)),
        array("B", [CURRENCY_CODE]) * len(picked),
        array("q", paid_at_ms),
        array("q", (time_ms + 900 for time_ms in paid_at_ms)),
    )
    # Through arrays, so that the captures' integers are new objects, as decoding makes them, and not the dict's keys.
    captures = list(zip(*(column.tolist() for column in columns), strict=True))
    return Load(payment_ids, amounts, accounts, captures)


# ---- The compiled index ----------------------------------------------------------------------------------


def fill_index(load: Load) -> Index:
    """The compiled index with all payments, grown as it goes."""
    index = Index()
    for payment_id, amount, account in zip(load.payment_ids, load.amounts, load.accounts, strict=True):
        expire_at_ms = (payment_id >> 22) + ID_EPOCH_MS + VALIDITY_MS
        index.put(payment_id, amount, CURRENCY_CODE, expire_at_ms, PaymentState.OPEN, 0, 1, 0, (account,))
    return index


def index_singly(index: Index, load: Load) -> Callable[[], None]:
    """Check each capture by a call of its own."""

    def run() -> None:
        check = index.check
        for payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms in load.captures:
            check(payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms)

    return run


def index_in_batches(index: Index, columns: Columns) -> Callable[[], None]:
    """Check the captures by calls of BATCH rows each."""
    views = [memoryview(column) for column in columns]
    batches = [[view[start : start + BATCH] for view in views] for start in range(0, len(columns[0]), BATCH)]

    def run() -> None:
        for ids, attempts, accounts, amounts, currencies, paid_at, received_at, verdicts in batches:
            index.check_many(ids, attempts, accounts, amounts, currencies, paid_at, received_at, verdicts)

    return run


# ---- The dict of tuples ----------------------------------------------------------------------------------

DictEntry = tuple[int, int, int, int, int, int, int, int, int, int]


def fill_dict(load: Load) -> dict[int, DictEntry]:
    """payment_id -> (amount, currency, expire_at, state, kept, attempts, mask, account 1, 2, 3)."""
    entries: dict[int, DictEntry] = {}
    for payment_id, amount, account in zip(load.payment_ids, load.amounts, load.accounts, strict=True):
        expire_at_ms = (payment_id >> 22) + ID_EPOCH_MS + VALIDITY_MS
        entries[payment_id] = (amount, CURRENCY_CODE, expire_at_ms, 1, 0, 1, 0, account, 0, 0)
    return entries


def dict_check(
    entries: dict[int, DictEntry],
    payment_id: int,
    attempt: int,
    account: int,
    amount: int,
    currency: int,
    paid_at_ms: int,
    received_at_ms: int,
) -> int:
    """The same check on plain Python objects, written for speed: the way to ACCEPTED is inlined."""
    entry = entries.get(payment_id)
    if entry is None:
        return 0
    if not 1 <= attempt <= entry[5] or attempt > ACCOUNTS:
        return 0
    kept_account = entry[6 + attempt]
    if kept_account == 0:
        return 0
    if entry[6] >> (attempt - 1) & 1:
        return VerdictFlag.ASK
    created_at_ms = (payment_id >> 22) + ID_EPOCH_MS
    if (
        kept_account == account
        and entry[0] == amount
        and entry[1] == currency
        and entry[3] == 1
        and entry[6] == 0
        and created_at_ms <= paid_at_ms <= received_at_ms
        and paid_at_ms <= entry[2]
    ):
        return 1
    return dict_check_rarely(entry, created_at_ms, (account, attempt, amount, currency), (paid_at_ms, received_at_ms))


def dict_check_rarely(
    entry: DictEntry, created_at_ms: int, said: tuple[int, int, int, int], times: tuple[int, int]
) -> int:
    """What is not plainly in time, of the right account and terms, goes through the whole decision."""
    account, attempt, amount, currency = said
    facts = Facts(
        known=True,
        account_matches=entry[6 + attempt] == account,
        recorded=Recorded.NONE,
        recorded_outcome=0,
        terms_match=entry[:2] == (amount, currency),
        state=entry[3],
        other_live=entry[5] > 1,
        created_at_ms=created_at_ms,
        expire_at_ms=entry[2],
    )
    verdict = decide(facts, Moment(*times, late_grace_ms=0))
    alone = verdict & 0xFF == NotifyOutcome.ACCEPTED and entry[6] == 0
    return verdict if alone else verdict | VerdictFlag.ASK


def dict_singly(entries: dict[int, DictEntry], load: Load) -> Callable[[], None]:
    """Check each capture by a call of its own."""

    def run() -> None:
        for payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms in load.captures:
            dict_check(entries, payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms)

    return run


def dict_nbytes(entries: dict[int, DictEntry]) -> int:
    """Memory of the dict, its keys, tuples and integers; small integers are shared and cost nothing."""
    sizes = sys.getsizeof(entries)
    for payment_id, entry in entries.items():
        sizes += sys.getsizeof(payment_id) + sys.getsizeof(entry)
        sizes += sum(sys.getsizeof(value) for value in entry if value > 256)
    return sizes


# ---- Bare C ----------------------------------------------------------------------------------------------


class BareC:
    """index_probe.c, compiled now and filled with the payments.

    Raises OSError or CalledProcessError where there is no compiler that works, MemoryError without memory.
    """

    def __init__(self, load: Load, folder: Path) -> None:
        library_path = folder / "index_probe.so"
        command = [machine.compiler(), "-O3", "-std=c99", "-fPIC", "-shared", "-o", str(library_path)]
        subprocess.run([*command, str(PROBE_SOURCE)], check=True)
        self._library = ctypes.CDLL(str(library_path))
        self._library.probe_make.restype = ctypes.c_void_p
        self._library.probe_free.argtypes = [ctypes.c_void_p]
        self.slots = 8
        while self.slots - self.slots // 4 < len(load.payment_ids):
            self.slots *= 2
        filled = [
            array("q", load.payment_ids),
            array("q", load.amounts),
            array("B", [CURRENCY_CODE]) * len(load.payment_ids),
            array("B", load.accounts),
        ]
        self._probe = ctypes.c_void_p(
            self._library.probe_make(
                ctypes.c_size_t(self.slots),
                ctypes.c_size_t(len(load.payment_ids)),
                *map(address, filled),
                ctypes.c_uint32(VALIDITY_MS),
            )
        )
        if self._probe.value is None:
            raise MemoryError("no memory for the table in bare C")

    def checking(self, columns: Columns, *, ahead: bool) -> Callable[[], None]:
        """Check all captures by one call; ``ahead``: with prefetching."""
        count = ctypes.c_size_t(len(columns[0]))

        def run() -> None:
            self._library.probe_check(self._probe, ctypes.c_int(ahead), count, *map(address, columns))

        return run

    @property
    def nbytes(self) -> int:
        """Memory of the table."""
        return self.slots * 32 + 64

    def close(self) -> None:
        """Release the table."""
        self._library.probe_free(self._probe)


def address(column: array[int]) -> ctypes.c_void_p:
    """Where a column's items lie; valid while the column lives and keeps its length."""
    return ctypes.c_void_p(column.buffer_info()[0])


# ---- Measuring -------------------------------------------------------------------------------------------


def compare_answers(index: Index, entries: dict[int, DictEntry], load: Load, by_columns: dict[str, Columns]) -> None:
    """Raise RuntimeError unless every contender gives the same verdicts."""
    expected = array("I", [index.check(*capture) for capture in load.captures])
    answers = {"dict of tuples": array("I", [dict_check(entries, *capture) for capture in load.captures])}
    answers |= {name: columns[-1] for name, columns in by_columns.items()}
    for name, answer in answers.items():
        if answer != expected:
            raise RuntimeError(f"{name} does not answer as the index does")


def measure(contenders: Sequence[Contender], rounds: int, checks: int) -> list[Result]:
    """Time each contender once a round, in turn, and take medians over the rounds."""
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.disable()
    try:
        for _ in range(rounds):
            for contender in contenders:
                started_ns = time.perf_counter_ns()
                contender.run()
                samples[contender.name].append((time.perf_counter_ns() - started_ns) / checks)
    finally:
        gc.enable()
    return [
        Result(
            contender.name,
            statistics.median(samples[contender.name]),
            min(samples[contender.name]),
            max(samples[contender.name]),
            contender.bytes_per_payment,
        )
        for contender in contenders
    ]


def run_all(count: int, checks: int, rounds: int) -> list[Result]:
    """Fill every contender, see that all answer alike, and measure them."""
    load = make_load(count, checks)
    index, entries = fill_index(load), fill_dict(load)
    batch_columns, c_columns, c_ahead_columns = load.columns(), load.columns(), load.columns()
    with tempfile.TemporaryDirectory() as folder:
        bare_c = BareC(load, Path(folder))
        try:
            contenders = [
                Contender("dict of tuples, one a call", dict_singly(entries, load), dict_nbytes(entries) / count),
                Contender("index, one a call", index_singly(index, load), index.nbytes / count),
                Contender(f"index, {BATCH:,} a call", index_in_batches(index, batch_columns), index.nbytes / count),
                Contender("bare C loop", bare_c.checking(c_columns, ahead=False), bare_c.nbytes / count),
                Contender(
                    "bare C loop, prefetching", bare_c.checking(c_ahead_columns, ahead=True), bare_c.nbytes / count
                ),
            ]
            for contender in contenders:
                contender.run()
            by_columns = {"batches": batch_columns, "bare C": c_columns, "prefetching C": c_ahead_columns}
            compare_answers(index, entries, load, by_columns)
            return measure(contenders, rounds, checks)
        finally:
            bare_c.close()


def show(console: Console, results: list[Result], count: int, rounds: int) -> None:
    """Print the results as a table; speed beside the baseline's (first row), time beside the limit's (last row)."""
    baseline, limit = results[0], results[-1]
    table = Table(title=f"Checks of a capture at {count:,} payments, medians of {rounds} interleaved rounds")
    table.add_column("", no_wrap=True)
    for heading in ("ns/check", "range", "checks/s", "x the dict", "x the limit", "bytes each"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.name,
            f"{result.ns_per_check:.1f}",
            f"{result.fastest_ns:.1f}-{result.slowest_ns:.1f}",
            f"{1e9 / result.ns_per_check:,.0f}",
            f"{baseline.ns_per_check / result.ns_per_check:.1f}",
            f"{result.ns_per_check / limit.ns_per_check:.2f}",
            f"{result.bytes_per_payment:.1f}",
        )
    console.print(table)


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
    parser.add_argument("--count", type=at_least(1), default=1_000_000, help="payments (default 1,000,000)")
    parser.add_argument("--checks", type=at_least(1), default=1_000_000, help="checks a round (default 1,000,000)")
    parser.add_argument("--rounds", type=at_least(5), default=7, help="rounds, at least 5 (default 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    described = machine.describe()
    results = run_all(options.count, options.checks, options.rounds)
    if options.json:
        rows = [result._asdict() for result in results]
        print(json.dumps({"benchmark": "index", "machine": described, "payments": options.count, "results": rows}))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110)
    machine.show(console)
    show(console, results, options.count, options.rounds)
    return 0
