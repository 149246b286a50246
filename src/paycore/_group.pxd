# cython: language_level=3
"""The C face of a compiled group: which words of its batches the index accepts, and their columns."""

from libc.stdint cimport int64_t

from paycore._dedupe cimport Index
from paycore._wire cimport Batch, note_t

cdef struct pick_t:
    # A word that is accepted. `note` and `data` are borrowed from its batch, which the group keeps.
    int64_t payment_id
    note_t *note
    const char *data

cdef struct slice_t:
    # Some words of one batch, borrowed likewise.
    note_t *notes
    const char *data
    Py_ssize_t count

cdef class Group:
    cdef Index index
    cdef list batches            # keeps what the slices borrow
    cdef slice_t *slices         # owned
    cdef Py_ssize_t slice_count
    cdef pick_t *picks           # owned; room for every word
    cdef Py_ssize_t pick_count
    cdef Py_ssize_t word_count
    cdef Py_ssize_t untrusted_count

    cdef int _try_word(self, const slice_t *piece, note_t *note) except -1
    cdef bytes _int8_array(self, int column)
    cdef bytes _int2_array(self, bint untrusted)
    cdef bytes _text_array(self, bint currency)
