"""A compiled group of notifications without a database: which words it takes, and the columns that it hands on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paycore import _wire
from paycore._dedupe import Index
from paycore._group import Group, account_codes, pending_from
from paycore._wire import Decoder
from paycore.domain.decision import ABSENT_MS
from paycore.domain.ids import ID_EPOCH_MS, format_channel_order_no, parse_channel_order_no
from paycore.domain.notification import Notification
from paycore.domain.verdicts import CaptureSource, ChannelResult, NotifyOutcome, PaymentState, VerdictFlag
from paycore.store.outcomes import PlainOutcomes
from paycore.store.rows import OutcomeRow, Stamp
from tests.support.core import ACCOUNTS, CHANNEL

SUCCESS = ChannelResult.SUCCESS
DECODER = Decoder({(CHANNEL, account): place for place, account in enumerate(ACCOUNTS, start=1)}, {"CNY": 156})
EXPIRE_AT_MS = ID_EPOCH_MS + 10_000_000
NOW_MS = ID_EPOCH_MS + 1_000_000


FIRST_ID = (NOW_MS - ID_EPOCH_MS) << 22
STAMP = Stamp(1, 2, 3)

accepted = st.fixed_dictionaries(
    {
        "attempt": st.integers(1, 3),
        "channel_trade_no": st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(
            lambda text: text[:16]
        )
        | st.sampled_from(["T", "銀" * 16, "😀"]),
        "amount_minor": st.integers(1, (1 << 48) - 1),
        "paid_at_ms": st.sampled_from([ABSENT_MS, 0, NOW_MS, NOW_MS + 1, NOW_MS + 400_000, EXPIRE_AT_MS]),
        "received_at_ms": st.integers(NOW_MS, NOW_MS + 3),
    }
)


def an_index(words: Sequence[Notification], *, leave_out: int = 0) -> Index:
    """An index that holds the payments of the words but the first few, with three attempts at bank A."""
    index = Index()
    for word in words[leave_out:]:
        order = parse_channel_order_no(word.channel_order_no)
        assert order is not None
        codes = (1, 1, 1)
        index.put(order.payment_id, word.amount_minor, 156, EXPIRE_AT_MS, PaymentState.OPEN, 0, 3, 0, codes)
    return index


def a_word(payment_id: int, attempt: int = 1, **changes: Any) -> Notification:
    number = format_channel_order_no(payment_id, attempt)
    word = Notification(CHANNEL, "bank_a", number, SUCCESS, 500, "CNY", "T1", NOW_MS, NOW_MS)
    return word._replace(**changes)


def expected_row(word: Notification) -> OutcomeRow:
    """What the plain path would write of a word that is accepted."""
    order = parse_channel_order_no(word.channel_order_no)
    assert order is not None
    believed = NOW_MS <= word.paid_at_ms <= word.received_at_ms + 300_000
    return OutcomeRow(
        order.payment_id,
        PaymentState.PAID,
        order.attempt,
        word.channel_trade_no,
        word.amount_minor,
        word.currency,
        None if word.paid_at_ms == ABSENT_MS else word.paid_at_ms,
        word.received_at_ms,
        CaptureSource.NOTIFICATION,
        int(not believed),
        0,
        *STAMP,
    )


@settings(max_examples=200, deadline=None)
@given(st.lists(accepted, max_size=12), st.randoms(use_true_random=False), st.data())
def test_columns_are_those_of_the_plain_rows_whatever_the_order_of_the_words(
    drawn: list[dict[str, Any]], chance: Any, data: st.DataObject
) -> None:
    words = [a_word(FIRST_ID + 7 * place, **one) for place, one in enumerate(drawn)]
    chance.shuffle(words)
    index = an_index(words)
    cut = data.draw(st.integers(0, len(words)))
    pieces = [(DECODER.of_values(part), 0, len(part)) for part in (words[:cut], words[cut:])]
    group = Group(index, pieces)
    index.begin()
    assert group.accept() == len(group) == len(words)
    index.commit()
    rows = [expected_row(word) for word in words]
    plain = PlainOutcomes(rows)
    assert group.payment_ids == plain.payment_ids
    assert group.values(0, len(words)) == plain.values(0, len(words))
    start, stop = sorted(data.draw(st.lists(st.integers(0, 14), min_size=2, max_size=2)))
    assert group.values(start, stop) == plain.values(start, stop)
    assert group.untrusted == sum(row.paid_at_untrusted for row in rows)
    if rows:
        assert group.arrays() == plain.arrays()


def test_columns_hold_no_word_that_is_refused_or_outside_its_piece() -> None:
    words = [a_word(FIRST_ID + place) for place in range(5)]
    index, batch = an_index(words), DECODER.of_values(words)
    batch.refuse(2, NotifyOutcome.INVALID)
    group = Group(index, [(batch, 1, 4)])
    index.begin()
    assert group.accept() == 2
    assert group.payment_ids == [FIRST_ID + 1, FIRST_ID + 3]
    assert [batch.verdict(place)[0] for place in range(5)] == [0, 1, NotifyOutcome.INVALID, 1, 0]
    assert group.rare(()) == []
    assert group.rare([FIRST_ID + 3]) == [(batch, 3)]
    index.rollback()
    assert index.get(FIRST_ID + 1).state == PaymentState.OPEN  # type: ignore[union-attr]  # it is there


def test_second_word_of_a_payment_is_left_to_the_rows_and_only_the_lost_come_after_it() -> None:
    words = [a_word(FIRST_ID), a_word(FIRST_ID, 2), a_word(FIRST_ID + 1)]
    index, batch = an_index(words), DECODER.of_values(words)
    group = Group(index, [(batch, 0, 3)])
    index.begin()
    assert group.accept() == 2
    assert group.rare(()) == [(batch, 1)]
    assert group.rare([FIRST_ID]) == [(batch, 0), (batch, 1)]
    assert batch.verdict(0)[0] == 0
    index.rollback()


def test_payments_that_the_index_lacks_are_named_once_each_and_in_order() -> None:
    words = [a_word(FIRST_ID + place) for place in (3, 1, 2)]
    index = an_index(words, leave_out=2)
    batch = DECODER.of_values([*words, words[0], a_word(FIRST_ID)._replace(channel_order_no="nobody's")])
    assert Group(index, [(batch, 0, 5), (batch, 0, 1)]).missing() == [FIRST_ID + 1, FIRST_ID + 3]
    batch.refuse(1, NotifyOutcome.THROTTLED)
    assert Group(index, [(batch, 0, 3)]).missing() == [FIRST_ID + 3]


def test_answer_of_an_earlier_try_is_forgotten_and_a_refusal_is_not() -> None:
    words = [a_word(FIRST_ID), a_word(FIRST_ID + 1)]
    index, batch = an_index(words), DECODER.of_values(words)
    batch.answer(0, NotifyOutcome.ACCEPTED)
    batch.refuse(1, NotifyOutcome.INVALID)
    group = Group(index, [(batch, 0, 2)])
    assert [batch.verdict(place)[0] for place in (0, 1)] == [0, NotifyOutcome.INVALID]
    assert group.rare(()) == [(batch, 0)]


def test_words_whose_payments_were_loaded_meanwhile_are_accepted_by_a_second_call() -> None:
    words = [a_word(FIRST_ID + place) for place in (2, 0, 1)]
    index, batch = an_index(words, leave_out=1), DECODER.of_values([*words, words[0]])
    group = Group(index, [(batch, 0, 4)])
    index.begin()
    assert group.accept() == 2
    assert group.missing() == [FIRST_ID + 2]
    index.put(FIRST_ID + 2, 500, 156, EXPIRE_AT_MS, PaymentState.OPEN, 0, 3, 0, (1, 1, 1))
    assert group.accept() == len(group) == 3
    assert group.payment_ids == [FIRST_ID, FIRST_ID + 1, FIRST_ID + 2]
    assert group.arrays() == PlainOutcomes([expected_row(word) for word in words]).arrays()
    assert group.rare(()) == [(batch, 3)]
    index.rollback()


def test_tally_counts_by_account_outcome_and_replay_and_leaves_out_what_was_refused() -> None:
    words = [a_word(FIRST_ID + place, account=account) for place, account in enumerate([*ACCOUNTS, "bank_z", "bank_a"])]
    batch = DECODER.of_values(words)
    batch.refuse(4, NotifyOutcome.THROTTLED)
    group = Group(Index(), [(batch, 0, 5)])
    for place, verdict in enumerate([1, 2, 1 | VerdictFlag.REPLAYED, 7]):
        batch.answer(place, int(verdict))
    assert sorted(group.tally()) == [
        (0, 7, False, 1),
        (1, 1, False, 1),
        (2, 2, False, 1),
        (3, 1, True, 1),
    ]


def test_words_of_a_batch_are_told_by_account_and_by_what_is_not_refused() -> None:
    batch = DECODER.of_values([a_word(FIRST_ID, account=account) for account in (*ACCOUNTS, "bank_z")])
    batch.refuse(1, NotifyOutcome.INVALID)
    assert account_codes(batch, [3, 0, 2]) == [0, 1, 3]
    assert (pending_from(batch, -5), pending_from(batch, 1), pending_from(batch, 9)) == ([0, 2, 3], [2, 3], [])
    for position in (-1, 4):
        with pytest.raises(IndexError):
            account_codes(batch, [position])


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 0), (0, 3), (3, 3)])
def test_piece_that_its_batch_does_not_have_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="no words"):
        Group(Index(), [(DECODER.of_values([a_word(FIRST_ID)] * 2), start, stop)])


# Memory


@pytest.fixture
def allowance() -> Iterator[None]:
    """Let a test limit the allocations, and end that afterwards."""
    yield
    _wire._fail_allocation_after(-1)


@pytest.mark.usefixtures("allowance")
@pytest.mark.parametrize("succeed", [0, 1])
def test_group_that_finds_no_memory_says_so_and_holds_none(succeed: int) -> None:
    batch = DECODER.of_values([a_word(FIRST_ID)] * 3)
    held_before = _wire._blocks_held()
    _wire._fail_allocation_after(succeed)
    with pytest.raises(MemoryError):
        Group(Index(), [(batch, 0, 3)])
    assert _wire._blocks_held() == held_before


def test_group_that_is_let_go_gives_its_memory_back_and_its_batches_live_as_long() -> None:
    held_before = _wire._blocks_held()
    words = [a_word(FIRST_ID), a_word(FIRST_ID + 1)]
    index = an_index(words)
    group = Group(index, [(DECODER.of_values(words), 0, 2)])
    assert _wire._blocks_held() == held_before + 3, "the batch's records, the slices, the picks"
    index.begin()
    assert group.accept() == 2
    assert group.values(0, 1)[2] == "T1", "the batch is kept although nobody else holds it"
    index.rollback()
    del group
    assert _wire._blocks_held() == held_before
