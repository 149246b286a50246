"""One worker's slot, seen from the supervisor: starts a process in it, hears what it tells, and sees it end."""

import asyncio
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from paycore.app.seat import SEAT_VARIABLE, Seat, Word

SILENT_SECONDS = 10.0
"""A worker that has said nothing for this long hangs, and is not ready whatever it said before."""

STEADY_SECONDS = 5.0
"""A worker that has taken calls for this long did not die of its start."""

# -P: what lies in the current folder is not to be imported by chance.
_COMMAND = (sys.executable, "-P", "-m", "paycore.cli", "serve")


class Ending(NamedTuple):
    """How a worker ended. refusal: why it would not start, in its own words.

    served: whether it had taken calls; steady: whether it had for ``STEADY_SECONDS``.
    """

    pid: int
    exit_code: int
    refusal: str | None
    served: bool
    steady: bool

    @property
    def cause(self) -> str:
        """Say it in words."""
        if self.refusal is not None:
            return self.refusal
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        try:
            return signal.Signals(-self.exit_code).name
        except ValueError:
            return f"signal {-self.exit_code}"


class Slot:
    """A place for one process at a time. ``start``, then await ``ended``, again and again.

    environment: what every worker gets; told: called whenever ``serving`` or ``ready`` has changed.
    """

    def __init__(self, number: int, environment: Mapping[str, str], told: Callable[[], None]) -> None:
        self.number = number
        # Kept by the supervisor: deaths in a row before the process was steady, and before it took a call.
        self.young_deaths = 0
        self.false_starts = 0
        self.serving = False
        self._said_ready = False
        self._heard_at = 0.0
        self._environment = environment
        self._told = told
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._refusal: str | None = None
        self._served_at = 0.0

    @property
    def ready(self) -> bool:
        """Whether the worker can write, by its latest word. Safe to read from any thread."""
        return self._said_ready and self.silence_seconds < SILENT_SECONDS

    @property
    def silence_seconds(self) -> float:
        """How long a worker that serves has said nothing; 0 where none serves. Safe to read from any thread."""
        return time.monotonic() - self._heard_at if self.serving else 0.0

    @property
    def pid(self) -> int:
        """The process that is, or was last, in this slot; 0 before the first."""
        return 0 if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start a process. Raises OSError when the system has none to give."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._reader, self._writer = await asyncio.open_connection(sock=ours)
            seat = Seat(self.number, theirs.fileno())
            self._refusal = None
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *_COMMAND,
                    env={**self._environment, SEAT_VARIABLE: seat.as_text()},
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(seat.control_fd,),
                    # A Ctrl-C is for the supervisor, which ends all of them in order.
                    start_new_session=True,
                )
            except OSError:
                self._writer.close()
                raise

    async def ended(self) -> Ending:
        """Hear the process until it has ended."""
        assert self._process is not None
        assert self._reader is not None
        assert self._writer is not None
        async for line in self._reader:
            self.hear(Word.from_line(line))
        exit_code = await self._process.wait()
        self._writer.close()
        served = self.serving
        steady = served and time.monotonic() - self._served_at >= STEADY_SECONDS
        self.serving = self._said_ready = False
        self._told()
        return Ending(self._process.pid, exit_code, self._refusal, served, steady)

    def hear(self, word: Word) -> None:
        """Take in a word of the process."""
        self._heard_at = time.monotonic()
        if word.refused is not None:
            self._refusal = word.refused
        if word.serving and not self.serving:
            self.serving = True
            self._served_at = self._heard_at
        if word.ready is not None:
            self._said_ready = word.ready
        self._told()

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal, if one is running."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)
