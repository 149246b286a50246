"""One suite over the compiled index and its plain twin: what each method does, as rows and edges."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest

from paycore import _dedupe
from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import ID_EPOCH_MS
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.plain_index import PlainIndex
from paycore.domain.verdicts import NotifyOutcome, PaymentState, VerdictFlag
from tests.support.decision_table import MAX_INT64, MIN_INT64
from tests.support.index_truth import columns

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
