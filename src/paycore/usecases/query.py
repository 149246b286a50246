"""Query: everything on record about one payment. Changes nothing and asks no channel."""

import asyncio

from paycore.domain.errors import NotFoundError
from paycore.store.protocol import Store
from paycore.store.rows import PaymentFile
from paycore.usecases.keys import PAYMENT_NOT_FOUND, PaymentKey, resolve


class Query:
    """Reads payments."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def find(self, key: PaymentKey) -> PaymentFile:
        """Return a payment's file. Raises NotFoundError, InvalidArgumentError, StoreUnavailableError."""
        return await asyncio.to_thread(self._find, key)

    def _find(self, key: PaymentKey) -> PaymentFile:
        file = self._store.load_file(resolve(self._store, key))
        if file is None:
            raise NotFoundError(PAYMENT_NOT_FOUND, "no such payment")
        return file
