"""Who works where: a job takes shares of the payments by leases, so that processes do not do the same work twice.

A lease saves work; it does not guard money. A process that was held up beyond the end of its lease may meet another one
on the same payment: every write of a job is conditional on what was read, or has a derived key.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from paycore.domain.clock import Clock
from paycore.domain.ids import SLICES
from paycore.failpoint import failpoint
from paycore.store.protocol import Store, WriteTransaction
from paycore.usecases.writer import UnindexedUnit, Writer

MAX_HELD = 4
"""Shares that one pass takes at most: the others are left to other processes."""


class _Claim(UnindexedUnit):
    def __init__(self, job: str, slices: Sequence[int], lease_ms: int, token: str) -> None:
        self._job, self._slices, self._lease_ms, self._token = job, slices, lease_ms, token

    def apply(self, transaction: WriteTransaction) -> list[int]:
        now_ms = transaction.stamp.recorded_at_ms
        return transaction.claim_slices(self._job, self._slices, now_ms, now_ms + self._lease_ms, self._token)


class _Release(UnindexedUnit):
    def __init__(self, job: str, slices: Sequence[int], token: str) -> None:
        self._job, self._slices, self._token = job, slices, token

    def apply(self, transaction: WriteTransaction) -> None:
        transaction.release_slices(self._job, self._slices, self._token)


class Held:
    """The shares that a pass has taken, for as long as its lease lasts. ``token`` names the pass uniquely."""

    def __init__(self, slices: Sequence[int], token: str, clock: Clock, began_ms: int, lasts_ms: int) -> None:
        self.slices = slices
        self.token = token
        self._clock = clock
        self._began_ms = began_ms
        self._lasts_ms = lasts_ms

    def lasts(self) -> bool:
        """Whether enough of the lease is left to begin another piece of work.

        Not where the clock was set back: nobody knows then how much of it has passed.
        """
        return 0 <= self._clock.now_ms() - self._began_ms < self._lasts_ms


class Slices:
    """Takes shares for jobs. lease_ms must be some times what one piece of work takes."""

    def __init__(self, store: Store, writer: Writer, clock: Clock, new_token: Callable[[], str], lease_ms: int) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock
        self._new_token = new_token
        self._lease_ms = lease_ms

    @asynccontextmanager
    async def take(self, job: str, wanted: Sequence[int], most: int = MAX_HELD) -> AsyncIterator[Held]:
        """Hold those of the wanted shares that are free, ``most`` at most, until the block ends.

        Raises StoreUnavailableError, ThrottledError.
        """
        token = self._new_token()
        began_ms = self._clock.now_ms()
        held = await self._claim(job, wanted, most, token)
        try:
            # A part of the lease is kept back for the piece that runs when it ends.
            yield Held(held, token, self._clock, began_ms, self._lease_ms // 2)
        finally:
            if held:
                await self._writer.run(_Release(job, held, token))

    async def _claim(self, job: str, wanted: Sequence[int], most: int, token: str) -> list[int]:
        if not wanted:
            return []
        # Asked by a reader first: the writer is troubled only where there is something to take.
        now_ms = self._clock.now_ms()
        free = await asyncio.to_thread(self._store.free_slices, job, list(wanted), now_ms, now_ms + self._lease_ms)
        if not free:
            return []
        # From a place of its own, so that processes that begin together do not want the same shares.
        start = zlib.crc32(token.encode()) % SLICES
        from_there = sorted(free, key=lambda slice_: (slice_ - start) % SLICES)[:most]
        held = await self._writer.run(_Claim(job, from_there, self._lease_ms, token))
        failpoint("slices.claimed")
        return held
