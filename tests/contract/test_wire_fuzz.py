"""The compiled wire against the protobuf library, over bytes that nobody thought of.

Both refuse, or both accept and read the same; answers are the library's bytes. ``PAYCORE_FUZZ_PERCENT=10000`` makes
the runs a hundred times as long.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paycore._wire import Batch
from paycore.domain.notification import Notification
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome
from paycore.usecases.notify import violations
from paycore.v1 import payment_service_pb2
from tests.support.wire import (
    ACCOUNTS,
    DECODER,
    MAX_INT64,
    RECEIVED_AT_MS,
    Answer,
    agree,
    answer_message,
    as_notification,
    compiled_batch,
    library_batch,
    sized,
)

FUZZ_PERCENT = int(os.environ.get("PAYCORE_FUZZ_PERCENT", "100"))
FUZZ = settings(max_examples=3 * FUZZ_PERCENT, deadline=None, suppress_health_check=list(HealthCheck))
RANDOM_CASES = 800 * FUZZ_PERCENT
REFUSALS = {NotifyOutcome.INVALID, NotifyOutcome.THROTTLED}

INT64 = st.integers(-MAX_INT64 - 1, MAX_INT64) | st.sampled_from([0, 1, -1, MAX_INT64, -MAX_INT64 - 1])
INT32 = st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(-2, 3)
NAMES = sorted({name for pair in ACCOUNTS for name in pair})
TEXTS = st.text(max_size=70) | st.sampled_from([*NAMES, "CNY", "12345601", "\0", "t" * 64])
SECONDS = INT64 | st.sampled_from([253_402_300_799, 253_402_300_800, -62_135_596_800, -62_135_596_801])


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """A NotifyRequest as the library writes it."""
    message = payment_service_pb2.NotifyRequest(
        channel=draw(TEXTS),
        account=draw(TEXTS),
        channel_order_no=draw(TEXTS),
        result=draw(INT32),  # type: ignore[arg-type]  # numbers that are no result as well
        amount_minor=draw(INT64),
        currency=draw(TEXTS),
        channel_trade_no=draw(TEXTS),
        raw=draw(st.binary(max_size=40)),
        headers=draw(st.dictionaries(TEXTS, TEXTS, max_size=4)),
    )
    if draw(st.booleans()):
        message.paid_at.seconds, message.paid_at.nanos = draw(SECONDS), draw(INT32)
    return message.SerializeToString()


@st.composite
def varints(draw: st.DrawFn) -> bytes:
    """A varint, perhaps padded, perhaps too long."""
    value = draw(st.integers(0, 300) | st.integers(0, (1 << 70) - 1))
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    groups += [0] * draw(st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4, 5, 8, 9]))
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def fields(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """One field of any number and any wire type, with its value or with something near it."""
    tags = st.builds(lambda number, wire: number << 3 | wire, st.integers(0, 12), st.integers(0, 7))
    contents = inner | st.binary(max_size=20) | TEXTS.map(str.encode)
    values = st.one_of(
        varints(),
        contents.map(lambda content: sized(0, content)[1:]),
        st.binary(min_size=4, max_size=4),
        st.binary(min_size=8, max_size=8),
        st.builds(lambda content, number: content + bytes([number << 3 | 4]), inner, st.integers(0, 12)),
    )
    proper = st.one_of(
        st.builds(sized, st.sampled_from([0x42, 0x52, 0x0A, 0x12]), inner),
        st.builds(lambda tag, value: bytes([tag]) + value, st.sampled_from([0x08, 0x10, 0x20, 0x28, 0x78]), varints()),
        st.builds(lambda n, content: bytes([n << 3 | 3]) + content + bytes([n << 3 | 4]), st.integers(0, 12), inner),
    )
    return proper | st.builds(lambda tag, value: bytes([tag]) + value, tags, values)


PIECES = st.recursive(
    st.just(b"") | varints(), lambda inner: st.lists(fields(inner), max_size=5).map(b"".join), max_leaves=12
)


@st.composite
def changed(draw: st.DrawFn, sources: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few of them replaced, removed, put in or said twice."""
    data = bytearray(draw(sources))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(start + 8, len(data))))
        data[start:end] = draw(st.one_of(st.binary(max_size=4), varints(), st.just(bytes(data[:start][-9:]))))
    return bytes(data)


@st.composite
def spliced(draw: st.DrawFn) -> bytes:
    """The beginning of one message and the end of another."""
    first, second = draw(requests()), draw(requests())
    return first[: draw(st.integers(0, len(first)))] + second[draw(st.integers(0, len(second))) :]


ANY_BYTES = st.one_of(requests(), changed(requests()), PIECES, changed(PIECES), spliced(), st.binary(max_size=60))


@FUZZ
@given(ANY_BYTES)
def test_request_of_any_bytes_is_read_as_the_library_reads_it(data: bytes) -> None:
    agree(data)


@FUZZ
@given(st.lists(requests() | PIECES, max_size=4), st.lists(fields(PIECES), max_size=2), st.data())
def test_batch_of_any_bytes_is_read_as_the_library_reads_it(
    items: list[bytes], others: list[bytes], data: st.DataObject
) -> None:
    parts = data.draw(st.permutations([*(sized(0x0A, item) for item in items), *others]))
    agree(b"".join(parts))
    agree(data.draw(changed(st.just(b"".join(parts)))))


@settings(FUZZ, max_examples=max(FUZZ_PERCENT // 2, 1))
@given(requests() | PIECES)
def test_message_cut_anywhere_is_read_as_the_library_reads_it(data: bytes) -> None:
    batch = sized(0x0A, data) * 2
    for cut in range(len(data)):
        agree(data[:cut])
    for cut in range(len(batch)):
        assert compiled_batch(batch[:cut]) == library_batch(batch[:cut])


@FUZZ
@given(requests() | changed(requests()))
def test_request_that_is_no_suspect_breaks_no_rule(data: bytes) -> None:
    if not agree(data):
        return
    batch = DECODER.notify(data, RECEIVED_AT_MS)
    word = as_notification(batch.notification(0))
    assert batch.suspects() == [0] or violations(word) == []
    # What is learnt in another way makes the same record.
    made = DECODER.of_values([word])
    assert made._record(0) == batch._record(0)
    assert made.notification(0) == word


WORDS = st.builds(
    Notification,
    channel=TEXTS,
    account=TEXTS,
    channel_order_no=TEXTS,
    result=st.sampled_from(ChannelResult),
    amount_minor=INT64,
    currency=TEXTS,
    channel_trade_no=TEXTS,
    paid_at_ms=INT64,
    received_at_ms=INT64,
    source=st.sampled_from(CaptureSource),
    failure_code=TEXTS,
    failure_message=TEXTS,
    raw=st.binary(max_size=20),
    headers=TEXTS,
)


@FUZZ
@given(st.lists(WORDS, max_size=4))
def test_values_come_back_and_only_what_breaks_no_rule_is_plain(words: list[Notification]) -> None:
    batch = DECODER.of_values(words)
    suspects = set(batch.suspects())
    for position, word in enumerate(words):
        assert batch.notification(position) == word
        assert position in suspects or violations(word) == []
        assert position in suspects or word.source is CaptureSource.NOTIFICATION


ANSWERS: st.SearchStrategy[Answer] = st.one_of(
    st.tuples(
        st.integers(1, 0xFFF).filter(lambda verdict: verdict & 0xFF and verdict not in REFUSALS),
        INT64,
        INT32,
        st.just(()),
    ),
    st.tuples(st.sampled_from(sorted(REFUSALS)), st.just(0), st.just(0), st.lists(st.tuples(TEXTS, TEXTS), max_size=3)),
)


def give(batch: Batch, position: int, answer: Answer) -> None:
    """Give one answer."""
    verdict, payment_id, attempt, broken = answer
    if verdict in REFUSALS:
        batch.refuse(position, verdict, broken)
    else:
        batch.answer(position, verdict, payment_id, attempt)


@FUZZ
@given(st.lists(ANSWERS, max_size=5))
def test_answers_are_written_byte_for_byte_as_the_library_writes_them(answers: list[Answer]) -> None:
    batch = DECODER.notify_batch(b"\x0a\x00" * len(answers), RECEIVED_AT_MS, len(answers))
    for position, answer in enumerate(answers):
        give(batch, position, answer)
    messages = list(map(answer_message, answers))
    assert batch.encode() == payment_service_pb2.NotifyBatchResponse(answers=messages).SerializeToString()
    if len(answers) == 1:
        assert batch.encode_one() == messages[0].SerializeToString()
    assert batch.pending() == sum(answer[0] not in REFUSALS for answer in answers)


# ---- Without Hypothesis: far more cases in the same time ------------------------------------------------------

TELLING = bytes.fromhex("00010203040506070809 0a0b0c1012181a202832 3a424a5253 547a7b7c7d7e7f80 ffc0c2e0eda0f0f4")
SAMPLE_TEXTS = ["", "a", "simbank", "bank_a", "é" * 3, "\0", "中文字", "😀1234567", "123456789012345678901", "CNY"]
SAMPLE_NUMBERS = [0, 1, -1, MAX_INT64, -MAX_INT64 - 1, 253_402_300_800, -62_135_596_801, 1_800_000_000]


def sample(chance: random.Random) -> bytes:
    """A NotifyRequest made of telling values."""
    text = [chance.choice(SAMPLE_TEXTS) for _ in range(8)]
    message = payment_service_pb2.NotifyRequest(
        channel=text[0],
        account=text[1],
        channel_order_no=text[2],
        result=chance.choice([0, 1, 2, 3, -1]),  # type: ignore[arg-type]
        amount_minor=chance.choice(SAMPLE_NUMBERS),
        currency=text[3],
        channel_trade_no=text[4] + "t" * chance.randrange(70),
        raw=chance.randbytes(chance.randrange(20)),
        headers=dict([text[5:7], text[6:8]][: chance.randrange(3)]),
    )
    if chance.random() < 0.6:
        message.paid_at.seconds = chance.choice(SAMPLE_NUMBERS)
        message.paid_at.nanos = chance.choice([0, -1, 999_999_999, 1_000_000_000])
    return message.SerializeToString()


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Up to three bytes or runs of bytes changed."""
    changing = bytearray(data)
    for _ in range(chance.randrange(4)):
        start = chance.randrange(len(changing) + 1)
        end = min(len(changing), start + chance.choice([0, 0, 1, 1, 2, 9]))
        few = bytes(chance.choice(TELLING) for _ in range(chance.randrange(4)))
        changing[start:end] = chance.choice([few, chance.randbytes(1), changing[:start][-5:], b""])
    return bytes(changing)


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_read_as_the_library_reads_them(seed: int) -> None:
    chance = random.Random(seed)
    taken = 0
    for _ in range(RANDOM_CASES // 4):
        if chance.random() < 0.4:
            data = bytes(chance.choice(TELLING) for _ in range(chance.randrange(14)))
        else:
            data = mutated(sample(chance), chance)
        if chance.random() < 0.2:
            data = mutated(sized(0x0A, data) + sized(0x0A, sample(chance)), chance)
        taken += agree(data)
    # Neither all nor nothing: the cases lie along the border.
    assert RANDOM_CASES // 40 < taken < RANDOM_CASES // 4 * 9 // 10
    print(f"{RANDOM_CASES // 4} cases, {taken} of them requests")
