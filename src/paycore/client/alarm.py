"""Calls functions at given times, from one thread of its own: what an event loop's timers are to asyncio."""

import heapq
import itertools
import threading
from collections.abc import Callable

from paycore.client.requests import milliseconds_now


class Alarm:
    """Its thread starts with the first ``at`` and ends with ``stop``. The functions must not raise."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        # The count keeps functions from being compared.
        self._due: list[tuple[int, int, Callable[[], None]]] = []
        self._count = itertools.count()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    def at(self, when_ms: int, function: Callable[[], None]) -> None:
        """Call the function when ``milliseconds_now`` is there; never, when stopped before."""
        with self._changed:
            if self._is_stopped:
                return
            heapq.heappush(self._due, (when_ms, next(self._count), function))
            if self._thread is None:
                # A daemon: a program that forgets to close its notifier must still be able to end.
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif self._due[0][2] is function:
                self._changed.notify()

    def stop(self) -> None:
        """Call nothing any more; a function that is being called ends by itself."""
        with self._changed:
            self._is_stopped = True
            self._due.clear()
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while (function := self._next()) is not None:
            function()

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next function; None when stopped."""
        with self._changed:
            while not self._is_stopped:
                wait_ms = self._due[0][0] - milliseconds_now() if self._due else None
                if wait_ms is not None and wait_ms <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(None if wait_ms is None else wait_ms / 1_000)
            return None
