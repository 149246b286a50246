"""Jobs take shares of the work by leases: each share by one process at a time, and none is lost by a crash."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from paycore.domain.ids import SLICES
from paycore.jobs.slices import MAX_HELD, Slices
from tests.support.clock import ManualClock
from tests.support.core import Core
from tests.support.databases import KINDS, take_database

LEASE_MS = 10_000
HOUR_MS = 3_600_000
ALL = list(range(SLICES))


@pytest.fixture(params=KINDS)
def core(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Core]:
    with Core(take_database(request.param, tmp_path), clock=ManualClock()) as core:
        yield core


def slices_of(core: Core) -> Slices:
    """The leases as one process takes them."""
    return Slices(core.store, core.writer, core.clock, secrets.token_hex, LEASE_MS)


async def test_shares_are_shared_out_and_given_back(core: Core) -> None:
    mine, theirs = slices_of(core), slices_of(core)
    async with mine.take("closer", ALL) as first, theirs.take("closer", ALL) as second:
        assert len(first.slices) == len(second.slices) == MAX_HELD
        assert not set(first.slices) & set(second.slices)
        async with theirs.take("closer", first.slices) as nothing:
            assert list(nothing.slices) == []
        async with theirs.take("refunder", first.slices) as other_job:
            assert set(other_job.slices) == set(first.slices)
    async with theirs.take("closer", first.slices) as again:
        assert set(again.slices) == set(first.slices)


async def test_shares_wanted_by_nobody_cost_no_write(core: Core) -> None:
    with core.watch() as written:
        async with slices_of(core).take("closer", []) as held:
            assert list(held.slices) == []
    assert written.tables == {}


async def test_shares_are_given_back_when_the_work_fails(core: Core) -> None:
    with pytest.raises(ValueError, match="broken"):
        async with slices_of(core).take("closer", [5]):
            raise ValueError("broken")
    async with slices_of(core).take("closer", [5]) as held:
        assert list(held.slices) == [5]


async def test_shares_of_a_process_that_died_are_free_when_its_lease_ends(core: Core) -> None:
    assert isinstance(core.clock, ManualClock)
    dead = slices_of(core).take("closer", [5])
    await dead.__aenter__()
    async with slices_of(core).take("closer", [5]) as held:
        assert list(held.slices) == []
    core.clock.advance(LEASE_MS)
    async with slices_of(core).take("closer", [5]) as held:
        assert list(held.slices) == [5]


async def test_shares_of_a_dead_process_whose_clock_ran_an_hour_ahead_are_free_at_once(core: Core) -> None:
    assert isinstance(core.clock, ManualClock)
    core.clock.advance(HOUR_MS)
    await slices_of(core).take("closer", ALL, most=SLICES).__aenter__()
    core.clock.advance(-HOUR_MS)
    async with slices_of(core).take("closer", ALL, most=SLICES) as held:
        assert sorted(held.slices) == ALL


async def test_no_work_is_begun_under_a_lease_in_which_the_clock_was_set_back(core: Core) -> None:
    assert isinstance(core.clock, ManualClock)
    async with slices_of(core).take("closer", [5]) as held:
        core.clock.advance(-1)
        assert not held.lasts()


async def test_new_work_is_not_begun_in_the_second_half_of_a_lease(core: Core) -> None:
    assert isinstance(core.clock, ManualClock)
    async with slices_of(core).take("closer", [5]) as held:
        assert held.lasts()
        core.clock.advance(LEASE_MS // 2)
        assert not held.lasts()


async def test_many_who_want_the_same_shares_at_once_never_hold_one_together(core: Core) -> None:
    holding: set[int] = set()
    taken: set[int] = set()

    async def work() -> None:
        for _ in range(5):
            async with slices_of(core).take("closer", ALL) as held:
                assert not holding & set(held.slices)
                holding.update(held.slices)
                taken.update(held.slices)
                await asyncio.sleep(0)
                holding.difference_update(held.slices)

    await asyncio.gather(*(work() for _ in range(6)))
    # They begin in places of their own: most are taken within so few rounds, whichever those are.
    assert len(taken) > SLICES // 2
    assert taken <= set(ALL)


async def test_processes_begin_at_every_share_alike(core: Core) -> None:
    first: set[int] = set()
    for _ in range(300):
        async with slices_of(core).take("closer", ALL, most=1) as held:
            first.update(held.slices)
    assert first == set(ALL)
