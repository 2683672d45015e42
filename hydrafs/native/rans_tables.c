/* Training, second half: from classes of blocks to the params of a section. See rans_train.h.
 *
 * Plan: the histograms of all (class, key) pairs are merged as long as what a table costs is more than what merging
 *   loses; what is left is written as the levels that docs/RANS.md describes.
 */

#include "rans_train.h"

#include <stdlib.h>

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

typedef struct {
    float rank;
    uint32_t block;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    return x->rank < y->rank ? -1 : x->rank > y->rank ? 1 : x->block < y->block ? -1 : x->block > y->block;
}

/* What two tables as one code their data in, or one alone, in bits; and how many symbols that has. */
static float data_bits(const rans_training *t, const table *a, const table *b, unsigned *present)
{
    const unsigned first = b && b->first < a->first ? b->first : a->first;
    const unsigned end = b && b->end > a->end ? b->end : a->end;
    const uint32_t *x = a->count, *y = b ? b->count : t->nothing;
    uint32_t sum = 0, seen = 0; /* at most what MAX_BLOCKS words take: below 2**28 */
    for (unsigned s = first; s < end; s++) {
        sum += rans_nlogn(t, x[s] + y[s]);
        seen += x[s] + y[s] != 0;
    }
    *present = seen;
    const uint32_t all = rans_nlogn(t, a->n + (b ? b->n : 0));
    return (float)(int32_t)(all - sum) / 16 * (float)t->scale;
}

static float table_bits(const rans_training *t, const table *a, const table *b)
{
    unsigned present;
    const float bits = data_bits(t, a, b, &present);
    return bits + (float)present * TABLE_BITS_EACH + 16;
}

static void consider(const rans_training *t, table *tables, int i, int j)
{
    const float gain = table_bits(t, &tables[i], &tables[j]) - tables[i].bits - tables[j].bits;
    if (gain < tables[i].best) {
        tables[i].best = gain;
        tables[i].partner = j;
    }
}

/* Tables are in the order of their means: what is alike is near, so that not all pairs need be tried. */
#define NEAR 12

static void find_partner(const rans_training *t, table *tables, int count, int i)
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
static void merge(const rans_training *t, table *tables, int count)
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
rans_status rans_tabulate(const rans_training *t, const rans_clustering *c, uint8_t **out, size_t *nbytes, float *bits)
{
    const rans_format f = t->samples->format;
    /* A bit less halves what gathers touch (a tenth faster) and costs nothing where there are few symbols. */
    const uint8_t bits_of_tables = f.nbytes == 4 || t->samples->plain ? RANS_MAX_BITS : RANS_MAX_BITS - 1;
    const int contexts = (int)(c->classes * t->keys);
    table *tables = calloc((size_t)contexts, sizeof *tables);
    uint32_t *counts = calloc((size_t)contexts, 256 * sizeof *counts);
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
        const uint32_t *count = rans_counts(t, c, i / t->keys, i % t->keys);
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
        const uint32_t *count = rans_counts(t, c, from / t->keys, from % t->keys);
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
    unsigned present;
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
        if (b % RANS_RUN)
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

