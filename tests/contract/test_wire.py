"""The compiled wire, case by case, with the protobuf library as the oracle: what is a message, and what it says.

Each row says by hand whether the bytes are taken, so that the library cannot change its mind unnoticed either.
"""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from paycore._wire import Decoder
from paycore.domain.decision import ABSENT_MS
from paycore.v1 import payment_service_pb2
from tests.support.wire import (
    DECODER,
    MAX_INT64,
    MAX_TIMESTAMP_MS,
    MIN_TIMESTAMP_MS,
    agree,
    compiled_one,
    library_one,
    sized,
)

MAX_DEPTH = 100
OPEN, SHUT = b"\x7b", b"\x7c"
"""The tags of group 15's start and end; no message of ours has a field 15."""


def groups(depth: int) -> bytes:
    return OPEN * depth + SHUT * depth


TAKEN = {
    "nothing": b"",
    "fields in any order": bytes.fromhex("280520010a0141"),
    "scalar twice": bytes.fromhex("20012002 28052806"),
    "text twice": bytes.fromhex("0a01410a0142"),
    "text twice, NUL in the first": bytes.fromhex("0a01000a0142"),
    "raw that is no text": bytes.fromhex("4a0180"),
    "unknown varint": bytes.fromhex("7801"),
    "unknown fixed64": bytes.fromhex("79") + b"\xff" * 8,
    "unknown length": bytes.fromhex("7a0180"),
    "unknown fixed32": bytes.fromhex("7dffffffff"),
    "unknown field of the largest number": bytes.fromhex("f8ffffff0f05"),
    "unknown group": OPEN + bytes.fromhex("08010a01ff0d010203041901020304050607080b0c") + SHUT,
    "group that holds field 0": OPEN + bytes.fromhex("000103 04") + SHUT,
    "group whose end is padded": OPEN + bytes.fromhex("fc808000"),
    "groups as deep as allowed": groups(MAX_DEPTH),
    "groups in a timestamp as deep as allowed": sized(0x42, groups(MAX_DEPTH - 1)),
    "groups in a header as deep as allowed": sized(0x52, groups(MAX_DEPTH - 1)),
    "text as varint": bytes.fromhex("0805"),
    "text as group": bytes.fromhex("0b0c"),
    "text as fixed": bytes.fromhex("0d01020304"),
    "amount as length": bytes.fromhex("2a0105"),
    "amount as fixed64": bytes.fromhex("290102030405060708"),
    "result as packed": bytes.fromhex("22020102"),
    "paid_at as group": bytes.fromhex("4344"),
    "headers as varint": bytes.fromhex("5001"),
    "result of 64 bits": bytes.fromhex("208180808010"),
    "result of ten bytes": b"\x20" + b"\xff" * 9 + b"\x01",
    "amount padded to ten bytes": b"\x28" + b"\x85" + b"\x80" * 8 + b"\x00",
    "tenth byte 01": b"\x28" + b"\xff" * 9 + b"\x01",
    "tenth byte 02": b"\x28" + b"\xff" * 9 + b"\x02",
    "tenth byte 7f": b"\x28" + b"\x80" * 9 + b"\x7f",
    "tenth byte 7f of an unknown field": b"\x78" + b"\xff" * 9 + b"\x7f",
    "tag padded to five bytes": bytes.fromhex("a88080800005"),
    "tag of another field above 29 bits": bytes.fromhex("a88080800805"),
    "length padded to five bytes": bytes.fromhex("0a818080800041"),
    "length of an unknown field padded to five bytes": bytes.fromhex("7a818080800041"),
    "paid_at empty": bytes.fromhex("4200"),
    "paid_at split": bytes.fromhex("42020801 42021002"),
    "paid_at split around a field": bytes.fromhex("42020801 2001 42021002 420308e807"),
    "paid_at with unknown fields": bytes.fromhex("4206180508011a00"),
    "paid_at with wrong types": bytes.fromhex("42040a000a00"),
    "nanos of 64 bits": bytes.fromhex("4206108180808010"),
    "nanos negative": b"\x42\x0b\x10" + b"\xff" * 9 + b"\x01",
    "header empty": bytes.fromhex("5200"),
    "header with key only": bytes.fromhex("52030a0141"),
    "header with value only": bytes.fromhex("5203120141"),
    "header with value first": bytes.fromhex("52061201420a0141"),
    "header with key twice": bytes.fromhex("52090a01410a0142120143"),
    "header with value twice": bytes.fromhex("52090a0141120142120143"),
    "header twice": bytes.fromhex("52060a014112014252060a0141120143"),
    "header with an unknown field is none": bytes.fromhex("52080a01411201421801"),
    "header with an unknown field changes none": bytes.fromhex("52060a014112014252080a01411201431801"),
    "header with a wrong type is none": bytes.fromhex("520408051005"),
    "header with a group is none": bytes.fromhex("52050a01417b7c"),
    "text of two, three and four bytes": sized(0x0A, "éß銀😀\U0010ffff\ud7ff\ue000".encode()),
    "text of all lengths": b"".join(sized(0x0A, "é".encode() * n + b"a" * m) for n in range(9) for m in range(9)),
}

REFUSED = {
    "varint of eleven bytes": b"\x28" + b"\x80" * 10 + b"\x00",
    "varint of eleven bytes of an unknown field": b"\x78" + b"\xff" * 10 + b"\x01",
    "varint cut": bytes.fromhex("2880"),
    "tag cut": bytes.fromhex("a8"),
    "tag of six bytes": bytes.fromhex("a8808080800005"),
    "tag above 32 bits": bytes.fromhex("a88080801005"),
    "field 0 as varint": bytes.fromhex("0001"),
    "field 0 as length": bytes.fromhex("0200"),
    "field 0 as group": bytes.fromhex("0304"),
    "field 0 in a timestamp": bytes.fromhex("42020001"),
    "field 0 in a header": bytes.fromhex("52020001"),
    "wire type 6": bytes.fromhex("7e01"),
    "wire type 7": bytes.fromhex("7f01"),
    "wire type 6 of a known field": bytes.fromhex("0e01"),
    "wire type 7 in a group": OPEN + b"\x0f" + SHUT,
    "end of a group that is not open": SHUT,
    "end of a known field's group that is not open": bytes.fromhex("2c"),
    "end of another group": bytes.fromhex("7b74"),
    "end of groups crossed": bytes.fromhex("7b737c74"),
    "end of a group padded above 32 bits": OPEN + bytes.fromhex("fc80808010"),
    "group without end": bytes.fromhex("7b0801"),
    "group that ends outside of its message": bytes.fromhex("42017b7c"),
    "groups too deep": groups(MAX_DEPTH + 1),
    "groups too deep in a timestamp": sized(0x42, groups(MAX_DEPTH)),
    "groups too deep in a header": sized(0x52, groups(MAX_DEPTH)),
    "length beyond the end": bytes.fromhex("0a0541"),
    "length beyond the end of an unknown field": bytes.fromhex("7a0201"),
    "length beyond the end of a group's field": OPEN + b"\x0a\x05\xff" + SHUT,
    "length of six bytes": bytes.fromhex("0a81808080800041"),
    "length of six bytes of an unknown field": bytes.fromhex("7a81808080800041"),
    "length above 31 bits": bytes.fromhex("0a818080800841"),
    "length above 32 bits": bytes.fromhex("0a818080801041"),
    "length negative": b"\x0a" + b"\xff" * 9 + b"\x01",
    "length without end": b"\x0a" + b"\xff" * 20,
    "fixed32 cut": bytes.fromhex("7d010203"),
    "fixed64 cut": bytes.fromhex("7901020304050607"),
    "number beyond the end of its timestamp": bytes.fromhex("4202088001"),
    "text beyond the end of its header": bytes.fromhex("52030a024142"),
    "tag beyond the end of its timestamp": bytes.fromhex("42018800"),
    "text that begins with a later byte": bytes.fromhex("0a0180"),
    "text that is cut": bytes.fromhex("0a02e980"),
    "text that is cut after ASCII": sized(0x0A, b"a" * 20 + b"\xc3"),
    "text cut short and completed in the next": bytes.fromhex("0a01c31201a9"),
    "text with a long form of two bytes": bytes.fromhex("0a02c080"),
    "text with a long form of three bytes": bytes.fromhex("0a03e09fbf"),
    "text with a long form of four bytes": bytes.fromhex("0a04f08fbfbf"),
    "text with a surrogate": bytes.fromhex("0a03eda080"),
    "text above U+10FFFF": bytes.fromhex("0a04f4908080"),
    "text with byte f5": bytes.fromhex("0a04f5808080"),
    "text with byte ff": bytes.fromhex("0a01ff"),
    "text that is bad and then good": bytes.fromhex("0a01800a0141"),
    "account that is bad": bytes.fromhex("120180"),
    "order number that is bad": bytes.fromhex("1a0180"),
    "currency that is bad": bytes.fromhex("320180"),
    "trade number that is bad": bytes.fromhex("3a0180"),
    "header key that is bad": bytes.fromhex("52030a0180"),
    "header value that is bad": bytes.fromhex("5203120180"),
    "header value that is bad and then good": bytes.fromhex("5206120180120141"),
    "header key that is bad beside an unknown field": bytes.fromhex("52050a01801801"),
}


FIELDS: dict[type[Message], str] = {
    Timestamp: "1 seconds int64, 2 nanos int32",
    payment_service_pb2.NotifyRequest: (
        "1 channel string, 2 account string, 3 channel_order_no string, 4 result enum, 5 amount_minor int64, "
        "6 currency string, 7 channel_trade_no string, 8 paid_at message, 9 raw bytes, 10 headers message"
    ),
    payment_service_pb2.NotifyRequest.HeadersEntry: "1 key string, 2 value string",
    payment_service_pb2.NotifyBatchRequest: "1 notifications message",
    payment_service_pb2.NotifyResponse: (
        "1 outcome enum, 2 replayed bool, 3 paid_at_untrusted bool, 4 payment_id int64, 5 attempt int32, "
        "6 violations message"
    ),
    payment_service_pb2.FieldViolation: "1 field string, 2 rule string",
    payment_service_pb2.NotifyBatchResponse: "1 answers message",
}


@pytest.mark.parametrize("message", FIELDS, ids=lambda message: message.DESCRIPTOR.name)
def test_message_has_the_fields_that_the_compiled_wire_was_written_for(message: type[Message]) -> None:
    names = {int(number): name.removeprefix("TYPE_").lower() for name, number in FieldDescriptorProto.Type.items()}
    fields = [f"{field.number} {field.name} {names[field.type]}" for field in message.DESCRIPTOR.fields]
    assert ", ".join(fields) == FIELDS[message]


@pytest.mark.parametrize("data", TAKEN.values(), ids=TAKEN)
def test_message_that_is_well_formed_is_read_as_the_library_reads_it(data: bytes) -> None:
    assert library_one(data) is not None
    assert agree(data)
    assert agree(data + bytes.fromhex("3a0154"))
    agree(sized(0x0A, data) + b"\x78\x01" + sized(0x0A, data) if len(data) < 1 << 13 else b"")


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_message_that_is_malformed_is_refused_as_the_library_refuses_it(data: bytes) -> None:
    assert library_one(data) is None
    assert not agree(data)
    assert not agree(bytes.fromhex("0a0141") + data)
    agree(sized(0x0A, data))
    agree(sized(0x0A, b"") + data)


@pytest.mark.parametrize("depth", range(MAX_DEPTH - 3, MAX_DEPTH + 3))
def test_groups_at_every_level_are_read_to_the_depth_of_the_library(depth: int) -> None:
    for tag in (0x42, 0x52):
        agree(sized(tag, groups(depth)))
        agree(sized(0x0A, sized(tag, groups(depth))))
    agree(groups(depth) + groups(depth))
    agree(sized(0x0A, groups(depth)))


def test_text_with_any_one_byte_is_judged_as_by_the_library() -> None:
    for length in range(1, 20):
        for at in range(length):
            for byte in (0x00, 0x01, 0x7F, 0x80, 0xC3, 0xFF):
                text = b"a" * at + bytes([byte]) + b"a" * (length - at - 1)
                assert agree(sized(0x12, text)) == (byte < 0x80)


def test_text_of_any_two_bytes_is_judged_as_by_the_library() -> None:
    for first in range(0x80, 0x100):
        for second in range(0x100):
            for rest in (b"", b"\x80", b"\x80\x80"):
                data = sized(0x0A, bytes([first, second]) + rest)
                assert (compiled_one(data) is None) == (library_one(data) is None), data.hex()


@pytest.mark.parametrize("seconds", [0, -1, 1, 253_402_300_799, 253_402_300_800, -62_135_596_800, -62_135_596_801])
@pytest.mark.parametrize("nanos", [0, -1, 1, 998_999_999, 999_000_000, 999_999_999, 1_000_000_000, -(1 << 31)])
def test_paid_at_at_the_edges_is_what_the_library_and_convert_make_of_it(seconds: int, nanos: int) -> None:
    message = payment_service_pb2.NotifyRequest()
    message.paid_at.seconds, message.paid_at.nanos = seconds, nanos
    assert agree(message.SerializeToString())


@pytest.mark.parametrize(
    ("seconds", "nanos", "paid_at_ms"),
    [
        (MAX_INT64, 0, MAX_TIMESTAMP_MS),
        (-MAX_INT64 - 1, 0, MIN_TIMESTAMP_MS),
        (-1, 999_000_000, ABSENT_MS - 1),
        (-1, 998_000_000, -2),
        (1_800_000_000, 123_999_999, 1_800_000_000_123),
    ],
)
def test_paid_at_is_moved_to_the_nearest_valid_instant(seconds: int, nanos: int, paid_at_ms: int) -> None:
    message = payment_service_pb2.NotifyRequest()
    message.paid_at.seconds, message.paid_at.nanos = seconds, nanos
    assert DECODER.notify(message.SerializeToString(), 0).notification(0)[7] == paid_at_ms
    assert agree(message.SerializeToString())


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("101", (1, 1)),
        ("1001", (10, 1)),
        (f"{MAX_INT64}63", (MAX_INT64, 63)),
        (f"{MAX_INT64 + 1}01", (0, 0)),
        ("999999999999999999901", (0, 0)),
        ("1234567890123456763", (12345678901234567, 63)),
        ("1234567890123456764", (0, 0)),
        ("100", (0, 0)),
        ("01", (0, 0)),
        ("001", (0, 0)),
        ("0101", (0, 0)),
        ("", (0, 0)),
        ("1", (0, 0)),
        ("+101", (0, 0)),
        ("101 ", (0, 0)),
        ("12345678/01", (0, 0)),
        ("12345678:01", (0, 0)),
        ("1١01", (0, 0)),
        ("1234567890123456789012", (0, 0)),
    ],
)
def test_order_number_is_ours_only_in_its_one_form(text: str, order: tuple[int, int]) -> None:
    data = payment_service_pb2.NotifyRequest(channel_order_no=text).SerializeToString()
    assert DECODER.notify(data, 0)._record(0)[:2] == order
    assert agree(data)


def test_every_order_number_with_one_wrong_digit_is_no_order_number() -> None:
    number = "123456789012345678901"
    for length in range(3, 22):
        for at in range(length):
            for wrong in "/:":
                text = f"{number[:length][:at]}{wrong}{number[:length][at + 1 :]}"
                data = payment_service_pb2.NotifyRequest(channel_order_no=text).SerializeToString()
                assert DECODER.notify(data, 0)._record(0)[:2] == (0, 0), text


def test_names_are_found_whatever_was_met_before() -> None:
    many = {(f"channel_{i % 7}", f"account_{i:03}"): i for i in range(1, 256)} | {("", ""): 9}
    money = {f"C{i:02}": i for i in range(1, 256)}
    decoder = Decoder(many, money)
    asked = [*many, ("channel_0", "account_001"), ("channel_0account_", "007"), ("", "x"), *reversed(many), ("", "")]
    coins = ["C01", "C255", "", "C2", *money]
    batch = payment_service_pb2.NotifyBatchRequest()
    for position, (channel, account) in enumerate(asked):
        batch.notifications.add(channel=channel, account=account, currency=coins[position % len(coins)])
    found = decoder.notify_batch(batch.SerializeToString(), 0, len(asked))
    for position, name in enumerate(asked):
        currency = money.get(coins[position % len(coins)], 0)
        assert found._record(position)[2:] == (many.get(name, 0), currency)


@pytest.mark.parametrize("code", [0, 256, -1])
def test_decoder_refuses_a_code_outside_its_range(code: int) -> None:
    with pytest.raises(ValueError, match="code must be 1 to 255"):
        Decoder({("a", "b"): code}, {})
    with pytest.raises(ValueError, match="code must be 1 to 255"):
        Decoder({}, {"CNY": code})
