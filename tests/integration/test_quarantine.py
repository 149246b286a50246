"""Quarantine judged again beside real banks: each verdict that changes, with the money in the banks' own books."""

from __future__ import annotations

from typing import Any

import pytest

from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome, PaymentState
from tests.support.bank import Town
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, check_money_rules
from tests.support.quarantine import (
    assert_only_back,
    evidence_of,
    examine,
    the_row,
    verdicts_of,
)

WRONG_MINOR = 999


async def paid_twice_on_one_page(town: Town, **faults: Any) -> tuple[int, list[str]]:
    """A payment whose user was charged twice by one bank order; the second capture lies in quarantine."""
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    town.plant(command, **faults)
    trade_nos = town.user_pays(payment_id, pay_twice_on_page=True)
    verdicts = [await town.core.notify(word_of_bank(town, payment_id, trade_no)) for trade_no in trade_nos]
    assert [one.outcome for one in verdicts] == [NotifyOutcome.ACCEPTED, NotifyOutcome.SECOND_CAPTURE]
    return payment_id, trade_nos


def word_of_bank(town: Town, payment_id: int, trade_no: str, **changes: Any) -> Any:
    """The bank's word about a capture, as a notification brings it."""
    return town.core.word(payment_id, 1, trade_no, **changes)


async def captured_wrong(town: Town, *, amount_minor: int = WRONG_MINOR, **faults: Any) -> tuple[int, str]:
    """A payment of which the bank took another amount than was asked; its word lies in quarantine."""
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    town.plant(command, **faults)
    (trade_no,) = town.user_pays(payment_id, captured_amount_minor=amount_minor)
    verdict = await town.core.notify(word_of_bank(town, payment_id, trade_no, amount_minor=amount_minor))
    assert verdict.outcome == NotifyOutcome.MISMATCH
    return payment_id, trade_no


async def test_second_capture_that_the_bank_tells_of_too_goes_back_and_the_first_is_kept(town: Town) -> None:
    payment_id, (first, second) = await paid_twice_on_one_page(town)
    result = await examine(town.core)
    assert (result.done, result.put_off) == (1, 0)
    row = the_row(town.core, NotifyOutcome.SECOND_CAPTURE)
    assert (row.is_open, verdicts_of(row)) == (0, ["confirmed"])
    (excess,) = (await town.file(payment_id)).record.excess
    assert (excess.channel_trade_no, excess.reason) == (second, NotifyOutcome.SECOND_CAPTURE)
    assert excess.received_at_ms == row.first_seen_at_ms
    await assert_only_back(town, payment_id, second)
    assert town.books(payment_id)["kept_minor"] == AMOUNT_MINOR
    # The word again is a replay, and opens nothing.
    replay = await town.core.notify(word_of_bank(town, payment_id, second))
    assert (replay.outcome, replay.replayed) == (NotifyOutcome.SECOND_CAPTURE, True)
    assert evidence_of(town.core, only_open=True) == []
    assert first != second


async def test_second_serial_of_one_capture_stays_for_a_person_and_moves_no_money(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    (first,) = town.user_pays(payment_id)
    await town.core.notify(word_of_bank(town, payment_id, first))
    await town.core.notify(word_of_bank(town, payment_id, "SERIAL-2"))
    result = await examine(town.core)
    assert (result.done, result.put_off) == (0, 1)
    assert the_row(town.core, NotifyOutcome.SECOND_CAPTURE).is_open
    await assert_only_back(town, payment_id)


async def test_recorded_serial_that_the_bank_does_not_know_keeps_the_second_in_quarantine(town: Town) -> None:
    """The bank told one capture under two serials, and knows the second one only."""
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    (real,) = town.user_pays(payment_id)
    await town.core.notify(word_of_bank(town, payment_id, "SERIAL-1"))
    await town.core.notify(word_of_bank(town, payment_id, real))
    assert (await examine(town.core)).done == 0
    assert the_row(town.core, NotifyOutcome.SECOND_CAPTURE).is_open
    await assert_only_back(town, payment_id)


async def test_wrong_amount_that_the_bank_really_took_goes_back_once_there_is_an_outcome(town: Town) -> None:
    payment_id, trade_no = await captured_wrong(town)
    assert (await examine(town.core)).done == 1
    row = the_row(town.core, NotifyOutcome.MISMATCH)
    assert (row.is_open, verdicts_of(row)) == (0, ["confirmed"])
    file = await town.file(payment_id)
    (excess,) = file.record.excess
    assert (excess.reason, excess.amount_minor) == (NotifyOutcome.MISMATCH, WRONG_MINOR)
    assert (file.record.state, file.refunds) == (PaymentState.OPEN, [])
    await assert_only_back(town, payment_id)
    town.core.clock.advance(VALIDITY_MS + 1)  # type: ignore[attr-defined]  # the clocks of tests can be shifted
    closed = await town.core.closer.close_payment(payment_id, CloseReason.EXPIRED)
    assert closed.state == PaymentState.CLOSED
    await assert_only_back(town, payment_id, trade_no)
    assert town.books(payment_id)["kept_minor"] == 0


async def test_wrong_amount_on_a_paid_payment_goes_back_at_once(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    (kept,) = town.user_pays(payment_id, 1, "bank_a")
    (wrong,) = town.user_pays(payment_id, 2, "bank_b", captured_amount_minor=WRONG_MINOR)
    await town.core.notify(town.core.word(payment_id, 1, kept))
    await town.core.notify(town.core.word(payment_id, 2, wrong, amount_minor=WRONG_MINOR))
    assert (await examine(town.core)).done == 1
    await assert_only_back(town, payment_id, wrong, bank="bank_b", attempt=2)
    assert town.kept_minor(payment_id, (1, "bank_a"), (2, "bank_b")) == AMOUNT_MINOR


async def test_wrong_word_about_a_right_capture_is_refuted_and_the_banks_own_word_is_kept(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    (trade_no,) = town.user_pays(payment_id)
    wrong = await town.core.notify(word_of_bank(town, payment_id, trade_no, amount_minor=WRONG_MINOR))
    assert wrong.outcome == NotifyOutcome.MISMATCH
    assert (await examine(town.core)).done == 1
    row = the_row(town.core, NotifyOutcome.MISMATCH)
    assert (row.is_open, verdicts_of(row), row.raw) == (0, ["refuted"], b'{"result": "SUCCESS"}')
    outcome = (await town.file(payment_id)).record.outcome
    assert outcome is not None
    assert (outcome.state, outcome.channel_trade_no, outcome.amount_minor) == (
        PaymentState.PAID,
        trade_no,
        AMOUNT_MINOR,
    )
    await assert_only_back(town, payment_id)
    # The wrong word again is not on record, so it is looked at again, and refuted again: no money, nothing lost.
    assert (await town.core.notify(word_of_bank(town, payment_id, trade_no, amount_minor=WRONG_MINOR))).outcome == 5
    assert the_row(town.core, NotifyOutcome.MISMATCH).is_open
    await examine(town.core, after_ms=86_400_000)
    assert verdicts_of(the_row(town.core, NotifyOutcome.MISMATCH)) == ["refuted", "refuted"]
    await assert_only_back(town, payment_id)


async def test_word_that_contradicts_a_kept_capture_stays_for_a_person(town: Town) -> None:
    """The bank first told the right amount, which is kept; its books say another."""
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    (trade_no,) = town.user_pays(payment_id, captured_amount_minor=WRONG_MINOR)
    assert (await town.core.notify(word_of_bank(town, payment_id, trade_no))).outcome == NotifyOutcome.ACCEPTED
    wrong = await town.core.notify(word_of_bank(town, payment_id, trade_no, amount_minor=WRONG_MINOR))
    assert wrong.outcome == NotifyOutcome.MISMATCH
    for after_ms in (0, 5_000, 86_400_000):
        assert (await examine(town.core, after_ms)).done == 0
    assert the_row(town.core, NotifyOutcome.MISMATCH).is_open
    assert (await town.file(payment_id)).record.excess == []
    await assert_only_back(town, payment_id)


@pytest.mark.parametrize(
    "faults",
    [
        {"nonsense": {"query": "wrong_number"}},
        {"nonsense": {"query": "wrong_types"}},
        {"nonsense": {"query": "unknown_word"}},
        {"error_500": {"query": True}},
        {"hang_before_doing": {"query": True}},
    ],
    ids=lambda faults: "-".join(f"{name}-{value['query']}" for name, value in faults.items()),
)
async def test_second_capture_stays_while_the_bank_gives_no_usable_answer(town: Town, faults: dict[str, Any]) -> None:
    payment_id, (_, second) = await paid_twice_on_one_page(town, **{k: _times(v) for k, v in faults.items()})
    result = await examine(town.core)
    assert (result.done, result.put_off) == (0, 1)
    assert the_row(town.core, NotifyOutcome.SECOND_CAPTURE).is_open
    await assert_only_back(town, payment_id)
    # The fault holds for the first answer alone: the next age finds the money.
    assert (await examine(town.core, after_ms=5_000)).done == 1
    await assert_only_back(town, payment_id, second)


def _times(fault: dict[str, Any]) -> dict[str, Any]:
    return {operation: {"value": value, "times": 1} for operation, value in fault.items()}


async def test_conflict_stays_for_a_person_whatever_the_bank_says(town: Town) -> None:
    command = town.order()
    payment_id = (await town.core.pay(command)).payment.payment_id
    (trade_no,) = town.user_pays(payment_id)
    verdict = await town.core.notify(word_of_bank(town, payment_id, trade_no, account="bank_b"))
    assert verdict.outcome == NotifyOutcome.CONFLICT
    for after_ms in (0, 5_000, 86_400_000):
        assert await examine(town.core, after_ms) == (0, 0, 0, False)
    assert the_row(town.core, NotifyOutcome.CONFLICT).is_open
    assert (await town.file(payment_id)).record.state == PaymentState.OPEN


async def test_unknown_word_is_kept_when_its_order_appears_as_of_when_it_was_first_seen(town: Town) -> None:
    core = town.core
    payment_id = core.ids.draw()
    seen_ms = core.clock.now_ms()
    word = core.word(payment_id, raw=b"first", headers='{"a":"b"}')
    assert (await core.notify(word)).outcome == NotifyOutcome.UNKNOWN
    assert await examine(core) == (0, 0, 0, False)
    assert the_row(core, NotifyOutcome.UNKNOWN).is_open
    await make_with_id(town, payment_id)
    # Long past the expiry by arrival: what counts is when it was first seen.
    assert (await examine(core, after_ms=2 * VALIDITY_MS)).done == 1
    row = the_row(core, NotifyOutcome.UNKNOWN)
    assert (row.is_open, verdicts_of(row), row.raw, row.headers, row.arrivals) == (
        0,
        ["judged"],
        b"first",
        '{"a":"b"}',
        1,
    )
    outcome = (await town.file(payment_id)).record.outcome
    assert outcome is not None
    assert outcome.state == PaymentState.PAID
    assert outcome.received_at_ms == row.first_seen_at_ms
    assert abs(outcome.received_at_ms - seen_ms) < 5_000
    # The word again is a replay of what was kept, and opens nothing.
    replay = await core.notify(word)
    assert (replay.outcome, replay.replayed) == (NotifyOutcome.ACCEPTED, True)
    assert evidence_of(core, only_open=True) == []
    check_money_rules(core.snapshot())


async def test_unknown_words_become_each_what_they_are_once_the_order_is_there(town: Town) -> None:
    core = town.core
    payment_id = core.ids.draw()
    words = {
        "ACCEPTED": core.word(payment_id, 1, "T1"),
        "DUPLICATE": core.word(payment_id, 2, "T2"),
        "MISMATCH": core.word(payment_id, 3, "T3", amount_minor=WRONG_MINOR),
        "RECORDED": core.failure(payment_id, 3),
    }
    for place, word in enumerate(words.values()):
        seen = word._replace(received_at_ms=core.clock.now_ms() - 100 + place)
        assert (await core.notify(seen)).outcome == NotifyOutcome.UNKNOWN
    await make_with_id(town, payment_id, "bank_a", "bank_b", "bank_c")
    assert (await examine(core)).done == 4
    resolved = {row.resolutions.split("judged ")[1].split('"')[0] for row in evidence_of(core) if not row.is_open}
    assert resolved == set(words)
    file = await town.file(payment_id)
    assert file.record.state == PaymentState.PAID
    assert [(row.reason, row.attempt) for row in file.record.excess] == [(NotifyOutcome.DUPLICATE, 2)]
    assert file.record.attempts[3].state == AttemptState.FAILED
    # What is itself evidence lies there under a row of its own, with the raw message and its own first sight.
    (open_row,) = evidence_of(core, only_open=True)
    assert (open_row.reason, open_row.raw) == (NotifyOutcome.MISMATCH, b'{"result": "SUCCESS"}')
    check_money_rules(core.snapshot())


async def make_with_id(town: Town, payment_id: int, *accounts: str) -> None:
    """The order of words that came before it: written under the id that they name."""
    core = town.core
    drawn = core.ids.draw
    core.ids.draw = lambda: payment_id  # type: ignore[method-assign]  # the id is known beforehand here
    try:
        assert await core.make_payment(*(accounts or ("bank_a",))) == payment_id
    finally:
        core.ids.draw = drawn  # type: ignore[method-assign]  # as it was
    assert format_channel_order_no(payment_id, 1)
