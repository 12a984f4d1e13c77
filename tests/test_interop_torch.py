"""Folding PyTorch models: the same function, whatever the pattern; nothing touched that is not plain."""

import contextlib
import copy
import io
import itertools
import json
import operator
import pickle
import sys
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402

import fastbn  # noqa: E402
from fastbn.interop import torch as interop  # noqa: E402
from fastbn.interop.report import FOLDED, LEFT, MERGED, REWRITTEN  # noqa: E402
from fastbn.interop.torch import fold, from_state_dict, to_state_dict  # noqa: E402

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(model, seed=0):
    """In inference mode, with values in all BatchNorms as training would leave them, some scales negative or 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like, mean=0.0, std=1.0):
        return (torch.randn(like.shape, generator=generator, dtype=torch.float64) * std + mean).to(like.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(normal(parameter, std=0.5))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.copy_(normal(module.running_mean))
                module.running_var.copy_(normal(module.running_var).abs() + 0.1)
    return model.eval()


def randn(*shape, seed=1, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def actions(report):
    return [decision.action for decision in report]


def reasons(report):
    return " | ".join(decision.reason for decision in report)


def has_norm(model):
    names = ("BatchNorm", "batch_norm")
    called = any(str(n.target).find("batch_norm") >= 0 for n in getattr(model, "graph", nn.Module()).nodes) if (
        hasattr(model, "graph")) else False  # fmt: skip
    return called or any(type(m).__name__.startswith(names) for m in model.modules())


def assert_same(model, folded, *inputs, ulps=1 << 14):
    """Both give the same in float64, to rounding of what stands between."""
    with torch.no_grad():
        want, got = model(*copy.deepcopy(inputs)), folded(*copy.deepcopy(inputs))
    wants, gots = (list(y) if isinstance(y, (tuple, list)) else [y] for y in (want, got))
    assert len(wants) == len(gots)
    for a, b in zip(wants, gots, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        bound = ulps * torch.finfo(a.dtype).eps * max(1.0, float(a.abs().max()))
        assert float((a - b).abs().max()) <= bound


def snapshot(model):
    state = {name: (t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    flags = {name: (m.training, len(m._forward_hooks), type(m), id(m)) for name, m in model.named_modules()}
    return state, flags, torch.get_rng_state()


def check_unchanged(before, model):
    state, flags, rng = snapshot(model)
    assert flags == before[1]
    assert torch.equal(rng, before[2])
    assert list(state) == list(before[0])
    for name, (place, version, values) in state.items():
        assert (place, version) == before[0][name][:2]
        assert torch.equal(values, before[0][name][2])


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


# Backward, every layer ------------------------------------------------------------------------------------------


def some_layer(kind, n, groups, bias, c_in=4, c_out=6):
    if kind == "linear":
        return nn.Linear(c_in, c_out, bias=bias), (5, c_in)
    options = {"stride": 2, "padding": 1, "groups": groups, "bias": bias}
    if kind == "transposed":
        return TRANSPOSED[n](c_in, c_out, 3, **options), (2, c_in, 4, 5, 3)[: n + 2]
    return CONVS[n](c_in, c_out, 3, **options), (2, c_in, 7, 6, 5)[: n + 2]


LAYERS = [
    ("linear", 1, 1),
    *[(kind, n, groups) for kind in ("conv", "transposed") for n in (1, 2, 3) for groups in (1, 2)],
]


def absolute(layer, x):
    """|W|·|x| + |b|: what the roundings of a layer are relative to."""
    layer = copy.deepcopy(layer).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.abs_()
        return layer(x.abs())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "n", "groups"), LAYERS)
def test_each_weight_is_rounded_once(kind, n, groups, dtype):
    for bias, affine in itertools.product((True, False), (True, False)):
        layer, shape = some_layer(kind, n, groups, bias)
        model = trained(nn.Sequential(layer, NORMS[n](6, affine=affine))).to(dtype)
        folded, report = fold(model)
        assert actions(report) == [FOLDED]
        assert report.decisions[0][:3] == ("1", FOLDED, ("0",))
        assert not has_norm(folded)
        assert [p.dtype for p in folded.parameters()] == [dtype, dtype]
        x = randn(*shape)
        with torch.no_grad():
            want = copy.deepcopy(model).double()(x)
            got = copy.deepcopy(folded).double()(x)
        unit = torch.finfo(dtype).eps / 2
        slack = 64 * torch.finfo(torch.float64).eps  # of both sums
        size = absolute(folded.get_submodule("0"), x) + want.abs()
        plain = copy.deepcopy(model).double()
        size64 = size + absolute(plain[0], x) * 100
        assert ((got - want).abs() <= 1.01 * unit * size + slack * size64).all()
        if dtype == torch.bfloat16 or dtype == torch.float16:
            x = x.to(dtype)
            with torch.no_grad():
                want, got = copy.deepcopy(model).double()(x.double()), folded(x).double()
            terms = folded.get_submodule("0").weight[0].numel() + 2
            bound = (4 * unit + terms * 2.0**-23) * (absolute(folded.get_submodule("0"), x.double()) + want.abs())
            assert ((got - want).abs() <= bound).all()


@pytest.mark.parametrize(("n", "groups"), [(1, 1), (2, 2), (3, 1)])
def test_agrees_with_pytorchs_own_fusion(n, groups):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    layer, _ = some_layer("conv", n, groups, True)
    model = trained(nn.Sequential(layer, NORMS[n](6))).double()
    peer = fuse_conv_bn_eval(model[0], model[1])
    folded, _ = fold(model)
    own = folded.get_submodule("0")
    torch.testing.assert_close(own.weight, peer.weight, rtol=8 * torch.finfo(torch.float64).eps, atol=0)
    torch.testing.assert_close(own.bias, peer.bias, rtol=1e-13, atol=64 * torch.finfo(torch.float64).eps)


def test_negative_and_zero_scales_and_a_variance_that_eps_saves():
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, eps=1e-3))).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([-2.0, 0.0, 3.0]))
        model[1].running_var.copy_(torch.tensor([-1e-5, 1e-36, 9.8e7]))
    folded, report = fold(model)
    assert report.decisions[0].changes[0].zero_gamma == (1,)
    assert report.decisions[0].changes[0].negative_gamma == (0,)
    assert_same(model, folded, randn(2, 2, 3, 3))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_a_bad_variance_names_its_layer(bad):
    model = trained(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    model[1].running_var[2] = bad
    with pytest.raises(ValueError, match=r"BatchNorm2d '1': .*running_var|BatchNorm2d '1': .*var.*channel 2"):
        fold(model)


# Forward, through other operations, in pairs --------------------------------------------------------------------


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Model(nn.Module):
    """Named parts and a forward that is a function of them."""

    def __init__(self, run, **parts):
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.run(self, x)


def conv(c_in=3, c_out=4, kernel=1, **options):
    return nn.Conv2d(c_in, c_out, kernel, **options)


def image(c=3, size=6):
    return randn(2, c, size, size)


seq = nn.Sequential
FOLDS = {
    "into conv behind": (lambda: seq(nn.BatchNorm2d(3), conv(kernel=3)), image(), [FOLDED]),
    "into conv behind, groups": (lambda: seq(nn.BatchNorm2d(4), conv(4, 4, 3, groups=2)), image(4), [FOLDED]),
    "into conv behind, pads 0 to a kernel of 1": (
        lambda: seq(nn.BatchNorm2d(3), conv(padding=1), nn.ReLU(), conv(4, 2)), image(), [LEFT]),
    "into conv behind, zeros": (lambda: seq(nn.BatchNorm2d(3), conv(kernel=3, padding=1)), image(), [LEFT]),
    "into conv behind, same": (lambda: seq(nn.BatchNorm2d(3), conv(kernel=3, padding="same")), image(), [LEFT]),
    "into conv behind, valid": (lambda: seq(nn.BatchNorm2d(3), conv(kernel=3, padding="valid")), image(), [FOLDED]),
    "into conv behind, reflected": (
        lambda: seq(nn.BatchNorm2d(3), conv(kernel=3, padding=1, padding_mode="reflect")), image(), [FOLDED]),
    "into conv behind, circular": (
        lambda: seq(nn.BatchNorm2d(3), conv(kernel=3, padding=2, padding_mode="circular")), image(), [FOLDED]),
    "conv that reflects": (
        lambda: seq(conv(kernel=3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)), image(), [FOLDED]),
    "into transposed behind": (lambda: seq(nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 2, 3)), image(), [LEFT]),
    "both sides": (lambda: seq(nn.BatchNorm2d(3), conv(), nn.BatchNorm2d(4)), image(), [FOLDED, FOLDED]),
    "two in a row": (lambda: seq(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), image(), [FOLDED, FOLDED]),
    "merged": (lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.ReLU()), image(),
               [MERGED, REWRITTEN]),
    "relu between": (lambda: seq(conv(), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU()), image(), [LEFT]),
    "relu behind, in place": (lambda: seq(conv(), nn.BatchNorm2d(4), nn.ReLU(True), conv(4, 2)), image(), [FOLDED]),
    "zeros around": (lambda: seq(conv(), nn.ZeroPad2d(1), nn.BatchNorm2d(4)), image(), [LEFT]),
    "values around": (lambda: seq(conv(), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1), nn.BatchNorm2d(4)),
                      image(), [FOLDED]),
    "pad": (lambda: Model(lambda m, x: m.c(F.pad(m.b(x), (1, 1, 2, 0), "circular")), c=conv(), b=nn.BatchNorm2d(3)),
            image(), [FOLDED]),
    "pad with ones": (lambda: Model(lambda m, x: m.c(F.pad(m.b(x), (1, 1), value=1.0)), c=conv(),
                                    b=nn.BatchNorm2d(3, affine=False)), image(), [LEFT]),
    "dropout, identity": (
        lambda: seq(conv(), nn.Dropout(), nn.Dropout2d(inplace=True), nn.Identity(), nn.BatchNorm2d(4)),
        image(), [FOLDED]),
    "avg pool": (lambda: seq(conv(), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.BatchNorm2d(4)),
                 image(), [FOLDED]),
    "avg pool that counts zeros": (lambda: seq(conv(), nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(4)),
                                   image(), [LEFT]),
    "avg pool, ceil": (lambda: seq(conv(), nn.AvgPool2d(4, ceil_mode=True), nn.BatchNorm2d(4)), image(), [FOLDED]),
    "avg pool, divisor": (lambda: seq(conv(), nn.AvgPool2d(2, divisor_override=3), nn.BatchNorm2d(4)),
                          image(), [LEFT]),
    "adaptive": (lambda: seq(conv(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4)), image(), [FOLDED]),
    "max pool, signs differ": (lambda: seq(conv(), nn.MaxPool2d(2), nn.BatchNorm2d(4)), image(), [LEFT]),
    "max pool": (lambda: seq(conv(), nn.MaxPool2d(2, padding=1), nn.BatchNorm2d(4, affine=False)), image(), [FOLDED]),
    "linear": (lambda: seq(nn.Flatten(), nn.Linear(108, 4), nn.BatchNorm1d(4)), image(), [FOLDED]),
    "flatten behind": (lambda: seq(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 4)), image(), [FOLDED]),
    "flatten behind conv": (lambda: seq(conv(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4)),
                            image(), [FOLDED]),
    "view": (lambda: Model(lambda m, x: m.b(m.p(m.c(x)).view(x.size(0), -1)), c=conv(), p=nn.AdaptiveAvgPool2d(1),
                           b=nn.BatchNorm1d(4)), image(), [FOLDED]),
    "view of itself": (lambda: Model(lambda m, x: m.l((y := m.b(x)).view(y.shape[0], -1)), b=nn.BatchNorm2d(3),
                                     l=nn.Linear(108, 2)), image(), [FOLDED]),
    "mean": (lambda: Model(lambda m, x: m.l(m.b(x).mean((2, 3))), b=nn.BatchNorm2d(3), l=nn.Linear(3, 2)),
             image(), [FOLDED]),
    "mean over channels": (lambda: Model(lambda m, x: m.l(m.b(x).mean((1, 3))), b=nn.BatchNorm2d(3),
                                         l=nn.Linear(6, 2)), image(), [LEFT]),
    "constants": (lambda: Model(lambda m, x: (1 - m.b(m.c(x) * 2.0 + 0.5) / 3) - 4, c=conv(), b=nn.BatchNorm2d(4)),
                  image(), [FOLDED]),
    "constant behind": (lambda: Model(lambda m, x: -m.b(F.relu(x)) * 2, b=nn.BatchNorm2d(3)), image(), [REWRITTEN]),
    "divided by": (lambda: Model(lambda m, x: m.b(2 / m.c(x)), c=conv(), b=nn.BatchNorm2d(4)), image(), [LEFT]),
    "alpha": (lambda: Model(lambda m, x: m.b(torch.add(m.c(x), 2.0, alpha=3)), c=conv(), b=nn.BatchNorm2d(4)),
              image(), [LEFT]),
    "floor": (lambda: Model(lambda m, x: m.b(torch.div(m.c(x), 2.0, rounding_mode="floor")), c=conv(),
                            b=nn.BatchNorm2d(4)), image(), [LEFT]),
    "cat": (lambda: Model(lambda m, x: m.b(torch.cat([m.c(x), m.d(x)], 1)), c=conv(), d=conv(3, 2),
                          b=nn.BatchNorm2d(6)), image(), [FOLDED]),
    "cat with the input": (lambda: Model(lambda m, x: m.b(torch.cat([m.c(x), x], 1)), c=conv(), b=nn.BatchNorm2d(7)),
                           image(), [LEFT]),
    "cat behind": (lambda: Model(lambda m, x: m.d(torch.cat([m.b(x), x], dim=1)), d=conv(6, 2), b=nn.BatchNorm2d(3)),
                   image(), [FOLDED]),
    "residual": (lambda: Model(lambda m, x: m.b(m.c(x)) + x, c=conv(3, 3), b=nn.BatchNorm2d(3)), image(), [FOLDED]),
    "residual, in place": (lambda: Model(lambda m, x: operator.iadd(m.b(m.c(x)), x), c=conv(3, 3),
                                         b=nn.BatchNorm2d(3)), image(), [FOLDED]),
    "two readers": (lambda: Model(lambda m, x: m.b(y := m.c(x)) + y, c=conv(), b=nn.BatchNorm2d(4)), image(), [LEFT]),
    "two readers in front": (lambda: Model(lambda m, x: m.c(y := m.b(x)) + m.d(y), b=nn.BatchNorm2d(3), c=conv(),
                                           d=conv()), image(), [FOLDED]),
    "one of two readers": (lambda: Model(lambda m, x: (m.c(y := m.b(x)), y), b=nn.BatchNorm2d(3), c=conv()),
                           image(), [LEFT]),
    "an output": (lambda: Model(lambda m, x: (y := m.c(x), m.b(y)), b=nn.BatchNorm2d(4), c=conv()), image(), [LEFT]),
    "no reader but the size": (lambda: Model(lambda m, x: m.b(y := m.c(x)) * y.shape[0], b=nn.BatchNorm2d(4),
                                             c=conv()), image(), [FOLDED]),
    "in place, before": (lambda: Model(lambda m, x: m.b(m.c(x).mul_(2.0)), b=nn.BatchNorm2d(4), c=conv()),
                         image(), [LEFT]),
    "in place, a statement": (lambda: Model(lambda m, x: (y := m.c(x), y.relu_(), m.b(y))[2], b=nn.BatchNorm2d(4),
                                            c=conv()), image(), [LEFT]),
    "in place, through a view": (
        lambda: Model(lambda m, x: (y := m.c(x), z := m.i(y), F.relu(y, True), m.b(z))[3], b=nn.BatchNorm2d(4),
                      c=conv(), i=nn.Identity()), image(), [LEFT]),
    "in place, afterwards": (
        lambda: Model(lambda m, x: (y := F.relu(x), z := m.b(y), y.mul_(3.0), m.c(z))[3], b=nn.BatchNorm2d(3),
                      c=conv()), image(), [LEFT]),
    "in place, afterwards, behind": (
        lambda: Model(lambda m, x: (y := F.relu(x), z := m.i(y) * 2, y.mul_(3.0), m.b(z))[3], b=nn.BatchNorm2d(3),
                      i=nn.Identity()), image(), [LEFT]),
    "setitem": (lambda: Model(lambda m, x: (y := m.c(x), operator.setitem(y, 0, 1.0), m.b(y))[2], b=nn.BatchNorm2d(4),
                              c=conv()), image(), [LEFT]),
    "linear on four axes": (lambda: seq(nn.Linear(6, 3), nn.BatchNorm2d(3)), image(), [LEFT]),
    "in training": (lambda: seq(conv(), nn.BatchNorm2d(4)), None, [LEFT]),
    "sync": (lambda: seq(conv(), nn.SyncBatchNorm(4)), image(), [FOLDED]),
    "dropout in training": (lambda: seq(conv(), nn.Dropout().train(), nn.BatchNorm2d(4)), None, [LEFT]),
}  # fmt: skip


NEED_SHAPES = {"flatten behind conv", "view"}


@pytest.mark.parametrize("given_inputs", [False, True], ids=["", "example_inputs"])
@pytest.mark.parametrize("name", FOLDS)
def test_what_folds_and_what_stays(name, given_inputs):
    build, x, expected = FOLDS[name]
    model = trained(build().double())
    if x is None:
        x = image()
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.Dropout)) and "training" in name:
                module.train(isinstance(module, nn.Dropout) == ("dropout" in name))
        before = snapshot(model)
        folded, report = fold(model)
        assert actions(report) == [LEFT]
        check_unchanged(before, model)
        return
    before = snapshot(model)
    folded, report = fold(model, example_inputs=x if given_inputs else None)
    check_unchanged(before, model)
    expected = [LEFT] if name in NEED_SHAPES and not given_inputs else expected
    assert actions(report) == expected, str(report)
    assert_same(model, folded, x)
    assert storages(model).isdisjoint(storages(folded))
    assert has_norm(folded) == (not set(expected) <= {FOLDED})
    assert report.nodes_after <= report.nodes_before
    held = [*folded.parameters(), *(b for b in folded.buffers() if b.is_floating_point())]
    assert report.parameters_after == sum(t.numel() for t in held)


# Numbers of axes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forward", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_folded_layer_refuses_inputs_that_batch_norm_would_read_otherwise(kind, forward):
    layer = nn.Linear(4, 4) if kind == "linear" else nn.Conv1d(4, 4, 1)
    good, bad = (randn(4, 4), randn(4, 4, 4)) if kind == "linear" else (randn(4, 4, 4), randn(4, 4))
    model = trained(seq(*([nn.BatchNorm1d(4), layer] if forward else [layer, nn.BatchNorm1d(4)])).double())
    folded, report = fold(model)
    assert actions(report) == [FOLDED]
    name = "1" if forward else "0"
    for result in folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded)), torch.fx.symbolic_trace(folded):
        assert_same(model, result, good)
        with pytest.raises(ValueError, match=rf"{name}: expected an input with {good.dim()} axes.*example_inputs"):
            result(bad)
        assert set(result.state_dict()) == {f"{name}.weight", f"{name}.bias"}
    again, report = fold(folded)
    assert len(report) == 0
    with pytest.raises(ValueError, match="axes"):
        again(bad)
    for x in good, bad:  # what folds, or not, where the shape is known
        folded, report = fold(model, example_inputs=x)
        assert actions(report) == [FOLDED if x is good else LEFT]
        assert_same(model, folded, x)
    assert "channels are on axis" in reasons(report)


def test_a_guard_reads_keywords():
    model = trained(Model(lambda m, x: m.b(m.c(input=x)), c=nn.Linear(4, 4), b=nn.BatchNorm1d(4)).double())
    folded, report = fold(model)
    assert actions(report) == [FOLDED]
    with pytest.raises(ValueError, match="axes"):
        folded(randn(4, 4, 4))


def test_convolutions_of_a_single_image():
    model = trained(seq(conv(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)).double())
    x = randn(3, 6, 6)  # 4 channels that flatten takes for the batch
    folded, report = fold(model, example_inputs=x)
    assert actions(report) == [FOLDED]
    assert_same(model, folded, x)


@pytest.mark.parametrize("n", [2, 5])
def test_shapes_let_a_map_pass_reshapes_and_transposes(n):
    def run(m, x):
        y = m.c(x)
        n, c, h, w = y.shape
        return m.b(y.permute(0, 2, 3, 1).contiguous().view(n, h * w, c).transpose(1, 2).unsqueeze(3).squeeze(-1))

    def behind(m, x):
        return m.l(m.b(F.relu(x)).flatten(2).transpose(-1, -2).reshape(-1, 6, 3))

    for model in (
        trained(Model(run, c=conv(3, 4), b=nn.BatchNorm1d(4)).double()),
        trained(Model(behind, b=nn.BatchNorm2d(3), l=nn.Linear(3, 2)).double()),
    ):
        folded, report = fold(model, example_inputs=randn(2, 3, 2, 3))
        assert actions(report) == [FOLDED], str(report)
        assert_same(model, folded, randn(n, 3, 2, 3))
        assert actions(fold(model)[1]) == [LEFT]


def test_a_reshape_of_the_batch_is_no_reshape_of_the_channels():
    model = trained(Model(lambda m, x: m.l(m.b(x).reshape(3, -1)), b=nn.BatchNorm1d(3), l=nn.Linear(2, 2)).double())
    folded, report = fold(model, example_inputs=randn(2, 3))
    assert actions(report) == [LEFT]
    assert_same(model, folded, randn(2, 3))


def test_chunks():
    def run(m, x):
        a, b = m.c(x).chunk(2, 1)
        return m.b(a), b

    model = trained(Model(run, c=conv(3, 4), b=nn.BatchNorm2d(2)).double())
    folded, report = fold(model, example_inputs=image())
    assert actions(report) == [FOLDED]
    assert_same(model, folded, image())

    def behind(m, x):
        a, b = torch.split(m.b(x), [1, 2], 1)
        return m.c(a) + m.d(b)

    model = trained(Model(behind, b=nn.BatchNorm2d(3), c=conv(1, 2), d=conv(2, 2)).double())
    folded, report = fold(model, example_inputs=image())
    assert actions(report) == [FOLDED]
    assert_same(model, folded, image())
    assert actions(fold(model)[1]) == [LEFT]


def test_example_inputs_leave_no_trace_and_are_checked():
    model = trained(seq(conv(), nn.BatchNorm2d(4), nn.Dropout()).double())
    model.train()
    before = snapshot(model)
    folded, report = fold(model, example_inputs=(image(),))
    check_unchanged(before, model)
    assert folded.training
    assert actions(report) == [LEFT]
    assert "training" in reasons(report)
    assert torch.equal(folded.get_submodule("1").running_mean, model[1].running_mean)
    with pytest.raises(ValueError, match="example_inputs: expected what the model can be called with"):
        fold(model, example_inputs=randn(2, 7))


class AnyRank(nn.BatchNorm2d):
    def _check_input_dim(self, x):
        pass


def test_a_subclass_that_reads_any_number_of_axes_tells_none():
    model = trained(seq(nn.Linear(4, 4), AnyRank(4)).double())
    folded, report = fold(model)
    assert_same(model, folded, randn(3, 4))
    with pytest.raises(ValueError, match="axes"):
        folded(randn(3, 4, 4, 4))
    model = trained(seq(nn.Linear(4, 4), nn.BatchNorm2d(4)).double())
    folded, report = fold(model)
    assert actions(report) == [LEFT]
    assert_same(model, folded, randn(3, 4, 4, 4))


# Constants ------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.c, self.b = conv(), nn.BatchNorm2d(4)
        self.register_buffer("factor", factor)

    def forward(self, x):
        return self.b(self.c(x) * self.factor)


@pytest.mark.parametrize(
    ("factor", "action"),
    [
        (torch.tensor(3.0, dtype=torch.float64), FOLDED),
        (randn(4, 1, 1), FOLDED),
        (randn(1, 4, 1, 1), FOLDED),
        (randn(1, 4, 1, 1).float(), FOLDED),
        (torch.arange(4).reshape(4, 1, 1), LEFT),  # integers are no floats to fastbn, and no matter
        (randn(6), LEFT),
        (randn(4, 1, 6), LEFT),
        (randn(1, 1, 1, 1), FOLDED),
    ],
)
def test_constant_tensors(factor, action):
    model = trained(Scaled(factor).double() if factor.dtype == torch.float64 else Scaled(factor))
    if factor.dtype != torch.float64:
        model.c.double(), model.b.double()
    folded, report = fold(model, example_inputs=image())
    assert actions(report) == [action]
    assert_same(model, folded, image())
    assert ("factor" in folded.state_dict()) == (action == LEFT)


def test_a_constant_that_changes_the_dtype_stays():
    def run(m, x):
        return m.b((m.c(x) * m.factor).to(torch.float32))

    model = trained(Model(run, c=conv(), b=nn.BatchNorm2d(4)))
    model.register_buffer("factor", randn(4, 1, 1))
    for inputs in None, image().float():
        folded, report = fold(model, example_inputs=inputs)
        assert actions(report) == [LEFT]
        assert_same(model, folded, image().float())

    wide = Scaled(randn(4, 1, 1))
    wide.b.double()
    wide = trained(wide)
    for inputs in None, image().float():
        folded, report = fold(wide, example_inputs=inputs)
        assert actions(report) == [LEFT]
        assert_same(wide, folded, image().float())


def test_a_constant_that_the_model_writes_to_is_none():
    def run(m, x):
        m.factor.add_(1)
        return m.b(m.c(x) * m.factor)

    model = trained(Model(run, c=conv(), b=nn.BatchNorm2d(4)).double())
    model.register_buffer("factor", torch.ones((), dtype=torch.float64))
    folded, report = fold(model)
    assert actions(report) == [LEFT]
    twice = copy.deepcopy(model)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(twice(image()), folded(image()))


# Never folded as if plain ---------------------------------------------------------------------------------------


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2 + x.mean()


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.abs(), bias)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class OwnCall(nn.Conv2d):
    def __call__(self, x):
        return super().__call__(x) * 2


class PlainConv(nn.Conv2d):
    """Adds nothing to forward."""


class Passes(nn.BatchNorm2d):
    pass


def replaced_forward():
    model = seq(conv(), nn.BatchNorm2d(4))
    model[0].forward = lambda x: F.conv2d(x, model[0].weight, model[0].bias).abs()
    return model


def hooked(index, register, hook):
    def build():
        model = seq(conv(), nn.BatchNorm2d(4))
        getattr(model[index], register)(hook)
        return model

    return build


def double_output(module, args, output):
    return output * 2


def double_input(module, args):
    return (args[0] * 2,)


def keep_gradient(module, grad_input, grad_output):
    return None


def shared_parameter():
    model = Model(lambda m, x: m.b(m.c(x)) + m.d(x), c=conv(), d=conv(), b=nn.BatchNorm2d(4))
    model.d.weight = model.c.weight
    return model


def shared_storage():
    model = Model(lambda m, x: m.b(m.c(x)) + m.d(x), c=conv(bias=False), d=conv(), b=nn.BatchNorm2d(4))
    flat = torch.randn(24, dtype=torch.float64)
    model.c.weight = nn.Parameter(flat[:12].view(4, 3, 1, 1))
    model.d.weight = nn.Parameter(flat[12:].view(4, 3, 1, 1))
    return model


def weight_read_elsewhere():
    return Model(lambda m, x: m.b(m.c(x)) + m.c.weight.sum(), c=conv(), b=nn.BatchNorm2d(4))


def called_twice():
    return Model(lambda m, x: m.b(m.c(x)) + m.c(x + 1), c=conv(), b=nn.BatchNorm2d(4))


def norm_called_twice():
    return Model(lambda m, x: m.b(m.c(x)) + m.b(m.d(x)), c=conv(), d=conv(), b=nn.BatchNorm2d(4))


def two_names():
    part = conv()
    return Model(lambda m, x: m.b(m.c(x)) + m.d(x), c=part, d=part, b=nn.BatchNorm2d(4))


def container_with_a_hook():
    inner = seq(conv(), nn.BatchNorm2d(4))
    inner.register_forward_hook(double_output)
    return seq(inner, nn.ReLU())


def inner_part_called_too():
    inner = seq(conv(), nn.BatchNorm2d(4))
    inner.register_forward_hook(double_output)
    return Model(lambda m, x: m.inner(x) + m.b(m.inner[0](x)), inner=inner, b=nn.BatchNorm2d(4))


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return seq(nn.utils.weight_norm(conv()), nn.BatchNorm2d(4))


REFUSALS = {
    "forward": (lambda: seq(OwnConv(3, 4, 1), nn.BatchNorm2d(4)), "a forward of its own"),
    "_conv_forward": (lambda: seq(OwnConvForward(3, 4, 1), nn.BatchNorm2d(4)), "a forward of its own"),
    "a norm's forward": (lambda: seq(conv(), OwnNorm(4)), "a forward of its own"),
    "__call__": (lambda: seq(OwnCall(3, 4, 1), nn.BatchNorm2d(4)), "a forward of its own"),
    "forward attribute": (replaced_forward, "a forward of its own"),
    "hook": (hooked(0, "register_forward_hook", double_output), "hooks"),
    "pre-hook": (hooked(0, "register_forward_pre_hook", double_input), "hooks"),
    "hook of the norm": (hooked(1, "register_forward_hook", double_output), "hooks"),
    "pre-hook of the norm": (hooked(1, "register_forward_pre_hook", double_input), "hooks"),
    "backward hook": (hooked(0, "register_full_backward_hook", keep_gradient), "hooks"),
    "weight_norm": (lambda: seq(parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)), "parametrized"),
    "spectral_norm": (lambda: seq(parametrizations.spectral_norm(conv()), nn.BatchNorm2d(4)), "parametrized"),
    "old weight_norm": (old_weight_norm, "hooks"),
    "a shared parameter": (shared_parameter, "shares its parameters"),
    "a shared storage": (shared_storage, "shares its parameters"),
    "a parameter read elsewhere": (weight_read_elsewhere, "used more than once"),
    "called twice": (called_twice, "used more than once"),
    "a norm called twice": (norm_called_twice, "used more than once"),
    "two names": (two_names, "more than once"),
    "a container with a hook": (container_with_a_hook, "hooks"),
    "a part of it, called too": (inner_part_called_too, "used more than once"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_plain_stays(name):
    build, reason = REFUSALS[name]
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            trained(module)
    model.eval()
    before = snapshot(model)
    folded, report = fold(model)
    check_unchanged(before, model)
    assert set(actions(report)) == {LEFT}
    assert reason in reasons(report)
    with torch.no_grad():
        assert torch.equal(model(image()), folded(image()))
    assert storages(model).isdisjoint(storages(folded))


def test_subclasses_that_add_nothing_fold():
    model = trained(seq(PlainConv(3, 4, 1), Passes(4)).double())
    folded, report = fold(model)
    assert actions(report) == [FOLDED]
    assert type(folded.get_submodule("0")) is PlainConv
    assert_same(model, folded, image())


def test_hooks_of_the_root_are_kept():
    model = trained(seq(conv(), nn.BatchNorm2d(4)).double())
    model.register_forward_hook(double_output)
    folded, report = fold(model)
    assert actions(report) == [LEFT]
    assert "hooks" in reasons(report)
    with torch.no_grad():
        assert torch.equal(model(image()), folded(image()))


def test_lazy_meta_and_other_tensors_stay():
    for model, reason in [
        (seq(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)), "lazy|hooks"),
        (seq(conv(), nn.LazyBatchNorm2d()), "lazy|hooks"),
        (seq(conv(), nn.BatchNorm2d(4)).to("meta"), "device meta"),
        (seq(conv(), nn.BatchNorm2d(4, track_running_stats=False)), "no running statistics"),
        (seq(conv(dtype=torch.complex64), nn.BatchNorm2d(4)), "complex64"),
    ]:
        folded, report = fold(model.eval())
        assert actions(report) == [LEFT]
        assert any(part in reasons(report) for part in reason.split("|"))
        assert len(list(folded.parameters())) == len(list(model.parameters()))


def test_what_is_kept_beside_the_folded_layers():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = seq(conv(kernel=3).to(memory_format=torch.channels_last), nn.BatchNorm2d(4))
            self.unused = nn.Linear(2, 2)
            self.own = nn.Parameter(torch.ones(3))
            self.register_buffer("table", torch.arange(3.0))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)
            self.tail = seq(nn.Dropout(), conv(4, 4, 3), nn.BatchNorm2d(4))

        def forward(self, x, flag=None, twice=False):
            y = self.tail(self.stem(x))
            if flag is not None:
                y = y + flag
            return {"y": y * 2 if twice else y}

    model = trained(Whole().double())
    model.stem[0].weight.requires_grad_(False)
    model.tail.train()
    model.tail[2].eval()
    folded, report = fold(model)
    assert actions(report) == [FOLDED, FOLDED]
    gone = {name for name in model.state_dict() if name.startswith(("stem.1.", "tail.2."))}
    assert set(folded.state_dict()) == set(model.state_dict()) - gone
    assert not folded.get_submodule("stem.0").weight.requires_grad
    assert folded.get_submodule("tail.1").weight.requires_grad
    assert {n for n, _ in folded.named_buffers()} == {"table", "scratch"}
    assert [folded.training, folded.get_submodule("tail").training, folded.get_submodule("tail.0").training] == [
        False, True, True]  # fmt: skip
    model.eval(), folded.eval()
    for arguments in ((), (None, False)):
        torch.testing.assert_close(folded(image(), *arguments)["y"], model(image())["y"], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(folded(x=image(), flag=None)["y"], model(image())["y"], rtol=1e-11, atol=1e-11)
    for other in {"flag": image(4, 1)}, {"twice": True}:  # what tracing has fixed is refused, not ignored
        with pytest.raises(AssertionError, match="specialized"):
            folded(image(), **other)
    weight = folded.get_submodule("stem.0").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


# What cannot be traced ------------------------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        inner = seq(conv(4, 4), nn.BatchNorm2d(4))
        self.body = seq(conv(), nn.BatchNorm2d(4), nn.ReLU(), inner)
        self.loose, self.loose_bn = conv(4, 4), nn.BatchNorm2d(4)
        self.twice = seq(conv(4, 4), nn.BatchNorm2d(4))
        self.again = self.twice
        self.head = seq(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.again(self.twice(self.loose_bn(self.loose(self.body(x)))))
        return self.head(y.mean((2, 3)))


def test_sequentials_of_a_model_that_cannot_be_traced():
    model = trained(Branches().double())
    before = snapshot(model)
    folded, report = fold(model)
    check_unchanged(before, model)
    what = {decision.node: decision.action for decision in report}
    assert what == {"body.1": FOLDED, "body.3.1": FOLDED, "head.1": FOLDED, "loose_bn": LEFT, "twice.1": LEFT}
    assert "taken to be called as a whole" in report.decisions[0].reason
    assert "TraceError" in report.decisions[0].reason
    assert type(folded.body[1]) is nn.Identity
    assert folded.twice is folded.again
    assert_same(model, folded, image())
    assert storages(model).isdisjoint(storages(folded))
    with pytest.raises(ValueError, match="head.0: expected an input with 2 axes"):
        folded.head(randn(4, 4, 4))
    assert report.nodes_after == report.nodes_before - 3


def test_a_layer_in_two_sequentials_stays():
    def run(m, x):
        return m.a(x) + m.b(x) if x.sum() < 1e9 else x

    shared = conv()
    model = trained(Model(run, a=seq(shared, nn.BatchNorm2d(4)), b=seq(shared, nn.BatchNorm2d(4))).double())
    folded, report = fold(model)
    assert actions(report) == [LEFT, LEFT]
    assert_same(model, folded, image())


def test_random_numbers_and_single_layers_are_not_traced():
    def noisy(m, x):
        return m.body(x) + torch.rand(1, dtype=torch.float64)

    model = trained(Model(noisy, body=seq(conv(), nn.BatchNorm2d(4))).double())
    before = snapshot(model)
    folded, report = fold(model)
    check_unchanged(before, model)
    assert actions(report) == [FOLDED]
    assert "random numbers" in reasons(report)
    torch.manual_seed(0)
    first = folded(image())
    assert not torch.equal(first, folded(image()))
    for single in nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1):
        folded, report = fold(single.eval())
        assert type(folded) is type(single)
        assert folded is not single
        assert actions(report) == [LEFT] * isinstance(single, nn.BatchNorm2d)


@pytest.mark.parametrize("wrong", [None, 3, {"0.weight": torch.ones(2)}, torch.ones(2)])
def test_other_types(wrong):
    with pytest.raises(TypeError, match="module: expected a torch.nn.Module"):
        fold(wrong)


# Functions with constants ---------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, n, transposed=False, bias=True):
        super().__init__()
        self.layer = (TRANSPOSED if transposed else CONVS)[n](4, 6, 3, groups=2, bias=bias)
        self.norm = NORMS[n](6)
        self.call = getattr(F, f"conv_transpose{n}d" if transposed else f"conv{n}d")

    def forward(self, x):
        y = self.call(x, self.layer.weight, self.layer.bias, groups=2)
        return F.batch_norm(y, self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_functions(n, transposed, bias):
    model = trained(Functional(n, transposed, bias).double())
    x = randn(*(2, 4, 5, 5, 5)[: n + 2])
    folded, report = fold(model, example_inputs=x)
    assert actions(report) == [FOLDED]
    assert_same(model, folded, x)
    assert not has_norm(folded)
    assert len(list(folded.parameters())) == 2


class Matrix(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bias = nn.Parameter(torch.randn(6)) if bias else None
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.1)

    def forward(self, x):
        return F.batch_norm(F.linear(x, self.weight, self.bias), self.mean, self.var, eps=1e-3)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_functions(bias):
    model = Matrix(bias).double().eval()
    folded, report = fold(model, example_inputs=randn(5, 4))
    assert actions(report) == [FOLDED]
    assert_same(model, folded, randn(5, 4))
    assert len(folded.state_dict()) == 2
    _, report = fold(model)  # on three axes it would be another function, and no function checks
    assert actions(report) == [LEFT]


def test_functions_in_training_stay():
    def run(m, x):
        return F.batch_norm(m.c(x), m.b.running_mean, m.b.running_var, training=True)

    model = trained(Model(run, c=conv(), b=nn.BatchNorm2d(4)).double())
    assert "training" in reasons(fold(model)[1])


# Exported programs ----------------------------------------------------------------------------------------------


def exported(model, *inputs, dynamic=True):
    shapes = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of its own copies of trees
        return torch.export.export(model, inputs, dynamic_shapes=shapes)


def decomposed(program):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return program.run_decompositions()


def called(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kind", "n", "groups"), LAYERS)
def test_programs(kind, n, groups, bias):
    layer, shape = some_layer(kind, n, groups, bias)
    model = trained(seq(layer, NORMS[n](6), nn.ReLU()).double())
    x = randn(*shape)
    program = exported(model, x)
    for original in program, decomposed(program):
        before = {name: (t.data_ptr(), t.clone()) for name, t in original.state_dict.items()}
        code = original.graph_module.code
        folded, report = fold(original)
        assert report.decisions[0][:3] == ("1", FOLDED, ("0",))
        assert not any("batch_norm" in target for target in called(folded))
        assert set(folded.state_dict) == {"0.weight", "0.bias"}
        assert report.parameters_after == sum(t.numel() for t in folded.state_dict.values())
        more = torch.cat([x, x + 1])
        with torch.no_grad():
            want = model(more)
            got = folded.module()(more)
        bound = 1024 * torch.finfo(torch.float64).eps * float(want.abs().max() + 1)
        assert float((got - want).abs().max()) <= bound
        assert code == original.graph_module.code
        assert [(t.data_ptr(), True) for t in original.state_dict.values()] == [
            (place, torch.equal(t, original.state_dict[name])) for name, (place, t) in before.items()]  # fmt: skip
        old = {t.untyped_storage().data_ptr() for t in original.state_dict.values()}
        assert old.isdisjoint(t.untyped_storage().data_ptr() for t in folded.state_dict.values())
        assert str(folded.range_constraints) == str(original.range_constraints)


PROGRAMS = {
    **{name: FOLDS[name] for name in FOLDS if FOLDS[name][1] is not None},
    "merged, the second plain": (
        lambda: seq(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.ReLU()), image(),
        [MERGED, REWRITTEN]),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_of_all_patterns(name):
    build, x, _ = PROGRAMS[name]
    model = trained(build().double())
    program = exported(model, x)
    folded, report = fold(program)
    with torch.no_grad():
        want, got = model(x.clone()), folded.module()(x.clone())
    for a, b in zip(*(y if isinstance(y, tuple) else (y,) for y in (want, got)), strict=True):
        bound = (1 << 14) * torch.finfo(torch.float64).eps * max(1.0, float(a.abs().max()))
        assert float((a - b).abs().max()) <= bound
    _, with_shapes = fold(model, example_inputs=x)
    counted = [report.count(FOLDED), with_shapes.count(FOLDED)]
    assert counted[0] == counted[1], str(report)


def test_a_program_in_training_mode_stays():
    model = seq(conv(), nn.BatchNorm2d(4)).double()
    folded, report = fold(exported(model, image()))
    assert actions(report) == [LEFT]
    assert any("batch_norm" in target for target in called(folded))
    assert "training" in reasons(report)


def test_shared_parameters_of_a_program_stay():
    model = trained(shared_parameter().double())
    folded, report = fold(exported(model, image()))
    assert actions(report) == [LEFT]
    with torch.no_grad():
        assert torch.equal(folded.module()(image()), model(image()))


# Files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    return exported(trained(seq(conv(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).double()), image())


def test_a_program_goes_through_a_file(program, tmp_path):
    interop.save(program, tmp_path / "in.pt2")
    loaded = interop.load(tmp_path / "in.pt2")
    folded, report = fold(loaded)
    assert actions(report) == [FOLDED]
    interop.save(folded, tmp_path / "out.pt2")
    result = interop.load(tmp_path / "out.pt2").module()
    x = randn(5, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(result(x), program.module()(x), rtol=1e-12, atol=1e-12)


def test_sizes_and_guards_that_are_formulas_are_read(tmp_path):
    class Halves(nn.Module):
        def forward(self, x, y):
            assert x.shape[0] % 2 == 0
            return x.view(x.shape[0] // 2, -1), y["a"] + y["b"][0], torch.einsum("ij,kj->ik", x, x)

    dynamic = {0: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Halves(), (torch.randn(8, 4), {"a": torch.randn(3, 3), "b": [torch.randn(3, 3)]}),
            dynamic_shapes={"x": dynamic, "y": {"a": dynamic, "b": [dynamic]}},
        )  # fmt: skip
    interop.save(program, tmp_path / "p.pt2")
    loaded = interop.load(tmp_path / "p.pt2")
    assert loaded._guards_code == program._guards_code
    assert len(loaded._guards_code) > 2


def rewritten(path, target, change, extra=None):
    """Write the archive anew with one changed record."""
    records = zipfile.ZipFile(path)
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name in records.namelist():
            data = records.read(name)
            archive.writestr(name, change(data) if name.endswith(target) else data)
        for name, data in (extra or {}).items():
            root = "" if name.startswith("/") else records.namelist()[0].split("/")[0] + "/"
            archive.writestr(root + name.removeprefix("/"), data)
    path.write_bytes(content.getvalue())


class Trap:
    def __reduce__(self):
        return (exec, ("import sys; sys.modules['fastbn_trap'] = sys",))


def torch_saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def edit(change):
    def apply(data):
        tree = json.loads(data)
        change(tree)
        return json.dumps(tree).encode()

    return apply


CODE = "__import__('sys').modules.__setitem__('fastbn_trap', 1)"


def payload(**items):
    return edit(lambda tree: tree["config"]["0.weight"].update(items))


def in_graph(change):
    return edit(lambda tree: change(tree["graph_module"]["graph"]))


TRAPS = {
    "example inputs": ("sample_inputs/model.pt", lambda _: torch_saved((Trap(),)), {}),
    "a weight": ("weights_config.json", payload(use_pickle=True), {}),
    "an opaque constant": (
        "constants_config.json",
        lambda _: json.dumps({"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True,
                                               "tensor_meta": None}}}).encode(),
        {"data/constants/opaque_obj_0": pickle.dumps(Trap())}),
    "old weights": ("no", None, {"data/weights/model.pt": torch_saved(Trap())}),
    "old constants": ("no", None, {"data/constants/model.pt": torch_saved(Trap())}),
    "compiled code": ("no", None, {"data/aotinductor/model/x.so": b"\x7fELF"}),
    "an older format": (
        "model.json", lambda data: data.replace(b"aten.conv2d.default", b"aten.none.default"),
        {"/version": b"8.1", "/serialized_state_dict.pt": torch_saved(Trap()), "/serialized_constants.pt": b"",
         "/serialized_example_inputs.pt": b"", "/serialized_exported_program.json": b"{}"}),
    "a size": ("models/model.json", lambda data: data.replace(b"Symbol('s", f"{CODE}+Symbol('s".encode()), {}),
    "a name": ("models/model.json", lambda data: data.replace(b'"input"', f'"input={CODE}"'.encode()), {}),
    "a guard": ("models/model.json", edit(lambda tree: tree.update(guards_code=[CODE])), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_no_code_in_a_program_runs(name, program, tmp_path):
    path = tmp_path / "p.pt2"
    interop.save(program, path)
    rewritten(path, "nothing", None)
    interop.load(path)  # it is not the archive anew that is refused
    target, change, extra = TRAPS[name]
    rewritten(path, target, change, extra)
    with pytest.raises(ValueError, match=r"p\.pt2: expected an exported program") as caught:
        interop.load(path)
    assert "\n" not in str(caught.value)
    assert "not loaded" in str(caught.value)
    assert "fastbn_trap" not in sys.modules


def test_other_operators_in_a_program_are_refused(program, tmp_path):
    path = tmp_path / "p.pt2"
    interop.save(program, path)
    rewritten(path, "model.json", lambda data: data.replace(b"torch.ops.aten.conv2d.default", b"torch.os.system"))
    with pytest.raises(ValueError, match=r"p\.pt2"):
        interop.load(path)


def test_other_files_are_no_programs(tmp_path):
    for name, content in [("a.pt2", b"text"), ("b.pt2", b""), ("c.pt2", torch_saved({"a": torch.ones(2)}))]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: expected an exported program") as caught:
            interop.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        interop.load(tmp_path / "none.pt2")


def test_what_can_be_saved(program, tmp_path):
    with pytest.raises(TypeError, match="program: expected an ExportedProgram, got Linear"):
        interop.save(nn.Linear(2, 2), tmp_path / "a.pt2")
    with pytest.raises(ValueError, match="ends in .pt2"):
        interop.save(program, tmp_path / "a.pt")


def test_state_dicts_go_through_files(tmp_path):
    state = seq(conv(), nn.BatchNorm2d(4)).state_dict()
    for legacy in False, True:
        interop.save_state_dict(state, tmp_path / "a.pt")
        if legacy:
            torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        loaded = interop.load_state_dict(tmp_path / "a.pt")
        assert list(loaded) == list(state)
        assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_other_files_are_no_state_dicts(program, tmp_path):
    torch.save(seq(conv()), tmp_path / "module.pt")
    torch.save(Trap(), tmp_path / "trap.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_bytes(b"some text")
    (tmp_path / "empty.pt").write_bytes(b"")
    interop.save(program, tmp_path / "program.pt2")
    (tmp_path / "program.pt2").rename(tmp_path / "program.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(seq(nn.ReLU())), tmp_path / "script.pt")
    for name, text in [
        ("module.pt", "a pickled object.*torch.export.export"),
        ("trap.pt", "a pickled object"),
        ("list.pt", "got list"),
        ("text.pt", "expected a state dict"),
        ("empty.pt", "expected a state dict"),
        ("program.pt", "an exported program"),
        ("script.pt", "TorchScript.*torch.export.export"),
    ]:
        with pytest.raises(ValueError, match=rf"{name}: .*{text}") as caught:
            interop.load_state_dict(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "fastbn_trap" not in sys.modules


# One BatchNorm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("affine", "tracks"), [(True, True), (False, True), (True, False)])
def test_one_layer_goes_there_and_back(affine, tracks, dtype):
    layer = trained(nn.BatchNorm2d(3, eps=1e-3, affine=affine, track_running_stats=tracks, dtype=dtype))
    if tracks:
        layer.num_batches_tracked.fill_(7)
    state = {f"a.{name}": tensor for name, tensor in layer.state_dict().items()}
    bn = from_state_dict(state, "a.", eps=1e-3, momentum=None)
    assert (bn.affine, bn.track_running_stats, bn.momentum, bn.eps) == (affine, tracks, None, 1e-3)
    assert bn.num_batches_tracked == (7 if tracks else 0)
    assert bn.training
    back = to_state_dict(bn, "a.")
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert back[name].dtype == tensor.dtype
        assert back[name].data_ptr() != tensor.data_ptr()
    other = nn.BatchNorm2d(3, eps=1e-3, affine=affine, track_running_stats=tracks, dtype=dtype).eval()
    other.load_state_dict(to_state_dict(bn))
    x = randn(4, 3, 5, 5, dtype=dtype)
    want, got = bn.eval()(x.numpy()), other(x).detach().numpy()
    size = np.abs(want).max() + 100 * np.abs(x.numpy()).max()
    assert np.abs(want - got).max() <= 8 * torch.finfo(dtype).eps * size
    (bn.gamma if affine else bn.running_mean)[0] = 99
    key = "a.weight" if affine else "a.running_mean"
    assert torch.equal(back[key], state[key])


def test_half_types_become_float32():
    layer = nn.BatchNorm1d(3).to(torch.bfloat16)
    assert from_state_dict(layer.state_dict()).dtype == np.float32
    assert from_state_dict(layer.state_dict(), dtype=np.float64).dtype == np.float64


def test_both_train_alike():
    layer, x = nn.BatchNorm1d(3), randn(8, 3, dtype=torch.float32)
    bn = from_state_dict(layer.state_dict())
    layer(x), bn(x.numpy())
    for name, tensor in to_state_dict(bn).items():
        torch.testing.assert_close(tensor, layer.state_dict()[name], rtol=4 * torch.finfo(torch.float32).eps, atol=1e-7)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "expected a BatchNorm's parameters or statistics under ''"),
        ({"weight": torch.ones(2)}, "expected 'bias' beside 'weight'"),
        ({"running_var": torch.ones(2)}, "expected 'running_mean' beside 'running_var'"),
        ({"weight": torch.ones(2), "bias": torch.ones(3)}, r"got \(3,\) at 'bias'"),
        ({"weight": torch.ones(2, 2), "bias": torch.ones(2, 2)}, r"expected shape \(C,\)"),
        ({"weight": np.ones(2), "bias": torch.ones(2)}, "ndarray"),
        ({"weight": torch.ones(2, device="meta"), "bias": torch.ones(2)}, "meta"),
    ],
)
def test_state_dicts_that_are_none(state, text):
    with pytest.raises(ValueError, match=text):
        from_state_dict(state)


def test_layers_that_no_state_dict_holds():
    with pytest.raises(ValueError, match="activation, got 'relu'"):
        to_state_dict(fastbn.BatchNorm(3, activation="relu"))
    with pytest.raises(TypeError, match="bn: expected a fastbn.BatchNorm, got BatchNorm1d"):
        to_state_dict(nn.BatchNorm1d(3))


def test_without_torch(monkeypatch):
    names = [name for name in sys.modules if name.startswith("fastbn.interop.torch")]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'fastbn.interop.torch needs torch: pip install "fastbn\[torch\]"'):
        __import__("fastbn.interop.torch")


# Whatever the model ---------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """Steps of a drawn program; each names a value that it reads and what it does with it."""

    def __init__(self, draw):
        super().__init__()
        self.parts = nn.ModuleList()
        self.steps = []
        shapes = [(2, 3, 4, 4)]
        for _ in range(draw(st.integers(2, 9))):
            source = len(shapes) - 1 - draw(st.sampled_from([0] * 9 + [1, 2]))
            source = max(source, 0)
            shape = shapes[source]
            kinds = ["again", "relu", "relu_", "scale", "pass", "add", "cat", "chunk", *["bn", "layer"] * 6]
            kind = draw(st.sampled_from([*kinds, *(["pool", "flat"] if len(shape) == 4 else [])]))
            part, other = None, None
            flat = len(shape) == 2
            if kind == "bn":
                norm = nn.BatchNorm1d if flat else nn.BatchNorm2d
                part = norm(shape[1], affine=draw(st.booleans()))
            elif kind == "layer":
                c, bias = draw(st.integers(2, 4)), draw(st.booleans())
                if flat:
                    part = nn.Linear(shape[1], c, bias=bias)
                else:
                    kernel, padding = draw(st.sampled_from([(1, 0), (3, 1), (1, 1)]))
                    depthwise = draw(st.integers(0, 3)) == 0
                    c = shape[1] if depthwise else c
                    part = nn.Conv2d(shape[1], c, kernel, padding=padding, bias=bias, groups=c if depthwise else 1)
                    shape = (*shape[:2], *(s + 2 * padding - kernel + 1 for s in shape[2:]))
                shape = (shape[0], c, *shape[2:])
            elif kind == "again":
                fitting = [i for i, (k, *_, s, t) in enumerate(self.steps) if k in ("bn", "layer") and s == shape == t]
                if not fitting:
                    continue
                kind, part = "module", self.steps[fitting[-1]][2]
            elif kind == "pass":
                part = draw(st.sampled_from([nn.Identity(), nn.Dropout(), nn.Dropout(inplace=True)]))
            elif kind == "pool":
                part = draw(st.sampled_from([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1)]))
                shape = (*shape[:2], *((s + 2 * getattr(part, "padding", 0)) // 2 for s in shape[2:]))
                if 0 in shape:
                    continue
            elif kind == "flat":
                part = nn.Flatten()
                shape = (shape[0], int(np.prod(shape[1:])))
            elif kind in ("add", "cat"):
                same = [i for i, s in enumerate(shapes) if s == shape]
                other = draw(st.sampled_from(same))
                shape = (shape[0], 2 * shape[1], *shape[2:]) if kind == "cat" else shape
            elif kind == "chunk":
                if shape[1] % 2:
                    continue
                other = draw(st.integers(0, 1))
                shape = (shape[0], shape[1] // 2, *shape[2:])
            elif kind == "scale":
                other = draw(st.sampled_from([2.0, -0.5, 3]))
            self.steps.append((kind, source, part, other, shapes[source], shape))
            shapes.append(shape)
            if part is not None and not any(part is p for p in self.parts):
                self.parts.append(part)
        self.more = draw(st.integers(0, 3)) == 0

    def forward(self, x):
        values = [x]
        for kind, source, part, other, *_ in self.steps:
            y = values[source]
            if part is not None:
                y = part(y)
            elif kind == "relu":
                y = F.relu(y)
            elif kind == "relu_":
                y = F.relu_(y) if source else F.relu(y)
            elif kind == "scale":
                y = y * other + 1
            elif kind == "add":
                y = y + values[other]
            elif kind == "cat":
                y = torch.cat([y, values[other]], 1)
            elif kind == "chunk":
                y = torch.chunk(y, 2, 1)[other]
            values.append(y)
        return (values[-1], values[len(values) // 2]) if self.more else values[-1]


@st.composite
def drawn(draw):
    with torch.random.fork_rng(devices=[]):
        return trained(Drawn(draw).double(), seed=draw(st.integers(0, 2**31)))


@given(model=drawn(), given_inputs=st.booleans(), seed=st.integers(0, 2**31))
def test_any_model_stays_the_same_function(model, given_inputs, seed):
    x = randn(2, 3, 4, 4, seed=seed)
    before = snapshot(model)
    folded, report = fold(model, example_inputs=x if given_inputs else None)
    check_unchanged(before, model)
    assert storages(model).isdisjoint(storages(folded))
    assert_same(model, folded, x, ulps=1 << 20)
    assert_same(model, folded, randn(3, 3, 4, 4, seed=seed), ulps=1 << 20)
    assert len(report) >= len({id(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)})


@settings(max_examples=12)
@given(model=drawn())
def test_any_program_stays_the_same_function(model):
    x = randn(2, 3, 4, 4)
    if not model.steps:
        return
    with torch.no_grad():  # with gradients a part of a Split must not be changed in place
        program = exported(model, x)
    folded, _ = fold(program)
    module = folded.module()
    assert_same(model, module, x, ulps=1 << 20)
    assert_same(model, module, randn(3, 3, 4, 4), ulps=1 << 20)


# Real models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models():
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):  # a build for another torch cannot load its operators; the models need none
        with contextlib.suppress(RuntimeError):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchvision").models


@pytest.mark.parametrize(
    ("name", "folds", "stays"),
    [("resnet18", 20, 0), ("mobilenet_v2", 52, 0), ("densenet121", 59, 62), ("shufflenet_v2_x0_5", 56, 0),
     ("googlenet", 57, 2)],
)  # fmt: skip
def test_models_of_torchvision(models, name, folds, stays):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, **options).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor, low in (module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.1), (
                        module.running_mean, -0.1):  # fmt: skip
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * 2 * abs(low) + low)
    model = model.double()
    folded, report = fold(model)
    assert (len(report.folded), len(report.left)) == (folds, stays)
    assert report.nodes_after == report.nodes_before - folds
    assert_same(model, folded, randn(1, 3, 32, 32), ulps=1 << 20)


def test_folding_in_inference_mode_is_the_same():
    module = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).eval()
    with torch.inference_mode():
        made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        x = torch.rand(2, 6, 5)
        folded, report = fold(module, example_inputs=x)
        assert report.decisions[0].action == "left"
        assert torch.equal(folded(x), module(x))
        assert fold(made)[1].decisions[0].reason == "backward"


class Taps(nn.Module):
    """Uses a nn.Sequential in parts, in one of several ways, and cannot be traced."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        assert x.shape[1] == 3
        match self.way:
            case "each":
                taps = []
                for layer in self.features:
                    x = layer(x)
                    taps.append(x)
                return tuple(taps)
            case "slices":
                y = self.features[:1](x)
                return y, self.features[1:](y)
            case "one":
                return self.features[0](x), self.features(x)
            case "weight":
                return self.features(x) + self.features[0].weight.sum()
            case "whole":
                return self.features(x)


def randomised(module):
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_()
    return module.eval()


@pytest.mark.parametrize("way", ["each", "slices", "one", "weight", "whole"])
def test_a_sequential_that_is_not_called_as_a_whole(way):
    module, x = randomised(Taps(way)), torch.rand(2, 3, 6, 6)
    folded, report = fold(module)
    assert [decision.action for decision in report] == [FOLDED]
    if way == "whole":
        for copied in (folded, copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
            torch.testing.assert_close(copied(x), module(x), rtol=1e-5, atol=1e-5)
            with pytest.raises(ValueError, match="features: expected the nn.Sequential to be called as a whole"):
                copied.features[0](x)
            with pytest.raises(AssertionError):
                copied(x[:, :2])
    elif way != "weight":  # which no hook can see
        with pytest.raises(ValueError, match="features: expected the nn.Sequential to be called as a whole"):
            folded(x)
    state = torch.get_rng_state()
    folded, report = fold(module, example_inputs=x)
    assert torch.equal(state, torch.get_rng_state())
    assert [decision.action for decision in report] == [FOLDED if way == "whole" else LEFT]
    result, expected = folded(x), module(x)
    for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (result, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_unknown_shape_asks_for_example_inputs():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            a, b = self.conv(x).chunk(2, 1)
            return self.bn(a) + b

    module = randomised(Halves())
    assert "the shape is not known, give example_inputs=" in fold(module)[1].decisions[0].reason
    assert fold(module, example_inputs=torch.rand(1, 3, 4, 4))[1].decisions[0].action == FOLDED
