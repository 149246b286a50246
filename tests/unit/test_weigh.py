"""What a channel's answer makes of evidence: every case as a row."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from paycore.channels.protocol import Capture
from paycore.domain.verdicts import CaptureSource, NotifyOutcome, PaymentState
from paycore.store.rows import ExcessRow, OutcomeRow, PaymentRecord, PaymentRow, QuarantineRow, Stamp
from paycore.usecases.judge_again import Weight, weigh

STAMP = Stamp(10_000, 1, 1)
ASKED, OTHER = 500, 499


class Money(NamedTuple):
    """A capture of attempt 1."""

    trade_no: str
    amount_minor: int = ASKED
    currency: str = "CNY"


KEPT = Money("T1")
CLAIM = Money("T2")


def told(*captures: Money) -> list[Capture]:
    return [Capture(*one, None) for one in captures]


def record(kept: Money | None, *excess: Money) -> PaymentRecord:
    made = PaymentRecord(PaymentRow(1, "shop", "n1", ASKED, "CNY", "Tea", "", "digest", 20_000, *STAMP))
    if kept is not None:
        made.outcome = OutcomeRow(
            1, PaymentState.PAID, 1, *kept, None, 10_000, CaptureSource.NOTIFICATION, 0, 0, *STAMP
        )
    made.excess = [
        ExcessRow(
            1, 1, one.trade_no, NotifyOutcome.MISMATCH, *one[1:], None, 10_000, CaptureSource.NOTIFICATION, *STAMP
        )
        for one in excess
    ]
    return made


def evidence(claim: Money, reason: NotifyOutcome) -> QuarantineRow:
    what = (1, 1, 1, "simbank", "bank_a", "101", *claim, None, CaptureSource.NOTIFICATION)
    return QuarantineRow("q", reason, *what, b"", "", 10_000, 10_000, 1, 1, "[]", *STAMP)


@pytest.mark.parametrize("reason", [NotifyOutcome.SECOND_CAPTURE, NotifyOutcome.MISMATCH])
@pytest.mark.parametrize(
    ("claim", "on_record", "says", "weight"),
    [
        pytest.param(CLAIM, record(KEPT), told(KEPT, CLAIM), Weight.CONFIRMED, id="both_told"),
        pytest.param(CLAIM, record(KEPT), told(KEPT), Weight.STAYS, id="only_the_recorded_told"),
        pytest.param(CLAIM, record(KEPT), told(CLAIM), Weight.STAYS, id="only_the_claim_told"),
        pytest.param(CLAIM, record(KEPT), told(), Weight.STAYS, id="nothing_told"),
        pytest.param(
            CLAIM,
            record(KEPT),
            told(KEPT._replace(amount_minor=OTHER), CLAIM),
            Weight.STAYS,
            id="recorded_told_otherwise",
        ),
        pytest.param(
            CLAIM, record(KEPT), told(KEPT, CLAIM._replace(currency="USD")), Weight.STAYS, id="claim_told_otherwise"
        ),
        pytest.param(
            CLAIM, record(KEPT, Money("T3")), told(KEPT, CLAIM), Weight.STAYS, id="an_excess_of_the_attempt_untold"
        ),
        pytest.param(
            CLAIM, record(KEPT, Money("T3")), told(KEPT, CLAIM, Money("T3")), Weight.CONFIRMED, id="all_of_three_told"
        ),
        pytest.param(
            CLAIM._replace(amount_minor=OTHER),
            record(None),
            told(CLAIM._replace(amount_minor=OTHER)),
            Weight.CONFIRMED,
            id="wrong_amount_told",
        ),
        pytest.param(
            CLAIM._replace(currency="USD"),
            record(None),
            told(CLAIM._replace(currency="USD")),
            Weight.CONFIRMED,
            id="wrong_currency_told",
        ),
        pytest.param(CLAIM, record(None), told(CLAIM), Weight.STAYS, id="right_terms_are_for_the_decision"),
        pytest.param(
            KEPT._replace(amount_minor=OTHER), record(KEPT), told(KEPT), Weight.REFUTED, id="kept_told_as_recorded"
        ),
        pytest.param(
            KEPT._replace(amount_minor=OTHER),
            record(KEPT),
            told(KEPT._replace(amount_minor=OTHER)),
            Weight.STAYS,
            id="kept_contradicted",
        ),
        pytest.param(KEPT._replace(amount_minor=OTHER), record(KEPT), told(), Weight.STAYS, id="kept_untold"),
        pytest.param(CLAIM, record(KEPT, CLAIM), told(), Weight.ON_RECORD, id="excess_by_now"),
        pytest.param(KEPT, record(KEPT), told(), Weight.ON_RECORD, id="kept_by_now"),
    ],
)
def test_evidence_weighs_what_record_and_channel_say(
    reason: NotifyOutcome, claim: Money, on_record: PaymentRecord, says: list[Capture], weight: Weight
) -> None:
    weighed = weigh(evidence(claim, reason), on_record, says)
    assert weighed.weight == weight
    assert weighed.why


def test_captures_of_other_attempts_say_nothing_about_this_one() -> None:
    other = record(KEPT)
    assert other.outcome is not None
    other.outcome = other.outcome._replace(attempt=2)
    row = evidence(CLAIM._replace(amount_minor=OTHER), NotifyOutcome.MISMATCH)
    assert weigh(row, other, told(CLAIM._replace(amount_minor=OTHER))).weight == Weight.CONFIRMED
