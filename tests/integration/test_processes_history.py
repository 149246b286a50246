"""A random history over three servers, one of which is killed in the middle, and then everything told once more."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from paycore.bench.payments import Cycle, Lot, trade_no
from tests.support.books import check_books, put_lot, rows
from tests.support.clock import ShiftedClock
from tests.support.databases import KINDS, make_database
from tests.support.processes import Answer, Peer, Word, failure, peers, success
from tests.support.simbank import wait_for

PAYMENTS = 2_000
BATCH = 40
CALLERS = 6
JUDGED = {"ACCEPTED", "DUPLICATE", "LATE"}

Capture = tuple[int, int, str]


def words_of(ids: Sequence[int], chance: random.Random) -> list[Word]:
    """What channels say of these payments: both successes or one, in time or late, failures, a second serial, again."""
    words = []
    for payment_id in ids:
        first, second = success(payment_id, 1), success(payment_id, 2, late=chance.random() < 0.5)
        said = [first] if chance.random() < 0.2 else [first, second]
        if chance.random() < 0.2:
            said.append(failure(payment_id, chance.choice((1, 2))))
        if chance.random() < 0.2:
            said.append(success(payment_id, 1, trade=f"9{trade_no(payment_id, 1)}"))
        if chance.random() < 0.1:
            said.append(first._replace(amount_minor=first.amount_minor - 1))
        words += said + chance.sample(said, chance.randint(0, len(said)))
    # Words that belong together come within a few batches of each other.
    order = sorted(range(len(words)), key=lambda place: place + chance.uniform(0, 4 * BATCH))
    return [words[place] for place in order]


def is_of_right_amount(word: Word) -> bool:
    """Whether this word tells of the amount that its payment is over."""
    return word.amount_minor == success(word.payment_id, word.attempt).amount_minor


class History:
    """What was told to whom, and every answer."""

    def __init__(self, servers: Sequence[Peer], chance: random.Random) -> None:
        self._servers = servers
        self._chance = chance
        self.heard: dict[Word, list[Answer]] = defaultdict(list)
        self.cut_off: set[Word] = set()

    def tell(self, words: Sequence[Word]) -> None:
        """Tell from several callers at once, each batch to any server. Each calls again until it is answered."""
        batches = [words[start : start + BATCH] for start in range(0, len(words), BATCH)]
        with ThreadPoolExecutor(CALLERS) as pool:
            for told, answers in zip(batches, pool.map(self._tell_until_answered, batches), strict=True):
                for word, answer in zip(told, answers, strict=True):
                    self.heard[word].append(answer)

    def _tell_until_answered(self, batch: Sequence[Word]) -> list[Answer]:
        return wait_for(lambda: self._try(batch), "an answer", 120)

    def _try(self, batch: Sequence[Word]) -> list[Answer] | None:
        sent = self._chance.choice(self._servers).send(batch)
        if sent.code() != "UNAVAILABLE":
            return sent.answers()
        self.cut_off.update(batch)
        return None

    def judged(self) -> dict[Capture, str]:
        """What each judged capture was found to be. Fails where that was ever told in two ways, or twice as new."""
        found: dict[Capture, str] = {}
        for word, answers in self.heard.items():
            verdicts = {answer.outcome for answer in answers} & JUDGED
            assert len(verdicts) <= 1, (word, answers)
            fresh = [answer for answer in answers if answer.outcome in JUDGED and not answer.replayed]
            assert len(fresh) == len(verdicts) or (len(fresh) < len(verdicts) and word in self.cut_off), (word, answers)
            for outcome in verdicts:
                assert word.capture not in found
                found[word.capture] = outcome
        return found


def captures(url: str) -> dict[Capture, str]:
    """Every judged capture on record."""
    names = {2: "DUPLICATE", 3: "LATE"}
    kept = rows(url, "SELECT payment_id, attempt, channel_trade_no FROM payment_outcome WHERE state = 2")
    excess = rows(url, "SELECT payment_id, attempt, channel_trade_no, reason FROM excess_payment")
    return dict.fromkeys(kept, "ACCEPTED") | {(row[0], row[1], row[2]): names[row[3]] for row in excess}


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_database(request.param, tmp_path)


@pytest.mark.parametrize("seed", [1])
def test_random_history_over_three_servers_one_of_them_killed_keeps_the_money_rules(
    url: str, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    lot = Lot(ShiftedClock().now_ms() - 600_000, PAYMENTS, 1, cycle=Cycle(length=4, twice=4, expired=2))
    words = words_of(put_lot(url, lot), chance)
    with peers(url, tmp_path, 3) as servers:
        history = History(servers, chance)
        with ThreadPoolExecutor(1) as background:
            telling = background.submit(history.tell, words)
            wait_for(lambda: len(captures(url)) > PAYMENTS // 10, "the history's beginning")
            servers[1].process.kill()
            servers[1].process.wait()
            died_with = captures(url)
            assert not telling.done()
            servers[1].restart()
            telling.result()
        assert history.cut_off, "the server was killed while it was asked"
        check_books(url)
        before, judged = captures(url), history.judged()
        assert died_with.items() <= before.items()
        assert before == judged
        assert set(judged.values()) == JUDGED
        # Once more, to anybody.
        every = sorted(set(words), key=lambda word: chance.random())
        again = History(servers, chance)
        again.tell(every)
        for word in every:
            (answer,) = again.heard[word]
            if word.capture in judged and is_of_right_amount(word):
                assert answer == Answer(judged[word.capture], True), word
        assert captures(url) == before
        check_books(url)
        assert not any("sweep_found" in server.log() for server in servers)
