"""Changes of state refuse what does not fit, whatever a user has put in an attribute; handlers and children go on."""

import json
import os
import signal
import threading
import weakref
import zipfile

import numpy as np
import pytest

import fastbn
from fastbn import nn, optim
from fastbn.interrupts import interrupt_deferred

X = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
CHANGES = {
    "call": lambda bn: bn(X),
    "recalibrate": lambda bn: bn.recalibrate([X]),
    "load_state_dict": lambda bn: bn.load_state_dict(fastbn.BatchNorm(8).state_dict()),
}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
needs_usr1 = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs SIGUSR1")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("odd", ["too short", "too long", "read-only", "a list", "integers"])
def test_an_array_that_does_not_fit_is_refused_before_anything_is_written(change, name, odd):
    bn, memory = fastbn.BatchNorm(8), np.full(64, 7, np.float32)
    array = {
        "too short": memory[:1], "too long": memory[:9], "read-only": memory[:8], "a list": [0.0] * 8,
        "integers": np.zeros(8, np.int64),
    }[odd]  # fmt: skip
    if odd == "read-only":
        array.flags.writeable = False
    setattr(bn, name, array)
    other = {"running_mean": "running_var", "running_var": "running_mean"}[name]
    before = getattr(bn, other).copy()
    with pytest.raises((TypeError, ValueError), match=f"^{name}: expected"):
        CHANGES[change](bn)
    assert (memory == 7).all()
    assert (getattr(bn, other) == before).all()
    assert bn.num_batches_tracked == 0


class Own(np.ndarray):
    pass


LYING = {
    "of a subclass": lambda a: a.view(Own),
    "strided": lambda a: np.repeat(a, 2)[::2],
    "reversed": lambda a: a[::-1].copy()[::-1],
}


@pytest.mark.parametrize("lying", LYING.values(), ids=LYING)
def test_a_state_dict_has_copies_wherever_the_arrays_lie(lying):
    bn, state = fastbn.BatchNorm(8), fastbn.BatchNorm(8).state_dict()
    bn.running_mean = lying(np.zeros(8, np.float32))
    state["running_mean"] = np.arange(8, dtype=np.float32)
    bn.load_state_dict(state)
    copied = bn.state_dict()["running_mean"]
    assert not np.shares_memory(copied, bn.running_mean)
    assert copied.tolist() == bn.running_mean.tolist() == list(range(8))


@pytest.mark.parametrize("lying", LYING.values(), ids=LYING)
def test_large_states_are_never_torn_wherever_the_arrays_lie(lying):
    c, done, torn = 100_000, threading.Event(), []  # NumPy's own copies let other threads in from 500 elements on
    bn = fastbn.BatchNorm(c)
    bn.running_mean, bn.running_var = lying(np.ones(c, np.float32)), lying(np.ones(c, np.float32))
    states = [bn.state_dict() | {f"running_{name}": np.full(c, k) for name in ("mean", "var")} for k in (1.0, 2.0)]

    def load(state):
        while not done.is_set():
            bn.load_state_dict(state)

    writers = [threading.Thread(target=load, args=(state,)) for state in states]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            state = bn.state_dict()
            torn.append(len(np.unique([state["running_mean"], state["running_var"]])) > 1)
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert not any(torn)


def test_what_a_change_sets_off_may_look_at_the_layer():
    """A finaliser of what a layer held, a property of a subclass: on a CPython without a GIL a lock is held."""
    seen = []

    class Counted(fastbn.BatchNorm):
        @property
        def num_batches_tracked(self):
            return self.__dict__["counted"]

        @num_batches_tracked.setter
        def num_batches_tracked(self, value):
            self.__dict__["counted"] = value
            seen.append(self.state_dict() if "running_var" in self.__dict__ else None)

    bn = Counted(8)
    for _ in range(2):
        bn(X, residual=X)
        bn.backward(X)
        weakref.finalize(bn.grad_residual, lambda: seen.append(bn.state_dict()))
    bn.grad_residual = None
    assert len(seen) == 1 + 2 + 2


COUNTS = {
    "counted": (2**62, 0.1, ValueError), "negative": (-1, None, ValueError), "a float": (1.0, 0.1, TypeError),
    "enormous": (10**400, None, ValueError), "text": (1, "0.5", TypeError),
    "more than all": (1, 1.5, ValueError), "less than none": (1, -0.1, ValueError),
    "NaN": (1, float("nan"), ValueError),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_or_a_momentum_that_is_none_is_refused_before_anything_is_written(name):
    bn = fastbn.BatchNorm(8)
    bn.num_batches_tracked, bn.momentum, error = COUNTS[name]
    with pytest.raises(error, match="^num_batches_tracked, momentum: expected"):
        bn(X)
    assert not bn.running_mean.any()


def test_counts_at_their_end():
    bn, opt = fastbn.BatchNorm(8), optim.SGD([np.zeros(4)], lr=0.1)
    state = bn.state_dict()
    for most, fits in ((2**62, True), (2**62 + 1, False)):
        for owner, given, name in (
            (bn, state | {"num_batches_tracked": most}, "num_batches_tracked"), (opt, {"step": most}, "step")
        ):  # fmt: skip
            if fits:
                owner.load_state_dict(given)
            else:
                with pytest.raises(ValueError, match=f"^{name}: expected an integer from 0 to 2⁶², got"):
                    owner.load_state_dict(given)
            assert owner.state_dict()[name] == 2**62


def test_gradients_beyond_float32_are_infinite_without_a_warning():
    bn = fastbn.BatchNorm(8)
    bn(X)
    bn.backward(np.full_like(X, 3e38))
    assert np.isinf(bn.grad_beta).all()


@needs_usr1
def test_a_signals_handler_may_keep_an_optimizers_state_and_set_its_rate():
    opt = optim.Adam([np.zeros(300_000, np.float32)])
    gradient, kept = np.ones(300_000, np.float32), []

    def keep(*_):
        kept.append(opt.state_dict()["step"])
        opt.lr = 1e-4

    handler = signal.signal(signal.SIGUSR1, keep)
    try:
        for i in range(200):
            timer = threading.Thread(target=signal.raise_signal, args=(signal.SIGUSR1,))
            timer.start()
            opt.step([gradient])
            timer.join()
            assert opt.state_dict()["step"] == i + 1
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert kept == sorted(kept)
    assert opt.lr == 1e-4


def test_a_schedule_cannot_step_within_a_step():
    p = np.zeros(4)
    opt = optim.SGD([p], lr=1.0, schedule=lambda step: opt.step([np.ones(4)]) or 1.0)
    with pytest.raises(RuntimeError, match="within it"):
        opt.step([np.ones(4)])
    assert (p == 0).all()
    assert opt.state_dict()["step"] == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_within_another_threads_step_may_step():
    size = 2_000_000
    opt, gradient, done = optim.SGD([np.zeros(size, np.float32)], lr=0.1), np.ones(size, np.float32), threading.Event()

    def steps():
        while not done.is_set():
            opt.step([gradient])

    thread = threading.Thread(target=steps)
    thread.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # a child that hangs is killed
                try:
                    opt.step([gradient])
                    opt.state_dict()
                finally:
                    os._exit(0 if opt.lr == 0.1 else 3)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        done.set()
        thread.join()


def test_ctrl_c_is_given_back_where_another_handler_raises():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(ZeroDivisionError), interrupt_deferred():
            raise ZeroDivisionError
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        reached = []

        @interrupt_deferred()
        def interrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append("the end")

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert reached == ["the end"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_file_of_many_layers_is_refused_at_once(tmp_path):
    path = tmp_path / "model.npz"
    text = json.dumps({"format": "fastbn.nn", "version": 1, "layers": [{"type": "ReLU"}] * 80_000})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("architecture.npy", "w") as member:
        np.lib.format.write_array(member, np.array(text), allow_pickle=False)
    with pytest.raises(ValueError, match="expected at most 10000 layers, got 80000"):
        nn.load(path)
