"""``paycore quarantine`` as it is typed: what it prints, what it decides, and what it refuses and why."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from paycore.cli import build
from paycore.domain.verdicts import NotifyOutcome
from paycore.store.rows import QuarantineRow
from tests.support.bank import Street, Town
from tests.support.core import check_money_rules
from tests.support.quarantine import assert_only_back, evidence_of, the_row, verdicts_of
from tests.support.simbank import SECRETS

DONE, REFUSED, USAGE, UNAVAILABLE = 0, 1, 2, 3
WRONG_MINOR = 999
NASTY = "T\x1b[2J\u202e1"

BY_MARY = ("--reason", "the bank's mail of May 3", "--who", "mary")


@pytest.fixture
def env(street: Street, town: Town) -> dict[str, str]:
    """Settings as a server has them."""
    return {
        "NO_COLOR": "1",
        "PAYCORE_DB": town.core.url,
        "PAYCORE_SIMBANK_URL": street.bank.url,
        "PAYCORE_SIMBANK_SECRETS": json.dumps(SECRETS),
        "PAYCORE_LOG_LEVEL": "error",
    }


async def run(env: dict[str, str], *arguments: str) -> Result:
    """Beside a running event loop: the command has one of its own."""
    invoke = CliRunner().invoke
    return await asyncio.to_thread(lambda: invoke(build(["quarantine"]), ["quarantine", *arguments], env=env))


async def a_payment(town: Town, *words: dict[str, Any]) -> int:
    """A payment, and these words about its first attempt."""
    payment_id: int = (await town.core.pay(town.order())).payment.payment_id
    for changes in words:
        await town.core.notify(town.core.word(payment_id, 1, **changes))
    return payment_id


async def paid_twice_on_one_page(town: Town) -> tuple[int, str, QuarantineRow]:
    payment_id = (await town.core.pay(town.order())).payment.payment_id
    trade_nos = town.user_pays(payment_id, pay_twice_on_page=True)
    for trade_no in trade_nos:
        await town.core.notify(town.core.word(payment_id, 1, trade_no))
    return payment_id, trade_nos[1], the_row(town.core, NotifyOutcome.SECOND_CAPTURE)


async def test_list_shows_open_entries_oldest_first_and_by_reason_and_page(town: Town, env: dict[str, str]) -> None:
    await a_payment(town, {"trade_no": "T1"}, {"trade_no": "T2"}, {"trade_no": "T1", "amount_minor": WRONG_MINOR})
    first, second = evidence_of(town.core)
    listed = await run(env, "list")
    assert listed.exit_code == DONE, listed.stderr
    lines = [line for line in listed.stdout.splitlines() if "simbank/bank_a" in line]
    assert [row.quarantine_id[:12] in line for row, line in zip((first, second), lines, strict=True)] == [True, True]
    assert "SECOND_CAPTURE" in lines[0]
    assert "9.99 CNY" in lines[1]
    only = await run(env, "list", "--reason", "mismatch", "--json")
    (entry,) = map(json.loads, only.stdout.splitlines())
    assert (entry["quarantine_id"], entry["payment_id"]) == (second.quarantine_id, str(second.payment_id))
    page = await run(env, "list", "--limit", "1")
    assert f"--after {first.quarantine_id[:12]}" in page.stdout
    rest = await run(env, "list", "--after", first.quarantine_id[:12], "--json")
    assert [json.loads(line)["quarantine_id"] for line in rest.stdout.splitlines()] == [second.quarantine_id]


async def test_text_of_evidence_never_reaches_the_terminal_as_it_came(town: Town, env: dict[str, str]) -> None:
    raw = b"\x1b]0;owned\x07\xff{}"
    await a_payment(town, {"trade_no": NASTY, "account": "bank_b", "raw": raw, "headers": '{"a":"\x1b[1m"}'})
    row = the_row(town.core, NotifyOutcome.CONFLICT)
    for arguments in (
        ("list",),
        ("show", row.quarantine_id),
        ("list", "--json"),
        ("show", row.quarantine_id, "--json"),
    ):
        shown = await run(env, *arguments)
        assert shown.exit_code == DONE
        assert not {"\x1b", "\x07", "\u202e"} & set(shown.stdout)
    whole = json.loads((await run(env, "show", row.quarantine_id, "--json")).stdout)
    assert (bytes.fromhex(whole["raw_hex"]), whole["channel_trade_no"]) == (raw, NASTY)


async def test_confirmed_second_capture_goes_back_with_reason_and_name_on_record(
    town: Town, env: dict[str, str]
) -> None:
    payment_id, second, row = await paid_twice_on_one_page(town)
    done = await run(env, "resolve", row.quarantine_id[:12], "--verdict", "confirmed", *BY_MARY)
    assert done.exit_code == DONE, done.stderr
    assert "confirmed by mary: the bank's mail of May 3" in done.stdout
    (entry,) = json.loads(the_row(town.core, NotifyOutcome.SECOND_CAPTURE).resolutions)
    assert (entry["verdict"], entry["who"]) == ("confirmed", "mary")
    await assert_only_back(town, payment_id, second)
    # The word again is a replay to a server that did not decide it.
    replay = await town.core.notify(town.core.word(payment_id, 1, second))
    assert (replay.outcome, replay.replayed) == (NotifyOutcome.SECOND_CAPTURE, True)
    assert evidence_of(town.core, only_open=True) == []


async def test_dismissed_entry_is_kept_closed_moves_no_money_and_opens_with_the_next_word(
    town: Town, env: dict[str, str]
) -> None:
    payment_id, second, row = await paid_twice_on_one_page(town)
    done = await run(env, "resolve", row.quarantine_id, "--verdict", "dismissed", *BY_MARY)
    assert done.exit_code == DONE, done.stderr
    assert (await run(env, "list")).stdout.count("simbank/bank_a") == 0
    assert "dismissed" in (await run(env, "list", "--all")).stdout
    await assert_only_back(town, payment_id)
    again = await run(env, "resolve", row.quarantine_id, "--verdict", "dismissed", *BY_MARY)
    assert (again.exit_code, again.stderr) == (
        REFUSED,
        "RESOLVED_ALREADY: it is resolved; the same word opens it again\n",
    )
    await town.core.notify(town.core.word(payment_id, 1, second))
    reopened = the_row(town.core, NotifyOutcome.SECOND_CAPTURE)
    assert (reopened.is_open, reopened.arrivals, verdicts_of(reopened)) == (1, 2, ["dismissed"])


async def test_entry_dismissed_in_error_can_still_be_confirmed(town: Town, env: dict[str, str]) -> None:
    payment_id, second, row = await paid_twice_on_one_page(town)
    for verdict in ("dismissed", "confirmed"):
        assert (await run(env, "resolve", row.quarantine_id, "--verdict", verdict, *BY_MARY)).exit_code == DONE
    assert verdicts_of(the_row(town.core, NotifyOutcome.SECOND_CAPTURE)) == ["dismissed", "confirmed"]
    await assert_only_back(town, payment_id, second)


@pytest.mark.parametrize(
    ("words", "reason", "said"),
    [
        pytest.param(
            [{"trade_no": "T1"}, {"trade_no": "T1", "amount_minor": WRONG_MINOR}],
            NotifyOutcome.MISMATCH,
            "CAPTURE_KEPT: the payment keeps the capture of this trade number; "
            "one capture is never both kept and excess",
            id="kept",
        ),
        pytest.param(
            [{"account": "bank_b"}],
            NotifyOutcome.CONFLICT,
            "NOT_CONFIRMABLE: CONFLICT can only be dismissed: it names no capture of an order",
            id="conflict",
        ),
        pytest.param(
            [{"channel_order_no": "not ours"}],
            NotifyOutcome.UNKNOWN,
            "NOT_CONFIRMABLE: UNKNOWN can only be dismissed: it names no capture of an order",
            id="unknown",
        ),
    ],
)
async def test_confirmation_that_would_break_a_rule_is_refused_and_names_it(
    town: Town, env: dict[str, str], words: list[dict[str, Any]], reason: NotifyOutcome, said: str
) -> None:
    await a_payment(town, *words)
    row = the_row(town.core, reason)
    with town.core.watch() as written:
        refused = await run(env, "resolve", row.quarantine_id, "--verdict", "confirmed", *BY_MARY)
    assert (refused.exit_code, refused.stderr) == (REFUSED, f"{said}\n")
    assert written.tables == {}
    check_money_rules(town.core.snapshot())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--verdict", "maybe", "--reason", "r", "--who", "w"], "verdict: must be confirmed or dismissed"),
        (["--verdict", "dismissed", "--reason", "", "--who", "w"], "reason: must have 1 to 500 characters, not 0"),
        (["--verdict", "dismissed", "--reason", "  ", "--who", "w"], "reason: must not be blank"),
        (["--verdict", "dismissed", "--reason", "a\nb", "--who", "w"], "reason: must not contain control characters"),
        (
            ["--verdict", "dismissed", "--reason", "x" * 501, "--who", "w"],
            "reason: must have 1 to 500 characters, not 501",
        ),
        (["--verdict", "dismissed", "--reason", "r", "--who", "w" * 65], "who: must have 1 to 64 characters, not 65"),
        (["--verdict", "dismissed", "--reason", "r", "--who", "a\x1bb"], "who: must not contain control characters"),
        (["--verdict", "dismissed", "--who", "w"], "--reason"),
        (["--verdict", "dismissed", "--reason", "r"], "--who"),
    ],
)
async def test_resolution_that_breaks_a_rule_is_refused_naming_the_field(
    town: Town, env: dict[str, str], arguments: list[str], said: str
) -> None:
    await a_payment(town, {"account": "bank_b"})
    row = the_row(town.core, NotifyOutcome.CONFLICT)
    refused = await run(env, "resolve", row.quarantine_id, *arguments)
    assert refused.exit_code == USAGE
    assert said in refused.stderr
    assert the_row(town.core, NotifyOutcome.CONFLICT).is_open


async def test_id_that_names_nothing_or_several_is_refused(town: Town, env: dict[str, str]) -> None:
    unknown = await run(env, "show", "0123456789abcdef")
    assert (unknown.exit_code, unknown.stderr) == (REFUSED, "QUARANTINE_NOT_FOUND: no evidence has this id\n")
    short = await run(env, "show", "zz")
    assert (short.exit_code, short.stderr) == (USAGE, "id: must be 8 to 64 hexadecimal digits\n")
    assert (await run(env, "list", "--reason", "nonsense")).exit_code == USAGE
    assert (await run(env, "list", "--limit", "0")).exit_code == USAGE
    both = await run(env, "retry")
    assert (both.exit_code, both.stderr) == (USAGE, "retry: give an ID, or --all\n")
    assert town.core.url


async def test_retry_judges_one_entry_now_and_says_why_it_stays(town: Town, env: dict[str, str]) -> None:
    payment_id, second, row = await paid_twice_on_one_page(town)
    town.plant(
        town.order()._replace(subject=(await town.file(payment_id)).record.payment.subject),
        bank="bank_a",
        error_500={"query": {"value": True, "times": 1}},
    )
    stays = await run(env, "retry", row.quarantine_id)
    assert (stays.exit_code, "stays: simbank: nonsense: status 500" in stays.stdout) == (DONE, True), stays.stdout
    done = await run(env, "retry", row.quarantine_id)
    assert f"{row.quarantine_id[:12]}: resolved:" in done.stdout
    (entry,) = json.loads(the_row(town.core, NotifyOutcome.SECOND_CAPTURE).resolutions)
    assert (entry["verdict"], entry["who"]) == ("confirmed", "retry")
    await assert_only_back(town, payment_id, second)


async def test_retry_all_judges_every_open_entry_and_counts_why_others_stay(town: Town, env: dict[str, str]) -> None:
    payment_id, second, _ = await paid_twice_on_one_page(town)
    await a_payment(town, {"account": "bank_b"}, {"channel_order_no": "not ours"})
    ended = await run(env, "retry", "--all")
    assert ended.exit_code == DONE, ended.stderr
    assert ended.stdout.splitlines() == [
        "1 resolved, 2 stay",
        "  1 stay: not its order's channel or account: for a person",
        "  1 stay: its order is not here",
    ]
    await assert_only_back(town, payment_id, second)


async def test_examiner_run_once_by_hand_says_how_much_it_resolved(town: Town, env: dict[str, str]) -> None:
    payment_id, second, _ = await paid_twice_on_one_page(town)
    await a_payment(town, {"trade_no": "T1", "amount_minor": WRONG_MINOR})
    invoke = CliRunner().invoke
    ended = await asyncio.to_thread(lambda: invoke(build(["run"]), ["run", "examiner", "--once"], env=env))
    assert (ended.exit_code, ended.stdout) == (DONE, "examiner: 1 done, 1 put off\n"), ended.stderr
    (entry,) = json.loads(the_row(town.core, NotifyOutcome.SECOND_CAPTURE).resolutions)
    assert (entry["verdict"], entry["who"]) == ("confirmed", "examiner")
    await assert_only_back(town, payment_id, second)


async def test_database_that_is_not_there_ends_with_3_and_its_line(env: dict[str, str]) -> None:
    for arguments in (("list",), ("retry", "--all"), ("resolve", "0123456789", "--verdict", "dismissed", *BY_MARY)):
        refused = await run({**env, "PAYCORE_DB": "sqlite:////nowhere/p.db"}, *arguments)
        assert refused.exit_code == UNAVAILABLE
        assert "/nowhere/p.db" in refused.stderr
