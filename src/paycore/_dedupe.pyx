# cython: language_level=3, wraparound=False, cdivision=True, embedsignature=True, embedsignature.format=python
"""The compiled index of payments, and the compiled decision about a success.

A leaf: it knows integers and nothing of databases, channels or protobuf. The plain twins,
``domain/plain_index.py`` and ``domain/decision.py``, say the same in readable Python; the contract suites run both.

The index is a cache of what is committed. Outcomes and set bits are final, so they hold across processes;
"open", the number of attempts and an unset bit are guesses that the database confirms or refuses.

Error contracts: what is ``noexcept nogil`` cannot fail, or returns False when memory ran out and has then changed
nothing; the methods raise MemoryError in that case, before any change.
"""

cimport cython
from libc.string cimport memset

from paycore._table cimport (
    ACCOUNT_3_SHIFT,
    AMOUNT_BITS,
    ATTEMPTS_SHIFT,
    CURRENCY_SHIFT,
    EXPIRY_BITS,
    KEPT_SHIFT,
    STATE_SHIFT,
    TOP_BIT,
    entry_t,
    probe_find,
    probe_prefetch,
    probe_t,
    table_capacity,
    table_find,
    table_free,
    table_insert,
    table_make,
    table_nbytes,
    table_prefetch,
    table_probe,
    table_remove,
    table_reserve,
    table_t,
    table_widen,
    undo_all,
    undo_end,
    undo_free,
    undo_nbytes,
    undo_push,
    undo_reserve,
)

from typing import NamedTuple

from paycore._table import _blocks_held, _fail_allocation_after  # no-cython-lint: tests find them here

MISS = VERDICT_MISS

cdef extern from *:
    """
    #define PAYCORE_ID_EPOCH_MS ((int64_t)1735689600000)
    """
    const int64_t ID_EPOCH_MS "PAYCORE_ID_EPOCH_MS"

cdef enum:
    PREFETCH_AHEAD = 16
    CACHED_ACCOUNTS = 3
    ID_TIME_SHIFT = 22
    DEFAULT_SEGMENTS = 1024
    MAX_SEGMENTS = 4096


# ---- The decision ----------------------------------------------------------------------------------------

cdef inline bint at_most(int64_t time_ms, int64_t start_ms, int64_t allowance_ms) noexcept nogil:
    """Whether time <= start + allowance, for every int64: the sum itself might overflow."""
    if allowance_ms < 0:
        return time_ms < start_ms and <uint64_t>start_ms - <uint64_t>time_ms >= 0 - <uint64_t>allowance_ms
    return time_ms <= start_ms or <uint64_t>time_ms - <uint64_t>start_ms <= <uint64_t>allowance_ms


cdef inline uint32_t judge_open(const facts_t *facts, const moment_t *moment) noexcept nogil:
    """Judge a capture of an open payment by the channel's pay time, where that can be believed."""
    cdef bint trusted = (
        facts.created_at_ms <= moment.paid_at_ms
        and at_most(moment.paid_at_ms, moment.received_at_ms, PAID_AT_AHEAD_LIMIT_MS)
    )
    if not trusted:
        return NOTIFY_OUTCOME_ACCEPTED | VERDICT_FLAG_PAID_AT_UNTRUSTED
    if at_most(min(moment.paid_at_ms, moment.received_at_ms), facts.expire_at_ms, moment.late_grace_ms):
        return NOTIFY_OUTCOME_ACCEPTED
    if facts.other_live:
        return NOTIFY_OUTCOME_LATE
    return NOTIFY_OUTCOME_LATE | VERDICT_FLAG_CLOSES


cdef inline uint32_t judge_inline(const facts_t *facts, const moment_t *moment) noexcept nogil:
    """Judge one success. The order of the rules is their precedence (paycore.domain.decision.decide)."""
    if not facts.known:
        return NOTIFY_OUTCOME_UNKNOWN
    if not facts.account_matches:
        return NOTIFY_OUTCOME_CONFLICT
    if facts.recorded == RECORDED_SAME:
        return facts.recorded_outcome | VERDICT_FLAG_REPLAYED
    if facts.recorded == RECORDED_OTHER_TRADE:
        return NOTIFY_OUTCOME_SECOND_CAPTURE
    if facts.recorded == RECORDED_OTHER_TERMS or not facts.terms_match:
        return NOTIFY_OUTCOME_MISMATCH
    if facts.state == PAYMENT_STATE_PAID:
        return NOTIFY_OUTCOME_DUPLICATE
    if facts.state == PAYMENT_STATE_CLOSED:
        return NOTIFY_OUTCOME_LATE
    return judge_open(facts, moment)


cdef uint32_t judge(const facts_t *facts, const moment_t *moment) noexcept nogil:
    return judge_inline(facts, moment)


def decide(facts, moment):
    """Judge one success, as ``paycore.domain.decision.decide`` does.

    Raises OverflowError where a number does not fit its C type; every time may be any int64.
    """
    cdef facts_t compiled_facts
    cdef moment_t compiled_moment
    compiled_facts.known = facts.known
    compiled_facts.account_matches = facts.account_matches
    compiled_facts.recorded = facts.recorded
    compiled_facts.recorded_outcome = facts.recorded_outcome
    compiled_facts.terms_match = facts.terms_match
    compiled_facts.state = facts.state
    compiled_facts.other_live = facts.other_live
    compiled_facts.created_at_ms = facts.created_at_ms
    compiled_facts.expire_at_ms = facts.expire_at_ms
    compiled_moment.paid_at_ms = moment.paid_at_ms
    compiled_moment.received_at_ms = moment.received_at_ms
    compiled_moment.late_grace_ms = moment.late_grace_ms
    return judge(&compiled_facts, &compiled_moment)


# ---- The entry -------------------------------------------------------------------------------------------

cdef inline int64_t created_at_ms(uint64_t key) noexcept nogil:
    """When the payment was made: the id's own millisecond (paycore.domain.ids.created_at_ms)."""
    return <int64_t>(key >> ID_TIME_SHIFT) + ID_EPOCH_MS


cdef inline uint64_t bits(uint64_t word, int shift, int width) noexcept nogil:
    return (word >> shift) & ((<uint64_t>1 << width) - 1)


cdef inline uint64_t with_bits(uint64_t word, int shift, int width, uint64_t value) noexcept nogil:
    cdef uint64_t field = ((<uint64_t>1 << width) - 1) << shift
    return (word & ~field) | (value << shift)


cdef inline int64_t entry_attempts(const entry_t *entry) noexcept nogil:
    return <int64_t>bits(entry.terms, ATTEMPTS_SHIFT, 6)


cdef inline uint64_t entry_state(const entry_t *entry) noexcept nogil:
    return bits(entry.terms, STATE_SHIFT, 2)


cdef inline uint64_t entry_kept(const entry_t *entry) noexcept nogil:
    return bits(entry.terms, KEPT_SHIFT, 6)


cdef inline uint64_t attempt_bit(int64_t attempt) noexcept nogil:
    """The mask bit of an attempt, which must be 1 to 63."""
    return <uint64_t>1 << (attempt - 1)


cdef inline int64_t entry_account(const entry_t *entry, int64_t attempt) noexcept nogil:
    """The account code of an attempt; 0 where none is kept."""
    if attempt == 1:
        return <int64_t>bits(entry.money, AMOUNT_BITS, 8)
    if attempt == 2:
        return <int64_t>bits(entry.money, AMOUNT_BITS + 8, 8)
    if attempt == 3:
        return <int64_t>bits(entry.terms, ACCOUNT_3_SHIFT, 8)
    return 0


cdef inline void entry_set_account(entry_t *entry, int64_t attempt, uint64_t code) noexcept nogil:
    """Keep the account code of an attempt, 0 to 255; those past the third are not kept."""
    if attempt == 1:
        entry.money = with_bits(entry.money, AMOUNT_BITS, 8, code)
    elif attempt == 2:
        entry.money = with_bits(entry.money, AMOUNT_BITS + 8, 8, code)
    elif attempt == 3:
        entry.terms = with_bits(entry.terms, ACCOUNT_3_SHIFT, 8, code)


cdef inline void entry_set_outcome(entry_t *entry, uint64_t state, uint64_t kept_attempt) noexcept nogil:
    entry.terms = with_bits(entry.terms, STATE_SHIFT, 2, state)
    entry.terms = with_bits(entry.terms, KEPT_SHIFT, 6, kept_attempt)


cdef void entry_set_terms(
    entry_t *entry, int64_t amount_minor, int64_t currency_code, int64_t expire_at_ms
) noexcept nogil:
    """Keep what was asked, or, where a field overflows, only the order to ask the database."""
    cdef int64_t created = created_at_ms(entry.key)
    # An expiry before the payment wraps around to far more than fits.
    cdef bint fits = (
        0 < amount_minor < <int64_t>1 << AMOUNT_BITS
        and currency_code != 0
        and <uint64_t>expire_at_ms - <uint64_t>created < <uint64_t>1 << EXPIRY_BITS
    )
    if not fits:
        entry.mask |= TOP_BIT
        return
    entry.money = with_bits(entry.money, 0, AMOUNT_BITS, <uint64_t>amount_minor)
    entry.terms = with_bits(entry.terms, 0, EXPIRY_BITS, <uint64_t>(expire_at_ms - created))
    entry.terms = with_bits(entry.terms, CURRENCY_SHIFT, 8, <uint64_t>currency_code)


cdef int require(str field, int64_t value, int64_t low, int64_t high) except -1:
    """Raise ValueError that names the field, unless low <= value <= high."""
    if low <= value <= high:
        return 0
    raise ValueError(f"{field} must be {low} to {high}, not {value}")


cdef int entry_make(
    entry_t *entry, int64_t payment_id, int64_t amount_minor, int64_t currency_code, int64_t expire_at_ms
) except -1:
    """Start the entry of an open payment without attempts. Raises ValueError that names the field out of range."""
    require("payment_id", payment_id, 1, 0x7FFFFFFFFFFFFFFF)
    require("currency_code", currency_code, 0, MAX_CODE)
    entry.key = <uint64_t>payment_id
    entry.mask = 0
    entry.money = 0
    entry.terms = 0
    entry_set_outcome(entry, PAYMENT_STATE_OPEN, 0)
    entry_set_terms(entry, amount_minor, currency_code, expire_at_ms)
    return 0


cdef int entry_note(entry_t *entry, int64_t state, int64_t kept_attempt, int64_t captured_mask) except -1:
    """Note a payment's outcome and captures. Raises ValueError that names the field out of range."""
    require("state", state, PAYMENT_STATE_OPEN, PAYMENT_STATE_CLOSED)
    require("captured_mask", captured_mask, 0, 0x7FFFFFFFFFFFFFFF)
    if state == PAYMENT_STATE_PAID:
        require("kept_attempt of a paid payment", kept_attempt, 1, MAX_ATTEMPTS)
        # The kept capture is a judged one, whatever the mask was read from.
        captured_mask |= <int64_t>attempt_bit(kept_attempt)
    else:
        require("kept_attempt of a payment that is not paid", kept_attempt, 0, 0)
    entry_set_outcome(entry, <uint64_t>state, <uint64_t>kept_attempt)
    entry.mask |= <uint64_t>captured_mask
    return 0


# ---- Rows of the database --------------------------------------------------------------------------------

cdef struct cursor_t:
    # Where the merge stands in rows that are sorted by payment_id.
    Py_ssize_t next_row
    int64_t last_id


cdef bint cursor_reaches(cursor_t *cursor, list rows, int64_t payment_id) except -1:
    """Whether the next row is of this payment or one before it. Raises ValueError where the rows are not sorted."""
    cdef int64_t row_id
    if cursor.next_row == len(rows):
        return False
    row_id = (<tuple?>rows[cursor.next_row])[0]
    if row_id < cursor.last_id:
        raise ValueError(f"the rows must be sorted by payment_id, but {row_id} comes after {cursor.last_id}")
    cursor.last_id = row_id
    return row_id <= payment_id


cdef int merge_attempts(entry_t *entry, cursor_t *cursor, list rows, dict accounts) except -1:
    """Take in an entry's attempts: rows of (payment_id, attempt, channel, account)."""
    cdef int64_t payment_id = <int64_t>entry.key
    cdef int64_t attempt, code
    cdef tuple row
    while cursor_reaches(cursor, rows, payment_id):
        row = <tuple>rows[cursor.next_row]
        cursor.next_row += 1
        if cursor.last_id < payment_id:
            continue
        attempt = row[1]
        require("attempt", attempt, 1, MAX_ATTEMPTS)
        if attempt > entry_attempts(entry):
            entry.terms = with_bits(entry.terms, ATTEMPTS_SHIFT, 6, <uint64_t>attempt)
        if attempt <= CACHED_ACCOUNTS:
            code = accounts.get((row[2], row[3]), 0)
            require("account code", code, 0, MAX_CODE)
            entry_set_account(entry, attempt, <uint64_t>code)
    return 0


cdef int merge_captures(entry_t *entry, cursor_t *cursor, list rows) except -1:
    """Set the bits of an entry's judged captures: rows of (payment_id, attempt)."""
    cdef int64_t payment_id = <int64_t>entry.key
    cdef int64_t attempt
    while cursor_reaches(cursor, rows, payment_id):
        attempt = (<tuple>rows[cursor.next_row])[1]
        cursor.next_row += 1
        if cursor.last_id == payment_id:
            require("attempt", attempt, 1, MAX_ATTEMPTS)
            entry.mask |= attempt_bit(attempt)
    return 0


cdef list as_list(object rows):
    return rows if type(rows) is list else list(rows)


cdef int entry_read(entry_t *entry, tuple row, dict currencies) except -1:
    """Start an entry from a row of (payment_id, amount, currency or its code, expire_at, state, kept attempt)."""
    cdef object currency = row[2]
    cdef int64_t state = PAYMENT_STATE_OPEN if row[4] is None else row[4]
    cdef int64_t kept_attempt = 0 if row[5] is None else row[5]
    entry_make(entry, row[0], row[1], currencies.get(currency, 0) if isinstance(currency, str) else currency, row[3])
    return entry_note(entry, state, kept_attempt, 0)


# ---- The check -------------------------------------------------------------------------------------------

cdef uint32_t table_check(const table_t *table, const capture_t *capture, int64_t late_grace_ms) noexcept nogil:
    """Guess the verdict of a capture from what is cached: see Index.check."""
    cdef entry_t *entry = NULL
    if not table_find(table, <uint64_t>capture.payment_id, &entry):
        return VERDICT_MISS
    return entry_check(entry, capture, late_grace_ms)


cdef inline uint32_t entry_check(
    const entry_t *entry, const capture_t *capture, int64_t late_grace_ms
) noexcept nogil:
    """The same for a payment that is cached."""
    cdef facts_t facts
    cdef moment_t moment
    cdef uint32_t verdict
    cdef int64_t account
    if capture.attempt < 1 or capture.attempt > entry_attempts(entry) or entry.mask & TOP_BIT:
        return VERDICT_MISS
    account = entry_account(entry, capture.attempt)
    if account == 0:
        return VERDICT_MISS
    if entry.mask & attempt_bit(capture.attempt):
        return VERDICT_FLAG_ASK
    facts.known = True
    facts.account_matches = account == capture.account_code
    facts.recorded = RECORDED_NONE
    facts.recorded_outcome = 0
    facts.terms_match = (
        <int64_t>bits(entry.money, 0, AMOUNT_BITS) == capture.amount_minor
        and <int64_t>bits(entry.terms, CURRENCY_SHIFT, 8) == capture.currency_code
    )
    facts.state = <uint8_t>entry_state(entry)
    # Whether another attempt is live is not cached: with several, the guess is the one that closes nothing.
    facts.other_live = entry_attempts(entry) > 1
    facts.created_at_ms = created_at_ms(entry.key)
    facts.expire_at_ms = facts.created_at_ms + <int64_t>bits(entry.terms, 0, EXPIRY_BITS)
    moment.paid_at_ms = capture.paid_at_ms
    moment.received_at_ms = capture.received_at_ms
    moment.late_grace_ms = late_grace_ms
    verdict = judge_inline(&facts, &moment)
    # A capture of another attempt may wait for this outcome to be refunded: only the rows tell.
    if verdict & 0xFF == NOTIFY_OUTCOME_ACCEPTED and entry.mask == 0:
        return verdict
    return verdict | VERDICT_FLAG_ASK


cdef void table_check_many(
    const table_t *table, const columns_t *columns, size_t count, int64_t late_grace_ms
) noexcept nogil:
    """Check captures in turn, with the cache lines of the next ones already on their way."""
    cdef capture_t capture
    cdef probe_t probes[PREFETCH_AHEAD]
    cdef probe_t probe
    cdef entry_t *entry = NULL
    cdef size_t i
    if table.segments == NULL:
        memset(columns.verdicts, 0, count * sizeof(uint32_t))
        return
    for i in range(min(count, <size_t>PREFETCH_AHEAD)):
        probes[i] = table_probe(table, <uint64_t>columns.payment_ids[i])
        probe_prefetch(probes[i])
    for i in range(count):
        probe = probes[i % PREFETCH_AHEAD]
        if count - i > PREFETCH_AHEAD:
            probes[i % PREFETCH_AHEAD] = table_probe(table, <uint64_t>columns.payment_ids[i + PREFETCH_AHEAD])
            probe_prefetch(probes[i % PREFETCH_AHEAD])
        capture.payment_id = columns.payment_ids[i]
        if not probe_find(probe, <uint64_t>capture.payment_id, &entry):
            columns.verdicts[i] = VERDICT_MISS
            continue
        capture.attempt = columns.attempts[i]
        capture.account_code = columns.accounts[i]
        capture.amount_minor = columns.amounts[i]
        capture.currency_code = columns.currencies[i]
        capture.paid_at_ms = columns.paid_at[i]
        capture.received_at_ms = columns.received_at[i]
        columns.verdicts[i] = entry_check(entry, &capture, late_grace_ms)


# ---- The class -------------------------------------------------------------------------------------------

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
    accounts: tuple
    asks: bool


@cython.final
cdef class Index:
    """payment_id -> what is cached of it, 32 bytes an entry; see _dedupe.pyi for what each method owes.

    One thread changes it: the writer thread of the process, which also runs the groups. Nothing else
    enforces that, except against check_many: it runs without the GIL, counts itself in ``batches_running``, and
    every change raises RuntimeError while that is not 0.
    """

    def __cinit__(
        self,
        *,
        int64_t late_grace_ms=0,
        int64_t capacity=0,
        int64_t max_bytes=0,
        int64_t segments=DEFAULT_SEGMENTS,
    ):
        cdef uint32_t segment_bits = 0
        require("late_grace_ms", late_grace_ms, 0, 0x7FFFFFFFFFFFFFFF)
        require("capacity", capacity, 0, 0x7FFFFFFFFFFFFFFF)
        require("max_bytes", max_bytes, 0, 0x7FFFFFFFFFFFFFFF)
        require("segments", segments, 1, MAX_SEGMENTS)
        if segments & (segments - 1):
            raise ValueError(f"segments must be a power of two, not {segments}")
        while <int64_t>1 << segment_bits < segments:
            segment_bits += 1
        self.late_grace_ms = late_grace_ms
        self.max_bytes = max_bytes
        table_make(&self.table, segment_bits, max_bytes)
        if capacity and not table_widen(&self.table, <uint64_t>capacity):
            raise MemoryError(f"no memory for {capacity} payments")

    def __dealloc__(self):
        table_free(&self.table)
        undo_free(&self.undo)

    cdef int _prepare(self, uint64_t inserted_key) except -1:
        """Make room for one change, or raise before anything has changed. inserted_key: 0 where none is inserted.

        Rollback must not need memory. So the room for its record is taken here, and a segment
        that is rebuilt keeps a slot for each entry that this group took out of it.
        """
        if self.batches_running:
            raise RuntimeError("the index may not change while check_many runs")
        if self.undo.open and not undo_reserve(&self.undo):
            raise MemoryError("no memory for the undo log of the index")
        if inserted_key and not table_reserve(&self.table, &self.undo, inserted_key):
            raise MemoryError("no memory for the index to grow")
        return 0

    cdef void _remember(self, const entry_t *entry) noexcept:
        """Note how an entry is, before it changes; outside a group changes are final."""
        if self.undo.open:
            undo_push(&self.undo, &self.table, entry)

    cdef void _remove(self, entry_t *entry) noexcept:
        """Take an entry out. Room for one record must have been prepared."""
        self._remember(entry)
        table_remove(&self.table, entry, self.undo.open)

    cdef int _place(self, const entry_t *fresh) except -1:
        """Put an entry in, in the place of the one that was cached."""
        cdef entry_t absent
        cdef entry_t *entry = NULL
        if table_find(&self.table, fresh.key, &entry):
            self._prepare(0)
            self._remember(entry)
            entry[0] = fresh[0]
            return 0
        self._prepare(fresh.key)
        absent = fresh[0]
        absent.key |= TOP_BIT
        self._remember(&absent)
        table_insert(&self.table, fresh)
        return 0

    def put(
        self,
        int64_t payment_id,
        int64_t amount_minor,
        int64_t currency_code,
        int64_t expire_at_ms,
        int64_t state,
        int64_t kept_attempt,
        int64_t attempts,
        int64_t captured_mask,
        tuple accounts not None,
    ):
        cdef entry_t fresh
        cdef int64_t code, attempt = 0
        require("attempts", attempts, 0, MAX_ATTEMPTS)
        require("len(accounts)", len(accounts), 0, attempts)
        entry_make(&fresh, payment_id, amount_minor, currency_code, expire_at_ms)
        entry_note(&fresh, state, kept_attempt, captured_mask)
        fresh.terms = with_bits(fresh.terms, ATTEMPTS_SHIFT, 6, <uint64_t>attempts)
        for code in accounts:
            attempt += 1
            require("account code", code, 0, MAX_CODE)
            entry_set_account(&fresh, attempt, <uint64_t>code)
        self._place(&fresh)

    def load(
        self, payments not None, attempts not None, captures not None, *, dict currencies not None,
        dict accounts not None,
    ):
        cdef list payment_rows = as_list(payments)
        cdef list attempt_rows = as_list(attempts)
        cdef list capture_rows = as_list(captures)
        cdef cursor_t attempt_cursor = cursor_t(next_row=0, last_id=0)
        cdef cursor_t capture_cursor = cursor_t(next_row=0, last_id=0)
        cdef Py_ssize_t place
        cdef int64_t last_id = 0
        cdef entry_t fresh
        for place in range(len(payment_rows)):
            if len(payment_rows) - place > PREFETCH_AHEAD:
                table_prefetch(&self.table, <uint64_t><int64_t>(<tuple?>payment_rows[place + PREFETCH_AHEAD])[0])
            entry_read(&fresh, <tuple?>payment_rows[place], currencies)
            if <int64_t>fresh.key <= last_id:
                raise ValueError(f"the payments must be sorted by payment_id, but {fresh.key} comes after {last_id}")
            last_id = <int64_t>fresh.key
            merge_attempts(&fresh, &attempt_cursor, attempt_rows, accounts)
            merge_captures(&fresh, &capture_cursor, capture_rows)
            self._place(&fresh)

    def add_attempt(self, int64_t payment_id, int64_t attempt, int64_t account_code):
        cdef entry_t *entry = NULL
        require("account_code", account_code, 0, MAX_CODE)
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return
        self._prepare(0)
        if attempt != entry_attempts(entry) + 1 or attempt > MAX_ATTEMPTS:
            self._remove(entry)
            return
        self._remember(entry)
        entry.terms = with_bits(entry.terms, ATTEMPTS_SHIFT, 6, <uint64_t>attempt)
        entry_set_account(entry, attempt, <uint64_t>account_code)

    def check(
        self,
        int64_t payment_id,
        int64_t attempt,
        int64_t account_code,
        int64_t amount_minor,
        int64_t currency_code,
        int64_t paid_at_ms,
        int64_t received_at_ms,
    ):
        cdef capture_t capture
        capture.payment_id = payment_id
        capture.attempt = attempt
        capture.account_code = account_code
        capture.amount_minor = amount_minor
        capture.currency_code = currency_code
        capture.paid_at_ms = paid_at_ms
        capture.received_at_ms = received_at_ms
        return table_check(&self.table, &capture, self.late_grace_ms)

    cdef uint32_t check_capture(self, const capture_t *capture) noexcept nogil:
        return table_check(&self.table, capture, self.late_grace_ms)

    cdef bint holds(self, int64_t payment_id) noexcept nogil:
        cdef entry_t *entry = NULL
        return table_find(&self.table, <uint64_t>payment_id, &entry)

    cdef void prefetch(self, int64_t payment_id) noexcept nogil:
        table_prefetch(&self.table, <uint64_t>payment_id)

    def accept(self, int64_t payment_id, int64_t attempt):
        self.accept_capture(payment_id, attempt)

    cdef int accept_capture(self, int64_t payment_id, int64_t attempt) except -1:
        cdef entry_t *entry = NULL
        require("attempt", attempt, 1, MAX_ATTEMPTS)
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            raise KeyError(payment_id)
        self._prepare(0)
        if entry_state(entry) == PAYMENT_STATE_OPEN:
            self._remember(entry)
            entry_set_outcome(entry, PAYMENT_STATE_PAID, <uint64_t>attempt)
            entry.mask |= attempt_bit(attempt)
        elif entry_kept(entry) != <uint64_t>attempt:
            self._remove(entry)
        return 0

    def close(self, int64_t payment_id):
        cdef entry_t *entry = NULL
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return
        self._prepare(0)
        if entry_state(entry) == PAYMENT_STATE_OPEN:
            self._remember(entry)
            entry_set_outcome(entry, PAYMENT_STATE_CLOSED, 0)
        elif entry_state(entry) == PAYMENT_STATE_PAID:
            self._remove(entry)

    def set_captured(self, int64_t payment_id, int64_t attempt):
        cdef entry_t *entry = NULL
        require("attempt", attempt, 1, MAX_ATTEMPTS)
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return
        self._prepare(0)
        self._remember(entry)
        entry.mask |= attempt_bit(attempt)

    def discard(self, int64_t payment_id):
        cdef entry_t *entry = NULL
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return
        self._prepare(0)
        self._remove(entry)

    def begin(self):
        if self.undo.open:
            raise RuntimeError("a group is running already")
        self.undo.open = True

    def commit(self):
        if not self.undo.open:
            raise RuntimeError("no group is running")
        undo_end(&self.undo, &self.table)

    def rollback(self):
        if not self.undo.open:
            raise RuntimeError("no group is running")
        if self.batches_running:
            raise RuntimeError("the index may not change while check_many runs")
        undo_all(&self.undo, &self.table)
        undo_end(&self.undo, &self.table)

    def get(self, int64_t payment_id):
        cdef entry_t *entry = NULL
        cdef bint asks
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return None
        asks = entry.mask & TOP_BIT != 0
        return IndexEntry(
            payment_id=payment_id,
            amount_minor=bits(entry.money, 0, AMOUNT_BITS),
            currency_code=bits(entry.terms, CURRENCY_SHIFT, 8),
            expire_at_ms=0 if asks else created_at_ms(entry.key) + <int64_t>bits(entry.terms, 0, EXPIRY_BITS),
            state=entry_state(entry),
            kept_attempt=entry_kept(entry),
            attempts=entry_attempts(entry),
            captured_mask=entry.mask & ~TOP_BIT,
            accounts=tuple([
                entry_account(entry, attempt)
                for attempt in range(1, min(entry_attempts(entry), <int64_t>CACHED_ACCOUNTS) + 1)
            ]),
            asks=asks,
        )

    def check_many(
        self,
        const int64_t[::1] payment_ids not None,
        const uint8_t[::1] attempts not None,
        const uint8_t[::1] accounts not None,
        const int64_t[::1] amounts not None,
        const uint8_t[::1] currencies not None,
        const int64_t[::1] paid_at not None,
        const int64_t[::1] received_at not None,
        uint32_t[::1] verdicts not None,
    ):
        cdef columns_t columns
        cdef Py_ssize_t count = payment_ids.shape[0]
        if not (
            count == attempts.shape[0] == accounts.shape[0] == amounts.shape[0] == currencies.shape[0]
            == paid_at.shape[0] == received_at.shape[0] == verdicts.shape[0]
        ):
            raise ValueError("the buffers must have one length")
        if count == 0:
            return
        columns.payment_ids = &payment_ids[0]
        columns.attempts = &attempts[0]
        columns.accounts = &accounts[0]
        columns.amounts = &amounts[0]
        columns.currencies = &currencies[0]
        columns.paid_at = &paid_at[0]
        columns.received_at = &received_at[0]
        columns.verdicts = &verdicts[0]
        self.batches_running += 1
        with nogil:
            table_check_many(&self.table, &columns, <size_t>count, self.late_grace_ms)
        self.batches_running -= 1

    def __len__(self):
        return <Py_ssize_t>self.table.live

    def __contains__(self, int64_t payment_id):
        return self.holds(payment_id)

    @property
    def nbytes(self):
        return Index.__basicsize__ + table_nbytes(&self.table) + undo_nbytes(&self.undo)

    @property
    def capacity(self):
        return table_capacity(&self.table)

    @property
    def evicted(self):
        return self.table.evicted

    @property
    def evicted_open(self):
        return self.table.evicted_open

    @property
    def _occupied(self):
        return sum([occupied for _, _, occupied in self._segment_sizes()])

    def _segment_sizes(self):
        cdef uint32_t number
        if self.table.segments == NULL:
            return []
        return [
            (
                self.table.segments[number].slots,
                self.table.segments[number].live,
                self.table.segments[number].occupied,
            )
            for number in range(<uint32_t>1 << self.table.segment_bits)
        ]

    def _slot_keys(self):
        cdef uint32_t number, slot
        if self.table.segments == NULL:
            return []
        return [
            self.table.segments[number].entries[slot].key
            for number in range(<uint32_t>1 << self.table.segment_bits)
            for slot in range(self.table.segments[number].slots)
        ]
