"""The command line against a real server and bank: what is printed, and the exit codes."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paycore import __version__
from paycore.cli import build
from tests.support.facts import contents
from tests.support.server import PAYCORE, ServerProcess, clean_environment
from tests.support.simbank import SECRETS, bank_process

VERBS = ["serve", "migrate", "pay", "notify", "query", "close", "simbank", "forwarder", "demo"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("cli")
    with bank_process(folder, "http://127.0.0.1:9/notifications") as bank:
        env = {"PAYCORE_SIMBANK_URL": bank.url, "PAYCORE_SIMBANK_SECRETS": str(SECRETS).replace("'", '"')}
        with ServerProcess(folder / "paycore.db", env=env) as process:
            yield process


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(build(VERBS), list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1", **(env or {})})


def at(server: ServerProcess, verb: str, *arguments: str) -> Result:
    return run(verb, *arguments, "--server", server.address)


def answer(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def pay_arguments(order_no: str, **changes: str) -> list[str]:
    given = {
        "merchant-id": "shop",
        "order-no": order_no,
        "amount-minor": "1999",
        "currency": "CNY",
        "subject": "A book",
        "channel": "simbank",
        "account": "bank_a",
        **changes,
    }
    return [part for name, value in given.items() for part in (f"--{name}", value)]


def notify_arguments(channel_order_no: str, *more: str) -> list[str]:
    return [
        "--channel", "simbank", "--account", "bank_a", "--channel-order-no", channel_order_no,
        "--amount-minor", "1999", "--currency", "CNY", "--channel-trade-no", "T-1", *more,
    ]  # fmt: skip


def test_version_is_printed() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"paycore {__version__}\n")


def test_help_names_every_verb_and_the_first_steps() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for verb in VERBS:
        assert re.search(rf"^\W*{verb} ", result.stdout, re.MULTILINE), verb
    assert "First steps" in result.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_teaches_by_example(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
    assert f"paycore {verb}" in result.stdout


def test_installed_command_runs() -> None:
    ended = subprocess.run([PAYCORE, "--version"], env=clean_environment(), capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"paycore {__version__}\n", "")


def test_payment_is_played_through_by_commands(server: ServerProcess) -> None:
    paid_for = answer(at(server, "pay", *pay_arguments("cli-1"), "--json"))
    assert paid_for["next_action"] == "PAY_NEXT_ACTION_REDIRECT"
    number = paid_for["attempt"]["channel_order_no"]
    notified = answer(at(server, "notify", *notify_arguments(number, "--header", "a=1", "--header", "a=2"), "--json"))
    assert notified["outcome"] == "NOTIFY_OUTCOME_ACCEPTED"
    by_order = answer(at(server, "query", "--merchant-id", "shop", "--order-no", "cli-1", "--json"))
    by_number = answer(at(server, "query", "--channel-order-no", number, "--json"))
    assert by_order == by_number
    assert by_order["state"] == "PAYMENT_STATE_PAID"


def test_words_for_people_say_what_happened(server: ServerProcess) -> None:
    paid_for = at(server, "pay", *pay_arguments("cli-2", method="qr"))
    assert paid_for.exit_code == 0
    number = re.findall(r"channel order +(\d+)", paid_for.stdout)[0]
    assert "SHOW_QR" in paid_for.stdout
    wrong = at(server, "notify", *notify_arguments(number, "--amount-minor", "1998"))
    assert "MISMATCH" in wrong.stdout
    assert "ACCEPTED" in at(server, "notify", *notify_arguments(number)).stdout
    assert "ACCEPTED (replayed)" in at(server, "notify", *notify_arguments(number)).stdout
    shown = at(server, "query", "--merchant-id", "shop", "--order-no", "cli-2").stdout
    assert "19.99 CNY" in shown
    assert "PAID by attempt 1, trade T-1" in shown
    assert "19.98 CNY" in shown


def test_close_shows_the_closed_payment(server: ServerProcess) -> None:
    assert at(server, "pay", *pay_arguments("cli-3")).exit_code == 0
    closed = at(server, "close", "--merchant-id", "shop", "--order-no", "cli-3")
    assert closed.exit_code == 0
    assert "CLOSED (MERCHANT)" in closed.stdout


def test_refused_call_names_reason_and_fields_and_ends_with_one(server: ServerProcess) -> None:
    before = contents(server.db_path)
    result = at(server, "pay", *pay_arguments("cli-4", currency="cny", **{"amount-minor": "0"}))
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("INVALID_ARGUMENT: ")
    assert [line.strip().partition(":")[0] for line in lines[1:]] == ["amount_minor", "currency"]
    assert contents(server.db_path) == before


def test_payment_that_is_not_there_is_one_line(server: ServerProcess) -> None:
    result = at(server, "query", "--payment-id", "1")
    assert (result.exit_code, result.stderr) == (1, "PAYMENT_NOT_FOUND: no such payment\n")


def test_server_that_is_not_there_ends_with_three_and_says_what_to_do() -> None:
    result = run("query", "--payment-id", "1", "--server", "127.0.0.1:9")
    assert result.exit_code == 3
    assert result.stderr.startswith("UNAVAILABLE: ")
    assert "paycore serve" in result.stderr


WRONG_USAGE = [
    ["query"],
    ["query", "--payment-id", "one"],
    ["query", "--payment-id", "1", "--channel-order-no", "101"],
    ["close", "--merchant-id", "shop"],
    ["pay"],
    ["pay", *pay_arguments("x", method="cash")],
    ["pay", *pay_arguments("x", **{"amount-minor": "19.99"})],
    ["pay", *pay_arguments("x", **{"amount-minor": str(2**63)})],
    ["notify", *notify_arguments("101", "--header", "no value")],
    ["notify", *notify_arguments("101", "--raw-file", "/no/such/file")],
    ["no-such-verb"],
]


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_ends_with_two(server: ServerProcess, arguments: list[str]) -> None:
    result = run(*arguments, env={"PAYCORE_SERVER": server.address})
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_migrate_prints_the_versions_and_may_run_again(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    first, second = run("migrate", "--db", url), run("migrate", env={"PAYCORE_DB": url})
    assert (first.exit_code, second.exit_code) == (0, 0)
    version = re.fullmatch(rf"{re.escape(url)}: empty -> (\S+)\n", first.stdout)
    assert version is not None
    assert second.stdout == f"{url}: {version[1]} -> {version[1]} (nothing to do)\n"


@pytest.mark.parametrize("url", ["sqlite://", "postgresql://host/db", "sqlite:////no/such/folder/paycore.db"])
def test_migrate_of_what_cannot_be_is_one_line(url: str) -> None:
    result = run("migrate", "--db", url)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1


def test_text_from_outside_cannot_steer_the_terminal(server: ServerProcess) -> None:
    paid_for = answer(at(server, "pay", *pay_arguments("cli-5"), "--json"))
    number = paid_for["attempt"]["channel_order_no"]
    evil = at(server, "notify", *notify_arguments(number, "--currency", "\x1b[31m", "--channel-trade-no", "[bold]x\r"))
    assert "MISMATCH" in evil.stdout
    shown = at(server, "query", "--channel-order-no", number)
    assert shown.exit_code == 0
    assert "\x1b" not in shown.stdout
    assert "\r" not in shown.stdout
    assert "[bold]x" in shown.stdout
