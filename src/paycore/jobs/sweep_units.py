"""The sweeper's writes."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from paycore.jobs.sweep_findings import Finding, Moment, Owed, Untasked, Untried, find
from paycore.store import sweeps
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import PaymentRecord, TaskRow
from paycore.store.sweeps import SweepCase
from paycore.usecases.refund import derive_refunds, new_try, split_intents
from paycore.usecases.tasks import Schedule
from paycore.usecases.writer import UnindexedUnit

Marks = Mapping[str, Mapping[int, int]]
"""How far a sweep has come: the sweep's name -> what it counts by, such as writers -> the place."""


class Repaired(NamedTuple):
    """What was put right of one payment."""

    payment_id: int
    finding: Finding


class Repair(UnindexedUnit):
    """Creates what is missing on some payments; returns what it really created.

    Looks again under the locks of the payments, so that whoever finds the same at the same time creates it once: two
    sweepers, or a sweeper and whoever should have done it in the first place.
    """

    def __init__(self, payment_ids: Sequence[int], schedule: Schedule, moment: Moment) -> None:
        self._payment_ids = payment_ids
        self._schedule = schedule
        self._moment = moment

    def apply(self, transaction: WriteTransaction) -> list[Repaired]:
        """Write refunds, tries and tasks, all of which have derived keys."""
        cases = transaction.run(
            lambda connection: sweeps.load_cases(connection, self._payment_ids, transaction.lock_records)
        )
        return [
            Repaired(payment_id, finding)
            for payment_id, case in cases.items()
            for finding in find(case, self._moment)
            if self._create(transaction, case, finding)
        ]

    def _create(self, transaction: WriteTransaction, case: SweepCase, finding: Finding) -> bool:
        match finding:
            case Owed():
                return _derive(transaction, case, finding)
            case Untried(_, refund, seq):
                stamp = transaction.stamp
                row = new_try(refund, seq=seq, next_at_ms=stamp.recorded_at_ms, stamp=stamp)
                return transaction.insert_refund_try(row)
            case Untasked():
                transaction.put_tasks([self._task(case, finding, transaction)])
                return True
            case _:
                return False

    def _task(self, case: SweepCase, finding: Untasked, transaction: WriteTransaction) -> TaskRow:
        if finding.attempt is None:
            return self._schedule.to_close(case.record.payment, transaction.stamp)
        return self._schedule.to_query(finding.attempt, transaction.stamp)


def _derive(transaction: WriteTransaction, case: SweepCase, finding: Owed) -> bool:
    intents = derive_refunds(case.record, [finding.excess], transaction.stamp)
    if intents:
        transaction.insert_refunds(*split_intents(intents))
    return bool(intents)


class Note(UnindexedUnit):
    """Writes how far a sweep has come and which payments it looks at again, after what it found was put right.

    waiting: payments that are looked at again; the closing of one that waits for its outcome, and is new among them, is
    made due, should it rest. whole: payments that are looked at no more. living: the writers whose places are kept.
    """

    def __init__(
        self,
        schedule: Schedule,
        marks: Marks,
        *,
        waiting: Mapping[int, PaymentRecord],
        whole: Iterable[int] = (),
        living: Sequence[int] | None = None,
    ) -> None:
        self._schedule = schedule
        self._marks = marks
        self._waiting = waiting
        self._whole = whole
        self._living = living

    def apply(self, transaction: WriteTransaction) -> None:
        """Write it, all or nothing."""
        now_ms = transaction.stamp.recorded_at_ms
        new = transaction.run(lambda connection: self._write_places(connection, now_ms))
        tasks = []
        for record in (self._waiting[payment_id] for payment_id in new):
            if record.outcome is None:
                task = self._schedule.to_close(record.payment, transaction.stamp)
                tasks.append(task._replace(next_at_ms=max(now_ms, task.next_at_ms)))
        transaction.put_tasks(tasks)

    def _write_places(self, connection: Any, now_ms: int) -> list[int]:
        for sweep, places in self._marks.items():
            sweeps.put_marks(connection, sweep, places)
        if self._living is not None:
            sweeps.drop_dead_marks(connection, self._living)
        sweeps.forget(connection, self._whole)
        return sweeps.remember(connection, self._waiting, now_ms)
