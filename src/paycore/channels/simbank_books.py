"""The simulated banks' books, by the driver's side of their HTTP API: ``GET /books``, unsigned, on loopback.

Source: docs/channels.md, "simbank". An answer that is not exactly what is described there is refused.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import httpx

from paycore.channels.books import BookCapture, BookOrder, BookRefund, BooksUnreadableError

PAGE_ORDERS = 500
_NUMBERS_AT_ONCE = 100
"""Order numbers in one request: its line stays far below what servers take."""

_MAX_INT64 = 2**63 - 1

_MOVING = {"ACCEPTED", "REFUNDED", "RETURNED"}
"""How refunds stand whose money has moved or will; RETURNED is the bank's own doing."""


class SimbankBooks:
    """Implements ``channels.books.Books`` for all banks of one process."""

    channel = "simbank"

    def __init__(self, base_url: str, timeout_ms: int, page_orders: int = PAGE_ORDERS) -> None:
        """base_url: where the banks listen. timeout_ms: for connecting, and for each silence of an answer."""
        self._page_orders = page_orders
        # A proxy of the environment would be asked for a loopback address.
        self._http = httpx.AsyncClient(base_url=base_url.rstrip("/"), timeout=timeout_ms / 1000, trust_env=False)

    async def accounts(self) -> Sequence[str]:
        # A number that no order has: the answer names the banks and nothing else.
        return sorted(await self._get({"order_no": "-"}))

    async def pages(self) -> AsyncIterator[Sequence[BookOrder]]:
        for account in await self.accounts():
            after = ""
            while True:
                orders = await self._read(account, {"limit": str(self._page_orders), "after": after})
                if orders:
                    yield orders
                    after = orders[-1].channel_order_no
                if len(orders) < self._page_orders:
                    break

    async def orders(self, account: str, channel_order_nos: Sequence[str]) -> Sequence[BookOrder]:
        found: list[BookOrder] = []
        for start in range(0, len(channel_order_nos), _NUMBERS_AT_ONCE):
            found += await self._read(account, {"order_no": channel_order_nos[start : start + _NUMBERS_AT_ONCE]})
        return found

    async def aclose(self) -> None:
        await self._http.aclose()

    async def _read(self, account: str, query: Mapping[str, str | Sequence[str]]) -> list[BookOrder]:
        banks = await self._get({"bank": account, **query})
        try:
            return [_order(account, order) for order in banks[account]["orders"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise BooksUnreadableError(f"{self._http.base_url}: not the books of a simulated bank") from None

    async def _get(self, query: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            answer = await self._http.get("/books", params=query)
            answer.raise_for_status()
            banks: Mapping[str, Any] = answer.json()["banks"]
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise BooksUnreadableError(f"{self._http.base_url}: the books cannot be read ({why})") from None
        except (ValueError, KeyError, TypeError):
            raise BooksUnreadableError(f"{self._http.base_url}: not the books of a simulated bank") from None
        if not isinstance(banks, dict):
            raise BooksUnreadableError(f"{self._http.base_url}: not the books of a simulated bank")
        return banks


def _order(account: str, told: Mapping[str, Any]) -> BookOrder:
    captures = tuple(_capture(one, told["notifications"]) for one in told["captures"])
    refunds = tuple(_refund(one) for one in told["refunds"] if one["result"] in _MOVING)
    return BookOrder(account, _text(told["order_no"]), captures, refunds)


def _capture(told: Mapping[str, Any], notifications: Sequence[Mapping[str, Any]]) -> BookCapture:
    trade_no = _text(told["trade_no"])
    about = [one for one in notifications if one["trade_no"] == trade_no and one["result"] == "SUCCESS"]
    return BookCapture(
        trade_no,
        _integer(told["amount_minor"]),
        _text(told["currency"]),
        _integer(told["paid_at_ms"]),
        _integer(told["refunded_minor"]),
        any(one["acknowledged"] for one in about),
        any(one["pending"] or one["held"] for one in about),
    )


def _refund(told: Mapping[str, Any]) -> BookRefund:
    number, trade_no, currency = (_text(told[name]) for name in ("refund_no", "trade_no", "currency"))
    return BookRefund(number, trade_no, _integer(told["amount_minor"]), currency, told["result"] == "RETURNED")


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -_MAX_INT64 <= value <= _MAX_INT64:
        raise ValueError("not an integer")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value
