/* The AVX-512 and AVX2 kernels. See rans_core.h; rans_portable says what they compute.
 *
 * Plan: a state, a word and a symbol each take a 32-bit lane. All lanes of a step do one thing before any does the next
 *   (symbols, low raw bits, high raw bits), so that only the stream pointer is handed from register to register and the
 *   slow parts (gather, multiplication) overlap. An expansion spreads the stream's words to the lanes that ran low.
 */

#include "rans_core.h"

#ifdef RANS_X86

#include <immintrin.h>
#include <string.h>

#define EACH for (unsigned g = 0; g < G; g++)

/* A block that is its prediction. */
static inline void pass_block(const rans_job *job, unsigned w, int plain)
{
    if (plain)
        memset(job->out, 0, w * RANS_BLOCK);
    else
        memcpy(job->out, job->prediction, w * RANS_BLOCK);
}

static inline void next_block(rans_job *job, unsigned w, int plain, unsigned c)
{
    if (!plain)
        job->prediction += w * RANS_BLOCK;
    else if (c)
        job->raw += RANS_BLOCK;
    job->out += w * RANS_BLOCK;
    job->classes++;
    job->blocks--;
}

/* Chooses the instance of a kernel for a job's format, mode and lanes; T is the number of lanes in a register. */
#define DISPATCH(RUN, T)                                                                                               \
    const rans_model *m = job->model;                                                                                  \
    const int is_float = m->format.is_float != 0;                                                                      \
    CASE(RUN, T, 2, 1, 0)                                                                                              \
    CASE(RUN, T, 4, 1, 0)                                                                                              \
    CASE(RUN, T, 1, 1, 0)                                                                                              \
    CASE(RUN, T, 2, 0, 0)                                                                                              \
    CASE(RUN, T, 4, 0, 0)                                                                                              \
    CASE(RUN, T, 1, 0, 0)                                                                                              \
    CASE(RUN, T, 2, 1, 1)                                                                                              \
    CASE(RUN, T, 4, 1, 1)                                                                                              \
    CASE(RUN, T, 1, 1, 1)                                                                                              \
    CASE(RUN, T, 2, 0, 1)                                                                                              \
    CASE(RUN, T, 4, 0, 1)                                                                                              \
    CASE(RUN, T, 1, 0, 1)
#define CASE(RUN, T, W, F, P)                                                                                          \
    if (m->format.nbytes == W && is_float == F && m->plain == P) {                                                     \
        if (job->lanes == 32)                                                                                          \
            RUN(job, W, F, P, 32 / T);                                                                                 \
        else                                                                                                           \
            RUN(job, W, F, P, 64 / T);                                                                                 \
        return;                                                                                                        \
    }

/* ---- AVX-512: 16 lanes -------------------------------------------------------------------------------------- */

#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,bmi,bmi2,popcnt")))
#define WIDE_INLINE WIDE static inline __attribute__((always_inline))

WIDE_INLINE __m512i load512(const uint8_t *at, unsigned w)
{
    if (w == 4)
        return _mm512_loadu_si512(at);
    if (w == 2)
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)at));
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)at));
}

WIDE_INLINE void store512(uint8_t *at, __m512i words, unsigned w)
{
    if (w == 4)
        _mm512_storeu_si512(at, words);
    else if (w == 2)
        _mm256_storeu_si256((__m256i *)(void *)at, _mm512_cvtepi32_epi16(words));
    else
        _mm_storeu_si128((__m128i *)(void *)at, _mm512_cvtepi32_epi8(words));
}

WIDE_INLINE __m512i refill512(__m512i x, const uint8_t **stream)
{
    const __mmask16 low = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(RANS_LOW));
    const __m512i words = _mm512_maskz_expand_epi32(low, load512(*stream, 2));
    *stream += 2 * (unsigned)_mm_popcnt_u32(low);
    return _mm512_mask_or_epi32(x, low, _mm512_slli_epi32(x, 16), words);
}

/* Takes `n` bits off each state. */
WIDE_INLINE __m512i take512(__m512i *x, __m512i n, const uint8_t **stream)
{
    const __m512i ones = _mm512_sllv_epi32(_mm512_set1_epi32(-1), n);
    const __m512i bits = _mm512_andnot_si512(ones, *x);
    *x = refill512(_mm512_srlv_epi32(*x, n), stream);
    return bits;
}

WIDE_INLINE __m512i sign512(__m512i word, unsigned w)
{
    return _mm512_srai_epi32(w == 4 ? word : _mm512_slli_epi32(word, 32 - 8 * w), 31);
}

WIDE_INLINE __m512i add512(__m512i word, __m512i value, unsigned w, int is_float)
{
    const __m512i odd = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_and_si512(value, _mm512_set1_epi32(1)));
    __m512i d = _mm512_xor_si512(_mm512_srli_epi32(value, 1), odd);
    if (!is_float)
        return _mm512_add_epi32(word, d);
    const __m512i low = _mm512_set1_epi32((int)(0x7fffffffu >> (32 - 8 * w)));
    const __m512i turn = sign512(word, w);
    d = _mm512_sub_epi32(_mm512_xor_si512(d, turn), turn);
    const __m512i ordered = _mm512_xor_si512(word, _mm512_and_si512(turn, low));
    const __m512i sum = _mm512_add_epi32(ordered, d);
    return _mm512_xor_si512(sum, _mm512_and_si512(sign512(sum, w), low));
}

WIDE_INLINE __m512i join512(__m512i byte, const uint8_t *raw, size_t stride, unsigned w, int is_float)
{
    __m512i word = _mm512_slli_epi32(byte, 8 * w - 8);
    for (unsigned k = 0; k + 1 < w; k++)
        word = _mm512_or_si512(word, _mm512_slli_epi32(load512(raw + k * stride, 1), 8 * k));
    if (!is_float)
        return word;
    return _mm512_or_si512(_mm512_srli_epi32(word, 1), _mm512_slli_epi32(word, 8 * w - 1));
}

WIDE_INLINE void run512(rans_job *job, const unsigned w, const int is_float, const int plain, const unsigned G)
{
    const rans_model *m = job->model;
    const __m128i bits = _mm_cvtsi32_si128((int)m->bits);
    const __m512i slot_mask = _mm512_set1_epi32((1 << m->bits) - 1), byte = _mm512_set1_epi32(255);
    const __m512i dictionary = _mm512_loadu_si512(m->dictionary), flip = _mm512_set1_epi32((int)m->flip);
    const __m512i last_key = _mm512_set1_epi32(15), zero = _mm512_setzero_si512();
    const uint8_t *stream = job->stream;
    __m512i x[4];
    EACH x[g] = _mm512_loadu_si512(job->state + 16 * g);
    for (; job->blocks && stream <= job->limit; next_block(job, w, plain, *job->classes)) {
        if (!*job->classes) {
            pass_block(job, w, plain);
            continue;
        }
        const rans_class *c = &m->cls[*job->classes];
        const __m512i map =
            _mm512_sll_epi32(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)c->map)), bits);
        const __m512i key_mask = _mm512_set1_epi32((int)c->mask), base = _mm512_set1_epi32(c->base);
        const __m128i shift = _mm_cvtsi32_si128((int)c->shift);
        const __m512i only = _mm512_broadcastd_epi32(_mm512_castsi512_si128(map));
        for (unsigned i = 0; i < RANS_BLOCK; i += 16 * G) {
            __m512i word[4], symbol[4], value[4], width[4] = {zero, zero, zero, zero};
            EACH {
                __m512i table = only;
                if (!plain) {
                    word[g] = load512(job->prediction + w * (i + 16 * g), w);
                    __m512i key = _mm512_and_si512(_mm512_srl_epi32(word[g], shift), key_mask);
                    key = _mm512_max_epi32(_mm512_sub_epi32(base, key), zero);
                    table = _mm512_permutexvar_epi32(_mm512_min_epi32(key, last_key), map);
                }
                const __m512i at = _mm512_or_si512(table, _mm512_and_si512(x[g], slot_mask));
                const __m512i slot = _mm512_i32gather_epi32(at, m->slots, 4);
                const __m512i rest = _mm512_srl_epi32(x[g], bits);
                const __m512i offset = _mm512_and_si512(_mm512_srli_epi32(slot, 8), _mm512_set1_epi32(4095));
                symbol[g] = _mm512_and_si512(slot, byte);
                x[g] = _mm512_add_epi32(_mm512_mullo_epi32(rest, _mm512_srli_epi32(slot, 20)),
                                        _mm512_add_epi32(rest, offset));
            }
            EACH x[g] = refill512(x[g], &stream);
            unsigned special = 0;
            __m512i any = zero;
            if (plain) {
                EACH {
                    value[g] = symbol[g];
                    special |= _mm512_cmpeq_epi32_mask(symbol[g], byte);
                }
                if (special)
                    EACH {
                        const __mmask16 escape = _mm512_cmpeq_epi32_mask(symbol[g], byte);
                        value[g] = _mm512_mask_mov_epi32(value[g], escape, zero);
                        width[g] = _mm512_maskz_set1_epi32(escape, 8);
                        any = _mm512_or_si512(any, width[g]);
                    }
            } else {
                EACH {
                    const __m512i s = symbol[g], eight = _mm512_set1_epi32(8);
                    width[g] = _mm512_subs_epu16(_mm512_srli_epi32(s, 3), _mm512_set1_epi32(1));
                    /* 8 | s & 7, shifted: or s itself, below 8 */
                    const __m512i lead = _mm512_ternarylogic_epi32(s, _mm512_set1_epi32(7), eight, 0xea);
                    value[g] = _mm512_sllv_epi32(
                        _mm512_mask_mov_epi32(lead, _mm512_cmplt_epu32_mask(s, eight), s), width[g]);
                    special |= _mm512_cmpge_epu32_mask(s, _mm512_set1_epi32(RANS_DICTIONARY));
                }
                if (special)
                    EACH {
                        const __mmask16 known =
                            _mm512_cmpge_epu32_mask(symbol[g], _mm512_set1_epi32(RANS_DICTIONARY));
                        const __mmask16 escape = _mm512_cmpeq_epi32_mask(symbol[g], byte);
                        value[g] = _mm512_mask_permutexvar_epi32(value[g], known, symbol[g], dictionary);
                        width[g] = _mm512_mask_mov_epi32(width[g], known, zero);
                        width[g] = _mm512_mask_set1_epi32(width[g], escape, 8 * (int)w);
                    }
                EACH any = _mm512_or_si512(any, width[g]);
            }
            if (_mm512_test_epi32_mask(any, any)) {
                EACH {
                    const __m512i n = w == 4 ? _mm512_min_epu32(width[g], _mm512_set1_epi32(16)) : width[g];
                    value[g] = _mm512_or_si512(value[g], take512(&x[g], n, &stream));
                }
                if (w == 4 && !plain) {
                    unsigned wide = 0;
                    EACH wide |= _mm512_cmpgt_epu32_mask(width[g], _mm512_set1_epi32(16));
                    if (wide)
                        EACH {
                            const __m512i n = _mm512_subs_epu16(width[g], _mm512_set1_epi32(16));
                            value[g] =
                                _mm512_or_si512(value[g], _mm512_slli_epi32(take512(&x[g], n, &stream), 16));
                        }
                }
            }
            EACH {
                const unsigned at = i + 16 * g;
                store512(job->out + w * at,
                         plain ? join512(_mm512_xor_si512(value[g], flip), job->raw + at, job->raw_stride, w, is_float)
                               : add512(word[g], value[g], w, is_float),
                         w);
            }
        }
    }
    job->stream = stream;
    EACH _mm512_storeu_si512(job->state + 16 * g, x[g]);
}

WIDE void rans_avx512(rans_job *job)
{
    DISPATCH(run512, 16)
}

/* Gives off the low words of the states above `last`; they lie in the order of the lanes, so all at once. */
WIDE_INLINE __m512i give512(__m512i x, __m512i last, uint8_t **at)
{
    const __mmask16 over = _mm512_cmpgt_epu32_mask(x, last);
    const unsigned count = (unsigned)_mm_popcnt_u32(over);
    *at -= 2 * count;
    _mm256_mask_storeu_epi16(*at, (__mmask16)_bzhi_u32(0xffff, count),
                             _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(over, x)));
    return _mm512_mask_srli_epi32(x, over, x, 16);
}

WIDE_INLINE __m512i put_raw512(__m512i x, __m512i value, __m512i width, uint8_t **at)
{
    const __m512i ones = _mm512_set1_epi32(-1);
    x = _mm512_sllv_epi32(give512(x, _mm512_srlv_epi32(ones, width), at), width);
    return _mm512_or_si512(x, _mm512_andnot_si512(_mm512_sllv_epi32(ones, width), value));
}

/* x / frequency: exact, since a quotient that is no whole number is further from one than doubles round. */
WIDE_INLINE __m512i divide512(__m512i x, __m512i by)
{
    const __m512d low = _mm512_div_pd(_mm512_cvtepu32_pd(_mm512_castsi512_si256(x)),
                                      _mm512_cvtepu32_pd(_mm512_castsi512_si256(by)));
    const __m512d high = _mm512_div_pd(_mm512_cvtepu32_pd(_mm512_extracti32x8_epi32(x, 1)),
                                       _mm512_cvtepu32_pd(_mm512_extracti32x8_epi32(by, 1)));
    return _mm512_inserti32x8(_mm512_castsi256_si512(_mm512_cvttpd_epu32(low)), _mm512_cvttpd_epu32(high), 1);
}

WIDE_INLINE uint8_t *write512(const rans_model *m, const rans_class *c, const uint16_t *context, const uint32_t *value,
                              uint32_t *state, uint8_t *at, const unsigned G)
{
    const __m128i up = _mm_cvtsi32_si128(32 - (int)m->bits);
    const __m512i total = _mm512_set1_epi32(1 << m->bits), most = _mm512_set1_epi32(16);
    const __m512i map = _mm512_slli_epi32(load512(c->map, 1), 8);
    __m512i x[4];
    EACH x[g] = _mm512_loadu_si512(state + 16 * g);
    for (unsigned first = RANS_BLOCK; first > 0;) {
        __m512i entry[4], width[4], symbol[4], any = _mm512_setzero_si512();
        first -= 16 * G;
        EACH {
            const __m512i both = load512((const uint8_t *)(context + first + 16 * g), 2);
            symbol[g] = _mm512_and_si512(both, _mm512_set1_epi32(255));
            const __m512i index =
                _mm512_or_si512(_mm512_permutexvar_epi32(_mm512_srli_epi32(both, 8), map), symbol[g]);
            entry[g] = _mm512_i32gather_epi32(index, m->packed, 4);
            width[g] = _mm512_srli_epi32(entry[g], 26);
            any = _mm512_or_si512(any, width[g]);
        }
        if (_mm512_cmpgt_epu32_mask(any, most))
            for (unsigned g = G; g-- > 0;)
                x[g] = put_raw512(x[g], _mm512_srli_epi32(_mm512_loadu_si512(value + first + 16 * g), 16),
                                  _mm512_subs_epu16(width[g], most), &at);
        if (_mm512_test_epi32_mask(any, any))
            for (unsigned g = G; g-- > 0;)
                x[g] = put_raw512(x[g], m->plain ? symbol[g] : _mm512_loadu_si512(value + first + 16 * g),
                                  _mm512_min_epu32(width[g], most), &at);
        for (unsigned g = G; g-- > 0;) {
            const __m512i start = _mm512_and_si512(entry[g], _mm512_set1_epi32(0x1fff));
            const __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(entry[g], 13), _mm512_set1_epi32(0x1fff));
            const __m512i last = _mm512_sub_epi32(_mm512_sll_epi32(frequency, up), _mm512_set1_epi32(1));
            x[g] = give512(x[g], last, &at);
            const __m512i q = divide512(x[g], frequency);
            x[g] = _mm512_add_epi32(_mm512_add_epi32(x[g], start),
                                    _mm512_mullo_epi32(q, _mm512_sub_epi32(total, frequency)));
        }
    }
    EACH _mm512_storeu_si512(state + 16 * g, x[g]);
    return at;
}

WIDE uint8_t *rans_write_avx512(const rans_model *m, const rans_class *c, const uint16_t *context,
                                const uint32_t *value, unsigned lanes, uint32_t *state, uint8_t *at)
{
    return lanes == 32 ? write512(m, c, context, value, state, at, 2) : write512(m, c, context, value, state, at, 4);
}

/* ---- AVX2: 8 lanes ------------------------------------------------------------------------------------------ */

#define NARROW __attribute__((target("avx2,popcnt")))
#define NARROW_INLINE NARROW static inline __attribute__((always_inline))

/* For each set of lanes that ran low, which of the next words each of them takes. */
#define BIT(m, j) ((m) >> (j) & 1)
#define ROW(m)                                                                                                         \
    {0,                                                                                                                \
     BIT(m, 0),                                                                                                        \
     BIT(m, 0) + BIT(m, 1),                                                                                            \
     BIT(m, 0) + BIT(m, 1) + BIT(m, 2),                                                                                \
     BIT(m, 0) + BIT(m, 1) + BIT(m, 2) + BIT(m, 3),                                                                    \
     BIT(m, 0) + BIT(m, 1) + BIT(m, 2) + BIT(m, 3) + BIT(m, 4),                                                        \
     BIT(m, 0) + BIT(m, 1) + BIT(m, 2) + BIT(m, 3) + BIT(m, 4) + BIT(m, 5),                                            \
     BIT(m, 0) + BIT(m, 1) + BIT(m, 2) + BIT(m, 3) + BIT(m, 4) + BIT(m, 5) + BIT(m, 6)}
#define ROWS4(m) ROW(m), ROW(m + 1), ROW(m + 2), ROW(m + 3)
#define ROWS16(m) ROWS4(m), ROWS4(m + 4), ROWS4(m + 8), ROWS4(m + 12)
#define ROWS64(m) ROWS16(m), ROWS16(m + 16), ROWS16(m + 32), ROWS16(m + 48)
static const uint8_t expansion[256][8] = {ROWS64(0), ROWS64(64), ROWS64(128), ROWS64(192)};

NARROW_INLINE __m256i load256(const uint8_t *at, unsigned w)
{
    if (w == 4)
        return _mm256_loadu_si256((const __m256i *)(const void *)at);
    if (w == 2)
        return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)at));
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)at));
}

NARROW_INLINE void store256(uint8_t *at, __m256i words, unsigned w)
{
    if (w == 4) {
        _mm256_storeu_si256((__m256i *)(void *)at, words);
    } else if (w == 2) {
        const __m256i pick = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1, 4, 5, 8,
                                              9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, pick), 0x08);
        _mm_storeu_si128((__m128i *)(void *)at, _mm256_castsi256_si128(packed));
    } else {
        const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12,
                                              -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i packed = _mm256_shuffle_epi8(words, pick);
        _mm_storel_epi64((__m128i *)(void *)at, _mm_unpacklo_epi32(_mm256_castsi256_si128(packed),
                                                                   _mm256_extracti128_si256(packed, 1)));
    }
}

NARROW_INLINE __m256i refill256(__m256i x, const uint8_t **stream)
{
    const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
    const unsigned lanes = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(low));
    const __m256i words = _mm256_permutevar8x32_epi32(load256(*stream, 2), load256(expansion[lanes], 1));
    *stream += 2 * (unsigned)_mm_popcnt_u32(lanes);
    return _mm256_blendv_epi8(x, _mm256_or_si256(_mm256_slli_epi32(x, 16), words), low);
}

NARROW_INLINE __m256i take256(__m256i *x, __m256i n, const uint8_t **stream)
{
    const __m256i bits = _mm256_andnot_si256(_mm256_sllv_epi32(_mm256_set1_epi32(-1), n), *x);
    *x = refill256(_mm256_srlv_epi32(*x, n), stream);
    return bits;
}

NARROW_INLINE __m256i sign256(__m256i word, unsigned w)
{
    return _mm256_srai_epi32(w == 4 ? word : _mm256_slli_epi32(word, 32 - 8 * (int)w), 31);
}

NARROW_INLINE __m256i add256(__m256i word, __m256i value, unsigned w, int is_float)
{
    const __m256i odd = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_and_si256(value, _mm256_set1_epi32(1)));
    __m256i d = _mm256_xor_si256(_mm256_srli_epi32(value, 1), odd);
    if (!is_float)
        return _mm256_add_epi32(word, d);
    const __m256i low = _mm256_set1_epi32((int)(0x7fffffffu >> (32 - 8 * w)));
    const __m256i turn = sign256(word, w);
    d = _mm256_sub_epi32(_mm256_xor_si256(d, turn), turn);
    const __m256i sum = _mm256_add_epi32(_mm256_xor_si256(word, _mm256_and_si256(turn, low)), d);
    return _mm256_xor_si256(sum, _mm256_and_si256(sign256(sum, w), low));
}

NARROW_INLINE __m256i join256(__m256i byte, const uint8_t *raw, size_t stride, unsigned w, int is_float)
{
    __m256i word = _mm256_slli_epi32(byte, 8 * (int)w - 8);
    for (unsigned k = 0; k + 1 < w; k++)
        word = _mm256_or_si256(word, _mm256_slli_epi32(load256(raw + k * stride, 1), 8 * (int)k));
    if (!is_float)
        return word;
    return _mm256_or_si256(_mm256_srli_epi32(word, 1), _mm256_slli_epi32(word, 8 * (int)w - 1));
}

NARROW_INLINE void run256(rans_job *job, const unsigned w, const int is_float, const int plain, const unsigned G)
{
    const rans_model *m = job->model;
    const __m128i bits = _mm_cvtsi32_si128((int)m->bits);
    const __m256i slot_mask = _mm256_set1_epi32((1 << m->bits) - 1), byte = _mm256_set1_epi32(255);
    const __m256i flip = _mm256_set1_epi32((int)m->flip), zero = _mm256_setzero_si256();
    const __m256i last_key = _mm256_set1_epi32(15), upper = _mm256_set1_epi32((int)0x80808000);
    const uint8_t *stream = job->stream;
    __m256i x[8];
    EACH x[g] = load256((const uint8_t *)(job->state + 8 * g), 4);
    for (; job->blocks && stream <= job->limit; next_block(job, w, plain, *job->classes)) {
        if (!*job->classes) {
            pass_block(job, w, plain);
            continue;
        }
        const rans_class *c = &m->cls[*job->classes];
        const __m256i map = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)c->map));
        const __m256i key_mask = _mm256_set1_epi32((int)c->mask), base = _mm256_set1_epi32(c->base);
        const __m128i shift = _mm_cvtsi32_si128((int)c->shift);
        const __m256i only = _mm256_set1_epi32(c->map[0] << m->bits);
        for (unsigned i = 0; i < RANS_BLOCK; i += 8 * G) {
            __m256i value[8], width[8], any = zero;
            EACH {
                __m256i table = only;
                if (!plain) {
                    const __m256i word = load256(job->prediction + w * (i + 8 * g), w);
                    __m256i key = _mm256_and_si256(_mm256_srl_epi32(word, shift), key_mask);
                    key = _mm256_max_epi32(_mm256_sub_epi32(base, key), zero);
                    key = _mm256_or_si256(_mm256_min_epi32(key, last_key), upper);
                    table = _mm256_sll_epi32(_mm256_shuffle_epi8(map, key), bits);
                }
                const __m256i at = _mm256_or_si256(table, _mm256_and_si256(x[g], slot_mask));
                const __m256i slot = _mm256_i32gather_epi32((const int *)(const void *)m->slots, at, 4);
                const __m256i rest = _mm256_srl_epi32(x[g], bits);
                const __m256i offset = _mm256_and_si256(_mm256_srli_epi32(slot, 8), _mm256_set1_epi32(4095));
                value[g] = _mm256_and_si256(slot, byte);
                x[g] = refill256(_mm256_add_epi32(_mm256_mullo_epi32(rest, _mm256_srli_epi32(slot, 20)),
                                                  _mm256_add_epi32(rest, offset)),
                                 &stream);
            }
            EACH {
                const __m256i s = value[g];
                if (plain) {
                    const __m256i escape = _mm256_cmpeq_epi32(s, byte);
                    value[g] = _mm256_andnot_si256(escape, s);
                    width[g] = _mm256_and_si256(escape, _mm256_set1_epi32(8));
                } else {
                    const __m256i direct = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), s);
                    const __m256i lead = _mm256_or_si256(_mm256_and_si256(s, _mm256_set1_epi32(7)),
                                                         _mm256_andnot_si256(direct, _mm256_set1_epi32(8)));
                    width[g] = _mm256_subs_epu16(_mm256_srli_epi32(s, 3), _mm256_set1_epi32(1));
                    value[g] = _mm256_sllv_epi32(lead, width[g]);
                    const __m256i known = _mm256_cmpgt_epi32(s, _mm256_set1_epi32(RANS_DICTIONARY - 1));
                    if (_mm256_movemask_epi8(known)) {
                        const __m256i entry = _mm256_i32gather_epi32(
                            (const int *)(const void *)m->dictionary, _mm256_and_si256(s, _mm256_set1_epi32(15)), 4);
                        const __m256i escape = _mm256_cmpeq_epi32(s, byte);
                        value[g] = _mm256_blendv_epi8(value[g], entry, known);
                        width[g] = _mm256_blendv_epi8(
                            width[g], _mm256_and_si256(escape, _mm256_set1_epi32(8 * (int)w)), known);
                    }
                }
                any = _mm256_or_si256(any, width[g]);
            }
            if (!_mm256_testz_si256(any, any)) {
                EACH {
                    const __m256i n = w == 4 ? _mm256_min_epu32(width[g], _mm256_set1_epi32(16)) : width[g];
                    value[g] = _mm256_or_si256(value[g], take256(&x[g], n, &stream));
                }
                if (w == 4 && !plain && !_mm256_testz_si256(_mm256_cmpgt_epi32(any, _mm256_set1_epi32(16)),
                                                            _mm256_set1_epi32(-1))) {
                    EACH {
                        const __m256i n = _mm256_subs_epu16(width[g], _mm256_set1_epi32(16));
                        value[g] = _mm256_or_si256(value[g], _mm256_slli_epi32(take256(&x[g], n, &stream), 16));
                    }
                }
            }
            EACH {
                const unsigned at = i + 8 * g;
                const __m256i word = plain ? zero : load256(job->prediction + w * at, w);
                store256(job->out + w * at,
                         plain ? join256(_mm256_xor_si256(value[g], flip), job->raw + at, job->raw_stride, w, is_float)
                               : add256(word, value[g], w, is_float),
                         w);
            }
        }
    }
    job->stream = stream;
    EACH _mm256_storeu_si256((__m256i *)(void *)(job->state + 8 * g), x[g]);
}

NARROW void rans_avx2(rans_job *job)
{
    DISPATCH(run256, 8)
}

/* For each set of lanes that give off a word, which lanes these are, in their order and at the end. */
#define TAKE(m, j, row) ((row) >> (8 * BIT(m, j)) | (uint64_t)(BIT(m, j) * j) << 56)
#undef ROW
#define ROW(m)                                                                                                         \
    TAKE((uint64_t)m, 7, TAKE(m, 6, TAKE(m, 5, TAKE(m, 4, TAKE(m, 3, TAKE(m, 2, TAKE(m, 1, TAKE(m, 0, 0ull))))))))
static const uint64_t compression[256] = {ROWS64(0), ROWS64(64), ROWS64(128), ROWS64(192)};

NARROW_INLINE __m256i above256(__m256i x, __m256i last)
{
    const __m256i top = _mm256_set1_epi32((int)0x80000000u);
    return _mm256_cmpgt_epi32(_mm256_xor_si256(x, top), _mm256_xor_si256(last, top));
}

/* Gives off the low words of the states above `last`; what it writes before them, later words overwrite. */
NARROW_INLINE __m256i give256(__m256i x, __m256i last, uint8_t **at)
{
    const __m256i over = above256(x, last);
    const unsigned lanes = (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(over));
    store256(*at - 16, _mm256_permutevar8x32_epi32(x, load256((const uint8_t *)&compression[lanes], 1)), 2);
    *at -= 2 * (unsigned)_mm_popcnt_u32(lanes);
    return _mm256_srlv_epi32(x, _mm256_and_si256(over, _mm256_set1_epi32(16)));
}

NARROW_INLINE __m256i put_raw256(__m256i x, __m256i value, __m256i width, uint8_t **at)
{
    const __m256i ones = _mm256_set1_epi32(-1);
    x = _mm256_sllv_epi32(give256(x, _mm256_srlv_epi32(ones, width), at), width);
    return _mm256_or_si256(x, _mm256_andnot_si256(_mm256_sllv_epi32(ones, width), value));
}

NARROW_INLINE __m128i divide256_half(__m128i x, __m128i by)
{
    const __m256d dividend = _mm256_add_pd(_mm256_cvtepi32_pd(_mm_xor_si128(x, _mm_set1_epi32((int)0x80000000u))),
                                           _mm256_set1_pd(2147483648.0));
    return _mm256_cvttpd_epi32(_mm256_div_pd(dividend, _mm256_cvtepi32_pd(by)));
}

/* As divide512; the quotient is below 2**24. */
NARROW_INLINE __m256i divide256(__m256i x, __m256i by)
{
    const __m128i low = divide256_half(_mm256_castsi256_si128(x), _mm256_castsi256_si128(by));
    const __m128i high = divide256_half(_mm256_extracti128_si256(x, 1), _mm256_extracti128_si256(by, 1));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
}

NARROW_INLINE uint8_t *write256(const rans_model *m, const rans_class *c, const uint16_t *context, const uint32_t *value,
                                uint32_t *state, uint8_t *at, const unsigned G)
{
    const __m128i up = _mm_cvtsi32_si128(32 - (int)m->bits);
    const __m256i total = _mm256_set1_epi32(1 << m->bits), most = _mm256_set1_epi32(16);
    const __m256i map = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)c->map));
    const __m256i field = _mm256_set1_epi32(0x1fff), upper = _mm256_set1_epi32((int)0x80808000);
    __m256i x[8];
    EACH x[g] = load256((const uint8_t *)(state + 8 * g), 4);
    for (unsigned first = RANS_BLOCK; first > 0;) {
        __m256i entry[8], any = _mm256_setzero_si256();
        first -= 8 * G;
        EACH {
            const __m256i both = load256((const uint8_t *)(context + first + 8 * g), 2);
            const __m256i symbol = _mm256_and_si256(both, _mm256_set1_epi32(255));
            const __m256i row = _mm256_shuffle_epi8(map, _mm256_or_si256(_mm256_srli_epi32(both, 8), upper));
            entry[g] = _mm256_i32gather_epi32((const int *)(const void *)m->packed,
                                              _mm256_or_si256(_mm256_slli_epi32(row, 8), symbol), 4);
            any = _mm256_or_si256(any, _mm256_srli_epi32(entry[g], 26));
        }
        if (!_mm256_testz_si256(_mm256_cmpgt_epi32(any, most), _mm256_set1_epi32(-1)))
            for (unsigned g = G; g-- > 0;)
                x[g] = put_raw256(x[g], _mm256_srli_epi32(load256((const uint8_t *)(value + first + 8 * g), 4), 16),
                                  _mm256_subs_epu16(_mm256_srli_epi32(entry[g], 26), most), &at);
        if (!_mm256_testz_si256(any, any))
            for (unsigned g = G; g-- > 0;)
                x[g] = put_raw256(x[g], m->plain ? _mm256_and_si256(load256((const uint8_t *)(context + first + 8 * g), 2),
                                                                    _mm256_set1_epi32(255))
                                                 : load256((const uint8_t *)(value + first + 8 * g), 4),
                                  _mm256_min_epu32(_mm256_srli_epi32(entry[g], 26), most), &at);
        for (unsigned g = G; g-- > 0;) {
            const __m256i frequency = _mm256_and_si256(_mm256_srli_epi32(entry[g], 13), field);
            const __m256i last = _mm256_sub_epi32(_mm256_sll_epi32(frequency, up), _mm256_set1_epi32(1));
            x[g] = give256(x[g], last, &at);
            const __m256i q = divide256(x[g], frequency);
            x[g] = _mm256_add_epi32(_mm256_add_epi32(x[g], _mm256_and_si256(entry[g], field)),
                                    _mm256_mullo_epi32(q, _mm256_sub_epi32(total, frequency)));
        }
    }
    EACH _mm256_storeu_si256((__m256i *)(void *)(state + 8 * g), x[g]);
    return at;
}

NARROW uint8_t *rans_write_avx2(const rans_model *m, const rans_class *c, const uint16_t *context,
                                const uint32_t *value, unsigned lanes, uint32_t *state, uint8_t *at)
{
    return lanes == 32 ? write256(m, c, context, value, state, at, 4) : write256(m, c, context, value, state, at, 8);
}

#endif
