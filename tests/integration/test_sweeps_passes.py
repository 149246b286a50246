"""How a sweep goes on: marks, a crash between repair and mark, two at once, clocks that jump, full passes half done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from paycore.domain.ids import PaymentIds
from paycore.domain.verdicts import NotifyOutcome
from paycore.jobs import sweep_full, sweep_look, sweeper
from paycore.store import sweep_suspects
from paycore.store import sweeps as reads
from tests.support.books import rows, run
from tests.support.clock import ManualClock
from tests.support.core import Core, check_money_rules
from tests.support.databases import cure, poison
from tests.support.sweeping import FULL_MS, LEASE_MS, Sweeps, delete_refunds

AN_HOUR_MS = 3_600_000


@pytest.fixture
async def core(db_url: str) -> AsyncIterator[Core]:
    with Core(db_url, clock=ManualClock()) as core:
        yield core


def moved(core: Core, by_ms: int) -> None:
    assert isinstance(core.clock, ManualClock)
    core.clock.advance(by_ms)


async def paid_twice(core: Core, trade_no: str = "SECOND", *, refund: bool = True) -> int:
    """A payment with a second capture; its refund is there, or lost."""
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id, 1, "FIRST"))
    assert (await core.notify(core.word(payment_id, 2, trade_no))).outcome is NotifyOutcome.DUPLICATE
    if not refund:
        delete_refunds(core.url, payment_id)
    return payment_id


def refunded(core: Core) -> list[int]:
    return [payment_id for (payment_id,) in rows(core.url, "SELECT payment_id FROM refund ORDER BY payment_id")]


def only_money(sweeps: Sweeps) -> dict[str, int]:
    """What was found but for the tasks that payments of these tests are made without."""
    return {kind: count for kind, count in sweeps.found().items() if kind != "payment_without_task"}


def marks(core: Core, sweep: str) -> dict[int, int]:
    return core.store.read(lambda connection: reads.marks(connection, sweep))


# Marks


async def test_pass_reads_only_what_was_added_since_the_last(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeps = Sweeps(core)
    looked_at: list[set[int]] = []
    whole_news = reads.news

    def noting(*arguments: Any) -> reads.News:
        news = whole_news(*arguments)
        looked_at.append(news.payment_ids)
        return news

    monkeypatch.setattr(reads, "news", noting)
    first = await paid_twice(core)
    await sweeps.run()
    second = await paid_twice(core)
    await sweeps.run(passes=2)
    assert looked_at[0] == {first}
    assert looked_at[-2:] == [{second}, set()]


async def test_writer_with_more_rows_than_are_read_at_once_is_read_to_its_end(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_news = reads.news
    monkeypatch.setattr(reads, "news", lambda connection, writers: whole_news(connection, writers, 2))
    ids = [await paid_twice(core, refund=False) for _ in range(5)]
    await Sweeps(core).run()
    assert refunded(core) == ids


async def test_group_with_more_rows_than_are_read_at_once_is_read_whole(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b", "bank_c")
    await core.notify(core.word(payment_id, 1, "FIRST"))
    await core.notify_many(core.word(payment_id, 2, "SECOND"), core.word(payment_id, 3, "THIRD"))
    (group_no,) = {group_no for (group_no,) in rows(core.url, "SELECT group_no FROM excess_payment")}
    news = core.store.read(lambda connection: reads.news(connection, [core.writer_no], 1))
    assert news.marks["excess_payment"] == {core.writer_no: group_no}


async def test_dead_writers_are_not_asked_for_ever(core: Core) -> None:
    """Neither are they looked for, nor are their marks kept."""
    sweeps = Sweeps(core)
    await paid_twice(core)
    await sweeps.run()
    assert core.writer_no in marks(core, "excess_payment")
    moved(core, sweeper.SEEN_WITHIN_MS + 1)
    run(core.url, f"UPDATE writer SET seen_at_ms = {core.clock.now_ms() - 1}")
    await sweeps.run()
    assert core.writer_no in marks(core, "excess_payment")
    moved(core, 3 * AN_HOUR_MS)
    await sweeps.run()
    moved(core, 3 * AN_HOUR_MS)
    await sweeps.run()
    assert marks(core, "excess_payment") == {}


async def test_sweeper_that_rested_for_days_reads_the_writers_that_died_meanwhile(core: Core) -> None:
    sweeps = Sweeps(core, full_ms=10 * FULL_MS)
    await sweeps.run()
    payment_id = await paid_twice(core, refund=False)
    moved(core, 3 * 86_400_000)
    await sweeps.run()
    assert refunded(core) == [payment_id]


async def test_payments_made_by_another_process_a_little_later_than_their_ids_say_are_seen(core: Core) -> None:
    """An id is drawn before its payment is committed: another one, drawn later, may be seen first."""
    sweeps = Sweeps(core)
    early = core.ids.draw()
    moved(core, 30_000)
    await core.make_payment()
    await sweeps.run()
    before = sweeps.found()["payment_without_task"]
    source = "SELECT merchant_id, 'late', amount_minor, currency, subject, return_url, terms_digest, expire_at_ms"
    run(
        core.url,
        "INSERT INTO payment (payment_id, merchant_id, merchant_order_no, amount_minor, currency, subject, return_url,"
        f" terms_digest, expire_at_ms, recorded_at_ms, writer_no, group_no) SELECT {early}, * FROM ({source},"
        " recorded_at_ms, writer_no, group_no FROM payment) AS one",
    )
    await sweeps.run()
    assert sweeps.found()["payment_without_task"] == before + 1


async def test_payments_that_came_in_faster_than_they_are_compared_are_all_seen(core: Core) -> None:
    sweeps = Sweeps(core, part=2, parts_a_run=2)
    await sweeps.run()
    for _ in range(11):
        await core.make_payment()
    await sweeps.run()
    assert rows(core.url, "SELECT count(*) FROM task WHERE kind = 1") == [(11,)]


# Crashes


class Died(BaseException):
    """Stands in for a process that ends here: what is not committed is gone."""


PLACES = {
    "incremental": ("sweeper.before_repair", "sweeper.before_mark"),
    "full": ("sweeper.before_repair", "sweeper.before_full_mark"),
}


@pytest.mark.parametrize(("kind", "place"), [(kind, place) for kind, places in PLACES.items() for place in places])
async def test_sweep_that_dies_between_repair_and_mark_goes_on_from_there(
    core: Core, monkeypatch: pytest.MonkeyPatch, kind: str, place: str
) -> None:
    sweeps = Sweeps(core)
    if kind == "full":
        payment_id = await paid_twice(core)
        await sweeps.run()
        # What was read writer by writer is not read so again: only the full pass can find it.
        delete_refunds(core.url, payment_id)
        sweeps.begin_anew()
    else:
        await sweeps.run()
        payment_id = await paid_twice(core, refund=False)

    written = [] if place == "sweeper.before_repair" else [payment_id]

    def die(name: str) -> None:
        # A full pass marks each of its ranges, and most of them hold no payment.
        if name == place and refunded(core) == written:
            raise Died

    with monkeypatch.context() as patched:
        for module in (sweep_full, sweep_look, sweeper):
            patched.setattr(module, "failpoint", die)
        with pytest.raises(Died):
            await sweeps.run()
    assert refunded(core) == written
    moved(core, 2 * LEASE_MS)
    await Sweeps(core).run()
    assert refunded(core) == [payment_id]
    assert only_money(sweeps) == {"several_captures": 1}
    check_money_rules(core.snapshot())


# Several at once


@pytest.fixture
def two_cores(db_url: str) -> Iterator[tuple[Core, Core]]:
    clock = ManualClock()
    with Core(db_url, clock=clock) as one, Core(db_url, clock=clock) as other:
        yield one, other


@pytest.mark.parametrize("leases", [True, False], ids=["leases", "leases_ran_out"])
async def test_two_sweepers_at_once_put_right_once(
    two_cores: tuple[Core, Core], leases: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without leases both read the same; the locks of the payments let one of them create."""
    one = two_cores[0]
    ids = [await paid_twice(one, refund=False) for _ in range(12)]
    if not leases:
        monkeypatch.setattr(type(one.store), "free_slices", lambda _self, _job, slices, *_: list(slices))
        monkeypatch.setattr("paycore.store.tasks.claim_slices", lambda _c, _i, _job, slices, *_: sorted(slices))
    both = [Sweeps(core, part=3) for core in two_cores]
    await asyncio.gather(*(sweeps.run(passes=3) for sweeps in both))
    assert sum(only_money(sweeps)["several_captures"] for sweeps in both if only_money(sweeps)) == len(ids)
    assert refunded(one) == ids
    check_money_rules(one.snapshot())


async def test_full_pass_is_shared_by_the_processes_that_make_it(two_cores: tuple[Core, Core]) -> None:
    """While one holds a range, the other takes the others, and none is left over."""
    one, other = two_cores
    for _ in range(40):
        await one.make_payment()
        moved(one, 10)
    held = f"('sweep_full', 3, {one.clock.now_ms() + LEASE_MS}, 'somebody')"
    run(one.url, f"INSERT INTO lease (job, slice, lease_until_ms, lease_token) VALUES {held}")
    await Sweeps(other).run()
    plan = one.store.read(sweep_full.read_plan)
    assert plan.unfinished == [3]
    moved(one, LEASE_MS + 1)
    await Sweeps(one).run()
    assert one.store.read(sweep_full.read_plan).unfinished == []
    assert rows(one.url, "SELECT count(*) FROM task WHERE kind = 1") == [(40,)]


async def test_full_pass_that_was_left_goes_on_from_where_it_stood(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(30):
        await core.make_payment()
        moved(core, 10)
    compared: list[int] = []
    whole = sweep_suspects.not_whole

    def noting(connection: Any, first: int, last: int) -> set[int]:
        compared.append(first)
        return whole(connection, first, last)

    monkeypatch.setattr(sweep_suspects, "not_whole", noting)
    first_run = Sweeps(core, part=1, parts_a_run=5)
    assert (await first_run.sweeper.run_once()).more
    before = len(compared)
    assert before == 5
    await Sweeps(core, part=1, parts_a_run=7).run()
    assert len(compared) == len(set(compared)), "no part is compared twice"
    assert core.store.read(sweep_full.read_plan).unfinished == []


async def test_full_pass_is_made_once_in_its_time(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[bool] = []
    whole = sweep_full.FullPass._begin

    async def noting(self: sweep_full.FullPass, *, first_ever: bool) -> None:
        begun.append(first_ever)
        await whole(self, first_ever=first_ever)

    monkeypatch.setattr(sweep_full.FullPass, "_begin", noting)
    sweeps = Sweeps(core)
    await sweeps.run(passes=3)
    assert begun == [True]
    moved(core, FULL_MS - 1)
    await sweeps.run()
    assert begun == [True]
    moved(core, 1)
    await sweeps.run(passes=2)
    assert begun == [True, False]


async def test_old_payments_without_tasks_are_found_by_the_first_full_pass_only(core: Core) -> None:
    """From before there were tasks: whoever was asked about to the end later on is not taken up again."""
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id))
    moved(core, AN_HOUR_MS)
    sweeps = Sweeps(core)
    await sweeps.run()
    assert rows(core.url, "SELECT kind, attempt FROM task") == [(2, 2)]
    run(core.url, "DELETE FROM task")
    moved(core, FULL_MS)
    await sweeps.run()
    assert rows(core.url, "SELECT kind, attempt FROM task") == []


# Clocks

OPEN_WITHOUT_TASK = (
    "SELECT count(*) FROM payment p"
    " WHERE NOT EXISTS (SELECT 1 FROM payment_outcome o WHERE o.payment_id = p.payment_id)"
    " AND NOT EXISTS (SELECT 1 FROM task t WHERE t.kind = 1 AND t.payment_id = p.payment_id)"
)


@pytest.mark.parametrize("jump_ms", [AN_HOUR_MS, -AN_HOUR_MS])
async def test_clock_that_jumps_hides_nothing_and_invents_nothing(core: Core, jump_ms: int) -> None:
    sweeps = Sweeps(core)
    await paid_twice(core)
    await sweeps.run()
    healthy = sweeps.found()
    for node, step_ms in enumerate((jump_ms, 10_000, -jump_ms, 10_000)):
        moved(core, step_ms)
        # As a process draws them that has just started: one that runs never goes back.
        core.ids = PaymentIds(core.clock, node)
        await sweeps.run()
        assert sweeps.found() == healthy
        payment_id = await paid_twice(core, refund=False)
        await core.make_payment()
        await sweeps.run()
        assert payment_id in refunded(core)
        assert rows(core.url, OPEN_WITHOUT_TASK) == [(0,)]
        healthy = sweeps.found()
    check_money_rules(core.snapshot())


# What breaks


async def test_payment_that_cannot_be_put_right_keeps_no_other_waiting(core: Core) -> None:
    broken, sound = await paid_twice(core, "BAD", refund=False), await paid_twice(core, refund=False)
    poison(core.url, "refund", "BAD")
    await Sweeps(core).run()
    assert refunded(core) == [sound]
    cure(core.url, "refund", "BAD")
    await Sweeps(core).full()
    assert refunded(core) == [broken, sound]


def test_cut_covers_every_id_once() -> None:
    for lowest, newest in ((0, 0), (5, 5), (100, 117), (1 << 55, (1 << 55) + (1 << 40))):
        lasts = list(sweep_full.cut(lowest, newest, 16).values())
        assert lasts == sorted(set(lasts))
        assert lasts[-1] == sweep_full.LAST_ID
