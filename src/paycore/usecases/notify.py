"""Notify: what a channel said, taken in. The writer decides and makes it durable; here stands the door.

INVALID is only for what cannot be evidence at all; a gateway must never acknowledge it to a channel. Everything
that might be true some day, unknown names and foreign numbers included, goes on to be judged.
"""

import re

from paycore.domain.errors import FieldViolation, InvalidArgumentError
from paycore.domain.notification import Notification, Verdict
from paycore.domain.texts import broken_evidence_rule
from paycore.domain.verdicts import ChannelResult
from paycore.usecases.writer import Writer

MAX_RAW_BYTES = 64 * 1024
MAX_HEADERS_BYTES = 8 * 1024

_TEXT_LIMITS = {
    "channel": 32,
    "account": 64,
    "channel_order_no": 64,
    "currency": 16,
    "channel_trade_no": 64,
}

_RESULTS = frozenset(ChannelResult)
_PLAIN_LENGTH = min(limit for field, limit in _TEXT_LIMITS.items() if field != "currency")
_PLAIN_CURRENCY_LENGTH = _TEXT_LIMITS["currency"]

# NUL as JSON writes it: an escape, unless its backslash is itself escaped.
_JSON_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


def is_plain(notification: Notification) -> bool:
    """Whether a success breaks no rule at first sight; what is not plain is looked at rule by rule.

    The common word passes here in a microsecond where naming each rule takes twelve.
    """
    channel, account, order_no, result, amount_minor, currency, trade_no = notification[:7]
    return (
        result is ChannelResult.SUCCESS
        and amount_minor > 0
        and 0 < len(trade_no) <= _PLAIN_LENGTH
        and len(channel) <= _PLAIN_LENGTH
        and len(account) <= _PLAIN_LENGTH
        and len(order_no) <= _PLAIN_LENGTH
        and len(currency) <= _PLAIN_CURRENCY_LENGTH
        and "\0" not in f"{channel}{account}{order_no}{currency}{trade_no}"
        and len(notification.raw) <= MAX_RAW_BYTES
        # A character takes at most 4 bytes, and NUL in JSON is an escape.
        and len(notification.headers) * 4 <= MAX_HEADERS_BYTES
        and "\\u0000" not in notification.headers
    )


def violations(notification: Notification) -> list[FieldViolation]:
    """Name what makes a notification INVALID; empty when it can be evidence."""
    found = [
        FieldViolation(field, rule)
        for field, limit in _TEXT_LIMITS.items()
        if (rule := broken_evidence_rule(getattr(notification, field), max_length=limit)) is not None
    ]
    if notification.result not in _RESULTS:
        found.append(FieldViolation("result", "must be SUCCESS or FAILURE"))
    if notification.result == ChannelResult.SUCCESS:
        if notification.amount_minor <= 0:
            found.append(FieldViolation("amount_minor", "must be positive for a success"))
        if not notification.channel_trade_no:
            found.append(FieldViolation("channel_trade_no", "is required for a success"))
    elif notification.amount_minor < 0:
        found.append(FieldViolation("amount_minor", "must not be negative"))
    if len(notification.raw) > MAX_RAW_BYTES:
        found.append(FieldViolation("raw", f"must have at most {MAX_RAW_BYTES} bytes"))
    if len(notification.headers.encode()) > MAX_HEADERS_BYTES:
        found.append(FieldViolation("headers", f"must have at most {MAX_HEADERS_BYTES} bytes in all"))
    elif _JSON_NUL.search(notification.headers):
        found.append(FieldViolation("headers", "must not contain NUL"))
    return found


class Notify:
    """Takes notifications in."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def notify(self, notification: Notification) -> Verdict:
        """Return the verdict once it is durable.

        Raises InvalidArgumentError where it cannot be evidence, ThrottledError where too much waits, and
        StoreUnavailableError where it could not be committed: nothing was kept, the channel should send again.
        """
        if not is_plain(notification) and (broken := violations(notification)):
            self._writer.count_invalid(notification)
            raise InvalidArgumentError(broken, "INVALID_NOTIFICATION")
        return await self._writer.notify(notification)
