# cython: language_level=3, annotation_typing=False, initializedcheck=False, freethreading_compatible=True
"""The only place that raises on arrays. Every error names the argument, what was expected and what came.

Compiled, since a call on a small array spends most of its time here.
"""

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

cimport numpy as cnp
from libc.string cimport memcpy

cnp.import_array()

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
_LEAST, _MOST = -(2**63), 2**63 - 1  # integers
_KERNELS = ("float16", "bfloat16", "float32", "float64")  # dtypes that have kernels
_EXPECTED = "an array of float16, bfloat16, float32, float64 or integers"


cdef bint is_plain(cnp.ndarray a) noexcept:
    # aligned float32 or float64 in native byte order: asked first, for a dtype's name is slow to read
    cdef int number = cnp.PyArray_TYPE(a)
    return (number == cnp.NPY_FLOAT or number == cnp.NPY_DOUBLE) and cnp.PyArray_ISBEHAVED_RO(a)


def is_half(dtype: np.dtype) -> bool:
    """Say whether this is float16 or ml_dtypes' bfloat16 (known by name: ml_dtypes need not be installed)."""
    return dtype.itemsize == 2 and dtype.name in _KERNELS


def real(dtype: np.dtype) -> np.dtype:
    """Return the dtype of parameters and statistics beside data of `dtype`: float32 at the least."""
    return FLOAT64 if dtype.newbyteorder("=") == FLOAT64 else FLOAT32


def view(name: str, value: Any) -> np.ndarray:
    """Return `value` as an ndarray that shares its memory where it can: ``__array__``, ``__dlpack__``, list."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected {_EXPECTED}, got a masked array, whose mask would be ignored")
    try:
        if hasattr(value, "__dlpack__") and not hasattr(value, "__array__"):
            return np.from_dlpack(value)
        return np.asarray(value)
    except Exception as error:
        raise TypeError(f"{name}: expected {_EXPECTED}, got {type(value).__name__} ({error})") from error


def array(name: str, value: Any) -> np.ndarray:
    """Return data the kernels read: a supported dtype in native byte order, aligned; integers become float64."""
    x = value if type(value) is np.ndarray else view(name, value)
    if is_plain(x):
        return x
    dtype = x.dtype
    if dtype.kind in "iub":
        return x.astype(np.float64)
    if dtype.name not in _KERNELS:
        raise TypeError(f"{name}: expected {_EXPECTED}, got dtype {dtype}")
    if not dtype.isnative:
        return x.astype(dtype.newbyteorder("="))
    return x if x.flags.aligned else x.copy(order="K")


cdef object index(object value):
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    try:
        return operator.index(value)
    except Exception as error:  # a user's __index__ may raise anything
        raise TypeError from error


def axis(value: Any, ndim: int) -> int:
    """Return the channel axis counted from the front; the array has 2 or more dimensions."""
    if ndim < 2:
        raise ValueError(f"x: expected 2 or more dimensions, got {ndim}")
    try:
        number = index(value)
    except TypeError:
        raise TypeError(f"axis: expected an integer, got {value!r}") from None
    if not -ndim <= number < ndim:
        raise ValueError(f"axis: expected -{ndim} to {ndim - 1} for an array of {ndim} dimensions, got {number}")
    return number % ndim


def channels(name: str, value: Any, Py_ssize_t c) -> np.ndarray | None:
    """Return a vector of one real number per channel as contiguous float64; None stays None."""
    cdef cnp.ndarray v
    if value is None:
        return None
    v = value if type(value) is np.ndarray else view(name, value)
    if not is_plain(v) and v.dtype.kind not in "fiub" and v.dtype.name != "bfloat16":
        raise TypeError(f"{name}: expected real numbers, got dtype {v.dtype}")
    if cnp.PyArray_NDIM(v) != 1 or cnp.PyArray_DIM(v, 0) != c:
        raise ValueError(f"{name}: expected shape ({c},), got {value_shape(v)}")
    return float64_copy(v)  # gamma may change before the backward pass


cdef object value_shape(cnp.ndarray v):
    return (<object> v).shape


cdef cnp.ndarray float64_copy(cnp.ndarray v):
    # v.astype(np.float64, order="C") in a third of the time
    cdef cnp.npy_intp n = cnp.PyArray_DIM(v, 0)
    cdef Py_ssize_t i
    cdef cnp.ndarray copy
    cdef double* target
    cdef const float* source
    if not is_plain(v) or not cnp.PyArray_IS_C_CONTIGUOUS(v):
        return (<object> v).astype(np.float64, order="C")
    copy = cnp.PyArray_EMPTY(1, &n, cnp.NPY_DOUBLE, 0)
    target = <double*> cnp.PyArray_DATA(copy)
    if cnp.PyArray_TYPE(v) == cnp.NPY_DOUBLE:
        memcpy(target, cnp.PyArray_DATA(v), n * sizeof(double))
    else:
        source = <const float*> cnp.PyArray_DATA(v)
        for i in range(n):
            target[i] = source[i]
    return copy


def given_channels(name: str, value: Any, c: int) -> np.ndarray:
    """Return :func:`channels` of a vector that may not be missing."""
    v = channels(name, value, c)
    if v is None:
        raise TypeError(f"{name}: expected shape ({c},), got None")
    return v


def like(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an input that has to match another: same shape, same dtype."""
    v = array(name, value)
    if v.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {v.shape}")
    if v.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype}, got {v.dtype}")
    return v


def _overlaps_itself(a: np.ndarray) -> bool:
    """Say whether two elements of an array may share memory (exactly so for every array a slice or transpose makes)."""
    reach = 0
    for stride, length in sorted((abs(s), n) for s, n in zip(a.strides, a.shape, strict=True) if n > 1):
        if stride < reach + a.itemsize:
            return True
        reach += stride * (length - 1)
    return False


def same_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Say whether two arrays of one shape are the very same elements in the same order."""
    if a is b:
        return True
    steps = ([stride for stride, n in zip(v.strides, v.shape, strict=True) if n > 1] for v in (a, b))
    return a.dtype == b.dtype and a.ctypes.data == b.ctypes.data and next(steps) == next(steps)


def shares_memory(a: np.ndarray, b: np.ndarray) -> bool:
    """Say whether two arrays share an element; where that is too hard to find out, assume so."""
    try:
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=100_000)
    except np.exceptions.TooHardError:
        return True


def output(
    out: Any, shape: tuple[int, ...], dtype: np.dtype, may_be: tuple[str, Any], **apart: Any
) -> np.ndarray:
    """Return `out` if results can be written there: it may be exactly one input, and may not touch the others."""
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}")
    if out.shape != shape:
        raise ValueError(f"out: expected shape {shape}, got {out.shape}")
    if out.dtype != dtype or not out.dtype.isnative:
        raise ValueError(f"out: expected dtype {dtype}, got {out.dtype}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writable array, got a read-only one")
    if not out.flags.c_contiguous and _overlaps_itself(out):
        raise ValueError(f"out: expected elements that share no memory, got strides {out.strides} for shape {shape}")
    name, same = may_be
    if (
        out is not same
        and isinstance(same, np.ndarray)
        and shares_memory(out, same)
        and not (same.shape == shape and same_memory(out, same))
    ):
        raise ValueError(f"out: expected {name} itself or memory apart from it, got one that overlaps {name} in part")
    for name, other in apart.items():
        if isinstance(other, np.ndarray) and shares_memory(out, other):
            raise ValueError(f"out: expected memory apart from {name}, got an array that overlaps {name}")
    return out


_NO_NUMBERS = (bool, np.bool_, str, bytes, bytearray, complex, np.complexfloating)  # that float() takes, or warns of


def number(
    name: str, value: Any, expected: str, low: float, high: float = math.inf, *, open_low: bool = False
) -> float:
    """Return a finite real number in [low, high], or (low, high]."""
    if type(value) is float and low < value < high:
        return value
    try:
        scalar = value[()] if isinstance(value, np.ndarray) else value
        if isinstance(scalar, _NO_NUMBERS) or getattr(scalar, "ndim", 0):
            raise TypeError
        x = float(scalar)
    except OverflowError:
        raise ValueError(f"{name}: expected {expected}, got an integer beyond float64") from None
    except Exception:  # a user's __float__ may raise anything
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if not (low < x if open_low else low <= x) or not x <= high or math.isinf(x):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return x


def count(name: str, value: Any, low: int | None = 1) -> int:
    """Return an integer of 64 bits, of `low` or more unless that is None."""
    expected = "an integer" if low is None else f"an integer of {low} or more"
    try:
        x = index(value)
    except TypeError:
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if not _LEAST <= x <= _MOST:
        raise ValueError(f"{name}: expected an integer of 64 bits, got one of {x.bit_length()}")
    if low is not None and x < low:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return x


def iterator(name: str, value: Any, expected: str) -> Iterator[Any]:
    """Return an iterator over the arrays in `value` (an array of 0 dimensions is Iterable by its type, and is not)."""
    if isinstance(value, np.ndarray) and 0 < value.ndim < 3:  # its rows are no batches: they have one axis at most
        raise TypeError(f"{name}: expected {expected}, got one array of shape {value.shape}; write [array]")
    try:
        return iter(value)
    except Exception:  # a memoryview of two dimensions raises NotImplementedError
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}") from None


def flag(name: str, value: Any) -> bool:
    """Return True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def parameter_dtype(name: str, value: Any) -> np.dtype:
    """Return the dtype of parameters for data of a dtype: float32 at the least."""
    if isinstance(value, str) and value == "bfloat16":  # NumPy knows it where ml_dtypes is imported
        return FLOAT32
    try:
        dtype = np.dtype(value)
        if value is None or dtype.name not in _KERNELS:  # NumPy takes None for float64
            raise TypeError
    except Exception:  # UnicodeEncodeError, of text that is none
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value!r}") from None
    return real(dtype)


def training_eps(value: Any) -> float:
    """Return eps of a call that divides by batch statistics."""
    return number("eps", value, "a finite number above 0", 0.0, open_low=True)


def inference_eps(value: Any) -> float:
    """Return eps of a call with given statistics."""
    return number("eps", value, "a finite number of 0 or more", 0.0)


def choice(name: str, value: Any, names: Sequence[Any]) -> Any:
    """Return `value` if it is one of `names`."""
    if isinstance(value, (str, type(None))) and value in names:
        return value
    raise ValueError(f"{name}: expected one of {', '.join(map(repr, names))}, got {value!r}")


def activation(value: Any) -> bool:
    """Say whether a call ends with ReLU."""
    return value is not None and choice("activation", value, (None, "relu")) == "relu"


def positive_variance(cnp.ndarray var, double eps) -> None:
    """Raise for a channel with var + eps <= 0 (float64). NaN passes: it stays in its channel."""
    cdef const double* v = <const double*> cnp.PyArray_DATA(var)
    cdef Py_ssize_t ch
    for ch in range(cnp.PyArray_DIM(var, 0)):
        if v[ch] + eps <= 0:
            raise ValueError(f"var: expected var + eps > 0, got {v[ch]} + {eps} in channel {ch}")


def enough_values(count: int, shape: tuple[int, ...]) -> None:
    """Refuse training statistics of a single value."""
    if count < 2:
        raise ValueError(f"x: expected 2 or more values per channel in training, got {count} (shape {shape})")
