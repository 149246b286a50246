"""The peers run with tiny counts, or say aloud what is missing. How fast anything is, no test says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = 120


def peer(name: str, *arguments: str, **environment: str) -> dict[str, Any]:
    # A folder that others than root may pass: PostgreSQL does not run as root.
    with tempfile.TemporaryDirectory(prefix="paycore-peer-test-") as folder:
        Path(folder).chmod(0o755)
        command = [sys.executable, "-m", f"benchmarks.peers.{name}", "--json", "--folder", folder, *arguments]
        ended = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, timeout=SECONDS, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        assert list(Path(folder).iterdir()) == []
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


PEERS = [
    ("orm_row_lock", "postgresql"),
    ("orm_row_lock", "sqlite"),
    ("bare_store", "postgresql"),
    ("bare_store", "sqlite"),
    ("redis_setnx", "postgresql"),
    ("redis_setnx", "sqlite"),
]


@pytest.mark.parametrize(("name", "store"), PEERS)
def test_peer_with_a_tiny_count_gives_a_figure(name: str, store: str) -> None:
    told = peer(name, "--store", store, "--count", "50")
    # redis-server included: what is missing here is no peer that was shown to work.
    assert "skipped" not in told, told["skipped"]
    assert told["rate"] > 0
    assert 0 < told["p50_ms"] <= told["p99_ms"]
    assert (told["count"], bool(told["meaning"])) == (50, True)
    assert "cpu" in told["machine"]


SKIPPED = [
    ("tigerbeetle", {"TIGERBEETLE_BINARY": ""}, "TIGERBEETLE_BINARY names no server"),
    ("redis_setnx", {"PATH": ""}, "redis-server is not installed (Debian: redis-server)"),
]


@pytest.mark.parametrize(("name", "environment", "reason"), SKIPPED)
def test_peer_that_cannot_run_says_what_is_missing(name: str, environment: dict[str, str], reason: str) -> None:
    assert peer(name, "--store", "sqlite", "--count", "50", **environment) == {"skipped": reason}


def test_peer_that_cannot_run_says_aloud_to_people_that_it_is_skipped() -> None:
    command = [sys.executable, "-m", "benchmarks.peers.tigerbeetle"]
    environment = os.environ | {"TIGERBEETLE_BINARY": ""}
    ended = subprocess.run(command, cwd=ROOT, env=environment, timeout=SECONDS, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "SKIPPED: TIGERBEETLE_BINARY names no server\n")
