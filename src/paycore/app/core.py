"""What decides, put together: store, index, writer, and conversations with channels. The writer runs."""

import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog

from paycore._dedupe import Index
from paycore.app.clock import SystemClock
from paycore.channels.protocol import ChannelTraits
from paycore.channels.registry import ChannelRegistry
from paycore.channels.simbank import SimbankChannel
from paycore.domain.ids import NODE_COUNT, PaymentIds
from paycore.metrics import Metrics
from paycore.settings import Settings
from paycore.store.protocol import Store
from paycore.usecases.attempts import Conversations
from paycore.usecases.close import Close
from paycore.usecases.quarantine import QuarantineLimits
from paycore.usecases.warm import warm
from paycore.usecases.writer import Writer

SIMBANK = "simbank"

_LEASE_SPARE_MS = 5_000

_log = structlog.get_logger()


class Core(NamedTuple):
    """What a server and a lone job have in common: the decision, and conversations with channels. The writer runs.

    ids: draws payment ids for this writer's number. lease_ms: how long whoever talks to a channel has, at most.
    """

    store: Store
    writer: Writer
    registry: ChannelRegistry
    conversations: Conversations
    close: Close
    clock: SystemClock
    metrics: Metrics
    ids: PaymentIds
    lease_ms: int


def build_core(
    settings: Settings, store: Store, metrics: Metrics, on_health: Callable[[bool], None], *, warm_payments: int
) -> Core:
    """Build what decides over an open store, and start the writer.

    on_health: told on the writer thread whether the database could be written. warm_payments: how many are read into
    the index first. Raises StoreUnavailableError and StoreBusyError when not even the writer's number can be drawn.
    """
    clock = SystemClock()
    registry = build_registry(settings, clock)
    index = Index(late_grace_ms=settings.late_grace_ms, max_bytes=settings.index_max_mib << 20)
    _warm(store, index, registry, warm_payments)
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
    return Core(store, writer, registry, conversations, close, clock, metrics, ids, lease_ms)


def build_registry(settings: Settings, clock: SystemClock) -> ChannelRegistry:
    """Build the channels that the settings name; none without a simbank_url."""
    if settings.simbank_url is None:
        return ChannelRegistry({}, {})
    secrets_by_account = {account: settings.simbank_secrets[account] for account in settings.simbank_accounts}
    channel = SimbankChannel(settings.simbank_url, secrets_by_account, settings.channel_timeout_ms, clock)
    traits = ChannelTraits(
        tuple(1_000 * seconds for seconds in settings.simbank_query_ladder_seconds),
        1_000 * settings.simbank_min_close_age_seconds,
        settings.simbank_calls_per_second,
    )
    return ChannelRegistry({SIMBANK: channel}, {SIMBANK: settings.simbank_accounts}, {SIMBANK: traits})


def _warm(store: Store, index: Index, registry: ChannelRegistry, limit: int) -> None:
    started_ns = time.perf_counter_ns()
    loaded = warm(store, index, registry.codes, limit)
    elapsed_ms = (time.perf_counter_ns() - started_ns) // 1_000_000
    if loaded:
        _log.info("index_warm", payments=loaded, index_bytes=index.nbytes, elapsed_ms=elapsed_ms)


def new_token() -> str:
    """Return a text that nobody else has."""
    return secrets.token_hex(16)
