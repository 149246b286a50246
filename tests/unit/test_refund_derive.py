"""Deriving what is owed: pure, and the same whoever does it and however often."""

from __future__ import annotations

import hashlib

import pytest

from paycore.domain.ids import excess_refund_no
from paycore.domain.verdicts import NotifyOutcome, PaymentState, RefundState
from paycore.store.rows import ExcessRow, OutcomeRow, PaymentRecord, PaymentRow, Stamp
from paycore.usecases.refund import derive_refunds, new_try, split_intents

STAMP = Stamp(5_000, 2, 3)
PAYMENT_ID = 2**63 - 1


def record(outcome: OutcomeRow | None, *excess: ExcessRow) -> PaymentRecord:
    payment = PaymentRow(PAYMENT_ID, "shop", "n", 500, "CNY", "Tea", "", "d", 9_000, 1_000, 1, 1)
    made = PaymentRecord(payment)
    made.outcome = outcome
    made.excess.extend(excess)
    return made


def paid(attempt: int = 1, trade_no: str = "T1") -> OutcomeRow:
    return OutcomeRow(PAYMENT_ID, PaymentState.PAID, attempt, trade_no, 500, "CNY", 1, 1, 1, 0, 0, 1, 1, 1)


CLOSED = OutcomeRow(PAYMENT_ID, PaymentState.CLOSED, 0, "", 0, "", None, 1, 0, 0, 1, 1, 1, 1)


def excess(attempt: int = 2, trade_no: str = "T2", reason: int = NotifyOutcome.DUPLICATE) -> ExcessRow:
    return ExcessRow(PAYMENT_ID, attempt, trade_no, reason, 700, "JPY", 1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("outcome", "held", "owed"),
    [
        (None, [excess()], []),
        (paid(), [], []),
        (paid(), [excess()], ["T2"]),
        (paid(), [excess(1, "T1")], []),
        (paid(), [excess(2, "T1")], ["T1"]),
        (paid(), [excess(1, "T9")], ["T9"]),
        (paid(2, "T2"), [excess(1, "T1"), excess(2, "T2"), excess(3, "T3")], ["T1", "T3"]),
        (CLOSED, [excess(1, "T1"), excess(2, "T2")], ["T1", "T2"]),
    ],
)
def test_refunds_are_owed_for_what_an_outcome_does_not_keep(
    outcome: OutcomeRow | None, held: list[ExcessRow], owed: list[str]
) -> None:
    intents = derive_refunds(record(outcome, *held), held, STAMP)
    assert [intent.refund.channel_trade_no for intent in intents] == owed


def test_refund_is_of_exactly_what_was_captured() -> None:
    """Amount and currency are the capture's own, not the payment's."""
    held = excess(reason=NotifyOutcome.MISMATCH)
    (intent,) = derive_refunds(record(paid(), held), [held], STAMP)
    refund, first_try = intent
    assert (refund.amount_minor, refund.currency, refund.reason) == (700, "JPY", NotifyOutcome.MISMATCH)
    assert (refund.recorded_at_ms, refund.writer_no, refund.group_no) == STAMP
    assert (first_try.seq, first_try.state, first_try.asks, first_try.next_at_ms) == (1, RefundState.PENDING, 0, 5_000)


def test_refund_number_is_derived_from_the_capture_alone() -> None:
    digest = hashlib.sha256(b"T2").hexdigest()[:16]
    assert excess_refund_no(2, "T2") == f"X02{digest}"
    numbers = {excess_refund_no(attempt, trade_no) for attempt in (1, 2, 63) for trade_no in ("T1", "T2", "单")}
    assert len(numbers) == 9
    again = derive_refunds(record(CLOSED, excess()), [excess()], Stamp(9, 9, 9))
    first = derive_refunds(record(paid(), excess()), [excess()], STAMP)
    assert again[0].refund.refund_no == first[0].refund.refund_no == f"X02{digest}"


def test_number_of_a_try_is_at_most_forty_characters() -> None:
    (intent,) = derive_refunds(record(paid(), excess()), [excess()], STAMP)
    for seq in (1, 99):
        row = new_try(intent.refund, seq=seq, next_at_ms=7, stamp=STAMP)
        assert row.channel_refund_no == f"{PAYMENT_ID}{intent.refund.refund_no}{seq:02d}"
        assert len(row.channel_refund_no) == 40


def test_intents_are_split_into_rows_of_their_tables_in_order() -> None:
    held = [excess(2, "T2"), excess(3, "T3")]
    refunds, tries = split_intents(derive_refunds(record(CLOSED, *held), held, STAMP))
    assert [row.refund_no for row in refunds] == [row.refund_no for row in tries]
    assert [row.channel_trade_no for row in refunds] == ["T2", "T3"]
