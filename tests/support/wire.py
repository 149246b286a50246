"""The protobuf library as the oracle of the compiled wire: what each of the two makes of the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError
from google.protobuf.timestamp_pb2 import Timestamp

from paycore._wire import Batch, Decoder, MalformedError
from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import parse_channel_order_no
from paycore.domain.notification import Notification
from paycore.domain.verdicts import CaptureSource, ChannelResult, VerdictFlag
from paycore.usecases.words import headers_json
from paycore.v1 import payment_pb2, payment_service_pb2

MAX_INT64 = (1 << 63) - 1
RECEIVED_AT_MS = 1_800_000_000_000
LIMIT = 50
ACCOUNTS = {("simbank", "bank_a"): 1, ("simbank", "bank_b"): 2, ("", ""): 3, ("银行", "甲"): 255}
CURRENCIES = {"CNY": 156, "": 7, "USD": 1}
DECODER = Decoder(ACCOUNTS, CURRENCIES)

# The range of a valid Timestamp: 0001-01-01T00:00:00Z to 9999-12-31T23:59:59.999Z.
MIN_TIMESTAMP_MS = -62_135_596_800_000
MAX_TIMESTAMP_MS = 253_402_300_799_999

PLAIN = Notification(
    channel="simbank",
    account="bank_a",
    channel_order_no="12345601",
    result=ChannelResult.SUCCESS,
    amount_minor=1,
    currency="CNY",
    channel_trade_no="T1",
    paid_at_ms=ABSENT_MS,
    received_at_ms=RECEIVED_AT_MS,
)
"""A notification that breaks no rule."""

Fields = tuple[str, str, str, int, int, str, str, int, int, int, str, str, bytes, dict[str, str] | str]
Codes = tuple[int, int, int, int]
Read = tuple[Fields, Codes]
Answer = tuple[int, int, int, Sequence[tuple[str, str]]]
"""(packed verdict, payment_id, attempt, violations)."""


def instant_ms(timestamp: Timestamp) -> int:
    """Read a Timestamp as milliseconds, rounded down. One that is not valid is moved to the nearest valid one.

    Whether it is believed is decided later; to be stored and shown again it has to be a time.
    """
    nanos = min(max(timestamp.nanos, 0), 999_999_999)
    at_ms = timestamp.seconds * 1_000 + nanos // 1_000_000
    at_ms = min(max(at_ms, MIN_TIMESTAMP_MS), MAX_TIMESTAMP_MS)
    # The millisecond that stands for "not given" lies in 1969, where no pay time is believed anyway.
    return at_ms - 1 if at_ms == ABSENT_MS else at_ms


def from_message(message: payment_service_pb2.NotifyRequest) -> Read:
    """Say what a request's record and its notification should be."""
    order = parse_channel_order_no(message.channel_order_no)
    fields = (
        message.channel,
        message.account,
        message.channel_order_no,
        int(message.result),
        message.amount_minor,
        message.currency,
        message.channel_trade_no,
        instant_ms(message.paid_at) if message.HasField("paid_at") else ABSENT_MS,
        RECEIVED_AT_MS,
        int(CaptureSource.NOTIFICATION),
        "",
        "",
        message.raw,
        dict(message.headers),
    )
    account = ACCOUNTS.get((message.channel, message.account), 0)
    return fields, (*(order or (0, 0)), account, CURRENCIES.get(message.currency, 0))


def library_one(data: bytes) -> Read | None:
    """Read a NotifyRequest with the library; None where it refuses the bytes."""
    message = payment_service_pb2.NotifyRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    return from_message(message)


def library_batch(data: bytes) -> list[Read] | None:
    """Read a NotifyBatchRequest with the library; None where it refuses the bytes."""
    message = payment_service_pb2.NotifyBatchRequest()
    try:
        message.ParseFromString(data)
    except DecodeError:
        return None
    return [from_message(one) for one in message.notifications]


def record(batch: Batch, position: int) -> Read:
    """Read one record back."""
    return batch.notification(position), batch._record(position)


def compiled_one(data: bytes) -> Read | None:
    """Read a NotifyRequest with the compiled decoder; None where it refuses the bytes."""
    try:
        batch = DECODER.notify(data, RECEIVED_AT_MS)
    except MalformedError:
        return None
    assert len(batch) == batch.total == 1
    return record(batch, 0)


def compiled_batch(data: bytes) -> list[Read] | None:
    """Read a NotifyBatchRequest with the compiled decoder; None where it refuses the bytes."""
    try:
        batch = DECODER.notify_batch(data, RECEIVED_AT_MS, LIMIT)
    except MalformedError:
        return None
    assert len(batch) == min(batch.total, LIMIT)
    return [record(batch, position) for position in range(len(batch))]


def agree(data: bytes) -> bool:
    """See that both read the bytes as one request, and as a batch, alike. Return whether they are a request."""
    expected = library_one(data)
    assert compiled_one(data) == expected, data.hex()
    batch = library_batch(data)
    assert compiled_batch(data) == (batch if batch is None else batch[:LIMIT]), data.hex()
    return expected is not None


def as_notification(fields: Fields) -> Notification:
    """Make the use cases' notification of a record's fields. A result that is none stays a number."""
    result, headers = fields[3], fields[-1]
    word = Notification._make(fields)._replace(
        source=CaptureSource(fields[9]), headers=headers if isinstance(headers, str) else headers_json(headers)
    )
    return word._replace(result=ChannelResult(result)) if result in set(ChannelResult) else word


def answer_message(answer: Answer) -> payment_service_pb2.NotifyResponse:
    """Say an answer in the library's message."""
    verdict, payment_id, attempt, violations = answer
    return payment_service_pb2.NotifyResponse(
        outcome=payment_pb2.NotifyOutcome.ValueType(verdict & 0xFF),
        replayed=bool(verdict & VerdictFlag.REPLAYED),
        paid_at_untrusted=bool(verdict & VerdictFlag.PAID_AT_UNTRUSTED),
        payment_id=payment_id,
        attempt=attempt,
        violations=[payment_service_pb2.FieldViolation(field=field, rule=rule) for field, rule in violations],
    )


def sized(tag: int, content: bytes) -> bytes:
    """A field that is given by its length, at most 16,383 bytes."""
    length = len(content)
    head = bytes([length]) if length < 0x80 else bytes([length & 0x7F | 0x80, length >> 7])
    return bytes([tag]) + head + content


def encoded(word: Notification, headers: dict[str, str] | None = None) -> bytes:
    """The request that says a notification."""
    return payment_service_pb2.NotifyRequest(
        channel=word.channel,
        account=word.account,
        channel_order_no=word.channel_order_no,
        result=int(word.result),  # type: ignore[arg-type]  # numbers that are no result are sent too
        amount_minor=word.amount_minor,
        currency=word.currency,
        channel_trade_no=word.channel_trade_no,
        raw=word.raw,
        headers=headers,
    ).SerializeToString()
