"""A group of notifications judged without haste: one word after the other, on dictionaries, by the plain decision.

The order is the real one's. Within a group, the first success in time of each payment is accepted before anything else
is looked at, unless the payment holds excess; then all other words are judged in the order they came.
"""

from __future__ import annotations

from collections.abc import Sequence

from paycore.domain.decision import Facts, Moment, decide
from paycore.domain.ids import ChannelOrderNo, created_at_ms, parse_channel_order_no
from paycore.domain.notification import Notification
from paycore.domain.verdicts import ChannelResult, NotifyOutcome, PaymentState, Recorded, VerdictFlag
from tests.support.core import ACCOUNTS, AMOUNT_MINOR, CHANNEL

Answer = tuple[int, int, int]
"""(packed verdict, payment_id, attempt)."""

NOT_ON_RECORD = {NotifyOutcome.UNKNOWN, NotifyOutcome.CONFLICT, NotifyOutcome.MISMATCH, NotifyOutcome.SECOND_CAPTURE}


class PlainPayment:
    """What is on record about a payment of AMOUNT_MINOR CNY with an attempt at bank A and one at bank B."""

    def __init__(self, payment_id: int, expire_at_ms: int) -> None:
        self.payment_id = payment_id
        self.expire_at_ms = expire_at_ms
        self.outcome: tuple[int, int, str] | None = None
        self.untrusted = False
        self.excess: set[tuple[int, str, int]] = set()
        self.failed: set[int] = set()
        self.ended: set[int] = set()

    def captures(self) -> dict[int, list[tuple[str, int]]]:
        """Attempt -> (trade number, outcome) of its captures."""
        found: dict[int, list[tuple[str, int]]] = {1: [], 2: []}
        if self.outcome and self.outcome[0] == PaymentState.PAID:
            found[self.outcome[1]].append((self.outcome[2], NotifyOutcome.ACCEPTED))
        for attempt, trade_no, reason in self.excess:
            found[attempt].append((trade_no, reason))
        return found


class PlainJudge:
    """Judges groups of words about these payments."""

    def __init__(self, payments: Sequence[PlainPayment], made_at_ms: int) -> None:
        self.payments = {one.payment_id: one for one in payments}
        assert {created_at_ms(one) for one in self.payments} == {made_at_ms}

    def judge(self, words: Sequence[Notification]) -> list[Answer]:
        """Answer a group, in its order."""
        answers: dict[int, Answer] = {}
        for place, word in enumerate(words):
            if self._is_first_in_time(word):
                answers[place] = self._judge(word)
        for place, word in enumerate(words):
            if place not in answers:
                answers[place] = self._judge(word)
        return [answers[place] for place in range(len(words))]

    def _is_first_in_time(self, word: Notification) -> bool:
        order, payment = self._find(word)
        if order is None or payment is None or word.result != ChannelResult.SUCCESS:
            return False
        # An attempt's failure changes nothing here: money decides.
        return not payment.excess and self._decide(word, order, payment) & 0xFF == NotifyOutcome.ACCEPTED

    def _find(self, word: Notification) -> tuple[ChannelOrderNo | None, PlainPayment | None]:
        order = parse_channel_order_no(word.channel_order_no)
        if order is None or order.payment_id not in self.payments or order.attempt > 2:
            return None, None
        return order, self.payments[order.payment_id]

    def _judge(self, word: Notification) -> Answer:
        order, payment = self._find(word)
        if order is None or payment is None:
            return NotifyOutcome.UNKNOWN, 0, 0
        if word.result == ChannelResult.FAILURE:
            return self._fail(word, order, payment), *order
        packed = self._decide(word, order, payment)
        if not packed & VerdictFlag.REPLAYED:
            self._record(word, order, payment, packed)
        return packed, *order

    def _fail(self, word: Notification, order: ChannelOrderNo, payment: PlainPayment) -> int:
        if not _is_of_its_account(word, order):
            return NotifyOutcome.CONFLICT
        if order.attempt in payment.failed:
            return NotifyOutcome.RECORDED | VerdictFlag.REPLAYED
        payment.failed.add(order.attempt)
        if not payment.captures()[order.attempt]:
            payment.ended.add(order.attempt)
        return NotifyOutcome.RECORDED

    def _decide(self, word: Notification, order: ChannelOrderNo, payment: PlainPayment) -> int:
        captures = payment.captures()
        right = (word.amount_minor, word.currency) == (AMOUNT_MINOR, "CNY")
        same = [outcome for trade_no, outcome in captures[order.attempt] if trade_no == word.channel_trade_no]
        recorded = Recorded.NONE
        if captures[order.attempt]:
            recorded = Recorded.OTHER_TRADE if not same else Recorded.SAME if right else Recorded.OTHER_TERMS
        facts = Facts(
            known=True,
            account_matches=_is_of_its_account(word, order),
            recorded=recorded,
            recorded_outcome=same[0] if recorded == Recorded.SAME else 0,
            terms_match=right,
            state=payment.outcome[0] if payment.outcome else PaymentState.OPEN,
            other_live=any(
                other != order.attempt and other not in payment.ended and not captures[other] for other in (1, 2)
            ),
            created_at_ms=created_at_ms(payment.payment_id),
            expire_at_ms=payment.expire_at_ms,
        )
        packed = decide(facts, Moment(word.paid_at_ms, word.received_at_ms, 0))
        kept_untrusted = payment.untrusted and packed & 0xFF == NotifyOutcome.ACCEPTED
        return packed | (VerdictFlag.PAID_AT_UNTRUSTED if packed & VerdictFlag.REPLAYED and kept_untrusted else 0)

    def _record(self, word: Notification, order: ChannelOrderNo, payment: PlainPayment, packed: int) -> None:
        outcome = NotifyOutcome(packed & 0xFF)
        if outcome == NotifyOutcome.ACCEPTED:
            payment.outcome = (PaymentState.PAID, order.attempt, word.channel_trade_no)
            payment.untrusted = bool(packed & VerdictFlag.PAID_AT_UNTRUSTED)
        elif outcome not in NOT_ON_RECORD:
            payment.excess.add((order.attempt, word.channel_trade_no, outcome))
        if packed & VerdictFlag.CLOSES:
            payment.outcome = (PaymentState.CLOSED, 0, "")


def _is_of_its_account(word: Notification, order: ChannelOrderNo) -> bool:
    return (word.channel, word.account) == (CHANNEL, ACCOUNTS[order.attempt - 1])
