"""Tells of a committed group: counters once a group, and log lines for words that are out of the ordinary."""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import NotifyOutcome
from paycore.metrics import Metrics, NotifyLabel
from paycore.usecases.judge import GroupResult
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.rare import Judged

UNCONFIGURED = "unconfigured"
"""The metrics label of every channel that is not configured: its name is text from outside."""

MAX_LINES = 5
"""Log lines about single words of one group; the rest are counted in one line, so that a flood stays readable."""

_QUIET = frozenset({NotifyOutcome.ACCEPTED, NotifyOutcome.RECORDED})

_log = QuietLog()


class GroupReport:
    """Reports on the writer thread, and on others what was refused at the door."""

    def __init__(self, metrics: Metrics, codes: Mapping[tuple[str, str], int]) -> None:
        self._metrics = metrics
        self._channels = {code: channel for (channel, _), code in codes.items()}

    def refused(self, codes: Iterable[int], outcome: NotifyOutcome) -> None:
        """Count notifications that were not taken in, each by its account's code."""
        self._metrics.count_notifications(Counter(self._label(code, outcome, replayed=False) for code in codes))

    def committed(self, size: int, started_ns: int, queued_ns: Sequence[tuple[int, int]], result: GroupResult) -> None:
        """Count a group. started_ns: of the transaction; queued_ns: since when how many words wait. Both by
        ``time.perf_counter_ns``."""
        now_ns = time.perf_counter_ns()
        self._metrics.commit_seconds.observe((now_ns - started_ns) / 1e9)
        self._metrics.commit_group_size.observe(size)
        for at_ns, words in queued_ns:
            self._metrics.notify_seconds.observe_same(now_ns - at_ns, words)
        self._count(result.counts)
        for intent in result.refunds:
            self._metrics.count_refunds(NotifyOutcome(intent.refund.reason).name, "PENDING")
        _log_odd(result.rare)
        if result.untrusted:
            _log.info("paid_at_untrusted", accepted=result.untrusted)

    def _count(self, counts: Sequence[tuple[int, int, bool, int]]) -> None:
        by_label: Counter[NotifyLabel] = Counter()
        for code, outcome, replayed, count in counts:
            by_label[self._label(code, NotifyOutcome(outcome), replayed=replayed)] += count
            if outcome == NotifyOutcome.THROTTLED:
                self._metrics.quarantine_throttled.labels(self._channels.get(code, UNCONFIGURED)).inc(count)
        self._metrics.count_notifications(by_label)

    def _label(self, code: int, outcome: NotifyOutcome, *, replayed: bool) -> NotifyLabel:
        return NotifyLabel(self._channels.get(code, UNCONFIGURED), outcome.name, replayed)


def _log_odd(judged: Sequence[Judged]) -> None:
    odd = [one for one in judged if one.verdict.outcome not in _QUIET or one.verdict.paid_at_untrusted]
    for notification, verdict in odd[:MAX_LINES]:
        _log_verdict(notification, verdict)
    if len(odd) > MAX_LINES:
        outcomes = Counter(verdict.outcome.name for _, verdict in odd[MAX_LINES:])
        _log.info("notifications_judged", more=len(odd) - MAX_LINES, outcomes=dict(outcomes))


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
