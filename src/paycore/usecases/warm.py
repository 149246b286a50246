"""Fills the index from the database before a server takes calls, the newest payments first.

Notifications come mostly for young payments. What is not loaded is read when it is asked for, a group at a time, so
this is about speed alone: a server that skips it answers the same.
"""

from paycore._dedupe import Index
from paycore.domain.ids import MAX_INT64
from paycore.domain.money import CURRENCY_CODES
from paycore.store.columns import IndexColumns
from paycore.store.protocol import Store

CHUNK = 50_000
"""Payments in one read: bounds what a warm start holds beside the index."""

_FULL_PERCENT = 90
"""Loading ends here of the index's limit: what came next would push out what was loaded before it."""


def load_columns(index: Index, columns: IndexColumns, codes: dict[tuple[str, str], int]) -> None:
    """Take payments into the index. codes: (channel, account) -> code."""
    index.load(columns.payments, columns.attempts, columns.captures, currencies=CURRENCY_CODES, accounts=codes)


def warm(store: Store, index: Index, codes: dict[tuple[str, str], int], limit: int) -> int:
    """Load the newest payments, at most ``limit`` and what the index has room for; return how many.

    To be called before the writer starts: nobody else may touch the index. Raises StoreUnavailableError.
    """
    loaded, before = 0, MAX_INT64
    while loaded < limit and not _is_full(index):
        columns = store.index_columns(before, min(CHUNK, limit - loaded))
        if not columns.payments:
            break
        load_columns(index, columns, codes)
        loaded += len(columns.payments)
        before = columns.payments[0][0]
    return loaded


def _is_full(index: Index) -> bool:
    return index.max_bytes > 0 and index.nbytes * 100 >= index.max_bytes * _FULL_PERCENT
