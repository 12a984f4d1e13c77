"""Functions on arrays, moments and the layer: each makes a call with good arguments of up to so many values.

What each result is held to is the oracle in reference.py (its bounds are those of the numerical contract), or, where
that has none, a law. The others are in operations_models.py.
"""

import math
from copy import deepcopy

import numpy as np
import reference
from calls import Call
from reference import U64, assert_within, over_channels
from strategies import (
    CHANNELS_FIRST,
    CHANNELS_LAST,
    DTYPES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Place,
    Problem,
    numbers,
    parameters,
)

import fastbn

# ---- drawing ------------------------------------------------------------------------------------------------------


def maybe(rng, *values):
    """Return one of the values."""
    return values[rng.integers(len(values))]


def some_shape(rng, size):
    """Draw (shape, channel axis) of at most `size` values, at least two per channel."""
    if size >= 40_000 and rng.random() < 0.3:
        usual = [case for case in CHANNELS_FIRST + CHANNELS_LAST if math.prod(case[0]) <= size]
        return usual[rng.integers(len(usual))]
    longest = maybe(rng, 4, 9, 40, 300)
    shape = [int(n) for n in rng.integers(1, longest + 1, rng.integers(2, 6))]
    while math.prod(shape) > size:
        shape[shape.index(max(shape))] = int(rng.integers(1, 10))
    axis = int(rng.integers(len(shape)))
    if math.prod(shape) == shape[axis]:
        shape[axis - 1] = 2
    return tuple(shape), int(maybe(rng, axis, axis - len(shape)))


def somewhere(rng, values, *, output=False):
    """Return an array equal to `values` that lies anywhere in memory; an output is native and writable."""
    if rng.random() < 0.4 or not values.ndim:
        return values.copy()
    place = Place(
        order=tuple(map(int, rng.permutation(values.ndim))), misaligned=rng.random() < 0.2,
        steps=tuple(int(maybe(rng, 1, 1, 1, 2, 3, -1, -2)) for _ in values.shape),
        swapped=not output and rng.random() < 0.2, readonly=not output and rng.random() < 0.2,
    )  # fmt: skip
    return place.put(values)


def some_problem(rng, size):
    """Draw a Problem whose results no dtype overflows."""
    shape, axis = some_shape(rng, size)
    dtype, kind = maybe(rng, *DTYPES), maybe(rng, "plain", "offset", "outliers", "ramp")
    values = [numbers(rng, kind, shape, axis, dtype), *rng.normal(size=(2, *shape)).astype(dtype)]
    x, residual, dy = (somewhere(rng, v) for v in values)
    gamma, beta = (somewhere(rng, parameters(rng, shape[axis], maybe(rng, *DTYPES))) for _ in range(2))
    return Problem(
        x=x, axis=axis, gamma=maybe(rng, gamma, None), beta=maybe(rng, beta, None), dy=dy, dtype=dtype, about=kind,
        eps=float(maybe(rng, 1e-3, 1.0) if dtype == FLOAT16 else maybe(rng, 1e-5, 1e-3, 1.0, 1e-10)),
        activation=maybe(rng, None, "relu"), residual=maybe(rng, residual, None), num_threads=maybe(rng, None, 1, 2, 3),
    )  # fmt: skip


def some_out(rng, shape, dtype):
    return somewhere(rng, np.zeros(shape, dtype), output=True) if rng.random() < 0.5 else None


# ---- what results are held to -------------------------------------------------------------------------------------


def seen(value):
    """Return an argument as fastbn sees it: any array, integers as float64."""
    only_dlpack = hasattr(value, "__dlpack__") and not hasattr(value, "__array__")
    array = np.from_dlpack(value) if only_dlpack else np.asarray(value)
    return array.astype(np.float64) if array.dtype.kind in "iub" else array


def ordinary(*values):
    """Say whether all numbers are finite, and of a size that no intermediate result overflows."""
    return all(
        v is None or bool(np.all(np.abs(seen(v).astype(np.float64)) < 1e9)) for v in values
    )  # NaN is not below


def hold_result(y, x, out):
    """Hold a result to shape, dtype and place."""
    assert y.shape == x.shape
    assert y.dtype == x.dtype.newbyteorder("=")
    assert out is None or y is out
    assert y.flags.writeable


def hold_y(y, expected, gamma, beta, axis, residual):
    """Hold y to the oracle's, where it is in the range that the contract speaks of."""
    bound = reference.y_bound(expected, gamma, beta, y.dtype, axis, residual=residual)
    limit = np.finfo(np.float32 if y.dtype.name == "bfloat16" else y.dtype).max
    if not np.all(np.abs(expected.y) + bound < limit / 2) or not np.all(expected.rstd < 1e12):
        return False
    assert_within(y, expected.y, bound, "y")
    return True


def hold_forward(a, y, out):
    """Hold a forward pass to the oracle; a has mean and var where they were given."""
    x, axis = seen(a["x"]), int(a["axis"])
    hold_result(y, x, out)
    given = [a["mean"], a["var"]] if "mean" in a else []
    if not x.size or not ordinary(x, a["gamma"], a["beta"], a["residual"], *given) or float(a["eps"]) < 1e-12:
        return False
    method = reference.infer if given else reference.train
    gamma, beta, residual = (None if a[key] is None else seen(a[key]) for key in ("gamma", "beta", "residual"))
    options = {"axis": axis, "eps": float(a["eps"]), "activation": a["activation"], "residual": residual}
    return hold_y(y, method(x, *map(seen, given), gamma, beta, **options), gamma, beta, axis, residual)


def hold_backward(a, gradients, p, y, passes=None):
    """Hold gradients to the oracle, for a Problem whose forward pass gave y."""
    dy, x = seen(a["dy"]), seen(p.x)
    hold_result(gradients[0], x, a["out"])
    if not ordinary(dy):
        return False
    expected = reference.train(x, p.gamma, p.beta, **p.options)
    passes = True if p.activation is None else ~(y <= 0)
    theirs = reference.backward(dy, x, p.gamma, axis=p.axis, eps=p.eps, passes=passes)
    parameter_dtype = gradients[1].dtype if len(gradients) > 1 else FLOAT64
    bound = reference.backward_bound(theirs, expected, p.gamma, p.dtype, p.axis, parameter_dtype)
    if p.dtype == FLOAT16 and not np.all(np.abs(theirs.dx) + bound.dx < 6e4):
        return False
    for name, actual in zip(("dx", "dgamma", "dbeta"), gradients, strict=False):
        assert_within(actual, getattr(theirs, name), getattr(bound, name), name)
    if p.residual is not None and len(gradients) == 4:
        assert np.array_equal(gradients[3], np.where(passes, dy, 0))
    return True


def hold_moments(m, x, axis):
    """Hold moments to the oracle's, to as many roundings as there are values (a shift may cost a few bits more)."""
    x = seen(x)
    assert m.mean.dtype == m.m2.dtype == np.float64
    assert m.mean.shape == m.m2.shape == (x.shape[axis],)
    if not x.size or not ordinary(x):
        return False
    mean, var, centred = reference.moments(x, axis)
    n, size = x.size // len(mean), over_channels(np.max, np.abs(reference.wide(x)), axis)
    assert m.count == n
    u = 2 * (n + 8) * U64 * (1 + 2 ** (4 if x.dtype == FLOAT64 else 16))
    assert_within(m.mean, mean, u * size, "mean")
    assert_within(m.m2, n * var, u * (n * var + size * over_channels(np.sum, np.abs(centred), axis)), "m2")
    return True


# ---- functions on arrays ------------------------------------------------------------------------------------------

OPERATIONS = {}  # name: (generator, most values) -> Call


def operation(function):
    """Register what makes calls of an operation."""
    OPERATIONS[function.__name__] = function
    return function


def arguments_of(p, *names):
    return {name: getattr(p, name) for name in names}


FORWARD = ("x", "gamma", "beta", "axis", "eps", "activation", "residual", "num_threads")


def near(p):
    """Return the arrays of a Problem, for odd arguments that overlap them."""
    return [a for a in (p.x, p.dy, p.gamma, p.residual) if a is not None]


@operation
def batch_norm_train(rng, size):
    p = some_problem(rng, size)
    args = arguments_of(p, *FORWARD) | {"out": some_out(rng, p.x.shape, p.dtype)}

    def holds(a, result):
        y, saved = result
        assert saved.mean.shape == saved.var.shape == saved.rstd.shape == (y.shape[int(a["axis"])],)
        return hold_forward(a, y, call.args["out"])

    call = Call(fastbn.batch_norm_train, args, holds, writes=("out",), near=near(p))
    return call


@operation
def batch_norm_infer(rng, size):
    p = some_problem(rng, size)
    mean, var, _ = reference.moments(p.x, p.axis)
    given = {"mean": mean.astype(np.float64), "var": (var + 1).astype(np.float64) * rng.uniform(0.1, 10)}
    args = arguments_of(p, *FORWARD) | given | {"out": some_out(rng, p.x.shape, p.dtype)}

    def holds(a, y):
        return hold_forward(a, y, call.args["out"])

    call = Call(fastbn.batch_norm_infer, args, holds, ("out",), near=near(p))
    return call


@operation
def batch_norm_backward(rng, size):
    p = some_problem(rng, size)
    y, saved = fastbn.batch_norm_train(p.x, p.gamma, p.beta, **p.options)
    was = deepcopy(p)  # of an x that was copied, `out` may be the memory
    args = {"dy": p.dy, "saved": saved, "out": some_out(rng, p.x.shape, p.dtype), "num_threads": p.num_threads}

    def holds(a, gradients):
        return hold_backward({**a, "out": call.args["out"]}, gradients, was, y)

    call = Call(fastbn.batch_norm_backward, args, holds, ("out",), near=near(p))
    return call


@operation
def moments_of(rng, size):
    p = some_problem(rng, size)
    args = arguments_of(p, "x", "axis", "num_threads")
    return Call(fastbn.Moments.of, args, lambda a, m: hold_moments(m, a["x"], int(a["axis"])), near=near(p))


def channel_rows(x, axis):
    """Return x with one row for each channel, in native byte order."""
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(x.dtype.newbyteorder("="))


@operation
def moments_update(rng, size):
    p = some_problem(rng, size)
    m = fastbn.Moments.of(p.x, p.axis)

    def holds(a, result):
        assert result is m
        if seen(a["x"]).dtype != p.dtype:
            return False
        return hold_moments(m, np.concatenate([channel_rows(v, p.axis) for v in (p.x, seen(a["x"]))], 1), 0)

    return Call(m.update, {"x": p.dy}, holds, state=m, names=("axis", "other"), near=near(p))


@operation
def moments_merge(rng, size):
    c = int(rng.integers(1, 9))
    x, other = rng.normal(5, 2, (2, int(rng.integers(2, 40)), c))
    m, before = maybe(rng, (fastbn.Moments(c), other[:0]), (fastbn.Moments.of(x), x))

    def holds(a, result):
        assert result is m
        assert not np.shares_memory(m.mean, a["other"].mean)
        return hold_moments(m, np.concatenate([before, other]), 1)

    return Call(m.merge, {"other": fastbn.Moments.of(other)}, holds, state=m)


@operation
def moments_new(rng, size):
    def holds(a, m):
        assert m.count == 0
        assert not m.mean.any()
        return True

    return Call(fastbn.Moments, {"num_features": int(rng.integers(0, 9)), "axis": int(rng.integers(-3, 3))}, holds)


@operation
def moments_var(rng, size):
    m = fastbn.Moments.of(rng.normal(size=(9, 3)))

    def holds(a, var):
        assert_within(var, m.m2 / (9 - float(a["correction"])), U64 * var)
        return True

    return Call(m.var, {"correction": int(rng.integers(2))}, holds, state=m)


@operation
def moments_from_dict(rng, size):
    given = fastbn.Moments.of(rng.normal(size=(9, 3))).to_dict()

    def holds(a, m):
        assert m.mean.shape == m.m2.shape
        again = m.to_dict()
        assert all(np.array_equal(again[key], seen(a["d"][key]), equal_nan=True) for key in ("mean", "m2"))
        return True

    return Call(fastbn.Moments.from_dict, {"d": given}, holds, names=("count", "mean", "m2", "axis", "num_features"))


# ---- the layer ----------------------------------------------------------------------------------------------------

LAYER_WORDS = ("gamma", "beta", "mean", "var", "eps", "momentum", "weight", "bias", "running_mean", "running_var",
               "num_batches_tracked", "num_features", "axis")  # fmt: skip


def some_layer(rng, c, **options):
    """Return a BatchNorm with parameters and statistics that are nothing special."""
    bn = fastbn.BatchNorm(
        c, momentum=maybe(rng, 0.1, 1.0, None), affine=rng.random() < 0.8, unbiased=rng.random() < 0.5,
        dtype=maybe(rng, np.float32, np.float64), **options,
    )  # fmt: skip
    if bn.affine:
        bn.gamma[...], bn.beta[...] = rng.normal(size=(2, c))
    bn.running_mean[...], bn.running_var[...] = rng.normal(size=c), rng.uniform(0.5, 2, c)
    return bn.train(rng.random() < 0.5)


@operation
def layer_new(rng, size):
    args = {
        "num_features": int(rng.integers(1, 9)), "axis": int(rng.integers(-3, 3)), "eps": 1e-3,
        "momentum": maybe(rng, 0.5, None), "affine": maybe(rng, True, False),
        "track_running_stats": maybe(rng, True, False), "unbiased": maybe(rng, True, False),
        "activation": maybe(rng, None, "relu"), "dtype": maybe(rng, *DTYPES),
    }  # fmt: skip

    def holds(a, bn):
        assert (bn.gamma is None) == (not a["affine"])
        assert bn.dtype in (FLOAT32, FLOAT64)
        assert bn.num_features == a["num_features"]
        return True

    return Call(fastbn.BatchNorm, args, holds)


@operation
def layer_call(rng, size):
    p = some_problem(rng, size)
    bn = some_layer(rng, p.channels, axis=p.axis, eps=p.eps, activation=p.activation)
    args = {"x": p.x, "residual": p.residual, "out": some_out(rng, p.x.shape, p.dtype), "num_threads": p.num_threads}
    mean, var = bn.running_mean.astype(np.float64), bn.running_var.astype(np.float64)

    def holds(a, y):
        given = {"gamma": bn.gamma, "beta": bn.beta, "axis": bn.axis, "eps": bn.eps, "activation": bn.activation}
        if not bn.training:
            assert np.array_equal(bn.running_mean, mean)
            return hold_forward(a | given | {"mean": mean, "var": var}, y, call.args["out"])
        if not hold_forward(a | given, y, call.args["out"]):
            return False
        x = seen(a["x"])
        batch_mean, batch_var, _ = reference.moments(x, bn.axis)
        n = x.size // len(mean)
        w = 1.0 if bn.momentum is None else bn.momentum
        batch_var = batch_var * (n / (n - 1) if bn.unbiased else 1)
        new = [(1 - w) * old + w * batch for old, batch in ((mean, batch_mean), (var, batch_var))]
        size = w * reference.unit(x.dtype) * over_channels(np.max, np.abs(reference.wide(x)), bn.axis)
        u = 16 * max(reference.unit(x.dtype), reference.unit(bn.dtype))
        assert_within(bn.running_mean, new[0], u * np.abs(new[0]) + 32 * size + u * np.sqrt(batch_var), "running_mean")
        of_batch = reference.var64_bound(batch_mean, batch_var) if x.dtype == FLOAT64 else 0
        assert_within(bn.running_var, new[1], u * np.abs(new[1]) + w * of_batch, "running_var")
        return True

    call = Call(bn, args, holds, ("out",), bn, LAYER_WORDS, near(p))
    return call


@operation
def layer_backward(rng, size):
    p = some_problem(rng, size)
    bn = some_layer(rng, p.channels, axis=p.axis, eps=p.eps, activation=p.activation).train()
    y = bn(p.x, residual=p.residual)
    p.gamma, p.beta = bn.gamma, bn.beta
    was = deepcopy(p)

    def holds(a, dx):
        gradients = (bn.grad_gamma, bn.grad_beta) if bn.affine else ()
        asked = hold_backward(a | {"out": call.args["out"]}, (dx, *gradients), was, y)
        assert (bn.grad_residual is None) == (p.residual is None)
        return asked

    args = {"dy": p.dy, "out": some_out(rng, p.x.shape, p.dtype), "num_threads": p.num_threads}
    call = Call(bn.backward, args, holds, ("out",), bn, ("saved",), near(p))
    return call


@operation
def layer_load_state_dict(rng, size):
    c = int(rng.integers(1, 9))
    bn = some_layer(rng, c)
    state = {key: np.asarray(value + maybe(rng, 0, 1)) for key, value in bn.state_dict().items()}

    def holds(a, result):
        for key, now in bn.state_dict().items():
            given = np.ravel(seen(a["state_dict"][key]))
            assert np.array_equal(now.ravel(), given.astype(now.dtype), equal_nan=True)
        return True

    return Call(bn.load_state_dict, {"state_dict": state}, holds, state=bn, names=LAYER_WORDS)


@operation
def layer_recalibrate(rng, size):
    c = int(rng.integers(1, 9))
    bn = some_layer(rng, c)
    batches = [rng.normal(3, 2, (int(n), c)) for n in rng.integers(2, 30, 3)]

    def holds(a, result):
        if a["method"] != "pooled" or not (isinstance(a["batches"], list) and a["batches"] and ordinary(*a["batches"])):
            return False
        x = np.concatenate([channel_rows(seen(batch), 1) for batch in a["batches"]], 1).T
        if not len(x):
            return False
        mean, var, _ = reference.moments(x)
        n = len(x) - 1 if bn.unbiased else len(x)
        u = 64 * (reference.unit(bn.dtype) + len(x) * U64)
        assert_within(bn.running_mean, mean, u * (np.abs(mean) + np.sqrt(var) + over_channels(np.max, np.abs(x), 1)))
        assert_within(bn.running_var, var * len(x) / n, u * var * len(x) + 1e-9)
        return True

    args = {"batches": batches, "method": maybe(rng, "pooled", "paper")}
    return Call(bn.recalibrate, args, holds, state=bn, names=("x", "axis"))
