"""Fold the BatchNorms of Keras 3 models, convert single layers, load and save models; whatever the backend.

    fold          Sequential and functional models, nested ones too       -> (new model, ModelReport)
    from_layer    keras.layers.BatchNormalization -> fastbn.BatchNorm
    to_layer      fastbn.BatchNorm -> keras.layers.BatchNormalization
    load, save    .keras, .h5 and .hdf5; .keras

A model is read twice from the record Keras keeps of its calls: `_Reader` turns it into a `Graph`, `_Builder` calls
new layers in the same way, without those that the fold has removed.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

try:
    import keras
    from keras.src.models.functional import Functional  # has no public name
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'fastbn.interop.keras needs keras: pip install "fastbn[keras]"'
        if error.name == "keras"
        else f"fastbn.interop.keras: Keras's backend needs {error.name}; KERAS_BACKEND chooses another",
        name=error.name,
    ) from error

from ..affine import EXACT, Affine, BatchNormParams
from ..fold import Folded
from ..layer import BatchNorm as FastBatchNorm
from .graph import BatchNorm, Concat, Graph, Layer, Node, Pool, Reshape, Same, Scaling, Transpose, Value
from .graph import fold as fold_graph
from .report import Decision, ModelReport

__all__ = ["fold", "from_layer", "load", "save", "to_layer"]


def fold(model: Any) -> tuple[Any, ModelReport]:
    """Fold every BatchNormalization that can be into the weights beside it: f(x) = model(x) at inference.

    y = scale·x + shift per channel, scale = γ/√(σ² + ε), shift = β - scale·μ (Ioffe & Szegedy 2015, Algorithm 2,
    line 11), goes into the Dense, Conv1D-3D, their transposed, depthwise and separable kinds behind or in front of
    it, through Dropout, Flatten, Reshape, pooling, Concatenate and others that let it pass, or into another
    BatchNormalization.

    Parameters
    ----------
    model : keras.Sequential or functional keras.Model
        Built; it stays as it is. Such models inside it are folded too, one called several times on its own.

    Returns
    -------
    model : keras.Sequential or functional keras.Model
        New layers of the same names, with the same inputs and outputs, not compiled. A layer that was removed
        leaves a keras.layers.Identity of its name where it gave an output of a functional model its name, or
        another dtype than it read. Weights are rounded once, to their own dtypes.
    report : ModelReport
        Its nodes are layers and operations; those of a model "a" inside have names "a/b".

    Raises
    ------
    TypeError
        The model is no keras.Model, or has a call() of its own, which nothing can be known about.
    ValueError
        The model is not built; var + eps ≤ 0 or NaN in a BatchNormalization, which is named; a layer cannot be made
        again from its config.

    Notes
    -----
    What stays as it was, with the reason in the report: a layer called more than once, one whose variables another
    layer has too, quantised or with LoRA weights; a BatchNormalization called with training=True; everything in
    layers of other classes than Keras's own. A mask changes nothing that a BatchNormalization gives at inference.

    Examples
    --------
    >>> import keras, fastbn.interop.keras                                                         # doctest: +SKIP
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    ...                                                                                            # doctest: +SKIP
    >>> folded, report = fastbn.interop.keras.fold(model)                                          # doctest: +SKIP
    >>> [layer.name for layer in folded.layers], report.summary()                                  # doctest: +SKIP
    (['dense'], '1 BatchNorm: 1 folded; nodes 2 -> 1, parameters 16 -> 8')
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model: expected a Sequential or functional keras.Model, got {type(model).__name__}")
    if not _is_transparent(model):
        if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
            raise ValueError(f"model: expected one that is built for one input, got the Sequential {model.name!r}")
        raise TypeError(
            f"model: expected a Sequential or functional keras.Model, got {type(model).__name__}, whose call() is "
            "its own: its layers cannot be known"
        )
    reader = _Reader(model)
    decisions = reader.fold()
    builder = _Builder(reader.changes)
    new = builder.build(model)
    before, after = (sum(1 for _ in _leaves(m)) for m in (model, new))
    return new, ModelReport(tuple(decisions), before, after, model.count_params(), new.count_params())


# What Keras keeps of a model ------------------------------------------------------------------------------------


def _is_transparent(op: Any) -> bool:
    """Say whether `op` is a model that does what Keras has recorded."""
    if isinstance(op, keras.Sequential):
        return type(op).call is keras.Sequential.call and op._functional is not None
    return isinstance(op, Functional) and type(op).call is Functional.call


def _functional(model: Any) -> Any:
    return model._functional if isinstance(model, keras.Sequential) else model


def _calls(model: Any) -> Iterator[Any]:
    """Yield the calls that `model` makes, in the order Keras makes them: operation, arguments, outputs."""
    by_depth = _functional(model)._nodes_by_depth
    known = {id(tensor) for tensor in _functional(model).inputs}
    for depth in sorted(by_depth, reverse=True):
        for call in by_depth[depth]:
            if not call.is_input and all(id(tensor) in known for tensor in call.input_tensors):
                known.update(id(tensor) for tensor in call.outputs)
                yield call


def _leaves(model: Any) -> Iterator[Any]:
    """Yield every operation of `model` and of the models in it once."""
    seen: set[int] = set()

    def visit(model: Any) -> Iterator[Any]:
        for call in _calls(model):
            op = call.operation
            if id(op) in seen:
                continue
            seen.add(id(op))
            if _is_transparent(op):
                yield from visit(op)
            else:
                yield op

    return visit(model)


def _data(call: Any) -> Any:
    """Return what the operation is called on: a tensor, or a list of them."""
    arguments = call.arguments
    return arguments.args[0] if arguments.args else arguments.kwargs.get("inputs")


def _source(call: Any) -> Any:
    """Return the one tensor that a layer or operation is called on, its mask apart."""
    data = _data(call)
    return data if _is_tensor(data) else call.input_tensors[0]


def _bits(dtype: str) -> int:
    """Return the size of a floating-point type, 0 for others."""
    return int(dtype.rpartition("float")[2]) if keras.backend.is_float_dtype(dtype) else 0


def _is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def _array(value: Any) -> np.ndarray:
    """Return a copy of a variable or tensor, in its own dtype."""
    return np.array(keras.ops.convert_to_numpy(value))


def _constant(value: Any, dtype: str) -> np.ndarray:
    """Return a constant as a computation in `dtype` sees it."""
    tensor = keras.ops.cast(keras.ops.convert_to_tensor(value), dtype)
    return _array(tensor).astype(np.float64)


# From a model to a graph ----------------------------------------------------------------------------------------

_layers = keras.layers

# The letters of the kernel's axes, as fold_conv reads them; of the pointwise kernel where there are two.
_LAYOUTS = {
    _layers.Dense: "IO",
    _layers.Conv1D: "WIO",
    _layers.Conv2D: "HWIO",
    _layers.Conv3D: "DHWIO",
    _layers.Conv1DTranspose: "WOI",
    _layers.Conv2DTranspose: "HWOI",
    _layers.Conv3DTranspose: "DHWOI",
    _layers.DepthwiseConv1D: "WIM",
    _layers.DepthwiseConv2D: "HWIM",
    _layers.SeparableConv1D: "WIO",
    _layers.SeparableConv2D: "HWIO",
}
_SEPARABLE = {_layers.SeparableConv1D, _layers.SeparableConv2D}
_IDENTITIES = {  # at inference
    _layers.Identity,
    _layers.Dropout,
    _layers.SpatialDropout1D,
    _layers.SpatialDropout2D,
    _layers.SpatialDropout3D,
    _layers.AlphaDropout,
    _layers.GaussianDropout,
    _layers.GaussianNoise,
    _layers.ActivityRegularization,
}
_MAX_POOLING = {_layers.MaxPooling1D, _layers.MaxPooling2D, _layers.MaxPooling3D}
_GLOBAL_MAX_POOLING = {_layers.GlobalMaxPooling1D, _layers.GlobalMaxPooling2D, _layers.GlobalMaxPooling3D}
_GLOBAL_POOLING = _GLOBAL_MAX_POOLING | {
    _layers.GlobalAveragePooling1D,
    _layers.GlobalAveragePooling2D,
    _layers.GlobalAveragePooling3D,
}
_POOLING = _MAX_POOLING | {  # AveragePooling counts no zeros of its padding
    _layers.AveragePooling1D,
    _layers.AveragePooling2D,
    _layers.AveragePooling3D,
    _layers.Cropping1D,
    _layers.Cropping2D,
    _layers.Cropping3D,
    _layers.UpSampling1D,
    _layers.UpSampling2D,
    _layers.UpSampling3D,
}
_ZERO_PADDING = {_layers.ZeroPadding1D, _layers.ZeroPadding2D, _layers.ZeroPadding3D}


@dataclass
class _Separable(Layer):
    """A separable convolution, whose pointwise kernel takes all: the depthwise one lets a scale and a shift pass.

    Σ_k D[k, i, m]·(s_i·x + t_i) = s_i·(Σ_k D[k, i, m]·x) + t_i·Σ_k D[k, i, m], in channel i·M + m.
    """

    depthwise: np.ndarray = field(default_factory=lambda: np.empty(0))  # (*kernel, I, M)

    @property
    def in_channels(self) -> int:
        return self.depthwise.shape[-2]

    def _fold_before(self, affine: Affine, weight: np.ndarray, bias: np.ndarray | None) -> Folded:
        *_, channels, multiplier = self.depthwise.shape
        taps = self.depthwise.astype(np.float64).reshape(-1, channels * multiplier)
        if not np.isfinite(taps).all():
            raise ValueError("depthwise kernel: expected finite values")
        scale, shift = ([x for x in part for _ in range(multiplier)] for part in (affine.scale, affine.shift))
        with localcontext(EXACT):
            shift = [t * sum(map(Decimal, column)) for t, column in zip(shift, taps.T.tolist(), strict=True)]
        return super()._fold_before(Affine(scale, shift), weight, bias)


@dataclass
class _Change:
    """What the fold makes of an operation: gone, or with other settings and other values of its variables."""

    gone: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # by the layer's attribute


class _Reader:
    """Turns a model into graphs: one for it and the models it calls once, one for each model called several times."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.changes: dict[int, _Change] = {}  # by the operation's id, as all below
        self._times: Counter[int] = Counter({id(model): 1})  # calls in one call of the model
        self._training: set[int] = set()  # called with training=True
        self._order: dict[int, int] = {}
        self._hiding: set[int] = set()
        self._count(model, training=False)
        owners = ((id(v), id(op)) for op in _leaves(model) if isinstance(op, keras.Layer) for v in op.variables)
        self._owners = Counter(variable for variable, _ in set(owners))
        self._graphs: dict[int, Graph] = {}

    def _count(self, model: Any, training: bool) -> None:
        for call in _calls(model):
            op, given = call.operation, call.arguments.kwargs.get("training")
            trains = training or not (given is None or given is False)
            self._order.setdefault(id(op), len(self._order))
            self._times[id(op)] += 1
            if trains:
                self._training.add(id(op))
            if _is_transparent(op):
                self._count(op, trains)

    def fold(self) -> list[Decision]:
        """Fold all graphs, note the changes; return the decisions in the order of the model."""
        self._scope(self.model, "")
        decisions: dict[int, tuple[int, Decision]] = {}  # one for each layer, however often it is called
        for graph in self._graphs.values():
            norms = [node.origin for node in graph.nodes if isinstance(node.op, BatchNorm)]
            for norm, decision in zip(norms, fold_graph(graph), strict=True):
                decisions.setdefault(id(norm.layer), (self._order[id(norm.owner)], decision))
            for node in graph.nodes:
                self._note(node)
        return [decision for _, decision in sorted(decisions.values(), key=lambda pair: pair[0])]

    def _note(self, node: Node) -> None:
        """Note what became of a node."""
        match op := node.op:
            case BatchNorm() | Scaling() if node.removed:
                change = _Change(gone=True)
            case Layer() if op.folded is not None:
                kernel = "pointwise_kernel" if isinstance(op, _Separable) else "kernel"
                change = _Change(False, {"use_bias": True}, {kernel: op.folded.weight, "bias": op.folded.bias})
            case BatchNorm() if op.taken:
                new = op.merged()
                arrays = {"gamma": new.gamma, "beta": new.beta, "moving_mean": new.mean}
                change = _Change(False, {"scale": True, "center": True}, arrays)
            case _:
                return
        self.changes[id(node.origin.layer)] = change

    def _scope(self, model: Any, prefix: str) -> None:
        """Make the graph of `model`, each call of which is alike."""
        graph = self._graphs[id(model)] = Graph()
        inputs = [Value(tensor.name, tensor.shape) for tensor in _functional(model).inputs]
        for value in self._read(model, graph, prefix, inputs, self._times[id(model)]):
            value.is_output = True

    def _read(self, model: Any, graph: Graph, prefix: str, inputs: list[Value], times: int) -> list[Value]:
        """Append the calls of `model` to `graph`; return its outputs."""
        values = {id(tensor): value for tensor, value in zip(_functional(model).inputs, inputs, strict=True)}
        for call in _calls(model):
            op, name = call.operation, f"{prefix}{call.operation.name}"
            if not _is_transparent(op):
                self._append(call, name, graph, values, times)
                continue
            entries = self._entries(call, name, graph, values)
            if self._times[id(op)] == times and entries is not None:
                outputs = self._read(op, graph, f"{name}/", entries, times)
            else:
                if id(op) not in self._graphs:
                    self._scope(op, f"{name}/")
                outputs = [Value(name, tensor.shape) for tensor in call.outputs]
                read = [values[id(tensor)] for tensor in call.input_tensors]
                graph.add(type(op).__name__, name, None, read, outputs)
            values |= {id(tensor): value for tensor, value in zip(call.outputs, outputs, strict=True)}
        return [values[id(tensor)] for tensor in _functional(model).outputs]

    @staticmethod
    def _entries(call: Any, name: str, graph: Graph, values: dict[int, Value]) -> list[Value] | None:
        """Return what the inputs of a model that is called are, or None where Keras may sort or reshape them."""
        inner = _functional(call.operation)
        given = keras.tree.flatten(_data(call))
        if not all(map(_is_tensor, given)) or len(given) != len(inner.inputs):
            return None
        if isinstance(_data(call), dict) != isinstance(inner.input, dict):
            return None
        if any(len(a.shape) != len(b.shape) or a.dtype != b.dtype for a, b in zip(given, inner.inputs, strict=True)):
            return None
        _read_masks(call, name, graph, values, given)
        return [values[id(tensor)] for tensor in given]

    def _append(self, call: Any, name: str, graph: Graph, values: dict[int, Value], times: int) -> None:
        """Append one call to `graph`: as many nodes as the layer does things one after the other."""
        op, data, out = call.operation, _data(call), call.outputs
        kind, steps = type(op).__name__, self._steps(call, times) if len(out) == 1 else []
        if steps:
            read = list(data) if isinstance(data, (list, tuple)) else [_source(call)]
            _read_masks(call, name, graph, values, read)
        else:
            read, steps = call.input_tensors, [("", None, None)]
        here = [values[id(tensor)] for tensor in read]
        origin = _Origin(op, op)
        for number, (what, node, shape) in enumerate(steps):
            last = number == len(steps) - 1
            there = [Value(name, tensor.shape) for tensor in out] if last else [Value(name, shape)]
            graph.add(what or kind, name, node, here, there, origin)
            here = there
        values |= {id(tensor): value for tensor, value in zip(out, here, strict=True)}
        if steps[0][1] is None and isinstance(op, keras.Layer):
            self._append_hidden(op, name, graph)

    def _append_hidden(self, op: Any, name: str, graph: Graph) -> None:
        """Append the BatchNorms of which nothing is known but that they are there, tied to nothing."""
        if id(op) in self._hiding:
            return
        self._hiding.add(id(op))
        inside = [op] if isinstance(op, _layers.BatchNormalization) else op._flatten_layers(include_self=False)
        for norm in inside:
            if isinstance(norm, _layers.BatchNormalization):
                own = f"its class {type(op).__name__} is not Keras's own"
                held = own if norm is op else f"it is inside the {type(op).__name__} {op.name!r}"
                full = name if norm is op else f"{name}/{norm.name}"
                stub = BatchNorm(BatchNormParams(None, None, None, None), norm.axis, held)
                graph.add("BatchNormalization", full, stub, [Value(full)], [Value(full)], _Origin(norm, op))

    def _steps(self, call: Any, times: int) -> list[tuple[str, Any, Any]]:
        """Return what folding must know of a call: kind ("" for the class), op, shape in between; [] for nothing."""
        op, data, y = call.operation, _data(call), call.outputs[0]
        cls, held = type(op), self._held(op, times)
        joins = data if isinstance(data, (list, tuple)) else [data]
        if not isinstance(op, keras.Layer):
            return [] if held else _raw(call, y)
        if not all(map(_is_tensor, joins)) or (cls is not _layers.Concatenate and joins is data):
            return []
        x = joins[0]
        floats = all(keras.backend.is_float_dtype(tensor.dtype) for tensor in (x, y))
        if cls is _layers.BatchNormalization:
            if id(op) in self._training:
                held = "it is called with training=True, and normalises by the batch"
            elif not floats:
                held = held or f"it makes {y.dtype} of {x.dtype}"
            return [("", BatchNorm(_params(op), op.axis, held), None)]
        if cls in _LAYOUTS:
            layer = _layer(op, held)
            if _bits(x.dtype) > _bits(y.dtype):  # what a BatchNorm made small enough for it may be too large without
                layer.held_before = f"it makes {y.dtype} of {x.dtype}"
            if op.activation is keras.activations.linear:
                return [("", layer, None)]
            return [("", layer, y.shape), (f"{getattr(op.activation, '__name__', 'activation')} of {cls.__name__}",
                                           None, None)]  # fmt: skip
        if any(tensor.dtype != y.dtype for tensor in joins) or not floats:
            return []
        if cls in (_layers.Rescaling, _layers.Normalization) and not held:
            return _scaling(op)
        if id(op) in self._training:
            return []
        return _passing(op, x, y)

    def _held(self, op: Any, times: int) -> str:
        """Say why the variables of a layer must stay as they are."""
        if self._times[id(op)] != times:
            return "it is called more than once"
        if any(self._owners[id(variable)] > 1 for variable in getattr(op, "variables", ())):
            return "another layer has a variable of it"
        if mode := getattr(op, "quantization_mode", None):
            return f"it is quantised ({mode})"
        return "it has LoRA weights" if getattr(op, "lora_enabled", False) else ""


@dataclass
class _Origin:
    """The layer a node is of, and the one that the model calls: another where that hides it."""

    layer: Any
    owner: Any


def _read_masks(call: Any, name: str, graph: Graph, values: dict[int, Value], data: list[Any]) -> None:
    """Let `graph` know that what a call is given beside its data is read."""
    known = {id(tensor) for tensor in data}
    masks = [values[id(tensor)] for tensor in call.input_tensors if id(tensor) not in known]
    if masks:
        graph.add("mask", name, None, masks, [])


def _params(layer: Any) -> BatchNormParams:
    gamma, beta = (None if v is None else _array(v) for v in (layer.gamma, layer.beta))
    return BatchNormParams(gamma, beta, _array(layer.moving_mean), _array(layer.moving_variance), layer.epsilon)


def _layer(op: Any, held: str) -> Layer:
    cls, layout = type(op), _LAYOUTS[type(op)]
    axis = 1 if getattr(op, "data_format", "channels_last") == "channels_first" else -1
    padded = getattr(op, "padding", "valid") != "valid" and any(k > 1 for k in op.kernel_size)
    weight = np.zeros((0,) * len(layout)) if held else _array(op.pointwise_kernel if cls in _SEPARABLE else op.kernel)
    bias = _array(op.bias) if op.use_bias and not held else None
    common: Any = {"in_axis": axis, "out_axis": axis, "padded": padded, "held": held}
    if cls in _SEPARABLE:
        depthwise = np.zeros((0, 0, 0)) if held else _array(op.depthwise_kernel)
        return _Separable(weight, bias, layout, depthwise=depthwise, **common)
    return Layer(weight, bias, layout, groups=getattr(op, "groups", 1), transposed="OI" in layout, **common)


def _scaling(op: Any) -> list[tuple[str, Any, Any]]:
    """Return the constant factor and summand of a Rescaling or Normalization, as its compute dtype has them."""
    if type(op) is _layers.Rescaling:
        if np.ndim(op.scale) and keras.config.image_data_format() == "channels_first":
            return []  # it puts the factors, but not the offsets, on another axis
        return [("", Scaling(_constant(op.scale, op.compute_dtype), _constant(op.offset, op.compute_dtype)), None)]
    mean, variance = (_array(v).astype(np.float64) for v in (op.mean, op.variance))
    spread = np.maximum(np.sqrt(variance), keras.config.epsilon())
    return [("", Scaling(spread, mean) if op.invert else Scaling(1 / spread, -mean / spread), None)]


def _raw(call: Any, y: Any) -> list[tuple[str, Any, Any]]:
    """Return what folding must know of a keras.ops function that was called on tensors of the model."""
    op, data, tensors = call.operation, _data(call), call.input_tensors
    name = type(op).__name__ if type(op).__module__.startswith("keras.") else ""
    if any(tensor.dtype != y.dtype for tensor in tensors) or not keras.backend.is_float_dtype(y.dtype):
        return []
    if name == "Concatenate" and isinstance(data, (list, tuple)) and all(map(_is_tensor, data)):
        return [("", Concat(op.axis), None)]
    if len(tensors) != 1:
        return []
    x = tensors[0]
    if name in ("Reshape", "Squeeze", "ExpandDims"):
        return [("", Reshape(x.shape, y.shape), None)]
    if name == "Transpose":
        return [("", Transpose(tuple(op.axes or reversed(range(len(x.shape))))), None)]
    if len(call.arguments.args) != 2 or x.shape != y.shape:
        return []
    first = _is_tensor(data)
    constant = _constant(call.arguments.args[first], y.dtype)
    match name, first:
        case "Multiply", _:
            scaling = Scaling(constant)
        case "Add", _:
            scaling = Scaling(None, constant)
        case "Subtract", _:
            scaling = Scaling(None, -constant) if first else Scaling(np.array(-1.0), constant)
        case ("Divide" | "TrueDivide"), True:
            scaling = Scaling(constant, divides=True)
        case _:
            return []
    return [("", scaling, None)]


def _passing(op: Any, x: Any, y: Any) -> list[tuple[str, Any, Any]]:
    """Return how a layer that has no variables lets a map pass."""
    cls, rank = type(op), len(x.shape)
    first = getattr(op, "data_format", None) == "channels_first"
    spatial = tuple(range(2, rank)) if first else tuple(range(1, rank - 1))
    if cls in _IDENTITIES or (cls is _layers.Activation and op.activation is keras.activations.linear):
        return [("", Same(), None)]
    if cls is _layers.Concatenate:
        return [("", Concat(op.axis), None)]
    if cls is _layers.Permute:
        return [("", Transpose((0, *op.dims)), None)]
    if cls is _layers.Reshape:
        return [("", Reshape(x.shape, y.shape), None)]
    if cls is _layers.Flatten:
        if not first or rank < 3:
            return [("", Reshape(x.shape, y.shape), None)]
        perm = (0, *range(2, rank), 1)  # Keras puts the channels last first
        moved = tuple(x.shape[axis] for axis in perm)
        return [("", Transpose(perm), moved), ("", Reshape(moved, y.shape), None)]
    if cls is _layers.RepeatVector:
        once = (x.shape[0], 1, x.shape[1])
        return [("", Reshape(x.shape, once), once), ("", Pool((1,)), None)]
    if cls in _POOLING and getattr(op, "interpolation", "nearest") in ("nearest", "bilinear"):
        return [("", Pool(spatial, largest=cls in _MAX_POOLING), None)]
    if cls in _GLOBAL_POOLING:
        return [("", Pool(spatial, keeps_axes=op.keepdims, largest=cls in _GLOBAL_MAX_POOLING), None)]
    if cls in _ZERO_PADDING:
        return [("", Pool(spatial, padded=True), None)]
    return []


# From the changes to a model ------------------------------------------------------------------------------------


class _Builder:
    """Makes a model again, with new layers, without those that are gone."""

    def __init__(self, changes: dict[int, _Change]) -> None:
        self._changes = changes
        self._new: dict[int, Any] = {}  # by the id of the old one
        self._pairs: list[tuple[Any, Any]] = []

    def build(self, model: Any) -> Any:
        """Return the new model, with all its values."""
        new = self._model(model)
        for old, made in self._pairs:
            if isinstance(old, keras.Layer) and not _is_transparent(old):
                self._copy(old, made)
        for old, made in [(model, new), *reversed(self._pairs)]:  # a model hands it down to those it calls
            if isinstance(old, keras.Layer) and made.trainable != old.trainable:
                made.trainable = old.trainable
        return new

    def _model(self, model: Any) -> Any:
        make = self._sequential if isinstance(model, keras.Sequential) else self._graph
        return make(model)

    def _sequential(self, model: Any) -> Any:
        of = {id(call.operation): call for call in _calls(model)}
        calls = [of[id(layer)] for layer in model.layers]  # the others make masks
        layers = [self._layer(call) for call in calls if not self._vanishes(call)] or [self._layer(calls[-1])]
        first = _functional(model).inputs[0]._keras_history.operation
        return keras.Sequential([self._op(first), *layers], name=model.name)

    def _graph(self, model: Any) -> Any:
        tensors = {id(tensor): self._op(tensor._keras_history.operation).output for tensor in model.inputs}
        outputs = {id(tensor) for tensor in model.outputs}

        def put(tree: Any) -> Any:
            return keras.tree.map_structure(lambda leaf: tensors[id(leaf)] if _is_tensor(leaf) else leaf, tree)

        for call in _calls(model):
            if self._is_gone(call):
                made = put(_source(call))
                if not self._vanishes(call) or id(call.outputs[0]) in outputs:
                    made = self._layer(call)(made)
            else:
                made = self._layer(call)(*put(call.arguments.args), **put(call.arguments.kwargs))
            tensors |= {id(old): new for old, new in zip(call.outputs, keras.tree.flatten(made), strict=True)}
        return keras.Model(put(model.input), put(model.output), name=model.name)

    def _is_gone(self, call: Any) -> bool:
        return (change := self._changes.get(id(call.operation))) is not None and change.gone

    def _vanishes(self, call: Any) -> bool:
        """Say whether nothing need be left of a call that is gone: it changed no dtype."""
        return self._is_gone(call) and _source(call).dtype == call.outputs[0].dtype

    def _layer(self, call: Any) -> Any:
        """Return the new operation for a call, an Identity where it is gone."""
        op = call.operation
        if self._is_gone(call):
            return _layers.Identity(name=op.name, dtype=call.outputs[0].dtype)
        return self._op(op)

    def _op(self, op: Any) -> Any:
        """Return the new operation for an old one."""
        if id(op) not in self._new:
            self._new[id(op)] = made = self._model(op) if _is_transparent(op) else self._made(op)
            self._pairs.append((op, made))
        return self._new[id(op)]

    def _made(self, op: Any) -> Any:
        change = self._changes.get(id(op), _Change())
        if type(op) is _layers.Lambda:  # in memory already: its code needs no leave to be read from a config
            shape = op._output_shape
            return _layers.Lambda(op.function, shape, op.mask, op.arguments, name=op.name, dtype=op.dtype_policy)
        activation = None
        if (type(op) in _LAYOUTS or type(op) is _layers.Activation) and not isinstance(op.activation, keras.Layer):
            activation = op.activation
        try:
            with keras.saving.custom_object_scope(_custom_objects(op)), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
                config = op.get_config() | change.settings
                made = type(op).from_config(config | {"activation": None} if activation else config)
        except Exception as error:
            reason = " ".join(str(error).rpartition("Exception encountered: ")[2].split())
            what = f"{type(op).__name__} {op.name!r}"
            raise ValueError(f"{what}: expected a layer that its config makes again, got: {reason}") from error
        if activation:
            made.activation = activation  # any function, also one that no config can name
        return made

    def _copy(self, old: Any, new: Any) -> None:
        """Give a new layer its values: those of the old one, but where the fold has others."""
        change = self._changes.get(id(old), _Change())
        if change.arrays:
            values = {variable.name: variable for variable in old.variables}
            changed = {id(getattr(new, name)): array for name, array in change.arrays.items()}
            for variable in new.variables:
                array = changed.get(id(variable))
                variable.assign(_array(values[variable.name]) if array is None else array)
            return
        shapes = [[tuple(v.shape) for v in layer.variables] for layer in (old, new)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{type(old).__name__} {old.name!r}: expected variables of shapes {shapes[0]} when made again from its "
                f"config, got {shapes[1]}"
            )
        for source, target in zip(old.variables, new.variables, strict=True):
            target.assign(_array(source))
        for source, target in zip(old._flatten_layers(), new._flatten_layers(), strict=True):
            _copy_rest(source, target)


def _custom_objects(op: Any) -> dict[str, Any]:
    """Return the classes and functions that the config of `op` may name and Keras may not know."""
    layers = op._flatten_layers() if isinstance(op, keras.Layer) else ()
    objects = [x for layer in layers for x in (type(layer), getattr(layer, "activation", None))]
    return {x.__name__: x for x in objects if x is not None and hasattr(x, "__name__")}


def _copy_rest(old: Any, new: Any) -> None:
    """Copy what a layer keeps beside its variables: vocabularies, what Normalization makes of its variables."""
    if hasattr(old, "save_assets") and hasattr(old, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if hasattr(new, "finalize_state"):
        new.finalize_state()


# Single layers --------------------------------------------------------------------------------------------------


def from_layer(layer: Any) -> FastBatchNorm:
    """Return a fastbn.BatchNorm that does what a Keras BatchNormalization does.

    y = γ·(x - μ)/√(σ² + ε) + β (Ioffe & Szegedy 2015, Algorithms 1 and 2), moving = (1 - m)·moving + m·batch.

    Parameters
    ----------
    layer : keras.layers.BatchNormalization
        Built, without renorm.

    Returns
    -------
    BatchNorm
        In inference mode, where a Keras layer is when called; its own arrays, in the dtype of the layer's variables
        (float32 for half types). momentum is 1 - m: Keras's m weighs the old value. unbiased=False: Keras's moving
        variance is that of σ². With one of scale and center only, γ = 1 or β = 0 becomes a parameter.

    Raises
    ------
    TypeError
        `layer` is no BatchNormalization.
    ValueError
        It is not built, or has renorm=True; epsilon is not positive.
    """
    if not isinstance(layer, _layers.BatchNormalization):
        raise TypeError(f"layer: expected a keras.layers.BatchNormalization, got {type(layer).__name__}")
    if not layer.built:
        raise ValueError(f"layer: expected one that is built, got {layer.name!r}, which has no variables yet")
    if getattr(layer, "renorm", False):
        raise ValueError(f"layer: expected renorm=False, got {layer.name!r} with renorm=True")
    params = _params(layer)
    affine = params.gamma is not None or params.beta is not None
    bn = FastBatchNorm(
        len(params.mean), axis=layer.axis, eps=params.eps, momentum=1 - layer.momentum, affine=affine, unbiased=False,
        dtype=params.mean.dtype,
    )  # fmt: skip
    for new, old in (bn.gamma, params.gamma), (bn.beta, params.beta), (bn.running_mean, params.mean), \
            (bn.running_var, params.var):  # fmt: skip
        if new is not None and old is not None:
            new[...] = old
    return bn.eval()


def to_layer(bn: FastBatchNorm, *, ndim: int = 2) -> Any:
    """Return a Keras BatchNormalization, built and with its weights, that does what a fastbn.BatchNorm does.

    y = γ·(x - μ)/√(σ² + ε) + β (Ioffe & Szegedy 2015, Algorithms 1 and 2), moving = m·moving + (1 - m)·batch.

    Parameters
    ----------
    bn : BatchNorm
        With running statistics and without activation.
    ndim : int
        Axes of the inputs: a Keras layer is built for one number of them.

    Returns
    -------
    keras.layers.BatchNormalization
        Its momentum is 1 - bn.momentum: Keras's weighs the old value. Its moving variance is bn.running_var as it
        is; one with unbiased=True held σ²·m/(m - 1) and goes on with σ² if trained further, as Keras knows only that.

    Raises
    ------
    TypeError
        `bn` is no BatchNorm.
    ValueError
        momentum=None (a cumulative average), which Keras does not know; no running statistics; an activation;
        `ndim` axes do not hold bn.axis.
    """
    if not isinstance(bn, FastBatchNorm):
        raise TypeError(f"bn: expected a fastbn.BatchNorm, got {type(bn).__name__}")
    if bn.momentum is None:
        raise ValueError("momentum: expected a number, got None (a cumulative average), which Keras does not know")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics, got track_running_stats=False, which Keras does not know")
    if bn.activation is not None:
        raise ValueError(f"bn: expected no activation, got {bn.activation!r}: Keras needs a layer of its own for it")
    if not -ndim <= bn.axis < ndim:
        raise ValueError(f"ndim: expected so many axes that axis {bn.axis} is one, got {ndim}")
    layer = _layers.BatchNormalization(
        axis=bn.axis, momentum=1 - bn.momentum, epsilon=bn.eps, scale=bn.affine, center=bn.affine, dtype=bn.dtype.name
    )
    shape: list[int | None] = [None] * ndim
    shape[bn.axis] = bn.num_features
    layer.build(tuple(shape))
    arrays = [bn.gamma, bn.beta] if bn.affine else []
    layer.set_weights([*arrays, bn.running_mean, bn.running_var])
    return layer


# Files ----------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Any:
    """Load a Keras model, not compiled; code in the file (Lambda layers) is never run.

    Parameters
    ----------
    path : path of a .keras, .h5 or .hdf5 file

    Raises
    ------
    FileNotFoundError
    ValueError
        Naming the file, in one line: it holds no model, is cut off, or needs classes that Keras does not know.
    """
    path = os.fspath(path)
    if not path.endswith((".keras", ".h5", ".hdf5")):
        raise ValueError(f"{path}: expected a .keras, .h5 or .hdf5 file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected a file, found none")
    try:
        if not path.endswith(".keras"):
            _refuse_code(path)
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # zipfile, h5py, json and Keras raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected a Keras model that Keras {keras.__version__} can load: {reason}") from error


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a Keras model as a .keras file; ValueError for another suffix: the formats before it lose settings."""
    path = os.fspath(path)
    if not path.endswith(".keras"):
        raise ValueError(f"{path}: expected a name that ends in .keras, the format Keras models are written in")
    model.save(path)


def _refuse_code(path: str) -> None:
    """Raise ValueError for an HDF5 model with Lambda layers, whose code some versions of Keras run at once."""
    import h5py

    with h5py.File(path, "r") as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise ValueError("it holds no model, at most the weights of one")

    def lambdas(tree: Any) -> bool:
        if isinstance(tree, dict):
            return tree.get("class_name") in ("Lambda", "__lambda__") or any(map(lambdas, tree.values()))
        return isinstance(tree, list) and any(map(lambdas, tree))

    if lambdas(json.loads(config)):
        raise ValueError("it has a Lambda layer, whose code is not run")
