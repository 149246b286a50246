"""Tells of a committed group: counters once a group, and a log line for each word that is out of the ordinary."""

import time
from collections import Counter
from collections.abc import Sequence

import structlog

from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import NotifyOutcome
from paycore.metrics import Metrics, NotifyLabel
from paycore.usecases.judge import AccountCodes, GroupResult

UNCONFIGURED = "unconfigured"
"""The metrics label of every channel that is not configured: its name is text from outside."""

_QUIET = frozenset({NotifyOutcome.ACCEPTED, NotifyOutcome.RECORDED})

_log = structlog.get_logger()


class GroupReport:
    """Reports on the writer thread, and on others what was refused at the door."""

    def __init__(self, metrics: Metrics, accounts: AccountCodes) -> None:
        self._metrics = metrics
        self._accounts = accounts

    def refused(self, notification: Notification, outcome: NotifyOutcome) -> None:
        """Count a notification that was not taken in."""
        label = self._label(notification.channel, notification.account, outcome, replayed=False)
        self._metrics.count_notifications({label: 1})

    def committed(
        self,
        size: int,
        started_ns: int,
        queued_ns: Sequence[int],
        notifications: Sequence[Notification],
        result: GroupResult,
    ) -> None:
        """Count a group. started_ns, queued_ns: by ``time.perf_counter_ns``, of the transaction and of each word."""
        now_ns = time.perf_counter_ns()
        self._metrics.commit_seconds.observe((now_ns - started_ns) / 1e9)
        self._metrics.commit_group_size.observe(size)
        if not notifications:
            return
        self._metrics.notify_seconds.observe_all_ns(now_ns - at_ns for at_ns in queued_ns)
        counts: Counter[tuple[str, str, NotifyOutcome, bool]] = Counter()
        for notification, verdict in zip(notifications, result.verdicts, strict=True):
            counts[notification.channel, notification.account, verdict.outcome, verdict.replayed] += 1
            if verdict.outcome not in _QUIET or verdict.paid_at_untrusted:
                _log_verdict(notification, verdict)
        self._count(counts)
        for intent in result.refunds:
            self._metrics.count_refunds(NotifyOutcome(intent.refund.reason).name, "PENDING")

    def _count(self, counts: Counter[tuple[str, str, NotifyOutcome, bool]]) -> None:
        by_label: Counter[NotifyLabel] = Counter()
        for (channel, account, outcome, replayed), count in counts.items():
            by_label[self._label(channel, account, outcome, replayed=replayed)] += count
        self._metrics.count_notifications(by_label)

    def _label(self, channel: str, account: str, outcome: NotifyOutcome, *, replayed: bool) -> NotifyLabel:
        known = self._accounts(channel, account)
        return NotifyLabel(channel if known else UNCONFIGURED, outcome.name, replayed)


def _log_verdict(notification: Notification, verdict: Verdict) -> None:
    _log.info(
        "notification_judged",
        payment_id=verdict.payment_id,
        attempt=verdict.attempt,
        outcome=verdict.outcome.name,
        replayed=verdict.replayed,
        paid_at_untrusted=verdict.paid_at_untrusted,
        channel_order_no=notification.channel_order_no,
        channel_trade_no=notification.channel_trade_no,
        amount_minor=notification.amount_minor,
        currency=notification.currency,
    )
