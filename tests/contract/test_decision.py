"""One suite over the plain twin and the compiled decision, held against the literal table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from paycore import _dedupe
from paycore.domain import decision
from paycore.domain.decision import Facts, Moment
from paycore.domain.verdicts import EXCESS_REASONS, NotifyOutcome, PaymentState, Recorded
from tests.support.decision_table import (
    EXPIRES_AT_MS,
    FIVE_MINUTES_MS,
    MADE_AT_MS,
    MAX_INT64,
    MIN_INT64,
    TABLE,
    TIME_CASES,
    Row,
    TimeCase,
    look_up,
    matching_row,
)

Decide = Callable[[Facts, Moment], int]

IMPLEMENTATIONS = {"twin": decision.decide, "compiled": _dedupe.decide}
RECORDED_OUTCOMES = sorted({NotifyOutcome.ACCEPTED, *EXCESS_REASONS})
EXPIRIES_MS = (MADE_AT_MS, EXPIRES_AT_MS, MAX_INT64)
GRACES_MS = (0, 2_000, MAX_INT64)
RECEIPTS_MS = (MIN_INT64, 0, MADE_AT_MS, EXPIRES_AT_MS, EXPIRES_AT_MS + 1, EXPIRES_AT_MS + 2_001, 10**12, MAX_INT64)
OPEN_AND_NEW = Facts(
    known=True,
    account_matches=True,
    recorded=Recorded.NONE,
    recorded_outcome=0,
    terms_match=True,
    state=PaymentState.OPEN,
    other_live=False,
    created_at_ms=MADE_AT_MS,
    expire_at_ms=EXPIRES_AT_MS,
)


@pytest.fixture(params=IMPLEMENTATIONS)
def decide(request: pytest.FixtureRequest) -> Decide:
    return IMPLEMENTATIONS[request.param]


def every_fact(expire_at_ms: int) -> Iterator[Facts]:
    """Every combination of the discrete facts."""
    records: list[tuple[int, int]] = [(recorded, 0) for recorded in Recorded if recorded != Recorded.SAME]
    records += [(Recorded.SAME, outcome) for outcome in RECORDED_OUTCOMES]
    for known, account, (recorded, outcome), terms, state, other_live in itertools.product(
        (True, False), (True, False), records, (True, False), PaymentState, (True, False)
    ):
        yield Facts(known, account, recorded, outcome, terms, state, other_live, MADE_AT_MS, expire_at_ms)


def every_moment(expire_at_ms: int) -> Iterator[Moment]:
    """Every edge of paid_at for every edge of receipt and grace."""
    for received_at_ms, grace_ms in itertools.product(RECEIPTS_MS, GRACES_MS):
        edges = {
            decision.ABSENT_MS,
            *(MADE_AT_MS - 1, MADE_AT_MS),
            *(expire_at_ms, expire_at_ms + 1, expire_at_ms + grace_ms, expire_at_ms + grace_ms + 1),
            *(received_at_ms + FIVE_MINUTES_MS, received_at_ms + FIVE_MINUTES_MS + 1),
            *(MIN_INT64, 0, MAX_INT64),
        }
        for paid_at_ms in sorted(edges):
            if MIN_INT64 <= paid_at_ms <= MAX_INT64:
                yield Moment(paid_at_ms, received_at_ms, grace_ms)


@pytest.mark.parametrize("expire_at_ms", EXPIRIES_MS)
def test_decision_for_every_combination_is_the_tables(decide: Decide, expire_at_ms: int) -> None:
    wrong = [
        (facts, moment, decide(facts, moment), look_up(facts, moment))
        for facts in every_fact(expire_at_ms)
        for moment in every_moment(expire_at_ms)
        if decide(facts, moment) != look_up(facts, moment)
    ]
    assert not wrong[:3]


@pytest.mark.parametrize("case", TIME_CASES, ids=lambda case: case.name)
def test_decision_at_an_edge_of_time_is_the_written_verdict(decide: Decide, case: TimeCase) -> None:
    moment = Moment(case.paid_at_ms, case.received_at_ms, case.late_grace_ms)
    assert decide(OPEN_AND_NEW, moment) == case.verdict
    assert look_up(OPEN_AND_NEW, moment) == case.verdict


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_table_row_is_reached_by_some_combination(row: Row) -> None:
    """No row is shadowed by those above it, so each is really compared."""
    assert any(
        matching_row(facts, moment) is row
        for facts in every_fact(EXPIRES_AT_MS)
        for moment in every_moment(EXPIRES_AT_MS)
    )


int64s = st.integers(MIN_INT64, MAX_INT64)
times_ms = st.one_of(
    int64s,
    st.sampled_from([MADE_AT_MS, EXPIRES_AT_MS]).flatmap(lambda edge: st.integers(edge - 3, edge + 3)),
    st.integers(MADE_AT_MS - 10, EXPIRES_AT_MS + 2 * FIVE_MINUTES_MS),
)


@given(
    paid_at_ms=times_ms,
    received_at_ms=times_ms,
    expire_at_ms=times_ms,
    created_at_ms=st.integers(0, MAX_INT64),
    grace_ms=st.one_of(st.integers(0, 5), st.integers(0, MAX_INT64)),
    other_live=st.booleans(),
)
def test_decision_at_any_int64_time_is_the_tables(
    paid_at_ms: int, received_at_ms: int, expire_at_ms: int, created_at_ms: int, grace_ms: int, other_live: bool
) -> None:
    facts = OPEN_AND_NEW._replace(created_at_ms=created_at_ms, expire_at_ms=expire_at_ms, other_live=other_live)
    moment = Moment(paid_at_ms, received_at_ms, grace_ms)
    verdict = look_up(facts, moment)
    assert decision.decide(facts, moment) == verdict
    assert _dedupe.decide(facts, moment) == verdict


@pytest.mark.parametrize("past_the_end_ms", [-1, 0, 1])
@given(expire_at_ms=int64s, grace_ms=st.one_of(st.integers(-5, -1), st.integers(MIN_INT64, -1)))
@example(expire_at_ms=MAX_INT64, grace_ms=MIN_INT64)
def test_decision_with_a_negative_grace_is_the_twins(past_the_end_ms: int, expire_at_ms: int, grace_ms: int) -> None:
    facts = OPEN_AND_NEW._replace(created_at_ms=MIN_INT64, expire_at_ms=expire_at_ms)
    paid_at_ms = min(max(MIN_INT64, expire_at_ms + grace_ms + past_the_end_ms), MAX_INT64)
    moment = Moment(paid_at_ms, MAX_INT64, grace_ms)
    assert _dedupe.decide(facts, moment) == decision.decide(facts, moment)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("recorded", 256),
        ("recorded", -1),
        ("state", 256),
        ("recorded_outcome", -1),
        ("recorded_outcome", 1 << 32),
        ("created_at_ms", MIN_INT64 - 1),
        ("expire_at_ms", MAX_INT64 + 1),
    ],
)
def test_compiled_decision_on_a_number_that_does_not_fit_raises(field: str, value: int) -> None:
    with pytest.raises(OverflowError):
        _dedupe.decide(Facts(**{**OPEN_AND_NEW._asdict(), field: value}), Moment(MADE_AT_MS, MADE_AT_MS, 0))
