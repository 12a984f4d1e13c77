"""What else might come in place of a good argument: every function takes it and returns something odd.

Some are the same values lying oddly in memory, some are values that a call must refuse; which is which is for the
call to know. `ODD` names them all, so that a failure can be told, and repeated, by a name and a seed.
"""

import decimal
import fractions
import tempfile
from types import SimpleNamespace

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided
from strategies import Place


class ArrayLike:
    """Something whose ``__array__`` returns, or raises, what it was told."""

    def __init__(self, answer):
        self._answer = answer

    def __array__(self, dtype=None, copy=None):
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


class OnlyDLPack:
    """Something that NumPy can view through DLPack alone."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class Subclass(np.ndarray):
    """A subclass of arrays that will have nothing to do with arithmetic."""

    __array_ufunc__ = None


PLAIN = ("float16", "bfloat16", "float32", "float64", "int64")


def _array(rng, value):
    """Return a good argument as an array of numbers, or a small one where it is none."""
    if isinstance(value, np.ndarray) and value.ndim < 8 and value.dtype.name in PLAIN:
        return np.asarray(value) if isinstance(value, np.matrix) else value  # NumPy's matrix breaks with three axes
    return rng.normal(size=(4, 3)).astype(np.float32)


def _put(**place):
    return lambda rng, value: Place(**place).put(np.atleast_1d(_array(rng, value)))


def _cast(dtype):
    def cast(rng, value):
        with np.errstate(all="ignore"):
            return np.asarray(_array(rng, value).astype(np.float64)).astype(dtype)

    return cast


def _with(number):
    def spoilt(rng, value):
        a = _array(rng, value).copy()
        if a.size and a.dtype.kind != "i":
            a.flat[rng.integers(a.size)] = number
        return a

    return spoilt


def _reversed(rng, value):
    a = _array(rng, value)
    return a[(slice(None, None, -1),) * a.ndim]


def _repeated(rng, value):
    a = _array(rng, value)
    return np.broadcast_to(a[:1], a.shape) if a.ndim and len(a) else a


def _repeated_writable(rng, value):
    a = np.ascontiguousarray(_array(rng, value))
    return as_strided(a.copy(), a.shape, (0, *a.strides[1:]))


def _windows(rng, value):
    a = _array(rng, value)
    n = a.shape[-1] if a.ndim else 1
    return as_strided(np.zeros(a.size + 1, a.dtype), a.shape, [a.itemsize] * a.ndim) if n else a


def _huge_steps(rng, value):
    a = _array(rng, value)
    if not a.ndim or a.size == 0 or len(a) > 8:
        return a
    steps = min(1 << 18, (1 << 32) // max(1, a.nbytes))
    whole = np.zeros((len(a), steps, *a.shape[1:]), a.dtype)  # pages of zeros that nobody touches
    whole[:, 0] = a
    return whole[:, 0]


def _memmap(rng, value):
    a = _array(rng, value)
    with tempfile.TemporaryFile() as file:
        file.write(a.tobytes() + b"\0")
        file.flush()
        return np.memmap(file, a.dtype, "r+", shape=a.shape)


def _structured(rng, value):
    a = np.ascontiguousarray(_array(rng, value))
    return a.view([("value", a.dtype)]) if a.ndim else a


def _shape(change):
    return lambda rng, value: change(np.atleast_1d(_array(rng, value)))


ARRAYS = {
    "reversed": _reversed,
    "repeated": _repeated,
    "repeated, writable": _repeated_writable,
    "overlapping windows": _windows,
    "huge steps": _huge_steps,
    "Fortran order": lambda rng, value: np.asfortranarray(_array(rng, value)),
    "misaligned": _put(misaligned=True),
    "byte-swapped": _put(swapped=True),
    "read-only": _put(readonly=True),
    "steps of 2": _shape(lambda a: np.repeat(a, 2, axis=-1)[..., ::2]),
    "matrix": lambda rng, value: np.zeros((4, 3), np.float32).view(np.matrix),
    "masked": lambda rng, value: np.ma.masked_array(_array(rng, value), mask=False),
    "memmap": _memmap,
    "record": lambda rng, value: _structured(rng, value).view(np.recarray),
    "structured": _structured,
    "subclass": lambda rng, value: np.array(_array(rng, value)).view(Subclass),
    "list": lambda rng, value: _array(rng, value).astype(np.float64).tolist(),
    "list of arrays": lambda rng, value: list(_array(rng, value)) if _array(rng, value).ndim else [value],
    "__array__": lambda rng, value: ArrayLike(_array(rng, value)),
    "__dlpack__": lambda rng, value: OnlyDLPack(_array(rng, value)),
    "memoryview": lambda rng, value: memoryview(np.ascontiguousarray(_cast("f8")(rng, value))),
    "NaN": _with(np.nan),
    "infinity": _with(np.inf),
    "minus infinity": _with(-np.inf),
    "negative": _with(-3.0),
    "zeros": lambda rng, value: np.zeros_like(_array(rng, value)),
    "0-d": lambda rng, value: np.float32(2.5) * np.ones(()),
    "1-d": _shape(np.ravel),
    "no rows": _shape(lambda a: a[:0]),
    "empty at the end": _shape(lambda a: a[..., :0]),
    "one row": _shape(lambda a: a[:1]),
    "too short": _shape(lambda a: a[..., :-1]),
    "too long": _shape(lambda a: np.concatenate([a, a[..., :1]], axis=-1)),
    "one more axis": _shape(lambda a: a[None]),
    "one axis less": _shape(lambda a: a[0] if len(a) else a),
    "transposed": _shape(np.transpose),
    "a column": _shape(lambda a: a[..., None]),
    "8-d": _shape(lambda a: a.reshape((1,) * (8 - min(a.ndim, 8)) + a.shape)),
    "64-d": lambda rng, value: np.ones((1,) * 64, np.float32),
    **{
        f"as {dtype}": _cast(dtype)
        for dtype in ("f2", "f4", "f8", "g", "?", "i1", "u1", "i8", "u8", "c8", "c16", "O", "U8", "S8", ">f4", ">f8")
    },
    **{
        f"zeros of {dtype}": lambda rng, value, dtype=dtype: np.zeros(_array(rng, value).shape, dtype)
        for dtype in ("M8[s]", "m8[ns]", "V4", "f4,f4", "T")
    },
    **{
        f"as {name}": _cast(getattr(ml_dtypes, name))
        for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint4")
    },
}

NUMBERS = [
    0, 1, 2, 3, -1, -2, 7, -(2**63), 10**30, 10**400, True, False, np.True_, np.int8(1), np.uint64(2**64 - 1), 0.0,
    -0.0, 1.0, 0.5, 1e-5, 1e-300, 5e-324, 1e308, 1e400, -1e-5, float("nan"), -float("inf"), np.float16(1e-3),
    np.longdouble(1e-5), np.float32("nan"), 1j, 0j, np.complex64(1), "1", "", b"1", np.str_("1"), "relu", "ReLU",
    "gelu", "relu\0", "\ud800", None, ..., NotImplemented, int, object(), fractions.Fraction(1, 3),
    bytearray(b"1"), np.array(True), np.array("1"), decimal.Decimal("1e-5"),
    decimal.Decimal("sNaN"), np.datetime64("NaT", "s"), np.timedelta64(1, "s"), np.array(1e-5), np.array([1e-5]),
    np.array(1), np.array([1]), np.array([1, 2]), np.array(None), [], [1e-5], (), (1,), (1, 2), (0.9, 0.999),
    (0.9, 1.0), [[]], {}, {"a": 1}, set(), b"", range(3), SimpleNamespace(), "OI", "IO", "OIHW", "OO", "\u00e9\u4e2d",
    "same", "pooled", float, np.float32, np.dtype("f8"), "f4", Exception("x"), lambda *args: 1e-3,
    lambda *args: float("nan"), slice(1),
]  # fmt: skip

STRANGE = {
    "ragged": lambda rng, value: [[1.0, 2.0], [3.0]],
    "generator": lambda rng, value: (row for row in [1.0, 2.0]),
    "iterator of arrays": lambda rng, value: iter([_array(rng, value)]),
    "nested list": lambda rng, value: [[[[[[1.0]]]]]],
    "list of None": lambda rng, value: [None, None],
    "list of itself": lambda rng, value: (loop := [], loop.append(loop))[0],
    "__array__ raises RuntimeError": lambda rng, value: ArrayLike(RuntimeError("no")),
    "__array__ raises MemoryError": lambda rng, value: ArrayLike(MemoryError("no")),
    "__array__ raises AttributeError": lambda rng, value: ArrayLike(AttributeError("no")),
    "__array__ returns a list": lambda rng, value: ArrayLike([1.0, 2.0]),
    "__array__ returns None": lambda rng, value: ArrayLike(None),
    "__array__ returns complex": lambda rng, value: ArrayLike(np.ones((4, 3), complex)),
    "__array__ is None": lambda rng, value: SimpleNamespace(__array__=None),
    "__dlpack__ is None": lambda rng, value: SimpleNamespace(__dlpack__=None, __dlpack_device__=None),
    "__dlpack__ lies": lambda rng, value: SimpleNamespace(__dlpack__=lambda **k: 3, __dlpack_device__=lambda: (1, 0)),
    "__array_interface__ lies": lambda rng, value: SimpleNamespace(__array_interface__={"shape": "no", "version": 3}),
    "infinite": lambda rng, value: ArrayLike(np.full((4, 3), np.inf)),
}

ODD = {
    **ARRAYS,
    **STRANGE,
    **{f"NUMBERS[{i}]": lambda rng, value, number=number: number for i, number in enumerate(NUMBERS)},
}
ALIASES = {
    "the same array as another": lambda other: other,
    "the memory of another": lambda other: other[...],
    "another, reversed": lambda other: other[(slice(None, None, -1),) * other.ndim],
    "another, transposed": lambda other: other.T,
}


def odd(kind, rng, value, others=()):
    """Return an odd value in place of `value`; of a list, a dict or a tuple of arrays, mostly of one of its items.

    `others` are the arrays of the same call, for the kinds that share memory with one of them.
    """
    if isinstance(value, (dict, list, tuple)) and len(value) and rng.random() < 0.8:
        items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
        key = list(items)[rng.integers(len(items))]
        items[key] = odd(kind, rng, items[key], others)
        if isinstance(value, dict):
            return items
        return type(value)(*items.values()) if hasattr(value, "_fields") else type(value)(items.values())
    if kind in ALIASES:
        return ALIASES[kind](others[rng.integers(len(others))]) if others else None
    return ODD[kind](rng, value)
