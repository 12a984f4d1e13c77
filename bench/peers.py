"""Who computes the cases. Each class turns a case into a callable, or None for what it does not do.

A peer that is not installed raises ModuleNotFoundError, and is skipped by name with what to install.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import fastbn
from fastbn import norm, optim
from fastbn import threads as thread_budget
from fastbn._core import dispatch, layout
from fastbn._core.dispatch import kernels

from .cases import FoldCase, NormCase, OptimCase

Call = Callable[[], object]
GAMMA, BETA, EPS = 1.5, 0.25, 1e-5  # of every case; inference has mean 0 and variance 1
PEERS: dict[str, type[Peer]] = {}  # the other libraries, by name


class Peer:
    """One library. A callable returns what it computed: y, with the statistics after it, or the gradients, dx first."""

    name = ""
    module = ""
    install = ""

    def __init_subclass__(cls) -> None:
        if cls.name and cls.install:
            PEERS[cls.name] = cls

    def __init__(self, threads: int) -> None:
        importlib.import_module(self.module)

    @property
    def version(self) -> str:
        return sys.modules[self.module].__version__

    def norm(self, case: NormCase) -> Call | None:
        return None

    def optim(self, case: OptimCase) -> Call | None:
        return None

    def fold(self, case: FoldCase) -> Call | None:
        return None


@functools.lru_cache(maxsize=1)
def _inputs(shape: tuple[int, ...], order: str, dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = [empty(shape, order, dtype) for _ in range(3)]
    for array in made:
        memory = array if order == "nchw" else np.moveaxis(array, 1, -1)
        memory[...] = rng.standard_normal(memory.shape, dtype=np.float32)
    return made


def empty(shape: tuple[int, ...], order: str, dtype: str) -> np.ndarray:
    """Return an aligned array of logical shape (N, C, …), in memory in that order or with the channels last."""
    kind = np.dtype(importlib.import_module("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype)
    if order == "nchw":
        return layout.aligned_empty(shape, kind)
    return np.moveaxis(layout.aligned_empty((shape[0], *shape[2:], shape[1]), kind), -1, 1)


def arrays(case: NormCase, count: int) -> list[np.ndarray]:
    """Return x, dy, residual, which all peers share and none may change, and outputs of its own."""
    inputs = _inputs(case.shape, case.layout, case.dtype)
    outputs = [empty(case.shape, case.layout, case.dtype) for _ in range(count - len(inputs))]
    for out in outputs:
        out[...] = 0  # the first touch of fresh memory
    return [*inputs[:count], *outputs]


def optimizer_arrays(case: OptimCase) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return parameters and gradients of the case's sizes."""
    rng = np.random.default_rng(0)
    return tuple([rng.standard_normal(n, dtype=np.float32) for n in case.sizes] for _ in range(2))  # type: ignore[return-value]


def fold_arrays(case: FoldCase) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the weights, in PyTorch's order, and gamma, beta, mean and var of their outputs."""
    rng = np.random.default_rng(0)
    channels = case.weight[case.operation == "conv_transposed"]
    weight = rng.standard_normal(case.weight, dtype=np.float32)
    return weight, [rng.uniform(0.5, 1.5, channels).astype(np.float32) for _ in range(4)]


class Copy(Peer):
    """A streaming copy of one tensor: the yardstick."""

    name, module = "copy", "fastbn"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def _copy(self, case: NormCase | OptimCase | FoldCase) -> Call:
        source, target = (layout.aligned_empty((case.tensor_bytes,), np.dtype(np.uint8)) for _ in range(2))
        source[...] = 1
        return lambda: kernels.copy(source, target, self.threads)

    norm = optim = fold = _copy


class FastBN(Peer):
    """This library, through its public functions; with `isa`, by the kernels of that instruction set."""

    name, module = "fastbn", "fastbn"

    def __init__(self, threads: int | None = None, isa: str | None = None) -> None:
        self.threads, self.isa = threads, isa
        self._scope = (
            dispatch.load("kernels", isa or dispatch.isa),
            dispatch.load("optim_kernels", isa or dispatch.isa),
            threads,
        )

    def norm(self, case: NormCase) -> Call:
        x, dy, residual, *out = arrays(case, 3 + case.preallocated)
        c = case.shape[1]
        gamma, beta = np.full(c, GAMMA, np.float32), np.full(c, BETA, np.float32)
        mean, var = np.zeros(c, np.float32), np.ones(c, np.float32)
        into: dict[str, Any] = {"out": out[0]} if case.preallocated else {}
        if self.threads is not None:  # a given number is taken as it is: give the number that pays
            into["num_threads"] = max(1, min(self.threads, x.size // thread_budget.ELEMENTS_PER_THREAD))
        fused = {"activation": "relu"} if case.fused else {}
        options = into | fused | ({"residual": residual} if case.fused == "add+relu" else {})
        if case.operation == "backward":
            options.pop("out", None)
            saved = fastbn.batch_norm_train(x, gamma, beta, **options)[1]
        call = {
            "train": lambda: fastbn.batch_norm_train(x, gamma, beta, **options),
            "infer": lambda: fastbn.batch_norm_infer(x, mean, var, gamma, beta, **options),
            "backward": lambda: fastbn.batch_norm_backward(dy, saved, **into),
        }[case.operation]
        return self._scoped(call) if self.isa else call

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
        optimizer = self._scoped(make[case.operation])()

        def step() -> list[np.ndarray]:
            optimizer.step(grads)
            return params

        return self._scoped(step)

    def fold(self, case: FoldCase) -> Call:
        weight, parameters = fold_arrays(case)
        bn = fastbn.BatchNormParams(*parameters, EPS)
        if case.operation == "linear":
            return lambda: fastbn.fold_linear(weight, None, bn)
        transposed = case.operation == "conv_transposed"
        return lambda: fastbn.fold_conv(weight, None, bn, transposed=transposed)

    def _scoped(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return `call` with this instance's kernels and threads, set for its time alone."""

        def scoped() -> Any:
            before = norm.kernels, optim.optim_kernels, thread_budget._state.override
            norm.kernels, optim.optim_kernels, thread_budget._state.override = self._scope
            try:
                return call()
            finally:
                norm.kernels, optim.optim_kernels, thread_budget._state.override = before

        return scoped


class NumPy(Peer):
    """The formulas as one would write them."""

    name, module, install = "numpy", "numpy", "pip install numpy"

    def norm(self, case: NormCase) -> Call | None:
        if case.dtype not in ("float32", "float64"):
            return None  # NumPy would compute, and sum, in half precision
        x, dy, residual = arrays(case, 3)
        axes = tuple(i for i in range(x.ndim) if i != 1)
        gamma, beta, eps, count = (x.dtype.type(value) for value in (GAMMA, BETA, EPS, x.size // x.shape[1]))

        def follow(y: np.ndarray) -> np.ndarray:
            if case.fused == "add+relu":
                y += residual
            return np.maximum(y, 0, out=y) if case.fused else y

        def train() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            centred = x - x.mean(axes, keepdims=True)
            rstd = 1 / np.sqrt((centred * centred).mean(axes, keepdims=True) + eps)
            xhat = centred * rstd
            return follow(xhat * gamma + beta), xhat, rstd

        def backward() -> tuple[np.ndarray, ...]:
            g = dy * (y > 0) if case.fused else dy
            dbeta, dgamma = g.sum(axes, keepdims=True), (g * xhat).sum(axes, keepdims=True)
            return gamma * rstd * (g - dbeta / count - xhat * (dgamma / count)), dgamma, dbeta, g

        if case.operation == "infer":
            scale = gamma / np.sqrt(1 + eps)
            return lambda: follow(x * scale + beta)
        y, xhat, rstd = train()
        return train if case.operation == "train" else backward

    def fold(self, case: FoldCase) -> Call:
        weight, (gamma, beta, mean, var) = fold_arrays(case)
        axis = int(case.operation == "conv_transposed")
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]

        def fold() -> tuple[np.ndarray, np.ndarray]:
            scale = gamma / np.sqrt(var + np.float32(EPS))
            return weight * scale.reshape(shape), beta - scale * mean

        return fold


from . import peers_onednn, peers_onnxruntime, peers_torch  # noqa: E402, F401 (they derive from Peer)
