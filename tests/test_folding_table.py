"""The table in docs/folding.md, "Who folds what", measured cell by cell with whatever is installed here.

A cell says what becomes of BatchNorm in a small model: "folded" (none is left, the function is the same), "left" (one
is left, the function is the same), "wrong" (another function), "refused" (an error when folding), "guarded" (folded,
and an error when run on this input), "–" (the format has no such layer). A row of another package holds for the version
it names.
"""

import importlib.metadata
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "folding.md"
sys.path.append(str(ROOT))  # bench is not installed; fastbn is taken from where it was found already
COLUMNS = [
    "linear → BN",
    "conv 1-3d → BN",
    "transposed conv → BN",
    "transposed, 1 < groups < C → BN",
    "BN → linear",
    "BN → conv, no padding",
    "BN → conv, padded",
    "linear on (N, L, F) → BN",
]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the other packages' own
TOLERANCE = 1e-5  # of the largest value; float32 networks of two layers, so some 100 units in the last place


def table():
    """Return {row: {column: cell}} of the table as it stands in the page."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if COLUMNS[0] in line)
    header = [cell.strip() for cell in lines[start].strip("|").split("|")]
    assert header[1:] == COLUMNS
    rows = {}
    for line in lines[start + 2 :]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != len(header):
            break
        rows[cells[0]] = dict(zip(COLUMNS, cells[1:], strict=True))
    return rows


def verdict(before, after, norms):
    """Say what became of a model by its outputs before and after, and the number of BatchNorms left."""
    scale = max(np.abs(y).max() for y in before)
    same = all(np.abs(a - b).max() <= TOLERANCE * scale for a, b in zip(before, after, strict=True))
    return ("left" if norms else "folded") if same else "wrong"


def of_that_version(row, package):
    """Skip a row that names another version of the package than the one installed."""
    installed = importlib.metadata.version(package)
    if (named := re.search(r"\d+\.\d+", row)) and not f"{installed}.".startswith(f"{named[0]}."):
        pytest.skip(f"the row is of {named[0]}, {package} {installed} is installed")


def joined(verdicts):
    """One word where all variants agree, else each variant with its own."""
    words = set(verdicts.values())
    return words.pop() if len(words) == 1 else ", ".join(f"{name} {word}" for name, word in verdicts.items())


# ---- ONNX --------------------------------------------------------------------------------------------------

ONNX = {
    "linear → BN": {
        "Gemm": ("n,5", "c = Gemm<transB=1>(x, w:6,5, w:6)  y = BN:6(c)"),
        "MatMul": ("n,5", "c = MatMul(x, w:5,6)  y = BN:6(c)"),
        "MatMul + Add": ("n,5", "c = MatMul(x, w:5,6)  a = Add(c, w:6)  y = BN:6(a)"),
    },
    "conv 1-3d → BN": {
        "1d": ("n,3,9", "c = Conv(x, w:4,3,3)  y = BN:4(c)"),
        "2d": ("n,3,9,9", "c = Conv(x, w:4,3,3,3, w:4)  y = BN:4(c)"),
        "3d": ("n,3,5,5,5", "c = Conv(x, w:4,3,3,3,3)  y = BN:4(c)"),
    },
    "transposed conv → BN": {"": ("n,4,5,5", "c = ConvTranspose(x, w:4,6,2,2)  y = BN:6(c)")},
    "transposed, 1 < groups < C → BN": {"": ("n,4,5,5", "c = ConvTranspose<group=2>(x, w:4,3,2,2)  y = BN:6(c)")},
    "BN → linear": {
        "Gemm": ("n,5", "b = BN:5(x)  y = Gemm<transB=1>(b, w:6,5, w:6)"),
        "MatMul": ("n,5", "b = BN:5(x)  y = MatMul(b, w:5,6)"),
        "MatMul + Add": ("n,5", "b = BN:5(x)  c = MatMul(b, w:5,6)  y = Add(c, w:6)"),
    },
    "BN → conv, no padding": {"": ("n,3,9,9", "b = BN:3(x)  y = Conv(b, w:4,3,3,3)")},
    "BN → conv, padded": {"": ("n,3,9,9", "b = BN:3(x)  y = Conv<pads=[1,1,1,1]>(b, w:4,3,3,3)")},
    "linear on (N, L, F) → BN": {"": ("n,6,5", "c = MatMul(x, w:5,6)  y = BN:6(c)")},
}


def onnx_tools():
    return {
        "fastbn, ONNX": ("onnx", "fastbn"),
        "ONNX Runtime 1.31": ("onnxruntime", "ONNX Runtime"),
        "onnxoptimizer 0.4": ("onnxoptimizer", "onnxoptimizer"),
        "onnxsim 0.8": ("onnxsim", "onnxsim"),
    }


def run_onnx(model, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", onnx_tools())
def test_onnx_cell(row, column):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    package, tool = onnx_tools()[row]
    pytest.importorskip(package)
    of_that_version(row, package)
    from bench import model_patterns as patterns

    outcome = {}
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other tools about themselves
        simplify = patterns.tools(scratch)[0][tool]
        for variant, (shape, text) in ONNX[column].items():
            model = patterns.build_text(shape, text)
            x = np.random.default_rng(1).normal(size=[2 if n == "n" else int(n) for n in shape.split(",")])
            x = x.astype(np.float32)
            after = simplify(model)
            outcome[variant] = verdict(run_onnx(model, x), run_onnx(after, x), patterns.norms(after))
    assert table()[row][column] == joined(outcome)


# ---- PyTorch -----------------------------------------------------------------------------------------------


TORCH_ROWS = ["fastbn, PyTorch", "fastbn, PyTorch, example_inputs=", "PyTorch 2.13, fx fuse"]


def torch_models():
    """{column: {variant: (modules, shape of x)}}."""
    from torch import nn

    return {
        "linear → BN": {
            "affine": ([nn.Linear(5, 6), nn.BatchNorm1d(6)], (2, 5)),
            "not affine": ([nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False)], (2, 5)),
        },
        "conv 1-3d → BN": {
            "1d": ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)], (2, 3, 9)),
            "2d": ([nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)], (2, 3, 9, 9)),
            "3d": ([nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)], (2, 3, 5, 5, 5)),
        },
        "transposed conv → BN": {"": ([nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6)], (2, 4, 5, 5))},
        "transposed, 1 < groups < C → BN": {
            "": ([nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6)], (2, 4, 5, 5))
        },
        "BN → linear": {"": ([nn.BatchNorm1d(5), nn.Linear(5, 6)], (2, 5))},
        "BN → conv, no padding": {"": ([nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)], (2, 3, 9, 9))},
        "BN → conv, padded": {"": ([nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)], (2, 3, 9, 9))},
        "linear on (N, L, F) → BN": {"": ([nn.Linear(5, 6), nn.BatchNorm1d(6)], (2, 6, 5))},
    }


def torch_fold(row, module, x):
    from torch.fx.experimental.optimization import fuse

    from fastbn.interop import torch as fastbn_torch

    if row == "PyTorch 2.13, fx fuse":
        return fuse(module)
    return fastbn_torch.fold(module, example_inputs=x if "example_inputs" in row else None)[0]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("row", TORCH_ROWS)
def test_torch_cell(row, column):
    torch = pytest.importorskip("torch")
    of_that_version(row, "torch")
    norm = torch.nn.modules.batchnorm._BatchNorm
    outcome = {}
    generator = torch.Generator().manual_seed(0)
    for variant, (modules, shape) in torch_models()[column].items():
        model = torch.nn.Sequential(*modules).eval()
        with torch.no_grad():
            for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers()) if t.is_floating_point()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        x = torch.rand(shape, generator=generator)
        with torch.inference_mode():
            before = model(x).numpy()
            try:
                folded = torch_fold(row, model, x)
            except (TypeError, ValueError, RuntimeError):
                outcome[variant] = "refused"
                continue
            norms = sum(isinstance(m, norm) for m in folded.modules())
            try:
                outcome[variant] = verdict([before], [folded(x).numpy()], norms)
            except ValueError:
                outcome[variant] = "guarded"
    assert table()[row][column] == joined(outcome)


# ---- Keras -------------------------------------------------------------------------------------------------


def keras_models():
    from keras import layers

    norm = layers.BatchNormalization
    return {
        "linear → BN": {"": ([layers.Dense(6), norm()], (5,))},
        "conv 1-3d → BN": {
            "1d": ([layers.Conv1D(4, 3), norm()], (9, 3)),
            "2d": ([layers.Conv2D(4, 3, use_bias=False), norm()], (9, 9, 3)),
            "3d": ([layers.Conv3D(4, 3), norm()], (5, 5, 5, 3)),
        },
        "transposed conv → BN": {"": ([layers.Conv2DTranspose(6, 2), norm()], (5, 5, 4))},
        "BN → linear": {"": ([norm(), layers.Dense(6)], (5,))},
        "BN → conv, no padding": {"": ([norm(), layers.Conv2D(4, 3)], (9, 9, 3))},
        "BN → conv, padded": {"": ([norm(), layers.Conv2D(4, 3, padding="same")], (9, 9, 3))},
        "linear on (N, L, F) → BN": {"": ([layers.Dense(6), norm()], (6, 5))},
    }


@pytest.mark.parametrize("column", COLUMNS)
def test_keras_cell(column):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    from fastbn.interop import keras as fastbn_keras

    rng = np.random.default_rng(0)
    outcome = {}
    for variant, (layers, shape) in keras_models().get(column, {}).items():
        model = keras.Sequential([keras.Input(shape), *layers])
        model.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in model.get_weights()])
        x = rng.normal(size=(2, *shape)).astype(np.float32)
        folded, _ = fastbn_keras.fold(model)
        norms = sum(isinstance(layer, keras.layers.BatchNormalization) for layer in folded.layers)
        outcome[variant] = verdict([model.predict_on_batch(x)], [folded.predict_on_batch(x)], norms)
    assert table()["fastbn, Keras"][column] == (joined(outcome) if outcome else "–")


def test_every_row_that_claims_to_be_measured_is():
    """The rows above the line in the page are those that the tests above measure."""
    text = PAGE.read_text(encoding="utf-8")
    assert set(table()) == {*onnx_tools(), *TORCH_ROWS, "fastbn, Keras"}
    assert re.search(r"not run\s+here", text)
