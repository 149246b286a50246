"""The places of the crash runs: all that are in the source, and an account that cannot be met by luck."""

from __future__ import annotations

import random
import re
from pathlib import Path

from tests.crash.points import ENOUGH, POINTS, SAME, Plan, Tally, is_covered

SOURCE = Path(__file__).parents[2] / "src" / "paycore"

RARE = {
    # A healthy server never comes by: the sweeps find nothing to put right.
    "sweeper.before_repair",
}

_NAMED = re.compile(r'failpoint\((f?)"([^"]+)"\)')


def in_source() -> dict[str, bool]:
    """Every name that the source passes, and whether a part of it is filled in when it runs."""
    texts = (path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py")) if path.name != "failpoint.py")
    return {name: bool(filled) for text in texts for filled, name in _NAMED.findall(text)}


def as_pattern(name: str) -> re.Pattern[str]:
    """What a name with a part to fill in may become."""
    return re.compile("[A-Za-z_]+".join(map(re.escape, re.split(r"\{[^}]+\}", name))))


def test_points_of_the_source_are_all_killed_at() -> None:
    plain = {name for name, filled in in_source().items() if not filled}
    assert not {name for name in plain if not is_covered(name)} - RARE


def test_points_that_are_killed_at_are_all_in_the_source() -> None:
    patterns = [as_pattern(name) for name in in_source()]
    patterns.append(as_pattern("rpc.{name}.before_answer"))
    assert len(POINTS) >= 25
    for name in {*POINTS, *SAME}:
        assert any(pattern.fullmatch(name) for pattern in patterns), name
    assert {one for others in SAME.values() for one in others} <= POINTS.keys()


def test_tally_lacks_a_point_until_it_has_struck_often_enough() -> None:
    tally = Tally(random.Random(1), ENOUGH, {"writer.taken": 1})
    for count in range(ENOUGH):
        assert tally.missing() == {"writer.taken": count}
        tally.note(Plan("writer.taken", 1, 0), struck=True, cut_calls=1)
    assert not tally.missing()
    assert tally.kills == ENOUGH


def test_tally_does_not_count_kills_of_an_idle_server() -> None:
    tally = Tally(random.Random(1))
    tally.note(Plan("", 0, 100), struck=False, cut_calls=0)
    tally.note(Plan("store.begun", 1, 0), struck=True, cut_calls=0)
    tally.note(Plan("store.begun", 1, 0), struck=False, cut_calls=0)
    assert (tally.kills, tally.idle) == (0, 3)
    # Its sweeper passes as well, and takes its share for it, whether or not there is anything to find.
    for name in ("sweeper.before_mark", "slices.claimed"):
        tally.note(Plan(name, 1, 0), struck=True, cut_calls=0)
        assert (tally.kills, tally.hits[name]) == (0, 0)
    # A job at work is work: nobody calls for it.
    tally.note(Plan("ender.leased", 1, 0), struck=True, cut_calls=0)
    assert tally.kills == 1


def test_tally_counts_a_pass_that_took_a_call_along() -> None:
    tally = Tally(random.Random(1))
    for name in ("sweeper.before_mark", "slices.claimed"):
        tally.note(Plan(name, 1, 0), struck=True, cut_calls=1)
        assert tally.hits[name] == 1


def test_tally_counts_a_point_that_did_not_strike_as_a_moment_only() -> None:
    tally = Tally(random.Random(1), ENOUGH, {"ender.leased": 8})
    tally.note(Plan("ender.leased", 1, 0), struck=False, cut_calls=3)
    assert (tally.kills, tally.moments, tally.missing()) == (1, 1, {"ender.leased": 0})


def test_tally_of_one_seed_draws_the_same_plans() -> None:
    first, second = Tally(random.Random(7)), Tally(random.Random(7))
    assert [first.plan() for _ in range(50)] == [second.plan() for _ in range(50)]
    assert {plan.point for plan in (first.plan() for _ in range(500))} > POINTS.keys()
