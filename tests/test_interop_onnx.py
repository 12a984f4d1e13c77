"""fastbn.interop.onnx.fold: the same function with fewer nodes, and nothing is ever folded wrongly."""

import doctest
import importlib
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx_models import (  # noqa: E402
    BFLOAT16,
    NEWEST,
    assert_runs,
    assert_same,
    batch_norm,
    build,
    check,
    fold_checked,
    generator,
    in_runtime,
    inputs_of,
    norms,
    operators,
)

from fastbn.interop import onnx as interop  # noqa: E402

OPSETS = [7, 8, 9, 11, 13, 14, 15, 18, NEWEST]
DTYPES = ["float", "double", "float16", "bfloat16"]


@pytest.fixture(scope="module")
def newest_that_runs():
    """Return the newest opset that ONNX Runtime takes."""
    pytest.importorskip("onnxruntime")
    for opset in range(NEWEST, 6, -1):
        try:
            model = build("(T[2] x) => (T[2] y) { y = Identity(x) }", opset=opset)
            in_runtime(model, {"x": np.zeros(2, np.float32)})
        except Exception:
            continue
        return opset
    raise AssertionError("ONNX Runtime takes no opset")


def reasons(report):
    return "; ".join(d.reason for d in report)


def test_doctest():
    assert doctest.testmod(importlib.import_module("fastbn.interop.onnx")).failed == 0


# Layer, then BatchNorm; BatchNorm, then layer --------------------------------------------------------------------

# {b} is the bias, where there is one. Each weight is a shape by the number of groups.
CONV = "{{ c = {op}<group={g}, {a}>(x, w{b}) y = BN(c, p) }}"
INTO = "{{ c = BN(x, p) y = {op}<group={g}, {a}>(c, w{b}) }}"
KERNEL = {1: (3,), 2: (3, 2), 3: (2, 3, 2)}
SPATIAL = {1: "9", 2: "7,6", 3: "4,5,6"}
GEOMETRY = {
    "plain": "",
    "pads": "pads=[{}]",
    "same": 'auto_pad="SAME_UPPER"',
    "lower": 'auto_pad="SAME_LOWER", strides=[{}]',
    "strides": "strides=[{}]",
    "dilations": "dilations=[{}]",
}


def geometry(kind, dims):
    numbers = {"pads": "1" * dims + "0" * dims, "strides": "2" * dims, "dilations": "2" * dims, "lower": "2" * dims}
    return GEOMETRY[kind].format(",".join(numbers.get(kind, "")))


def conv(op, dims, groups, bias, kind="plain", into=False, extra=""):
    """Return the text and weights of Conv or ConvTranspose with BatchNorm: 4 channels in, 6 out (depthwise 4, 4)."""
    n_in, n_out = 4, {1: 6, 2: 6, 4: 8}[groups]
    transposed = op == "ConvTranspose"
    weight = (n_in, n_out // groups) if transposed else (n_out, n_in // groups)
    attributes = ", ".join(filter(None, [geometry(kind, dims), extra])) or "strides=[" + ",".join("1" * dims) + "]"
    ends = ",".join("hwd"[:dims])
    head = f"(T[n,{n_in},{SPATIAL[dims]}] x) => (T[n,{n_out},{ends}] y) "
    text = head + (INTO if into else CONV).format(op=op, g=groups, a=attributes, b=", b" if bias else "")
    weights = {"w": weight + KERNEL[dims], "p": n_in if into else n_out} | ({"b": (n_out,)} if bias else {})
    return text, weights


def for_dtype(dtype):
    """Return the opset where every operator knows it, and whether ONNX Runtime does."""
    return {"dtype": dtype, "opset": 22 if dtype == "bfloat16" else 17, "runtime": dtype == "float"}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convolutions_in_every_dtype(op, groups, dtype, bias, affine):
    text, weights = conv(op, 2, groups, bias)
    folded, report = check(text, op, "folded", affine=affine, **for_dtype(dtype), **weights)
    assert report.decisions[0].into == ("c",)
    assert folded.graph.node[0].output[0] == "y"
    assert report.nodes_after == 1
    kinds = {t.data_type for t in folded.graph.initializer}
    assert kinds == {inputs_dtype(folded)}


def inputs_dtype(model):
    return model.graph.input[0].type.tensor_type.elem_type


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_into_convolutions_in_every_dtype(groups, dtype, bias, affine):
    text, weights = conv("Conv", 2, groups, bias, into=True)
    check(text, "Conv", "folded", affine=affine, **for_dtype(dtype), **weights)


@pytest.mark.parametrize("kind", GEOMETRY)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_geometry_does_not_matter_backward(op, dims, groups, kind):
    if op == "ConvTranspose" and dims == 3 and kind == "lower":
        kind = "same"
    text, weights = conv(op, dims, groups, True, kind)
    runtime = op == "Conv" or kind not in ("same", "lower")
    check(text, op, "folded", runtime=runtime, **weights)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_output_padding(groups):
    text, weights = conv("ConvTranspose", 2, groups, True, "strides", extra="output_padding=[1,1]")
    check(text, "ConvTranspose", "folded", **weights)


@pytest.mark.parametrize("kind", GEOMETRY)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_stops_a_shift_on_its_way_forward(dims, kind):
    text, weights = conv("Conv", dims, 2, True, kind, into=True)
    if kind in ("pads", "same", "lower"):
        _, report = check(text, "BatchNormalization Conv", "left", **weights)
        assert "Conv 'y' pads with zeros" in reasons(report)
    else:
        check(text, "Conv", "folded", **weights)


def test_padding_beside_a_kernel_of_one_stops_it_too():
    text = "(T[n,2,4,4] x) => (T[n,3,6,6] y) { c = BN(x, p) y = Conv<pads=[1,1,1,1]>(c, w) }"
    check(text, "BatchNormalization Conv", "left", w=(3, 2, 1, 1), p=2)
    text = text.replace("pads=[1,1,1,1]", 'auto_pad="SAME_UPPER"').replace("6,6", "h,w")
    check(text, "Conv", "folded", w=(3, 2, 1, 1), p=2)


def without_shift(channels, dtype=np.float32):
    """A BatchNorm that only scales, as far as floating point says: B = 0 and mean = 0."""
    scale, _, _, var = batch_norm("p", channels, dtype)
    zero = np.zeros(channels, dtype)
    return {"p_s": numpy_helper.to_array(scale), "p_B": zero, "p_m": zero, "p_v": numpy_helper.to_array(var)}


@pytest.mark.parametrize("bias", [True, False])
def test_a_scale_alone_passes_padding_and_makes_no_bias(bias):
    text, weights = conv("Conv", 2, 2, bias, "pads", into=True)
    folded, _ = check(text, "Conv", "folded", **weights | without_shift(4) | {"q": 1})
    assert len(folded.graph.node[0].input) == 2 + bias


def test_nothing_goes_forward_into_a_transposed_convolution():
    text, weights = conv("ConvTranspose", 2, 1, True, into=True)
    _, report = check(text, "BatchNormalization ConvTranspose", "left", **weights)
    assert "number of its taps" in reasons(report)


# Gemm and MatMul ---------------------------------------------------------------------------------------------------

C_SHAPES = {"none": None, "scalar": (), "one": (1,), "n": (6,), "1n": (1, 6), "11": (1, 1)}


@pytest.mark.parametrize("c_shape", C_SHAPES)
@pytest.mark.parametrize("attributes", ["", "alpha=0.5", "beta=-1.5", "transB=1", "transA=1, alpha=-2.0, transB=1"])
@pytest.mark.parametrize("into", [False, True], ids=["gemm-bn", "bn-gemm"])
def test_gemm(into, attributes, c_shape):
    shape = C_SHAPES[c_shape]
    weights = {"w": (6, 4) if "transB" in attributes else (4, 6)} | ({} if shape is None else {"b": shape})
    gemm = f"Gemm<{attributes}>" if attributes else "Gemm"
    b = "" if shape is None else ", b"
    x, n = ("4,3", "3") if "transA" in attributes else ("n,4", "n")
    body = f"d = BN(x, p) y = {gemm}(d, w{b})" if into else f"g = {gemm}(x, w{b}) y = BN(g, p)"
    left = into and ("alpha" in attributes or "transA" in attributes)
    text = f"(T[{x}] x) => (T[{n},6] y) {{ {body} }}"
    p = (3 if "transA" in attributes else 4) if into else 6
    folded, _ = check(text, "BatchNormalization Gemm" if left else "Gemm", "left" if left else "folded", p=p, **weights)
    if not left:
        assert not [a for a in folded.graph.node[0].attribute if a.name == "beta"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("body", ["g = Gemm(x, w{b}) y = BN(g, p)", "g = BN(x, p) y = Gemm(g, w{b})"])
def test_gemm_in_every_dtype(body, affine, bias, dtype):
    text = "(T[n,5] x) => (T[n,5] y) { " + body.replace("{b}", ", b" if bias else "") + " }"
    check(text, "Gemm", "folded", affine=affine, **for_dtype(dtype), w=(5, 5), p=5, **{"b": (5,)} if bias else {})


def test_gemm_with_a_bias_for_each_row_is_left():
    text = "(T[3,4] x) => (T[3,6] y) { g = Gemm(x, w, b) y = BN(g, p) }"
    for shape in (3, 6), (3, 1):
        _, report = check(text, "Gemm BatchNormalization", "left", w=(4, 6), b=shape, p=6)
        assert "its bias differs from row to row" in reasons(report)


def test_gemm_whose_bias_is_no_constant_is_left():
    text = "(T[n,4] x, T[6] b) => (T[n,6] y) { g = Gemm(x, w, b) y = BN(g, p) }"
    _, report = check(text, "Gemm BatchNormalization", "left", w=(4, 6), p=6)
    assert "its bias 'b' is not constant" in reasons(report)


def test_gemm_whose_weight_is_computed_is_left():
    check("(T[n,4] x, T[4,6] w) => (T[n,6] y) { g = Gemm(x, w) y = BN(g, p) }", "Gemm BatchNormalization", "left", p=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("affine", [True, False])
def test_matmul_becomes_gemm(affine, dtype):
    folded, _ = check(
        "(T[n,4] x) => (T[n,6] y) { g = MatMul(x, w) y = BN(g, p) }",
        "Gemm", "folded", affine=affine, **for_dtype(dtype), w=(4, 6), p=6,
    )  # fmt: skip
    assert len(folded.graph.node[0].input) == 3
    check(
        "(T[n,4] x) => (T[n,6] y) { g = BN(x, p) y = MatMul(g, w) }",
        "Gemm", "folded", affine=affine, **for_dtype(dtype), w=(4, 6), p=4,
    )  # fmt: skip


def test_matmul_stays_one_where_nothing_is_added():
    text = "(T[n,4] x) => (T[n,6] y) { g = MatMul(x, w) y = BN(g, p) }"
    check(text, "MatMul", "folded", w=(4, 6), **without_shift(6), q=1)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (), (1,), (1, 1)])
@pytest.mark.parametrize("order", ["m, b", "b, m"])
@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("dtype", ["float", "bfloat16"])
def test_matmul_with_add(dtype, into, order, shape):
    body = f"m = MatMul(x, w) a = Add({order}) y = BN(a, p)"
    if into:
        body = f"d = BN(x, p) m = MatMul(d, w) y = Add({order})"
    text = f"(T[n,4] x) => (T[n,6] y) {{ {body} }}"
    check(text, "MatMul Add", "folded", **for_dtype(dtype), w=(4, 6), b=shape, p=4 if into else 6)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (1, 1, 6), (), (1,), (1, 1, 1)])
def test_matmul_of_three_axes_behind_a_transpose(shape):
    """PyTorch's Linear over (N, L, F), with BatchNorm1d over F: the channels are moved to axis 1."""
    text = "(T[n,l,4] x) => (T[n,6,l] y) { m = MatMul(x, w) a = Add(b, m) t = Transpose<perm=[0,2,1]>(a) y = BN(t, p) }"
    _, report = check(text, "MatMul Add Transpose", "folded", sizes={"l": 5}, w=(4, 6), b=shape, p=6)
    assert "Transpose 't'" in reasons(report)
    text = text.replace("a = Add(b, m)", "a = Identity(m)")
    check(text, "MatMul Add Identity Transpose", "folded", sizes={"l": 5}, w=(4, 6), p=6)
    text = "(T[n,4,l] x) => (T[n,l,6] y) { d = BN(x, p) t = Transpose<perm=[0,2,1]>(d) m = MatMul(t, w) y = Add(m, b) }"
    check(text, "Transpose MatMul Add", "folded", sizes={"l": 5}, w=(4, 6), b=shape, p=4)


def test_channels_on_another_axis_than_the_features_are_left():
    """PyTorch's Linear over (N, L, F) with BatchNorm1d over L: several tools fold it where L == F."""
    text = "(T[n,6,4] x) => (T[n,6,6] y) { m = MatMul(x, w) a = Add(m, b) y = BN(a, p) }"
    _, report = check(text, "MatMul Add BatchNormalization", "left", w=(4, 6), b=(6,), p=6)
    assert "channels are on axis 1, those of MatMul + Add 'm' on axis 2" in reasons(report)
    text = "(T[n,6,6] x) => (T[n,6,6] y) { d = BN(x, p) y = MatMul(d, w) }"
    check(text, "BatchNormalization MatMul", "left", w=(6, 6), p=6)


def test_an_add_that_is_no_bias_stays_outside():
    text = "(T[n,4] x) => (T[n,6] y) { m = MatMul(x, w) a = Add(m, b) y = BN(a, p) }"
    check(text.replace("n,", "3,"), "MatMul Add BatchNormalization", "left", w=(4, 6), b=(3, 6), p=6)
    check(text.replace("n,", "3,"), "MatMul Add BatchNormalization", "left", w=(4, 6), b=(3, 1), p=6)
    check(text.replace("n,", "6,"), "MatMul Add BatchNormalization", "left", w=(4, 6), b=(6, 1), p=6)
    text = "(T[3,4] x) => (T[1,3,6] y) { m = MatMul(x, w) a = Add(m, b) y = BN(a, p) }"  # one axis more
    check(text, "MatMul Add BatchNormalization", "left", w=(4, 6), b=(1, 1, 6), p=3)
    text = "(T[n,4] x, T[6] b) => (T[n,6] y) { m = MatMul(x, w) a = Add(m, b) y = BN(a, p) }"
    check(text, "MatMul Add BatchNormalization", "left", w=(4, 6), p=6)


def test_unknown_numbers_of_axes_are_left():
    """A custom operator gives anything: BatchNorm's channels are on axis 1, a MatMul's on the last."""
    text = "(T[n,6] x) => (T[n,6] y) { u = my.Any(x) m = MatMul(u, w) a = Add(m, b) d = BN(a, p) y = my.Any(d) }"
    model = build(text, imports=["my"], w=(6, 6), b=(6,), p=6)
    folded, report = fold_checked(model)
    assert operators(folded) == operators(model)
    assert "it is not known how many axes" in reasons(report)


def test_a_scalar_of_many_axes_beside_an_unknown_number_of_them_is_left():
    text = "(T[n,6] x) => (T[n,6] y) { u = my.Any(x) d = BN(u, p) a = Mul(d, s) y = my.Any(a) }"
    for shape, expected in ((1, 1, 1, 1), "left"), ((1,), "rewritten"):
        _, report = fold_checked(build(text, imports=["my"], p=6, s=shape))
        assert report.decisions[0].action == expected


@pytest.mark.parametrize("into", [False, True])
@pytest.mark.parametrize("rank", [2, 3])
def test_matmul_with_the_constant_on_the_left(rank, into):
    axes, ends = ("4,5", "6,5") if rank == 2 else ("n,4,5", "n,6,5")
    if rank == 2:  # the channels are on the first axis but one
        body = "m = MatMul(w, x) t = Transpose(m) y = BN(t, p)"
        text = f"(T[{axes}] x) => (T[5,6] y) {{ {body} }}"
        if into:
            text = "(T[5,4] x) => (T[6,5] y) { d = BN(x, p) t = Transpose(d) y = MatMul(w, t) }"
        expected = "Transpose MatMul Add" if into else "MatMul Add Transpose"
    else:
        body = "d = BN(x, p) y = MatMul(w, d)" if into else "m = MatMul(w, x) y = BN(m, p)"
        text, expected = f"(T[{axes}] x) => (T[{ends}] y) {{ {body} }}", "MatMul Add"
    check(text, expected, "folded", w=(6, 4), p=4 if into else 6)


def test_matmul_by_one_axis_has_its_channels_last():
    text = "(T[1,4] x) => (T[3] y) { d = BN(x, p) r = Reshape(d, shape) y = MatMul(w, r) }"
    check(text, "BatchNormalization Reshape MatMul", "left", w=(3, 4), shape=np.array([4]), p=4)
    text = "(T[4] x) => (T[1,3] y) { c = MatMul(w, x) r = Reshape(c, shape) y = BN(r, p) }"
    check(text, "MatMul Reshape BatchNormalization", "left", w=(3, 4), shape=np.array([1, 3]), p=3)
    text = "(T[4] x) => (T[1,3] y) { c = MatMul(x, w) r = Reshape(c, shape) y = BN(r, p) }"
    check(text, "MatMul Add Reshape", "folded", w=(4, 3), shape=np.array([1, 3]), p=3)


def test_matmul_by_a_stack_of_matrices_is_left():
    text = "(T[2,3,4] x) => (T[2,3,6] y) { m = MatMul(x, w) y = BN(m, p) }"
    check(text, "MatMul BatchNormalization", "left", w=(2, 4, 6), p=3)


# Opsets, IR versions, versions of BatchNormalization --------------------------------------------------------------

NETS = {
    "conv": ("(T[n,2,5,5] x) => (T[n,3,h,w] y) { c = Conv(x, w, b) d = BN(c, p) y = Relu(d) }", "Conv Relu",
             {"w": (3, 2, 3, 3), "b": (3,), "p": 3}),
    "no bias": ("(T[n,2,5,5] x) => (T[n,3,h,w] y) { c = Conv(x, w) y = BN(c, p) }", "Conv",
                {"w": (3, 2, 3, 3), "p": 3}),
    "into": ("(T[n,2,5,5] x) => (T[n,3,h,w] y) { c = BN(x, p) y = Conv(c, w) }", "Conv", {"w": (3, 2, 3, 3), "p": 2}),
    "transposed": ("(T[n,4,5] x) => (T[n,6,w] y) { c = ConvTranspose<group=2>(x, w) y = BN(c, p) }", "ConvTranspose",
                   {"w": (4, 3, 2), "p": 6}),
    "gemm": ("(T[n,4] x) => (T[n,6] y) { c = Gemm(x, w, b) y = BN(c, p) }", "Gemm", {"w": (4, 6), "b": (6,), "p": 6}),
    "matmul": ("(T[n,4] x) => (T[n,6] y) { c = MatMul(x, w) y = BN(c, p) }", "Gemm", {"w": (4, 6), "p": 6}),
    "matmul of 3": ("(T[n,4,5] x) => (T[n,6,5] y) { c = MatMul(w, x) y = BN(c, p) }", "MatMul Add",
                    {"w": (6, 4), "p": 6}),
    "twice": ("(T[n,3,5] x) => (T[n,3,5] y) { c = BN(x, p) d = Dropout(c) y = BN(d, q) }", "Dropout BatchNormalization",
              {"p": 3, "q": 3}),
    "head": ("(T[n,3,5,5] x) => (T[n,4] y) "
             "{ c = BN(x, p) a = GlobalAveragePool(c) f = Flatten(a) y = Gemm<transB=1>(f, w, b) }",
             "GlobalAveragePool Flatten Gemm", {"p": 3, "w": (4, 3), "b": (4,)}),
}  # fmt: skip


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("opset", OPSETS)
def test_opsets(opset, net, newest_that_runs):
    text, expected, weights = NETS[net]
    if net == "twice":
        model = build(text, opset=opset, **weights)
        folded, report = fold_checked(model)
        assert sorted(operators(folded)) == ["BatchNormalization", "Dropout"]
        assert [d.action for d in report].count("merged") == 1
        assert_same(model, folded)
        return
    check(text, expected, "folded", opset=opset, runtime=opset <= newest_that_runs, **weights)


@pytest.mark.parametrize("opset", [1, 5, 6])
def test_older_opsets_are_refused(opset):
    text, _, weights = NETS["conv"]
    with pytest.raises(ValueError, match=f"model: expected opset 7 or newer, got {opset}"):
        interop.fold(build(text, opset=opset, ir=3, **weights))


def test_no_opset_is_refused():
    model = build(*NETS["conv"][:1], **NETS["conv"][2])
    del model.opset_import[:]
    with pytest.raises(ValueError, match="expected opset 7 or newer, got none"):
        interop.fold(model)


def test_onnx_by_its_other_name():
    text, expected, weights = NETS["conv"]
    model = build(text, **weights)
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"
    assert operators(interop.fold(model)[0]) == expected.split()


BN_TEXT = "(T[n,2,3,3] x) => (T[n,3,3,3] y) { c = Conv(x, w) y = BN<%s>(c, p) }"


@pytest.mark.parametrize("opset", [7, 8])
def test_statistics_for_every_position_are_left(opset):
    text = BN_TEXT % "spatial=0"
    model = build(text, opset=opset, w=(3, 2, 1, 1), **{f"p_{s}": (3, 3, 3) for s in "sBmv"})
    folded, report = interop.fold(model)
    assert operators(folded) == ["Conv", "BatchNormalization"]
    assert "spatial = 0" in reasons(report)
    check(BN_TEXT % "spatial=1, momentum=0.5", "Conv", "folded", opset=opset, w=(3, 2, 1, 1), p=3)


def test_epsilon_and_momentum():
    folded, _ = check(BN_TEXT % "epsilon=0.5, momentum=0.5", "Conv", "folded", w=(3, 2, 1, 1), p=3)
    other, _ = check(BN_TEXT % "momentum=0.5", "Conv", "folded", w=(3, 2, 1, 1), p=3)
    assert folded.graph.initializer != other.graph.initializer


def test_training_mode_is_left():
    text = "(T[n,2,3,3] x) => (T[n,3,3,3] y) { c = Conv(x, w) y, m, v = BN<training_mode=1>(c, p) }"
    model = build(text, w=(3, 2, 1, 1), p=3)
    folded, report = fold_checked(model)
    assert operators(folded) == ["Conv", "BatchNormalization"]
    assert "outputs for training" in reasons(report)
    del model.graph.node[1].output[1:]
    folded, report = interop.fold(model)
    assert operators(folded) == ["Conv", "BatchNormalization"]
    assert "training mode" in reasons(report)


@pytest.mark.parametrize("opset", [7, 9, 13])
def test_outputs_for_training_are_left(opset):
    text = "(T[n,2,3,3] x) => (T[n,3,3,3] y) { c = Conv(x, w) y, m, v, sm, sv = BN(c, p) }"
    folded, report = fold_checked(build(text, opset=opset, w=(3, 2, 1, 1), p=3))
    assert operators(folded) == ["Conv", "BatchNormalization"]
    assert "outputs for training" in reasons(report)


@pytest.mark.parametrize("opset", [15, NEWEST])
@pytest.mark.parametrize(
    "kinds", [("float16", "float", "float"), ("float16", "float", "double"), ("double", "float", "float16")]
)
def test_mixed_dtypes(opset, kinds):
    """BatchNormalization 15: x, scale and B, mean and var are each of a dtype of their own."""
    numpy = {"float16": np.float16, "float": np.float32, "double": np.float64}
    data, affine, statistics = kinds
    own = {"s": affine, "B": affine, "m": statistics, "v": statistics}
    arrays = {f"p_{k}": generator(k).uniform(0.5, 2, 3).astype(numpy[kind]) for k, kind in own.items()}
    text = f"({data}[n,2,3,3] x) => ({data}[n,3,3,3] y) {{ c = Conv(x, w) y = BN(c, p) }}"
    check(text, "Conv", "folded", opset=opset, dtype=data, runtime=False, w=(3, 2, 1, 1), **arrays)
    text = f"({data}[n,3,3] x) => ({data}[n,3,3] y) {{ c = BN(x, p) y = BN(c, q) }}"
    folded, _ = check(text, "BatchNormalization", opset=opset, dtype="float16", runtime=False, q=3, **arrays)
    assert len(norms(folded)) == 1


def test_ir_3_has_its_initializers_among_its_inputs():
    for net, (text, expected, weights) in NETS.items():
        model = build(text, opset=8, **weights)
        assert model.ir_version == 3
        folded, _ = fold_checked(model)
        named = {value.name for value in folded.graph.input}
        assert {t.name for t in folded.graph.initializer} | {"x"} == named, net
        assert len(folded.graph.input) == len(named)
        assert sorted(operators(folded)) == sorted(expected.split())


@pytest.mark.parametrize("name", ["w", "b", "p_s", "p_B", "p_m", "p_v"])
def test_what_a_caller_may_override_is_left(name):
    text, _, weights = NETS["conv"]
    model = build(text, as_inputs=[name], **weights)
    folded, report = fold_checked(model)
    assert operators(folded) == ["Conv", "BatchNormalization", "Relu"]
    assert f"{name!r} is an input of the model, which a caller may override" in reasons(report)
    assert folded.graph == model.graph


@pytest.mark.parametrize("where", ["m", "b"])
def test_a_matmul_or_add_that_a_caller_may_override_is_left(where):
    text = "(T[n,4] x) => (T[n,6] y) { m0 = MatMul(x, m) a = Add(m0, b) y = BN(a, p) }"
    expected = {"m": ("MatMul BatchNormalization", "rewritten"), "b": ("MatMul Add BatchNormalization", "left")}[where]
    check(text, *expected, as_inputs=[where], m=(4, 6), b=(6,), p=6)


# Where weights come from -------------------------------------------------------------------------------------------

SOURCES = {
    "Constant": ("w = Identity(w0)", {"w0": (3, 2, 1, 1)}),
    "Unsqueeze": ("w = Unsqueeze(w0, axes)", {"w0": (3, 2), "axes": np.array([2, 3])}),
    "Reshape": ("w = Reshape(w0, shape)", {"w0": (6,), "shape": np.array([3, 2, 1, 1])}),
    "Cast": ("w = Cast<to=1>(w0)", {"w0": np.arange(6, dtype=np.float16).reshape(3, 2, 1, 1)}),
    "ConstantOfShape": ("w = ConstantOfShape<value = float[1] {0.5}>(shape)", {"shape": np.array([3, 2, 1, 1])}),
    "chain": ("t = Transpose(w0) u = Unsqueeze(t, axes) v = Mul(u, u) w = Neg(v)",
              {"w0": (2, 3), "axes": np.array([2, 3])}),
    "Concat": ("w = Concat<axis=0>(w0, w1)", {"w0": (1, 2, 1, 1), "w1": (2, 2, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("into", [False, True])
def test_computed_weights(source, into):
    code, weights = SOURCES[source]
    body = "d = BN(x, p) y = Conv(d, w)" if into else "c = Conv(x, w) y = BN(c, p)"
    text = f"(T[n,2,3,3] x) => (T[n,3,3,3] y) {{ {code} {body} }}"
    _, report = check(text, "Conv", "folded", p=2 if into else 3, **weights)
    assert (report.nodes_before, report.nodes_after) == (2, 1)


def test_constant_nodes():
    text = """(T[n,2,3,3] x) => (T[n,2,3,3] y) {
        w = Constant<value = float[2,2,1,1] {1.0, 2.0, 3.0, 4.0}>()
        s = Constant<value_floats = [1.5, -2.0]>()  b = Constant<value = float[2] {1.0, 3.0}>()
        v = Constant<value = float[2] {1.0, 2.0}>()  f = Constant<value_float = 3.0>()
        c = Conv(x, w)  d = BatchNormalization(c, s, b, b, v)  e = Mul(f, d) y = Pow(e, f) }"""
    folded, _ = check(text, "Conv Pow", "folded")
    assert {t.name for t in folded.graph.initializer} >= {"f"}


def test_a_constant_that_is_an_output_stays_one():
    text = """(T[n,2,3] x) => (T[n,2,3] y, T[2] s) {
        s = Constant<value = float[2] {1.5, -2.0}>()  c = Conv(x, w)  y = BatchNormalization(c, s, s, s, v) }"""
    folded, _ = fold_checked(build(text, w=(2, 2, 1), v=np.ones(2, np.float32)))
    assert operators(folded) == ["Constant", "Conv"]


def test_other_constants_stay_what_they_are():
    """Strings and sparse values are no initializers that fold could write."""
    text = """(T[n,2,3] x, int64[1] i) => (T[n,2,3] y, string[1] z) {
        k = Constant<value_strings = ["a", "b"]>()  z = Gather(k, i)  c = Conv(x, w)  y = BN(c, p) }"""
    folded, _ = fold_checked(build(text, w=(2, 2, 1), p=2))
    assert sorted(operators(folded)) == ["Constant", "Conv", "Gather"]


def test_sparse_initializers_are_left():
    text = "(T[n,2,3] x) => (T[n,2,3] y) { c = Conv(x, w) y = BN(c, p) }"
    model = build(text, p=2)
    values = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "w")
    indices = numpy_helper.from_array(np.array([0, 3]), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [2, 2, 1]))
    folded, report = interop.fold(model)
    onnx.checker.check_model(folded)
    assert folded.graph == model.graph
    assert report.count("left") == 1


@pytest.mark.parametrize("dtype", [TensorProto.INT8, TensorProto.UINT8])
def test_quantized_weights_are_left(dtype):
    text = """(T[n,2,3] x) => (T[n,2,3] y) { w = DequantizeLinear(w0, scale, zero) c = Conv(x, w) y = BN(c, p) }"""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    weights = {"w0": np.arange(4, dtype=kind).reshape(2, 2, 1), "scale": np.float32(0.5), "zero": np.array(1, kind)}
    check(text, "DequantizeLinear Conv BatchNormalization", "left", opset=21, p=2, **weights)
    text = """(T[n,2,3] x) => (T[n,2,3] y) { q = QuantizeLinear(x, scale, zero) d = DequantizeLinear(q, scale, zero)
        v = DequantizeLinear(w0, scale, zero) c = Conv(d, v) e = BN(c, p) f = QuantizeLinear(e, scale, zero)
        y = DequantizeLinear(f, scale, zero) }"""
    model = build(text, p=2, **weights)
    folded, _ = fold_checked(model)
    assert folded.graph == model.graph


def test_integer_matmul_is_left():
    model = build(
        "(int32[n,2] x) => (int32[n,3] y, T[n,3] z) { y = MatMul(x, w) f = Cast<to=1>(y) z = BN(f, p) }",
        p=3, w=np.arange(6, dtype=np.int32).reshape(2, 3),
    )  # fmt: skip
    folded, _ = fold_checked(model)
    assert folded.graph == model.graph


# Sharing -----------------------------------------------------------------------------------------------------------

X3 = "(T[n,3,4] x) => (T[n,3,4] y, T[n,3,4] z) "


SHARED = {
    "two layers": ("c = Conv(x, w) y = BN(c, p) z = Conv(x, w)", "Conv BatchNormalization Conv"),
    "two layers and BatchNorms": (
        "c = Conv(x, w) y = BN(c, p) d = Conv(x, w) z = BN(d, q)", "Conv BatchNormalization Conv BatchNormalization"),
    "forward": ("d = BN(x, p) y = Conv(d, w) z = Conv(d, w)", "BatchNormalization Conv Conv"),
    "another operator": (
        "c = Conv(x, w) y = BN(c, p) e = Mul(w, w) z = Conv(x, e)", "Conv BatchNormalization Mul Conv"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_shared_weights_are_left(name):
    body, expected = SHARED[name]
    weights = {"w": (3, 3, 1), "p": 3} | ({"q": 3} if "q)" in body else {})
    _, report = check(X3 + f"{{ {body} }}", expected, **weights)
    assert not report.folded
    assert "its weight 'w' is shared" in reasons(report)


def test_a_weight_that_is_an_output_is_left():
    model = build("(T[n,3,4] x) => (T[n,3,4] y, T[3,3,1] w) { c = Conv(x, w) y = BN(c, p) }", w=(3, 3, 1), p=3)
    folded, report = fold_checked(model)
    assert folded.graph == model.graph
    assert "is shared" in reasons(report)


def test_shared_parameters_fold_and_the_others_keep_theirs():
    body = "{ c = Conv(x, w, b) y = BN(c, p) d = Conv(x, v, b) e = Add(d, b1) z = Relu(e) }"
    folded, _ = check(X3 + body, "Conv Conv Add Relu", "folded", w=(3, 3, 1), v=(3, 3, 1), b=(3,), b1=(3, 1), p=3)
    untouched = numpy_helper.to_array(next(t for t in folded.graph.initializer if t.name == "b"))
    assert (
        untouched.tolist()
        == numpy_helper.to_array(build("(T[1] x) => (T[1] y) { y = Relu(x) }", b=(3,)).graph.initializer[0]).tolist()
    )
    body = "{ c = Conv(x, w, b) y = BN(c, p) d = Conv(x, v, b) z = BN(d, p) }"
    check(X3 + body, "Conv Conv", "folded folded", w=(3, 3, 1), v=(3, 3, 1), b=(3,), p=3)
    body = "{ c = Conv(x, w, b) y = BN(c, p) d = Relu(x) z = BN(d, p) }"
    check(X3 + body, "Conv Relu BatchNormalization", "folded left", w=(3, 3, 1), b=(3,), p=3)
    body = "{ r = Relu(x) c = BN(r, p) y = BN(c, p) s = Neg(x) d = BN(s, p) z = BN(d, p) }"
    check(X3 + body, "Relu BatchNormalization Neg BatchNormalization", p=3)


def test_one_array_for_everything():
    text = "(T[n,2,5] x) => (T[n,2,5] y) { c = Conv(x, w, s) d = BatchNormalization(c, s, s, s, s) "
    text += "y = BatchNormalization(d, s, s, s, s) }"
    check(text, "Conv", "folded folded", w=(2, 2, 1), s=np.array([0.5, 2.0], np.float32))
    text = text.replace("Conv(x, w, s)", "Relu(x)")
    check(text, "Relu BatchNormalization", s=np.array([0.5, 2.0], np.float32))


# Several readers, subgraphs, functions ------------------------------------------------------------------------------

IF = "If(k)<then_branch = t () => (T[n,3,4] {0}1) {{ {1} }}, else_branch = f () => (T[n,3,4] {0}2) {{ {2} }}>"


def branch(out, then, other):
    return f"{out} = " + IF.format(out, then, other)


@pytest.mark.parametrize("body", [
    "c = Conv(x, w) y = BN(c, p) z = Relu(c)",
    "z = Conv(x, w) y = BN(z, p)",
    "c = Conv(x, w) y = BN(c, p) z = BN(c, q)",
    "c = Conv(x, w) y = BN(c, p) " + branch("z", "z1 = Relu(c)", "z2 = Abs(x)"),
    "c = Conv(x, w) r = Relu(c) y = BN(r, p) z = Relu(x)",
])  # fmt: skip
def test_an_output_with_another_reader_is_left(body):
    text = X3.replace("x)", "x, bool k)") + f"{{ {body} }}"
    model = build(text, w=(3, 3, 1), p=3, **({"q": 3} if "q)" in body else {}))
    folded, report = fold_checked(model)
    assert folded.graph == model.graph
    assert report.count("left") == len(report)
    assert_same(model, folded)


def test_a_weight_that_a_subgraph_reads_is_left():
    body = "c = Conv(x, w) y = BN(c, p) " + branch("z", "z1 = Mul(x, w)", "z2 = Abs(x)")
    text = X3.replace("x)", "x, bool k)") + f"{{ {body} }}"
    model = build(text.replace("n,3,4", "3,3,4"), w=(3, 3, 1), p=3)
    folded, report = fold_checked(model)
    assert folded.graph == model.graph
    assert "its weight 'w' is shared" in reasons(report)


@pytest.mark.parametrize("k", [True, False])
def test_subgraphs_read_what_stands_for_the_batch_norm(k):
    inner = branch("i", "i1 = Relu(d)", "i2 = Identity(d)")
    body = "c = Conv(x, w) d = BN(c, p) y = Relu(d) " + branch("z", f"{inner} z1 = Abs(i)", "z2 = Add(d, b)")
    text = X3.replace("x)", "x, bool k)") + f"{{ {body} }}"
    model = build(text, w=(3, 3, 1), b=(3, 1), p=3)
    folded, _ = fold_checked(model)
    assert operators(folded) == ["Conv", "Relu", "If"]
    x = inputs_of(model) | {"k": np.array(k)}
    assert_same(model, folded, inputs=x)
    assert_runs(model, folded, inputs=x)


@pytest.mark.parametrize("k", [True, False])
def test_subgraphs_that_give_what_stands_outside(k):
    """The BatchNorm's output is the body's own output, or that of the model, captured."""
    body = "c = Conv(x, w) y = BN(c, p) " + branch("z", "z1 = Identity(y)", "z2 = Relu(y)")
    model = build(X3.replace("x)", "x, bool k)") + f"{{ {body} }}", w=(3, 3, 1), p=3)
    folded, _ = fold_checked(model)
    assert operators(folded) == ["Conv", "If"]
    assert_same(model, folded, inputs=inputs_of(model) | {"k": np.array(k)})


def test_batch_norms_in_subgraphs_are_left_and_reported():
    body = "c = Conv(x, w) y = BN(c, p) " + branch("z", "c1 = Conv(x, v) z1 = BN(c1, q)", "z2 = BN(x, q)")
    model = build(X3.replace("x)", "x, bool k)") + f"{{ {body} }}", w=(3, 3, 1), v=(3, 3, 1), p=3, q=3)
    folded, report = fold_checked(model)
    assert operators(folded) == ["Conv", "If"]
    assert folded.graph.node[1] == model.graph.node[2]
    assert [(d.node, d.action) for d in report] == [("y", "folded"), ("z1", "left"), ("z2", "left")]
    assert "inside a subgraph of If 'z'" in report.decisions[1].reason
    assert_same(model, folded)


def test_parameters_that_a_subgraph_reads_too():
    body = "c = Conv(x, w, p_B) y = BN(c, p) " + branch("z", "z1 = BN(x, p)", "z2 = BN(x, p)")
    model = build(X3.replace("x)", "x, bool k)") + f"{{ {body} }}", w=(3, 3, 1), p=3)
    folded, _ = fold_checked(model)
    assert operators(folded) == ["Conv", "If"]
    assert_same(model, folded)
    body = "r = Relu(x) c = BN(r, p) y = BN(c, p) " + branch("z", "z1 = BN(x, p)", "z2 = BN(x, p)")
    model = build(X3.replace("x)", "x, bool k)") + f"{{ {body} }}", p=3)
    folded, _ = fold_checked(model)
    assert operators(folded) == ["Relu", "BatchNormalization", "If"]
    assert_same(model, folded)


def test_loops():
    text = """(T[n,3,4] x, int64 trips, bool k) => (T[n,3,4] y) { c = Conv(x, w) d = BN(c, p)
        y = Loop(trips, k, x)<body = body (int64 i, bool k1, T[n,3,4] state) => (bool k2, T[n,3,4] next) {
            k2 = Identity(k1) e = Add(state, d) next = BN(e, q) }> }"""
    model = build(text, w=(3, 3, 1), p=3, q=3)
    folded, report = fold_checked(model)
    assert operators(folded) == ["Conv", "Loop"]
    assert "inside a subgraph of Loop 'y'" in reasons(report)
    x = inputs_of(model) | {"trips": np.array(1), "k": np.array(True)}
    assert_same(model, folded, inputs=x, roundings=8)


def test_names_that_a_subgraph_hides_are_not_renamed():
    """Before SSA was required a body could have names of its own that are used outside too."""
    body = "c = Conv(x, w) d = BN(c, p) y = Relu(d) " + branch("z", "d = Relu(x) z1 = Abs(d)", "z2 = Abs(x)")
    model = build(X3.replace("x)", "x, bool k)") + f"{{ {body} }}", w=(3, 3, 1), p=3)
    folded, _ = interop.fold(model)
    assert operators(folded) == ["Conv", "Relu", "If"]
    assert folded.graph.node[2] == model.graph.node[3]


def test_functions_are_left_and_reported():
    function = onnx.parser.parse_function(
        '<domain: "my", opset_import: ["" : 17]> Block (x, s, b, m, v) => (y) { y = BatchNormalization(x, s, b, m, v) }'
    )
    body = "c = Conv(x, w) d = BN(c, p) y = my.Block(d, p_s, p_B, p_m, p_v)"
    model = build(
        "(T[n,3,4] x) => (T[n,3,4] y) { " + body + " }", w=(3, 3, 1), p=3, imports=["my"], functions=[function]
    )
    folded, report = interop.fold(model)
    onnx.checker.check_model(folded)
    assert operators(folded) == ["Conv", "Block"]
    assert [(d.node, d.action) for d in report] == [("d", "folded"), ("y", "left")]
    assert "the function 'Block'" in report.decisions[1].reason
    assert folded.functions[0] == function


def test_operators_of_other_domains_are_not_onnx():
    for op in "Conv(x, w)", "MatMul(x, w)", "Identity(c0)":
        text = f"(T[n,3,4] x) => (T[n,3,4] y) {{ c0 = Conv(x, w0) c = my.{op} y = BN(c, p) }}"
        model = build(text, w=(3, 3, 1), w0=(3, 3, 1), p=3, imports=["my"])
        folded, report = fold_checked(model)
        assert operators(folded) == operators(model)
        assert "my" not in reasons(report)
    text = "(T[n,3,4] x) => (T[n,3,4] y) { c = Conv(x, w) y = my.BatchNormalization(c, p) }"
    folded, report = fold_checked(build(text, w=(3, 3, 1), p=(3,), imports=["my"]))
    assert len(report) == 0
    text = "(T[n,3,4] x) => (T[n,3,4] y) { w = my.Identity(w0) c = Conv(x, w) y = BN(c, p) }"  # not constant
    _, report = fold_checked(build(text, w0=(3, 3, 1), p=3, imports=["my"]))
    assert report.count("left") == 1


def test_an_add_behind_a_matmul_of_another_domain():
    text = "(T[n,3] x) => (T[n,3] y) { c = my.MatMul(x, w) a = Add(c, b) y = BN(a, p) }"
    model = build(text, w=(3, 3), b=(3,), p=3, imports=["my"])
    folded, _ = fold_checked(model)
    assert folded.graph == model.graph


# Chains and other operators on the way ------------------------------------------------------------------------------

A = "(T[n,2,6,6] x) => (T[a,b,c,d] y) "
B = "(T[n,2,6,6] x) => (T[n,b] y) "
W = {"w": (3, 2, 1, 1), "p": 3}
PASSES = {  # conv, operators, BatchNorm: what comes out, and the weights of its own
    "Identity": ("y0 = Identity(c)", "Identity", {}),
    "Dropout": ("y0 = Dropout(c)", "Dropout", {}),
    "Dropout's mask": ("y0, mask = Dropout(c)", "Dropout", {}),
    "Transposes": ("t = Transpose<perm=[0,2,3,1]>(c) y0 = Transpose<perm=[0,3,1,2]>(t)", "Transpose Transpose", {}),
    "AveragePool": ("y0 = AveragePool<kernel_shape=[2,2]>(c)", "AveragePool", {}),
    "AveragePool, padded": ("y0 = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0]>(c)", "AveragePool", {}),
    "GlobalAveragePool": ("y0 = GlobalAveragePool(c)", "GlobalAveragePool", {}),
    "ReduceMean": ("y0 = ReduceMean<axes=[2,3]>(c)", "ReduceMean", {}),
    "ReduceMean, negative": ("y0 = ReduceMean<axes=[-1], keepdims=1>(c)", "ReduceMean", {}),
    "Slice": ("y0 = Slice(c, zero, four, axes)", "Slice",
              {"zero": np.array([1]), "four": np.array([4]), "axes": np.array([2])}),
    "Pad": ('y0 = Pad<mode="reflect">(c, pads)', "Pad", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "Resize": ('y0 = Resize<mode="linear">(c, , scales)', "Resize", {"scales": np.array([1, 1, 2, 1.5], np.float32)}),
    "Resize to a size": ("y0 = Resize(c, , , sizes)", "Resize", {"sizes": np.array([2, 3, 9, 4])}),
    "Squeeze": ("s = Unsqueeze(c, axes) y0 = Squeeze(s, axes)", "Unsqueeze Squeeze", {"axes": np.array([1])}),
    "Add": ("y0 = Add(c, k)", "", {"k": (3, 1, 1)}),
    "Add of one": ("y0 = Add(k, c)", "", {"k": ()}),
    "Mul, Add": ("e = Mul(c, k) y0 = Add(l, e)", "", {"k": (1, 3, 1, 1), "l": (3, 1, 1)}),
    "Sub": ("y0 = Sub(c, k)", "", {"k": (3, 1, 1)}),
    "Sub from": ("y0 = Sub(k, c)", "", {"k": (3, 1, 1)}),
    "Div": ("y0 = Div(c, k)", "", {"k": (3, 1, 1)}),
    "BatchNorm": ("e = BN(c, q) y0 = Identity(e)", "Identity", {"q": 3}),
}  # fmt: skip


@pytest.mark.parametrize("name", PASSES)
def test_backward_through(name):
    body, expected, weights = PASSES[name]
    text = A + f"{{ c = Conv(x, w) {body} y = BN(y0, p) }}"
    model = build(text, **W, **weights)
    folded, report = fold_checked(model)
    assert operators(folded) == ["Conv", *expected.split()]
    assert set(report.folded) == set(report)
    assert_same(model, folded, roundings=8)
    assert_runs(model, folded)


@pytest.mark.parametrize("name", PASSES)
def test_forward_through(name):
    body, expected, weights = PASSES[name]
    # Three channels in, BatchNorm, the operators, a convolution without padding.
    text = "(T[n,3,6,6] x) => (T[a,b,c,d] y) " + f"{{ c = BN(x, p) {body} y = Conv(y0, w) }}"
    model = build(text, p=3, w=(2, 3, 1, 1), **weights)
    folded, report = fold_checked(model)
    assert operators(folded) == [*expected.split(), "Conv"], str(report)
    assert_same(model, folded, roundings=8)
    assert_runs(model, folded)


STOPS = {  # what is between a convolution and a BatchNorm that has to stay
    "Relu": ("y0 = Relu(c)", {}),
    "Sigmoid": ("y0 = Sigmoid(c)", {}),
    "Div by": ("y0 = Div(k, c)", {"k": (3, 1, 1)}),
    "Add along a row": ("y0 = Add(c, k)", {"k": (6,)}),
    "Add everywhere": ("y0 = Add(c, k)", {"k": (3, 6, 6)}),
    "Add of a result": ("y0 = Add(c, c)", {}),
    "Dropout's mask": ("y0, m = Dropout(c) k = Cast<to=1>(m) z = Add(k, k)", {}),
    "MaxPool": ("y0 = MaxPool<kernel_shape=[2,2]>(c)", {}),
    "MaxPool with its places": ("y0, i = MaxPool<kernel_shape=[2,2]>(c) z = Abs(i)", {}),
    "AveragePool of zeros": ("y0 = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1>(c)", {}),
    "Pad with zeros": ("y0 = Pad(c, pads)", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
    "Pad with ones": ("y0 = Pad(c, pads, one)", {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1)}),
    "Pad of channels": ('y0 = Pad<mode="edge">(c, pads)', {"pads": np.array([0, 1, 0, 0, 0, 0, 0, 0])}),
    "ReduceMean of channels": ("y0 = ReduceMean<axes=[1]>(c)", {}),
    "ReduceSum": ("y0 = ReduceSum(c, axes)", {"axes": np.array([2, 3])}),
    "ReduceMean of all": ("y0 = ReduceMean(c)", {}),
    "Resize, cubic": ('y0 = Resize<mode="cubic">(c, , scales)', {"scales": np.array([1, 1, 2, 2], np.float32)}),
    "Resize of channels": ("y0 = Resize(c, , scales)", {"scales": np.array([1, 1.3, 1, 1], np.float32)}),
    "Softmax": ("y0 = Softmax<axis=1>(c)", {}),
    "Reshape that mixes": ("y0 = Reshape(c, shape)", {"shape": np.array([2, -1, 3, 6])}),
    "Transpose of channels": ("y0 = Transpose<perm=[0,2,1,3]>(c)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", STOPS)
def test_what_must_not_pass(name):
    body, weights = STOPS[name]
    others = {"ReduceMean of channels": 1, "ReduceMean of all": 1, "Pad of channels": 4}
    others |= {"Reshape that mixes": 6, "Transpose of channels": 6}
    channels = others.get(name, 3)
    text = A + f"{{ c = Conv(x, w) {body} y = BN(y0, p) }}"
    model = build(text, **{"w": (3, 2, 1, 1)} | weights, p=channels)
    folded, report = fold_checked(model)
    assert operators(folded) == operators(model), str(report)
    assert report.count("left") == 1
    assert_same(model, folded)


def positive_scale(name, channels):
    s, b, m, v = (numpy_helper.to_array(t) for t in batch_norm(name, channels, np.float32))
    return {f"{name}_s": np.abs(s), f"{name}_B": b, f"{name}_m": m, f"{name}_v": v}


@pytest.mark.parametrize("pool", ["MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>", "GlobalMaxPool",
                                  "ReduceMax<axes=[2,3]>",
                                  "MaxPool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>"])  # fmt: skip
def test_a_scale_that_is_not_negative_passes_a_maximum(pool):
    text = A + f"{{ c = Conv(x, w) m = {pool}(c) y = BN(m, p) }}"
    op = pool.split("<")[0]
    check(text, f"Conv {op}", "folded", w=(3, 2, 1, 1), **positive_scale("p", 3), q=1)
    _, report = check(text, f"Conv {op} BatchNormalization", "left", w=(3, 2, 1, 1), p=3)
    assert "negative scale" in reasons(report)


@pytest.mark.parametrize(
    "op",
    [
        "m = Pad(c, pads, one)",
        'm = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(c, roi, , sizes)',
        "m, i = MaxPool<kernel_shape=[2,2]>(c) z = Abs(i)",
    ],
)
def test_not_even_a_positive_scale_passes_everything(op):
    positive = without_shift(3) | {"p_s": np.full(3, 2, np.float32)}
    weights = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "one": np.float32(1), "sizes": np.array([2, 3, 9, 9])}
    weights |= {"roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32), "w": (3, 2, 1, 1)}
    model = build(A + f"{{ c = Conv(x, w) {op} y = BN(m, p) }}", **weights, **positive)
    _, report = interop.fold(model)
    assert report.count("left") == 1


def test_a_scale_alone_passes_zeros():
    for op in "AveragePool<kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1>(c)", "Pad(c, pads)":
        text = A + f"{{ c = Conv(x, w) m = {op} y = BN(m, p) }}"
        pads = np.array([0, 0, 1, 1, 0, 0, 1, 1])
        check(
            text, f"Conv {op.split('<')[0].split('(')[0]}", "folded", w=(3, 2, 1, 1), pads=pads, **without_shift(3), q=1
        )


@pytest.mark.parametrize(("opset", "dropout"), [
    (7, "Dropout<ratio=0.3>(c)"), (10, "Dropout<ratio=0.3>(c)"), (12, "Dropout(c, ratio)"),
    (13, "Dropout(c, ratio, no)"),
    (22, "Dropout(c, ratio)"),
])  # fmt: skip
def test_every_dropout(opset, dropout):
    text = A + f"{{ c = Conv(x, w) d = {dropout} y = BN(d, p) }}"
    check(text, "Conv Dropout", "folded", opset=opset, **W, ratio=np.float32(0.3), no=np.array(False))


def test_dropout_in_training_is_left():
    text = A + "{ c = Conv(x, w) d = Dropout(c, ratio, yes) y = BN(d, p) }"
    model = build(text, **W, ratio=np.float32(0.3), yes=np.array(True))
    assert operators(fold_checked(model)[0]) == operators(model)
    model = build(text.replace("x)", "x, bool yes)"), **W, ratio=np.float32(0.3))
    assert operators(fold_checked(model)[0]) == operators(model)


@pytest.mark.parametrize("opset", [11, 13, 17, 18, NEWEST])
def test_reduce_mean_with_axes_as_attribute_and_as_input(opset):
    mean = "ReduceMean<keepdims=0, axes=[2,3]>(c)" if opset < 18 else "ReduceMean<keepdims=0>(c, axes)"
    weights = {} if opset < 18 else {"axes": np.array([2, -1])}
    text = B + f"{{ c = Conv(x, w) m = {mean} y = BN(m, p) }}"
    check(text, "Conv ReduceMean", "folded", opset=opset, runtime=opset < NEWEST, **W, **weights)
    text = "(T[n,3,6,6] x) => (T[n,5] y) " + f"{{ c = BN(x, p) m = {mean} y = Gemm(m, g, b) }}"
    check(text, "ReduceMean Gemm", "folded", opset=opset, runtime=opset < NEWEST, p=3, g=(3, 5), b=(5,), **weights)


def test_reduce_mean_of_axes_that_are_not_known_is_left():
    text = "(T[n,2,6,6] x, int64[2] axes) => (T[a,b,c,d] y) { c = Conv(x, w) m = ReduceMean(c, axes) y = BN(m, p) }"
    model = build(text, opset=18, **W)
    assert fold_checked(model)[0].graph == model.graph


HEADS = {
    "Flatten": ("f = Flatten(c)", "Flatten", {}),
    "Flatten, negative": ("f = Flatten<axis=-3>(c)", "Flatten", {}),
    "Reshape": ("f = Reshape(c, shape)", "Reshape", {"shape": np.array([0, -1])}),
    "Reshape to a size": ("f = Reshape(c, shape)", "Reshape", {"shape": np.array([-1, 12])}),
    "Identity, Flatten": ("i = Identity(c) f = Flatten(i)", "Identity Flatten", {}),
}


@pytest.mark.parametrize("head", HEADS)
def test_flatten_before_a_gemm(head):
    body, expected, weights = HEADS[head]
    text = "(T[2,3,2,2] x) => (T[2,5] y) " + f"{{ c = BN(x, p) {body} y = Gemm(f, w, b) }}"
    check(text, f"{expected} Gemm", "folded", p=3, w=(12, 5), b=(5,), **weights)
    text = "(T[2,3,2,2] x) => (T[2,5] y) " + f"{{ c = BN(x, p) {body} y = MatMul(f, w) }}"
    check(text, f"{expected} Gemm", "folded", p=3, w=(12, 5), **weights)


def test_flatten_of_pooled_channels():
    body = "c = Conv(x, w) a = GlobalAveragePool(c) f = Flatten(a)"
    check(B + f"{{ {body} y = BN(f, p) }}", "Conv GlobalAveragePool Flatten", "folded", **W)
    body = "c = Conv(x, w) a = GlobalAveragePool(c) f = Squeeze(a, axes)"
    check(B + f"{{ {body} y = BN(f, p) }}", "Conv GlobalAveragePool Squeeze", "folded", **W, axes=np.array([2, 3]))


def test_a_batch_norm_of_every_position_behind_a_flatten():
    """As many channels as features: they fold into a convolution only where those of a channel agree."""
    text = "(T[2,2,2,2] x) => (T[2,12] y) { c = Conv(x, w) f = Flatten(c) y = BN(f, p) }"
    check(text, "Conv Flatten BatchNormalization", "left", w=(3, 2, 1, 1), p=12)
    each = {f"p_{s}": np.repeat(generator(s).uniform(0.5, 2, 3), 4).astype(np.float32) for s in "sBmv"}
    check(text, "Conv Flatten", "folded", w=(3, 2, 1, 1), q=1, **each)


def test_flatten_then_unsqueeze():
    """The channels of a flattened tensor come in runs."""
    text = "(T[2,2,2,2] x) => (T[2,3,1] y) { c = BN(x, p) f = Flatten(c) u = Unsqueeze(f, axes) y = Conv(u, w) }"
    model = build(text, p=2, axes=np.array([2]), w=(3, 8, 1))
    folded, _ = fold_checked(model)
    assert_same(model, folded)
    text = (
        "(T[2,2,2,2] x) => (T[2,3] y) { c = BN(x, p) f = Flatten(c) r = Reshape(f, s) g = Flatten(r) y = Gemm(g, w) }"
    )
    model = build(text, p=2, s=np.array([2, 4, 2]), w=(8, 3))
    folded, _ = fold_checked(model)
    assert_same(model, folded)


def test_shuffle():
    """ShuffleNet: Reshape, Transpose, Reshape deal the channels out anew."""
    text = """(T[2,6,3,3] x) => (T[2,6,3,3] y) { c = Conv(x, w) a = Reshape(c, s) t = Transpose<perm=[0,2,1,3,4]>(a)
        b = Reshape(t, r) y = BN(b, p) }"""
    model = build(text, w=(6, 6, 1, 1), s=np.array([2, 2, 3, 3, 3]), r=np.array([2, 6, 3, 3]), p=6)
    folded, _ = fold_checked(model)
    assert_same(model, folded)


# Concat and Split ---------------------------------------------------------------------------------------------------

JOINS = {
    "backward through Concat": (
        "c = Conv(x, w) d = Conv(x, v) j = Concat<axis=1>(c, d) y = BN(j, p)", "Conv Conv Concat", {"p": 5}),
    "a branch that nothing takes": (
        "c = Conv(x, w) d = Relu(x) j = Concat<axis=1>(c, d) y = BN(j, p)",
        "Conv Relu Concat BatchNormalization", {"p": 5}),
    "forward through Concat": (
        "c = BN(x, p) r = Relu(x) j = Concat<axis=1>(c, r) y = Conv(j, u)", "Relu Concat Conv", {"p": 2}),
    "one tensor twice": (
        "c = Conv(x, w) j = Concat<axis=1>(c, c) y = BN(j, p)", "Conv Concat BatchNormalization", {"p": 6}),
    "forward, twice": (
        "c = BN(x, p) j = Concat<axis=1>(c, c) y = Conv(j, u)", "Concat Conv", {"p": 2}),
    "Concat on another axis": (
        "c = Conv(x, w) d = Conv(x, w2) j = Concat<axis=2>(c, d) y = BN(j, p)", "Conv Conv Concat", {"p": 3}),
    "forward on another axis": (
        "c = BN(x, p) r = Relu(x) j = Concat<axis=-1>(c, r) y = Conv(j, u2)",
        "BatchNormalization Relu Concat Conv", {"p": 2}),
    "with a constant": (
        "c = BN(x, p) j = Concat<axis=1>(c, k) y = Conv(j, u)", "Concat Conv", {"p": 2}),
    "forward through Split": (
        "c = BN(x, p) s, t = Split<axis=1>(c, parts) e = Conv(s, w1) f = Conv(t, w1b) y = Add(e, f)",
        "Split Conv Conv Add", {"p": 2}),
    "a part that nobody reads": (
        "c = BN(x, p) s, t = Split<axis=1>(c, parts) y = Conv(s, w1)", "Split Conv", {"p": 2}),
    "a part that is something else's": (
        "c = BN(x, p) s, t = Split<axis=1>(c, parts) e = Conv(s, w1) f = Relu(t) y = Add(e, f)",
        "BatchNormalization Split Conv Relu Add", {"p": 2}),
    "backward through Split": (
        "c = Conv(x, w) s, t = Split<axis=1>(c, parts3) d = BN(t, p) e = Relu(s) y = Concat<axis=1>(d, e)",
        "Conv Split Relu Concat", {"p": 2}),
    "Split on another axis": (
        "c = BN(x, p) s, t = Split<axis=2>(c, parts4) e = Conv(s, w1c) f = Conv(t, w1d) y = Add(e, f)",
        "Split Conv Conv Add", {"p": 2}),
    "several readers": (
        "c = BN(x, p) e = Conv(c, w) f = Conv(c, w2) y = Add(e, f)", "Conv Conv Add", {"p": 2}),
    "several readers, one of which is not": (
        "c = BN(x, p) e = Conv(c, w) f = Relu(c) y = Concat<axis=1>(e, f)",
        "BatchNormalization Conv Relu Concat", {"p": 2}),
    "both directions": (
        "c = Conv(x, w) d = BN(c, p) r = Relu(d) e = BN(r, q) y = Conv(e, w3)", "Conv Relu Conv", {"p": 3, "q": 3}),
    "one layer between two": (
        "c = BN(x, p) d = Conv(c, w) y = BN(d, q)", "Conv", {"p": 2, "q": 3}),
    "three in a row": (
        "c = BN(x, p) d = BN(c, q) y = BN(d, r)", "BatchNormalization", {"p": 2, "q": 2, "r": 2}),
    "BN, BN, Mul, Add, conv": (
        "c = BN(x, p) d = BN(c, q) m = Mul(d, k1) a = Add(m, k1) y = Conv(a, w)", "Conv", {"p": 2, "q": 2}),
    "DenseNet": (
        "c = Conv(x, w) j = Concat<axis=1>(x, c) b = BN(j, p) y = Relu(b)",
        "Conv Concat BatchNormalization Relu", {"p": 5}),
}  # fmt: skip
OWN = {
    "w": (3, 2, 1, 1), "w2": (3, 2, 1, 1), "v": (2, 2, 1, 1), "u": (3, 4, 1, 1), "u2": (3, 2, 1, 1), "w1": (3, 1, 1, 1),
    "w1b": (3, 1, 1, 1), "w3": (2, 3, 1, 1), "w1c": (3, 2, 1, 1), "w1d": (3, 2, 1, 1), "k": (2, 2, 6, 6),
    "k1": (2, 1, 1), "parts": np.array([1, 1]), "parts3": np.array([1, 2]), "parts4": np.array([3, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", JOINS)
def test_joins(name):
    body, expected, weights = JOINS[name]
    text = A + f"{{ {body} }}"
    used = {name: value for name, value in OWN.items() if re.search(rf"\b{name}\b", body)}
    check(text, expected, sizes={"n": 2}, roundings=10, **used, **weights)


def test_a_split_with_an_output_left_out():
    text = A + "{ c = BN(x, p) s, t = Split<axis=1>(c, parts) y = Conv(s, w1) }"
    model = build(text, p=2, parts=np.array([1, 1]), w1=(3, 1, 1, 1))
    model.graph.node[1].output[1] = ""
    folded, report = interop.fold(model)
    assert len(norms(folded)) == report.count("left")
    text = A + "{ c = Conv(x, w) s, t = Split<axis=1>(c, parts) y = BN(s, p) }"
    model = build(text, p=1, parts=np.array([1, 2]), w=(3, 2, 1, 1))
    model.graph.node[1].output[1] = ""
    folded, report = interop.fold(model)
    assert len(norms(folded)) == report.count("left")


# Names --------------------------------------------------------------------------------------------------------------


def test_names_that_fold_would_create_are_taken():
    text = """(T[n,l,4] x, bool k) => (T[n,l,6] y) { c = MatMul(x, w) t = Transpose<perm=[0,2,1]>(c) d = BN(t, p)
        e = Transpose<perm=[0,2,1]>(d) y = If(k)<then_branch = g1 () => (T[n,l,6] y1) {
        c_before_bias = Relu(e) y1 = Relu(c_before_bias) },
        else_branch = g2 () => (T[n,l,6] y2) { c_bias = Abs(e) y2 = Relu(c_bias) }> }"""
    model = build(text, w=(4, 6), p=6)
    folded, _ = fold_checked(model)
    assert operators(folded) == ["MatMul", "Add", "Transpose", "Transpose", "If"]
    assert_same(model, folded)
    text = A + "{ c_bias = Conv(x, w) c = Conv(x, w2) d = BN(c, p) y = Add(c_bias, d) }"
    model = build(text, w=(3, 2, 1, 1), w2=(3, 2, 1, 1), p=3)
    folded, _ = fold_checked(model)
    assert_same(model, folded)


def test_duplicate_and_empty_node_names():
    text, expected, weights = JOINS["both directions"]
    used = {k: OWN[k] for k in ("w", "w3")}
    model = build(A + f"{{ {text} }}", **used, **weights)
    for node in model.graph.node:
        node.name = "same"
    folded, report = fold_checked(model)
    assert operators(folded) == expected.split()
    assert [d.node for d in report] == ["same", "same"]
    assert_same(model, folded)


def test_an_output_of_the_model_keeps_its_name():
    text = "(T[n,2,6] x) => (T[n,3,6] y, T[n,3,6] z) { c = Conv(x, w) y = BN(c, p) z = Relu(y) }"
    folded, _ = check(text, "Conv Relu", "folded", w=(3, 2, 1), p=3)
    assert [node.output[0] for node in folded.graph.node] == ["y", "z"]
    assert folded.graph.node[1].input[0] == "y"
    text = "(T[n,2,6] x) => (T[n,3,6] y) { c = Conv(x, w) d = BN(c, p) y = Mul(d, k) }"
    folded, _ = check(text, "Conv", "folded", w=(3, 2, 1), p=3, k=(3, 1))
    text = "(T[n,2,6] x) => (T[n,2,6] y) { d = BN(x, p) y = Mul(d, k) }"
    folded, _ = check(text, "BatchNormalization", "rewritten", p=2, k=(2, 1))
    assert folded.graph.node[0].output[0] == "y"


def test_nothing_to_fold():
    model = build("(T[n,2,6] x) => (T[n,2,6] y) { y = Relu(x) }")
    folded, report = fold_checked(model)
    assert folded == model
    assert len(report) == 0


def test_metadata_stay():
    text, _, weights = NETS["conv"]
    model = build(text, **weights)
    model.producer_name, model.doc_string, model.graph.doc_string = "producer", "model", "graph"
    helper.set_model_props(model, {"key": "value"})
    model.graph.value_info.extend(
        [helper.make_tensor_value_info("c", 1, ["n", 3, 3, 3]), helper.make_tensor_value_info("d", 1, ["n", 3, 3, 3])]
    )
    folded, _ = fold_checked(model)
    for name in ("producer_name", "doc_string", "metadata_props"):
        assert getattr(folded, name) == getattr(model, name)
    assert folded.graph.doc_string == "graph"
    assert {v.name for v in folded.graph.value_info} <= {"c", "d"}


def test_report_counts():
    text, _, weights = NETS["no bias"]
    _, report = interop.fold(build(text, **weights))
    assert (report.nodes_before, report.nodes_after) == (2, 1)
    assert (report.parameters_before, report.parameters_after) == (54 + 12, 54 + 3)
    (decision,) = report
    assert decision.changes[0].negative_gamma == tuple(
        np.flatnonzero(numpy_helper.to_array(batch_norm("p", 3, float)[0]) < 0)
    )


# What is wrong is said ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "values", "message"), [
    ("p_v", [1.0, -1.0, 1.0], "var + eps positive and finite"),
    ("p_v", [1.0, np.nan, 1.0], "var: expected finite values, got nan"),
    ("p_m", [1.0, np.nan, 1.0], "mean: expected finite values, got nan"),
    ("p_s", [np.inf, 1.0, 1.0], "gamma: expected finite values, got inf"),
    ("p_B", [1.0, 1.0, -np.inf], "beta: expected finite values"),
    ("p_B", [1.0, 1.0], "beta: expected shape (3,), got (2,)"),
    ("p_m", [[1.0, 1.0, 1.0]], "mean: expected shape (C,), got (1, 3)"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_parameters_that_are_none(name, values, message, dtype):
    text, _, weights = NETS["conv"]
    model = build(text, **weights)
    model.graph.node[1].name = "the bad one"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array(values, np.float32), name))
    with pytest.raises(ValueError, match=f"BatchNormalization 'the bad one': .*{re.escape(message)}"):
        interop.fold(model)


def test_parameters_of_a_batch_norm_that_is_held_are_not_looked_at():
    text, _, weights = NETS["conv"]
    model = build(text, as_inputs=["p_m"], **weights)
    model.graph.initializer[5].CopyFrom(numpy_helper.from_array(-np.ones(3, np.float32), "p_v"))
    assert operators(interop.fold(model)[0]) == operators(model)


def test_a_slightly_negative_variance_is_none():
    """Checkpoints with var = -1e-6 exist: var + eps is what must be positive."""
    text, _, weights = NETS["no bias"]
    del (weights := dict(weights))["p"]
    s = np.ones(3, np.float32)
    check(text, "Conv", "folded", p_s=s, p_B=s, p_m=s, p_v=np.full(3, -1e-6, np.float32), **weights)


@pytest.mark.parametrize(
    ("text", "weights", "why"),
    [
        ("(T[n,2,5] x) => (T[n,3,5] y) { c = Conv(x, w) y = BN(c, p) }", {"w": (3, 2, 1), "p": 2},
         "BatchNormalization 'y': expected 2 channels, as its parameters have, got 3 in its input"),
        ("(T[n,2,5] x) => (T[n,3,5] y) { c = Conv(x, w) r = Relu(c) y = BN(r, p) }", {"w": (3, 2, 1), "p": 5},
         "BatchNormalization 'y': expected 5 channels"),
        ("(T[n,2,5] x) => (T[n,3,5] y) { c = Conv(x, w, b) y = BN(c, p) }", {"w": (3, 2, 1), "b": (5,), "p": 3},
         "Conv 'c': expected a bias of shape (3,), got (5,)"),
        ("(T[n,4,5] x) => (T[n,3,5] y) { c = Conv(x, w) y = BN(c, p) }", {"w": (3, 2, 1), "p": 3},
         "Conv 'c': expected 2 channels, as its parameters have, got 4 in its input"),
        ("(T[n,2,5] x) => (T[n,3,5] y) { c = Conv(x, w) y = BN(c, p) }", {"w": (3, 2), "p": 3},
         "Conv 'c': expected a weight of 3 axes or more, got (3, 2)"),
        ("(T[n,2] x) => (T[n,3] y) { c = Gemm(x, w, b) y = BN(c, p) }", {"w": (2, 3), "b": (2,), "p": 3},
         "Gemm 'c': expected a bias of (3,)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused_by_name(text, weights, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        interop.fold(build(text, **weights))


def test_large_computed_weights_that_nothing_changes_are_not_copied():
    body = "t = Transpose(w) c = MatMul(x, t) r = Relu(c) d = MatMul(r, v) y = BN(d, p)"
    model = build(f"(T[n,300] x) => (T[n,300] y) {{ {body} }}", w=(300, 300), v=(300, 300), p=300)
    folded, _ = interop.fold(model)
    assert "Transpose" in operators(folded)
    text = "(T[n,300] x) => (T[n,300] y) { t = Transpose(w) y = MatMul(x, t) }"
    model = build(text, w=(300, 300))
    assert interop.fold(model)[0] == model


def test_what_float16_cannot_hold_is_left():
    half = np.array([1.0, 1.0, 1.0], np.float16)
    given = {
        "w": np.full((3, 2, 1), 6e4, np.float16),
        "p_B": half,
        "p_m": half,
        "p_v": half,
        "p_s": np.float16(4) * half,
    }
    text = "(T[n,2,5] x) => (T[n,3,5] y) { c = Conv(x, w) y = BN(c, p) }"
    folded, report = fold_checked(build(text, dtype="float16", **given))
    assert operators(folded) == ["Conv", "BatchNormalization"]
    assert "float16" in reasons(report)
    given = {f"{bn}_{s}": np.full(2, 6e4 if s == "s" else 1, np.float16) for bn in "pq" for s in "sBmv"}
    folded, report = fold_checked(
        build("(T[n,2,5] x) => (T[n,2,5] y) { c = BN(x, p) y = BN(c, q) }", dtype="float16", **given)
    )
    assert len(norms(folded)) == 2


def test_a_statistic_that_float16_cannot_hold():
    """running_var = 9.8e7 overflows float16: kept in float32 it folds into float16 weights."""
    one = np.ones(3, np.float16)
    given = {
        "w": (3, 2, 1),
        "p_s": one,
        "p_B": one,
        "p_m": np.full(3, 1e5, np.float32),
        "p_v": np.full(3, 9.8e7, np.float32),
    }
    text = "(T[n,2,5] x) => (T[n,3,5] y) { c = Conv(x, w) y = BN(c, p) }"
    check(text, "Conv", "folded", dtype="float16", runtime=False, **given)


DAMAGES = {
    "no input": (lambda g: g.node[0].input.__delitem__(slice(None)), "Conv 'c'"),
    "one input": (lambda g: g.node[0].input.__delitem__(slice(1, None)), "Conv 'c'"),
    "no output": (lambda g: g.node[0].output.__delitem__(slice(None)), "Conv"),
    "BN without var": (lambda g: g.node[1].input.pop(), "BatchNormalization 'd'"),
    "unknown input": (lambda g: g.node[0].input.__setitem__(0, "nowhere"),
     "Conv 'c': expected to read what stands before"),
    "a cycle": (lambda g: g.node[0].input.__setitem__(0, "y"), "Conv 'c': expected to read what stands before"),
    "its own output": (lambda g: g.node[1].input.__setitem__(0, "d"), "BatchNormalization 'd': expected to read"),
    "two of a name": (lambda g: g.node[1].output.__setitem__(0, "c"), "'c', which there is already"),
    "an attribute of another type": (lambda g: g.node[1].attribute.append(helper.make_attribute("epsilon", "a")),
     "BatchNormalization 'd'"),
    "an unknown attribute": (lambda g: g.node[0].attribute.append(helper.make_attribute("colour", 1)), "Conv 'c'"),
    "a negative epsilon": (lambda g: g.node[1].attribute.append(helper.make_attribute("epsilon", -1.0)),
     "BatchNormalization 'd'"),
    "too few bytes": (lambda g: setattr(g.initializer[0], "raw_data", b"123"), "'w'"),
    "no dtype": (lambda g: setattr(g.initializer[0], "data_type", 99), "'w'"),
    "external": (lambda g: setattr(g.initializer[0], "data_location", 1), "external data that are not loaded"),
    "strings": (lambda g: g.initializer[2].CopyFrom(helper.make_tensor("p_s", 8, [3], [b"a", b"b", b"c"])),
     "BatchNormalization 'd'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_models_are_refused(damage):
    change, message = DAMAGES[damage]
    text, _, weights = NETS["conv"]
    model = build(text, **weights)
    change(model.graph)
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.fold(model)


def test_long_chains():
    """A model may be deeper than Python's stack."""
    body = " ".join(f"c{i + 1} = Identity(c{i})" for i in range(3000))
    text = f"(T[n,2,5] x) => (T[n,3,5] y) {{ c0 = Conv(x, w) {body} y = BN(c3000, p) }}"
    folded, report = interop.fold(build(text, w=(3, 2, 1), p=3))
    assert len(report) == 1
    assert len(norms(folded)) == len(report.left)


# Random graphs ------------------------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """Draw a DAG of what folding knows, and of what it does not: every tensor is (N, C, L) or (N, C)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def pick(choices):
        return choices[rng.integers(len(choices))]

    def number(low, high):
        return int(rng.integers(low, high + 1))

    opset = pick([8, 11, 13, 17, 18, NEWEST])
    code, arrays, shapes = [], {}, {"x": (2, number(1, 4), number(2, 5))}

    def array(shape, low=-1.0):
        shared = [
            name for name, a in arrays.items() if a.shape == tuple(shape) and a.min() >= low and a.dtype == np.float32
        ]
        if shared and rng.random() < 0.15:
            return str(rng.choice(shared))
        name = f"k{len(arrays)}"
        arrays[name] = rng.uniform(max(low, -1), 1.5, shape).astype(np.float32)
        return name

    def numbers(*values):
        name = f"k{len(arrays)}"
        arrays[name] = np.array(values)
        return name

    kinds = ["bn"] * 6 + ["conv"] * 5 + ["gemm"] * 3 + ["scale"] * 2
    kinds += ["transposed", "matmul", "left", "same", "relu", "transpose", "pool", "concat", "split", "flatten"]
    kinds += ["reshape", "mean", "add", "unsqueeze", "slice", "pad", "max"]
    for step in range(draw(st.integers(2, 10))):
        x = list(shapes)[-1] if rng.random() < 0.75 else pick(list(shapes))
        shape, out, kind = shapes[x], f"t{step}", pick(kinds)
        c, length = shape[1], shape[2] if len(shape) == 3 else None
        new, expression = shape, None
        match kind:
            case "bn":
                expression = f"BatchNormalization({x}, {array((c,))}, {array((c,))}, {array((c,))}, {array((c,), 0.2)})"
            case "conv" if length:
                groups = pick([g for g in (1, c) if c % g == 0])
                k, pad = number(1, min(2, length)), number(0, 1)
                n = groups * number(1, 3)
                b = f", {array((n,))}" if pick((False, True)) else ""
                expression = f"Conv<group={groups}, pads=[{pad},0]>({x}, {array((n, c // groups, k))}{b})"
                new = (shape[0], n, length + pad - k + 1)
            case "transposed" if length:
                n = number(1, 3)
                expression, new = f"ConvTranspose({x}, {array((c, n, 2))})", (shape[0], n, length + 1)
            case "gemm" if not length:
                n, t = number(1, 4), number(0, 1)
                expression = f"Gemm<transB={t}, beta=0.5>({x}, {array((n, c) if t else (c, n))}, {array((n,))})"
                new = (shape[0], n)
            case "matmul":
                n = number(1, 4)
                expression, new = f"MatMul({x}, {array((shape[-1], n))})", (*shape[:-1], n)
            case "left" if length:
                n = number(1, 4)
                expression, new = f"MatMul({array((n, c))}, {x})", (shape[0], n, length)
            case "same":
                expression = pick(["Identity", "Dropout"]) + f"({x})"
            case "relu":
                expression = f"Relu({x})"
            case "scale":
                op = pick(["Mul", "Add", "Sub", "Div"])
                constant = array(
                    pick([(c,) + (1,) * (len(shape) - 2), (), shape[-1:], (1, c, 1)[: len(shape)]]),
                    0.3,
                )
                operands = (x, constant) if op == "Div" or pick((False, True)) else (constant, x)
                expression = f"{op}({operands[0]}, {operands[1]})"
            case "transpose" if length:
                expression, new = f"Transpose<perm=[0,2,1]>({x})", (shape[0], length, c)
            case "pool" if length and length > 1:
                include = number(0, 1)
                expression = f"AveragePool<kernel_shape=[2], pads=[{include},0], count_include_pad={include}>({x})"
                new = (*shape[:2], length - 1 + include)
            case "max" if length and length > 1:
                expression, new = f"MaxPool<kernel_shape=[2]>({x})", (*shape[:2], length - 1)
            case "mean" if length:
                keep = number(0, 1)
                axes = f"<axes=[2], keepdims={keep}>({x})" if opset < 18 else f"<keepdims={keep}>({x}, {numbers(-1)})"
                expression, new = "ReduceMean" + axes, (*shape[:2], 1) if keep else shape[:2]
            case "concat":
                fit = [y for y, s in shapes.items() if len(s) == len(shape) and s[0] == shape[0] and s[2:] == shape[2:]]
                y = pick(fit)
                expression, new = f"Concat<axis=1>({x}, {y})", (shape[0], c + shapes[y][1], *shape[2:])
            case "split" if c > 1:
                parts = f"<axis=1, split=[1,{c - 1}]>({x})" if opset < 13 else f"<axis=1>({x}, {numbers(1, c - 1)})"
                code.append(f"{out}, {out}b = Split{parts}")
                shapes[out], shapes[f"{out}b"] = (shape[0], 1, *shape[2:]), (shape[0], c - 1, *shape[2:])
            case "flatten" if length:
                expression, new = f"Flatten({x})", (shape[0], c * length)
            case "reshape" if length:
                new = draw(
                    st.sampled_from(
                        [
                            (shape[0], c * length),
                            (shape[0], length, c),
                            (shape[0], c * length, 1),
                            (shape[0], 1, c * length),
                        ]
                    )
                )
                expression = f"Reshape({x}, {numbers(*new)})"
            case "unsqueeze" if not length:
                axes = f"<axes=[2]>({x})" if opset < 13 else f"({x}, {numbers(2)})"
                expression, new = "Unsqueeze" + axes, (*shape, 1)
            case "slice" if length and length > 1 and opset >= 11:
                expression = f"Slice({x}, {numbers(1)}, {numbers(length)}, {numbers(2)})"
                new = (*shape[:2], length - 1)
            case "pad" if length and opset >= 11:
                mode = pick(["constant", "edge"])
                expression = f'Pad<mode="{mode}">({x}, {numbers(0, 0, 1, 0, 0, 0)})'
                new = (*shape[:2], length + 1)
            case "add":
                fit = [y for y, s in shapes.items() if s == shape]
                expression = f"Add({x}, {pick(fit)})"
        if expression:
            code.append(f"{out} = {expression}")
            shapes[out] = new
    read = " ".join(line.split(" = ")[1] for line in code)
    unread = [
        name for name in shapes if f"({name}," not in read and f", {name})" not in read and f"({name})" not in read
    ]
    outputs = [name for name in shapes if name != "x" and (name in unread or rng.random() < 0.05)]
    assume(outputs and "Norm" in read)
    known = pick((False, True))

    def declare(name):
        dims = shapes[name] if known or name == "x" else [f"d{name}{i}" for i in range(len(shapes[name]))]
        return f"T[{','.join(map(str, dims))}] {name}"

    text = f"({declare('x')}) => ({', '.join(map(declare, outputs))}) {{ {' '.join(code)} }}"
    return text, opset, {k: v if v.ndim else np.float32(v) for k, v in arrays.items()}


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(graphs())
def test_random_graphs(problem):
    text, opset, arrays = problem
    model = build(text, opset=opset, **arrays)
    onnx.checker.check_model(model, full_check=True)
    folded, _ = fold_checked(model)
    assert_same(model, folded, roundings=40)


def test_bfloat16_is_written_as_bfloat16():
    text, weights = conv("Conv", 2, 1, True)
    folded, _ = interop.fold(build(text, dtype="bfloat16", opset=22, **weights))
    assert {numpy_helper.to_array(t).dtype for t in folded.graph.initializer} == {BFLOAT16}


def test_a_large_constant_that_is_no_weight_stays_computed():
    graph = onnx.parser.parse_graph(
        "g (float[1, 2, 300, 300] x) => (float[1, 2, 300, 300] y)"
        "{ c = Conv(x, w)  b = BatchNormalization(c, s, s, s, s)  z = ConstantOfShape(n)  y = Add(b, z) }"
    )
    weights = {"w": np.ones((2, 2, 1, 1), "f4"), "s": np.ones(2, "f4"), "n": np.array([1, 2, 300, 300])}
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    folded, _ = interop.fold(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    assert sorted(node.op_type for node in folded.graph.node) == ["Add", "ConstantOfShape", "Conv"]
