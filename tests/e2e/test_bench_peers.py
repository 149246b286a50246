"""The peers run with tiny counts, or say aloud what is missing. How fast anything is, no test says."""

from __future__ import annotations

import json
import os
import shutil
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
    ("bare_store", "sqlite"),
    ("redis_setnx", "sqlite"),
]


@pytest.mark.parametrize(("name", "store"), PEERS)
def test_peer_with_a_tiny_count_gives_a_figure(name: str, store: str) -> None:
    told = peer(name, "--store", store, "--count", "50")
    if name == "redis_setnx" and shutil.which("redis-server") is None:
        assert told == {"skipped": "redis-server is not installed (Debian: redis-server)"}
        return
    assert told["rate"] > 0
    assert 0 < told["p50_ms"] <= told["p99_ms"]
    assert (told["count"], bool(told["meaning"])) == (50, True)
    assert "cpu" in told["machine"]


def test_peer_that_cannot_run_says_what_is_missing() -> None:
    assert peer("tigerbeetle", TIGERBEETLE_BINARY="") == {"skipped": "TIGERBEETLE_BINARY names no server"}
