"""Checks of captures by the index: beside a dict of tuples, the baseline, and the same check in bare C, the limit.

All hold the same payments and judge the same captures in the same random order; their answers are compared before
anything is timed. Rounds are interleaved, and medians reported. On the way there: what a payment takes of the process's
memory, the longest that one change took while the index grew from nothing, and how fast rows come in, with and without
payments being evicted for them.
"""

import gc
import random
import statistics
import subprocess
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from paycore._dedupe import Index
from paycore.bench import index_dict
from paycore.bench.index_limit import BareC
from paycore.bench.result import BenchError, Progress, Result, Row, percentile_ms
from paycore.domain.ids import ID_EPOCH_MS, created_at_ms
from paycore.domain.verdicts import PaymentState

BATCH = 1_000
ROWS_A_LOAD = 10_000
VALIDITY_MS = 1_800_000
ACCOUNT_CODES = {("simbank", f"m{code}"): code for code in (1, 2, 3)}
ACCOUNT_NAMES = {code: name for name, code in ACCOUNT_CODES.items()}
CURRENCY_CODE = 30
CURRENCY_CODES = {"CNY": CURRENCY_CODE}
COLUMN_KINDS = "qBBqBqqI"
MAX_EVICTING = 2_000_000
PAGE_BYTES = 4_096
DICT, SINGLE, BATCHED = "dict of tuples, one a call", "index, one a call", f"index, {BATCH:,} a call"
BARE_C, LIMIT = "bare C loop", "bare C loop, prefetching"

FACTS = {
    "memory each": "{bytes_each:.1f} bytes held, {resident_bytes_each:.1f} resident",
    "dict each": "{baseline_bytes_each:.1f} bytes",
    "longest": "{longest_change_ms:.2f} ms of CPU time for one change, from nothing to all",
    "load": "{load_rate:,.0f} payments/s from rows of the database",
    "at limit": "{load_rate_at_the_limit:,.0f} payments/s, {evicted:,} evicted, {bytes_over_the_limit} bytes over it",
}
"""What is told of the way there: name -> what of `Result.more`."""

Capture = tuple[int, int, int, int, int, int, int]
Columns = list["array[int]"]


class Options(NamedTuple):
    """What to measure. payments: held. checks: of captures, in each round. alone: without dict and bare C."""

    payments: int = 1_000_000
    checks: int = 1_000_000
    rounds: int = 7
    alone: bool = False


class Payments(NamedTuple):
    """By column; each open with one attempt."""

    ids: "array[int]"
    amounts: "array[int]"
    accounts: "array[int]"


class Timed(NamedTuple):
    """The median round's checks a second, the range of the rounds, and the latencies of all calls, sorted."""

    rate: float
    slowest: float
    fastest: float
    latencies_ns: Sequence[int]


def main(options: Options, folder: Path, progress: Progress) -> Result:
    """Measure all. folder: where the bare C loop is compiled. Raises BenchError where two do not answer alike."""
    payments = make_payments(options.payments)
    more: dict[str, float | int | str | None] = {"checks": options.checks}
    index = grow(payments, more, progress)
    load(payments, more, progress)
    load_at_the_limit(payments, more, progress)
    captures = make_captures(payments, options.checks)
    contenders, limit = {}, None
    columns = by_column(captures)
    contenders[SINGLE] = singly(index.check, captures)
    contenders[BATCHED] = in_batches(index, columns)
    answers = {BATCHED: columns[-1]}
    if not options.alone:
        progress.phase("dict of tuples", 0)
        entries = index_dict.fill(zip(*payments, strict=True), CURRENCY_CODE, VALIDITY_MS)
        more["baseline_bytes_each"] = index_dict.nbytes(entries) / options.payments
        contenders[DICT] = dict_singly(entries, captures)
        answers[DICT] = array("I", [index_dict.check(entries, *capture) for capture in captures])
        limit = bare_c(index, payments, folder, more)
    try:
        if limit is not None:
            for name, ahead in ((BARE_C, False), (LIMIT, True)):
                own = by_column(captures)
                contenders[name], answers[name] = limit.checking(own, ahead=ahead), own[-1]
        timed = measure(contenders, options, progress)
    finally:
        if limit is not None:
            limit.close()
    expected = array("I", [index.check(*capture) for capture in captures])
    for name, answer in answers.items():
        if answer != expected:
            raise BenchError(f"{name} does not answer as the index does")
    return as_result(options, timed, more)


def as_result(options: Options, timed: Mapping[str, Timed], more: Mapping[str, float | int | str | None]) -> Result:
    """Put the baseline first and the limit last."""
    batched, baseline, limit = timed[BATCHED], timed.get(DICT), timed.get(LIMIT)
    meanings = {
        DICT: "the same check in Python, written for speed: the baseline",
        SINGLE: "a Python call for each capture",
        BATCHED: "check_many over columns: the rate",
        BARE_C: "the same check in a C file of its own, with the same flags, segments and probe order",
        LIMIT: "the same, looking ahead as the index does: the limit",
    }
    rows = [
        Row(
            name,
            meaning,
            timed[name].rate,
            of_limit=timed[name].rate / limit.rate if limit else None,
            more={
                "ns": 1e9 / timed[name].rate,
                "range ns": f"{1e9 / timed[name].fastest:.1f}-{1e9 / timed[name].slowest:.1f}",
                "x dict": timed[name].rate / baseline.rate if baseline else "",
            },
        )
        for name, meaning in meanings.items()
        if name in timed
    ]
    return Result(
        benchmark="index",
        unit="payments checked",
        rate=batched.rate,
        baseline_rate=baseline.rate if baseline else None,
        limit_rate=limit.rate if limit else None,
        p50_ms=percentile_ms(batched.latencies_ns, 0.5),
        p99_ms=percentile_ms(batched.latencies_ns, 0.99),
        size=options.payments,
        rows=rows,
        facts={name: text.format(**more) for name, text in FACTS.items() if text[1:].partition(":")[0] in more}
        | {name: str(more[name]) for name in ("limit_skipped",) if name in more},
        more=more,
    )


# ---- Payments and captures -------------------------------------------------------------------------------


def make_payments(count: int) -> Payments:
    """Payments of a busy day, with time-ordered ids as the server draws them."""
    chance = random.Random(1)  # noqa: S311  # the same in every run
    ids = array("q", ((86_400_000 + place // 50) << 22 | 5 << 12 | place % 50 for place in range(count)))
    amounts = array("q", (chance.randrange(300, 10_000_000) for _ in range(count)))
    return Payments(ids, amounts, array("B", (1 + place % len(ACCOUNT_CODES) for place in range(count))))


def make_captures(payments: Payments, count: int) -> list[Capture]:
    """Captures in random order, each of the right account and amount, and in time."""
    picked = random.Random(2).choices(range(len(payments.ids)), k=count)  # noqa: S311
    captures = []
    for place in picked:
        # Read out of an array, so that the id is a new object, as decoding makes it, and not the dict's key.
        payment_id = payments.ids[place]
        paid_at_ms = created_at_ms(payment_id) + 60_000
        account, amount = payments.accounts[place], payments.amounts[place]
        captures.append((payment_id, 1, account, amount, CURRENCY_CODE, paid_at_ms, paid_at_ms + 900))
    return captures


def by_column(captures: Sequence[Capture]) -> Columns:
    """The captures by column, with room for the verdicts."""
    rows = [*zip(*captures, strict=True), [0] * len(captures)]
    return [array(kind, row) for kind, row in zip(COLUMN_KINDS, rows, strict=True)]


Rows = tuple[list[tuple[int, int, str, int, None, None]], list[tuple[int, int, str, str]]]


def rows_of(payments: Payments, first: int) -> Rows:
    """The rows of payments and attempts that a cursor would give, from one place on."""
    ids = payments.ids[first : first + ROWS_A_LOAD].tolist()
    amounts, accounts = (column[first : first + ROWS_A_LOAD] for column in payments[1:])
    asked = [
        (payment_id, amount, "CNY", created_at_ms(payment_id) + VALIDITY_MS, None, None)
        for payment_id, amount in zip(ids, amounts, strict=True)
    ]
    tries = [(payment_id, 1, *ACCOUNT_NAMES[code]) for payment_id, code in zip(ids, accounts, strict=True)]
    return asked, tries


# ---- Filling ---------------------------------------------------------------------------------------------


def grow(payments: Payments, more: dict[str, float | int | str | None], progress: Progress) -> Index:
    """Fill an index payment by payment, timing each; the process's memory before and after tells what each takes."""
    index, longest_ns, before_bytes = Index(), 0, resident_bytes()
    put, now_ns, opened = index.put, time.thread_time_ns, int(PaymentState.OPEN)
    progress.phase("one by one", len(payments.ids))
    # The collector's own pauses are no part of a change.
    gc.disable()
    try:
        for place, (payment_id, amount, account) in enumerate(zip(*payments, strict=True)):
            expire_at_ms, accounts = (payment_id >> 22) + ID_EPOCH_MS + VALIDITY_MS, (account,)
            started_ns = now_ns()
            put(payment_id, amount, CURRENCY_CODE, expire_at_ms, opened, 0, 1, 0, accounts)
            if (taken_ns := now_ns() - started_ns) > longest_ns:
                longest_ns = taken_ns
            if place % ROWS_A_LOAD == 0:
                progress.done(place)
    finally:
        gc.enable()
    more["longest_change_ms"] = longest_ns / 1e6
    more["bytes_each"] = index.nbytes / len(index)
    more["resident_bytes_each"] = (resident_bytes() - before_bytes) / len(index)
    return index


def load(payments: Payments, more: dict[str, float | int | str | None], progress: Progress) -> None:
    """Fill another index from rows; making the rows is not timed."""
    index = Index()
    more["load_rate"] = len(payments.ids) / seconds_to_load(index, payments, len(payments.ids), progress)
    if len(index) != len(payments.ids):
        raise BenchError(f"{len(index)} payments were loaded, not {len(payments.ids)}")


def load_at_the_limit(payments: Payments, more: dict[str, float | int | str | None], progress: Progress) -> None:
    """Load into an index that may hold half of what it is given."""
    count = min(len(payments.ids), MAX_EVICTING)
    index = Index(max_bytes=max(count // 2 * 42, 1))
    more["load_rate_at_the_limit"] = count / seconds_to_load(index, payments, count, progress)
    more["evicted"] = index.evicted
    more["bytes_over_the_limit"] = max(index.nbytes - Index.__basicsize__ - index.max_bytes, 0)


def seconds_to_load(index: Index, payments: Payments, count: int, progress: Progress) -> float:
    """How long ``Index.load`` took for the first payments, of this thread's CPU time."""
    taken_ns = 0
    progress.phase("rows", count)
    for first in range(0, count, ROWS_A_LOAD):
        asked, tries = rows_of(payments, first)
        started_ns = time.thread_time_ns()
        index.load(asked, tries, [], currencies=CURRENCY_CODES, accounts=ACCOUNT_CODES)
        taken_ns += time.thread_time_ns() - started_ns
        progress.done(first)
    return taken_ns / 1e9


def resident_bytes() -> int:
    """What this process has of the machine's memory; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
    except OSError:
        return 0


# ---- Checking --------------------------------------------------------------------------------------------

Run = Callable[[], Sequence[int] | None]
"""Checks all captures once; returns the latency of each call, in ns, where that is meant."""


def singly(check: Callable[[int, int, int, int, int, int, int], int], captures: Sequence[Capture]) -> Run:
    """Check each capture by a call of its own."""

    def run() -> None:
        for payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms in captures:
            check(payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms)

    return run


def dict_singly(entries: index_dict.Entries, captures: Sequence[Capture]) -> Run:
    """The same with the dict."""

    def run() -> None:
        check = index_dict.check
        for payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms in captures:
            check(entries, payment_id, attempt, account, amount, currency, paid_at_ms, received_at_ms)

    return run


def in_batches(index: Index, columns: Columns) -> Run:
    """Check the captures by calls of BATCH rows each."""
    views = [memoryview(column) for column in columns]
    batches = [[view[start : start + BATCH] for view in views] for start in range(0, len(columns[0]), BATCH)]

    def run() -> Sequence[int]:
        latencies_ns = []
        for ids, attempts, accounts, amounts, currencies, paid_at, received_at, verdicts in batches:
            started_ns = time.perf_counter_ns()
            index.check_many(ids, attempts, accounts, amounts, currencies, paid_at, received_at, verdicts)
            latencies_ns.append(time.perf_counter_ns() - started_ns)
        return latencies_ns

    return run


def bare_c(index: Index, payments: Payments, folder: Path, more: dict[str, float | int | str | None]) -> BareC | None:
    """The loop in bare C with segments as the index has them; None, and said so, where it cannot be compiled."""
    try:
        probe = BareC(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        more["limit_skipped"] = f"SKIPPED, no C compiler that works: {error}"
        return None
    slots = [segment_slots for segment_slots, _, _ in index._segment_sizes()]  # noqa: SLF001  # the probe gets the same
    probe.fill(slots, *payments, CURRENCY_CODE, VALIDITY_MS)
    return probe


def measure(contenders: Mapping[str, Run], options: Options, progress: Progress) -> dict[str, Timed]:
    """Run each once to warm up, then once a round, in turn."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    latencies_ns: dict[str, list[int]] = {name: [] for name in contenders}
    progress.phase("rounds", options.rounds + 1)
    gc.disable()
    try:
        for number in range(options.rounds + 1):
            for name, run in contenders.items():
                # All run in this one thread: its CPU time leaves out what others on the machine do.
                started_ns = time.thread_time_ns()
                told_ns = run()
                taken_ns = time.thread_time_ns() - started_ns
                if number > 0:
                    samples[name].append(options.checks / taken_ns * 1e9)
                    latencies_ns[name] += told_ns or ()
            progress.done(number + 1)
    finally:
        gc.enable()
    return {
        name: Timed(statistics.median(rates), min(rates), max(rates), sorted(latencies_ns[name]))
        for name, rates in samples.items()
    }
