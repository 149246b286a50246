"""The sweeper over a core, and what it says that it found."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

from paycore.domain.sweep import SweepKind
from paycore.jobs.gate import ChannelGate
from paycore.jobs.runner import Pass
from paycore.jobs.slices import Slices
from paycore.jobs.sweeper import Sweeper
from paycore.store import sweeps
from tests.support.books import rows, run
from tests.support.core import Core

FULL_MS = 86_400_000
LEASE_MS = 60_000
_MOST_RUNS = 100


class Sweeps:
    """A sweeper as one process has it. Two over one database are as two processes."""

    def __init__(self, core: Core, *, full_ms: int = FULL_MS, lease_ms: int = LEASE_MS, **settings: Any) -> None:
        self.core = core
        self.gate = ChannelGate(core.registry.traits, core.clock)
        self.sweeper = Sweeper(
            store=core.store,
            writer=core.writer,
            conversations=core.conversations,
            schedule=core.schedule,
            slices=Slices(core.store, core.writer, core.clock, secrets.token_hex, lease_ms),
            gate=self.gate,
            clock=core.clock,
            metrics=core.metrics,
            full_ms=full_ms,
            **settings,
        )

    async def run(self, passes: int = 1) -> Pass:
        """Make passes, and whatever is due at once after each; return the last one's result."""
        for _ in range(passes):
            for _ in range(_MOST_RUNS):
                result = await self.sweeper.run_once()
                if not result.more:
                    break
            else:
                raise AssertionError("a pass comes to no end")
        return result

    async def full(self) -> Pass:
        """Make a full pass, whatever passes were made before."""
        self.begin_anew()
        return await self.run()

    def begin_anew(self) -> None:
        """Let the next pass begin a full one, as the first ever."""
        run(self.core.url, "DELETE FROM sweep_mark WHERE sweep LIKE 'full%'")

    def found(self) -> dict[str, int]:
        """What was found since the core was started: kind -> how often, those that were found at all."""
        counts = {kind.value: self.core.count("paycore_sweep_found_total", kind=kind.value) for kind in SweepKind}
        return {kind: count for kind, count in counts.items() if count}

    def pending(self) -> list[int]:
        """The payments that are looked at again."""
        return self.core.store.read(lambda connection: sweeps.pending(connection, 0, 1_000))


def delete_refunds(url: str, *payment_ids: int, tables: Iterable[str] = ("refund", "refund_try")) -> None:
    """Lose refunds, as a race or a stale mask would never have written them."""
    for payment_id in payment_ids:
        run(url, *(f"DELETE FROM {table} WHERE payment_id = {payment_id}" for table in tables))


def planted(url: str, table: str) -> list[Any]:
    """Every row of a table, sorted."""
    return sorted(rows(url, f"SELECT * FROM {table}"))
