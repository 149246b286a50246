"""A server frozen inside a commit (SIGSTOP), another one on the same database, and what their callers hear."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest

from paycore.bench.payments import Cycle, Lot
from tests.support.books import check_books, counts, not_settled_once, put_lot, someone_waits
from tests.support.clock import ShiftedClock
from tests.support.databases import KINDS, make_database
from tests.support.processes import Answer, Peer, Sent, peers, success
from tests.support.simbank import wait_for

BEFORE_COMMIT = "store.before_commit"
GATES = (BEFORE_COMMIT, "judge.outcomes_inserted", "store.committed")

GO_ON_SECONDS = 15
"""Within this the others go on on PostgreSQL, which cuts a session off that stands still inside a transaction."""

_nodes = itertools.count(1)


class Scene(NamedTuple):
    """Two servers over one database, the first of which can be held."""

    url: str
    frozen: Peer
    other: Peer

    def put(self, size: int, *, expired: bool = False) -> list[int]:
        """Put payments with two open attempts there; return their ids. expired: their validity has passed."""
        node = next(_nodes)
        first_ms = ShiftedClock().now_ms() - 600_000 + node * 1_000
        return put_lot(self.url, Lot(first_ms, size, node, cycle=Cycle(length=1, twice=1, expired=int(expired))))

    def freeze_inside(self, ids: list[int], gate: str) -> Sent:
        """Tell the first server a success of each payment, and freeze it where its group passes the gate."""
        self.frozen.shut(gate)
        sent = self.frozen.send([success(payment_id, 1) for payment_id in ids])
        self.frozen.wait_held(gate)
        self.frozen.freeze()
        self.frozen.open(gate)
        return sent

    def check(self, ids: list[int]) -> None:
        """Each capture that was told is settled once, whoever is asked again says so, and the books are right."""
        both = [success(payment_id, attempt) for payment_id in ids for attempt in (1, 2)]
        told = [peer.tell(*both) for peer in (self.frozen, self.other)]
        assert told[0] == told[1]
        assert all(answer.replayed for answer in told[0])
        assert [answer.outcome for answer in told[0]].count("ACCEPTED") == len(ids)
        assert not_settled_once(self.url, ids[0], ids[-1]) == []
        check_books(self.url)
        assert not any("sweep_found" in peer.log() for peer in (self.frozen, self.other))


def scene_on(kind: str, folder: Path) -> Iterator[Scene]:
    url = make_database(kind, folder)
    with peers(url, folder, 2, gates=GATES) as (frozen, other):
        yield Scene(url, frozen, other)


@pytest.fixture(scope="module")
def on_postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    yield from scene_on("postgresql", tmp_path_factory.mktemp("frozen"))


@pytest.fixture(scope="module")
def on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    yield from scene_on("sqlite", tmp_path_factory.mktemp("frozen"))


@pytest.mark.parametrize("gate", ["judge.outcomes_inserted", BEFORE_COMMIT])
def test_others_go_on_within_the_timeout_on_postgresql_and_the_frozen_one_neither_loses_nor_doubles(
    on_postgresql: Scene, gate: str
) -> None:
    """The other one is told the second successes of the very payments whose rows the frozen one holds."""
    scene = on_postgresql
    ids = scene.put(20)
    sent = scene.freeze_inside(ids, gate)
    began = time.monotonic()
    answers = scene.other.tell(*(success(payment_id, 2) for payment_id in ids))
    took = time.monotonic() - began
    assert answers == [Answer("ACCEPTED", False)] * len(ids)
    assert took < GO_ON_SECONDS
    assert not sent.is_answered()
    scene.frozen.thaw()
    # Its session was cut off, so what it had written is gone; it decides its group again.
    assert sent.answers() == [Answer("DUPLICATE", False)] * len(ids)
    scene.check(ids)


def test_words_about_other_payments_wait_for_nobody_on_postgresql(on_postgresql: Scene) -> None:
    scene = on_postgresql
    ids, others = scene.put(20), scene.put(20)
    sent = scene.freeze_inside(ids, BEFORE_COMMIT)
    began = time.monotonic()
    answers = scene.other.tell(*(success(payment_id, 1) for payment_id in others))
    took = time.monotonic() - began
    scene.frozen.thaw()
    assert answers == [Answer("ACCEPTED", False)] * len(others)
    assert took < 1
    assert sent.answers() == [Answer("ACCEPTED", False)] * len(ids)
    scene.frozen.tell(*(success(payment_id, 2) for payment_id in ids + others))
    for group in (ids, others):
        scene.check(group)


@pytest.mark.parametrize("kind", KINDS)
def test_server_frozen_behind_its_commit_stands_in_nobodys_way_and_answers_what_it_committed(
    kind: str, request: pytest.FixtureRequest
) -> None:
    scene: Scene = request.getfixturevalue(f"on_{kind}")
    while True:
        ids = scene.put(20)
        sent = scene.freeze_inside(ids, "store.committed")
        if counts(scene.url, ids[0], ids[-1])["payment_outcome"]:
            break
        # A heartbeat came by first.
        scene.frozen.thaw()
        sent.answers()
    assert scene.other.tell(*(success(payment_id, 2) for payment_id in ids)) == [Answer("DUPLICATE", False)] * len(ids)
    scene.frozen.thaw()
    assert sent.answers() == [Answer("ACCEPTED", False)] * len(ids)
    scene.check(ids)


def test_others_are_unavailable_on_sqlite_until_the_frozen_one_resumes(on_sqlite: Scene) -> None:
    scene = on_sqlite
    ids = scene.put(20)
    sent = scene.freeze_inside(ids, BEFORE_COMMIT)
    second = [success(payment_id, 2) for payment_id in ids]
    assert scene.other.send(second).code() == "UNAVAILABLE"
    scene.frozen.thaw()
    assert sent.answers() == [Answer("ACCEPTED", False)] * len(ids)
    assert scene.other.tell(*second) == [Answer("DUPLICATE", False)] * len(ids)
    scene.check(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_server_that_dies_leaves_nothing_behind_and_the_others_go_on(
    kind: str, request: pytest.FixtureRequest
) -> None:
    scene: Scene = request.getfixturevalue(f"on_{kind}")
    ids = scene.put(20)
    sent = scene.freeze_inside(ids, BEFORE_COMMIT)
    second = [success(payment_id, 2) for payment_id in ids]
    if kind == "sqlite":
        assert scene.other.send(second).code() == "UNAVAILABLE"
    scene.frozen.process.kill()
    began = time.monotonic()
    assert scene.other.tell(*second) == [Answer("ACCEPTED", False)] * len(ids)
    assert time.monotonic() - began < GO_ON_SECONDS
    with pytest.raises(grpc.RpcError):
        sent.answers()
    scene.frozen.restart()
    assert scene.frozen.tell(*sent.words) == [Answer("DUPLICATE", False)] * len(ids)
    scene.check(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_late_success_and_one_in_time_that_are_written_at_the_same_instant_leave_no_excess_without_a_refund(
    kind: str, request: pytest.FixtureRequest
) -> None:
    """The late one waits for an outcome that releases its refund; the outcome must not be written without seeing it."""
    scene: Scene = request.getfixturevalue(f"on_{kind}")
    ids = scene.put(20, expired=True)
    scene.frozen.shut(BEFORE_COMMIT)
    late = scene.frozen.send([success(payment_id, 1, late=True) for payment_id in ids])
    scene.frozen.wait_held(BEFORE_COMMIT)
    before = scene.other.failed_commits()
    in_time = scene.other.send([success(payment_id, 2) for payment_id in ids])
    try:
        if kind == "postgresql":
            wait_for(lambda: in_time.is_answered() or someone_waits(scene.url), "a lock that is waited for")
        else:
            wait_for(lambda: scene.other.failed_commits() != before, "the database found busy")
    finally:
        scene.frozen.open(BEFORE_COMMIT)
    assert late.answers() == [Answer("LATE", False)] * len(ids)
    assert in_time.answers() == [Answer("ACCEPTED", False)] * len(ids)
    scene.check(ids)
