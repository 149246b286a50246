"""Automatic batching for threads: ``notify`` gives a future, and what has gathered goes out as one NotifyBatch."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Self, cast

import grpc

from paycore.client import requests
from paycore.client.alarm import Alarm
from paycore.client.answers import WordAnswer, read_answers
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


class BatchingNotifier:
    """Hands over notifications, many in a call: ``notifier.notify(...).result()``. Safe to share between threads.

    An idle notifier sends a word at once. While ``limits.max_in_flight`` calls are out words gather, and when one
    returns, all that have gathered go out as one NotifyBatch: no timer, and the busier it is the larger the batches.

    A future holds the NotifyResponse, or the PaycoreRpcError that ``PaycoreClient.notify`` would raise. Each word is
    answered for itself: one that is INVALID fails alone, and so does one that is THROTTLED, which is not sent again by
    itself. A word that is not answered within its timeout fails with DEADLINE_EXCEEDED, the error met last as its
    cause; whether it was kept is then not known, and it may be handed over again.

    A call that meets UNAVAILABLE, as while the server restarts, is made again with the words that still have time
    (``retry``); nothing else is. That is safe, because a word counts once however often it comes, but ``replayed`` may
    then be true of the caller's own word: its first try was kept and the answer lost. A message that the server finds
    too large is split in two.

    Futures cannot be cancelled: a word that was handed over goes out. Callbacks of futures run in threads of the
    notifier's and must not block.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_ms: int = requests.DEFAULT_TIMEOUT_MS,
        retry: RetryPolicy | None = None,
        limits: BatchLimits | None = None,
    ) -> None:
        self._timeout_ms = timeout_ms
        self._limits = limits or BatchLimits()
        # Guarded by the lock of `_changed`, as all that follows but the channel.
        self._gatherer = Gatherer(self._limits, retry or RetryPolicy(), draw)
        self._changed = threading.Condition()
        self._is_closed = False
        self._alarm_ms = FAR_MS
        self._alarm = Alarm("paycore-notifier")
        self._callbacks = threading.local()
        self._channel = grpc.insecure_channel(address, options=requests.CHANNEL_OPTIONS)
        self._method: grpc.UnaryUnaryMultiCallable[bytes, NotifyBatchResponse] = self._channel.unary_unary(
            METHOD, request_serializer=None, response_deserializer=NotifyBatchResponse.FromString
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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
    ) -> Future[NotifyResponse]:
        """Hand over what a channel said; the future holds what it turned out to be, or the error.

        Blocks while ``limits.max_waiting`` words wait, at most for the word's timeout, then raises PaycoreRpcError
        (RESOURCE_EXHAUSTED, reason NOTIFIER_FULL), in a future's callback at once; the word was not taken. Raises it
        with CANCELLED, reason NOTIFIER_CLOSED, after ``close``, and ValueError for values that no request can hold.
        """
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

    def send(self, request: NotifyRequest, *, timeout_ms: int | None = None) -> Future[NotifyResponse]:
        """Do as ``notify`` with a message that is made already (``paycore.client.notify_request``)."""
        future: Future[NotifyResponse] = Future()
        future.set_running_or_notify_cancel()
        word = Word(request, future, requests.milliseconds_now() + (timeout_ms or self._timeout_ms))
        with self._changed:
            self._wait_for_room(word.deadline_ms)
            self._gatherer.add(word)
            batch = self._gatherer.take()
            self._set_alarm()
        if batch is not None:
            self._start(batch)
        return future

    def close(self, *, timeout_ms: int | None = None) -> None:
        """Take no further word, send what waits and wait for the answers, at most for so long; then disconnect.

        timeout_ms: that of a call when None, 0 to wait for nothing. Words without an answer by then fail with reason
        NOTIFIER_CLOSED: whether they were kept is not known.
        """
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            wait_ms = self._timeout_ms if timeout_ms is None else timeout_ms
            self._changed.wait_for(lambda: self._gatherer.is_idle, wait_ms / 1_000)
            left = self._gatherer.abandon()
        self._settle(left)
        self._alarm.stop()
        self._channel.close()

    def _wait_for_room(self, deadline_ms: int) -> None:
        while self._gatherer.is_full and not self._is_closed:
            left_ms = deadline_ms - requests.milliseconds_now()
            if left_ms <= 0 or getattr(self._callbacks, "are_running", False):
                raise queue_full_error(self._limits.max_waiting)
            self._changed.wait(left_ms / 1_000)
        if self._is_closed:
            raise closed_error()

    def _start(self, batch: Batch) -> None:
        """Make one attempt; ``_returned`` is called when it ends."""
        try:
            call = self._method.future(batch.message(), timeout=batch.left_seconds(requests.milliseconds_now()))
        except ValueError:
            # The channel was closed meanwhile, and the words with it.
            return
        call.add_done_callback(partial(self._returned, batch))

    def _returned(self, batch: Batch, call: grpc.Future[NotifyBatchResponse]) -> None:
        try:
            answers = read_answers(call.result(), len(batch.words))
        except (grpc.RpcError, grpc.FutureCancelledError):
            # The future is the call, which its types do not say.
            ended = cast(grpc.Call, call)
            self._failed(batch, read_error(ended.code(), ended.details(), ended.trailing_metadata()))
            return
        except PaycoreRpcError as error:
            self._failed(batch, error)
            return
        self._settle(zip(batch.words, answers, strict=True))
        self._finish(batch)

    def _failed(self, batch: Batch, error: PaycoreRpcError) -> None:
        now_ms = requests.milliseconds_now()
        with self._changed:
            failed = self._gatherer.fail(batch, error, now_ms)
        if failed.retry_in_ms is not None:
            self._alarm.at(now_ms + failed.retry_in_ms, partial(self._start_again, batch))
            return
        self._settle(failed.refused)
        self._finish(batch)

    def _start_again(self, batch: Batch) -> None:
        with self._changed:
            late = self._gatherer.drop_late(batch, requests.milliseconds_now())
        self._settle(late)
        if batch.words:
            self._start(batch)
        else:
            self._finish(batch)

    def _finish(self, batch: Batch) -> None:
        """Let the batch go and send what may go out in its place."""
        with self._changed:
            self._gatherer.finish(batch)
            taken = list(iter(self._gatherer.take, None))
            self._set_alarm()
            self._changed.notify_all()
        for each in taken:
            self._start(each)

    def _set_alarm(self) -> None:
        next_ms = self._gatherer.next_deadline_ms
        if next_ms < self._alarm_ms:
            self._alarm_ms = next_ms
            self._alarm.at(next_ms, self._expire)

    def _expire(self) -> None:
        with self._changed:
            late = self._gatherer.expire(requests.milliseconds_now())
            self._alarm_ms = FAR_MS
            self._set_alarm()
            self._changed.notify_all()
        self._settle(late)

    def _settle(self, answered: Iterable[tuple[Word, WordAnswer]]) -> None:
        """Tell who waits. Callbacks of futures run in here, without the lock."""
        self._callbacks.are_running = True
        try:
            settle_each(answered)
        finally:
            self._callbacks.are_running = False
