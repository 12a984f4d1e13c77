"""`python -m bench mpi`: what the exchanges of fastbn.interop.mpi cost on 2 to 4 ranks, and a model for more of them.

The model: an all-reduce of B bytes over p ranks is rounds(p) meetings, one after the other, of α + B/β seconds each. α
and β are fitted to 2 ranks here; 3 and 4 ranks are the test of it, and 8 to 512 what it says with a network between.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .report import Table

RANKS = (2, 3, 4)
MORE_RANKS = (8, 16, 32, 64, 128, 256, 512)
PAYLOADS = (0, 129, 513, 1025, 4097, 65_536, 1_048_576)  # float64 values; 2C + 1 for C channels
LAYERS = ((32, 64, 28, 28), (32, 256, 14, 14), (32, 512, 7, 7), (128, 256))
HEADER = 96  # bytes of a message beside its data
TIME_LIMIT = 600  # seconds until ranks count as hanging

# ResNet-50 (He et al. 2016): (blocks, width, side of its outputs); a block normalises w, w and 4w channels
STAGES = ((3, 64, 56), (4, 128, 28), (6, 256, 14), (3, 512, 7))
WEIGHTS = 25_503_912  # parameters besides those of BatchNorm
FLOP = 3 * 8.2e9  # of a training step, per image of 224 x 224


class Network(NamedTuple):
    """An assumption: nothing of it was measured here."""

    name: str
    latency: float  # seconds
    bandwidth: float  # bytes per second
    flops: float = 1e12  # of one rank, sustained


NETWORKS = (
    Network("InfiniBand, 1.5 µs, 12.5 GB/s", 1.5e-6, 12.5e9),
    Network("Ethernet, 25 µs, 1.2 GB/s", 25e-6, 1.2e9),
)


# ---- the model ----------------------------------------------------------------------------------------------------


def rounds_of(ranks: int) -> int:
    """Return the meetings of an all-reduce, one after the other; two more where the ranks are no power of two."""
    power = ranks.bit_length() - 1
    return power + (2 if ranks > 1 << power else 0)


def exchange_time(ranks: int, nbytes: float, alpha: float, per_byte: float) -> float:
    """Return the seconds of an all-reduce: recursive doubling, whole messages in every round."""
    return rounds_of(ranks) * (alpha + nbytes * per_byte)


def halving_time(ranks: int, nbytes: float, alpha: float, per_byte: float) -> float:
    """Return the seconds of a reduce-scatter by halves and an all-gather (Rabenseifner 2004)."""
    return 2 * rounds_of(ranks) * alpha + 2 * nbytes * (ranks - 1) / ranks * per_byte


def gather_time(ranks: int, nbytes: float, alpha: float, per_byte: float) -> float:
    """Return the seconds of an all-gather of everybody's bytes (Bruck 1997), each of which is then merged."""
    return math.ceil(math.log2(ranks)) * alpha + (ranks - 1) * nbytes * per_byte


def resnet50() -> list[int]:
    """Return the channels of its BatchNorms."""
    blocks = [[w, w, 4 * w] + [4 * w] * (b == 0) for n, w, _ in STAGES for b in range(n)]
    return [64, *(c for block in blocks for c in block)]


def layer_bytes(channels: int) -> tuple[int, int]:
    """Return the bytes of a message of the forward pass (count, mean, m2), and of the backward pass (two sums)."""
    return HEADER + 8 * (2 * channels + 1), HEADER + 8 * 2 * channels


def fit(times: dict[int, float]) -> tuple[float, float]:
    """Return (α, 1/β) from the seconds of 2 ranks by payload: the shortest message, and the longest."""
    alpha, longest = times[min(times)], max(times)
    return alpha, (times[longest] - alpha) / (8 * longest)


# ---- on the ranks -------------------------------------------------------------------------------------------------


def _least(function: Callable[[], Any], repeats: int, calls: int = 1) -> tuple[float, float]:
    """Return (least, median) seconds of a call, over so many repeats of some calls in a row."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        seconds.append((time.perf_counter() - start) / calls)
    return min(seconds), statistics.median(seconds)


def measure(rounds: int, quick: bool) -> dict[str, Any]:
    """Return what all ranks together measured, as rank 0 saw it."""
    from mpi4py import MPI

    from fastbn import BatchNorm
    from fastbn.interop import mpi_norm
    from fastbn.interop.mpi_exchange import group_of

    comm = MPI.COMM_WORLD
    group, alone = group_of(comm), group_of(MPI.COMM_SELF)
    result: dict[str, Any] = {"library": MPI.Get_library_version().split(",")[0], "exchange": {}, "layers": {}}
    for n in PAYLOADS[: 3 if quick else None]:
        part, gathered, summed = np.zeros(n), np.zeros((comm.size, n)), np.zeros(n)
        calls = 5 if n < 10_000 else 1  # all of them within one time slice, where ranks share cores
        ways = {
            "fastbn": lambda part=part: group.reduce("bench", part),
            "Allgather": lambda part=part, gathered=gathered: comm.Allgather(part, gathered),
            "Allreduce": lambda part=part, summed=summed: comm.Allreduce(part, summed),
        }
        repeats = rounds if quick else (20 if n < 10_000 else 2) * rounds
        result["exchange"][n] = {name: _least(call, repeats, calls) for name, call in ways.items()}
    for shape in LAYERS[3 if quick else 0 :]:
        rng = np.random.default_rng(comm.rank)
        x, dy = rng.normal(size=(2, *shape)).astype(np.float32)
        bn = BatchNorm(shape[1], activation="relu")

        def step(over: Any, bn: Any = bn, x: Any = x, dy: Any = dy) -> None:
            _, saved = mpi_norm.forward(bn, over, 0, x)
            mpi_norm.backward(bn, over, 0, saved, dy)

        def plain(bn: Any = bn, x: Any = x, dy: Any = dy) -> None:
            bn(x)
            bn.backward(dy)

        repeats = rounds if quick else 8 * rounds
        result["layers"]["x".join(map(str, shape))] = {
            "channels": shape[1],
            "plain": _least(plain, repeats),
            "local": _least(lambda step=step: step(alone), repeats),
            "sync": _least(lambda step=step: step(group), repeats),
        }
    return result


# ---- the command --------------------------------------------------------------------------------------------------


def main(
    threads: int, rounds: int, *, markdown: bool = False, quick: bool = False, json_path: str | None = None
) -> int:
    """Print three tables: exchanges, layers, and the model; `quick`: few sizes on 2 ranks, a smoke test."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        print(f'mpi: needs mpi4py and an MPI library: pip install "fastbn[mpi]" ({error})', file=sys.stderr)
        return 1
    beside = Path(sys.executable).parent / "mpiexec"
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    if launcher is None:
        print("mpi: there is no mpiexec beside Python or on the path", file=sys.stderr)
        return 1
    options = ["--oversubscribe"] if "Open MPI" in MPI.Get_library_version() else []
    measured = {
        ranks: _launch([launcher, *options, "-n", str(ranks)], threads, rounds, quick)
        for ranks in (RANKS[:1] if quick else RANKS)
    }
    alpha, per_byte = fit({int(n): times["fastbn"][0] for n, times in measured[2]["exchange"].items()})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    print(
        f"{measured[2]['library']}, {cores} cores; fitted to 2 ranks: α = {alpha * 1e6:.1f} µs per meeting, "
        f"β = {1e-9 / per_byte:.2f} GB/s\n"
    )
    _print_exchanges(measured, alpha, per_byte, cores, markdown)
    _print_layers(measured, alpha, per_byte, cores, markdown)
    _print_model(alpha, per_byte, markdown)
    if json_path:
        Path(json_path).write_text(json.dumps({"alpha": alpha, "per_byte": per_byte, "measured": measured}, indent=1))
    return 0


def _launch(command: list[str], threads: int, rounds: int, quick: bool) -> dict[str, Any]:
    """Return what `measure` returned on these ranks."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads), "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    program = f"import sys; sys.path[:] = {sys.path!r}; from bench import mpi_cases as m; "
    program += f"m.report_from_rank_0({rounds}, {quick})"
    process = subprocess.run(
        [*command, sys.executable, "-m", "mpi4py", "-c", program], env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=TIME_LIMIT, check=False,
    )  # fmt: skip
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{process.stdout}\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def report_from_rank_0(rounds: int, quick: bool) -> None:
    """Print what was measured as one line of JSON."""
    from mpi4py import MPI

    result = measure(rounds, quick)
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(result), flush=True)


def _print_exchanges(measured: dict[int, Any], alpha: float, per_byte: float, cores: int, markdown: bool) -> None:
    print("One exchange, µs: least (median); predicted: the model times ranks/cores where there are more ranks\n")
    table = Table(["ranks, bytes", "fastbn", "predicted", "ratio", "MPI_Allgather", "MPI_Allreduce"], 20,
                  markdown=markdown)  # fmt: skip
    table.widths[1], table.widths[4:] = 22, [22, 22]
    for ranks, result in measured.items():
        for n, times in result["exchange"].items():
            predicted = exchange_time(ranks, 8 * int(n), alpha, per_byte) * max(1, ranks / cores)
            ratio = times["fastbn"][0] / predicted
            table.row([
                f"{ranks}, {8 * int(n)}", _microseconds(times["fastbn"]), f"{predicted * 1e6:.0f}", f"{ratio:.2f}",
                _microseconds(times["Allgather"]), _microseconds(times["Allreduce"]),
            ])  # fmt: skip
    print()


def _print_layers(measured: dict[int, Any], alpha: float, per_byte: float, cores: int, markdown: bool) -> None:
    print(
        "BatchNorm with ReLU, float32, forward and backward, µs: fastbn.BatchNorm on each rank; the same by the steps\n"
        "of SyncBatchNorm without messages; SyncBatchNorm; predicted: the second and two exchanges, times ranks/cores\n"
    )
    table = Table(["ranks, shape of a rank", "BatchNorm", "local", "SyncBatchNorm", "predicted", "ratio"], 28,
                  markdown=markdown)  # fmt: skip
    table.widths[1:4] = 20, 20, 20
    for ranks, result in measured.items():
        for shape, times in result["layers"].items():
            messages = sum(exchange_time(ranks, b, alpha, per_byte) for b in layer_bytes(times["channels"]))
            predicted = (times["local"][0] + messages) * max(1, ranks / cores)
            table.row([
                f"{ranks}, {shape}", *(_microseconds(times[name]) for name in ("plain", "local", "sync")),
                f"{predicted * 1e6:.0f}", f"{times['sync'][0] / predicted:.2f}",
            ])  # fmt: skip
    print()


def _print_model(alpha: float, per_byte: float, markdown: bool) -> None:
    channels = resnet50()
    sizes = [b for c in channels for b in layer_bytes(c)]
    gradients = 4 * WEIGHTS
    print(
        f"ResNet-50: {len(channels)} BatchNorms of {sum(channels)} channels, {len(sizes)} exchanges of {min(sizes)} to "
        f"{max(sizes)} bytes, {sum(sizes) / 1e6:.2f} MB\nin all; {gradients / 1e6:.0f} MB of gradients. ms per step: "
        "BatchNorm; by an all-gather instead; gradients by the same tree,\nand by halves; the share of BatchNorm in a "
        f"step of 1, 8 and 32 images per rank at {NETWORKS[0].flops / 1e12:.0f} TFLOP/s (an assumption)\n"
    )
    headers = ["network, ranks", "meetings", "BatchNorm", "all-gather", "gradients", "by halves", "1 image", "8", "32"]
    table = Table(headers, 36, markdown=markdown)
    for network in NETWORKS:
        for ranks in MORE_RANKS:
            costs = alpha + network.latency, per_byte + 1 / network.bandwidth
            sync = sum(exchange_time(ranks, b, *costs) for b in sizes)
            gather = sum(gather_time(ranks, b, *costs) for b in sizes)
            flat, halves = exchange_time(ranks, gradients, *costs), halving_time(ranks, gradients, *costs)
            shares = [sync / (images * FLOP / network.flops + sync + halves) for images in (1, 8, 32)]
            table.row([
                f"{network.name}, {ranks}", str(len(sizes) * rounds_of(ranks)), f"{sync * 1e3:.1f}",
                f"{gather * 1e3:.1f}", f"{flat * 1e3:.0f}", f"{halves * 1e3:.0f}", *(f"{s:.1%}" for s in shares),
            ])  # fmt: skip


def _microseconds(times: list[float]) -> str:
    least, median = times
    return f"{least * 1e6:.1f} ({median * 1e6:.1f})"
