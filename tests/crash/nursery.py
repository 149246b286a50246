"""Starts servers fast: the program is imported once, and each server is a fork of that, a process of its own.

The import is most of what a start costs, and a run starts a server for each kill. ``python -m tests.crash.nursery``
takes one order a line, answers it with the process's id, and with how it ended when it has.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tests.support.server import clean_environment

_PROGRAM = ("paycore.cli.serve", "paycore.app.serve", "paycore.store.sqlite", "paycore.store.postgresql")
"""Everything that a server imports."""

_ARMED = "nursery=crash"
"""A failpoint that nobody passes: with one armed, others can be after the fork."""


class Child:
    """A server that was started here; as much of ``subprocess.Popen`` as whoever runs a server needs."""

    def __init__(self, told: IO[bytes]) -> None:
        self._told = told
        self.returncode: int | None = None
        self.pid = self._heard()

    def _heard(self) -> int:
        line = self._told.readline()
        assert line, "the nursery has ended"
        return int(line)

    def poll(self) -> int | None:
        """Return how it ended, or None."""
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(self._heard())
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        # The nursery buries it before it says so: as with Popen, an id that was just freed is not in use again yet.
        if self.poll() is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return

    def kill(self) -> None:
        """End it as a crash would."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float) -> int:
        """Return how it ended. Raises subprocess.TimeoutExpired."""
        ends_at = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > ends_at:
                raise subprocess.TimeoutExpired("paycore", timeout)
            time.sleep(0.001)
        return code


class Nursery:
    """Starts one server after another: the next one when the last has ended."""

    def __enter__(self) -> Self:
        # Unbuffered: a line that was read ahead could not be waited for.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.nursery"],
            env=clean_environment({"PAYCORE_FAILPOINTS": _ARMED}),
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def start(self, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> Child:
        """Start ``paycore`` with these arguments, this environment and nothing else; it writes to the log."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"arguments": [*arguments], "env": {**env}, "log": str(log)}
        self._process.stdin.write(f"{json.dumps(order)}\n".encode())
        return Child(self._process.stdout)


def _main() -> None:
    for module in _PROGRAM:
        importlib.import_module(module)
    assert len([*Path("/proc/self/task").iterdir()]) == 1, "a thread would be missing in the fork"
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(**json.loads(line))
            return
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def _become(arguments: list[str], env: dict[str, str], log: str) -> None:
    """Be what ``paycore`` with these arguments is."""
    from paycore.cli import main

    os.environ.clear()
    os.environ.update(env)
    _arm(env.get("PAYCORE_FAILPOINTS", ""))
    silence, written = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number, file in ((0, silence), (1, written), (2, written)):
        os.dup2(file, number)
    sys.argv = ["paycore", *arguments]
    main()


def _arm(failpoints: str) -> None:
    """Arm what the environment says: it is read at import, which was long ago."""
    from paycore import failpoint

    armed = inspect.getclosurevars(failpoint.failpoint).nonlocals["armed"]
    armed.clear()
    armed.update(failpoint._parse(failpoints))


if __name__ == "__main__":
    _main()
