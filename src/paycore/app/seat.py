"""A worker's side of the tie to its supervisor: one socket, on which it tells how it is, and learns that it is alone.

The supervisor never writes. It holds its end for as long as it lives, however it ends, so that the end of the stream
is the one sure sign that nobody is left who would stop or replace this worker, or answer for its metrics.
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import NamedTuple, Self

import structlog

from paycore.metrics import FOLDER_VARIABLE

SEAT_VARIABLE = "PAYCORE_WORKER"
"""Where the environment of a worker holds its seat. Set by a supervisor, never by people."""

BEAT_MS = 1_000
"""How often a worker tells how it is, changed or not: one that says nothing hangs."""

STOP_SPARE_MS = 5_000
"""How much longer than the grace a worker may take to end: what waits is still committed after it."""

_log = structlog.get_logger()


class Seat(NamedTuple):
    """Which worker a process is, from 1, and its end of the tie to the supervisor."""

    number: int
    control_fd: int

    @property
    def name(self) -> str:
        """The name under which the worker, and whoever takes its place, counts."""
        return str(self.number)

    def as_text(self) -> str:
        """Write the seat for the environment."""
        return json.dumps(self._asdict())

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Seat | None":
        """Read the seat; None in a process that is no worker."""
        text = environment.get(SEAT_VARIABLE)
        return None if text is None else cls(**json.loads(text))


class Word(NamedTuple):
    """What a worker tells, one JSON line each. None: nothing new."""

    serving: bool | None = None
    ready: bool | None = None
    refused: str | None = None

    def as_line(self) -> bytes:
        """Write the word."""
        return json.dumps(self._asdict()).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Word":
        """Read a word; a line that a dying worker did not finish says nothing."""
        try:
            return cls(**json.loads(line))
        except ValueError:
            return cls()


class SupervisorTie:
    """Tells the supervisor, and ends the worker when there is none any more. Enter it before anything that takes time.

    grace_ms: how long calls in flight may take to end then.
    """

    def __init__(self, seat: Seat, grace_ms: int) -> None:
        self.seat = seat
        self._grace_ms = grace_ms
        self._socket = socket.socket(fileno=seat.control_fd)
        self._alone = threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, name="paycore-supervisor-tie", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._alone.is_set():
            self._clean_up()

    def tell(self, word: Word) -> None:
        """Send a word. Never waits: what a supervisor that does not read misses, the next beat says again."""
        try:
            self._socket.send(word.as_line(), socket.MSG_DONTWAIT)
        except OSError:
            _log.debug("supervisor_not_told")

    def _watch(self) -> None:
        try:
            while self._socket.recv(1):
                pass
        except OSError:
            pass  # reset: the same
        self._alone.set()
        _log.error("supervisor_gone", cause="no one is left to stop this worker: it stops by itself")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep((self._grace_ms + STOP_SPARE_MS) / 1_000)
        self._clean_up()
        os.kill(os.getpid(), signal.SIGKILL)

    def _clean_up(self) -> None:
        """Remove the metrics' folder, which the supervisor could not. Other workers may be doing the same."""
        folder = os.environ.get(FOLDER_VARIABLE)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
