"""Words of a batch as values, for what is looked at one by one: the rules of the door and the rare path."""

import json
from collections.abc import Mapping
from typing import cast

from paycore._wire import Batch
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, VerdictFlag

_OUTCOME_MASK = 0xFF

# Asked for each word that is judged on its rows: a call of an enumeration costs a microsecond.
_RESULTS = {int(result): result for result in ChannelResult}
_SOURCES = {int(source): source for source in CaptureSource}

# Made once: json.dumps with options builds one anew for each call.
_HEADERS_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def headers_json(headers: Mapping[str, str]) -> str:
    """Write headers as JSON text, sorted by name, so that equal headers are equal texts; empty when there are none."""
    return _HEADERS_ENCODER.encode(dict(headers)) if headers else ""


def notification_at(batch: Batch, position: int) -> Notification:
    """Read one word of a batch."""
    values = batch.notification(position)
    headers = values[13]
    return Notification(
        channel=values[0],
        account=values[1],
        channel_order_no=values[2],
        # A number that is none goes on as it came, for the door to refuse.
        result=_RESULTS.get(values[3], cast(ChannelResult, values[3])),
        amount_minor=values[4],
        currency=values[5],
        channel_trade_no=values[6],
        paid_at_ms=values[7],
        received_at_ms=values[8],
        source=_SOURCES[values[9]],
        failure_code=values[10],
        failure_message=values[11],
        raw=values[12],
        headers=headers if isinstance(headers, str) else headers_json(headers),
    )


def verdict_at(batch: Batch, position: int) -> Verdict:
    """Read the answer to one word of a batch."""
    packed, payment_id, attempt = batch.verdict(position)
    return Verdict(NotifyOutcome(packed & _OUTCOME_MASK), VerdictFlag(packed & ~_OUTCOME_MASK), payment_id, attempt)
