"""Which payments of a range do not look whole: tables compared with each other inside the database, by the key.

Each question is one walk over a range of one table beside the others, which are tied to it by payment_id alone, and it
answers with payment_ids, mostly none. It may name a payment that is whole: whoever looks at it closely tells. It must
leave out none that ``jobs.sweep_findings`` would find something on. Nothing here is shared with the audit's checks.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Connection,
    FromClause,
    Select,
    Table,
    Text,
    and_,
    cast,
    exists,
    func,
    literal,
    or_,
    select,
)

from paycore.domain.ids import excess_refund_no
from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState, PaymentState, RefundState, TaskKind
from paycore.store import tables
from paycore.store.rows import PaymentRow

OF_EXCESS, OF_MERCHANT = "X", "M"
"""How the numbers of refunds begin: of an excess, and of the merchant's own."""

FINAL_WORDS = (RefundState.REFUNDED, RefundState.REFUSED, RefundState.RETURNED_BY_CHANNEL)

_CAPTURE = ("attempt", "channel_trade_no")
_TERMS = ("amount_minor", "currency")
_LIVE = sorted(set(AttemptState) - FINALLY_UNPAID)


def without_tasks(connection: Connection, first: int, last: int, attempts_after_ms: int) -> set[int]:
    """Payments of a range that nobody is going to close, or with an attempt that nobody is going to ask about.

    attempts_after_ms: attempts that expire later than this.
    """
    scope = _Scope(first, last)
    looks = (_open_without_close(scope), _live_without_query(scope, attempts_after_ms))
    return {payment_id for look in looks for payment_id in connection.execute(look).scalars()}


def not_whole(connection: Connection, first: int, last: int) -> set[int]:
    """Payments of a range on which something is missing, is too much, or contradicts something else."""
    scope = _Scope(first, last)
    looks = (
        _outcome_of_other_terms(scope),
        _outcome_incoherent(scope),
        _kept_by_no_attempt(scope),
        _attempt_without_payment(scope),
        _excess_not_refunded(scope),
        _capture_refunded_again(scope),
        _refund_without_cause(scope),
        _merchants_refund_astray(scope),
        _merchants_refunds_exceed(scope),
        _try_out_of_turn(scope),
        _result_without_sequel(scope),
        _queried_unjudged(scope),
    )
    found = {payment_id for look in looks for payment_id in connection.execute(look).scalars()}
    return found | _misnumbered(connection, scope) | _without_order(connection, scope)


class _Scope:
    """A range of payment_ids, both ends included."""

    def __init__(self, first: int, last: int) -> None:
        self._first, self._last = first, last

    def within(self, table: FromClause) -> ColumnElement[bool]:
        return table.c.payment_id.between(self._first, self._last)

    def tied(self, table: FromClause, other: FromClause, *tie: ColumnElement[bool]) -> tuple[ColumnElement[bool], ...]:
        """Rows of the same payment. Their range is named too: else the whole table may be read for them."""
        return (table.c.payment_id == other.c.payment_id, self.within(table), *tie)

    def has(self, table: FromClause, other: FromClause, *tie: ColumnElement[bool]) -> ColumnElement[bool]:
        """Whether the other row's payment has a row in a table."""
        return exists(select(table.c.payment_id).where(*self.tied(table, other, *tie)))

    def ids(self, table: FromClause, *where: ColumnElement[bool]) -> Select[Any]:
        """The payments of a table's rows of this range."""
        return select(table.c.payment_id).where(self.within(table), *where)


def _same(table: FromClause, other: FromClause, *names: str) -> tuple[ColumnElement[bool], ...]:
    return tuple(table.c[name] == other.c[name] for name in names)


# ---- What nobody is going to come back to


def _open_without_close(scope: _Scope) -> Select[Any]:
    payment, task = tables.payment, tables.task
    return scope.ids(
        payment,
        ~scope.has(tables.payment_outcome, payment),
        ~scope.has(task, payment, task.c.kind == TaskKind.CLOSE, task.c.attempt == 0),
    )


def _live_without_query(scope: _Scope, attempts_after_ms: int) -> Select[Any]:
    attempt, task = tables.channel_order, tables.task
    captured = (
        scope.has(table, attempt, *_same(table, attempt, "attempt"))
        for table in (tables.payment_outcome, tables.excess_payment)
    )
    return scope.ids(
        attempt,
        attempt.c.state.in_(_LIVE),
        attempt.c.expire_at_ms > attempts_after_ms,
        *(~one for one in captured),
        ~scope.has(task, attempt, task.c.kind == TaskKind.QUERY, *_same(task, attempt, "attempt")),
    )


# ---- Payments, attempts and outcomes


def _outcome_of_other_terms(scope: _Scope) -> Select[Any]:
    """Outcomes of no payment, and captures that are kept on other terms than it asks for."""
    outcome, payment = tables.payment_outcome, tables.payment
    as_asked = or_(outcome.c.state != PaymentState.PAID, and_(*_same(payment, outcome, *_TERMS)))
    return scope.ids(outcome, ~scope.has(payment, outcome, as_asked))


def _outcome_incoherent(scope: _Scope) -> Select[Any]:
    """Outcomes that hold too little or too much of a capture."""
    outcome = tables.payment_outcome
    paid = and_(outcome.c.state == PaymentState.PAID, outcome.c.channel_trade_no != "")
    closed = and_(outcome.c.state == PaymentState.CLOSED, outcome.c.channel_trade_no == "", outcome.c.currency == "")
    return scope.ids(outcome, ~or_(paid, closed))


def _kept_by_no_attempt(scope: _Scope) -> Select[Any]:
    outcome, attempt = tables.payment_outcome, tables.channel_order
    is_there = scope.has(attempt, outcome, *_same(attempt, outcome, "attempt"))
    return scope.ids(outcome, outcome.c.state == PaymentState.PAID, ~is_there)


def _attempt_without_payment(scope: _Scope) -> Select[Any]:
    attempt = tables.channel_order
    return scope.ids(attempt, ~scope.has(tables.payment, attempt))


def _queried_unjudged(scope: _Scope) -> Select[Any]:
    queried = tables.queried_paid
    judged = (
        scope.has(table, queried, *_same(table, queried, "attempt"))
        for table in (tables.payment_outcome, tables.excess_payment)
    )
    return scope.ids(queried, ~or_(*judged))


def _without_order(connection: Connection, scope: _Scope) -> set[int]:
    """Payments that their merchant order does not name. Its table has another key, so it is asked for by that."""
    payment = tables.payment.c
    asked = select(payment.payment_id, payment.merchant_id, payment.merchant_order_no)
    rows = _raw(connection, asked.where(scope.within(tables.payment)))
    return {row[0] for row in rows} - _ordered(connection, rows)


def ordered(connection: Connection, payments: Iterable[PaymentRow]) -> set[int]:
    """Those of these payments that their merchant order names."""
    return _ordered(connection, [(one.payment_id, one.merchant_id, one.merchant_order_no) for one in payments])


def _ordered(connection: Connection, payments: Sequence[tuple[int, str, str]]) -> set[int]:
    keys = [(merchant_id, number) for _, merchant_id, number in payments]
    named = {(row[0], row[1]): row[2] for row in _raw(connection, _orders(connection, keys))} if keys else {}
    return {row[0] for row, key in zip(payments, keys, strict=True) if named.get(key) == row[0]}


def _orders(connection: Connection, keys: Sequence[tuple[str, str]]) -> Select[Any]:
    """What merchant orders name: one statement, however many they are and of however many merchants."""
    order = tables.merchant_order.c
    if connection.dialect.name == "postgresql":
        columns = (literal(list(column), ARRAY(Text)) for column in zip(*keys, strict=True))
        asked = func.unnest(*columns).table_valued("merchant_id", "number", name="asked").render_derived()
        is_one = and_(order.merchant_id == asked.c.merchant_id, order.merchant_order_no == asked.c.number)
    else:
        asked = func.json_each(json.dumps(keys)).table_valued("value", name="json_each")
        merchant_id, number = (func.json_extract(asked.c.value, place) for place in ("$[0]", "$[1]"))
        is_one = and_(order.merchant_id == merchant_id, order.merchant_order_no == number)
    named = select(order.merchant_id, order.merchant_order_no, order.payment_id)
    return named.select_from(asked).join(tables.merchant_order, is_one)


def _raw(connection: Connection, statement: Select[Any]) -> list[Any]:
    """Run a statement below SQLAlchemy's rows: integers and texts need no conversion."""
    cursor = connection.execute(statement).cursor
    assert cursor is not None, "a SELECT has a cursor until it is closed"
    found = cursor.fetchall()
    cursor.close()
    return list(found)


# ---- Excess and refunds


def _excess_not_refunded(scope: _Scope) -> Select[Any]:
    """Excess without a refund of just what it is; the kept capture; and that of no attempt.

    What still waits for an outcome is among them.
    """
    excess, refund, attempt = tables.excess_payment, tables.refund, tables.channel_order
    wrong = or_(
        ~scope.has(refund, excess, *_same(refund, excess, *_CAPTURE, *_TERMS, "reason")),
        scope.has(tables.payment_outcome, excess, *_same(tables.payment_outcome, excess, *_CAPTURE)),
        ~scope.has(attempt, excess, *_same(attempt, excess, "attempt")),
    )
    return scope.ids(excess, wrong)


def _capture_refunded_again(scope: _Scope) -> Select[Any]:
    """Refunds beside which there is another one of the same capture."""
    refund, other = tables.refund, tables.refund.alias("other")
    differs = other.c.refund_no != refund.c.refund_no
    return scope.ids(refund, scope.has(other, refund, *_same(other, refund, *_CAPTURE), differs))


def _refund_without_cause(scope: _Scope) -> Select[Any]:
    """Refunds without a try, and those of an excess that is not there or whose payment has no outcome."""
    refund, tries, excess = tables.refund, tables.refund_try, tables.excess_payment
    of_excess = scope.has(excess, refund, *_same(excess, refund, *_CAPTURE))
    has_cause = and_(scope.has(tables.payment_outcome, refund), of_excess)
    wrong = or_(
        ~scope.has(tries, refund, *_same(tries, refund, "refund_no")),
        and_(~refund.c.refund_no.like(f"{OF_MERCHANT}%"), ~has_cause),
    )
    return scope.ids(refund, wrong)


def _misnumbered(connection: Connection, scope: _Scope) -> set[int]:
    """Payments with a refund of an excess whose number does not follow from the capture: it is a hash."""
    refund = tables.refund.c
    named = select(refund.payment_id, refund.refund_no, refund.attempt, refund.channel_trade_no)
    of_excess = named.where(scope.within(tables.refund), ~refund.refund_no.like(f"{OF_MERCHANT}%"))
    return {
        payment_id
        for payment_id, refund_no, attempt, trade_no in _raw(connection, of_excess)
        if refund_no != excess_refund_no(attempt, trade_no)
    }


def _merchants_refund_astray(scope: _Scope) -> Select[Any]:
    """Refunds of the merchant's that are not of the kept capture."""
    refund, outcome = tables.refund, tables.payment_outcome
    is_paid = outcome.c.state == PaymentState.PAID
    of_kept = scope.has(outcome, refund, is_paid, *_same(outcome, refund, *_CAPTURE, "currency"))
    return scope.ids(refund, refund.c.refund_no.like(f"{OF_MERCHANT}%"), ~of_kept)


def _merchants_refunds_exceed(scope: _Scope) -> Select[Any]:
    """Payments whose merchant's refunds together, those that have failed too, are more than the kept capture."""
    refund, outcome = tables.refund, tables.payment_outcome
    return (
        select(refund.c.payment_id)
        .join(outcome, and_(*scope.tied(outcome, refund)))
        .where(scope.within(refund), refund.c.refund_no.like(f"{OF_MERCHANT}%"))
        .group_by(refund.c.payment_id, outcome.c.amount_minor)
        .having(func.sum(refund.c.amount_minor) > outcome.c.amount_minor)
    )


# ---- Tries and final words


def _try_out_of_turn(scope: _Scope) -> Select[Any]:
    """Tries of no refund, under a wrong number, before the last one was refused, or in a state that no word bears."""
    tries, result = tables.refund_try, tables.refund_result
    of_try = _same(result, tries, "refund_no")
    refused_before = (*of_try, result.c.seq == tries.c.seq - 1, result.c.result == RefundState.REFUSED)
    told = scope.has(result, tries, *of_try, *_same(result, tries, "seq"))
    told_so = scope.has(result, tries, *of_try, *_same(result, tries, "seq"), result.c.result == tries.c.state)
    is_final = tries.c.state.in_(FINAL_WORDS)
    wrong = or_(
        ~scope.has(tables.refund, tries, *_same(tables.refund, tries, "refund_no")),
        tries.c.channel_refund_no != _number_of(tries),
        and_(tries.c.seq > 1, ~scope.has(result, tries, *refused_before)),
        and_(is_final, ~told_so),
        and_(~is_final, told),
    )
    return scope.ids(tries, wrong)


def _number_of(tries: Table) -> ColumnElement[str]:
    """What ``format_channel_refund_no`` makes of a try, by the database."""
    two_digits = func.substr(cast(tries.c.seq + 100, Text), 2)
    return cast(tries.c.payment_id, Text).concat(tries.c.refund_no).concat(two_digits)


def _result_without_sequel(scope: _Scope) -> Select[Any]:
    """Final words about no try, and refusals after which nobody tries again."""
    result, tries = tables.refund_result, tables.refund_try
    of_refund = _same(tries, result, "refund_no")
    wrong = or_(
        ~scope.has(tries, result, *of_refund, *_same(tries, result, "seq")),
        and_(
            result.c.result == RefundState.REFUSED,
            ~scope.has(tries, result, *of_refund, tries.c.seq == result.c.seq + 1),
        ),
    )
    return scope.ids(result, wrong)
