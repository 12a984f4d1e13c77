"""Batch normalisation of a batch that is spread over the ranks of a group: one exchange forward, one backward.

What is summed in a pass is exchanged between the ranks before that pass writes anything; so there is nothing to do
while messages are under way, and nothing has changed on any rank when an error comes with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._core import check
from ..layer import BatchNorm
from ..norm import Moments, Saved, backward_sums, infer, input_gradient
from .mpi_exchange import Group

__all__ = ["backward", "forward", "merge_moments", "move", "pack_moments", "unpack_moments"]


def pack_moments(moments: Moments) -> np.ndarray:
    """Return (count, mean, m2) as one vector."""
    return np.concatenate([[moments.count], moments.mean, moments.m2])


def unpack_moments(part: np.ndarray) -> Moments:
    """Return the moments that :func:`pack_moments` gave."""
    mean, m2 = part[1:].reshape(2, -1)
    moments = Moments(len(mean))
    moments.count, moments.mean, moments.m2 = int(part[0]), mean, m2
    return moments


def merge_moments(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Merge packed moments (Chan, Golub & LeVeque 1979)."""
    return pack_moments(unpack_moments(a).merge(unpack_moments(b)))


def forward(
    bn: BatchNorm, group: Group, number: int, x: Any, residual: Any = None, out: np.ndarray | None = None,
    num_threads: int | None = None,
) -> tuple[np.ndarray, Saved]:  # fmt: skip
    """Normalise by the statistics of all ranks' x; `saved` has them, with the count of all ranks.

    `number` tells the layer from others on the same ranks.
    """
    c = bn.num_features
    with group.guard():
        x = check.array("x", x)
        axis = check.axis(bn.axis, x.ndim)
        if x.shape[axis] != c:
            raise ValueError(f"x: expected {c} channels on axis {bn.axis}, got shape {x.shape}")
        if residual is not None:
            check.like("residual", residual, x.shape, x.dtype)
        if out is not None:
            check.output(out, x.shape, x.dtype, ("x", x), residual=residual, gamma=bn.gamma, beta=bn.beta)
        gamma, beta = check.channels("gamma", bn.gamma, c), check.channels("beta", bn.beta, c)
        part = pack_moments(Moments.of(x, axis, num_threads=num_threads))
        what = f"forward of layer {number}, {c} channels of {x.dtype}"
        total = unpack_moments(group.reduce(what, part, merge_moments))
    if total.count == 1:  # on all ranks
        raise ValueError(f"x: expected 2 or more values per channel over all ranks, got 1 (here shape {x.shape})")
    with np.errstate(all="ignore"):
        var = total.m2 / max(total.count, 1)
        rstd = 1 / np.sqrt(var + bn.eps)
    y, bits = infer(
        x, total.mean, var, gamma, beta, axis, bn.eps, bn.activation, residual, out, num_threads, keep_bits=True
    )
    saved = Saved(
        None if check.same_memory(x, y) else x, axis, total.mean, var, rstd, total.count, gamma, beta,
        check.real(x.dtype) if bn.gamma is None else bn.gamma.dtype, bn.activation == "relu", residual is not None,
        bits,
    )  # fmt: skip
    return y, saved


def move(bn: BatchNorm, saved: Saved) -> None:
    """Move the running statistics towards those of a batch, unless it was empty on all ranks."""
    if saved.count:
        bn._move(saved)


def backward(
    bn: BatchNorm, group: Group, number: int, saved: Saved | None, dy: Any, out: np.ndarray | None = None,
    num_threads: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Return dx and set the layer's gradients, those of the parameters being sums over all ranks."""
    with group.guard():
        if saved is None:
            raise ValueError("backward: expected a call of the layer before it, got none")
        if saved.x is None:
            raise ValueError("saved: expected the input of the forward pass, but out=x overwrote it")
        dtype, c = saved.x.dtype, bn.num_features
        check.like("dy", dy, saved.x.shape, dtype)
        if out is not None:
            check.output(out, saved.x.shape, dtype, ("dy", dy), x=saved.x)
        *sums, dresidual = backward_sums(dy, saved, num_threads)
        what = f"backward of layer {number}, {c} channels of {dtype}"
        dgamma, dbeta = group.reduce(what, np.concatenate(sums)).reshape(2, c)
    dx = input_gradient(dy, saved, dgamma, dbeta, dresidual, out, num_threads)
    if bn.affine:
        bn.grad_gamma, bn.grad_beta = dgamma.astype(saved.param_dtype), dbeta.astype(saved.param_dtype)
    bn.grad_residual = dresidual
    return dx
