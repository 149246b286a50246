"""The least write that proves the database can be written."""

from paycore.store.protocol import WriteTransaction
from paycore.usecases.writer import UnindexedUnit


class Heartbeat(UnindexedUnit):
    """A write unit that notes that the writer is alive."""

    def apply(self, transaction: WriteTransaction) -> None:
        """Touch the writer's own row."""
        transaction.touch_writer()
