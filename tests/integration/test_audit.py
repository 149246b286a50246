"""The audit over real databases: each planted break is found once, by its kind and payment; what is whole, never."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

from sqlalchemy import text

from paycore.domain.audit import UNJUDGED_GRACE_MS, AuditKind
from paycore.domain.ids import format_channel_order_no
from paycore.domain.verdicts import RefundState
from paycore.jobs.auditor import Auditor, Report, Turns
from paycore.metrics import Metrics
from paycore.store import proof_checks, proof_orders, tables
from paycore.store.engine import parse_database_url
from tests.support.bank import Town
from tests.support.books import run
from tests.support.clock import ManualClock
from tests.support.core import AMOUNT_MINOR, Core
from tests.support.databases import make_database
from tests.support.planted_rows import Capture, excess_row, insert, kept_of, made_at_ms, refund_rows, try_row
from tests.support.planting import PLANTS, prepare

BOTH = ("bank_a", "bank_b")


def an_auditor(core: Core, **changes: Any) -> Auditor:
    given: dict[str, Any] = {"store": core.store, "clock": core.clock, "metrics": core.metrics, **changes}
    return Auditor(**given)


async def audited(core: Core, **changes: Any) -> Report:
    return await an_auditor(core, **changes).audit()


def found(report: Report) -> Counter[tuple[AuditKind, int]]:
    return Counter((one.kind, one.payment_id) for one in report.violations)


async def test_each_planted_break_is_found_once_with_its_kind_and_payment(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        await prepare(core, len(PLANTS))
        expected: Counter[tuple[AuditKind, int]] = Counter()
        assert found(await audited(core)) == expected
        for name, plant in PLANTS.items():
            expected[plant.audit, plant.apply(db_url)] += 1
            assert found(await audited(core)) == expected, name
        # However the payments are cut into ranges, and whatever falls between two of them.
        assert found(await audited(core, range_rows=7)) == expected


def test_every_kind_that_the_database_shows_has_a_plant() -> None:
    planted = {plant.audit for plant in PLANTS.values()}
    assert planted == {kind for kind in AuditKind if not kind.value.startswith("book_")}


async def twice_paid(town: Town, **faults: Any) -> int:
    """A payment that was paid at both banks and told of both times."""
    command = town.order()
    for bank in BOTH:
        result = await town.core.pay(command._replace(account=bank))
    payment_id: int = result.payment.payment_id
    for attempt, bank in enumerate(BOTH, start=1):
        town.plant(command, bank=bank, **faults)
        town.user_pays(payment_id, attempt, bank)
        await town.hand_on(payment_id, attempt)
    return payment_id


async def test_database_of_every_story_shows_nothing(town: Town) -> None:
    core = town.core
    await twice_paid(town)
    await twice_paid(town, refuse={"refund": {"value": "NO", "times": 1}})
    await twice_paid(town, refund_closed={"value": True, "times": 1})
    await twice_paid(town, hang_after_doing={"refund": {"value": True, "times": 1}})
    returned = await twice_paid(town)
    (capture,) = town.books(returned, 2, "bank_b")["captures"]
    town.driver.give_back(format_channel_order_no(returned, 2), capture["trade_no"], "bank_b")
    for _ in range(3):
        await town.refund()
        town.clock.advance(600_000)
    waiting = await core.make_payment(*BOTH, validity_ms=-1)
    late = await core.make_payment("bank_a", validity_ms=-1)
    for payment_id in (waiting, late):
        await core.notify(core.word(payment_id, 1, f"T-{payment_id}"))
    quarantined = await core.make_payment("bank_a")
    await core.notify(core.word(quarantined, 1, "T-WRONG", amount_minor=AMOUNT_MINOR - 1))
    await core.notify(core.failure(await core.make_payment("bank_a")))
    report = await audited(core)
    assert found(report) == Counter()
    results = Counter(row.result for row in core.snapshot()["refund_result"])
    assert results == {RefundState.REFUNDED: 4, RefundState.REFUSED: 2, RefundState.RETURNED_BY_CHANNEL: 1}
    tally = report.tally
    assert (tally.payments, tally.kept, tally.excess, tally.refunds) == (9, 5, 7, 6)
    assert (tally.waiting, tally.unfinished, report.quarantine_open) == (1, 1, 1)
    assert None not in {tally.oldest_waiting_at_ms, tally.oldest_unfinished_at_ms}


async def test_captures_that_only_look_like_the_kept_one_show_nothing(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        # Two banks may draw one number, and one attempt may have been paid twice.
        payment_id = await core.make_payment(*BOTH)
        for attempt in (1, 2):
            await core.notify(core.word(payment_id, attempt, "SAME"))
        second, at_ms = Capture(payment_id, 1, "OTHER"), core.clock.now_ms()
        run(db_url, excess_row(second, at_ms), *refund_rows(second, at_ms))
        report = await audited(core)
        assert (found(report), report.tally.excess) == (Counter(), 2)


async def test_merchants_refunds_count_until_they_have_finally_failed(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        payment_id = await core.make_payment()
        await core.notify(core.word(payment_id))
        capture, at_ms = kept_of(db_url, payment_id), made_at_ms(db_url, payment_id)
        run(db_url, *refund_rows(capture, at_ms, "M1", AMOUNT_MINOR - 1), *refund_rows(capture, at_ms, "M2", 1))
        assert found(await audited(core)) == Counter()
        run(db_url, *refund_rows(capture, at_ms, "M3", 1))
        assert found(await audited(core)) == Counter({(AuditKind.MERCHANT_REFUNDS_EXCEED, payment_id): 1})
        run(db_url, *_refused(payment_id, "M1", at_ms))
        assert found(await audited(core)) == Counter()
        run(db_url, try_row(payment_id, "M1", 2, at_ms))
        assert found(await audited(core)) == Counter({(AuditKind.MERCHANT_REFUNDS_EXCEED, payment_id): 1})


def _refused(payment_id: int, refund_no: str, at_ms: int) -> list[str]:
    of_try = {"payment_id": payment_id, "refund_no": refund_no, "seq": 1}
    word = insert("refund_result", at_ms, **of_try, result=RefundState.REFUSED, code="", message="")
    where = f"WHERE payment_id = {payment_id} AND refund_no = '{refund_no}'"
    return [f"UPDATE refund_try SET state = {RefundState.REFUSED:d} {where}", word]


async def test_paid_by_query_is_a_break_only_when_it_stays_unjudged(db_url: str) -> None:
    clock = ManualClock()
    with Core(db_url, clock=clock) as core:
        told, judged, held = [await core.make_payment() for _ in range(3)]
        await core.notify(core.word(judged))
        await core.notify(core.word(held, amount_minor=AMOUNT_MINOR + 1))
        for payment_id in (told, judged, held):
            run(db_url, insert("queried_paid", clock.now_ms(), payment_id=payment_id, attempt=1))
        clock.advance(UNJUDGED_GRACE_MS)
        assert found(await audited(core)) == Counter()
        clock.advance(1)
        assert found(await audited(core)) == Counter({(AuditKind.QUERIED_PAID_UNJUDGED, told): 1})


async def test_payment_with_more_rows_than_a_range_holds_is_read_whole(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        payment_id = await core.make_payment("bank_a", "bank_b", "bank_c")
        for attempt in (1, 2, 3):
            await core.notify(core.word(payment_id, attempt, f"T{attempt}"))
        other = await core.make_payment()
        report = await audited(core, range_rows=1)
        assert found(report) == Counter()
        assert (report.tally.payments, report.tally.kept, report.tally.refunds) == (2, 1, 2)
        run(db_url, f"UPDATE merchant_order SET payment_id = {payment_id} WHERE payment_id = {other}")
        assert found(await audited(core, range_rows=1)) == Counter({(AuditKind.ORDER_NAMES_NO_PAYMENT, payment_id): 1})


async def test_report_names_so_many_and_counts_all(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        await prepare(core, 3)
        for _ in range(3):
            PLANTS["kept_refunded"].apply(db_url)
        report = await audited(core, examples=2)
        assert len(report.violations) == 2
        assert report.violation_counts == {AuditKind.REFUND_OF_KEPT: 3}


async def test_audit_beside_writers_shows_nothing(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        made = asyncio.create_task(_make(core, 60))
        audits = 0
        while not made.done():
            assert found(await audited(core, range_rows=5)) == Counter()
            audits += 1
        await made
        assert audits > 1
        assert (await audited(core)).tally.payments == 60


async def _make(core: Core, count: int) -> None:
    for _ in range(count):
        payment_id = await core.make_payment(*BOTH)
        await core.notify_many(core.word(payment_id, 1, "T1"), core.word(payment_id, 2, "T2"))


async def test_pass_sets_the_gauge_of_every_kind(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        await prepare(core)
        PLANTS["kept_refunded"].apply(db_url)
        metrics = Metrics()
        result = await an_auditor(core, metrics=metrics).run_once()
        assert result.done == 5
        for kind in AuditKind:
            value = metrics.registry.get_sample_value("paycore_audit_violations", {"kind": kind.value})
            assert value == (kind is AuditKind.REFUND_OF_KEPT), kind


async def test_one_process_takes_each_turn(db_url: str) -> None:
    clock = ManualClock()
    with Core(db_url, clock=clock) as one, Core(db_url, clock=clock) as other:
        await one.make_payment()
        tokens = iter("abcdef")
        auditors = [an_auditor(core, turns=Turns(core.writer, 60_000, lambda: next(tokens))) for core in (one, other)]
        for _ in range(2):
            assert [(await auditor.run_once()).done for auditor in auditors] == [1, 0]
            clock.advance(60_000)


async def test_progress_ends_at_what_is_known(db_url: str) -> None:
    with Core(db_url, clock=ManualClock()) as core:
        await prepare(core, 2)
        told: list[tuple[int, int]] = []
        await an_auditor(core, range_rows=2).audit(lambda looked_at, known: told.append((looked_at, known)))
        assert told[-1] == (20, 20)
        assert told == sorted(told, key=lambda one: one[0])
        assert all(looked_at <= known for looked_at, known in told)


def test_no_check_reads_a_whole_table(tmp_path: Path) -> None:
    engine = parse_database_url(make_database("sqlite", tmp_path)).engine(writes=False)
    names = {table.name for table in tables.METADATA.sorted_tables}
    parameters = {"after": 1, "last": 9, "rows": 5, "unjudged_before_ms": 1, "merchant_id": "", "merchant_order_no": ""}
    parameters |= {"offset": 4}
    with engine.connect() as connection, connection.begin():
        for statement in every_statement():
            asked = text(f"EXPLAIN QUERY PLAN {statement}")
            used = {name: value for name, value in parameters.items() if f":{name}" in statement}
            for row in connection.execute(asked, used):
                words = str(row[-1]).split()
                assert words[0] != "SCAN" or words[1] not in names, f"{row[-1]} in {statement}"
    engine.dispose()


def every_statement() -> list[str]:
    checks = [check.sql for check in proof_checks.CHECKS]
    whole = (proof_checks.EXCESS, proof_checks.REFUNDS, *proof_checks.COUNTS, proof_checks.QUERIED_UNJUDGED)
    return [
        *(proof_checks.WITH_RANGE + sql for sql in (*checks, *whole)),
        proof_checks.NEXT_RANGE,
        proof_checks.EVIDENCE.replace(":ids", "(1, 2)"),
        proof_orders.UNNAMED_PAYMENTS,
        proof_orders.WRONG_ORDERS,
        proof_orders.LAST_ORDER,
    ]
