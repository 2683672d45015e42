/* Training: from sampled blocks to the params of a section. See rans_core.h.
 *
 * Plan: classes of blocks by hard expectation-maximisation, each keyed by the exponent or by the leading mantissa bits,
 *   whichever is cheaper; then the histograms of all (class, key) pairs are merged as long as what a table costs is
 *   more than what merging loses. Everything is bounded by the number of sampled words, at most MAX_BLOCKS blocks.
 */

#include "rans_core.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define RUN 8           /* blocks that are sampled together, so that neighbours' classes can be counted */
#define MAX_BLOCKS 4096 /* sampled */
#define EM_BLOCKS 640
#define EM_ROUNDS 5

/* How many classes are tried. More than 12 gain nothing; 12 cost 1 % against 4 where the payload is small. */
static const unsigned class_counts[] = {1, 4, 12};

static void thin(rans_samples *s)
{
    const size_t run = RUN * RANS_BLOCK;
    size_t kept = 0;
    for (size_t at = 0; at < s->count; at += 2 * run) {
        const size_t n = s->count - at < run ? s->count - at : run;
        memmove(s->value + kept, s->value + at, n * sizeof *s->value);
        if (!s->plain)
            memmove(s->word + kept, s->word + at, n * sizeof *s->word);
        kept += n;
    }
    s->count = kept;
    s->stride *= 2;
}

rans_status rans_sample(rans_samples *s, const uint8_t *prediction, const uint8_t *target, size_t nbytes)
{
    const rans_format f = s->format;
    const size_t words = nbytes / f.nbytes, run = RUN * RANS_BLOCK;
    if (!s->room) {
        s->room = (MAX_BLOCKS + RUN) * RANS_BLOCK;
        s->value = malloc(s->room * sizeof *s->value);
        s->word = s->plain ? NULL : malloc(s->room * sizeof *s->word);
        s->stride = 1;
        if (!s->value || (!s->plain && !s->word))
            return RANS_NO_MEMORY;
    }
    for (size_t at = 0; at < words; at += run) {
        if (s->phase++ % s->stride)
            continue;
        if (s->count >= (size_t)MAX_BLOCKS * RANS_BLOCK)
            thin(s);
        size_t n = words - at < run ? words - at : run;
        for (size_t i = at; i < at + n; i++, s->count++) {
            const uint32_t t = rans_load(target + i * f.nbytes, f.nbytes);
            if (s->plain) {
                const unsigned bits = 8 * f.nbytes;
                s->value[s->count] = f.is_float ? (t << 1 | t >> (bits - 1)) & (0xffffffffu >> (32 - bits)) : t;
            } else {
                s->word[s->count] = rans_load(prediction + i * f.nbytes, f.nbytes);
                s->value[s->count] = rans_residual(f, s->word[s->count], t);
            }
        }
        while (s->count % RANS_BLOCK) { /* the rest of a last block is said to be as predicted, as the encoder says */
            s->value[s->count] = 0;
            if (!s->plain)
                s->word[s->count] = 0;
            s->count++;
        }
    }
    s->seen += words;
    return RANS_OK;
}

typedef struct {
    const rans_samples *samples;
    size_t blocks, live_count;
    uint32_t *live; /* blocks that are not their prediction, all of them */
    uint8_t *symbol, *key[2];
    unsigned symbols; /* one more than the largest */
    unsigned keys, top_key, flip;
    uint32_t dictionary[RANS_MAX_DICTIONARY];
    unsigned dictionary_count;
    double scale; /* words in all per word sampled */
    float nlogn[4096];
    uint32_t nothing[256];
} training;

static inline float nlogn(const training *t, uint32_t n)
{
    return n < 4096 ? t->nlogn[n] : (float)n * log2f((float)n);
}

/* Values of 16 and more that come so often that a symbol of their own pays: Adam's steps and weight decay repeat. */
static void find_dictionary(training *t)
{
    enum { SIZE = 1 << 14 };
    const rans_samples *s = t->samples;
    uint32_t *table = calloc(2 * SIZE, sizeof *table);
    if (!table)
        return;
    for (size_t i = 0; i < t->live_count; i++)
        for (size_t j = 0; j < RANS_BLOCK; j += 2) {
            const uint32_t value = s->value[(size_t)t->live[i] * RANS_BLOCK + j];
            if (value < 16)
                continue;
            /* Two candidates a bucket, the weaker one worn down by newcomers: what is frequent stays. */
            uint32_t *entry = table + 4 * (value * 2654435761u >> 19);
            if (entry[0] == value)
                entry[1]++;
            else if (entry[2] == value)
                entry[3]++;
            else {
                uint32_t *weak = entry[1] <= entry[3] ? entry : entry + 2;
                if (weak[1])
                    weak[1]--;
                else {
                    weak[0] = value;
                    weak[1] = 1;
                }
            }
        }
    const uint32_t least = (uint32_t)(t->live_count * RANS_BLOCK / 2 / 512 + 8);
    while (t->dictionary_count < RANS_MAX_DICTIONARY) {
        unsigned best = 0;
        for (unsigned i = 2; i < 2 * SIZE; i += 2)
            if (table[i + 1] > table[best + 1])
                best = i;
        if (table[best + 1] < least)
            break;
        table[best + 1] = 0;
        t->dictionary[t->dictionary_count++] = table[best];
    }
    free(table);
}

static rans_status begin(training *t, const rans_samples *s)
{
    const rans_format f = s->format;
    memset(t, 0, sizeof *t);
    t->samples = s;
    t->blocks = s->count / RANS_BLOCK;
    t->keys = s->plain ? 1 : RANS_KEYS;
    t->scale = s->count ? (double)s->seen / (double)s->count : 1;
    if (t->scale < 1)
        t->scale = 1;
    t->live = malloc(t->blocks * sizeof *t->live + 1);
    t->symbol = malloc(3 * s->count + 1);
    if (!t->live || !t->symbol)
        return RANS_NO_MEMORY;
    t->key[0] = t->symbol + s->count;
    t->key[1] = t->key[0] + s->count;
    for (unsigned n = 1; n < 4096; n++)
        t->nlogn[n] = (float)n * log2f((float)n);
    for (size_t b = 0; b < t->blocks; b++) {
        uint32_t differs = 0;
        for (size_t i = 0; i < RANS_BLOCK; i++)
            differs |= s->value[b * RANS_BLOCK + i];
        if (differs)
            t->live[t->live_count++] = (uint32_t)b;
    }
    if (s->plain) {
        const unsigned shift = 8 * f.nbytes - 8;
        size_t count[256] = {0};
        for (size_t i = 0; i < s->count; i++)
            count[s->value[i] >> shift]++;
        unsigned rarest = 255;
        for (unsigned b = 0; b < 256; b++)
            if (count[b] < count[rarest])
                rarest = b;
        t->flip = rarest ^ 255;
        for (size_t i = 0; i < s->count; i++)
            t->symbol[i] = (uint8_t)(s->value[i] >> shift ^ t->flip);
        memset(t->key[0], 0, 2 * s->count);
        t->symbols = 255;
        return RANS_OK;
    }
    if (f.nbytes == 4)
        find_dictionary(t);
    if (f.is_float) {
        const uint32_t mask = (1u << (8 * f.nbytes - 1 - f.mantissa)) - 1;
        size_t *count = calloc(mask + 1, sizeof *count), above = 0;
        if (!count)
            return RANS_NO_MEMORY;
        for (size_t i = 0; i < s->count; i++)
            count[s->word[i] >> f.mantissa & mask]++;
        /* A few outliers (infinities, say) must not push all others out of the window. */
        for (t->top_key = mask; t->top_key; t->top_key--)
            if ((above += count[t->top_key]) > s->count / 4096)
                break;
        free(count);
        const unsigned seen = f.mantissa < 4 ? f.mantissa : 4;
        const rans_class by[2] = {{f.mantissa, mask, (int)t->top_key, {0}},
                                  {f.mantissa - seen, (1u << seen) - 1, 15, {0}}};
        for (size_t i = 0; i < s->count; i++) {
            t->key[0][i] = (uint8_t)rans_key(&by[0], s->word[i]);
            t->key[1][i] = (uint8_t)rans_key(&by[1], s->word[i]);
        }
    } else {
        memset(t->key[0], 0, 2 * s->count);
    }
    for (size_t i = 0; i < s->count; i++) {
        t->symbol[i] = (uint8_t)rans_bucket(s->value[i]);
        for (unsigned d = 0; d < t->dictionary_count; d++)
            if (t->dictionary[d] == s->value[i])
                t->symbol[i] = (uint8_t)(RANS_DICTIONARY + d);
        if (t->symbol[i] >= t->symbols)
            t->symbols = t->symbol[i] + 1u;
    }
    return RANS_OK;
}

typedef uint32_t histogram[256];

typedef struct {
    unsigned classes, sources;
    uint8_t *of_block;                    /* of all blocks; 0: its prediction */
    histogram (*count)[2][RANS_KEYS];     /* per class and kind of key */
    uint16_t *cost;                       /* as in rans_model */
    uint32_t per_class[RANS_MAX_CLASSES]; /* blocks */
} clustering;

static void add_block(const training *t, clustering *c, size_t block, unsigned cls)
{
    const size_t first = block * RANS_BLOCK;
    for (size_t i = first; i < first + RANS_BLOCK; i++) {
        c->count[cls][0][t->key[0][i]][t->symbol[i]]++;
        c->count[cls][1][t->key[1][i]][t->symbol[i]]++;
    }
}

static float entropy(const training *t, histogram *by_key)
{
    float bits = 0;
    for (unsigned k = 0; k < t->keys; k++) {
        uint32_t n = 0;
        for (unsigned s = 0; s < t->symbols; s++)
            if (by_key[k][s]) {
                n += by_key[k][s];
                bits -= nlogn(t, by_key[k][s]);
            }
        bits += nlogn(t, n);
    }
    return bits;
}

static void choose_sources(const training *t, clustering *c)
{
    c->sources = 0;
    if (t->keys == 1 || !t->samples->format.is_float)
        return;
    for (unsigned i = 0; i < c->classes; i++)
        if (entropy(t, c->count[i][1]) < 0.99f * entropy(t, c->count[i][0]))
            c->sources |= 1u << i;
}

/* Within a hundredth, which is all that a choice of class needs. */
static inline float rough_log2(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const float m = (float)(bits & 0x7fffff) * (1.0f / 8388608);
    return (float)(bits >> 23) - 127 + m * (1.3465f - 0.3465f * m);
}

/* Prices in 1/16 bit from the counts, smoothed by what all classes together say of a key. */
static void set_costs(const training *t, clustering *c)
{
    const size_t half = (size_t)RANS_KEYS << 12;
    for (unsigned source = 0; source < 2; source++)
        for (unsigned k = 0; k < t->keys; k++) {
            float all[256], prior[256], sum = 0;
            for (unsigned s = 0; s < t->symbols; s++) {
                uint32_t n = 0;
                for (unsigned i = 0; i < c->classes; i++)
                    n += c->count[i][source][k][s];
                sum += all[s] = (float)n + 0.1f;
            }
            for (unsigned s = 0; s < t->symbols; s++)
                prior[s] = 16 * all[s] / sum;
            for (unsigned i = 0; i < c->classes; i++) {
                uint16_t *cost = c->cost + source * half + ((size_t)k << 12) + i;
                if ((c->sources >> i & 1) != source) {
                    for (unsigned s = 0; s < t->symbols; s++)
                        cost[s << 4] = 0;
                    continue;
                }
                float n = 16;
                for (unsigned s = 0; s < t->symbols; s++)
                    n += (float)c->count[i][source][k][s];
                const float total = log2f(n);
                for (unsigned s = 0; s < t->symbols; s++) {
                    const uint32_t own = c->count[i][source][k][s];
                    const float bits = total - rough_log2((float)own + prior[s]);
                    cost[s << 4] = (uint16_t)(bits > 31 ? 496 : 16 * bits + 0.5f);
                }
            }
        }
}

static unsigned cheapest(const training *t, const clustering *c, size_t block, const float *prior)
{
    const size_t first = block * RANS_BLOCK, half = (size_t)RANS_KEYS << 12;
    uint16_t sum[16] = {0};
    for (size_t i = first; i < first + RANS_BLOCK; i++) {
        const uint16_t *row = c->cost + ((((size_t)t->key[0][i] << 8) + t->symbol[i]) << 4);
        for (unsigned k = 0; k < 16; k++)
            sum[k] = (uint16_t)(sum[k] + row[k]);
    }
    if (c->sources)
        for (size_t i = first; i < first + RANS_BLOCK; i++) {
            const uint16_t *row = c->cost + half + ((((size_t)t->key[1][i] << 8) + t->symbol[i]) << 4);
            for (unsigned k = 0; k < 16; k++)
                sum[k] = (uint16_t)(sum[k] + row[k]);
        }
    unsigned best = 0;
    float least = INFINITY;
    for (unsigned k = 0; k < c->classes; k++) {
        const float bits = (float)sum[k] + prior[k];
        if (bits < least) {
            least = bits;
            best = k;
        }
    }
    return best;
}

typedef struct {
    float rank;
    uint32_t block;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    return x->rank < y->rank ? -1 : x->rank > y->rank ? 1 : x->block < y->block ? -1 : x->block > y->block;
}

static rans_status cluster(const training *t, clustering *c, unsigned classes)
{
    c->classes = classes;
    c->of_block = calloc(t->blocks + 1, 1);
    c->count = calloc(classes, sizeof *c->count);
    c->cost = calloc((size_t)2 * RANS_KEYS << 12, sizeof *c->cost);
    if (!c->of_block || !c->count || !c->cost)
        return RANS_NO_MEMORY;
    float prior[16] = {0};
    if (classes > 1) {
        const size_t n = t->live_count < EM_BLOCKS ? t->live_count : EM_BLOCKS;
        ranked *order = malloc(n * sizeof *order);
        uint8_t *chosen = malloc(n);
        if (!order || !chosen) {
            free(order);
            free(chosen);
            return RANS_NO_MEMORY;
        }
        for (size_t i = 0; i < n; i++) {
            const uint32_t block = t->live[i * t->live_count / n];
            uint32_t sum = 0;
            for (size_t j = 0; j < RANS_BLOCK; j++)
                sum += t->symbol[(size_t)block * RANS_BLOCK + j];
            order[i] = (ranked){(float)sum, block};
        }
        qsort(order, n, sizeof *order, by_rank);
        for (size_t i = 0; i < n; i++)
            chosen[i] = (uint8_t)(i * classes / n);
        for (unsigned round = 0; round < EM_ROUNDS; round++) {
            memset(c->count, 0, classes * sizeof *c->count);
            memset(c->per_class, 0, sizeof c->per_class);
            for (size_t i = 0; i < n; i++) {
                add_block(t, c, order[i].block, chosen[i]);
                c->per_class[chosen[i]]++;
            }
            choose_sources(t, c);
            set_costs(t, c);
            for (unsigned k = 0; k < classes; k++)
                prior[k] = 16 * (log2f((float)n) - log2f((float)c->per_class[k] + 0.25f));
            for (size_t i = 0; i < n; i++)
                chosen[i] = (uint8_t)cheapest(t, c, order[i].block, prior);
        }
        free(order);
        free(chosen);
    }
    /* Classes that nothing is in any more go, and all blocks are counted. */
    uint8_t renumbered[16] = {0};
    unsigned left = 0, sources = 0;
    histogram(*count)[2][RANS_KEYS] = calloc(classes, sizeof *count);
    if (!count)
        return RANS_NO_MEMORY;
    for (size_t i = 0; i < t->live_count; i++) {
        const unsigned k = classes > 1 ? cheapest(t, c, t->live[i], prior) : 0;
        c->of_block[t->live[i]] = (uint8_t)(k + 1);
    }
    memset(c->per_class, 0, sizeof c->per_class);
    for (size_t i = 0; i < t->live_count; i++)
        c->per_class[c->of_block[t->live[i]] - 1]++;
    for (unsigned k = 0; k < classes; k++)
        if (c->per_class[k]) {
            sources |= (c->sources >> k & 1) << left;
            renumbered[k] = (uint8_t)left++;
        }
    free(c->count);
    c->count = count;
    c->classes = left ? left : 1;
    c->sources = sources;
    for (size_t i = 0; i < t->live_count; i++) {
        const unsigned k = renumbered[c->of_block[t->live[i]] - 1];
        c->of_block[t->live[i]] = (uint8_t)(k + 1);
        add_block(t, c, t->live[i], k);
    }
    if (classes == 1)
        choose_sources(t, c);
    return RANS_OK;
}

/* About what the data will take, and tables for all the symbols that were seen at the price that merging leaves. */
static float outlook(const training *t, const clustering *c)
{
    float cells = 0, bits = 0;
    for (unsigned i = 0; i < c->classes; i++) {
        histogram *count = c->count[i][c->sources >> i & 1];
        bits += entropy(t, count);
        for (unsigned k = 0; k < t->keys; k++)
            for (unsigned s = 0; s < t->symbols; s++)
                cells += count[k][s] != 0;
    }
    return bits * (float)t->scale + 2 * cells;
}

static void drop(clustering *c)
{
    free(c->of_block);
    free(c->count);
    free(c->cost);
}

/* ---- Tables ------------------------------------------------------------------------------------------------- */

#define TABLE_BITS_EACH 4.6f /* what a symbol of a table takes in the params */

typedef struct {
    uint32_t *count; /* 256 */
    uint32_t n;
    unsigned first, end; /* of its symbols */
    float bits; /* coded with a table of its own, and that table */
    int into;   /* the table it was merged into, or -1 */
    float best;
    int partner;
} table;

static float data_bits(const training *t, const table *a, const table *b, float *present)
{
    const unsigned first = b && b->first < a->first ? b->first : a->first;
    const unsigned end = b && b->end > a->end ? b->end : a->end;
    const uint32_t *x = a->count, *y = b ? b->count : t->nothing;
    float bits = 0;
    *present = 0;
    for (unsigned s = first; s < end; s++) {
        const uint32_t sum = x[s] + y[s];
        bits -= nlogn(t, sum);
        *present += sum != 0;
    }
    return (bits + nlogn(t, a->n + (b ? b->n : 0))) * (float)t->scale;
}

static float table_bits(const training *t, const table *a, const table *b)
{
    float present;
    const float bits = data_bits(t, a, b, &present);
    return bits + present * TABLE_BITS_EACH + 16;
}

static void consider(const training *t, table *tables, int i, int j)
{
    const float gain = table_bits(t, &tables[i], &tables[j]) - tables[i].bits - tables[j].bits;
    if (gain < tables[i].best) {
        tables[i].best = gain;
        tables[i].partner = j;
    }
}

/* Tables are in the order of their means: what is alike is near, so that not all pairs need be tried. */
#define NEAR 12

static void find_partner(const training *t, table *tables, int count, int i)
{
    tables[i].best = INFINITY;
    tables[i].partner = -1;
    for (int j = i + 1, tried = 0; j < count && tried < NEAR; j++)
        if (tables[j].into < 0) {
            consider(t, tables, i, j);
            tried++;
        }
}

/* Merges tables while that saves bits, or there are too many. */
static void merge(const training *t, table *tables, int count)
{
    int left = count;
    for (int i = 0; i < count; i++)
        find_partner(t, tables, count, i);
    for (;;) {
        int best = -1;
        for (int i = 0; i < count; i++)
            if (tables[i].into < 0 && tables[i].partner >= 0 && (best < 0 || tables[i].best < tables[best].best))
                best = i;
        if (best < 0 || (tables[best].best >= 0 && left <= RANS_MAX_TABLES))
            return;
        table *kept = &tables[best], *gone = &tables[tables[best].partner];
        for (unsigned s = gone->first; s < gone->end; s++)
            kept->count[s] += gone->count[s];
        kept->first = gone->first < kept->first ? gone->first : kept->first;
        kept->end = gone->end > kept->end ? gone->end : kept->end;
        kept->n += gone->n;
        kept->bits = table_bits(t, kept, NULL);
        gone->into = best;
        left--;
        find_partner(t, tables, count, best);
        const int dead = (int)(gone - tables);
        for (int i = dead - 1; i >= 0; i--)
            if (tables[i].into < 0 && i != best && (tables[i].partner == best || tables[i].partner == dead))
                find_partner(t, tables, count, i);
        for (int i = best - 1, seen = 0; i >= 0 && seen < NEAR; i--)
            if (tables[i].into < 0) {
                if (tables[i].partner != best)
                    consider(t, tables, i, best);
                seen++;
            }
    }
}

typedef struct {
    uint8_t data[RANS_MAX_TABLES * 400 + 4096];
    size_t nibbles;
} writer;

static void put_nibble(writer *w, unsigned value)
{
    if (w->nibbles % 2)
        w->data[w->nibbles / 2] |= (uint8_t)(value << 4);
    else
        w->data[w->nibbles / 2] = (uint8_t)value;
    w->nibbles++;
}

static void put_step(writer *w, int *before, int value, int most)
{
    const int step = value - *before;
    const int code = step < 0 ? -2 * step - 1 : 2 * step;
    if (code <= most)
        put_nibble(w, (unsigned)code);
    else {
        put_nibble(w, 15);
        put_nibble(w, (unsigned)value >> 4);
        put_nibble(w, (unsigned)value & 15);
    }
    *before = value;
}

static void put_levels(writer *w, const uint8_t *level, unsigned count)
{
    int before = 40;
    unsigned last = 0;
    for (unsigned s = 0; s < count; s++)
        if (level[s])
            last = s + 1;
    for (unsigned s = 0; s < count;) {
        if (s >= last) {
            put_nibble(w, 14);
            put_nibble(w, 15);
            return;
        }
        if (level[s]) {
            put_step(w, &before, level[s++], 13);
            continue;
        }
        unsigned run = 0;
        while (run < 15 && s + run < count && !level[s + run])
            run++;
        put_nibble(w, 14);
        put_nibble(w, run - 1);
        s += run;
    }
}

static void find_levels(const float *count, unsigned symbols, uint8_t *level)
{
    float most = 0;
    for (unsigned s = 0; s < symbols; s++)
        most = count[s] > most ? count[s] : most;
    for (unsigned s = 0; s < symbols; s++) {
        const float step = count[s] > 0 ? 8 * log2f(count[s] / most) + 119.5f : 0;
        level[s] = (uint8_t)(count[s] > 0 ? step < 1 ? 1 : (unsigned)step : 0);
    }
}

/* The serialised model of a clustering, and what it and the data take together. */
static rans_status serialise(const training *t, const clustering *c, uint8_t **out, size_t *nbytes, float *bits)
{
    const rans_format f = t->samples->format;
    /* A bit less halves what gathers touch (a tenth faster) and costs nothing where there are few symbols. */
    const uint8_t bits_of_tables = f.nbytes == 4 || t->samples->plain ? RANS_MAX_BITS : RANS_MAX_BITS - 1;
    const int contexts = (int)(c->classes * t->keys);
    table *tables = calloc((size_t)contexts, sizeof *tables);
    uint32_t *counts = calloc((size_t)contexts, sizeof(histogram));
    int *slot = calloc((size_t)contexts, sizeof *slot), *place = calloc((size_t)contexts, sizeof *place);
    writer *w = calloc(1, sizeof *w);
    ranked *order = NULL;
    rans_status status = RANS_NO_MEMORY;
    int used = 0;
    *bits = 0;
    if (!tables || !counts || !slot || !w || !place)
        goto done;
    order = malloc((size_t)contexts * sizeof *order);
    if (!order)
        goto done;
    for (unsigned i = 0; i < c->classes * t->keys; i++) {
        const uint32_t *count = c->count[i / t->keys][c->sources >> (i / t->keys) & 1][i % t->keys];
        float sum = 0, n = 0;
        for (unsigned s = 0; s < t->symbols; s++) {
            sum += (float)s * (float)count[s];
            n += (float)count[s];
        }
        slot[i] = -1;
        if (n > 0)
            order[used++] = (ranked){sum / n, i};
    }
    qsort(order, (size_t)used, sizeof *order, by_rank);
    for (int i = 0; i < used; i++) {
        const unsigned from = order[i].block;
        const uint32_t *count = c->count[from / t->keys][c->sources >> (from / t->keys) & 1][from % t->keys];
        table *made = &tables[i];
        slot[from] = i;
        made->into = -1;
        made->count = counts + (size_t)i * 256;
        made->first = t->symbols;
        for (unsigned s = 0; s < t->symbols; s++)
            if (count[s]) {
                made->n += made->count[s] = count[s];
                made->first = s < made->first ? s : made->first;
                made->end = s + 1;
            }
        made->bits = table_bits(t, made, NULL);
    }
    if (!used) { /* nothing to learn from: any table will do, since it can be escaped */
        counts[0] = tables[0].n = tables[0].end = 1;
        tables[0].count = counts;
        tables[0].into = -1;
        slot[0] = 0;
        used = 1;
    }
    merge(t, tables, used);
    /* Again in the order of their means, so that neighbouring keys have neighbouring tables. */
    unsigned count = 0;
    float present;
    for (int i = 0; i < used; i++)
        if (tables[i].into < 0) {
            double sum = 0;
            for (unsigned s = 0; s < t->symbols; s++)
                sum += (double)s * tables[i].count[s];
            order[count++] = (ranked){(float)(sum / tables[i].n), (uint32_t)i};
            *bits += data_bits(t, &tables[i], NULL, &present);
        }
    qsort(order, count, sizeof *order, by_rank);
    for (unsigned i = 0; i < count; i++)
        place[order[i].block] = (int)i;

    int before = 0;
    for (unsigned i = 0; i < c->classes; i++) {
        int map[RANS_KEYS], last = -1;
        for (unsigned k = 0; k < t->keys; k++) {
            int at = slot[i * t->keys + k];
            while (at >= 0 && tables[at].into >= 0)
                at = tables[at].into;
            map[k] = at < 0 ? last : place[at];
            last = map[k];
        }
        for (unsigned k = t->keys; k-- > 0;) { /* keys before the first that was seen */
            if (map[k] < 0)
                map[k] = k + 1 < t->keys && map[k + 1] >= 0 ? map[k + 1] : 0;
        }
        for (unsigned k = 0; k < t->keys; k++)
            put_step(w, &before, map[k], 14);
    }
    uint8_t level[256];
    float share[256];
    const unsigned all = c->classes + 1;
    uint32_t moves[RANS_MAX_CLASSES + 1][RANS_MAX_CLASSES + 1] = {{0}};
    for (size_t b = 0; b < t->blocks; b++)
        if (b % RUN)
            moves[c->of_block[b - 1]][c->of_block[b]]++;
    for (unsigned i = 0; i < all; i++) {
        float n = 0;
        for (unsigned k = 0; k < all; k++) {
            share[k] = (float)moves[i][k] + 0.05f;
            n += share[k];
        }
        for (unsigned k = 0; k < all; k++)
            *bits += (float)moves[i][k] * log2f(n / share[k]) * (float)t->scale;
        find_levels(share, all, level);
        put_levels(w, level, all);
    }
    for (unsigned i = 0; i < count; i++) {
        const uint32_t *n = tables[order[i].block].count;
        unsigned first = 255, last = 0;
        for (unsigned s = 0; s < RANS_ESCAPE; s++) {
            share[s] = (float)n[s];
            if (n[s] && s < RANS_DICTIONARY) {
                first = s < first ? s : first;
                last = s;
            }
        }
        for (unsigned s = first; s < last; s++) /* gaps would cost as much as saying that there is a little */
            if (share[s] == 0)
                share[s] = 0.3f;
        if (first == 255 && !t->dictionary_count)
            share[0] = 1;
        find_levels(share, RANS_ESCAPE, level);
        put_levels(w, level, RANS_ESCAPE);
    }
    const size_t body = (w->nibbles + 1) / 2, head = 12 + 4 * (size_t)t->dictionary_count;
    uint8_t *made = malloc(head + body);
    if (!made)
        goto done;
    made[0] = t->samples->plain ? RANS_PLAIN : RANS_RESIDUAL;
    made[1] = (uint8_t)(f.nbytes | (f.is_float ? 0x80u : 0));
    made[2] = (uint8_t)f.mantissa;
    made[3] = (uint8_t)c->classes;
    made[4] = bits_of_tables;
    made[5] = (uint8_t)count;
    made[6] = (uint8_t)t->dictionary_count;
    made[7] = (uint8_t)t->flip;
    rans_store(made + 8, t->top_key, 2);
    rans_store(made + 10, c->sources, 2);
    for (unsigned i = 0; i < t->dictionary_count; i++)
        rans_store(made + 12 + 4 * i, t->dictionary[i], 4);
    memcpy(made + head, w->data, body);
    *out = made;
    *nbytes = head + body;
    *bits += 8 * (float)*nbytes;
    status = RANS_OK;
done:
    free(order);
    free(tables);
    free(counts);
    free(slot);
    free(place);
    free(w);
    return status;
}

rans_status rans_train(const rans_samples *samples, uint8_t **params, size_t *nbytes)
{
    if (!samples->count)
        return RANS_OK;
    training *t = malloc(sizeof *t);
    if (!t)
        return RANS_NO_MEMORY;
    rans_status status = begin(t, samples);
    uint8_t *best = NULL;
    size_t best_nbytes = 0;
    float least = INFINITY;
    for (unsigned i = 0; status == RANS_OK && i < sizeof class_counts / sizeof *class_counts; i++) {
        const unsigned classes = class_counts[i];
        clustering c = {0};
        uint8_t *made = NULL;
        size_t made_nbytes = 0;
        float bits = INFINITY;
        if (classes > 1 && t->live_count < 4 * classes)
            break;
        status = cluster(t, &c, classes);
        if (status == RANS_OK && (classes == 1 || outlook(t, &c) < least))
            status = serialise(t, &c, &made, &made_nbytes, &bits);
        drop(&c);
        if (!made || (best && bits >= least)) { /* more will not help either */
            free(made);
            break;
        }
        free(best);
        best = made;
        best_nbytes = made_nbytes;
        least = bits;
    }
    if (status == RANS_OK) {
        uint8_t *grown = realloc(*params, *nbytes + best_nbytes);
        if (grown) {
            memcpy(grown + *nbytes, best, best_nbytes);
            *params = grown;
            *nbytes += best_nbytes;
        } else {
            status = RANS_NO_MEMORY;
        }
    }
    free(best);
    free(t->live);
    free(t->symbol);
    free(t);
    return status;
}
