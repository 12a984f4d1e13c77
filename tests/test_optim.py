"""Optimizers: k steps are k steps of the reference, in every dtype, with any threads and instruction set."""

import inspect
import math
import re
import sys
from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import run_python
from reference_optim import CLIPS, Reference

from fastbn import optim
from fastbn._core import dispatch
from fastbn._core.dispatch import optim_kernels

CHUNK = optim_kernels.ELEMENTS_PER_CHUNK
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
HALVES = [np.dtype(np.float16), BFLOAT16]
DTYPES = [FLOAT32, FLOAT64, *HALVES]
UNIT = {FLOAT32: 2.0**-24, FLOAT64: 2.0**-53}
EDGES = [0, 1, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 511, 513, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17]

VARIANTS = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("RMSprop", {}),
    ("RMSprop", {"alpha": 0.3, "weight_decay": 0.1}),
    ("RMSprop", {"eps_inside_sqrt": True, "eps": 1e-3}),
    ("RMSprop", {"momentum": 0.9}),
    ("RMSprop", {"centered": True, "alpha": 0.9}),
    (
        "RMSprop",
        {"centered": True, "momentum": 0.5, "eps": 1e-2, "eps_inside_sqrt": True, "weight_decay": 0.1},
    ),
    ("Adam", {}),
    ("Adam", {"betas": (0.0, 0.0), "eps": 0.0}),
    ("Adam", {"betas": (0.2, 0.9), "weight_decay": 0.1}),
    ("Adam", {"betas": (0.95, 0.4), "lr": 0.05, "eps": 1e-3}),
    ("Adam", {"eps_inside_sqrt": True, "eps": 1e-3}),
    ("Adam", {"amsgrad": True, "lr": 0.01, "betas": (0.9, 0.8)}),
    ("AdamW", {}),
    ("AdamW", {"weight_decay": 0.3, "lr": 0.01, "amsgrad": True, "eps_inside_sqrt": True}),
]
CLIPPINGS = [{}, {"clip_value": 0.75}, {"clip_norm": 0.9}, {"clip_global_norm": 1.1}]
variants = pytest.mark.parametrize(("method", "options"), VARIANTS, ids=[f"{m} {o}" for m, o in VARIANTS])


def make(method, params, options):
    return getattr(optim, method)(params, **options)


def uniform(rng, shapes, dtypes=FLOAT32):
    """Arrays of values 0.5 to 2 in size, none of them 0; `dtypes` is one dtype or one for each."""
    dtypes = [dtypes] * len(shapes) if isinstance(dtypes, np.dtype) else dtypes
    sizes = [np.asarray(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)) for shape in shapes]
    return [a.astype(dtype) for a, dtype in zip(sizes, dtypes, strict=True)]


def copies(arrays):
    return [None if a is None else a.copy() for a in arrays]


def bits(value):
    """Something that is equal only where every bit is: of an array, a number, or lists and dicts of them."""
    if isinstance(value, dict):
        return {key: bits(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [bits(v) for v in value]
    return (value.dtype.str, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def assert_follows(opt, reference):
    """Parameters and state are within twice the bound of the formulas, which the kernels order differently.

    The reference's arrays know their bounds (`Rounded`).
    """
    slots = {name: arrays for name, arrays in opt.state_dict().items() if name != "step"}
    for i, (p, expected) in enumerate(zip(opt.params, reference.params, strict=True)):
        error = np.abs(p.astype(np.float64) - expected.value)
        assert (error <= 2 * expected.error).all(), (i, np.max(error / expected.error))
        for name, arrays in slots.items():
            known = reference.state[i].get(name)  # a parameter that never had a gradient has none
            wide = arrays[i].astype(np.float64)
            if known is None:
                assert not wide.any()
            else:
                assert (np.abs(wide - known.value) <= 2 * known.error).all(), (i, name)
    assert opt.state_dict()["step"] == reference.steps


class TestAgainstTheReference:
    @variants
    @pytest.mark.parametrize("dtype", UNIT, ids=str)
    @pytest.mark.parametrize("clip", CLIPPINGS, ids=str)
    def test_twelve_steps(self, method, options, dtype, clip):
        rng = np.random.default_rng(1)
        shapes = [(), (5,), (3, 17), (2, 3, 4, 5), (CHUNK + 33,), (0,)]
        start = uniform(rng, shapes, dtype)
        opt = make(method, copies(start), options | clip)
        reference = Reference(method, start, unit=UNIT[dtype], **options, **clip)
        for _ in range(12):
            grads = uniform(rng, shapes, dtype)
            opt.step(grads)
            reference.step(grads)
        assert_follows(opt, reference)

    @given(st.data())
    def test_any_list(self, data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        shape = st.lists(st.sampled_from([0, 1, 2, 3, 5, 16, 17]), max_size=3).map(tuple)
        shapes = data.draw(
            st.lists(shape | st.sampled_from(EDGES).map(lambda n: (n,)), min_size=1, max_size=6)
        )
        dtype = data.draw(st.sampled_from(list(UNIT)))
        method, options = data.draw(st.sampled_from(VARIANTS))
        clip = data.draw(st.sampled_from(CLIPPINGS))
        start = uniform(rng, shapes, dtype)
        opt = make(method, copies(start), options | clip)
        reference = Reference(method, start, unit=UNIT[dtype], **options, **clip)
        for _ in range(data.draw(st.integers(1, 4))):
            grads = [g if data.draw(st.integers(0, 4)) else None for g in uniform(rng, shapes, dtype)]
            before = bits(grads)
            opt.step(grads, num_threads=data.draw(st.sampled_from([None, 1, 2, 5])))
            reference.step(grads)
            assert bits(grads) == before
        assert_follows(opt, reference)

    @variants
    @pytest.mark.parametrize("dtype", UNIT, ids=str)
    def test_mixed_dtypes_are_the_same_as_apart(self, method, options, dtype):
        """An array's update does not depend on its company: in a mixed list it has the bits it has alone."""
        rng = np.random.default_rng(2)
        shapes, dtypes = [(65,), (7, 9), (CHUNK + 1,), (31,)], [dtype, *DTYPES[:3]]
        start = uniform(rng, shapes, dtypes)
        together, alone = copies(start), copies(start)
        opt = make(method, together, options)
        each = [make(method, [p], options) for p in alone]
        for _ in range(3):
            grads = uniform(rng, shapes, dtypes)
            opt.step(grads)
            for one, g in zip(each, grads, strict=True):
                one.step([g])
        assert bits(together) == bits(alone)

    def test_a_long_average_has_no_bias(self):
        """β₂ = 0.999 and 1−β₂ rounded apart would make s too large by 1.3e-5, all of them.

        One rounding a step, remembered for 1/(1−β₂) steps, has a standard deviation of u·√(1000/2)/√3 = 8e-7,
        and over 1000 elements the mean of that is 2.6e-8.
        """
        rng = np.random.default_rng(15)
        opt = optim.Adam([np.zeros(1000, np.float32)], lr=0.0)
        s = np.zeros(1000)
        for _ in range(6000):
            g = rng.standard_normal(1000).astype(np.float32)
            opt.step([g])
            s += (1 - 0.999) * (g.astype(np.float64) ** 2 - s)
        error = opt.state_dict()["exp_avg_sq"][0] / s - 1
        assert abs(error.mean()) < 5 * 2.6e-8
        assert np.abs(error).max() < 6 * 8e-7

    def test_decoupled_decay_is_not_rounded_away(self):
        """p·(1 − lr·λ) with a factor rounded to float32 would be off by up to 3e-8 a step, all one way."""
        p = np.full(1, 1.0, np.float32)
        opt = optim.AdamW([p], lr=1e-3, weight_decay=0.0123)
        for _ in range(50):
            opt.step([np.zeros(1, np.float32)])
        assert abs(float(p[0]) - (1 - 1.23e-5) ** 50) <= 50 * 2.0**-25

    def test_constant_gradient_centered(self):
        """The variance of a constant gradient is 0: rounding below 0 must not make NaN."""
        for dtype in UNIT:
            p = np.zeros(1000, dtype)
            opt = optim.RMSprop([p], alpha=0.5, eps=1e-3, centered=True)
            for _ in range(60):
                opt.step([np.linspace(0.1, 3, 1000).astype(dtype)])
            assert np.isfinite(p).all()

    def test_dampening_is_the_exponential_average(self):
        """d = μ: v is the exponential average of the gradients from 0 on (exact: powers of two)."""
        p = np.zeros(2)
        opt = optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.5)
        for _ in range(3):
            opt.step([np.array([8.0, -16.0])])
        assert opt.state_dict()["momentum_buffer"][0].tolist() == [7.0, -14.0]
        assert p.tolist() == [-17.0, 34.0]


class TestAgainstPyTorch:
    SHAPES = ((15,), (16,), (17,), (63,), (65,), (CHUNK - 1,), (3, CHUNK), (8, 3, 3, 3), ())

    @pytest.mark.parametrize(
        ("method", "options"), [(m, o) for m, o in VARIANTS if "eps_inside_sqrt" not in o], ids=str
    )  # PyTorch has eps outside only
    @pytest.mark.parametrize("dtype", UNIT, ids=str)
    def test_twenty_steps(self, method, options, dtype):
        torch = pytest.importorskip("torch")
        rng = np.random.default_rng(3)
        start = uniform(rng, self.SHAPES, dtype)
        theirs = [torch.nn.Parameter(torch.from_numpy(p.copy())) for p in start]
        other = getattr(torch.optim, method)(theirs, **options)
        opt = make(method, copies(start), options)
        reference = Reference(method, start, unit=UNIT[dtype], **options)
        for t in range(20):
            grads = uniform(rng, self.SHAPES, dtype)
            for q, g in zip(theirs, grads, strict=True):
                q.grad = torch.from_numpy(g.copy())
            other.step()
            if t == 0 and options.get("dampening"):  # PyTorch does not damp the first gradient: do it for it
                with torch.no_grad():
                    for q, p in zip(theirs, start, strict=True):
                        v = other.state[q]["momentum_buffer"].mul_(1 - options["dampening"])
                        q.copy_(torch.from_numpy(p)).sub_(options["lr"] * v)
            opt.step(grads)
            reference.step(grads)
        assert_follows(opt, reference)
        for p, q, expected in zip(opt.params, theirs, reference.params, strict=True):
            assert (np.abs(p.astype(np.float64) - q.detach().numpy()) <= 4 * expected.error).all()
        for name, arrays in opt.state_dict().items():
            for a, q, known in zip(arrays if name != "step" else [], theirs, reference.state, strict=False):
                assert (
                    np.abs(a.astype(np.float64) - other.state[q][name].numpy()) <= 4 * known[name].error
                ).all()


def run(method, options, dtypes, shapes, threads=None, steps=3):
    """Parameters and state after some steps, as bits."""
    rng = np.random.default_rng(4)
    opt = make(method, uniform(rng, shapes, dtypes), options)
    for _ in range(steps):
        opt.step(uniform(rng, shapes, dtypes), num_threads=threads)
    return bits([opt.params, opt.state_dict()])


class TestSameBits:
    SHAPES = tuple((n,) for n in EDGES)

    @variants
    @pytest.mark.parametrize("clip", CLIPPINGS, ids=str)
    def test_threads_and_instruction_sets(self, method, options, clip, monkeypatch):
        dtypes = [DTYPES[i % 4] for i in range(len(EDGES))]
        expected = run(method, options | clip, dtypes, self.SHAPES, threads=1)
        for threads in (2, 3, 7):
            assert run(method, options | clip, dtypes, self.SHAPES, threads) == expected
        for isa in dispatch.available():
            monkeypatch.setattr(optim, "optim_kernels", dispatch.load("optim_kernels", isa))
            assert run(method, options | clip, dtypes, self.SHAPES, 2) == expected, isa

    @variants
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_an_element_does_not_depend_on_its_place(self, method, options, dtype):
        """Whole registers and remainders compute the same: each size is the head of the longest array."""
        rng = np.random.default_rng(5)
        (start,), gradients = (
            uniform(rng, [(EDGES[-1],)], dtype),
            [uniform(rng, [(EDGES[-1],)], dtype) for _ in range(3)],
        )
        whole = start.copy()
        opt = make(method, [whole], options)
        for t, (g,) in enumerate(gradients):
            opt.step([g])
            if t == 0:  # nothing is skipped: no gradient is 0 (a half may round back to where it was)
                assert (opt.state_dict().get("master", [whole])[0] != start).all()
        heads = [start[:n].copy() for n in EDGES]
        opt = make(method, heads, options)
        for (g,) in gradients:
            opt.step([g[:n].copy() for n in EDGES])
        assert bits(heads) == bits([whole[:n] for n in EDGES])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("clip", CLIPPINGS, ids=str)
    def test_gradients_of_any_layout(self, dtype, clip):
        """Strides, byte order, alignment, read-only: the same bits as a plain copy."""
        rng = np.random.default_rng(6)
        shapes = [(6, 10), (33,), (4, 5), (64,), ()]
        start, grads = uniform(rng, shapes, dtype), uniform(rng, shapes, dtype)
        odd = copies(grads)
        odd[0] = np.asfortranarray(odd[0])
        odd[1] = np.ascontiguousarray(odd[1][::-1])[::-1]
        odd[2] = np.broadcast_to(odd[2][:1], (4, 5))
        grads[2] = odd[2].copy()
        if dtype != BFLOAT16:
            odd[3] = odd[3].astype(dtype.newbyteorder("S"))
        else:
            store = np.zeros(64 * dtype.itemsize + 1, np.uint8)
            store[1:] = odd[3].view(np.uint8)
            odd[3] = store[1:].view(dtype)
            assert not odd[3].flags.aligned
        odd[4] = odd[4][()]  # a scalar, as np.sum returns
        for g in odd[:2]:
            g.flags.writeable = False
        plain, strange = copies(start), copies(start)
        optim.Adam(plain, **clip).step(grads)
        optim.Adam(strange, **clip).step(odd)
        assert bits(plain) == bits(strange)


class TestHalfTypes:
    @variants
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_master_is_a_float32_run(self, method, options, dtype):
        rng = np.random.default_rng(7)
        shapes = [(n,) for n in EDGES]
        start = uniform(rng, shapes, dtype)
        opt = make(method, copies(start), options)
        wide = make(method, [p.astype(np.float32) for p in start], options)
        for _ in range(4):
            grads = uniform(rng, shapes, dtype)
            opt.step(grads)
            wide.step([g.astype(np.float32) for g in grads])
        state = opt.state_dict()
        assert bits(state.pop("master")) == bits(wide.params)
        assert bits(state) == bits(wide.state_dict())
        assert bits(opt.params) == bits([p.astype(dtype) for p in wide.params])

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_every_value_converts(self, dtype):
        """The average takes all values as float32; without a learning rate a step leaves them as they are."""
        every = np.arange(2**16, dtype=np.uint16).view(dtype)
        with np.errstate(invalid="ignore"):  # signalling NaNs: NumPy's casts warn of them on aarch64
            every = every[~np.isnan(every.astype(np.float32))]
        p = np.ones(every.size, dtype)
        opt = optim.SGD([p], lr=1.0, momentum=0.5)
        opt.step([every])
        assert bits(opt.state_dict()["momentum_buffer"][0]) == bits(every.astype(np.float32) + 0.0)
        p = every.copy()
        optim.SGD([p], lr=0.0).step([np.ones(p.size, dtype)])
        assert bits(p) == bits(every)

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_rounds_to_nearest_even(self, dtype):
        """p ← 0 − 1·(−x) for float32 masters x between the halves, beyond their range, and below it."""
        rng = np.random.default_rng(8)
        values = np.ldexp(rng.uniform(-2, 2, 40_000), rng.integers(-30, 18, 40_000)).astype(np.float32)
        halfway = (values.view(np.uint32) & (0xFFFF0000 if dtype == BFLOAT16 else 0xFFFFE000)) | (
            0x8000 if dtype == BFLOAT16 else 0x1000
        )
        values = np.concatenate([values, halfway.astype(np.uint32).view(np.float32)])
        p = np.zeros(values.size, dtype)
        opt = optim.SGD([p], lr=1.0, momentum=0.5)
        state = opt.state_dict()
        state["momentum_buffer"] = [-2 * values]
        opt.load_state_dict(state)
        opt.step([np.zeros(values.size, dtype)])
        with np.errstate(over="ignore"):
            assert bits(p) == bits(values.astype(dtype))

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_a_small_step_is_not_lost(self, dtype):
        p = np.ones(3, dtype)
        opt = optim.SGD([p], lr=2.0**-12)
        for _ in range(2**11):
            opt.step([np.ones(3, dtype)])
        assert (p.astype(np.float32) == 0.5).all()

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_what_others_write_counts(self, dtype):
        p = np.ones(20, dtype)
        opt = optim.SGD([p], lr=2.0**-12)
        opt.step([np.ones(20, dtype)])
        p[7] = 3.0
        opt.step([np.ones(20, dtype)])
        master = opt.state_dict()["master"][0]
        assert master[7] == 3 - 2.0**-12
        assert (np.delete(master, 7) == 1 - 2.0**-11).all()


class TestClipping:
    @given(st.data())
    def test_laws(self, data):
        """SGD with lr = 1 from 0: what is subtracted is the clipped gradient."""
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        dtype = data.draw(st.sampled_from(list(UNIT)))
        shapes = data.draw(st.lists(st.sampled_from(EDGES).map(lambda n: (n,)), min_size=1, max_size=4))
        size = 10.0 ** data.draw(st.integers(-20, 20 if dtype == FLOAT32 else 200))
        grads = [(g * size).astype(dtype) for g in uniform(rng, shapes, FLOAT64)]
        name = data.draw(st.sampled_from(CLIPS))
        c = size * data.draw(st.floats(0.01, 100))
        params = [np.zeros_like(g) for g in grads]
        make("SGD", params, {"lr": 1.0, name: c}).step(grads)
        if name == "clip_value":
            assert bits([0 - p for p in params]) == bits(
                [np.clip(g, dtype.type(-c), dtype.type(c)) for g in grads]
            )
            return
        each = [([p], [g]) for p, g in zip(params, grads, strict=True)]
        together = [(params, grads)] if name == "clip_global_norm" else each
        for after, before in together:
            flat = np.concatenate(after).astype(np.float64) / size
            original = np.concatenate(before).astype(np.float64) / size
            norm, limit = np.linalg.norm(original), c / size
            tolerance = 4 * UNIT[dtype] + flat.size * 2.0**-53  # c/norm and the product, and our own sums
            assert np.linalg.norm(flat) <= limit * (1 + tolerance)
            if norm < limit * (1 - 1e-12):
                assert bits([0 - p for p in after]) == bits(before)
            elif norm > limit * (1 + 1e-12):
                np.testing.assert_allclose(-flat, original * (limit / norm), rtol=tolerance, atol=0)

    @pytest.mark.parametrize("name", CLIPS[1:])
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_norms_of_half_types(self, name, dtype):
        grads = uniform(np.random.default_rng(16), [(n,) for n in EDGES[1:]], dtype)
        params = [np.zeros_like(g) for g in grads]
        opt = make("SGD", params, {"lr": 1.0, name: 0.5})
        opt.step(grads)
        wide = [g.astype(np.float64) for g in grads]
        for p, g in zip(opt.state_dict()["master"], wide, strict=True):
            norm = np.linalg.norm(g if name == "clip_norm" else np.concatenate(wide))
            np.testing.assert_allclose(-p, g * (0.5 / norm), rtol=2 * UNIT[FLOAT32])

    @pytest.mark.parametrize("name", CLIPS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_zero_stays_zero(self, name, dtype):
        params = [np.zeros(100, dtype), np.zeros(3, dtype)]
        make("SGD", params, {"lr": 1.0, name: 1e-30}).step([np.zeros(100, dtype), np.zeros(3, dtype)])
        assert not any(p.any() for p in params)

    def test_exactly_c_over_norm(self):
        """The norm has no epsilon: 3-4-5 in exact numbers, over two dtypes; at c itself nothing happens."""
        params = [np.zeros(1, np.float32), np.zeros(1)]
        optim.SGD(params, lr=1.0, clip_global_norm=2.5).step([np.array([3.0], np.float32), np.array([4.0])])
        assert [p.item() for p in params] == [-1.5, -2.0]
        params = [np.zeros(1, np.float32), np.zeros(1)]
        optim.SGD(params, lr=1.0, clip_global_norm=5.0).step([np.array([3.0], np.float32), np.array([4.0])])
        assert [p.item() for p in params] == [-3.0, -4.0]

    def test_huge_gradients(self):
        """Values whose squares overflow float64: of all arrays together, and of one beside a small one."""
        for name, expected in (("clip_global_norm", [0.6, 0.8, 0.0]), ("clip_norm", [1.0, 1.0, 0.25])):
            params = [np.zeros(1), np.zeros(1), np.zeros(1)]
            make("SGD", params, {"lr": 1.0, name: 1.0}).step([np.array([x]) for x in (-3e200, -4e200, -0.25)])
            np.testing.assert_allclose([p.item() for p in params], expected, rtol=1e-15, atol=1e-190)
        p = np.zeros(10_000, np.float32)
        optim.SGD([p], lr=1.0, clip_norm=1.0).step([np.full(10_000, 1e30, np.float32)])
        np.testing.assert_allclose(p, -0.01, rtol=1e-6)

    def test_what_is_not_finite(self):
        """NaN stays in its element; infinity makes the factor 0."""
        for name in CLIPS:
            p = np.zeros(3)
            make("SGD", [p], {"lr": 1.0, name: 1.0}).step([np.array([0.5, np.nan, -0.25])])
            assert bits(p[[0, 2]]) == bits(np.array([-0.5, 0.25]))
            assert np.isnan(p[1])
        for name in CLIPS[1:]:
            p, q = np.zeros(2), np.zeros(1)
            make("SGD", [p, q], {"lr": 1.0, name: 1.0}).step([np.array([0.5, np.inf]), np.array([2.0])])
            assert p[0] == 0
            assert np.isnan(p[1])
            assert q[0] == (0 if name == "clip_global_norm" else -1)


BAD_ARGUMENTS = [
    (method, argument, value, options)
    for method in ("SGD", "RMSprop", "Adam", "AdamW")
    for argument, values in {
        "lr": (-1e-3, math.nan, math.inf, "fast", None),
        "weight_decay": (-0.1, math.nan, math.inf),
        "clip_value": (0.0, -1.0, math.nan),
        "clip_norm": (0.0, -1.0, math.inf),
        "clip_global_norm": (0.0, -1.0, "all"),
        "schedule": (0.1, "cosine"),
    }.items()
    for value in values
    for options in ({"lr": 0.1},)
]
BAD_ARGUMENTS += [("SGD", "momentum", value, {"lr": 0.1}) for value in (-0.1, 1.0, 2.0, math.nan)]
BAD_ARGUMENTS += [
    ("SGD", "dampening", value, {"lr": 0.1, "momentum": 0.9}) for value in (-0.1, 1.5, math.nan)
]
BAD_ARGUMENTS += [
    ("SGD", "nesterov", True, {"lr": 0.1}),
    ("SGD", "nesterov", True, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
]
BAD_ARGUMENTS += [("RMSprop", "alpha", value, {}) for value in (-0.1, 1.0)]
BAD_ARGUMENTS += [("RMSprop", "momentum", value, {}) for value in (-0.1, 1.0)]
BAD_ARGUMENTS += [
    (method, "eps", value, {}) for method in ("RMSprop", "Adam", "AdamW") for value in (-1e-8, math.nan)
]
BAD_ARGUMENTS += [
    (method, "betas", value, {})
    for method in ("Adam", "AdamW")
    for value in ((1.0, 0.999), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), (0.9,), 0.9, "90")
]
BAD_ARGUMENTS += [
    ("Adam", "clip_norm", 1.0, {"clip_value": 1.0}),
    ("SGD", "clip_norm", 1.0, {"lr": 1, "clip_global_norm": 1}),
]


def read_only(n):
    a = np.zeros(n)
    a.flags.writeable = False
    return a


BUFFER = np.zeros(10)
BAD_PARAMS = {
    "read-only": ([np.zeros(3), read_only(3)], "params[1]: expected a writable"),
    "strided": ([np.zeros(6)[::2]], "params[0]: expected a C-contiguous"),
    "transposed": ([np.zeros((2, 3)).T], "params[0]: expected a C-contiguous"),
    "reversed": ([np.zeros(3)[::-1]], "params[0]: expected a C-contiguous"),
    "byte order": (
        [np.zeros(3, ">f4" if sys.byteorder == "little" else "<f4")],
        "params[0]: expected aligned",
    ),
    "misaligned": ([np.zeros(9, np.uint8)[1:].view(np.float32)], "params[0]: expected aligned"),
    "twice": ([BUFFER, np.ones(2), BUFFER], "params[2]: expected arrays that share no memory"),
    "overlap": ([BUFFER[4:], BUFFER[:5]], "params[0]: expected arrays that share no memory"),
    "empty": ([], "params: expected one array or more"),
    "empty dict": ({}, "params: expected one array or more"),
    "named": ({"w": np.zeros(3), "b": read_only(2)}, "params['b']: expected a writable"),
    "integers": ([np.zeros(3, int)], "params[0]: expected float32"),
    "complex": ([np.zeros(3, complex)], "params[0]: expected float32"),
    "objects": ([np.zeros(3, object)], "params[0]: expected float32"),
    "a list": ([[1.0, 2.0]], "params[0]: expected a NumPy array"),
    "a number": ([np.zeros(2), 1.0], "params[1]: expected a NumPy array"),
    "masked": ([np.ma.zeros(3)], "params[0]: expected a NumPy array"),
    "one array": (np.zeros((2, 2)), "params: expected a list or dict"),
    "none": (None, "params: expected a list or dict"),
}


class TestRefusals:
    @pytest.mark.parametrize(("method", "argument", "value", "options"), BAD_ARGUMENTS, ids=str)
    def test_arguments(self, method, argument, value, options):
        options = {name: v for name, v in options.items() if name != argument}
        with pytest.raises((ValueError, TypeError), match=rf"{argument}\b.*: expected .*, got ") as caught:
            make(method, [np.zeros(3)], {"lr": 0.1, **options, argument: value})
        if isinstance(value, float) and argument != "schedule":
            assert caught.type is ValueError

    @pytest.mark.parametrize(("params", "message"), BAD_PARAMS.values(), ids=BAD_PARAMS)
    def test_params(self, params, message):
        with pytest.raises((ValueError, TypeError)) as caught:
            optim.SGD(params, lr=0.1)
        assert str(caught.value).startswith(message)
        assert ", got " in str(caught.value)

    BAD_GRADS: ClassVar = {
        "length": (lambda p: [np.ones((2, 3), np.float32)], "grads: expected 3 arrays, got 1"),
        "no list": (lambda p: np.ones((3, 2)), "grads: expected a list of arrays, got ndarray"),
        "none": (lambda p: None, "grads: expected a list of arrays, got NoneType"),
        "dict": (lambda p: {0: np.ones(3)}, "grads: expected a list, as params was one, got a dict"),
        "shape": (lambda p: [None, np.ones(5), None], "grads[1]: expected shape (4,), got (5,)"),
        "dimensions": (
            lambda p: [np.ones((3, 2), np.float32), None, None],
            "grads[0]: expected shape (2, 3)",
        ),
        "same size": (
            lambda p: [np.ones(6, np.float32), None, None],
            "grads[0]: expected shape (2, 3), got (6,)",
        ),
        "trailing axis": (
            lambda p: [None, np.ones((4, 1)), None],
            "grads[1]: expected shape (4,), got (4, 1)",
        ),
        "dtype": (lambda p: [np.ones((2, 3)), None, None], "grads[0]: expected dtype float32, got float64"),
        "half dtype": (
            lambda p: [None, None, np.ones(5, BFLOAT16)],
            "grads[2]: expected dtype float16, got bfloat16",
        ),
        "integers": (lambda p: [None, np.ones(4, int), None], "grads[1]: expected dtype float64, got int64"),
        "itself": (lambda p: [None, p[1], None], "grads[1]: expected memory apart"),
        "another": (
            lambda p: [None, None, p[1].view(np.float16)[3:8]],
            "grads[2]: expected memory",
        ),
        "strided view": (lambda p: [p[0][:, ::-1], None, None], "grads[0]: expected memory apart"),
        "text": (lambda p: [None, "gradient", None], "grads[1]: expected shape (4,), got ()"),
    }

    @pytest.mark.parametrize("clip", CLIPPINGS, ids=str)
    @pytest.mark.parametrize(("bad", "message"), BAD_GRADS.values(), ids=BAD_GRADS)
    def test_gradients(self, bad, message, clip):
        """A refused step updates nothing and counts nothing; the next good one is the second."""
        rng = np.random.default_rng(9)
        shapes, dtypes = [(2, 3), (4,), (5,)], [FLOAT32, FLOAT64, np.dtype(np.float16)]
        start, grads = uniform(rng, shapes, dtypes), uniform(rng, shapes, dtypes)
        asked = []
        options = {"schedule": lambda t: asked.append(t) or 0.1} | clip
        params, untroubled = copies(start), copies(start)
        opt, other = optim.Adam(params, **options), optim.Adam(untroubled, **options)
        opt.step(grads)
        before = bits([params, opt.state_dict(), opt.lr])
        asked.clear()
        bad_grads = bad(params)
        if isinstance(bad_grads, list) and len(bad_grads) == 3:  # the others are all right
            bad_grads = [grads[i] if g is None else g for i, g in enumerate(bad_grads)]
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            opt.step(bad_grads)
        assert bits([params, opt.state_dict(), opt.lr]) == before
        assert asked == []
        opt.step(grads)
        other.step(grads)
        other.step(grads)
        assert bits([params, opt.state_dict()]) == bits([untroubled, other.state_dict()])

    def test_overlap_with_any_parameter(self):
        """Looked for among all parameters, also where the same gradient array was fine before."""
        memory = np.zeros(4096)
        params = [memory[k : k + 32] for k in range(0, 4096, 64)]
        apart = [memory[k + 32 : k + 64] for k in range(0, 4096, 64)]
        opt = optim.SGD(params, lr=0.1)
        opt.step(apart)
        for k in (0, 31, 63):
            with pytest.raises(ValueError, match=rf"grads\[{k}\]: expected memory apart"):
                opt.step([*apart[:k], memory[64 * 9 + 31 :][:32], *apart[k + 1 :]])
        assert opt.state_dict()["step"] == 1
        empty = optim.SGD([memory[:0], memory[4:8]], lr=0.1)
        nothing = np.ndarray((0,), np.float64, memory, offset=6 * 8)  # a slice would point elsewhere
        empty.step([nothing, np.ones(4)])

    def test_parameters_that_change(self):
        p = np.zeros(4)
        opt = optim.SGD([np.zeros(2), p], lr=0.1)
        p.flags.writeable = False
        with pytest.raises(ValueError, match=r"params\[1\]: expected it writable"):
            opt.step([np.ones(2), np.ones(4)])
        p.flags.writeable = True
        p.resize(8, refcheck=False)
        with pytest.raises(ValueError, match=r"params\[1\]: expected it writable and in its place"):
            opt.step([np.ones(2), np.ones(8)])
        assert opt.state_dict()["step"] == 0
        assert not opt.params[0].any()

    @pytest.mark.parametrize("rate", [-1e-9, math.nan, math.inf, None, "0.1"])
    def test_schedule(self, rate):
        p = np.zeros(3)
        opt = optim.SGD([p], lr=0.5, schedule=lambda t: 1.0 if t < 2 else rate)
        opt.step([np.ones(3)])
        opt.step([np.ones(3)])
        with pytest.raises(
            TypeError if isinstance(rate, str | None) else ValueError, match=r"schedule\(2\): expected"
        ):
            opt.step([np.ones(3)])
        assert p.tolist() == [-2.0] * 3
        assert (opt.state_dict(), opt.lr) == ({"step": 2}, 1.0)

    @pytest.mark.parametrize("threads", [0, -1, 1.5, "two"])
    def test_threads(self, threads):
        p = np.zeros(3)
        opt = optim.SGD([p], lr=0.5, schedule=lambda t: 1.0)
        with pytest.raises((ValueError, TypeError), match="num_threads"):
            opt.step([np.ones(3)], num_threads=threads)
        assert not p.any()
        assert opt.state_dict() == {"step": 0}

    def test_base_class(self):
        """The base class has no method of its own, and refuses before it counts."""
        opt = optim.Optimizer([np.zeros(3)], 0.1, 0.0, None, None, None, None)
        with pytest.raises(TypeError, match="SGD, RMSprop, Adam, AdamW"):
            opt.step([np.ones(3)])
        assert opt.state_dict() == {"step": 0}


class TestState:
    SLOTS: ClassVar = {
        "SGD": ({"lr": 0.1}, []),
        "momentum": ({"lr": 0.1, "momentum": 0.9}, ["momentum_buffer"]),
        "RMSprop": ({"momentum": 0.9, "centered": True}, ["grad_avg", "momentum_buffer", "square_avg"]),
        "Adam": ({"amsgrad": True}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        "AdamW": ({}, ["exp_avg", "exp_avg_sq"]),
    }

    @pytest.mark.parametrize("name", SLOTS)
    @pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES], ids=["plain", "with halves"])
    def test_slots(self, name, dtypes):
        options, slots = self.SLOTS[name]
        shapes = [(3, 4), (5,), (), (2, 0, 3)][: len(dtypes)]
        params = [np.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        opt = make("SGD" if name == "momentum" else name, params, options)
        opt.step([np.ones_like(p) for p in params])
        state = opt.state_dict()
        assert sorted(state) == sorted([*slots, "step", *(["master"] if len(dtypes) > 2 else [])])
        assert state["step"] == 1
        assert type(state["step"]) is int
        for slot in slots:
            assert [a.shape for a in state[slot]] == shapes
            assert [a.dtype for a in state[slot]] == [FLOAT64 if d == FLOAT64 else FLOAT32 for d in dtypes]
            state[slot][0][...] = 7  # a copy: nothing comes of it
            assert (opt.state_dict()[slot][0] != 7).all()

    @variants
    def test_round_trip_continues(self, method, options):
        """A new optimizer over copies, with the state of the old, goes on to the same bits."""
        rng = np.random.default_rng(10)
        shapes = [(65,), (3, 5), (CHUNK + 1,), (17,)]
        opt = make(method, uniform(rng, shapes, DTYPES), options)
        for _ in range(3):
            opt.step(uniform(rng, shapes, DTYPES))
        again = make(method, copies(opt.params), options)
        again.load_state_dict(opt.state_dict())
        assert bits(again.state_dict()) == bits(opt.state_dict())
        for _ in range(2):
            grads = uniform(rng, shapes, DTYPES)
            opt.step(grads)
            again.step(grads)
        assert bits([again.params, again.state_dict()]) == bits([opt.params, opt.state_dict()])

    def test_bad_state(self):
        rng = np.random.default_rng(11)
        opt = optim.Adam(uniform(rng, [(3,), (2, 2)]))
        opt.step(uniform(rng, [(3,), (2, 2)]))
        good = opt.state_dict()
        before = bits(good)
        bad = {
            "state": [
                {"step": 1},
                {k: v for k, v in good.items() if k != "step"},
                {k: v for k, v in good.items() if k != "exp_avg_sq"},
                good | {"max_exp_avg_sq": good["exp_avg"]},
            ],
            "step": [good | {"step": -1}, good | {"step": 1.5}, good | {"step": None}],
            "exp_avg_sq": [
                good | {"exp_avg_sq": good["exp_avg_sq"][:1]},
                good | {"exp_avg_sq": [good["exp_avg_sq"][0], np.zeros(4, np.float32)]},
                good | {"exp_avg_sq": [good["exp_avg_sq"][0], np.zeros((2, 2), complex)]},
                good | {"exp_avg_sq": [good["exp_avg_sq"][0], None]},
            ],
        }
        for name, states in bad.items():
            for state in states:
                changed = (
                    state | {"exp_avg": [a + 1 for a in good["exp_avg"]]} if "exp_avg" in state else state
                )
                with pytest.raises((ValueError, TypeError), match=rf"^{name}.*: expected .*, got "):
                    opt.load_state_dict(changed)
                assert bits(opt.state_dict()) == before

    def test_a_skipped_parameter_keeps_its_state(self):
        rng = np.random.default_rng(12)
        shapes = [(5,), (CHUNK + 3,)]
        opt = optim.AdamW(uniform(rng, shapes, [FLOAT32, BFLOAT16]), clip_global_norm=1.0)
        opt.step(uniform(rng, shapes, [FLOAT32, BFLOAT16]))
        before = opt.params, opt.state_dict()
        before = bits([before[0][1], {name: value[1] for name, value in before[1].items() if name != "step"}])
        opt.step([np.ones(5, np.float32), None])
        state = opt.state_dict()
        assert bits([opt.params[1], {name: v[1] for name, v in state.items() if name != "step"}]) == before
        assert state["step"] == 2
        opt.step([None, None])
        assert opt.state_dict()["step"] == 3

    def test_dicts(self):
        rng = np.random.default_rng(13)
        arrays = uniform(rng, [(3, 2), (2,), (4,)])
        grads = uniform(rng, [(3, 2), (2,), (4,)])
        plain = optim.Adam(copies(arrays))
        named = optim.Adam(dict(zip("wba", copies(arrays), strict=True)))
        plain.step(grads)
        named.step(dict(zip("abw", reversed(grads), strict=True)))
        assert list(named.params) == ["w", "b", "a"]
        assert bits(list(named.params.values())) == bits(plain.params)
        plain.step([grads[0], None, grads[2]])
        named.step([grads[0], None, grads[2]])  # in the order of the keys
        assert bits(named.state_dict()) == bits(plain.state_dict())
        before = bits(named.state_dict())
        for bad in ({"w": grads[0]}, dict(zip("wbac", [*grads, grads[0]], strict=True))):
            with pytest.raises(ValueError, match="grads: expected the keys of params, got a difference in"):
                named.step(bad)
        with pytest.raises(ValueError, match=r"grads\['b'\]: expected shape"):
            named.step({"w": grads[0], "b": grads[0], "a": grads[2]})
        assert bits(named.state_dict()) == before

    def test_params_and_lr(self):
        p = np.zeros(2)
        opt = optim.SGD(iter([p]), lr=1)
        assert opt.params[0] is p
        assert opt.lr == 1.0
        opt.lr = 0.25
        opt.step(g for g in [np.ones(2)])
        assert p.tolist() == [-0.25, -0.25]
        for bad in (-1, math.nan, "x"):
            with pytest.raises((ValueError, TypeError), match="lr: expected"):
                opt.lr = bad
        assert opt.lr == 0.25
        assert repr(opt) == "SGD(1 arrays, 2 elements, lr=0.25, step=1)"
        with pytest.raises(ValueError, match="lr: expected no assignment"):
            optim.SGD([p], lr=1, schedule=optim.constant(0.1)).lr = 0.5

    def test_subclasses_and_gradient_lists_are_let_go(self):
        """Memory-mapped and other subclasses serve; the optimizer keeps no gradient alive."""

        class Named(np.ndarray):
            pass

        p = np.zeros(3).view(Named)
        g = np.ones(3).view(Named)
        opt = optim.SGD([p], lr=1.0)
        references = sys.getrefcount(g)
        opt.step([g])
        assert p.tolist() == [-1.0] * 3
        assert sys.getrefcount(g) == references


class TestSchedules:
    def test_values(self):
        cases = {
            optim.constant(0.5): [0.5, 0.5, 0.5],
            optim.inverse_time(1.0, 0.5): [1, 1 / 1.5, 1 / 2],
            optim.step_decay(1.0, 0.1, 2): [1.0, 1.0, 0.1],
            optim.exponential(1.0, 0.9): [1.0, 0.9, 0.81],
            optim.cosine(1.0, 4): [1, (1 + math.sqrt(0.5)) / 2, 0.5],
            optim.cosine(1.0, 2, 0.5): [1.0, 0.75, 0.5],
        }
        for schedule, expected in cases.items():
            np.testing.assert_allclose([schedule(t) for t in range(3)], expected, rtol=1e-15)
        assert optim.cosine(1.0, 10, 0.25)(10) == optim.cosine(1.0, 10, 0.25)(10**6) == 0.25

    @given(st.floats(1e-6, 1.0), st.integers(0, 50))
    def test_warmup(self, lr, warmup):
        """Warm-up rises in equal parts to the rate where the schedule proper, only put off, starts."""
        for make_schedule in (
            lambda **w: optim.constant(lr, **w),
            lambda **w: optim.inverse_time(lr, 0.1, **w),
            lambda **w: optim.step_decay(lr, 0.5, 3, **w),
            lambda **w: optim.exponential(lr, 0.9, **w),
            lambda **w: optim.cosine(lr, 20, lr / 10, **w),
        ):
            cold, warm = make_schedule(), make_schedule(warmup=warmup)
            assert [warm(warmup + t) for t in range(30)] == [cold(t) for t in range(30)]
            rise = np.diff([0.0, *(warm(t) for t in range(warmup + 1))])
            np.testing.assert_allclose(rise, lr / (warmup + 1), rtol=1e-10)

    def test_drives_an_optimizer(self):
        rng = np.random.default_rng(14)
        start = uniform(rng, [(40,)])
        schedule = optim.cosine(0.1, 6, warmup=2)
        opt = optim.Adam(copies(start), lr=5.0, schedule=schedule)
        reference = Reference("Adam", start, unit=UNIT[FLOAT32], schedule=schedule)
        for t in range(9):
            grads = uniform(rng, [(40,)])
            opt.step(grads)
            reference.step(grads)
            assert opt.lr == schedule(t)
        assert_follows(opt, reference)

    @pytest.mark.parametrize(
        ("call", "argument"),
        [
            (lambda: optim.constant(-1), "lr"),
            (lambda: optim.inverse_time(0.1, -1), "decay"),
            (lambda: optim.step_decay(0.1, 0, 3), "factor"),
            (lambda: optim.step_decay(0.1, 0.5, 0), "every"),
            (lambda: optim.exponential(0.1, 1.5), "factor"),
            (lambda: optim.cosine(0.1, 0), "steps"),
            (lambda: optim.cosine(0.1, 5, -1), "final"),
            (lambda: optim.cosine(math.nan, 5), "lr"),
            (lambda: optim.constant(0.1, warmup=-1), "warmup"),
            (lambda: optim.constant(0.1, warmup=0.5), "warmup"),
        ],
    )
    def test_refusals(self, call, argument):
        with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected .*, got "):
            call()


class TestMaxNorm:
    @given(st.data())
    def test_laws(self, data):
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        shape = data.draw(st.sampled_from([(7,), (4, 6), (3, 2, 5), (2, 3, 3, 3)]))
        axis = data.draw(st.sampled_from([None, *range(-len(shape), len(shape))]))
        dtype = data.draw(st.sampled_from(list(UNIT)))
        w = (rng.normal(size=shape) * 10.0 ** data.draw(st.integers(-15, 15))).astype(dtype)
        c = float(np.linalg.norm(w.astype(float))) * data.draw(st.floats(0.1, 2))
        before = w.copy()
        optim.project_max_norm([w], c, axis)
        rows = [a[None] if axis is None else np.moveaxis(a, axis, 0) for a in (w, before)]
        tolerance = 4 * UNIT[dtype] + w.size * 2.0**-53
        for after, row in zip(*rows, strict=True):
            norm = np.linalg.norm(row.astype(float).ravel())
            assert np.linalg.norm(after.astype(float).ravel()) <= c * (1 + tolerance)
            if norm < c * (1 - 1e-12):
                assert bits(after) == bits(row)
            else:
                np.testing.assert_allclose(after, row.astype(float) * (c / norm), rtol=tolerance)

    def test_in_place(self):
        """Views, halves, zeros, empty arrays, huge and not finite values."""
        w = np.zeros((4, 6), np.float16)
        w[:, ::2] = 3.0
        optim.project_max_norm({"w": w[:, ::2], "rest": w[:, 1::2]}, 1.5)
        np.testing.assert_allclose(np.linalg.norm(w.astype(float)), 1.5, rtol=2.0**-10)
        huge, tiny, empty, odd = (
            np.full(4, 1e300),
            np.full(4, 1e-300),
            np.zeros(0),
            np.array([[3.0, np.nan], [3.0, 4.0]]),
        )
        optim.project_max_norm([huge, tiny, empty], 1.0)
        np.testing.assert_allclose(huge, 0.5, rtol=1e-15)
        assert (tiny == 1e-300).all()
        optim.project_max_norm([odd], 1.0, axis=0)
        assert odd[0, 0] == 3.0
        np.testing.assert_allclose(odd[1], [0.6, 0.8], rtol=1e-15)

    @pytest.mark.parametrize(
        ("params", "max_norm", "axis", "argument"),
        [
            ([np.full(3, 9.0), read_only(3)], 1.0, None, r"params\[1\]"),
            ([np.full(3, 9.0), np.zeros(3, int)], 1.0, None, r"params\[1\]"),
            ([np.full((3, 3), 9.0), np.zeros(3)], 1.0, 1, "axis"),
            ([np.full(3, 9.0)], 1.0, 0.5, "axis"),
            ([np.full(3, 9.0)], 0.0, None, "max_norm"),
            ([np.full(3, 9.0)], math.nan, None, "max_norm"),
        ],
    )
    def test_refusals(self, params, max_norm, axis, argument):
        with pytest.raises((ValueError, TypeError), match=rf"^{argument}: expected .*, got "):
            optim.project_max_norm(params, max_norm, axis)
        assert (params[0] == 9).all()


def test_signatures():
    """The contract, to the letter."""
    clips = "clip_value=None, clip_norm=None, clip_global_norm=None, schedule=None"
    expected = {
        "SGD": f"params, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0, {clips}",
        "RMSprop": "params, lr=0.01, alpha=0.99, eps=1e-08, momentum=0.0, centered=False, "
        f"eps_inside_sqrt=False, weight_decay=0.0, {clips}",
        "Adam": "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, "
        f"eps_inside_sqrt=False, {clips}",
        "AdamW": "params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, "
        f"eps_inside_sqrt=False, {clips}",
    }
    for name, text in expected.items():
        parameters = inspect.signature(getattr(optim, name)).parameters.values()
        assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == text


def test_bfloat16_needs_no_import():
    """bfloat16 is known by its name: only who passes such arrays has imported ml_dtypes."""
    run_python("""
        import sys
        import numpy as np
        from fastbn import optim
        p = np.ones(3, np.float16)
        optim.Adam([p]).step([np.ones(3, np.float16)])
        assert "ml_dtypes" not in sys.modules
    """)


def test_learns():
    """Every method, with its defaults, brings a quadratic bowl down from where it starts."""
    for method, options in VARIANTS:
        p = np.array([1.0, -1.0])
        opt = make(method, [p], options | {"lr": 0.01})
        for _ in range(400):
            opt.step([np.array([1.0, 4.0]) * p])
        assert np.abs(p).max() < 0.2, (method, options)
