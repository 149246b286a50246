"""Numbers: drawn in order, written one way, read back only from that one way."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paycore.domain import ids
from paycore.domain.ids import ID_EPOCH_MS, MAX_ATTEMPTS, MAX_INT64, PaymentIds


class SetClock:
    """A clock that a test moves."""

    def __init__(self, now_ms: int) -> None:
        self.time_ms = now_ms

    def now_ms(self) -> int:
        return self.time_ms


NOW_MS = ID_EPOCH_MS + 86_400_000


def test_id_carries_its_millisecond_and_its_node() -> None:
    payment_id = PaymentIds(SetClock(NOW_MS), node=677).draw()
    assert ids.created_at_ms(payment_id) == NOW_MS
    assert payment_id >> ids.SEQUENCE_BITS & ids.NODE_COUNT - 1 == 677


def test_ids_of_one_millisecond_increase_and_borrow_from_the_next() -> None:
    source = PaymentIds(SetClock(NOW_MS), node=ids.NODE_COUNT - 1)
    drawn = [source.draw() for _ in range(10_000)]
    assert all(first < second for first, second in pairwise(drawn))
    assert ids.created_at_ms(drawn[4_095]) == NOW_MS
    assert ids.created_at_ms(drawn[4_096]) == NOW_MS + 1


def test_ids_still_increase_when_the_clock_steps_back() -> None:
    clock = SetClock(NOW_MS)
    source = PaymentIds(clock, node=3)
    first = source.draw()
    clock.time_ms -= 3_600_000
    second = source.draw()
    assert second > first
    clock.time_ms = NOW_MS + 5
    assert ids.created_at_ms(source.draw()) == NOW_MS + 5


@pytest.mark.parametrize("node", [0, 1, 1_023])
def test_ids_of_the_last_millisecond_are_positive_int64(node: int) -> None:
    last_ms = ID_EPOCH_MS + (1 << 41) - 1
    assert 0 < PaymentIds(SetClock(last_ms), node=node).draw() <= MAX_INT64


@pytest.mark.parametrize("node", [-1, 1_024])
def test_node_out_of_range_is_refused(node: int) -> None:
    with pytest.raises(ValueError, match="node must be 0 to 1023"):
        PaymentIds(SetClock(NOW_MS), node=node)


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Let threads take turns a thousand times as often as usual."""
    usual_seconds = sys.getswitchinterval()
    sys.setswitchinterval(usual_seconds / 1_000)
    yield
    sys.setswitchinterval(usual_seconds)


@pytest.mark.usefixtures("restless_threads")
def test_ids_drawn_by_many_threads_differ() -> None:
    source = PaymentIds(SetClock(NOW_MS), node=1)
    drawn: list[int] = []
    threads = [threading.Thread(target=lambda: drawn.extend([source.draw() for _ in range(20_000)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 80_000


@given(payment_id=st.integers(1, MAX_INT64), attempt=st.integers(1, MAX_ATTEMPTS))
def test_order_number_reads_back_what_was_written(payment_id: int, attempt: int) -> None:
    text = ids.format_channel_order_no(payment_id, attempt)
    assert ids.parse_channel_order_no(text) == (payment_id, attempt)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("101", (1, 1)),
        ("163", (1, 63)),
        ("922337203685477580763", (MAX_INT64, 63)),
        ("922337203685477580801", None),  # above int64
        ("164", None),
        ("199", None),
        ("100", None),  # attempt 0
        ("001", None),  # payment 0
        ("0101", None),  # a leading zero
        ("01", None),
        ("1", None),
        ("", None),
        ("+101", None),
        ("-101", None),
        ("1_01", None),
        (" 101", None),
        ("101 ", None),
        ("101\n", None),
        ("101\0", None),
        ("１０１", None),  # full-width digits
        ("١٠١", None),
        ("1²3", None),
        ("1.01", None),
        ("0x101", None),
        ("1" * 22, None),
        ("9" * 100_000, None),
    ],
)
def test_order_number_that_is_not_canonical_is_not_ours(text: str, parsed: tuple[int, int] | None) -> None:
    assert ids.parse_channel_order_no(text) == parsed


@given(st.text(max_size=25))
def test_order_number_of_any_text_is_canonical_or_not_ours(text: str) -> None:
    parsed = ids.parse_channel_order_no(text)
    assert parsed is None or ids.format_channel_order_no(*parsed) == text


def test_refund_number_depends_on_attempt_and_trade_number_alone() -> None:
    assert ids.excess_refund_no(7, "A1") == ids.excess_refund_no(7, "A1")
    numbers = {ids.excess_refund_no(attempt, trade_no) for attempt in (1, 11) for trade_no in ("A1", "A2", "1A1")}
    assert len(numbers) == 6
    assert all(len(number) == 19 and number[0] == "X" for number in numbers)


def test_refund_try_number_fits_in_40_characters_and_differs_by_try() -> None:
    refund_no = ids.excess_refund_no(63, "T" * 64)
    tries = {ids.format_channel_refund_no(MAX_INT64, refund_no, seq) for seq in range(1, ids.MAX_REFUND_TRIES + 1)}
    assert len(tries) == ids.MAX_REFUND_TRIES
    assert max(map(len, tries)) == 40


@given(st.lists(st.text(max_size=4), max_size=4), st.lists(st.text(max_size=4), max_size=4))
def test_digest_of_different_lists_differs(left: list[str], right: list[str]) -> None:
    assert (ids.digest_fields(*left) == ids.digest_fields(*right)) == (left == right)


def test_digest_tells_where_a_field_ends() -> None:
    assert ids.digest_fields("ab", "c") != ids.digest_fields("a", "bc")
    assert ids.digest_fields("ab") != ids.digest_fields("ab", "")
