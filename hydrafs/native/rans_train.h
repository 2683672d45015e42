/* What the two halves of training share: rans_train.c sorts blocks into classes, rans_tables.c makes tables of them. */
#ifndef HYDRAFS_RANS_TRAIN_H
#define HYDRAFS_RANS_TRAIN_H

#include "rans_blocks.h"

#include <math.h>

#define RANS_RUN 8 /* blocks that are sampled together, so that neighbours' classes can be counted */

typedef uint32_t rans_histogram[RANS_CONTEXTS];

typedef struct {
    const rans_samples *samples;
    size_t blocks, live_count;
    uint32_t *live;       /* the blocks that are not their prediction */
    uint16_t *context[2]; /* of the words of live blocks: key << 8 | symbol, for each kind of key */
    uint16_t *cost;       /* as in rans_model */
    unsigned symbols;     /* one more than the largest */
    unsigned keys, kinds, top_key, flip;
    uint32_t dictionary[RANS_MAX_DICTIONARY];
    unsigned dictionary_count;
    double scale; /* words in all per word sampled */
    uint32_t nlogn[4096];
    uint32_t nothing[256];
} rans_training;

typedef struct {
    unsigned classes, sources; /* sources: a bit for each class that is keyed by the mantissa */
    uint8_t *of_block;         /* of all blocks; 0: its prediction */
    rans_histogram *count;     /* [classes][kinds] */
} rans_clustering;

/* n log2 n in 1/16 bit, whole, since sums of it are added in any order and compared. */
static inline uint32_t rans_nlogn(const rans_training *t, uint32_t n)
{
    return n < 4096 ? t->nlogn[n] : (uint32_t)(16 * (float)n * log2f((float)n) + 0.5f);
}

/* The frequencies of a class's symbols, for the kind of key that it has, from the key's first symbol on. */
static inline const uint32_t *rans_counts(const rans_training *t, const rans_clustering *c, unsigned cls, unsigned key)
{
    return c->count[cls * t->kinds + (t->kinds > 1 && c->sources >> cls & 1)] + (key << 8);
}

/* The serialised model of a clustering (malloc'ed), and the bits that it and the data take together. */
rans_status rans_tabulate(const rans_training *t, const rans_clustering *c, uint8_t **out, size_t *nbytes, float *bits);

#endif
