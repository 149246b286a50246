"""The writes of the closer, the recoverer and the ender."""

from collections.abc import Callable, Sequence

from paycore.domain.leases import lease_holds
from paycore.domain.verdicts import FINALLY_UNPAID, AttemptState
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import ChannelOrderRow, PaymentRecord, TaskRow
from paycore.usecases.writer import UnindexedUnit

IsFinished = Callable[[TaskRow, PaymentRecord | None], bool]
"""Tells from what is on record of a task's payment (None: there is none) that nothing is left to do."""


class DropTasks(UnindexedUnit):
    """Drops tasks, but for those that somebody has moved since they were read; returns how many went."""

    def __init__(self, tasks: Sequence[TaskRow]) -> None:
        self._tasks = tasks

    def apply(self, transaction: WriteTransaction) -> int:
        """Delete them."""
        return transaction.drop_tasks(self._tasks)


class DropFinished(UnindexedUnit):
    """Drops tasks that are still finished once their payments are held; returns how many went.

    For what may become unfinished again: whoever makes it so writes the task under the same lock.
    """

    def __init__(self, tasks: Sequence[TaskRow], is_finished: IsFinished) -> None:
        self._tasks = tasks
        self._is_finished = is_finished

    def apply(self, transaction: WriteTransaction) -> int:
        """Look again, and delete them."""
        records = transaction.lock_records({task.payment_id for task in self._tasks})
        return transaction.drop_tasks(
            [task for task in self._tasks if self._is_finished(task, records.get(task.payment_id))]
        )


class MoveTask(UnindexedUnit):
    """Writes when a task is due next, unless somebody has moved it since it was read."""

    def __init__(self, task: TaskRow, *, next_at_ms: int, error: str) -> None:
        self._task = task
        self._moved = task._replace(next_at_ms=next_at_ms, looks=task.looks + 1, last_error=error)

    def apply(self, transaction: WriteTransaction) -> bool:
        """Return whether it was written."""
        return transaction.move_task(self._task, self._moved)


class ClaimEnd(UnindexedUnit):
    """Leases an attempt that is to be ended, or does so for longer, so that Pay hands its page to nobody meanwhile.

    Returns whether it is ours; not where it need not be ended any more, or somebody else talks about it.
    """

    def __init__(self, attempt: ChannelOrderRow, *, lease_token: str, lease_ms: int) -> None:
        self._payment_id, self._attempt = attempt.payment_id, attempt.attempt
        self._lease_token = lease_token
        self._lease_ms = lease_ms

    def apply(self, transaction: WriteTransaction) -> bool:
        """Take the lease. Pay takes an attempt up again under the same lock, so one of the two sees the other."""
        now_ms = transaction.stamp.recorded_at_ms
        row = transaction.lock_records([self._payment_id])[self._payment_id].attempts[self._attempt]
        if row.superseded_at_ms is None or AttemptState(row.state) in FINALLY_UNPAID:
            return False
        if row.lease_token != self._lease_token and lease_holds(row.lease_until_ms, now_ms):
            return False
        leased = row._replace(lease_until_ms=now_ms + self._lease_ms, lease_token=self._lease_token)
        return transaction.update_channel_order(leased, expected=(AttemptState(row.state),))


class ReleaseEnd(UnindexedUnit):
    """Gives an attempt's lease back, where it is still held by this token."""

    def __init__(self, attempt: ChannelOrderRow, *, lease_token: str) -> None:
        self._payment_id, self._attempt = attempt.payment_id, attempt.attempt
        self._lease_token = lease_token

    def apply(self, transaction: WriteTransaction) -> None:
        """End the lease."""
        row = transaction.lock_records([self._payment_id])[self._payment_id].attempts[self._attempt]
        if row.lease_token == self._lease_token:
            free = row._replace(lease_until_ms=0, lease_token="")
            transaction.update_channel_order(free, expected=(AttemptState(row.state),))
