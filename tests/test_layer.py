"""The BatchNorm layer: what it keeps between calls, and that it is PyTorch's layer on NumPy arrays."""

import copy
import itertools
import pickle
from fractions import Fraction

import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from reference import U32, U64, assert_within, over_channels
from strategies import BFLOAT16, FLOAT16

import fastbn
from fastbn import BatchNorm

# ---- data and layers ---------------------------------------------------------------------------------------


def moments(x, axis=1):
    """Values per channel, μ and the biased variance, in float64."""
    mean, var, _ = reference.moments(x, axis)
    return np.size(x) // len(mean), mean.astype(np.float64), var.astype(np.float64)


def assert_inference(y, x, bn):
    """Hold y = bn(x) in inference mode to the contract's bound."""
    expected = reference.infer(
        x, bn.running_mean, bn.running_var, bn.gamma, bn.beta, axis=bn.axis, eps=bn.eps
    )
    assert_within(y, expected.y, reference.y_bound(expected, bn.gamma, bn.beta, x.dtype, bn.axis))


def random(*shape, seed=0, dtype=np.float64, offset=0.5):
    return np.random.default_rng([seed, *shape]).normal(offset, 2, shape).astype(dtype)


def some_layer(c=3, seed=1, **options):
    """A layer whose parameters and running statistics are nothing special."""
    bn = BatchNorm(c, **options)
    rng = np.random.default_rng(seed)
    if bn.affine:
        bn.gamma[...], bn.beta[...] = rng.normal(size=(2, c))
    if bn.track_running_stats:
        bn.running_mean[...], bn.running_var[...] = rng.normal(size=c), rng.uniform(0.5, 2, c)
    return bn


STATE = ("gamma", "beta", "running_mean", "running_var", "grad_gamma", "grad_beta", "grad_residual")


def snapshot(bn):
    """Everything that a failed call may not change."""
    values = {name: getattr(bn, name) for name in STATE}
    kept = {name: None if value is None else value.tobytes() for name, value in values.items()}
    return kept | {"num_batches_tracked": bn.num_batches_tracked, "training": bn.training, "saved": bn._saved}


# ---- construction ------------------------------------------------------------------------------------------


def test_a_new_layer():
    bn = BatchNorm(3)
    assert (bn.num_features, bn.axis, bn.eps, bn.momentum, bn.activation) == (3, 1, 1e-5, 0.1, None)
    assert (bn.affine, bn.track_running_stats, bn.unbiased, bn.training) == (True, True, True, True)
    assert bn.num_batches_tracked == 0
    assert bn.grad_gamma is bn.grad_beta is bn.grad_residual is None
    for array, value in ((bn.gamma, 1), (bn.beta, 0), (bn.running_mean, 0), (bn.running_var, 1)):
        assert array.dtype == np.float32
        assert array.tolist() == [value] * 3


def test_a_layer_without_parameters_or_statistics():
    bn = BatchNorm(3, affine=False, track_running_stats=False)
    assert (bn.affine, bn.track_running_stats) == (False, False)
    assert bn.gamma is bn.beta is bn.running_mean is bn.running_var is None
    assert BatchNorm(3, affine=False).running_mean is not None
    assert BatchNorm(3, track_running_stats=False).gamma is not None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *((given, np.float64) for given in (np.float64, "f8", ">f8", float)),
        *((given, np.float32) for given in ("float32", ">f4", np.dtype(np.float16), "<f2", ">f2")),
    ],
)
def test_dtype_is_that_of_parameters_and_statistics(given, expected):
    bn = BatchNorm(2, dtype=given)
    arrays = bn.gamma, bn.beta, bn.running_mean, bn.running_var
    assert [a.dtype for a in arrays] == [np.dtype(expected)] * 4
    assert all(a.dtype.isnative for a in arrays)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_half_types_keep_float32_parameters_and_take_half_data(dtype):
    bn = BatchNorm(2, dtype=dtype)
    assert {a.dtype.name for a in (bn.gamma, bn.beta, bn.running_mean, bn.running_var)} == {"float32"}
    x = random(6, 2, dtype=dtype)
    y = bn(x)
    dx = bn.backward(y)
    assert (y.dtype, dx.dtype) == (dtype, dtype)
    assert bn.grad_gamma.dtype == bn.running_mean.dtype == np.float32
    m, mean, var = moments(x)
    assert_within(bn.running_mean, 0.1 * mean, 4 * U32 * np.abs(mean))
    assert_within(bn.running_var, 0.9 + 0.1 * var * m / (m - 1), 4 * U32 * (1 + var))


NAN, INF = float("nan"), float("inf")
REFUSED = [
    *(("num_features", value, ValueError) for value in (0, -1, np.int64(0))),
    *(("num_features", value, TypeError) for value in (2.0, "3", None, True, [3], np.array([3, 4]))),
    *(("axis", value, TypeError) for value in (1.0, "1", None, True, (1,))),
    *(("eps", value, ValueError) for value in (0, -1e-5, 0.0, NAN, INF, -INF, 10**400)),
    *(("eps", value, TypeError) for value in ("1e-5", None, True, 1j, [1e-5, 1e-5])),
    *(("momentum", value, ValueError) for value in (-0.1, 1.1, NAN, INF, -INF, 2, 10**400)),
    *(("momentum", value, TypeError) for value in ("0.1", True, 0.1j, [])),
    *(
        ("activation", value, ValueError)
        for value in ("gelu", "RELU", "", 1, True, ("relu",), ["relu"], b"relu")
    ),
    *(("dtype", value, TypeError) for value in (int, complex, object, "no such", np.int8, "U4", np.uint16)),
]


@pytest.mark.parametrize(("name", "value", "error"), REFUSED, ids=[f"{n}={v!s:.20}" for n, v, _ in REFUSED])
def test_the_constructor_refuses(name, value, error):
    with pytest.raises(error, match=rf"^{name}: expected .*, got "):
        BatchNorm(**({"num_features": 3} | {name: value}))


def test_the_constructor_lists_the_activations():
    with pytest.raises(ValueError, match="None, 'relu', got 'gelu'$"):
        BatchNorm(3, activation="gelu")


def test_options_are_named():
    with pytest.raises(TypeError):
        BatchNorm(3, 1)
    with pytest.raises(TypeError, match="moment"):
        BatchNorm(3, moment=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_features", np.int64(3)),
        ("axis", -1),
        ("axis", np.int8(2)),
        ("eps", np.float32(0.5)),
        ("eps", 1),
        ("momentum", 0),
        ("momentum", 1),
        ("momentum", None),
        ("momentum", np.float64(0.5)),
    ],
)
def test_the_constructor_accepts(name, value):
    assert getattr(BatchNorm(**({"num_features": 3} | {name: value})), name) == value


def test_train_and_eval_return_the_layer():
    bn = BatchNorm(3)
    assert bn.eval() is bn
    assert bn.training is False
    assert bn.train() is bn
    assert bn.training is True
    assert bn.train(False).training is False
    assert bn.train(1).training is True


LAYERS = [
    {}, {"axis": -1}, {"eps": 0.25, "momentum": None}, {"affine": False}, {"track_running_stats": False},
    {"unbiased": False, "activation": "relu", "momentum": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_repr_is_the_call_that_makes_the_layer(options):
    text = repr(BatchNorm(3, **options))
    again = eval(text, {"BatchNorm": BatchNorm})
    defaults = {"axis": 1, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True,
                "unbiased": True, "activation": None}  # fmt: skip
    assert {name: getattr(again, name) for name in defaults} == defaults | options
    assert again.num_features == 3
    assert ("affine" in text, "activation" in text) == ("affine" in options, "activation" in options)


# ---- training ----------------------------------------------------------------------------------------------

SHAPES = [
    ((16, 3), 1),
    ((4, 3, 9), 1),
    ((2, 3, 4, 5), 1),
    ((2, 4, 5, 3), -1),
    ((3, 8), 0),
    ((2, 2, 3, 2, 4), 2),
    ((5, 3, 4), -2),
]


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_training_normalises_by_the_batch(shape, axis):
    bn = some_layer(axis=axis, dtype=np.float64)
    x = random(*shape)
    expected = reference.train(x, bn.gamma, bn.beta, axis=axis)
    assert_within(bn(x), expected.y, reference.y_bound(expected, bn.gamma, bn.beta, x.dtype, axis))


def test_the_batch_and_nothing_else_decides_in_training():
    x = random(16, 3, dtype=np.float32)
    one, other = some_layer(), some_layer()
    other.running_mean[...], other.running_var[...] = 100, 50
    assert one(x).tobytes() == other(x).tobytes()


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 0.0, 1.0, None])
def test_running_statistics_move(shape, axis, dtype, unbiased, momentum):
    bn = some_layer(axis=axis, dtype=dtype, unbiased=unbiased, momentum=momentum)
    mean, var = bn.running_mean.astype(np.float64), bn.running_var.astype(np.float64)
    arrays = bn.running_mean, bn.running_var
    u = U32 if dtype == np.float32 else U64
    largest = 0.0
    for k in range(4):
        x = random(*shape, seed=k, offset=k)
        m, batch_mean, batch_var = moments(x, axis)
        weight = 1 / (k + 1) if momentum is None else momentum
        mean = (1 - weight) * mean + weight * batch_mean
        var = (1 - weight) * var + weight * batch_var * (m / (m - 1) if unbiased else 1)
        largest = max(largest, np.abs(x).max())
        bn(x)
        assert bn.num_batches_tracked == k + 1
        # each step rounds once to the dtype, and the oracle's sums have m terms
        bound = (k + 1) * (2 * u + (m + 8) * U64)
        assert_within(bn.running_mean, mean, bound * (1 + largest))
        assert_within(bn.running_var, var, bound * (1 + largest**2) * 2)
    assert arrays[0] is bn.running_mean
    assert arrays[1] is bn.running_var


def test_momentum_0_leaves_the_running_statistics_and_counts():
    bn = some_layer(momentum=0)
    before = snapshot(bn)
    bn(random(8, 3, dtype=np.float32))
    after = snapshot(bn)
    assert (after["running_mean"], after["running_var"]) == (before["running_mean"], before["running_var"])
    assert bn.num_batches_tracked == 1


def test_the_running_variance_has_bessels_correction_only_if_unbiased():
    x = np.array([[-1.0], [1.0], [3.0], [5.0]])  # mean 2, σ² 5, 20/3 unbiased
    for unbiased, expected in ((True, 20 / 3), (False, 5.0)):
        bn = BatchNorm(1, momentum=1.0, unbiased=unbiased, dtype=np.float64)
        bn(x)
        assert bn.running_mean.tolist() == [2]
        assert_within(bn.running_var, [expected], 4 * U64 * expected)


batches_of_integers = st.integers(1, 3).flatmap(
    lambda c: st.lists(
        hnp.arrays(np.int64, st.tuples(st.integers(2, 6), st.just(c)), elements=st.integers(-50, 50)),
        min_size=1, max_size=6,
    )
)  # fmt: skip


@given(batches_of_integers, st.sampled_from([0.5, 0.25, 0.1, 1.0, 0.0, None]), st.booleans())
def test_running_statistics_are_the_weighted_average_in_closed_form(batches, momentum, unbiased):
    """r_k = (1-a)^k r_0 + Σ a (1-a)^(k-1-i) b_i, or the plain mean of the b_i."""
    c, k = batches[0].shape[1], len(batches)
    bn = BatchNorm(c, momentum=momentum, unbiased=unbiased, dtype=np.float64)
    for batch in batches:
        bn(batch)
    if momentum is None:
        weights = [Fraction(0)] + [Fraction(1, k)] * k
    else:
        a = Fraction(momentum)
        weights = [(1 - a) ** k] + [a * (1 - a) ** (k - 1 - i) for i in range(k)]
    assert sum(weights) == 1
    for channel in range(c):
        means, variances = [Fraction(0)], [Fraction(1)]
        for batch in batches:
            values = [Fraction(int(value)) for value in batch[:, channel]]
            mean = sum(values) / len(values)
            squares = sum((value - mean) ** 2 for value in values)
            means.append(mean)
            variances.append(squares / (len(values) - int(unbiased)))
        for actual, values in ((bn.running_mean[channel], means), (bn.running_var[channel], variances)):
            expected = sum(weight * value for weight, value in zip(weights, values, strict=True))
            largest = max(1, *(abs(value) for value in values))
            assert abs(Fraction(float(actual)) - expected) <= Fraction(16 * (k + 1) * U64) * largest
    assert bn.num_batches_tracked == k


def test_a_channel_of_nan_stays_alone():
    x = random(8, 3, dtype=np.float32)
    clean, dirty = some_layer(), some_layer()
    clean(x)
    x[2, 1] = np.nan
    dirty(x)
    assert np.isnan([dirty.running_mean[1], dirty.running_var[1]]).all()
    for channel in (0, 2):
        assert dirty.running_mean[channel] == clean.running_mean[channel]
        assert dirty.running_var[channel] == clean.running_var[channel]


def test_a_variance_beyond_float32_becomes_inf_without_a_warning():
    bn = BatchNorm(2)
    y = bn(np.array([[1e30, 1], [-1e30, 2]], np.float32))  # σ² = 1e60
    assert bn.running_var.tolist() == [np.inf, np.float32(0.9 + 0.1 * 0.5)]
    assert y[:, 0].tolist() == [1, -1]


def test_an_error_state_that_raises_breaks_off_no_call():
    x = np.array([[1e-300, 1], [3e-300, 2]])
    bn = BatchNorm(2)
    with np.errstate(all="raise"):  # 1e-300 is 0 in float32
        bn(x)
        bn.recalibrate([x])
        bn.load_state_dict(bn.state_dict() | {"bias": [1e-300, 0], "weight": [1e300, 1]})
    assert (bn.num_batches_tracked, bn.running_mean.tolist()) == (1, [0, 1.5])
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([np.inf, 1], [0, 0])


def test_every_kind_of_array_is_taken():
    x = np.array([[1, 10], [3, 30], [8, 35]])
    expected = BatchNorm(2)(x.astype(np.float64))
    for given_x in (
        x,
        x.tolist(),
        x.astype(">f8"),
        x.astype(np.int16),
        x[::-1].copy()[::-1],
        np.asfortranarray(x),
    ):
        bn = BatchNorm(2)
        y = bn(given_x)
        assert y.dtype == np.float64
        assert np.array_equal(y, expected)
        assert bn.num_batches_tracked == 1


def test_the_input_is_not_modified():
    x = random(2, 3, 4)
    x.flags.writeable = False
    before = x.tobytes()
    bn = BatchNorm(3)
    bn.backward(bn(x))
    bn.eval()
    bn.backward(bn(x))
    assert x.tobytes() == before


# ---- inference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_inference_normalises_by_the_running_statistics_and_moves_nothing(shape, axis):
    bn = some_layer(axis=axis, dtype=np.float64).eval()
    before = snapshot(bn)
    x = random(*shape)
    assert_inference(bn(x), x, bn)
    assert snapshot(bn) | {"saved": None} == before


def test_inference_takes_one_value_per_channel():
    bn = some_layer(dtype=np.float64).eval()
    x = random(1, 3)
    assert_inference(bn(x), x, bn)


def test_inference_without_running_statistics_normalises_by_the_batch():
    x = random(8, 3, dtype=np.float32)
    training, inference = some_layer(track_running_stats=False), some_layer(track_running_stats=False).eval()
    assert training(x).tobytes() == inference(x).tobytes()
    assert training.backward(x).tobytes() == inference.backward(x).tobytes()
    assert training.num_batches_tracked == inference.num_batches_tracked == 0
    with pytest.raises(ValueError, match=r"^x: expected 2 or more values per channel"):
        inference(x[:1])


def test_inference_uses_the_statistics_and_parameters_of_the_moment():
    bn = some_layer(dtype=np.float64).eval()
    x = random(8, 3)
    for array in (bn.running_mean, bn.running_var, bn.gamma, bn.beta):
        assert_inference(bn(x), x, bn)
        array += 1
    assert_inference(bn(x), x, bn)


@pytest.mark.parametrize("bad", [-1.0, -1e-5])
def test_inference_refuses_a_variance_without_a_root(bad):
    bn = some_layer(dtype=np.float64).eval()
    bn.running_var[1] = bad
    bn.eps = 1e-5
    out = np.full((4, 3), 7.0)
    with pytest.raises(ValueError, match=r"^var: expected var \+ eps > 0, got .* in channel 1"):
        bn(random(4, 3), out=out)
    assert (out == 7).all()


def test_a_call_in_inference_after_training_and_back():
    x = random(8, 3, dtype=np.float32)
    bn = some_layer()
    trained = bn(x)
    assert bn.eval()(x).tobytes() != trained.tobytes()
    assert bn.train()(x).tobytes() == trained.tobytes()
    assert bn.num_batches_tracked == 2


# ---- backward ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": False}], ids=str)
def test_gradients_in_training_are_the_functions(options):
    bn, x, dy = (
        some_layer(**options),
        random(2, 3, 4, dtype=np.float32),
        random(2, 3, 4, seed=1, dtype=np.float32),
    )
    y = bn(x)
    expected_y, saved = fastbn.batch_norm_train(x, bn.gamma, bn.beta, activation=bn.activation)
    expected = fastbn.batch_norm_backward(dy, saved)
    assert y.tobytes() == expected_y.tobytes()
    assert bn.backward(dy).tobytes() == expected.dx.tobytes()
    if bn.affine:
        assert bn.grad_gamma.tobytes() == expected.dgamma.tobytes()
        assert bn.grad_beta.tobytes() == expected.dbeta.tobytes()
    else:
        assert bn.grad_gamma is bn.grad_beta is None


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_gradients_in_inference_are_those_of_constants(shape, axis):
    bn = some_layer(axis=axis, dtype=np.float64).eval()
    x, dy = random(*shape), random(*shape, seed=1)
    bn(x)
    dx = bn.backward(dy)
    frozen = reference.infer(x, bn.running_mean, bn.running_var, axis=axis, eps=bn.eps)
    slope = reference.expand(bn.gamma * frozen.rstd, x.ndim, axis)
    assert_within(dx, slope * dy, 8 * U64 * np.abs(slope * dy))
    # sums of m products, each rounded, in any order; and x - mean is rounded at the size of both
    m, size = (
        x.size // 3,
        np.abs(frozen.xhat) + 4 * reference.expand((1 + np.abs(frozen.mean)) * frozen.rstd, x.ndim, axis),
    )
    sums = (over_channels(np.sum, v, axis) for v in (dy * frozen.xhat, np.abs(dy) * size, dy, np.abs(dy)))
    dgamma, dgamma_size, dbeta, dbeta_size = sums
    assert_within(bn.grad_gamma, dgamma, (m + 8) * U64 * dgamma_size)
    assert_within(bn.grad_beta, dbeta, m * U64 * dbeta_size)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_finite_differences(training, activation):
    """Σ w·y moves by h·gradient as x, gamma or beta moves by h; the quotient errs by O(h²) and rounding/h."""
    bn = some_layer(dtype=np.float64, activation=activation, momentum=0.0).train(training)
    x, w = random(6, 3), random(6, 3, seed=5)

    def loss():
        return float((w * bn(x)).sum())

    loss()
    dx = bn.backward(w)
    gradients = {"x": dx, "gamma": bn.grad_gamma, "beta": bn.grad_beta}
    h = 2.0**-16
    size = np.abs(w).sum() * 8
    bound = size * (64 * U64 / h + 8 * h**2) * 8
    for name, array in (("x", x), ("gamma", bn.gamma), ("beta", bn.beta)):
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + h
            above = loss()
            array[index] = value - h
            below = loss()
            array[index] = value
            assert abs((above - below) / (2 * h) - gradients[name][index]) <= bound, (name, index)


@pytest.mark.parametrize("training", [True, False])
def test_parameters_and_statistics_may_change_before_backward(training):
    x, dy = random(8, 3, dtype=np.float32), random(8, 3, seed=1, dtype=np.float32)
    for dtype in (np.float32, np.float64):
        bn, changed = (some_layer(dtype=dtype, activation="relu").train(training) for _ in range(2))
        bn(x)
        changed(x)
        for array in (changed.gamma, changed.beta, changed.running_mean, changed.running_var):
            array[...] = 17
        assert changed.backward(dy).tobytes() == bn.backward(dy).tobytes()
        assert changed.grad_gamma.tobytes() == bn.grad_gamma.tobytes()


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_overwritten_and_not_summed(training):
    bn = some_layer().train(training)
    x = random(8, 3, dtype=np.float32)
    dy = np.ones_like(x)
    bn(x)
    bn.backward(dy)
    once, first = bn.grad_beta.copy(), bn.grad_beta
    bn.backward(2 * dy)
    assert bn.grad_beta.tolist() == [16, 16, 16]
    assert first.tolist() == once.tolist() == [8, 8, 8]  # an optimizer may still hold the old ones


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("parameters", [np.float32, np.float64])
@pytest.mark.parametrize("data", [np.float16, np.float32, np.float64])
def test_gradients_have_the_dtype_of_what_they_belong_to(training, parameters, data):
    bn = some_layer(dtype=parameters).train(training)
    x = random(8, 3, dtype=data)
    bn(x)
    dx = bn.backward(x)
    assert dx.dtype == data
    assert bn.grad_gamma.dtype == bn.grad_beta.dtype == parameters
    assert bn.grad_gamma.shape == bn.grad_beta.shape == (3,)


@pytest.mark.parametrize("training", [True, False])
def test_backward_may_be_called_again_and_into_dy(training):
    bn = some_layer().train(training)
    x, dy = random(8, 3, dtype=np.float32), random(8, 3, seed=1, dtype=np.float32)
    bn(x)
    expected = bn.backward(dy)
    assert bn.backward(dy).tobytes() == expected.tobytes()
    out = np.empty_like(dy)
    assert bn.backward(dy, out=out) is out
    assert out.tobytes() == expected.tobytes()
    assert bn.backward(dy, out=dy) is dy
    assert dy.tobytes() == expected.tobytes()


def test_backward_before_a_call_is_refused():
    with pytest.raises(ValueError, match=r"^backward: expected a call of the layer"):
        BatchNorm(3).backward(np.ones((4, 3), np.float32))


@pytest.mark.parametrize("training", [True, False])
def test_backward_after_a_call_that_overwrote_x_is_refused(training):
    bn = some_layer().train(training)
    x = random(8, 3, dtype=np.float32)
    expected = some_layer().train(training)(x)
    assert bn(x, out=x) is x
    assert x.tobytes() == expected.tobytes()
    with pytest.raises(ValueError, match=r"^saved: expected the input"):
        bn.backward(np.ones_like(x))
    assert bn.grad_gamma is None


def test_gradients_in_training_are_orthogonal_to_shift_and_scale():
    bn = some_layer(dtype=np.float64)
    x, dy = random(16, 3), random(16, 3, seed=1)
    bn(x)
    dx = bn.backward(dy)
    m, mean, var = moments(x)
    x_hat = (x - mean) / np.sqrt(var)
    size = np.abs(bn.gamma) / np.sqrt(var) * np.abs(dy).sum() * (1 + np.abs(x_hat).max()) ** 2
    assert_within(dx.sum(axis=0), 0, 16 * m * U64 * size)
    # Σ dx·x̂ is (1 - σ²/(σ²+ε)) of what it would be without the projection
    assert_within((dx * x_hat).sum(axis=0), 0, (16 * m * U64 + bn.eps / var) * size)


# ---- ReLU and residual -------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_relu_and_residual_compose(training, activation, with_residual):
    plain = some_layer(dtype=np.float64).train(training)
    bn = some_layer(dtype=np.float64, activation=activation).train(training)
    x, dy, residual = (random(4, 3, 5, seed=seed) for seed in range(3))
    given_residual = residual if with_residual else None

    before_activation = plain(x) + (residual if with_residual else 0)
    expected = np.maximum(before_activation, 0) if activation else before_activation
    y = bn(x, residual=given_residual)
    # γ·x̂ + β and the residual are rounded together or apart
    assert_within(y, expected, 4 * U64 * (1 + np.abs(plain(x)).max() + np.abs(residual).max()))
    assert (y > 0).any()
    assert (before_activation < 0).any()

    through = dy * (y > 0) if activation else dy
    plain(x)
    expected_dx = plain.backward(through)
    dx = bn.backward(dy)
    n = 20
    assert_within(dx, expected_dx, 4 * n * U64 * (1 + np.abs(expected_dx).max()))
    assert_within(bn.grad_gamma, plain.grad_gamma, 8 * n * n * U64 * np.abs(dy).max())
    assert_within(bn.grad_beta, plain.grad_beta, n * n * U64 * np.abs(dy).max())
    if with_residual:
        assert np.array_equal(bn.grad_residual, through)
        assert not np.shares_memory(bn.grad_residual, dy)
    else:
        assert bn.grad_residual is None


@pytest.mark.parametrize("training", [True, False])
def test_the_residuals_gradient_goes_with_the_residual(training):
    bn = some_layer(activation="relu").train(training)
    x = random(8, 3, dtype=np.float32)
    bn(x, residual=x[::-1])
    bn.backward(x)
    assert bn.grad_residual.shape == x.shape
    bn(x)
    bn.backward(x)
    assert bn.grad_residual is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_relu_has_gradient_0_where_y_is_0_and_nan_passes(training, with_residual):
    bn = BatchNorm(2, activation="relu", dtype=np.float64).train(training)
    bn.gamma[...] = 0  # y = beta + residual, exactly
    x = random(3, 2)
    residual = np.array([[0.0, 1.0], [-1.0, np.nan], [2.0, -0.0]]) if with_residual else None
    if with_residual:
        y = bn(x, residual=residual)
        bn.backward(np.ones((3, 2)))
        assert np.array_equal(y, [[0, 1], [0, np.nan], [2, 0]], equal_nan=True)
        assert bn.grad_residual.tolist() == [[0, 1], [0, 1], [1, 0]]
        assert bn.grad_beta.tolist() == [1, 2]
    else:
        assert (bn(x) == 0).all()
        bn.backward(np.ones((3, 2)))
        assert bn.grad_beta.tolist() == [0, 0]
        bn.beta[...] = [1, -1]
        bn(x)
        bn.backward(np.ones((3, 2)))
        assert bn.grad_beta.tolist() == [3, 0]


# ---- calls that fail, and the empty batch ------------------------------------------------------------------

GOOD = random(4, 3, dtype=np.float32)
FAILING_CALLS = {
    "too few channels": (
        ValueError,
        r"^x: expected 3 channels on axis 1, got shape \(4, 2\)$",
        GOOD[:, :2],
        {},
    ),
    "too many channels": (ValueError, r"^x: expected 3 channels", random(4, 6), {}),
    "one dimension": (ValueError, r"^x: expected 2 or more dimensions", GOOD[0], {}),
    "complex": (TypeError, r"^x: expected an array of", GOOD.astype(complex), {}),
    "object": (TypeError, r"^x: expected an array of", GOOD.astype(object), {}),
    "out of another shape": (
        ValueError,
        r"^out: expected shape",
        GOOD,
        {"out": np.zeros((4, 4), np.float32)},
    ),
    "out of another dtype": (ValueError, r"^out: expected dtype", GOOD, {"out": np.zeros((4, 3))}),
    "out that is a list": (TypeError, r"^out: expected a NumPy array", GOOD, {"out": GOOD.tolist()}),
    "residual of another shape": (ValueError, r"^residual: expected shape", GOOD, {"residual": GOOD[:2]}),
    "residual of another dtype": (
        ValueError,
        r"^residual: expected dtype",
        GOOD,
        {"residual": GOOD.astype("f8")},
    ),
    "no threads": (ValueError, r"^num_threads: ", GOOD, {"num_threads": 0}),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAILING_CALLS)
def test_a_failed_call_changes_nothing(name, training):
    error, message, x, given_options = FAILING_CALLS[name]
    bn = some_layer().train(training)
    bn(random(6, 3, dtype=np.float32))
    dy = random(6, 3, seed=1, dtype=np.float32)
    expected = bn.backward(dy).tobytes()
    before = snapshot(bn)
    with pytest.raises(error, match=message):
        bn(x, **given_options)
    assert snapshot(bn) == before
    assert bn.backward(dy).tobytes() == expected


@pytest.mark.parametrize("training", [True, False])
def test_a_failed_call_writes_nothing_to_out(training):
    bn = some_layer().train(training)
    out = np.full((4, 3), 7, np.float32)
    memory = np.zeros((5, 3), np.float32)
    calls = [(GOOD, {"out": out, "residual": GOOD[:2]}), (GOOD, {"out": out, "num_threads": 0}),
             (GOOD[:, :2], {"out": out}), (memory[1:], {"out": memory[:4]})]  # fmt: skip
    for x, given_options in calls:
        with pytest.raises(ValueError, match=r"^(residual|num_threads|x|out): "):
            bn(x, **given_options)
    assert (out == 7).all()
    assert (memory == 0).all()
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dy", "error"), [(GOOD[:2], ValueError), (GOOD.astype("f8"), ValueError),
                                           (GOOD.astype(object), TypeError)])  # fmt: skip
def test_a_failed_backward_changes_nothing(training, dy, error):
    bn = some_layer().train(training)
    bn(GOOD)
    bn.backward(GOOD)
    before = snapshot(bn)
    with pytest.raises(error, match=r"^dy: expected"):
        bn.backward(dy)
    with pytest.raises(ValueError, match=r"^out: expected shape"):
        bn.backward(GOOD, out=np.empty((2, 3), np.float32))
    assert snapshot(bn) == before


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
def test_one_value_per_channel_is_refused_in_training(shape):
    bn = some_layer()
    bn(GOOD)
    before = snapshot(bn)
    out = np.full(shape, 7, np.float32)
    with pytest.raises(ValueError, match=r"^x: expected 2 or more values per channel in training, got 1"):
        bn(np.ones(shape, np.float32), out=out)
    assert snapshot(bn) == before
    assert (out == 7).all()


@pytest.mark.parametrize("axis", [-3, 2, 7])
def test_an_axis_that_the_input_lacks_is_refused(axis):
    bn = BatchNorm(3, axis=axis)
    with pytest.raises(
        ValueError, match=rf"^axis: expected -2 to 1 for an array of 2 dimensions, got {axis}$"
    ):
        bn(GOOD)
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
def test_an_empty_batch_is_empty_and_moves_nothing(training, shape):
    for momentum in (0.1, None):
        bn = some_layer(momentum=momentum, activation="relu").train(training)
        before = snapshot(bn)
        x = np.empty(shape, np.float32)
        y = bn(x, residual=x)
        assert (y.shape, y.dtype) == (shape, np.float32)
        assert snapshot(bn) | {"saved": None} == before
        dx = bn.backward(y)
        assert (dx.shape, dx.dtype) == (shape, np.float32)
        assert bn.grad_gamma.tolist() == bn.grad_beta.tolist() == [0, 0, 0]
        assert bn.grad_residual.shape == shape


def test_an_empty_batch_does_not_count_in_the_cumulative_average():
    bn = BatchNorm(1, momentum=None, dtype=np.float64)
    for batch in ([[1.0], [3.0]], np.empty((0, 1)), [[5.0], [7.0]]):
        bn(batch)
    assert bn.running_mean.tolist() == [4]
    assert bn.num_batches_tracked == 2


def test_out_of_a_call():
    for bn in (some_layer(), some_layer().eval()):
        expected = copy.deepcopy(bn)(GOOD)
        out = np.empty_like(GOOD)
        assert bn(GOOD, out=out) is out
        assert out.tobytes() == expected.tobytes()


# ---- PyTorch -----------------------------------------------------------------------------------------------

TORCH_SHAPES = [((16, 3), "1d"), ((4, 3, 9), "1d"), ((2, 3, 4, 5), "2d"), ((2, 3, 2, 3, 4), "3d")]


def torch_layer(torch, kind, bn):
    options = {"eps": bn.eps, "momentum": bn.momentum, "affine": bn.affine}
    module = getattr(torch.nn, f"BatchNorm{kind}")
    layer = module(
        bn.num_features, track_running_stats=bn.track_running_stats, dtype=torch.float64, **options
    )
    layer.load_state_dict({key: torch.from_numpy(value) for key, value in bn.state_dict().items()})
    return layer.train(bn.training)


def assert_as_torch(bn, theirs, torch, x, dy, residual=None):
    """One forward and backward pass of both; float64, so that only the order of the sums differs."""
    x_torch = torch.from_numpy(x).requires_grad_()
    r_torch = None if residual is None else torch.from_numpy(residual).requires_grad_()
    y_torch = theirs(x_torch) if residual is None else theirs(x_torch) + r_torch
    if bn.activation == "relu":
        y_torch = torch.relu(y_torch)
    theirs.zero_grad()
    y_torch.backward(torch.from_numpy(dy))

    y = bn(x, residual=residual)
    dx = bn.backward(dy)
    m = x.size // bn.num_features
    size = 1 + np.abs(x).max()
    u = 16 * m * U64  # of sums of m terms on both sides, and of the few operations around them
    scale = 10.0  # above |gamma|·rstd of the layers here, and |beta|
    assert_within(y, y_torch.detach().numpy(), u * scale * size)
    assert_within(dx, x_torch.grad.numpy(), u * scale * size**2 * np.abs(dy).max())
    if residual is not None:
        assert np.array_equal(bn.grad_residual, r_torch.grad.numpy())
    if bn.affine:
        total = np.abs(dy).sum()
        assert_within(bn.grad_gamma, theirs.weight.grad.numpy(), u * scale * size * total)
        assert_within(bn.grad_beta, theirs.bias.grad.numpy(), u * total)
    if bn.track_running_stats:
        assert_within(bn.running_mean, theirs.running_mean.numpy(), u * size)
        assert_within(bn.running_var, theirs.running_var.numpy(), u * size**2)
        assert bn.num_batches_tracked == int(theirs.num_batches_tracked)


@pytest.mark.parametrize(("shape", "kind"), TORCH_SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"eps": 0.5, "momentum": 0.75},
    ],
    ids=str,
)
def test_training_and_inference_are_pytorchs(shape, kind, options):
    torch = pytest.importorskip("torch")
    bn = some_layer(dtype=np.float64, **options)
    theirs = torch_layer(torch, kind, bn)
    for k in range(3):
        assert_as_torch(bn, theirs, torch, random(*shape, seed=k, offset=k), random(*shape, seed=10 + k))
    bn.eval()
    theirs.eval()
    for k in range(2):
        assert_as_torch(bn, theirs, torch, random(*shape, seed=20 + k), random(*shape, seed=30 + k))
    bn.train()
    theirs.train()
    assert_as_torch(bn, theirs, torch, random(*shape, seed=40), random(*shape, seed=41))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
def test_relu_and_residual_are_pytorchs(training, with_residual):
    torch = pytest.importorskip("torch")
    bn = some_layer(dtype=np.float64, activation="relu").train(training)
    theirs = torch_layer(torch, "2d", bn)
    x, dy, residual = (random(2, 3, 4, 5, seed=seed) for seed in range(3))
    assert_as_torch(bn, theirs, torch, x, dy, residual if with_residual else None)


def test_a_state_goes_to_pytorch_and_comes_back():
    torch = pytest.importorskip("torch")
    bn = some_layer()
    bn(GOOD)
    theirs = torch.nn.BatchNorm1d(3)
    theirs.load_state_dict(
        {key: torch.from_numpy(value) for key, value in bn.state_dict().items()}, strict=True
    )
    assert int(theirs.num_batches_tracked) == 1
    assert theirs.weight.detach().numpy().tobytes() == bn.gamma.tobytes()

    with torch.no_grad():
        theirs.bias += 1
        theirs(torch.from_numpy(GOOD))
    again = BatchNorm(3)
    again.load_state_dict(theirs.state_dict())
    assert again.num_batches_tracked == 2
    for array, tensor in (
        (again.gamma, theirs.weight),
        (again.beta, theirs.bias),
        (again.running_mean, theirs.running_mean),
        (again.running_var, theirs.running_var),
    ):
        assert array.tobytes() == tensor.detach().numpy().tobytes()


def test_a_tensor_may_be_the_input():
    torch = pytest.importorskip("torch")
    assert np.array_equal(BatchNorm(3)(torch.from_numpy(GOOD)), BatchNorm(3)(GOOD))


# ---- the state ---------------------------------------------------------------------------------------------

KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def test_state_has_pytorchs_keys_in_order():
    assert list(BatchNorm(3).state_dict()) == KEYS
    assert list(BatchNorm(3, affine=False).state_dict()) == KEYS[2:]
    assert list(BatchNorm(3, track_running_stats=False).state_dict()) == KEYS[:2]
    assert BatchNorm(3, affine=False, track_running_stats=False).state_dict() == {}


def test_state_is_what_the_layer_holds():
    bn = some_layer(dtype=np.float64)
    bn(GOOD)
    state = bn.state_dict()
    for key, array in zip(KEYS, (bn.gamma, bn.beta, bn.running_mean, bn.running_var), strict=False):
        assert state[key].tobytes() == array.tobytes()
        assert state[key].dtype == array.dtype
    assert state["num_batches_tracked"].dtype == np.int64
    assert state["num_batches_tracked"].shape == ()
    assert state["num_batches_tracked"] == 1


def test_state_is_a_copy():
    bn = some_layer()
    before = snapshot(bn)
    for value in bn.state_dict().values():
        value[...] = 9
    assert snapshot(bn) == before


@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"dtype": np.float64}], ids=str
)
def test_state_goes_round(options):
    bn, other = some_layer(seed=1, **options), some_layer(seed=2, **options)
    bn(GOOD)
    state = bn.state_dict()
    assert other.load_state_dict(state) is None
    assert {k: v.tobytes() for k, v in other.state_dict().items()} == {
        k: v.tobytes() for k, v in state.items()
    }
    assert other.num_batches_tracked == bn.num_batches_tracked
    assert type(other.num_batches_tracked) is int
    x = random(8, 3, seed=3, dtype=np.float32)
    assert other(x).tobytes() == bn(x).tobytes()
    assert other.eval()(x).tobytes() == bn.eval()(x).tobytes()


def test_loading_fills_the_same_arrays_and_keeps_none_of_the_given():
    bn = some_layer()
    arrays = bn.gamma, bn.beta, bn.running_mean, bn.running_var
    state = some_layer(seed=2).state_dict()
    bn.load_state_dict(state)
    assert all(
        a is b for a, b in zip(arrays, (bn.gamma, bn.beta, bn.running_mean, bn.running_var), strict=True)
    )
    before = snapshot(bn)
    for value in state.values():
        value[...] = 9
    assert snapshot(bn) == before


def test_loading_takes_lists_and_other_dtypes():
    bn = BatchNorm(2)
    bn.load_state_dict(
        {
            "weight": [1, 2],
            "bias": np.array([0.5, -0.5], np.float16),
            "running_mean": np.array([3, 4], np.int32),
            "running_var": np.array([1.5, 2.5], ">f8"),
            "num_batches_tracked": 7,
        }
    )
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([1, 2], [0.5, -0.5])
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([3, 4], [1.5, 2.5])
    assert bn.gamma.dtype == bn.running_var.dtype == np.float32
    assert bn.num_batches_tracked == 7
    bn.load_state_dict(bn.state_dict() | {"num_batches_tracked": np.array([3], np.uint8)})
    assert bn.num_batches_tracked == 3


def test_the_loaded_count_weighs_the_cumulative_average():
    bn = BatchNorm(1, momentum=None, dtype=np.float64)
    bn.load_state_dict(
        {"weight": [1], "bias": [0], "running_mean": [6.0], "running_var": [2.0], "num_batches_tracked": 3}
    )
    bn([[1.0], [3.0]])  # mean 2, variance 2
    assert bn.running_mean.tolist() == [5]
    assert bn.running_var.tolist() == [2]


def bad_states():
    """Every key missing, of a wrong shape, of no numbers; others' keys; a count that is none."""
    for key in KEYS:
        yield f"{key} missing", {key: ...}, ValueError, f"missing: {key};"
    for key in KEYS[:4]:
        yield f"{key} too long", {key: np.ones(4)}, ValueError, rf"^{key}: expected shape \(3,\), got \(4,\)"
        yield f"{key} a column", {key: np.ones((3, 1))}, ValueError, rf"^{key}: expected shape"
        yield f"{key} a number", {key: 1.0}, ValueError, rf"^{key}: expected shape"
        yield f"{key} complex", {key: np.ones(3, complex)}, TypeError, rf"^{key}: expected real numbers"
        yield f"{key} text", {key: ["a", "b", "c"]}, TypeError, rf"^{key}: expected real numbers"
        yield f"{key} None", {key: None}, TypeError, rf"^{key}: expected shape"
    for value in (-1, 1.5, [1, 2], [], "one", None, True):
        yield (
            f"num_batches_tracked {value}",
            {"num_batches_tracked": value},
            ValueError,
            "^num_batches_tracked: expected",
        )
    yield "unknown", {"num_batches": 3}, ValueError, "unknown: num_batches$"
    yield "gamma", {"gamma": np.ones(3)}, ValueError, "missing: none; unknown: gamma$"


@pytest.mark.parametrize(("change", "error", "message"), [case[1:] for case in bad_states()],
                         ids=[case[0] for case in bad_states()])  # fmt: skip
def test_loading_refuses_and_changes_nothing(change, error, message):
    bn = some_layer()
    bn(GOOD)
    before = snapshot(bn)
    state = {key: value + 1 for key, value in bn.state_dict().items()} | change
    with pytest.raises(error, match=message):
        bn.load_state_dict({key: value for key, value in state.items() if value is not ...})
    assert snapshot(bn) == before


def test_loading_refuses_the_state_of_another_kind_of_layer():
    full, bare, free = BatchNorm(3), BatchNorm(3, affine=False), BatchNorm(3, track_running_stats=False)
    for bn, other in itertools.permutations((full, bare, free), 2):
        before = snapshot(bn)
        with pytest.raises(ValueError, match="^state_dict: expected keys "):
            bn.load_state_dict(other.state_dict())
        assert snapshot(bn) == before


@pytest.mark.parametrize("key", KEYS[:4])
def test_loading_a_number_beyond_float32_is_inf_without_a_warning(key):
    bn = some_layer()
    state = {k: v + 1 for k, v in bn.state_dict().items()} | {key: np.array([1, 1e300, -1])}
    bn.load_state_dict(state)  # as PyTorch does; a warning made an error would leave half of the state loaded
    loaded = bn.state_dict()
    assert loaded[key].tolist() == [1, np.inf, -1]
    assert all(loaded[k].tobytes() == state[k].tobytes() for k in KEYS if k != key)


@pytest.mark.parametrize("state", [None, [], "weight", 3])
def test_loading_refuses_what_is_no_mapping(state):
    with pytest.raises(TypeError, match=r"^state_dict: expected "):
        BatchNorm(3).load_state_dict(state)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "copy_of",
    [copy.deepcopy, copy.copy, *(lambda bn, p=p: pickle.loads(pickle.dumps(bn, p)) for p in (2, 4, 5))],
    ids=["deepcopy", "copy", "pickle 2", "pickle 4", "pickle 5"],
)
def test_a_copy_goes_on_where_the_layer_stands(copy_of, training):
    bn = some_layer(activation="relu", momentum=None).train(training)
    residual = random(4, 3, seed=2, dtype=np.float32)
    bn(GOOD, residual=residual)
    again = copy_of(bn)
    assert repr(again) == repr(bn)
    dy = random(4, 3, seed=1, dtype=np.float32)
    assert again.backward(dy).tobytes() == bn.backward(dy).tobytes()
    assert again.grad_residual.tobytes() == bn.grad_residual.tobytes()
    if copy_of is not copy.copy:
        before = snapshot(bn)
        again.train()(GOOD)
        again.gamma[...] = 5
        assert snapshot(bn) == before


def test_what_is_saved_for_backward_can_be_copied():
    _, saved = fastbn.batch_norm_train(GOOD, [1, 2, 3], activation="relu", residual=GOOD)
    expected = fastbn.batch_norm_backward(GOOD, saved)
    for again in (copy.deepcopy(saved), pickle.loads(pickle.dumps(saved))):
        gradients = fastbn.batch_norm_backward(GOOD, again)
        assert [g.tobytes() for g in gradients] == [g.tobytes() for g in expected]
        assert not np.shares_memory(again.x, saved.x)


# ---- recalibration -----------------------------------------------------------------------------------------


def unchanged(bn, call, error, message):
    before = snapshot(bn)
    with pytest.raises(error, match=message):
        call()
    assert snapshot(bn) == before


BATCH_LISTS = {
    "equal": [(8, 3)] * 4,
    "ragged": [(8, 3), (5, 3), (2, 3), (31, 3)],
    "one": [(8, 3)],
    "planes": [(2, 3, 4, 5), (1, 3, 7, 7), (3, 3, 1, 2)],
    "with empty ones": [(0, 3), (8, 3), (0, 3), (4, 3)],
}


def some_batches(name):
    return [random(*shape, seed=k, offset=3 * k) for k, shape in enumerate(BATCH_LISTS[name])]


@pytest.mark.parametrize("name", BATCH_LISTS)
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("given_method", [{}, {"method": "pooled"}], ids=["default", "pooled"])
def test_pooled_statistics_are_those_of_all_values_together(name, unbiased, given_method):
    bn = some_layer(dtype=np.float64, unbiased=unbiased)
    batches = some_batches(name)
    values = np.concatenate([batch.swapaxes(0, 1).reshape(3, -1) for batch in batches], axis=1)
    n = values.shape[1]
    assert bn.recalibrate(batches, **given_method) is None
    size = np.abs(values).max()
    assert_within(bn.running_mean, values.mean(axis=1), 4 * n * U64 * size)
    assert_within(bn.running_var, values.var(axis=1, ddof=int(unbiased)), 16 * n * U64 * size**2)


@pytest.mark.parametrize("name", BATCH_LISTS)
@pytest.mark.parametrize("unbiased", [True, False])
def test_the_papers_statistics_are_means_over_batches(name, unbiased):
    """E[x] = mean of μ_B, Var[x] = mean of σ_B²·m_B/(m_B - 1), whatever `unbiased` says."""
    bn = some_layer(dtype=np.float64, unbiased=unbiased)
    batches = some_batches(name)
    parts = [moments(batch) for batch in batches if batch.size]
    mean = sum(mean for _, mean, _ in parts) / len(parts)
    var = sum(m / (m - 1) * var for m, _, var in parts) / len(parts)
    bn.recalibrate(batches, method="paper")
    n, size = sum(m for m, _, _ in parts), max(np.abs(batch).max() for batch in batches if batch.size)
    assert_within(bn.running_mean, mean, 4 * n * U64 * size)
    assert_within(bn.running_var, var, 16 * n * U64 * size**2)


def test_the_papers_statistics_of_equal_batches_are_algorithm_2():
    bn = BatchNorm(1, dtype=np.float64)
    bn.recalibrate([[[0.0], [2.0]], [[4.0], [8.0]]], method="paper")  # μ_B 1, 6; σ_B² 1, 4; m = 2
    assert bn.running_mean.tolist() == [3.5]
    assert bn.running_var.tolist() == [2 / (2 - 1) * (1 + 4) / 2]


def test_recalibration_moves_nothing_but_the_statistics_in_place():
    bn = some_layer()
    bn(GOOD)
    bn.backward(GOOD)
    arrays, before = (bn.running_mean, bn.running_var), snapshot(bn)
    bn.recalibrate(iter(some_batches("equal")))
    after = snapshot(bn)
    assert arrays[0] is bn.running_mean
    assert arrays[1] is bn.running_var
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"running_mean", "running_var"}


def test_recalibration_follows_the_axis_and_takes_every_array():
    bn, last = BatchNorm(2, dtype=np.float64), BatchNorm(2, axis=-1, dtype=np.float64)
    x = random(3, 2, 4)
    bn.recalibrate([x])
    last.recalibrate(batch.transpose(0, 2, 1) for batch in (x,))
    assert np.array_equal(bn.running_mean, last.running_mean)
    exact = BatchNorm(2, dtype=np.float64)
    exact.recalibrate([[[1, 10], [3, 30]], np.array([[5, 5], [7, 15]], np.float16)])
    assert exact.running_mean.tolist() == [4, 15]
    for method in "pooled", "paper":
        summed, computed = BatchNorm(2), BatchNorm(2)
        summed.recalibrate(map(fastbn.Moments.of, (x, x[:2] + 1)), method)
        computed.recalibrate((x, x[:2] + 1), method)
        assert np.array_equal(summed.running_var, computed.running_var)


@pytest.mark.parametrize("method", ["pooled", "paper"])
@pytest.mark.parametrize(
    "batches", [[], iter(()), [np.empty((0, 3))], [np.empty((0, 3, 2)), np.empty((2, 3, 0))]]
)
def test_recalibration_without_values_changes_nothing(method, batches):
    bn = some_layer()
    before = snapshot(bn)
    bn.recalibrate(batches, method=method)
    assert snapshot(bn) == before


@pytest.mark.parametrize("method", ["pooled", "paper"])
def test_recalibration_by_an_iterator_that_raises_changes_nothing(method):
    def batches():
        yield GOOD
        raise OSError("disk")

    bn = some_layer()
    unchanged(bn, lambda: bn.recalibrate(batches(), method=method), OSError, "disk")


BAD_BATCHES = {
    "fewer channels": (GOOD[:, :2], ValueError, r"^batches: expected 3 channels on axis 1, got 2"),
    "one dimension": (GOOD[0], ValueError, r"^x: expected 2 or more dimensions"),
    "complex": (GOOD.astype(complex), TypeError, r"^x: expected an array of"),
    "text": ("batch", TypeError, r"^x: expected an array of"),
    "None": (None, TypeError, r"^x: expected an array of"),
    "empty, fewer channels": (
        np.empty((0, 2)),
        ValueError,
        r"^batches: expected 3 channels on axis 1, got 2",
    ),
}


@pytest.mark.parametrize("method", ["pooled", "paper"])
@pytest.mark.parametrize("name", BAD_BATCHES)
def test_recalibration_by_a_bad_batch_in_the_middle_changes_nothing(method, name):
    batch, error, message = BAD_BATCHES[name]
    bn = some_layer()
    for batches in ([GOOD, batch, GOOD], [GOOD, batch], [batch, GOOD]):
        unchanged(bn, lambda batches=batches: bn.recalibrate(batches, method=method), error, message)


def test_recalibration_by_a_batch_that_is_not_in_a_list_says_so():
    bn = some_layer()
    unchanged(bn, lambda: bn.recalibrate(GOOD), TypeError, r"^batches: .* got one array of shape .*; write \[array\]$")


def test_recalibration_needs_two_values_where_it_divides_by_one_less():
    one, three = GOOD[:1], GOOD[:3]
    for unbiased in (True, False):
        bn = some_layer(unbiased=unbiased)
        unchanged(
            bn,
            lambda bn=bn: bn.recalibrate([three, one], method="paper"),
            ValueError,
            r"^batches: expected 2",
        )
    bn = some_layer()
    unchanged(bn, lambda: bn.recalibrate([one]), ValueError, r"^batches: expected 2 or more values .* got 1$")
    bn.recalibrate([one, three])  # four in all
    assert_within(bn.running_var, np.concatenate([one, three]).astype(np.float64).var(axis=0, ddof=1),
                 4 * U32 * np.abs(GOOD).max() ** 2)  # fmt: skip
    biased = some_layer(unbiased=False)
    biased.recalibrate([one])
    assert biased.running_mean.tolist() == one[0].tolist()
    assert biased.running_var.tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["mean", "Pooled", "", None, 1, ["paper"]])
def test_recalibration_lists_its_methods(method):
    bn, used = some_layer(), []

    def batches():
        used.append(1)
        yield GOOD

    unchanged(bn, lambda: bn.recalibrate(batches(), method=method), ValueError,
              r"^method: expected one of 'pooled', 'paper', got ")  # fmt: skip
    assert used == []


def test_recalibration_needs_running_statistics():
    bn = BatchNorm(3, track_running_stats=False)
    with pytest.raises(ValueError, match=r"^recalibrate: expected running statistics"):
        bn.recalibrate([GOOD])


@pytest.mark.parametrize("method", ["pooled", "paper"])
def test_recalibration_beyond_float32_is_inf_without_a_warning(method):
    bn = BatchNorm(2)
    bn.recalibrate([np.array([[1e30, 1], [-1e30, 3]], np.float32)], method=method)  # σ² = 1e60, as in a call
    assert bn.running_mean.tolist() == [0, 2]
    assert bn.running_var.tolist() == [np.inf, 2]


def test_recalibrated_inference_is_training_on_the_same_batch():
    bn = some_layer(dtype=np.float64, unbiased=False)
    x = random(16, 3)
    expected = bn(x)
    bn.recalibrate([x])
    # both within the contract's bound of the same truth, but for the roundings of the statistics kept
    truth = reference.train(x, bn.gamma, bn.beta)
    assert_within(bn.eval()(x), expected, 3 * reference.y_bound(truth, bn.gamma, bn.beta, x.dtype, 1))


# ---- scale and shift ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"dtype": np.float64}, {"eps": 0.5}], ids=str)
def test_to_affine_is_the_layer_in_inference(options):
    bn = some_layer(**options)
    scale, shift = bn.to_affine()
    assert scale.dtype == shift.dtype == np.float64
    assert scale.shape == shift.shape == (3,)
    x = random(16, 3, seed=4)
    y = bn.eval()(x)
    gamma, beta = (1, 0) if bn.gamma is None else (np.abs(bn.gamma), np.abs(bn.beta))
    mean, rstd = np.abs(bn.running_mean), 1 / np.sqrt(bn.running_var.astype(np.float64) + bn.eps)
    # float64's contract on one side, four roundings of |scale|·(|x| + |mean|) + |beta| on the other
    assert_within(scale * x + shift, y, 40 * U64 * (gamma * rstd * (np.abs(x) + mean) + gamma + beta))
    ours, theirs = (scale, shift), fastbn.to_affine(bn)
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_to_affine_is_new_every_time_and_changes_nothing():
    bn = some_layer(dtype=np.float64, affine=False)
    before = snapshot(bn)
    for array in bn.to_affine():
        array[...] = 9
    assert snapshot(bn) == before


def test_to_affine_refuses_what_inference_refuses():
    with pytest.raises(ValueError, match=r"^to_affine: expected running statistics"):
        BatchNorm(3, track_running_stats=False).to_affine()
    bn = some_layer()
    bn.running_var[2] = -1
    with pytest.raises(ValueError, match=r"^var: expected var \+ eps > 0, .* channel 2"):
        bn.to_affine()
