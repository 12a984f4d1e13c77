"""The BatchNorm layer: parameters, running statistics, training and inference mode around `norm.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ._core import check, layout
from ._core.state import MOST_COUNTED, copies, movable, move, store
from .norm import Moments, Saved, batch_norm_backward, batch_norm_train, infer, scale_and_shift

__all__ = ["BatchNorm"]

_STATE = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}


class BatchNorm:
    """Batch normalisation with running statistics.

    In training mode (the initial one) a call normalises by the statistics of the batch and moves the running ones:
    new = (1 - momentum)·old + momentum·batch. In inference mode it normalises by the running ones.

    Parameters
    ----------
    num_features : int
        Channels, C.
    axis : int
        The channel axis of the inputs.
    eps : float
        ε > 0.
    momentum : float or None
        Weight of the new value, in [0, 1]; None: cumulative average over all batches so far.
    affine : bool
        Whether there are γ (`gamma`, initially 1) and β (`beta`, initially 0).
    track_running_stats : bool
        Without them, inference mode normalises by the batch too.
    unbiased : bool
        Whether the running variance is of σ²·m/(m - 1), as in PyTorch, or of σ², as in Keras and ONNX.
    activation : {None, "relu"}
        Applied last.
    dtype : dtype
        Of parameters and running statistics; for a half type, float32.

    Attributes
    ----------
    gamma, beta : ndarray of shape (C,), or None
    grad_gamma, grad_beta : ndarray of shape (C,), or None
        Overwritten by each :meth:`backward`.
    grad_residual : ndarray, or None
        Gradient of the last call's residual, after :meth:`backward`.
    running_mean, running_var : ndarray of shape (C,), or None
    num_batches_tracked : int
    dtype : dtype
        Of all of these arrays.
    training : bool

    Notes
    -----
    Threads may share a layer: each call and each :meth:`state_dict` sees a mean and a variance that belong together,
    and training calls move them one after the other, in no given order. :meth:`backward` goes with the layer's last
    call, whichever thread made it: for a forward and a backward pass in each thread, take a layer each, or
    :func:`fastbn.batch_norm_train`. An exception, KeyboardInterrupt too, leaves the statistics before or after a call.

    References
    ----------
    Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> y = bn(np.array([[1, 10], [3, 30]], np.float32))
    >>> bn.running_mean
    array([0.2, 2. ], dtype=float32)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.grad_beta
    array([2., 2.], dtype=float32)
    """

    def __init__(
        self, num_features: int, *, axis: int = 1, eps: float = 1e-5, momentum: float | None = 0.1, affine: bool = True,
        track_running_stats: bool = True, unbiased: bool = True, activation: str | None = None, dtype: Any = np.float32,
    ) -> None:  # fmt: skip
        c = check.count("num_features", num_features)
        self.num_features = c
        self.axis = check.count("axis", axis, low=None)
        self.eps = check.training_eps(eps)
        self.momentum = None if momentum is None else check.number("momentum", momentum, "None or a number from 0 to 1",
                                                                   0.0, 1.0)  # fmt: skip
        self.activation = activation
        check.activation(activation)
        self.unbiased = check.flag("unbiased", unbiased)
        affine = check.flag("affine", affine)
        track_running_stats = check.flag("track_running_stats", track_running_stats)
        self.dtype = dtype = check.parameter_dtype("dtype", dtype)
        self.gamma = np.ones(c, dtype) if affine else None
        self.beta = np.zeros(c, dtype) if affine else None
        self.running_mean = np.zeros(c, dtype) if track_running_stats else None
        self.running_var = np.ones(c, dtype) if track_running_stats else None
        self.num_batches_tracked = 0
        self.grad_gamma: np.ndarray | None = None
        self.grad_beta: np.ndarray | None = None
        self.grad_residual: np.ndarray | None = None
        self.training = True
        self._saved: Saved | None = None

    @property
    def affine(self) -> bool:
        """Whether there are γ and β."""
        return self.gamma is not None

    @property
    def track_running_stats(self) -> bool:
        """Whether there are running statistics."""
        return self.running_mean is not None

    def train(self, mode: bool = True) -> BatchNorm:
        """Switch to training mode (or, with False, to inference mode); return self."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Switch to inference mode; return self."""
        return self.train(False)

    def __call__(
        self, x: Any, *, residual: Any = None, out: np.ndarray | None = None, num_threads: int | None = None
    ) -> np.ndarray:
        """Return y = act(γ·x̂ + β + residual); in training mode, move the running statistics.

        Parameters, errors and accuracy as in :func:`fastbn.batch_norm_train` and :func:`fastbn.batch_norm_infer`.
        An empty batch gives an empty result and moves nothing.
        """
        x = check.array("x", x)
        axis = check.axis(self.axis, x.ndim)
        if x.shape[axis] != self.num_features:
            raise ValueError(f"x: expected {self.num_features} channels on axis {self.axis}, got shape {x.shape}")
        tracked = self.running_mean is not None and self.running_var is not None
        if self.training or not tracked:
            if tracked:
                movable(self, self.num_features)
            y, saved = batch_norm_train(
                x, self.gamma, self.beta, axis=axis, eps=self.eps, activation=self.activation, residual=residual,
                out=out, num_threads=num_threads,
            )  # fmt: skip
            if saved.count:
                self._move(saved)
        else:
            mean, var = self._statistics()
            y, bits = infer(
                x, mean, var, self.gamma, self.beta, axis, self.eps, self.activation, residual, out, num_threads, True
            )
            saved = self._frozen(x, y, axis, mean, var, residual is not None, bits)
        self._saved = saved
        return y

    def _move(self, saved: Saved) -> None:
        """Move the running statistics towards those of a batch."""
        if self.running_mean is None or self.running_var is None:
            return
        count = saved.count
        with np.errstate(all="ignore"):  # infinities
            var = saved.var * (count / (count - 1)) if self.unbiased else saved.var
        move(self, saved.mean, var)

    def _frozen(
        self, x: np.ndarray, y: np.ndarray, axis: int, mean: np.ndarray, var: np.ndarray, has_residual: bool,
        bits: layout.Bits | None,
    ) -> Saved:  # fmt: skip
        """Return what backward needs after a call with given statistics."""
        c, relu = self.num_features, self.activation == "relu"
        overwritten = check.same_memory(x, y)
        return Saved(
            None if overwritten else x, axis, mean, var, 1 / np.sqrt(var + self.eps), x.size // c,
            check.channels("gamma", self.gamma, c), check.channels("beta", self.beta, c),
            check.real(x.dtype) if self.gamma is None else self.gamma.dtype, relu=relu, has_residual=has_residual,
            bits=bits, frozen=True,
        )  # fmt: skip

    def backward(self, dy: Any, *, out: np.ndarray | None = None, num_threads: int | None = None) -> np.ndarray:
        """Return dx of the last call and set `grad_gamma`, `grad_beta` (and `grad_residual`).

        After a call in inference mode the statistics count as constants: dx = γ·dy/√(running_var + ε).
        Errors as in :func:`fastbn.batch_norm_backward`; ValueError where there was no call yet.
        """
        if self._saved is None:
            raise ValueError("backward: expected a call of the layer before it, got none")
        gradients = batch_norm_backward(dy, self._saved, out=out, num_threads=num_threads)
        new: dict[str, Any] = {"grad_gamma": gradients.dgamma, "grad_beta": gradients.dbeta} if self.affine else {}
        store(self, **new, grad_residual=gradients.dresidual)
        return gradients.dx

    def to_affine(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 (scale, shift) of the layer in inference mode: y = scale·x + shift.

        scale = γ/√(running_var + ε), shift = β - scale·running_mean (Ioffe & Szegedy 2015, Algorithm 2, line 11).
        """
        self._running("to_affine")
        mean, var = self._statistics()
        check.positive_variance(var, self.eps)
        gamma, beta = (None if p is None else p.astype(np.float64) for p in (self.gamma, self.beta))
        return scale_and_shift(mean, var, gamma, beta, self.eps)

    def _statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Return running mean and variance as they were at one moment, in float64."""
        mean, var = copies(self, ("running_mean", "running_var"))
        c = self.num_features
        return check.given_channels("running_mean", mean, c), check.given_channels("running_var", var, c)

    def _running(self, what: str) -> tuple[np.ndarray, np.ndarray]:
        if self.running_mean is None or self.running_var is None:
            raise ValueError(f"{what}: expected running statistics, got a layer with track_running_stats=False")
        return self.running_mean, self.running_var

    def recalibrate(self, batches: Iterable[Any], method: str = "pooled") -> None:
        """Replace the running statistics by those of a population, in place.

        Parameters
        ----------
        batches : iterable of array_like, or of Moments
            Inputs of this layer, computed with frozen weights, or the moments of such. No batches change nothing, nor
            does an iterable that raises.
        method : {"pooled", "paper"}
            "pooled": mean and variance of all the values together, the variance over n - 1 where `unbiased`, else
            over n. "paper": E[x] = mean of μ_B, Var[x] = mean of σ_B²·m_B/(m_B - 1) over the batches.

        Raises
        ------
        TypeError, ValueError
            On a batch that does not fit, on another method, and on too few values for the variance.

        References
        ----------
        Ioffe & Szegedy 2015, Algorithm 2, line 10; Chan, Golub & LeVeque 1979 (pooled).
        """
        running_mean, running_var = self._running("recalibrate")
        check.choice("method", method, ("pooled", "paper"))
        batches = check.iterator("batches", batches, "an iterable of arrays")
        c = self.num_features
        total = Moments(c, axis=self.axis)
        mean, var, number = np.zeros(c), np.zeros(c), 0
        for batch in batches:
            m = batch if isinstance(batch, Moments) else Moments.of(batch, self.axis)
            if m.mean.shape != (c,):
                raise ValueError(f"batches: expected {c} channels on axis {self.axis}, got {len(m.mean)}")
            if m.count == 0:
                continue
            number += 1
            if method == "pooled":
                total.merge(m)
                continue
            if m.count < 2:
                raise ValueError("batches: expected 2 or more values per channel in each batch, got 1")
            with np.errstate(all="ignore"):  # infinities stay in their channel
                mean += (m.mean - mean) / number
                var += (m.var(correction=1) - var) / number
        if number == 0:
            return
        if method == "pooled":
            if self.unbiased and total.count < 2:
                raise ValueError(f"batches: expected 2 or more values per channel in all, got {total.count}")
            mean, var = total.mean, total.var(correction=int(self.unbiased))
        store(self, {"running_mean": (running_mean, mean), "running_var": (running_var, var)})

    def state_dict(self) -> dict[str, np.ndarray]:
        """Return copies of parameters and running statistics under PyTorch's names."""
        *arrays, tracked = copies(self, (*_STATE.values(), "num_batches_tracked"))
        values = {key: array for key, array in zip(_STATE, arrays, strict=True) if array is not None}
        if self.track_running_stats:
            values["num_batches_tracked"] = np.array(tracked, np.int64)
        return values

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state dict of PyTorch's names into the layer's arrays.

        Raises
        ------
        TypeError, ValueError
            On missing or unknown keys, wrong shapes and values that are no real numbers; nothing is changed then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a mapping of names to arrays, got {type(state_dict).__name__}")
        own = self.state_dict()
        missing = ", ".join(sorted(own.keys() - state_dict.keys())) or "none"
        unknown = ", ".join(sorted(map(str, state_dict.keys() - own.keys()))) or "none"
        if own.keys() != state_dict.keys():
            raise ValueError(f"state_dict: expected keys {', '.join(own)}; missing: {missing}; unknown: {unknown}")
        tracked = own.pop("num_batches_tracked", None)
        if tracked is not None:
            tracked = check.view("num_batches_tracked", state_dict["num_batches_tracked"])
            if tracked.size != 1 or tracked.dtype.kind not in "iu" or not 0 <= tracked.item() <= MOST_COUNTED:
                raise ValueError(f"num_batches_tracked: expected an integer from 0 to 2⁶², got {tracked!r}")
        new = {key: check.given_channels(key, state_dict[key], self.num_features) for key in own}
        count = {} if tracked is None else {"num_batches_tracked": int(tracked.item())}
        store(self, {_STATE[key]: (getattr(self, _STATE[key]), value) for key, value in new.items()}, **count)

    def __repr__(self) -> str:
        options = f"axis={self.axis}, eps={self.eps}, momentum={self.momentum}"
        defaults = {"affine": True, "track_running_stats": True, "unbiased": True, "activation": None}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                options += f", {name}={getattr(self, name)!r}"
        options += "" if self.dtype == np.float32 else f", dtype={self.dtype.name!r}"
        return f"BatchNorm({self.num_features}, {options})"
