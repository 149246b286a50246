"""The word of a channel as the use cases see it: values only, no wire and no row format."""

from typing import NamedTuple

from paycore.domain.ids import digest_fields
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, VerdictFlag

# Plain integers: an operation on enumerated flags costs a microsecond, and these are asked for each notification.
_REPLAYED = int(VerdictFlag.REPLAYED)
_PAID_AT_UNTRUSTED = int(VerdictFlag.PAID_AT_UNTRUSTED)


class Notification(NamedTuple):
    """What a channel said about one of its orders, by whatever way it was heard.

    paid_at_ms: by the channel's clock, ``decision.ABSENT_MS`` when not given. received_at_ms: when
    it arrived here. headers: name and value pairs as JSON text.
    """

    channel: str
    account: str
    channel_order_no: str
    result: ChannelResult
    amount_minor: int
    currency: str
    channel_trade_no: str
    paid_at_ms: int
    received_at_ms: int
    source: CaptureSource = CaptureSource.NOTIFICATION
    failure_code: str = ""
    failure_message: str = ""
    raw: bytes = b""
    headers: str = ""


class Verdict(NamedTuple):
    """The answer to one notification. payment_id and attempt are 0 where none is known."""

    outcome: NotifyOutcome
    flags: VerdictFlag = VerdictFlag.NONE
    payment_id: int = 0
    attempt: int = 0

    @property
    def replayed(self) -> bool:
        """Whether this very word was judged before."""
        return int(self.flags) & _REPLAYED != 0

    @property
    def paid_at_untrusted(self) -> bool:
        """Whether it was accepted although its pay time could not be believed."""
        return int(self.flags) & _PAID_AT_UNTRUSTED != 0


def quarantine_id(notification: Notification, reason: NotifyOutcome) -> str:
    """The key of evidence in quarantine: equal words under one reason share one row however often they come."""
    return digest_fields(
        reason.name,
        notification.result.name,
        notification.channel,
        notification.account,
        notification.channel_order_no,
        notification.channel_trade_no,
        str(notification.amount_minor),
        notification.currency,
    )
