"""The supervisor's rules, and what it must not be made of."""

from __future__ import annotations

import subprocess
import sys

import pytest

from paycore.app.seat import Seat, Word
from paycore.app.slot import SILENT_SECONDS, Ending, Slot
from paycore.app.supervisor import LONGEST_PAUSE_SECONDS, is_hopeless, pause_seconds
from tests.support.server import clean_environment


def test_supervisor_imports_neither_grpc_nor_a_database() -> None:
    program = "import sys, paycore.cli.serve; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    ended = subprocess.run(
        [sys.executable, "-c", program], env=clean_environment(), capture_output=True, text=True, check=True
    )
    loaded = set(ended.stdout.split())
    assert "prometheus_client" in loaded
    assert not loaded & {"grpc", "google", "sqlalchemy", "sqlite3", "psycopg"}


def test_pause_before_a_replacement_grows_to_a_limit() -> None:
    pauses = [pause_seconds(deaths) for deaths in range(60)]
    assert pauses[:4] == [0.0, 0.25, 0.5, 1.0]
    assert pauses == sorted(pauses)
    assert pauses[-1] == LONGEST_PAUSE_SECONDS


# False starts of each slot (None: it serves), whether the last gave a reason, whether any worker has ever served;
# whether to give up.
HOPES = [
    ([1, 1], True, False, True),
    ([1, 0], True, False, False),
    ([1, 1], True, True, False),
    ([3, 3], True, True, True),
    ([9, 2], True, True, False),
    ([2, 2], False, False, False),
    ([3, 4], False, False, True),
    ([9, None], True, True, False),
]


@pytest.mark.parametrize(("false_starts", "refused", "ever_served", "hopeless"), HOPES)
def test_hope_lasts_while_a_slot_has_not_failed_often_enough(
    false_starts: list[int | None], refused: bool, ever_served: bool, hopeless: bool
) -> None:
    assert is_hopeless(false_starts, refused=refused, ever_served=ever_served) is hopeless


@pytest.mark.parametrize(
    ("exit_code", "refusal", "cause"),
    [(-9, None, "SIGKILL"), (-40, None, "signal 40"), (1, None, "exit code 1"), (1, "no database", "no database")],
)
def test_ending_names_its_cause(exit_code: int, refusal: str | None, cause: str) -> None:
    assert Ending(1, exit_code, refusal, served=False, steady=False).cause == cause


def test_worker_that_says_nothing_for_long_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    slot, now = Slot(1, {}, lambda: None), [1_000.0]
    monkeypatch.setattr("paycore.app.slot.time.monotonic", lambda: now[0])
    assert (slot.ready, slot.silence_seconds) == (False, 0.0)
    slot.hear(Word(serving=True, ready=True))
    now[0] += SILENT_SECONDS - 1
    assert (slot.ready, slot.silence_seconds) == (True, SILENT_SECONDS - 1)
    now[0] += 1
    assert not slot.ready
    slot.hear(Word())
    assert (slot.ready, slot.silence_seconds) == (True, 0.0)
    slot.hear(Word(ready=False))
    assert not slot.ready


@pytest.mark.parametrize("word", [Word(serving=True), Word(ready=False), Word(refused="no\nsuch \u5e93")])
def test_word_of_a_worker_arrives_as_it_was_told(word: Word) -> None:
    line = word.as_line()
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert Word.from_line(line) == word


def test_word_that_a_dying_worker_cut_off_says_nothing() -> None:
    line = Word(serving=True).as_line()
    assert {Word.from_line(line[:length]) for length in range(len(line) - 1)} == {Word()}


def test_seat_is_read_where_a_supervisor_has_put_it() -> None:
    seat = Seat(3, 7)
    assert Seat.from_environment({"PAYCORE_WORKER": seat.as_text()}) == seat
    assert Seat.from_environment({}) is None
