"""Find the smallest canonical problem in arrays of any axis and strides.

The kernels know two layouts: ``ncs``, a 3-D view (batch, channel, contiguous run), and ``rc``, a 2-D view (rows,
contiguous channels). Unit axes are dropped, the others sorted by stride and merged, for all arrays of a call at once,
since an element must meet the same element of the others. The order of the values of a channel does not matter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

LINE = 64  # bytes of a cache line, which streaming stores are aligned to
_ALIGN_FROM = 1 << 16  # bytes; smaller arrays are never streamed


def plan(axis: int, *arrays: np.ndarray | None) -> tuple[np.ndarray | None, ...] | None:
    """Return canonical views of the arrays, all in the same layout, or None where no such views exist.

    The arrays have one shape, which is not empty; a missing array stays None.
    """
    for array in arrays:
        if array is not None and not array.flags.c_contiguous:
            return _plan_strided(axis, arrays)
    shape = arrays[0].shape  # type: ignore[union-attr]
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

    itemsize = first.itemsize
    unit = (itemsize,) * len(present)
    channel = tuple(array.strides[axis] for array in present)
    one = (1, unit)
    if len(groups) <= 1 and c > 1 and channel == unit:
        rows = groups[0] if groups else one
        views = [as_strided(a, (rows[0], c), (rows[1][k], itemsize)) for k, a in enumerate(present)]
    elif not groups or (len(groups) <= 2 and groups[-1][1] == unit):
        run = groups[-1] if groups else one
        batch = groups[0] if len(groups) == 2 else one
        views = [
            as_strided(a, (batch[0], c, run[0]), (batch[1][k], channel[k], itemsize)) for k, a in enumerate(present)
        ]
    else:
        return None
    remaining = iter(views)
    return tuple(None if array is None else next(remaining) for array in arrays)


def _runs_back(arrays: list[np.ndarray], i: int) -> bool:
    """Say whether axis i runs backwards in memory; where it is repeated (stride 0) in one array, the next one tells."""
    return next((array.strides[i] < 0 for array in arrays if array.strides[i]), False)


def arrange(
    axis: int, inputs: tuple[np.ndarray | None, ...], out: np.ndarray
) -> tuple[tuple[Any, ...], np.ndarray, np.ndarray | None]:
    """Return (canonical inputs, canonical output, what is to be copied into `out` afterwards or None).

    Arrays are copied only where no canonical views exist.
    """
    views = plan(axis, *inputs, out) if out.flags.aligned else None
    if views is not None:
        return views[:-1], views[-1], None  # type: ignore[return-value]
    copies = tuple(None if array is None else np.ascontiguousarray(array) for array in inputs)
    result = aligned_empty(out.shape, out.dtype)
    *canonical, view = plan(axis, *copies, result)  # type: ignore[misc]
    return tuple(canonical), view, result  # type: ignore[return-value]


def view(axis: int, x: np.ndarray) -> np.ndarray:
    """Return one canonical input; a copy only where no canonical view exists."""
    views = plan(axis, x) or plan(axis, np.ascontiguousarray(x))
    return views[0]  # type: ignore[index,return-value]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a new C-contiguous array, aligned to a cache line if it is large."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _ALIGN_FROM:
        return np.empty(shape, dtype)
    memory = np.empty(nbytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def empty_like(x: np.ndarray) -> np.ndarray:
    """Return a new array of x's shape and dtype with its axes in x's order in memory (channels-last stays so)."""
    if x.flags.c_contiguous:
        return aligned_empty(x.shape, x.dtype)
    order = sorted(range(x.ndim), key=lambda i: -abs(x.strides[i]))
    base = aligned_empty(tuple(x.shape[i] for i in order), x.dtype)
    return base.transpose(tuple(np.argsort(order)))
