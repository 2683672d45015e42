/* Formulas over F32, F16 and BF16, a block of elements at a time: see hydrafs/formulas.py, whose bits these are.
 *
 * Rule 1: every value is held as float, rounded to its own type after each step; nothing is fused but lerp (fmaf).
 *   The build says -ffp-contract=off, and no flag may allow reassociation.
 * Rule 2: conversions are done with integers and additions of normal numbers, branch-free, so that compilers vectorise
 *   them and no processor mode touches them.
 * Rule 3: whatever the program says, no read or write leaves the buffers: every step and index is checked first.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 2048
#define MAX_STACK 8
#define MAX_STEPS 64
#define MAX_OPERANDS 8

enum { GET, CAST, SCALE, DIVIDE, ADD, SUBTRACT, LERP, OPS };
enum { F32, F16, BF16, TYPES };

typedef struct {
    unsigned op, argument; /* an operand, or a type */
    float number;
} step;

typedef struct {
    float values[MAX_STACK][BLOCK];
    unsigned type[MAX_STACK];
} stack;

static const size_t width[TYPES] = {4, 2, 2};

/* GCC and Clang on x86 compile each loop for several processors and choose when the module is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

static inline uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

static inline float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

CLONES static void load_half(const uint8_t *restrict in, float *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        const uint32_t shifted = (uint32_t)(h & 0x7fff) << 13, exponent = shifted & 0x0f800000u;
        const uint32_t wide = shifted + ((127 - 15) << 23);
        /* infinities and NaNs: the largest exponent; subnormals: a normal number less what was added to make it one */
        const uint32_t special = wide + ((128 - 16) << 23);
        const uint32_t tiny = bits_of(float_of(wide + (1 << 23)) - float_of(113 << 23));
        uint32_t u = exponent == 0x0f800000u ? special : wide;
        u = exponent == 0 ? tiny : u;
        out[i] = float_of(u | (uint32_t)(h & 0x8000) << 16);
    }
}

CLONES static void load_bfloat(const uint8_t *restrict in, float *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        memcpy(&h, in + 2 * i, 2);
        out[i] = float_of((uint32_t)h << 16);
    }
}

/* To the nearest value of binary16, ties to even, as a float. */
CLONES static void round_half(float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(x[i]), sign = u & 0x80000000u, magnitude = u ^ sign;
        uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1)) & ~0x1fffu;
        normal = normal > 0x477fe000u ? 0x7f800000u : normal; /* 65504 */
        /* below 2^-14 the unit is 2^-24, which is that of the numbers from 1/2 to 1 */
        const uint32_t tiny = bits_of((float_of(magnitude) + 0.5f) - 0.5f);
        uint32_t r = magnitude < 0x38800000u ? tiny : normal;
        r = magnitude > 0x7f800000u ? 0x7fc00000u : r;
        x[i] = float_of(r | sign);
    }
}

CLONES static void round_bfloat(float *restrict x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(x[i]);
        const uint32_t r = (u + 0x7fff + (u >> 16 & 1)) & 0xffff0000u;
        x[i] = float_of((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : r);
    }
}

CLONES static void store_half(const float *restrict in, uint8_t *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(in[i]), magnitude = u & 0x7fffffffu;
        /* the values are those of binary16 already: a subnormal is a whole number of 2^-24 */
        const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
        uint32_t h = magnitude < 0x38800000u ? tiny : (magnitude >> 13) - (112 << 10);
        h = magnitude >= 0x7f800000u ? 0x7c00u : h;
        h |= u >> 16 & 0x8000u;
        h = magnitude > 0x7f800000u ? 0x7e00u : h;
        const uint16_t word = (uint16_t)h;
        memcpy(out + 2 * i, &word, 2);
    }
}

CLONES static void store_bfloat(const float *restrict in, uint8_t *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(in[i]);
        const uint16_t word = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0 : (uint16_t)(u >> 16);
        memcpy(out + 2 * i, &word, 2);
    }
}

CLONES static void store_single(const float *restrict in, uint8_t *restrict out, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(in[i]), word = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : u;
        memcpy(out + 4 * i, &word, 4);
    }
}

CLONES static void scale(float *restrict x, float by, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] *= by;
}

CLONES static void divide(float *restrict x, float by, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] /= by;
}

CLONES static void add(float *restrict a, const float *restrict b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        a[i] += b[i];
}

CLONES static void subtract(float *restrict a, const float *restrict b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        a[i] -= b[i];
}

CLONES static void lerp(float *restrict a, const float *restrict b, float weight, size_t n)
{
    if (fabsf(weight) < 0.5f) {
        for (size_t i = 0; i < n; i++)
            a[i] = fmaf(weight, b[i] - a[i], a[i]);
    } else {
        const float rest = weight - 1.0f;
        for (size_t i = 0; i < n; i++)
            a[i] = fmaf(rest, b[i] - a[i], b[i]);
    }
}

static void round_to(float *x, unsigned type, size_t n)
{
    if (type == F16)
        round_half(x, n);
    else if (type == BF16)
        round_bfloat(x, n);
}

static void load(const uint8_t *in, unsigned type, float *out, size_t n)
{
    if (type == F16)
        load_half(in, out, n);
    else if (type == BF16)
        load_bfloat(in, out, n);
    else
        memcpy(out, in, 4 * n);
}

static void run(stack *s, const step *steps, size_t count, const uint8_t *const *operands, const unsigned *types,
                size_t first, size_t n)
{
    unsigned depth = 0;
    for (size_t k = 0; k < count; k++) {
        const step *t = &steps[k];
        if (t->op == GET) {
            const unsigned type = types[t->argument];
            load(operands[t->argument] + first * width[type], type, s->values[depth], n);
            s->type[depth++] = type;
            continue;
        }
        float *top = s->values[depth - 1];
        unsigned *type = &s->type[depth - 1];
        if (t->op == CAST) {
            if (t->argument != F32 && t->argument != *type)
                round_to(top, t->argument, n);
            *type = t->argument;
            continue;
        }
        if (t->op == SCALE || t->op == DIVIDE) {
            (t->op == SCALE ? scale : divide)(top, t->number, n);
        } else {
            float *below = s->values[depth - 2];
            type = &s->type[depth - 2];
            if (*type != s->type[depth - 1])
                *type = F32;
            if (t->op == LERP)
                lerp(below, top, t->number, n);
            else
                (t->op == ADD ? add : subtract)(below, top, n);
            depth--;
            top = below;
        }
        round_to(top, *type, n);
    }
}

/* Whether the steps leave one value of `result`, whatever they are. */
static int sound(const step *steps, size_t count, const unsigned *types, size_t operands, unsigned result)
{
    unsigned depth = 0, type[MAX_STACK];
    if (!count || count > MAX_STEPS)
        return 0;
    for (size_t k = 0; k < count; k++) {
        const step *t = &steps[k];
        if (t->op == GET) {
            if (t->argument >= operands || depth >= MAX_STACK)
                return 0;
            type[depth++] = types[t->argument];
        } else if (t->op == CAST) {
            if (!depth || t->argument >= TYPES)
                return 0;
            type[depth - 1] = t->argument;
        } else if (t->op == SCALE || t->op == DIVIDE) {
            if (!depth)
                return 0;
        } else if (t->op < OPS) {
            if (depth < 2)
                return 0;
            depth--;
            if (type[depth] != type[depth - 1])
                type[depth - 1] = F32;
        } else {
            return 0;
        }
    }
    return depth == 1 && type[0] == result;
}

/* evaluate(steps, types, operands, result, out): `steps` are packed as "<BBxxf", `types` is a byte for each operand. */
static PyObject *evaluate(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer packed, kinds, out, views[MAX_OPERANDS];
    PyObject *sequence;
    unsigned result;
    if (!PyArg_ParseTuple(args, "y*y*OIw*", &packed, &kinds, &sequence, &result, &out))
        return NULL;
    step steps[MAX_STEPS];
    unsigned types[MAX_OPERANDS];
    const uint8_t *buffers[MAX_OPERANDS];
    Py_ssize_t held = 0;
    int good = result < TYPES && packed.len % 8 == 0 && packed.len / 8 <= MAX_STEPS && kinds.len <= MAX_OPERANDS &&
               PyTuple_Check(sequence) && PyTuple_Size(sequence) == kinds.len && out.len % (Py_ssize_t)width[result % TYPES] == 0;
    const size_t count = good ? (size_t)packed.len / 8 : 0, n = good ? (size_t)out.len / width[result] : 0;
    for (size_t k = 0; k < count; k++) {
        const uint8_t *at = (const uint8_t *)packed.buf + 8 * k;
        steps[k].op = at[0];
        steps[k].argument = at[1];
        memcpy(&steps[k].number, at + 4, 4);
    }
    for (Py_ssize_t k = 0; good && k < kinds.len; k++) {
        types[k] = ((const uint8_t *)kinds.buf)[k];
        good = types[k] < TYPES;
        if (good && PyObject_GetBuffer(PyTuple_GetItem(sequence, k), &views[k], PyBUF_SIMPLE) < 0) {
            good = 0;
            PyErr_Clear();
            break;
        }
        held += good;
        buffers[k] = good ? views[k].buf : NULL;
        good = good && (size_t)views[k].len == n * width[types[k]];
    }
    good = good && sound(steps, count, types, (size_t)kinds.len, result);
    stack *s = good ? malloc(sizeof *s) : NULL;
    if (s) {
        Py_BEGIN_ALLOW_THREADS
        for (size_t first = 0; first < n; first += BLOCK) {
            const size_t part = n - first < BLOCK ? n - first : BLOCK;
            run(s, steps, count, buffers, types, first, part);
            uint8_t *to = (uint8_t *)out.buf + first * width[result];
            if (result == F16)
                store_half(s->values[0], to, part);
            else if (result == BF16)
                store_bfloat(s->values[0], to, part);
            else
                store_single(s->values[0], to, part);
        }
        Py_END_ALLOW_THREADS
        free(s);
    }
    while (held > 0)
        PyBuffer_Release(&views[--held]);
    PyBuffer_Release(&out);
    PyBuffer_Release(&kinds);
    PyBuffer_Release(&packed);
    if (!good) {
        PyErr_SetString(PyExc_ValueError, "no formula, or buffers of other lengths");
        return NULL;
    }
    if (!s)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"evaluate", evaluate, METH_VARARGS, "evaluate(steps, types, operands, result, out): see formulas.c"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "hydrafs._formulas", "Formulas over tensors, natively.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__formulas(void)
{
    return PyModule_Create(&definition);
}
