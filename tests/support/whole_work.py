"""Everything that a server does for payments, once each, over a database and real banks: the calls and every job."""

from __future__ import annotations

import functools
import secrets

from paycore.channels.simbank_books import SimbankBooks
from paycore.domain.verdicts import CloseReason, NotifyOutcome, PaymentState
from paycore.jobs.auditor import Auditor, Report, Turns
from paycore.jobs.sweeper import SEEN_WITHIN_MS
from paycore.usecases.close import InsertClosed
from paycore.usecases.health import Heartbeat
from paycore.usecases.keys import ByPaymentId
from paycore.usecases.warm import warm
from tests.support.bank import Town
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, Core
from tests.support.quarantine import a_book, evidence_of, examine
from tests.support.repair import Repair, pass_time
from tests.support.sweeping import Sweeps, delete_refunds

_LADDER_MS = 3_600_000


async def do_everything(town: Town, owner_url: str) -> None:
    """Make payments end in every way, and let every job repair something. owner_url: who may lose rows on purpose."""
    await _take_calls(town)
    waiting = await _judge_the_rare(town.core)
    await town.refund(3)
    await _repair(town)
    await _examine(town)
    await _sweep(town, owner_url, waiting)
    await _audit(town)
    town.core.forget()
    warm(town.core.store, town.core.index, town.core.registry.codes, 1_000)


async def pay_twice(town: Town) -> int:
    """A payment that its user pays at two banks, and that both tell of."""
    command = town.order()
    for bank in ("bank_a", "bank_b"):
        result = await town.core.pay(command._replace(account=bank))
    payment_id: int = result.payment.payment_id
    for attempt, bank in enumerate(("bank_a", "bank_b"), start=1):
        town.user_pays(payment_id, attempt, bank)
        await town.hand_on(payment_id, attempt)
    return payment_id


async def _take_calls(town: Town) -> None:
    core = town.core
    for _ in range(2):
        file = await town.file(await pay_twice(town))
        assert len(file.record.excess) == 1
    result = await core.pay(town.order())
    closed = await core.closer.close(ByPaymentId(result.payment.payment_id))
    assert closed.record.state == PaymentState.CLOSED
    await core.writer.run(Heartbeat())
    core.store.backlog()


async def _judge_the_rare(core: Core) -> int:
    """Late beside a live attempt, a failure, and evidence of each kind. Returns the payment whose excess waits."""
    late = await core.make_payment("bank_a", "bank_b", validity_ms=-1)
    ids = [await core.make_payment() for _ in range(2)]
    words = [
        core.word(late, 1, f"T-{late}"),
        core.failure(ids[0]),
        core.word(ids[1], amount_minor=AMOUNT_MINOR - 1),
        core.word(ids[1] + 99),
    ]
    outcomes = [verdict.outcome for verdict in await core.notify_many(*words)]
    expected = (NotifyOutcome.LATE, NotifyOutcome.RECORDED, NotifyOutcome.MISMATCH, NotifyOutcome.UNKNOWN)
    assert outcomes == list(expected)
    return late


async def _repair(town: Town) -> None:
    """A page that another one replaced, a word that is lost, and payments that expire."""
    command = town.order()
    town.plant(command, notify_never=True)
    lost = (await town.core.pay(command)).payment.payment_id
    town.user_pays(lost)
    replaced = town.order()
    for bank in ("bank_a", "bank_b"):
        await town.core.pay(replaced._replace(account=bank))
    await pass_time(town, Repair(town.core), 2 * VALIDITY_MS, most_ms=VALIDITY_MS // 4)
    assert (await town.file(lost)).record.state == PaymentState.PAID


async def _examine(town: Town) -> None:
    await examine(town.core, _LADDER_MS)
    row = evidence_of(town.core, only_open=True)[0]
    await a_book(town.core).resolve(row.quarantine_id, verdict="dismissed", reason="looked at", who="somebody")


async def _sweep(town: Town, owner_url: str, waiting: int) -> None:
    """Refunds that are lost come back, excess that waits is looked at no more, writers that died are forgotten."""
    core, sweeping = town.core, Sweeps(town.core)
    first = await pay_twice(town)
    await sweeping.run()
    delete_refunds(owner_url, first)
    second = await pay_twice(town)
    delete_refunds(owner_url, second)
    await sweeping.run()
    await sweeping.full()
    assert sweeping.found()["several_captures"] == 2
    assert waiting in sweeping.pending()
    await core.writer.run(InsertClosed(waiting, CloseReason.UNREACHABLE, core.registry.code))
    await sweeping.run()
    assert waiting not in sweeping.pending()
    town.clock.advance(2 * SEEN_WITHIN_MS)
    with Core(core.url, clock=town.clock) as another:
        await another.writer.run(Heartbeat())
        for _ in range(3):
            await Sweeps(another).run()
            town.clock.advance(SEEN_WITHIN_MS)
            await another.writer.run(Heartbeat())
    await town.refund(3)


async def _audit(town: Town) -> None:
    core = town.core
    report: Report = await Auditor(
        store=core.store,
        clock=core.clock,
        metrics=core.metrics,
        open_books=functools.partial(SimbankBooks, str(town.driver.http.base_url), 10_000),
        turns=Turns(core.writer, 1_000, secrets.token_hex),
    ).audit()
    assert not report.books_error
    assert await Turns(core.writer, 1_000, secrets.token_hex).take()
