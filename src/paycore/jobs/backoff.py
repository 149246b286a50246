"""How long to wait before something is tried again. Pure: chance comes from outside."""

from collections.abc import Callable

Draw = Callable[[int], int]
"""``draw(n)`` gives one of 0 to n-1, each as likely as the others."""

_MOST_DOUBLINGS = 40
"""More would only make a number that the longest wait cuts off anyway."""


def backoff_ms(looks: int, first_ms: int, longest_ms: int, draw: Draw) -> int:
    """Return a wait in milliseconds that doubles with each look, somewhere in its upper half.

    looks: how many there were already; the first wait is of 0 looks. The wait is at most longest_ms, and jitter only
    shortens it: what failed together does not come back together.
    """
    full_ms = min(first_ms << min(looks, _MOST_DOUBLINGS), longest_ms)
    return full_ms - draw(full_ms // 2 + 1)
