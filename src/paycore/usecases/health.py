"""The least write that proves the database can be written."""

from paycore._dedupe import Index
from paycore.store.protocol import WriteTransaction


class Heartbeat:
    """A write unit that notes that the writer is alive."""

    def apply(self, transaction: WriteTransaction) -> None:
        """Touch the writer's own row."""
        transaction.touch_writer()

    def committed(self, index: Index) -> None:
        """Nothing to tell the index."""
