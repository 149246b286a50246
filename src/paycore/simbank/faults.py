"""What can be made to go wrong at a bank, for orders named beforehand. Pure: no disk, no HTTP.

A fault is planted for one order number, for all orders of a subject, since the number is not known before Pay, or for
all that a bank is asked.
Its value is plain, or ``{"value": …, "times": n}`` for the next n occasions only. Faults of an operation are
objects keyed by operation: ``{"error_500": {"create": {"value": true, "times": 1}}}``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from paycore.simbank.requests import MAX_INT64

OPERATIONS = ("create", "query", "close", "refund", "query_refund")
"""What a merchant can ask of a bank; a synchronous charge is a ``create``."""

NONSENSE_KINDS = ("broken_json", "html", "empty", "wrong_types", "wrong_number", "missing_fields", "unknown_word")
MAX_DELAY_MS = 86_400_000


class FaultError(ValueError):
    """A fault that does not exist or has a value that it cannot have. The message names it and the rule."""


class Planted(NamedTuple):
    """One planted fault. ``times_left``: None for ever. ``name`` is ``fault`` or ``fault.operation``.

    With neither order_no nor subject it holds for everything.
    """

    planted_id: int
    bank: str
    order_no: str | None
    subject: str | None
    name: str
    value: object
    times_left: int | None


class Fault(NamedTuple):
    """One fault as asked for, before it has a place."""

    name: str
    value: object
    times: int | None


def _flag(value: object) -> bool:
    return value is True


def _whole(lowest: int, highest: int) -> Callable[[object], bool]:
    def fits(value: object) -> bool:
        return type(value) is int and lowest <= value <= highest

    return fits


def _flag_or_word(value: object) -> bool:
    return value is True or (isinstance(value, str) and 0 < len(value) <= 64)


def _nonsense(value: object) -> bool:
    return value in NONSENSE_KINDS


def _later_result(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {"result", "delay_ms"}:
        return False
    return value["result"] in ("success", "failure") and _whole(0, MAX_DELAY_MS)(value["delay_ms"])


_DELAY = (_whole(0, MAX_DELAY_MS), f"an integer of 0 to {MAX_DELAY_MS}")
_TRUE = (_flag, "true")
_LATER = (_later_result, f'{{"result": "success" or "failure", "delay_ms": 0 to {MAX_DELAY_MS}}}')
_Rule = tuple[Callable[[object], bool], str]

ORDER_FAULTS: Mapping[str, _Rule] = {
    "pay_twice_on_page": _TRUE,
    "take_after_close": _TRUE,
    "take_after_expiry": _TRUE,
    "paid_at_ms": (_whole(0, MAX_INT64), "an integer of at least 0"),
    "captured_amount_minor": (_whole(1, MAX_INT64), "an integer of at least 1"),
    "notify_amount_minor": (_whole(0, MAX_INT64), "an integer of at least 0"),
    "notify_wrong_amount_times": (_whole(1, 100), "an integer of 1 to 100"),
    "notify_delay_ms": _DELAY,
    "notify_times": (_whole(1, 100), "an integer of 1 to 100"),
    "notify_out_of_order": _TRUE,
    "notify_failure_after_success": _TRUE,
    "notify_never": _TRUE,
    "notify_held": _TRUE,
    "charge_accepted_only": _LATER,
    "refund_accepted_only": _LATER,
    "refund_closed": _TRUE,
}
"""Faults of an order: name -> (check, the rule in words)."""

OPERATION_FAULTS: Mapping[str, _Rule] = {
    "answer_delay_ms": _DELAY,
    "refuse": (_flag_or_word, "true or a code of at most 64 characters"),
    "hang_before_doing": _TRUE,
    "hang_after_doing": _TRUE,
    "error_500": _TRUE,
    "error_500_after_doing": _TRUE,
    "nonsense": (_nonsense, f"one of {', '.join(NONSENSE_KINDS)}"),
}
"""Faults of an operation, keyed by operation."""

REFUSABLE = frozenset({"create", "close", "refund"})


def parse(spec: Mapping[str, object]) -> list[Fault]:
    """Read faults as they travel in JSON. Raises FaultError."""
    faults = []
    for name, asked in spec.items():
        if name in ORDER_FAULTS:
            faults.append(_fault(name, asked, ORDER_FAULTS[name]))
        elif name in OPERATION_FAULTS:
            faults.extend(_operation_faults(name, asked))
        else:
            raise FaultError(f"faults.{name}: no such fault")
    return faults


def _operation_faults(name: str, asked: object) -> Iterable[Fault]:
    allowed = [operation for operation in OPERATIONS if name != "refuse" or operation in REFUSABLE]
    if not isinstance(asked, dict) or not asked or not asked.keys() <= set(allowed):
        raise FaultError(f"faults.{name}: must be an object keyed by {', '.join(allowed)}")
    return [_fault(f"{name}.{operation}", value, OPERATION_FAULTS[name]) for operation, value in asked.items()]


def _fault(name: str, asked: object, rule: _Rule) -> Fault:
    times = None
    if isinstance(asked, dict) and asked.keys() == {"value", "times"}:
        times = asked["times"]
        asked = asked["value"]
        if not _whole(1, MAX_INT64)(times):
            raise FaultError(f"faults.{name}.times: must be an integer of at least 1")
    fits, words = rule
    if not fits(asked):
        raise FaultError(f"faults.{name}: must be {words}")
    return Fault(name, asked, times)


class FaultBox:
    """The faults that hold for one order during one occasion. What is taken is counted, for the disk to count down.

    A fault for the order's number wins over one for its subject, that over one for everything, and one given for this
    occasion over all.
    """

    def __init__(self, planted: Iterable[Planted], order_no: str, subject: str | None, once: Iterable[Fault]) -> None:
        planted = list(planted)
        for_all = [one for one in planted if one.order_no is None and one.subject is None]
        by_subject = [one for one in planted if subject is not None and one.subject == subject]
        by_number = [one for one in planted if one.order_no == order_no]
        self._planted = {one.name: one for one in for_all + by_subject + by_number if one.times_left != 0}
        self._once = {fault.name: fault.value for fault in once}
        self.used: list[Planted] = []

    def take(self, name: str) -> object:
        """Return the fault's value, or None where it does not hold."""
        if name in self._once:
            return self._once[name]
        found = self._planted.get(name)
        if found is None:
            return None
        self.used.append(found)
        return found.value

    def take_int(self, name: str) -> int | None:
        """Return the value of a fault whose value is an integer."""
        value = self.take(name)
        assert value is None or isinstance(value, int)
        return value

    def take_later(self, name: str) -> "LaterResult | None":
        """Return the value of a fault that postpones a result."""
        value = self.take(name)
        if not isinstance(value, dict):
            return None
        return LaterResult(value["result"] == "success", value["delay_ms"])


class LaterResult(NamedTuple):
    """What an operation that was only accepted comes to, and after how long."""

    succeeds: bool
    delay_ms: int


class Behaviour(NamedTuple):
    """How one operation answers once it is done, or why it is not done."""

    hang: bool = False
    error: bool = False
    delay_ms: int = 0
    nonsense: str = ""


def before_doing(box: FaultBox, operation: str) -> Behaviour:
    """What keeps an operation from being done at all. The default: nothing."""
    if box.take(f"hang_before_doing.{operation}"):
        return Behaviour(hang=True)
    return Behaviour(error=bool(box.take(f"error_500.{operation}")))


def after_doing(box: FaultBox, operation: str) -> Behaviour:
    """How an operation that was done is answered. The default: at once, and as it went."""
    if box.take(f"hang_after_doing.{operation}"):
        return Behaviour(hang=True)
    if box.take(f"error_500_after_doing.{operation}"):
        return Behaviour(error=True)
    return Behaviour(
        delay_ms=box.take_int(f"answer_delay_ms.{operation}") or 0,
        nonsense=str(box.take(f"nonsense.{operation}") or ""),
    )
