"""A server on SQLite is killed a hundred times under load; the banks' books, the database and the clients agree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.crash.run import crash
from tests.support.databases import make_database

KILLS = 100
"""At least: it goes on until each place has struck three times."""
SEED = int(os.environ.get("PAYCORE_CRASH_SEED", "20261123"))


@pytest.mark.slow
async def test_server_on_sqlite_killed_a_hundred_times_loses_and_doubles_nothing(tmp_path: Path) -> None:
    verdict = await crash(make_database("sqlite", tmp_path), tmp_path, kills=KILLS, seed=SEED)
    print(verdict.text())
    assert verdict.survived, verdict.text()
    assert verdict.tally.kills >= KILLS
