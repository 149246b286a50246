"""The benchmark of the refunder runs, with a tiny count, and tells what it promises to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
def test_refund_bench_with_a_tiny_count_gives_its_figures(store: str) -> None:
    command = [sys.executable, "-m", "benchmarks", "refund", "--count", "20", "--processes", "1", "--store", store]
    ended = subprocess.run([*command, "--json"], cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    told = json.loads(ended.stdout)
    assert (told["benchmark"], told["count"]) == ("refund", 20)
    assert told["rates"].keys() == {"1"}
    assert min(told["rates"]["1"].values()) > 0
    assert "fsync" in told["machine"] or "settings" in told["machine"]
