"""The float64 oracle of the layers that BatchNorm folds into: dense, convolution, transposed convolution.

Each function is its formula, summed over one pair of channels and one kernel tap at a time, for any number of
spatial axes. Data are channels-first, (N, C, *spatial). `layout` names the weight's axes, one letter each:
O output, I input, M depthwise multiplier, anything else spatial; None is PyTorch's order.
"""

import itertools

import numpy as np


def dense(x, weight, bias=None, *, layout="OI"):
    """Return y[n, o] = b[o] + Σ_i W[o, i] x[n, i]."""
    pairs = list(channel_pairs(np.asarray(weight, np.float64), layout))
    y = np.zeros((len(x), 1 + max(o for o, _, _ in pairs)))
    for o, i, w in pairs:
        y[:, o] += w * np.asarray(x, np.float64)[:, i]
    return y if bias is None else y + np.asarray(bias, np.float64)


def conv(x, weight, bias=None, *, layout=None, groups=1, stride=1, dilation=1, padding=0, pad_value=0.0):
    """Return y[n, o, p] = b[o] + Σ_i Σ_k W[o, i, k] x[n, i, stride·p + dilation·k - padding].

    i runs over the group of o. Beside the input, x is `pad_value`: one number, or one per input channel.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    n, c_in, *size = x.shape
    around = np.empty((n, c_in, *(s + 2 * padding for s in size)))
    around[...] = np.broadcast_to(pad_value, (c_in,)).astype(np.float64).reshape(c_in, *(1 for _ in size))
    around[(..., *(slice(padding, padding + s) for s in size))] = x

    pairs = list(channel_pairs(weight, layout or "OI" + "DHW"[-len(size) :], groups))
    reach = [dilation * (k - 1) + 1 for k in pairs[0][2].shape]
    places = [(s - r) // stride + 1 for s, r in zip(around.shape[2:], reach, strict=True)]
    y = np.zeros((n, 1 + max(o for o, _, _ in pairs), *places))
    for o, i, w in pairs:
        for k in np.ndindex(*w.shape):
            y[:, o] += w[k] * around[(slice(None), i, *seen(k, places, stride, dilation))]
    return y if bias is None else y + np.asarray(bias, np.float64).reshape(-1, *(1 for _ in size))


def conv_transpose(x, weight, bias=None, *, layout=None, groups=1, stride=1, dilation=1, padding=0):
    """Return y[n, o, stride·p + dilation·k - padding] = b[o] + Σ W[o, i, k] x[n, i, p]."""
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    n, _, *size = x.shape
    pairs = list(channel_pairs(weight, layout or "IO" + "DHW"[-len(size) :], groups, transposed=True))
    places = [(s - 1) * stride + dilation * (k - 1) + 1 for s, k in zip(size, pairs[0][2].shape, strict=True)]
    y = np.zeros((n, 1 + max(o for o, _, _ in pairs), *places))
    for o, i, w in pairs:
        for k in np.ndindex(*w.shape):
            y[(slice(None), o, *seen(k, size, stride, dilation))] += w[k] * x[:, i]
    y = y[(..., *(slice(padding, p - padding) for p in places))]
    return y if bias is None else y + np.asarray(bias, np.float64).reshape(-1, *(1 for _ in size))


def channel_pairs(weight, layout, groups=1, transposed=False):
    """Yield (o, i, W[o, i]) for every output channel o and input channel i that are connected.

    Axis I counts the inputs of one group and O all outputs; transposed, I all inputs and O one group's.
    """
    size = dict(zip(layout, weight.shape, strict=True))

    def kernel(**at):
        return weight[tuple(at.get(letter, slice(None)) for letter in layout)]

    if "M" in layout:
        for i, m in itertools.product(range(size["I"]), range(size["M"])):
            yield i * size["M"] + m, i, kernel(I=i, M=m)
        return
    ins, outs = size["I"] // (groups if transposed else 1), size["O"] // (1 if transposed else groups)
    for g, o, i in itertools.product(range(groups), range(outs), range(ins)):
        if transposed:
            yield g * outs + o, g * ins + i, kernel(O=o, I=g * ins + i)
        else:
            yield g * outs + o, g * ins + i, kernel(O=g * outs + o, I=i)


def seen(k, places, stride, dilation):
    """Return the slices stride·p + dilation·k for p = 0, 1, ..., places - 1."""
    first = [dilation * t for t in k]
    return [slice(f, f + stride * (p - 1) + 1, stride) for f, p in zip(first, places, strict=True)]
