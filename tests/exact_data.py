"""Data on which nothing rounds, drawn in integers, and the one right answer of every result.

A channel is μ + v, with v from -2 to 2, of mean 0 and variance 2 in every block that the kernels cut, so that sums,
means and merges are exact whatever the number of values. ε makes σ² + ε = 4: x̂ = v/2. γ = g/2, β = b/4, residual = r/4,
for integers g (a power of two), b and r; dy is such that dβ/m and dγ/m have few bits. Signs of zeros are not compared.
"""

import functools
import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from strategies import heads


def balanced(k):
    """Return k integers with the sum 0 and, from 3 on, the sum of squares 2k."""
    if k in (1, 2, 5):
        return [[0], [1, -1], [2, -2, 1, -1, 0]][k // 2]
    threes = -k % 4
    return [2, -1, -1] * (threes // 2) + [-2, 1, 1] * (threes - threes // 2) + [2, -2, 0, 0] * ((k - 3 * threes) // 4)


@dataclass(frozen=True)
class Integers:
    """A problem, and its results: v, residual times 4, dy, whether the gradient passes: (C, m); g and b: (C,)."""

    shape: tuple[int, ...]
    axis: int
    v: np.ndarray
    g: np.ndarray
    b: np.ndarray
    residual: np.ndarray
    dy: np.ndarray
    passes: np.ndarray

    @property
    def count(self):
        return self.v.shape[1]

    @property
    def var(self):
        """σ², the same in every channel; rounded once where it is not 2."""
        return float(Fraction(int((self.v[0] ** 2).sum()), self.count))

    def in_shape(self, channels):
        """Return a (C, m) array in the shape of x, C-contiguous."""
        others = tuple(np.delete(self.shape, self.axis))
        return np.ascontiguousarray(np.moveaxis(channels.reshape(-1, *others), 0, self.axis))

    @functools.cached_property
    def y(self):
        """y times 4."""
        return np.where(self.passes, self.g[:, None] * self.v + self.b[:, None] + self.residual, 0)

    @functools.cached_property
    def gradients(self):
        """dx times 16, dγ times 2, dβ."""
        dz = np.where(self.passes, self.dy, 0)
        dbeta, dgamma = dz.sum(axis=1), (dz * self.v).sum(axis=1)
        assert not (dbeta % self.count).any()
        assert not (dgamma % self.count).any()
        of_mean, of_xhat = (total[:, None] // self.count for total in (dbeta, dgamma))
        return self.g[:, None] * (4 * dz - 4 * of_mean - self.v * of_xhat), dgamma, dbeta

    @functools.cached_property
    def frozen_dx(self):
        """dx of frozen statistics, times 4."""
        return self.g[:, None] * np.where(self.passes, self.dy, 0)


def pairs(rng, keys):
    """Return integers that are 0 but for pairs ±r at equal keys of a row."""
    order = np.argsort(keys, axis=1, kind="stable")
    sorted_keys = np.take_along_axis(keys, order, axis=1)
    half = keys.shape[1] // 2
    first, second = sorted_keys[:, 0 : 2 * half : 2], sorted_keys[:, 1 : 2 * half : 2]
    r = rng.integers(-3, 4, first.shape) * (first == second)
    result = np.zeros_like(keys)
    np.put_along_axis(result, order[:, : 2 * half], np.stack([r, -r], axis=2).reshape(len(r), -1), axis=1)
    return result


@functools.lru_cache(maxsize=8)
def integers(case, activation, with_residual):
    """Draw a problem. With ReLU all of channel 0, 4, … passes, nothing of 1, 5, …; the others are 0 in places."""
    (shape, axis), rng = case, np.random.default_rng(1)
    axis %= len(shape)
    c, m = shape[axis], math.prod(shape) // shape[axis]
    blocks = np.diff([*heads(shape, axis), m])
    pattern = np.concatenate([balanced(k) for k in blocks])
    places = np.repeat(np.arange(len(blocks)), blocks) + rng.random((c, m))
    v = pattern[np.argsort(places, axis=1)]  # the values of each block in any order
    g = rng.choice([-8, -4, -2, -1, 1, 2, 4, 8], c)
    kind = np.arange(c) % 4 if c > 1 else np.array([2])
    b = np.where(kind == 0, 28, np.where(kind == 1, -28, g * rng.integers(-1, 2, c)))
    residual = rng.integers(-8, 9, (c, m)) if with_residual else np.zeros((c, m), int)
    z = g[:, None] * v + b[:, None] + residual
    passes = z > 0 if activation else np.ones_like(z, bool)
    p, q = rng.integers(-3, 4, (c, 1)), rng.integers(-2, 3, (c, 1))
    if (v[0] ** 2).sum() % m:
        q[:] = 0
    dz = pairs(rng, v + 8 * passes) + np.where(passes.all(axis=1, keepdims=True), p + q * v, 0)
    dy = np.where(passes, dz, rng.integers(-4, 5, v.shape))
    return Integers(shape, axis, v, g, b, residual, dy, passes)


def assert_exactly(actual, expected, unit, what):
    """Hold an array to integers divided by a power of two."""
    assert actual.shape == expected.shape, what
    wrong = actual.astype(np.float64) != expected / unit
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} values wrong; first at {tuple(map(int, np.argwhere(wrong)[0]))}: got "
        f"{actual[wrong][0]}, expected {Fraction(int(expected[wrong][0]), unit)}"
    )
