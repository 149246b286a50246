"""What every job passes before it talks to a channel: so many calls at once, so many a second, none to a silent one.

One gate a process, shared by its jobs. It is a courtesy to channels and guards no money. All of it runs on one event
loop.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from paycore.channels.protocol import ChannelTraits, ChannelUnknownError
from paycore.domain.clock import Clock
from paycore.usecases.quiet_log import QuietLog

AT_ONCE = 16
"""Calls that are under way at one channel at the same time, at most."""

SILENT_AFTER = 5
"""Calls without a usable answer, one after the other, that make a channel rest."""

FIRST_REST_MS = 1_000
LONGEST_REST_MS = 60_000

_CALL = 1_000
"""What one call takes of a channel's allowance, which grows by calls_per_second each millisecond."""

_SAVED_PART = 10
"""An idle channel saves up a tenth of a second's calls."""

SleepMs = Callable[[int], Awaitable[None]]

_log = QuietLog()


class ChannelRestsError(ChannelUnknownError):
    """The channel was not asked: it has not answered lately and rests. The work stays as due as it was."""


async def sleep_ms(wait_ms: int) -> None:
    """Wait."""
    await asyncio.sleep(wait_ms / 1000)


class ChannelGate:
    """Lets calls through. traits_of: how a channel wants to be treated, by its name (``ChannelRegistry.traits``)."""

    def __init__(
        self,
        traits_of: Callable[[str], ChannelTraits],
        clock: Clock,
        sleep: SleepMs = sleep_ms,
        at_once: int = AT_ONCE,
    ) -> None:
        self._traits_of = traits_of
        self._clock = clock
        self._sleep = sleep
        self._at_once = at_once
        self._turnstiles: dict[str, _Turnstile] = {}

    def call(self, channel: str) -> AbstractAsyncContextManager[None]:
        """Wait for a turn, then hold a place until the block ends. One call to the channel goes in each block.

        A ChannelUnknownError that leaves the block, or the cause of what leaves it, counts as silence. After several in
        a row the channel rests: one second at first, doubling to a minute; then one call goes ahead, and the others
        wait for what comes of it. Raises ChannelRestsError, before the block is entered, where nothing may be asked.
        """
        return self._turnstile(channel).call()

    def resting(self, channel: str) -> bool:
        """Whether there is no point in claiming work for this channel now."""
        return self._turnstile(channel).rests()

    def silent(self) -> list[str]:
        """Return the channels that are resting."""
        return [channel for channel, turnstile in self._turnstiles.items() if turnstile.rests()]

    def recovering(self) -> bool:
        """Whether a channel has rested long enough and nobody has heard of it since: one piece of work is enough."""
        return any(turnstile.recovers() for turnstile in self._turnstiles.values())

    def _turnstile(self, channel: str) -> "_Turnstile":
        found = self._turnstiles.get(channel)
        if found is None:
            per_second = self._traits_of(channel).calls_per_second
            found = _Turnstile(channel, per_second, self._clock, self._sleep, self._at_once)
            self._turnstiles[channel] = found
        return found


class _Turnstile:
    """One channel's part of the gate."""

    def __init__(self, channel: str, per_second: int, clock: Clock, sleep: SleepMs, at_once: int) -> None:
        self._channel = channel
        self._per_second = per_second
        self._clock = clock
        self._sleep = sleep
        self._places = asyncio.Semaphore(at_once)
        self._turn = asyncio.Lock()
        self._most = max(_CALL, _CALL * per_second // _SAVED_PART)
        self._allowance = self._most
        self._counted_at_ms = clock.now_ms()
        self._silences = 0
        self._rest_ms = 0
        self._rests_since_ms = 0
        self._probe: asyncio.Event | None = None

    def rests(self) -> bool:
        return self._probe is not None or self._in_rest()

    def recovers(self) -> bool:
        return self._rest_ms > 0 and not self._in_rest()

    def _in_rest(self) -> bool:
        # A clock that was set back would prolong the rest by its step: a time before the rest began is after it.
        return 0 <= self._clock.now_ms() - self._rests_since_ms < self._rest_ms

    @asynccontextmanager
    async def call(self) -> AsyncIterator[None]:
        async with self._places:
            await self._wait_for_probe()
            if self._rest_ms:
                async with self._probing():
                    yield
                return
            await self._wait_for_turn()
            # The channel may have fallen silent while this call waited for its turn.
            self._check_awake()
            async with self._listening():
                yield

    async def _wait_for_probe(self) -> None:
        while self._probe is not None:
            await self._probe.wait()
        self._check_awake()

    def _check_awake(self) -> None:
        if self.rests():
            raise ChannelRestsError(f"{self._channel} was not asked: it has not answered lately")

    @asynccontextmanager
    async def _probing(self) -> AsyncIterator[None]:
        """Go ahead of all others after a rest."""
        self._probe = probe = asyncio.Event()
        try:
            await self._wait_for_turn()
            async with self._listening():
                yield
        finally:
            self._probe = None
            probe.set()

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Note whether the call that is made inside was answered."""
        try:
            yield
        except Exception as error:
            if isinstance(error, ChannelUnknownError) or isinstance(error.__cause__, ChannelUnknownError):
                self._silent()
            raise
        self._answered()

    def _silent(self) -> None:
        self._silences += 1
        if self._probe is not None:
            self._rest(min(max(2 * self._rest_ms, FIRST_REST_MS), LONGEST_REST_MS))
        elif self._silences >= SILENT_AFTER and not self._rest_ms:
            self._rest(FIRST_REST_MS)

    def _rest(self, rest_ms: int) -> None:
        self._rest_ms = rest_ms
        self._rests_since_ms = self._clock.now_ms()
        _log.warning("channel_rests", channel=self._channel, silences=self._silences, rest_ms=rest_ms)

    def _answered(self) -> None:
        if self._rest_ms:
            _log.info("channel_answers_again", channel=self._channel, silences=self._silences)
        self._silences = self._rest_ms = 0

    async def _wait_for_turn(self) -> None:
        """Take one call's share of the allowance, once there is so much."""
        async with self._turn:
            self._refill(0)
            if self._allowance < _CALL:
                wait_ms = (_CALL - self._allowance + self._per_second - 1) // self._per_second
                await self._sleep(wait_ms)
                self._refill(wait_ms)
            self._allowance -= _CALL

    def _refill(self, slept_ms: int) -> None:
        # What was slept counts even where the clock was set back meanwhile; a clock set forward fills it up, no more.
        now_ms = self._clock.now_ms()
        elapsed_ms = max(now_ms - self._counted_at_ms, slept_ms)
        self._counted_at_ms = now_ms
        self._allowance = min(self._allowance + elapsed_ms * self._per_second, self._most)
