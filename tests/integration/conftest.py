"""Fixtures that several integration tests share: banks that run once a worker, and a fresh paycore beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.bank import Street, Town, a_town
from tests.support.simbank import Driver, Receiver, bank_process


@pytest.fixture(scope="session")
def street(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Street]:
    """The banks' process, who receives its notifications, and who drives it."""
    receiver = Receiver()
    try:
        with (
            bank_process(tmp_path_factory.mktemp("street"), f"{receiver.url}/notifications") as bank,
            Driver(bank.url) as driver,
        ):
            yield Street(bank, driver, receiver)
    finally:
        receiver.close()


@pytest.fixture
async def town(street: Street, tmp_path: Path) -> AsyncIterator[Town]:
    """A core on a fresh database beside the banks."""
    async with a_town(tmp_path, street) as town:
        yield town


@pytest.fixture
async def patient_town(street: Street, tmp_path: Path) -> AsyncIterator[Town]:
    """The same with an adapter that waits as long as a test needs to do something meanwhile."""
    async with a_town(tmp_path, street, timeout_ms=15_000) as town:
        yield town
