"""Runs one job without a server: once by hand, or until told to stop."""

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext

from paycore.app.clock import SystemClock
from paycore.app.core import Core, build_core
from paycore.app.endpoint import SETTING as METRICS_SETTING
from paycore.app.endpoint import MetricsEndpoint
from paycore.app.jobs import Planned, build_jobs
from paycore.app.readiness import PROBE_MS, Readiness
from paycore.app.serving import StartRefusedError
from paycore.domain.errors import StoreUnavailableError
from paycore.jobs.runner import Pass, Tell, run_counted, run_every, run_job
from paycore.metrics import Metrics
from paycore.rpc.listen import ListenRefusedError, parse_listen
from paycore.settings import JobName, Settings
from paycore.store.engine import DatabaseRefusedError, parse_database_url
from paycore.store.protocol import StoreBusyError
from paycore.store.schema import open_store


@asynccontextmanager
async def lone_core(settings: Settings, readiness: Readiness | None = None) -> AsyncIterator[Core]:
    """Build what decides, without a server; taken down when the block ends. Raises StartRefusedError.

    readiness: told how writes go; counts go into its metrics.
    """
    metrics, on_health = (Metrics(), _ignore_health) if readiness is None else (readiness.metrics, readiness.report)
    async with AsyncExitStack() as stack:
        try:
            store = open_store(settings.db)
            stack.callback(store.dispose)
            # Nothing is warmed: a job asks the database for what it needs.
            core = build_core(settings, store, metrics, on_health, warm_payments=0)
        except DatabaseRefusedError as error:
            raise StartRefusedError(str(error)) from None
        except (StoreUnavailableError, StoreBusyError) as error:
            shown = parse_database_url(settings.db).url
            raise StartRefusedError(f"{shown}: cannot be written now ({error}); try again later") from None
        stack.push_async_callback(core.registry.aclose)
        # In a thread: the event loop has to run for the last answers to reach who waits for them.
        stack.push_async_callback(asyncio.to_thread, core.writer.stop)
        yield core


async def run_once(settings: Settings, name: JobName, tell: Tell) -> Pass:
    """Run a job until nothing is left that is due now; return what its passes came to together.

    Raises StartRefusedError, StoreUnavailableError, ThrottledError.
    """
    async with lone_core(settings) as core:
        planned = _planned(settings, core, name, by_hand=True)
        done = put_off = 0
        while True:
            result = await run_counted(planned.job, core.metrics, core.clock, tell)
            done, put_off = done + result.done, put_off + result.put_off
            if not result.more:
                return result._replace(done=done, put_off=put_off)


async def run_until_stopped(
    settings: Settings, name: JobName, announce: Callable[[str], None], *, show_metrics: bool
) -> None:
    """Run a job again and again until SIGTERM or SIGINT. Raises StartRefusedError.

    show_metrics: answer HTTP at the settings' metrics address. announce: told where that is, or nothing.
    """
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    readiness = Readiness(Metrics(), SystemClock())
    async with lone_core(settings, readiness) as core:
        planned = _planned(settings, core, name, by_hand=False)
        with _metrics_endpoint(settings, readiness) if show_metrics else nullcontext("") as address:
            await readiness.probe(core.writer)
            announce(address)
            await asyncio.gather(
                run_job(planned.job, planned.interval_ms, stopping, core.metrics, core.clock),
                run_every("heartbeat", lambda: readiness.probe(core.writer), PROBE_MS, stopping),
            )


@contextmanager
def _metrics_endpoint(settings: Settings, readiness: Readiness) -> Iterator[str]:
    """Answer HTTP as a server does until the block ends; give the address. Raises StartRefusedError."""
    try:
        address = parse_listen(METRICS_SETTING, settings.metrics_listen)
        endpoint = MetricsEndpoint(address, readiness.metrics.registry, lambda: readiness.ready)
    except ListenRefusedError as error:
        raise StartRefusedError(str(error)) from None
    try:
        endpoint.start()
        yield str(endpoint.address)
    finally:
        endpoint.stop()


def _planned(settings: Settings, core: Core, name: JobName, *, by_hand: bool) -> Planned:
    (planned,) = build_jobs(settings, core, [name], by_hand=by_hand)
    return planned


def _ignore_health(_healthy: bool) -> None:
    """Nobody asks a lone job whether it is ready."""
