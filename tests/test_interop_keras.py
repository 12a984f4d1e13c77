"""fastbn.interop.keras: a folded model computes what the model computed, and what cannot be folded says why.

The bound is that of rounding: eps times the number of terms times what the model would give if nothing cancelled
(`magnitudes`). Keras multiplies matrices and normalises in float32 even where it is told float64.
"""

import importlib.util
import json
import os
import sys
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastbn

if "KERAS_BACKEND" not in os.environ:
    backends = [name for name in ("torch", "jax") if importlib.util.find_spec(name)]
    os.environ["KERAS_BACKEND"] = backends[0] if backends else "numpy"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what Keras imports warns of itself
    keras = pytest.importorskip("keras", exc_type=ImportError)

from keras import layers as kl

from fastbn.interop import keras as interop
from fastbn.interop.report import FOLDED, LEFT, MERGED, REWRITTEN

pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:keras"),
]
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-23}


@pytest.fixture(autouse=True)
def _policy():
    """Let no test change the dtype of the next."""
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


def randomize(model, seed=0, *, negative=True, centred=False):
    """Give a model weights of which none is special; no shift if `centred`."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.name == "moving_variance":
            variable.assign(rng.uniform(0.25, 2, variable.shape))
        elif variable.name == "gamma":
            gamma = rng.uniform(0.5, 1.5, variable.shape)
            gamma[::2] *= -1 if negative else 1
            variable.assign(gamma)
        elif variable.name in ("moving_mean", "beta") and centred:
            variable.assign(np.zeros(variable.shape))
        elif "float" in variable.dtype:
            variable.assign(rng.normal(size=variable.shape))
    return model


def numbers(variable):
    return np.array(keras.ops.convert_to_numpy(variable)).astype(np.float64)


def outputs(model, x):
    return [numbers(y) for y in keras.tree.flatten(model(x, training=False))]


def magnitudes(model, x):
    """Return the outputs with all weights and inputs positive, so that nothing cancels."""
    old = [numbers(v) for v in model.weights]
    for variable, value in zip(model.weights, old, strict=True):
        sign = -1 if variable.name == "moving_mean" else 1
        variable.assign(value if "float" not in variable.dtype else sign * np.abs(value))
    sizes = outputs(model, keras.tree.map_structure(np.abs, x))
    for variable, value in zip(model.weights, old, strict=True):
        variable.assign(value)
    return sizes


def data(model, seed=1, batch=2):
    rng = np.random.default_rng(seed)

    def draw(tensor):
        shape = [batch, *(5 if n is None else n for n in tensor.shape[1:])]
        return rng.normal(size=shape) if "float" in tensor.dtype else rng.integers(0, 4, shape)

    return keras.tree.map_structure(draw, getattr(model, "input", model.inputs[0]))


def check(model, *actions, x=None, slack=1):
    """Fold, see that it is the same function and a model apart, and what became of its BatchNorms.

    slack: for constants that are no weights, and still cancel in `magnitudes`.
    """
    x = data(model) if x is None else x
    before, expected = [numbers(v) for v in model.variables], outputs(model, x)
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    new, report = interop.fold(model)
    assert [d.action for d in report] == list(actions), str(report)
    terms = 8 * len(list(model._flatten_layers())) + sum(int(np.prod(v.shape[:-1])) for v in model.weights)
    terms *= slack
    for y, z, size, symbol in zip(outputs(new, x), expected, magnitudes(model, x), model.outputs, strict=True):
        np.testing.assert_array_less(np.abs(y - z), terms * EPS[symbol.dtype] * np.abs(size) + 1e-37)
        assert np.isfinite(y).all()
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, numbers(variable))
    assert nodes == [len(layer._inbound_nodes) for layer in model.layers]
    assert not {id(v) for v in model.variables} & {id(v) for v in new.variables}
    assert not {id(layer) for layer in model._flatten_layers()} & {id(layer) for layer in new._flatten_layers()}
    assert type(new) is type(model)
    assert new.name == model.name
    for tensors in (new.inputs, model.inputs), (new.outputs, model.outputs):
        assert [(t.shape, t.dtype) for t in tensors[0]] == [(t.shape, t.dtype) for t in tensors[1]]
    inputs = [[t._keras_history.operation.name for t in m.inputs] for m in (new, model)]
    assert inputs[0] == inputs[1]
    if not isinstance(model, keras.Sequential):
        assert new.output_names == model.output_names
    assert report.parameters_before == model.count_params()
    assert report.parameters_after == new.count_params()
    return new, report


def sequential(shape, *stack, dtype=None, **how):
    return randomize(keras.Sequential([keras.Input(shape, dtype=dtype), *stack]), **how)


def batch_norms(model):
    return [layer for layer in model._flatten_layers() if isinstance(layer, kl.BatchNormalization)]


# Layers beside a BatchNorm --------------------------------------------------------------------------------------

AFTER = {  # input shape, layer: the BatchNorm stands behind it
    "dense": ((3,), kl.Dense, {"units": 4}),
    "dense on 3 axes": ((5, 4), kl.Dense, {"units": 4}),
    "dense on 4 axes": ((4, 4, 4), kl.Dense, {"units": 4}),
    "conv1d": ((9, 3), kl.Conv1D, {"filters": 4, "kernel_size": 3, "strides": 2}),
    "conv1d causal": ((9, 3), kl.Conv1D, {"filters": 4, "kernel_size": 3, "padding": "causal", "dilation_rate": 2}),
    "conv2d": ((6, 5, 3), kl.Conv2D, {"filters": 4, "kernel_size": (3, 2)}),
    "conv2d same": ((6, 5, 3), kl.Conv2D, {"filters": 4, "kernel_size": 3, "padding": "same", "strides": 2}),
    "conv2d groups": ((6, 5, 4), kl.Conv2D, {"filters": 6, "kernel_size": 3, "groups": 2}),
    "conv3d": ((4, 5, 3, 2), kl.Conv3D, {"filters": 3, "kernel_size": 2}),
    "conv1d transposed": ((6, 3), kl.Conv1DTranspose, {"filters": 4, "kernel_size": 3, "strides": 2}),
    "conv2d transposed": ((4, 5, 3), kl.Conv2DTranspose, {"filters": 3, "kernel_size": 3, "padding": "same"}),
    "conv2d transposed 2": ((4, 5, 2), kl.Conv2DTranspose, {"filters": 4, "kernel_size": (2, 3), "strides": 2}),
    "conv3d transposed": ((3, 3, 3, 2), kl.Conv3DTranspose, {"filters": 3, "kernel_size": 2}),
    "depthwise1d": ((9, 3), kl.DepthwiseConv1D, {"kernel_size": 3, "depth_multiplier": 2}),
    "depthwise2d": ((6, 5, 3), kl.DepthwiseConv2D, {"kernel_size": 3, "padding": "same"}),
    "depthwise2d x 2": ((6, 5, 3), kl.DepthwiseConv2D, {"kernel_size": 2, "depth_multiplier": 2}),
    "separable1d": ((9, 3), kl.SeparableConv1D, {"filters": 4, "kernel_size": 3, "padding": "same"}),
    "separable2d": ((6, 5, 3), kl.SeparableConv2D, {"filters": 4, "kernel_size": 3, "depth_multiplier": 2}),
}
BEFORE = {
    name: case
    for name, case in AFTER.items()
    if case[2].get("padding", "valid") == "valid" and "Transpose" not in case[1].__name__
}
BEFORE["conv2d 1x1 same"] = (6, 5, 3), kl.Conv2D, {"filters": 4, "kernel_size": 1, "padding": "same", "strides": 2}
FLAGS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", AFTER)
def test_a_layer_takes_the_batch_norm_behind_it(name, use_bias):
    shape, layer, settings = AFTER[name]
    for scale, center in FLAGS:
        bn = kl.BatchNormalization(scale=scale, center=center)
        new, _ = check(sequential(shape, layer(**settings, use_bias=use_bias, name="layer"), bn), FOLDED)
        assert [layer.name for layer in new.layers] == ["layer"]
        assert new.layers[0].use_bias


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", BEFORE)
def test_a_layer_takes_the_batch_norm_in_front_of_it(name, use_bias):
    shape, layer, settings = BEFORE[name]
    for scale, center in FLAGS:
        bn = kl.BatchNormalization(scale=scale, center=center, epsilon=0.5)
        new, _ = check(sequential(shape, bn, layer(**settings, use_bias=use_bias, activation="relu")), FOLDED)
        assert len(new.layers) == 1


@pytest.mark.parametrize("name", [name for name in AFTER if name not in BEFORE])
def test_what_pads_or_is_transposed_takes_no_shift_from_in_front(name):
    shape, layer, settings = AFTER[name]
    model = sequential(shape, kl.BatchNormalization(), layer(**settings, activation="relu"))
    _, report = check(model, LEFT)
    why = "is transposed" if "Transpose" in layer.__name__ else "pads with zeros"
    assert why in report.decisions[0].reason


@pytest.mark.parametrize("name", ["conv1d causal", "conv2d same", "depthwise2d", "separable1d"])
def test_what_pads_takes_a_scale_from_in_front(name):
    shape, layer, settings = AFTER[name]
    check(sequential(shape, kl.BatchNormalization(), layer(**settings), centred=True), FOLDED)


@pytest.mark.parametrize("name", [name for name in AFTER if "dense" not in name])
def test_channels_first(name):
    shape, layer, settings = AFTER[name]
    if settings.get("padding") == "causal":
        pytest.skip("Keras has causal padding for channels_last only")
    settings = {**settings, "data_format": "channels_first"}
    first = (shape[-1], *shape[:-1])
    try:
        outputs(sequential(first, layer(**settings)), np.zeros((1, *first)))
    except (NotImplementedError, ValueError) as error:
        pytest.skip(f"this backend cannot run it: {error}")
    check(sequential(first, layer(**settings), kl.BatchNormalization(axis=1)), FOLDED)
    check(sequential(first, layer(**settings), kl.BatchNormalization(axis=-len(shape))), FOLDED)
    if name in BEFORE:
        check(sequential(first, kl.BatchNormalization(axis=1), layer(**settings, activation="relu")), FOLDED)
    _, report = check(sequential(first, layer(**settings), kl.BatchNormalization()), LEFT)
    assert "axis" in report.decisions[0].reason


def test_another_axis_is_not_that_of_the_channels():
    _, report = check(sequential((4, 4), kl.Dense(4), kl.BatchNormalization(axis=1), kl.Dense(3)), LEFT)
    assert report.decisions[0].reason.count("the channels are on axis 1, those of Dense") == 2


@pytest.mark.parametrize("policy", ["float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"])
def test_dtypes(policy):
    if policy != "float64" and keras.backend.backend() == "numpy":
        pytest.skip("this backend computes no half types")
    keras.config.set_dtype_policy(policy)
    compute, stored = keras.DTypePolicy(policy).compute_dtype, keras.DTypePolicy(policy).variable_dtype
    model = sequential(
        (6, 6, 3), kl.BatchNormalization(), kl.Conv2D(4, 3, use_bias=False), kl.BatchNormalization(), kl.ReLU(),
        kl.SeparableConv2D(5, 2, use_bias=False), kl.BatchNormalization(), kl.Flatten(), kl.Dense(3),
        kl.BatchNormalization(), dtype=compute,
    )  # fmt: skip
    new, _ = check(model, FOLDED, FOLDED, FOLDED, FOLDED)
    assert {v.dtype for v in new.weights} == {stored}
    assert len(new.layers) == 5


def test_weights_are_rounded_once():
    model = sequential((3,), kl.Dense(4), kl.BatchNormalization())
    dense, bn = model.layers
    params = fastbn.BatchNormParams(*(np.array(keras.ops.convert_to_numpy(v)) for v in bn.weights), bn.epsilon)
    exact = fastbn.fold_linear(*(np.array(keras.ops.convert_to_numpy(v)) for v in dense.weights), params, layout="IO")
    new, report = interop.fold(model)
    np.testing.assert_array_equal(numbers(new.layers[0].kernel), exact.weight.astype(np.float64))
    np.testing.assert_array_equal(numbers(new.layers[0].bias), exact.bias.astype(np.float64))
    assert report.decisions[0].changes == (exact.report,)


def test_settings_of_a_layer_stay():
    dense = kl.Dense(
        3, use_bias=False, name="kept", kernel_constraint="non_neg", kernel_regularizer="l2", trainable=False,
        activation="tanh",
    )  # fmt: skip
    new, _ = check(sequential((3,), kl.BatchNormalization(), dense), FOLDED)
    layer = new.get_layer("kept")
    assert layer.get_config() == dense.get_config() | {"use_bias": True}
    assert not layer.trainable


# What lies between ----------------------------------------------------------------------------------------------

PASSING = {  # input shape, layers between a BatchNorm and a Dense
    "dropout": ((4,), [lambda: kl.Dropout(0.5)]),
    "noise": ((4,), [lambda: kl.GaussianNoise(1.0), lambda: kl.GaussianDropout(0.5), lambda: kl.AlphaDropout(0.5)]),
    "spatial dropout": ((5, 4), [lambda: kl.SpatialDropout1D(0.5), lambda: kl.ActivityRegularization(0.1)]),
    "linear": ((4,), [lambda: kl.Activation("linear"), kl.Identity]),
    "flatten": ((3, 2, 4), [kl.Flatten]),
    "flatten channels first": ((4, 3, 2), [lambda: kl.Flatten("channels_first")]),
    "reshape": ((3, 2, 4), [lambda: kl.Reshape((6, 4))]),
    "reshape more": ((6, 4), [lambda: kl.Reshape((3, 8))]),
    "permute": ((3, 4), [lambda: kl.Permute((2, 1)), kl.Flatten]),
    "repeat": ((4,), [lambda: kl.RepeatVector(3)]),
    "average": ((9, 4), [lambda: kl.AveragePooling1D(2)]),
    "average same": ((7, 7, 4), [lambda: kl.AveragePooling2D(3, 2, padding="same")]),
    "average 3d": ((4, 4, 4, 3), [lambda: kl.AveragePooling3D(2)]),
    "global average": ((3, 2, 4), [kl.GlobalAveragePooling2D]),
    "global average kept": ((3, 4), [lambda: kl.GlobalAveragePooling1D(keepdims=True)]),
    "global average 3d": ((3, 2, 2, 4), [kl.GlobalAveragePooling3D, lambda: kl.Dropout(0.1)]),
    "cropping": ((7, 7, 4), [lambda: kl.Cropping2D(1), lambda: kl.UpSampling2D(2)]),
    "bilinear": ((3, 3, 4), [lambda: kl.UpSampling2D(2, interpolation="bilinear")]),
    "upsampling 1d": ((3, 4), [lambda: kl.UpSampling1D(2), lambda: kl.Cropping1D(1)]),
    "upsampling 3d": ((3, 3, 3, 2), [lambda: kl.UpSampling3D(2), lambda: kl.Cropping3D(1)]),
}
LARGEST = {
    "max 1d": ((9, 4), [lambda: kl.MaxPooling1D(2)]),
    "max 2d": ((7, 7, 4), [lambda: kl.MaxPooling2D(3, 2, padding="same")]),
    "max 3d": ((4, 4, 4, 3), [lambda: kl.MaxPooling3D(2)]),
    "global max": ((3, 4), [kl.GlobalMaxPooling1D]),
    "global max kept": ((3, 2, 4), [lambda: kl.GlobalMaxPooling2D(keepdims=True)]),
}


@pytest.mark.parametrize("name", PASSING)
def test_passes(name):
    shape, between = PASSING[name]
    axis = 1 if name in ("flatten channels first",) else -1
    _, report = check(
        sequential(shape, kl.BatchNormalization(axis=axis), *(make() for make in between), kl.Dense(3)), FOLDED
    )
    assert report.decisions[0].reason.startswith("forward through")
    if axis == -1 and name != "permute":
        bn = () if name.startswith(("flatten", "reshape more")) else (kl.BatchNormalization(),)
        model = sequential(shape, kl.Dense(shape[-1]), *(make() for make in between), *bn)
        check(model, *[FOLDED for _ in bn])


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_lets_positive_scales_pass(name):
    shape, between = LARGEST[name]

    def stack():
        return [kl.BatchNormalization(), *(make() for make in between), kl.Dense(3)]

    check(sequential(shape, *stack(), negative=False), FOLDED)
    _, report = check(sequential(shape, *stack()), LEFT)
    assert "takes the largest" in report.decisions[0].reason
    check(sequential(shape, kl.Dense(3), *stack()[1:-1], kl.BatchNormalization(), negative=False), FOLDED)


def test_unlike_channels_do_not_pass_a_flatten_backward():
    model = sequential((3, 2, 4), kl.Dense(4), kl.Flatten(), kl.BatchNormalization())
    _, report = check(model, LEFT)
    assert "mixes the channels" in report.decisions[0].reason


@pytest.mark.parametrize("layer", [kl.ZeroPadding1D, kl.ZeroPadding2D, kl.ZeroPadding3D])
def test_zero_padding_lets_a_scale_pass(layer):
    rank = int(layer.__name__[-2])
    shape = (3,) * rank + (2,)
    for centred, action in (True, FOLDED), (False, LEFT):
        model = sequential(shape, kl.BatchNormalization(), layer(1), kl.Dense(3), centred=centred)
        _, report = check(model, action)
        assert ("counts zeros" in report.decisions[0].reason) is not centred


def test_bicubic_is_not_passed():
    if keras.backend.backend() == "numpy":
        pytest.skip("this backend has none")
    between = kl.UpSampling2D(2, interpolation="bicubic")
    check(sequential((4, 4, 2), kl.BatchNormalization(), between, kl.Dense(2)), LEFT)


def test_concatenate():
    a, b = keras.Input((5, 3), name="a"), keras.Input((5, 2), name="b")
    y = kl.Concatenate()([kl.Conv1D(4, 3, padding="same")(a), kl.Dense(3)(b)])
    y = kl.BatchNormalization(name="behind")(y)
    y = kl.Concatenate(name="second")([kl.ReLU()(y), kl.BatchNormalization(name="in_front")(b)])
    model = randomize(keras.Model([a, b], kl.Dense(3)(y)))
    _, report = check(model, FOLDED, FOLDED)
    assert {d.node: len(d.into) for d in report} == {"behind": 2, "in_front": 1}


def test_concatenate_on_another_axis():
    a = keras.Input((5, 3))
    y = kl.Concatenate(axis=1)([kl.Dense(4)(a), kl.Dense(4)(a)])
    check(randomize(keras.Model(a, kl.BatchNormalization()(y))), FOLDED)


# Constants beside it --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_normalization_goes_with_it(invert, adapted):
    mean, variance = [1.0, 2.0, 0.5], [1.0, 4.0, 0.25]
    first = kl.Normalization(mean=None if adapted else mean, variance=None if adapted else variance, invert=invert)
    if adapted:
        first.adapt(np.random.default_rng(0).normal(2.0, 3.0, (50, 3)))
    model = keras.Sequential([keras.Input((3,)), first, kl.BatchNormalization(), kl.Dense(2)])
    for layer in model.layers[1:]:
        randomize(layer)
    new, report = check(model, FOLDED)
    assert len(new.layers) == 1
    assert "with Normalization" in report.decisions[0].reason


def test_normalization_that_stays_keeps_what_it_was_adapted_to():
    first = kl.Normalization()
    first.adapt(np.random.default_rng(0).normal(2.0, 3.0, (50, 3)))
    model = keras.Sequential([keras.Input((3,)), first, kl.ReLU(), kl.BatchNormalization(), kl.Dense(2)])
    check(model, FOLDED)


def test_rescaling_goes_with_it():
    model = sequential(
        (3,), kl.Dense(3, activation="tanh"), kl.Rescaling([2.0, 3.0, 4.0], [1.0, 0.0, -1.0], name="a"),
        kl.BatchNormalization(scale=False, center=False), kl.Dropout(0.5), kl.Rescaling(0.25, name="b"), kl.ReLU(),
    )  # fmt: skip
    new, report = check(model, REWRITTEN)
    assert [type(layer).__name__ for layer in new.layers] == ["Dense", "BatchNormalization", "Dropout", "ReLU"]
    (bn,) = batch_norms(new)
    assert bn.scale
    assert bn.center
    assert bn.epsilon == batch_norms(model)[0].epsilon
    assert "with Rescaling 'a', Rescaling 'b'" in report.decisions[0].reason


def test_rescaling_of_integers_stays():
    model = sequential((3,), kl.Rescaling(0.5), kl.BatchNormalization(), kl.Dense(3), dtype="uint8")
    new, _ = check(model, FOLDED)
    assert len(new.layers) == 2


def test_operators_beside_it():
    x = keras.Input((3,))
    c = np.array([2.0, -3.0, 4.0])
    y = kl.Dense(3)(x) * c
    y = kl.BatchNormalization()((1.0 - y) / 4.0 + c - 0.5)
    z = kl.Activation("tanh")(y)
    z = kl.BatchNormalization()(z * c) - 0.5
    new, _ = check(randomize(keras.Model(x, z)), FOLDED, REWRITTEN, slack=16)
    assert len(new.operations) == 5  # Input, Dense, tanh, BatchNorm, and Identity for the output's name


def test_operators_that_are_no_constants_per_channel():
    x = keras.Input((4, 3))
    y = kl.BatchNormalization()(kl.Dense(3)(x) * np.arange(1.0, 5).reshape(4, 1))
    y = kl.ReLU()(y)
    z = kl.BatchNormalization()(kl.ReLU()(x))
    w = kl.BatchNormalization()(kl.ReLU()(x))
    model = randomize(keras.Model(x, [kl.ReLU()(y), kl.ReLU()(1.0 / (w * w + 1.0)), kl.ReLU()(z * x)]))
    check(model, LEFT, LEFT, LEFT)


def test_operations_that_move_values():
    x = keras.Input((4, 3))
    y = kl.BatchNormalization()(x)
    y = keras.ops.expand_dims(keras.ops.transpose(y, (0, 2, 1)), 1)
    y = keras.ops.reshape(keras.ops.squeeze(y, 1), (-1, 12))
    new, _ = check(randomize(keras.Model(x, kl.Dense(2)(y))), FOLDED)
    assert not batch_norms(new)
    y = keras.ops.concatenate([kl.Dense(4)(x), kl.Dense(2)(x)], axis=-1)
    check(randomize(keras.Model(x, kl.BatchNormalization()(y))), FOLDED)


# Graphs ---------------------------------------------------------------------------------------------------------


def test_branches():
    x = keras.Input((6, 6, 3))
    y = kl.BatchNormalization(name="both")(kl.Conv2D(4, 3, padding="same")(x))
    left = kl.BatchNormalization(name="residual")(kl.Conv2D(4, 1)(kl.ReLU()(y)))
    y = kl.Add()([left, y])
    y = kl.BatchNormalization(name="front")(y)
    z = [kl.Conv2D(3, 1)(y), kl.DepthwiseConv2D(2)(kl.Dropout(0.5)(y))]
    check(randomize(keras.Model(x, z)), FOLDED, FOLDED, FOLDED)


def test_a_chain_of_batch_norms_becomes_one():
    model = sequential((3,), *(kl.BatchNormalization(epsilon=e) for e in (1e-3, 1.0, 0.1)), kl.ReLU())
    new, _ = check(model, MERGED, MERGED, REWRITTEN)
    assert len(batch_norms(new)) == 1


def test_what_stays_is_rewritten_in_its_own_conventions():
    front = kl.BatchNormalization(momentum=0.7)
    model = sequential((3,), kl.ReLU(), front, kl.BatchNormalization(), kl.ReLU())
    new, report = interop.fold(model)
    assert sorted(d.action for d in report) == [MERGED, REWRITTEN]
    (bn,) = batch_norms(new)
    kept = next(d.node for d in report.left)
    assert bn.name == kept
    assert bn.momentum == model.get_layer(kept).momentum
    np.testing.assert_array_equal(numbers(bn.moving_variance), numbers(model.get_layer(kept).moving_variance))


def test_names_structures_and_masks():
    a, b = keras.Input((5,), name="a", dtype="int32"), keras.Input((3,), name="b")
    y = kl.BatchNormalization()(kl.Embedding(6, 4, mask_zero=True)(a))
    y = kl.LSTM(4)(kl.Dense(4)(y))
    z = kl.BatchNormalization(name="out_b")(kl.Dense(2)(b))
    y = kl.BatchNormalization(name="out_a")(kl.Dense(2)(y))
    model = randomize(keras.Model({"a": a, "b": b}, {"u": y, "v": z}, name="both"))
    x = {"a": np.array([[1, 2, 0, 0, 0], [3, 0, 2, 1, 0]]), "b": np.ones((2, 3))}
    new, report = check(model, FOLDED, FOLDED, FOLDED, x=x)
    assert set(new.output) == {"u", "v"}
    assert set(new.input) == {"a", "b"}
    assert [type(new.get_layer(n)).__name__ for n in ("out_a", "out_b")] == ["Identity"] * 2
    assert report.nodes_after == report.nodes_before - 1
    predicted, expected = new.predict(x, verbose=0), model.predict(x, verbose=0)
    for key in "uv":
        np.testing.assert_allclose(predicted[key], expected[key], rtol=0, atol=1e3 * EPS[model.outputs[0].dtype] * 50)


def test_a_mask_is_read_by_what_averages():
    x = keras.Input((5, 3))
    y = kl.BatchNormalization()(kl.Masking()(x))
    model = randomize(keras.Model(x, kl.Dense(2)(kl.GlobalAveragePooling1D()(y))))
    values = data(model)
    values[:, 3:] = 0
    check(model, FOLDED, x=values)


def test_functions_that_no_config_can_name():
    scaled = 2.0
    stack = [
        kl.BatchNormalization(), kl.Dense(3, activation=lambda x: keras.ops.relu(x) * scaled),
        kl.Lambda(lambda x: x * scaled), kl.Activation(lambda x: x + scaled), kl.LeakyReLU(), kl.BatchNormalization(),
        kl.Dense(2, activation=kl.LeakyReLU(negative_slope=0.5)),
    ]  # fmt: skip
    check(sequential((3,), *stack), FOLDED, FOLDED)


class Block(kl.Layer):
    """A layer of the user's own, with a BatchNorm in it, and a file of its own."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units, self.words = units, ["none"]
        self.dense, self.norm = kl.Dense(units), kl.BatchNormalization(name="inner")

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.units))

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.units)

    def call(self, x):
        return self.norm(self.dense(x)) * len(self.words)

    def get_config(self):
        return super().get_config() | {"units": self.units}

    def save_assets(self, folder):
        with open(os.path.join(folder, "words.json"), "w") as file:
            json.dump(self.words, file)

    def load_assets(self, folder):
        with open(os.path.join(folder, "words.json")) as file:
            self.words = json.load(file)


def test_layers_of_the_users_own_keep_all_they_have():
    block = Block(4, name="block")
    block.words = ["a", "b", "c"]
    model = sequential((3,), block, kl.BatchNormalization(), kl.Dense(2))
    new, report = check(model, LEFT, FOLDED)
    assert report.decisions[0].node == "block/inner"
    assert report.decisions[0].reason == "it is inside the Block 'block'"
    assert new.get_layer("block").words == ["a", "b", "c"]


def test_wrappers_hide_what_they_hold():
    model = sequential((4, 3), kl.Dense(3), kl.TimeDistributed(kl.BatchNormalization(name="in"), name="out"), kl.ReLU())
    _, report = check(model, LEFT)
    assert report.decisions[0].node == "out/in"
    check(sequential((4, 3), kl.TimeDistributed(Block(2))), LEFT)


def test_trainable_flags_stay():
    inner = keras.Sequential([keras.Input((3,)), kl.Dense(3, name="d"), kl.BatchNormalization()], name="inner")
    model = sequential((3,), inner, kl.Dense(2, name="e"), kl.BatchNormalization())
    model.trainable = False
    inner.get_layer("d").trainable = True
    alone, _ = check(sequential((3,), inner), FOLDED)
    assert alone.trainable
    assert not alone.get_layer("inner").trainable
    assert alone.get_layer("inner").get_layer("d").trainable
    new, _ = check(model, FOLDED, FOLDED)
    assert not new.trainable
    assert not new.get_layer("inner").trainable
    assert not new.get_layer("e").trainable
    assert new.get_layer("inner").get_layer("d").trainable


def test_a_model_of_batch_norms_only():
    check(sequential((3,), kl.BatchNormalization()), LEFT)
    inner = keras.Sequential([keras.Input((3,)), kl.BatchNormalization()], name="inner")
    new, _ = check(sequential((3,), kl.Dense(3), inner), FOLDED)
    assert [type(layer).__name__ for layer in new.get_layer("inner").layers] == ["Identity"]
    x = keras.Input((3,))
    inner = keras.Model(x, kl.BatchNormalization(name="n")(x), name="inner")
    y = keras.Input((3,))
    new, _ = check(randomize(keras.Model(y, kl.ReLU()(inner(kl.Dense(3)(y))))), FOLDED)
    assert new.get_layer("inner").count_params() == 0


# Models in models -----------------------------------------------------------------------------------------------


def encoder(name="inner"):
    x = keras.Input((4,), name=f"{name}_in")
    y = kl.BatchNormalization(name="first")(x)
    y = kl.Dense(4, name="dense")(y)
    return keras.Model(x, kl.BatchNormalization(name="last")(y), name=name)


def test_a_model_called_once_is_part_of_the_one_that_calls_it():
    x = keras.Input((4,))
    y = kl.BatchNormalization(name="front")(kl.ReLU()(x))
    y = kl.BatchNormalization(name="behind")(encoder()(y))
    new, report = check(randomize(keras.Model(x, kl.ReLU()(y))), MERGED, FOLDED, FOLDED, FOLDED)
    assert [d.node for d in report] == ["front", "inner/first", "inner/last", "behind"]
    assert [d.into for d in report] == [("inner/first",), *[("inner/dense",)] * 3]
    assert not batch_norms(new)


def test_a_model_called_twice_is_folded_on_its_own():
    x = keras.Input((4,))
    inner = encoder()
    y = kl.BatchNormalization(name="between")(inner(x))
    _, report = check(randomize(keras.Model(x, inner(y))), FOLDED, FOLDED, LEFT)
    assert {d.node for d in report.folded} == {"inner/first", "inner/last"}
    assert "Functional 'inner' stands there" in report.left[0].reason


def test_a_layer_that_another_model_has_too_stays():
    inner = encoder()
    x = keras.Input((4,))
    part = keras.Model(inner.input, inner.get_layer("dense").output, name="part")
    model = randomize(keras.Model(x, [kl.ReLU()(inner(x)), part(x)]))
    _, report = check(model, LEFT, LEFT)
    assert "more than once" in report.decisions[0].reason


def test_a_sequential_of_models():
    model = sequential((4,), encoder("a"), kl.ReLU(), encoder("b"), keras.Sequential([kl.ReLU(), kl.Dense(2)]))
    _, report = check(model, FOLDED, FOLDED, FOLDED, FOLDED)
    assert [d.node for d in report] == ["a/first", "a/last", "b/first", "b/last"]


def test_an_inner_model_that_converts_its_inputs_is_a_border():
    x = keras.Input((4,), dtype="float32")
    inner = keras.Sequential([keras.Input((4,), dtype="float16"), kl.Dense(4, dtype="float32")], name="inner")
    model = keras.Model(x, inner(kl.BatchNormalization(dtype="float32")(x)))
    _, report = interop.fold(randomize(model))
    assert "Sequential 'inner' stands there" in report.decisions[0].reason


def test_an_inner_model_that_sorts_its_inputs_is_a_border():
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    inner = keras.Model([b, a], [kl.Dense(2)(b), kl.Dense(2)(a)], name="inner")
    x, y = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([x, y], list(inner({"a": kl.BatchNormalization()(x), "b": y})))
    _, report = check(randomize(model), LEFT)
    assert "Functional 'inner' stands there" in report.decisions[0].reason


# What must stay -------------------------------------------------------------------------------------------------


def reasons(model, *actions, **how):
    _, report = check(randomize(model), *actions, **how)
    return [d.reason for d in report]


def test_an_activation_between():
    for activation, name in ("relu", "relu"), ("tanh", "tanh"), (lambda x: x * x, "<lambda>"):
        model = sequential((3,), kl.Dense(3, activation=activation), kl.BatchNormalization())
        _, report = check(model, LEFT)
        assert f"{name} of Dense" in report.decisions[0].reason
    _, report = check(sequential((3,), kl.Dense(3), kl.ReLU(), kl.BatchNormalization()), LEFT)
    assert "ReLU 're_lu" in report.decisions[0].reason


def test_shared_layers():
    x = keras.Input((4,))
    dense = kl.Dense(4)
    for outs in [dense(x), dense(kl.BatchNormalization()(dense(x)))], kl.Dense(4)(kl.ReLU()(dense(dense(x)))):
        y = kl.BatchNormalization()(outs[0] if isinstance(outs, list) else dense(outs))
        rest = outs[1:] if isinstance(outs, list) else []
        for reason in reasons(keras.Model(x, [y, *rest]), *[LEFT] * (1 + len(rest))):
            assert "it is called more than once" in reason


def test_a_shared_batch_norm():
    x, bn = keras.Input((4,)), kl.BatchNormalization()
    model = keras.Model(x, kl.Dense(3)(bn(kl.Dense(4)(kl.ReLU()(bn(kl.Dense(4)(x)))))))
    assert reasons(model, LEFT) == ["it is called more than once"]


class Tied(kl.Layer):
    """Multiplies by the transposed kernel of a Dense that the model may call too."""

    def __init__(self, dense, **kwargs):
        super().__init__(**kwargs)
        self.dense = dense

    def call(self, x):
        return keras.ops.matmul(x, keras.ops.transpose(self.dense.kernel))

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.dense.kernel.shape[0])

    def get_config(self):
        return super().get_config() | {"dense": keras.saving.serialize_keras_object(self.dense)}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("dense")), **config)


def test_shared_variables():
    x, dense = keras.Input((4,)), kl.Dense(3)
    y = kl.BatchNormalization()(dense(x))
    model = keras.Model(x, Tied(dense)(y))
    assert "another layer has a variable of it" in reasons(model, LEFT)[0]


def test_another_reader():
    x = keras.Input((4,))
    y = kl.Dense(4)(x)
    (reason,) = reasons(keras.Model(x, kl.Add()([kl.BatchNormalization()(y), kl.ReLU()(y)])), LEFT)
    assert "more than one reader" in reason
    (reason,) = reasons(keras.Model(x, [kl.ReLU()(kl.BatchNormalization()(y)), y]), LEFT)
    assert "is an output of the model too" in reason


def test_a_mask_is_a_reader():
    x = keras.Input((5, 3))
    y = kl.Dense(5)(kl.Flatten()(x))
    model = keras.Model(x, [kl.ReLU()(kl.BatchNormalization()(y)), kl.GlobalAveragePooling1D()(x, mask=y)])
    assert "more than one reader" in reasons(model, LEFT)[0]


def test_training_mode():
    x = keras.Input((4,))
    y = kl.BatchNormalization()(kl.Dense(4)(x), training=True)
    assert "training=True" in reasons(keras.Model(x, y), LEFT)[0]
    assert "training=True" in reasons(keras.Model(x, encoder()(x, training=True)), LEFT, LEFT)[1]
    check(randomize(keras.Model(x, kl.BatchNormalization()(kl.Dense(4)(x), training=False))), FOLDED)


def test_dropout_that_is_always_on():
    x = keras.Input((4,))
    y = kl.BatchNormalization()(kl.Dropout(0.5)(kl.Dense(4)(x), training=True))
    assert "Dropout" in reasons(keras.Model(x, y), LEFT)[0]


def test_quantised_and_lora():
    for change in (lambda layer: layer.quantize("int8")), (lambda layer: layer.enable_lora(2)):
        model = sequential((4,), kl.Dense(8), kl.BatchNormalization(), kl.ReLU(), kl.BatchNormalization(), kl.Dense(2))
        change(model.layers[0])
        change(model.layers[-1])
        x, before = data(model), None
        before = outputs(model, x)
        new, report = interop.fold(model)
        assert [d.action for d in report] == [LEFT, LEFT]
        assert all("quantised (int8)" in d.reason or "LoRA" in d.reason for d in report)
        np.testing.assert_array_equal(outputs(new, x)[0], before[0])


def test_batch_norms_of_the_users_own():
    class Own(kl.BatchNormalization):
        def call(self, x, training=None, mask=None):
            return 2 * super().call(x)

    (reason,) = reasons(keras.Sequential([keras.Input((3,)), kl.Dense(3), Own()]), LEFT)
    assert reason == "its class Own is not Keras's own"

    class Standardized(kl.Conv1D):
        def convolution_op(self, inputs, kernel):
            return super().convolution_op(inputs, kernel * kernel)

    model = keras.Sequential([keras.Input((5, 3)), Standardized(3, 2), kl.BatchNormalization()])
    assert "Standardized" in reasons(model, LEFT)[0]


def test_dtypes_that_change_on_the_way():
    narrow = sequential((3,), kl.BatchNormalization(), kl.Dense(3, dtype="float16"))
    x = data(narrow) + 1e6  # finite for the BatchNorm only
    narrow.layers[0].moving_mean.assign([1e6] * 3)
    new, report = interop.fold(narrow)
    assert "makes float16 of float32" in report.decisions[0].reason
    assert np.isfinite(outputs(new, x)[0]).all()
    assert "makes float32 of int32" in reasons(
        keras.Sequential([keras.Input((3,), dtype="int32"), kl.BatchNormalization(), kl.Dense(2)]), LEFT
    )[0]  # fmt: skip
    cast = sequential((3,), kl.BatchNormalization(), kl.Dropout(0.5, dtype="float16"), kl.Dense(3, dtype="float16"))
    assert "Dropout" in interop.fold(cast)[1].left[0].reason
    wide = sequential((3,), kl.Dense(3, dtype="float16"), kl.BatchNormalization(name="bn"), kl.ReLU())
    new, _ = interop.fold(wide)
    assert type(new.get_layer("bn")).__name__ == "Identity"
    assert new.get_layer("bn").compute_dtype == "float32"
    np.testing.assert_allclose(outputs(new, data(wide))[0], outputs(wide, data(wide))[0], atol=64 * EPS["float16"])


def test_weights_that_cannot_hold_it():
    keras.config.set_dtype_policy("float16")
    model = keras.Sequential([keras.Input((3,)), kl.Dense(3), kl.BatchNormalization()])
    model.layers[0].kernel.assign(np.full((3, 3), 6e4))
    model.layers[1].gamma.assign([8.0] * 3)
    _, report = interop.fold(model)
    assert "cannot hold it" in report.decisions[0].reason


def test_depthwise_taps_that_are_not_finite():
    model = sequential((5, 2), kl.BatchNormalization(), kl.SeparableConv1D(2, 2))
    model.layers[1].depthwise_kernel.assign(np.full((2, 2, 1), np.nan))
    _, report = interop.fold(model)
    assert "depthwise kernel: expected finite values" in report.decisions[0].reason


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [-1.0, -1e-3, np.nan, np.inf])
def test_a_variance_that_is_none(variance):
    x = keras.Input((4,))
    inner = encoder()
    model = keras.Model(x, inner(x))
    inner.get_layer("last").moving_variance.assign([1.0, variance, 1.0, 1.0])
    with pytest.raises(ValueError, match="BatchNormalization 'inner/last': var"):
        interop.fold(model)


def test_models_that_are_none():
    class Own(keras.Model):
        def call(self, x):
            return x

    class OwnSequential(keras.Sequential):
        def call(self, x, training=None, mask=None):
            return x

    with pytest.raises(TypeError, match="model: expected .*, got int"):
        interop.fold(3)
    for own in Own(), OwnSequential([keras.Input((2,)), kl.Dense(2)]):
        with pytest.raises(TypeError, match="whose call\\(\\) is its own"):
            interop.fold(own)
    with pytest.raises(ValueError, match="expected one that is built"):
        interop.fold(keras.Sequential([kl.Dense(2)]))


def test_a_layer_that_no_config_makes_again():
    class NoConfig(kl.Layer):
        def __init__(self, function):
            super().__init__(name="odd")
            self.function = function

        def call(self, x):
            return self.function(x)

    with pytest.raises(ValueError, match="NoConfig 'odd': expected a layer that its config makes again"):
        interop.fold(keras.Sequential([keras.Input((2,)), NoConfig(lambda x: x)]))

    class Grows(kl.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(self.rows,), name="w")

        def call(self, x):
            return x * 1

        rows = 2

    model = keras.Sequential([keras.Input((2,)), Grows(name="odd")])
    Grows.rows = 3
    with pytest.raises(ValueError, match="'odd': expected variables of shapes"):
        interop.fold(model)


def test_without_keras_or_its_backend(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "fastbn.interop.keras")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ModuleNotFoundError, match='pip install "fastbn\\[keras\\]"'):
        importlib.import_module("fastbn.interop.keras")
    monkeypatch.delitem(sys.modules, "keras")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "keras.py").write_text("import no_such_backend")
    with pytest.raises(ModuleNotFoundError, match="needs no_such_backend; KERAS_BACKEND"):
        importlib.import_module("fastbn.interop.keras")


# Single layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("flags", FLAGS)
def test_from_layer_and_back(axis, flags):
    scale, center = flags
    layer = kl.BatchNormalization(axis=axis, momentum=0.9, epsilon=0.01, scale=scale, center=center, dtype="float32")
    layer.build((None, 3, 4))
    randomize(layer)
    x = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    bn = interop.from_layer(layer)
    assert (bn.axis, bn.eps, bn.unbiased, bn.training, bn.dtype) == (axis, 0.01, False, False, np.float32)
    assert bn.affine is (scale or center)
    assert bn.momentum == pytest.approx(0.1)
    back = interop.to_layer(bn, ndim=3)
    assert (back.axis, back.epsilon, back.scale, back.center) == (axis, 0.01, scale or center, scale or center)
    assert back.momentum == pytest.approx(0.9)
    y = numbers(layer(x))
    atol = 64 * EPS["float32"] * np.abs(y).max()
    np.testing.assert_allclose(bn(x), y, rtol=0, atol=atol)
    np.testing.assert_array_equal(numbers(back(x)), y)
    before = bn.running_mean.copy()
    layer.moving_mean.assign(np.zeros_like(before))
    np.testing.assert_array_equal(bn.running_mean, before)

    bn = interop.from_layer(back).train()
    layer.moving_mean.assign(before)
    back(x, training=True)  # one step each: momentum and the variance's kind
    bn(x)
    np.testing.assert_allclose(bn.running_mean, numbers(back.moving_mean), rtol=0, atol=32 * EPS["float32"])
    np.testing.assert_allclose(bn.running_var, numbers(back.moving_variance), rtol=32 * EPS["float32"], atol=0)


def test_from_layer_errors():
    with pytest.raises(TypeError, match="layer: expected a keras.layers.BatchNormalization, got Dense"):
        interop.from_layer(kl.Dense(2))
    with pytest.raises(ValueError, match="expected one that is built"):
        interop.from_layer(kl.BatchNormalization())


def test_to_layer_errors():
    def bn(**settings):
        return fastbn.BatchNorm(3, **settings)

    for settings, message in (
        ({"momentum": None}, "momentum: expected a number, got None"),
        ({"track_running_stats": False}, "expected running statistics"),
        ({"activation": "relu"}, "expected no activation"),
        ({"axis": 2}, "ndim: expected so many axes"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.to_layer(bn(**settings))
    with pytest.raises(TypeError, match="bn: expected a fastbn.BatchNorm"):
        interop.to_layer(kl.BatchNormalization())
    assert interop.to_layer(bn()).built
    layer = interop.to_layer(bn(affine=False, axis=-1), ndim=4)
    assert (layer.scale, layer.center, len(layer.weights)) == (False, False, 2)


# Files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".keras", ".h5", ".hdf5"])
@pytest.mark.filterwarnings("ignore")
def test_load_fold_save(tmp_path, suffix):
    x = keras.Input((6, 6, 3), name="image")
    y = kl.BatchNormalization(name="out")(kl.SeparableConv2D(4, 3, use_bias=False)(x))
    model = randomize(keras.Model(x, [y, kl.Dense(3)(encoder()(kl.Dense(4)(kl.GlobalMaxPooling2D()(x))))]))
    model.save(tmp_path / f"model{suffix}")
    loaded = interop.load(tmp_path / f"model{suffix}")
    new, _ = check(loaded, FOLDED, FOLDED, FOLDED)
    interop.save(new, tmp_path / "new.keras")
    again = interop.load(str(tmp_path / "new.keras"))
    assert again.output_names == model.output_names
    for a, b in zip(outputs(again, data(model)), outputs(new, data(model)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_no_model(tmp_path):
    model = sequential((3,), kl.Dense(2), Block(2))
    good = tmp_path / "good.keras"
    model.save(good)
    keras.Sequential([keras.Input((3,)), kl.Lambda(lambda x: x)]).save(tmp_path / "code.keras")
    keras.Sequential([keras.Input((3,)), kl.Lambda(lambda x: x)]).save(tmp_path / "code.h5")
    model.save(tmp_path / "own.h5")
    model.save_weights(tmp_path / "only.weights.h5")
    bytes_ = good.read_bytes()
    (tmp_path / "cut.keras").write_bytes(bytes_[: len(bytes_) // 2])
    (tmp_path / "text.keras").write_text("no model")
    (tmp_path / "cut.hdf5").write_bytes((tmp_path / "own.h5").read_bytes()[:1000])
    with zipfile.ZipFile(tmp_path / "empty.keras", "w") as file:
        file.writestr("config.json", "{}")
    for name in "good.keras", "own.h5", "only.weights.h5", "cut.keras", "text.keras", "cut.hdf5", "empty.keras", \
            "code.keras", "code.h5":  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected a Keras model") as caught:
            interop.load(tmp_path / name)
        assert "\n" not in str(caught.value)
        if name in ("good.keras", "own.h5"):
            assert "Block" in str(caught.value)
        if name == "code.h5":
            assert "whose code is not run" in str(caught.value)
        if name.startswith("code"):
            assert "Lambda" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="none.keras"):
        interop.load(tmp_path / "none.keras")
    with pytest.raises(ValueError, match="x.onnx: expected a .keras, .h5 or .hdf5 file"):
        interop.load(tmp_path / "x.onnx")
    for name in "model.h5", "model.hdf5", "model":
        with pytest.raises(ValueError, match=f"{name}: expected a name that ends in .keras"):
            interop.save(model, tmp_path / name)


# Any graph ------------------------------------------------------------------------------------------------------


def drawn_model(draw):
    """Return a functional model: a few tensors (N, 4, C), each from one or two before it, with shared layers."""
    x = keras.Input((4, 3))
    tensors, shared = [x], []
    for _ in range(draw(st.integers(3, 12))):
        y = tensors[draw(st.integers(max(0, len(tensors) - 3), len(tensors) - 1))]
        kind = draw(st.sampled_from(["bn", "bn", "bn", "dense", "conv", "depthwise", "separable", "relu", "pool", "max",
                                     "add", "concat", "scale", "again", "dropout", "inner", "padded"]))  # fmt: skip
        c, bias = y.shape[-1], draw(st.booleans())
        units = draw(st.integers(1, 4))
        if kind == "bn":
            layer = kl.BatchNormalization(scale=bias, center=draw(st.booleans()), axis=draw(st.sampled_from([-1, 2])))
        elif kind == "dense":
            layer = kl.Dense(units, use_bias=bias, activation=draw(st.sampled_from([None, None, "relu"])))
        elif kind == "conv":
            layer = kl.Conv1D(units * c, 1, use_bias=bias, groups=draw(st.sampled_from([1, c])))
        elif kind == "padded":
            layer = kl.Conv1D(units, 3, padding="same", use_bias=bias)
        elif kind == "depthwise":
            layer = kl.DepthwiseConv1D(1, depth_multiplier=draw(st.integers(1, 2)), use_bias=bias)
        elif kind == "separable":
            layer = kl.SeparableConv1D(units, 1, depth_multiplier=2, use_bias=bias)
        elif kind == "relu":
            layer = kl.ReLU()
        elif kind == "pool":
            layer = kl.AveragePooling1D(2, 1, padding="same")
        elif kind == "max":
            layer = kl.MaxPooling1D(2, 1, padding="same")
        elif kind == "dropout":
            layer = kl.Dropout(0.5)
        elif kind == "scale":
            layer = kl.Rescaling(2.0, 0.5)
        elif kind == "inner":
            norms = kl.BatchNormalization(), kl.BatchNormalization()
            layer = keras.Sequential([keras.Input((4, c)), norms[0], kl.Dense(2), norms[1]])
        elif kind == "again" and (fitting := [layer for size, layer in shared if size == c]):
            layer = draw(st.sampled_from(fitting))
        elif kind == "add":
            fitting = [t for t in tensors if t.shape == y.shape]
            tensors.append(kl.Add()([y, draw(st.sampled_from(fitting))]))
            continue
        else:
            other = draw(st.sampled_from(tensors))
            if c + other.shape[-1] <= 12:
                tensors.append(kl.Concatenate()([y, other]))
            continue
        made = layer(y)
        if made.shape[-1] > 12:
            continue
        tensors.append(made)
        shared.append((c, layer))
    outs = [tensors[-1], *draw(st.lists(st.sampled_from(tensors), max_size=1))]
    outs = [t for t in {id(t): t for t in outs}.values() if t is not x] or [kl.ReLU()(x)]
    return randomize(keras.Model(x, outs), draw(st.integers(0, 5)), negative=draw(st.booleans()))


@given(drawn=st.data())
def test_any_graph(drawn):
    model = drawn_model(drawn.draw)
    new, report = interop.fold(model)
    check(model, *[d.action for d in report])
    left = {d.node for d in report.left}
    assert len(report) == len(batch_norms(model))
    assert len(batch_norms(new)) == len(left)
    _, second = interop.fold(new)
    assert not second.folded, f"{report}\n{second}"
