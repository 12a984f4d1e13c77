# cython: language_level=3, freethreading_compatible=True
# cython: boundscheck=True, wraparound=True
"""Changes of an object's state that are whole: they happen altogether or not at all.

Between two lines of Python a signal can raise KeyboardInterrupt, and another thread can come in; NumPy lets other
threads run even within one assignment. In here neither can happen: compiled code sees no signals, the loops below keep
the GIL, and a CPython without a GIL takes a lock. (Not a critical section: those let others in while they wait for
another object, be it only to set an attribute.) What runs in here although it is a user's, such as a property of a
subclass, may call in again from the same thread.
"""

cimport numpy as cnp
from libc.string cimport memcpy

import operator

import numpy as np

cdef extern from *:
    """
    #ifdef Py_GIL_DISABLED
    static PyMutex whole;
    static unsigned long holder; /* the thread that has it, or 0 */
    static int depth;            /* how often */
    static void begin(void) {
        unsigned long self = PyThread_get_thread_ident();
        if (__atomic_load_n(&holder, __ATOMIC_RELAXED) != self) {
            PyMutex_Lock(&whole);
            __atomic_store_n(&holder, self, __ATOMIC_RELAXED);
        }
        depth++;
    }
    static void end(void) {
        if (--depth == 0) {
            __atomic_store_n(&holder, 0, __ATOMIC_RELAXED);
            PyMutex_Unlock(&whole);
        }
    }
    static void reset(void) { whole = (PyMutex){0}; holder = 0; depth = 0; }
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


MOST_COUNTED = 1 << 62  # batches, steps
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
    cdef double weight
    running_mean, running_var, tracked, momentum = [getattr(layer, name) for name in STATE]
    for name, array in zip(STATE, (running_mean, running_var)):
        check_array(name, array, shape)
        if array.dtype.num not in (cnp.NPY_FLOAT, cnp.NPY_DOUBLE):
            raise ValueError(f"{name}: expected float32 or float64, got {array.dtype}")
    try:
        tracked = operator.index(tracked) + 1
        weight = 1.0 / tracked if momentum is None else momentum * 1.0
        if not (1 <= tracked <= MOST_COUNTED and 0 <= weight <= 1):
            raise ValueError
    except Exception as error:  # what a user has put there may raise anything
        raise (ValueError if isinstance(error, (ArithmeticError, ValueError)) else TypeError)(
            f"num_batches_tracked, momentum: expected an integer of 0 or more, below 2⁶², and a number from 0 to 1 "
            f"or None, got {layer.num_batches_tracked!r} and {momentum!r}"
        ) from None
    return [running_mean, running_var, tracked, weight]


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


cdef tuple route(cnp.ndarray target, cnp.ndarray source):
    # what copy_items takes: all that can fail
    if cnp.PyArray_IS_C_CONTIGUOUS(target) and cnp.PyArray_IS_C_CONTIGUOUS(source):
        return target, source, None, None
    return target, source, cnp.PyArray_IterNew(target), cnp.PyArray_IterNew(source)


cdef void copy_items(cnp.ndarray target, cnp.ndarray source, cnp.flatiter to, cnp.flatiter come) noexcept:
    # Between arrays of one shape and dtype, without objects, wherever the elements lie. NumPy's copies release the GIL.
    cdef cnp.npy_intp _i
    cdef int size = cnp.PyArray_ITEMSIZE(target)
    if to is None:
        memcpy(cnp.PyArray_DATA(target), cnp.PyArray_DATA(source), cnp.PyArray_NBYTES(target))
        return
    for _i in range(cnp.PyArray_SIZE(target)):
        memcpy(cnp.PyArray_ITER_DATA(to), cnp.PyArray_ITER_DATA(come), size)
        cnp.PyArray_ITER_NEXT(to)
        cnp.PyArray_ITER_NEXT(come)


cdef object copy_of(object value):
    # of an array, in its own dtype, be it of a subclass; anything else is returned as it is
    if not isinstance(value, cnp.ndarray):
        return value
    if value.dtype.hasobject or value.ndim > 32:  # which is nobody's state, and too much for NumPy's iterators
        return value.copy()
    target = np.empty(value.shape, value.dtype)
    target, source, to, come = route(target, value)
    copy_items(target, source, to, come)
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
    converted, old = [], []
    if arrays:
        with np.errstate(all="ignore"):  # it takes longer than all the rest
            for name, (array, new) in arrays.items():
                check_array(name, array, np.shape(new))
                converted.append(route(array, np.array(new, array.dtype, order="C")))
    begin()
    try:
        for target, source, to, come in converted:
            copy_items(target, source, to, come)
        for name, attribute in attributes.items():
            old.append(getattr(owner, name, None))  # what its end sets off is not for in here
            setattr(owner, name, attribute)
    finally:
        end()


def after_fork():
    """Forget what another thread was doing in the parent."""
    reset()
