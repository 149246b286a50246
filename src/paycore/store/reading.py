"""What any database is asked for as committed: the reads of ``store.protocol.Store``.

A database's own module says how a read is run (``read``) and which of its driver's errors mean what.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol, TypeVar

from sqlalchemy import Connection

from paycore.store import columns, lookups, refunds, tasks
from paycore.store.columns import IndexColumns
from paycore.store.protocol import Backlog
from paycore.store.rows import PaymentFile, PaymentRecord, TaskRow

_Read = TypeVar("_Read")


class SqlReads(Protocol):
    """Base of the stores."""

    def read(self, look: Callable[[Connection], _Read]) -> _Read:
        """Run a read in a transaction of its own. Raises StoreUnavailableError."""
        ...

    def find_payment_id(self, merchant_id: str, merchant_order_no: str) -> int | None:
        return self.read(lambda connection: lookups.find_payment_id(connection, merchant_id, merchant_order_no))

    def load_record(self, payment_id: int) -> PaymentRecord | None:
        return self.load_records([payment_id]).get(payment_id)

    def load_records(self, payment_ids: Collection[int]) -> dict[int, PaymentRecord]:
        return self.read(lambda connection: lookups.load_records(connection, payment_ids))

    def index_columns(self, before: int, limit: int) -> IndexColumns:
        return self.read(lambda connection: columns.columns_before(connection, before, limit))

    def load_file(self, payment_id: int) -> PaymentFile | None:
        return self.read(lambda connection: lookups.load_file(connection, payment_id))

    def due_refund_slices(self, now_ms: int, accounts: Collection[tuple[str, str]] | None = None) -> list[int]:
        return self.read(lambda connection: refunds.due_refund_slices(connection, now_ms, accounts))

    def oldest_due_refund_ms(self, now_ms: int) -> int | None:
        return self.read(lambda connection: refunds.oldest_due_refund_ms(connection, now_ms))

    def due_task_slices(self, kind: int, now_ms: int) -> list[int]:
        return self.read(lambda connection: tasks.due_task_slices(connection, kind, now_ms))

    def due_tasks(self, kind: int, slice_: int, now_ms: int, limit: int, after: TaskRow | None = None) -> list[TaskRow]:
        return self.read(lambda connection: tasks.due_tasks(connection, kind, slice_, now_ms, limit, after))

    def oldest_due_task_ms(self, kind: int, now_ms: int) -> int | None:
        return self.read(lambda connection: tasks.oldest_due_task_ms(connection, kind, now_ms))

    def free_slices(self, job: str, slices: Sequence[int], now_ms: int, lease_until_ms: int) -> list[int]:
        return self.read(lambda connection: tasks.free_slices(connection, job, slices, now_ms, lease_until_ms))

    def backlog(self) -> Backlog:
        return self.read(lookups.backlog)
