"""Results on data where nothing rounds have one right answer, which integers give, and must be that, bit for bit."""

import itertools
import math

import numpy as np
import pytest
from exact_data import assert_exactly, balanced, integers
from reference import bits
from strategies import BFLOAT16, CHANNELS_FIRST, CHANNELS_LAST, DTYPES, FLOAT16, FLOAT32, FLOAT64, Place

from fastbn import BatchNorm, Moments, batch_norm_backward, batch_norm_infer, batch_norm_train

MEANS = {FLOAT16: (0, 1000), BFLOAT16: (0, 100), FLOAT32: (2**16, 2**20), FLOAT64: (0, 2**40)}  # least and most |μ|
SHAPES = CHANNELS_FIRST + CHANNELS_LAST
VARIANTS = list(itertools.product((None, "relu"), (False, True)))  # activation, whether there is a residual
ONE_BLOCK = 8192  # elements of an array that is never cut, however it lies in memory


def name(value):
    """A pytest id for a (shape, axis) or a dtype."""
    return f"{'x'.join(map(str, value[0]))} axis {value[1]}" if isinstance(value, tuple) else str(value)


def has_exact_shift(case, dtype):
    """Say whether the shift of the sums has few bits: where columns are summed in float32, it is the mean of some rows.

    So many as are a power of two; or it is rounded to few bits beside a large μ, for which half types have no room.
    """
    rows = math.prod(case[0]) // case[0][case[1]]
    sampled = min(rows // (8 if rows <= 64 else 32), 16)
    return dtype.itemsize > 2 or sampled & (sampled - 1) == 0


def check(case, dtype, activation, with_residual, threads, place=lambda a, axis, which: (a, axis)):
    """Run all that is done with a batch on arrays that `place` puts somewhere, and compare with the integers."""
    p = integers(case, activation, with_residual)
    c, rng = len(p.g), np.random.default_rng(2)
    mean = rng.integers(*MEANS[dtype], c) * rng.choice([-1, 1], c)

    def placed(channels, which, scale=1.0):
        return place((p.in_shape(channels) * scale).astype(dtype), p.axis, which)

    def expected(channels):
        return place(p.in_shape(channels), p.axis, None)[0]

    (x, axis), (dy, _) = placed(p.v + mean[:, None], 0), placed(p.dy, 1)
    residual = placed(p.residual, 2, 0.25)[0] if with_residual else None
    gamma, beta = (v.astype(FLOAT64 if dtype == FLOAT64 else FLOAT32) for v in (p.g / 2, p.b / 4))
    eps = 4 - p.var
    options = {"axis": axis, "eps": eps, "activation": activation, "num_threads": threads, "residual": residual}
    y, saved = batch_norm_train(x, gamma, beta, **options)
    assert_exactly(y, expected(p.y), 4, "y")
    assert not np.signbit(y.astype(np.float64)[y == 0]).any()
    assert saved.count == p.count
    assert_exactly(saved.mean, mean, 1, "mean")
    assert bits(saved.var) == bits(np.full(c, p.var))
    assert bits(saved.rstd) == bits(np.full(c, 0.5))

    dx, dgamma, dbeta = p.gradients
    gradients = batch_norm_backward(dy, saved, num_threads=threads)
    assert gradients.dgamma.dtype == gradients.dbeta.dtype == gamma.dtype
    assert_exactly(gradients.dx, expected(dx), 16, "dx")
    assert_exactly(gradients.dgamma, dgamma, 2, "dgamma")
    assert_exactly(gradients.dbeta, dbeta, 1, "dbeta")
    if with_residual:
        assert_exactly(gradients.dresidual, expected(np.where(p.passes, p.dy, 0)), 1, "dresidual")

    moments = Moments.of(x, axis, num_threads=threads)
    assert moments.count == p.count
    assert_exactly(moments.mean, mean, 1, "mean of Moments")
    assert_exactly(moments.m2, (p.v**2).sum(axis=1), 1, "m2")

    inferred = batch_norm_infer(x, mean, np.full(c, p.var), gamma, beta, **options)
    assert_exactly(inferred, expected(p.y), 4, "inferred")
    bn = BatchNorm(c, axis=axis, eps=eps, momentum=0.5, unbiased=False, activation=activation, dtype=np.float64)
    bn.gamma[:], bn.beta[:], bn.running_mean[:] = gamma, beta, -mean
    bn(x, residual=residual, num_threads=threads)
    assert_exactly(bn.running_mean, np.zeros(c, int), 1, "running mean")
    assert bits(bn.running_var) == bits(np.full(c, 0.5 + p.var / 2))
    bn.running_mean[:], bn.running_var[:] = mean, p.var
    assert_exactly(bn.eval()(x, residual=residual, num_threads=threads), expected(p.y), 4, "y of the layer")
    assert_exactly(bn.backward(dy, num_threads=threads), expected(p.frozen_dx), 4, "dx of frozen statistics")
    assert_exactly(bn.grad_gamma, dgamma, 2, "dgamma of frozen statistics")
    assert_exactly(bn.grad_beta, dbeta, 1, "dbeta of frozen statistics")
    scale, shift = bn.to_affine()
    assert_exactly(scale, p.g, 4, "scale")
    assert_exactly(shift, p.b - p.g * mean, 4, "shift")


# ---- shapes, dtypes, places -----------------------------------------------------------------------------------------


def pairs(wanted=lambda size: True):
    """Return (case, dtype) of all cases whose size is wanted."""
    cases = [case for case in SHAPES if wanted(math.prod(case[0]))]
    return [pair for pair in itertools.product(cases, DTYPES) if has_exact_shift(*pair)]


@pytest.mark.parametrize(("case", "dtype"), pairs(), ids=name)
def test_every_shape_and_dtype(case, dtype):
    for threads, (activation, with_residual) in zip((1, 2, 3, 7), VARIANTS, strict=True):
        check(case, dtype, activation, with_residual, threads)


PLACES = {  # of arrays of any number of dimensions
    "Fortran order": lambda ndim: Place(order=tuple(range(ndim))[::-1]),
    "channels last": lambda ndim: Place(order=(0, *range(2, ndim), 1)),
    "batch last": lambda ndim: Place(order=(*range(1, ndim), 0)),
    "reversed": lambda ndim: Place(steps=(-1,) * ndim),
    "channels reversed": lambda ndim: Place(steps=(1, -1) + (1,) * (ndim - 2)),
    "every other of everything": lambda ndim: Place(steps=(2,) * ndim),
    "strided both ways": lambda ndim: Place(steps=(-2, 3) + (-1,) * (ndim - 2)),
    "misaligned": lambda ndim: Place(misaligned=True),
    "byte-swapped": lambda ndim: Place(swapped=True),
    "all at once": lambda ndim: Place(tuple(range(ndim))[::-1], (2, -1) + (3,) * (ndim - 2), True, True, True),
}


@pytest.mark.parametrize(("case", "dtype"), pairs(lambda size: size <= ONE_BLOCK), ids=name)
def test_every_place_in_memory(case, dtype):
    """All arrays of a call at one place, and each at its own."""
    kinds = list(PLACES.values())
    for first, apart in itertools.product(range(len(kinds)), (0, 1)):

        def place(a, axis, which, first=first, apart=apart):
            if which is None:
                return a, axis
            return kinds[(first + apart * which) % len(kinds)](a.ndim).put(a), axis

        check(case, dtype, *VARIANTS[(first + apart) % 4], 2, place)


def spread_out(a, axis, which):
    """Return the array with as much memory between its images or rows as they take."""
    memory = np.zeros((2 * len(a), *a.shape[1:]), a.dtype)
    memory[::2] = a
    return memory[::2], axis


VIEWS = {
    "axis moved": lambda a, axis, which: (np.moveaxis(a, axis, 0), 0),
    "batch reversed": lambda a, axis, which: (a[(slice(None, None, -1),) * axis], axis),
    "spread out": spread_out,
    "misaligned": lambda a, axis, which: (a if which is None else Place(misaligned=True).put(a), axis),
    "byte-swapped": lambda a, axis, which: (a if which is None else Place(swapped=True).put(a), axis),
}


@pytest.mark.parametrize(("case", "dtype"), pairs(lambda size: size > ONE_BLOCK), ids=name)
def test_several_blocks_of_a_view(case, dtype):
    for number, view in enumerate(VIEWS.values()):
        check(case, dtype, *VARIANTS[-1 - number % 2], 3, view)


# Powers of two, so that blocks are such too: merging means of any kind is exact, if they have few bits
POWERS = [(65_536, 4), (2048, 128), (512, 4096), (4096, 2, 64), (8, 2, 32_768), (64, 2, 512)]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", POWERS, ids=str)
def test_blocks_of_different_means(shape, dtype):
    rng = np.random.default_rng(7)
    x = rng.integers(-2, 3, shape) + rng.integers(-50, 51, (shape[1], *(1,) * (len(shape) - 2)))
    values = np.moveaxis(x, 1, 0).reshape(shape[1], -1)
    count, total, squares = values.shape[1], values.sum(axis=1), (values * values).sum(axis=1)
    _, saved = batch_norm_train(x.astype(dtype), num_threads=2)
    moments = Moments.of(x.astype(dtype), num_threads=3)
    for mean, var in ((saved.mean, saved.var), (moments.mean, moments.var())):
        assert_exactly(mean, total, count, "mean")
        assert_exactly(var, squares * count - total * total, count * count, "var")


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_blocks_of_different_sizes_and_means(dtype):
    """Three runs are a block and the last one another: a quarter of the values, 4 above the others."""
    rng, mean = np.random.default_rng(8), np.array([3, -50])
    v = rng.permuted(np.broadcast_to(balanced(5000), (4, 2, 5000)), axis=2)
    x = v + mean[:, None] + np.array([0, 0, 0, 4])[:, None, None]
    _, saved = batch_norm_train(x.astype(dtype), num_threads=2)
    moments = Moments.of(x.astype(dtype))
    for found, var in ((saved.mean, saved.var), (moments.mean, moments.var())):
        assert_exactly(found, mean + 1, 1, "mean")
        assert_exactly(var, np.array([5, 5]), 1, "var")
