"""Which jobs a process runs, and how often: the one place that knows them all."""

from collections.abc import Collection
from typing import NamedTuple

from paycore.app.core import Core, new_token
from paycore.jobs.refunder import Refunder
from paycore.jobs.runner import Job
from paycore.settings import JobName, Settings


class Planned(NamedTuple):
    """A job, and how long it rests between two passes."""

    job: Job
    interval_ms: int


def build_jobs(settings: Settings, core: Core, names: Collection[JobName] | None = None) -> list[Planned]:
    """Build the jobs that the settings name, or those of ``names``."""
    wanted = settings.jobs if names is None else names
    every: dict[JobName, Planned] = {"refunder": Planned(_refunder(settings, core), settings.refund_interval_ms)}
    return [planned for name, planned in every.items() if name in wanted]


def _refunder(settings: Settings, core: Core) -> Refunder:
    return Refunder(
        core.store,
        core.writer,
        core.conversations,
        core.close,
        clock=core.clock,
        metrics=core.metrics,
        new_token=new_token,
        retry_ms=settings.refund_retry_ms,
        lease_ms=core.lease_ms,
        late_grace_ms=settings.late_grace_ms,
    )
