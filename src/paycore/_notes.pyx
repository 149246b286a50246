# cython: language_level=3, wraparound=False, cdivision=True
"""Notify's requests from bytes to C records: what _wire hands out, read without the GIL and without an allocation.

Accepts, refuses and reads exactly as the protobuf library does, upb's odd cases included: a map entry that holds
an unknown field is no entry, and a tenth byte of a varint may say anything. The library is the oracle of
tests/contract/test_wire.py and test_wire_fuzz.py.

It knows the messages and the forms of names and numbers, and nothing of rules about money. It clears what breaks
no rule at sight (``plain``); usecases/notify.py looks at the rest rule by rule.

No function here can fail but for what it returns: a Status, NULL or False.
"""

from libc.stdint cimport INT64_MAX, uint64_t
from libc.string cimport memcmp, memcpy, memset

from paycore._dedupe cimport MAX_ATTEMPTS
from paycore._protobuf cimport (
    MAX_DEPTH,
    TEXT_HAS_NUL,
    TEXT_MALFORMED,
    WIRE_LENGTH,
    read_size,
    read_tag,
    read_varint,
    scan_text,
    skip_value,
)

cdef extern from *:
    """
    #define PAYCORE_MIN_SECONDS ((int64_t)-62135596800)
    #define PAYCORE_MAX_SECONDS ((int64_t)253402300799)
    #define PAYCORE_EACH_BYTE(byte) ((uint64_t)0x0101010101010101 * (byte))
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define paycore_from_little(word) __builtin_bswap64(word)
    #else
    #define paycore_from_little(word) (word)
    #endif
    """
    # The range of a valid Timestamp: from 0001-01-01T00:00:00Z on, and before the year 10000.
    const int64_t MIN_SECONDS "PAYCORE_MIN_SECONDS"
    const int64_t MAX_SECONDS "PAYCORE_MAX_SECONDS"
    uint64_t each_byte "PAYCORE_EACH_BYTE"(uint64_t byte) noexcept nogil
    uint64_t from_little "paycore_from_little"(uint64_t word) noexcept nogil

# Bit (field number): the fields of NotifyRequest that are texts, and all of them that are given by their length.
cdef enum Fields:
    FIELD_COUNT = 11
    TEXT_FIELDS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 7
    SIZED_FIELDS = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10

# Field number << 3 | wire type, as the proto files number them.
cdef enum Tag:
    TAG_BATCH_NOTIFICATIONS = 0x0A
    TAG_CHANNEL = 0x0A
    TAG_ACCOUNT = 0x12
    TAG_ORDER_NO = 0x1A
    TAG_RESULT = 0x20
    TAG_AMOUNT = 0x28
    TAG_CURRENCY = 0x32
    TAG_TRADE_NO = 0x3A
    TAG_PAID_AT = 0x42
    TAG_RAW = 0x4A
    TAG_HEADERS = 0x52
    TAG_TIMESTAMP_SECONDS = 0x08
    TAG_TIMESTAMP_NANOS = 0x10
    TAG_ENTRY_KEY = 0x0A
    TAG_ENTRY_VALUE = 0x12

# What a plain notification may have at most, in bytes: at most what usecases/notify.py allows in characters.
cdef enum PlainLimits:
    PLAIN_CHANNEL = 32
    PLAIN_TEXT = 64
    PLAIN_CURRENCY = 16
    PLAIN_RAW = 65536

cdef enum:
    # JSON writes a byte in six at most, and a pair with two pairs of quotes, a colon and a comma.
    JSON_PER_BYTE = 6
    JSON_PER_PAIR = 6
    RESULT_SUCCESS = 1
    SOURCE_NOTIFICATION = 1
    ABSENT_MS = -1
    NANOS_PER_MS = 1000000
    MAX_NANOS = 999999999
    MIN_ORDER_NO = 3
    MAX_ORDER_NO = 21


# ---- Names to codes --------------------------------------------------------------------------------------

cdef inline uint64_t edges(const uint8_t *at, size_t size) noexcept nogil:
    """Mix the first and the last eight bytes of a name with its length; of a short one, all there is."""
    cdef uint64_t head = 0, tail = 0
    cdef uint32_t half = 0
    if size >= 8:
        memcpy(&head, at, 8)
        memcpy(&tail, at + size - 8, 8)
    elif size >= 4:
        memcpy(&half, at, 4)
        head = half
        memcpy(&half, at + size - 4, 4)
        tail = half
    elif size:
        head = <uint64_t>at[0] | <uint64_t>at[size >> 1] << 8 | <uint64_t>at[size - 1] << 16
    return (head + size) * <uint64_t>0x9E3779B97F4A7C15ULL ^ tail * <uint64_t>0xC2B2AE3D27D4EB4FULL


cdef inline size_t hash_name(
    const uint8_t *first, size_t first_size, const uint8_t *second, size_t second_size
) noexcept nogil:
    """Spread a name. Names come from the configuration: nobody else can make them collide."""
    cdef uint64_t spread = edges(first, first_size) * <uint64_t>0x165667B19E3779F9ULL + edges(second, second_size)
    return <size_t>(spread ^ spread >> 32)


cdef inline bint is_name(
    const name_t *name, const uint8_t *first, size_t first_size, const uint8_t *second, size_t second_size
) noexcept nogil:
    return (
        name.code != 0
        and name.first_size == first_size
        and name.second_size == second_size
        and memcmp(name.first, first, first_size) == 0
        and memcmp(name.second, second, second_size) == 0
    )


cdef void names_place(names_t *names, const name_t *name) noexcept nogil:
    """Put in a name that is absent. At least half of the slots must be empty."""
    cdef size_t slot = hash_name(name.first, name.first_size, name.second, name.second_size) & names.mask
    while names.slots[slot].code:
        slot = (slot + 1) & names.mask
    names.slots[slot] = name[0]


cdef const name_t *names_find(
    const names_t *names, const uint8_t *first, size_t first_size, const uint8_t *second, size_t second_size
) noexcept nogil:
    """Return the entry of a name; where it is not configured, an empty slot, whose code is 0."""
    cdef size_t slot = hash_name(first, first_size, second, second_size) & names.mask
    cdef const name_t *name = &names.slots[slot]
    while name.code and not is_name(name, first, first_size, second, second_size):
        slot = (slot + 1) & names.mask
        name = &names.slots[slot]
    return name


# ---- Reading ---------------------------------------------------------------------------------------------

cdef struct reading_t:
    # What is known of a notification while its fields are read.
    span_t spans[FIELD_COUNT]  # by field number: the last value of each text, and of `raw`
    int64_t seconds
    int32_t nanos
    bint has_paid_at
    int nuls                  # bit (field number): the field's last value holds NUL
    uint64_t headers_size     # more than the headers have as JSON text


cdef inline span_t span_of(const source_t *source, const uint8_t *at, uint32_t size) noexcept nogil:
    cdef span_t span
    span.start = <uint32_t>(at - source.start)
    span.size = size
    return span


cdef Status read_timestamp(const uint8_t *at, const uint8_t *end, int depth, reading_t *reading) noexcept nogil:
    """Read a Timestamp into what was read before: a field that is split over several messages is one."""
    cdef uint64_t number = 0
    cdef uint32_t tag = 0
    reading.has_paid_at = True
    while at != end:
        at = read_tag(at, end, &tag)
        if at == NULL:
            return STATUS_MALFORMED
        if tag == TAG_TIMESTAMP_SECONDS:
            at = read_varint(at, end, &number)
            reading.seconds = <int64_t>number
        elif tag == TAG_TIMESTAMP_NANOS:
            at = read_varint(at, end, &number)
            reading.nanos = <int32_t><uint32_t>number
        else:
            at = skip_value(at, end, tag, depth)
        if at == NULL:
            return STATUS_MALFORMED
    return STATUS_OK


cdef inline int64_t instant_ms(int64_t seconds, int32_t nanos) noexcept nogil:
    """Read a Timestamp as milliseconds, rounded down. One that is not valid is moved to the nearest valid one.

    Whether it is believed is decided later; to be stored and shown again it has to be a time. The millisecond that
    stands for "not given" lies in 1969, where no pay time is believed anyway: it is moved, too.
    """
    cdef int64_t at_ms
    if seconds < MIN_SECONDS:
        return MIN_SECONDS * 1000
    if seconds > MAX_SECONDS:
        return MAX_SECONDS * 1000 + 999
    at_ms = seconds * 1000 + min(max(nanos, 0), <int32_t>MAX_NANOS) // NANOS_PER_MS
    return at_ms - 1 if at_ms == ABSENT_MS else at_ms


cdef Status read_entry(
    const source_t *source, const uint8_t *at, const uint8_t *end, int depth, entry_t *entry
) noexcept nogil:
    """Read one entry of the headers: a message of a key and a value, either of which may be missing."""
    cdef uint32_t tag = 0, size = 0
    memset(entry, 0, sizeof(entry_t))
    entry.whole = True
    while at != end:
        at = read_tag(at, end, &tag)
        if at == NULL:
            return STATUS_MALFORMED
        if tag != TAG_ENTRY_KEY and tag != TAG_ENTRY_VALUE:
            entry.whole = False
            at = skip_value(at, end, tag, depth)
            if at == NULL:
                return STATUS_MALFORMED
            continue
        at = read_size(at, end, &size)
        if at == NULL:
            return STATUS_MALFORMED
        entry.found |= scan_text(at, size)
        if entry.found & TEXT_MALFORMED:
            return STATUS_BAD_UTF8
        if tag == TAG_ENTRY_KEY:
            entry.key = span_of(source, at, size)
        else:
            entry.value = span_of(source, at, size)
        at += size
    return STATUS_OK


cdef Status read_header(
    const source_t *source, const uint8_t *at, const uint8_t *end, int depth, reading_t *reading
) noexcept nogil:
    """Look at one entry of the headers; the entries themselves are only read when somebody asks for them."""
    cdef entry_t entry
    cdef Status status = read_entry(source, at, end, depth, &entry)
    if status == STATUS_OK:
        reading.headers_size += JSON_PER_PAIR + JSON_PER_BYTE * (<uint64_t>entry.key.size + entry.value.size)
        if entry.found & TEXT_HAS_NUL:
            reading.nuls |= 1 << (TAG_HEADERS >> 3)
    return status


cdef inline bint read_eight_digits(const uint8_t *at, uint64_t *value) noexcept nogil:
    """Append eight decimal digits to a number; False where one of them is none."""
    cdef uint64_t word = 0
    memcpy(&word, at, 8)
    word = from_little(word)
    # A digit is 0x30 to 0x39: its upper half is 3, and still is when 6 is added.
    if (word & each_byte(0xF0)) | (((word + each_byte(0x06)) & each_byte(0xF0)) >> 4) != each_byte(0x33):
        return False
    # Pairs of neighbours become one number each: of two digits, then of four, then of eight.
    word = ((word & each_byte(0x0F)) * (10 << 8 | 1)) >> 8
    word = ((word & <uint64_t>0x00FF00FF00FF00FFULL) * (100 << 16 | 1)) >> 16
    word = ((word & <uint64_t>0x0000FFFF0000FFFFULL) * (<uint64_t>10000 << 32 | 1)) >> 32
    value[0] = value[0] * 100000000 + word
    return True


cdef inline bint read_digits(const uint8_t *at, uint32_t count, uint64_t *value) noexcept nogil:
    """Read a number of `count` decimal digits, at most 19: they fit into 64 bits without a sign."""
    cdef uint32_t i
    value[0] = 0
    for i in range(count & 7):
        if at[i] < c"0" or at[i] > c"9":
            return False
        value[0] = value[0] * 10 + (at[i] - c"0")
    i = count & 7
    while i < count:
        if not read_eight_digits(at + i, value):
            return False
        i += 8
    return True


cdef inline void read_order_no(const uint8_t *at, uint32_t size, note_t *note) noexcept nogil:
    """Read a channel order number, as paycore.domain.ids.parse_channel_order_no does; 0 and 0 where it is not ours."""
    cdef uint64_t payment_id = 0, attempt = 0
    if size < MIN_ORDER_NO or size > MAX_ORDER_NO or at[0] == c"0":
        return
    if not read_digits(at, size - 2, &payment_id) or not read_digits(at + size - 2, 2, &attempt):
        return
    if payment_id <= <uint64_t>INT64_MAX and 1 <= attempt <= MAX_ATTEMPTS:
        note.payment_id = <int64_t>payment_id
        note.attempt = <int32_t>attempt


cdef inline void find_codes(source_t *source, note_t *note) noexcept nogil:
    """Look up what is configured under the record's names."""
    cdef const uint8_t *channel = source.start + note.channel.start
    cdef const uint8_t *account = source.start + note.account.start
    cdef const uint8_t *currency = source.start + note.currency.start
    if not is_name(source.last_account, channel, note.channel.size, account, note.account.size):
        source.last_account = names_find(source.accounts, channel, note.channel.size, account, note.account.size)
    if not is_name(source.last_currency, currency, note.currency.size, currency, 0):
        source.last_currency = names_find(source.currencies, currency, note.currency.size, currency, 0)
    note.account_code = source.last_account.code
    note.currency_code = source.last_currency.code


cdef inline bint has_plain_terms(const note_t *note) noexcept nogil:
    """Whether amount, result and lengths break no rule; what the texts hold is looked at elsewhere."""
    return (
        note.result == RESULT_SUCCESS
        and note.amount_minor > 0
        and 0 < note.trade_no.size <= PLAIN_TEXT
        and note.channel.size <= PLAIN_CHANNEL
        and note.account.size <= PLAIN_TEXT
        and note.order_no.size <= PLAIN_TEXT
        and note.currency.size <= PLAIN_CURRENCY
        and note.raw.size <= PLAIN_RAW
        and note.source == SOURCE_NOTIFICATION
    )


cdef inline void finish(source_t *source, const reading_t *reading, note_t *note) noexcept nogil:
    """Fill in what follows from the fields once all are read."""
    note.channel = reading.spans[TAG_CHANNEL >> 3]
    note.account = reading.spans[TAG_ACCOUNT >> 3]
    note.order_no = reading.spans[TAG_ORDER_NO >> 3]
    note.currency = reading.spans[TAG_CURRENCY >> 3]
    note.trade_no = reading.spans[TAG_TRADE_NO >> 3]
    note.raw = reading.spans[TAG_RAW >> 3]
    note.received_at_ms = source.received_at_ms
    note.source = SOURCE_NOTIFICATION
    note.paid_at_ms = instant_ms(reading.seconds, reading.nanos) if reading.has_paid_at else ABSENT_MS
    read_order_no(source.start + note.order_no.start, note.order_no.size, note)
    find_codes(source, note)
    note.plain = has_plain_terms(note) and reading.nuls == 0 and reading.headers_size + 2 <= PLAIN_HEADERS


cdef Status read_parts(
    const source_t *source, const uint8_t *at, const uint8_t *end, uint32_t tag, int depth, reading_t *reading
) noexcept nogil:
    """Read the value of a field that is itself a message: `paid_at`, or one entry of `headers`."""
    if tag == TAG_PAID_AT:
        return read_timestamp(at, end, depth, reading)
    return read_header(source, at, end, depth, reading)


cdef Status read_note(
    source_t *source, const uint8_t *at, const uint8_t *end, int depth, note_t *note
) noexcept nogil:
    """Read a NotifyRequest into a record of zeros. `depth`: how many levels may still be opened in it."""
    cdef reading_t reading
    cdef Status status
    cdef uint64_t number = 0
    cdef uint32_t tag = 0, size = 0, field
    cdef int found
    memset(&reading, 0, sizeof(reading_t))
    note.item = span_of(source, at, <uint32_t>(end - at))
    while at != end:
        at = read_tag(at, end, &tag)
        if at == NULL:
            return STATUS_MALFORMED
        field = tag >> 3
        if tag & 7 == WIRE_LENGTH and field < FIELD_COUNT and SIZED_FIELDS >> field & 1:
            at = read_size(at, end, &size)
            if at == NULL:
                return STATUS_MALFORMED
            if TEXT_FIELDS >> field & 1:
                found = scan_text(at, size)
                if found & TEXT_MALFORMED:
                    return STATUS_BAD_UTF8
                reading.nuls = reading.nuls & ~(1 << field) | found << field
            elif tag != TAG_RAW:
                status = read_parts(source, at, at + size, tag, depth - 1, &reading)
                if status != STATUS_OK:
                    return status
            reading.spans[field] = span_of(source, at, size)
            at += size
            continue
        if tag == TAG_RESULT:
            at = read_varint(at, end, &number)
            note.result = <int32_t><uint32_t>number
        elif tag == TAG_AMOUNT:
            at = read_varint(at, end, &number)
            note.amount_minor = <int64_t>number
        else:
            at = skip_value(at, end, tag, depth)
        if at == NULL:
            return STATUS_MALFORMED
    finish(source, &reading, note)
    return STATUS_OK


cdef Status count_items(const uint8_t *at, const uint8_t *end, Py_ssize_t *count) noexcept nogil:
    """Count the notifications of a NotifyBatchRequest, and see that nothing between them is malformed."""
    cdef uint32_t tag = 0, size = 0
    count[0] = 0
    while at != end:
        at = read_tag(at, end, &tag)
        if at == NULL:
            return STATUS_MALFORMED
        if tag == TAG_BATCH_NOTIFICATIONS:
            at = read_size(at, end, &size)
            count[0] += 1
        else:
            size = 0
            at = skip_value(at, end, tag, MAX_DEPTH)
        if at == NULL:
            return STATUS_MALFORMED
        at += size
    return STATUS_OK


cdef Status read_items(
    source_t *source, const uint8_t *at, const uint8_t *end, note_t *notes, Py_ssize_t count
) noexcept nogil:
    """Read what count_items went over: the first `count` notifications into records, the rest only to see them."""
    cdef note_t ignored
    cdef note_t *note
    cdef Py_ssize_t position = 0
    cdef Status status
    cdef uint32_t tag = 0, size = 0
    while at != end:
        at = read_tag(at, end, &tag)
        if tag != TAG_BATCH_NOTIFICATIONS:
            at = skip_value(at, end, tag, MAX_DEPTH)
            continue
        at = read_size(at, end, &size)
        note = &notes[position] if position < count else &ignored
        if position >= count:
            memset(&ignored, 0, sizeof(note_t))
        status = read_note(source, at, at + size, MAX_DEPTH - 1, note)
        if status != STATUS_OK:
            return status
        position += 1
        at += size
    return STATUS_OK


# ---- For those who have a record -------------------------------------------------------------------------

cdef const uint8_t *next_header(
    const source_t *source, const uint8_t *at, const uint8_t *end, entry_t *entry
) noexcept nogil:
    """Read on to the next entry of the headers, and return where it ends; NULL when there is none left.

    `at` and `end` are of a notification that has been read once, so that nothing in it is malformed.
    """
    cdef uint32_t tag = 0, size = 0
    while at != end:
        at = read_tag(at, end, &tag)
        if tag != TAG_HEADERS:
            at = skip_value(at, end, tag, MAX_DEPTH)
            continue
        at = read_size(at, end, &size)
        read_entry(source, at, at + size, MAX_DEPTH, entry)
        if entry.whole:
            return at + size
        at += size
    return NULL


cdef void finish_value(source_t *source, bint headers_are_plain, note_t *note) noexcept nogil:
    """Fill in what follows from the fields of a record that was not read, but made of values."""
    cdef int found = 0
    read_order_no(source.start + note.order_no.start, note.order_no.size, note)
    find_codes(source, note)
    found |= scan_text(source.start + note.channel.start, note.channel.size)
    found |= scan_text(source.start + note.account.start, note.account.size)
    found |= scan_text(source.start + note.order_no.start, note.order_no.size)
    found |= scan_text(source.start + note.currency.start, note.currency.size)
    found |= scan_text(source.start + note.trade_no.start, note.trade_no.size)
    note.plain = has_plain_terms(note) and found == 0 and headers_are_plain
