"""How much evidence each source may add to quarantine: a flood is turned away, not stored and not dropped.

Whoever can reach a gateway may invent order numbers, each of them evidence that is kept for ever. So each source, an
account that is configured or everybody else together, has an allowance that refills with time. What is over it is
answered THROTTLED and not acknowledged: the channel sends it again, and a true word gets in later.
"""

from typing import NamedTuple

_MS_PER_MINUTE = 60_000


class QuarantineLimits(NamedTuple):
    """burst: rows at once after a quiet time. per_minute: rows in the long run. Both are for each source."""

    burst: int
    per_minute: int


class QuarantineBudget:
    """The allowances of all sources. Belongs to the writer thread. Integers throughout: row-milliseconds."""

    def __init__(self, limits: QuarantineLimits) -> None:
        self._limits = limits
        self._full = limits.burst * _MS_PER_MINUTE
        self._left: dict[int, tuple[int, int]] = {}

    def room(self, source: int, now_ms: int) -> int:
        """How many rows a source may add now. source: the account's code, 0 for all that are not configured."""
        return self._refill(source, now_ms) // _MS_PER_MINUTE

    def spend(self, source: int, rows: int, now_ms: int) -> None:
        """Take off rows that were committed."""
        self._left[source] = (self._refill(source, now_ms) - rows * _MS_PER_MINUTE, now_ms)

    def _refill(self, source: int, now_ms: int) -> int:
        left, at_ms = self._left.get(source, (self._full, now_ms))
        # A clock that steps back refills nothing, and what it says from then on counts: a source that has nothing left
        # need not wait until the clock is where it was.
        left = min(self._full, left + max(0, now_ms - at_ms) * self._limits.per_minute)
        self._left[source] = (left, now_ms)
        return left
