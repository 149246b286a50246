"""Words of channels as serialised messages, made before anything is timed.

All words of one kind have one size and differ in three places only, so each is a template that is filled in; the first
of each is compared with what protobuf makes of the same word.
"""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from google.protobuf.timestamp_pb2 import Timestamp

from paycore.bench.payments import CHANNEL, CURRENCY, Lot, account, amount_minor, trade_no
from paycore.domain.ids import format_channel_order_no
from paycore.v1 import payment_pb2, payment_service_pb2

BLOCK = 1_000
"""Words in one block of the stream that is not clean, in which each kind has its share."""

DUPLICATES, REPLAYS, LATE, UNKNOWN = 10, 10, 5, 1
"""Of each block: 1% second payments, 1% words told again, 0.5% late, 0.1% about orders that nobody made."""

PAYMENTS_A_BLOCK = BLOCK - DUPLICATES - REPLAYS - UNKNOWN
_FIRST = PAYMENTS_A_BLOCK - LATE

_FIELD_NOTIFICATIONS = b"\x0a"


class Said(NamedTuple):
    """One word: about which attempt of which payment, and what the channel says."""

    payment_id: int
    attempt: int
    succeeded: bool = True


class Writer:
    """Serialises words. paid_at_seconds: of all of them. evidence: with the bank's body and headers."""

    def __init__(self, paid_at_seconds: int, *, evidence: bool) -> None:
        self._paid_at_seconds = paid_at_seconds
        self._evidence = evidence
        self._templates: dict[tuple[int, bool], bytes] = {}

    def word(self, said: Said) -> bytes:
        """One NotifyRequest."""
        if self._evidence:
            return self._request(said).SerializeToString()
        template = self._templates.get(said[1:])
        if template is None:
            template = self._templates[said[1:]] = self._make_template(said)
        return self._fill(template, said)

    def batch(self, said: Iterable[Said]) -> bytes:
        """One NotifyBatchRequest."""
        words = map(self.word, said)
        return b"".join(_FIELD_NOTIFICATIONS + _varint(len(word)) + word for word in words)

    def _fill(self, template: bytes, said: Said) -> bytes:
        payment_id, attempt, succeeded = said
        amount = _varint(amount_minor(payment_id))
        order_no = b"%d%02d" % (payment_id, attempt)
        return template % ((order_no, amount, b"42%02d%d" % (attempt, payment_id)) if succeeded else (order_no, amount))

    def _make_template(self, said: Said) -> bytes:
        word = self._request(said).SerializeToString()
        order_no = format_channel_order_no(said.payment_id, said.attempt).encode()
        places = [order_no, b"\x28" + _varint(amount_minor(said.payment_id))]
        places += [trade_no(said.payment_id, said.attempt).encode()] if said.succeeded else []
        template = word.replace(b"%", b"%%")
        for place in places:
            assert template.count(place) == 1, "each place is found, and nothing like it"
            template = template.replace(place, (b"\x28" if place[:1] == b"\x28" else b"") + b"%b")
        assert self._fill(template, said) == word, "what is filled in is what protobuf makes"
        return template

    def _request(self, said: Said) -> payment_service_pb2.NotifyRequest:
        payment_id, attempt, succeeded = said
        request = payment_service_pb2.NotifyRequest(
            channel=CHANNEL,
            account=account(attempt),
            channel_order_no=format_channel_order_no(payment_id, attempt),
            result=payment_pb2.CHANNEL_RESULT_SUCCESS if succeeded else payment_pb2.CHANNEL_RESULT_FAILURE,
            amount_minor=amount_minor(payment_id),
            currency=CURRENCY,
            channel_trade_no=trade_no(payment_id, attempt) if succeeded else "",
            paid_at=Timestamp(seconds=self._paid_at_seconds),
        )
        if self._evidence:
            request.raw = _bank_body(request, payment_id)
            request.headers.update(_bank_headers(payment_id, self._paid_at_seconds))
        return request


def first_words(lot: Lot) -> Iterator[Said]:
    """The success of each payment's open attempt."""
    attempt = lot.open_attempt
    return (Said(payment_id, attempt) for payment_id in lot.ids())


def failures(lot: Lot) -> Iterator[Said]:
    """The failure, told once more, of the attempt that failed on each: a replay, which writes nothing."""
    return (Said(payment_id, 1, succeeded=False) for payment_id in lot.ids())


def mixed_words(lot: Lot, unknown: Lot) -> Iterator[Said]:
    """Blocks of what really comes, over a lot with a whole number of ``PAYMENTS_A_BLOCK``.

    The lot's cycle gives its payments what the words need. Second payments and replays are about payments of the block
    before; in the first block, of the last one, so that there what comes second comes first. ``unknown``: ids of
    payments that nobody made.
    """
    ids, nobodys = list(lot.ids()), iter(unknown.ids())
    before = ids[-PAYMENTS_A_BLOCK:]
    for start in range(0, len(ids), PAYMENTS_A_BLOCK):
        block = ids[start : start + PAYMENTS_A_BLOCK]
        attempt = lot.open_attempt
        words = [Said(payment_id, attempt) for payment_id in block]
        words += [Said(payment_id, attempt + 1) for payment_id in before[:DUPLICATES]]
        words += [Said(payment_id, attempt) for payment_id in before[DUPLICATES : DUPLICATES + REPLAYS]]
        words += [Said(next(nobodys), attempt) for _ in range(UNKNOWN)]
        # Spread evenly, the same way in each block: a step that shares no factor with the block's size.
        yield from (words[place * 387 % BLOCK] for place in range(BLOCK))
        before = block


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _bank_body(request: payment_service_pb2.NotifyRequest, payment_id: int) -> bytes:
    told = {
        "notification_id": f"n-{payment_id}",
        "bank": request.account,
        "result": "SUCCESS" if request.channel_trade_no else "FAILURE",
        "order_no": request.channel_order_no,
        "trade_no": request.channel_trade_no,
        "amount_minor": request.amount_minor,
        "currency": request.currency,
        "paid_at_ms": request.paid_at.seconds * 1_000,
    }
    return json.dumps(told, separators=(",", ":")).encode()


def _bank_headers(payment_id: int, paid_at_seconds: int) -> dict[str, str]:
    return {
        "content-type": "application/json",
        "simbank-timestamp": str(paid_at_seconds),
        "simbank-nonce": f"{payment_id:032x}",
        "simbank-signature": f"{payment_id:064x}",
    }
