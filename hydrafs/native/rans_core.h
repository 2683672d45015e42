/* The residual codec "rans": models, encoder, decoders. No Python in here. docs/RANS.md describes the stream.
 *
 * Goal: code the difference of a tensor to its prediction in fewer bits than its order-0 entropy given the prediction's
 *   exponent, and decode it at memory-like speed.
 * Plan: blocks of 128 words have a class (a population: never touched, touched once, ...); class and a key of the
 *   predicting word choose one of at most 64 frequency tables; 32 or 64 interleaved rANS states decode symbols from it;
 *   a symbol names a bucket of values, and the place in the bucket comes as raw bits out of the same states.
 * Invariants: nothing read from a payload or from params is used as an index or a length before it was checked; a
 *   kernel reads at most RANS_NEED_NBYTES behind its limit; a block always takes the same path whatever the words are.
 */
#ifndef HYDRAFS_RANS_CORE_H
#define HYDRAFS_RANS_CORE_H

#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline)) /* instances for constant arguments */

#define RANS_BLOCK 128      /* words per block */
#define RANS_MAX_CLASSES 15 /* beside class 0, which means: the block is its prediction */
#define RANS_MAX_TABLES 64
#define RANS_MAX_BITS 12
#define RANS_CLASS_BITS 8
#define RANS_KEYS 16
#define RANS_DICTIONARY 240 /* symbols 240..254 are values from the dictionary */
#define RANS_MAX_DICTIONARY 15
#define RANS_ESCAPE 255
#define RANS_LOW 65536u /* the states' lower bound */
#define RANS_MAX_LANES 64
/* A block takes at most three 16-bit words per element; a vector load may look at 32 bytes more. */
#define RANS_NEED_NBYTES (RANS_BLOCK * 6 + 64)

enum { RANS_STORED = 0, RANS_RESIDUAL = 1, RANS_PLAIN = 2, RANS_CONSTANT = 3 };
#define RANS_MODE_MASK 0x0f
#define RANS_WIDE 0x10     /* 64 lanes, else 32 */
#define RANS_EMBEDDED 0x80 /* the payload brings its own params */

/* How the words of a dtype are laid out. `mantissa` is 0 for whole numbers. */
typedef struct {
    unsigned nbytes; /* of a word: 1, 2 or 4 */
    int is_float;
    unsigned mantissa;
} rans_format;

typedef struct {
    unsigned shift, mask;
    int base; /* key = clamp(base - (word >> shift & mask), 0, 15) */
    uint8_t map[RANS_KEYS];
} rans_class;

/* Encoder: how a symbol is written with a table. */
typedef struct {
    uint64_t inverse; /* 2**64 / frequency, rounded up */
    uint32_t last;  /* the highest state that takes the symbol without giving off a word first */
    uint16_t start, reach; /* reach: 1 << bits less the frequency */
    uint8_t width;
} rans_entry;

/* One model: for chunks with a prediction (residual) or without (plain). */
typedef struct {
    int plain;
    rans_format format;
    unsigned classes, bits, tables;
    unsigned flip; /* plain: symbol = top byte ^ flip, so that the byte that must be escaped is the rarest */
    uint32_t dictionary[16]; /* the last one, of the escape symbol, is 0 */
    unsigned dictionary_count;
    uint32_t value[256]; /* of a symbol, without its raw bits */
    uint8_t width[256];  /* how many raw bits follow a symbol */
    rans_class cls[RANS_MAX_CLASSES + 1];
    uint16_t (*freq)[256];  /* per table */
    uint16_t (*start)[256]; /* per table */
    uint32_t *slots;        /* per table 1 << bits of: frequency - 1 << 20 | slot - start << 8 | symbol */
    uint16_t class_freq[RANS_MAX_CLASSES + 1][RANS_MAX_CLASSES + 1]; /* given the previous block's class */
    uint16_t class_start[RANS_MAX_CLASSES + 1][RANS_MAX_CLASSES + 1];
    uint32_t class_slots[RANS_MAX_CLASSES + 1][1 << RANS_CLASS_BITS];
    rans_entry (*entries)[256]; /* encoder: per table; NULL until needed, as the next */
    uint32_t (*packed)[256];    /* the same for vectors: width << 26 | frequency << 13 | start */
    uint16_t *cost;             /* [2 key kinds][16 keys][256 symbols][16 classes], in 1/16 bit */
    uint16_t class_cost[RANS_MAX_CLASSES + 1][RANS_MAX_CLASSES + 1];
} rans_model;

typedef struct {
    rans_model *residual, *plain; /* either may be NULL */
} rans_models;

typedef enum { RANS_OK = 0, RANS_DAMAGED = -1, RANS_NO_MEMORY = -2, RANS_NO_MODEL = -3 } rans_status;

/* What a kernel needs to decode whole blocks. Kernels stop where the stream pointer has passed `limit`, and may read
 * RANS_NEED_NBYTES behind it. */
typedef struct {
    const rans_model *model;
    uint32_t *state;
    unsigned lanes;
    const uint8_t *prediction, *raw; /* of the first block; NULL where there is none */
    size_t raw_stride;               /* from a byte plane of raw to the next */
    uint8_t *out;
    const uint8_t *classes;
    size_t blocks;
    const uint8_t *stream, *limit;
} rans_job;

/* Writes the words of a block (for each its key << 8 | symbol, and its value) backwards from `at` and gives where they
 * begin. May spoil 32 bytes before that. */
typedef uint8_t *(*rans_writer)(const rans_model *model, const rans_class *cls, const uint16_t *context,
                                const uint32_t *value, unsigned lanes, uint32_t *state, uint8_t *at);

typedef void (*rans_kernel)(rans_job *job);
void rans_portable(rans_job *job);
#if (defined(__x86_64__) || defined(_M_X64)) && (defined(__GNUC__) || defined(__clang__))
#define RANS_X86 1
void rans_avx2(rans_job *job);
void rans_avx512(rans_job *job);
uint8_t *rans_write_avx2(const rans_model *model, const rans_class *cls, const uint16_t *context,
                         const uint32_t *value, unsigned lanes, uint32_t *state, uint8_t *at);
uint8_t *rans_write_avx512(const rans_model *model, const rans_class *cls, const uint16_t *context,
                           const uint32_t *value, unsigned lanes, uint32_t *state, uint8_t *at);
#endif
/* "avx512", "avx2" or "portable": fills `kernel` and gives 0 if this machine has it. It stands for the encoder of that
 * name as well; all give the same bytes. */
int rans_find_kernel(const char *name, rans_kernel *kernel);

rans_status rans_parse(const uint8_t *params, size_t nbytes, rans_models *out);
void rans_free(rans_models *models);

rans_status rans_decode(const rans_models *models, rans_kernel kernel, rans_format format, const uint8_t *prediction,
                        const uint8_t *payload, size_t payload_nbytes, uint8_t *out, size_t nbytes);

/* `result` is malloc'ed. RANS_NO_MODEL: `models` has none that fits. Must be prepared first. */
rans_status rans_prepare(rans_model *model);
rans_status rans_encode(const rans_models *models, rans_kernel kernel, rans_format format, const uint8_t *prediction,
                        const uint8_t *target, size_t nbytes, uint8_t **result, size_t *result_nbytes);

/* Samples for training: words of one format, in whole blocks. */
typedef struct {
    rans_format format;
    int plain;
    uint8_t *target, *prediction; /* prediction: NULL for plain ones */
    size_t count;                 /* of words */
    unsigned stride, phase; /* one of `stride` blocks is kept */
    uint64_t seen;          /* words seen in all */
} rans_samples;

rans_status rans_sample(rans_samples *samples, const uint8_t *prediction, const uint8_t *target, size_t nbytes);
/* Appends the serialised model to `*params` (realloc'ed), the same with any kernel. */
rans_status rans_train(const rans_samples *samples, rans_kernel kernel, uint8_t **params, size_t *nbytes);

/* Shared by encoder, trainer and the portable kernel. */
static inline uint32_t rans_load(const uint8_t *at, unsigned nbytes)
{
    uint32_t word = at[0];
    if (nbytes > 1)
        word |= (uint32_t)at[1] << 8;
    if (nbytes > 2)
        word |= (uint32_t)at[2] << 16 | (uint32_t)at[3] << 24;
    return word;
}

static inline void rans_store(uint8_t *at, uint32_t word, unsigned nbytes)
{
    at[0] = (uint8_t)word;
    if (nbytes > 1)
        at[1] = (uint8_t)(word >> 8);
    if (nbytes > 2) {
        at[2] = (uint8_t)(word >> 16);
        at[3] = (uint8_t)(word >> 24);
    }
}

/* The symbol of a value: itself below 16, from there on 8 to an octave. */
static inline unsigned rans_bucket(uint32_t value)
{
    const unsigned n = 28u - (unsigned)__builtin_clz(value | 8);
    return 8 * n + (value >> n);
}

static inline unsigned rans_key(const rans_class *c, uint32_t word)
{
    int key = c->base - (int)(word >> c->shift & c->mask);
    return (unsigned)(key < 0 ? 0 : key > 15 ? 15 : key);
}

/* All ones if the word's top bit is set. */
static inline uint32_t rans_sign(uint32_t word, unsigned nbytes)
{
    return 0u - (word >> (8 * nbytes - 1) & 1);
}

/* value = zigzag of the difference of the ordered integers, turned over where the prediction is negative: positive is
 * away from zero, so that weight decay goes one way. */
static inline uint32_t rans_residual(rans_format f, uint32_t prediction, uint32_t target)
{
    const unsigned top = 8 * f.nbytes - 1;
    const uint32_t all = 0xffffffffu >> (31 - top), low = all >> 1;
    uint32_t turn = 0;
    if (f.is_float) {
        turn = rans_sign(prediction, f.nbytes);
        prediction ^= turn & low;
        target ^= rans_sign(target, f.nbytes) & low;
    }
    uint32_t d = ((target - prediction) ^ turn) - turn;
    return (d << 1 ^ rans_sign(d, f.nbytes)) & all;
}

static inline uint32_t rans_add(rans_format f, uint32_t prediction, uint32_t value)
{
    const unsigned top = 8 * f.nbytes - 1;
    const uint32_t low = 0xffffffffu >> (31 - top) >> 1;
    uint32_t d = value >> 1 ^ (0u - (value & 1));
    if (f.is_float) {
        uint32_t turn = rans_sign(prediction, f.nbytes);
        prediction ^= turn & low;
        prediction += (d ^ turn) - turn;
        return prediction ^ (rans_sign(prediction, f.nbytes) & low);
    }
    return prediction + d;
}

#endif
