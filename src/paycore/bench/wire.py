"""Notifications from bytes to answers on one processor, without a database: what decoding and encoding cost.

The baseline is Python's protobuf library: the message parsed, and the ten fields of each word read, as a handler has to
that decides about them. The limit is the decoding alone: whoever decides and answers has to do that first.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from paycore._dedupe import Index
from paycore._group import Group
from paycore._wire import Decoder
from paycore.bench.databases import now_ms
from paycore.bench.payments import CHANNEL, CURRENCY, VALIDITY_MS, Lot, account, amount_minor
from paycore.bench.result import BenchError, Progress, Result, Row, percentile_ms
from paycore.bench.words import Writer, first_words
from paycore.domain.ids import created_at_ms
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.verdicts import PaymentState
from paycore.v1 import payment_service_pb2

AGE_MS = 60_000
MAX_BATCH = 10_000
PARSE, DECODE, DECIDE = "protobuf parse, fields read", "decode", "decode, decide, encode"


class Options(NamedTuple):
    """What to measure. batch: words a message. words: in each round. rounds: of which medians are taken."""

    batch: int = 1_000
    words: int = 200_000
    rounds: int = 7
    evidence: bool = False


class Stage(NamedTuple):
    """One thing to do with each message, and what it must come to: a check sum over a whole round."""

    name: str
    meaning: str
    run: Callable[[bytes], int]
    expected: int


class Timed(NamedTuple):
    """The median round's words a second of CPU time, and the latencies of all messages, sorted."""

    rate: float
    latencies_ns: list[int]

    def row(self, stage: Stage) -> Row:
        """The line of the table."""
        p50_ms, p99_ms = (percentile_ms(self.latencies_ns, share) for share in (0.5, 0.99))
        return Row(stage.name, stage.meaning, self.rate, p50_ms, p99_ms)


def main(options: Options, progress: Progress) -> Result:
    """Measure all stages in turn, round by round. Raises BenchError where one does not come to what it must."""
    lot = Lot(now_ms() - AGE_MS - options.words, options.words // options.batch * options.batch or options.batch, 1)
    writer = Writer(lot.end_ms // 1_000 + 1, evidence=options.evidence)
    said = list(first_words(lot))
    messages = [writer.batch(said[start : start + options.batch]) for start in range(0, len(said), options.batch)]
    stages = make_stages(lot)
    timed = measure(stages, messages, lot.size, options.rounds, progress)
    baseline, limit, whole = timed[PARSE], timed[DECODE], timed[DECIDE]
    rows = [timed[stage.name].row(stage)._replace(of_limit=timed[stage.name].rate / limit.rate) for stage in stages]
    return Result(
        benchmark="wire",
        unit="notifications",
        rate=whole.rate,
        baseline_rate=baseline.rate,
        limit_rate=limit.rate,
        p50_ms=percentile_ms(whole.latencies_ns, 0.5),
        p99_ms=percentile_ms(whole.latencies_ns, 0.99),
        size=lot.size,
        rows=rows,
        facts={
            "words": f"{len(writer.word(said[0]))} bytes each, {options.batch:,} a message",
            "rounds": f"medians of {options.rounds} interleaved rounds, CPU time of one thread",
        },
        more={"decode_rate": limit.rate, "decode_times_baseline": limit.rate / baseline.rate, "batch": options.batch},
    )


def measure(
    stages: Sequence[Stage], messages: Sequence[bytes], words: int, rounds: int, progress: Progress
) -> Mapping[str, Timed]:
    """Run every stage once a round, in turn."""
    seconds: dict[str, list[float]] = {stage.name: [] for stage in stages}
    latencies_ns: dict[str, list[int]] = {stage.name: [] for stage in stages}
    progress.phase("rounds", rounds)
    for number in range(rounds):
        for stage in stages:
            total, own_ns, started_ns = 0, latencies_ns[stage.name], time.thread_time_ns()
            for message in messages:
                before_ns = time.perf_counter_ns()
                total += stage.run(message)
                own_ns.append(time.perf_counter_ns() - before_ns)
            seconds[stage.name].append((time.thread_time_ns() - started_ns) / 1e9)
            if total != stage.expected:
                raise BenchError(f"{stage.name}: came to {total}, not {stage.expected}")
        progress.done(number + 1)
    return {
        name: Timed(words / statistics.median(taken), sorted(latencies_ns[name])) for name, taken in seconds.items()
    }


def make_stages(lot: Lot) -> list[Stage]:
    """What is measured: the baseline first, then ever more of what the server does."""
    codes = {(CHANNEL, account(attempt)): attempt for attempt in (1, 2, 3)}
    decoder, index, received_at_ms = Decoder(codes, CURRENCY_CODES), filled_index(lot, codes), now_ms()

    def parse(message: bytes) -> int:
        return sum(map(read_fields, payment_service_pb2.NotifyBatchRequest.FromString(message).notifications))

    def decode(message: bytes) -> int:
        return len(decoder.notify_batch(message, received_at_ms, MAX_BATCH))

    def decide(message: bytes) -> int:
        batch = decoder.notify_batch(message, received_at_ms, MAX_BATCH)
        index.begin()
        group = Group(index, [(batch, 0, len(batch))])
        unknown = group.missing()
        accepted = group.accept()
        batch.encode()
        # Not kept, so that the same words are first words in the next round again.
        index.rollback()
        return accepted - len(unknown)

    parsed = "Python's protobuf library, ten fields of each word: the baseline"
    decided = "and each checked with the index and marked in it, and all answers as bytes"
    return [
        Stage(PARSE, parsed, parse, lot.size),
        Stage(DECODE, "bytes to C records: the limit", decode, lot.size),
        Stage(DECIDE, decided, decide, lot.size),
    ]


def filled_index(lot: Lot, codes: dict[tuple[str, str], int]) -> Index:
    """The index with all payments, each open with one attempt."""
    index = Index(capacity=lot.size)
    for payment_id in lot.ids():
        currency, expire_at_ms = CURRENCY_CODES[CURRENCY], created_at_ms(payment_id) + VALIDITY_MS
        opened = (codes[CHANNEL, account(1)],)
        index.put(payment_id, amount_minor(payment_id), currency, expire_at_ms, PaymentState.OPEN, 0, 1, 0, opened)
    return index


def read_fields(request: payment_service_pb2.NotifyRequest) -> int:
    """Read what a decision needs; return 1."""
    _ = request.channel, request.account, request.channel_order_no, request.result
    _ = request.amount_minor, request.currency, request.channel_trade_no
    if request.HasField("paid_at"):
        _ = request.paid_at.seconds, request.paid_at.nanos
    _ = request.raw, dict(request.headers)
    return 1
