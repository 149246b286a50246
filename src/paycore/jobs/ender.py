"""Ends attempts that a younger one took the place of, so that nobody pays twice: asks about them, then closes them.

Not before the age from which on a channel wants to be asked to close. What Pay has taken up again is left alone.
"""

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager

from paycore.domain.clock import Clock
from paycore.domain.errors import PreconditionError
from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState, TaskKind
from paycore.failpoint import failpoint
from paycore.jobs.attempt_units import ClaimEnd, DropFinished, ReleaseEnd
from paycore.jobs.backoff import Draw
from paycore.jobs.gate import Account, ChannelGate
from paycore.jobs.slices import Slices
from paycore.jobs.task_job import DONE, Step, TaskJob
from paycore.store.protocol import Store
from paycore.store.rows import ChannelOrderRow, PaymentRecord, TaskRow
from paycore.usecases.attempts import Conversations, Gate
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import Writer


class Ender(TaskJob):
    """Works off the tasks of kind END.

    lease_ms must outlast a channel call and what is written after it; ``new_token`` names each end.
    """

    name = "ender"
    kind = TaskKind.END

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        accounts: Collection[Account],
        conversations: Conversations,
        schedule: Schedule,
        slices: Slices,
        gate: ChannelGate,
        clock: Clock,
        new_token: Callable[[], str],
        draw: Draw,
        lease_ms: int,
    ) -> None:
        super().__init__(
            store=store, writer=writer, accounts=accounts, slices=slices, gate=gate, clock=clock, draw=draw
        )
        self._conversations = conversations
        self._schedule = schedule
        self._new_token = new_token
        self._lease_ms = lease_ms

    def _is_finished(self, task: TaskRow, record: PaymentRecord | None) -> bool:
        attempt = None if record is None else record.attempts.get(task.attempt)
        if record is None or attempt is None or task.attempt in record.captured_attempts():
            return True
        if attempt.superseded_at_ms is None or AttemptState(attempt.state) in FINALLY_UNPAID:
            return True
        # From its expiry on the closer and the recoverer's last look end it.
        return self._clock.now_ms() > attempt.expire_at_ms

    async def _drop_finished(self, tasks: Sequence[TaskRow]) -> None:
        # What was taken up again may be given up again meanwhile: the payment is held while that is looked at.
        await self._writer.run(DropFinished(tasks, self._is_finished))

    def _asks(self, task: TaskRow, record: PaymentRecord) -> set[Account]:
        attempt = record.attempts[task.attempt]
        return {(attempt.channel, attempt.account)}

    async def _look(self, task: TaskRow, record: PaymentRecord) -> Step:
        attempt = record.attempts[task.attempt]
        not_before_ms = self._schedule.end_at_ms(attempt)
        if self._clock.now_ms() < not_before_ms:
            return Step(not_before_ms)
        token = self._new_token()
        try:
            await self._conversations.behind(self._leasing(attempt, token)).end(attempt)
        except PreconditionError:
            # Whoever pays meanwhile is not kept from the page.
            await self._writer.run(ReleaseEnd(attempt, lease_token=token))
            raise
        return DONE

    def _leasing(self, attempt: ChannelOrderRow, token: str) -> Gate:
        """A gate behind which the attempt is leased before each call, however long the call had to wait for its turn.

        Between two calls the lease may end, and Pay may hand the page out again: then the next call is not made.
        """

        @asynccontextmanager
        async def call(channel: str, account: str) -> AsyncIterator[None]:
            async with self._gate.call(channel, account):
                failpoint("ender.before_lease")
                if not await self._writer.run(ClaimEnd(attempt, lease_token=token, lease_ms=self._lease_ms)):
                    raise PreconditionError(
                        "ATTEMPT_TAKEN", "somebody else talks about it, or it need not be ended any more"
                    )
                failpoint("ender.leased")
                yield

        return call
