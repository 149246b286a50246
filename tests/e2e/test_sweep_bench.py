"""The benchmark of the sweeper runs, with a tiny count, and tells what it promises to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
COUNT, BURST, TWICE = 1_000, 200, 12
"""One in a hundred was paid twice."""


def sweep(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "sweep", "--count", str(COUNT), "--burst", str(BURST), *arguments]
    ended = subprocess.run([*command, "--json"], cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_sweep_bench_with_a_tiny_count_gives_its_figures_and_those_of_the_audit(store: str) -> None:
    told = sweep("--store", store, "--audit")
    assert (told["benchmark"], told["count"], told["burst"]) == ("sweep", COUNT, BURST)
    # Payment, attempt and outcome of each; a second attempt, excess, refund and its try of those that were paid twice.
    assert told["rows_scanned"] == 3 * (COUNT + BURST) + 4 * TWICE
    times = (told[f"{what}_seconds"] for what in ("full", "idle", "burst", "scan"))
    assert min(told["rate"], told["baseline_rate"], *times) > 0
    assert "fsync" in told["machine"] or "settings" in told["machine"]
    audit = told["audit"]
    # The key of each payment's merchant order too.
    assert (audit["count"], audit["rows_scanned"]) == (COUNT + BURST, 4 * (COUNT + BURST) + 4 * TWICE)
    assert min(audit["rate"], audit["baseline_rate"], audit["audit_seconds"], audit["scan_seconds"]) > 0


def test_sweep_bench_without_the_audit_tells_of_none() -> None:
    assert "audit" not in sweep()
