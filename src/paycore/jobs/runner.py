"""What a job is, and how it is run: again and again until told to stop, or once by hand.

A pass may be made at any time, in any number of processes at once, and again after it was cut off anywhere: what it
writes is conditional or has a derived key. A pass that fails is counted, logged and tried again.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple, Protocol

from paycore.domain.clock import Clock
from paycore.domain.errors import PaycoreError
from paycore.metrics import Metrics
from paycore.usecases.quiet_log import QuietLog

_log = QuietLog()

Tell = Callable[[int, int], None]
"""Told how far a pass has come: pieces of work that were looked at, and how many are known of."""


def tell_nobody(_looked_at: int, _known: int) -> None:
    """For passes that nobody watches."""


class Pass(NamedTuple):
    """What a pass came to.

    done: pieces of work that are finished. put_off: pieces that have to be come back to. lag_ms: how long the oldest
    piece that is due and not done has been due; 0 where none is. more: there is more that is due now.
    """

    done: int = 0
    put_off: int = 0
    lag_ms: int = 0
    more: bool = False


class Job(Protocol):
    """Work that nobody calls for."""

    @property
    def name(self) -> str:
        """One word: the label of its metrics, and what ``paycore run`` is asked for."""
        ...

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Make one pass. Raises StoreUnavailableError or ThrottledError; the next pass goes on from there."""
        ...


async def run_counted(job: Job, metrics: Metrics, clock: Clock, tell: Tell = tell_nobody) -> Pass:
    """Make one pass and put what it came to into the metrics. Raises what the pass raises, after counting it."""
    try:
        result = await job.run_once(tell)
    except Exception:
        metrics.count_job_failure(job.name)
        raise
    metrics.count_job_pass(job.name, clock.now_ms(), done=result.done, put_off=result.put_off, lag_ms=result.lag_ms)
    return result


async def run_job(job: Job, interval_ms: int, stopping: asyncio.Event, metrics: Metrics, clock: Clock) -> None:
    """Run a job until ``stopping`` is set: at once again where more is due, else after the interval."""

    async def once() -> bool:
        return (await run_counted(job, metrics, clock)).more

    await _repeat(job.name, once, interval_ms, stopping)


async def run_every(
    name: str, run_once: Callable[[], Awaitable[None]], interval_ms: int, stopping: asyncio.Event
) -> None:
    """Run something small, wait, and so on; returns after the pass that runs when ``stopping`` is set."""

    async def once() -> bool:
        await run_once()
        return False

    await _repeat(name, once, interval_ms, stopping)


async def _repeat(name: str, once: Callable[[], Awaitable[bool]], interval_ms: int, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        more = False
        try:
            more = await once()
        except PaycoreError as error:
            _log.warning("job_pass_failed", job=name, reason=error.reason, cause=error.message)
        except Exception:  # noqa: BLE001 - a defect in one pass must not end the job for good: money waits
            _log.exception("job_pass_broke", job=name)
        try:
            await asyncio.wait_for(stopping.wait(), 0 if more else interval_ms / 1000)
        except TimeoutError:
            continue
