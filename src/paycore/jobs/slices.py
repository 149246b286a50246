"""Who works where: a job takes shares of the payments by leases, so that processes do not do the same work twice.

A lease saves work; it does not guard money. A process that was held up beyond the end of its lease may meet another one
on the same payment: every write of a job is conditional on what was read, or has a derived key.
"""

import asyncio
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

    def __init__(self, slices: Sequence[int], token: str, clock: Clock, until_ms: int) -> None:
        self.slices = slices
        self.token = token
        self._clock = clock
        self._until_ms = until_ms

    def lasts(self) -> bool:
        """Whether enough of the lease is left to begin another piece of work."""
        return self._clock.now_ms() < self._until_ms


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
        held = await self._claim(job, wanted, most, token)
        # Begun before the lease was written, and with a part of it kept back for the piece that runs when it ends.
        until_ms = self._clock.now_ms() + self._lease_ms // 2
        try:
            yield Held(held, token, self._clock, until_ms)
        finally:
            if held:
                await self._writer.run(_Release(job, held, token))

    async def _claim(self, job: str, wanted: Sequence[int], most: int, token: str) -> list[int]:
        if not wanted:
            return []
        # Asked by a reader first: the writer is troubled only where there is something to take.
        free = await asyncio.to_thread(self._store.free_slices, job, list(wanted), self._clock.now_ms())
        if not free:
            return []
        # From a place of its own, so that processes that begin together do not want the same shares.
        start = int.from_bytes(token.encode()) % SLICES
        from_there = sorted(free, key=lambda slice_: (slice_ - start) % SLICES)[:most]
        held = await self._writer.run(_Claim(job, from_there, self._lease_ms, token))
        failpoint("slices.claimed")
        return held
