"""One server opens attempts while another closes the same payments, over PostgreSQL and real banks."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, NamedTuple

import pytest

from paycore.client.errors import PaycoreRpcError
from paycore.client.sync import PaycoreClient
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import AttemptState, PaymentState
from paycore.v1 import payment_pb2
from tests.support.bank import Street
from tests.support.books import check_books, someone_waits
from tests.support.core import AMOUNT_MINOR, CHANNEL
from tests.support.databases import make_database
from tests.support.processes import Peer, peers
from tests.support.racers import payment_rows
from tests.support.simbank import wait_for

PAYMENTS = 40
CLOSE_GATE = "close.attempts_ended"
PAY_GATES = ("pay.before_create", "pay.after_create")
BEFORE_COMMIT = "store.before_commit"
LIVE = {AttemptState.CREATING, AttemptState.OPEN, AttemptState.UNKNOWN}

_orders = itertools.count(1)


class Scene(NamedTuple):
    """Two servers over one database, beside the banks; with a client of each."""

    url: str
    street: Street
    opener: Peer
    closer: Peer
    pays: PaycoreClient
    closes: PaycoreClient

    def pay(self, order_no: str, bank: str) -> Any:
        """Ask the opening server for an attempt; return its answer, or the reason why there is none."""
        return reason_or(
            lambda: self.pays.pay(
                merchant_id="shop",
                merchant_order_no=order_no,
                amount_minor=AMOUNT_MINOR,
                currency="CNY",
                subject="Tea",
                channel=CHANNEL,
                account=bank,
                method=payment_pb2.PAY_METHOD_REDIRECT,
            )
        )

    def close(self, payment_id: int) -> Any:
        """Ask the closing server; return the payment's state, or the reason why it is not closed."""
        return reason_or(lambda: PaymentState(self.closes.close(payment_id=payment_id).state).name)

    def user_pays(self, payment_id: int, attempt: int) -> str:
        """Pay at a bank that still takes money, and tell a server; return what it says; empty: nothing was paid."""
        order_no, bank = format_channel_order_no(payment_id, attempt), f"bank_{'ab'[attempt - 1]}"
        if not self.street.driver.has_order(order_no, bank):
            return ""
        paid = self.street.driver.pay(order_no, bank)
        if paid["result"] != "PAID":
            return ""
        (capture,) = paid["captures"]
        answer = random.choice((self.pays, self.closes)).notify(
            channel=CHANNEL,
            account=bank,
            channel_order_no=order_no,
            result=payment_pb2.CHANNEL_RESULT_SUCCESS,
            amount_minor=AMOUNT_MINOR,
            currency="CNY",
            channel_trade_no=capture["trade_no"],
            paid_at_ms=None,
        )
        return payment_pb2.NotifyOutcome.Name(answer.outcome).removeprefix("NOTIFY_OUTCOME_")

    def check(self, payment_id: int, closed: str) -> str:
        """Hold what may never be; return what became of the payment."""
        found = payment_rows(self.url, payment_id)
        state = PaymentState(found["payment_outcome"][0].state).name if "payment_outcome" in found else "OPEN"
        assert len(found.get("payment_outcome", [])) <= 1
        captured = {row.attempt for row in found.get("excess_payment", [])}
        live = {row.attempt for row in found["channel_order"] if row.state in LIVE} - captured
        if state == "CLOSED":
            assert live == set(), "an attempt may still be paid under CLOSED"
        if closed in {"PAID", "CLOSED"}:
            assert state == closed
        return state


def reason_or(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except PaycoreRpcError as error:
        return error.reason


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, street: Street) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("close")
    url = make_database("postgresql", folder)
    with (
        peers(url, folder, 2, gates=(CLOSE_GATE, *PAY_GATES, BEFORE_COMMIT), bank_url=street.bank.url) as (
            opener,
            closer,
        ),
        PaycoreClient(opener.address) as pays,
        PaycoreClient(closer.address) as closes,
    ):
        yield Scene(url, street, opener, closer, pays, closes)


def opened(scene: Scene) -> tuple[str, int]:
    """A payment with one open attempt."""
    order_no = f"open-and-close-{next(_orders)}"
    return order_no, scene.pay(order_no, "bank_a").payment_id


def settle(scene: Scene, payment_id: int) -> Counter[str]:
    """The user pays wherever a bank still takes money; whatever is not kept goes back."""
    told = Counter(scene.user_pays(payment_id, attempt) for attempt in (1, 2))
    found = payment_rows(scene.url, payment_id)
    state = PaymentState(found["payment_outcome"][0].state).name if "payment_outcome" in found else "OPEN"
    assert told["ACCEPTED"] <= (state == "PAID")
    assert len(found.get("refund", [])) == told["DUPLICATE"] + told["LATE"]
    return told


@pytest.mark.parametrize("gate", [CLOSE_GATE, *PAY_GATES])
def test_attempt_opened_while_its_payment_is_being_closed_is_ended_or_keeps_it_open(scene: Scene, gate: str) -> None:
    """One of the two is held at a gate until the other has answered."""
    order_no, payment_id = opened(scene)
    held = scene.closer if gate == CLOSE_GATE else scene.opener
    held.shut(gate)
    with ThreadPoolExecutor(1) as pool:
        try:
            if gate == CLOSE_GATE:
                closing = pool.submit(scene.close, payment_id)
                held.wait_held(gate)
                paid = scene.pay(order_no, "bank_b")
            else:
                paying = pool.submit(scene.pay, order_no, "bank_b")
                held.wait_held(gate)
                closed = scene.close(payment_id)
        finally:
            held.open(gate)
        if gate == CLOSE_GATE:
            closed = closing.result()
        else:
            paid = paying.result()
    state = scene.check(payment_id, closed)
    if gate == CLOSE_GATE:
        assert (paid.attempt.attempt, state) == (2, "CLOSED")
    settle(scene, payment_id)
    scene.check(payment_id, "")
    check_books(scene.url)


@pytest.mark.parametrize("held_pays", [True, False], ids=["pay_held", "close_held"])
def test_attempt_and_close_that_are_written_at_the_same_instant_wait_for_each_other(
    scene: Scene, held_pays: bool
) -> None:
    """Each reads what the other one writes, and both write what the other does not see: the payment's row is locked."""
    order_no, payment_id = opened(scene)
    held = scene.opener if held_pays else scene.closer
    with ThreadPoolExecutor(2) as pool:
        if held_pays:
            held.shut(BEFORE_COMMIT)
            paying = pool.submit(scene.pay, order_no, "bank_b")
            held.wait_held(BEFORE_COMMIT)
            second = closing = pool.submit(scene.close, payment_id)
        else:
            held.shut(CLOSE_GATE)
            closing = pool.submit(scene.close, payment_id)
            held.wait_held(CLOSE_GATE)
            held.shut(BEFORE_COMMIT)
            held.open(CLOSE_GATE)
            held.wait_held(BEFORE_COMMIT)
            second = paying = pool.submit(scene.pay, order_no, "bank_b")
        try:
            wait_for(lambda: second.done() or someone_waits(scene.url), "a lock that is waited for")
        finally:
            held.open(BEFORE_COMMIT)
        paying.result()
        closed = closing.result()
    scene.check(payment_id, closed)
    settle(scene, payment_id)
    check_books(scene.url)


def test_pays_and_closes_of_the_same_payments_at_the_same_instant_leave_no_money_behind(scene: Scene) -> None:
    """Every second time the user pays at the first bank meanwhile."""
    ends: Counter[str] = Counter()
    with ThreadPoolExecutor(3) as pool:
        for number in range(PAYMENTS):
            order_no, payment_id = opened(scene)
            together = Barrier(3)

            def at_once(call: Callable[..., Any], *arguments: Any, together: Barrier = together) -> Any:
                together.wait(20)
                return call(*arguments)

            paying = pool.submit(at_once, scene.pay, order_no, "bank_b")
            closing = pool.submit(at_once, scene.close, payment_id)
            user = pool.submit(at_once, scene.user_pays if number % 2 else lambda *_: "", payment_id, 1)
            closed, told = closing.result(), user.result()
            paying.result()
            state = scene.check(payment_id, closed)
            assert (told == "ACCEPTED") <= (state == "PAID")
            for attempt in (1, 2):
                scene.user_pays(payment_id, attempt)
            ends[scene.check(payment_id, "")] += 1
    check_books(scene.url)
    assert ends.keys() == {"PAID", "CLOSED"}
    assert not any("sweep_found" in peer.log() for peer in (scene.opener, scene.closer))
