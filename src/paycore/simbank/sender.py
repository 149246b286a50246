"""Sends the bank's notifications until they are acknowledged or the ladder of delays ends.

The bank's own definition: a status of 200 or 204 acknowledges, whatever the body says; everything else does not,
nor does no answer in time. (WeChat Pay v3 counts so too: a FAIL in a 200 is acknowledged.)

Notifications of one order go out one at a time and in their order, except that one that is not acknowledged does
not hold up the next; those of different orders do not wait for each other. Each sending is signed afresh and keeps
the notification's number. A sending is counted on disk before it is made and its acknowledgement after: a bank that
dies in between sends again.
"""

import asyncio
import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import httpx
import structlog
from pydantic import SecretStr

from paycore.failpoint import failpoint
from paycore.simbank.bank import Bank
from paycore.simbank.clock import Clock
from paycore.simbank.desk import Desk
from paycore.simbank.disk import Disk, Notification
from paycore.simbank.signing import sign

ACKNOWLEDGING = frozenset({200, 204})
_RETRY_BOOKS_SECONDS = 1.0
_MAX_CONNECTIONS = 32

logger = structlog.get_logger("simbank")

OrderKey = tuple[str, str]


class SenderConfig(NamedTuple):
    """Where notifications go and how often. ladder_ms: the delays after the first, second, … sending."""

    forwarder_url: str
    secrets: Mapping[str, SecretStr]
    ladder_ms: Sequence[int]
    timeout_ms: int


class Sent(NamedTuple):
    """One sending. http_status: None when no answer came."""

    notification_id: str
    trade_no: str
    http_status: int | None

    @property
    def acknowledged(self) -> bool:
        """Whether the merchant has it, by the bank's definition."""
        return self.http_status in ACKNOWLEDGING


class Sender:
    """The bank's notification department: a task that sends what is due, and sendings that a driver orders."""

    def __init__(self, disk: Disk, bank: Bank, desk: Desk, clock: Clock, config: SenderConfig) -> None:
        self._disk = disk
        self._bank = bank
        self._desk = desk
        self._clock = clock
        self._config = config
        self._http = httpx.AsyncClient(trust_env=False, timeout=config.timeout_ms / 1000)
        self._connections = asyncio.Semaphore(_MAX_CONNECTIONS)
        self._wake = asyncio.Event()
        self._locks: WeakValueDictionary[OrderKey, asyncio.Lock] = WeakValueDictionary()
        self._tasks: dict[OrderKey, asyncio.Task[None]] = {}

    def wake(self) -> None:
        """Look again what is due: something was written."""
        self._wake.set()

    async def run(self) -> None:
        """Settle and send what is due, until cancelled."""
        try:
            while True:
                await self._wait(await self._start_due())
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            await self._http.aclose()

    async def _start_due(self) -> float | None:
        """Start a task for each order that has something due; return the seconds until something else is."""
        self._wake.clear()
        failpoint("simbank.look")
        try:
            due, next_ms = await self._desk.do(self._look)
        except sqlite3.Error as error:
            logger.warning("books_not_writable", error=str(error))
            return _RETRY_BOOKS_SECONDS
        seqs: defaultdict[OrderKey, list[int]] = defaultdict(list)
        for one in due:
            seqs[one.bank, one.order_no].append(one.seq)
        for key in seqs.keys() - self._tasks.keys():
            self._start(key, seqs[key])
        # What is in hand needs no time limit: a task that ends wakes the loop.
        return None if next_ms is None else max(0, next_ms - self._clock.now_ms()) / 1000

    def _look(self) -> tuple[list[Notification], int | None]:
        # One moment for all three: what fell due between two readings would be neither settled nor waited for.
        now_ms = self._clock.now_ms()
        self._bank.settle_due(now_ms)
        return self._disk.notifications_due(now_ms), self._disk.next_due_ms(now_ms)

    def _start(self, key: OrderKey, seqs: Sequence[int]) -> None:
        task = self._tasks[key] = asyncio.create_task(self._send_due(key, seqs))
        task.add_done_callback(lambda _: self._finished(key))

    def _finished(self, key: OrderKey) -> None:
        del self._tasks[key]
        self._wake.set()

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _send_due(self, key: OrderKey, seqs: Sequence[int]) -> None:
        try:
            async with self._lock(key):
                for seq in seqs:
                    # One that asks for several acknowledgements is due again at once, before the next one.
                    while await self._send(seq, only_if_due=True):
                        pass
        except sqlite3.Error as error:
            logger.warning("books_not_writable", error=str(error))
            await asyncio.sleep(_RETRY_BOOKS_SECONDS)

    def _lock(self, key: OrderKey) -> asyncio.Lock:
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

    # What a driver orders

    async def hold(self, bank: str) -> None:
        """Keep back a bank's notifications."""
        await self._desk.do(self._hold, bank)

    def _hold(self, bank: str) -> None:
        with self._disk.transaction():
            self._disk.hold(bank)

    async def release(self, bank: str, order_no: str | None, notification_ids: Sequence[str] | None) -> list[Sent]:
        """Send held notifications now, one after another, in the order given or else in their own."""
        held = await self._desk.do(self._held, bank, order_no, notification_ids)
        return [sent for one in held if (sent := await self._send_locked(one))]

    def _held(self, bank: str, order_no: str | None, notification_ids: Sequence[str] | None) -> list[Notification]:
        with self._disk.transaction():
            if order_no is None and notification_ids is None:
                self._disk.end_hold(bank)
            waiting = self._disk.held_notifications(bank)
        held = {one.notification_id: one for one in waiting if order_no in {None, one.order_no}}
        chosen = held if notification_ids is None else notification_ids
        return [held[number] for number in chosen if number in held]

    async def resend(self, bank: str, order_no: str, trade_no: str | None, times: int) -> list[Sent]:
        """Send an order's notifications now, acknowledged or not, so many times each."""
        found = await self._desk.do(self._disk.notifications, bank, order_no)
        chosen = [one for one in found if trade_no in {None, one.trade_no}]
        return [sent for _ in range(times) for one in chosen if (sent := await self._send_locked(one))]

    async def _send_locked(self, one: Notification) -> Sent | None:
        async with self._lock((one.bank, one.order_no)):
            return await self._send(one.seq, only_if_due=False)

    # One sending

    async def _send(self, seq: int, *, only_if_due: bool) -> Sent | None:
        one = await self._desk.do(self._count_sending, seq, only_if_due=only_if_due)
        if one is None:
            return None
        sent = Sent(one.notification_id, one.trade_no, await self._post(one))
        failpoint("simbank.notified")
        if sent.acknowledged:
            await self._desk.do(self._count_acknowledgement, seq)
        logger.info(
            "notification_sent",
            bank=one.bank,
            order_no=one.order_no,
            notification_id=one.notification_id,
            sends=one.sends,
            http_status=sent.http_status,
        )
        self._wake.set()
        return sent

    def _count_sending(self, seq: int, *, only_if_due: bool) -> Notification | None:
        now_ms, ladder = self._clock.now_ms(), self._config.ladder_ms
        with self._disk.transaction():
            one = self._disk.notification(seq)
            if one is None or (only_if_due and (one.held or one.due_at_ms is None or one.due_at_ms > now_ms)):
                return None
            due_at_ms = now_ms + ladder[one.rung] if one.rung < len(ladder) else None
            # What a driver has sent again although it was acknowledged asks for one more acknowledgement.
            copies = max(one.copies, one.acks + 1)
            one = one._replace(sends=one.sends + 1, copies=copies, due_at_ms=due_at_ms, held=0, rung=one.rung + 1)
            self._disk.put_notification(one)
        return one

    def _count_acknowledgement(self, seq: int) -> None:
        now_ms = self._clock.now_ms()
        with self._disk.transaction():
            one = self._disk.notification(seq)
            assert one is not None, "notifications are never deleted"
            acks = one.acks + 1
            due_at_ms = now_ms if acks < one.copies else None
            self._disk.put_notification(one._replace(acks=acks, due_at_ms=due_at_ms, rung=0))

    async def _post(self, one: Notification) -> int | None:
        """POST one notification; return the status, or None when no answer came in time."""
        secret = self._config.secrets.get(one.bank)
        if secret is None:
            logger.warning("notification_without_secret", bank=one.bank, notification_id=one.notification_id)
            return None
        url = f"{self._config.forwarder_url}/{one.bank}"
        body = notification_body(one)
        headers = sign(secret, f"POST {urlsplit(url).path}", body, self._clock.now_ms())
        headers["Content-Type"] = "application/json"
        try:
            async with asyncio.timeout(self._config.timeout_ms / 1000):
                async with self._connections:
                    response = await self._http.post(url, content=body, headers=headers)
        except (httpx.HTTPError, TimeoutError) as error:
            logger.info("notification_unanswered", notification_id=one.notification_id, error=type(error).__name__)
            return None
        return response.status_code


def notification_body(one: Notification) -> bytes:
    """Return the bytes that are signed and sent: the same each time for one notification."""
    told = {
        "notification_id": one.notification_id,
        "bank": one.bank,
        "result": one.result,
        "order_no": one.order_no,
        "trade_no": one.trade_no,
        "amount_minor": one.amount_minor,
        "currency": one.currency,
        "paid_at_ms": one.paid_at_ms,
    }
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()
