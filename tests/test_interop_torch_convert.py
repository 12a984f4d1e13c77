"""convert(model): PyTorch's BatchNorms become fastbn's in place; what cannot be stays, and the report says why."""

import contextlib
import copy
import pickle

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

import torch.nn.functional as F  # noqa: E402
from interpreter import run_python  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parametrizations  # noqa: E402
from torch_norms import randn, same_bits  # noqa: E402

from fastbn.interop.torch import (  # noqa: E402
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormReLU,
    ConvertReport,
    convert,
)

SWAPS = {nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d}


class Block(nn.Module):
    """A residual block (He et al. 2016), with a layer that two paths share."""

    def __init__(self, c, shared):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c, momentum=None)
        self.shared = shared

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return self.shared(F.relu(self.bn2(self.conv2(y)) + self.shared(x)))


def network(seed=0):
    torch.manual_seed(seed)
    shared = nn.BatchNorm2d(4, affine=False)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Block(4, shared), Block(4, shared),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3),
    ).double()  # fmt: skip


NAMES = ["1", "3.bn1", "3.bn2", "3.shared", "4.bn1", "4.bn2", "7"]


def test_every_batchnorm_is_swapped_and_named():
    model = network()
    same, report = convert(model)
    assert same is model
    assert isinstance(report, ConvertReport)
    assert list(report.converted) == NAMES
    assert report.left == {}
    for name in NAMES:
        assert type(model.get_submodule(name)) in SWAPS.values()
    assert not any(type(m) in SWAPS for m in model.modules())
    assert "7" in str(report)
    assert model[3].shared is model[4].shared


def test_tensors_modules_and_modes_stay_the_same_objects():
    model = network()
    model[3].eval()
    model[1].weight.requires_grad_(False)
    model[1].note = "kept"
    before = dict(model.named_parameters()), dict(model.named_buffers()), dict(model.named_modules())
    modes = {name: m.training for name, m in model.named_modules()}
    text = repr(model)
    convert(model)
    for old, new in zip(before, (model.named_parameters(), model.named_buffers()), strict=False):
        new = dict(new)
        assert old.keys() == new.keys()
        assert all(old[name] is new[name] for name in old)
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert repr(model).replace("fastbn.", "") == text
    assert model[1].note == "kept"
    assert not model[1].weight.requires_grad


def train(model, optimizer, steps=4):
    x, target = randn(8, 2, 8, 8, dtype=torch.float64), torch.arange(8) % 3
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_an_optimizer_made_before_goes_on_and_learns_the_same():
    """Converted between two steps of Adam: the losses are those of the model that was not, to rounding."""
    models = network(), network()
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in models]
    first = [train(m, o, 2) for m, o in zip(models, optimizers, strict=True)]
    assert first[0] == first[1]
    convert(models[1])
    theirs, ours = (train(m, o) for m, o in zip(models, optimizers, strict=True))
    assert theirs != sorted(theirs)
    assert all(abs(a - b) <= 1e-9 * abs(a) for a, b in zip(theirs, ours, strict=True))
    with torch.no_grad():
        x = randn(3, 2, 8, 8, seed=5, dtype=torch.float64)
        y, want = (m.eval()(x) for m in models[::-1])
        assert (y - want).abs().max() <= 1e-8
    models[0].load_state_dict(models[1].state_dict())
    assert torch.equal(models[0][3].bn2.num_batches_tracked, models[1][3].bn2.num_batches_tracked)


def test_a_second_time_changes_nothing():
    model, _ = convert(network())
    classes = [type(m) for m in model.modules()]
    same, report = convert(model)
    assert same is model
    assert not report.converted
    assert not report.left
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize("kind", SWAPS)
def test_the_root_itself_may_be_one(kind):
    bn = kind(3, eps=1e-3, momentum=0.3)
    weight = bn.weight
    new, report = convert(bn)
    assert type(new) is SWAPS[kind]
    assert new.weight is weight
    assert (new.eps, new.momentum) == (1e-3, 0.3)
    assert len(report.converted) == 1
    assert str(report)


def test_hooks_are_kept_and_run():
    model, seen = network(), []
    model[1].register_forward_hook(lambda m, a, y: seen.append(type(m)))
    model[1].register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    model[1].register_load_state_dict_post_hook(lambda m, keys: seen.append("load"))
    convert(model)
    train(model, torch.optim.SGD(model.parameters(), 0.1), 1)
    model.load_state_dict(model.state_dict())
    assert seen == [BatchNorm2d, "backward", "load"]


class Derived(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def odd(kind):
    """Return a module that convert must leave, and a word of the reason."""
    if kind == "derived":
        return Derived(3), "Derived"
    if kind == "synchronised":
        return nn.SyncBatchNorm(3), "SyncBatchNorm"
    if kind == "lazy":
        return nn.LazyBatchNorm2d(), "Lazy"
    if kind == "elsewhere":
        return nn.BatchNorm2d(3, device="meta"), "meta"
    if kind == "complex":
        with contextlib.suppress(RuntimeError):
            return nn.BatchNorm2d(3, dtype=torch.complex64), "complex64"
    if kind == "patched":
        bn = nn.BatchNorm2d(3)
        bn.forward = lambda x: x
        return bn, "forward"
    if kind == "parametrised":
        return parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None), "Parametrized"
    raise AssertionError(kind)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize(
    "kind", ["derived", "synchronised", "lazy", "elsewhere", "complex", "patched", "parametrised"]
)  # fmt: skip
def test_what_is_not_plain_is_left_as_it_is_with_the_reason(kind):
    module, word = odd(kind)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(module))
    before, attributes = type(module), dict(vars(module))
    _, report = convert(model)
    assert list(report.converted) == ["0"]
    assert list(report.left) == ["1.0"]
    assert word in report.left["1.0"]
    assert "1.0" in str(report)
    assert report.left["1.0"] in str(report)
    assert model[1][0] is module
    assert type(module) is before
    assert all(vars(module)[k] is v for k, v in attributes.items())


def test_other_layers_are_no_ones_business():
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.GroupNorm(1, 3), nn.LayerNorm(3), BatchNormReLU(3))
    classes = [type(m) for m in model.modules()]
    _, report = convert(model)
    assert not report.converted
    assert not report.left
    assert [type(m) for m in model.modules()] == classes


def test_a_module_under_two_names_is_swapped_once():
    bn = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": bn, "b": nn.Sequential(bn), "c": nn.BatchNorm1d(3)})
    _, report = convert(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is BatchNorm1d
    assert model["c"] is not model["a"]
    assert list(report.converted) == ["a", "c"]


def test_lists_dicts_and_attributes_of_modules_are_reached():
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.several = nn.ModuleList([nn.BatchNorm1d(2), nn.ModuleDict({"x": nn.BatchNorm3d(2)})])
            self.alias = (self.several[0],)  # no module holds it, so it has to be the same object

    model, report = convert(Holder())
    assert list(report.converted) == ["several.0", "several.1.x"]
    assert model.alias[0] is model.several[0]
    assert type(model.alias[0]) is BatchNorm1d


def test_a_model_without_batchnorm_gives_an_empty_report():
    model, report = convert(nn.Linear(2, 3))
    assert type(model) is nn.Linear
    assert not report.converted
    assert not report.left
    assert isinstance(str(report), str)


@pytest.mark.parametrize("value", [None, 3, "model", nn.BatchNorm2d, torch.ones(3), {"weight": torch.ones(3)}, []])
def test_what_is_no_module_is_refused(value):
    with pytest.raises(TypeError, match="module: expected a"):
        convert(value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    model, _ = convert(nn.Sequential(nn.BatchNorm1d(3)).to(dtype))
    assert model(randn(4, 3, dtype=dtype)).dtype == dtype


def test_a_converted_model_is_copied_and_pickled():
    model, _ = convert(network())
    x = randn(4, 2, 8, 8, dtype=torch.float64)
    others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    y = model(x)
    assert all(same_bits(other(x), y) for other in others)


def test_a_convolution_and_a_converted_layer_fuse_as_before():
    """torch.nn.utils.fusion looks at the numbers of the layer only."""
    conv, bn = nn.Conv2d(2, 3, 3).double(), nn.BatchNorm2d(3).double()
    bn(randn(4, 3, 5, 5, dtype=torch.float64))
    x = randn(4, 2, 6, 6, dtype=torch.float64)
    want = nn.Sequential(conv, bn).eval()(x)
    bn, _ = convert(bn)
    fused = torch.nn.utils.fuse_conv_bn_eval(conv.eval(), bn.eval())
    assert (fused(x) - want).abs().max() <= 2**-45


def test_what_the_kernels_do_not_take_is_said_once_per_reason_and_process():
    """ε = 0 and an input without channels, three times each; where PyTorch raises, nothing is said."""
    lines = run_python("""
        import warnings
        import torch
        from fastbn.interop.torch import BatchNorm1d, batch_norm
        x = torch.randn(4, 3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for n in 2, 3, 4:
                y = batch_norm(x, torch.zeros(3), torch.ones(3), eps=0.0)
                z = batch_norm(x[:n, :0], torch.zeros(0), torch.ones(0))
                for bad in x.to(torch.complex64), x.to(torch.int64):
                    try:
                        batch_norm(bad, torch.zeros(3), torch.ones(3))
                    except NotImplementedError:
                        pass
                    else:
                        print("no error")
                BatchNorm1d(3)(x)
        assert torch.equal(y, torch.nn.functional.batch_norm(x, torch.zeros(3), torch.ones(3), eps=0.0))
        assert z.shape == (4, 0)
        for warning in said:
            print(warning.category.__name__, warning.filename, str(warning.message), sep="|")
    """).stdout.splitlines()
    found = [line.split("|") for line in lines]
    assert len(found) == 2
    assert len({message for *_, message in found}) == 2
    for category, filename, message in found:
        assert category == "UserWarning"
        assert filename == "<string>"  # the line that called
        assert message.startswith("fastbn:")


def test_plain_use_warns_of_nothing():
    run_python("""
        import warnings
        warnings.simplefilter("error")
        import torch
        from fastbn.interop.torch import BatchNorm2d, BatchNormAddReLU, convert
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        model, _ = convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
        BatchNormAddReLU(3)(model(x), x).sum().backward()
        model.eval()(x)
    """)


def test_without_torch_the_import_says_what_to_install():
    done = run_python("""
        import sys
        sys.modules["torch"] = None
        import fastbn
        import fastbn.interop.torch
    """, check=False)  # fmt: skip
    assert done.returncode
    assert 'fastbn.interop.torch needs torch: pip install "fastbn[torch]"' in done.stderr.splitlines()[-1]


def test_fastbn_itself_does_not_import_torch():
    run_python('import sys, fastbn; assert "torch" not in sys.modules')


def test_what_replaces_pytorchs_batchnorms_does_not_lose_a_relu():
    """Tools that look for _BatchNorm put a plain one in its place."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormReLU(4), nn.BatchNorm2d(4))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model[1]) is BatchNormReLU
    assert type(model[2]) is nn.SyncBatchNorm


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TorchScript
def test_torchscript_is_left_and_named():
    script = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    _, report = convert(script)
    assert report.converted == []
    assert report.left == {"1": "it is TorchScript"}
    plain = nn.Linear(2, 2)
    plain.original_name = 3  # anybody's attribute
    assert convert(plain)[1].left == {}
