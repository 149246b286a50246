"""What every store must do: one suite over ``store.protocol``, run for each database that paycore speaks."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from paycore.domain.ids import SLICES
from paycore.domain.verdicts import AttemptState, CaptureSource, CloseReason, NotifyOutcome, PaymentState, RefundState
from paycore.store import engine, postgresql_server, records, tables
from paycore.store import evidence as evidence_store
from paycore.store.engine import parse_database_url
from paycore.store.outcomes import PlainOutcomes
from paycore.store.protocol import (
    FailureNote,
    RowRefusedError,
    Store,
    StoreBusyError,
    WriteTransaction,
)
from paycore.store.rows import (
    MAX_QUARANTINE_IN_FILE,
    ChannelOrderRow,
    ExcessRow,
    OutcomeRow,
    PaymentRecord,
    PaymentRow,
    QuarantineRow,
    RefundResultRow,
    RefundRow,
    RefundTryRow,
    Stamp,
)
from paycore.store.schema import open_store
from tests.support.core import fresh_database
from tests.support.postgres import VERSIONS, empty_tables, fresh_postgres


@functools.cache
def _database(version: str) -> str:
    return fresh_postgres(version)


def _postgresql(version: str, _folder: Path) -> str:
    url = _database(version)
    empty_tables(url)
    return url


URLS: dict[str, Callable[[Path], str]] = {
    "sqlite": lambda folder: f"sqlite:///{fresh_database(folder / 'paycore.db')}",
    **{f"postgresql{version}": functools.partial(_postgresql, version) for version in VERSIONS},
}
"""Name -> the URL of a migrated, empty database. Another kind joins the suite here."""

HUGE = 2**63 - 1


@pytest.fixture(params=URLS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return URLS[request.param](tmp_path)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    store = open_store(url)
    yield store
    store.dispose()


class Writing:
    """Writes with growing stamps of one writer."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.writer_no = store.open_writer(1_000)
        self._group_no = 0

    def stamp(self) -> Stamp:
        self._group_no += 1
        return Stamp(10_000 + self._group_no, self.writer_no, self._group_no)

    def __call__(self, *writes: Callable[[WriteTransaction], Any]) -> list[Any]:
        """Run writes in one transaction; return what each returned."""
        with self._store.write(self.stamp()) as transaction:
            return [write(transaction) for write in writes]


@pytest.fixture
def write(store: Store) -> Writing:
    return Writing(store)


# Rows

STAMP = Stamp(10_000, 1, 1)


def payment(payment_id: int = 1, **changes: Any) -> PaymentRow:
    row = PaymentRow(payment_id, "shop", f"n{payment_id}", 500, "CNY", "Tea", "", "digest", 20_000, *STAMP)
    return row._replace(**changes)


def attempt(payment_id: int = 1, number: int = 1, **changes: Any) -> ChannelOrderRow:
    row = ChannelOrderRow(
        payment_id,
        number,
        "simbank",
        "bank_a",
        1,
        20_000,
        AttemptState.OPEN,
        10_000,
        "",
        "",
        "",
        None,
        None,
        0,
        "",
        *STAMP,
    )
    return row._replace(**changes)


def paid(payment_id: int = 1, **changes: Any) -> OutcomeRow:
    row = OutcomeRow(payment_id, PaymentState.PAID, 1, "T1", 500, "CNY", 10_000, 10_000, 1, 0, 0, *STAMP)
    return row._replace(**changes)


def closed(payment_id: int = 1) -> OutcomeRow:
    return OutcomeRow(payment_id, PaymentState.CLOSED, 0, "", 0, "", None, 1, 0, 0, CloseReason.MERCHANT, *STAMP)


def excess(payment_id: int = 1, number: int = 2, trade_no: str = "T2", **changes: Any) -> ExcessRow:
    row = ExcessRow(payment_id, number, trade_no, NotifyOutcome.DUPLICATE, 500, "CNY", None, 10_000, 1, *STAMP)
    return row._replace(**changes)


def refund(payment_id: int = 1, number: int = 2, trade_no: str = "T2", **changes: Any) -> RefundRow:
    row = RefundRow(payment_id, f"X{number:02d}", number, trade_no, 500, "CNY", NotifyOutcome.DUPLICATE, *STAMP)
    return row._replace(**changes)


def a_try(payment_id: int = 1, number: int = 2, seq: int = 1, **changes: Any) -> RefundTryRow:
    refund_no = f"X{number:02d}"
    row = RefundTryRow(
        payment_id,
        refund_no,
        seq,
        f"{payment_id}{refund_no}{seq:02d}",
        0,
        RefundState.PENDING,
        1,
        0,
        1,
        0,
        "",
        "",
        *STAMP,
    )
    return row._replace(**changes)


def evidence(quarantine_id: str = "q", **changes: Any) -> QuarantineRow:
    row = QuarantineRow(
        quarantine_id,
        NotifyOutcome.UNKNOWN,
        None,
        None,
        1,
        "simbank",
        "bank_a",
        "number",
        "T1",
        500,
        "CNY",
        None,
        CaptureSource.NOTIFICATION,
        b"raw",
        "{}",
        10_000,
        10_000,
        1,
        1,
        "[]",
        *STAMP,
    )
    return row._replace(**changes)


def make(*rows: Any) -> Callable[[WriteTransaction], None]:
    """Insert payments and attempts."""

    def apply(transaction: WriteTransaction) -> None:
        for row in rows:
            if isinstance(row, PaymentRow):
                assert transaction.insert_payment(row)
                assert transaction.insert_merchant_order(row.merchant_id, row.merchant_order_no, row.payment_id)
            else:
                transaction.insert_channel_order(row)

    return apply


def owe(row: RefundRow, first_try: RefundTryRow) -> Callable[[WriteTransaction], None]:
    """Insert a refund with its first try."""
    return lambda transaction: transaction.insert_refunds([row], [first_try])


def outcomes(*rows: OutcomeRow) -> Callable[[WriteTransaction], set[int]]:
    """Insert outcomes under the transaction's own stamp, as the writer does."""
    return lambda transaction: transaction.insert_outcomes(
        [row._replace(**transaction.stamp._asdict()) for row in rows]
    )


# Transactions


def test_writer_numbers_are_fresh_each_time(store: Store) -> None:
    numbers = [store.open_writer(1) for _ in range(3)]
    assert numbers == sorted(set(numbers))


def test_transaction_is_seen_by_readers_once_it_has_ended(store: Store, write: Writing) -> None:
    with store.write(write.stamp()) as transaction:
        make(payment(), attempt())(transaction)
        assert store.load_record(1) is None
        assert store.find_payment_id("shop", "n1") is None
        assert transaction.find_payment_id("shop", "n1") == 1
        assert transaction.load_records([1])[1].payment == payment()
    record = store.load_record(1)
    assert record is not None
    assert (record.payment, record.attempts) == (payment(), {1: attempt()})


def test_transaction_left_by_an_exception_leaves_nothing(store: Store, write: Writing) -> None:
    with pytest.raises(ZeroDivisionError):
        write(make(payment()), lambda _: 1 // 0)
    assert store.load_record(1) is None
    write(make(payment()))
    assert store.load_record(1) is not None


def test_savepoint_left_by_an_exception_undoes_its_own_writes_alone(store: Store, write: Writing) -> None:
    with store.write(write.stamp()) as transaction:
        make(payment(1))(transaction)
        with suppress(ZeroDivisionError), transaction.savepoint():
            make(payment(2))(transaction)
            raise ZeroDivisionError
        with transaction.savepoint():
            make(payment(3))(transaction)
    assert [store.load_record(number) is not None for number in (1, 2, 3)] == [True, False, True]


def test_touch_writer_notes_the_time(write: Writing, url: str) -> None:
    write(lambda transaction: transaction.touch_writer())
    reading = parse_database_url(url).engine(writes=False)
    with reading.connect() as connection:
        table = tables.writer
        rows = connection.execute(select(table).where(table.c.writer_no == write.writer_no)).all()
    reading.dispose()
    assert [tuple(row) for row in rows] == [(write.writer_no, 1_000, 10_001)]


# Payments and attempts


def test_taken_payment_id_and_merchant_order_are_told(store: Store, write: Writing) -> None:
    write(make(payment()))
    assert write(
        lambda transaction: transaction.insert_payment(payment(subject="Other")),
        lambda transaction: transaction.insert_merchant_order("shop", "n1", 9),
        lambda transaction: transaction.insert_merchant_order("other", "n1", 9),
    ) == [False, False, True]
    record = store.load_record(1)
    assert record is not None
    assert record.payment.subject == "Tea"
    assert (store.find_payment_id("shop", "n1"), store.find_payment_id("shop", "n2")) == (1, None)


def test_second_insert_of_an_attempt_is_refused(write: Writing) -> None:
    write(make(payment(), attempt()))
    with pytest.raises(RowRefusedError):
        write(make(attempt(account="bank_b")))


@pytest.mark.parametrize(
    "row",
    [payment(amount_minor=0), payment(0), attempt(number=64), attempt(state=9)],
    ids=["amount", "id", "attempt", "state"],
)
def test_row_that_breaks_a_rule_is_refused(store: Store, write: Writing, row: Any) -> None:
    with pytest.raises(RowRefusedError):
        write(make(payment(7)), make(row))
    assert store.load_record(7) is None


def test_records_of_many_payments_are_read_at_once_and_the_absent_are_left_out(store: Store, write: Writing) -> None:
    write(*(make(payment(number), attempt(number), attempt(number, 2)) for number in range(1, 522)))
    with store.write(write.stamp()) as transaction:
        records = transaction.load_records([*range(1, 1_100), 5, 5])
    assert sorted(records) == list(range(1, 522))
    assert {tuple(record.attempts) for record in records.values()} == {(1, 2)}


def test_largest_numbers_come_back_as_they_were(store: Store, write: Writing) -> None:
    row = payment(HUGE, amount_minor=HUGE, expire_at_ms=HUGE)
    write(make(row, attempt(HUGE, 63)))
    write(outcomes(paid(HUGE, amount_minor=HUGE, attempt=63)))
    record = store.load_record(HUGE)
    assert record is not None
    assert record.outcome is not None
    assert (record.payment, record.outcome.amount_minor, list(record.attempts)) == (row, HUGE, [63])


def test_conversation_is_written_only_where_the_state_is_expected(store: Store, write: Writing) -> None:
    write(make(payment(), attempt()))
    moved = attempt(state=AttemptState.CLOSED, credential="page", failed_at_ms=7, superseded_at_ms=8, lease_token="t")
    assert write(
        lambda transaction: transaction.update_channel_order(moved, expected=(AttemptState.CREATING,)),
        lambda transaction: transaction.update_channel_order(moved, expected=(AttemptState.OPEN, AttemptState.UNKNOWN)),
        lambda transaction: transaction.update_channel_order(attempt(), expected=(AttemptState.OPEN,)),
    ) == [False, True, False]
    record = store.load_record(1)
    assert record is not None
    assert record.attempts[1] == moved


def test_conversation_never_changes_what_was_asked_of_the_channel(store: Store, write: Writing) -> None:
    write(make(payment(), attempt()))
    other = attempt(channel="other", account="bank_b", method=3, expire_at_ms=1, recorded_at_ms=1)
    write(lambda transaction: transaction.update_channel_order(other, expected=(AttemptState.OPEN,)))
    record = store.load_record(1)
    assert record is not None
    assert record.attempts[1] == attempt()


def test_only_older_attempts_that_may_still_be_paid_are_superseded(store: Store, write: Writing) -> None:
    states = [AttemptState.OPEN, AttemptState.FAILED, AttemptState.UNKNOWN, AttemptState.CLOSED, AttemptState.CREATING]
    write(make(payment(1), payment(2), attempt(2)))
    write(make(*(attempt(1, number, state=state) for number, state in enumerate(states, start=1)), attempt(1, 6)))
    write(lambda transaction: transaction.supersede_attempts(1, 6, 77))
    write(lambda transaction: transaction.supersede_attempts(1, 6, 99))
    with store.write(write.stamp()) as transaction:
        records = transaction.load_records([1, 2])
    assert [row.superseded_at_ms for row in records[1].attempts.values()] == [77, None, 77, None, 77, None]
    assert records[2].attempts[1].superseded_at_ms is None


@pytest.mark.parametrize(
    ("state", "ends", "after"),
    [
        (AttemptState.OPEN, True, AttemptState.FAILED),
        (AttemptState.CREATING, True, AttemptState.FAILED),
        (AttemptState.UNKNOWN, True, AttemptState.FAILED),
        (AttemptState.CLOSED, True, AttemptState.CLOSED),
        (AttemptState.OPEN, False, AttemptState.OPEN),
    ],
)
def test_first_failure_is_noted_and_kept(
    store: Store, write: Writing, state: AttemptState, ends: bool, after: AttemptState
) -> None:
    write(make(payment(), attempt(state=state), attempt(1, 2)))
    write(lambda transaction: transaction.note_failures([FailureNote(1, 1, "C1", "first", 50, ends)]))
    write(lambda transaction: transaction.note_failures([FailureNote(1, 1, "C2", "second", 60, True)]))
    record = store.load_record(1)
    assert record is not None
    row = record.attempts[1]
    assert (row.state, row.failure_code, row.failure_message, row.failed_at_ms) == (after, "C1", "first", 50)
    assert record.attempts[2] == attempt(1, 2)


# Outcomes


def test_outcome_that_is_first_wins_for_ever(store: Store, write: Writing) -> None:
    write(make(payment()))
    assert write(outcomes(paid())) == [set()]
    for later in (closed(), paid(attempt=2, channel_trade_no="T2"), paid()):
        assert write(outcomes(later)) == [{1}]
    record = store.load_record(1)
    assert record is not None
    assert record.outcome is not None
    assert (record.outcome.state, record.outcome.attempt, record.outcome.channel_trade_no) == (2, 1, "T1")


def test_outcomes_that_lost_are_told_apart_from_those_that_won(write: Writing) -> None:
    write(outcomes(*(paid(number) for number in (2, 4, 6))))
    assert write(outcomes(*(paid(number) for number in range(1, 8)))) == [{2, 4, 6}]
    assert write(outcomes(*(paid(number) for number in range(1, 8)))) == [{1, 2, 3, 4, 5, 6, 7}]


def test_outcome_lost_to_an_earlier_insert_of_another_writer_with_the_same_group_number_is_told(store: Store) -> None:
    first, second = Writing(store), Writing(store)
    assert first(outcomes(paid())) == [set()]
    assert second(outcomes(paid(), paid(2))) == [{1}]


def test_outcomes_of_a_large_group_are_told_apart(write: Writing) -> None:
    write(outcomes(*(paid(number) for number in range(1, 4_001, 3))))
    (lost,) = write(outcomes(*(paid(number) for number in range(1, 4_001))))
    assert lost == set(range(1, 4_001, 3))


def test_first_outcome_of_a_payment_with_excess_is_told_and_not_written(store: Store, write: Writing) -> None:
    """The accepted path writes without having read: a capture on record must send it to the rows."""
    write(make(payment(1), payment(2), payment(3)), lambda transaction: transaction.insert_excess([excess(2)]))
    write(outcomes(closed(3)))

    def first(transaction: WriteTransaction) -> set[int]:
        rows = [paid(n)._replace(**transaction.stamp._asdict()) for n in (1, 2, 3)]
        return transaction.insert_first_outcomes(PlainOutcomes(rows))

    assert write(first) == [{2, 3}]
    records = [store.load_record(number) for number in (1, 2, 3)]
    assert [record.state.name for record in records if record is not None] == ["PAID", "OPEN", "CLOSED"]
    assert write(first) == [{1, 2, 3}]
    assert write(outcomes(paid(2))) == [set()]


def test_outcome_that_is_rolled_back_can_be_inserted_again(write: Writing) -> None:
    with pytest.raises(ZeroDivisionError):
        write(outcomes(paid()), lambda _: 1 // 0)
    assert write(outcomes(closed())) == [set()]


# Excess and refunds


def test_excess_that_exists_must_be_decided_again(store: Store, write: Writing) -> None:
    write(make(payment()), lambda transaction: transaction.insert_excess([excess()]))
    with pytest.raises(StoreBusyError):
        write(lambda transaction: transaction.insert_excess([excess(trade_no="T3"), excess(reason=NotifyOutcome.LATE)]))
    record = store.load_record(1)
    assert record is not None
    assert record.excess == [excess()]


def test_refund_that_exists_is_left_alone(store: Store, write: Writing) -> None:
    write(make(payment()), lambda transaction: transaction.insert_refunds([refund()], [a_try()]))
    sent = a_try(state=RefundState.REFUNDED)
    write(lambda transaction: transaction.update_refund_try(sent, lease_token=""))
    write(
        lambda transaction: transaction.insert_refunds(
            [refund(amount_minor=1), refund(number=3)], [a_try(), a_try(number=3)]
        )
    )
    file = store.load_file(1)
    assert file is not None
    assert file.refunds == [refund(), refund(number=3)]
    assert file.refund_tries == [sent, a_try(number=3)]


@pytest.fixture
def refunding(write: Writing) -> Writing:
    """Payments 1 to 3 with an attempt 2 whose refund is due at 1, 2 and 3."""
    for number in (1, 2, 3):
        due = a_try(number, next_at_ms=number)
        write(
            make(payment(number), attempt(number, 2, account="bank_b")),
            owe(refund(number), due),
        )
    return write


def claim(write: Writing, now_ms: int, lease_until_ms: int, token: str, limit: int = 10) -> list[Any]:
    (claimed,) = write(
        lambda transaction: transaction.claim_refunds(range(SLICES), now_ms, lease_until_ms, token, limit)
    )
    result: list[Any] = claimed
    return result


def test_due_refunds_are_told_to_readers_while_nobody_leases_them(store: Store, refunding: Writing) -> None:
    assert [bool(store.due_refund_slices(now_ms)) for now_ms in (0, 1, 9)] == [False, True, True]
    claim(refunding, 3, 50, "mine")
    assert [bool(store.due_refund_slices(now_ms)) for now_ms in (49, 50)] == [False, True]


def test_due_refunds_are_leased_to_one_at_a_time(refunding: Writing) -> None:
    claimed = claim(refunding, 2, 50, "mine")
    assert [due.refund.payment_id for due in claimed] == [1, 2]
    assert [(due.last_try.lease_until_ms, due.last_try.lease_token) for due in claimed] == [(50, "mine")] * 2
    assert {due.attempt.account for due in claimed} == {"bank_b"}
    assert [due.refund.payment_id for due in claim(refunding, 3, 60, "theirs")] == [3]
    assert claim(refunding, 49, 99, "nobody's") == []
    assert [due.refund.payment_id for due in claim(refunding, 50, 99, "after the lease")] == [1, 2]


def test_due_refunds_are_claimed_longest_due_first_and_up_to_the_limit(refunding: Writing) -> None:
    assert [due.refund.payment_id for due in claim(refunding, 9, 50, "t", limit=2)] == [1, 2]


@pytest.mark.parametrize("state", [RefundState.REFUNDED, RefundState.REFUSED])
def test_finished_tries_are_never_due(refunding: Writing, state: RefundState) -> None:
    refunding(lambda transaction: transaction.update_refund_try(a_try(1, state=state), lease_token=""))
    assert [due.refund.payment_id for due in claim(refunding, 9, 50, "t")] == [2, 3]


def test_progress_is_written_only_by_who_holds_the_lease(store: Store, refunding: Writing) -> None:
    (due,) = claim(refunding, 1, 50, "mine", limit=1)
    moved = due.last_try._replace(
        state=RefundState.UNKNOWN, asks=1, last_error="no answer", lease_token="", next_at_ms=9
    )
    assert refunding(
        lambda transaction: transaction.update_refund_try(moved, lease_token="theirs"),
        lambda transaction: transaction.update_refund_try(moved, lease_token="mine"),
        lambda transaction: transaction.update_refund_try(moved, lease_token="mine"),
    ) == [False, True, False]
    file = store.load_file(1)
    assert file is not None
    assert file.refund_tries == [moved]


def test_next_try_and_final_word_are_inserted_once(store: Store, refunding: Writing) -> None:
    result = RefundResultRow(1, "X02", 1, RefundState.REFUSED, "C", "no", *STAMP)
    assert refunding(
        lambda transaction: transaction.insert_refund_result(result),
        lambda transaction: transaction.insert_refund_result(result._replace(result=RefundState.REFUNDED)),
        lambda transaction: transaction.insert_refund_try(a_try(1, seq=2)),
        lambda transaction: transaction.insert_refund_try(a_try(1, seq=2, state=RefundState.UNKNOWN)),
    ) == [True, False, True, False]
    file = store.load_file(1)
    assert file is not None
    assert file.refund_results == [result]
    assert [(row.seq, row.state) for row in file.refund_tries] == [(1, RefundState.PENDING), (2, RefundState.PENDING)]


# Quarantine, files and what waits


def test_evidence_that_comes_again_is_counted_and_opened(store: Store, write: Writing) -> None:
    write(make(payment()), lambda transaction: transaction.put_quarantine([evidence(payment_id=1), evidence("other")]))
    again = evidence(payment_id=1, raw=b"another", first_seen_at_ms=30_000, last_seen_at_ms=30_000, arrivals=2)
    write(lambda transaction: transaction.put_quarantine([again]))
    file = store.load_file(1)
    assert file is not None
    assert file.quarantine == [evidence(payment_id=1, last_seen_at_ms=30_000, arrivals=3)]
    backlog = store.backlog()
    assert (backlog.quarantine_open, backlog.oldest_quarantine_at_ms) == (2, evidence().first_seen_at_ms)


def test_evidence_judged_again_does_not_take_back_when_it_was_seen_last(store: Store, write: Writing) -> None:
    write(lambda transaction: transaction.put_quarantine([evidence(last_seen_at_ms=30_000)]))
    write(lambda transaction: transaction.put_quarantine([evidence(last_seen_at_ms=20_000)]))
    (row,) = store.read(lambda connection: evidence_store.by_ids(connection, [evidence().quarantine_id]))
    assert (row.last_seen_at_ms, row.arrivals) == (30_000, 2)


def test_evidence_that_was_resolved_opens_again_by_a_word_that_may_have_been_counted(
    store: Store, write: Writing
) -> None:
    """Also where another server, whose clock is ahead, has seen it last."""

    def again(row: QuarantineRow) -> None:
        write(lambda transaction: transaction.put_quarantine([row], maybe_counted=True))

    def read() -> QuarantineRow:
        (row,) = store.read(lambda connection: evidence_store.by_ids(connection, [evidence().quarantine_id]))
        return row

    write(lambda transaction: transaction.put_quarantine([evidence(last_seen_at_ms=30_000, is_open=0)]))
    again(evidence(last_seen_at_ms=29_000))
    assert (read().is_open, read().last_seen_at_ms, read().arrivals) == (1, 30_000, 2)
    again(evidence(last_seen_at_ms=29_000))
    assert read().arrivals == 2


def test_evidence_is_resolved_only_as_it_was_read(store: Store, write: Writing) -> None:
    read = evidence()
    write(lambda transaction: transaction.put_quarantine([read]))
    moved = [
        read._replace(arrivals=2),
        read._replace(last_seen_at_ms=read.last_seen_at_ms + 1),
        read._replace(is_open=0),
        read._replace(resolutions='["another"]'),
    ]

    def resolve(row: QuarantineRow) -> bool:
        (closed,) = write(
            lambda transaction: transaction.run(lambda connection: evidence_store.resolve(connection, row, '["mine"]'))
        )
        return bool(closed)

    assert not any(resolve(row) for row in moved)
    assert resolve(read)
    assert not resolve(read)
    write(lambda transaction: transaction.put_quarantine([read._replace(last_seen_at_ms=40_000)]))
    (row,) = store.read(lambda connection: evidence_store.by_ids(connection, [read.quarantine_id]))
    assert (row.is_open, row.resolutions, row.arrivals) == (1, '["mine"]', 2)


def test_evidence_is_read_page_by_page_by_age_and_by_the_beginning_of_its_id(store: Store, write: Writing) -> None:
    rows = [
        evidence(f"{number:064x}", first_seen_at_ms=at_ms, is_open=is_open)
        for number, at_ms, is_open in ((1, 10, 1), (2, 10, 1), (3, 10, 1), (4, 20, 0), (5, 20, 1), (6, 30, 1))
    ]
    write(lambda transaction: transaction.put_quarantine(rows))

    def between(place: tuple[int, str], until_ms: int, limit: int) -> list[int]:
        after = evidence_store.Place(*place)
        found = store.read(lambda connection: evidence_store.open_between(connection, after, until_ms, limit))
        return [int(one.place.quarantine_id, 16) for one in found]

    assert between((0, ""), 20, 2) == [1, 2]
    assert between((10, rows[1].quarantine_id), 20, 9) == [3, 5]
    assert between((10, ""), 10, 9) == [1, 2, 3]
    assert between((20, "~"), 20, 9) == []
    every = evidence_store.Place(0, "")
    paged = store.read(lambda connection: evidence_store.page(connection, after=every, limit=9, only_open=False))
    assert [row.quarantine_id for row in paged] == [row.quarantine_id for row in rows]
    found = store.read(lambda connection: evidence_store.by_prefix(connection, "0" * 63))
    assert [row.quarantine_id for row in found] == [rows[0].quarantine_id, rows[1].quarantine_id]
    assert store.read(lambda connection: evidence_store.by_prefix(connection, f"{6:064x}")) == [rows[5]]


def test_marks_of_the_examination_are_written_over(store: Store, write: Writing) -> None:
    first = evidence_store.Mark(0, evidence_store.Place(5, "a"), 0)
    moved = first._replace(place=evidence_store.Place(7, "b"))
    other = evidence_store.Mark(7, evidence_store.Place(1, ""), 9)

    def put(*marks: evidence_store.Mark) -> None:
        write(lambda transaction: transaction.run(lambda connection: evidence_store.put_marks(connection, marks)))

    put(first)
    put(moved, other)
    assert store.read(evidence_store.marks) == {0: moved, 7: other}


def test_evidence_is_kept_byte_for_byte(store: Store, write: Writing) -> None:
    row = evidence(
        payment_id=1, raw=bytes(range(256)), headers='{"名": "值"}', channel_order_no="１０１", currency="x" * 16
    )
    write(make(payment()), lambda transaction: transaction.put_quarantine([row]))
    file = store.load_file(1)
    assert file is not None
    assert file.quarantine == [row]


def test_file_holds_the_evidence_seen_first_and_counts_the_rest(store: Store, write: Writing) -> None:
    count = MAX_QUARANTINE_IN_FILE + 7
    words = [
        evidence(f"{count - at:04d}", payment_id=1, first_seen_at_ms=at, last_seen_at_ms=at) for at in range(count)
    ]
    write(make(payment()), lambda transaction: transaction.put_quarantine(words))
    file = store.load_file(1)
    assert file is not None
    assert file.quarantine == words[:MAX_QUARANTINE_IN_FILE]
    assert file.quarantine_total == count


def test_file_of_an_absent_payment_is_none(store: Store) -> None:
    assert store.load_file(1) is None
    assert store.load_record(1) is None


def test_backlog_is_empty_then_tells_the_oldest_unfinished_refund(store: Store, write: Writing) -> None:
    assert store.backlog() == (0, None, 0, None)
    for number, at_ms in ((1, 300), (2, 200), (3, 100)):
        row = refund(number, recorded_at_ms=at_ms)
        write(owe(row, a_try(row.payment_id)))
    assert store.backlog() == (0, 100, 0, None)
    done = a_try(3, state=RefundState.REFUNDED)
    write(lambda transaction: transaction.update_refund_try(done, lease_token=""))
    assert store.backlog() == (0, 200, 0, None)
    told = a_try(2, state=RefundState.NEEDS_ATTENTION)
    write(lambda transaction: transaction.update_refund_try(told, lease_token=""))
    assert store.backlog() == (0, 200, 1, None)


# Two writers at once


@pytest.fixture
def other_store(url: str) -> Iterator[Store]:
    """A second process's store on the same database."""
    store = open_store(url)
    yield store
    store.dispose()


@pytest.fixture
def other(other_store: Store) -> Writing:
    return Writing(other_store)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BUSY_TIMEOUT_MS", 150)
    monkeypatch.setattr(postgresql_server, "LOCK_TIMEOUT_MS", 150)


class Meanwhile:
    """What another writer does in a thread while this one stands in its transaction."""

    def __init__(self, writing: Writing, *writes: Callable[[WriteTransaction], Any]) -> None:
        self._outcome: Any = None
        self._writing, self._writes = writing, writes
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            (self._outcome,) = self._writing(*self._writes)
        except StoreBusyError:
            self._outcome = "busy"

    def outcome(self) -> Any:
        """What its one write returned; "busy" where it waited too long or must be decided again."""
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self._outcome

    def is_waiting(self) -> bool:
        self._thread.join(0.05)
        return self._thread.is_alive()


def locking(transaction: WriteTransaction) -> dict[int, PaymentRecord]:
    return transaction.lock_records([1, 2])


def first_outcomes(*payment_ids: int) -> Callable[[WriteTransaction], set[int]]:
    def insert(transaction: WriteTransaction) -> set[int]:
        rows = [paid(number)._replace(**transaction.stamp._asdict()) for number in payment_ids]
        return transaction.insert_first_outcomes(PlainOutcomes(rows))

    return insert


def test_locked_payment_is_read_as_its_holder_left_it(store: Store, write: Writing, other: Writing) -> None:
    write(make(payment(1), payment(2)))
    with store.write(write.stamp()) as transaction:
        locking(transaction)
        make(attempt(1))(transaction)
        meanwhile = Meanwhile(other, locking)
        assert meanwhile.is_waiting()
    records = meanwhile.outcome()
    assert list(records[1].attempts) == [1]


def test_locked_payment_that_is_not_let_go_is_busy(store: Store, write: Writing, other: Writing) -> None:
    write(make(payment(1), payment(2)))
    with store.write(write.stamp()) as transaction:
        locking(transaction)
        assert Meanwhile(other, locking).outcome() == "busy"


def test_lock_of_payments_gives_the_present_and_leaves_the_absent_out(write: Writing) -> None:
    write(make(payment(2)))
    (records,) = write(lambda transaction: transaction.lock_records([3, 2, 2, 1]))
    assert list(records) == [2]
    assert write(lambda transaction: transaction.lock_records([])) == [{}]


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("insert", [first_outcomes(1, 2), outcomes(paid(1), paid(2))], ids=["first", "rows"])
def test_outcome_that_another_writer_is_inserting_is_waited_for(
    store: Store, write: Writing, other: Writing, commits: bool, insert: Callable[[WriteTransaction], set[int]]
) -> None:
    with suppress(ZeroDivisionError), store.write(write.stamp()) as transaction:
        assert first_outcomes(2)(transaction) == set()
        meanwhile = Meanwhile(other, insert)
        assert meanwhile.is_waiting()
        if not commits:
            raise ZeroDivisionError
    assert meanwhile.outcome() == ({2} if commits else set())


def test_payment_held_open_gets_no_first_outcome_that_has_not_seen_its_excess(
    store: Store, write: Writing, other: Writing
) -> None:
    write(make(payment(1), payment(2)))
    with store.write(write.stamp()) as transaction:
        locking(transaction)
        assert transaction.hold_open([1]) == set()
        transaction.insert_excess([excess(1)])
        meanwhile = Meanwhile(other, first_outcomes(1, 2))
        assert meanwhile.is_waiting()
    # Decided again where it had looked before it waited; told at once where it had waited before it looked.
    assert meanwhile.outcome() in ("busy", {1})
    assert other(first_outcomes(1, 2)) in ([{1}], [{1, 2}])
    record = store.load_record(1)
    assert record is not None
    assert record.outcome is None


def test_payment_that_has_an_outcome_cannot_be_held_open(store: Store, write: Writing, other: Writing) -> None:
    write(make(payment(1), payment(2)))
    with store.write(write.stamp()) as transaction:
        first_outcomes(1)(transaction)
        meanwhile = Meanwhile(other, lambda held: (locking(held), held.hold_open([1, 2]))[1])
        assert meanwhile.is_waiting()
    # SQLite's waits before it reads, and so is told by its records.
    assert meanwhile.outcome() in ({1}, set())
    records = [store.load_record(number) for number in (1, 2)]
    assert [record.outcome is not None for record in records if record is not None] == [True, False]


def test_holding_open_leaves_nothing_behind(store: Store, write: Writing) -> None:
    write(make(payment(1), payment(2)), lambda transaction: transaction.hold_open([1, 2]))
    assert write(first_outcomes(1, 2)) == [set()]
    record = store.load_record(1)
    assert record is not None
    assert record.state.name == "PAID"


def test_refund_claimed_by_two_writers_at_once_is_leased_to_one(
    store: Store, refunding: Writing, other: Writing
) -> None:
    with store.write(refunding.stamp()) as transaction:
        assert len(transaction.claim_refunds([0], 2, 50, "mine", 10)) == 2
        meanwhile = Meanwhile(other, lambda claiming: claiming.claim_refunds([0], 3, 60, "theirs", 10))
        assert meanwhile.is_waiting()
    assert [due.refund.payment_id for due in meanwhile.outcome()] == [3]
    file = store.load_file(1)
    assert file is not None
    assert [row.lease_token for row in file.refund_tries] == ["mine"]


def test_first_outcomes_keep_every_value_of_a_row(store: Store, write: Writing) -> None:
    """Columns travel as binary arrays or as values: what comes back must be what went in, absent times included."""
    write(make(*(payment(number) for number in (3, 5, HUGE))))
    rows = [
        paid(HUGE, amount_minor=HUGE, attempt=63, channel_trade_no="汇" * 64, paid_at_ms=HUGE, received_at_ms=HUGE),
        paid(3, paid_at_ms=None, paid_at_untrusted=1, channel_trade_no="", currency="JPY"),
        paid(5, paid_at_ms=-1),
    ]

    def insert(transaction: WriteTransaction) -> list[OutcomeRow]:
        stamped = [row._replace(**transaction.stamp._asdict()) for row in rows]
        assert transaction.insert_first_outcomes(PlainOutcomes(stamped)) == set()
        return stamped

    (stamped,) = write(insert)
    for row in stamped:
        record = store.load_record(row.payment_id)
        assert record is not None
        assert record.outcome == row


def test_text_that_the_database_cannot_hold_is_refused_for_itself(store: Store, write: Writing) -> None:
    """SQLite keeps a NUL, PostgreSQL does not: either way nothing is lost in silence."""
    write(make(payment()))
    row = paid(1, channel_trade_no="T\0")
    for insert in (outcomes(row), lambda transaction: transaction.insert_first_outcomes(PlainOutcomes([row]))):
        with suppress(RowRefusedError):
            write(insert)
            record = store.load_record(1)
            assert record is not None
            assert record.outcome is not None
    assert write(outcomes(paid(2))) == [set()]


def test_payment_that_another_commits_while_a_transaction_reads_it_is_not_there_yet(
    write: Writing, other: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each statement sees what was committed when it began, its rows turn up one after another."""
    read_rows = records._rows
    rivals: list[Meanwhile] = []

    def overtaken(connection: Any, table: Any, ids: Any) -> Any:
        found = read_rows(connection, table, ids)
        if not rivals:
            rivals.append(Meanwhile(other, make(payment(), attempt())))
            # On SQLite it waits for this transaction, which holds the whole database.
            rivals[0].is_waiting()
        return found

    monkeypatch.setattr(records, "_rows", overtaken)
    assert write(lambda transaction: transaction.load_records([1])) == [{}]
    assert rivals[0].outcome() in (None, "busy")
