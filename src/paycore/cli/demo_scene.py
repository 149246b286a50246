"""One story while it is played: what is done in it, and what is seen of it from outside.

What is seen comes from Query, from the server's metrics, from its database file (read-only) and from the banks'
books. A fact is looked at until it is as expected or the deadline has passed; what was seen last is what is reported.
"""

import hashlib
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol

import httpx

from paycore.cli.demo_banks import BankError, Banks, BookEntry, Capture, Page
from paycore.cli.demo_stage import Stage, StageError, wait_until
from paycore.cli.output import amount, outcome_name
from paycore.client import PaycoreRpcError
from paycore.store.tables import WRITTEN_BY_JOBS
from paycore.v1 import payment_pb2

CHANNEL = "simbank"
KEPT = "kept"
"""The fact that closes every story: what the banks' own books say."""

MERCHANT = "demo-shop"

PLAY_ERRORS = (PaycoreRpcError, httpx.HTTPError, sqlite3.Error, BankError, StageError)
"""What ends a story early: somebody did not answer, or answered what nobody can go on from."""

_NOTIFY_TOTAL = re.compile(r'paycore_notify_total\{channel="[^"]*",outcome="([A-Z_]+)",replayed="(true|false)"\} (\d+)')


class Story(NamedTuple):
    """What happens, and what must come of it.

    expected: fact -> what must be seen, in order. keeps: bank -> what it must hold in the end, in minor units, of
    all that the user paid in this story.
    """

    name: str
    happens: str
    amount_minor: int
    currency: str
    expected: Mapping[str, str]
    keeps: Mapping[str, int]
    play: Callable[["Scene"], None]

    def all_expected(self) -> dict[str, str]:
        """Return the expected facts with what the banks must keep."""
        return {**self.expected, KEPT: kept_text(self.keeps, self.currency)}


class Witness(Protocol):
    """Is told of each fact as it is seen."""

    def fact(self, name: str, expected: str, seen: str) -> None:
        """Take note of one fact."""


class StoryBrokenError(Exception):
    """A fact is not as expected; what would follow in the story makes no sense any more."""


class Scene:
    """One story on a stage. ``observed`` grows as facts are seen.

    earlier: by story, the payments of the stories before it, as they were when their story ended.
    """

    def __init__(
        self,
        story: Story,
        stage: Stage,
        banks: Banks,
        witness: Witness,
        deadline_seconds: float,
        earlier: Mapping[str, payment_pb2.Payment],
    ) -> None:
        self.story = story
        self.stage = stage
        self.banks = banks
        self.earlier = earlier
        self.observed: dict[str, str] = {}
        self.pages: list[Page] = []
        self.payment_id = 0
        self._witness = witness
        self._deadline_seconds = deadline_seconds
        self._heard_before = read_words(stage.metrics_url)
        self._order_no = f"order-{story.name.partition(':')[0]}"

    # What is done

    def pay(self, bank: str, validity_ms: int = 600_000) -> Page:
        """Ask paycore for the story's payment, to be paid at a bank; the second time it opens a second page."""
        answer = self.stage.client.pay(
            merchant_id=MERCHANT,
            merchant_order_no=self._order_no,
            amount_minor=self.story.amount_minor,
            currency=self.story.currency,
            subject=self.story.name.partition(": ")[2],
            channel=CHANNEL,
            account=bank,
            method=payment_pb2.PAY_METHOD_REDIRECT,
            validity_ms=validity_ms,
        )
        self.payment_id = answer.payment_id
        return self.add_page(Page(bank, answer.attempt.channel_order_no, answer.attempt.pay_url))

    def add_page(self, page: Page) -> Page:
        """Count an order at a bank among the story's, so that its money is looked after."""
        self.pages.append(page)
        return page

    def close(self) -> None:
        """The merchant closes the payment."""
        self.stage.client.close(payment_id=self.payment_id)

    def notify(self, page: Page, capture: Capture) -> str:
        """Hand the bank's word to paycore from here; return the answer."""
        answer = self.stage.client.notify(
            channel=CHANNEL,
            account=page.bank,
            channel_order_no=page.order_no,
            result=payment_pb2.CHANNEL_RESULT_SUCCESS,
            amount_minor=capture.amount_minor,
            currency=capture.currency,
            channel_trade_no=capture.trade_no,
            paid_at_ms=capture.paid_at_ms,
        )
        return _word(outcome_name(answer.outcome), replayed=answer.replayed)

    def wait_for_expiry(self) -> None:
        """Wait until the payment's validity has passed."""
        expire_at_ms = self.payment().expire_at.ToMilliseconds()
        left_ms = expire_at_ms - time.time_ns() // 1_000_000
        wait_until(lambda: time.time_ns() // 1_000_000 > expire_at_ms, self._deadline_seconds + left_ms / 1000)

    def kill_server(self) -> None:
        """End the server with kill -9. The one that comes after it counts from zero."""
        self.stage.kill_server()
        self._heard_before = Counter()

    # What is seen

    def see(self, name: str, look: Callable[[], str]) -> None:
        """Look until the fact is as the story expects it, or the deadline has passed. Raises StoryBrokenError."""
        expected = self.story.all_expected()[name]
        seen = ""

        def as_expected() -> bool:
            nonlocal seen
            try:
                seen = look()
            except PLAY_ERRORS as error:
                seen = f"no answer ({error})"
            return seen == expected

        wait_until(as_expected, self._deadline_seconds)
        self.observed[name] = seen
        self._witness.fact(name, expected, seen)
        if seen != expected:
            raise StoryBrokenError(name)

    def payment(self) -> payment_pb2.Payment:
        """Everything on record about the story's payment."""
        return self.stage.client.query(payment_id=self.payment_id)

    def words(self) -> str:
        """Say what the notifications since the last ``listen`` turned out to be, by the server's metrics."""
        heard = read_words(self.stage.metrics_url) - self._heard_before
        return ", ".join(word if count == 1 else f"{word} x{count}" for word, count in sorted(heard.items())) or "none"

    def heard(self, word: str) -> str:
        """Say a word where some notification since the last ``listen`` turned out to be it."""
        return word if (read_words(self.stage.metrics_url) - self._heard_before)[word] else "not heard"

    def listen(self) -> None:
        """Count notifications from here on."""
        self._heard_before = read_words(self.stage.metrics_url)

    def state(self) -> str:
        """Say what became of the payment."""
        payment = self.payment()
        if payment.state == payment_pb2.PAYMENT_STATE_PAID:
            return f"PAID at {_account(payment, payment.outcome.attempt)}"
        if payment.state == payment_pb2.PAYMENT_STATE_CLOSED:
            reason = payment_pb2.CloseReason.Name(payment.outcome.close_reason)
            return f"CLOSED ({reason.removeprefix('CLOSE_REASON_')})"
        return "OPEN"

    def judged(self) -> str:
        """Say what the notifications turned out to be, and what became of the payment."""
        return f"{self.words()}, payment {self.state()}"

    def earlier_payments(self) -> str:
        """Say which stories' payments are not as they were when their story ended."""
        return ", ".join(changed_payments(self.stage, self.earlier)) or "unchanged"

    def sent_back(self) -> str:
        """Say what goes back to the user and how far it has come, capture by capture."""
        payment = self.payment()
        refunds = [_refund_text(payment, refund) for refund in payment.refunds]
        owed = len(payment.excess) - len(payment.refunds)
        return "; ".join(refunds + (["a capture without refund"] * owed)) or "nothing"

    def quarantine(self) -> str:
        """Say what lies in quarantine about the payment."""
        reasons = Counter(outcome_name(entry.reason) for entry in self.payment().quarantine if entry.open)
        return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "empty"

    def quarantine_of(self, page: Page) -> str:
        """Say how evidence about an order that is not paycore's lies in quarantine, by the database file."""
        asked = "SELECT count(*), coalesce(sum(arrivals), 0) FROM quarantine WHERE channel_order_no = ? AND is_open = 1"
        with closing(_read_only(self.stage.db_path)) as connection:
            rows, arrivals = connection.execute(asked, (page.order_no,)).fetchone()
        return f"{rows} kept, came {arrivals} times"

    def kept(self) -> str:
        """Say what the banks' own books hold of the story's money."""
        return kept_text(kept_by_bank(self.pages, self.banks.books()), self.story.currency)


class Footprint(NamedTuple):
    """What could have changed: each table's rows, and what Query says."""

    tables: Mapping[str, str]
    payment: payment_pb2.Payment

    def difference(self, later: "Footprint") -> str:
        """Name what changed."""
        names = self.tables.keys() | later.tables.keys()
        changed = [f"table {name}" for name in sorted(names) if self.tables.get(name) != later.tables.get(name)]
        if self.payment != later.payment:
            changed.append("the answer of Query")
        return ", ".join(changed) or "nothing"


def take_footprint(scene: Scene) -> Footprint:
    """Read every table and ask Query."""
    with closing(_read_only(scene.stage.db_path)) as connection:
        connection.execute("BEGIN")
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        tables = {name: _digest(connection, name) for name in names - WRITTEN_BY_JOBS}
    return Footprint(tables, scene.payment())


def _digest(connection: sqlite3.Connection, table: str) -> str:
    # The name comes from the database's own list of tables.
    rows = sorted(map(repr, connection.execute(f'SELECT * FROM "{table}"')))  # noqa: S608
    return f"{len(rows)} rows {hashlib.sha256(chr(10).join(rows).encode()).hexdigest()}"


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None)


def changed_payments(stage: Stage, earlier: Mapping[str, payment_pb2.Payment]) -> list[str]:
    """Name the stories whose payment Query tells otherwise than before."""
    return [name for name, was in earlier.items() if stage.client.query(payment_id=was.payment_id) != was]


def read_words(metrics_url: str) -> Counter[str]:
    """Count what notifications turned out to be since the server started, by its metrics. Raises httpx.HTTPError."""
    text = httpx.get(metrics_url, trust_env=False, timeout=10).raise_for_status().text
    return Counter(
        {
            _word(outcome, replayed=replayed == "true"): int(count)
            for outcome, replayed, count in _NOTIFY_TOTAL.findall(text)
        }
    )


def kept_by_bank(pages: Iterable[Page], books: Iterable[BookEntry]) -> dict[str, int]:
    """Add up what banks keep of these orders."""
    kept = {(one.bank, one.order_no): one.kept_minor for one in books}
    totals: dict[str, int] = {}
    for page in pages:
        totals[page.bank] = totals.get(page.bank, 0) + kept.get((page.bank, page.order_no), 0)
    return totals


def kept_text(kept: Mapping[str, int], currency: str) -> str:
    """Write what banks keep."""
    return ", ".join(f"{amount(kept[bank], currency)} at {bank}" for bank in sorted(kept))


def _word(outcome: str, *, replayed: bool) -> str:
    return f"{outcome} replayed" if replayed else outcome


def _account(payment: payment_pb2.Payment, attempt: int) -> str:
    return next((one.account for one in payment.attempts if one.attempt == attempt), "an unknown attempt")


def _refund_text(payment: payment_pb2.Payment, refund: payment_pb2.Refund) -> str:
    state = payment_pb2.RefundState.Name(refund.state).removeprefix("REFUND_STATE_")
    money = amount(refund.amount_minor, refund.currency)
    return f"{outcome_name(refund.reason)}: {money} {state} at {_account(payment, refund.attempt)}"
