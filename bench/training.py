"""`python -m bench training`: a training step of ResNets in PyTorch, with PyTorch's BatchNorm and with fastbn's.

The networks are He et al.'s (2015, arXiv:1512.03385, Table 1), on smaller random images. Each is trained as it is,
after `fastbn.interop.torch.convert`, and built with the fused modules. What is shown of a step:

    time      interleaved in one process. What BatchNorm, ReLU and the addition cost is the time without them: of the
              convolutions alone, where only the projection shortcuts are still added.
    memory    in a process of its own: how far the resident set grows from before the first step to its peak
    losses    over the first steps, against the same network in float64. Rounding grows from step to step, in PyTorch
              as anywhere, so the bound is made of what rounding does to PyTorch's own float32 runs. The number of
              threads may change the bits of PyTorch's convolutions, not those of fastbn.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fastbn
from fastbn.interop.torch import BatchNorm2d, BatchNormAddReLU, BatchNormReLU, convert
from fastbn.interop.torch.optim import SGD as FastSGD

from .report import NOTHING, Progress, Table, number
from .timing import Timing, interleaved

MARGIN = 4  # how many times as far from float64 as PyTorch's runs fastbn's may be
RATE, MOMENTUM, BATCHES = 0.01, 0.9, 4
_EXPLANATION = """\
A training step (forward, cross entropy, backward, SGD with momentum); PyTorch {torch}, fastbn {fastbn}, each on
{threads} threads; {rounds} interleaved rounds. ×: PyTorch's time over this one's; BN share: of the step spent in
BatchNorm, ReLU and addition, 1 - the convolutions' time over the step's; peak MB: growth of the resident set over
its size before the first step, gradients and momentum with it; loss: the largest relative difference of any step to
the float64 run, and to PyTorch's; bound: how many times as far from float64 as PyTorch's float32 runs get until that
step (both layouts, both of its SGDs, and images moved by one ulp), at the worst step: at most {margin}"""
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


class Network(NamedTuple):
    name: str
    blocks: tuple[int, ...]  # of each stage; a stage halves the image and doubles the width
    bottleneck: bool
    batch: int
    size: int  # of the square images
    width: int = 64
    classes: int = 1000
    steps: int = 20  # of the loss curve, which has
    curve: tuple[int, int] = (16, 128)  # a batch and a size of its own: PyTorch's float64 convolutions are slow


NETWORKS = (
    Network("ResNet-18", (2, 2, 2, 2), bottleneck=False, batch=32, size=224),
)
QUICK = Network("tiny", (1, 1), bottleneck=True, batch=4, size=32, width=8, classes=10, steps=4, curve=(4, 32))


class Block(nn.Module):
    """A residual block: 3×3 and 3×3, or as bottleneck 1×1, 3×3 and 1×1, the last four times as wide.

    kind: "plain", PyTorch's modules as users write them; "fused", fastbn's; "bare", the convolutions alone.
    """

    def __init__(self, n_in: int, width: int, stride: int, bottleneck: bool, kind: str) -> None:
        super().__init__()
        self.kind = kind
        kernels = [(1, 1), (3, stride), (1, 1)] if bottleneck else [(3, stride), (3, 1)]
        n_out = 4 * width if bottleneck else width
        widths = [n_in, *[width] * (len(kernels) - 1), n_out]
        self.convs = nn.ModuleList(
            conv(a, b, *kernel) for (a, b), kernel in zip(itertools.pairwise(widths), kernels, strict=True)
        )
        self.norms = nn.ModuleList(norm(kind, "relu", n) for n in widths[1:-1])
        self.norms.append(norm(kind, "add relu", n_out))
        if kind == "plain":
            nn.init.zeros_(self.norms[-1].weight)  # a block starts as the identity (Goyal et al. 2017, section 5.1)
        self.shortcut = None
        if stride > 1 or n_in != n_out:
            self.shortcut = nn.Sequential(conv(n_in, n_out, 1, stride), norm(kind, "", n_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for convolve, normalize in zip(self.convs[:-1], self.norms[:-1], strict=True):
            y = normalize(convolve(y))
            if self.kind == "plain":
                y = torch.relu_(y)
        y = self.convs[-1](y)
        residual = self.shortcut(x) if self.shortcut else x
        if self.kind == "fused":
            return self.norms[-1](y, residual)
        if self.kind == "bare":
            return y + residual if self.shortcut else y
        y = self.norms[-1](y)
        y += residual
        return torch.relu_(y)


class ResNet(nn.Module):
    def __init__(self, network: Network, kind: str) -> None:
        super().__init__()
        n, width = network.width, network.width
        self.stem = nn.Sequential(conv(3, n, 7, 2), norm(kind, "relu", n))
        if kind == "plain":
            self.stem.append(nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages = []
        for stage, blocks in enumerate(network.blocks):
            for block in range(blocks):
                stages.append(Block(n, width, 2 if stage and not block else 1, network.bottleneck, kind))
                n = 4 * width if network.bottleneck else width
            width *= 2
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(n, network.classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.pool(self.stem(x))).mean((2, 3)))


def conv(n_in: int, n_out: int, size: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(n_in, n_out, size, stride, size // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer


def norm(kind: str, then: str, n: int) -> nn.Module:
    """Return the module of a BatchNorm, which as "fused" also does what comes `then`."""
    if kind == "bare":
        return nn.Identity()
    if kind == "plain":
        return nn.BatchNorm2d(n)
    return {"": BatchNorm2d, "relu": BatchNormReLU, "add relu": BatchNormAddReLU}[then](n)


def build(network: Network, kind: str) -> nn.Module:
    """Return the network with the same parameters for each kind; "converted" is the plain one after `convert`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = ResNet(network, "plain")
    if kind == "plain":
        return plain
    if kind == "converted":
        model, report = convert(plain)
        if report.left:
            raise RuntimeError(f"convert: {report}")
        return model
    model = ResNet(network, kind)
    model.load_state_dict(plain.state_dict(), strict=kind == "fused")
    if kind == "bare":  # no ReLU halves the variance: values would grow from layer to layer
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data *= 0.5**0.5
    return model


class Variant(NamedTuple):
    name: str
    kind: str
    optimizer: Callable[..., torch.optim.Optimizer]


PYTORCH = Variant("PyTorch", "plain", torch.optim.SGD)
PYTORCH_FUSED = Variant("PyTorch, SGD(fused=True)", "plain", functools.partial(torch.optim.SGD, fused=True))
OTHERS = (
    Variant("converted", "converted", torch.optim.SGD),
    Variant("fused modules", "fused", torch.optim.SGD),
    Variant("fused modules, fastbn's SGD", "fused", FastSGD),
)
VARIANTS = (PYTORCH, PYTORCH_FUSED, *OTHERS)
BARE = Variant("convolutions alone", "bare", torch.optim.SGD)


class Training:
    """One network in training: each call is a step, on one batch after the other, and returns the loss."""

    def __init__(
        self, network: Network, variant: Variant, layout: str, dtype: torch.dtype = torch.float32, nudge: bool = False
    ) -> None:
        memory = {"dtype": dtype, "memory_format": LAYOUTS[layout]}
        self.model = build(network, variant.kind).to(**memory).train()
        rate = 0.0 if variant.kind == "bare" else RATE  # it would not learn but diverge
        self.optimizer = variant.optimizer(self.model.parameters(), lr=rate, momentum=MOMENTUM)
        batches = [(x.to(**memory), labels) for x, labels in data(network, nudge)]
        self.batches = itertools.cycle(batches)

    def __call__(self) -> float:
        x, labels = next(self.batches)
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()


def data(network: Network, nudge: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return random images and labels, the images next to those in float32 where `nudge`."""
    random, directions = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    batches = []
    for _ in range(BATCHES):
        x = torch.randn(network.batch, 3, network.size, network.size, generator=random)
        labels = torch.randint(network.classes, (network.batch,), generator=random)
        if nudge:
            x = torch.nextafter(x, torch.randn(x.shape, generator=directions) * torch.inf)
        batches.append((x, labels))
    return batches


def curve(network: Network, *how: Any, **more: Any) -> list[float]:
    training = Training(network, *how, **more)
    return [training() for _ in range(network.steps)]


def distance(losses: Sequence[float], truth: Sequence[float]) -> float:
    """Return the largest relative difference of any step."""
    return max(abs(a - b) / b for a, b in zip(losses, truth, strict=True))


def excess(losses: Sequence[float], truth: Sequence[float], peers: Iterable[Sequence[float]]) -> float:
    """Return how many times as far as any of the `peers` the losses get from the truth, at the worst step.

    The peers count up to that step: runs that only rounding tells apart drift from the truth and back. Nearer than a
    unit in the last place of a float32 loss counts as that.
    """
    worst, reach = 0.0, 0.0
    if not all(map(math.isfinite, losses)):
        return math.inf
    for loss, exact, *others in zip(losses, truth, *peers, strict=True):
        reach = max(reach, 2**-23 * exact, *(abs(other - exact) for other in others))
        worst = max(worst, abs(loss - exact) / reach)
    return worst


def peaks(network: Network, threads: int) -> None:
    """Print the growth of the resident set, in bytes, for each variant and layout; each in a process of its own.

    To be called before any other use of PyTorch: a fork has none of its parent's threads.
    """
    set_threads(1)  # starts none
    for variant in VARIANTS:  # PyTorch imports much at the first step
        Training(QUICK, variant, "channels first")()
    for layout in LAYOUTS:
        for variant in VARIANTS:
            child = os.fork()
            if child == 0:
                set_threads(threads)
                training = Training(network, variant, layout)
                before = resident("VmRSS")
                for _ in range(2):  # from the second on the optimizer has its buffers
                    training()
                print(json.dumps([layout, variant.name, resident("VmHWM") - before]), flush=True)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                print(f"training: {variant.name}, {layout}: no memory measured", file=sys.stderr)


def resident(field: str) -> int:
    """Return VmRSS, bytes in memory now, or VmHWM, the most since the process began."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def measure_peaks(network: Network, threads: int) -> dict[tuple[str, str], int]:
    """Return {(layout, variant): bytes} where Linux counts them, else nothing."""
    if not sys.platform.startswith("linux"):
        return {}
    path = [*sys.path, str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:] = {path!r}; from bench import training as t; t.peaks(t.{network!r}, {threads})"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that what is freed goes back at once
    run = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {(layout, name): size for layout, name, size in map(json.loads, run.stdout.splitlines())}


def set_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    fastbn.set_num_threads(threads)


def curves(network: Network, progress: Progress) -> tuple[list[float], dict[tuple[str, str], list[float]]]:
    """Return the losses in float64, and {(layout, variant): losses}; "nudged" is PyTorch on images an ulp away."""
    batch, size = network.curve
    network = network._replace(batch=batch, size=size)
    with progress.step(f"{network.name}: losses, float64"):
        truth = curve(network, PYTORCH, "channels first", dtype=torch.float64)
    found = {}
    for layout in LAYOUTS:
        for variant in VARIANTS:
            with progress.step(f"{network.name}, {layout}: losses, {variant.name}"):
                found[layout, variant.name] = curve(network, variant, layout)
        with progress.step(f"{network.name}, {layout}: losses, nudged"):
            found[layout, "nudged"] = curve(network, PYTORCH, layout, nudge=True)
    return truth, found


def times(network: Network, layout: str, rounds: int) -> dict[str, Timing]:
    calls = {variant.name: Training(network, variant, layout) for variant in (*VARIANTS, BARE)}
    return interleaved(calls, rounds=rounds)


def main(
    threads: int, rounds: int, *, markdown: bool = False, quick: bool = False, json_path: str | None = None
) -> int:
    """Print a table for each network and layout; return 1 where a loss curve leaves its bound."""
    set_threads(threads)
    networks = (QUICK,) if quick else NETWORKS
    progress = Progress(len(networks) * (2 + len(LAYOUTS) * (len(VARIANTS) + 2)))
    versions = {"torch": torch.__version__, "fastbn": fastbn.__version__}
    print(_EXPLANATION.format(**versions, threads=threads, rounds=rounds, margin=MARGIN))
    results = []
    for network in networks:
        with progress.step(f"{network.name}: memory"):
            memory = measure_peaks(network, threads)
        truth, losses = curves(network, progress)
        for layout in LAYOUTS:
            with progress.step(f"{network.name}, {layout}: times"):
                seconds = times(network, layout, rounds)
            rows = results_of(layout, seconds, memory, truth, losses)
            images = f"{network.batch} images of {network.size}×{network.size}, {layout}"
            batch, size = network.curve
            learned = f"loss {truth[0]:.3f} → {truth[-1]:.3f} in {network.steps} steps of {batch} of {size}×{size}"
            print(f"\n{network.name}, {images}; {learned}\n")
            _show(rows, markdown)
            results.append({"network": network._asdict(), "layout": layout, "float64": truth, "variants": rows})
    kept = all(within(row) for result in results for row in result["variants"])
    print(f"\nloss curves: {'all within' if kept else 'NOT all within'} the bound")
    if json_path:
        Path(json_path).write_text(json.dumps({"threads": threads, "versions": versions, "results": results}, indent=1))
    return int(not kept)


def results_of(
    layout: str, seconds: Mapping[str, Timing], memory: Mapping[tuple[str, str], int], truth: Sequence[float],
    losses: Mapping[tuple[str, str], Sequence[float]],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return what is shown of each variant in one layout."""
    base, bare = seconds[PYTORCH.name], seconds[BARE.name]
    fastbns = {variant.name for variant in OTHERS}
    peers = [run for (_, name), run in losses.items() if name not in fastbns]
    rows: list[dict[str, Any]] = [{"variant": BARE.name, "seconds": bare._asdict(), "speed": _speed(base, bare)}]
    for name in (variant.name for variant in reversed(VARIANTS)):
        own, run = seconds[name], losses[layout, name]
        row = {"variant": name, "seconds": own._asdict(), "speed": _speed(base, own)}
        row |= {"share": 1 - bare.minimum / own.minimum, "peak bytes": memory.get((layout, name)), "losses": run}
        row |= {"to float64": distance(run, truth), "to PyTorch": distance(run, losses[layout, PYTORCH.name])}
        if name in fastbns:
            row["excess"] = excess(run, truth, peers)
        rows.insert(0, row)
    return rows


def _speed(base: Timing, own: Timing) -> list[float]:
    return [base.minimum / own.minimum, base.median / own.median]


def within(row: Mapping[str, Any]) -> bool:
    return row.get("excess", 0.0) <= MARGIN


def _show(rows: Sequence[Mapping[str, Any]], markdown: bool) -> None:
    headers = ["variant", "min ms", "×", "median", "×", "BN share", "peak MB"]
    headers += ["loss: to float64", "to PyTorch", "bound", "result"]
    lines = Table(headers, 28, markdown=markdown, last=True)
    for row in rows:
        time, speed, peak = row["seconds"], row["speed"], row.get("peak bytes")
        verdict = NOTHING if "excess" not in row else "within" if within(row) else "EXCEEDED"
        lines.row([
            row["variant"], number(time["minimum"] * 1e3, ".4g"), number(speed[0]),
            number(time["median"] * 1e3, ".4g"), number(speed[1]), number(row.get("share"), ".0%"),
            number(peak and peak / 1e6, ".0f"), number(row.get("to float64"), ".1e"),
            number(row.get("to PyTorch"), ".1e"), number(row.get("excess")), verdict,
        ])  # fmt: skip
