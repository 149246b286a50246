"""What every job passes before it talks to a channel: so many calls at once, so many a second, none to who is silent.

The pace is the channel's, whichever account is asked about; silence is the account's: a contract that was ended, or a
secret that was revoked, says nothing about the channel's other accounts.

One gate a process, shared by its jobs. It is a courtesy to channels and guards no money. All of it runs on one event
loop.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from paycore.channels.protocol import ChannelRestsError, ChannelTraits, ChannelUnknownError
from paycore.domain.clock import Clock
from paycore.usecases.quiet_log import QuietLog

AT_ONCE = 16
"""Calls that are under way at one channel at the same time, at most."""

SILENT_AFTER = 5
"""Calls without a usable answer, one after the other, that make an account rest."""

FIRST_REST_MS = 1_000
LONGEST_REST_MS = 60_000

_CALL = 1_000
"""What one call takes of a channel's allowance, which grows by calls_per_second each millisecond."""

_SAVED_PART = 10
"""An idle channel saves up a tenth of a second's calls."""

SleepMs = Callable[[int], Awaitable[None]]

Account = tuple[str, str]
"""The name of a channel, and that of one of its accounts."""

_log = QuietLog()


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
        self._rests: dict[Account, _Rest] = {}

    @asynccontextmanager
    async def call(self, channel: str, account: str) -> AsyncIterator[None]:
        """Wait for a turn, then hold a place until the block ends. One call to the channel goes in each block.

        A ChannelUnknownError that leaves the block, or the cause of what leaves it, counts as silence. After several in
        a row the account rests: one second at first, doubling to a minute; then one call goes ahead, and the others
        wait for what comes of it. Raises ChannelRestsError, before the block is entered, where nothing may be asked.
        """
        turnstile, rest = self._turnstile(channel), self._rest((channel, account))
        # Waited for outside: what waits for an account that may not answer keeps no place from the others.
        await rest.wait_for_probe()
        if rest.is_shaken:
            async with rest.probing(), turnstile.turn(), rest.listening():
                yield
            return
        async with turnstile.turn():
            # The account may have fallen silent while this call waited for its turn.
            rest.check_unshaken()
            async with rest.listening():
                yield

    def resting(self, channel: str, account: str) -> bool:
        """Whether there is no point in claiming work for this account now."""
        return self._rest((channel, account)).rests()

    def silent(self) -> set[Account]:
        """Return the accounts that are resting."""
        return {account for account, rest in self._rests.items() if rest.rests()}

    def recovering(self) -> bool:
        """Whether an account has rested long enough and nobody has heard of it since: one piece of work is enough."""
        return any(rest.recovers() for rest in self._rests.values())

    def _turnstile(self, channel: str) -> "_Turnstile":
        found = self._turnstiles.get(channel)
        if found is None:
            per_second = self._traits_of(channel).calls_per_second
            found = _Turnstile(per_second, self._clock, self._sleep, self._at_once)
            self._turnstiles[channel] = found
        return found

    def _rest(self, account: Account) -> "_Rest":
        found = self._rests.get(account)
        if found is None:
            found = self._rests[account] = _Rest(account, self._clock)
        return found


class _Turnstile:
    """One channel's pace."""

    def __init__(self, per_second: int, clock: Clock, sleep: SleepMs, at_once: int) -> None:
        self._per_second = per_second
        self._clock = clock
        self._sleep = sleep
        self._places = asyncio.Semaphore(at_once)
        self._turn = asyncio.Lock()
        self._most = max(_CALL, _CALL * per_second // _SAVED_PART)
        self._allowance = self._most
        self._counted_at_ms = clock.now_ms()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place and then for a turn; hold the place until the block ends."""
        async with self._places:
            await self._wait_for_turn()
            yield

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


class _Rest:
    """Whether an account is answered about, and how long it is left alone where it is not."""

    def __init__(self, account: Account, clock: Clock) -> None:
        self._channel, self._account = account
        self._clock = clock
        self._silences = 0
        self._rest_ms = 0
        self._rests_since_ms = 0
        self._probe: asyncio.Event | None = None

    @property
    def is_shaken(self) -> bool:
        """Whether it has rested and nobody has heard of it since."""
        return self._rest_ms > 0

    def rests(self) -> bool:
        return self._probe is not None or self._in_rest()

    def recovers(self) -> bool:
        return self.is_shaken and not self.rests()

    def _in_rest(self) -> bool:
        # A clock that was set back would prolong the rest by its step: a time before the rest began is after it.
        return 0 <= self._clock.now_ms() - self._rests_since_ms < self._rest_ms

    async def wait_for_probe(self) -> None:
        while self._probe is not None:
            await self._probe.wait()
        if self.rests():
            raise self._not_asked()

    def check_unshaken(self) -> None:
        if self.is_shaken:
            raise self._not_asked()

    def _not_asked(self) -> ChannelRestsError:
        return ChannelRestsError(
            f"{self._channel} was not asked: it has not answered lately about account {self._account}"
        )

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        """Go ahead of all others after a rest."""
        self._probe = probe = asyncio.Event()
        try:
            yield
        finally:
            self._probe = None
            probe.set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
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
            self._begin(min(max(2 * self._rest_ms, FIRST_REST_MS), LONGEST_REST_MS))
        elif self._silences >= SILENT_AFTER and not self._rest_ms:
            self._begin(FIRST_REST_MS)

    def _begin(self, rest_ms: int) -> None:
        self._rest_ms = rest_ms
        self._rests_since_ms = self._clock.now_ms()
        _log.warning(
            "channel_rests",
            channel=self._channel,
            account=self._account,
            silences=self._silences,
            rest_ms=rest_ms,
        )

    def _answered(self) -> None:
        if self._rest_ms:
            _log.info("channel_answers_again", channel=self._channel, account=self._account, silences=self._silences)
        self._silences = self._rest_ms = 0
