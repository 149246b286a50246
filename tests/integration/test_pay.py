"""Pay over real banks and all that goes wrong between them; the banks' own books have the last word."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from paycore.domain.errors import (
    AlreadyExistsError,
    ChannelUnavailableError,
    InvalidArgumentError,
    PreconditionError,
)
from paycore.domain.ids import MAX_ATTEMPTS, format_channel_order_no
from paycore.domain.verdicts import AttemptState, CaptureSource, PaymentState, PayMethod
from paycore.usecases.keys import ByPaymentId
from paycore.usecases.pay import NextAction
from paycore.usecases.pay_command import PayCommand
from paycore.usecases.pay_open import OpenAttempt
from tests.support.bank import CHANNEL_TIMEOUT_MS, LEASE_MS, Town
from tests.support.core import AMOUNT_MINOR, LIMITS, VALIDITY_MS, check_money_rules

CHARGE, QR, REDIRECT = PayMethod.CHARGE, PayMethod.QR, PayMethod.REDIRECT
ONCE: dict[str, Any] = {"value": True, "times": 1}
NO_ANSWER: dict[str, Any] = {
    "hang_before_doing": {"create": ONCE},
    "hang_after_doing": {"create": ONCE},
    "error_500": {"create": ONCE},
    "error_500_after_doing": {"create": ONCE},
    "nonsense": {"create": {"value": "broken_json", "times": 1}},
    "answer_delay_ms": {"create": {"value": 4 * CHANNEL_TIMEOUT_MS, "times": 1}},
}


async def refused(town: Town, command: PayCommand, reason: str, *, within_ms: int = 8_000) -> PreconditionError:
    with pytest.raises(PreconditionError) as error:
        await town.core.pay(command, within_ms=within_ms)
    assert error.value.reason == reason
    return error.value


# Opening


@pytest.mark.parametrize(
    ("method", "action"), [(REDIRECT, NextAction.REDIRECT), (QR, NextAction.SHOW_QR)], ids=["redirect", "qr"]
)
async def test_pay_opens_an_attempt_and_hands_out_its_credential(
    town: Town, method: PayMethod, action: NextAction
) -> None:
    command = town.order(method=method)
    with town.core.watch() as written:
        result = await town.core.pay(command)
    assert (result.state, result.next_action) == (PaymentState.OPEN, action)
    assert written.names() == {"payment", "merchant_order", "channel_order", "task"}
    payment, attempt = written.row("payment"), written.row("channel_order")
    assert (payment.amount_minor, payment.currency, payment.subject) == (AMOUNT_MINOR, "CNY", command.subject)
    assert (attempt.attempt, attempt.account, attempt.state) == (1, "bank_a", AttemptState.OPEN)
    assert (attempt.lease_until_ms, attempt.lease_token) == (0, "")
    assert attempt.credential.endswith(format_channel_order_no(payment.payment_id, 1))
    asked = town.books(payment.payment_id)
    assert (asked["amount_minor"], asked["expire_at_ms"]) == (AMOUNT_MINOR, payment.expire_at_ms)
    assert payment.expire_at_ms == attempt.expire_at_ms == payment.recorded_at_ms + VALIDITY_MS


async def test_pay_again_returns_the_same_attempt_and_writes_nothing(town: Town) -> None:
    command = town.order()
    first = await town.core.pay(command)
    with town.core.watch() as written:
        again = await town.core.pay(command)
    assert again == first
    assert written.tables == {}


async def test_pay_again_with_another_validity_keeps_the_first_expiry(town: Town) -> None:
    command = town.order(validity_ms=120_000)
    first = await town.core.pay(command)
    again = await town.core.pay(command._replace(validity_ms=240_000, account="bank_b"))
    assert again.payment.expire_at_ms == first.payment.expire_at_ms
    assert town.books(first.payment.payment_id, 2, "bank_b")["expire_at_ms"] == first.payment.expire_at_ms


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"amount_minor": AMOUNT_MINOR + 1}, ("amount_minor",)),
        ({"currency": "JPY"}, ("currency",)),
        ({"subject": "Coffee"}, ("subject",)),
        ({"return_url": "https://shop.example/back"}, ("return_url",)),
        ({"amount_minor": 1, "return_url": "https://shop.example/"}, ("amount_minor", "return_url")),
    ],
    ids=str,
)
async def test_pay_with_other_terms_is_refused_and_names_the_fields(
    town: Town, changes: dict[str, Any], fields: tuple[str, ...]
) -> None:
    command = town.order()
    await town.core.pay(command)
    with town.core.watch() as written, pytest.raises(AlreadyExistsError) as error:
        await town.core.pay(command._replace(**changes))
    assert error.value.fields == fields
    assert written.tables == {}


async def test_pay_clicked_many_times_at_once_makes_one_payment_and_one_attempt(town: Town) -> None:
    command = town.order()
    town.plant(command, answer_delay_ms={"create": 150})
    results = await asyncio.gather(*(town.core.pay(command) for _ in range(5)))
    assert len({(result.payment.payment_id, result.attempt.credential) for result in results}) == 1
    assert {result.next_action for result in results} == {NextAction.REDIRECT}
    rows = town.core.snapshot()
    assert [len(rows[name]) for name in ("payment", "merchant_order", "channel_order")] == [1, 1, 1]


async def test_pay_at_a_second_bank_opens_attempt_two_and_queues_the_first_to_be_closed(town: Town) -> None:
    command = town.order()
    first = await town.core.pay(command)
    second = await town.core.pay(command._replace(account="bank_b"))
    assert (second.payment, second.attempt.attempt) == (first.payment, 2)
    older, younger = sorted(town.core.snapshot()["channel_order"])
    assert older.superseded_at_ms == younger.recorded_at_ms
    assert younger.superseded_at_ms is None
    back = await town.core.pay(command)
    assert (back.attempt.attempt, back.attempt.superseded_at_ms) == (1, None)


async def test_pay_of_a_paid_payment_says_so_and_opens_nothing(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    town.user_pays(payment_id)
    await town.hand_on(payment_id)
    with town.core.watch() as written:
        for account in ("bank_a", "bank_b"):
            result = await town.core.pay(command._replace(account=account))
            assert (result.state, result.next_action, result.attempt) == (PaymentState.PAID, NextAction.NONE, None)
    assert written.tables == {}


async def test_pay_of_a_closed_payment_is_refused(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.closer.close(ByPaymentId(payment_id))
    await refused(town, command, "PAYMENT_CLOSED")
    await refused(town, command._replace(account="bank_b"), "PAYMENT_CLOSED")


async def test_pay_near_and_after_expiry_is_refused(town: Town) -> None:
    command = town.order()
    result = await town.core.pay(command)
    town.clock.advance(VALIDITY_MS - LIMITS.min_remaining_ms + 100)
    await refused(town, command._replace(account="bank_b"), "PAYMENT_EXPIRING")
    town.clock.advance(LIMITS.min_remaining_ms)
    await refused(town, command, "PAYMENT_EXPIRED")
    assert len((await town.file(result.payment.payment_id)).record.attempts) == 1


async def test_pay_for_the_sixty_fourth_attempt_is_refused(town: Town) -> None:
    command = town.order()
    town.plant(command, refuse={"create": True})
    for _ in range(MAX_ATTEMPTS):
        await refused(town, command, "CHANNEL_REFUSED")
    with town.core.watch() as written:
        await refused(town, command, "ATTEMPTS_EXHAUSTED")
    assert written.tables == {}
    assert len(town.core.snapshot()["channel_order"]) == MAX_ATTEMPTS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("amount_minor", 0),
        ("amount_minor", -1),
        ("amount_minor", 2**63),
        ("currency", ""),
        ("currency", "cny"),
        ("currency", "XYZ"),
        ("merchant_id", ""),
        ("merchant_id", "m" * 65),
        ("merchant_order_no", ""),
        ("merchant_order_no", "n" * 65),
        ("merchant_order_no", "a\0b"),
        ("merchant_order_no", "a\nb"),
        ("merchant_order_no", "a\u2028b"),
        ("subject", ""),
        ("subject", "s" * 129),
        ("subject", "tea\x07"),
        ("return_url", "shop.example"),
        ("return_url", "ftp://shop.example/"),
        ("return_url", "javascript:alert(1)"),
        ("return_url", "https://"),
        ("return_url", "https://shop.example/ /"),
        ("return_url", "https://shop.example/" + "x" * 1_024),
        ("return_url", "https://[::1"),
        ("validity", LIMITS.min_validity_ms - 1),
        ("validity", LIMITS.max_validity_ms + 1),
        ("validity", 0),
        ("channel", "wechat"),
        ("channel", ""),
        ("account", "bank_z"),
        ("method", 0),
        ("method", 9),
    ],
)
async def test_pay_that_breaks_a_rule_is_invalid_and_writes_nothing(town: Town, field: str, value: object) -> None:
    name = "validity_ms" if field == "validity" else field
    with town.core.watch() as written, pytest.raises(InvalidArgumentError) as error:
        await town.core.pay(town.order()._replace(**{name: value}))  # type: ignore[arg-type]  # what a row names
    assert [violation.field for violation in error.value.violations] == [field]
    assert written.tables == {}


async def test_pay_at_every_limit_is_taken(town: Town) -> None:
    command = town.order(
        merchant_id="m" * 64,
        merchant_order_no="订" * 64,
        subject="茶" * 128,
        amount_minor=2**63 - 1,
        currency="KWD",
        return_url="https://shop.example/" + "x" * (1_024 - 21),
        validity_ms=LIMITS.max_validity_ms,
    )
    result = await town.core.pay(command)
    assert result.next_action == NextAction.REDIRECT
    assert town.books(result.payment.payment_id)["amount_minor"] == 2**63 - 1


# The channel refuses or gives no word


async def test_pay_refused_by_the_channel_says_why_and_the_next_call_opens_another_attempt(town: Town) -> None:
    command = town.order()
    town.plant(command, refuse={"create": {"value": "NO_CONTRACT", "times": 1}})
    error = await refused(town, command, "CHANNEL_REFUSED")
    assert error.metadata["channel_code"] == "NO_CONTRACT"
    result = await town.core.pay(command)
    assert (result.attempt.attempt, result.next_action) == (2, NextAction.REDIRECT)
    first = (await town.file(result.payment.payment_id)).record.attempts[1]
    assert (first.state, first.failure_code) == (AttemptState.FAILED, "NO_CONTRACT")


@pytest.mark.parametrize("fault", NO_ANSWER)
async def test_pay_without_an_answer_is_asked_again_under_the_same_number(town: Town, fault: str) -> None:
    command = town.order()
    town.plant(command, **{fault: NO_ANSWER[fault]})
    with pytest.raises(ChannelUnavailableError) as error:
        await town.core.pay(command)
    assert (error.value.reason, error.value.retryable) == ("CHANNEL_UNKNOWN", True)
    (unknown,) = town.core.snapshot()["channel_order"]
    assert (unknown.state, unknown.failed_at_ms) == (AttemptState.UNKNOWN, None)
    result = await town.core.pay(command)
    assert (result.attempt.attempt, result.next_action) == (1, NextAction.REDIRECT)
    assert town.books(result.payment.payment_id)["expire_at_ms"] == result.payment.expire_at_ms
    assert len(town.core.snapshot()["channel_order"]) == 1


async def test_pay_without_an_answer_that_was_paid_all_the_same_is_found_by_the_query(town: Town) -> None:
    command = town.order()
    town.plant(command, hang_after_doing={"create": ONCE}, notify_never=True)
    with pytest.raises(ChannelUnavailableError):
        await town.core.pay(command)
    (payment,) = town.core.snapshot()["payment"]
    (trade_no,) = town.user_pays(payment.payment_id)
    result = await town.core.pay(command)
    assert (result.state, result.next_action) == (PaymentState.PAID, NextAction.NONE)
    outcome = (await town.file(payment.payment_id)).record.outcome
    assert outcome is not None
    assert (outcome.channel_trade_no, outcome.source) == (trade_no, CaptureSource.QUERY)


async def test_pay_left_by_a_process_that_died_waits_for_its_lease_then_asks_before_it_sends(town: Town) -> None:
    command = town.order()
    opened = await town.core.writer.run(
        OpenAttempt(
            command,
            ids=town.core.ids,
            limits=LIMITS,
            accounts=town.core.registry.code,
            schedule=town.core.schedule,
            lease_token="the dead process",
            lease_ms=LEASE_MS,
        )
    )
    waits = await town.core.pay(command, within_ms=400)
    assert (waits.next_action, waits.attempt.attempt) == (NextAction.WAIT, 1)
    assert not town.driver.has_order(format_channel_order_no(opened.record.payment.payment_id, 1))
    town.clock.advance(LEASE_MS)
    result = await town.core.pay(command)
    assert (result.next_action, result.attempt.attempt) == (NextAction.REDIRECT, 1)


async def test_pay_whose_caller_hung_up_is_brought_to_its_end(town: Town) -> None:
    command = town.order()
    town.plant(command, answer_delay_ms={"create": 150})
    caller = asyncio.create_task(town.core.pay(command))
    async with asyncio.timeout(10):
        while not town.core.snapshot()["channel_order"]:
            await asyncio.sleep(0.005)
    caller.cancel()
    await asyncio.wait([caller])
    await town.core.payer.drain()
    (row,) = town.core.snapshot()["channel_order"]
    assert row.state == AttemptState.OPEN
    assert row.credential


async def test_pay_at_its_deadline_answers_wait_and_the_next_call_finds_the_page(town: Town) -> None:
    command = town.order()
    town.plant(command, answer_delay_ms={"create": 300})
    result = await town.core.pay(command, within_ms=250)
    assert (result.state, result.next_action) == (PaymentState.OPEN, NextAction.WAIT)
    assert (await town.core.pay(command)).next_action == NextAction.REDIRECT


async def test_pay_whose_payment_is_paid_meanwhile_hands_out_no_page(patient_town: Town) -> None:
    town = patient_town
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    town.plant(command, bank="bank_b", answer_delay_ms={"create": 1_500})
    opening = asyncio.create_task(town.core.pay(command._replace(account="bank_b")))
    async with asyncio.timeout(10):
        while len(town.core.snapshot()["channel_order"]) < 2:
            await asyncio.sleep(0.005)
    town.user_pays(payment_id)
    await town.hand_on(payment_id)
    assert not opening.done()
    result = await opening
    assert (result.state, result.next_action) == (PaymentState.PAID, NextAction.NONE)


# Synchronous charges


async def test_charge_that_is_paid_at_once_is_paid_by_the_answer(town: Town) -> None:
    command = town.order(method=CHARGE)
    result = await town.core.pay(command)
    assert (result.state, result.next_action) == (PaymentState.PAID, NextAction.NONE)
    payment_id = result.payment.payment_id
    outcome = (await town.file(payment_id)).record.outcome
    assert outcome is not None
    assert outcome.source == CaptureSource.SYNC_ANSWER
    assert town.books(payment_id)["kept_minor"] == AMOUNT_MINOR
    (verdict,) = await town.hand_on(payment_id)
    assert (verdict.outcome.name, verdict.replayed) == ("ACCEPTED", True)


async def test_charge_that_is_refused_may_be_tried_again_as_another_attempt(town: Town) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, refuse={"create": {"value": "NO_MONEY", "times": 1}})
    assert (await refused(town, command, "CHANNEL_REFUSED")).metadata["channel_code"] == "NO_MONEY"
    result = await town.core.pay(command)
    assert (result.state, len((await town.file(result.payment.payment_id)).record.attempts)) == (PaymentState.PAID, 2)


async def test_charge_that_is_accepted_waits_for_the_notification(town: Town) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 300}, error_500={"query": True})
    paying = asyncio.create_task(town.core.pay(command))
    async with asyncio.timeout(10):
        while not town.core.snapshot()["payment"]:
            await asyncio.sleep(0.005)
    (payment,) = town.core.snapshot()["payment"]
    await town.hand_on(payment.payment_id)
    result = await paying
    assert (result.state, result.next_action) == (PaymentState.PAID, NextAction.NONE)
    outcome = (await town.file(payment.payment_id)).record.outcome
    assert outcome is not None
    assert outcome.source == CaptureSource.NOTIFICATION


async def test_charge_that_is_accepted_and_never_notified_is_polled(town: Town) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 250}, notify_never=True)
    result = await town.core.pay(command)
    assert result.state == PaymentState.PAID
    outcome = (await town.file(result.payment.payment_id)).record.outcome
    assert outcome is not None
    assert outcome.source == CaptureSource.QUERY


async def test_charge_that_is_accepted_and_fails_later_is_refused(town: Town) -> None:
    command = town.order(method=CHARGE)
    town.plant(
        command,
        charge_accepted_only={"value": {"result": "failure", "delay_ms": 250}, "times": 1},
        notify_never=True,
    )
    await refused(town, command, "CHANNEL_REFUSED")
    assert (await town.core.pay(command)).state == PaymentState.PAID


async def test_charge_without_a_word_at_the_deadline_answers_wait_and_is_no_failure(town: Town) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, charge_accepted_only={"result": "success", "delay_ms": 60_000})
    result = await town.core.pay(command, within_ms=600)
    assert (result.state, result.next_action) == (PaymentState.OPEN, NextAction.WAIT)
    assert result.attempt.state in (AttemptState.UNKNOWN, AttemptState.CREATING)
    await refused(town, command._replace(account="bank_b"), "CHARGE_UNKNOWN")
    again = await town.core.pay(command, within_ms=600)
    assert (again.next_action, again.attempt.attempt) == (NextAction.WAIT, 1)


async def test_charge_that_timed_out_after_it_was_done_is_found_by_the_query_and_never_charged_again(
    town: Town,
) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, hang_after_doing={"create": ONCE}, notify_never=True)
    result = await town.core.pay(command)
    assert (result.state, result.next_action) == (PaymentState.PAID, NextAction.NONE)
    again = await town.core.pay(command)
    assert again.state == PaymentState.PAID
    assert len(town.books(result.payment.payment_id)["captures"]) == 1


async def test_charge_that_timed_out_before_it_was_done_blocks_others_and_is_sent_again_under_its_number(
    town: Town,
) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, hang_before_doing={"create": ONCE})
    result = await town.core.pay(command, within_ms=CHANNEL_TIMEOUT_MS + 500)
    assert (result.next_action, result.attempt.state) == (NextAction.WAIT, AttemptState.UNKNOWN)
    with town.core.watch() as written:
        for other in ({"account": "bank_b"}, {"method": REDIRECT}, {"account": "bank_b", "method": QR}):
            error = await refused(town, command._replace(**other), "CHARGE_UNKNOWN")
            assert error.retryable
    assert written.tables == {}
    again = await town.core.pay(command)
    assert again.state == PaymentState.PAID
    file = await town.file(result.payment.payment_id)
    assert len(file.record.attempts) == 1
    assert len(town.books(result.payment.payment_id)["captures"]) == 1


async def test_page_that_was_never_opened_stays_shut_while_a_charge_is_unknown(town: Town) -> None:
    """R6: the older attempt is live, but taking it up again would send its order to the bank beside the charge."""
    command = town.order()
    town.plant(command, hang_before_doing={"create": ONCE})
    with pytest.raises(ChannelUnavailableError):
        await town.core.pay(command)
    charge = command._replace(account="bank_b", method=CHARGE)
    town.plant(charge, charge_accepted_only={"result": "success", "delay_ms": 60_000})
    result = await town.core.pay(charge, within_ms=500)
    assert result.next_action == NextAction.WAIT
    await refused(town, command, "CHARGE_UNKNOWN")
    assert not town.driver.has_order(format_channel_order_no(result.payment.payment_id, 1))


async def test_page_that_stands_open_is_shown_again_while_a_charge_is_unknown(town: Town) -> None:
    """It was opened before the charge: nothing opens by showing it."""
    command = town.order()
    first = await town.core.pay(command)
    charge = command._replace(account="bank_b", method=CHARGE)
    town.plant(charge, charge_accepted_only={"result": "success", "delay_ms": 60_000})
    await town.core.pay(charge, within_ms=500)
    again = await town.core.pay(command)
    assert (again.next_action, again.attempt.credential) == (NextAction.REDIRECT, first.attempt.credential)


async def test_charge_clicked_many_times_at_once_takes_the_money_once(town: Town) -> None:
    command = town.order(method=CHARGE)
    town.plant(command, answer_delay_ms={"create": 150})
    results = await asyncio.gather(*(town.core.pay(command) for _ in range(4)))
    assert {result.state for result in results} == {PaymentState.PAID}
    (payment_id,) = {result.payment.payment_id for result in results}
    assert len(town.books(payment_id)["captures"]) == 1
    check_money_rules(town.core.snapshot())
