"""Run a model and its folded form on the same inputs: how far apart are they, and how fast is each?

onnx     ONNX Runtime: outputs without its graph optimisation (as the file says), speed with it (as it is used)
torch    the exported program, eagerly             keras    predict_on_batch, in the backend that Keras has
arrays   nothing to run: each folded layer on random patches, against layer and BatchNorm by their formulas
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..untrusted import printable

__all__ = ["Difference", "Verification", "verify"]

SEEDS = 3
# eps of each dtype, and how many of them two models may differ by, relative to the largest |output|: roundings of a
# hundred layers, where those of a wrong weight are of the order of 1.
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FACTOR = {"float64": 1000, "float32": 1000, "float16": 32, "bfloat16": 16}
MOVES = 16  # times what a change of the inputs by one eps moves an output: it cannot be known better than that
BATCHES, SIZES = (2, 1), (64, 224, 32, 128, 256, 299, 512, 16, 8, 4, 2, 1, 1024, 4096, 16000)  # to try where unknown
SECONDS, ROUNDS = 3.0, range(3, 30)  # of timing: rounds until the time is up

Shape = tuple[int, ...]


class Difference(NamedTuple):
    """One output over all inputs: largest |value|, largest |difference|, and that relative to it, with its limit."""

    output: str
    dtype: str
    largest: float
    absolute: float
    relative: float
    limit: float
    remark: str = ""

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit

    def __str__(self) -> str:
        verdict = "" if self.passed else ": too much"
        if self.remark:
            verdict += f" ({self.remark})"
        return (
            f"{printable(self.output)} {self.dtype}: largest |difference| {self.absolute:.3g}, "
            f"{self.relative:.3g} of the largest |value| (limit {self.limit:.3g}){verdict}"
        )


@dataclass(frozen=True)
class Verification:
    """What two models gave for the same inputs, and how long they took."""

    how: str
    differences: tuple[Difference, ...]
    runtime: str = ""
    times: tuple[float, float] | None = None  # median seconds of a run: before, after
    rounds: int = 0
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and all(difference.passed for difference in self.differences)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        differences = [d._asdict() | {"passed": d.passed} for d in self.differences]
        for entry in differences:
            entry.update({k: None for k, v in entry.items() if isinstance(v, float) and not np.isfinite(v)})
        times = None if self.times is None else {"before": self.times[0], "after": self.times[1]}
        return {
            "passed": self.passed, "how": self.how, "failure": self.failure, "differences": differences,
            "runtime": self.runtime, "median_seconds": times, "rounds": self.rounds,
        }  # fmt: skip

    def __str__(self) -> str:
        lines = [f"verification {'passed' if self.passed else 'FAILED'}: {printable(self.how)}"]
        lines += [f"  {printable(self.failure)}"] if self.failure else [f"  {each}" for each in self.differences]
        if self.times is not None:
            before, after = (1e3 * seconds for seconds in self.times)
            lines.append(
                f"speed: {before:.3g} ms before, {after:.3g} ms after, {before / after:.2f} times as fast "
                f"({self.runtime}; medians of {self.rounds} interleaved runs)"
            )
        return "\n".join(lines)


class Input(NamedTuple):
    """What a model reads; a size of `shape` is a number, or a name (or None) where it may vary."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


class Output(NamedTuple):
    name: str
    dtype: str
    value: np.ndarray


Feed = dict[str, np.ndarray]


class Model(NamedTuple):
    """A model to run: `run` of arrays by name, and what sizes to prefer."""

    inputs: list[Input]
    run: Callable[[Feed], Any]
    sizes: Mapping[str, int] = {}


RUNTIMES = {"onnx": "ONNX Runtime, its graph optimisation on", "torch": "PyTorch", "keras": "Keras"}

# The runtimes ---------------------------------------------------------------------------------------------------

_ORT = {"float": "float32", "double": "float64"}  # other names are NumPy's


def _onnx(path: Path, threads: int | None, optimised: bool = False) -> Model:
    try:
        import onnxruntime as ort
    except ModuleNotFoundError as error:
        message = '--verify needs onnxruntime: pip install "fastbn[onnx]"'
        raise ModuleNotFoundError(message, name="onnxruntime") from error
    options, levels = ort.SessionOptions(), ort.GraphOptimizationLevel
    options.log_severity_level = 4  # errors are raised as well
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = []
    for value in session.get_inputs():
        dtype = value.type.removeprefix("tensor(").removesuffix(")")
        inputs.append(Input(value.name, _ORT.get(dtype, dtype), tuple(value.shape)))
    names = [value.name for value in session.get_outputs()]
    return Model(inputs, lambda feed: dict(zip(names, session.run(names, feed), strict=True)))


def _torch(path: Path, threads: int | None) -> Model:
    import torch
    from torch.utils import _pytree as pytree

    from .torch import load

    if threads is not None:
        torch.set_num_threads(threads)
    program = load(path)
    module, values = program.module(), {node.name: node.meta.get("val") for node in program.graph.nodes}
    inputs: list[Input] = []
    sizes: dict[str, int] = {}
    leaves: list[tuple[str | None, Any]] = []  # the name and dtype of an input, or a constant
    for spec in program.graph_signature.input_specs:
        if spec.kind != torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        value = values.get(getattr(spec.arg, "name", None))
        if isinstance(value, torch.Tensor):
            free: list[Any] = [n for n in value.shape if not isinstance(n, int)]
            sizes |= {str(n): int(n.node.hint) for n in free if n.node.has_hint()}
            shape = tuple(n if isinstance(n, int) else str(n) for n in value.shape)
            inputs.append(Input(spec.arg.name, str(value.dtype).removeprefix("torch."), shape))
            leaves.append((spec.arg.name, value.dtype))
        else:
            leaves.append((None, getattr(spec.arg, "value", None)))
    structure = program.call_spec.in_spec

    def run(feed: Feed) -> Any:
        tensors = [c if name is None else torch.from_numpy(feed[name]).to(c) for name, c in leaves]
        args, kwargs = pytree.tree_unflatten(tensors, structure)
        with torch.inference_mode():
            return module(*args, **kwargs)

    return Model(inputs, run, sizes)


def _keras(path: Path, threads: int | None) -> Model:
    import keras

    from .keras import load

    if threads is not None:
        if keras.backend.backend() != "torch":
            raise ValueError(f"--threads: expected Keras on PyTorch, got Keras on {keras.backend.backend()}")
        import torch

        torch.set_num_threads(threads)
    model = load(path)
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    tensors = keras.tree.flatten(structure)
    inputs = [Input(t.name, keras.backend.standardize_dtype(t.dtype), tuple(t.shape)) for t in tensors]

    def run(feed: Feed) -> Any:
        return model.predict_on_batch(keras.tree.pack_sequence_as(structure, [feed[t.name] for t in tensors]))

    return Model(inputs, run)


def _outputs(value: Any, name: str = "") -> Iterator[Output]:
    """Give every array in what a runtime returned."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _outputs(part, f"{name}[{key!r}]" if name else str(key))
    elif isinstance(value, list | tuple):
        for i, part in enumerate(value):
            yield from _outputs(part, f"{name or 'output'}[{i}]")
    elif hasattr(value, "detach"):
        dtype = str(value.dtype).removeprefix("torch.")
        value = value.detach().double() if dtype == "bfloat16" else value.detach()
        yield Output(name or "output", dtype, value.numpy())
    elif value is not None:
        array = np.asarray(value)
        dtype = array.dtype.name
        yield Output(name or "output", dtype, array.astype(np.float64) if dtype == "bfloat16" else array)


# Inputs ---------------------------------------------------------------------------------------------------------


def _random(spec: Input, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    if spec.dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if "int" in spec.dtype:
        return rng.integers(0, 2, shape).astype(spec.dtype)  # an index, if it is one, that exists
    if spec.dtype not in EPS:
        raise ValueError(f"input {spec.name!r}: expected numbers to make up, got {spec.dtype}: give --input")
    return rng.standard_normal(shape).astype("float32" if spec.dtype == "bfloat16" else spec.dtype)


def _shapes(model: Model, given: Mapping[str, Shape]) -> Iterator[dict[str, Shape]]:
    """Give shapes to try: sizes that the model fixes, that it prefers, or likely ones."""
    free, batches = False, {spec.shape[0] for spec in model.inputs if spec.shape}
    for size, batch in itertools.product(SIZES, BATCHES):
        for sizes in (model.sizes, {}) if model.sizes else ({},):
            shapes = {}
            for spec in model.inputs:
                shape = given.get(spec.name)
                if shape is None:
                    free |= any(not isinstance(n, int) or n < 0 for n in spec.shape)
                    shape = tuple(
                        n
                        if isinstance(n, int) and n >= 0
                        else sizes.get(str(n), batch if axis == 0 or (n and n in batches) else size)
                        for axis, n in enumerate(spec.shape)
                    )
                shapes[spec.name] = shape
            yield shapes
        if not free:
            return


def _feeds(model: Model, given: Mapping[str, Shape]) -> tuple[list[Feed], str]:
    """Return random inputs that the model runs on, and what they are."""
    if unknown := given.keys() - {spec.name for spec in model.inputs}:
        names = ", ".join(spec.name for spec in model.inputs) or "none"
        raise ValueError(f"--shape: expected the name of an input ({names}), got {unknown.pop()!r}")
    first: Exception | None = None
    for shapes in _shapes(model, given):
        feeds = [
            {spec.name: _random(spec, shapes[spec.name], np.random.default_rng([seed, i]))
             for i, spec in enumerate(model.inputs)}
            for seed in range(SEEDS)
        ]  # fmt: skip
        try:
            model.run(feeds[0])
        except Exception as error:  # whatever a runtime says of a size
            first = first or error
            continue
        shown = ", ".join(f"{s.name} {s.dtype} {list(shapes[s.name])}" for s in model.inputs)
        return feeds, f"{SEEDS} random inputs ({shown})"
    raise ValueError(f"expected inputs that the model runs on (give --shape or --input), got {first}") from first


def _real(model: Model, paths: Sequence[Path]) -> list[Feed]:
    """Return the inputs that files hold: one .npz by name, or one .npy for the only input."""
    feeds = []
    specs = {spec.name: spec for spec in model.inputs}
    for path in paths:
        try:
            with open(path, "rb") as file:
                loaded = np.load(file, allow_pickle=False)
                found = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else {"": loaded}
        except Exception as error:  # NumPy's, zipfile's, zlib's
            raise ValueError(f"{path}: expected an .npz or .npy file, got one that cannot be read: {error}") from error
        if len(specs) == 1 and "" in found:
            found = dict(zip(specs, found.values(), strict=True))
        if found.keys() != specs.keys():
            got = ", ".join(name for name in found if name) or "one array without a name"
            raise ValueError(f"{path}: expected arrays for the inputs {', '.join(specs)}, got {got}")
        for name, array in found.items():
            dtype = "float32" if specs[name].dtype == "bfloat16" else specs[name].dtype
            if not np.can_cast(array.dtype, dtype, "same_kind"):
                raise ValueError(f"{path}: expected {dtype} for the input {name!r}, got {array.dtype}")
            found[name] = array.astype(dtype)
        feeds.append(found)
    return feeds


# Comparing ------------------------------------------------------------------------------------------------------


def _apart(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Return the largest |a - b|, and in how many places one is not finite and the other another value."""
    finite = np.isfinite(a) & np.isfinite(b)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return float(np.abs(a[finite] - b[finite]).max(initial=0)), int((~same & ~finite).sum())


def _difference(
    before: Sequence[Output], after: Sequence[Output], tolerance: float | None, moved: Sequence[Output] = ()
) -> Difference:
    """Compare one output over all inputs; `moved` is `before` where the inputs' last bits are other ones."""
    name, dtype, _ = before[0]
    limit = tolerance if tolerance is not None else FACTOR[dtype] * EPS[dtype] if dtype in EPS else 0.0
    largest, absolute, places, noise = 0.0, 0.0, 0, 0.0
    for old, new, noisy in itertools.zip_longest(before, after, moved):
        if old.value.shape != new.value.shape or old.dtype != new.dtype:
            got = f"{new.dtype} {list(new.value.shape)} instead of {old.dtype} {list(old.value.shape)}"
            return Difference(name, dtype, np.nan, np.nan, np.inf, limit, f"it is {got}")
        if old.value.dtype.kind not in "fiubc":
            if (old.value != new.value).any():
                return Difference(name, dtype, np.nan, np.nan, np.inf, limit, "other values")
            continue
        kind = np.complex128 if old.value.dtype.kind == "c" else np.float64
        value = old.value.astype(kind)
        distance, elsewhere = _apart(value, new.value.astype(kind))
        absolute, places = max(absolute, distance), places + elsewhere
        largest = max(largest, float(np.abs(value[np.isfinite(value)]).max(initial=0)))
        if noisy is not None and noisy.value.shape == value.shape:
            noise = max(noise, _apart(value, noisy.value.astype(kind))[0])
    if places:
        return Difference(name, dtype, largest, np.inf, np.inf, limit, f"NaN or infinite in {places} other places")
    relative = absolute / largest if largest else np.inf if absolute else 0.0
    remark = ""
    if len(before) > 1 and all(np.array_equal(before[0].value, o.value) for o in before[1:]):
        remark = "the same for all inputs"
    elif tolerance is None and limit and largest and MOVES * noise > limit * largest:
        limit, remark = MOVES * noise / largest, f"one eps in the inputs makes {noise / largest:.3g}"
    return Difference(name, dtype, largest, absolute, relative, limit, remark)


def _compare(
    before: list[list[Output]], after: list[list[Output]], tolerance: float | None, moved: list[list[Output]]
) -> tuple[Difference, ...]:
    names = [[output.name for output in run] for run in before + after + moved]
    if any(each != names[0] for each in names):
        raise ValueError(f"expected the outputs {', '.join(names[0])}, got {', '.join(names[-1])}")
    columns = (zip(*runs, strict=True) if runs else [()] * len(names[0]) for runs in (before, after, moved))
    return tuple(_difference(old, new, tolerance, noisy) for old, new, noisy in zip(*columns, strict=True))


def _moved(model: Model, feed: Feed, seed: int) -> Feed:
    """Change every number of an input by at most its eps."""
    rng, eps = np.random.default_rng(seed), {spec.name: EPS.get(spec.dtype) for spec in model.inputs}
    return {
        name: array
        if (e := eps[name]) is None
        else (array * (1 + e * rng.uniform(-1, 1, array.shape))).astype(array.dtype)
        for name, array in feed.items()
    }


def _times(before: Callable[[], Any], after: Callable[[], Any]) -> tuple[tuple[float, float], int]:
    """Time both, alternately, after one run of each."""
    before(), after()
    taken: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while len(taken[0]) < ROUNDS.start or (time.perf_counter() < end and len(taken[0]) < ROUNDS.stop):
        for run, times in (before, taken[0]), (after, taken[1]):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return (statistics.median(taken[0]), statistics.median(taken[1])), len(taken[0])


def verify(
    kind: str,
    model: str | os.PathLike[str],
    folded: str | os.PathLike[str],
    *,
    shapes: Mapping[str, Shape] | None = None,
    inputs: Sequence[str | os.PathLike[str]] = (),
    tolerance: float | None = None,
    threads: int | None = None,
    **options: Any,
) -> Verification:
    """Run two model files on the same inputs and compare.

    Parameters
    ----------
    kind : {"onnx", "torch", "keras", "arrays"}
    model, folded : path
        The files; of arrays, the second must be what `arrays.fold` made of the first, with `options`.
    shapes : mapping of str to tuple of int
        Of inputs. Where sizes may vary and none is given, likely ones are tried until the model runs.
    inputs : sequence of paths
        .npz files (arrays by the inputs' names) or .npy files, beside the random inputs.
    tolerance : float, or None
        The largest difference allowed, relative to the largest |output|. None is 1000 eps of an output's dtype (32
        for float16, 16 for bfloat16), or 16 times what a change of the inputs by one eps makes, if that is more;
        integers must be equal.
    threads : int, or None
        Threads of the runtime; None leaves it to the runtime.

    Returns
    -------
    Verification
        NaN and infinity in the same places are equal.

    Raises
    ------
    ValueError
        The first model cannot be run; an input does not fit.
    ModuleNotFoundError
        The runtime is not installed.
    """
    model, folded, paths = Path(model), Path(folded), [Path(path) for path in inputs]
    if kind == "arrays":
        return _verify_arrays(model, folded, tolerance, options)
    load: Callable[[Path, int | None], Model] = {"onnx": _onnx, "torch": _torch, "keras": _keras}[kind]
    try:
        old = load(model, threads)
    except (ValueError, OSError, ModuleNotFoundError):
        raise
    except Exception as error:  # each runtime has its own
        raise ValueError(f"expected a model that runs, got {error}") from error
    real = _real(old, paths)
    like_real = {name: array.shape for name, array in real[0].items()} if real else {}
    try:
        feeds, how = _feeds(old, {**like_real, **(shapes or {})})
        how = " and ".join([how, *map(str, paths)])
    except ValueError as error:
        if not real:
            raise
        feeds, how = [], f"{' and '.join(map(str, paths))} (no random inputs: {error})"
    results, moved = [], []
    for seed, (name, feed) in enumerate([*(("random inputs", feed) for feed in feeds), *zip(paths, real, strict=True)]):
        try:
            results.append(list(_outputs(old.run(feed))))
            moved.append(list(_outputs(old.run(_moved(old, feed, seed)))))
        except Exception as error:
            raise ValueError(f"{name}: expected inputs that the model runs on, got {error}") from error
    feeds += real
    try:
        new = load(folded, threads)
        differences = _compare(results, [list(_outputs(new.run(feed))) for feed in feeds], tolerance, moved)
        if kind == "onnx":
            del old, new  # their memory, before more is taken
            old, new = (_onnx(path, threads, optimised=True) for path in (model, folded))
        times, rounds = _times(lambda: old.run(feeds[-1]), lambda: new.run(feeds[-1]))
    except Exception as error:
        return Verification(how, (), failure=f"the folded model does not do what the model does: {error}")
    return Verification(how, differences, RUNTIMES[kind], times, rounds)


def _verify_arrays(model: Path, folded: Path, tolerance: float | None, options: Mapping[str, Any]) -> Verification:
    from . import arrays

    how = (
        "the arithmetic alone, by each folded layer on random patches against layer and BatchNorm; "
        "whether the pairs are right, it cannot tell"
    )
    state, new_state = arrays.load(model), arrays.load(folded)
    before, after = [], []
    for seed in range(SEEDS):
        runs = list(arrays.patches(state, new_state, seed=seed, **options))
        before.append([Output(name, dtype, old) for name, dtype, old, _ in runs])
        after.append([Output(name, dtype, new) for name, dtype, _, new in runs])
    return Verification(how, _compare(before, after, tolerance, []))
