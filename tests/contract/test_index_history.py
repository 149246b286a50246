"""Histories that hold the compiled index and its plain twin against a model of the truth.

The model knows every fact, as the database would. The index knows a part of it, and may only say what the
model says, or ask.
"""

from __future__ import annotations

import copy

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from paycore import _dedupe
from paycore.domain import decision
from paycore.domain.decision import ABSENT_MS, Facts, Moment
from paycore.domain.ids import ID_EPOCH_MS, MAX_ATTEMPTS
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.plain_index import PlainIndex
from paycore.domain.verdicts import EXCESS_REASONS, NotifyOutcome, PaymentState, Recorded, VerdictFlag
from tests.support.decision_table import FIVE_MINUTES_MS, MAX_INT64, look_up
from tests.support.index_truth import Attempt, Capture, Notification, Payment, columns, true_facts

AnyIndex = _dedupe.Index | PlainIndex

ACCEPTED, DUPLICATE, LATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.LATE
ASK, CLOSES = VerdictFlag.ASK, VerdictFlag.CLOSES
MISS = 0

OPEN, PAID, CLOSED = PaymentState.OPEN, PaymentState.PAID, PaymentState.CLOSED
STARTED_AT_MS = ID_EPOCH_MS + 1_000_000
CNY = CURRENCY_CODES["CNY"]

picks = st.integers(0, 1_000)
# What fits an entry stands more often, or most of a history would be misses.
amounts = st.sampled_from([1, 100, 1_234, (1 << 48) - 1, 1 << 48, MAX_INT64])
currencies = st.sampled_from([1, CNY, CNY, 254, 255, 0])
codes = st.sampled_from([1, 1, 2, 254, 255, 0])
trade_nos = st.sampled_from(["A", "B"])
paid_ats = st.sampled_from(
    ["absent", "now", "made", "before", "expiry", "expiry+1", "grace", "grace+1", "ahead", "too far"]
)


class IndexHistory(RuleBasedStateMachine):
    """Payments are made, paid, paid again, closed; groups commit and roll back; other processes write too."""

    grace_ms = 2_000

    def __init__(self) -> None:
        super().__init__()
        self.now_ms = STARTED_AT_MS
        self.payments: dict[int, Payment] = {}
        self.words: list[Notification] = []
        self.compiled = _dedupe.Index(late_grace_ms=self.grace_ms)
        self.plain = PlainIndex(late_grace_ms=self.grace_ms)
        self.payments_before: dict[int, Payment] | None = None
        self.entries_before: dict[int, tuple[object, ...] | None] = {}

    @property
    def indexes(self) -> tuple[AnyIndex, AnyIndex]:
        return self.compiled, self.plain

    def pick(self, pick: int) -> Payment:
        return list(self.payments.values())[pick % len(self.payments)]

    def entries(self) -> dict[int, tuple[object, ...] | None]:
        return {key: self.compiled.get(key) for key in self.payments}

    def load(self, payment: Payment) -> None:
        for index in self.indexes:
            index.put(*payment.row())
        payment.stale = False

    # -- what happens

    @rule(
        amount_minor=amounts,
        currency_code=currencies,
        validity_ms=st.sampled_from([0, 1, 600_000, 600_000, (1 << 32) - 1, 1 << 32]),
        accounts=st.one_of(
            st.lists(st.sampled_from([1, 2, 255]), min_size=1, max_size=2),
            st.lists(codes, max_size=5),
            st.just([1] * MAX_ATTEMPTS),
        ),
        cached=st.booleans(),
    )
    def pay(self, amount_minor: int, currency_code: int, validity_ms: int, accounts: list[int], cached: bool) -> None:
        payment_id = (self.now_ms - ID_EPOCH_MS) << 22 | len(self.payments)
        payment = Payment(payment_id, self.now_ms, self.now_ms + validity_ms, amount_minor, currency_code)
        payment.attempts = [Attempt(code) for code in accounts]
        self.payments[payment_id] = payment
        if cached:
            self.load(payment)

    @precondition(lambda self: self.payments)
    @rule(pick=picks, account_code=codes)
    def add_attempt(self, pick: int, account_code: int) -> None:
        payment = self.pick(pick)
        if len(payment.attempts) < MAX_ATTEMPTS:
            payment.attempts.append(Attempt(account_code))
            for index in self.indexes:
                index.add_attempt(payment.payment_id, len(payment.attempts), account_code)

    @precondition(lambda self: self.payments)
    @rule(
        pick=picks,
        attempt_pick=st.integers(0, 2),
        trade_no=trade_nos,
        paid_at=paid_ats,
        heard_when_paid=st.booleans(),
    )
    def success(self, pick: int, attempt_pick: int, trade_no: str, paid_at: str, heard_when_paid: bool) -> None:
        """A success of the right account and terms: only when it was paid, and for which trade, is left open."""
        payment = self.pick(pick)
        if payment.attempts:
            word = self.word(payment, 1 + attempt_pick % len(payment.attempts), trade_no, paid_at)
            self.arrive(payment, word, heard_when_paid)

    @precondition(lambda self: self.payments)
    @rule(
        pick=picks,
        attempt=st.one_of(st.integers(1, 3), st.integers(0, 64)),
        trade_no=trade_nos,
        paid_at=paid_ats,
        wrong=st.sets(st.sampled_from(["account", "amount", "currency"])),
        amount_minor=amounts,
    )
    def success_of_any_kind(
        self, pick: int, attempt: int, trade_no: str, paid_at: str, wrong: set[str], amount_minor: int
    ) -> None:
        """A success for an attempt that may not be there, by an account or with terms that may be wrong."""
        payment = self.pick(pick)
        word = self.word(payment, attempt, trade_no, paid_at)
        if "account" in wrong:
            word = word._replace(account_code=(word.account_code + 1) % 256)
        if "amount" in wrong:
            word = word._replace(amount_minor=amount_minor)
        if "currency" in wrong:
            word = word._replace(currency_code=(word.currency_code + 1) % 256)
        self.arrive(payment, word, heard_when_paid=True)

    @precondition(lambda self: self.words)
    @rule(pick=picks)
    def replay(self, pick: int) -> None:
        self.hear(self.words[pick % len(self.words)])

    @precondition(lambda self: self.payments)
    @rule(pick=picks, attempt=st.integers(1, 63))
    def failure(self, pick: int, attempt: int) -> None:
        attempts = self.pick(pick).attempts
        if attempt <= len(attempts):
            attempts[attempt - 1].finally_unpaid = True

    @precondition(lambda self: self.payments)
    @rule(pick=picks)
    def close(self, pick: int) -> None:
        payment = self.pick(pick)
        if payment.state == OPEN:
            payment.state = CLOSED
            for index in self.indexes:
                if not payment.stale:
                    index.close(payment.payment_id)
                else:
                    index.discard(payment.payment_id)

    @rule(elapsed_ms=st.sampled_from([1, 1_000, 600_000, 1 << 32]))
    def time_passes(self, elapsed_ms: int) -> None:
        self.now_ms += elapsed_ms

    @precondition(lambda self: self.payments and self.payments_before is None)
    @rule(pick=picks, what=st.sampled_from(["paid", "closed", "excess", "attempt"]))
    def another_process_writes(self, pick: int, what: str) -> None:
        payment = self.pick(pick)
        free = [place for place, attempt in enumerate(payment.attempts, start=1) if not attempt.captures]
        if what == "attempt":
            if len(payment.attempts) < MAX_ATTEMPTS:
                payment.attempts.append(Attempt(1))
        elif what == "closed" and payment.state == OPEN:
            payment.state = CLOSED
        elif what == "paid" and payment.state == OPEN and free:
            self.record(payment, free[0], "F", NotifyOutcome.ACCEPTED)
        elif what == "excess" and free:
            self.record(payment, free[-1], "F", NotifyOutcome.LATE)
        payment.stale = True

    @precondition(lambda self: self.payments)
    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        for index in self.indexes:
            index.discard(self.pick(pick).payment_id)

    @precondition(lambda self: self.payments)
    @rule(pick=picks)
    def reload(self, pick: int) -> None:
        self.load(self.pick(pick))

    @precondition(lambda self: self.payments_before is None)
    @rule()
    def begin(self) -> None:
        self.payments_before = copy.deepcopy(self.payments)
        self.entries_before = self.entries()
        for index in self.indexes:
            index.begin()

    @precondition(lambda self: self.payments_before is not None)
    @rule()
    def commit(self) -> None:
        self.payments_before = None
        for index in self.indexes:
            index.commit()

    @precondition(lambda self: self.payments_before is not None)
    @rule()
    def rollback(self) -> None:
        assert self.payments_before is not None
        made_in_group = self.payments.keys() - self.payments_before.keys()
        self.payments, self.payments_before = self.payments_before, None
        for index in self.indexes:
            index.rollback()
        assert self.entries() == self.entries_before
        assert not any(key in self.compiled for key in made_in_group)

    # -- what must hold

    def word(self, payment: Payment, attempt: int, trade_no: str, paid_at: str) -> Notification:
        """What a channel says about an attempt when all is right; ``paid_at`` names an edge of time."""
        times_ms = {
            "absent": ABSENT_MS,
            "now": self.now_ms,
            "made": payment.created_at_ms,
            "before": payment.created_at_ms - 1,
            "expiry": payment.expire_at_ms,
            "expiry+1": payment.expire_at_ms + 1,
            "grace": payment.expire_at_ms + self.grace_ms,
            "grace+1": payment.expire_at_ms + self.grace_ms + 1,
            "ahead": self.now_ms + FIVE_MINUTES_MS,
            "too far": self.now_ms + FIVE_MINUTES_MS + 1,
        }
        known = 1 <= attempt <= len(payment.attempts)
        return Notification(
            payment_id=payment.payment_id,
            attempt=attempt,
            account_code=payment.attempts[attempt - 1].account_code if known else 1,
            trade_no=trade_no,
            amount_minor=payment.amount_minor,
            currency_code=payment.currency_code,
            paid_at_ms=times_ms[paid_at],
        )

    def arrive(self, payment: Payment, word: Notification, heard_when_paid: bool) -> None:
        """Hear a new notification, now, or when it was paid if that is later."""
        self.words.append(word)
        if heard_when_paid:
            # Without this nearly every time after expiry would be too far ahead to be believed.
            self.now_ms = max(self.now_ms, min(word.paid_at_ms, payment.expire_at_ms + FIVE_MINUTES_MS))
        self.hear(word)

    def hear(self, word: Notification) -> None:
        """Judge a notification by all oracles, hold the index against the truth, then write what was decided."""
        payment = self.payments.get(word.payment_id)
        facts = true_facts(payment, word)
        moment = Moment(word.paid_at_ms, self.now_ms, self.grace_ms)
        verdict = look_up(facts, moment)
        assert decision.decide(facts, moment) == verdict
        assert _dedupe.decide(facts, moment) == verdict
        guess = self.check(word)
        self.compare(guess, verdict, payment, facts)
        if payment is None:
            return
        if guess == MISS or payment.stale:
            self.load(payment)
            guess = self.check(word)
            self.compare(guess, verdict, payment, facts)
            self.expect_an_answer(guess, payment, word)
        self.write(payment, word, verdict)

    def check(self, word: Notification) -> int:
        capture = (
            word.payment_id,
            word.attempt,
            word.account_code,
            word.amount_minor,
            word.currency_code,
            word.paid_at_ms,
            self.now_ms,
        )
        guess = self.compiled.check(*capture)
        assert self.plain.check(*capture) == guess
        table = columns([capture])
        self.compiled.check_many(*table)
        assert table[-1][0] == guess
        return guess

    def compare(self, guess: int, verdict: int, payment: Payment | None, facts: Facts) -> None:
        """The index says what is true, or asks; ACCEPTED alone may be out of date, and only until it is told."""
        if guess == MISS:
            return
        assert payment is not None
        if payment.stale:
            assert guess & ASK or guess & 0xFF == ACCEPTED
            return
        if guess == ASK:
            assert facts.recorded != Recorded.NONE
            return
        if guess & 0xFF == ACCEPTED:
            # A judged capture of another attempt may wait for the outcome: the rows are asked.
            captured = any(attempt.captures for attempt in payment.attempts)
            assert guess == (verdict | ASK if captured else verdict)
            return
        # Which attempts are live is not cached: with several, the guess leaves CLOSES to the database.
        several = len(payment.attempts) > 1
        assert guess == (verdict & ~CLOSES if several else verdict) | ASK

    def expect_an_answer(self, guess: int, payment: Payment, word: Notification) -> None:
        """Just loaded, the index must know what fits into an entry: one that always asks would pass all else."""
        fits = (
            payment.amount_minor < 1 << 48
            and payment.currency_code != 0
            and payment.expire_at_ms - payment.created_at_ms < 1 << 32
        )
        known = 1 <= word.attempt <= min(3, len(payment.attempts))
        if fits and known and payment.attempts[word.attempt - 1].account_code != 0:
            assert guess != MISS
        else:
            assert guess == MISS

    def write(self, payment: Payment, word: Notification, verdict: int) -> None:
        """Do what the writer does with a verdict, in the truth and in both indexes."""
        outcome = verdict & 0xFF
        if verdict & VerdictFlag.REPLAYED or outcome not in {ACCEPTED, DUPLICATE, LATE}:
            return
        self.record(payment, word.attempt, word.trade_no, outcome)
        if verdict & CLOSES:
            payment.state = CLOSED
        for index in self.indexes:
            if outcome == ACCEPTED:
                index.accept(payment.payment_id, word.attempt)
            else:
                index.set_captured(payment.payment_id, word.attempt)
            if verdict & CLOSES:
                index.close(payment.payment_id)

    def record(self, payment: Payment, attempt: int, trade_no: str, outcome: int) -> None:
        assert outcome in {ACCEPTED, *EXCESS_REASONS}
        payment.attempts[attempt - 1].captures[trade_no] = Capture(payment.amount_minor, payment.currency_code, outcome)
        if outcome == ACCEPTED:
            assert payment.state == OPEN
            payment.state, payment.kept_attempt = PAID, attempt

    @invariant()
    def indexes_hold_the_same(self) -> None:
        assert len(self.compiled) == len(self.plain)
        for key in self.payments:
            compiled: tuple[object, ...] | None = self.compiled.get(key)
            assert compiled == self.plain.get(key)
            assert (key in self.compiled) == (key in self.plain)

    @invariant()
    def fresh_entries_hold_the_truth(self) -> None:
        for payment in self.payments.values():
            entry: tuple[object, ...] | None = self.compiled.get(payment.payment_id)
            if entry is not None and not payment.stale:
                fresh = PlainIndex()
                fresh.put(*payment.row())
                assert entry == fresh.get(payment.payment_id)


IndexHistory.TestCase.settings = settings(
    max_examples=400,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestIndexHistory = IndexHistory.TestCase
