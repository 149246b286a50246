"""Puts the parts of a server together. Nothing runs yet but the writer, whose number the payment ids need."""

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog

from paycore._dedupe import Index
from paycore.app.clock import SystemClock
from paycore.channels.registry import ChannelRegistry
from paycore.channels.simbank import SimbankChannel
from paycore.domain.ids import NODE_COUNT, PaymentIds
from paycore.jobs.refunder import Refunder
from paycore.metrics import Metrics
from paycore.rpc.notify import NotifyHandler
from paycore.rpc.payments import PaymentHandlers, UseCases
from paycore.rpc.server import RpcServer
from paycore.settings import Settings
from paycore.store.protocol import Store
from paycore.usecases.attempts import Conversations
from paycore.usecases.close import Close
from paycore.usecases.notify import Notify
from paycore.usecases.pay import Pay
from paycore.usecases.pay_command import PayLimits
from paycore.usecases.quarantine import QuarantineLimits
from paycore.usecases.query import Query
from paycore.usecases.warm import warm
from paycore.usecases.writer import Writer

SIMBANK = "simbank"

_LEASE_SPARE_MS = 5_000

_log = structlog.get_logger()


class Parts(NamedTuple):
    """What has to be started, watched or taken down."""

    store: Store
    writer: Writer
    registry: ChannelRegistry
    pay: Pay
    refunder: Refunder
    server: RpcServer


def build(
    settings: Settings, store: Store, metrics: Metrics, on_health: Callable[[bool], None], *, shared_port: bool = False
) -> Parts:
    """Build everything over an open store and start the writer.

    on_health: told on the writer thread whether the database could be written. shared_port: whether other processes
    take calls on the same address. Raises StoreUnavailableError and StoreBusyError when not even the writer's number
    can be drawn.
    """
    clock = SystemClock()
    registry = build_registry(settings, clock)
    index = Index(late_grace_ms=settings.late_grace_ms, max_bytes=settings.index_max_mib << 20)
    _warm(store, index, registry, settings.warm_payments)
    writer = Writer(
        store,
        index,
        codes=registry.codes,
        clock=clock,
        metrics=metrics,
        late_grace_ms=settings.late_grace_ms,
        queue_limit=settings.queue_limit,
        quarantine_limits=QuarantineLimits(settings.quarantine_burst, settings.quarantine_per_minute),
        on_health=on_health,
    )
    conversations = Conversations(registry, writer, clock)
    close = Close(store, writer, conversations, registry.code)
    # The writer's number is fresh from the database, so no two live processes share a node until it wraps.
    ids = PaymentIds(clock, writer.start() % NODE_COUNT)
    lease_ms = 2 * settings.channel_timeout_ms + _LEASE_SPARE_MS
    pay = Pay(
        store,
        writer,
        conversations,
        registry=registry,
        clock=clock,
        ids=ids,
        limits=_pay_limits(settings),
        new_token=_new_token,
        lease_ms=lease_ms,
    )
    refunder = Refunder(
        store,
        writer,
        conversations,
        close,
        clock=clock,
        metrics=metrics,
        new_token=_new_token,
        retry_ms=settings.refund_retry_ms,
        lease_ms=lease_ms,
        late_grace_ms=settings.late_grace_ms,
    )
    server = RpcServer(
        NotifyHandler(Notify(writer), writer.decoder, clock),
        PaymentHandlers(UseCases(pay, Query(store), close), clock, pay_timeout_ms=settings.pay_timeout_ms),
        max_message_bytes=settings.max_message_bytes,
        shared_port=shared_port,
    )
    return Parts(store, writer, registry, pay, refunder, server)


def build_registry(settings: Settings, clock: SystemClock) -> ChannelRegistry:
    """Build the channels that the settings name; none without a simbank_url."""
    if settings.simbank_url is None:
        return ChannelRegistry({}, {})
    secrets_by_account = {account: settings.simbank_secrets[account] for account in settings.simbank_accounts}
    channel = SimbankChannel(settings.simbank_url, secrets_by_account, settings.channel_timeout_ms, clock)
    return ChannelRegistry({SIMBANK: channel}, {SIMBANK: settings.simbank_accounts})


def _warm(store: Store, index: Index, registry: ChannelRegistry, limit: int) -> None:
    started_ns = time.perf_counter_ns()
    loaded = warm(store, index, registry.codes, limit)
    elapsed_ms = (time.perf_counter_ns() - started_ns) // 1_000_000
    if loaded:
        _log.info("index_warm", payments=loaded, index_bytes=index.nbytes, elapsed_ms=elapsed_ms)


def _pay_limits(settings: Settings) -> PayLimits:
    return PayLimits(
        min_validity_ms=settings.min_validity_seconds * 1_000,
        max_validity_ms=settings.max_validity_seconds * 1_000,
        default_validity_ms=settings.default_validity_seconds * 1_000,
        min_remaining_ms=settings.min_remaining_seconds * 1_000,
    )


def _new_token() -> str:
    return secrets.token_hex(16)
