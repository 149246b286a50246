"""The benchmarks run, with tiny counts, and tell what they promise to. How fast anything is, no test says."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as everything
from benchmarks.notify_bench import Counted, CountError
from benchmarks.notify_cases import Bodies, Case
from paycore.domain.verdicts import NotifyOutcome

ROOT = Path(__file__).parents[2]
SECONDS = 300

NOTIFY_KEYS = {"benchmark", "machine", "count", "runs", "rate", "baseline_rate", "limit_rate", "ratio", "p50_ms"}
NOTIFY_ROWS = [
    "empty handler",
    "first notifications",
    "replays",
    "first notifications, cold",
    "unknown orders",
    "bare store, full groups",
    "bare store",
]
INDEX_ROWS = [
    "dict of tuples, one a call",
    "index, one a call",
    "index, 1,000 a call",
    "bare C loop",
    "bare C loop, prefetching",
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmarks as `make bench` does."""
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, timeout=SECONDS, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def run_json(*arguments: str) -> dict[str, Any]:
    ended = run(*arguments, "--json")
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    told: dict[str, Any] = json.loads(ended.stdout)
    return told


def test_quick_run_takes_every_benchmark_and_hands_on_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with few counts first, so that what is given wins."""
    ran: list[list[str]] = []

    def run_program(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        assert not check, "its exit code is looked at"
        ran.append(command[3:])
        return subprocess.CompletedProcess(command, 0)

    def run_module(name: str, arguments: list[str]) -> int:
        ran.append([name, *arguments])
        return int(name == "index")

    monkeypatch.setattr(subprocess, "run", run_program)
    monkeypatch.setattr(everything, "run", run_module)
    assert everything.main(["--json"]) == 1, "the exit code of one that gave no figures"
    assert {tuple(command[1:3]) for command in ran if command[0] == "bench"} == {
        *(("notify", "--store"), ("startup", "--store"), ("wire", "--count"))
    }
    modules = {path.stem.removesuffix("_bench") for path in (ROOT / "benchmarks").glob("*_bench.py")}
    assert {command[0] for command in ran if command[0] != "bench"} == modules
    assert all("--count" in command and command[-1] == "--json" for command in ran)


@pytest.mark.slow
def test_report_measures_the_cells_that_are_named_and_fills_their_sections(tmp_path: Path) -> None:
    page, kept = tmp_path / "page.md", tmp_path / "kept"
    page.write_text((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), encoding="utf-8")
    given = ["--scale", "0.001", "--only", "wire", "repair-sqlite", "--kept", str(kept), "--folder", str(tmp_path)]
    ended = run("report", *given, "--page", str(page), "--chart", str(tmp_path / "chart.svg"))
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert sorted(path.name for path in kept.iterdir()) == ["repair-sqlite.json", "wire.json"]
    told = json.loads((kept / "wire.json").read_text(encoding="utf-8"))
    assert f"| protobuf parse, fields read | {told['baseline_rate']:,.0f} | 1.0 |" in page.read_text(encoding="utf-8")
    assert "sweeps stays as it was: repair-postgresql was not measured" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("load", "count"), [("h2load", 2_000), ("grpc", 500)])
def test_notify_bench_with_tiny_counts_gives_every_row(load: str, count: int, tmp_path: Path) -> None:
    if load == "h2load" and shutil.which("h2load") is None:
        pytest.skip("h2load is not installed (Debian: nghttp2-client)")
    told = run_json("notify", "--count", str(count), "--runs", "1", "--load", load, "--folder", str(tmp_path))
    assert told.keys() >= NOTIFY_KEYS | {"p99_ms"}
    assert (told["benchmark"], told["count"], told["runs"]) == ("notify", count, 1)
    assert load in told["machine"]["load"]
    assert [row["name"] for row in told["results"]] == NOTIFY_ROWS
    assert all(row["rate"] > 0 and row["ratio"] > 0 and row["meaning"] for row in told["results"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_notify_bench_without_json_prints_what_each_row_measures(tmp_path: Path) -> None:
    ended = run("notify", "--count", "200", "--runs", "1", "--load", "grpc", "--folder", str(tmp_path))
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    for name in NOTIFY_ROWS:
        assert f"\n{name}: " in ended.stdout
    for fact in ("cpu", "system", "python", "grpcio", "sqlite", "fsync", "load", "cores"):
        assert f" {fact} " in ended.stdout


@pytest.mark.slow
def test_index_bench_with_tiny_counts_gives_every_row() -> None:
    told = run_json("index", "--count", "1000", "--checks", "2000", "--rounds", "5")
    assert (told["benchmark"], told["count"]) == ("index", 1_000)
    assert "cpu" in told["machine"]
    assert [row["name"] for row in told["results"]] == INDEX_ROWS
    assert all(row["rate"] > 0 for row in told["results"])
    figures = ("rate", "baseline_rate", "limit_rate", "p50_ms", "p99_ms", "longest_change_ms", "load_rate")
    assert all(told[figure] > 0 for figure in (*figures, "load_rate_at_the_limit", "evicted", "bytes_each"))


@pytest.mark.slow
def test_index_bench_without_a_compiler_says_that_the_limit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    told = run_json("index", "--count", "1000", "--checks", "2000", "--rounds", "5")
    assert [row["name"] for row in told["results"]] == INDEX_ROWS[:3]
    assert told["limit_rate"] is None
    assert told["limit_skipped"].startswith("SKIPPED, no C compiler that works")


NONE_WRITTEN = {"payment_outcome": 0, "quarantine": 0, "excess_payment": 0, "refund": 0}
BEFORE = Counted({("ACCEPTED", "false"): 5.0}, commits=1, cpu_seconds=None, rows={**NONE_WRITTEN, "payment_outcome": 5})


def case(*, replayed: bool, table: str | None) -> Case:
    """Three notifications that should become ACCEPTED."""
    return Case("three", "", Bodies(Path("unused"), 1, 3), NotifyOutcome.ACCEPTED, replayed, table)


def after(counted: dict[tuple[str, str], float], **rows: int) -> Counted:
    return Counted(counted, commits=2, cpu_seconds=None, rows={**BEFORE.rows, **rows})


@pytest.mark.parametrize(
    ("counted", "rows", "complaint"),
    [
        ({("ACCEPTED", "false"): 8.0}, {"payment_outcome": 8}, None),
        ({("ACCEPTED", "false"): 7.0}, {"payment_outcome": 7}, "the server counted"),
        ({("ACCEPTED", "false"): 9.0}, {"payment_outcome": 8}, "the server counted"),
        ({("ACCEPTED", "false"): 7.0, ("ACCEPTED", "true"): 1.0}, {"payment_outcome": 7}, "the server counted"),
        ({("ACCEPTED", "false"): 8.0, ("THROTTLED", "false"): 1.0}, {"payment_outcome": 8}, "the server counted"),
        ({("ACCEPTED", "false"): 8.0}, {"payment_outcome": 7}, "the database got"),
        ({("ACCEPTED", "false"): 8.0}, {"payment_outcome": 8, "refund": 1}, "the database got"),
    ],
)
def test_counts_that_are_not_what_was_sent_give_no_figure(
    counted: dict[tuple[str, str], float], rows: dict[str, int], complaint: str | None
) -> None:
    checked, sent = after(counted, **rows), case(replayed=False, table="payment_outcome")
    if complaint is None:
        checked.check(BEFORE, sent)
        return
    with pytest.raises(CountError, match=complaint):
        checked.check(BEFORE, sent)


def test_counts_of_replays_that_wrote_a_row_give_no_figure() -> None:
    sent, counted = case(replayed=True, table=None), {("ACCEPTED", "false"): 5.0, ("ACCEPTED", "true"): 3.0}
    after(counted).check(BEFORE, sent)
    with pytest.raises(CountError, match="the database got"):
        after(counted, payment_outcome=6).check(BEFORE, sent)
