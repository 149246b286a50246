"""Time as a parameter: whoever needs the time is handed a clock, so that a test can replay a day."""

from typing import Protocol


class Clock(Protocol):
    """Tells the time. Implementations must be safe to call from any thread."""

    def now_ms(self) -> int:
        """Return milliseconds since the Unix epoch, UTC. May step backwards with the machine's clock."""
        ...
