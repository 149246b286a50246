"""Runs `paycore serve` as a process of its own, on a migrated database and on ports that are free."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import grpc
from grpc_health.v1 import health_pb2

from paycore.store.schema import migrate

START_SECONDS = 30
STOP_SECONDS = 30

PAYCORE = Path(sys.executable).with_name("paycore")
"""The installed command, beside the interpreter that runs the tests."""


def clean_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a stranger, plus what is given: no PAYCORE_ setting of the caller's leaks in."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PAYCORE_")}
    return {**kept, "PYTHONWARNINGS": "error", **(env or {})}


def check_health(address: str, service: str = "") -> str:
    """Ask a server's health; return SERVING, NOT_SERVING, or the name of the gRPC code that it answers."""
    with grpc.insecure_channel(address) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        try:
            answer = check(health_pb2.HealthCheckRequest(service=service), timeout=20)
        except grpc.RpcError as error:
            return cast(grpc.Call, error).code().name
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


class ServerProcess:
    """One `paycore serve` process; started when it is entered or by ``start``, killed on exit.

    db_path: a SQLite file, created and migrated at the first start unless it is there. url: of a migrated database to
    serve in its place; then only the log and the ready file lie beside that path. env: PAYCORE_ settings and
    failpoints. arguments: more flags. `address` and `metrics_address` are ``host:port``, known once it has started; a
    restart takes the same ones again, so that clients and forwarders need not be told. `ready_path` is the file that
    says so. `program` is what is run, paycore itself unless it is set to something around it.
    """

    def __init__(
        self,
        db_path: Path,
        *,
        url: str = "",
        env: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.db_path = db_path
        self.url = url or f"sqlite:///{db_path}"
        self._migrates = not url
        self.env = dict(env or {})
        self.arguments = list(arguments)
        self.program = [str(PAYCORE)]
        self.address = "127.0.0.1:0"
        self.metrics_address = "127.0.0.1:0"
        self.ready_path = db_path.with_name(f"{db_path.name}.{id(self):x}.ready.json")
        self.log_path = db_path.with_name(f"{db_path.name}.log")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running process."""
        assert self._process is not None, "the server has not been started"
        return self._process

    @property
    def pid(self) -> int:
        """The running process's id."""
        return self.process.pid

    def launch(self) -> None:
        """Start the process and return at once, ready or not."""
        if self._migrates and not self.db_path.exists():
            migrate(self.url)
        self.ready_path.unlink(missing_ok=True)
        command = [*self.program, "serve", "--db", self.url, "--listen", self.address]
        command += ["--metrics-listen", self.metrics_address, "--ready-file", str(self.ready_path), *self.arguments]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, env=clean_environment(self.env), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def start(self) -> Self:
        """Start the process and wait until it serves. Fails with its log when it ends instead."""
        self.launch()
        self.wait_ready()
        return self

    def wait_ready(self, seconds: float = START_SECONDS) -> None:
        """Wait for the ready file and learn the addresses from it."""
        deadline = time.monotonic() + seconds
        while not self.ready_path.exists():
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the server was not ready within {seconds} s:\n{self.log()}")
            time.sleep(0.01)
        ready = json.loads(self.ready_path.read_text(encoding="utf-8"))
        self.address, self.metrics_address = ready["address"], ready["metrics_address"]

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Wait for the process to end by itself; return its exit code (negative: the signal that ended it)."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not end within {seconds} s:\n{self.log()}") from None

    def kill(self) -> None:
        """End the process as a crash would (SIGKILL)."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)

    def terminate(self) -> int:
        """Ask the process to drain and end (SIGTERM); return its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def restart(self) -> None:
        """Start again on the same addresses after it has ended; a running process is killed first."""
        self.kill()
        self.start()

    def log(self) -> str:
        """Everything that the process and its predecessors on this database wrote."""
        return self.log_path.read_text(encoding="utf-8", errors="replace") if self.log_path.exists() else ""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
