"""So much of what happens in a day at once, until it is stopped."""

from __future__ import annotations

import asyncio

from tests.crash import stories
from tests.crash.stories import Day, Story

STORIES: dict[Story, int] = {
    stories.paid_once: 3,
    stories.another_page: 2,
    stories.two_pages: 3,
    stories.two_pages_and_a_bank_that_hangs: 1,
    stories.two_pages_and_a_bank_that_breaks: 1,
    stories.two_pages_and_a_bank_that_takes_its_time: 1,
    stories.two_pages_and_a_bank_that_refuses_at_first: 1,
    stories.charged: 2,
    stories.charged_by_a_bank_that_hangs: 1,
    stories.charged_later: 1,
    stories.closed: 2,
    stories.closed_then_paid: 1,
    stories.closed_then_paid_and_returned: 1,
    stories.closed_while_paid: 2,
    stories.left_to_expire: 1,
    stories.paid_after_expiry: 1,
    stories.lost_notification: 1,
    stories.lost_notification_then_closed: 1,
    stories.paid_twice_on_one_page: 2,
    stories.paid_twice_on_one_page_and_never_told: 1,
    stories.paid_and_said_to_have_failed: 1,
    stories.another_amount_taken: 1,
    stories.told_by_a_gateway: 3,
    stories.told_a_wrong_amount: 1,
    stories.told_of_nobody: 1,
}
"""How often each comes in a bag of them."""


class Traffic:
    """So many stories at once, drawn bag by bag, until it is stopped."""

    def __init__(self, day: Day, at_once: int) -> None:
        self._day = day
        self._at_once = at_once
        self._bag: list[Story] = []
        self._stopping = False
        self.told = 0

    async def run(self) -> None:
        """Return when the last story has ended after ``stop``. Raises what went wrong in one."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._at_once):
                tasks.create_task(self._tell())

    def stop(self) -> None:
        """Begin no other story."""
        self._stopping = True

    async def _tell(self) -> None:
        while not self._stopping:
            await self._next()(self._day)
            self.told += 1
            await self._day.think(0.3)

    def _next(self) -> Story:
        if not self._bag:
            self._bag = [story for story, count in STORIES.items() for _ in range(count)]
            self._day.draw.shuffle(self._bag)
        return self._bag.pop()
