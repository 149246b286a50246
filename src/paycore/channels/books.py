"""A channel's own books, where it lets them be read: what it took and sent back, in paycore's words.

The audit compares them with the database. Reading is all that can be done here; nothing is decided.
"""

from collections.abc import AsyncIterator, Sequence
from typing import NamedTuple, Protocol


class BooksUnreadableError(Exception):
    """The books cannot be read now; the message is one line that says why."""


class BookCapture(NamedTuple):
    """Money that the channel took. told: its word was acknowledged; telling: it will be told (again) by itself."""

    channel_trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int
    refunded_minor: int
    told: bool
    telling: bool


class BookRefund(NamedTuple):
    """Money that the channel sent back, or is about to. by_itself: nobody asked it to, and the number is its own."""

    channel_refund_no: str
    channel_trade_no: str
    amount_minor: int
    currency: str
    by_itself: bool


class BookOrder(NamedTuple):
    """One order in the books of one account."""

    account: str
    channel_order_no: str
    captures: tuple[BookCapture, ...]
    refunds: tuple[BookRefund, ...]


class Books(Protocol):
    """The books of one channel. Methods raise ``BooksUnreadableError``."""

    @property
    def channel(self) -> str:
        """The channel's name in the database."""
        ...

    async def accounts(self) -> Sequence[str]:
        """The accounts whose books these are."""
        ...

    def pages(self) -> AsyncIterator[Sequence[BookOrder]]:
        """Every order of every account, some at a time, each once."""
        ...

    async def orders(self, account: str, channel_order_nos: Sequence[str]) -> Sequence[BookOrder]:
        """These orders as they stand now; those that the channel does not know are left out."""
        ...

    async def aclose(self) -> None:
        """Let go of connections."""
        ...
