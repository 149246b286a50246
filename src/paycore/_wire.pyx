# cython: language_level=3, wraparound=False, cdivision=True, embedsignature=True, embedsignature.format=python
"""Notify on the wire: bytes to C records without a Python object for each field, and answers to bytes.

_notes reads; here are the classes that Python sees, what learns in another way than from bytes, and the writing.

Error contracts: what is ``noexcept`` cannot fail.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stddef cimport size_t
from libc.stdint cimport INT32_MAX, SIZE_MAX, int32_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from paycore._dedupe cimport (
    MAX_CODE,
    NOTIFY_OUTCOME_INVALID,
    NOTIFY_OUTCOME_THROTTLED,
    VERDICT_FLAG_PAID_AT_UNTRUSTED,
    VERDICT_FLAG_REPLAYED,
)
from paycore._notes cimport (
    PLAIN_HEADERS,
    STATUS_BAD_UTF8,
    STATUS_MALFORMED,
    STATUS_OK,
    Status,
    count_items,
    entry_t,
    finish_value,
    name_t,
    names_place,
    next_header,
    read_items,
    read_note,
    source_t,
)
from paycore._protobuf cimport MAX_DEPTH, varint_size, write_varint

# Field number << 3 | wire type, as the proto files number them.
cdef enum Tag:
    TAG_OUTCOME = 0x08
    TAG_REPLAYED = 0x10
    TAG_UNTRUSTED = 0x18
    TAG_PAYMENT_ID = 0x20
    TAG_ATTEMPT = 0x28
    TAG_VIOLATIONS = 0x32
    TAG_VIOLATION_FIELD = 0x0A
    TAG_VIOLATION_RULE = 0x12
    TAG_BATCH_ANSWERS = 0x0A

cdef enum:
    FIELDS = 14
    # Below this many bytes another thread would gain less than giving the GIL away costs.
    BULK_BYTES = 4096


class MalformedError(ValueError):
    """The bytes are not a message of the type that was asked for."""


# ---- Memory ----------------------------------------------------------------------------------------------

# Every block of this module and of _group is taken and released here, with the GIL held. So a test can make an
# allocation fail.
cdef long long allocations_left = -1   # negative: no bound
cdef Py_ssize_t blocks_held = 0


cdef void *allocate(size_t count, size_t size) except NULL:
    """Return `count` items of zeroed memory, owned by the caller."""
    global allocations_left, blocks_held
    cdef void *block = NULL
    if allocations_left != 0 and count <= SIZE_MAX // size:
        block = PyMem_RawMalloc(count * size)
    if block == NULL:
        raise MemoryError(f"no memory for {count} records")
    memset(block, 0, count * size)
    blocks_held += 1
    allocations_left -= allocations_left > 0
    return block


cdef void release(void *block) noexcept:
    """Give back what allocate returned; NULL is allowed."""
    global blocks_held
    if block != NULL:
        blocks_held -= 1
        PyMem_RawFree(block)


def _fail_allocation_after(long long count):
    """For tests only: let ``count`` more allocations succeed, then fail all; a negative count ends that."""
    global allocations_left
    allocations_left = max(count, -1)


def _blocks_held():
    """For tests only: how many blocks of memory this module holds."""
    return blocks_held


# ---- Names to codes --------------------------------------------------------------------------------------

cdef int names_fill(names_t *names, list entries) except -1:
    """Make a table of (first, second, code), whose bytes the caller keeps. `names` must be empty."""
    cdef size_t slots = 2
    cdef name_t name
    cdef bytes first, second
    while slots < 2 * <size_t>len(entries):
        slots *= 2
    names.slots = <name_t *>allocate(slots, sizeof(name_t))
    names.mask = slots - 1
    for first, second, code in entries:
        if not 1 <= code <= MAX_CODE:
            raise ValueError(f"code must be 1 to {MAX_CODE}, not {code}")
        name.first = <const uint8_t *>PyBytes_AS_STRING(first)
        name.first_size = len(first)
        name.second = <const uint8_t *>PyBytes_AS_STRING(second)
        name.second_size = len(second)
        name.code = code
        names_place(names, &name)
    return 0


cdef void names_free(names_t *names) noexcept:
    """Release the memory; the table may then only be filled again."""
    release(names.slots)
    names.slots = NULL


cdef int check(Status status, str name) except -1:
    """Raise MalformedError unless all went well."""
    if status == STATUS_OK:
        return 0
    why = "a text is not UTF-8" if status == STATUS_BAD_UTF8 else "the bytes are malformed"
    raise MalformedError(f"not a paycore.v1.{name}: {why}")


# ---- Writing ---------------------------------------------------------------------------------------------

cdef inline size_t answer_size(const note_t *note) noexcept nogil:
    """The length of a NotifyResponse without its violations. What is 0 or False is not written."""
    cdef size_t size = 1 + varint_size(note.verdict & 0xFF)
    if note.verdict & VERDICT_FLAG_REPLAYED:
        size += 2
    if note.verdict & VERDICT_FLAG_PAID_AT_UNTRUSTED:
        size += 2
    if note.answer_payment_id:
        size += 1 + varint_size(<uint64_t>note.answer_payment_id)
    if note.answer_attempt:
        size += 1 + varint_size(<uint64_t><int64_t>note.answer_attempt)
    return size


cdef inline uint8_t *write_field(uint8_t *to, uint8_t tag, uint64_t value) noexcept nogil:
    to[0] = tag
    return write_varint(to + 1, value)


cdef inline uint8_t *write_answer(uint8_t *to, const note_t *note) noexcept nogil:
    """Write answer_size bytes: the fields in the order of their numbers, as the library does."""
    to = write_field(to, TAG_OUTCOME, note.verdict & 0xFF)
    if note.verdict & VERDICT_FLAG_REPLAYED:
        to = write_field(to, TAG_REPLAYED, 1)
    if note.verdict & VERDICT_FLAG_PAID_AT_UNTRUSTED:
        to = write_field(to, TAG_UNTRUSTED, 1)
    if note.answer_payment_id:
        to = write_field(to, TAG_PAYMENT_ID, <uint64_t>note.answer_payment_id)
    if note.answer_attempt:
        to = write_field(to, TAG_ATTEMPT, <uint64_t><int64_t>note.answer_attempt)
    return to


cdef bytes sized(uint8_t tag, bytes content):
    """Return a field that is given by its length."""
    cdef uint8_t head[11]
    cdef uint8_t *end = write_field(head, tag, <uint64_t>len(content))
    return PyBytes_FromStringAndSize(<char *>head, end - head) + content


cdef bytes violation_bytes(str field, str rule):
    """Return one FieldViolation as an entry of `violations`."""
    content = b""
    if field:
        content += sized(TAG_VIOLATION_FIELD, field.encode())
    if rule:
        content += sized(TAG_VIOLATION_RULE, rule.encode())
    return sized(TAG_VIOLATIONS, content)


cdef dict headers_of(Batch batch, const note_t *note):
    """Read the headers of a notification that has been read once: nothing in it is malformed."""
    cdef source_t source
    cdef entry_t entry
    cdef const uint8_t *at
    cdef const uint8_t *end
    cdef dict headers = {}
    source.start = <const uint8_t *>PyBytes_AS_STRING(batch.data)
    end = source.start + note.item.start + note.item.size
    at = next_header(&source, source.start + note.item.start, end, &entry)
    while at != NULL:
        headers[batch.text(entry.key)] = batch.text(entry.value)
        at = next_header(&source, at, end, &entry)
    return headers


cdef bytes violations_of(Batch batch, Py_ssize_t position):
    if batch.violations is None:
        return b""
    return batch.violations.get(position, b"")


cdef int require_answers(Batch batch) except -1:
    cdef Py_ssize_t i
    for i in range(batch.count):
        if batch.notes[i].verdict & 0xFF == 0:
            raise RuntimeError(f"notification {i} has no answer")
    return 0


# ---- Values ----------------------------------------------------------------------------------------------

cdef void open_source(Decoder decoder, source_t *source, bytes data, int64_t received_at_ms) noexcept:
    """Begin to read. The table's first slot stands for "none yet": what is not that name is looked up."""
    source.start = <const uint8_t *>PyBytes_AS_STRING(data)
    source.accounts = &decoder.accounts
    source.currencies = &decoder.currencies
    source.last_account = decoder.accounts.slots
    source.last_currency = decoder.currencies.slots
    source.received_at_ms = received_at_ms


cdef object place_value(note_t *note, value, list parts, start):
    """Take in one notification's numbers, and note where in Batch.data its texts will stand."""
    cdef span_t *spans[6]
    cdef int i
    channel, account, order_no, result, amount_minor, currency, trade_no = value[:7]
    paid_at_ms, received_at_ms, source, _, _, raw, _ = value[7:FIELDS]
    note.result = result
    note.amount_minor = amount_minor
    note.paid_at_ms = paid_at_ms
    note.received_at_ms = received_at_ms
    note.source = source
    spans[:] = [&note.channel, &note.account, &note.order_no, &note.currency, &note.trade_no, &note.raw]
    # A lone surrogate has no UTF-8; it goes on as it is, and makes its notification a suspect.
    texts = [text.encode("utf-8", "surrogatepass") for text in (channel, account, order_no, currency, trade_no)]
    texts.append(raw)
    for i, text in enumerate(texts):
        if start + len(text) > INT32_MAX:
            raise OverflowError("the texts of all notifications must have less than 2 GiB")
        spans[i].start = start
        spans[i].size = len(text)
        start += len(text)
    parts.extend(texts)
    return start


cdef bint are_plain_headers(str headers) except -1:
    """Whether headers as JSON text surely fit, and hold no NUL, which JSON writes as an escape."""
    return len(headers) * 4 <= PLAIN_HEADERS and "\\u0000" not in headers


# ---- The classes -----------------------------------------------------------------------------------------

cdef class Batch:
    """Notifications and their answers; see _wire.pyi for what each method owes.

    No lock: whoever judges a batch is alone with it until its answers are written.
    """

    def __dealloc__(self):
        if self.notes != &self.single:
            release(self.notes)

    cdef int _reserve(self, Py_ssize_t count) except -1:
        """Make room for records of zeros, once."""
        self.notes = &self.single if count == 1 else <note_t *>allocate(count, sizeof(note_t)) if count else NULL
        self.count = count
        return 0

    cdef note_t *_at(self, Py_ssize_t position) except NULL:
        if not 0 <= position < self.count:
            raise IndexError(f"position must be 0 to {self.count - 1}, not {position}")
        return &self.notes[position]

    def __len__(self):
        return self.count

    def suspects(self):
        cdef Py_ssize_t i
        return [i for i in range(self.count) if not self.notes[i].plain]

    def pending(self):
        cdef Py_ssize_t i, count = 0
        for i in range(self.count):
            count += not self.notes[i].refused
        return count

    def notification(self, Py_ssize_t position):
        cdef note_t *note = self._at(position)
        if self.values is not None:
            return tuple(self.values[position])
        return (
            self.text(note.channel),
            self.text(note.account),
            self.text(note.order_no),
            note.result,
            note.amount_minor,
            self.text(note.currency),
            self.text(note.trade_no),
            note.paid_at_ms,
            note.received_at_ms,
            note.source,
            "",
            "",
            PyBytes_FromStringAndSize(PyBytes_AS_STRING(self.data) + note.raw.start, note.raw.size),
            headers_of(self, note),
        )

    def _record(self, Py_ssize_t position):
        cdef note_t *note = self._at(position)
        return note.payment_id, note.attempt, note.account_code, note.currency_code

    def answer(self, Py_ssize_t position, uint32_t verdict, int64_t payment_id=0, int32_t attempt=0):
        cdef note_t *note = self._at(position)
        if note.refused:
            raise ValueError(f"notification {position} is refused already")
        note.verdict = verdict
        note.answer_payment_id = payment_id
        note.answer_attempt = attempt

    def refuse(self, Py_ssize_t position, uint32_t outcome, violations=()):
        cdef note_t *note = self._at(position)
        if outcome != NOTIFY_OUTCOME_INVALID and outcome != NOTIFY_OUTCOME_THROTTLED:
            raise ValueError(f"only INVALID and THROTTLED refuse a notification, not {outcome}")
        said = b"".join([violation_bytes(field, rule) for field, rule in violations])
        if self.violations is None:
            self.violations = {}
        self.violations[position] = said
        note.verdict = outcome
        note.answer_payment_id = 0
        note.answer_attempt = 0
        note.refused = 1

    def verdict(self, Py_ssize_t position):
        cdef note_t *note = self._at(position)
        return note.verdict, note.answer_payment_id, note.answer_attempt

    def encode_one(self):
        cdef uint8_t buffer[64]
        cdef uint8_t *end
        if self.count != 1:
            raise ValueError(f"a batch of one is needed, not of {self.count}")
        require_answers(self)
        end = write_answer(buffer, self.notes)
        return PyBytes_FromStringAndSize(<char *>buffer, end - buffer) + violations_of(self, 0)

    def encode(self):
        cdef Py_ssize_t i
        cdef size_t size, total = 0
        cdef bytes said, encoded
        cdef uint8_t *to
        require_answers(self)
        for i in range(self.count):
            size = answer_size(&self.notes[i])
            if self.notes[i].refused:
                size += <size_t>len(violations_of(self, i))
            total += 1 + varint_size(size) + size
        encoded = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
        to = <uint8_t *>PyBytes_AS_STRING(encoded)
        for i in range(self.count):
            said = violations_of(self, i) if self.notes[i].refused else b""
            to = write_field(to, TAG_BATCH_ANSWERS, answer_size(&self.notes[i]) + <size_t>len(said))
            to = write_answer(to, &self.notes[i])
            memcpy(to, PyBytes_AS_STRING(said), len(said))
            to += len(said)
        return encoded


cdef class Decoder:
    """Bytes to batches; see _wire.pyi. Never changes once made: threads may share it."""

    def __cinit__(self, accounts, currencies):
        pairs = [(channel.encode(), account.encode(), code) for (channel, account), code in accounts.items()]
        names = [(currency.encode(), b"", code) for currency, code in currencies.items()]
        self.kept = [pairs, names]
        names_fill(&self.accounts, pairs)
        names_fill(&self.currencies, names)

    def __dealloc__(self):
        names_free(&self.accounts)
        names_free(&self.currencies)

    def notify(self, bytes data not None, int64_t received_at_ms):
        cdef Batch batch = Batch.__new__(Batch)
        cdef source_t source
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        if size > INT32_MAX:
            check(STATUS_MALFORMED, "NotifyRequest")
        open_source(self, &source, data, received_at_ms)
        batch._reserve(1)
        check(read_note(&source, source.start, source.start + size, MAX_DEPTH, batch.notes), "NotifyRequest")
        batch.data = data
        batch.total = 1
        return batch

    def notify_batch(self, bytes data not None, int64_t received_at_ms, Py_ssize_t limit):
        if limit < 0:
            raise ValueError(f"limit must not be negative, not {limit}")
        return self._decode_batch(data, received_at_ms, limit)

    cdef Batch _decode_batch(self, bytes data, int64_t received_at_ms, Py_ssize_t limit):
        cdef Batch batch = Batch.__new__(Batch)
        cdef source_t source
        cdef const uint8_t *end
        cdef Status status
        if PyBytes_GET_SIZE(data) > INT32_MAX:
            check(STATUS_MALFORMED, "NotifyBatchRequest")
        open_source(self, &source, data, received_at_ms)
        end = source.start + PyBytes_GET_SIZE(data)
        if PyBytes_GET_SIZE(data) < BULK_BYTES:
            check(count_items(source.start, end, &batch.total), "NotifyBatchRequest")
            batch._reserve(min(batch.total, limit))
            status = read_items(&source, source.start, end, batch.notes, batch.count)
        else:
            with nogil:
                status = count_items(source.start, end, &batch.total)
            check(status, "NotifyBatchRequest")
            batch._reserve(min(batch.total, limit))
            # Nobody else knows the batch yet, the bytes never change, and neither do the tables of names.
            with nogil:
                status = read_items(&source, source.start, end, batch.notes, batch.count)
        check(status, "NotifyBatchRequest")
        batch.data = data
        return batch

    def of_values(self, notifications not None):
        cdef Batch batch = Batch.__new__(Batch)
        cdef Py_ssize_t position
        cdef source_t source
        batch.values = list(notifications)
        batch.total = len(batch.values)
        batch._reserve(batch.total)
        # Batch.data as it grows: the texts of each notification, its raw message after them.
        parts = []
        start = 0
        for position in range(batch.total):
            start = place_value(&batch.notes[position], batch.values[position], parts, start)
        batch.data = b"".join(parts)
        for position in range(batch.total):
            open_source(self, &source, batch.data, batch.notes[position].received_at_ms)
            finish_value(&source, are_plain_headers(batch.values[position][FIELDS - 1]), &batch.notes[position])
        return batch
