"""Messages to values and back."""

from __future__ import annotations

import json

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from paycore.domain.decision import ABSENT_MS
from paycore.domain.errors import InvalidArgumentError
from paycore.domain.verdicts import AttemptState, NotifyOutcome, PaymentState, PayMethod, RefundState
from paycore.rpc import convert
from paycore.store.rows import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentFile,
    PaymentRecord,
    PaymentRow,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
)
from paycore.usecases.words import headers_json
from paycore.v1 import payment_pb2 as v1
from tests.support.wire import MAX_TIMESTAMP_MS, MIN_TIMESTAMP_MS, instant_ms

INT64 = st.integers(-(2**63), 2**63 - 1)
INT32 = st.integers(-(2**31), 2**31 - 1)

INSTANTS = [
    (0, 0, 0),
    (1_700_000_000, 123_456_789, 1_700_000_000_123),
    (-1, 500_000_000, -500),
    (-1, 999_000_000, ABSENT_MS - 1),
    (253_402_300_799, 999_999_999, MAX_TIMESTAMP_MS),
    (253_402_300_800, 0, MAX_TIMESTAMP_MS),
    (2**63 - 1, 2**31 - 1, MAX_TIMESTAMP_MS),
    (-62_135_596_800, 0, MIN_TIMESTAMP_MS),
    (-62_135_596_801, 0, MIN_TIMESTAMP_MS),
    (-(2**63), -(2**31), MIN_TIMESTAMP_MS),
    (5, -1, 5_000),
    (5, 2_000_000_000, 5_999),
]


@pytest.mark.parametrize(("seconds", "nanos", "at_ms"), INSTANTS)
def test_instant_of_timestamp_is_in_milliseconds_and_in_range(seconds: int, nanos: int, at_ms: int) -> None:
    assert instant_ms(Timestamp(seconds=seconds, nanos=nanos)) == at_ms


@given(INT64, INT32)
def test_any_timestamp_becomes_an_instant_that_can_be_shown_again(seconds: int, nanos: int) -> None:
    at_ms = instant_ms(Timestamp(seconds=seconds, nanos=nanos))
    assert at_ms != ABSENT_MS
    shown = convert.timestamp_of(at_ms)
    assert shown is not None
    assert shown.ToJsonString().endswith("Z")
    assert instant_ms(shown) == at_ms


def test_timestamp_of_nothing_is_absent() -> None:
    assert convert.timestamp_of(None) is None


DURATIONS = [
    (0, 0, 0),
    (60, 0, 60_000),
    (1, 999_999_999, 1_999),
    (0, 999_999, 0),
    (-1, -500_000_000, -1_500),
    (0, -1_000_000, -1),
    (315_576_000_000, 0, 315_576_000_000_000),
]


@pytest.mark.parametrize(("seconds", "nanos", "milliseconds"), DURATIONS)
def test_duration_is_in_milliseconds(seconds: int, nanos: int, milliseconds: int) -> None:
    assert convert.duration_ms(Duration(seconds=seconds, nanos=nanos), "validity") == milliseconds


INVALID_DURATIONS = [(315_576_000_001, 0), (-315_576_000_001, 0), (1, -1), (-1, 1), (0, 1_000_000_000), (2**63 - 1, 0)]


@pytest.mark.parametrize(("seconds", "nanos"), INVALID_DURATIONS)
def test_duration_that_is_not_valid_names_the_field(seconds: int, nanos: int) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        convert.duration_ms(Duration(seconds=seconds, nanos=nanos), "validity")
    assert [one.field for one in caught.value.violations] == ["validity"]


def test_headers_are_one_text_whatever_their_order() -> None:
    first, second = {"b": "2", "a": "é\n"}, {"a": "é\n", "b": "2"}
    assert headers_json(first) == headers_json(second) == '{"a":"é\\n","b":"2"}'
    assert json.loads(headers_json(first)) == first


def test_no_headers_are_no_text() -> None:
    assert headers_json({}) == ""


STAMP = (1_700_000_000_000, 1, 1)
PAYMENT = PaymentRow(7, "shop", "1001", 1_999, "CNY", "Tea", "", "digest", 1_700_000_600_000, *STAMP)
REFUND = RefundRow(7, "X02ab", 2, "T-2", 1_999, "CNY", NotifyOutcome.DUPLICATE, *STAMP)


def attempt(method: PayMethod, state: AttemptState = AttemptState.OPEN) -> ChannelOrderRow:
    return ChannelOrderRow(
        7, 1, "simbank", "bank_a", method, 5, state, 5, "the credential", "C", "M", None, None, 0, "", *STAMP
    )


def try_row(seq: int, state: RefundState, last_error: str = "") -> RefundTryRow:
    return RefundTryRow(7, "X02ab", seq, f"7X02ab{seq:02d}", 0, state, 5, 1, 5, 0, "", last_error, *STAMP)


def result_row(seq: int, result: RefundState, at_ms: int) -> RefundResultRow:
    return RefundResultRow(7, "X02ab", seq, result, "CODE", "words", at_ms, 1, 2)


def payment_file(
    tries: list[RefundTryRow] | None = None,
    results: list[RefundResultRow] | None = None,
    quarantine: list[QuarantineRow] | None = None,
) -> PaymentFile:
    words = quarantine or []
    return PaymentFile(PaymentRecord(PAYMENT), [REFUND], tries or [], results or [], words, len(words))


CREDENTIALS = [
    (PayMethod.REDIRECT, "the credential", ""),
    (PayMethod.QR, "", "the credential"),
    (PayMethod.CHARGE, "", ""),
]


@pytest.mark.parametrize(("method", "pay_url", "qr_text"), CREDENTIALS)
def test_credential_of_attempt_stands_in_the_field_of_its_method(method: PayMethod, pay_url: str, qr_text: str) -> None:
    message = convert.attempt_message(attempt(method))
    assert (message.pay_url, message.qr_text) == (pay_url, qr_text)
    assert message.channel_order_no == "701"


PENDING, UNKNOWN, REFUSED, REFUNDED = (
    RefundState.PENDING,
    RefundState.UNKNOWN,
    RefundState.REFUSED,
    RefundState.REFUNDED,
)

# Tries and results, then: state, tries, the channel's number, last error, when finished.
REFUNDS = [
    ([], [], PENDING, 0, "", "", None),
    ([try_row(1, PENDING)], [], PENDING, 1, "7X02ab01", "", None),
    ([try_row(1, UNKNOWN, "timed out")], [], UNKNOWN, 1, "7X02ab01", "timed out", None),
    ([try_row(1, REFUNDED)], [result_row(1, REFUNDED, 9_000)], REFUNDED, 1, "7X02ab01", "", 9_000),
    # Refused for good, and no other number follows (yet).
    ([try_row(1, REFUSED)], [result_row(1, REFUSED, 9_000)], REFUSED, 1, "7X02ab01", "CODE: words", 9_000),
    # The next number waits: not finished, and the refusal is still the last word.
    (
        [try_row(1, REFUSED), try_row(2, PENDING)],
        [result_row(1, REFUSED, 9_000)],
        PENDING,
        2,
        "7X02ab02",
        "CODE: words",
        None,
    ),
    (
        [try_row(1, REFUSED), try_row(2, UNKNOWN, "timed out")],
        [result_row(1, REFUSED, 9_000)],
        UNKNOWN,
        2,
        "7X02ab02",
        "timed out",
        None,
    ),
    (
        [try_row(1, REFUSED, "CODE words"), try_row(2, REFUNDED)],
        [result_row(1, REFUSED, 9_000), result_row(2, REFUNDED, 9_500)],
        REFUNDED,
        2,
        "7X02ab02",
        "",
        9_500,
    ),
]


@pytest.mark.parametrize(("tries", "results", "state", "count", "number", "last_error", "finished_ms"), REFUNDS)
def test_refund_shows_its_last_try_and_final_word(
    tries: list[RefundTryRow],
    results: list[RefundResultRow],
    state: RefundState,
    count: int,
    number: str,
    last_error: str,
    finished_ms: int | None,
) -> None:
    (message,) = convert.payment_message(payment_file(tries, results)).refunds
    assert (message.state, message.tries, message.channel_refund_no) == (state.value, count, number)
    assert message.last_error == last_error
    assert message.HasField("finished_at") is (finished_ms is not None)
    assert finished_ms is None or message.finished_at.ToMilliseconds() == finished_ms


def test_payment_that_is_open_has_no_outcome() -> None:
    message = convert.payment_message(payment_file())
    assert message.state == v1.PAYMENT_STATE_OPEN
    assert not message.HasField("outcome")
    assert (message.payment_id, message.amount_minor, message.currency) == (7, 1_999, "CNY")


def test_payment_that_is_paid_shows_outcome_attempts_excess_and_quarantine() -> None:
    word = QuarantineRow(
        "id", NotifyOutcome.MISMATCH, 7, 1, 1, "simbank", "bank_a", "701", "T-9", 5, "CNY", None, 1, b"raw", "{}",
        1_000, 2_000, 3, 1, "[]", *STAMP,
    )  # fmt: skip
    file = payment_file(quarantine=[word])
    file.record.attempts[2] = attempt(PayMethod.QR)._replace(attempt=2)
    file.record.attempts[1] = attempt(PayMethod.QR)
    file.record.outcome = OutcomeRow(7, PaymentState.PAID, 1, "T-1", 1_999, "CNY", None, 4_000, 1, 1, 0, *STAMP)
    file.record.excess.append(ExcessRow(7, 2, "T-2", NotifyOutcome.DUPLICATE, 1_999, "CNY", 3_000, 4_000, 1, *STAMP))
    message = convert.payment_message(file)
    assert message.state == message.outcome.state == v1.PAYMENT_STATE_PAID
    assert message.outcome.paid_at_untrusted
    assert not message.outcome.HasField("paid_at")
    assert [one.attempt for one in message.attempts] == [1, 2]
    assert [(one.channel_trade_no, one.reason) for one in message.excess] == [("T-2", v1.NOTIFY_OUTCOME_DUPLICATE)]
    assert [(one.arrivals, one.open, one.reason) for one in message.quarantine] == [
        (3, True, v1.NOTIFY_OUTCOME_MISMATCH)
    ]
    assert message.quarantine[0].last_seen_at.ToMilliseconds() == 2_000
    assert message.quarantine_total == 1
