"""What the operations of a model alone say about shapes: a ReLU keeps the axes, a convolution gives channels."""

from __future__ import annotations

from torch import nn

from ..graph import BatchNorm, Concat, Graph, Layer, Node, Pool, Same, Split, Value

UNARY = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid,
    nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus,
)  # fmt: skip
ELEMENTWISE = {"relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardtanh"}


def infer_shapes(graph: Graph) -> None:
    """Find more numbers of axes, and of channels, from those that are known and what the operations keep."""
    rank: dict[Value, int] = {}
    for node in graph.nodes:
        for value in (*node.inputs, *node.outputs):
            if value.rank is not None:
                rank[value] = value.rank
    alike = [[*node.inputs, *node.outputs] for node in graph.nodes if _keeps_rank(node)]
    known = -1
    while known != len(rank):
        known = len(rank)
        for values in (*alike, *reversed(alike)):
            if found := next((rank[value] for value in values if value in rank), 0):
                rank |= {value: found for value in values if value not in rank}
    for value, n in rank.items():
        if value.shape is None:
            value.shape = (None,) * n
    for node in graph.nodes:
        _infer_channels(node)


def _keeps_rank(node: Node) -> bool:
    match node.op:
        case Layer() | BatchNorm() | Same() | Concat() | Split() | Pool(keeps_axes=True):
            return True
    return _is_unary(node)


def _is_unary(node: Node) -> bool:
    return node.op is None and node.kind in _UNARY_NAMES and len(node.inputs) == 1


_UNARY_NAMES = {kind.__name__ for kind in UNARY} | ELEMENTWISE | {f"{name}_" for name in ELEMENTWISE}


def _infer_channels(node: Node) -> None:
    if not node.inputs or any(value.rank is None for value in (*node.inputs, *node.outputs)):
        return
    x, rank = node.inputs[0].shape, node.inputs[0].rank
    assert x is not None
    assert rank is not None
    match node.op:
        case Layer(held=""):
            _set_size(node.outputs[0], node.op.out_axis, node.op.out_channels)
        case BatchNorm(held=""):
            for value in (node.inputs[0], node.outputs[0]):
                _set_size(value, node.op.axis, len(node.op.params.mean))
        case Concat():
            sizes = [value.shape[node.op.axis] for value in node.inputs]  # type: ignore[index]
            if None not in sizes:
                _set_size(node.outputs[0], node.op.axis, sum(sizes))  # type: ignore[arg-type]
        case Pool(keeps_axes=True):
            gone = {axis % rank for axis in node.op.axes}
            for axis in range(rank):
                if axis not in gone and x[axis] is not None:
                    _set_size(node.outputs[0], axis, x[axis])
        case _ if isinstance(node.op, Same) or _is_unary(node):
            for axis in range(rank):
                if x[axis] is not None:
                    _set_size(node.outputs[0], axis, x[axis])


def _set_size(value: Value, axis: int, size: int | None) -> None:
    assert value.shape is not None
    shape = list(value.shape)
    if -len(shape) <= axis < len(shape) and shape[axis] is None:
        shape[axis] = size
        value.shape = tuple(shape)
