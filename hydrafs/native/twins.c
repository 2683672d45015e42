/* Two SHA-256s of nearly the same bytes, taken side by side: module hydrafs._twins. FIPS 180-4 says what SHA-256 is.
 *
 * Goal: a model's SHA-256 and that of what follows its header cost hardly more than one of them.
 * Plan: the processor's SHA instructions answer after four cycles and could be asked every two, so a block of each
 *   stream goes through the rounds at once. The streams are cut into blocks at different places; each keeps its own tail.
 * Thread safety: one thread at a time gives bytes to a state; the interpreter's lock is let go of meanwhile.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

#define BLOCK 64
#define SHA __attribute__((target("sha,sse4.1,ssse3")))
#define EACH(N) for (int s = 0; s < (N); s++)

/* abef and cdgh are the eight words as the instructions want them. */
typedef struct {
    uint32_t abef[4], cdgh[4];
    uint64_t nbytes;
    uint8_t tail[BLOCK];
} stream;

typedef struct {
    stream of[2];
} pair;

static const stream START = {{0x9b05688c, 0x510e527f, 0xbb67ae85, 0x6a09e667},
                             {0x5be0cd19, 0x1f83d9ab, 0xa54ff53a, 0x3c6ef372},
                             0,
                             {0}};

static const uint32_t ROUND[64] __attribute__((aligned(16))) = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
    0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
    0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
    0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
    0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
    0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

/* Blocks of the first N of both streams, as many of each, from data[0] and data[1] on. */
SHA static inline __attribute__((always_inline)) void blocks(stream *of, const uint8_t *const *from, size_t count,
                                                             const int N)
{
    const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0bLL, 0x0405060700010203LL);
    __m128i abef[2], cdgh[2], w[2][4];
    const uint8_t *data[2];
    EACH(N)
    {
        data[s] = from[s];
        abef[s] = _mm_loadu_si128((const __m128i *)of[s].abef);
        cdgh[s] = _mm_loadu_si128((const __m128i *)of[s].cdgh);
    }
    while (count--) {
        __m128i abef_before[2], cdgh_before[2];
        EACH(N)
        {
            abef_before[s] = abef[s];
            cdgh_before[s] = cdgh[s];
            for (int i = 0; i < 4; i++)
                w[s][i] = _mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)data[s] + i), big_endian);
            data[s] += BLOCK;
        }
#define FOUR_ROUNDS(g)                                                                                                 \
    EACH(N)                                                                                                            \
    {                                                                                                                  \
        __m128i *v = w[s];                                                                                             \
        const __m128i sum = _mm_add_epi32(v[(g) & 3], _mm_load_si128((const __m128i *)ROUND + (g)));                   \
        cdgh[s] = _mm_sha256rnds2_epu32(cdgh[s], abef[s], sum);                                                        \
        abef[s] = _mm_sha256rnds2_epu32(abef[s], cdgh[s], _mm_shuffle_epi32(sum, 0x0e));                               \
        if ((g) < 12) {                                                                                                \
            const __m128i seventh = _mm_alignr_epi8(v[((g) + 3) & 3], v[((g) + 2) & 3], 4);                            \
            const __m128i next = _mm_add_epi32(_mm_sha256msg1_epu32(v[(g) & 3], v[((g) + 1) & 3]), seventh);           \
            v[(g) & 3] = _mm_sha256msg2_epu32(next, v[((g) + 3) & 3]);                                                 \
        }                                                                                                              \
    }
        FOUR_ROUNDS(0) FOUR_ROUNDS(1) FOUR_ROUNDS(2) FOUR_ROUNDS(3)
        FOUR_ROUNDS(4) FOUR_ROUNDS(5) FOUR_ROUNDS(6) FOUR_ROUNDS(7)
        FOUR_ROUNDS(8) FOUR_ROUNDS(9) FOUR_ROUNDS(10) FOUR_ROUNDS(11)
        FOUR_ROUNDS(12) FOUR_ROUNDS(13) FOUR_ROUNDS(14) FOUR_ROUNDS(15)
#undef FOUR_ROUNDS
        EACH(N)
        {
            abef[s] = _mm_add_epi32(abef[s], abef_before[s]);
            cdgh[s] = _mm_add_epi32(cdgh[s], cdgh_before[s]);
        }
    }
    EACH(N)
    {
        _mm_storeu_si128((__m128i *)of[s].abef, abef[s]);
        _mm_storeu_si128((__m128i *)of[s].cdgh, cdgh[s]);
    }
}

SHA static void blocks_of_one(stream *of, const uint8_t *data, size_t count)
{
    blocks(of, &data, count, 1);
}

SHA static void blocks_of_both(pair *both, const uint8_t *const *data, size_t count)
{
    blocks(both->of, data, count, 2);
}

/* Fills up the tail; what is left of the data begins at a block of the stream. */
static void fill_tail(stream *of, const uint8_t **data, size_t *nbytes)
{
    const size_t held = of->nbytes % BLOCK, room = BLOCK - held;
    const size_t taken = *nbytes < room ? *nbytes : room;
    if (!held || !taken)
        return;
    memcpy(of->tail + held, *data, taken);
    of->nbytes += taken;
    *data += taken;
    *nbytes -= taken;
    if (taken == room)
        blocks_of_one(of, of->tail, 1);
}

static void update(pair *both, const uint8_t *data, size_t nbytes, size_t skipped)
{
    const uint8_t *at[2] = {data, data + skipped};
    size_t left[2] = {nbytes, nbytes - skipped}, whole[2];
    EACH(2)
    {
        fill_tail(&both->of[s], &at[s], &left[s]);
        whole[s] = left[s] / BLOCK;
    }
    const size_t together = whole[0] < whole[1] ? whole[0] : whole[1];
    blocks_of_both(both, at, together);
    EACH(2)
    {
        stream *of = &both->of[s];
        blocks_of_one(of, at[s] + together * BLOCK, whole[s] - together);
        of->nbytes += left[s];
        if (left[s] % BLOCK)
            memcpy(of->tail, at[s] + whole[s] * BLOCK, left[s] % BLOCK);
    }
}

static void finish(stream of, uint8_t *digest)
{
    const size_t held = of.nbytes % BLOCK, count = held < BLOCK - 8 ? 1 : 2;
    const uint64_t nbits = of.nbytes * 8;
    uint8_t last[2 * BLOCK] = {0};
    memcpy(last, of.tail, held);
    last[held] = 0x80;
    for (int i = 0; i < 8; i++)
        last[count * BLOCK - 1 - i] = (uint8_t)(nbits >> (8 * i));
    blocks_of_one(&of, last, count);
    const uint32_t words[8] = {of.abef[3], of.abef[2], of.cdgh[3], of.cdgh[2],
                               of.abef[1], of.abef[0], of.cdgh[1], of.cdgh[0]};
    for (int i = 0; i < 32; i++)
        digest[i] = (uint8_t)(words[i / 4] >> (24 - 8 * (i % 4)));
}

static int available(void)
{
    unsigned a, b, c, d;
    const unsigned ssse3_and_sse41 = 1u << 9 | 1u << 19;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & ssse3_and_sse41) != ssse3_and_sse41)
        return 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && b >> 29 & 1;
}

#else

typedef struct {
    char none;
} pair;

static int available(void)
{
    return 0;
}

#endif

#define CAPSULE "hydrafs._twins.pair"

static void free_capsule(PyObject *capsule)
{
    PyMem_Free(PyCapsule_GetPointer(capsule, CAPSULE));
}

static int check_available(void)
{
    if (available())
        return 1;
    PyErr_SetString(PyExc_NotImplementedError, "this processor has no SHA instructions");
    return 0;
}

static PyObject *py_begin(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    if (!check_available())
        return NULL;
    pair *both = PyMem_Calloc(1, sizeof *both);
    if (!both)
        return PyErr_NoMemory();
#ifdef BLOCK
    both->of[0] = both->of[1] = START;
#endif
    PyObject *capsule = PyCapsule_New(both, CAPSULE, free_capsule);
    if (!capsule)
        PyMem_Free(both);
    return capsule;
}

static PyObject *py_update(PyObject *self, PyObject *args)
{
    PyObject *capsule;
    Py_buffer data;
    Py_ssize_t skipped;
    (void)self;
    if (!PyArg_ParseTuple(args, "Oy*n:update", &capsule, &data, &skipped))
        return NULL;
    pair *both = PyCapsule_GetPointer(capsule, CAPSULE);
    if (both && (skipped < 0 || skipped > data.len))
        PyErr_SetString(PyExc_ValueError, "more is skipped than there is");
    if (PyErr_Occurred()) {
        PyBuffer_Release(&data);
        return NULL;
    }
#ifdef BLOCK
    Py_BEGIN_ALLOW_THREADS
    update(both, data.buf, (size_t)data.len, (size_t)skipped);
    Py_END_ALLOW_THREADS
#endif
    PyBuffer_Release(&data);
    Py_RETURN_NONE;
}

static PyObject *py_finish(PyObject *self, PyObject *capsule)
{
    uint8_t digests[2][32] = {{0}};
    (void)self;
    pair *both = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!both)
        return NULL;
#ifdef BLOCK
    finish(both->of[0], digests[0]);
    finish(both->of[1], digests[1]);
#endif
    return Py_BuildValue("(y#y#)", digests[0], (Py_ssize_t)32, digests[1], (Py_ssize_t)32);
}

static PyObject *py_available(PyObject *self, PyObject *unused)
{
    (void)self, (void)unused;
    return PyBool_FromLong(available());
}

static PyMethodDef methods[] = {
    {"available", py_available, METH_NOARGS, "available() -> bool: whether this processor has the instructions."},
    {"begin", py_begin, METH_NOARGS, "begin() -> pair: two SHA-256s of nothing yet."},
    {"update", py_update, METH_VARARGS,
     "update(pair, data, skipped): the first takes all of data, the second what follows the skipped bytes."},
    {"finish", py_finish, METH_O, "finish(pair) -> (bytes, bytes): both digests of what was given so far."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "hydrafs._twins", "Two SHA-256s side by side.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__twins(void)
{
    return PyModule_Create(&definition);
}
