# cython: language_level=3
"""The C face of Notify's wire: notifications as records, whose texts are spans of the bytes they came in.

Records may be read without the GIL while the Batch is held. What a caller may write is named at each field.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t

# Named here for those who cimport _wire, too.
from paycore._notes cimport names_t, note_t, span_t

# Blocks that a test may count, and let fail. With the GIL held; zeroed; a block is its taker's until released.
cdef void *allocate(size_t count, size_t size) except NULL
cdef void release(void *block) noexcept


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
