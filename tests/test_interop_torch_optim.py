"""PyTorch's optimizers over fastbn's kernels: those of torch.optim, step for step, and its state dicts."""

import copy
import inspect
import io
import pickle
import warnings
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import run_python
from reference_optim import Reference

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.optim import lr_scheduler  # noqa: E402

import fastbn  # noqa: E402
from fastbn.interop.torch import optim  # noqa: E402
from fastbn.interop.torch.layers import to_array  # noqa: E402

METHODS = ["Adam", "AdamW", "RMSprop", "SGD"]
HALVES = [torch.float16, torch.bfloat16]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
NUMPY = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}

VARIANTS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.6, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "maximize": True, "weight_decay": 0.2}),
    ("RMSprop", {}),
    ("RMSprop", {"alpha": 0.3, "weight_decay": 0.1, "eps": 1e-3}),
    ("RMSprop", {"momentum": 0.9, "lr": 1e-3}),
    ("RMSprop", {"centered": True, "alpha": 0.9, "eps": 1e-2}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-2, "weight_decay": 0.1, "maximize": True}),
    ("Adam", {}),
    ("Adam", {"betas": (0.2, 0.9), "weight_decay": 0.1, "maximize": True}),
    ("Adam", {"betas": (0.95, 0.4), "lr": 0.05, "eps": 1e-3}),
    ("Adam", {"amsgrad": True, "lr": 0.01, "betas": (0.9, 0.8)}),
    ("Adam", {"weight_decay": 0.3, "lr": 0.01, "decoupled_weight_decay": True}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.3, "lr": 0.01, "amsgrad": True, "maximize": True}),
]
variants = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=[f"{m} {o}" for m, o in VARIANTS])
methods = pytest.mark.parametrize("method", METHODS)

# How a parameter or gradient of a shape lies in memory.
LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "reversed": lambda t: t.permute(tuple(range(t.ndim))[::-1]).contiguous().permute(tuple(range(t.ndim))[::-1]),
    "last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1) if t.ndim > 1 else t.clone(),
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
}


def make(method, params, options):
    return getattr(optim, method)(params, **options)


def theirs(method, params, options):
    return getattr(torch.optim, method)(params, foreach=False, **options)


def values(rng, shape, dtype=torch.float32):
    """Numbers 0.5 to 2 in size, none of them 0."""
    array = rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)
    return torch.from_numpy(np.array(array)).to(dtype)


def parameters(rng, shapes, dtype=torch.float32, layouts=()):
    layouts = layouts or ["contiguous"] * len(shapes)
    return [
        nn.Parameter(LAYOUTS[layout](values(rng, shape, dtype)))
        for shape, layout in zip(shapes, layouts, strict=True)
    ]


def give(params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g


def bits(tensors):
    return [None if t is None else to_array(t).tobytes() for t in tensors]


def everything(opt):
    """All that a step may change, in a form that compares."""
    state = opt.state_dict()
    tensors = [p for group in opt.param_groups for p in group["params"]]
    kept = {
        (number, name): value.tolist() if isinstance(value, torch.Tensor) else value
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }
    return [t.tolist() for t in tensors], kept, state["param_groups"], [t._version for t in tensors]


def assert_close(ours, other, reference, slots=True):
    """Parameters and state of both optimizers are within the bound of any rounding of the formulas.

    Ours within twice the bound, as the kernels order the operations differently (`Reference`, with a unit), so the two
    differ by three times the bound at most.
    """
    pairs = zip(ours.param_groups, other.param_groups, strict=True)
    params = [pair for a, b in pairs for pair in zip(a["params"], b["params"], strict=True)]
    for i, ((p, q), expected) in enumerate(zip(params, reference.params, strict=True)):
        wide = p.detach().double().numpy()
        assert (np.abs(wide - expected.value) <= 2 * expected.error).all(), i
        assert (np.abs(wide - q.detach().double().numpy()) <= 4 * expected.error).all(), i
        assert list(ours.state.get(p, {})) == list(other.state.get(q, {})), i
        for name, known in reference.state[i].items():
            a, b = (o.state[t][name].detach().double().numpy() for o, t in ((ours, p), (other, q)))
            assert (np.abs(a - known.value) <= 2 * known.error).all(), (i, name)
            assert (np.abs(a - b) <= 4 * known.error).all(), (i, name)
        if "step" in ours.state.get(p, {}):
            assert ours.state[p]["step"] == other.state[q]["step"]
            assert ours.state[p]["step"].dtype == torch.float32


class PerParameter:
    """The oracle with PyTorch's habits: a count of steps per parameter; momentum starts as the gradient; maximize."""

    def __init__(self, method, params, unit, options):
        options = dict(options)
        self.sign = -1 if options.pop("maximize", False) else 1
        if options.pop("decoupled_weight_decay", False):
            method = "AdamW"
        arrays = [p.detach().numpy().copy() for p in params]
        self.single = [Reference(method, [a], unit=unit, **options) for a in arrays]
        self.dampening = options.get("dampening", 0.0)

    def step(self, grads):
        for one, g in zip(self.single, grads, strict=True):
            if g is not None:
                if "dampening" in one.options:
                    one.options["dampening"] = self.dampening if one.steps else 0.0
                one.step([self.sign * g.numpy()])

    @property
    def params(self):
        return [one.params[0] for one in self.single]

    @property
    def state(self):
        return [one.state[0] for one in self.single]


def three(method, options, start, unit):
    """Our optimizer, PyTorch's and the oracle, each with its own copy of the parameters."""
    return (
        make(method, copy.deepcopy(start), options),
        theirs(method, copy.deepcopy(start), options),
        PerParameter(method, start, unit, options),
    )


def step_all(trio, grads):
    ours, other, reference = trio
    for opt in (ours, other):
        give(opt.param_groups[0]["params"], [None if g is None else g.clone() for g in grads])
        opt.step()
    reference.step(grads)


class TestSameSteps:
    @variants
    @pytest.mark.parametrize("dtype", UNIT, ids=str)
    def test_ten_steps(self, method, options, dtype):
        rng = np.random.default_rng(1)
        shapes = [(), (5,), (3, 17), (2, 3, 4, 5), (4129,), (0,), (0, 3)]
        trio = three(method, options, parameters(rng, shapes, dtype), UNIT[dtype])
        for _ in range(10):
            step_all(trio, [values(rng, shape, dtype) for shape in shapes])
        assert_close(*trio)

    @given(st.data())
    def test_any_parameters(self, data):
        """Any shapes, dtypes and layouts, gradients that are missing at times or come late."""
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        sizes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 17]), max_size=4).map(tuple)
        shapes = data.draw(st.lists(sizes, min_size=1, max_size=5))
        layout = st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=len(shapes), max_size=len(shapes))
        dtype = data.draw(st.sampled_from(list(UNIT)))
        method, options = data.draw(st.sampled_from(VARIANTS))
        start = parameters(rng, shapes, dtype, data.draw(layout))
        trio = three(method, options, start, UNIT[dtype])
        strides = [p.stride() for p in start]
        for ours, p in zip(trio[0].param_groups[0]["params"], start, strict=True):
            ours.data = torch.empty_strided(p.shape, p.stride(), dtype=dtype).copy_(p)  # deepcopy closes gaps
        for _ in range(data.draw(st.integers(1, 4))):
            present = data.draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
            grads = [values(rng, shape, dtype) if there else None for shape, there in zip(shapes, present, strict=True)]
            layouts = data.draw(layout)
            grads = [None if g is None else LAYOUTS[how](g) for g, how in zip(grads, layouts, strict=True)]
            before = bits(grads)
            step_all(trio, grads)
            assert bits(grads) == before
        assert_close(*trio)
        assert [p.stride() for p in trio[0].param_groups[0]["params"]] == strides

    @methods
    def test_mixed_dtypes_are_the_same_as_apart(self, method):
        rng = np.random.default_rng(2)
        dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
        start = [nn.Parameter(values(rng, (33,), dtype)) for dtype in dtypes]
        together, apart = copy.deepcopy(start), copy.deepcopy(start)
        one, each = make(method, together, {}), [make(method, [p], {}) for p in apart]
        for _ in range(3):
            grads = [values(rng, (33,), dtype) for dtype in dtypes]
            give(together, grads)
            give(apart, grads)
            for opt in (one, *each):
                opt.step()
        assert bits(together) == bits(apart)
        assert bits(together) != bits(start)

    @methods
    def test_number_of_threads_changes_no_bit(self, method):
        rng = np.random.default_rng(3)
        start, grads = parameters(rng, [(300, 300), (7,)]), [values(rng, (300, 300)), values(rng, (7,))]
        results = []
        before = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                params = copy.deepcopy(start)
                give(params, grads)
                with fastbn.num_threads(4):
                    make(method, params, {}).step()
                results.append(bits(params))
        finally:
            torch.set_num_threads(before)
        assert results[0] == results[1] == results[2]

    def test_both_limits_of_threads_hold(self, monkeypatch):
        used = []
        kernel = optim.optim_kernels.sgd_flat
        monkeypatch.setattr(optim.optim_kernels, "sgd_flat", lambda *args: (used.append(args[-1]), kernel(*args)))
        p = nn.Parameter(torch.ones(10 * 32768))
        p.grad = torch.ones_like(p)
        opt = optim.SGD([p])
        before = torch.get_num_threads()
        try:
            for of_torch, of_fastbn in ((1, 4), (3, 4), (4, 2)):
                torch.set_num_threads(of_torch)
                with fastbn.num_threads(of_fastbn):
                    opt.step()
        finally:
            torch.set_num_threads(before)
        assert used == [1, 3, 2]

    @methods
    def test_gradients_that_share_memory_with_a_parameter(self, method):
        rng = np.random.default_rng(4)
        start = parameters(rng, [(7,), (7,)])
        ours, other = copy.deepcopy(start), copy.deepcopy(start)
        for params, opt in ((ours, make(method, ours, {})), (other, theirs(method, other, {}))):
            params[0].grad = params[0].detach()
            params[1].grad = torch.ones(7)
            opt.step()
        for p, q in zip(ours, other, strict=True):
            torch.testing.assert_close(p, q, rtol=8 * 2.0**-24, atol=0)

    def test_gradients_with_a_graph(self):
        w = nn.Parameter(torch.tensor([2.0]))
        opt = optim.SGD([w], lr=0.25)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True", UserWarning)
            (w**2).sum().backward(create_graph=True)
        assert w.grad.requires_grad
        opt.step()
        assert w.tolist() == [1.0]
        w.grad = None  # the cycle of w and its graph

    @variants
    def test_not_finite(self, method, options):
        """What is NaN or infinite is so in PyTorch, too."""
        start = [nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0, 5.0, -0.0]))]
        special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45])
        results = []
        for build in (make, theirs):
            params = copy.deepcopy(start)
            opt = build(method, params, options)
            for k in range(3):
                give(params, [special if k == 1 else torch.linspace(1, 2, 6)])
                opt.step()
            results.append(params[0].detach())
        assert torch.equal(results[0].isnan(), results[1].isnan())
        assert torch.equal(results[0].isinf(), results[1].isinf())

    def test_centered_without_variance(self):
        """Where rounding leaves s − ḡ² below 0 PyTorch takes its root; ours counts it as 0."""
        w = nn.Parameter(torch.ones(1000))
        opt = optim.RMSprop([w], lr=1e-9, alpha=0.5, centered=True)
        for _ in range(60):
            w.grad = torch.linspace(0.1, 3, 1000)
            opt.step()
        assert w.isfinite().all()

    @methods
    def test_expanded_gradient(self, method):
        w, v = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3))
        w.grad, v.grad = torch.tensor(2.0).expand(4, 3), torch.full((4, 3), 2.0)
        make(method, [w, v], {}).step()
        assert torch.equal(w, v)
        assert not torch.equal(w, torch.ones(4, 3))

    def test_lazily_negated_gradient(self):
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
        assert w.grad.is_neg()
        optim.SGD([w], lr=1.0).step()
        assert w.tolist() == [2.0] * 3

    def test_numbers_as_tensors(self):
        w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        w.grad = v.grad = torch.ones(3)
        tensors = {"lr": torch.tensor([0.5]), "betas": (torch.tensor(0.25), torch.tensor([0.75])), "eps": 1e-3}
        optim.Adam([w], **tensors).step()
        optim.Adam([v], lr=0.5, betas=(0.25, 0.75), eps=1e-3).step()
        assert torch.equal(w, v)

    def test_scaled_gradients(self):
        """torch.amp.GradScaler unscales them, and skips the step of one that is not finite."""
        w = nn.Parameter(torch.tensor([1.0]))
        opt = optim.SGD([w], lr=0.25)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor, expected in ((1.0, 0.75), (torch.inf, 0.75)):
            opt.zero_grad()
            scaler.scale((w * factor).sum()).backward()
            scaler.step(opt)
            scaler.update()
            assert w.item() == expected

    def test_clipped_gradients(self):
        w = nn.Parameter(torch.zeros(2))
        opt = optim.SGD([w], lr=1.0)
        w.grad = torch.tensor([3.0, 4.0])
        nn.utils.clip_grad_norm_([w], 1.0)
        opt.step()
        torch.testing.assert_close(w, -torch.tensor([0.6, 0.8]), rtol=1e-6, atol=0)  # that adds 1e-6 to the norm

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    @methods
    def test_half_types_are_float32_rounded(self, method, dtype):
        """The master follows the float32 optimizer to the bit, and the parameter is the master rounded."""
        rng = np.random.default_rng(5)
        half = [nn.Parameter(values(rng, (65,), dtype)), nn.Parameter(LAYOUTS["last"](values(rng, (2, 3, 4), dtype)))]
        full = [nn.Parameter(p.detach().float()) for p in half]
        pair = make(method, half, {}), make(method, full, {})
        for _ in range(20):
            grads = [values(rng, p.shape, dtype) for p in half]
            give(half, grads)
            give(full, [g.float() for g in grads])
            for opt in pair:
                opt.step()
        for p, q in zip(half, full, strict=True):
            assert torch.equal(pair[0].state[p]["master"], q)
            assert torch.equal(p, q.to(dtype))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_what_others_write_into_half_types_counts(self, dtype):
        w = nn.Parameter(torch.ones(3, dtype=dtype))
        opt = optim.SGD([w], lr=2.0**-12)
        for value in (1.0, 3.0):
            w.data.fill_(value)
            for _ in range(2):
                w.grad = torch.ones_like(w)
                opt.step()
            assert opt.state[w]["master"].tolist() == [value - 2.0**-11] * 3


class TestGroups:
    def test_each_with_its_own_numbers(self):
        rng = np.random.default_rng(6)
        start = parameters(rng, [(5,), (3, 4), (9,)])
        both = []
        for module, extra in ((optim, {}), (torch.optim, {"foreach": False})):
            params = copy.deepcopy(start)
            groups = [
                {"params": params[:1], "lr": 0.1, "betas": (0.5, 0.9)},
                {"params": params[1:2], "weight_decay": 0.2, "amsgrad": True, "maximize": True},
            ]
            opt = module.Adam(groups, lr=0.01, **extra)
            draws = np.random.default_rng(7)
            for k in range(6):
                if k == 3:
                    opt.add_param_group({"params": params[2], "eps": 0.1})
                give(params, [values(draws, p.shape) for p in params])
                opt.step()
            both.append((opt, params))
        for p, q in zip(both[0][1], both[1][1], strict=True):
            torch.testing.assert_close(p, q, rtol=6 * 16 * 2.0**-24, atol=0)
            assert both[0][0].state[p]["step"] == both[1][0].state[q]["step"]
            assert list(both[0][0].state[p]) == list(both[1][0].state[q])

    SCHEDULERS = (
        ("SGD", {"lr": 0.1, "momentum": 0.9}, lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.5**k)),
        ("Adam", {"lr": torch.tensor(0.1)}, lambda o: lr_scheduler.CosineAnnealingLR(o, 5)),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=9)),
        ("Adam", {"lr": 0.1}, lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=9)),
        ("RMSprop", {"lr": 0.1}, lambda o: lr_scheduler.StepLR(o, 2)),
    )

    @pytest.mark.parametrize(("method", "options", "scheduler"), SCHEDULERS)
    def test_schedulers(self, method, options, scheduler):
        rng = np.random.default_rng(8)
        start = parameters(rng, [(5,), (3, 4)])
        draws = [[values(rng, p.shape) for p in start] for _ in range(8)]
        results = []
        for build in (make, theirs):
            params = copy.deepcopy(start)
            opt = build(method, params, copy.deepcopy(options))
            schedule = scheduler(opt)
            for grads in draws:
                give(params, [g.clone() for g in grads])
                opt.step()
                schedule.step()
            results.append((params, opt.param_groups[0]["lr"]))
        assert results[0][1] == results[1][1]
        for p, q in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=8 * 16 * 2.0**-24)

    def test_plateau(self):
        w = nn.Parameter(torch.ones(1))
        opt = optim.SGD([w], lr=1.0)
        schedule = lr_scheduler.ReduceLROnPlateau(opt, factor=0.25, patience=0)
        for _ in range(2):
            schedule.step(1.0)
        w.grad = torch.ones(1)
        opt.step()
        assert w.tolist() == [0.75]

    @methods
    def test_frozen_and_late_gradients(self, method):
        """A parameter without gradients gets no state and keeps its bits; its first step is a first step."""
        rng = np.random.default_rng(9)
        params = parameters(rng, [(5,), (6,)])
        opt = make(method, params, {"momentum": 0.9} if method == "SGD" else {})
        before = bits(params[1:])
        for _ in range(3):
            params[0].grad = values(rng, (5,))
            opt.step()
        assert params[1] not in opt.state
        assert bits(params[1:]) == before
        twin = copy.deepcopy(params[1:])
        alone = make(method, twin, {"momentum": 0.9} if method == "SGD" else {})
        params[1].grad = values(rng, (6,))
        twin[0].grad = params[1].grad.clone()
        opt.step()
        alone.step()
        assert bits(params[1:]) == bits(twin)

    @pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
    @methods
    def test_no_gradient_at_all(self, method, dtype):
        opt = make(method, [nn.Parameter(torch.ones(3, dtype=dtype))], {})
        opt.step()
        assert not opt.state
        assert opt.param_groups[0]["params"][0].tolist() == [1.0] * 3


class TestStateDicts:
    @variants
    def test_change_of_optimizers(self, method, options):
        """After five steps PyTorch's optimizer and ours take over each other's state dict, and go on as before."""
        rng = np.random.default_rng(10)
        shapes = [(5,), (2, 3, 4, 5), (), (7,)]
        start = parameters(rng, shapes, torch.float64, ["contiguous", "last", "contiguous", "gaps"])
        trio = three(method, options, start, UNIT[torch.float64])
        for k in range(10):
            if k == 5:
                ours, other = (copy.deepcopy(opt.state_dict()) for opt in trio[:2])
                trio[0].load_state_dict(other)
                trio[1].load_state_dict(ours)
            step_all(trio, [values(rng, s, torch.float64) if (i + k) % 3 else None for i, s in enumerate(shapes)])
        assert_close(*trio)

    @variants
    @pytest.mark.parametrize("dtype", [*UNIT, *HALVES], ids=str)
    def test_same_bits_after_a_round_trip(self, method, options, dtype):
        rng = np.random.default_rng(11)
        params = parameters(rng, [(5,), (2, 3, 4)], dtype)
        opt = make(method, params, options)
        draws = [[values(rng, p.shape, dtype) for p in params] for _ in range(6)]
        for grads in draws[:3]:
            give(params, grads)
            opt.step()
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        new = copy.deepcopy(params)
        loaded = make(method, new, {"lr": 99.0})
        loaded.load_state_dict(torch.load(file, weights_only=True))
        copied = copy.deepcopy(opt)
        pickled = pickle.loads(pickle.dumps(opt))
        everybody = [(o, o.param_groups[0]["params"]) for o in (opt, loaded, copied, pickled)]
        for grads in draws[3:]:
            for one, its in everybody:
                give(its, grads)
                one.step()
        for one, its in everybody[1:]:
            assert bits(its) == bits(params)
            for p, q in zip(params, its, strict=True):
                assert bits(opt.state.get(p, {}).values()) == bits(one.state.get(q, {}).values())

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_half_types(self, dtype):
        """PyTorch takes the float32 state over in its half type, and we what it has."""
        p = nn.Parameter(torch.ones(3, dtype=dtype))
        q = nn.Parameter(torch.ones(3, dtype=dtype))
        ours, other = optim.Adam([p], eps=0.125), torch.optim.Adam([q], eps=0.125)
        for opt, w in ((ours, p), (other, q)):
            w.grad = torch.full_like(w, 0.5)
            opt.step()
        saved = copy.deepcopy(ours.state_dict()), copy.deepcopy(other.state_dict())
        assert {k: v.dtype for k, v in saved[0]["state"][0].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "master"), torch.float32
        )
        ours.load_state_dict(saved[1])
        other.load_state_dict(saved[0])
        assert torch.equal(ours.state[p]["exp_avg"], saved[1]["state"][0]["exp_avg"].float())
        assert torch.equal(other.state[q]["exp_avg"], saved[0]["state"][0]["exp_avg"].to(dtype))
        ours.step()
        other.step()
        assert torch.equal(ours.state[p]["master"].to(dtype), p)
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=0)

    @methods
    def test_older_state_dicts(self, method):
        """Options that older versions did not have are missing, and the step is a plain number."""
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        opt = make(method, [w], {"momentum": 0.5} if method == "SGD" else {})
        opt.step()
        twin = copy.deepcopy(opt)
        old = copy.deepcopy(opt.state_dict())
        for option in ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"):
            old["param_groups"][0].pop(option, None)
        if "step" in old["state"][0]:
            old["state"][0]["step"] = old["state"][0]["step"].item()
        opt.load_state_dict(old)
        opt.step()
        (other,) = twin.param_groups[0]["params"]
        other.grad = torch.ones(3)
        twin.step()
        assert torch.equal(w, other)
        assert everything(opt)[1] == everything(twin)[1]

    def test_of_pytorchs_fused_optimizer(self):
        """Its state dict asks for fused=True, which is kept for the way back."""
        w = nn.Parameter(torch.ones(3))
        w.grad = torch.ones(3)
        other = torch.optim.Adam([w], fused=True)
        other.step()
        opt = optim.Adam([w])
        opt.load_state_dict(other.state_dict())
        opt.step()
        assert opt.state[w]["step"] == 2
        assert opt.state_dict()["param_groups"][0]["fused"] is True

    def test_loading_copies(self):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = optim.Adam([p])
        opt.step()
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        kept = copy.deepcopy(saved)
        opt.step()
        assert torch.equal(saved["state"][0]["exp_avg"], kept["state"][0]["exp_avg"])
        assert not torch.equal(saved["state"][0]["exp_avg"], opt.state[p]["exp_avg"])

    def test_state_is_not_copied_in_a_step(self):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = optim.Adam([p])
        opt.step()
        tensors = dict(opt.state[p])
        opt.step()
        assert all(opt.state[p][name] is t for name, t in tensors.items())
        assert tensors["step"] == 2

    def test_hooks_see_tensors(self):
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = optim.Adam([p])
        opt.step()
        seen = []

        def double(optimizer, state):
            seen.append(type(state["state"][0]["exp_avg"]))
            return {**state, "state": {0: {k: 2 * v for k, v in state["state"][0].items()}}}

        opt.register_load_state_dict_pre_hook(double)
        opt.register_load_state_dict_post_hook(lambda o: seen.append(o.state[p]["step"].item()))
        opt.load_state_dict(opt.state_dict())
        assert seen == [torch.Tensor, 2.0]

    def test_sgd_of_old_with_none_as_buffer(self):
        p = nn.Parameter(torch.ones(2))
        opt = optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.5)
        opt.load_state_dict({"state": {0: {"momentum_buffer": None}}, "param_groups": opt.state_dict()["param_groups"]})
        p.grad = torch.ones(2)
        opt.step()
        assert p.tolist() == [0.0, 0.0]
        opt.step()
        assert p.tolist() == [-1.0, -1.0]

    @methods
    def test_refused_whole(self, method):
        rng = np.random.default_rng(12)
        params = parameters(rng, [(5,), (3, 4)])
        opt = make(method, params, {"momentum": 0.5} if method == "SGD" else {})
        give(params, [values(rng, p.shape) for p in params])
        opt.step()
        before = everything(opt)
        wrong = copy.deepcopy(opt.state_dict())
        name = list(wrong["state"][1])[-1]
        wrong["state"][1][name] = torch.zeros(4, 3)
        with pytest.raises(ValueError, match=rf"{name} of param_groups\[0\]\['params'\]\[1\]: expected shape \(3, 4\)"):
            opt.load_state_dict(wrong)
        fewer = copy.deepcopy(opt.state_dict())
        fewer["param_groups"][0]["params"].pop()
        with pytest.raises(ValueError, match="doesn't match the size"):
            opt.load_state_dict(fewer)
        assert everything(opt) == before
        opt.step()


class TestChangesFromOutside:
    """Between steps users replace parameters, state and options; a step notices."""

    def follow(self, change, method="Adam", options=None, shape=(4, 6)):
        """Three steps, `change`, three steps: of ours and of PyTorch's."""
        rng = np.random.default_rng(13)
        start = parameters(rng, [shape, (5,)])
        draws = [[values(rng, p.shape) for p in start] for _ in range(6)]
        results = []
        for build in (make, theirs):
            params = copy.deepcopy(start)
            opt = build(method, params, options or {})
            for k, grads in enumerate(draws):
                if k == 3:
                    change(opt)
                params = [p for group in opt.param_groups for p in group["params"]]
                give(params, [g.to(p.dtype).clone() for g, p in zip(grads, params, strict=True)])
                opt.step()
            results.append((params, opt))
        for p, q in zip(results[0][0], results[1][0], strict=True):
            assert p.dtype == q.dtype
            torch.testing.assert_close(p, q, rtol=0, atol=6 * 16 * 2.0**-24)
            for name, value in results[1][1].state[q].items():
                torch.testing.assert_close(results[0][1].state[p][name], value, rtol=6 * 16 * 2.0**-24, atol=1e-9)
        return results[0]

    def test_data_replaced(self):
        def change(opt):
            p = opt.param_groups[0]["params"][0]
            self.old, p.data = p.data, p.data.clone() + 1
            self.kept = self.old.clone()

        self.follow(change)
        assert torch.equal(self.old, self.kept)  # that is PyTorch's, the last to run
        p = nn.Parameter(torch.ones(3))
        opt = optim.SGD([p], lr=1.0)
        p.grad = torch.ones(3)
        opt.step()
        old, p.data = p.data, torch.full((3,), 7.0)
        opt.step()
        assert (old.tolist(), p.tolist()) == ([0.0] * 3, [6.0] * 3)

    def test_data_transposed_in_place(self):
        def change(opt):
            p = opt.param_groups[0]["params"][0]
            p.data = p.data.t()
            for name in ("exp_avg", "exp_avg_sq"):
                opt.state[p][name] = opt.state[p][name].t()

        self.follow(change, shape=(5, 5))

    def test_other_dtype(self):
        def change(opt):
            for p in opt.param_groups[0]["params"]:
                p.data = p.data.double()
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))  # PyTorch's own does not cast by itself

        params, opt = self.follow(change)
        assert opt.state[params[0]]["exp_avg"].dtype == torch.float64

    def test_in_place(self):
        def change(opt):
            for p in opt.param_groups[0]["params"]:
                p.data.mul_(0.5)
                opt.state[p]["exp_avg"].zero_()
            opt.state[p]["step"] += 10

        self.follow(change)

    def test_state_replaced(self):
        def change(opt):
            p = opt.param_groups[0]["params"][0]
            opt.state[p]["exp_avg"] = torch.ones(4, 6)
            opt.state[p]["exp_avg_sq"].data = torch.ones(4, 6)

        self.follow(change)

    def test_dict_of_the_state_replaced(self):
        def change(opt):
            p = opt.param_groups[0]["params"][0]
            opt.state[p] = {name: t.clone() + 1 for name, t in opt.state[p].items()}

        self.follow(change)

    def test_states_exchanged(self):
        def change(opt):
            p, q = opt.param_groups[0]["params"]
            opt.state[p], opt.state[q] = opt.state[q], opt.state[p]

        self.follow(change, shape=(5,))

    def test_state_moved_to_another_key(self):
        def change(opt):
            opt.state[torch.zeros(1)] = opt.state.pop(opt.param_groups[0]["params"][1])

        self.follow(change)

    def test_state_of_the_last_parameter_removed(self):
        def change(opt):
            del opt.state[opt.param_groups[0]["params"][1]]

        self.follow(change)

    def test_state_cleared(self):
        self.follow(lambda opt: opt.state.clear())

    def test_parameter_exchanged(self):
        """As Gaussian splatting does when it adds points."""

        def change(opt):
            p = opt.param_groups[0]["params"][1]
            state = opt.state.pop(p)
            q = nn.Parameter(p.detach().clone() + 1)
            state["exp_avg"] = torch.zeros(5)
            opt.param_groups[0]["params"][1] = q
            opt.state[q] = state

        self.follow(change)

    def test_parameters_without_state_exchanged(self):
        params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
        opt = optim.SGD(params[:2], lr=1.0)
        give(params, [torch.ones(2)] * 4)
        opt.step()
        opt.param_groups[0]["params"][0] = params[2]
        opt.step()
        opt.param_groups[0]["params"].append(params[3])
        opt.step()
        opt.param_groups[0]["params"].pop()
        opt.step()
        assert [p[0].item() for p in params] == [0.0, -3.0, -2.0, 0.0]

    def test_gradient_of_the_old_shape_or_another_dtype(self):
        p = nn.Parameter(torch.ones(2, 3))
        opt = optim.SGD([p])
        p.grad = torch.ones(2, 3)
        opt.step()
        before = p.tolist()
        p.data = p.data[:1]
        with pytest.raises(ValueError, match=r"grad of .*: expected shape \(1, 3\) .*, got \(2, 3\) and"):
            opt.step()
        assert p.tolist() == before[:1]
        half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        half.grad_dtype = None
        half.grad = torch.ones(3)
        with pytest.raises(ValueError, match=r"grad of .*: expected shape \(3,\) and dtype bfloat16, got .* float32"):
            optim.SGD([half]).step()
        assert half.tolist() == [1.0] * 3

    def test_group_removed(self):
        def change(opt):
            last = opt.param_groups[0]["params"].pop()
            opt.add_param_group({"params": [last], "lr": 0.5})

        self.follow(change)

    def test_momentum_switched_on_and_off(self):
        def change(opt):
            opt.param_groups[0]["momentum"] = 0.9 - opt.param_groups[0]["momentum"]

        self.follow(change, "SGD", {"lr": 0.1})
        self.follow(change, "SGD", {"lr": 0.1, "momentum": 0.9})

    def test_what_users_keep_in_the_state_stays(self):
        def change(opt):
            for p in opt.param_groups[0]["params"]:
                opt.state[p]["seen"] = 3

        params, opt = self.follow(change, "SGD", {"momentum": 0.5})
        assert opt.state[params[0]]["seen"] == 3

    def test_other_shape(self):
        p = nn.Parameter(torch.ones(6))
        opt = optim.Adam([p])
        p.grad = torch.ones(6)
        opt.step()
        p.data = p.data[:3]  # the same address
        p.grad = torch.ones(3)
        before = everything(opt)
        with pytest.raises(ValueError, match=r"exp_avg of param_groups\[0\]\['params'\]\[0\]: expected shape \(3,\)"):
            opt.step()
        assert everything(opt) == before

    def test_lazy_parameters(self):
        model = nn.LazyLinear(2)
        opt = optim.SGD(model.parameters(), lr=0.5)
        opt.step()
        model(torch.ones(1, 3)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        opt.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p, old - 0.5)


class TestRefusals:
    def test_construction(self):
        w, row = nn.Parameter(torch.ones(4, 4)), torch.ones(8)
        cases = [
            ([w, nn.Parameter(torch.ones(3, device="meta"))], {}, ValueError, r"\[1\]: .* on the CPU, got .* meta"),
            ([w, nn.Parameter(torch.ones(3, dtype=torch.complex64))], {}, TypeError, r"\[1\]: .* got torch.complex64"),
            ([w.detach().to_sparse()], {}, TypeError, r"\[0\]: expected a strided tensor, got torch.sparse_coo"),
            ([torch.ones(1).expand(4)], {}, ValueError, r"\[0\]: .* share no memory, got an expanded"),
            ([row[::2], row[1:2], row[4:5]], {}, ValueError, r"params'\]\[2\]: .* apart .* that of .*params'\]\[0\]"),
            ([w, w.detach()[1]], {}, ValueError, r"params'\]\[1\]: .* apart .* that of .*params'\]\[0\]"),
            ([{"params": w}, {"params": torch.ones(2, device="meta")}], {}, ValueError, r"param_groups\[1\]"),
            ([("a.weight", torch.ones(2, device="meta"))], {}, ValueError, r"\[0\] \(a.weight\): "),
            ([w], {"differentiable": True}, ValueError, "differentiable: expected None or False, got True"),
            ([w], {"foreach": True}, ValueError, "foreach: expected None or False"),
        ]
        for params, options, kind, message in cases:
            for method in METHODS:
                with pytest.raises(kind, match=message):
                    make(method, params, options)
        for method in ("Adam", "AdamW", "SGD"):
            with pytest.raises(ValueError, match="fused: expected None or False"):
                make(method, [w], {"fused": True})
        for method in ("Adam", "AdamW", "RMSprop"):
            with pytest.raises(ValueError, match="capturable: expected None or False"):
                make(method, [w], {"capturable": True})

    def test_subclass_of_tensor(self):
        class Odd(torch.Tensor):
            pass

        with pytest.raises(TypeError, match="expected a plain tensor, got Odd"):
            optim.SGD([torch.ones(2).as_subclass(Odd)])

    def test_slices_that_interleave_are_apart(self):
        base = torch.ones(6, 2)
        opt = optim.SGD([base[:, 0], base[:, 1]], lr=1.0)
        give(opt.param_groups[0]["params"], [torch.ones(6), torch.full((6,), 2.0)])
        opt.step()
        assert base.tolist() == [[0.0, -1.0]] * 6

    def test_group_that_is_refused_is_not_added(self):
        w = nn.Parameter(torch.ones(4))
        opt = optim.Adam([w])
        with pytest.raises(ValueError, match="on the CPU"):
            opt.add_param_group({"params": torch.ones(2, device="meta")})
        assert len(opt.param_groups) == 1
        w.grad = torch.ones(4)
        opt.step()

    @methods
    def test_failed_step_changes_nothing(self, method):
        rng = np.random.default_rng(14)
        options = {"lr": 0.1, "momentum": 0.9} if method == "SGD" else {"lr": 0.1}

        def optimizer():
            params = parameters(np.random.default_rng(15), [(5,), (3, 4), (6,)])
            return make(method, [{"params": params[:1]}, {"params": params[1:]}], options), params

        def sparse(opt, params):
            params[2].grad = torch.ones(6).to_sparse()

        def overlapping(opt, params):
            params[1].data = params[0].data.new_zeros(17)[:12].view(3, 4)
            params[2].data = params[1].data.view(-1)[3:9]

        def across_groups(opt, params):
            params[2].data = params[1].data.view(-1)[3:9]
            params[0].data = params[2].data[:5]

        def no_number(opt, params):
            opt.param_groups[1]["lr"] = "fast"

        for steps in (0, 2):
            for change, kind, message in (
                (sparse, RuntimeError, r"grad of param_groups\[1\]\['params'\]\[1\]: expected a dense gradient"),
                (overlapping, ValueError, "expected memory apart"),
                (across_groups, ValueError, "expected memory apart"),
                (no_number, ValueError, "could not convert"),
            ):
                opt, params = optimizer()
                for _ in range(steps + 1):
                    give(params, [values(rng, p.shape) for p in params])
                    if steps:
                        opt.step()
                change(opt, params)
                before = everything(opt)
                with pytest.raises(kind, match=message):
                    opt.step()
                assert everything(opt) == before, change


class TestAutograd:
    @methods
    def test_a_step_between_forward_and_backward_is_noticed(self, method):
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        opt = make(method, model.parameters(), {})
        model(torch.ones(2, 3)).sum().backward()
        loss = model(torch.ones(2, 3)).sum()
        opt.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_frozen_parameters_keep_their_version(self):
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2)[:, 0])]
        opt = optim.SGD(params)
        params[0].grad = torch.ones(3)
        before = [p._version for p in params]
        opt.step()
        assert [p._version - old for p, old in zip(params, before, strict=True)] == [1, 0, 0]

    def test_nothing_is_recorded(self):
        w = nn.Parameter(LAYOUTS["gaps"](torch.ones(3)))
        v = nn.Parameter(torch.ones(3))
        opt = optim.Adam([w, v])
        (w + v).sum().backward()
        opt.step()
        for t in (w, v, *opt.state[w].values(), *opt.state[v].values()):
            assert t.grad_fn is None
        assert torch.is_grad_enabled()

    def test_closure(self):
        w = nn.Parameter(torch.tensor([1.0]))
        opt = optim.SGD([w], lr=0.25)

        def closure():
            opt.zero_grad()
            loss = (w**2).sum()
            loss.backward()
            return loss

        assert opt.step(closure).item() == 1.0
        assert w.tolist() == [0.5]

    def test_hooks_run(self):
        w = nn.Parameter(torch.tensor([1.0]))
        w.grad = torch.ones(1)
        opt = optim.SGD([w], lr=0.25)
        seen = []
        opt.register_step_pre_hook(lambda *_: seen.append(w.item()))
        opt.register_step_post_hook(lambda *_: seen.append(w.item()))
        opt.step()
        assert seen == [1.0, 0.75]

    def test_zero_grad_in_place(self):
        w = nn.Parameter(torch.tensor([1.0]))
        opt = optim.SGD([w], lr=0.25)
        w.sum().backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
        assert w.grad.item() == 0
        opt.step()
        assert w.item() == 0.75


@methods
def test_signatures(method):
    """The constructor is PyTorch's own."""
    ours, other = getattr(optim, method), getattr(torch.optim, method)
    assert issubclass(ours, other)
    assert inspect.signature(ours) == inspect.signature(other)


class TestPyTorchsOwnCases:
    """The optimizer inputs of PyTorch's test suite (torch.testing._internal.common_optimizers)."""

    @staticmethod
    def cases(errors=False):
        common = pytest.importorskip("torch.testing._internal.common_optimizers", exc_type=ImportError)
        for info in common.optim_db:
            if info.optim_cls.__name__ in METHODS:
                make_inputs = info.optim_error_inputs_func if errors else info.optim_inputs_func
                inputs = make_inputs(device="cpu", dtype=torch.float32)
                assert inputs
                yield info.optim_cls.__name__, inputs

    @pytest.mark.parametrize("contiguous", [True, False])
    def test_inputs(self, contiguous):
        count = 0
        for method, inputs in self.cases():
            for case in inputs:
                results = []
                for build in (make, theirs):
                    generator = torch.Generator().manual_seed(1)
                    size, pick = ((), ...) if contiguous else ((2,), (..., 0))
                    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
                    weight = nn.Parameter(draw(10, 5, *size)[pick])
                    bias = nn.Parameter(draw(10, *size)[pick])
                    x = draw(5)
                    opt = build(method, [weight, bias], copy.deepcopy(case.kwargs))
                    for _ in range(5):
                        opt.zero_grad()
                        (weight.mv(x) + bias).pow(2).sum().backward()
                        opt.step()
                    results.append((weight, bias))
                for p, q in zip(*results, strict=True):  # 5 steps of 16 roundings, which the gradients pass on
                    torch.testing.assert_close(p, q, rtol=0, atol=5 * 5 * 16 * 4 * 2.0**-53, msg=case.desc)
                count += 1
        assert count >= 20

    def test_error_inputs(self):
        for method, inputs in self.cases(errors=True):
            for case in inputs:
                given_input = case.optimizer_error_input
                params = given_input.params or [nn.Parameter(torch.ones(1, 1))]
                with pytest.raises(case.error_type, match=case.error_regex):
                    make(method, params, given_input.kwargs)


def test_learns_in_a_process_of_its_own():
    """The five lines of the README, with threads of both libraries."""
    run_python("""
        import torch
        from fastbn.interop.torch.optim import AdamW
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        opt = AdamW(model.parameters(), lr=1e-2)
        x = torch.randn(256, 8)
        losses = []
        for _ in range(100):
            opt.zero_grad()
            loss = (model(x) - x.prod(1, keepdim=True)).square().mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2, losses
    """)


@pytest.mark.parametrize("kind", [optim.Adam, optim.SGD])
def test_memory_that_moves_within_its_storage_is_noticed(kind):
    p = torch.nn.Parameter(torch.zeros(200_000))
    opt = kind([p], lr=1.0)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
        before = p.detach().clone()
        p.share_memory_()
    p.grad = torch.ones_like(p)
    opt.step()
    assert (p.detach() < before).all()
