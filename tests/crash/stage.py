"""The processes of a run: the banks with books of their own, their forwarder, and the server that is killed."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

from tests.crash.nursery import Nursery
from tests.crash.points import Plan
from tests.support.server import ServerProcess, clean_environment
from tests.support.simbank import SECRETS, bank_process, running

CHANNEL_TIMEOUT_MS = 600

_LADDER_MS = ",".join(["100", "200", *["400"] * 2_000])
"""How the banks repeat what is not acknowledged: soon, and for longer than any run takes."""

SETTINGS = {
    "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
    "PAYCORE_CHANNEL_TIMEOUT_MS": str(CHANNEL_TIMEOUT_MS),
    "PAYCORE_MIN_VALIDITY_SECONDS": "1",
    "PAYCORE_MIN_REMAINING_SECONDS": "0",
    "PAYCORE_PAY_TIMEOUT_MS": "3000",
    "PAYCORE_REFUND_INTERVAL_MS": "100",
    "PAYCORE_REFUND_RETRY_MS": "100",
    "PAYCORE_REFUND_LONGEST_SECONDS": "2",
    "PAYCORE_REPAIR_INTERVAL_MS": "200",
    # What was held by those who were killed is free again soon.
    "PAYCORE_REPAIR_LEASE_SECONDS": "2",
    "PAYCORE_SIMBANK_QUERY_LADDER_SECONDS": "1,1,2,3,5,8,13,21,34",
    "PAYCORE_SIMBANK_CALLS_PER_SECOND": "10000",
    "PAYCORE_SWEEP_INTERVAL_SECONDS": "1",
    "PAYCORE_QUARANTINE_INTERVAL_MS": "300",
    "PAYCORE_QUARANTINE_BURST": "1000000",
    "PAYCORE_LOG_LEVEL": "warning",
}
"""Everything soon: a run has minutes for what takes days."""

BROKEN = ("_broke", "Traceback")
"""What stands in the log of a server that has met a defect of its own."""

FOUND_BY_SWEEP = '"sweep_found"'
"""What stands in it where a sweep had something to put right."""


class Server(ServerProcess):
    """A server on a database that is there already; it is told at each start how to die."""

    def __init__(self, url: str, folder: Path, nursery: Nursery) -> None:
        super().__init__(folder / "server", url=url, env={**SETTINGS, "PAYCORE_METRICS_LISTEN": "127.0.0.1:0"})
        self._nursery = nursery
        self.address = f"127.0.0.1:{free_port()}"

    @property
    def is_dead(self) -> bool:
        """Whether it was killed. Fails where it has ended by itself."""
        code = self.process.poll()
        assert code in (None, -signal.SIGKILL), f"the server ended with {code}:\n{self.log()[-4_000:]}"
        return code is not None

    @property
    def is_ready(self) -> bool:
        """Whether it takes calls."""
        return self.ready_path.exists()

    def begin(self, plan: Plan | None) -> None:
        """Start it and return at once."""
        if plan is not None and plan.failpoints:
            self.env["PAYCORE_FAILPOINTS"] = plan.failpoints
        else:
            self.env.pop("PAYCORE_FAILPOINTS", None)
        self.launch()

    def launch(self) -> None:
        self.ready_path.unlink(missing_ok=True)
        child = self._nursery.start(
            ["serve", "--db", self.url, "--listen", self.address, "--ready-file", str(self.ready_path)],
            clean_environment(self.env),
            self.log_path,
        )
        # It has what is asked of a Popen here.
        self._process = cast("subprocess.Popen[bytes]", child)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Stage(NamedTuple):
    """What runs."""

    server: Server
    bank_url: str


@contextlib.contextmanager
def set_up(url: str, folder: Path) -> Iterator[Stage]:
    """Run banks and forwarder; the server is ready to be begun. It is killed in the end."""
    with contextlib.ExitStack() as stack:
        server = Server(url, folder, stack.enter_context(Nursery()))
        calls = ("--listen", "127.0.0.1:0", "--server", server.address)
        forwarder = stack.enter_context(running("forwarder", folder, *calls))
        ladder = ("--ladder-ms", _LADDER_MS)
        bank = stack.enter_context(bank_process(folder, f"{forwarder.url}/notifications", *ladder))
        server.env["PAYCORE_SIMBANK_URL"] = bank.url
        stack.callback(server.kill)
        yield Stage(server, bank.url)
