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

from paycore._dedupe import Index
from paycore._group import account_codes, pending_from
from paycore._wire import Batch, Decoder
from paycore.domain.clock import Clock
from paycore.domain.errors import (
    FieldViolation,
    InvalidArgumentError,
    PaycoreError,
    StoreUnavailableError,
    ThrottledError,
)
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import NotifyOutcome
from paycore.failpoint import failpoint
from paycore.metrics import Metrics
from paycore.store.protocol import CommitUnknownError, RowRefusedError, Store, StoreBusyError, WriteTransaction
from paycore.store.rows import Stamp
from paycore.usecases.group_report import GroupReport
from paycore.usecases.judge import GroupJudge, GroupResult, Piece
from paycore.usecases.quarantine import QuarantineLimits
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.words import verdict_at

MAX_GROUP = 16_000
"""Notifications in one commit at most, but for a last batch: bounds how long the first of them waits."""

_UNIT_WEIGHT = 40
"""How many notifications one other write counts for: it takes several statements where they share one."""

GATHER_PAUSE_SECONDS = 0.001
"""How long the writer looks away under load, to see whether more has come since."""

GATHER_LIMIT_NS = 5_000_000
"""How long it does so at most, however much keeps coming."""

GATHER_ENOUGH = 500
"""From this many notifications on nothing more is waited for: they share their commit's cost well enough."""

MAX_TRIES = 5
"""How often a group is decided before it is answered UNAVAILABLE; each try waits up to the store's busy timeout."""

_T_co = TypeVar("_T_co", covariant=True)
_T = TypeVar("_T")
_log = QuietLog()


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


class _Waiting:
    """Something to write, and who waits for it: a unit, or the words of a batch up to ``stop``.

    alone: a word whose refusal is an error, not an answer among others.
    """

    __slots__ = ("alone", "error", "future", "loop", "queued_ns", "result", "stop", "work")

    def __init__(
        self, work: Batch | WriteUnit[Any], stop: int, loop: asyncio.AbstractEventLoop, *, alone: bool
    ) -> None:
        self.work = work
        self.stop = stop
        self.alone = alone
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.queued_ns = time.perf_counter_ns()
        self.result: Any = None
        self.error: BaseException | None = None

    @property
    def words(self) -> int:
        """How many notifications it is; 0 for a unit."""
        return self.stop

    def settle(self) -> None:
        """Answer whoever waits; on their event loop."""
        if self.future.done():
            return
        if self.error is None:
            self.future.set_result(self.result)
        else:
            self.future.set_exception(self.error)


class _Part(NamedTuple):
    """What of a waiting write goes into a commit: all of it, or, once a group was halved, some of a batch's words."""

    waiting: _Waiting
    start: int
    stop: int

    def piece(self) -> Piece:
        """The words. Only of a batch."""
        return cast(Batch, self.waiting.work), self.start, self.stop


class Writer:
    """Owns the write side of a process. ``start`` it, await ``take`` and ``run``, ``stop`` it.

    codes: (channel, account) -> code of each account that is configured. queue_limit: how many writes may wait; more
    are refused with ThrottledError at once. on_health: called on the writer thread with whether the last group could be
    written. ``decoder`` makes the batches that it takes.
    """

    def __init__(
        self,
        store: Store,
        index: Index,
        *,
        codes: dict[tuple[str, str], int],
        clock: Clock,
        metrics: Metrics,
        late_grace_ms: int,
        queue_limit: int,
        quarantine_limits: QuarantineLimits,
        on_health: Callable[[bool], None],
    ) -> None:
        self._store = store
        self._index = index
        self._clock = clock
        self._metrics = metrics
        self._report = GroupReport(metrics, codes)
        self._judge = GroupJudge(index, codes, late_grace_ms, quarantine_limits)
        self.decoder = Decoder(codes, CURRENCY_CODES)
        self._queue_limit = queue_limit
        self._on_health = on_health
        self._queue: deque[_Waiting] = deque()
        self._queued = 0
        self._wake = threading.Condition()
        self._stopping = False
        self._writer_no: int | None = None
        self._group_no = 0
        self._last_size = 0
        self._evicted = index.evicted
        self._thread = threading.Thread(target=self._serve, name="paycore-writer", daemon=True)
        metrics.watch_queue(lambda: self._queued)
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
        """Decide one word that is known to be evidence; return its verdict once what it means is durable (R3)."""
        batch = self.decoder.of_values([notification])
        await self.take(batch)
        return verdict_at(batch, 0)

    async def take(self, batch: Batch) -> None:
        """Decide a batch; return once its answers are durable. Raises ThrottledError where the queue has no room."""
        waiting = self._submit(batch, len(batch))
        if waiting is None:
            self.count_refused(batch, range(len(batch)), NotifyOutcome.THROTTLED)
            raise self._full()
        await waiting.future

    async def take_what_fits(self, batch: Batch) -> None:
        """Decide as much of a batch as the queue has room for; the words after that are answered THROTTLED."""
        waiting = self._submit(batch, len(batch), partly=True)
        stop = 0 if waiting is None else waiting.stop
        over = pending_from(batch, stop)
        if over:
            for position in over:
                batch.refuse(position, NotifyOutcome.THROTTLED)
            self.count_refused(batch, over, NotifyOutcome.THROTTLED)
        if waiting is not None:
            await waiting.future

    async def run(self, unit: WriteUnit[_T]) -> _T:
        """Apply a unit; return its result once it is durable."""
        waiting = self._submit(unit, 0)
        if waiting is None:
            raise self._full()
        return cast(_T, await waiting.future)

    def _submit(self, work: Batch | WriteUnit[Any], words: int, *, partly: bool = False) -> _Waiting | None:
        """Queue a write, or of a batch what there is room for; None where there is no room."""
        waiting = _Waiting(work, words, asyncio.get_running_loop(), alone=not partly)
        weight = max(words, 1)
        with self._wake:
            if self._stopping:
                raise StoreUnavailableError("SHUTTING_DOWN", "the server is shutting down")
            room = self._queue_limit - self._queued
            if partly and 0 < room < weight:
                waiting.stop = weight = room
            if weight > room:
                return None
            self._queue.append(waiting)
            self._queued += weight
            self._wake.notify()
        return waiting

    def _full(self) -> ThrottledError:
        return ThrottledError("QUEUE_FULL", f"more than {self._queue_limit} writes wait already")

    def count_refused(self, batch: Batch, positions: Sequence[int], outcome: NotifyOutcome) -> None:
        """Count words that were not taken in."""
        self._report.refused(account_codes(batch, positions), outcome)

    def _serve(self) -> None:
        while group := self._take():
            try:
                failpoint("writer.taken")
                self._commit([_Part(waiting, 0, waiting.stop) for waiting in group])
                failpoint("writer.before_answer")
            except Exception:  # noqa: BLE001 - a defect; a thread that ended would let every later caller wait for ever
                _log.exception("writer_broke", writes=len(group))
                broke = StoreUnavailableError("WRITER_BROKE", "the writer failed; what was kept is not known")
                for waiting in group:
                    waiting.error = broke
            _deliver(group)

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
                weight += self._queue[0].words or _UNIT_WEIGHT
                group.append(self._queue.popleft())
            self._queued -= sum(max(waiting.words, 1) for waiting in group)
            self._last_size = len(group)
            return group

    def _gather(self) -> None:
        """Under load, let come what keeps coming: a commit costs about the same whatever it holds.

        Without this, the first handler to queue wakes the writer, which takes the interpreter from the handlers that
        are just about to queue. A single write after a single write waits for nobody, whatever it holds.
        """
        seen = 0 if self._last_size > 1 else 1
        ends_ns = time.perf_counter_ns() + GATHER_LIMIT_NS
        while seen < len(self._queue) and self._queued < GATHER_ENOUGH:
            if self._stopping or time.perf_counter_ns() >= ends_ns:
                return
            seen = len(self._queue)
            time.sleep(GATHER_PAUSE_SECONDS)

    def _commit(self, parts: Sequence[_Part], earlier_tries: frozenset[tuple[int, int]] = frozenset()) -> None:
        own_tries = set(earlier_tries)
        error: PaycoreError = StoreUnavailableError("STORE_BUSY", "another process holds the database")
        for _ in range(MAX_TRIES):
            try:
                self._try(parts, frozenset(own_tries))
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
                self._halve(parts, refusal, frozenset(own_tries))
                return
            else:
                self._on_health(True)
                return
        self._on_health(False)
        _log.error("group_not_committed", writes=len(parts), reason=error.reason, cause=error.message)
        for part in parts:
            part.waiting.error = error

    def _halve(self, parts: Sequence[_Part], refusal: Exception, own_tries: frozenset[tuple[int, int]]) -> None:
        first, second = _halves(parts)
        if second:
            self._commit(first, own_tries)
            self._commit(second, own_tries)
            return
        _log.error("row_refused", error=repr(refusal))
        (part,) = parts
        if not isinstance(refusal, RowRefusedError):
            part.waiting.error = refusal
            return
        violation = FieldViolation("row", f"the database refuses it: {refusal}")
        if isinstance(part.waiting.work, Batch):
            part.waiting.work.refuse(part.start, NotifyOutcome.INVALID, [violation])
            self.count_refused(part.waiting.work, [part.start], NotifyOutcome.INVALID)
        if part.waiting.alone:
            part.waiting.error = InvalidArgumentError([violation], "ROW_REFUSED")

    def _try(self, parts: Sequence[_Part], own_tries: frozenset[tuple[int, int]]) -> None:
        writer_no = self._writer_no if self._writer_no is not None else self._open_stream()
        self._group_no += 1
        stamp = Stamp(self._clock.now_ms(), writer_no, self._group_no)
        pieces = [part.piece() for part in parts if part.waiting.words]
        units = [part.waiting for part in parts if not part.waiting.words]
        started_ns = time.perf_counter_ns()
        self._index.begin()
        try:
            with self._store.write(stamp) as transaction:
                result = self._judge.judge(transaction, pieces, own_tries)
                answers = [_apply(transaction, unit) for unit in units]
        except BaseException:
            self._index.rollback()
            raise
        self._index.commit()
        for unit, answer in zip(units, answers, strict=True):
            unit.result, unit.error = answer
        self._after_commit(parts, result, stamp, started_ns)

    def _after_commit(self, parts: Sequence[_Part], result: GroupResult, stamp: Stamp, started_ns: int) -> None:
        """Do what nobody waits for. It must not fail the group: that is durable now and would be run again."""
        try:
            self._judge.committed(result, stamp.recorded_at_ms)
            self._count_evictions()
            for part in parts:
                if not part.waiting.words and part.waiting.error is None:
                    cast(WriteUnit[Any], part.waiting.work).committed(self._index)
            words = [(part.waiting.queued_ns, part.stop - part.start) for part in parts if part.waiting.words]
            size = sum(max(part.stop - part.start, 1) for part in parts)
            self._report.committed(size, started_ns, words, result)
        except Exception:  # noqa: BLE001 - an index that was not told guesses wrong and asks; a count is lost
            _log.exception("after_commit_broke", writes=len(parts))

    def _count_evictions(self) -> None:
        if fresh := self._index.evicted - self._evicted:
            self._evicted += fresh
            self._metrics.index_evictions.inc(fresh)

    def _open_stream(self) -> int:
        self._writer_no = number = self._store.open_writer(self._clock.now_ms())
        return number

    def _count_failure(self, cause: str) -> None:
        self._metrics.commit_failures.labels(cause).inc()


def _halves(parts: Sequence[_Part]) -> tuple[Sequence[_Part], Sequence[_Part]]:
    """Split a group in two; one that cannot be split comes back whole, beside nothing."""
    if len(parts) > 1:
        middle = len(parts) // 2
        return parts[:middle], parts[middle:]
    (part,) = parts
    if part.stop - part.start > 1:
        middle = (part.start + part.stop) // 2
        return [part._replace(stop=middle)], [part._replace(start=middle)]
    return parts, ()


def _apply(transaction: WriteTransaction, waiting: _Waiting) -> tuple[Any, PaycoreError | None]:
    try:
        with transaction.savepoint():
            return cast(WriteUnit[Any], waiting.work).apply(transaction), None
    except StoreUnavailableError:
        raise
    except PaycoreError as error:
        return None, error


def _deliver(group: Sequence[_Waiting]) -> None:
    """Hand the answers to their event loops, one wake-up a loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Waiting]] = {}
    for waiting in group:
        by_loop.setdefault(waiting.loop, []).append(waiting)
    for loop, answered in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle, answered)
        except RuntimeError:
            # The loop has closed: its callers hung up, and what they asked for is committed all the same.
            _log.info("callers_gone", answers=len(answered))


def _settle(answered: Sequence[_Waiting]) -> None:
    for waiting in answered:
        waiting.settle()
