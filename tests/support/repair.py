"""The jobs that talk to channels about attempts, over a core: closer, recoverer and ender."""

from __future__ import annotations

import secrets
from typing import Any

from paycore.domain.ids import format_channel_order_no
from paycore.jobs.closer import Closer
from paycore.jobs.ender import Ender
from paycore.jobs.gate import ChannelGate
from paycore.jobs.recoverer import Recoverer
from paycore.jobs.runner import Job, Pass
from paycore.jobs.slices import Slices
from paycore.jobs.task_job import LONGEST_REST_MS
from paycore.store import tables
from paycore.store.rows import TaskRow
from tests.support.bank import Town
from tests.support.core import Core

UNREACHABLE_MS = 7 * 86_400_000
SLICE_LEASE_MS = 60_000


class Repair:
    """Each job as one process has it. Two over one core are as two processes, but for the writer."""

    def __init__(
        self,
        core: Core,
        *,
        lease_ms: int = 60_000,
        unreachable_ms: int = UNREACHABLE_MS,
        gate: ChannelGate | None = None,
    ) -> None:
        self.core = core
        self.gate = gate or ChannelGate(core.registry.traits, core.clock)
        slices = Slices(core.store, core.writer, core.clock, secrets.token_hex, SLICE_LEASE_MS)
        common: dict[str, Any] = {
            "store": core.store,
            "writer": core.writer,
            "accounts": core.registry.codes,
            "conversations": core.conversations,
            "schedule": core.schedule,
            "slices": slices,
            "gate": self.gate,
            "clock": core.clock,
            # The longest wait each time: what is due is known to the millisecond.
            "draw": lambda _: 0,
        }
        patience: dict[str, Any] = {"metrics": core.metrics, "unreachable_ms": unreachable_ms}
        self.closer = Closer(**common, **patience, codes=core.registry.code)
        self.recoverer = Recoverer(**common, **patience)
        self.ender = Ender(**common, new_token=secrets.token_hex, lease_ms=lease_ms)
        self.jobs: dict[str, Job] = {job.name: job for job in (self.closer, self.recoverer, self.ender)}

    async def run(self, *names: str) -> list[Pass]:
        """Make one pass of each of these jobs, or of all."""
        return [await self.jobs[name].run_once() for name in names or self.jobs]

    def tasks(self, payment_id: int) -> dict[tuple[str, int], TaskRow]:
        """What repair still has to come back to about a payment: (kind's name, attempt) -> the task."""
        names = {int(job.kind): job.kind.name for job in (self.closer, self.recoverer, self.ender)}
        rows = [TaskRow(*row) for row in self.core.snapshot()[tables.task.name] if row.payment_id == payment_id]
        return {(names[row.kind], row.attempt): row for row in rows}


async def pass_time(town: Town, repair: Repair, by_ms: int, *names: str, most_ms: int = LONGEST_REST_MS) -> None:
    """Let time pass in steps, as long as a task rests if nothing is said, with a pass of each job after each."""
    while by_ms > 0:
        step_ms = min(by_ms, most_ms)
        town.clock.advance(step_ms)
        by_ms -= step_ms
        await repair.run(*names)


def left(town: Town, payment_id: int, fault: str, attempt: int = 1, bank: str = "bank_a") -> int:
    """How often a fault that was planted for so many times, for an attempt or its subject, is still to be met."""
    order_no = format_channel_order_no(payment_id, attempt)
    subject = town.books(payment_id, attempt, bank)["subject"]
    planted = town.driver.http.get("/faults", params={"bank": bank}).json()["faults"]
    of_attempt = [one for one in planted if one["order_no"] == order_no or one["subject"] == subject]
    return sum(one["times_left"] for one in of_attempt if one["name"] == fault)


class Watched:
    """Counts how often a bank is asked about an attempt, from now on."""

    def __init__(self, town: Town, payment_id: int, attempt: int = 1, bank: str = "bank_a") -> None:
        self._order = (town, payment_id, "answer_delay_ms.query", attempt, bank)
        order_no = format_channel_order_no(payment_id, attempt)
        town.driver.plant(order_no=order_no, bank=bank, answer_delay_ms={"query": {"value": 0, "times": _MANY}})

    @property
    def queries(self) -> int:
        """How often it was asked."""
        return _MANY - left(*self._order)


_MANY = 1_000_000
