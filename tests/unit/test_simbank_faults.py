"""Planting, matching and using up faults."""

import pytest

from paycore.simbank.faults import (
    OPERATION_FAULTS,
    ORDER_FAULTS,
    Behaviour,
    Fault,
    FaultBox,
    FaultError,
    LaterResult,
    Planted,
    after_doing,
    before_doing,
    parse,
)


def planted(name: str, value: object, order_no: str | None = None, subject: str | None = None) -> Planted:
    return Planted(1, "bank_a", order_no, subject, name, value, None)


VALID: list[tuple[dict[str, object], list[Fault]]] = [
    ({}, []),
    ({"pay_twice_on_page": True}, [Fault("pay_twice_on_page", True, None)]),
    ({"pay_twice_on_page": {"value": True, "times": 2}}, [Fault("pay_twice_on_page", True, 2)]),
    ({"notify_delay_ms": 0, "notify_times": 3}, [Fault("notify_delay_ms", 0, None), Fault("notify_times", 3, None)]),
    (
        {"error_500": {"create": True, "close": {"value": True, "times": 1}}},
        [Fault("error_500.create", True, None), Fault("error_500.close", True, 1)],
    ),
    ({"refuse": {"refund": "NO_BALANCE"}}, [Fault("refuse.refund", "NO_BALANCE", None)]),
    (
        {"charge_accepted_only": {"result": "failure", "delay_ms": 9}},
        [Fault("charge_accepted_only", {"result": "failure", "delay_ms": 9}, None)],
    ),
]


@pytest.mark.parametrize(("spec", "faults"), VALID)
def test_parse_valid_faults_reads_them(spec: dict[str, object], faults: list[Fault]) -> None:
    assert parse(spec) == faults


INVALID: list[tuple[dict[str, object], str]] = [
    ({"explode": True}, "faults.explode: no such fault"),
    ({"pay_twice_on_page": 1}, "faults.pay_twice_on_page: must be true"),
    ({"pay_twice_on_page": {"value": True, "times": 0}}, "faults.pay_twice_on_page.times: must be an integer"),
    ({"notify_delay_ms": -1}, "faults.notify_delay_ms: must be an integer of 0"),
    ({"notify_delay_ms": True}, "faults.notify_delay_ms: must be an integer of 0"),
    ({"notify_delay_ms": 1.0}, "faults.notify_delay_ms: must be an integer of 0"),
    ({"notify_times": 0}, "faults.notify_times: must be an integer of 1"),
    ({"error_500": True}, "faults.error_500: must be an object keyed by create, query, close"),
    ({"error_500": {}}, "faults.error_500: must be an object"),
    ({"error_500": {"charge": True}}, "faults.error_500: must be an object keyed by create"),
    ({"refuse": {"query": True}}, "faults.refuse: must be an object keyed by create, close, refund"),
    ({"refuse": {"create": ""}}, "faults.refuse.create: must be true or a code"),
    ({"nonsense": {"query": "gibberish"}}, "faults.nonsense.query: must be one of broken_json"),
    ({"charge_accepted_only": {"result": "maybe", "delay_ms": 1}}, "faults.charge_accepted_only: must be"),
    ({"charge_accepted_only": {"result": [], "delay_ms": 1}}, "faults.charge_accepted_only: must be"),
    ({"charge_accepted_only": True}, "faults.charge_accepted_only: must be"),
]


@pytest.mark.parametrize(("spec", "message"), INVALID)
def test_parse_invalid_fault_is_refused_naming_it(spec: dict[str, object], message: str) -> None:
    with pytest.raises(FaultError) as refused:
        parse(spec)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("order_no", "subject", "value"),
    [("1001", "Tea", "by number"), ("1002", "Tea", "by subject"), ("1002", "Coffee", None), ("1002", None, None)],
)
def test_fault_box_by_number_and_subject_takes_the_closest(order_no: str, subject: str | None, value: object) -> None:
    faults = [
        planted("refuse.create", "by number", order_no="1001"),
        planted("refuse.create", "by subject", subject="Tea"),
    ]
    assert FaultBox(faults, order_no, subject, []).take("refuse.create") == value


def test_fault_box_fault_for_the_occasion_wins_and_uses_up_nothing() -> None:
    box = FaultBox([planted("paid_at_ms", 1, order_no="1001")], "1001", "Tea", [Fault("paid_at_ms", 2, None)])
    assert (box.take("paid_at_ms"), box.used) == (2, [])


def test_fault_box_taken_faults_are_used_and_others_are_not() -> None:
    faults = [planted("notify_never", True, subject="Tea"), planted("notify_held", True, subject="Tea")]
    box = FaultBox(faults, "1001", "Tea", [])
    box.take("notify_held")
    assert [one.name for one in box.used] == ["notify_held"]


def test_fault_box_used_up_fault_holds_no_more() -> None:
    used_up = planted("notify_never", True, subject="Tea")._replace(times_left=0)
    assert FaultBox([used_up], "1001", "Tea", []).take("notify_never") is None


def test_fault_box_later_result_is_read() -> None:
    box = FaultBox([], "1001", "Tea", parse({"refund_accepted_only": {"result": "success", "delay_ms": 9}}))
    assert box.take_later("refund_accepted_only") == LaterResult(True, 9)
    assert box.take_later("charge_accepted_only") is None


BEHAVIOURS: list[tuple[dict[str, object], Behaviour, Behaviour]] = [
    ({}, Behaviour(), Behaviour()),
    ({"hang_before_doing": {"create": True}}, Behaviour(hang=True), Behaviour()),
    ({"error_500": {"create": True}}, Behaviour(error=True), Behaviour()),
    ({"hang_after_doing": {"create": True}}, Behaviour(), Behaviour(hang=True)),
    ({"error_500_after_doing": {"create": True}}, Behaviour(), Behaviour(error=True)),
    ({"answer_delay_ms": {"create": 9}}, Behaviour(), Behaviour(delay_ms=9)),
    ({"nonsense": {"create": "html"}}, Behaviour(), Behaviour(nonsense="html")),
    ({"error_500": {"query": True}, "nonsense": {"close": "html"}}, Behaviour(), Behaviour()),
]


@pytest.mark.parametrize(("faults", "before", "after"), BEHAVIOURS)
def test_behaviour_of_an_operation_by_its_faults_is(
    faults: dict[str, object], before: Behaviour, after: Behaviour
) -> None:
    box = FaultBox([], "1001", "Tea", parse(faults))
    assert (before_doing(box, "create"), after_doing(box, "create")) == (before, after)


def test_fault_tables_do_not_share_a_name() -> None:
    assert not ORDER_FAULTS.keys() & OPERATION_FAULTS.keys()
