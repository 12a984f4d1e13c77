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
from reference import U32, U64, assert_within, bits, over_channels, spread
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
    numbers,
    parameters,
    problems,
)

import fastbn
from fastbn import Moments, batch_norm_backward, batch_norm_infer, batch_norm_train, norm
from fastbn._core import dispatch

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

    if dtype != FLOAT64:  # statistics of half types are float64 as well
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


# Repeated additions of one number err in one direction; in float64 nothing hides that
HARD_FOR_FLOAT64 = ["two values", "heavy tails"]
drifts = pytest.mark.xfail(strict=True, reason="float64 statistics drift by hundreds of units over 1024 additions")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in HARD_FOR_FLOAT64])
@pytest.mark.parametrize("case", CHANNELS_FIRST[::3] + CHANNELS_LAST[::3], ids=name)
def test_float64_is_within_its_bound(case, kind):
    check_bounds(*make(case, kind, FLOAT64), axis=case[1])


@pytest.mark.parametrize(
    ("kind", "cases"),
    [
        pytest.param("two values", CHANNELS_FIRST, id="two values, channels first", marks=drifts),
        pytest.param("two values", CHANNELS_LAST, id="two values, channels last", marks=drifts),
        pytest.param("heavy tails", CHANNELS_FIRST, id="heavy tails, channels first"),
        pytest.param("heavy tails", CHANNELS_LAST, id="heavy tails, channels last", marks=drifts),
    ],
)
def test_float64_is_within_its_bound_on_data_hard_to_sum(kind, cases):
    for case in cases:
        check_bounds(*make(case, kind, FLOAT64), axis=case[1])


@given(problems(kinds=sorted(set(KINDS) - set(HARD_FOR_FLOAT64)), dense=True))
def test_any_problem_is_within_the_bound(p):
    check_bounds(
        p.x, p.gamma, p.beta, p.dy, axis=p.axis, eps=p.eps, activation=p.activation, residual=p.residual,
        num_threads=p.num_threads,
    )  # fmt: skip


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
        if dtype != FLOAT64:
            bound = bound + 2 * U32 * U32 * reference.expand(np.abs(gamma * mean) / std, 3, axis)  # of the mean's second float
        y = batch_norm_infer(x, mean, std**2, gamma, beta, axis=axis, eps=eps, residual=residual)
        assert_within(y, expected.y, bound, "y")


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
    ((700, 3, 49), 1),
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


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", SAME_BITS, ids=name)
def test_bits_depend_on_neither_threads_nor_instruction_set(case, dtype):
    (shape, axis), rng = case, np.random.default_rng(3)
    x, gamma, beta, dy = make(case, "offset", dtype)
    for activation, with_residual in VARIANTS if math.prod(shape) < 50_000 else VARIANTS[:2]:
        residual = rng.normal(size=shape).astype(dtype) if with_residual else None
        assert_same_bits(x, gamma, beta, dy, residual, axis, activation)


@given(problems(kinds=sorted(KINDS), max_size=10_000))
@settings(max_examples=settings().max_examples // 3)
def test_bits_of_any_problem_depend_on_neither(p):
    assert_same_bits(p.x, p.gamma, p.beta, p.dy, p.residual, p.axis, p.activation)


def test_this_machine_has_instruction_sets_to_compare():
    """Where only one is built the tests above compare threads alone: that must not pass unseen on x86-64."""
    assert dispatch.isa in dispatch.available()
    assert len(dispatch.available()) >= (2 if cpu.x86_level() >= 3 else 1)
