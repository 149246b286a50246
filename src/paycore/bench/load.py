"""Load in a process of its own: sends messages that were made before, and takes down how long each answer took.

``Load.run`` starts ``python -m paycore.bench.load``, which connects, says ``ready``, waits for a line, sends, says
how far it is, and at the end what came, as JSON. Only then are the answers read: timing is over.

Closed loop: so many messages are in flight, each answer makes room for the next. Open loop: messages leave at moments
drawn beforehand whatever the server does, and a latency counts from the moment at which its message should have left.
How late this process itself was to send is told apart: where load and server share processors, that is no small part
of a latency, and an answer waits for this process about as long again. Nothing is subtracted.
"""

import asyncio
import gc
import json
import random
import struct
import subprocess
import sys
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grpc.aio

from paycore.bench.empty_server import BATCH_METHOD, loop_factory
from paycore.bench.processes import pinned_to
from paycore.bench.result import BenchError, percentile_ms
from paycore.v1 import payment_pb2, payment_service_pb2

CALL_SECONDS = 120
_LENGTH = struct.Struct("<I")
_TELL_SECONDS = 0.1
_SEED = 1


class LoadError(BenchError):
    """The load did not run as asked: a call failed, or the process that makes it did."""


class Messages(NamedTuple):
    """Messages in a file, each after its length. number: of messages. words: in all of them."""

    path: Path
    method: str
    number: int
    words: int

    @classmethod
    def write(cls, path: Path, method: str, messages: Iterable[bytes], words: int) -> "Messages":
        """Write messages into a file."""
        number = 0
        with path.open("wb") as file:
            for message in messages:
                file.write(_LENGTH.pack(len(message)) + message)
                number += 1
        return cls(path, method, number, words)

    def read(self) -> Iterator[bytes]:
        """The messages, one after another."""
        data = memoryview(self.path.read_bytes())
        place = 0
        while place < len(data):
            (length,) = _LENGTH.unpack_from(data, place)
            place += _LENGTH.size
            yield bytes(data[place : place + length])
            place += length


class Loaded(NamedTuple):
    """What came of a run. seconds: from the first message's start to the last one's end.

    outcomes: how many words were answered with which (outcome, replayed). latencies_ns: of each message, sorted.
    late_ns: open loop, how long after its moment each message was handed to gRPC, sorted; part of its latency.
    """

    seconds: float
    words: int
    answers: int
    answer_bytes: int
    outcomes: dict[tuple[str, str], int]
    latencies_ns: list[int]
    late_ns: Sequence[int] = ()

    @property
    def rate(self) -> float:
        """Words a second."""
        return self.words / self.seconds

    def latency_ms(self, share: float) -> float:
        """The latency that this share of the messages did not exceed."""
        return percentile_ms(self.latencies_ns, share)

    def late_ms(self, share: float) -> float:
        """The lateness of the load itself that this share of the messages did not exceed; of open loop alone."""
        return percentile_ms(self.late_ns, share)


class Load(NamedTuple):
    """How load is made. rate: messages a second in open loop; None: closed loop with ``in_flight``.

    connections: HTTP/2 connections that messages take in turn. core: where the load runs; None: anywhere.
    """

    in_flight: int
    connections: int = 1
    rate: float | None = None
    core: int | None = None
    connect_seconds: int = 60

    def run(self, address: str, messages: Messages, done: Callable[[int], None], *, read: bool = True) -> Loaded:
        """Send each message once. ``done`` is told how many are answered; ``read``: look at the answers. LoadError."""
        told = {"address": address, "messages": [str(messages.path), *messages[1:]], "read": read}
        asked = json.dumps(told | self._asdict())
        with pinned_to(self.core):
            process = subprocess.Popen(
                [sys.executable, "-m", "paycore.bench.load", asked],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        with process:
            try:
                return _follow(process, done, messages.words)
            finally:
                process.kill()


def _follow(process: "subprocess.Popen[str]", done: Callable[[int], None], words: int) -> Loaded:
    assert process.stdin is not None, "it was asked for"
    assert process.stdout is not None, "it was asked for"
    for line in process.stdout:
        what, _, rest = line.partition(" ")
        if what == "ready\n":
            process.stdin.write("go\n")
            process.stdin.flush()
        elif what == "done":
            done(int(rest))
        else:
            told = json.loads(rest)
            outcomes = {(outcome, replayed): count for outcome, replayed, count in told["outcomes"]}
            counts = told["seconds"], words, told["answers"], told["answer_bytes"]
            return Loaded(*counts, outcomes, told["latencies_ns"], told["late_ns"])
    assert process.stderr is not None, "it was asked for"
    raise LoadError(f"the load failed: {process.stderr.read()[-2000:]}")


class _Sender:
    """Sends from within the process of load."""

    def __init__(self, calls: "list[grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]]", messages: list[bytes]) -> None:
        self._calls = calls
        self._messages = messages
        self.latencies_ns = array("q")
        self.late_ns = array("q")
        self.answers: list[bytes] = []

    async def closed(self, in_flight: int) -> float:
        """Keep so many in flight; return the seconds that it took."""
        waiting = iter(enumerate(self._messages))

        async def send() -> None:
            for number, message in waiting:
                await self._send(number, message, time.perf_counter_ns())

        started_ns = time.perf_counter_ns()
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(send())
        return (time.perf_counter_ns() - started_ns) / 1e9

    async def open(self, rate: float) -> float:
        """Send at moments drawn for this rate; return the seconds that it took."""
        chance = random.Random(_SEED)  # noqa: S311 - when to send is no secret
        started_ns = due_ns = time.perf_counter_ns()
        async with asyncio.TaskGroup() as group:
            for number, message in enumerate(self._messages):
                due_ns += int(chance.expovariate(rate) * 1e9)
                # Again where the loop, whose clock ticks in milliseconds, came back early.
                while (ahead_ns := due_ns - time.perf_counter_ns()) > 0:  # noqa: ASYNC110 - time alone is waited for
                    await asyncio.sleep(ahead_ns / 1e9)
                group.create_task(self._send_late(number, message, due_ns))
        return (time.perf_counter_ns() - started_ns) / 1e9

    async def _send_late(self, number: int, message: bytes, due_ns: int) -> None:
        self.late_ns.append(time.perf_counter_ns() - due_ns)
        await self._send(number, message, due_ns)

    async def _send(self, number: int, message: bytes, since_ns: int) -> None:
        answer = await self._calls[number % len(self._calls)](message, timeout=CALL_SECONDS)
        self.latencies_ns.append(time.perf_counter_ns() - since_ns)
        self.answers.append(answer)

    async def tell(self) -> None:
        """Say how far it is, until cancelled."""
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            print("done", len(self.answers), flush=True)  # noqa: T201 - the parent reads it


def _read_outcomes(method: str, answers: Iterable[bytes]) -> list[tuple[str, str, int]]:
    counts: Counter[tuple[int, bool]] = Counter()
    for data in answers:
        if method == BATCH_METHOD:
            batch = payment_service_pb2.NotifyBatchResponse.FromString(data)
            counts.update((answer.outcome, answer.replayed) for answer in batch.answers)
        else:
            answer = payment_service_pb2.NotifyResponse.FromString(data)
            counts[answer.outcome, answer.replayed] += 1
    return [
        (payment_pb2.NotifyOutcome.Name(outcome).removeprefix("NOTIFY_OUTCOME_"), str(replayed).lower(), count)  # type: ignore[arg-type]
        for (outcome, replayed), count in counts.items()
    ]


async def _run(address: str, messages: Messages, load: Load, *, read: bool) -> dict[str, object]:
    bodies = list(messages.read())
    # A pool of subchannels of their own gives each channel a connection of its own.
    options = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))
    channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(load.connections)]
    for channel in channels:
        await asyncio.wait_for(channel.channel_ready(), load.connect_seconds)
    sender = _Sender([channel.unary_unary(messages.method) for channel in channels], bodies)
    gc.freeze()
    print("ready", flush=True)  # noqa: T201 - the parent reads it
    await asyncio.to_thread(sys.stdin.readline)
    telling = asyncio.create_task(sender.tell())
    seconds = await (sender.closed(load.in_flight) if load.rate is None else sender.open(load.rate))
    telling.cancel()
    for channel in channels:
        await channel.close()
    return {
        "seconds": seconds,
        "answers": len(sender.answers),
        "answer_bytes": sum(map(len, sender.answers)),
        "outcomes": _read_outcomes(messages.method, sender.answers) if read else [],
        "latencies_ns": sorted(sender.latencies_ns),
        "late_ns": sorted(sender.late_ns),
    }


def _main(asked: str) -> None:
    told = json.loads(asked)
    path, *rest = told.pop("messages")
    messages = Messages(Path(path), *rest)
    address, read = told.pop("address"), told.pop("read")
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        result = runner.run(_run(address, messages, Load(**told), read=read))
    print("result", json.dumps(result), flush=True)  # noqa: T201 - the parent reads it


if __name__ == "__main__":
    _main(sys.argv[1])
