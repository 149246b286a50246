"""What a store must be able to do. SQLite's is ``store.sqlite``, PostgreSQL's ``store.postgresql``.

A ``Store`` has one writer, used by one thread, and any number of readers. The errors it raises:

* ``CommitUnknownError``: the commit was sent and not answered; deciding the group again settles it.
* ``StoreBusyError``: somebody else holds the database; the same group may be decided again at once.
* ``RowRefusedError``: a row breaks a rule of the database; the group fails with it for ever.
* ``StoreUnavailableError`` (domain): disk full, read-only, damaged, gone. Nothing was kept.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeVar

from paycore.domain.verdicts import AttemptState
from paycore.store.columns import IndexColumns
from paycore.store.rows import (
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentFile,
    PaymentRecord,
    PaymentRow,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
    Stamp,
    TaskRow,
)

_T = TypeVar("_T")


class StoreBusyError(Exception):
    """Another connection holds the database longer than the busy timeout. Transient."""


class CommitUnknownError(Exception):
    """The commit may or may not have happened. Every insert has a derived key, so the group can be run again."""


class RowRefusedError(Exception):
    """The database refuses a row by one of its rules. The same row is refused again."""


class DueRefund(NamedTuple):
    """A refund try that is due, with what is needed to send it."""

    refund: RefundRow
    attempt: ChannelOrderRow
    last_try: RefundTryRow


class FailureNote(NamedTuple):
    """A channel's word that an attempt failed. ends: the conversation ends by it; False where money was captured."""

    payment_id: int
    attempt: int
    code: str
    message: str
    failed_at_ms: int
    ends: bool


class Backlog(NamedTuple):
    """What is waiting, for the gauges. oldest_refund_at_ms: None when every refund is finished.

    refunds_need_attention: unfinished ones that a person was told of. oldest_quarantine_at_ms: when the oldest open
    evidence was first seen; None when none is open.
    """

    quarantine_open: int
    oldest_refund_at_ms: int | None
    refunds_need_attention: int
    oldest_quarantine_at_ms: int | None


class FirstOutcomes(Protocol):
    """Outcomes of captures that are the first of their payments: PAID, heard by notification, sorted by payment_id.

    What all rows share (state, source, close_reason and the stamp) is the store's to add.
    """

    def __len__(self) -> int:
        """How many there are: at least one, and one a payment."""
        ...

    @property
    def payment_ids(self) -> list[int]:
        """The payments, ascending."""
        ...

    def values(self, start: int, stop: int) -> list[Any]:
        """The rows from start to stop, one value after the other, eight a row.

        In this order: payment_id, attempt, channel_trade_no, amount_minor, currency, paid_at_ms or None,
        received_at_ms, paid_at_untrusted (0 or 1).
        """
        ...

    def arrays(self) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes]:
        """The same eight columns as PostgreSQL's binary arrays: int8[], int2[], text[], int8[], text[], int8[],
        int8[], int2[]."""
        ...


class WriteTransaction(Protocol):
    """One write transaction. What it reads is current; what it has locked stays so until it ends."""

    stamp: Stamp

    def savepoint(self) -> AbstractContextManager[None]:
        """Undo only what is written inside when an exception leaves it."""
        ...

    def load_records(self, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
        """Read the payments that exist, with attempts, outcome and excess; the absent ones are left out."""
        ...

    def index_columns_of(self, payment_ids: Sequence[int]) -> IndexColumns:
        """Read what the index holds of these payments, given ascending; the absent ones are left out."""
        ...

    def lock_records(self, payment_ids: Iterable[int]) -> dict[int, PaymentRecord]:
        """Read as ``load_records`` does, and hold the payments, in ascending order, until the transaction ends.

        Whoever decides on a record takes it by this: attempts, excess, failures and CLOSED are written under this lock
        alone. Only a first outcome is not (``insert_first_outcomes``): there the outcome's key arbitrates. Raises
        StoreBusyError when another process holds one of them for too long.
        """
        ...

    def hold_open(self, payment_ids: Sequence[int]) -> set[int]:
        """Let no other process give these payments an outcome before this transaction ends.

        For locked payments whose records show none. Returns those that have one by now; they are not held.
        """
        ...

    def find_payment_id(self, merchant_id: str, merchant_order_no: str) -> int | None:
        """Look up a merchant order."""
        ...

    def insert_payment(self, row: PaymentRow) -> bool:
        """Insert a payment; False when its id is taken."""
        ...

    def insert_merchant_order(self, merchant_id: str, merchant_order_no: str, payment_id: int) -> bool:
        """Insert a merchant order; False when it exists."""
        ...

    def insert_channel_order(self, row: ChannelOrderRow) -> None:
        """Insert an attempt. Raises RowRefusedError when it exists."""
        ...

    def update_channel_order(self, row: ChannelOrderRow, *, expected: Iterable[AttemptState]) -> bool:
        """Write an attempt's conversation columns where its state is one of ``expected``; False when it is not."""
        ...

    def supersede_attempts(self, payment_id: int, before_attempt: int, at_ms: int) -> None:
        """Queue the older attempts that the channel may still take money for to be queried and closed."""
        ...

    def note_failures(self, notes: Sequence[FailureNote]) -> None:
        """Note failures on attempts: the first word is kept."""
        ...

    def insert_outcomes(self, rows: Sequence[OutcomeRow]) -> set[int]:
        """Insert outcomes, at most one a payment; return the payments that already had one (nothing written)."""
        ...

    def insert_first_outcomes(self, outcomes: FirstOutcomes) -> set[int]:
        """The same for payments that have no excess: one that has is returned too, and nothing is written for it.

        Raises StoreBusyError when excess appeared meanwhile.
        """
        ...

    def insert_excess(self, rows: Sequence[ExcessRow]) -> None:
        """Insert excess captures. Raises StoreBusyError when one exists: the group must be decided again."""
        ...

    def insert_refunds(self, rows: Sequence[RefundRow], first_tries: Sequence[RefundTryRow]) -> None:
        """Insert refund intents, each with its first try. Those that exist are left alone."""
        ...

    def evidence_on_record(self, quarantine_ids: Collection[str]) -> dict[str, tuple[int, int]]:
        """Return the evidence of these that lies in quarantine already, each with its (writer_no, group_no)."""
        ...

    def put_quarantine(self, rows: Sequence[QuarantineRow], *, maybe_counted: bool = False) -> None:
        """Insert evidence, or count its arrival and open it where the same evidence is there.

        maybe_counted: an earlier try may have counted these arrivals already; one that was seen last at the same moment
        is left alone.
        """
        ...

    def claim_refunds(
        self,
        slices: Sequence[int],
        now_ms: int,
        lease_until_ms: int,
        lease_token: str,
        limit: int,
        accounts: Collection[tuple[str, str]] | None = None,
    ) -> list[DueRefund]:
        """Lease the tries of these shares that are due, longest due first, so that nobody else sends them meanwhile.

        accounts: of which channel and account; None: of any.
        """
        ...

    def update_refund_try(self, row: RefundTryRow, *, lease_token: str) -> bool:
        """Write a try's progress where the lease is still held; False when it is not."""
        ...

    def insert_refund_try(self, row: RefundTryRow) -> bool:
        """Insert the next try, after a final refusal of the last; False when it exists."""
        ...

    def insert_refund_result(self, row: RefundResultRow) -> bool:
        """Insert the final word about a try; False when there is one."""
        ...

    def note_queried_paid(self, payment_id: int, attempt: int) -> bool:
        """Note that the channel said, when asked, that an attempt is paid; False where that is on record."""
        ...

    def put_tasks(self, rows: Iterable[TaskRow]) -> None:
        """Insert tasks; where one exists it stays, due at the earlier of the two times."""
        ...

    def move_task(self, read: TaskRow, row: TaskRow) -> bool:
        """Write ``row``'s next_at_ms, looks and last_error where the task is still as it was read; False if not."""
        ...

    def drop_tasks(self, rows: Iterable[TaskRow]) -> int:
        """Delete the tasks that are still as they were read; return how many."""
        ...

    def claim_slices(self, job: str, slices: Iterable[int], now_ms: int, lease_until_ms: int, token: str) -> list[int]:
        """Take shares of the payments for a job; return those that nobody else holds."""
        ...

    def release_slices(self, job: str, slices: Iterable[int], token: str) -> None:
        """Give shares back that are still held by this token."""
        ...

    def run(self, work: Callable[[Any], _T]) -> _T:
        """Run a function of a module of the store, which takes the connection, inside this transaction."""
        ...

    def touch_writer(self) -> None:
        """Note that this writer is alive: the least write that proves the database can be written."""
        ...


class Store(Protocol):
    """A database that holds the facts."""

    def open_writer(self, started_at_ms: int) -> int:
        """Draw a fresh writer number. Raises StoreUnavailableError."""
        ...

    def write(self, stamp: Stamp) -> AbstractContextManager[WriteTransaction]:
        """Begin a write transaction on the writer's connection; commit when the block ends, else roll back."""
        ...

    def find_payment_id(self, merchant_id: str, merchant_order_no: str) -> int | None:
        """Look up a merchant order as committed."""
        ...

    def load_record(self, payment_id: int) -> PaymentRecord | None:
        """Read one payment as committed."""
        ...

    def load_records(self, payment_ids: Collection[int]) -> dict[int, PaymentRecord]:
        """Read payments as committed; the absent ones are left out."""
        ...

    def index_columns(self, before: int, limit: int) -> IndexColumns:
        """Read what the index holds of the newest payments with an id below ``before``, at most ``limit``."""
        ...

    def load_file(self, payment_id: int) -> PaymentFile | None:
        """Read everything about one payment, as of one commit."""
        ...

    def due_refund_slices(self, now_ms: int, accounts: Collection[tuple[str, str]] | None = None) -> list[int]:
        """The shares that have a refund try which is due, leased by nobody and at one of these accounts (None: any)."""
        ...

    def oldest_due_refund_ms(self, now_ms: int) -> int | None:
        """When the longest due refund try fell due; None where none is due."""
        ...

    def due_task_slices(self, kind: int, now_ms: int) -> list[int]:
        """The shares that have a task of a kind that is due. kind: a TaskKind."""
        ...

    def due_tasks(self, kind: int, slice_: int, now_ms: int, limit: int, after: TaskRow | None = None) -> list[TaskRow]:
        """Tasks of one kind and share that are due, longest due first; those behind ``after`` in this order."""
        ...

    def oldest_due_task_ms(self, kind: int, now_ms: int) -> int | None:
        """When the longest due task of a kind fell due; None where none is due."""
        ...

    def free_slices(self, job: str, slices: Sequence[int], now_ms: int, lease_until_ms: int) -> list[int]:
        """Those of these shares that ``claim_slices`` could take until then: nobody holds them for a job."""
        ...

    def read(self, look: Callable[[Any], _T]) -> _T:
        """Run a function of a module of the store, which takes a connection, in a read transaction of its own."""
        ...

    def backlog(self) -> Backlog:
        """Count what is waiting."""
        ...

    def dispose(self) -> None:
        """Close every connection."""
        ...
