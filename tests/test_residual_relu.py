"""ReLU after a residual: y and a bit per element in one pass, and the bits read back in backward, by every route."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_within, bits
from strategies import BFLOAT16, BLOCK_NCS, DTYPES, FLOAT16, FLOAT32, FLOAT64, SHORT_RUN, empty_place, places, problems
from test_numerical_contract import THREADS, check_bounds, make, name, running

import fastbn
from fastbn import batch_norm_backward, batch_norm_infer, batch_norm_train
from fastbn._core import dispatch

# (shape, channel axis): a run's bits may begin anywhere in a byte where the run is short
CASES = [
    ((2, 3, SHORT_RUN + 1), 1),  # long runs
    ((3, 4, 300), 1),
    ((9, 3, 272), 1),
    ((1, 2, BLOCK_NCS + 3), 1),  # in pieces
    ((2, 2, 3 * BLOCK_NCS + 77), 1),
    ((60, 3, 300), 1),  # several blocks
    ((9, 5, 49), 1),  # short runs by columns
    ((8, 24, 13, 13), 1),
    ((33, 3, 255), 1),
    ((20, 7, SHORT_RUN), 1),
    ((300, 17, 49), 1),
    ((8000, 2, 9), 1),  # side by side
    ((3, 5, 49), 1),  # fewer than 8 of them: by runs
    ((7, 24, 169), 1),
    ((1, 9, 255), 1),
    ((2, 130, 1, 7), 1),
    ((7, 3, SHORT_RUN), 1),
    ((3, 1, 50), 1),  # one channel
    ((1, 1, 40_001), 1),
    ((77, 1), 1),
    ((24, 300), 0),
    ((5, 6, 21), 0),
    ((40, 3), 1),  # rows
    ((9, 24), 1),
    ((2, 5), 1),
    ((61, 255), 1),
    ((300, 1000), 1),  # several tiles
    ((11, 3000), 1),
    ((1201, 144), 1),  # several blocks
    ((30_000, 3), 1),
    ((6, 7, 7, 25), -1),
]


def arrays(case, dtype, seed=0):
    """Return x, residual, gamma, beta, dy; every seventh y is near 0."""
    shape, axis = case
    x, gamma, beta, dy = make(case, "plain", dtype, seed)
    residual = np.random.default_rng(seed + 1).normal(size=shape)
    plain = batch_norm_train(x, gamma, beta, axis=axis)[0].astype(np.float64)
    seventh = np.arange(x.size).reshape(shape) % 7 == 3
    return x, np.where(seventh, -plain, residual).astype(dtype), gamma, beta, dy


def run(x, residual, gamma, beta, dy, axis, threads=None, *, eps=1e-5, y=None, dx=None):
    """Return y, dx, dγ, dβ and the residual's gradient; y and dx where they are given."""
    y, saved = batch_norm_train(
        x, gamma, beta, axis=axis, eps=eps, activation="relu", residual=residual, num_threads=threads, out=y
    )
    return y, *batch_norm_backward(dy, saved, num_threads=threads, out=dx)


def check(x, residual, gamma, beta, dy, axis, *, eps=1e-5, **out):
    """Hold one pass to the oracle, its own sign of y deciding, and the residual's gradient to its bits."""
    y, dx, dgamma, dbeta, dresidual = run(x, residual, gamma, beta, dy, axis, eps=eps, **out)
    dtype, options = y.dtype, {"axis": axis, "eps": eps}
    expected = reference.train(x, gamma, beta, **options, activation="relu", residual=residual)
    assert_within(y, expected.y, reference.y_bound(expected, gamma, beta, dtype, axis, residual=residual), "y")
    passes = ~(y <= 0)
    assert bits(dresidual) == bits(np.where(passes, dy, np.zeros((), dtype)).astype(dtype))
    theirs = reference.backward(dy, x, gamma, **options, passes=passes)
    bound = reference.backward_bound(theirs, expected, gamma, dtype, axis, dgamma.dtype)
    for key, ours in (("dx", dx), ("dgamma", dgamma), ("dbeta", dbeta)):
        assert_within(ours, getattr(theirs, key), getattr(bound, key), key)
    return y, dx, dgamma, dbeta, dresidual


# ---- the oracle, and the same bits --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_route_is_the_method(case, dtype):
    x, residual, gamma, beta, dy = arrays(case, dtype)
    check_bounds(x, gamma, beta, dy, axis=case[1], activation="relu", residual=residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_route_has_the_same_bits_on_all_threads_and_instruction_sets(case, dtype):
    x, residual, gamma, beta, dy = arrays(case, dtype)
    first = [bits(a) for a in run(x, residual, gamma, beta, dy, case[1], 1)]
    inferred = None
    for isa, threads in itertools.product(dispatch.available(), THREADS):
        with running(isa):
            found = run(x, residual, gamma, beta, dy, case[1], threads)
            y, saved = batch_norm_train(
                x, gamma, beta, axis=case[1], activation="relu", residual=residual, num_threads=threads
            )
            assert np.array_equal(saved.bits.read(), ~(y <= 0)), (isa, threads)
            again = batch_norm_infer(
                x, saved.mean, saved.var, gamma, beta, axis=case[1], activation="relu", residual=residual
            )
        assert [bits(a) for a in found] == first, (isa, threads)
        inferred = inferred or bits(again)
        assert bits(again) == inferred == first[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_from_there_on_it_is_the_backward_pass_without_an_activation(case, dtype):
    x, residual, gamma, beta, dy = arrays(case, dtype)
    _, dx, dgamma, dbeta, dresidual = run(x, residual, gamma, beta, dy, case[1])
    theirs = batch_norm_backward(dresidual, batch_norm_train(x, gamma, beta, axis=case[1])[1])
    assert [bits(a) for a in (dx, dgamma, dbeta)] == [bits(a) for a in theirs[:3]]


@given(problems(), st.data())
def test_any_problem_from_any_place_into_any_place(p, data):
    residual = p.dy[::-1] if p.residual is None else p.residual
    outputs = {key: data.draw(places(p.x.ndim, output=True)) for key in ("y", "dx")}
    outputs = {key: empty_place(place, p.x.shape, p.dtype) for key, place in outputs.items()}
    outside = [bits(memory) for _, memory in outputs.values()]
    views = {key: view for key, (view, _) in outputs.items()}
    y, dx, *_ = check(p.x, residual, p.gamma, p.beta, p.dy, p.axis, eps=p.eps, **views)
    assert y is views["y"]
    assert dx is views["dx"]
    y[...] = dx[...] = 0
    assert [bits(memory) for _, memory in outputs.values()] == outside  # what lies between the elements is untouched


# ---- places in memory -------------------------------------------------------------------------------------------

VIEWS = {
    "contiguous": lambda a: a,
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "reversed": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
    "channels reversed": lambda a: np.ascontiguousarray(a[:, ::-1])[:, ::-1],
    "part of a run": lambda a: np.pad(a, ((0, 0), (0, 0), (3, 2)), constant_values=np.nan)[:, :, 3:-2],
    "every other channel": lambda a: a.repeat(2, 1)[:, ::2],
    "every other image": lambda a: a.repeat(2, 0)[::2],
    "every third of a run": lambda a: a.repeat(3, 2)[:, :, ::3],
    "channels last": lambda a: np.ascontiguousarray(a.transpose(0, 2, 1)).transpose(0, 2, 1),
    "misaligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(a.dtype).reshape(a.shape),
}


@pytest.mark.parametrize("shape", [(3, 5, 49), (9, 5, 49), (2, 3, 300), (9, 24, 7), (2, 1, 33)], ids=str)
@pytest.mark.parametrize("which", ["x", "residual", "dy", "out", "dx", "x and residual", "all but dy"])
@pytest.mark.parametrize("view", VIEWS)
def test_layouts_that_differ_between_forward_and_backward(view, which, shape):
    for dtype in (FLOAT32, FLOAT16):
        x, residual, gamma, beta, dy = arrays((shape, 1), dtype)
        expected = run(x, residual, gamma, beta, dy, 1)
        place, given_to, out = VIEWS[view], {"x": x, "residual": residual, "dy": dy}, {}
        for key in {"x and residual": ["x", "residual"], "all but dy": ["x", "residual", "out"]}.get(which, [which]):
            if key in given_to:
                given_to[key] = place(given_to[key])
                assert np.array_equal(given_to[key], {"x": x, "residual": residual, "dy": dy}[key])
            elif view == "misaligned":
                pytest.skip("the misaligned view is over read-only bytes, and an output must be writable")
            else:
                out["y" if key == "out" else "dx"] = place(np.zeros(shape, dtype))
        x, residual, dy = given_to.values()
        found = check(x, residual, gamma, beta, dy, 1, **out)
        if which in ("residual", "out", "dx") and view not in ("transposed", "every third of a run", "channels last"):
            assert bits(found[0]) == bits(expected[0])


@pytest.mark.parametrize("memory", ["channels last", "channels first"])
@pytest.mark.parametrize("other", ["channels last", "channels first"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_images_channels_last(memory, other, dtype):
    """4-D views of (N, H, W, C) memory, and dy in the other order."""
    for shape in ((2, 25, 5, 7), (9, 3, 7, 7), (4, 1, 9, 9), (3, 32, 20, 20)):
        x, residual, gamma, beta, dy = arrays((shape, 1), dtype)
        last = np.ascontiguousarray
        if memory == "channels last":
            x, residual = (last(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, residual))
        if other == "channels last":
            dy = last(dy.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
        y, dx, *_ = check(x, residual, gamma, beta, dy, 1)
        if shape[1] > 1:
            assert y.strides == dx.strides == x.strides


@pytest.mark.parametrize("case", [((9, 5, 49), 1), ((3, 5, 49), 1), ((2, 3, 300), 1), ((40, 19), 1)], ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_gradient_of_zero_strides(case, dtype):
    """As the gradient of a mean or a sum comes; read-only, too."""
    (shape, axis), one = case, np.asarray(0.5, dtype)
    x, residual, gamma, beta, _ = arrays(case, dtype)
    column = np.random.default_rng(3).normal(size=(1, *shape[1:])).astype(dtype)
    for repeated in (one, column, column[..., :1], column[:, :1]):
        dy = np.broadcast_to(repeated, shape)
        assert not dy.flags.writeable
        found = run(x, residual, gamma, beta, dy, axis)
        expected = run(x, residual, gamma, beta, dy.copy(), axis)
        assert bits(found[4]) == bits(expected[4])
        check(x, residual, gamma, beta, dy, axis)
    for repeated in (x[:1], residual[:1]):
        again = np.broadcast_to(repeated, shape)
        check(again, residual, gamma, beta, x, axis)
        check(x, again, gamma, beta, x, axis)


@pytest.mark.parametrize("case", [((9, 5, 49), 1), ((3, 5, 49), 1), ((2, 3, 300), 1), ((40, 19), 1)], ids=name)
def test_arrays_that_are_one_array(case):
    """x as its own residual, dx over dy, y over x or over the residual, nothing read-only written."""
    x, residual, gamma, beta, dy = arrays(case, FLOAT32)
    axis = case[1]
    expected = run(x, residual, gamma, beta, dy, axis)
    for a in (x, residual):
        a.flags.writeable = False
    over = dy.copy()
    found = run(x, residual, gamma, beta, over, axis, dx=over)
    assert found[1] is over
    assert [bits(a) for a in found] == [bits(a) for a in expected]
    own = run(x, x, gamma, beta, dy, axis)
    assert [bits(a) for a in own] == [bits(a) for a in run(x, x.copy(), gamma, beta, dy, axis)]
    over = x.copy()
    y, saved = batch_norm_train(over, gamma, beta, axis=axis, activation="relu", residual=residual, out=over)
    assert y is over
    assert bits(y) == bits(expected[0])
    with pytest.raises(ValueError, match="overwrote"):
        batch_norm_backward(dy, saved)


# ---- zeros, NaN, infinity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES[::2], ids=name)
def test_zero_passes_nothing_and_the_smallest_positive_number_everything(case, dtype):
    """γ = 0 leaves y = residual: 0, -0, the numbers next to 0, NaN and infinities."""
    (shape, axis), tiny = case, {FLOAT32: 2.0**-149, FLOAT64: 5e-324, FLOAT16: 2.0**-24, BFLOAT16: 2.0**-133}[dtype]
    c = shape[axis]
    values = np.array([0.0, -0.0, tiny, -tiny, 1, -1, np.inf, -np.inf, np.nan, 2]).astype(dtype)
    residual = values[np.random.default_rng(5).integers(len(values), size=shape)]
    x, _, _, _, dy = arrays(case, dtype)
    y, _, _, _, dresidual = run(x, residual, np.zeros(c), np.zeros(c), dy, axis)
    passes = ~(residual.astype(np.float64) <= 0)  # where comparing NaN never warns
    expected = np.where(passes, residual.astype(np.float64), 0)
    assert np.array_equal(y.astype(np.float64), expected, equal_nan=True)
    assert bits(dresidual) == bits(np.where(passes, dy, np.zeros((), dtype)))


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=name)
@pytest.mark.parametrize("case", CASES[::4], ids=name)
def test_no_gradient_passes_where_a_half_type_rounds_y_to_0(case, dtype):
    shape, axis = case
    x, _, _, _, dy = arrays(case, dtype)
    gamma = np.full(shape[axis], 1e-10 if dtype == FLOAT16 else 1e-42)
    y, *_, dresidual = run(x, np.zeros(shape, dtype), gamma, None, dy, axis)
    assert not y.any()
    assert not dresidual.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", [case for case in CASES if case[0][case[1]] > 1][::2], ids=name)
def test_nan_and_infinity_stay_in_their_channel_or_element(case, bad, dtype):
    (shape, axis), rng = case, np.random.default_rng(6)
    x, residual, gamma, beta, dy = arrays(case, dtype)
    clean = run(x, residual, gamma, beta, dy, axis)
    channel = int(rng.integers(shape[axis]))
    at = list(rng.integers(shape))
    at[axis] = channel
    spoilt = x.copy()
    spoilt[tuple(at)] = bad
    y, dx, dgamma, dbeta, dresidual = run(spoilt, residual, gamma, beta, dy, axis)
    for ours, theirs in zip((y, dx, dgamma, dbeta, dresidual), clean, strict=True):
        own = axis if ours.ndim > 1 else 0
        assert bits(np.delete(ours, channel, own)) == bits(np.delete(theirs, channel, own))
    spoilt_channel = [np.take(a, channel, axis) for a in (y, dx, dresidual, dy)]
    assert np.isnan(spoilt_channel[0].astype(np.float64)).all()
    assert np.isnan(spoilt_channel[1].astype(np.float64)).all()
    assert bits(spoilt_channel[2]) == bits(spoilt_channel[3])  # NaN is not below 0

    spoilt = residual.copy()
    spoilt[tuple(at)] = bad
    y, _, _, _, dresidual = run(x, spoilt, gamma, beta, dy, axis)
    expected = 0 if bad == -np.inf else bad
    assert np.array_equal(np.float64(y[tuple(at)]), expected, equal_nan=True)
    assert dresidual[tuple(at)] == (0 if expected == 0 else dy[tuple(at)])
    for ours, theirs in ((y, clean[0]), (dresidual, clean[4])):
        ours[tuple(at)] = theirs[tuple(at)]
        assert bits(ours) == bits(theirs)


def test_a_gradient_that_is_nan_where_nothing_passes_does_not_count():
    """0 is what ReLU passes there, not 0·NaN."""
    for case in (((3, 5, 49), 1), ((9, 5, 49), 1), ((2, 3, 300), 1), ((40, 19), 1)):
        x, residual, gamma, beta, dy = arrays(case, FLOAT32)
        expected = run(x, residual, gamma, beta, dy, 1)
        spoilt = np.where(expected[0] > 0, dy, np.nan).astype(np.float32)
        assert [bits(a) for a in run(x, residual, gamma, beta, spoilt, 1)] == [bits(a) for a in expected]


# ---- what is kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_bit_per_element_is_kept(case, dtype):
    """And less than two bytes more for each row, or each run that a thread may own."""
    x, residual, gamma, beta, _ = arrays(case, dtype)
    _, saved = batch_norm_train(x, gamma, beta, axis=case[1], activation="relu", residual=residual)
    (shape, axis), size = case, x.size / 8
    long_runs = math.prod(shape[axis:][1:]) > SHORT_RUN
    rows = math.prod(shape[:axis]) * (shape[axis] if long_runs else 1)
    assert saved.bits.memory.dtype == np.uint8
    assert size <= saved.bits.memory.nbytes <= size + 2 * rows
    assert batch_norm_train(x, gamma, beta, axis=case[1], activation="relu")[1].bits is None
    assert batch_norm_train(x, gamma, beta, axis=case[1], residual=residual)[1].bits is None


COPIES = {"deepcopy": copy.deepcopy} | {
    f"pickle {p}": lambda a, p=p: pickle.loads(pickle.dumps(a, p)) for p in (2, 4, pickle.HIGHEST_PROTOCOL)
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("copied", COPIES)
def test_what_is_saved_may_be_copied_between_forward_and_backward(copied, view):
    for shape in ((3, 5, 49), (9, 5, 49), (2, 3, 300), (40, 19, 1)):
        x, residual, gamma, beta, dy = arrays((shape, 1), FLOAT32)
        x, residual = VIEWS[view](x), VIEWS[view](residual)
        y, saved = batch_norm_train(x, gamma, beta, activation="relu", residual=residual)
        again = COPIES[copied](saved)
        assert not np.shares_memory(again.bits.memory, saved.bits.memory)
        expected, found = batch_norm_backward(dy, saved), batch_norm_backward(dy, again)
        assert bits(found.dresidual) == bits(expected.dresidual) == bits(np.where(y > 0, dy, np.float32(0)))
        theirs = reference.backward(dy, x, gamma, passes=y > 0)
        bound = reference.backward_bound(theirs, reference.train(x, gamma, beta), gamma, x.dtype, 1, gamma.dtype)
        for key in ("dx", "dgamma", "dbeta"):
            assert_within(getattr(found, key), getattr(theirs, key), getattr(bound, key), key)


@pytest.mark.parametrize("case", CASES[::3], ids=name)
def test_saved_serves_again_and_calls_do_not_share_bits(case):
    x, residual, gamma, beta, dy = arrays(case, FLOAT32)
    options = {"axis": case[1], "activation": "relu"}
    _, saved = batch_norm_train(x, gamma, beta, **options, residual=residual)
    first = [bits(a) for a in batch_norm_backward(dy, saved)]
    batch_norm_train(x, gamma, beta, **options, residual=-residual)
    batch_norm_backward(-dy, saved)
    assert [bits(a) for a in batch_norm_backward(dy, saved)] == first


# ---- the layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_a_layer_in_inference_mode(case, dtype):
    """dx = γ·dz/√(running_var + ε), where dz is dy where y > 0; dγ = Σ dz·x̂ and dβ = Σ dz."""
    (shape, axis), rng = case, np.random.default_rng(7)
    x, residual, gamma, beta, dy = arrays(case, dtype)
    bn = fastbn.BatchNorm(shape[axis], axis=axis, activation="relu").eval()
    bn.gamma[:], bn.beta[:] = gamma, beta
    bn.running_mean[:], bn.running_var[:] = rng.normal(size=shape[axis]), rng.uniform(0.1, 2, shape[axis])
    found = []
    for isa, threads in itertools.product(dispatch.available(), (1, 3)):
        with running(isa):
            y = bn(x, residual=residual, num_threads=threads)
            layer = pickle.loads(pickle.dumps(bn)) if threads == 3 else copy.deepcopy(bn)
            dx = layer.backward(dy, num_threads=threads)
        found.append([bits(a) for a in (y, dx, layer.grad_gamma, layer.grad_beta, layer.grad_residual)])
    assert all(one == found[0] for one in found)
    plain = batch_norm_infer(
        x, bn.running_mean, bn.running_var, bn.gamma, bn.beta, axis=axis, eps=bn.eps, activation="relu",
        residual=residual,
    )  # fmt: skip
    assert bits(y) == bits(plain)
    dz = np.where(y > 0, dy, np.zeros((), dtype))
    assert bits(layer.grad_residual) == bits(dz)
    scale = bn.gamma / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    expected = reference.expand(scale, x.ndim, axis) * dz.astype(np.float64)
    bound = 4 * reference.unit(dtype) * np.abs(expected)
    assert_within(dx, expected, bound + reference.half_unit(np.abs(expected) + bound, dtype), "dx")
    forward = reference.infer(x, bn.running_mean, bn.running_var, axis=axis, eps=bn.eps)
    total = reference.over_channels(np.sum, np.abs(reference.wide(dz)), axis)
    t = 1 + reference.over_channels(np.max, np.abs(forward.xhat), axis)
    for key, products, size in (("gamma", forward.xhat, t), ("beta", 1, 1)):
        sums = reference.over_channels(np.sum, reference.wide(dz) * products, axis)
        assert_within(getattr(layer, f"grad_{key}"), sums, 9 * reference.U32 * size * total, key)
