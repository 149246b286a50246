"""Words of channels as serialised messages, made before anything is timed.

All words of one kind have one size and differ in three places only, so what stands between these is taken over; the
first of each is compared with what protobuf makes of the same word.
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

_FIELD_NOTIFICATIONS, _FIELD_AMOUNT = b"\x0a", b"\x28"


class Said(NamedTuple):
    """One word: the success of an attempt of a payment."""

    payment_id: int
    attempt: int


class Writer:
    """Serialises words. paid_at_seconds: of all of them. evidence: with the bank's body and headers."""

    def __init__(self, paid_at_seconds: int, *, evidence: bool) -> None:
        self._paid_at_seconds = paid_at_seconds
        self._evidence = evidence
        self._gaps: dict[int, tuple[bytes, ...]] = {}

    def word(self, said: Said) -> bytes:
        """One NotifyRequest."""
        if self._evidence:
            return self._request(said).SerializeToString()
        gaps = self._gaps.get(said.attempt)
        if gaps is None:
            gaps = self._gaps[said.attempt] = self._take_apart(said)
        return self._fill(gaps, said)

    def batch(self, said: Iterable[Said]) -> bytes:
        """One NotifyBatchRequest."""
        words = map(self.word, said)
        return b"".join(_FIELD_NOTIFICATIONS + _varint(len(word)) + word for word in words)

    def _fill(self, gaps: tuple[bytes, ...], said: Said) -> bytes:
        payment_id, attempt = said
        amount = _varint(amount_minor(payment_id))
        own = (payment_id, attempt, gaps[1], amount, gaps[2], attempt, payment_id, gaps[3])
        return b"%b%d%02d%b%b%b42%02d%d%b" % (gaps[0], *own)

    def _take_apart(self, said: Said) -> tuple[bytes, ...]:
        """What stands between order number, amount and trade number in every word of this kind."""
        word = rest = self._request(said).SerializeToString()
        places = [format_channel_order_no(said.payment_id, said.attempt).encode()]
        places += [_FIELD_AMOUNT + _varint(amount_minor(said.payment_id))]
        places += [trade_no(said.payment_id, said.attempt).encode()]
        gaps = []
        for place in places:
            gap, found, rest = rest.partition(place)
            assert found, "the fields are in the order of their numbers"
            gaps.append(gap + _FIELD_AMOUNT if place[:1] == _FIELD_AMOUNT else gap)
        gaps.append(rest)
        assert self._fill(tuple(gaps), said) == word, "what is filled in is what protobuf makes"
        return tuple(gaps)

    def _request(self, said: Said) -> payment_service_pb2.NotifyRequest:
        payment_id, attempt = said
        request = payment_service_pb2.NotifyRequest(
            channel=CHANNEL,
            account=account(attempt),
            channel_order_no=format_channel_order_no(payment_id, attempt),
            result=payment_pb2.CHANNEL_RESULT_SUCCESS,
            amount_minor=amount_minor(payment_id),
            currency=CURRENCY,
            channel_trade_no=trade_no(payment_id, attempt),
            paid_at=Timestamp(seconds=self._paid_at_seconds),
        )
        if self._evidence:
            request.raw = _bank_body(request, payment_id)
            request.headers.update(_bank_headers(payment_id, self._paid_at_seconds))
        return request


def first_words(lot: Lot) -> Iterator[Said]:
    """The success of each payment's open attempt."""
    return (Said(payment_id, 1) for payment_id in lot.ids())


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
        words = [Said(payment_id, 1) for payment_id in block]
        words += [Said(payment_id, 2) for payment_id in before[:DUPLICATES]]
        words += [Said(payment_id, 1) for payment_id in before[DUPLICATES : DUPLICATES + REPLAYS]]
        words += [Said(next(nobodys), 1) for _ in range(UNKNOWN)]
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
        "result": "SUCCESS",
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
