"""At which ages evidence is looked at again: over clocks that step, long downtime, and words that come back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import cast

import pytest

from paycore.channels.protocol import Channel, ChannelUnknownError, Queried, QueryState
from paycore.domain.verdicts import NotifyOutcome
from paycore.jobs.examiner import LADDER_MS, ROUND_MS
from tests.support.clock import ManualClock
from tests.support.core import CHANNEL, Core
from tests.support.quarantine import evidence_of, examine, the_row

WRONG_MINOR = 999
HOUR_MS, DAY_MS = 3_600_000, 86_400_000


class Counting:
    """A channel that says nothing about money, and notes when it was asked."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.asked_at_ms: list[int] = []
        self.is_down = False

    async def query(self, account: str, channel_order_no: str) -> Queried:
        assert account
        assert channel_order_no
        self.asked_at_ms.append(self._clock.now_ms())
        if self.is_down:
            raise ChannelUnknownError("down")
        return Queried(QueryState.NOT_PAID)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def channel(clock: ManualClock) -> Counting:
    return Counting(clock)


@pytest.fixture
def core(db_url: str, clock: ManualClock, channel: Counting) -> Iterator[Core]:
    with Core(db_url, clock=clock, channels={CHANNEL: cast(Channel, channel)}) as core:
        yield core


async def one_mismatch(core: Core) -> int:
    """Put one row there; return when it was first seen."""
    payment_id = await core.make_payment(validity_ms=90 * DAY_MS)
    verdict = await core.notify(core.word(payment_id, amount_minor=WRONG_MINOR))
    assert verdict.outcome == NotifyOutcome.MISMATCH
    return the_row(core, NotifyOutcome.MISMATCH).first_seen_at_ms


async def test_row_is_looked_at_on_each_age_then_daily_and_after_thirty_days_no_more(
    core: Core, clock: ManualClock, channel: Counting
) -> None:
    first_ms = await one_mismatch(core)
    steps = [age - earlier for earlier, age in itertools.pairwise(LADDER_MS)]
    await examine(core)
    for step in steps:
        # Just before the age nothing is done; at it the row is looked at, once.
        await examine(core, step - 1)
        await examine(core, 1)
        await examine(core)
    assert [at_ms - first_ms for at_ms in channel.asked_at_ms] == list(LADDER_MS)
    for _ in range(40 * 4):
        await examine(core, DAY_MS // 4)
    daily = channel.asked_at_ms[len(LADDER_MS) :]
    assert 28 <= len(daily) <= 31
    assert {later - sooner for sooner, later in itertools.pairwise(daily)} == {ROUND_MS}
    assert daily[-1] - first_ms <= 31 * DAY_MS
    assert the_row(core, NotifyOutcome.MISMATCH).is_open


async def test_row_whose_word_comes_again_after_that_is_looked_at_daily_again(
    core: Core, clock: ManualClock, channel: Counting
) -> None:
    await one_mismatch(core)
    await examine(core, 60 * DAY_MS)
    await examine(core, DAY_MS)
    asked = len(channel.asked_at_ms)
    row = the_row(core, NotifyOutcome.MISMATCH)
    again = core.word(row.payment_id or 0, amount_minor=WRONG_MINOR)
    await core.notify(again)
    await examine(core, DAY_MS)
    assert len(channel.asked_at_ms) == asked + 1


async def test_row_that_crossed_several_ages_while_nobody_looked_is_looked_at_once(
    core: Core, clock: ManualClock, channel: Counting
) -> None:
    await one_mismatch(core)
    await examine(core, 3 * DAY_MS)
    await examine(core)
    assert len(channel.asked_at_ms) == 1


async def test_clock_that_steps_back_an_hour_hides_no_row(core: Core, clock: ManualClock, channel: Counting) -> None:
    clock.advance(HOUR_MS)
    await one_mismatch(core)
    await examine(core)
    clock.advance(-HOUR_MS)
    asked = len(channel.asked_at_ms)
    first_ms = clock.now_ms()
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id, amount_minor=WRONG_MINOR))
    for age_ms in (0, 5_000, 25_000):
        await examine(core, age_ms)
    seen = [at_ms - first_ms for at_ms in channel.asked_at_ms[asked:]]
    assert seen[:3] == [0, 5_000, 30_000]


async def test_clock_that_jumps_ahead_and_back_looks_sooner_and_loses_no_age(
    core: Core, clock: ManualClock, channel: Counting
) -> None:
    first_ms = await one_mismatch(core)
    await examine(core)
    await examine(core, HOUR_MS)
    clock.advance(-HOUR_MS)
    for step in (5_000, 25_000, 90_000, 480_000, HOUR_MS - 600_000):
        await examine(core, step)
    assert [at_ms - first_ms for at_ms in channel.asked_at_ms][-1] == HOUR_MS
    assert len(evidence_of(core, only_open=True)) == 1


async def test_channel_that_is_down_for_a_day_is_asked_a_handful_of_times(
    core: Core, clock: ManualClock, channel: Counting
) -> None:
    for _ in range(20):
        await one_mismatch_more(core)
    channel.is_down = True
    for _ in range(24 * 4):
        await examine(core, DAY_MS // 96)
    # Twenty rows of twenty attempts, seven ages and a round: nothing is asked in between.
    assert len(channel.asked_at_ms) <= 20 * (len(LADDER_MS) + 2)
    assert len(evidence_of(core, only_open=True)) == 20


async def one_mismatch_more(core: Core) -> None:
    payment_id = await core.make_payment(validity_ms=90 * DAY_MS)
    await core.notify(core.word(payment_id, amount_minor=WRONG_MINOR))


async def test_many_rows_of_one_attempt_cost_one_question(core: Core, channel: Counting) -> None:
    payment_id = await core.make_payment()
    for number in range(50):
        await core.notify(core.word(payment_id, 1, f"T{number}", amount_minor=WRONG_MINOR))
    result = await examine(core)
    assert (result.done, result.put_off, len(channel.asked_at_ms)) == (0, 50, 1)


async def test_attempts_beyond_what_a_pass_asks_are_asked_by_the_next(
    core: Core, channel: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paycore.jobs.examiner.ASKED_AT_MOST", 3)
    for _ in range(8):
        await one_mismatch_more(core)
    assert (await examine(core)).put_off == 8
    assert len(channel.asked_at_ms) == 8
