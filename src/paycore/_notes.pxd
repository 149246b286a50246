# cython: language_level=3
"""Notifications as C records, whose texts are spans of the bytes they came in, and the functions that read them."""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

cdef enum Status:
    STATUS_OK = 0
    STATUS_MALFORMED = 1
    STATUS_BAD_UTF8 = 2

cdef enum NoteLimits:
    # The headers of a plain notification take at most so many bytes as JSON text.
    PLAIN_HEADERS = 8192


# ---- Records ---------------------------------------------------------------------------------------------

cdef struct span_t:
    # Into Batch.data; start + size is never beyond it.
    uint32_t start
    uint32_t size

cdef struct note_t:
    # What the order number says where it is one of ours in form; else both are 0.
    int64_t payment_id
    int64_t amount_minor
    int64_t paid_at_ms       # decision.ABSENT_MS when not given
    int64_t received_at_ms
    # The answer, written by Batch.answer and Batch.refuse or by a C caller while it holds the GIL. A record
    # has no answer while the low 8 bits of its verdict are 0.
    int64_t answer_payment_id
    int32_t answer_attempt
    uint32_t verdict
    int32_t attempt
    int32_t result           # ChannelResult, or any other number
    uint8_t account_code     # 0: (channel, account) is not configured
    uint8_t currency_code    # 0: not configured
    uint8_t source           # CaptureSource
    uint8_t plain            # 1: breaks no rule; 0: Python is to look (Batch.suspects)
    uint8_t refused          # 1: not to be judged; written by Batch.refuse
    span_t item              # the whole message; empty when made of values
    span_t channel
    span_t account
    span_t order_no
    span_t currency
    span_t trade_no
    span_t raw


# ---- Names to codes --------------------------------------------------------------------------------------

cdef struct name_t:
    # `first` and `second` are borrowed from bytes that the Decoder keeps. code 0 is an empty slot.
    const uint8_t *first
    const uint8_t *second
    uint32_t first_size
    uint32_t second_size
    uint8_t code

cdef struct names_t:
    # Open addressing, at most half full. `slots` is owned and released by names_free; never changed once made.
    name_t *slots
    size_t mask     # slots less 1; the number of slots is a power of two

cdef void names_place(names_t *names, const name_t *name) noexcept nogil


# ---- Reading ---------------------------------------------------------------------------------------------

cdef struct source_t:
    # What one call of the decoder reads, and the names that it met last: most notifications repeat them.
    const uint8_t *start
    const names_t *accounts
    const names_t *currencies
    const name_t *last_account
    const name_t *last_currency
    int64_t received_at_ms

cdef struct entry_t:
    # One entry of the headers. `whole` is False where it has an unknown field and therefore counts for nothing.
    span_t key
    span_t value
    bint whole
    int found                 # Text bits of all keys and values read

cdef Status read_note(
    source_t *source, const uint8_t *at, const uint8_t *end, int depth, note_t *note
) noexcept nogil
cdef Status count_items(const uint8_t *at, const uint8_t *end, Py_ssize_t *count) noexcept nogil
cdef Status read_items(
    source_t *source, const uint8_t *at, const uint8_t *end, note_t *notes, Py_ssize_t count
) noexcept nogil
cdef const uint8_t *next_header(
    const source_t *source, const uint8_t *at, const uint8_t *end, entry_t *entry
) noexcept nogil
cdef void finish_value(source_t *source, bint headers_are_plain, note_t *note) noexcept nogil
