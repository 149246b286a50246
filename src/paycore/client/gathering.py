"""What the batching notifiers share: which words go out together, and what becomes of them when a call fails.

Pure: it holds no lock, reads no clock and calls nobody. The asyncio notifier drives it from its loop, the thread-safe
one under a lock. A word leaves it when its future is settled: answered, refused, or out of time.
"""

from collections import deque
from collections.abc import Iterable
from concurrent.futures import InvalidStateError
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import grpc

from paycore.client.answers import WordAnswer
from paycore.client.errors import PaycoreRpcError
from paycore.client.retrying import Draw, RetryPolicy
from paycore.v1.payment_service_pb2 import NotifyRequest, NotifyResponse

METHOD = "/paycore.v1.PaymentService/NotifyBatch"
FAR_MS = 2**63
"""Later than every deadline."""

MIN_LEARNED_BYTES = 64 * 1024
"""How far a batch may shrink by learning; a server that takes less than this takes no single word with evidence."""

_NOTIFICATIONS_TAG = b"\x0a"  # field 1 of NotifyBatchRequest, length-delimited


class Settled(Protocol):
    """What asyncio's future and that of threads have in common."""

    def done(self) -> bool: ...
    def set_result(self, result: NotifyResponse, /) -> None: ...
    def set_exception(self, exception: PaycoreRpcError, /) -> None: ...


@dataclass(frozen=True)
class BatchLimits:
    """How words are gathered.

    max_in_flight: calls that are out at once; while so many are, words gather. max_words, max_bytes: of one call; the
    server takes 10,000 words and PAYCORE_MAX_MESSAGE_BYTES (8 MiB). max_waiting: words that may wait for a call.
    """

    max_in_flight: int = 8
    max_words: int = 10_000
    max_bytes: int = 4 * 1024 * 1024
    max_waiting: int = 100_000

    def __post_init__(self) -> None:
        if min(self.max_in_flight, self.max_words, self.max_bytes, self.max_waiting) < 1:
            raise ValueError("every limit must be at least 1")


class Word:
    """One notification on its way: its bytes as they stand in a NotifyBatchRequest, who waits, and until when."""

    __slots__ = ("deadline_ms", "frame", "future")

    def __init__(self, request: NotifyRequest, future: Settled, deadline_ms: int) -> None:
        data = request.SerializeToString()
        self.frame = _head(len(data)) + data
        self.future = future
        self.deadline_ms = deadline_ms


class Batch:
    """Words that go out in one call."""

    def __init__(self, words: list[Word], attempts: int = 0) -> None:
        self.words = words
        self.attempts = attempts
        self.last_error: PaycoreRpcError | None = None
        self.first_deadline_ms = min(word.deadline_ms for word in words)
        self.last_deadline_ms = max(word.deadline_ms for word in words)

    def message(self) -> bytes:
        """The NotifyBatchRequest: in protobuf's encoding the elements of a repeated field simply follow each other."""
        return b"".join([word.frame for word in self.words])

    def left_seconds(self, now_ms: int) -> float:
        """How long the call may take: until the last of its words is out of time."""
        return max(self.last_deadline_ms - now_ms, 0) / 1_000


Refusals = list[tuple[Word, PaycoreRpcError]]
"""Words that are to be settled, each with an error of its own."""


class Failed(NamedTuple):
    """What is to be done after a call failed: settle words, or send the batch again after a while.

    With neither, the batch was split and its halves wait to be taken.
    """

    refused: Refusals
    retry_in_ms: int | None = None


class Gatherer:
    """Holds the words that wait and the batches that are out."""

    def __init__(self, limits: BatchLimits, retry: RetryPolicy, draw: Draw) -> None:
        self._limits = limits
        self._retry = retry
        self._draw = draw
        self._max_bytes = limits.max_bytes
        self._waiting: deque[Word] = deque()
        self._waiting_bytes = 0
        # No later than the deadline of any word that waits.
        self._first_deadline_ms = FAR_MS
        self._halves: deque[Batch] = deque()
        self._out: set[Batch] = set()

    @property
    def is_full(self) -> bool:
        """Whether no further word may be added."""
        return len(self._waiting) >= self._limits.max_waiting

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is out."""
        return not (self._waiting or self._halves or self._out)

    @property
    def next_deadline_ms(self) -> int:
        """When ``expire`` should be asked next: no word is out of time before."""
        batches = [batch.first_deadline_ms for held in (self._halves, self._out) for batch in held]
        return min(batches, default=FAR_MS) if not self._waiting else min(self._first_deadline_ms, *batches, FAR_MS)

    def add(self, word: Word) -> None:
        """Let a word wait. The caller has seen that there is room."""
        self._waiting.append(word)
        self._waiting_bytes += len(word.frame)
        self._first_deadline_ms = min(self._first_deadline_ms, word.deadline_ms)

    def take(self) -> Batch | None:
        """Return what goes out now; None when as many batches are out as may be, or nothing waits."""
        if len(self._out) >= self._limits.max_in_flight:
            return None
        if self._halves:
            batch = self._halves.popleft()
        elif self._waiting:
            batch = Batch(self._take_words())
        else:
            return None
        self._out.add(batch)
        return batch

    def finish(self, batch: Batch) -> None:
        """The batch is no longer out; its words are settled."""
        self._out.discard(batch)

    def fail(self, batch: Batch, error: PaycoreRpcError, now_ms: int) -> Failed:
        """Say what follows from a failed call. Unless it is sent again, the batch is no longer out."""
        batch.attempts += 1
        wait_ms = self._retry.wait_ms(error, batch.attempts, self._draw)
        if wait_ms is not None:
            batch.last_error = error
            return Failed([], max(min(wait_ms, batch.last_deadline_ms - now_ms), 0))
        self._out.discard(batch)
        if _is_about_the_message(error) and len(batch.words) > 1:
            self._split(batch, error)
            return Failed([])
        if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Failed([(word, deadline_error(batch.last_error)) for word in batch.words])
        return Failed([(word, error.copy()) for word in batch.words])

    def drop_late(self, batch: Batch, now_ms: int) -> Refusals:
        """Take out of a batch, before it is sent, the words that are out of time; return them."""
        late = [word for word in batch.words if word.deadline_ms <= now_ms]
        if late:
            batch.words = [word for word in batch.words if word.deadline_ms > now_ms]
        return [(word, deadline_error(batch.last_error)) for word in late]

    def expire(self, now_ms: int) -> Refusals:
        """Return every word that is out of time now, with its error. What waited is taken out, what is out goes on."""
        late: Refusals = [(word, deadline_error(None)) for word in self._expire_waiting(now_ms)]
        for held in (self._halves, self._out):
            for batch in held:
                if batch.first_deadline_ms <= now_ms:
                    late += [(word, deadline_error(batch.last_error)) for word in batch.words if _is_late(word, now_ms)]
                    timely = [word.deadline_ms for word in batch.words if word.deadline_ms > now_ms]
                    batch.first_deadline_ms = min(timely, default=FAR_MS)
        return late

    def abandon(self) -> Refusals:
        """Give up everything; return the words that are not settled, each with the error of a closed notifier."""
        batches = (*self._halves, *self._out)
        words = [*self._waiting, *(word for batch in batches for word in batch.words)]
        self._waiting.clear()
        self._halves.clear()
        self._out.clear()
        return [(word, closed_error()) for word in words if not word.future.done()]

    def _take_words(self) -> list[Word]:
        waiting, limits = self._waiting, self._limits
        if len(waiting) <= limits.max_words and self._waiting_bytes <= self._max_bytes:
            words = list(waiting)
            waiting.clear()
            self._waiting_bytes = 0
        else:
            words = self._take_some()
        if not waiting:
            self._first_deadline_ms = FAR_MS
        return words

    def _take_some(self) -> list[Word]:
        words = [self._waiting.popleft()]
        size = len(words[0].frame)
        while (
            self._waiting
            and len(words) < self._limits.max_words
            and size + len(self._waiting[0].frame) <= self._max_bytes
        ):
            words.append(self._waiting.popleft())
            size += len(words[-1].frame)
        self._waiting_bytes -= size
        return words

    def _split(self, batch: Batch, error: PaycoreRpcError) -> None:
        middle = len(batch.words) // 2
        self._halves.extend(Batch(words, batch.attempts) for words in (batch.words[:middle], batch.words[middle:]))
        if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            half = sum(len(word.frame) for word in batch.words) // 2
            self._max_bytes = min(self._max_bytes, max(half, MIN_LEARNED_BYTES))

    def _expire_waiting(self, now_ms: int) -> list[Word]:
        if self._first_deadline_ms > now_ms:
            return []
        late = [word for word in self._waiting if word.deadline_ms <= now_ms]
        self._waiting = deque(word for word in self._waiting if word.deadline_ms > now_ms)
        self._waiting_bytes -= sum(len(word.frame) for word in late)
        self._first_deadline_ms = min((word.deadline_ms for word in self._waiting), default=FAR_MS)
        return late


def settle(word: Word, answer: WordAnswer) -> None:
    """Tell whoever waits for a word, unless its time was up before or its future was cancelled."""
    if word.future.done():
        return
    try:
        if isinstance(answer, PaycoreRpcError):
            word.future.set_exception(answer)
        else:
            word.future.set_result(answer)
    except InvalidStateError:
        # Another thread was first: the deadline and the answer came at the same moment.
        pass


def settle_each(answered: Iterable[tuple[Word, WordAnswer]]) -> None:
    """Tell whoever waits for each of the words."""
    for word, answer in answered:
        settle(word, answer)


def deadline_error(last_error: PaycoreRpcError | None) -> PaycoreRpcError:
    """The error of a word that was not answered in time; the error that its calls met until then is the cause."""
    code = grpc.StatusCode.DEADLINE_EXCEEDED
    text = "no answer in time" if last_error is None else f"no answer in time; the last one was {last_error}"
    error = PaycoreRpcError(code, code.name, text, retryable=True)
    error.__cause__ = last_error
    return error


def closed_error() -> PaycoreRpcError:
    """The error of words that a closed notifier did not take, or did not see answered."""
    return PaycoreRpcError(
        grpc.StatusCode.CANCELLED, "NOTIFIER_CLOSED", "the notifier was closed before an answer came", retryable=True
    )


def queue_full_error(limit: int) -> PaycoreRpcError:
    """The error of a word for which there was no room; it was not sent."""
    text = f"{limit} words wait to be sent; this one was not taken"
    return PaycoreRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, "NOTIFIER_FULL", text, retryable=True)


def _is_about_the_message(error: PaycoreRpcError) -> bool:
    """Whether half the words might fare better: gRPC found the message too large, or something in it spoils it."""
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # An answer of paycore's own has a reason of its own: there is too much of something else.
        return error.reason == error.code.name
    return error.code is grpc.StatusCode.INVALID_ARGUMENT


def _is_late(word: Word, now_ms: int) -> bool:
    return word.deadline_ms <= now_ms and not word.future.done()


@lru_cache(maxsize=4_096)
def _head(length: int) -> bytes:
    """The field's tag and the length, a varint: what stands before an element of the repeated field."""
    rest, digits = length, bytearray(_NOTIFICATIONS_TAG)
    while rest > 0x7F:
        digits.append(rest & 0x7F | 0x80)
        rest >>= 7
    digits.append(rest)
    return bytes(digits)
