"""Refunds per second through real simulated banks, by one process and by several, beside a bare client of those banks.

Every payment was paid twice, and the second capture is owed back. The refunders are processes as ``paycore run
refunder`` starts them. The baseline asks and sends as often, over the same adapter, and writes nothing down: what is
left to it is the bank, whose books are one file with a synced commit for each refund.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from sqlalchemy import func, insert, select

from benchmarks import machine
from paycore.app.clock import SystemClock
from paycore.bench.databases import Database, now_ms, opened
from paycore.bench.result import BenchError
from paycore.channels.protocol import RefundAnswer, RefundOrder
from paycore.channels.simbank import SimbankChannel
from paycore.domain.ids import (
    ID_EPOCH_MS,
    NODE_BITS,
    SEQUENCE_BITS,
    excess_refund_no,
    format_channel_order_no,
    format_channel_refund_no,
)
from paycore.domain.verdicts import AttemptState, CaptureSource, NotifyOutcome, PaymentState, PayMethod, RefundState
from paycore.simbank.books import Order, OrderState
from paycore.simbank.disk import Disk
from paycore.store import tables
from paycore.store.engine import parse_database_url
from paycore.store.rows import ChannelOrderRow, ExcessRow, OutcomeRow, PaymentRow, RefundRow, Stamp
from paycore.usecases.refund import new_try

BANK = "bank_b"
SECRETS = {"bank_a": "a secret of bank a for figures", BANK: "a secret of bank b for figures"}
AMOUNT_MINOR = 1_234
NODE = 7
AT_ONCE = 16
"""Calls that the baseline has under way at once, as one refunder has."""

_WAIT_SECONDS = 600
_Row = tuple[Any, ...]


class Owed(NamedTuple):
    """A capture at the bank that is owed back."""

    payment_id: int
    trade_no: str

    def order(self) -> RefundOrder:
        """The refund as the bank is asked for it."""
        refund_no = excess_refund_no(2, self.trade_no)
        sent_no = format_channel_refund_no(self.payment_id, refund_no, 1)
        order_no = format_channel_order_no(self.payment_id, 2)
        return RefundOrder(BANK, sent_no, order_no, self.trade_no, AMOUNT_MINOR, "CNY")


class Figures(NamedTuple):
    """Refunds a second: by processes -> (refunders, the bare client of as many processes)."""

    refunds: int
    rates: Mapping[int, tuple[float, float]]
    facts: Mapping[str, str]


def measure(store: str, db: str | None, count: int, processes: Sequence[int], folder: Path, tell: Any) -> Figures:
    """Owe refunds and let them be sent, then send as many without paycore; each with every number of processes."""
    with opened(store, db, folder) as database:
        _finish(database.url, [])
        rates = {
            number: _measure_one(database, count, number, place, folder / f"{number}", tell)
            for place, number in enumerate(processes)
        }
        return Figures(count, rates, database.facts())


def _measure_one(
    database: Database, count: int, processes: int, place: int, folder: Path, tell: Any
) -> tuple[float, float]:
    folder.mkdir()
    first_ms = now_ms() - 86_400_000 + 2 * place * count
    books = folder / "books.db"
    every = _charge(books, 2 * count, first_ms)
    owed, bare = every[:count], every[count:]
    _write(database.url, owed)
    database.settle()
    with _bank(books, folder) as url:
        tell(f"{processes} processes, bare client")
        bare_rate = count / _bare_seconds(url, bare, processes)
        tell(f"{processes} processes, refunder")
        rate = _refunder_rate(database.url, url, owed, processes, folder)
    return rate, bare_rate


# What is owed


def _charge(books: Path, count: int, first_ms: int) -> list[Owed]:
    """Put paid orders into the bank's books; a payment each millisecond, so that all shares get some."""
    disk, owed = Disk(books), []
    try:
        with disk.transaction():
            for place in range(count):
                created_ms = first_ms + place
                payment_id = (created_ms - ID_EPOCH_MS) << (NODE_BITS + SEQUENCE_BITS) | NODE << SEQUENCE_BITS
                number = format_channel_order_no(payment_id, 2)
                terms = (BANK, number, AMOUNT_MINOR, "CNY", "Tea", "", "redirect")
                order = Order(*terms, created_ms + 600_000, created_ms, OrderState.PAID, "", None, None)
                disk.put_order(order)
                owed.append(Owed(payment_id, disk.add_capture(order, created_ms).trade_no))
    finally:
        disk.close()
    return owed


def _write(url: str, owed: Sequence[Owed]) -> None:
    """Write the payments, each kept by its first attempt, with the refunds of their second captures."""
    rows: dict[str, list[_Row]] = {}
    for one in owed:
        for name, row in _rows(one):
            rows.setdefault(name, []).append(row)
    engine = parse_database_url(url).engine(writes=True)
    with engine.begin() as connection:
        for name, of_table in rows.items():
            table = tables.METADATA.tables[name]
            names = [column.name for column in table.columns]
            connection.execute(insert(table), [dict(zip(names, row, strict=True)) for row in of_table])
    engine.dispose()


def _rows(owed: Owed) -> Iterator[tuple[str, _Row]]:
    payment_id = owed.payment_id
    at_ms = (payment_id >> (NODE_BITS + SEQUENCE_BITS)) + ID_EPOCH_MS
    stamp, money = Stamp(at_ms, 0, 1), (AMOUNT_MINOR, "CNY")
    number, expire_at_ms = f"order-{payment_id}", at_ms + 600_000
    yield "payment", PaymentRow(payment_id, "shop", number, *money, "Tea", "", "0" * 64, expire_at_ms, *stamp)
    yield "merchant_order", ("shop", number, payment_id, *stamp)
    for attempt, account in ((1, "bank_a"), (2, BANK)):
        yield "channel_order", _attempt(payment_id, attempt, account, expire_at_ms, stamp)
    told = (*money, at_ms, at_ms, CaptureSource.NOTIFICATION)
    yield "payment_outcome", OutcomeRow(payment_id, PaymentState.PAID, 1, f"A{payment_id}", *told, 0, 0, *stamp)
    yield "excess_payment", ExcessRow(payment_id, 2, owed.trade_no, NotifyOutcome.DUPLICATE, *told, *stamp)
    refund_no = excess_refund_no(2, owed.trade_no)
    refund = RefundRow(payment_id, refund_no, 2, owed.trade_no, *money, NotifyOutcome.DUPLICATE, *stamp)
    yield "refund", refund
    yield "refund_try", new_try(refund, seq=1, next_at_ms=at_ms, stamp=stamp)


def _attempt(payment_id: int, attempt: int, account: str, expire_at_ms: int, stamp: Stamp) -> ChannelOrderRow:
    return ChannelOrderRow(
        payment_id,
        attempt,
        "simbank",
        account,
        PayMethod.REDIRECT,
        expire_at_ms,
        AttemptState.OPEN,
        stamp.recorded_at_ms,
        "https://bank.example",
        "",
        "",
        None,
        None,
        0,
        "",
        *stamp,
    )


# The bank


@contextmanager
def _bank(books: Path, folder: Path) -> Iterator[str]:
    """Run the banks; give their address."""
    ready = folder / "bank.ready"
    command = [*_paycore("simbank"), "--books", str(books), "--listen", "127.0.0.1:0", "--ready-file", str(ready)]
    with _process(command, {"PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS)}, folder / "bank.log") as bank:
        _wait(lambda: ready.exists() or bank.poll() is not None, "the bank takes requests")
        yield f"http://{json.loads(ready.read_text())['address']}"


def _paycore(verb: str) -> list[str]:
    return [sys.executable, "-m", "paycore.cli", verb]


@contextmanager
def _process(command: Sequence[str], settings: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PAYCORE_")}
    with log.open("ab") as output:
        process = subprocess.Popen(command, env={**environment, **settings}, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(look: Any, what: str) -> None:
    deadline = time.monotonic() + _WAIT_SECONDS
    while not look():
        if time.monotonic() > deadline:
            raise BenchError(f"not seen within {_WAIT_SECONDS} s: {what}")
        time.sleep(0.05)


# Without paycore


def _bare_seconds(url: str, owed: Sequence[Owed], processes: int) -> float:
    """Ask and send from so many processes; return how long the slowest took, without its start."""
    portions = [owed[number::processes] for number in range(processes)]
    command = [sys.executable, "-m", "benchmarks.refund_bench", "--bare", url]
    clients = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in portions]
    for client in clients:
        # All are started before any begins.
        assert client.stdout is not None
        client.stdout.readline()
    for client, portion in zip(clients, portions, strict=True):
        assert client.stdin is not None
        client.stdin.write(json.dumps(portion))
        client.stdin.close()
    told = [client.stdout.read() for client in clients if client.stdout is not None]
    if any(client.wait() for client in clients):
        raise BenchError("a bare client failed")
    return max(float(json.loads(one)["seconds"]) for one in told)


async def _bare_client(url: str, owed: Iterable[Owed]) -> float:
    channel = SimbankChannel(url, SECRETS, 60_000, SystemClock())
    places = asyncio.Semaphore(AT_ONCE)

    async def ask_and_send(order: RefundOrder) -> None:
        async with places:
            assert (await channel.query_refund(order)).answer == RefundAnswer.NOT_EXIST
        async with places:
            assert (await channel.refund(order)).answer == RefundAnswer.REFUNDED

    started_ns = time.perf_counter_ns()
    await asyncio.gather(*(ask_and_send(one.order()) for one in owed))
    seconds = (time.perf_counter_ns() - started_ns) / 1e9
    await channel.aclose()
    return seconds


def _be_bare(url: str) -> int:
    print("ready", flush=True)
    owed = [Owed(*one) for one in json.loads(sys.stdin.read())]
    print(json.dumps({"seconds": asyncio.run(_bare_client(url, owed))}))
    return 0


# With paycore


def _refunder_rate(db: str, bank_url: str, owed: Sequence[Owed], processes: int, folder: Path) -> float:
    """Run so many refunders until all is back; return refunds a second from the first final word to the last."""
    settings = {
        "PAYCORE_DB": db,
        "PAYCORE_SIMBANK_URL": bank_url,
        "PAYCORE_SIMBANK_ACCOUNTS": ",".join(SECRETS),
        "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
        "PAYCORE_SIMBANK_CALLS_PER_SECOND": "100000",
        "PAYCORE_CHANNEL_TIMEOUT_MS": "60000",
        "PAYCORE_REFUND_INTERVAL_MS": "50",
        "PAYCORE_LOG_LEVEL": "warning",
    }
    with ExitStack() as stack:
        for number in range(processes):
            command = [*_paycore("run"), "refunder"]
            stack.enter_context(_process(command, settings, folder / f"refunder-{number}.log"))
        _wait(lambda: len(_finish(db, owed)) == len(owed), "every refund has its final word")
    ended = sorted(_finish(db, owed))
    return (len(ended) - 1) / max((ended[-1] - ended[0]) / 1_000, 0.001)


def _finish(db: str, owed: Sequence[Owed]) -> list[int]:
    """When each of these refunds got its final word, in milliseconds. Raises BenchError where one was refused."""
    result = tables.refund_result
    between = (owed[0].payment_id, owed[-1].payment_id) if owed else (0, 0)
    engine = parse_database_url(db).engine(writes=False)
    with engine.connect() as connection, connection.begin():
        of_these = result.c.payment_id.between(*between)
        other = select(func.count()).select_from(result).where(of_these, result.c.result != RefundState.REFUNDED.value)
        if connection.execute(other).scalar_one():
            raise BenchError("a refund was refused")
        ended = list(connection.execute(select(result.c.recorded_at_ms).where(of_these)).scalars())
    engine.dispose()
    return ended


def main(arguments: Sequence[str]) -> int:
    """Measure and print; ``--json`` prints one object instead."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks refund", description=__doc__)
    parser.add_argument("--count", type=int, default=2_000, help="refunds (default 2,000)")
    parser.add_argument("--processes", default="1,4", help="how many refunders, one figure each (default 1,4)")
    parser.add_argument("--store", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--db", help="a database of your own, empty")
    parser.add_argument("--folder", help="where files are made: a local disk")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.bare:
        return _be_bare(options.bare)
    processes = [int(number) for number in options.processes.split(",")]
    with tempfile.TemporaryDirectory(prefix="paycore-bench-", dir=options.folder) as folder:
        log = Console(stderr=True).log
        figures = measure(options.store, options.db, options.count, processes, Path(folder), log)
    _print(figures, as_json=options.json)
    return 0


def _print(figures: Figures, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_as_object(figures)))
        return
    machine.show(Console())
    for name, value in figures.facts.items():
        print(f"{name:>12}  {value}")
    for number, (rate, bare) in figures.rates.items():
        of_bare = f"{rate / bare:.2f} of the bare client's {bare:,.0f}"
        print(f"{figures.refunds:,} refunds, {number} processes: {rate:,.0f} refunds/s, {of_bare}")


def _as_object(figures: Figures) -> dict[str, Any]:
    rate, bare_rate = max(figures.rates.values())
    return {
        "benchmark": "refund",
        "unit": "refunds",
        "count": figures.refunds,
        "rate": rate,
        "baseline_rate": bare_rate,
        "rates": {str(number): {"refunder": both[0], "bare": both[1]} for number, both in figures.rates.items()},
        "machine": {**machine.describe(), **figures.facts},
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
