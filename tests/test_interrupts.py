"""Ctrl-C: it ends long work soon, and what it leaves is whole, at whatever point it comes.

Between the instructions of Python it comes at every point in turn, one run of the call for each; within the kernels it
comes as a signal from another thread.
"""

import gc
import itertools
import math
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from interruption import CtrlC, interrupt

import fastbn
from fastbn import nn, optim

RNG = np.random.default_rng(0)
X, X2 = RNG.normal(size=(6, 3)).astype(np.float32), RNG.normal(size=(5, 3)).astype(np.float32) * 2 + 1
LABELS = np.array([0, 1, 0, 1, 1, 0])


@pytest.fixture(autouse=True)
def ctrl_c():
    """KeyboardInterrupt is what SIGINT raises; only the main thread gets it."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread gets signals")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


# ---- at every point of a call ------------------------------------------------------------------------------


def bits(*values):
    return tuple(None if value is None else np.asarray(value).tobytes() for value in values)


class Case(NamedTuple):
    """Something to call with what it changes: `state` is to be that before the call, or that after it."""

    make: Callable[[], Any]
    call: Callable[[Any], Any]
    state: Callable[[Any], Any]


def layer_state(bn):
    return bits(bn.running_mean, bn.running_var, bn.num_batches_tracked, bn.gamma, bn.beta)


def after_backward():
    bn = fastbn.BatchNorm(3)
    bn(X)
    bn.backward(X)
    bn(X2, residual=X2)
    return bn


def other_layer_state():
    bn = fastbn.BatchNorm(3)
    bn.gamma[...], bn.beta[...] = 2, 3
    bn(X)
    return bn.state_dict()


SHAPES = [((2, 3), np.float32), ((3,), np.float64), ((2,), np.float16)]
GRADIENTS = [[np.full(shape, 0.25 * k - 1, dtype) for shape, dtype in SHAPES] for k in range(7)]
OPTIMIZERS = {
    "sgd": lambda params: optim.SGD(params, 0.1, momentum=0.9),
    "rmsprop": lambda params: optim.RMSprop(params, momentum=0.5, centered=True),
    "adam": lambda params: optim.Adam(params, amsgrad=True),
    "adamw": lambda params: optim.AdamW(params, clip_global_norm=0.1, schedule=lambda step: 1 / (step + 2)),
}


def optimizer(kind):
    return OPTIMIZERS[kind]([np.ones(shape, dtype) for shape, dtype in SHAPES])


def optimizer_state(opt):
    state = opt.state_dict()
    step = state.pop("step")
    return step, opt.lr, bits(*opt.params), {slot: bits(*arrays) for slot, arrays in state.items()}


def stepped(kind):
    opt = optimizer(kind)
    opt.step(GRADIENTS[0])
    return opt.state_dict()


def standardizer_state(scaler):
    if not scaler.fitted:
        return None
    numbers = scaler.n_samples_seen_, scaler.n_features_in_, scaler.moments_.count
    return numbers, bits(scaler.mean_, scaler.var_, scaler.scale_, scaler.moments_.mean, scaler.moments_.m2)


def moments_state(m):
    return m.count, bits(m.mean, m.m2)


def network():
    return nn.Sequential(nn.BatchNorm(3), nn.BatchNorm(3))


def network_state(model):
    """Parameters and statistics; and that all layers are in one mode, and the history's lists of one length."""
    one_mode = len({layer.training for layer in model}) == 1
    return (*model.state_dict(), bits(*model.state_dict().values()), one_mode,
            len({len(figures) for figures in model.history.values()}) <= 1)  # fmt: skip


def fit(model_and_optimizer):
    model, opt = model_and_optimizer
    model.fit(X, LABELS, loss="softmax_cross_entropy", optimizer=opt, batch_size=6, progress=False, seed=0)


def network_with_optimizer():
    model = nn.Sequential(nn.Dense(3, 2), nn.BatchNorm(2), seed=0)
    return model, optim.Adam(model.parameters())


def other_network_state():
    model = network()
    model(X)
    return model.state_dict()


CASES = {
    "layer": Case(lambda: fastbn.BatchNorm(3), lambda bn: bn(X), layer_state),
    "layer, cumulative": Case(lambda: fastbn.BatchNorm(3, momentum=None), lambda bn: bn(X), layer_state),
    "layer.backward": Case(
        after_backward, lambda bn: bn.backward(X2), lambda bn: bits(bn.grad_gamma, bn.grad_beta, bn.grad_residual)
    ),
    "layer.recalibrate": Case(lambda: fastbn.BatchNorm(3), lambda bn: bn.recalibrate(iter([X, X2])), layer_state),
    "layer.recalibrate, paper": Case(
        lambda: fastbn.BatchNorm(3), lambda bn: bn.recalibrate([X, X2], "paper"), layer_state
    ),
    "layer.load_state_dict": Case(
        lambda: fastbn.BatchNorm(3), lambda bn: bn.load_state_dict(OTHER_LAYER), layer_state
    ),
    "standardizer.fit": Case(fastbn.Standardizer, lambda scaler: scaler.fit(X), standardizer_state),
    "standardizer.partial_fit": Case(
        lambda: fastbn.Standardizer().fit(X), lambda scaler: scaler.partial_fit(X2), standardizer_state
    ),
    "moments.update": Case(lambda: fastbn.Moments.of(X), lambda m: m.update(X2), moments_state),
    "moments.update, empty": Case(lambda: fastbn.Moments(3), lambda m: m.update(X2), moments_state),
    "moments.merge": Case(lambda: fastbn.Moments.of(X), lambda m: m.merge(fastbn.Moments.of(X2)), moments_state),
    "network.fit": Case(
        network_with_optimizer, fit, lambda both: (network_state(both[0]), optimizer_state(both[1]))
    ),
    "network.recalibrate": Case(network, lambda model: model.recalibrate([X]), network_state),
    "network.load_state_dict": Case(network, lambda model: model.load_state_dict(OTHER_NETWORK), network_state),
}
for name in OPTIMIZERS:
    CASES[f"{name}.step"] = Case(
        lambda name=name: optimizer(name), lambda opt: opt.step(GRADIENTS[0]), optimizer_state
    )
    CASES[f"{name}.load_state_dict"] = Case(
        lambda name=name: optimizer(name),
        lambda opt, state=stepped(name): opt.load_state_dict(state),  # noqa: B008
        optimizer_state,
    )
OTHER_LAYER, OTHER_NETWORK = other_layer_state(), other_network_state()


@pytest.mark.parametrize("name", CASES)
def test_a_call_is_whole_wherever_ctrl_c_comes(name):
    make, call, state = CASES[name]
    subject = make()
    before = state(subject)
    assert interrupt(lambda: call(subject), math.inf) is None
    after = state(subject)
    assert before != after
    threads = fastbn.get_num_threads()

    complete, torn = [], set()
    for number in itertools.count(1):
        subject = make()
        with np.errstate():  # Ctrl-C in NumPy's own `errstate` leaves its setting behind
            where = interrupt(lambda subject=subject: call(subject), number)
        if where is None:
            break
        now = state(subject)
        complete.append(now == after)
        if now == before and number % 5 == 1:  # nothing is left locked or half prepared
            call(subject)
            assert state(subject) == after, where
        elif now not in (before, after):
            torn.add(where)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, where
        assert fastbn.get_num_threads() == threads, where
    assert not torn
    assert complete == sorted(complete)
    assert len(complete) > 20
    assert not complete[0]


def test_points_are_found():
    """At the frame's start, and after each call in it."""

    def twice():
        reached.append(len(reached))
        reached.append(len(reached))

    reached, seen = [], []
    interrupt(twice, math.inf)
    for number in itertools.count(1):
        reached = []
        if interrupt(twice, number) is None:
            break
        seen.append(len(reached))
    assert sorted(set(seen)) == [0, 1, 2]
    assert seen == sorted(seen)


@pytest.fixture(autouse=True)
def floating_point_errors():
    """Give back NumPy's settings: Ctrl-C within np.errstate, which is Python, leaves them as they are there."""
    before = np.geterr()
    yield
    np.seterr(**before)


# ---- at any moment of a training ---------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_training_interrupted_at_any_moment_is_a_whole_number_of_updates(kind):
    """Batches and gradients follow from the counters, so a state is known from its counters alone."""
    rng = np.random.default_rng(len(kind))
    batches = rng.normal(size=(7, 40, 300)).astype(np.float32)
    bn, twin_bn = fastbn.BatchNorm(300), fastbn.BatchNorm(300)
    opt, twin_opt = optimizer(kind), optimizer(kind)
    layer_states, optimizer_states = [layer_state(twin_bn)], [optimizer_state(twin_opt)]

    def train():
        while True:
            y = bn(batches[bn.num_batches_tracked % 7])
            bn.backward(y)
            opt.step(GRADIENTS[opt.state_dict()["step"] % 7])

    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    gc.disable()  # its callbacks, such as Hypothesis's, swallow exceptions
    try:
        for delay in rng.uniform(1e-4, 2e-3, 150):
            try:
                signal.setitimer(signal.ITIMER_REAL, delay, 1.0)  # again, should the first be swallowed somewhere
                train()
            except KeyboardInterrupt:
                signal.setitimer(signal.ITIMER_REAL, 0)
            while len(layer_states) <= bn.num_batches_tracked:
                twin_bn(batches[twin_bn.num_batches_tracked % 7])
                layer_states.append(layer_state(twin_bn))
            step = opt.state_dict()["step"]
            while len(optimizer_states) <= step:
                twin_opt.step(GRADIENTS[(len(optimizer_states) - 1) % 7])
                optimizer_states.append(optimizer_state(twin_opt))
            assert layer_state(bn) == layer_states[bn.num_batches_tracked]
            assert optimizer_state(opt) == optimizer_states[step]
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert 0 < opt.state_dict()["step"] <= bn.num_batches_tracked


# ---- within one long call ----------------------------------------------------------------------------------

SOON = 1.0  # seconds of CPU, which other work on the machine does not spend
ROWS = 1 << 19  # of 1024 float32: 2 GiB, of which zeros and results not yet written take no memory
ONES = np.ones(1024, np.float32)


def zeros():
    return np.zeros((ROWS, 1024), np.float32)


def long_backward(n):
    """Backward of a batch that no forward pass had to go through first."""
    saved = fastbn.batch_norm_train(np.eye(2, 1024, dtype=np.float32))[1]
    saved.x, saved.count = zeros(), ROWS
    return fastbn.batch_norm_backward(zeros(), saved, num_threads=n)


LONG = {
    "train": lambda n: fastbn.batch_norm_train(zeros(), num_threads=n),
    "train, channels first": lambda n: fastbn.batch_norm_train(zeros().reshape(-1, 16, 1024), num_threads=n),
    "infer": lambda n: fastbn.batch_norm_infer(zeros(), ONES, ONES, num_threads=n),
    "backward": long_backward,
    "moments": lambda n: fastbn.Moments.of(np.broadcast_to(ONES, (1 << 24, 1024)), num_threads=n),
}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("kernel", LONG)
def test_a_long_call_ends_soon(kernel, n):
    with CtrlC(0.1) as ctrl_c:
        LONG[kernel](n)
        pytest.fail("it came to its end")
    assert ctrl_c.spent < SOON * n


def test_ctrl_c_is_not_lost_where_a_large_result_goes():
    """Where Python ends an object by a method of Python's, it swallows what is raised there."""
    x = np.broadcast_to(ONES, (10_000, 1024))  # 40 MiB: its memory is kept

    def call():
        for _ in range(2):
            fastbn.batch_norm_infer(x, ONES, ONES, num_threads=1)

    interrupt(call, math.inf)
    points = 0
    while interrupt(call, points + 1) is not None:
        points += 1
    assert points > 20


ENORMOUS = np.broadcast_to(np.arange(6, dtype=np.float32), (1 << 31, 6))
LONG_STATE = {
    "layer": Case(lambda: fastbn.BatchNorm(1024), lambda bn: bn(zeros(), num_threads=1), layer_state),
    "layer.recalibrate": Case(lambda: fastbn.BatchNorm(6), lambda bn: bn.recalibrate([ENORMOUS]), layer_state),
    "standardizer.partial_fit": Case(
        lambda: fastbn.Standardizer().fit(ENORMOUS[:9]), lambda s: s.partial_fit(ENORMOUS), standardizer_state
    ),
    "moments.update": Case(lambda: fastbn.Moments.of(ENORMOUS[:9]), lambda m: m.update(ENORMOUS), moments_state),
}


@pytest.mark.parametrize("name", LONG_STATE)
def test_a_long_call_cut_short_changes_nothing(name):
    make, call, state = LONG_STATE[name]
    subject = make()
    before = state(subject)
    with fastbn.num_threads(1), CtrlC(0.1) as ctrl_c:
        call(subject)
        pytest.fail("it came to its end")
    assert ctrl_c.spent < SOON
    assert state(subject) == before


def test_a_long_step_is_never_cut_in_two():
    """A step is at most a few passes over the parameters' memory; it ends, is counted, and then Ctrl-C acts."""
    params = [np.zeros(1 << 25, np.float32), np.zeros(3, np.float32)]
    opt = optim.Adam(params)
    gradients = [np.ones_like(p) for p in params]
    opt.step(gradients)
    with CtrlC(0.02):
        while True:
            opt.step(gradients, num_threads=1)
    twin = optim.Adam([np.zeros(3, np.float32)])
    step = opt.state_dict()["step"]
    for _ in range(step):
        twin.step(gradients[1:])
    assert step > 0
    for p in params:
        assert (p == twin.params[0][0]).all()
    for slot in ("exp_avg", "exp_avg_sq"):
        large, small = opt.state_dict()[slot]
        assert (large == small[0]).all()
        assert small.tobytes() == twin.state_dict()[slot][0].tobytes()
