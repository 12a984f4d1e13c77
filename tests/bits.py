"""Digests of a fixed grid of calls: the same lines on every machine, with any compiler and number of threads.

tests/bits.txt holds them and test_bits.py compares; after a change that is meant to change bits, record them anew by
``python tests/bits.py > tests/bits.txt``. The inputs come from raw random integers by exact steps, since the normal
numbers of NumPy pass through the C library's logarithm. Of a NaN, sign and payload are left out.
"""

import hashlib
import itertools

import ml_dtypes
import numpy as np

import fastbn
from fastbn import optim

DTYPES = [np.dtype(d) for d in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
# (shape, channel axis, order of the axes in memory): runs and columns, short rows side by side, one block and many
CASES = [
    ((5, 37), 1, (0, 1)),
    ((33, 24), 1, (1, 0)),
    ((9000, 3), 1, (0, 1)),
    ((300, 700), 1, (0, 1)),
    ((3, 2049), 1, (0, 1)),
    ((3, 4, 25), 1, (0, 1, 2)),
    ((130, 8, 9), 1, (0, 1, 2)),
    ((2, 3, 20011), 1, (0, 1, 2)),
    ((9, 13, 7), -1, (0, 1, 2)),
    ((8, 19, 7, 7), 1, (0, 1, 2, 3)),
    ((6, 40, 9, 5), 1, (0, 2, 3, 1)),
    ((17, 6, 11), 1, (2, 0, 1)),
]
THREADS = (1, 3)
OPTIMIZERS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "clip_norm": 0.9}),
    ("RMSprop", {"momentum": 0.9, "centered": True, "eps": 1e-3, "clip_value": 0.5}),
    ("Adam", {"betas": (0.93, 0.987), "eps": 1e-3, "clip_global_norm": 1.1}),
    ("AdamW", {"lr": 0.01, "amsgrad": True, "eps_inside_sqrt": True}),
]


class Numbers:
    """A stream of numbers that are the same everywhere."""

    def __init__(self, seed):
        self._raw = np.random.PCG64(seed).random_raw

    def uniform(self, shape):
        """Return float64 in [-1, 1), multiples of 2⁻²³."""
        size = int(np.prod(shape))
        return np.ldexp((self._raw(size) >> np.uint64(40)).astype(np.float64), -23).reshape(shape) - 1

    def spread(self, shape):
        """Return float64 of magnitudes from 2⁻¹² to 2⁷: sums of them round often."""
        size = int(np.prod(shape))
        exponents = (self._raw(size) >> np.uint64(40)).astype(np.int64) % 16 - 8
        return np.ldexp(self.uniform(shape), exponents.reshape(shape)) + self.uniform(shape[-1:])


def laid_out(values, dtype, order):
    """Return the values in that dtype, their axes in that order in memory."""
    return np.ascontiguousarray(values.transpose(order)).astype(dtype).transpose(np.argsort(order))


def digest(results):
    """Return the digest of arrays and numbers, all NaNs taken for one."""
    sha = hashlib.sha256()
    for result in results:
        array = np.array(result)  # a copy, C-contiguous
        if array.dtype.kind != "i":
            array[array != array] = np.nan
        sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return sha.hexdigest()[:32]


def arguments(case, dtype, seed, values=None):
    """Return x, dy, residual, gamma, beta of a case."""
    (shape, axis, order), numbers = case, Numbers(seed)
    x = laid_out(numbers.spread(shape) if values is None else values, dtype, order)
    dy, residual = (laid_out(numbers.uniform(shape), dtype, order) for _ in range(2))
    gamma, beta = (numbers.uniform((shape[axis],)).astype(np.float32) for _ in range(2))
    return x, dy, residual, gamma, beta


def norm_results(case, dtype, threads, values=None):
    """Yield the results of training, backward and inference, with and without parameters, residual and ReLU."""
    x, dy, residual, gamma, beta = arguments(case, dtype, 0, values)
    for activation, added, affine in itertools.product((None, "relu"), (None, residual), (True, False)):
        options = {"axis": case[1], "activation": activation, "residual": added, "num_threads": threads, "eps": 1e-3}
        parameters = (gamma, beta) if affine else (None, None)
        y, saved = fastbn.batch_norm_train(x, *parameters, **options)
        yield from (y, saved.mean, saved.var, saved.rstd)
        gradients = fastbn.batch_norm_backward(dy, saved, num_threads=threads)
        yield from (part for part in gradients if part is not None)
        yield fastbn.batch_norm_infer(x, saved.mean, saved.var, *parameters, **options)


def moments_results(case, dtype, threads):
    """Yield moments, and those of the array cut in three, merged."""
    x = arguments(case, dtype, 1)[0]
    whole = fastbn.Moments.of(x, case[1], num_threads=threads)
    parts = fastbn.Moments(x.shape[case[1]], axis=case[1])
    for part in np.array_split(x, 3):
        parts.update(part)
    yield from (whole.mean, whole.m2, whole.var(1), parts.mean, parts.m2)


def strange_values():
    """Yield (name, values of shape (40, 6, 30)) that leave the common paths of the arithmetic."""
    shape = (40, 6, 30)
    base = Numbers(2).uniform(shape)
    for name, exponent in (("subnormal", -140), ("tiny", -70), ("huge", 100), ("beyond the squares", 120)):
        yield name, np.ldexp(base, exponent)
    yield "constant", np.broadcast_to(np.arange(6.0)[:, None] / 3, shape)
    yield "far from 0", base + 4096
    special = base.copy()
    special[3, 1, 5], special[4, 2, 6], special[5, 3, 7] = np.nan, np.inf, -np.inf
    special[0, 4], special[:, 5] = -0.0, 0.0
    yield "NaN and infinity", special


def layer_results(dtype):
    """Yield what three steps leave in a layer, and its inference, frozen backward pass and recalibration."""
    for momentum, relu in ((0.1, None), (None, "relu")):
        layer = fastbn.BatchNorm(19, momentum=momentum, activation=relu, dtype=dtype)
        for seed in range(3):
            x, dy, residual, *_ = arguments(CASES[9], dtype, seed)
            yield from (layer(x, residual=residual), layer.backward(dy), layer.grad_gamma, layer.grad_beta)
        yield from (layer.running_mean, layer.running_var, *layer.to_affine())
        yield from (layer.eval()(x), layer.backward(dy))
        for method in ("pooled", "paper"):
            layer.recalibrate([x, dy], method)
            yield from (layer.running_mean, layer.running_var)


def optimizer_results(method, options, dtype, threads):
    """Yield parameters and state after each of six steps."""
    numbers = Numbers(3)
    params = [numbers.uniform(shape).astype(dtype) for shape in ((7,), (33, 65), (40_001,))]
    optimizer = getattr(optim, method)(params, schedule=optim.inverse_time(0.1, 0.3), **{"lr": 0.1} | options)
    for _ in range(6):
        grads = [numbers.spread(p.shape).astype(dtype) for p in params]
        optimizer.step(grads, num_threads=threads)
        yield from params
    optim.project_max_norm(params[:2], 0.7, axis=0)
    yield from params
    for name, arrays in optimizer.state_dict().items():
        yield from arrays if name != "step" else [arrays]


def fold_results(dtype):
    """Yield folded weights and biases of all four functions."""
    numbers = Numbers(4)
    parameters = [numbers.uniform((12,)) for _ in range(3)]
    bn = fastbn.BatchNormParams(*parameters, var=abs(numbers.uniform((12,))), eps=1e-5)
    conv, linear, into = (numbers.uniform(shape).astype(dtype) for shape in ((12, 5, 3, 3), (12, 31), (9, 12)))
    bias = numbers.uniform((12,)).astype(dtype)
    for folded in (
        fastbn.fold_conv(conv, bias, bn),
        fastbn.fold_linear(linear, bias, bn),
        fastbn.fold_into_linear(bn, into, None),
        fastbn.fold_into_conv(bn, into[:, :, None], None),
    ):
        yield from (folded.weight, folded.bias)


def standardizer_results(dtype):
    """Yield the statistics of a fit in two parts, and what is made with them."""
    x = arguments(CASES[2], dtype, 5)[0]
    scaler = fastbn.Standardizer().fit(x[:4000]).partial_fit(x[4000:])
    yield from (scaler.mean_, scaler.var_, scaler.transform(x), scaler.inverse_transform(x))


def late_step_results(dtype):
    """Yield parameters after a step of Adam so late that the C libraries' powers of β₂ differ from CPU to CPU."""
    params = [Numbers(6).uniform((4001,)).astype(dtype)]
    optimizer = optim.Adam(params, betas=(0.9, 0.9999))
    optimizer.load_state_dict(optimizer.state_dict() | {"step": 1822})
    optimizer.step([params[0] * params[0]])
    yield from params


def schedule_results():
    """Yield the rates of the schedules' first sixty steps; a cosine is as good as the C library's."""
    schedules = (
        optim.constant(0.1, warmup=9), optim.inverse_time(0.1, 0.03), optim.step_decay(0.1, 0.7, 7),
        optim.exponential(0.1, 0.93),
    )  # fmt: skip
    yield from ([schedule(step) for step in range(60)] for schedule in schedules)


def groups():
    """Yield (name, function that returns the digest of the group)."""
    for dtype, threads in itertools.product(DTYPES, THREADS):
        where = f"{dtype.name}, {threads} thread{'s' * (threads > 1)}"
        for case in CASES:
            about = f"{'x'.join(map(str, case[0]))} axis {case[1]} order {''.join(map(str, case[2]))}, {where}"
            yield f"norm, {about}", lambda c=case, d=dtype, t=threads: norm_results(c, d, t)
            yield f"moments, {about}", lambda c=case, d=dtype, t=threads: moments_results(c, d, t)
        for method, options in OPTIMIZERS:
            yield (
                f"{method} {', '.join(options)}, {where}",
                lambda m=method, o=options, d=dtype, t=threads: optimizer_results(m, o, d, t),
            )
    for dtype in DTYPES:
        for name, values in strange_values():
            case = (values.shape, 1, (0, 1, 2))
            yield f"norm of {name}, {dtype.name}", lambda c=case, d=dtype, v=values: norm_results(c, d, 1, v)
        for function in (layer_results, fold_results, standardizer_results, late_step_results):
            about = function.__name__.removesuffix("_results").replace("_", " ")
            yield f"{about}, {dtype.name}", lambda f=function, d=dtype: f(d)
    yield "schedules", schedule_results


def compute(results):
    """Return the digest of a group; overflow in its data is part of it and worth no warning."""
    with np.errstate(all="ignore"):
        return digest(results())


if __name__ == "__main__":
    for name, results in groups():
        print(compute(results), name)
