"""The table of cases: what is computed, on which arrays, and how many bytes must move."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

RESNET50 = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]
SHAPES = {
    "resnet50": [(32, c, s, s) for c, s in RESNET50],
    "largest": [(32, 256, 56, 56)],
    "rows": [(60, 100), (16, 256), (256, 1024), (4096, 1024), (65536, 64)],
    "quick": [(8, 64, 56, 56), (60, 100)],
}

# Tensors that must be read or written at least once: {operation: (channels first, channels last)}. Channels first, a
# channel is used while it is in cache; channels last, the statistics need a pass of their own.
TENSORS = {"train": (2, 3), "infer": (2, 2), "backward": (3, 5)}


@dataclass(frozen=True)
class NormCase:
    """One operation on one shape. `layout` is "nchw" or "nhwc"; a 2-D shape has rows of channels either way."""

    operation: str
    shape: tuple[int, ...]
    layout: str = "nchw"
    dtype: str = "float32"
    preallocated: bool = True

    @property
    def name(self) -> str:
        kind = "out=" if self.preallocated else "fresh"
        return f"{self.operation} {'×'.join(map(str, self.shape))} {self.layout} {self.dtype} {kind}"

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Bytes that must move."""
        channels_last = self.layout == "nhwc" or len(self.shape) == 2
        return TENSORS[self.operation][channels_last] * self.tensor_bytes


@dataclass(frozen=True)
class OptimCase:
    """One step of an optimizer over many float32 arrays. `floats` is what must move per parameter, in float32."""

    operation: str
    arrays: str
    sizes: tuple[int, ...] = field(repr=False)
    floats: int = 7
    clip: bool = False

    @property
    def name(self) -> str:
        return f"{self.operation}{' + global-norm clip' if self.clip else ''}, {self.arrays}"

    @property
    def tensor_bytes(self) -> int:
        return 4 * sum(self.sizes)

    @property
    def bytes(self) -> int:
        return (self.floats + self.clip) * self.tensor_bytes


def norm_cases(shapes: list[tuple[int, ...]], dtype: str) -> list[NormCase]:
    cases = []
    for shape in shapes:
        for layout in ("nchw", "nhwc") if len(shape) > 2 else ("nchw",):
            cases += [NormCase(op, shape, layout, dtype) for op in ("train", "backward", "infer")]
            cases += [NormCase(op, shape, layout, dtype, preallocated=False) for op in ("train", "infer")]
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
