"""What is on record about the money of some attempts, to be compared with a channel's own books."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, bindparam, text

from paycore.store.proof_checks import WITH_RANGE
from paycore.store.proofs import Range, next_range

AttemptKey = tuple[int, int]
"""payment_id and attempt."""

_CHUNK = 500


class OurCapture(NamedTuple):
    """A judged capture. kept: else it is excess."""

    amount_minor: int
    currency: str
    kept: bool


class OurRefund(NamedTuple):
    """A refund. numbers: those that its tries were sent under; done: the money is back, by our record."""

    refund_no: str
    channel_trade_no: str
    amount_minor: int
    currency: str
    done: bool
    numbers: frozenset[str]

    @property
    def of_merchant(self) -> bool:
        """Whether the merchant asked for it."""
        return self.refund_no.startswith("M")


class OurMoney(NamedTuple):
    """One attempt. captures: by trade number; evidence: trade number -> whether it is open in quarantine."""

    channel: str
    account: str
    captures: dict[str, OurCapture]
    refunds: list[OurRefund]
    evidence: dict[str, bool]


def _of_payments(sql: str) -> Any:
    return text(sql).bindparams(bindparam("ids", expanding=True))


_ATTEMPTS = _of_payments("SELECT payment_id, attempt, channel, account FROM channel_order WHERE payment_id IN :ids")
_KEPT = _of_payments(
    "SELECT payment_id, attempt, channel_trade_no, amount_minor, currency FROM payment_outcome"
    " WHERE payment_id IN :ids AND state = 2"
)
_EXCESS = _of_payments(
    "SELECT payment_id, attempt, channel_trade_no, amount_minor, currency FROM excess_payment WHERE payment_id IN :ids"
)
_REFUNDS = _of_payments(
    "SELECT payment_id, attempt, refund_no, channel_trade_no, amount_minor, currency FROM refund"
    " WHERE payment_id IN :ids"
)
_DONE = _of_payments("SELECT payment_id, refund_no FROM refund_result WHERE payment_id IN :ids AND result IN (4, 6)")
_TRIES = _of_payments("SELECT payment_id, refund_no, channel_refund_no FROM refund_try WHERE payment_id IN :ids")
_EVIDENCE = _of_payments(
    "SELECT payment_id, attempt, channel_trade_no, is_open FROM quarantine WHERE payment_id IN :ids AND result = 1"
)
_CAPTURED_SQL = """
SELECT a.payment_id, a.attempt, a.account FROM a
WHERE a.channel = :channel
  AND (EXISTS (SELECT 1 FROM o WHERE o.payment_id = a.payment_id AND o.attempt = a.attempt)
    OR EXISTS (SELECT 1 FROM e WHERE e.payment_id = a.payment_id AND e.attempt = a.attempt))
"""
_CAPTURED = text(WITH_RANGE + _CAPTURED_SQL)


def money_of(connection: Connection, payment_ids: Iterable[int]) -> Mapping[AttemptKey, OurMoney]:
    """Read the money of every attempt of these payments."""
    money: dict[AttemptKey, OurMoney] = {}
    ids = sorted(set(payment_ids))
    for start in range(0, len(ids), _CHUNK):
        _read_chunk(connection, ids[start : start + _CHUNK], money)
    return money


def _read_chunk(connection: Connection, ids: Collection[int], money: dict[AttemptKey, OurMoney]) -> None:
    def rows(statement: Any) -> Iterable[Any]:
        return connection.execute(statement, {"ids": ids})

    for payment_id, attempt, channel, account in rows(_ATTEMPTS):
        money[payment_id, attempt] = OurMoney(channel, account, {}, [], {})
    nobodys = OurMoney("", "", {}, [], {})
    for statement, kept in ((_KEPT, True), (_EXCESS, False)):
        for payment_id, attempt, trade_no, amount_minor, currency in rows(statement):
            of_attempt = money.get((payment_id, attempt), nobodys)
            of_attempt.captures.setdefault(trade_no, OurCapture(amount_minor, currency, kept))
    numbers: dict[tuple[int, str], set[str]] = defaultdict(set)
    for payment_id, refund_no, number in rows(_TRIES):
        numbers[payment_id, refund_no].add(number)
    done = {(payment_id, refund_no) for payment_id, refund_no in rows(_DONE)}
    for payment_id, attempt, refund_no, trade_no, amount_minor, currency in rows(_REFUNDS):
        key = payment_id, refund_no
        refund = OurRefund(refund_no, trade_no, amount_minor, currency, key in done, frozenset(numbers[key]))
        money.get((payment_id, attempt), nobodys).refunds.append(refund)
    for payment_id, attempt, trade_no, is_open in rows(_EVIDENCE):
        evidence = money.get((payment_id, attempt), nobodys).evidence
        evidence[trade_no] = evidence.get(trade_no, False) or bool(is_open)


_FOREIGN = text(
    "SELECT account, channel_order_no, channel_trade_no, is_open FROM quarantine"
    " WHERE (payment_id IS NULL OR payment_id IN :ids) AND result = 1 AND channel = :channel"
    " AND channel_order_no IN :numbers"
).bindparams(bindparam("ids", expanding=True), bindparam("numbers", expanding=True))


def evidence_about(
    connection: Connection, channel: str, numbers: Collection[tuple[str, int | None]]
) -> dict[tuple[str, str], dict[str, bool]]:
    """Read the evidence about orders of a channel that are no attempts of ours.

    numbers: each with the payment that it names, if any. Returns, by (account, number), each trade number and whether
    the evidence about it is open.
    """
    found: dict[tuple[str, str], dict[str, bool]] = defaultdict(dict)
    asked = sorted(numbers, key=lambda one: one[0])
    for start in range(0, len(asked), _CHUNK):
        part = asked[start : start + _CHUNK]
        ids = [payment_id for _, payment_id in part if payment_id is not None]
        values = {"ids": ids, "numbers": [number for number, _ in part], "channel": channel}
        for account, number, trade_no, is_open in connection.execute(_FOREIGN, values):
            trades = found[account, number]
            trades[trade_no] = trades.get(trade_no, False) or bool(is_open)
    return found


CapturedAttempt = tuple[int, int, str]
"""payment_id, attempt and account of an attempt that has a judged capture."""


def captured_next(
    connection: Connection, after: int, channel: str, rows: int
) -> tuple[Range, Sequence[CapturedAttempt]]:
    """Find the range above an id, and in it the attempts of a channel that have a judged capture."""
    scope = next_range(connection, after, rows)
    found = connection.execute(_CAPTURED, {**scope._asdict(), "channel": channel})
    return scope, [(payment_id, attempt, account) for payment_id, attempt, account in found]
