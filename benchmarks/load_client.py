"""One process of load with grpc.aio, for where h2load is not installed; started by ``notify_load.GrpcLoad``.

Connects, prints ``ready``, waits for a line, sends its bodies, and writes what it saw to a file of 64-bit integers:
start and latency of each call in microseconds, then the bytes of all answers. A call that fails ends it with an error.
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import grpc.aio

from paycore.bench.empty_server import loop_factory

CONNECT_SECONDS = 30
FRAME_HEAD_BYTES = 5


class Sender:
    """The bodies that are left, and what came of those that were sent."""

    def __init__(self, call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], bodies: Iterator[bytes]) -> None:
        self._call = call
        self._bodies = bodies
        self.seen = array("q")
        self.answer_bytes = 0

    async def send(self) -> None:
        """Send one body after another while there are any."""
        for body in self._bodies:
            started_ns = time.perf_counter_ns()
            answer = await self._call(body)
            latency_ns = time.perf_counter_ns() - started_ns
            self.seen.extend((started_ns // 1_000, latency_ns // 1_000))
            self.answer_bytes += len(answer)


async def run(address: str, method: str, bodies: list[bytes], in_flight: int) -> array[int]:
    """Send all bodies and return what is to be written."""
    async with grpc.aio.insecure_channel(address) as channel:
        await asyncio.wait_for(channel.channel_ready(), CONNECT_SECONDS)
        sender = Sender(channel.unary_unary(method), iter(bodies))
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        async with asyncio.TaskGroup() as group:
            for _ in range(in_flight):
                group.create_task(sender.send())
    sender.seen.append(sender.answer_bytes)
    return sender.seen


def read_bodies(path: Path, size: int, start: int, end: int) -> list[bytes]:
    """The messages from ``start`` to before ``end``, without their framing."""
    with path.open("rb") as file:
        file.seek(start * size)
        return [file.read(size)[FRAME_HEAD_BYTES:] for _ in range(start, end)]


if __name__ == "__main__":
    target, method_path, bodies_path, *numbers, results_path = sys.argv[1:]
    body_size, first, last, calls = map(int, numbers)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        told = runner.run(run(target, method_path, read_bodies(Path(bodies_path), body_size, first, last), calls))
    Path(results_path).write_bytes(told.tobytes())
