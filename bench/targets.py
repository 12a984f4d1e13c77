"""What fastbn is to reach, row by row: the cases a row needs, and the number it makes of their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .cases import SHAPES, Case, Key, NormCase, OptimCase, optim_cases

REDUCE: dict[str, Callable[[list[float]], float]] = {"mean": statistics.geometric_mean, "least": min, "largest": max}
ONEDNN = ("onednn-nchw", "onednn-nhwc", "onednn-blocked")
ONEDNN_2D = ("onednn-nhwc", "onednn-rows")
LAYOUTS = {"nchw": "channels first", "nhwc": "channels last"}
OPERATIONS = {"train": "training", "backward": "backward", "infer": "inference"}


@dataclass(frozen=True)
class Ratio:
    """The least time of `over` by the least of `under`; without `under`, microseconds."""

    over: tuple[Key, ...]
    under: tuple[Key, ...] = ()
    scale: float = 1.0

    def of(self, seconds: Mapping[Key, float]) -> float:
        """Compute it; KeyError names what there is no time for."""
        over, under = (
            min((seconds[key] for key in keys if key in seconds), default=None) for keys in (self.over, self.under)
        )
        if over is None or (self.under and under is None):
            raise KeyError(self.over[0] if over is None else self.under[0])
        return self.scale * over / (under if under is not None else 1e-6)


@dataclass(frozen=True)
class Target:
    """One row: `reduce` over the ratios, against a limit, or only shown (no sense)."""

    text: str
    reduce: str
    ratios: tuple[Ratio, ...]
    sense: str = ""  # "≥", "≤", or "" to show it
    limit: float = 0.0
    unit: str = "×"

    @property
    def keys(self) -> set[Key]:
        return {key for ratio in self.ratios for key in ratio.over + ratio.under}

    @property
    def asked(self) -> str:
        return f"{self.reduce} {self.sense} {self.limit:g}{self.unit}" if self.sense else self.reduce

    def value(self, seconds: Mapping[Key, float]) -> float:
        return REDUCE[self.reduce]([ratio.of(seconds) for ratio in self.ratios])

    def verdict(self, value: float) -> str:
        if not self.sense:
            return "shown"
        return "met" if (value >= self.limit if self.sense == "≥" else value <= self.limit) else "not met"


def groups(rows: Iterable[Target]) -> dict[Key, frozenset[Key]]:
    """Return for each measurement all that it is compared with, directly or not: these are interleaved in one run."""
    found: dict[Key, frozenset[Key]] = {}
    for row in rows:
        for ratio in row.ratios:
            keys = ratio.over + ratio.under
            together = frozenset(keys).union(*(found.get(key, ()) for key in keys))
            found.update(dict.fromkeys(together, together))
    return found


def faster(cases: Sequence[Case], *peers: str, own: str = "fastbn") -> tuple[Ratio, ...]:
    """How many times as long the fastest of the peers takes."""
    return tuple(Ratio(tuple((case, peer) for peer in peers), ((case, own),)) for case in cases)


def cost(cases: Sequence[Case], other: str) -> tuple[Ratio, ...]:
    """How many times as long fastbn takes."""
    return tuple(Ratio(((case, "fastbn"),), ((case, other),)) for case in cases)


def against(cases: Sequence[Case], references: Sequence[Case]) -> tuple[Ratio, ...]:
    """How many times as long fastbn takes per byte as for another case."""
    return tuple(
        Ratio(((case, "fastbn"),), ((ref, "fastbn"),), ref.tensor_bytes / case.tensor_bytes)
        for case, ref in zip(cases, references, strict=True)
    )


def rows(*, quick: bool, cache: int, threads: int) -> list[Target]:
    """Return all rows; `cache` is the last-level cache in bytes. Quick ones are a smoke test on tiny arrays."""
    shapes = [(2, 16, 8, 8), (2, 32, 4, 4)] if quick else SHAPES["resnet50"]
    awkward = [(2, 3, 16, 16), (2, 24, 8, 8)] if quick else SHAPES["awkward"]
    two_d = [(64, 32)] if quick else SHAPES["rows"]
    cache = 0 if quick else cache
    found: list[Target] = []

    def add(text: str, reduce: str, ratios: tuple[Ratio, ...], asked: str = "", unit: str = "×") -> None:
        sense, _, limit = asked.partition(" ")
        found.append(Target(text, reduce, ratios, sense, float(limit or 0), unit))

    def norm(operation: str, layout: str, kind: str, *, dtype: str = "float32", fused: str = "") -> list[NormCase]:
        return [NormCase(operation, shape, layout, dtype, kind == "out=", fused) for shape in shapes]

    def large(cases: Iterable[NormCase]) -> list[NormCase]:
        return [case for case in cases if case.tensor_bytes > cache]

    for operation, limits in (("train", ("≥ 7", "≥ 4")), ("backward", ("≥ 4", "≥ 3")), ("infer", ("≥ 3", "≥ 3"))):
        for layout, limit in zip(LAYOUTS, limits, strict=True):
            text = f"{OPERATIONS[operation]}, {LAYOUTS[layout]}, × PyTorch"
            add(f"{text}, fresh", "mean", faster(norm(operation, layout, "fresh"), "torch"), limit)
            if operation != "infer":
                add(f"{text}, out=", "mean", faster(norm(operation, layout, "out="), "torch"))

    for operation in ("train", "backward"):
        ratios = faster(norm(operation, "nchw", "out="), *ONEDNN)
        text = f"{OPERATIONS[operation]}, channels first, × oneDNN's best layout, out="
        add(text, "mean", ratios, "≥ 1.2")
        add(text, "least", ratios, "≥ 0.95")
    for operation in ("train", "backward"):
        cases = norm(operation, "nhwc", "out=")
        text = f"{OPERATIONS[operation]}, channels last, × oneDNN's"
        add(f"{text} nhwc, out=", "mean", faster(cases, "onednn-nhwc"), "≥ 1.3")
        add(f"{text} nhwc, out=", "least", faster(cases, "onednn-nhwc"), "≥ 1")
        add(f"{text} blocked, out=", "mean", faster(cases, "onednn-blocked"))

    for layout, limits in (("nchw", ("≤ 1.6", "≤ 2.4")), ("nhwc", ("≤ 2.2", "≤ 3.4"))):
        for operation, limit in zip(("train", "backward"), limits, strict=True):
            text = f"{OPERATIONS[operation]}, {LAYOUTS[layout]}, in streaming copies, tensors > cache, out="
            add(text, "mean", cost(large(norm(operation, layout, "out=")), "copy"), limit)

    for layout in LAYOUTS:
        for operation in ("train", "backward"):
            ratios = against(norm(operation, layout, "out=", fused="relu"), norm(operation, layout, "out="))
            add(f"{OPERATIONS[operation]} BN+ReLU, {LAYOUTS[layout]}, in BN alone, out=", "mean", ratios, "≤ 1.05")
    for layout, limits in (("nchw", ("≥ 6", "≥ 4")), ("nhwc", ("", ""))):
        for operation, limit in zip(("train", "backward"), limits, strict=True):
            ratios = faster(norm(operation, layout, "fresh", fused="add+relu"), "torch")
            text = f"{OPERATIONS[operation]} BN+add+ReLU, {LAYOUTS[layout]}, × PyTorch's sequence, fresh"
            add(text, "mean", ratios, limit)

    for operation in ("train", "backward"):
        cases = [NormCase(operation, shape, "nhwc") for shape in awkward]
        references = [NormCase(operation, (max(2, round(case.elements / 256)), 256)) for case in cases]
        text = f"{OPERATIONS[operation]}, 3, 24, 144, 255, 960 channels last, time per byte in that of 256, out="
        add(text, "largest", against(cases, references), "≤ 1.3")

    for dtype in ("float16", "bfloat16"):
        for operation in ("train", "backward"):
            halves = [c for layout in LAYOUTS for c in large(norm(operation, layout, "out=", dtype=dtype))]
            wide = [NormCase(c.operation, c.shape, c.layout) for c in halves]
            ratios = tuple(Ratio(((w, "fastbn"),), ((h, "fastbn"),)) for w, h in zip(wide, halves, strict=True))
            add(f"{OPERATIONS[operation]}, {dtype}, × own float32, tensors > cache, out=", "mean", ratios, "≥ 1.6")
    for operation in ("train", "backward"):
        cases = [case for layout in LAYOUTS for case in norm(operation, layout, "fresh", dtype="bfloat16")]
        add(f"{OPERATIONS[operation]}, bfloat16, × PyTorch's, fresh", "least", faster(cases, "torch"), "≥ 1")

    for operation, limit in (("train", "≤ 7"), ("infer", "≤ 4")):
        cases = [NormCase(operation, shape, preallocated=False) for shape in SHAPES["small"]]
        text = f"{OPERATIONS[operation]}, (60, 100) and (16, 256), fresh"
        add(f"{text}, a call", "largest", tuple(Ratio(((case, "fastbn"),)) for case in cases), limit, " µs")
        add(f"{text}, × PyTorch", "least", faster(cases, "torch"), "≥ 2")
    for operation in OPERATIONS:
        text = f"{OPERATIONS[operation]}, {', '.join(f'({n}, {c})' for n, c in two_d)}"
        fresh, given = ([NormCase(operation, shape, preallocated=p) for shape in two_d] for p in (False, True))
        add(f"{text}, × PyTorch, out=", "least", faster(given, "torch"), "≥ 1")
        add(f"{text}, × PyTorch, fresh", "least", faster(fresh, "torch"), "≥ 1")
        add(f"{text}, × oneDNN's best, out=", "least", faster(given, *ONEDNN_2D), "≥ 1")

    steps = optim_cases(quick=quick)

    def step(arrays: str, operation: str, clip: bool) -> list[OptimCase]:
        arrays = "MLP" if quick else arrays
        return [c for c in steps if c.arrays.startswith(arrays) and (c.operation, c.clip) == (operation, clip)]

    for clip, limit in ((False, "≥ 1"), (True, "≥ 2.5")):
        for operation in ("Adam", "AdamW", "Nesterov"):
            text = f"{operation}{' + global-norm clip' if clip else ''}, ResNet-50's 161 arrays, × PyTorch fused"
            add(text, "mean", faster(step("ResNet-50", operation, clip), "torch"), limit)
    fastest = faster(step("ResNet-50", "RMSprop", False), "torch", "torch-foreach")
    add("RMSprop, ResNet-50's 161 arrays, × PyTorch's fastest (no fused one exists)", "mean", fastest, "≥ 3")
    for arrays, name, limits in (
        ("MLP", "11 arrays of an MLP", ("≥ 4", "≥ 8")), ("2,000", "2,000 arrays of 64", ("≥ 40", "≥ 60")),
    ):  # fmt: skip
        for clip, limit in zip((False, True), limits, strict=True):
            text = f"Adam{' + global-norm clip' if clip else ''}, {name}, × PyTorch fused"
            add(text, "mean", faster(step(arrays, "Adam", clip), "torch"), limit)

    for operation in ("train", "backward"):
        text = f"{OPERATIONS[operation]}, channels first, threads: {threads}, × 1 thread, out="
        add(text, "mean", faster(norm(operation, "nchw", "out="), "fastbn on 1 thread"))
    both = [c for layout in LAYOUTS for operation in ("train", "backward") for c in norm(operation, layout, "out=")]
    for high, low in (("v3", "v2"), ("v4", "v3")):
        ratios = tuple(Ratio(((c, f"fastbn {high}"),), ((c, f"fastbn {low}"),)) for c in both)
        add(f"training and backward, both layouts, {high} in the time of {low}, out=", "largest", ratios, "≤ 1.05")
    return found
