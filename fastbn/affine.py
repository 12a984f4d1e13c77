"""A BatchNorm at inference: one scale and one shift per channel, in float64 or exactly.

scale = gamma/sqrt(var + eps), shift = beta - scale·mean (Ioffe & Szegedy 2015, Algorithm 2, line 11). Here a
BatchNorm's parameters are read and checked for everything that folds; `Affine` holds its map, or that of several
in a row, to 60 digits, so that nothing is rounded before it stands in a weight.
"""

from __future__ import annotations

from decimal import ROUND_HALF_EVEN, Context, Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np

from ._core.state import copies
from .norm import scale_and_shift

__all__ = ["BatchNormParams", "to_affine"]

SIGNIFICAND_BITS = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
EXACT = Context(60, ROUND_HALF_EVEN, Emin=-999999, Emax=999999, capitals=1, clamp=0, flags=[], traps=[])


class BatchNormParams(NamedTuple):
    """Hold one trained BatchNorm over C channels; its values are checked where they are used.

    Parameters
    ----------
    gamma, beta : array_like of shape (C,), or None
        Scale and shift; 1 and 0 where None.
    mean, var : array_like of shape (C,)
        The running statistics.
    eps : float
        ε ≥ 0, with var + ε positive and finite.
    """

    gamma: Any
    beta: Any
    mean: Any
    var: Any
    eps: float = 1e-5


def to_affine(bn: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale and shift of `bn` at inference, bn(x) = scale·x + shift per channel.

    scale = gamma/sqrt(var + eps), shift = beta - scale·mean (Ioffe & Szegedy 2015, Algorithm 2, line 11).

    Parameters
    ----------
    bn : BatchNormParams, or an object with gamma, beta, running_mean, running_var and eps (a BatchNorm)
        An activation that a BatchNorm applies afterwards is not part of its affine map.

    Returns
    -------
    scale, shift : ndarray of shape (C,), float64
        What inference itself uses: the formulas above in float64, a few roundings from their true values.

    Raises
    ------
    ValueError
        Shapes differ; mean or var is None; a value is not finite; var + eps is not positive; overflow.
    TypeError
        A parameter does not hold real numbers, or `bn` is no BatchNorm.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNormParams(gamma=[6.0], beta=[1.0], mean=[5.0], var=[4.0], eps=0.0)
    >>> fastbn.to_affine(bn)
    (array([3.]), array([-14.]))
    """
    gamma, beta, mean, var, eps = parameters(bn)
    with np.errstate(all="ignore"):
        scale, shift = scale_and_shift(mean, var, gamma, beta, eps)
    for name, values in ("scale", scale), ("shift", shift):
        check_finite("bn", values, np.arange(len(values)), f"a {name} that float64 can hold")
    return scale, shift


class Affine:
    """The map x → scale·x + shift per channel, scale and shift lists of Decimal with 60 digits."""

    __slots__ = ("scale", "shift")

    def __init__(self, scale: list[Decimal], shift: list[Decimal]) -> None:
        self.scale, self.shift = scale, shift

    def __len__(self) -> int:
        return len(self.scale)

    @classmethod
    def of(cls, bn: Any, channels: int | None = None, of: str = "") -> Affine:
        """Return the map of `bn`, checked; of `channels` channels, which `of` explains."""
        gamma, beta, mean, var, eps = parameters(bn, channels, of)
        gamma = np.ones_like(mean) if gamma is None else gamma
        beta = np.zeros_like(mean) if beta is None else beta
        scale, shift = [], []
        with localcontext(EXACT):
            for g, b, m, v in zip(gamma.tolist(), beta.tolist(), mean.tolist(), var.tolist(), strict=True):
                scale.append(Decimal(g) / (Decimal(v) + Decimal(eps)).sqrt())
                shift.append(Decimal(b) - scale[-1] * Decimal(m))
        return cls(scale, shift)

    def then(self, later: Affine) -> Affine:
        """Return x → later(self(x))."""
        with localcontext(EXACT):
            scale = [s * t for s, t in zip(later.scale, self.scale, strict=True)]
            shift = [s * t + u for s, t, u in zip(later.scale, self.shift, later.shift, strict=True)]
        return Affine(scale, shift)


def floating(dtype):
    """Return the dtype of what is computed from arrays of `dtype`: the same in native byte order, or float64."""
    return dtype.newbyteorder("=") if dtype.name in SIGNIFICAND_BITS else np.dtype(np.float64)


def as_array(name, value):
    """View `value` as an array of real numbers."""
    if value is None:
        raise ValueError(f"{name}: expected an array, got None")
    try:
        only_dlpack = hasattr(value, "__dlpack__") and not hasattr(value, "__array__")
        array = np.from_dlpack(value) if only_dlpack else np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, got {error}") from error
    except Exception as error:  # whatever an __array__ of others raises
        raise TypeError(f"{name}: expected something NumPy can view as an array, got {error}") from error
    if array.dtype.kind not in "iu" and array.dtype.name not in SIGNIFICAND_BITS:
        raise TypeError(f"{name}: expected {', '.join(SIGNIFICAND_BITS)} or integers, got {array.dtype}")
    return array


def as_values(name, value, shape):
    """Copy `value` to finite float64 of the given shape."""
    array = as_array(name, value)
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
    array = array.astype(np.float64)
    check_finite(name, array, np.arange(array.size), "finite values")
    return array


def check_finite(name, values, channel, expected, kind="channel", got=None):
    """Raise at the first value that is not finite; `channel` numbers the leading axes of `values`."""
    if not (finite := np.isfinite(values)).all():
        where = np.unravel_index(np.argmin(finite), finite.shape)
        got, at = (values if got is None else got)[where], channel[where[: channel.ndim]]
        raise ValueError(f"{name}: expected {expected}, got {got} in {kind} {at}")


def parameters(bn, channels=None, of=""):
    """Read and check `bn`: float64 arrays of shape (channels,), `of` says what these are; None: of mean's own shape."""
    names = BatchNormParams._fields
    if not isinstance(bn, BatchNormParams):
        names = "gamma", "beta", "running_mean", "running_var", "eps"
        if missing := [name for name in names if not hasattr(bn, name)]:
            kind = type(bn).__name__
            raise TypeError(f"bn: expected BatchNormParams or BatchNorm, got {kind}, which has no {missing[0]}")
    gamma, beta, mean, var, eps = copies(bn, names)
    mean_name, var_name = names[2:4]
    if mean is None or var is None:
        name = mean_name if mean is None else var_name
        raise ValueError(
            f"{name}: expected running statistics, got None (track_running_stats=False has none)"
        )

    eps, mean, own_var = as_array("eps", eps), as_array(mean_name, mean), as_array(var_name, var)
    if eps.ndim or not 0 <= float(eps) < np.inf:
        raise ValueError(f"eps: expected one finite number >= 0, got {eps}")
    if channels is None and (mean.ndim != 1 or not mean.size):
        raise ValueError(f"{mean_name}: expected shape (C,), got {mean.shape}")
    shape = mean.shape if channels is None else (channels,)
    if mean.shape != shape:
        raise ValueError(f"{mean_name}: expected shape {shape}, got {mean.shape}{of}")
    mean, var = as_values(mean_name, mean, shape), as_values(var_name, own_var, shape)
    gamma = None if gamma is None else as_values("gamma", gamma, shape)
    beta = None if beta is None else as_values("beta", beta, shape)

    with np.errstate(all="ignore"):
        total = var + float(eps)
        # Where eps cancels a negative var in var's own precision (float32 -1e-5), eps's rounding is left.
        positive = (total > 0) & ((var >= 0) | (own_var + eps.astype(own_var.dtype) > 0))
    total[~positive] = np.nan
    expected = f"var + eps positive and finite with eps = {eps}"
    check_finite(var_name, total, np.arange(total.size), expected, got=var)
    return BatchNormParams(gamma, beta, mean, var, float(eps))


