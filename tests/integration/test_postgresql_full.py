"""PostgreSQL finds no room for one more page while a real server takes words: nothing is acknowledged, then all counts.

Without the right to mount a small disk: the server's processes may make no file larger than the table of outcomes is.
The kernel says EFBIG there where a full disk says ENOSPC; ``test_postgresql_faults.py`` fills a disk where it may.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import grpc
import pytest

from paycore.bench.payments import Lot
from paycore.v1 import payment_service_pb2
from tests.support.books import check_books, counts, put_lot, rows, run
from tests.support.facts import now_ms
from tests.support.postgres import OwnServer, own_server
from tests.support.processes import CALL_SECONDS, Answer, Peer, Word, as_request, success
from tests.support.server import check_health
from tests.support.simbank import wait_for

FILLING = 14_000
"""Outcomes that take more than 16 MiB at six a page; no other table comes near to that."""

WAITING = 1_001
"""Payments without a word: those of a batch, and one."""

FIRST, REPLAY = Answer("ACCEPTED", False), Answer("ACCEPTED", True)


class Scene(NamedTuple):
    """A server over a database whose table of outcomes has no page to spare."""

    own: OwnServer
    url: str
    peer: Peer
    paid: list[int]
    waiting: list[int]

    def table_bytes(self) -> int:
        """How large the table of outcomes is."""
        return int(rows(self.url, "SELECT pg_relation_size('payment_outcome')")[0][0])


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with own_server() as own:
        url = own.fresh_database()
        run(url, "ALTER TABLE payment_outcome SET (fillfactor = 10)")
        filling = Lot(now_ms() - 600_000, FILLING, 1, paid=True)
        paid, waiting = put_lot(url, filling), put_lot(url, Lot(filling.end_ms, WAITING, 2))
        with Peer(url, tmp_path / "peer") as peer:
            yield Scene(own, url, peer, paid, waiting)


def notify(peer: Peer, word: Word) -> str:
    """Tell one word by Notify; return the outcome's name and whether it is a replay, or the gRPC code's name."""
    call = peer.channel.unary_unary(
        "/paycore.v1.PaymentService/Notify",
        payment_service_pb2.NotifyRequest.SerializeToString,
        payment_service_pb2.NotifyResponse.FromString,
    )
    try:
        answer = call(as_request(word), timeout=CALL_SECONDS)
    except grpc.RpcError as error:
        return cast(grpc.Call, error).code().name
    return "REPLAYED" if answer.replayed else "FIRST"


def test_table_without_room_acknowledges_nothing_and_every_word_counts_once_when_there_is_room(scene: Scene) -> None:
    peer, ids = scene.peer, scene.waiting
    batch, alone = [success(payment_id, 1) for payment_id in ids[:-1]], success(ids[-1], 1)
    scene.own.limit_files(scene.table_bytes())
    for _ in range(2):
        assert peer.send(batch).code() == "UNAVAILABLE"
        assert notify(peer, alone) == "UNAVAILABLE"
    assert counts(scene.url, ids[0], ids[-1])["payment_outcome"] == 0
    assert set(peer.failed_commits()) == {"unavailable"}
    # What needs no room is answered meanwhile.
    assert peer.tell(success(scene.paid[0], 1)) == [REPLAY]
    scene.own.limit_files("unlimited")
    wait_for(lambda: check_health(peer.address) == "SERVING", "the health")
    assert peer.tell(*batch) == [FIRST] * len(batch)
    assert notify(peer, alone) == "FIRST"
    assert peer.tell(*batch, alone) == [REPLAY] * len(ids)
    assert counts(scene.url, ids[0], ids[-1])["payment_outcome"] == len(ids)
    check_books(scene.url)
