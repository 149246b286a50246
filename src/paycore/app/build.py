"""Puts the parts of a server together. Nothing runs yet but the writer, whose number the payment ids need."""

from collections.abc import Callable
from typing import NamedTuple

from paycore.app.core import Core, build_core, new_token
from paycore.app.jobs import Planned, build_jobs
from paycore.metrics import Metrics
from paycore.rpc.notify import NotifyHandler
from paycore.rpc.payments import PaymentHandlers, UseCases
from paycore.rpc.server import RpcServer
from paycore.settings import Settings
from paycore.store.protocol import Store
from paycore.usecases.notify import Notify
from paycore.usecases.pay import Pay
from paycore.usecases.pay_command import PayLimits
from paycore.usecases.query import Query
from paycore.usecases.tasks import Schedule


class Parts(NamedTuple):
    """What has to be started, watched or taken down."""

    core: Core
    pay: Pay
    query: Query
    jobs: list[Planned]
    server: RpcServer


def build(
    settings: Settings, store: Store, metrics: Metrics, on_health: Callable[[bool], None], *, shared_port: bool = False
) -> Parts:
    """Build everything over an open store and start the writer.

    on_health: told on the writer thread whether the database could be written. shared_port: whether other processes
    take calls on the same address. Raises StoreUnavailableError and StoreBusyError when not even the writer's number
    can be drawn.
    """
    core = build_core(settings, store, metrics, on_health, warm_payments=settings.warm_payments)
    pay = Pay(
        store,
        core.writer,
        core.conversations,
        registry=core.registry,
        clock=core.clock,
        ids=core.ids,
        limits=_pay_limits(settings),
        schedule=Schedule(core.registry.traits, settings.late_grace_ms),
        new_token=new_token,
        lease_ms=core.lease_ms,
    )
    query = Query(store, core.conversations, core.clock)
    server = RpcServer(
        NotifyHandler(Notify(core.writer), core.writer.decoder, core.clock),
        PaymentHandlers(UseCases(pay, query, core.close), core.clock, pay_timeout_ms=settings.pay_timeout_ms),
        max_message_bytes=settings.max_message_bytes,
        shared_port=shared_port,
    )
    return Parts(core, pay, query, build_jobs(settings, core), server)


def _pay_limits(settings: Settings) -> PayLimits:
    return PayLimits(
        min_validity_ms=settings.min_validity_seconds * 1_000,
        max_validity_ms=settings.max_validity_seconds * 1_000,
        default_validity_ms=settings.default_validity_seconds * 1_000,
        min_remaining_ms=settings.min_remaining_seconds * 1_000,
    )
