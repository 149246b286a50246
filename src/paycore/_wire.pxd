# cython: language_level=3
"""The C face of Notify's wire: notifications as records, whose texts are spans of the bytes they came in.

Records may be read without the GIL while the Batch is held. What a caller may write is named at each field.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stddef cimport size_t
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t

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


# ---- Classes ---------------------------------------------------------------------------------------------

@cython.final
cdef class Batch:
    cdef readonly Py_ssize_t total    # how many notifications the message had; count is at most that
    cdef Py_ssize_t count             # how many records there are
    cdef note_t *notes                # owned, or &self.single; of `count` records
    cdef note_t single
    cdef bytes data                   # what the spans point into
    cdef list values                  # of_values: the notifications as given; else None
    cdef dict violations              # position -> field `violations` of its answer, serialised; None: there are none

    cdef note_t *_at(self, Py_ssize_t position) except NULL
    cdef int _reserve(self, Py_ssize_t count) except -1

    cdef inline str text(self, span_t span):
        """Return a text. Total: text of values that is no Unicode comes back as it was given."""
        return PyUnicode_DecodeUTF8(PyBytes_AS_STRING(self.data) + span.start, span.size, "surrogatepass")


@cython.final
cdef class Decoder:
    cdef names_t accounts
    cdef names_t currencies
    cdef list kept                    # the bytes that the names are borrowed from

    cdef Batch _decode_batch(self, bytes data, int64_t received_at_ms, Py_ssize_t limit)
