"""``paycore audit`` as it is typed: what it prints, its exit codes, and what it says of what is no database."""

from __future__ import annotations

import asyncio
import json
import subprocess
import urllib.request
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner, Result

from paycore.cli import build
from paycore.domain.audit import AuditKind
from tests.support.bank import Town
from tests.support.clock import ManualClock
from tests.support.core import Core, change
from tests.support.databases import make_database
from tests.support.planting import PLANTS, prepare
from tests.support.server import PAYCORE, ServerProcess, clean_environment
from tests.support.simbank import Receiver, wait_for

NOTHING, WRONG, USAGE, UNREADABLE = 0, 1, 2, 3


def run(*arguments: str) -> Result:
    env = {"NO_COLOR": "1", "PAYCORE_SIMBANK_URL": "", "PAYCORE_DB": ""}
    return CliRunner().invoke(build(["audit"]), ["audit", *arguments], env=env)


async def ran(*arguments: str) -> Result:
    """The same beside a running event loop: the command has one of its own."""
    return await asyncio.to_thread(run, *arguments)


async def a_database(url: str, plant: str = "") -> int:
    """Payments of every story, with one break; return the payment that it is of."""
    with Core(url, clock=ManualClock()) as core:
        await prepare(core)
        return PLANTS[plant].apply(url) if plant else 0


async def test_whole_database_ends_with_0_and_says_what_is_on_its_way(db_url: str) -> None:
    await a_database(db_url)
    result = await ran("--db", db_url)
    assert (result.exit_code, result.stderr) == (NOTHING, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith("5 payments, 2 captures kept, 3 excess, 2 refunds")
    assert lines[-1] == "nothing is wrong"
    assert "excess whose payment has no outcome yet" in result.stdout
    assert "refunds that are not finished" in result.stdout


async def test_break_ends_with_1_and_is_named_in_the_table(db_url: str) -> None:
    payment_id = await a_database(db_url, "kept_refunded")
    result = await ran("--db", db_url)
    assert result.exit_code == WRONG
    (line,) = [line for line in result.stdout.splitlines() if "refund_of_kept" in line and str(payment_id) in line]
    assert "channel_trade_no=PAID-0" in line
    assert result.stdout.splitlines()[-1] == "WRONG: 1 (refund_of_kept 1)"


async def test_json_is_one_object_that_names_breaks_and_counts(db_url: str) -> None:
    payment_id = await a_database(db_url, "duplicate_without_refund")
    result = await ran("--db", db_url, "--json")
    assert (result.exit_code, result.stderr) == (WRONG, "")
    told = json.loads(result.stdout)
    (violation,) = told["violations"]
    assert (violation["kind"], violation["payment_id"]) == ("refund_missing", str(payment_id))
    assert violation["details"]["channel_trade_no"] == "SECOND-0"
    assert (told["violations_total"], told["violation_counts"]) == (1, {"refund_missing": 1})
    assert (told["tally"]["payments"], told["book_orders"], told["books_error"]) == (5, None, "")


async def test_limit_names_fewer_and_counts_all(db_url: str) -> None:
    await a_database(db_url, "duplicate_without_refund")
    result = await ran("--db", db_url, "--limit", "0")
    assert result.exit_code == WRONG
    assert "1 more are wrong" in result.stdout
    assert result.stdout.splitlines()[-1] == "WRONG: 1 (refund_missing 1)"


async def test_metrics_file_holds_every_kind_and_is_replaced_as_a_whole(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    await a_database(url, "kept_refunded")
    target = tmp_path / "audit.prom"
    target.write_text("old\n")
    assert (await ran("--db", url, "--metrics-file", str(target))).exit_code == WRONG
    lines = target.read_text().splitlines()
    for kind in AuditKind:
        value = int(kind is AuditKind.REFUND_OF_KEPT)
        assert f'paycore_audit_violations{{kind="{kind.value}"}} {value}.0' in lines
    assert "paycore_audit_payments 5.0" in lines
    assert any(line.startswith("paycore_audit_timestamp_seconds 1.") for line in lines)
    assert not list(Path.glob(tmp_path, "audit.prom.*"))


async def test_metrics_file_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    await a_database(url)
    result = await ran("--db", url, "--metrics-file", str(tmp_path / "nowhere" / "audit.prom"))
    assert result.exit_code == UNREADABLE
    assert "cannot be written" in result.stderr


async def test_books_of_the_bank_are_compared(alone: Town) -> None:
    core, bank = alone.core, str(alone.driver.http.base_url)
    assert (await ran("--db", core.url, "--books", bank)).exit_code == NOTHING
    payment_id = await core.make_payment()
    await core.notify(core.word(payment_id, 1, "MADE-UP"))
    result = await ran("--db", core.url, "--books", bank, "--json")
    assert result.exit_code == WRONG
    assert [one["kind"] for one in json.loads(result.stdout)["violations"]] == ["book_capture_absent"]


async def test_unreachable_bank_ends_with_3_after_what_the_database_showed(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    await a_database(url)
    result = await ran("--db", url, "--books", "http://127.0.0.1:9")
    assert result.exit_code == UNREADABLE
    assert "nothing is wrong" in result.stdout
    assert "the books cannot be read" in result.stderr


async def test_break_beside_an_unreachable_bank_ends_with_1(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    await a_database(url, "kept_refunded")
    receiver = Receiver()
    receiver.answer = lambda _: (200, b"nonsense")
    try:
        result = await ran("--db", url, "--books", receiver.url)
    finally:
        receiver.close()
    assert result.exit_code == WRONG
    assert "not the books of a simulated bank" in result.stderr


def test_no_url_of_a_bank_is_wrong_usage(tmp_path: Path) -> None:
    result = run("--db", make_database("sqlite", tmp_path), "--books", "127.0.0.1:8081")
    assert result.exit_code == USAGE
    assert "must be an http or https URL" in result.stderr


@pytest.mark.parametrize("content", [b"", b"not a database at all\n" * 100], ids=["empty", "text"])
def test_file_that_is_no_database_of_ours_ends_with_3(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "paycore.db"
    path.write_bytes(content)
    result = run("--db", f"sqlite:///{path}")
    assert (result.exit_code, result.stdout) == (UNREADABLE, "")
    assert len(result.stderr.splitlines()) == 1


def test_database_that_is_not_there_ends_with_3_and_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "paycore.db"
    assert run("--db", f"sqlite:///{path}").exit_code == UNREADABLE
    assert not path.exists()


def test_server_that_is_not_there_ends_with_3() -> None:
    result = run("--db", "postgresql://nobody@127.0.0.1:9/none")
    assert result.exit_code == UNREADABLE
    assert "cannot be reached" in result.stderr


def test_older_schema_ends_with_3_and_names_the_command(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    change(url, text("UPDATE alembic_version SET version_num = '0001'"))
    result = run("--db", url)
    assert result.exit_code == UNREADABLE
    assert "paycore migrate --db" in result.stderr


def test_table_that_is_gone_ends_with_3(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    change(url, text("DROP TABLE refund_result"))
    result = run("--db", url)
    assert result.exit_code == UNREADABLE
    assert "refund_result" in result.stderr


def test_installed_command_audits_with_warnings_as_errors(tmp_path: Path) -> None:
    command = [str(PAYCORE), "audit", "--db", make_database("sqlite", tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    assert (ended.returncode, ended.stderr) == (NOTHING, "")
    assert ended.stdout.splitlines()[-1] == "nothing is wrong"


async def test_server_with_an_interval_audits_and_shows_every_kind(tmp_path: Path) -> None:
    url = make_database("sqlite", tmp_path)
    await a_database(url, "kept_refunded")
    settings = {"PAYCORE_AUDIT_INTERVAL_SECONDS": "1", "PAYCORE_JOBS": "auditor"}
    with ServerProcess(tmp_path / "paycore.db", env=settings) as server:
        page = wait_for(lambda: _audited(server.metrics_address), "the first audit is in the metrics")
        log = server.log()
    for kind in AuditKind:
        value = int(kind is AuditKind.REFUND_OF_KEPT)
        assert f'paycore_audit_violations{{kind="{kind.value}"}} {value}.0' in page
    assert '"event": "audit_violation"' in log


def _audited(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        page: str = answer.read().decode()
    return page if "paycore_audit_violations{" in page else ""


@pytest.mark.parametrize("interval", ["0", "3600"])
async def test_auditor_run_by_hand_audits_at_once_whoever_has_audited_lately(tmp_path: Path, interval: str) -> None:
    url = make_database("sqlite", tmp_path)
    await a_database(url)
    command = [str(PAYCORE), "run", "auditor", "--once", "--db", url]
    environment = clean_environment({"PAYCORE_AUDIT_INTERVAL_SECONDS": interval})
    for _ in range(2):
        ended = await asyncio.to_thread(
            subprocess.run, command, capture_output=True, text=True, check=False, env=environment
        )
        assert (ended.returncode, ended.stdout) == (NOTHING, "auditor: 5 done, 0 put off\n"), ended.stderr
