"""The quarantine's book for one command, without a server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from paycore.app.jobs import build_judge
from paycore.app.run import lone_core
from paycore.jobs.gate import ChannelGate
from paycore.settings import Settings
from paycore.usecases.quarantine_book import QuarantineBook, QuarantineReader


@asynccontextmanager
async def open_book(settings: Settings, who: str) -> AsyncIterator[QuarantineBook]:
    """Build what judges again; taken down when the block ends. who: stands in what it resolves by itself.

    Raises StartRefusedError.
    """
    async with lone_core(settings) as core:
        gate = ChannelGate(core.registry.traits, core.clock)
        yield QuarantineBook(
            QuarantineReader(core.store),
            core.writer,
            build_judge(core, gate, who),
            core.registry.code,
            clock=core.clock,
            metrics=core.metrics,
        )
