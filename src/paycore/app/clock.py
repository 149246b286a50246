"""The machine's clock."""

import time


class SystemClock:
    """Tells the time of the machine; see ``domain.clock.Clock``."""

    def now_ms(self) -> int:
        """Milliseconds since the Unix epoch, UTC."""
        return time.time_ns() // 1_000_000
