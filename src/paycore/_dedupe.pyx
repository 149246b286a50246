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
from libc.stdint cimport SIZE_MAX, uintptr_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from typing import NamedTuple

MISS = VERDICT_MISS

cdef extern from *:
    """
    #define PAYCORE_TOP_BIT ((uint64_t)1 << 63)
    #define PAYCORE_ID_EPOCH_MS ((int64_t)1735689600000)
    #if defined(__GNUC__) || defined(__clang__)
    #define paycore_prefetch(address) __builtin_prefetch(address)
    #else
    #define paycore_prefetch(address) ((void)(address))
    #endif
    """
    const uint64_t TOP_BIT "PAYCORE_TOP_BIT"
    const int64_t ID_EPOCH_MS "PAYCORE_ID_EPOCH_MS"
    void paycore_prefetch(const void *address) noexcept nogil

cdef enum:
    MIN_SLOTS = 8
    CACHE_LINE = 64
    PREFETCH_AHEAD = 16
    CACHED_ACCOUNTS = 3
    ID_TIME_SHIFT = 22
    AMOUNT_BITS = 48
    EXPIRY_BITS = 32
    ACCOUNT_3_SHIFT = 32
    CURRENCY_SHIFT = 40
    STATE_SHIFT = 48
    KEPT_SHIFT = 50
    ATTEMPTS_SHIFT = 56


# ---- Memory ----------------------------------------------------------------------------------------------

# Every block of this module is taken and released here, by a thread that holds the GIL. So a test can make an
# allocation fail and see that none is lost.
cdef long long allocations_left = -1   # negative: no bound
cdef Py_ssize_t blocks_held = 0


cdef void *allocate(size_t count, size_t size) noexcept nogil:
    """Like calloc: zeroed memory, owned by the caller; NULL when there is none, or when a test's allowance is spent."""
    global allocations_left, blocks_held
    cdef void *block
    if allocations_left == 0:
        return NULL
    block = calloc(count, size)
    if block != NULL:
        blocks_held += 1
        allocations_left -= allocations_left > 0
    return block


cdef void release(void *block) noexcept nogil:
    """Give back what allocate returned; NULL is allowed."""
    global blocks_held
    if block != NULL:
        blocks_held -= 1
        free(block)


def _fail_allocation_after(long long count):
    """For tests only: let ``count`` more allocations succeed, then fail all; a negative count ends that."""
    global allocations_left
    allocations_left = max(count, -1)


def _blocks_held():
    """For tests only: how many blocks of memory this module holds."""
    return blocks_held


# ---- The decision ----------------------------------------------------------------------------------------

cdef inline bint at_most(int64_t time_ms, int64_t start_ms, int64_t allowance_ms) noexcept nogil:
    """Whether time <= start + allowance, for every int64: the sum itself might overflow."""
    if allowance_ms < 0:
        return time_ms < start_ms and <uint64_t>start_ms - <uint64_t>time_ms >= 0 - <uint64_t>allowance_ms
    return time_ms <= start_ms or <uint64_t>time_ms - <uint64_t>start_ms <= <uint64_t>allowance_ms


cdef uint32_t judge_open(const facts_t *facts, const moment_t *moment) noexcept nogil:
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


cdef uint32_t judge(const facts_t *facts, const moment_t *moment) noexcept nogil:
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


# ---- The table -------------------------------------------------------------------------------------------

cdef uint64_t mix(uint64_t key) noexcept nogil:
    """Spread a key over 64 bits: the finaliser of splitmix64, a bijection."""
    key = (key ^ (key >> 30)) * <uint64_t>0xBF58476D1CE4E5B9ULL
    key = (key ^ (key >> 27)) * <uint64_t>0x94D049BB133111EBULL
    return key ^ (key >> 31)


cdef inline size_t slot_limit(size_t slots) noexcept nogil:
    """How many slots may be occupied: three quarters, so that probes stay short."""
    return slots - slots // 4


cdef inline size_t slot_of(const table_t *table, uint64_t key) noexcept nogil:
    """Where the probe of a key starts. The table must have slots."""
    return <size_t>mix(key) & (table.slots - 1)


cdef bint table_find(const table_t *table, uint64_t key, entry_t **found) noexcept nogil:
    """Find a payment. `found` points into the table until the next insert; it is set only when True is returned."""
    cdef size_t slot, _
    if table.slots == 0 or key == 0 or key & TOP_BIT:
        return False
    slot = slot_of(table, key)
    for _ in range(table.slots):
        if table.entries[slot].key == key:
            found[0] = &table.entries[slot]
            return True
        if table.entries[slot].key == 0:
            return False
        slot = (slot + 1) & (table.slots - 1)
    return False


cdef bint table_insert(table_t *table, const entry_t *fresh) noexcept nogil:
    """Put in a payment that is absent. False, and nothing changed, only when every slot is live."""
    cdef size_t slot, _
    cdef uint64_t key
    if table.slots == 0:
        return False
    slot = slot_of(table, fresh.key)
    for _ in range(table.slots):
        key = table.entries[slot].key
        if key == 0 or key == TOP_BIT:
            table.entries[slot] = fresh[0]
            table.live += 1
            table.occupied += key == 0
            return True
        slot = (slot + 1) & (table.slots - 1)
    return False


cdef void table_remove(table_t *table, entry_t *entry) noexcept nogil:
    """Turn a live entry into a tombstone. It stays counted as occupied until the table is rebuilt."""
    entry.key = TOP_BIT
    table.live -= 1


cdef bint table_reserve(table_t *table, size_t extra) noexcept nogil:
    """Make room for `extra` more payments; False when memory ran out, and nothing changed."""
    cdef size_t slots
    if extra > SIZE_MAX // 2 - table.occupied:
        return False
    if table.occupied + extra <= slot_limit(table.slots):
        return True
    slots = max(table.slots, <size_t>MIN_SLOTS)
    # A quarter stays free, so that a table full of tombstones is not rebuilt again at once.
    while table.live + extra > slot_limit(slots) - slot_limit(slots) // 4:
        if slots > SIZE_MAX // 4:
            return False
        slots *= 2
    return table_resize(table, slots)


cdef bint table_resize(table_t *table, size_t slots) noexcept nogil:
    """Rebuild into `slots` slots, a power of two above `live`; False when memory ran out, and nothing changed."""
    cdef table_t fresh
    cdef size_t slot
    if slots > (SIZE_MAX - CACHE_LINE) // sizeof(entry_t):
        return False
    fresh.block = allocate(slots * sizeof(entry_t) + CACHE_LINE, 1)
    if fresh.block == NULL:
        return False
    fresh.entries = <entry_t *>((<uintptr_t>fresh.block + CACHE_LINE - 1) & ~<uintptr_t>(CACHE_LINE - 1))
    fresh.slots = slots
    fresh.live = 0
    fresh.occupied = 0
    for slot in range(table.slots):
        if table.entries[slot].key != 0 and table.entries[slot].key != TOP_BIT:
            table_insert(&fresh, &table.entries[slot])
    release(table.block)
    table[0] = fresh
    return True


cdef void table_free(table_t *table) noexcept nogil:
    """Release the memory; the table is then empty and may be used again."""
    release(table.block)
    table.block = NULL
    table.entries = NULL
    table.slots = table.live = table.occupied = 0


cdef inline size_t table_nbytes(const table_t *table) noexcept nogil:
    return table.slots * sizeof(entry_t) + CACHE_LINE if table.slots else 0


# ---- The undo log ----------------------------------------------------------------------------------------

cdef bint undo_reserve(undo_log_t *log) noexcept nogil:
    """Make room for one more record; False when memory ran out, and nothing changed."""
    cdef entry_t *records
    cdef size_t capacity
    if log.count < log.capacity:
        return True
    if log.capacity > SIZE_MAX // 4 // sizeof(entry_t):
        return False
    capacity = max(log.capacity * 2, <size_t>16)
    records = <entry_t *>allocate(capacity, sizeof(entry_t))
    if records == NULL:
        return False
    if log.count:
        memcpy(records, log.records, log.count * sizeof(entry_t))
    release(log.records)
    log.records = records
    log.capacity = capacity
    return True


cdef void undo_push(undo_log_t *log, const entry_t *before) noexcept nogil:
    """Note how an entry was. The room must have been reserved."""
    log.records[log.count] = before[0]
    log.count += 1


cdef void undo_free(undo_log_t *log) noexcept nogil:
    """Release the memory."""
    release(log.records)
    log.records = NULL
    log.capacity = log.count = 0


# ---- The check -------------------------------------------------------------------------------------------

cdef uint32_t table_check(const table_t *table, const capture_t *capture, int64_t late_grace_ms) noexcept nogil:
    """Guess the verdict of a capture from what is cached: see Index.check."""
    cdef entry_t *entry = NULL
    cdef facts_t facts
    cdef moment_t moment
    cdef uint32_t verdict
    cdef int64_t account
    if not table_find(table, <uint64_t>capture.payment_id, &entry):
        return VERDICT_MISS
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
    verdict = judge(&facts, &moment)
    # A capture of another attempt may wait for this outcome to be refunded: only the rows tell.
    if verdict & 0xFF == NOTIFY_OUTCOME_ACCEPTED and entry.mask == 0:
        return verdict
    return verdict | VERDICT_FLAG_ASK


cdef void table_check_many(
    const table_t *table, const columns_t *columns, size_t count, int64_t late_grace_ms
) noexcept nogil:
    """Check captures in turn, with the cache lines of the next ones already on their way."""
    cdef capture_t capture
    cdef size_t i
    for i in range(min(count, <size_t>PREFETCH_AHEAD) if table.slots else 0):
        paycore_prefetch(&table.entries[slot_of(table, <uint64_t>columns.payment_ids[i])])
    for i in range(count):
        if table.slots and count - i > PREFETCH_AHEAD:
            paycore_prefetch(&table.entries[slot_of(table, <uint64_t>columns.payment_ids[i + PREFETCH_AHEAD])])
        capture.payment_id = columns.payment_ids[i]
        capture.attempt = columns.attempts[i]
        capture.account_code = columns.accounts[i]
        capture.amount_minor = columns.amounts[i]
        capture.currency_code = columns.currencies[i]
        capture.paid_at_ms = columns.paid_at[i]
        capture.received_at_ms = columns.received_at[i]
        columns.verdicts[i] = table_check(table, &capture, late_grace_ms)


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


cdef int require(str field, int64_t value, int64_t low, int64_t high) except -1:
    """Raise ValueError that names the field, unless low <= value <= high."""
    if low <= value <= high:
        return 0
    raise ValueError(f"{field} must be {low} to {high}, not {value}")


@cython.final
cdef class Index:
    """payment_id -> what is cached of it, 32 bytes an entry; see _dedupe.pyi for what each method owes.

    One thread changes it: the writer thread of the process, which also runs the groups. Nothing else
    enforces that, except against check_many: it runs without the GIL, counts itself in ``batches_running``, and
    every change raises RuntimeError while that is not 0.
    """

    def __cinit__(self, *, int64_t late_grace_ms=0, int64_t capacity=0):
        require("late_grace_ms", late_grace_ms, 0, 0x7FFFFFFFFFFFFFFF)
        require("capacity", capacity, 0, 0x7FFFFFFFFFFFFFFF)
        self.late_grace_ms = late_grace_ms
        cdef size_t slots = MIN_SLOTS
        if capacity == 0:
            return
        while slot_limit(slots) < <size_t>capacity:
            if slots > SIZE_MAX // 4:
                raise MemoryError(f"no table holds {capacity} payments")
            slots *= 2
        if not table_resize(&self.table, slots):
            raise MemoryError(f"no memory for {capacity} payments")

    def __dealloc__(self):
        table_free(&self.table)
        undo_free(&self.undo)

    cdef int _prepare(self, bint inserts) except -1:
        """Make room for one change, or raise before anything has changed.

        Rollback must not need memory. So the room for its record is taken here, and a table
        that is rebuilt keeps a slot for each entry that this group took out.
        """
        if self.batches_running:
            raise RuntimeError("the index may not change while check_many runs")
        if self.undo.open and not undo_reserve(&self.undo):
            raise MemoryError("no memory for the undo log of the index")
        if inserts and not table_reserve(&self.table, self.undo.removed + 1):
            raise MemoryError("no memory for the index to grow")
        return 0

    cdef void _remember(self, const entry_t *entry) noexcept:
        """Note how an entry is, before it changes; outside a group changes are final."""
        if self.undo.open:
            undo_push(&self.undo, entry)

    cdef void _remove(self, entry_t *entry) noexcept:
        """Take an entry out. Room for one record must have been prepared."""
        self._remember(entry)
        self.undo.removed += self.undo.open
        table_remove(&self.table, entry)

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
        cdef entry_t absent
        cdef entry_t *entry = NULL
        cdef int64_t code, attempt = 0
        require("payment_id", payment_id, 1, 0x7FFFFFFFFFFFFFFF)
        require("currency_code", currency_code, 0, MAX_CODE)
        require("state", state, PAYMENT_STATE_OPEN, PAYMENT_STATE_CLOSED)
        require("attempts", attempts, 0, MAX_ATTEMPTS)
        require("captured_mask", captured_mask, 0, 0x7FFFFFFFFFFFFFFF)
        require("len(accounts)", len(accounts), 0, attempts)
        if state == PAYMENT_STATE_PAID:
            require("kept_attempt of a paid payment", kept_attempt, 1, MAX_ATTEMPTS)
            # The kept capture is a judged one, whatever the mask was read from.
            captured_mask |= <int64_t>attempt_bit(kept_attempt)
        else:
            require("kept_attempt of a payment that is not paid", kept_attempt, 0, 0)
        fresh.key = <uint64_t>payment_id
        fresh.mask = <uint64_t>captured_mask
        fresh.money = 0
        fresh.terms = with_bits(0, ATTEMPTS_SHIFT, 6, <uint64_t>attempts)
        entry_set_outcome(&fresh, <uint64_t>state, <uint64_t>kept_attempt)
        entry_set_terms(&fresh, amount_minor, currency_code, expire_at_ms)
        for code in accounts:
            attempt += 1
            require("account code", code, 0, MAX_CODE)
            entry_set_account(&fresh, attempt, <uint64_t>code)
        if table_find(&self.table, fresh.key, &entry):
            self._prepare(inserts=False)
            self._remember(entry)
            entry[0] = fresh
            return
        self._prepare(inserts=True)
        absent = fresh
        absent.key |= TOP_BIT
        self._remember(&absent)
        table_insert(&self.table, &fresh)

    def add_attempt(self, int64_t payment_id, int64_t attempt, int64_t account_code):
        cdef entry_t *entry = NULL
        require("account_code", account_code, 0, MAX_CODE)
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return
        self._prepare(inserts=False)
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
        if self.table.slots:
            paycore_prefetch(&self.table.entries[slot_of(&self.table, <uint64_t>payment_id)])

    def accept(self, int64_t payment_id, int64_t attempt):
        self.accept_capture(payment_id, attempt)

    cdef int accept_capture(self, int64_t payment_id, int64_t attempt) except -1:
        cdef entry_t *entry = NULL
        require("attempt", attempt, 1, MAX_ATTEMPTS)
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            raise KeyError(payment_id)
        self._prepare(inserts=False)
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
        self._prepare(inserts=False)
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
        self._prepare(inserts=False)
        self._remember(entry)
        entry.mask |= attempt_bit(attempt)

    def discard(self, int64_t payment_id):
        cdef entry_t *entry = NULL
        if not table_find(&self.table, <uint64_t>payment_id, &entry):
            return
        self._prepare(inserts=False)
        self._remove(entry)

    def begin(self):
        if self.undo.open:
            raise RuntimeError("a group is running already")
        self.undo.open = True

    def commit(self):
        if not self.undo.open:
            raise RuntimeError("no group is running")
        self.undo.open = False
        self.undo.count = self.undo.removed = 0

    def rollback(self):
        cdef entry_t *before
        cdef entry_t *entry = NULL
        if not self.undo.open:
            raise RuntimeError("no group is running")
        if self.batches_running:
            raise RuntimeError("the index may not change while check_many runs")
        while self.undo.count:
            self.undo.count -= 1
            before = &self.undo.records[self.undo.count]
            if before.key & TOP_BIT:
                if table_find(&self.table, before.key & ~TOP_BIT, &entry):
                    table_remove(&self.table, entry)
            elif table_find(&self.table, before.key, &entry):
                entry[0] = before[0]
            else:
                # There is a slot: this state has fitted once, and a rebuild since then kept room for it.
                table_insert(&self.table, before)
        self.undo.open = False
        self.undo.removed = 0

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
        return Index.__basicsize__ + table_nbytes(&self.table) + self.undo.capacity * sizeof(entry_t)

    @property
    def capacity(self):
        return slot_limit(self.table.slots)

    @property
    def _occupied(self):
        return self.table.occupied

    def _slot_keys(self):
        cdef size_t slot
        return [self.table.entries[slot].key for slot in range(self.table.slots)]
