"""Fold the BatchNorms of ONNX models into the weights beside them. Needs the extra `onnx`.

    onnx_graph   reads a model as the graph that folding knows      onnx_files   load and save, external data too
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

try:
    import onnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('fastbn.interop.onnx needs onnx: pip install "fastbn[onnx]"', name="onnx") from error
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..affine import SIGNIFICAND_BITS
from . import graph as folding
from .onnx_files import external_files, load, save
from .onnx_graph import Constants, Reader, check, default_opset, is_onnx, name_of, names, reads, rename, subgraphs
from .report import LEFT, Decision, ModelReport

__all__ = ["external_files", "fold", "load", "save"]

PARAMETERISED = ("BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul")
LARGEST = 1 << 16  # values of a computed constant that becomes an initializer: a file must not grow by copies
OLDEST_OPSET = 7  # before it, BatchNormalization had no inference form of its own


def fold(model: ModelProto | str | os.PathLike[str]) -> tuple[ModelProto, ModelReport]:
    """Fold every BatchNormalization of `model` that can be, into the weights before or behind it.

    bn(x) = scale·x + shift per channel, scale = γ/√(σ² + ε), shift = β - scale·μ (Ioffe & Szegedy 2015, Algorithm 2,
    line 11). It goes into the Conv, ConvTranspose, Gemm or MatMul (+ Add) whose output it alone reads, or into all
    those that read its output, or into another BatchNormalization; on the way through Identity, Dropout, Transpose,
    Reshape, Flatten, Squeeze, Unsqueeze, pooling, ReduceMean, Resize, Pad, Slice, Concat and Split where they let it
    pass; Mul, Add, Sub and Div by constants go with it.

    Parameters
    ----------
    model : onnx.ModelProto, or the path of one
        Opset 7 or newer. It stays as it is.

    Returns
    -------
    model : onnx.ModelProto
        The same function with fewer nodes; a BatchNormalization that cannot be folded stays one.
    report : ModelReport
        What became of each BatchNormalization, and why.

    Raises
    ------
    ValueError
        A BatchNormalization's parameters are not finite, var + epsilon is not positive, or their shapes do not fit:
        the message names the node. The opset is older than 7; the file is no model, or its external data are
        missing or outside its folder.
    OSError
        The file cannot be read.

    Notes
    -----
    Each weight is the exact product rounded once to its dtype, float16 and bfloat16 too: see `fastbn.fold_linear`.
    Where anything is folded, Constant nodes and nodes that compute small tensors from constants become initializers.
    Left as they are: weights that other nodes read, initializers that are inputs too (a caller may override them, from
    IR version 4 on), nodes in training mode, and the bodies of If, Loop, Scan and local functions.

    Examples
    --------
    >>> import numpy as np, onnx
    >>> from onnx import helper, numpy_helper
    >>> from fastbn.interop import onnx as fastbn_onnx
    >>> graph = onnx.parser.parse_graph(
    ...     "g (float[n, 2, 5, 5] x) => (float[n, 3, 5, 5] y) { c = Conv(x, w)  y = BatchNormalization(c, s, s, s, s) }"
    ... )
    >>> weights = {"w": np.ones((3, 2, 1, 1), np.float32), "s": np.ones(3, np.float32)}
    >>> graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    >>> folded, report = fastbn_onnx.fold(model)
    >>> [node.op_type for node in folded.graph.node], report.decisions[0].into
    (['Conv'], ('c',))
    """
    source = model if isinstance(model, ModelProto) else load(model)
    if (opset := default_opset(source)) < OLDEST_OPSET:
        raise ValueError(f"model: expected opset {OLDEST_OPSET} or newer, got {opset or 'none'}")
    model = ModelProto()
    model.CopyFrom(source)
    check(model)
    reader = Reader(model)
    graph = reader.graph()
    nodes, parameters = _sizes(model, reader.constants)
    decisions = folding.fold(graph) + list(_inside(model))
    if any(decision.action != LEFT for decision in decisions):
        _Writer(reader, graph).write()
    nodes_after, parameters_after = _sizes(model, Constants(model))
    return model, ModelReport(tuple(decisions), nodes, nodes_after, parameters, parameters_after)


def _sizes(model: ModelProto, constants: Constants) -> tuple[int, int]:
    """Return how many nodes of the main graph run, and how many floating-point constants they read."""
    running = [node for node in model.graph.node if not constants.is_constant_node(node)]
    arrays = (constants.get(name) for name in {name for node in running for name in reads(node)})
    return len(running), sum(a.size for a in arrays if a is not None and a.dtype.name in SIGNIFICAND_BITS)


def _inside(model: ModelProto) -> Iterator[Decision]:
    """Say of the BatchNormalizations in subgraphs and local functions that they stay."""

    def within(graph: Iterable[NodeProto], place: str) -> Iterator[Decision]:
        for node in graph:
            if node.op_type == "BatchNormalization" and is_onnx(node):
                yield Decision(name_of(node), LEFT, (), f"it is inside {place}")
            for body in subgraphs(node):
                yield from within(body.node, f"a subgraph of {node.op_type} {name_of(node)!r}")

    for node in model.graph.node:
        for body in subgraphs(node):
            yield from within(body.node, f"a subgraph of {node.op_type} {name_of(node)!r}")
    for function in model.functions:
        yield from within(function.node, f"the function {function.name!r}")


class _Writer:
    """Bring what folding decided back into the model."""

    def __init__(self, reader: Reader, graph: folding.Graph) -> None:
        self.reader, self.nodes, self.proto = reader, graph.nodes, reader.model.graph
        self.taken = set(names(self.proto))
        readers = [node for node in self.proto.node if node.op_type in PARAMETERISED]
        self.weights = {name for node in readers for name in node.input[1:]}
        self.dead: list[NodeProto] = []

    def write(self) -> None:
        for node in self.nodes:
            if node.removed:
                continue
            if isinstance(node.op, folding.Layer) and node.op.folded is not None:
                self._layer(node)
            elif isinstance(node.op, folding.BatchNorm) and node.op.taken:
                merged = node.op.merged()
                for index, array in enumerate((merged.gamma, merged.beta, merged.mean, merged.var), 1):
                    self._set(node.origin[0], index, array)
        self._rewire()
        self._remove_unread()

    def _layer(self, node: folding.Node) -> None:
        proto, *add = node.origin
        weight, bias = node.op.folded.weight, node.op.folded.bias
        if proto.op_type != "MatMul":
            self._set(proto, 1, weight)
            if node.op.bias is not None or bias.any():
                self._set(proto, 2, bias)
            if proto.op_type == "Gemm":
                kept = [entry for entry in proto.attribute if entry.name != "beta"]  # the bias holds it now
                del proto.attribute[:]
                proto.attribute.extend(kept)
            return
        left = self.reader.constants.get(proto.input[1]) is None
        self._set(proto, 0 if left else 1, weight)
        if add:
            self._set(add[0], 0 if add[0].input[1] == proto.output[0] else 1, bias)
        elif not bias.any():
            return
        elif not left and self.reader.rank(proto.input[0]) == 2:
            proto.op_type = "Gemm"
            self._set(proto, 2, bias)
        else:
            self._add_behind(proto, bias[:, np.newaxis] if left else bias)

    def _add_behind(self, proto: NodeProto, bias: np.ndarray) -> None:
        out = proto.output[0]
        proto.output[0] = self._free(f"{out}_before_bias")
        add = helper.make_node("Add", [proto.output[0], ""], [out], self._free(f"{name_of(proto)}_bias"))
        self._set(add, 1, bias)
        self.proto.node.insert(1 + list(map(id, self.proto.node)).index(id(proto)), add)

    def _set(self, proto: NodeProto, index: int, array: np.ndarray) -> None:
        """Let an input of a node be `array`: in the initializer it has, unless others read that too."""
        while len(proto.input) <= index:
            proto.input.append("")
        name, uses = proto.input[index], self.reader.uses
        initializers = self.reader.constants.initializers
        array = np.asarray(array, order="C")
        if name in initializers and uses[name] == 1:
            initializers[name].CopyFrom(numpy_helper.from_array(array, name))
        else:
            uses[name] -= 1
            name = self._free(name or f"{name_of(proto)}_bias")
            initializers[name] = self.proto.initializer.add()
            initializers[name].CopyFrom(numpy_helper.from_array(array, name))
            proto.input[index], uses[name] = name, 1
        self._as_input(initializers[name])

    def _free(self, name: str) -> str:
        """Return a name that nothing has."""
        free, number = name, 0
        while free in self.taken:
            free, number = f"{name}_{(number := number + 1)}", number
        self.taken.add(free)
        return free

    def _rewire(self) -> None:
        """Let what read a removed node read what that one read; an output of the model keeps its name."""
        outputs = {value.name for value in self.proto.output}
        alias: dict[str, str] = {}
        renamed: dict[str, str] = {}
        for node in self.nodes:
            if node.removed:
                proto = node.origin[0]
                data = node.inputs[0].name
                data = alias.get(data, data)
                alias[proto.output[0]] = data
                if proto.output[0] in outputs:
                    renamed[data] = proto.output[0]
                self.dead.append(proto)
        gone = set(map(id, self.dead))
        new = renamed | {name: renamed.get(data, data) for name, data in alias.items()}
        for proto in self.proto.node:
            if id(proto) not in gone:
                rename(proto, new)
                for index, name in enumerate(proto.output):
                    proto.output[index] = renamed.get(name, name)

    def _remove_unread(self) -> None:
        """Remove what folding has removed; what is constant becomes an initializer, or goes if nothing reads it."""
        gone, constants = set(map(id, self.dead)), self.reader.constants
        kept = [node for node in self.proto.node if id(node) not in gone and not self._is_constant(node)]
        used = {name for node in kept for name in reads(node)} | {value.name for value in self.proto.output}
        for node in self.proto.node:
            if id(node) not in gone and self._is_constant(node) and (name := node.output[0]) in used:
                tensor = self.proto.initializer.add()
                tensor.CopyFrom(numpy_helper.from_array(np.asarray(constants.get(name), order="C"), name))
                self._as_input(tensor)
        _replace(self.proto.node, kept)
        unread = {t.name for t in self.proto.initializer if t.name not in used and t.name not in constants.overridable}
        _replace(self.proto.initializer, [t for t in self.proto.initializer if t.name not in unread])
        _replace(self.proto.input, [value for value in self.proto.input if value.name not in unread])
        known = used | {name for node in kept for name in node.output}
        _replace(self.proto.value_info, [value for value in self.proto.value_info if value.name in known])
        notes = self.proto.quantization_annotation
        _replace(notes, [note for note in notes if note.tensor_name in known])

    def _is_constant(self, node: NodeProto) -> bool:
        """Say whether an initializer can stand for a node; not for one whose output the model gives."""
        constants = self.reader.constants
        if not constants.is_constant_node(node) or node.output[0] in {value.name for value in self.proto.output}:
            return False
        value = np.asarray(constants.get(node.output[0]))
        filled = node.op_type == "ConstantOfShape" and node.output[0] in self.weights
        large = value.size > LARGEST and node.op_type != "Constant" and not filled
        return not large and (value.dtype.kind in "fiub" or value.dtype.name == "bfloat16")

    def _as_input(self, tensor: TensorProto) -> None:
        """Before IR version 4 an initializer is an input too."""
        if self.reader.model.ir_version < 4:
            info = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            inputs = self.proto.input
            _replace(inputs, [value for value in inputs if value.name != tensor.name])
            inputs.append(info)


def _replace(field, kept: list) -> None:
    """Leave in a repeated field of a message only `kept`, which are of it."""
    ids = set(map(id, kept))
    for index in reversed([i for i, entry in enumerate(field) if id(entry) not in ids]):
        del field[index]
