"""What tests of quarantine share: an examiner over a core, and evidence read back whole."""

from __future__ import annotations

import json
import secrets
from typing import Any

from paycore.domain.verdicts import NotifyOutcome, RefundState
from paycore.jobs.examiner import Examiner
from paycore.jobs.runner import Pass
from paycore.jobs.slices import Slices
from paycore.store import evidence
from paycore.store.evidence import Place
from paycore.store.rows import QuarantineRow
from paycore.usecases.judge_again import JudgeAgain
from paycore.usecases.quarantine_book import QuarantineBook, QuarantineReader
from tests.support.bank import Town
from tests.support.core import Core, check_money_rules


def a_judge(core: Core, who: str = "examiner") -> JudgeAgain:
    return JudgeAgain(
        core.store,
        core.writer,
        core.conversations,
        core.registry.code,
        clock=core.clock,
        metrics=core.metrics,
        who=who,
    )


def an_examiner(core: Core, judge: JudgeAgain | None = None) -> Examiner:
    slices = Slices(core.store, core.writer, core.clock, secrets.token_hex, 60_000)
    return Examiner(store=core.store, writer=core.writer, judge=judge or a_judge(core), slices=slices, clock=core.clock)


def a_book(core: Core) -> QuarantineBook:
    """The book of a person who works on this database."""
    return QuarantineBook(
        QuarantineReader(core.store),
        core.writer,
        a_judge(core, "retry"),
        core.registry.code,
        clock=core.clock,
        metrics=core.metrics,
    )


def evidence_of(core: Core, *, only_open: bool = False) -> list[QuarantineRow]:
    """Every row of quarantine, oldest first."""
    return core.store.read(
        lambda connection: evidence.page(connection, after=Place(0, ""), limit=100_000, only_open=only_open)
    )


def the_row(core: Core, reason: NotifyOutcome) -> QuarantineRow:
    """The only row of a reason."""
    (row,) = [row for row in evidence_of(core) if row.reason == reason]
    return row


def verdicts_of(row: QuarantineRow) -> list[str]:
    """What was decided about a row, oldest first."""
    return [one["verdict"] for one in json.loads(row.resolutions)]


async def examine(core: Core, after_ms: int = 0) -> Pass:
    """Let time pass, then look until nothing more is due."""
    core.clock.advance(after_ms)  # type: ignore[attr-defined]  # the clocks of tests can be shifted
    done = put_off = 0
    while True:
        result = await an_examiner(core).run_once()
        done, put_off = done + result.done, put_off + result.put_off
        if not result.more:
            return result._replace(done=done, put_off=put_off)


async def refund_all(town: Town, payment_id: int) -> None:
    """Let the refunder work until every refund of a payment has its final word."""
    for _ in range(10):
        await town.refund()
        file = await town.file(payment_id)
        if all(row.state == RefundState.REFUNDED for row in file.refund_tries):
            return
    raise AssertionError("a refund has no final word")


async def assert_only_back(
    town: Town, payment_id: int, *trade_nos: str, bank: str = "bank_a", attempt: int = 1
) -> None:
    """In the bank's own books these captures went back, each once and whole, and no others."""
    await refund_all(town, payment_id)
    await refund_all(town, payment_id)
    books: dict[str, Any] = town.books(payment_id, attempt, bank)
    back = sorted((one["trade_no"], one["amount_minor"]) for one in books["refunds"] if one["result"] == "REFUNDED")
    captured = {one["trade_no"]: one["amount_minor"] for one in books["captures"]}
    assert back == sorted((trade_no, captured[trade_no]) for trade_no in trade_nos)
    assert len(books["refunds"]) == len(trade_nos)
    check_money_rules(town.core.snapshot())
