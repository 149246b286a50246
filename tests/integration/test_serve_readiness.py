"""The database cannot be written: UNAVAILABLE, nothing acknowledged, readiness down, and back by itself."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from paycore.client import NO_RETRY, PaycoreClient, PaycoreRpcError
from paycore.v1 import payment_pb2, payment_service_pb2
from tests.support.facts import contents
from tests.support.server import ServerProcess, check_health

DEADLINE_SECONDS = 60


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    # The refunder writes as often as it looks for work; here only the heartbeat shall.
    with ServerProcess(tmp_path / "paycore.db", env={"PAYCORE_REFUND_INTERVAL_MS": "600000"}) as process:
        yield process


def wait_until(seen: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not seen():
        assert time.monotonic() < deadline, f"not seen: {what}"
        time.sleep(0.05)


def http(server: ServerProcess, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}{path}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def metric(server: ServerProcess, name: str) -> str:
    _, text = http(server, "/metrics")
    return next(line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(f"{name} "))


def unknown_word(server: ServerProcess, trade: str) -> payment_service_pb2.NotifyResponse:
    with PaycoreClient(server.address, retry=NO_RETRY) as client:
        return client.notify(
            channel="x",
            account="y",
            channel_order_no="not ours",
            result=payment_pb2.CHANNEL_RESULT_SUCCESS,
            amount_minor=1,
            currency="CNY",
            channel_trade_no=trade,
        )


def test_database_held_by_another_process_is_unavailable_and_comes_back_by_itself(server: ServerProcess) -> None:
    assert check_health(server.address) == "SERVING"
    with closing(sqlite3.connect(server.db_path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        before = contents(server.db_path)
        with pytest.raises(PaycoreRpcError) as caught:
            unknown_word(server, "T-1")
        assert (caught.value.code, caught.value.retryable) == (grpc.StatusCode.UNAVAILABLE, True)
        wait_until(lambda: check_health(server.address) == "NOT_SERVING", "NOT_SERVING")
        assert check_health(server.address, "paycore.v1.PaymentService") == "NOT_SERVING"
        assert http(server, "/-/ready")[0] == 503
        assert http(server, "/-/healthy")[0] == 200
        assert metric(server, "paycore_ready") == "0.0"
        assert contents(server.db_path) == before
        holder.execute("ROLLBACK")
    # Nobody calls: the server finds out by itself.
    wait_until(lambda: check_health(server.address) == "SERVING", "SERVING")
    assert http(server, "/-/ready")[0] == 200
    assert metric(server, "paycore_ready") == "1.0"
    assert unknown_word(server, "T-1").outcome == payment_pb2.NOTIFY_OUTCOME_UNKNOWN
    assert len(contents(server.db_path)["quarantine"]) == 1


def test_idle_server_notices_a_held_database_without_a_call(server: ServerProcess) -> None:
    with closing(sqlite3.connect(server.db_path, isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        wait_until(lambda: check_health(server.address) == "NOT_SERVING", "NOT_SERVING")
        holder.execute("ROLLBACK")
    wait_until(lambda: check_health(server.address) == "SERVING", "SERVING")


def test_sigterm_while_the_database_is_held_answers_the_caller_and_ends(server: ServerProcess) -> None:
    with closing(sqlite3.connect(server.db_path, isolation_level=None)) as holder, ThreadPoolExecutor(1) as caller:
        holder.execute("BEGIN EXCLUSIVE")
        answer = caller.submit(unknown_word, server, "T-1")
        wait_until(lambda: "busy" in http(server, "/metrics")[1], "a commit that was tried")
        server.process.terminate()
        error = answer.exception(DEADLINE_SECONDS)
        assert isinstance(error, PaycoreRpcError)
        assert error.code is grpc.StatusCode.UNAVAILABLE
        assert server.wait() == 0
    assert contents(server.db_path)["quarantine"] == []


def test_gauges_of_what_waits_are_kept_up_to_date(server: ServerProcess) -> None:
    unknown_word(server, "T-1")
    unknown_word(server, "T-2")
    wait_until(lambda: metric(server, "paycore_quarantine_open") == "2.0", "two words in quarantine")
    age = "paycore_quarantine_oldest_open_age_seconds"
    wait_until(lambda: float(metric(server, age) or 0) > 0, "the older of them has an age")
    assert metric(server, "paycore_refund_oldest_unfinished_age_seconds") == "0.0"


def test_metrics_name_every_promised_series(server: ServerProcess) -> None:
    unknown_word(server, "T-1")
    status, text = http(server, "/metrics")
    assert status == 200
    assert 'paycore_notify_total{channel="unconfigured",outcome="UNKNOWN",replayed="false"} 1.0' in text
    for name in (
        "paycore_notify_seconds_bucket",
        "paycore_commit_group_size_bucket",
        "paycore_commit_seconds_bucket",
        "paycore_queue_depth",
        "paycore_index_entries",
        "paycore_index_bytes",
        "paycore_quarantine_open",
        "paycore_refund_oldest_unfinished_age_seconds",
    ):
        assert f"\n{name}" in text, name
    assert "# TYPE paycore_refunds_total counter" in text


def test_metrics_pass_prometheus_own_check(server: ServerProcess) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    unknown_word(server, "T-1")
    _, text = http(server, "/metrics")
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_path_that_is_not_there_is_named(server: ServerProcess) -> None:
    status, text = http(server, "/nothing")
    assert status == 404
    assert "/metrics" in text
