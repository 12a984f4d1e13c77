"""A call that fails changes nothing: every object whole, to the byte, after each kind of failure.

Bad arguments one by one are the subject of each module's own tests; here are failures that come late, in the middle of
something or from outside: the last array of many, an iterable or a schedule that raises, memory that runs out.
"""

import numpy as np
import pytest
from calls import picture
from strategies import BFLOAT16, FLOAT16, FLOAT32, FLOAT64

import fastbn
from fastbn import BatchNorm, Moments, Standardizer, nn, optim

RNG = np.random.default_rng(1)
X = RNG.normal(size=(8, 3, 5)).astype(np.float32)
ROWS = RNG.normal(size=(8, 3)).astype(np.float32)
ENDLESS = np.broadcast_to(np.float32(1), (2**30, 3, 2**28))  # for whose results no computer has memory


class Unreadable:
    """What fails when it is looked at."""

    def __array__(self, dtype=None, copy=None):
        raise OSError("gone")


def broken(*values, error=OSError):
    """Yield some values, then raise."""
    yield from values
    raise error("gone")


def refuse(thing, call, error, words, seen=None):
    """Make a call that has to fail and compare all of an object, or `seen` of it, before and after."""
    before = picture(seen or thing)
    with pytest.raises(error, match=words):
        call(thing)
    assert picture(seen or thing) == before


def read_only(array):
    array.flags.writeable = False
    return array


# ---- the layer ------------------------------------------------------------------------------------------------------


def layer(training, activation=None):
    """A layer that has seen a forward and a backward pass."""
    bn = BatchNorm(3, activation=activation).train(training)
    bn.gamma[:], bn.beta[:] = RNG.normal(size=(2, 3))
    bn(X, residual=X)
    bn.backward(X)
    return bn


MEMORY = np.zeros((9, 3, 5), np.float32)
CALLS = {
    "unreadable": (lambda bn: bn(Unreadable()), TypeError, "^x: .*gone"),
    "unreadable residual": (lambda bn: bn(X, residual=Unreadable()), TypeError, "^residual: .*gone"),
    "out overlaps x": (lambda bn: bn(MEMORY[1:], out=MEMORY[:-1]), ValueError, "^out: .*overlaps x"),
    "out is the residual": (lambda bn: bn(X, residual=MEMORY[1:], out=MEMORY[1:]), ValueError, "^out: .*residual"),
    "out read-only": (lambda bn: bn(X, out=read_only(X.copy())), ValueError, "^out: .*read-only"),
    "out of one element": (lambda bn: bn(X, out=np.broadcast_to(X[:1, :1, :1], X.shape)), ValueError, "^out: "),
    "threads of a fraction": (lambda bn: bn(X, num_threads=1.5), TypeError, "^num_threads: "),
    "no memory": (lambda bn: bn(ENDLESS), MemoryError, None),
    "no memory for a residual": (lambda bn: bn(ENDLESS, residual=ENDLESS), MemoryError, None),
    "backward, unreadable": (lambda bn: bn.backward(Unreadable()), TypeError, "^dy: .*gone"),
    "backward, another shape": (lambda bn: bn.backward(X[:4]), ValueError, "^dy: expected shape"),
    "backward, out is x": (lambda bn: bn.backward(X.copy(), out=X), ValueError, "^out: .*apart from x"),
    "backward, threads": (lambda bn: bn.backward(X, num_threads=0), ValueError, "^num_threads: "),
    "load, last entry": (
        lambda bn: bn.load_state_dict(bn.state_dict() | {"weight": np.ones(3), "running_var": np.ones(4)}),
        ValueError, "^running_var: expected shape",
    ),
    "load, unreadable": (
        lambda bn: bn.load_state_dict(bn.state_dict() | {"weight": np.ones(3), "bias": Unreadable()}),
        TypeError, "^bias: ",
    ),
    "load, the count": (
        lambda bn: bn.load_state_dict(bn.state_dict() | {"weight": np.ones(3), "num_batches_tracked": -1}),
        ValueError, "^num_batches_tracked: ",
    ),
    "recalibrate, end of the world": (
        lambda bn: bn.recalibrate(broken(X, X, error=KeyboardInterrupt)), KeyboardInterrupt, "gone"
    ),
    "recalibrate, moments of others": (lambda bn: bn.recalibrate([X, Moments(4)]), ValueError, "^batches: "),
    "recalibrate, unreadable": (lambda bn: bn.recalibrate([X, Unreadable()]), TypeError, "^x: .*gone"),
    "recalibrate, nothing to read": (lambda bn: bn.recalibrate(None), TypeError, None),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", CALLS)
def test_layer(name, activation, training):
    bn, memory = layer(training, activation), X.tobytes() + MEMORY.tobytes()
    refuse(bn, *CALLS[name])
    assert X.tobytes() + MEMORY.tobytes() == memory


@pytest.mark.parametrize("attribute", ["gamma", "beta"])
@pytest.mark.parametrize("training", [True, False])
def test_layer_with_a_parameter_that_was_replaced(training, attribute):
    bn = layer(training)
    setattr(bn, attribute, np.ones(4, np.float32))
    refuse(bn, lambda bn: bn(X), ValueError, f"^{attribute}: expected shape")


def test_layer_without_two_values():
    refuse(layer(True), lambda bn: bn(X[:1, :, :1], residual=X[:1, :, :1]), ValueError, "^x: expected 2 or more values")


def test_layer_whose_variance_has_no_root():
    bn = layer(False)
    bn.running_var[2] = -1
    refuse(bn, lambda bn: bn(X), ValueError, "^var: ")
    refuse(bn, BatchNorm.to_affine, ValueError, "^var: ")


# ---- moments and standardised inputs --------------------------------------------------------------------------------

MOMENTS = {
    "unreadable": (lambda m: m.update(Unreadable()), TypeError, "^x: .*gone"),
    "other channels": (lambda m: m.update(np.ones((4, 2))), ValueError, "^other: expected 3 channels"),
    "no array": (lambda m: m.update("rows"), TypeError, "^x: "),
    "merge with a dict": (lambda m: m.merge(m.to_dict()), TypeError, "^other: "),
    "variance of too few": (lambda m: m.var(correction=8), ValueError, "^correction: "),
}
SCALER = {
    "unreadable": (lambda s: s.partial_fit(Unreadable()), TypeError, "^x: .*gone"),
    "other features": (lambda s: s.partial_fit(ROWS[:, :2]), ValueError, r"^x: expected shape \(N, 3\)"),
    "three dimensions": (lambda s: s.partial_fit(X), ValueError, "^x: expected shape"),
    "fit of no rows": (lambda s: s.fit(ROWS[:0]), ValueError, "^x: expected at least one row"),
    "fit of text": (lambda s: s.fit(np.full((2, 3), "a")), TypeError, "^x: "),
    "no memory": (lambda s: s.transform(np.broadcast_to(np.float32(1), (2**58, 3))), MemoryError, None),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_moments(name):
    refuse(Moments.of(ROWS), *MOMENTS[name])


@pytest.mark.parametrize("name", SCALER)
def test_standardizer(name):
    refuse(Standardizer().fit(ROWS), *SCALER[name])


# ---- optimizers -----------------------------------------------------------------------------------------------------

METHODS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
    "AdamW": {},
}
CLIPS = [{}, {"clip_value": 0.1}, {"clip_norm": 0.1}, {"clip_global_norm": 0.1}]
SIZES, DTYPES = [(2, 3), (70_000,), (5,), (4, 1)], [FLOAT32, FLOAT64, FLOAT16, BFLOAT16]


def gradients():
    rng = np.random.default_rng(2)
    return [rng.normal(size=shape).astype(dtype) for shape, dtype in zip(SIZES, DTYPES, strict=True)]


def optimizer(method, schedule=None, clip=CLIPS[0]):
    """An optimizer of arrays of every dtype that has made a step."""
    opt = getattr(optim, method)(gradients(), **METHODS[method] | clip, schedule=schedule)
    opt.step(gradients())
    return opt


# What becomes of gradient i
SPOILT = {
    "another shape": lambda g, p: g.reshape(-1)[1:],
    "another dtype": lambda g, p: g.astype(np.int32),
    "complex": lambda g, p: g.astype(complex),
    "unreadable": lambda g, p: Unreadable(),
    "text": lambda g, p: "gradient",
    "the parameter": lambda g, p: p,
}


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("spoilt", SPOILT)
@pytest.mark.parametrize("method", METHODS)
def test_one_bad_gradient_of_many(method, spoilt, index):
    opt = optimizer(method, clip=CLIPS[index])
    grads = gradients()
    grads[index] = SPOILT[spoilt](grads[index], opt.params[index])
    refuse(opt, lambda opt: opt.step(grads), (TypeError, ValueError), rf"^grads\[{index}\]: ")


def rate_that_fails(step):
    if step:
        raise OSError("gone")
    return 0.1


STEPS = {
    "an iterator that raises": (lambda opt: opt.step(broken(*gradients()[:2])), OSError, "gone"),
    "too many": (lambda opt: opt.step([*gradients(), np.ones(1)]), ValueError, "^grads: expected 4 arrays"),
    "none at all": (lambda opt: opt.step(None), ValueError, "^grads: "),
    "threads": (lambda opt: opt.step(gradients(), num_threads=-1), ValueError, "^num_threads: "),
    "rate of NaN": (lambda opt: setattr(opt, "lr", float("nan")), ValueError, "^lr: "),
    "load, last slot": (
        lambda opt: opt.load_state_dict(
            {k: v if k == "step" else [a + 1 for a in v[:-1]] + [v[-1].ravel()] for k, v in opt.state_dict().items()}
        ), ValueError, "expected shape",
    ),
    "load, unreadable": (
        lambda opt: opt.load_state_dict(
            {k: v if k == "step" else [a + 1 for a in v[:-1]] + [Unreadable()] for k, v in opt.state_dict().items()}
        ), TypeError, "gone",
    ),
    "load, no mapping": (lambda opt: opt.load_state_dict([1]), (TypeError, ValueError), "^state: "),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("method", METHODS)
def test_optimizer(method, name):
    refuse(optimizer(method), *STEPS[name])


@pytest.mark.parametrize("clip", CLIPS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_schedule_that_raises(method, clip):
    refuse(optimizer(method, rate_that_fails, clip), lambda opt: opt.step(gradients()), OSError, "gone")


@pytest.mark.parametrize("index", range(4))
def test_a_parameter_that_became_read_only(index):
    opt = optimizer("Adam")
    opt.params[index].flags.writeable = False
    refuse(opt, lambda opt: opt.step(gradients()), ValueError, rf"^params\[{index}\]: ")


def test_projection_of_many_with_one_that_has_no_such_axis():
    params = [10 * np.ones((3, 3)), 10 * np.ones((2, 3)), 10 * np.ones(3)]
    refuse(params, lambda params: optim.project_max_norm(params, 1.0, axis=1), ValueError, "^axis: ")
    params[2] = read_only(10 * np.ones((3, 3)))
    refuse(params, lambda params: optim.project_max_norm(params, 1.0, axis=1), ValueError, r"^params\[2\]: ")


# ---- networks -------------------------------------------------------------------------------------------------------

LABELS = np.arange(8) % 2


class OneStep:
    """Steps once, then fails."""

    def __init__(self, model):
        self.inner, self.steps = optim.Adam(model.parameters()), 0

    def step(self, grads):
        self.steps += 1
        if self.steps == 2:
            raise OSError("gone")
        self.inner.step(grads)


def network():
    model = nn.Sequential(
        nn.Standardizer(), nn.Dense(3, 4), nn.BatchNorm(4), nn.ReLU(), nn.BatchNorm(4), nn.Dense(4, 2), seed=0
    )
    adam = optim.Adam(model.parameters())
    model.fit(ROWS, LABELS, loss="softmax_cross_entropy", optimizer=adam, progress=False)
    return model


MODEL = {
    "call, other features": (lambda m: m.train()(ROWS[:, :2]), ValueError, "^x: "),
    "call, unreadable": (lambda m: m.train()(Unreadable()), TypeError, "^x: .*gone"),
    "call, one row": (lambda m: m.train()(ROWS[:1]), ValueError, "^x: expected 2 or more values"),
    "backward, another shape": (lambda m: m.backward(ROWS), ValueError, "expected shape"),
    "predict, text": (lambda m: m.predict([["a", "b", "c"]]), TypeError, "^x: "),
    "recalibrate, raises": (lambda m: m.recalibrate(broken(ROWS)), OSError, "gone"),
    "recalibrate, last batch": (lambda m: m.recalibrate([ROWS, ROWS[:, :2]]), ValueError, r"^batches\[1\]: "),
    "recalibrate, one row": (lambda m: m.recalibrate([ROWS, ROWS[:1]], "paper"), ValueError, "2 or more values"),
    "load, last entry": (
        lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()} | {"5.bias": np.ones(3)}),
        ValueError, r"^layers\[5\] \(Dense\): bias: ",
    ),
    "evaluate, labels": (lambda m: m.evaluate(ROWS, LABELS + 1, loss="softmax_cross_entropy"), ValueError, "^y: "),
    "fit, no optimizer of it": (
        lambda m: m.fit(ROWS, LABELS, loss="softmax_cross_entropy", optimizer=optimizer("SGD")),
        ValueError, "^optimizer: ",
    ),
    "save where nothing is": (lambda m: m.save("/there/is/no/such/folder/model.npz"), OSError, None),
}  # fmt: skip


@pytest.mark.parametrize("name", MODEL)
def test_network(name):
    """Parameters, statistics, gradients and the generator; `train` and `eval` set the mode before they fail."""
    model = network()
    model.train()(ROWS)
    model.backward(np.ones((8, 2), np.float32))
    held = [model.parameters(), model.gradients(), model.state_dict, model.rng, model.history]
    refuse(model, *MODEL[name], seen=held)


def test_network_whose_optimizer_fails():
    """The parameters are those after whole steps, and those of the optimizer."""
    model, twin = network(), network()
    for m, epochs, opt in ((model, 3, OneStep(model)), (twin, 1, optim.Adam(twin.parameters()))):
        options = {"loss": "softmax_cross_entropy", "optimizer": opt, "epochs": epochs, "progress": False, "seed": 3}
        if m is twin:
            m.fit(ROWS, LABELS, **options)
            continue
        with pytest.raises(OSError, match="gone"):
            m.fit(ROWS, LABELS, **options)
    assert picture(model.parameters()) == picture(twin.parameters())
    assert not model.training


# ---- the thread budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", None, True])
def test_thread_budget(bad):
    before = fastbn.get_num_threads()
    with pytest.raises((TypeError, ValueError), match="^(n|num_threads|threads): "):
        fastbn.set_num_threads(bad)
    with pytest.raises((TypeError, ValueError), match="^(n|num_threads|threads): "), fastbn.num_threads(bad):
        pass
    assert fastbn.get_num_threads() == before
