"""The benchmark of the audit runs, with a tiny count, and tells what it promises to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_audit_bench_with_a_tiny_count_gives_its_figures(store: str) -> None:
    command = [sys.executable, "-m", "benchmarks", "audit", "--count", "1000", "--store", store, "--json"]
    ended = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    told = json.loads(ended.stdout)
    # Merchant order, payment, attempt and outcome of each; a second attempt and four facts of one in a hundred.
    assert (told["benchmark"], told["count"], told["rows_scanned"]) == ("audit", 1_000, 4_000 + 4 * 10)
    assert min(told["rate"], told["audit_seconds"], told["scan_seconds"]) > 0
    assert "fsync" in told["machine"] or "settings" in told["machine"]
