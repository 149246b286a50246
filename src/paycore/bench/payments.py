"""Payments that wait for their word, written straight into the tables as Pay leaves them.

Pay calls a channel for each payment, so it is no way to make millions. The database makes the rows itself, one
statement a table for tens of thousands, with every column filled and the ids in the order in which a server draws them.
"""

from collections.abc import Iterator
from typing import NamedTuple

from paycore.domain.ids import ID_EPOCH_MS, NODE_BITS, SEQUENCE_BITS
from paycore.domain.verdicts import AttemptState, CaptureSource, PaymentState, PayMethod
from paycore.store.rows import Stamp

CHANNEL = "simbank"
CURRENCY = "CNY"
IDS_PER_MS = 50
VALIDITY_MS = 86_400_000
FIRST_AMOUNT_MINOR, AMOUNTS = 100_000, 900_000
ROWS_A_STEP = 50_000

_TIME_SHIFT = NODE_BITS + SEQUENCE_BITS
_TERMS_DIGEST = "0" * 64


class Cycle(NamedTuple):
    """What differs among the payments of a lot, by place modulo ``length``.

    The first ``twice`` have a second open attempt; the validity of the last ``expired`` has passed at once.
    """

    length: int
    twice: int
    expired: int


class Lot(NamedTuple):
    """So many payments made one after another from a moment on, ``IDS_PER_MS`` a millisecond.

    node: as of the server that drew the ids; no two lots share one. Each has an open attempt, 1. paid: each is paid
    already, by that attempt.
    """

    first_ms: int
    size: int
    node: int
    paid: bool = False
    cycle: Cycle = Cycle(1, 0, 0)

    def ids(self) -> Iterator[int]:
        """Their ids, ascending."""
        start, node = self.first_ms - ID_EPOCH_MS, self.node << SEQUENCE_BITS
        for place in range(self.size):
            yield (start + place // IDS_PER_MS) << _TIME_SHIFT | node | place % IDS_PER_MS

    @property
    def end_ms(self) -> int:
        """The millisecond after the last of them was made."""
        return self.first_ms + -(-self.size // IDS_PER_MS)


def account(attempt: int) -> str:
    """The account that an attempt uses."""
    return f"bank_{'abc'[attempt - 1]}"


def amount_minor(payment_id: int) -> int:
    """What a payment is over: six digits, so that all words have one size."""
    return FIRST_AMOUNT_MINOR + (payment_id >> SEQUENCE_BITS) % AMOUNTS


def trade_no(payment_id: int, attempt: int) -> str:
    """The channel's number for the money that an attempt took."""
    return f"42{attempt:02d}{payment_id}"


# ---- The rows, as SQL that SQLite and PostgreSQL both take -------------------------------------------------

_ID_SQL = "((({start} + i / {per_ms}) << {shift}) | {node} | (i % {per_ms}))"
_CREATED_SQL = f"((payment_id >> {_TIME_SHIFT}) + {ID_EPOCH_MS})"
_AMOUNT_SQL = f"({FIRST_AMOUNT_MINOR} + (payment_id >> {SEQUENCE_BITS}) % {AMOUNTS})"
_ID_TEXT_SQL = "CAST(payment_id AS TEXT)"


def id_sql(lot: Lot) -> str:
    """A payment's id from its place ``i`` in the lot."""
    start, node = lot.first_ms - ID_EPOCH_MS, lot.node << SEQUENCE_BITS
    return _ID_SQL.format(start=start, per_ms=IDS_PER_MS, shift=_TIME_SHIFT, node=node)


def statements(lot: Lot, source: str, stamp: Stamp) -> Iterator[str]:
    """The inserts that write a part of a lot; ``source``: a query for ``i`` and ``payment_id`` of that part."""
    expired = f"i % {lot.cycle.length} >= {lot.cycle.length - lot.cycle.expired}"
    expire_at = f"{_CREATED_SQL} + CASE WHEN {expired} THEN 1 ELSE {VALIDITY_MS} END"
    stamped: dict[str, str | int] = {"recorded_at_ms": _CREATED_SQL}
    stamped |= {"writer_no": stamp.writer_no, "group_no": stamp.group_no}
    order_no = f"'order-' || {_ID_TEXT_SQL}"
    merchant_order: dict[str, str | int] = {"merchant_id": "'shop'", "merchant_order_no": order_no}
    merchant_order |= {"payment_id": "payment_id"}
    payment: dict[str, str | int] = {
        **merchant_order,
        "amount_minor": _AMOUNT_SQL,
        "currency": f"'{CURRENCY}'",
        "subject": "'Tea'",
        "return_url": "''",
        "terms_digest": f"'{_TERMS_DIGEST}'",
        "expire_at_ms": expire_at,
    }
    yield _insert("payment", payment | stamped, source)
    yield _insert("merchant_order", merchant_order | stamped, source)
    yield _insert("channel_order", _attempt(1, expire_at) | stamped, source)
    if lot.cycle.twice:
        second = _attempt(2, expire_at)
        twice = f"i % {lot.cycle.length} < {lot.cycle.twice}"
        yield _insert("channel_order", second | stamped, source, where=twice)
    if lot.paid:
        yield _insert("payment_outcome", _outcome() | stamped, source)


def _attempt(attempt: int, expire_at: str) -> dict[str, str | int]:
    return {
        "payment_id": "payment_id",
        "attempt": attempt,
        "channel": f"'{CHANNEL}'",
        "account": f"'{account(attempt)}'",
        "method": int(PayMethod.REDIRECT),
        "expire_at_ms": expire_at,
        "state": int(AttemptState.OPEN),
        "state_at_ms": _CREATED_SQL,
        "credential": f"'https://bank.example/pay/' || {_ID_TEXT_SQL}",
        "failure_code": "''",
        "failure_message": "''",
        "failed_at_ms": "NULL",
        "superseded_at_ms": "NULL",
        "lease_until_ms": 0,
        "lease_token": "''",
    }


def _outcome() -> dict[str, str | int]:
    return {
        "payment_id": "payment_id",
        "state": int(PaymentState.PAID),
        "attempt": 1,
        "channel_trade_no": f"'4201' || {_ID_TEXT_SQL}",
        "amount_minor": _AMOUNT_SQL,
        "currency": f"'{CURRENCY}'",
        "paid_at_ms": f"{_CREATED_SQL} + 1",
        "received_at_ms": f"{_CREATED_SQL} + 1",
        "source": int(CaptureSource.NOTIFICATION),
        "paid_at_untrusted": 0,
        "close_reason": 0,
    }


def _insert(table: str, values: dict[str, str | int], source: str, where: str = "") -> str:
    columns, expressions = ", ".join(values), ", ".join(map(str, values.values()))
    condition = f" WHERE {where}" if where else ""
    return f"INSERT INTO {table} ({columns}) SELECT {expressions} FROM ({source}) AS made{condition}"  # noqa: S608 - no input
