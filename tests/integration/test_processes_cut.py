"""A server's connection to PostgreSQL is cut at every step, while another server decides the same payments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from paycore.bench.payments import Cycle, Lot
from tests.support.books import check_books, counts, not_settled_once, put_lot
from tests.support.clock import ShiftedClock
from tests.support.cutting import CuttingLink, When
from tests.support.databases import make_database
from tests.support.processes import Answer, Peer, Word, failure, success

TAKEN, BEGUN, BEFORE_COMMIT = "writer.taken", "store.begun", "store.before_commit"

STEPS: list[tuple[bytes, When, str, str]] = [
    (b"BEGIN", "instead", TAKEN, "busy"),
    (b"BEGIN", "answered", TAKEN, "busy"),
    (b"INSERT INTO payment_outcome", "instead", BEGUN, "busy"),
    (b"INSERT INTO payment_outcome", "answered", BEGUN, "busy"),
    (b"FOR NO KEY UPDATE", "answered", BEGUN, "busy"),
    (b"INSERT INTO excess_payment", "answered", BEGUN, "busy"),
    (b"INSERT INTO refund", "answered", BEGUN, "busy"),
    (b"COMMIT", "instead", BEFORE_COMMIT, "commit_unknown"),
    (b"COMMIT", "sent", BEFORE_COMMIT, "commit_unknown"),
    (b"COMMIT", "answered", BEFORE_COMMIT, "commit_unknown"),
]
"""What is cut at, when, the gate before it, and what the server takes it for."""

_nodes = itertools.count(1)


class Scene(NamedTuple):
    """Two servers over one database, the first of which reaches it by a link that can be cut."""

    url: str
    link: CuttingLink
    behind_link: Peer
    direct: Peer

    def put(self, size: int) -> list[int]:
        """Put payments with two open attempts there; return their ids."""
        node = next(_nodes)
        first_ms = ShiftedClock().now_ms() - 600_000 + node * 1_000
        return put_lot(self.url, Lot(first_ms, size, node, cycle=Cycle(length=1, twice=1, expired=0)))


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("cut")
    url = make_database("postgresql", folder)
    with (
        CuttingLink(url) as link,
        Peer(link.url, folder / "behind-link", gates=(TAKEN, BEGUN, BEFORE_COMMIT)) as behind_link,
        Peer(url, folder / "direct") as direct,
    ):
        yield Scene(url, link, behind_link, direct)


def cut_once(
    scene: Scene, word: bytes, when: When, gate: str, cause: str
) -> tuple[list[int], list[Word], list[Answer], list[Answer], bool]:
    """Tell the server behind the link a message whose group is cut; return it all, and whether the cut met it."""
    ids = scene.put(40)
    alone, raced, paid, failed = ids[:10], ids[10:20], ids[20:30], ids[30:]
    assert scene.direct.tell(*(success(payment_id, 1) for payment_id in paid)) == [Answer("ACCEPTED", False)] * 10
    words = [success(payment_id, 1) for payment_id in alone + raced] + [success(payment_id, 2) for payment_id in paid]
    words += [failure(payment_id, 1) for payment_id in failed]
    # On a new connection every statement goes out by its text.
    scene.link.cut_all()
    scene.behind_link.shut(gate)
    sent = scene.behind_link.send(words)
    scene.behind_link.wait_held(gate)
    before, failed_before = scene.link.cuts, scene.behind_link.failed_commits()
    scene.link.arm(word, when)
    scene.behind_link.open(gate)
    told = scene.direct.tell(*(success(payment_id, 2) for payment_id in raced))
    answers = sent.answers()
    was_hit = scene.link.cuts == before + 1 and scene.behind_link.failed_commits()[cause] > failed_before.get(cause, 0)
    return ids, words, answers, told, was_hit


@pytest.mark.parametrize(("word", "when", "gate", "cause"), STEPS, ids=[f"{row[0].decode()}-{row[1]}" for row in STEPS])
def test_connection_cut_at_any_step_acknowledges_nothing_that_is_not_durable_and_counts_nothing_twice(
    scene: Scene, word: bytes, when: When, gate: str, cause: str
) -> None:
    """One message: first successes, second ones of paid payments, failures; the other server is told the rest."""
    for _ in range(5):
        ids, words, answers, told, was_hit = cut_once(scene, word, when, gate, cause)
        if was_hit:
            break
    assert was_hit, "the cut met something else each time, a heartbeat for example"
    alone, failed = ids[:10], ids[30:]
    assert answers[:10] == [Answer("ACCEPTED", False)] * 10
    for here, there in zip(answers[10:20], told, strict=True):
        assert sorted([here, there]) == [Answer("ACCEPTED", False), Answer("DUPLICATE", False)]
    assert answers[20:30] == [Answer("DUPLICATE", False)] * 10
    assert answers[30:] == [Answer("RECORDED", False)] * 10
    second = [success(payment_id, 2) for payment_id in alone]
    both = [success(payment_id, attempt) for payment_id in failed for attempt in (1, 2)]
    scene.direct.tell(*second, *both)
    assert counts(scene.url, ids[0], ids[-1]) == {
        "payment_outcome": 40,
        "excess_payment": 40,
        "refund": 40,
        "refund_try": 40,
        "quarantine": 0,
    }
    assert not_settled_once(scene.url, ids[0], ids[-1]) == []
    check_books(scene.url)
    for peer in (scene.behind_link, scene.direct):
        assert peer.tell(*words) == [answer._replace(replayed=True) for answer in answers]
        assert "sweep_found" not in peer.log()


def die_after_unanswered_commit(scene: Scene) -> list[int]:
    """Have a success of each of some payments committed, lose the answer, and kill the server as it tries again."""
    while True:
        ids = scene.put(20)
        scene.behind_link.shut(BEFORE_COMMIT)
        sent = scene.behind_link.send([success(payment_id, 1) for payment_id in ids])
        scene.behind_link.wait_held(BEFORE_COMMIT)
        scene.behind_link.shut(BEGUN)
        scene.link.arm(b"COMMIT", "answered")
        scene.behind_link.open(BEFORE_COMMIT)
        scene.behind_link.wait_held(BEGUN)
        if counts(scene.url, ids[0], ids[-1])["payment_outcome"]:
            break
        # A heartbeat came by first.
        scene.behind_link.open(BEGUN)
        sent.answers()
    assert not sent.is_answered()
    scene.behind_link.kill()
    scene.behind_link.open(BEGUN)
    assert sent.code() == "UNAVAILABLE"
    return ids


def test_server_that_dies_with_its_commit_unanswered_is_made_up_for_by_another_one(scene: Scene) -> None:
    ids = die_after_unanswered_commit(scene)
    words = [success(payment_id, 1) for payment_id in ids]
    assert scene.direct.tell(*words) == [Answer("ACCEPTED", True)] * len(ids)
    scene.direct.tell(*(success(payment_id, 2) for payment_id in ids))
    assert not_settled_once(scene.url, ids[0], ids[-1]) == []
    check_books(scene.url)
    scene.behind_link.restart()
    assert scene.behind_link.tell(*words) == [Answer("ACCEPTED", True)] * len(ids)
