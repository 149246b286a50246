"""The adapter for the simulated banks. It speaks their HTTP API and nothing else; it shares no code with them.

What it relies on (source: docs/channels.md, "simbank"):

* Requests are signed with the account's secret: HMAC-SHA256 over timestamp, nonce, request line and body.
* Every operation may be repeated under its number: the same content gets the same answer and moves no money twice.
* A business answer is a 200 that repeats the number it is about. A number that the bank does not know is a 404 with
  the code NOT_EXIST, which also repeats it. No other status says anything about money.
* CLOSED, FAILED (query), REFUSED (create, refund), CLOSED (refund: another number may be sent), REFUNDED and RETURNED
  are final; NOT_PAID, IN_PROGRESS and ACCEPTED are not. RETURNED answers a query of a refund alone: no refund of this
  number moved money, and the bank has sent the capture that was named back by itself.
* An expired order stays NOT_PAID, and payable until the bank is told to close it.
* Captures may be told in any state. A close of a paid order is answered ALREADY_PAID.

Whatever is not exactly such an answer (no answer in time, another status, a missing field, a wrong type, another
order's number, a word that is not in the list) becomes ``ChannelUnknownError``.
"""

import asyncio
import hashlib
import hmac
import json
import re
import secrets as random_secrets
from collections.abc import Mapping
from typing import NamedTuple, NoReturn, Protocol, TypeVar
from urllib.parse import quote, urlencode, urlsplit

import httpx

from paycore.channels.protocol import (
    Capture,
    ChannelOrder,
    ChannelUnknownError,
    CloseResult,
    Created,
    CreateResult,
    Queried,
    QueryState,
    RefundAnswer,
    Refunded,
    RefundOrder,
)
from paycore.domain.clock import Clock
from paycore.domain.verdicts import PayMethod
from paycore.failpoint import failpoint

MAX_ANSWER_BYTES = 262_144
MAX_INT64 = 2**63 - 1

_TRADE_NO = re.compile(r"[!-~]{1,64}", re.ASCII)
_CURRENCY = re.compile(r"[A-Z]{3}", re.ASCII)

_CREATE_RESULTS = {
    PayMethod.REDIRECT: {"OPEN": CreateResult.OPEN, "REFUSED": CreateResult.REFUSED},
    PayMethod.QR: {"OPEN": CreateResult.OPEN, "REFUSED": CreateResult.REFUSED},
    PayMethod.CHARGE: {
        "PAID": CreateResult.PAID,
        "ACCEPTED": CreateResult.ACCEPTED,
        "REFUSED": CreateResult.REFUSED,
    },
}
_QUERY_STATES = {state.name: state for state in QueryState if state is not QueryState.NOT_EXIST}
_CLOSE_RESULTS = {result.name: result for result in CloseResult if result is not CloseResult.NOT_EXIST}
_REFUND_ANSWERS = {
    "REFUNDED": RefundAnswer.REFUNDED,
    "ACCEPTED": RefundAnswer.ACCEPTED,
    "REFUSED": RefundAnswer.REFUSED,
    "CLOSED": RefundAnswer.NEEDS_NEW_NUMBER,
}
_REFUND_QUERY_ANSWERS = _REFUND_ANSWERS | {"RETURNED": RefundAnswer.RETURNED}

_UNMOVED_MESSAGES = {
    RefundAnswer.REFUSED: "the bank refused the refund",
    RefundAnswer.NEEDS_NEW_NUMBER: "the bank closed the refund, which needs a new number",
}

Word = TypeVar("Word")


class HiddenSecret(Protocol):
    """A secret that no log shows by accident, for example a pydantic ``SecretStr``."""

    def get_secret_value(self) -> str:
        """Return the secret itself."""
        ...


class _Hidden:
    """A plain secret, hidden."""

    def __init__(self, secret: str) -> None:
        self._secret = secret

    def __repr__(self) -> str:
        return "**********"

    def get_secret_value(self) -> str:
        return self._secret


class _Answer(NamedTuple):
    """A JSON object that the bank sent. ``exists`` is False for a NOT_EXIST about the number that was asked."""

    exists: bool
    fields: Mapping[str, object]


class SimbankChannel:
    """Implements ``channels.protocol.Channel`` for the simulated banks: one account for each bank."""

    def __init__(self, base_url: str, secrets: Mapping[str, HiddenSecret | str], timeout_ms: int, clock: Clock) -> None:
        """``base_url``: where the banks listen. ``secrets``: by account. ``timeout_ms`` bounds each call as a whole."""
        self._base_url = base_url.rstrip("/")
        self._base_path = urlsplit(self._base_url).path
        self._secrets: dict[str, HiddenSecret] = {
            account: _Hidden(secret) if isinstance(secret, str) else secret for account, secret in secrets.items()
        }
        self._timeout_seconds = timeout_ms / 1000
        self._clock = clock
        self._http = httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None)  # noqa: S113  _send bounds it

    async def create(self, order: ChannelOrder) -> Created:
        """POST /banks/{account}/orders."""
        asked = {
            "order_no": order.channel_order_no,
            "amount_minor": order.amount_minor,
            "currency": order.currency,
            "subject": order.subject,
            "return_url": order.return_url,
            "method": order.method.name.lower(),
            "expire_at_ms": order.expire_at_ms,
        }
        fields = _known(await self._call("create", "POST", order.account, "/orders", asked))
        _expect(fields, "order_no", order.channel_order_no)
        return _created(order.method, fields)

    async def query(self, account: str, channel_order_no: str) -> Queried:
        """GET /banks/{account}/orders/{number}."""
        answer = await self._call("query", "GET", account, f"/orders/{quote(channel_order_no, safe='')}")
        if not answer.exists:
            _expect(answer.fields, "number", channel_order_no)
            return Queried(QueryState.NOT_EXIST)
        _expect(answer.fields, "order_no", channel_order_no)
        state = _word(answer.fields, "state", _QUERY_STATES)
        captures = _captures(answer.fields)
        if state is QueryState.PAID and not captures:
            _nonsense("PAID without a capture")
        return Queried(state, captures, _text(answer.fields, "code"))

    async def close(self, account: str, channel_order_no: str) -> CloseResult:
        """POST /banks/{account}/orders/{number}/close."""
        answer = await self._call("close", "POST", account, f"/orders/{quote(channel_order_no, safe='')}/close", {})
        if not answer.exists:
            _expect(answer.fields, "number", channel_order_no)
            return CloseResult.NOT_EXIST
        _expect(answer.fields, "order_no", channel_order_no)
        return _word(answer.fields, "result", _CLOSE_RESULTS)

    async def refund(self, order: RefundOrder) -> Refunded:
        """POST /banks/{account}/refunds."""
        asked = {
            "refund_no": order.channel_refund_no,
            "order_no": order.channel_order_no,
            "trade_no": order.channel_trade_no,
            "amount_minor": order.amount_minor,
            "currency": order.currency,
        }
        answer = await self._call("refund", "POST", order.account, "/refunds", asked)
        return _refunded(order, _known(answer), _REFUND_ANSWERS)

    async def query_refund(self, order: RefundOrder) -> Refunded:
        """GET /banks/{account}/refunds/{number}?order_no=…&trade_no=…."""
        capture = urlencode({"order_no": order.channel_order_no, "trade_no": order.channel_trade_no})
        path = f"/refunds/{quote(order.channel_refund_no, safe='')}?{capture}"
        answer = await self._call("query_refund", "GET", order.account, path)
        if not answer.exists:
            _expect(answer.fields, "number", order.channel_refund_no)
            return Refunded(RefundAnswer.NOT_EXIST)
        return _refunded(order, answer.fields, _REFUND_QUERY_ANSWERS)

    async def aclose(self) -> None:
        """Let go of connections."""
        await self._http.aclose()

    async def _call(
        self, operation: str, method: str, account: str, path: str, asked: Mapping[str, object] | None = None
    ) -> _Answer:
        body = b"" if asked is None else json.dumps(asked, separators=(",", ":")).encode()
        failpoint(f"channel.{operation}.before")
        status, content = await self._send(method, account, f"/banks/{quote(account, safe='')}{path}", body)
        failpoint(f"channel.{operation}.after")
        fields = _json_object(content) if status in {200, 404} else {}
        if status == 404 and fields.get("code") == "NOT_EXIST":
            return _Answer(exists=False, fields=fields)
        if status != 200:
            _nonsense(f"status {status}")
        return _Answer(exists=True, fields=fields)

    async def _send(self, method: str, account: str, path: str, body: bytes) -> tuple[int, bytes]:
        """Send one signed request; return status and body of the answer, within the timeout and the size limit."""
        secret = self._secrets.get(account)
        if secret is None:
            raise ChannelUnknownError(f"simbank: no secret is configured for account {account}")
        headers = self._signature(secret, f"{method} {self._base_path}{path}", body)
        try:
            async with asyncio.timeout(self._timeout_seconds):
                url = f"{self._base_url}{path}"
                async with self._http.stream(method, url, content=body, headers=headers) as response:
                    return response.status_code, await _limited(response)
        except TimeoutError:
            raise ChannelUnknownError("simbank: no answer in time") from None
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            raise ChannelUnknownError(f"simbank: no usable answer ({type(error).__name__})") from None

    def _signature(self, secret: HiddenSecret, target: str, body: bytes) -> dict[str, str]:
        timestamp, nonce = str(self._clock.now_ms()), random_secrets.token_hex(16)
        message = f"{timestamp}\n{nonce}\n{target}\n".encode() + body
        return {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "Simbank-Timestamp": timestamp,
            "Simbank-Nonce": nonce,
            "Simbank-Signature": hmac.new(secret.get_secret_value().encode(), message, hashlib.sha256).hexdigest(),
        }


async def _limited(response: httpx.Response) -> bytes:
    content = b""
    # Raw: a compressed answer was not asked for, and may be small only until it is unpacked.
    async for chunk in response.aiter_raw():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            _nonsense("an answer over the size limit")
    return content


# Reading answers: each function returns what it names or raises ChannelUnknownError.


def _nonsense(what: str) -> NoReturn:
    raise ChannelUnknownError(f"simbank: nonsense: {what}")


def _json_object(content: bytes) -> Mapping[str, object]:
    try:
        value = json.loads(content, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        _nonsense("no JSON")
    if not isinstance(value, dict):
        _nonsense("no JSON object")
    return value


def _without_repetition(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name twice in one object")
    return fields


def _known(answer: _Answer) -> Mapping[str, object]:
    if not answer.exists:
        _nonsense("NOT_EXIST where nothing was looked up")
    return answer.fields


def _expect(fields: Mapping[str, object], name: str, value: object) -> None:
    found = fields.get(name)
    if type(found) is not type(value) or found != value:
        _nonsense(f"{name} is not the one asked about")


def _word(fields: Mapping[str, object], name: str, words: Mapping[str, Word]) -> Word:
    word = fields.get(name)
    if not (isinstance(word, str) and word in words):
        _nonsense(f"{name} is none of {', '.join(words)}")
    return words[word]


def _text(fields: Mapping[str, object], name: str) -> str:
    text = fields.get(name)
    if not (isinstance(text, str) and len(text) <= 2048 and text.isprintable()):
        _nonsense(f"{name} is no text")
    return text


def _integer(fields: Mapping[str, object], name: str, lowest: int) -> int:
    number = fields.get(name)
    # A bool is an int to isinstance.
    if type(number) is not int or not lowest <= number <= MAX_INT64:
        _nonsense(f"{name} is no integer of {lowest} to {MAX_INT64}")
    return number


def _capture(value: object) -> Capture:
    if not isinstance(value, dict):
        _nonsense("a capture is no object")
    trade_no, currency = _text(value, "trade_no"), _text(value, "currency")
    if not (_TRADE_NO.fullmatch(trade_no) and _CURRENCY.fullmatch(currency)):
        _nonsense("trade_no or currency of a capture")
    # Only a null means that the bank does not say; a field left out is nonsense.
    unsaid = "paid_at_ms" in value and value["paid_at_ms"] is None
    paid_at_ms = None if unsaid else _integer(value, "paid_at_ms", 0)
    return Capture(trade_no, _integer(value, "amount_minor", 1), currency, paid_at_ms)


def _captures(fields: Mapping[str, object]) -> tuple[Capture, ...]:
    values = fields.get("captures")
    if not isinstance(values, list):
        _nonsense("captures is no list")
    captures = tuple(_capture(value) for value in values)
    if len({capture.channel_trade_no for capture in captures}) != len(captures):
        _nonsense("one trade number twice")
    return captures


def _created(method: PayMethod, fields: Mapping[str, object]) -> Created:
    result = _word(fields, "result", _CREATE_RESULTS[method])
    if result is CreateResult.PAID:
        return Created(result, capture=_capture(fields.get("capture")))
    if result is CreateResult.ACCEPTED:
        return Created(result)
    if result is CreateResult.REFUSED:
        return Created(result, code=_refusal_code(fields), message="the bank refused the order")
    if method is PayMethod.QR:
        return Created(result, qr_text=_url(fields, "qr_text"))
    return Created(result, pay_url=_url(fields, "pay_url"))


def _refusal_code(fields: Mapping[str, object]) -> str:
    code = _text(fields, "code")
    if not 0 < len(code) <= 64:
        _nonsense("a refusal without a code")
    return code


def _url(fields: Mapping[str, object], name: str) -> str:
    url = _text(fields, name)
    try:
        parts = urlsplit(url)
    except ValueError:
        _nonsense(f"{name} is no URL")
    if parts.scheme not in {"http", "https"} or not parts.hostname or " " in url:
        _nonsense(f"{name} is no URL")
    return url


def _refunded(order: RefundOrder, fields: Mapping[str, object], answers: Mapping[str, RefundAnswer]) -> Refunded:
    _expect(fields, "refund_no", order.channel_refund_no)
    _expect(fields, "order_no", order.channel_order_no)
    _expect(fields, "trade_no", order.channel_trade_no)
    _expect(fields, "amount_minor", order.amount_minor)
    _expect(fields, "currency", order.currency)
    answer = _word(fields, "result", answers)
    if answer in (RefundAnswer.REFUSED, RefundAnswer.NEEDS_NEW_NUMBER):
        return Refunded(answer, code=_refusal_code(fields), message=_UNMOVED_MESSAGES[answer])
    return Refunded(answer)
