"""The one writer of a process: takes everything that waits as the next group, commits it, answers all.

Natural group commit: no minimum and no fixed interval. An idle server commits one write at once; under load the next
group is whatever gathered while the last one was being made durable, and what keeps coming within a few milliseconds.
Notifications, new attempts, closes and refunds go through the same queue, so one thread alone touches the index and
one connection alone writes.

A group that fails is rolled back whole, index marks included. A busy database or a commit whose answer was
lost: decided again, a bounded number of times. A row that the database refuses: the group is halved until
that row stands alone and is answered for itself. Anything else: nobody is answered with success.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import structlog

from paycore._dedupe import Index
from paycore.domain.clock import Clock
from paycore.domain.errors import (
    FieldViolation,
    InvalidArgumentError,
    PaycoreError,
    StoreUnavailableError,
    ThrottledError,
)
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import NotifyOutcome
from paycore.failpoint import failpoint
from paycore.metrics import Metrics
from paycore.store.protocol import CommitUnknownError, RowRefusedError, Store, StoreBusyError, WriteTransaction
from paycore.store.rows import Stamp
from paycore.usecases.group_report import GroupReport
from paycore.usecases.judge import AccountCodes, GroupJudge, GroupResult

MAX_GROUP = 4_000
"""Notifications in one commit at most: bounds how long the first of them waits."""

_UNIT_WEIGHT = 40
"""How many notifications one other write counts for: it takes several statements where they share one."""

GATHER_PAUSE_SECONDS = 0.001
"""How long the writer looks away under load, to see whether more has come since."""

GATHER_LIMIT_NS = 5_000_000
"""How long it does so at most, however much keeps coming."""

MAX_TRIES = 5
"""How often a group is decided before it is answered UNAVAILABLE; each try waits up to the store's busy timeout."""

_T_co = TypeVar("_T_co", covariant=True)
_T = TypeVar("_T")
_log = structlog.get_logger()


class WriteUnit(Protocol[_T_co]):
    """A write other than a notification. It may be applied again after a rollback, so it must not remember."""

    def apply(self, transaction: WriteTransaction) -> _T_co:
        """Write inside a savepoint. A PaycoreError undoes this unit alone and is its answer."""
        ...

    def committed(self, index: Index) -> None:
        """Bring the index up to what was committed; called on the writer thread."""
        ...


class UnindexedUnit:
    """Base of the write units that the index has nothing to do with."""

    def committed(self, index: Index) -> None:
        """Nothing to tell the index."""


class _Waiting(NamedTuple):
    """Something to write, and who waits for it."""

    work: Notification | WriteUnit[Any]
    future: asyncio.Future[Any]
    loop: asyncio.AbstractEventLoop
    queued_ns: int


class _Answer(NamedTuple):
    """What a waiting caller gets: a result, or an error."""

    waiting: _Waiting
    result: Any
    error: BaseException | None


class Writer:
    """Owns the write side of a process. ``start`` it, await ``notify`` and ``run``, ``stop`` it.

    queue_limit: how many writes may wait; more are refused with ThrottledError at once.
    on_health: called on the writer thread with whether the last group could be written.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        *,
        accounts: AccountCodes,
        clock: Clock,
        metrics: Metrics,
        late_grace_ms: int,
        queue_limit: int,
        on_health: Callable[[bool], None],
    ) -> None:
        self._store = store
        self._index = index
        self._accounts = accounts
        self._clock = clock
        self._metrics = metrics
        self._report = GroupReport(metrics, accounts)
        self._judge = GroupJudge(index, accounts, late_grace_ms)
        self._queue_limit = queue_limit
        self._on_health = on_health
        self._queue: deque[_Waiting] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._writer_no: int | None = None
        self._group_no = 0
        self._last_size = 0
        self._thread = threading.Thread(target=self._serve, name="paycore-writer", daemon=True)
        metrics.watch_queue(lambda: len(self._queue))
        metrics.watch_index(lambda: len(index), lambda: index.nbytes)

    def start(self) -> int:
        """Draw a writer number and start the thread; return the number. Raises StoreUnavailableError."""
        number = self._open_stream()
        self._thread.start()
        return number

    def stop(self) -> None:
        """Commit and answer everything that waits, then end the thread. New writes are refused from now on."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    async def notify(self, notification: Notification) -> Verdict:
        """Decide a notification; return its verdict once what it means is durable (R3)."""
        return cast(Verdict, await self._submit(notification))

    async def run(self, unit: WriteUnit[_T]) -> _T:
        """Apply a unit; return its result once it is durable."""
        return cast(_T, await self._submit(unit))

    def _submit(self, work: Notification | WriteUnit[Any]) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._wake:
            if self._stopping:
                raise StoreUnavailableError("SHUTTING_DOWN", "the server is shutting down")
            if len(self._queue) >= self._queue_limit:
                self._count_refused(work, NotifyOutcome.THROTTLED)
                raise ThrottledError("QUEUE_FULL", f"more than {self._queue_limit} writes wait already")
            self._queue.append(_Waiting(work, future, loop, time.perf_counter_ns()))
            self._wake.notify()
        return future

    def count_invalid(self, notification: Notification) -> None:
        """Count a notification that cannot be evidence; it was not and will not be taken in."""
        self._count_refused(notification, NotifyOutcome.INVALID)

    def _count_refused(self, work: Notification | WriteUnit[Any], outcome: NotifyOutcome) -> None:
        if isinstance(work, Notification):
            self._report.refused(work, outcome)

    def _serve(self) -> None:
        while group := self._take():
            failpoint("writer.taken")
            answers = self._commit(group)
            failpoint("writer.before_answer")
            _deliver(answers)

    def _take(self) -> list[_Waiting]:
        """Return everything that waits, up to the limit; empty only when stopping and nothing is left."""
        with self._wake:
            while not self._queue and not self._stopping:
                self._wake.wait()
        self._gather()
        with self._wake:
            group: list[_Waiting] = []
            weight = 0
            while self._queue and weight < MAX_GROUP:
                weight += 1 if isinstance(self._queue[0].work, Notification) else _UNIT_WEIGHT
                group.append(self._queue.popleft())
            self._last_size = len(group)
            return group

    def _gather(self) -> None:
        """Under load, let come what keeps coming: a commit costs about the same whatever it holds.

        Without this, the first handler to queue wakes the writer, which takes the interpreter from the handlers that
        are just about to queue. A single write after a single write waits for nobody.
        """
        seen = 0 if self._last_size > 1 else 1
        ends_ns = time.perf_counter_ns() + GATHER_LIMIT_NS
        while seen < len(self._queue) < MAX_GROUP and not self._stopping and time.perf_counter_ns() < ends_ns:
            seen = len(self._queue)
            time.sleep(GATHER_PAUSE_SECONDS)

    def _commit(self, group: list[_Waiting]) -> list[_Answer]:
        own_tries: set[tuple[int, int]] = set()
        error: PaycoreError = StoreUnavailableError("STORE_BUSY", "another process holds the database")
        for _ in range(MAX_TRIES):
            try:
                answers = self._try(group, frozenset(own_tries))
            except CommitUnknownError:
                self._count_failure("commit_unknown")
                own_tries.add((self._writer_no or 0, self._group_no))
                self._writer_no = None
            except StoreBusyError:
                self._count_failure("busy")
            except StoreUnavailableError as unavailable:
                self._count_failure("unavailable")
                self._writer_no = None
                error = unavailable
                break
            except Exception as refusal:  # noqa: BLE001 - whatever a row causes, the others of its group go on
                self._count_failure("refused")
                return self._halve(group, refusal)
            else:
                self._on_health(True)
                return answers
        self._on_health(False)
        _log.error("group_not_committed", writes=len(group), reason=error.reason, cause=error.message)
        return [_Answer(waiting, None, error) for waiting in group]

    def _halve(self, group: list[_Waiting], refusal: Exception) -> list[_Answer]:
        if len(group) > 1:
            middle = len(group) // 2
            return self._commit(group[:middle]) + self._commit(group[middle:])
        _log.error("row_refused", error=repr(refusal))
        if not isinstance(refusal, RowRefusedError):
            return [_Answer(group[0], None, refusal)]
        self._count_refused(group[0].work, NotifyOutcome.INVALID)
        violation = FieldViolation("row", f"the database refuses it: {refusal}")
        return [_Answer(group[0], None, InvalidArgumentError([violation], "ROW_REFUSED"))]

    def _try(self, group: list[_Waiting], own_tries: frozenset[tuple[int, int]]) -> list[_Answer]:
        writer_no = self._writer_no if self._writer_no is not None else self._open_stream()
        self._group_no += 1
        stamp = Stamp(self._clock.now_ms(), writer_no, self._group_no)
        notes = [waiting for waiting in group if isinstance(waiting.work, Notification)]
        units = [waiting for waiting in group if not isinstance(waiting.work, Notification)]
        started_ns = time.perf_counter_ns()
        self._index.begin()
        try:
            with self._store.write(stamp) as transaction:
                notifications = [cast(Notification, waiting.work) for waiting in notes]
                result = self._judge.judge(transaction, notifications, own_tries)
                answers = [_apply(transaction, waiting) for waiting in units]
        except BaseException:
            self._index.rollback()
            raise
        self._index.commit()
        verdicts = zip(notes, result.verdicts, strict=True)
        self._after_commit(answers, group, notifications, result, started_ns)
        return answers + [_Answer(waiting, verdict, None) for waiting, verdict in verdicts]

    def _after_commit(
        self,
        units: Sequence[_Answer],
        group: Sequence[_Waiting],
        notifications: Sequence[Notification],
        result: GroupResult,
        started_ns: int,
    ) -> None:
        """Do what nobody waits for. It must not fail the group: that is durable now and would be run again."""
        try:
            for unit in units:
                if unit.error is None:
                    cast(WriteUnit[Any], unit.waiting.work).committed(self._index)
            queued_ns = [waiting.queued_ns for waiting in group if isinstance(waiting.work, Notification)]
            self._report.committed(len(group), started_ns, queued_ns, notifications, result)
        except Exception:  # noqa: BLE001 - an index that was not told guesses wrong and asks; a count is lost
            _log.exception("after_commit_broke", writes=len(group))

    def _open_stream(self) -> int:
        self._writer_no = number = self._store.open_writer(self._clock.now_ms())
        return number

    def _count_failure(self, cause: str) -> None:
        self._metrics.commit_failures.labels(cause).inc()


def _apply(transaction: WriteTransaction, waiting: _Waiting) -> _Answer:
    try:
        with transaction.savepoint():
            return _Answer(waiting, cast(WriteUnit[Any], waiting.work).apply(transaction), None)
    except StoreUnavailableError:
        raise
    except PaycoreError as error:
        return _Answer(waiting, None, error)


def _deliver(answers: Sequence[_Answer]) -> None:
    """Hand the answers to their event loops, one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Answer]] = {}
    for answer in answers:
        by_loop.setdefault(answer.waiting.loop, []).append(answer)
    for loop, batch in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, batch)
        except RuntimeError:
            # The loop has closed: its callers hung up, and what they asked for is committed all the same.
            _log.info("callers_gone", answers=len(batch))


def _resolve(batch: Sequence[_Answer]) -> None:
    for waiting, result, error in batch:
        if waiting.future.done():
            continue
        if error is None:
            waiting.future.set_result(result)
        else:
            waiting.future.set_exception(error)
