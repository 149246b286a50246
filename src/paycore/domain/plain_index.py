"""The plain twin of ``_dedupe.Index``: a dict of tuples that answers the same, to be read and tested against.

Slow and simple on purpose: a group is undone by keeping the dict as it was. It knows nothing of the compiled one.
"""

from collections.abc import Iterator, Mapping, MutableSequence, Sequence
from typing import Generic, NamedTuple, TypeVar

from paycore.domain.decision import Facts, Moment, decide
from paycore.domain.ids import MAX_ATTEMPTS, MAX_INT64, created_at_ms
from paycore.domain.verdicts import NotifyOutcome, PaymentState, Recorded, VerdictFlag

MISS = 0
MAX_CODE = 255
MAX_SEGMENTS = 4_096
CACHED_ACCOUNTS = 3
AMOUNT_LIMIT = 1 << 48
EXPIRY_LIMIT_MS = 1 << 32


class IndexEntry(NamedTuple):
    """What the index holds about one payment. Where ``asks`` is true, amount, currency and expiry read 0.

    ``captured_mask``: bit (attempt - 1). ``accounts``: the codes of the first three attempts at most.
    """

    payment_id: int
    amount_minor: int
    currency_code: int
    expire_at_ms: int
    state: int
    kept_attempt: int
    attempts: int
    captured_mask: int
    accounts: tuple[int, ...]
    asks: bool


PaymentTuple = tuple[int, int, str | int, int, int | None, int | None]
AttemptTuple = tuple[int, int, str, str]
CaptureTuple = tuple[int, int]


class PlainIndex:
    """payment_id -> what is cached of it; every method as ``_dedupe.Index`` documents it.

    ``max_bytes`` and ``segments`` are taken and change nothing: this one never evicts, and presence is a guess anyway.
    """

    evicted = 0
    evicted_open = 0

    def __init__(self, *, late_grace_ms: int = 0, capacity: int = 0, max_bytes: int = 0, segments: int = 1_024) -> None:
        _require("late_grace_ms", late_grace_ms, 0, MAX_INT64)
        _require("capacity", capacity, 0, MAX_INT64)
        _require("max_bytes", max_bytes, 0, MAX_INT64)
        _require("segments", segments, 1, MAX_SEGMENTS)
        if segments & (segments - 1):
            raise ValueError(f"segments must be a power of two, not {segments}")
        self.max_bytes = max_bytes
        self._late_grace_ms = late_grace_ms
        self._capacity = capacity
        self._entries: dict[int, IndexEntry] = {}
        self._before_group: dict[int, IndexEntry] | None = None

    def put(
        self,
        payment_id: int,
        amount_minor: int,
        currency_code: int,
        expire_at_ms: int,
        state: int,
        kept_attempt: int,
        attempts: int,
        captured_mask: int,
        accounts: tuple[int, ...],
    ) -> None:
        """Take in what the database says, in place of what was cached."""
        _require("payment_id", payment_id, 1, MAX_INT64)
        _require("currency_code", currency_code, 0, MAX_CODE)
        _require("state", state, PaymentState.OPEN, PaymentState.CLOSED)
        _require("attempts", attempts, 0, MAX_ATTEMPTS)
        _require("captured_mask", captured_mask, 0, MAX_INT64)
        _require("len(accounts)", len(accounts), 0, attempts)
        if state == PaymentState.PAID:
            _require("kept_attempt of a paid payment", kept_attempt, 1, MAX_ATTEMPTS)
            captured_mask |= _bit(kept_attempt)
        else:
            _require("kept_attempt of a payment that is not paid", kept_attempt, 0, 0)
        for code in accounts:
            _require("account code", code, 0, MAX_CODE)
        expiry_ms = expire_at_ms - created_at_ms(payment_id)
        fits = 0 < amount_minor < AMOUNT_LIMIT and currency_code != 0 and 0 <= expiry_ms < EXPIRY_LIMIT_MS
        self._entries[payment_id] = IndexEntry(
            payment_id=payment_id,
            amount_minor=amount_minor if fits else 0,
            currency_code=currency_code if fits else 0,
            expire_at_ms=expire_at_ms if fits else 0,
            state=state,
            kept_attempt=kept_attempt,
            attempts=attempts,
            captured_mask=captured_mask,
            accounts=_first_accounts(accounts, attempts),
            asks=not fits,
        )

    def load(
        self,
        payments: Sequence[PaymentTuple],
        attempts: Sequence[AttemptTuple],
        captures: Sequence[CaptureTuple],
        *,
        currencies: Mapping[str, int],
        accounts: Mapping[tuple[str, str], int],
    ) -> None:
        """`put` each payment with its attempts and captures, from rows sorted by payment_id."""
        attempts_left, captures_left = _Merge(attempts), _Merge(captures)
        last_id = 0
        for payment_id, amount_minor, currency, expire_at_ms, state, kept_attempt in payments:
            if payment_id <= last_id:
                _require("payment_id", payment_id, 1, MAX_INT64)
                raise ValueError(f"the payments must be sorted by payment_id, but {payment_id} comes after {last_id}")
            last_id = payment_id
            codes: dict[int, int] = {}
            for _, attempt, channel, account in attempts_left.of(payment_id):
                _require("attempt", attempt, 1, MAX_ATTEMPTS)
                codes[attempt] = accounts.get((channel, account), 0)
            mask = 0
            for _, attempt in captures_left.of(payment_id):
                _require("attempt", attempt, 1, MAX_ATTEMPTS)
                mask |= _bit(attempt)
            count = max(codes, default=0)
            self.put(
                payment_id,
                amount_minor,
                currencies.get(currency, 0) if isinstance(currency, str) else currency,
                expire_at_ms,
                PaymentState.OPEN if state is None else state,
                kept_attempt or 0,
                count,
                mask,
                tuple(codes.get(attempt, 0) for attempt in range(1, count + 1)),
            )

    def add_attempt(self, payment_id: int, attempt: int, account_code: int) -> None:
        """Count a new attempt; drop the entry when it is not the next one."""
        _require("account_code", account_code, 0, MAX_CODE)
        entry = self._entries.get(payment_id)
        if entry is None:
            return
        if attempt != entry.attempts + 1 or attempt > MAX_ATTEMPTS:
            self.discard(payment_id)
            return
        accounts = _first_accounts((*entry.accounts, account_code), attempt)
        self._entries[payment_id] = entry._replace(attempts=attempt, accounts=accounts)

    def check(
        self,
        payment_id: int,
        attempt: int,
        account_code: int,
        amount_minor: int,
        currency_code: int,
        paid_at_ms: int,
        received_at_ms: int,
    ) -> int:
        """Guess the verdict of a success; changes nothing."""
        entry = self._entries.get(payment_id)
        if entry is None or entry.asks or not 1 <= attempt <= min(entry.attempts, CACHED_ACCOUNTS):
            return MISS
        if entry.accounts[attempt - 1] == 0:
            return MISS
        if entry.captured_mask & _bit(attempt):
            return VerdictFlag.ASK
        facts = Facts(
            known=True,
            account_matches=entry.accounts[attempt - 1] == account_code,
            recorded=Recorded.NONE,
            recorded_outcome=0,
            terms_match=(entry.amount_minor, entry.currency_code) == (amount_minor, currency_code),
            state=entry.state,
            other_live=entry.attempts > 1,
            created_at_ms=created_at_ms(payment_id),
            expire_at_ms=entry.expire_at_ms,
        )
        verdict = decide(facts, Moment(paid_at_ms, received_at_ms, self._late_grace_ms))
        # A capture of another attempt may wait for this outcome to be refunded: only the rows tell.
        alone = verdict & 0xFF == NotifyOutcome.ACCEPTED and entry.captured_mask == 0
        return verdict if alone else verdict | VerdictFlag.ASK

    def accept(self, payment_id: int, attempt: int) -> None:
        """Mark the payment PAID by ``attempt``; drop the entry when another outcome is cached."""
        _require("attempt", attempt, 1, MAX_ATTEMPTS)
        entry = self._entries[payment_id]
        if entry.state == PaymentState.OPEN:
            mask = entry.captured_mask | _bit(attempt)
            self._entries[payment_id] = entry._replace(
                state=PaymentState.PAID, kept_attempt=attempt, captured_mask=mask
            )
        elif entry.kept_attempt != attempt:
            self.discard(payment_id)

    def close(self, payment_id: int) -> None:
        """Mark the payment CLOSED; drop the entry when it is PAID."""
        entry = self._entries.get(payment_id)
        if entry is None:
            return
        if entry.state == PaymentState.PAID:
            self.discard(payment_id)
            return
        self._entries[payment_id] = entry._replace(state=PaymentState.CLOSED)

    def set_captured(self, payment_id: int, attempt: int) -> None:
        """Note that an attempt has a judged capture."""
        _require("attempt", attempt, 1, MAX_ATTEMPTS)
        entry = self._entries.get(payment_id)
        if entry is not None:
            self._entries[payment_id] = entry._replace(captured_mask=entry.captured_mask | _bit(attempt))

    def discard(self, payment_id: int) -> None:
        """Forget a payment."""
        self._entries.pop(payment_id, None)

    def begin(self) -> None:
        """Start a group."""
        if self._before_group is not None:
            raise RuntimeError("a group is running already")
        self._before_group = dict(self._entries)

    def commit(self) -> None:
        """Make the group's changes final."""
        if self._before_group is None:
            raise RuntimeError("no group is running")
        self._before_group = None

    def rollback(self) -> None:
        """Put every payment back as it was at ``begin``."""
        if self._before_group is None:
            raise RuntimeError("no group is running")
        self._entries, self._before_group = self._before_group, None

    def get(self, payment_id: int) -> IndexEntry | None:
        """Return what is cached about a payment, None when it is absent."""
        return self._entries.get(payment_id)

    def check_many(
        self,
        payment_ids: Sequence[int],
        attempts: Sequence[int],
        accounts: Sequence[int],
        amounts: Sequence[int],
        currencies: Sequence[int],
        paid_at: Sequence[int],
        received_at: Sequence[int],
        verdicts: MutableSequence[int],
    ) -> None:
        """``check`` for each row of the columns; the results go into ``verdicts``."""
        columns = (payment_ids, attempts, accounts, amounts, currencies, paid_at, received_at)
        if {len(column) for column in columns} != {len(verdicts)}:
            raise ValueError("the buffers must have one length")
        for row, capture in enumerate(zip(*columns, strict=True)):
            verdicts[row] = self.check(*capture)

    def __len__(self) -> int:
        """How many payments are cached."""
        return len(self._entries)

    def __contains__(self, payment_id: int) -> bool:
        """Whether a payment is cached."""
        return payment_id in self._entries

    @property
    def nbytes(self) -> int:
        """The memory of the dict and its tuples, in bytes; that of their integers is not counted."""
        return self._entries.__sizeof__() + sum(entry.__sizeof__() for entry in self._entries.values())

    @property
    def capacity(self) -> int:
        """What was asked for, or what is held: a dict tells no limit."""
        return max(self._capacity, len(self._entries))


_Row = TypeVar("_Row", AttemptTuple, CaptureTuple)


class _Merge(Generic[_Row]):
    """Rows sorted by payment_id, handed out payment by payment; those of payments not asked for are skipped."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows: Sequence[_Row] = rows
        self._next = 0
        self._last_id = 0

    def of(self, payment_id: int) -> Iterator[_Row]:
        """The rows of a payment; raises ValueError where they are not sorted."""
        while self._next < len(self._rows):
            row = self._rows[self._next]
            if row[0] < self._last_id:
                raise ValueError(f"the rows must be sorted by payment_id, but {row[0]} comes after {self._last_id}")
            self._last_id = row[0]
            if row[0] > payment_id:
                return
            self._next += 1
            if row[0] == payment_id:
                yield row


def _bit(attempt: int) -> int:
    return 1 << (attempt - 1)


def _first_accounts(accounts: tuple[int, ...], attempts: int) -> tuple[int, ...]:
    """The codes of the attempts that have a place in an entry; 0 where one is not known."""
    places = min(attempts, CACHED_ACCOUNTS)
    return (*accounts, *(0,) * CACHED_ACCOUNTS)[:places]


def _require(field: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{field} must be {low} to {high}, not {value}")
