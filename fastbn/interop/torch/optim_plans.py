"""What the optimizer kernels must know of a group of PyTorch's parameters: where they and their state lie."""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..._core import check
from ..._core.dispatch import optim_kernels
from .layers import DTYPES, to_array

_KINDS = (Tensor, nn.Parameter, nn.Buffer)

Slots = tuple[str | None, ...]  # PyTorch's names of a kernel's slots; None: not used
Named = list[tuple[str, Tensor]]
Grads = list[np.ndarray | None]


class Plan:
    """One parameter group as the kernels see it.

    Parameters
    ----------
    params : list of (str, Tensor)
        All of the group, each with what messages call it. A parameter that has neither state nor a gradient is not
        among the `members`, which make up the table.
    state : mapping of Tensor to dict
        The optimizer's, which is only read: what must be written into it, if the step takes place, is in `new`.
    slots : tuple of str or None
    counted : bool
        Whether the state has a tensor "step". Those of a plan are the elements of one vector, `age`.
    """

    def __init__(self, params: Named, state: Mapping[Tensor, Any], slots: Slots, counted: bool) -> None:
        self.params, self.slots = [p for _, p in params], slots
        used = [(name, p) for name, p in params if p.grad is not None or _has_state(p, state, slots)]
        self.names, self.members = [name for name, _ in used], [p for _, p in used]
        members = set(map(id, self.members))
        self.idle = [p for p in self.params if id(p) not in members]
        self.places = [p.detach() for p in self.members]  # they keep the memory alive, too
        self.addresses = [p.data_ptr() for p in self.members]  # share_memory_ moves it within the same storage
        self.arrays: list[np.ndarray] = []  # of the members, with the axes in the order of their memory
        self.turned: list[tuple[int, tuple[int, ...]]] = []  # which axes these are, where they had to be turned
        self.copies: list[tuple[int, Tensor]] = []  # updated in place of members whose memory has gaps
        self.new: list[dict[str, Tensor]] = []
        ages = torch.zeros(len(used), dtype=torch.float32, device="cpu")
        self.age = ages.numpy()  # steps each member has seen; of those not counted, whether it has seen one
        slot_arrays = []
        for i, (name, p) in enumerate(used):
            slot_arrays.append(self._describe(i, name, p, state.get(p, {}), ages[i] if counted else None))
        self.table = optim_kernels.Table(self.arrays, slot_arrays)

    def _describe(self, i: int, name: str, p: Tensor, old: dict[str, Any], age: Tensor | None) -> list[Any]:
        """Append what belongs to member `i`; return the arrays of its slots and its master, which share its order."""
        check_parameter(name, p)
        order = tuple(sorted(range(p.ndim), key=p.stride, reverse=True))  # from the outermost in memory
        array = to_array(p).transpose(order)
        if not (array.flags.c_contiguous and array.flags.aligned):
            order = tuple(range(p.ndim))
            self.copies.append((i, torch.empty(p.shape, dtype=p.dtype, device="cpu")))
            array = to_array(self.copies[-1][1])
        elif order != tuple(range(p.ndim)):
            self.turned.append((i, order))
        self.arrays.append(array)
        new: dict[str, Tensor] = {}
        if age is not None:
            new["step"] = age.fill_(float(old.get("step", 0)))
        elif self.slots[0] is not None and old.get(self.slots[0]) is not None:
            self.age[i] = 1
        for slot in filter(None, self.slots):
            new[slot] = _fitted(f"{slot} of {name}", old.get(slot), p, order)
        if state_dtype(p) != p.dtype:
            new["master"] = _fitted(f"master of {name}", old.get("master", p), p, order)
        self.new.append(new)
        tensors = [None if slot is None else new[slot] for slot in self.slots] + [new.get("master")]
        return [None if t is None else to_array(t).transpose(order) for t in tensors]

    def serves(self, params: list[Tensor], slots: Slots) -> bool:
        """Say whether the group is what it was: the same tensors in the same memory, no first gradient."""
        try:
            return (
                slots == self.slots
                and len(params) == len(self.params)
                and all(map(is_, params, self.params))
                and all(map(Tensor.is_set_to, self.members, self.places))
                and [p.data_ptr() for p in self.members] == self.addresses
                and all(p.grad is None for p in self.idle)
            )
        except RuntimeError:  # is_set_to does not compare devices
            return False

    def bind(self, maximize: bool) -> Grads:
        """Return the gradients as the table takes them, the parameters' axes turned, None where there is none."""
        grads = [p.grad for p in self.members]
        if maximize:
            grads = [None if g is None else -g for g in grads]
        held: Grads
        try:
            held = [None if g is None else g.numpy() for g in grads]
        except (RuntimeError, TypeError):  # bfloat16, one that requires a gradient, a sparse one
            held = [None if g is None else _readable(name, g) for name, g in zip(self.names, grads, strict=True)]
        for i, order in self.turned:
            g = held[i]
            if g is not None and g.ndim == len(order):
                held[i] = g.transpose(order)
        refused = self.table.bind(held)
        while refused >= 0:
            held[refused] = self._usable(refused, held[refused])
            refused = self.table.bind(held, refused)
        return held

    def _usable(self, i: int, g: Any) -> np.ndarray:
        """Return a copy, in the parameter's order, of a gradient that lies otherwise or on a parameter."""
        p = self.arrays[i]
        if g.shape != p.shape or g.dtype != p.dtype:
            shape = self.members[i].grad.shape  # type: ignore[union-attr]
            expected = f"shape {tuple(self.members[i].shape)} and dtype {p.dtype}"
            raise ValueError(f"grad of {self.names[i]}: expected {expected}, got {tuple(shape)} and {g.dtype}")
        return np.array(g, order="C")

    def load_copies(self) -> None:
        """Take the values of parameters with gaps, before an update."""
        for i, copy in self.copies:
            copy.copy_(self.members[i])

    def finish(self, active: list[bool]) -> None:
        """Count the update, and give parameters with gaps their values."""
        self.age += active
        for i, copy in self.copies:
            if active[i]:
                self.members[i].copy_(copy)


def named(k: int, group: dict[str, Any]) -> Named:
    """Return the parameters of group `k`, each with what messages call it."""
    names = group.get("param_names") or [""] * len(group["params"])
    place = f"param_groups[{k}]['params']"
    return [
        (f"{place}[{i}]{name and f' ({name})'}", p)
        for i, (name, p) in enumerate(zip(names, group["params"], strict=True))
    ]


def check_parameter(name: str, p: Tensor) -> None:
    """Refuse a parameter that cannot be updated through its memory."""
    if not isinstance(p, _KINDS) or (type(p) not in _KINDS and not is_lazy(p)):
        raise TypeError(f"{name}: expected a plain tensor, got {type(p).__name__}")
    if p.device.type != "cpu":
        raise ValueError(f"{name}: expected a tensor on the CPU, got one on {p.device}")
    if p.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {p.layout}")
    if p.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {p.dtype}")
    if is_lazy(p) or not p.numel():
        return
    if any(n > 1 and step == 0 for n, step in zip(p.shape, p.stride(), strict=True)):
        raise ValueError(f"{name}: expected elements that share no memory, got an expanded tensor")


def check_apart(params: Named) -> None:
    """Refuse parameters that share memory with another."""
    ranges = []
    for name, p in params:
        if not is_lazy(p) and p.numel():
            array = to_array(p)
            ranges.append((*np.lib.array_utils.byte_bounds(array), name, array))
    reaching: list[Any] = []
    for one in sorted(ranges, key=lambda r: r[0]):
        reaching = [other for other in reaching if other[1] > one[0]]
        for other in reaching:
            if check.shares_memory(one[3], other[3]):
                raise ValueError(f"{one[2]}: expected memory apart from other parameters, got that of {other[2]}")
        reaching.append(one)


def state_dtype(p: Tensor) -> torch.dtype:
    """Return the dtype of the state of a parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _has_state(p: Tensor, state: Mapping[Tensor, Any], slots: Slots) -> bool:
    """Say whether a parameter has all the state that an update needs."""
    if is_lazy(p):
        return False
    needed = filter(None, (*slots, "master" if state_dtype(p) != p.dtype else None))
    return all(state.get(p, {}).get(name) is not None for name in needed)


def _fitted(name: str, value: Tensor | None, p: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return `value` if it lies in memory in that order of axes, else a tensor that does, of its values or of zeros."""
    if value is not None:
        if value.shape != p.shape:
            raise ValueError(f"{name}: expected shape {tuple(p.shape)}, got {tuple(value.shape)}")
        if value.dtype == state_dtype(p) and type(value) in _KINDS:
            flags = to_array(value).transpose(order).flags
            if flags.c_contiguous and flags.aligned:
                return value
    places = sorted(range(p.ndim), key=order.__getitem__)
    new = torch.zeros([p.shape[axis] for axis in order], dtype=state_dtype(p), device="cpu").permute(places)
    return new if value is None else new.copy_(value)


def _readable(name: str, grad: Tensor) -> np.ndarray:
    """View a gradient that Tensor.numpy refused."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"grad of {name}: expected a dense gradient, got one of layout {grad.layout}")
    return to_array(grad.resolve_neg())
