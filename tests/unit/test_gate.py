"""The gate before the channels and the waits between tries, on a clock that only sleeping moves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from paycore.channels.protocol import ChannelRestsError, ChannelTraits, ChannelUnknownError
from paycore.domain.errors import PreconditionError
from paycore.jobs.backoff import backoff_ms
from paycore.jobs.gate import (
    FIRST_REST_MS,
    LONGEST_REST_MS,
    SILENT_AFTER,
    ChannelGate,
)
from tests.support.clock import ManualClock

PER_SECOND = 100
SHOP = ("bank", "shop")


class Door:
    """A gate on a clock of its own, and the times at which calls went through it."""

    def __init__(self, per_second: int = PER_SECOND, at_once: int = 8) -> None:
        self.clock = ManualClock()
        self.gate = ChannelGate(lambda _: ChannelTraits(calls_per_second=per_second), self.clock, self.sleep, at_once)
        self.passed_at_ms: list[int] = []
        self.inside = self.most_inside = 0
        self.step_ms = 0

    async def sleep(self, wait_ms: int) -> None:
        await asyncio.sleep(0)
        self.clock.advance(wait_ms + self.step_ms)

    async def call(self, *, answers: bool = True, takes: int = 1, channel: str = "bank", account: str = "shop") -> None:
        async with self.gate.call(channel, account):
            self.passed_at_ms.append(self.clock.now_ms())
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            for _ in range(takes):
                await asyncio.sleep(0)
            self.inside -= 1
            if not answers:
                raise ChannelUnknownError("no answer")

    async def silent(self, times: int = 1) -> None:
        for _ in range(times):
            with pytest.raises(ChannelUnknownError):
                await self.call(answers=False)

    async def until_rest(self) -> None:
        await self.silent(SILENT_AFTER)
        assert self.gate.resting(*SHOP)


async def test_gate_lets_no_more_calls_a_second_through_than_the_channel_wants() -> None:
    door = Door()
    started_ms = door.clock.now_ms()
    await asyncio.gather(*(door.call() for _ in range(300)))
    passed_ms = [at_ms - started_ms for at_ms in door.passed_at_ms]
    for second in range(3):
        begin_ms = 1_000 * second
        in_second = [at_ms for at_ms in passed_ms if begin_ms <= at_ms < begin_ms + 1_000]
        # What an idle channel saved up comes on top, once.
        assert len(in_second) <= PER_SECOND + (PER_SECOND // 10 if second == 0 else 0)
    assert 2_800 <= passed_ms[-1] <= 3_000


async def test_gate_lets_a_channel_of_one_call_a_second_through_each_second() -> None:
    door = Door(per_second=1)
    for _ in range(4):
        await door.call()
    assert [later - earlier for earlier, later in zip(door.passed_at_ms, door.passed_at_ms[1:], strict=False)] == [
        1_000
    ] * 3


async def test_gate_holds_no_more_calls_at_once_than_there_are_places() -> None:
    door = Door(per_second=1_000_000, at_once=3)
    await asyncio.gather(*(door.call(takes=5) for _ in range(20)))
    assert door.most_inside == 3


async def test_gate_keeps_channels_apart() -> None:
    door = Door()
    await door.until_rest()
    assert not door.gate.resting("other", "shop")
    await door.call(channel="other")


async def test_gate_lets_an_account_rest_and_goes_on_with_the_others_of_its_channel() -> None:
    door = Door()
    await door.until_rest()
    assert not door.gate.resting("bank", "another")
    await door.call(account="another")
    assert door.gate.silent() == {SHOP}
    assert door.gate.resting(*SHOP)


async def test_gate_holds_all_accounts_of_a_channel_to_one_pace() -> None:
    door = Door()
    started_ms = door.clock.now_ms()
    await asyncio.gather(*(door.call(account=f"shop{number % 3}") for number in range(300)))
    assert 2_800 <= door.passed_at_ms[-1] - started_ms <= 3_000


async def test_gate_whose_account_is_probed_keeps_no_place_from_the_others() -> None:
    door = Door(per_second=1_000_000, at_once=2)
    await door.until_rest()
    door.clock.advance(FIRST_REST_MS)
    waiting = [asyncio.create_task(door.call(takes=1_000_000)) for _ in range(10)]
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await asyncio.gather(*(door.call(account="another") for _ in range(20)))
    for call in waiting:
        call.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_gate_asks_nothing_of_those_that_waited_for_a_turn_while_the_account_fell_silent_and_rested() -> None:
    door = Door(at_once=1)
    door.step_ms = FIRST_REST_MS
    results = await asyncio.gather(*(door.call(answers=False) for _ in range(40)), return_exceptions=True)
    asked = len(door.passed_at_ms)
    assert sum(isinstance(result, ChannelRestsError) for result in results) == 40 - asked
    assert asked == SILENT_AFTER


async def test_gate_after_silence_asks_nothing_until_the_rest_is_over() -> None:
    door = Door()
    await door.silent(SILENT_AFTER - 1)
    assert not door.gate.resting(*SHOP)
    await door.silent()
    asked = len(door.passed_at_ms)
    door.clock.advance(FIRST_REST_MS - 1)
    with pytest.raises(ChannelRestsError):
        await door.call()
    assert len(door.passed_at_ms) == asked
    door.clock.advance(1)
    assert not door.gate.resting(*SHOP)
    await door.call()
    assert len(door.passed_at_ms) == asked + 1


async def test_gate_tells_which_channels_rest_and_that_one_may_be_back() -> None:
    door = Door()
    assert (door.gate.silent(), door.gate.recovering()) == (set(), False)
    await door.until_rest()
    assert (door.gate.silent(), door.gate.recovering()) == ({SHOP}, False)
    door.clock.advance(FIRST_REST_MS)
    assert (door.gate.silent(), door.gate.recovering()) == (set(), True)
    await door.call()
    assert (door.gate.silent(), door.gate.recovering()) == (set(), False)


async def test_gate_one_answer_between_silences_keeps_the_channel_awake() -> None:
    door = Door()
    for _ in range(3):
        await door.silent(SILENT_AFTER - 1)
        await door.call()
    assert not door.gate.resting(*SHOP)


async def test_gate_rests_twice_as_long_after_each_silent_probe_up_to_a_minute() -> None:
    door = Door()
    await door.until_rest()
    rests = []
    for _ in range(9):
        started_ms = door.clock.now_ms()
        while door.gate.resting(*SHOP):
            door.clock.advance(500)
        rests.append(door.clock.now_ms() - started_ms)
        await door.silent()
    assert rests == [min(FIRST_REST_MS << n, LONGEST_REST_MS) for n in range(9)]


async def test_gate_asks_a_silent_channel_for_a_day_no_oftener_than_once_a_minute() -> None:
    door = Door()
    await door.until_rest()
    for _ in range(24 * 360):
        door.clock.advance(10_000)
        await asyncio.gather(*(door.call(answers=False) for _ in range(5)), return_exceptions=True)
    assert 1_400 < len(door.passed_at_ms) < 1_500


@pytest.mark.parametrize("answers", [True, False])
async def test_gate_after_a_rest_sends_one_call_ahead_and_the_others_wait_for_it(answers: bool) -> None:
    door = Door(per_second=1_000_000)
    await door.until_rest()
    asked = len(door.passed_at_ms)
    door.clock.advance(FIRST_REST_MS)
    calls = [asyncio.create_task(door.call(answers=answers, takes=5)) for _ in range(20)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert door.inside == 1
    assert door.gate.resting(*SHOP)
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert len(door.passed_at_ms) - asked == (20 if answers else 1)
    if not answers:
        assert sum(isinstance(result, ChannelRestsError) for result in results) == 19


async def test_gate_after_the_channel_is_back_lets_the_backlog_out_at_its_pace() -> None:
    door = Door()
    await door.until_rest()
    door.clock.advance(FIRST_REST_MS)
    started_ms, asked = door.clock.now_ms(), len(door.passed_at_ms)
    await asyncio.gather(*(door.call() for _ in range(200)))
    within_a_second = [at_ms for at_ms in door.passed_at_ms[asked:] if at_ms < started_ms + 1_000]
    assert len(within_a_second) <= PER_SECOND * 11 // 10


async def test_gate_counts_silence_that_a_use_case_wrapped() -> None:
    door = Door()
    for _ in range(SILENT_AFTER):
        with pytest.raises(PreconditionError):
            async with door.gate.call(*SHOP):
                raise PreconditionError("UNKNOWN", "wrapped") from ChannelUnknownError("no answer")
    assert door.gate.resting(*SHOP)


async def test_gate_neither_counts_other_errors_as_silence_nor_as_answers() -> None:
    door = Door()
    await door.silent(SILENT_AFTER - 1)
    with pytest.raises(PreconditionError):
        async with door.gate.call(*SHOP):
            raise PreconditionError("OTHER", "nothing to do with the channel")
    assert not door.gate.resting(*SHOP)
    await door.silent()
    assert door.gate.resting(*SHOP)


async def test_gate_whose_probe_is_cancelled_sends_another() -> None:
    door = Door()
    await door.until_rest()
    door.clock.advance(FIRST_REST_MS)
    probe = asyncio.create_task(door.call(takes=1_000_000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    await door.call()
    assert not door.gate.resting(*SHOP)


@pytest.mark.parametrize("jump_ms", [3_600_000, -3_600_000])
async def test_gate_rest_outlasts_no_jump_of_the_clock(jump_ms: int) -> None:
    door = Door()
    await door.until_rest()
    door.clock.advance(jump_ms)
    assert not door.gate.resting(*SHOP)
    await door.call()


@pytest.mark.parametrize("step_ms", [3_600_000, -3_600_000])
async def test_gate_keeps_its_pace_when_the_clock_jumps_while_a_call_waits(step_ms: int) -> None:
    door = Door()
    for _ in range(PER_SECOND // 10):
        await door.call()
    door.step_ms = step_ms
    await door.call()
    door.step_ms = 0
    started_ms, passed = door.clock.now_ms(), len(door.passed_at_ms)
    await asyncio.gather(*(door.call() for _ in range(100)))
    took_ms = door.passed_at_ms[-1] - started_ms
    assert len(door.passed_at_ms) == passed + 100
    assert 890 <= took_ms <= 1_000


class TestBackoff:
    """The longest and the shortest draw bound each wait."""

    @pytest.mark.parametrize(
        ("looks", "shortest", "longest"),
        [(0, 500, 1_000), (1, 1_000, 2_000), (5, 16_000, 32_000), (6, 30_000, 60_000), (10**9, 30_000, 60_000)],
    )
    def test_backoff_doubles_up_to_the_longest_and_draws_in_its_upper_half(
        self, looks: int, shortest: int, longest: int
    ) -> None:
        assert backoff_ms(looks, 1_000, 60_000, lambda _: 0) == longest
        assert backoff_ms(looks, 1_000, 60_000, lambda n: n - 1) == shortest

    def test_backoff_of_a_millisecond_is_never_nothing(self) -> None:
        assert backoff_ms(0, 1, 1_000, lambda n: n - 1) == 1

    def test_backoff_spreads_what_failed_together(self) -> None:
        draws: Sequence[int] = range(0, 500, 50)
        waits = {backoff_ms(0, 1_000, 60_000, lambda _, drawn=drawn: drawn) for drawn in draws}  # type: ignore[misc]
        assert len(waits) == len(draws)
