"""A PostgreSQL whose durability is switched off under a server that runs on it: nothing more is acknowledged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from sqlalchemy import Engine

from paycore.domain.errors import StoreUnavailableError
from paycore.domain.verdicts import NotifyOutcome
from paycore.store import postgresql_server
from paycore.store.engine import parse_database_url
from tests.support.clock import ManualClock
from tests.support.core import Core, check_money_rules
from tests.support.postgres import OwnServer, end_connections, own_server
from tests.support.simbank import wait_for

ACCEPTED = NotifyOutcome.ACCEPTED


@pytest.fixture(scope="module")
def own() -> Iterator[OwnServer]:
    with own_server() as own:
        yield own


@contextmanager
def reloaded(own: OwnServer, **settings: str) -> Iterator[None]:
    """The server's configuration says this until the block ends."""
    try:
        for name, value in settings.items():
            own.server.run(f"ALTER SYSTEM SET {name} = '{value}'")
        own.server.run("SELECT pg_reload_conf()")
        yield
    finally:
        own.server.run("ALTER SYSTEM RESET ALL")
        own.server.run("SELECT pg_reload_conf()")


@pytest.fixture
def engine(own: OwnServer) -> Iterator[Engine]:
    engine = parse_database_url(own.fresh_database()).engine(writes=True)
    yield engine
    engine.dispose()


def test_reload_that_stops_waiting_for_commits_does_not_reach_a_session_that_is_there(
    own: OwnServer, engine: Engine
) -> None:
    with engine.connect() as connection:

        def shown(name: str) -> object:
            return connection.exec_driver_sql(f"SHOW {name}").scalar_one()

        assert shown("synchronous_commit") == "on"
        with reloaded(own, synchronous_commit="off", work_mem="5MB"):
            # The session has read the new configuration: what it did not pin has changed.
            wait_for(lambda: shown("work_mem") == "5MB", "the reload")
            assert shown("synchronous_commit") == "on"


@pytest.mark.parametrize("switch", ["fsync", "full_page_writes"])
async def test_server_that_is_told_to_forget_is_refused_under_way_and_goes_on_when_it_is_durable_again(
    own: OwnServer, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_server, "LOOK_AGAIN_SECONDS", 0)
    with Core(own.fresh_database(), clock=ManualClock()) as core:
        ids = [await core.make_payment() for _ in range(2)]
        assert (await core.notify(core.word(ids[0]))).outcome == ACCEPTED
        with reloaded(own, **{switch: "off"}):
            wait_for(lambda: own.server.run(f"SHOW {switch}") == [("off",)], "the reload")
            for _ in range(2):
                with pytest.raises(StoreUnavailableError, match=f"runs with {switch}=off"):
                    await core.notify(core.word(ids[1]))
            assert core.health[-1] is False
        wait_for(lambda: own.server.run(f"SHOW {switch}") == [("on",)], "the reload")
        verdict = await core.notify(core.word(ids[1]))
        assert (verdict.outcome, verdict.replayed) == (ACCEPTED, False)
        check_money_rules(core.snapshot())


async def test_durability_is_looked_at_again_once_a_second(own: OwnServer, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(postgresql_server, "time", SimpleNamespace(monotonic=lambda: now))
    with Core(own.fresh_database(), clock=ManualClock()) as core:
        ids = [await core.make_payment() for _ in range(2)]
        with reloaded(own, fsync="off"):
            wait_for(lambda: own.server.run("SHOW fsync") == [("off",)], "the reload")
            await core.notify(core.word(ids[0]))
            now += postgresql_server.LOOK_AGAIN_SECONDS
            with pytest.raises(StoreUnavailableError, match="fsync=off"):
                await core.notify(core.word(ids[1]))


async def test_connection_that_breaks_under_the_look_costs_a_try_and_nothing_else(
    own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql_server, "LOOK_AGAIN_SECONDS", 0)
    url = own.fresh_database()
    with Core(url, clock=ManualClock()) as core:
        payment_id = await core.make_payment()
        end_connections(url)
        assert (await core.notify(core.word(payment_id))).outcome == ACCEPTED
        assert core.count("paycore_commit_failures_total", cause="busy") == 1
