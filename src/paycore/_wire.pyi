# The documentation of the compiled module stands here, where editors find it.
# ruff: noqa: PYI021
"""Notify and NotifyBatch as bytes: requests to C records and answers to bytes, exactly as protobuf has them.

Codes are 1 to 255; 0 stands for what is not configured. Positions count from 0. Instants are milliseconds UTC.
"""

from collections.abc import Mapping, Sequence
from typing import final

from paycore.domain.notification import Notification

class MalformedError(ValueError):
    """The bytes are not a message of the type that was asked for. The same bytes will never be."""

@final
class Decoder:
    """Makes batches. Never changes once made, so threads may share it."""

    def __init__(self, accounts: Mapping[tuple[str, str], int], currencies: Mapping[str, int]) -> None:
        """Take the codes of what is configured: ``accounts`` by (channel, account), ``currencies`` by ISO code.

        Raises ValueError for a code outside 1 to 255, MemoryError when there is no room.
        """

    def notify(self, data: bytes, received_at_ms: int) -> Batch:
        """Read one NotifyRequest into a batch of one.

        Raises MalformedError where the protobuf library would refuse the bytes, and for 2 GiB or more.
        """

    def notify_batch(self, data: bytes, received_at_ms: int, limit: int) -> Batch:
        """Read a NotifyBatchRequest. The whole of it must be well-formed, but only ``limit`` records are kept.

        ``Batch.total`` says how many notifications it has, so that a caller can refuse too many; 0 is an empty
        batch. Lets other threads run while it reads many. Raises MalformedError as ``notify`` does, MemoryError when
        there is no room, ValueError when ``limit`` is negative.
        """

    def of_values(self, notifications: Sequence[Notification]) -> Batch:
        """Make a batch of what was learnt in another way, each with its own ``received_at_ms`` and ``source``.

        Plain tuples of the fields of ``Notification``, in its order, will do. Raises OverflowError where a
        number does not fit: amounts and times are int64, results int32, sources uint8.
        """

@final
class Batch:
    """Notifications in the order they came, each with the answer it gets.

    A record has no answer until ``answer`` or ``refuse`` gives it one. Methods that take a position raise
    IndexError where there is none.
    """

    @property
    def total(self) -> int:
        """How many notifications the message had; the batch holds no more than the limit of them."""

    def __len__(self) -> int:
        """How many records there are."""

    def suspects(self) -> list[int]:
        """Return the positions of all that is not plain, in order: Python is to look at these rule by rule.

        Plain is a NOTIFICATION of a SUCCESS with a positive amount and a trade number, whose texts, raw message and
        headers are surely within their limits and hold no NUL. Nothing plain breaks a rule of usecases.notify.
        """

    def notification(
        self, position: int
    ) -> tuple[str, str, str, int, int, str, str, int, int, int, str, str, bytes, dict[str, str] | str]:
        """Return the fields of a ``domain.notification.Notification``, in its order.

        ``result`` and ``source`` are plain integers. ``paid_at_ms`` is rounded down and moved to the nearest valid
        time, ``decision.ABSENT_MS`` where not given. The headers are a dictionary where the batch was read from
        bytes; of a batch made ``of_values`` every field is what was given, the headers therefore JSON text.
        """

    def _record(self, position: int) -> tuple[int, int, int, int]:
        """Return what the record says of (payment_id, attempt, account code, currency code). For tests."""

    def answer(self, position: int, verdict: int, payment_id: int = 0, attempt: int = 0) -> None:
        """Answer with a packed verdict: the outcome in the low 8 bits, VerdictFlag bits above.

        Raises ValueError when it is refused already.
        """

    def refuse(self, position: int, outcome: int, violations: Sequence[tuple[str, str]] = ()) -> None:
        """Answer with INVALID or THROTTLED, and keep it from being judged. ``violations``: (field, rule) pairs.

        Raises ValueError for another outcome.
        """

    def pending(self) -> int:
        """Return how many records are not refused."""

    def verdict(self, position: int) -> tuple[int, int, int]:
        """Return (packed verdict, payment_id, attempt) of the answer; all are 0 where there is none."""

    def encode_one(self) -> bytes:
        """Return the answer of a batch of one as a NotifyResponse.

        Raises ValueError when it is not a batch of one, RuntimeError when it has no answer.
        """

    def encode(self) -> bytes:
        """Return all answers as a NotifyBatchResponse, byte for byte what the protobuf library would write.

        Raises RuntimeError when a record has no answer.
        """

def _fail_allocation_after(count: int) -> None:
    """For tests only: let ``count`` more allocations of this module and of _group succeed, then fail every one.

    A negative count ends that. The setting is the process's, not one batch's.
    """

def _blocks_held() -> int:
    """How many blocks of memory all batches, decoders and groups of this process hold. For tests."""
