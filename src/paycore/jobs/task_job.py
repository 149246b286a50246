"""What the closer, the recoverer and the ender have in common: one kind of task, worked off share by share.

A task stays due until what came of it is written down, and that is written only where nobody has moved the task
meanwhile. So a pass may be cut off anywhere, and two that meet on a task do no harm: what they write about
money is arbitrated by the keys of the facts.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import NamedTuple

from paycore.channels.protocol import ChannelUnknownError
from paycore.domain.clock import Clock
from paycore.domain.errors import PreconditionError, StoreUnavailableError, ThrottledError
from paycore.domain.verdicts import TaskKind
from paycore.failpoint import failpoint
from paycore.jobs.attempt_units import DropTasks, MoveTask
from paycore.jobs.backoff import Draw, backoff_ms
from paycore.jobs.gate import Account, ChannelGate
from paycore.jobs.runner import Pass, Tell, tell_nobody
from paycore.jobs.slices import Held, Slices
from paycore.store.protocol import Store
from paycore.store.rows import PaymentRecord, TaskRow
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.writer import Writer

BATCH = 64
"""Tasks that are read and worked on together."""

FIRST_REST_MS = 5_000
"""How long a task without a final word rests before it is come back to; the rest doubles each time."""

LONGEST_REST_MS = 10 * 60_000

OTHERS_MS = 60_000
"""How long a task that is for another process is passed over without being looked at."""

_log = QuietLog()


class Step(NamedTuple):
    """What came of a look at a task. next_at_ms: when it is due again; None: it is done.

    error: why there was no final word; empty where the channel said all that can be known by now.
    """

    next_at_ms: int | None
    error: str = ""


DONE = Step(None)


class _Tally:
    """Counts a pass."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._known = 0
        self.done = 0
        self.put_off = 0

    def found(self, count: int) -> None:
        self._known += count
        self._tell(self.done + self.put_off, self._known)

    def count(self, *, done: int = 0, put_off: int = 0) -> None:
        self.done += done
        self.put_off += put_off
        self._tell(self.done + self.put_off, self._known)


class TaskJob(ABC):
    """Works off the tasks of one kind that are due.

    accounts: those that this process can ask about; tasks about others are left, as due as they are, to processes that
    can. ``draw`` makes the jitter (``jobs.backoff``).
    """

    name: str
    kind: TaskKind

    def __init__(
        self,
        *,
        store: Store,
        writer: Writer,
        accounts: Collection[Account],
        slices: Slices,
        gate: ChannelGate,
        clock: Clock,
        draw: Draw,
    ) -> None:
        self._store = store
        self._writer = writer
        self._accounts = accounts
        self._slices = slices
        self._gate = gate
        self._clock = clock
        self._draw = draw
        self._for_others: set[tuple[int, int]] = set()
        self._for_others_since_ms = 0

    @abstractmethod
    def _is_finished(self, task: TaskRow, record: PaymentRecord | None) -> bool:
        """Tell from what is on record that nothing is left to do about a task."""

    @abstractmethod
    def _asks(self, task: TaskRow, record: PaymentRecord) -> set[Account]:
        """Return which accounts a look at an unfinished task would ask about."""

    @abstractmethod
    async def _look(self, task: TaskRow, record: PaymentRecord) -> Step:
        """Come back to an unfinished task. May raise ChannelUnknownError and PreconditionError: no final word."""

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Work off what is due now in every share that is free. Raises StoreUnavailableError or ThrottledError."""
        tally, now_ms = _Tally(tell), self._clock.now_ms()
        self._look_at_others_again(now_ms)
        worked: set[int] = set()
        more = False
        while wanted := await self._due_slices(now_ms, worked):
            async with self._slices.take(self.name, wanted) as held:
                for slice_ in held.slices:
                    worked.add(slice_)
                    more |= await self._work(slice_, now_ms, held, tally)
            if not held.slices:
                # Other processes are at them.
                break
        oldest_ms = await asyncio.to_thread(self._store.oldest_due_task_ms, self.kind, now_ms)
        return Pass(tally.done, tally.put_off, 0 if oldest_ms is None else now_ms - oldest_ms, more)

    async def _due_slices(self, now_ms: int, worked: set[int]) -> list[int]:
        due = await asyncio.to_thread(self._store.due_task_slices, self.kind, now_ms)
        return [slice_ for slice_ in due if slice_ not in worked]

    async def _work(self, slice_: int, begun_ms: int, held: Held, tally: _Tally) -> bool:
        """Work off one share, each task once; return whether the lease ended before it was done."""
        last: TaskRow | None = None
        while held.lasts():
            # Where the clock was set back meanwhile, what this pass moves lies before the time at which it began.
            due_ms = min(begun_ms, self._clock.now_ms())
            tasks = await asyncio.to_thread(self._store.due_tasks, self.kind, slice_, due_ms, BATCH, last)
            if not tasks:
                return False
            last = tasks[-1]
            await self._work_off([task for task in tasks if _key(task) not in self._for_others], tally)
        return True

    async def _work_off(self, tasks: Sequence[TaskRow], tally: _Tally) -> None:
        records = await asyncio.to_thread(self._store.load_records, {task.payment_id for task in tasks})
        finished = [task for task in tasks if self._is_finished(task, records.get(task.payment_id))]
        done = set(finished)
        ours = [task for task in tasks if task not in done and self._is_ours(task, records[task.payment_id])]
        tally.found(len(finished) + len(ours))
        if finished:
            await self._drop_finished(finished)
            tally.count(done=len(finished))
        looks = [self._advance(task, records[task.payment_id], tally) for task in ours]
        # All are waited for: none may go on talking to a channel after the share was given back.
        for result in await asyncio.gather(*looks, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result

    def _is_ours(self, task: TaskRow, record: PaymentRecord) -> bool:
        """Whether this process can ask all that a look would ask; where it cannot, the task is passed over for now."""
        others = sorted(self._asks(task, record).difference(self._accounts))
        if others:
            self._for_others.add(_key(task))
            channel, account = others[0]
            _log.info(
                f"{self.name}_leaves_to_others",
                payment_id=task.payment_id,
                attempt=task.attempt,
                channel=channel,
                account=account,
            )
        return not others

    def _look_at_others_again(self, now_ms: int) -> None:
        if not 0 <= now_ms - self._for_others_since_ms < OTHERS_MS:
            self._for_others.clear()
            self._for_others_since_ms = now_ms

    async def _drop_finished(self, tasks: Sequence[TaskRow]) -> None:
        """Drop tasks that need no look: what finished them is final."""
        await self._writer.run(DropTasks(tasks))

    async def _advance(self, task: TaskRow, record: PaymentRecord, tally: _Tally) -> None:
        step = await self._step(task, record)
        failpoint(f"{self.name}.looked")
        if step.next_at_ms is None:
            await self._writer.run(DropTasks([task]))
        else:
            await self._writer.run(MoveTask(task, next_at_ms=step.next_at_ms, error=step.error))
        put_off = step.next_at_ms is not None and step.error != ""
        tally.count(done=not put_off, put_off=put_off)

    async def _step(self, task: TaskRow, record: PaymentRecord) -> Step:
        silent = sorted(account for account in self._asks(task, record) if self._gate.resting(*account))
        if silent:
            channel, account = silent[0]
            return self._rest(task, f"{channel} was not asked: it has not answered lately about account {account}")
        try:
            return await self._look(task, record)
        except (ChannelUnknownError, PreconditionError) as unknown:
            _log.info(f"{self.name}_has_no_word", payment_id=task.payment_id, attempt=task.attempt, why=str(unknown))
            return self._without_word(task, record, unknown)
        except (StoreUnavailableError, ThrottledError):
            raise
        except Exception as defect:  # noqa: BLE001 - one that breaks must not keep the others from their turn
            _log.exception(f"{self.name}_broke", payment_id=task.payment_id, attempt=task.attempt)
            return self._rest(task, repr(defect))

    def _without_word(self, task: TaskRow, record: PaymentRecord, unknown: Exception) -> Step:
        """What becomes of a task about which the channel gave no final word, or was not asked (``was_asked``)."""
        del record
        return self._rest(task, str(unknown))

    def _rest(self, task: TaskRow, why: str) -> Step:
        """Come back to a task later, and later each time."""
        rest_ms = backoff_ms(task.looks, FIRST_REST_MS, LONGEST_REST_MS, self._draw)
        return Step(self._clock.now_ms() + rest_ms, why)


def _key(task: TaskRow) -> tuple[int, int]:
    return task.payment_id, task.attempt
