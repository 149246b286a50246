"""The bank's HTTP server: puts its parts together and keeps the sender running."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from pydantic import SecretStr
from starlette.applications import Starlette

from paycore.simbank import driver_api, merchant_api, pages
from paycore.simbank.bank import Bank
from paycore.simbank.clock import Clock
from paycore.simbank.desk import Desk
from paycore.simbank.disk import Disk
from paycore.simbank.office import Office
from paycore.simbank.sender import Sender, SenderConfig
from paycore.simbank.signing import DEFAULT_WINDOW_MS, Verifier
from paycore.simbank.web import ApiError, error_answer

logger = structlog.get_logger("simbank")

DEFAULT_LADDER_MS = (200, 500, 1_000, 2_000, 5_000, 10_000, 30_000, 60_000)


@dataclass(frozen=True)
class BankConfig:
    """How a bank process is set up. secrets: one for each bank, which names the banks too."""

    books: Path
    forwarder_url: str
    secrets: Mapping[str, SecretStr]
    ladder_ms: Sequence[int] = DEFAULT_LADDER_MS
    notify_timeout_ms: int = 5_000
    window_ms: int = DEFAULT_WINDOW_MS


def build(config: BankConfig, disk: Disk, clock: Clock, base_url: str, stopping: Callable[[], bool]) -> Starlette:
    """Return the application over books that are open; it closes them when it ends.

    ``base_url``: where users reach the pages, without a slash at the end.
    """
    bank, desk = Bank(disk, clock, base_url), Desk()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        sender_config = SenderConfig(
            config.forwarder_url.rstrip("/"), config.secrets, config.ladder_ms, config.notify_timeout_ms
        )
        sender = Sender(disk, bank, desk, clock, sender_config)
        verifier = Verifier(config.secrets, clock, config.window_ms)
        app.state.office = Office(tuple(config.secrets), bank, disk, desk, sender, verifier, stopping)
        try:
            async with _running(sender):
                yield
        finally:
            desk.close()
            disk.close()

    routes = [*merchant_api.ROUTES, *pages.ROUTES, *driver_api.ROUTES]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={ApiError: error_answer})


@contextlib.asynccontextmanager
async def _running(sender: Sender) -> AsyncIterator[None]:
    task = asyncio.create_task(sender.run())
    task.add_done_callback(_stop_process_if_failed)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _stop_process_if_failed(task: asyncio.Task[None]) -> None:
    """A bank that tells nobody anything is worse than none: end the process as its owner would."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("sender_failed", exc_info=error)
        signal.raise_signal(signal.SIGTERM)
