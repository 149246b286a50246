"""Fixtures that several integration tests share: banks that run once a worker, and a fresh paycore beside them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.support.bank import Street, Town, a_town
from tests.support.databases import KINDS, take_database
from tests.support.simbank import SECRETS, Driver, Receiver, bank_process


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


@pytest.fixture(autouse=True)
def no_fault_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whoever comes next finds banks that work, also where a test has failed half-way."""
    if "street" not in request.fixturenames:
        yield
        return
    street: Street = request.getfixturevalue("street")
    yield
    for bank in SECRETS:
        street.driver.plant_everywhere(bank)


@pytest.fixture(params=KINDS)
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind in turn."""
    return take_database(request.param, tmp_path)


@pytest.fixture
async def town(street: Street, db_url: str) -> AsyncIterator[Town]:
    """A core on a fresh database beside the banks."""
    async with a_town(db_url, street) as town:
        yield town


@pytest.fixture
async def patient_town(street: Street, db_url: str) -> AsyncIterator[Town]:
    """The same with an adapter that waits as long as a test needs to do something meanwhile."""
    async with a_town(db_url, street, timeout_ms=15_000) as town:
        yield town


@pytest.fixture
async def alone(tmp_path: Path, db_url: str) -> AsyncIterator[Town]:
    """A town whose bank keeps books for nobody else."""
    receiver = Receiver()
    try:
        with (
            bank_process(tmp_path, f"{receiver.url}/notifications") as bank,
            Driver(bank.url) as driver,
        ):
            async with a_town(db_url, Street(bank, driver, receiver)) as town:
                yield town
    finally:
        receiver.close()
