# The documentation of the compiled module stands here, where editors find it.
# ruff: noqa: PYI021
"""The compiled index of payments and the compiled decision.

Every integer must fit an int64 (OverflowError otherwise). Codes are 0 to 255, where 0 stands for unknown; attempts
are 1 to 63. ``domain/plain_index.py`` is the same in plain Python.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple, Protocol, final

from typing_extensions import Buffer

MISS: Final[int]
"""0: the index cannot say; ask the database."""

class _Facts(Protocol):
    """What `decide` reads of paycore.domain.decision.Facts."""

    @property
    def known(self) -> bool: ...
    @property
    def account_matches(self) -> bool: ...
    @property
    def recorded(self) -> int: ...
    @property
    def recorded_outcome(self) -> int: ...
    @property
    def terms_match(self) -> bool: ...
    @property
    def state(self) -> int: ...
    @property
    def other_live(self) -> bool: ...
    @property
    def created_at_ms(self) -> int: ...
    @property
    def expire_at_ms(self) -> int: ...

class _Moment(Protocol):
    """What `decide` reads of paycore.domain.decision.Moment."""

    @property
    def paid_at_ms(self) -> int: ...
    @property
    def received_at_ms(self) -> int: ...
    @property
    def late_grace_ms(self) -> int: ...

def decide(facts: _Facts, moment: _Moment) -> int:
    """Judge one success: ``paycore.domain.decision.decide``, compiled. Outcome in the low 8 bits, flags above.

    Raises OverflowError where a number does not fit: times are int64, ``recorded`` and ``state`` uint8,
    ``recorded_outcome`` uint32.
    """

class IndexEntry(NamedTuple):
    """What the index holds about one payment, for tests and diagnosis.

    ``captured_mask`` has bit (attempt - 1) set for an attempt with a judged capture. ``accounts`` holds the codes of
    the first three attempts at most. ``asks``: amount, currency or expiry did not fit, all three read 0,
    and every check is a MISS.
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

@final
class Index:
    """payment_id -> what is cached of it, 32 bytes an entry; 40 to 46 bytes of memory a payment.

    A cache of what is committed: a payment may be absent at any time, and only ACCEPTED is tried without asking the
    database, whose key then arbitrates. Nothing negative is remembered.

    One thread changes the index, and runs its groups: the process's one writer thread sees to that.
    Reading from other threads is safe under the GIL. check_many releases the GIL; until it returns, every
    change from another thread is refused with RuntimeError, and nothing has changed.

    Between ``begin`` and ``commit`` changes are visible at once and undone by ``rollback``; outside a group
    they are final. A change that needs memory which is not there raises MemoryError and changes nothing.
    """

    def __init__(self, *, late_grace_ms: int = 0, capacity: int = 0, max_bytes: int = 0, segments: int = 1024) -> None:
        """Make an empty index.

        ``capacity``: payments to make room for at once. With several segments that is by chance, with a margin.
        ``max_bytes``: what the table is held to, 0 for no limit. At the limit the oldest finished payments are
        evicted, then the oldest open ones, an eighth of a segment at a time; what the running group has changed
        stays, and where all else is gone the table grows over the limit. A segment has at least 8 slots of 32
        bytes, and the segments' directory takes 32 bytes each: the least limit that can be kept. The undo log of a
        running group comes on top, 40 bytes a change.
        ``segments``: into how many parts the table is divided, a power of two, 1 to 4096. A change costs at most
        the rebuild of one part.

        Raises ValueError when one is out of range, MemoryError when there is no room.
        """

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
        """Take in what the database says about a payment, in place of what was cached.

        ``state``: PaymentState. ``kept_attempt``: the attempt that a PAID payment keeps, whose mask bit is set
        too; 0 otherwise. ``attempts``: how many there are, 0 to 63. ``captured_mask``: bit (attempt - 1) for each
        attempt with a judged capture. ``accounts``: the codes of attempts 1, 2, ...; those past the
        third are not kept, and a missing one is unknown.

        An amount outside 1 to 2**48 - 1, an expiry before the payment or 2**32 ms or more after it, and
        currency code 0 do not fit: then every check of this payment is a MISS. Raises ValueError that
        names the field for anything else out of range.
        """

    def load(
        self,
        payments: Iterable[tuple[int, int, str | int, int, int | None, int | None]],
        attempts: Iterable[tuple[int, int, str, str]],
        captures: Iterable[tuple[int, int]],
        *,
        currencies: dict[str, int],
        accounts: dict[tuple[str, str], int],
    ) -> None:
        """`put` many payments from rows of the database, without a Python call for each.

        ``payments``: (payment_id, amount_minor, currency or its code, expire_at_ms, state or None where there is no
        outcome, kept attempt or None), each payment once. ``attempts``: (payment_id, attempt, channel, account);
        a payment has as many attempts as its highest. ``captures``: (payment_id, attempt) of each judged
        capture. All are plain tuples, sorted by payment_id; lists are read in place. Attempts and captures of
        payments that are not among ``payments`` are skipped.

        ``currencies``: ISO code -> code here; ``accounts``: (channel, account) -> code. What is missing there is 0.

        Raises ValueError where rows are not sorted or a field is out of range, TypeError for a row that is no tuple,
        IndexError for one that is too short, MemoryError. The payments before the one that failed are then taken
        in; in a group, rollback takes them out again.
        """

    def add_attempt(self, payment_id: int, attempt: int, account_code: int) -> None:
        """Count a new attempt. Does nothing when the payment is absent.

        An attempt that is not the next one, or above 63, drops the entry: what is cached is out of date.
        Raises ValueError for a code outside 0 to 255.
        """

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
        """Guess the verdict of a success; changes nothing.

        Returns one of:

        - ``MISS``: absent, no such attempt in the cache (yet), its account code is not kept (attempts 4 and
          up), or the entry asks. Load the payment from the database.
        - ``VerdictFlag.ASK`` alone: the attempt has a judged capture; compare with the database's row.
        - ACCEPTED, perhaps with PAID_AT_UNTRUSTED: try the insert of the outcome.
        - ACCEPTED (so, too) with ASK: another attempt has a judged capture, whose refund the outcome may release.
        - CONFLICT, MISMATCH, DUPLICATE or LATE with ASK: a guess to be confirmed. LATE carries CLOSES
          only where the payment has one attempt.

        ``paid_at_ms`` is ``ABSENT_MS`` where the channel gave none. Never raises for an int64.
        """

    def accept(self, payment_id: int, attempt: int) -> None:
        """Mark the payment PAID by ``attempt`` and set the attempt's bit.

        A payment that is CLOSED or PAID by another attempt contradicts that: its entry is dropped, so that the
        database is asked. Raises KeyError when the payment is absent, ValueError unless the attempt is 1 to 63.
        """

    def close(self, payment_id: int) -> None:
        """Mark the payment CLOSED. Does nothing when it is absent; drops the entry when it is PAID."""

    def set_captured(self, payment_id: int, attempt: int) -> None:
        """Note that an attempt has a judged capture. Does nothing when the payment is absent.

        Raises ValueError unless the attempt is 1 to 63.
        """

    def discard(self, payment_id: int) -> None:
        """Forget a payment. Does nothing when it is absent."""

    def begin(self) -> None:
        """Start a group. Raises RuntimeError when one is running."""

    def commit(self) -> None:
        """Make the group's changes final. Raises RuntimeError when no group is running."""

    def rollback(self) -> None:
        """Put every payment back as it was at ``begin``. Needs no memory.

        Raises RuntimeError when no group is running, or while check_many runs in another thread; the
        group then goes on.
        """

    def get(self, payment_id: int) -> IndexEntry | None:
        """Return what is cached about a payment, None when it is absent."""

    def check_many(
        self,
        payment_ids: Buffer,
        attempts: Buffer,
        accounts: Buffer,
        amounts: Buffer,
        currencies: Buffer,
        paid_at: Buffer,
        received_at: Buffer,
        verdicts: Buffer,
    ) -> None:
        """``check`` for each row of the columns, without the GIL; the results go into ``verdicts``.

        Contiguous buffers of one length, such as ``array.array``: payment_ids, amounts, paid_at and received_at of
        int64 ("q"), attempts, accounts and currencies of uint8 ("B"), verdicts of uint32 ("I") and writable.
        Raises ValueError when a length or an item type differs, BufferError when verdicts is read-only.
        """

    def __len__(self) -> int:
        """How many payments are cached."""

    def __contains__(self, payment_id: int) -> bool:
        """Whether a payment is cached."""

    @property
    def nbytes(self) -> int:
        """All memory held, in bytes: this object, the table, the undo log."""

    @property
    def max_bytes(self) -> int:
        """What the table is held to; 0: no limit."""

    @property
    def evicted(self) -> int:
        """How many payments were evicted at the memory limit since the index was made."""

    @property
    def evicted_open(self) -> int:
        """How many of these were open: a sign that the limit is too low."""

    @property
    def capacity(self) -> int:
        """How many payments there is room for before the table grows, if each segment gets as many as it can take."""

    @property
    def _occupied(self) -> int:
        """Slots that lengthen a probe: payments and the traces of removed ones. For tests."""

    def _slot_keys(self) -> list[int]:
        """Return the key of each slot in order: a payment id, 0 when empty, 2**63 after a removal. For tests."""

    def _segment_sizes(self) -> list[tuple[int, int, int]]:
        """Return (slots, live, occupied) of each segment. For tests."""

def _fail_allocation_after(count: int) -> None:
    """For tests only: let ``count`` more allocations of this module succeed, then fail every one.

    A negative count ends that. The setting is the process's, not one index's.
    """

def _blocks_held() -> int:
    """How many blocks of memory all indexes of this process hold. For tests."""
