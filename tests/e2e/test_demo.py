"""`paycore demo` for real: every story comes out right, and a server that is broken makes it fail."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from paycore.cli.demo_banks import BookEntry, Page
from paycore.cli.demo_run import Result, book_lines
from paycore.cli.demo_show import BookLine
from paycore.cli.demo_stories import STORIES
from tests.support.server import PAYCORE, clean_environment

LONGEST_SECONDS = 40
PATIENCE_SECONDS = 120

# Written down apart from the program's own rows: story, words that must be seen, what the banks keep in minor units.
STORIES_TOLD: list[tuple[str, list[str], int]] = [
    (
        "a",
        ["ACCEPTED", "DUPLICATE", "128.00 CNY REFUNDED at bank_b", "128.00 CNY at bank_a, 0.00 CNY at bank_b"],
        12800,
    ),
    ("b", ["ACCEPTED replayed", "written for both: nothing"], 4990),
    ("c1", ["CLOSED (MERCHANT)", "LATE", "8800 JPY REFUNDED at bank_a", "kept: 0 JPY at bank_a"], 0),
    ("c2", ["CLOSED (EXPIRED)", "LATE", "19.99 CNY REFUNDED at bank_b", "kept: 0.00 CNY at bank_b"], 0),
    ("d", ["asked at expiry: PAID at bank_a", "ACCEPTED replayed, payment PAID", "sent back: nothing"], 12345),
    ("e", ["the wrong word: MISMATCH", "asked: PAID at bank_b", "quarantine: empty", "ACCEPTED replayed"], 9900),
    ("f", ["UNKNOWN x3", "1 kept, came 3 times"], 7700),
    ("g", ["ACCEPTED, SECOND_CAPTURE", "33.00 CNY REFUNDED at bank_a", "empty", "kept: 33.00 CNY at bank_a"], 3300),
    ("h", ["not acknowledged", "ACCEPTED replayed, DUPLICATE", "250.00 CNY REFUNDED at bank_b", "unchanged"], 25000),
]

# What is broken, the stories that must notice, and what one of them must have seen.
BROKEN_SERVERS = [
    pytest.param(
        "refund_interval_ms=600000",
        {"a", "c1", "c2", "g", "h"},
        ("c1", "8800 JPY PENDING at bank_a"),
        id="refunds_too_late",
    ),
    pytest.param("late_grace_ms=3600000", {"c2", "d"}, ("c2", "after expiry: OPEN"), id="expiry_not_held"),
    pytest.param("jobs=refunder", {"c2", "d", "e", "g"}, ("g", "the bank asked: nothing"), id="nobody_asks"),
    pytest.param(
        "failpoints=refunder.before_send=crash",
        {*"abdefgh", "c1", "c2"},
        ("b", "first time: not seen"),
        id="server_dies",
    ),
]


class Ended(NamedTuple):
    """A demo that has ended."""

    code: int
    out: str
    err: str
    seconds: float
    folders: list[Path]

    @property
    def report(self) -> dict[str, Any]:
        """Its standard output, which must be one JSON object and nothing else."""
        parsed: dict[str, Any] = json.loads(self.out)
        return parsed

    @property
    def by_letter(self) -> dict[str, dict[str, Any]]:
        """Its stories by what their names begin with."""
        return {story["name"].partition(":")[0]: story for story in self.report["stories"]}


class Place(NamedTuple):
    """An empty folder to be in, and one of its own for temporary files."""

    cwd: Path
    temporary: Path

    @property
    def environment(self) -> Mapping[str, str]:
        # What the caller has set for a server of its own must not reach the demo's.
        return clean_environment({"TMPDIR": str(self.temporary), "PAYCORE_DB": "sqlite:////nowhere/else.db"})

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [PAYCORE, "demo", *arguments],
            cwd=self.cwd,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> Ended:
        started = time.monotonic()
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return Ended(process.returncode, out, err, time.monotonic() - started, self.folders())

    def folders(self) -> list[Path]:
        return sorted(self.temporary.glob("paycore-demo-*"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "cwd").mkdir()
    (tmp_path / "tmp").mkdir()
    return Place(tmp_path / "cwd", tmp_path / "tmp")


@pytest.mark.serial
@pytest.mark.slow
def test_demo_on_a_good_server_tells_every_story_right_and_leaves_nothing(place: Place) -> None:
    ended = place.run("--json")
    assert ended.err == ""
    assert ended.code == 0
    assert ended.report.keys() == {"ok", "audit_ok", "stories"}
    assert (ended.report["ok"], ended.report["audit_ok"]) == (True, True)
    assert list(ended.by_letter) == [letter for letter, _, _ in STORIES_TOLD]
    for letter, words, kept_minor in STORIES_TOLD:
        story = ended.by_letter[letter]
        assert story.keys() == {"name", "expected", "observed", "kept_minor", "ok"}
        assert story["expected"] == story["observed"]
        assert [word for word in words if word not in story["observed"]] == []
        assert (story["kept_minor"], story["ok"]) == (kept_minor, True)
    assert ended.seconds < LONGEST_SECONDS
    assert ended.folders == []
    assert list(place.cwd.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "wrong", "seen"), BROKEN_SERVERS)
def test_demo_on_a_broken_server_fails_and_names_its_logs(
    place: Place, setting: str, wrong: set[str], seen: tuple[str, str]
) -> None:
    ended = place.run("--json", "--deadline", "2", "--server-setting", setting)
    assert ended.code == 1
    assert ended.report["ok"] is False
    assert {letter for letter, story in ended.by_letter.items() if not story["ok"]} == wrong
    for letter, story in ended.by_letter.items():
        assert (story["expected"] != story["observed"]) is (letter in wrong)
    assert seen[1] in ended.by_letter[seen[0]]["observed"]
    (folder,) = ended.folders
    assert f"databases and logs: {folder}" in ended.err
    assert {"serve.log", "simbank.log", "forwarder.log", "paycore.db", "banks.db"} <= {
        one.name for one in folder.iterdir()
    }


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let children be interrupted: who runs the tests in a shell's background hands them SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_interrupted_ends_its_processes_and_keeps_its_logs(place: Place, number: signal.Signals) -> None:
    with place.start() as process:
        assert process.stdout is not None
        told = list(_until(process.stdout, "a: "))
        pids = [int(pid) for pid in re.findall(r"pid (\d+)", "".join(told))]
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    (folder,) = place.folders()
    assert f"databases and logs: {folder}" in err
    assert "Traceback" not in err
    assert len(pids) == 3
    assert [pid for pid in pids if _is_alive(pid)] == []


def _until(lines: Iterator[str], start: str) -> Iterator[str]:
    for line in lines:
        yield line
        if line.startswith(start):
            return
    pytest.fail(f"no line began with {start!r}")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--folder", "."), "--folder .: must be new or empty"),
        (("--folder", "what?"), "--folder what?: must have no ?"),
        (("--server-setting", "db=sqlite:///mine.db"), "--server-setting db=sqlite:///mine.db: must be NAME=VALUE"),
        (("--server-setting", "refund_interval_ms"), "NAME one of"),
    ],
)
def test_demo_asked_for_what_it_cannot_do_says_what_it_can(place: Place, arguments: tuple[str, ...], said: str) -> None:
    (place.cwd / "something").touch()
    ended = place.run(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.folders == []


# The last check, by itself: order in a bank's books -> whether it is as it must be.
A, B = STORIES[0], STORIES[1]
PAGES = [
    Result(A, pages=[Page("bank_a", "1", ""), Page("bank_b", "2", "")]),
    Result(B, pages=[Page("bank_a", "3", "")]),
]
BOOKS = [
    pytest.param(BookEntry("bank_a", "1", "CNY", 12_800, 0, 12_800), True, id="kept_once"),
    pytest.param(BookEntry("bank_b", "2", "CNY", 12_800, 12_800, 0), True, id="sent_back"),
    pytest.param(BookEntry("bank_b", "2", "CNY", 0, 0, 0), True, id="never_taken"),
    pytest.param(BookEntry("bank_b", "2", "CNY", 12_800, 0, 12_800), False, id="kept_twice"),
    pytest.param(BookEntry("bank_a", "1", "CNY", 12_800, 12_800, 0), False, id="sent_back_wrongly"),
    pytest.param(BookEntry("bank_a", "1", "CNY", 12_800, 1, 12_800), False, id="bank_counts_otherwise"),
    pytest.param(BookEntry("bank_b", "1", "CNY", 0, 0, 0), False, id="order_at_another_bank"),
    pytest.param(BookEntry("bank_c", "9", "CNY", 1, 0, 1), False, id="order_of_no_story"),
    pytest.param(BookEntry("bank_a", "3", "CNY", 4_990, 0, 4_990), True, id="second_story"),
]


@pytest.mark.parametrize(("entry", "ok"), BOOKS)
def test_book_lines_hold_each_order_against_its_story(entry: BookEntry, ok: bool) -> None:
    (line,) = book_lines([entry], PAGES)
    assert isinstance(line, BookLine)
    assert line.ok is ok
