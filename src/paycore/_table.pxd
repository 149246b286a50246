# cython: language_level=3
"""The table of the index: payment_id -> 32 bytes, in segments that grow one at a time.

What every check walks through stands here, inline, so that the modules which cimport it pay for no call.

The high bits of a payment's hash pick the segment, the 32 bits below them its place in it, as a fraction of the
segment's slots: so a segment may have any number of slots, and its entries lie nearly in the order of their
hashes, which makes rebuilding one a walk forward through memory.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define PAYCORE_TOP_BIT ((uint64_t)1 << 63)
    #if defined(__GNUC__) || defined(__clang__)
    /* To GCC a function that does nothing but prefetch has no effect, and it leaves out the calls (12.2, -O2). */
    #define paycore_prefetch(address) do { __builtin_prefetch(address); __asm__ volatile(""); } while (0)
    #else
    #define paycore_prefetch(address) ((void)(address))
    #endif
    """
    const uint64_t TOP_BIT "PAYCORE_TOP_BIT"
    void paycore_prefetch(const void *address) noexcept nogil

cdef enum:
    AMOUNT_BITS = 48
    EXPIRY_BITS = 32
    ACCOUNT_3_SHIFT = 32
    CURRENCY_SHIFT = 40
    STATE_SHIFT = 48
    KEPT_SHIFT = 50
    ATTEMPTS_SHIFT = 56
    PINNED_SHIFT = 62
    STATE_OPEN = 1

cdef struct entry_t:
    # 32 bytes, two in a cache line. Bits from the lowest up:
    # key    payment_id 63; 0 is an empty slot; bit 63 alone is a tombstone.
    # mask   bit (attempt - 1): the attempt has a judged capture; bit 63: ask the database.
    # money  amount_minor 48, account code of attempt 1: 8, of attempt 2: 8.
    # terms  expiry in ms after the id's own time 32, account code of attempt 3: 8, currency code 8,
    #        state 2, kept attempt 6, number of attempts 6, pinned 1 (only while an eviction chooses), unused 1.
    uint64_t key
    uint64_t mask
    uint64_t money
    uint64_t terms

cdef struct segment_t:
    # An open-addressing table with linear probes. `entries` is owned, on a cache line's start.
    entry_t *entries
    uint32_t slots      # 0 before the first insert
    uint32_t live       # slots that hold a payment
    uint32_t occupied   # live and tombstones: what lengthens a probe
    uint32_t removed    # entries taken out in the running group: rollback may put them back
    uint32_t changes    # 1 + the place of the running group's last record about this segment, or 0
    uint32_t unused     # fills 32 bytes, so that no segment straddles two cache lines

cdef struct table_t:
    # `segments` and `scratch` are owned; NULL before the first insert.
    segment_t *segments
    entry_t *scratch       # where a segment's payments wait while it is rebuilt
    uint64_t scratch_slots
    uint32_t segment_bits
    uint32_t max_slots     # of a segment; 0: no limit
    uint64_t live
    uint64_t evicted
    uint64_t evicted_open

cdef struct change_t:
    # An entry as it was before one change; for a payment that was absent, its key with bit 63 set.
    entry_t before
    uint32_t segment
    uint32_t previous   # 1 + the place of the record before this one about the same segment, or 0

cdef struct undo_log_t:
    # What one group has changed. `records` is owned.
    change_t *records
    uint32_t capacity
    uint32_t count
    bint open


cdef inline uint64_t mix(uint64_t key) noexcept nogil:
    """Spread a key over 64 bits: the finaliser of splitmix64, a bijection."""
    key = (key ^ (key >> 30)) * <uint64_t>0xBF58476D1CE4E5B9ULL
    key = (key ^ (key >> 27)) * <uint64_t>0x94D049BB133111EBULL
    return key ^ (key >> 31)


cdef inline uint32_t segment_number(const table_t *table, uint64_t hashed) noexcept nogil:
    # In two steps: with one segment, a single shift by 64 bits would be undefined.
    return <uint32_t>((hashed >> 32) >> (32 - table.segment_bits))


cdef inline uint32_t slot_of(const table_t *table, const segment_t *segment, uint64_t hashed) noexcept nogil:
    """Where the probe of a hash starts."""
    cdef uint64_t fraction = <uint32_t>(hashed >> (32 - table.segment_bits))
    return <uint32_t>(fraction * segment.slots >> 32)


cdef struct probe_t:
    # Where the search for a key starts; good until the next insert.
    const segment_t *segment
    uint32_t slot


cdef inline probe_t table_probe(const table_t *table, uint64_t key) noexcept nogil:
    """Start the search for a key. The table must have its directory."""
    cdef uint64_t hashed = mix(key)
    cdef probe_t probe
    probe.segment = &table.segments[segment_number(table, hashed)]
    probe.slot = slot_of(table, probe.segment, hashed)
    return probe


cdef inline bint probe_find(probe_t probe, uint64_t key, entry_t **found) noexcept nogil:
    """Go on with a search; `found` is set only when True is returned."""
    cdef entry_t *entries = probe.segment.entries
    cdef uint32_t slot = probe.slot
    cdef uint32_t left = probe.segment.slots
    if key == 0 or key & TOP_BIT:
        return False
    while left:
        if entries[slot].key == key:
            found[0] = &entries[slot]
            return True
        if entries[slot].key == 0:
            return False
        slot += 1
        if slot == probe.segment.slots:
            slot = 0
        left -= 1
    return False


cdef inline bint table_find(const table_t *table, uint64_t key, entry_t **found) noexcept nogil:
    """Find a payment. `found` points into the table until the next insert; it is set only when True is returned."""
    return table.segments != NULL and probe_find(table_probe(table, key), key, found)


cdef inline void probe_prefetch(probe_t probe) noexcept nogil:
    """Start to fetch what probe_find will read first."""
    paycore_prefetch(&probe.segment.entries[probe.slot])


cdef inline void table_prefetch(const table_t *table, uint64_t key) noexcept nogil:
    """Start to fetch what table_find will read first."""
    if table.segments != NULL:
        probe_prefetch(table_probe(table, key))


cdef inline void undo_push(undo_log_t *log, table_t *table, const entry_t *before) noexcept nogil:
    """Note how an entry is before it changes. The room must have been reserved, the segment must exist."""
    cdef change_t *change = &log.records[log.count]
    change.before = before[0]
    change.segment = segment_number(table, mix(before.key & ~TOP_BIT))
    change.previous = table.segments[change.segment].changes
    log.count += 1
    table.segments[change.segment].changes = log.count


# What changes memory: _table.pyx.
cdef bint table_make(table_t *table, uint32_t segment_bits, int64_t max_bytes) noexcept nogil
cdef bint table_widen(table_t *table, uint64_t capacity) noexcept nogil
cdef bint table_reserve(table_t *table, const undo_log_t *log, uint64_t key) noexcept nogil
cdef void table_insert(table_t *table, const entry_t *fresh) noexcept nogil
cdef void table_remove(table_t *table, entry_t *entry, bint may_return) noexcept nogil
cdef void table_free(table_t *table) noexcept nogil
cdef uint64_t table_capacity(const table_t *table) noexcept nogil
cdef uint64_t table_nbytes(const table_t *table) noexcept nogil

cdef bint undo_reserve(undo_log_t *log) noexcept nogil
cdef uint64_t undo_nbytes(const undo_log_t *log) noexcept nogil
cdef void undo_end(undo_log_t *log, table_t *table) noexcept nogil
cdef void undo_all(undo_log_t *log, table_t *table) noexcept nogil
cdef void undo_free(undo_log_t *log) noexcept nogil
