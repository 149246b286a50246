"""Which words of one answer cannot be what their payment keeps, and what each is kept as before it is judged."""

from __future__ import annotations

import pytest

from paycore.domain.decision import ABSENT_MS
from paycore.domain.notification import Notification
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, PaymentState
from paycore.store.rows import OutcomeRow, PaymentRecord, PaymentRow
from paycore.usecases.told import evidence_of

SECOND, MISMATCH = NotifyOutcome.SECOND_CAPTURE, NotifyOutcome.MISMATCH
ASKED, OTHER = 1_000, 999

Told = tuple[str, int]
"""(trade number, amount)."""


def a_record(*, kept: Told | None) -> PaymentRecord:
    record = PaymentRecord(PaymentRow(1, "shop", "order", ASKED, "CNY", "Tea", "", "digest", 9, 0, 0, 0))
    if kept is not None:
        trade_no, amount_minor = kept
        record.outcome = OutcomeRow(
            1, PaymentState.PAID, 1, trade_no, amount_minor, "CNY", None, 0, CaptureSource.QUERY, 0, 0, 0, 0, 0
        )
    return record


def a_word(told: Told) -> Notification:
    trade_no, amount_minor = told
    return Notification("simbank", "bank_a", "101", ChannelResult.SUCCESS, amount_minor, "CNY", trade_no, ABSENT_MS, 0)


@pytest.mark.parametrize(
    ("kept", "told", "expected"),
    [
        (None, [("A", ASKED)], {}),
        (None, [("A", ASKED), ("B", ASKED)], {"B": SECOND}),
        (None, [("A", ASKED), ("A", ASKED)], {}),
        (None, [("A", OTHER)], {"A": MISMATCH}),
        (None, [("A", OTHER), ("B", OTHER)], {"A": MISMATCH, "B": MISMATCH}),
        (None, [("A", OTHER), ("B", ASKED)], {"A": SECOND}),
        (None, [("A", ASKED), ("B", ASKED), ("C", OTHER)], {"B": SECOND, "C": SECOND}),
        (("A", ASKED), [("A", ASKED)], {}),
        (("A", ASKED), [("A", ASKED), ("B", ASKED)], {"B": SECOND}),
        (("A", ASKED), [("B", OTHER)], {"B": SECOND}),
        (("A", ASKED), [("A", OTHER)], {"A": MISMATCH}),
    ],
)
def test_words_of_an_answer_that_cannot_be_kept_are_evidence(
    kept: Told | None, told: list[Told], expected: dict[str, NotifyOutcome]
) -> None:
    found = evidence_of(a_record(kept=kept), 1, [a_word(one) for one in told])
    assert {word.channel_trade_no: reason for word, reason in found} == expected
