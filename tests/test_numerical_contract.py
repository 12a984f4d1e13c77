"""The numerical contract: the error bound on any data, the same bits everywhere, NaN confined, the FPU left alone."""

import hashlib
import itertools
import json
import math
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import run_python
from reference import U32, assert_within, bits, spread
from strategies import (
    BFLOAT16,
    BLOCK_NCS,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    KINDS,
    LANES,
    PER_THREAD,
    numbers,
    parameters,
    problems,
    shapes,
)

import fastbn
from fastbn import Moments, batch_norm_backward, batch_norm_infer, batch_norm_train, norm
from fastbn._core import cpu, dispatch

EPS = 1e-5


def name(value):
    """A pytest id for a (shape, axis) or a dtype."""
    if isinstance(value, tuple):
        return f"{'x'.join(map(str, value[0]))} axis {value[1]}"
    return str(value)


# ---- 1, 2: the error bound ----------------------------------------------------------------------------------------


def check_bounds(x, gamma, beta, dy, *, axis, eps=EPS, activation=None, residual=None, num_threads=None):
    """Hold a forward and a backward pass to the bounds of the contract; all arrays are C-contiguous."""
    dtype, options = x.dtype, {"axis": axis, "eps": eps, "activation": activation, "residual": residual}
    y, saved = batch_norm_train(x, gamma, beta, **options, num_threads=num_threads)
    expected = reference.train(x, gamma, beta, **options)
    assert_within(y, expected.y, reference.y_bound(expected, gamma, beta, dtype, axis, residual=residual), "y")

    if dtype == FLOAT64:
        assert_within(saved.var, expected.var, reference.var64_bound(expected.mean, expected.var), "var")
    else:  # statistics of half types are float64 as well
        t = spread(expected, dtype, axis)
        assert_within(saved.mean, expected.mean, 4 * U32 * t * np.sqrt(expected.var), "mean")
        assert_within(saved.var, expected.var, 8 * U32 * expected.var, "var")
        assert_within(saved.rstd, expected.rstd, 4 * U32 * expected.rstd, "rstd")

    # Where y is within its bound of 0, ReLU may pass or not: the library's own sign decides
    passes = True if activation is None else ~(y <= 0)
    expected_gradients = reference.backward(dy, x, gamma, axis=axis, eps=eps, passes=passes)
    gradients = batch_norm_backward(dy, saved, num_threads=num_threads)
    bound = reference.backward_bound(expected_gradients, expected, gamma, dtype, axis, gradients.dgamma.dtype)
    assert_within(gradients.dbeta, expected_gradients.dbeta, bound.dbeta, "dbeta")
    assert_within(gradients.dgamma, expected_gradients.dgamma, bound.dgamma, "dgamma")
    assert_within(gradients.dx, expected_gradients.dx, bound.dx, "dx")
    if residual is not None:
        assert bits(gradients.dresidual) == bits(np.where(passes, dy, np.zeros((), dtype)))


def make(case, kind, dtype, seed=0):
    """Return x, gamma, beta, dy of a shape and a kind of numbers."""
    (shape, axis), rng = case, np.random.default_rng(seed)
    x = numbers(rng, kind, shape, axis, dtype)
    gamma, beta = (parameters(rng, shape[axis], FLOAT64 if dtype == FLOAT64 else FLOAT32) for _ in range(2))
    return x, gamma, beta, rng.normal(size=shape).astype(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CHANNELS_FIRST + CHANNELS_LAST, ids=name)
def test_float32_is_within_its_bound_on_any_data(case, kind):
    check_bounds(*make(case, kind, FLOAT32), axis=case[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=name)
@pytest.mark.parametrize("case", CHANNELS_FIRST[1::3] + CHANNELS_LAST[::3], ids=name)
def test_half_types_are_within_the_bound_of_float32_and_half_a_unit(case, dtype, kind):
    check_bounds(*make(case, kind, dtype), axis=case[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CHANNELS_FIRST[::2] + CHANNELS_LAST[::2], ids=name)
def test_float64_is_within_its_bound_on_any_data(case, kind):
    check_bounds(*make(case, kind, FLOAT64), axis=case[1])


@pytest.mark.parametrize("channels_first", [True, False])
def test_float64_does_not_drift(channels_first):
    """Additions of one and the same number all err in one direction; nothing hides that in float64."""
    for seed in range(5):
        x, _, _, dy = make(((BLOCK_NCS, 8), 1), "two values", FLOAT64, seed)
        if channels_first:
            x, dy = (np.ascontiguousarray(a.T)[None] for a in (x, dy))
        check_bounds(x, None, None, dy, axis=1, eps=1e-300)


@given(problems(kinds=sorted(KINDS), dense=True))
def test_any_problem_is_within_the_bound(p):
    check_bounds(
        p.x, p.gamma, p.beta, p.dy, axis=p.axis, eps=p.eps, activation=p.activation, residual=p.residual,
        num_threads=p.num_threads,
    )  # fmt: skip


# Eight values that a search found, to be repeated: every sum of eight rounds to the same side. The first one is what a
# channel is shifted by; (that - mean)²/var is 0.1, 0.25, 0.5, 1 and 2.
PATTERNS = [
    [-0.56777805, 0.8466897, -0.5741163, -0.7527887, -0.56777805, -0.57358634, -0.5687544, -0.56874985],
    [0.0, -1.4181805, 0.07678667, -0.006495474, 0.0, 0.14848608, -0.019556137, 0.0014267549],
    [0.0, -0.031191768, -0.18219712, -0.031191768, 0.0, 0.0, -0.03749221, -1.0006458],
    (-0.86036015, 1.1433264, -0.5026952, -0.5026952, -0.86036015, -0.5026952, -0.48871425, -0.8350258),
    (0.0, -0.26605651, -0.09354095, -2.004658, 0.0, -0.024991795, -0.27816531, -2.0010920),
    (-0.75516129, 1.24568427, -0.7665824, -0.05855098, -0.75516129, 0.0041672294, 0.0041672294, 1.24568427),
    (0.0, -0.63313484, -0.00011822581, -1.51364994, 0.0, -1.41674697, -0.50759673, -0.48659387),
    (-0.05147666, -1.68048787, -1.46874654, -2.56885695, -0.05147666, -1.90013278, -0.6389479, -2.05671263),
    (0.0, -1.03047264, -1.00081003, -1.04970586, 0.0, -0.86196131, -0.19116491, -1.05792928),
]


@pytest.mark.parametrize("layout", ["rows", "short runs", "long runs"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sums_that_always_round_to_one_side(pattern, layout):
    p = np.array(pattern, np.float32)
    if layout == "long runs":
        x = np.tile(p.repeat(LANES), 128)[None, None]  # values that are LANES apart are added
    else:
        x = np.tile(p, 16)[:, None, None].repeat(*((256, 1) if layout == "rows" else (3, 1)))
        x = x[..., 0] if layout == "rows" else x[:64].repeat(49, 2)
    x = np.ascontiguousarray(x)
    dy = np.random.default_rng(15).normal(size=x.shape).astype(np.float32)
    check_bounds(x, None, None, dy, axis=1, eps=1e-30)


@pytest.mark.parametrize("mean", [0.0, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("rows", [8, 9, 16, 33, 100])
def test_small_batches_of_many_channels(rows, mean):
    """Where the mean is about a standard deviation, some channel of 20,000 has the worst of what is likely."""
    rng = np.random.default_rng(rows)
    x = (rng.normal(size=(rows, 20_000)) + mean).astype(np.float32)
    check_bounds(x, None, None, rng.normal(size=x.shape).astype(np.float32), axis=1)


# Each with |x - K| where float32's squares leave its range, or are about to
SCALES = [1e-38, 1e-30, 1e-25, 1e-19, 1e-18, 1e18, 1e19, 1e25, 1e30, 1e34]


@pytest.mark.parametrize("scale", [*SCALES, None])
@pytest.mark.parametrize("case", CHANNELS_FIRST[1::5] + CHANNELS_LAST[1::4], ids=name)
def test_data_at_the_ends_of_float32(case, scale):
    """Or with channels of wildly different scales in one array, of which some are read again."""
    (shape, axis), rng = case, np.random.default_rng(16)
    scale = 10.0 ** rng.uniform(-36, 33, shape[axis]) if scale is None else scale
    for kind in ("plain", "two values", "step", "sparse", "const but one"):
        if kind == "sparse":  # dead channels, and nearly dead ones
            x = np.where(rng.random(shape) < 10.0 ** rng.uniform(-4, -0.5), rng.normal(size=shape), 0)
        elif kind == "const but one":
            x = np.full(shape, 1 / 3)
            x[tuple(rng.integers(n) for n in shape[:1]) + (slice(None),) * (len(shape) - 1)] *= 1.5
        else:
            x = numbers(rng, kind, shape, axis, FLOAT64) / (1e3 if kind == "step" else 1)
        x = (x * reference.expand(scale, len(shape), axis)).astype(np.float32)
        check_bounds(x, None, None, rng.normal(size=shape).astype(np.float32), axis=axis)


@pytest.mark.parametrize(
    "value",
    [
        *(1e300, -3e200, 1e160, 1e-170, 1e-200, 1e-300),
        5e-324,
    ],
)
def test_a_float64_constant_whose_square_leaves_the_range(value):
    for shape in ((50, 3), (7, 3), (2, 3, 300), (9, 3, 11), (3, 3, 5), (20, 1)):
        x = np.full(shape, value * 0.7 if abs(value) > 1e-320 else value)
        y, saved = batch_norm_train(x)
        moments = Moments.of(x)
        assert not y.any()
        for mean, m2 in ((saved.mean, saved.var), (moments.mean, moments.m2)):
            assert (mean == x.flat[0]).all()
            assert not m2.any()


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5, 1e6])
@pytest.mark.parametrize("std", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("shape", [(64, 40, 49), (3136, 40)], ids=str)
def test_a_mean_far_beyond_the_standard_deviation_costs_nothing(shape, std, ratio):
    """The float32 bound knows no |mean|: here x itself resolves only a few steps of its standard deviation."""
    rng = np.random.default_rng(int(ratio))
    x = ((rng.normal(size=shape) + ratio) * std).astype(np.float32)
    gamma, beta = parameters(rng, 40, FLOAT32), parameters(rng, 40, FLOAT32)
    check_bounds(x, gamma, beta, rng.normal(size=shape).astype(np.float32), axis=1, eps=1e-5 * std * std)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("value", [0.0, -0.0, 1 / 3, -1e4, 6e4, 1e-7])
@pytest.mark.parametrize("case", CHANNELS_FIRST[::4] + CHANNELS_LAST[::4], ids=name)
def test_a_constant_channel_is_exactly_beta(case, value, dtype):
    (shape, axis), rng = case, np.random.default_rng(1)
    x = np.full(shape, value, dtype)
    gamma, beta = rng.normal(size=(2, shape[axis])).astype(np.float32)
    y, saved = batch_norm_train(x, gamma, beta, axis=axis)
    expected = np.broadcast_to(reference.expand(beta, x.ndim, axis), shape).astype(dtype)
    assert bits(y) == bits(expected)
    assert not saved.var.any()
    assert np.array_equal(saved.mean, np.full(shape[axis], np.asarray(value, dtype), np.float64))


@given(
    st.floats(-1e150, 1e150),
    shapes(max_size=3000),
    st.sampled_from(DTYPES),
    st.sampled_from([1e-5, 1.0]),
    st.booleans(),
)
def test_any_constant_is_exactly_beta(value, shape_and_axis, dtype, eps, relu):
    (shape, axis), beta = shape_and_axis, 1 / 3
    constant = np.asarray(value).clip(-6e4, 6e4).astype(dtype) if dtype.itemsize < 8 else np.asarray(value)
    c = shape[axis]
    options = {"axis": axis, "eps": eps, "activation": "relu" if relu else None}
    y, saved = batch_norm_train(np.full(shape, constant), np.full(c, 1e3), np.full(c, beta), **options)
    assert bits(y) == bits(np.full(shape, beta).astype(dtype))
    assert np.array_equal(saved.mean, np.full(c, constant, np.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("axis", [0, 1])
def test_inference_is_within_the_bound_for_any_statistics(axis, dtype):
    """Also where x and mean are far from each other, and far from 0."""
    rng = np.random.default_rng(2)
    for _ in range(30):
        shape = tuple(rng.integers(1, 40, 3))
        c = shape[axis]
        std = 10.0 ** rng.uniform(-2, 2, c)
        mean = std * rng.choice([0, 1, 100, 1e6 if dtype.itemsize > 2 else 10], c) * rng.normal(size=c)
        x = rng.normal(size=shape) * rng.choice([1, 1000 if dtype.itemsize > 2 else 10])
        x = (reference.expand(mean, 3, axis) + x * reference.expand(std, 3, axis)).astype(dtype)
        gamma, beta, eps = parameters(rng, c, FLOAT32), parameters(rng, c, FLOAT32), rng.choice([0.0, 1e-5, 1.0])
        residual = rng.choice([None, 1.0])
        residual = None if residual is None else rng.normal(size=shape).astype(dtype)
        expected = reference.infer(x, mean, std**2, gamma, beta, axis=axis, eps=eps, residual=residual)
        bound = reference.y_bound(expected, gamma, beta, dtype, axis, residual=residual)
        y = batch_norm_infer(x, mean, std**2, gamma, beta, axis=axis, eps=eps, residual=residual)
        assert_within(y, expected.y, bound, "y")


def beyond(reason):
    """The README's limits: what a channel computes with leaves the range of the dtype."""
    return pytest.mark.xfail(strict=True, reason=f"a limit, as the README says: {reason}")


@pytest.mark.parametrize(
    ("numbers", "dtype", "gamma", "eps"),
    [
        ([3.0, 3.0, 3.0], FLOAT32, 1.0, 1e-80),
        pytest.param([1e-40, 2e-40, 4e-40], FLOAT32, 1.0, 1e-100, marks=beyond("rstd is infinite in float32")),
        pytest.param([1e30, 2e30, 4e30], FLOAT32, 1e-10, 1e-5, marks=beyond("γ·rstd is subnormal in float32")),
        pytest.param([-3.3e38] * 9 + [3.3e38], FLOAT32, 1.0, 1e-5, marks=beyond("x - μ overflows in float32")),
        pytest.param([1e200, 2e200, 4e200], FLOAT64, 1.0, 1e-5, marks=beyond("(x - μ)² overflows in float64")),
    ],
    ids=[
        "constant, no eps to speak of",
        "tiny, no eps to speak of",
        "huge, small gamma",
        "up to the largest",
        "squares",
    ],
)
def test_the_ends_of_the_range(numbers, dtype, gamma, eps):
    x, gamma = np.array(numbers, dtype)[:, None], np.array([gamma])
    y, _ = batch_norm_train(x, gamma, eps=eps)
    expected = reference.train(x, gamma, eps=eps)
    assert_within(y, expected.y, reference.y_bound(expected, gamma, None, dtype, 1), "y")


# ---- 3: the same bits ---------------------------------------------------------------------------------------------

THREADS = [1, 2, 3, 7]


@contextmanager
def running(isa):
    """Run fastbn with the kernels of an instruction set."""
    before, norm.kernels = norm.kernels, dispatch.load("kernels", isa)
    try:
        yield
    finally:
        norm.kernels = before


def results(x, gamma, beta, dy, residual, axis, activation, num_threads=None):
    """Return all that the functions compute, as {name: array}."""
    options = {"axis": axis, "activation": activation, "residual": residual, "num_threads": num_threads}
    y, saved = batch_norm_train(x, gamma, beta, **options)
    inferred = batch_norm_infer(x, saved.mean, saved.var, gamma, beta, **options)
    gradients = batch_norm_backward(dy, saved, num_threads=num_threads)
    moments = Moments.of(x, axis, num_threads=num_threads)
    named = {"y": y, "mean": saved.mean, "var": saved.var, "rstd": saved.rstd, "inferred": inferred, "dx": gradients.dx}
    named |= {"dgamma": gradients.dgamma, "dbeta": gradients.dbeta, "m2": moments.m2, "moments' mean": moments.mean}
    return named if gradients.dresidual is None else named | {"dresidual": gradients.dresidual}


def digests(*args, **kwargs):
    return {key: hashlib.sha256(bits(a)).hexdigest() for key, a in results(*args, **kwargs).items()}


def assert_same_bits(*args):
    """Compare all threads on all instruction sets that this CPU runs."""
    first = digests(*args, num_threads=1)
    for isa in dispatch.available():
        with running(isa):
            for threads in THREADS:
                assert digests(*args, num_threads=threads) == first, f"{isa}, {threads} threads"


VARIANTS = [(None, False), ("relu", False), (None, True), ("relu", True)]
SAME_BITS = [
    ((2, 3, 7), 1),
    ((3, 24, 15), 1),
    ((2, 16, 4, 4), 1),
    ((9, 13, 17), 1),
    ((5, 50, 7, 7), 1),
    ((16, 50, 7, 7), 1),
    ((1800, 3, 49), 1),
    ((60, 3, 300), 1),
    ((2, 2, 2 * BLOCK_NCS + 5), 1),
    ((1, 1, 50_000), 1),
    ((6, 64, 20), 0),
    ((7, 3), 1),
    ((9, 7, 24), -1),
    ((61, 255), 1),
    ((90_000, 3), 1),
    ((70, 2049), 1),
    ((19, 17_000), 1),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*itertools.product(SAME_BITS, (FLOAT32, FLOAT64)), *itertools.product(SAME_BITS[::3], (FLOAT16, BFLOAT16))],
    ids=name,
)
def test_bits_depend_on_neither_threads_nor_instruction_set(case, dtype):
    (shape, axis), rng = case, np.random.default_rng(3)
    x, gamma, beta, dy = make(case, "offset", dtype)
    for activation, with_residual in VARIANTS if math.prod(shape) < 50_000 else VARIANTS[:2]:
        residual = rng.normal(size=shape).astype(dtype) if with_residual else None
        assert_same_bits(x, gamma, beta, dy, residual, axis, activation)


@pytest.mark.parametrize("shape", [(2 * PER_THREAD // 64 + more, 64) for more in (-1, 0, 1)] + [(2, 3, 3 * PER_THREAD)])
def test_bits_are_those_of_one_thread_where_the_library_decides(shape):
    arguments = *make((shape, 1), "plain", FLOAT32), None, 1, "relu"
    with fastbn.num_threads(3):
        assert digests(*arguments) == digests(*arguments, num_threads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", SAME_BITS[::3], ids=name)
def test_bits_with_frozen_statistics_depend_on_neither(case, dtype):
    """A layer in inference mode: dx = γ·dy/√(running_var + ε) where y > 0."""
    axis, c = case[1], case[0][case[1]]
    x, gamma, beta, dy = make(case, "plain", dtype)
    bn = fastbn.BatchNorm(c, axis=axis, activation="relu").eval()
    bn.gamma[:], bn.beta[:] = gamma, beta
    bn.running_mean[:], bn.running_var[:] = np.random.default_rng(14).uniform(0.1, 2, size=(2, c))
    found = []
    for isa, threads in itertools.product(dispatch.available(), THREADS):
        with running(isa):
            y = bn(x, num_threads=threads)
            dx = bn.backward(dy, num_threads=threads)
        found.append([bits(a) for a in (y, dx, bn.grad_gamma, bn.grad_beta)])
    assert all(one == found[0] for one in found)
    scale = bn.gamma / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    expected = reference.expand(scale, x.ndim, axis) * np.where(y > 0, dy, 0).astype(np.float64)
    bound = 4 * reference.unit(dtype) * np.abs(expected)
    assert_within(dx, expected, bound + reference.half_unit(np.abs(expected) + bound, dtype), "dx")


@given(problems(kinds=sorted(KINDS), max_size=10_000))
@settings(max_examples=settings().max_examples // 3)
def test_bits_of_any_problem_depend_on_neither(p):
    assert_same_bits(p.x, p.gamma, p.beta, p.dy, p.residual, p.axis, p.activation)


def test_this_machine_has_instruction_sets_to_compare():
    """Where only one is built the tests above compare threads alone: that must not pass unseen on x86-64."""
    assert dispatch.isa in dispatch.available()
    assert len(dispatch.available()) >= (2 if cpu.x86_level() >= 3 else 1)


# Neither do they depend on the caches, which decide how memory is written and what is fetched ahead. Every output at
# another distance from a cache line, since streaming stores begin at one.
CACHES = {"small": (1 << 16, 0), "no L2": (0, 0), "no end to L3": (1 << 16, 1 << 50)}  # bytes of L2 and L3
OFFSETS = [0, 1, 3, 8, 17, 31]  # elements from a cache line to the output
STREAMED = [
    ((3, 20, 1040), 1),
    ((3, 20, 1027), 1),
    ((2, 5, 64), 1),
    ((9, 40, 32), 1),
    ((50, 33), 1),
    ((50, 48), 1),
    ((9, 1500), 1),
]


def at_offset(shape, dtype, offset):
    """Return an array that begins `offset` elements after a cache line."""
    memory = np.empty((math.prod(shape) + offset) * dtype.itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64 + offset * dtype.itemsize
    return memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def digests_of_written():
    """Return digests of y and dx, of every instruction set; run in this process and in others."""
    found = {}
    for case, dtype, activation in itertools.product(STREAMED, DTYPES, (None, "relu")):
        x, gamma, beta, dy = make(case, "plain", dtype)
        residual = make(case, "plain", dtype, seed=1)[0] if activation else None
        for isa, offset in itertools.product(dispatch.available(), OFFSETS):
            y, dx = at_offset(x.shape, dtype, offset), at_offset(x.shape, dtype, offset)
            with running(isa):
                _, saved = batch_norm_train(x, gamma, beta, residual=residual, activation=activation, out=y)
                batch_norm_backward(dy, saved, out=dx)
                again = at_offset(x.shape, dtype, offset)
                batch_norm_infer(
                    x, saved.mean, saved.var, gamma, beta, residual=residual, activation=activation, out=again
                )
            written = b"".join(map(bits, (y, dx, again)))
            found[f"{name(case)}, {dtype}, {activation}, {isa}, {offset}"] = hashlib.sha256(written).hexdigest()
    return found


@pytest.fixture(scope="module")
def digests_here():
    return digests_of_written()


def test_bits_depend_on_no_alignment_of_the_output(digests_here):
    for case, dtype, activation in itertools.product(STREAMED, DTYPES, (None, "relu")):
        prefix = f"{name(case)}, {dtype}, {activation}, "
        assert len({digest for key, digest in digests_here.items() if key.startswith(prefix)}) == 1, prefix


@pytest.mark.parametrize("caches", CACHES)
def test_bits_depend_on_no_cache(caches, digests_here):
    l2, l3 = CACHES[caches]
    process = run_python(
        f"""
        import json, sys, types
        pretended = types.ModuleType("fastbn._core.caches")
        pretended.L1, pretended.L2, pretended.L3 = 1 << 15, {l2}, {l3}
        sys.modules["fastbn._core.caches"] = pretended
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_numerical_contract import digests_of_written
        print(json.dumps(digests_of_written()))
        """
    )
    there = json.loads(process.stdout)
    assert [key for key in digests_here if there[key] != digests_here[key]] == []


def test_a_large_result_has_the_bits_of_its_channels_alone():
    """An array beyond any cache, written past it; each channel for itself is small."""
    shape = (2, 48, 300, 300)
    x = np.random.default_rng(4).normal(size=shape).astype(np.float32)
    assert x.nbytes > 32 << 20
    y, saved = batch_norm_train(x, activation="relu")
    gradients = batch_norm_backward(x, saved)
    for ch in (0, 23, 47):
        alone = x[:, ch : ch + 1]
        y_alone, saved_alone = batch_norm_train(alone.repeat(2, 1), activation="relu")
        assert bits(y[:, ch]) == bits(y_alone[:, 0])
        assert bits(gradients.dx[:, ch]) == bits(batch_norm_backward(alone.repeat(2, 1), saved_alone).dx[:, 0])


# The same values elsewhere in memory

SAME_LAYOUT = {  # (view, shape, axis): the contiguous copy has its axes in the same order
    "every other image": (lambda a: a[::2], (12, 5, 33), 1),
    "every other channel": (lambda a: a[:, ::2], (5, 12, 33), 1),
    "channels reversed": (lambda a: a[:, ::-1], (5, 12, 33), 1),
    "long runs, every third channel": (lambda a: a[:, 1::3], (9, 12, 300), 1),
    "part of every run": (lambda a: a[..., 5:26], (9, 6, 40), 1),
    "part of every long run": (lambda a: a[..., 5:], (3, 6, 400), 1),
    "every other row": (lambda a: a[::2], (80, 24), 1),
    "part of every row": (lambda a: a[:, 3:20], (80, 24), 1),
    "part of every long row": (lambda a: a[:, 3:2060], (30, 2100), 1),
    "channels last, every other": (lambda a: a[:, ::2].transpose(0, 2, 1), (1, 12, 24), 1),
    "channels last, cut": (lambda a: a[..., :9].transpose(2, 0, 1), (6, 7, 13), 0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", SAME_LAYOUT)
def test_a_view_has_the_bits_of_its_contiguous_copy(case, dtype):
    view_of, shape, axis = SAME_LAYOUT[case]
    rng = np.random.default_rng(5)
    x, dy, residual = (view_of(rng.normal(size=shape).astype(dtype)) for _ in range(3))
    copies = [np.copy(a, order="K") for a in (x, dy, residual)]
    assert not x.flags.c_contiguous
    gamma, beta = rng.normal(size=(2, x.shape[axis]))
    for activation, with_residual in VARIANTS:
        ours = results(x, gamma, beta, dy, residual if with_residual else None, axis, activation)
        theirs = results(copies[0], gamma, beta, copies[1], copies[2] if with_residual else None, axis, activation)
        for key in ours:
            assert bits(ours[key]) == bits(theirs[key]), key


@given(problems(kinds=["plain", "offset"]))
def test_inference_has_the_same_bits_from_any_place_in_memory(p):
    """It is done element by element: no order of sums can excuse a difference."""
    rng = np.random.default_rng(6)
    mean, var = rng.normal(size=p.channels), rng.uniform(0.1, 2, p.channels)
    residual = None if p.residual is None else np.array(p.residual, p.dtype, order="C")
    options = {"axis": p.axis, "eps": p.eps, "activation": p.activation}
    ours = batch_norm_infer(p.x, mean, var, p.gamma, p.beta, **options, residual=p.residual, num_threads=p.num_threads)
    x = np.array(p.x, p.dtype, order="C")
    theirs = batch_norm_infer(x, mean, var, p.gamma, p.beta, **options, residual=residual)
    assert bits(ours) == bits(theirs)


@given(problems(kinds=["plain", "offset", "outliers"]))
def test_training_is_inference_by_the_statistics_of_the_batch(p):
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    assert bits(y) == bits(batch_norm_infer(p.x, saved.mean, saved.var, p.gamma, p.beta, **p.options))


@given(problems(kinds=["plain", "offset", "outliers"], dense=True))
def test_moments_are_the_statistics_of_training(p):
    _, saved = batch_norm_train(p.x, axis=p.axis)
    moments = Moments.of(p.x, p.axis)
    assert moments.count == saved.count == p.x.size // p.channels
    if p.dtype == FLOAT64:
        assert bits(moments.mean) == bits(saved.mean)
        assert bits(moments.var()) == bits(saved.var)
        return
    expected = reference.train(p.x, axis=p.axis)  # training adds in float32, Moments in float64
    t, std = spread(expected, p.dtype, p.axis), np.sqrt(expected.var)
    for mean, var, u, merged in ((saved.mean, saved.var, U32, 0), (moments.mean, moments.var(), 2.0**-48, 1)):
        assert_within(mean, expected.mean, 4 * u * t * std + 2.0**-52 * np.abs(expected.mean), "mean")
        # merging rounds the means of the blocks
        assert_within(var, expected.var, 8 * u * std * (std + merged * np.abs(expected.mean)), "var")


@given(problems(kinds=["plain", "offset"], dense=True))
def test_out_gets_the_bits_of_a_fresh_result(p):
    """`out` may be apart, x itself, or dy itself."""
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    dx = batch_norm_backward(p.dy, saved).dx
    inferred = batch_norm_infer(p.x, saved.mean, saved.var, p.gamma, p.beta, **p.options)
    for x, out in ((p.x, np.empty_like(p.x)), (copy := p.x.copy(), copy)):
        assert batch_norm_train(x, p.gamma, p.beta, **p.options, out=out)[0] is out
        assert bits(out) == bits(y)
    for x, out in ((p.x, np.empty_like(p.x)), (copy := p.x.copy(), copy)):
        assert batch_norm_infer(x, saved.mean, saved.var, p.gamma, p.beta, **p.options, out=out) is out
        assert bits(out) == bits(inferred)
    for dy, out in ((p.dy, np.empty_like(p.dy)), (copy := p.dy.copy(), copy)):
        assert batch_norm_backward(dy, saved, out=out).dx is out
        assert bits(out) == bits(dx)


# Where the arithmetic itself is exact, so are the laws


@given(problems(kinds=["plain", "offset", "outliers"], dense=True), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_no_bit(p, exponent):
    """y(2ᵏx) with 4ᵏε is y(x): every rounding is the same."""
    if p.dtype == FLOAT16:
        exponent = max(-2, min(exponent, 0))  # where neither x nor its scaled self rounds
        p.x[...] = np.where(np.abs(p.x) < 0.01, 0.01, p.x)
    options = p.options | {"eps": p.eps * 4.0**exponent}
    scaled = p.x * np.asarray(2.0**exponent, p.dtype)
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    y_scaled, saved_scaled = batch_norm_train(scaled, p.gamma, p.beta, **options)
    assert bits(y) == bits(y_scaled)
    dx, dx_scaled = batch_norm_backward(p.dy, saved).dx, batch_norm_backward(p.dy, saved_scaled).dx
    if p.dtype.itemsize > 2:
        assert bits(dx) == bits(dx_scaled * np.asarray(2.0**exponent, p.dtype))


@given(problems(kinds=["plain", "offset", "outliers"], dense=True))
def test_negating_x_and_gamma_changes_no_bit(p):
    gamma = np.ones(p.channels) if p.gamma is None else p.gamma
    y, saved = batch_norm_train(p.x, gamma, p.beta, **p.options)
    negated, saved_negated = batch_norm_train(-p.x, -gamma, p.beta, **p.options)
    assert bits(y + 0) == bits(negated + 0)  # but for the sign of a zero
    ours, theirs = batch_norm_backward(p.dy, saved), batch_norm_backward(p.dy, saved_negated)
    assert bits(ours.dx + 0) == bits(-theirs.dx + 0)
    assert bits(ours.dgamma + 0) == bits(-theirs.dgamma + 0)
    assert bits(ours.dbeta) == bits(theirs.dbeta)


@given(problems(kinds=["plain", "offset", "outliers"], dense=True), st.randoms(use_true_random=False))
def test_permuting_channels_permutes_the_results(p, random):
    order = random.sample(range(p.channels), p.channels)
    arrays = [a for a in (p.x, p.dy, p.residual) if a is not None]
    x, dy, *residual = (np.ascontiguousarray(np.take(a, order, axis=p.axis)) for a in arrays)
    gamma, beta = (None if v is None else v[order] for v in (p.gamma, p.beta))
    y, saved = batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    there, saved_there = batch_norm_train(x, gamma, beta, **p.options | {"residual": residual[0] if residual else None})
    assert bits(np.take(y, order, axis=p.axis)) == bits(there)
    ours, theirs = batch_norm_backward(p.dy, saved), batch_norm_backward(dy, saved_there)
    assert bits(np.take(ours.dx, order, axis=p.axis)) == bits(theirs.dx)
    assert bits(ours.dgamma[order]) == bits(theirs.dgamma)
    assert bits(ours.dbeta[order]) == bits(theirs.dbeta)


# ---- 4: NaN and infinity stay in their channel --------------------------------------------------------------------

CONFINED = [
    ((3, 5, 7), 1),
    ((9, 5, 7), 1),
    ((2, 6, 33), 1),
    ((2, 3, 300), 1),
    ((1, 3, BLOCK_NCS + 3), 1),
    ((1, 1, 90), 0),
    ((12, 7), 1),
    ((40, 19), 1),
    ((9, 4, 40), -1),
    ((10, 1030), 1),
    ((5, 9, 20), 0),
]


def assert_other_channels_same(ours, theirs, channel, axis):
    """Compare {name: array} but for one channel; vectors of (C,) have but that axis."""
    for key in theirs:
        ch_axis = 0 if ours[key].ndim == 1 else axis
        assert bits(np.delete(ours[key], channel, ch_axis)) == bits(np.delete(theirs[key], channel, ch_axis)), key


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CONFINED, ids=name)
def test_nan_and_infinity_in_x_stay_in_their_channel(case, dtype, bad):
    (shape, axis), rng = case, np.random.default_rng(7)
    c = shape[axis]
    x, gamma, beta, dy = make(case, "outliers", dtype)  # whose first values make some channels take a second pass
    for position in (0, -1, rng.integers(x.size // c)):
        channel = rng.integers(c)
        spoilt = x.copy()
        values = np.moveaxis(spoilt, axis, 0)[channel]
        values[np.unravel_index(position % values.size, values.shape)] = bad
        for activation in (None, "relu"):
            theirs = results(x, gamma, beta, dy, None, axis, activation)
            ours = results(spoilt, gamma, beta, dy, None, axis, activation)
            assert_other_channels_same(ours, theirs, channel, axis)
            for key in ("y", "inferred", "dx"):  # the whole channel is NaN, and ReLU makes no 0 of it
                assert np.isnan(np.take(ours[key], channel, axis).astype(np.float64)).all(), key
            assert not np.isfinite(ours["mean"][channel])
            assert np.isnan(ours["var"][channel])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", CONFINED, ids=name)
def test_nan_and_infinity_in_other_arguments_stay_in_their_channel(case, bad):
    (shape, axis), rng = case, np.random.default_rng(8)
    x, gamma, beta, dy = make(case, "plain", FLOAT32)
    channel = rng.integers(shape[axis])
    theirs = results(x, gamma, beta, dy, None, axis, None)
    for which in range(3):
        arguments = [gamma.copy(), beta.copy(), dy.copy()]
        np.moveaxis(arguments[which], axis if which == 2 else 0, 0)[channel] = bad
        ours = results(x, *arguments, None, axis, None)
        assert_other_channels_same(ours, theirs, channel, axis)
        for key in (("y", "inferred", "dx"), ("y", "inferred"), ("dx", "dbeta"))[which]:
            result = np.take(ours[key], channel, axis if ours[key].ndim > 1 else 0)
            assert not np.isfinite(result).any(), key


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 300), (12, 7), (40, 19)], ids=str)
def test_in_inference_nan_and_infinity_stay_in_their_element(shape, dtype):
    rng = np.random.default_rng(9)
    x, residual = rng.normal(size=(2, *shape)).astype(dtype)
    mean, var = rng.normal(size=shape[1]), rng.uniform(1, 2, shape[1])
    clean = batch_norm_infer(x, mean, var, activation="relu", residual=residual)
    for spoil, (bad, expected) in itertools.product((0, 1), ((np.nan, np.nan), (np.inf, np.inf), (-np.inf, 0))):
        arguments = [x.copy(), residual.copy()]
        where = tuple(rng.integers(shape))
        arguments[spoil][where] = bad
        y = batch_norm_infer(arguments[0], mean, var, activation="relu", residual=arguments[1])
        assert np.array_equal(np.float64(y[where]), expected, equal_nan=True)
        y[where] = clean[where]
        assert bits(y) == bits(clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_nan_mean_or_variance_spoils_its_channel_alone(dtype):
    x = np.random.default_rng(10).normal(size=(6, 5, 7)).astype(dtype)
    mean, var = np.zeros(5), np.ones(5)
    clean = batch_norm_infer(x, mean, var)
    for vector in (mean, var):
        vector[3] = np.nan
        y = batch_norm_infer(x, mean, var, activation=None)
        assert np.isnan(y[:, 3].astype(np.float64)).all()
        assert bits(np.delete(y, 3, 1)) == bits(np.delete(clean, 3, 1))
        vector[3] = 1


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_nan_passes_relu_behind_a_residual(dtype):
    """And no comparison with it warns."""
    x = np.random.default_rng(11).normal(size=(6, 3, 7)).astype(dtype)
    dy, x[2, 1, 3] = x.copy(), np.nan
    y, saved = batch_norm_train(x, activation="relu", residual=x)
    gradients = batch_norm_backward(dy, saved)
    assert np.isnan(y[:, 1].astype(np.float64)).all()
    assert bits(gradients.dresidual[:, 1]) == bits(dy[:, 1])  # NaN is not below 0: the gradient passes
    assert np.isfinite(np.delete(gradients.dx, 1, 1).astype(np.float64)).all()


# ---- 5: the process's floating-point state ------------------------------------------------------------------------


def call_everything():
    rng = np.random.default_rng(12)
    for dtype, shape in itertools.product(DTYPES, [(8, 3, 5), (4, 16, 400), (300, 33)]):
        x, dy, residual = rng.normal(size=(3, *shape)).astype(dtype)
        results(x, None, None, dy, residual, 1, "relu", 3)


def floating_point_state():
    """Return what would show flushed subnormals, another rounding, or NumPy set to ignore errors."""
    smallest32, smallest64 = np.float32(2.0**-126), np.float64(2.0**-1022)
    three = np.float64(3.0)
    return {
        "subnormal results": (float(smallest32 * np.float32(0.5)), float(smallest64 * np.float64(0.5))),
        "subnormal arguments": (float(np.float32(2.0**-149) * np.float32(2.0**100)), 5e-324 * 2.0**1000),
        "rounding": (float(1 / three).hex(), float(-1 / three).hex(), (1.0 + 2.0**-53).hex(), (1.0 + 2.0**-52).hex()),
        "errors": np.geterr(),
    }


def test_calls_leave_the_floating_point_state_alone():
    before = floating_point_state()
    assert before["subnormal results"] == (2.0**-127, 2.0**-1023)  # so that equality below says something
    assert before["subnormal arguments"] == (2.0**-49, 2.0**-74)
    call_everything()
    assert floating_point_state() == before


def test_python_threads_keep_theirs():
    states = []

    def work():
        call_everything()
        states.append(floating_point_state())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert states == [floating_point_state()]


def test_loading_fastbn_changes_nothing_for_anybody_else():
    run_python(
        """
        import locale, random, signal, sys, warnings
        import numpy as np

        def state():
            smallest, one = np.float32(2.0**-126), np.float64(1)
            return (
                float(smallest * np.float32(0.5)), 2.0**-1022 * 0.5, float(one / 3), np.geterr(), np.get_printoptions(),
                random.getstate(), str(np.random.get_state()), list(warnings.filters), signal.getsignal(signal.SIGINT),
                sys.getrecursionlimit(), locale.setlocale(locale.LC_ALL),
            )

        before = state()
        assert before[:2] == (2.0**-127, 2.0**-1023)
        import fastbn
        assert state() == before
        fastbn.batch_norm_train(np.ones((4, 3), np.float32), num_threads=2)
        assert state() == before
        """
    )


def test_subnormal_data_is_not_flushed():
    """Inputs, results and statistics below the smallest normal number, on every path."""
    for shape in ((2, 3, 7), (2, 3, 300), (16, 3), (9, 3, 5)):
        x = (np.random.default_rng(13).integers(1, 1000, size=shape) * 2.0**-149).astype(np.float32)
        for isa in dispatch.available():
            with running(isa):
                assert bits(batch_norm_infer(x, np.zeros(3), np.ones(3), eps=0.0)) == bits(x)
                _, saved = batch_norm_train(x)
        exact, axes = x.astype(np.float64) * 2.0**149, tuple(i for i in range(x.ndim) if i != 1)
        assert_within(saved.mean * 2.0**149, exact.mean(axes), 1e-12 * exact.mean(axes), "mean")
        assert_within(saved.var * 2.0**298, exact.var(axes), 1e-12 * exact.var(axes), "var")
