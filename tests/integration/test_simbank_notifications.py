"""The banks' notifications over real sockets: what is told, when, how often, and again after a kill."""

import contextlib
import itertools
import json
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from paycore.channels.protocol import QueryState
from paycore.channels.simbank import SimbankChannel
from paycore.domain.verdicts import PayMethod
from paycore.simbank.books import Notice
from paycore.simbank.disk import DUE_AT_ONCE, Disk, DiskError
from paycore.simbank.signing import Verifier
from tests.support.simbank import (
    CLOCK,
    SECRETS,
    Driver,
    Received,
    Receiver,
    Running,
    a_refund,
    adapter,
    an_order,
    bank_process,
    wait_for,
)

LADDER = "--ladder-ms", "20,20,20"

_numbers = itertools.count(2_000_000)


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, receiver: Receiver) -> Iterator[Running]:
    folder, url = tmp_path_factory.mktemp("bank"), f"{receiver.url}/notifications"
    with bank_process(folder, url, *LADDER, "--notify-timeout-ms", "500") as bank:
        yield bank


@pytest.fixture(scope="module")
def driver(bank: Running) -> Iterator[Driver]:
    with Driver(bank.url) as driver:
        yield driver


@pytest.fixture
async def channel(bank: Running) -> AsyncIterator[SimbankChannel]:
    channel = adapter(bank.url)
    yield channel
    await channel.aclose()


@pytest.fixture
def order_no() -> str:
    """A number that no other test uses."""
    return str(next(_numbers))


def amounts(told: list[dict[str, Any]]) -> list[int]:
    return [one["amount_minor"] for one in told]


async def test_notification_of_a_payment_tells_it_signed(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    await channel.create(an_order(order_no))
    capture = driver.pay(order_no)["captures"][0]
    (notification,) = driver.settled(order_no)["notifications"]
    (one,) = [one for one in receiver.received if one.body["order_no"] == order_no]
    assert one.body == {
        "notification_id": notification["notification_id"],
        "bank": "bank_a",
        "result": "SUCCESS",
        "order_no": order_no,
        "trade_no": capture["trade_no"],
        "amount_minor": 1234,
        "currency": "CNY",
        "paid_at_ms": capture["paid_at_ms"],
    }
    verifier = Verifier({"bank_a": SecretStr(SECRETS["bank_a"])}, CLOCK, 300_000)
    verifier.verify("bank_a", "POST /notifications/bank_a", one.headers, one.raw)


async def test_notification_of_a_synchronous_charge_is_sent_too(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    await channel.create(an_order(order_no, method=PayMethod.CHARGE))
    driver.settled(order_no)
    assert amounts(receiver.of_order(order_no)) == [1234]


async def test_notification_not_acknowledged_is_sent_again_with_its_number_and_a_new_signature(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    answers = iter([(503, b""), (500, b""), (200, b"")])
    receiver.answer = lambda _: next(answers)
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    (notification,) = driver.settled(order_no)["notifications"]
    assert (notification["sends"], notification["given_up"]) == (3, False)
    sent = [one for one in receiver.received if one.body["order_no"] == order_no]
    assert len({one.raw for one in sent}) == 1
    assert len({one.headers["simbank-nonce"] for one in sent}) == 3
    receiver.answer = lambda _: (200, b"")


@pytest.mark.parametrize(
    ("answer", "acknowledged"),
    [
        ((200, b'{"code":"FAIL"}'), True),
        ((200, b"<html>"), True),
        ((204, b""), True),
        ((201, b'{"code":"OK"}'), False),
        ((302, b'{"code":"OK"}'), False),
        ((400, b'{"code":"OK"}'), False),
        ((503, b'{"code":"OK"}'), False),
        (None, False),
    ],
)
async def test_notification_is_acknowledged_by_the_status_alone(
    channel: SimbankChannel,
    driver: Driver,
    receiver: Receiver,
    order_no: str,
    answer: tuple[int, bytes] | None,
    acknowledged: bool,
) -> None:
    """A receiver that puts an error into the body of a 200 has lost the notification."""
    receiver.answer = lambda _: answer
    await channel.create(an_order(order_no))
    driver.pay(order_no)

    def ended() -> bool:
        (one,) = driver.order(order_no)["notifications"]
        return one["sends"] > 0 and not one["pending"]

    wait_for(ended, "the ladder has ended")
    (notification,) = driver.order(order_no)["notifications"]
    expected = (1, True, False) if acknowledged else (4, False, True)
    assert (notification["sends"], notification["acknowledged"], notification["given_up"]) == expected
    # The books count a sending before it leaves the bank.
    wait_for(lambda: len(receiver.of_order(order_no)) >= expected[0], "the last sending has arrived")
    assert len(receiver.of_order(order_no)) == expected[0]
    receiver.answer = lambda _: (200, b"")


async def test_notification_unanswered_in_time_is_sent_again(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    answered_late = iter([True])

    def answer(_: Received) -> tuple[int, bytes]:
        if next(answered_late, False):
            wait_for(lambda: len(receiver.of_order(order_no)) > 1, "the bank has sent again")
        return (200, b"")

    receiver.answer = answer
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    assert driver.settled(order_no)["notifications"][0]["sends"] == 2
    receiver.answer = lambda _: (200, b"")


# Faults


async def test_fault_notify_times_sends_again_although_acknowledged(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    driver.plant(order_no=order_no, notify_times=3)
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    wait_for(lambda: len(receiver.of_order(order_no)) == 3, "three notifications")
    assert driver.settled(order_no)["notifications"][0]["sends"] == 3


async def test_fault_notify_delay_ms_sends_late(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    driver.plant(order_no=order_no, notify_delay_ms=500)
    await channel.create(an_order(order_no))
    paid_at_ms = driver.pay(order_no)["captures"][0]["paid_at_ms"]
    driver.settled(order_no)
    (one,) = [one for one in receiver.received if one.body["order_no"] == order_no]
    assert int(one.headers["simbank-timestamp"]) >= paid_at_ms + 500


async def test_fault_notify_never_sends_only_what_a_driver_orders(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    driver.plant(order_no=order_no, notify_never=True)
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    (notification,) = driver.order(order_no)["notifications"]
    assert (notification["pending"], notification["sends"]) == (False, 0)
    assert (await channel.query("bank_a", order_no)).state is QueryState.PAID
    driver.notifications("resend", order_no=order_no)
    assert (len(receiver.of_order(order_no)), driver.settled(order_no)["notifications"][0]["sends"]) == (1, 1)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"notify_amount_minor": 1}, [1]),
        ({"notify_amount_minor": 1, "notify_wrong_amount_times": 2}, [1, 1, 1234]),
    ],
)
async def test_fault_notify_amount_minor_tells_a_wrong_amount_first(
    channel: SimbankChannel,
    driver: Driver,
    receiver: Receiver,
    order_no: str,
    faults: dict[str, Any],
    expected: list[int],
) -> None:
    driver.plant(order_no=order_no, **faults)
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    driver.settled(order_no)
    wait_for(lambda: len(receiver.of_order(order_no)) >= len(expected), "all notifications")
    assert amounts(receiver.of_order(order_no)) == expected
    assert driver.order(order_no)["kept_minor"] == 1234


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({}, [("SUCCESS", 0), ("SUCCESS", 1)]),
        ({"notify_out_of_order": True}, [("SUCCESS", 1), ("SUCCESS", 0)]),
        ({"notify_failure_after_success": True}, [("SUCCESS", 0), ("SUCCESS", 1), ("FAILURE", None)]),
    ],
)
async def test_faults_of_order_decide_what_is_told_after_what(
    channel: SimbankChannel,
    driver: Driver,
    receiver: Receiver,
    order_no: str,
    faults: dict[str, Any],
    expected: list[tuple[str, int | None]],
) -> None:
    driver.plant(order_no=order_no, pay_twice_on_page=True, **faults)
    await channel.create(an_order(order_no))
    trades = [one["trade_no"] for one in driver.pay(order_no)["captures"]]
    driver.settled(order_no)
    told = [(one["result"], one["trade_no"]) for one in receiver.of_order(order_no)]
    assert told == [(result, "" if which is None else trades[which]) for result, which in expected]


async def test_accepted_charge_that_fails_tells_a_failure(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    driver.plant(order_no=order_no, charge_accepted_only={"result": "failure", "delay_ms": 0})
    await channel.create(an_order(order_no, method=PayMethod.CHARGE))
    driver.settled(order_no)
    (told,) = receiver.of_order(order_no)
    assert (told["result"], told["trade_no"], told["paid_at_ms"]) == ("FAILURE", "", None)


# Hold, release, resend


async def test_hold_keeps_back_until_released_in_the_order_asked_for(
    channel: SimbankChannel, driver: Driver, receiver: Receiver
) -> None:
    orders = [str(next(_numbers)) for _ in range(3)]
    driver.notifications("hold")
    for number in orders:
        await channel.create(an_order(number))
        driver.pay(number)
    held = [driver.order(number)["notifications"][0] for number in orders]
    assert [(one["held"], one["sends"]) for one in held] == [(True, 0)] * 3

    chosen = [held[2]["notification_id"], held[0]["notification_id"]]
    sent = driver.notifications("release", notification_ids=chosen)["sent"]
    assert [(one["notification_id"], one["http_status"], one["acknowledged"]) for one in sent] == [
        (number, 200, True) for number in chosen
    ]
    told = [one.body["order_no"] for one in receiver.received if one.body["order_no"] in orders]
    assert told == [orders[2], orders[0]]

    late = str(next(_numbers))
    await channel.create(an_order(late))
    driver.pay(late)
    assert driver.order(late)["notifications"][0]["held"]
    assert len(driver.notifications("release")["sent"]) == 2
    again = str(next(_numbers))
    await channel.create(an_order(again))
    driver.pay(again)
    driver.settled(again)


async def test_fault_notify_held_holds_one_order(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    driver.plant(subject=f"Order {order_no}", notify_held=True)
    await channel.create(an_order(order_no))
    driver.pay(order_no)
    free = str(next(_numbers))
    await channel.create(an_order(free))
    driver.pay(free)
    driver.settled(free)
    assert receiver.of_order(order_no) == []
    (sent,) = driver.notifications("release", order_no=order_no)["sent"]
    assert (sent["acknowledged"], len(receiver.of_order(order_no))) == (True, 1)


async def test_resend_sends_again_as_often_as_asked(
    channel: SimbankChannel, driver: Driver, receiver: Receiver, order_no: str
) -> None:
    driver.plant(order_no=order_no, pay_twice_on_page=True)
    await channel.create(an_order(order_no))
    second = driver.pay(order_no)["captures"][1]["trade_no"]
    driver.settled(order_no)
    sent = driver.notifications("resend", order_no=order_no, trade_no=second, times=3)["sent"]
    assert [(one["trade_no"], one["acknowledged"]) for one in sent] == [(second, True)] * 3
    told = [one["trade_no"] for one in receiver.of_order(order_no)]
    assert (len(told), told.count(second)) == (5, 4)
    assert not any(one["pending"] for one in driver.order(order_no)["notifications"])


async def test_resend_of_an_order_that_is_not_there_sends_nothing(driver: Driver, order_no: str) -> None:
    assert driver.notifications("resend", order_no=order_no) == {"sent": []}


# Kill -9


async def test_kill_keeps_books_and_sends_pending_notifications_after_restart(
    tmp_path: Path, receiver: Receiver, order_no: str
) -> None:
    receiver.answer = lambda _: (503, b"")
    url, slow = f"{receiver.url}/notifications", ("--ladder-ms", "1500,1500,1500")
    with bank_process(tmp_path, url, *slow) as bank, Driver(bank.url) as driver:
        driver.plant(order_no=order_no, pay_twice_on_page=True)
        driver.plant(order_no=f"{order_no}1", charge_accepted_only={"result": "success", "delay_ms": 1})
        channel = adapter(bank.url)
        await channel.create(an_order(order_no))
        trade_no = driver.pay(order_no)["captures"][0]["trade_no"]
        await channel.refund(a_refund(f"{order_no}X1", order_no, trade_no))
        await channel.aclose()
        wait_for(lambda: len(receiver.of_order(order_no)) >= 1, "one notification was sent")
        bank.process.kill()
        bank.process.wait()
    receiver.answer = lambda _: (200, b"")
    with bank_process(tmp_path, url, *slow) as bank, Driver(bank.url) as driver:
        books = driver.settled(order_no)
        assert (books["kept_minor"], len(books["captures"]), len(books["refunds"])) == (1234, 2, 1)
        assert {one["trade_no"] for one in books["captures"]} == {one["trade_no"] for one in books["notifications"]}
        assert books["notifications"][0]["sends"] == 2
        channel = adapter(bank.url)
        await channel.create(an_order(f"{order_no}1", method=PayMethod.CHARGE))
        assert driver.settled(f"{order_no}1")["state"] == "PAID"
        await channel.aclose()


async def test_kill_between_acknowledgement_and_its_record_sends_once_more(
    tmp_path: Path, receiver: Receiver, order_no: str
) -> None:
    url = f"{receiver.url}/notifications"
    with bank_process(tmp_path, url, env={"PAYCORE_FAILPOINTS": "simbank.notified=crash"}) as bank:
        channel = adapter(bank.url)
        await channel.create(an_order(order_no, method=PayMethod.CHARGE))
        await channel.aclose()
        bank.process.wait(timeout=20)
    assert len(receiver.of_order(order_no)) == 1
    with bank_process(tmp_path, url) as bank, Driver(bank.url) as driver:
        assert driver.settled(order_no)["notifications"][0]["sends"] == 2
    assert len(receiver.of_order(order_no)) == 2


@pytest.mark.parametrize("place", ["simbank.create.done", "simbank.refund.done"])
async def test_kill_between_doing_and_answering_leaves_it_done_once(
    tmp_path: Path, receiver: Receiver, order_no: str, place: str
) -> None:
    url, order = f"{receiver.url}/notifications", an_order(order_no, method=PayMethod.CHARGE)
    refund = a_refund(f"{order_no}X1", order_no, "BANK_A-000000000001")
    with bank_process(tmp_path, url, env={"PAYCORE_FAILPOINTS": f"{place}=crash"}) as bank:
        channel = adapter(bank.url)
        with contextlib.suppress(Exception):
            await channel.create(order)
            await channel.refund(refund)
        await channel.aclose()
        assert bank.process.wait(timeout=20) == -9
    with bank_process(tmp_path, url) as bank, Driver(bank.url) as driver:
        channel = adapter(bank.url)
        await channel.create(order)
        await channel.refund(refund)
        await channel.aclose()
        books = driver.order(order_no)
    assert (len(books["captures"]), len(books["refunds"]), books["kept_minor"]) == (1, 1, 0)


async def test_many_notifications_left_by_an_outage_are_all_sent_after_restart(
    tmp_path: Path, receiver: Receiver, order_no: str
) -> None:
    count = DUE_AT_ONCE + 50
    disk = Disk(tmp_path / "books.db")
    with disk.transaction():
        for number in range(count):
            notice = Notice("SUCCESS", f"T{number}", 1234, "CNY", 1, 1, 1, held=False)
            disk.add_notifications("bank_a", f"{order_no}{number:04}", [notice])
    disk.close()
    before = len(receiver.received)
    with bank_process(tmp_path, f"{receiver.url}/notifications"):
        wait_for(lambda: len(receiver.received) - before >= count, "all notifications")
    assert len({one.body["trade_no"] for one in receiver.received[before:]}) == count


async def test_notification_of_a_bank_without_a_secret_waits_for_one(
    tmp_path: Path, receiver: Receiver, order_no: str
) -> None:
    disk = Disk(tmp_path / "books.db")
    with disk.transaction():
        disk.add_notifications("bank_x", order_no, [Notice("SUCCESS", "T1", 1234, "CNY", 1, 1, 1, held=False)])
    disk.close()
    url, quick = f"{receiver.url}/notifications", ("--ladder-ms", ",".join(["50"] * 1000))
    with bank_process(tmp_path, url, *quick) as bank:
        wait_for(lambda: bank.log.read_text().count("notification_without_secret") > 1, "a second try", 20)
    with bank_process(tmp_path, url, *quick, env={"PAYCORE_SIMBANK_SECRETS": '{"bank_x": "0123456789abcdef"}'}):
        wait_for(lambda: receiver.of_order(order_no), "the notification")


def test_bank_that_cannot_send_any_more_ends(tmp_path: Path) -> None:
    with bank_process(tmp_path, "http://127.0.0.1:1", env={"PAYCORE_FAILPOINTS": "simbank.look*2=error"}) as bank:
        with Driver(bank.url) as driver:
            driver.notifications("release")
            driver.http.post("/banks/bank_a/pay/1")
        bank.process.wait(timeout=20)
        assert "sender_failed" in bank.log.read_text()


# The file


def test_books_held_by_another_process_are_refused(tmp_path: Path) -> None:
    books = tmp_path / "books.db"
    hold = "import sys; from pathlib import Path; from paycore.simbank.disk import Disk; d = Disk(Path(sys.argv[1]));"
    wait = "print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold + wait, str(books)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DiskError, match="in use by another process"):
            Disk(books)
        other.kill()
    Disk(books).close()


def test_books_that_are_another_database_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "books.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE something (id)")
    with pytest.raises(DiskError, match="not the books of a simulated bank"):
        Disk(path)


def test_books_that_are_no_database_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "books.db"
    path.write_text(json.dumps({"books": []}) * 100)
    with pytest.raises(DiskError, match="cannot be opened"):
        Disk(path)


def test_books_are_written_through(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "books.db")
    pragmas = {
        name: disk._connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")
    }
    disk.close()
    assert pragmas == {"synchronous": 2, "journal_mode": "wal"}
