"""BatchNorm for PyTorch in its autograd: modes, graphs, what is saved, and what happens to it in between."""

import copy
import io
import itertools
import math
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.autograd import forward_ad, gradcheck, gradgradcheck  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from torch_norms import DTYPES, assert_forward, assert_gradients, randn, same_bits  # noqa: E402

from fastbn.interop.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAddReLU,
    BatchNormReLU,
    batch_norm,
)

KINDS = [BatchNorm2d, BatchNormReLU, BatchNormAddReLU]
F64 = torch.float64


class Parts(nn.BatchNorm2d):
    """What a fused layer does, of PyTorch's own operators."""

    def __init__(self, kind, c, **options):
        super().__init__(c, **options)
        self.kind = kind

    def _check_input_dim(self, input):
        pass

    def forward(self, input, *residual):
        y = super().forward(input)
        for r in residual:
            y = y + r
        return y if self.kind is BatchNorm2d else y.relu()


def pair(kind, c=3, dtype=F64, **options):
    """Return a layer and PyTorch's own of the same state: parameters and statistics of no special value."""
    ours, theirs = kind(c, dtype=dtype, **options), Parts(kind, c, dtype=dtype, **options)
    with torch.no_grad():
        for i, (name, t) in enumerate(theirs.state_dict().items()):
            if name != "num_batches_tracked":
                t.copy_(randn(*t.shape, seed=20 + i, dtype=dtype).abs() + 0.5)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(kind, *shape, dtype=F64, seed=0, grad=True):
    """Return (x,) or (x, residual), leaves; where ReLU follows, no result comes near 0, where it has no derivative."""
    return tuple(randn(*shape, seed=seed + i, dtype=dtype, grad=grad) for i in range(1 + (kind is BatchNormAddReLU)))


def near(a, b, ulps=2**12):
    a, b = a.detach(), b.detach()
    scale = 1 + float(b.abs().max()) if b.numel() else 1
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a - b).abs() <= ulps * 2**-53 * scale).all())


# First and second derivatives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("form", ["plain", "relu", "residual", "residual relu"])
def test_gradcheck_and_gradgradcheck_hold_in_float64(form, shape, affine, training):
    relu, with_residual = "relu" in form, "residual" in form
    leaves = [randn(*shape, seed=3, dtype=F64, grad=True)]
    leaves += [randn(3, seed=s, dtype=F64, grad=True) for s in (1, 2)] if affine else []
    leaves += [randn(*shape, seed=4, dtype=F64, grad=True)] if with_residual else []
    mean, var = randn(3, seed=5, dtype=F64), randn(3, seed=6, dtype=F64).abs() + 0.5

    def function(x, *rest):
        weight, bias = rest[:2] if affine else (None, None)
        return batch_norm(
            x, mean.clone(), var.clone(), weight, bias, training, eps=0.1, relu=relu,
            residual=rest[-1] if with_residual else None,
        )  # fmt: skip

    with torch.no_grad():
        y = function(*leaves)
        assert not relu or ((y == 0).any() and y[y > 0].min() > 1e-4)  # both sides of the kink, and not on it
    assert gradcheck(function, leaves)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_penalty_is_that_of_pytorch(kind, training):
    """Here the incoming gradient of the first backward pass depends on x itself, which gradgradcheck never draws."""
    ours, theirs = (layer.train(training) for layer in pair(kind))
    found = []
    for layer in ours, theirs:
        leaves = inputs(kind, 4, 3, 2, 3)
        y = layer(*leaves)
        grads = torch.autograd.grad(y.pow(3).sum(), (*leaves, *layer.parameters()), create_graph=True)
        sum(g.pow(2).sum() for g in grads).backward()
        found.append([leaf.grad for leaf in (*leaves, *layer.parameters())])
    assert all(near(a, b, 2**24) for a, b in zip(*found, strict=True))


def test_second_derivatives_too_are_zero_where_relu_gives_zero():
    """Exactly 0, that is, where γ = β = 0."""
    found = []
    for layer in pair(BatchNormReLU):
        with torch.no_grad():
            layer.weight[1] = layer.bias[1] = 0
        x = randn(4, 3, 2, 3, dtype=F64, grad=True)
        every = x, layer.weight, layer.bias
        grads = torch.autograd.grad((layer(x) + 1).pow(3).sum(), every, create_graph=True)
        found.append(torch.autograd.grad(sum((g + 1).pow(2).sum() for g in grads), every))
    assert all(near(a, b, 2**24) for a, b in zip(*found, strict=True))
    assert not found[0][1][1]


def by_formulas(x, weight, bias, eps):
    """Batch normalisation in training, of operators whose derivatives of any order nobody doubts."""
    centred = x - x.mean((0, 2, 3), keepdim=True)
    var = centred.square().mean((0, 2, 3), keepdim=True)
    return centred * (var + eps).rsqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def test_third_derivatives_are_those_of_the_formulas():
    """Not those of PyTorch's own operator (2.13), which are wrong from the third on."""
    weight, bias = randn(3, seed=1, dtype=F64), randn(3, seed=2, dtype=F64)
    found = []
    for plain in True, False:
        x = randn(4, 3, 2, 2, dtype=F64, grad=True)
        g = by_formulas(x, weight, bias, 0.1) if plain else batch_norm(x, None, None, weight, bias, True, eps=0.1)
        g = g.pow(3).sum()
        for _ in range(2):
            (g,) = torch.autograd.grad(g, x, create_graph=True)
            g = g.pow(2).sum()
        found.append(torch.autograd.grad(g, x)[0])
    assert near(*found, 2**12)


def test_a_hessian_is_that_of_pytorch():
    found = [
        torch.autograd.functional.hessian(
            lambda x, layer=layer: layer(x).pow(3).sum(), randn(3, 3, 1, 1, dtype=F64)
        )
        for layer in pair(BatchNorm2d)
    ]  # fmt: skip
    assert near(*found, 2**16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives_come_in_the_dtypes_of_the_inputs(dtype):
    bn, x = BatchNorm2d(3, dtype=dtype), randn(4, 3, 2, 2, dtype=dtype, grad=True)
    (g,) = torch.autograd.grad(bn(x).pow(3).sum(), x, create_graph=True)
    g.pow(2).sum().backward()
    assert x.grad.dtype == bn.weight.grad.dtype == dtype
    assert x.grad.isfinite().all()


# Which gradients there are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wanted", list(itertools.product([True, False], repeat=4)))
def test_any_choice_of_leaves_gets_the_gradients_that_all_together_get(wanted, training):
    bn, _ = pair(BatchNormAddReLU)
    bn.train(training)

    def gradients(wanted):
        leaves = [*inputs(BatchNormAddReLU, 4, 3, 2, 2), bn.weight, bn.bias]
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.grad = None
            leaf.requires_grad_(want)
        y = bn(*leaves[:2])
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(randn(4, 3, 2, 2, seed=5, dtype=F64))
        return [leaf.grad for leaf in leaves]

    for every, some, want in zip(gradients([True] * 4), gradients(wanted), wanted, strict=True):
        assert some is None if not want else same_bits(some, every)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_and_a_kept_graph_gives_the_same_again(kind):
    bn, _ = pair(kind, dtype=torch.float32)
    leaves = inputs(kind, 4, 3, 5, 5, dtype=torch.float32)
    dy = randn(4, 3, 5, 5, seed=6)
    y = bn(*leaves)
    y.backward(dy, retain_graph=True)
    every = [*leaves, bn.weight, bn.bias]
    first = [leaf.grad.clone() for leaf in every]
    y.backward(dy)
    assert all(same_bits(leaf.grad, 2 * once) for leaf, once in zip(every, first, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", ["same", "float32"])
@pytest.mark.parametrize("training", [True, False])
def test_half_types_go_with_parameters_of_their_own_or_float32(dtype, parameters, training):
    of_parameters = torch.promote_types(dtype, torch.float32) if parameters == "float32" else dtype
    bn = BatchNorm2d(3, dtype=of_parameters).train(training)
    x, dy = randn(6, 3, 5, 5, dtype=dtype, grad=True), randn(6, 3, 5, 5, seed=1, dtype=dtype)
    stats = None if training else [t.clone() for t in (bn.running_mean, bn.running_var)]
    y = bn(x)
    y.backward(dy)
    assert_forward(y, x, bn.weight, bn.bias, stats=stats)
    assert_gradients(dy, y, x, bn.weight, (x.grad, bn.weight.grad, bn.bias.grad), stats=stats)
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    for t in bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var:
        assert t.dtype == of_parameters


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_without_weight_has_a_gradient_of_its_own_precision(dtype, training, relu):
    """float32 beside a half-type input: the sum is rounded once, to float32."""
    statistics = (None, None) if training else (torch.zeros(3), torch.ones(3))
    bias, dy = torch.full((3,), 0.25, requires_grad=True), randn(50, 3, 9, seed=1, dtype=dtype)
    y = batch_norm(randn(50, 3, 9, dtype=dtype), *statistics, None, bias, training, relu=relu)
    y.backward(dy)
    exact = torch.where(y > 0, dy, 0).double() if relu else dy.double()
    assert bias.grad.dtype == torch.float32
    assert ((bias.grad - exact.sum((0, 2))).abs() <= 8 * 2**-24 * exact.abs().sum((0, 2))).all()


def test_autocast_leaves_the_layer_what_it_is_given():
    """As PyTorch's: a convolution gives bfloat16, the layer takes it with its float32 parameters."""
    conv, (ours, theirs) = nn.Conv2d(2, 3, 1), pair(BatchNorm2d, dtype=torch.float32)
    x = randn(4, 2, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = conv(x)
        y, want = ours(z), theirs(z)
        loss = y.float().square().sum()
    loss.backward()
    assert y.dtype == want.dtype == torch.bfloat16
    assert (y - want).abs().max() <= 2**-7 * want.abs().max()
    assert conv.weight.grad.dtype == ours.weight.grad.dtype == torch.float32


# Modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_results_and_the_statistics_are_the_same(kind, training, mode):
    bn, _ = pair(kind)
    bn.train(training)
    other = copy.deepcopy(bn)
    leaves = inputs(kind, 4, 3, 5, 5)
    with mode():
        y = bn(*leaves)
        assert y.is_inference() == (mode is torch.inference_mode)
    assert not y.requires_grad
    assert y.grad_fn is None
    want = other(*leaves)
    assert want.requires_grad
    assert same_bits(y, want)
    assert all(same_bits(a, b) for a, b in zip(bn.buffers(), other.buffers(), strict=True))


def test_an_inference_tensor_is_refused_where_gradients_are_wanted():
    bn = BatchNorm1d(3)
    with torch.inference_mode():
        x = torch.ones(4, 3) * torch.arange(4.0)[:, None]
    with pytest.raises(RuntimeError, match="[Ii]nference tensors"):
        bn(x).sum().backward()
    with torch.no_grad():
        assert bn(x).shape == (4, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_used_twice_in_one_graph_gets_the_sum_of_both_gradients(kind):
    """The second call moves the running statistics that the first has seen; this must not disturb its gradients."""
    ours, theirs = pair(kind)
    found = []
    for layer in ours, theirs:
        leaves = inputs(kind, 4, 3, 5, 5)
        y = layer(*leaves)
        y = layer(2 * y + 1, *leaves[1:])
        y.backward(randn(4, 3, 5, 5, seed=7, dtype=F64))
        found.append([leaf.grad for leaf in (*leaves, *layer.parameters())] + list(layer.buffers()))
    assert all(near(a, b) if a.is_floating_point() else a == b for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_training_after_an_evaluation_does_not_disturb_its_gradients(kind):
    """An adversarial network does so; PyTorch's own differentiates by the new statistics then, in silence."""
    ours, _ = pair(kind)
    leaves, dy = inputs(kind, 4, 3, 5, 5), randn(4, 3, 5, 5, seed=7, dtype=F64)
    want = torch.autograd.grad(ours.eval()(*leaves), leaves, dy)
    y = ours(*leaves)
    ours.train()(*inputs(kind, 4, 3, 5, 5, seed=9))
    assert all(same_bits(a, b) for a, b in zip(torch.autograd.grad(y, leaves, dy), want, strict=True))


# What changes between the passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["x", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_backward_needs_must_not_change_before_it(kind, what, training):
    bn, _ = pair(kind)
    x, *rest = inputs(kind, 4, 3, 5, 5)
    x = x * 1
    y = bn.train(training)(x, *rest)
    with torch.no_grad():
        (x if what == "x" else bn.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["bias", "residual", "y"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_wrong_in_silence(kind, what, training):
    """What else changes before backward either does not matter to it, or is an error."""
    bn, _ = pair(kind)
    bn.train(training)
    dy = randn(4, 3, 5, 5, seed=7, dtype=F64)

    def step(change):
        leaves = inputs(kind, 4, 3, 5, 5)
        given = [leaf * 1 for leaf in leaves]
        bias = bn.bias.detach().clone()
        y = bn(*given)
        with torch.no_grad():
            if change:
                {"bias": bn.bias, "residual": given[-1], "y": y}[what].sub_(1)
        try:
            return torch.autograd.grad(y, (*leaves, bn.weight, bn.bias), dy)
        finally:
            with torch.no_grad():
                bn.bias.copy_(bias)

    want = step(False)
    x_is_changed = what == "residual" and kind is not BatchNormAddReLU
    bias_is_needed = what == "bias" and kind is BatchNormReLU
    if x_is_changed or bias_is_needed:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            step(True)
    else:
        assert all(same_bits(a, b) for a, b in zip(step(True), want, strict=True))


def test_a_result_may_be_changed_in_place():
    """relu_ behind a BatchNorm is the commonest line of all: backward does not need y."""
    found = []
    for layer in pair(BatchNorm2d):
        x = randn(4, 3, 5, 5, dtype=F64, grad=True)
        F.relu_(layer(x)).square().sum().backward()
        found.append([x.grad, layer.weight.grad, layer.bias.grad])
    assert all(near(a, b) for a, b in zip(*found, strict=True))


def test_the_versions_of_statistics_tell_that_they_have_moved():
    bn, x = BatchNorm2d(3), randn(4, 3, 5, 5)
    versions = [t._version for t in bn.state_dict(keep_vars=True).values()]
    bn.eval()(x)
    assert [t._version for t in bn.state_dict(keep_vars=True).values()] == versions
    bn.train()(x)
    now = {k: t._version - v for (k, t), v in zip(bn.state_dict(keep_vars=True).items(), versions, strict=True)}
    assert now["weight"] == now["bias"] == 0
    assert now["running_mean"] > 0
    assert now["running_var"] > 0
    assert now["num_batches_tracked"] == 1


# Around a layer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_runs_the_layer_again(kind, reentrant):
    """Twice it moves the statistics, but without reentrance PyTorch stops the second run before it comes to that."""
    plain, layer = pair(kind)[0], pair(kind)[0]
    found = []
    for bn in plain, layer:
        leaves = inputs(kind, 4, 3, 5, 5)
        y = bn(*leaves) if bn is plain else checkpoint(bn, *leaves, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([leaf.grad for leaf in (*leaves, *bn.parameters())])
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
    if layer.num_batches_tracked == 2:
        plain(*leaves)
    assert reentrant == (layer.num_batches_tracked == 2)
    assert all(same_bits(a, b) for a, b in zip(plain.buffers(), layer.buffers(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensors_may_wait_elsewhere(kind):
    """Packed to bytes and back: what backward is given then has other memory, and other strides."""
    bn, _ = pair(kind)
    leaves, dy = inputs(kind, 4, 3, 6, 5), randn(4, 3, 6, 5, seed=7, dtype=F64)
    given = [leaf.contiguous(memory_format=torch.channels_last) for leaf in leaves]
    want = torch.autograd.grad(bn(*given), leaves, dy)

    def pack(t):
        file = io.BytesIO()
        torch.save(t.detach().contiguous(), file)
        return file.getvalue()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda b: torch.load(io.BytesIO(b))):
        y = bn(*given)
    found = torch.autograd.grad(y, leaves, dy)
    bound = 64 * 2**-53 * (1 + max(float(g.abs().max()) for g in want))  # another layout, another order of summation
    assert all((a - b).abs().max() <= bound for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_run_forward_and_backward(kind):
    bn, seen = kind(3), []
    bn.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    bn.register_forward_hook(lambda m, a, y: seen.append("forward") or 2 * y)
    bn.register_full_backward_hook(lambda m, gi, go: seen.append(f"backward {len(gi)}"))
    leaves = inputs(kind, 4, 3, 5, 5, dtype=torch.float32)
    leaves[0].register_hook(lambda g: seen.append("x"))
    bn.weight.register_post_accumulate_grad_hook(lambda p: seen.append("weight"))
    bn(*leaves).sum().backward()
    assert seen[:2] == ["pre", "forward"]
    assert sorted(seen[2:]) == sorted([f"backward {len(leaves)}", "x", "weight"])


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_does_the_same_and_shares_nothing(kind, copied):
    bn, _ = pair(kind, momentum=0.3, dtype=torch.float32)
    bn(*inputs(kind, 4, 3, 5, 5, dtype=torch.float32))
    file = io.BytesIO()
    if copied == "deepcopy":
        other = copy.deepcopy(bn)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(bn))
    elif copied == "torch.save":
        torch.save(bn, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        torch.save(bn.state_dict(), file)
        file.seek(0)
        other = kind(3, momentum=0.3)
        other.load_state_dict(torch.load(file, weights_only=True))
    assert type(other) is type(bn)
    assert repr(other) == repr(bn)
    leaves = inputs(kind, 4, 3, 5, 5, dtype=torch.float32, seed=3)
    before = bn.running_mean.clone()
    y = other(*leaves)
    assert same_bits(bn.running_mean, before)
    assert same_bits(y, bn(*leaves))
    assert all(same_bits(a, b) for a, b in zip(bn.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_takes_other_parameters_and_statistics(kind):
    bn, theirs = pair(kind)
    state = {k: v.clone() for k, v in bn.state_dict().items()}
    other = {k: torch.full_like(v, 2) for k, v in state.items()}
    leaves = inputs(kind, 4, 3, 5, 5)
    y = torch.func.functional_call(bn, other, leaves)
    want = torch.func.functional_call(theirs, {k: torch.full_like(v, 2) for k, v in state.items()}, leaves)
    assert near(y, want)
    assert other["num_batches_tracked"] == 3
    assert all(same_bits(a, b) for a, b in zip(bn.state_dict().values(), state.values(), strict=True))


@pytest.mark.filterwarnings("ignore:fastbn:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_function_transforms_of_gradients_work(kind):
    """torch.func.grad, and twice."""
    bn, theirs = (layer.eval() for layer in pair(kind))
    leaves = inputs(kind, 4, 3, 2, 2, grad=False)

    def loss(layer):
        return lambda *given: layer(*given).pow(3).sum()

    def penalty(layer):
        return lambda *given: torch.func.grad(loss(layer))(*given).pow(2).sum()

    for of in loss, penalty:
        assert near(torch.func.grad(of(bn))(*leaves), torch.func.grad(of(theirs))(*leaves), 2**20)


@pytest.mark.filterwarnings("ignore:fastbn:UserWarning", "ignore:`torch.jit.script`:DeprecationWarning")
@pytest.mark.parametrize("transform", ["forward mode", "jvp", "vmap", "vmap of grad"])
@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_and_vmap_give_what_pytorchs_own_gives(training, transform):
    x, t = randn(4, 3, 2, dtype=F64), randn(4, 3, 2, seed=1, dtype=F64)
    statistics = (None, None) if training else (torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64))
    many = randn(5, 4, 3, 2, dtype=F64)

    def run(norm):
        def function(x):
            return norm(x, *statistics, training=training)

        if transform == "forward mode":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent
        if transform == "jvp":
            return torch.func.jvp(function, (x,), (t,))[1]
        if transform == "vmap":
            return torch.vmap(function)(many)
        return torch.vmap(torch.func.grad(lambda x: function(x).pow(3).sum()))(many)

    want = run(F.batch_norm)
    assert want.abs().max() > 0.1
    assert near(run(batch_norm), want)


# Odd tensors ----------------------------------------------------------------------------------------------------


def test_views_that_negate_are_read_as_what_they_say():
    z = torch.complex(randn(4, 3, dtype=F64), randn(4, 3, seed=1, dtype=F64))
    x = z.conj().imag
    assert x.is_neg()
    assert same_bits(BatchNorm1d(3, dtype=F64)(x), BatchNorm1d(3, dtype=F64)(x.resolve_neg()))
    y = BatchNorm1d(3, dtype=F64)(real := x.clone().requires_grad_())
    (dx,) = torch.autograd.grad(y, real, x, retain_graph=True)
    assert same_bits(dx, torch.autograd.grad(y, real, x.resolve_neg())[0])


def test_expanded_and_permuted_gradients_are_read_as_what_they_say():
    bn, x = BatchNorm2d(3, dtype=F64), randn(4, 3, 5, 6, dtype=F64, grad=True)
    y = bn(x)
    small = randn(1, 3, 1, 1, seed=2, dtype=F64)
    turned = randn(4, 3, 6, 5, seed=3, dtype=F64).transpose(2, 3)
    for dy in small.expand_as(y), turned, randn(4, 6, 5, 6, seed=4, dtype=F64)[:, ::2]:
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert same_bits(dx, torch.autograd.grad(y, x, dy.contiguous(), retain_graph=True)[0])


def test_a_parameter_may_be_the_input_and_be_no_leaf():
    ours, theirs = pair(BatchNorm2d)
    found = []
    for layer in ours, theirs:
        p = nn.Parameter(randn(4, 3, 2, 2, dtype=F64))
        scale = nn.Parameter(torch.tensor(2.0, dtype=F64))
        y = F.batch_norm if layer is theirs else batch_norm
        y = y(p, None, None, layer.weight * scale, layer.bias[[2, 1, 0]], True)
        y.pow(2).sum().backward()
        found.append([p.grad, scale.grad, layer.weight.grad, layer.bias.grad])
    assert all(near(a, b) for a, b in zip(*found, strict=True))


def test_parameters_and_statistics_need_not_be_contiguous():
    table = randn(3, 4, dtype=F64).abs() + 0.5
    x, views = randn(5, 3, 4, dtype=F64), [table[:, i] for i in range(4)]
    copies = [v.clone() for v in views]
    assert same_bits(batch_norm(x, *views, True), batch_norm(x, *copies, True))
    assert all(same_bits(v, c) for v, c in zip(views, copies, strict=True))
    assert same_bits(table[:, 2], copies[2])


@pytest.mark.parametrize("kind", [BatchNorm1d, BatchNorm2d, BatchNorm3d])
def test_a_layer_is_where_and_what_pytorchs_is(kind):
    """Moved between dtypes, and built on another device, by the methods of every module."""
    bn = kind(3).double()
    assert {t.dtype for t in bn.state_dict().values()} == {F64, torch.int64}
    assert bn.to(torch.bfloat16).weight.dtype == torch.bfloat16
    assert kind(3, device="meta").weight.is_meta
    assert kind(3, device="meta").to_empty(device="cpu").weight.device.type == "cpu"
    theirs = getattr(nn, kind.__name__)(3, 1e-3, None, True, False)
    ours = kind(3, 1e-3, None, True, False)
    assert ours.extra_repr() == theirs.extra_repr()
    assert repr(ours) == "fastbn." + repr(theirs)
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(kind(3)))
    assert type(sync[0]) is nn.SyncBatchNorm


def test_an_input_of_any_rank_with_two_axes_is_taken_by_the_fused_layers():
    for ndim in range(2, 7):
        x = randn(*[4, 3, 2, 2, 2, 2][:ndim])
        assert same_bits(BatchNormReLU(3)(x), batch_norm(x, None, None, training=True, relu=True))
    for bad in randn(3), torch.tensor(1.0):
        with pytest.raises(ValueError, match="input"):
            BatchNormReLU(3)(bad)


def test_training_with_it_learns_what_pytorchs_learns():
    """A convolutional network, twenty steps in float64: the same losses to rounding, which training amplifies."""

    def network(plain):
        torch.manual_seed(0)
        bn = nn.BatchNorm2d if plain else BatchNorm2d
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), bn(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), bn(6), nn.ReLU(), nn.Flatten(),
            nn.Linear(54, 3),
        ).double()  # fmt: skip

    x, target = randn(16, 1, 9, 9, dtype=F64), torch.arange(16) % 3
    losses = []
    for plain in True, False:
        model = network(plain)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        curve = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append([*curve, F.cross_entropy(model.eval()(x), target).item()])
    theirs, ours = losses
    assert theirs[19] < 0.2 * theirs[0]
    assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(theirs, ours, strict=True))
