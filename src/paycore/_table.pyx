# cython: language_level=3, wraparound=False, cdivision=True
"""The table of the index, where its memory is concerned: growth, eviction, and the undo log of a group.

A leaf that knows entries and nothing of verdicts. The cost of one change is bounded by one segment: when that is
full it is rebuilt, a little larger, or without its oldest payments where a memory limit is reached.

Error contracts: what returns bint returns False when memory ran out and has then changed nothing; nothing else
can fail.
"""

from libc.stdint cimport UINT32_MAX
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

cdef extern from *:
    """
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <unistd.h>
    #ifndef MAP_POPULATE
    #define MAP_POPULATE 0
    #endif
    static void *paycore_map(size_t bytes)
    {
        int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE;
        void *block = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
        return block == MAP_FAILED ? NULL : block;
    }
    /* What the block held is lost where the system cannot move it. */
    static void *paycore_remap(void *block, size_t bytes, size_t fresh_bytes)
    {
    #ifdef MREMAP_MAYMOVE
        void *moved = mremap(block, bytes, fresh_bytes, MREMAP_MAYMOVE);
        return moved == MAP_FAILED ? NULL : moved;
    #else
        void *moved = paycore_map(fresh_bytes);
        if (moved != NULL)
            munmap(block, bytes);
        return moved;
    #endif
    }
    static size_t paycore_page_bytes(void)
    {
        long bytes = sysconf(_SC_PAGESIZE);
        return bytes >= 4096 ? (size_t)bytes : 4096;
    }
    """
    void *paycore_map(size_t count) noexcept nogil
    void *paycore_remap(void *block, size_t count, size_t fresh_count) noexcept nogil
    size_t paycore_page_bytes() noexcept nogil
    int munmap(void *block, size_t count) noexcept nogil
    int posix_memalign(void **block, size_t alignment, size_t count) noexcept nogil

cdef enum:
    CACHE_LINE = 64
    ALLOCATOR_BYTES = 16
    MAPPED_PAGES = 8
    MIN_SLOTS = 8
    UNDO_START = 16
    # A log that one large group has stretched further, to 1.25 MiB, is given back at its end.
    UNDO_KEPT = 1 << 15


# ---- Memory ----------------------------------------------------------------------------------------------

# Every block of the index is taken and released here, by a thread that holds the GIL. So a test can make an
# allocation fail and see that none is lost.
cdef long long allocations_left = -1   # negative: no bound
cdef Py_ssize_t blocks_held = 0
cdef size_t page_bytes = paycore_page_bytes()


cdef inline bint is_mapped(uint64_t wanted) noexcept nogil:
    """Whether a block comes straight from the system.

    A heap would keep what a segment leaves when it grows: blocks of one size, in which the next size has no room.
    """
    return wanted >= MAPPED_PAGES * page_bytes


cdef inline uint64_t block_bytes(uint64_t wanted) noexcept nogil:
    """What a block of so many bytes takes."""
    if is_mapped(wanted):
        return (wanted + page_bytes - 1) // page_bytes * page_bytes
    return wanted + ALLOCATOR_BYTES if wanted else 0


cdef void *allocate(uint64_t wanted) noexcept nogil:
    """Zeroed memory on a cache line's start, owned by the caller; NULL when there is none, or none left to a test."""
    global allocations_left, blocks_held
    cdef void *block = NULL
    if allocations_left == 0:
        return NULL
    if is_mapped(wanted):
        block = paycore_map(block_bytes(wanted))
    elif posix_memalign(&block, CACHE_LINE, wanted) == 0:
        memset(block, 0, wanted)
    else:
        block = NULL
    if block != NULL:
        blocks_held += 1
        allocations_left -= allocations_left > 0
    return block


cdef void release(void *block, uint64_t wanted) noexcept nogil:
    """Give back what allocate returned for `wanted` bytes; NULL is allowed."""
    global blocks_held
    if block == NULL:
        return
    blocks_held -= 1
    if is_mapped(wanted):
        munmap(block, block_bytes(wanted))
    else:
        free(block)


cdef void *move_block(void *block, uint64_t wanted, uint64_t fresh_wanted) noexcept nogil:
    """Exchange a block, which may be NULL, for one of another size, zeroed or not; NULL when there is none.

    Pages are kept where they can be: fresh ones cost more than all else that happens to a segment as it grows.
    """
    global allocations_left
    cdef void *fresh
    if block == NULL or not is_mapped(wanted) or not is_mapped(fresh_wanted):
        fresh = allocate(fresh_wanted)
        if fresh != NULL:
            release(block, wanted)
        return fresh
    if allocations_left == 0:
        return NULL
    fresh = block
    if block_bytes(wanted) != block_bytes(fresh_wanted):
        fresh = paycore_remap(block, block_bytes(wanted), block_bytes(fresh_wanted))
    allocations_left -= fresh != NULL and allocations_left > 0
    return fresh


def _fail_allocation_after(long long count):
    """For tests only: let ``count`` more allocations succeed, then fail all; a negative count ends that."""
    global allocations_left
    allocations_left = max(count, -1)


def _blocks_held():
    """For tests only: how many blocks of memory this module holds."""
    return blocks_held


# ---- Sizes -----------------------------------------------------------------------------------------------

cdef inline uint64_t slot_limit(uint64_t slots) noexcept nogil:
    """How many slots may be occupied: 13 of 16, so that probes stay short. At that, 39 bytes a payment."""
    return slots - (slots * 3 + 15) // 16


cdef uint64_t slots_for(uint64_t payments) noexcept nogil:
    """How many slots a segment is rebuilt with for so many payments: 1.44 each, 46 bytes, in whole pages.

    A sixth more fits before the next rebuild, which is what makes rebuilding cheap for each of them.
    """
    cdef uint64_t slots = max(payments * 23 // 16 + 1, <uint64_t>MIN_SLOTS)
    cdef uint64_t slots_a_page = page_bytes // sizeof(entry_t)
    if is_mapped(slots * sizeof(entry_t)):
        slots -= slots % slots_a_page
        if slot_limit(slots) < payments + payments // 16:
            slots += slots_a_page
    return slots


cdef inline uint64_t segment_count(const table_t *table) noexcept nogil:
    return <uint64_t>1 << table.segment_bits


cdef bint table_make(table_t *table, uint32_t segment_bits, int64_t max_bytes) noexcept nogil:
    """Set up an empty table; it takes no memory before the first insert. max_bytes 0: no limit."""
    cdef uint64_t directory, budget = 0
    table.segments = NULL
    table.segment_bits = segment_bits
    table.max_slots = 0
    table.live = table.evicted = table.evicted_open = 0
    table.scratch = NULL
    table.scratch_slots = 0
    if max_bytes == 0:
        return True
    directory = block_bytes(segment_count(table) * sizeof(segment_t))
    if <uint64_t>max_bytes > directory:
        # Two shares for the scratch, which may hold a segment's payments and a quarter.
        budget = (<uint64_t>max_bytes - directory) // (segment_count(table) + 2)
    if is_mapped(budget):
        budget -= budget % page_bytes
    else:
        budget -= min(budget, <uint64_t>ALLOCATOR_BYTES)
    table.max_slots = <uint32_t>min(max(budget // sizeof(entry_t), <uint64_t>MIN_SLOTS), <uint64_t>UINT32_MAX)
    return True


cdef bint open_table(table_t *table) noexcept nogil:
    """Take the directory of the segments, unless it is there."""
    if table.segments == NULL:
        table.segments = <segment_t *>allocate(segment_count(table) * sizeof(segment_t))
    return table.segments != NULL


cdef bint table_widen(table_t *table, uint64_t capacity) noexcept nogil:
    """Give an empty table room for so many payments; where there are several segments, most probably so."""
    cdef uint64_t each = (capacity + segment_count(table) - 1) // segment_count(table)
    cdef uint64_t slots, spread = 0
    cdef uint32_t number
    if each > UINT32_MAX // 4:
        return False
    if table.segment_bits:
        # A segment gets more than its share by chance: six standard deviations are never seen.
        while spread * spread < 36 * each:
            spread += 1
    slots = slots_for(each + spread)
    if table.max_slots:
        slots = min(slots, <uint64_t>table.max_slots)
    if not open_table(table):
        return False
    for number in range(segment_count(table)):
        if not rebuild(table, &table.segments[number], slots, 0):
            return False
    return True


cdef void table_free(table_t *table) noexcept nogil:
    """Release the memory; the table is then empty and may be used again."""
    cdef uint32_t number
    release(table.scratch, table.scratch_slots * sizeof(entry_t))
    table.scratch = NULL
    table.scratch_slots = 0
    if table.segments == NULL:
        return
    for number in range(segment_count(table)):
        release(table.segments[number].entries, table.segments[number].slots * sizeof(entry_t))
    release(table.segments, segment_count(table) * sizeof(segment_t))
    table.segments = NULL
    table.live = 0


cdef uint64_t table_capacity(const table_t *table) noexcept nogil:
    """How many payments fit before any segment must be rebuilt, if each gets as many as it can take."""
    cdef uint64_t payments = 0
    cdef uint32_t number
    if table.segments != NULL:
        for number in range(segment_count(table)):
            payments += slot_limit(table.segments[number].slots)
    return payments


cdef uint64_t table_nbytes(const table_t *table) noexcept nogil:
    """All memory that the table holds."""
    cdef uint64_t nbytes = block_bytes(table.scratch_slots * sizeof(entry_t))
    cdef uint32_t number
    if table.segments != NULL:
        nbytes += block_bytes(segment_count(table) * sizeof(segment_t))
        for number in range(segment_count(table)):
            nbytes += block_bytes(table.segments[number].slots * sizeof(entry_t))
    return nbytes


# ---- Entries come and go ---------------------------------------------------------------------------------

cdef inline segment_t *segment_of(const table_t *table, uint64_t hashed) noexcept nogil:
    """The segment of a hash. The directory must be there."""
    return &table.segments[segment_number(table, hashed)]


cdef inline void place(table_t *table, segment_t *segment, const entry_t *fresh, uint64_t hashed) noexcept nogil:
    """Put an absent payment into its segment, which must have a slot that is not live."""
    cdef uint32_t slot = slot_of(table, segment, hashed)
    cdef uint32_t left = segment.slots
    cdef uint64_t key
    while left:
        key = segment.entries[slot].key
        if key == 0 or key == TOP_BIT:
            segment.entries[slot] = fresh[0]
            segment.live += 1
            segment.occupied += key == 0
            return
        slot += 1
        if slot == segment.slots:
            slot = 0
        left -= 1


cdef void table_insert(table_t *table, const entry_t *fresh) noexcept nogil:
    """Put in a payment that is absent, and for which there is room."""
    cdef uint64_t hashed = mix(fresh.key)
    place(table, segment_of(table, hashed), fresh, hashed)
    table.live += 1


cdef void table_remove(table_t *table, entry_t *entry, bint may_return) noexcept nogil:
    """Turn a live entry into a tombstone, which stays counted as occupied until the segment is rebuilt.

    may_return: rollback may put it back, so a rebuild keeps room for it.
    """
    cdef segment_t *segment = segment_of(table, mix(entry.key))
    entry.key = TOP_BIT
    segment.live -= 1
    segment.removed += may_return
    table.live -= 1


cdef bint table_reserve(table_t *table, const undo_log_t *log, uint64_t key) noexcept nogil:
    """Make room for one more payment and for all that rollback may put back beside it."""
    cdef segment_t *segment
    cdef uint64_t extra, slots
    if not open_table(table):
        return False
    segment = segment_of(table, mix(key))
    extra = <uint64_t>segment.removed + 1
    if segment.occupied + extra <= slot_limit(segment.slots):
        return True
    slots = slots_for(segment.live + extra)
    if table.max_slots and slots > table.max_slots:
        return make_room_at_the_limit(table, log, segment, extra)
    return rebuild(table, segment, slots, 0)


cdef bint reserve_scratch(table_t *table, uint64_t payments) noexcept nogil:
    """Make room for a segment's payments beside it."""
    cdef entry_t *scratch
    cdef uint64_t wanted = payments + payments // 4 + MIN_SLOTS
    if payments <= table.scratch_slots:
        return True
    scratch = <entry_t *>allocate(wanted * sizeof(entry_t))
    if scratch == NULL:
        return False
    release(table.scratch, table.scratch_slots * sizeof(entry_t))
    table.scratch = scratch
    table.scratch_slots = wanted
    return True


cdef bint rebuild(table_t *table, segment_t *segment, uint64_t slots, uint64_t evict_to_rank) noexcept nogil:
    """Move a segment's payments into `slots` slots, but for those up to a rank that are not pinned."""
    cdef entry_t *entries
    cdef const entry_t *entry
    cdef uint32_t slot, number
    cdef uint32_t kept = 0, evicted = 0, evicted_open = 0
    if slots > UINT32_MAX or not reserve_scratch(table, segment.live):
        return False
    for slot in range(segment.slots):
        entry = &segment.entries[slot]
        if entry.key == 0 or entry.key == TOP_BIT:
            continue
        if evict_to_rank and rank(entry) <= evict_to_rank and not is_pinned(entry):
            evicted += 1
            evicted_open += is_open(entry)
            continue
        table.scratch[kept] = entry[0]
        kept += 1
    entries = <entry_t *>move_block(segment.entries, segment.slots * sizeof(entry_t), slots * sizeof(entry_t))
    if entries == NULL:
        return False
    memset(entries, 0, slots * sizeof(entry_t))
    segment.entries = entries
    segment.slots = <uint32_t>slots
    segment.live = segment.occupied = 0
    for number in range(kept):
        place(table, segment, &table.scratch[number], mix(table.scratch[number].key))
    table.live -= evicted
    table.evicted += evicted
    table.evicted_open += evicted_open
    return True


# ---- Eviction --------------------------------------------------------------------------------------------

cdef inline bint is_open(const entry_t *entry) noexcept nogil:
    return (entry.terms >> STATE_SHIFT) & 3 == STATE_OPEN


cdef inline bint is_pinned(const entry_t *entry) noexcept nogil:
    return (entry.terms >> PINNED_SHIFT) & 1


cdef inline uint64_t rank(const entry_t *entry) noexcept nogil:
    """The order of eviction: finished before open, oldest first, since ids are time-ordered. No two are equal."""
    return entry.key | TOP_BIT if is_open(entry) else entry.key


cdef bint make_room_at_the_limit(
    table_t *table, const undo_log_t *log, segment_t *segment, uint64_t extra
) noexcept nogil:
    """Rebuild a segment within the limit, without as many of its oldest payments as leave an eighth of it free.

    What the running group has touched stays: rollback and the marks of the group count on it. Where that is
    too much, the segment grows over the limit; the first rebuild after the group brings it back.
    """
    cdef uint64_t kept = slot_limit(table.max_slots) * 7 // 8
    cdef uint64_t wanted = segment.live + extra
    cdef uint64_t slots = table.max_slots
    cdef uint64_t victims = 0, evict_to_rank = 0
    cdef bint rebuilt
    if segment.slots < slots and wanted <= slot_limit(slots):
        return rebuild(table, segment, slots, 0)
    if wanted > kept:
        victims = segment.live - mark_pinned(table, log, segment, True)
        victims = min(victims, wanted - kept)
        wanted -= victims
    if victims:
        evict_to_rank = rank_of_oldest(segment, victims)
    if wanted > slot_limit(slots) * 15 // 16:
        slots = slots_for(wanted)
    rebuilt = rebuild(table, segment, slots, evict_to_rank)
    mark_pinned(table, log, segment, False)
    return rebuilt


cdef uint64_t mark_pinned(table_t *table, const undo_log_t *log, const segment_t *segment, bint pinned) noexcept nogil:
    """Mark what the running group has touched in a segment, or take the marks off; return how many changed."""
    cdef uint32_t record = segment.changes
    cdef uint64_t changed = 0
    cdef entry_t *entry = NULL
    while record:
        if table_find(table, log.records[record - 1].before.key & ~TOP_BIT, &entry) and is_pinned(entry) != pinned:
            entry.terms ^= <uint64_t>1 << PINNED_SHIFT
            changed += 1
        record = log.records[record - 1].previous
    return changed


cdef uint64_t rank_of_oldest(const segment_t *segment, uint64_t count) noexcept nogil:
    """The rank of the last of the `count` oldest payments that are not pinned. There must be so many.

    Found byte by byte from the highest, in eight passes whatever the ids are.
    """
    cdef uint32_t with_byte[256]
    cdef uint64_t found = 0, value
    cdef uint32_t slot
    cdef int shift = 56, byte
    while shift >= 0:
        memset(with_byte, 0, sizeof(with_byte))
        for slot in range(segment.slots):
            value = segment.entries[slot].key
            if value == 0 or value == TOP_BIT or is_pinned(&segment.entries[slot]):
                continue
            value = rank(&segment.entries[slot]) >> shift
            if value >> 8 == found:
                with_byte[value & 0xFF] += 1
        byte = 0
        while with_byte[byte] < count:
            count -= with_byte[byte]
            byte += 1
        found = found << 8 | <uint64_t>byte
        shift -= 8
    return found


# ---- The undo log ----------------------------------------------------------------------------------------

cdef bint undo_reserve(undo_log_t *log) noexcept nogil:
    """Make room for one more record."""
    cdef change_t *records
    cdef uint32_t capacity
    if log.count < log.capacity:
        return True
    if log.capacity > UINT32_MAX // 4:
        return False
    capacity = max(log.capacity * 2, <uint32_t>UNDO_START)
    records = <change_t *>allocate(capacity * sizeof(change_t))
    if records == NULL:
        return False
    if log.count:
        memcpy(records, log.records, log.count * sizeof(change_t))
    release(log.records, log.capacity * sizeof(change_t))
    log.records = records
    log.capacity = capacity
    return True


cdef uint64_t undo_nbytes(const undo_log_t *log) noexcept nogil:
    """All memory that the log holds."""
    return block_bytes(log.capacity * sizeof(change_t))


cdef void undo_all(undo_log_t *log, table_t *table) noexcept nogil:
    """Put every payment back as it was, the last change first. Needs no memory."""
    cdef const entry_t *before
    cdef entry_t *entry = NULL
    cdef uint32_t record = log.count
    while record:
        record -= 1
        before = &log.records[record].before
        if before.key & TOP_BIT:
            if table_find(table, before.key & ~TOP_BIT, &entry):
                table_remove(table, entry, False)
        elif table_find(table, before.key, &entry):
            entry[0] = before[0]
        else:
            # There is a slot: this state has fitted once, and a rebuild since then kept room for it.
            table_insert(table, before)


cdef void undo_end(undo_log_t *log, table_t *table) noexcept nogil:
    """Forget the records: the group is over."""
    cdef segment_t *segment
    cdef uint32_t record
    for record in range(log.count):
        segment = &table.segments[log.records[record].segment]
        segment.changes = 0
        segment.removed = 0
    log.count = 0
    log.open = False
    if log.capacity > UNDO_KEPT:
        undo_free(log)


cdef void undo_free(undo_log_t *log) noexcept nogil:
    """Release the memory."""
    release(log.records, log.capacity * sizeof(change_t))
    log.records = NULL
    log.capacity = log.count = 0
