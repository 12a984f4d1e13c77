"""PyTorch's Adam, AdamW, SGD and RMSprop over fastbn's kernels: one pass over memory for a whole parameter group.

Each is a subclass of the class of its name in torch.optim, with its constructor, parameter groups, hooks and state
dicts; only the update is another. It runs over the memory of the tensors themselves: parameters, which may lie in any
order as long as they have no gaps (channels_last), gradients, and the state in ``optimizer.state``.

Every step checks that tensors and state are where they were, else looks at them anew (`optim_plans`); then it binds the
gradients; and only when nothing is left to refuse does it change anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from itertools import chain, compress
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import threads
from ..._core.dispatch import optim_kernels
from ...interrupts import interrupt_deferred
from .optim_plans import Grads, Plan, Slots, check_apart, check_parameter, named, state_dtype

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]

_NOT_SCHEDULED = -1.0  # the learning rate is the group's
_NO_CLIPPING = math.inf


class _Held:
    """A tensor of a state dict on its way: PyTorch's load_state_dict would cast float32 state to bfloat16."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Known(NamedTuple):
    """What the state was after a step."""

    keys: list[Any]  # of optimizer.state: parameters
    addresses: list[int]  # of the tensors in its values, one dict per parameter


class _Call(NamedTuple):
    """One call of a kernel."""

    plan: Plan
    grads: Grads
    kernel: Callable[..., None]
    numbers: tuple[float, ...]
    num_threads: int


class _Fused(torch.optim.Optimizer):
    """What the optimizers share; each says which slots a group has, and which kernel updates it with which numbers."""

    _names: frozenset[str] = frozenset()  # of all tensors of the parameter's shape that a state may have
    _counted = True  # the state has "step"
    _plans: list[Plan] | None = None
    _known = _Known([], [])

    def _slots(self, group: dict[str, Any]) -> Slots:
        raise NotImplementedError

    def _phases(self, age: np.ndarray) -> np.ndarray:
        """Return what parameters must have in common to be updated by one call."""
        raise NotImplementedError

    def _rule(self, group: dict[str, Any], phase: float) -> tuple[Callable[..., None], tuple[float, ...]]:
        """Return the kernel and its numbers, which stand between the table and the number of threads."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Raises
        ------
        TypeError, ValueError
            Where a parameter is not on the CPU, not strided or of another dtype than float32, float64, float16 and
            bfloat16, or shares memory with another of the group; where foreach, fused, capturable or differentiable
            is true. The group has not been added then.
        """
        super().add_param_group(param_group)
        try:
            for option in ("foreach", "fused", "capturable", "differentiable"):
                if param_group.get(option):
                    raise ValueError(f"{option}: expected None or False, got {param_group[option]!r}")
            params = named(len(self.param_groups) - 1, param_group)
            for name, p in params:
                check_parameter(name, p)
            check_apart(params)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient by one step.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss.

        Returns
        -------
        loss
            What `closure` returned, or None.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            Where a gradient is sparse, or of another shape or dtype than its parameter; where parameters have come to
            share memory or to lie on another device; where a hyper-parameter is no number. Nothing has been updated
            or counted then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plans = self._plans
        if plans is None or not self._are_current(plans):
            plans = self._new_plans()
        calls: list[_Call] = []
        updated: list[Tensor] = []
        active: list[list[bool]] = []
        for plan, group in zip(plans, self.param_groups, strict=True):
            grads = plan.bind(group["maximize"])
            active.append([g is not None for g in grads])
            calls += self._calls(plan, group, grads, active[-1])
            updated += compress(plan.members, active[-1])
        torch.autograd.graph.increment_version(updated)
        # Nothing is refused from here on.
        with interrupt_deferred():
            if plans is not self._plans:
                self._keep(plans)
            for plan in plans:
                plan.load_copies()
            for call in calls:
                with call.plan.table:
                    call.plan.table.bind(call.grads)
                    call.kernel(call.plan.table, *call.numbers, _NOT_SCHEDULED, call.num_threads)
            for plan, there in zip(plans, active, strict=True):
                plan.finish(there)
        return loss

    def _calls(self, plan: Plan, group: dict[str, Any], grads: Grads, active: list[bool]) -> list[_Call]:
        """Return the calls that update a group: one, where all its parameters are as old."""
        if not any(active):
            return []
        limit = torch.get_num_threads()
        num_threads = min(limit, threads.budget(plan.table.size)) if limit > 1 else 1
        phases = self._phases(plan.age)
        if (phases == phases[0]).all():
            return [_Call(plan, grads, *self._rule(group, float(phases[0])), num_threads)]
        calls = []
        for phase in np.unique(phases[active]):
            chosen = [g if its else None for g, its in zip(grads, phases == phase, strict=True)]
            calls.append(_Call(plan, chosen, *self._rule(group, float(phase)), num_threads))
        return calls

    def _are_current(self, plans: list[Plan]) -> bool:
        """Say whether the groups, the parameters and their state are those that the plans were made for."""
        keys, addresses = self._known
        return (
            len(plans) == len(self.param_groups)
            and all(map(is_, self.state, keys))
            and _addresses(self.state.values()) == addresses
            and all(
                plan.serves(group["params"], self._slots(group))
                for plan, group in zip(plans, self.param_groups, strict=True)
            )
        )

    def _new_plans(self) -> list[Plan]:
        plans = [
            Plan(named(k, group), self.state, self._slots(group), self._counted)
            for k, group in enumerate(self.param_groups)
        ]
        check_apart([pair for plan in plans for pair in zip(plan.names, plan.members, strict=True)])
        return plans

    def _keep(self, plans: list[Plan]) -> None:
        """Take over new plans, and the state that they made."""
        for plan in plans:
            for p, new in zip(plan.members, plan.new, strict=True):
                if new:
                    self.state[p].update(new)
        self._plans, self._known = plans, _Known(list(self.state), _addresses(self.state.values()))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict, of this class or of PyTorch's of its name, in copies.

        Raises
        ------
        ValueError
            Where the groups differ in number or size, or a tensor is not of its parameter's shape. Nothing has
            changed then.
        """
        hold = partial(_hold, names=self._names)
        handle = self.register_load_state_dict_pre_hook(hold)  # the last of them: it sees what the others made
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for values in state["state"].values():
            if isinstance(values, dict):
                for name, value in values.items():
                    if isinstance(value, _Held):
                        values[name] = value.tensor
        super().__setstate__(state)


class SGD(_Fused, torch.optim.SGD):
    """Stochastic gradient descent as :class:`torch.optim.SGD`, with momentum or Nesterov's (Sutskever et al. 2013).

    g ← g + λp;  v ← μv + (1−d)g, but v ← g at a parameter's first step;  p ← p − lr·v, Nesterov p ← p − lr·(g + μv),
    without momentum p ← p − lr·g.

    Parameters
    ----------
    params, lr, momentum, dampening, weight_decay, nesterov, maximize
        As in :class:`torch.optim.SGD`: momentum is μ, dampening d, weight_decay λ.
    foreach, differentiable, fused
        None or False.

    Raises
    ------
    ValueError, TypeError
        As there; where foreach, differentiable or fused is true; where a parameter is not on the CPU, or shares
        memory with another.

    Notes
    -----
    What :class:`Adam` says of parameters and state holds here too. The state has ``momentum_buffer``, where μ ≠ 0.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch.optim import SGD
    >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> opt = SGD([w], lr=0.5)
    >>> w.sum().backward()
    >>> opt.step()
    >>> w.tolist()
    [0.5, 1.5]
    """

    _counted = False
    _names = frozenset({"momentum_buffer", "master"})

    def _slots(self, group: dict[str, Any]) -> Slots:
        return ("momentum_buffer" if group["momentum"] != 0 else None,)

    def _phases(self, age: np.ndarray) -> np.ndarray:
        return age > 0

    def _rule(self, group: dict[str, Any], phase: float) -> tuple[Callable[..., None], tuple[float, ...]]:
        lr, decay, momentum = float(group["lr"]), float(group["weight_decay"]), float(group["momentum"])
        fresh = 1 - float(group["dampening"]) if phase else 1.0
        return optim_kernels.sgd_flat, (lr, _NO_CLIPPING, decay, momentum, fresh, bool(group["nesterov"]))


class RMSprop(_Fused, torch.optim.RMSprop):
    """Divide the gradient by the root of its running mean square, as :class:`torch.optim.RMSprop` (Graves 2013).

    g ← g + λp;  s ← αs + (1−α)g²;  p ← p − lr·g/(√s + ε). Centered: s − ḡ² for s, with ḡ ← αḡ + (1−α)g. With
    momentum: v ← μv + g/(√s + ε), p ← p − lr·v.

    Parameters
    ----------
    params, lr, alpha, eps, weight_decay, momentum, centered, maximize
        As in :class:`torch.optim.RMSprop`: eps is ε, weight_decay λ, momentum μ.
    capturable, foreach, differentiable
        None or False.

    Raises
    ------
    ValueError, TypeError
        As there; where capturable, foreach or differentiable is true; where a parameter is not on the CPU, or shares
        memory with another.

    Notes
    -----
    What :class:`Adam` says of parameters and state holds here too. The state has ``step``, ``square_avg``,
    ``momentum_buffer`` where μ > 0, and ``grad_avg`` where centered. A variance s − ḡ² that rounding leaves below 0
    counts as 0; in PyTorch its root is NaN.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch.optim import RMSprop
    >>> w = torch.tensor([1.0], requires_grad=True)
    >>> opt = RMSprop([w], lr=0.5, alpha=0.75, eps=0.0)
    >>> (4 * w).sum().backward()
    >>> opt.step()
    >>> w.tolist()
    [0.0]
    """

    _names = frozenset({"square_avg", "momentum_buffer", "grad_avg", "master"})

    def _slots(self, group: dict[str, Any]) -> Slots:
        velocity = "momentum_buffer" if group["momentum"] > 0 else None
        return "square_avg", velocity, "grad_avg" if group["centered"] else None

    def _phases(self, age: np.ndarray) -> np.ndarray:
        return np.zeros_like(age)

    def _rule(self, group: dict[str, Any], phase: float) -> tuple[Callable[..., None], tuple[float, ...]]:
        names = "lr", "weight_decay", "alpha", "momentum", "eps"
        lr, decay, alpha, momentum, eps = (float(group[name]) for name in names)
        return optim_kernels.rmsprop_flat, (lr, _NO_CLIPPING, decay, alpha, momentum, 0.0, eps)


class _AdamUpdate(_Fused):
    _names = frozenset({"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master"})

    def _slots(self, group: dict[str, Any]) -> Slots:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None

    def _phases(self, age: np.ndarray) -> np.ndarray:
        return age

    def _rule(self, group: dict[str, Any], phase: float) -> tuple[Callable[..., None], tuple[float, ...]]:
        lr, decay, eps = float(group["lr"]), float(group["weight_decay"]), float(group["eps"])
        beta1, beta2 = map(float, group["betas"])
        t, power = int(phase) + 1, optim_kernels.power  # Python's is the C library's, which differs from CPU to CPU
        coupled, shrink = (0.0, lr * decay) if group["decoupled_weight_decay"] else (decay, 0.0)
        corrected = lr / (1 - power(beta1, t)), _NO_CLIPPING, coupled, shrink, beta1, beta2, 1 / (1 - power(beta2, t))
        return optim_kernels.adam_flat, (*corrected, 0.0, eps)


class Adam(_AdamUpdate, torch.optim.Adam):
    """Adam as :class:`torch.optim.Adam` (Kingma & Ba 2015, Algorithm 1), fused.

    g ← g + λp;  v ← β₁v + (1−β₁)g;  s ← β₂s + (1−β₂)g²;  p ← p − lr·v̂/(√ŝ + ε), with v̂ = v/(1−β₁ᵗ) and
    ŝ = s/(1−β₂ᵗ), t counted for every parameter apart. AMSGrad: the largest s so far for s (Reddi et al. 2018).

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay
        As in :class:`torch.optim.Adam`: betas are (β₁, β₂), eps is ε, weight_decay λ.
    foreach, capturable, differentiable, fused
        None or False.

    Raises
    ------
    ValueError, TypeError
        As there; where foreach, capturable, differentiable or fused is true; where a parameter is not on the CPU, not
        strided or of another dtype than float32, float64, float16 and bfloat16, or shares memory with another.

    Notes
    -----
    The state is that of PyTorch, and state dicts go both ways: ``step`` and, of the parameter's shape, ``exp_avg``,
    ``exp_avg_sq`` and ``max_exp_avg_sq``. Of float16 and bfloat16 parameters it is float32, and so is their
    ``master``, which is updated and rounded into the parameter: PyTorch, which has no such thing, rounds all of it to
    the half type when it loads it. A value that others write into the parameter replaces the master's.

    Parameters may lie in memory in any order; those with gaps, as slices of other tensors have, are updated by way of
    a copy. Gradients are read where they lie if they lie as their parameter does, else copied. Sparse ones are
    refused. Storages that the optimizer has seen cannot be resized any more (they have been shown to NumPy).

    As many threads run as both libraries allow; their number changes no bit. Rounding differs from PyTorch's. A float32
    gradient beyond 1.8e19 has an infinite square: its element becomes NaN, where PyTorch's ceases to move.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch.optim import Adam
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = Adam(model.parameters(), lr=0.01)
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> opt.step()
    >>> list(opt.state[model.bias])
    ['step', 'exp_avg', 'exp_avg_sq']
    """


class AdamW(_AdamUpdate, torch.optim.AdamW):
    """Adam with decoupled weight decay as :class:`torch.optim.AdamW` (Loshchilov & Hutter 2019, Algorithm 2), fused.

    First p ← p·(1 − lr·λ), then Adam without λ.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay, amsgrad, maximize
        As in :class:`torch.optim.AdamW`: weight_decay is λ, 0.01 by default.
    foreach, capturable, differentiable, fused
        None or False.

    Raises
    ------
    ValueError, TypeError
        As :class:`Adam` does, whose notes hold here too.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch.optim import AdamW
    >>> w = torch.tensor([8.0], requires_grad=True)
    >>> opt = AdamW([w], lr=0.5, weight_decay=0.25)
    >>> w.grad = torch.zeros(1)
    >>> opt.step()
    >>> w.tolist()
    [7.0]
    """


def _addresses(values: Collection[Any]) -> list[int]:
    """Return where the tensors in the dicts among `values` lie, and of other things which they are."""
    try:
        return list(map(Tensor.data_ptr, chain.from_iterable(map(dict.values, values))))
    except TypeError:  # something that the user keeps there
        entries = chain.from_iterable(value.values() if isinstance(value, dict) else [value] for value in values)
        return [entry.data_ptr() if isinstance(entry, Tensor) else id(entry) for entry in entries]


def _hold(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """Return a state dict with what the kernels update held, as copies of the dtype that it will have."""
    numbers = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = chain.from_iterable(named(k, group) for k, group in enumerate(optimizer.param_groups))
    numbered = dict(zip(numbers, params, strict=False))  # where they differ in number, PyTorch refuses afterwards
    state = dict(state_dict["state"])
    for number in state.keys() & numbered.keys():
        name, p = numbered[number]
        state[number] = values = dict(state[number])
        for key, value in values.items():
            if not isinstance(value, Tensor):
                continue
            if key == "step":
                values[key] = _Held(value.to("cpu", torch.float32, copy=True))
            elif key in names:
                if value.shape != p.shape:
                    raise ValueError(f"{key} of {name}: expected shape {tuple(p.shape)}, got {tuple(value.shape)}")
                values[key] = _Held(value.to("cpu", state_dtype(p), copy=True))
    return {**state_dict, "state": state}
