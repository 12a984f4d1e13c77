# cython: language_level=3, cdivision=True, initializedcheck=False, freethreading_compatible=True
"""Optimizer kernels: one parallel region for a whole list of arrays; compiled once per instruction set.

A :class:`Table` describes the list once, when the optimizer is made: where every parameter and its state lie,
and how the elements are cut into chunks. A step looks the gradients up in one loop and runs over the chunks.

Chunks never reach across arrays and depend on the shapes alone; sums over them are added in their order, so
the number of threads never changes a bit. In a parallel region nothing allocates, raises or takes the GIL.
"""

cimport numpy as cnp
from cpython.list cimport PyList_GET_ITEM
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from cython.parallel cimport prange
from libc.math cimport INFINITY, sqrt
from libc.stdint cimport uintptr_t
from libc.string cimport memcmp

import os
from threading import get_ident

cnp.import_array()

cdef extern from *:
    """
    /* *p = value where it was `from`, else nothing; returns 0 then, else what it is */
    static Py_ssize_t acquire(Py_ssize_t *p, Py_ssize_t from, Py_ssize_t value) {
        return __atomic_compare_exchange_n(p, &from, value, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE) ? 0 : from;
    }
    """
    Py_ssize_t acquire(Py_ssize_t* p, Py_ssize_t from_, Py_ssize_t value)

cdef int forks = 0  # between the first process and this one


def count_fork():
    global forks
    forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=count_fork)

cdef extern from "vectors.h" nogil:
    const int FASTBN_CHECKED
    void expect(bint within, const char* what)

cdef extern from "optim_span.h" nogil:
    enum: OPTIM_FLOAT32, OPTIM_FLOAT64, OPTIM_FLOAT16, OPTIM_BFLOAT16, OPTIM_SGD, OPTIM_RMSPROP, OPTIM_ADAM

    ctypedef struct optim_parameter:
        void* p
        const void* g
        void* state[3]
        float* master
        double scale
        Py_ssize_t size
        int dtype

    ctypedef struct optim_rule:
        double lr, low, high, decay, shrink, momentum, fresh, beta1, beta2, correction
        double eps_inside, eps_outside
        int nesterov

    void optim_update(const optim_parameter* a, Py_ssize_t start, Py_ssize_t n, int method,
                      const optim_rule* rule) noexcept nogil
    double optim_squares(const optim_parameter* a, Py_ssize_t start, Py_ssize_t n, double unit) noexcept nogil

cdef enum:
    CHUNK = 4096  # elements: enough tasks to share out a small network evenly; larger ones gain nothing

ELEMENTS_PER_CHUNK = CHUNK

cdef double TINY_UNIT = 2.0 ** -540  # brings a float64 whose square overflows below 2**484

DTYPES = {
    "float32": OPTIM_FLOAT32,
    "float64": OPTIM_FLOAT64,
    "float16": OPTIM_FLOAT16,
    "bfloat16": OPTIM_BFLOAT16,
}

cdef struct Chunk:
    Py_ssize_t parameter, start, n

cdef struct Range:
    uintptr_t low, high


cdef class Table:
    """The arrays of one optimizer, ready for its kernels.

    Parameters
    ----------
    params : list of ndarray
        Contiguous, aligned, writable, native and apart from each other: `optim.py` has checked them.
    state : list of list
        For every parameter its slots in the order of the method's span, None where it has no such slot, then
        its float32 master or None; each contiguous, with as many elements as the parameter.
    """

    cdef list params, state  # they keep the memory alive
    cdef Py_ssize_t count, chunks, tasks
    cdef optim_parameter* parameter  # (count,)
    cdef Range* owned                # (count,), memory of the parameters, sorted
    cdef Py_ssize_t occupied         # how many of them are not empty
    cdef const void** apart          # (count,), the gradient last found to lie apart from all parameters
    cdef Chunk* chunk                # (chunks,)
    cdef Py_ssize_t* task            # (tasks + 1,), first chunk of each task: small arrays share one
    cdef double* partial             # (chunks,), sums of squares
    cdef readonly Py_ssize_t size
    cdef public Py_ssize_t steps     # a kernel counts them in the call that changes the parameters
    cdef public double lr            # of the last step, or set since
    cdef Py_ssize_t busy             # the thread that is in a step, or 0
    cdef int forks                   # of this process when that began: a child has none of its parent's threads

    def __cinit__(self, list params, list state):
        self.params, self.state, self.count = params, state, len(params)
        self.chunks = sum([(p.size + CHUNK - 1) // CHUNK for p in params])
        self.parameter = <optim_parameter*> PyMem_Calloc(self.count, sizeof(optim_parameter))
        self.owned = <Range*> PyMem_Calloc(self.count, sizeof(Range))
        self.apart = <const void**> PyMem_Calloc(self.count, sizeof(void*))
        self.chunk = <Chunk*> PyMem_Calloc(self.chunks, sizeof(Chunk))
        self.task = <Py_ssize_t*> PyMem_Calloc(self.chunks + 1, sizeof(Py_ssize_t))
        self.partial = <double*> PyMem_Calloc(self.chunks, sizeof(double))
        if not (self.parameter and self.owned and self.apart and self.chunk and self.task and self.partial):
            raise MemoryError
        for i, (p, slots) in enumerate(zip(params, state)):
            self.describe(i, p, slots)
        for low, nbytes in sorted([(p.ctypes.data, p.nbytes) for p in params if p.size]):
            self.owned[self.occupied] = Range(low, low + nbytes)
            self.occupied += 1
        self.cut()

    def __dealloc__(self):
        PyMem_Free(self.parameter)
        PyMem_Free(self.owned)
        PyMem_Free(self.apart)
        PyMem_Free(self.chunk)
        PyMem_Free(self.task)
        PyMem_Free(self.partial)

    def __enter__(self):
        """Begin what one thread at a time may do: the pointers to the gradients are the table's."""
        cdef Py_ssize_t mine = get_ident()
        cdef Py_ssize_t other = acquire(&self.busy, 0, mine)
        if other and other != mine and self.forks != forks:
            other = acquire(&self.busy, other, mine)
        if other:
            where = "within it, from a signal's handler or a schedule" if other == mine else "in another thread"
            raise RuntimeError(f"optimizer: expected one call at a time, got another one {where}")
        self.forks = forks

    def __exit__(self, *exception):
        acquire(&self.busy, self.busy, 0)

    def mine(self):
        """Say whether the calling thread is in a step already: a signal's handler, or a schedule."""
        return self.busy == <Py_ssize_t> get_ident()

    cdef describe(self, Py_ssize_t i, cnp.ndarray p, list slots):
        cdef optim_parameter* a = &self.parameter[i]
        a.p = cnp.PyArray_DATA(p)
        a.size = cnp.PyArray_SIZE(p)
        a.dtype = DTYPES[p.dtype.name]
        a.scale = 1
        *states, master = slots
        for k, slot in enumerate(states):
            a.state[k] = NULL if slot is None else cnp.PyArray_DATA(<cnp.ndarray> slot)
        a.master = NULL if master is None else <float*> cnp.PyArray_DATA(<cnp.ndarray> master)

    cdef void cut(self) noexcept:
        """Cut every array into chunks, and gather chunks into tasks of no more than CHUNK elements."""
        cdef Py_ssize_t i, start, n, c = 0, filled = 0
        for i in range(self.count):
            for start in range(0, self.parameter[i].size, CHUNK):
                n = min(self.parameter[i].size - start, <Py_ssize_t> CHUNK)
                if c == 0 or filled + n > CHUNK:
                    self.task[self.tasks] = c
                    self.tasks += 1
                    filled = 0
                filled += n
                self.chunk[c] = Chunk(i, start, n)
                c += 1
            self.size += self.parameter[i].size
        self.task[self.tasks] = c

    def bind(self, list grads, Py_ssize_t first=0):
        """Take the gradients from number `first` on; return the number of one that will not do, or −1.

        A gradient will do if it is None, or an array of its parameter's shape and dtype, contiguous, aligned,
        native, and apart from all the parameters, while the parameter is still where it was, and writable.
        The list has one item per parameter, and must keep the gradients alive until the step is done.
        """
        cdef Py_ssize_t i
        cdef object item
        cdef cnp.ndarray g, p
        cdef const void* data
        cdef int ndim
        cdef int layout = cnp.NPY_ARRAY_C_CONTIGUOUS | cnp.NPY_ARRAY_ALIGNED
        for i in range(first, self.count):
            p = <cnp.ndarray> PyList_GET_ITEM(self.params, i)
            if not self.held(i, p) or not cnp.PyArray_ISWRITEABLE(p):
                return i
            item = <object> PyList_GET_ITEM(grads, i)
            if item is None:
                self.parameter[i].g = NULL
                continue
            if not cnp.PyArray_CheckExact(item):
                return i
            g = <cnp.ndarray> item
            data = cnp.PyArray_DATA(g)
            ndim = cnp.PyArray_NDIM(p)
            if cnp.PyArray_TYPE(g) != cnp.PyArray_TYPE(p) or cnp.PyArray_NDIM(g) != ndim \
                    or (ndim and memcmp(cnp.PyArray_DIMS(g), cnp.PyArray_DIMS(p), ndim * sizeof(cnp.npy_intp))) \
                    or not cnp.PyArray_CHKFLAGS(g, layout) or not cnp.PyArray_ISNOTSWAPPED(g):
                return i
            if data != self.apart[i]:
                if self.touches(<uintptr_t> data, cnp.PyArray_NBYTES(g)):
                    return i
                self.apart[i] = data
            self.parameter[i].g = data
        return -1

    def holds(self, Py_ssize_t i):
        """Say whether parameter i still has the memory it had at the start."""
        return self.held(i, self.params[i])

    cdef inline bint held(self, Py_ssize_t i, cnp.ndarray p) noexcept:
        return cnp.PyArray_DATA(p) == self.parameter[i].p and cnp.PyArray_SIZE(p) == self.parameter[i].size

    def near(self, uintptr_t low, uintptr_t high):
        """Say whether a parameter has memory between two addresses."""
        return self.touches(low, high - low)

    cdef bint touches(self, uintptr_t low, Py_ssize_t nbytes) noexcept:
        """Say whether a stretch of memory overlaps a parameter: bisect for the first that ends above it."""
        cdef Py_ssize_t left = 0, right = self.occupied, middle
        while left < right:
            middle = (left + right) // 2
            if self.owned[middle].high > low:
                right = middle
            else:
                left = middle + 1
        return nbytes > 0 and left < self.occupied and self.owned[left].low < low + nbytes


cdef void update(Table table, int method, const optim_rule* rule, double lr, int num_threads) noexcept:
    # The step and its count are one call: a KeyboardInterrupt comes before both or after both. lr: to be shown, if ≥ 0.
    cdef Py_ssize_t t
    cdef int threads = max(1, min(num_threads, table.tasks))
    with nogil:
        for t in prange(table.tasks, num_threads=threads, schedule="static"):
            update_task(table.parameter, table.chunk, table.task[t], table.task[t + 1], method, rule)
    table.steps += 1
    if lr >= 0:
        table.lr = lr


cdef void update_task(const optim_parameter* parameter, const Chunk* chunk, Py_ssize_t first, Py_ssize_t end,
                      int method, const optim_rule* rule) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(first, end):
        if FASTBN_CHECKED:
            expect(0 <= chunk[c].start and chunk[c].start + chunk[c].n <= parameter[chunk[c].parameter].size, "a chunk")
        optim_update(&parameter[chunk[c].parameter], chunk[c].start, chunk[c].n, method, rule)


cdef void sum_squares(Table table, double unit, int num_threads) noexcept:
    """partial[c] = Σ (unit·g)² over chunk c."""
    cdef Py_ssize_t t
    cdef int threads = max(1, min(num_threads, table.tasks))
    with nogil:
        for t in prange(table.tasks, num_threads=threads, schedule="static"):
            square_task(table.parameter, table.chunk, table.task[t], table.task[t + 1], unit, table.partial)


cdef void square_task(const optim_parameter* parameter, const Chunk* chunk, Py_ssize_t first, Py_ssize_t end,
                      double unit, double* partial) noexcept nogil:
    cdef Py_ssize_t c
    for c in range(first, end):
        partial[c] = optim_squares(&parameter[chunk[c].parameter], chunk[c].start, chunk[c].n, unit)


cdef bint rescale(Table table, double limit, double unit, bint whole) noexcept:
    """Set every gradient's factor from the partial sums; say whether one of these had overflowed.

    With unit ≠ 1, a second attempt, only what is still without a factor (scale 0) is set.
    """
    cdef Py_ssize_t c = 0, i
    cdef double total = 0
    cdef bint overflowed = False
    for i in range(table.count):
        if not whole:
            total = 0
        while c < table.chunks and table.chunk[c].parameter == i:
            total = total + table.partial[c]
            c += 1
        if not whole and (unit == 1 or table.parameter[i].scale == 0):
            table.parameter[i].scale = factor(limit * unit, total)
            overflowed |= total == INFINITY
    if whole:
        for i in range(table.count):
            table.parameter[i].scale = factor(limit * unit, total)
        overflowed = total == INFINITY
    return overflowed


cdef double factor(double limit, double squares) noexcept:
    """c/norm where norm > c, else 1; a norm of NaN is not above c."""
    cdef double norm = sqrt(squares)
    return limit / norm if norm > limit else 1.0


cdef inline (double, double) times(double a, double a_low, double b, double b_low) noexcept:
    # the product of two pairs high + low: Dekker 1971, with Veltkamp's splitting; no FMA, so the same everywhere
    cdef double p = a * b, t = 134217729.0 * a, u = 134217729.0 * b  # 2²⁷ + 1
    cdef double a1 = t - (t - a), b1 = u - (u - b)
    cdef double a2 = a - a1, b2 = b - b1
    cdef double error = ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2 + (a * b_low + a_low * b)
    cdef double high = p + error
    return high, error - (high - p)


def power(double base, Py_ssize_t exponent):
    """Return base**exponent of a base in [0, 1] and an exponent of 0 or more, the same on every CPU.

    The C library's pow is not: glibc's gives other last bits where there is FMA.
    """
    cdef double high = 1, low = 0, square = base, square_low = 0
    while exponent:
        if exponent & 1:
            high, low = times(high, low, square, square_low)
        square, square_low = times(square, square_low, square, square_low)
        exponent >>= 1
    return high


def clip_flat(Table table, double limit, bint whole, int num_threads):
    """Set every gradient's factor by one read of them: c/‖g‖ where ‖g‖ > c; `whole`: ‖·‖ over all arrays.

    Squares of float64 beyond 1e154 overflow; then, and for infinity, a second read scales them down.
    """
    sum_squares(table, 1, num_threads)
    if rescale(table, limit, 1, whole):
        sum_squares(table, TINY_UNIT, num_threads)
        rescale(table, limit, TINY_UNIT, whole)


def sgd_flat(Table table, double lr, double clip_value, double decay, double momentum, double fresh,
             bint nesterov, double scheduled, int num_threads):
    """One step of SGD; slots: momentum_buffer, or none without momentum."""
    cdef optim_rule rule = optim_rule(
        lr=lr, low=-clip_value, high=clip_value, decay=decay, shrink=0, momentum=momentum, fresh=fresh,
        beta1=0, beta2=0, correction=1, eps_inside=0, eps_outside=0, nesterov=nesterov)
    update(table, OPTIM_SGD, &rule, scheduled, num_threads)


def rmsprop_flat(Table table, double lr, double clip_value, double decay, double alpha, double momentum,
                 double eps_inside, double eps_outside, double scheduled, int num_threads):
    """One step of RMSprop; slots: square_avg, momentum_buffer with momentum, grad_avg where centered."""
    cdef optim_rule rule = optim_rule(
        lr=lr, low=-clip_value, high=clip_value, decay=decay, shrink=0, momentum=momentum, fresh=1,
        beta1=0, beta2=alpha, correction=1, eps_inside=eps_inside, eps_outside=eps_outside, nesterov=False)
    update(table, OPTIM_RMSPROP, &rule, scheduled, num_threads)


def adam_flat(Table table, double lr, double clip_value, double decay, double shrink, double beta1,
              double beta2, double correction, double eps_inside, double eps_outside, double scheduled,
              int num_threads):
    """One step of Adam, lr divided by 1−β₁ᵗ; slots: exp_avg, exp_avg_sq, max_exp_avg_sq for AMSGrad."""
    cdef optim_rule rule = optim_rule(
        lr=lr, low=-clip_value, high=clip_value, decay=decay, shrink=shrink, momentum=0, fresh=1,
        beta1=beta1, beta2=beta2, correction=correction, eps_inside=eps_inside, eps_outside=eps_outside,
        nesterov=False)
    update(table, OPTIM_ADAM, &rule, scheduled, num_threads)
