# cython: language_level=3
"""Protobuf's wire format, as far as _wire needs it: inline functions over borrowed bytes, and no message of ours.

What is accepted, refused and read is what upb does, the decoder in C below the protobuf library (protobuf 7,
upb/wire, read 2026-11): tests/contract/test_wire*.py hold the two together.

A reader is a pair of pointers: ``at``, the next byte, and ``end``, one past the last. Each ``read_`` and ``skip_``
function returns where it stopped, at most ``end``, or NULL where the bytes are malformed; then nothing was
written that may be read. None of them reads at or past ``end``.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef extern from *:
    """
    #define PAYCORE_EACH_BYTE_1 ((uint64_t)0x0101010101010101)
    #define PAYCORE_EACH_BYTE_80 ((uint64_t)0x8080808080808080)
    """
    const uint64_t EACH_BYTE_1 "PAYCORE_EACH_BYTE_1"
    const uint64_t EACH_BYTE_80 "PAYCORE_EACH_BYTE_80"

cdef enum WireType:
    WIRE_VARINT = 0
    WIRE_FIXED64 = 1
    WIRE_LENGTH = 2
    WIRE_GROUP_START = 3
    WIRE_GROUP_END = 4
    WIRE_FIXED32 = 5

cdef enum WireLimits:
    MAX_VARINT_BYTES = 10
    # Tags and lengths are 32-bit numbers, which take five bytes at most, however they are padded.
    MAX_SHORT_VARINT_BYTES = 5
    # How many messages and groups may be open at once, below the outermost message.
    MAX_DEPTH = 100

cdef enum Text:
    # What scan_text says; bits.
    TEXT_PLAIN = 0
    TEXT_HAS_NUL = 1
    TEXT_MALFORMED = 2


# ---- Numbers ---------------------------------------------------------------------------------------------

cdef inline const uint8_t *read_long_varint(
    const uint8_t *at, const uint8_t *end, int max_bytes, uint64_t *value
) noexcept nogil:
    """Read a varint of at most `max_bytes`. Of a tenth byte, what does not fit into 64 bits is dropped."""
    cdef uint64_t found = 0
    cdef int i
    for i in range(max_bytes):
        if at == end:
            return NULL
        found |= <uint64_t>(at[0] & 0x7F) << (7 * i)
        at += 1
        if at[-1] < 0x80:
            value[0] = found
            return at
    return NULL


cdef inline const uint8_t *read_varint(const uint8_t *at, const uint8_t *end, uint64_t *value) noexcept nogil:
    if at != end and at[0] < 0x80:
        value[0] = at[0]
        return at + 1
    return read_long_varint(at, end, MAX_VARINT_BYTES, value)


cdef inline const uint8_t *read_short_varint(
    const uint8_t *at, const uint8_t *end, uint64_t limit, uint32_t *value
) noexcept nogil:
    """Read a varint of at most five bytes that is not above `limit`, itself a 32-bit number."""
    cdef uint64_t found = 0
    if at != end and at[0] < 0x80:
        value[0] = at[0]
        return at + 1
    at = read_long_varint(at, end, MAX_SHORT_VARINT_BYTES, &found)
    if at == NULL or found > limit:
        return NULL
    value[0] = <uint32_t>found
    return at


cdef inline const uint8_t *read_tag(const uint8_t *at, const uint8_t *end, uint32_t *tag) noexcept nogil:
    """Read a field number and a wire type. Field 0 is let through: a group that is skipped may have it."""
    return read_short_varint(at, end, 0xFFFFFFFF, tag)


cdef inline const uint8_t *read_size(const uint8_t *at, const uint8_t *end, uint32_t *size) noexcept nogil:
    """Read the length of what follows; it is at most what is left."""
    at = read_short_varint(at, end, 0x7FFFFFFF, size)
    if at == NULL or size[0] > <size_t>(end - at):
        return NULL
    return at


# ---- What is not known -----------------------------------------------------------------------------------

cdef inline const uint8_t *skip_scalar(const uint8_t *at, const uint8_t *end, uint32_t tag) noexcept nogil:
    """Step over a value that is no group."""
    cdef uint64_t number = 0
    cdef uint32_t size = 0
    if tag & 7 == WIRE_VARINT:
        return read_varint(at, end, &number)
    if tag & 7 == WIRE_LENGTH:
        at = read_size(at, end, &size)
        if at != NULL:
            return at + size
    elif tag & 7 == WIRE_FIXED64 and end - at >= 8:
        return at + 8
    elif tag & 7 == WIRE_FIXED32 and end - at >= 4:
        return at + 4
    return NULL


cdef inline const uint8_t *skip_group(
    const uint8_t *at, const uint8_t *end, uint32_t tag, int depth
) noexcept nogil:
    """Step over a group up to the end tag of its field, with at most `depth` groups open at once."""
    cdef uint32_t opened[MAX_DEPTH]
    cdef int count = 1
    if depth < 1:
        return NULL
    opened[0] = tag
    while count:
        at = read_tag(at, end, &tag)
        if at == NULL:
            return NULL
        if tag & 7 == WIRE_GROUP_START:
            if count == depth or count == MAX_DEPTH:
                return NULL
            opened[count] = tag
            count += 1
        elif tag & 7 == WIRE_GROUP_END:
            count -= 1
            if tag >> 3 != opened[count] >> 3:
                return NULL
        else:
            at = skip_scalar(at, end, tag)
            if at == NULL:
                return NULL
    return at


cdef inline const uint8_t *skip_value(
    const uint8_t *at, const uint8_t *end, uint32_t tag, int depth
) noexcept nogil:
    """Step over the value of a message's field that is not known; `depth` levels may still be opened."""
    if tag >> 3 == 0:
        return NULL
    if tag & 7 == WIRE_GROUP_START:
        return skip_group(at, end, tag, depth)
    return skip_scalar(at, end, tag)


# ---- Text ------------------------------------------------------------------------------------------------

cdef inline bint is_utf8(const uint8_t *at, const uint8_t *end) noexcept nogil:
    """Whether bytes are UTF-8: no surrogates, nothing longer than need be, nothing above U+10FFFF."""
    cdef uint8_t lead, low, high
    cdef int size, i
    while at != end:
        lead = at[0]
        if lead < 0x80:
            at += 1
            continue
        if lead < 0xC2 or lead > 0xF4:
            return False
        size = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        if end - at < size:
            return False
        # The second byte tells a long form, a surrogate or too high a number.
        low = 0xA0 if lead == 0xE0 else 0x90 if lead == 0xF0 else 0x80
        high = 0x9F if lead == 0xED else 0x8F if lead == 0xF4 else 0xBF
        if at[1] < low or at[1] > high:
            return False
        for i in range(2, size):
            if at[i] & 0xC0 != 0x80:
                return False
        at += size
    return True


cdef inline int scan_text(const uint8_t *at, size_t size) noexcept nogil:
    """Say what a text holds: Text bits. Eight bytes at a time, the last eight perhaps for the second time."""
    cdef const uint8_t *start = at
    cdef const uint8_t *last
    cdef uint64_t word
    cdef uint64_t some = 0, zeros = 0
    cdef uint32_t half = 0
    if size >= 8:
        last = at + size - 8
        while at < last:
            memcpy(&word, at, 8)
            some |= word
            zeros |= (word - EACH_BYTE_1) & ~word
            at += 8
        memcpy(&word, last, 8)
    elif size >= 4:
        memcpy(&half, at, 4)
        word = half
        memcpy(&half, at + size - 4, 4)
        word |= <uint64_t>half << 32
    elif size:
        # First, middle and last byte are all there are; the rest of the word is neither NUL nor above ASCII.
        word = EACH_BYTE_1 << 24 | <uint64_t>at[0] | <uint64_t>at[size >> 1] << 8 | <uint64_t>at[size - 1] << 16
    else:
        return TEXT_PLAIN
    some |= word
    zeros |= (word - EACH_BYTE_1) & ~word
    if some & EACH_BYTE_80 and not is_utf8(start, start + size):
        return TEXT_MALFORMED
    return TEXT_HAS_NUL if zeros & EACH_BYTE_80 else TEXT_PLAIN


# ---- Writing ---------------------------------------------------------------------------------------------

cdef inline size_t varint_size(uint64_t value) noexcept nogil:
    """How many bytes write_varint needs, 1 to 10."""
    cdef size_t size = 1
    while value >= 0x80:
        value >>= 7
        size += 1
    return size


cdef inline uint8_t *write_varint(uint8_t *to, uint64_t value) noexcept nogil:
    """Write a varint and return where it ends; the caller has made room."""
    while value >= 0x80:
        to[0] = <uint8_t>(value | 0x80)
        value >>= 7
        to += 1
    to[0] = <uint8_t>value
    return to + 1
