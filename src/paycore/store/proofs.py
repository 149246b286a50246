"""Proves R1 and R2 over a whole database, one range of payments after another.

A range is read in one transaction, whose snapshot every check of it shares. The ranges need no common snapshot: all
that there is about a payment lies in its range and is written in commits that keep the rules, facts are only ever
added, and nothing is compared between two payments. So what is wrong in one range's snapshot is wrong, and what is
right in it can be made wrong only later, which the next audit sees. One transaction over all of it would keep SQLite
from emptying its log, and PostgreSQL from clearing away dead rows, for as long as the audit takes.

Merchant orders have no payment_id in their key. They are read in the order of theirs, each beside the one payment that
it names and that was written in the same commit (``store.proof_orders``).
"""

from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, text

from paycore.domain.audit import UNJUDGED_GRACE_MS, AuditKind, Violation
from paycore.domain.ids import MAX_INT64
from paycore.store import proof_checks, proof_orders
from paycore.store.proof_orders import OrderKey as OrderKey
from paycore.store.proof_refunds import ExcessFact, RefundFact, prove_refunds

RANGE_ROWS = 20_000
"""Rows that a range holds of each table at most, if more of them are not one payment's."""

_CHUNK = 500

_CACHE_KIB = 16_384
"""What SQLite keeps of a range's pages while its checks are made; its own default is too little for one range."""

_CHECKS = [(check.kind, text(proof_checks.WITH_RANGE + check.sql)) for check in proof_checks.CHECKS]
_EXCESS = text(proof_checks.WITH_RANGE + proof_checks.EXCESS)
_REFUNDS = text(proof_checks.WITH_RANGE + proof_checks.REFUNDS)
_COUNTS = [text(proof_checks.WITH_RANGE + count) for count in proof_checks.COUNTS]
_QUERIED_UNJUDGED = text(proof_checks.WITH_RANGE + proof_checks.QUERIED_UNJUDGED)
_EVIDENCE = text(proof_checks.EVIDENCE).bindparams(bindparam("ids", expanding=True))
_NEXT_RANGE = text(proof_checks.NEXT_RANGE)
_QUARANTINE = text(proof_checks.QUARANTINE)
_BOUNDS = text("SELECT min(payment_id), max(payment_id) FROM payment")


class Tally(NamedTuple):
    """What was counted. Ages are told as the moment of the oldest: None where there is none.

    waiting: excess of payments without outcome. unfinished: refunds whose money is not back; attention: tries that
    a person was told of.
    """

    payments: int = 0
    kept: int = 0
    excess: int = 0
    refunds: int = 0
    waiting: int = 0
    unfinished: int = 0
    attention: int = 0
    oldest_waiting_at_ms: int | None = None
    oldest_unfinished_at_ms: int | None = None

    def plus(self, other: "Tally") -> "Tally":
        """Both together."""
        counts = (ours + theirs for ours, theirs in zip(self[:-2], other[:-2], strict=True))
        return Tally(*counts, *map(_older, self[-2:], other[-2:]))


def _older(one: int | None, other: int | None) -> int | None:
    known = [at_ms for at_ms in (one, other) if at_ms is not None]
    return min(known, default=None)


class Proof(NamedTuple):
    """What one range showed."""

    violations: list[Violation]
    tally: Tally


class Range(NamedTuple):
    """Payments with ids above ``after``, up to ``last``."""

    after: int
    last: int


class OrdersProof(NamedTuple):
    """What some merchant orders showed. last: the last of them; None when there are no more."""

    violations: list[Violation]
    last: OrderKey | None


def id_bounds(connection: Connection) -> tuple[int, int] | None:
    """The least and the greatest payment id; None where there is no payment."""
    least, greatest = connection.execute(_BOUNDS).one()
    return None if least is None else (least, greatest)


def next_range(connection: Connection, after: int, rows: int = RANGE_ROWS) -> Range:
    """The range above an id. The last one ends with the greatest id that there can be."""
    prepare(connection)
    # An id that is over the limit begins the next range, unless it fills one alone.
    bound = connection.execute(_NEXT_RANGE, {"after": after, "rows": rows}).scalar_one()
    return Range(after, MAX_INT64 if bound is None else max(bound - 1, after + 1))


def prove_next(connection: Connection, after: int, now_ms: int, rows: int = RANGE_ROWS) -> tuple[Range, Proof]:
    """Find the range above an id and prove it."""
    scope = next_range(connection, after, rows)
    return scope, prove_range(connection, scope, now_ms)


def prepare(connection: Connection) -> None:
    """Set a read transaction to reading parts of large tables."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql(f"PRAGMA cache_size = {-_CACHE_KIB}")
        return
    # Every statement here is about a small part of a table, in the order of its key, whatever its statistics say.
    for setting in ("enable_seqscan = off", "jit = off", "random_page_cost = 1.1"):
        connection.exec_driver_sql(f"SET LOCAL {setting}")


def prove_range(connection: Connection, scope: Range, now_ms: int) -> Proof:
    """Make every check of one range."""
    between = scope._asdict()
    violations = proof_orders.prove_payments(connection, *scope)
    for kind, check in _CHECKS:
        violations += [_violation(kind, row) for row in connection.execute(check, between).mappings()]
    violations += _queried_unjudged(connection, {**between, "unjudged_before_ms": now_ms - UNJUDGED_GRACE_MS})
    excess = [ExcessFact(*row) for row in connection.execute(_EXCESS, between)]
    refunds = [RefundFact(*row) for row in connection.execute(_REFUNDS, between)]
    violations += prove_refunds(excess, refunds)
    payments, kept, attention = (connection.execute(count, between).scalar_one() for count in _COUNTS)
    waiting = [one.recorded_at_ms for one in excess if one.state is None]
    unfinished = [one.recorded_at_ms for one in refunds if not (one.done or (one.failed and one.is_of_merchant))]
    counts = (payments, kept, len(excess), len(refunds), len(waiting), len(unfinished), attention)
    return Proof(violations, Tally(*counts, min(waiting, default=None), min(unfinished, default=None)))


def _violation(kind: AuditKind, row: Any) -> Violation:
    details = dict(row)
    return Violation(kind, details.pop("payment_id"), details)


def _queried_unjudged(connection: Connection, parameters: dict[str, int]) -> list[Violation]:
    """What a channel called paid and nobody has judged, unless the word about it lies in quarantine."""
    found = connection.execute(_QUERIED_UNJUDGED, parameters).mappings().all()
    ids = sorted({row["payment_id"] for row in found})
    evidence: set[tuple[int, int]] = set()
    for start in range(0, len(ids), _CHUNK):
        about = connection.execute(_EVIDENCE, {"ids": ids[start : start + _CHUNK]})
        evidence.update((payment_id, attempt) for payment_id, attempt in about)
    return [
        _violation(AuditKind.QUERIED_PAID_UNJUDGED, row)
        for row in found
        if (row["payment_id"], row["attempt"]) not in evidence
    ]


def prove_orders(connection: Connection, after: OrderKey, rows: int = RANGE_ROWS) -> OrdersProof:
    """Prove the merchant orders that follow one."""
    prepare(connection)
    return OrdersProof(*proof_orders.prove_orders(connection, after, rows))


def open_quarantine(connection: Connection) -> tuple[int, int | None]:
    """How much evidence nobody has resolved, and when the oldest of it was first seen."""
    count, oldest_at_ms = connection.execute(_QUARANTINE).one()
    return count, oldest_at_ms
