"""PyTorch's fx graphs, of traced modules and of exported programs, as the graph that `graph.fold` decides on.

    Translation(graph, constants)   one Node per operation, `origin` its fx node: what it does, what it must not do
    Constants                       parameters and constant tensors by the fx node that reads them

An operation that writes to its input lets nothing pass, and what is written to later is not read later than before.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn

from ..graph import (
    BatchNorm,
    Concat,
    Flatten,
    Graph,
    Layer,
    Node,
    Opaque,
    Pool,
    Reshape,
    Same,
    Scaling,
    Split,
    Transpose,
    Value,
)
from .layers import (
    LAYERS,
    NORMS,
    has_hooks,
    held_layer,
    kind_of,
    layer_op,
    module_op,
    norm_held,
    norm_op,
    note_rank,
    pad_op,
    pool_op,
    to_array,
    to_tensor,
    unusable,
)
from .shapes import ELEMENTWISE, UNARY, infer_shapes


class Constants(Protocol):
    """The tensors that an fx graph reads and nobody passes in."""

    def get(self, node: fx.Node) -> torch.Tensor | None:
        """Return the tensor of this node, None if it is none."""

    def path(self, node: fx.Node) -> str:
        """Return where the tensor of this node stands in the model."""

    def own(self, node: fx.Node) -> bool:
        """Say whether nothing but one use of this node reads the tensor."""

    def set(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """Replace the tensor."""

    def add(self, like: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        """Return a node for a new parameter, beside that of `like`."""

    def drop(self, node: fx.Node) -> None:
        """Erase a node that has no users any more, and its tensor."""


_SYNONYMS = {
    "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "concat": "cat", "concatenate": "cat",
    "dropout_": "dropout", "feature_dropout": "dropout", "feature_dropout_": "dropout",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d", "_adaptive_avg_pool3d": "adaptive_avg_pool3d",
}  # fmt: skip
_METADATA = {"size", "dim", "ndim", "shape", "device", "dtype", "numel", "ndimension", "sym_size", "sym_numel"}
_PYTHON = {
    operator.add: "add", operator.sub: "sub", operator.mul: "mul", operator.truediv: "div", operator.neg: "neg",
    F.batch_norm: "F.batch_norm", F.dropout: "dropout", F.pad: "pad",
    F.max_pool1d: "max_pool1d", F.max_pool2d: "max_pool2d", F.max_pool3d: "max_pool3d",
    F.relu: "relu", F.relu6: "relu6", F.leaky_relu: "leaky_relu", F.silu: "silu", F.sigmoid: "sigmoid", F.tanh: "tanh",
    F.hardswish: "hardswish", F.hardtanh: "hardtanh", F.elu: "elu",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d", F.adaptive_avg_pool3d: "adaptive_avg_pool3d",
}  # fmt: skip
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_AVG = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_MAX = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "linear": ("input", "weight", "bias"),
    "addmm": ("bias", "input", "weight"),
    "mm": ("input", "weight"),
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "convolution": (*_CONV[:6], "transposed", "output_padding", "groups"),
    "F.batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "batch_norm": ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn"),
    "_native_batch_norm_legit_no_training":
        ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps"),
    "dropout": ("input", "p", "training", "inplace"),
    "pad": ("input", "pad", "mode", "value"),
    "contiguous": ("input", "memory_format"),
    "clone": ("input", "memory_format"),
    "detach": ("input",),
    "flatten": ("input", "start_dim", "end_dim"),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "transpose": ("input", "dim0", "dim1"),
    "t": ("input",),
    **{f"avg_pool{n}d": _AVG for n in (1, 2, 3)},
    **{f"max_pool{n}d": _MAX for n in (1, 2, 3)},
    **{f"adaptive_avg_pool{n}d": ("input", "output_size") for n in (1, 2, 3)},
    "cat": ("tensors", "dim"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("input", "sizes", "dim"),
    "split_with_sizes": ("input", "sizes", "dim"),
    "neg": ("input",),
    **dict.fromkeys(("add", "sub", "mul", "div"), ("input", "other", "alpha", "rounding_mode")),
}  # fmt: skip
_SHAPING = {"view", "reshape", "squeeze", "unsqueeze", "permute", "_unsafe_view"}


def name_of(node: fx.Node) -> str:
    """Return the name that an operation has as method, function and aten operation alike."""
    if node.op == "call_method":
        name = str(node.target)
    elif isinstance(node.target, torch._ops.OpOverload):
        name = node.target.overloadpacket.__name__ if node.target.namespace == "aten" else ""
    elif node.target in _PYTHON:
        return _PYTHON[node.target]  # type: ignore[index]
    else:
        ours = getattr(node.target, "__module__", None) in ("torch", "torch.functional", "torch._C._nn", None)
        name = getattr(node.target, "__name__", "") if ours else ""
    return _SYNONYMS.get(name, name)


def _arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operation in `_ARGUMENTS`, by name."""
    return dict(zip(_ARGUMENTS[name_of(node)], node.args, strict=False)) | node.kwargs


def shape_of(node: fx.Node) -> tuple[int | None, ...] | None:
    """Return what is known of the shape of what `node` gives."""
    value = node.meta.get("val")
    shape = value.shape if isinstance(value, torch.Tensor) else node.meta.get("fastbn_shape")
    return None if shape is None else tuple(size if isinstance(size, int) else None for size in shape)


def written(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """Return the inputs that an operation may write to."""
    first = [arg for arg in node.args[:1] if isinstance(arg, fx.Node)]
    if node.op == "call_method":
        name = str(node.target)
        return first if name.endswith("_") and not name.startswith("__") else []
    if node.op == "call_module":
        module = modules[str(node.target)]
        if (has_hooks(module) and not kind_of(module, (*LAYERS, *NORMS))) or (
            any(getattr(m, "inplace", False) for m in module.modules()) and not isinstance(module_op_of(module), Same)
        ):
            return list(node.all_input_nodes)
        return []
    if node.op != "call_function":
        return []
    target: Any = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return list(node.all_input_nodes)
    if isinstance(target, torch._ops.OpOverload):
        if name_of(node) == "dropout" and node.args[2:] == (False,):
            return []
        return [
            value
            for place, argument in enumerate(target._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for value in [node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)]
            if isinstance(value, fx.Node)
        ]
    module_name = getattr(target, "__module__", None) or "torch"
    if module_name.split(".")[0] not in ("torch", "_operator", "builtins", "math"):
        return list(node.all_input_nodes)
    if isinstance(node.kwargs.get("out"), fx.Node):
        return [*first, node.kwargs["out"]]  # type: ignore[list-item]
    name = getattr(target, "__name__", "")
    if module_name == "_operator":
        return first if name == "setitem" or (name[:1] == "i" and hasattr(operator, name[1:])) else []
    return first if name.endswith("_") or _inplace(target, node) else []


def _inplace(target: Callable[..., Any], node: fx.Node) -> bool:
    try:
        bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return bool(node.kwargs.get("inplace", False))
    name = getattr(target, "__name__", "")
    at_rest = name == "dropout" and bound.arguments.get("training", True) is False
    return bool(bound.arguments.get("inplace", False)) and not at_rest


def module_op_of(module: nn.Module) -> Any:
    """Return what a module without parameters does."""
    return None if kind_of(module, (*LAYERS, *NORMS)) else module_op(module, Counter(), False)


_NO_SHAPE = Opaque("the shape is not known, give example_inputs=")


class Translation:
    """Hold the Graph of an fx graph, with fx nodes as origins.

    `constants` gives the tensors that the graph reads, `modules` those it calls, `places` how often each stands in
    the model; `guards` says whether layers that are modules can refuse inputs.
    """

    def __init__(
        self, graph: fx.Graph, constants: Constants, modules: dict[str, nn.Module], places: Counter[int],
        guards: bool,
    ) -> None:  # fmt: skip
        self.constants, self.modules, self.places, self.guards = constants, modules, places, guards
        self.graph, self.values = Graph(), {}  # type: tuple[Graph, dict[fx.Node, Value]]
        self.uses: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op == "call_module":
                self.uses[str(node.target)] += 1
            elif node.op == "get_attr":  # a module whose parameter is read is not alone with it
                self.uses[str(node.target).rpartition(".")[0]] += 1
        self.sources: dict[fx.Node, fx.Node] = {}  # of operations with one input of data
        self.gone: dict[fx.Node, fx.Node] = {}  # what stands for an erased one
        self._find_writes(graph)
        dtypes = {t.dtype for n in graph.nodes if (t := constants.get(n)) is not None and t.is_floating_point()}
        dtypes |= {p.dtype for m in modules.values() for p in m.parameters() if p.is_floating_point()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        for node in graph.nodes:
            self._add(node)
        infer_shapes(self.graph)

    # Who writes to what

    def _find_writes(self, graph: fx.Graph) -> None:
        """Find which tensors may lie in one place, and when those places are last written to."""
        self.alias: dict[fx.Node, fx.Node] = {}
        writes = []
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            into = written(node, self.modules)
            self.alias[node] = node
            for other in into or ([] if self._is_fresh(node) else node.all_input_nodes):
                self.alias[self._root(other)] = self._root(node)
            writes += [(other, node) for other in into]
        self.last_write: dict[fx.Node, int] = {}
        for other, node in writes:
            root = self._root(other)
            self.last_write[root] = max(self.last_write.get(root, -1), self.order[node])

    def _root(self, node: fx.Node) -> fx.Node:
        while self.alias[node] is not node:
            node = self.alias[node]
        return node

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            kinds = (*LAYERS, *NORMS, *UNARY, nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd,
                     nn.modules.pooling._AdaptiveAvgPoolNd)  # fmt: skip
            return isinstance(module, kinds)
        if isinstance(node.target, torch._ops.OpOverload):
            views = any(argument.alias_info is not None for argument in node.target._schema.arguments)
            return not views and name_of(node) not in ("dropout", "contiguous", "reshape", "flatten")
        name = name_of(node)
        return name in ELEMENTWISE or (name in _ARGUMENTS and name not in
            ("dropout", "contiguous", "detach", "flatten", "transpose", "t", "chunk", "split", "split_with_sizes")
        )  # fmt: skip

    def _is_written_later(self, node: fx.Node) -> bool:
        return any(self.last_write.get(self._root(i), -1) > self.order[node] for i in node.all_input_nodes)

    # One node

    def _add(self, node: fx.Node) -> None:
        if node.op == "output":
            for value in node.all_input_nodes:
                self._value(value).is_output = True
            return
        if node.op in ("placeholder", "get_attr"):
            self._value(node)
            return
        if node in self.values:  # a part of a Split, or the first result of a BatchNorm
            return
        op, data = self._op(node)
        name = str(node.target) if node.op == "call_module" else self._label(node, op)
        kind = type(self.modules[name]).__name__ if node.op == "call_module" else name_of(node) or node.name
        outputs = self._outputs(node, op)
        self.sources[node] = data[0] if data else node
        added = self.graph.add(kind, name, op, [self._value(value) for value in data], outputs, node)
        if node.op == "call_module" and isinstance(op, BatchNorm) and not op.held:
            note_rank(self.modules[name], (*added.inputs, *added.outputs))

    def _label(self, node: fx.Node, op: Any) -> str:
        """Return the name of a function: where its parameters stand, if it has its own."""
        if not isinstance(op, (Layer, BatchNorm)) or op.held:
            return node.name
        key = "weight" if isinstance(op, Layer) else "running_mean"
        a = _arguments_of(node)
        path = self.constants.path(untransposed(a[key])[0]).rpartition(".")[0]
        return path or node.name

    def _value(self, node: fx.Node) -> Value:
        if node not in self.values:
            self.values[node] = Value(node.name, shape_of(node))
        return self.values[node]

    def _outputs(self, node: fx.Node, op: Any) -> list[Value]:
        if isinstance(op, Split):
            sizes = self._split_sizes(node)
            outputs = [Value(f"{node.name}[{i}]", shape) for i, shape in enumerate(sizes)]
            for user in node.users:
                self.values[user] = outputs[user.args[1]]  # type: ignore[index]
            return outputs
        value = self._value(node)
        if isinstance(op, BatchNorm) and name_of(node).startswith("_native"):
            for user in node.users:
                self.values[user] = value
            value.shape = next((shape_of(user) for user in node.users if user.args[1] == 0), None)
        return [value]

    def _split_sizes(self, node: fx.Node) -> list[tuple[int | None, ...] | None]:
        """Return the shapes of the parts, or none if they are not known."""
        parts = node.meta.get("val")
        if isinstance(parts, (list, tuple)):
            return [tuple(s if isinstance(s, int) else None for s in part.shape) for part in parts]
        return list(node.meta.get("fastbn_shapes", ()))

    def _op(self, node: fx.Node) -> tuple[Any, Sequence[fx.Node]]:
        """Return what folding must know of an operation, and which inputs are data."""
        data = node.all_input_nodes
        if node.op == "call_module":
            return self._module_op(node)
        name = name_of(node)
        if name in _METADATA or (node.target is getattr and node.args[1] in _METADATA):
            return None, ()
        if name in _SHAPING:
            return self._shaping(name, node), [node.args[0]]  # type: ignore[list-item]
        if node.target is operator.getitem and data and name_of(data[0]) in ("chunk", "split", "split_with_sizes"):
            return _NO_SHAPE, data  # else it would be a part of a Split
        if name not in _ARGUMENTS or len(node.args) > len(_ARGUMENTS[name]):
            return None, data
        arguments = _arguments_of(node)
        if not arguments.keys() <= {*_ARGUMENTS[name]}:
            return None, data
        x = arguments.get("input")
        try:
            if name in ("add", "sub", "mul", "div"):
                return self._scaling(name, node, arguments)
            if name == "cat":
                tensors = arguments["tensors"]
                if any(not isinstance(t, fx.Node) for t in tensors):
                    return None, data
                return Concat(arguments.get("dim", 0)), tensors
            if not isinstance(x, fx.Node):
                return None, data
            return self._function(name, node, x, arguments), [x]
        except _Unknown:
            return None, data

    def _module_op(self, node: fx.Node) -> tuple[Any, Sequence[fx.Node]]:
        target, data = str(node.target), node.all_input_nodes
        module = self.modules[target]
        op = module_op(module, self.places, self.guards)
        if isinstance(op, (Layer, BatchNorm)):
            parts = target.split(".")  # a module around it may be called too
            if not op.held and sum(self.uses[".".join(parts[:n])] for n in range(1, len(parts) + 1)) > 1:
                op.held = "it is used more than once"
            if isinstance(op, BatchNorm) and not op.held and self._is_written_later(node):
                op.held = "what it reads is changed in place later"
            return op, data[:1]
        return (op, data) if len(data) == 1 else (None, data)

    def _constant(self, value: Any) -> torch.Tensor | None:
        """Return a tensor that never changes, or None where there is None; raise _Unknown for any other argument."""
        if value is None:
            return None
        tensor = self.constants.get(value) if isinstance(value, fx.Node) else None
        if tensor is None or unusable(tensor) or self._root(value) in self.last_write:
            raise _Unknown
        return tensor

    def _function(self, name: str, node: fx.Node, x: fx.Node, a: dict[str, Any]) -> Any:
        if "batch_norm" in name:
            return self._norm(name, node, a)
        if "weight" in a:
            return self._layer(name, a)
        match name:
            case "contiguous" | "clone" | "detach":
                return Same()
            case "dropout":
                return Same() if a.get("training", True) is False else None
            case "pad":
                return pad_op(a["pad"], a.get("mode", "constant"), a.get("value"))
            case "flatten":
                if a.get("start_dim", 0) == 1 and a.get("end_dim", -1) == -1:
                    return Flatten()
                return self._reshape(node, x)
            case "t" | "transpose":
                shape = shape_of(x)
                if shape is None:
                    return _NO_SHAPE
                perm = list(range(len(shape)))
                i, j = (0, 1) if name == "t" else (a["dim0"], a["dim1"])
                perm[i], perm[j] = perm[j], perm[i]
                return Transpose(tuple(perm))
            case "mean":
                dim = a.get("dim")
                if dim is None or a.get("dtype") is not None:
                    return None
                return Pool(tuple(dim) if isinstance(dim, (list, tuple)) else (dim,), bool(a.get("keepdim", False)))
            case "neg":
                return None if self._is_written_later(node) else Scaling(factor=np.array(-1.0))
            case "chunk" | "split" | "split_with_sizes":
                known = len(self._split_sizes(node))
                parts = [u.args[1] for u in node.users if u.target is operator.getitem and u.args[0] is node]
                usable = len(parts) == len(node.users) and all(isinstance(i, int) and 0 <= i < known for i in parts)
                return Split(a.get("dim", 0)) if usable else None if known else _NO_SHAPE
        n = int(name[-2])
        if name.startswith("avg"):
            if a.get("divisor_override") is not None:
                return None
            return pool_op(n, a.get("padding", 0), a.get("count_include_pad", True))
        return pool_op(n, largest=name.startswith("max")) if not a.get("return_indices", False) else None

    def _norm(self, name: str, node: fx.Node, a: dict[str, Any]) -> BatchNorm:
        training = False if name.startswith("_native") else a.get("training", False)
        held = norm_held(training, a.get("running_mean"), a.get("running_var"))
        names = "running_mean", "running_var", "weight", "bias"
        if not held and self._is_written_later(node):
            held = "what it reads is changed in place later"
        if name.startswith("_native") and any(u.target is not operator.getitem or u.args[1] != 0 for u in node.users):
            held = held or "its further results are used"
        try:
            tensors = [self._constant(a.get(key)) for key in names]
            if not held and not all(self.constants.own(a[key]) for key in names if a.get(key) is not None):
                held = "it shares its parameters"
        except _Unknown:
            held = held or "its parameters or statistics are no constants"
        if held:
            return BatchNorm(None, 1, held)  # type: ignore[arg-type]
        mean, var, weight, bias = tensors
        return norm_op(mean, var, weight, bias, a.get("eps", 1e-5))

    def _layer(self, name: str, a: dict[str, Any]) -> Layer | None:
        """Return a layer whose parameters are constants."""
        weight, layout = a["weight"], None
        if name in ("mm", "addmm"):
            if a.get("alpha", 1) != 1:
                return None
            weight, layout = untransposed(weight)
        tensors = self._constant(weight), self._constant(a.get("bias"))
        if not all(self.constants.own(node) for node in (weight, a.get("bias")) if node is not None):
            return held_layer("it shares its parameters")
        transposed = a.get("transposed", name.startswith("conv_transpose"))
        if tensors[0] is None or (tensors[1] is not None and tensors[1].ndim != 1) or not isinstance(transposed, bool):
            return None
        groups = a.get("groups", 1)
        return layer_op(*tensors, a.get("padding", 0), groups, transposed=transposed, layout=layout)

    def _scaling(self, name: str, node: fx.Node, a: dict[str, Any]) -> tuple[Any, Sequence[fx.Node]]:
        x, c = a["input"], a["other"]
        data = node.all_input_nodes
        if a.get("alpha", 1) != 1 or a.get("rounding_mode") is not None or self._is_written_later(node):
            return None, data
        swapped = not isinstance(x, fx.Node) or self.constants.get(x) is not None
        if swapped:
            x, c = c, x
        if not isinstance(x, fx.Node) or (swapped and name == "div"):
            return None, data
        if isinstance(c, fx.Node):
            tensor = self._constant(c)
            if tensor is None or not self._keeps_dtype(x, tensor) or not self._keeps_rank(x, tensor):
                return None, data
            constant = to_array(tensor).astype(np.float64)
        elif isinstance(c, (int, float)):
            constant = np.array(float(c))
        else:
            return None, data
        match name:
            case "add":
                return Scaling(summand=constant), [x]
            case "sub":
                return (Scaling(np.array(-1.0), constant) if swapped else Scaling(summand=-constant)), [x]
            case _:
                return Scaling(factor=constant, divides=name == "div"), [x]

    def _keeps_dtype(self, x: fx.Node, constant: torch.Tensor) -> bool:
        if constant.ndim == 0:
            return True
        value = x.meta.get("val")
        dtype = value.dtype if isinstance(value, torch.Tensor) else x.meta.get("fastbn_dtype", self.dtype)
        return dtype is not None and torch.promote_types(dtype, constant.dtype) == dtype

    @staticmethod
    def _keeps_rank(x: fx.Node, constant: torch.Tensor) -> bool:
        shape = shape_of(x)
        return constant.numel() > 1 or constant.ndim <= (1 if shape is None else len(shape))

    def _shaping(self, name: str, node: fx.Node) -> Any:
        x, *rest = node.args
        if not isinstance(x, fx.Node) or node.kwargs:
            return None
        sizes: Any = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        if any(isinstance(size, torch.dtype) for size in sizes):
            return None  # a view of the same bits
        if name == "permute":
            return Transpose(tuple(p % len(sizes) for p in sizes))
        if name in ("view", "reshape") and len(sizes) == 2 and sizes[1] == -1 and _is_size(sizes[0], x):
            return Flatten()
        return self._reshape(node, x)

    @staticmethod
    def _reshape(node: fx.Node, x: fx.Node) -> Reshape | Opaque:
        before, after = shape_of(x), shape_of(node)
        return _NO_SHAPE if before is None or after is None else Reshape(before, after)


def operations(graph: fx.Graph) -> int:
    """Count the operations of an fx graph."""
    return sum(node.op.startswith("call") for node in graph.nodes)


class _Unknown(Exception):
    """An argument that is no constant."""


def untransposed(weight: Any) -> tuple[Any, str]:
    """Return the constant behind the second matrix of a product, and its layout."""
    if isinstance(weight, fx.Node) and len(weight.users) == 1:
        arguments = weight.args[1:]
        swaps: dict[str, list[Any]] = {"t": [()], "transpose": [(0, 1), (1, 0)], "permute": [([1, 0],)]}
        if arguments in swaps.get(name_of(weight), ()):
            return weight.args[0], "OI"
    return weight, "IO"


def rewrite(node: Node, constants: Constants) -> None:
    """Give a function's constants the values that its node has folded, or taken in, if any."""
    origin: fx.Node = node.origin
    layer = node.op if isinstance(node.op, Layer) else None
    if not (layer.folded if layer else isinstance(node.op, BatchNorm) and node.op.taken):
        return
    name = name_of(origin)
    arguments = _arguments_of(origin)
    if layer is not None and layer.folded is not None:
        weight, _ = untransposed(arguments["weight"]) if name in ("mm", "addmm") else (arguments["weight"], None)
        new = {"weight": layer.folded.weight, "bias": layer.folded.bias}
        places, like = {"weight": weight, "bias": arguments.get("bias")}, weight
    else:
        merged = node.op.merged()
        new = {"weight": merged.gamma, "bias": merged.beta, "running_mean": merged.mean}
        places, like = {key: arguments.get(key) for key in new}, arguments["running_mean"]
    added = {}
    for key, values in new.items():
        tensor = constants.get(places[key]) if places[key] is not None else None
        if tensor is not None:
            constants.set(places[key], to_tensor(values, tensor))
        else:
            added[key] = constants.add(like, key, to_tensor(values, torch.empty(0)))
    if not added:
        return
    if name == "mm":
        matrices = origin.args
        origin.target = torch.addmm if origin.target is torch.mm else torch.ops.aten.addmm.default
        origin.args = (added["bias"], *matrices)
        return
    names = _ARGUMENTS[name]
    args = [added.get(key, value) for key, value in zip(names, origin.args, strict=False)]
    for key in names[len(args) :]:
        if key not in added:
            break
        args.append(added.pop(key))
    origin.args = tuple(args)
    origin.kwargs = origin.kwargs | {key: value for key, value in added.items() if key not in names[: len(args)]}


def remove(node: Node, translation: Translation, constants: Constants) -> None:
    """Let the readers of a removed operation read its data, and erase what only it used."""
    origin: fx.Node = node.origin
    data = translation.sources.pop(origin)
    while data in translation.gone:
        data = translation.gone[data]
    for user in list(origin.users):
        if translation.values.get(user) is translation.values[origin]:  # the first result of several
            user.replace_all_uses_with(data)
            origin.graph.erase_node(user)
            translation.gone[user] = data
    translation.gone[origin] = data
    origin.replace_all_uses_with(data)
    read = origin.all_input_nodes
    origin.graph.erase_node(origin)
    for other in read:
        if not other.users and constants.get(other) is not None:
            constants.drop(other)


def _is_size(value: Any, x: fx.Node) -> bool:
    """Say whether a value is the length of axis 0 of x."""
    if not isinstance(value, fx.Node):
        return False
    if name_of(value) == "size" or name_of(value) == "sym_size":
        return value.args == (x, 0)
    if value.target is not operator.getitem or value.args[1] != 0:
        return False
    shape = value.args[0]
    if not isinstance(shape, fx.Node) or shape.args[0] is not x:
        return False
    return (name_of(shape) == "size" and len(shape.args) == 1) or shape.args[1:] == ("shape",)
