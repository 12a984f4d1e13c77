"""Folding a graph: the outputs stay, whatever the graph; each rule folds where it says so, and refuses elsewhere."""

import contextlib
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_graph import Model, Refused

from fastbn import BatchNormParams
from fastbn.interop.graph import BatchNorm, Graph, Layer, Scaling, Value, fold
from fastbn.interop.report import FOLDED, LEFT, MERGED, REWRITTEN

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]


# Whatever the graph ---------------------------------------------------------------------------------------------


class Drawn(Model):
    """A model whose every step Hypothesis draws."""

    def __init__(self, draw):
        super().__init__(draw(st.integers(0, 2**32 - 1)), self.known_in_part)
        self.draw = draw
        self.vague = draw(st.sampled_from([0, 0, 1, 2]))  # how much of the shapes is unknown

    def known_in_part(self, shape):
        if not self.vague or not self.draw(st.booleans()):
            return shape
        if self.vague == 2 and self.draw(st.booleans()):
            return None
        return tuple(None if self.draw(st.booleans()) else size for size in shape)

    def one_of(self, *choices):
        return self.draw(st.sampled_from(choices))

    def some_axis(self, x, first=0):
        rank = len(self.shape(x))
        return self.signed(self.draw(st.integers(min(first, rank - 1), rank - 1)), rank)

    def signed(self, axis, rank):
        return self.one_of(axis, axis, axis - rank)

    def some_values(self, n, name):
        """n values, all different, all the same, or alike in runs or periods."""
        runs = self.one_of(n, n, *(k for k in range(1, n) if n % k == 0))
        values = self.rng.normal(size=runs)
        if name == "gamma":
            kind = self.one_of("free", "positive", "zero")
            values = np.abs(values) if kind == "positive" else values * (0 if kind == "zero" else 1)
        return (np.tile if self.draw(st.booleans()) else np.repeat)(values, n // runs)

    def some_bn(self, x):
        axis = self.some_axis(x, first=self.one_of(1, 1, 1, 0))
        n = self.shape(x)[axis]
        given = {name: self.some_values(n, name) for name in ("gamma", "beta", "mean")}
        if self.one_of(True, False, False):
            given |= {"var": np.ones(n)}
        if self.one_of(True, False, False):  # a map without a shift
            given |= {"beta": None, "mean": np.zeros(n)}
        if self.one_of(True, False, False, False):
            given |= {"gamma": None}
        held = self.one_of("", "", "", "", "", "it trains")
        return self.bn(x, axis, self.one_of(*DTYPES[2:], *DTYPES), held, **given)

    def held(self):
        return {"held": self.one_of("", "", "", "", "shared"), "held_before": self.one_of("", "", "", "", "shared")}

    def some_linear(self, x):
        rank = len(self.shape(x))
        options = {"guarded": self.draw(st.booleans()), "bias": self.draw(st.booleans()), **self.held()}
        layout, dtype = self.one_of("OI", "IO"), self.one_of(*DTYPES[2:], *DTYPES)
        outs = self.draw(st.integers(1, 4))
        return self.linear(x, outs, layout, self.one_of(-1, rank - 1), dtype, **options)

    def some_conv(self, x):
        shape = self.shape(x)
        if not 3 <= len(shape) <= 5:
            return self.some_linear(x)
        axis = self.one_of(1, 1, len(shape) - 1)
        n, kernel, transposed = shape[axis], self.one_of(1, 2), self.one_of(False, False, True)
        spatial = "DHW"[5 - len(shape) :]
        letters = self.one_of("OI", "OI", "IM") if not transposed else "IO"
        layout = "".join(self.draw(st.permutations(letters + spatial)))
        groups = self.one_of(*(k for k in range(1, n + 1) if n % k == 0)) if "M" not in layout else self.one_of(1, n)
        padding = self.one_of(0, 1)
        if min(s for a, s in enumerate(shape) if a not in (0, axis)) + 2 * padding < kernel or transposed:
            padding = 0
            kernel = kernel if transposed else 1
        stride, dtype = self.one_of(1, 2), self.one_of(*DTYPES[2:], *DTYPES)
        return self.conv(
            x,
            self.one_of(1, 2, 3),
            kernel,
            self.signed(axis, len(shape)),
            layout,
            groups,
            dtype,
            bias=self.draw(st.booleans()),
            transposed=transposed,
            padding=padding,
            stride=stride,
            **self.held(),
        )

    def some_scaling(self, x):
        shape, arrays = self.shape(x), []
        for _ in range(2):
            kind = self.one_of("none", "scalar", "channels", "channels", "wide", "array")
            if kind == "none":
                arrays.append(None)
                continue
            axis, rank = self.draw(st.integers(0, len(shape) - 1)), len(shape)
            size = [1] * rank
            if kind in ("channels", "wide"):
                size[axis] = shape[axis] if kind == "channels" or shape[axis] > 1 else 3
                size = size[self.one_of(0, axis) :]
            elif kind == "array":
                size = [self.one_of(1, s) for s in shape]
            else:
                size = [1] * self.one_of(0, 1, rank)
            size = [1] * self.one_of(0, 0, 0, 1) + list(size)
            values = self.rng.choice([-2, -1.5, 0.5, 1, 3], size)
            arrays.append(np.full(size, 2.5) if self.draw(st.booleans()) else values)
        return self.scaling(x, *arrays, divides=self.draw(st.booleans()))

    def some_reshape(self, x):
        shape = self.shape(x)
        ways = [(*shape, 1), (1, *shape), (*shape[:1], 1, *shape[1:]), shape]
        ways += [shape[:a] + shape[a + 1 :] for a, s in enumerate(shape) if s == 1 and len(shape) > 1]
        ways += [(*shape[:a], shape[a] * shape[a + 1], *shape[a + 2 :]) for a in range(len(shape) - 1)]
        ways += [(shape[0], math.prod(shape[1:]))]
        for a, s in enumerate(shape):
            ways += [(*shape[:a], s // k, k, *shape[a + 1 :]) for k in range(2, s) if s % k == 0]
        shape = self.one_of(*(w for w in ways if 2 <= len(w) <= 5))
        before, after = (
            [None if self.vague and self.one_of(True, False, False) else size for size in sizes]
            for sizes in (self.shape(x), shape)
        )
        return self.reshape(x, *shape, before=before, after=after)

    def some_pool(self, x):
        rank = len(self.shape(x))
        axes = self.draw(st.lists(st.integers(0, rank - 1), min_size=1, max_size=2, unique=True))
        keeps, largest = self.one_of(True, rank - len(axes) < 2), self.draw(st.booleans())
        options = self.one_of(
            {}, {"index": 0}, {"kernel": 1, "stride": 2, "padding": 0}, {"kernel": 3, "stride": 1, "padding": 1}
        )
        if not keeps and "kernel" in options:
            options = {}
        return self.pool(x, *(self.signed(a, rank) for a in axes), largest=largest, keeps_axes=keeps, **options)

    def some_concat(self, x):
        axis = self.some_axis(x, first=1)

        def fits(value):
            shapes = [list(self.shape(v)) for v in (x, value)]
            for shape in shapes if len(shapes[0]) == len(shapes[1]) else []:
                shape[axis] = 0
            return shapes[0] == shapes[1]

        others = [value for value in self.known if fits(value)]
        return self.concat(*self.draw(st.permutations([x, self.one_of(*others)])), axis=axis)

    def some_split(self, x):
        axis = self.some_axis(x, first=1)
        if (n := self.shape(x)[axis]) == 1:
            return self.same(x)
        first = self.draw(st.integers(1, n - 1))
        return self.split(x, first, n - first, axis=axis)

    def some_sum(self, x):
        return self.sum(x, self.one_of(*(v for v in self.known if self.shape(v) == self.shape(x))))

    def some_transpose(self, x):
        return self.transpose(x, *self.draw(st.permutations(range(len(self.shape(x))))))

    STEPS = (some_bn, some_linear, some_conv, some_scaling, some_reshape, some_pool, some_concat, some_split)
    STEPS = (*STEPS, some_bn, some_bn, some_conv, some_scaling, some_reshape, some_transpose)

    def step(self, values):
        x = values[-1] if self.one_of(*[True] * 7, False) else self.one_of(*values)
        others = (Drawn.same, Drawn.flatten, Drawn.flatten, Drawn.relu, Drawn.some_sum)
        new = self.one_of(*Drawn.STEPS, *others)(self, x)
        values += new if isinstance(new, list) else [new]

    def run(self):
        shape = self.draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=4))
        values = [self.input(*shape)]
        if self.draw(st.booleans()):
            values.append(self.some_conv(values[0]))
        for _ in range(self.draw(st.integers(1, 8))):
            self.step(values)
        if self.draw(st.booleans()):
            values.append(self.some_conv(values[-1]))
        extra = self.one_of(*[None] * 4, *values)
        for value in values:
            if not value.readers or value is extra:
                self.output(value)
        return self.fold()


@settings(max_examples=settings().max_examples * 5)
@given(st.data())
def test_the_outputs_stay(data):
    with contextlib.suppress(Refused):  # what guarded layers are for: a shape that the graph does not know
        Drawn(data.draw).run()


# Each rule, and each refusal ------------------------------------------------------------------------------------


def the_only(decisions):
    (decision,) = decisions.values()
    return decision


def only_layer(m):
    (op,) = (node.op for node in m.graph.nodes if isinstance(node.op, Layer))
    return op


def unknown_batch(shape):
    return (None, *shape[1:])


def nothing_known(shape):
    return None


def assert_stays(m, why, action=LEFT):
    decision = the_only(m.fold())
    assert (decision.action, decision.into, decision.changes) == (action, (), ())
    assert why in decision.reason


def assert_folds(m, how, action=FOLDED):
    decision = the_only(m.fold())
    assert (decision.action, decision.reason) == (action, how)


BEFORE_BN = {
    "linear": lambda m: m.linear(m.input(2, 3)),
    "conv": lambda m: m.conv(m.input(2, 3, 4, 4), kernel=3, padding=1, stride=2),
    "grouped": lambda m: m.conv(m.input(2, 4, 3), kernel=2, groups=2),
    "depthwise": lambda m: m.conv(m.input(2, 3, 4), 2, kernel=2, layout="IWM", groups=3),
    "transposed": lambda m: m.conv(m.input(2, 4, 3), kernel=2, groups=2, transposed=True, stride=2),
}


@pytest.mark.parametrize("layer", BEFORE_BN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_the_layer_behind_which_it_stands(layer, dtype):
    m = Model()
    x = BEFORE_BN[layer](m)
    m.graph.nodes[0].op.weight = m.constant(m.graph.nodes[0].op.weight, dtype)
    m.known[x] = m.known[x]._replace(error=m.known[x].size * 2.0**-6)  # its weights have just been rounded
    m.output(m.bn(x))
    decision = the_only(m.fold())
    assert (decision.action, decision.reason, decision.into) == (FOLDED, "backward", (m.graph.nodes[0].name,))
    assert only_layer(m).folded.weight.dtype == dtype
    assert [change.negative_gamma for change in decision.changes] == [
        tuple(np.flatnonzero(m.graph.nodes[1].op.params.gamma < 0).tolist())
    ]


def test_into_every_layer_that_reads_it():
    m = Model()
    y = m.bn(m.input(2, 4, 3))
    layers = m.conv(y, kernel=2, groups=2), m.conv(y, layout="WIM", groups=4)
    outputs = *layers, m.bn(y), m.linear(m.transpose(y, 0, 2, 1))
    decisions = m.output(*outputs).fold()
    assert decisions["bn0"].action == FOLDED
    assert decisions["bn0"].into == ("conv1", "conv2", "bn3", "linear5")
    assert len(decisions["bn0"].changes) == 3
    assert decisions["bn3"].action == REWRITTEN


def test_a_padded_layer_takes_a_map_without_shift():
    for padding, beta, action in (1, None, FOLDED), (1, [1, 1, 1], LEFT), (0, [1, 1, 1], FOLDED):
        m = Model()
        y = m.bn(m.input(2, 3, 4), beta=beta, mean=[0, 0, 0])
        m.output(m.conv(y, kernel=1, padding=padding))
        decision = the_only(m.fold())
        assert decision.action == action
        assert ("conv 'conv1' pads with zeros, which the shift" in decision.reason) == (action == LEFT)


def test_where_it_must_stay():
    m = Model()
    assert_stays(m.output(m.bn(m.input(2, 3))), "'x0', which it reads, is an input of the model; forward: its output")
    m = Model()
    y = m.linear(m.input(2, 3))
    assert_stays(m.output(m.bn(y), m.relu(y)), "output of linear 'linear0' has more than one reader: bn 'bn1', relu 'r")
    m = Model()
    y = m.linear(m.input(2, 3))
    assert_stays(m.output(m.bn(y), y), "the output of linear 'linear0' is an output of the model too")
    m = Model()
    y = m.bn(m.input(2, 3))
    assert_stays(m.output(m.linear(y), y), "forward: its output is an output of the model")
    m = Model()
    y = m.bn(m.input(2, 3))
    assert_stays(m.output(m.linear(y), m.relu(y)), "relu 'relu2' stands there, which no scale and shift can pass")
    m = Model()
    assert_stays(m.output(m.bn(m.relu(m.conv(m.input(2, 3, 4))))), "backward: relu 'relu1' stands there")
    m = Model()
    m.bn(m.input(2, 3))
    assert_stays(m, "forward: nothing reads its output")
    m = Model()
    y = m.conv(m.bn(m.input(2, 3, 4)), kernel=2, transposed=True)
    assert_stays(m.output(y), "conv 'conv1' is transposed: the number of its taps that reach an output varies")
    m = Model()
    assert_stays(m.output(m.bn(m.linear(m.input(2, 3, 3)))), "on axis 1, those of linear 'linear0' on axis 2")
    m = Model()
    assert_stays(m.output(m.bn(m.linear(m.input(2, 3), held="shared"))), "'linear0' must stay as it is: shared")


@pytest.mark.parametrize("held", [{"held": "shared"}, {"held_before": "shared"}], ids=str)
def test_held_layers(held):
    m = Model()
    y = m.bn(m.input(2, 3))
    assert_stays(m.output(m.linear(y, **held)), "linear 'linear1' must stay as it is: shared")
    m = Model()
    m.output(m.bn(m.linear(m.input(2, 3), **held)))
    assert the_only(m.fold()).action == (LEFT if "held" in held else FOLDED)


def test_a_held_batch_norm_neither_goes_nor_takes():
    m = Model()
    y = m.scaling(m.bn(m.linear(m.input(2, 3)), held="it trains"), 2.0)
    m.output(m.linear(m.bn(m.bn(y), held="it trains too")))
    decisions = m.fold()
    assert [(d.action, d.reason) for d in (decisions["bn1"], decisions["bn4"])] == [
        (LEFT, "it trains"),
        (LEFT, "it trains too"),
    ]
    assert decisions["bn3"].action == REWRITTEN  # with the scaling, which it found first
    assert "backward: bn 'bn1' must stay as it is: it trains" in decisions["bn3"].reason
    assert "forward: bn 'bn4' must stay as it is: it trains too, with scaling 'scaling2'" in decisions["bn3"].reason


def test_axes_that_only_the_rank_tells_apart():
    for guarded, rank in (False, None), (True, 2):
        m = Model(declared=nothing_known)
        m.output(m.bn(m.linear(m.input(2, 3), axis=-1, guarded=guarded), 1))
        decision = the_only(m.fold())
        assert only_layer(m).needs_rank == rank
        assert decision.action == (FOLDED if guarded else LEFT)
        assert ("not known how many axes the tensor at linear 'linear0' has" in decision.reason) == (not guarded)
    m = Model(declared=nothing_known)
    m.output(m.bn(m.linear(m.bn(m.input(2, 3, 3), 2), axis=-1, guarded=True), 1))
    decisions = m.fold()
    assert only_layer(m).needs_rank == 3
    assert decisions["bn0"].action == FOLDED
    assert "linear 'linear1' would need two numbers of axes" in decisions["bn2"].reason
    m = Model(declared=nothing_known)
    m.output(m.bn(m.linear(m.bn(m.input(2, 3)), axis=-1, guarded=True), -1)).fold()
    assert only_layer(m).needs_rank == 2  # for the first, whatever the second needs
    m = Model(declared=nothing_known)
    assert_folds(m.output(m.bn(m.linear(m.input(2, 3, 3)), -1)), "backward")
    m = Model(declared=nothing_known)
    assert_stays(m.output(m.bn(m.conv(m.input(2, 3, 3)), 2)), "on axis 2, those of conv 'conv0' on axis 1")


def test_refused_where_the_rank_is_another():
    m = Model(declared=nothing_known)
    m.output(m.bn(m.linear(m.input(2, 3, 3), axis=-1, guarded=True), 1))
    with pytest.raises(Refused):
        m.fold()


def test_flatten():
    for declared in (lambda shape: shape), unknown_batch, nothing_known:
        m = Model(declared=declared)
        y = m.linear(m.flatten(m.bn(m.input(2, 3, 2, 2))), axis=1)
        assert_folds(m.output(y), "forward through flatten 'flatten1'")
        m = Model(declared=declared)
        y = m.flatten(m.conv(m.input(2, 3, 2, 2), 2))
        wide = {name: np.repeat(m.rng.uniform(1, 2, 2), 4) for name in ("gamma", "beta", "mean", "var")}
        assert_folds(m.output(m.bn(y, **wide)), "backward through flatten 'flatten1'")
        m = Model(declared=declared)
        y = m.flatten(m.conv(m.input(2, 3, 2, 2), 2))
        assert_stays(m.output(m.bn(y)), "8 channels meet the 2 of conv 'conv0'")
    m = Model()
    assert_stays(m.output(m.linear(m.flatten(m.bn(m.input(2, 3, 2), 2)))), "flatten 'flatten1' mixes the channels")
    m = Model(declared=nothing_known)
    assert_stays(m.output(m.linear(m.flatten(m.bn(m.input(2, 3, 2), -1)))), "flatten 'flatten1' mixes the channels")
    m = Model()
    assert_folds(m.output(m.linear(m.flatten(m.bn(m.input(2, 3), -1)))), "forward through flatten 'flatten1'")
    m = Model()
    y = m.transpose(m.flatten(m.bn(m.input(2, 3, 2))), 1, 0)
    assert_stays(m.output(m.linear(y)), "it is not known which axis transpose 'transpose2' moves the channels to")
    m = Model()
    y = m.flatten(m.bn(m.input(2, 3, 2)))
    assert_stays(m.output(m.linear(m.concat(y, y))), "it is not known whether concat 'concat2' acts on the channels")


def test_a_flatten_and_then_a_reshape():
    m = Model()
    y = m.reshape(m.flatten(m.bn(m.input(2, 2, 2))), 2, 4, 1)
    assert_folds(m.output(m.conv(y)), "forward through flatten 'flatten1', reshape 'reshape2'")
    m = Model()
    y = m.reshape(m.flatten(m.bn(m.input(2, 2, 2))), 2, 2, 2)
    assert_stays(m.output(m.linear(y)), "the channels are on axis 1, those of linear 'linear3' on axis 2")
    m = Model()
    y = m.reshape(m.flatten(m.bn(m.input(2, 2, 2))), 2, 4, 1, before=[None, None])
    assert_stays(m.output(m.conv(y)), "it is not known how many channels meet reshape 'reshape2'")


@pytest.mark.parametrize(
    ("here", "there", "runs", "layer"),
    [
        ((2, 3, 2), (2, 6), 3, "linear"),  # expand
        ((2, 6), (2, 3, 2), 3, "conv"),  # contract: alike in runs
        ((2, 6), (2, 6, 1, 1), 6, "conv"),
        ((2, 6, 1, 1), (2, 6), 1, "linear"),
        ((2, 6), (2, 6, 1, 1), 1, "conv"),  # all alike: other axes would do, the layer's own must be found
        ((2, 3, 2, 2), (2, 3, 4), 3, "conv"),
        ((2, 4, 3), (2, 2, 6), 2, "conv"),  # contract and expand
        ((2, 2, 4), (2, 4, 2), 2, "conv"),
    ],
)
@pytest.mark.parametrize("batch", [2, None])
def test_reshape(here, there, runs, layer, batch):
    def shapes(m):
        params = {n: np.repeat(m.rng.uniform(1, 2, runs), here[1] // runs) for n in ("gamma", "beta", "mean", "var")}
        return params, {"before": (batch, *here[1:]), "after": (batch, *there[1:])}

    m = Model(declared=unknown_batch)
    params, known = shapes(m)
    y = m.reshape(m.bn(m.input(*here), **params), *there, **known)
    assert_folds(m.output(m.linear(y, axis=1) if len(there) == 2 else m.conv(y)), "forward through reshape 'reshape1'")
    if len(here) > 2:
        m = Model(declared=unknown_batch)
        params, known = shapes(m)
        y = m.reshape(m.conv(m.input(*here[:1], 2, *here[2:]), here[1]), *there, **known)
        wide = {n: np.repeat(v[:: here[1] // runs], there[1] // runs) for n, v in params.items()}
        assert_folds(m.output(m.bn(y, **wide)), "backward through reshape 'reshape1'")


def test_a_reshape_tiles_and_untiles():
    for batch in 6, None:
        m = Model(declared=unknown_batch)
        y = m.reshape(m.bn(m.input(6, 2), -1), 3, 4, before=(batch, 2), after=(None, 4))
        assert_folds(m.output(m.linear(y)), "forward through reshape 'reshape1'")
        m = Model(declared=unknown_batch)
        y = m.reshape(m.linear(m.input(3, 2), 2), 1, 6)
        tiled = {name: np.tile(m.rng.uniform(1, 2, 2), 3) for name in ("gamma", "beta", "mean", "var")}
        assert_folds(m.output(m.bn(y, **tiled)), "backward through reshape 'reshape1'")


def test_reshapes_that_mix():
    m = Model()
    y = m.reshape(m.bn(m.input(2, 6)), 2, 3, 2)  # not alike in runs
    assert_stays(m.output(m.conv(y)), "reshape 'reshape1' mixes the channels")
    m = Model()
    y = m.reshape(m.bn(m.input(2, 3, 2)), 3, 4)
    assert_stays(m.output(m.linear(y)), "reshape 'reshape1' mixes the channels with another axis")
    m = Model()
    y = m.reshape(m.bn(m.input(2, 3, 4)), 2, 12, before=(2, 3, None))
    assert_stays(m.output(m.linear(y)), "reshape 'reshape1' mixes the channels with another axis")


@pytest.mark.parametrize("axis", [1, -2])
def test_concat(axis):
    m = Model()
    y = m.concat(m.conv(m.input(2, 3, 2)), m.conv(m.input(2, 1, 2), 1), m.conv(m.input(2, 2, 2), 3), axis=axis)
    decision = the_only(m.output(m.bn(y)).fold())
    assert decision.into == ("conv0", "conv1", "conv2")
    assert decision.reason == "backward through concat 'concat3'"
    m = Model()
    y = m.concat(m.conv(m.input(2, 3, 2)), m.bn(m.input(2, 1, 2)), axis=axis)
    decisions = m.output(m.bn(y)).fold()
    assert [d.action for d in decisions.values()] == [MERGED, REWRITTEN]
    m = Model()
    y = m.concat(m.conv(m.input(2, 3, 2)), m.relu(m.conv(m.input(2, 2, 2))), axis=axis)
    assert_stays(m.output(m.bn(y)), "backward: relu 'relu2' stands there")
    assert not any(node.op.folded for node in m.graph.nodes if isinstance(node.op, Layer))
    m = Model()
    y = m.concat(m.relu(m.input(2, 3, 2)), m.bn(m.input(2, 2, 2)), axis=axis)
    assert_folds(m.output(m.conv(y)), "forward through concat 'concat2'")
    np.testing.assert_array_equal(only_layer(m).folded.weight[:, :3], only_layer(m).weight[:, :3])


def test_concat_along_another_axis():
    m = Model()
    y = m.concat(m.conv(m.input(2, 3, 2)), m.conv(m.input(2, 2, 3)), axis=2)
    assert the_only(m.output(m.bn(y)).fold()).into == ("conv0", "conv1")
    m = Model()
    y = m.concat(m.bn(m.input(2, 3, 2)), m.input(2, 3, 3), axis=2)
    assert_stays(m.output(m.conv(y)), "concat 'concat1' joins it with other parts of every channel")
    m = Model(declared=nothing_known)
    y = m.concat(m.conv(m.input(2, 3, 2)), m.conv(m.input(2, 2, 2)))
    assert_stays(m.output(m.bn(y)), "it is not known how many channels each part has at concat 'concat2'")


def test_the_same_value_twice():
    m = Model()
    y = m.bn(m.input(2, 3))
    y = m.scaling(m.concat(y, y), 2.0, np.arange(6))
    reason = "forward through concat 'concat1', with scaling 'scaling2'"
    assert_folds(m.output(m.linear(y)), reason)
    m = Model()
    first, second = m.split(m.scaling(m.linear(m.input(2, 3), 4), 2.0, np.arange(4)), 1, 3)
    reason = "backward through concat 'concat3', split 'split2', with scaling 'scaling1'"
    assert_folds(m.output(m.bn(m.concat(second, first))), reason)
    m = Model()
    y = m.linear(m.input(2, 3))
    assert_stays(m.output(m.bn(m.concat(y, y))), "more than one reader: concat 'concat1'")
    m = Model()
    y = m.bn(m.input(2, 3))
    y = m.concat(y, m.scaling(y, [2, 3, 4]))
    assert_folds(m.output(m.linear(y)), "forward through concat 'concat2', with scaling 'scaling1'")


def test_split():
    m = Model()
    first, second = m.split(m.conv(m.input(2, 2, 3), 5), 2, 3)
    assert_folds(m.output(m.bn(second), m.relu(first)), "backward through split 'split1'")
    op = only_layer(m)
    np.testing.assert_array_equal(op.folded.weight[:2], op.weight[:2])  # the identity on the other part
    np.testing.assert_array_equal(op.folded.bias[:2], op.bias[:2])
    m = Model()
    first, second = m.split(m.bn(m.input(2, 5)), 2, 3)
    assert the_only(m.output(m.linear(first), m.linear(second)).fold()).into == ("linear2", "linear3")
    m = Model()
    first, second = m.split(m.bn(m.input(2, 5)), 2, 3)  # one of them is read by nobody
    assert the_only(m.output(m.linear(first)).fold()).into == ("linear2",)
    m = Model()
    first, second = m.split(m.bn(m.input(2, 5)), 2, 3)
    assert_stays(m.output(m.linear(first), second), "forward: its output is an output of the model")
    m = Model()
    first, second = m.split(m.bn(m.input(2, 5, 2)), 1, 1, axis=2)
    assert the_only(m.output(m.conv(first), m.conv(second)).fold()).into == ("conv2", "conv3")
    m = Model()
    first, second = m.split(m.conv(m.input(2, 5, 2)), 1, 1, axis=2)
    assert_stays(m.output(m.bn(first), second), "split 'split1' gives parts of every channel")


def test_transpose():
    for declared in (lambda shape: shape), nothing_known:
        m = Model(declared=declared)
        y = m.transpose(m.conv(m.input(2, 3, 4, 5)), 0, 2, 3, 1)
        assert_folds(m.output(m.bn(y, 3)), "backward through transpose 'transpose1'")
        m = Model(declared=declared)
        y = m.transpose(m.bn(m.input(2, 3, 4, 5)), 2, 0, 3, 1)
        assert_folds(m.output(m.linear(y)), "forward through transpose 'transpose1'")
    m = Model(declared=nothing_known)
    y = m.transpose(m.conv(m.input(2, 3, 4)), 0, 2, 1)
    assert_stays(m.output(m.bn(y, -1)), "it is not known which axis transpose 'transpose1' moves the channels to")


@pytest.mark.parametrize("keeps_axes", [True, False])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("axes", [(2, 3), (-1,), (0, 2)])
def test_pool(keeps_axes, largest, axes):
    for sign in 1, -1:
        m = Model()
        y = m.pool(m.conv(m.input(2, 3, 4, 4), 2), *axes, keeps_axes=keeps_axes, largest=largest)
        m.output(m.bn(y, 0 if axes == (0, 2) and not keeps_axes else 1, gamma=[sign, 2]))
        if largest and sign < 0:
            assert_stays(m, "pool 'pool1' takes the largest, which a negative scale makes the smallest")
        else:
            assert_folds(m, "backward through pool 'pool1'")
        m = Model()
        y = m.pool(m.bn(m.input(2, 2, 4, 4), gamma=[sign, 2]), *axes, keeps_axes=keeps_axes, largest=largest)
        y = m.bn(y, 0 if axes == (0, 2) and not keeps_axes else 1)
        action = LEFT if largest and sign < 0 else MERGED
        assert m.output(y).fold()["bn0"].action == action


def test_pools_that_stand_in_the_way():
    window = {"kernel": 3, "stride": 1, "padding": 1}
    for mean, action in (0, FOLDED), (1, LEFT):
        m = Model()
        y = m.pool(m.conv(m.input(2, 3, 4)), 2, **window)
        m.output(m.bn(y, beta=None, mean=[mean, mean]))
        decision = the_only(m.fold())
        assert decision.action == action
        assert ("pool 'pool1' counts zeros as values, which the shift" in decision.reason) == (action == LEFT)
    m = Model()
    y = m.pool(m.conv(m.input(2, 3, 4)), 2, largest=True, **window)
    assert_folds(m.output(m.bn(y, gamma=[0, 1])), "backward through pool 'pool1'")
    for keeps in True, False:
        m = Model()
        y = m.pool(m.bn(m.input(2, 3, 4)), 1, keeps_axes=keeps)
        assert_stays(m.output(m.linear(y)), "pool 'pool1' takes channels together")
    m = Model(declared=nothing_known)
    y = m.pool(m.conv(m.input(2, 3, 4)), -1)
    assert_stays(m.output(m.bn(y)), "it is not known whether pool 'pool1' acts on the channels")
    m = Model(declared=nothing_known)
    y = m.pool(m.conv(m.input(2, 3, 4, 4)), 2, 3, keeps_axes=False)
    assert_stays(m.output(m.bn(y)), "it is not known whether pool 'pool1' acts on the channels")
    m = Model(declared=nothing_known)
    assert_folds(m.output(m.bn(m.pool(m.conv(m.input(2, 3, 4)), 2))), "backward through pool 'pool1'")


@pytest.mark.parametrize("divides", [False, True])
@pytest.mark.parametrize(
    "factor", [3.0, [3.0], np.full((1, 1, 1), 3), [[2], [-3]], np.reshape([2, -3], (1, 2, 1)), None], ids=np.shape
)
def test_constants_beside(factor, divides):
    summand = [[5], [7]] if divides else 2.0
    for order in "before", "behind", "alone":
        m = Model()
        y = m.conv(m.input(2, 3, 3))
        if order == "alone":  # two constants with a ReLU behind: on their way, not beside it
            y = m.bn(m.pool(m.scaling(y, factor, summand, divides), 2))
            assert_folds(m.output(m.relu(y)), "backward through pool 'pool2', with scaling 'scaling1'")
            continue
        if order == "before":
            y = m.bn(m.same(m.scaling(y, factor, summand, divides)))
        else:
            y = m.scaling(m.bn(y), factor, summand, divides)
        decision = the_only(m.output(y).fold())
        assert decision.action == FOLDED
        assert "with scaling 'scaling" in decision.reason


def test_a_batch_norm_that_stays_takes_the_constants():
    m = Model()
    x = m.scaling(m.relu(m.input(2, 3, 2)), np.reshape([3, 2, 1], (3, 1)), 1.0)
    y = m.scaling(m.bn(x), np.reshape([1, 2, 3], (3, 1)), 4.0, True)
    assert_stays(m.output(y), "with scaling 'scaling1', scaling 'scaling3'", REWRITTEN)
    assert [node.removed for node in m.graph.nodes] == [False, True, False, True]


def test_one_number_goes_along_unless_it_ends_an_activation():
    m = Model()
    y = m.relu(m.bn(m.scaling(m.input(2, 3, 2), 1 / 255)))
    assert_stays(m.output(y), "with scaling 'scaling0'", REWRITTEN)
    m = Model()
    y = m.relu(m.bn(m.scaling(m.relu(m.input(2, 3, 2)), 0.5)))
    assert_stays(m.output(y), "relu 'relu0' stands there", LEFT)
    assert not any(node.removed for node in m.graph.nodes)


@pytest.mark.parametrize(
    ("factor", "divides", "why"),
    [
        (0.0, True, "a division by 0 stands in the way"),
        (np.inf, False, "a constant that is not finite stands in the way"),
        (np.ones((1, 2)), False, "a constant that is not one value per channel stands in the way"),
        (np.ones((2, 2)), False, "a constant that is not one value per channel stands in the way"),
        (np.ones((2, 1, 1)), False, "a constant that is not one value per channel stands in the way"),
        (np.ones((1, 1, 1, 1)), False, "a constant of 4 axes stands in the way"),
        (np.ones((1, 1, 2, 1)), False, "a constant of 4 axes stands in the way"),
    ],
)
def test_constants_that_stand_in_the_way(factor, divides, why):
    m = Model()
    y = m.conv(m.input(2, 3, 2))
    scaled = Scaling(m.constant(factor), None, divides)
    with np.errstate(all="ignore"):
        y = m.add("scaling", scaled, [y])
        m.output(m.add("bn", BatchNorm(m.params(2), y.shape.index(2, 1) - len(y.shape)), [y]))
    (decision,) = fold(m.graph)
    assert (decision.action, decision.into) == (LEFT, ())
    assert why in decision.reason


def test_constants_that_widen():
    m = Model()
    y = m.scaling(m.reshape(m.linear(m.input(2, 3), 2), 2, 2, 1), [2, 2, 2, 2])
    alike = {name: [1] * 4 for name in ("gamma", "beta", "mean", "var")}
    assert_stays(m.output(m.bn(y, 2, **alike)), "it is not known whether scaling 'scaling2' makes one channel 4")
    m = Model()
    y = m.flatten(m.scaling(m.conv(m.input(2, 3, 1), 1), np.full((4, 1), 2)))
    assert_stays(m.output(m.bn(y, **alike)), "it is not known whether scaling 'scaling1' makes one channel 4")
    m = Model()
    y = m.bn(m.scaling(m.linear(m.input(2, 3), 1), [2.0, 3.0]))
    assert_stays(m.output(y), "it is not known whether scaling 'scaling1' makes one channel 2")
    m = Model(declared=nothing_known)
    y = m.bn(m.scaling(m.linear(m.input(2, 3), 4), np.full((1, 1), 2)), -1)
    assert_stays(m.output(y), "a constant of 2 axes stands in the way")
    m = Model(declared=nothing_known)
    y = m.bn(m.scaling(m.linear(m.input(2, 3), 4), np.full((1, 1, 1), 2)), 2)
    assert_stays(m.output(y), "a constant of 3 axes stands in the way")
    m = Model()
    y = m.conv(m.input(2, 3, 4), 1)
    y.shape = None
    assert_stays(m.output(m.bn(m.scaling(y, [[2], [3]]))), "it is not known whether scaling 'scaling1' makes one chann")
    m = Model(declared=nothing_known)
    y = m.scaling(m.bn(m.linear(m.input(2, 3), 4, axis=1)), [1, 2, 3, 4])
    decision = the_only(m.output(y).fold())
    assert (decision.action, decision.reason) == (FOLDED, "backward")  # without the constant: which axis is it on?
    m = Model(declared=nothing_known)
    y = m.scaling(m.bn(m.linear(m.input(2, 3), 4), -1), [1, 2, 3, 4])
    assert_folds(m.output(y), "backward, with scaling 'scaling2'")


def test_constants_with_another_reader_stay():
    m = Model()
    y = m.scaling(m.conv(m.input(2, 3, 2)), 2.0)
    m.output(m.bn(y), m.relu(y))
    assert_stays(m, "the output of scaling 'scaling1' has more than one reader")
    m = Model()
    y = m.bn(m.relu(m.input(2, 3)))
    assert_stays(m.output(m.scaling(y, 2.0), y), "its output is an output of the model")


def test_batch_norms_merge():
    m = Model()  # backward, with a pool between
    y = m.bn(m.pool(m.bn(m.relu(m.input(2, 3, 4))), 2))
    decisions = m.output(y).fold()
    assert (decisions["bn1"].action, decisions["bn1"].into) == (MERGED, ("bn3",))  # bn1 comes first: forward
    assert decisions["bn3"].action == REWRITTEN
    m = Model()
    x = m.bn(m.input(2, 3))
    decisions = m.output(m.bn(m.same(x)), m.relu(m.input(2, 3)), m.relu(m.bn(m.input(2, 3)))).fold()
    assert decisions["bn0"].action == MERGED
    m = Model()  # backward only: the first has a second reader by then, through its Concat
    y = m.bn(m.input(2, 3))
    z = m.bn(m.concat(y, m.bn(m.input(2, 2))))
    decisions = m.output(m.relu(z)).fold()
    assert [d.action for d in decisions.values()] == [MERGED, MERGED, REWRITTEN]
    m = Model()
    first, second = m.split(m.bn(m.relu(m.input(2, 5))), 2, 3)
    decisions = m.output(m.relu(first), m.relu(m.bn(second))).fold()
    assert (decisions["bn4"].action, decisions["bn4"].reason) == (MERGED, "backward through split 'split2'")
    assert decisions["bn1"].action == REWRITTEN
    m = Model()  # all of a chain into one layer
    y = m.linear(m.input(2, 3))
    for _ in range(4):
        y = m.bn(y)
    decisions = m.output(y).fold()
    assert {d.action for d in decisions.values()} == {FOLDED}
    assert len(only_layer(m).after) == 3


def test_what_one_move_opens():
    m = Model()  # the two shifts cancel, so that both together can pass the padding
    one = {"gamma": [1], "mean": [0], "var": [1], "eps": 0}
    y = m.bn(m.bn(m.relu(m.input(2, 1, 3)), beta=[1], **one), beta=[-1], **one)
    decisions = m.output(m.conv(y, kernel=3, padding=1)).fold()
    assert [d.action for d in decisions.values()] == [MERGED, FOLDED]
    m = Model()  # the weights cannot hold the first alone, nor before the second has made them small
    y = m.conv(m.bn(m.input(2, 1, 3), gamma=[2e6], beta=[1], mean=[0]), 1, dtype=np.float16)
    decisions = m.output(m.bn(y, gamma=[1e-6], beta=[1], mean=[0])).fold()
    assert [d.reason for d in decisions.values()] == ["forward", "backward"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=lambda t: t.__name__)
def test_what_the_dtype_cannot_hold_stays(dtype):
    top = float(np.finfo(dtype).max)
    m = Model()
    y = m.linear(m.input(2, 3), dtype=dtype)
    m.output(m.bn(y, gamma=[top, 1, 1], beta=[top, 0, 0], mean=[-top, 0, 0], var=[1e-3] * 3))
    decision = the_only(m.fold())
    assert decision.action == LEFT
    assert f"its weights cannot hold it (bias: expected values that {np.dtype(dtype)} can hold" in decision.reason or (
        f"its weights cannot hold it (weight: expected values that {np.dtype(dtype)} can hold" in decision.reason
    )
    m = Model()
    y = m.bn(m.relu(m.input(2, 1)), dtype=dtype, gamma=[top], beta=[0], mean=[0])
    assert_stays(m.output(m.scaling(y, 4.0)), "its output is", LEFT)
    assert m.graph.nodes[2].removed is False
    m = Model()  # on both sides: each alone would do
    y = m.linear(m.bn(m.input(2, 1), gamma=[top**0.6], beta=[0], mean=[0], var=[1]), 1, dtype=dtype)
    decisions = m.output(m.bn(y, gamma=[top**0.6], beta=[0], mean=[0], var=[1])).fold()
    assert [d.action for d in decisions.values()] == [FOLDED, LEFT]
    assert f"its weights cannot hold it (a value exceeds {np.dtype(dtype)})" in decisions["bn2"].reason


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_both_sides_of_a_layer_are_rounded_once(dtype):
    ulp = float(ml_dtypes.finfo(dtype).eps)
    m = Model()
    y = m.bn(m.input(2, 1), gamma=[1 + ulp / 2 + 2.0**-40], beta=[0], mean=[0], var=[1 - 1e-3])
    op = Layer(m.constant([[1.0]], dtype), None, "OI", -1, -1)
    y = m.add("linear", op, [y])
    y = m.bn(y, gamma=[1], beta=[1 + ulp / 2 + 2.0**-40], mean=[0], var=[1 - 1e-3])
    decisions = m.output(y).fold()
    assert {d.changes[0].max_relative_change for d in decisions.values()} == {ulp}
    # Halfway and a little: by way of float32, bfloat16 would round to even, 1.
    assert float(op.folded.weight[0, 0]) == float(op.folded.bias[0]) == 1 + ulp
    assert op.folded.weight.dtype == op.folded.bias.dtype == dtype


def test_integers_become_float64():
    for sides in (True, False), (False, True), (True, True):
        m = Model()
        y = m.bn(m.input(2, 3)) if sides[0] else m.input(2, 3)
        y = m.linear(y, dtype=np.int64)
        m.output(m.bn(y) if sides[1] else y)
        assert all(d.action == FOLDED for d in fold(m.graph))
        assert only_layer(m).folded.weight.dtype == only_layer(m).folded.bias.dtype == np.float64
    m = Model()
    params = BatchNormParams([3], [1], [1], [2], 1e-3)
    m.output(m.scaling(m.add("bn", BatchNorm(params, 1), [m.input(2, 1)]), 0.5)).fold()
    assert [a.dtype for a in m.graph.nodes[0].op.merged()[:3]] == [np.float64] * 3


@pytest.mark.parametrize("bad", [{"var": [1, -1]}, {"mean": [0, np.nan]}, {"gamma": [1, 2, 3]}])
def test_parameters_that_are_none_name_the_node(bad):
    m = Model()
    y = m.bn(m.relu(m.input(2, 2)), 1)
    m.graph.nodes[1].op.params = m.params(2, **bad)
    m.output(y)
    with pytest.raises(ValueError, match=r"^bn 'bn1': (var|mean|gamma): expected .* got "):
        fold(m.graph)
    m.graph.nodes[1].op.held = "it trains"
    assert [d.action for d in fold(m.graph)] == [LEFT]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_batch_norm(dtype):
    """μ' is the input that becomes μ, γ' and β' are within half an ulp of the exact map around it."""
    m = Model(3)
    given = {"gamma": None} if dtype == np.float32 else {}
    x = m.scaling(m.scaling(m.input(5, 4), [2, -3, 0.5, 0], [1, 2, 3, 4]), 2.0)
    m.output(m.scaling(m.bn(x, dtype=dtype, **given), [3, 4, -5, 6], [4, 3, 2, 1], True)).fold()
    op = next(node.op for node in m.graph.nodes if isinstance(node.op, BatchNorm))
    old, new = op.params, op.merged()
    assert new.eps == old.eps
    np.testing.assert_array_equal(new.var, old.var)
    assert {a.dtype for a in new[:3]} == {dtype}
    factor, summand = np.array([4, -6, 1, 0]), np.array([2, 4, 6, 8])
    means = zip(old.mean.tolist(), summand.tolist(), factor.tolist(), strict=True)
    means = np.array([float((Fraction(m) - s) / f) if f else 0.0 for m, s, f in means])
    np.testing.assert_array_equal(new.mean, means.astype(dtype))
    gammas = [1.0] * 4 if old.gamma is None else old.gamma.tolist()
    exact = [float(Fraction(g) * f / d) for g, f, d in zip(gammas, factor.tolist(), [3, 4, -5, 6], strict=True)]
    ulp = np.spacing(np.abs(new.gamma)).astype(np.float64)
    assert (np.abs(new.gamma.astype(np.float64) - exact) <= ulp * (0.5 + 2**-15)).all()
    untouched = BatchNorm(old, 1)
    assert not untouched.taken
    for name, a, b in zip(old._fields, untouched.merged(), old, strict=True):
        expected = {"gamma": np.ones(4), "beta": np.zeros(4)}.get(name) if b is None else b
        np.testing.assert_array_equal(a, expected)


def test_channels_that_do_not_fit_the_input_name_the_node():
    graph, op = Graph(), BatchNorm(BatchNormParams(None, None, np.zeros(4), np.ones(4)), 1)
    graph.add("BN", "b", op, [Value("x", (None, 3, 8))], [Value("y", is_output=True)])
    with pytest.raises(ValueError, match="BN 'b': expected 4 channels, as its parameters have, got 3 in its input"):
        fold(graph)


@pytest.mark.parametrize("forward", [False, True])
def test_ways_without_end_are_given_up(forward):
    m = Model()
    y = m.relu(m.input(1, 2, 1)) if forward else m.conv(m.input(1, 2, 1), 2)
    y = m.bn(y) if forward else y
    for _ in range(20):
        y = m.concat(*m.split(y, 1, 1), axis=1)
    m.output(m.conv(y, 2) if forward else m.bn(y))
    (decision,) = fold(m.graph)
    assert decision.action == LEFT
    assert "ways to go" in decision.reason
