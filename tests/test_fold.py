"""Folding: fold(x) == bn(layer(x)), rounded once, in every layout; and nothing is ever silently wrong."""

import decimal
import doctest
import importlib
import math
from fractions import Fraction
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from convolution import channel_pairs, conv, conv_transpose, dense
from hypothesis import given, settings
from hypothesis import strategies as st

import fastbn
from fastbn import BatchNormParams, fold_conv, fold_into_conv, fold_into_linear, fold_linear, to_affine

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
U64 = 2.0**-53
quick = settings(max_examples=60, deadline=None)


def batch_norm(x, bn):
    """The formula, in float64, over axis 1."""
    channels = (-1, *(1 for _ in x.shape[2:]))
    mean, var = (np.asarray(v, np.float64).reshape(channels) for v in (bn.mean, bn.var))
    gamma = 1.0 if bn.gamma is None else np.asarray(bn.gamma, np.float64).reshape(channels)
    beta = 0.0 if bn.beta is None else np.asarray(bn.beta, np.float64).reshape(channels)
    return gamma * (x - mean) / np.sqrt(var + bn.eps) + beta


def magnitude(bn):
    """BN of magnitudes, as BatchNormParams: nothing cancels, so that u times it bounds BN's roundings."""
    gamma, beta = (None if v is None else np.abs(v) for v in (bn.gamma, bn.beta))
    return BatchNormParams(gamma, beta, -np.abs(bn.mean), bn.var, bn.eps)


def absolute(bias):
    return None if bias is None else np.abs(bias)


def half_ulp(array):
    return np.spacing(np.abs(array)).astype(np.float64) / 2


def some_bn(rng, channels, dtype=np.float64, affine=(True, True), eps=1e-5):
    gamma, beta, mean = rng.normal(size=(3, channels)).astype(dtype)
    var = rng.uniform(0.1, 4, channels).astype(dtype)
    return BatchNormParams(gamma if affine[0] else None, beta if affine[1] else None, mean, var, eps)


def assert_folds(f, run, x, unfolded, magnitudes, terms):
    """Hold run(x, f.weight, f.bias) against `unfolded`, computed in float64 from sums of `terms` products.

    The folded values may be off by half an ulp each, a float64 oracle by terms·2**-53 of its magnitudes.
    """
    bound = run(np.abs(x), half_ulp(f.weight), half_ulp(f.bias))
    bound += (terms + 12) * U64 * (magnitudes + run(np.abs(x), np.abs(f.weight), np.abs(f.bias)))
    error = np.abs(run(x, f.weight, f.bias) - unfolded)
    assert (error <= bound).all(), (error / bound).max()


@st.composite
def problems(draw, transposed=False, depthwise=True):
    """A convolution: layout, groups, weight, bias, x, geometry, and a generator for its BN."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dims, dtype = draw(st.integers(1, 3)), draw(st.sampled_from(DTYPES))
    groups, outs, ins = (draw(st.integers(1, 3)) for _ in range(3))
    multiplier = depthwise and draw(st.booleans())
    spatial = "DHW"[3 - dims :]
    if multiplier:
        letters, size, groups_argument = (
            "IM" + spatial,
            {"I": groups, "M": outs},
            draw(st.sampled_from([1, groups])),
        )
        ins = 1
    else:
        letters, groups_argument = ("IO" if transposed else "OI") + spatial, groups
        size = {"O": outs, "I": groups * ins} if transposed else {"O": groups * outs, "I": ins}
    kernel = [draw(st.integers(1, 3)) for _ in spatial]
    size.update(zip(spatial, kernel, strict=True))
    named = not multiplier and draw(st.booleans())
    layout = letters if named else "".join(draw(st.permutations(letters)))
    weight = rng.normal(size=[size[letter] for letter in layout]).astype(dtype)
    reach = [size[letter] for letter in layout if letter in spatial]
    geometry = {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2))}
    x = rng.normal(size=(2, groups * ins, *(2 * (k - 1) + draw(st.integers(1, 3)) for k in reach)))
    return SimpleNamespace(
        rng=rng,
        dtype=dtype,
        weight=weight,
        bias=rng.normal(size=groups * outs).astype(dtype) if draw(st.booleans()) else None,
        x=x,
        c_in=groups * ins,
        c_out=groups * outs,
        terms=ins * math.prod(kernel),
        fold={"groups": groups_argument, "layout": None if named else layout},
        run={"groups": groups_argument, "layout": None if named else layout, **geometry},
        affine=draw(st.tuples(st.booleans(), st.booleans())),
    )


# fold(x) == bn(layer(x)) ----------------------------------------------------------------------------------


@quick
@given(problems(), st.integers(0, 2))
def test_conv_then_bn(p, padding):
    bn = some_bn(p.rng, p.c_out, affine=p.affine)
    f = fold_conv(p.weight, p.bias, bn, **p.fold)
    assert f.pad_value is None

    def run(x, weight, bias):
        return conv(x, weight, bias, padding=padding, **p.run)

    unfolded = batch_norm(run(p.x, p.weight, p.bias), bn)
    magnitudes = batch_norm(run(np.abs(p.x), np.abs(p.weight), absolute(p.bias)), magnitude(bn))
    assert_folds(f, run, p.x, unfolded, magnitudes, p.terms)


@quick
@given(problems(transposed=True))
def test_transposed_conv_then_bn(p):
    bn = some_bn(p.rng, p.c_out, affine=p.affine)
    f = fold_conv(p.weight, p.bias, bn, transposed=True, **p.fold)

    def run(x, weight, bias):
        return conv_transpose(x, weight, bias, **p.run)

    unfolded = batch_norm(run(p.x, p.weight, p.bias), bn)
    magnitudes = batch_norm(run(np.abs(p.x), np.abs(p.weight), absolute(p.bias)), magnitude(bn))
    assert_folds(f, run, p.x, unfolded, magnitudes, p.terms)


@quick
@given(problems(), st.integers(0, 2))
def test_bn_then_conv(p, padding):
    bn = some_bn(p.rng, p.c_in, affine=p.affine)
    f = fold_into_conv(bn, p.weight, p.bias, padding=padding, **p.fold)
    assert (f.pad_value is None) == (padding == 0)

    def pad(x, value):  # one value per channel, so that the magnitudes of x include those of the padding
        around = np.empty((*x.shape[:2], *(n + 2 * padding for n in x.shape[2:])))
        around[...] = np.broadcast_to(value, p.c_in).reshape(-1, *(1 for _ in x.shape[2:]))
        around[(..., *(slice(padding, padding + n) for n in x.shape[2:]))] = x
        return around

    def run(x, weight, bias):
        return conv(x, weight, bias, **p.run)

    unfolded = conv(batch_norm(p.x, bn), p.weight, p.bias, padding=padding, **p.run)
    around = pad(p.x, 0.0 if f.pad_value is None else f.pad_value)
    magnitudes = run(batch_norm(np.abs(around), magnitude(bn)), np.abs(p.weight), absolute(p.bias))
    assert_folds(f, run, around, unfolded, magnitudes, p.terms)


@quick
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["OI", "IO", None]),
    n_out=st.integers(1, 7),
    channels=st.integers(1, 5),
    repeat=st.integers(1, 4),
    with_bias=st.booleans(),
    affine=st.tuples(st.booleans(), st.booleans()),
)
def test_linear(seed, dtype, layout, n_out, channels, repeat, with_bias, affine):
    rng = np.random.default_rng(seed)
    n_in = channels * repeat
    shape = (n_in, n_out) if layout == "IO" else (n_out, n_in)
    weight, x = rng.normal(size=shape).astype(dtype), rng.normal(size=(3, n_in))
    bias = rng.normal(size=n_out).astype(dtype) if with_bias else None

    def run(x, w, b):
        return dense(x, w, b, layout=layout or "OI")

    bn = some_bn(rng, n_out, affine=affine)
    f = fold_linear(weight, bias, bn, layout=layout)
    magnitudes = batch_norm(run(np.abs(x), np.abs(weight), absolute(bias)), magnitude(bn))
    assert_folds(f, run, x, batch_norm(run(x, weight, bias), bn), magnitudes, n_in)

    bn = some_bn(rng, channels, affine=affine)
    f = fold_into_linear(bn, weight, bias, layout=layout, repeat=repeat)

    def flat_bn(x, bn):  # BN of (N, C, repeat), then a channels-first flatten
        return batch_norm(x.reshape(3, channels, repeat), bn).reshape(3, n_in)

    magnitudes = run(flat_bn(np.abs(x), magnitude(bn)), np.abs(weight), absolute(bias))
    assert_folds(f, run, x, run(flat_bn(x, bn), weight, bias), magnitudes, n_in)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "groups", "transposed", "shape"),
    [
        ("OIHW", 2, False, (6, 3, 2, 3)),
        ("HWIO", 2, False, (2, 3, 3, 6)),
        ("WIO", 1, False, (3, 2, 5)),
        ("DHWIO", 3, False, (1, 2, 3, 2, 6)),
        ("HWIM", 1, False, (2, 3, 4, 3)),
        ("HWOI", 1, True, (2, 3, 5, 4)),
        ("IOHW", 2, True, (6, 2, 2, 3)),
        ("IODHW", 6, True, (6, 2, 1, 2, 3)),
    ],
)
def test_powers_of_two_fold_exactly(dtype, layout, groups, transposed, shape):
    rng = np.random.default_rng(len(layout) + groups)
    weight = rng.integers(-4, 5, shape).astype(dtype)
    pairs = list(channel_pairs(weight.astype(np.float64), layout, groups, transposed))
    c_out, c_in = 1 + max(o for o, _, _ in pairs), 1 + max(i for _, i, _ in pairs)
    bias = rng.integers(-4, 5, c_out).astype(dtype)

    def exact_bn(channels):
        gamma, sigma = rng.choice([-2.0, -0.5, 1.0, 4.0], channels), rng.choice([0.5, 1.0, 2.0], channels)
        beta, mean = rng.integers(-1, 2, (2, channels)).astype(np.float64)
        return BatchNormParams(gamma, beta, mean, sigma**2, 0.0), gamma / sigma, beta - gamma / sigma * mean

    bn, scale, shift = exact_bn(c_out)
    f = fold_conv(weight, bias, bn, groups=groups, transposed=transposed, layout=layout)
    expected = {(o, i): scale[o] * w for o, i, w in pairs}
    for o, i, w in channel_pairs(f.weight, layout, groups, transposed):
        np.testing.assert_array_equal(w.astype(np.float64), expected[o, i])
    np.testing.assert_array_equal(f.bias.astype(np.float64), scale * bias.astype(np.float64) + shift)

    if not transposed:
        bn, scale, shift = exact_bn(c_in)
        f = fold_into_conv(bn, weight, bias, groups=groups, layout=layout, padding=1)
        expected = {(o, i): scale[i] * w for o, i, w in pairs}
        for o, i, w in channel_pairs(f.weight, layout, groups):
            np.testing.assert_array_equal(w.astype(np.float64), expected[o, i])
        total = bias.astype(np.float64)
        for o, i, w in pairs:
            total[o] += w.sum() * shift[i]
        np.testing.assert_array_equal(f.bias, total.astype(dtype))
        np.testing.assert_array_equal(f.pad_value, -shift / scale)


@pytest.mark.parametrize(("keras", "to_pytorch"), [("HWIO", (3, 2, 0, 1)), ("HWOI", (2, 3, 0, 1))])
def test_layouts_are_transposes_of_each_other(keras, to_pytorch):
    rng = np.random.default_rng(5)
    weight, bias = rng.normal(size=(3, 2, 4, 5)), rng.normal(size=5 if keras == "HWIO" else 4)
    bn, bn_in = some_bn(rng, len(bias)), some_bn(rng, 4 + 5 - len(bias))
    folds = [
        lambda w, layout: fold_conv(w, bias, bn, layout=layout),
        lambda w, layout: fold_into_conv(bn_in, w, bias, layout=layout),
    ]
    for fold in folds:
        ours, pytorch = fold(weight, keras), fold(weight.transpose(to_pytorch), None)
        np.testing.assert_array_equal(ours.weight.transpose(to_pytorch), pytorch.weight)
        np.testing.assert_array_equal(ours.bias, pytorch.bias)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_against_pytorch(dims, groups):
    torch = pytest.importorskip("torch")
    functional, rng = torch.nn.functional, np.random.default_rng(10 * dims + groups)
    kernel, size = (2, 3, 2)[:dims], (5, 6, 4)[:dims]
    x = rng.normal(size=(2, 6, *size))

    def bn_of(y, bn):
        parts = (torch.tensor(v) for v in (bn.mean, bn.var, bn.gamma, bn.beta))
        return functional.batch_norm(torch.as_tensor(y), *parts, eps=bn.eps).numpy()

    def run(name, x, weight, bias, **options):
        layer = getattr(functional, f"{name}{dims}d")
        return layer(*(torch.as_tensor(v) for v in (x, weight, bias)), groups=groups, **options).numpy()

    bound = 64 * math.prod(kernel) * 6 * U64  # terms of a sum, with all magnitudes of order 1 to 10
    for name, transposed, oracle in ("conv", False, conv), ("conv_transpose", True, conv_transpose):
        weight = rng.normal(size=(6, 12 // groups, *kernel) if transposed else (12, 6 // groups, *kernel))
        bias, bn = rng.normal(size=12), some_bn(rng, 12)
        options = {"stride": 2, "dilation": 1, "padding": 1}
        plain = run(name, x, weight, bias, **options)
        np.testing.assert_allclose(
            oracle(x, weight, bias, groups=groups, **options), plain, rtol=0, atol=bound
        )
        f = fold_conv(weight, bias, bn, groups=groups, transposed=transposed)
        np.testing.assert_allclose(
            run(name, x, f.weight, f.bias, **options), bn_of(plain, bn), rtol=0, atol=10 * bound
        )

    weight, bias, bn = rng.normal(size=(12, 6 // groups, *kernel)), rng.normal(size=12), some_bn(rng, 6)
    f = fold_into_conv(bn, weight, bias, groups=groups, padding=(1,) * dims)
    around = np.empty((2, 6, *(s + 2 for s in size)))
    around[...] = f.pad_value.reshape(6, *(1,) * dims)
    around[(..., *(slice(1, -1),) * dims)] = x
    np.testing.assert_allclose(
        run("conv", around, f.weight, f.bias),
        run("conv", bn_of(x, bn), weight, bias, padding=1),
        rtol=0,
        atol=20 * bound,
    )


def test_zero_padding_needs_the_pad_value():
    rng = np.random.default_rng(3)
    bn, weight, x = some_bn(rng, 4), rng.normal(size=(6, 4, 3, 3)), rng.normal(size=(2, 4, 5, 5))
    f = fold_into_conv(bn, weight, None, padding=1)
    truth = conv(batch_norm(x, bn), weight, padding=1)
    bound = 1000 * U64 * np.abs(weight).sum()
    assert np.abs(conv(x, f.weight, f.bias, padding=1, pad_value=f.pad_value) - truth).max() < bound
    wrong = np.abs(conv(x, f.weight, f.bias, padding=1) - truth)
    assert wrong[..., 1:-1, 1:-1].max() < bound
    border = np.ones((5, 5), bool)
    border[1:-1, 1:-1] = False
    assert wrong[..., border].min() > 1e-6  # every border value of every channel would be silently wrong


@pytest.mark.parametrize(
    ("padding", "padded"),
    [
        (0, False),
        ((0, 0), False),
        ("valid", False),
        (((0, 0), (0, 0)), False),
        (1, True),
        ((0, 2), True),
        ([1, 1], True),
        (((0, 0), (1, 0)), True),
        ("same", True),
        (np.int64(1), True),
    ],
)
def test_padding_forms(padding, padded):
    bn = BatchNormParams([2.0, 0.0, -4.0], [1.0, -0.0, 0.0], [3.0, 7.0, 5.0], [1.0, 1.0, 1.0], 0.0)
    f = fold_into_conv(bn, np.ones((2, 3, 1, 3)), None, padding=padding)
    if not padded:
        assert f.pad_value is None
    else:
        assert f.pad_value.dtype == np.float64
        np.testing.assert_array_equal(f.pad_value, [2.5, 0.0, 5.0])
        assert not np.signbit(f.pad_value[1])
    assert fold_into_conv(bn, np.ones((2, 3, 1, 1)), None, padding="same").pad_value is None


def test_depthwise_and_grouped_pad_values_are_per_input_channel():
    bn = some_bn(np.random.default_rng(1), 4)
    assert fold_into_conv(bn, np.ones((3, 3, 4, 2)), None, padding=1, layout="HWIM").pad_value.shape == (4,)
    assert fold_into_conv(bn, np.ones((6, 2, 3)), None, padding=1, groups=2).pad_value.shape == (4,)


# Accuracy: rounded once -----------------------------------------------------------------------------------


def exact_affine(bn):
    """scale and shift as Fractions, right to hundreds of bits: the root is that of a scaled integer."""
    scale, shift = [], []
    for c in range(len(bn.mean)):
        gamma = Fraction(1 if bn.gamma is None else float(bn.gamma[c]))
        beta = Fraction(0 if bn.beta is None else float(bn.beta[c]))
        total = Fraction(float(bn.var[c])) + Fraction(bn.eps)
        root = Fraction(math.isqrt((total.numerator << 2600) // total.denominator), 1 << 1300)
        scale.append(gamma / root)
        shift.append(beta - scale[-1] * Fraction(float(bn.mean[c])))
    return scale, shift


def test_pad_values_are_rounded_once_though_shift_cancels():
    bn = some_bn(np.random.default_rng(11), 6)._replace(mean=np.linspace(1e3, 1e9, 6))
    bn = bn._replace(beta=to_affine(bn)[0] * bn.mean)  # shift is what rounding left
    f, (scale, shift) = fold_into_conv(bn, np.ones((1, 6, 1)), None, padding=1), exact_affine(bn)
    for got, s, t in zip(f.pad_value, scale, shift, strict=True):
        assert_rounded_once(got, -t / s)


def assert_rounded_once(got, exact, slack=Fraction(0)):
    """No neighbour of got is nearer to exact."""
    error = abs(Fraction(float(got)) - exact)
    for end in -np.inf, np.inf:
        neighbour = float(np.nextafter(got, got.dtype.type(end)))
        assert not math.isfinite(neighbour) or error <= abs(Fraction(neighbour) - exact) + slack


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    size=st.sampled_from([1.0, 1e-3, 1e3]),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e9]),
)
def test_every_result_is_rounded_once(seed, dtype, size, offset):
    rng = np.random.default_rng(seed)
    if dtype == np.float16:  # which ends at 65504
        size, offset = min(size, 1.0), min(offset, 100.0)
    weight = (size * rng.normal(size=(2, 3, 2))).astype(dtype)
    bn = some_bn(rng, 2, eps=1e-3)
    bn = bn._replace(mean=bn.mean + offset)
    bias = bn.mean.astype(dtype)  # scale·bias + shift cancels down to beta
    f, (scale, shift) = fold_conv(weight, bias, bn), exact_affine(bn)
    for (o, i, k), got in np.ndenumerate(f.weight):
        assert_rounded_once(got, scale[o] * Fraction(float(weight[o, i, k])))
    for o in range(2):
        terms = [scale[o] * Fraction(float(bias[o])), shift[o]]
        assert_rounded_once(f.bias[o], sum(terms), sum(map(abs, terms)) / 2**98)

    bn = some_bn(rng, 3, eps=1e-3)
    bn = bn._replace(mean=bn.mean + offset)
    scale, shift = exact_affine(bn)
    sums = [[Fraction(float(w)) * shift[i] for i in range(3) for w in weight[o, i]] for o in range(2)]
    bias = np.array([-float(sum(terms)) for terms in sums]).astype(dtype)  # b + Σ W·shift all but cancels
    f = fold_into_conv(bn, weight, bias)
    for (o, i, k), got in np.ndenumerate(f.weight):
        assert_rounded_once(got, scale[i] * Fraction(float(weight[o, i, k])))
    for o in range(2):
        terms = [*sums[o], Fraction(float(bias[o]))]
        assert_rounded_once(f.bias[o], sum(terms), sum(map(abs, terms)) / 2**98)


@pytest.mark.parametrize(("dtype", "bits"), [(np.float16, 11), (BFLOAT16, 8), (np.float32, 24)], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_are_decided_by_bits_float64_does_not_hold(dtype, bits, sign):
    ulp = 2.0 ** (1 - bits)  # above 1
    # (1 + ulp/2)/sqrt(1 - 2**-53) lies 2**-54 above the tie of 1 and 1 + ulp; float64 rounds it onto the tie,
    # from where it goes to even 1. (1 + 3·ulp/2)/sqrt(1 + 2**-52) lies below that of 1 + ulp and 1 + 2·ulp.
    bn = BatchNormParams(
        sign * np.array([1 + ulp / 2, 1 + 1.5 * ulp]), None, [0.0, 0.0], [1 - 2.0**-53, 1 + 2.0**-52], 0.0
    )
    for f in (
        fold_linear(np.ones((2, 1), dtype), None, bn),
        fold_into_linear(bn, np.ones((1, 2), dtype), None),
    ):
        np.testing.assert_array_equal(
            f.weight.reshape(-1).astype(np.float64), sign * np.array([1 + ulp, 1 + ulp])
        )
    # float64 bias terms: a tie, and a hair to either side of it
    for hair in 2.0**-80, -(2.0**-80):
        bn = BatchNormParams(None, [sign * hair], [0.0], [1.0], 0.0)
        f = fold_linear(np.ones((1, 1), dtype), [sign * (1 + ulp / 2)], bn)
        assert float(f.bias[0]) == sign * (1 + ulp if hair > 0 else 1)
        f = fold_linear(np.ones((1, 1), dtype), [sign * (1 + 1.5 * ulp)], bn)
        assert float(f.bias[0]) == sign * (1 + 2 * ulp if hair > 0 else 1 + ulp)
    # float64 holds this one, but a cast by way of float32 would not: just above a tie
    bn = BatchNormParams([sign * (1 + ulp / 2 + 2.0**-40)], [0.0], [0.0], [1.0], 0.0)
    assert float(fold_linear(np.ones((1, 1), dtype), None, bn).weight[0, 0]) == sign * (1 + ulp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_results_round_once_or_vanish(dtype):
    tiny = float(np.nextafter(np.zeros(1, dtype), np.ones(1, dtype))[0])
    bn = BatchNormParams([1.0, 0.75, 0.5, 0.25], None, np.zeros(4), np.ones(4), 0.0)
    weight = np.array([[3 * tiny, 2 * tiny, tiny, tiny]]).astype(dtype)
    got = fold_into_linear(bn, weight, None).weight[0].astype(np.float64) / tiny
    assert got.tolist() == [3.0, 2.0, 0.0, 0.0]


def test_extremes_of_float64_do_not_overflow_on_the_way():
    bn = BatchNormParams([1.0, 2.0**-1000], None, [0.0, 0.0], [1.0, 1.0], 0.0)
    f = fold_into_linear(bn, [[np.finfo(np.float64).max, 1.5 * 2.0**1000]], None)
    assert f.weight.tolist() == [[np.finfo(np.float64).max, 1.5]]
    bn = BatchNormParams([1e-200], [0.0], [0.0], [1e-300], 0.0)
    assert_rounded_once(
        fold_linear(np.array([[1e-40]]), None, bn).weight[0, 0], Fraction(1e-40) * exact_affine(bn)[0][0]
    )


@pytest.mark.parametrize("shape", [(300, 700), (2, 70_001), (70_001, 2)])
def test_large_linear_is_its_rows(shape):
    """Blocks change nothing: each output comes out as from a layer of its own."""
    rng = np.random.default_rng(7)
    weight, bias = rng.normal(size=shape).astype(np.float32), rng.normal(size=shape[0]).astype(np.float32)
    after, before = some_bn(rng, shape[0]), some_bn(rng, shape[1])
    f, g = fold_linear(weight, bias, after), fold_into_linear(before, weight, bias)
    scale, shift = to_affine(before)
    for row in {0, 1, 93, 94, 280, shape[0] // 2, shape[0] - 1} & set(range(shape[0])):
        one = slice(row, row + 1)
        alone = fold_linear(weight[one], bias[one], BatchNormParams(*(v[one] for v in after[:4]), after.eps))
        np.testing.assert_array_equal(f.weight[one], alone.weight)
        np.testing.assert_array_equal(f.bias[one], alone.bias)
        alone = fold_into_linear(before, weight[one], bias[one])
        np.testing.assert_array_equal(g.weight[one], alone.weight)
        np.testing.assert_array_equal(g.bias[one], alone.bias)
    terms = np.concatenate([weight.astype(np.float64) * shift, bias[:, None].astype(np.float64)], 1)
    bound = half_ulp(g.bias) + (np.log2(shape[1]) + 20) * U64 * np.abs(terms).sum(1)
    assert (np.abs(g.bias - [math.fsum(t) for t in terms]) <= bound).all()
    np.testing.assert_array_equal(g.weight, (weight * scale).astype(np.float32))


def test_large_depthwise_is_its_channels():
    rng = np.random.default_rng(8)
    weight, bn = rng.normal(size=(5, 5, 1501, 2)), some_bn(rng, 3002)
    f = fold_conv(weight, None, bn, layout="HWIM")
    before = some_bn(rng, 1501)
    g = fold_into_conv(before, weight, None, layout="HWIM")
    for i in 0, 1, 655, 656, 1310, 1311, 1500:
        both = slice(2 * i, 2 * i + 2)
        alone = fold_conv(
            weight[:, :, i : i + 1], None, BatchNormParams(*(v[both] for v in bn[:4])), layout="HWIM"
        )
        np.testing.assert_array_equal(f.weight[:, :, i : i + 1], alone.weight)
        np.testing.assert_array_equal(f.bias[both], alone.bias)
        one = BatchNormParams(*(v[i : i + 1] for v in before[:4]))
        alone = fold_into_conv(one, weight[:, :, i : i + 1], None, layout="HWIM")
        np.testing.assert_array_equal(g.weight[:, :, i : i + 1], alone.weight)
        np.testing.assert_array_equal(g.bias[both], alone.bias)


def test_no_global_setting_reaches_the_result():
    rng = np.random.default_rng(2)
    weight, bn = rng.normal(size=(3, 4)), some_bn(rng, 3)
    usual = fold_linear(weight, None, bn)
    coarse = decimal.Context(prec=3, traps=[decimal.Inexact, decimal.FloatOperation, decimal.Rounded])
    with decimal.localcontext(coarse), np.errstate(all="raise"):
        strict = fold_linear(weight, None, bn)
        to_affine(bn)
        assert (
            fold_linear(
                np.full((1, 1), 6e-8, np.float16), None, BatchNormParams([0.1], None, [0], [1])
            ).weight
            == 0
        )
    np.testing.assert_array_equal(usual.weight, strict.weight)
    np.testing.assert_array_equal(usual.bias, strict.bias)


# The arrays that come back, and those that go in ----------------------------------------------------------


def all_folds(weight, bias, bn):
    """Every fold of a 3-d weight of shape (c, c, k), or of its first tap for the linear ones."""
    linear = weight[:, :, 0]
    return [
        fold_conv(weight, bias, bn),
        fold_conv(weight, bias, bn, transposed=True),
        fold_into_conv(bn, weight, bias, padding=1),
        fold_linear(linear, bias, bn),
        fold_into_linear(bn, linear, bias),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_new_and_inputs_untouched(dtype):
    rng = np.random.default_rng(4)
    arrays = [
        v.astype(dtype) for v in (rng.normal(size=(3, 3, 2)), *rng.normal(size=(4, 3)), rng.uniform(1, 2, 3))
    ]
    copies = [v.copy() for v in arrays]
    for v in arrays:
        v.flags.writeable = False
    weight, bias, gamma, beta, mean, var = arrays
    for f in all_folds(weight, bias, BatchNormParams(gamma, beta, mean, var)):
        for result in f.weight, f.bias, f.pad_value:
            if result is not None:
                assert result.flags.c_contiguous
                assert result.flags.writeable
                assert not any(np.shares_memory(result, v) for v in arrays)
        assert f.weight.dtype == f.bias.dtype == dtype
        assert f.bias.shape == (3,)
    for v, copy in zip(arrays, copies, strict=True):
        assert v.tobytes() == copy.tobytes()


class OnlyArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class OnlyDlpack:
    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize(
    "view",
    [
        np.asfortranarray,
        lambda v: v[::-1].copy()[::-1],
        lambda v: np.repeat(v, 2, axis=0)[::2],
        lambda v: v.astype(v.dtype.newbyteorder()),
        lambda v: np.frombuffer(b"x" + v.tobytes(), np.uint8)[1:].view(v.dtype).reshape(v.shape),
        lambda v: v.tolist(),
        OnlyArray,
        OnlyDlpack,
    ],
    ids=["fortran", "reversed", "strided", "swapped", "misaligned", "list", "__array__", "__dlpack__"],
)
def test_any_array_numpy_can_view(view):
    rng = np.random.default_rng(6)
    weight, bias, bn = rng.normal(size=(3, 3, 2)), rng.normal(size=3), some_bn(rng, 3)
    viewed = BatchNormParams(*map(view, bn[:4]), bn.eps)
    for f, g in [
        (fold_conv(view(weight), view(bias), viewed), fold_conv(weight, bias, bn)),
        (fold_into_conv(viewed, view(weight), view(bias)), fold_into_conv(bn, weight, bias)),
        (fold_linear(view(weight[:, :, 0]), view(bias), viewed), fold_linear(weight[:, :, 0], bias, bn)),
    ]:
        np.testing.assert_array_equal(f.weight, g.weight)
        np.testing.assert_array_equal(f.bias, g.bias)
        assert f.weight.dtype == np.float64  # in native byte order
        assert f.weight.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64])
def test_integers_become_float64(dtype):
    weight, bn = np.array([[1, 2], [3, 4]], dtype), BatchNormParams([1, 2], [0, 1], [1, 0], [4, 1], 0)
    f = fold_linear(weight, np.array([2, 3], dtype), bn)
    assert f.weight.dtype == f.bias.dtype == np.float64
    assert f.weight.tolist() == [[0.5, 1.0], [6.0, 8.0]]
    assert f.bias.tolist() == [0.5, 7.0]


def test_absent_bias_and_affine():
    bn = BatchNormParams(None, None, [1.0, 2.0], [4.0, 0.25], 0.0)
    f = fold_linear(np.ones((2, 1), np.float32), None, bn)
    assert f.weight.tolist() == [[0.5], [2.0]]
    assert f.bias.tolist() == [-0.5, -4.0]
    f = fold_into_linear(bn, np.ones((1, 2), np.float32), None)
    assert f.weight.tolist() == [[0.5, 2.0]]
    assert f.bias.tolist() == [-4.5]
    assert f.bias.dtype == np.float32


def test_default_eps_and_to_affine():
    bn = BatchNormParams([3.0], [1.0], [2.0], [4.0])
    assert bn.eps == 1e-5
    scale, shift = to_affine(bn)
    assert scale.dtype == shift.dtype == np.float64
    np.testing.assert_allclose(scale, 3 / math.sqrt(4 + 1e-5), rtol=8 * U64)
    np.testing.assert_allclose(shift, 1 - 2 * 3 / math.sqrt(4 + 1e-5), rtol=16 * U64)
    half = BatchNormParams(*(np.array(v, np.float16) for v in bn[:4]))
    np.testing.assert_array_equal(to_affine(half), to_affine(bn))  # float64 whatever the parameters are
    scale, shift = to_affine(BatchNormParams(None, None, [2.0, 0.0], [0.0, 1.0], 0.25))
    np.testing.assert_allclose([scale, shift], [[2.0, 1 / math.sqrt(1.25)], [-4.0, 0.0]], rtol=8 * U64)


def test_report():
    bn = BatchNormParams([0.0, -3.0, 0.5, -0.0, 2.0], None, np.zeros(5), np.ones(5), 0.0)
    weight = np.array([[1.0, 2.0], [0.0, 1.0], [4.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    report = fold_linear(weight, None, bn).report
    assert report == (4.0, 3.0, 0.0, (0, 3), (1,))  # w = 1 became -3
    assert report._fields == ("max_relative_change", "max_scale", "min_scale", "zero_gamma", "negative_gamma")
    assert report == fold_into_linear(bn, weight.T, None).report
    assert all(isinstance(v, float) for v in report[:3])

    identity = BatchNormParams(None, [1.0], [0.0], [1.0], 0.0)
    assert fold_linear(
        [
            [3.0],
        ][:1],
        None,
        identity,
    ).report == (0.0, 1.0, 1.0, (), ())
    assert (
        fold_linear(
            np.zeros((1, 3)), None, bn._replace(**{k: getattr(bn, k)[1:2] for k in ("gamma", "mean", "var")})
        ).report[0]
        == 0
    )
    rounded = fold_linear(
        np.ones((1, 1), np.float16), None, BatchNormParams([1 + 2.0**-13], None, [0], [1], 0.0)
    )
    assert rounded.report.max_relative_change == 0.0  # of the weights as returned
    several = fold_linear(
        np.ones((500, 400)),
        None,
        BatchNormParams(np.r_[9.0, np.ones(498), 0.5], None, np.zeros(500), np.ones(500), 0),
    )
    assert several.report.max_relative_change == 8.0  # the largest of all blocks, not of the last


def test_dead_channels_fold_backward():
    bn = BatchNormParams([0.0, 1.0], [5.0, 0.0], [3.0, 0.0], [1.0, 1.0], 0.0)
    f = fold_linear(np.ones((2, 2)), [7.0, 7.0], bn)
    assert f.weight.tolist() == [[0.0, 0.0], [1.0, 1.0]]
    assert f.bias.tolist() == [5.0, 7.0]
    f = fold_into_conv(
        bn, np.ones((1, 2, 3)), None
    )  # without padding a dead channel is a constant like any other
    assert f.bias.tolist() == [15.0]


# A BatchNorm as the argument ------------------------------------------------------------------------------


def as_layer(bn, **more):
    """What a BatchNorm layer shows of itself."""
    return SimpleNamespace(
        gamma=bn.gamma, beta=bn.beta, running_mean=bn.mean, running_var=bn.var, eps=bn.eps, **more
    )


def test_a_layer_serves_as_its_parameters():
    rng = np.random.default_rng(9)
    bn, weight = some_bn(rng, 3), rng.normal(size=(3, 3, 2))
    for f, g in zip(
        all_folds(weight, None, bn), all_folds(weight, None, as_layer(bn, activation=None)), strict=True
    ):
        np.testing.assert_array_equal(f.weight, g.weight)
        np.testing.assert_array_equal(f.bias, g.bias)
    np.testing.assert_array_equal(to_affine(bn), to_affine(as_layer(bn)))


def test_a_trained_batch_norm_folds():
    rng = np.random.default_rng(10)
    layer = fastbn.BatchNorm(3)
    for _ in range(3):
        layer(rng.normal(2.0, 3.0, (8, 3)).astype(np.float32))
    layer.eval()
    weight, x = rng.normal(size=(3, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    f = fold_linear(weight, None, layer)
    bn = BatchNormParams(layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.eps)
    np.testing.assert_array_equal(to_affine(layer), to_affine(bn))
    np.testing.assert_array_equal(to_affine(layer), layer.to_affine())
    expected = layer((x @ weight.T).astype(np.float32))
    magnitudes = batch_norm(np.abs(x) @ np.abs(weight.T), magnitude(bn))
    assert (np.abs(dense(x, f.weight, f.bias) - expected) <= 16 * 2.0**-24 * magnitudes).all()
    with pytest.raises(ValueError, match=r"running_mean: expected .* got None .*track_running_stats"):
        fold_linear(weight, None, fastbn.BatchNorm(3, track_running_stats=False))
    for fold in fold_linear, lambda w, b, bn: fold_into_linear(bn, w.T, b):
        with pytest.raises(ValueError, match="bn: expected no activation, got 'relu'"):
            fold(weight, None, fastbn.BatchNorm(3, activation="relu"))


# Never silently wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "large"),
    [(np.float16, 3e4), (BFLOAT16, 2e38), (np.float32, 2e38), (np.float64, 1e308)],
    ids=str,
)
def test_what_the_dtype_cannot_hold_is_refused(dtype, large):
    name = np.dtype(dtype).name
    weight = np.ones((3, 1), dtype)
    weight[2] = large
    bn = BatchNormParams([1.0, 1.0, -4.0], None, np.zeros(3), np.ones(3), 0.0)
    with pytest.raises(
        ValueError,
        match=rf"^weight: expected values that {name} can hold, got -?(inf|[0-9.e+]+) in output channel 2",
    ):
        fold_linear(weight, None, bn)
    with pytest.raises(
        ValueError,
        match=rf"^weight: expected values that {name} can hold, got -?(inf|[0-9.e+]+) in output channel 0",
    ):
        fold_into_linear(bn, weight.T, None)
    with pytest.raises(
        ValueError,
        match=rf"^bias: expected values that {name} can hold, got -?(inf|[0-9.e+]+) in output channel 2",
    ):
        fold_linear(np.ones((3, 1), dtype), weight[:, 0], bn)
    bn = BatchNormParams(None, [large], [0.0], [1.0], 0.0)
    with pytest.raises(
        ValueError,
        match=rf"^bias: expected values that {name} can hold, got -?(inf|[0-9.e+]+) in output channel 1",
    ):
        fold_into_linear(bn, np.array([[1], [-4]], dtype), None)
    # the largest value itself is held, and so is what rounds to it
    largest = float(ml_dtypes.finfo(dtype).max)
    f = fold_linear(
        np.array([[largest]], dtype), None, BatchNormParams(None, None, [0.0], [1 + 2.0**-52], 0.0)
    )
    assert np.isfinite(f.weight.astype(np.float64)).all()


def test_float32_negative_variance_that_eps_only_seems_to_lift():
    """float32(-1e-5) + 1e-5 is 2.5e-13 in float64 and 0 in float32: a scale of 2e6 made of rounding."""
    for dtype in np.float32, np.float64:
        with pytest.raises(ValueError, match=r"^var: expected var \+ eps positive"):
            to_affine(BatchNormParams(None, None, np.zeros(2), np.array([1, -1e-5], dtype), 1e-5))
        scale, _ = to_affine(BatchNormParams(None, None, np.zeros(1), np.array([-1e-6], dtype), 1e-5))
        assert scale[0] == pytest.approx(1 / math.sqrt(9e-6), rel=1e-6)
    assert to_affine(BatchNormParams(None, None, np.zeros(1), np.zeros(1, np.float16), 1e-9))[0] > 3e4


NAN, INF = float("nan"), float("inf")
W3, W2 = np.ones((4, 2, 3)), np.ones((4, 6))
ALL = ["fold_linear", "fold_conv", "fold_into_linear", "fold_into_conv", "to_affine"]
LAYERS, CONVS, LINEARS = ALL[:4], ["fold_conv", "fold_into_conv"], ["fold_linear", "fold_into_linear"]
# function names; argument or BN parameter at fault; its value, or a word for `spoiled`; error; the message
# behind the argument's name; other arguments
BAD = [
    (ALL, "gamma", np.ones(3), ValueError, r"expected shape \({c},\), got \(3,\)", {}),
    (ALL, "beta", np.ones((4, 1)), ValueError, r"expected shape \({c},\), got \(4, 1\)", {}),
    (ALL, "beta", 0.0, ValueError, r"expected shape \({c},\), got \(\)", {}),
    (LAYERS, "mean", np.ones(3), ValueError, r"expected shape \({c},\), got \(3,\)", {}),
    (["to_affine"], "mean", np.ones((2, 2)), ValueError, r"expected shape \(C,\), got \(2, 2\)", {}),
    (["to_affine"], "mean", [], ValueError, r"expected shape \(C,\), got \(0,\)", {}),
    (ALL, "var", np.ones(3), ValueError, r"expected shape \({c},\), got \(3,\)", {}),
    (ALL, "mean", None, ValueError, "expected running statistics, got None", {}),
    (ALL, "var", None, ValueError, "expected running statistics, got None", {}),
    (ALL, "gamma", "nan", ValueError, "expected finite values, got nan in channel 1", {}),
    (ALL, "beta", "inf", ValueError, "expected finite values, got inf in channel 1", {}),
    (ALL, "mean", "-inf", ValueError, "expected finite values, got -inf in channel 1", {}),
    (ALL, "var", "nan", ValueError, "expected finite values, got nan in channel 1", {}),
    (ALL, "var", "inf", ValueError, "expected finite values, got inf in channel 1", {}),
    (ALL, "var", "-1e-5", ValueError, r"expected var \+ eps positive .* got -1e-05 in channel 1", {}),
    (ALL, "var", "0", ValueError, r"expected var \+ eps positive .* got 0.0 in channel 1", {"eps": 0.0}),
    (ALL, "var", "-1", ValueError, r"expected var \+ eps positive .* got -1.0 in channel 1", {}),
    (ALL, "gamma", "1j", TypeError, "expected float16, .* got complex128", {}),
    (ALL, "mean", "object", TypeError, "expected float16, .* got object", {}),
    (ALL, "var", "text", TypeError, "expected float16, .* got <U", {}),
    (ALL, "beta", "bool", TypeError, "expected float16, .* got bool", {}),
    (ALL, "eps", -1e-5, ValueError, "expected one finite number >= 0, got -1e-05", {}),
    (ALL, "eps", NAN, ValueError, "expected one finite number >= 0, got nan", {}),
    (ALL, "eps", INF, ValueError, "expected one finite number >= 0, got inf", {}),
    (ALL, "eps", [1e-5], ValueError, "expected one finite number >= 0, got", {}),
    (ALL, "eps", "tiny", TypeError, "got <U4", {}),
    (ALL, "eps", 1e-5j, TypeError, "got complex128", {}),
    (ALL, "bn", None, TypeError, "expected BatchNormParams or BatchNorm, got NoneType", {}),
    (ALL, "bn", {"gamma": 1}, TypeError, "expected BatchNormParams or BatchNorm, got dict", {}),
    (ALL, "bn", (None, None, np.ones(4), np.ones(4), 1e-5), TypeError, "got tuple", {}),
    (LINEARS, "weight", np.ones((2, 3, 4)), ValueError, r"expected 2 axes, .* got shape \(2, 3, 4\)", {}),
    (LINEARS, "weight", np.ones((0, 4)), ValueError, r"none empty, got shape \(0, 4\)", {}),
    (CONVS, "weight", np.ones((4, 4)), ValueError, r"expected 3 to 5 axes, .* got shape \(4, 4\)", {}),
    (CONVS, "weight", np.ones((2,) * 6), ValueError, "expected 3 to 5 axes", {}),
    (CONVS, "weight", np.ones((4, 0, 3)), ValueError, "none empty", {}),
    (LAYERS, "weight", None, ValueError, "expected an array, got None", {}),
    (LAYERS, "weight", "1j", TypeError, "got complex128", {}),
    (LAYERS, "weight", "object", TypeError, "got object", {}),
    (LAYERS, "weight", "bool", TypeError, "got bool", {}),
    (LAYERS, "weight", "nan", ValueError, "expected finite values, got nan in output channel 1", {}),
    (LAYERS, "weight", "-inf", ValueError, "expected finite values, got -inf in output channel 1", {}),
    (LAYERS, "weight", [[1.0], [1.0, 2.0]], ValueError, "expected an array, got ", {}),
    (LAYERS, "bias", np.ones(5), ValueError, r"expected shape \(4,\), got \(5,\)", {}),
    (LAYERS, "bias", np.ones((4, 1)), ValueError, r"expected shape \(4,\), got \(4, 1\)", {}),
    (LAYERS, "bias", 0.0, ValueError, r"expected shape \(4,\), got \(\)", {}),
    (LAYERS, "bias", "nan", ValueError, "expected finite values, got nan in channel 1", {}),
    (LAYERS, "bias", "1j", TypeError, "got complex128", {}),
    (LAYERS, "layout", 7, TypeError, "expected a string or None, got 7", {}),
    (LINEARS, "layout", "OIH", ValueError, "expected 2 different letters, got 'OIH'", {}),
    (LINEARS, "layout", "OO", ValueError, "expected 2 different letters, got 'OO'", {}),
    (LINEARS, "layout", "IM", ValueError, "expected the letters IO in it, got 'IM'", {}),
    (LINEARS, "layout", "IH", ValueError, "expected the letters IO in it, got 'IH'", {}),
    (LINEARS, "layout", "oi", ValueError, "expected the letters IO in it, got 'oi'", {}),
    (CONVS, "layout", "OIHW", ValueError, "expected 3 different letters, got 'OIHW'", {}),
    (CONVS, "layout", "OII", ValueError, "expected 3 different letters, got 'OII'", {}),
    (CONVS, "layout", "OHW", ValueError, "expected the letters IO or IM in it, got 'OHW'", {}),
    (CONVS, "layout", "IHW", ValueError, "expected the letters IO or IM in it, got 'IHW'", {}),
    (CONVS, "layout", "OIM", ValueError, "expected the letters IO or IM in it, got 'OIM'", {}),
    (CONVS, "groups", 3, ValueError, "expected a divisor of the 4 output channels of weight, got 3", {}),
    (["fold_conv"], "groups", 3, ValueError, "a divisor of the 4 input channels", {"transposed": True}),
    (CONVS, "groups", 3, ValueError, "expected 1 or the 4 channels of 'IMW', got 3", {"layout": "IMW"}),
    (CONVS, "groups", 0, ValueError, "expected an integer of 1 or more, got 0", {}),
    (CONVS, "groups", -2, ValueError, "expected an integer of 1 or more, got -2", {}),
    (CONVS, "groups", 1.0, TypeError, "expected an integer of 1 or more, got 1.0", {}),
    (CONVS, "groups", True, TypeError, "expected an integer of 1 or more, got True", {}),
    (CONVS, "groups", None, TypeError, "expected an integer of 1 or more, got None", {}),
    (["fold_conv"], "transposed", "no", TypeError, "expected True or False, got 'no'", {}),
    (["fold_into_linear"], "repeat", 4, ValueError, "a divisor of the 6 inputs of weight, got 4", {}),
    (["fold_into_linear"], "repeat", 0, ValueError, "expected an integer of 1 or more, got 0", {}),
    (["fold_into_linear"], "repeat", 2.0, TypeError, "expected an integer of 1 or more, got 2.0", {}),
    (["fold_into_conv"], "padding", -1, ValueError, "expected an int, 1 ints or pairs >= 0, .* got -1", {}),
    (["fold_into_conv"], "padding", (1, 1), ValueError, r"got \(1, 1\)", {}),
    (["fold_into_conv"], "padding", (), ValueError, r"got \(\)", {}),
    (["fold_into_conv"], "padding", ((1, 2, 3),), ValueError, "got", {}),
    (["fold_into_conv"], "padding", ((1, 2), 3), ValueError, "got", {}),
    (["fold_into_conv"], "padding", "causal", ValueError, "'valid' or 'same', got 'causal'", {}),
    (["fold_into_conv"], "padding", 1.0, TypeError, "got 1.0", {}),
    (["fold_into_conv"], "padding", None, TypeError, "got None", {}),
    (["fold_into_conv"], "padding", True, TypeError, "got True", {}),
    (["fold_into_conv"], "padding", 1, ValueError, "scale 0 and shift 2.0 in channel 1", {"gamma": [1, 0]}),
]


def spoiled(kind, good):
    """Replace the values of channel 1 of `good`, or its dtype."""
    array = np.array(good)
    if kind in ("1j", "object", "bool", "text"):
        return array.astype({"1j": complex, "object": object, "bool": bool, "text": str}[kind])
    array[1] = float(kind)
    return array


@pytest.mark.parametrize(
    ("name", "argument", "value", "error", "message", "others"),
    [(name, *bad) for names, *bad in BAD for name in names],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_bad_arguments_are_refused_by_name(name, argument, value, error, message, others):
    linear, into = "linear" in name, "into" in name
    channels = (6 if linear else 2) if into else 4
    arrays = {
        "weight": W2.copy() if linear else W3.copy(),
        "bias": np.arange(4.0),
        **{k: np.arange(1.0, channels + 1) for k in BatchNormParams._fields[:4]},
    }
    given = {**arrays, "eps": 1e-5, **others}
    if isinstance(value, str) and argument in arrays:
        value = spoiled(value, arrays[argument])
    given[argument] = value
    untouched = {k: v.copy() for k, v in given.items() if isinstance(v, np.ndarray)}

    bn = (
        given.pop("bn") if argument == "bn" else BatchNormParams(*(given[k] for k in BatchNormParams._fields))
    )
    call = {k: v for k, v in given.items() if k not in BatchNormParams._fields}
    if name == "to_affine":
        call = {}
    with pytest.raises(error, match=rf"^{argument}: .*" + message.replace("{c}", str(channels))) as caught:
        getattr(fastbn, name)(bn=bn, **call)
    assert "got" in str(caught.value)
    for k, copy in untouched.items():
        np.testing.assert_array_equal(given[k], copy)


def test_scales_that_float64_cannot_hold_are_refused():
    for bad in ([1e300], None, [0.0], [1e-300]), ([1e200], None, [1e200], [1.0]):
        for fold in to_affine, lambda bn: fold_linear(np.zeros((1, 1)), None, bn):
            with pytest.raises(
                ValueError,
                match=r"^bn: expected a (scale|shift) that float64 can hold, got -?inf in channel 0",
            ):
                fold(BatchNormParams(*bad, 0.0))
    with pytest.raises(
        ValueError, match=r"^bn: expected a pad value that float64 can hold, got -inf in channel 0"
    ):
        fold_into_conv(
            BatchNormParams([1e-300], [1e300], [0.0], [1.0], 0.0), np.zeros((1, 1, 1)), None, padding=1
        )


def test_the_docstrings_tell_the_truth():
    tested = doctest.testmod(importlib.import_module("fastbn.fold"))
    assert tested.attempted >= 15
    assert tested.failed == 0
