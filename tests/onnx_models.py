"""Small ONNX models from one line of text each, and the float64 oracle that folded ones are held against."""

import re
import zlib

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx.reference.ops import op_conv_transpose

from fastbn.interop import onnx as interop

NEWEST = onnx.defs.onnx_opset_version()
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float": 2.0**-23, "double": 2.0**-52}
NUMPY = {"float16": np.float16, "bfloat16": BFLOAT16, "float": np.float32, "double": np.float64}
FLOATS = {helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) for dtype in NUMPY.values()}
IR = {7: 3, 8: 3, 9: 4, 10: 5, 11: 6, 12: 7, 13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8}
STATISTICS = ("s", "B", "m", "v")  # scale, B, mean, var: the BatchNorm `p` has p_s, p_B, p_m, p_v


def generator(text):
    return np.random.default_rng(zlib.crc32(text.encode()))


def build(text, *, opset=17, ir=None, dtype="float", affine=True, imports=(), functions=(), as_inputs=(), **weights):
    """Return the model of a graph in ONNX's text form, and what it says of types is true of its initializers.

    T is the dtype; BN(x, p) is a BatchNormalization of x by p_s, p_B, p_m, p_v. weights: a shape (random values), an
    int (the parameters of a BatchNorm of so many channels), or an array. affine: else each scale is 1 and B 0.
    as_inputs: initializers that are inputs too, as all of them are before IR version 4.
    """
    ir = IR.get(opset, 10) if ir is None else ir
    text = re.sub(r"\bBN(<[^>]*>)?\((\w+), ?(\w+)\)", r"BatchNormalization\1(\2, \3_s, \3_B, \3_m, \3_v)", text)
    text = re.sub(r"\bT\b", dtype, text)
    graph = onnx.parser.parse_graph(f"g {text}")
    for name, value in weights.items():
        if isinstance(value, int):
            graph.initializer.extend(batch_norm(name, value, NUMPY[dtype], affine))
        else:
            if isinstance(value, tuple):
                value = generator(name).uniform(-1, 1, value).astype(NUMPY[dtype])
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for tensor in graph.initializer:
        if ir < 4 or tensor.name in as_inputs:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in imports)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir, functions=list(functions))


def batch_norm(name, channels, dtype, affine=True):
    """Return scale, B, mean and var as initializers; some scales are negative."""
    rng = generator(name)
    scale, shift, mean = (
        rng.uniform(-2, 2, (3, channels)) if affine else rng.uniform(-2, 2, (3, channels)) * 0 + [[1], [0], [1]]
    )
    var = rng.uniform(0.25, 4, channels)
    values = zip(STATISTICS, (scale, shift, mean, var), strict=True)
    return [numpy_helper.from_array(array.astype(dtype), f"{name}_{part}") for part, array in values]


def inputs_of(model, seed=0, sizes=None):
    """Draw the inputs of a model, which are no initializers; `sizes` of the unknown axes, 2 where it says nothing."""
    known, rng, sizes = {t.name for t in model.graph.initializer}, np.random.default_rng(seed), sizes or {}
    found = {}
    for value in model.graph.input:
        if value.name in known:
            continue
        kind = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else sizes.get(d.dim_param, 2) for d in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        draw = rng.uniform(-2, 2, shape) if kind.elem_type in FLOATS else rng.integers(0, 2, shape)
        found[value.name] = draw.astype(dtype)
    return found


# The oracle -----------------------------------------------------------------------------------------------------


def widened(model):
    """Return the model in float64, all the values of which are as they were."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen(wide.graph)
    return wide


def _widen(graph):
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in FLOATS:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    del graph.value_info[:]
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for entry in node.attribute:
            if entry.HasField("t"):
                _widen_tensor(entry.t)
            if entry.HasField("g"):
                _widen(entry.g)
            if node.op_type == "Cast" and entry.name == "to" and entry.i in FLOATS:
                entry.i = TensorProto.DOUBLE
            if node.op_type == "Constant" and entry.name in ("value_float", "value_floats"):
                array = np.array(entry.f if entry.name == "value_float" else entry.floats, np.float64)
                entry.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(array)))


def _widen_tensor(tensor):
    if tensor.data_type in FLOATS:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))


def absolute(model):
    """Return the model of magnitudes: fed with |x|, it bounds what the sums in the widened model cancel from."""
    model = widened(model)
    graph, means = model.graph, set()
    _absolute(graph, means)
    known = {tensor.name: tensor for tensor in graph.initializer}
    for name in sorted(means):  # |x| + |mean| is |x| - (-|mean|)
        if name in known:
            graph.initializer.append(numpy_helper.from_array(-numpy_helper.to_array(known[name]), f"{name}|"))
        else:  # computed, or an input
            graph.node.append(helper.make_node("Neg", [name], [f"{name}|"]))
    _sort(graph)
    return model


def _absolute(graph, means):
    for tensor in graph.initializer:
        _absolute_tensor(tensor)
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.domain == "":
            means.add(node.input[3])
            node.input[3] = f"{node.input[3]}|"
        if node.op_type in ("Sub", "Neg") and node.domain == "":
            node.op_type = {"Sub": "Add", "Neg": "Identity"}[node.op_type]
        for entry in node.attribute:
            if entry.HasField("t"):
                _absolute_tensor(entry.t)
            if entry.HasField("g"):
                _absolute(entry.g, means)
            if node.op_type == "Gemm" and entry.name in ("alpha", "beta"):
                entry.f = abs(entry.f)


def _absolute_tensor(tensor):
    if tensor.data_type == TensorProto.DOUBLE:
        tensor.CopyFrom(numpy_helper.from_array(np.abs(numpy_helper.to_array(tensor)), tensor.name))


def _sort(graph):
    """Put the nodes in topological order."""
    nodes = list(graph.node)
    produced = {name for node in nodes for name in node.output}
    del graph.node[:]
    while nodes:
        ready = [n for n in nodes if not any(name in produced for name in _reads(n))]
        produced -= {name for n in ready for name in n.output}
        graph.node.extend(ready)
        nodes = [n for n in nodes if n not in ready]


def _reads(node):
    """Return the names a node reads, its subgraphs' too: more than that do no harm here."""
    bodies = [entry.g for entry in node.attribute if entry.HasField("g")]
    inner = [n for body in bodies for n in body.node]
    own = {name for n in inner for name in n.output}
    return {*node.input, *(name for n in inner for name in _reads(n) if name not in own)}


class BatchNormalization(OpRun):
    """The specification's inference: for opsets 9 to 13 ONNX's reference moves the statistics by their momentum."""

    def _run(self, x, scale, bias, mean, var, epsilon=1e-5, **_):
        scale, bias, mean, var = (a.reshape(-1, *[1] * (x.ndim - 2)) for a in (scale, bias, mean, var))
        return (scale * (x - mean) / np.sqrt(var + epsilon) + bias,)


class ConvTranspose(op_conv_transpose.ConvTranspose):
    """ONNX's reference knows one group only."""

    def _run(self, x, w, b=None, group=1, **attributes):
        parts = zip(np.split(x, group, axis=1), np.split(w, group), strict=True)
        y = np.concatenate([super(ConvTranspose, self)._run(*p, None, group=1, **attributes)[0] for p in parts], axis=1)
        return (y if b is None else y + b.reshape(-1, *[1] * (x.ndim - 2)),)


def run(model, inputs):
    return ReferenceEvaluator(model, new_ops=[BatchNormalization, ConvTranspose]).run(None, inputs)


def wide(inputs):
    floats = ("f", "V")  # bfloat16 is a void to NumPy
    return {name: x.astype(np.float64) if x.dtype.kind in floats else x for name, x in inputs.items()}


def assert_same(model, folded, *, dtype="float", seed=0, sizes=None, inputs=None, roundings=4):
    """Hold a folded model against the one it came from, both in float64: only weights were rounded in between.

    A weight or bias is off by half an ulp, as are gamma and the mean of a BatchNorm: `roundings` of them on the way to
    an output, and the oracle's own, which grow with the length of its sums.
    """
    x = wide(inputs_of(model, seed, sizes) if inputs is None else inputs)
    bound = EPS[dtype] * roundings + 2.0**-52 * 200
    large = {name: np.abs(array) for name, array in x.items()}
    triples = zip(run(widened(model), x), run(widened(folded), x), run(absolute(model), large), strict=True)
    for expected, got, size in triples:
        assert got.shape == expected.shape
        assert np.isfinite(expected).all()
        assert (np.abs(got - expected) <= bound * size).all(), np.max(np.abs(got - expected) / size) / EPS[dtype]


def assert_runs(model, folded, *, seed=0, sizes=None, inputs=None, terms=2000):
    """Hold both against each other in ONNX Runtime, float32: its sums may be off by `terms` roundings."""
    x = inputs_of(model, seed, sizes) if inputs is None else inputs
    large = run(absolute(model), {name: np.abs(array) for name, array in wide(x).items()})
    for expected, got, size in zip(in_runtime(model, x), in_runtime(folded, x), large, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
        assert (np.abs(got.astype(float) - expected) <= terms * 2.0**-24 * size).all()


def in_runtime(model, x):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, x)


# What a fold must hold to, whatever it does ----------------------------------------------------------------------


def operators(model):
    return [node.op_type for node in model.graph.node]


def norms(model):
    return [n for n in model.graph.node if n.op_type == "BatchNormalization" and n.domain in ("", "ai.onnx")]


def fold_checked(model, twice=True):
    """Fold a model, twice to see that it is always the same, and hold the result to what is true of every fold."""
    before = model.SerializeToString(deterministic=True)
    folded, report = interop.fold(model)
    assert model.SerializeToString(deterministic=True) == before
    if twice:
        again, same = interop.fold(model)
        assert again.SerializeToString(deterministic=True) == folded.SerializeToString(deterministic=True)
        assert same == report
    onnx.checker.check_model(folded, full_check=True)
    outputs = [value.SerializeToString() for value in model.graph.output]
    assert [value.SerializeToString() for value in folded.graph.output] == outputs
    if model.ir_version >= 4:
        assert [v.name for v in folded.graph.input] == [v.name for v in model.graph.input]
    here = norms(folded)
    assert len(here) <= len(norms(model))
    names = [d.node for d in report]
    inside = [d for d in report if d.reason.startswith("it is inside")]
    assert len(names) == len(norms(model)) + len(inside)
    assert len(here) == len(report.left) - len(inside)
    if len(set(names)) == len(names):
        stay = {d.node for d in report.left if d not in inside}
        assert {n.name or next(filter(None, n.output)) for n in here} <= stay | {v.name for v in model.graph.output}
    for decision in report:
        assert decision.reason
        assert bool(decision.into) == (decision.action in ("folded", "merged"))
        assert bool(decision.changes) == (decision.action == "folded")
    assert report.nodes_after <= report.nodes_before + len(report)  # an Add of a bias may come behind a MatMul
    return folded, report


def check(text, expected, actions=None, *, sizes=None, runtime=True, roundings=4, **given):
    """Build a model, fold it, hold it to `expected` (its operators) and `actions`, and against the oracles."""
    model = build(text, **given)
    folded, report = fold_checked(model)
    assert operators(folded) == expected.split(), str(report)
    if actions is not None:
        assert " ".join(d.action for d in report) == actions, str(report)
    dtype = given.get("dtype", "float")
    assert_same(model, folded, dtype=dtype, sizes=sizes, roundings=roundings)
    if runtime and dtype == "float":
        assert_runs(model, folded, sizes=sizes)
    return folded, report
