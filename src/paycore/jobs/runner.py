"""Runs a job again and again until told to stop; a pass that fails is logged and tried again."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from paycore.domain.errors import PaycoreError

_log = structlog.get_logger()


async def run_every(
    name: str, run_once: Callable[[], Awaitable[None]], interval_ms: int, stopping: asyncio.Event
) -> None:
    """Run a pass, wait, and so on; returns after the pass that runs when ``stopping`` is set."""
    while not stopping.is_set():
        try:
            await run_once()
        except PaycoreError as error:
            _log.warning("job_pass_failed", job=name, reason=error.reason, cause=error.message)
        except Exception:  # noqa: BLE001 - a defect in one pass must not end the job for good: money waits
            _log.exception("job_pass_broke", job=name)
        try:
            await asyncio.wait_for(stopping.wait(), interval_ms / 1000)
        except TimeoutError:
            continue
