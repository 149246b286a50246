"""Proves R1 and R2 over the whole database, and against a channel's own books where they can be read.

It writes no facts, so any number of processes may run it at once, and it may be cut off anywhere. What it finds no code
of ours brings about: each break is for a person, or for a sweep that repairs and counts it.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from paycore.channels.books import BookOrder, Books, BooksUnreadableError
from paycore.domain.audit import AuditKind, Pending, PendingKind, Violation
from paycore.domain.clock import Clock
from paycore.domain.ids import MAX_INT64, format_channel_order_no, parse_channel_order_no
from paycore.jobs.book_check import Found, check_order
from paycore.jobs.runner import Pass, Tell, tell_nobody
from paycore.metrics import Metrics
from paycore.store import book_facts, proofs
from paycore.store.book_facts import CapturedAttempt, OurMoney
from paycore.store.proofs import OrderKey, Range, Tally
from paycore.store.protocol import Store, WriteTransaction
from paycore.usecases.quiet_log import QuietLog
from paycore.usecases.writer import UnindexedUnit, Writer

_NAME = "auditor"

EXAMPLES = 1_000
"""Breaks, and things on their way, that a report names; all are counted."""

_NOTHING = OurMoney("", "", {}, [], {})

_log = QuietLog()


class Report(NamedTuple):
    """What an audit showed. violations, pending: the first of them; counts: of all.

    book_orders: how many orders of a channel's books were compared; None where none were read to their end, and then
    books_error says why, if they should have been. Moments are milliseconds since the Unix epoch; None where there is
    nothing of that kind.
    """

    started_at_ms: int
    ended_at_ms: int
    tally: Tally
    violation_counts: Mapping[AuditKind, int]
    violations: Sequence[Violation]
    pending_counts: Mapping[PendingKind, int]
    pending: Sequence[Pending]
    quarantine_open: int
    oldest_quarantine_at_ms: int | None
    book_orders: int | None
    books_error: str

    @property
    def violations_total(self) -> int:
        """How many breaks there are."""
        return sum(self.violation_counts.values())


class _Findings:
    """What was found so far: all counted, the first kept."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self.violation_counts: Counter[AuditKind] = Counter()
        self.violations: list[Violation] = []
        self.pending_counts: Counter[PendingKind] = Counter()
        self.pending: list[Pending] = []

    def add(self, found: Iterable[Found]) -> None:
        for one in found:
            if isinstance(one, Violation):
                self.violation_counts[one.kind] += 1
                if len(self.violations) < self._examples:
                    self.violations.append(one)
            else:
                self.pending_counts[one.kind] += 1
                if len(self.pending) < self._examples:
                    self.pending.append(one)


class Turns:
    """Lets one of all processes over a database audit it in so long. new_token names each turn uniquely."""

    def __init__(self, writer: Writer, every_ms: int, new_token: Callable[[], str]) -> None:
        self._writer = writer
        self._every_ms = every_ms
        self._new_token = new_token

    async def take(self) -> bool:
        """Take the next turn, if it is due and nobody has. Raises StoreUnavailableError or ThrottledError."""
        # A little less than the interval: whoever comes back after one finds the turn due.
        return await self._writer.run(_TakeTurn(self._every_ms * 9 // 10, self._new_token()))


class _TakeTurn(UnindexedUnit):
    """Leases the whole audit for as long as it is to be made by nobody else; that is never given back."""

    def __init__(self, lease_ms: int, token: str) -> None:
        self._lease_ms, self._token = lease_ms, token

    def apply(self, transaction: WriteTransaction) -> bool:
        now_ms = transaction.stamp.recorded_at_ms
        return bool(transaction.claim_slices(_NAME, [0], now_ms, now_ms + self._lease_ms, self._token))


class Auditor:
    """See ``jobs.runner.Job``.

    open_books: opens those of a channel, to compare with. turns: None where each pass audits. range_rows: how much is
    read at once.
    """

    name = _NAME

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        metrics: Metrics,
        open_books: Callable[[], Books] | None = None,
        turns: Turns | None = None,
        examples: int = EXAMPLES,
        range_rows: int = proofs.RANGE_ROWS,
    ) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._open_books = open_books
        self._turns = turns
        self._examples = examples
        self._range_rows = range_rows

    async def run_once(self, tell: Tell = tell_nobody) -> Pass:
        """Audit, and put what was found into metrics and log.

        Raises StoreUnavailableError; the metrics then keep what the last whole audit found.
        """
        if self._turns is not None and not await self._turns.take():
            return Pass()
        report = await self.audit(tell)
        if report.books_error:
            _log.warning("audit_books_unreadable", cause=report.books_error)
        self._metrics.set_audit_violations({kind.value: report.violation_counts.get(kind, 0) for kind in AuditKind})
        for one in report.violations:
            _log.error("audit_violation", kind=one.kind.value, payment_id=one.payment_id, **one.details)
        _log.info("audited", payments=report.tally.payments, violations=report.violations_total)
        return Pass(done=report.tally.payments)

    async def audit(self, tell: Tell = tell_nobody) -> Report:
        """Audit and return what was found. Raises StoreUnavailableError."""
        started_at_ms = self._clock.now_ms()
        findings = _Findings(self._examples)
        tally = await self._prove_payments(findings, tell)
        await self._prove_orders(findings, tally.payments, tell)
        book_orders, books_error = await self._read_books(findings)
        quarantine_open, oldest_at_ms = await asyncio.to_thread(self._store.read, proofs.open_quarantine)
        return Report(
            started_at_ms,
            self._clock.now_ms(),
            tally,
            findings.violation_counts,
            findings.violations,
            findings.pending_counts,
            findings.pending,
            quarantine_open,
            oldest_at_ms,
            book_orders,
            books_error,
        )

    async def _prove_payments(self, findings: _Findings, tell: Tell) -> Tally:
        bounds = await asyncio.to_thread(self._store.read, proofs.id_bounds)
        tally, scope = Tally(), Range(0, 0)
        while scope.last < MAX_INT64:
            scope, proof = await asyncio.to_thread(self._prove_next, scope.last)
            findings.add(proof.violations)
            tally = tally.plus(proof.tally)
            # Twice: merchant orders are looked at afterwards.
            tell(tally.payments, 2 * _expected(tally.payments, scope.last, bounds))
        return tally

    def _prove_next(self, after: int) -> tuple[Range, proofs.Proof]:
        now_ms = self._clock.now_ms()
        return self._store.read(lambda connection: proofs.prove_next(connection, after, now_ms, self._range_rows))

    async def _prove_orders(self, findings: _Findings, payments: int, tell: Tell) -> None:
        looked_at, key = 0, OrderKey()
        while True:
            proof = await asyncio.to_thread(self._prove_orders_after, key)
            findings.add(proof.violations)
            if proof.last is None:
                break
            key, looked_at = proof.last, looked_at + self._range_rows
            tell(payments + min(looked_at, payments), 2 * payments)
        tell(2 * payments, 2 * payments)

    def _prove_orders_after(self, key: OrderKey) -> proofs.OrdersProof:
        return self._store.read(lambda connection: proofs.prove_orders(connection, key, self._range_rows))

    # ---- The channel's books ------------------------------------------------------------------------------------

    async def _read_books(self, findings: _Findings) -> tuple[int | None, str]:
        """Compare with the books. What was found until they could not be read any more is found."""
        if self._open_books is None:
            return None, ""
        books = self._open_books()
        try:
            return await self._compare(books, findings), ""
        except BooksUnreadableError as error:
            return None, str(error)
        finally:
            await books.aclose()

    async def _compare(self, books: Books, findings: _Findings) -> int:
        """Compare every order in the books, and then look for captures of ours in orders that the books lack."""
        compared = 0
        async for page in books.pages():
            findings.add(await self._compare_page(books, page))
            compared += len(page)
        scope = Range(0, 0)
        accounts = set(await books.accounts())
        while scope.last < MAX_INT64:
            scope, captured = await asyncio.to_thread(self._captured_next, scope.last, books.channel)
            findings.add(await self._absent(books, [one for one in captured if one[2] in accounts]))
        return compared

    async def _compare_page(self, books: Books, page: Sequence[BookOrder]) -> list[Found]:
        """Look once, and at what seems wrong once more: the two sides are never read at the same moment.

        The books are read before the database each time. What the books have too much of, the first look proves; what
        the database has too much of was in it before the books are read again. What both looks show is so.
        """
        found = await self._look(books, page)
        suspects = {one.details["channel_order_no"] for one in found if isinstance(one, Violation)}
        if not suspects:
            return found
        again: list[BookOrder] = []
        for account in {order.account for order in page}:
            numbers = [one.channel_order_no for one in page if one.account == account]
            again += await books.orders(account, [number for number in numbers if number in suspects])
        seen_again = await self._look(books, again)
        certain = [one for one in found if one.details["channel_order_no"] not in suspects or one in seen_again]
        # What has come right meanwhile may be on its way still.
        return certain + [one for one in seen_again if isinstance(one, Pending) and one not in certain]

    async def _look(self, books: Books, page: Sequence[BookOrder]) -> list[Found]:
        keys = {order.channel_order_no: parse_channel_order_no(order.channel_order_no) for order in page}
        ids = [key.payment_id for key in keys.values() if key is not None]
        money = await asyncio.to_thread(self._store.read, lambda connection: book_facts.money_of(connection, ids))
        now_ms = self._clock.now_ms()
        found: list[Found] = []
        foreign: list[BookOrder] = []
        for order in page:
            key = keys[order.channel_order_no]
            ours = _NOTHING if key is None else money.get(key, _NOTHING)
            if key is None or (ours.channel, ours.account) != (books.channel, order.account):
                foreign.append(order)
            else:
                found += check_order(key.payment_id, order, ours, now_ms)
        return found + await self._look_at_foreign(books, foreign, now_ms)

    async def _look_at_foreign(self, books: Books, orders: Sequence[BookOrder], now_ms: int) -> list[Found]:
        """Orders that are no attempts of ours: the word about one, if it came, lies in quarantine."""
        if not orders:
            return []
        keys = {order.channel_order_no: parse_channel_order_no(order.channel_order_no) for order in orders}
        numbers = [(number, None if key is None else key.payment_id) for number, key in keys.items()]
        evidence = await asyncio.to_thread(
            self._store.read, lambda connection: book_facts.evidence_about(connection, books.channel, numbers)
        )
        found: list[Found] = []
        for order in orders:
            key = keys[order.channel_order_no]
            ours = _NOTHING._replace(evidence=evidence.get((order.account, order.channel_order_no), {}))
            found += check_order(0 if key is None else key.payment_id, order, ours, now_ms)
        return found

    def _captured_next(self, after: int, channel: str) -> tuple[Range, Sequence[CapturedAttempt]]:
        return self._store.read(
            lambda connection: book_facts.captured_next(connection, after, channel, self._range_rows)
        )

    async def _absent(self, books: Books, captured: Collection[CapturedAttempt]) -> list[Found]:
        """Captures on record of orders that the books do not have at all."""
        found: list[Found] = []
        for account in {account for _, _, account in captured}:
            numbers = {format_channel_order_no(*one[:2]): one[0] for one in captured if one[2] == account}
            known = {order.channel_order_no for order in await books.orders(account, list(numbers))}
            found += (
                Violation(AuditKind.BOOK_CAPTURE_ABSENT, payment_id, {"account": account, "channel_order_no": number})
                for number, payment_id in numbers.items()
                if number not in known
            )
        return found


def _expected(payments: int, last: int, bounds: tuple[int, int] | None) -> int:
    """How many payments there will have been, by how much of the ids' span has been read; ids are made in time."""
    if bounds is None or last >= bounds[1]:
        return payments
    least, greatest = bounds
    covered = max(last - least, 1)
    return payments * max(greatest - least, covered) // covered
