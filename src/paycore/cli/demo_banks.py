"""Drives the simulated banks over HTTP: users who pay, notifications that wait their turn, books to read."""

import json
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from paycore.simbank.setup import read_secrets
from paycore.simbank.signing import sign

_TIMEOUT_SECONDS = 30.0


class BankError(Exception):
    """A bank did something that the demo cannot go on from. The message is one line."""


class Page(NamedTuple):
    """Where a user pays: one order at one bank."""

    bank: str
    order_no: str
    url: str


class BookEntry(NamedTuple):
    """One order in a bank's own books; amounts in the currency's minor unit. kept: as the bank itself counts it."""

    bank: str
    order_no: str
    currency: str
    captured_minor: int
    refunded_minor: int
    kept_minor: int


class Capture(NamedTuple):
    """Money that a bank took from a user."""

    trade_no: str
    amount_minor: int
    currency: str
    paid_at_ms: int


class Banks:
    """All banks of one simulator. Methods raise BankError and httpx.HTTPError."""

    def __init__(self, url: str, secrets: Mapping[str, str]) -> None:
        self._url = url
        self._secrets = read_secrets(json.dumps(dict(secrets)))
        # No proxy of the environment: the banks are on this machine.
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=_TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def pay(self, page: Page, **faults: object) -> list[Capture]:
        """Let the user pay on the bank's page, with faults for this payment; return what the bank took."""
        answer = self._http.post(page.url, headers={"Accept": "application/json"}, json={"faults": faults})
        if answer.status_code != 200:
            raise BankError(f"{page.bank} took no money: {answer.text}")
        return [Capture(**one) for one in answer.json()["captures"]]

    def open_foreign_order(self, bank: str, order_no: str, amount_minor: int, currency: str) -> Page:
        """Open an order as another system of the same company would, under the same contract with the bank."""
        path = f"/banks/{bank}/orders"
        asked = {
            "order_no": order_no,
            "amount_minor": amount_minor,
            "currency": currency,
            "subject": "An order of another system",
            "return_url": "",
            "method": "redirect",
            "expire_at_ms": _now_ms() + 600_000,
        }
        body = json.dumps(asked).encode()
        headers = sign(self._secrets[bank], f"POST {path}", body, _now_ms())
        answer = self._json(self._http.post(path, content=body, headers=headers | {"Content-Type": "application/json"}))
        return Page(bank, order_no, str(answer["pay_url"]))

    def notification_ids(self, page: Page) -> list[str]:
        """Return the numbers of an order's notifications, oldest first."""
        return [str(one["notification_id"]) for one in self._order(page)["notifications"]]

    def release(self, page: Page, ids: Iterable[str] | None = None) -> bool:
        """Send an order's held notifications now, all or those named; return whether each was acknowledged."""
        asked = {"bank": page.bank, "order_no": page.order_no, "notification_ids": None if ids is None else list(ids)}
        return self._sent("release", asked)

    def resend(self, page: Page, times: int = 1) -> bool:
        """Send an order's notifications again, acknowledged or not; return whether each was acknowledged."""
        return self._sent("resend", {"bank": page.bank, "order_no": page.order_no, "times": times})

    def _sent(self, verb: str, asked: Mapping[str, object]) -> bool:
        sent = self._json(self._http.post(f"/notifications/{verb}", json=asked))["sent"]
        if not sent:
            raise BankError(f"{asked['bank']} has no notification of {asked['order_no']} to {verb}")
        return all(one["acknowledged"] for one in sent)

    def _order(self, page: Page) -> Mapping[str, Any]:
        books = self._json(self._http.get("/books", params={"bank": page.bank, "order_no": page.order_no}))
        orders = books["banks"][page.bank]["orders"]
        if not orders:
            raise BankError(f"{page.bank} has no order {page.order_no}")
        found: Mapping[str, Any] = orders[0]
        return found

    def has_told_all(self) -> bool:
        """Whether every notification of every bank is acknowledged and none will be sent again by itself."""
        banks = self._json(self._http.get("/books"))["banks"]
        told = [one for book in banks.values() for order in book["orders"] for one in order["notifications"]]
        return all(one["acknowledged"] and not one["pending"] for one in told)

    def books(self) -> list[BookEntry]:
        """Read the books of all banks, every order in them."""
        banks = self._json(self._http.get("/books"))["banks"]
        return [_entry(bank, order) for bank, book in banks.items() for order in book["orders"]]

    @staticmethod
    def _json(answer: httpx.Response) -> Mapping[str, Any]:
        if answer.status_code != 200:
            raise BankError(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
        parsed: Mapping[str, Any] = answer.json()
        return parsed


def _entry(bank: str, order: Mapping[str, Any]) -> BookEntry:
    captures = order["captures"]
    return BookEntry(
        bank,
        order["order_no"],
        order["currency"],
        sum(one["amount_minor"] for one in captures),
        sum(one["refunded_minor"] for one in captures),
        order["kept_minor"],
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
