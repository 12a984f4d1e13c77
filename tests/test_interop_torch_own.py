"""PyTorch's own cases for BatchNorm, with fastbn's layers in the place of its own.

Its test suite is not in its wheel, but the data that the suite runs on is: `torch.testing._internal` has the module
forms and the samples of the operator. What the suite's files test of BatchNorm beyond that is written here anew.
"""

import copy
import gc
import inspect
import io
import itertools
import pickle
import warnings
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")
_WHY = "the module forms and operator samples of PyTorch's own suite: pip install expecttest"
modules = pytest.importorskip("torch.testing._internal.common_modules", reason=_WHY, exc_type=ImportError)
methods = pytest.importorskip("torch.testing._internal.common_methods_invocations", reason=_WHY, exc_type=ImportError)

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd import gradcheck, gradgradcheck  # noqa: E402
from torch.testing import make_tensor  # noqa: E402
from torch_norms import DTYPES, assert_forward, assert_gradients, randn, same_bits  # noqa: E402

from fastbn.interop.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm  # noqa: E402

OURS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}
INFOS = [info for info in modules.module_db if info.module_cls in OURS]
F64 = torch.float64

# The operator's samples have momenta outside of [0, 1] and inputs without channels, which are left to PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:fastbn:UserWarning")


def near(a, b, dtype):
    """Whether `a`, computed in `dtype`, is `b`, of float64, to rounding (the samples have no large numbers)."""
    ulps = {torch.float32: 64, torch.float64: 256}.get(dtype, 8)
    scale = 1 + b.abs().max() if b.numel() else 1
    return a.shape == b.shape and bool(((a.double() - b).abs() <= ulps * torch.finfo(dtype).eps * scale).all())


# Module forms ---------------------------------------------------------------------------------------------------


def forms(dtype, training):
    """Return (our class, PyTorch's class, ModuleInput) of every form."""
    torch.manual_seed(0)
    for info in INFOS:
        for form in info.module_inputs_func(info, "cpu", dtype, True, training):
            yield OURS[info.module_cls], info.module_cls, form


def built(kind, form, dtype, training):
    given = form.constructor_input
    layer = kind(*given.args, **given.kwargs, dtype=dtype).train(training)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(make_tensor(parameter.shape, device="cpu", dtype=dtype, low=0.5, high=2))
    return layer


EVERY = [
    pytest.param(dtype, training, i, id=f"{info}-{form}-{str(dtype)[6:]}-{'train' if training else 'eval'}")
    for dtype, training in itertools.product(DTYPES, [True, False])
    for i, (info, form) in enumerate(
        (info.module_cls.__name__, form.desc or "plain")
        for info in INFOS
        for form in info.module_inputs_func(info, "cpu", torch.float32, False, True)
    )
]  # fmt: skip
every_form = pytest.mark.parametrize(("dtype", "training", "i"), EVERY)
float64_forms = pytest.mark.parametrize(("dtype", "training", "i"), [p for p in EVERY if p.values[0] == F64])


def form_of(dtype, training, i):
    """Return our layer, PyTorch's with the same numbers, the arguments of a call, and the form."""
    ours, theirs, form = next(itertools.islice(forms(dtype, training), i, None))
    layers = built(ours, form, dtype, training), built(theirs, form, dtype, training)
    return *layers, form.forward_input.args[0], form


def test_there_are_forms_of_every_layer():
    assert {info.module_cls for info in INFOS} == set(OURS)
    assert len(EVERY) >= 8 * 20


@every_form
def test_forward_and_backward(dtype, training, i):
    """PyTorch's own in float64 is the judge."""
    ours, theirs, x, form = form_of(dtype, training, i)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.double()
    leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    if form.reference_fn is not None:
        assert near(ours(leaf), form.reference_fn(theirs, wide), dtype)
    y, want = ours(leaf), theirs(wide)
    assert y.dtype == dtype
    assert y.stride() == want.stride()
    assert near(y, want, dtype)
    dy = randn(*x.shape, seed=3, dtype=dtype)
    y.backward(dy), want.backward(dy.double())
    assert near(leaf.grad, wide.grad, dtype)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert p.grad.dtype == p.dtype
        assert near(p.grad, q.grad, dtype), name
    for p, q in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert near(p, q, dtype) if p.is_floating_point() else p == q
    again = copy.deepcopy(ours)
    assert same_bits(again(leaf), ours(leaf))


@float64_forms
def test_gradcheck_and_gradgradcheck(dtype, training, i):
    ours, _, x, _ = form_of(dtype, training, i)
    if x.numel() > 200:
        x = x[:, :, :3, :2]
    state = {k: v.clone() for k, v in ours.named_buffers()}
    names = [name for name, _ in ours.named_parameters()]

    def function(x, *parameters):
        values = dict(zip(names, parameters, strict=True)) | {k: v.clone() for k, v in state.items()}
        return torch.func.functional_call(ours, values, (x,))

    leaves = x.detach().clone().requires_grad_(), *ours.parameters()
    assert gradcheck(function, leaves, nondet_tol=0.0)
    assert gradgradcheck(function, leaves, nondet_tol=0.0)


@every_form
def test_memory_that_is_not_contiguous(dtype, training, i):
    """The input, the incoming gradient and the parameters as every other element of a larger tensor."""
    ours, _, x, _ = form_of(dtype, training, i)
    dy = randn(*x.shape, seed=3, dtype=dtype)
    results = []
    for spread in False, True:
        layer, leaf = copy.deepcopy(ours), torch.stack([x.detach(), x.detach()], -1)[..., 0] if spread else x.detach()
        if spread:
            for p in layer.parameters():
                p.data = torch.stack([p.data, p.data], -1)[..., 0]
        leaf.requires_grad_()
        y = layer(leaf)
        y.backward(torch.stack([dy, dy], -1)[..., 0] if spread else dy)
        results.append([y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@every_form
def test_memory_formats(dtype, training, i):
    ours, theirs, x, _ = form_of(dtype, training, i)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if form is None or x.numel() == 0:
        return
    y = ours.to(memory_format=form)(x.detach().contiguous(memory_format=form))
    assert y.is_contiguous(memory_format=form)
    want = theirs.double()(x.detach().double())
    assert near(y, want, dtype)
    assert ours(x.detach()).is_contiguous()


@every_form
def test_copies_pickles_and_factory_arguments(dtype, training, i):
    ours, theirs, x, form = form_of(dtype, training, i)
    given = form.constructor_input
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    y = ours(x)
    for other in copies:
        assert same_bits(other(x), y)
        for a, b in zip(other.state_dict().values(), ours.state_dict().values(), strict=True):
            assert same_bits(a, b)
            assert a.data_ptr() != b.data_ptr() or a.numel() == 0
    assert repr(ours) == "fastbn." + repr(theirs)
    meta = type(ours)(*given.args, **given.kwargs, device="meta", dtype=dtype)
    assert all(t.is_meta and (t.dtype == dtype or name == "num_batches_tracked")
               for name, t in meta.state_dict().items())  # fmt: skip
    assert all(t.dtype == dtype for t in ours.parameters())
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    theirs.load_state_dict(torch.load(file, weights_only=True))
    ours.load_state_dict(theirs.state_dict())


def test_error_forms():
    found = 0
    for info in INFOS:
        if info.module_error_inputs_func is None:
            continue
        for error in info.module_error_inputs_func(info, "cpu", torch.float32, False, True):
            given = error.module_error_input
            layer = OURS[info.module_cls](*given.constructor_input.args, **given.constructor_input.kwargs)
            with pytest.raises(error.error_type) as theirs:
                info.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)(
                    *given.forward_input.args
                )
            with pytest.raises(error.error_type) as ours:
                layer(*given.forward_input.args)
            assert str(ours.value) == str(theirs.value)
            found += 1
    assert found or not any(info.module_error_inputs_func for info in INFOS)


# Samples of the operator ------------------------------------------------------------------------------------------

OPERATORS = [op for op in methods.op_db if op.name == "nn.functional.batch_norm"]


def samples(dtype, grad=False):
    for op in OPERATORS:
        if dtype not in op.dtypes:  # a variant for CUDA alone
            continue
        torch.manual_seed(2)
        yield from op.sample_inputs("cpu", dtype, requires_grad=grad)
        yield from op.reference_inputs("cpu", dtype, requires_grad=grad)


def call(function, sample, x, args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return function(x, *args, **sample.kwargs)


def test_there_are_samples_of_the_operator():
    assert len(list(samples(torch.float32))) >= 20
    assert any(s.kwargs.get("training") for s in samples(torch.float32))
    assert any(not s.kwargs.get("training") for s in samples(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples_of_the_operator(dtype):
    """y, the gradients and the running statistics are those of PyTorch's operator in float64."""
    for sample in samples(dtype):
        given = [sample.input, *sample.args]
        ours = [None if t is None else t.detach().clone() for t in given]
        theirs = [None if t is None else t.detach().double() for t in given]
        leaves = [0, *(i for i in (3, 4) if given[i] is not None)]
        for i, tensors in itertools.product(leaves, (ours, theirs)):
            tensors[i].requires_grad_()
        y, want = (call(f, sample, t[0], t[1:]) for f, t in ((batch_norm, ours), (F.batch_norm, theirs)))
        assert y.dtype == dtype
        assert near(y, want, dtype), sample
        dy = randn(*y.shape, seed=5, dtype=dtype)
        y.backward(dy), want.backward(dy.double())
        for i in leaves:
            if theirs[i].grad is not None:
                assert near(ours[i].grad, theirs[i].grad, dtype), (i, sample)
        for i in 1, 2:
            if given[i] is not None:
                assert near(ours[i], theirs[i].detach(), dtype), (i, sample)


def test_gradcheck_and_gradgradcheck_of_the_samples_of_the_operator():
    for sample in samples(F64, grad=True):
        given = [sample.input, *sample.args]
        leaves = [t.detach().clone().requires_grad_() for t in given if t is not None and t.requires_grad]
        statistics = [None if t is None else t.clone() for t in given[1:3]]

        def function(x, *parameters, statistics=statistics, sample=sample, given=given):
            parameters = iter(parameters)
            rest = [None if t is None else next(parameters) for t in given[3:]]
            running = [None if t is None else t.clone() for t in statistics]
            return call(batch_norm, sample, x, [*running, *rest])

        assert gradcheck(function, leaves, nondet_tol=0.0), sample
        assert gradgradcheck(function, leaves, nondet_tol=0.0), sample


def test_error_samples_of_the_operator():
    """There are none in 2.13; the day there are, they hold here."""
    for op in OPERATORS:
        if op.error_inputs_func is None:
            continue
        for error in op.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type, match=error.error_regex):
                batch_norm(sample.input, *sample.args, **sample.kwargs)


def test_the_signatures_are_pytorchs():
    """Then come the keywords of the fused forms."""
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (F.batch_norm, batch_norm))
    assert [(p.name, p.default, p.kind) for p in ours[: len(theirs)]] == [(p.name, p.default, p.kind) for p in theirs]
    assert [(p.name, p.default, p.kind.name) for p in ours[len(theirs) :]] == [
        ("relu", False, "KEYWORD_ONLY"),
        ("residual", None, "KEYWORD_ONLY"),
    ]
    for plain, kind in OURS.items():
        assert inspect.signature(kind) == inspect.signature(plain)
        assert kind.__name__ == plain.__name__


# What test/test_nn.py and test/nn/ test of BatchNorm --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_twice_gives_the_same_and_moves_nothing(dtype):
    """And a layer without running statistics may be evaluated, by those of the batch."""
    bn, x = BatchNorm1d(3, dtype=dtype).eval(), randn(4, 3, dtype=dtype)
    first = bn(x)
    assert same_bits(first, bn(x))
    assert not bn.running_mean.any()
    assert bn.num_batches_tracked == 0
    assert not same_bits(BatchNorm1d(3, dtype=dtype, track_running_stats=False).eval()(x), first)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (4, 3, 6, 6), (4, 3, 2, 6, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_dtypes_in_training_and_evaluation(dtype, shape, training):
    """Half-type input, float32 layer: what PyTorch's float32 layer gives on the same numbers, rounded once."""
    kind = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}[len(shape)]
    mixed, plain = kind(3).train(training), getattr(nn, kind.__name__)(3).train(training)
    x = randn(*shape, dtype=dtype, grad=True)
    wide = x.detach().float().requires_grad_()
    y, want = mixed(x), plain(wide)
    dy = randn(*shape, seed=1, dtype=dtype)
    y.backward(dy), want.backward(dy.float())
    assert y.dtype == x.grad.dtype == dtype
    eps = torch.finfo(dtype).eps
    for a, b in (y, want), (x.grad, wide.grad):
        assert ((a.float() - b).abs() <= eps * b.abs() + 2**-18 * (1 + b.abs().max())).all()
    for a, b in zip(mixed.parameters(), plain.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert ((a.grad - b.grad).abs() <= 2**-15 * (1 + b.grad.abs().max())).all()
    for a, b in zip(mixed.buffers(), plain.buffers(), strict=True):
        assert ((a - b).abs() <= 2**-18).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 8, 10, 10), (4, 1, 9, 9), (1, 9, 16, 16)])
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_gives_what_contiguous_gives(shape, training, dtype):
    results = []
    for form in torch.contiguous_format, torch.channels_last:
        bn = BatchNorm2d(shape[1], dtype=dtype).train(training)
        x = randn(*shape, dtype=dtype).contiguous(memory_format=form).requires_grad_()
        dy = randn(*shape, seed=1, dtype=dtype).contiguous(memory_format=form)
        y = bn(x)
        y.backward(dy)
        assert y.is_contiguous(memory_format=form)
        assert x.grad.is_contiguous(memory_format=form)
        stats = None if training else (bn.running_mean, bn.running_var)
        assert_forward(y, x, bn.weight, bn.bias, stats=stats)
        assert_gradients(dy, y, x, bn.weight, (x.grad, bn.weight.grad, bn.bias.grad), stats=stats)
        results.append((y, x.grad))
    for a, b in zip(*results, strict=True):
        assert ((a - b).abs().double() <= 8 * torch.finfo(dtype).eps * (1 + b.abs().max())).all()


@pytest.mark.parametrize("training", [True, False])
def test_two_rows_of_a_transposed_matrix(training):
    """Sizes of 1 and strides that mean nothing beside them."""
    for x in randn(4, 1, 1, 1), randn(1, 4, 2, 1), randn(2, 3, 1, 1).transpose(2, 3), randn(2, 1, 5, 5)[:, :, :, :1]:
        x = x.as_strided(x.shape, [s if n > 1 else 77 for n, s in zip(x.shape, x.stride(), strict=True)])
        ours, theirs = BatchNorm2d(x.shape[1]).train(training), nn.BatchNorm2d(x.shape[1]).train(training)
        assert near(ours(x), theirs.double()(x.double()), torch.float32)


def test_a_half_type_does_not_overflow_inside():
    """Sums and squares of float16 values far beyond what float16 holds."""
    x = randn(2, 3, 40, 40, dtype=torch.float16) * 8000
    y = BatchNorm2d(3)(x)
    assert y.isfinite().all()
    assert_forward(y, x, torch.ones(3), torch.zeros(3))
    bn = BatchNorm2d(3)
    bn(x)
    assert (bn.running_var > 1e6).all()
    assert bn.running_var.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_statistics_of_a_layer_that_stops_tracking_them(training):
    """track_running_stats set to False later: in training they stay, in evaluation they are used."""
    ours, theirs = BatchNorm2d(3), nn.BatchNorm2d(3)
    x = randn(4, 3, 2, 2)
    for layer in ours, theirs:
        layer(x)
        layer.track_running_stats = False
        layer.train(training)
    assert near(ours(x + 1), theirs(x + 1).double(), torch.float32)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert near(a, b.double(), torch.float32)


def test_the_simple_average_is_that_of_all_batches():
    """momentum=None: each batch counts the same, from a fresh start after reset_running_stats too."""
    bn = BatchNorm1d(3, momentum=None, dtype=F64)
    for _ in range(2):
        batches = [randn(5, 3, seed=s, dtype=F64) + s for s in range(6)]
        for x in batches:
            bn(x)
        assert near(bn.running_mean, torch.stack([x.mean(0) for x in batches]).mean(0), F64)
        assert near(bn.running_var, torch.stack([x.var(0) for x in batches]).mean(0), F64)
        bn.reset_running_stats()
        assert not bn.running_mean.any()
        assert (bn.running_var == 1).all()
        assert bn.num_batches_tracked == 0


def test_running_statistics_are_used_in_evaluation_and_moved_in_training():
    """The statistics of 1,000 batches are those of the numbers that they were drawn from."""
    bn = BatchNorm1d(2, dtype=F64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        bn(torch.randn(64, 2, generator=generator, dtype=F64) * 3 + 5)
    noise = 6 * 3 / (64 * 19) ** 0.5  # six standard deviations of an average with weights 0.1·0.9ᵏ
    assert ((bn.running_mean - 5).abs() < noise).all()
    assert ((bn.running_var - 9).abs() < 6 * 9 * (2 / (64 * 19)) ** 0.5).all()
    bn.eval()
    x = torch.full((1, 2), 5.0, dtype=F64)
    assert (bn(x).abs() < noise / 2.5).all()


def test_old_state_dicts_without_a_count_load():
    """Version 1 of the format had no num_batches_tracked."""
    bn = BatchNorm2d(3)
    bn.num_batches_tracked.fill_(7)
    old = {k: v.clone() + 1 for k, v in BatchNorm2d(3).state_dict().items() if k != "num_batches_tracked"}
    bn.load_state_dict(old)
    assert bn.num_batches_tracked == 7
    assert (bn.running_mean == 1).all()
    assert BatchNorm2d(3).state_dict()._metadata == nn.BatchNorm2d(3).state_dict()._metadata
    new = BatchNorm2d(3).state_dict()
    del new["running_mean"]
    with pytest.raises(RuntimeError, match="running_mean"):
        bn.load_state_dict(new)
    with pytest.raises(RuntimeError, match="size mismatch"):
        bn.load_state_dict(BatchNorm2d(4).state_dict())


def test_layers_of_the_two_libraries_take_each_others_state_inside_a_model():
    def model(norm):
        return nn.Sequential(nn.Linear(4, 3), norm(3), nn.Sequential(norm(3)))

    ours, theirs = model(BatchNorm1d), model(nn.BatchNorm1d)
    ours(randn(8, 4))
    assert theirs.load_state_dict(ours.state_dict()) == ([], [])
    assert ours.load_state_dict(theirs.state_dict()) == ([], [])
    assert near(ours.eval()(randn(8, 4)), theirs.eval()(randn(8, 4)).double(), torch.float32)


def test_the_lazy_layers_of_pytorch_are_its_own_still():
    lazy = nn.LazyBatchNorm2d()
    lazy(randn(2, 3, 4, 4))
    assert type(lazy) is nn.BatchNorm2d


def test_instance_norm_and_group_norm_do_not_change():
    x = randn(2, 4, 5, 5)
    by_hand = batch_norm(x.reshape(1, 8, 5, 5), None, None, training=True).view_as(x)
    assert near(by_hand, F.instance_norm(x.double()), torch.float32)


def test_a_large_batch_and_many_channels():
    for shape in ((50_000, 4), (3, 5000, 2), (2, 3, 300, 100)):
        kind = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d}[len(shape)]
        bn, x, dy = kind(shape[1]), randn(*shape, grad=True), randn(*shape, seed=1)
        y = bn(x)
        y.backward(dy)
        assert_forward(y, x, bn.weight, bn.bias)
        assert_gradients(dy, y, x, bn.weight, (x.grad, bn.weight.grad, bn.bias.grad))


def test_nothing_is_kept_when_the_graph_goes():
    """No reference cycle holds a batch: memory goes with the last reference, without the garbage collector."""
    bn = BatchNorm2d(3)
    gc.disable()
    try:
        x = randn(4, 3, 5, 5, grad=True)
        y = bn(x)
        watched = weakref.ref(y), weakref.ref(x)
        y.sum().backward()
        del y, x
        assert watched[0]() is None
        assert watched[1]() is None
    finally:
        gc.enable()
