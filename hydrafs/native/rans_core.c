/* Models, the decoder's frame and the portable kernel. See rans_core.h. */

#include "rans_core.h"

#include <stdlib.h>
#include <string.h>

/* ---- Models ------------------------------------------------------------------------------------------------- */

typedef struct {
    const uint8_t *data;
    size_t nibbles, at;
    int failed;
} reader;

static unsigned nibble(reader *r)
{
    if (r->at >= r->nibbles) {
        r->failed = 1;
        return 0;
    }
    unsigned value = r->data[r->at / 2] >> (r->at % 2 * 4) & 15;
    r->at++;
    return value;
}

/* Steps of an eighth of an octave: within 4.4 % of any frequency, which costs under a thousandth of a bit. */
static const uint16_t eighths[8] = {256, 279, 304, 332, 362, 395, 431, 470};

static uint32_t weight(unsigned level)
{
    return level ? (uint32_t)eighths[level & 7] << (level >> 3) : 0;
}

/* Frequencies of `count` symbols that sum to `total`, in proportion to their levels' weights; `all`: none is 0. */
static void normalise(const uint8_t *level, unsigned count, uint32_t total, int all, uint16_t *freq)
{
    uint64_t sum = 0;
    int64_t left = total;
    for (unsigned s = 0; s < count; s++)
        sum += weight(level[s]);
    for (unsigned s = 0; s < count; s++) {
        uint64_t w = weight(level[s]);
        uint64_t f = sum ? (w * total + sum / 2) / sum : 0;
        freq[s] = (uint16_t)(f ? f : w || all);
        left -= freq[s];
    }
    while (left) { /* the most frequent symbol notices it least */
        unsigned largest = 0;
        for (unsigned s = 1; s < count; s++)
            if (freq[s] > freq[largest])
                largest = s;
        int64_t take = left > 0 ? left : -left < freq[largest] / 2 ? left : -(int64_t)(freq[largest] / 2);
        freq[largest] = (uint16_t)(freq[largest] + take);
        left -= take;
    }
}

/* Levels of symbols 0..count-1: 0..13 zigzag step from the level before, 14 a run of absent symbols (15: all the rest),
 * 15 a level in full. */
static void read_levels(reader *r, uint8_t *level, unsigned count)
{
    unsigned at = 0;
    int before = 40;
    memset(level, 0, count);
    while (at < count && !r->failed) {
        unsigned code = nibble(r);
        if (code == 14) {
            unsigned run = nibble(r);
            if (run == 15)
                return;
            if (at + run + 1 > count)
                r->failed = 1;
            at += run + 1;
            continue;
        }
        if (code == 15) {
            before = (int)nibble(r) * 16;
            before += (int)nibble(r);
        } else {
            before += code & 1 ? -(int)(code / 2 + 1) : (int)(code / 2);
        }
        if (before < 1 || before > 127) {
            r->failed = 1;
            return;
        }
        level[at++] = (uint8_t)before;
    }
}

static void free_model(rans_model *m)
{
    if (!m)
        return;
    free(m->freq);
    free(m->start);
    free(m->slots);
    free(m->cost);
    free(m->entries);
    free(m->packed);
    free(m);
}

void rans_free(rans_models *models)
{
    free_model(models->residual);
    free_model(models->plain);
    models->residual = models->plain = NULL;
}

#define MODEL_HEADER 12

static rans_status parse_model(const uint8_t **params, size_t *nbytes, rans_model **out)
{
    const uint8_t *p = *params;
    if (*nbytes < MODEL_HEADER)
        return RANS_DAMAGED;
    rans_model *m = calloc(1, sizeof *m);
    if (!m)
        return RANS_NO_MEMORY;
    *out = m;
    m->plain = p[0] == RANS_PLAIN;
    m->format.nbytes = p[1] & 0x7f;
    m->format.is_float = p[1] >> 7;
    m->format.mantissa = p[2];
    m->classes = p[3];
    m->bits = p[4];
    m->tables = p[5];
    m->dictionary_count = p[6];
    m->flip = p[7];
    const unsigned top_key = p[8] | (unsigned)p[9] << 8, sources = p[10] | (unsigned)p[11] << 8;
    const unsigned w = m->format.nbytes, mantissa = m->format.mantissa;
    if ((p[0] != RANS_RESIDUAL && p[0] != RANS_PLAIN) || (w != 1 && w != 2 && w != 4) || m->classes < 1 ||
        m->classes > RANS_MAX_CLASSES || m->bits < 8 || m->bits > RANS_MAX_BITS || m->tables < 1 ||
        m->tables > RANS_MAX_TABLES || m->dictionary_count > RANS_MAX_DICTIONARY ||
        (m->format.is_float ? mantissa < 1 || mantissa > 8 * w - 2 : mantissa != 0))
        return RANS_DAMAGED;
    size_t at = MODEL_HEADER;
    if (*nbytes < at + 4 * (size_t)m->dictionary_count)
        return RANS_DAMAGED;
    for (unsigned i = 0; i < m->dictionary_count; i++, at += 4)
        m->dictionary[i] = rans_load(p + at, 4);

    for (unsigned s = 0; s < 256; s++) {
        const unsigned n = m->plain || s < 16 ? 0 : (s >> 3) - 1;
        const int special = m->plain ? s == RANS_ESCAPE : s >= RANS_DICTIONARY;
        m->width[s] = (uint8_t)(special ? s == RANS_ESCAPE ? m->plain ? 8 : 8 * w : 0 : n);
        m->value[s] = m->plain || s < 16 ? s : (8 | (s & 7)) << n;
        if (special)
            m->value[s] = m->plain ? 0 : m->dictionary[s - RANS_DICTIONARY];
    }

    reader r = {p + at, 2 * (*nbytes - at), 0, 0};
    const unsigned keys = m->plain ? 1 : RANS_KEYS;
    int before = 0;
    for (unsigned c = 1; c <= m->classes; c++) {
        rans_class *cls = &m->cls[c];
        if (m->format.is_float && !m->plain) {
            const unsigned seen = mantissa < 4 ? mantissa : 4;
            if (sources >> (c - 1) & 1) {
                cls->shift = mantissa - seen;
                cls->mask = (1u << seen) - 1;
                cls->base = 15;
            } else {
                cls->shift = mantissa;
                cls->mask = (1u << (8 * w - 1 - mantissa)) - 1;
                cls->base = (int)top_key;
            }
        }
        for (unsigned k = 0; k < keys; k++) {
            unsigned code = nibble(&r);
            if (code == 15) {
                before = (int)nibble(&r) * 16;
                before += (int)nibble(&r);
            } else {
                before += code & 1 ? -(int)(code / 2 + 1) : (int)(code / 2);
            }
            if (before < 0 || before >= (int)m->tables)
                return RANS_DAMAGED;
            cls->map[k] = (uint8_t)before;
        }
    }
    uint8_t level[256];
    for (unsigned c = 0; c <= m->classes; c++) {
        read_levels(&r, level, m->classes + 1);
        normalise(level, m->classes + 1, 1u << RANS_CLASS_BITS, 1, m->class_freq[c]);
        unsigned start = 0;
        for (unsigned s = 0; s <= m->classes; s++) {
            m->class_start[c][s] = (uint16_t)start;
            for (unsigned i = 0; i < m->class_freq[c][s]; i++, start++)
                m->class_slots[c][start] = (uint32_t)(m->class_freq[c][s] - 1u) << 20 | i << 8 | s;
        }
    }
    m->freq = calloc(m->tables, sizeof *m->freq);
    m->start = calloc(m->tables, sizeof *m->start);
    m->slots = malloc(sizeof *m->slots * m->tables << m->bits);
    if (!m->freq || !m->start || !m->slots)
        return RANS_NO_MEMORY;
    for (unsigned t = 0; t < m->tables; t++) {
        uint32_t *slots = m->slots + ((size_t)t << m->bits);
        unsigned start = 0;
        read_levels(&r, level, RANS_ESCAPE);
        unsigned present = 0;
        for (unsigned s = 0; s < RANS_ESCAPE; s++)
            present += level[s] != 0;
        if (!present || present >= 1u << m->bits)
            return RANS_DAMAGED;
        normalise(level, RANS_ESCAPE, (1u << m->bits) - 1, 0, m->freq[t]);
        m->freq[t][RANS_ESCAPE] = 1;
        for (unsigned s = 0; s < 256; s++) {
            m->start[t][s] = (uint16_t)start;
            for (unsigned i = 0; i < m->freq[t][s]; i++, start++)
                slots[start] = (uint32_t)(m->freq[t][s] - 1u) << 20 | i << 8 | s;
        }
    }
    if (r.failed)
        return RANS_DAMAGED;
    at += (r.at + 1) / 2;
    *params += at;
    *nbytes -= at;
    return RANS_OK;
}

rans_status rans_parse(const uint8_t *params, size_t nbytes, rans_models *out)
{
    rans_status status = RANS_OK;
    out->residual = out->plain = NULL;
    while (nbytes && status == RANS_OK) {
        rans_model *m = NULL;
        status = parse_model(&params, &nbytes, &m);
        rans_model **place = m && m->plain ? &out->plain : &out->residual;
        if (m && !*place)
            *place = m;
        else {
            free_model(m);
            if (status == RANS_OK)
                status = RANS_DAMAGED;
        }
    }
    if (status != RANS_OK)
        rans_free(out);
    return status;
}

/* ---- The portable kernel ------------------------------------------------------------------------------------ */

static inline uint32_t refill(uint32_t x, const uint8_t **stream)
{
    /* Without a branch, since whether a state runs low is as good as random: all ones, or nothing. */
    const uint32_t low = 0u - (x < RANS_LOW);
    const uint32_t more = rans_load(*stream, 2);
    *stream += low & 2;
    return x << (low & 16) | (more & low);
}

static inline uint32_t join_plain(rans_format f, uint32_t byte, uint32_t rest)
{
    const unsigned bits = 8 * f.nbytes;
    uint32_t word = byte << (bits - 8) | rest;
    return f.is_float ? word >> 1 | (word & 1) << (bits - 1) : word;
}

/* One block in steps of `lanes` words: all symbols, then the low raw bits of all lanes, then the high ones. */
INLINE void portable_block(const rans_model *m, const rans_class *c, unsigned w, unsigned is_float, int plain,
                           unsigned lanes, uint32_t *restrict state, const uint8_t *restrict prediction,
                           const uint8_t *restrict raw, size_t raw_stride, uint8_t *restrict out,
                           const uint8_t **stream)
{
    const rans_format f = {w, (int)is_float, m->format.mantissa};
    const unsigned bits = m->bits;
    const uint32_t mask = (1u << bits) - 1;
    const uint8_t *s16 = *stream;
    const uint32_t *table[RANS_KEYS];
    uint8_t key[RANS_BLOCK], symbol[RANS_MAX_LANES];
    uint32_t value[RANS_BLOCK];
    for (unsigned k = 0; k < RANS_KEYS; k++)
        table[k] = m->slots + ((size_t)c->map[k] << bits);
    for (unsigned i = 0; !plain && i < RANS_BLOCK; i++)
        key[i] = (uint8_t)rans_key(c, rans_load(prediction + w * i, w));
    for (unsigned i = 0; i < RANS_BLOCK; i += lanes) {
        unsigned most = 0;
        for (unsigned j = 0; j < lanes; j++) {
            uint32_t x = state[j];
            const uint32_t slot = table[plain ? 0 : key[i + j]][x & mask];
            symbol[j] = (uint8_t)slot;
            x = (x >> bits) * ((slot >> 20) + 1) + (slot >> 8 & 4095);
            state[j] = refill(x, &s16);
        }
        for (unsigned j = 0; j < lanes; j++) { /* m->width[symbol[j]], or more; reckoned, since that goes in vectors */
            const uint8_t s = symbol[j], known = (uint8_t)(s - RANS_DICTIONARY) < RANS_MAX_DICTIONARY;
            const uint8_t width = (uint8_t)((s >> 3 > 1 ? s >> 3 : 1) - 1);
            most |= plain ? s == RANS_ESCAPE : known ? 0 : width;
        }
        if (most)
            for (unsigned j = 0; j < lanes; j++) {
                const unsigned width = m->width[symbol[j]], n = w == 4 && width > 16 ? 16 : width;
                const uint32_t x = state[j];
                value[i + j] = m->value[symbol[j]] | (x & ((1u << n) - 1));
                state[j] = refill(x >> n, &s16);
            }
        else
            for (unsigned j = 0; j < lanes; j++)
                value[i + j] = plain ? symbol[j] : m->value[symbol[j]];
        if (w == 4 && most > 16)
            for (unsigned j = 0; j < lanes; j++) {
                const unsigned width = m->width[symbol[j]], n = width > 16 ? width - 16 : 0;
                const uint32_t x = state[j];
                value[i + j] |= (x & ((1u << n) - 1)) << 16;
                state[j] = refill(x >> n, &s16);
            }
    }
    for (unsigned i = 0; i < RANS_BLOCK; i++) {
        uint32_t word;
        if (plain) {
            uint32_t rest = 0;
            for (unsigned k = 0; k + 1 < w; k++)
                rest |= (uint32_t)raw[k * raw_stride + i] << (8 * k);
            word = join_plain(f, value[i] ^ m->flip, rest);
        } else {
            word = rans_add(f, rans_load(prediction + w * i, w), value[i]);
        }
        rans_store(out + w * i, word, w);
    }
    *stream = s16;
}

INLINE void portable_blocks(rans_job *job, unsigned w, unsigned is_float, int plain, unsigned lanes)
{
    while (job->blocks && job->stream <= job->limit) {
        const unsigned c = *job->classes;
        if (c) {
            portable_block(job->model, &job->model->cls[c], w, is_float, plain, lanes, job->state, job->prediction,
                           job->raw, job->raw_stride, job->out, &job->stream);
            if (plain)
                job->raw += RANS_BLOCK;
        } else if (plain) {
            memset(job->out, 0, w * RANS_BLOCK);
        } else {
            memcpy(job->out, job->prediction, w * RANS_BLOCK);
        }
        job->classes++;
        job->out += w * RANS_BLOCK;
        if (!plain)
            job->prediction += w * RANS_BLOCK;
        job->blocks--;
    }
}

void rans_portable(rans_job *job)
{
    const rans_model *m = job->model;
#define CASE(W, F, P)                                                                                                  \
    if (m->format.nbytes == W && (m->format.is_float != 0) == F && m->plain == P) {                                    \
        if (job->lanes == 32)                                                                                          \
            portable_blocks(job, W, F, P, 32);                                                                         \
        else                                                                                                           \
            portable_blocks(job, W, F, P, 64);                                                                         \
        return;                                                                                                        \
    }
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

int rans_find_kernel(const char *name, rans_kernel *kernel)
{
    if (!strcmp(name, "portable")) {
        *kernel = rans_portable;
        return 0;
    }
#ifdef RANS_X86
    __builtin_cpu_init();
    if (!strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("bmi2")) {
        *kernel = rans_avx512;
        return 0;
    }
    if (!strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) {
        *kernel = rans_avx2;
        return 0;
    }
#endif
    return -1;
}

/* ---- Decoding ----------------------------------------------------------------------------------------------- */

static rans_status decode_classes(const rans_model *m, const uint8_t *data, size_t nbytes, uint8_t *classes,
                                  size_t blocks)
{
    if (nbytes < 4)
        return RANS_DAMAGED;
    const uint8_t *end = data + nbytes;
    uint32_t x = rans_load(data, 4);
    unsigned before = 0;
    if (x < RANS_LOW)
        return RANS_DAMAGED;
    data += 4;
    for (size_t i = 0; i < blocks; i++) {
        const uint32_t slot = m->class_slots[before][x & ((1u << RANS_CLASS_BITS) - 1)];
        x = (x >> RANS_CLASS_BITS) * ((slot >> 20) + 1) + (slot >> 8 & 4095);
        classes[i] = (uint8_t)(before = slot & 255);
        if (x < RANS_LOW) {
            if (end - data < 2)
                return RANS_DAMAGED;
            x = x << 16 | rans_load(data, 2);
            data += 2;
        }
    }
    return data == end && x == RANS_LOW ? RANS_OK : RANS_DAMAGED;
}

static rans_status decode_blocks(const rans_model *m, rans_kernel kernel, unsigned lanes, const uint8_t *prediction,
                                 const uint8_t *raw, size_t raw_stride, const uint8_t *data, const uint8_t *end,
                                 const uint8_t *classes, size_t words, uint8_t *out)
{
    const unsigned w = m->format.nbytes;
    const size_t whole = words / RANS_BLOCK, rest = words % RANS_BLOCK;
    uint8_t last_in[RANS_BLOCK * 4 + 64] = {0}, last_out[RANS_BLOCK * 4], last_raw[RANS_BLOCK * 3] = {0};
    uint8_t behind[2 * RANS_NEED_NBYTES];
    uint32_t state[RANS_MAX_LANES];
    for (unsigned j = 0; j < lanes; j++, data += 4) {
        state[j] = rans_load(data, 4);
        if (state[j] < RANS_LOW) /* from here on no step leaves one below: taking no bits is then no step at all */
            return RANS_DAMAGED;
    }
    rans_job job = {m, state, lanes, prediction, raw, raw_stride, out, classes, whole, data, NULL};
    int moved = 0;
    for (int part = 0; part < 2; part++) {
        if (part) {
            if (!rest)
                break;
            if (m->plain) {
                for (unsigned k = 0; *job.classes && k + 1 < w; k++)
                    memcpy(last_raw + k * RANS_BLOCK, job.raw + k * raw_stride, rest);
                job.raw = last_raw;
                job.raw_stride = RANS_BLOCK;
            } else {
                memcpy(last_in, job.prediction, rest * w);
                job.prediction = last_in;
            }
            job.out = last_out;
            job.blocks = 1;
        }
        while (job.blocks) {
            if (!moved) {
                if (end - job.stream >= RANS_NEED_NBYTES) {
                    job.limit = end - RANS_NEED_NBYTES;
                } else { /* what is left goes where reading behind it is harmless */
                    const size_t left = (size_t)(end - job.stream);
                    memset(behind, 0, sizeof behind);
                    memcpy(behind, job.stream, left);
                    job.stream = behind;
                    end = job.limit = behind + left;
                    moved = 1;
                }
            } else if (job.stream > end) {
                return RANS_DAMAGED;
            }
            kernel(&job);
        }
    }
    if (job.stream != end)
        return RANS_DAMAGED;
    for (unsigned j = 0; j < lanes; j++)
        if (state[j] != RANS_LOW)
            return RANS_DAMAGED;
    memcpy(out + whole * RANS_BLOCK * w, last_out, rest * w);
    return RANS_OK;
}

rans_status rans_decode(const rans_models *models, rans_kernel kernel, rans_format format, const uint8_t *prediction,
                        const uint8_t *payload, size_t payload_nbytes, uint8_t *out, size_t nbytes)
{
    const uint8_t *at = payload, *end = payload + payload_nbytes;
    if (!payload_nbytes)
        return RANS_DAMAGED;
    const unsigned head = *at++, mode = head & RANS_MODE_MASK, w = format.nbytes;
    if (mode == RANS_STORED) {
        if (head != mode || (size_t)(end - at) != nbytes)
            return RANS_DAMAGED;
        memcpy(out, at, nbytes);
        return RANS_OK;
    }
    if (w != 1 && w != 2 && w != 4)
        return RANS_DAMAGED;
    const size_t words = nbytes / w, tail = nbytes % w;
    if (mode == RANS_CONSTANT) {
        if (head != mode || tail || (size_t)(end - at) != w)
            return RANS_DAMAGED;
        for (size_t i = 0; i < words; i++)
            memcpy(out + i * w, at, w);
        return RANS_OK;
    }
    if ((head & ~(RANS_MODE_MASK | RANS_WIDE | RANS_EMBEDDED)) || (mode != RANS_RESIDUAL && mode != RANS_PLAIN) ||
        (mode == RANS_RESIDUAL && !prediction) || !words)
        return RANS_DAMAGED;

    rans_models own = {NULL, NULL};
    rans_status status = RANS_DAMAGED;
    uint8_t *classes = NULL;
    if (head & RANS_EMBEDDED) {
        if (end - at < 4)
            return RANS_DAMAGED;
        const size_t length = rans_load(at, 4);
        at += 4;
        if ((size_t)(end - at) < length)
            return RANS_DAMAGED;
        status = rans_parse(at, length, &own);
        if (status != RANS_OK)
            return status;
        at += length;
        models = &own;
        status = RANS_DAMAGED;
    }
    const rans_model *m = mode == RANS_PLAIN ? models->plain : models->residual;
    const size_t blocks = (words + RANS_BLOCK - 1) / RANS_BLOCK;
    const unsigned lanes = head & RANS_WIDE ? 64 : 32;
    if (!m || m->format.nbytes != w || m->format.is_float != format.is_float || m->format.mantissa != format.mantissa)
        goto done;
    if (end - at < 4)
        goto done;
    const size_t class_nbytes = rans_load(at, 4);
    at += 4;
    if ((size_t)(end - at) < class_nbytes)
        goto done;
    classes = malloc(blocks);
    if (!classes) {
        status = RANS_NO_MEMORY;
        goto done;
    }
    status = decode_classes(m, at, class_nbytes, classes, blocks);
    if (status != RANS_OK)
        goto done;
    status = RANS_DAMAGED;
    at += class_nbytes;
    const uint8_t *raw = NULL;
    size_t coded = 0;
    if (m->plain) {
        for (size_t i = 0; i < blocks; i++)
            if (classes[i])
                coded += i + 1 < blocks || words % RANS_BLOCK == 0 ? RANS_BLOCK : words % RANS_BLOCK;
        if (end - at < 4 || rans_load(at, 4) != coded * (w - 1) || (size_t)(end - at - 4) < coded * (w - 1))
            goto done;
        raw = at + 4;
        at = raw + coded * (w - 1);
    }
    if ((size_t)(end - at) < 4 * lanes + tail)
        goto done;
    memcpy(out + words * w, end - tail, tail);
    status = decode_blocks(m, kernel, lanes, prediction, raw, coded, at, end - tail, classes, words, out);
done:
    free(classes);
    rans_free(&own);
    return status;
}
