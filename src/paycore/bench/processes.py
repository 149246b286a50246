"""Server processes that are measured: started, on a core of their own where that is asked for, asked, and ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from paycore.bench.result import BenchError

START_SECONDS = 300
METRICS_SECONDS = 30
STOP_SECONDS = 60
ACCOUNTS = ("bank_a", "bank_b", "bank_c")

Sample = tuple[str, tuple[tuple[str, str], ...]]
"""A metric's sample: its name, and its labels in order."""


class ProcessError(BenchError):
    """A process did not start or end as it should."""


class Cores(NamedTuple):
    """Where server and load run; None: wherever the system puts them."""

    server: int | None
    load: int | None

    @property
    def description(self) -> str:
        """How they are pinned."""
        if self.server is None:
            return "not pinned: the system gives no two cores to choose from"
        return f"server on core {self.server}, load on core {self.load}"


def choose_cores() -> Cores:
    """One core for the server and another for the load, where the system lets processes be pinned."""
    if not hasattr(os, "sched_setaffinity"):
        return Cores(None, None)
    usable = sorted(os.sched_getaffinity(0))
    return Cores(usable[0], usable[1]) if len(usable) > 1 else Cores(None, None)


@contextmanager
def pinned_to(core: int | None) -> Iterator[None]:
    """Pin what the block starts, and all its threads, to a core: a process inherits this from its parent."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server(NamedTuple):
    """A server that takes calls. metrics_address: None where it offers none."""

    pid: int
    address: str
    metrics_address: str | None

    def metrics(self) -> dict[Sample, float]:
        """All samples as they are now; empty where it offers none."""
        if self.metrics_address is None:
            return {}
        with closing(HTTPConnection(self.metrics_address, timeout=METRICS_SECONDS)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def cpu_seconds(self) -> float | None:
        """CPU time that its threads and those of its workers took so far; None where the system does not tell."""
        if not Path(f"/proc/{self.pid}/stat").exists():
            return None
        return sum(map(_ticks, _family(self.pid))) / os.sysconf("SC_CLK_TCK")


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text().split():
            yield from _family(int(child))


def _ticks(pid: int) -> int:
    # After the name in brackets, which may hold spaces: state is field 3, utime 14 and stime 15.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@contextmanager
def running(command: Sequence[str], ready_file: Path, log: Path, core: int | None) -> Iterator[Server]:
    """Run a server that writes its address to ``ready_file``; end it with SIGTERM. Raises ProcessError."""
    ready_file.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PAYCORE_")}
    # The payments that are measured with were not made by Pay: repair would only find that their tasks are missing.
    environment["PAYCORE_JOBS"] = ""
    with log.open("ab") as output:
        with pinned_to(core):
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            yield wait_ready(process, ready_file, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_ready(process: subprocess.Popen[bytes], ready_file: Path, log: Path) -> Server:
    """Wait until a server takes calls."""
    deadline = time.monotonic() + START_SECONDS
    while not ready_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise ProcessError(f"{process.args!r} is not ready:\n{log.read_text()[-2000:]}")
        time.sleep(0.02)
    ready = json.loads(ready_file.read_text(encoding="utf-8"))
    return Server(process.pid, ready["address"], ready.get("metrics_address"))


@contextmanager
def empty_server(folder: Path, core: int | None, words: int = 1) -> Iterator[Server]:
    """Run the handlers that do nothing. words: how many the answer to a batch holds."""
    ready_file = folder / "empty.ready"
    command = [sys.executable, "-m", "paycore.bench.empty_server", str(ready_file), str(words)]
    with running(command, ready_file, folder / "empty.log", core) as server:
        yield server


@contextmanager
def paycore_server(url: str, folder: Path, core: int | None, flags: Sequence[str] = ()) -> Iterator[Server]:
    """Run ``paycore serve`` as it is installed, with one channel configured and nobody behind it."""
    ready_file = folder / "paycore.ready"
    secrets = dict.fromkeys(ACCOUNTS, "nobody asks for it")
    command = [sys.executable, "-m", "paycore.cli", "serve", "--db", url]
    command += ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0", "--ready-file", str(ready_file)]
    command += ["--simbank-url", "http://127.0.0.1:9", "--simbank-secrets", json.dumps(secrets), *flags]
    with running(command, ready_file, folder / "paycore.log", core) as server:
        yield server
