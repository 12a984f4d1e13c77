"""The oracle: batch normalisation as in the paper (Ioffe & Szegedy 2015), and the bounds that fastbn promises.

It computes in `WIDE`, float64 or wider. fastbn's own float64 results are held to a few units of 2⁻⁵³, which a float64
oracle would use up by itself: x86's longdouble has 11 bits more. Where longdouble is float64 the oracle still serves,
since each channel is centred twice before anything is squared, and NumPy sums contiguous memory pairwise.
"""

from typing import NamedTuple

import numpy as np

WIDE = np.longdouble
U32, U64 = 2.0**-24, 2.0**-53  # unit roundoff: half the distance from 1 to the next number


class Forward(NamedTuple):
    """One forward pass: y, z = γx̂ + β + residual (y before ReLU) and x̂ of x's shape; statistics of shape (C,)."""

    y: np.ndarray
    z: np.ndarray
    xhat: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    rstd: np.ndarray


class Backward(NamedTuple):
    """One backward pass: dx of x's shape, dγ and dβ of shape (C,), and dy after ReLU."""

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dz: np.ndarray


# ---- arrays -------------------------------------------------------------------------------------------------------


def wide(values):
    """Return real numbers in WIDE, exactly (half types and foreign byte orders go by way of float64)."""
    values = np.asarray(values)
    return values.astype(np.float64).astype(WIDE)


def over_channels(function, a, axis):
    """Return function(all values of a channel) for each channel: shape (C,)."""
    a = np.moveaxis(a, axis, 0)
    return function(np.ascontiguousarray(a.reshape(len(a), -1)), axis=1)


def expand(vector, ndim, axis):
    """Return a vector of channels, or a number, in a shape that broadcasts against arrays of `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return np.reshape(vector, shape)


def parameter(value, default, ndim, axis):
    """Return γ or β, or what stands for None, ready to broadcast."""
    return expand(wide(default if value is None else value), ndim, axis)


# ---- the method ---------------------------------------------------------------------------------------------------


def moments(x, axis=1):
    """Return μ = Σx/m, σ² = Σ(x-μ)²/m and x - μ; centred twice, since a rounded μ is off by more than x - μ may be."""
    x = wide(x)
    mean = over_channels(np.mean, x, axis)
    centred = x - expand(mean, x.ndim, axis)
    rest = over_channels(np.mean, centred, axis)
    centred = centred - expand(rest, x.ndim, axis)
    return mean + rest, over_channels(np.mean, centred * centred, axis), centred


def _forward(centred, mean, var, gamma, beta, axis, eps, activation, residual):
    ndim = centred.ndim
    rstd = 1 / np.sqrt(var + WIDE(eps))
    xhat = centred * expand(rstd, ndim, axis)
    z = parameter(gamma, 1, ndim, axis) * xhat + parameter(beta, 0, ndim, axis)
    z = z if residual is None else z + wide(residual)
    return Forward(np.maximum(z, 0) if activation == "relu" else z, z, xhat, mean, var, rstd)


def train(x, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None):
    """Algorithm 1: x̂ = (x-μ)/√(σ²+ε) with the batch's μ and σ², y = act(γx̂ + β + residual)."""
    mean, var, centred = moments(x, axis)
    return _forward(centred, mean, var, gamma, beta, axis, eps, activation, residual)


def infer(x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5, activation=None, residual=None):
    """Algorithm 2, line 11: the same with given μ and σ²."""
    mean, var = wide(mean), wide(var)
    centred = wide(x) - expand(mean, np.ndim(x), axis)
    return _forward(centred, mean, var, gamma, beta, axis, eps, activation, residual)


def backward(dy, x, gamma=None, *, axis=1, eps=1e-5, passes=True):
    """Section 3: dβ = Σdz, dγ = Σdz·x̂, dx = γ·rstd·(dz - dβ/m - x̂·dγ/m); dz is dy where it `passes` ReLU, else 0."""
    forward = train(x, axis=axis, eps=eps)
    xhat, ndim = forward.xhat, np.ndim(x)
    dz = np.where(passes, wide(dy), 0)
    dbeta, dgamma = over_channels(np.sum, dz, axis), over_channels(np.sum, dz * xhat, axis)
    m = xhat.size // len(dbeta)
    centred = dz - expand(dbeta / m, ndim, axis) - xhat * expand(dgamma / m, ndim, axis)
    return Backward(parameter(gamma, 1, ndim, axis) * expand(forward.rstd, ndim, axis) * centred, dgamma, dbeta, dz)


# ---- the bounds of the numerical contract -------------------------------------------------------------------------


def unit(dtype):
    """Return the unit roundoff of the arithmetic on arrays of a dtype: half types compute in float32."""
    return U64 if dtype == np.float64 else U32


def half_unit(values, dtype):
    """Return half the distance between neighbours in a half type, at given values; 0 for the other types."""
    if np.dtype(dtype).itemsize > 2:
        return np.zeros(np.shape(values))
    bits, smallest = (11, -24) if dtype == np.float16 else (8, -133)  # of the significand; exponent of a subnormal
    values = np.asarray(values, np.float64)
    exponent = np.where(values == 0, smallest, np.frexp(values)[1] - bits)
    return np.ldexp(0.5, np.maximum(exponent, smallest))


def spread(forward, dtype, axis):
    """Return t = 1 + max|x̂| per channel; in float64, where the mean is one number only, + |μ|·rstd."""
    t = 1 + over_channels(np.max, np.abs(forward.xhat), axis)
    return t + np.abs(forward.mean) * forward.rstd if dtype == np.float64 else t


def y_bound(forward, gamma, beta, dtype, axis, *, residual=None):
    """Return 4u(|γ|t + |β|), 32u in float64; adding a residual rounds once more, a half type once more again."""
    ndim, u = forward.z.ndim, unit(dtype)
    size = np.abs(parameter(gamma, 1, ndim, axis)) * expand(spread(forward, dtype, axis), ndim, axis)
    bound = (32 if dtype == np.float64 else 4) * u * (size + np.abs(parameter(beta, 0, ndim, axis)))
    if residual is not None:
        bound = bound + u * (np.abs(forward.z) + bound)
    return bound + half_unit(np.abs(forward.z) + bound, dtype)


def var64_bound(mean, var):
    """Return 32u·σ·(σ + |μ|), of float64 data: blocks have means of float64, their differences lack what is rounded."""
    return 32 * U64 * np.sqrt(var) * (np.sqrt(var) + np.abs(mean))


def backward_bound(backward, forward, gamma, dtype, axis, parameter_dtype):
    """Return bounds of dx, dγ and dβ: 8u|γ|rstd(max|dy| + t²·mean|dy|), 8ut·Σ|dy| and 8u·Σ|dy|; 32u in float64.

    dγ and dβ of float64 data are rounded once more where γ is float32.
    """
    ndim, u = forward.z.ndim, (32 if dtype == np.float64 else 8) * unit(dtype)
    t, size = spread(forward, dtype, axis), np.abs(backward.dz)
    most, total = over_channels(np.max, size, axis), over_channels(np.sum, size, axis)
    m = size.size // len(total)
    scale = np.abs(parameter(gamma, 1, ndim, axis)) * expand(forward.rstd, ndim, axis)
    dx = u * scale * expand(most + t * t * total / m, ndim, axis)
    dx = dx + half_unit(np.abs(backward.dx) + dx, dtype)
    once_more = U32 if dtype == np.float64 and parameter_dtype == np.float32 else 0
    dgamma, dbeta = u * t * total + once_more * np.abs(backward.dgamma), u * total + once_more * np.abs(backward.dbeta)
    return Backward(dx, dgamma, dbeta, 0 * size)


def assert_within(actual, expected, bound, what="result"):
    """Hold every element to its bound; the message has the worst one."""
    expected, bound = np.broadcast_arrays(expected, bound)
    assert np.shape(actual) == expected.shape, f"{what}: shape {np.shape(actual)}, expected {expected.shape}"
    assert np.isfinite(bound).all(), f"{what}: the bound itself is not finite"
    error = np.abs(wide(actual) - expected)
    wrong = ~(error <= bound)  # NaN is wrong
    if wrong.any():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error - bound)), error.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} values beyond their bound; at {tuple(map(int, worst))} "
            f"got {actual[worst]}, expected {expected[worst]} ± {bound[worst]}"
        )


def bits(array):
    """Return the bytes of an array's values in C order: equal bytes are equal values, NaN and signed zeros too."""
    return np.ascontiguousarray(array).tobytes()
