"""``paycore run``: a job by hand, in a process of its own, beside others."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import termios
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support.bank import Street, Town
from tests.support.core import AMOUNT_MINOR, check_money_rules
from tests.support.server import PAYCORE, clean_environment
from tests.support.simbank import SECRETS, wait_for

BOTH = ((1, "bank_a"), (2, "bank_b"))


def environment(street: Street) -> dict[str, str]:
    return clean_environment(
        {
            "PAYCORE_SIMBANK_URL": street.bank.url,
            "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
            "PAYCORE_REFUND_INTERVAL_MS": "50",
        }
    )


def run(street: Street, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PAYCORE, "run", *arguments],
        env={**environment(street), **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fetch(address: str) -> str:
    with urllib.request.urlopen(address, timeout=10) as answer:
        page: str = answer.read().decode()
    return page


async def paid_twice(town: Town) -> int:
    """A payment that was paid at two banks and owes a refund."""
    command = town.order()
    payment_id: int = (await town.core.pay(command)).payment.payment_id
    await town.core.pay(command._replace(account="bank_b"))
    for attempt, bank in BOTH:
        town.user_pays(payment_id, attempt, bank)
        await town.hand_on(payment_id, attempt)
    return payment_id


async def test_refunder_run_once_by_hand_sends_back_what_is_owed_and_says_how_much(town: Town, street: Street) -> None:
    payments = [await paid_twice(town) for _ in range(3)]
    ended = run(street, "refunder", "--once", "--db", town.core.url)
    assert (ended.returncode, ended.stdout) == (0, "refunder: 3 done, 0 put off\n"), ended.stderr
    assert [town.kept_minor(payment_id, *BOTH) for payment_id in payments] == [AMOUNT_MINOR] * 3
    again = run(street, "refunder", "--once", "--db", town.core.url)
    assert (again.returncode, again.stdout) == (0, "refunder: 0 done, 0 put off\n"), again.stderr
    check_money_rules(town.core.snapshot())


@contextlib.contextmanager
def running(
    street: Street, url: str, job: str, count: int, *flags: str, env: Mapping[str, str] | None = None
) -> Iterator[list[str]]:
    """Run a job in so many processes and give the line that each says; end them, and see them end in peace."""
    command = [str(PAYCORE), "run", job, "--db", url, *flags]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    whole_env = {**environment(street), **(env or {})}
    processes = [subprocess.Popen(command, env=whole_env, **pipes) for _ in range(count)]
    try:
        said = [process.stdout.readline() for process in processes if process.stdout is not None]
        assert flags or said == [f"paycore runs the {job}\n"] * count
        yield said
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.communicate(timeout=30)
        codes = [process.returncode for process in processes]
    assert codes == [0] * count


async def test_refunders_in_two_processes_beside_each_other_send_each_refund_once(town: Town, street: Street) -> None:
    with running(street, town.core.url, "refunder", 2):
        payments = [await paid_twice(town) for _ in range(4)]
        wait_for(
            lambda: [town.kept_minor(payment_id, *BOTH) for payment_id in payments] == [AMOUNT_MINOR] * 4,
            "all surplus is back",
        )
    for payment_id in payments:
        assert len(town.books(payment_id, 2, "bank_b")["refunds"]) == 1
    check_money_rules(town.core.snapshot())


def run_on_a_terminal(street: Street, *arguments: str) -> tuple[int, str, str]:
    """Run a job whose standard error is a terminal; return its exit code, its output, and what the terminal got."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen(
        [str(PAYCORE), "run", *arguments],
        env={**environment(street), "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    shown = b""
    # Linux ends the reading of a terminal that nobody has open any more with an error.
    with contextlib.suppress(OSError):
        while piece := os.read(ours, 65_536):
            shown += piece
    os.close(ours)
    output, _ = process.communicate(timeout=30)
    return process.returncode, output, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


async def test_refunder_run_once_on_a_terminal_shows_a_bar_with_what_is_done(town: Town, street: Street) -> None:
    for _ in range(3):
        await paid_twice(town)
    code, output, text = run_on_a_terminal(street, "refunder", "--once", "--db", town.core.url)
    assert (code, output) == (0, "refunder: 3 done, 0 put off\n")
    assert re.search(r"refunder\s+\S*━", text), text
    assert "3/3" in text, text


async def test_job_that_runs_on_shows_its_metrics_where_it_is_asked_to_and_nowhere_else(
    town: Town, street: Street
) -> None:
    payment_id = await paid_twice(town)
    flag = ("--metrics-listen", "127.0.0.1:0")
    with running(street, town.core.url, "refunder", 1, *flag, env={"PAYCORE_METRICS_LISTEN": "not an address"}) as said:
        address = said[0].removeprefix("paycore runs the refunder, metrics at ").strip()
        wait_for(lambda: town.kept_minor(payment_id, *BOTH) == AMOUNT_MINOR, "the surplus is back")

        def counted() -> bool:
            page = fetch(address)
            return 'paycore_job_items_total{job="refunder",result="done"} 1.0' in page and "paycore_ready 1.0" in page

        wait_for(counted, "it is counted")
        assert fetch(address.replace("/metrics", "/-/ready")) == "ready\n"


@pytest.mark.parametrize(
    ("arguments", "env", "code", "said"),
    [
        (["nobody"], {}, 2, "JOB: nobody is none; must be one of refunder, closer"),
        (["refunder", "--db", "sqlite:////nowhere/at/all.db"], {}, 1, "no such database; run: paycore migrate"),
        (["refunder"], {"PAYCORE_REFUND_RETRY_MS": "0"}, 2, "PAYCORE_REFUND_RETRY_MS: "),
        (["refunder", "--metrics-listen", "127.0.0.1:0"], {}, 2, "--metrics-listen: nobody reads"),
    ],
)
def test_job_that_cannot_run_says_why_in_a_line(
    street: Street, arguments: list[str], env: dict[str, str], code: int, said: str
) -> None:
    ended = run(street, *arguments, "--once", **env)
    assert ended.returncode == code
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
