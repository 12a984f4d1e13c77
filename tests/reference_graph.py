"""The float64 oracle of the graph that models are folded as, a bound on what it may be off, and a builder.

An op of `fastbn.interop.graph` carries what folding needs; the builder keeps the rest (strides, kernels, what an
opaque node computes) in `node.origin`, where the evaluator finds it. Each tensor is three arrays: its value, its
size, which is the value had nothing cancelled, and its error, a bound on the distance from the exact value: half an
ulp of every parameter that folding has rounded and the float64 roundings of the evaluation, carried through the
graph by the same operations.
"""

from typing import Any, NamedTuple

import numpy as np
from convolution import conv, conv_transpose, dense

from fastbn import BatchNormParams
from fastbn.interop.graph import (
    BatchNorm,
    Concat,
    Flatten,
    Graph,
    Layer,
    Pool,
    Reshape,
    Same,
    Scaling,
    Split,
    Transpose,
    Value,
    fold,
)
from fastbn.interop.report import FOLDED, LEFT, MERGED, REWRITTEN

U = 2.0**-53


class Tensor(NamedTuple):
    value: np.ndarray
    size: np.ndarray
    error: np.ndarray


class Refused(Exception):
    """A guarded layer got another number of axes than it was folded for."""


def evaluate(graph, inputs):
    """Return the Tensor of every value that the graph as it is now computes from {Value: array}."""
    known = {value: exactly(array) for value, array in inputs.items()}
    for node in graph.nodes:
        if not node.removed:
            known.update(zip(node.outputs, apply(node, [known[v] for v in node.inputs]), strict=True))
    return known


def exactly(array):
    array = np.asarray(array, np.float64)
    return Tensor(array, np.abs(array), np.zeros_like(array))


def standing_for(value):
    """Return the value that is `value` now that nodes are gone."""
    while value.producer is not None and value.producer.removed:
        value = value.producer.inputs[0]
    return value


def apply(node, tensors):
    """Return the outputs of one node."""
    x, origin = tensors[0], node.origin
    match op := node.op:
        case Layer():
            return [_layer(op, origin, x)]
        case BatchNorm():
            return [_batch_norm(op, x)]
        case Scaling():
            return [_scaling(op, x)]
        case Same():
            return [x]
        case Transpose(perm):
            return [_moved(lambda a: a.transpose(perm), x)]
        case Reshape():
            return [_moved(lambda a: a.reshape(origin), x)]
        case Flatten():
            return [_moved(lambda a: a.reshape(len(a), -1), x)]
        case Pool():
            return [_pool(op, origin, x)]
        case Concat(axis):
            return [Tensor(*(np.concatenate(parts, axis) for parts in zip(*tensors, strict=True)))]
        case Split(axis):
            cuts = np.cumsum(origin)[:-1]
            return [Tensor(*parts) for parts in zip(*(np.split(a, cuts, axis) for a in x), strict=True)]
        case None:
            return [origin(*tensors)]
    raise AssertionError(f"no such op: {op}")


def relu(x):
    return Tensor(np.maximum(x.value, 0), x.size, x.error)


def total(x, y):
    size = x.size + y.size
    return Tensor(x.value + y.value, size, x.error + y.error + U * size)


def _moved(move, x):
    return Tensor(*(move(a) for a in x))


def half_ulp(array):
    """Half an ulp, and what a rounding to float32 on the way adds."""
    return np.spacing(np.abs(array)).astype(np.float64) * (1 + 2**-15) / 2


def _layer(op, options, x):
    if op.needs_rank not in (None, x.value.ndim):
        raise Refused
    weight, bias = (op.weight, op.bias) if op.folded is None else op.folded[:2]
    weight, bias = np.asarray(weight), None if bias is None else np.asarray(bias)

    def run(x, weight, bias):
        if weight.ndim == 2:
            x = np.moveaxis(x, op.in_axis, -1)
            y = dense(x.reshape(-1, x.shape[-1]), weight, bias, layout=op.layout)
            return np.moveaxis(y.reshape(*x.shape[:-1], y.shape[-1]), -1, op.out_axis)
        x = np.moveaxis(x, op.in_axis, 1)
        run = conv_transpose if op.transposed else conv
        return np.moveaxis(run(x, weight, bias, layout=op.layout, groups=op.groups, **options), 1, op.out_axis)

    sizes = np.abs(weight.astype(np.float64)), None if bias is None else np.abs(bias.astype(np.float64))
    size = run(x.size, *sizes)
    error = run(x.error, sizes[0], None) + (weight.size + 2) * U * size
    if op.folded is not None:
        error += run(x.size, half_ulp(weight), half_ulp(bias))
    return Tensor(run(x.value, weight, bias), size, error)


def _batch_norm(op, x):
    bn = op.merged() if op.taken else op.params
    along = [1] * x.value.ndim
    along[op.axis] = -1

    def per_channel(values, absent):
        return np.asarray(absent if values is None else values).astype(np.float64).reshape(along)

    gamma, beta, mean = per_channel(bn.gamma, [1]), per_channel(bn.beta, [0]), per_channel(bn.mean, None)
    rstd = 1 / np.sqrt(per_channel(bn.var, None) + bn.eps)
    size = np.abs(gamma) * rstd * (x.size + np.abs(mean)) + np.abs(beta)
    error = np.abs(gamma) * rstd * x.error + 8 * U * size
    if op.taken:
        error += per_channel(half_ulp(bn.gamma), None) * rstd * (x.size + np.abs(mean))
        error += per_channel(half_ulp(bn.beta), None)
    return Tensor(gamma * rstd * (x.value - mean) + beta, size, error)


def _scaling(op, x):
    factor = np.float64(1) if op.factor is None else np.asarray(op.factor, np.float64)
    summand = np.float64(0) if op.summand is None else np.asarray(op.summand, np.float64)
    with np.errstate(all="ignore"):
        factor = 1 / factor if op.divides else factor
        size = np.abs(factor) * x.size + np.abs(summand)
        return Tensor(factor * x.value + summand, size, np.abs(factor) * x.error + 4 * U * size)


def _pool(op, options, x):
    """options: index, which of the values to take; or kernel, stride and padding, the same for all axes; or none."""
    axes = tuple(a % x.value.ndim for a in op.axes)

    def pooled(array, take, around):
        if options and "index" in options:
            for axis in sorted(axes, reverse=True):
                array = array.take([options["index"]], axis)
        elif options:
            padding = [(options["padding"],) * 2 if axis in axes else (0, 0) for axis in range(array.ndim)]
            array = np.pad(array, padding, constant_values=around)
            for axis in axes:
                windows = np.lib.stride_tricks.sliding_window_view(array, options["kernel"], axis)
                every = [slice(None)] * array.ndim
                every[axis] = slice(None, None, options["stride"])
                array = take(windows[tuple(every)], -1)
        else:
            array = take(array, axes, keepdims=True)
        return array if op.keeps_axes else array.squeeze(axes)

    if op.largest:
        return Tensor(pooled(x.value, np.max, -np.inf), pooled(x.size, np.max, 0), pooled(x.error, np.max, 0))
    value, size, error = (pooled(array, np.mean, 0) for array in x)
    return Tensor(value, size, error + (x.value.size + 2) * U * size)


class Model:
    """Build a graph, computing every value on the way; every array in it is read-only."""

    def __init__(self, seed=0, declared=lambda shape: shape):
        """`declared` makes the shape that a value declares from the one it has."""
        self.graph, self.known, self.inputs = Graph(), {}, {}
        self.rng, self.declared = np.random.default_rng(seed), declared

    def array(self, *shape, dtype=np.float64):
        return self.constant(self.rng.normal(size=shape), dtype)

    @staticmethod
    def constant(values, dtype=np.float64):
        array = np.array(values).astype(dtype)
        array.setflags(write=False)
        return array

    def shape(self, value):
        return self.known[value].value.shape

    def input(self, *shape):
        value = Value(f"x{len(self.inputs)}", self.declared(shape))
        self.inputs[value] = self.array(*shape)
        self.known[value] = exactly(self.inputs[value])
        return value

    def output(self, *values):
        for value in values:
            value.is_output = True
        return self

    def add(self, kind: str, op: Any, inputs: list[Value], origin: Any = None, n_outputs: int = 1) -> Any:
        """Append a node named `kind` and its number; return its output, or its outputs if they are several."""
        name = f"{kind}{len(self.graph.nodes)}"
        outputs = [Value(f"{name}:{i}") for i in range(n_outputs)]
        node = self.graph.add(kind, name, op, inputs, outputs, origin)
        for value, tensor in zip(outputs, apply(node, [self.known[v] for v in inputs]), strict=True):
            self.known[value], value.shape = tensor, self.declared(tensor.value.shape)
        return outputs[0] if n_outputs == 1 else outputs

    def params(self, channels, dtype=np.float64, **given):
        gamma, beta, mean = self.array(3, channels, dtype=dtype)
        var = self.constant(self.rng.uniform(0.5, 2, channels), dtype)
        given = {name: v if v is None else self.constant(v, dtype) for name, v in given.items()}
        return BatchNormParams(gamma, beta, mean, var, 1e-3)._replace(**given)

    def bn(self, x, axis=1, dtype=np.float64, held="", **given):
        params = self.params(self.shape(x)[axis], dtype, **given)
        return self.add("bn", BatchNorm(params, axis, held), [x])

    def linear(self, x, outs=3, layout="OI", axis=-1, dtype=np.float64, bias=True, **options):
        weight = self.array(*(outs if a == "O" else self.shape(x)[axis] for a in layout), dtype=dtype)
        op = Layer(weight, self.array(outs, dtype=dtype) if bias else None, layout, axis, axis, **options)
        return self.add("linear", op, [x])

    def conv(self, x, outs=2, kernel=1, axis=1, layout=None, groups=1, dtype=np.float64, bias=True, **options):
        """outs: of one group."""
        run = {name: options.pop(name, default) for name, default in (("stride", 1), ("padding", 0))}
        transposed, n_in, dims = options.get("transposed", False), self.shape(x)[axis], len(self.shape(x)) - 2
        layout = layout or ("IO" if transposed else "OI") + "DHW"[3 - dims :]
        size = dict.fromkeys("DHW", kernel) | {"M": outs, "I": n_in, "O": outs}
        if "M" not in layout:
            size["O" if not transposed else "I"] = outs * groups if not transposed else n_in
            size["I"] = n_in if transposed else n_in // groups
        weight = self.array(*(size[letter] for letter in layout), dtype=dtype)
        n_out = outs * (n_in if "M" in layout else groups)
        padded = run["padding"] > 0
        op = Layer(
            weight,
            self.array(n_out, dtype=dtype) if bias else None,
            layout,
            axis,
            axis,
            groups,
            padded=padded,
            **options,
        )
        return self.add("conv", op, [x], run)

    def scaling(self, x, factor=None, summand=None, divides=False):
        arrays = (None if a is None else self.constant(a) for a in (factor, summand))
        return self.add("scaling", Scaling(*arrays, divides), [x])

    def same(self, x):
        return self.add("same", Same(), [x])

    def relu(self, x):
        return self.add("relu", None, [x], relu)

    def sum(self, x, y):
        return self.add("sum", None, [x, y], total)

    def transpose(self, x, *perm):
        return self.add("transpose", Transpose(perm), [x])

    def reshape(self, x, *shape, before=None, after=None):
        """before, after: the shapes as the node knows them, where not in full."""
        here = self.shape(x)
        there = self.known[x].value.reshape(shape).shape
        return self.add("reshape", Reshape(before or here, after or there), [x], there)

    def flatten(self, x):
        return self.add("flatten", Flatten(), [x])

    def pool(self, x, *axes, largest=False, keeps_axes=True, **options):
        padded = options.get("padding", 0) > 0 and not largest
        return self.add("pool", Pool(axes, keeps_axes, padded, largest), [x], options)

    def concat(self, *values, axis=1):
        return self.add("concat", Concat(axis), list(values))

    def split(self, x, *sizes, axis=1):
        return self.add("split", Split(axis), [x], sizes, len(sizes))

    def fold(self):
        """Fold; hold everything that must be true of any graph; return {name of the BatchNorm: Decision}."""
        outputs = {value: self.known[value] for value in self.known if value.is_output}
        norms = [node for node in self.graph.nodes if isinstance(node.op, BatchNorm)]
        decisions = fold(self.graph)
        assert [d.node for d in decisions] == [node.name for node in norms]
        for node, decision in zip(norms, decisions, strict=True):
            assert_reported(node, decision, self.graph)
        assert_consistent(self.graph, self.known)
        assert {standing_for(value) for value in outputs} == {v for v in self.known if v.is_output}

        now = evaluate(self.graph, self.inputs)
        for value, before in outputs.items():
            after = now[standing_for(value)]
            assert after.value.shape == before.value.shape, value.name
            error, bound = np.abs(after.value - before.value), before.error + after.error
            assert (error <= bound).all(), (value.name, (error / bound).max(), decisions)
        return {decision.node: decision for decision in decisions}


def assert_reported(node, decision, graph):
    """Hold what is said of a BatchNorm against what became of it."""
    takers = [n for name in decision.into for n in graph.nodes if n.name == name]
    layers = [taker for taker in takers if isinstance(taker.op, Layer)]
    assert len(takers) == len(decision.into)
    assert decision.reason
    assert decision.action in ((FOLDED, MERGED) if node.removed else (LEFT, REWRITTEN))
    assert len(decision.changes) == len(layers)
    if node.removed:
        assert takers
        assert all(taker.op.folded is not None if taker in layers else taker.op.taken for taker in takers)
        assert decision.action == (FOLDED if layers else MERGED)
    else:
        assert not takers
        assert decision.action == (REWRITTEN if node.op.taken else LEFT)
        assert not (node.op.held and node.op.taken)


def assert_consistent(graph, values):
    """Hold the edges against each other, and what is new against what was there."""
    for node in graph.nodes:
        if node.removed:
            assert isinstance(node.op, BatchNorm | Scaling)
            assert not node.outputs[0].readers
            continue
        for index, value in enumerate(node.inputs):
            assert (node, index) in value.readers
            assert value.producer is None or not value.producer.removed
        if isinstance(node.op, Layer) and (folded := node.op.folded) is not None:
            assert not node.op.held
            assert folded.weight.shape == node.op.weight.shape
            assert folded.weight.dtype == node.op.weight.dtype == folded.bias.dtype
            assert not np.shares_memory(folded.weight, node.op.weight)
            assert node.op.bias is None or not np.shares_memory(folded.bias, node.op.bias)
    for value in values:
        assert all(node.inputs[index] is value and not node.removed for node, index in value.readers)
