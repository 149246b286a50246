"""Automatic batching for asyncio: ``notify`` gives a future, and what has gathered goes out as one NotifyBatch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import grpc
import grpc.aio

from paycore.client import requests
from paycore.client.answers import read_answers
from paycore.client.errors import PaycoreRpcError, read_error
from paycore.client.gathering import (
    FAR_MS,
    METHOD,
    Batch,
    BatchLimits,
    Gatherer,
    Word,
    closed_error,
    queue_full_error,
    settle_each,
)
from paycore.client.retrying import RetryPolicy, draw
from paycore.v1 import payment_pb2
from paycore.v1.payment_service_pb2 import NotifyBatchResponse, NotifyRequest, NotifyResponse


class AsyncBatchingNotifier:
    """Hands over notifications, many in a call; see ``BatchingNotifier``, from which it differs in one thing.

    Where ``limits.max_waiting`` words wait, ``notify`` raises PaycoreRpcError (RESOURCE_EXHAUSTED, reason
    NOTIFIER_FULL) and takes nothing; whoever can wait awaits ``room`` before. Words that are handed over in one turn of
    the loop go out together. It belongs to one event loop: ``async with AsyncBatchingNotifier(address) as notifier``.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_ms: int = requests.DEFAULT_TIMEOUT_MS,
        retry: RetryPolicy | None = None,
        limits: BatchLimits | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timeout_ms = timeout_ms
        self._limits = limits or BatchLimits()
        self._gatherer = Gatherer(self._limits, retry or RetryPolicy(), draw)
        self._channel = grpc.aio.insecure_channel(address, options=requests.CHANNEL_OPTIONS)
        self._method: grpc.aio.UnaryUnaryMultiCallable[bytes, NotifyBatchResponse] = self._channel.unary_unary(
            METHOD, request_serializer=None, response_deserializer=NotifyBatchResponse.FromString
        )
        self._carrying: set[asyncio.Task[None]] = set()
        self._is_closed = False
        self._will_pump = False
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_ms = FAR_MS
        self._has_room = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def notify(
        self,
        *,
        channel: str,
        account: str,
        channel_order_no: str,
        result: payment_pb2.ChannelResult.ValueType,
        amount_minor: int = 0,
        currency: str = "",
        channel_trade_no: str = "",
        paid_at_ms: int | None = None,
        raw: bytes = b"",
        headers: Mapping[str, str] | None = None,
        timeout_ms: int | None = None,
    ) -> asyncio.Future[NotifyResponse]:
        """Hand over what a channel said; the future holds what it turned out to be, or the error."""
        request = requests.notify_request(
            channel=channel,
            account=account,
            channel_order_no=channel_order_no,
            result=result,
            amount_minor=amount_minor,
            currency=currency,
            channel_trade_no=channel_trade_no,
            paid_at_ms=paid_at_ms,
            raw=raw,
            headers=headers,
        )
        return self.send(request, timeout_ms=timeout_ms)

    def send(self, request: NotifyRequest, *, timeout_ms: int | None = None) -> asyncio.Future[NotifyResponse]:
        """Do as ``notify`` with a message that is made already (``paycore.client.notify_request``)."""
        if self._is_closed:
            raise closed_error()
        if self._gatherer.is_full:
            raise queue_full_error(self._limits.max_waiting)
        future: asyncio.Future[NotifyResponse] = self._loop.create_future()
        self._gatherer.add(Word(request, future, requests.milliseconds_now() + (timeout_ms or self._timeout_ms)))
        self._idle.clear()
        if not self._will_pump:
            self._will_pump = True
            self._loop.call_soon(self._pump)
        return future

    async def room(self) -> None:
        """Return when a word can be handed over. Raises PaycoreRpcError (CANCELLED) when the notifier is closed."""
        while self._gatherer.is_full and not self._is_closed:
            self._has_room.clear()
            await self._has_room.wait()
        if self._is_closed:
            raise closed_error()

    async def close(self, *, timeout_ms: int | None = None) -> None:
        """Take no further word, send what waits and wait for the answers, at most for so long; then disconnect.

        timeout_ms: that of a call when None, 0 to wait for nothing. Words without an answer by then fail with reason
        NOTIFIER_CLOSED: whether they were kept is not known.
        """
        self._is_closed = True
        self._has_room.set()
        try:
            async with asyncio.timeout((self._timeout_ms if timeout_ms is None else timeout_ms) / 1_000):
                await self._idle.wait()
        except TimeoutError:
            pass
        finally:
            settle_each(self._gatherer.abandon())
            self._idle.set()
            if self._alarm is not None:
                self._alarm.cancel()
            for task in self._carrying:
                task.cancel()
            await asyncio.gather(*self._carrying, return_exceptions=True)
            await self._channel.close()

    def _pump(self) -> None:
        """Send all that may go out now, and see to the next deadline."""
        self._will_pump = False
        while (batch := self._gatherer.take()) is not None:
            task = self._loop.create_task(self._carry(batch))
            self._carrying.add(task)
            task.add_done_callback(self._carrying.discard)
        if not self._gatherer.is_full:
            self._has_room.set()
        if self._gatherer.is_idle:
            self._idle.set()
        self._set_alarm()

    async def _carry(self, batch: Batch) -> None:
        """Bring a batch to its end: answered, refused, split or out of time."""
        while True:
            settle_each(self._gatherer.drop_late(batch, requests.milliseconds_now()))
            retry_in_ms = await self._call(batch) if batch.words else None
            if retry_in_ms is None:
                break
            await asyncio.sleep(retry_in_ms / 1_000)
        self._gatherer.finish(batch)
        self._pump()

    async def _call(self, batch: Batch) -> int | None:
        """Make one attempt; return after what time to make the next, None when there is none."""
        try:
            call = self._method(batch.message(), timeout=batch.left_seconds(requests.milliseconds_now()))
            answers = read_answers(await call, len(batch.words))
        except grpc.aio.AioRpcError as raised:
            error = read_error(raised.code(), raised.details(), raised.trailing_metadata())
        except PaycoreRpcError as raised:
            error = raised
        else:
            settle_each(zip(batch.words, answers, strict=True))
            return None
        failed = self._gatherer.fail(batch, error, requests.milliseconds_now())
        settle_each(failed.refused)
        return failed.retry_in_ms

    def _set_alarm(self) -> None:
        next_ms = self._gatherer.next_deadline_ms
        if next_ms >= self._alarm_ms:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_ms = next_ms
        delay_ms = max(next_ms - requests.milliseconds_now(), 0)
        # A millisecond more: both clocks are cut to whole ones.
        self._alarm = self._loop.call_later((delay_ms + 1) / 1_000, self._expire)

    def _expire(self) -> None:
        self._alarm, self._alarm_ms = None, FAR_MS
        settle_each(self._gatherer.expire(requests.milliseconds_now()))
        self._pump()
