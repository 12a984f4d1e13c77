"""Swap PyTorch's BatchNorm modules for fastbn's, in place."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .layers import unusable
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAddReLU, BatchNormReLU, FastBatchNorm

__all__ = ["ConvertReport", "convert"]

_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d,
}  # fmt: skip

Module = TypeVar("Module", bound=nn.Module)


class ConvertReport(NamedTuple):
    """What :func:`convert` did: the names of the modules it swapped, and of those it left, with the reason."""

    converted: list[str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} BatchNorm converted, {len(self.left)} left"]
        return "\n".join([*lines, *(f"  {name or 'the model'}: {reason}" for name, reason in self.left.items())])


def convert(module: Module) -> tuple[Module, ConvertReport]:
    """Make fastbn compute a model's BatchNorm1d, 2d and 3d: they become the subclasses of the same names, in place.

    Modules, parameters, buffers, hooks and modes stay the same objects, so optimizers and references stay valid, as do
    state dicts. Left as they are: other classes derived from PyTorch's, synchronised and lazy ones, and those whose
    parameters are not on the CPU, or of dtypes other than float32, float64, float16 and bfloat16.

    Parameters
    ----------
    module : torch.nn.Module
        Changed in place; it may be a BatchNorm itself.

    Returns
    -------
    module : torch.nn.Module
        The argument.
    report : ConvertReport
        `converted`, a list of names, and `left`, a dict of name to reason.

    Raises
    ------
    TypeError
        `module` is no module.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import convert
    >>> model, report = convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)))
    >>> print(report)
    1 BatchNorm converted, 0 left
    >>> type(model[1]).__module__
    'fastbn.interop.torch.modules'
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    report = ConvertReport([], {})
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and "BatchNorm" in part.original_name:
            report.left[name] = "it is TorchScript"
        if not isinstance(part, nn.modules.batchnorm._BatchNorm) or isinstance(part, FastBatchNorm):
            continue
        if reason := _left(part):
            report.left[name] = reason
        else:
            part.__class__ = _SWAPS[type(part)]  # type: ignore[assignment]
            report.converted.append(name)
    return module, report


def _left(module: nn.Module) -> str:
    """Say why a module stays as it is ("" where it does not)."""
    if type(module) not in _SWAPS:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}"
    if "forward" in vars(module):
        return "it has a forward of its own"
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return next(filter(None, (unusable(tensor) for tensor in tensors if tensor is not module.num_batches_tracked)), "")


class _AnyRank(nn.modules.batchnorm._BatchNorm):
    """PyTorch's BatchNorm for (N, C, *)."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _AddReLU(nn.Module):
    """What BatchNormAddReLU computes, by PyTorch."""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn, self.relu = bn, nn.ReLU()

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return self.relu(self.bn(input) + residual)


def restore(module: nn.Module) -> nn.Module:
    """Put PyTorch's modules in the place of fastbn's, in place; fused ones become several, under new names."""
    back = {fast: plain for plain, fast in _SWAPS.items()} | dict.fromkeys((BatchNormReLU, BatchNormAddReLU), _AnyRank)
    root = nn.Sequential(module)
    for part in list(root.modules()):
        for name, child in part.named_children():
            fast = type(child)
            child.__class__ = back.get(fast, fast)
            if fast is BatchNormReLU:
                setattr(part, name, nn.Sequential(child, nn.ReLU()).train(child.training))
            elif fast is BatchNormAddReLU:
                setattr(part, name, _AddReLU(child).train(child.training))
    return root[0]
