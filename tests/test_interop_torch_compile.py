"""BatchNorm for PyTorch in its compiler, its exporter and its checks of operators."""

import shutil

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("ml_dtypes")

from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch_norms import DTYPES, randn, same_bits  # noqa: E402

from fastbn.interop.torch import (  # noqa: E402
    BatchNorm2d,
    BatchNormAddReLU,
    BatchNormReLU,
    batch_norm,
    convert,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch.*"),
]
KINDS = [BatchNorm2d, BatchNormReLU, BatchNormAddReLU]


@pytest.fixture(autouse=True)
def _nothing_compiled_is_left():
    yield
    torch._dynamo.reset()


def inputs(kind, *shape, seed=0, form=torch.contiguous_format, dtype=torch.float32):
    count = 1 + (kind is BatchNormAddReLU)
    made = (randn(*shape, seed=seed + i, dtype=dtype).contiguous(memory_format=form) for i in range(count))
    return tuple(x.requires_grad_() for x in made)


def step(call, layer, leaves, dy=None):
    """Return y, all gradients and the state after one pass forward and backward."""
    layer.zero_grad()
    for leaf in leaves:
        leaf.grad = None
    y = call(*leaves)
    y.backward(randn(*y.shape, seed=9, dtype=y.dtype) if dy is None else dy)
    found = [y.detach(), *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in layer.parameters())]
    return found + [b.clone() for b in layer.buffers()]


def same(a, b):
    return all(same_bits(x, y) and x.stride() == y.stride() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_layer_gives_the_same_bits_without_a_break_in_the_graph(kind, training, form):
    eager, traced = kind(3).train(training), kind(3).train(training)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        leaves = inputs(kind, 4, 3, 6, 5, seed=seed, form=form)
        assert same(step(compiled, traced, leaves), step(eager, eager, leaves))
    assert eager.num_batches_tracked == 2 * training


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_layer_keeps_the_dtype(dtype):
    eager, traced = BatchNormReLU(3, dtype=dtype), BatchNormReLU(3, dtype=dtype)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    leaves = inputs(BatchNormReLU, 4, 3, 6, 5, dtype=dtype)
    assert same(step(compiled, traced, leaves), step(eager, eager, leaves))


@pytest.mark.parametrize("kind", KINDS)
def test_one_compilation_serves_all_sizes(kind):
    eager, traced, graphs = kind(3), kind(3), []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(traced, fullgraph=True, backend=backend, dynamic=True)
    for size in (4, 6, 5), (7, 5, 9), (3, 8, 8):
        leaves = inputs(kind, size[0], 3, *size[1:])
        assert same(step(compiled, traced, leaves), step(eager, eager, leaves))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_sizes_pass_through_autograd_of_the_compiler(kind):
    eager, traced = kind(3), kind(3)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (4, 6, 5), (7, 5, 9):
        leaves = inputs(kind, size[0], 3, *size[1:], form=torch.channels_last)
        assert same(step(compiled, traced, leaves), step(eager, eager, leaves))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs C++")
def test_inductor_compiles_a_converted_network():
    """To rounding: inductor fuses and orders the other layers in its own way."""
    eager, traced = convert(network())[0], convert(network())[0]
    compiled = torch.compile(traced, fullgraph=True, backend="inductor")
    leaves = (randn(4, 2, 8, 8, grad=True),)
    for a, b in zip(step(compiled, traced, leaves), step(eager, eager, leaves), strict=True):
        assert a.stride() == b.stride()
        assert (a - b).abs().max() <= 2**-15 * (1 + b.abs().max())


def test_a_compiled_step_of_the_average_of_all_batches():
    """momentum=None needs the count of the batches, which the compiler must take as a tensor."""
    eager, traced = BatchNorm2d(3, momentum=None), BatchNorm2d(3, momentum=None)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        leaves = inputs(BatchNorm2d, 4, 3, 6, 5, seed=seed)
        assert same(step(compiled, traced, leaves), step(eager, eager, leaves))
    assert traced.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_gradients(kind, training):
    eager, traced = kind(3).train(training), kind(3).train(training)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    leaves = inputs(kind, 4, 3, 6, 5)
    with torch.no_grad():
        y, want = compiled(*leaves), eager(*leaves)
    assert same_bits(y, want)
    assert not y.requires_grad
    assert all(same_bits(a, b) for a, b in zip(traced.buffers(), eager.buffers(), strict=True))


def test_a_compiled_call_raises_what_an_eager_one_raises():
    compiled = torch.compile(BatchNorm2d(3), backend="aot_eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel"):
        compiled(torch.ones(1, 3, 1, 1))
    with pytest.raises(Exception, match="expected 4D input"):
        compiled(torch.ones(4, 3))


@pytest.mark.parametrize("kind", KINDS)
def test_exported_for_inference_it_is_one_operator_and_gives_the_same_bits(kind):
    bn = kind(3)
    leaves = inputs(kind, 4, 3, 6, 5)
    bn(*leaves)
    bn.eval()
    program = torch.export.export(bn, leaves)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fastbn.batch_norm" in target for target in targets) == 1
    assert not any("aten.batch_norm" in t or "relu" in t or "aten.add" in t for t in targets)
    with torch.no_grad():
        assert same_bits(program.module()(*leaves), bn(*leaves))


def test_exported_with_a_free_batch_size(tmp_path):
    bn = BatchNormReLU(3).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(bn, (randn(4, 3, 6, 5),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "bn.pt2")
    loaded = torch.export.load(tmp_path / "bn.pt2")
    for n in 2, 9:
        x = randn(n, 3, 6, 5)
        with torch.no_grad():
            assert same_bits(loaded.module()(x), bn(x))


def test_exported_for_training_it_moves_the_statistics():
    bn, eager = BatchNorm2d(3), BatchNorm2d(3)
    x = randn(4, 3, 6, 5)
    program = torch.export.export(bn, (x,))
    module = program.module()
    assert same_bits(module(x), eager(x))
    state = module.state_dict()
    for name in "running_mean", "running_var", "num_batches_tracked":
        assert same_bits(state[name], eager.state_dict()[name])


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_tell_shape_dtype_and_strides(kind, form):
    x = randn(4, 3, 6, 5, dtype=torch.bfloat16).contiguous(memory_format=form)
    given = (x, x) if kind is BatchNormAddReLU else (x,)
    want = kind(3)(*given)
    with FakeTensorMode() as mode:
        y = kind(3)(*(mode.from_tensor(t) for t in given))
    assert (y.shape, y.dtype, y.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.filterwarnings("ignore:fastbn:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_meta_device_there_are_shapes_only(kind):
    bn = kind(3, device="meta")
    x = torch.empty(4, 3, 6, 5, device="meta", requires_grad=True)
    y = bn(x, x) if kind is BatchNormAddReLU else bn(x)
    y.sum().backward()
    assert y.is_meta
    assert x.grad.shape == x.shape


def test_a_trace_records_the_operators():
    x = randn(4, 3, 5)
    graph = make_fx(lambda x: batch_norm(x, None, None, training=True, relu=True))(x)
    assert [n.target for n in graph.graph.nodes].count(torch.ops.fastbn.batch_norm.default) == 1
    assert same_bits(graph(x), batch_norm(x, None, None, training=True, relu=True))


# The operators themselves, by PyTorch's own checks ------------------------------------------------------------------


def operator_cases():
    vectors = [randn(3, seed=s, grad=s > 2).abs() + 0.5 for s in range(1, 5)]
    vectors = [v.detach().requires_grad_(v.requires_grad) for v in vectors]
    mean, var, weight, bias = vectors
    for form in torch.contiguous_format, torch.channels_last:
        x, residual = inputs(BatchNormAddReLU, 4, 3, 6, 5, form=form)
        other = residual.detach().contiguous().requires_grad_()
        name = "contiguous" if form is torch.contiguous_format else "channels last"
        yield f"training, {name}", (x, None, None, weight, bias, None, 1e-5, False)
        yield f"relu, {name}", (x, None, None, weight, bias, None, 1e-5, True)
        yield f"residual, {name}", (x, None, None, weight, bias, residual, 1e-5, False)
        yield f"all, {name}", (x, None, None, weight, bias, residual, 1e-5, True)
        yield f"residual in another order, {name}", (x, None, None, weight, bias, other, 1e-5, True)
        yield f"evaluation, {name}", (x, mean, var, weight, bias, residual, 1e-5, True)
    yield "no parameters", (x, None, None, None, None, None, 1e-5, True)
    yield "half", (x.detach().bfloat16(), mean, var, weight, bias, None, 1e-3, True)
    yield "sliced", (x.detach()[:, :, ::2], None, None, weight, bias, None, 1e-3, False)
    yield "expanded", (x.detach()[:1].expand(3, -1, -1, -1), None, None, weight, bias, None, 1e-3, False)
    yield "empty", (x.detach()[:0], None, None, weight, bias, residual.detach()[:0], 1e-3, True)


@pytest.mark.parametrize("name", [name for name, _ in operator_cases()])
def test_opcheck_of_the_forward_operator(name):
    """Schema, autograd registration, fake results, and the compiler with and without fixed sizes."""
    torch.library.opcheck(torch.ops.fastbn.batch_norm.default, dict(operator_cases())[name])


@pytest.mark.parametrize("name", [name for name, _ in operator_cases()])
def test_no_result_of_an_operator_shares_memory(name):
    """With each other, or with an argument: the compiler takes that for granted."""
    args = dict(operator_cases())[name]
    results = torch.ops.fastbn.batch_norm.default(*args)
    tensors = [t for t in (*args, *results) if isinstance(t, torch.Tensor) and t.numel()]
    given = len([t for t in args if isinstance(t, torch.Tensor) and t.numel()])
    spans = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
    for i, (start, size) in enumerate(spans[given:], given):
        for other, length in spans[:i]:
            assert start + size <= other or other + length <= start


def test_only_y_can_be_differentiated():
    """A loss of the statistics that the operator returns beside it is an error, not a gradient of 0."""
    y, *rest = torch.ops.fastbn.batch_norm.default(*dict(operator_cases())["all, contiguous"])
    assert y.requires_grad
    assert not any(t.requires_grad for t in rest)


@pytest.mark.parametrize("name", [name for name, _ in operator_cases()])
def test_opcheck_of_the_backward_operator(name):
    args = dict(operator_cases())[name]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: saved.append(t) or t):
        y = torch.ops.fastbn.batch_norm.default(*args)[0]
        called = []
        with Recorder(called):
            y.backward(randn(*y.shape, seed=4, dtype=y.dtype))
    assert len(called) == 1
    torch.library.opcheck(torch.ops.fastbn.batch_norm_backward.default, called[0])


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the arguments of every call of the backward operator."""

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.fastbn.batch_norm_backward.default:
            self.calls.append(tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
        return function(*args, **kwargs or {})
