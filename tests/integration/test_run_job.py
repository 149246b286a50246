"""``paycore run``: a job by hand, in a process of its own, beside others."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
from collections.abc import Iterator
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
def running(street: Street, url: str, job: str, count: int) -> Iterator[None]:
    """Run a job in so many processes; end them, and see them end in peace."""
    command = [str(PAYCORE), "run", job, "--db", url]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen(command, env=environment(street), **pipes) for _ in range(count)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == f"paycore runs the {job}\n"
        yield
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


@pytest.mark.parametrize(
    ("arguments", "env", "code", "said"),
    [
        (["nobody"], {}, 2, "JOB: nobody is none; must be one of refunder, closer"),
        (["refunder", "--db", "sqlite:////nowhere/at/all.db"], {}, 1, "no such database; run: paycore migrate"),
        (["refunder"], {"PAYCORE_REFUND_RETRY_MS": "0"}, 2, "PAYCORE_REFUND_RETRY_MS: "),
    ],
)
def test_job_that_cannot_run_says_why_in_a_line(
    street: Street, arguments: list[str], env: dict[str, str], code: int, said: str
) -> None:
    ended = run(street, *arguments, "--once", **env)
    assert ended.returncode == code
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
