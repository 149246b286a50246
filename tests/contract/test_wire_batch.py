"""Records and answers of the compiled wire: what is suspect, what is refused, and answers as the library has them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from paycore import _wire
from paycore._wire import Batch, Decoder, MalformedError
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, VerdictFlag
from paycore.usecases.notify import MAX_RAW_BYTES, violations
from paycore.v1 import payment_service_pb2
from tests.support.wire import (
    ACCOUNTS,
    CURRENCIES,
    DECODER,
    LIMIT,
    MAX_INT64,
    PLAIN,
    RECEIVED_AT_MS,
    Answer,
    answer_message,
    as_notification,
    compiled_one,
    encoded,
    library_one,
    sized,
)

SUSPECTS = [
    ("a plain one", {}, False),
    ("a failure", {"result": ChannelResult.FAILURE}, True),
    ("no result", {"result": 0}, True),
    ("a result that is none", {"result": 7}, True),
    ("amount 0", {"amount_minor": 0}, True),
    ("a negative amount", {"amount_minor": -1}, True),
    ("the largest amount", {"amount_minor": MAX_INT64}, False),
    ("no trade number", {"channel_trade_no": ""}, True),
    ("no other text", {"channel": "", "account": "", "channel_order_no": "", "currency": ""}, False),
    ("texts at their limits", {"channel": "c" * 32, "account": "a" * 64, "channel_order_no": "1" * 64}, False),
    ("more texts at their limits", {"currency": "C" * 16, "channel_trade_no": "t" * 64}, False),
    ("a long channel", {"channel": "c" * 33}, True),
    ("a long account", {"account": "a" * 65}, True),
    ("a long order number", {"channel_order_no": "1" * 65}, True),
    ("a long currency", {"currency": "C" * 17}, True),
    ("a long trade number", {"channel_trade_no": "t" * 65}, True),
    ("NUL in the channel", {"channel": "a\0b"}, True),
    ("NUL in the account", {"account": "\0"}, True),
    ("NUL in the order number", {"channel_order_no": "12345678901234567\0"}, True),
    ("NUL in the currency", {"currency": "CN\0"}, True),
    ("NUL in the trade number", {"channel_trade_no": "\0" + "t" * 20}, True),
    ("raw at its limit", {"raw": b"\0" * MAX_RAW_BYTES}, False),
    ("raw above its limit", {"raw": b"r" * (MAX_RAW_BYTES + 1)}, True),
]


@pytest.mark.parametrize(("changes", "suspect"), [row[1:] for row in SUSPECTS], ids=[row[0] for row in SUSPECTS])
def test_suspects_are_all_that_could_break_a_rule(changes: dict[str, object], suspect: bool) -> None:
    word = PLAIN._replace(**changes)  # type: ignore[arg-type]  # the table's values are of many types
    for batch in (DECODER.notify(encoded(word), RECEIVED_AT_MS), DECODER.of_values([word])):
        assert batch.suspects() == ([0] if suspect else [])
    assert suspect or violations(word) == []


@pytest.mark.parametrize(
    ("headers", "suspect"),
    [
        ({}, False),
        ({"signature": "abc"}, False),
        ({"k" * 8: "\x01" * (8190 // 6 - 9)}, False),
        ({"k" * 8: "\x01" * (8190 // 6 - 8)}, True),
        ({f"{i:04}": "" for i in range(273)}, False),
        ({f"{i:04}": "" for i in range(274)}, True),
        ({"h": "\0"}, True),
        ({"\0": "h"}, True),
        ({"h" * 10: "a" * 10 + "\0"}, True),
    ],
)
def test_headers_are_plain_only_where_their_json_surely_fits(headers: dict[str, str], suspect: bool) -> None:
    batch = DECODER.notify(encoded(PLAIN, headers), RECEIVED_AT_MS)
    assert batch.suspects() == ([0] if suspect else [])
    assert suspect or violations(as_notification(batch.notification(0))) == []


def test_value_that_is_no_notification_of_a_channel_is_suspect() -> None:
    words = [PLAIN._replace(source=source) for source in CaptureSource]
    words += [PLAIN._replace(headers="é" * 2049), PLAIN._replace(headers='"\\u0000"'), PLAIN._replace(account="\ud800")]
    batch = DECODER.of_values(words)
    assert batch.suspects() == [1, 2, 3, 4, 5]
    assert [batch.notification(position) for position in range(6)] == words


def test_nul_that_a_later_value_replaces_leaves_no_suspect() -> None:
    assert DECODER.notify(sized(0x12, b"\0") + encoded(PLAIN), 0).suspects() == []
    assert DECODER.notify(encoded(PLAIN) + sized(0x12, b"\0"), 0).suspects() == [0]


def test_values_make_the_record_that_their_message_makes() -> None:
    rows = [(*name, money) for name in [*ACCOUNTS, ("simbank", "other")] for money in [*CURRENCIES, "EUR"]]
    words = [PLAIN._replace(channel=channel, account=account, currency=money) for channel, account, money in rows]
    made = DECODER.of_values(words)
    assert len(made) == made.total == len(words)
    for position, word in enumerate(words):
        read = DECODER.notify(encoded(word), word.received_at_ms)
        assert made._record(position) == read._record(0)
        assert made.notification(position) == word
        assert as_notification(read.notification(0)) == word


@pytest.mark.parametrize(
    "changes",
    [{"amount_minor": 1 << 63}, {"paid_at_ms": -(1 << 63) - 1}, {"result": 1 << 31}, {"source": 256}, {"source": -1}],
)
def test_values_that_do_not_fit_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(OverflowError):
        DECODER.of_values([PLAIN, PLAIN._replace(**changes)])  # type: ignore[arg-type]


def test_batch_of_nothing_is_empty() -> None:
    for batch in (
        DECODER.notify_batch(b"", 0, LIMIT),
        DECODER.notify_batch(b"\x78\x01", 0, LIMIT),
        DECODER.of_values([]),
    ):
        assert (len(batch), batch.total, batch.pending(), batch.suspects()) == (0, 0, 0, [])
        assert batch.encode() == b""
        with pytest.raises(IndexError):
            batch.notification(0)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 4, 1 << 40])
def test_batch_above_its_limit_is_counted_and_checked_but_not_kept(limit: int) -> None:
    one = encoded(PLAIN)
    batch = DECODER.notify_batch(sized(0x0A, one) * 3, 0, limit)
    assert (len(batch), batch.total) == (min(limit, 3), 3)
    for cut in range(1, len(one)):
        data = sized(0x0A, one) * 2 + sized(0x0A, one[:cut])
        whole = library_one(one[:cut]) is not None
        try:
            assert DECODER.notify_batch(data, 0, limit).total == 3
        except MalformedError:
            assert not whole
        else:
            assert whole


def test_batch_refuses_a_negative_limit() -> None:
    with pytest.raises(ValueError, match="limit must not be negative"):
        DECODER.notify_batch(b"", 0, -1)


def test_decoder_refuses_what_is_not_bytes() -> None:
    for data in (None, "text", bytearray(b""), memoryview(b"")):
        with pytest.raises(TypeError):
            DECODER.notify(data, 0)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            DECODER.notify_batch(data, 0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("byte", [0x00, 0x0A, 0x7B, 0x80, 0xFF])
def test_64_megabytes_of_one_byte_are_judged_as_by_the_library(byte: int) -> None:
    data = bytes([byte]) * (64 << 20)
    assert library_one(data) is None
    assert compiled_one(data) is None
    with pytest.raises(MalformedError):
        DECODER.notify_batch(data, 0, LIMIT)


def test_64_megabytes_in_one_field_are_read() -> None:
    raw = bytes(64 << 20)
    batch = DECODER.notify(encoded(PLAIN._replace(raw=raw)), 0)
    assert batch.suspects() == [0]
    assert batch.notification(0)[12] == raw


def test_millions_of_empty_notifications_are_counted() -> None:
    batch = DECODER.notify_batch(b"\x0a\x00" * (1 << 21), 0, LIMIT)
    assert (len(batch), batch.total) == (LIMIT, 1 << 21)


REPLAYED, UNTRUSTED = int(VerdictFlag.REPLAYED), int(VerdictFlag.PAID_AT_UNTRUSTED)
ALL_FLAGS = sum(VerdictFlag)
ANSWERS: list[Answer] = [
    (NotifyOutcome.ACCEPTED, 0, 0, ()),
    (NotifyOutcome.ACCEPTED | REPLAYED, 1, 1, ()),
    (NotifyOutcome.LATE | UNTRUSTED, 127, 63, ()),
    (NotifyOutcome.UNKNOWN | ALL_FLAGS, 128, 0, ()),
    (NotifyOutcome.RECORDED, MAX_INT64, (1 << 31) - 1, ()),
    (255, -1, -1, ()),
    (128, -MAX_INT64 - 1, -(1 << 31), ()),
    (NotifyOutcome.THROTTLED, 0, 0, ()),
    (NotifyOutcome.INVALID, 0, 0, [("amount_minor", "must be positive for a success")]),
    (NotifyOutcome.INVALID, 0, 0, [("", ""), ("a", ""), ("", "b"), ("é" * 64, "银" * 6_000)]),
]
REFUSALS = {NotifyOutcome.INVALID, NotifyOutcome.THROTTLED}


def give(batch: Batch, position: int, answer: Answer) -> None:
    """Give one answer of the table."""
    verdict, payment_id, attempt, broken = answer
    if verdict in REFUSALS:
        batch.refuse(position, verdict, broken)
    else:
        batch.answer(position, verdict, payment_id, attempt)


@pytest.mark.parametrize("answer", ANSWERS)
def test_answer_is_written_as_the_library_writes_it(answer: Answer) -> None:
    batch = DECODER.notify(encoded(PLAIN), 0)
    give(batch, 0, answer)
    assert batch.verdict(0) == answer[:3]
    assert batch.encode_one() == answer_message(answer).SerializeToString()


def test_answers_of_a_batch_are_written_as_the_library_writes_them() -> None:
    for answers in ([one] * count for one in ANSWERS for count in (1, 2, 3)):
        batch = DECODER.of_values([PLAIN] * len(answers))
        for position, answer in enumerate(answers):
            give(batch, position, answer)
        message = payment_service_pb2.NotifyBatchResponse(answers=map(answer_message, answers))
        assert batch.encode() == message.SerializeToString()


def test_answer_given_last_counts_until_it_is_a_refusal() -> None:
    batch = DECODER.of_values([PLAIN, PLAIN])
    batch.answer(0, NotifyOutcome.LATE, 1, 2)
    batch.answer(0, NotifyOutcome.ACCEPTED, 3, 4)
    assert batch.verdict(0) == (NotifyOutcome.ACCEPTED, 3, 4)
    batch.refuse(0, NotifyOutcome.INVALID, [("a", "b")])
    batch.refuse(0, NotifyOutcome.THROTTLED)
    assert (batch.verdict(0), batch.pending()) == ((NotifyOutcome.THROTTLED, 0, 0), 1)
    with pytest.raises(ValueError, match="notification 0 is refused already"):
        batch.answer(0, NotifyOutcome.ACCEPTED)
    batch.answer(1, NotifyOutcome.ACCEPTED)
    throttled: Answer = (NotifyOutcome.THROTTLED, 0, 0, ())
    accepted: Answer = (NotifyOutcome.ACCEPTED, 0, 0, ())
    message = payment_service_pb2.NotifyBatchResponse(answers=map(answer_message, [throttled, accepted]))
    assert batch.encode() == message.SerializeToString()


@pytest.mark.parametrize("verdict", [0, REPLAYED, int(VerdictFlag.ASK)])
def test_notification_without_an_outcome_is_never_encoded(verdict: int) -> None:
    batch = DECODER.of_values([PLAIN])
    batch.answer(0, verdict, 1, 1)
    for encode in (batch.encode, batch.encode_one):
        with pytest.raises(RuntimeError, match="notification 0 has no answer"):
            encode()


def test_batch_of_two_is_not_one_answer() -> None:
    with pytest.raises(ValueError, match="a batch of one is needed, not of 2"):
        DECODER.of_values([PLAIN, PLAIN]).encode_one()


@pytest.mark.parametrize(
    "outcome", [0, NotifyOutcome.ACCEPTED, NotifyOutcome.UNKNOWN, NotifyOutcome.INVALID | REPLAYED]
)
def test_refusal_with_another_outcome_is_refused(outcome: int) -> None:
    batch = DECODER.of_values([PLAIN])
    with pytest.raises(ValueError, match="only INVALID and THROTTLED"):
        batch.refuse(0, outcome)
    assert (batch.pending(), batch.verdict(0)) == (1, (0, 0, 0))


def test_violation_that_is_no_unicode_is_refused_and_changes_nothing() -> None:
    batch = DECODER.of_values([PLAIN])
    with pytest.raises(UnicodeEncodeError):
        batch.refuse(0, NotifyOutcome.INVALID, [("channel", "\ud800")])
    assert (batch.pending(), batch.verdict(0)) == (1, (0, 0, 0))


@pytest.mark.parametrize("position", [-1, 1, 1 << 40])
def test_position_that_is_not_there_is_refused(position: int) -> None:
    batch = DECODER.of_values([PLAIN])
    with pytest.raises(IndexError):
        batch.notification(position)
    with pytest.raises(IndexError):
        batch.answer(position, NotifyOutcome.ACCEPTED)
    with pytest.raises(IndexError):
        batch.refuse(position, NotifyOutcome.INVALID)
    with pytest.raises(IndexError):
        batch.verdict(position)


@pytest.fixture
def allowance() -> Iterator[None]:
    """Let a test limit the allocations, and end that afterwards."""
    yield
    _wire._fail_allocation_after(-1)


@pytest.mark.usefixtures("allowance")
def test_memory_that_is_not_there_is_said_and_none_is_lost() -> None:
    held = _wire._blocks_held()
    data = sized(0x0A, encoded(PLAIN)) * 3
    for succeed in range(2):
        _wire._fail_allocation_after(succeed)
        with pytest.raises(MemoryError):
            Decoder(ACCOUNTS, CURRENCIES)
    _wire._fail_allocation_after(0)
    with pytest.raises(MemoryError):
        DECODER.notify_batch(data, 0, LIMIT)
    with pytest.raises(MemoryError):
        DECODER.of_values([PLAIN, PLAIN])
    assert DECODER.notify(encoded(PLAIN), 0).suspects() == []
    assert _wire._blocks_held() == held


def test_batch_that_is_let_go_gives_its_memory_back() -> None:
    held = _wire._blocks_held()
    batches = [DECODER.notify_batch(sized(0x0A, encoded(PLAIN)) * 3, 0, LIMIT) for _ in range(5)]
    assert _wire._blocks_held() == held + 5
    del batches
    with pytest.raises(MalformedError):
        DECODER.notify_batch(sized(0x0A, encoded(PLAIN)) + b"\x0a\x01\x00", 0, LIMIT)
    assert _wire._blocks_held() == held


def test_many_threads_read_one_decoder_alike() -> None:
    words = [
        PLAIN._replace(account=account, amount_minor=i) for i in range(400) for account in ("bank_a", "bank_b", "x")
    ]
    data = b"".join(sized(0x0A, encoded(word)) for word in words)
    expected = [(*DECODER.of_values([word])._record(0), word.amount_minor) for word in words]
    wrong: list[int] = []

    def read() -> None:
        for _ in range(20):
            batch = DECODER.notify_batch(data, 0, len(words))
            found = [(*batch._record(i), batch.notification(i)[4]) for i in range(len(batch))]
            wrong.extend([1] if found != expected else [])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
