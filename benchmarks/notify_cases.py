"""What the Notify benchmark sends: a database of payments that wait for their word, and the words, serialised.

The payments are written into the store's own tables in one transaction, not by Pay, which calls a channel for each.
Each has a first attempt that failed and a second one that is open, as after a user whose first bank refused. So the
server can be told of it without a write: the failure, told again, is a replay, and loads the payment into the index,
where its own Pay would have put it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import insert

from paycore.domain.ids import ID_EPOCH_MS, format_channel_order_no
from paycore.domain.verdicts import AttemptState, NotifyOutcome, PayMethod
from paycore.store import tables
from paycore.store.engine import parse_database_url
from paycore.store.rows import ChannelOrderRow, PaymentRow, Stamp
from paycore.store.schema import migrate, open_store
from paycore.v1 import payment_pb2, payment_service_pb2

CHANNEL = "simbank"
FAILED_ATTEMPT, OPEN_ATTEMPT = 1, 2
ACCOUNTS = {FAILED_ATTEMPT: "bank_a", OPEN_ATTEMPT: "bank_b"}
VALIDITY_MS = 86_400_000
AGE_MS = 60_000
IDS_PER_MS = 50
KNOWN_NODE, UNKNOWN_NODE = 5, 6
FIRST_AMOUNT_MINOR, AMOUNTS = 100_000, 900_000


class Bodies(NamedTuple):
    """gRPC messages of one size, one after another in a file: 5 bytes that say the length, and the request."""

    path: Path
    size: int
    messages: int


class Case(NamedTuple):
    """One row of the benchmark: what is sent, and what it has to become. table: which one gets a row for each."""

    name: str
    meaning: str
    bodies: Bodies
    outcome: NotifyOutcome
    replayed: bool
    table: str | None


class Prepared(NamedTuple):
    """A database, the words that make its payments known to a server, and the cases in the order of their turn."""

    database: Path
    making_known: Bodies
    cases: tuple[Case, ...]


def prepare(folder: Path, count: int) -> Prepared:
    """Write everything into a folder; ``count`` words a case."""
    # Made so long ago that all pay times, a second after the last of them, are in the past.
    first_ms = time.time_ns() // 1_000_000 - AGE_MS - 2 * count // IDS_PER_MS
    ids = payment_ids(first_ms, 2 * count, KNOWN_NODE)
    paid_at_seconds = (first_ms + 2 * count // IDS_PER_MS) // 1_000 + 1
    database = folder / "prepared.db"
    write_payments(database, ids, first_ms)
    known, cold = ids[:count], ids[count:]
    first_words = write_words(folder / "first", known, OPEN_ATTEMPT, paid_at_seconds)
    cold_words = write_words(folder / "cold", cold, OPEN_ATTEMPT, paid_at_seconds)
    unknown = payment_ids(first_ms, count, UNKNOWN_NODE)
    unknown_words = write_words(folder / "unknown", unknown, OPEN_ATTEMPT, paid_at_seconds)
    return Prepared(
        database,
        write_words(folder / "failures", known, FAILED_ATTEMPT, paid_at_seconds),
        (
            Case(
                "first notifications",
                "each one durable insert; the server knows the payments, as after its own Pay",
                first_words,
                NotifyOutcome.ACCEPTED,
                replayed=False,
                table="payment_outcome",
            ),
            Case(
                "replays",
                "the same words again: each compared with its row, nothing written",
                first_words,
                NotifyOutcome.ACCEPTED,
                replayed=True,
                table=None,
            ),
            Case(
                "first notifications, cold",
                "each one durable insert; the payments are first read from the database, as after a restart",
                cold_words,
                NotifyOutcome.ACCEPTED,
                replayed=False,
                table="payment_outcome",
            ),
            Case(
                "unknown orders",
                "each one durable row in quarantine, with raw bytes and headers, and a line in the log",
                unknown_words,
                NotifyOutcome.UNKNOWN,
                replayed=False,
                table="quarantine",
            ),
        ),
    )


def payment_ids(first_ms: int, count: int, node: int) -> list[int]:
    """Ids as a server draws them, ``IDS_PER_MS`` a millisecond."""
    start_ms = first_ms - ID_EPOCH_MS
    return [(start_ms + i // IDS_PER_MS) << 22 | node << 12 | i % IDS_PER_MS for i in range(count)]


def amount_minor(payment_id: int) -> int:
    """What a payment is over: six digits, so that all messages have one size."""
    return FIRST_AMOUNT_MINOR + (payment_id >> 12) % AMOUNTS


def trade_no(payment_id: int) -> str:
    """The channel's number for the money."""
    return f"4200{payment_id}"


# ---- The database ----------------------------------------------------------------------------------------


def write_payments(path: Path, ids: Sequence[int], at_ms: int) -> None:
    """Make a migrated database with payments in it, and leave it as one file."""
    url = f"sqlite:///{path}"
    migrate(url)
    store = open_store(url)
    stamp = Stamp(at_ms, store.open_writer(at_ms), 1)
    store.dispose()
    engine = parse_database_url(url).engine(writes=True)
    payments = [payment_row(payment_id, stamp) for payment_id in ids]
    with engine.connect() as connection:
        with connection.begin():
            connection.execute(insert(tables.payment), [row._asdict() for row in payments])
            connection.execute(insert(tables.merchant_order), [merchant_order(row, stamp) for row in payments])
            orders = [channel_order_row(row, attempt, stamp) for row in payments for attempt in ACCOUNTS]
            connection.execute(insert(tables.channel_order), [row._asdict() for row in orders])
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()


def payment_row(payment_id: int, stamp: Stamp) -> PaymentRow:
    """A payment that may be paid for a day."""
    number, amount, expire_at_ms = f"order-{payment_id}", amount_minor(payment_id), stamp.recorded_at_ms + VALIDITY_MS
    return PaymentRow(payment_id, "shop", number, amount, "CNY", "Tea", "", "0" * 64, expire_at_ms, *stamp)


def merchant_order(row: PaymentRow, stamp: Stamp) -> dict[str, object]:
    """The key under which its caller finds it."""
    return {
        "merchant_id": row.merchant_id,
        "merchant_order_no": row.merchant_order_no,
        "payment_id": row.payment_id,
        **stamp._asdict(),
    }


def channel_order_row(payment: PaymentRow, attempt: int, stamp: Stamp) -> ChannelOrderRow:
    """The attempt that failed, or the one that is open."""
    failed = attempt == FAILED_ATTEMPT
    return ChannelOrderRow(
        payment_id=payment.payment_id,
        attempt=attempt,
        channel=CHANNEL,
        account=ACCOUNTS[attempt],
        method=PayMethod.REDIRECT,
        expire_at_ms=payment.expire_at_ms,
        state=AttemptState.FAILED if failed else AttemptState.OPEN,
        state_at_ms=stamp.recorded_at_ms,
        credential=f"https://bank.example/pay/{payment.payment_id}",
        failure_code="REFUSED" if failed else "",
        failure_message="",
        failed_at_ms=stamp.recorded_at_ms if failed else None,
        superseded_at_ms=None,
        lease_until_ms=0,
        lease_token="",
        recorded_at_ms=stamp.recorded_at_ms,
        writer_no=stamp.writer_no,
        group_no=stamp.group_no,
    )


# ---- The words -------------------------------------------------------------------------------------------


def write_words(path: Path, ids: Iterable[int], attempt: int, paid_at_seconds: int) -> Bodies:
    """Serialise one word for each payment. Asserts that all have one size."""
    messages = [request(payment_id, attempt, paid_at_seconds).SerializeToString() for payment_id in ids]
    (length,) = {len(message) for message in messages}
    frame = b"\0" + length.to_bytes(4, "big")
    path.write_bytes(b"".join(frame + message for message in messages))
    return Bodies(path, len(frame) + length, len(messages))


def request(payment_id: int, attempt: int, paid_at_seconds: int) -> payment_service_pb2.NotifyRequest:
    """A bank's word as the forwarder hands it over, with the bank's body and the headers of its signature."""
    succeeded = attempt == OPEN_ATTEMPT
    told = {
        "notification_id": f"n-{payment_id}",
        "bank": ACCOUNTS[attempt],
        "result": "SUCCESS" if succeeded else "FAILURE",
        "order_no": format_channel_order_no(payment_id, attempt),
        "trade_no": trade_no(payment_id) if succeeded else "",
        "amount_minor": amount_minor(payment_id),
        "currency": "CNY",
        "paid_at_ms": paid_at_seconds * 1_000,
    }
    return payment_service_pb2.NotifyRequest(
        channel=CHANNEL,
        account=ACCOUNTS[attempt],
        channel_order_no=format_channel_order_no(payment_id, attempt),
        result=payment_pb2.CHANNEL_RESULT_SUCCESS if succeeded else payment_pb2.CHANNEL_RESULT_FAILURE,
        amount_minor=amount_minor(payment_id),
        currency="CNY",
        channel_trade_no=trade_no(payment_id) if succeeded else "",
        paid_at=Timestamp(seconds=paid_at_seconds),
        raw=json.dumps(told, separators=(",", ":")).encode(),
        headers={
            "content-type": "application/json",
            "simbank-timestamp": str(paid_at_seconds),
            "simbank-nonce": f"{payment_id:032x}",
            "simbank-signature": f"{payment_id:064x}",
        },
    )
