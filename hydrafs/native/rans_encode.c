/* The encoder. See rans_core.h.
 *
 * Plan: states run backwards, so the blocks are done from the last to the first, each in one go while it is in the
 *   first-level cache: residuals and symbols, the prices of all classes at once, the words of the cheapest.
 * Invariant: what is written does not depend on the kernel.
 */

#include "rans_core.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Whether a class is keyed by the leading bits of the mantissa. */
static inline int by_mantissa(const rans_model *m, unsigned c)
{
    return m->format.is_float && !m->plain && m->cls[c].shift != m->format.mantissa;
}

static inline unsigned dictionary_symbol(const rans_model *m, uint32_t value)
{
    for (unsigned i = 0; i < m->dictionary_count; i++)
        if (m->dictionary[i] == value)
            return RANS_DICTIONARY + i;
    return rans_bucket(value);
}

static inline uint32_t split_plain(rans_format f, uint32_t word)
{
    const unsigned bits = 8 * f.nbytes;
    return f.is_float ? (word << 1 | word >> (bits - 1)) & (0xffffffffu >> (32 - bits)) : word;
}

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

/* One block on its way: residuals, or plain words turned and flipped; symbols; keys of both kinds. */
typedef struct {
    uint32_t value[RANS_BLOCK], differs;
    uint8_t symbol[RANS_BLOCK], key[2][RANS_BLOCK];
} block;

INLINE void fill_block(const rans_model *m, const rans_class by[2], unsigned w, unsigned is_float, int plain,
                       const uint8_t *prediction, const uint8_t *target, block *b)
{
    const rans_format f = {w, (int)is_float, m->format.mantissa};
    const unsigned shift = 8 * w - 8;
    const uint32_t flip = (uint32_t)m->flip << shift;
    uint32_t differs = 0;
    for (unsigned i = 0; i < RANS_BLOCK; i++) {
        const uint32_t t = rans_load(target + w * i, w);
        if (plain) {
            b->value[i] = split_plain(f, t) ^ flip;
            b->symbol[i] = (uint8_t)(b->value[i] >> shift);
            differs |= t;
        } else {
            const uint32_t p = rans_load(prediction + w * i, w);
            b->value[i] = rans_residual(f, p, t);
            differs |= b->value[i];
            b->key[0][i] = (uint8_t)rans_key(&by[0], p);
            b->key[1][i] = (uint8_t)rans_key(&by[1], p);
        }
    }
    b->differs = differs;
    if (plain || !differs)
        return;
    if (m->dictionary_count)
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            b->symbol[i] = (uint8_t)dictionary_symbol(m, b->value[i]);
    else
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            b->symbol[i] = (uint8_t)rans_bucket(b->value[i]);
}

/* Prices of all classes at once. */
typedef uint16_t sums __attribute__((vector_size(32), aligned(2), may_alias));

/* The cheapest class of a block, given the one behind it (or 16: none); `bits16` is what it costs without that. */
INLINE unsigned choose_class(const rans_model *m, const block *b, unsigned behind, int second, uint32_t *bits16)
{
    *bits16 = 0;
    if (!b->differs)
        return 0;
    sums total = {0};
    if (m->plain)
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            total += *(const sums *)(const void *)(m->cost + COST_AT(0, b->symbol[i]));
    for (int half = 0; !m->plain && half <= second; half++)
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            total += *(const sums *)(const void *)(m->cost + (half ? COST_HALF : 0) +
                                                   COST_AT(b->key[half][i], b->symbol[i]));
    uint16_t sum[16];
    memcpy(sum, &total, sizeof sum);
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
INLINE uint8_t *write_block(const rans_model *m, const rans_class *c, const uint8_t *key, const block *b,
                            unsigned lanes, unsigned w, int plain, uint32_t *restrict state, uint8_t *at)
{
    for (unsigned first = RANS_BLOCK; first > 0;) {
        const rans_entry *entry[RANS_MAX_LANES];
        unsigned any = 0;
        first -= lanes;
        for (unsigned j = 0; j < lanes; j++) {
            entry[j] = &m->entries[c->map[plain ? 0 : key[first + j]]][b->symbol[first + j]];
            any |= entry[j]->width;
        }
        if (w == 4 && !plain && any > 16)
            for (unsigned j = lanes; j-- > 0;)
                state[j] = put_raw(state[j], b->value[first + j] >> 16,
                                   entry[j]->width > 16 ? entry[j]->width - 16u : 0, &at);
        if (any)
            for (unsigned j = lanes; j-- > 0;)
                state[j] = put_raw(state[j], plain ? b->symbol[first + j] : b->value[first + j],
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
INLINE void encode_blocks(encoding *e, unsigned w, unsigned is_float, int plain)
{
    const rans_model *m = e->model;
    rans_class by[2] = {{0, 0, 0, {0}}, {0, 0, 0, {0}}};
    int second = 0;
    for (unsigned c = 1; c <= m->classes; c++) {
        by[by_mantissa(m, c)] = m->cls[c];
        second |= by_mantissa(m, c);
    }
    const size_t rest = e->words % RANS_BLOCK, whole = e->words / RANS_BLOCK;
    uint8_t last_prediction[4 * RANS_BLOCK] = {0}, last_target[4 * RANS_BLOCK] = {0};
    if (rest) {
        memcpy(last_target, e->target + whole * RANS_BLOCK * w, rest * w);
        if (!plain)
            memcpy(last_prediction, e->prediction + whole * RANS_BLOCK * w, rest * w);
    }
    uint32_t state[RANS_MAX_LANES], bits16;
    block b;
    /* A few blocks tell how long the stream will be: a state more costs two bytes, which a long one does not notice. */
    uint64_t sampled = 0;
    const size_t samples = whole < 16 ? whole : 16;
    for (size_t i = 0; i < samples; i++) {
        const size_t at = i * whole / samples * RANS_BLOCK * w;
        fill_block(m, by, w, is_float, plain, plain ? NULL : e->prediction + at, e->target + at, &b);
        choose_class(m, &b, 16, second, &bits16);
        sampled += bits16;
    }
    e->lanes = samples && sampled * (whole / samples) >= (uint64_t)16 * 8 * 24576 ? 64 : 32;
    for (unsigned j = 0; j < e->lanes; j++)
        state[j] = RANS_LOW;
    unsigned c = 16;
    for (size_t i = e->blocks; i-- > 0;) {
        const int last = i >= whole;
        const size_t at = i * RANS_BLOCK * w;
        fill_block(m, by, w, is_float, plain, plain ? NULL : last ? last_prediction : e->prediction + at,
                   last ? last_target : e->target + at, &b);
        c = choose_class(m, &b, c, second, &bits16);
        e->classes[i] = (uint8_t)c;
        if (!c)
            continue;
        const uint8_t *key = b.key[by_mantissa(m, c)];
        if (e->writer)
            e->stream = e->writer(m, &m->cls[c], plain ? NULL : key, b.symbol, b.value, e->lanes, state, e->stream);
        else if (e->lanes == 32)
            e->stream = write_block(m, &m->cls[c], key, &b, 32, w, plain, state, e->stream);
        else
            e->stream = write_block(m, &m->cls[c], key, &b, 64, w, plain, state, e->stream);
        if (plain && w > 1)
            e->raw = write_raw(b.value, last ? rest : RANS_BLOCK, w, e->words, e->raw);
    }
    for (unsigned j = e->lanes; j-- > 0;) {
        e->stream -= 4;
        rans_store(e->stream, state[j], 4);
    }
}

INLINE void encode_any(encoding *e)
{
    const rans_format f = e->model->format;
    const int plain = e->model->plain;
#define CASE(W, F, P)                                                                                                  \
    if (f.nbytes == W && (f.is_float != 0) == F && plain == P)                                                         \
        encode_blocks(e, W, F, P);
    CASE(2, 1, 0)
    CASE(4, 1, 0)
    CASE(1, 1, 0)
    CASE(2, 0, 0)
    CASE(4, 0, 0)
    CASE(1, 0, 0)
    CASE(2, 1, 1)
    CASE(4, 1, 1)
    CASE(1, 1, 1)
    CASE(2, 0, 1)
    CASE(4, 0, 1)
    CASE(1, 0, 1)
#undef CASE
}

/* The same code for newer machines: shifts and counts in one instruction, and what the compiler makes of the loops. */
typedef void (*encoder)(encoding *e);

static void encode_portable(encoding *e)
{
    encode_any(e);
}

#ifdef RANS_X86
__attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt"))) static void encode_avx2(encoding *e)
{
    encode_any(e);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,bmi,bmi2,lzcnt,popcnt"))) static void
encode_avx512(encoding *e)
{
    e->writer = rans_write_avx512;
    encode_any(e);
}
#endif

static encoder find_encoder(rans_kernel kernel)
{
#ifdef RANS_X86
    if (kernel == rans_avx512)
        return encode_avx512;
    if (kernel == rans_avx2)
        return encode_avx2;
#endif
    (void)kernel;
    return encode_portable;
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
        encoding e = {m, prediction, target, words, blocks, memory, raw_end, stream_end, 32, NULL};
        find_encoder(kernel)(&e);
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
