"""Query: everything on record about one payment; asked to, the channels are asked first."""

import asyncio
from typing import NamedTuple

from paycore.channels.protocol import ChannelUnknownError
from paycore.domain.clock import Clock
from paycore.domain.errors import NotFoundError, PaycoreError
from paycore.store.protocol import Store
from paycore.store.rows import ChannelOrderRow, PaymentFile
from paycore.usecases.attempts import Conversations
from paycore.usecases.keys import PAYMENT_NOT_FOUND, PaymentKey, resolve
from paycore.usecases.quiet_log import QuietLog

ANSWER_MARGIN_MS = 100
"""Kept back from the caller's deadline, so that the answer arrives before it."""

_log = QuietLog()


class Refreshed(NamedTuple):
    """A payment's file after its channels were asked. unanswered: the attempts of which none said anything in time."""

    file: PaymentFile
    unanswered: list[int]


class Query:
    """Reads payments."""

    def __init__(self, store: Store, conversations: Conversations, clock: Clock) -> None:
        self._store = store
        self._conversations = conversations
        self._clock = clock
        self._asking: set[asyncio.Task[bool]] = set()

    async def find(self, key: PaymentKey) -> PaymentFile:
        """Return a payment's file. Raises NotFoundError, InvalidArgumentError, StoreUnavailableError."""
        return await asyncio.to_thread(self._find, key)

    async def refresh(self, key: PaymentKey, *, deadline_ms: int) -> Refreshed:
        """Ask the channel about each live attempt, take in what it says, then return the file.

        deadline_ms: when the caller stops waiting, by the clock. A channel that gives no answer, or none in time, fails
        nothing: what is on record is returned, and what it says later is taken in later. Raises as ``find`` does.
        """
        file = await self.find(key)
        asked = {row.attempt: self._ask(row) for row in file.record.live_attempts()}
        if not asked:
            return Refreshed(file, [])
        wait_ms = max(0, deadline_ms - ANSWER_MARGIN_MS - self._clock.now_ms())
        answered, _ = await asyncio.wait(asked.values(), timeout=wait_ms / 1000)
        unanswered = [attempt for attempt, task in asked.items() if task not in answered or not task.result()]
        return Refreshed(await self.find(key), unanswered)

    async def drain(self) -> None:
        """Wait until everything that was asked is written down."""
        while self._asking:
            await asyncio.wait(self._asking)

    def _ask(self, attempt: ChannelOrderRow) -> "asyncio.Task[bool]":
        # Not cancelled at the deadline: the answer may hold money.
        task = asyncio.create_task(self._is_answered(attempt))
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)
        return task

    async def _is_answered(self, attempt: ChannelOrderRow) -> bool:
        """Ask about one attempt; return whether an answer came and was taken in."""
        try:
            await self._conversations.query(attempt)
        except (ChannelUnknownError, PaycoreError) as error:
            _log.info("refresh_unanswered", payment_id=attempt.payment_id, attempt=attempt.attempt, why=str(error))
            return False
        return True

    def _find(self, key: PaymentKey) -> PaymentFile:
        file = self._store.load_file(resolve(self._store, key))
        if file is None:
            raise NotFoundError(PAYMENT_NOT_FOUND, "no such payment")
        return file
