"""Read an ONNX graph as the graph that folding knows: which node is what, which tensor is constant."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ..affine import SIGNIFICAND_BITS, BatchNormParams
from .graph import (
    BatchNorm,
    Concat,
    Flatten,
    Graph,
    Layer,
    Opaque,
    Pool,
    Reshape,
    Same,
    Scaling,
    Split,
    Transpose,
    Value,
)
from .onnx_files import tensors

# What exporters compute from weights in the graph; evaluated by ONNX's own reference implementation.
CONSTANT_OPS = {"Constant", "ConstantOfShape", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Transpose"}
CONSTANT_OPS |= {"Cast", "Concat", "Slice", "Gather", "Shape", "Expand", "Neg", "Abs", "Sqrt", "Reciprocal"}
CONSTANT_OPS |= {"Add", "Sub", "Mul", "Div"}
EPSILON = float(np.float32(1e-5))  # BatchNormalization's: attributes are float32
COMPUTED = 1 << 25  # numbers that computed constants may have in all, or eight times those that the model holds
HIDDEN = "hidden"  # a domain that ONNX knows nothing of
LARGE = 1024  # shape inference need not see the values of a longer initializer


def default_opset(model: ModelProto) -> int:
    """Return the version of ONNX's own operators that `model` uses."""
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    return max(versions, default=0)


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return the value of an attribute; strings are bytes."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the bodies of an If, Loop or Scan."""
    for entry in node.attribute:
        if entry.type == AttributeProto.GRAPH:
            yield entry.g
        yield from entry.graphs


def is_onnx(node: NodeProto) -> bool:
    """Say whether it is one of ONNX's own operators."""
    return node.domain in ("", "ai.onnx")


def name_of(node: NodeProto) -> str:
    return node.name or next((name for name in node.output if name), node.op_type)


def reads(node: NodeProto) -> list[str]:
    """Return the names that a node reads, those that its subgraphs take from outside too."""
    found = [name for name in node.input if name]
    for graph in subgraphs(node):
        inner = _defined(graph)
        outer = [name for n in graph.node for name in reads(n)] + [v.name for v in graph.output]
        found += [name for name in outer if name and name not in inner]
    return found


def rename(node: NodeProto, new: dict[str, str]) -> None:
    """Let a node read other names, its subgraphs too."""
    for index, name in enumerate(node.input):
        node.input[index] = new.get(name, name)
    for graph in subgraphs(node):
        inner = _defined(graph)
        outer = {name: value for name, value in new.items() if name not in inner}
        for n in graph.node:
            rename(n, outer)
        for value in graph.output:
            value.name = outer.get(value.name, value.name)


def names(graph: GraphProto) -> Iterator[str]:
    """Yield every name in a graph and in its subgraphs."""
    yield from _defined(graph)
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from (node.name, *node.input)
        for body in subgraphs(node):
            yield from names(body)


def _defined(graph: GraphProto) -> set[str]:
    return _given(graph) | {name for node in graph.node for name in node.output}


def _given(graph: GraphProto) -> set[str]:
    """Return the names of what no node computes."""
    found = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    return found | {tensor.values.name for tensor in graph.sparse_initializer}


def check(model: ModelProto) -> None:
    """Raise ValueError, naming the node, where one is not what its operator must be, or reads what is not there yet.

    Only what is read below is looked at: unknown operators may be as they like.
    """
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {"": default_opset(model)}
    for tensor in tensors(model):  # shape inference may not end where one is said to be huge
        inside = tensor.data_location != TensorProto.EXTERNAL
        if min(tensor.dims, default=0) < 0 or (inside and prod(tensor.dims) > 8 * tensor.ByteSize()):
            raise ValueError(f"{tensor.name!r}: expected the values of shape {list(tensor.dims)}, got fewer")
    known = _given(model.graph)
    for node in model.graph.node:
        place = f"{node.op_type} {name_of(node)!r}"
        if is_onnx(node) and (node.op_type in READ or node.op_type in CONSTANT_OPS):
            copy = NodeProto()
            copy.CopyFrom(node)
            copy.ClearField("domain")  # the checker does not know ONNX's by its longer name
            try:
                onnx.checker.check_node(copy, context)
            except onnx.checker.ValidationError as error:
                raise ValueError(f"{place}: {str(error).splitlines()[0]}") from error
        for name in reads(node):
            if name not in known:
                raise ValueError(f"{place}: expected to read what stands before it, got {name!r}")
        for name in filter(None, node.output):
            if name in known:
                raise ValueError(f"{place}: expected an output of its own, got {name!r}, which there is already")
            known.add(name)


class Constants:
    """The values of the tensors that no input of the model can change."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        inputs = {value.name for value in graph.input}
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        # Before IR version 4 every initializer had to be an input as well; since then it may be, to be overridden.
        self.overridable = inputs & self.initializers.keys() if model.ir_version >= 4 else set()
        self._opsets = list(model.opset_import)
        self._producers = {name: node for node in graph.node for name in node.output if name}
        self._known: dict[str, np.ndarray | None] = {}
        self._constant: dict[str, bool] = {}
        self._left = max(COMPUTED, 8 * sum(prod(tensor.dims) for tensor in graph.initializer))
        for name in self._producers:  # in the order in which they are computed: no chain of them is too long
            self._is_constant(name)

    def get(self, name: str) -> np.ndarray | None:
        """Return the value of a tensor, or None where it is not constant."""
        waiting = [name]
        while waiting:
            node = self._producers.get(waiting[-1]) if self._is_constant(waiting[-1]) else None
            if unknown := [read for read in (node.input if node else ()) if read and read not in self._known]:
                waiting += unknown
            elif (found := waiting.pop()) not in self._known:
                self._known[found] = self._find(found)
        return self._known[name]

    def why_not(self, name: str) -> str:
        """Say why a tensor is not constant."""
        if name in self.overridable:
            return f"{name!r} is an input of the model, which a caller may override"
        return f"{name!r} is not constant"

    def is_constant_node(self, node: NodeProto) -> bool:
        """Say whether a node reads nothing but constants and only computes weights."""
        own = is_onnx(node) and node.op_type in CONSTANT_OPS and len(node.output) == 1
        own = own and not any(entry.name == "sparse_value" for entry in node.attribute)
        return own and all(self._is_constant(name) for name in node.input if name)

    def _is_constant(self, name: str) -> bool:
        if name not in self._constant:
            node = self._producers.get(name)
            initializer = name in self.initializers and name not in self.overridable
            self._constant[name] = initializer or (node is not None and self.is_constant_node(node))
        return self._constant[name]

    def _find(self, name: str) -> np.ndarray | None:
        if not self._is_constant(name):
            return None
        if (tensor := self.initializers.get(name)) is not None:
            return values_of(tensor)
        node = self._producers[name]
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            return values_of(node.attribute[0].t, name)
        feeds: dict[str, Any] = {read: self._known[read] for read in node.input if read}
        infos = [helper.make_empty_tensor_value_info(read) for read in feeds]
        graph = helper.make_graph([node], "constant", infos, [helper.make_empty_tensor_value_info(name)])
        model = helper.make_model(graph, opset_imports=self._opsets)
        try:
            if (left := self._left - _size(node, [feeds[read] for read in node.input if read])) < 0:
                return None
            (value,) = ReferenceEvaluator(model).run([name], feeds)
        except Exception:  # what it cannot compute is no constant to us
            return None
        self._left = left
        return np.asarray(value)


def _size(node: NodeProto, arrays: list[np.ndarray]) -> int:
    """Return how many numbers a node gives, or more: a few bytes can ask for all the memory there is."""
    match node.op_type:
        case "ConstantOfShape":
            return prod(arrays[0].tolist())
        case "Expand":
            return prod(np.broadcast_shapes(arrays[0].shape, arrays[1].tolist()))
        case "Gather":
            return arrays[1].size * arrays[0].size // arrays[0].shape[attribute(node, "axis", 0)]
        case "Add" | "Sub" | "Mul" | "Div":
            return prod(np.broadcast_shapes(*(array.shape for array in arrays)))
        case _:
            return sum(array.size for array in arrays)


def values_of(tensor: TensorProto, name: str = "") -> np.ndarray:
    """Return a tensor's values."""
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ValueError(
            f"{tensor.name or name!r}: expected its values in the model, got external data that are not loaded: "
            "pass the model's path"
        )
    try:
        return numpy_helper.to_array(tensor)
    except Exception as error:
        raise ValueError(f"{tensor.name or name!r}: expected the values of a tensor, got {error}") from error


def shapes(model: ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return what ONNX's shape inference finds; the values of large initializers are not copied for it."""
    light = ModelProto()
    light.ir_version = model.ir_version
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    source, graph = model.graph, light.graph
    for part in ("node", "input", "output", "value_info"):
        getattr(graph, part).extend(getattr(source, part))
    inputs = {value.name for value in source.input}
    for tensor in source.initializer:
        if prod(tensor.dims) <= LARGE and tensor.data_location != TensorProto.EXTERNAL:
            graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    light = _inferred(light)
    followed = _inferred(_short_only(light, _stated(light)), data_prop=True)
    return _stated(_inferred(_restored(followed, light)))


def _inferred(model: ModelProto, data_prop: bool = False) -> ModelProto:
    with contextlib.suppress(Exception):  # the shapes that the file states are still there
        return onnx.shape_inference.infer_shapes(model, data_prop=data_prop)
    return model


def _stated(model: ModelProto) -> dict[str, tuple[int | None, ...]]:
    found = {}
    for value in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return found | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _short_only(model: ModelProto, found: dict[str, tuple[int | None, ...]]) -> ModelProto:
    """Return a model in which values are followed through short vectors only.

    ONNX takes memory for each element of a vector whose length it knows: a few bytes can say that there are 2³⁰.
    """
    short = ModelProto()
    short.CopyFrom(model)
    short.opset_import.append(helper.make_opsetid(HIDDEN, 1))
    del short.functions[:]
    opset = default_opset(model)
    for node in short.graph.node:
        shapes = [found.get(name) for name in (*node.input, *node.output) if name]
        fits = all(s is not None and (len(s) != 1 or (s[0] is not None and s[0] <= LARGE)) for s in shapes)
        if any(subgraphs(node)) or (_follows_values(node, opset) and not fits):
            node.domain = HIDDEN
            del node.attribute[:]
    return short


def _follows_values(node: NodeProto, opset: int) -> bool:
    try:
        return is_onnx(node) and onnx.defs.get_schema(node.op_type, opset).has_data_propagation_function
    except (onnx.defs.SchemaError, TypeError):  # no such operator, or a name that is no text
        return False


def _restored(short: ModelProto, model: ModelProto) -> ModelProto:
    """Return a model with the shapes that were found while some of its nodes were hidden."""
    whole = ModelProto()
    whole.CopyFrom(model)
    for part in ("value_info", "output"):
        del getattr(whole.graph, part)[:]
        getattr(whole.graph, part).extend(getattr(short.graph, part))
    return whole


class Reader:
    """Build the Graph of a model's main graph; a node's origin is the list of its NodeProtos."""

    def __init__(self, model: ModelProto) -> None:
        self.model, self.opset = model, default_opset(model)
        self.constants = Constants(model)
        self.uses = Counter(name for node in model.graph.node for name in reads(node))
        self.uses.update(value.name for value in model.graph.output)
        self._readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in set(reads(node)):
                self._readers.setdefault(name, []).append(node)
        self._shapes = shapes(model)
        self._outputs = {value.name for value in model.graph.output}
        self._values: dict[str, Value] = {}

    def graph(self) -> Graph:
        graph, summands = Graph(), set()
        for proto in self.model.graph.node:
            if id(proto) in summands:
                continue
            origin = [proto]
            if proto.op_type == "MatMul" and (add := self._summand(proto)) is not None:
                origin.append(add)
                summands.add(id(add))
            op, data = None, reads(proto)
            if is_onnx(proto) and proto.op_type in READ:
                try:
                    op, data = READ[proto.op_type](self, origin) or (None, data)
                except (IndexError, TypeError, AttributeError, ArithmeticError) as error:  # constants of odd shapes
                    raise ValueError(f"{proto.op_type} {name_of(proto)!r}: it is damaged: {error}") from error
            outputs = [self._value(name) for name in origin[-1].output if name]
            if isinstance(op, Layer) and outputs[0].shape is None and proto.op_type != "MatMul":
                outputs[0].shape = (None, op.out_channels, *[None] * (op.weight.ndim - 2))
            kind = "MatMul + Add" if len(origin) > 1 else proto.op_type
            graph.add(kind, name_of(proto), op, [self._value(name) for name in data], outputs, origin)
        return graph

    def _value(self, name: str) -> Value:
        if name not in self._values:
            self._values[name] = Value(name, self._shapes.get(name), name in self._outputs)
        return self._values[name]

    def rank(self, name: str) -> int | None:
        return None if (shape := self._shapes.get(name)) is None else len(shape)

    # Each of the following reads one kind of node: (op, names of the data it reads), or None where nothing passes.

    def _batch_norm(self, origin):
        (node,) = origin
        names, place = ("scale", "B", "mean", "var"), f"BatchNormalization {name_of(node)!r}"
        if self.rank(node.input[0]) == 0:
            raise ValueError(f"{place}: expected an input with channels, got a scalar")
        held = ""
        if len([name for name in node.output if name]) > 1:
            held = "it has outputs for training"
        elif attribute(node, "training_mode", 0):
            held = "it is in training mode"
        elif not attribute(node, "spatial", 1):
            held = "it has statistics for every position (spatial = 0)"
        arrays = []
        for what, name in zip(names, node.input[1:], strict=False):
            arrays.append(self.constants.get(name))
            if arrays[-1] is None:
                held = held or f"its {what} {self.constants.why_not(name)}"
            elif arrays[-1].dtype.name not in SIGNIFICAND_BITS:
                raise ValueError(f"{place}: expected floats as {what}, got {arrays[-1].dtype}")
        params = BatchNormParams(*arrays, attribute(node, "epsilon", EPSILON))
        return BatchNorm(params, 1, held), [node.input[0]] if not held else reads(node)

    def _conv(self, origin, transposed=False):
        (node,) = origin
        weight, bias, held = self._parameters(node)
        if weight is None:
            return Opaque(held), reads(node)
        if weight.ndim < 3:
            name = f"{node.op_type} {name_of(node)!r}"
            raise ValueError(f"{name}: expected a weight of 3 axes or more, got {weight.shape}")
        if weight.ndim > 5:
            return Opaque(f"its weight has {weight.ndim} axes"), reads(node)
        kernel = weight.shape[2:]
        same = attribute(node, "auto_pad", b"NOTSET").startswith(b"SAME")
        padded = any(attribute(node, "pads", ())) or (same and prod(kernel) > 1)
        layout = ("IO" if transposed else "OI") + "DHW"[-len(kernel) :]
        layer = Layer(weight, bias, layout, 1, 1, attribute(node, "group", 1), transposed, padded, held)
        return layer, [node.input[0]]

    def _conv_transpose(self, origin):
        return self._conv(origin, transposed=True)

    def _gemm(self, origin):
        (node,) = origin
        weight, bias, held = self._parameters(node)
        if weight is None:
            return Opaque(held), reads(node)
        if weight.ndim != 2:
            return None
        n_out = weight.shape[0 if attribute(node, "transB", 0) else 1]
        if bias is not None:
            if bias.ndim > 1 and bias.shape[-2] != 1:
                held = held or "its bias differs from row to row"
            elif bias.size not in (1, n_out):
                shapes = f"{bias.shape} beside a weight of {weight.shape}"
                raise ValueError(f"Gemm {name_of(node)!r}: expected a bias of ({n_out},), got {shapes}")
            else:
                bias = np.broadcast_to(bias.reshape(-1), (n_out,)) * np.float64(attribute(node, "beta", 1.0))
        layout = "OI" if attribute(node, "transB", 0) else "IO"
        alpha, in_axis = attribute(node, "alpha", 1.0), 0 if attribute(node, "transA", 0) else -1
        held_before = "" if alpha == 1.0 else f"its alpha is {alpha}"
        return Layer(weight, bias, layout, in_axis, -1, held=held, held_before=held_before), [node.input[0]]

    def _matmul(self, origin):
        node, *add = origin
        left, right = (self.constants.get(name) for name in node.input)
        at = 1 if right is not None else 0
        weight = right if right is not None else left
        if weight is None and (over := self.constants.overridable.intersection(node.input)):
            return Opaque(f"its weight {self.constants.why_not(over.pop())}"), reads(node)
        if weight is None or weight.ndim != 2 or (left is not None and right is not None):
            return None
        if at == 0 and self.rank(node.input[1]) == 1:
            return None  # its channels would be on the last axis
        held = self._held(node.input[at], weight)
        bias = self._summand_values(add[0]).reshape(-1) if add else None
        if bias is not None and bias.size == 1:
            bias = np.broadcast_to(bias, weight.shape[1:])
        if at == 1:
            return Layer(weight, bias, "IO", -1, -1, held=held), [node.input[0]]
        return Layer(weight, None, "OI", -2, -2, held=held), [node.input[1]]

    def _summand(self, matmul: NodeProto) -> NodeProto | None:
        """Return the Add of a bias that is the only reader of a MatMul by a constant."""
        out = matmul.output[0]
        weight = self.constants.get(matmul.input[1])
        if weight is None or weight.ndim != 2 or self.uses[out] != 1 or out not in self._readers:
            return None
        (node,) = self._readers[out]
        if node.op_type != "Add" or not is_onnx(node):
            return None
        summand, rank = self._summand_values(node), self.rank(out)
        if summand is None or summand.size not in (1, weight.shape[1]):
            return None
        if summand.ndim and summand.shape[-1] != summand.size:
            return None
        return node if summand.ndim <= 1 or (rank is not None and summand.ndim <= rank) else None

    def _summand_values(self, add: NodeProto) -> np.ndarray | None:
        found = [value for value in map(self.constants.get, add.input) if value is not None]
        return found[0] if len(found) == 1 else None

    def _parameters(self, node):
        """Return weight, bias, and why they must stay; no weight where it is not constant at all."""
        weight, bias = self.constants.get(node.input[1]), None
        if weight is None:
            return None, None, f"its weight {self.constants.why_not(node.input[1])}"
        held = self._held(node.input[1], weight)
        if len(node.input) > 2 and node.input[2]:
            bias = self.constants.get(node.input[2])
            if bias is None:
                held = held or f"its bias {self.constants.why_not(node.input[2])}"
        return weight, bias, held

    def _held(self, name: str, weight: np.ndarray) -> str:
        if weight.dtype.name not in SIGNIFICAND_BITS:
            return f"its weight {name!r} is {weight.dtype}"
        return f"its weight {name!r} is shared" if self.uses[name] > 1 else ""

    def _scaling(self, origin):
        """Mul, Add, Sub, Div with one constant operand."""
        (node,) = origin
        first, second = (self.constants.get(name) for name in node.input)
        if (first is None) == (second is None):
            return None
        constant, data = (first, node.input[1]) if second is None else (second, node.input[0])
        if constant.dtype.name not in SIGNIFICAND_BITS:
            return None
        match node.op_type, second is not None:
            case "Mul", _:
                scaling = Scaling(factor=constant)
            case "Add", _:
                scaling = Scaling(summand=constant)
            case "Sub", True:
                scaling = Scaling(summand=-constant)
            case "Sub", False:
                scaling = Scaling(factor=np.array(-1.0), summand=constant)
            case "Div", True:
                scaling = Scaling(factor=constant, divides=True)
            case _:
                return None
        return scaling, [data]

    def _identity(self, origin):
        return Same(), [origin[0].input[0]]

    def _dropout(self, origin):
        (node,) = origin
        training = self.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.array(False)
        if training is None or training.any() or any(self.uses[name] for name in node.output[1:]):
            return None
        return Same(), [node.input[0]]

    def _transpose(self, origin):
        (node,) = origin
        rank = self.rank(node.input[0])
        perm = attribute(node, "perm", None) or (rank and list(reversed(range(rank))))
        return (Transpose(tuple(perm)), [node.input[0]]) if perm else None

    def _flatten(self, origin):
        (node,) = origin
        if attribute(node, "axis", 1) == 1:
            return Flatten(), [node.input[0]]
        return self._reshape(origin)

    def _reshape(self, origin):
        (node,) = origin
        data = [node.input[0]]
        before, after = self._shapes.get(node.input[0]), self._shapes.get(node.output[0])
        target = self.constants.get(node.input[1]) if node.op_type == "Reshape" else None
        if target is not None and target.tolist() == [0, -1] and not attribute(node, "allowzero", 0):
            return Flatten(), data
        return None if before is None or after is None else (Reshape(before, after), data)

    def _pool(self, origin):
        (node,) = origin
        if len(node.output) > 1 and self.uses[node.output[1]]:
            return None  # the places of the largest
        axes = tuple(range(2, 2 + len(attribute(node, "kernel_shape", ()))))
        pads = any(attribute(node, "pads", ())) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
        counted = attribute(node, "count_include_pad", 0) and (pads or attribute(node, "ceil_mode", 0))
        return Pool(axes, padded=bool(counted), largest=node.op_type == "MaxPool"), [node.input[0]]

    def _global_pool(self, origin):
        (node,) = origin
        if (rank := self.rank(node.input[0])) is None:
            return None
        return Pool(tuple(range(2, rank)), largest=node.op_type == "GlobalMaxPool"), [node.input[0]]

    def _reduce(self, origin):
        (node,) = origin
        axes = attribute(node, "axes", None)
        if axes is None and len(node.input) > 1 and (given := self.constants.get(node.input[1])) is not None:
            axes = given.tolist()
        if not axes:
            return None
        keeps = bool(attribute(node, "keepdims", 1))
        return Pool(tuple(axes), keeps, largest=node.op_type == "ReduceMax"), [node.input[0]]

    def _resize(self, origin):
        (node,) = origin
        before, after = self._shapes.get(node.input[0]), self._shapes.get(node.output[0])
        if before is None or after is None or attribute(node, "mode", b"nearest") not in (b"nearest", b"linear"):
            return None
        if attribute(node, "coordinate_transformation_mode", b"") == b"tf_crop_and_resize":
            return None  # it gives a constant beside the input
        if attribute(node, "keep_aspect_ratio_policy", b"stretch") != b"stretch":
            return None
        # A scale near 1 can leave a size as it was, and take neighbours together all the same.
        scales, at = attribute(node, "scales", ()), 1 if self.opset < 11 else 2
        if len(node.input) > at and node.input[at] and (scales := self.constants.get(node.input[at])) is None:
            return None
        rank, pairs = len(before), enumerate(zip(before, after, strict=True))
        scaled = zip(attribute(node, "axes", range(rank)), scales, strict=False)
        moved = {axis % rank for axis, scale in scaled if scale != 1}
        axes = tuple(axis for axis, (old, new) in pairs if old is None or old != new or axis in moved)
        return Pool(axes), [node.input[0]]

    def _pad(self, origin):
        (node,) = origin
        pads, value, axes = attribute(node, "pads", None), attribute(node, "value", 0.0), None
        if pads is None:
            given = [self.constants.get(name) if name else None for name in node.input[1:]]
            if given[0] is None or any(n and g is None for n, g in zip(node.input[1:], given, strict=True)):
                return None
            pads = given[0].tolist()
            value = float(given[1].item()) if len(given) > 1 and given[1] is not None else 0.0
            axes = given[2].tolist() if len(given) > 2 and given[2] is not None else None
        rank = len(pads) // 2
        axes = range(rank) if axes is None else axes
        padded = tuple(axis for i, axis in enumerate(axes) if pads[i] or pads[i + rank])
        constant = attribute(node, "mode", b"constant") == b"constant"
        return None if constant and value else (Pool(padded, padded=constant), [node.input[0]])

    def _slice(self, origin):
        (node,) = origin
        starts, axes = attribute(node, "starts", None), attribute(node, "axes", None)
        if starts is None:
            given = [self.constants.get(name) if name else None for name in node.input[1:]]
            if any(n and g is None for n, g in zip(node.input[1:], given, strict=True)):
                return None
            starts, axes = given[0], given[2] if len(given) > 2 else None
        axes = range(len(starts)) if axes is None else axes
        return Pool(tuple(int(axis) for axis in axes)), [node.input[0]]

    def _concat(self, origin):
        (node,) = origin
        return Concat(attribute(node, "axis", 1)), list(node.input)

    def _split(self, origin):
        (node,) = origin
        return Split(attribute(node, "axis", 0)), [node.input[0]]


READ = {
    "BatchNormalization": Reader._batch_norm,
    "Conv": Reader._conv,
    "ConvTranspose": Reader._conv_transpose,
    "Gemm": Reader._gemm,
    "MatMul": Reader._matmul,
    **dict.fromkeys(("Mul", "Add", "Sub", "Div"), Reader._scaling),
    "Identity": Reader._identity,
    "Dropout": Reader._dropout,
    "Transpose": Reader._transpose,
    "Flatten": Reader._flatten,
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze"), Reader._reshape),
    **dict.fromkeys(("AveragePool", "MaxPool"), Reader._pool),
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), Reader._global_pool),
    **dict.fromkeys(("ReduceMean", "ReduceMax"), Reader._reduce),
    **dict.fromkeys(("Resize", "Upsample"), Reader._resize),
    "Pad": Reader._pad,
    "Slice": Reader._slice,
    "Concat": Reader._concat,
    "Split": Reader._split,
}
