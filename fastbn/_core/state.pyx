# cython: language_level=3, freethreading_compatible=True
# cython: boundscheck=True, wraparound=True
"""Changes of an object's state that are whole: they happen altogether or not at all.

Between two lines of Python a signal can raise KeyboardInterrupt, and another thread can come in; NumPy lets other
threads run even within one assignment. In here neither can happen: compiled code sees no signals, the loops below keep
the GIL, and a CPython without a GIL takes a lock. (Not a critical section: those let others in while they wait for
another object, be it only to set an attribute.)
"""

cimport numpy as cnp
from libc.string cimport memcpy

import numpy as np

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    static PyMutex whole;
    static void begin(void) { PyMutex_Lock(&whole); }
    static void end(void) { PyMutex_Unlock(&whole); }
    static void reset(void) { whole = (PyMutex){0}; }
    #else
    static void begin(void) {}
    static void end(void) {}
    static void reset(void) {}
    #endif
    """
    void begin()
    void end()
    void reset()

cnp.import_array()


cdef tuple STATE = ("running_mean", "running_var", "num_batches_tracked", "momentum")


cdef int check_running(str name, object array, Py_ssize_t c) except -1:
    # What a user has put there instead may be anything
    cdef cnp.ndarray a
    if isinstance(array, cnp.ndarray):
        a = array
        if (cnp.PyArray_NDIM(a) == 1 and cnp.PyArray_DIM(a, 0) == c and cnp.PyArray_ISBEHAVED(a)
                and cnp.PyArray_TYPE(a) in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE)):
            return 0
        raise ValueError(f"{name}: expected a writable float32 or float64 array of shape ({c},), got {a.dtype} "
                         f"of shape {tuple(array.shape)}")
    raise TypeError(f"{name}: expected a NumPy array, got {type(array).__name__}")


cdef void blend(cnp.ndarray running, double weight, cnp.ndarray new) noexcept:
    # running = (1 - weight)·running + weight·new, computed in float64
    cdef char* p = <char*> cnp.PyArray_DATA(running)
    cdef const double* value = <const double*> cnp.PyArray_DATA(new)
    cdef Py_ssize_t i, stride = cnp.PyArray_STRIDE(running, 0)
    if cnp.PyArray_TYPE(running) == cnp.NPY_FLOAT:
        for i in range(cnp.PyArray_DIM(running, 0)):
            (<float*> (p + i * stride))[0] = <float> ((1 - weight) * (<float*> (p + i * stride))[0] + weight * value[i])
    else:
        for i in range(cnp.PyArray_DIM(running, 0)):
            (<double*> (p + i * stride))[0] = (1 - weight) * (<double*> (p + i * stride))[0] + weight * value[i]


def move(object layer, cnp.ndarray mean, cnp.ndarray var):
    """Move a layer's running statistics towards those of a batch, float64 (c,), and count the batch."""
    cdef Py_ssize_t c = cnp.PyArray_DIM(mean, 0)
    cdef double weight
    begin()
    try:
        running_mean, running_var, tracked, momentum = [getattr(layer, name) for name in STATE]
        check_running("running_mean", running_mean, c)
        check_running("running_var", running_var, c)
        weight = 1.0 / (tracked + 1) if momentum is None else momentum
        blend(running_mean, weight, mean)
        blend(running_var, weight, var)
        setattr(layer, STATE[2], tracked + 1)
    finally:
        end()


cdef object copy_of(object value):
    # of an array, in its own dtype; anything else is returned as it is
    cdef cnp.ndarray source, target
    cdef cnp.npy_intp i, n, item
    if not cnp.PyArray_CheckExact(value):
        return value
    source = value
    if (cnp.PyArray_NDIM(source) != 1 or not cnp.PyArray_ISNOTSWAPPED(source)
            or not cnp.PyTypeNum_ISNUMBER(cnp.PyArray_TYPE(source))):
        return source.copy()
    n, item = cnp.PyArray_DIM(source, 0), cnp.PyArray_ITEMSIZE(source)
    target = cnp.PyArray_EMPTY(1, &n, cnp.PyArray_TYPE(source), 0)
    for i in range(n):
        memcpy(<char*> cnp.PyArray_DATA(target) + i * item,
               <char*> cnp.PyArray_DATA(source) + i * cnp.PyArray_STRIDE(source, 0), item)
    return target


def copies(object owner, tuple names):
    """Return attributes as they were at one moment, in order: NumPy arrays as copies, other values as they are."""
    begin()
    try:
        return [copy_of(getattr(owner, name)) for name in names]
    finally:
        end()


def store(*changes):
    """Make changes, each (owner, target arrays, their new values, new attributes of the owner); see `change`."""
    cdef cnp.ndarray target, value
    begin()
    try:
        for owner, targets, values, attributes in changes:
            for target, value in zip(targets, values):
                if cnp.PyArray_IS_C_CONTIGUOUS(target):
                    memcpy(cnp.PyArray_DATA(target), cnp.PyArray_DATA(value), cnp.PyArray_NBYTES(value))
                else:
                    cnp.PyArray_CopyInto(target, value)
            for name, attribute in attributes.items():
                setattr(owner, name, attribute)
    finally:
        end()


def after_fork():
    """Forget what another thread was doing in the parent."""
    reset()


def change(object owner, targets=(), values=(), **attributes):
    """Return a change for `store`: the values in the targets' dtypes, out of range as infinities. Writes nothing."""
    for target in targets:
        if not target.flags.writeable:
            raise ValueError(f"{type(owner).__name__}: expected arrays that can be written, got a read-only one")
    with np.errstate(all="ignore"):
        converted = [np.array(value, target.dtype, order="C") for target, value in zip(targets, values)]
    return owner, targets, converted, attributes
