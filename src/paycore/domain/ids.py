"""Numbers: payment ids, channel order numbers, refund numbers. Pure; randomness and time come from outside."""

import hashlib
import threading
from typing import NamedTuple

from paycore.domain.clock import Clock

ID_EPOCH_MS = 1_735_689_600_000
"""2025-01-01T00:00:00Z: payment ids count milliseconds from here."""

NODE_BITS = 10
SEQUENCE_BITS = 12
NODE_COUNT = 1 << NODE_BITS
MAX_INT64 = (1 << 63) - 1
MAX_ATTEMPTS = 63
MAX_REFUND_TRIES = 99
SLICES = 16
"""Into how many shares of payments repair is divided, so that several processes can work at once."""

_TIME_SHIFT = NODE_BITS + SEQUENCE_BITS
_SEQUENCE_MASK = (1 << SEQUENCE_BITS) - 1


def created_at_ms(payment_id: int) -> int:
    """When a payment was made: the millisecond that its id carries, since the Unix epoch."""
    return (payment_id >> _TIME_SHIFT) + ID_EPOCH_MS


def slice_of(payment_id: int) -> int:
    """Which share of repair's work a payment belongs to, 0 to 15: by its millisecond, so that shares are even."""
    return (payment_id >> _TIME_SHIFT) % SLICES


def first_id_at(at_ms: int) -> int:
    """The lowest id that a payment of this millisecond may have; 0 before ``ID_EPOCH_MS``."""
    return max(0, at_ms - ID_EPOCH_MS) << _TIME_SHIFT


class PaymentIds:
    """Draws payment ids: positive int64, increasing within one generator.

    41 bits of milliseconds since ``ID_EPOCH_MS``, 10 of node, 12 of sequence. A clock that steps back
    does not repeat an id: the sequence goes on from the last millisecond seen. The node
    number comes fresh from the database at each start; should two live processes share one all
    the same, the primary key refuses the second id and the caller draws again.
    """

    def __init__(self, clock: Clock, node: int) -> None:
        if not 0 <= node < NODE_COUNT:
            raise ValueError(f"node must be 0 to {NODE_COUNT - 1}, not {node}")
        self._clock = clock
        self._node = node
        self._last_tick = 0
        self._lock = threading.Lock()

    def draw(self) -> int:
        """Return a new id. Safe to call from any thread."""
        with self._lock:
            now_tick = (self._clock.now_ms() - ID_EPOCH_MS) << SEQUENCE_BITS
            # A tick is (millisecond, sequence) as one number, so an exhausted sequence borrows
            # from the next millisecond by plain addition.
            self._last_tick = max(now_tick, self._last_tick + 1)
            elapsed_ms, sequence = self._last_tick >> SEQUENCE_BITS, self._last_tick & _SEQUENCE_MASK
            return (elapsed_ms << _TIME_SHIFT) | (self._node << SEQUENCE_BITS) | sequence


class ChannelOrderNo(NamedTuple):
    """What a channel order number says: which payment, which attempt."""

    payment_id: int
    attempt: int


def format_channel_order_no(payment_id: int, attempt: int) -> str:
    """Write the number sent to a channel: ``payment_id`` in decimal, then the attempt as two digits."""
    return f"{payment_id}{attempt:02d}"


def parse_channel_order_no(text: str) -> ChannelOrderNo | None:
    """Read a channel order number; None unless it formats back to itself, so that one order has one number."""
    # 21 digits hold every int64 and an attempt; the bound keeps int() away from hostile lengths.
    if not 3 <= len(text) <= 21 or not text.isascii() or not text.isdigit():
        return None
    payment_id, attempt = int(text[:-2]), int(text[-2:])
    if not 1 <= payment_id <= MAX_INT64 or not 1 <= attempt <= MAX_ATTEMPTS:
        return None
    if format_channel_order_no(payment_id, attempt) != text:
        return None
    return ChannelOrderNo(payment_id, attempt)


def excess_refund_no(attempt: int, channel_trade_no: str) -> str:
    """Derive the refund number of an excess capture: ``X``, attempt as two digits, 16 hex digits of a hash."""
    digest = hashlib.sha256(channel_trade_no.encode()).hexdigest()[:16]
    return f"X{attempt:02d}{digest}"


def format_channel_refund_no(payment_id: int, refund_no: str, seq: int) -> str:
    """Write the number of one refund try as sent to the channel; at most 40 characters (19 + 19 + 2)."""
    return f"{payment_id}{refund_no}{seq:02d}"


def digest_fields(*fields: str) -> str:
    """SHA-256 in hexadecimal over length-prefixed texts, so that no two lists of fields run together."""
    digest = hashlib.sha256()
    for field in fields:
        data = field.encode()
        digest.update(len(data).to_bytes(4, "big"))
        digest.update(data)
    return digest.hexdigest()
