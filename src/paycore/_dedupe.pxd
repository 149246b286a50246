# cython: language_level=3
"""The C face of the compiled index and decision: constants, records, and what may be called without the GIL.

The constants repeat paycore/domain/verdicts.py and protos/paycore/v1/payment.proto; a test holds all three equal.
"""

from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from paycore._table cimport entry_t, table_t, undo_log_t

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
    cdef readonly int64_t max_bytes
    cdef Py_ssize_t batches_running   # guarded by the GIL: changed only while it is held

    # For compiled callers: Index.check, `in`, and Index.accept, without a Python object. `prefetch` starts to fetch
    # what `holds` and `check_capture` will read. Without the GIL nothing may change the index meanwhile.
    cdef uint32_t check_capture(self, const capture_t *capture) noexcept nogil
    cdef bint holds(self, int64_t payment_id) noexcept nogil
    cdef void prefetch(self, int64_t payment_id) noexcept nogil
    cdef int accept_capture(self, int64_t payment_id, int64_t attempt) except -1

    cdef int _prepare(self, uint64_t inserted_key) except -1
    cdef int _place(self, const entry_t *fresh) except -1
    cdef void _remember(self, const entry_t *entry) noexcept
    cdef void _remove(self, entry_t *entry) noexcept
