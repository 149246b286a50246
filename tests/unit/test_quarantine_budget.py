"""The allowance of each source: a burst, then so many a minute, whatever the clock does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paycore.usecases.quarantine import QuarantineBudget, QuarantineLimits

MINUTE_MS = 60_000
LIMITS = QuarantineLimits(burst=10, per_minute=6)


@pytest.fixture
def budget() -> QuarantineBudget:
    return QuarantineBudget(LIMITS)


def test_budget_begins_full_and_is_used_up_by_what_is_spent(budget: QuarantineBudget) -> None:
    assert budget.room(1, 0) == 10
    budget.spend(1, 7, 0)
    assert budget.room(1, 0) == 3
    budget.spend(1, 3, 0)
    assert budget.room(1, 0) == 0


def test_budget_of_one_source_is_not_touched_by_another(budget: QuarantineBudget) -> None:
    budget.spend(0, 10, 0)
    assert [budget.room(source, 0) for source in (0, 1, 255)] == [0, 10, 10]


@pytest.mark.parametrize(("later_ms", "room"), [(9_999, 0), (10_000, 1), (MINUTE_MS, 6), (2 * MINUTE_MS, 10)])
def test_budget_refills_with_time_and_never_beyond_its_burst(
    budget: QuarantineBudget, later_ms: int, room: int
) -> None:
    budget.spend(1, 10, 5)
    assert budget.room(1, 5 + later_ms) == room


def test_budget_that_is_asked_often_refills_as_quickly(budget: QuarantineBudget) -> None:
    budget.spend(1, 10, 0)
    assert next(at_ms for at_ms in range(0, 20_001, 7) if budget.room(1, at_ms)) == 10_003


def test_clock_that_steps_back_refills_nothing_and_starves_nobody(budget: QuarantineBudget) -> None:
    year_ms = 365 * 24 * 60 * MINUTE_MS
    budget.spend(1, 10, year_ms)
    assert budget.room(1, 0) == 0
    assert budget.room(1, 10_000) == 1, "time goes on from where the clock is now"
    budget.spend(1, 1, 10_000)
    assert budget.room(1, 9_000) == 0


@given(st.lists(st.tuples(st.integers(-100_000, 100_000), st.integers(0, 12)), max_size=40))
def test_budget_never_lets_in_more_than_burst_and_refill(steps: list[tuple[int, int]]) -> None:
    budget, now_ms, forward_ms, spent = QuarantineBudget(LIMITS), 10_000_000, 0, 0
    for step_ms, wanted in steps:
        now_ms += step_ms
        forward_ms += max(0, step_ms)
        room = budget.room(3, now_ms)
        assert 0 <= room <= LIMITS.burst
        taken = min(room, wanted)
        budget.spend(3, taken, now_ms)
        spent += taken
        assert spent <= LIMITS.burst + forward_ms * LIMITS.per_minute // MINUTE_MS
