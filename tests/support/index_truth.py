"""A model of what is true of payments, as the database would know it, for tests of what an index may say of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from paycore.domain.decision import Facts
from paycore.domain.verdicts import PaymentState, Recorded

OPEN = PaymentState.OPEN

Columns = tuple["array[int]", ...]


def columns(captures: Sequence[tuple[int, ...]]) -> Columns:
    """Lay captures out as check_many takes them, a column of zeros for the verdicts at the end."""
    rows = [(*capture, 0) for capture in captures]
    return tuple(array(kind, [row[place] for row in rows]) for place, kind in enumerate("qBBqBqqI"))


class Capture(NamedTuple):
    """A judged capture on record."""

    amount_minor: int
    currency_code: int
    outcome: int


class Notification(NamedTuple):
    """What a channel says, with the trade number that the index never sees."""

    payment_id: int
    attempt: int
    account_code: int
    trade_no: str
    amount_minor: int
    currency_code: int
    paid_at_ms: int


@dataclass
class Attempt:
    """What is true of one attempt."""

    account_code: int
    finally_unpaid: bool = False
    captures: dict[str, Capture] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return not self.finally_unpaid and not self.captures


@dataclass
class Payment:
    """What is true of one payment; `stale`: another process changed it since the index was told."""

    payment_id: int
    created_at_ms: int
    expire_at_ms: int
    amount_minor: int
    currency_code: int
    attempts: list[Attempt] = field(default_factory=list)
    state: int = OPEN
    kept_attempt: int = 0
    stale: bool = False

    def row(self) -> tuple[int, int, int, int, int, int, int, int, tuple[int, ...]]:
        """What Index.put takes."""
        mask = sum(1 << place for place, attempt in enumerate(self.attempts) if attempt.captures)
        accounts = tuple(attempt.account_code for attempt in self.attempts)
        return (
            self.payment_id,
            self.amount_minor,
            self.currency_code,
            self.expire_at_ms,
            self.state,
            self.kept_attempt,
            len(self.attempts),
            mask,
            accounts,
        )


def true_facts(payment: Payment | None, word: Notification) -> Facts:
    """What the database would say about a notification."""
    if payment is None or not 1 <= word.attempt <= len(payment.attempts):
        return Facts(False, False, Recorded.NONE, 0, False, OPEN, False, 0, 0)
    attempt = payment.attempts[word.attempt - 1]
    capture = attempt.captures.get(word.trade_no)
    recorded = Recorded.NONE
    if capture is not None:
        same = (capture.amount_minor, capture.currency_code) == (word.amount_minor, word.currency_code)
        recorded = Recorded.SAME if same else Recorded.OTHER_TERMS
    elif attempt.captures:
        recorded = Recorded.OTHER_TRADE
    return Facts(
        known=True,
        account_matches=attempt.account_code == word.account_code,
        recorded=recorded,
        recorded_outcome=capture.outcome if capture and recorded == Recorded.SAME else 0,
        terms_match=(payment.amount_minor, payment.currency_code) == (word.amount_minor, word.currency_code),
        state=payment.state,
        other_live=any(other.live for other in payment.attempts if other is not attempt),
        created_at_ms=payment.created_at_ms,
        expire_at_ms=payment.expire_at_ms,
    )
