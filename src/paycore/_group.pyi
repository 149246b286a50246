# The documentation of the compiled module stands here, where editors find it.
# ruff: noqa: PYI021
"""A group of notifications on its short way: records -> decision -> columns, without a Python object a word."""

from collections.abc import Collection, Iterable
from typing import Any, final

from paycore._dedupe import Index
from paycore._wire import Batch

@final
class Group:
    """Words of several batches that are decided together with one index, and the outcomes of those it accepts.

    ``pieces``: (batch, start, stop) each. A word that its batch has refused is left out throughout. Nobody else may
    answer or refuse words of the batches while the group lives. Raises MemoryError, ValueError.

    Once ``accept`` was called it is a ``paycore.store.protocol.FirstOutcomes``.
    """

    def __init__(self, index: Index, pieces: list[tuple[Batch, int, int]]) -> None: ...
    def missing(self) -> list[int]:
        """The payments, ascending, of the words without an answer that the index does not hold."""

    def accept(self) -> int:
        """Check every word without an answer; accept, answer and mark those that are the first and in time.

        Returns how many are accepted in all. Worth calling again once what was ``missing`` has been loaded. The index
        must be between ``begin`` and ``commit``. Raises MemoryError; it must then be rolled back.
        """

    def rare(self, lost: Collection[int]) -> list[tuple[Batch, int]]:
        """The words that are not accepted, in the order given, and every word of a payment in ``lost``."""

    def tally(self) -> list[tuple[int, int, bool, int]]:
        """Count the answers: (account code, outcome, replayed, how many)."""

    @property
    def untrusted(self) -> int:
        """How many were accepted by ``accept`` although their pay time could not be believed."""

    def __len__(self) -> int:
        """How many ``accept`` accepted."""

    @property
    def payment_ids(self) -> list[int]:
        """The accepted payments, ascending."""

    def values(self, start: int, stop: int) -> list[Any]:
        """See FirstOutcomes."""

    def arrays(self) -> tuple[bytes, bytes, bytes, bytes, bytes, bytes, bytes, bytes]:
        """See FirstOutcomes. The layout is array_send's (PostgreSQL, src/backend/utils/adt/arrayfuncs.c)."""

def account_codes(batch: Batch, positions: Iterable[int]) -> list[int]:
    """The code of the account that each of these words names; 0 where it is not configured."""

def pending_from(batch: Batch, start: int) -> list[int]:
    """Where the words stand, from ``start`` on, that are not refused."""
