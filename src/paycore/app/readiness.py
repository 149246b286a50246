"""Whether the database can be written: told by the writer, asked by a heartbeat, shown to health checks and metrics."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from paycore.domain.clock import Clock
from paycore.domain.errors import PaycoreError
from paycore.metrics import Metrics
from paycore.usecases.health import Heartbeat
from paycore.usecases.writer import Writer

PROBE_MS = 500
"""How often an unready server tries to write."""

IDLE_PROBE_MS = 5_000
"""How often a ready one does: an idle server learns of a full disk before the first notification does."""

STUCK_MS = 10_000
"""A heartbeat that takes longer means that the writer hangs, in a sync that does not return for example."""

_log = structlog.get_logger()


class Readiness:
    """Ready or not, and who must be told. Everything but ``report`` and ``ready`` belongs to the event loop."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._ready = False
        self._probed_at_ms = 0
        metrics.ready.set(0)

    @property
    def metrics(self) -> Metrics:
        """Where it shows."""
        return self._metrics

    @property
    def ready(self) -> bool:
        """Whether the last write could be committed. Safe to read from any thread."""
        return self._ready

    def report(self, ready: bool) -> None:
        """Take in how the last write went; called on the writer thread, after every group.

        Compared first, so that a busy server does not wake the event loop for each group. What two quick changes
        make of that comparison, the next heartbeat puts right.
        """
        if ready != self._ready:
            self._loop.call_soon_threadsafe(self._set, ready)

    def _set(self, ready: bool) -> None:
        if ready == self._ready:
            return
        self._ready = ready
        self._metrics.ready.set(int(ready))
        self._changed.set()
        if ready:
            _log.info("ready")
        else:
            _log.error("not_ready", cause="the database cannot be written")

    async def show(self, set_serving: Callable[[bool], Awaitable[None]]) -> None:
        """Tell health checks of every change; never returns."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await set_serving(self._ready)

    async def probe(self, writer: Writer) -> None:
        """Write a heartbeat if one is due; how it went comes through ``report``. To be called every ``PROBE_MS``."""
        now_ms = self._clock.now_ms()
        if self._ready and 0 <= now_ms - self._probed_at_ms < IDLE_PROBE_MS:
            return
        self._probed_at_ms = now_ms
        try:
            async with asyncio.timeout(STUCK_MS / 1_000):
                await writer.run(Heartbeat())
        except TimeoutError:
            self._set(False)
        except PaycoreError:
            # A group that could not be committed has been reported; a full queue is no fault of the database.
            return
