"""The functions: the oracle on any array, the laws of the method, gradients, moments, and every refusal."""

import copy
import itertools
import math
import pickle
import sys
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import assume, given
from hypothesis import strategies as st
from interpreter import run_python
from reference import U32, U64, assert_within, bits, expand, over_channels
from strategies import (
    BFLOAT16,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Place,
    Problem,
    places,
    problems,
    shapes,
)

from fastbn import Gradients, Moments, batch_norm_backward, batch_norm_infer, batch_norm_train
from fastbn.norm import backward_sums, input_gradient


@contextmanager
def unchanged(*arrays):
    """Hold arrays, and the memory around them, to their bytes."""
    arrays = [a for array in arrays if array is not None for a in (array, array.base) if isinstance(a, np.ndarray)]
    before = [bits(a) for a in arrays]
    yield
    assert [bits(a) for a in arrays] == before


def inputs(p):
    """All arrays of a Problem."""
    return p.x, p.gamma, p.beta, p.residual, p.dy


# ---- the oracle itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [np.longdouble, np.float64], ids=["longdouble", "where longdouble is float64"])
@pytest.mark.parametrize("offset", [0, 10**6])
def test_the_oracle_is_the_method_in_rational_arithmetic(offset, wide, monkeypatch):
    monkeypatch.setattr(reference, "WIDE", wide)
    x = (np.random.default_rng(0).normal(size=(40, 2)) + offset).astype(np.float32)
    dy = np.random.default_rng(1).normal(size=(40, 2)).astype(np.float32)
    forward, backward = reference.train(x, eps=0.25), reference.backward(dy, x, eps=0.25)
    for ch in range(2):
        values, gradients = ([Fraction(float(v)) for v in a[:, ch]] for a in (x, dy))
        m = len(values)
        mean = sum(values) / m
        var = sum((v - mean) ** 2 for v in values) / m
        scale = Fraction(math.isqrt(int((var + Fraction(1, 4)) * 10**60)), 10**30)  # √(σ² + ε) to 30 digits
        xhat = [(v - mean) / scale for v in values]
        dbeta, dgamma = sum(gradients), sum(g * h for g, h in zip(gradients, xhat, strict=True))
        dx = [(g - dbeta / m - h * dgamma / m) / scale for g, h in zip(gradients, xhat, strict=True)]
        # Far below the bounds it is for; only x - μ feels where the mean is rounded
        tolerance = 8 * U64 * max(1, offset if wide is np.float64 else 1)
        assert abs(forward.mean[ch] - float(mean)) <= 2 * U64 * np.abs(x[:, ch]).max()
        assert abs(forward.var[ch] - float(var)) <= 8 * U64 * float(var)
        for ours, theirs in ((forward.y, xhat), (backward.dx, dx)):
            assert np.abs(ours[:, ch] - np.array([float(v) for v in theirs])).max() <= tolerance
        assert abs(backward.dgamma[ch] - float(dgamma)) <= 40 * tolerance
        assert abs(backward.dbeta[ch] - float(dbeta)) <= 40 * U64


def test_a_half_unit_is_half_the_distance_between_neighbours():
    for dtype in (FLOAT16, BFLOAT16):
        values = np.arange(0x7C00 if dtype == FLOAT16 else 0x7F80, dtype=np.uint16).view(dtype).astype(np.float64)
        assert np.array_equal(reference.half_unit(values[:-1], dtype), np.diff(values) / 2)
    assert not reference.half_unit(np.ones(3), FLOAT32).any()


# ---- the functions and the oracle ---------------------------------------------------------------------------------


def order_of_axes(a):
    """The axes from the outermost in memory to the innermost; unit axes and equal strides have no order."""
    strides = [abs(stride) for stride, length in zip(a.strides, a.shape, strict=True) if length > 1]
    return np.argsort(strides).tolist() if len(set(strides)) == len(strides) else None


def check_against_the_oracle(p, out=None, dx_out=None):
    dtype = p.dtype
    with unchanged(*inputs(p)):
        y, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options, out=out, num_threads=p.num_threads)
    expected = reference.train(p.x, p.gamma, p.beta, **p.options)
    assert y.dtype == dtype
    assert_within(y, expected.y, reference.y_bound(expected, p.gamma, p.beta, dtype, p.axis, residual=p.residual), "y")

    passes = True if p.activation is None else ~(y <= 0)
    with unchanged(*inputs(p)):
        gradients = batch_norm_backward(p.dy, saved, out=dx_out, num_threads=p.num_threads)
    theirs = reference.backward(p.dy, p.x, p.gamma, axis=p.axis, eps=p.eps, passes=passes)
    bound = reference.backward_bound(theirs, expected, p.gamma, dtype, p.axis, gradients.dgamma.dtype)
    for key in ("dx", "dgamma", "dbeta"):
        assert_within(getattr(gradients, key), getattr(theirs, key), getattr(bound, key), key)
    if p.residual is None:
        assert gradients.dresidual is None
    else:
        assert np.array_equal(gradients.dresidual, np.where(passes, p.dy, 0))
        assert gradients.dresidual.dtype == dtype
    return y, gradients


def assert_lies_as(result, p):
    """The axes of a result come in the order of x's. (Not yet where x is misaligned: see below.)"""
    order = order_of_axes(p.x)
    if order is not None and p.x.flags.aligned:
        assert order_of_axes(result) == order


@given(problems())
def test_training_and_backward_are_the_method_from_any_place_in_memory(p):
    y, gradients = check_against_the_oracle(p)
    for result in (y, gradients.dx):
        assert result.flags.writeable
        assert not np.shares_memory(result, p.x)
        assert_lies_as(result, p)


@given(problems(), st.data())
def test_out_may_lie_anywhere(p, data):
    outs = [data.draw(places(p.x.ndim, output=True)).put(np.zeros(p.x.shape, p.dtype)) for _ in range(2)]
    y, gradients = check_against_the_oracle(p, *outs)
    assert y is outs[0]
    assert gradients.dx is outs[1]
    for out in outs:  # what lies between the elements was 0xFF and still is
        out.view(np.uint8 if out.dtype.itemsize == 1 else f"u{out.dtype.itemsize}")[...] = -1 % 256**out.dtype.itemsize
        assert out.base is None or (out.base == 0xFF).all()


@given(problems())
def test_inference_is_the_method_with_given_statistics(p):
    rng = np.random.default_rng(2)
    values = np.array(p.x, np.float64)
    mean = over_channels(np.mean, values, p.axis)
    var = (over_channels(np.var, values, p.axis) + 1) * rng.uniform(0.1, 10, p.channels)
    with unchanged(*inputs(p), mean, var):
        y = batch_norm_infer(p.x, mean, var, p.gamma, p.beta, **p.options, num_threads=p.num_threads)
    expected = reference.infer(p.x, mean, var, p.gamma, p.beta, **p.options)
    assert_within(
        y, expected.y, reference.y_bound(expected, p.gamma, p.beta, p.dtype, p.axis, residual=p.residual), "y"
    )
    assert_lies_as(y, p)


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 6), (2, 3, 4, 5, 6), (2, 3, 2, 3, 2, 3)], ids=str)
@pytest.mark.parametrize("order", ["C", "F", "channels last"])
def test_results_lie_in_memory_as_x_does(shape, order):
    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    x = last if order == "channels last" else np.array(x, order=order)
    y, saved = batch_norm_train(x)
    dx = batch_norm_backward(np.ascontiguousarray(x), saved).dx
    assert y.strides == dx.strides == batch_norm_infer(x, saved.mean, saved.var).strides == x.strides
    expected = reference.train(x)
    assert_within(y, expected.y, reference.y_bound(expected, None, None, x.dtype, 1))


def test_results_lie_in_memory_as_a_misaligned_x_does():
    x = Place(order=(1, 0), misaligned=True).put(np.random.default_rng(27).normal(size=(5, 9)))
    assert order_of_axes(batch_norm_train(x)[0]) == order_of_axes(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "few runs", "many runs", "one channel"])
def test_every_length_around_the_registers(layout, dtype):
    """Nothing of a row is dropped, whatever is left of it after the last whole register."""
    rng = np.random.default_rng(28)
    for length in range(1, 71):
        shape = {
            "rows": (11, length),
            "few runs": (3, 2, length),
            "many runs": (9, 2, length),
            "one channel": (2, 1, length),
        }
        x, dy, residual = rng.normal(size=(3, *shape[layout])).astype(dtype)
        gamma, beta = rng.uniform(1, 2, size=(2, x.shape[1])).astype(np.float32)
        p = Problem(
            x, 1, gamma, beta, 1e-3, "relu" if length % 2 else None, residual if length % 3 else None, dy, None, dtype
        )
        check_against_the_oracle(p)


def test_strides_beyond_32_bits(tmp_path):
    """Two rows in a file of holes, 2 GiB apart."""
    far = np.memmap(tmp_path / "holes", np.float32, mode="w+", shape=(2, 2**29 + 8))
    assert far.strides[0] > 2**31
    near = np.random.default_rng(29).normal(size=(2, 60)).astype(np.float32)
    x, out = far[:, :60], far[:, 100:160]
    x[...] = near
    for shape in ((2, 60), (2, 3, 20)):
        y, saved = batch_norm_train(near.reshape(shape))
        dx = batch_norm_backward(near.reshape(shape), saved).dx
        there, saved_there = batch_norm_train(x.reshape(shape), out=out.reshape(shape))
        assert np.shares_memory(there, out)
        assert bits(there) == bits(y)
        assert bits(batch_norm_backward(x.reshape(shape), saved_there).dx) == bits(dx)


def test_more_values_than_32_bits_count():
    """2³¹ and some, of one row repeated."""
    row = np.arange(64, dtype=np.float32)
    x = np.broadcast_to(row, (2**25 + 5, 64))
    moments = Moments.of(x)
    assert x.size > 2**31
    assert moments.count == len(x)
    assert np.array_equal(moments.mean, row)
    assert not moments.m2.any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guards pages by Linux's mprotect")
def test_nothing_beside_an_array_is_touched():
    """Arrays that begin or end with a page beside one that nobody may read or write."""
    run_python(
        """
        import ctypes, itertools, math, mmap
        import ml_dtypes
        import numpy as np
        import fastbn

        page, room = mmap.PAGESIZE, 16 * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)

        def guarded(values, at_end):
            memory = mmap.mmap(-1, room + 2 * page)
            start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for guard in (start, start + page + room):
                assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
            offset = page + (room - values.nbytes if at_end else 0)
            array = np.frombuffer(memory, values.dtype, values.size, offset).reshape(values.shape)
            array[...] = values
            return array

        shapes = [(2, 3, 5), (9, 3, 5), (3, 2, 17), (2, 2, 300), (1, 1, 33), (7, 3), (40, 19), (3, 1025), (2, 4, 16)]
        for shape, dtype in itertools.product(shapes, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)):
            values = np.random.default_rng(0).normal(size=(3, *shape)).astype(dtype)
            for at_end in (False, True):
                x, dy, residual, out = (guarded(v, at_end) for v in (*values, values[0]))
                y, saved = fastbn.batch_norm_train(x, residual=residual, activation="relu", out=out)
                fastbn.batch_norm_infer(x, saved.mean, saved.var, out=out)
                fastbn.batch_norm_backward(dy, saved, out=out)
                fastbn.batch_norm_backward(dy, fastbn.batch_norm_train(x, activation="relu")[1], out=dy)
                fastbn.Moments.of(x)
        """
    )


def test_a_large_view_of_zero_strides_is_one_small_array_repeated():
    small = np.random.default_rng(4).normal(size=(1, 20, 1, 65)).astype(np.float32)
    x = np.broadcast_to(small, (30, 20, 40, 65))
    y, saved = batch_norm_train(x)
    expected = reference.train(small)  # repeating every value as often changes no mean
    bound = reference.y_bound(expected, None, None, x.dtype, 1)
    assert_within(y, np.broadcast_to(expected.y, x.shape), np.broadcast_to(bound, x.shape))
    assert saved.count == 30 * 40 * 65
    dx = batch_norm_backward(np.broadcast_to(np.float32(1), x.shape), saved).dx
    assert np.abs(dx).max() <= 8 * U32 * (1 + (1 + np.abs(expected.xhat).max()) ** 2) * saved.rstd.max()


class OnlyDLPack:
    """Data that NumPy can view through DLPack alone."""

    def __init__(self, array):
        self._array = array

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()


class OnlyArray:
    """Data that NumPy can view through ``__array__`` alone."""

    def __init__(self, array):
        self._array = array

    def __array__(self, dtype=None, copy=None):
        return self._array if dtype is None else self._array.astype(dtype)


LIKE_ARRAYS = {
    "DLPack": OnlyDLPack,
    "__array__": OnlyArray,
    "list": lambda a: a.tolist(),
    "tuple": lambda a: tuple(map(tuple, a.tolist())),
    "matrix": lambda a: a.view(np.matrix) if a.ndim == 2 else a,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "misaligned": Place(misaligned=True).put,
    "read-only": Place(readonly=True).put,
    "all of it": Place(order=None, steps=None, misaligned=True, swapped=True, readonly=True).put,
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", LIKE_ARRAYS)
def test_every_argument_may_be_anything_that_numpy_can_view(kind):
    like = LIKE_ARRAYS[kind]
    x, residual, dy = np.random.default_rng(5).normal(size=(3, 9, 4))
    gamma, beta, mean, var = np.random.default_rng(6).uniform(0.5, 2, size=(4, 4))
    vector = (lambda v: v.tolist()) if kind == "tuple" else like
    y, saved = batch_norm_train(x, gamma, beta, residual=residual, activation="relu")
    gradients = batch_norm_backward(dy, saved)
    y_like, saved_like = batch_norm_train(
        like(x), vector(gamma), vector(beta), residual=like(residual), activation="relu"
    )
    assert type(y_like) is np.ndarray
    assert bits(y_like) == bits(y)
    for ours, theirs in zip(batch_norm_backward(like(dy), saved_like), gradients, strict=True):
        assert bits(ours) == bits(theirs)
    inferred = batch_norm_infer(
        like(x), vector(mean), vector(var), vector(gamma), vector(beta), residual=like(residual)
    )
    assert bits(inferred) == bits(batch_norm_infer(x, mean, var, gamma, beta, residual=residual))
    assert bits(Moments.of(like(x)).m2) == bits(Moments.of(x).m2)


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", ">i4", "i8", "u8", "?"])
def test_integers_become_float64(dtype):
    x = np.random.default_rng(7).integers(0, 2 if dtype == "?" else 100, size=(9, 4)).astype(dtype)
    with unchanged(x):
        y, saved = batch_norm_train(x)
    assert y.dtype == np.float64
    assert bits(y) == bits(batch_norm_train(x.astype(np.float64))[0])
    assert batch_norm_backward(y, saved).dx.dtype == np.float64


@pytest.mark.parametrize("axis", [1, -2, np.int64(1), np.uint8(1)], ids=repr)
def test_axis_is_any_integer(axis):
    x = np.random.default_rng(8).normal(size=(4, 5, 6))
    assert bits(batch_norm_train(x, axis=axis)[0]) == bits(batch_norm_train(x)[0])
    assert bits(batch_norm_infer(x, np.zeros(5), np.ones(5), axis=axis)) == bits(
        batch_norm_infer(x, np.zeros(5), np.ones(5))
    )
    assert Moments.of(x, axis).mean.shape == (5,)


@pytest.mark.parametrize(
    "dtype",
    DTYPES,
    ids=str,
)
def test_without_gamma_parameter_gradients_are_as_if_it_were_there(dtype):
    x = np.random.default_rng(9).normal(size=(6, 3)).astype(dtype)
    gradients = batch_norm_backward(x, batch_norm_train(x)[1])
    assert gradients.dgamma.dtype == gradients.dbeta.dtype == (FLOAT64 if dtype == FLOAT64 else FLOAT32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gamma_dtype", "expected"),
    [(FLOAT16, None), (BFLOAT16, None), (np.dtype(int), None), (FLOAT32, FLOAT32), (FLOAT64, FLOAT64)],
    ids=str,
)
def test_parameter_gradients_have_the_dtype_of_gamma_or_float32_at_the_least(dtype, gamma_dtype, expected):
    x = np.random.default_rng(9).normal(size=(6, 3)).astype(dtype)
    gradients = batch_norm_backward(x, batch_norm_train(x, np.ones(3, gamma_dtype))[1])
    expected = expected or (FLOAT64 if dtype == FLOAT64 else FLOAT32)
    assert gradients.dgamma.dtype == gradients.dbeta.dtype == expected
    assert gradients.dx.dtype == dtype
    assert gradients.dgamma.shape == gradients.dbeta.shape == (3,)


def test_saved_tells_the_statistics_and_serves_again():
    x, dy = np.random.default_rng(10).normal(size=(2, 6, 3, 5)).astype(np.float32)
    gamma = np.array([1.0, 2.0, 3.0])
    _, saved = batch_norm_train(x, gamma, eps=1e-3)
    assert saved.count == 30
    for vector in (saved.mean, saved.var, saved.rstd):
        assert vector.shape == (3,)
        assert vector.dtype == np.float64
    assert np.array_equal(saved.rstd, 1 / np.sqrt(saved.var + 1e-3))
    first = batch_norm_backward(dy, saved)
    gamma[:] = 0  # what the optimizer does between the passes is no concern of this one
    second = batch_norm_backward(dy, saved)
    assert isinstance(first, Gradients)
    for ours, theirs in zip(first[:3], second[:3], strict=True):
        assert bits(ours) == bits(theirs)
    assert not np.shares_memory(first.dx, second.dx)
    assert "channels=3" in repr(saved)


# ---- data that is exact -------------------------------------------------------------------------------------------

# Three of four values are the offset, one is 4 more: μ = offset + 1, σ² = 3, and with ε = 1, rstd is 1/2
EXACT = [
    ((64, 5), 1),
    ((4, 6), 1),
    ((65536, 4), 1),
    ((8, 3, 8), 1),
    ((4, 5, 16), 1),
    ((64, 6, 8), 1),
    ((2, 17, 4, 8), 1),
    ((4, 3, 512), 1),
    ((1, 2, 65536), 1),
    ((1, 1, 64), 1),
    ((16, 16, 1024), -1),
    ((12, 64), 0),
]


def exact_data(shape, axis, dtype):
    """Return x, gamma, beta, dy of small integers and powers of two."""
    axis %= len(shape)
    rng, c = np.random.default_rng(11), shape[axis]
    others = tuple(np.delete(shape, axis))
    pattern = np.where(np.arange(math.prod(others)) % 4 == 0, 4, 0)[:, None] + rng.integers(-50, 50, c)
    x = np.moveaxis(pattern.reshape(*others, c), -1, axis)
    gamma, beta = rng.choice([-4.0, -1.0, 0.5, 1.0, 2.0], c), rng.integers(-4, 5, c).astype(np.float64)
    beta[::2] = gamma[::2] / 2  # so that y is exactly 0 where x is the offset
    return np.ascontiguousarray(x).astype(dtype), gamma, beta, rng.integers(-4, 5, shape).astype(dtype)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), EXACT, ids=str)
def test_exact_data_gives_exact_results(shape, axis, dtype, activation):
    """No rounding happens anywhere, so every bit is known."""
    x, gamma, beta, dy = exact_data(shape, axis, dtype)
    ndim, m = x.ndim, x.size // shape[axis]
    y, saved = batch_norm_train(x, gamma, beta, axis=axis, eps=1.0, activation=activation)
    values = x.astype(np.float64)
    mean = over_channels(np.min, values, axis) + 1
    xhat = (values - expand(mean, ndim, axis)) / 2
    z = expand(gamma, ndim, axis) * xhat + expand(beta, ndim, axis)
    expected = np.where(z > 0, z, 0) if activation else z
    assert np.array_equal(saved.mean, mean)
    assert np.array_equal(saved.var, np.full(len(mean), 3.0))
    assert np.array_equal(saved.rstd, np.full(len(mean), 0.5))
    assert np.array_equal(y.astype(np.float64), expected)
    inferred = batch_norm_infer(x, mean, saved.var, gamma, beta, axis=axis, eps=1.0, activation=activation)
    assert bits(inferred) == bits(y)

    dz = np.where(z > 0, dy.astype(np.float64), 0) if activation else dy.astype(np.float64)  # 0 where y = 0
    dbeta, dgamma = over_channels(np.sum, dz, axis), over_channels(np.sum, dz * xhat, axis)
    dx = dz - expand(dbeta / m, ndim, axis) - xhat * expand(dgamma / m, ndim, axis)
    dx = (expand(gamma, ndim, axis) / 2 * dx).astype(dtype)
    gradients = batch_norm_backward(dy, saved)
    assert np.array_equal(gradients.dbeta, dbeta)
    assert np.array_equal(gradients.dgamma, dgamma)
    assert np.array_equal(gradients.dx.astype(np.float64), dx.astype(np.float64))
    assert activation is None or (z == 0).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "axis"), EXACT, ids=str)
def test_exact_residuals_decide_relu(shape, axis, dtype):
    """The residual makes every third value exactly 0: no gradient passes there."""
    x, gamma, beta, dy = exact_data(shape, axis, dtype)
    z = batch_norm_train(x, gamma, beta, axis=axis, eps=1.0)[0].astype(np.float64)
    third = np.arange(x.size).reshape(shape) % 3 == 0
    residual = np.where(third, -z, np.random.default_rng(12).integers(-8, 8, shape)).astype(dtype)
    z = z + residual.astype(np.float64)
    y, saved = batch_norm_train(x, gamma, beta, axis=axis, eps=1.0, activation="relu", residual=residual)
    assert np.array_equal(y.astype(np.float64), np.where(z > 0, z, 0))
    gradients = batch_norm_backward(dy, saved)
    assert np.array_equal(gradients.dresidual.astype(np.float64), np.where(z > 0, dy.astype(np.float64), 0))
    masked = batch_norm_backward(gradients.dresidual, batch_norm_train(x, gamma, beta, axis=axis, eps=1.0)[1])
    assert bits(gradients.dx) == bits(masked.dx)  # from there on it is the backward pass of BN alone
    assert bits(gradients.dgamma) == bits(masked.dgamma)
    assert bits(gradients.dbeta) == bits(masked.dbeta)


@pytest.mark.parametrize("with_residual", [False, True])
def test_no_gradient_passes_where_a_float16_result_rounds_to_0(with_residual):
    x = np.random.default_rng(13).normal(size=(64, 3)).astype(np.float16)
    residual = np.zeros_like(x) if with_residual else None
    y, saved = batch_norm_train(x, np.full(3, 1e-8), activation="relu", residual=residual)
    assert not y.any()
    assert not batch_norm_backward(np.ones_like(x), saved).dbeta.any()


# ---- laws ---------------------------------------------------------------------------------------------------------


@given(problems(kinds=["plain", "offset", "outliers"], dense=True))
def test_each_channel_has_mean_beta_and_standard_deviation_gamma(p):
    """To be exact, |γ|σ/√(σ²+ε). An error of e per value moves neither by more than e."""
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, axis=p.axis, eps=p.eps)
    expected = reference.train(p.x, p.gamma, p.beta, axis=p.axis, eps=p.eps)
    bound = over_channels(np.max, reference.y_bound(expected, p.gamma, p.beta, p.dtype, p.axis), p.axis)
    mean, var, _ = reference.moments(y, p.axis)
    beta = np.zeros(p.channels) if p.beta is None else reference.wide(p.beta)
    gamma = np.ones(p.channels) if p.gamma is None else reference.wide(p.gamma)
    assert_within(mean, beta, bound, "mean of y")
    assert_within(np.sqrt(var), np.abs(gamma) * np.sqrt(saved.var) * saved.rstd, bound, "standard deviation of y")


@given(problems(kinds=["plain", "offset", "outliers"], dense=True))
def test_the_gradient_is_orthogonal_to_what_does_not_change_y(p):
    """Σdx = 0, and Σdx·x̂ = γ·rstd·dγ·ε/(σ²+ε), which is 0 but for ε: shifting and scaling x changes nothing."""
    _, saved = batch_norm_train(p.x, p.gamma, p.beta, axis=p.axis, eps=p.eps)
    gradients = batch_norm_backward(p.dy, saved)
    forward = reference.train(p.x, p.gamma, axis=p.axis, eps=p.eps)
    backward = reference.backward(p.dy, p.x, p.gamma, axis=p.axis, eps=p.eps)
    bound = reference.backward_bound(backward, forward, p.gamma, p.dtype, p.axis, FLOAT64).dx
    gamma = np.ones(p.channels) if p.gamma is None else reference.wide(p.gamma)
    along = gamma * forward.rstd * backward.dgamma * p.eps / (forward.var + p.eps)
    dx = reference.wide(gradients.dx)
    assert_within(over_channels(np.sum, dx, p.axis), 0 * along, over_channels(np.sum, bound, p.axis), "Σdx")
    across = over_channels(np.sum, bound * np.abs(forward.xhat), p.axis)
    assert_within(over_channels(np.sum, dx * forward.xhat, p.axis), along, across, "Σdx·x̂")


@given(
    shapes(), st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(-(10**6), 10**6), st.sampled_from(DTYPES[:2])
)
def test_y_is_the_same_for_any_scale_and_shift_of_x(shape_and_axis, seed, a, b, dtype):
    """y(ax+b) with a²ε is y(x). The numbers are integers, so that ax+b itself is exact."""
    (shape, axis), rng = shape_and_axis, np.random.default_rng(seed)
    x = rng.integers(-1000, 1000, size=shape).astype(dtype)
    y, _ = batch_norm_train(x, axis=axis, eps=1e-3)
    moved, _ = batch_norm_train(x * np.asarray(a, dtype) + np.asarray(b, dtype), axis=axis, eps=1e-3 * a * a)
    expected = reference.train(x, axis=axis, eps=1e-3)
    there = reference.train(a * x.astype(np.float64) + b, axis=axis, eps=1e-3 * a * a)
    bound = reference.y_bound(expected, None, None, dtype, axis) + reference.y_bound(there, None, None, dtype, axis)
    assert_within(moved, reference.wide(y), bound)


@given(problems(kinds=["plain", "offset", "outliers"], dense=True))
def test_channels_last_is_the_transpose_of_channels_first(p):
    """In the same memory to the last bit; as a copy, in other memory, within the bound of each."""
    x, dy = np.moveaxis(p.x, p.axis, -1), np.moveaxis(p.dy, p.axis, -1)
    residual = None if p.residual is None else np.moveaxis(p.residual, p.axis, -1)
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    gradients = batch_norm_backward(p.dy, saved)
    y_last, saved_last = batch_norm_train(x, p.gamma, p.beta, **p.options | {"axis": -1, "residual": residual})
    gradients_last = batch_norm_backward(dy, saved_last)
    assert bits(np.moveaxis(y_last, -1, p.axis)) == bits(y)
    if residual is not None:
        assert bits(np.moveaxis(gradients_last.dresidual, -1, p.axis)) == bits(gradients.dresidual)
    if residual is None or p.activation is None:  # else dresidual lies in memory as it likes, and decides
        assert bits(np.moveaxis(gradients_last.dx, -1, p.axis)) == bits(gradients.dx)
        assert bits(gradients_last.dgamma) == bits(gradients.dgamma)

    copied = np.ascontiguousarray(x)
    expected = reference.train(p.x, p.gamma, p.beta, **p.options)
    bound = np.moveaxis(reference.y_bound(expected, p.gamma, p.beta, p.dtype, p.axis, residual=p.residual), p.axis, -1)
    y_copied, _ = batch_norm_train(copied, p.gamma, p.beta, **p.options | {"axis": -1, "residual": residual})
    assert_within(y_copied, np.moveaxis(reference.wide(y), p.axis, -1), 2 * bound)


@given(problems(dtypes=[FLOAT32, FLOAT64], kinds=["plain"]))
def test_relu_is_the_plain_result_cut_at_0(p):
    """To the bit, forwards and backwards: an activation is no other arithmetic."""
    options = p.options | {"activation": None}
    plain, saved_plain = batch_norm_train(p.x, p.gamma, p.beta, **options)
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, **options | {"activation": "relu"})
    assert np.array_equal(y, np.where(plain > 0, plain, 0))
    cut = np.where(plain > 0, p.dy, 0).astype(p.dtype)
    ours, theirs = batch_norm_backward(np.array(p.dy), saved), batch_norm_backward(cut, saved_plain)
    bound = reference.backward_bound(
        reference.backward(cut, p.x, p.gamma, axis=p.axis, eps=p.eps),
        reference.train(p.x, p.gamma, axis=p.axis, eps=p.eps), p.gamma, p.dtype, p.axis, ours.dgamma.dtype,
    )  # fmt: skip
    assert_within(ours.dx, reference.wide(theirs.dx), 2 * bound.dx)
    assert_within(ours.dgamma, reference.wide(theirs.dgamma), 2 * bound.dgamma)
    assert_within(ours.dbeta, reference.wide(theirs.dbeta), 2 * bound.dbeta)


@given(problems(dense=True))
def test_the_two_halves_of_a_backward_pass_are_the_whole(p):
    """What a batch in several parts needs: sums first, dx from the sums of all parts."""
    _, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    whole = batch_norm_backward(p.dy, saved, num_threads=p.num_threads)
    dgamma, dbeta, dresidual = backward_sums(p.dy, saved, p.num_threads)
    dx = input_gradient(p.dy, saved, dgamma, dbeta, dresidual, num_threads=p.num_threads)
    assert bits(dgamma.astype(whole.dgamma.dtype)) == bits(whole.dgamma)
    assert bits(dbeta.astype(whole.dbeta.dtype)) == bits(whole.dbeta)
    assert bits(dx) == bits(whole.dx)
    assert (dresidual is None) == (p.residual is None)
    if dresidual is not None:
        assert bits(dresidual) == bits(whole.dresidual)


# ---- gradients by finite differences ------------------------------------------------------------------------------


@given(shapes(max_size=300, min_count=3), st.integers(0, 2**32 - 1), st.sampled_from([None, "relu"]), st.booleans())
def test_gradients_are_derivatives(shape_and_axis, seed, activation, with_residual):
    """⟨dx, v⟩ is the change of ⟨u, y⟩ as x moves along v, and the same for γ, β and the residual."""
    (shape, axis), rng = shape_and_axis, np.random.default_rng(seed)
    c = shape[axis]
    point = {"x": rng.normal(size=shape), "gamma": rng.normal(size=c), "beta": rng.normal(size=c)}
    if with_residual:
        point["residual"] = rng.normal(size=shape)
    u = rng.normal(size=shape)

    def forward(at):
        return batch_norm_train(**at, axis=axis, eps=0.1, activation=activation)

    y, saved = forward(point)
    gradients = batch_norm_backward(u, saved)
    named = {"x": gradients.dx, "gamma": gradients.dgamma, "beta": gradients.dbeta, "residual": gradients.dresidual}
    h = 2.0**-18
    for key, value in point.items():
        v = rng.uniform(-1, 1, size=value.shape)
        ahead, behind = (forward(point | {key: value + step * v})[0] for step in (h, -h))
        if activation:  # no kink in between
            assume(np.array_equal(ahead > 0, y > 0) and np.array_equal(behind > 0, y > 0))
        slope = np.sum(u * (ahead - behind)) / (2 * h)
        # h²/6 times a third derivative, where rstd < 1/√0.1, and the rounding of y over h
        size = np.sum(np.abs(u)) * (1 + np.abs(point["gamma"]).max()) * (1 + np.abs(y).max())
        assert abs(slope - np.sum(named[key] * v)) <= (100 * h * h + 32 * U64 / h) * size, key


# ---- moments ------------------------------------------------------------------------------------------------------


def assert_moments(moments, x, axis):
    """Hold moments to the oracle: to as many roundings as there are values, of sums that may lose a few bits more.

    Values are shifted by one of them, K. That is done again with a better K where (K-μ)² costs more than is allowed:
    a factor of 2¹⁶ for float32, which leaves 12 bits more than float32 has, or of 2⁴ for float64.
    """
    mean, var, centred = reference.moments(x, axis)
    m, size = x.size // len(mean), over_channels(np.max, np.abs(reference.wide(x)), axis)
    assert moments.count == m
    assert type(moments.count) is int
    u = (m + 8) * U64 * (1 + 2 ** (4 if np.asarray(x).dtype.itemsize == 8 else 16))
    assert_within(moments.mean, mean, u * size, "mean")
    assert_within(moments.m2, m * var, u * (m * var + size * over_channels(np.sum, np.abs(centred), axis)), "m2")
    assert moments.mean.dtype == moments.m2.dtype == np.float64


@given(problems())
def test_moments_are_those_of_the_oracle(p):
    with unchanged(p.x):
        moments = Moments.of(p.x, p.axis, num_threads=p.num_threads)
    assert_moments(moments, p.x, p.axis)
    assert np.array_equal(moments.var(), moments.m2 / moments.count)
    assert np.array_equal(moments.var(1), moments.m2 / (moments.count - 1))


@given(st.data(), st.integers(0, 2**32 - 1), st.sampled_from(DTYPES))
def test_moments_of_parts_merge_to_those_of_the_whole(data, seed, dtype):
    """In any split and any order, by update or by merge."""
    shape = (data.draw(st.integers(1, 60)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 9)))
    x = (np.random.default_rng(seed).normal(size=shape) + 10).astype(dtype)
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[0]), max_size=5)))
    parts = [x[a:b] for a, b in itertools.pairwise([0, *cuts, shape[0]])]
    updated = Moments(shape[1])
    for part in parts:
        assert updated.update(part) is updated
    assert_moments(updated, x, 1)
    waiting = [Moments.of(part) for part in parts]
    while len(waiting) > 1:
        one, other = (waiting.pop(data.draw(st.integers(0, len(waiting) - 1))) for _ in range(2))
        before = (other.count, bits(other.mean), bits(other.m2))
        assert one.merge(other) is one
        assert (other.count, bits(other.mean), bits(other.m2)) == before
        waiting.append(one)
    assert_moments(waiting[0], x, 1)


@pytest.mark.parametrize("empty", [Moments(3), Moments.of(np.zeros((0, 3))), Moments.of(np.zeros((5, 3, 0)))], ids=repr)
def test_an_empty_part_is_the_identity(empty):
    moments = Moments.of(np.random.default_rng(14).normal(size=(8, 3)))
    before = moments.to_dict()
    for merged in (Moments.from_dict(before).merge(empty), copy.deepcopy(empty).merge(moments)):
        assert merged.count == 8
        assert bits(merged.mean) == bits(before["mean"])
        assert bits(merged.m2) == bits(before["m2"])
    assert empty.count == 0
    both = copy.deepcopy(empty).merge(empty)
    assert both.count == 0
    assert not both.mean.any()


def test_merging_takes_no_hold_of_the_other_part():
    part, whole = Moments.of(np.random.default_rng(15).normal(size=(8, 3))), Moments(3)
    whole.merge(part)
    before = bits(part.mean), bits(part.m2)
    whole.mean += 1
    whole.m2 += 1
    whole.update(np.ones((2, 3)))
    assert (bits(part.mean), bits(part.m2)) == before


def test_a_part_may_be_merged_with_itself():
    x = np.random.default_rng(16).normal(size=(8, 3))
    moments = Moments.of(x)
    assert_moments(moments.merge(moments), np.concatenate([x, x]), 1)


@pytest.mark.parametrize("axis", [1, -1, 0])
@pytest.mark.parametrize("through", ["dict", "pickle", "deepcopy"])
def test_moments_make_a_round_trip(axis, through):
    moments = Moments.of(np.random.default_rng(17).normal(size=(8, 8)), axis)
    d = moments.to_dict()
    trip = {"dict": lambda: Moments.from_dict(d), "pickle": lambda: pickle.loads(pickle.dumps(moments)),
            "deepcopy": lambda: copy.deepcopy(moments)}  # fmt: skip
    again = trip[through]()
    assert (again.count, bits(again.mean), bits(again.m2)) == (moments.count, bits(moments.mean), bits(moments.m2))
    for a, b in itertools.product((again.mean, again.m2, d["mean"], d["m2"]), (moments.mean, moments.m2)):
        assert not np.shares_memory(a, b)
    more = np.random.default_rng(18).normal(size=(8, 8))
    assert bits(again.update(more).mean) == bits(moments.update(more).mean)  # the channel axis came along
    assert "count=16" in repr(moments)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(np.inf, 0.0, id="infinity"),
        pytest.param(1e200, -1e200, id="squares that overflow"),
        pytest.param(np.nan, 1.0, id="NaN"),
    ],
)
def test_moments_of_anything_need_no_warning(first, second):
    """NaN and infinity stay in their channel, without a RuntimeWarning."""
    parts = [np.array([[0.0, 1.0], [value, 2.0]]) for value in (first, first, second)]
    moments = Moments(2)
    for part in parts:
        moments.update(part)
    assert moments.mean[1] == 1.5
    assert moments.var()[1] == 0.25
    assert not np.isfinite(moments.var()[0])


# ---- nothing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((0, 3), 1), ((4, 3, 0), 1), ((2, 0), 1), ((0, 0), 0), ((0, 3, 4), -1), ((3, 4, 0, 2), 0)],
    ids=str,
)
@pytest.mark.parametrize(("activation", "with_residual"), [(None, False), ("relu", False), ("relu", True)])
def test_an_empty_batch_gives_an_empty_result(shape, axis, activation, with_residual, dtype):
    x, c = np.zeros(shape, dtype), shape[axis]
    options = {"axis": axis, "activation": activation, "residual": x.copy() if with_residual else None}
    y, saved = batch_norm_train(x, np.ones(c), np.ones(c), **options)
    gradients = batch_norm_backward(np.zeros(shape, dtype), saved)
    inferred = batch_norm_infer(x, np.ones(c), np.ones(c), **options)
    for result in (y, gradients.dx, inferred, *([gradients.dresidual] if with_residual else [])):
        assert result.shape == shape
        assert result.dtype == dtype
    assert (gradients.dresidual is not None) == with_residual
    assert saved.count == 0
    for vector in (gradients.dgamma, gradients.dbeta):
        assert np.array_equal(vector, np.zeros(c))
    assert saved.mean.shape == saved.var.shape == saved.rstd.shape == (c,)
    moments = Moments.of(x, axis)
    assert moments.count == 0
    assert np.array_equal(moments.mean, np.zeros(c))
    out = np.empty_like(x)
    assert batch_norm_train(x, out=out, **options)[0] is out
    assert batch_norm_infer(x, np.ones(c), np.ones(c), out=out, **options) is out
    assert batch_norm_backward(x, saved, out=out).dx is out


def test_one_value_per_channel_serves_in_inference():
    x = np.array([[1.0, 2.0, 3.0]])
    assert np.array_equal(batch_norm_infer(x, [0, 0, 1], [1, 4, 1], eps=0.0), [[1.0, 1.0, 2.0]])
    assert np.array_equal(Moments.of(x).mean, x[0])


def test_eps_may_be_0_in_inference_and_negative_variance_small():
    x = np.ones((2, 2))
    assert np.array_equal(batch_norm_infer(x, [0, 0], [4, 0.25], eps=0), [[0.5, 2], [0.5, 2]])
    assert np.array_equal(batch_norm_infer(x, [0, 0], [-0.75, 3.75], eps=1.0), [[2, 1 / np.sqrt(4.75)]] * 2)


# ---- refusals -----------------------------------------------------------------------------------------------------


def arguments():
    """Return one valid argument for everything."""
    rng = np.random.default_rng(19)
    x, dy, residual = rng.normal(size=(3, 4, 3, 5)).astype(np.float32)
    gamma, beta, mean, var = rng.uniform(1, 2, size=(4, 3))
    saved = batch_norm_train(x, gamma, beta)[1]
    return {
        "x": x, "gamma": gamma, "beta": beta, "mean": mean, "var": var, "residual": residual, "dy": dy, "saved": saved,
        "out": np.full_like(x, 7), "axis": 1, "eps": 1e-5, "activation": "relu", "num_threads": 1,
    }  # fmt: skip


TAKES = {
    batch_norm_train: ("x", "gamma", "beta", "axis", "eps", "activation", "residual", "out", "num_threads"),
    batch_norm_infer: (
        "x", "mean", "var", "gamma", "beta", "axis", "eps", "activation", "residual", "out", "num_threads"
    ),
    batch_norm_backward: ("dy", "saved", "out", "num_threads"),
    Moments.of: ("x", "axis", "num_threads"),
}  # fmt: skip


def writable(array, strides, shape=None):
    return np.lib.stride_tricks.as_strided(array, shape or array.shape, strides)


def overwritten(a):
    x = a["x"].copy()
    return batch_norm_train(x, out=x)[1]


# (what is wrong, argument, a bad value or a function of all arguments, exception, the rest of the message)
BAD = [
    ("0-D", "x", np.float32(1), ValueError, "2 or more dimensions, got 0"),
    ("1-D", "x", np.ones(3), ValueError, "2 or more dimensions, got 1"),
    ("complex", "x", np.ones((4, 3, 5), complex), TypeError, ".*got dtype complex128"),
    ("object", "x", np.ones((4, 3, 5), object), TypeError, ".*got dtype object"),
    ("strings", "x", np.full((4, 3, 5), "1"), TypeError, ".*got dtype <U1"),
    ("dates", "x", np.zeros((4, 3, 5), "M8[s]"), TypeError, ".*got dtype datetime64"),
    ("structured", "x", np.zeros((4, 3, 5), "f4,f4"), TypeError, ".*got dtype"),
    ("masked", "x", np.ma.masked_array(np.ones((4, 3, 5)), mask=True), TypeError, ".*got a masked array"),
    ("ragged", "x", [[1, 2], [3]], TypeError, ".*got list"),
    ("none", "x", None, TypeError, ".*got"),
    ("too far", "axis", 3, ValueError, "-3 to 2 .*got 3"),
    ("too far back", "axis", -4, ValueError, "-3 to 2 .*got -4"),
    ("float", "axis", 1.0, TypeError, "an integer, got 1.0"),
    ("string", "axis", "1", TypeError, "an integer, got '1'"),
    ("none", "axis", None, TypeError, "an integer, got None"),
    ("bool", "axis", True, TypeError, "an integer, got True"),
    ("two", "axis", (1, 2), TypeError, r"an integer, got \(1, 2\)"),
    *(
        bad
        for key in ("gamma", "beta", "mean", "var")
        for bad in (
            ("longer", key, np.ones(4), ValueError, r"shape \(3,\), got \(4,\)"),
            ("column", key, np.ones((3, 1)), ValueError, r"shape \(3,\), got \(3, 1\)"),
            ("number", key, 1.0, ValueError, r"shape \(3,\), got \(\)"),
            ("complex", key, np.ones(3, complex), TypeError, "real numbers, got dtype complex128"),
            ("object", key, np.ones(3, object), TypeError, "real numbers, got dtype object"),
            ("strings", key, ["1", "2", "3"], TypeError, "real numbers, got dtype <U1"),
            ("masked", key, np.ma.masked_array(np.ones(3), mask=True), TypeError, ".*got a masked array"),
        )
    ),
    ("none", "mean", None, TypeError, ".*got None"),
    ("none", "var", None, TypeError, ".*got None"),
    ("negative", "var", np.array([1.0, -1e-3, 1.0]), ValueError, r"var \+ eps > 0, got .*-0.001.* in channel 1"),
    ("minus eps", "var", np.array([1.0, 1.0, -1e-5]), ValueError, r"var \+ eps > 0, got .* in channel 2"),
    ("negative", "eps", -1e-5, ValueError, ".*got -1e-05"),
    ("NaN", "eps", float("nan"), ValueError, ".*got nan"),
    ("infinite", "eps", float("inf"), ValueError, ".*got inf"),
    ("string", "eps", "1e-5", TypeError, ".*got '1e-5'"),
    ("bool", "eps", True, TypeError, ".*got True"),
    ("a bool in an array", "eps", np.array(True), TypeError, r".*got array\(True\)"),
    ("a string in an array", "eps", np.array("0.5"), TypeError, r".*got array\('0.5'"),
    ("bytes", "eps", bytearray(b"0.5"), TypeError, ".*got bytearray"),
    ("none", "eps", None, TypeError, ".*got None"),
    ("complex", "eps", 1j, TypeError, ".*got 1j"),
    ("list", "eps", [1e-5], TypeError, r".*got \[1e-05\]"),
    ("unknown", "activation", "gelu", ValueError, "one of None, 'relu', got 'gelu'"),
    ("other case", "activation", "ReLU", ValueError, "one of None, 'relu', got 'ReLU'"),
    ("empty", "activation", "", ValueError, "one of None, 'relu', got ''"),
    ("no string", "activation", 1, ValueError, "one of None, 'relu', got 1"),
    ("bool", "activation", True, ValueError, "one of None, 'relu', got True"),
    *(
        bad
        for key in ("residual", "dy")
        for bad in (
            ("other shape", key, np.ones((4, 3, 1), np.float32), ValueError, r"shape \(4, 3, 5\), got \(4, 3, 1\)"),
            ("other order", key, np.ones((4, 5, 3), np.float32), ValueError, r"shape \(4, 3, 5\), got \(4, 5, 3\)"),
            ("float64", key, np.ones((4, 3, 5)), ValueError, "dtype float32, got float64"),
            ("float16", key, np.ones((4, 3, 5), np.float16), ValueError, "dtype float32, got float16"),
            ("complex", key, np.ones((4, 3, 5), complex), TypeError, ".*got dtype complex128"),
            ("masked", key, np.ma.masked_array(np.ones((4, 3, 5))), TypeError, ".*got a masked array"),
        )
    ),
    ("none", "dy", None, TypeError, ".*got"),
    ("none", "saved", None, TypeError, ".*got NoneType"),
    ("tuple", "saved", lambda a: (a["x"], a["saved"]), TypeError, ".*got tuple"),
    ("of out=x", "saved", overwritten, ValueError, ".*overwrote"),
    ("list", "out", [[[0.0] * 5] * 3] * 4, TypeError, "a NumPy array, got list"),
    ("DLPack", "out", OnlyDLPack(np.ones((4, 3, 5), np.float32)), TypeError, "a NumPy array, got OnlyDLPack"),
    ("other shape", "out", np.ones((4, 3, 6), np.float32), ValueError, r"shape \(4, 3, 5\), got \(4, 3, 6\)"),
    ("larger", "out", np.ones((1, 4, 3, 5), np.float32), ValueError, r"shape \(4, 3, 5\), got \(1, 4, 3, 5\)"),
    ("float64", "out", np.ones((4, 3, 5)), ValueError, "dtype float32, got float64"),
    ("big-endian", "out", np.ones((4, 3, 5), ">f4"), ValueError, "dtype float32, got >f4"),
    ("read-only", "out", lambda a: np.broadcast_to(a["out"], (4, 3, 5)), ValueError, ".*read-only"),
    ("zero strides", "out", lambda a: writable(a["out"], (0, 20, 4)), ValueError, ".*share no memory"),
    ("zero strides of channels", "out", lambda a: writable(a["out"], (60, 0, 4)), ValueError, ".*share no memory"),
    ("a window", "out", lambda a: writable(a["out"], (20, 20, 4)), ValueError, ".*share no memory"),
]


def refusals():
    for function, names in TAKES.items():
        for what, argument, value, error, message in BAD:
            if argument in names:
                name = f"{function.__qualname__}, {argument} {what}"
                yield pytest.param(function, argument, value, error, f"^{argument}: expected {message}", id=name)
        if "num_threads" in names:
            for value, error in (
                (0, ValueError),
                (-1, ValueError),
                (True, TypeError),
                (2.5, TypeError),
                ("2", TypeError),
            ):
                name = f"{function.__qualname__}, num_threads {value}"
                yield pytest.param(function, "num_threads", value, error, "^num_threads: expected an integer", id=name)
    for value in (0, -0.0):
        message = f"^eps: expected a finite number above 0, got {value}$"
        yield pytest.param(batch_norm_train, "eps", value, ValueError, message, id=f"batch_norm_train, eps {value}")
    if np.dtype(np.longdouble) != FLOAT64:
        for function in (batch_norm_train, batch_norm_infer, Moments.of):
            x = np.ones((4, 3, 5), np.longdouble)
            name = f"{function.__qualname__}, x longdouble"
            yield pytest.param(function, "x", x, TypeError, "^x: expected .*got dtype (float|longdouble)", id=name)


def arrays_of(*values):
    return [a for a in values if isinstance(a, np.ndarray) and not a.dtype.hasobject]


@pytest.mark.parametrize(("function", "argument", "value", "error", "message"), list(refusals()))
def test_a_bad_argument_is_named_and_nothing_is_written(function, argument, value, error, message):
    valid = arguments()
    function(**{key: valid[key] for key in TAKES[function]})  # but for this argument it works
    bad = arguments()
    bad[argument] = value(bad) if callable(value) else value
    saved = [getattr(bad["saved"], key, None) for key in ("x", "mean", "var", "rstd")]
    with unchanged(*arrays_of(*bad.values(), *saved)), pytest.raises(error, match=message):
        function(**{key: bad[key] for key in TAKES[function]})


def overlapping(a, key, shift=1):
    """Return an `out` that begins `shift` elements into the memory of an argument, which moves there."""
    memory = np.zeros(a[key].size + max(shift, 0) + 60, a[key].dtype)
    moved = memory[: a[key].size].reshape(a[key].shape)
    moved[...] = a[key]
    a[key] = moved
    return memory[shift : shift + 60].reshape(4, 3, 5)


OVERLAPS = {
    "x, one element on": lambda a: overlapping(a, "x"),
    "x, the last element": lambda a: overlapping(a, "x", 59),
    "x, channels exchanged": lambda a: a["x"][:, ::-1],
    "x, batch reversed": lambda a: a["x"][::-1],
    "residual, one element on": lambda a: overlapping(a, "residual"),
    "residual, all of it": lambda a: a["residual"],
}


@pytest.mark.parametrize("case", OVERLAPS)
@pytest.mark.parametrize("function", [batch_norm_train, batch_norm_infer], ids=lambda f: f.__name__)
def test_an_output_that_overlaps_an_input_is_refused(function, case):
    a = arguments()
    a["out"] = OVERLAPS[case](a)
    with unchanged(*arrays_of(*a.values())), pytest.raises(ValueError, match=f"^out: expected .*overlaps {case[:1]}"):
        function(**{key: a[key] for key in TAKES[function]})


def test_an_output_of_backward_that_overlaps_an_input_is_refused():
    for out in (lambda a: overlapping(a, "dy"), lambda a: a["dy"][::-1]):
        a = arguments()
        a["out"] = out(a)
        with (
            unchanged(a["dy"], a["saved"].x),
            pytest.raises(ValueError, match="^out: expected dy .*overlaps dy in part"),
        ):
            batch_norm_backward(a["dy"], a["saved"], out=a["out"])
    a = arguments()
    for out in (a["saved"].x, a["saved"].x[::-1]):
        with unchanged(a["dy"], out), pytest.raises(ValueError, match="^out: expected .*apart from x"):
            batch_norm_backward(a["dy"], a["saved"], out=out)


@pytest.mark.parametrize("case", ["x misaligned", "x big-endian", "x of integers", "gamma", "beta", "mean", "var"])
def test_an_output_that_overlaps_an_input_which_is_copied_is_refused(case):
    """The result would be right, but an input would be overwritten that is not `out`."""
    x = np.random.default_rng(20).normal(size=(5, 2))
    given = {"x": x, "mean": np.zeros(2), "var": np.ones(2), "gamma": np.ones(2), "beta": np.zeros(2)}
    if case == "x misaligned":
        memory = np.zeros(20 * 8 + 1, np.uint8)[1:].view(np.float64)
        memory[:10] = x.ravel()
        given["x"], out = memory[:10].reshape(5, 2), memory[4:14].reshape(5, 2)
    elif case.startswith("x"):
        memory = np.zeros(20, ">f8" if case == "x big-endian" else np.int64)
        memory[:10] = 100 * x.ravel()
        given["x"], out = memory[:10].reshape(5, 2), memory[4:14].view(np.float64).reshape(5, 2)
    else:
        out = np.concatenate([given[case], np.zeros(8)]).reshape(5, 2)
        given[case] = out[0]
    with unchanged(*given.values()), pytest.raises(ValueError, match="^out: "):
        batch_norm_infer(**given, out=out)


def test_a_masked_output_is_refused():
    out = np.ma.masked_array(np.zeros((4, 3, 5), np.float32), mask=True)
    with pytest.raises(TypeError, match="^out: expected a NumPy array, got MaskedArray"):
        batch_norm_train(arguments()["x"], out=out)


def test_an_output_may_lie_between_the_elements_of_an_input():
    """Interleaved memory has no element in common."""
    memory = np.random.default_rng(21).normal(size=(4, 3, 10))
    x, out = memory[..., ::2], memory[..., 1::2]
    expected = batch_norm_train(x.copy())[0]
    with unchanged(x.copy()):
        assert batch_norm_train(x, out=out)[0] is out
    assert_within(out, reference.wide(expected), 2 * reference.y_bound(reference.train(x), None, None, x.dtype, 1))


def test_an_output_may_be_x_by_another_name():
    x = np.random.default_rng(22).normal(size=(5, 1, 3))
    expected = batch_norm_train(x.copy())[0]
    assert bits(batch_norm_train(x, out=x[:, ::-1])[0]) == bits(expected)


def test_what_overwrote_its_input_has_no_backward():
    x, residual = np.random.default_rng(23).normal(size=(2, 4, 3))
    same = x[:]
    for out in (x, same):
        y, saved = batch_norm_train(x, residual=residual, activation="relu", out=out)
        assert y is out
        with unchanged(x), pytest.raises(ValueError, match="^saved: expected the input .*out=x overwrote it"):
            batch_norm_backward(np.ones((4, 3)), saved)


@pytest.mark.parametrize(("shape", "axis"), [((1, 3), 1), ((1, 3, 1), 1), ((1, 1), 0), ((5, 1, 1), 0)], ids=str)
def test_one_value_per_channel_is_refused_in_training(shape, axis):
    x, out = np.ones(shape), np.full(shape, 7.0)
    message = "^x: expected 2 or more values per channel in training, got 1 "
    with unchanged(x, out), pytest.raises(ValueError, match=message):
        batch_norm_train(x, axis=axis, out=out)


def test_variance_and_eps_of_0_are_refused():
    with pytest.raises(ValueError, match=r"^var: expected var \+ eps > 0, got 0.0 \+ 0.0 in channel 1"):
        batch_norm_infer(np.ones((2, 2)), [0, 0], [1, 0], eps=0)


MOMENTS = {
    "merge with an array": (lambda m: m.merge(np.ones(3)), TypeError, "other: expected Moments, got ndarray"),
    "merge with None": (lambda m: m.merge(None), TypeError, "other: expected Moments, got NoneType"),
    "merge with more channels": (lambda m: m.merge(Moments(4)), ValueError, "other: expected 3 channels, got 4"),
    "update with more channels": (lambda m: m.update(np.ones((2, 4))), ValueError, ".*: expected 3 channels, got 4"),
    "update with 1-D": (lambda m: m.update(np.ones(3)), ValueError, "x: expected 2 or more dimensions, got 1"),
    "update with complex": (lambda m: m.update(np.ones((2, 3), complex)), TypeError, "x: expected .*complex128"),
    "correction of the count": (lambda m: m.var(8), ValueError, "correction: expected less than the count of 8, got 8"),
    "correction beyond": (lambda m: m.var(9), ValueError, "correction: expected less than the count of 8, got 9"),
    "negative correction": (lambda m: m.var(-1), ValueError, "correction: expected .*got -1"),
    "correction string": (lambda m: m.var("1"), TypeError, "correction: expected .*got '1'"),
    "variance of nothing": (lambda m: Moments(3).var(), ValueError, "correction: expected less than the count of 0"),
    "negative features": (lambda m: Moments(-1), ValueError, "num_features: expected an integer of 0 or more, got -1"),
    "features float": (lambda m: Moments(3.0), TypeError, "num_features: expected an integer .*got 3.0"),
    "axis string": (lambda m: Moments(3, axis="1"), TypeError, "axis: expected an integer, got '1'"),
    "missing key": (lambda m: Moments.from_dict({"count": 1, "mean": [1.0]}), ValueError, "d: .*m2"),
    "negative count": (
        lambda m: Moments.from_dict(m.to_dict() | {"count": -1}), ValueError, "count: expected .*0 or more, got -1"
    ),
    "another m2": (
        lambda m: Moments.from_dict(m.to_dict() | {"m2": np.ones(4)}), ValueError, r"m2: expected shape \(3,\), got"
    ),
    "a matrix as mean": (
        lambda m: Moments.from_dict(m.to_dict() | {"mean": np.ones((3, 1))}), ValueError, "mean: expected shape"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MOMENTS)
def test_bad_arguments_of_moments_are_named_and_change_nothing(case):
    call, error, message = MOMENTS[case]
    moments = Moments.of(np.random.default_rng(24).normal(size=(8, 3)))
    with unchanged(moments.mean, moments.m2), pytest.raises(error, match=f"^{message}"):
        call(moments)
    assert moments.count == 8


# ---- PyTorch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "residual and relu"])
@pytest.mark.parametrize(
    "shape", [(16, 7), (5, 6, 9), (4, 5, 7, 7), (3, 16, 8, 9), (2, 3, 4, 5, 6)], ids=lambda s: f"{len(s)}-D"
)
@pytest.mark.parametrize("memory", ["contiguous", "channels last"])
def test_pytorch_gives_the_same_values_and_gradients(shape, memory, fused, dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(25)
    x, dy, residual = (rng.normal(size=shape) + 0.5).astype(dtype), *rng.normal(size=(2, *shape)).astype(dtype)
    gamma, beta = rng.normal(size=(2, shape[1])).astype(dtype)
    if memory == "channels last":
        x, dy, residual = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy, residual))

    tensors = [torch.from_numpy(a).clone().requires_grad_() for a in (x, gamma, beta, residual)]
    theirs = torch.nn.functional.batch_norm(tensors[0], None, None, tensors[1], tensors[2], training=True, eps=1e-5)
    if fused:
        theirs = torch.relu(theirs + tensors[3])
    theirs.backward(torch.from_numpy(dy))

    options = {"activation": "relu", "residual": residual} if fused else {}
    y, saved = batch_norm_train(x, gamma, beta, **options)
    ours = batch_norm_backward(dy, saved)
    # PyTorch promises nothing; a sum of m values in its own arithmetic may lose m units
    m = x.size // shape[1]
    u = (m + 8) * (U64 if dtype == FLOAT64 else U32)
    forward = reference.train(x, gamma, beta, **options)
    t = expand(1 + over_channels(np.max, np.abs(forward.xhat), 1) + np.abs(forward.mean) * forward.rstd, x.ndim, 1)
    size = expand(np.abs(gamma), x.ndim, 1) * t + expand(np.abs(beta), x.ndim, 1) + (np.abs(residual) if fused else 0)
    assert_within(y, reference.wide(theirs.detach().numpy()), u * size, "y")
    scale, most = expand(np.abs(gamma) * saved.rstd, x.ndim, 1), np.abs(dy).max()
    assert_within(ours.dx, reference.wide(tensors[0].grad.numpy()), u * scale * most * (1 + t * t), "dx")
    assert_within(ours.dgamma, reference.wide(tensors[1].grad.numpy()), u * m * most * t.ravel(), "dgamma")
    assert_within(ours.dbeta, reference.wide(tensors[2].grad.numpy()), u * m * most, "dbeta")
    if fused:
        assert bits(ours.dresidual) == bits(tensors[3].grad.numpy())

    inferred = batch_norm_infer(x, saved.mean, saved.var, gamma, beta)
    mean, var = (torch.from_numpy(v.astype(dtype)) for v in (saved.mean, saved.var))
    theirs = torch.nn.functional.batch_norm(
        torch.from_numpy(x), mean, var, torch.from_numpy(gamma), torch.from_numpy(beta), training=False, eps=1e-5
    )
    assert_within(inferred, reference.wide(theirs.numpy()), u * size, "y of inference")


def test_tensors_of_pytorch_are_arrays():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(26).normal(size=(6, 3, 4)).astype(np.float32)
    y, saved = batch_norm_train(torch.from_numpy(x), torch.ones(3), torch.zeros(3))
    assert type(y) is np.ndarray
    assert bits(y) == bits(batch_norm_train(x, np.ones(3, np.float32), np.zeros(3, np.float32))[0])
    assert bits(batch_norm_backward(torch.from_numpy(x), saved).dx) == bits(batch_norm_backward(x, saved).dx)
    with pytest.raises(TypeError, match="^x: expected .*got Tensor"):
        batch_norm_train(torch.from_numpy(x).requires_grad_())
