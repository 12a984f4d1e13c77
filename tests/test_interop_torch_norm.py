"""BatchNorm for PyTorch over fastbn's kernels: the numbers, their bits, where they lie, and what is refused."""

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import torch.nn.functional as F  # noqa: E402
from interpreter import run_python  # noqa: E402
from reference import U32, bits  # noqa: E402
from strategies import DTYPES as ARRAY_DTYPES  # noqa: E402
from strategies import numbers, shapes  # noqa: E402
from torch import nn  # noqa: E402
from torch_norms import (  # noqa: E402
    DTYPES,
    array,
    assert_forward,
    assert_gradients,
    assert_running,
    randn,
    same_bits,
    tensor,
)

import fastbn  # noqa: E402
from fastbn.interop.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAddReLU,
    BatchNormReLU,
    batch_norm,
    ops,
)

NORMS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}
THEIRS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = {2: (17, 5), 3: (6, 4, 9), 4: (4, 6, 5, 7), 5: (3, 4, 5, 2, 3)}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def filled(bn, seed=0):
    """Return the layer with numbers in it as training would leave them."""
    with torch.no_grad():
        for i, (name, t) in enumerate(bn.state_dict().items()):
            if name == "num_batches_tracked":
                continue
            values = randn(*t.shape, seed=seed + i, dtype=t.dtype)
            t.copy_(values.abs() + 0.5 if name == "running_var" else values)
    return bn


# Against the oracle ---------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """One call. The arrays lie anywhere in memory, the channels on axis 1."""

    x: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    dy: torch.Tensor
    relu: bool
    eps: float
    about: str

    def __repr__(self):
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        places = ", ".join(f"{k}: {tuple(t.shape)} {t.dtype} {t.stride()}" for k, t in tensors.items())
        return f"Problem({self.about}; {places}; relu={self.relu}, eps={self.eps})"

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))


def somewhere(draw, t):
    """Return the same values contiguous, channels last, as every other element of a larger tensor, or as they are."""
    place = draw(st.sampled_from(["as it is", "contiguous", "channels last", "sliced", "offset"]))
    if place == "contiguous":
        return t.contiguous()
    if place == "channels last" and t.ndim in FORMATS:
        return t.contiguous(memory_format=FORMATS[t.ndim])
    if place in ("sliced", "offset"):
        whole = torch.full([2 * n + 1 for n in t.shape], math.nan, dtype=t.dtype)
        part = whole[tuple(slice(1, n + 1) if place == "offset" else slice(1, None, 2) for n in t.shape)]
        return part.copy_(t)
    return t


@st.composite
def problems(draw):
    shape, axis = draw(shapes(20_000))
    dtype = draw(st.sampled_from(ARRAY_DTYPES))
    kind = draw(st.sampled_from(["plain", "offset", "outliers", "ramp", "constant"]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    x = tensor(np.moveaxis(numbers(rng, kind, shape, axis % len(shape), dtype), axis, 1))
    c = x.shape[1]
    other = randn(*x.shape, seed=seed, dtype=x.dtype)
    x, dy = somewhere(draw, x), somewhere(draw, randn(*x.shape, seed=seed + 1, dtype=x.dtype))
    residual = somewhere(draw, other) if draw(st.booleans()) else None
    half = dtype.itemsize == 2
    of_parameters = draw(st.sampled_from([torch.float32, x.dtype])) if half else x.dtype
    weight = randn(c, seed=seed + 2, dtype=of_parameters) if draw(st.booleans()) else None
    bias = randn(c, seed=seed + 3, dtype=of_parameters) if weight is not None and draw(st.booleans()) else None
    if weight is not None:
        weight[rng.random(c) < 0.2] = 0
    eps = draw(st.sampled_from([1e-3, 1.0] if dtype == np.float16 else [1e-5, 1e-3, 1.0]))
    return Problem(x, weight, bias, residual, dy, draw(st.booleans()), eps, f"{kind}, seed {seed}")


@given(problems(), st.sampled_from([0.1, 0.0, 1.0, 0.37]))
def test_training_holds_the_bounds_of_the_numerical_contract(p, momentum):
    leaves = [t if t is None else t.detach().requires_grad_() for t in (p.x, p.weight, p.bias, p.residual)]
    x, weight, bias, residual = leaves
    before = [t.clone() for t in (p.x, p.dy)]
    c = x.shape[1]
    dtype = x.dtype if weight is None else weight.dtype
    running = randn(c, seed=8, dtype=dtype), randn(c, seed=9, dtype=dtype).abs()
    old = [t.clone() for t in running]
    y = batch_norm(x, *running, weight, bias, True, momentum, p.eps, relu=p.relu, residual=residual)
    assert_forward(y, p.x, p.weight, p.bias, eps=p.eps, relu=p.relu, residual=p.residual)
    assert_running(running, old, p.x, momentum)
    y.backward(p.dy)
    grads = [None if t is None else t.grad for t in (x, weight, bias)]
    assert_gradients(p.dy, y, p.x, p.weight, grads, eps=p.eps, relu=p.relu)
    if residual is not None:
        assert same_bits(residual.grad, torch.where(y > 0, p.dy, 0) if p.relu else p.dy)
    assert all(same_bits(now, was) for now, was in zip((p.x, p.dy), before, strict=True))


@given(problems())
def test_evaluation_holds_the_bounds_and_moves_nothing(p):
    leaves = [t if t is None else t.detach().requires_grad_() for t in (p.x, p.weight, p.bias, p.residual)]
    x, weight, bias, residual = leaves
    dtype = x.dtype if weight is None else weight.dtype
    running = randn(x.shape[1], seed=8, dtype=dtype), randn(x.shape[1], seed=9, dtype=dtype).abs() + 0.1
    if x.dtype == torch.float16:
        p.x.clamp_(-1e3, 1e3)
    old = [t.clone() for t in running]
    y = batch_norm(x, *running, weight, bias, False, 0.3, p.eps, relu=p.relu, residual=residual)
    assert_forward(y, p.x, p.weight, p.bias, eps=p.eps, stats=running, relu=p.relu, residual=p.residual)
    y.backward(p.dy)
    grads = [None if t is None else t.grad for t in (x, weight, bias)]
    assert_gradients(p.dy, y, p.x, p.weight, grads, eps=p.eps, stats=running, relu=p.relu)
    assert all(same_bits(now, was) for now, was in zip(running, old, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ndim", NORMS)
def test_a_layer_does_what_pytorchs_does_in_float64(ndim, dtype, training):
    """The peer: k steps of both, ours in a dtype, PyTorch's in float64 on the same numbers."""
    shape, c = SHAPES[ndim], SHAPES[ndim][1]
    ours, theirs = filled(NORMS[ndim](c, dtype=dtype)), THEIRS[ndim](c, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    ours.train(training), theirs.train(training)
    unit = {torch.float64: 2.0**-48, torch.float32: 2.0**-19}.get(dtype, 8 * torch.finfo(dtype).eps)
    for step in range(3):
        x = randn(*shape, seed=step, dtype=dtype, grad=True)
        wide = x.detach().double().requires_grad_()
        dy = randn(*shape, seed=50 + step, dtype=dtype)
        y, want = ours(x), theirs(wide)
        y.backward(dy), want.backward(dy.double())
        for a, b in ((y, want), (x.grad, wide.grad)):
            assert a.dtype == dtype
            assert (a.double() - b).abs().max() <= unit * (1 + b.abs().max())
    for (name, a), (key, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert name == key
        assert (a.double() - b).abs().max() <= unit * (1 + b.abs().max()), name
    for a, b in (ours.weight.grad, theirs.weight.grad), (ours.bias.grad, theirs.bias.grad):  # summed over the steps
        assert (a.double() - b).abs().max() <= unit * 3 * math.sqrt(math.prod(shape) / c) * (1 + b.abs().max())


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
@pytest.mark.parametrize("ratio", [1e4, 1e6])
def test_float32_is_exact_where_the_mean_is_a_million_standard_deviations(layout, ratio):
    """The layer holds its bound on data where PyTorch's own in float32 misses it a hundredfold."""
    x = (randn(8, 3, 20, 20, dtype=torch.float64) + ratio).float()
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    bn, dy = filled(BatchNorm2d(3)), randn(8, 3, 20, 20, seed=1)
    y = bn(x)
    assert_forward(y, x, bn.weight, bn.bias)
    y.backward(dy)
    assert_gradients(dy, y, x, bn.weight, (x.grad, bn.weight.grad, bn.bias.grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1 / 3, -1000.0])
def test_a_constant_channel_gives_exactly_the_bias(value, dtype):
    bn = filled(BatchNorm2d(3, dtype=dtype))
    x = randn(4, 3, 5, 5, dtype=dtype)
    x[:, 1] = value
    y = bn(x)
    assert torch.equal(y[:, 1], bn.bias[1].expand(4, 5, 5))
    assert y[:, 0].std() > 0.1 * bn.weight[0].abs()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [BatchNorm2d, BatchNormReLU, BatchNormAddReLU])
def test_nan_and_infinity_stay_in_their_channel(kind, bad, training):
    x, other = randn(6, 5, 4, 4), randn(6, 5, 4, 4, seed=1)
    dirty = x.clone()
    dirty[2, 3, 1, 1] = bad
    results = []
    for data in x, dirty:
        bn, leaf = filled(kind(5)).train(training), data.requires_grad_()
        y = bn(leaf, other) if kind is BatchNormAddReLU else bn(leaf)
        y.backward(randn(6, 5, 4, 4, seed=2))
        by_channel = (bn.running_mean, bn.running_var, bn.weight.grad, bn.bias.grad)
        results.append([y.transpose(0, 1), leaf.grad.transpose(0, 1), *by_channel])
    clean = [0, 1, 2, 4]
    for a, b in zip(*results, strict=True):
        assert same_bits(a[clean], b[clean])
    y, dx, *_ = results[1]
    if training:
        assert y[3].isnan().any()
        assert dx[3].isnan().all()
    else:
        assert not y[3].isfinite().all()
        assert y[3].isfinite().sum() == 6 * 16 - 1


# Bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_are_those_of_the_numpy_interface(dtype, with_residual, relu):
    x, dy = randn(5, 4, 9, 3, dtype=dtype, grad=True), randn(5, 4, 9, 3, seed=1, dtype=dtype)
    residual = randn(5, 4, 9, 3, seed=2, dtype=dtype, grad=True) if with_residual else None
    weight, bias = (randn(4, seed=s, dtype=torch.promote_types(dtype, torch.float32), grad=True) for s in (3, 4))
    y = batch_norm(x, None, None, weight, bias, True, eps=1e-3, relu=relu, residual=residual)
    y.backward(dy)
    want, saved = fastbn.batch_norm_train(
        array(x), array(weight), array(bias), eps=1e-3, activation="relu" if relu else None,
        residual=None if residual is None else array(residual),
    )  # fmt: skip
    dx, dweight, dbias, dresidual = fastbn.batch_norm_backward(array(dy), saved)
    pairs = [(y, want), (x.grad, dx), (weight.grad, dweight), (bias.grad, dbias)]
    if with_residual:
        pairs.append((residual.grad, dresidual))
    for ours, theirs in pairs:
        assert array(ours).dtype == theirs.dtype
        assert bits(array(ours)) == bits(theirs)


def test_evaluation_has_the_bits_of_the_numpy_interface():
    bn, x = filled(BatchNorm2d(4)).eval(), randn(5, 4, 9, 3)
    arrays = [array(t) for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias)]
    assert bits(array(bn(x))) == bits(fastbn.batch_norm_infer(array(x), *arrays))


@pytest.mark.parametrize("kind", [BatchNorm2d, BatchNormReLU, BatchNormAddReLU])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_the_bits_are_the_same_for_any_number_of_threads(kind, layout, training):
    shape = 16, 8, 40, 40  # 204,800 values: enough for six threads
    x, residual, dy = (randn(*shape, seed=s).contiguous(memory_format=layout) for s in range(3))
    results = []
    for threads in 1, 2, 3:
        bn, leaf = filled(kind(8)).train(training), x.detach().requires_grad_()
        with fastbn.num_threads(threads):
            y = bn(leaf, residual) if kind is BatchNormAddReLU else bn(leaf)
            y.backward(dy)
        results.append([y, leaf.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("given", [(4, 2), (2, 4), (1, 3), (3, 1)])
def test_a_call_has_no_more_threads_than_either_library_was_given(monkeypatch, given):
    seen = []
    for name in "batch_norm_train", "infer", "batch_norm_backward":
        inner = getattr(ops, name)

        def recording(*args, inner=inner, **options):
            seen.append(fastbn.get_num_threads())
            return inner(*args, **options)

        monkeypatch.setattr(ops, name, recording)
    before = torch.get_num_threads()
    bn, x = BatchNorm2d(3), randn(4, 3, 5, 5, grad=True)
    try:
        torch.set_num_threads(given[1])
        with fastbn.num_threads(given[0]):
            bn(x).sum().backward()
            bn.eval()(x).sum().backward()
    finally:
        torch.set_num_threads(before)
    assert seen == [min(given)] * 4


def test_several_threads_of_python_may_call_at_once():
    """Each with layers of its own: the same bits as one after the other."""

    def run(seed):
        bn, x = filled(BatchNormReLU(8)), randn(16, 8, 20, 20, seed=seed, grad=True)
        for _ in range(5):
            y = bn(x)
            y.sum().backward()
        return [y.detach(), x.grad, bn.weight.grad, bn.running_mean]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, range(8)))
    for seed, tensors in enumerate(found):
        assert all(same_bits(a, b) for a, b in zip(tensors, run(seed), strict=True))


def test_repeated_runs_and_all_places_in_memory_give_the_same_bits_per_layout():
    x = randn(4, 6, 5, 7)
    wide = torch.full((8, 6, 11, 7), math.nan)
    wide[::2, :, 3:8] = x
    bn = filled(BatchNorm2d(6))
    assert same_bits(bn(x), bn(x.clone()))
    assert same_bits(bn(x), bn(wide[::2, :, 3:8]))


# The fused layers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", NORMS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [BatchNormReLU, BatchNormAddReLU])
def test_a_fused_layer_is_its_parts(kind, training, ndim):
    """Exactly, without a residual; with one the sum of the parts is rounded twice."""
    shape, c = SHAPES[ndim], SHAPES[ndim][1]
    fused, plain = filled(kind(c)).train(training), filled(NORMS[ndim](c)).train(training)
    x, residual, dy = (randn(*shape, seed=s) for s in range(3))
    a, b, r, s = (t.detach().requires_grad_() for t in (x, x, residual, residual))
    stats = None if training else [t.clone() for t in (fused.running_mean, fused.running_var)]
    if kind is BatchNormReLU:
        y, want = fused(a), plain(b).relu()
        assert same_bits(y, want)
    else:
        y, want = fused(a, r), (plain(b) + s).relu()
        assert (y - want).abs().max() <= 8 * U32 * (1 + want.max())
        assert_forward(y, x, fused.weight, fused.bias, stats=stats, relu=True, residual=residual)
    y.backward(dy), want.backward(dy)
    grads = a.grad, fused.weight.grad, fused.bias.grad
    assert_gradients(dy, y, x, fused.weight, grads, stats=stats, relu=True)
    if kind is BatchNormAddReLU:
        assert same_bits(r.grad, torch.where(y > 0, dy, 0))
    assert all(same_bits(p, q) for p, q in zip(fused.buffers(), plain.buffers(), strict=True))


def test_relu_gives_no_gradient_where_it_gives_zero():
    """As PyTorch's: at exactly 0 too, also where γ = 0."""
    bn = BatchNormReLU(3)
    with torch.no_grad():
        bn.weight.copy_(torch.tensor([1.0, 0.0, 1.0]))
        bn.bias.copy_(torch.tensor([-100.0, 0.0, 100.0]))
    x = randn(8, 3, 5, grad=True)
    y = bn(x)
    y.backward(torch.ones_like(y))
    assert not y[:, :2].any()
    assert bn.bias.grad.tolist() == [0, 0, 40]


@pytest.mark.parametrize("kind", [BatchNormReLU, BatchNormAddReLU])
def test_relu_keeps_nan(kind):
    x = randn(4, 2, 3)
    x[0, 0, 0] = math.nan
    y = kind(2)(x, torch.zeros_like(x)) if kind is BatchNormAddReLU else kind(2)(x)
    assert y[:, 0].isnan().all()
    assert not y[:, 1].isnan().any()


@pytest.mark.parametrize("kind", [BatchNormReLU, BatchNormAddReLU])
def test_a_fused_layer_exchanges_state_with_pytorchs(kind):
    fused, theirs = filled(kind(5)), nn.BatchNorm2d(5)
    theirs.load_state_dict(fused.state_dict())
    assert list(fused.state_dict()) == KEYS
    again = kind(5)
    again.load_state_dict(theirs.state_dict())
    assert all(same_bits(a, b) for a, b in zip(again.state_dict().values(), fused.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", [BatchNormReLU, BatchNormAddReLU])
def test_a_fused_layer_has_the_options_of_pytorchs(kind):
    bn = kind(4, 1e-3, None, False, False, "cpu", torch.float64)
    assert (bn.num_features, bn.eps, bn.momentum, bn.affine, bn.track_running_stats) == (4, 1e-3, None, False, False)
    assert not list(bn.state_dict())
    assert {t.dtype for t in kind(4, dtype=torch.float64).state_dict().values()} == {torch.float64, torch.int64}


# Where the results lie ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ndim", FORMATS)
def test_channels_last_is_kept_in_the_result_and_in_the_gradient(ndim, dtype, training):
    bn, form = filled(NORMS[ndim](SHAPES[ndim][1], dtype=dtype)).train(training), FORMATS[ndim]
    x = randn(*SHAPES[ndim], dtype=dtype).contiguous(memory_format=form).requires_grad_()
    for dy in randn(*SHAPES[ndim], seed=1, dtype=dtype), randn(*SHAPES[ndim]).to(dtype).contiguous(memory_format=form):
        y = bn(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        for t in y, dx:
            assert t.stride() == x.stride()
            assert t.is_contiguous(memory_format=form)
    bn.zero_grad()
    bn(x).sum().backward()
    assert x.grad.is_contiguous(memory_format=form)
    y = BatchNormAddReLU(SHAPES[ndim][1], dtype=dtype)(x, randn(*SHAPES[ndim], dtype=dtype))
    assert y.is_contiguous(memory_format=form)


def places():
    """Return named tensors that lie in memory in all sorts of ways."""
    whole = randn(8, 10, 9, 7)
    return {
        "contiguous": whole,
        "sliced": whole[::2, 1:9:2, 2:, ::3],
        "channels last, some channels": whole.contiguous(memory_format=torch.channels_last)[:, 2:6],
        "one image": whole[:1],
        "one channel": whole[:, :1],
        "one pixel": whole[:, :, :1, :1],
        "expanded over the batch": whole[:1].expand(5, -1, -1, -1),
        "expanded over the channels": whole[:, :1].expand(-1, 6, -1, -1),
        "all one number": whole[:1, :1, :1, :1].expand(4, 3, 2, 2),
        "transposed": whole.permute(3, 2, 1, 0),
        "rows are columns": whole.transpose(2, 3),
        "overlapping": torch.as_strided(whole, (4, 3, 6, 6), (20, 3, 2, 1)),
        "offset": whole.flatten()[3 : 3 + 4 * 3 * 25].view(4, 3, 5, 5),
        "a matrix": whole.reshape(80, 63),
        "a transposed matrix": whole.reshape(80, 63).t(),
        "channels behind": whole[0].transpose(1, 2),
    }


@pytest.mark.parametrize("name", places())
@pytest.mark.parametrize("training", [True, False])
def test_results_lie_as_pytorchs_or_as_the_input(name, training):
    """Dense in any case, and where PyTorch keeps an order so do we: the next layer relies on it."""
    x = places()[name].detach().requires_grad_()
    bn = filled(NORMS[x.ndim](x.shape[1])).train(training)
    theirs = THEIRS[x.ndim](x.shape[1]).train(training)
    theirs.load_state_dict(bn.state_dict())
    want = theirs(x)
    dy = randn(*x.shape, seed=3)
    (dwant,) = torch.autograd.grad(want, x, dy)
    stats = None if training else [t.clone() for t in (bn.running_mean, bn.running_var)]
    y = bn(x)
    grads = torch.autograd.grad(y, (x, bn.weight, bn.bias), dy)
    assert_forward(y, x, bn.weight, bn.bias, stats=stats)
    assert_gradients(dy, y, x, bn.weight, grads, stats=stats)
    for ours, pytorchs in ((y, want), (grads[0], dwant)):
        assert ours.stride() in (pytorchs.stride(), torch.empty_like(x).stride())
        dense = sorted(zip(ours.stride(), ours.shape, strict=True))
        assert math.prod(n for _, n in dense) == 1 + sum(s * (n - 1) for s, n in dense)
        assert ours.storage_offset() == 0


def test_a_result_is_memory_of_its_own():
    bn = BatchNorm1d(3).eval()
    with torch.no_grad():
        bn.running_var.fill_(1 - bn.eps)  # the identity, nearly
    x = randn(4, 3)
    before = x.clone()
    y = bn(x)
    y.zero_()
    assert same_bits(x, before)
    assert not batch_norm(x, bn.running_mean, bn.running_var, relu=True, residual=torch.zeros_like(x)).is_set_to(x)


PEAK = """
    import os, resource, sys
    import torch
    from fastbn.interop.torch import BatchNorm2d, BatchNormAddReLU, BatchNormReLU

    torch.set_num_threads(1)
    unit = 1 if sys.platform == "darwin" else 1024

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def step(kind, form, n):
        x, residual, dy = (torch.empty(n, 16, 64, 64, memory_format=form).fill_(1) for _ in range(3))
        x[:, :, 0, 0] = 2
        x.requires_grad_()
        rest = (residual.requires_grad_(),) if kind is BatchNormAddReLU else ()
        bn = kind(16)
        size, before = x.numel() * 4, peak()
        y = bn(x, *rest)
        forward = peak() - before
        y.backward(dy)
        return forward / size, (peak() - before) / size

    for kind in BatchNorm2d, BatchNormReLU, BatchNormAddReLU:
        for form in torch.contiguous_format, torch.channels_last:
            if os.fork() == 0:  # a process of its own, whose peak begins anew
                step(kind, form, 1), step(kind, form, 2)
                print(kind.__name__, str(form)[6:], *step(kind, form, 192), flush=True)
                os._exit(0)
            os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each case needs a process, and its peak of resident memory")
def test_no_array_is_copied():
    """48 MiB each: forward takes the memory of y alone, backward that of dx (and of the residual's gradient)."""
    lines = [line.split() for line in run_python(PEAK, OMP_NUM_THREADS="1").stdout.splitlines()]
    assert len(lines) == 6
    for kind, form, *peaks in lines:
        forward, both = map(float, peaks)
        results = 3 if kind == "BatchNormAddReLU" else 2
        assert 0.9 < forward < 1.3, (kind, form)
        assert results - 0.1 < both < results + 0.3, (kind, form)


def test_large_results_leave_their_memory_for_the_next():
    """As those of the NumPy interface: it is given back when the tensor goes, not before."""
    bn, x = BatchNorm2d(16), torch.zeros(144, 16, 64, 64, requires_grad=True)  # 36 MiB
    fastbn.release_buffers()
    y = bn(x)
    assert fastbn.release_buffers() == 0
    (dx,) = torch.autograd.grad(y, x, y)
    kept = y[:1].view(16, -1)
    del y
    assert fastbn.release_buffers() == 0  # a view holds it
    del kept, dx
    assert x.nbytes * 2 <= fastbn.release_buffers() <= x.nbytes * 2.1


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_results_are_what_small_ones_are(dtype, form):
    """In that memory too: the values, their order, and what a residual in another order gets."""
    n = 144 * 4 // dtype.itemsize
    pattern = randn(2, 16, 64, 64, dtype=dtype)
    x = pattern.repeat(n // 2, 1, 1, 1).contiguous(memory_format=form).requires_grad_()
    residual = pattern.flip(1).repeat(n // 2, 1, 1, 1).requires_grad_()
    bn = filled(BatchNormAddReLU(16))
    y = bn(x, residual)
    dx, dresidual = torch.autograd.grad(y, (x, residual), residual.detach())
    assert y.stride() == dx.stride() == x.stride()
    assert_forward(y[:2], pattern, bn.weight, bn.bias, relu=True, residual=residual[:2])
    for t in y, dx, dresidual:
        assert same_bits(t[2:], t[:2].repeat(n // 2 - 1, 1, 1, 1))
    assert same_bits(dresidual, torch.where(y > 0, residual, 0))
    assert_gradients(residual[:2], y[:2], pattern, bn.weight, (dx[:2], None, None), relu=True)


@pytest.mark.parametrize("kind", [BatchNorm2d, BatchNormReLU, BatchNormAddReLU])
def test_what_is_saved_for_backward_is_the_input_itself_and_little_else(kind):
    saved = []
    x, residual = randn(8, 4, 16, 16, grad=True), randn(8, 4, 16, 16, seed=1, grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bn = kind(4)
        y = bn(x, residual) if kind is BatchNormAddReLU else bn(x)
    own = {t.data_ptr() for t in (x, y, residual)}
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    rest = sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in own)
    assert rest <= x.numel() / 8 + 64 * 4 * 8  # a bit per element, and vectors of 4 channels


def test_layers_hold_ordinary_tensors_that_stay_where_they_are():
    bn, x = BatchNorm2d(3), randn(4, 3, 5, 5)
    places = [t.data_ptr() for t in bn.state_dict().values()]
    optimizer = torch.optim.SGD(bn.parameters(), 0.1)
    for _ in range(3):
        bn(x).square().sum().backward()
        optimizer.step()
    bn.eval()(x)
    assert [t.data_ptr() for t in bn.state_dict().values()] == places
    assert type(bn.weight) is nn.Parameter
    assert type(bn.running_mean) is torch.Tensor


# State ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None, -0.2, 1.5])
def test_running_statistics_move_as_pytorchs_do(momentum):
    ours, theirs = BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3, momentum=momentum)
    for step in range(4):
        x = randn(6, 3, 5, seed=step) * (step + 1) + step
        ours(x), theirs(x)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == step + 1
        for a, b in (ours.running_mean, theirs.running_mean), (ours.running_var, theirs.running_var):
            assert (a - b).abs().max() <= 32 * U32 * 5**step * (1 + b.abs().max())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("ndim", NORMS)
def test_the_state_dict_goes_both_ways(ndim, track, affine):
    ours = filled(NORMS[ndim](4, affine=affine, track_running_stats=track))
    theirs = THEIRS[ndim](4, affine=affine, track_running_stats=track)
    theirs.load_state_dict(ours.state_dict())
    again = NORMS[ndim](4, affine=affine, track_running_stats=track)
    again.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict()) == list(again.state_dict())
    for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True):
        assert same_bits(a, b)
    assert (ours.weight is None, ours.running_mean is None) == (not affine, not track)
    assert isinstance(ours, THEIRS[ndim])


def test_without_running_statistics_evaluation_takes_those_of_the_batch():
    x = randn(4, 3, 5)
    bn = BatchNorm1d(3, track_running_stats=False)
    assert same_bits(bn.eval()(x), bn.train()(x))
    assert_forward(bn.eval()(x), x, bn.weight, bn.bias)
    assert bn.num_batches_tracked is None


def test_a_layer_that_counts_no_batches_moves_its_statistics_still():
    """num_batches_tracked is None where an old checkpoint was loaded so; PyTorch's then only skips the count."""
    ours, theirs = BatchNorm1d(3), nn.BatchNorm1d(3)
    ours.num_batches_tracked = theirs.num_batches_tracked = None
    ours(randn(4, 3)), theirs(randn(4, 3))
    assert (ours.running_mean - theirs.running_mean).abs().max() <= 4 * U32
    assert ours.num_batches_tracked is None


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 4, 4), (2, 3, 0, 0, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_gives_an_empty_result_and_zero_gradients(shape, training):
    bn = filled(NORMS[len(shape)](3)).train(training)
    before = bn.running_mean.clone(), bn.running_var.clone()
    x = torch.empty(shape, requires_grad=True)
    y = bn(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    for parameter in bn.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert same_bits(bn.running_mean, before[0])
    assert same_bits(bn.running_var, before[1])


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ndim", range(1, 7))
@pytest.mark.parametrize("kind", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_wrong_ranks_are_refused_in_pytorchs_words(kind, ndim, training):
    x, bn, theirs = randn(*[2] * ndim), kind(2).train(training), getattr(nn, kind.__name__)(2)
    if ndim in {BatchNorm1d: (2, 3), BatchNorm2d: (4,), BatchNorm3d: (5,)}[kind]:
        assert bn(x).shape == x.shape
        return
    with pytest.raises(ValueError, match="expected .*D input") as caught:
        theirs(x)
    refused(bn, lambda: bn(x), ValueError, str(caught.value))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_one_value_per_channel_is_refused_in_pytorchs_words(shape):
    x, message = torch.zeros(shape), "Expected more than 1 value per channel when training, got input size {}"
    for kind in NORMS[len(shape)], BatchNormReLU:
        bn = filled(kind(3))
        refused(bn, lambda bn=bn: bn(x), ValueError, message.format(x.shape))
        assert bn.eval()(x).shape == shape


def refused(bn, call, errors, *words):
    """Check that a call raises with these words, and that nothing of the layer has changed."""
    before = {k: (v.clone(), v.data_ptr()) for k, v in bn.state_dict().items()}
    with pytest.raises(errors) as caught:
        call()
    for word in words:
        assert word in str(caught.value)
    for key, value in bn.state_dict().items():
        assert same_bits(value, before[key][0]), key
        assert value.data_ptr() == before[key][1]


WRONG_LENGTH = (RuntimeError, ValueError)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("shape", [(4,), (2,), (1,), (0,), ()])
def test_vectors_of_another_length_are_refused_by_name(name, shape, training):
    vectors = {n: torch.ones(3) for n in ("running_mean", "running_var", "weight", "bias")}
    before = {n: t.clone() for n, t in vectors.items()}
    with pytest.raises(WRONG_LENGTH) as caught:
        batch_norm(randn(4, 3, 5), **vectors | {name: torch.ones(shape)}, training=training)
    assert name in str(caught.value)
    assert all(same_bits(vectors[n], before[n]) for n in vectors)


@pytest.mark.filterwarnings("ignore:fastbn:UserWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_vectors_of_two_axes_are_for_pytorch_to_judge(shape, training):
    """It refuses such statistics, and takes such a weight."""
    mean, var, two = torch.zeros(3), torch.ones(3), torch.full(shape, 2.0)
    for statistics in (two, var), (mean, two):
        with pytest.raises(RuntimeError):
            batch_norm(randn(4, 3, 5), *statistics, training=training)
    y = batch_norm(randn(4, 3, 5), mean, var, two, training=training)
    assert same_bits(y, F.batch_norm(randn(4, 3, 5), torch.zeros(3), torch.ones(3), two, training=training))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ndim", NORMS)
def test_another_number_of_channels_is_refused(ndim, training):
    shape = list(SHAPES[ndim])
    bn = filled(NORMS[ndim](shape[1])).train(training)
    shape[1] += 1
    refused(bn, lambda: bn(torch.ones(shape)), WRONG_LENGTH)
    for kind in BatchNormReLU, BatchNormAddReLU:
        fused = kind(shape[1] - 1)
        given = (torch.ones(shape),) * (1 + (kind is BatchNormAddReLU))
        refused(fused, lambda fused=fused, given=given: fused(*given), WRONG_LENGTH)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (torch.ones(4, 3, 6), ["residual", "(4, 3, 5)", "(4, 3, 6)"]),
        (torch.ones(4, 3), ["residual", "(4, 3, 5)", "(4, 3)"]),
        (torch.ones(1, 3, 1), ["residual", "(4, 3, 5)", "(1, 3, 1)"]),
        (np.ones((4, 3, 5), np.float32), ["residual", "ndarray"]),
        (2.0, ["residual", "float"]),
    ],
)
def test_a_residual_that_does_not_fit_is_refused(residual, words, training):
    bn = filled(BatchNormAddReLU(3)).train(training)
    refused(bn, lambda: bn(randn(4, 3, 5), residual), (RuntimeError, ValueError, TypeError), *words)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_residual_of_another_dtype_is_promoted_as_by_pytorch(dtype):
    x, residual = randn(4, 3, 5), randn(4, 3, 5).to(dtype)
    y = filled(BatchNormAddReLU(3))(x, residual)
    expected = torch.relu(filled(BatchNorm1d(3))(x) + residual)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


def test_one_running_statistic_without_the_other_is_refused():
    x, one = randn(4, 3), torch.ones(3)
    for mean, var in (one, None), (None, one):
        with pytest.raises((RuntimeError, ValueError), match="running_"):
            batch_norm(x, mean, var, training=True)
        with pytest.raises((RuntimeError, ValueError), match="running_"):
            batch_norm(x, mean, var)
    with pytest.raises((RuntimeError, ValueError), match="running_mean"):
        batch_norm(x, None, None)
    assert one.tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:fastbn:UserWarning")
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_both_statistics_move_or_neither(name):
    """One whose elements are all the same memory cannot take three values."""
    vectors = {"running_mean": torch.ones(3), "running_var": torch.ones(3)}
    vectors[name] = torch.ones(1).expand(3)
    try:
        batch_norm(randn(4, 3), **vectors, training=True)
    except RuntimeError:
        assert all((v == 1).all() for v in vectors.values())
    else:
        assert all((v != 1).all() for v in vectors.values())


@pytest.mark.parametrize("kind", [BatchNorm1d, BatchNormReLU])
def test_a_layer_refuses_an_epsilon_that_is_not_positive(kind):
    for eps in 0.0, -1.0:
        bn = kind(3, eps=eps)
        refused(bn, lambda bn=bn: bn(randn(4, 3)), ValueError, "eps")


@pytest.mark.parametrize("value", [np.ones((4, 3), np.float32), [[1.0, 2.0, 3.0]], None, "x"])
def test_what_is_no_tensor_is_refused(value):
    with pytest.raises(TypeError, match="(?i)tensor"):
        batch_norm(value, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_have_no_gradient(name, training):
    """PyTorch refuses them too: no gradient would come, in silence."""
    vectors = {n: torch.ones(3, requires_grad=n == name) for n in ("running_mean", "running_var")}
    with pytest.raises(RuntimeError):
        batch_norm(randn(4, 3, grad=True), **vectors, training=training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_dtypes_that_do_not_go_together_are_refused_as_pytorch_does(dtypes, training):
    of_x, of_parameters = dtypes
    vectors = [torch.ones(3, dtype=of_parameters) for _ in range(4)]
    with pytest.raises(RuntimeError):
        F.batch_norm(randn(4, 3, dtype=of_x), *vectors, training)
    with pytest.raises((RuntimeError, TypeError)):
        batch_norm(randn(4, 3, dtype=of_x), *vectors, training)
    assert all(torch.equal(v, torch.ones_like(v)) for v in vectors)
