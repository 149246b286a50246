/* The check of a capture in bare C: the limit that the compiled index is held against.
 *
 * Entries, segments, hash, probe order and prefetch distance are those of paycore/_table.pxd and _dedupe.pyx; nothing
 * else is here: no growth, no removal, no groups, no Python. Compiled and called through ctypes by index_limit.py.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#define PREFETCH_AHEAD 16
#define ID_EPOCH_MS 1735689600000LL
#define AHEAD_LIMIT_MS 300000LL
#define ASK 0x800u
#define UNTRUSTED 0x200u
#define CLOSES 0x400u

typedef struct {
    uint64_t key, mask, money, terms;
} entry_t;

typedef struct {
    entry_t *entries;
    uint32_t slots;
} segment_t;

typedef struct {
    void *block;
    segment_t *segments;
    unsigned segment_bits;
} probe_t;

static uint64_t mix(uint64_t key)
{
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ULL;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBULL;
    return key ^ (key >> 31);
}

static inline const segment_t *segment_of(const probe_t *probe, uint64_t hashed)
{
    return &probe->segments[(hashed >> 32) >> (32 - probe->segment_bits)];
}

static inline size_t slot_of(const probe_t *probe, const segment_t *segment, uint64_t hashed)
{
    return (uint64_t)(uint32_t)(hashed >> (32 - probe->segment_bits)) * segment->slots >> 32;
}

/* Release a table; NULL is allowed. */
void probe_free(probe_t *probe)
{
    if (probe != NULL) {
        free(probe->block);
        free(probe->segments);
        free(probe);
    }
}

/* Make a table of open payments with one attempt each, with as many slots a segment as there are in `slots`, which must
 * be enough; NULL when memory ran out. */
probe_t *probe_make(unsigned segment_bits, const uint32_t *slots, size_t count, const int64_t *ids,
                    const int64_t *amounts, uint8_t currency, const uint8_t *accounts, uint32_t validity_ms)
{
    size_t segments = (size_t)1 << segment_bits, total = 0;
    probe_t *probe = calloc(1, sizeof *probe);
    if (probe == NULL)
        return NULL;
    for (size_t i = 0; i < segments; i++)
        total += slots[i] + 1;
    probe->segment_bits = segment_bits;
    probe->segments = calloc(segments, sizeof(segment_t));
    probe->block = calloc(total * sizeof(entry_t) + 64, 1);
    if (probe->segments == NULL || probe->block == NULL) {
        probe_free(probe);
        return NULL;
    }
    entry_t *entries = (entry_t *)(((uintptr_t)probe->block + 63) & ~(uintptr_t)63);
    for (size_t i = 0; i < segments; i++) {
        probe->segments[i].entries = entries;
        probe->segments[i].slots = slots[i];
        entries += slots[i] + (slots[i] & 1); /* on a cache line's start */
    }
    for (size_t i = 0; i < count; i++) {
        uint64_t hashed = mix((uint64_t)ids[i]);
        const segment_t *segment = segment_of(probe, hashed);
        size_t slot = slot_of(probe, segment, hashed);
        while (segment->entries[slot].key != 0)
            slot = slot + 1 == segment->slots ? 0 : slot + 1;
        segment->entries[slot].key = (uint64_t)ids[i];
        segment->entries[slot].money = (uint64_t)amounts[i] | (uint64_t)accounts[i] << 48;
        segment->entries[slot].terms = validity_ms | (uint64_t)currency << 40 | 1ULL << 48 | 1ULL << 56;
    }
    return probe;
}

static inline uint32_t check(const probe_t *probe, int64_t id, uint8_t attempt, uint8_t account, int64_t amount,
                             uint8_t currency, int64_t paid_at, int64_t received_at)
{
    uint64_t hashed = mix((uint64_t)id);
    const segment_t *segment = segment_of(probe, hashed);
    if (segment->slots == 0)
        return 0;
    size_t slot = slot_of(probe, segment, hashed);
    const entry_t *entry = &segment->entries[slot];
    while (entry->key != (uint64_t)id) {
        if (entry->key == 0)
            return 0;
        slot = slot + 1 == segment->slots ? 0 : slot + 1;
        entry = &segment->entries[slot];
    }
    unsigned attempts = (unsigned)(entry->terms >> 56) & 63;
    if (attempt < 1 || attempt > attempts || entry->mask >> 63)
        return 0;
    uint8_t kept_account = 0;
    if (attempt == 1)
        kept_account = (uint8_t)(entry->money >> 48);
    else if (attempt == 2)
        kept_account = (uint8_t)(entry->money >> 56);
    else if (attempt == 3)
        kept_account = (uint8_t)(entry->terms >> 32);
    if (kept_account == 0)
        return 0;
    if (entry->mask >> (attempt - 1) & 1)
        return ASK;
    if (kept_account != account)
        return 6 | ASK;
    if ((int64_t)(entry->money & ((1ULL << 48) - 1)) != amount || (uint8_t)(entry->terms >> 40) != currency)
        return 5 | ASK;
    unsigned state = (unsigned)(entry->terms >> 48) & 3;
    if (state != 1)
        return (state == 2 ? 2 : 3) | ASK;
    uint32_t ask = entry->mask ? ASK : 0;
    int64_t created = (int64_t)(entry->key >> 22) + ID_EPOCH_MS;
    if (paid_at < created || paid_at - received_at > AHEAD_LIMIT_MS)
        return 1 | UNTRUSTED | ask;
    int64_t earlier = paid_at < received_at ? paid_at : received_at;
    if (earlier <= created + (int64_t)(uint32_t)entry->terms)
        return 1 | ask;
    return 3 | ASK | (attempts > 1 ? 0 : CLOSES);
}

/* Check captures in turn; ahead: whether the next ones' cache lines are fetched meanwhile. */
void probe_check(const probe_t *probe, int ahead, size_t count, const int64_t *ids, const uint8_t *attempts,
                 const uint8_t *accounts, const int64_t *amounts, const uint8_t *currencies, const int64_t *paid_at,
                 const int64_t *received_at, uint32_t *verdicts)
{
    for (size_t i = 0; i < count; i++) {
        if (ahead && i + PREFETCH_AHEAD < count) {
            uint64_t hashed = mix((uint64_t)ids[i + PREFETCH_AHEAD]);
            const segment_t *segment = segment_of(probe, hashed);
            __builtin_prefetch(&segment->entries[slot_of(probe, segment, hashed)]);
        }
        verdicts[i] = check(probe, ids[i], attempts[i], accounts[i], amounts[i], currencies[i], paid_at[i],
                            received_at[i]);
    }
}
