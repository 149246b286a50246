"""The bank's arithmetic and decisions, as tables."""

import pytest

from paycore.simbank.amounts import in_major_units
from paycore.simbank.books import (
    ORDER_TERMS,
    REFUND_TERMS,
    Capture,
    Notice,
    Order,
    OrderState,
    Refund,
    RefundState,
    close_answer,
    differing_terms,
    failure_notice,
    kept_minor,
    open_order,
    open_refund,
    success_notices,
    why_not_payable,
)
from paycore.simbank.faults import FaultBox, parse
from paycore.simbank.requests import OrderRequest, RefundRequest

NOW_MS = 1_800_000_000_000


def box(**faults: object) -> FaultBox:
    return FaultBox([], "1001", "Tea", parse(faults))


def asked(**terms: object) -> OrderRequest:
    return OrderRequest.model_validate(
        {
            "order_no": "1001",
            "amount_minor": 1234,
            "currency": "CNY",
            "subject": "Tea",
            "return_url": "",
            "method": "redirect",
            "expire_at_ms": NOW_MS + 1,
        }
        | terms
    )


def order(state: OrderState = OrderState.NOT_PAID, expire_at_ms: int = NOW_MS + 1) -> Order:
    return open_order("bank_a", asked(), NOW_MS, box())._replace(state=state, expire_at_ms=expire_at_ms)


def refund(refund_no: str, amount_minor: int, state: RefundState, trade_no: str = "T1") -> Refund:
    return Refund("bank_a", refund_no, "1001", trade_no, amount_minor, "CNY", NOW_MS, state, "", None, None)


CAPTURES = [Capture("T1", "bank_a", "1001", 1234, "CNY", NOW_MS), Capture("T2", "bank_a", "1001", 1234, "CNY", NOW_MS)]

OPENED: list[tuple[dict[str, object], dict[str, object], OrderState, str, int | None]] = [
    ({}, {}, OrderState.NOT_PAID, "", None),
    ({"method": "charge"}, {}, OrderState.NOT_PAID, "", None),
    ({"expire_at_ms": NOW_MS}, {}, OrderState.FAILED, "EXPIRED", None),
    ({}, {"refuse": {"create": True}}, OrderState.FAILED, "REFUSED", None),
    ({}, {"refuse": {"create": "NO_CREDIT"}}, OrderState.FAILED, "NO_CREDIT", None),
    ({}, {"refuse": {"close": True}}, OrderState.NOT_PAID, "", None),
    (
        {"method": "charge"},
        {"charge_accepted_only": {"result": "success", "delay_ms": 7}},
        OrderState.IN_PROGRESS,
        "",
        NOW_MS + 7,
    ),
    ({}, {"charge_accepted_only": {"result": "success", "delay_ms": 7}}, OrderState.NOT_PAID, "", None),
]


@pytest.mark.parametrize(("terms", "faults", "state", "code", "settle_at_ms"), OPENED)
def test_open_order_by_terms_and_faults_has_its_state(
    terms: dict[str, object], faults: dict[str, object], state: OrderState, code: str, settle_at_ms: int | None
) -> None:
    opened = open_order("bank_a", asked(**terms), NOW_MS, box(**faults))
    assert (opened.state, opened.code, opened.settle_at_ms) == (state, code, settle_at_ms)


@pytest.mark.parametrize(
    ("term", "value"),
    [
        ("amount_minor", 1235),
        ("currency", "USD"),
        ("subject", "Coffee"),
        ("return_url", "http://shop.test/"),
        ("method", "qr"),
        ("expire_at_ms", NOW_MS + 2),
    ],
)
def test_differing_terms_of_an_order_names_the_one_that_differs(term: str, value: object) -> None:
    assert differing_terms(order(), asked(**{term: value}), ORDER_TERMS) == [term]
    assert differing_terms(order(), asked(), ORDER_TERMS) == []


@pytest.mark.parametrize(
    ("term", "value"), [("order_no", "1002"), ("trade_no", "T2"), ("amount_minor", 1), ("currency", "USD")]
)
def test_differing_terms_of_a_refund_names_the_one_that_differs(term: str, value: object) -> None:
    terms = {"refund_no": "R1", "order_no": "1001", "trade_no": "T1", "amount_minor": 1234, "currency": "CNY"}
    recorded = refund("R1", 1234, RefundState.REFUNDED)
    assert differing_terms(recorded, RefundRequest.model_validate(terms | {term: value}), REFUND_TERMS) == [term]


PAYABLE: list[tuple[OrderState, int, dict[str, object], str]] = [
    (OrderState.NOT_PAID, NOW_MS + 1, {}, ""),
    (OrderState.NOT_PAID, NOW_MS, {}, "EXPIRED"),
    (OrderState.NOT_PAID, NOW_MS, {"take_after_close": True}, "EXPIRED"),
    (OrderState.NOT_PAID, NOW_MS, {"take_after_expiry": True}, ""),
    (OrderState.CLOSED, NOW_MS + 1, {}, "CLOSED"),
    (OrderState.CLOSED, NOW_MS + 1, {"take_after_expiry": True}, "CLOSED"),
    (OrderState.CLOSED, NOW_MS + 1, {"take_after_close": True}, ""),
    (OrderState.CLOSED, NOW_MS, {"take_after_close": True}, ""),
    (OrderState.PAID, NOW_MS + 1, {"take_after_close": True, "pay_twice_on_page": True}, "ALREADY_PAID"),
    (OrderState.FAILED, NOW_MS + 1, {"take_after_close": True}, "FAILED"),
    (OrderState.IN_PROGRESS, NOW_MS + 1, {}, "IN_PROGRESS"),
]


@pytest.mark.parametrize(("state", "expire_at_ms", "faults", "code"), PAYABLE)
def test_why_not_payable_by_state_expiry_and_faults_tells(
    state: OrderState, expire_at_ms: int, faults: dict[str, object], code: str
) -> None:
    assert why_not_payable(order(state, expire_at_ms), NOW_MS, box(**faults)) == code


@pytest.mark.parametrize(
    ("state", "answer"),
    [
        (OrderState.NOT_PAID, "CLOSED"),
        (OrderState.CLOSED, "CLOSED"),
        (OrderState.FAILED, "CLOSED"),
        (OrderState.PAID, "ALREADY_PAID"),
        (OrderState.IN_PROGRESS, "IN_PROGRESS"),
    ],
)
def test_close_answer_by_state_tells(state: OrderState, answer: str) -> None:
    assert close_answer(state) == answer


REFUNDS = [
    refund("R1", 1000, RefundState.REFUNDED),
    refund("R2", 200, RefundState.ACCEPTED),
    refund("R3", 1234, RefundState.REFUSED),
    refund("R4", 1234, RefundState.REFUNDED, trade_no="T2"),
]
REFUND_ROWS: list[tuple[dict[str, object], dict[str, object], RefundState, str]] = [
    ({"amount_minor": 34}, {}, RefundState.REFUNDED, ""),
    ({"amount_minor": 35}, {}, RefundState.REFUSED, "OVER_CAPTURED"),
    ({"amount_minor": 1, "trade_no": "T2"}, {}, RefundState.REFUSED, "OVER_CAPTURED"),
    ({"amount_minor": 1, "trade_no": "T3"}, {}, RefundState.REFUSED, "TRADE_NOT_EXIST"),
    ({"amount_minor": 1, "currency": "USD"}, {}, RefundState.REFUSED, "CURRENCY_DIFFERS"),
    ({"amount_minor": 1}, {"refuse": {"refund": True}}, RefundState.REFUSED, "REFUSED"),
    (
        {"amount_minor": 1},
        {"refund_accepted_only": {"result": "failure", "delay_ms": 5}},
        RefundState.ACCEPTED,
        "",
    ),
    (
        {"amount_minor": 35},
        {"refund_accepted_only": {"result": "success", "delay_ms": 5}},
        RefundState.REFUSED,
        "OVER_CAPTURED",
    ),
]


@pytest.mark.parametrize(("terms", "faults", "state", "code"), REFUND_ROWS)
def test_open_refund_by_what_is_left_has_its_state(
    terms: dict[str, object], faults: dict[str, object], state: RefundState, code: str
) -> None:
    request = {"refund_no": "R9", "order_no": "1001", "trade_no": "T1", "amount_minor": 1, "currency": "CNY"} | terms
    opened = open_refund("bank_a", RefundRequest.model_validate(request), CAPTURES, REFUNDS, NOW_MS, box(**faults))
    assert (opened.state, opened.code) == (state, code)


def test_kept_minor_counts_only_money_that_moved() -> None:
    assert kept_minor(CAPTURES, REFUNDS) == 2 * 1234 - 1000 - 1234
    assert kept_minor([], REFUNDS) == 0


def told(notices: list[Notice]) -> list[tuple[str, str, int, int]]:
    return [(one.result, one.trade_no, one.amount_minor, one.copies) for one in notices]


T1, T2 = ("SUCCESS", "T1", 1234, 1), ("SUCCESS", "T2", 1234, 1)
NOTICES: list[tuple[dict[str, object], list[tuple[str, str, int, int]]]] = [
    ({}, [T1, T2]),
    ({"notify_out_of_order": True}, [T2, T1]),
    ({"notify_times": 3}, [("SUCCESS", "T1", 1234, 3), ("SUCCESS", "T2", 1234, 3)]),
    ({"notify_failure_after_success": True}, [T1, T2, ("FAILURE", "", 1234, 1)]),
    ({"notify_failure_after_success": True, "notify_out_of_order": True}, [("FAILURE", "", 1234, 1), T2, T1]),
    ({"notify_amount_minor": 1}, [("SUCCESS", "T1", 1, 1), ("SUCCESS", "T2", 1, 1)]),
    (
        {"notify_amount_minor": 1, "notify_wrong_amount_times": 2},
        [("SUCCESS", "T1", 1, 2), T1, ("SUCCESS", "T2", 1, 2), T2],
    ),
    ({"notify_wrong_amount_times": 2}, [T1, T2]),
]


@pytest.mark.parametrize(("faults", "expected"), NOTICES)
def test_success_notices_by_faults_tell(faults: dict[str, object], expected: list[tuple[str, str, int, int]]) -> None:
    assert told(success_notices(CAPTURES, NOW_MS, box(**faults))) == expected


@pytest.mark.parametrize(
    ("faults", "due_at_ms", "held"),
    [
        ({}, NOW_MS, False),
        ({"notify_delay_ms": 5}, NOW_MS + 5, False),
        ({"notify_never": True, "notify_delay_ms": 5}, None, False),
        ({"notify_held": True}, NOW_MS, True),
    ],
)
def test_notices_by_faults_fall_due(faults: dict[str, object], due_at_ms: int | None, held: bool) -> None:
    success = success_notices(CAPTURES[:1], NOW_MS, box(**faults))[0]
    failure = failure_notice(order(), NOW_MS, box(**faults))
    assert [(one.due_at_ms, one.held) for one in (success, failure)] == [(due_at_ms, held)] * 2


@pytest.mark.parametrize(
    ("amount_minor", "currency", "text"),
    [
        (1234, "CNY", "12.34"),
        (5, "CNY", "0.05"),
        (100, "USD", "1.00"),
        (1234, "JPY", "1234"),
        (1234, "KWD", "1.234"),
        (2**63 - 1, "CNY", "92233720368547758.07"),
    ],
)
def test_in_major_units_by_currency_places_the_point(amount_minor: int, currency: str, text: str) -> None:
    assert in_major_units(amount_minor, currency) == text
