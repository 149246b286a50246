"""Four independent servers over one database: words that belong together reach different ones at the same moment."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest

from paycore.bench.payments import Cycle, Lot
from tests.support.books import check_books, counts, not_settled_once, put_lot
from tests.support.clock import ShiftedClock
from tests.support.databases import KINDS, is_postgresql, make_database
from tests.support.processes import Answer, Peer, Told, Word, failure, peers, success, tell_in_waves

PROCESSES = 4
PAYMENTS = int(os.environ.get("PAYCORE_TEST_PAYMENTS", "20000"))
"""How many payments have their two successes told; the environment can make it fewer while one is working."""

WAVE = 1_000
"""Payments in one wave."""

ONE_OF_TWO = Cycle(length=1, twice=1, expired=0)
"""Each has two open attempts."""

ALL_EXPIRED = Cycle(length=1, twice=1, expired=1)
"""The same, and the validity has passed."""

_BEGAN_MS = ShiftedClock().now_ms() - 600_000

_nodes = itertools.count(1)


class Servers(NamedTuple):
    """Processes over one database. raced, replayed: payments that were there when they started, so that all are warm.

    An index that is warm is stale as soon as another process has decided: what it says of a payment loses its insert.
    """

    url: str
    all: list[Peer]
    raced: list[int]
    replayed: list[int]

    def put(self, size: int, cycle: Cycle = ONE_OF_TWO) -> list[int]:
        """Put payments there, whose ids no other lot's lie among; return the ids."""
        return put(self.url, size, cycle)


def put(url: str, size: int, cycle: Cycle = ONE_OF_TWO) -> list[int]:
    node = next(_nodes)
    return put_lot(url, Lot(_BEGAN_MS + node * 1_000, size, node, cycle=cycle))


@pytest.fixture(scope="module", params=KINDS)
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("processes")
    url = make_database(request.param, folder)
    raced, replayed = put(url, PAYMENTS), put(url, max(PAYMENTS // 4, WAVE))
    with peers(url, folder, PROCESSES) as running:
        yield Servers(url, running, raced, replayed)


def by_payment(told: Told) -> dict[int, list[Answer]]:
    answers: dict[int, list[Answer]] = defaultdict(list)
    for word, answer in told.answers:
        answers[word.payment_id].append(answer)
    return answers


def pairs_in_waves(ids: Sequence[int], seed: int, *, attempts: tuple[int, int]) -> Iterator[list[list[Word]]]:
    """Two words of each payment, to two different processes in the same wave; each batch is shuffled."""
    chance = random.Random(seed)
    for start in range(0, len(ids), WAVE):
        batches: list[list[Word]] = [[] for _ in range(PROCESSES)]
        for payment_id in ids[start : start + WAVE]:
            for process, attempt in zip(chance.sample(range(PROCESSES), 2), attempts, strict=True):
                batches[process].append(success(payment_id, attempt))
        for batch in batches:
            chance.shuffle(batch)
        yield batches


@pytest.mark.slow
def test_two_successes_told_to_two_processes_at_once_keep_one_and_refund_the_other(servers: Servers) -> None:
    ids = servers.raced
    told = tell_in_waves(servers.all, pairs_in_waves(ids, 1, attempts=(1, 2)))
    expected = [Answer("ACCEPTED", False), Answer("DUPLICATE", False)]
    wrong = {payment_id: found for payment_id, found in by_payment(told).items() if sorted(found) != expected}
    assert wrong == {}
    assert len(by_payment(told)) == PAYMENTS
    assert counts(servers.url, ids[0], ids[-1]) == {
        "payment_outcome": PAYMENTS,
        "excess_payment": PAYMENTS,
        "refund": PAYMENTS,
        "refund_try": PAYMENTS,
        "quarantine": 0,
    }
    assert not_settled_once(servers.url, ids[0], ids[-1]) == []
    check_books(servers.url)
    assert_nobody_was_refused(servers, told)
    # Each attempt wins some races: otherwise the words were not told at the same moment.
    winners = Counter(word.attempt for word, answer in told.answers if answer.outcome == "ACCEPTED")
    assert min(winners[1], winners[2]) > PAYMENTS // 20


@pytest.mark.slow
def test_one_success_told_to_two_processes_at_once_is_accepted_once_and_replayed_once(servers: Servers) -> None:
    ids, size = servers.replayed, len(servers.replayed)
    told = tell_in_waves(servers.all, pairs_in_waves(ids, 2, attempts=(1, 1)))
    expected = [Answer("ACCEPTED", False), Answer("ACCEPTED", True)]
    wrong = {payment_id: found for payment_id, found in by_payment(told).items() if sorted(found) != expected}
    assert wrong == {}
    assert counts(servers.url, ids[0], ids[-1]) == {
        "payment_outcome": size,
        "excess_payment": 0,
        "refund": 0,
        "refund_try": 0,
        "quarantine": 0,
    }
    assert_nobody_was_refused(servers, told)


def crossing_waves(ids: Sequence[int], expired: Sequence[int]) -> Iterator[list[list[Word]]]:
    """Each process holds keys that its neighbour needs, and needs some that its neighbour holds.

    Of each payment whose validity has passed, one process is told a success in time, which takes the outcome's key at
    once, and its neighbour a late one, which locks the payment's row and then wants that key; round the circle. Second
    successes and failures of other payments lock rows too. Every second process is told all this backwards.
    """
    size = 100
    for start in range(0, len(ids), size):
        batches: list[list[Word]] = [[] for _ in range(PROCESSES)]
        for place, (plain, passed) in enumerate(
            zip(ids[start : start + size], expired[start : start + size], strict=True)
        ):
            here, there = place % PROCESSES, (place + 1) % PROCESSES
            batches[here] += [success(passed, 1), success(plain, 1), failure(plain, 2)]
            batches[there] += [success(passed, 2, late=True), success(plain, 2), failure(plain, 1)]
        yield [batch[::-1] if process % 2 else batch for process, batch in enumerate(batches)]


def test_groups_that_overlap_in_crossing_order_are_all_answered_and_no_deadlock_reaches_a_caller(
    servers: Servers,
) -> None:
    size, before = 800, busy_commits(servers)
    ids, expired = servers.put(size), servers.put(size, ALL_EXPIRED)
    told = tell_in_waves(servers.all, crossing_waves(ids, expired))
    answers = by_payment(told)
    for payment_id in ids:
        successes = sorted(answer for answer in answers[payment_id] if answer.outcome != "RECORDED")
        assert successes == [Answer("ACCEPTED", False), Answer("DUPLICATE", False)]
        assert len(answers[payment_id]) == 4
    ends = Counter(tuple(sorted(answers[payment_id])) for payment_id in expired)
    first, second, late = Answer("ACCEPTED", False), Answer("DUPLICATE", False), Answer("LATE", False)
    assert ends.keys() <= {(first, second), (first, late)}
    for group in (ids, expired):
        assert not_settled_once(servers.url, group[0], group[-1]) == []
        assert counts(servers.url, group[0], group[-1])["payment_outcome"] == size
    check_books(servers.url)
    assert_nobody_was_refused(servers, told)
    # Groups were decided again because of each other: otherwise they did not cross.
    assert busy_commits(servers) > before or not is_postgresql(servers.url)


def busy_commits(servers: Servers) -> int:
    """How many groups were decided again so far, for another process's sake."""
    return sum(peer.failed_commits().get("busy", 0) for peer in servers.all)


def assert_nobody_was_refused(servers: Servers, told: Told) -> None:
    """On SQLite, where writes are serial, a machine that is busy may keep a process from its turn for too long."""
    assert told.refused == 0 or not is_postgresql(servers.url)
    for peer in servers.all:
        assert "sweep_found" not in peer.log()
        # What is decided again met another process: no row and no group is ever refused for itself.
        assert peer.failed_commits().keys() <= {"busy"}


def test_no_word_left_the_books_wrong(servers: Servers) -> None:
    check_books(servers.url)
