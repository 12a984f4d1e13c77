"""What folding must know of each Keras layer and operation, whatever model it is in.

    steps_of(call, ...)   what it does, as `graph.fold` knows it      params_of(layer)   of a BatchNormalization
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from ..affine import EXACT, Affine, BatchNormParams
from ..fold import Folded
from .graph import BatchNorm, Concat, Layer, Pool, Reshape, Same, Scaling, Transpose
from .keras_calls import data_of, is_tensor, to_array, to_constant

# The letters of the kernel's axes, as fold_conv reads them; of the pointwise kernel where there are two.
LAYOUTS = {
    layers.Dense: "IO",
    layers.Conv1D: "WIO",
    layers.Conv2D: "HWIO",
    layers.Conv3D: "DHWIO",
    layers.Conv1DTranspose: "WOI",
    layers.Conv2DTranspose: "HWOI",
    layers.Conv3DTranspose: "DHWOI",
    layers.DepthwiseConv1D: "WIM",
    layers.DepthwiseConv2D: "HWIM",
    layers.SeparableConv1D: "WIO",
    layers.SeparableConv2D: "HWIO",
}
_SEPARABLE = {layers.SeparableConv1D, layers.SeparableConv2D}


def _ranks(*names: str) -> set[Any]:
    """Return the classes for inputs of one, two and three axes besides samples and channels."""
    return {getattr(layers, f"{name}{n}D") for name in names for n in (1, 2, 3)}


_IDENTITIES = _ranks("SpatialDropout") | {  # at inference
    layers.Identity,
    layers.Dropout,
    layers.AlphaDropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.ActivityRegularization,
}
_LARGEST = _ranks("MaxPooling", "GlobalMaxPooling")
_POOLING = _ranks("MaxPooling", "AveragePooling", "Cropping", "UpSampling")  # averages count no zeros of the padding
_GLOBAL_POOLING = _ranks("GlobalMaxPooling", "GlobalAveragePooling")
_ZERO_PADDING = _ranks("ZeroPadding")


class Step(NamedTuple):
    """One of the things that a layer does one after the other."""

    op: Any  # what folding must know of it
    shape: Any = None  # of what the next one reads
    kind: str = ""  # if not the layer's class


@dataclass
class Separable(Layer):
    """A separable convolution, whose pointwise kernel takes all: the depthwise one lets a scale and a shift pass.

    Σ_k D[k, i, m]·(s_i·x + t_i) = s_i·(Σ_k D[k, i, m]·x) + t_i·Σ_k D[k, i, m], in channel i·M + m.
    """

    depthwise: np.ndarray = field(default_factory=lambda: np.empty(0))  # (*kernel, I, M)

    @property
    def in_channels(self) -> int:
        return self.depthwise.shape[-2]

    def _fold_before(self, affine: Affine, weight: np.ndarray, bias: np.ndarray | None) -> Folded:
        *_, channels, multiplier = self.depthwise.shape
        taps = self.depthwise.astype(np.float64).reshape(-1, channels * multiplier)
        if not np.isfinite(taps).all():
            raise ValueError("depthwise kernel: expected finite values")
        scale, shift = ([x for x in part for _ in range(multiplier)] for part in (affine.scale, affine.shift))
        with localcontext(EXACT):
            shift = [t * sum(map(Decimal, column)) for t, column in zip(shift, taps.T.tolist(), strict=True)]
        return super()._fold_before(Affine(scale, shift), weight, bias)


def steps_of(call: Any, held: str, trains: bool) -> list[Step]:
    """Return what folding must know of a call, [] for nothing.

    `held` says why the layer's variables must stay, `trains` whether it is called with training=True.
    """
    op, data, y = call.operation, data_of(call), call.outputs[0]
    cls, joins = type(op), data if isinstance(data, (list, tuple)) else [data]
    if not isinstance(op, keras.Layer):
        return [] if held else _raw(call, y)
    if not all(map(is_tensor, joins)) or (cls is not layers.Concatenate and joins is data):
        return []
    x = joins[0]
    if cls is layers.BatchNormalization:
        if trains:
            held = "it is called with training=True, and normalises by the batch"
        elif not all(keras.backend.is_float_dtype(tensor.dtype) for tensor in (x, y)):
            held = held or f"it makes {y.dtype} of {x.dtype}"
        return [Step(BatchNorm(params_of(op), op.axis, held))]
    if cls in LAYOUTS:
        layer = _layer(op, held)
        if _bits(x.dtype) > _bits(y.dtype):  # what a BatchNorm made small enough for it may be too large without
            layer.held_before = f"it makes {y.dtype} of {x.dtype}"
        if op.activation is keras.activations.linear:
            return [Step(layer)]
        activation = getattr(op.activation, "__name__", "activation")
        return [Step(layer, y.shape), Step(None, kind=f"{activation} of {cls.__name__}")]
    if not _keeps_dtype(joins, y):
        return []
    if cls in (layers.Rescaling, layers.Normalization) and not held:
        return _scaling(op)
    return [] if trains else _passing(op, x, y)


def _keeps_dtype(tensors: Sequence[Any], y: Any) -> bool:
    return keras.backend.is_float_dtype(y.dtype) and all(tensor.dtype == y.dtype for tensor in tensors)


def _bits(dtype: str) -> int:
    """Return the size of a floating-point type, 0 for others."""
    return int(dtype.rpartition("float")[2]) if keras.backend.is_float_dtype(dtype) else 0


def params_of(layer: Any) -> BatchNormParams:
    """Return the parameters of a BatchNormalization."""
    gamma, beta = (None if v is None else to_array(v) for v in (layer.gamma, layer.beta))
    return BatchNormParams(gamma, beta, to_array(layer.moving_mean), to_array(layer.moving_variance), layer.epsilon)


def _layer(op: Any, held: str) -> Layer:
    cls, layout = type(op), LAYOUTS[type(op)]
    axis = 1 if getattr(op, "data_format", "channels_last") == "channels_first" else -1
    padded = getattr(op, "padding", "valid") != "valid" and any(k > 1 for k in op.kernel_size)
    weight = np.zeros((0,) * len(layout)) if held else to_array(op.pointwise_kernel if cls in _SEPARABLE else op.kernel)
    bias = to_array(op.bias) if op.use_bias and not held else None
    common: Any = {"in_axis": axis, "out_axis": axis, "padded": padded, "held": held}
    if cls in _SEPARABLE:
        depthwise = np.zeros((0, 0, 0)) if held else to_array(op.depthwise_kernel)
        return Separable(weight, bias, layout, depthwise=depthwise, **common)
    return Layer(weight, bias, layout, groups=getattr(op, "groups", 1), transposed="OI" in layout, **common)


def _scaling(op: Any) -> list[Step]:
    """Return the constant factor and summand of a Rescaling or Normalization, as its compute dtype has them."""
    if type(op) is layers.Rescaling:
        if np.ndim(op.scale) and keras.config.image_data_format() == "channels_first":
            return []  # it puts the factors, but not the offsets, on another axis
        return [Step(Scaling(to_constant(op.scale, op.compute_dtype), to_constant(op.offset, op.compute_dtype)))]
    mean, variance = (to_array(v).astype(np.float64) for v in (op.mean, op.variance))
    spread = np.maximum(np.sqrt(variance), keras.config.epsilon())
    return [Step(Scaling(spread, mean) if op.invert else Scaling(1 / spread, -mean / spread))]


def _raw(call: Any, y: Any) -> list[Step]:
    """Return what folding must know of a keras.ops function that was called on tensors of the model."""
    op, data, tensors = call.operation, data_of(call), call.input_tensors
    name = type(op).__name__ if type(op).__module__.startswith("keras.") else ""
    if not _keeps_dtype(tensors, y):
        return []
    if name == "Concatenate" and isinstance(data, (list, tuple)) and all(map(is_tensor, data)):
        return [Step(Concat(op.axis))]
    if len(tensors) != 1:
        return []
    x = tensors[0]
    if name in ("Reshape", "Squeeze", "ExpandDims"):
        return [Step(Reshape(x.shape, y.shape))]
    if name == "Transpose":
        return [Step(Transpose(tuple(op.axes or reversed(range(len(x.shape))))))]
    if len(call.arguments.args) != 2 or x.shape != y.shape:
        return []
    first = is_tensor(data)
    constant = to_constant(call.arguments.args[first], y.dtype)
    match name, first:
        case "Multiply", _:
            scaling = Scaling(constant)
        case "Add", _:
            scaling = Scaling(None, constant)
        case "Subtract", _:
            scaling = Scaling(None, -constant) if first else Scaling(np.array(-1.0), constant)
        case ("Divide" | "TrueDivide"), True:
            scaling = Scaling(constant, divides=True)
        case _:
            return []
    return [Step(scaling)]


def _passing(op: Any, x: Any, y: Any) -> list[Step]:
    """Return how a layer that has no variables lets a map pass."""
    cls, rank = type(op), len(x.shape)
    first = getattr(op, "data_format", None) == "channels_first"
    spatial = tuple(range(2, rank)) if first else tuple(range(1, rank - 1))
    if cls in _IDENTITIES or (cls is layers.Activation and op.activation is keras.activations.linear):
        return [Step(Same())]
    if cls is layers.Concatenate:
        return [Step(Concat(op.axis))]
    if cls is layers.Permute:
        return [Step(Transpose((0, *op.dims)))]
    if cls is layers.Reshape:
        return [Step(Reshape(x.shape, y.shape))]
    if cls is layers.Flatten:
        if not first or rank < 3:
            return [Step(Reshape(x.shape, y.shape))]
        perm = (0, *range(2, rank), 1)  # Keras puts the channels last first
        moved = tuple(x.shape[axis] for axis in perm)
        return [Step(Transpose(perm), moved), Step(Reshape(moved, y.shape))]
    if cls is layers.RepeatVector:
        once = (x.shape[0], 1, x.shape[1])
        return [Step(Reshape(x.shape, once), once), Step(Pool((1,)))]
    if cls in _POOLING and getattr(op, "interpolation", "nearest") in ("nearest", "bilinear"):
        return [Step(Pool(spatial, largest=cls in _LARGEST))]
    if cls in _GLOBAL_POOLING:
        return [Step(Pool(spatial, keeps_axes=op.keepdims, largest=cls in _LARGEST))]
    return [Step(Pool(spatial, padded=True))] if cls in _ZERO_PADDING else []
