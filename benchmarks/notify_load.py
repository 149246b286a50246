"""Load for a unary method: h2load where it is installed, else processes of our own with grpc.aio.

Both are closed loops: so many calls are in flight, and each answer makes room for the next call. Both send each body
of a file once, and are pinned to the core that is given.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from array import array
from pathlib import Path
from typing import NamedTuple, Protocol

from benchmarks import machine
from benchmarks.notify_cases import Bodies
from paycore.bench.processes import pinned_to

SECONDS = 600
CONNECTIONS = 8
CALLS_PER_CONNECTION = 16
IN_FLIGHT = CONNECTIONS * CALLS_PER_CONNECTION
CLIENT_PROCESSES = 2
FRAME_HEAD_BYTES = 5
BODIES_SOURCE = Path(__file__).with_name("h2load_bodies.c")


class LoadError(Exception):
    """The load did not run as asked: a call failed, or a program did."""


class Loaded(NamedTuple):
    """What came of one run of load. seconds: from the first call's start to the last one's end.

    answer_bytes: of all answers' messages, without their framing. latencies_us: sorted.
    """

    seconds: float
    answer_bytes: int
    latencies_us: list[int]

    @property
    def rate(self) -> float:
        """Calls a second."""
        return len(self.latencies_us) / self.seconds

    def latency_ms(self, share: float) -> float:
        """The latency that this share of the calls did not exceed."""
        return self.latencies_us[min(int(share * len(self.latencies_us)), len(self.latencies_us) - 1)] / 1_000


class Load(Protocol):
    """A way to make load."""

    @property
    def description(self) -> str:
        """What makes it, and how many calls are in flight."""
        ...

    def run(self, address: str, method: str, bodies: Bodies) -> Loaded:
        """Send each body once. Raises LoadError unless every call is answered."""
        ...


def loaded(starts_us: array[int], latencies_us: array[int], answer_bytes: int) -> Loaded:
    """Put together what is known of each call."""
    ends_us = map(int.__add__, starts_us, latencies_us)
    return Loaded((max(ends_us) - min(starts_us)) / 1e6, answer_bytes, sorted(latencies_us))


class H2Load:
    """h2load of nghttp2, one thread, with ``h2load_bodies.c`` so that each request has a body of its own.

    It counts HTTP statuses and does not see gRPC's: what the calls became, the server has to be asked.
    Raises LoadError where there is no h2load, or no compiler for the few lines of C.
    """

    def __init__(self, folder: Path, core: int | None) -> None:
        if shutil.which("h2load") is None:
            raise LoadError("h2load is not installed (Debian: nghttp2-client)")
        self._folder = folder
        self._core = core
        self._library = folder / "h2load_bodies.so"
        command = [machine.compiler(), "-O2", "-shared", "-fPIC", "-o", str(self._library), str(BODIES_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise LoadError(f"h2load's bodies need a C compiler: {error}") from None
        said = subprocess.run(["h2load", "--version"], check=True, capture_output=True, text=True)
        self._version = said.stdout.strip()

    @property
    def description(self) -> str:
        return f"h2load ({self._version}), {CONNECTIONS} connections with {CALLS_PER_CONNECTION} calls each in flight"

    def run(self, address: str, method: str, bodies: Bodies) -> Loaded:
        log, first = self._folder / "h2load.log", self._folder / "first_body"
        log.unlink(missing_ok=True)
        with bodies.path.open("rb") as file:
            first.write_bytes(file.read(bodies.size))
        command = ["h2load", "-t", "1", "-n", str(bodies.messages), "-c", str(min(CONNECTIONS, bodies.messages))]
        command += ["-m", str(CALLS_PER_CONNECTION), "-d", str(first), "--log-file", str(log)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{address}{method}"]
        environment = {
            "LD_PRELOAD": str(self._library),
            "BODIES_FILE": str(bodies.path),
            "BODIES_SIZE": str(bodies.size),
        }
        with pinned_to(self._core):
            ended = subprocess.run(
                command, check=False, env=os.environ | environment, capture_output=True, text=True, timeout=SECONDS
            )
        counted = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", ended.stdout)
        if ended.returncode != 0 or counted is None or counted.groups() != (str(bodies.messages), "0", "0", "0"):
            raise LoadError(f"h2load: {ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        data = re.search(r"\((\d+)\) data", ended.stdout)
        assert data is not None, "h2load tells how much data came"
        starts_us, latencies_us = array("q"), array("q")
        for line in log.read_text().splitlines():
            start_us, _, latency_us = line.split("\t")
            starts_us.append(int(start_us))
            latencies_us.append(int(latency_us))
        return loaded(starts_us, latencies_us, int(data[1]) - FRAME_HEAD_BYTES * bodies.messages)


class GrpcLoad:
    """Processes of our own with grpc.aio clients and serialised requests (``load_client.py``).

    Such a client costs about as much a call as the empty handler does: on one core, it may be what bounds both.
    """

    def __init__(self, folder: Path, core: int | None) -> None:
        self._folder = folder
        self._core = core

    @property
    def description(self) -> str:
        in_flight = IN_FLIGHT // CLIENT_PROCESSES
        return f"{CLIENT_PROCESSES} grpc.aio processes with {in_flight} calls each in flight"

    def run(self, address: str, method: str, bodies: Bodies) -> Loaded:
        in_flight = IN_FLIGHT // CLIENT_PROCESSES
        clients = []
        for number in range(CLIENT_PROCESSES):
            start, end = (bodies.messages * n // CLIENT_PROCESSES for n in (number, number + 1))
            arguments = [address, method, bodies.path, bodies.size, start, end, in_flight, self._results(number)]
            with pinned_to(self._core):
                client = subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.load_client", *map(str, arguments)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            clients.append(client)
        try:
            return self._together(clients)
        finally:
            for client in clients:
                client.kill()
                client.communicate()

    def _together(self, clients: list[subprocess.Popen[str]]) -> Loaded:
        for client in clients:
            assert client.stdout is not None
            if client.stdout.readline() != "ready\n":
                raise LoadError("a load process did not start; its error is above")
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("go\n")
            client.stdin.flush()
        starts_us, latencies_us, answer_bytes = array("q"), array("q"), 0
        for number, client in enumerate(clients):
            if client.wait(SECONDS) != 0:
                raise LoadError("a load process failed; its error is above")
            results = array("q")
            results.frombytes(self._results(number).read_bytes())
            answer_bytes += results.pop()
            starts_us.extend(results[::2])
            latencies_us.extend(results[1::2])
        return loaded(starts_us, latencies_us, answer_bytes)

    def _results(self, number: int) -> Path:
        return self._folder / f"results.{number}"


def choose_load(name: str, folder: Path, core: int | None) -> Load:
    """Make load as asked: ``h2load``, ``grpc``, or ``auto``, h2load where it can be had. Raises LoadError."""
    if name == "grpc":
        return GrpcLoad(folder, core)
    try:
        return H2Load(folder, core)
    except LoadError:
        if name == "h2load":
            raise
        return GrpcLoad(folder, core)
