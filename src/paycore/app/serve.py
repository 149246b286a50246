"""Runs a server from its first write to its last, and takes it down so that nobody is left hanging.

Order of the end: health says NOT_SERVING, no new call is taken, calls in flight end, conversations with channels are
written down, jobs stop between two steps, the writer commits and answers what waits, connections close.
"""

import asyncio
import gc
import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import NamedTuple

import structlog

from paycore.app.build import Parts, build
from paycore.app.clock import SystemClock
from paycore.app.endpoint import SETTING as METRICS_SETTING
from paycore.app.endpoint import MetricsEndpoint
from paycore.app.readiness import PROBE_MS, Readiness
from paycore.app.seat import BEAT_MS, SupervisorTie, Word
from paycore.app.serving import Serving, StartRefusedError
from paycore.domain.clock import Clock
from paycore.domain.errors import StoreUnavailableError
from paycore.jobs.runner import run_every, run_job
from paycore.metrics import Metrics
from paycore.rpc.listen import LISTEN_SETTING, ListenRefusedError, check_free, parse_listen
from paycore.settings import Settings
from paycore.store.engine import DatabaseRefusedError, parse_database_url
from paycore.store.protocol import Store, StoreBusyError
from paycore.store.schema import open_store

BACKLOG_MS = 1_000
"""How often the gauges of what is waiting are read from the database."""

YOUNG_OBJECTS = 10_000
"""How many new containers make the collector look at the youngest: more than a group of words leaves."""

REFRESH_MS = 250
"""How often a worker writes down its queue's depth and its index's size, for whoever reads the metrics."""

_log = structlog.get_logger()


async def serve(settings: Settings, announce: Callable[[Serving], None], tie: SupervisorTie | None = None) -> None:
    """Run a server until SIGTERM or SIGINT. ``announce`` is called once calls are taken. Raises StartRefusedError.

    tie: given to a worker, which shares its address with others, and whose supervisor answers for its metrics.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        try:
            server = await _start(settings, tie, stack)
        except (ListenRefusedError, DatabaseRefusedError) as error:
            raise StartRefusedError(str(error)) from None
        except (StoreUnavailableError, StoreBusyError) as error:
            shown = parse_database_url(settings.db).url
            raise StartRefusedError(f"{shown}: cannot be written now ({error}); try again later") from None
        keep_for_good()
        tasks = server.run_background(settings, stopping)
        announce(server.serving)
        _log.info("serving", address=server.serving.address, metrics_address=server.serving.metrics_address or None)
        await stopping.wait()
        _log.info("stopping", grace_ms=settings.shutdown_grace_ms)
        await _take_down(server.parts, tasks, settings.shutdown_grace_ms)
    _log.info("stopped")


def keep_for_good() -> None:
    """Spare the garbage collector what is there now: a server keeps it until its end.

    Walking through all of it takes tens of milliseconds, in which no call is answered.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


class _Started(NamedTuple):
    """A server that takes calls."""

    parts: Parts
    readiness: Readiness
    metrics: Metrics
    clock: Clock
    set_serving: Callable[[bool], Awaitable[None]]
    tie: SupervisorTie | None
    serving: Serving

    def run_background(self, settings: Settings, stopping: asyncio.Event) -> list["asyncio.Task[None]"]:
        """Start everything that nobody calls for."""
        parts, readiness = self.parts, self.readiness

        def loop(name: str, run_once: Callable[[], Awaitable[None]], interval_ms: int) -> "asyncio.Task[None]":
            return asyncio.create_task(run_every(name, run_once, interval_ms, stopping), name=name)

        return [
            *(
                asyncio.create_task(
                    run_job(planned.job, planned.interval_ms, stopping, self.metrics, self.clock),
                    name=planned.job.name,
                )
                for planned in parts.jobs
            ),
            loop("heartbeat", lambda: readiness.probe(parts.core.writer), PROBE_MS),
            loop("backlog", lambda: _read_backlog(parts.core.store, self.metrics, self.clock), BACKLOG_MS),
            loop("gauges", self._refresh, REFRESH_MS),
            loop("beat", self._beat, BEAT_MS),
            asyncio.create_task(readiness.show(self.set_serving), name="readiness"),
        ]

    async def _refresh(self) -> None:
        self.metrics.refresh()

    async def _beat(self) -> None:
        if self.tie is not None:
            self.tie.tell(Word(serving=True, ready=self.readiness.ready))


async def _start(settings: Settings, tie: SupervisorTie | None, stack: AsyncExitStack) -> _Started:
    address = parse_listen(LISTEN_SETTING, settings.listen)
    clock = SystemClock()
    metrics = Metrics(None if tie is None else tie.seat.name)
    readiness = Readiness(metrics, clock)
    endpoint = None
    if tie is None:
        metrics_address = parse_listen(METRICS_SETTING, settings.metrics_listen)
        endpoint = MetricsEndpoint(metrics_address, metrics.registry, lambda: readiness.ready)
        stack.callback(endpoint.stop)
    store = open_store(settings.db)
    stack.callback(store.dispose)
    if tie is None:
        # Looked at before the index is warmed, which may take a while, and again when the port is bound.
        check_free(LISTEN_SETTING, address)
    parts = build(settings, store, metrics, readiness.report, shared_port=tie is not None)
    stack.push_async_callback(parts.core.registry.aclose)
    # In a thread: the event loop has to run for the last answers to reach their callers.
    stack.push_async_callback(asyncio.to_thread, parts.core.writer.stop)
    bound = parts.server.bind(address)
    await parts.server.start()
    if endpoint is not None:
        endpoint.start()
    await readiness.probe(parts.core.writer)

    async def set_serving(serving: bool) -> None:
        if tie is not None:
            tie.tell(Word(ready=serving))
        await parts.server.set_serving(serving)

    await set_serving(readiness.ready)
    serving = Serving(str(bound), "" if endpoint is None else str(endpoint.address), os.getpid())
    return _Started(parts, readiness, metrics, clock, set_serving, tie, serving)


async def _take_down(parts: Parts, tasks: list["asyncio.Task[None]"], grace_ms: int) -> None:
    """End calls, conversations and jobs; what is not done within the grace is cancelled, which loses nothing."""
    ends_at = asyncio.get_running_loop().time() + grace_ms / 1_000
    await parts.server.drain(grace_ms)
    talks = asyncio.create_task(_drain(parts))
    *jobs, show = tasks
    show.cancel()
    remaining_seconds = max(0, ends_at - asyncio.get_running_loop().time())
    _, late = await asyncio.wait({talks, *jobs}, timeout=remaining_seconds)
    for task in late:
        _log.warning("cut_off", task=task.get_name())
        task.cancel()
    await asyncio.gather(talks, *tasks, return_exceptions=True)


async def _drain(parts: Parts) -> None:
    await parts.pay.drain()
    await parts.query.drain()


async def _read_backlog(store: Store, metrics: Metrics, clock: Clock) -> None:
    try:
        backlog = await asyncio.to_thread(store.backlog)
    except (StoreUnavailableError, StoreBusyError):
        # The gauges keep their last values; readiness tells of the database.
        return
    metrics.quarantine_open.set(backlog.quarantine_open)
    metrics.refunds_need_attention.set(backlog.refunds_need_attention)
    metrics.refund_oldest_unfinished_age_seconds.set(_age_seconds(clock, backlog.oldest_refund_at_ms))
    metrics.quarantine_oldest_open_age_seconds.set(_age_seconds(clock, backlog.oldest_quarantine_at_ms))


def _age_seconds(clock: Clock, since_ms: int | None) -> float:
    return 0 if since_ms is None else max(0, clock.now_ms() - since_ms) / 1_000
