"""Durable notifications a second: ``paycore serve`` beside an empty handler and the bare store, in one run.

The baseline is a grpc.aio handler that does nothing with the same messages: what gRPC itself moves. The limit is the
bare store: the same rows, as many in a commit as the server reached, alone in a process. What the words became is
asked three times, of the answers, of the server's metrics and of the database; where they are not exactly what
was sent, there is no figure.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from paycore.bench import bare_store
from paycore.bench.counts import Counted, Phase, accepted, check, mixed
from paycore.bench.databases import Database, now_ms, opened
from paycore.bench.empty_server import BATCH_METHOD, METHOD
from paycore.bench.load import Load, Loaded, Messages
from paycore.bench.payments import Cycle, Lot
from paycore.bench.processes import Cores, Server, choose_cores, empty_server, paycore_server
from paycore.bench.result import CountError, Progress, Result, Row
from paycore.bench.words import (
    BLOCK,
    DUPLICATES,
    LATE,
    PAYMENTS_A_BLOCK,
    UNKNOWN,
    Said,
    Writer,
    first_words,
    mixed_words,
)

AGE_MS = 60_000
"""How long ago the last payment was made: its pay time lies in the past."""

IDLE_WORDS = 1_000
ALONE_MESSAGES = 200
NOT_CLEAN = Cycle(PAYMENTS_A_BLOCK, DUPLICATES, LATE)


class Options(NamedTuple):
    """What to measure. store: ``sqlite`` or ``postgresql``. db: a URL to use in place of a database made for it.

    words: how many are measured. batch: of them in a message; 1 is unary Notify. in_flight: messages; None: as many as
    suit the batch. dirty: measure the stream that is not clean as well. open_loop: words a second, 0 for half of what
    was reached, None: leave it out. idle: measure messages that are alone, of one word and of a batch, as well.
    existing: payments, paid, that the database holds before. pinned: server, load on a core each.
    """

    store: str
    folder: Path
    db: str | None = None
    batch: int = 1_000
    words: int = 200_000
    in_flight: int | None = None
    connections: int = 1
    evidence: bool = False
    dirty: bool = False
    open_loop: int | None = None
    idle: bool = False
    existing: int = 0
    workers: int = 1
    pinned: bool = False
    flags: tuple[str, ...] = ()

    @property
    def messages_in_flight(self) -> int:
        """As asked, or enough to keep a server busy whose queue takes 100,000 words."""
        return self.in_flight or min(max(8_000 // self.batch, 8), 128)

    @property
    def alone_words(self) -> int:
        """How many words go in messages that are alone: not more than are measured otherwise."""
        return min(ALONE_MESSAGES * self.batch, self.words)


class Lots(NamedTuple):
    """The payments of a run, each lot made after the one before; ``bare`` and ``nobodys`` are never written."""

    existing: Lot
    clean: Lot
    dirty: Lot
    open_loop: Lot
    idle: Lot
    alone: Lot
    nobodys: Lot
    bare: Lot

    @classmethod
    def lay_out(cls, options: Options) -> "Lots":
        """Let the last of them be made ``AGE_MS`` ago."""
        blocks = max(1, options.words // BLOCK) if options.dirty else 0
        counts = [options.existing, options.words, blocks * PAYMENTS_A_BLOCK]
        counts += [options.words if options.open_loop is not None else 0]
        counts += [IDLE_WORDS, options.alone_words] if options.idle else [0, 0]
        counts += [max(1, blocks * UNKNOWN), options.words]
        lots, at_ms = [], 0
        for node, count in enumerate(counts, start=1):
            lots.append(Lot(at_ms, count, node))
            at_ms = lots[-1].end_ms
        start_ms = now_ms() - AGE_MS - at_ms
        existing, clean, dirty, *rest = (lot._replace(first_ms=start_ms + lot.first_ms) for lot in lots)
        return cls(existing._replace(paid=True), clean, dirty._replace(cycle=NOT_CLEAN), *rest)

    def written(self) -> Iterator[Lot]:
        """Those that are in the database when the server starts."""
        return (lot for lot in self[:6] if lot.size)

    @property
    def heard(self) -> int:
        """How many payments words are about."""
        return sum(lot.size for lot in self[1:6])

    @property
    def paid_at_seconds(self) -> int:
        """When all words say that the user paid: after the last payment was made."""
        return self.bare.end_ms // 1_000 + 1


def main(options: Options, progress: Progress) -> Result:
    """Prepare, measure, and return the figures. Raises BenchError where there are none."""
    lots = Lots.lay_out(options)
    with opened(options.store, options.db, options.folder) as database:
        _prepare(database, lots, progress)
        facts = database.facts()
        words = Words(options, lots)
        return Bench(options, lots, words, database, progress).run(facts)


def _prepare(database: Database, lots: Lots, progress: Progress) -> None:
    written = list(lots.written())
    progress.phase("write payments", sum(lot.size for lot in written))
    before = 0
    for lot in written:
        database.write(lot, lambda done, before=before: progress.done(before + done))  # type: ignore[misc]
        before += lot.size
    database.settle()


class Words:
    """The messages of a run, written into files."""

    def __init__(self, options: Options, lots: Lots) -> None:
        self._options = options
        self._lots = lots
        self._writer = Writer(lots.paid_at_seconds, evidence=options.evidence)

    def clean(self) -> Messages:
        """The first word about each payment."""
        return self._write("clean", first_words(self._lots.clean), self._lots.clean.size, self._options.batch)

    def dirty(self) -> Messages:
        """The stream that is not clean."""
        count = self._lots.dirty.size // PAYMENTS_A_BLOCK * BLOCK
        return self._write("dirty", mixed_words(self._lots.dirty, self._lots.nobodys), count, self._options.batch)

    def open_loop(self) -> Messages:
        """First words once more, about payments of their own."""
        lot = self._lots.open_loop
        return self._write("open_loop", first_words(lot), lot.size, self._options.batch)

    def idle(self) -> Messages:
        """First words, each in a NotifyBatch of its own."""
        lot = self._lots.idle
        return self._write("idle", first_words(lot), lot.size, 1, method=BATCH_METHOD)

    def alone(self) -> Messages:
        """First words, in messages like those of the clean stream."""
        lot = self._lots.alone
        return self._write("alone", first_words(lot), lot.size, self._options.batch)

    def word_bytes(self) -> int:
        """The size of a word."""
        return len(self._writer.word(next(first_words(self._lots.clean))))

    def _write(self, name: str, said: Iterable[Said], words: int, batch: int, method: str | None = None) -> Messages:
        path = self._options.folder / f"{name}.words"
        if method is None:
            method = METHOD if batch == 1 else BATCH_METHOD
        if method == METHOD:
            return Messages.write(path, method, map(self._writer.word, said), words)
        return Messages.write(path, method, map(self._writer.batch, batched(said, batch)), words)


class Bench:
    """The measurements of a run."""

    def __init__(self, options: Options, lots: Lots, words: Words, database: Database, progress: Progress) -> None:
        self._options = options
        self._lots = lots
        self._words = words
        self._database = database
        self._progress = progress
        self._cores = choose_cores() if options.pinned else Cores(None, None)
        self._rows: list[Row] = []

    def run(self, facts: Mapping[str, str]) -> Result:
        """Measure everything."""
        options = self._options
        clean = self._words.clean()
        baseline_rate = self._measure_empty(clean)
        with self._serving() as server:
            loaded, group = self._measure(server, self._clean_phase(clean), self._load())
            more = self._measure_more(server, loaded.rate)
        self._progress.phase("bare store", 0)
        limit_rate = bare_store.measure(self._database.url, self._lots.bare, max(1, round(group)), self._cores.server)
        meaning = f"the same rows into the same table, {group:,.0f} in a commit, alone in a process: the limit"
        self._rows.append(Row("bare store", meaning, limit_rate))
        rows = [row._replace(of_limit=row.rate / limit_rate if row.rate else None) for row in self._rows]
        load = f"{options.messages_in_flight} messages in flight on {options.connections} connection(s)"
        return Result(
            benchmark="notify",
            unit="notifications",
            rate=loaded.rate,
            baseline_rate=baseline_rate,
            limit_rate=limit_rate,
            p50_ms=loaded.latency_ms(0.5),
            p99_ms=loaded.latency_ms(0.99),
            size=options.words,
            rows=rows,
            facts={
                **facts,
                "payments": f"{options.existing:,} in the database before, time-ordered",
                "words": f"{self._words.word_bytes()} bytes each, {options.batch:,} a message",
                "load": load,
                "cores": self._cores.description if options.pinned else "shared by load, server and database",
                "workers": str(options.workers),
                "refunds": "written with their notifications, not sent: nobody is behind the bank",
            },
            more={
                "store": options.store,
                "batch": options.batch,
                "in_flight": options.messages_in_flight,
                "workers": options.workers,
                "existing": options.existing,
                "group": group,
                **more,
            },
        )

    @contextmanager
    def _serving(self) -> Iterator[Server]:
        options = self._options
        # So that the payments of the run are those that the server reads into its index at its start.
        flags = ["--warm-payments", str(max(1, self._lots.heard))]
        # Nobody is behind the bank: refunds are written, and would be tried again and again if they were sent.
        flags += ["--refund-interval-ms", "600000", *options.flags]
        flags += ["--workers", str(options.workers)] if options.workers > 1 else []
        self._progress.phase("start the server", 0)
        with paycore_server(self._database.url, options.folder, self._cores.server, flags) as server:
            yield server

    def _load(self, rate: float | None = None) -> Load:
        options = self._options
        return Load(options.messages_in_flight, options.connections, rate, self._cores.load)

    def _measure_empty(self, messages: Messages) -> float:
        done = self._phase("empty handler", messages)
        with empty_server(self._options.folder, self._cores.server, self._options.batch) as server:
            loaded = self._load().run(server.address, messages, done, read=False)
        if loaded.answers != messages.number:
            raise CountError(f"empty handler: {loaded.answers} of {messages.number} messages were answered")
        meaning = "grpc.aio, the same messages in and the same bytes out, nothing done: the baseline"
        self._rows.append(Row("empty handler", meaning, loaded.rate, loaded.latency_ms(0.5), loaded.latency_ms(0.99)))
        return loaded.rate

    def _clean_phase(self, messages: Messages) -> Phase:
        return Phase(
            "first words",
            "each heard for the first time and kept by one durable insert",
            messages,
            accepted(messages.words),
        )

    def _measure_more(self, server: Server, rate: float) -> dict[str, float]:
        more: dict[str, float] = {}
        options = self._options
        if options.dirty:
            blocks = self._lots.dirty.size // PAYMENTS_A_BLOCK
            meaning = "1% duplicates, 1% replays, 0.5% late, 0.1% about unknown orders"
            phase = Phase("not clean", meaning, self._words.dirty(), mixed(blocks))
            more["dirty_rate"] = self._measure(server, phase, self._load())[0].rate
        if options.open_loop is not None:
            more |= self._measure_open_loop(server, options.open_loop or rate / 2)
        if options.idle:
            messages, one_by_one = self._words.idle(), Load(1, core=self._cores.load)
            phase = Phase("idle", "a NotifyBatch of one, one after another", messages, accepted(messages.words))
            more |= latencies("idle", self._measure(server, phase, one_by_one)[0])
            messages = self._words.alone()
            meaning = (
                f"{options.batch:,} a message, one message after another: what it takes without waiting for others"
            )
            phase = Phase("alone", meaning, messages, accepted(messages.words))
            loaded, _ = self._measure(server, phase, one_by_one)
            more |= {"alone_rate": loaded.rate, **latencies("alone", loaded)}
        return more

    def _measure_open_loop(self, server: Server, asked: float) -> dict[str, float]:
        messages = self._words.open_loop()
        meaning = f"{asked:,.0f} a second asked for, leaving at random moments (Poisson)"
        phase = Phase("open loop", meaning, messages, accepted(messages.words))
        loaded, _ = self._measure(server, phase, self._load(rate=asked / self._options.batch))
        told = {"open_loop_asked_rate": asked, "open_loop_rate": loaded.rate, **latencies("open_loop", loaded)}
        return told | {f"open_loop_{name}": value for name, value in lateness(loaded).items()}

    def _measure(self, server: Server, phase: Phase, load: Load) -> tuple[Loaded, float]:
        """Run a phase; return what came of it and how many words went into one commit."""
        loaded, group, cpu_us = self._check(server, phase, load)
        more = {"group": group} | ({} if cpu_us is None else {"cpu_us": cpu_us})
        more |= {name.replace("_", " "): value for name, value in lateness(loaded).items()}
        p50_ms, p99_ms = loaded.latency_ms(0.5), loaded.latency_ms(0.99)
        self._rows.append(Row(phase.name, phase.meaning, loaded.rate, p50_ms, p99_ms, more=more))
        return loaded, group

    def _check(self, server: Server, phase: Phase, load: Load) -> tuple[Loaded, float, float | None]:
        before = Counted.now(server, self._database)
        loaded = load.run(server.address, phase.messages, self._phase(phase.name, phase.messages))
        after = Counted.now(server, self._database)
        check(phase, loaded, before, after)
        cpu_us = None
        if before.cpu_seconds is not None and after.cpu_seconds is not None:
            cpu_us = (after.cpu_seconds - before.cpu_seconds) / phase.messages.words * 1e6
        return loaded, phase.messages.words / max(1.0, after.commits - before.commits), cpu_us

    def _phase(self, name: str, messages: Messages) -> Callable[[int], None]:
        self._progress.phase(name, messages.words)
        return lambda done: self._progress.done(done * messages.words // messages.number)


def latencies(what: str, loaded: Loaded) -> dict[str, float]:
    """The latencies of a phase, as they are told beside the rates."""
    return {f"{what}_p50_ms": loaded.latency_ms(0.5), f"{what}_p99_ms": loaded.latency_ms(0.99)}


def lateness(loaded: Loaded) -> dict[str, float]:
    """How late the load itself was; nothing in closed loop, where no message has a moment of its own."""
    if not loaded.late_ns:
        return {}
    return {"client_late_p50_ms": loaded.late_ms(0.5), "client_late_p99_ms": loaded.late_ms(0.99)}


def batched(said: Iterable[Said], size: int) -> Iterator[list[Said]]:
    """The words of each message."""
    words = iter(said)
    while batch := list(itertools.islice(words, size)):
        yield batch
