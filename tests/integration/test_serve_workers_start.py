"""Workers that cannot start, or do not stay: one clear line, an exit code, and pauses that grow."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.integration.test_serve_start import refusal, serve
from tests.support.simbank import wait_for
from tests.support.workers import Crew, alive


def last_line(text: str) -> str:
    return text.splitlines()[-1]


def test_workers_without_a_database_name_migrate(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'none.db'}"
    code, said = serve(url, "--workers", "2", "--log-level", "error")
    assert code == 1
    assert f"paycore migrate --db {url}" in last_line(said)
    assert "Traceback" not in said


def test_workers_on_a_unix_socket_are_refused_and_told_what_to_do(tmp_path: Path) -> None:
    line = refusal(f"sqlite:///{tmp_path / 'none.db'}", "--workers", "2", "--listen", f"unix:{tmp_path / 's'}")
    assert "cannot share a unix socket; give host:port, or one worker" in line


@pytest.mark.parametrize("count", ["-1", "1000"])
def test_number_of_workers_that_breaks_the_rule_is_wrong_usage(tmp_path: Path, count: str) -> None:
    code, said = serve(f"sqlite:///{tmp_path / 'none.db'}", "--workers", count)
    assert code == 2
    assert said.startswith("PAYCORE_WORKERS: must be ")
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_workers_that_die_at_once_are_given_up_after_growing_pauses(tmp_path: Path) -> None:
    crew = Crew(tmp_path / "paycore.db", 2, env={"PAYCORE_FAILPOINTS": "writer.taken=crash"})
    crew.launch()
    try:
        assert crew.wait(60) == 1
    finally:
        crew.kill()
    assert "no worker can be kept running; the last one ended by SIGKILL" in last_line(crew.log())
    for worker in (1, 2):
        pauses = [one["pause_ms"] for one in crew.events("worker_died") if one["worker"] == worker]
        assert pauses[:2] == [250, 500]
    pids = [one["pid"] for name in ("worker_started", "worker_replaced") for one in crew.events(name)]
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_workers_whose_database_is_gone_are_tried_again_until_there_is_no_hope(tmp_path: Path) -> None:
    path, away = tmp_path / "paycore.db", tmp_path / "away.db"
    with Crew(path, 2) as crew:
        path.rename(away)
        victim, other = crew.workers
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: refused_starts(crew), "a replacement that cannot start")
        assert crew.process.poll() is None, "the other worker still takes calls"
        away.rename(path)
        wait_for(lambda: victim not in crew.workers, "two workers again")
        assert crew.workers[1] == other
        path.rename(away)
        for pid in crew.workers:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: crew.http("/-/ready")[0] == 503, "no worker is ready")
        assert crew.http("/-/healthy")[0] == 200
        assert crew.wait(60) == 1
        assert "paycore migrate --db" in last_line(crew.log())


def refused_starts(crew: Crew) -> bool:
    return any("paycore migrate --db" in one["cause"] for one in crew.events("worker_died"))
