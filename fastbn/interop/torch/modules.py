"""PyTorch modules over fastbn's operators: BatchNorm1d, 2d, 3d in place of PyTorch's own, and fused with ReLU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .layers import DTYPES, HALVES

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "BatchNormAddReLU", "BatchNormReLU", "batch_norm"]

_warned: set[str] = set()


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float | Tensor = 0.1, eps: float = 1e-5, *,
    relu: bool = False, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return y = act(γ·(x - μ)/√(σ² + ε) + β + residual): torch.nn.functional.batch_norm by fastbn's kernels.

    Parameters
    ----------
    input : Tensor of shape (N, C, *)
        float32, float64, float16 or bfloat16, on the CPU; the result is channels_last where it is, else contiguous.
    running_mean, running_var : Tensor of shape (C,), or None
        In training they move in place towards the statistics of the batch, and may be None; else they are μ and σ².
    weight, bias : Tensor of shape (C,), or None
        γ and β.
    training : bool
        Whether μ and σ² are those of the batch.
    momentum : float or Tensor of one number
        Weight of the new value; that of the variance is σ²·m/(m - 1), m values per channel.
    eps : float
        ε.
    relu : bool
        Apply ReLU last; its gradient is 0 where y = 0.
    residual : Tensor of the shape of `input`, optional
        Added before ReLU; one of another dtype by PyTorch, which promotes.

    Raises
    ------
    ValueError, RuntimeError
        Where torch.nn.functional.batch_norm raises: one value per channel in training, parameters of other shapes,
        missing statistics. `residual`: ValueError for another shape or device. Nothing has moved then.

    Notes
    -----
    PyTorch's own operator computes what the kernels do not take (other devices and dtypes, ε ≤ 0, one axis), with
    one UserWarning per reason and process. Values and gradients have the bits of :func:`fastbn.batch_norm_train` and
    its like, whatever the number of threads, which is the smaller of fastbn's and PyTorch's. Tensors are not copied on
    the way in or out, unless their elements overlap or their orders in memory differ. Double backward works, by
    PyTorch's operators, and is no faster than those.

    References
    ----------
    Ioffe & Szegedy 2015, Algorithms 1 and 2.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import batch_norm
    >>> batch_norm(torch.tensor([[1.0], [3.0]]), None, None, training=True, relu=True).round(decimals=3)
    tensor([[0.],
            [1.]])
    """
    if residual is not None and not isinstance(residual, Tensor):
        raise TypeError(f"residual: expected a tensor, got {type(residual).__name__}")
    if residual is not None and (residual.shape, residual.device) != (input.shape, input.device):
        expected = f"shape {tuple(input.shape)} on {input.device}, as input"
        raise ValueError(f"residual: expected {expected}, got {tuple(residual.shape)} on {residual.device}")
    if residual is not None and residual.dtype != input.dtype:  # as autocast makes them
        given = (running_mean, running_var, weight, bias)
        y = batch_norm(input, *given, training, momentum, eps) + residual
        return F.relu(y) if relu else y
    given = (running_mean, running_var, weight, bias)
    if reason := _refused(input, given, training, eps):
        return _by_pytorch(reason, input, *given, training, momentum, eps, relu, residual)
    count = input.numel() // input.shape[1]
    if training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
    statistics = (None, None) if training else (running_mean, running_var)
    y, mean, var, *_ = ops.forward(input, *statistics, weight, bias, residual, eps, relu)
    if training and count:
        with torch.no_grad():
            for running, new in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                if running is not None:
                    running.copy_(running.double().lerp_(new, momentum))  # rounded once
    return y


def _refused(x: Tensor, given: tuple[Tensor | None, ...], training: bool, eps: float) -> str:
    """Say why the kernels do not take these tensors ("" where they do); what is wrong, PyTorch refuses itself."""
    if reason := _unfit(x, "input"):
        return reason
    if x.ndim < 2 or x.shape[1] == 0:
        return "input without channels, or with fewer than two axes"
    dtype, device, shape = x.dtype, x.device, x.shape[1:2]
    for name, tensor in zip(("running_mean", "running_var", "weight", "bias"), given, strict=True):
        if tensor is None:
            continue
        if reason := _unfit(tensor, name):
            return reason
        if tensor.dtype != dtype and not (tensor.dtype == torch.float32 and dtype in HALVES):
            return f"{name} of {tensor.dtype} for an input of {dtype}"
        if tensor.device != device or tensor.shape != shape:
            return f"{name} on another device than the input, or of another shape than (C,)"
    if eps <= 0:
        return "eps of 0 or less"
    mean, var = given[:2]
    if (mean is None) != (var is None) or (mean is None and not training):
        return "running statistics that are missing"
    for statistic in (mean, var):
        if statistic is not None and (statistic.requires_grad or (statistic.stride(0) == 0 and len(statistic) > 1)):
            return "running statistics that require gradients or share memory among them"
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    ):
        return "what runs under torch.func, or in forward mode,"
    return ""


def _unfit(tensor: Tensor, name: str) -> str:
    if not isinstance(tensor, Tensor):
        return f"{name} of type {type(tensor).__name__}"
    if tensor.device.type not in ("cpu", "meta"):
        return f"{name} on {tensor.device}"
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        return f"{name} of {tensor.dtype}, {tensor.layout}"
    return ""


def _by_pytorch(
    reason: str, x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float | Tensor, eps: float, relu: bool, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    y = F.batch_norm(x, mean, var, weight, bias, training, float(momentum), eps)  # which may raise
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(f"fastbn: {reason} is left to PyTorch's batch_norm (said once)", UserWarning, stacklevel=3)
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


class FastBatchNorm(nn.modules.batchnorm._NormBase):
    """Forward pass of the modules; constructor and state are PyTorch's.

    Not a _BatchNorm: what looks for those, such as SyncBatchNorm.convert_sync_batchnorm, would lose a fused ReLU.
    """

    def _get_name(self) -> str:
        return f"fastbn.{type(self).__name__}"  # print(model) tells what has been converted

    def _normalize(self, input: Tensor, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        mean, var, momentum = self.running_mean, self.running_var, self.momentum
        training, tracked = self.training, None
        if not training:
            training = mean is None and var is None  # without running statistics, those of the batch
        elif self.track_running_stats:
            tracked = self.num_batches_tracked
        else:
            mean = var = None
        weight: Any = momentum
        if momentum is None:  # the average of all batches so far; as a tensor, which the compiler can follow
            weight = 0.0 if tracked is None else 1 / (tracked + 1).double()
        y = batch_norm(
            input, mean, var, self.weight, self.bias, training, weight, self.eps, relu=relu, residual=residual
        )
        if tracked is not None:
            tracked.add_(1)
        return y


class _Plain(FastBatchNorm):
    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input)


class BatchNorm1d(_Plain, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d, (N, C) or (N, C, L), by fastbn's kernels: see :func:`batch_norm`."""


class BatchNorm2d(_Plain, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d, (N, C, H, W), by fastbn's kernels: see :func:`batch_norm`."""


class BatchNorm3d(_Plain, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d, (N, C, D, H, W), by fastbn's kernels: see :func:`batch_norm`."""


class _AnyRank(FastBatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input: expected 2 axes or more, (N, C, *), got shape {tuple(input.shape)}")


class BatchNormReLU(_AnyRank):
    """relu(bn(x)) in one pass, for x of shape (N, C, *); parameters, state dict and modes of torch.nn.BatchNorm2d.

    What a BatchNorm alone costs, forward and backward; no output is kept for the backward pass of ReLU.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import BatchNormReLU
    >>> BatchNormReLU(3)(torch.randn(2, 3, 4, 4)).min()
    tensor(0., grad_fn=<MinBackward1>)
    """

    def forward(self, input: Tensor) -> Tensor:
        return self._normalize(input, relu=True)


class BatchNormAddReLU(_AnyRank):
    """relu(bn(x) + residual), as at the end of a residual block (He et al. 2016, fig. 2), in one pass.

    Parameters, state dict and modes of torch.nn.BatchNorm2d. One bit per element is kept for ReLU's backward pass.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import BatchNormAddReLU
    >>> x = torch.randn(2, 3, 4, 4)
    >>> BatchNormAddReLU(3)(x, -x).shape
    torch.Size([2, 3, 4, 4])
    """

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return self._normalize(input, relu=True, residual=residual)
