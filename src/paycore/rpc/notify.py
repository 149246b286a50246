"""Notify and NotifyBatch, the hot calls: bytes to records, one await for the commit, bytes back.

No Python object is made of a field on the way. When a caller hangs up, only the answer is lost: what is queued is
committed all the same.
"""

from paycore._wire import Decoder, MalformedError
from paycore.domain.clock import Clock
from paycore.domain.errors import FieldViolation, InvalidArgumentError
from paycore.rpc.handling import malformed
from paycore.usecases.notify import Notify
from paycore.v1 import payment_service_pb2

MAX_BATCH = 10_000
"""Words in one NotifyBatch at most."""


class NotifyHandler:
    """Answers Notify and NotifyBatch, from bytes to bytes."""

    def __init__(self, notify: Notify, decoder: Decoder, clock: Clock) -> None:
        self._notify = notify
        self._decoder = decoder
        self._clock = clock

    async def one(self, data: bytes) -> bytes:
        """Answer once what the word means is durable."""
        try:
            batch = self._decoder.notify(data, self._clock.now_ms())
        except MalformedError:
            raise malformed(payment_service_pb2.NotifyRequest) from None
        await self._notify.one(batch)
        return batch.encode_one()

    async def batch(self, data: bytes) -> bytes:
        """Answer each word for itself, in the order asked; raise where the whole could not be committed."""
        try:
            batch = self._decoder.notify_batch(data, self._clock.now_ms(), MAX_BATCH)
        except MalformedError:
            raise malformed(payment_service_pb2.NotifyBatchRequest) from None
        if not 1 <= batch.total <= MAX_BATCH:
            rule = f"must have 1 to {MAX_BATCH} entries, not {batch.total}"
            raise InvalidArgumentError([FieldViolation("notifications", rule)], "INVALID_BATCH")
        await self._notify.many(batch)
        return batch.encode()
