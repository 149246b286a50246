"""What each job tells of itself through a server: when it last succeeded, how far it is behind, how often it failed."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from psycopg import sql

from paycore.settings import JOB_NAMES
from tests.support import postgres
from tests.support.bank import Street
from tests.support.clock import ManualClock
from tests.support.core import CHANNEL, VALIDITY_MS, Core, pay_command
from tests.support.scripted import ScriptedChannel
from tests.support.server import ServerProcess
from tests.support.simbank import SECRETS, wait_for

SUCCESS, LAG = "paycore_job_last_success_timestamp_seconds", "paycore_job_lag_seconds"
FAILURES = "paycore_job_failures_total"
BEHIND = ("refunder", "closer", "recoverer", "ender")
"""The jobs that have work here which no process can do: its account is configured nowhere."""
OWED = 3


async def leave_work(url: str) -> None:
    """Leave work about bank A behind that is long due: to close, to ask about, to end and to send back."""
    ten_minutes_ago = ManualClock(time.time_ns() // 1_000_000 - 600_000)
    with Core(url, clock=ten_minutes_ago, channels={CHANNEL: ScriptedChannel()}) as core:
        await core.pay(pay_command("expired", validity_ms=60_000))
        for account in ("bank_a", "bank_b"):
            await core.pay(pay_command("superseded", account, validity_ms=VALIDITY_MS + 3_600_000))
        for number in range(OWED):
            payment_id = await core.make_payment("bank_b", "bank_a")
            first = core.word(payment_id, 1, f"B{number}", account="bank_b")
            await core.notify_many(first, core.word(payment_id, 2, f"A{number}", account="bank_a"))


class Served(NamedTuple):
    """A server, and the PostgreSQL database that it works on."""

    server: ServerProcess
    url: str


@pytest.fixture
async def served(street: Street, tmp_path: Path) -> AsyncIterator[Served]:
    """A server with every job, over work that it cannot do: bank A is not configured."""
    url = postgres.fresh_postgres()
    await leave_work(url)
    env = {
        "PAYCORE_SIMBANK_URL": street.bank.url,
        "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
        "PAYCORE_SIMBANK_ACCOUNTS": "bank_b",
        "PAYCORE_REPAIR_INTERVAL_MS": "200",
        "PAYCORE_REFUND_INTERVAL_MS": "200",
        "PAYCORE_QUARANTINE_INTERVAL_MS": "200",
        "PAYCORE_SWEEP_INTERVAL_SECONDS": "1",
        "PAYCORE_AUDIT_INTERVAL_SECONDS": "1",
        "PAYCORE_REFUND_ATTENTION_SECONDS": "60",
    }
    (tmp_path / "unused.db").touch()
    with ServerProcess(tmp_path / "unused.db", env=env, arguments=["--db", url]) as server:
        yield Served(server, url)


def read(server: ServerProcess, name: str) -> dict[str, float]:
    """A metric's samples: the job's name, or nothing -> value."""
    with urllib.request.urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as page:
        text = page.read().decode()
    return {job: float(value) for job, value in re.findall(rf'^{name}(?:{{job="(\w+)"}})? (\S+)$', text, re.MULTILINE)}


def wait_until_all(server: ServerProcess, name: str, above: Mapping[str, float], what: str) -> dict[str, float]:
    """Wait until every job's sample lies above what it was."""

    def look() -> dict[str, float] | None:
        found = read(server, name)
        return found if all(found.get(job, 0) > above.get(job, 0) for job in JOB_NAMES) else None

    return wait_for(look, what, 60)


async def test_each_job_tells_of_its_successes_its_lag_and_its_failures(served: Served) -> None:
    server = served.server
    first = wait_until_all(server, SUCCESS, {}, "each job has made a pass")
    lag = read(server, LAG)
    assert lag.keys() == set(JOB_NAMES)
    assert all(lag[job] > 60 for job in BEHIND), lag
    assert read(server, FAILURES) == dict.fromkeys(JOB_NAMES, 0.0)
    # A person is told of each old refund.
    wait_for(lambda: read(server, "paycore_refunds_need_attention") == {"": OWED}, "the gauge shows old refunds")
    second = wait_until_all(server, SUCCESS, first, "each job has made another pass")
    grown = read(server, LAG)
    assert all(grown[job] > lag[job] for job in BEHIND), (lag, grown)
    with away(served.url):
        wait_until_all(server, FAILURES, {}, "each job has failed")
    wait_until_all(server, SUCCESS, second, "each job has made a pass again")


@contextmanager
def away(url: str) -> Iterator[None]:
    """Let nobody into a database, and end who is in it."""
    running, name = postgres.server(postgres.NEWEST), url.rpartition("/")[2].partition("?")[0]
    alter = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    running.run(alter.format(sql.Identifier(name), sql.SQL("false")))
    try:
        running.run("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", name)
        yield
    finally:
        running.run(alter.format(sql.Identifier(name), sql.SQL("true")))
