# cython: language_level=3
"""The C face of the compiled index and decision: constants, records, and what may be called without the GIL.

The constants repeat paycore/domain/verdicts.py and protos/paycore/v1/payment.proto; a test holds all three equal.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

# A verdict packs an outcome in its low 8 bits and VerdictFlag bits above them.
cdef enum NotifyOutcome:
    NOTIFY_OUTCOME_ACCEPTED = 1
    NOTIFY_OUTCOME_DUPLICATE = 2
    NOTIFY_OUTCOME_LATE = 3
    NOTIFY_OUTCOME_SECOND_CAPTURE = 4
    NOTIFY_OUTCOME_MISMATCH = 5
    NOTIFY_OUTCOME_CONFLICT = 6
    NOTIFY_OUTCOME_UNKNOWN = 7
    NOTIFY_OUTCOME_RECORDED = 8
    NOTIFY_OUTCOME_INVALID = 9
    NOTIFY_OUTCOME_THROTTLED = 10

cdef enum VerdictFlag:
    VERDICT_FLAG_NONE = 0
    VERDICT_FLAG_REPLAYED = 0x100
    VERDICT_FLAG_PAID_AT_UNTRUSTED = 0x200
    VERDICT_FLAG_CLOSES = 0x400
    VERDICT_FLAG_ASK = 0x800

cdef enum PaymentState:
    PAYMENT_STATE_OPEN = 1
    PAYMENT_STATE_PAID = 2
    PAYMENT_STATE_CLOSED = 3

cdef enum Recorded:
    RECORDED_NONE = 0
    RECORDED_SAME = 1
    RECORDED_OTHER_TRADE = 2
    RECORDED_OTHER_TERMS = 3

cdef enum Limits:
    VERDICT_MISS = 0
    MAX_ATTEMPTS = 63
    MAX_CODE = 255
    PAID_AT_AHEAD_LIMIT_MS = 300000


# ---- The decision ----------------------------------------------------------------------------------------

cdef struct facts_t:
    # paycore.domain.decision.Facts, field by field.
    bint known
    bint account_matches
    uint8_t recorded
    uint32_t recorded_outcome
    bint terms_match
    uint8_t state
    bint other_live
    int64_t created_at_ms
    int64_t expire_at_ms

cdef struct moment_t:
    # paycore.domain.decision.Moment, field by field.
    int64_t paid_at_ms
    int64_t received_at_ms
    int64_t late_grace_ms

cdef uint32_t judge(const facts_t *facts, const moment_t *moment) noexcept nogil


# ---- The table: payment_id -> entry, open addressing, linear probes ---------------------------------------

cdef struct entry_t:
    # 32 bytes, two in a cache line. Bits from the lowest up:
    # key    payment_id 63; 0 is an empty slot; bit 63 alone is a tombstone.
    # mask   bit (attempt - 1): the attempt has a judged capture; bit 63: ask the database.
    # money  amount_minor 48, account code of attempt 1: 8, of attempt 2: 8.
    # terms  expiry in ms after the id's own time 32, account code of attempt 3: 8, currency code 8,
    #        state 2, kept attempt 6, number of attempts 6, unused 2.
    uint64_t key
    uint64_t mask
    uint64_t money
    uint64_t terms

cdef struct table_t:
    # `block` is owned and released by table_free; `entries` points into it, on a cache line's start.
    void *block
    entry_t *entries
    size_t slots      # a power of two, or 0 before the first insert
    size_t live       # slots that hold a payment
    size_t occupied   # live and tombstones: what lengthens a probe

cdef uint64_t mix(uint64_t key) noexcept nogil
cdef bint table_find(const table_t *table, uint64_t key, entry_t **found) noexcept nogil
cdef bint table_reserve(table_t *table, size_t extra) noexcept nogil
cdef bint table_insert(table_t *table, const entry_t *fresh) noexcept nogil
cdef void table_remove(table_t *table, entry_t *entry) noexcept nogil
cdef bint table_resize(table_t *table, size_t slots) noexcept nogil
cdef void table_free(table_t *table) noexcept nogil


# ---- The undo log of one group ---------------------------------------------------------------------------

cdef struct undo_log_t:
    # `records` is owned and released by undo_free. A record is the entry as it was before one change;
    # for a payment that was absent, its key with bit 63 set.
    entry_t *records
    size_t capacity
    size_t count
    size_t removed    # entries taken out of the table in this group: rollback may put them back
    bint open

cdef bint undo_reserve(undo_log_t *log) noexcept nogil
cdef void undo_push(undo_log_t *log, const entry_t *before) noexcept nogil
cdef void undo_free(undo_log_t *log) noexcept nogil


# ---- The check -------------------------------------------------------------------------------------------

cdef struct capture_t:
    # What a channel says it took. attempt, account_code and currency_code may hold anything.
    int64_t payment_id
    int64_t attempt
    int64_t account_code
    int64_t amount_minor
    int64_t currency_code
    int64_t paid_at_ms
    int64_t received_at_ms

cdef uint32_t table_check(const table_t *table, const capture_t *capture, int64_t late_grace_ms) noexcept nogil

cdef struct columns_t:
    # Borrowed arrays of one length: captures by column, and where their verdicts go.
    const int64_t *payment_ids
    const uint8_t *attempts
    const uint8_t *accounts
    const int64_t *amounts
    const uint8_t *currencies
    const int64_t *paid_at
    const int64_t *received_at
    uint32_t *verdicts

cdef void table_check_many(
    const table_t *table, const columns_t *columns, size_t count, int64_t late_grace_ms
) noexcept nogil


cdef class Index:
    cdef table_t table
    cdef undo_log_t undo
    cdef int64_t late_grace_ms
    cdef Py_ssize_t batches_running   # guarded by the GIL: changed only while it is held

    # For compiled callers: Index.check, `in`, and Index.accept, without a Python object. `prefetch` starts to fetch
    # what `holds` and `check_capture` will read. Without the GIL nothing may change the index meanwhile.
    cdef uint32_t check_capture(self, const capture_t *capture) noexcept nogil
    cdef bint holds(self, int64_t payment_id) noexcept nogil
    cdef void prefetch(self, int64_t payment_id) noexcept nogil
    cdef int accept_capture(self, int64_t payment_id, int64_t attempt) except -1

    cdef int _prepare(self, bint inserts) except -1
    cdef void _remember(self, const entry_t *entry) noexcept
    cdef void _remove(self, entry_t *entry) noexcept
