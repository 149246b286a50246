"""What a payment channel must be able to do, in paycore's words.

An adapter translates; it decides nothing about money, keeps no state and writes nothing. Each call
is bounded by the timeout that the adapter was built with. What the channel did when no usable answer came
is unknown: the adapter raises ``ChannelUnknownError`` and never guesses (R6).
"""

from enum import IntEnum
from typing import NamedTuple, Protocol

from paycore.domain.verdicts import PayMethod


class ChannelUnknownError(Exception):
    """No usable answer: timeout, broken connection, 5xx, or nonsense. What the channel did is unknown."""


class ChannelRestsError(ChannelUnknownError):
    """The channel was not asked: it has not answered about this account lately. The work stays as due as it was."""


def was_asked(error: Exception) -> bool:
    """Whether an error that tells of no final word comes from a channel that was asked; False where it rested."""
    return not isinstance(error, ChannelRestsError) and not isinstance(error.__cause__, ChannelRestsError)


class ChannelOrder(NamedTuple):
    """What is asked of a channel. expire_at_ms: absolute, sent identically each time."""

    account: str
    channel_order_no: str
    amount_minor: int
    currency: str
    subject: str
    return_url: str
    method: PayMethod
    expire_at_ms: int


class CreateResult(IntEnum):
    """What the channel says to a new order."""

    OPEN = 1
    """It stands open for the user; pay_url or qr_text is set."""
    PAID = 2
    """A synchronous charge took the money; capture is set."""
    ACCEPTED = 3
    """A synchronous charge was taken in; its result comes later, by notification or query."""
    REFUSED = 4
    """Refused for good: no money moved, nor will it under this number. code and message are set."""


class Capture(NamedTuple):
    """Money that the channel says it took. paid_at_ms: its own clock; None when it does not say."""

    channel_trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int | None


class Created(NamedTuple):
    """The channel's answer to ``create``."""

    result: CreateResult
    pay_url: str = ""
    qr_text: str = ""
    capture: Capture | None = None
    code: str = ""
    message: str = ""


class QueryState(IntEnum):
    """How an order stands at the channel."""

    NOT_PAID = 1
    """Known there, open and unpaid."""
    IN_PROGRESS = 2
    """The user or the bank is at it: neither paid nor unpaid."""
    PAID = 3
    """At least one capture; all are in captures."""
    CLOSED = 4
    """Closed there, unpaid. Final."""
    FAILED = 5
    """Refused or failed there, unpaid. Final."""
    NOT_EXIST = 6
    """Not known there. Neither failed nor closed: some channels learn of an order only when the user scans."""


class Queried(NamedTuple):
    """The channel's answer to ``query``. captures may be set in any state: money truth comes first."""

    state: QueryState
    captures: tuple[Capture, ...] = ()
    code: str = ""
    message: str = ""


class CloseResult(IntEnum):
    """What the channel says to a close."""

    CLOSED = 1
    """Closed, now or before; no payment will be taken on it."""
    ALREADY_PAID = 2
    """Paid: query it."""
    IN_PROGRESS = 3
    """The user or the bank is at it."""
    NOT_EXIST = 4
    """Not known there."""


class RefundOrder(NamedTuple):
    """A refund as asked of a channel: all of it identical each time one channel_refund_no is sent."""

    account: str
    channel_refund_no: str
    channel_order_no: str
    channel_trade_no: str
    amount_minor: int
    currency: str


class RefundAnswer(IntEnum):
    """How a refund stands at the channel."""

    REFUNDED = 1
    """The money went back. Final."""
    ACCEPTED = 2
    """Taken in; money has not moved yet."""
    REFUSED = 3
    """Refused for good under this number: no money moved. code and message are set."""
    NOT_EXIST = 4
    """Not known there (an answer of query_refund only)."""
    NEEDS_NEW_NUMBER = 5
    """Finally not done under this number, and the channel documents that a new one is needed. code is set."""
    RETURNED = 6
    """The channel or its network sent this capture back by itself (an answer of query_refund only). Final."""


class Refunded(NamedTuple):
    """The channel's answer about a refund."""

    answer: RefundAnswer
    code: str = ""
    message: str = ""


class ChannelTraits(NamedTuple):
    """How a channel wants to be treated.

    query_ladder_ms: after how long an attempt without a word is asked about, rung by rung. min_close_age_ms: an order
    younger than that is not closed. calls_per_second: what one process asks of it at most.
    """

    query_ladder_ms: tuple[int, ...] = (5_000, 30_000, 60_000, 180_000, 300_000, 600_000, 1_800_000)
    min_close_age_ms: int = 0
    calls_per_second: int = 100


class Channel(Protocol):
    """One payment channel. Methods are safe to call concurrently and raise only ``ChannelUnknownError``."""

    async def create(self, order: ChannelOrder) -> Created:
        """Open an order, or charge at once where method is CHARGE. The same number asks for the same order."""
        ...

    async def query(self, account: str, channel_order_no: str) -> Queried:
        """Ask how an order stands."""
        ...

    async def close(self, account: str, channel_order_no: str) -> CloseResult:
        """Close an order so that it can no longer be paid."""
        ...

    async def refund(self, order: RefundOrder) -> Refunded:
        """Send money back. The same channel_refund_no refunds once, however often it is sent."""
        ...

    async def query_refund(self, order: RefundOrder) -> Refunded:
        """Ask how a refund stands, and whether its capture went back without it.

        RETURNED: no refund of this number moved money, nor will one, and the channel or its network sent that capture
        back by itself, all of it. That is not tied to our number: an adapter whose channel does not tell it with the
        refund asks for the order as well.
        """
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...
