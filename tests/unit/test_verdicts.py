"""The enumerations are numbered alike in Python, in Cython and on the wire."""

from __future__ import annotations

import re
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest
from google.protobuf.descriptor import EnumDescriptor

import paycore
from paycore import _dedupe
from paycore.domain import decision, ids, plain_index, verdicts
from paycore.v1 import payment_pb2, payment_service_pb2

PACKAGE = Path(paycore.__file__).parent
INSIDE = {"VerdictFlag", "Recorded"}
"""Never sent: only Python and Cython know them."""
ONLY_IN_THE_DATABASE = {"TaskKind"}
"""What repair has to come back to: neither sent nor known to the index."""
ONLY_ON_THE_WIRE = {"PayNextAction"}
"""Tells a caller of Pay what to do next; nothing inside is decided by it."""


def python_enums() -> dict[str, dict[str, int]]:
    """Every enumeration of domain/verdicts.py: its name -> members."""
    return {
        name: {str(member.name): int(member) for member in thing}
        for name, thing in vars(verdicts).items()
        if isinstance(thing, type) and issubclass(thing, IntEnum | IntFlag) and thing not in {IntEnum, IntFlag}
    }


def cython_enums() -> dict[str, dict[str, int]]:
    """Every named enumeration of _dedupe.pxd: its name -> members as they are written there."""
    text = (PACKAGE / "_dedupe.pxd").read_text()
    return {
        block["name"]: {
            member["name"]: int(member["value"], 0)
            for member in re.finditer(r"^ +(?P<name>\w+) = (?P<value>\w+)$", block["body"], re.MULTILINE)
        }
        for block in re.finditer(r"^cdef enum (?P<name>\w+):\n(?P<body>(?: .*\n)+)", text, re.MULTILINE)
    }


def wire_enums() -> dict[str, dict[str, int]]:
    """Every top-level enumeration of the protobuf package: its name -> members as they are sent."""
    found: dict[str, dict[str, int]] = {}
    for module in (payment_pb2, payment_service_pb2):
        enum: EnumDescriptor
        for name, enum in module.DESCRIPTOR.enum_types_by_name.items():
            found[name] = {value.name: value.number for value in enum.values}
    return found


def prefixed(name: str, members: dict[str, int]) -> dict[str, int]:
    """Members as they are named where names are global: NOTIFY_OUTCOME_ACCEPTED."""
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()
    return {f"{prefix}_{member}": value for member, value in members.items()}


# A flag's zero has a name in Python, but is no member that iteration gives.
PYTHON = {**python_enums(), "VerdictFlag": {"NONE": 0, **python_enums()["VerdictFlag"]}}


@pytest.mark.parametrize("name", sorted(PYTHON))
def test_enum_of_python_is_numbered_alike_elsewhere(name: str) -> None:
    wanted = prefixed(name, PYTHON[name])
    if name in ONLY_IN_THE_DATABASE:
        assert name not in wire_enums().keys() | cython_enums().keys()
        return
    if name in INSIDE:
        assert cython_enums()[name] == wanted
        return
    assert wire_enums()[name] == {**prefixed(name, {"UNSPECIFIED": 0}), **wanted}
    assert cython_enums().get(name, wanted) == wanted


def test_enums_of_cython_and_of_the_wire_are_all_known_to_python() -> None:
    assert {"NotifyOutcome", "PaymentState", "VerdictFlag", "Recorded"} == cython_enums().keys() - {"Limits"}
    assert wire_enums().keys() - ONLY_ON_THE_WIRE == PYTHON.keys() - INSIDE - ONLY_IN_THE_DATABASE


def test_numbers_are_positive_and_differ() -> None:
    for name, members in PYTHON.items():
        assert len(set(members.values())) == len(members), name
        assert min(members.values()) >= 0, name


def test_outcomes_and_flags_do_not_overlap_in_a_packed_verdict() -> None:
    assert max(verdicts.NotifyOutcome) <= 0xFF
    flags = [int(flag) for flag in verdicts.VerdictFlag]
    assert all(flag & 0xFF == 0 and flag.bit_count() == 1 for flag in flags)


def test_limits_of_cython_are_those_of_python() -> None:
    assert cython_enums()["Limits"] == {
        "VERDICT_MISS": _dedupe.MISS,
        "MAX_ATTEMPTS": ids.MAX_ATTEMPTS,
        "MAX_CODE": plain_index.MAX_CODE,
        "PAID_AT_AHEAD_LIMIT_MS": decision.PAID_AT_AHEAD_LIMIT_MS,
    }
    assert _dedupe.MISS == plain_index.MISS == 0


def test_epoch_of_cython_is_that_of_python() -> None:
    found = re.findall(r"#define PAYCORE_ID_EPOCH_MS \(\(int64_t\)(\d+)\)", (PACKAGE / "_dedupe.pyx").read_text())
    assert [int(number) for number in found] == [ids.ID_EPOCH_MS]


def test_entries_of_both_indexes_have_the_same_fields() -> None:
    assert _dedupe.IndexEntry._fields == plain_index.IndexEntry._fields
