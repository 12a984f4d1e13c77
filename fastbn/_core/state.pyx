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


cdef bint is_float(object dtype):
    return dtype.kind == "f" or dtype.name == "bfloat16"


cdef int check_array(str name, object array, tuple shape) except -1:
    # What a user has put there instead may be anything
    cdef cnp.ndarray a
    if not isinstance(array, cnp.ndarray):
        raise TypeError(f"{name}: expected a NumPy array, got {type(array).__name__}")
    a = array
    if not cnp.PyArray_ISBEHAVED(a) or array.shape != shape or not is_float(array.dtype):
        raise ValueError(f"{name}: expected a writable array of floats of shape {shape}, got {array.dtype} of shape "
                         f"{array.shape}{'' if a.flags.writeable else ', read-only'}")
    return 0


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


cdef list moved(object layer, tuple shape):
    # running mean and variance, batches with one more, and the weight of a batch: all that can fail
    running_mean, running_var, tracked, momentum = [getattr(layer, name) for name in STATE]
    for name, array in zip(STATE, (running_mean, running_var)):
        check_array(name, array, shape)
        if array.dtype.num not in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE):
            raise ValueError(f"{name}: expected float32 or float64, got {array.dtype}")
    try:
        tracked = tracked + 1
        return [running_mean, running_var, tracked, float(1 / tracked if momentum is None else momentum)]
    except TypeError:
        message = "num_batches_tracked, momentum: expected numbers (momentum: or None)"
        raise TypeError(f"{message}, got {layer.num_batches_tracked!r} and {momentum!r}") from None


def movable(object layer, Py_ssize_t c):
    """Raise where `move` would."""
    moved(layer, (c,))


def move(object layer, cnp.ndarray mean, cnp.ndarray var):
    """Move a layer's running statistics towards those of a batch, float64 (c,), and count the batch."""
    begin()
    try:
        running_mean, running_var, tracked, weight = moved(layer, (cnp.PyArray_DIM(mean, 0),))
        blend(running_mean, weight, mean)
        blend(running_var, weight, var)
        setattr(layer, STATE[2], tracked)
    finally:
        end()


def narrow(cnp.ndarray values, bint single):
    """Return float64 (c,) as float32 or float64; out of range as infinities, without NumPy's warning."""
    cdef cnp.npy_intp i, n = cnp.PyArray_DIM(values, 0)
    cdef cnp.ndarray result
    cdef const double* wide = <const double*> cnp.PyArray_DATA(values)
    if not single:
        return values
    result = cnp.PyArray_EMPTY(1, &n, cnp.NPY_FLOAT, 0)
    for i in range(n):
        (<float*> cnp.PyArray_DATA(result))[i] = <float> wide[i]
    return result


cdef object copy_of(object value):
    # of an array, in its own dtype; anything else is returned as it is
    cdef cnp.ndarray source, target
    cdef cnp.npy_intp i, n, item
    if not isinstance(value, cnp.ndarray):
        return value
    source = value
    if (not cnp.PyArray_CheckExact(value) or cnp.PyArray_NDIM(source) != 1 or not cnp.PyArray_ISNOTSWAPPED(source)
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


def store(object owner, dict arrays=None, **attributes):
    """Write values into arrays, {name: (array, value)}, and set attributes of their owner.

    Values are converted to the arrays' dtypes, out of range as infinities. What does not fit is refused before that.
    """
    cdef cnp.ndarray target, value
    converted = []
    if arrays:
        with np.errstate(all="ignore"):  # it takes longer than all the rest
            for name, (array, new) in arrays.items():
                check_array(name, array, np.shape(new))
                converted.append((array, np.array(new, array.dtype, order="C")))
    begin()
    try:
        for target, value in converted:
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
