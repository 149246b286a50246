"""The tests' own PostgreSQL: processes of a run share one server, and a start that fails harms nobody and says why."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.support.keeper import join, make_cluster, socket_url, start_keeper
from tests.support.postgres import GIVEN_URL, NEWEST, REPOSITORY, binaries, give_to_server, server
from tests.support.simbank import wait_for

VERSION = "18" if GIVEN_URL else NEWEST
ASK = f"from tests.support.postgres import server; print(server('{VERSION}').folder, flush=True); input()"


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """A folder where those who are not root may go."""
    path = Path(tempfile.mkdtemp(prefix="keeper-", dir=server(NEWEST).folder))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def programs(room: Path) -> Path:
    """PostgreSQL's programs, where the server's user may read them."""
    (room / "real").mkdir()
    return make_cluster(binaries(VERSION), room / "real")


@pytest.fixture
def run(room: Path) -> Path:
    return room / uuid.uuid4().hex[:8]


def that_begins_with(programs: Path, room: Path, first: str) -> Path:
    """PostgreSQL's programs with an initdb that does something else first. Its working folder stays from try to try."""
    ours = Path(tempfile.mkdtemp(prefix="programs-", dir=room))
    (ours / "postgres").symlink_to(programs / "postgres")
    (ours / "initdb").write_text(f'#!/bin/sh\ncd {ours}\n{first}\nexec {programs / "initdb"} "$@"\n')
    for path, mode in ((ours, 0o755), (ours / "initdb", 0o755)):
        path.chmod(mode)
    give_to_server(ours)
    return ours


def test_start_that_fails_is_tried_again_and_the_server_goes_with_its_last_user(
    programs: Path, room: Path, run: Path
) -> None:
    fails_once = that_begins_with(programs, room, "[ -e tried ] || { touch tried; exit 1; }")
    with join(run):
        place = start_keeper(fails_once, run)
        psycopg.connect(socket_url(place)).close()
        assert [path.name for path in run.iterdir() if path.is_dir()] == [place.name]
    wait_for(lambda: not run.exists(), "the server and its folder are gone")


def test_start_that_always_fails_says_what_the_server_said_and_removes_nothing_of_others(
    programs: Path, room: Path, run: Path
) -> None:
    fails = that_begins_with(programs, room, "echo no room on this disk >&2; exit 1")
    with join(run):
        place = start_keeper(programs, run)
        with pytest.raises(AssertionError, match="no room on this disk"):
            start_keeper(fails, run)
        psycopg.connect(socket_url(place)).close()
        assert [path.name for path in run.iterdir() if path.is_dir()] == [place.name]
    wait_for(lambda: not run.exists(), "the server and its folder are gone")


def test_start_that_takes_too_long_is_ended_with_all_that_it_runs(programs: Path, room: Path, run: Path) -> None:
    hangs = that_begins_with(programs, room, "echo $$ >>tried; exec sleep 1000")
    with join(run), pytest.raises(AssertionError, match=r"no answer within 3\.0 s"):
        start_keeper(hangs, run, seconds=3.0)
    for number in (hangs / "tried").read_text().split():
        wait_for(lambda number=number: not _runs(int(number)), "the program has ended")  # type: ignore[misc]


def _runs(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


def test_who_comes_while_the_last_ones_folder_goes_begins_anew(run: Path) -> None:
    joined = []
    with join(run) as last:
        fcntl.flock(last, fcntl.LOCK_EX)
        (run / "ready").touch()
        coming = threading.Thread(target=lambda: joined.append(join(run)))
        coming.start()
        run.rename(run.with_name(f"{run.name}-gone"))
    coming.join(20)
    with joined[0]:
        assert [path.name for path in run.iterdir()] == ["users"]


def test_processes_of_a_run_share_one_server() -> None:
    env = {**os.environ, "PYTEST_XDIST_TESTRUNUID": uuid.uuid4().hex}
    with _asks(env) as one, _asks(env) as other:
        folders = [process.stdout.readline().strip() for process in (one, other) if process.stdout is not None]
        one.communicate("\n")
        psycopg.connect(socket_url(Path(folders[1]))).close()
        other.communicate("\n")
    assert folders[0] == folders[1] != ""
    wait_for(lambda: not Path(folders[0]).parent.exists(), "the server and its folder are gone")


def _asks(env: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process of a run that asks for its server and stays until it is told to end."""
    command = [sys.executable, "-c", ASK]
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
