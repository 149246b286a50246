"""Decides a group of notifications inside one write transaction.

Fast: the index says that a success is the first and in time; one insert tries for the outcome, and the
payment's key arbitrates. Everything else, and whoever lost that insert, is decided on the rows themselves
(``usecases.rare``).

Order of writing: outcomes first; then, from the outcomes that really stand, excess and refunds. Deciding
in memory that 2 is a duplicate of 1 and then losing 1 to another process would refund the money that was kept.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from paycore._dedupe import Index
from paycore._group import Group
from paycore._wire import Batch
from paycore.domain.money import CURRENCY_CODES
from paycore.failpoint import failpoint
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import PaymentRecord
from paycore.usecases.quarantine import QuarantineBudget, QuarantineLimits
from paycore.usecases.rare import Judged, RareItem, RarePlan, Terms
from paycore.usecases.refund import RefundIntent
from paycore.usecases.warm import load_columns
from paycore.usecases.words import notification_at

AccountCodes = Callable[[str, str], int]
"""Turns (channel, account) into the account's code in the index; 0 when it is not configured."""

RARE_TOGETHER = 2_000
"""Words that are judged on their rows between two statements: some 50 ms, far below what ends an idle transaction."""

Piece = tuple[Batch, int, int]
"""Some words of a batch: from start to stop."""


class GroupResult(NamedTuple):
    """What a group came to. The answers stand in its batches.

    counts: (account code, outcome, replayed, how many). untrusted: accepted by the index alone although their pay
    time could not be believed. rare: what was judged on the rows. refunds: those that are new. quarantined: rows
    added by each source, an account's code.
    """

    counts: list[tuple[int, int, bool, int]]
    untrusted: int
    rare: list[Judged]
    refunds: list[RefundIntent]
    quarantined: Counter[int]


def index_payment(index: Index, record: PaymentRecord, accounts: AccountCodes) -> None:
    """Tell the index what the database says about a payment."""
    payment, outcome = record.payment, record.outcome
    count = max(record.attempts, default=0)
    codes = tuple(
        accounts(row.channel, row.account) if (row := record.attempts.get(attempt)) else 0
        for attempt in range(1, count + 1)
    )
    index.put(
        payment.payment_id,
        payment.amount_minor,
        CURRENCY_CODES.get(payment.currency, 0),
        payment.expire_at_ms,
        record.state,
        outcome.attempt if outcome else 0,
        count,
        record.captured_mask(),
        codes,
    )


class GroupJudge:
    """Judges groups with one index. Belongs to the writer thread; holds no group of its own."""

    def __init__(
        self,
        index: Index,
        codes: dict[tuple[str, str], int],
        late_grace_ms: int,
        quarantine_limits: QuarantineLimits,
    ) -> None:
        self._index = index
        self._codes = codes
        self._accounts: AccountCodes = lambda channel, account: codes.get((channel, account), 0)
        self._late_grace_ms = late_grace_ms
        self._budget = QuarantineBudget(quarantine_limits)

    def judge(
        self,
        transaction: WriteTransaction,
        pieces: list[Piece],
        own_tries: frozenset[tuple[int, int]] = frozenset(),
    ) -> GroupResult:
        """Decide, write and answer a group. The index must be between ``begin`` and ``commit``.

        own_tries: the (writer_no, group_no) of earlier tries of this very group whose commit was not
        answered; what they wrote is this group's own and no replay.
        """
        group = Group(self._index, pieces)
        group.accept()
        if missing := group.missing():
            load_columns(self._index, transaction.index_columns_of(missing), self._codes)
            group.accept()
        # One with excess loses too: another process may have judged this very capture, which is then no first one, and
        # a refund may wait for the outcome.
        lost = transaction.insert_first_outcomes(group) if len(group) else set()
        failpoint("judge.outcomes_inserted")
        items = [RareItem(batch, at, notification_at(batch, at)) for batch, at in group.rare(lost)]
        terms = Terms(transaction.stamp, self._late_grace_ms, own_tries, self._accounts, self._budget)
        judged, refunds, quarantined = self._judge_rare(transaction, items, terms)
        return GroupResult(group.tally(), group.untrusted, judged, refunds, quarantined)

    def committed(self, result: GroupResult, now_ms: int) -> None:
        """Take note of what a group that is durable added to quarantine."""
        for source, rows in result.quarantined.items():
            self._budget.spend(source, rows, now_ms)

    def _judge_rare(
        self, transaction: WriteTransaction, items: list[RareItem], terms: Terms
    ) -> tuple[list[Judged], list[RefundIntent], Counter[int]]:
        judged: list[Judged] = []
        refunds: list[RefundIntent] = []
        quarantined: Counter[int] = Counter()
        for some in _in_parts(items):
            self._judge_some(transaction, some, terms, (judged, refunds, quarantined))
        return judged, refunds, quarantined

    def _judge_some(
        self,
        transaction: WriteTransaction,
        items: list[RareItem],
        terms: Terms,
        into: tuple[list[Judged], list[RefundIntent], Counter[int]],
    ) -> None:
        judged, refunds, quarantined = into
        while items:
            records = transaction.lock_records({item.order.payment_id for item in items if item.order})
            plan = RarePlan(records, terms, quarantined)
            for item in items:
                plan.add(item)
            lost = transaction.insert_outcomes(plan.outcomes) if plan.outcomes else set()
            if waiting := plan.waiting():
                lost |= transaction.hold_open(waiting)
            refunds += plan.write(transaction, lost)
            judged += plan.answer()
            for payment_id, record in records.items():
                if payment_id not in lost:
                    index_payment(self._index, record, self._accounts)
            # A payment that lost has an outcome now, so it cannot lose again: this ends after two rounds.
            items = [item for item in items if item.order and item.order.payment_id in lost]


def _in_parts(items: list[RareItem]) -> Iterator[list[RareItem]]:
    """Divide words, if they are many, so that no part is long in being judged while the database waits.

    Parts are ordered by payment, as the locks have to be, and all words of a payment are in one.
    """
    if len(items) <= RARE_TOGETHER:
        yield items
        return
    part: list[RareItem] = []
    for _, of_payment in itertools.groupby(sorted(items, key=_payment_id), _payment_id):
        part += of_payment
        if len(part) >= RARE_TOGETHER:
            yield part
            part = []
    yield part


def _payment_id(item: RareItem) -> int:
    return item.order.payment_id if item.order else 0
