"""The judge of the crash runs can fail: each lie that is planted into an honest day is reported by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from paycore.domain.ids import excess_refund_no, format_channel_order_no, format_channel_refund_no
from paycore.domain.verdicts import NotifyOutcome, PaymentState, RefundState
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from tests.crash.judge import BankCapture, BankNotice, BankRefund, Books, judge, report
from tests.crash.told import Told, ToldOutcome, ToldPayment, ToldRefund, ToldWord

NOW_MS = 1_800_000_000_000
PAID, CLOSED = 101 << 22, 102 << 22
AMOUNT = 1_234
BANKS = {1: "bank_a", 2: "bank_b"}


class World:
    """One payment that was paid twice, and one that was closed and then paid; all of it settled as it must be."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {
            name: []
            for name in (
                *("payment", "merchant_order", "channel_order", "payment_outcome", "excess_payment"),
                *("refund", "refund_try", "refund_result", "quarantine"),
            )
        }
        self.books = Books(set(), [], [], [])
        self.told = Told()
        for payment_id in (PAID, CLOSED):
            self._ask(payment_id, f"order-{payment_id}")
        self._attempt(PAID, 1)
        self._attempt(PAID, 2)
        self._attempt(CLOSED, 1)
        self._outcome(PAID, PaymentState.PAID, 1, "T1")
        self._capture(PAID, 1, "T1", NotifyOutcome.ACCEPTED)
        self._outcome(CLOSED, PaymentState.CLOSED, 0, "")
        self._capture(PAID, 2, "T2", NotifyOutcome.DUPLICATE)
        self._capture(CLOSED, 1, "T3", NotifyOutcome.LATE)

    def _ask(self, payment_id: int, number: str) -> None:
        self.rows["payment"].append(
            SimpleNamespace(payment_id=payment_id, merchant_order_no=number, amount_minor=AMOUNT)
        )
        self.rows["merchant_order"].append(SimpleNamespace(payment_id=payment_id, merchant_order_no=number))
        self.told.payments.add(ToldPayment(payment_id, number, AMOUNT))

    def _attempt(self, payment_id: int, attempt: int) -> None:
        self.rows["channel_order"].append(
            SimpleNamespace(payment_id=payment_id, attempt=attempt, failed_at_ms=None, expire_at_ms=NOW_MS)
        )
        self.books.orders.add(format_channel_order_no(payment_id, attempt))
        self.told.pages.add((payment_id, attempt))

    def _outcome(self, payment_id: int, state: PaymentState, attempt: int, trade_no: str) -> None:
        self.rows["payment_outcome"].append(
            SimpleNamespace(
                payment_id=payment_id, state=state, attempt=attempt, channel_trade_no=trade_no, amount_minor=AMOUNT
            )
        )
        self.told.outcomes.add(ToldOutcome(payment_id, state.name, attempt, trade_no))

    def _capture(self, payment_id: int, attempt: int, trade_no: str, outcome: NotifyOutcome) -> None:
        bank, number = BANKS[attempt], format_channel_order_no(payment_id, attempt)
        self.books.captures.append(BankCapture(bank, number, trade_no, AMOUNT))
        self.books.notices.append(BankNotice(bank, number, trade_no, AMOUNT, acknowledged=True, pending=False))
        self.told.words.append(ToldWord(bank, number, trade_no, AMOUNT, outcome.name, replayed=False))
        if outcome == NotifyOutcome.ACCEPTED:
            return
        key = {"payment_id": payment_id, "attempt": attempt, "channel_trade_no": trade_no}
        self.rows["excess_payment"].append(SimpleNamespace(**key, reason=outcome, amount_minor=AMOUNT))
        refund_no = excess_refund_no(attempt, trade_no)
        self.rows["refund"].append(SimpleNamespace(**key, refund_no=refund_no, amount_minor=AMOUNT))
        self.send_back(payment_id, refund_no, bank, trade_no, RefundState.REFUNDED)

    def send_back(self, payment_id: int, refund_no: str, bank: str, trade_no: str, result: RefundState) -> None:
        """A refund that bank and database agree on."""
        number = format_channel_refund_no(payment_id, refund_no, 1)
        key = {"payment_id": payment_id, "refund_no": refund_no, "seq": 1}
        self.rows["refund_try"].append(SimpleNamespace(**key, channel_refund_no=number))
        self.rows["refund_result"].append(SimpleNamespace(**key, result=result))
        self.told.refunds.add(ToldRefund(payment_id, refund_no))
        self.books.refunds.append(BankRefund(bank, number, trade_no, AMOUNT, result.name, ""))

    def return_by_the_bank(self) -> BankRefund:
        """Have the bank have sent the late capture back by itself, at the moment when it was asked to."""
        asked = self.books.refunds.pop()
        returned = asked._replace(refund_no=f"RETURN-{asked.trade_no}", result="RETURNED")
        self.books.refunds.extend([returned, asked._replace(result="REFUSED", code="OVER_CAPTURED")])
        self.rows["refund_result"][-1].result = RefundState.RETURNED_BY_CHANNEL
        return returned

    def findings(self) -> set[str]:
        """The rules that the judge finds broken."""
        return {finding.rule for finding in judge(self.books, self.rows, self.told, NOW_MS)}


Lie = Callable[[World], object]


def _double_refund(world: World) -> None:
    world.books.refunds.append(world.books.refunds[0]._replace(refund_no="another"))


def _refund_what_is_kept(world: World) -> None:
    world.books.refunds.append(world.books.refunds[0]._replace(trade_no="T1", refund_no="another"))


def _double_one_and_miss_another(world: World) -> None:
    # The sum over both payments is right: only each capture for itself shows it.
    world.books.refunds[1] = world.books.refunds[0]._replace(refund_no=world.books.refunds[1].refund_no)


def _refuse_a_second_sending(world: World) -> None:
    second = world.books.refunds[0]._replace(refund_no="another", result="REFUSED", code="OVER_CAPTURED")
    world.books.refunds.append(second)


def _shorten_a_refund(world: World) -> None:
    world.books.refunds[0] = world.books.refunds[0]._replace(amount_minor=AMOUNT - 1)


def _lose_a_word(world: World) -> None:
    # Nothing of the capture is on record, though its notification was acknowledged: its order was never paid.
    del world.rows["payment_outcome"][0]


def _tell_of_a_failure_that_is_not_there(world: World) -> None:
    number = format_channel_order_no(PAID, 1)
    world.told.words.append(ToldWord("bank_a", number, "", AMOUNT, "RECORDED", replayed=False))


def _lose_a_failure_of_a_bank(world: World) -> None:
    number = format_channel_order_no(PAID, 1)
    world.books.notices.append(BankNotice("bank_a", number, "", AMOUNT, acknowledged=True, pending=False))


def _make_up_a_return(world: World) -> None:
    world.rows["refund_result"][-1].result = RefundState.RETURNED_BY_CHANNEL


def _send_twice_what_the_bank_returned(world: World) -> None:
    world.return_by_the_bank()
    world.books.refunds.append(world.books.refunds[-1]._replace(refund_no="another"))


def _refund_what_the_bank_returned(world: World) -> None:
    returned = world.return_by_the_bank()
    world.books.refunds[-1] = returned._replace(refund_no=world.books.refunds[-1].refund_no, result="REFUNDED")


def _leave_a_return_unnoticed(world: World) -> None:
    world.return_by_the_bank()
    world.rows["refund_result"][-1].result = RefundState.REFUSED


def _tell_of_evidence_that_is_not_there(world: World) -> None:
    world.told.words.append(ToldWord("bank_a", "777701", "T9", AMOUNT, "UNKNOWN", replayed=False))


def _say_duplicate_of_what_is_kept(world: World) -> None:
    world.told.words[0] = world.told.words[0]._replace(outcome="DUPLICATE")


def _say_paid_of_what_is_closed(world: World) -> None:
    world.told.outcomes.add(ToldOutcome(CLOSED, "PAID", 0, ""))


def _keep_another_capture_than_told(world: World) -> None:
    world.told.outcomes.add(ToldOutcome(PAID, "PAID", 2, "T2"))


def _make_up_a_capture(world: World) -> None:
    world.rows["excess_payment"].append(
        SimpleNamespace(
            payment_id=PAID, attempt=2, channel_trade_no="T9", reason=NotifyOutcome.DUPLICATE, amount_minor=AMOUNT
        )
    )


def _note_another_amount(world: World) -> None:
    world.rows["payment_outcome"][0].amount_minor = AMOUNT + 1


def _leave_a_refund_unfinished(world: World) -> None:
    del world.rows["refund_result"][0]


def _note_a_refund_that_was_not_made(world: World) -> None:
    world.books.refunds[0] = world.books.refunds[0]._replace(result="ACCEPTED")


def _forget_a_refund(world: World) -> None:
    del world.rows["refund_try"][0]


def _leave_a_payment_open(world: World) -> None:
    world._ask(103 << 22, "order-open")
    world._attempt(103 << 22, 1)


def _leave_a_word_unsent(world: World) -> None:
    world.books.notices[0] = world.books.notices[0]._replace(pending=True)


def _charge_one_order_twice(world: World) -> None:
    world.rows["payment"][1].merchant_order_no = world.rows["payment"][0].merchant_order_no


LIES: dict[str, tuple[Lie, str]] = {
    "a doubled refund": (_double_refund, "a refund is doubled"),
    "a missing refund": (lambda world: world.books.refunds.pop(), "a refund is missing"),
    "a doubled refund beside a missing one": (_double_one_and_miss_another, "a refund is doubled"),
    "a missing refund beside a doubled one": (_double_one_and_miss_another, "a refund is missing"),
    "a second sending that the bank refused": (_refuse_a_second_sending, "a refund was sent twice"),
    "a refund of less": (_shorten_a_refund, "a refund of another amount"),
    "a refund of what is kept": (_refund_what_is_kept, "kept money was sent back"),
    "a refund that is not on record": (_forget_a_refund, "a refund that is not on record"),
    "a refund without a final word": (_leave_a_refund_unfinished, "a refund without a final word"),
    "a refund that only the database knows": (
        _note_a_refund_that_was_not_made,
        "bank and database differ about a refund",
    ),
    "an excess without intent": (lambda world: world.rows["refund"].pop(), "excess without exactly one refund"),
    "an excess without outcome": (lambda world: world.rows["payment_outcome"].pop(), "excess without an outcome"),
    "a refund of no excess": (lambda world: world.rows["excess_payment"].pop(), "a refund of what is no excess"),
    "a lost notification of a bank": (_lose_a_word, "an acknowledged notification is lost"),
    "a lost word of a client": (_lose_a_word, "an acknowledged word is lost"),
    "a capture that nobody judged": (_lose_a_word, "a capture that nobody judged"),
    "a lost failure": (_tell_of_a_failure_that_is_not_there, "an acknowledged word is lost"),
    "a lost failure of a bank": (_lose_a_failure_of_a_bank, "an acknowledged notification is lost"),
    "a return that no bank made": (_make_up_a_return, "bank and database differ about a refund"),
    "a return that nobody noticed": (_leave_a_return_unnoticed, "a refund without a final word"),
    "a refund of what the bank returned": (_refund_what_the_bank_returned, "a refund is doubled"),
    "two sendings of what the bank returned": (_send_twice_what_the_bank_returned, "a refund was sent twice"),
    "lost evidence": (_tell_of_evidence_that_is_not_there, "an acknowledged word is lost"),
    "a client told DUPLICATE of the kept capture": (_say_duplicate_of_what_is_kept, "an acknowledged word is lost"),
    "a client told PAID of a closed payment": (_say_paid_of_what_is_closed, "an outcome that was told is not so"),
    "a client told of another capture": (_keep_another_capture_than_told, "an outcome that was told is not so"),
    "a payment that is gone": (
        lambda world: world.rows["payment"].pop(),
        "a payment that Pay told of is lost",
    ),
    "a page that is gone": (lambda world: world.rows["channel_order"].pop(), "an attempt that Pay told of is lost"),
    "a refund told of and not made": (_leave_a_refund_unfinished, "a refund that was told is not made"),
    "two payments of one order": (_charge_one_order_twice, "two payments of one order"),
    "a capture that no bank knows": (_make_up_a_capture, "a capture that no bank knows"),
    "an amount that no bank took": (_note_another_amount, "another amount than captured"),
    "both outcomes": (
        lambda world: world._outcome(PAID, PaymentState.CLOSED, 0, ""),
        "two outcomes",
    ),
    "a payment left open": (_leave_a_payment_open, "a payment without an outcome"),
    "a word that is still to come": (_leave_a_word_unsent, "a word still to be sent"),
    "money kept of a closed payment": (lambda world: world.books.refunds.pop(), "the banks keep another sum"),
}


def test_judge_of_an_honest_day_finds_nothing() -> None:
    assert not World().findings()


def test_judge_of_a_capture_that_the_bank_returned_by_itself_finds_nothing() -> None:
    world = World()
    world.return_by_the_bank()
    # The sending that the return overtook was refused, and the next question heard of the return.
    first, key = world.rows["refund_try"][-1], vars(world.rows["refund_result"][-1])
    world.rows["refund_result"][-1] = SimpleNamespace(**key | {"result": RefundState.REFUSED})
    number = format_channel_refund_no(CLOSED, first.refund_no, 2)
    world.rows["refund_try"].append(SimpleNamespace(**vars(first) | {"seq": 2, "channel_refund_no": number}))
    world.rows["refund_result"].append(SimpleNamespace(**key | {"seq": 2}))
    assert not world.findings()


def test_judge_of_a_failure_that_a_bank_was_told_to_stop_sending_looks_for_it_on_record() -> None:
    world = World()
    _lose_a_failure_of_a_bank(world)
    world.rows["channel_order"][0].failed_at_ms = NOW_MS
    assert not world.findings()


@pytest.mark.parametrize(("plant", "rule"), LIES.values(), ids=LIES)
def test_judge_of_a_planted_lie_reports_it(plant: Lie, rule: str) -> None:
    world = copy.deepcopy(World())
    plant(world)
    findings = judge(world.books, world.rows, world.told, NOW_MS)
    assert rule in {finding.rule for finding in findings}
    assert rule in report(findings)


def test_judge_of_an_order_that_never_reached_its_bank_waits_for_it_a_while() -> None:
    world = World()
    _leave_a_payment_open(world)
    world.books.orders.remove(format_channel_order_no(103 << 22, 1))
    assert not judge(world.books, world.rows, world.told, NOW_MS + NOT_EXIST_MARGIN_MS)
    late = judge(world.books, world.rows, world.told, NOW_MS + 2 * NOT_EXIST_MARGIN_MS)
    assert {finding.rule for finding in late} == {"a payment without an outcome"}
