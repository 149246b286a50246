"""The processes of a demo: banks, forwarder and server as a company would run them, in a folder of their own.

It knows nothing of stories. Everything that it starts is ended when the stage is left, however that happens.
"""

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from paycore.client import NO_RETRY, PaycoreClient
from paycore.store.engine import DatabaseRefusedError
from paycore.store.schema import migrate

BANKS = ("bank_a", "bank_b", "bank_c")

PAYCORE = (sys.executable, "-P", "-m", "paycore.cli")
"""The command, run by this very interpreter. -P: nothing in the current folder is taken for the package."""

START_SECONDS = 30.0
STOP_SECONDS = 10.0
POLL_SECONDS = 0.02

OWN_SETTINGS = frozenset(
    {"db", "listen", "metrics_listen", "simbank_url", "simbank_accounts", "simbank_secrets", "log_format"}
)
"""Settings of the server that the stage decides alone."""

SERVER_SETTINGS: Mapping[str, str] = {
    # Expiry is part of the stories, and nobody wants to wait a minute for it.
    "min_validity_seconds": "1",
    "min_remaining_seconds": "0",
    "refund_interval_ms": "100",
    "refund_retry_ms": "300",
    "repair_interval_ms": "100",
    "quarantine_interval_ms": "1500",
    # The stories tell of words that come late or never: nobody asks before they have been told.
    "simbank_query_ladder_seconds": "60",
    "simbank_min_close_age_seconds": "60",
}
"""What differs from the server's defaults, by the setting's name."""

# The banks send again soon, so that a server that comes back is told soon.
_LADDER_MS = "100,200,300,500,500,500,500,1000,1000,1000,2000,2000,5000,5000"
_LOG_TAIL_LINES = 15

T = TypeVar("T")


class StageError(Exception):
    """A process that did not start or ended by itself. The message names it and ends with what its log says."""


class Program:
    """One ``paycore`` process, its ready file and its log."""

    def __init__(self, verb: str, folder: Path, flags: Mapping[str, str], environment: Mapping[str, str]) -> None:
        self.verb = verb
        self._flags = dict(flags)
        self._environment = {**_strangers_environment(), **environment}
        self._ready_file = folder / f"{verb}.ready.json"
        self._log_file = folder / f"{verb}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The running process's id."""
        assert self._process is not None, "started before it is asked about"
        return self._process.pid

    def launch(self) -> None:
        """Start the process and return at once."""
        self._ready_file.unlink(missing_ok=True)
        flags = [part for name, value in self._flags.items() for part in (f"--{name}", value)]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*PAYCORE, self.verb, *flags, "--ready-file", str(self._ready_file)],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the demo, which then ends its processes itself.
                start_new_session=True,
            )

    def wait_ready(self) -> Mapping[str, object]:
        """Return what the ready file says once it is there. Raises StageError."""
        if not wait_until(lambda: self._ready_file.exists() or self.has_ended(), START_SECONDS):
            raise StageError(f"paycore {self.verb} was not ready within {START_SECONDS:.0f} s\n{self._log_tail()}")
        self.check_alive()
        said: dict[str, object] = json.loads(self._ready_file.read_text(encoding="utf-8"))
        return said

    def has_ended(self) -> bool:
        """Whether the process is gone."""
        return self._process is None or self._process.poll() is not None

    def check_alive(self) -> None:
        """Raise StageError when the process has ended by itself."""
        if self._process is not None and self._process.poll() is not None:
            raise StageError(f"paycore {self.verb} ended with {self._process.returncode}\n{self._log_tail()}")

    def kill(self) -> None:
        """End the process as a power cut would (SIGKILL)."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ask_to_end(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None:
            self._process.terminate()

    def wait_ended(self) -> None:
        """Wait until the process has ended; kill it when it takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def _log_tail(self) -> str:
        lines = self._log_file.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])


class Stage:
    """Banks, forwarder and server, ready to be played with; entered once.

    folder: holds databases and logs. settings: the server's, by name, over SERVER_SETTINGS.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], call_timeout_ms: int) -> None:
        self.folder = folder
        self.db_path = folder / "paycore.db"
        self.secrets = {bank: secrets.token_urlsafe(32) for bank in BANKS}
        self._settings = {**SERVER_SETTINGS, **settings}
        self._call_timeout_ms = call_timeout_ms
        self._cleanup = contextlib.ExitStack()
        # Whom to call must be known before anybody runs: the banks call the forwarder, which calls the
        # server, which calls the banks.
        self._ports = {name: HeldPort() for name in ("grpc", "metrics", "forwarder", "banks")}
        self.banks = self._banks()
        self.forwarder = self._forwarder()
        self.server = self._server()
        self.programs = (self.server, self.banks, self.forwarder)
        self._client: PaycoreClient | None = None

    @property
    def client(self) -> PaycoreClient:
        """A client of the server. A server that comes back is found again."""
        assert self._client is not None, "the stage has been entered"
        return self._client

    @property
    def grpc_address(self) -> str:
        """Where the server takes gRPC calls: host:port."""
        return self._ports["grpc"].address

    @property
    def metrics_url(self) -> str:
        """Where the server tells its metrics."""
        return f"http://{self._ports['metrics'].address}/metrics"

    @property
    def banks_url(self) -> str:
        """Where the banks listen."""
        return f"http://{self._ports['banks'].address}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            for port in self._ports.values():
                undo.callback(port.let_go)
            self._start(undo)
            self._client = undo.enter_context(
                PaycoreClient(self.grpc_address, timeout_ms=self._call_timeout_ms, retry=NO_RETRY)
            )
            self._cleanup = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def _start(self, undo: contextlib.ExitStack) -> None:
        try:
            # What `paycore migrate` does, without waiting for one process more.
            migrate(self._db_url)
        except DatabaseRefusedError as error:
            raise StageError(str(error)) from None
        for program in self.programs:
            undo.callback(program.wait_ended)
        undo.callback(self._ask_all_to_end)
        for program in self.programs:
            program.launch()
        for program in self.programs:
            program.wait_ready()

    def _ask_all_to_end(self) -> None:
        for program in self.programs:
            program.ask_to_end()

    @property
    def _db_url(self) -> str:
        return f"sqlite:///{self.db_path}"

    def _banks(self) -> Program:
        flags = {
            "listen": self._ports["banks"].address,
            "books": str(self.folder / "banks.db"),
            "forwarder-url": f"http://{self._ports['forwarder'].address}/notifications",
            "ladder-ms": _LADDER_MS,
        }
        return Program("simbank", self.folder, flags, self._secrets_environment())

    def _forwarder(self) -> Program:
        flags = {"listen": self._ports["forwarder"].address, "server": self.grpc_address}
        return Program("forwarder", self.folder, flags, self._secrets_environment())

    def _server(self) -> Program:
        flags = {
            "db": self._db_url,
            "listen": self.grpc_address,
            "metrics-listen": self._ports["metrics"].address,
        }
        environment = {
            **{f"PAYCORE_{name.upper()}": value for name, value in self._settings.items()},
            **self._secrets_environment(),
            "PAYCORE_SIMBANK_URL": self.banks_url,
            "PAYCORE_SIMBANK_ACCOUNTS": ",".join(BANKS),
        }
        return Program("serve", self.folder, flags, environment)

    def _secrets_environment(self) -> dict[str, str]:
        # By the environment, never by a flag: flags show in ps.
        return {"PAYCORE_SIMBANK_SECRETS": json.dumps(self.secrets)}

    def check_alive(self) -> None:
        """Raise StageError when one of the processes has ended by itself."""
        for program in self.programs:
            program.check_alive()

    def kill_server(self) -> None:
        """End the server with kill -9."""
        self.server.kill()

    def audit(self) -> list[str]:
        """Run ``paycore audit`` over the database and the banks' books; return what it says. Raises StageError."""
        db = f"sqlite:///{self.db_path}"
        command = [*PAYCORE, "audit", "--db", db, "--books", self.banks_url]
        ended = subprocess.run(
            command, env=_strangers_environment(), capture_output=True, text=True, timeout=START_SECONDS, check=False
        )
        if ended.returncode:
            raise StageError(f"paycore audit ended with {ended.returncode}\n{ended.stdout}{ended.stderr}")
        return [line for line in ended.stdout.splitlines() if line.strip()]

    def restart_server(self) -> None:
        """Start the server again where it was. Raises StageError."""
        self.server.launch()
        self.server.wait_ready()


class HeldPort:
    """A free loopback port that nobody else is given while processes of ours come and go on it.

    Linux lets several sockets with SO_REUSEADDR share a port as long as only one of them listens, so ours stays.
    Other systems do not: there it is closed at once, and the port is very likely, not surely, still free.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        if sys.platform != "linux":
            self.let_go()

    def let_go(self) -> None:
        """Hold it no longer."""
        self._socket.close()


def wait_until(look: Callable[[], T], seconds: float) -> T:
    """Look until something true is seen or the time is over; return what was seen last."""
    deadline = time.monotonic() + seconds
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return seen


def _strangers_environment() -> dict[str, str]:
    """Return the environment without settings of paycore: what the caller runs elsewhere must not be touched."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PAYCORE_")}
