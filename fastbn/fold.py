"""Fold a trained BatchNorm into the linear layer or the convolution beside it.

At inference y = scale·x + shift per channel, scale = gamma/sqrt(var + eps), shift = beta - scale·mean
(Ioffe & Szegedy 2015, Algorithm 2, line 11), and an affine map disappears into its neighbour:

    fold_linear, fold_conv              layer, then BN   W' = scale·W on the output axis, b' = scale·b + shift
    fold_into_linear, fold_into_conv    BN, then layer   W' = W·scale on the input axis,  b' = b + Σ W·shift

Every weight layout is seen as one canonical view (groups, out/groups, in/groups, *spatial); the arithmetic
knows only that view. It runs once per model, in NumPy, on pairs of float64 (hi, lo) whose unevaluated sum has
about 106 bits: a result is rounded once, whatever cancels on the way; shapes alone fix the order of a sum.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any, NamedTuple

import numpy as np

from ._core import check
from .affine import EXACT, SIGNIFICAND_BITS, Affine, as_array, as_values, check_finite, floating

__all__ = [
    "FoldReport",
    "Folded",
    "fold_conv",
    "fold_into_conv",
    "fold_into_linear",
    "fold_linear",
]

_BLOCK = 1 << 16  # weights folded at a time: the float64 temporaries stay in L2 however large the layer


class FoldReport(NamedTuple):
    """Say what a fold did to the weights.

    max_relative_change is the largest |w' - w|/|w| over the nonzero weights w, w' as returned (0 if all are
    zero); max_scale and min_scale are the extremes of |scale| over BN's channels, their ratio the condition
    of the scales; zero_gamma and negative_gamma hold the indices of the channels where gamma = 0, gamma < 0.
    """

    max_relative_change: float
    max_scale: float
    min_scale: float
    zero_gamma: tuple[int, ...]
    negative_gamma: tuple[int, ...]


class Folded(NamedTuple):
    """Hold a folded layer: new arrays weight and bias, a FoldReport, pad_value (`fold_into_conv` only)."""

    weight: np.ndarray
    bias: np.ndarray
    report: FoldReport
    pad_value: np.ndarray | None = None


def fold_linear(weight: Any, bias: Any, bn: Any, *, layout: str | None = "OI") -> Folded:
    """Fold the BatchNorm that follows a linear layer into it: f(x) = bn(W·x + b).

    W'[o, i] = scale[o]·W[o, i],  b' = scale·b + shift (Ioffe & Szegedy 2015, Algorithm 2, line 11).

    Parameters
    ----------
    weight : array_like of shape (out, in), or (in, out) for "IO"; float16/32/64, bfloat16 or integers
    bias : array_like of shape (out,), or None
    bn : BatchNormParams, or an object with gamma, beta, running_mean, running_var and eps (a BatchNorm)
        Over the layer's outputs: the last axis, where x has more than 2.
    layout : {"OI", "IO"} or None
        One letter per axis of `weight`, O output, I input. PyTorch's, or None, is "OI"; Keras's is "IO".

    Returns
    -------
    Folded
        `weight` in its own layout and `bias` of shape (out,), C-contiguous, in weight's dtype (float64 for
        integers) and native byte order.

    Raises
    ------
    ValueError
        A shape, layout or number of channels does not fit; mean or var is None; a value is not finite;
        var + eps is not positive; a result exceeds the dtype; `bn` has an activation (no weight holds it).
    TypeError
        An array does not hold real numbers (complex, object, strings, booleans), or `bn` is no BatchNorm.

    Notes
    -----
    Accuracy, for all fold_*: a weight is its exact product, rounded once to the dtype, so within half an ulp
    (float64 below 1e-290: one). So is a bias, give or take 2**-98 of the sum of its terms' magnitudes. What
    is too small for the dtype becomes subnormal or zero. The bits are the same on every machine.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNormParams([1.0, -2.0], [0.0, 1.0], mean=[1.0, 0.0], var=[4.0, 1.0], eps=0.0)
    >>> f = fastbn.fold_linear([[2.0, 4.0], [1.0, 3.0]], [5.0, 0.0], bn)
    >>> f.weight.tolist(), f.bias.tolist(), f.report.negative_gamma
    ([[1.0, 2.0], [-2.0, -6.0]], [2.0, 1.0], (1,))
    """
    weight = as_array("weight", weight)
    return _fold(weight, bias, bn, _linear_layout(layout, weight), bn_last=True)


def fold_conv(
    weight: Any, bias: Any, bn: Any, *, groups: int = 1, transposed: bool = False, layout: str | None = None
) -> Folded:
    """Fold the BatchNorm that follows a convolution into it: f(x) = bn(conv(x)), with any stride and padding.

    W'[o, i, k] = scale[o]·W[o, i, k],  b' = scale·b + shift (Ioffe & Szegedy 2015, Algorithm 2, line 11).

    Parameters
    ----------
    weight : array_like of 3 to 5 axes (1-d to 3-d), float16/32/64, bfloat16 or integers
        (out, in/groups, *kernel), transposed (in, out/groups, *kernel); any other order by `layout`.
    bias : array_like of shape (C_out,), or None
    bn : BatchNormParams or BatchNorm of C_out channels, as in `fold_linear`
    groups : int
        Output channel g·(out/groups) + j is the j-th of group g.
    transposed : bool
        A transposed convolution: axis O holds the outputs of one group, I the inputs of all, as in PyTorch.
    layout : str or None
        One letter per axis of `weight`: O output, I input, M depthwise multiplier, anything else spatial.
        PyTorch's, or None, are "OIHW" and, transposed, "IOHW"; Keras's are "HWIO", "HWOI" (Conv2DTranspose)
        and "HWIM" (DepthwiseConv2D: output channel i·M + m, groups 1 or I).

    Returns
    -------
    Folded
        As from `fold_linear`, `bias` of shape (C_out,).

    Raises
    ------
    ValueError, TypeError
        As `fold_linear`, and where `groups` does not divide the channels.

    Notes
    -----
    Accuracy as in `fold_linear`.

    Examples
    --------
    >>> import fastbn, numpy as np
    >>> bn = fastbn.BatchNormParams(None, beta=[0.0, 8.0], mean=[0.0, 0.0], var=[4.0, 16.0], eps=0.0)
    >>> f = fastbn.fold_conv(np.ones((3, 1, 2), np.float32), None, bn, layout="WIO")
    >>> f.weight.tolist(), f.bias.tolist()
    ([[[0.5, 0.25]], [[0.5, 0.25]], [[0.5, 0.25]]], [0.0, 8.0])
    """
    weight = as_array("weight", weight)
    if not isinstance(transposed, (bool, np.bool_)):
        raise TypeError(f"transposed: expected True or False, got {transposed!r}")
    layout = _conv_layout(layout, weight, transposed)
    return _fold(weight, bias, bn, layout, bn_last=True, groups=groups, transposed=transposed)


def fold_into_linear(
    bn: Any, weight: Any, bias: Any, *, layout: str | None = "OI", repeat: int = 1
) -> Folded:
    """Fold the BatchNorm that precedes a linear layer into it: f(x) = W·bn(x) + b.

    W'[o, i] = W[o, i]·scale[c],  b'[o] = b[o] + Σ_i W[o, i]·shift[c],  channel c = i // repeat.
    Standardised inputs are a BatchNorm too: BatchNormParams(None, None, mean, std**2, eps=0).

    Parameters
    ----------
    bn : BatchNormParams or BatchNorm of in/repeat channels, as in `fold_linear`
    weight, bias, layout
        As in `fold_linear`.
    repeat : int
        Consecutive inputs that share a channel: H·W where a flatten of (C, H, W) stands between the two.

    Returns
    -------
    Folded
        As from `fold_linear`.

    Raises
    ------
    ValueError, TypeError
        As `fold_linear`, and where `repeat` does not divide the inputs.

    Notes
    -----
    Ioffe & Szegedy 2015, Algorithm 2, line 11, gives scale and shift. Accuracy as in `fold_linear`.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNormParams([2.0, 1.0], [1.0, 0.0], mean=[0.0, 3.0], var=[1.0, 1.0], eps=0.0)
    >>> f = fastbn.fold_into_linear(bn, [[1.0, 10.0]], [0.5])
    >>> f.weight.tolist(), f.bias.tolist()
    ([[2.0, 10.0]], [-28.5])
    """
    weight = as_array("weight", weight)
    layout, repeat = _linear_layout(layout, weight), check.count("repeat", repeat)
    if (n := weight.shape[layout.index("I")]) % repeat:
        raise ValueError(f"repeat: expected a divisor of the {n} inputs of weight, got {repeat}")
    return _fold(weight, bias, bn, layout, bn_last=False, repeat=repeat)


def fold_into_conv(
    bn: Any, weight: Any, bias: Any, *, groups: int = 1, padding: Any = 0, layout: str | None = None
) -> Folded:
    """Fold the BatchNorm that precedes a convolution into it, with the value that must then pad its input.

    W'[o, i, k] = W[o, i, k]·scale[i],  b'[o] = b[o] + Σ_i Σ_k W[o, i, k]·shift[i],  i in the group of o.
    Zero padding stood behind BN; now it would stand before it. Only the input that BN maps to 0, pad_value =
    -shift/scale, keeps f(x) = conv(bn(x)) at the border: pad x with it, then convolve without padding.

    Parameters
    ----------
    bn : BatchNormParams or BatchNorm of C_in channels, as in `fold_linear`
    weight, bias, groups, layout
        As in `fold_conv`. A transposed convolution has no place here: the number of kernel taps that reach an
        output varies, so that no bias can hold Σ W·shift.
    padding : int, tuple, "valid" or "same"
        The convolution's zero padding: one for all spatial axes, one or a pair (before, after) per axis.

    Returns
    -------
    Folded
        As from `fold_linear`; `pad_value` is float64 of shape (C_in,), or None where `padding` is 0.

    Raises
    ------
    ValueError, TypeError
        As `fold_conv`; and where there is padding and a channel has scale 0, shift not 0: nothing maps to 0.

    Notes
    -----
    Ioffe & Szegedy 2015, Algorithm 2, line 11, gives scale and shift. Accuracy as in `fold_linear`; pad_value
    is correctly rounded, and 0 where scale and shift both are.

    Examples
    --------
    >>> import fastbn
    >>> bn = fastbn.BatchNormParams(gamma=[2.0], beta=[1.0], mean=[3.0], var=[1.0], eps=0.0)
    >>> f = fastbn.fold_into_conv(bn, [[[1.0, 1.0, 1.0]]], None, padding=1)
    >>> f.weight.tolist(), f.bias.tolist(), f.pad_value.tolist()
    ([[[2.0, 2.0, 2.0]]], [-15.0], [2.5])
    """
    weight = as_array("weight", weight)
    layout = _conv_layout(layout, weight)
    return _fold(weight, bias, bn, layout, bn_last=False, groups=groups, padding=padding)


# The one fold behind all four ------------------------------------------------------------------------------


def _fold(weight, bias, bn, layout, *, bn_last, groups=1, transposed=False, repeat=1, padding=0):
    """Scale `weight` along BN's channels and move `bias`: the formulas at the head of this file."""
    groups = _check_groups(groups, weight, layout, transposed)
    dtype = floating(weight.dtype)
    folded = np.empty(weight.shape, dtype)
    old, new = (_canonical(w, layout, groups, transposed, repeat) for w in (weight, folded))  # both are views
    n_groups, n_out, n_in = old.shape[:3]
    output_channel = np.arange(n_groups * n_out).reshape(n_groups, n_out)
    bias = np.zeros(output_channel.size) if bias is None else as_values("bias", bias, (output_channel.size,))
    padded = _is_padded(padding, old.shape[3:])

    if (activation := getattr(bn, "activation", None)) is not None:
        raise ValueError(
            f"bn: expected no activation, got {activation!r}, which no weight can hold; its affine part is "
            "BatchNormParams(bn.gamma, bn.beta, bn.running_mean, bn.running_var, bn.eps)"
        )
    of = f": one value per {'output' if bn_last else 'input'} channel of weight, whose layout is {layout!r}"
    channels = n_groups * (n_out if bn_last else n_in)
    affine = bn if isinstance(bn, Affine) else Affine.of(bn, channels, of)
    if len(affine) != channels:
        raise ValueError(f"bn: expected {channels} channels, got {len(affine)}{of}")
    scale, shift = affine.scale, affine.shift
    zero = tuple(c for c, s in enumerate(scale) if s == 0)  # as gamma is: 60 digits do not underflow
    negative = tuple(c for c, s in enumerate(scale) if s < 0)
    pad_value = _pad_value(scale, shift) if padded else None
    per_channel = (2, n_groups, n_out, 1) if bn_last else (2, n_groups, 1, n_in)
    per_channel += (1,) * (old.ndim - 3)
    scale, shift = _pair("scale", scale).reshape(per_channel), _pair("shift", shift).reshape(per_channel)

    change, sums = 0.0, np.zeros((2, n_groups, n_out))
    with np.errstate(all="ignore"):  # overflow is looked for in the results, whatever the caller's np.seterr
        for block in _blocks(old.shape):
            parts = (slice(None), *block)  # of a pair
            here = parts if bn_last else parts[:2]
            w, channel = old[block].astype(np.float64, order="C"), output_channel[block]
            check_finite("weight", w, channel, "finite values", "output channel")
            new[block] = _round("weight", _multiply(w, scale[here]), dtype, channel)
            if not bn_last:
                sums[parts] = _sum(_multiply(w, shift[here]), channel.shape)
            moved, size = np.abs(new[block].astype(np.float64) - w), np.abs(w)
            change = max(change, float((moved[size > 0] / size[size > 0]).max(initial=0)))

        if bn_last:
            total = _add(_multiply(bias, scale.reshape(2, -1)), shift.reshape(2, -1))
        else:
            total = _add((bias, np.zeros_like(bias)), sums.reshape(2, -1))
        new_bias = _round("bias", total, dtype, output_channel.reshape(-1))

    sizes = np.abs(scale[0])
    report = FoldReport(change, float(sizes.max()), float(sizes.min()), zero, negative)
    return Folded(folded, new_bias, report, pad_value)


def _canonical(weight, layout, groups, transposed, repeat):
    """View `weight` as (groups, out/groups, in/groups, *spatial): moving and splitting axes never copies."""
    spatial = [axis for axis, letter in enumerate(layout) if letter not in "OIM"]
    out_axis = layout.index("M" if "M" in layout else "O")
    weight = weight.transpose(out_axis, layout.index("I"), *spatial)
    n_out, n_in, *kernel = weight.shape
    if "M" in layout:  # each input channel is a group of its own, with M outputs
        return weight.swapaxes(0, 1)[:, :, np.newaxis]
    if transposed:
        return np.moveaxis(weight.reshape(n_out, groups, n_in // groups, *kernel), 1, 0)
    if repeat > 1:  # what a flatten left of the spatial axes
        kernel = [repeat]
    return weight.reshape(groups, n_out // groups, n_in // repeat, *kernel)


def _blocks(shape):
    """Cut (groups, out/groups) into blocks of about _BLOCK weights."""
    n_groups, n_out = shape[:2]
    outs = max(1, _BLOCK // int(np.prod(shape[2:])))
    groups = max(1, outs // n_out)
    for g in range(0, n_groups, groups):
        for o in range(0, n_out, outs):
            yield slice(g, g + groups), slice(o, o + outs)


def _pad_value(scale, shift):
    """Return -shift/scale, the input that BN maps to zero, as float64 of shape (C,)."""
    exact = []
    with localcontext(EXACT):
        for channel, (s, t) in enumerate(zip(scale, shift, strict=True)):
            if s == 0 and t != 0:
                raise ValueError(
                    f"padding: expected 0 where BN maps nothing to 0, got padding with scale 0 and shift "
                    f"{float(t)} in channel {channel}"
                )
            exact.append(-t / s if t else t)
    return _pair("pad value", exact)[0] + 0.0  # no negative zeros


# Arithmetic on pairs (hi, lo) of float64 arrays, hi the sum rounded (Dekker 1971; Knuth, TAOCP 2, 4.2.2)


def _pair(name, exact):
    hi = np.array([float(x) for x in exact])
    check_finite("bn", hi, np.arange(len(hi)), f"a {name} that float64 can hold")
    with localcontext(EXACT):
        return np.stack([hi, [float(x - Decimal(h)) for x, h in zip(exact, hi.tolist(), strict=True)]])


def _renormalise(hi, lo):
    total = hi + lo
    return total, lo - (total - hi)


def _add(a, b):
    total = a[0] + b[0]
    part = total - a[0]
    error = (a[0] - (total - part)) + (b[0] - part)
    return _renormalise(total, error + (a[1] + b[1]))


def _multiply(x, pair):
    """Return x·(hi + lo), x a plain array; four half products give the rounding error of x·hi exactly."""
    hi, lo = pair
    product = x * hi
    (x1, x2), (h1, h2) = _split(x), _split(hi)
    error = ((x1 * h1 - product) + x1 * h2 + x2 * h1) + x2 * h2
    return _renormalise(product, error + x * lo)


def _split(x):
    """Cut x into a head of 26 bits and the exact rest; by a mask, for Veltkamp's product can overflow."""
    head = (x.view(np.uint64) & ~np.uint64((1 << 27) - 1)).view(np.float64)
    return head, x - head


def _sum(pair, shape):
    """Sum `pair` over the axes beyond those of `shape`: half onto half, until one term is left."""
    hi, lo = (part.reshape(*shape, -1) for part in pair)
    while (n := hi.shape[-1]) > 1:
        half = n // 2
        first, second, rest = slice(half), slice(half, 2 * half), slice(2 * half, n)
        a, b = _add((hi[..., first], lo[..., first]), (hi[..., second], lo[..., second]))
        hi, lo = np.concatenate([a, hi[..., rest]], -1), np.concatenate([b, lo[..., rest]], -1)
    return hi[..., 0], lo[..., 0]


def _round(name, pair, dtype, channel):
    """Round hi + lo to `dtype`, once; refuse what it cannot hold."""
    hi, lo = pair
    rounded = cast(hi, lo, dtype)
    got = np.where(np.isnan(hi), np.inf, hi)  # where x·hi overflows, its error is nan
    check_finite(name, rounded, channel, f"values that {dtype.name} can hold", "output channel", got)
    return rounded


def cast(hi, lo, dtype):
    """Round hi + lo to `dtype`, once."""
    if dtype == np.float64:
        return hi
    # Casting hi would round a second time, and ml_dtypes reaches bfloat16 through float32, a third time.
    # So cut to three bits more than the dtype has, the last set if anything was cut (round to odd): any
    # rounding to nearest after that goes as it would from the exact sum (Boldo & Melquiond 2008).
    bits = hi.view(np.int64) - ((lo != 0) & (np.signbit(lo) != np.signbit(hi)))  # towards zero
    unit = np.int64(1 << (53 - 3 - SIGNIFICAND_BITS[dtype.name]))
    cut = (lo != 0) | ((bits & (unit - 1)) != 0)
    with np.errstate(over="ignore"):
        return (bits & -unit | cut * unit).view(np.float64).astype(dtype)


# What may come in ------------------------------------------------------------------------------------------


def _linear_layout(layout, weight):
    if weight.ndim != 2 or not weight.size:
        raise ValueError(f"weight: expected 2 axes, none empty, got shape {weight.shape}")
    return _check_layout("OI" if layout is None else layout, weight, ["IO"])


def _conv_layout(layout, weight, transposed=False):
    if not 3 <= weight.ndim <= 5 or not weight.size:
        raise ValueError(f"weight: expected 3 to 5 axes, none empty, got shape {weight.shape}")
    pytorch = ("IO" if transposed else "OI") + "DHW"[5 - weight.ndim :]
    return _check_layout(pytorch if layout is None else layout, weight, ["IO", "IM"])


def _check_layout(layout, weight, channel_axes):
    if not isinstance(layout, str):
        raise TypeError(f"layout: expected a string or None, got {layout!r}")
    if len(layout) != weight.ndim or len(set(layout)) != len(layout):
        raise ValueError(f"layout: expected {weight.ndim} different letters, got {layout!r}")
    if "".join(sorted(letter for letter in layout if letter in "OIM")) not in channel_axes:
        raise ValueError(f"layout: expected the letters {' or '.join(channel_axes)} in it, got {layout!r}")
    return layout


def _check_groups(groups, weight, layout, transposed):
    groups, size = check.count("groups", groups), dict(zip(layout, weight.shape, strict=True))
    if "M" in layout:
        if groups not in (1, size["I"]):
            raise ValueError(f"groups: expected 1 or the {size['I']} channels of {layout!r}, got {groups}")
    elif (n := size["I" if transposed else "O"]) % groups:
        kind = "input" if transposed else "output"
        raise ValueError(f"groups: expected a divisor of the {n} {kind} channels of weight, got {groups}")
    return groups


def _is_padded(padding, kernel):
    n = len(kernel)
    expected = f"padding: expected an int, {n} ints or pairs >= 0, 'valid' or 'same', got {padding!r}"
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(expected)
        return padding == "same" and any(k > 1 for k in kernel)
    try:
        array = np.asarray(padding)
    except ValueError as error:
        raise ValueError(expected) from error
    except Exception as error:  # whatever an __array__ of others raises
        raise TypeError(expected) from error
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(expected)
    if array.shape not in ((), (n,), (n, 2)) or (array < 0).any():
        raise ValueError(expected)
    return bool(array.any())
