"""PyTorch: eager, compiled, and its oneDNN tensors."""

from __future__ import annotations

import importlib
import os
import shutil
from typing import Any

import numpy as np

from .cases import FoldCase, NormCase, OptimCase
from .peers import BETA, EPS, GAMMA, Call, Peer, arrays, fold_arrays, optimizer_arrays

ALL = [True, True, True]  # the gradients wanted: of x, gamma and beta


class Torch(Peer):
    """PyTorch eager; optimizers with fused=True where there is such a thing."""

    name, module, install = "torch", "torch", "pip install torch"
    fused_optimizer = True

    def __init__(self, threads: int) -> None:
        self.torch = importlib.import_module("torch")
        self.torch.set_num_threads(threads)

    def tensor(self, array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":  # which from_numpy does not know
            return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(array)

    def channels(self, case: NormCase) -> tuple[Any, Any, Any, Any]:
        """Return gamma, beta, mean and var: float32 beside half types, as layers under autocast have them."""
        dtype = self.torch.float64 if case.dtype == "float64" else self.torch.float32
        return tuple(self.torch.full((case.shape[1],), value, dtype=dtype) for value in (GAMMA, BETA, 0.0, 1.0))

    def norm(self, case: NormCase) -> Call | None:
        if (case.operation, case.layout, len(case.shape), case.preallocated) == ("train", "nhwc", 3, True):
            return None  # native_batch_norm writes wrong values into such an out=
        torch, aten = self.torch, self.torch.ops.aten
        add, relu, into = case.fused == "add+relu", bool(case.fused), case.preallocated
        x, dy, residual, *own = map(self.tensor, arrays(case, 5 if into else 3))
        out, masked = own or (None, None)
        gamma, beta, mean, var = self.channels(case)
        extra = (torch.empty_like(gamma), torch.empty_like(gamma))
        training = case.operation != "infer"
        statistics = (None, None) if training else (mean, var)
        given, batch_norm = into and case.operation != "backward", torch.nn.functional.batch_norm

        def forward() -> Any:
            """As in torchvision's blocks: bn(x), out += identity, relu(inplace=True)."""
            if given:
                y = torch.native_batch_norm(x, gamma, beta, *statistics, training, 0.1, EPS, out=(out, *extra))[0]
            else:
                y = batch_norm(x, *statistics, gamma, beta, training, 0.1, EPS)
            if add:
                y += residual
            return torch.relu_(y) if relu else y

        if case.operation != "backward":
            return forward
        _, *saved = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.1, EPS)
        y = forward()
        grad = aten.native_batch_norm_backward

        def backward() -> Any:
            """Run what autograd runs, without its bookkeeping."""
            g = dy
            if relu and into:
                g = aten.threshold_backward.grad_input(dy, y, 0, grad_input=masked)
            elif relu:
                g = aten.threshold_backward(dy, y, 0)
            args = (g, x, gamma, None, None, *saved, True, EPS, ALL)
            return (*(grad.out(*args, out0=out, out1=extra[0], out2=extra[1]) if into else grad(*args)), g)

        return backward

    def optim(self, case: OptimCase) -> Call | None:
        torch = self.torch
        params, grads = ([torch.from_numpy(a) for a in group] for group in optimizer_arrays(case))
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        fused = self.fused_optimizer and case.operation != "RMSprop"  # there is no fused RMSprop
        how = {"fused": True} if fused else {"foreach": True}
        make = {
            "SGD": lambda: torch.optim.SGD(params, 1e-4, **how),
            "Nesterov": lambda: torch.optim.SGD(params, 1e-4, momentum=0.9, nesterov=True, **how),
            "RMSprop": lambda: torch.optim.RMSprop(params, 1e-4, **how),
            "Adam": lambda: torch.optim.Adam(params, 1e-4, **how),
            "AdamW": lambda: torch.optim.AdamW(params, 1e-4, **how),
        }
        optimizer = make[case.operation]()

        def step() -> Any:
            if case.clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            return params

        return step

    def fold(self, case: FoldCase) -> Call | None:
        fusion = importlib.import_module("torch.nn.utils.fusion")
        array, parameters = fold_arrays(case)
        weight, gamma, beta, mean, var = map(self.tensor, (array, *parameters))
        if case.operation == "linear":
            return lambda: fusion.fuse_linear_bn_weights(weight, None, mean, var, EPS, gamma, beta)
        transposed = case.operation == "conv_transposed"
        return lambda: fusion.fuse_conv_bn_weights(weight, None, mean, var, EPS, gamma, beta, transposed)


class TorchForeach(Torch):
    """PyTorch's optimizers with foreach=True."""

    name, fused_optimizer = "torch-foreach", False

    norm, fold = Peer.norm, Peer.fold


class TorchCompile(Torch):
    """The same calls as one graph, compiled by Inductor for the case's shape. It gives new arrays only."""

    name = "torch.compile"
    optim, fold = Peer.optim, Peer.fold

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
            raise RuntimeError("needs a C++ compiler")
        config = importlib.import_module("torch._dynamo").config
        config.recompile_limit = config.accumulated_recompile_limit = 1 << 16  # a graph for each case

    def norm(self, case: NormCase) -> Call | None:
        """The first call compiles."""
        return None if case.preallocated else self.torch.compile(super().norm(case), fullgraph=True, dynamic=False)



class TorchMkldnn(Torch):
    """PyTorch's operators on oneDNN's opaque tensors, converted before. They give new arrays only."""

    name = "torch-mkldnn"
    optim, fold = Peer.optim, Peer.fold

    def tensor(self, array: np.ndarray) -> Any:
        return super().tensor(array).to_mkldnn()

    def norm(self, case: NormCase) -> Call | None:
        fits = case.layout == "nchw" and len(case.shape) == 4 and case.dtype == "float32" and not case.preallocated
        return super().norm(case) if fits else None
