"""Batch normalisation as functions without state: training, inference, backward, and mergeable moments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._core import check, layout
from ._core.dispatch import kernels
from ._core.state import narrow, store
from .threads import budget

__all__ = ["Gradients", "Moments", "Saved", "batch_norm_backward", "batch_norm_infer", "batch_norm_train"]


class Saved:
    """What :func:`batch_norm_backward` needs of a training call.

    Attributes
    ----------
    mean, var, rstd : ndarray of shape (C,), float64
        μ, σ² (biased) and 1/√(σ² + ε) of the batch.
    count : int
        Values per channel, m.
    """

    __slots__ = (
        "axis", "beta", "bits", "count", "frozen", "gamma", "has_residual", "mean", "param_dtype", "relu", "rstd",
        "var", "x",
    )  # fmt: skip

    def __init__(
        self, x: np.ndarray | None, axis: int, mean: np.ndarray, var: np.ndarray, rstd: np.ndarray, count: int,
        gamma: np.ndarray | None, beta: np.ndarray | None, param_dtype: np.dtype, relu: bool = False,
        has_residual: bool = False, bits: layout.Bits | None = None, frozen: bool = False,
    ) -> None:  # fmt: skip
        self.x = x  # None: overwritten by the output
        self.axis = axis
        self.mean, self.var, self.rstd, self.count = mean, var, rstd, count
        self.gamma, self.beta, self.param_dtype = gamma, beta, param_dtype
        self.relu, self.has_residual, self.frozen = relu, has_residual, frozen
        self.bits = bits  # whether the gradient passes (y > 0, or NaN); only with ReLU and a residual

    def __repr__(self) -> str:
        return f"Saved(channels={len(self.mean)}, count={self.count})"


class Gradients(NamedTuple):
    """Gradients of :func:`batch_norm_backward`; `dresidual` is None where there was no residual."""

    dx: np.ndarray
    dgamma: np.ndarray
    dbeta: np.ndarray
    dresidual: np.ndarray | None = None


def scale_and_shift(
    mean: np.ndarray, var: np.ndarray, gamma: np.ndarray | None, beta: np.ndarray | None, eps: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 (scale, shift) with scale·x + shift = γ·(x - μ)/√(σ² + ε) + β (Ioffe & Szegedy 2015, Alg. 2)."""
    scale = 1 / np.sqrt(np.asarray(var, np.float64) + eps)
    if gamma is not None:
        scale = gamma * scale
    shift = -scale * np.asarray(mean, np.float64)
    return scale, shift if beta is None else beta + shift


def _param_dtype(gamma: Any, x: np.ndarray) -> np.dtype:
    """Return the dtype of dγ and dβ: gamma's own if it is float32 or float64, else float32 at the least."""
    dtype = getattr(gamma, "dtype", x.dtype)  # never None, which equals float64 in NumPy
    return dtype if dtype == check.FLOAT32 or dtype == check.FLOAT64 else check.real(x.dtype)


def batch_norm_train(
    x: Any, gamma: Any = None, beta: Any = None, *, axis: int = 1, eps: float = 1e-5, activation: str | None = None,
    residual: Any = None, out: np.ndarray | None = None, num_threads: int | None = None,
) -> tuple[np.ndarray, Saved]:  # fmt: skip
    """Normalise a mini-batch by its own statistics.

    For each channel, over its m values: μ = (1/m) Σ x, σ² = (1/m) Σ (x - μ)², and
    y = act(γ·(x - μ)/√(σ² + ε) + β + residual).

    Parameters
    ----------
    x : array_like of shape (N, C), (N, C, L), … ; float16, bfloat16, float32 or float64
        Two or more dimensions, any strides; integers become float64. Not modified, unless it is `out`.
    gamma, beta : array_like of shape (C,), optional
        Scale and shift; 1 and 0 where None.
    axis : int
        The channel axis.
    eps : float
        ε > 0, added to the variance.
    activation : {None, "relu"}
        Applied last. ReLU's gradient is 0 where y = 0.
    residual : array_like of x's shape and dtype, optional
        Added before the activation.
    out : ndarray of x's shape and dtype, optional
        Where to write y. It may be `x` itself; then nothing is kept for a backward pass.
    num_threads : int, optional
        Threads of this call; by default as many as pay, up to :func:`fastbn.get_num_threads`.

    Returns
    -------
    y : ndarray of x's shape, dtype and order in memory
    saved : Saved
        For :func:`batch_norm_backward`. It refers to `x`, which must not change before that.

    Raises
    ------
    TypeError, ValueError
        On an unsupported dtype, a shape that does not fit, ε ≤ 0, one value per channel, or an `out` that overlaps
        an input in part. The message names the argument. Nothing is written then.

    Notes
    -----
    Statistics are sums of differences from a value close to the mean, eight at a time in the arithmetic's dtype, then
    in float64, in blocks that the shape alone fixes. In float32 the error stays within
    4·2⁻²⁴·(abs(γ)·(1 + max abs(x̂)) + abs(β)), also where the mean is 10⁶ standard deviations, and the result is the
    same to the last bit for any number of threads and any instruction set. An empty batch gives an empty y.

    References
    ----------
    Ioffe & Szegedy 2015, "Batch Normalization", Algorithm 1.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, saved = fastbn.batch_norm_train(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> saved.mean
    array([ 2., 20.])
    """
    x_in = check.array("x", x)
    ch = check.axis(axis, x_in.ndim)
    shape, c = x_in.shape, x_in.shape[ch]
    gamma64, beta64 = check.channels("gamma", gamma, c), check.channels("beta", beta, c)
    eps = check.training_eps(eps)
    relu = check.activation(activation)
    given = residual
    if residual is not None:
        residual = check.like("residual", residual, shape, x_in.dtype)
    if out is not None:
        out = check.output(out, shape, x_in.dtype, ("x", x), residual=given, gamma=gamma, beta=beta)
    threads = budget(x_in.size, num_threads)
    count = x_in.size // c if c else 0
    if x_in.size == 0:
        nothing = np.zeros(c)
        saved = Saved(
            x_in, ch, nothing, nothing, nothing, 0, gamma64, beta64, _param_dtype(gamma, x_in), relu,
            residual is not None,
        )  # fmt: skip
        return (layout.empty_like(x_in) if out is None else out), saved
    check.enough_values(count, shape)

    y = layout.empty_like(x_in) if out is None else out
    mean, var, rstd = np.empty(c), np.empty(c), np.empty(c)
    has_residual = residual is not None
    bits = layout.Bits() if relu and has_residual else None
    (x_view, residual_view), y_view, copied, marks = layout.arrange(ch, (x_in, residual), y, bits)
    kernels.forward(x_view, residual_view, y_view, gamma64, beta64, eps, mean, var, rstd, relu, marks, threads)
    if copied is not None:
        y[...] = copied
    kept = None if out is not None and check.shares_memory(out, x_in) else x_in
    param_dtype = _param_dtype(gamma, x_in)
    return y, Saved(kept, ch, mean, var, rstd, count, gamma64, beta64, param_dtype, relu, has_residual, bits)


def batch_norm_infer(
    x: Any, mean: Any, var: Any, gamma: Any = None, beta: Any = None, *, axis: int = 1, eps: float = 1e-5,
    activation: str | None = None, residual: Any = None, out: np.ndarray | None = None, num_threads: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Normalise by given statistics: y = act(γ·(x - mean)/√(var + ε) + β + residual).

    Parameters
    ----------
    x : array_like of shape (N, C), (N, C, L), … ; float16, bfloat16, float32 or float64
        Two or more dimensions, any strides; integers become float64.
    mean, var : array_like of shape (C,)
        Population statistics.
    gamma, beta : array_like of shape (C,), optional
        Scale and shift; 1 and 0 where None.
    eps : float
        ε ≥ 0, with var + ε > 0 in every channel.
    axis, activation, residual, out, num_threads
        As in :func:`batch_norm_train`.

    Returns
    -------
    y : ndarray of x's shape, dtype and order in memory

    Raises
    ------
    TypeError, ValueError
        As :func:`batch_norm_train`, and where var + ε ≤ 0. Nothing is written then.

    Notes
    -----
    The mean is subtracted in two floats, so nothing is lost where it is large against the standard deviation.

    References
    ----------
    Ioffe & Szegedy 2015, Algorithm 2, line 11.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> fastbn.batch_norm_infer(np.array([[1.0, 10.0]]), mean=[0.0, 8.0], var=[1.0, 4.0], eps=0.0)
    array([[1., 1.]])
    """
    return infer(x, mean, var, gamma, beta, axis, eps, activation, residual, out, num_threads)[0]


def infer(
    x: Any, mean: Any, var: Any, gamma: Any, beta: Any, axis: int, eps: float, activation: str | None, residual: Any,
    out: np.ndarray | None, num_threads: int | None, keep_bits: bool = False,
) -> tuple[np.ndarray, layout.Bits | None]:  # fmt: skip
    """Return :func:`batch_norm_infer`'s y and, if wanted, the bits that a backward pass through ReLU needs."""
    x_in = check.array("x", x)
    ch = check.axis(axis, x_in.ndim)
    shape, c = x_in.shape, x_in.shape[ch]
    mean64, var64 = check.given_channels("mean", mean, c), check.given_channels("var", var, c)
    gamma64, beta64 = check.channels("gamma", gamma, c), check.channels("beta", beta, c)
    eps = check.inference_eps(eps)
    check.positive_variance(var64, eps)
    relu = check.activation(activation)
    given = residual
    if residual is not None:
        residual = check.like("residual", residual, shape, x_in.dtype)
    if out is not None:
        out = check.output(out, shape, x_in.dtype, ("x", x), residual=given, mean=mean, var=var, gamma=gamma,
                           beta=beta)  # fmt: skip
    threads = budget(x_in.size, num_threads)
    y = layout.empty_like(x_in) if out is None else out
    if x_in.size == 0:
        return y, None

    bits = layout.Bits() if keep_bits and relu and residual is not None else None
    (x_view, residual_view), y_view, copied, marks = layout.arrange(ch, (x_in, residual), y, bits)
    kernels.normalize(x_view, residual_view, y_view, gamma64, beta64, eps, mean64, var64, relu, marks, threads)
    if copied is not None:
        y[...] = copied
    return y, bits


def batch_norm_backward(
    dy: Any, saved: Saved, *, out: np.ndarray | None = None, num_threads: int | None = None
) -> Gradients:
    """Compute the gradients of :func:`batch_norm_train`.

    dβ = Σ dy, dγ = Σ dy·x̂, dx = γ·rstd·(dy - dβ/m - x̂·dγ/m), with dy taken as 0 where ReLU gave 0.
    With frozen statistics (a layer in inference mode) dx = γ·rstd·dy.

    Parameters
    ----------
    dy : array_like of the shape and dtype of x
    saved : Saved
        From the forward call; it can be used again.
    out : ndarray of x's shape and dtype, optional
        Where to write dx; it may be `dy` itself.
    num_threads : int, optional
        Threads of this call; by default as many as pay.

    Returns
    -------
    Gradients
        A NamedTuple (dx, dgamma, dbeta, dresidual); dgamma and dbeta have shape (C,) and gamma's dtype.

    Raises
    ------
    TypeError, ValueError
        On a shape or dtype that does not fit, and where the forward call overwrote x.

    References
    ----------
    Ioffe & Szegedy 2015, section 3 (the chain rule through μ and σ²).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> y, saved = fastbn.batch_norm_train(np.array([[1.0], [2.0], [4.0]]))
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(np.ones((3, 1)), saved)[:3]
    >>> bool(abs(dx).max() < 1e-15), dbeta
    (True, array([3.]))
    """
    x, dy_in = _check_backward(dy, saved)
    if out is not None:
        out = check.output(out, x.shape, x.dtype, ("dy", dy), x=x)
    if x.size == 0:
        zero = np.zeros(x.shape[saved.axis], saved.param_dtype)
        dx = layout.empty_like(x) if out is None else out
        return Gradients(dx, zero, zero.copy(), dx.copy() if saved.has_residual else None)
    dx = layout.empty_like(x) if out is None else out
    dgamma, dbeta, dresidual = _backward(dy_in, saved, x, dx, saved.frozen, budget(x.size, num_threads))
    single = saved.param_dtype == check.FLOAT32
    return Gradients(dx, narrow(dgamma, single), narrow(dbeta, single), dresidual)


def _check_backward(dy: Any, saved: Saved) -> tuple[np.ndarray, np.ndarray]:
    """Return x and dy as arrays, or raise."""
    if not isinstance(saved, Saved):
        raise TypeError(f"saved: expected what batch_norm_train returned, got {type(saved).__name__}")
    if saved.x is None:
        raise ValueError("saved: expected the input of the forward pass, but out=x overwrote it")
    return saved.x, check.like("dy", dy, saved.x.shape, saved.x.dtype)


def _backward(
    dy: np.ndarray, saved: Saved, x: np.ndarray, dx: np.ndarray | None, frozen: bool, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Write dx, unless it is None; return float64 dγ and dβ, and the residual's gradient if there was one."""
    c = x.shape[saved.axis]
    dgamma, dbeta = np.empty(c), np.empty(c)
    dresidual = marks = masked = copied = views = dx_view = None
    target = x if dx is None else dx
    if saved.bits is not None:
        dresidual = layout.empty_like(x)
        views = layout.plan(saved.axis, dy, x, dx, dresidual, saved.bits.view()) if target.flags.aligned else None
        if views is None:
            dresidual[...] = np.where(saved.bits.read(), dy, np.zeros((), x.dtype))
            dy = dresidual
        else:
            dy, x_view, dx_view, masked, bits_view = views
            marks = saved.bits.memory, bits_view
    elif saved.has_residual:
        dresidual = dy.copy(order="K")
    if views is None:
        if dx is None:
            dy, x_view = _readable(saved.axis, dy, x)
        else:
            (dy, x_view), dx_view, copied, _ = layout.arrange(saved.axis, (dy, x), dx)
    kernels.backward(
        dy, x_view, dx_view, saved.gamma, saved.beta, saved.mean, saved.rstd, dgamma, dbeta,
        saved.relu and saved.bits is None, frozen, marks, masked, threads,
    )  # fmt: skip
    if copied is not None and dx is not None:
        dx[...] = copied
    return dgamma, dbeta, dresidual


def _readable(axis: int, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return canonical views of inputs alone; copies only where there are none."""
    views = layout.plan(axis, *arrays) or layout.plan(axis, *map(np.ascontiguousarray, arrays))
    assert views is not None
    return views


def backward_sums(
    dy: Any, saved: Saved, num_threads: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return Σ dy·x̂ and Σ dy, float64, and the residual's gradient if there was one: a backward pass's first half.

    Where a batch is in several parts, those of all parts added up are what :func:`input_gradient` wants.
    """
    x, dy_in = _check_backward(dy, saved)
    if x.size == 0:
        zero = np.zeros(x.shape[saved.axis])
        return zero, zero.copy(), dy_in.copy() if saved.has_residual else None
    return _backward(dy_in, saved, x, None, saved.frozen, budget(x.size, num_threads))


def input_gradient(
    dy: Any, saved: Saved, dgamma: np.ndarray, dbeta: np.ndarray, dresidual: np.ndarray | None,
    out: np.ndarray | None = None, num_threads: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Return dx, given the sums over all of the batch: a backward pass's second half.

    `saved.count` is the number of values per channel in all of it; with frozen statistics dx = γ·rstd·dy.
    """
    x, dy_in = _check_backward(dy, saved)
    if out is not None:
        out = check.output(out, x.shape, x.dtype, ("dy", dy), x=x)
    dx = layout.empty_like(x) if out is None else out
    if x.size == 0:
        return dx
    if saved.bits is not None and dresidual is not None:
        dy_in = dresidual
    (dy_view, x_view), dx_view, copied, _ = layout.arrange(saved.axis, (dy_in, x), dx)
    kernels.input_gradient(
        dy_view, x_view, dx_view, saved.gamma, saved.beta, saved.mean, saved.rstd, dgamma / saved.count,
        dbeta / saved.count, saved.relu and saved.bits is None, saved.frozen, budget(x.size, num_threads),
    )  # fmt: skip
    if copied is not None:
        dx[...] = copied
    return dx


class Moments:
    """Mean and sum of squared deviations per channel, in float64, mergeable.

    Merging two parts a and b: n = nₐ + n_b, δ = μ_b - μₐ, μ = μₐ + δ·n_b/n, M2 = M2ₐ + M2_b + δ²·nₐ·n_b/n
    (Chan, Golub & LeVeque 1979). An empty part changes nothing.

    Parameters
    ----------
    num_features : int
        Channels, C.
    axis : int
        The channel axis of what :meth:`update` is given.

    Attributes
    ----------
    count : int
        Values per channel.
    mean, m2 : ndarray of shape (C,), float64
        μ and Σ (x - μ)².

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> m = fastbn.Moments.of(np.array([[1.0], [2.0]])).update(np.array([[6.0]]))
    >>> m.count, m.mean, m.var(correction=1)
    (3, array([3.]), array([7.]))
    """

    __slots__ = ("axis", "count", "m2", "mean")

    def __init__(self, num_features: int, *, axis: int = 1) -> None:
        c = check.count("num_features", num_features, low=0)
        self.count, self.mean, self.m2, self.axis = 0, np.zeros(c), np.zeros(c), check.count("axis", axis, low=None)

    @classmethod
    def of(cls, x: Any, axis: int = 1, *, num_threads: int | None = None) -> Moments:
        """Return the moments of an array; `axis` is its channel axis."""
        x_in = check.array("x", x)
        ch = check.axis(axis, x_in.ndim)
        threads = budget(x_in.size, num_threads)
        result = cls(x_in.shape[ch], axis=axis)
        if x_in.size:
            result.count = x_in.size // x_in.shape[ch]
            kernels.moments(layout.view(ch, x_in), result.mean, result.m2, threads)
        return result

    def update(self, x: Any) -> Moments:
        """Merge the moments of another array with the same channel axis, in place; return self."""
        return self.merge(Moments.of(x, self.axis))

    def merge(self, other: Moments) -> Moments:
        """Merge another part, in place; return self."""
        if not isinstance(other, Moments):
            raise TypeError(f"other: expected Moments, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other: expected {len(self.mean)} channels, got {len(other.mean)}")
        if other.count == 0:
            return self
        if self.count == 0:
            store(self, count=other.count, mean=other.mean.copy(), m2=other.m2.copy())
            return self
        n = self.count + other.count
        share = other.count / n
        with np.errstate(all="ignore"):  # infinities stay in their channel, without a word
            delta = other.mean - self.mean
            mean = self.mean + delta * share
            m2 = self.m2 + (other.m2 + delta * delta * (self.count * share))
        store(self, count=n, mean=mean, m2=m2)
        return self

    def var(self, correction: int = 0) -> np.ndarray:
        """Return Σ (x - μ)²/(count - correction) per channel: 0 the biased, 1 the unbiased variance."""
        divisor = self.count - check.number("correction", correction, "a number of 0 or more", 0)
        if divisor <= 0:
            raise ValueError(f"correction: expected less than the count of {self.count}, got {correction}")
        return self.m2 / divisor

    def to_dict(self) -> dict[str, Any]:
        """Return {"count", "mean", "m2", "axis"}; the arrays are copies."""
        return {"count": self.count, "mean": self.mean.copy(), "m2": self.m2.copy(), "axis": self.axis}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Moments:
        """Return the moments that :meth:`to_dict` gave."""
        if not isinstance(d, Mapping):
            raise TypeError(f"d: expected a mapping of names to values, got {type(d).__name__}")
        missing = [key for key in ("count", "mean", "m2") if key not in d]
        if missing:
            raise ValueError(f"d: expected keys count, mean, m2, got none named {', '.join(missing)}")
        c = check.view("mean", d["mean"]).size
        result = cls(c, axis=d.get("axis", 1))
        result.count = check.count("count", d["count"], low=0)
        result.mean = check.given_channels("mean", d["mean"], c)
        result.m2 = check.given_channels("m2", d["m2"], c)
        return result

    def __repr__(self) -> str:
        return f"Moments(channels={len(self.mean)}, count={self.count})"
