"""``paycore simbank`` and ``paycore forwarder`` as processes: how they start, say that they are ready, and stop."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.simbank import SECRETS, Driver, bank_process, running, start, wait_for

NOWHERE = "http://127.0.0.1:1/notifications"


def refusal(verb: str, *flags: str, env: dict[str, str] | None = None) -> str:
    """Run a process that must not start; return what it says, in one line."""
    with start(verb, *flags, env={"COLUMNS": "400", "NO_COLOR": "1", **(env or {})}) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode not in {0, -signal.SIGTERM}
    assert out == ""
    assert "Traceback" not in err
    return err


def test_port_0_prints_and_writes_the_real_port(tmp_path: Path) -> None:
    with bank_process(tmp_path, NOWHERE) as bank:
        assert bank.process.stdout
        assert bank.process.stdout.readline() == f"listening on {bank.address}\n"
        ready = json.loads((tmp_path / "simbank.ready").read_text())
        assert ready == {"address": bank.address, "pid": bank.process.pid}
        assert httpx.get(f"{bank.url}/books", trust_env=False).json() == {
            "banks": {name: {"orders": []} for name in SECRETS}
        }


def test_ready_file_of_an_earlier_run_is_taken_away_first(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.write_text("old")
    flags = ("--books", str(tmp_path / "books.db"), "--listen", "127.0.0.1:0", "--ready-file", str(ready))
    with start("simbank", *flags) as process:
        wait_for(lambda: not ready.exists() or ready.read_text() != "old", "the old ready file is gone")
        wait_for(ready.exists, "a new ready file")
        assert json.loads(ready.read_text())["pid"] == process.pid
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_bank_stops_cleanly_on_a_signal_even_while_it_hangs(tmp_path: Path, number: signal.Signals) -> None:
    with (
        bank_process(tmp_path, NOWHERE) as bank,
        Driver(bank.url) as driver,
        _hanging_query(bank.url, driver) as client,
    ):
        os.kill(bank.process.pid, number)
        assert bank.process.wait(timeout=20) == 0
        client.kill()
        client.communicate()


def _hanging_query(url: str, driver: Driver) -> "subprocess.Popen[str]":
    """Start a client whose query hangs; return once it does."""
    driver.plant(order_no="1", hang_before_doing={"query": {"value": True, "times": 1}})
    program = (
        "import asyncio, sys; from tests.support.simbank import adapter;"
        "asyncio.run(adapter(sys.argv[1]).query('bank_a', '1'))"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", program, url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def hangs() -> bool:
        (fault,) = driver.http.get("/faults", params={"bank": "bank_a"}).json()["faults"]
        return bool(fault["times_left"] == 0)

    wait_for(hangs, "the query hangs")
    return client


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--listen", "0.0.0.0:0"), "loopback only"),
        (("--listen", "192.0.2.1:0"), "loopback only"),
        (("--listen", "[::]:0"), "loopback only"),
        (("--listen", "bank.test:0"), "must be a loopback address"),
        (("--listen", "127.0.0.1"), "must be host:port"),
        (("--listen", "127.0.0.1:65536"), "must be host:port"),
        (("--listen", "127.0.0.1:-1"), "must be host:port"),
        (("--ladder-ms", "soon"), "must be whole milliseconds"),
        (("--forwarder-url", "ftp://x"), "must be an http or https URL"),
        (("--forwarder-url", "http://127.0.0.1:99999"), "must be an http or https URL"),
        (("--forwarder-url", "http://["), "must be an http or https URL"),
        (("--secrets", "{}"), "must name each bank"),
        (("--secrets", '{"bank_a": "short"}'), "the secret of bank_a must be at least 16"),
        (("--ready-file", "/nonexistent/ready"), "its folder does not exist"),
        (("--books", "/nonexistent/books.db"), "the bank's books cannot be opened"),
    ],
)
def test_simbank_bad_flag_is_refused_in_a_line_that_says_what_to_do(
    tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    defaults = ("--listen", "127.0.0.1:0", "--books", str(tmp_path / "books.db"))
    assert words in refusal("simbank", *defaults, *flags)


def test_forwarder_refuses_to_listen_beyond_loopback() -> None:
    assert "loopback only" in refusal("forwarder", "--listen", "0.0.0.0:0")


def test_missing_secrets_are_asked_for_by_name(tmp_path: Path) -> None:
    said = refusal("simbank", "--books", str(tmp_path / "books.db"), env={"PAYCORE_SIMBANK_SECRETS": ""})
    assert "PAYCORE_SIMBANK_SECRETS" in said


def test_port_in_use_is_said(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refusal("simbank", "--listen", listen, "--books", str(tmp_path / "books.db"))
    assert "Address already in use" in said


def test_books_in_use_are_said(tmp_path: Path) -> None:
    with bank_process(tmp_path, NOWHERE):
        said = refusal("simbank", "--listen", "127.0.0.1:0", "--books", str(tmp_path / "books.db"))
    assert "in use by another process" in said


def test_settings_from_the_environment_are_used(tmp_path: Path) -> None:
    env = {
        "PAYCORE_SIMBANK_LISTEN": "127.0.0.1:0",
        "PAYCORE_SIMBANK_BOOKS": str(tmp_path / "books.db"),
        "PAYCORE_SIMBANK_SECRETS": json.dumps({"bank_x": "0123456789abcdef"}),
    }
    with running("simbank", tmp_path, env=env) as bank:
        assert list(httpx.get(f"{bank.url}/books", trust_env=False).json()["banks"]) == ["bank_x"]
    assert (tmp_path / "books.db").exists()
