"""Random histories of notifications in random groups, against a model that judges them one by one.

Whatever the grouping, the order, restarts and a second process: the books obey R1 and R2, every capture that
can be judged is kept or excess, and replays of what was judged change nothing.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from paycore.domain.notification import Notification, Verdict
from paycore.domain.verdicts import AttemptState, CloseReason, NotifyOutcome, PaymentState
from paycore.usecases.close import InsertClosed
from tests.support.clock import ManualClock
from tests.support.core import ACCOUNTS, AMOUNT_MINOR, VALIDITY_MS, Core, check_money_rules, fresh_database
from tests.support.databases import KINDS, take_database
from tests.support.units import held

ACCEPTED, DUPLICATE, LATE = NotifyOutcome.ACCEPTED, NotifyOutcome.DUPLICATE, NotifyOutcome.LATE
JUDGED = {ACCEPTED, DUPLICATE, LATE}
ATTEMPTS = 3


class Word(NamedTuple):
    """One word about payment 0 or 1. in_time: paid before the expiry, as the channel says; else just now."""

    payment: int
    attempt: int
    trade_no: str
    amount_minor: int
    in_time: bool
    failure: bool = False


class Step(NamedTuple):
    """A group that waits together, and what happens before it."""

    words: tuple[Word, ...]
    restart: bool
    forget: bool
    close: int | None
    expire: bool


words = st.builds(
    Word,
    payment=st.integers(0, 1),
    attempt=st.integers(1, ATTEMPTS),
    trade_no=st.sampled_from(["T1", "T2"]),
    amount_minor=st.sampled_from([AMOUNT_MINOR] * 4 + [1]),
    in_time=st.booleans(),
    failure=st.sampled_from([False] * 5 + [True]),
)
steps = st.builds(
    Step,
    words=st.one_of(st.lists(words, min_size=1, max_size=1), st.lists(words, min_size=1, max_size=8)).map(tuple),
    restart=st.sampled_from([False] * 4 + [True]),
    forget=st.booleans(),
    close=st.sampled_from([None, None, None, 0, 1]),
    expire=st.booleans(),
)


def as_notification(core: Core, payment_id: int, expire_at_ms: int, word: Word) -> Notification:
    if word.failure:
        return core.failure(payment_id, word.attempt)
    paid_at_ms = min(core.clock.now_ms(), expire_at_ms) if word.in_time else core.clock.now_ms()
    return core.word(payment_id, word.attempt, word.trade_no, amount_minor=word.amount_minor, paid_at_ms=paid_at_ms)


class Model:
    """What was answered, and what therefore must hold."""

    def __init__(self) -> None:
        self.judged: dict[tuple[int, int, str], NotifyOutcome] = {}
        self.outcome: dict[int, tuple[int, int, str] | None] = {}

    def hear(self, word: Word, verdict: Verdict) -> None:
        capture = (word.payment, word.attempt, word.trade_no)
        if word.failure:
            assert verdict.outcome == NotifyOutcome.RECORDED
        elif word.amount_minor != AMOUNT_MINOR:
            assert verdict.outcome == (
                NotifyOutcome.SECOND_CAPTURE if self._other_trade(capture) else NotifyOutcome.MISMATCH
            )
        elif capture in self.judged:
            assert (verdict.outcome, verdict.replayed) == (self.judged[capture], True)
        elif self._other_trade(capture):
            assert (verdict.outcome, verdict.replayed) == (NotifyOutcome.SECOND_CAPTURE, False)
        else:
            assert verdict.outcome in JUDGED
            assert not verdict.replayed
            self.judged[capture] = NotifyOutcome(verdict.outcome)

    def _other_trade(self, capture: tuple[int, int, str]) -> bool:
        """Whether the attempt has a judged capture under another trade number, and none under this one."""
        of_attempt = {judged for judged in self.judged if judged[:2] == capture[:2]}
        return bool(of_attempt) and capture not in of_attempt

    def check(self, core: Core, ids: list[int]) -> None:
        rows = core.snapshot()
        check_money_rules(rows)
        number = {payment_id: place for place, payment_id in enumerate(ids)}
        kept = {
            (number[row.payment_id], row.attempt, row.channel_trade_no)
            for row in rows["payment_outcome"]
            if row.state == PaymentState.PAID
        }
        excess = {
            (number[row.payment_id], row.attempt, row.channel_trade_no): row.reason for row in rows["excess_payment"]
        }
        assert kept == {capture for capture, outcome in self.judged.items() if outcome == ACCEPTED}
        assert excess == {capture: outcome for capture, outcome in self.judged.items() if outcome != ACCEPTED}
        for row in rows["payment_outcome"]:
            before = self.outcome.setdefault(row.payment_id, row)
            assert before == row, "an outcome is never undone"
        assert self.outcome.keys() <= {row.payment_id for row in rows["payment_outcome"]}


async def play(history: list[Step], url: str) -> None:
    clock, model = ManualClock(), Model()
    core = Core(url, clock=clock).start()
    try:
        ids = [await core.make_payment(*ACCOUNTS, states={3: AttemptState.CLOSED}) for _ in range(2)]
        expire_at_ms = clock.now_ms() + VALIDITY_MS
        for step in history:
            if step.restart:
                core.stop()
                core = Core(url, clock=clock).start()
            if step.forget:
                core.forget()
            if step.expire:
                clock.advance(VALIDITY_MS)
            clock.advance(1)
            async with held(core.writer):
                heard = [
                    asyncio.ensure_future(core.notify(as_notification(core, ids[word.payment], expire_at_ms, word)))
                    for word in step.words
                ]
                await asyncio.sleep(0)
                if step.close is not None:
                    closing = InsertClosed(ids[step.close], CloseReason.MERCHANT, core.registry.code)
                    heard.append(asyncio.ensure_future(core.writer.run(closing)))  # type: ignore[arg-type]  # a record
                await asyncio.sleep(0)
            answers = await asyncio.gather(*heard, return_exceptions=True)
            hear_group(model, step.words, answers[: len(step.words)])
            model.check(core, ids)
        event(f"judged: {len(model.judged)}")
        for outcome, count in Counter(model.judged.values()).items():
            event(f"{outcome.name}: {min(count, 3)}")
    finally:
        core.stop()


def hear_group(model: Model, told: tuple[Word, ...], answers: list[Verdict | BaseException]) -> None:
    """First words first: within a group the order of judging is the writer's own, and each capture is new once."""
    if len(told) == 1:
        assert not isinstance(answers[0], BaseException), answers[0]
        model.hear(told[0], answers[0])
        return
    pairs = []
    for word, verdict in zip(told, answers, strict=True):
        assert not isinstance(verdict, BaseException), verdict
        pairs.append((word, verdict))
    for word, verdict in sorted(pairs, key=lambda pair: pair[1].outcome not in JUDGED or pair[1].replayed):
        if verdict.outcome in JUDGED or verdict.outcome == NotifyOutcome.RECORDED:
            model.hear(word, verdict)
    for word, verdict in pairs:
        # An odd word may have been judged before or after the capture that makes it a SECOND_CAPTURE.
        if verdict.outcome == NotifyOutcome.SECOND_CAPTURE:
            assert any(judged[:2] == (word.payment, word.attempt) for judged in model.judged)
        elif verdict.outcome == NotifyOutcome.MISMATCH:
            assert word.amount_minor != AMOUNT_MINOR
        else:
            assert verdict.outcome in JUDGED | {NotifyOutcome.RECORDED}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=45, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=st.lists(steps, min_size=1, max_size=6))
def test_books_obey_the_money_rules_whatever_the_history_and_its_groups(kind: str, history: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(history, take_database(kind, Path(folder))))


@settings(max_examples=15, deadline=None)
@given(told=st.lists(words, min_size=2, max_size=10), cut=st.integers(1, 9))
def test_grouping_never_changes_how_much_is_kept(told: list[Word], cut: int) -> None:
    """The same words in one group, one by one, and cut in two keep the same number of captures."""

    async def kept(groups: list[list[Word]], folder: Path) -> tuple[int, int, int]:
        with Core(fresh_database(folder / "paycore.db"), clock=ManualClock()) as core:
            ids = [await core.make_payment(*ACCOUNTS) for _ in range(2)]
            expire_at_ms = core.clock.now_ms() + VALIDITY_MS
            for group in groups:
                async with held(core.writer):
                    heard = [
                        asyncio.ensure_future(core.notify(as_notification(core, ids[word.payment], expire_at_ms, word)))
                        for word in group
                    ]
                    await asyncio.sleep(0)
                await asyncio.gather(*heard)
            rows = core.snapshot()
            check_money_rules(rows)
            return len(rows["payment_outcome"]), len(rows["excess_payment"]), len(rows["refund"])

    seen = set()
    for groups in ([told], [[word] for word in told], [told[:cut], told[cut:]]):
        with tempfile.TemporaryDirectory() as folder:
            seen.add(asyncio.run(kept([group for group in groups if group], Path(folder))))
    assert len(seen) == 1
