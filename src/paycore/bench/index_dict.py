"""The baseline of the index: the same check on a dict of tuples, written for speed."""

import sys
from collections.abc import Iterable

from paycore.domain.decision import Facts, Moment, decide
from paycore.domain.ids import created_at_ms
from paycore.domain.verdicts import NotifyOutcome, Recorded, VerdictFlag

ACCOUNTS = 3
Entries = dict[int, tuple[int, int, int, int, int, int, int, int, int, int]]
"""payment_id -> (amount, currency, expire_at, state, kept, attempts, mask, account 1, 2, 3)."""


def fill(payments: Iterable[tuple[int, int, int]], currency: int, validity_ms: int) -> Entries:
    """Open payments with one attempt each, from (payment_id, amount, account)."""
    return {
        payment_id: (amount, currency, created_at_ms(payment_id) + validity_ms, 1, 0, 1, 0, account, 0, 0)
        for payment_id, amount, account in payments
    }


def check(
    entries: Entries,
    payment_id: int,
    attempt: int,
    account: int,
    amount: int,
    currency: int,
    paid_at_ms: int,
    received_at_ms: int,
) -> int:
    """``Index.check`` on plain Python objects: the way to ACCEPTED is inlined."""
    entry = entries.get(payment_id)
    if entry is None:
        return 0
    if not 1 <= attempt <= entry[5] or attempt > ACCOUNTS:
        return 0
    kept_account = entry[6 + attempt]
    if kept_account == 0:
        return 0
    if entry[6] >> (attempt - 1) & 1:
        return VerdictFlag.ASK
    made_at_ms = created_at_ms(payment_id)
    if (
        kept_account == account
        and entry[0] == amount
        and entry[1] == currency
        and entry[3] == 1
        and entry[6] == 0
        and made_at_ms <= paid_at_ms <= received_at_ms
        and paid_at_ms <= entry[2]
    ):
        return 1
    facts = Facts(
        known=True,
        account_matches=kept_account == account,
        recorded=Recorded.NONE,
        recorded_outcome=0,
        terms_match=entry[:2] == (amount, currency),
        state=entry[3],
        other_live=entry[5] > 1,
        created_at_ms=made_at_ms,
        expire_at_ms=entry[2],
    )
    verdict = decide(facts, Moment(paid_at_ms, received_at_ms, late_grace_ms=0))
    alone = verdict & 0xFF == NotifyOutcome.ACCEPTED and entry[6] == 0
    return verdict if alone else verdict | VerdictFlag.ASK


def nbytes(entries: Entries) -> int:
    """Memory of the dict, its keys, tuples and integers; small integers are shared and cost nothing."""
    size = sys.getsizeof(entries)
    for payment_id, entry in entries.items():
        size += sys.getsizeof(payment_id) + sys.getsizeof(entry)
        size += sum(sys.getsizeof(value) for value in entry if value > 256)
    return size
