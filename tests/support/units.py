"""Write units for tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from paycore._dedupe import Index
from paycore.store.protocol import WriteTransaction
from paycore.store.rows import PaymentRecord
from paycore.usecases.judge import AccountCodes, index_payment
from paycore.usecases.writer import Writer


class Load:
    """Takes a payment into the index and writes nothing."""

    def __init__(self, payment_id: int, accounts: AccountCodes) -> None:
        self._payment_id = payment_id
        self._accounts = accounts
        self._record: PaymentRecord | None = None

    def apply(self, transaction: WriteTransaction) -> None:
        self._record = transaction.load_records([self._payment_id])[self._payment_id]

    def committed(self, index: Index) -> None:
        assert self._record is not None
        index_payment(index, self._record, self._accounts)


class Block:
    """Holds the writer thread inside a transaction until ``gate`` is set."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()

    def apply(self, transaction: WriteTransaction) -> None:
        self.entered.set()
        assert self.gate.wait(20), "nobody let the writer go on"

    def committed(self, index: Index) -> None:
        """Nothing to tell."""


class Fail:
    """Writes something, then raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def apply(self, transaction: WriteTransaction) -> None:
        assert transaction.insert_merchant_order("nobody", "nothing", 1)
        raise self._error

    def committed(self, index: Index) -> None:
        raise AssertionError("a unit that failed was not committed")


@asynccontextmanager
async def held(writer: Writer) -> AsyncIterator[None]:
    """Hold the writer, so that whatever is asked in the block waits together."""
    block = Block()
    task = asyncio.create_task(writer.run(block))
    assert await asyncio.to_thread(block.entered.wait, 20)
    try:
        yield
    finally:
        block.gate.set()
        await task
