"""The compiled index where its memory is concerned: collisions, removals, growth, failing allocations.

White-box: the slots are looked at, and allocations are made to fail (_dedupe._fail_allocation_after).
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import pytest

from paycore import _dedupe
from paycore._dedupe import Index
from paycore.domain.ids import ID_EPOCH_MS
from paycore.domain.plain_index import PlainIndex
from paycore.domain.verdicts import NotifyOutcome, PaymentState, VerdictFlag

OPEN, PAID = PaymentState.OPEN, PaymentState.PAID
TOMBSTONE = 1 << 63
ENTRY_BYTES = 32
CHANGE_BYTES = 40
SEGMENT_BYTES = 32
UNDO_START = 16
"""Changes that a group's undo log first has room for."""

MASK_64 = (1 << 64) - 1


def block(wanted: int) -> int:
    """What a small block takes with its allocator's header."""
    return wanted + 16


def unmix(word: int) -> int:
    """Invert the finaliser of splitmix64: the key that is spread to ``word``."""
    word ^= word >> 31 ^ word >> 62
    word = word * pow(0x94D049BB133111EB, -1, 1 << 64) & MASK_64
    word ^= word >> 27 ^ word >> 54
    word = word * pow(0xBF58476D1CE4E5B9, -1, 1 << 64) & MASK_64
    return word ^ word >> 30 ^ word >> 60


def colliding_ids(wanted: int, bucket: int = 5) -> list[int]:
    """Payment ids of one segment whose probes start at one slot: ``bucket`` in 2**20 of the way through all slots."""
    # The odd factor spreads the rest of the word over its low bits, so that every step of the hash takes part.
    ids = (unmix(bucket << 44 | number * 0x9E3779B1 & (1 << 22) - 1) for number in count(1))
    return list(islice((key for key in ids if 0 < key < TOMBSTONE), wanted))


def put(index: Index | PlainIndex, payment_id: int, amount_minor: int = 100, attempts: int = 1) -> None:
    """Put an open payment that expires a second after it was made."""
    expire_at_ms = (payment_id >> 22) + ID_EPOCH_MS + 1_000
    index.put(payment_id, amount_minor, 1, expire_at_ms, OPEN, 0, attempts, 0, (7,) * min(attempts, 3))


def check(index: Index | PlainIndex, payment_id: int, amount_minor: int = 100, attempt: int = 1) -> int:
    """Check a capture that is in time, by the account that `put` names."""
    made_at_ms = (payment_id >> 22) + ID_EPOCH_MS
    return index.check(payment_id, attempt, 7, amount_minor, 1, made_at_ms, made_at_ms)


def contents(index: Index, payment_ids: range | list[int]) -> list[object]:
    """Everything that the index says about the payments."""
    return [index.get(payment_id) for payment_id in payment_ids]


@contextmanager
def failing_allocations(after: int = 0) -> Iterator[None]:
    """Let ``after`` allocations of the index succeed and every later one fail."""
    _dedupe._fail_allocation_after(after)
    try:
        yield
    finally:
        _dedupe._fail_allocation_after(-1)


def full_index(payments: int = 6) -> Index:
    """An index of one segment that grows with the next payment; it holds 1, 2, 3 ..."""
    index = Index(segments=1)
    for payment_id in range(1, payments + 1):
        put(index, payment_id)
    assert len(index) == index.capacity
    return index


def assert_slots_are_sound(index: Index) -> None:
    """Occupied counts what is there, some slots are empty, and each payment is reached from where its probe starts."""
    keys = index._slot_keys()
    held = [key for key in keys if key not in {0, TOMBSTONE}]
    assert len(held) == len(set(held)) == len(index)
    assert index._occupied == len(keys) - keys.count(0) <= index.capacity < len(keys)
    assert all(index.get(key) is not None for key in held)


# ---- Collisions ------------------------------------------------------------------------------------------


def test_colliding_ids_are_kept_apart_by_their_full_key() -> None:
    ids = colliding_ids(1_500)
    index = Index(segments=1)
    for place, payment_id in enumerate(ids[:1_000]):
        put(index, payment_id, amount_minor=1 + place)
    slots = index._slot_keys()
    # The ids do collide: they stand in one unbroken run from their bucket on.
    assert set(slots[:1_000]) == set(ids[:1_000])
    for place, payment_id in enumerate(ids[:1_000]):
        assert check(index, payment_id, amount_minor=1 + place) == NotifyOutcome.ACCEPTED
    assert all(check(index, payment_id) == _dedupe.MISS for payment_id in ids[1_000:])


def test_colliding_ids_are_reached_over_the_gaps_that_removals_leave() -> None:
    ids = colliding_ids(600)
    index = Index()
    for payment_id in ids:
        put(index, payment_id)
    for payment_id in ids[::2]:
        index.discard(payment_id)
    assert all(payment_id in index for payment_id in ids[1::2])
    assert not any(payment_id in index for payment_id in ids[::2])
    for payment_id in ids[::2]:
        put(index, payment_id, amount_minor=5)
    assert len(index) == 600
    assert all(check(index, payment_id, amount_minor=5) == NotifyOutcome.ACCEPTED for payment_id in ids[::2])
    assert_slots_are_sound(index)


def test_put_of_a_payment_beyond_a_gap_replaces_it_and_makes_no_second_entry() -> None:
    first, second = colliding_ids(2)
    index = Index()
    put(index, first)
    put(index, second)
    index.discard(first)
    put(index, second, amount_minor=9)
    assert len(index) == 1
    index.discard(second)
    assert second not in index


def test_probe_at_the_end_of_the_table_goes_on_at_its_start() -> None:
    ids = colliding_ids(4, bucket=(1 << 20) - 2)
    index = Index(segments=1)
    for payment_id in ids:
        put(index, payment_id)
    assert index._slot_keys() == [ids[1], ids[2], ids[3], 0, 0, 0, 0, ids[0]]
    assert all(payment_id in index for payment_id in ids)


# ---- Removals --------------------------------------------------------------------------------------------


def test_delete_of_absent_payments_until_full_leaves_nothing_behind() -> None:
    index = full_index()
    before = index._slot_keys()
    for payment_id in range(1_000, 101_000):
        index.discard(payment_id)
    assert index._slot_keys() == before
    put(index, 7)
    assert_slots_are_sound(index)


def test_fill_and_delete_again_and_again_neither_grows_nor_fills_with_tombstones() -> None:
    index = full_index(13)
    capacity = index.capacity
    for payment_id in range(100, 20_100):
        put(index, payment_id)
        index.discard(payment_id)
        assert index._occupied <= index.capacity
    assert index.capacity <= 2 * capacity
    assert len(index) == 13
    assert_slots_are_sound(index)
    assert check(index, 99_999) == _dedupe.MISS


@pytest.mark.parametrize("live", range(40, 97))
def test_rebuilds_are_far_apart_however_full_the_table_is(live: int) -> None:
    index = Index(capacity=96, segments=1)
    for payment_id in range(live):
        put(index, 1 + payment_id)
    with failing_allocations(after=1_000 // 5):
        for payment_id in range(1_000, 2_000):
            put(index, payment_id)
            index.discard(payment_id)
    assert len(index) == live


def test_key_of_a_tombstone_is_no_payment() -> None:
    index = full_index()
    for payment_id in range(1, 7):
        index.discard(payment_id)
    assert index._slot_keys().count(TOMBSTONE) == 6
    least_int64 = -TOMBSTONE
    assert least_int64 not in index
    assert index.get(least_int64) is None
    assert check(index, least_int64) == _dedupe.MISS
    index.discard(least_int64)
    assert len(index) == 0


def test_random_churn_stays_equal_to_the_twin() -> None:
    chance = random.Random(20_261)
    index, plain = Index(segments=1), PlainIndex()
    ids = [*colliding_ids(40), *range(1, 60)]
    for step in range(30_000):
        payment_id = chance.choice(ids)
        if chance.random() < 0.5:
            put(index, payment_id, amount_minor=1 + step)
            put(plain, payment_id, amount_minor=1 + step)
        else:
            index.discard(payment_id)
            plain.discard(payment_id)
    assert contents(index, ids) == [plain.get(payment_id) for payment_id in ids]
    assert_slots_are_sound(index)
    assert index.capacity <= 4 * len(ids)


# ---- Failing allocations ---------------------------------------------------------------------------------


def test_growth_that_fails_loses_nothing_and_works_later() -> None:
    index = full_index()
    before, nbytes = contents(index, range(1, 8)), index.nbytes
    with failing_allocations():
        for payment_id in range(7, 20):
            with pytest.raises(MemoryError, match="no memory for the index to grow"):
                put(index, payment_id)
        assert contents(index, range(1, 8)) == before
        assert (len(index), index.capacity, index.nbytes) == (6, 6, nbytes)
        put(index, 3, amount_minor=55)
        index.accept(2, 1)
        index.discard(1)
        assert check(index, 3, amount_minor=55) == NotifyOutcome.ACCEPTED
    put(index, 7)
    assert [payment_id in index for payment_id in range(1, 8)] == [False, *[True] * 6]
    assert_slots_are_sound(index)


def test_growth_that_fails_in_a_group_is_rolled_back_without_memory() -> None:
    index = full_index()
    before = contents(index, range(1, 30))
    index.begin()
    index.accept(1, 1)
    index.discard(2)
    with failing_allocations():
        with pytest.raises(MemoryError):
            put(index, 7)
        index.rollback()
        assert contents(index, range(1, 30)) == before
    index.begin()
    put(index, 7)
    index.commit()
    assert len(index) == 7


@pytest.mark.parametrize("successes", range(4))
def test_group_that_runs_out_of_memory_anywhere_is_rolled_back_exactly(successes: int) -> None:
    index = full_index()
    before = contents(index, range(1, 100))
    index.begin()
    with failing_allocations(successes):
        with pytest.raises(MemoryError):
            replace_all(index, range(7, 100))
        index.rollback()
        assert contents(index, range(1, 100)) == before
    assert_slots_are_sound(index)


def replace_all(index: Index, payment_ids: range) -> None:
    """Put each payment after taking out one of those that `full_index` made."""
    for payment_id in payment_ids:
        index.discard(payment_id % 6 + 1)
        put(index, payment_id)


CHANGES: list[tuple[str, Callable[[Index], None]]] = [
    ("put_new", lambda index: put(index, 99)),
    ("put_again", lambda index: put(index, 1, amount_minor=7)),
    ("add_attempt", lambda index: index.add_attempt(1, 2, 7)),
    ("add_attempt_out_of_turn", lambda index: index.add_attempt(1, 9, 7)),
    ("accept", lambda index: index.accept(1, 1)),
    ("close", lambda index: index.close(1)),
    ("set_captured", lambda index: index.set_captured(1, 1)),
    ("discard", lambda index: index.discard(1)),
]


@pytest.mark.parametrize("change", [row[1] for row in CHANGES], ids=[row[0] for row in CHANGES])
def test_change_without_memory_for_its_undo_record_is_not_made(change: Callable[[Index], None]) -> None:
    index = Index(capacity=40, segments=1)
    for payment_id in range(1, 5):
        put(index, payment_id)
    started = contents(index, range(100))
    index.begin()
    for _ in range(UNDO_START):
        index.set_captured(2, 1)
    before = contents(index, range(100))
    with failing_allocations():
        # Twice: the first failure must not leave a log that seems to have room.
        for _ in range(2):
            with pytest.raises(MemoryError, match="no memory for the undo log"):
                change(index)
        assert contents(index, range(100)) == before
        index.rollback()
        assert contents(index, range(100)) == started
    index.begin()
    change(index)
    assert contents(index, range(100)) != started
    index.rollback()
    assert contents(index, range(100)) == started


def test_first_change_of_a_group_without_memory_is_not_made() -> None:
    index = full_index()
    index.begin()
    with failing_allocations(), pytest.raises(MemoryError, match="no memory for the undo log"):
        index.accept(1, 1)
    assert check(index, 1) == NotifyOutcome.ACCEPTED
    index.commit()


def test_index_without_memory_for_its_capacity_is_not_made() -> None:
    with failing_allocations(), pytest.raises(MemoryError, match="no memory for 1000 payments"):
        Index(capacity=1_000)


@pytest.mark.parametrize("capacity", [1 << 58, 1 << 59, 1 << 60, 1 << 61, 1 << 62, (1 << 63) - 1])
def test_capacity_whose_size_overflows_is_refused(capacity: int) -> None:
    with pytest.raises(MemoryError):
        Index(capacity=capacity)


# ---- Groups and moving slots -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(200))
def test_rollback_after_growth_and_removals_restores_exactly_without_memory(seed: int) -> None:
    chance = random.Random(seed)
    ids = [*colliding_ids(20, bucket=chance.randrange(1 << 20)), *range(1, 60)]
    index = Index(segments=1)
    for payment_id in chance.sample(ids, 12):
        put(index, payment_id)
    before, capacity = contents(index, ids), index.capacity
    index.begin()
    for _ in range(chance.randrange(200)):
        payment_id = chance.choice(ids)
        change = chance.choice(["put", "discard", "discard", "accept", "close"])
        if change == "put" or payment_id not in index:
            put(index, payment_id, amount_minor=chance.randrange(1, 9), attempts=2)
        elif change == "discard":
            index.discard(payment_id)
        elif change == "accept":
            index.accept(payment_id, 1)
        else:
            index.close(payment_id)
    with failing_allocations():
        index.rollback()
    assert contents(index, ids) == before
    assert index.capacity >= capacity
    assert_slots_are_sound(index)


@pytest.mark.parametrize("seed", range(50))
def test_rollback_keeps_the_table_within_its_limit_when_a_group_swaps_every_payment(seed: int) -> None:
    """A rebuild inside the group must keep room for what the group took out."""
    chance = random.Random(seed)
    old, new = range(1, 49), [chance.randrange(100, 1 << 60) for _ in range(48)]
    index = Index(capacity=48, segments=1)
    for payment_id in old:
        put(index, payment_id)
    index.begin()
    for payment_id in old:
        index.discard(payment_id)
    for payment_id in new:
        put(index, payment_id)
    index.rollback()
    assert all(payment_id in index for payment_id in old)
    assert_slots_are_sound(index)


# ---- Negative answers ------------------------------------------------------------------------------------


def test_miss_is_not_remembered_past_a_load() -> None:
    index = full_index()
    for payment_id in [7, *colliding_ids(30)]:
        slots = index._slot_keys()
        assert check(index, payment_id) == _dedupe.MISS
        assert index._slot_keys() == slots
        put(index, payment_id)
        assert check(index, payment_id) == NotifyOutcome.ACCEPTED
        assert check(index, payment_id, attempt=2) == _dedupe.MISS
        index.add_attempt(payment_id, 2, 7)
        assert check(index, payment_id, attempt=2) == NotifyOutcome.ACCEPTED
        index.discard(payment_id)
        assert check(index, payment_id) == _dedupe.MISS
        put(index, payment_id)
        assert check(index, payment_id) == NotifyOutcome.ACCEPTED


# ---- Size ------------------------------------------------------------------------------------------------


def test_large_fill_answers_like_the_twin() -> None:
    chance = random.Random(7)
    index, plain = Index(), PlainIndex()
    ids = [(1_000 + place // 4) << 22 | place % 4 for place in range(200_000)]
    chance.shuffle(ids)
    for payment_id in ids:
        amount_minor = 1 + payment_id % 9
        put(index, payment_id, amount_minor)
        put(plain, payment_id, amount_minor)
    for payment_id in ids[::3]:
        index.accept(payment_id, 1)
        plain.accept(payment_id, 1)
    for payment_id in ids[::7]:
        index.discard(payment_id)
        plain.discard(payment_id)
    assert len(index) == len(plain)
    asked = [*ids, *(payment_id + 4 for payment_id in ids[:1_000])]
    expected = [check(plain, payment_id, 5) for payment_id in asked]
    assert [check(index, payment_id, 5) for payment_id in asked] == expected
    assert set(expected) == {0, VerdictFlag.ASK, NotifyOutcome.ACCEPTED, NotifyOutcome.MISMATCH | VerdictFlag.ASK}
    assert ENTRY_BYTES <= index.nbytes / len(index) < ENTRY_BYTES * 4


def test_nbytes_counts_the_table_and_the_undo_log() -> None:
    index = Index(segments=1)
    assert index.nbytes == Index.__basicsize__
    index = Index(segments=1, capacity=100)
    for payment_id in range(1, 101):
        put(index, payment_id)
    slots = len(index._slot_keys())
    table_bytes = Index.__basicsize__ + block(SEGMENT_BYTES) + block(slots * ENTRY_BYTES)
    assert index.nbytes == table_bytes
    index.begin()
    for _ in range(UNDO_START + 1):
        index.set_captured(1, 1)
    assert index.nbytes == table_bytes + block(2 * UNDO_START * CHANGE_BYTES)
    index.rollback()
    assert index.nbytes == table_bytes + block(2 * UNDO_START * CHANGE_BYTES)


def test_nbytes_counts_what_growing_needs_beside_the_segment() -> None:
    index = Index(segments=1)
    for payment_id in range(1, 1_001):
        put(index, payment_id)
    slots = len(index._slot_keys())
    table_bytes = Index.__basicsize__ + block(SEGMENT_BYTES) + slots * ENTRY_BYTES
    assert index.nbytes >= table_bytes + len(index) * ENTRY_BYTES * 8 // 10


def test_undo_log_of_a_large_group_is_given_back_at_its_end() -> None:
    index = Index()
    put(index, 1)
    nbytes = index.nbytes
    index.begin()
    for _ in range(100_000):
        index.set_captured(1, 1)
    assert index.nbytes > nbytes + 100_000 * CHANGE_BYTES
    index.commit()
    assert index.nbytes == nbytes


@pytest.mark.parametrize("capacity", [1, 6, 7, 12, 13, 1_000, 100_000])
def test_capacity_asked_for_is_held_without_growing(capacity: int) -> None:
    index = Index(capacity=capacity, segments=1)
    nbytes = index.nbytes
    assert capacity <= index.capacity <= max(6, 2 * capacity)
    with failing_allocations():
        for payment_id in range(1, capacity + 1):
            put(index, payment_id)
    assert (len(index), index.nbytes) == (capacity, nbytes)


def test_capacity_over_many_segments_is_held_without_growing() -> None:
    index = Index(capacity=100_000)
    with failing_allocations():
        for payment_id in range(1, 100_001):
            put(index, payment_id << 22)
    assert index.nbytes / len(index) < 80


def test_index_that_grew_and_is_dropped_gives_all_memory_back() -> None:
    held = _dedupe._blocks_held()
    index = full_index()
    index.begin()
    for payment_id in range(7, 1_000):
        put(index, payment_id)
    # The directory, the segment, its scratch, the undo log.
    assert _dedupe._blocks_held() == held + 4
    del index
    assert _dedupe._blocks_held() == held


def test_index_that_could_not_be_made_gives_all_memory_back() -> None:
    held = _dedupe._blocks_held()
    with failing_allocations(), pytest.raises(MemoryError):
        Index(capacity=10)
    for settings in ({"capacity": -1}, {"capacity": 1 << 62}, {"late_grace_ms": -1}):
        with pytest.raises((MemoryError, ValueError)):
            Index(**settings)
    assert _dedupe._blocks_held() == held


# ---- Threads ---------------------------------------------------------------------------------------------


def test_change_while_check_many_runs_is_refused_and_the_group_goes_on() -> None:
    rows = 1_000_000
    index = Index()
    for payment_id in range(1, 1_001):
        put(index, payment_id)
    table = (
        array("q", (1 + row % 1_000 for row in range(rows))),
        array("B", [1]) * rows,
        array("B", [7]) * rows,
        array("q", [100]) * rows,
        array("B", [1]) * rows,
        array("q", [ID_EPOCH_MS]) * rows,
        array("q", [ID_EPOCH_MS]) * rows,
        array("I", [0]) * rows,
    )
    index.begin()
    deadline = time.monotonic() + 30
    refused: set[str] = set()
    while refused != {"put", "rollback"} and time.monotonic() < deadline:
        batch = threading.Thread(target=index.check_many, args=table)
        batch.start()
        while batch.is_alive():
            if "put" not in refused:
                refused |= refusal("put", lambda: put(index, 1))
            else:
                refused |= refusal("rollback", index.rollback, again=index.begin)
        batch.join()
    assert refused == {"put", "rollback"}
    index.rollback()
    assert set(table[-1]) == {NotifyOutcome.ACCEPTED}
    put(index, 1, amount_minor=5)
    assert check(index, 1, amount_minor=5) == NotifyOutcome.ACCEPTED


def refusal(name: str, call: Callable[[], None], again: Callable[[], None] | None = None) -> set[str]:
    """Return {name} when the call is refused because a batch runs; otherwise nothing, after calling ``again``."""
    try:
        call()
    except RuntimeError as error:
        if "while check_many runs" in str(error):
            return {name}
        raise
    if again is not None:
        again()
    return set()


def check_many(index: Index, buffers: list[Any]) -> None:
    index.check_many(*buffers)


def test_check_many_of_wrong_buffers_is_refused_and_changes_may_go_on() -> None:
    index = full_index()
    good = [array(kind, [1]) for kind in "qBBqBqqI"]
    for place, other in enumerate("IqqIqIIq"):
        wrong = [*good[:place], array(other, [1]), *good[place + 1 :]]
        with pytest.raises(ValueError, match="Buffer dtype mismatch"):
            check_many(index, wrong)
    with pytest.raises((BufferError, ValueError)):
        check_many(index, [*good[:7], memoryview(good[7]).toreadonly()])
    index.discard(1)
    assert 1 not in index
