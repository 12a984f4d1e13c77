"""Everything public with arguments good and bad: a right result, or an error that names one and changes nothing.

Hypothesis draws the operation, a seed for good arguments and what is put in place of some of them. A failure shows
these, and ``tried(operation, seed, changes, by_position)`` repeats it.
"""

import warnings

import numpy as np
import pytest
import reference
from calls import attempt, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from odd_values import ALIASES, ODD, odd
from operations_models import CLIPPINGS, OPERATIONS, VARIANTS, hold_optimizer, some_arrays
from reference import U64, assert_within
from reference_optim import Reference

import fastbn


def spoilt(operation, seed, changes, size=600):
    """Return a call with good arguments, some of them (by number) changed for odd ones."""
    rng = np.random.default_rng(seed)
    call = OPERATIONS[operation](rng, size)
    names = list(call.args)
    for number, kind in changes if names else ():
        name = names[number % len(names)]
        call.args[name] = odd(kind, rng, call.args[name], call.near)
    return call


def tried(operation, seed, changes, by_position=False):
    """Make a spoilt call and hold it to its promises; return what `attempt` returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return attempt(spoilt(operation, seed, changes), by_position=by_position)


seeds = st.integers(0, 2**32 - 1)
changes = st.tuples(st.integers(0, 15), st.sampled_from([*ODD, *ALIASES]))


@pytest.mark.parametrize("operation", OPERATIONS)
@given(seed=seeds, by_position=st.booleans())
def test_good_arguments_give_results_within_the_oracles_bounds(operation, seed, by_position):
    _, refusal = tried(operation, seed, [], by_position)
    assert refusal is None


@pytest.mark.parametrize("operation", OPERATIONS)
@given(seed=seeds, changes=st.lists(changes, min_size=1, max_size=3), by_position=st.booleans())
def test_any_arguments_give_a_right_result_or_a_clear_error(operation, seed, changes, by_position):
    tried(operation, seed, changes, by_position)


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if not name.startswith("network")])
def test_every_odd_value_in_place_of_every_argument(operation):
    for number in range(len(OPERATIONS[operation](np.random.default_rng(0), 60).args)):
        for kind in (*ODD, *ALIASES):
            tried(operation, 0, [(number, kind)])


# ---- state: calls in any order, beside a model --------------------------------------------------------------------

REFUSED = ["as c16", "as O", "as U8", "zeros of M8[s]", "masked", "ragged", "generator", "0-d", "one more axis",
           "list of None"]  # fmt: skip
refused = st.sampled_from(REFUSED)  # in place of any array


def refuses(owner, function, *args, **options):
    """Hold a call to an error that changes nothing in its owner."""
    before = picture(owner)
    with pytest.raises((TypeError, ValueError)):
        function(*args, **options)
    assert picture(owner) == before


class LayerBesideAModel(RuleBasedStateMachine):
    """A BatchNorm whose running statistics follow the oracle's, in float64; the bound grows with every batch."""

    @initialize(seed=seeds, unbiased=st.booleans(), momentum=st.sampled_from([0.1, 0.75, 1.0, None]))
    def new(self, seed, unbiased, momentum):
        self.rng = np.random.default_rng(seed)
        self.bn = fastbn.BatchNorm(3, unbiased=unbiased, momentum=momentum, dtype=np.float64)
        self.mean, self.var, self.off = np.zeros(3), np.ones(3), np.zeros(3)
        self.count, self.training, self.last = 0, True, None

    def batch(self):
        rows = int(self.rng.integers(4, 20))  # not 3, which would fit as channels
        return self.rng.normal(self.rng.normal(0, 5), 3, (rows, 3, 2))

    @rule()
    def call(self):
        x = self.batch()
        y, bn, self.last = self.bn(x), self.bn, (x, self.training)
        if not self.training:
            expected = reference.infer(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta)
        else:
            expected = reference.train(x, bn.gamma, bn.beta)
            self.follow(x, 1 / (self.count + 1) if bn.momentum is None else bn.momentum)
            self.count += 1
        assert_within(y, expected.y, reference.y_bound(expected, bn.gamma, bn.beta, x.dtype, 1))

    def follow(self, x, weight):
        mean, var, _ = reference.moments(x)
        n = 2 * len(x)
        var = var * (n / (n - 1) if self.bn.unbiased else 1)
        self.mean, self.var = ((1 - weight) * a + weight * b for a, b in ((self.mean, mean), (self.var, var)))
        self.off = (1 - weight) * self.off + 64 * U64 * (1 + np.max(np.abs(x))) ** 2

    @rule(kind=refused, argument=st.sampled_from(["x", "residual", "out"]))
    def call_refused(self, kind, argument):
        x = self.batch()
        args = {"x": x} | {argument: odd(kind, self.rng, x)}
        refuses(self.bn, self.bn, **args)

    @precondition(lambda self: self.last is not None)
    @rule()
    def backward(self):
        x, trained = self.last
        dy, bn = self.rng.normal(size=x.shape), self.bn
        dx = bn.backward(dy)
        if trained:
            expected = reference.train(x)
            theirs = reference.backward(dy, x, bn.gamma)
            bound = reference.backward_bound(theirs, expected, bn.gamma, x.dtype, 1, dx.dtype)
            for actual, name in ((dx, "dx"), (bn.grad_gamma, "dgamma"), (bn.grad_beta, "dbeta")):
                assert_within(actual, getattr(theirs, name), getattr(bound, name), name)

    @rule(kind=refused)
    def backward_refused(self, kind):
        refuses(self.bn, self.bn.backward, odd(kind, self.rng, self.batch()))

    @rule(training=st.booleans())
    def switch(self, training):
        self.training = self.bn.train(training).training

    @rule()
    def recalibrate(self):
        x = self.batch()
        self.bn.recalibrate([x[:1], x[1:]])
        self.off = 0 * self.off
        self.follow(x, 1.0)

    @rule(kind=refused, method=st.sampled_from(["pooled", "paper", "other"]))
    def recalibrate_refused(self, kind, method):
        refuses(self.bn, self.bn.recalibrate, [self.batch(), odd(kind, self.rng, self.batch())], method)

    @rule()
    def state_goes_to_another_layer(self):
        other = fastbn.BatchNorm(3, unbiased=self.bn.unbiased, momentum=self.bn.momentum, dtype=np.float64)
        other.load_state_dict(self.bn.state_dict())
        self.bn, self.last = other.train(self.training), None

    @rule(kind=refused, number=st.integers(0, 4))
    def state_refused(self, kind, number):
        state = self.bn.state_dict()
        name = list(state)[number]
        refuses(self.bn, self.bn.load_state_dict, state | {name: odd(kind, self.rng, np.ones((4, 3)))})
        refuses(self.bn, self.bn.load_state_dict, {key: v for key, v in state.items() if key != name})

    @invariant()
    def follows(self):
        if hasattr(self, "bn"):
            assert (self.bn.num_batches_tracked, self.bn.training) == (self.count, self.training)
            assert_within(self.bn.running_mean, self.mean, self.off)
            assert_within(self.bn.running_var, self.var, self.off)


class OptimizerBesideAModel(RuleBasedStateMachine):
    """An optimizer and the reference, step by step, between refused calls and changes of hands."""

    @initialize(seed=seeds, variant=st.sampled_from(VARIANTS), clip=st.sampled_from(CLIPPINGS))
    def new(self, seed, variant, clip):
        self.rng = np.random.default_rng(seed)
        self.method, self.options = variant[0], variant[1] | clip
        self.shapes = [(3,), (2, 5), ()]
        self.params = some_arrays(self.rng, self.shapes, np.float64)
        self.model = Reference(self.method, self.params, unit=U64, **self.options)
        self.opt = getattr(fastbn.optim, self.method)(self.params, **self.options)

    @rule(missing=st.sampled_from([None, None, 0, 1]))
    def step(self, missing):
        grads = some_arrays(self.rng, self.shapes, np.float64)
        if missing is not None:
            grads[missing] = None
        before = picture(grads)
        self.opt.step(grads)
        assert picture(grads) == before
        self.model.step(grads)

    @rule(kind=refused, number=st.integers(0, 1))
    def step_refused(self, kind, number):
        grads = some_arrays(self.rng, self.shapes, np.float64)
        grads[number] = odd(kind, self.rng, np.ones((2, 2)))
        refuses((self.opt, self.params, self.opt.state_dict()), self.opt.step, grads)
        refuses((self.opt, self.params, self.opt.state_dict()), self.opt.step, grads[:2])

    @rule(lr=st.floats(0, 0.1))
    def another_rate(self, lr):
        self.opt.lr = self.model.options["lr"] = lr

    @rule(lr=st.sampled_from([-0.1, float("nan"), "0.1", None, 1j]))
    def rate_refused(self, lr):
        refuses(self.opt, setattr, self.opt, "lr", lr)

    @rule()
    def state_goes_to_another_optimizer(self):
        other = getattr(fastbn.optim, self.method)(self.params, **self.options)
        other.load_state_dict(self.opt.state_dict())
        other.lr, self.opt = self.opt.lr, other

    @rule(kind=refused)
    def state_refused(self, kind):
        state = self.opt.state_dict()
        for key in state:
            bad = odd(kind, self.rng, np.ones((4, 3)))
            refuses((self.opt, state), self.opt.load_state_dict, state | {key: bad if key == "step" else [bad] * 3})

    @invariant()
    def follows(self):
        if hasattr(self, "opt"):
            hold_optimizer(self.opt, self.model)


@pytest.mark.parametrize("machine", [LayerBesideAModel, OptimizerBesideAModel])
def test_any_order_of_calls(machine):
    few = settings(max_examples=max(10, settings.default.max_examples // 4), stateful_step_count=30)
    run_state_machine_as_test(machine, settings=few)
