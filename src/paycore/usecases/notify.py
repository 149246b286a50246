"""Notify: what channels said, taken in. The writer decides and makes it durable; here stands the door.

INVALID is only for what cannot be evidence at all; a gateway must never acknowledge it to a channel. Everything
that might be true some day, unknown names and foreign numbers included, goes on to be judged.
"""

import re

from paycore._wire import Batch
from paycore.domain.errors import FieldViolation, InvalidArgumentError, ThrottledError
from paycore.domain.notification import Notification
from paycore.domain.texts import broken_evidence_rule
from paycore.domain.verdicts import ChannelResult, NotifyOutcome
from paycore.usecases.words import notification_at
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

# NUL as JSON writes it: an escape, unless its backslash is itself escaped.
_JSON_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


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
    """Takes notifications in. Their answers are written into the batch that brought them."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    async def one(self, batch: Batch) -> None:
        """Take in a batch of one; return once its answer is durable.

        Raises InvalidArgumentError where it cannot be evidence, ThrottledError where too much waits or lies in
        quarantine, and StoreUnavailableError where it could not be committed: nothing was kept, the channel should
        send again.
        """
        if batch.suspects() and (broken := violations(notification_at(batch, 0))):
            self._writer.count_refused(batch, [0], NotifyOutcome.INVALID)
            raise InvalidArgumentError(broken, "INVALID_NOTIFICATION")
        await self._writer.take(batch)
        if batch.verdict(0)[0] == NotifyOutcome.THROTTLED:
            raise ThrottledError("QUARANTINE_FULL", "too much of this source waits in quarantine already")

    async def many(self, batch: Batch) -> None:
        """Take in a batch; return once each of its words is answered: durable, INVALID or THROTTLED.

        Raises StoreUnavailableError where any of them could not be committed: send the whole batch again.
        """
        invalid = []
        for position in batch.suspects():
            if broken := violations(notification_at(batch, position)):
                batch.refuse(position, NotifyOutcome.INVALID, broken)
                invalid.append(position)
        if invalid:
            self._writer.count_refused(batch, invalid, NotifyOutcome.INVALID)
        if batch.pending():
            await self._writer.take_what_fits(batch)
