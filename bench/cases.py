"""The table of cases: what is computed, on which arrays, and how many bytes must move."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import numpy as np

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "resnet50": [(32, c, s, s) for c, s in RESNET50],
    "largest": [(32, 256, 56, 56)],
    "awkward": [(32, 3, 224, 224), (32, 24, 56, 56), (32, 144, 56, 56), (32, 255, 13, 13), (32, 960, 7, 7)],
    "densenet": [(1, 128, 57, 57), (1, 1024, 15, 15), (1, 1024, 8, 8)],
    "other": [(4, 128, 15000), (1, 64, 16, 56, 56)],
    "small": [(60, 100), (16, 256)],
    "rows": [(256, 1024), (4096, 1024), (65536, 64)],
    "quick": [(8, 64, 56, 56), (60, 100)],
}

# Tensors that must be read or written at least once: {operation: (channels first, channels last)}. Channels first, a
# channel is used while it is in cache; channels last, the statistics need a pass of their own.
TENSORS = {"train": (2, 3), "infer": (2, 2), "backward": (3, 5)}
FUSED = ("", "relu", "add+relu")


@dataclass(frozen=True)
class NormCase:
    """One operation on one shape.

    `layout` is "nchw" or "nhwc" (a 2-D shape has rows of channels either way), `fused` what follows the
    normalisation: nothing, ReLU, or the sum with a residual and then ReLU.
    """

    kind: ClassVar[str] = "norm"  # the contestants' method that makes a callable of it
    operation: str
    shape: tuple[int, ...]
    layout: str = "nchw"
    dtype: str = "float32"
    preallocated: bool = True
    fused: str = ""

    @property
    def name(self) -> str:
        kind = "out=" if self.preallocated else "fresh"
        operation = "+".join(part for part in (self.operation, self.fused) if part)
        return f"{operation} {'×'.join(map(str, self.shape))} {self.layout} {self.dtype} {kind}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def tensor_bytes(self) -> int:
        return self.elements * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)

    @property
    def bytes(self) -> int:
        """Bytes that must move."""
        channels_last = self.layout == "nhwc" or len(self.shape) == 2
        residual = self.fused == "add+relu"  # read, or its gradient written
        return (TENSORS[self.operation][channels_last] + residual) * self.tensor_bytes


@dataclass(frozen=True)
class OptimCase:
    """One step of an optimizer over many float32 arrays. `floats` is what must move per parameter, in float32."""

    kind: ClassVar[str] = "optim"
    operation: str
    arrays: str
    sizes: tuple[int, ...] = field(repr=False)
    floats: int = 7
    clip: bool = False

    @property
    def name(self) -> str:
        return f"{self.operation}{' + global-norm clip' if self.clip else ''}, {self.arrays}"

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def tensor_bytes(self) -> int:
        return 4 * self.elements

    @property
    def bytes(self) -> int:
        return (self.floats + self.clip) * self.tensor_bytes


@dataclass(frozen=True)
class FoldCase:
    """Fold a BatchNorm into the float32 weights of the layer before it: "linear", "conv" or "conv_transposed"."""

    kind: ClassVar[str] = "fold"
    operation: str
    weight: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"fold {self.operation} {'×'.join(map(str, self.weight))}"

    @property
    def elements(self) -> int:
        return math.prod(self.weight)

    @property
    def tensor_bytes(self) -> int:
        return 4 * self.elements

    @property
    def bytes(self) -> int:
        return 2 * self.tensor_bytes


Case: TypeAlias = NormCase | OptimCase | FoldCase
Key: TypeAlias = tuple[Case, str]  # what is measured: a case, and who computes it


def norm_cases(shapes: list[tuple[int, ...]], dtype: str) -> list[NormCase]:
    cases = []
    for shape in shapes:
        for layout in ("nchw", "nhwc") if len(shape) > 2 else ("nchw",):
            for preallocated in (True, False):
                cases += [NormCase(op, shape, layout, dtype, preallocated) for op in ("train", "backward", "infer")]
            cases += [NormCase(op, shape, layout, dtype, False, f) for f in FUSED[1:] for op in ("train", "backward")]
    return cases


def resnet50_sizes() -> tuple[int, ...]:
    """Return the sizes of ResNet-50's 161 parameter arrays, 25.6 million values."""
    sizes = [64 * 3 * 49, 64, 64]
    width_in = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            sizes += [width_in * width, width, width, width * width * 9, width, width, width * 4 * width]
            sizes += [4 * width] * 2
            if block == 0:
                sizes += [width_in * 4 * width, 4 * width, 4 * width]
            width_in = 4 * width
    return (*sizes, 2048 * 1000, 1000)


def optim_cases(*, quick: bool = False) -> list[OptimCase]:
    mlp = (784 * 100, 100, 100, 100 * 100, 100, 100, 100 * 100, 100, 100, 100 * 10, 10)
    lists = {"MLP, 11 arrays": mlp} if quick else {
        "ResNet-50, 161 arrays": resnet50_sizes(), "MLP, 11 arrays": mlp, "2,000 arrays of 64": (64,) * 2000,
    }  # fmt: skip
    floats = {"SGD": 3, "Nesterov": 5, "RMSprop": 5, "Adam": 7, "AdamW": 7}
    return [
        OptimCase(operation, arrays, sizes, count, clip)
        for arrays, sizes in lists.items()
        for operation, count in floats.items()
        for clip in (False, True)
    ]


def fold_cases(*, quick: bool = False) -> list[FoldCase]:
    if quick:
        return [FoldCase("conv", (64, 64, 3, 3))]
    return [
        FoldCase("conv", (64, 64, 3, 3)), FoldCase("conv", (512, 512, 3, 3)), FoldCase("linear", (1000, 2048)),
        FoldCase("conv_transposed", (256, 128, 4, 4)),
    ]  # fmt: skip
