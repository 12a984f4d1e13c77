# cython: language_level=3, annotation_typing=False, freethreading_compatible=True
# cython: boundscheck=True, wraparound=True
"""Find the smallest canonical problem in arrays of any axis and strides.

The kernels know two layouts: ``ncs``, a 3-D view (batch, channel, contiguous run), and ``rc``, a 2-D view (rows,
contiguous channels). Unit axes are dropped, the others sorted by stride and merged, for all arrays of a call at once,
since an element must meet the same element of the others. The order of the values of a channel does not matter.
Compiled, as check is.
"""

import math

import numpy as np
from numpy.lib.stride_tricks import as_strided

from . import buffers

cimport numpy as cnp

cnp.import_array()

LINE = 64  # bytes of a cache line, which streaming stores are aligned to
_ALIGN_FROM = 1 << 16  # bytes; smaller arrays are never streamed
SHORT_RUN = 256  # runs up to this length are summed as columns of layout rc


cdef bint all_c_contiguous(tuple arrays):
    for array in arrays:
        if array is not None and not cnp.PyArray_IS_C_CONTIGUOUS(<cnp.ndarray> array):
            return False
    return True


def plan(int axis, *arrays: np.ndarray | None) -> tuple[np.ndarray | None, ...] | None:
    """Return canonical views of the arrays, all in the same layout, or None where no such views exist.

    The arrays have one shape, which is not empty; a missing array stays None.
    """
    if not all_c_contiguous(arrays):
        return _plan_strided(axis, arrays)
    shape = arrays[0].shape
    if len(shape) == 2 and axis == 1 and shape[1] > 1:
        return arrays
    n, c, s = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    canonical = (1, 1, n * s) if c == 1 else (n, c) if s == 1 else (n, c, s)
    return tuple(None if array is None else array.reshape(canonical) for array in arrays)


def _plan_strided(axis: int, arrays: tuple[np.ndarray | None, ...]) -> tuple[np.ndarray | None, ...] | None:
    first = arrays[0]
    assert first is not None
    shape, c = first.shape, first.shape[axis]
    axes = [i for i in range(first.ndim) if i != axis and shape[i] > 1]
    present = [array for array in arrays if array is not None]
    backward = tuple(slice(None, None, -1 if i != axis and _runs_back(present, i) else None) for i in range(first.ndim))
    present = [array[backward] for array in present]
    # the outermost first; a repeated axis (stride 0) is outer to all, for only there can a view have it
    axes.sort(key=lambda i: tuple(a.strides[i] or math.inf for a in present), reverse=True)

    groups: list[tuple[int, tuple[int, ...]]] = []  # (length, strides of each array), the outermost first
    for i in axes:
        strides = tuple(array.strides[i] for array in present)
        if groups and all(outer == inner * shape[i] for outer, inner in zip(groups[-1][1], strides, strict=True)):
            groups[-1] = (groups[-1][0] * shape[i], strides)
        else:
            groups.append((shape[i], strides))

    unit = tuple(array.itemsize for array in present)
    channel = tuple(array.strides[axis] for array in present)
    one = (1, unit)
    if len(groups) <= 1 and c > 1 and channel == unit:
        rows = groups[0] if groups else one
        views = [as_strided(a, (rows[0], c), (rows[1][k], unit[k])) for k, a in enumerate(present)]
    elif not groups or (len(groups) <= 2 and groups[-1][1] == unit):
        run = groups[-1] if groups else one
        batch = groups[0] if len(groups) == 2 else one
        views = [
            as_strided(a, (batch[0], c, run[0]), (batch[1][k], channel[k], unit[k])) for k, a in enumerate(present)
        ]
    else:
        return None
    remaining = iter(views)
    return tuple(None if array is None else next(remaining) for array in arrays)


def _runs_back(arrays: list[np.ndarray], i: int) -> bool:
    """Say whether axis i runs backwards in memory; where it is repeated (stride 0) in one array, the next one tells."""
    return next((array.strides[i] < 0 for array in arrays if array.strides[i]), False)


def arrange(int axis, tuple inputs, out: np.ndarray, bits: Bits | None = None):
    """Return (canonical inputs, canonical output, what is to be copied into `out` afterwards or None, bits or None).

    Arrays are copied only where no canonical views exist. Bits take the output's order; they come back as the kernels
    take them, (memory, canonical view).
    """
    marks = None if bits is None else bits.order(axis, out)
    views = plan(axis, *inputs, out, marks) if cnp.PyArray_ISALIGNED(<cnp.ndarray> out) else None
    result = None
    if views is None:
        copies = [None if array is None else np.ascontiguousarray(array) for array in inputs]
        result = aligned_empty(out.shape, out.dtype)
        marks = None if bits is None else bits.order(axis, result)
        views = plan(axis, *copies, result, marks)
    return views[:-2], views[-2], result, None if bits is None else (bits.memory, views[-1])


class Bits:
    """A bit per element of an array, in its order; rows, and runs that a thread may own, begin bytes."""

    __slots__ = ("memory", "shape", "strides")

    def order(self, int axis, y: np.ndarray) -> np.ndarray:
        """Take the order of y, an array with this channel axis, and new memory; return :meth:`view`."""
        self.shape, (self.strides, nbytes) = y.shape, bits_order(axis, y.shape, y.strides)
        self.memory = np.zeros(nbytes, np.uint8)  # what no element owns is 0 too: equal results have equal memory
        return self.view()

    @classmethod
    def of(cls, int axis, shape: tuple[int, ...], strides: tuple[int, ...], memory: np.ndarray) -> Bits:
        """Return the bits that `memory` holds of an array of this shape and these strides."""
        bits = cls()
        bits.memory, bits.shape, bits.strides = memory, shape, bits_order(axis, shape, strides)[0]
        return bits

    def view(self) -> np.ndarray:
        """Return an array whose strides count bits: NumPy can slice and transpose it, but may never read it."""
        forward = as_strided(self.memory, self.shape, [abs(stride) for stride in self.strides])
        return forward[tuple([slice(None, None, -1 if stride < 0 else None) for stride in self.strides])]

    def read(self) -> np.ndarray:
        """Return booleans of the array's shape."""
        at = np.full(self.shape, self.view().ctypes.data - self.memory.ctypes.data)
        for i, stride in enumerate(self.strides):
            at += (stride * np.arange(self.shape[i])).reshape([-1 if j == i else 1 for j in range(len(self.shape))])
        return (self.memory[at // 8] >> (at % 8).astype(np.uint8) & 1).astype(bool)


def bits_order(axis, shape, strides):
    """Return (strides in bits, bytes of memory) of the bits of an array with these strides; only their order counts."""
    result, step = [0] * len(shape), 1
    for i in sorted(range(len(shape)), key=lambda i: abs(strides[i])):
        channels = i == axis and shape[i] > 1
        if channels and step > SHORT_RUN:
            step = _whole_bytes(step)
        result[i] = step if strides[i] >= 0 else -step
        step *= shape[i]
        if channels:
            step = _whole_bytes(step)
    return tuple(result), -(-step // 8)


def _whole_bytes(bits):
    return -(-bits // 16) * 16  # two bytes, which the kernels write at once


def view(axis: int, x: np.ndarray) -> np.ndarray:
    """Return one canonical input; a copy only where no canonical view exists."""
    views = plan(axis, x) or plan(axis, np.ascontiguousarray(x))
    return views[0]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a new C-contiguous array, aligned to a cache line if it is large."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _ALIGN_FROM:
        return np.empty(shape, dtype)
    memory = np.empty(nbytes + LINE, np.uint8) if nbytes < buffers.FROM else buffers.take(nbytes + LINE)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def empty_like(cnp.ndarray x) -> np.ndarray:
    """Return a new array of x's shape and dtype with its axes in x's order in memory (channels-last stays so)."""
    if cnp.PyArray_IS_C_CONTIGUOUS(x):
        if cnp.PyArray_NBYTES(x) < _ALIGN_FROM and cnp.PyArray_TYPE(x) <= cnp.NPY_DOUBLE:
            return cnp.PyArray_EMPTY(cnp.PyArray_NDIM(x), cnp.PyArray_DIMS(x), cnp.PyArray_TYPE(x), 0)
        return aligned_empty((<object> x).shape, (<object> x).dtype)
    return _empty_in_order(x)


def _empty_in_order(x: np.ndarray) -> np.ndarray:
    order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    base = aligned_empty(tuple(x.shape[i] for i in order), x.dtype)
    return base.transpose(tuple(np.argsort(order)))
