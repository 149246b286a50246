"""Which jobs a process runs, and how often: the one place that knows them all."""

import secrets
from collections.abc import Collection
from typing import NamedTuple, TypedDict

from paycore.app.core import Core, new_token
from paycore.channels.simbank_books import SimbankBooks
from paycore.domain.clock import Clock
from paycore.jobs.auditor import Auditor, Turns
from paycore.jobs.backoff import Draw
from paycore.jobs.closer import Closer
from paycore.jobs.ender import Ender
from paycore.jobs.examiner import Examiner
from paycore.jobs.gate import Account, ChannelGate
from paycore.jobs.recoverer import Recoverer
from paycore.jobs.refunder import Refunder, RefundLimits
from paycore.jobs.runner import Job
from paycore.jobs.slices import Slices
from paycore.jobs.sweeper import Sweeper
from paycore.metrics import Metrics
from paycore.settings import JobName, Settings
from paycore.store.protocol import Store
from paycore.usecases.attempts import Conversations
from paycore.usecases.judge_again import JudgeAgain
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer

_AUDIT_UNASKED_MS = 3_600_000
"""How often `paycore run auditor` audits where no interval is set."""


class _Common(TypedDict):
    """What the jobs about attempts share."""

    store: Store
    writer: Writer
    accounts: Collection[Account]
    conversations: Conversations
    schedule: Schedule
    slices: Slices
    gate: ChannelGate
    clock: Clock
    draw: Draw


class _Patience(TypedDict):
    """What those share that give up some day."""

    metrics: Metrics
    unreachable_ms: int


class Planned(NamedTuple):
    """A job, and how long it rests between two passes."""

    job: Job
    interval_ms: int


def build_jobs(
    settings: Settings, core: Core, names: Collection[JobName] | None = None, *, by_hand: bool = False
) -> list[Planned]:
    """Build the jobs that the settings name, or those of ``names``.

    by_hand: somebody waits for what a single run comes to, so it is made whether or not it is this process's turn.
    """
    wanted = _wanted(settings) if names is None else names
    gate = ChannelGate(core.registry.traits, core.clock)
    slices = Slices(core.store, core.writer, core.clock, new_token, settings.repair_lease_seconds * 1_000)
    closer, recoverer, ender = _about_attempts(settings, core, gate, slices)
    every: dict[JobName, Planned] = {
        "refunder": Planned(_refunder(settings, core, gate, slices), settings.refund_interval_ms),
        "closer": Planned(closer, settings.repair_interval_ms),
        "recoverer": Planned(recoverer, settings.repair_interval_ms),
        "ender": Planned(ender, settings.repair_interval_ms),
        "sweeper": Planned(_sweeper(settings, core, gate, slices), settings.sweep_interval_seconds * 1_000),
        "examiner": Planned(_examiner(core, gate, slices), settings.quarantine_interval_ms),
        "auditor": Planned(_auditor(settings, core, by_hand=by_hand), settings.audit_interval_seconds * 1_000),
    }
    return [planned for name, planned in every.items() if name in wanted]


def _wanted(settings: Settings) -> set[JobName]:
    """What a server runs. An audit reads everything: it is asked for by its interval."""
    return {name for name in settings.jobs if name != "auditor" or settings.audit_interval_seconds}


def _sweeper(settings: Settings, core: Core, gate: ChannelGate, slices: Slices) -> Sweeper:
    return Sweeper(
        store=core.store,
        writer=core.writer,
        conversations=core.conversations,
        schedule=Schedule(core.registry.traits, settings.late_grace_ms),
        slices=slices,
        gate=gate,
        clock=core.clock,
        metrics=core.metrics,
        full_ms=settings.sweep_full_seconds * 1_000,
    )


def _examiner(core: Core, gate: ChannelGate, slices: Slices) -> Examiner:
    judge = build_judge(core, gate, "examiner")
    return Examiner(store=core.store, writer=core.writer, judge=judge, slices=slices, clock=core.clock)


def build_judge(core: Core, gate: ChannelGate, who: str) -> JudgeAgain:
    """Build what judges evidence again, asking channels through the gate. who: stands in what it resolves."""
    return JudgeAgain(
        core.store,
        core.writer,
        core.conversations.behind(gate.call),
        core.registry.code,
        clock=core.clock,
        metrics=core.metrics,
        who=who,
    )


def _auditor(settings: Settings, core: Core, *, by_hand: bool) -> Auditor:
    every_ms = settings.audit_interval_seconds * 1_000
    turns = Turns(core.writer, every_ms, new_token) if every_ms and not by_hand else None
    books_url = settings.simbank_url
    return Auditor(
        store=core.store,
        clock=core.clock,
        metrics=core.metrics,
        open_books=None if books_url is None else lambda: SimbankBooks(books_url, settings.channel_timeout_ms),
        turns=turns,
    )


def _refunder(settings: Settings, core: Core, gate: ChannelGate, slices: Slices) -> Refunder:
    return Refunder(
        store=core.store,
        writer=core.writer,
        accounts=core.registry.codes,
        conversations=core.conversations,
        slices=slices,
        gate=gate,
        clock=core.clock,
        metrics=core.metrics,
        draw=secrets.randbelow,
        limits=RefundLimits(
            retry_ms=settings.refund_retry_ms,
            longest_ms=settings.refund_longest_seconds * 1_000,
            attention_ms=settings.refund_attention_seconds * 1_000,
            lease_ms=core.lease_ms,
        ),
    )


def _about_attempts(
    settings: Settings, core: Core, gate: ChannelGate, slices: Slices
) -> tuple[Closer, Recoverer, Ender]:
    common: _Common = {
        "store": core.store,
        "writer": core.writer,
        "accounts": core.registry.codes,
        "conversations": core.conversations,
        "schedule": Schedule(core.registry.traits, settings.late_grace_ms),
        "slices": slices,
        "gate": gate,
        "clock": core.clock,
        "draw": secrets.randbelow,
    }
    patience: _Patience = {
        "metrics": core.metrics,
        "unreachable_ms": settings.close_unreachable_seconds * 1_000,
    }
    return (
        Closer(**common, **patience, codes=core.registry.code),
        Recoverer(**common, **patience),
        Ender(**common, new_token=new_token, lease_ms=core.lease_ms + settings.channel_timeout_ms),
    )
