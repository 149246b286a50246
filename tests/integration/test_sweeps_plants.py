"""Rows planted by hand: a full pass finds each way to break R1 and R2, and names the payment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from structlog.testing import capture_logs

from paycore.domain.sweep import SweepKind
from tests.support.clock import ManualClock
from tests.support.core import Core
from tests.support.planting import PLANTS, prepare
from tests.support.sweep_finds import ASKED, NAMES_ITS_OWN, REPAIRED, TOLD
from tests.support.sweeping import Sweeps

TASKLESS = {SweepKind.PAYMENT_WITHOUT_TASK, SweepKind.EXPIRED_WITH_EXCESS}
"""What every payment that is made by hand shows: it has no tasks."""

Told = Mapping[int, set[str]]


def told_of(lines: Iterable[Mapping[str, Any]]) -> Told:
    """What a sweep said that it found: payment -> kinds, and of a contradiction its words."""
    told: dict[int, set[str]] = defaultdict(set)
    for line in lines:
        if line["event"] == "sweep_found" and line["kind"] not in TASKLESS:
            told[line["payment_id"]].add(line.get("what", line["kind"]))
    return told


def test_every_plant_says_what_a_sweep_finds() -> None:
    assert sorted([*REPAIRED, *TOLD, *ASKED]) == sorted(PLANTS)


async def a_full_pass(sweeps: Sweeps) -> Told:
    """Make one; return what it told of."""
    with capture_logs() as lines:
        await sweeps.full()
    return told_of(lines)


async def test_each_planted_break_is_found_by_a_full_pass_and_names_its_payment(db_url: str) -> None:
    expected: Mapping[str, str] = {**REPAIRED, **TOLD}
    with Core(db_url, clock=ManualClock()) as core:
        await prepare(core, len(expected))
        sweeps = Sweeps(core, part=50)
        assert await a_full_pass(sweeps) == {}
        planted = {name: PLANTS[name].put(db_url)[name not in NAMES_ITS_OWN] for name in expected}
        told = await a_full_pass(sweeps)
        missed = {
            name: told.get(planted[name]) for name in expected if expected[name] not in told.get(planted[name], ())
        }
        assert missed == {}
        assert told.keys() == set(planted.values()), "what is whole is not told of"
        contradictions = {planted[name]: told[planted[name]] for name in TOLD}
        assert await a_full_pass(sweeps) == contradictions, "until a person has put them right"
