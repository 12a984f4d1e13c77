"""What the tests of the PyTorch layers share: tensors as arrays, and the bounds of tests/reference.py on them."""

import numpy as np
import reference
import torch
from reference import U32, U64, assert_within, expand, half_unit, over_channels, wide
from strategies import BFLOAT16

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def array(t):
    """Return a tensor as a NumPy array over the same memory."""
    t = t.detach()
    return t.view(torch.int16).numpy().view(BFLOAT16) if t.dtype == torch.bfloat16 else t.numpy()


def tensor(a):
    """Return a NumPy array as a tensor over the same memory."""
    return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == BFLOAT16 else torch.from_numpy(a)


def same_bits(a, b):
    """Whether two tensors have the same shape, dtype and bits, wherever they lie."""
    return a.dtype == b.dtype and a.shape == b.shape and reference.bits(array(a)) == reference.bits(array(b))


def randn(*shape, seed=0, dtype=torch.float32, grad=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.requires_grad_(grad)


def vector(t):
    return None if t is None else array(t)


def holds(values, dtype):
    """Return which values a dtype holds: float16 ends at 65,504, where sums of a channel are infinite rightly."""
    return np.abs(values) < 6e4 if dtype == np.float16 else np.full(np.shape(values), True)


def assert_forward(y, x, weight=None, bias=None, *, eps=1e-5, stats=None, relu=False, residual=None):
    """Hold y to its bound; `stats` are (mean, var) of an evaluation, the batch's own where None."""
    x, gamma, beta = array(x), vector(weight), vector(bias)
    options = {"eps": eps, "activation": "relu" if relu else None, "residual": vector(residual)}
    if stats is None:
        forward = reference.train(x, gamma, beta, **options)
    else:
        forward = reference.infer(x, *(array(s) for s in stats), gamma, beta, **options)
    bound = reference.y_bound(forward, gamma, beta, x.dtype, 1, residual=options["residual"])
    assert_within(array(y), forward.y, bound, "y")
    assert array(y).dtype == x.dtype


def assert_gradients(dy, y, x, weight, grads, *, eps=1e-5, stats=None, relu=False):
    """Hold (dx, dweight, dbias) to their bounds; None among them is not looked at. y > 0 says what ReLU lets pass."""
    dy, x, gamma = array(dy), array(x), vector(weight)
    passes = array(y) > 0 if relu else True
    dtype = x.dtype
    if stats is None:
        forward = reference.train(x, gamma, eps=eps)
        exact = reference.backward(dy, x, gamma, eps=eps, passes=passes)
        bound = reference.backward_bound(exact, forward, gamma, dtype, 1, dtype)
    else:
        exact, bound = frozen_backward(dy, x, gamma, *(array(s) for s in stats), eps, passes)
    for name in "dx", "dgamma", "dbeta":
        value = grads[("dx", "dgamma", "dbeta").index(name)]
        if value is None:
            continue
        want, most = getattr(exact, name), getattr(bound, name)
        if name != "dx":  # rounded once more, to the dtype of the parameter
            assert array(value).dtype == gamma.dtype
            most = most + (U32 * (np.abs(want) + most) if gamma.dtype == np.float32 else 0)
            most = most + half_unit(np.abs(want) + most, gamma.dtype)
        fits = holds(want, array(value).dtype)
        assert_within(array(value)[fits], want[fits], most[fits], name)


def frozen_backward(dy, x, gamma, mean, var, eps, passes):
    """With given statistics dx = γ·rstd·dz, dγ = Σdz·x̂, dβ = Σdz."""
    forward = reference.infer(x, mean, var, eps=eps)
    dz = np.where(passes, wide(dy), 0)
    u = (32 * U64) if x.dtype == np.float64 else 8 * U32
    t = reference.spread(forward, x.dtype, 1)
    scale = reference.parameter(gamma, 1, x.ndim, 1) * expand(forward.rstd, x.ndim, 1)
    dx = scale * dz
    total = over_channels(np.sum, np.abs(dz), 1)
    exact = reference.Backward(dx, over_channels(np.sum, dz * forward.xhat, 1), over_channels(np.sum, dz, 1), dz)
    most = u * np.abs(dx)
    most = most + half_unit(np.abs(dx) + most, x.dtype)
    return exact, reference.Backward(most, u * t * total, u * total, dz)


def assert_running(running, before, x, momentum=0.1):
    """Hold running (mean, var) to (1 - m)·before + m·(μ, σ²·n/(n-1)) of the batch."""
    x = array(x)
    forward = reference.train(x)
    n = x.size // x.shape[1]
    u = (32 * U64) if x.dtype == np.float64 else 8 * U32
    t = reference.spread(forward, x.dtype, 1)
    news = forward.mean, forward.var * n / (n - 1)
    # blocks of float64 data are merged by means that are rounded: |μ| counts in both
    errors = u * t * np.sqrt(forward.var), u * news[1] * (t if x.dtype == np.float64 else 1)
    for name, now, old, new, error in zip(("mean", "var"), running, before, news, errors, strict=True):
        old, dtype = wide(array(old)), array(now).dtype
        unit = U64 if dtype == np.float64 else U32
        want = (1 - momentum) * old + momentum * new
        most = abs(momentum) * error + 4 * unit * (abs(1 - momentum) * np.abs(old) + abs(momentum * new))
        most = most + half_unit(np.abs(want) + most, dtype)
        fits = holds(want, dtype)
        assert_within(array(now)[fits], want[fits], most[fits], f"running {name}")
        assert not np.isnan(wide(array(now))).any()
