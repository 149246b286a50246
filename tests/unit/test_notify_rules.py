"""What makes a notification INVALID, NUL in headers as JSON above all; and the short way through for the ordinary."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paycore._wire import Decoder
from paycore.domain.decision import ABSENT_MS
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.notification import Notification
from paycore.domain.verdicts import ChannelResult
from paycore.usecases.notify import MAX_HEADERS_BYTES, MAX_RAW_BYTES, violations

HEADERS = [
    ("a NUL", "\0", True),
    ("a NUL after a backslash", "\\\0", True),
    ("a backslash and u0000", "\\u0000", False),
    ("two backslashes and u0000", "\\\\u0000", False),
    ("nothing of the kind", "signature=abc", False),
]


@pytest.mark.parametrize(("value", "refused"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_headers_with_nul_are_refused_and_only_those(value: str, refused: bool) -> None:
    word = Notification(
        "simbank",
        "bank_a",
        "101",
        ChannelResult.SUCCESS,
        1,
        "CNY",
        "T1",
        ABSENT_MS,
        0,
        headers=json.dumps({"h": value}),
    )
    assert [violation.field for violation in violations(word)] == (["headers"] if refused else [])


DECODER = Decoder({("simbank", "bank_a"): 1}, CURRENCY_CODES)
TEXTS = st.text(max_size=70) | st.sampled_from(["", "simbank", "\0", "x" * 16, "x" * 17, "x" * 32, "x" * 33, "x" * 64])
WORDS = st.builds(
    Notification,
    channel=TEXTS,
    account=TEXTS,
    channel_order_no=TEXTS,
    result=st.sampled_from(ChannelResult),
    amount_minor=st.integers(-2, 2),
    currency=TEXTS,
    channel_trade_no=TEXTS,
    paid_at_ms=st.just(ABSENT_MS),
    received_at_ms=st.just(0),
    raw=st.sampled_from([b"", b"r" * MAX_RAW_BYTES, b"r" * (MAX_RAW_BYTES + 1)]),
    headers=st.sampled_from(["", '{"a":"b"}', '{"a":"\\u0000"}', "é" * (MAX_HEADERS_BYTES // 2 + 1)]),
)


@given(WORDS)
def test_word_that_is_plain_breaks_no_rule(word: Notification) -> None:
    if not DECODER.of_values([word]).suspects():
        assert violations(word) == []


def test_ordinary_success_is_plain() -> None:
    """Without this, the test above would pass on words of which none is plain."""
    word = Notification(
        "simbank", "bank_a", "25062980039633305601", ChannelResult.SUCCESS, 1, "CNY", "T" * 32, ABSENT_MS, 0, raw=b"{}"
    )
    assert DECODER.of_values([word]).suspects() == []
    for change in (
        {"amount_minor": 0},
        {"channel_trade_no": ""},
        {"account": "a\0"},
        {"result": ChannelResult.FAILURE},
    ):
        assert DECODER.of_values([word._replace(**change)]).suspects() == [0]
