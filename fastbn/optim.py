"""Optimizers over lists of arrays: SGD, RMSprop, Adam, AdamW; clipping; schedules; max-norm projection.

A step updates all the arrays in place, in one parallel region for the whole list, and in this order:
gradients are checked, the schedule gives the learning rate, gradients are clipped (a factor within the
update, never a rewrite), then comes weight decay, then the update. What is refused is refused before the
first change.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import numpy as np

from . import threads
from ._core import check
from ._core.dispatch import optim_kernels
from ._core.state import MOST_COUNTED, store
from .interrupts import interrupt_deferred
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

Arrays = Iterable[np.ndarray] | Mapping[Any, np.ndarray]
Gradients = Iterable[np.ndarray | None] | Mapping[Any, np.ndarray | None]

_NOT_NEGATIVE = "a finite number of 0 or more"
_POSITIVE = "a finite number above 0"
_CACHE_LINE = 64  # bytes
# Looking a gradient up is serial and takes as long as updating so many elements (12 ns).
_NOT_SCHEDULED = -1.0
_LOOKUP = 32


class Optimizer:
    """What the optimizers share; use one of :class:`SGD`, :class:`RMSprop`, :class:`Adam`, :class:`AdamW`.

    Parameters
    ----------
    params : list or dict of ndarray
        The arrays to update in place: any shapes; float32, float64, float16 or bfloat16 (ml_dtypes), also
        mixed; C-contiguous, aligned, writable, sharing no memory with each other. float64 is computed in
        float64, the others in float32. float16 and bfloat16 arrays have a float32 master that is updated and
        then rounded to nearest even into the array; a value that others write into the array replaces the
        master's.
    lr : float
        Learning rate ≥ 0.
    weight_decay : float
        λ ≥ 0 of the L2 penalty: g ← g + λp (decoupled in :class:`AdamW`).
    clip_value, clip_norm, clip_global_norm : float > 0, optional
        One of them at most. By value: g ← min(max(g, −c), c). By norm: g ← g·c/‖g‖₂ where ‖g‖₂ > c, of each
        array for itself or of all arrays together (Pascanu et al. 2013). A zero gradient stays zero.
    schedule : callable, optional
        step (from 0) → learning rate, in place of `lr`; the customary ones are in :mod:`fastbn.schedules`.

    Raises
    ------
    ValueError, TypeError
        Where an argument is out of range; where `params` is empty, or an array of it is read-only, not
        contiguous, of another dtype, or shares memory with another.

    Notes
    -----
    The bits depend neither on the number of threads nor on the instruction set. Norms are summed in float64,
    in an order that the shapes fix, and c/‖g‖ has no epsilon. NaN in a gradient spoils its own element only
    (a norm of NaN is not above c); infinity makes the norm infinite and the factor 0: infinities become NaN,
    the rest 0.
    """

    _slots: tuple[str | None, ...] = ()  # PyTorch's names of the kernel's slots; None: not used

    def __init__(
        self,
        params: Arrays,
        lr: float,
        weight_decay: float,
        clip_value: float | None,
        clip_norm: float | None,
        clip_global_norm: float | None,
        schedule: Schedule | None,
    ) -> None:
        lr = check.number("lr", lr, _NOT_NEGATIVE, 0.0)
        self._weight_decay = check.number("weight_decay", weight_decay, _NOT_NEGATIVE, 0.0)
        limits = {"clip_value": clip_value, "clip_norm": clip_norm, "clip_global_norm": clip_global_norm}
        clip = {name: _limit(name, c) for name, c in limits.items() if c is not None}
        if len(clip) > 1:
            raise ValueError(f"{' and '.join(clip)}: expected at most one kind of clipping, got {len(clip)}")
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule: expected a callable, step → learning rate, got {schedule!r}")
        self._clip_value = clip.get("clip_value", math.inf)
        self._clip_norm = clip.get("clip_norm", clip.get("clip_global_norm"))
        self._whole = "clip_global_norm" in clip
        self._schedule = schedule
        named, self._keys = _named(params)
        _check_params(named)
        self._names = [name.removeprefix("params") for name in named]  # "[3]" or "['w']", for messages
        self._params = list(named.values())
        self._state = _new_state(self._params, self._slots)
        self._table = optim_kernels.Table(self._params, self._state)
        self._table.lr = lr
        self._work = max(0, self._table.size - _LOOKUP * len(self._params))

    @property
    def params(self) -> list[np.ndarray] | dict[Any, np.ndarray]:
        """The arrays, in a list, or in a dict where they came in one."""
        return list(self._params) if self._keys is None else dict(zip(self._keys, self._params, strict=True))

    @property
    def lr(self) -> float:
        """The learning rate; with a schedule, that of the last step."""
        return self._table.lr

    @lr.setter
    def lr(self, value: float) -> None:
        if self._schedule is not None:
            raise ValueError(f"lr: expected no assignment, since the schedule sets it, got {value!r}")
        self._table.lr = check.number("lr", value, _NOT_NEGATIVE, 0.0)

    def step(self, grads: Gradients, *, num_threads: int | None = None) -> None:
        """Update the parameters in place by one step.

        Parameters
        ----------
        grads : list of ndarray or None, or a dict of them where `params` was a dict
            One per parameter, of its shape and dtype, with any strides and byte order; never modified. None
            skips the parameter and its state; the step counts all the same.
        num_threads : int, optional
            Threads to use; None lets the size decide.

        Raises
        ------
        ValueError, TypeError
            Where a gradient is missing, or of another shape or dtype, or shares memory with a parameter;
            where a parameter has become read-only or was resized; where the schedule gives a rate that is
            negative or not finite. Nothing has been updated or counted then.
        RuntimeError
            Where another thread is in a call of this optimizer.
        """
        held = self._listed(grads)  # our own list: it keeps the arrays alive while the GIL is released
        budget = threads.budget(self._work, num_threads)
        with self._table:
            refused = self._table.bind(held)
            while refused >= 0:
                held[refused] = self._usable(refused, held[refused])
                refused = self._table.bind(held, refused)
            steps, lr, scheduled = self._table.steps, self._table.lr, _NOT_SCHEDULED
            if self._schedule is not None:
                lr = check.number(f"schedule({steps})", self._schedule(steps), _NOT_NEGATIVE, 0.0)
                scheduled = lr
            if self._clip_norm is not None:
                optim_kernels.clip_flat(self._table, self._clip_norm, self._whole, budget)
            self._update(lr, steps + 1, scheduled, budget)

    def _update(self, lr: float, t: int, scheduled: float, budget: int) -> None:
        """Run the method's kernel for step number t, counted from 1; `scheduled`: the rate to show, unless below 0."""
        raise TypeError(f"{type(self).__name__}: expected one of SGD, RMSprop, Adam, AdamW")

    def _listed(self, grads: Any) -> list[Any]:
        """Return the gradients as a new list in the order of the parameters."""
        if isinstance(grads, Mapping):
            if self._keys is None:
                raise ValueError("grads: expected a list, as params was one, got a dict")
            odd = ", ".join(map(repr, grads.keys() ^ set(self._keys)))
            if odd:
                raise ValueError(f"grads: expected the keys of params, got a difference in {odd}")
            return [grads[key] for key in self._keys]
        if isinstance(grads, (np.ndarray, memoryview)) or not isinstance(grads, Iterable):
            raise ValueError(f"grads: expected a list of arrays, got {type(grads).__name__}")
        held = list(grads)
        if len(held) != len(self._params):
            raise ValueError(f"grads: expected {len(self._params)} arrays, got {len(held)}")
        return held

    def _usable(self, i: int, grad: Any) -> np.ndarray:
        """Return a gradient that the kernel refused in a form that it takes, or say what is wrong with it."""
        p, where = self._params[i], self._names[i]
        if not p.flags.writeable or not self._table.holds(i):
            raise ValueError(f"params{where}: expected it writable and in its place, got it changed")
        g = check.view(f"grads{where}", grad)
        if g.shape != p.shape:
            raise ValueError(f"grads{where}: expected shape {p.shape}, got {g.shape}")
        if g.dtype.name != p.dtype.name:
            raise ValueError(f"grads{where}: expected dtype {p.dtype}, got {g.dtype}")
        near = self._table.near(*np.lib.array_utils.byte_bounds(g))  # one search, before comparing with each
        if near and any(check.shares_memory(g, other) for other in self._params):
            raise ValueError(f"grads{where}: expected memory apart from the parameters, got an overlap")
        if g.dtype.num == p.dtype.num and g.dtype.isnative and g.flags.c_contiguous and g.flags.aligned:
            return g  # it came as a subclass, or from another library
        return np.array(g, p.dtype, order="C")

    def state_dict(self) -> dict[str, Any]:
        """Return ``{"step": int, slot: [one array per parameter, of its shape]}``, in copies.

        Slots have PyTorch's names. Where a parameter is float16 or bfloat16, the slot ``"master"`` holds
        float32 masters (of the other parameters, which are their own masters, a copy).
        """
        with nullcontext() if self._table.mine() else self._table:  # a signal's handler may keep the state
            state: dict[str, Any] = {"step": self._table.steps}
            for name, arrays in self._state_by_slot().items():
                state[name] = [(p if a is None else a).copy() for p, a in zip(self._params, arrays, strict=True)]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; parameters are not written.

        With the parameters of that time, the next steps are to the last bit those that would have followed.

        Raises
        ------
        ValueError, TypeError
            Where a slot is missing or unknown, or an array has another shape or is none. Nothing has changed
            then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping of names to values, got {type(state).__name__}")
        slots = self._state_by_slot()
        if set(state) != {"step", *slots}:
            came = ", ".join(map(str, state))
            raise ValueError(f"state: expected the keys {', '.join(['step', *slots])}, got {came}")
        step = check.count("step", state["step"], 0)
        if step > MOST_COUNTED:
            raise ValueError(f"step: expected an integer from 0 to 2⁶², got {step}")
        loaded = {}
        for slot, arrays in slots.items():
            if not isinstance(state[slot], Sequence):
                raise TypeError(f"{slot}: expected a list of arrays, got {type(state[slot]).__name__}")
            if len(state[slot]) != len(arrays):
                raise ValueError(f"{slot}: expected {len(arrays)} arrays, got {len(state[slot])}")
            for p, where, array, value in zip(self._params, self._names, arrays, state[slot], strict=True):
                new = check.view(f"{slot}{where}", value)
                if new.shape != p.shape:
                    raise ValueError(f"{slot}{where}: expected shape {p.shape}, got {new.shape}")
                if new.dtype.kind not in "fiu" and new.dtype.name != "bfloat16":
                    raise TypeError(f"{slot}{where}: expected real numbers, got dtype {new.dtype}")
                if array is not None:
                    loaded[f"{slot}{where}"] = array, new
        with self._table:
            store(self._table, loaded, steps=step)

    def _state_by_slot(self) -> dict[str, list[np.ndarray | None]]:
        """Return the state arrays themselves by slot; None for the master of a parameter that needs none."""
        masters = any(arrays[-1] is not None for arrays in self._state)
        names = enumerate([*self._slots, "master" if masters else None])
        return {name: [arrays[k] for arrays in self._state] for k, name in names if name is not None}

    def __reduce__(self) -> NoReturn:
        message = "expected its state_dict() to be copied or sent, got the optimizer, which updates arrays in place"
        raise TypeError(f"{type(self).__name__}: {message}")

    def __repr__(self) -> str:
        size = f"{len(self._params)} arrays, {self._table.size} elements"
        return f"{type(self).__name__}({size}, lr={self.lr:g}, step={self._table.steps})"


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
        d in [0, 1]; d = μ makes v the exponential average of the gradients. PyTorch damps all gradients but
        the first: for d ≠ 0 its v is larger than this one by d·μᵗ⁻¹·g₁.
    nesterov : bool
        Needs momentum, and no dampening.

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
        params: Arrays,
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
        self._nesterov = check.flag("nesterov", nesterov)
        if nesterov and (momentum == 0 or dampening != 0):
            came = f"momentum={momentum} and dampening={dampening}"
            raise ValueError(f"nesterov: expected momentum above 0 and no dampening, got {came}")
        self._slots = ("momentum_buffer" if self._momentum else None,)
        super().__init__(params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule)

    def _update(self, lr: float, t: int, scheduled: float, budget: int) -> None:
        shared = self._table, lr, self._clip_value, self._weight_decay
        optim_kernels.sgd_flat(*shared, self._momentum, self._fresh, self._nesterov, scheduled, budget)


class RMSprop(Optimizer):
    """Divide the gradient by the root of its running mean square (Tieleman & Hinton 2012).

    s ← ρs + (1−ρ)g²; p ← p − lr·g/(√s + ε). Centered: s − ḡ² for s, with ḡ ← ρḡ + (1−ρ)g (Graves 2013).
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
        Divide by the standard deviation; slot ``grad_avg``. A variance that rounding leaves below 0 counts as
        0.
    eps_inside_sqrt : bool
        lr·g/√(s + ε), as in Keras.

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
        params: Arrays,
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
        velocity = "momentum_buffer" if self._momentum else None
        self._slots = "square_avg", velocity, "grad_avg" if check.flag("centered", centered) else None
        super().__init__(params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule)

    def _update(self, lr: float, t: int, scheduled: float, budget: int) -> None:
        shared = self._table, lr, self._clip_value, self._weight_decay
        optim_kernels.rmsprop_flat(*shared, self._alpha, self._momentum, *self._eps, scheduled, budget)


class Adam(Optimizer):
    """Divide the gradient's running mean by the root of its mean square (Kingma & Ba 2015, Algorithm 1).

    v ← β₁v + (1−β₁)g; s ← β₂s + (1−β₂)g²; v̂ = v/(1−β₁ᵗ), ŝ = s/(1−β₂ᵗ); p ← p − lr·v̂/(√ŝ + ε).

    Parameters
    ----------
    params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule
        As in :class:`Optimizer`.
    betas : (float, float)
        β₁ and β₂ in [0, 1). Slots ``exp_avg`` (v) and ``exp_avg_sq`` (s). t counts the optimizer's steps,
        whether or not a gradient was None; the corrections are computed in float64.
    eps : float
        ε ≥ 0; with 0, an element whose gradients were all 0 becomes NaN.
    amsgrad : bool
        Divide by the root of the largest s so far, corrected afterwards (Reddi et al. 2018); slot
        ``max_exp_avg_sq``.
    eps_inside_sqrt : bool
        lr·v̂/√(ŝ + ε).

    Notes
    -----
    In float32, s is updated as s + (1−β₂)(g² − s): with both factors of β₂s + (1−β₂)g² rounded, a long
    average would be off by 1.3e-5 for β₂ = 0.999. A float32 gradient beyond 1.8e19 has no finite square.

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
        params: Arrays,
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
        self._slots = "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if check.flag("amsgrad", amsgrad) else None
        super().__init__(params, lr, weight_decay, clip_value, clip_norm, clip_global_norm, schedule)

    def _update(self, lr: float, t: int, scheduled: float, budget: int) -> None:
        beta1, beta2 = self._betas
        decay, shrink = (0.0, lr * self._weight_decay) if self._decoupled else (self._weight_decay, 0.0)
        power = optim_kernels.power  # Python's is the C library's, which differs from CPU to CPU
        shared = self._table, lr / (1 - power(beta1, t)), self._clip_value, decay
        optim_kernels.adam_flat(*shared, shrink, beta1, beta2, 1 / (1 - power(beta2, t)), *self._eps, scheduled, budget)


class AdamW(Adam):
    """Adam with decoupled weight decay, first p ← p·(1 − lr·λ) (Loshchilov & Hutter 2019, Algorithm 2).

    Parameters
    ----------
    params, lr, betas, eps, amsgrad, eps_inside_sqrt, clip_value, clip_norm, clip_global_norm, schedule
        As in :class:`Adam`.
    weight_decay : float
        λ ≥ 0. It shrinks the parameter itself and does not enter the gradient or its averages.

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
        params: Arrays,
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
        clips = clip_value, clip_norm, clip_global_norm
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, eps_inside_sqrt, *clips, schedule)


def project_max_norm(params: Arrays, max_norm: float, axis: int | None = None) -> None:
    """Project arrays in place onto ‖w‖₂ ≤ c, to be called after a step: w ← w·c/‖w‖₂ where ‖w‖₂ > c.

    Parameters
    ----------
    params : list or dict of ndarray
        float32, float64, float16 or bfloat16, writable; any strides.
    max_norm : float
        c > 0.
    axis : int, optional
        The axis of the output units: each of its slices is projected by its own norm (0 for weights of shape
        (out, in, …), 1 for (in, out)). None takes the norm of the whole array.

    Raises
    ------
    ValueError, TypeError
        Where an array is read-only, of another dtype, or has no such axis. Nothing has changed then.

    Notes
    -----
    Norms are computed in float64 and products rounded once. Slices within the limit keep their bits, and so
    do slices that hold NaN or infinity. After Srivastava et al. 2014, section 5.1.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.optim import project_max_norm
    >>> w = np.array([[3.0, 4.0], [0.0, 0.5]])
    >>> project_max_norm([w], 1.0, axis=0)
    >>> w.round(3).tolist()
    [[0.6, 0.8], [0.0, 0.5]]
    """
    c = _limit("max_norm", max_norm)
    named, _ = _named(params)
    for name, w in named.items():
        _check_array(name, w)
        if axis is not None and not -w.ndim <= check.count("axis", axis, None) < w.ndim:
            raise ValueError(f"axis: expected one of every array, got {axis} for {name} of shape {w.shape}")
    with interrupt_deferred():
        for w in named.values():
            _project(w, c, axis)


def _project(w: np.ndarray, c: float, axis: int | None) -> None:
    others = None if axis is None else tuple(k for k in range(w.ndim) if k != axis % w.ndim)
    wide = np.asarray(w).astype(np.float64)
    peak = np.max(np.abs(wide), axis=others, keepdims=True, initial=0.0)
    exponent = np.where(np.isfinite(peak), np.frexp(peak)[1], 0)  # scaled by it, squares stay in range
    with np.errstate(all="ignore"):  # NaN and infinity, which are left alone
        norm = np.sqrt(np.sum(np.ldexp(wide, -exponent) ** 2, axis=others, keepdims=True))
        limit = np.ldexp(c, -exponent)
        above = (norm > limit) & np.isfinite(peak)
        projected = (wide * (limit / norm)).astype(w.dtype)
    np.copyto(w, projected, where=above)


def _named(params: Any) -> tuple[dict[str, Any], list[Any] | None]:
    """Return {"params[3]" or "params['w']": array} of a list or a dict, and the dict's keys."""
    if isinstance(params, Mapping):
        named, keys = {f"params[{key!r}]": array for key, array in params.items()}, list(params)
    elif isinstance(params, Iterable) and not isinstance(params, (np.ndarray, memoryview, str)):
        named, keys = {f"params[{i}]": array for i, array in enumerate(params)}, None
    else:
        raise TypeError(f"params: expected a list or dict of arrays, got {type(params).__name__}")
    if not named:
        raise ValueError("params: expected one array or more, got none")
    return named, keys


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
            raise ValueError(f"{name}: expected a C-contiguous array, got strides {p.strides}")
        if not p.flags.aligned or not p.dtype.isnative:
            raise ValueError(f"{name}: expected aligned memory in native byte order, got dtype {p.dtype.str}")
    ranges = sorted((p.ctypes.data, p.ctypes.data + p.nbytes, name) for name, p in named.items() if p.size)
    for (_, end, first), (start, _, second) in itertools.pairwise(ranges):
        if start < end:
            raise ValueError(f"{second}: expected arrays that share no memory, got an overlap with {first}")


def _new_state(params: list[np.ndarray], slots: tuple[str | None, ...]) -> list[list[np.ndarray | None]]:
    """Return for every parameter its zeroed slots and its float32 master; None where there is no such thing.

    The state of all parameters of a precision is one block of memory, in which a parameter's arrays stand
    together and each starts a cache line: that of many small arrays is a few pages.
    """
    state: list[list[np.ndarray | None]] = [[] for _ in params]
    for dtype in {check.real(p.dtype) for p in params}:
        line = _CACHE_LINE // dtype.itemsize
        mine = [(p, arrays) for p, arrays in zip(params, state, strict=True) if check.real(p.dtype) == dtype]
        wanted = [[*(slot is not None for slot in slots), check.is_half(p.dtype)] for p, _ in mine]
        padded = [math.ceil(p.size / line) * line for p, _ in mine]
        block = np.zeros(sum(n * sum(w) for n, w in zip(padded, wanted, strict=True)) + line, dtype)
        start = -block.ctypes.data % _CACHE_LINE // dtype.itemsize
        for (p, arrays), n, there in zip(mine, padded, wanted, strict=True):
            for used in there:
                arrays.append(block[start : start + p.size].reshape(p.shape) if used else None)
                start += n if used else 0
            if arrays[-1] is not None:
                arrays[-1][...] = p
    return state


def _limit(name: str, value: float) -> float:
    return check.number(name, value, _POSITIVE, 0.0, open_low=True)


def _below_one(name: str, value: float) -> float:
    return check.number(name, value, "a number in [0, 1)", 0.0, math.nextafter(1.0, 0.0))


def _inside_and_outside(eps: float, eps_inside_sqrt: bool) -> tuple[float, float]:
    """Return eps as the kernels take it: what is added inside the root, and what outside."""
    eps = check.number("eps", eps, _NOT_NEGATIVE, 0.0)
    return (eps, 0.0) if check.flag("eps_inside_sqrt", eps_inside_sqrt) else (0.0, eps)
