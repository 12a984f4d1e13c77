"""The operators `torch.ops.fastbn.*`: kernels on the memory of tensors, fake results for the compiler, autograd.

    batch_norm(x, mean?, var?, weight?, bias?, residual?, eps, relu) -> (y, mean, var, rstd, bits)
    batch_norm_backward(dy, x, weight?, bias?, mean, var, rstd, bits, strides, eps, relu, has_residual, frozen)
        -> (dx, dweight, dbias, dresidual)

Both are functional. Without mean and var, those of the batch are taken; with them, they count as constants. Statistics
are float64. `bits`, of ReLU after a residual, is one bit per element of y, in the order that `layout.bits_order` gives
for its `strides`; dx has those too. What there is none of is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._core import buffers, layout
from ...norm import Saved, batch_norm_backward, batch_norm_train, infer
from ...threads import get_num_threads, num_threads
from .layers import HALVES, to_array

_LIBRARY = torch.library.Library("fastbn", "DEF")
_LIBRARY.define(
    "batch_norm(Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "bool relu) -> (Tensor y, Tensor mean, Tensor var, Tensor rstd, Tensor bits)"
)
_LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor rstd, "
    "Tensor bits, SymInt[] strides, float eps, bool relu, bool has_residual, bool frozen) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)"
)
forward = torch.ops.fastbn.batch_norm.default
backward = torch.ops.fastbn.batch_norm_backward.default


def _threads() -> Any:
    """Limit a call to PyTorch's threads: what the two use together never exceeds what either was given."""
    return num_threads(min(get_num_threads(), torch.get_num_threads()))


def _array(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else to_array(tensor)


def _empty(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a new tensor like x with these strides; a large one in memory that earlier results have left.

    That saves the page faults of new memory.
    """
    if x.nbytes < buffers.FROM:
        return torch.empty_strided(x.shape, strides, dtype=x.dtype)
    memory = torch.from_numpy(layout.aligned_empty((x.nbytes,), np.dtype(np.uint8)))
    return torch.empty(0, dtype=x.dtype).set_(memory.untyped_storage(), 0, x.shape, strides)


def _order(x: Tensor) -> torch.memory_format:
    """Return the order in memory that PyTorch's own results have."""
    if x.is_contiguous():
        return torch.contiguous_format
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and x.is_contiguous(memory_format=last):
        return last
    return torch._prims_common.suggest_memory_format(x)


def _empty_like(x: Tensor) -> Tensor:
    """Return a new tensor like x in PyTorch's order."""
    if x.nbytes < buffers.FROM:
        return torch.empty_like(x, memory_format=_order(x))
    return _empty(x, torch.empty_like(x, memory_format=_order(x), device="meta").stride())


def _in_order(x: Tensor, y: Tensor) -> Tensor:
    """Return x, or a copy that lies in memory as y does."""
    return x if x.stride() == y.stride() else _empty(x, y.stride()).copy_(x)


def _no_bits(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=x.device)


def _forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, eps: float, relu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = _empty_like(x)
    if relu and residual is not None:  # bits have the order of y, which needs arrays in one order
        x, residual = _in_order(x, y), _in_order(residual, y)
    activation = "relu" if relu else None
    x_array, residual_array, y_array = to_array(x), _array(residual), to_array(y)
    gamma, beta = _array(weight), _array(bias)
    with _threads():
        if mean is None or var is None:
            saved = batch_norm_train(
                x_array, gamma, beta, eps=eps, activation=activation, residual=residual_array, out=y_array
            )[1]
            mean64, var64, rstd, bits = saved.mean, saved.var, saved.rstd, saved.bits
            if saved.count == 0:  # there the three are one array
                var64, rstd = var64.copy(), rstd.copy()
        else:
            mean64, var64 = (to_array(statistic).astype(np.float64) for statistic in (mean, var))
            bits = infer(
                x_array, mean64, var64, gamma, beta, 1, eps, activation, residual_array, y_array, None, keep_bits=True
            )[1]
            rstd = 1 / np.sqrt(var64 + eps)
    statistics = (torch.from_numpy(statistic) for statistic in (mean64, var64, rstd))
    return y, *statistics, _no_bits(x) if bits is None else torch.from_numpy(bits.memory)


def _fake_forward(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, eps: float, relu: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    y = torch.empty_like(x, memory_format=_order(x))
    statistics = (x.new_empty((x.shape[1],), dtype=torch.float64) for _ in range(3))
    if not relu or residual is None or x.numel() == 0:
        return y, *statistics, _no_bits(x)
    nbytes = layout.bits_order(1, tuple(y.shape), y.stride())[1]
    return y, *statistics, torch.empty(nbytes, dtype=torch.uint8, device=x.device)


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, rstd: Tensor,
    bits: Tensor, strides: Sequence[int], eps: float, relu: bool, has_residual: bool, frozen: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx = _empty(x, strides)
    marks = None
    if bits.numel():
        x = _in_order(x, dx)
        marks = layout.Bits.of(1, tuple(dx.shape), tuple(strides), bits.numpy())
    gamma, beta = (None if p is None else to_array(p).astype(np.float64) for p in (weight, bias))
    saved = Saved(
        to_array(x), 1, mean.numpy(), var.numpy(), rstd.numpy(), x.numel() // x.shape[1], gamma, beta,
        np.dtype(np.float64), relu, has_residual, marks, frozen,
    )  # fmt: skip
    with _threads():
        gradients = batch_norm_backward(to_array(dy), saved, out=to_array(dx))
    dtype = _parameter_dtype(x, weight)
    dweight, dbias = (torch.from_numpy(g).to(dtype) for g in (gradients.dgamma, gradients.dbeta))
    if gradients.dresidual is None:
        return dx, dweight, dbias, x.new_empty(0)
    dresidual = gradients.dresidual
    values = torch.from_numpy(dresidual.view(np.int16) if x.dtype == torch.bfloat16 else dresidual).view(x.dtype)
    return dx, dweight, dbias, _in_order(values, dx)


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, rstd: Tensor,
    bits: Tensor, strides: Sequence[int], eps: float, relu: bool, has_residual: bool, frozen: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype = _parameter_dtype(x, weight)
    parameters = (x.new_empty((x.shape[1],), dtype=dtype) for _ in range(2))
    dx, dresidual = (x.new_empty_strided(x.shape, strides) for _ in range(2))
    return dx, *parameters, dresidual if has_residual else x.new_empty(0)


def _parameter_dtype(x: Tensor, weight: Tensor | None) -> torch.dtype:
    if weight is not None:
        return weight.dtype
    return torch.float32 if x.dtype in HALVES else x.dtype  # of the bias alone, which may be float32


# Autograd -----------------------------------------------------------------------------------------------------------


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, mean, _, weight, bias, residual, eps, relu = inputs
    y, *statistics, bits = output
    ctx.mark_non_differentiable(*statistics, bits)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias if relu and residual is None else None, *statistics, bits)
    ctx.arguments = y.stride(), eps, relu, residual is not None, mean is not None
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate_forward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    dx, dweight, dbias, dresidual = backward(dy, *ctx.saved_tensors, *ctx.arguments)
    needed = ctx.needs_input_grad
    return (
        dx if needed[0] else None, None, None, dweight if needed[3] else None,
        dbias.to(ctx.bias_dtype) if needed[4] else None, dresidual if needed[5] else None, None, None,
    )  # fmt: skip


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8])
    ctx.arguments = inputs[8:]


def _differentiate_backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    """Differentiate the backward pass, by PyTorch's own operators in float64: rarely used, and never fast."""
    strides, eps, relu, _, frozen = ctx.arguments
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, below which nothing is: dy itself may have come from x.
        tensors: Any = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:3]]
        arguments: Any = (*tensors, *ctx.saved_tensors[3:], strides, eps, relu, frozen)
        outputs = _composite(*arguments)
        pairs = [(o, g) for o, g in zip(outputs, incoming, strict=True) if g is not None and o.requires_grad]
        inputs = [t for t, needed in zip(tensors, ctx.needs_input_grad, strict=False) if needed]
        found: Any = [None] * len(inputs)
        if pairs and inputs:
            found = torch.autograd.grad(
                [o for o, _ in pairs], inputs, [g for _, g in pairs], create_graph=again, allow_unused=True
            )
    remaining = iter(found)
    return *(next(remaining) if needed else None for needed in ctx.needs_input_grad[:3]), *(None,) * 10


def _composite(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, rstd: Tensor,
    bits: Tensor, strides: Sequence[int], eps: float, relu: bool, frozen: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return what `_backward` does, by operators that PyTorch can differentiate."""
    axes = [i for i in range(x.ndim) if i != 1]
    shape = [-1 if i == 1 else 1 for i in range(x.ndim)]
    dz, x64 = dy.double(), x.double()
    if relu:
        dz = dz * _passes(x, weight, bias, mean, var, bits, strides, eps)
    count = x.numel() // x.shape[1]
    frozen = frozen or not count
    if not frozen:
        mean = x64.mean(axes)
        rstd = (x64.var(axes, correction=0) + eps).rsqrt()
    xhat = (x64 - mean.view(shape)) * rstd.view(shape)
    dbeta, dgamma = dz.sum(axes), (dz * xhat).sum(axes)
    scale = rstd if weight is None else rstd * weight.double()
    centred = dz if frozen else dz - dbeta.view(shape) / count - xhat * dgamma.view(shape) / count
    dtype = _parameter_dtype(x, weight)
    return (centred * scale.view(shape)).to(x.dtype), dgamma.to(dtype), dbeta.to(dtype), dz.to(x.dtype)


def _passes(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, bits: Tensor,
    strides: Sequence[int], eps: float,
) -> Tensor:  # fmt: skip
    """Return where the gradient passes ReLU: y > 0, or NaN."""
    if bits.numel():
        return torch.from_numpy(layout.Bits.of(1, tuple(x.shape), tuple(strides), bits.numpy()).read())
    with torch.no_grad():
        return ~(forward(x, mean, var, weight, bias, None, eps, False)[0] <= 0)


for name, kernel, fake, differentiate, save in (
    ("batch_norm", _forward, _fake_forward, _differentiate_forward, _save_forward),
    ("batch_norm_backward", _backward, _fake_backward, _differentiate_backward, _save_backward),
):
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"fastbn::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fastbn::{name}", differentiate, setup_context=save, lib=_LIBRARY)
