"""Loading rows of the database: one suite over the compiled index and its plain twin."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from paycore import _dedupe
from paycore.domain.ids import ID_EPOCH_MS
from paycore.domain.money import CURRENCY_CODES
from paycore.domain.plain_index import PlainIndex
from paycore.domain.verdicts import NotifyOutcome, PaymentState
from paycore.store.rows import ChannelOrderRow, ExcessRow, OutcomeRow, PaymentRecord, PaymentRow
from paycore.usecases.judge import index_payment

AnyIndex = _dedupe.Index | PlainIndex
IMPLEMENTATIONS: dict[str, Callable[[], AnyIndex]] = {"compiled": _dedupe.Index, "twin": PlainIndex}

OPEN, PAID, CLOSED = PaymentState.OPEN, PaymentState.PAID, PaymentState.CLOSED
ACCOUNTS = {("wechat", "m1"): 11, ("alipay", "m1"): 12, ("bank", "m2"): 255}
CNY = CURRENCY_CODES["CNY"]
STAMP = (1, 1, 1)

PaymentTuple = tuple[int, int, str | int, int, int | None, int | None]
AttemptTuple = tuple[int, int, str, str]
CaptureTuple = tuple[int, int]


@pytest.fixture(params=IMPLEMENTATIONS)
def index(request: pytest.FixtureRequest) -> AnyIndex:
    return IMPLEMENTATIONS[request.param]()


def load(
    index: AnyIndex,
    payments: list[PaymentTuple],
    attempts: list[AttemptTuple] | None = None,
    captures: list[CaptureTuple] | None = None,
) -> None:
    index.load(payments, attempts or [], captures or [], currencies=CURRENCY_CODES, accounts=ACCOUNTS)


def payment(
    payment_id: int,
    amount_minor: int = 500,
    currency: str | int = "CNY",
    state: int | None = None,
    kept_attempt: int | None = None,
) -> PaymentTuple:
    return payment_id, amount_minor, currency, expiry(payment_id), state, kept_attempt


def expiry(payment_id: int) -> int:
    return (payment_id >> 22) + ID_EPOCH_MS + 60_000


def held(index: AnyIndex, payment_id: int) -> tuple[Any, ...]:
    entry = index.get(payment_id)
    assert entry is not None
    return tuple(entry)


ID = 1_000 << 22 | 9

LOADED = [
    ("open", payment(ID), [], [], (500, CNY, expiry(ID), OPEN, 0, 0, 0, (), False)),
    ("one_attempt", payment(ID), [(ID, 1, "alipay", "m1")], [], (500, CNY, expiry(ID), OPEN, 0, 1, 0, (12,), False)),
    (
        "missing_attempt_has_code_0",
        payment(ID),
        [(ID, 3, "bank", "m2")],
        [],
        (500, CNY, expiry(ID), OPEN, 0, 3, 0, (0, 0, 255), False),
    ),
    (
        "attempts_in_any_order",
        payment(ID),
        [(ID, 2, "alipay", "m1"), (ID, 63, "nobody", ""), (ID, 1, "wechat", "m1")],
        [],
        (500, CNY, expiry(ID), OPEN, 0, 63, 0, (11, 12, 0), False),
    ),
    (
        "account_not_configured",
        payment(ID),
        [(ID, 1, "wechat", "m2")],
        [],
        (500, CNY, expiry(ID), OPEN, 0, 1, 0, (0,), False),
    ),
    ("currency_by_code", payment(ID, currency=7), [], [], (500, 7, expiry(ID), OPEN, 0, 0, 0, (), False)),
    ("currency_unknown_asks", payment(ID, currency="XXX"), [], [], (0, 0, 0, OPEN, 0, 0, 0, (), True)),
    ("amount_too_large_asks", payment(ID, amount_minor=1 << 48), [], [], (0, 0, 0, OPEN, 0, 0, 0, (), True)),
    (
        "paid_sets_the_kept_bit",
        payment(ID, state=PAID, kept_attempt=2),
        [(ID, 1, "wechat", "m1"), (ID, 2, "wechat", "m1")],
        [],
        (500, CNY, expiry(ID), PAID, 2, 2, 0b10, (11, 11), False),
    ),
    (
        "captures_set_bits",
        payment(ID, state=PAID, kept_attempt=1),
        [(ID, 1, "wechat", "m1")],
        [(ID, 63), (ID, 3), (ID, 3)],
        (500, CNY, expiry(ID), PAID, 1, 1, 1 << 62 | 0b101, (11,), False),
    ),
    (
        "closed_with_0_kept",
        payment(ID, state=CLOSED, kept_attempt=0),
        [],
        [(ID, 1)],
        (500, CNY, expiry(ID), CLOSED, 0, 0, 1, (), False),
    ),
]


@pytest.mark.parametrize(
    ("row", "attempts", "captures", "expected"), [case[1:] for case in LOADED], ids=[c[0] for c in LOADED]
)
def test_load_of_rows_gives_the_entry(
    index: AnyIndex,
    row: PaymentTuple,
    attempts: list[AttemptTuple],
    captures: list[CaptureTuple],
    expected: tuple[Any, ...],
) -> None:
    load(index, [row], attempts, captures)
    assert held(index, ID) == (ID, *expected)


def record_of(row: PaymentTuple, attempts: list[AttemptTuple], captures: list[CaptureTuple]) -> PaymentRecord:
    """The record that the store would read from the same rows."""
    payment_id, amount_minor, currency, expire_at_ms, state, kept_attempt = row
    asked = PaymentRow(payment_id, "shop", "n", amount_minor, str(currency), "", "", "", expire_at_ms, *STAMP)
    record = PaymentRecord(asked)
    for _, attempt, channel, account in attempts:
        record.attempts[attempt] = ChannelOrderRow(
            payment_id, attempt, channel, account, 1, 9, 1, 9, "", "", "", None, None, 0, "", *STAMP
        )
    if state is not None:
        record.outcome = OutcomeRow(payment_id, state, kept_attempt or 0, "T", 5, "CNY", None, 9, 1, 0, 0, *STAMP)
    record.excess = [
        ExcessRow(payment_id, attempt, "U", NotifyOutcome.DUPLICATE, 5, "CNY", None, 9, 1, *STAMP)
        for _, attempt in captures
    ]
    return record


@pytest.mark.parametrize("seed", range(20))
def test_load_of_many_rows_is_what_the_use_case_puts_for_each_record(index: AnyIndex, seed: int) -> None:
    chance = random.Random(seed)
    ids = sorted(chance.sample(range(1, 5_000), 300))
    one_by_one = PlainIndex()
    payments, attempts, captures = [], [], []
    for payment_id in ids:
        state = chance.choice([None, None, PAID, CLOSED])
        kept = chance.randrange(1, 4) if state == PAID else chance.choice([None, 0])
        row = payment(payment_id, chance.randrange(1, 9), chance.choice(["CNY", "JPY", "XXX"]), state, kept)
        tries = [
            (payment_id, attempt, *chance.choice([*ACCOUNTS, ("gone", "m1")]))
            for attempt in chance.sample(range(1, 64), chance.choice([0, 1, 1, 2, 5]))
        ]
        judged = [(payment_id, chance.randrange(1, 64)) for _ in range(chance.choice([0, 0, 0, 1, 2]))]
        index_payment(
            one_by_one,  # type: ignore[arg-type]  # the twin stands in for the index
            record_of(row, tries, judged),
            lambda channel, account: ACCOUNTS.get((channel, account), 0),
        )
        payments.append(row)
        attempts += tries
        captures += judged
    load(index, payments, attempts, captures)
    assert [index.get(key) for key in range(5_000)] == [one_by_one.get(key) for key in range(5_000)]
    assert len(index) == 300


def test_load_skips_attempts_and_captures_of_payments_that_are_not_asked_for(index: AnyIndex) -> None:
    attempts = [(key, 1, "wechat", "m1") for key in (1, 5, 5, 7, 9, 12)]
    load(index, [payment(5), payment(9)], attempts, [(4, 1), (5, 2), (6, 3), (10, 4)])
    assert [index.get(key) is not None for key in (1, 5, 7, 9, 12)] == [False, True, False, True, False]
    assert [held(index, key)[6:9] for key in (5, 9)] == [(1, 0b10, (11,)), (1, 0, (11,))]


def test_load_replaces_what_was_cached_and_is_undone_by_rollback(index: AnyIndex) -> None:
    load(index, [payment(5, 1), payment(6, 2)])
    before = [index.get(key) for key in range(10)]
    index.begin()
    load(index, [payment(5, 3, state=PAID, kept_attempt=1), payment(7, 4)], [(5, 1, "bank", "m2")])
    assert held(index, 5)[1:9] == (3, CNY, expiry(5), PAID, 1, 1, 1, (255,))
    assert len(index) == 3
    index.rollback()
    assert [index.get(key) for key in range(10)] == before


def test_load_of_nothing_does_nothing(index: AnyIndex) -> None:
    load(index, [], [(1, 1, "wechat", "m1")], [(1, 1)])
    assert len(index) == 0


UNSORTED: list[tuple[list[PaymentTuple], list[AttemptTuple], list[CaptureTuple]]] = [
    ([payment(5), payment(9), payment(8)], [], []),
    ([payment(5), payment(9), payment(9)], [], []),
    ([payment(5), payment(9)], [(8, 1, "wechat", "m1"), (7, 1, "wechat", "m1")], []),
    ([payment(5), payment(9)], [(9, 1, "wechat", "m1"), (5, 1, "wechat", "m1")], []),
    ([payment(5), payment(9)], [], [(9, 1), (8, 1)]),
]


@pytest.mark.parametrize(("payments", "attempts", "captures"), UNSORTED)
def test_load_of_unsorted_rows_is_refused_where_it_shows(
    index: AnyIndex, payments: list[PaymentTuple], attempts: list[AttemptTuple], captures: list[CaptureTuple]
) -> None:
    with pytest.raises(ValueError, match=r"must be sorted by payment_id, but (. comes after 9|7 comes after 8)"):
        load(index, payments, attempts, captures)
    assert 5 in index
    load(index, [payment(6)])
    assert 6 in index


@pytest.mark.parametrize(
    ("row", "attempts", "captures", "message"),
    [
        (payment(0), [], [], "payment_id must be 1 to"),
        (payment(-4), [], [], "payment_id must be 1 to"),
        (payment(5, currency=256), [], [], "currency_code must be 0 to 255"),
        (payment(5, state=4), [], [], "state must be 1 to 3"),
        (payment(5, state=PAID), [], [], "kept_attempt of a paid payment must be 1 to 63"),
        (payment(5, state=CLOSED, kept_attempt=1), [], [], "kept_attempt of a payment that is not paid"),
        (payment(5, kept_attempt=1), [], [], "kept_attempt of a payment that is not paid"),
        (payment(5), [(5, 0, "wechat", "m1")], [], "attempt must be 1 to 63"),
        (payment(5), [(5, 64, "wechat", "m1")], [], "attempt must be 1 to 63"),
        (payment(5), [], [(5, 64)], "attempt must be 1 to 63"),
        (payment(5), [], [(5, 0)], "attempt must be 1 to 63"),
    ],
)
def test_load_of_a_value_out_of_range_names_it(
    index: AnyIndex, row: PaymentTuple, attempts: list[AttemptTuple], captures: list[CaptureTuple], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        load(index, [row], attempts, captures)
    assert len(index) == 0


@pytest.mark.parametrize("code", [-1, 256])
def test_load_with_an_impossible_account_code_is_refused(index: AnyIndex, code: int) -> None:
    with pytest.raises(ValueError, match="account code must be 0 to 255"):
        index.load([payment(5)], [(5, 1, "a", "b")], [], currencies=CURRENCY_CODES, accounts={("a", "b"): code})
    assert len(index) == 0


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (([[5, 1, "CNY", 9, None, None]], [], []), TypeError),
        (([(5, 1, "CNY", 9, None)], [], []), IndexError),
        (([(5, 1, None, 9, None, None)], [], []), TypeError),
        (([("5", 1, "CNY", 9, None, None)], [], []), TypeError),
        (([(1 << 63, 1, "CNY", 9, None, None)], [], []), OverflowError),
        (([payment(5)], [[5, 1, "a", "b"]], []), TypeError),
        (([payment(5)], [(5, 1, "a")], []), IndexError),
        (([payment(5)], [], [(5,)]), IndexError),
        (([payment(5)], [()], []), IndexError),
        ((None, [], []), TypeError),
    ],
)
def test_compiled_load_of_rows_of_another_shape_is_refused(rows: tuple[Any, Any, Any], error: type[Exception]) -> None:
    index = _dedupe.Index()
    with pytest.raises(error):
        index.load(*rows, currencies=CURRENCY_CODES, accounts=ACCOUNTS)
    assert len(index) == 0


def test_load_takes_tuples_and_iterators_of_rows() -> None:
    index = _dedupe.Index()
    index.load((payment(5), payment(6)), iter([(5, 1, "bank", "m2")]), ((6, 2),), currencies={}, accounts=ACCOUNTS)
    assert (held(index, 5)[6:9], held(index, 6)[6:9]) == ((1, 0, (255,)), (0, 0b10, ()))
