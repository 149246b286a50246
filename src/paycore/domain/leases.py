"""How long a lease on an attempt or on a refund's try holds others up. Pure."""

LONGEST_LEASE_MS = 600_000
"""No lease is asked for longer: some calls to a channel, each of which takes two minutes at most."""


def lease_holds(until_ms: int, now_ms: int) -> bool:
    """Whether a lease that ends at ``until_ms`` still holds.

    One that ends further ahead than any lease lasts was written by a clock that was wrong, and counts as ended.
    """
    return now_ms < until_ms <= now_ms + LONGEST_LEASE_MS
