"""The ends: more elements than 2³¹, strides beyond 2³², the largest numbers and the smallest, NaN, nothing at all."""

import itertools
import math
import os
import sys

import ml_dtypes
import numpy as np
import pytest
import reference
from numpy.lib.stride_tricks import as_strided
from reference import assert_within, bits, expand
from strategies import BFLOAT16, BLOCK_NCS, DTYPES, FLOAT16, FLOAT32, FLOAT64, KINDS, Place, numbers

import fastbn
from fastbn import BatchNorm, Moments, batch_norm_backward, batch_norm_infer, batch_norm_train, norm

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="wants files with holes, as on Linux")
V = np.array([2, -2, 1, -1, 0, 2, -2, 0])  # mean 0, variance 9/4


# ---- more elements than 32 bits count -------------------------------------------------------------------------------

# Name: (a small array of (n, c, s), the shape that it is repeated to, channel axis). One block is as the next.
REPEATED = {
    "images": (np.resize(V, (1, 2, BLOCK_NCS)), (2**16 + 3, 2, BLOCK_NCS), 1),
    "short runs": (np.resize(V, (1, 2, 8)), (2**27 + 8, 2, 8), 1),
    "every element": (np.resize(V, (2, 2**15, 1)), (2, 2**15, 2**15 + 1), 0),
    "of one channel, 2**32 values": (np.resize(V, (1, 1, 2**16)), (2**16 + 1, 1, 2**16), 1),
}


@pytest.mark.parametrize("case", REPEATED)
def test_moments_of_more_values_than_32_bits_count(case):
    small, shape, axis = REPEATED[case]
    x = np.broadcast_to((small + 3).astype(np.float16), shape)
    count = x.size // shape[axis]
    moments = Moments.of(x, axis)
    assert x.size > 2**31
    assert moments.count == count
    assert moments.mean.tolist() == [3] * shape[axis]
    assert moments.m2.tolist() == [count * 9 / 4] * shape[axis]


def test_sums_of_a_gradient_of_more_values_than_32_bits_count():
    """The first half of a backward pass, which writes nothing: with ε = 7/4, x̂ = v/2."""
    shape = (2**16 + 3, 2, BLOCK_NCS)
    x, dy = (np.broadcast_to(np.resize(v, (1, *shape[1:])).astype(np.float16), shape) for v in (V + 3, V + 1))
    count, vectors = x.size // 2, [np.full(2, v) for v in (3.0, 2.25, 0.5)]
    saved = norm.Saved(x, 1, *vectors, count, None, None, FLOAT32)
    dgamma, dbeta, _ = norm.backward_sums(dy, saved)
    assert dbeta.tolist() == [count] * 2
    assert dgamma.tolist() == [count * 9 / 8] * 2


def memory_available():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if sys.platform.startswith("linux") else 0


@pytest.mark.slow
@pytest.mark.skipif(memory_available() < 12 << 30, reason="wants 12 GiB of free memory for an output of 4 and its sums")
def test_results_of_more_elements_than_32_bits_count():
    """All of one channel: forward with residual and ReLU (of 2³¹ bits), backward and inference, into one array."""
    images, row = 2**16 + 3, (1, 2 * BLOCK_NCS)
    out = np.empty((images, *row), np.float16)
    x, dy, residual = (
        np.broadcast_to(np.resize(v, (1, *row)).astype(np.float16), out.shape) for v in (V + 3, V + 1, 0 * V + 0.5)
    )
    assert out.size > 2**31

    def holds(expected):
        image = np.resize(expected, row).astype(np.float16).view(np.int64)  # bits, four at once
        return all((out[i : i + 64].view(np.int64) == image).all() for i in range(0, images, 64))

    y = np.maximum(V / 2 + 0.5, 0)
    _, saved = batch_norm_train(x, eps=1.75, residual=residual, activation="relu", out=out)
    assert holds(y)
    out[:] = 7
    batch_norm_infer(x, saved.mean, saved.var, eps=1.75, residual=residual, activation="relu", out=out)
    assert holds(y)
    saved.bits, saved.relu, saved.has_residual = None, False, False  # no memory for the residual's gradient
    gradients = batch_norm_backward(dy, saved, out=out)
    assert saved.count == out.size
    assert (gradients.dbeta.tolist(), gradients.dgamma.tolist()) == ([out.size], [out.size * 9 / 8])
    assert holds((V - V * 9 / 16) / 2)


# ---- strides beyond 32 bits -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    """64 GiB, all holes but for what the tests write."""
    path = tmp_path_factory.mktemp("far") / "holes"
    yield np.memmap(path, np.uint8, mode="w+", shape=2**36)
    path.unlink()


FAR = [  # (shape, axis whose stride is large); channels are on axis 1
    ((9, 3, 20), 0),
    ((9, 3, 20), 1),
    ((3, 2, 300), 0),
    ((3, 2, 300), 1),
    ((2, 2, BLOCK_NCS + 40), 1),
    ((9, 40), 0),
    ((9, 4, 5, 6), 0),
]


@linux
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step", [2**31 + 64, -(2**32) - 128])
def test_strides_beyond_32_bits(holes, step, dtype):
    """Of every array of a call; the bits are those of arrays without gaps."""
    rng = np.random.default_rng(1)
    for shape, axis in FAR:

        def far(values, number, shape=shape, axis=axis):
            strides = list(np.empty(shape, dtype).strides)
            strides[axis] = step
            start = (number + 1) * 2**20 + (0 if step > 0 else -step * (shape[axis] - 1))
            view = as_strided(holes[start:].view(np.uint8)[: dtype.itemsize].view(dtype), shape, strides)
            view[...] = values
            return view

        def near(values, axis=axis):  # in the same direction
            order = (slice(None),) * axis + (slice(None, None, int(math.copysign(1, step))),)
            return np.ascontiguousarray(values[order])[order]

        values = [rng.normal(size=shape).astype(dtype) for _ in range(3)]
        found = []
        for put in (far, lambda values, number: near(values)):
            x, dy, residual = (put(v, number) for number, v in enumerate(values))
            y, inferred, dx = (put(np.zeros(shape, dtype), number) for number in (3, 4, 5))
            options = {"residual": residual, "activation": "relu"}
            _, saved = batch_norm_train(x, out=y, **options)
            batch_norm_infer(x, saved.mean, saved.var, out=inferred, **options)
            gradients, moments = batch_norm_backward(dy, saved, out=dx), Moments.of(x)
            results = [y, inferred, dx, gradients.dresidual, gradients.dgamma, gradients.dbeta, saved.mean, saved.var]
            found.append([bits(a) for a in (*results, moments.mean, moments.m2)])
        assert found[0] == found[1], shape


# ---- few values, and none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((2, 40), 1), ((3, 40), 1), ((40, 2), 0), ((1, 40, 2), 1)], ids=str)
def test_two_or_three_values_per_channel(shape, axis, kind, dtype):
    rng = np.random.default_rng(2)
    x = numbers(rng, kind, shape, axis, dtype)
    expected = reference.train(x, axis=axis)
    y, saved = batch_norm_train(x, axis=axis)
    assert_within(y, expected.y, reference.y_bound(expected, None, None, dtype, axis), "y")
    dy = rng.normal(size=shape).astype(dtype)
    gradients, exact = batch_norm_backward(dy, saved), reference.backward(dy, x, axis=axis)
    bound = reference.backward_bound(exact, expected, None, dtype, axis, gradients.dgamma.dtype)
    assert_within(gradients.dx, exact.dx, bound.dx, "dx")
    assert_within(gradients.dgamma, exact.dgamma, bound.dgamma, "dgamma")


@pytest.mark.parametrize("place", [Place(), Place((2, 1, 0)), Place(steps=(2, -1, -3)), Place(swapped=True)], ids=str)
@pytest.mark.parametrize("shape", [s for s in itertools.product((0, 2), repeat=3) if 0 in s], ids=str)
def test_nothing_anywhere(shape, place):
    """Any axis of no length may be the channels' or not; nothing is written, and vectors have the channels' length."""
    x = place.put(np.zeros(shape, np.float32))
    for axis, c in enumerate(shape):
        y, saved = batch_norm_train(x, np.ones(c), None, axis=axis, activation="relu", residual=x)
        gradients = batch_norm_backward(x, saved)
        inferred = batch_norm_infer(np.broadcast_to(x, shape), np.ones(c), np.ones(c), axis=axis)
        assert y.shape == inferred.shape == gradients.dx.shape == gradients.dresidual.shape == shape
        assert gradients.dgamma.tolist() == gradients.dbeta.tolist() == [0] * c
        moments = Moments(c, axis=axis).update(x).merge(Moments.of(x, axis))
        assert (moments.count, moments.m2.tolist()) == (0, [0] * c)


def test_parameters_of_no_elements():
    params = [np.zeros((0, 3), np.float32), np.zeros(2), np.zeros(0, np.float16)]
    opt = fastbn.optim.Adam(params, lr=0.5, clip_global_norm=1.0)
    opt.step([np.zeros_like(p) for p in params], num_threads=3)
    opt.step([np.zeros((0, 3), np.float32), None, None])
    assert opt.state_dict()["step"] == 2
    assert not params[1].any()


# ---- the largest and the smallest numbers ---------------------------------------------------------------------------


def ends(dtype):
    """Return the largest number, the smallest normal and the smallest of all."""
    info = ml_dtypes.finfo(dtype)
    return [float(v) for v in (info.max, info.tiny, info.smallest_subnormal)]


CONSTANT_SHAPES = [
    (50, 3), (7, 3), (2, 3), (20, 1), (40_000, 2), (3, 3, 5), (8, 2, 20), (9, 3, 11), (2, 3, 300), (1, 2, 40_000)
]  # fmt: skip


@pytest.mark.parametrize("eps", [5e-324, 1e-5, 1e300])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("dtype", "which"), list(itertools.product(DTYPES, range(3))), ids=str)
def test_a_constant_of_any_size(dtype, which, sign, eps):
    """Exactly β, in training and inference, with any ε; no gradient of it is NaN."""
    value = sign * ends(dtype)[which]
    for shape in CONSTANT_SHAPES:
        c = shape[1]
        x, beta = np.full(shape, value, dtype), np.array([0.5, -3, 0])[:c]
        expected = bits(np.broadcast_to(expand(beta, x.ndim, 1), shape).astype(dtype))
        y, saved = batch_norm_train(x, np.full(c, 2.0), beta, eps=eps)
        assert bits(y) == expected, shape
        assert bits(batch_norm_infer(x, saved.mean, saved.var, np.full(c, 2.0), beta, eps=eps)) == expected
        moments = Moments.of(x)
        for mean, m2 in ((saved.mean, saved.var), (moments.mean, moments.m2)):
            assert mean.tolist() == [value] * c
            assert not m2.any()
        gradients = batch_norm_backward(np.ones_like(x), saved)
        assert not np.isnan(gradients.dx.astype(np.float64)).any()
        assert not gradients.dgamma.any()
        assert gradients.dbeta.tolist() == [x.size // c] * c


# ε, a power of 4 beside which σ² vanishes, or (float16) to which it adds up to one
TINY = {FLOAT16: 2.0**-47, BFLOAT16: 2.0**-200, FLOAT32: 2.0**-200, FLOAT64: 2.0**-1000}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(60, 3), (2, 3, 300), (9, 3, 8), (6, 1), (1, 3, 19_200)], ids=str)
def test_subnormals_exactly(shape, dtype):
    """x = v times the smallest number, v of mean 0 and variance 2: no bit is lost on the way."""
    v = np.moveaxis(np.resize([2, -1, -1, -2, 1, 1], (shape[1], *np.delete(shape, 1))), 0, 1)
    smallest, eps = ends(dtype)[2], TINY[dtype]
    y, saved = batch_norm_train((v * smallest).astype(dtype), eps=eps)
    assert np.array_equal(y.astype(np.float64), v * smallest / math.sqrt(eps + 2 * smallest**2))
    assert not saved.mean.any()
    assert saved.var.tolist() == [2 * smallest**2] * shape[1]


def all_values(dtype):
    """Return every value of a half type; of the others every exponent, with any significand, 0 and infinity."""
    if dtype.itemsize == 2:
        return np.arange(2**16, dtype=np.uint16).view(dtype)
    values = np.frombuffer(np.random.default_rng(3).bytes(2**16 * dtype.itemsize), dtype).copy()
    values[:4] = 0.0, -0.0, np.inf, -np.inf
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("exponent", [0, -9, 9])
@pytest.mark.parametrize("shape", [(1024, 64), (4, 16, 1024)], ids=str)
def test_every_number_comes_through(shape, exponent, dtype):
    """y = γx and dx = γ·dy with a power of two: subnormal and infinite results are rounded as IEEE 754 says."""
    x, c, gamma = all_values(dtype).reshape(shape), shape[1], 2.0**exponent
    real = FLOAT64 if dtype == FLOAT64 else FLOAT32
    with np.errstate(all="ignore"):
        expected = x.astype(real) * real.type(gamma)
        expected, missing, zeros = expected.astype(dtype), np.isnan(expected), x.astype(real) == 0
    bn = BatchNorm(c, eps=1.0, dtype=np.float64).eval()
    bn.gamma[:], bn.running_var[:] = gamma, 0
    y = batch_norm_infer(x, np.zeros(c), np.ones(c), np.full(c, gamma), eps=0.0)
    bn(np.zeros_like(x))
    for result in (y, bn.backward(x), bn(x)):
        assert np.array_equal(np.isnan(result.astype(real)), missing)
        assert np.array_equal(result[~missing].astype(real), expected[~missing].astype(real))
    assert not np.signbit(y[zeros].astype(real)).any()  # -0 + β is 0 where β is 0


@pytest.mark.parametrize(("dtype", "huge"), [(FLOAT32, 3.3e38), (FLOAT64, 1e300), (BFLOAT16, 3.3e38)], ids=str)
@pytest.mark.parametrize("shape", [(40, 5), (9, 5, 8), (2, 5, 300)], ids=str)
def test_a_channel_beyond_the_limits_leaves_the_others_alone(shape, dtype, huge):
    """±1e300 in float64: its squares overflow. The others come out as without it, nothing warns."""
    rng = np.random.default_rng(4)
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    beyond = x.copy()
    beyond[:, 2] = np.where(rng.random(beyond[:, 2].shape) < 0.5, huge, -huge)
    found = []
    for data in (x, beyond):
        y, saved = batch_norm_train(data)
        gradients, moments = batch_norm_backward(dy, saved), Moments.of(data)
        vectors = (saved.mean, saved.var, saved.rstd, gradients.dgamma, gradients.dbeta, moments.mean, moments.m2)
        found.append([bits(np.delete(a, 2, 1)) for a in (y, gradients.dx)] + [bits(np.delete(v, 2)) for v in vectors])
    assert found[0] == found[1]


# ---- NaN and infinity -----------------------------------------------------------------------------------------------

PLACES = {
    "contiguous": Place(),
    "channels last": Place(order=(0, 2, 1)),
    "strided": Place(steps=(2, -3, 1)),
    "strided both ways": Place(steps=(1, 2, 2)),
    "misaligned": Place(misaligned=True),
    "swapped": Place(swapped=True),
}
SPOILT = ("x", "gamma", "beta", "residual", "dy", "mean", "var")


def everything(a, activation):
    """Return all results of arguments `a`, each array with its channel axis."""
    options = {"activation": activation, "residual": a["residual"]}
    y, saved = batch_norm_train(a["x"], a["gamma"], a["beta"], **options)
    gradients, moments = batch_norm_backward(a["dy"], saved), Moments.of(a["x"])
    bn = BatchNorm(len(a["gamma"]), activation=activation, dtype=np.float64)
    bn.gamma[:], bn.beta[:], bn.running_mean[:], bn.running_var[:] = a["gamma"], a["beta"], a["mean"], a["var"]
    results = [(y, 1), *((g, 1) for g in (gradients.dx, gradients.dresidual))]
    results += [(bn.eval()(a["x"], residual=a["residual"]), 1), (bn.backward(a["dy"]), 1), (bn.grad_residual, 1)]
    bn.train()(a["x"], residual=a["residual"])
    vectors = [saved.mean, saved.var, saved.rstd, gradients.dgamma, gradients.dbeta, moments.mean, moments.m2]
    vectors += [bn.grad_gamma, bn.grad_beta, bn.running_mean, bn.running_var, *bn.to_affine()]
    return results + [(v, 0) for v in vectors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_not_finite_stays_in_its_channel(spoilt, place, dtype):
    """In any argument; the others have the bits that they have without it."""
    rng = np.random.default_rng(5)
    for shape, activation in itertools.product([(9, 5, 8), (2, 6, 300), (30, 19, 1)], (None, "relu")):
        c, channel = shape[1], int(rng.integers(shape[1]))
        clean = {key: rng.normal(size=shape).astype(dtype) for key in ("x", "residual", "dy")}
        clean |= {key: rng.uniform(0.5, 2, c) for key in ("gamma", "beta", "mean", "var")}
        expected = [bits(np.delete(a, channel, axis)) for a, axis in everything(placed(clean, place), activation)]
        for bad in (np.nan, np.inf, -np.inf):
            if (spoilt, bad) == ("var", -np.inf):
                continue  # refused
            dirty = clean | {spoilt: clean[spoilt].copy()}
            dirty[spoilt][(-1, channel, 0) if dirty[spoilt].ndim > 1 else channel] = bad
            found = [bits(np.delete(a, channel, axis)) for a, axis in everything(placed(dirty, place), activation)]
            assert found == expected, (shape, activation, bad)


def placed(arguments, place):
    """Return the arguments with their arrays of data in that place."""
    return {key: PLACES[place].put(a) if a.ndim > 1 else a for key, a in arguments.items()}
