"""Optimizers over lists of arrays: SGD, RMSprop, Adam, AdamW; clipping; schedules; max-norm projection.

A step updates all the arrays in place, in one parallel region for the whole list. In this order: the gradients are
checked, the schedule gives the learning rate, gradients are clipped (a factor within the update, never a rewrite),
then weight decay, then the update. Whatever is refused is refused before the first change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from . import threads
from ._core import check
from ._core.dispatch import optim_kernels
from .schedules import Schedule, constant, cosine, exponential, inverse_time, step_decay

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Optimizer",
    "RMSprop",
    "Schedule",
    "constant",
    "cosine",
    "exponential",
    "inverse_time",
    "project_max_norm",
    "step_decay",
]

_NOT_NEGATIVE = "a finite number of 0 or more"
_POSITIVE = "a finite number above 0"
_CACHE_LINE = 64


class Optimizer:
    """What the optimizers share; use one of :class:`SGD`, :class:`RMSprop`, :class:`Adam`, :class:`AdamW`.

    Parameters
    ----------
    params : list or dict of ndarray
        The arrays to update in place, of any shapes; float32, float64, float16 or bfloat16 (ml_dtypes), mixed as you
        like; C-contiguous, aligned, writable, sharing no memory with each other. float64 computes in float64, the others in
        float32; float16 and bfloat16 arrays have a float32 master that is updated and then rounded to nearest even
        into the array. A value written into such an array from outside replaces its master's at the next step.
    lr : float
        Learning rate ≥ 0.
    weight_decay : float
        λ ≥ 0 of the L2 penalty: g ← g + λp (decoupled in :class:`AdamW`).
    clip_value, clip_norm, clip_global_norm : float > 0, optional
        At most one. By value: g ← min(max(g, −c), c). By norm: g ← g·c/‖g‖₂ where ‖g‖₂ > c, of every array for itself
        or of all arrays together (Pascanu et al. 2013). A zero gradient stays zero.
    schedule : callable, optional
        step (from 0) → learning rate, in place of `lr`; see :mod:`fastbn.schedules`.

    Notes
    -----
    The bits do not depend on the number of threads or the instruction set. Norms are summed in float64, in an order
    that the shapes fix, and c/norm is not softened by an epsilon. A gradient of NaN spoils its own element only (a
    norm of NaN is not above c, so nothing is clipped); an infinite one makes a clipped norm infinite: the factor is 0,
    which makes infinities NaN and everything else 0.
    """

    _slots: tuple[str | None, ...] = ()  # PyTorch's name of each slot of the kernel; None: this variant has no such slot

    def __init__(
        self,
        params: Iterable[np.ndarray] | Mapping[Any, np.ndarray],
        lr: float,
        weight_decay: float,
        clip_value: float | None,
        clip_norm: float | None,
        clip_global_norm: float | None,
        schedule: Schedule | None,
    ) -> None:
        self._lr = check.number("lr", lr, _NOT_NEGATIVE, 0.0)
        self._weight_decay = check.number("weight_decay", weight_decay, _NOT_NEGATIVE, 0.0)
        clips = {"clip_value": clip_value, "clip_norm": clip_norm, "clip_global_norm": clip_global_norm}
        given = {name: check.number(name, c, _POSITIVE, 0.0, open_low=True) for name, c in clips.items() if c is not None}
        if len(given) > 1:
            raise ValueError(f"{list(given)[0]}: expected at most one kind of clipping, got {' and '.join(given)}")
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule: expected a callable, step → learning rate, got {schedule!r}")
        self._clip_value = given.get("clip_value", math.inf)
        self._clip_norm = given.get("clip_norm", given.get("clip_global_norm"))
        self._whole = "clip_global_norm" in given
        self._schedule = schedule
        self._step = 0
        named = _named("params", params)
        self._keys = list(params) if isinstance(params, Mapping) else None
        self._names = [name.removeprefix("params") for name in named]  # "[3]" or "['w']", for error messages
        self._params = list(named.values())
        _check_params(named)
        self._state = _new_state(self._params, self._slots)
        self._table = optim_kernels.Table(self._params, self._state)

    @property
    def params(self) -> list[np.ndarray] | dict[Any, np.ndarray]:
        """The arrays, as a list, or as a dict where they came as one."""
        return list(self._params) if self._keys is None else dict(zip(self._keys, self._params, strict=True))

    @property
    def lr(self) -> float:
        """The learning rate; with a schedule, that of the last step."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        if self._schedule is not None:
            raise ValueError(f"lr: expected no assignment, since the schedule sets it, got {value!r}")
        self._lr = check.number("lr", value, _NOT_NEGATIVE, 0.0)

    def step(
        self,
        grads: Iterable[np.ndarray | None] | Mapping[Any, np.ndarray | None],
        *,
        num_threads: int | None = None,
    ) -> None:
        """Update the parameters in place by one step.

        Parameters
        ----------
        grads : list of ndarray or None, or dict of them where `params` was a dict
            One per parameter, of its shape and dtype, with any strides and byte order; never modified. None skips
            the parameter and its state; the step counts all the same.
        num_threads : int, optional
            Threads to use; None lets the size decide.

        Raises
        ------
        ValueError
            Where a gradient is missing, or has another shape or dtype, or shares memory with a parameter; where a
            parameter was made read-only or resized; where the schedule gives a negative or not finite rate.
            Nothing has been updated or counted then.
        """
        held = self._gradients(grads)  # a list of our own: it keeps the arrays alive while the GIL is released
        refused = self._table.bind(held)
        while refused >= 0:
            held[refused] = self._copied(refused, held[refused])
            refused = self._table.bind(held, refused)
        budget = threads.budget(self._table.size, num_threads)
        lr = self._lr
        if self._schedule is not None:
            lr = check.number(f"schedule({self._step})", self._schedule(self._step), _NOT_NEGATIVE, 0.0)
        if self._clip_norm is not None:
            optim_kernels.clip_flat(self._table, self._clip_norm, self._whole, budget)
        self._update(lr, self._step + 1, budget)
        self._lr = lr
        self._step += 1

    def _update(self, lr: float, t: int, budget: int) -> None:
        """Run the method's kernel for step number t, counted from 1."""
        raise TypeError(f"{type(self).__name__}: expected one of SGD, RMSprop, Adam, AdamW")

    def _gradients(self, grads: Any) -> list[np.ndarray | None]:
        """Return the gradients as a new list in the order of the parameters."""
        if isinstance(grads, Mapping):
            if self._keys is None:
                raise ValueError("grads: expected a list, as params was, got a dict")
            if grads.keys() != set(self._keys):
                odd = sorted(map(repr, grads.keys() ^ set(self._keys)))
                raise ValueError(f"grads: expected the keys of params, got a dict that differs in {', '.join(odd)}")
            return [grads[key] for key in self._keys]
        if isinstance(grads, np.ndarray):
            raise ValueError(f"grads: expected a list of {len(self._params)} arrays, got a single array")
        held = list(grads)
        if len(held) != len(self._params):
            raise ValueError(f"grads: expected {len(self._params)} arrays, got {len(held)}")
        return held

    def _copied(self, i: int, grad: Any) -> np.ndarray:
        """Return a gradient that the kernel would not take as a plain contiguous copy, or say what is wrong with it."""
        p, where = self._params[i], self._names[i]
        if not p.flags.writeable or not self._table.holds(i):
            raise ValueError(f"params{where}: expected the writable array of the start, got it read-only or resized")
        g = check.view(f"grads{where}", grad)
        if g.shape != p.shape:
            raise ValueError(f"grads{where}: expected shape {p.shape}, got {g.shape}")
        if g.dtype.newbyteorder("=") != p.dtype:
            raise ValueError(f"grads{where}: expected dtype {p.dtype}, got {g.dtype}")
        near = self._table.near(*np.lib.array_utils.byte_bounds(g))  # one search, where a comparison with each is long
        if near and any(check.shares_memory(g, other) for other in self._params):
            raise ValueError(f"grads{where}: expected memory apart from the parameters, got an array that overlaps one")
        return g.astype(p.dtype, order="C")

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"step": int, slot: [one array per parameter, of its shape]}``, copies under PyTorch's slot names.

        Where there are float16 or bfloat16 parameters, a slot ``"master"`` holds their float32 masters (for the
        other parameters, which are their own masters, a copy of them).
        """
        state: dict[str, Any] = {"step": self._step}
        for name, arrays in self._state_by_slot().items():
            state[name] = [(p if a is None else a).copy() for p, a in zip(self._params, arrays, strict=True)]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; parameters are not written.

        With the parameters of that moment, the steps that follow are those that would have followed, to the last bit.

        Raises
        ------
        ValueError, TypeError
            Where a slot is missing or unknown, or an array has another shape or is none. Nothing has changed then.
        """
        slots = self._state_by_slot()
        if set(state) != {"step", *slots}:
            raise ValueError(f"state: expected the keys {', '.join(['step', *slots])}, got {', '.join(map(str, state))}")
        step = check.count("step", state["step"], 0)
        loaded = []
        for name, arrays in slots.items():
            if len(state[name]) != len(arrays):
                raise ValueError(f"{name}: expected {len(arrays)} arrays, got {len(state[name])}")
            for i, value in enumerate(state[name]):
                new = check.view(f"{name}{self._names[i]}", value)
                if new.dtype.kind not in "fiu" and new.dtype.name != "bfloat16":
                    raise TypeError(f"{name}{self._names[i]}: expected real numbers, got dtype {new.dtype}")
                if new.shape != self._params[i].shape:
                    raise ValueError(f"{name}{self._names[i]}: expected shape {self._params[i].shape}, got {new.shape}")
                loaded.append((arrays[i], new))
        for array, new in loaded:
            if array is not None:
                array[...] = new
        self._step = step

    def _state_by_slot(self) -> dict[str, list[np.ndarray | None]]:
        """Return the arrays themselves per slot, in the order of the parameters."""
        names = [*self._slots, "master" if any(slots[-1] is not None for slots in self._state) else None]
        return {name: [slots[k] for slots in self._state] for k, name in enumerate(names) if name is not None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._params)} arrays, {self._table.size} elements, lr={self._lr:g}, step={self._step})"


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum or Nesterov's (Sutskever et al. 2013).

    p ← p − lr·g; with momentum v ← μv + (1−d)g, p ← p − lr·v; Nesterov p ← p − lr·(g + μv). v starts at 0.

    Parameters
    ----------
    params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule
        As in :class:`Optimizer`.
    momentum : float
        μ in [0, 1). Slot ``momentum_buffer``, where μ > 0; it holds no learning rate.
    dampening : float
        d in [0, 1]; d = μ makes v the exponential average of the gradients. PyTorch starts with v = g, undampened,
        so with d ≠ 0 its v is larger by d·μᵗ⁻¹·g₁.
    nesterov : bool
        Needs momentum, and no dampening.

    Raises
    ------
    ValueError, TypeError
        Where an argument is out of range; where `params` is empty, or an array is read-only, not contiguous, or shares memory
        with another.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.optim import SGD
    >>> w = np.array([1.0, 2.0])
    >>> opt = SGD([w], lr=0.5, momentum=0.5)
    >>> for _ in range(2):
    ...     opt.step([np.array([1.0, 0.0])])
    >>> w.tolist()
    [-0.25, 2.0]
    """

    def __init__(
        self,
        params: Iterable[np.ndarray] | Mapping[Any, np.ndarray],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_global_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self._momentum = _below_one("momentum", momentum)
        self._fresh = 1.0 - check.number("dampening", dampening, "a number in [0, 1]", 0.0, 1.0)
        self._nesterov = bool(nesterov)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(
                f"nesterov: expected momentum above 0 and no dampening, got momentum={momentum} and dampening={dampening}"
            )
        self._slots = ("momentum_buffer" if self._momentum else None,)
        super().__init__(params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule)

    def _update(self, lr: float, t: int, budget: int) -> None:
        optim_kernels.sgd_flat(
            self._table, lr, self._clip_value, self._weight_decay, self._momentum, self._fresh, self._nesterov, budget
        )


class RMSprop(Optimizer):
    """Divide the gradient by the root of its running mean square (Tieleman & Hinton 2012).

    s ← ρs + (1−ρ)g²; p ← p − lr·g/(√s + ε). Centered: s − ḡ² in place of s, with ḡ ← ρḡ + (1−ρ)g (Graves 2013).
    With momentum: v ← μv + g/(√s + ε), p ← p − lr·v.

    Parameters
    ----------
    params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule
        As in :class:`Optimizer`.
    alpha : float
        ρ in [0, 1). Slot ``square_avg``.
    eps : float
        ε ≥ 0; with 0, an element whose gradients were all 0 becomes NaN.
    momentum : float
        μ in [0, 1). Slot ``momentum_buffer``, where μ > 0; it holds no learning rate.
    centered : bool
        Divide by the standard deviation instead. Slot ``grad_avg``. A variance that rounding leaves below 0 counts as 0.
    eps_inside_sqrt : bool
        lr·g/√(s + ε), as in Keras.

    Raises
    ------
    ValueError, TypeError
        As :class:`SGD`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.optim import RMSprop
    >>> w = np.array([1.0])
    >>> RMSprop([w], lr=0.5, alpha=0.75, eps=0.0).step([np.array([4.0])])
    >>> w.tolist()
    [0.0]
    """

    def __init__(
        self,
        params: Iterable[np.ndarray] | Mapping[Any, np.ndarray],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        centered: bool = False,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_global_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self._alpha = _below_one("alpha", alpha)
        self._eps = _inside_and_outside(eps, eps_inside_sqrt)
        self._momentum = _below_one("momentum", momentum)
        self._slots = ("square_avg", "momentum_buffer" if self._momentum else None, "grad_avg" if centered else None)
        super().__init__(params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule)

    def _update(self, lr: float, t: int, budget: int) -> None:
        optim_kernels.rmsprop_flat(
            self._table, lr, self._clip_value, self._weight_decay, self._alpha, self._momentum, *self._eps, budget
        )


class Adam(Optimizer):
    """Divide a running mean of the gradient by the root of its running mean square (Kingma & Ba 2015, Algorithm 1).

    v ← β₁v + (1−β₁)g; s ← β₂s + (1−β₂)g²; v̂ = v/(1−β₁ᵗ), ŝ = s/(1−β₂ᵗ); p ← p − lr·v̂/(√ŝ + ε).

    Parameters
    ----------
    params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule
        As in :class:`Optimizer`.
    betas : (float, float)
        β₁ and β₂ in [0, 1). Slots ``exp_avg`` (v) and ``exp_avg_sq`` (s). t counts the optimizer's steps, also those that skip
        a parameter; the corrections are computed in float64.
    eps : float
        ε ≥ 0; with 0, an element whose gradients were all 0 becomes NaN.
    amsgrad : bool
        Divide by the largest s so far, corrected afterwards (Reddi et al. 2018). Slot ``max_exp_avg_sq``.
    eps_inside_sqrt : bool
        lr·v̂/√(ŝ + ε).

    Raises
    ------
    ValueError, TypeError
        As :class:`SGD`.

    Notes
    -----
    In float32 the averages are updated as s + (1−β₂)(g² − s): β₂·s + (1−β₂)·g² with both factors rounded would be off
    by 1.3e-5 in the long run for β₂ = 0.999. A float32 gradient above 1.8e19 has no finite square.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.optim import Adam
    >>> params = {"weight": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}
    >>> opt = Adam(params, lr=0.5, clip_global_norm=1.0)
    >>> opt.step({"weight": np.full((2, 2), 3, np.float32), "bias": None})
    >>> params["weight"].tolist(), opt.state_dict()["step"]
    ([[0.5, 0.5], [0.5, 0.5]], 1)
    """

    _decoupled = False

    def __init__(
        self,
        params: Iterable[np.ndarray] | Mapping[Any, np.ndarray],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        eps_inside_sqrt: bool = False,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_global_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        if not isinstance(betas, Sequence) or isinstance(betas, str) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas!r}")
        self._betas = _below_one("betas[0]", betas[0]), _below_one("betas[1]", betas[1])
        self._eps = _inside_and_outside(eps, eps_inside_sqrt)
        self._slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else None)
        super().__init__(params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule)

    def _update(self, lr: float, t: int, budget: int) -> None:
        beta1, beta2 = self._betas
        decay, shrink = (0.0, lr * self._weight_decay) if self._decoupled else (self._weight_decay, 0.0)
        rate, correction = lr / (1 - beta1**t), 1 / (1 - beta2**t)
        optim_kernels.adam_flat(
            self._table, rate, self._clip_value, decay, shrink, beta1, beta2, correction, *self._eps, budget
        )


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, Algorithm 2): first p ← p·(1 − lr·λ), then Adam.

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, eps_inside_sqrt, clip_value, clip_norm, clip_global_norm, schedule
        As in :class:`Adam`.
    weight_decay : float
        λ ≥ 0. It shrinks the parameter itself and does not enter the gradient or its averages.

    Raises
    ------
    ValueError, TypeError
        As :class:`SGD`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.optim import AdamW
    >>> w = np.array([8.0])
    >>> AdamW([w], lr=0.5, weight_decay=0.25).step([np.zeros(1)])
    >>> w.tolist()
    [7.0]
    """

    _decoupled = True

    def __init__(
        self,
        params: Iterable[np.ndarray] | Mapping[Any, np.ndarray],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        eps_inside_sqrt: bool = False,
        clip_value: float | None = None,
        clip_norm: float | None = None,
        clip_global_norm: float | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, eps_inside_sqrt, clip_value, clip_norm, clip_global_norm, schedule
        )


def project_max_norm(
    params: Iterable[np.ndarray] | Mapping[Any, np.ndarray], max_norm: float, axis: int | None = None
) -> None:
    """Project arrays in place onto ‖w‖₂ ≤ c, to be called after a step: w ← w·c/‖w‖₂ where ‖w‖₂ > c.

    Parameters
    ----------
    params : list or dict of ndarray
        Floating-point arrays, writable; any strides.
    max_norm : float
        c > 0.
    axis : int, optional
        The axis of the output units: each of its slices is projected by its own norm (0 for weights of shape
        (out, in, …), 1 for (in, out)). None takes the norm of the whole array.

    Raises
    ------
    ValueError, TypeError
        Where an array is read-only, not of floating point, or has no such axis. Nothing has changed then.

    Notes
    -----
    Norms are computed in float64 and products rounded once; slices within the limit keep their bits, and so do slices that hold
    NaN or infinity (Srivastava et al. 2014, §5.1).

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.optim import project_max_norm
    >>> w = np.array([[3.0, 4.0], [0.0, 0.5]])
    >>> project_max_norm([w], 1.0, axis=0)
    >>> w.tolist()
    [[0.6, 0.8], [0.0, 0.5]]
    """
    c = check.number("max_norm", max_norm, _POSITIVE, 0.0, open_low=True)
    named = _named("params", params)
    for name, w in named.items():
        _check_array(name, w)
        if axis is not None and not -w.ndim <= check.count("axis", axis, None) < w.ndim:
            raise ValueError(f"axis: expected an axis of every array, got {axis} for {name} of shape {w.shape}")
    for w in named.values():
        others = None if axis is None else tuple(k for k in range(w.ndim) if k != axis % w.ndim)
        wide = w.astype(np.float64)
        peak = np.max(np.abs(wide), axis=others, keepdims=True, initial=0.0)
        exponent = np.where(np.isfinite(peak), np.frexp(peak)[1], 0)  # scaling by 2**-exponent keeps squares in range
        with np.errstate(all="ignore"):  # a limit beyond float64 after scaling, and what is not finite
            norm = np.sqrt(np.sum(np.ldexp(wide, -exponent) ** 2, axis=others, keepdims=True))
            limit = np.ldexp(c, -exponent)
            above = (norm > limit) & np.isfinite(peak)
            projected = (wide * (limit / norm)).astype(w.dtype)
        np.copyto(w, projected, where=above)


def _named(argument: str, arrays: Iterable[Any] | Mapping[Any, Any]) -> dict[str, Any]:
    """Return {"params[3]" or "params['w']": array} of a list or dict of arrays."""
    if isinstance(arrays, Mapping):
        named = {f"{argument}[{key!r}]": array for key, array in arrays.items()}
    elif isinstance(arrays, Iterable) and not isinstance(arrays, (np.ndarray, str)):
        named = {f"{argument}[{i}]": array for i, array in enumerate(arrays)}
    else:
        raise TypeError(f"{argument}: expected a list or dict of arrays, got {type(arrays).__name__}")
    if not named:
        raise ValueError(f"{argument}: expected one array or more, got none")
    return named


def _check_array(name: str, p: Any) -> None:
    """Refuse what cannot be updated in place: no array, not of a kernel's dtype, or read-only."""
    if not isinstance(p, np.ndarray) or isinstance(p, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected a NumPy array, to be updated in place, got {type(p).__name__}")
    if p.dtype.name not in optim_kernels.DTYPES:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {p.dtype}")
    if not p.flags.writeable:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")


def _check_params(named: dict[str, Any]) -> None:
    """Refuse what the kernels cannot walk through, and arrays that share memory."""
    for name, p in named.items():
        _check_array(name, p)
        if not p.flags.c_contiguous:
            raise ValueError(f"{name}: expected a C-contiguous array, got strides {p.strides} for shape {p.shape}")
        if not p.flags.aligned or not p.dtype.isnative:
            raise ValueError(f"{name}: expected aligned memory in native byte order, got dtype {p.dtype.str}")
    ranges = sorted((p.ctypes.data, p.ctypes.data + p.nbytes, name) for name, p in named.items() if p.size)
    for (_, end, first), (start, _, second) in zip(ranges, ranges[1:], strict=False):
        if start < end:
            raise ValueError(f"{second}: expected arrays that share no memory, got one that overlaps {first}")


def _new_state(params: list[np.ndarray], slots: tuple[str | None, ...]) -> list[list[np.ndarray | None]]:
    """Return for every parameter its zeroed slots (None where the method has none) and its float32 master or None.

    The state of all parameters of a precision is one block of memory, in which that of a parameter stands together:
    many small arrays are then a few pages, and every array starts a cache line.
    """
    state: list[list[np.ndarray | None]] = [[] for _ in params]
    for dtype in {check.real(p.dtype) for p in params}:
        mine = [i for i, p in enumerate(params) if check.real(p.dtype) == dtype]
        line = _CACHE_LINE // dtype.itemsize
        wanted = [(i, name is not None) for i in mine for name in slots]
        wanted += [(i, check.is_half(params[i].dtype)) for i in mine]
        padded = sum(-(-params[i].size // line) * line for i, there in wanted if there)
        block = np.zeros(padded + line, dtype)
        start = -block.ctypes.data % _CACHE_LINE // dtype.itemsize
        for i, there in wanted:
            size = params[i].size
            state[i].append(block[start : start + size].reshape(params[i].shape) if there else None)
            start += -(-size // line) * line if there else 0
    for p, arrays in zip(params, state, strict=True):
        if arrays[-1] is not None:
            arrays[-1][...] = p
    return state


def _below_one(name: str, value: float) -> float:
    return check.number(name, value, "a number in [0, 1)", 0.0, math.nextafter(1.0, 0.0))


def _inside_and_outside(eps: float, eps_inside_sqrt: bool) -> tuple[float, float]:
    """Return eps as the kernels take it: what is added inside the root, and outside."""
    eps = check.number("eps", eps, _NOT_NEGATIVE, 0.0)
    return (eps, 0.0) if eps_inside_sqrt else (0.0, eps)
