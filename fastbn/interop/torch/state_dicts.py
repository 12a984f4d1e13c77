"""One BatchNorm layer as PyTorch's state dict, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ...layer import BatchNorm
from .layers import to_array, to_tensor, unusable


def from_state_dict(
    state_dict: Mapping[str, Any], prefix: str = "", *, eps: float = 1e-5, momentum: float | None = 0.1,
    dtype: Any = None,
) -> BatchNorm:  # fmt: skip
    """Return the BatchNorm with the parameters and statistics of a torch.nn.BatchNorm*.

    weight is γ, bias is β; a state dict has neither ε nor the momentum, which weighs the new value here as there.

    Parameters
    ----------
    state_dict : mapping of str to tensor
    prefix : str
        What stands before the keys, its dot included: "layer1.0.bn1.".
    eps, momentum
        As the PyTorch layer has them.
    dtype : dtype, optional
        Of parameters and statistics; that of the state dict's by default, float32 for half types.

    Returns
    -------
    BatchNorm
        In training mode, as a new layer is. Without weight and bias: affine=False; without running_mean and
        running_var: track_running_stats=False. It shares no memory with `state_dict`.

    Raises
    ------
    ValueError
        A key is missing that its partner needs, a shape differs, nothing is there; the tensor cannot be read.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import from_state_dict
    >>> bn = from_state_dict(torch.nn.BatchNorm2d(3).state_dict())
    >>> bn.gamma
    array([1., 1., 1.], dtype=float32)
    """
    found: dict[str, np.ndarray] = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = state_dict.get(prefix + name)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor) or (reason := unusable(tensor)):
            reason = reason if isinstance(tensor, torch.Tensor) else f"it is of type {type(tensor).__name__}"
            raise ValueError(f"state_dict: expected a tensor on the CPU at {prefix + name!r}, but {reason}")
        found[name] = to_array(tensor)
    for pair in (("weight", "bias"), ("running_mean", "running_var")):
        there = [name for name in pair if name in found]
        if len(there) == 1:
            missing = pair[1 - pair.index(there[0])]
            raise ValueError(f"state_dict: expected {prefix + missing!r} beside {prefix + there[0]!r}, got none")
    if not found:
        raise ValueError(f"state_dict: expected a BatchNorm's parameters or statistics under {prefix!r}, got none")
    first, values = next(iter(found.items()))
    for name, array in found.items():
        if array.ndim != 1 or array.shape != values.shape:
            expected = f"shape (C,), that of {prefix + first!r}"
            raise ValueError(f"state_dict: expected {expected}, got {array.shape} at {prefix + name!r}")
    if dtype is None:
        dtype = np.float64 if values.dtype == np.float64 else np.float32
    bn = BatchNorm(
        len(values), eps=eps, momentum=momentum, affine="weight" in found, track_running_stats="running_mean" in found,
        dtype=dtype,
    )  # fmt: skip
    own = {"weight": bn.gamma, "bias": bn.beta, "running_mean": bn.running_mean, "running_var": bn.running_var}
    for name, array in found.items():
        own[name][...] = array.astype(np.float64)  # type: ignore[index]
    if (count := state_dict.get(prefix + "num_batches_tracked")) is not None:
        bn.num_batches_tracked = int(count)
    return bn


def to_state_dict(bn: BatchNorm, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return what a torch.nn.BatchNorm* with as many channels loads to be the same layer.

    γ is weight, β is bias. ε, the momentum and the axis, which is 1 there, are not in it.

    Parameters
    ----------
    bn : BatchNorm
        Without activation: PyTorch's layer has none.
    prefix : str
        What stands before the keys, its dot included.

    Returns
    -------
    dict of str to tensor
        New tensors: weight and bias where `bn` is affine; running_mean, running_var and num_batches_tracked where
        it tracks statistics.

    Raises
    ------
    TypeError, ValueError
        `bn` is no BatchNorm, or has an activation.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.interop.torch import to_state_dict
    >>> list(to_state_dict(fastbn.BatchNorm(3)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn: expected a fastbn.BatchNorm, got {type(bn).__name__}")
    if bn.activation is not None:
        raise ValueError(f"bn: expected no activation, got {bn.activation!r}, which a state dict cannot hold")
    arrays = {"weight": bn.gamma, "bias": bn.beta, "running_mean": bn.running_mean, "running_var": bn.running_var}
    state = {prefix + name: to_tensor(a.copy(), torch.empty(0)) for name, a in arrays.items() if a is not None}
    if bn.running_mean is not None:
        state[prefix + "num_batches_tracked"] = torch.tensor(bn.num_batches_tracked)
    return state
