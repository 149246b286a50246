"""Time as a parameter. The wall clock is read here and nowhere else in the simulator."""

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time. Safe to call from any thread."""

    def now_ms(self) -> int:
        """Return milliseconds since the Unix epoch, UTC."""
        ...


class WallClock:
    """The machine's clock."""

    def now_ms(self) -> int:
        """Return milliseconds since the Unix epoch, UTC. May step backwards."""
        return time.time_ns() // 1_000_000
