/* The kernels as functions of Python. Tensors come as addresses, so that neither torch's headers nor its version
 * matter here; `ops.py` has checked everything. */
#define Py_LIMITED_API 0x030b0000
#include <Python.h>

#include "kernels.h"

enum { MOST_ARGUMENTS = 16 };

/* All arguments of all functions are integers. */
static int read_integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t wanted, long long *out)
{
    if (given != wanted) {
        PyErr_Format(PyExc_TypeError, "expected %zd arguments, got %zd", wanted, given);
        return -1;
    }
    for (Py_ssize_t i = 0; i < wanted; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred())
            return -1;
    }
    return 0;
}

#define READ(wanted)                                                                                                  \
    long long a[MOST_ARGUMENTS];                                                                                      \
    (void)module;                                                                                                     \
    if (read_integers(args, given, wanted, a))                                                                        \
        return NULL;

#define ADDRESS(i) ((void *)(intptr_t)a[i])

/* The first seven arguments of all functions of tiles: rows, columns, masks, values, offsets, type, grids or 0. */
#define MATRIX                                                                                                        \
    {.rows = a[0], .columns = a[1], .masks = ADDRESS(2), .values = ADDRESS(3), .offsets = ADDRESS(4), .type = a[5],   \
     .grids = ADDRESS(6)}

static PyObject *none_or_no_memory(int failed)
{
    if (failed)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_tiles_linear(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    READ(13) /* ..., level, x, tokens, bias, out, threads */
    const tiles matrix = MATRIX;
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = tiles_linear(a[7], &matrix, ADDRESS(8), a[9], ADDRESS(10), ADDRESS(11), a[12]);
    Py_END_ALLOW_THREADS
    return none_or_no_memory(failed);
}

static PyObject *py_dense_linear(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    READ(9) /* rows, columns, weight, type, level, x, bias, out, threads */
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = dense_linear(a[4], a[3], ADDRESS(2), a[0], a[1], ADDRESS(5), ADDRESS(6), ADDRESS(7), a[8]);
    Py_END_ALLOW_THREADS
    return none_or_no_memory(failed);
}

static PyObject *py_tiles_unpack(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    READ(12) /* ..., level, first, last, out, threads */
    const tiles matrix = MATRIX;
    Py_BEGIN_ALLOW_THREADS
    tiles_unpack(a[7], &matrix, a[8], a[9], ADDRESS(10), a[11]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_tiles_mask(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    READ(9) /* ..., weight, threads */
    const tiles matrix = MATRIX;
    Py_BEGIN_ALLOW_THREADS
    tiles_mask(&matrix, ADDRESS(7), a[8]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_tiles_fill(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    READ(9) /* ..., weight, threads */
    const tiles matrix = MATRIX;
    Py_BEGIN_ALLOW_THREADS
    tiles_fill(&matrix, ADDRESS(7), a[8]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_tiles_check(PyObject *module, PyObject *const *args, Py_ssize_t given)
{
    READ(9) /* ..., num_values, threads */
    const tiles matrix = MATRIX;
    int right;
    Py_BEGIN_ALLOW_THREADS
    right = tiles_check(&matrix, a[7], a[8]);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(right);
}

/* The names of the levels that this processor has, by number; None stands for the others. */
static PyObject *py_levels(PyObject *module, PyObject *unused)
{
    (void)module, (void)unused;
    PyObject *names = PyList_New(NUM_LEVELS);
    for (int level = 0; names != NULL && level < NUM_LEVELS; level++) {
        PyObject *name = level_supported(level) ? PyUnicode_FromString(level_names[level]) : Py_NewRef(Py_None);
        if (name == NULL || PyList_SetItem(names, level, name))
            Py_CLEAR(names);
    }
    return names;
}

#define FUNCTION(name) {#name, (PyCFunction)(void (*)(void))py_##name, METH_FASTCALL, NULL}

static PyMethodDef functions[] = {
    FUNCTION(tiles_linear), FUNCTION(dense_linear), FUNCTION(tiles_unpack), FUNCTION(tiles_mask),
    FUNCTION(tiles_fill),   FUNCTION(tiles_check),  {"levels", py_levels, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_kernels", .m_methods = functions, .m_size = 0};

PyMODINIT_FUNC PyInit__kernels(void) { return PyModuleDef_Init(&definition); }
