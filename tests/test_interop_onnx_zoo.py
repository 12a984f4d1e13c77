"""Whole networks, as ONNX ships them for its own tests: their topologies, with random weights."""

import zlib
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import helper, numpy_helper  # noqa: E402
from onnx_models import fold_checked, in_runtime, norms  # noqa: E402

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def network(name):
    """Return a network whose weights, which the file holds as ConstantOfShape only, are random but keep the scale."""
    if not (path := LIGHT / f"light_{name}.onnx").exists():
        pytest.skip(f"this onnx has no {path.name}")
    model = onnx.load(path)
    graph = model.graph
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    roles = {name: (node.op_type, index) for node in graph.node for index, name in enumerate(node.input)}
    for node in graph.node:  # a scale and a shift that are given axes first
        if node.op_type == "Unsqueeze":
            roles[node.input[0]] = roles[node.output[0]]
    made = [node for node in graph.node if node.op_type == "ConstantOfShape"]
    for node in made:
        rng, shape = np.random.default_rng(zlib.crc32(node.output[0].encode())), shapes[node.input[0]]
        match roles[node.output[0]]:
            case "Conv" | "Gemm", 1:
                array = rng.normal(size=shape) * np.sqrt(2 / (shape[1:].prod() or 1))
            case ("BatchNormalization", 1 | 4) | ("Mul", _):
                array = rng.uniform(0.5, 1.5, shape)
            case _:
                array = rng.normal(size=shape) * 0.1
        tensor = numpy_helper.from_array(array.astype(np.float32), node.output[0])
        graph.initializer.append(tensor)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.node.remove(node)
    return model


@pytest.mark.parametrize(("name", "batch_norms", "left", "nodes"), [
    ("densenet121", 121, 62, 367),
    ("inception_v2", 69, 0, 164),
    ("resnet50", 53, 0, 123),
    ("shufflenet", 49, 0, 154),
    ("squeezenet", 0, 0, 66),
])  # fmt: skip
def test_networks(name, batch_norms, left, nodes):
    model = network(name)
    folded, report = fold_checked(model, twice=False)
    assert len(report) == batch_norms
    assert len(norms(folded)) == len(report.left) == left
    assert report.nodes_after == len(folded.graph.node) == nodes
    if batch_norms:
        assert report.parameters_after < report.parameters_before
    (x,) = [value for value in model.graph.input if value.name not in {t.name for t in model.graph.initializer}]
    data = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    (before,), (after,) = (in_runtime(m, {x.name: data}) for m in (model, folded))
    assert np.isfinite(before).all()
    # Each of some hundred layers rounds its sums and hands on what came in, at about its own size.
    assert np.abs(after - before).max() <= 100 * nodes**0.5 * 2.0**-24 * np.abs(before).max()
    assert before.std() > 1e-3 * np.abs(before).max()
