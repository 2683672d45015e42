/* The encoder. See rans_core.h.
 *
 * Plan: states run backwards, so the blocks are done from the last to the first, each in one go while it is in the
 *   first-level cache: residuals and symbols, the prices of all classes at once, the words of the cheapest.
 * Invariant: what is written does not depend on the kernel.
 */

#include "rans_blocks.h"

#include <math.h>
#include <stdlib.h>

/* Whether a class is keyed by the leading bits of the mantissa. */
static inline int by_mantissa(const rans_model *m, unsigned c)
{
    return m->format.is_float && !m->plain && m->cls[c].shift != m->format.mantissa;
}

#define AHEAD 4096 /* bytes that are asked for before their turn */
#define COST_AT(key, symbol) ((((size_t)(key) << 8) + (symbol)) << 4)
#define COST_HALF ((size_t)RANS_KEYS << 12)

/* How symbol `s` is written with table `t`, which may lack it: as a bucket, if it stands for a value of the dictionary,
 * else escaped. Gives the symbol that it is written as. */
static unsigned set_entry(const rans_model *m, unsigned t, unsigned s, rans_entry *e)
{
    const uint16_t *freq = m->freq[t];
    if (!m->plain && s >= RANS_DICTIONARY && s < RANS_ESCAPE && !freq[s])
        s = rans_bucket(m->dictionary[s - RANS_DICTIONARY]);
    if (!freq[s])
        s = RANS_ESCAPE;
    e->width = m->width[s];
    e->start = m->start[t][s];
    e->reach = (1u << m->bits) - freq[s];
    e->last = (uint32_t)(((uint64_t)freq[s] << (32 - m->bits)) - 1);
    e->inverse = UINT64_MAX / freq[s] + 1;
    if (freq[s] == 1) { /* the inverse does not fit; this one's quotient is one less, which `start` makes up for */
        e->inverse = UINT64_MAX;
        e->start = (uint16_t)(e->start + e->reach);
    }
    return s;
}

rans_status rans_prepare(rans_model *m)
{
    if (!m || m->cost)
        return RANS_OK;
    uint16_t *cost = calloc(2 * COST_HALF, sizeof *cost);
    m->entries = malloc(m->tables * sizeof *m->entries);
    m->packed = malloc(m->tables * sizeof *m->packed);
    if (!cost || !m->entries || !m->packed) {
        free(cost);
        free(m->entries);
        free(m->packed);
        m->entries = NULL;
        m->packed = NULL;
        return RANS_NO_MEMORY;
    }
    uint16_t price[(1 << RANS_MAX_BITS) + 1];
    for (unsigned f = 1; f <= 1u << m->bits; f++)
        price[f] = (uint16_t)(16 * (m->bits - log2f((float)f)) + 0.5f);
    for (unsigned t = 0; t < m->tables; t++)
        for (unsigned s = 0; s < 256; s++) {
            const unsigned as = set_entry(m, t, s, &m->entries[t][s]);
            m->packed[t][s] = (uint32_t)m->width[as] << 26 | (uint32_t)m->freq[t][as] << 13 | m->start[t][as];
        }
    for (unsigned c = 1; c <= m->classes; c++) {
        const rans_class *cls = &m->cls[c];
        uint16_t *half = cost + (by_mantissa(m, c) ? COST_HALF : 0);
        for (unsigned k = 0; k < (m->plain ? 1 : RANS_KEYS); k++)
            for (unsigned s = 0; s < 256; s++) {
                const rans_entry *e = &m->entries[cls->map[k]][s];
                const unsigned bits16 = price[(1u << m->bits) - e->reach] + 16 * e->width;
                half[COST_AT(k, s) + c] = (uint16_t)(bits16 > 511 ? 511 : bits16); /* a block's sum fits 16 bits */
            }
    }
    for (unsigned c = 0; c <= m->classes; c++)
        for (unsigned s = 0; s <= m->classes; s++)
            m->class_cost[c][s] = (uint16_t)(16 * (RANS_CLASS_BITS - log2f(m->class_freq[c][s])) + 0.5f);
    m->cost = cost;
    return RANS_OK;
}

/* The cheapest class of a block, given the one behind it (or 16: none); `bits16` is what it costs without that. */
INLINE unsigned choose_class(const rans_model *m, const rans_block *b, unsigned behind, int second, int wide,
                             uint32_t *bits16)
{
    *bits16 = 0;
    if (!b->differs)
        return 0;
    uint16_t sum[16] = {0};
    rans_price(m->cost, b->context[0], wide, sum);
    if (second)
        rans_price(m->cost + COST_HALF, b->context[1], wide, sum);
    unsigned best = 1;
    uint32_t least = UINT32_MAX;
    for (unsigned c = 1; c <= m->classes; c++) {
        const uint32_t cost = (uint32_t)sum[c] + (behind > 15 ? 0 : m->class_cost[c][behind]);
        if (cost < least) {
            least = cost;
            best = c;
        }
    }
    *bits16 = sum[best];
    return best;
}

static inline void put_word(uint32_t *x, uint32_t last, uint8_t **at)
{
    const uint32_t over = *x > last ? 0xffffffffu : 0;
    (*at)[-2] = (uint8_t)*x;
    (*at)[-1] = (uint8_t)(*x >> 8);
    *at -= over & 2;
    *x >>= over & 16;
}

static inline uint32_t put(uint32_t x, const rans_entry *e, uint8_t **at)
{
    put_word(&x, e->last, at);
    /* x / freq: the inverse is too large by less than a unit, so the product by less than 2**32: exact below that. */
    const uint32_t q = (uint32_t)((unsigned __int128)x * e->inverse >> 64);
    return x + q * e->reach + e->start; /* (q << bits) + x - q * freq + start */
}

static inline uint32_t put_raw(uint32_t x, uint32_t value, unsigned width, uint8_t **at)
{
    put_word(&x, 0xffffffffu >> width, at);
    return x << width | (value & ((1u << width) - 1));
}

/* Writes a block backwards from `at`, and gives where it begins. */
INLINE uint8_t *write_block(const rans_model *m, const rans_class *c, const uint16_t *context, const rans_block *b,
                            unsigned lanes, unsigned w, int plain, uint32_t *restrict state, uint8_t *at)
{
    const rans_entry *row[RANS_KEYS];
    for (unsigned k = 0; k < RANS_KEYS; k++)
        row[k] = m->entries[c->map[k]];
    for (unsigned first = RANS_BLOCK; first > 0;) {
        const rans_entry *entry[RANS_MAX_LANES];
        unsigned any = 0;
        first -= lanes;
        for (unsigned j = 0; j < lanes; j++) {
            entry[j] = row[context[first + j] >> 8] + (context[first + j] & 255);
            any |= entry[j]->width;
        }
        if (w == 4 && !plain && any > 16)
            for (unsigned j = lanes; j-- > 0;)
                state[j] = put_raw(state[j], b->value[first + j] >> 16,
                                   entry[j]->width > 16 ? entry[j]->width - 16u : 0, &at);
        if (any)
            for (unsigned j = lanes; j-- > 0;)
                state[j] = put_raw(state[j], plain ? context[first + j] : b->value[first + j],
                                   entry[j]->width < 16 ? entry[j]->width : 16, &at);
        for (unsigned j = lanes; j-- > 0;)
            state[j] = put(state[j], entry[j], &at);
    }
    return at;
}

static uint8_t *write_classes(const rans_model *m, const uint8_t *classes, size_t blocks, uint8_t *at)
{
    uint32_t x = RANS_LOW;
    for (size_t b = blocks; b-- > 0;) {
        const unsigned before = b ? classes[b - 1] : 0, freq = m->class_freq[before][classes[b]];
        put_word(&x, (uint32_t)(((uint64_t)freq << (32 - RANS_CLASS_BITS)) - 1), &at);
        x = (x / freq << RANS_CLASS_BITS) + x % freq + m->class_start[before][classes[b]];
    }
    at -= 4;
    rans_store(at, x, 4);
    return at;
}

/* The raw bytes of `count` words, backwards from `at`, a plane for each byte but the highest. */
static uint8_t *write_raw(const uint32_t *value, size_t count, unsigned w, size_t stride, uint8_t *at)
{
    at -= count;
    for (unsigned k = 0; k + 1 < w; k++)
        for (size_t i = 0; i < count; i++)
            at[k * stride + i] = (uint8_t)(value[i] >> (8 * k));
    return at;
}

typedef struct {
    const rans_model *model;
    const uint8_t *prediction, *target;
    size_t words, blocks;
    uint8_t *classes;
    uint8_t *raw, *stream; /* their ends, then their beginnings; raw has a plane every `words` bytes */
    unsigned lanes;
    rans_writer writer; /* or NULL: the one below */
} encoding;

/* Block after block from the end, each done with while it is in the first-level cache. */
INLINE void encode_blocks(encoding *e, unsigned w, unsigned is_float, int plain, int wide)
{
    const rans_model *m = e->model;
    rans_shape h = {.format = m->format, .plain = plain, .flip = m->flip, .dictionary = m->dictionary,
                    .dictionary_count = m->dictionary_count};
    for (unsigned c = 1; c <= m->classes; c++) {
        h.by[by_mantissa(m, c)] = m->cls[c];
        h.second |= by_mantissa(m, c);
    }
    const size_t rest = e->words % RANS_BLOCK, whole = e->words / RANS_BLOCK;
    uint8_t last_prediction[4 * RANS_BLOCK] = {0}, last_target[4 * RANS_BLOCK] = {0};
    if (rest) {
        memcpy(last_target, e->target + whole * RANS_BLOCK * w, rest * w);
        if (!plain)
            memcpy(last_prediction, e->prediction + whole * RANS_BLOCK * w, rest * w);
    }
    uint32_t state[RANS_MAX_LANES], bits16;
    rans_block b;
    /* A few blocks tell how long the stream will be: a state more costs two bytes, which a long one does not notice. */
    uint64_t sampled = 0;
    const size_t samples = whole < 16 ? whole : 16;
    for (size_t i = 0; i < samples; i++) {
        const size_t at = i * whole / samples * RANS_BLOCK * w;
        rans_fill(&h, w, is_float, plain, plain ? NULL : e->prediction + at, e->target + at, &b);
        choose_class(m, &b, 16, h.second, wide, &bits16);
        sampled += bits16;
    }
    e->lanes = samples && sampled * (whole / samples) >= (uint64_t)16 * 8 * 24576 ? 64 : 32;
    for (unsigned j = 0; j < e->lanes; j++)
        state[j] = RANS_LOW;
    unsigned c = 16;
    for (size_t i = e->blocks; i-- > 0;) {
        const int last = i >= whole;
        const size_t at = i * RANS_BLOCK * w;
        for (unsigned ahead = 0; at >= AHEAD && ahead < RANS_BLOCK * w; ahead += 64) { /* processors fetch forwards */
            __builtin_prefetch(e->target + at - AHEAD + ahead);
            if (!plain)
                __builtin_prefetch(e->prediction + at - AHEAD + ahead);
        }
        rans_fill(&h, w, is_float, plain, plain ? NULL : last ? last_prediction : e->prediction + at,
                   last ? last_target : e->target + at, &b);
        c = choose_class(m, &b, c, h.second, wide, &bits16);
        e->classes[i] = (uint8_t)c;
        if (!c)
            continue;
        const uint16_t *context = b.context[by_mantissa(m, c)];
        if (e->writer)
            e->stream = e->writer(m, &m->cls[c], context, b.value, e->lanes, state, e->stream);
        else if (e->lanes == 32)
            e->stream = write_block(m, &m->cls[c], context, &b, 32, w, plain, state, e->stream);
        else
            e->stream = write_block(m, &m->cls[c], context, &b, 64, w, plain, state, e->stream);
        if (plain && w > 1)
            e->raw = write_raw(b.value, last ? rest : RANS_BLOCK, w, e->words, e->raw);
    }
    for (unsigned j = e->lanes; j-- > 0;) {
        e->stream -= 4;
        rans_store(e->stream, state[j], 4);
    }
}

INLINE void encode_any(encoding *e, int wide)
{
#define RUN(W, F, P) encode_blocks(e, W, F, P, wide)
    RANS_EACH_FORMAT(e->model->format, e->model->plain, RUN);
#undef RUN
}
RANS_LEVELS(encode, encoding)

static rans_writer find_writer(rans_kernel kernel)
{
#ifdef RANS_X86
    if (kernel == rans_avx512)
        return rans_write_avx512;
    if (kernel == rans_avx2)
        return rans_write_avx2;
#endif
    (void)kernel;
    return NULL;
}

rans_status rans_encode(const rans_models *models, rans_kernel kernel, rans_format format, const uint8_t *prediction,
                        const uint8_t *target, size_t nbytes, uint8_t **result, size_t *result_nbytes)
{
    const unsigned w = format.nbytes;
    const rans_model *m = prediction ? models->residual : models->plain;
    const size_t words = w == 1 || w == 2 || w == 4 ? nbytes / w : 0, tail = words ? nbytes % w : 0;
    if (words && !prediction && !tail && (words == 1 || !memcmp(target, target + w, nbytes - w)) && nbytes > w) {
        if (!(*result = malloc(1 + w)))
            return RANS_NO_MEMORY;
        **result = RANS_CONSTANT;
        memcpy(*result + 1, target, w);
        *result_nbytes = 1 + w;
        return RANS_OK;
    }
    if (words && (!m || m->format.nbytes != w || m->format.is_float != format.is_float ||
                  m->format.mantissa != format.mantissa || !m->cost))
        return RANS_NO_MODEL;
    if (words) {
        const size_t blocks = (words + RANS_BLOCK - 1) / RANS_BLOCK, padded = blocks * RANS_BLOCK;
        const size_t class_room = 2 * blocks + 16, raw_room = m->plain ? words * w : 0;
        /* As much as a stream can take; what it does not take is never touched, so the system need not give it. */
        const size_t stream_room = padded * (2 + (m->plain ? 2 : w)) + 4 * RANS_MAX_LANES + 64;
        uint8_t *memory = malloc(blocks + class_room + raw_room + stream_room);
        if (!memory)
            return RANS_NO_MEMORY;
        uint8_t *class_end = memory + blocks + class_room, *raw_end = class_end + words;
        uint8_t *stream_end = class_end + raw_room + stream_room;
        encoding e = {m, prediction, target, words, blocks, memory, raw_end, stream_end, 32,
                      find_writer(kernel)};
        encode(kernel, &e);
        uint8_t *class_stream = write_classes(m, e.classes, blocks, class_end);
        const size_t class_nbytes = (size_t)(class_end - class_stream), coded = (size_t)(raw_end - e.raw);
        const size_t stream_nbytes = (size_t)(stream_end - e.stream);
        uint8_t *out = malloc(1 + 4 + class_nbytes + 4 + coded * (w - 1) + stream_nbytes + tail);
        if (!out) {
            free(memory);
            return RANS_NO_MEMORY;
        }
        uint8_t *at = out;
        *at++ = (uint8_t)((m->plain ? RANS_PLAIN : RANS_RESIDUAL) | (e.lanes == 64 ? RANS_WIDE : 0));
        rans_store(at, (uint32_t)class_nbytes, 4);
        at += 4;
        memcpy(at, class_stream, class_nbytes);
        at += class_nbytes;
        if (m->plain) {
            rans_store(at, (uint32_t)(coded * (w - 1)), 4);
            at += 4;
            for (unsigned k = 0; k + 1 < w; k++, at += coded)
                memcpy(at, e.raw + k * words, coded);
        }
        memcpy(at, e.stream, stream_nbytes);
        at += stream_nbytes;
        memcpy(at, target + words * w, tail);
        at += tail;
        free(memory);
        if ((size_t)(at - out) <= nbytes) {
            *result = out;
            *result_nbytes = (size_t)(at - out);
            return RANS_OK;
        }
        free(out);
    }
    if (!(*result = malloc(nbytes + 1)))
        return RANS_NO_MEMORY;
    **result = RANS_STORED;
    memcpy(*result + 1, target, nbytes);
    *result_nbytes = nbytes + 1;
    return RANS_OK;
}
