"""The decision as literal rows: a third oracle beside the plain twin and the compiled decision.

A row lists what is known about a capture and, last, the verdict. The first row that matches wins. ``ANY`` stands in a
column that does not matter there. The rows share no code with the two implementations.
"""

from typing import Final, NamedTuple

from paycore.domain.decision import Facts, Moment
from paycore.domain.verdicts import NotifyOutcome, PaymentState, Recorded, VerdictFlag

FIVE_MINUTES_MS = 300_000


class Any:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]  # what equals everything has no hash

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = Any()

YES, NO = True, False
NEW, SAME = Recorded.NONE, Recorded.SAME
OTHER_TRADE, OTHER_TERMS = Recorded.OTHER_TRADE, Recorded.OTHER_TERMS
OPEN, PAID, CLOSED = PaymentState.OPEN, PaymentState.PAID, PaymentState.CLOSED

ACCEPTED = int(NotifyOutcome.ACCEPTED)
DUPLICATE = int(NotifyOutcome.DUPLICATE)
LATE = int(NotifyOutcome.LATE)
SECOND_CAPTURE = int(NotifyOutcome.SECOND_CAPTURE)
MISMATCH = int(NotifyOutcome.MISMATCH)
CONFLICT = int(NotifyOutcome.CONFLICT)
UNKNOWN = int(NotifyOutcome.UNKNOWN)
REPLAYED = int(VerdictFlag.REPLAYED)
UNTRUSTED = int(VerdictFlag.PAID_AT_UNTRUSTED)
CLOSES = int(VerdictFlag.CLOSES)


class Row(NamedTuple):
    """What is known -> the verdict.

    given, not_before, not_ahead: paid_at is present, not before the payment was made, and at most five minutes
    ahead of receipt. in_time: the earlier of paid_at and receipt is at most the late grace after expiry.
    """

    known: object
    account: object
    recorded: object
    its_outcome: object
    terms: object
    state: object
    given: object
    not_before: object
    not_ahead: object
    in_time: object
    other_live: object
    verdict: int


# fmt: off
TABLE: Final = (
    #   known     recorded     its_outcome     terms             not_before          verdict
    #        account                                state             not_ahead
    #                                                       given          in_time
    #                                                                           other_live
    Row(NO,  ANY, ANY,         ANY,            ANY, ANY,    ANY, ANY, ANY, ANY, ANY, UNKNOWN),
    Row(YES, NO,  ANY,         ANY,            ANY, ANY,    ANY, ANY, ANY, ANY, ANY, CONFLICT),
    Row(YES, YES, SAME,        ACCEPTED,       ANY, ANY,    ANY, ANY, ANY, ANY, ANY, ACCEPTED | REPLAYED),
    Row(YES, YES, SAME,        DUPLICATE,      ANY, ANY,    ANY, ANY, ANY, ANY, ANY, DUPLICATE | REPLAYED),
    Row(YES, YES, SAME,        LATE,           ANY, ANY,    ANY, ANY, ANY, ANY, ANY, LATE | REPLAYED),
    Row(YES, YES, SAME,        SECOND_CAPTURE, ANY, ANY,    ANY, ANY, ANY, ANY, ANY, SECOND_CAPTURE | REPLAYED),
    Row(YES, YES, SAME,        MISMATCH,       ANY, ANY,    ANY, ANY, ANY, ANY, ANY, MISMATCH | REPLAYED),
    Row(YES, YES, OTHER_TRADE, ANY,            ANY, ANY,    ANY, ANY, ANY, ANY, ANY, SECOND_CAPTURE),
    Row(YES, YES, OTHER_TERMS, ANY,            ANY, ANY,    ANY, ANY, ANY, ANY, ANY, MISMATCH),
    Row(YES, YES, NEW,         ANY,            NO,  ANY,    ANY, ANY, ANY, ANY, ANY, MISMATCH),
    Row(YES, YES, NEW,         ANY,            YES, PAID,   ANY, ANY, ANY, ANY, ANY, DUPLICATE),
    Row(YES, YES, NEW,         ANY,            YES, CLOSED, ANY, ANY, ANY, ANY, ANY, LATE),
    Row(YES, YES, NEW,         ANY,            YES, OPEN,   NO,  ANY, ANY, ANY, ANY, ACCEPTED | UNTRUSTED),
    Row(YES, YES, NEW,         ANY,            YES, OPEN,   YES, NO,  ANY, ANY, ANY, ACCEPTED | UNTRUSTED),
    Row(YES, YES, NEW,         ANY,            YES, OPEN,   YES, YES, NO,  ANY, ANY, ACCEPTED | UNTRUSTED),
    Row(YES, YES, NEW,         ANY,            YES, OPEN,   YES, YES, YES, YES, ANY, ACCEPTED),
    Row(YES, YES, NEW,         ANY,            YES, OPEN,   YES, YES, YES, NO,  YES, LATE),
    Row(YES, YES, NEW,         ANY,            YES, OPEN,   YES, YES, YES, NO,  NO,  LATE | CLOSES),
)
# fmt: on


def conditions(facts: Facts, moment: Moment) -> tuple[object, ...]:
    """Turn facts and times into the columns of a row, the verdict left out."""
    return (
        facts.known,
        facts.account_matches,
        facts.recorded,
        facts.recorded_outcome,
        facts.terms_match,
        facts.state,
        moment.paid_at_ms != -1,
        not moment.paid_at_ms < facts.created_at_ms,
        not moment.paid_at_ms - moment.received_at_ms > FIVE_MINUTES_MS,
        moment.paid_at_ms - facts.expire_at_ms <= moment.late_grace_ms
        or moment.received_at_ms - facts.expire_at_ms <= moment.late_grace_ms,
        facts.other_live,
    )


def matching_row(facts: Facts, moment: Moment) -> Row:
    """Return the first row that matches. Raises LookupError when the table has none."""
    seen = conditions(facts, moment)
    for row in TABLE:
        # The rows' side is asked: ANY says yes to every column.
        if all(wanted == found for wanted, found in zip(row[:-1], seen, strict=True)):
            return row
    raise LookupError(f"no row for {facts} at {moment}")


def look_up(facts: Facts, moment: Moment) -> int:
    """Return the verdict of the first row that matches."""
    return matching_row(facts, moment).verdict


class TimeCase(NamedTuple):
    """One edge of time for an open payment made at 1,000,000 that expires at 1,600,000, with no other live attempt."""

    name: str
    paid_at_ms: int
    received_at_ms: int
    late_grace_ms: int
    verdict: int


MADE_AT_MS, EXPIRES_AT_MS = 1_000_000, 1_600_000
MIN_INT64, MAX_INT64 = -9223372036854775808, 9223372036854775807

# fmt: off
TIME_CASES: Final = (
    #        name                                      paid_at     received_at     grace  verdict
    TimeCase("absent",                                      -1,      1_100_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("absent_and_received_long_after_expiry",       -1,      9_999_999,        0, ACCEPTED | UNTRUSTED),
    TimeCase("one_ms_before_the_payment",              999_999,      1_100_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("as_the_payment_was_made",              1_000_000,      1_100_000,        0, ACCEPTED),
    TimeCase("at_expiry",                            1_600_000,      1_600_000,        0, ACCEPTED),
    TimeCase("at_expiry_and_heard_of_days_later",    1_600_000,    999_999_999,        0, ACCEPTED),
    TimeCase("one_ms_after_expiry",                  1_600_001,      1_600_001,        0, LATE | CLOSES),
    TimeCase("after_expiry_but_received_before",      1_600_001,      1_600_000,        0, ACCEPTED),
    TimeCase("at_the_end_of_grace",                  1_602_000,      1_700_000,    2_000, ACCEPTED),
    TimeCase("one_ms_after_grace",                   1_602_001,      1_700_000,    2_000, LATE | CLOSES),
    TimeCase("five_minutes_ahead",                   1_400_000,      1_100_000,        0, ACCEPTED),
    TimeCase("over_five_minutes_ahead",              1_400_001,      1_100_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("five_minutes_ahead_and_late",          2_000_000,      1_700_000,        0, LATE | CLOSES),
    TimeCase("over_five_minutes_ahead_after_expiry", 2_000_001,      1_700_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("eight_hours_ahead",                   30_400_000,      1_600_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("zero",                                         0,      1_100_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("least_int64",                          MIN_INT64,      1_100_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("greatest_int64",                       MAX_INT64,      1_100_000,        0, ACCEPTED | UNTRUSTED),
    TimeCase("greatest_int64_when_it_is_now",        MAX_INT64,      MAX_INT64,        0, LATE | CLOSES),
    TimeCase("greatest_int64_with_the_same_grace",   MAX_INT64,      MAX_INT64, MAX_INT64, ACCEPTED),
    TimeCase("received_at_least_int64",              1_100_000,      MIN_INT64,        0, ACCEPTED | UNTRUSTED),
    TimeCase("received_at_greatest_int64",           1_600_001,      MAX_INT64,        0, LATE | CLOSES),
)
# fmt: on
