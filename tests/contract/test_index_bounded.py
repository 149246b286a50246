"""Histories of an index that grows, evicts and runs out of memory inside groups, beside a twin that does none of it.

The compiled index may lack what it evicted. What it holds must be what the twin holds; what the running group has
touched it must hold; and a change that found no memory must not have been made.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paycore import _dedupe
from paycore.domain.ids import ID_EPOCH_MS
from paycore.domain.plain_index import IndexEntry, PlainIndex
from paycore.domain.verdicts import PaymentState

AnyIndex = _dedupe.Index | PlainIndex
Change = Callable[[AnyIndex], None]

OPEN, PAID, CLOSED = PaymentState.OPEN, PaymentState.PAID, PaymentState.CLOSED
TOMBSTONE = 1 << 63
KEYS = [(1_000 + place // 3) << 22 | place for place in range(90)]
keys = st.sampled_from(KEYS)
runs = st.tuples(st.integers(0, len(KEYS)), st.integers(0, 40)).map(lambda run: KEYS[run[0] : run[0] + run[1]])
states = st.sampled_from([OPEN, OPEN, PAID, CLOSED])
amounts = st.integers(1, 3)


def put(index: AnyIndex, key: int, amount_minor: int, state: int) -> None:
    expire_at_ms = (key >> 22) + ID_EPOCH_MS + 1_000
    index.put(key, amount_minor, 1, expire_at_ms, state, 1 if state == PAID else 0, 1, 0, (7,))


def load(index: AnyIndex, run: list[int], amount_minor: int, state: int) -> None:
    kept = 1 if state == PAID else None
    rows = [(key, amount_minor, "CNY", (key >> 22) + ID_EPOCH_MS + 1_000, state, kept) for key in run]
    attempts = [(key, 1, "bank", "m1") for key in run]
    index.load(rows, attempts, [], currencies={"CNY": 1}, accounts={("bank", "m1"): 7})


class BoundedHistory(RuleBasedStateMachine):
    """Entries come, change and go, in groups and between them; any change may find no memory."""

    segments = 1
    max_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        self.compiled = _dedupe.Index(segments=self.segments, max_bytes=self.max_bytes)
        self.plain = PlainIndex()
        self.in_group = False
        self.allowance = -1
        # What the group has touched, as it was before; with None beside it where the same call may have evicted it.
        self.touched: dict[int, set[IndexEntry | None]] = {}

    # -- what happens

    @rule(allocations=st.integers(0, 4))
    def memory_runs_out(self, allocations: int) -> None:
        """From the next change on, and only for it, so many allocations succeed."""
        self.allowance = allocations

    @rule(key=keys, amount_minor=amounts, state=states)
    def put(self, key: int, amount_minor: int, state: int) -> None:
        self.change(key, lambda index: put(index, key, amount_minor, state))

    @rule(run=runs, amount_minor=amounts, state=states)
    def load(self, run: list[int], amount_minor: int, state: int) -> None:
        before = {key: self.get(key) for key in run}
        made = True
        try:
            with_allowance(self.allowance, lambda: load(self.compiled, run, amount_minor, state))
        except MemoryError:
            assert self.allowance >= 0
            made = False
        self.allowance = -1
        fresh = PlainIndex()
        load(fresh, run, amount_minor, state)
        for key in run:
            # A row may be gone again for a later one, unless a group holds it; or it was never reached.
            if self.get(key) == fresh.get(key):
                put(self.plain, key, amount_minor, state)
                if self.in_group:
                    self.touched.setdefault(key, {before[key], None})
            else:
                assert not made or not self.in_group
                assert self.get(key) in {None, before[key]}

    @rule(key=keys)
    def discard(self, key: int) -> None:
        self.change(key, lambda index: index.discard(key))

    @rule(key=keys)
    def set_captured(self, key: int) -> None:
        self.change(key, lambda index: index.set_captured(key, 2))

    @rule(key=keys)
    def close(self, key: int) -> None:
        self.change(key, lambda index: index.close(key))

    @rule(key=keys, attempt=st.integers(1, 4))
    def add_attempt(self, key: int, attempt: int) -> None:
        self.change(key, lambda index: index.add_attempt(key, attempt, 7))

    @rule(key=keys, attempt=st.integers(1, 2))
    def accept(self, key: int, attempt: int) -> None:
        if key in self.compiled:
            self.change(key, lambda index: index.accept(key, attempt))

    @precondition(lambda self: not self.in_group)
    @rule()
    def begin(self) -> None:
        self.in_group = True
        self.touched = {}
        self.compiled.begin()
        self.plain.begin()

    @precondition(lambda self: self.in_group)
    @rule()
    def commit(self) -> None:
        self.in_group = False
        self.compiled.commit()
        self.plain.commit()

    @precondition(lambda self: self.in_group)
    @rule()
    def rollback(self) -> None:
        self.in_group = False
        with_allowance(0, self.compiled.rollback)
        self.plain.rollback()
        for key, allowed in self.touched.items():
            assert self.get(key) in allowed

    # -- what must hold

    def get(self, key: int) -> IndexEntry | None:
        entry = self.compiled.get(key)
        return None if entry is None else IndexEntry(*entry)

    def change(self, key: int, change: Change) -> None:
        """Make a change of one payment in the index and, if it was made, in the twin."""
        before = {other: self.get(other) for other in KEYS}
        evicted = self.compiled.evicted
        if before[key] is None:
            self.plain.discard(key)
        try:
            with_allowance(self.allowance, lambda: change(self.compiled))
        except MemoryError:
            assert self.allowance >= 0
            assert {other: self.get(other) for other in KEYS} == before
            assert self.compiled.evicted == evicted
        else:
            change(self.plain)
            assert self.get(key) == self.plain.get(key)
            if self.in_group and self.get(key) != before[key]:
                self.touched.setdefault(key, {before[key]})
        self.allowance = -1

    @invariant()
    def what_is_held_is_what_the_twin_holds(self) -> None:
        lacking = 0
        for key in KEYS:
            held = self.get(key)
            if held is None:
                lacking += key in self.plain
            else:
                assert held == self.plain.get(key)
        assert lacking <= self.compiled.evicted
        if self.max_bytes == 0:
            assert lacking == self.compiled.evicted == 0

    @invariant()
    def what_the_group_touched_is_held(self) -> None:
        if self.in_group:
            for key in self.touched:
                assert self.get(key) == self.plain.get(key)

    @invariant()
    def segments_are_sound(self) -> None:
        slots = self.compiled._slot_keys()
        held = [key for key in slots if key not in {0, TOMBSTONE}]
        assert len(held) == len(set(held)) == len(self.compiled)
        assert self.compiled._occupied == len(slots) - slots.count(0) <= self.compiled.capacity
        assert all(key in self.compiled for key in held)
        sizes = self.compiled._segment_sizes()
        assert sum(live for _, live, _ in sizes) == len(held)
        assert all(occupied < size for size, _, occupied in sizes if size)


def with_allowance(allocations: int, call: Callable[[], None]) -> None:
    """Call with so many allocations of the index succeeding; a negative number is no bound."""
    _dedupe._fail_allocation_after(allocations)
    try:
        call()
    finally:
        _dedupe._fail_allocation_after(-1)


class TightHistory(BoundedHistory):
    """A segment of the least size: most inserts evict."""

    max_bytes = 1


class RoomierHistory(BoundedHistory):
    """Two segments of 24 slots, which grow to that first."""

    segments = 2
    max_bytes = 2 * 32 + 16 + 4 * (24 * 32 + 16)


SETTINGS = settings(
    max_examples=120,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
for history in (BoundedHistory, TightHistory, RoomierHistory):
    history.TestCase.settings = SETTINGS
TestGrowingHistory = BoundedHistory.TestCase
TestTightHistory = TightHistory.TestCase
TestRoomierHistory = RoomierHistory.TestCase
