"""paycore in one process without gRPC: every use case over a real database, as the server wires them."""

from __future__ import annotations

import functools
import itertools
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from sqlalchemy import Executable, select

from paycore._dedupe import Index
from paycore.channels.protocol import Channel, ChannelTraits
from paycore.channels.registry import ChannelRegistry
from paycore.domain.clock import Clock
from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import NODE_COUNT, PaymentIds, format_channel_order_no
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import AttemptState, ChannelResult, PayMethod
from paycore.jobs.backoff import Draw
from paycore.jobs.gate import ChannelGate
from paycore.jobs.refunder import Refunder, RefundLimits
from paycore.jobs.slices import Slices
from paycore.metrics import Metrics
from paycore.store import tables
from paycore.store.engine import parse_database_url
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import ChannelOrderRow, PaymentRecord, PaymentRow
from paycore.store.schema import migrate, open_store
from paycore.usecases.attempts import Conversations
from paycore.usecases.close import Close
from paycore.usecases.judge import AccountCodes, index_payment
from paycore.usecases.notify import Notify
from paycore.usecases.pay import Pay
from paycore.usecases.pay_command import PayCommand, PayLimits
from paycore.usecases.pay_open import OpenAttempt
from paycore.usecases.quarantine import QuarantineLimits
from paycore.usecases.query import Query
from paycore.usecases.tasks import Schedule
from paycore.usecases.words import verdict_at
from paycore.usecases.writer import Writer

CHANNEL = "simbank"
ACCOUNTS = ("bank_a", "bank_b", "bank_c")
VALIDITY_MS = 600_000
AMOUNT_MINOR = 1_234
LIMITS = PayLimits(
    min_validity_ms=1_000, max_validity_ms=86_400_000, default_validity_ms=VALIDITY_MS, min_remaining_ms=10_000
)

DEFAULT_TRAITS = ChannelTraits()
NO_FLOOD = QuarantineLimits(burst=1_000_000, per_minute=1_000_000)

_orders = itertools.count(1)


@functools.cache
def _template() -> Path:
    path = Path(tempfile.mkdtemp(prefix="paycore-tests-")) / "template.db"
    migrate(f"sqlite:///{path}")
    return path


def fresh_database(path: Path) -> Path:
    """Put a migrated, empty database there; the migration itself is run once a test process."""
    shutil.copy(_template(), path)
    return path


def as_url(database: Path | str) -> str:
    """A database's URL; a path is a SQLite file's."""
    return database if isinstance(database, str) else f"sqlite:///{database}"


def change(database: Path | str, statement: Executable) -> None:
    """Run a statement that changes rows, as an operator would, through a connection of its own."""
    engine = parse_database_url(as_url(database)).engine(writes=True)
    try:
        with engine.begin() as connection:
            connection.execute(statement)
    finally:
        engine.dispose()


class Written(NamedTuple):
    """What a database got more or other than before: table name -> rows. The writers' own table is left out."""

    tables: dict[str, list[Any]]

    def names(self) -> set[str]:
        return set(self.tables)

    def rows(self, name: str) -> list[Any]:
        return self.tables.get(name, [])

    def row(self, name: str) -> Any:
        (only,) = self.rows(name)
        return only


class MakePayment:
    """A write unit: a payment with attempts that stand open, as Pay leaves them; no channel is called."""

    def __init__(
        self,
        accounts: AccountCodes,
        payment_id: int,
        attempts: Sequence[str],
        *,
        amount_minor: int,
        currency: str,
        validity_ms: int,
        states: Mapping[int, AttemptState],
    ) -> None:
        self._accounts = accounts
        self._payment_id = payment_id
        self._attempts = attempts
        self._amount_minor = amount_minor
        self._currency = currency
        self._validity_ms = validity_ms
        self._states = states
        self._record: PaymentRecord | None = None

    def apply(self, transaction: WriteTransaction) -> PaymentRow:
        stamp, number = transaction.stamp, f"order-{next(_orders)}-{self._payment_id}"
        payment = PaymentRow(
            self._payment_id,
            "shop",
            number,
            self._amount_minor,
            self._currency,
            "Tea",
            "",
            "digest",
            stamp.recorded_at_ms + self._validity_ms,
            *stamp,
        )
        assert transaction.insert_payment(payment)
        assert transaction.insert_merchant_order("shop", number, self._payment_id)
        self._record = PaymentRecord(payment)
        for attempt, account in enumerate(self._attempts, start=1):
            row = self._attempt(payment, attempt, account)
            transaction.insert_channel_order(row)
            self._record.attempts[attempt] = row
        return payment

    def _attempt(self, payment: PaymentRow, attempt: int, account: str) -> ChannelOrderRow:
        stamp = (payment.recorded_at_ms, payment.writer_no, payment.group_no)
        return ChannelOrderRow(
            payment.payment_id,
            attempt,
            CHANNEL,
            account,
            PayMethod.REDIRECT,
            payment.expire_at_ms,
            self._states.get(attempt, AttemptState.OPEN),
            payment.recorded_at_ms,
            "https://bank.example/pay",
            "",
            "",
            None,
            None,
            0,
            "",
            *stamp,
        )

    def committed(self, index: Index) -> None:
        assert self._record is not None
        index_payment(index, self._record, self._accounts)


def longest(_: int) -> int:
    """Draw the longest wait each time: what is due is known to the millisecond."""
    return 0


class Core:
    """Store, index, writer and every use case on one database; started when entered, stopped on exit.

    path: a database that is migrated already (``fresh_database``), or its URL. channels: name -> adapter; every
    channel has ``accounts``. Without any, the accounts of simbank are known all the same, so that notifications can be
    judged.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        clock: Clock,
        channels: Mapping[str, Channel] | None = None,
        accounts: Sequence[str] = ACCOUNTS,
        late_grace_ms: int = 0,
        queue_limit: int = 10_000,
        quarantine_limits: QuarantineLimits = NO_FLOOD,
        lease_ms: int = 10_000,
        retry_ms: int = 1,
        limits: PayLimits = LIMITS,
        traits: ChannelTraits = DEFAULT_TRAITS,
        query: str = "",
    ) -> None:
        self.path = path if isinstance(path, Path) else Path("no file")
        self.clock = clock
        self.url = as_url(path)
        self.store = open_store(f"{self.url}{query}")
        names = channels or (CHANNEL,)
        self.registry = ChannelRegistry(channels or {}, dict.fromkeys(names, accounts), dict.fromkeys(names, traits))
        self.metrics = Metrics()
        self.index = Index(late_grace_ms=late_grace_ms)
        self.health: list[bool] = []
        self.writer = Writer(
            self.store,
            self.index,
            codes=self.registry.codes,
            clock=clock,
            metrics=self.metrics,
            late_grace_ms=late_grace_ms,
            queue_limit=queue_limit,
            quarantine_limits=quarantine_limits,
            on_health=self.health.append,
        )
        self.schedule = Schedule(self.registry.traits, late_grace_ms)
        self._late_grace_ms = late_grace_ms
        self._lease_ms = lease_ms
        self.refund_limits = RefundLimits(retry_ms, 1_800_000, 86_400_000, lease_ms)
        self._limits = limits

    def start(self) -> Self:
        """Start the writer and build what needs its number."""
        self.writer_no = self.writer.start()
        self.ids = PaymentIds(self.clock, self.writer_no % NODE_COUNT)
        self.conversations = Conversations(self.registry, self.writer, self.clock)
        self._notify = Notify(self.writer)
        self.query = Query(self.store, self.conversations, self.clock)
        self.closer = Close(self.store, self.writer, self.conversations, self.registry.code)
        self.payer = Pay(
            self.store,
            self.writer,
            self.conversations,
            registry=self.registry,
            clock=self.clock,
            ids=self.ids,
            limits=self._limits,
            schedule=self.schedule,
            new_token=secrets.token_hex,
            lease_ms=self._lease_ms,
        )
        self.refunder = self.a_refunder()
        return self

    def a_refunder(self, gate: ChannelGate | None = None, draw: Draw = longest, **limits: int) -> Refunder:
        """Another refunder over the same writer, as another process has one. limits: RefundLimits other than here."""
        return Refunder(
            store=self.store,
            writer=self.writer,
            accounts=self.registry.codes,
            conversations=self.conversations,
            slices=Slices(self.store, self.writer, self.clock, secrets.token_hex, self._lease_ms),
            gate=gate or ChannelGate(self.registry.traits, self.clock),
            clock=self.clock,
            metrics=self.metrics,
            draw=draw,
            limits=self.refund_limits._replace(**limits),
        )

    def stop(self) -> None:
        self.writer.stop()
        self.store.dispose()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    async def make_payment(
        self,
        *attempts: str,
        amount_minor: int = AMOUNT_MINOR,
        currency: str = "CNY",
        validity_ms: int = VALIDITY_MS,
        states: Mapping[int, AttemptState] | None = None,
    ) -> int:
        """Write a payment whose attempts stand open, at bank A where none is named; return its id."""
        unit = MakePayment(
            self.registry.code,
            self.ids.draw(),
            attempts or ("bank_a",),
            amount_minor=amount_minor,
            currency=currency,
            validity_ms=validity_ms,
            states=states or {},
        )
        return (await self.writer.run(unit)).payment_id

    def word(self, payment_id: int, attempt: int = 1, trade_no: str = "T1", **changes: Any) -> Notification:
        """A success as bank A, B or C (attempt 1, 2, 3) tells it, paid and received now."""
        account = ACCOUNTS[(attempt - 1) % len(ACCOUNTS)]
        now_ms = self.clock.now_ms()
        success = Notification(
            CHANNEL,
            account,
            format_channel_order_no(payment_id, attempt),
            ChannelResult.SUCCESS,
            AMOUNT_MINOR,
            "CNY",
            trade_no,
            now_ms,
            now_ms,
            raw=b'{"result": "SUCCESS"}',
            headers="{}",
        )
        return success._replace(**changes)

    def failure(self, payment_id: int, attempt: int = 1, **changes: Any) -> Notification:
        """A failure as the channel tells it."""
        told = self.word(payment_id, attempt, "", paid_at_ms=ABSENT_MS, **changes)
        return told._replace(result=ChannelResult.FAILURE)

    async def notify(self, notification: Notification) -> Verdict:
        batch = self.writer.decoder.of_values([notification])
        await self._notify.one(batch)
        return verdict_at(batch, 0)

    async def notify_many(self, *notifications: Notification) -> list[Verdict]:
        """Take words in as one batch; INVALID and THROTTLED are among its answers."""
        batch = self.writer.decoder.of_values(notifications)
        await self._notify.many(batch)
        return [verdict_at(batch, position) for position in range(len(batch))]

    async def pay(self, command: PayCommand, *, within_ms: int = 8_000) -> Any:
        return await self.payer.pay(command, deadline_ms=self.clock.now_ms() + within_ms)

    def forget(self) -> None:
        """Empty the index, as a restart does. Only while nothing is being written."""
        for payment_id in [key for key in self.index._slot_keys() if key not in (0, 1 << 63)]:
            self.index.discard(payment_id)

    def snapshot(self) -> dict[str, set[Any]]:
        """Every row of every table but the writers' own."""
        return read_all(self.url)

    @contextmanager
    def watch(self) -> Iterator[Written]:
        """Tell what the block wrote."""
        before, written = self.snapshot(), Written({})
        yield written
        after = self.snapshot()
        gone = {name: before[name] - after[name] for name in before}
        for name in after:
            fresh = sorted(after[name] - before[name])
            if fresh:
                written.tables[name] = fresh
            assert name in _CHANGING or not gone[name], f"facts of {name} were changed or deleted: {gone[name]}"

    def count(self, name: str, **labels: str) -> int:
        """Read a metric's sample."""
        return int(self.metrics.registry.get_sample_value(name, labels) or 0)


_CONVERSATIONS = {"channel_order", "refund_try", "quarantine", "task"}
_CHANGING = {*_CONVERSATIONS, "lease", "sweep_mark", "sweep_pending", "quarantine_mark"}
"""The tables whose rows change after their insert (design of the facts: ``store.tables``)."""


def read_all(database: Path | str) -> dict[str, set[Any]]:
    """Every row of every table but the writers' own, through a connection of its own."""
    engine = parse_database_url(as_url(database)).engine(writes=False)
    try:
        with engine.connect() as connection, connection.begin():
            return {
                table.name: set(connection.execute(select(table)).all())
                for table in tables.METADATA.sorted_tables
                if table.name != "writer"
            }
    finally:
        engine.dispose()


def pay_command(number: str, account: str = "bank_a", **changes: Any) -> PayCommand:
    """Ask for 12.34 CNY at a bank's page."""
    command = PayCommand(
        "shop", number, AMOUNT_MINOR, "CNY", f"Tea {number}", "", None, CHANNEL, account, PayMethod.REDIRECT
    )
    return command._replace(**changes)


def open_attempt(core: Core, number: str, account: str = "bank_a") -> OpenAttempt:
    """The first write of Pay, by a call of its own."""
    return OpenAttempt(
        pay_command(number, account),
        ids=core.ids,
        limits=LIMITS,
        accounts=core.registry.code,
        schedule=core.schedule,
        lease_token=secrets.token_hex(),
        lease_ms=60_000,
    )


def check_money_rules(rows: Mapping[str, Any]) -> None:
    """Hold R1 and R2 over a whole database, capture by capture."""
    outcomes = {row.payment_id: row for row in rows["payment_outcome"]}
    excess = {(row.payment_id, row.attempt, row.channel_trade_no): row for row in rows["excess_payment"]}
    refunds: dict[tuple[int, int, str], list[Any]] = {}
    for row in rows["refund"]:
        refunds.setdefault((row.payment_id, row.attempt, row.channel_trade_no), []).append(row)
    kept = {(row.payment_id, row.attempt, row.channel_trade_no) for row in outcomes.values() if row.state == 2}
    assert len(outcomes) == len(rows["payment_outcome"]), "one outcome a payment"
    assert not kept & excess.keys(), "a capture is both kept and excess"
    for capture, row in excess.items():
        owed = refunds.pop(capture, [])
        if row.payment_id in outcomes:
            assert len(owed) == 1, f"{capture} has {len(owed)} refunds"
            assert (owed[0].amount_minor, owed[0].currency) == (row.amount_minor, row.currency)
        else:
            assert not owed, f"{capture} is refunded without an outcome"
    assert not refunds, f"refunds of what is no excess: {refunds}"
