"""Compares the banks' books, the database and what clients were told. Pure: it is handed all three.

A finding names the rule that is broken and whose money it is. An empty list is the only acquittal.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from paycore.domain.ids import format_channel_order_no, parse_channel_order_no
from paycore.domain.verdicts import EXCESS_REASONS, REFUND_DONE, NotifyOutcome, PaymentState, RefundState
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from tests.crash.told import Told, ToldWord

_JOBS_MS = 20_000
"""How long the jobs may take to find such an order, and to close it."""

Rows = Mapping[str, Collection[Any]]
"""Every row by table, as ``tests.support.core.read_all`` reads them."""

Capture = tuple[int, int, str]
"""(payment_id, attempt, trade number)."""


class BankCapture(NamedTuple):
    """Money that a bank took."""

    bank: str
    order_no: str
    trade_no: str
    amount_minor: int

    @property
    def key(self) -> Capture:
        """Which capture it is to paycore."""
        order = parse_channel_order_no(self.order_no)
        assert order is not None, "the banks know orders of paycore's only"
        return order.payment_id, order.attempt, self.trade_no


class BankRefund(NamedTuple):
    """A refund as the bank has it. result: ACCEPTED, REFUNDED, REFUSED, or RETURNED where the bank did it by itself."""

    bank: str
    refund_no: str
    trade_no: str
    amount_minor: int
    result: str
    code: str


class BankNotice(NamedTuple):
    """A word that the bank sent. trade_no: empty for a failure."""

    bank: str
    order_no: str
    trade_no: str
    amount_minor: int
    acknowledged: bool
    pending: bool


class Books(NamedTuple):
    """What the banks have on record. orders: the numbers of all that were opened there."""

    orders: set[str]
    captures: list[BankCapture]
    refunds: list[BankRefund]
    notices: list[BankNotice]


class Finding(NamedTuple):
    """Something that must not be."""

    rule: str
    what: str


def read_books(answer: Mapping[str, Any]) -> Books:
    """Read what ``GET /books`` answers."""
    books = Books(set(), [], [], [])
    for bank, orders in ((bank, one["orders"]) for bank, one in answer["banks"].items()):
        for order in orders:
            number = order["order_no"]
            books.orders.add(number)
            books.captures.extend(
                BankCapture(bank, number, one["trade_no"], one["amount_minor"]) for one in order["captures"]
            )
            books.refunds.extend(
                BankRefund(bank, one["refund_no"], one["trade_no"], one["amount_minor"], one["result"], one["code"])
                for one in order["refunds"]
            )
            books.notices.extend(
                BankNotice(bank, number, one["trade_no"], one["amount_minor"], one["acknowledged"], one["pending"])
                for one in order["notifications"]
            )
    return books


def judge(books: Books, rows: Rows, told: Told, now_ms: int) -> list[Finding]:
    """Return everything that is wrong, once all work is done: what is still under way is a finding too."""
    case = _Case(books, rows, now_ms)
    checks = (_outcomes, _captures, _refund_intents, _refunds_sent, _refused_refunds, _kept_money, _finished)
    return [
        *(finding for check in checks for finding in check(case)),
        *_told_payments(case, told),
        *_told_pages(case, told),
        *_told_refunds(case, told),
        *_told_outcomes(case, told),
        *_told_words(case, told),
        *_acknowledged_notices(case),
    ]


class _Case:
    """The evidence, by capture."""

    def __init__(self, books: Books, rows: Rows, now_ms: int) -> None:
        self.books = books
        self.now_ms = now_ms
        self.rows = rows
        self.payments = {row.payment_id: row for row in rows["payment"]}
        self.outcomes = {row.payment_id: row for row in rows["payment_outcome"]}
        self.kept = {
            (row.payment_id, row.attempt, row.channel_trade_no): row
            for row in rows["payment_outcome"]
            if row.state == PaymentState.PAID
        }
        self.excess = {(row.payment_id, row.attempt, row.channel_trade_no): row for row in rows["excess_payment"]}
        self.intents: defaultdict[Capture, list[Any]] = defaultdict(list)
        for row in rows["refund"]:
            self.intents[row.payment_id, row.attempt, row.channel_trade_no].append(row)
        self.taken = {one.key: one for one in books.captures}
        self.sent: defaultdict[str, list[BankRefund]] = defaultdict(list)
        for refund in books.refunds:
            self.sent[refund.trade_no].append(refund)
        self.failed = {(row.payment_id, row.attempt) for row in rows["channel_order"] if row.failed_at_ms is not None}
        # A word in quarantine, by what it says: (account, order number, trade number).
        self.quarantined = {(row.account, row.channel_order_no, row.channel_trade_no) for row in rows["quarantine"]}

    def waiting(self) -> set[int]:
        """The payments that rightly stay open for now: with an attempt that never reached its bank.

        An order that a bank does not know counts as unpaid only a while after its expiry.
        """
        return {
            row.payment_id
            for row in self.rows["channel_order"]
            if format_channel_order_no(row.payment_id, row.attempt) not in self.books.orders
            and self.now_ms <= row.expire_at_ms + NOT_EXIST_MARGIN_MS + _JOBS_MS
        }

    def on_record(self, capture: Capture) -> Any:
        """The row of a capture that was judged; None where there is none."""
        return self.kept.get(capture) or self.excess.get(capture)

    def refunded(self, trade_no: str) -> list[BankRefund]:
        """The refunds by which a capture went back, and its return by the bank itself."""
        return [one for one in self.sent[trade_no] if one.result in {"REFUNDED", "RETURNED"}]

    def returned(self, trade_no: str) -> bool:
        """Whether the bank sent a capture back by itself."""
        return any(one.result == "RETURNED" for one in self.sent[trade_no])


def _outcomes(case: _Case) -> Iterator[Finding]:
    counts = Counter(row.payment_id for row in case.rows["payment_outcome"])
    yield from (Finding("two outcomes", f"{found}") for found, count in counts.items() if count > 1)
    yield from (Finding("kept and excess", f"{one}") for one in case.kept.keys() & case.excess.keys())
    yield from (
        Finding("an outcome without a payment", f"{one}") for one in case.outcomes.keys() - case.payments.keys()
    )


def _captures(case: _Case) -> Iterator[Finding]:
    """Each capture of a bank is judged, and none was made up."""
    counts = Counter(one.key for one in case.books.captures)
    yield from (Finding("one trade number twice at a bank", f"{one}") for one, count in counts.items() if count > 1)
    for key, taken in case.taken.items():
        row = case.on_record(key)
        if row is None:
            yield Finding("a capture that nobody judged", f"{taken}")
        elif row.amount_minor != taken.amount_minor:
            yield Finding("another amount than captured", f"{taken} is on record with {row.amount_minor}")
    made_up = (case.kept.keys() | case.excess.keys()) - case.taken.keys()
    yield from (Finding("a capture that no bank knows", f"{one}") for one in made_up)


def _refund_intents(case: _Case) -> Iterator[Finding]:
    """R2 in the database: one intent for each excess under an outcome, and none for anything else."""
    for key, row in case.excess.items():
        intents = case.intents.get(key, [])
        if key[0] not in case.outcomes:
            yield Finding("excess without an outcome", f"{key}")
        elif len(intents) != 1:
            yield Finding("excess without exactly one refund", f"{key} has {len(intents)}")
        elif intents[0].amount_minor != row.amount_minor:
            yield Finding("a refund of another amount", f"{key}: {intents[0].amount_minor}, not {row.amount_minor}")
    yield from (Finding("a refund of what is no excess", f"{one}") for one in case.intents.keys() - case.excess.keys())


def _refunds_sent(case: _Case) -> Iterator[Finding]:
    """R2 at the banks: what is excess went back exactly once and whole, what is kept did not."""
    for key, taken in case.taken.items():
        done = case.refunded(taken.trade_no)
        if key in case.kept and done:
            yield Finding("kept money was sent back", f"{taken}: {done}")
        if key not in case.excess:
            continue
        if not done:
            yield Finding("a refund is missing", f"{taken}")
        elif len(done) > 1:
            yield Finding("a refund is doubled", f"{taken}: {done}")
        elif done[0].amount_minor != taken.amount_minor:
            yield Finding("a refund of another amount", f"{taken}: {done}")


def _refused_refunds(case: _Case) -> Iterator[Finding]:
    """No refund was sent for what had gone back: this bank has refused it, another one might not."""
    for trade_no, refunds in case.sent.items():
        refused = [one for one in refunds if one.code == "OVER_CAPTURED"]
        # A bank may send the money back by itself just after it has said that it did not: one sending too many, and
        # nobody's fault.
        if len(refused) > case.returned(trade_no):
            yield Finding("a refund was sent twice", f"{refused}")


def _kept_money(case: _Case) -> Iterator[Finding]:
    """Per order: the banks keep exactly the amount where it is PAID, and nothing else at all."""
    held: Counter[int] = Counter()
    for key, taken in case.taken.items():
        held[key[0]] += taken.amount_minor - sum(one.amount_minor for one in case.refunded(taken.trade_no))
    for payment_id in held.keys() | case.payments.keys():
        outcome, payment = case.outcomes.get(payment_id), case.payments.get(payment_id)
        paid = outcome is not None and outcome.state == PaymentState.PAID
        owed = payment.amount_minor if payment is not None and paid else 0
        if held[payment_id] != owed:
            yield Finding("the banks keep another sum", f"payment {payment_id}: {held[payment_id]}, not {owed}")


def _finished(case: _Case) -> Iterator[Finding]:
    """Every payment has its outcome; every refund its final word, the same at the bank and here."""
    waiting = case.waiting()
    undecided = case.payments.keys() - case.outcomes.keys() - waiting
    yield from (Finding("a payment without an outcome", f"{one}") for one in undecided)
    yield from _finished_refunds(case)
    yield from (Finding("a word still to be sent", f"{one}") for one in case.books.notices if one.pending)


def _finished_refunds(case: _Case) -> Iterator[Finding]:
    results = {(row.payment_id, row.refund_no, row.seq): row.result for row in case.rows["refund_result"]}
    done = {key[:2] for key, result in results.items() if result in REFUND_DONE}
    intents = {(row.payment_id, row.refund_no): row for row in case.rows["refund"]}
    yield from (Finding("a refund without a final word", f"{intents[one]}") for one in intents.keys() - done)
    at_bank = {one.refund_no: one for one in case.books.refunds if one.result != "RETURNED"}
    for row in case.rows["refund_try"]:
        key = (row.payment_id, row.refund_no, row.seq)
        known = at_bank.pop(row.channel_refund_no, None)
        moved = known is not None and known.result == "REFUNDED"
        if key not in results:
            yield Finding("a refund without a final word", f"{row}")
        elif results[key] == RefundState.RETURNED_BY_CHANNEL:
            if moved or not case.returned(intents[key[:2]].channel_trade_no):
                yield Finding("bank and database differ about a refund", f"{row}: {known}")
        elif moved != (results[key] == RefundState.REFUNDED):
            yield Finding("bank and database differ about a refund", f"{row}: {known}")
    yield from (Finding("a refund that is not on record", f"{one}") for one in at_bank.values())


def _told_payments(case: _Case, told: Told) -> Iterator[Finding]:
    by_order = {row.merchant_order_no: row.payment_id for row in case.rows["merchant_order"]}
    for one in told.payments:
        payment = case.payments.get(one.payment_id)
        if payment is None or by_order.get(one.merchant_order_no) != one.payment_id:
            yield Finding("a payment that Pay told of is lost", f"{one}")
        elif payment.amount_minor != one.amount_minor:
            yield Finding("a payment has other terms than told", f"{one}: {payment}")
    counts = Counter(row.merchant_order_no for row in case.rows["payment"])
    yield from (Finding("two payments of one order", number) for number, count in counts.items() if count > 1)


def _told_pages(case: _Case, told: Told) -> Iterator[Finding]:
    attempts = {(row.payment_id, row.attempt) for row in case.rows["channel_order"]}
    yield from (Finding("an attempt that Pay told of is lost", f"{one}") for one in told.pages - attempts)


def _told_refunds(case: _Case, told: Told) -> Iterator[Finding]:
    done = {(row.payment_id, row.refund_no) for row in case.rows["refund_result"] if row.result in REFUND_DONE}
    lost = (one for one in told.refunds if (one.payment_id, one.refund_no) not in done)
    yield from (Finding("a refund that was told is not made", f"{one}") for one in lost)


def _told_outcomes(case: _Case, told: Told) -> Iterator[Finding]:
    for one in told.outcomes:
        row = case.outcomes.get(one.payment_id)
        known = None if row is None else (PaymentState(row.state).name, row.attempt, row.channel_trade_no)
        said = (one.state, one.attempt, one.trade_no)
        compared = 3 if one.trade_no else 1
        if known is None or known[:compared] != said[:compared]:
            yield Finding("an outcome that was told is not so", f"{one}: {row}")


_IN_QUARANTINE = {"SECOND_CAPTURE", "MISMATCH", "CONFLICT", "UNKNOWN"}


def _told_words(case: _Case, told: Told) -> Iterator[Finding]:
    """No acknowledged word is lost, and each means what its sender was told."""
    yield from (Finding("an acknowledged word is lost", f"{one}") for one in told.words if not _stands(case, one))


def _stands(case: _Case, word: ToldWord) -> bool:
    order = parse_channel_order_no(word.channel_order_no)
    if (word.account, word.channel_order_no, word.trade_no) in case.quarantined and word.outcome in _IN_QUARANTINE:
        return True
    if order is None:
        return False
    if word.outcome == NotifyOutcome.RECORDED.name:
        return (order.payment_id, order.attempt) in case.failed
    capture = (order.payment_id, order.attempt, word.trade_no)
    if word.outcome == NotifyOutcome.ACCEPTED.name:
        return capture in case.kept
    row = case.excess.get(capture)
    return row is not None and NotifyOutcome(row.reason).name == word.outcome and row.reason in EXCESS_REASONS


def _acknowledged_notices(case: _Case) -> Iterator[Finding]:
    """What a bank was told to stop sending is on record."""
    for one in case.books.notices:
        if one.acknowledged and not _is_on_record(case, one):
            yield Finding("an acknowledged notification is lost", f"{one}")


def _is_on_record(case: _Case, notice: BankNotice) -> bool:
    if (notice.bank, notice.order_no, notice.trade_no) in case.quarantined:
        return True
    key = BankCapture(notice.bank, notice.order_no, notice.trade_no, notice.amount_minor).key
    return case.on_record(key) is not None if notice.trade_no else key[:2] in case.failed


def report(findings: Iterable[Finding], most: int = 40) -> str:
    """The findings for people: how many of each rule, then the first of them."""
    found = list(findings)
    counts = Counter(one.rule for one in found)
    lines = [f"{count} x {rule}" for rule, count in counts.most_common()]
    return "\n".join([*lines, *(f"  {one.rule}: {one.what}" for one in found[:most])])
