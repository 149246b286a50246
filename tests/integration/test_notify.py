"""The decision end to end: notifications through the writer on each database, and every row that they leave behind."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
from sqlalchemy import update

from paycore.domain.decision import ABSENT_MS, PAID_AT_AHEAD_LIMIT_MS
from paycore.domain.errors import InvalidArgumentError
from paycore.domain.ids import created_at_ms, excess_refund_no, format_channel_order_no
from paycore.domain.notification import Notification
from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome, PaymentState, RefundState
from paycore.store import tables
from paycore.usecases.close import InsertClosed
from paycore.usecases.notify import MAX_HEADERS_BYTES, MAX_RAW_BYTES
from tests.support.clock import ManualClock
from tests.support.core import AMOUNT_MINOR, VALIDITY_MS, Core, Written, change, check_money_rules

ACCEPTED, DUPLICATE, LATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.LATE
SECOND_CAPTURE, MISMATCH = NotifyOutcome.SECOND_CAPTURE, NotifyOutcome.MISMATCH
CONFLICT, UNKNOWN, RECORDED = NotifyOutcome.CONFLICT, NotifyOutcome.UNKNOWN, NotifyOutcome.RECORDED

TEN_YEARS_MS = 10 * 365 * 86_400_000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["warm", "cold"])
def core(request: pytest.FixtureRequest, db_url: str, clock: ManualClock) -> Iterator[Core]:
    """Every test runs twice: with an index that knows the payments, and with one that forgets before each word."""
    with Core(db_url, clock=clock) as core:
        if request.param == "cold":
            told = core.notify

            async def notify_cold(notification: Notification) -> Any:
                core.forget()
                return await told(notification)

            core.notify = notify_cold  # type: ignore[method-assign]  # each word meets an empty index
        yield core


async def hear(core: Core, word: Notification) -> tuple[NotifyOutcome, bool, Written]:
    with core.watch() as written:
        verdict = await core.notify(word)
    return verdict.outcome, verdict.replayed, written


def assert_refunded(written: Written, payment_id: int, attempt: int, trade_no: str, amount: int = AMOUNT_MINOR) -> None:
    """The one new refund is of that capture, under its derived number, with one try that waits."""
    refund, first_try = written.row("refund"), written.row("refund_try")
    number = excess_refund_no(attempt, trade_no)
    assert (refund.payment_id, refund.refund_no, refund.attempt) == (payment_id, number, attempt)
    assert (refund.channel_trade_no, refund.amount_minor, refund.currency) == (trade_no, amount, "CNY")
    assert (first_try.refund_no, first_try.seq, first_try.state) == (number, 1, RefundState.PENDING)
    assert first_try.channel_refund_no == f"{payment_id}{number}01"


async def close(core: Core, payment_id: int) -> None:
    await core.writer.run(InsertClosed(payment_id, CloseReason.MERCHANT, core.registry.code))


# The table of the decision


async def test_first_success_in_time_is_accepted_and_writes_the_outcome_alone(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    clock.advance(5)
    outcome, replayed, written = await hear(core, core.word(payment_id, 2, paid_at_ms=clock.now_ms() - 3))
    assert (outcome, replayed) == (ACCEPTED, False)
    assert written.names() == {"payment_outcome"}
    row = written.row("payment_outcome")
    assert (row.payment_id, row.state, row.attempt, row.channel_trade_no) == (payment_id, PaymentState.PAID, 2, "T1")
    assert (row.amount_minor, row.currency) == (AMOUNT_MINOR, "CNY")
    assert (row.paid_at_ms, row.received_at_ms, row.recorded_at_ms) == (
        clock.now_ms() - 3,
        clock.now_ms(),
        clock.now_ms(),
    )
    assert (row.source, row.paid_at_untrusted, row.close_reason, row.writer_no) == (1, 0, 0, core.writer_no)


async def test_success_of_a_second_attempt_is_a_duplicate_and_refunded_once(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id, 1, "A1"))
    outcome, replayed, written = await hear(core, core.word(payment_id, 2, "B1"))
    assert (outcome, replayed) == (DUPLICATE, False)
    assert written.names() == {"excess_payment", "refund", "refund_try"}
    excess = written.row("excess_payment")
    assert (excess.attempt, excess.channel_trade_no, excess.reason) == (2, "B1", DUPLICATE)
    assert (excess.amount_minor, excess.currency) == (AMOUNT_MINOR, "CNY")
    assert_refunded(written, payment_id, 2, "B1")
    assert written.row("refund").reason == DUPLICATE


async def test_success_of_two_attempts_under_one_trade_number_is_a_duplicate(core: Core) -> None:
    """Two banks may issue the same number: a capture is (channel order, trade number)."""
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id, 1, "SAME"))
    outcome, replayed, written = await hear(core, core.word(payment_id, 2, "SAME"))
    assert (outcome, replayed) == (DUPLICATE, False)
    assert_refunded(written, payment_id, 2, "SAME")


async def test_success_after_close_is_late_and_refunded(core: Core) -> None:
    payment_id = await core.make_payment(states={1: AttemptState.CLOSED})
    await close(core, payment_id)
    outcome, replayed, written = await hear(core, core.word(payment_id))
    assert (outcome, replayed) == (LATE, False)
    assert written.names() == {"excess_payment", "refund", "refund_try"}
    assert written.row("excess_payment").reason == LATE
    assert_refunded(written, payment_id, 1, "T1")


async def test_success_paid_in_time_but_heard_of_after_close_is_late_and_refunded(
    core: Core, clock: ManualClock
) -> None:
    payment_id = await core.make_payment(states={1: AttemptState.CLOSED})
    paid_at_ms = clock.now_ms()
    await close(core, payment_id)
    clock.advance(1_000)
    outcome, _, written = await hear(core, core.word(payment_id, paid_at_ms=paid_at_ms))
    assert outcome == LATE
    assert_refunded(written, payment_id, 1, "T1")


async def test_success_after_expiry_closes_the_payment_and_is_refunded_in_one_commit(
    core: Core, clock: ManualClock
) -> None:
    payment_id = await core.make_payment()
    clock.advance(VALIDITY_MS + 1)
    outcome, replayed, written = await hear(core, core.word(payment_id))
    assert (outcome, replayed) == (LATE, False)
    assert written.names() == {"payment_outcome", "excess_payment", "refund", "refund_try"}
    closed = written.row("payment_outcome")
    assert (closed.state, closed.close_reason, closed.attempt) == (PaymentState.CLOSED, CloseReason.EXPIRED, 0)
    assert (closed.channel_trade_no, closed.amount_minor, closed.currency) == ("", 0, "")
    assert_refunded(written, payment_id, 1, "T1")
    assert len({(row.writer_no, row.group_no) for rows in written.tables.values() for row in rows}) == 1


async def test_late_success_beside_a_live_attempt_is_excess_without_refund(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    clock.advance(VALIDITY_MS + 1)
    outcome, replayed, written = await hear(core, core.word(payment_id, 1))
    assert (outcome, replayed) == (LATE, False)
    assert written.names() == {"excess_payment"}
    assert written.row("excess_payment").reason == LATE


async def test_late_success_beside_an_ended_attempt_closes_the_payment(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment(
        "bank_a", "bank_b", "bank_c", states={2: AttemptState.FAILED, 3: AttemptState.CLOSED}
    )
    clock.advance(VALIDITY_MS + 1)
    _, _, written = await hear(core, core.word(payment_id, 1))
    assert written.row("payment_outcome").state == PaymentState.CLOSED
    assert_refunded(written, payment_id, 1, "T1")


async def test_outcome_accepted_later_releases_the_waiting_refund_in_the_same_commit(
    core: Core, clock: ManualClock
) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    paid_in_time_ms = clock.now_ms() + VALIDITY_MS
    clock.advance(VALIDITY_MS + 1)
    await core.notify(core.word(payment_id, 1, "A1"))
    outcome, _, written = await hear(core, core.word(payment_id, 2, "B1", paid_at_ms=paid_in_time_ms))
    assert outcome == ACCEPTED
    assert written.names() == {"payment_outcome", "refund", "refund_try"}
    assert_refunded(written, payment_id, 1, "A1")
    assert written.row("refund").group_no == written.row("payment_outcome").group_no


async def test_outcome_closed_by_the_last_late_success_releases_every_refund(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    clock.advance(VALIDITY_MS + 1)
    await core.notify(core.word(payment_id, 1, "A1"))
    outcome, _, written = await hear(core, core.word(payment_id, 2, "B1"))
    assert outcome == LATE
    assert written.row("payment_outcome").state == PaymentState.CLOSED
    assert {row.channel_trade_no for row in written.rows("refund")} == {"A1", "B1"}
    assert len(written.rows("excess_payment")) == 1


async def test_outcome_closed_by_the_merchant_releases_the_waiting_refund_in_the_same_commit(
    core: Core, clock: ManualClock
) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    clock.advance(VALIDITY_MS + 1)
    await core.notify(core.word(payment_id, 1, "A1"))
    await core.notify(core.failure(payment_id, 2))
    with core.watch() as written:
        await close(core, payment_id)
    assert written.names() == {"payment_outcome", "refund", "refund_try"}
    assert_refunded(written, payment_id, 1, "A1")


async def test_second_trade_number_on_one_attempt_is_quarantined_and_moves_no_money(core: Core) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id, 1, "T1"))
    outcome, replayed, written = await hear(core, core.word(payment_id, 1, "T2"))
    assert (outcome, replayed) == (SECOND_CAPTURE, False)
    assert written.names() == {"quarantine"}
    row = written.row("quarantine")
    assert (row.reason, row.payment_id, row.attempt, row.channel_trade_no) == (SECOND_CAPTURE, payment_id, 1, "T2")


async def test_second_trade_number_on_a_refunded_attempt_is_quarantined(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id, 1, "A1"))
    await core.notify(core.word(payment_id, 2, "B1"))
    outcome, _, written = await hear(core, core.word(payment_id, 2, "B2"))
    assert outcome == SECOND_CAPTURE
    assert written.names() == {"quarantine"}


@pytest.mark.parametrize(
    "wrong",
    [{"amount_minor": AMOUNT_MINOR - 1}, {"amount_minor": AMOUNT_MINOR + 1}, {"currency": "JPY"}, {"currency": "XXX"}],
    ids=str,
)
async def test_wrong_terms_are_quarantined_and_the_right_word_is_accepted_later(
    core: Core, wrong: dict[str, Any]
) -> None:
    payment_id = await core.make_payment()
    outcome, replayed, written = await hear(core, core.word(payment_id, **wrong))
    assert (outcome, replayed) == (MISMATCH, False)
    assert written.names() == {"quarantine"}
    assert written.row("quarantine").amount_minor == wrong.get("amount_minor", AMOUNT_MINOR)
    outcome, replayed, written = await hear(core, core.word(payment_id))
    assert (outcome, replayed) == (ACCEPTED, False)
    assert written.names() == {"payment_outcome"}


@pytest.mark.parametrize("wrong", [{"amount_minor": 1}, {"currency": "JPY"}], ids=str)
async def test_wrong_terms_under_a_recorded_trade_number_are_a_mismatch(core: Core, wrong: dict[str, Any]) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id))
    outcome, replayed, written = await hear(core, core.word(payment_id, **wrong))
    assert (outcome, replayed) == (MISMATCH, False)
    assert written.names() == {"quarantine"}


async def test_wrong_amount_on_a_paid_payments_other_attempt_is_a_mismatch_without_refund(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    await core.notify(core.word(payment_id, 1, "A1"))
    outcome, _, written = await hear(core, core.word(payment_id, 2, "B1", amount_minor=1))
    assert outcome == MISMATCH
    assert written.names() == {"quarantine"}


@pytest.mark.parametrize(
    "elsewhere",
    [{"account": "bank_b"}, {"account": "bank_z"}, {"channel": "other"}, {"channel": "", "account": ""}],
    ids=str,
)
async def test_success_from_another_channel_or_account_is_a_conflict(core: Core, elsewhere: dict[str, Any]) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    outcome, replayed, written = await hear(core, core.word(payment_id, **elsewhere))
    assert (outcome, replayed) == (CONFLICT, False)
    assert written.names() == {"quarantine"}
    assert written.row("quarantine").reason == CONFLICT
    assert (await core.notify(core.word(payment_id))).outcome == ACCEPTED


async def test_conflict_about_a_paid_attempt_is_never_a_replay(core: Core) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id))
    outcome, replayed, written = await hear(core, core.word(payment_id, account="bank_b"))
    assert (outcome, replayed) == (CONFLICT, False)
    assert written.names() == {"quarantine"}


# Unknown orders


async def test_unknown_payment_is_quarantined_once_however_often_it_comes(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment()
    word = core.word(payment_id + 1, raw=b"the evidence", headers='{"a": "b"}')
    outcome, replayed, written = await hear(core, word)
    assert (outcome, replayed) == (UNKNOWN, False)
    assert written.names() == {"quarantine"}
    first = written.row("quarantine")
    assert (first.payment_id, first.attempt, first.raw, first.headers) == (
        payment_id + 1,
        1,
        b"the evidence",
        '{"a": "b"}',
    )
    assert (first.arrivals, first.is_open, first.resolutions) == (1, 1, "[]")
    clock.advance(1_000)
    for arrivals in (2, 3):
        outcome, replayed, written = await hear(core, word._replace(received_at_ms=clock.now_ms()))
        row = written.row("quarantine")
        assert (outcome, replayed, row.arrivals, row.quarantine_id) == (UNKNOWN, False, arrivals, first.quarantine_id)
        assert (row.first_seen_at_ms, row.last_seen_at_ms) == (first.first_seen_at_ms, clock.now_ms())
    assert len(core.snapshot()["quarantine"]) == 1


async def test_unknown_attempt_of_a_known_payment_is_quarantined(core: Core) -> None:
    payment_id = await core.make_payment()
    outcome, _, written = await hear(core, core.word(payment_id, 2))
    assert outcome == UNKNOWN
    assert written.names() == {"quarantine"}


async def test_unknown_word_is_judged_afresh_once_its_order_is_there(core: Core, clock: ManualClock) -> None:
    """UNKNOWN is no verdict: the payment may be written by a process that was slower than the user."""
    now = core.ids.draw()
    word = core.word(now)
    assert (await core.notify(word)).outcome == UNKNOWN
    core.ids.draw = lambda: now  # type: ignore[method-assign]  # the slower process has drawn it before
    assert await core.make_payment() == now
    outcome, replayed, written = await hear(core, word)
    assert (outcome, replayed) == (ACCEPTED, False)
    assert written.names() == {"payment_outcome"}


async def test_unknown_words_of_one_group_share_one_row(core: Core) -> None:
    word = core.word(core.ids.draw())
    verdicts = await asyncio.gather(*(core.notify(word) for _ in range(5)))
    assert {(verdict.outcome, verdict.replayed) for verdict in verdicts} == {(UNKNOWN, False)}
    (row,) = core.snapshot()["quarantine"]
    assert row.arrivals == 5


async def test_unknown_words_that_differ_have_rows_of_their_own(core: Core) -> None:
    payment_id = core.ids.draw()
    words = [
        core.word(payment_id),
        core.word(payment_id, trade_no="T2"),
        core.word(payment_id, amount_minor=1),
        core.word(payment_id, currency="JPY"),
        core.word(payment_id, account="bank_b"),
        core.word(payment_id, channel="other"),
        core.word(payment_id, 4),
        core.failure(payment_id),
    ]
    for word in words:
        assert (await core.notify(word)).outcome == UNKNOWN
    assert len(core.snapshot()["quarantine"]) == len(words)


# Replays of what was judged


async def test_replay_of_every_judged_capture_writes_nothing_and_answers_the_same(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    closed_id = await core.make_payment(states={1: AttemptState.CLOSED})
    await close(core, closed_id)
    words = [core.word(payment_id, 1, "A1"), core.word(payment_id, 2, "B1"), core.word(closed_id, 1, "C1")]
    first = [(await core.notify(word)).outcome for word in words]
    assert first == [ACCEPTED, DUPLICATE, LATE]
    for word, outcome in zip(words * 2, first * 2, strict=True):
        again, replayed, written = await hear(core, word)
        assert (again, replayed, written.tables) == (outcome, True, {})


async def test_replay_with_another_pay_time_and_receipt_is_still_a_replay(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id))
    clock.advance(VALIDITY_MS * 2)
    for paid_at_ms in (clock.now_ms(), ABSENT_MS, 0):
        again, replayed, written = await hear(core, core.word(payment_id, paid_at_ms=paid_at_ms))
        assert (again, replayed, written.tables) == (ACCEPTED, True, {})


async def test_replay_years_later_after_a_restart_answers_the_same(db_url: str, clock: ManualClock) -> None:
    with Core(db_url, clock=clock) as core:
        payment_id = await core.make_payment("bank_a", "bank_b")
        words = [core.word(payment_id, 1, "A1"), core.word(payment_id, 2, "B1")]
        first = [(await core.notify(word)).outcome for word in words]
    clock.advance(TEN_YEARS_MS)
    with Core(db_url, clock=clock) as core:
        assert len(core.index) == 0
        for word, outcome in zip(words, first, strict=True):
            again, replayed, written = await hear(core, word._replace(received_at_ms=clock.now_ms()))
            assert (again, replayed, written.tables) == (outcome, True, {})


async def test_replay_after_an_account_was_taken_out_of_the_configuration_answers_the_same(
    db_url: str, clock: ManualClock
) -> None:
    with Core(db_url, clock=clock) as core:
        payment_id = await core.make_payment("bank_a", "bank_b")
        words = [core.word(payment_id, 1, "A1"), core.word(payment_id, 2, "B1")]
        await core.notify(words[0])
    with Core(db_url, clock=clock, accounts=("bank_c",)) as core:
        again, replayed, written = await hear(core, words[0])
        assert (again, replayed, written.tables) == (ACCEPTED, True, {})
        outcome, _, written = await hear(core, words[1])
        assert outcome == DUPLICATE
        assert_refunded(written, payment_id, 2, "B1")


async def test_replay_within_one_group_is_written_once(core: Core) -> None:
    payment_id = await core.make_payment()
    verdicts = await asyncio.gather(*(core.notify(core.word(payment_id)) for _ in range(6)))
    assert [verdict.outcome for verdict in verdicts] == [ACCEPTED] * 6
    assert sorted(verdict.replayed for verdict in verdicts) == [False] + [True] * 5


# Failures


async def test_failure_is_recorded_on_the_attempt_and_its_replay_is_marked(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment()
    word = core.failure(payment_id)._replace(failure_code="NO_MONEY", failure_message="card empty")
    outcome, replayed, written = await hear(core, word)
    assert (outcome, replayed) == (RECORDED, False)
    assert written.names() == {"channel_order"}
    row = written.row("channel_order")
    assert (row.state, row.failure_code, row.failure_message) == (AttemptState.FAILED, "NO_MONEY", "card empty")
    assert row.failed_at_ms == clock.now_ms()
    outcome, replayed, written = await hear(core, word)
    assert (outcome, replayed, written.tables) == (RECORDED, True, {})


async def test_failure_after_a_success_never_undoes_it(core: Core) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id))
    outcome, _, written = await hear(core, core.failure(payment_id))
    assert outcome == RECORDED
    assert written.names() == {"channel_order"}
    assert written.row("channel_order").state == AttemptState.OPEN
    record = core.store.load_record(payment_id)
    assert record is not None
    assert record.state == PaymentState.PAID
    again, replayed, written = await hear(core, core.word(payment_id))
    assert (again, replayed, written.tables) == (ACCEPTED, True, {})


@pytest.mark.parametrize("attempt", [1, 4], ids=["cached_attempt", "uncached_attempt"])
@pytest.mark.parametrize(
    "state", [AttemptState.FAILED, AttemptState.CLOSED, AttemptState.UNKNOWN], ids=lambda state: state.name
)
async def test_success_after_we_called_the_attempt_ended_is_still_a_success(
    core: Core, state: AttemptState, attempt: int
) -> None:
    """The index holds three attempts of a payment; a word about the fourth is judged on the rows."""
    payment_id = await core.make_payment("bank_a", "bank_b", "bank_c", "bank_a", states={attempt: state})
    outcome, _, written = await hear(core, core.word(payment_id, attempt))
    assert outcome == ACCEPTED
    assert written.names() == {"payment_outcome"}


async def test_second_success_on_an_attempt_that_we_called_failed_is_refunded(core: Core) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b", states={2: AttemptState.FAILED})
    await core.notify(core.word(payment_id, 1, "A1"))
    outcome, _, written = await hear(core, core.word(payment_id, 2, "B1"))
    assert outcome == DUPLICATE
    assert_refunded(written, payment_id, 2, "B1")


async def test_success_after_a_failure_notification_is_still_a_success(core: Core) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.failure(payment_id))
    assert (await core.notify(core.word(payment_id))).outcome == ACCEPTED
    assert (await core.notify(core.failure(payment_id))).replayed


async def test_failure_of_another_account_is_a_conflict_and_changes_no_attempt(core: Core) -> None:
    payment_id = await core.make_payment()
    outcome, _, written = await hear(core, core.failure(payment_id)._replace(account="bank_b"))
    assert outcome == CONFLICT
    assert written.names() == {"quarantine"}


async def test_failure_frees_a_late_success_of_the_other_attempt_to_close(core: Core, clock: ManualClock) -> None:
    payment_id = await core.make_payment("bank_a", "bank_b")
    clock.advance(VALIDITY_MS + 1)
    verdicts = await asyncio.gather(core.notify(core.failure(payment_id, 2)), core.notify(core.word(payment_id, 1)))
    assert [verdict.outcome for verdict in verdicts] == [RECORDED, LATE]
    rows = core.snapshot()
    assert {row.state for row in rows["payment_outcome"]} == {PaymentState.CLOSED}
    check_money_rules(rows)


# Quarantine


async def test_quarantine_row_that_was_resolved_is_opened_by_a_new_arrival(core: Core) -> None:
    word = core.word(core.ids.draw())
    await core.notify(word)
    resolution = '[{"decision": "not ours"}]'
    change(core.url, update(tables.quarantine).values(is_open=0, resolutions=resolution))
    assert core.store.backlog().quarantine_open == 0
    _, _, written = await hear(core, word)
    row = written.row("quarantine")
    assert (row.is_open, row.arrivals, row.resolutions) == (1, 2, resolution)
    assert core.store.backlog().quarantine_open == 1


async def test_quarantined_mismatch_stays_open_beside_the_accepted_word(core: Core) -> None:
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id, amount_minor=1))
    await core.notify(core.word(payment_id))
    (row,) = core.snapshot()["quarantine"]
    assert (row.is_open, row.amount_minor) == (1, 1)


# Pay time against expiry


class Time(NamedTuple):
    """When it was paid and heard of, against the payment's own time and its expiry."""

    name: str
    paid: tuple[str, int] | None
    heard: tuple[str, int]
    grace_ms: int
    outcome: NotifyOutcome
    untrusted: bool = False


TIMES = [
    Time("at_expiry", ("expiry", 0), ("expiry", 0), 0, ACCEPTED),
    Time("one_ms_after_expiry", ("expiry", 1), ("expiry", 1), 0, LATE),
    Time("paid_at_expiry_heard_days_later", ("expiry", 0), ("expiry", 500_000_000), 0, ACCEPTED),
    Time("paid_late_by_its_clock_heard_in_time", ("expiry", 1), ("expiry", 0), 0, ACCEPTED),
    Time("at_the_end_of_grace", ("expiry", 2_000), ("expiry", 9_000), 2_000, ACCEPTED),
    Time("one_ms_after_grace", ("expiry", 2_001), ("expiry", 9_000), 2_000, LATE),
    Time("absent", None, ("made", 10), 0, ACCEPTED, True),
    Time("absent_after_expiry", None, ("expiry", 9_000), 0, ACCEPTED, True),
    Time("as_it_was_made", ("made", 0), ("made", 10), 0, ACCEPTED),
    Time("one_ms_before_it_was_made", ("made", -1), ("made", 10), 0, ACCEPTED, True),
    Time("zero", ("epoch", 0), ("expiry", 9_000), 0, ACCEPTED, True),
    Time("five_minutes_ahead", ("made", 10 + PAID_AT_AHEAD_LIMIT_MS), ("made", 10), 0, ACCEPTED),
    Time("over_five_minutes_ahead", ("made", 11 + PAID_AT_AHEAD_LIMIT_MS), ("made", 10), 0, ACCEPTED, True),
    Time("five_minutes_ahead_after_expiry", ("expiry", 1 + PAID_AT_AHEAD_LIMIT_MS), ("expiry", 1), 0, LATE),
    Time("eight_hours_ahead", ("made", 28_800_000), ("made", 10), 0, ACCEPTED, True),
]


@pytest.mark.parametrize("forget", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("case", TIMES, ids=lambda case: case.name)
async def test_success_is_judged_by_its_pay_time(db_url: str, clock: ManualClock, case: Time, forget: bool) -> None:
    with Core(db_url, clock=clock, late_grace_ms=case.grace_ms) as core:
        payment_id = await core.make_payment()
        record = core.store.load_record(payment_id)
        assert record is not None
        base = {"made": created_at_ms(payment_id), "expiry": record.payment.expire_at_ms, "epoch": 0}
        paid_at_ms = ABSENT_MS if case.paid is None else base[case.paid[0]] + case.paid[1]
        if forget:
            core.forget()
        word = core.word(payment_id, paid_at_ms=paid_at_ms, received_at_ms=base[case.heard[0]] + case.heard[1])
        verdict = await core.notify(word)
        assert (verdict.outcome, verdict.paid_at_untrusted) == (case.outcome, case.untrusted)
        row = next(iter(core.snapshot()["payment_outcome"]))
        state = PaymentState.PAID if case.outcome == ACCEPTED else PaymentState.CLOSED
        assert (row.state, row.paid_at_untrusted) == (state, int(case.untrusted))
        if case.outcome == ACCEPTED:
            assert row.paid_at_ms == (None if case.paid is None else paid_at_ms)
        again = await core.notify(word)
        assert (again.outcome, again.replayed, again.paid_at_untrusted) == (case.outcome, True, case.untrusted)


async def test_success_with_an_untrusted_pay_time_on_a_closed_payment_is_late(core: Core) -> None:
    payment_id = await core.make_payment(states={1: AttemptState.CLOSED})
    await close(core, payment_id)
    assert (await core.notify(core.word(payment_id, paid_at_ms=ABSENT_MS))).outcome == LATE


# What cannot be evidence, and what can

INVALID = [
    ("amount_minor", {"amount_minor": 0}),
    ("amount_minor", {"amount_minor": -1}),
    ("amount_minor", {"amount_minor": -(2**63)}),
    ("channel_trade_no", {"channel_trade_no": ""}),
    ("channel_trade_no", {"channel_trade_no": "T\0"}),
    ("channel_trade_no", {"channel_trade_no": "T" * 65}),
    ("channel", {"channel": "sim\0bank"}),
    ("channel", {"channel": "c" * 33}),
    ("account", {"account": "\0"}),
    ("account", {"account": "a" * 65}),
    ("channel_order_no", {"channel_order_no": "1\0"}),
    ("channel_order_no", {"channel_order_no": "1" * 65}),
    ("currency", {"currency": "CN\0"}),
    ("currency", {"currency": "C" * 17}),
    ("raw", {"raw": b"x" * (MAX_RAW_BYTES + 1)}),
    ("headers", {"headers": "x" * (MAX_HEADERS_BYTES + 1)}),
    ("headers", {"headers": "é" * (MAX_HEADERS_BYTES // 2 + 1)}),
    ("headers", {"headers": '{"a": "\\u0000"}'}),
]


@pytest.mark.parametrize(("field", "changes"), INVALID, ids=lambda value: str(value)[:40])
async def test_word_that_cannot_be_evidence_is_invalid_and_writes_nothing(
    core: Core, field: str, changes: dict[str, Any]
) -> None:
    payment_id = await core.make_payment()
    with core.watch() as written, pytest.raises(InvalidArgumentError) as refused:
        await core.notify(core.word(payment_id, **changes))
    assert [violation.field for violation in refused.value.violations] == [field]
    assert refused.value.reason == "INVALID_NOTIFICATION"
    assert written.tables == {}
    channel = "simbank" if field not in {"channel", "account"} else "unconfigured"
    assert core.count("paycore_notify_total", channel=channel, outcome="INVALID", replayed="false") == 1


async def test_failure_with_a_negative_amount_is_invalid(core: Core) -> None:
    payment_id = await core.make_payment()
    with pytest.raises(InvalidArgumentError) as refused:
        await core.notify(core.failure(payment_id, amount_minor=-1))
    assert [violation.field for violation in refused.value.violations] == ["amount_minor"]


async def test_word_that_breaks_several_rules_names_each(core: Core) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        await core.notify(core.word(1, amount_minor=0, channel_trade_no="", raw=b"x" * (MAX_RAW_BYTES + 1)))
    assert [violation.field for violation in refused.value.violations] == ["amount_minor", "channel_trade_no", "raw"]


async def test_failure_without_amount_and_trade_number_is_evidence(core: Core) -> None:
    payment_id = await core.make_payment()
    word = core.failure(payment_id)._replace(amount_minor=0, currency="")
    assert (await core.notify(word)).outcome == RECORDED


async def test_word_at_every_limit_is_kept_whole(core: Core) -> None:
    word = core.word(
        core.ids.draw(),
        channel="c" * 32,
        account="a" * 64,
        channel_order_no="n" * 64,
        currency="C" * 16,
        channel_trade_no="单" * 64,
        amount_minor=2**63 - 1,
        raw=bytes(range(256)) * (MAX_RAW_BYTES // 256),
        headers="h" * MAX_HEADERS_BYTES,
    )
    outcome, _, written = await hear(core, word)
    row = written.row("quarantine")
    assert outcome == UNKNOWN
    assert (row.channel, row.account, row.channel_order_no, row.currency, row.channel_trade_no) == (
        word.channel,
        word.account,
        word.channel_order_no,
        word.currency,
        word.channel_trade_no,
    )
    assert (row.amount_minor, row.raw, row.headers) == (word.amount_minor, word.raw, word.headers)


def foreign_numbers(payment_id: int) -> dict[str, str]:
    number = format_channel_order_no(payment_id, 1)
    return {
        "empty": "",
        "words": "hello",
        "full_width": "".join(chr(ord(digit) + 0xFEE0) for digit in number),
        "arabic_indic": "".join(chr(ord(digit) - ord("0") + 0x660) for digit in number),
        "plus": "+7",
        "plus_and_ours": f"+{number}",
        "minus": f"-{number}",
        "underscore": "1_0",
        "underscore_in_ours": f"{number[:3]}_{number[3:]}",
        "leading_zero": f"0{number}",
        "spaces": f" {number} ",
        "line_break": f"{number}\n",
        "attempt_zero": f"{payment_id}00",
        "attempt_64": f"{payment_id}64",
        "attempt_99": f"{payment_id}99",
        "one_attempt_digit": f"{payment_id}1",
        "int64_overflow": f"{2**63}01",
        "hexadecimal": "0x1101",
        "exponent": "1e501",
        "superscript": "²²²",
    }


@pytest.mark.parametrize("name", list(foreign_numbers(1)))
async def test_order_number_that_is_not_ours_is_quarantined(core: Core, name: str) -> None:
    payment_id = await core.make_payment()
    number = foreign_numbers(payment_id)[name]
    outcome, _, written = await hear(core, core.word(payment_id, channel_order_no=number))
    assert outcome == UNKNOWN
    assert written.names() == {"quarantine"}
    row = written.row("quarantine")
    assert row.channel_order_no == number
    # "one_attempt_digit" is a canonical number of another payment; all others name none.
    assert (row.payment_id is None) == (name != "one_attempt_digit")


@pytest.mark.parametrize(
    "unknown", [{"channel": "wechat"}, {"account": "bank_z"}, {"currency": "XYZ"}, {"currency": "cny"}], ids=str
)
async def test_unknown_name_about_an_unknown_order_is_quarantined(core: Core, unknown: dict[str, Any]) -> None:
    outcome, _, written = await hear(core, core.word(core.ids.draw(), **unknown))
    assert outcome == UNKNOWN
    assert written.names() == {"quarantine"}


async def test_highest_payment_id_and_attempt_are_judged(core: Core) -> None:
    word = core.word(2**63 - 1, 63)
    assert word.channel_order_no == "922337203685477580763"
    outcome, _, written = await hear(core, word)
    assert outcome == UNKNOWN
    assert (written.row("quarantine").payment_id, written.row("quarantine").attempt) == (2**63 - 1, 63)


async def test_attempts_past_those_the_index_holds_are_judged_alike(core: Core) -> None:
    payment_id = await core.make_payment(*(("bank_a", "bank_b", "bank_c") * 21))
    assert (await core.notify(core.word(payment_id, 63, "T63"))).outcome == ACCEPTED
    assert (await core.notify(core.word(payment_id, 63, "T63"))).replayed
    outcome, _, written = await hear(core, core.word(payment_id, 4, "T4"))
    assert outcome == DUPLICATE
    assert_refunded(written, payment_id, 4, "T4")


async def test_amount_past_what_the_index_holds_is_judged_alike(core: Core) -> None:
    huge = 2**63 - 1
    payment_id = await core.make_payment("bank_a", "bank_b", amount_minor=huge)
    assert (await core.notify(core.word(payment_id, 1, amount_minor=huge - 1))).outcome == MISMATCH
    assert (await core.notify(core.word(payment_id, 1, amount_minor=huge))).outcome == ACCEPTED
    assert (await core.notify(core.word(payment_id, 1, amount_minor=huge))).replayed
    _, _, written = await hear(core, core.word(payment_id, 2, amount_minor=huge))
    assert_refunded(written, payment_id, 2, "T1", huge)
