"""What clients were told: every answer that left the server, kept by those who got it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class ToldPayment(NamedTuple):
    """A payment that Pay told of."""

    payment_id: int
    merchant_order_no: str
    amount_minor: int


class ToldWord(NamedTuple):
    """A word of a channel that Notify answered. trade_no: empty for a failure."""

    account: str
    channel_order_no: str
    trade_no: str
    amount_minor: int
    outcome: str
    replayed: bool


class ToldOutcome(NamedTuple):
    """A final state that somebody was told. attempt, trade_no: 0 and empty where the answer does not say."""

    payment_id: int
    state: str
    attempt: int
    trade_no: str


class ToldRefund(NamedTuple):
    """A refund of which somebody was told that the money is back."""

    payment_id: int
    refund_no: str


@dataclass
class Told:
    """The clients' memory. It grows only by answers: what was cut off is not in it."""

    payments: set[ToldPayment] = field(default_factory=set)
    words: list[ToldWord] = field(default_factory=list)
    outcomes: set[ToldOutcome] = field(default_factory=set)
    pages: set[tuple[int, int]] = field(default_factory=set)
    """(payment_id, attempt) of each attempt that Pay answered with."""
    refunds: set[ToldRefund] = field(default_factory=set)
