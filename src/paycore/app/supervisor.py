"""Runs several servers as workers on one address, replaces those that die, and ends them together.

The supervisor takes no calls, opens no database and never imports gRPC: what could make a worker fail is not in it.
It holds the address, answers ``/metrics``, ``/-/ready`` and ``/-/healthy`` for all, and starts each worker as a fresh
process, not as a fork. Settings reach a worker through its environment, so that no secret shows in ``ps``.
"""

import asyncio
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import structlog
from prometheus_client import CollectorRegistry

from paycore.app.endpoint import SETTING as METRICS_SETTING
from paycore.app.endpoint import MetricsEndpoint
from paycore.app.seat import SEAT_VARIABLE, STOP_SPARE_MS, Seat
from paycore.app.serving import Serving, StartRefusedError
from paycore.app.slot import Ending, Slot
from paycore.metrics import FOLDER_VARIABLE, GatheredMetrics
from paycore.rpc.listen import LISTEN_SETTING, ListenRefusedError, TcpAddress, hold_shared, parse_listen
from paycore.settings import ENV_PREFIX, Settings, to_environment

READY_FILE_VARIABLE = f"{ENV_PREFIX}READY_FILE"

HOPELESS_STARTS = 3
"""After so many starts in a row that came to nothing, in every slot, there is no hope left."""

PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 30.0
"""Before a worker is replaced that died young: doubled each time."""

_log = structlog.get_logger()


async def supervise(settings: Settings, announce: Callable[[Serving], None]) -> bool:
    """Run ``settings.workers`` servers until SIGTERM or SIGINT; return whether all of them ended in peace.

    announce: called when all take calls, and again when all do after one was replaced. A second signal, or the end of
    the grace, kills what is left. Raises StartRefusedError, also when no worker can be kept running.
    """
    stopping, hurrying = asyncio.Event(), asyncio.Event()
    _catch_signals(stopping, hurrying)
    with ExitStack() as stack:
        try:
            place = _take_place(settings, stack)
        except ListenRefusedError as error:
            raise StartRefusedError(str(error)) from None
        if settings.db.startswith("sqlite"):
            _log.warning("writes_are_serial", cause="SQLite has one writer: more workers decide and answer more calls")
        in_peace = await _Supervisor(settings, place, announce, stopping, hurrying).run()
    _log.info("stopped")
    return in_peace


class _Place(NamedTuple):
    """What the supervisor holds for all workers. folder: where they keep what they have counted."""

    address: TcpAddress
    folder: str
    gathered: GatheredMetrics
    endpoint: MetricsEndpoint
    slots: list[Slot]


def _catch_signals(stopping: asyncio.Event, hurrying: asyncio.Event) -> None:
    def caught() -> None:
        (hurrying if stopping.is_set() else stopping).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, caught)


def _take_place(settings: Settings, stack: ExitStack) -> _Place:
    wanted = parse_listen(LISTEN_SETTING, settings.listen)
    metrics_address = parse_listen(METRICS_SETTING, settings.metrics_listen)
    holder: socket.socket = stack.enter_context(hold_shared(LISTEN_SETTING, wanted))
    host, port = holder.getsockname()[:2]
    address = TcpAddress(host, port)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="paycore-workers-", ignore_cleanup_errors=True))
    slots: list[Slot] = []
    gathered = GatheredMetrics(folder, lambda: max((slot.silence_seconds for slot in slots), default=0.0))
    registry = CollectorRegistry()
    registry.register(gathered)
    endpoint = MetricsEndpoint(metrics_address, registry, lambda: any(slot.ready for slot in slots))
    stack.callback(endpoint.stop)
    return _Place(address, folder, gathered, endpoint, slots)


def _worker_environment(settings: Settings, place: _Place) -> dict[str, str]:
    """Everything a worker gets but its seat: this environment, with every setting as it was understood here."""
    own = settings.model_copy(update={"listen": str(place.address), "workers": 1})
    ours = {READY_FILE_VARIABLE, SEAT_VARIABLE} | {f"{ENV_PREFIX}{name.upper()}" for name in Settings.model_fields}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, **to_environment(own), FOLDER_VARIABLE: place.folder}


class _Supervisor:
    """Keeps a process in every slot. Everything happens on the event loop."""

    def __init__(
        self,
        settings: Settings,
        place: _Place,
        announce: Callable[[Serving], None],
        stopping: asyncio.Event,
        hurrying: asyncio.Event,
    ) -> None:
        environment = _worker_environment(settings, place)
        self._slots = place.slots
        self._slots += [Slot(number, environment, self._changed) for number in range(1, settings.workers + 1)]
        self._settings = settings
        self._place = place
        self._announce = announce
        self._announced: Serving | None = None
        self._stopping = stopping
        self._hurrying = hurrying
        self._ever_served = False

    async def run(self) -> bool:
        """Run until told to stop. Raises StartRefusedError when no worker can be kept running."""
        self._place.endpoint.start()
        tasks = [asyncio.create_task(self._keep(slot), name=f"worker-{slot.number}") for slot in self._slots]
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            in_peace = await self._end(tasks)
            stop.cancel()
        # All are asked, also when two gave up in the same moment: asyncio complains of an error that nobody looked at.
        for error in [task.exception() for task in tasks]:
            if error is not None:
                raise error
        return in_peace

    async def _keep(self, slot: Slot) -> None:
        """Keep a process in the slot until all are to stop."""
        while not self._stopping.is_set():
            ending = await self._run_once(slot)
            self._place.gathered.forget_living(Seat(slot.number, 0).name)
            if self._stopping.is_set():
                return
            slot.young_deaths = 0 if ending.steady else slot.young_deaths + 1
            slot.false_starts = 0 if ending.served else slot.false_starts + 1
            self._give_up_without_hope(ending)
            seconds = pause_seconds(slot.young_deaths)
            _log.error(
                "worker_died",
                worker=slot.number,
                pid=ending.pid,
                cause=ending.cause,
                pause_ms=int(seconds * 1_000),
            )
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _run_once(self, slot: Slot) -> Ending:
        replaces = slot.pid
        try:
            await slot.start()
        except OSError as error:
            return Ending(0, 1, f"no process can be started: {error.strerror}", served=False, steady=False)
        if self._stopping.is_set():
            slot.send(signal.SIGTERM)
        if replaces:
            self._place.gathered.restarts += 1
            _log.warning("worker_replaced", worker=slot.number, pid=slot.pid, replaces=replaces)
        else:
            _log.info("worker_started", worker=slot.number, pid=slot.pid)
        return await slot.ended()

    def _give_up_without_hope(self, last: Ending) -> None:
        """End everything when nothing serves and nothing can be expected to. Raises StartRefusedError."""
        # None: the slot serves.
        false_starts = [None if slot.serving else slot.false_starts for slot in self._slots]
        if not is_hopeless(false_starts, refused=last.refusal is not None, ever_served=self._ever_served):
            return
        if last.refusal is not None:
            raise StartRefusedError(last.refusal)
        raise StartRefusedError(f"no worker can be kept running; the last one ended by {last.cause}: see the log above")

    def _changed(self) -> None:
        """Take in that a worker serves, is ready or not, or has ended."""
        serving = [slot for slot in self._slots if slot.serving]
        self._place.gathered.serving = len(serving)
        self._ever_served = self._ever_served or bool(serving)
        if len(serving) < len(self._slots):
            return
        endpoint = str(self._place.endpoint.address)
        now = Serving(str(self._place.address), endpoint, os.getpid(), tuple(slot.pid for slot in self._slots))
        if now != self._announced and not self._stopping.is_set():
            self._announced = now
            self._announce(now)
            _log.info("serving", address=now.address, metrics_address=now.metrics_address, workers=now.workers)

    async def _end(self, tasks: list["asyncio.Task[None]"]) -> bool:
        """End all workers; return whether none had to be killed."""
        self._stopping.set()
        grace_ms = self._settings.shutdown_grace_ms
        _log.info("stopping", grace_ms=grace_ms)
        for slot in self._slots:
            slot.send(signal.SIGTERM)
        hurry = asyncio.create_task(self._hurrying.wait())
        done = asyncio.create_task(asyncio.wait(tasks))
        seconds = (grace_ms + STOP_SPARE_MS) / 1_000
        either: set[asyncio.Task[Any]] = {done, hurry}
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        late = [slot for slot, task in zip(self._slots, tasks, strict=True) if not task.done()]
        for slot in late:
            _log.error("worker_killed", worker=slot.number, pid=slot.pid)
            slot.send(signal.SIGKILL)
        await done
        return not late


def is_hopeless(false_starts: Iterable[int | None], *, refused: bool, ever_served: bool) -> bool:
    """Whether to give up. false_starts: of each slot, in a row; None where a worker serves, and then never.

    A worker that says why it will not start says the same again, unless one has been able to before.
    """
    enough = 1 if refused and not ever_served else HOPELESS_STARTS
    return all(count is not None and count >= enough for count in false_starts)


def pause_seconds(young_deaths: int) -> float:
    """How long a slot stays empty: not at all after a steady worker, then longer each time."""
    return 0.0 if young_deaths == 0 else min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** min(young_deaths - 1, 16))
