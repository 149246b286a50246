"""Failpoints: no-ops unless the environment arms them. Armed ones run in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paycore import failpoint as module
from paycore.failpoint import failpoint

PASS_THREE = """
from paycore.failpoint import FailpointError, failpoint
for passage in (1, 2, 3):
    try:
        failpoint("here")
        failpoint("elsewhere")
        print(passage, "passed", flush=True)
    except FailpointError as error:
        print(passage, error, flush=True)
"""


def run(armed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PASS_THREE],
        env={**os.environ, "PAYCORE_FAILPOINTS": armed},
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_failpoint_without_the_environment_is_a_no_op() -> None:
    assert "PAYCORE_FAILPOINTS" not in os.environ
    assert failpoint is module._pass
    failpoint("anything")


@pytest.mark.parametrize(
    ("armed", "lines"),
    [
        ("", ["1 passed", "2 passed", "3 passed"]),
        ("another=error", ["1 passed", "2 passed", "3 passed"]),
        ("here=error", ["1 here", "2 here", "3 here"]),
        ("here*2=error", ["1 passed", "2 here", "3 passed"]),
        ("here*1=error,elsewhere*1=error", ["1 here", "2 elsewhere", "3 passed"]),
    ],
)
def test_failpoint_raises_at_the_passages_that_are_armed(armed: str, lines: list[str]) -> None:
    result = run(armed)
    assert result.stdout.splitlines() == lines
    assert result.returncode == 0, result.stderr


def test_failpoint_that_crashes_ends_the_process_as_kill_9_does() -> None:
    result = run("here*2=crash")
    assert (result.returncode, result.stdout.splitlines()) == (-9, ["1 passed"])


def test_failpoint_with_an_unknown_action_says_so() -> None:
    result = run("here=dance")
    assert result.returncode != 0
    assert "unknown action 'dance' for 'here'" in result.stderr


def test_failpoint_that_pauses_tells_and_waits(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PASS_THREE],
        env={**os.environ, "PAYCORE_FAILPOINTS": f"here*2=pause:{tmp_path}"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "here.reached").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert process.stdout is not None
        assert process.stdout.readline() == "1 passed\n"
        assert process.poll() is None
        (tmp_path / "here.go").touch()
        assert process.stdout.read() == "2 passed\n3 passed\n"


def test_every_failpoint_in_the_source_has_a_name_of_its_own() -> None:
    source = Path(module.__file__).parent
    named = {
        path.relative_to(source).as_posix(): re.findall(r'\bfailpoint\("([^"]+)"\)', path.read_text(encoding="utf-8"))
        for path in source.rglob("*.py")
    }
    # The same step of both stores has the same name: a process runs on one of them.
    for other in ("store/postgresql.py", "store/sqlite.py"):
        names = [name for path, found in named.items() if path != other for name in found]
        assert len(names) == len(set(names))
        assert {"writer.taken", "store.begun", "store.before_commit"} <= set(names)
