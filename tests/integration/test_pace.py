"""One process holds every one of its jobs to one pace at a channel: what each would do alone, they do together."""

from __future__ import annotations

import asyncio
import json

from sqlalchemy import text

from paycore.app.jobs import build_jobs
from paycore.app.run import lone_core
from paycore.domain.ids import format_channel_order_no
from paycore.settings import JobName, load_settings
from tests.support.bank import Town
from tests.support.core import change
from tests.support.owed import owe
from tests.support.simbank import SECRETS

CALLS_PER_SECOND = 20
JOBS: tuple[JobName, ...] = ("refunder", "closer", "recoverer", "ender", "examiner")
ASKED = ("query", "close", "refund", "query_refund")


async def leave_work_for_all(town: Town) -> None:
    """Leave more than a second's work for each job: to close and ask about, to end, to judge again, to send back."""
    for _ in range(12):
        await town.core.pay(town.order("bank_b", validity_ms=1_000))
    for _ in range(12):
        command = town.order("bank_b")
        payment_id = (await town.core.pay(command)).payment.payment_id
        await town.core.pay(command._replace(account="bank_c"))
        wrong = town.core.word(payment_id, 1, "WRONG", account="bank_b", amount_minor=1)
        await town.core.notify(wrong._replace(channel_order_no=format_channel_order_no(payment_id, 1)))
    await owe(town, 12)
    change(town.core.url, text("UPDATE task SET next_at_ms = 1"))
    await asyncio.sleep(1)


async def test_jobs_of_a_process_keep_a_channels_pace_together(town: Town) -> None:
    await leave_work_for_all(town)
    settings = load_settings(
        {
            "db": town.core.url,
            "simbank_url": str(town.driver.http.base_url).rstrip("/"),
            "simbank_secrets": json.dumps(SECRETS),
            "simbank_calls_per_second": CALLS_PER_SECOND,
            "channel_timeout_ms": 15_000,
        }
    )

    def asked() -> int:
        counts = [town.driver.asked(bank) for bank in ("bank_b", "bank_c")]
        return sum(count[operation] for count in counts for operation in ASKED)

    async with lone_core(settings) as core:
        jobs = [planned.job for planned in build_jobs(settings, core, JOBS)]
        before, began = asked(), asyncio.get_running_loop().time()
        passes = await asyncio.gather(*(job.run_once() for job in jobs))
        took_ms = int((asyncio.get_running_loop().time() - began) * 1_000)
        calls = asked() - before
    assert all(one.done + one.put_off for one in passes), dict(zip(JOBS, passes, strict=True))
    assert calls > 3 * CALLS_PER_SECOND
    # What an idle channel saved up, a tenth of a second's calls, comes on top.
    assert calls <= CALLS_PER_SECOND // 10 + 1 + took_ms * CALLS_PER_SECOND // 1_000
