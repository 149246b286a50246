"""One suite over the compiled index and its plain twin, and histories that hold both against a model of the truth.

The model knows every fact, as the database would. The index knows a part of it, and may only say what the
model says, or ask.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paycore import _dedupe
from paycore.domain import decision
from paycore.domain.decision import ABSENT_MS, Facts, Moment
from paycore.domain.ids import ID_EPOCH_MS
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.plain_index import PlainIndex
from paycore.domain.verdicts import EXCESS_REASONS, NotifyOutcome, PaymentState, Recorded, VerdictFlag
from tests.support.decision_table import FIVE_MINUTES_MS, MAX_INT64, MIN_INT64, look_up

AnyIndex = _dedupe.Index | PlainIndex
IMPLEMENTATIONS: dict[str, Callable[[], AnyIndex]] = {"compiled": _dedupe.Index, "twin": PlainIndex}

ACCEPTED, DUPLICATE, LATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.LATE
CONFLICT, MISMATCH = NotifyOutcome.CONFLICT, NotifyOutcome.MISMATCH
ASK, CLOSES, UNTRUSTED = VerdictFlag.ASK, VerdictFlag.CLOSES, VerdictFlag.PAID_AT_UNTRUSTED
MISS = 0

OPEN, PAID, CLOSED = PaymentState.OPEN, PaymentState.PAID, PaymentState.CLOSED
MADE_AT_MS = ID_EPOCH_MS + 1_000_000
PAYMENT_ID = 1_000_000 << 22 | 7
EXPIRES_AT_MS = MADE_AT_MS + 600_000
CNY = CURRENCY_CODES["CNY"]
MAX_MASK = (1 << 63) - 1
MAX_ATTEMPTS = 63


@pytest.fixture(params=IMPLEMENTATIONS)
def index(request: pytest.FixtureRequest) -> AnyIndex:
    return IMPLEMENTATIONS[request.param]()


def put(
    index: AnyIndex,
    payment_id: int = PAYMENT_ID,
    *,
    amount_minor: int = 1_234,
    currency_code: int = CNY,
    expire_at_ms: int = EXPIRES_AT_MS,
    state: int = OPEN,
    kept_attempt: int = 0,
    attempts: int = 2,
    captured_mask: int = 0,
    accounts: tuple[int, ...] = (11, 12),
) -> None:
    """Put an open payment with two attempts, at accounts 11 and 12, or a variation of it."""
    index.put(
        payment_id, amount_minor, currency_code, expire_at_ms, state, kept_attempt, attempts, captured_mask, accounts
    )


def check(
    index: AnyIndex,
    payment_id: int = PAYMENT_ID,
    *,
    attempt: int = 1,
    account_code: int = 11,
    amount_minor: int = 1_234,
    currency_code: int = CNY,
    paid_at_ms: int = MADE_AT_MS + 5_000,
    received_at_ms: int = MADE_AT_MS + 6_000,
) -> int:
    """Check a capture that `put`'s payment would accept, or a variation of it."""
    return index.check(payment_id, attempt, account_code, amount_minor, currency_code, paid_at_ms, received_at_ms)


class CheckCase(NamedTuple):
    """What differs from `put`'s payment and from `check`'s capture -> what check says."""

    name: str
    payment: Mapping[str, object]
    capture: Mapping[str, int]
    verdict: int


PAID_BY_2 = {"state": PAID, "kept_attempt": 2}
CLOSED_NOW = {"state": CLOSED}
LATE_BY_1 = {"paid_at_ms": EXPIRES_AT_MS + 1, "received_at_ms": EXPIRES_AT_MS + 1}
ONE_ATTEMPT = {"attempts": 1, "accounts": (11,)}
THIRD_AT_255 = {"attempt": 3, "account_code": 255}
FIVE = {"attempts": 5, "accounts": (11, 12, 13, 14, 15)}

CHECK_CASES = (
    CheckCase("as_asked", {}, {}, ACCEPTED),
    CheckCase("second_attempt", {}, {"attempt": 2, "account_code": 12}, ACCEPTED),
    CheckCase("paid_at_absent", {}, {"paid_at_ms": ABSENT_MS}, ACCEPTED | UNTRUSTED),
    CheckCase("at_expiry", {}, {"paid_at_ms": EXPIRES_AT_MS, "received_at_ms": EXPIRES_AT_MS}, ACCEPTED),
    CheckCase("attempt_0", {}, {"attempt": 0}, MISS),
    CheckCase("attempt_negative", {}, {"attempt": -1}, MISS),
    CheckCase("attempt_least_int64", {}, {"attempt": MIN_INT64}, MISS),
    CheckCase("attempt_above_count", {}, {"attempt": 3}, MISS),
    CheckCase("attempt_64", {"attempts": 63}, {"attempt": 64}, MISS),
    CheckCase("attempt_65_is_not_1", {"attempts": 63}, {"attempt": 65}, MISS),
    CheckCase("attempt_greatest_int64", {}, {"attempt": MAX_INT64}, MISS),
    CheckCase("no_attempts", {"attempts": 0, "accounts": ()}, {}, MISS),
    CheckCase("other_account", {}, {"account_code": 12}, CONFLICT | ASK),
    CheckCase("unknown_account", {}, {"account_code": 0}, CONFLICT | ASK),
    CheckCase("account_267_is_not_11", {}, {"account_code": 267}, CONFLICT | ASK),
    CheckCase("account_code_not_known", {"accounts": (0, 12)}, {"account_code": 0}, MISS),
    CheckCase("account_code_missing", {"accounts": (11,)}, {"attempt": 2, "account_code": 0}, MISS),
    CheckCase("other_attempts_code_unknown", {"accounts": (11, 0)}, {}, ACCEPTED),
    CheckCase("greatest_account_codes", {"accounts": (255, 255)}, {"attempt": 2, "account_code": 255}, ACCEPTED),
    CheckCase("greatest_third_account_code", {"attempts": 3, "accounts": (0, 0, 255)}, THIRD_AT_255, ACCEPTED),
    CheckCase("third_attempt", FIVE, {"attempt": 3, "account_code": 13}, ACCEPTED),
    CheckCase("fourth_attempt_is_not_kept", FIVE, {"attempt": 4, "account_code": 14}, MISS),
    CheckCase(
        "fourth_attempt_with_its_bit", {**FIVE, "captured_mask": 0b1000}, {"attempt": 4, "account_code": 14}, MISS
    ),
    CheckCase("amount_one_more", {}, {"amount_minor": 1_235}, MISMATCH | ASK),
    CheckCase("amount_negative", {}, {"amount_minor": -1_234}, MISMATCH | ASK),
    CheckCase("amount_equal_in_48_bits", {}, {"amount_minor": 1_234 + (1 << 48)}, MISMATCH | ASK),
    CheckCase("amount_least_int64", {}, {"amount_minor": MIN_INT64}, MISMATCH | ASK),
    CheckCase("amount_greatest_kept", {"amount_minor": (1 << 48) - 1}, {"amount_minor": (1 << 48) - 1}, ACCEPTED),
    CheckCase("amount_does_not_fit", {"amount_minor": 1 << 48}, {"amount_minor": 1 << 48}, MISS),
    CheckCase("amount_greatest_int64", {"amount_minor": MAX_INT64}, {"amount_minor": MAX_INT64}, MISS),
    CheckCase("amount_0_does_not_fit", {"amount_minor": 0}, {"amount_minor": 0}, MISS),
    CheckCase("amount_negative_does_not_fit", {"amount_minor": -5}, {"amount_minor": -5}, MISS),
    CheckCase("other_currency", {}, {"currency_code": CNY + 1}, MISMATCH | ASK),
    CheckCase("unknown_currency", {}, {"currency_code": 0}, MISMATCH | ASK),
    CheckCase("currency_equal_in_8_bits", {}, {"currency_code": CNY + 256}, MISMATCH | ASK),
    CheckCase("currency_0_does_not_fit", {"currency_code": 0}, {"currency_code": 0}, MISS),
    CheckCase("currency_even", {"currency_code": 254}, {"currency_code": 254}, ACCEPTED),
    CheckCase(
        "currency_even_beside_the_greatest_third_account_code",
        {"attempts": 3, "accounts": (11, 12, 255), "currency_code": 254},
        {**THIRD_AT_255, "currency_code": 254},
        ACCEPTED,
    ),
    CheckCase("currency_greatest", {"currency_code": 255}, {"currency_code": 255}, ACCEPTED),
    CheckCase("expiry_at_once", {"expire_at_ms": MADE_AT_MS}, {"paid_at_ms": MADE_AT_MS}, ACCEPTED),
    CheckCase("expiry_at_once_and_late", {"expire_at_ms": MADE_AT_MS}, {}, LATE | ASK),
    CheckCase("expiry_before_the_payment", {"expire_at_ms": MADE_AT_MS - 1}, {}, MISS),
    CheckCase("expiry_least_int64", {"expire_at_ms": MIN_INT64}, {}, MISS),
    CheckCase("expiry_greatest_int64", {"expire_at_ms": MAX_INT64}, {}, MISS),
    CheckCase("expiry_does_not_fit", {"expire_at_ms": MADE_AT_MS + (1 << 32)}, {}, MISS),
    CheckCase(
        "expiry_longest_at_its_end",
        {"expire_at_ms": MADE_AT_MS + (1 << 32) - 1},
        {"paid_at_ms": MADE_AT_MS + (1 << 32) - 1, "received_at_ms": MAX_INT64},
        ACCEPTED,
    ),
    CheckCase(
        "expiry_longest_and_late",
        {"expire_at_ms": MADE_AT_MS + (1 << 32) - 1},
        {"paid_at_ms": MADE_AT_MS + (1 << 32), "received_at_ms": MAX_INT64},
        LATE | ASK,
    ),
    CheckCase("late", {}, LATE_BY_1, LATE | ASK),
    CheckCase("late_with_one_attempt", ONE_ATTEMPT, LATE_BY_1, LATE | CLOSES | ASK),
    CheckCase("times_least_int64", {}, {"paid_at_ms": MIN_INT64, "received_at_ms": MIN_INT64}, ACCEPTED | UNTRUSTED),
    CheckCase("times_greatest_int64", {}, {"paid_at_ms": MAX_INT64, "received_at_ms": MAX_INT64}, LATE | ASK),
    CheckCase("paid_by_another_attempt", PAID_BY_2, {}, DUPLICATE | ASK),
    CheckCase("paid_by_this_attempt", PAID_BY_2, {"attempt": 2, "account_code": 12}, ASK),
    CheckCase("paid_and_wrong_amount", PAID_BY_2, {"amount_minor": 1}, MISMATCH | ASK),
    CheckCase("closed", CLOSED_NOW, {}, LATE | ASK),
    CheckCase("captured", {"captured_mask": 0b01}, {}, ASK),
    CheckCase("captured_and_other_account", {"captured_mask": 0b01}, {"account_code": 12}, ASK),
    CheckCase("captured_and_wrong_amount", {"captured_mask": 0b01}, {"amount_minor": 1}, ASK),
    CheckCase("captured_by_another_attempt", {"captured_mask": 0b10}, {}, ACCEPTED | ASK),
    CheckCase("captured_by_all_but_this", {"captured_mask": MAX_MASK - 1}, {}, ACCEPTED | ASK),
    CheckCase("captured_by_63_alone", {"attempts": 63, "captured_mask": 1 << 62}, {}, ACCEPTED | ASK),
)


@pytest.mark.parametrize("case", CHECK_CASES, ids=lambda case: case.name)
def test_check_of_a_cached_payment_gives_the_rows_verdict(index: AnyIndex, case: CheckCase) -> None:
    put(index, **case.payment)  # type: ignore[arg-type]  # the rows vary fields of several types
    before = index.get(PAYMENT_ID)
    assert check(index, **case.capture) == case.verdict
    assert index.get(PAYMENT_ID) == before


@pytest.mark.parametrize("payment_id", [0, -1, 1, PAYMENT_ID + 1, MAX_INT64, MIN_INT64, -PAYMENT_ID])
def test_absent_payment_is_a_miss_and_changes_do_nothing(index: AnyIndex, payment_id: int) -> None:
    put(index)
    assert check(index, payment_id) == MISS
    assert payment_id not in index
    assert index.get(payment_id) is None
    index.add_attempt(payment_id, 1, 11)
    index.close(payment_id)
    index.set_captured(payment_id, 1)
    index.discard(payment_id)
    with pytest.raises(KeyError):
        index.accept(payment_id, 1)
    assert len(index) == 1


@pytest.mark.parametrize("payment_id", [1, (1 << 22) - 1, 1 << 22, PAYMENT_ID, MAX_INT64 - 1, MAX_INT64])
def test_put_of_any_positive_id_is_found_again(index: AnyIndex, payment_id: int) -> None:
    made_at_ms = (payment_id >> 22) + ID_EPOCH_MS
    put(index, payment_id, expire_at_ms=made_at_ms + 10)
    assert check(index, payment_id, paid_at_ms=made_at_ms, received_at_ms=made_at_ms) == ACCEPTED
    assert check(index, payment_id, paid_at_ms=made_at_ms + 11, received_at_ms=made_at_ms + 11) == LATE | ASK
    assert len(index) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"payment_id": 0}, "payment_id must be 1 to"),
        ({"payment_id": -1}, "payment_id must be 1 to"),
        ({"payment_id": MIN_INT64}, "payment_id must be 1 to"),
        ({"currency_code": 256}, "currency_code must be 0 to 255"),
        ({"currency_code": -1}, "currency_code must be 0 to 255"),
        ({"state": 0}, "state must be 1 to 3"),
        ({"state": 4}, "state must be 1 to 3"),
        ({"attempts": 64}, "attempts must be 0 to 63"),
        ({"attempts": -1}, "attempts must be 0 to 63"),
        ({"captured_mask": -1}, "captured_mask must be 0 to"),
        ({"attempts": 1}, r"len\(accounts\) must be 0 to 1"),
        ({"accounts": (11, 256)}, "account code must be 0 to 255"),
        ({"accounts": (11, -1)}, "account code must be 0 to 255"),
        ({"attempts": 5, "accounts": (1, 2, 3, 4, 256)}, "account code must be 0 to 255"),
        ({"state": PAID}, "kept_attempt of a paid payment must be 1 to 63"),
        ({"state": PAID, "kept_attempt": 64}, "kept_attempt of a paid payment must be 1 to 63"),
        ({"kept_attempt": 1}, "kept_attempt of a payment that is not paid must be 0 to 0"),
        ({"state": CLOSED, "kept_attempt": 1}, "kept_attempt of a payment that is not paid must be 0 to 0"),
    ],
)
def test_put_of_a_value_out_of_range_names_it_and_changes_nothing(
    index: AnyIndex, changed: dict[str, int], message: str
) -> None:
    put(index)
    before = index.get(PAYMENT_ID)
    with pytest.raises(ValueError, match=message):
        put(index, **changed)  # type: ignore[arg-type]  # the rows vary fields of several types
    assert index.get(PAYMENT_ID) == before
    assert len(index) == 1


@pytest.mark.parametrize("attempt", [0, 64, -1, MAX_INT64, MIN_INT64])
def test_mark_of_an_impossible_attempt_is_refused(index: AnyIndex, attempt: int) -> None:
    put(index)
    before = index.get(PAYMENT_ID)
    with pytest.raises(ValueError, match="attempt must be 1 to 63"):
        index.accept(PAYMENT_ID, attempt)
    with pytest.raises(ValueError, match="attempt must be 1 to 63"):
        index.set_captured(PAYMENT_ID, attempt)
    assert index.get(PAYMENT_ID) == before


def test_attempts_from_0_to_63_are_counted_and_the_64th_drops_the_entry(index: AnyIndex) -> None:
    put(index, attempts=0, accounts=())
    for attempt in range(1, MAX_ATTEMPTS + 1):
        assert check(index, attempt=attempt, account_code=attempt) == MISS
        index.add_attempt(PAYMENT_ID, attempt, attempt)
        assert check(index, attempt=attempt, account_code=attempt) == (ACCEPTED if attempt <= 3 else MISS)
    entry = index.get(PAYMENT_ID)
    assert entry is not None
    assert (entry.attempts, entry.accounts) == (63, (1, 2, 3))
    index.add_attempt(PAYMENT_ID, 64, 64)
    assert PAYMENT_ID not in index


@pytest.mark.parametrize("attempt", [0, 1, 2, 4, 63, 64, -1, MAX_INT64, MIN_INT64])
def test_attempt_that_is_not_the_next_drops_the_entry(index: AnyIndex, attempt: int) -> None:
    put(index)
    index.add_attempt(PAYMENT_ID, attempt, 13)
    assert PAYMENT_ID not in index


@pytest.mark.parametrize("account_code", [-1, 256])
def test_attempt_with_an_impossible_account_code_is_refused(index: AnyIndex, account_code: int) -> None:
    put(index)
    with pytest.raises(ValueError, match="account_code must be 0 to 255"):
        index.add_attempt(PAYMENT_ID, 3, account_code)
    assert check(index) == ACCEPTED


def test_every_attempt_has_a_bit_of_its_own(index: AnyIndex) -> None:
    put(index, attempts=63, captured_mask=0)
    for attempt in range(1, MAX_ATTEMPTS + 1):
        index.set_captured(PAYMENT_ID, attempt)
        entry = index.get(PAYMENT_ID)
        assert entry is not None
        assert entry.captured_mask == (1 << attempt) - 1
        assert not entry.asks
    for attempt in (1, 2):
        assert check(index, attempt=attempt, account_code=10 + attempt) == ASK


@pytest.mark.parametrize("attempt", [1, 2, 62, 63])
def test_accept_marks_the_payment_paid_and_the_attempt_captured(index: AnyIndex, attempt: int) -> None:
    put(index, attempts=63, captured_mask=0b100)
    index.accept(PAYMENT_ID, attempt)
    entry = index.get(PAYMENT_ID)
    assert entry is not None
    assert (entry.state, entry.kept_attempt, entry.captured_mask) == (PAID, attempt, 0b100 | 1 << (attempt - 1))
    assert check(index, attempt=1) == (ASK if attempt == 1 else DUPLICATE | ASK)


def test_mark_that_repeats_a_final_outcome_keeps_it(index: AnyIndex) -> None:
    put(index, **PAID_BY_2)  # type: ignore[arg-type]  # a shared row
    index.accept(PAYMENT_ID, 2)
    assert check(index) == DUPLICATE | ASK
    put(index, PAYMENT_ID + 1, state=CLOSED)
    index.close(PAYMENT_ID + 1)
    assert check(index, PAYMENT_ID + 1) == LATE | ASK


def test_mark_that_contradicts_a_final_outcome_drops_the_entry(index: AnyIndex) -> None:
    put(index, **PAID_BY_2)  # type: ignore[arg-type]  # a shared row
    index.accept(PAYMENT_ID, 1)
    assert PAYMENT_ID not in index
    put(index, **PAID_BY_2)  # type: ignore[arg-type]  # a shared row
    index.close(PAYMENT_ID)
    assert PAYMENT_ID not in index
    put(index, state=CLOSED)
    index.accept(PAYMENT_ID, 1)
    assert PAYMENT_ID not in index


def test_late_grace_moves_the_end_of_time(index: AnyIndex) -> None:
    patient = type(index)(late_grace_ms=2_000)
    put(patient)
    end_ms = EXPIRES_AT_MS + 2_000
    assert check(patient, paid_at_ms=end_ms, received_at_ms=end_ms) == ACCEPTED
    assert check(patient, paid_at_ms=end_ms + 1, received_at_ms=end_ms + 1) == LATE | ASK


@pytest.mark.parametrize("name", ["late_grace_ms", "capacity"])
def test_index_with_a_negative_setting_is_refused(index: AnyIndex, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be 0 to"):
        type(index)(**{name: -1})


def test_group_calls_out_of_order_are_refused(index: AnyIndex) -> None:
    for end in (index.commit, index.rollback):
        with pytest.raises(RuntimeError, match="no group is running"):
            end()
    index.begin()
    with pytest.raises(RuntimeError, match="a group is running already"):
        index.begin()
    index.commit()
    with pytest.raises(RuntimeError, match="no group is running"):
        index.rollback()


def test_group_marks_are_seen_at_once_and_gone_after_rollback(index: AnyIndex) -> None:
    put(index)
    index.begin()
    index.accept(PAYMENT_ID, 1)
    assert check(index, attempt=2, account_code=12) == DUPLICATE | ASK
    index.rollback()
    assert check(index, attempt=2, account_code=12) == ACCEPTED


def test_group_marks_stay_after_commit(index: AnyIndex) -> None:
    put(index)
    index.begin()
    index.accept(PAYMENT_ID, 1)
    index.commit()
    index.begin()
    index.rollback()
    assert check(index, attempt=2, account_code=12) == DUPLICATE | ASK


def test_marks_outside_a_group_are_not_undone_by_the_next(index: AnyIndex) -> None:
    put(index)
    index.accept(PAYMENT_ID, 1)
    index.begin()
    index.close(PAYMENT_ID)
    index.rollback()
    assert check(index) == ASK


def test_rollback_undoes_every_kind_of_change(index: AnyIndex) -> None:
    for payment_id in range(1, 9):
        put(index, payment_id, expire_at_ms=ID_EPOCH_MS + 9)
    before = {payment_id: index.get(payment_id) for payment_id in range(12)}
    index.begin()
    index.accept(1, 1)
    index.close(2)
    index.set_captured(3, 2)
    index.discard(4)
    index.add_attempt(5, 3, 13)
    index.add_attempt(6, 9, 13)
    put(index, 7, amount_minor=5, attempts=63)
    put(index, 8, amount_minor=1 << 50)
    put(index, 9)
    put(index, 10)
    index.discard(10)
    index.discard(1)
    put(index, 1, state=CLOSED)
    assert {payment_id: index.get(payment_id) for payment_id in range(12)} != before
    index.rollback()
    assert {payment_id: index.get(payment_id) for payment_id in range(12)} == before
    assert len(index) == 8


Columns = tuple["array[int]", ...]


def columns(captures: Sequence[tuple[int, ...]]) -> Columns:
    """Lay captures out as check_many takes them, a column of zeros for the verdicts at the end."""
    rows = [(*capture, 0) for capture in captures]
    return tuple(array(kind, [row[place] for row in rows]) for place, kind in enumerate("qBBqBqqI"))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 33, 200])
def test_check_many_gives_what_check_gives(index: AnyIndex, count: int) -> None:
    for payment_id in range(PAYMENT_ID, PAYMENT_ID + 50):
        put(index, payment_id, amount_minor=1 + payment_id % 5)
    captures = [
        (PAYMENT_ID - 3 + i % 56, i % 4, 10 + i % 3, 1 + i % 5, CNY, MADE_AT_MS + i, MADE_AT_MS + 2 * i)
        for i in range(count)
    ]
    table = columns(captures)
    index.check_many(*table)
    assert list(table[-1]) == [index.check(*capture) for capture in captures]


def test_check_many_of_an_empty_index_misses_all(index: AnyIndex) -> None:
    table = columns([(PAYMENT_ID, 1, 11, 1, CNY, 0, 0)] * 40)
    table[-1][:] = array("I", [9] * 40)
    index.check_many(*table)
    assert set(table[-1]) == {MISS}


@pytest.mark.parametrize("place", range(8))
def test_check_many_of_unequal_lengths_is_refused(index: AnyIndex, place: int) -> None:
    table = columns([(PAYMENT_ID, 1, 11, 1, CNY, 0, 0)] * 3)
    table[place].pop()
    with pytest.raises(ValueError, match="one length"):
        index.check_many(*table)


# ---- Histories -------------------------------------------------------------------------------------------


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


picks = st.integers(0, 1_000)
# What fits an entry stands more often, or most of a history would be misses.
amounts = st.sampled_from([1, 100, 1_234, (1 << 48) - 1, 1 << 48, MAX_INT64])
currencies = st.sampled_from([1, CNY, CNY, 254, 255, 0])
codes = st.sampled_from([1, 1, 2, 254, 255, 0])
trade_nos = st.sampled_from(["A", "B"])
paid_ats = st.sampled_from(
    ["absent", "now", "made", "before", "expiry", "expiry+1", "grace", "grace+1", "ahead", "too far"]
)


class IndexHistory(RuleBasedStateMachine):
    """Payments are made, paid, paid again, closed; groups commit and roll back; other processes write too."""

    grace_ms = 2_000

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = MADE_AT_MS
        self.payments: dict[int, Payment] = {}
        self.words: list[Notification] = []
        self.compiled = _dedupe.Index(late_grace_ms=self.grace_ms)
        self.plain = PlainIndex(late_grace_ms=self.grace_ms)
        self.payments_before: dict[int, Payment] | None = None
        self.entries_before: dict[int, tuple[object, ...] | None] = {}

    @property
    def indexes(self) -> tuple[AnyIndex, AnyIndex]:
        return self.compiled, self.plain

    def pick(self, pick: int) -> Payment:
        return list(self.payments.values())[pick % len(self.payments)]

    def entries(self) -> dict[int, tuple[object, ...] | None]:
        return {key: self.compiled.get(key) for key in self.payments}

    def load(self, payment: Payment) -> None:
        for index in self.indexes:
            index.put(*payment.row())
        payment.stale = False

    # -- what happens

    @rule(
        amount_minor=amounts,
        currency_code=currencies,
        validity_ms=st.sampled_from([0, 1, 600_000, 600_000, (1 << 32) - 1, 1 << 32]),
        accounts=st.one_of(
            st.lists(st.sampled_from([1, 2, 255]), min_size=1, max_size=2),
            st.lists(codes, max_size=5),
            st.just([1] * MAX_ATTEMPTS),
        ),
        cached=st.booleans(),
    )
    def pay(self, amount_minor: int, currency_code: int, validity_ms: int, accounts: list[int], cached: bool) -> None:
        payment_id = (self.now_ms - ID_EPOCH_MS) << 22 | len(self.payments)
        payment = Payment(payment_id, self.now_ms, self.now_ms + validity_ms, amount_minor, currency_code)
        payment.attempts = [Attempt(code) for code in accounts]
        self.payments[payment_id] = payment
        if cached:
            self.load(payment)

    @precondition(lambda self: self.payments)
    @rule(pick=picks, account_code=codes)
    def add_attempt(self, pick: int, account_code: int) -> None:
        payment = self.pick(pick)
        if len(payment.attempts) < MAX_ATTEMPTS:
            payment.attempts.append(Attempt(account_code))
            for index in self.indexes:
                index.add_attempt(payment.payment_id, len(payment.attempts), account_code)

    @precondition(lambda self: self.payments)
    @rule(
        pick=picks,
        attempt_pick=st.integers(0, 2),
        trade_no=trade_nos,
        paid_at=paid_ats,
        heard_when_paid=st.booleans(),
    )
    def success(self, pick: int, attempt_pick: int, trade_no: str, paid_at: str, heard_when_paid: bool) -> None:
        """A success of the right account and terms: only when it was paid, and for which trade, is left open."""
        payment = self.pick(pick)
        if payment.attempts:
            word = self.word(payment, 1 + attempt_pick % len(payment.attempts), trade_no, paid_at)
            self.arrive(payment, word, heard_when_paid)

    @precondition(lambda self: self.payments)
    @rule(
        pick=picks,
        attempt=st.one_of(st.integers(1, 3), st.integers(0, 64)),
        trade_no=trade_nos,
        paid_at=paid_ats,
        wrong=st.sets(st.sampled_from(["account", "amount", "currency"])),
        amount_minor=amounts,
    )
    def success_of_any_kind(
        self, pick: int, attempt: int, trade_no: str, paid_at: str, wrong: set[str], amount_minor: int
    ) -> None:
        """A success for an attempt that may not be there, by an account or with terms that may be wrong."""
        payment = self.pick(pick)
        word = self.word(payment, attempt, trade_no, paid_at)
        if "account" in wrong:
            word = word._replace(account_code=(word.account_code + 1) % 256)
        if "amount" in wrong:
            word = word._replace(amount_minor=amount_minor)
        if "currency" in wrong:
            word = word._replace(currency_code=(word.currency_code + 1) % 256)
        self.arrive(payment, word, heard_when_paid=True)

    @precondition(lambda self: self.words)
    @rule(pick=picks)
    def replay(self, pick: int) -> None:
        self.hear(self.words[pick % len(self.words)])

    @precondition(lambda self: self.payments)
    @rule(pick=picks, attempt=st.integers(1, 63))
    def failure(self, pick: int, attempt: int) -> None:
        attempts = self.pick(pick).attempts
        if attempt <= len(attempts):
            attempts[attempt - 1].finally_unpaid = True

    @precondition(lambda self: self.payments)
    @rule(pick=picks)
    def close(self, pick: int) -> None:
        payment = self.pick(pick)
        if payment.state == OPEN:
            payment.state = CLOSED
            for index in self.indexes:
                if not payment.stale:
                    index.close(payment.payment_id)
                else:
                    index.discard(payment.payment_id)

    @rule(elapsed_ms=st.sampled_from([1, 1_000, 600_000, 1 << 32]))
    def time_passes(self, elapsed_ms: int) -> None:
        self.now_ms += elapsed_ms

    @precondition(lambda self: self.payments and self.payments_before is None)
    @rule(pick=picks, what=st.sampled_from(["paid", "closed", "excess", "attempt"]))
    def another_process_writes(self, pick: int, what: str) -> None:
        payment = self.pick(pick)
        free = [place for place, attempt in enumerate(payment.attempts, start=1) if not attempt.captures]
        if what == "attempt":
            if len(payment.attempts) < MAX_ATTEMPTS:
                payment.attempts.append(Attempt(1))
        elif what == "closed" and payment.state == OPEN:
            payment.state = CLOSED
        elif what == "paid" and payment.state == OPEN and free:
            self.record(payment, free[0], "F", NotifyOutcome.ACCEPTED)
        elif what == "excess" and free:
            self.record(payment, free[-1], "F", NotifyOutcome.LATE)
        payment.stale = True

    @precondition(lambda self: self.payments)
    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        for index in self.indexes:
            index.discard(self.pick(pick).payment_id)

    @precondition(lambda self: self.payments)
    @rule(pick=picks)
    def reload(self, pick: int) -> None:
        self.load(self.pick(pick))

    @precondition(lambda self: self.payments_before is None)
    @rule()
    def begin(self) -> None:
        self.payments_before = copy.deepcopy(self.payments)
        self.entries_before = self.entries()
        for index in self.indexes:
            index.begin()

    @precondition(lambda self: self.payments_before is not None)
    @rule()
    def commit(self) -> None:
        self.payments_before = None
        for index in self.indexes:
            index.commit()

    @precondition(lambda self: self.payments_before is not None)
    @rule()
    def rollback(self) -> None:
        assert self.payments_before is not None
        made_in_group = self.payments.keys() - self.payments_before.keys()
        self.payments, self.payments_before = self.payments_before, None
        for index in self.indexes:
            index.rollback()
        assert self.entries() == self.entries_before
        assert not any(key in self.compiled for key in made_in_group)

    # -- what must hold

    def word(self, payment: Payment, attempt: int, trade_no: str, paid_at: str) -> Notification:
        """What a channel says about an attempt when all is right; ``paid_at`` names an edge of time."""
        times_ms = {
            "absent": ABSENT_MS,
            "now": self.now_ms,
            "made": payment.created_at_ms,
            "before": payment.created_at_ms - 1,
            "expiry": payment.expire_at_ms,
            "expiry+1": payment.expire_at_ms + 1,
            "grace": payment.expire_at_ms + self.grace_ms,
            "grace+1": payment.expire_at_ms + self.grace_ms + 1,
            "ahead": self.now_ms + FIVE_MINUTES_MS,
            "too far": self.now_ms + FIVE_MINUTES_MS + 1,
        }
        known = 1 <= attempt <= len(payment.attempts)
        return Notification(
            payment_id=payment.payment_id,
            attempt=attempt,
            account_code=payment.attempts[attempt - 1].account_code if known else 1,
            trade_no=trade_no,
            amount_minor=payment.amount_minor,
            currency_code=payment.currency_code,
            paid_at_ms=times_ms[paid_at],
        )

    def arrive(self, payment: Payment, word: Notification, heard_when_paid: bool) -> None:
        """Hear a new notification, now, or when it was paid if that is later."""
        self.words.append(word)
        if heard_when_paid:
            # Without this nearly every time after expiry would be too far ahead to be believed.
            self.now_ms = max(self.now_ms, min(word.paid_at_ms, payment.expire_at_ms + FIVE_MINUTES_MS))
        self.hear(word)

    def hear(self, word: Notification) -> None:
        """Judge a notification by all oracles, hold the index against the truth, then write what was decided."""
        payment = self.payments.get(word.payment_id)
        facts = true_facts(payment, word)
        moment = Moment(word.paid_at_ms, self.now_ms, self.grace_ms)
        verdict = look_up(facts, moment)
        assert decision.decide(facts, moment) == verdict
        assert _dedupe.decide(facts, moment) == verdict
        guess = self.check(word)
        self.compare(guess, verdict, payment, facts)
        if payment is None:
            return
        if guess == MISS or payment.stale:
            self.load(payment)
            guess = self.check(word)
            self.compare(guess, verdict, payment, facts)
            self.expect_an_answer(guess, payment, word)
        self.write(payment, word, verdict)

    def check(self, word: Notification) -> int:
        capture = (
            word.payment_id,
            word.attempt,
            word.account_code,
            word.amount_minor,
            word.currency_code,
            word.paid_at_ms,
            self.now_ms,
        )
        guess = self.compiled.check(*capture)
        assert self.plain.check(*capture) == guess
        table = columns([capture])
        self.compiled.check_many(*table)
        assert table[-1][0] == guess
        return guess

    def compare(self, guess: int, verdict: int, payment: Payment | None, facts: Facts) -> None:
        """The index says what is true, or asks; ACCEPTED alone may be out of date, and only until it is told."""
        if guess == MISS:
            return
        assert payment is not None
        if payment.stale:
            assert guess & ASK or guess & 0xFF == ACCEPTED
            return
        if guess == ASK:
            assert facts.recorded != Recorded.NONE
            return
        if guess & 0xFF == ACCEPTED:
            # A judged capture of another attempt may wait for the outcome: the rows are asked.
            captured = any(attempt.captures for attempt in payment.attempts)
            assert guess == (verdict | ASK if captured else verdict)
            return
        # Which attempts are live is not cached: with several, the guess leaves CLOSES to the database.
        several = len(payment.attempts) > 1
        assert guess == (verdict & ~CLOSES if several else verdict) | ASK

    def expect_an_answer(self, guess: int, payment: Payment, word: Notification) -> None:
        """Just loaded, the index must know what fits into an entry: one that always asks would pass all else."""
        fits = (
            payment.amount_minor < 1 << 48
            and payment.currency_code != 0
            and payment.expire_at_ms - payment.created_at_ms < 1 << 32
        )
        known = 1 <= word.attempt <= min(3, len(payment.attempts))
        if fits and known and payment.attempts[word.attempt - 1].account_code != 0:
            assert guess != MISS
        else:
            assert guess == MISS

    def write(self, payment: Payment, word: Notification, verdict: int) -> None:
        """Do what the writer does with a verdict, in the truth and in both indexes."""
        outcome = verdict & 0xFF
        if verdict & VerdictFlag.REPLAYED or outcome not in {ACCEPTED, DUPLICATE, LATE}:
            return
        self.record(payment, word.attempt, word.trade_no, outcome)
        if verdict & CLOSES:
            payment.state = CLOSED
        for index in self.indexes:
            if outcome == ACCEPTED:
                index.accept(payment.payment_id, word.attempt)
            else:
                index.set_captured(payment.payment_id, word.attempt)
            if verdict & CLOSES:
                index.close(payment.payment_id)

    def record(self, payment: Payment, attempt: int, trade_no: str, outcome: int) -> None:
        assert outcome in {ACCEPTED, *EXCESS_REASONS}
        payment.attempts[attempt - 1].captures[trade_no] = Capture(payment.amount_minor, payment.currency_code, outcome)
        if outcome == ACCEPTED:
            assert payment.state == OPEN
            payment.state, payment.kept_attempt = PAID, attempt

    @invariant()
    def indexes_hold_the_same(self) -> None:
        assert len(self.compiled) == len(self.plain)
        for key in self.payments:
            compiled: tuple[object, ...] | None = self.compiled.get(key)
            assert compiled == self.plain.get(key)
            assert (key in self.compiled) == (key in self.plain)

    @invariant()
    def fresh_entries_hold_the_truth(self) -> None:
        for payment in self.payments.values():
            entry: tuple[object, ...] | None = self.compiled.get(payment.payment_id)
            if entry is not None and not payment.stale:
                fresh = PlainIndex()
                fresh.put(*payment.row())
                assert entry == fresh.get(payment.payment_id)


IndexHistory.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestIndexHistory = IndexHistory.TestCase
