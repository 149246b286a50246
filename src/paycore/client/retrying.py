"""When a call that met UNAVAILABLE is made again. Pure: the clock and chance are the caller's.

gRPC has retries of its own (``retryPolicy`` of the service config), but they make at most five attempts whatever the
deadline (gRFC A6), give up silently on a call whose message is over its buffer of 256 KiB
(``grpc.per_rpc_retry_buffer_size``), as a large NotifyBatch is, and know one deadline a call, where each word of a
batch has its own. So none is configured, and these are for every call of the clients.

No call waits for a server to come up (gRPC's ``wait_for_ready``): while there is none it fails at once, and the retry
finds the one that is. In the end the caller reads why there was no answer, and not only that there was none.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from paycore.client.errors import PaycoreRpcError

Draw = Callable[[int], int]
"""Draws an integer from 0 to the one given, both included."""


def draw(highest: int) -> int:
    """Draw evenly from 0 to ``highest``, both included."""
    return random.randint(0, highest)  # noqa: S311 - spreads load, guards nothing


@dataclass(frozen=True)
class RetryPolicy:
    """Retries on UNAVAILABLE only, for as long as the call's deadline allows: every call of the API may be repeated.

    The n-th wait is drawn evenly from 0 to ``initial_backoff_ms`` doubled n - 1 times, at most ``max_backoff_ms`` (full
    jitter); where the server asks for a delay (RetryInfo), that comes on top. max_attempts: how often the call is made
    in all; None for no other bound than the deadline.
    """

    initial_backoff_ms: int = 50
    max_backoff_ms: int = 1_000
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.initial_backoff_ms <= self.max_backoff_ms:
            raise ValueError("initial_backoff_ms must be at least 1 and not above max_backoff_ms")
        if self.max_attempts is not None and self.max_attempts < 1:
            raise ValueError("max_attempts must be at least 1")

    def wait_ms(self, error: PaycoreRpcError, attempts: int, draw: Draw) -> int | None:
        """Return how long to wait after that many attempts, of which the last met ``error``; None to give up."""
        if error.code is not grpc.StatusCode.UNAVAILABLE:
            return None
        if self.max_attempts is not None and attempts >= self.max_attempts:
            return None
        # The shift is bounded: a call that is made for hours must not compute with numbers of that many digits.
        highest = min(self.initial_backoff_ms << min(attempts - 1, 32), self.max_backoff_ms)
        return (error.retry_after_ms or 0) + draw(highest)


NO_RETRY = RetryPolicy(max_attempts=1)
"""Every call is made once."""


class Attempts:
    """Counts the attempts of one call against its deadline.

    A call whose next attempt could only begin after the deadline fails at once, with the error that it met last.
    """

    def __init__(self, policy: RetryPolicy, deadline_ms: int, draw: Draw) -> None:
        self._policy = policy
        self._deadline_ms = deadline_ms
        self._draw = draw
        self._made = 0

    def left_ms(self, now_ms: int) -> int:
        """How long the attempt that begins now may take."""
        return max(self._deadline_ms - now_ms, 0)

    def wait_ms(self, error: PaycoreRpcError, now_ms: int) -> int | None:
        """Return how long to wait before the next attempt; None when there is none."""
        self._made += 1
        wait_ms = self._policy.wait_ms(error, self._made, self._draw)
        return wait_ms if wait_ms is not None and now_ms + wait_ms < self._deadline_ms else None
