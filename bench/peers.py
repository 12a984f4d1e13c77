"""Who computes the cases. Each class turns a case into a callable, or None for what it does not do.

A peer that is not installed is skipped by name, with what to install.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import numpy as np

import fastbn
from fastbn._core import layout
from fastbn._core.dispatch import kernels

from .cases import NormCase, OptimCase

Call = Callable[[], object]


def arrays(case: NormCase, count: int) -> list[np.ndarray]:
    """Return random arrays of the case's logical (N, C, …) shape, in its order in memory, aligned."""
    rng = np.random.default_rng(0)
    shape = case.shape if case.layout == "nchw" else (case.shape[0], *case.shape[2:], case.shape[1])
    made = []
    for _ in range(count):
        array = layout.aligned_empty(shape, np.dtype(case.dtype))
        array[...] = rng.standard_normal(shape, dtype=np.float32)
        made.append(array if case.layout == "nchw" else np.moveaxis(array, -1, 1))
    return made


class Copy:
    """A streaming copy of one tensor: the yardstick."""

    name, module, install = "copy", "fastbn", ""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def norm(self, case: NormCase) -> Call:
        return self._copy(case.tensor_bytes)

    def optim(self, case: OptimCase) -> Call:
        return self._copy(case.tensor_bytes)

    def _copy(self, size: int) -> Call:
        source, target = (layout.aligned_empty((size,), np.dtype(np.uint8)) for _ in range(2))
        source[...] = 1
        return lambda: kernels.copy(source, target, self.threads)


class FastBN:
    """This library, through its public functions."""

    name, module, install = "fastbn", "fastbn", ""

    def __init__(self, threads: int) -> None:
        fastbn.set_num_threads(threads)

    def norm(self, case: NormCase) -> Call:
        x, dy, out = arrays(case, 3)
        c = case.shape[1]
        gamma, beta = np.full(c, 1.5, np.float32), np.full(c, 0.25, np.float32)
        into = {"out": out} if case.preallocated else {}
        if case.operation == "train":
            return lambda: fastbn.batch_norm_train(x, gamma, beta, **into)
        if case.operation == "infer":
            mean, var = np.zeros(c, np.float32), np.ones(c, np.float32)
            return lambda: fastbn.batch_norm_infer(x, mean, var, gamma, beta, **into)
        _, saved = fastbn.batch_norm_train(x, gamma, beta)
        return lambda: fastbn.batch_norm_backward(dy, saved, **into)

    def optim(self, case: OptimCase) -> Call:
        params, grads = optimizer_arrays(case)
        clip = {"clip_global_norm": 1.0} if case.clip else {}
        make = {
            "SGD": lambda: fastbn.optim.SGD(params, 1e-4, **clip),
            "Nesterov": lambda: fastbn.optim.SGD(params, 1e-4, momentum=0.9, nesterov=True, **clip),
            "RMSprop": lambda: fastbn.optim.RMSprop(params, 1e-4, **clip),
            "Adam": lambda: fastbn.optim.Adam(params, 1e-4, **clip),
            "AdamW": lambda: fastbn.optim.AdamW(params, 1e-4, **clip),
        }
        optimizer = make[case.operation]()
        return lambda: optimizer.step(grads)


class NumPy:
    """The formulas as one would write them."""

    name, module, install = "numpy", "numpy", "pip install numpy"

    def __init__(self, threads: int) -> None:
        pass

    def norm(self, case: NormCase) -> Call:
        x, dy = arrays(case, 2)
        axes = tuple(i for i in range(x.ndim) if i != 1)
        count = x.size // x.shape[1]

        def train() -> tuple[np.ndarray, np.ndarray]:
            centred = x - x.mean(axes, keepdims=True)
            rstd = 1 / np.sqrt((centred * centred).mean(axes, keepdims=True) + np.float32(1e-5))
            return centred * rstd * np.float32(1.5) + np.float32(0.25), rstd

        def backward() -> np.ndarray:
            dbeta, dgamma = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
            return np.float32(1.5) * rstd * (dy - dbeta / np.float32(count) - xhat * (dgamma / np.float32(count)))

        y, rstd = train()
        xhat = (y - np.float32(0.25)) / np.float32(1.5)
        return {"train": train, "backward": backward, "infer": lambda: x * np.float32(1.5) + np.float32(0.25)}[
            case.operation
        ]

    def optim(self, case: OptimCase) -> Call | None:
        return None


class Torch:
    """PyTorch eager."""

    name, module, install = "torch", "torch", "pip install torch"

    def __init__(self, threads: int) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(threads)

    def norm(self, case: NormCase) -> Call:
        torch = self.torch
        x, dy, out = (torch.from_numpy(array) for array in arrays(case, 3))
        c = case.shape[1]
        gamma, beta = torch.full((c,), 1.5), torch.full((c,), 0.25)
        mean, var = torch.zeros(c), torch.ones(c)
        if case.operation != "backward" and not case.preallocated:
            training = case.operation == "train"
            statistics = (None, None) if training else (mean, var)
            return lambda: torch.nn.functional.batch_norm(x, *statistics, gamma, beta, training)
        extra = (torch.empty(c), torch.empty(c))
        if case.operation in ("train", "infer"):
            training = case.operation == "train"
            statistics = (None, None) if training else (mean, var)
            return lambda: torch.native_batch_norm(
                x, gamma, beta, *statistics, training, 0.1, 1e-5, out=(out, *extra)
            )
        _, save_mean, save_rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, 1e-5)
        grad = torch.ops.aten.native_batch_norm_backward
        if not case.preallocated:
            return lambda: grad(dy, x, gamma, None, None, save_mean, save_rstd, True, 1e-5, [True, True, True])
        return lambda: grad.out(
            dy, x, gamma, None, None, save_mean, save_rstd, True, 1e-5, [True, True, True],
            out0=out, out1=extra[0], out2=extra[1],
        )  # fmt: skip

    def optim(self, case: OptimCase) -> Call:
        torch = self.torch
        params, grads = ([torch.from_numpy(a) for a in group] for group in optimizer_arrays(case))
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        fused = {} if case.operation == "RMSprop" else {"fused": True}  # there is no fused RMSprop
        make = {
            "SGD": lambda: torch.optim.SGD(params, 1e-4, **fused),
            "Nesterov": lambda: torch.optim.SGD(params, 1e-4, momentum=0.9, nesterov=True, **fused),
            "RMSprop": lambda: torch.optim.RMSprop(params, 1e-4, foreach=True),
            "Adam": lambda: torch.optim.Adam(params, 1e-4, **fused),
            "AdamW": lambda: torch.optim.AdamW(params, 1e-4, **fused),
        }
        optimizer = make[case.operation]()

        def step() -> None:
            if case.clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()

        return step


def optimizer_arrays(case: OptimCase) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return parameters and gradients of the case's sizes."""
    rng = np.random.default_rng(0)
    return tuple([rng.standard_normal(n, dtype=np.float32) for n in case.sizes] for _ in range(2))  # type: ignore[return-value]


PEERS = {peer.name: peer for peer in (NumPy, Torch)}
