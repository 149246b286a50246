# cython: language_level=3, wraparound=False, cdivision=True, embedsignature=True, embedsignature.format=python
"""A group of notifications on its short way: records -> decision -> columns, without a Python object a word.

A leaf beside ``_wire`` and ``_dedupe``: integers and bytes, no database. What the index cannot answer alone is
handed back, word by word, to be judged on the rows (``usecases/judge.py``). See _group.pyi for what each method owes.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.unicode cimport PyUnicode_DecodeUTF8
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memcpy, memset

from paycore._dedupe cimport (
    NOTIFY_OUTCOME_ACCEPTED,
    NOTIFY_OUTCOME_THROTTLED,
    VERDICT_FLAG_ASK,
    VERDICT_FLAG_PAID_AT_UNTRUSTED,
    VERDICT_FLAG_REPLAYED,
    capture_t,
)
from paycore._wire cimport allocate, release

cdef extern from *:
    """
    #define PAYCORE_ABSENT_MS ((int64_t)-1)
    #if defined(__GNUC__) || defined(__clang__)
    #define paycore_swap64(x) __builtin_bswap64(x)
    #define paycore_swap32(x) __builtin_bswap32(x)
    #define paycore_swap16(x) __builtin_bswap16(x)
    #endif
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #undef paycore_swap64
    #undef paycore_swap32
    #undef paycore_swap16
    #define paycore_swap64(x) (x)
    #define paycore_swap32(x) (x)
    #define paycore_swap16(x) (x)
    #endif
    """
    const int64_t ABSENT_MS "PAYCORE_ABSENT_MS"
    uint64_t swap64 "paycore_swap64"(uint64_t value) noexcept nogil
    uint32_t swap32 "paycore_swap32"(uint32_t value) noexcept nogil
    unsigned short swap16 "paycore_swap16"(unsigned short value) noexcept nogil

cdef enum:
    PREFETCH_AHEAD = 16
    CODES = 256
    OUTCOMES = NOTIFY_OUTCOME_THROTTLED + 1
    # PostgreSQL's type numbers (src/include/catalog/pg_type.dat).
    OID_INT2 = 21
    OID_INT8 = 20
    OID_TEXT = 25
    # An array's head: dimensions, has-null flag, element type, length, lower bound; 4 bytes each.
    ARRAY_HEAD = 20

cdef enum Column:
    COLUMN_PAYMENT_ID
    COLUMN_AMOUNT
    COLUMN_PAID_AT
    COLUMN_RECEIVED_AT


cdef int by_payment_id(const void *left, const void *right) noexcept nogil:
    cdef int64_t a = (<const pick_t *>left).payment_id
    cdef int64_t b = (<const pick_t *>right).payment_id
    return (a > b) - (a < b)


cdef inline int64_t pick_int8(const pick_t *pick, int column) noexcept nogil:
    if column == COLUMN_PAYMENT_ID:
        return pick.payment_id
    if column == COLUMN_AMOUNT:
        return pick.note.amount_minor
    if column == COLUMN_PAID_AT:
        return pick.note.paid_at_ms
    return pick.note.received_at_ms


cdef inline char *put32(char *at, uint32_t value) noexcept nogil:
    value = swap32(value)
    memcpy(at, &value, 4)
    return at + 4


cdef inline char *put_head(char *at, bint has_null, uint32_t kind, Py_ssize_t count) noexcept nogil:
    at = put32(at, 1)
    at = put32(at, has_null)
    at = put32(at, kind)
    at = put32(at, <uint32_t>count)
    return put32(at, 1)


@cython.final
cdef class Group:
    """See _group.pyi. Belongs to the writer thread, between the index's ``begin`` and ``commit`` or ``rollback``."""

    def __cinit__(self, Index index not None, list pieces not None):
        cdef Batch batch
        cdef Py_ssize_t start, stop, i
        self.index = index
        self.batches = []
        self.slices = <slice_t *>allocate(max(len(pieces), 1), sizeof(slice_t))
        for batch, start, stop in pieces:
            if not 0 <= start <= stop <= batch.count:
                raise ValueError(f"no words {start} to {stop} in a batch of {batch.count}")
            self.batches.append((batch, start))
            self.slices[self.slice_count].notes = batch.notes + start
            self.slices[self.slice_count].data = PyBytes_AS_STRING(batch.data)
            self.slices[self.slice_count].count = stop - start
            for i in range(start, stop):
                # An earlier try of this group may have answered it. What the batch has refused keeps its answer.
                if not batch.notes[i].refused:
                    batch.notes[i].verdict = 0
            self.slice_count += 1
            self.word_count += stop - start
        self.picks = <pick_t *>allocate(max(self.word_count, 1), sizeof(pick_t))

    def __dealloc__(self):
        release(self.slices)
        release(self.picks)

    def missing(self):
        cdef const slice_t *piece
        cdef Py_ssize_t i, j
        cdef int64_t payment_id
        cdef set found = set()
        for i in range(self.slice_count):
            piece = &self.slices[i]
            for j in range(piece.count):
                if piece.notes[j].verdict:
                    continue
                payment_id = piece.notes[j].payment_id
                if payment_id and not self.index.holds(payment_id):
                    found.add(payment_id)
        return sorted(found)

    def accept(self):
        cdef const slice_t *piece
        cdef Py_ssize_t i, j
        cdef bint sorted_already = True
        for i in range(self.slice_count):
            piece = &self.slices[i]
            for j in range(min(piece.count, <Py_ssize_t>PREFETCH_AHEAD)):
                self.index.prefetch(piece.notes[j].payment_id)
            for j in range(piece.count):
                if piece.count - j > PREFETCH_AHEAD:
                    self.index.prefetch(piece.notes[j + PREFETCH_AHEAD].payment_id)
                if piece.notes[j].verdict == 0:
                    self._try_word(piece, &piece.notes[j])
        for i in range(1, self.pick_count):
            if self.picks[i].payment_id < self.picks[i - 1].payment_id:
                sorted_already = False
                break
        if not sorted_already:
            qsort(self.picks, self.pick_count, sizeof(pick_t), by_payment_id)
        return self.pick_count

    cdef int _try_word(self, const slice_t *piece, note_t *note) except -1:
        """Accept a word where the index alone can tell that it is the first of its payment and in time."""
        cdef capture_t capture
        cdef uint32_t verdict
        if not note.plain or note.payment_id == 0:
            return 0
        capture.payment_id = note.payment_id
        capture.attempt = note.attempt
        capture.account_code = note.account_code
        capture.amount_minor = note.amount_minor
        capture.currency_code = note.currency_code
        capture.paid_at_ms = note.paid_at_ms
        capture.received_at_ms = note.received_at_ms
        verdict = self.index.check_capture(&capture)
        if verdict & 0xFF != NOTIFY_OUTCOME_ACCEPTED or verdict & VERDICT_FLAG_ASK:
            return 0
        self.index.accept_capture(note.payment_id, note.attempt)
        note.verdict = verdict
        note.answer_payment_id = note.payment_id
        note.answer_attempt = note.attempt
        self.untrusted_count += verdict & VERDICT_FLAG_PAID_AT_UNTRUSTED != 0
        self.picks[self.pick_count].payment_id = note.payment_id
        self.picks[self.pick_count].note = note
        self.picks[self.pick_count].data = piece.data
        self.pick_count += 1
        return 1

    def rare(self, lost):
        cdef const slice_t *piece
        cdef Py_ssize_t i, j, start
        cdef note_t *note
        cdef list found = []
        cdef set lost_ids = set(lost)
        for i in range(self.slice_count):
            piece = &self.slices[i]
            batch, start = self.batches[i]
            for j in range(piece.count):
                note = &piece.notes[j]
                if note.refused or (note.verdict and not (lost_ids and note.payment_id in lost_ids)):
                    continue
                note.verdict = 0
                found.append((batch, start + j))
        return found

    def tally(self):
        cdef const slice_t *piece
        cdef Py_ssize_t i, j
        cdef const note_t *note
        cdef uint32_t outcome
        cdef Py_ssize_t place
        cdef uint32_t counts[CODES * OUTCOMES * 2]
        cdef list found = []
        memset(counts, 0, sizeof(counts))
        for i in range(self.slice_count):
            piece = &self.slices[i]
            for j in range(piece.count):
                note = &piece.notes[j]
                outcome = note.verdict & 0xFF
                # What was refused at the door has been counted there.
                if outcome < OUTCOMES and not note.refused:
                    place = (note.account_code * OUTCOMES + outcome) * 2
                    counts[place + (note.verdict & VERDICT_FLAG_REPLAYED != 0)] += 1
        for i in range(CODES * OUTCOMES * 2):
            if counts[i]:
                found.append((i // 2 // OUTCOMES, i // 2 % OUTCOMES, i % 2 == 1, counts[i]))
        return found

    @property
    def untrusted(self):
        return self.untrusted_count

    # ---- paycore.store.protocol.FirstOutcomes ------------------------------------------------------------

    def __len__(self):
        return self.pick_count

    @property
    def payment_ids(self):
        cdef Py_ssize_t i
        return [self.picks[i].payment_id for i in range(self.pick_count)]

    def values(self, Py_ssize_t start, Py_ssize_t stop):
        cdef Py_ssize_t i
        cdef const pick_t *pick
        cdef const note_t *note
        cdef list row_values = []
        cdef list currencies = [None] * CODES
        cdef object received_at = None
        cdef int64_t received_at_ms = 0
        start = min(max(start, 0), self.pick_count)
        for i in range(start, min(stop, self.pick_count)):
            pick = &self.picks[i]
            note = pick.note
            if currencies[note.currency_code] is None:
                currencies[note.currency_code] = PyUnicode_DecodeUTF8(
                    pick.data + note.currency.start, note.currency.size, NULL
                )
            if received_at is None or note.received_at_ms != received_at_ms:
                received_at_ms = note.received_at_ms
                received_at = received_at_ms
            row_values.append(pick.payment_id)
            row_values.append(note.attempt)
            row_values.append(PyUnicode_DecodeUTF8(pick.data + note.trade_no.start, note.trade_no.size, NULL))
            row_values.append(note.amount_minor)
            row_values.append(currencies[note.currency_code])
            row_values.append(None if note.paid_at_ms == ABSENT_MS else note.paid_at_ms)
            row_values.append(received_at)
            row_values.append(1 if note.verdict & VERDICT_FLAG_PAID_AT_UNTRUSTED else 0)
        return row_values

    def arrays(self):
        return (
            self._int8_array(COLUMN_PAYMENT_ID),
            self._int2_array(False),
            self._text_array(False),
            self._int8_array(COLUMN_AMOUNT),
            self._text_array(True),
            self._int8_array(COLUMN_PAID_AT),
            self._int8_array(COLUMN_RECEIVED_AT),
            self._int2_array(True),
        )

    cdef bytes _int8_array(self, int column):
        cdef Py_ssize_t i, nulls = 0
        cdef int64_t value
        cdef uint64_t swapped
        cdef char *at
        if column == COLUMN_PAID_AT:
            for i in range(self.pick_count):
                nulls += self.picks[i].note.paid_at_ms == ABSENT_MS
        cdef bytes made = PyBytes_FromStringAndSize(NULL, ARRAY_HEAD + self.pick_count * 12 - nulls * 8)
        at = put_head(PyBytes_AS_STRING(made), nulls != 0, OID_INT8, self.pick_count)
        for i in range(self.pick_count):
            value = pick_int8(&self.picks[i], column)
            if column == COLUMN_PAID_AT and value == ABSENT_MS:
                at = put32(at, <uint32_t>-1)
                continue
            at = put32(at, 8)
            swapped = swap64(<uint64_t>value)
            memcpy(at, &swapped, 8)
            at += 8
        return made

    cdef bytes _int2_array(self, bint untrusted):
        cdef Py_ssize_t i
        cdef unsigned short value
        cdef char *at
        cdef bytes made = PyBytes_FromStringAndSize(NULL, ARRAY_HEAD + self.pick_count * 6)
        at = put_head(PyBytes_AS_STRING(made), False, OID_INT2, self.pick_count)
        for i in range(self.pick_count):
            if untrusted:
                value = self.picks[i].note.verdict & VERDICT_FLAG_PAID_AT_UNTRUSTED != 0
            else:
                value = <unsigned short>self.picks[i].note.attempt
            at = put32(at, 2)
            value = swap16(value)
            memcpy(at, &value, 2)
            at += 2
        return made

    cdef bytes _text_array(self, bint currency):
        cdef Py_ssize_t i, size = ARRAY_HEAD
        cdef const note_t *note
        cdef char *at
        for i in range(self.pick_count):
            note = self.picks[i].note
            size += 4 + (note.currency.size if currency else note.trade_no.size)
        cdef bytes made = PyBytes_FromStringAndSize(NULL, size)
        at = put_head(PyBytes_AS_STRING(made), False, OID_TEXT, self.pick_count)
        for i in range(self.pick_count):
            note = self.picks[i].note
            span = note.currency if currency else note.trade_no
            at = put32(at, span.size)
            memcpy(at, self.picks[i].data + span.start, span.size)
            at += span.size
        return made


def account_codes(Batch batch not None, positions):
    cdef Py_ssize_t position
    cdef list codes = []
    for position in positions:
        if not 0 <= position < batch.count:
            raise IndexError(f"no word {position} in a batch of {batch.count}")
        codes.append(batch.notes[position].account_code)
    return codes


def pending_from(Batch batch not None, Py_ssize_t start):
    cdef Py_ssize_t position
    return [position for position in range(max(start, 0), batch.count) if not batch.notes[position].refused]
