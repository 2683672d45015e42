/* The Python door of the residual codec: module hydrafs._rans. See rans_core.h.
 *
 * Plan: arguments are checked and buffers held here, then the interpreter's lock is released for the work.
 * Thread safety: a model never changes once it is made, save for the encoder's prices, which are added under the lock.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>
#include <string.h>

#include "rans_core.h"

#define CAPSULE "hydrafs._rans.model"

static const char *const level_names[] = {"avx512", "avx2", "portable"};

static PyObject *fail(rans_status status)
{
    if (status == RANS_NO_MEMORY)
        return PyErr_NoMemory();
    PyErr_SetString(PyExc_ValueError, status == RANS_NO_MODEL ? "no model for this" : "damaged");
    return NULL;
}

static void free_capsule(PyObject *capsule)
{
    rans_models *models = PyCapsule_GetPointer(capsule, CAPSULE);
    if (models) {
        rans_free(models);
        free(models);
    }
}

static PyObject *py_model(PyObject *self, PyObject *args)
{
    Py_buffer params;
    (void)self;
    if (!PyArg_ParseTuple(args, "y*:model", &params))
        return NULL;
    rans_models *models = calloc(1, sizeof *models);
    rans_status status = models ? rans_parse(params.buf, (size_t)params.len, models) : RANS_NO_MEMORY;
    PyBuffer_Release(&params);
    if (status != RANS_OK) {
        free(models);
        return fail(status);
    }
    PyObject *capsule = PyCapsule_New(models, CAPSULE, free_capsule);
    if (!capsule) {
        rans_free(models);
        free(models);
    }
    return capsule;
}

static int good_format(unsigned nbytes, int is_float, unsigned mantissa)
{
    if ((nbytes == 1 || nbytes == 2 || nbytes == 4 || nbytes == 8) &&
        (is_float ? mantissa >= 1 && mantissa <= 8 * nbytes - 2 : mantissa == 0))
        return 1;
    PyErr_SetString(PyExc_TypeError, "no such word");
    return 0;
}

/* A contiguous buffer, or nothing for None. */
static int get_buffer(PyObject *object, Py_buffer *view, int flags)
{
    view->buf = NULL;
    view->obj = NULL;
    view->len = 0;
    return object == Py_None ? 0 : PyObject_GetBuffer(object, view, flags);
}

static PyObject *py_encode(PyObject *self, PyObject *args)
{
    PyObject *capsule, *prediction_object, *target_object, *result = NULL;
    Py_buffer prediction, target;
    rans_format format;
    const char *level;
    rans_kernel kernel;
    (void)self;
    if (!PyArg_ParseTuple(args, "OsOOIpI:encode", &capsule, &level, &prediction_object, &target_object, &format.nbytes,
                          &format.is_float, &format.mantissa) ||
        !good_format(format.nbytes, format.is_float, format.mantissa))
        return NULL;
    rans_models *models = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!models)
        return NULL;
    if (rans_find_kernel(level, &kernel)) {
        PyErr_SetString(PyExc_LookupError, level);
        return NULL;
    }
    if (get_buffer(prediction_object, &prediction, PyBUF_SIMPLE))
        return NULL;
    if (PyObject_GetBuffer(target_object, &target, PyBUF_SIMPLE)) {
        PyBuffer_Release(&prediction);
        return NULL;
    }
    uint8_t *payload = NULL;
    size_t nbytes = 0;
    rans_status status = rans_prepare(prediction.obj ? models->residual : models->plain);
    if (prediction.obj && prediction.len != target.len) {
        PyErr_SetString(PyExc_TypeError, "prediction and target differ in length");
    } else {
        static const uint8_t empty[1] = {0};
        const uint8_t *known = !prediction.obj ? NULL : prediction.buf ? prediction.buf : empty;
        if (status == RANS_OK) {
            Py_BEGIN_ALLOW_THREADS
            status = rans_encode(models, kernel, format, known, target.buf, (size_t)target.len, &payload, &nbytes);
            Py_END_ALLOW_THREADS
        }
        result = status != RANS_OK ? fail(status)
                                   : PyBytes_FromStringAndSize((const char *)payload, (Py_ssize_t)nbytes);
        free(payload);
    }
    PyBuffer_Release(&prediction);
    PyBuffer_Release(&target);
    return result;
}

static PyObject *py_decode_into(PyObject *self, PyObject *args)
{
    PyObject *capsule, *prediction_object, *payload_object, *out_object, *result = NULL;
    Py_buffer prediction, payload, out;
    rans_format format;
    const char *level;
    rans_kernel kernel;
    (void)self;
    if (!PyArg_ParseTuple(args, "OsOOOIpI:decode_into", &capsule, &level, &prediction_object, &payload_object,
                          &out_object, &format.nbytes, &format.is_float, &format.mantissa) ||
        !good_format(format.nbytes, format.is_float, format.mantissa))
        return NULL;
    const rans_models *models = PyCapsule_GetPointer(capsule, CAPSULE);
    if (!models)
        return NULL;
    if (rans_find_kernel(level, &kernel)) {
        PyErr_SetString(PyExc_LookupError, level);
        return NULL;
    }
    if (get_buffer(prediction_object, &prediction, PyBUF_SIMPLE))
        return NULL;
    if (PyObject_GetBuffer(payload_object, &payload, PyBUF_SIMPLE)) {
        PyBuffer_Release(&prediction);
        return NULL;
    }
    if (PyObject_GetBuffer(out_object, &out, PyBUF_SIMPLE | PyBUF_WRITABLE)) {
        PyBuffer_Release(&prediction);
        PyBuffer_Release(&payload);
        return NULL;
    }
    if (prediction.obj && prediction.len != out.len) {
        PyErr_SetString(PyExc_TypeError, "prediction and output differ in length");
    } else {
        rans_status status;
        Py_BEGIN_ALLOW_THREADS
        status = rans_decode(models, kernel, format, prediction.obj ? prediction.buf : NULL, payload.buf,
                             (size_t)payload.len, out.buf, (size_t)out.len);
        Py_END_ALLOW_THREADS
        if (status == RANS_OK) {
            Py_INCREF(Py_None);
            result = Py_None;
        } else {
            fail(status);
        }
    }
    PyBuffer_Release(&prediction);
    PyBuffer_Release(&payload);
    PyBuffer_Release(&out);
    return result;
}

/* 0, or -1 with an exception. */
static int sample_pair(PyObject *pair, rans_samples samples[2])
{
    PyObject *prediction_object, *target_object;
    Py_buffer prediction, target;
    if (!PyTuple_Check(pair) || !PyArg_ParseTuple(pair, "OO", &prediction_object, &target_object)) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "samples are pairs");
        return -1;
    }
    if (get_buffer(prediction_object, &prediction, PyBUF_SIMPLE))
        return -1;
    if (PyObject_GetBuffer(target_object, &target, PyBUF_SIMPLE)) {
        PyBuffer_Release(&prediction);
        return -1;
    }
    rans_status status = RANS_OK;
    if (prediction.obj && prediction.len != target.len) {
        PyErr_SetString(PyExc_TypeError, "prediction and target differ in length");
    } else {
        Py_BEGIN_ALLOW_THREADS
        status = rans_sample(&samples[!prediction.obj], prediction.buf, target.buf, (size_t)target.len);
        Py_END_ALLOW_THREADS
        if (status != RANS_OK)
            fail(status);
    }
    PyBuffer_Release(&prediction);
    PyBuffer_Release(&target);
    return PyErr_Occurred() ? -1 : 0;
}

static PyObject *py_train(PyObject *self, PyObject *args)
{
    PyObject *iterable, *pair, *result = NULL;
    rans_format format;
    const char *level;
    rans_kernel kernel;
    (void)self;
    if (!PyArg_ParseTuple(args, "OsIpI:train", &iterable, &level, &format.nbytes, &format.is_float, &format.mantissa) ||
        !good_format(format.nbytes, format.is_float, format.mantissa))
        return NULL;
    if (rans_find_kernel(level, &kernel)) {
        PyErr_SetString(PyExc_LookupError, level);
        return NULL;
    }
    if (format.nbytes == 8)
        return PyBytes_FromStringAndSize(NULL, 0);
    PyObject *iterator = PyObject_GetIter(iterable);
    if (!iterator)
        return NULL;
    rans_samples samples[2];
    memset(samples, 0, sizeof samples);
    samples[0].format = samples[1].format = format;
    samples[1].plain = 1;
    while ((pair = PyIter_Next(iterator))) {
        const int failed = sample_pair(pair, samples);
        Py_DECREF(pair);
        if (failed)
            break;
    }
    Py_DECREF(iterator);
    if (!PyErr_Occurred()) {
        uint8_t *params = NULL;
        size_t nbytes = 0;
        rans_status status;
        Py_BEGIN_ALLOW_THREADS
        status = rans_train(&samples[0], kernel, &params, &nbytes);
        if (status == RANS_OK)
            status = rans_train(&samples[1], kernel, &params, &nbytes);
        Py_END_ALLOW_THREADS
        result = status != RANS_OK ? fail(status)
                                   : PyBytes_FromStringAndSize((const char *)params, (Py_ssize_t)nbytes);
        free(params);
    }
    for (int i = 0; i < 2; i++) {
        free(samples[i].target);
        free(samples[i].prediction);
    }
    return result;
}

static PyObject *py_levels(PyObject *self, PyObject *args)
{
    rans_kernel kernel;
    (void)self;
    (void)args;
    PyObject *list = PyList_New(0);
    for (size_t i = 0; list && i < sizeof level_names / sizeof *level_names; i++) {
        if (rans_find_kernel(level_names[i], &kernel))
            continue;
        PyObject *name = PyUnicode_FromString(level_names[i]);
        if (!name || PyList_Append(list, name)) {
            Py_XDECREF(name);
            Py_DECREF(list);
            return NULL;
        }
        Py_DECREF(name);
    }
    return list;
}

static PyMethodDef methods[] = {
    {"model", py_model, METH_VARARGS, "model(params): decoding tables; ValueError if damaged"},
    {"encode", py_encode, METH_VARARGS, 
     "encode(model, level, prediction, target, word_nbytes, is_float, mantissa): a payload"},
    {"decode_into", py_decode_into, METH_VARARGS,
     "decode_into(model, level, prediction, payload, out, word_nbytes, is_float, mantissa)"},
    {"train", py_train, METH_VARARGS, "train(pairs, level, word_nbytes, is_float, mantissa): params"},
    {"levels", py_levels, METH_NOARGS, "levels(): the kernels this machine can run, fastest first"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "hydrafs._rans", "The native residual codec.", 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__rans(void);

PyMODINIT_FUNC PyInit__rans(void)
{
    return PyModuleDef_Init(&definition);
}
