"""The connection to PostgreSQL is cut at each kind of statement of a group in turn, those of a new connection too."""

from __future__ import annotations

from pathlib import Path

import pytest

from paycore.domain.errors import StoreUnavailableError
from paycore.domain.notification import Notification
from tests.support.clock import ManualClock
from tests.support.core import AMOUNT_MINOR, Core, check_money_rules, open_attempt, read_all
from tests.support.cutting import CuttingLink, When
from tests.support.databases import take_database

ANSWERS = ["ACCEPTED", "DUPLICATE", "RECORDED", "LATE", "MISMATCH", "DUPLICATE"]

STEPS = {
    "words": [
        *(b"set_config", b"current_setting", b"BEGIN", b"COMMIT", b"FOR NO KEY UPDATE"),
        *(b"FROM payment", b"FROM channel_order", b"FROM excess_payment", b"FROM payment_outcome"),
        *(
            b"INSERT INTO payment_outcome",
            b"(held open)",
            b"DELETE FROM payment_outcome",
            b"INSERT INTO excess_payment",
        ),
        *(b"INSERT INTO refund ", b"INSERT INTO refund_try", b"INSERT INTO quarantine", b"UPDATE channel_order"),
    ],
    "pay": [
        *(b"SAVEPOINT", b"INSERT INTO payment ", b"INSERT INTO merchant_order", b"INSERT INTO channel_order"),
        b"INSERT INTO task",
    ],
}
"""Words of the statements that are cut."""

SET_UP = (b"set_config", b"current_setting")
"""Of a connection that is not there yet: a group without one is not tried again at once."""

WRITTEN = {
    "words": {"payment_outcome": 1, "excess_payment": 3, "refund": 2, "refund_try": 2, "quarantine": 1},
    "pay": {"payment": 1, "merchant_order": 1, "channel_order": 1},
}


async def make_words(core: Core, other: Core) -> list[Notification]:
    """One of each kind that writes something of its own; the last loses its insert to the other server's success."""
    ids = [await core.make_payment("bank_a", "bank_b") for _ in range(4)]
    late = await core.make_payment("bank_a", "bank_b", validity_ms=-1)
    await core.notify(core.word(ids[1]))
    await other.notify(other.word(ids[3]))
    return [
        core.word(ids[0]),
        core.word(ids[1], 2, "T2"),
        core.failure(ids[2]),
        core.word(late),
        core.word(ids[2], 2, "T2", amount_minor=AMOUNT_MINOR - 1),
        core.word(ids[3], 2, "T2"),
    ]


async def tell(core: Core, words: list[Notification]) -> None:
    """Have the words decided in one group. Raises StoreUnavailableError."""
    verdicts = await core.notify_many(*words)
    assert [(verdict.outcome.name, verdict.replayed) for verdict in verdicts] == [(one, False) for one in ANSWERS]


async def pay(core: Core, number: str) -> None:
    """Open a payment's first attempt. Raises StoreUnavailableError."""
    opened = await core.writer.run(open_attempt(core, number))
    assert opened.step.name == "CREATE"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["instead", "answered"])
@pytest.mark.parametrize("unit", ["words", "pay"])
async def test_group_whose_connection_is_cut_at_any_statement_is_decided_again_or_not_acknowledged(
    tmp_path: Path, unit: str, when: When
) -> None:
    url = take_database("postgresql", tmp_path)
    with (
        CuttingLink(url) as link,
        Core(link.url, clock=ManualClock()) as core,
        Core(url, clock=core.clock) as other,
    ):
        for step in STEPS[unit]:
            words = await make_words(core, other) if unit == "words" else []
            before, cuts = read_all(url), link.cuts
            # On a new connection every statement goes out by its text.
            core.store.dispose()
            link.arm(step, when)
            try:
                await (tell(core, words) if words else pay(core, f"cut-at-{step.decode()}"))
            except StoreUnavailableError:
                assert step in SET_UP
                assert read_all(url) == before
                await (tell(core, words) if words else pay(core, f"cut-at-{step.decode()}"))
            assert link.cuts == cuts + 1, step
            rows = read_all(url)
            grown = {name: len(rows[name]) - len(before[name]) for name in rows}
            assert {name: grown[name] for name in WRITTEN[unit]} == WRITTEN[unit], step
            check_money_rules(rows)
