/* Training, first half: from sampled blocks to classes of blocks. See rans_train.h.
 *
 * Plan: classes of blocks by hard expectation-maximisation on some of them, each keyed by the exponent or by the leading
 *   mantissa bits, whichever is cheaper; then all blocks are sorted into them once. Everything is bounded by the number
 *   of sampled words, at most MAX_BLOCKS blocks.
 * Invariant: what machines do differently (RANS_LEVELS) is whole numbers; all else is compiled once.
 */

#include "rans_train.h"

#include <stdlib.h>

#define MAX_BLOCKS 4096 /* sampled */
#define EM_BLOCKS 640
#define EM_ROUNDS 5

/* How many classes are tried. More than 12 gain nothing; 12 cost 1 % against 4 where the payload is small. */
static const unsigned class_counts[] = {1, 4, 12};

/* ---- Samples ------------------------------------------------------------------------------------------------ */

static void thin(rans_samples *s)
{
    const size_t run = RANS_RUN * RANS_BLOCK, w = s->format.nbytes;
    size_t kept = 0;
    for (size_t at = 0; at < s->count; at += 2 * run) {
        const size_t n = s->count - at < run ? s->count - at : run;
        memmove(s->target + kept * w, s->target + at * w, n * w);
        if (!s->plain)
            memmove(s->prediction + kept * w, s->prediction + at * w, n * w);
        kept += n;
    }
    s->count = kept;
    s->stride *= 2;
}

static void append(uint8_t *to, const uint8_t *from, size_t nbytes, size_t room)
{
    memcpy(to, from, nbytes);
    memset(to + nbytes, 0, room - nbytes);
}

rans_status rans_sample(rans_samples *s, const uint8_t *prediction, const uint8_t *target, size_t nbytes)
{
    const size_t w = s->format.nbytes, words = nbytes / w, run = RANS_RUN * RANS_BLOCK;
    if (!s->target) {
        const size_t room = (MAX_BLOCKS + RANS_RUN) * RANS_BLOCK * w;
        s->target = malloc(room);
        s->prediction = s->plain ? NULL : malloc(room);
        s->stride = 1;
        if (!s->target || (!s->plain && !s->prediction))
            return RANS_NO_MEMORY;
    }
    for (size_t at = 0; at < words; at += run) {
        if (s->phase++ % s->stride)
            continue;
        if (s->count >= (size_t)MAX_BLOCKS * RANS_BLOCK)
            thin(s);
        const size_t n = words - at < run ? words - at : run;
        /* The rest of a last block is said to be as predicted, as the encoder says. */
        const size_t padded = (n + RANS_BLOCK - 1) / RANS_BLOCK * RANS_BLOCK;
        append(s->target + s->count * w, target + at * w, n * w, padded * w);
        if (!s->plain)
            append(s->prediction + s->count * w, prediction + at * w, n * w, padded * w);
        s->count += padded;
    }
    s->seen += words;
    return RANS_OK;
}

/* ---- Blocks, keys and symbols ------------------------------------------------------------------------------- */

/* Values of 16 and more that come so often that a symbol of their own pays: Adam's steps and weight decay repeat. */
static void find_dictionary(rans_training *t)
{
    enum { SIZE = 1 << 14 };
    const rans_samples *s = t->samples;
    uint32_t *table = calloc(2 * SIZE, sizeof *table);
    if (!table)
        return;
    for (size_t i = 0; i < t->live_count; i++)
        for (size_t j = 0; j < RANS_BLOCK; j += 2) {
            const size_t at = 4 * ((size_t)t->live[i] * RANS_BLOCK + j);
            const uint32_t value =
                rans_residual(s->format, rans_load(s->prediction + at, 4), rans_load(s->target + at, 4));
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

/* The largest exponent that is a key of its own. */
static rans_status find_top_key(rans_training *t)
{
    const rans_samples *s = t->samples;
    const unsigned w = s->format.nbytes, shift = s->format.mantissa;
    const uint32_t mask = (1u << (8 * w - 1 - shift)) - 1;
    size_t *count = calloc(2 * ((size_t)mask + 1), sizeof *count), *odd = count + mask + 1, above = 0;
    if (!count)
        return RANS_NO_MEMORY;
    for (size_t i = 0; i < s->count; i += 2) { /* in turns, so that one exponent's count need not wait for itself */
        count[rans_load(s->prediction + i * w, w) >> shift & mask]++;
        odd[rans_load(s->prediction + (i + 1) * w, w) >> shift & mask]++;
    }
    /* A few outliers (infinities, say) must not push all others out of the window. */
    for (t->top_key = mask; t->top_key; t->top_key--)
        if ((above += count[t->top_key] + odd[t->top_key]) > s->count / 4096)
            break;
    free(count);
    return RANS_OK;
}

/* So that the byte that must be escaped is the rarest. */
static void find_flip(rans_training *t)
{
    const rans_samples *s = t->samples;
    const unsigned w = s->format.nbytes;
    size_t count[2][256] = {{0}};
    for (size_t i = 0; i < s->count; i++)
        count[i & 1][rans_split(s->format, rans_load(s->target + i * w, w)) >> (8 * w - 8)]++;
    unsigned rarest = 255;
    for (unsigned b = 0; b < 256; b++)
        if (count[0][b] + count[1][b] < count[0][rarest] + count[1][rarest])
            rarest = b;
    t->flip = rarest ^ 255;
}

INLINE void fill_blocks(rans_training *t, unsigned w, unsigned is_float, int plain)
{
    const rans_samples *s = t->samples;
    const unsigned shift = s->format.mantissa, seen = shift < 4 ? shift : 4;
    rans_shape h = {.format = s->format, .plain = plain, .flip = t->flip, .dictionary = t->dictionary,
                    .dictionary_count = t->dictionary_count, .second = t->kinds > 1};
    if (is_float && !plain) {
        h.by[0] = (rans_class){shift, (1u << (8 * w - 1 - shift)) - 1, (int)t->top_key, {0}};
        h.by[1] = (rans_class){shift - seen, (1u << seen) - 1, 15, {0}};
    }
    rans_block b;
    uint16_t largest = 0;
    for (size_t i = 0; i < t->live_count; i++) {
        const size_t at = (size_t)t->live[i] * RANS_BLOCK * w;
        rans_fill(&h, w, is_float, plain, plain ? NULL : s->prediction + at, s->target + at, &b);
        for (unsigned kind = 0; kind < t->kinds; kind++)
            memcpy(t->context[kind] + i * RANS_BLOCK, b.context[kind], sizeof b.context[kind]);
        for (unsigned j = 0; j < RANS_BLOCK; j++) {
            const uint16_t symbol = b.context[0][j] & 255;
            largest = symbol > largest ? symbol : largest;
        }
    }
    t->symbols = plain ? 255 : largest + 1u;
}

INLINE void fill_any(rans_training *t, int wide)
{
    (void)wide;
#define RUN(W, F, P) fill_blocks(t, W, F, P)
    RANS_EACH_FORMAT(t->samples->format, t->samples->plain, RUN);
#undef RUN
}
RANS_LEVELS(fill, rans_training)

static rans_status begin(rans_training *t, const rans_samples *s, rans_kernel kernel)
{
    static const uint8_t zero[4 * RANS_BLOCK];
    const size_t nbytes = (size_t)s->format.nbytes * RANS_BLOCK;
    rans_status status = RANS_OK;
    memset(t, 0, sizeof *t);
    t->samples = s;
    t->blocks = s->count / RANS_BLOCK;
    t->keys = s->plain ? 1 : RANS_KEYS;
    /* In words of 16 bits the mantissa tells nothing: optimisers' decay is below a unit. */
    t->kinds = s->format.is_float && !s->plain && s->format.nbytes != 2 ? 2 : 1;
    t->scale = (double)s->seen / (double)s->count;
    if (t->scale < 1)
        t->scale = 1;
    t->live = malloc(t->blocks * sizeof *t->live);
    t->cost = calloc((size_t)t->kinds * RANS_CONTEXTS * 16, sizeof *t->cost);
    if (!t->live || !t->cost)
        return RANS_NO_MEMORY;
    for (unsigned n = 1; n < 4096; n++)
        t->nlogn[n] = (uint32_t)(16 * (float)n * log2f((float)n) + 0.5f);
    for (size_t b = 0; b < t->blocks; b++)
        if (memcmp(s->plain ? zero : s->prediction + b * nbytes, s->target + b * nbytes, nbytes))
            t->live[t->live_count++] = (uint32_t)b;
    t->context[0] = malloc((t->kinds * t->live_count + 1) * RANS_BLOCK * sizeof *t->context[0]);
    if (!t->context[0])
        return RANS_NO_MEMORY;
    t->context[1] = t->context[0] + (t->kinds > 1 ? t->live_count * RANS_BLOCK : 0);
    if (s->plain)
        find_flip(t);
    else if (s->format.is_float)
        status = find_top_key(t);
    if (!s->plain && s->format.nbytes == 4)
        find_dictionary(t);
    fill(kernel, t);
    return status;
}

static void end(rans_training *t)
{
    free(t->live);
    free(t->cost);
    free(t->context[0]);
    free(t);
}

/* ---- Classes ------------------------------------------------------------------------------------------------ */

/* Counts a live block in a class; or takes it out again, with -1 for `by`. */
static void count_block(const rans_training *t, rans_clustering *c, size_t live, unsigned cls, uint32_t by)
{
    for (unsigned kind = 0; kind < t->kinds; kind++) {
        uint32_t *count = c->count[cls * t->kinds + kind];
        const uint16_t *context = t->context[kind] + live * RANS_BLOCK;
        for (size_t i = 0; i < RANS_BLOCK; i++)
            count[context[i]] += by;
    }
}

/* In 1/16 bit. */
static uint32_t entropy(const rans_training *t, const uint32_t *count)
{
    uint32_t bits = 0;
    for (unsigned k = 0; k < t->keys; k++, count += 256) {
        uint32_t n = 0;
        for (unsigned s = 0; s < t->symbols; s++) {
            n += count[s];
            bits -= rans_nlogn(t, count[s]);
        }
        bits += rans_nlogn(t, n);
    }
    return bits;
}

static void choose_sources(const rans_training *t, rans_clustering *c)
{
    c->sources = 0;
    if (t->kinds == 1)
        return;
    for (unsigned i = 0; i < c->classes; i++)
        if ((float)entropy(t, c->count[2 * i + 1]) < 0.99f * (float)entropy(t, c->count[2 * i]))
            c->sources |= 1u << i;
}

/* Prices of `count` symbols, where `own[s] + prior[s]` of `2**total` words have it. The logarithm is within a hundredth,
 * which is all that a choice of class needs. Loop by loop, so that compilers make vector code of it. */
static void set_prices(const uint32_t *own, const float *prior, float total, unsigned count, uint16_t *price)
{
    float x[256];
    uint32_t bits[256];
    for (unsigned s = 0; s < count; s++)
        x[s] = (float)(int32_t)own[s] + prior[s];
    memcpy(bits, x, count * sizeof *bits);
    for (unsigned s = 0; s < count; s++) {
        const float m = (float)(int32_t)(bits[s] & 0x7fffff) * (1.0f / 8388608);
        const float log2x = (float)(int32_t)(bits[s] >> 23) - 127 + m * (1.3465f - 0.3465f * m);
        const int32_t cost = (int32_t)(16 * (total - log2x) + 0.5f);
        price[s] = (uint16_t)(cost > 496 ? 496 : cost);
    }
}

/* Prices in 1/16 bit from the counts, smoothed by what all classes together say of a key. */
static void set_costs(const rans_training *t, const rans_clustering *c)
{
    for (unsigned kind = 0; kind < t->kinds; kind++)
        for (unsigned k = 0; k < t->keys; k++) {
            uint32_t all[256] = {0}, sum = 0;
            float prior[256];
            uint16_t price[256];
            for (unsigned i = 0; i < c->classes; i++)
                for (unsigned s = 0; s < t->symbols; s++)
                    all[s] += c->count[i * t->kinds + kind][k << 8 | s];
            for (unsigned s = 0; s < t->symbols; s++)
                sum += all[s];
            const float share = 16 / ((float)sum + 0.1f * (float)t->symbols);
            for (unsigned s = 0; s < t->symbols; s++)
                prior[s] = ((float)(int32_t)all[s] + 0.1f) * share;
            for (unsigned i = 0; i < c->classes; i++) {
                const uint32_t *own = c->count[i * t->kinds + kind] + (k << 8);
                uint16_t *cost = t->cost + (((size_t)kind * RANS_CONTEXTS + (k << 8)) << 4) + i;
                uint32_t n = 16;
                for (unsigned s = 0; s < t->symbols; s++)
                    n += own[s];
                if ((c->sources >> i & 1) == kind)
                    set_prices(own, prior, log2f((float)n), t->symbols, price);
                else
                    memset(price, 0, sizeof price);
                for (unsigned s = 0; s < t->symbols; s++)
                    cost[s << 4] = price[s];
            }
        }
}

/* The cheapest class for each of some live blocks. */
typedef struct {
    const rans_training *t;
    const uint32_t *live; /* or NULL: all */
    size_t count;
    unsigned classes, sources;
    float prior[16];
    uint8_t *chosen;
} choice;

INLINE void choose_any(choice *j, int wide)
{
    const rans_training *t = j->t;
    for (size_t i = 0; i < j->count; i++) {
        const size_t first = (j->live ? j->live[i] : i) * RANS_BLOCK;
        uint16_t sum[16] = {0};
        rans_price(t->cost, t->context[0] + first, wide, sum);
        if (j->sources)
            rans_price(t->cost + ((size_t)RANS_CONTEXTS << 4), t->context[1] + first, wide, sum);
        unsigned best = 0;
        float least = INFINITY;
        for (unsigned k = 0; k < j->classes; k++) {
            const float bits = (float)sum[k] + j->prior[k];
            if (bits < least) {
                least = bits;
                best = k;
            }
        }
        j->chosen[i] = (uint8_t)best;
    }
}
RANS_LEVELS(choose, choice)

typedef struct {
    float rank;
    uint32_t live;
} ranked;

static int by_rank(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    return x->rank < y->rank ? -1 : x->rank > y->rank ? 1 : x->live < y->live ? -1 : x->live > y->live;
}

/* Some of the live blocks, by their mean symbols. */
static void rank_blocks(const rans_training *t, size_t n, uint32_t *live)
{
    ranked order[EM_BLOCKS];
    for (size_t i = 0; i < n; i++) {
        const size_t block = i * t->live_count / n;
        uint32_t sum = 0;
        for (size_t j = 0; j < RANS_BLOCK; j++)
            sum += t->context[0][block * RANS_BLOCK + j] & 255u;
        order[i] = (ranked){(float)sum, (uint32_t)block};
    }
    qsort(order, n, sizeof *order, by_rank);
    for (size_t i = 0; i < n; i++)
        live[i] = order[i].live;
}

/* Sorts some of the blocks into classes again and again, each time by what the last time says of the classes; then all
 * of them. */
static rans_status cluster(const rans_training *t, rans_kernel kernel, unsigned classes, rans_clustering *c)
{
    uint32_t live[EM_BLOCKS];
    uint8_t now[EM_BLOCKS], next[EM_BLOCKS];
    const size_t n = t->live_count < EM_BLOCKS ? t->live_count : EM_BLOCKS;
    c->classes = classes;
    c->of_block = calloc(t->blocks + t->live_count, 1);
    c->count = calloc((size_t)classes * t->kinds, sizeof *c->count);
    if (!c->of_block || !c->count)
        return RANS_NO_MEMORY;
    uint8_t *chosen = c->of_block + t->blocks;
    choice j = {t, live, n, classes, 0, {0}, next};
    if (classes > 1) {
        uint32_t per_class[RANS_MAX_CLASSES] = {0};
        rank_blocks(t, n, live);
        for (size_t i = 0; i < n; i++) {
            now[i] = (uint8_t)(i * classes / n);
            count_block(t, c, live[i], now[i], 1);
            per_class[now[i]]++;
        }
        for (unsigned round = 1;; round++) {
            choose_sources(t, c);
            set_costs(t, c);
            j.sources = c->sources;
            for (unsigned k = 0; k < classes; k++)
                j.prior[k] = 16 * (log2f((float)n) - log2f((float)per_class[k] + 0.25f));
            if (round == EM_ROUNDS)
                break;
            choose(kernel, &j);
            size_t moved = 0;
            for (size_t i = 0; i < n; i++)
                if (next[i] != now[i]) {
                    count_block(t, c, live[i], now[i], 0u - 1);
                    count_block(t, c, live[i], next[i], 1);
                    per_class[now[i]]--;
                    per_class[next[i]]++;
                    now[i] = next[i];
                    moved++;
                }
            if (!moved)
                break;
        }
        j.live = NULL;
        j.count = t->live_count;
        j.chosen = chosen;
        choose(kernel, &j);
        memset(c->count, 0, (size_t)classes * t->kinds * sizeof *c->count);
    }
    /* Classes that nothing is in any more go, and all blocks are counted. */
    uint32_t per_class[RANS_MAX_CLASSES] = {0};
    uint8_t renumbered[RANS_MAX_CLASSES] = {0};
    unsigned left = 0, sources = 0;
    for (size_t i = 0; i < t->live_count; i++)
        per_class[chosen[i]]++;
    for (unsigned k = 0; k < classes; k++)
        if (per_class[k]) {
            sources |= (c->sources >> k & 1) << left;
            renumbered[k] = (uint8_t)left++;
        }
    for (size_t i = 0; i < t->live_count; i++) {
        const unsigned k = renumbered[chosen[i]];
        c->of_block[t->live[i]] = (uint8_t)(k + 1);
        count_block(t, c, i, k, 1);
    }
    c->classes = left ? left : 1;
    c->sources = sources;
    if (classes == 1)
        choose_sources(t, c);
    return RANS_OK;
}

/* About what the data will take, and tables for all the symbols that were seen at the price that merging leaves. */
static float outlook(const rans_training *t, const rans_clustering *c)
{
    float bits = 0;
    uint32_t cells = 0;
    for (unsigned i = 0; i < c->classes; i++) {
        const uint32_t *count = rans_counts(t, c, i, 0);
        bits += (float)entropy(t, count) / 16;
        for (unsigned k = 0; k < t->keys; k++)
            for (unsigned s = 0; s < t->symbols; s++)
                cells += count[k << 8 | s] != 0;
    }
    return bits * (float)t->scale + 2 * (float)cells;
}

static void drop(rans_clustering *c)
{
    free(c->of_block);
    free(c->count);
}

rans_status rans_train(const rans_samples *samples, rans_kernel kernel, uint8_t **params, size_t *nbytes)
{
    if (!samples->count)
        return RANS_OK;
    rans_training *t = malloc(sizeof *t);
    if (!t)
        return RANS_NO_MEMORY;
    rans_status status = begin(t, samples, kernel);
    uint8_t *best = NULL;
    size_t best_nbytes = 0;
    float least = INFINITY;
    for (unsigned i = 0; status == RANS_OK && i < sizeof class_counts / sizeof *class_counts; i++) {
        const unsigned classes = class_counts[i];
        rans_clustering c = {0};
        uint8_t *made = NULL;
        size_t made_nbytes = 0;
        float bits = INFINITY;
        if (classes > 1 && t->live_count < 4 * classes)
            break;
        status = cluster(t, kernel, classes, &c);
        if (status == RANS_OK && (classes == 1 || outlook(t, &c) < least))
            status = rans_tabulate(t, &c, &made, &made_nbytes, &bits);
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
    end(t);
    return status;
}
