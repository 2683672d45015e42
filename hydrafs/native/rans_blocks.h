/* What encoder and trainer do to a block before anything else. See rans_core.h.
 *
 * Plan: residuals, symbols and keys of 128 words in loops that compilers turn into vector code; the prices of all
 *   classes are added at once, a vector of them for each word.
 * Invariant: whole numbers only, so that all instances (RANS_LEVELS) give the same.
 */
#ifndef HYDRAFS_RANS_BLOCKS_H
#define HYDRAFS_RANS_BLOCKS_H

#include "rans_core.h"

#include <string.h>

/* Where a word and its symbol stand in tables of [key][symbol]. */
#define RANS_CONTEXTS (RANS_KEYS << 8)

/* Prices of all classes for a word, in 1/16 bit, or half of them. None is above 511, so a block's sum fits 16 bits. */
typedef uint16_t rans_wide __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint16_t rans_narrow __attribute__((vector_size(16), aligned(2), may_alias));

/* What the words of a section have in common. */
typedef struct {
    rans_format format;
    int plain, second; /* second: some class has the second kind of key */
    unsigned flip, dictionary_count;
    const uint32_t *dictionary;
    rans_class by[2]; /* the kinds of keys: of the exponent, of the mantissa */
} rans_shape;

/* One block on its way: residuals, or plain words turned and flipped; keys of both kinds, each << 8 | symbol. */
typedef struct {
    uint32_t value[RANS_BLOCK], differs; /* differs: 0 if the block is its prediction; then there are no contexts */
    uint16_t context[2][RANS_BLOCK];
} rans_block;

static inline uint32_t rans_split(rans_format f, uint32_t word)
{
    const unsigned bits = 8 * f.nbytes;
    return f.is_float ? (word << 1 | word >> (bits - 1)) & (0xffffffffu >> (32 - bits)) : word;
}

/* rans_bucket of a block, in what any vector unit has: a float's exponent and the top of its mantissa are octave and
 * eighth. Loop by loop, since compilers leave scalar what converts and compares at once. */
INLINE void rans_buckets(const uint32_t *value, unsigned w, uint32_t *symbol)
{
    float x[RANS_BLOCK];
    uint32_t bits[RANS_BLOCK];
    for (unsigned i = 0; i < RANS_BLOCK; i++) /* no more bits than a float has; the octaves come back below */
        x[i] = (float)(int32_t)(w == 4 && value[i] >> 24 ? value[i] >> 8 : value[i]);
    memcpy(bits, x, sizeof bits);
    for (unsigned i = 0; i < RANS_BLOCK; i++) {
        const uint32_t far = w == 4 && value[i] >> 24 ? 64 : 0, small = 0u - (value[i] >> 3 == 0);
        symbol[i] = (value[i] & small) | (((bits[i] >> 20) - 1032 + far) & ~small);
    }
}

INLINE void rans_fill(const rans_shape *h, unsigned w, unsigned is_float, int plain, const uint8_t *prediction,
                      const uint8_t *target, rans_block *b)
{
    const rans_format f = {w, (int)is_float, h->format.mantissa};
    uint32_t differs = 0;
    if (plain) {
        const unsigned shift = 8 * w - 8;
        const uint32_t flip = (uint32_t)h->flip << shift;
        for (unsigned i = 0; i < RANS_BLOCK; i++) {
            const uint32_t t = rans_load(target + w * i, w);
            b->value[i] = rans_split(f, t) ^ flip;
            differs |= t;
        }
        b->differs = differs;
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            b->context[0][i] = (uint16_t)(b->value[i] >> shift);
        return;
    }
    uint32_t word[RANS_BLOCK];
    for (unsigned i = 0; i < RANS_BLOCK; i++) {
        word[i] = rans_load(prediction + w * i, w);
        b->value[i] = rans_residual(f, word[i], rans_load(target + w * i, w));
        differs |= b->value[i];
    }
    b->differs = differs;
    if (!differs)
        return;
    uint32_t symbol[RANS_BLOCK];
    rans_buckets(b->value, w, symbol);
    for (unsigned d = 0; d < h->dictionary_count; d++)
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            symbol[i] = b->value[i] == h->dictionary[d] ? RANS_DICTIONARY + d : symbol[i];
    for (int kind = 0; kind <= h->second; kind++) {
        const rans_class c = h->by[kind];
        for (unsigned i = 0; i < RANS_BLOCK; i++)
            b->context[kind][i] = (uint16_t)(rans_key(&c, word[i]) << 8 | symbol[i]);
    }
}

/* Adds what a block costs in each class. Without vectors of 32 bytes in the machine, compilers keep such in memory. */
INLINE void rans_price(const uint16_t *cost, const uint16_t *context, int wide, uint16_t sum[16])
{
    if (wide) {
        rans_wide even = {0}, odd = {0};
        for (unsigned i = 0; i < RANS_BLOCK; i += 2) {
            even += *(const rans_wide *)(const void *)(cost + ((size_t)context[i] << 4));
            odd += *(const rans_wide *)(const void *)(cost + ((size_t)context[i + 1] << 4));
        }
        *(rans_wide *)(void *)sum += even + odd;
        return;
    }
    rans_narrow low = {0}, high = {0};
    for (unsigned i = 0; i < RANS_BLOCK; i++) {
        const uint16_t *row = cost + ((size_t)context[i] << 4);
        low += *(const rans_narrow *)(const void *)row;
        high += *(const rans_narrow *)(const void *)(row + 8);
    }
    *(rans_narrow *)(void *)sum += low;
    *(rans_narrow *)(void *)(sum + 8) += high;
}

/* Instances of `NAME_any`, always inlined, for older and newer machines: shifts and counts in one instruction, and what
 * the compiler makes of the loops. `wide`: vectors of 32 bytes are in the machine. NAME(kernel, job) chooses. */
#ifdef RANS_X86
#define RANS_AVX2 __attribute__((target("avx2,bmi,bmi2,lzcnt,popcnt")))
#define RANS_AVX512                                                                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512cd,avx2,bmi,bmi2,lzcnt,popcnt")))
#define RANS_LEVELS(NAME, TYPE)                                                                                        \
    static void NAME##_portable(TYPE *job) { NAME##_any(job, 0); }                                                     \
    RANS_AVX2 static void NAME##_avx2(TYPE *job) { NAME##_any(job, 1); }                                               \
    RANS_AVX512 static void NAME##_avx512(TYPE *job) { NAME##_any(job, 1); }                                           \
    static void NAME(rans_kernel kernel, TYPE *job)                                                                    \
    {                                                                                                                  \
        (kernel == rans_avx512 ? NAME##_avx512 : kernel == rans_avx2 ? NAME##_avx2 : NAME##_portable)(job);            \
    }
#else
#define RANS_LEVELS(NAME, TYPE)                                                                                        \
    static void NAME(rans_kernel kernel, TYPE *job)                                                                    \
    {                                                                                                                  \
        (void)kernel;                                                                                                  \
        NAME##_any(job, 0);                                                                                            \
    }
#endif

/* Calls RUN(W, F, P) with a format and mode that are constants. */
#define RANS_EACH_FORMAT(FORMAT, PLAIN, RUN)                                                                           \
    do {                                                                                                               \
        const unsigned nbytes_ = (FORMAT).nbytes;                                                                      \
        const int float_ = (FORMAT).is_float != 0, plain_ = (PLAIN);                                                   \
        if (nbytes_ == 2 && float_)                                                                                    \
            if (plain_) RUN(2, 1, 1); else RUN(2, 1, 0);                                                               \
        else if (nbytes_ == 4 && float_)                                                                               \
            if (plain_) RUN(4, 1, 1); else RUN(4, 1, 0);                                                               \
        else if (nbytes_ == 1 && float_)                                                                               \
            if (plain_) RUN(1, 1, 1); else RUN(1, 1, 0);                                                               \
        else if (nbytes_ == 2)                                                                                         \
            if (plain_) RUN(2, 0, 1); else RUN(2, 0, 0);                                                               \
        else if (nbytes_ == 4)                                                                                         \
            if (plain_) RUN(4, 0, 1); else RUN(4, 0, 0);                                                               \
        else                                                                                                           \
            if (plain_) RUN(1, 0, 1); else RUN(1, 0, 0);                                                               \
    } while (0)

#endif
