"""From a Keras model to the graphs that `graph.fold` decides on, and what its decisions change in the model.

    Reader(model)   reads the calls that Keras keeps; fold() fills `changes`, a Change for each layer that it changes
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras
import numpy as np

from ..affine import BatchNormParams
from .graph import BatchNorm, Graph, Layer, Node, Scaling, Value, fold
from .keras_calls import calls_of, data_of, functional_of, is_tensor, is_transparent, leaves_of, source_of
from .keras_layers import Separable, Step, steps_of
from .report import Decision


@dataclass
class Change:
    """What the fold makes of an operation: gone, or with other settings and other values of its variables."""

    gone: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)  # by the layer's attribute


class _Origin(NamedTuple):
    """The layer a node is of, and the one that the model calls: another where that hides it."""

    layer: Any
    owner: Any


class Reader:
    """Turns a model into graphs: one for it and the models it calls once, one for each model called several times."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.changes: dict[int, Change] = {}  # by the operation's id, as all below
        self._times: Counter[int] = Counter({id(model): 1})  # calls in one call of the model
        self._training: set[int] = set()  # called with training=True
        self._order: dict[int, int] = {}
        self._count(model, training=False)
        owners = ((id(v), id(op)) for op in leaves_of(model) if isinstance(op, keras.Layer) for v in op.variables)
        self._owners = Counter(variable for variable, _ in set(owners))
        self._graphs: dict[int, Graph] = {}

    def _count(self, model: Any, training: bool) -> None:
        for call in calls_of(model):
            op, given = call.operation, call.arguments.kwargs.get("training")
            trains = training or not (given is None or given is False)
            self._order.setdefault(id(op), len(self._order))
            self._times[id(op)] += 1
            if trains:
                self._training.add(id(op))
            if is_transparent(op):
                self._count(op, trains)

    def fold(self) -> list[Decision]:
        """Fold all graphs, note the changes; return the decisions in the order of the model."""
        self._scope(self.model, "")
        decisions: dict[int, tuple[int, Decision]] = {}  # one for each layer, however often it is called
        for graph in self._graphs.values():
            norms = [node.origin for node in graph.nodes if isinstance(node.op, BatchNorm)]
            for norm, decision in zip(norms, fold(graph), strict=True):
                decisions.setdefault(id(norm.layer), (self._order[id(norm.owner)], decision))
            for node in graph.nodes:
                self._note(node)
        return [decision for _, decision in sorted(decisions.values(), key=lambda pair: pair[0])]

    def _note(self, node: Node) -> None:
        """Note what became of a node."""
        match op := node.op:
            case BatchNorm() | Scaling() if node.removed:
                change = Change(gone=True)
            case Layer() if op.folded is not None:
                kernel = "pointwise_kernel" if isinstance(op, Separable) else "kernel"
                change = Change(False, {"use_bias": True}, {kernel: op.folded.weight, "bias": op.folded.bias})
            case BatchNorm() if op.taken:
                new = op.merged()
                arrays = {"gamma": new.gamma, "beta": new.beta, "moving_mean": new.mean}
                change = Change(False, {"scale": True, "center": True}, arrays)
            case _:
                return
        self.changes[id(node.origin.layer)] = change

    def _scope(self, model: Any, prefix: str) -> None:
        """Make the graph of `model`, each call of which is alike."""
        graph = self._graphs[id(model)] = Graph()
        inputs = [Value(tensor.name, tensor.shape) for tensor in functional_of(model).inputs]
        for value in self._read(model, graph, prefix, inputs, self._times[id(model)]):
            value.is_output = True

    def _read(self, model: Any, graph: Graph, prefix: str, inputs: list[Value], times: int) -> list[Value]:
        """Append the calls of `model` to `graph`; return its outputs."""
        values = {id(tensor): value for tensor, value in zip(functional_of(model).inputs, inputs, strict=True)}
        for call in calls_of(model):
            op, name = call.operation, f"{prefix}{call.operation.name}"
            if not is_transparent(op):
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
        return [values[id(tensor)] for tensor in functional_of(model).outputs]

    @staticmethod
    def _entries(call: Any, name: str, graph: Graph, values: dict[int, Value]) -> list[Value] | None:
        """Return what the inputs of a model that is called are, or None where Keras may sort or reshape them."""
        inner = functional_of(call.operation)
        given = keras.tree.flatten(data_of(call))
        if not all(map(is_tensor, given)) or len(given) != len(inner.inputs):
            return None
        if isinstance(data_of(call), dict) != isinstance(inner.input, dict):
            return None
        if any(len(a.shape) != len(b.shape) or a.dtype != b.dtype for a, b in zip(given, inner.inputs, strict=True)):
            return None
        _read_masks(call, name, graph, values, given)
        return [values[id(tensor)] for tensor in given]

    def _append(self, call: Any, name: str, graph: Graph, values: dict[int, Value], times: int) -> None:
        """Append one call to `graph`: as many nodes as the layer does things one after the other."""
        op, data, out = call.operation, data_of(call), call.outputs
        steps = steps_of(call, self._held(op, times), id(op) in self._training) if len(out) == 1 else []
        if steps:
            read = list(data) if isinstance(data, (list, tuple)) else [source_of(call)]
            _read_masks(call, name, graph, values, read)
        else:
            read, steps = call.input_tensors, [Step(None)]
        here = [values[id(tensor)] for tensor in read]
        origin = _Origin(op, op)
        for step in steps:
            there = [Value(name, t.shape) for t in out] if step is steps[-1] else [Value(name, step.shape)]
            graph.add(step.kind or type(op).__name__, name, step.op, here, there, origin)
            here = there
        values |= {id(tensor): value for tensor, value in zip(out, here, strict=True)}
        if steps[0].op is None and isinstance(op, keras.Layer):
            self._append_hidden(op, name, graph)

    def _append_hidden(self, op: Any, name: str, graph: Graph) -> None:
        """Append the BatchNorms of which nothing is known but that they are there, tied to nothing."""
        kind = keras.layers.BatchNormalization
        for norm in [op] if isinstance(op, kind) else op._flatten_layers(include_self=False):
            if isinstance(norm, kind):
                own = f"its class {type(op).__name__} is not Keras's own"
                held = own if norm is op else f"it is inside the {type(op).__name__} {op.name!r}"
                full = name if norm is op else f"{name}/{norm.name}"
                stub = BatchNorm(BatchNormParams(None, None, None, None), norm.axis, held)
                graph.add("BatchNormalization", full, stub, [Value(full)], [Value(full)], _Origin(norm, op))

    def _held(self, op: Any, times: int) -> str:
        """Say why the variables of a layer must stay as they are."""
        if self._times[id(op)] != times:
            return "it is called more than once"
        if any(self._owners[id(variable)] > 1 for variable in getattr(op, "variables", ())):
            return "another layer has a variable of it"
        if mode := getattr(op, "quantization_mode", None):
            return f"it is quantised ({mode})"
        return "it has LoRA weights" if getattr(op, "lora_enabled", False) else ""


def _read_masks(call: Any, name: str, graph: Graph, values: dict[int, Value], data: list[Any]) -> None:
    """Let `graph` know that what a call is given beside its data is read."""
    known = {id(tensor) for tensor in data}
    masks = [values[id(tensor)] for tensor in call.input_tensors if id(tensor) not in known]
    if masks:
        graph.add("mask", name, None, masks, [])
