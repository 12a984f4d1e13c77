"""Moments of parts, running statistics, standardised inputs, optimizers without rounding: the oracle is rational."""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import reference_optim
from exact_data import assert_exactly, balanced
from reference import bits
from strategies import DTYPES, FLOAT32, FLOAT64

from fastbn import BatchNorm, Moments, Standardizer, optim

# ---- moments of parts -----------------------------------------------------------------------------------------------


def of_integers(x):
    """Return the mean and Σ(x - mean)² of a list of integers, as fractions."""
    total = sum(map(int, x))
    return Fraction(total, len(x)), sum(int(v) ** 2 for v in x) - Fraction(total**2, len(x))


def fractions(array):
    """Return the numbers of a vector."""
    return [Fraction(float(v)) for v in array]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_parts_of_powers_of_two(dtype):
    """1, 1, 2, 4, … rows: each part has as many as all before it. And eighths, quarters, halves merged as a tree."""
    x = np.random.default_rng(3).integers(-100, 101, (256, 5))
    expected = list(zip(*map(of_integers, x.T), strict=True))
    starts = [0, 1, *(2**k for k in range(1, 9))]
    one_by_one = Moments(5)
    for start, end in itertools.pairwise(starts):
        one_by_one.update(x[start:end].astype(dtype))
    parts = [Moments.of(part.astype(dtype)) for part in np.split(x, 8)]
    while len(parts) > 1:
        parts = [a.merge(b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    for moments in (one_by_one, parts[0], Moments.from_dict(parts[0].to_dict())):
        assert moments.count == 256
        assert (fractions(moments.mean), fractions(moments.m2)) == tuple(map(list, expected))
        assert fractions(moments.var()) == [m2 / 256 for m2 in expected[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_of_parts_of_one_mean(dtype):
    """Of any number of rows, in any order."""
    rng, mean = np.random.default_rng(4), np.array([3, -50, 0])
    parts = [rng.permuted(np.outer(balanced(k), [1, -2, 4]), axis=0) + mean for k in (7, 100, 3, 1, 1357, 2, 64)]
    whole = np.concatenate(parts)
    for _ in range(5):
        rng.shuffle(order := list(range(len(parts))))
        moments = functools.reduce(Moments.merge, [Moments.of(parts[i].astype(dtype)) for i in order], Moments(3))
        assert fractions(moments.mean) == mean.tolist()
        assert fractions(moments.m2) == [of_integers(column)[1] for column in whole.T]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(3, 1), (1, 7), (5, 3), (7, 9), (192, 64), (3, 1021)])
def test_moments_of_two_parts_of_two_means(rows, dtype):
    """As many rows in all as a power of two, in unequal parts."""
    means = np.array([[3, -50, 0], [7, 50, 0]])
    a, b = (np.outer(balanced(k), [1, -2, 4]) + mean for k, mean in zip(rows, means, strict=True))
    moments = Moments.of(a.astype(dtype)).update(b.astype(dtype))
    expected = [of_integers(column) for column in np.concatenate([a, b]).T]
    assert list(zip(fractions(moments.mean), fractions(moments.m2), strict=True)) == expected


# ---- running statistics, standardised inputs ------------------------------------------------------------------------

# Numbers of rows; Bessel's correction m/(m - 1) of the first is 2, 3/2, 5/4, 9/8.
ROWS = [2, 3, 5, 9]


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT64], ids=str)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.5, 1.0])
def test_running_statistics(momentum, unbiased, dtype):
    bn = BatchNorm(3, momentum=momentum, unbiased=unbiased, dtype=dtype)
    weight, mean, var = Fraction(momentum), [Fraction(0)] * 3, [Fraction(1)] * 3
    for number, rows in enumerate(ROWS):
        x = np.outer(balanced(rows), [1, -2, 4]) + np.array([number, -5, 7 * number])
        bn(x.astype(dtype))
        for ch, (of_batch, m2) in enumerate(map(of_integers, x.T)):
            mean[ch] = (1 - weight) * mean[ch] + weight * of_batch
            var[ch] = (1 - weight) * var[ch] + weight * m2 / (rows - unbiased)
        assert (fractions(bn.running_mean), fractions(bn.running_var)) == (mean, var)
    assert bn.num_batches_tracked == len(ROWS)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("method", ["pooled", "paper"])
def test_recalibration(method, unbiased):
    """Two batches of one mean, of 9 or 8 rows in all, whatever the divisor; of two means for the paper's method."""
    shift = np.array([0, 6, -20]) if method == "paper" else 0
    rows = 6 if method == "pooled" and unbiased else 5
    first, second = (np.outer(balanced(k), [1, -2, 4]) + 11 for k in (3, rows))
    bn = BatchNorm(3, unbiased=unbiased)
    bn.recalibrate([first, (second + shift).astype(np.float32)], method)
    of_batches = [[of_integers(column) for column in batch.T] for batch in (first, second + shift)]
    pooled = [(m2_a + m2_b) / (3 + rows - unbiased) for (_, m2_a), (_, m2_b) in zip(*of_batches, strict=True)]
    paper = [(m2_a / 2 + m2_b / (rows - 1)) / 2 for (_, m2_a), (_, m2_b) in zip(*of_batches, strict=True)]
    assert fractions(bn.running_mean) == [(a + b) / 2 for (a, _), (b, _) in zip(*of_batches, strict=True)]
    assert fractions(bn.running_var) == (pooled if method == "pooled" else paper)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standardised_inputs(dtype):
    """σ is 1, 2 or 8, of parts of one mean."""
    mean, std = np.array([3, -50, 0]), np.array([1, 2, 8])
    v = np.random.default_rng(5).permuted(np.repeat([[1, 1, 1], [-1, -1, -1]], 50, axis=0), axis=0)
    scaler = Standardizer().fit((std * [[1], [-1]] + mean).astype(dtype)).partial_fit((std * v + mean).astype(dtype))
    assert (scaler.mean_.tolist(), scaler.scale_.tolist()) == (mean.tolist(), std.tolist())
    assert (scaler.var_.tolist(), scaler.n_samples_seen_) == ((std * std).tolist(), 102)
    z = scaler.transform((std * v + mean + 4).astype(dtype))
    assert_exactly(z, 8 * v + 32 // std, 8, "z")
    assert_exactly(scaler.inverse_transform(z), std * v + mean + 4, 1, "x")


# ---- optimizers: the reference in rational arithmetic ---------------------------------------------------------------


def exact_root(s, eps, inside):
    """√(s + ε) or √s + ε of squares of fractions."""
    s = s + eps if inside else s
    roots = np.array([Fraction(math.isqrt(v.numerator), math.isqrt(v.denominator)) for v in s], object)
    assert (roots * roots == s).all()
    return roots if inside else roots + eps


ZERO, HALF, QUARTER = Fraction(0), Fraction(1, 2), Fraction(1, 4)
# |g| of each step in units of |g| of the first, for which every square root is one of a square
STEADY, HALVED = [1, 1, 1, 1], [1, HALF, HALF, HALF]
RATE = Fraction(105, 1024)  # of Adam: divisible by the numerators of 1 - β₁ᵗ = 1/2, 3/4, 7/8, 15/16
METHODS = {
    "SGD": ("SGD", {"lr": HALF, "weight_decay": QUARTER}, STEADY),
    "SGD, momentum": ("SGD", {"lr": HALF, "momentum": HALF, "dampening": QUARTER}, HALVED),
    "SGD, Nesterov": ("SGD", {"lr": QUARTER, "momentum": HALF, "nesterov": True}, HALVED),
    "SGD, clipped": ("SGD", {"lr": QUARTER, "momentum": HALF, "clip_value": HALF}, HALVED),
    "RMSprop": ("RMSprop", {"lr": QUARTER, "alpha": 3 * QUARTER, "eps": ZERO}, HALVED),
    "RMSprop, momentum": ("RMSprop", {"lr": QUARTER, "alpha": 3 * QUARTER, "eps": ZERO, "momentum": HALF}, HALVED),
    "RMSprop, centered": ("RMSprop", {"lr": HALF, "alpha": ZERO, "eps": QUARTER, "centered": True}, HALVED),
    "Adam": ("Adam", {"lr": RATE, "betas": (HALF, ZERO), "eps": ZERO}, HALVED),
    "Adam, one step": ("Adam", {"lr": HALF, "betas": (HALF, 3 * QUARTER), "eps": ZERO}, [1]),
    "Adam, AMSGrad": (
        "Adam", {"lr": RATE, "betas": (HALF, ZERO), "eps": ZERO, "amsgrad": True}, HALVED
    ),
    "AdamW": (
        "AdamW", {"lr": QUARTER, "betas": (ZERO, ZERO), "eps": ZERO, "weight_decay": HALF}, STEADY
    ),
}  # fmt: skip


SLOTS = ("momentum_buffer", "square_avg", "grad_avg", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def as_floats(option):
    """Return an option of an optimizer as its users give it."""
    if isinstance(option, tuple):
        return tuple(map(float, option))
    return option if isinstance(option, bool) else float(option)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_optimizers(method, dtype, monkeypatch):
    """Half types: the master has the exact parameter, and they its rounding."""
    monkeypatch.setattr(reference_optim, "root", exact_root)
    kind, options, sizes = METHODS[method]
    clip = {key: options[key] for key in options if key in reference_optim.CLIPS}
    update = {"weight_decay": ZERO} | {key: value for key, value in options.items() if key not in clip}
    rng, zeros = np.random.default_rng(6), np.full(16, ZERO)
    start, signs = rng.integers(-8, 9, 16), rng.choice([-1, 1], (len(sizes), 16))
    first = rng.choice([QUARTER, Fraction(1), Fraction(2)], 16)
    lengths, expected, state = [1, 17, 4099], start + zeros, dict.fromkeys(SLOTS, zeros)
    params = [np.resize(start.astype(dtype), n) for n in lengths]
    opt = getattr(optim, kind)(params, **{key: as_floats(value) for key, value in options.items()})
    for t, size in enumerate(sizes):
        g = signs[t] * first * size
        opt.step([np.resize(g.astype(np.float64).astype(dtype), n) for n in lengths], num_threads=1 + 2 * (t % 2))
        clipped = reference_optim.clipped([g], **clip)[0]
        expected = reference_optim.METHODS[kind](expected, clipped, state, t + 1, **update)
        held = opt.state_dict()
        for i, p in enumerate(params):
            wide = held["master"][i] if dtype.itemsize == 2 else p
            assert fractions(wide[:16]) == expected[: len(p)].tolist()
            assert bits(wide) == bits(np.resize(wide[:16], len(p)))
            assert bits(p) == bits(wide.astype(dtype))
            for slot in held.keys() & state.keys():
                assert fractions(held[slot][i][:16]) == state[slot][: len(p)].tolist(), slot
