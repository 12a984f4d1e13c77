"""Small ONNX models, one for each way a BatchNorm stands in a network; who removes it?"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, helper, numpy_helper

from fastbn.interop import onnx as fastbn_onnx
from fastbn.interop.onnx_graph import Constants

# Input and nodes; BN:4 is a BatchNormalization of 4 channels with its own statistics, w: a weight of that shape.
PATTERNS = {
    "Conv → BN": ("n,3,8,8", "c = Conv(x, w:4,3,3,3)  y = BN:4(c)"),
    "ConvTranspose → BN": ("n,4,8,8", "c = ConvTranspose(x, w:4,6,2,2)  y = BN:6(c)"),
    "ConvTranspose, 2 groups → BN": ("n,4,8,8", "c = ConvTranspose<group=2>(x, w:4,3,2,2)  y = BN:6(c)"),
    "ConvTranspose → Add → BN": ("n,4,8,8", "c = ConvTranspose(x, w:4,6,2,2)  a = Add(c, w:1,6,1,1)  y = BN:6(a)"),
    "Gemm → BN": ("n,5", "c = Gemm<transB=1>(x, w:6,5, w:6)  y = BN:6(c)"),
    "MatMul → BN": ("n,5", "c = MatMul(x, w:5,6)  y = BN:6(c)"),
    "MatMul → Add → BN": ("n,5", "c = MatMul(x, w:5,6)  a = Add(c, w:6)  y = BN:6(a)"),
    "BN → Gemm": ("n,5", "b = BN:5(x)  y = Gemm(b, w:5,6, w:6)"),
    "BN → Conv, no padding": ("n,3,8,8", "b = BN:3(x)  y = Conv(b, w:4,3,3,3, w:4)"),
    "BN → two Convs": ("n,3,8,8", "b = BN:3(x)  y = Conv(b, w:4,3,3,3)  z = Conv(b, w:2,3,1,1)"),
    "BN → BN": ("n,3,8,8", "r = Relu(x)  b = BN:3(r)  c = BN:3(b)  y = Relu(c)"),
    "BN → Mul → Add": ("n,3,8,8", "b = BN:3(x)  m = Mul(b, w:1,3,1,1)  a = Add(m, w:1,3,1,1)  y = Relu(a)"),
    "BN → Flatten → Gemm": ("n,3,4,4", "b = BN:3(x)  f = Flatten(b)  y = Gemm(f, w:48,6, w:6)"),
    "BN → pooling → Gemm": ("n,3,4,4", "b = BN:3(x)  p = GlobalAveragePool(b)  f = Flatten(p)  y = Gemm(f, w:3,6)"),
    "Conv → pooling → BN": ("n,3,8,8", "c = Conv(x, w:4,3,3,3)  p = AveragePool<kernel_shape=[2,2]>(c)  y = BN:4(p)"),
    "Conv → Flatten → BN": ("n,3,8,1", "c = Conv(x, w:4,3,8,1)  f = Flatten(c)  y = BN:4(f)"),
    "MatMul → Transpose → BN": ("n,7,5", "c = MatMul(x, w:5,6)  t = Transpose<perm=[0,2,1]>(c)  y = BN:6(t)"),
    "two Convs → Concat → BN": (
        "n,3,8,8", "c = Conv(x, w:4,3,1,1)  d = Conv(x, w:2,3,1,1)  k = Concat<axis=1>(c, d)  y = BN:6(k)",
    ),
    "Conv → Split → BN, BN": (
        "n,3,8,8", "c = Conv(x, w:6,3,1,1)  p, q = Split<axis=1>(c, i:2,4)  y = BN:2(p)  z = BN:4(q)",
    ),
}  # fmt: skip


def build(name: str) -> ModelProto:
    """Return the model of a pattern, with random weights."""
    return build_text(*PATTERNS[name])


def build_text(shape: str, text: str) -> ModelProto:
    """Return a model that reads x of `shape` and gives y, and z if there is one: `text` is as in PATTERNS."""
    rng = np.random.default_rng(0)
    arrays: list[np.ndarray] = []

    def constant(array: np.ndarray) -> str:
        arrays.append(array)
        return f"k{len(arrays) - 1}"

    def weight(token: str) -> str:
        if not token.startswith(("w:", "i:")):
            return token
        numbers = [int(n) for n in token[2:].split(",")]
        return constant(
            np.array(numbers) if token[0] == "i" else rng.uniform(0.5, 1.5, numbers).astype(np.float32)
        )

    nodes = []
    for node in text.split("  "):
        outputs, call = node.split(" = ")
        head, _, rest = call.partition("(")
        inputs = [weight(token) for token in rest.rstrip(")").split(", ")]
        if head.startswith("BN:"):
            channels = int(head[3:])
            inputs += [constant(rng.uniform(0.5, 1.5, channels).astype(np.float32)) for _ in range(4)]
            head = "BatchNormalization"
        op, _, attributes = head.partition("<")
        nodes.append(f"{outputs} = {op}{'<' + attributes if attributes else ''}({', '.join(inputs)})")
    ends = [end for end in ("y", "z") if f"{end} = " in text]
    declared = ", ".join(f"float {end}" for end in ends)
    graph = onnx.parser.parse_graph(f"g (float[{shape}] x) => ({declared}) {{ {' '.join(nodes)} }}")
    graph.initializer.extend(numpy_helper.from_array(array, f"k{i}") for i, array in enumerate(arrays))
    for end in graph.output:
        end.type.tensor_type.ClearField("shape")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model)
    return model


def topology(name: str) -> ModelProto:
    """Return a network that ships in the onnx package, with random weights where it has constants of one value."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(folder / f"light_{name}.onnx")
    graph, rng = model.graph, np.random.default_rng(0)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if len(tensor.dims) == 1}
    roles = {name: (node.op_type, index) for node in graph.node for index, name in enumerate(node.input)}
    for node in [node for node in graph.node if node.op_type == "ConstantOfShape"]:
        shape = tuple(int(n) for n in shapes[node.input[0]])
        role = roles[node.output[0]]
        if role[0] in ("Conv", "Gemm") and role[1] == 1:
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif role in (("BatchNormalization", 1), ("BatchNormalization", 4)) or role[0] == "Unsqueeze":
            values = rng.uniform(0.5, 1.5, shape)
        else:
            values = rng.standard_normal(shape) * 0.1
        graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), node.output[0]))
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    names = {tensor.name for tensor in graph.initializer} | shapes.keys()
    for value in [value for value in graph.input if value.name in names or value.name not in used]:
        graph.input.remove(value)
    model.ir_version = 8  # initializers need not be inputs
    onnx.checker.check_model(model)
    return model


def norms(model: ModelProto) -> int:
    """Return how many BatchNormalizations a model has."""
    return sum(node.op_type == "BatchNormalization" for node in model.graph.node)


def run_nodes(model: ModelProto) -> int:
    """Return how many of a model's nodes do not just compute weights from constants."""
    constants = Constants(model)
    return sum(not constants.is_constant_node(node) for node in model.graph.node)


def tools(scratch: str) -> tuple[dict[str, Callable[[ModelProto], ModelProto]], dict[str, str]]:
    """Return what simplifies ONNX models here, by name, and why the others do not take part."""
    found: dict[str, Callable[[ModelProto], ModelProto]] = {"fastbn": lambda model: fastbn_onnx.fold(model)[0]}
    absent = {}
    for name, make in ("ONNX Runtime", _onnxruntime), ("onnxoptimizer", _onnxoptimizer), ("onnxsim", _onnxsim):
        try:
            found[name] = make(scratch)
        except ModuleNotFoundError as error:
            absent[name] = str(error)
    return found, absent


def _onnxruntime(scratch: str) -> Callable[[ModelProto], ModelProto]:
    import onnxruntime

    def optimise(model: ModelProto) -> ModelProto:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = f"{scratch}/optimised.onnx"
        options.log_severity_level = 3
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(f"{scratch}/optimised.onnx")

    return optimise


def _onnxoptimizer(scratch: str) -> Callable[[ModelProto], ModelProto]:
    import onnxoptimizer

    passes = onnxoptimizer.get_fuse_and_elimination_passes()
    return lambda model: onnxoptimizer.optimize(model, passes)


def _onnxsim(scratch: str) -> Callable[[ModelProto], ModelProto]:
    import onnxsim

    return lambda model: onnxsim.simplify(model)[0]
