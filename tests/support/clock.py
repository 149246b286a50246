"""Clocks for tests."""

from __future__ import annotations

import time

NOON_MS = 1_767_268_800_000
"""2026-01-01T12:00:00Z."""


class ManualClock:
    """Stands still until it is moved."""

    def __init__(self, now_ms: int = NOON_MS) -> None:
        self._now_ms = now_ms

    def now_ms(self) -> int:
        return self._now_ms

    def advance(self, by_ms: int) -> None:
        self._now_ms += by_ms


class ShiftedClock:
    """The machine's clock, which a test can shift: for tests with banks, whose own clock goes on."""

    def __init__(self) -> None:
        self._shift_ms = 0

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self._shift_ms

    def advance(self, by_ms: int) -> None:
        self._shift_ms += by_ms
