"""Close over real banks: nothing is closed while money may still come, and money that came first wins."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from paycore.channels.protocol import ChannelOrder
from paycore.domain.errors import ChannelUnavailableError, InvalidArgumentError, NotFoundError, PreconditionError
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import AttemptState, CaptureSource, CloseReason, NotifyOutcome, PaymentState, PayMethod
from paycore.store.rows import ChannelOrderRow
from paycore.usecases.attempts import NOT_EXIST_MARGIN_MS
from paycore.usecases.keys import ByChannelOrder, ByMerchantOrder, ByPaymentId, PaymentKey
from paycore.usecases.pay_open import OpenAttempt
from tests.support.bank import LEASE_MS, Town
from tests.support.core import LIMITS, VALIDITY_MS, check_money_rules

ONCE: dict[str, Any] = {"value": True, "times": 1}


async def opened(town: Town, *banks: str, **faults: Any) -> int:
    """A payment with an open page at each bank; faults are planted at all of them afterwards."""
    command = town.order()
    for bank in banks or ("bank_a",):
        result = await town.core.pay(command._replace(account=bank))
    for bank in banks or ("bank_a",):
        town.plant(command, bank=bank, **faults)
    payment_id: int = result.payment.payment_id
    return payment_id


async def close(town: Town, payment_id: int) -> Any:
    return await town.core.closer.close(ByPaymentId(payment_id))


async def refused(town: Town, payment_id: int, reason: str) -> PreconditionError:
    with pytest.raises(PreconditionError) as error:
        await close(town, payment_id)
    assert error.value.reason == reason
    return error.value


async def test_close_ends_every_attempt_at_its_bank_and_closes_the_payment(town: Town) -> None:
    payment_id = await opened(town, "bank_a", "bank_b")
    file = await close(town, payment_id)
    assert file.record.state == PaymentState.CLOSED
    assert file.record.outcome.close_reason == CloseReason.MERCHANT
    assert {row.state for row in file.record.attempts.values()} == {AttemptState.CLOSED}
    assert town.books(payment_id)["state"] == town.books(payment_id, 2, "bank_b")["state"] == "CLOSED"


async def test_close_of_a_closed_payment_returns_it_and_writes_nothing(town: Town) -> None:
    payment_id = await opened(town)
    first = await close(town, payment_id)
    with town.core.watch() as written:
        again = await close(town, payment_id)
    assert written.tables == {}
    assert again.record.outcome == first.record.outcome


async def test_close_by_every_key_finds_the_payment(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    keys: list[PaymentKey] = [
        ByPaymentId(payment_id),
        ByMerchantOrder(command.merchant_id, command.merchant_order_no),
        ByChannelOrder(format_channel_order_no(payment_id, 1)),
    ]
    for key in keys:
        file = await town.core.closer.close(key)
        assert (file.record.payment.payment_id, file.record.state) == (payment_id, PaymentState.CLOSED)


@pytest.mark.parametrize(
    "key", [ByPaymentId(1), ByMerchantOrder("shop", "never asked for"), ByChannelOrder("101")], ids=str
)
async def test_close_of_an_unknown_payment_is_not_found(town: Town, key: PaymentKey) -> None:
    with pytest.raises(NotFoundError):
        await town.core.closer.close(key)
    with pytest.raises(NotFoundError):
        await town.core.query.find(key)


@pytest.mark.parametrize(
    "key",
    [ByPaymentId(0), ByPaymentId(-1), ByPaymentId(2**63), ByMerchantOrder("", "1"), ByMerchantOrder("a", "\0")]
    + [ByChannelOrder(text) for text in ("", "1", "0101", "+101", "１０１")],
    ids=str,
)
async def test_close_by_a_key_that_names_nothing_is_invalid(town: Town, key: PaymentKey) -> None:
    with pytest.raises(InvalidArgumentError):
        await town.core.closer.close(key)


async def test_close_of_a_paid_payment_is_refused(town: Town) -> None:
    payment_id = await opened(town)
    town.user_pays(payment_id)
    await town.hand_on(payment_id)
    await refused(town, payment_id, "PAYMENT_PAID")


async def test_close_asks_first_and_takes_money_that_was_never_notified(town: Town) -> None:
    payment_id = await opened(town, notify_never=True)
    (trade_no,) = town.user_pays(payment_id)
    await refused(town, payment_id, "PAYMENT_PAID")
    outcome = (await town.file(payment_id)).record.outcome
    assert outcome is not None
    assert (outcome.channel_trade_no, outcome.source) == (trade_no, CaptureSource.QUERY)
    assert town.books(payment_id)["kept_minor"] > 0


async def test_close_of_two_attempts_of_which_one_is_paid_keeps_the_money(town: Town) -> None:
    payment_id = await opened(town, "bank_a", "bank_b", notify_never=True)
    town.user_pays(payment_id, 2, "bank_b")
    await refused(town, payment_id, "PAYMENT_PAID")
    assert (await town.file(payment_id)).record.state == PaymentState.PAID


async def test_close_that_is_answered_already_paid_is_a_success_of_the_payment(patient_town: Town) -> None:
    """The user pays between the query and the close: query again, and the money is kept."""
    town = patient_town
    payment_id = await opened(town, answer_delay_ms={"query": {"value": 1_000, "times": 1}}, notify_never=True)
    closing = asyncio.create_task(close(town, payment_id))
    async with asyncio.timeout(10):
        while any(fault["name"] == "answer_delay_ms.query" and fault["times_left"] for fault in faults(town)):
            await asyncio.sleep(0.005)
    # The bank has read its books for the query and holds the answer back.
    town.user_pays(payment_id)
    assert not closing.done()
    with pytest.raises(PreconditionError) as error:
        await closing
    assert error.value.reason == "PAYMENT_PAID"
    assert (await town.file(payment_id)).record.state == PaymentState.PAID
    assert town.books(payment_id)["state"] == "PAID"


def faults(town: Town) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = town.driver.http.get("/faults", params={"bank": "bank_a"}).json()["faults"]
    return found


NO_WORD: dict[str, dict[str, Any]] = {
    "query_error": {"error_500": {"query": True}},
    "query_hangs": {"hang_before_doing": {"query": True}},
    "query_nonsense": {"nonsense": {"query": "unknown_word"}},
    "close_error": {"error_500": {"close": True}},
    "close_hangs": {"hang_before_doing": {"close": True}},
    "close_in_progress": {"refuse": {"close": True}},
}


@pytest.mark.parametrize("fault", NO_WORD)
async def test_close_without_a_final_word_is_refused_and_can_be_asked_again(town: Town, fault: str) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    town.plant(command, **NO_WORD[fault])
    with town.core.watch() as written:
        error = await refused(town, payment_id, "ATTEMPT_STATE_UNKNOWN")
    assert error.retryable
    assert written.tables == {}
    assert (await town.core.pay(command)).attempt.state == AttemptState.OPEN
    clear: dict[str, Any] = {
        name: {key: {"value": value, "times": 1} for key, value in what.items()}
        for name, what in NO_WORD[fault].items()
    }
    town.plant(command, **clear)
    with pytest.raises(PreconditionError):
        await close(town, payment_id)
    assert (await close(town, payment_id)).record.state == PaymentState.CLOSED


async def test_close_that_timed_out_after_it_was_done_is_found_closed(town: Town) -> None:
    payment_id = await opened(town, hang_after_doing={"close": ONCE})
    await refused(town, payment_id, "ATTEMPT_STATE_UNKNOWN")
    assert (await close(town, payment_id)).record.state == PaymentState.CLOSED


async def test_close_while_a_charge_is_in_progress_is_refused(town: Town) -> None:
    command = town.order(method=PayMethod.CHARGE)
    town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 60_000})
    payment_id = (await town.core.pay(command, within_ms=400)).payment.payment_id
    await refused(town, payment_id, "ATTEMPT_STATE_UNKNOWN")
    assert (await town.file(payment_id)).record.state == PaymentState.OPEN


async def test_close_of_an_order_that_the_bank_does_not_know_waits_for_its_expiry(town: Town) -> None:
    """Not-exist is neither failed nor closed: some channels learn of an order only when the user scans."""
    command = town.order()
    town.plant(command, hang_before_doing={"create": ONCE})
    with pytest.raises(ChannelUnavailableError):
        await town.core.pay(command)
    (payment,) = town.core.snapshot()["payment"]
    await refused(town, payment.payment_id, "ATTEMPT_STATE_UNKNOWN")
    town.clock.advance(VALIDITY_MS + NOT_EXIST_MARGIN_MS - 10_000)
    await refused(town, payment.payment_id, "ATTEMPT_STATE_UNKNOWN")
    town.clock.advance(10_000)
    assert (await close(town, payment.payment_id)).record.state == PaymentState.CLOSED


async def test_close_while_an_attempt_is_being_opened_is_refused_until_its_lease_ends(town: Town) -> None:
    command = town.order()
    opening = OpenAttempt(
        command,
        ids=town.core.ids,
        limits=LIMITS,
        accounts=town.core.registry.code,
        schedule=town.core.schedule,
        lease_token="somebody",
        lease_ms=LEASE_MS,
    )
    record = (await town.core.writer.run(opening)).record
    payment_id = record.payment.payment_id
    order = (await refused(town, payment_id, "ATTEMPT_STATE_UNKNOWN")).metadata
    assert order == {"attempt": "1"}
    # The order reaches the bank only now: had the payment been closed, the user could still pay it.
    payment = record.payment
    channel = town.core.registry.channel("simbank")
    await channel.create(
        ChannelOrder(
            "bank_a",
            format_channel_order_no(payment_id, 1),
            payment.amount_minor,
            payment.currency,
            payment.subject,
            payment.return_url,
            PayMethod.REDIRECT,
            payment.expire_at_ms,
        )
    )
    await refused(town, payment_id, "ATTEMPT_STATE_UNKNOWN")
    town.clock.advance(LEASE_MS)
    assert (await close(town, payment_id)).record.state == PaymentState.CLOSED
    assert town.books(payment_id)["state"] == "CLOSED"


async def test_close_that_meets_a_new_attempt_ends_it_too(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pay opens a second bank after the closer has listed the attempts: they are listed again under the lock."""
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    end = town.core.conversations.end

    async def end_while_the_user_clicks(attempt: ChannelOrderRow) -> None:
        await end(attempt)
        if attempt.attempt == 1:
            await town.core.pay(command._replace(account="bank_b"))

    monkeypatch.setattr(town.core.conversations, "end", end_while_the_user_clicks)
    file = await close(town, payment_id)
    assert [row.state for row in file.record.attempts.values()] == [AttemptState.CLOSED] * 2
    assert town.books(payment_id, 2, "bank_b")["state"] == "CLOSED"


async def test_money_taken_after_close_goes_back(town: Town) -> None:
    payment_id = await opened(town, take_after_close=True)
    await close(town, payment_id)
    town.user_pays(payment_id)
    (verdict,) = await town.hand_on(payment_id)
    assert verdict.outcome == NotifyOutcome.LATE
    await town.refund()
    assert town.books(payment_id)["kept_minor"] == 0
    check_money_rules(town.core.snapshot())


async def test_close_of_an_order_whose_bank_says_unpaid_leaves_the_evidence_in_quarantine(town: Town) -> None:
    """A wrong word settles nothing, and it is not dropped either."""
    payment_id = await opened(town)
    await town.core.notify(town.core.word(payment_id, 1, "WRONG", amount_minor=1))
    file = await close(town, payment_id)
    assert file.record.state == PaymentState.CLOSED
    assert [row.is_open for row in file.quarantine] == [1]
