"""The small graph that every model format is translated to, and the decisions about each BatchNorm in it.

A front end builds a `Graph` of nodes whose `op` says what folding must know of them (None: it lets nothing pass),
calls `fold(graph)`, and then writes back what it finds: nodes that are `removed`, layers and BatchNorms that have
`taken` something. Nothing here knows a file format, and the front end's arrays are never written to.

    BatchNorm, Scaling            an affine map per channel, which may move: y = scale·x + shift
    Layer                         linear or convolution: takes the map of the BatchNorm behind or before it
    Same, Transpose, Reshape,     let a map pass, on another axis, under a condition, or in parts:
    Flatten, Pool, Concat, Split  BN(op(x)) = op(BN'(x))
    Opaque                        would do one of these, but for a reason; as None does, it lets nothing pass

A BatchNorm goes backward if it can, through values that nobody else reads, else forward, into every reader of its
output, else it stays, with the constant factors and summands beside it taken in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from math import prod
from typing import Any, NamedTuple

import numpy as np

from ..affine import EXACT, Affine, BatchNormParams, floating
from ..fold import Folded, cast, fold_conv, fold_into_conv, fold_into_linear, fold_linear
from .report import FOLDED, LEFT, MERGED, REWRITTEN, Decision

MOST_STEPS = 5000


class Stays(Exception):
    """Why a BatchNorm cannot go this way."""


class Value:
    """A tensor: `shape` holds None where a size is unknown, or is None where not even their number is known."""

    def __init__(self, name: str, shape: Sequence[int | None] | None = None, is_output: bool = False) -> None:
        self.name, self.is_output = name, is_output
        self.shape = None if shape is None else tuple(shape)
        self.producer: Node | None = None
        self.readers: list[tuple[Node, int]] = []  # the node, and which of its inputs

    @property
    def rank(self) -> int | None:
        return None if self.shape is None else len(self.shape)


class Node:
    """One operation; its constant operands (weights) are in `op`, not among `inputs`."""

    def __init__(self, kind: str, name: str, op: Any, inputs: list[Value], outputs: list[Value], origin: Any) -> None:
        self.kind, self.name, self.op, self.origin = kind, name, op, origin
        self.inputs, self.outputs = inputs, outputs
        self.removed = False

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


class Graph:
    """Nodes in topological order."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def add(
        self, kind: str, name: str, op: Any, inputs: Sequence[Value], outputs: Sequence[Value], origin: Any = None
    ) -> Node:
        """Append a node; an op that a map can pass has its data as inputs, the first one if there is one only."""
        node = Node(kind, name, op, list(inputs), list(outputs), origin)
        for index, value in enumerate(node.inputs):
            value.readers.append((node, index))
        for value in node.outputs:
            value.producer = node
        self.nodes.append(node)
        return node


# What a node can be ---------------------------------------------------------------------------------------------


class Route(NamedTuple):
    """A map on its way: over the channels on `axis` of a tensor with `rank` axes (None: unknown).

    flat: the axis is what a flatten left of (C, *spatial), so it has len(affine) entries or a multiple of them
    (forward) or an equal part (backward), whatever the layer says that is met first.
    """

    affine: Affine
    axis: int
    rank: int | None
    flat: bool = False

    def on(self, axis: int, rank: int | None) -> bool | None:
        """Say whether `axis`, which may be negative, is the one of this map; None where the rank decides."""
        if rank is not None:
            return self.axis % rank == axis % rank
        return self.axis == axis if (self.axis < 0) == (axis < 0) else None


@dataclass
class BatchNorm:
    """A BatchNorm at inference over `axis`; `held` says why it must stay as it is ("" where it need not)."""

    params: BatchNormParams
    axis: int
    held: str = ""
    before: Affine | None = field(init=False, default=None)  # what it has taken, from either side
    after: Affine | None = field(init=False, default=None)

    @property
    def taken(self) -> bool:
        return self.before is not None or self.after is not None

    @property
    def affine(self) -> Affine:
        return join(self.before, Affine.of(self.params), self.after)

    def merged(self) -> BatchNormParams:
        """Return one BatchNorm for this one and all it has taken, in its own dtypes, with its var and eps.

        γ' = scale·√(var + ε), β' = scale·μ' + shift with μ' as rounded, μ' the input that becomes μ (0 if none does).
        """
        mean, var, eps = np.asarray(self.params.mean), np.asarray(self.params.var), float(self.params.eps)
        gamma = mean if self.params.gamma is None else np.asarray(self.params.gamma)
        beta = gamma if self.params.beta is None else np.asarray(self.params.beta)
        affine, means = self.affine, [Decimal(float(m)) for m in mean]
        with localcontext(EXACT), np.errstate(over="ignore"):
            if (first := self.before) is not None:
                triples = zip(means, first.scale, first.shift, strict=True)
                means = [(m - t) / s if s else Decimal(0) for m, s, t in triples]
            new_mean = np.array([float(m) for m in means]).astype(floating(mean.dtype))
            roots = [(Decimal(float(v)) + Decimal(eps)).sqrt() for v in var]
            new_gamma = [float(s * root) for s, root in zip(affine.scale, roots, strict=True)]
            triples = zip(affine.scale, affine.shift, new_mean, strict=True)
            new_beta = [float(t + s * Decimal(float(m))) for s, t, m in triples]
            news = (new_gamma, gamma), (new_beta, beta)
            gamma, beta = (np.array(new).astype(floating(old.dtype)) for new, old in news)
        for name, new in zip(("gamma", "beta", "mean"), (gamma, beta, new_mean), strict=True):
            if not np.isfinite(new.astype(np.float64)).all():
                raise Stays(f"the merged {name} exceeds {new.dtype}")
        return BatchNormParams(gamma, beta, new_mean, var, eps)


@dataclass
class Scaling:
    """y = factor·x + summand, or y = x/factor + summand: constants that must turn out to be one value per channel."""

    factor: np.ndarray | None = None
    summand: np.ndarray | None = None
    divides: bool = False

    def affine(self, axis: int, rank: int | None, channels: int) -> Affine:
        """Return the map over the channels on `axis`."""
        factor = self._per_channel(self.factor, axis, rank, channels, 1)
        if self.divides:
            if 0 in factor:
                raise Stays("a division by 0 stands in the way")
            with localcontext(EXACT):
                factor = [1 / f for f in factor]
        return Affine(factor, self._per_channel(self.summand, axis, rank, channels, 0))

    @staticmethod
    def _per_channel(
        array: np.ndarray | None, axis: int, rank: int | None, channels: int, absent: int
    ) -> list[Decimal]:
        if array is None:
            return [Decimal(absent)] * channels
        array = np.asarray(array).astype(np.float64)
        if not np.isfinite(array).all():
            raise Stays("a constant that is not finite stands in the way")
        if array.size > 1:
            if rank is None and axis < 0:
                at = axis + array.ndim
            elif rank is None:
                raise Stays("it is not known which axis a constant beside it meets")
            else:
                at = axis % rank - (rank - array.ndim)
            if not 0 <= at < array.ndim or array.shape[at] != array.size or array.size != channels:
                raise Stays("a constant that is not one value per channel stands in the way")
        return [Decimal(float(a)) for a in np.broadcast_to(array.reshape(-1), (channels,))]


@dataclass
class Layer:
    """A linear layer (weight of two axes) or a convolution, named as `fold_linear` and `fold_conv` name things.

    in_axis, out_axis: of the channels in what it reads and in what it gives, negative where counted from the last.
    padded: it reads zeros beside its input, with whatever kernel. held: why its parameters must stay ("" where they
    need not), held_before: why no map in front of it can be taken in. guarded: the front end can make the layer
    refuse inputs without `needs_rank` axes, where an axis's place is known only then.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    layout: str
    in_axis: int
    out_axis: int
    groups: int = 1
    transposed: bool = False
    padded: bool = False
    held: str = ""
    held_before: str = ""
    guarded: bool = False
    needs_rank: int | None = field(init=False, default=None)
    before: Affine | None = field(init=False, default=None)
    after: Affine | None = field(init=False, default=None)
    folded: Folded | None = field(init=False, default=None)  # new weight and bias, once something is taken

    @property
    def in_channels(self) -> int:
        n = self.weight.shape[self.layout.index("I")]
        return n if self.transposed or "M" in self.layout else n * self.groups

    @property
    def out_channels(self) -> int:
        if "M" in self.layout:
            return self.weight.shape[self.layout.index("M")] * self.weight.shape[self.layout.index("I")]
        return self.weight.shape[self.layout.index("O")] * (self.groups if self.transposed else 1)

    def fold(self, before: Affine | None, after: Affine | None) -> Folded:
        """Return the layer with `before` in front of it and `after` behind it, each weight rounded once."""
        weight, bias, folded = self.weight, self.bias, None
        if before is not None and after is not None:
            weight = weight.astype(np.float64)
        try:
            if before is not None:
                folded = self._fold_before(before, weight, bias)
                weight, bias = folded.weight, folded.bias
            if after is not None:
                folded = self._fold_after(after, weight, bias)
        except (ValueError, TypeError) as error:
            raise Stays(f"its weights cannot hold it ({error})") from error
        assert folded is not None
        return folded if before is None or after is None else _rounded(folded, self.weight)

    def _fold_before(self, affine: Affine, weight: np.ndarray, bias: np.ndarray | None) -> Folded:
        if weight.ndim == 2:
            return fold_into_linear(affine, weight, bias, layout=self.layout)
        return fold_into_conv(affine, weight, bias, groups=self.groups, layout=self.layout)

    def _fold_after(self, affine: Affine, weight: np.ndarray, bias: np.ndarray | None) -> Folded:
        if weight.ndim == 2:
            return fold_linear(weight, bias, affine, layout=self.layout)
        return fold_conv(weight, bias, affine, groups=self.groups, transposed=self.transposed, layout=self.layout)


@dataclass
class Opaque:
    """What would let a map pass, or take it, but for `why`."""

    why: str


@dataclass
class Same:
    """An operation that changes no value: identity, dropout at inference."""


@dataclass
class Transpose:
    """y.shape[i] = x.shape[perm[i]]."""

    perm: tuple[int, ...]


@dataclass
class Reshape:
    """The same values in the same order: squeeze, unsqueeze, reshape, flatten between these two shapes."""

    before: Sequence[int | None]
    after: Sequence[int | None]


@dataclass
class Flatten:
    """(N, C, *spatial) → (N, C·spatial), whatever the sizes."""


@dataclass
class Pool:
    """Each value of y is a mean of values of x over other axes than the channels', or one of them, or their largest.

    axes: those over which values are taken together or chosen, negative where counted from the last; keeps_axes:
    they stay, whatever their length. padded: zeros count as values of x. largest: only a scale ≥ 0 passes.
    """

    axes: tuple[int, ...]
    keeps_axes: bool = True
    padded: bool = False
    largest: bool = False


@dataclass
class Concat:
    axis: int


@dataclass
class Split:
    axis: int


def join(*maps: Affine | None) -> Affine:
    """Return the maps one after the other; None is the identity."""
    first, *rest = [affine for affine in maps if affine is not None]
    for affine in rest:
        first = first.then(affine)
    return first


def _rounded(folded: Folded, old: np.ndarray) -> Folded:
    """Round what was folded in float64, twice, to the dtype of `old`."""
    dtype = floating(old.dtype)
    weight, bias = (cast(a, np.zeros_like(a), dtype) for a in (folded.weight, folded.bias))
    if not (np.isfinite(weight.astype(np.float64)).all() and np.isfinite(bias.astype(np.float64)).all()):
        raise Stays(f"its weights cannot hold it (a value exceeds {dtype})")
    w, size = weight.astype(np.float64), np.abs(old.astype(np.float64))
    moved = np.abs(w - old)[size > 0] / size[size > 0]
    report = folded.report._replace(max_relative_change=float(moved.max(initial=0)))
    return Folded(weight, bias, report)


# Where a map can go ---------------------------------------------------------------------------------------------


class _Plan:
    """What one move would change: nothing is changed before `commit`."""

    def __init__(self) -> None:
        self.takers: dict[Node, tuple[Affine | None, Affine | None]] = {}  # before, after: all they then hold
        self.ranks: dict[Node, int] = {}
        self.gone: list[Node] = []
        self.path: list[Node] = []  # what lets the map pass, for the report
        self.steps = 0

    def step(self) -> None:
        """Count the places that a map has been to: chains of Split and Concat have 2^n ways through them."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise Stays(f"there are more than {MOST_STEPS} ways to go")

    def before(self, node: Node, affine: Affine) -> None:
        """Let `node` take a map that stands in front of it."""
        before, after = self.takers.get(node, (node.op.before, node.op.after))
        self.takers[node] = join(affine, before), after

    def after(self, node: Node, affine: Affine) -> None:
        """Let `node` take a map that stands behind it."""
        before, after = self.takers.get(node, (node.op.before, node.op.after))
        self.takers[node] = before, join(after, affine)

    def needs_rank(self, node: Node, rank: int) -> None:
        if self.ranks.setdefault(node, node.op.needs_rank or rank) != rank:
            raise Stays(f"{node} would need two numbers of axes")

    def commit(self) -> tuple[Node, ...]:
        """Change the graph; return who has taken something."""
        folded = {node: node.op.fold(*maps) for node, maps in self.takers.items() if isinstance(node.op, Layer)}
        for node, (before, after) in self.takers.items():
            if isinstance(node.op, BatchNorm):
                op = BatchNorm(node.op.params, node.op.axis)
                op.before, op.after = before, after
                op.merged()  # raises Stays where the dtype cannot hold it
        for node, maps in self.takers.items():
            node.op.before, node.op.after = maps
            if isinstance(node.op, Layer):
                node.op.folded, node.op.needs_rank = folded[node], self.ranks.get(node, node.op.needs_rank)
        for node in self.gone:
            remove(node)
        return tuple(self.takers)


def remove(node: Node) -> None:
    """Let the readers of `node` read its input."""
    value, out = node.inputs[0], node.outputs[0]
    value.readers.remove((node, 0))
    for reader, index in out.readers:
        reader.inputs[index] = value
    value.readers += out.readers
    value.is_output |= out.is_output
    out.readers, out.is_output, node.removed = [], False, True


def _backward(value: Value, route: Route, plan: _Plan) -> None:
    """Plan for the map that stands behind `value` to go to where `value` comes from."""
    plan.step()
    if (node := value.producer) is None:
        raise Stays(f"{value.name!r}, which it reads, is an input of the model")
    if value.is_output:
        raise Stays(f"the output of {node} is an output of the model too")
    if len(value.readers) > 1:
        others = sorted({str(reader) for reader, _ in value.readers})
        raise Stays(f"the output of {node} has more than one reader: {', '.join(others)}")
    match op := node.op:
        case Layer():
            if op.held:
                raise Stays(f"{node} must stay as it is: {op.held}")
            _meet(route, node, op.out_axis, plan)
            plan.after(node, _fit(route, op.out_channels, node))
        case BatchNorm(held=""):
            _meet(route, node, op.axis, plan)
            plan.after(node, _fit(route, len(op.params.mean), node))
        case Scaling():
            if node not in plan.gone:  # else the map of another part, cut by a Split, has taken it along
                own = _constants(node, route.axis, route.rank, len(route.affine), backward=True)
                route = route._replace(affine=own.then(route.affine))
                plan.gone.append(node)
            _backward(node.inputs[0], route, plan)
        case Concat():
            plan.path.append(node)
            for part, branch in zip(_parts(route, op.axis, node.inputs, node), node.inputs, strict=True):
                _backward(branch, part, plan)
        case Split():
            if not _along(route, op.axis, node):
                raise Stays(f"{node} gives parts of every channel")
            plan.path.append(node)
            _backward(node.inputs[0], _extended(route, node.outputs, node.outputs.index(value), node), plan)
        case _:
            passed = _pass(node, route, backward=True)
            plan.path.append(node)
            _backward(node.inputs[0], passed, plan)


def _forward(value: Value, route: Route, plan: _Plan) -> None:
    """Plan for the map that stands before the readers of `value` to go into every one of them."""
    if value.is_output:
        raise Stays("its output is an output of the model")
    for node, index in value.readers:
        plan.step()
        match op := node.op:
            case Layer():
                if op.held or op.held_before:
                    raise Stays(f"{node} must stay as it is: {op.held or op.held_before}")
                if op.transposed:
                    raise Stays(f"{node} is transposed: the number of its taps that reach an output varies")
                if op.padded and any(route.affine.shift):
                    raise Stays(f"{node} pads with zeros, which the shift would have to change")
                _meet(route, node, op.in_axis, plan)
                plan.before(node, _fit(route, op.in_channels, node))
            case BatchNorm(held=""):
                _meet(route, node, op.axis, plan)
                plan.before(node, _fit(route, len(op.params.mean), node))
            case Scaling():
                scaled = route
                if node not in plan.gone:  # else the map of another part, joined by a Concat, has taken it along
                    own = _constants(node, route.axis, route.rank, len(route.affine), backward=False)
                    scaled = route._replace(affine=route.affine.then(own))
                    plan.gone.append(node)
                _forward(node.outputs[0], scaled, plan)
            case Concat():
                if not _along(route, op.axis, node):
                    raise Stays(f"{node} joins it with other parts of every channel")
                plan.path.append(node)
                _forward(node.outputs[0], _extended(route, node.inputs, index, node), plan)
            case Split():
                plan.path.append(node)
                for part, branch in zip(_parts(route, op.axis, node.outputs, node), node.outputs, strict=True):
                    if branch.readers or branch.is_output:
                        _forward(branch, part, plan)
            case _:
                passed = _pass(node, route, backward=False)
                plan.path.append(node)
                _forward(node.outputs[0], passed, plan)


def _meet(route: Route, node: Node, axis: int, plan: _Plan) -> None:
    """Refuse a node whose channels are on another axis, or make it refuse other numbers of axes."""
    on = route.on(axis, route.rank)
    if on is None and getattr(node.op, "guarded", False):
        plan.needs_rank(node, max(axis, route.axis) - min(axis, route.axis))
    elif on is None:
        raise Stays(f"it is not known how many axes the tensor at {node} has")
    elif not on:
        axes = [a if route.rank is None else a % route.rank for a in (route.axis, axis)]
        raise Stays(f"the channels are on axis {axes[0]}, those of {node} on axis {axes[1]}")


def _fit(route: Route, channels: int, node: Node) -> Affine:
    """Return the map as one of `channels` channels."""
    affine = route.affine
    if len(affine) == channels:
        return affine
    if route.flat and channels % len(affine) == 0:
        return _expanded(affine, channels // len(affine))
    if route.flat and len(affine) % channels == 0 and (contracted := _contracted(affine, channels)):
        return contracted
    raise Stays(f"{len(affine)} channels meet the {channels} of {node}")


def _constants(node: Node, axis: int, rank: int | None, channels: int, backward: bool) -> Affine:
    """Return the map of a Scaling, which must not be what makes the axes, or the channels, so many."""
    op, shape = node.op, node.inputs[0].shape
    ndim, size = (max(measure(op.factor), measure(op.summand)) for measure in (np.ndim, np.size))
    if ndim > ((rank or max(axis + 1, -axis)) - backward if shape is None else len(shape)):
        raise Stays(f"a constant of {ndim} axes stands in the way")
    if backward and size > 1 and (shape is None or shape[axis] != channels):
        raise Stays(f"it is not known whether {node} makes one channel {channels}")
    return op.affine(axis, rank, channels)


def _along(route: Route, axis: int, node: Node) -> bool:
    """Say whether `axis` is that of the channels."""
    if route.flat or (on := route.on(axis, route.rank)) is None:
        raise Stays(f"it is not known whether {node} acts on the channels")
    return on


def _sizes(values: Sequence[Value], route: Route, node: Node) -> list[int]:
    """Return how many channels each value has."""
    sizes = [None if value.shape is None else value.shape[route.axis] for value in values]
    if None in sizes:
        raise Stays(f"it is not known how many channels each part has at {node}")
    return sizes  # type: ignore[return-value]


def _parts(route: Route, axis: int, values: Sequence[Value], node: Node) -> list[Route]:
    """Cut the map into those of the values that are one tensor along `axis`."""
    if not _along(route, axis, node):
        return [route] * len(values)
    sizes, affine = _sizes(values, route, node), route.affine
    if sum(sizes) != len(affine):
        raise Stays(f"{len(affine)} channels meet the {sum(sizes)} of {node}")
    ends = np.cumsum(sizes).tolist()
    cuts = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return [route._replace(affine=Affine(affine.scale[cut], affine.shift[cut])) for cut in cuts]


def _extended(route: Route, values: Sequence[Value], index: int, node: Node) -> Route:
    """Make the map of one value into that of all, which are one tensor: the identity on the others."""
    sizes = _sizes(values, route, node)
    if sizes[index] != len(route.affine):
        raise Stays(f"{len(route.affine)} channels meet the {sizes[index]} of {node}")
    left, right = sum(sizes[:index]), sum(sizes[index + 1 :])
    one, zero, affine = Decimal(1), Decimal(0), route.affine
    scale = [one] * left + affine.scale + [one] * right
    return route._replace(affine=Affine(scale, [zero] * left + affine.shift + [zero] * right))


def _pass(node: Node, route: Route, backward: bool) -> Route:
    """Return the map on the other side of `node`."""
    match op := node.op:
        case Same():
            return route
        case Transpose(perm):
            rank = len(perm)
            if route.flat or (route.axis < 0 and route.rank is None):
                raise Stays(f"it is not known which axis {node} moves the channels to")
            axis = route.axis % rank
            return route._replace(axis=perm[axis] if backward else perm.index(axis), rank=rank)
        case Reshape():
            here, there = (op.after, op.before) if backward else (op.before, op.after)
            axis, affine = route.axis % len(here), route.affine
            if route.flat:
                if (channels := here[axis]) is None:
                    raise Stays(f"it is not known how many channels meet {node}")
                affine = _fit(route, channels, node)
            affine, axis = _regrouped(affine, axis, here, there, node)
            return Route(affine, axis, len(there))
        case Flatten():
            axis = route.axis if route.rank is None else route.axis % route.rank
            if route.flat or (axis not in ((1, -1) if backward else (1,))):
                raise Stays(f"{node} mixes the channels with another axis")
            return Route(route.affine, 1, node.inputs[0].rank if backward else 2, flat=True)
        case Pool():
            return _pooled(op, route, node, backward)
        case BatchNorm():
            raise Stays(f"{node} must stay as it is: {op.held}")
        case Opaque(why):
            raise Stays(f"{node} lets nothing pass: {why}")
        case _:
            raise Stays(f"{node} stands there, which no scale and shift can pass")


def _pooled(op: Pool, route: Route, node: Node, backward: bool) -> Route:
    if op.padded and any(route.affine.shift):
        raise Stays(f"{node} counts zeros as values, which the shift would have to change")
    if op.largest and any(s < 0 for s in route.affine.scale):
        raise Stays(f"{node} takes the largest, which a negative scale makes the smallest")
    rank = route.rank
    if rank is not None and backward and not op.keeps_axes:
        rank += len(op.axes)
    if rank is None and (not op.keeps_axes or any(route.on(a, None) is None for a in op.axes)):
        raise Stays(f"it is not known whether {node} acts on the channels")
    axes = op.axes if rank is None else [a % rank for a in op.axes]
    axis = route.axis
    if not op.keeps_axes:
        kept = [a for a in range(rank or 0) if a not in axes]
        if backward:
            axis = kept[axis]
        elif axis % (rank or 1) in kept:
            axis = kept.index(axis % (rank or 1))
            return route._replace(axis=axis, rank=len(kept))
    if (axis if rank is None else axis % rank) in axes:
        raise Stays(f"{node} takes channels together")
    return route._replace(axis=axis, rank=rank)


def _regrouped(
    affine: Affine, axis: int, here: Sequence[int | None], there: Sequence[int | None], node: Node
) -> tuple[Affine, int]:
    """Return the map, which acts on `axis` of shape `here`, as one on an axis of the shape `there`, and that axis.

    Entry i of the flattened tensor is of channel (i // S) mod C, S the product of the sizes behind the axis: the
    map is one on another axis, of C' channels and S', where one of the two partitions refines the other.
    """
    channels, run = len(affine), here[axis + 1 :]
    if None not in run and (s := prod(run)):  # type: ignore[type-var, arg-type]
        behind = {a: there[a + 1 :] for a in reversed(range(len(there)))}
        known = {a: prod(sizes) for a, sizes in behind.items() if None not in sizes}  # type: ignore[type-var, arg-type]
        # The channels' own axis first: a map that is alike on several channels would do on others too.
        for other, t in sorted(known.items(), key=lambda item: (there[item[0]], item[1]) != (channels, s)):
            if not (size := there[other]) or not t:
                continue
            if s % t == 0 and size % (channels * (s // t)) == 0:
                tiles = size // (channels * (s // t))
                wide = _expanded(affine, s // t)
                return Affine(wide.scale * tiles, wide.shift * tiles), other
            if t % s == 0 and channels % (size * (t // s)) == 0:
                tile = size * (t // s)
                first = Affine(affine.scale[:tile], affine.shift[:tile])
                times = channels // tile
                alike = (first.scale * times, first.shift * times) == (affine.scale, affine.shift)
                if alike and (contracted := _contracted(first, size)):
                    return contracted, other
    raise Stays(f"{node} mixes the channels with another axis")


def _expanded(affine: Affine, times: int) -> Affine:
    """Repeat each channel."""
    return Affine(*([x for x in part for _ in range(times)] for part in (affine.scale, affine.shift)))


def _contracted(affine: Affine, channels: int) -> Affine | None:
    """Return one channel for each run of len(affine) // channels equal ones, or None if some differ."""
    times = len(affine) // channels
    first = Affine(affine.scale[::times], affine.shift[::times])
    again = _expanded(first, times)
    return first if (again.scale, again.shift) == (affine.scale, affine.shift) else None


# The decisions --------------------------------------------------------------------------------------------------


class _Fate(NamedTuple):
    takers: tuple[Node, ...]
    reason: str


def fold(graph: Graph) -> list[Decision]:
    """Fold every BatchNorm of `graph` that can be; return what became of each, in the order of the graph.

    Raises ValueError, naming the node, where a BatchNorm's parameters are none (var + eps ≤ 0, NaN, shapes).
    """
    for node in graph.nodes:
        _check_channels(node)
    norms = [node for node in graph.nodes if isinstance(node.op, BatchNorm)]
    free = [node for node in norms if not node.op.held]
    for node in free:
        try:
            Affine.of(node.op.params)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{node}: {error}") from error
    constants = {node: _take_constants(node) for node in free}
    fates: dict[Node, _Fate] = {}
    while waiting := [node for node in free if not node.removed]:  # what one move opens, another may use
        fates |= {node: _move(node, constants[node]) for node in waiting}
        if not any(node.removed for node in waiting):
            break
    return [_decision(node, fates.get(node)) for node in norms]


def _check_channels(node: Node) -> None:
    """Raise ValueError where a BatchNorm or a layer does not fit what is known of its input."""
    match op := node.op:
        case BatchNorm(held=""):
            axis, channels = op.axis, np.size(op.params.mean)
        case Layer(held=""):
            axis, channels, n = op.in_axis, op.in_channels, op.out_channels
            if op.bias is not None and op.bias.shape != (n,):
                raise ValueError(f"{node}: expected a bias of shape ({n},), got {op.bias.shape}")
        case _:
            return
    shape = node.inputs[0].shape
    if shape is not None and -len(shape) <= axis < len(shape) and shape[axis] not in (None, channels):
        got = f"{shape[axis]} in its input"
        raise ValueError(f"{node}: expected {channels} channels, as its parameters have, got {got}")


def _decision(node: Node, fate: _Fate | None) -> Decision:
    if fate is None:
        return Decision(node.name, LEFT, (), node.op.held)
    into = tuple(taker.name for taker in fate.takers)
    changes = tuple(taker.op.folded.report for taker in fate.takers if isinstance(taker.op, Layer) and taker.op.folded)
    if node.removed:
        return Decision(node.name, FOLDED if changes else MERGED, into, fate.reason, changes)
    return Decision(node.name, REWRITTEN if node.op.taken else LEFT, (), fate.reason)


def _take_constants(node: Node) -> list[Node]:
    """Let a BatchNorm take in the constant factors and summands beside it; return them."""
    taken: list[Node] = []
    for behind in (False, True):
        while (beside := _scaling_beside(node, behind)) is not None:
            op, value, plan = node.op, beside.inputs[0], _Plan()
            if not behind and _ends_activation(beside):
                break
            try:
                affine = _constants(beside, op.axis, value.rank, len(op.params.mean), backward=not behind)
                (plan.after if behind else plan.before)(node, affine)
                plan.gone.append(beside)
                plan.commit()
            except Stays:
                break
            taken.append(beside)
    return taken


def _ends_activation(node: Node) -> bool:
    """Say whether a Scaling is one number behind what nothing passes, such as GELU's ½: runtimes know the whole."""
    producer, sizes = node.inputs[0].producer, (np.size(node.op.factor), np.size(node.op.summand))
    return producer is not None and producer.op is None and max(sizes) == 1


def _scaling_beside(node: Node, behind: bool) -> Node | None:
    """Return the Scaling next to `node`, if the tensors up to it have no other reader."""
    beside: Node | None = node
    while beside is not None and (beside is node or isinstance(beside.op, Same)):
        value = beside.outputs[0] if behind else beside.inputs[0]
        if len(value.readers) != 1 or value.is_output:
            return None
        beside = value.readers[0][0] if behind else value.producer
    return beside if beside is not None and isinstance(beside.op, Scaling) else None


def _move(node: Node, constants: list[Node]) -> _Fate:
    """Fold one BatchNorm backward, or else forward, or say why it stays."""
    route = Route(node.op.affine, node.op.axis, node.inputs[0].rank)
    reasons = []
    for direction, go, value in ("backward", _backward, node.inputs[0]), ("forward", _forward, node.outputs[0]):
        plan = _Plan()
        try:
            go(value, route, plan)
            if not plan.takers:
                raise Stays("nothing reads its output")
            takers = plan.commit()
        except Stays as stays:
            reasons.append(f"{direction}: {stays}")
            continue
        except RecursionError:
            reasons.append(f"{direction}: the way is longer than Python's stack")
            continue
        remove(node)
        through = f" through {', '.join(map(str, dict.fromkeys(plan.path)))}" if plan.path else ""
        return _Fate(takers, direction + through + _with(constants + plan.gone))
    return _Fate((), "; ".join(reasons) + _with(constants))


def _with(constants: list[Node]) -> str:
    return f", with {', '.join(map(str, constants))}" if constants else ""
