"""Tasks and leases on every database: what repair comes back to, and who works on which share of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from paycore.domain.verdicts import TaskKind
from paycore.store.protocol import Store
from paycore.store.rows import TaskRow
from tests.contract.test_store import STAMP, Writing, store, url, write

__all__ = ["store", "url", "write"]

LEASE_MS = 1_000


def task(payment_id: int = 1, **changes: Any) -> TaskRow:
    row = TaskRow(payment_id, TaskKind.QUERY, 1, payment_id % 16, 100, 0, 50, "", *STAMP)
    return row._replace(**changes)


def put(write: Writing, *rows: TaskRow) -> None:
    write(lambda transaction: transaction.put_tasks(rows))


def due(store: Store, now_ms: int = 1_000, slice_: int = 1, limit: int = 10) -> list[TaskRow]:
    return store.due_tasks(TaskKind.QUERY, slice_, now_ms, limit)


def test_task_comes_back_as_it_was_put(store: Store, write: Writing) -> None:
    put(write, task(last_error="no answer"))
    assert due(store) == [task(last_error="no answer")]


def test_tasks_are_due_by_time_kind_and_share_longest_due_first(store: Store, write: Writing) -> None:
    put(
        write,
        task(1, next_at_ms=300),
        task(17, next_at_ms=200),
        task(33, next_at_ms=1_001),
        task(2),
        task(49, kind=TaskKind.CLOSE, attempt=0),
    )
    assert [row.payment_id for row in due(store)] == [17, 1]
    assert [row.payment_id for row in due(store, limit=1)] == [17]
    assert due(store, now_ms=199) == []
    assert store.due_task_slices(TaskKind.QUERY, 1_000) == [1, 2]
    assert store.due_task_slices(TaskKind.QUERY, 150) == [2]
    assert store.due_task_slices(TaskKind.END, 9_999) == []
    assert store.oldest_due_task_ms(TaskKind.QUERY, 1_000) == 100
    assert store.oldest_due_task_ms(TaskKind.QUERY, 99) is None


@pytest.mark.parametrize(("second_at_ms", "next_at_ms"), [(50, 50), (100, 100), (900, 100)])
def test_task_put_again_stays_and_is_due_at_the_earlier_time(
    store: Store, write: Writing, second_at_ms: int, next_at_ms: int
) -> None:
    put(write, task(looks=3))
    put(write, task(next_at_ms=second_at_ms))
    assert due(store) == [task(looks=3, next_at_ms=next_at_ms)]


def test_task_is_moved_and_dropped_only_as_it_was_read(store: Store, write: Writing) -> None:
    put(write, task())
    later = task(next_at_ms=500, looks=1, last_error="IN_PROGRESS")
    assert write(lambda transaction: transaction.move_task(task(), later)) == [True]
    assert write(lambda transaction: transaction.move_task(task(), task(next_at_ms=9))) == [False]
    assert write(lambda transaction: transaction.drop_tasks([task()])) == [0]
    assert due(store) == [later]
    assert write(lambda transaction: transaction.drop_tasks([later, task(2)])) == [1]
    assert due(store) == []


def test_paid_answer_is_noted_once(write: Writing) -> None:
    assert write(lambda transaction: transaction.note_queried_paid(1, 2)) == [True]
    assert write(lambda transaction: transaction.note_queried_paid(1, 2)) == [False]
    assert write(lambda transaction: transaction.note_queried_paid(1, 3)) == [True]


def test_tasks_are_read_page_by_page_each_of_them_once(store: Store, write: Writing) -> None:
    rows = [task(1 + 16 * number, next_at_ms=100 + number // 3, attempt=1 + number % 2) for number in range(8)]
    rows += [row._replace(attempt=3) for row in rows]
    put(write, *rows)
    read: list[TaskRow] = []
    while page := store.due_tasks(TaskKind.QUERY, 1, 1_000, 3, read[-1] if read else None):
        read += page
    assert read == sorted(rows, key=lambda row: (row.next_at_ms, row.payment_id, row.attempt))


# Leases


def claim(write: Writing, slices: Sequence[int], now_ms: int, token: str, job: str = "closer") -> list[int]:
    (held,) = write(lambda transaction: transaction.claim_slices(job, slices, now_ms, now_ms + LEASE_MS, token))
    found: list[int] = held
    return found


def test_share_is_held_by_one_until_its_lease_ends(store: Store, write: Writing) -> None:
    assert claim(write, [3, 1], 0, "mine") == [1, 3]
    assert claim(write, [1, 2], LEASE_MS - 1, "theirs") == [2]
    assert claim(write, [1], LEASE_MS - 1, "theirs", job="refunder") == [1]
    assert store.free_slices("closer", [1, 2, 3, 4], LEASE_MS - 1, 2 * LEASE_MS - 1) == [4]
    assert claim(write, [1, 2], LEASE_MS, "theirs") == [1]


def test_share_is_released_only_by_who_holds_it(store: Store, write: Writing) -> None:
    claim(write, [1, 2], 0, "mine")
    write(lambda transaction: transaction.release_slices("closer", [1, 2], "theirs"))
    assert store.free_slices("closer", [1, 2], 1, LEASE_MS + 1) == []
    write(lambda transaction: transaction.release_slices("closer", [2], "mine"))
    assert store.free_slices("closer", [1, 2], 1, LEASE_MS + 1) == [2]
    assert claim(write, [1, 2], 1, "theirs") == [2]


@pytest.mark.parametrize("ahead_ms", [0, LEASE_MS // 2, LEASE_MS, LEASE_MS + 1, 3_600_000])
def test_share_is_free_to_look_at_where_it_is_free_to_take_however_far_ahead_its_holder_was(
    store: Store, write: Writing, ahead_ms: int
) -> None:
    """A lease that ends further ahead than any lease can was written by a clock that is wrong."""
    claim(write, [1], ahead_ms, "a clock ahead")
    is_free = ahead_ms > LEASE_MS
    assert store.free_slices("closer", [1], 0, LEASE_MS) == ([1] if is_free else [])
    assert claim(write, [1], 0, "mine") == ([1] if is_free else [])
