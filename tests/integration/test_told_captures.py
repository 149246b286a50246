"""A bank took money twice on one page and told nobody: all that it says when asked is judged or kept."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from paycore._wire import Batch
from paycore.domain.verdicts import NotifyOutcome, TaskKind
from paycore.usecases.quarantine import QuarantineLimits
from tests.support.bank import Street, Town, a_town
from tests.support.books import run
from tests.support.core import AMOUNT_MINOR, check_money_rules
from tests.support.quarantine import an_examiner, the_row
from tests.support.repair import Repair
from tests.support.sweeping import Sweeps

A_MINUTE_MS = 60_000


class KilledError(BaseException):
    """The process is gone: whoever would have gone on does not."""


@pytest.fixture
async def one_word_town(street: Street, db_url: str) -> AsyncIterator[Town]:
    """A town whose quarantine takes one word in of each source, and no more for ever."""
    async with a_town(db_url, street, quarantine_limits=QuarantineLimits(burst=1, per_minute=0)) as town:
        yield town


async def taken_twice(town: Town) -> int:
    """The user paid twice on one page, and no word of it comes."""
    command = town.order()
    town.plant(command, notify_never=True)
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    assert len(town.user_pays(payment_id, pay_twice_on_page=True)) == 2
    town.clock.advance(5_000)
    return payment_id


def killed_at(town: Town, monkeypatch: pytest.MonkeyPatch, *, judged: bool) -> None:
    """Let the process die at the first commit that judges money: just after it, or before."""
    take = town.core.writer.take

    async def dying(batch: Batch) -> None:
        if judged:
            await take(batch)
        raise KilledError

    monkeypatch.setattr(town.core.writer, "take", dying)


async def repaired(town: Town) -> None:
    """Let the jobs do their part for a while."""
    repair, examiner = Repair(town.core), an_examiner(town.core)
    for _ in range(4):
        await repair.run("recoverer")
        await examiner.run_once()
        await town.core.refunder.run_once()
        town.clock.advance(A_MINUTE_MS)


def check_charged_once(town: Town, payment_id: int) -> None:
    check_money_rules(town.core.snapshot())
    assert town.kept_minor(payment_id, (1, "bank_a")) == AMOUNT_MINOR


async def test_second_capture_of_one_answer_is_kept_as_one_word_and_goes_back(town: Town) -> None:
    payment_id = await taken_twice(town)
    await Repair(town.core).run("recoverer")
    row = the_row(town.core, NotifyOutcome.SECOND_CAPTURE)
    assert (row.payment_id, row.attempt, row.arrivals, row.is_open) == (payment_id, 1, 1, 1)
    await repaired(town)
    check_charged_once(town, payment_id)


async def test_second_capture_goes_back_though_the_process_died_when_the_first_was_judged(
    town: Town, street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment_id = await taken_twice(town)
    killed_at(town, monkeypatch, judged=True)
    with pytest.raises(KilledError):
        await Repair(town.core).run("recoverer")
    assert (await town.file(payment_id)).record.captured_attempts() == {1}
    async with a_town(town.core.url, street) as again:
        again.clock.advance(A_MINUTE_MS)
        await repaired(again)
        check_charged_once(again, payment_id)


async def test_second_capture_goes_back_though_the_allowance_of_the_quarantine_is_used_up(one_word_town: Town) -> None:
    town = one_word_town
    assert (await town.core.notify(town.core.word(7))).outcome is NotifyOutcome.UNKNOWN
    payment_id = await taken_twice(town)
    await repaired(town)
    check_charged_once(town, payment_id)


async def test_sweep_has_the_first_capture_judged_of_an_answer_whose_second_lies_in_quarantine(
    town: Town, street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    payment_id = await taken_twice(town)
    killed_at(town, monkeypatch, judged=False)
    with pytest.raises(KilledError):
        await Repair(town.core).run("recoverer")
    run(town.core.url, f"DELETE FROM task WHERE kind = {TaskKind.QUERY:d}")
    assert (await town.file(payment_id)).record.captured_attempts() == set()
    async with a_town(town.core.url, street) as again:
        again.clock.advance(2 * A_MINUTE_MS)
        sweeps = Sweeps(again.core)
        await sweeps.run()
        assert sweeps.found()["paid_at_channel"] == 1
        await repaired(again)
        check_charged_once(again, payment_id)
