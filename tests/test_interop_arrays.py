"""Arrays by name: paired as told, or as the names and shapes leave no doubt; folded exactly; loaded and saved whole."""

import doctest
import io
import re
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from convolution import conv, conv_transpose, dense
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn.interop import array_files, arrays
from fastbn.interop.report import FOLDED, LEFT

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}


def norm(name, channels, *, seed=0, dtype="float32", keras=False, separator="."):
    """A BatchNorm's arrays, none of them special."""
    rng = np.random.default_rng([seed, channels])
    names = ("gamma", "beta", "moving_mean", "moving_variance") if keras else (
        "weight", "bias", "running_mean", "running_var")  # fmt: skip
    values = (
        rng.normal(size=channels),
        rng.normal(size=channels),
        rng.normal(size=channels),
        rng.uniform(0.5, 2, channels),
    )
    state = {f"{name}{separator}{key}": value.astype(dtype) for key, value in zip(names, values, strict=True)}
    return state if keras else state | {f"{name}{separator}num_batches_tracked": np.array(7)}


def weight(name, *shape, seed=0, dtype="float32", leaf="weight", bias=None):
    rng = np.random.default_rng([seed, *shape])
    state = {f"{name}.{leaf}": rng.normal(size=shape).astype(dtype)}
    return state if bias is None else state | {f"{name}.bias": rng.normal(size=bias).astype(dtype)}


def params(state, name, eps=1e-5):
    keys = ("weight", "bias", "running_mean", "running_var")
    if f"{name}.gamma" in state:
        keys = ("gamma", "beta", "moving_mean", "moving_variance")
    return fastbn.BatchNormParams(*(state.get(f"{name}.{key}") for key in keys), eps)


def batch_norm(x, bn):
    """The formula in float64, over axis 1."""
    gamma, beta, mean, var = (
        np.asarray(v).astype(np.float64).reshape(-1, *(1 for _ in x.shape[2:])) for v in bn[:4]
    )  # fmt: skip
    return gamma * (x - mean) / np.sqrt(var + bn.eps) + beta


def actions(report):
    return {decision.node: decision.action for decision in report}


CONV1 = {**weight("conv1", 6, 3, 3, 3), **norm("bn1", 6)}


# ---- folding -----------------------------------------------------------------------------------------------


class TestFold:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("bias", [None, 6])
    @pytest.mark.parametrize("shape", [(6, 5), (6, 2, 3), (6, 2, 3, 3), (6, 2, 1, 2, 3)], ids=str)
    def test_behind_a_layer_it_is_fold_linear_and_fold_conv(self, shape, bias, dtype):
        state = {**weight("block.fc", *shape, bias=bias, dtype=dtype), **norm("block.bn", 6, dtype=dtype)}
        new, report = arrays.fold(state, {"block.bn": "block.fc"}, transposed=())
        fold = fastbn.fold_linear if len(shape) == 2 else fastbn.fold_conv
        expected = fold(state["block.fc.weight"], state.get("block.fc.bias"), params(state, "block.bn"))
        assert new.keys() == {"block.fc.weight", "block.fc.bias"}
        for name, array in ("weight", expected.weight), ("bias", expected.bias):
            got = new[f"block.fc.{name}"]
            assert got.dtype == dtype
            assert got.tobytes() == array.tobytes()
        assert report.decisions[0].changes == (expected.report,)
        assert (report.nodes_before, report.nodes_after) == (len(state), 2)
        assert report.parameters_before == np.prod(shape) + (bias or 0) + 24
        assert report.parameters_after == np.prod(shape) + 6

    def test_the_argument_stays_and_shares_nothing(self):
        state = {**CONV1, "other": np.arange(3), "flag": np.array(True)}
        before = {name: array.copy() for name, array in state.items()}
        new, _ = arrays.fold(state, {"bn1": "conv1"}, transposed=())
        assert state.keys() == before.keys()
        for name, array in state.items():
            assert array.tobytes() == before[name].tobytes()
            assert not any(np.shares_memory(array, other) for other in new.values())
        assert list(new) == ["conv1.weight", "conv1.bias", "other", "flag"]
        assert new["other"].dtype == state["other"].dtype
        assert new["flag"].shape == ()

    def test_before_a_layer(self):
        state = {**norm("bn0", 5), **weight("fc", 4, 5, bias=4)}
        new, report = arrays.fold(state, before={"bn0": "fc"})
        expected = fastbn.fold_into_linear(params(state, "bn0"), state["fc.weight"], state["fc.bias"])
        assert new.keys() == {"fc.weight", "fc.bias"}
        assert new["fc.weight"].tobytes() == expected.weight.tobytes()
        assert new["fc.bias"].tobytes() == expected.bias.tobytes()
        assert report.decisions[0].into == ("fc",)

    def test_before_several_layers_all_or_none(self):
        state = {**norm("bn0", 4), **weight("q", 3, 4), **weight("k", 2, 4, 1, 1)}
        new, report = arrays.fold(state, before={"bn0": ["q", "k"]}, transposed=())
        assert report.decisions[0].into == ("q", "k")
        assert new.keys() == {"q.weight", "q.bias", "k.weight", "k.bias"}
        state |= weight("k", 2, 4, 3, 3)
        new, report = arrays.fold(state, before={"bn0": ["q", "k"]}, transposed=())
        assert actions(report) == {"bn0": LEFT}
        assert new["q.weight"].tobytes() == state["q.weight"].tobytes()
        assert "q.bias" not in new

    def test_a_layer_between_two(self):
        """Both are exact until one rounding: what float64 gives, within half an ulp."""
        state = {**norm("bn0", 5, seed=1), **weight("fc", 4, 5, bias=4), **norm("bn1", 4, seed=2)}
        new, report = arrays.fold(state, {"bn1": "fc"}, before={"bn0": "fc"})
        assert actions(report) == {"bn0": FOLDED, "bn1": FOLDED}
        wide = {name: array.astype(np.float64) for name, array in state.items()}
        first = fastbn.fold_into_linear(params(wide, "bn0"), wide["fc.weight"], wide["fc.bias"])
        exact = fastbn.fold_linear(first.weight, first.bias, params(wide, "bn1"))
        np.testing.assert_allclose(new["fc.weight"], exact.weight, rtol=0.51 * EPS["float32"], atol=0)
        np.testing.assert_allclose(new["fc.bias"], exact.bias, rtol=0.51 * EPS["float32"], atol=1e-12)

    def test_padding_stops_a_shift_unless_it_is_known_that_there_is_none(self):
        state = {**norm("bn0", 4), **weight("conv", 2, 4, 3, 3)}
        _, report = arrays.fold(state, before={"bn0": "conv"}, transposed=())
        assert "may pad with zeros" in report.decisions[0].reason
        new, report = arrays.fold(state, before={"bn0": "conv"}, transposed=(), unpadded=["conv"])
        assert actions(report) == {"bn0": FOLDED}
        expected = fastbn.fold_into_conv(params(state, "bn0"), state["conv.weight"], None)
        assert new["conv.weight"].tobytes() == expected.weight.tobytes()
        state["bn0.bias"], state["bn0.running_mean"] = np.zeros((2, 4), np.float32)
        assert actions(arrays.fold(state, before={"bn0": "conv"}, transposed=())[1]) == {"bn0": FOLDED}

    def test_grouped_layer_behind(self):
        state = {**norm("bn0", 6), **weight("conv", 4, 3, 1)}
        new, _ = arrays.fold(state, before={"bn0": "conv"}, transposed=())
        expected = fastbn.fold_into_conv(params(state, "bn0"), state["conv.weight"], None, groups=2)
        assert new["conv.weight"].tobytes() == expected.weight.tobytes()

    def test_transposed_has_no_place_for_a_map_before_it(self):
        state = {**norm("bn0", 4), **weight("up", 4, 2, 1)}
        _, report = arrays.fold(state, before={"bn0": "up"}, transposed=["up"])
        assert "transposed" in report.decisions[0].reason
        assert actions(report) == {"bn0": LEFT}

    def test_several_eps_in_several_calls(self):
        state = {**CONV1, **weight("conv2", 4, 6, 1), **norm("bn2", 4)}
        once, _ = arrays.fold(state, {"bn1": "conv1"}, transposed=(), eps=1e-3)
        twice, report = arrays.fold(once, {"bn2": "conv2"}, transposed=(), eps=0.5)
        assert "eps 0.5" in report.decisions[0].reason
        assert "by default" not in report.decisions[0].reason
        for i, eps in ("1", 1e-3), ("2", 0.5):
            expected = fastbn.fold_conv(state[f"conv{i}.weight"], None, params(state, f"bn{i}", eps))
            assert twice[f"conv{i}.weight"].tobytes() == expected.weight.tobytes()

    def test_metadata_comes_along(self):
        state = arrays.State(CONV1)
        state.metadata = {"format": "pt"}
        assert arrays.fold(state, {"bn1": "conv1"}, transposed=())[0].metadata == {"format": "pt"}

    def test_nothing_to_fold(self):
        new, report = arrays.fold(weight("conv", 3, 2, 1))
        assert len(report) == 0
        assert new.keys() == {"conv.weight"}


class TestLayouts:
    @given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3))
    def test_transposed_with_the_groups_that_fit(self, groups, n_in, n_out, ndim):
        shape = (groups * n_in, n_out, *(2, 3, 1)[: max(1, ndim)])
        state = {**weight("up", *shape), **norm("bn", groups * n_out)}
        new, report = arrays.fold(state, {"bn": "up"}, transposed=["up"])
        expected = fastbn.fold_conv(state["up.weight"], None, params(state, "bn"), groups=groups, transposed=True)
        assert new["up.weight"].tobytes() == expected.weight.tobytes()
        assert f"up transposed, {groups} groups" in report.decisions[0].reason

    def test_what_only_a_transposed_one_fits_is_one(self):
        state = {**weight("up", 8, 3, 2, 2), **norm("bn", 3)}
        new, report = arrays.fold(state, {"bn": "up"})
        expected = fastbn.fold_conv(state["up.weight"], None, params(state, "bn"), transposed=True)
        assert new["up.weight"].tobytes() == expected.weight.tobytes()
        assert "up transposed, 1 groups" in report.decisions[0].reason

    @pytest.mark.parametrize("shape", [(6, 6, 2), (6, 3, 2, 2), (6, 2, 1)], ids=str)
    def test_what_fits_both_is_taken_as_not_transposed_and_said_to_be(self, shape):
        state = {**weight("c", *shape), **norm("bn", 6)}
        weights = []
        for said in None, (), ["c"]:
            new, report = arrays.fold(state, {"bn": "c"}, transposed=said)
            weights.append(new["c.weight"].tobytes())
            assumed = "c taken as a convolution that is not transposed" in report.decisions[0].reason
            assert assumed == (said is None)
        assert weights[0] == weights[1] != weights[2]

    @pytest.mark.parametrize(
        "name",
        ["deconv1", "up", "dec.up2.0", "upconv1", "UpSample.conv", "conv_transpose", "ConvTranspose2d_3", "transpose1",
         "net.convT", "conv_tr2", "tconv1", "t_conv", "decoder.0", "trans_conv"],
    )  # fmt: skip
    def test_a_name_that_hints_at_a_transposed_one_leaves_what_fits_both(self, name):
        state = {**weight(name, 6, 6, 2, 2), **norm("bn", 6)}
        new, report = arrays.fold(state, {"bn": name})
        assert actions(report) == {"bn": LEFT}
        assert new.keys() == state.keys()
        assert "transposed= (--transposed)" in report.decisions[0].reason
        plain, as_said = (arrays.fold(state, {"bn": name}, transposed=said) for said in ((), [name]))
        assert actions(plain[1]) == actions(as_said[1]) == {"bn": FOLDED}
        assert plain[0][f"{name}.weight"].tobytes() != as_said[0][f"{name}.weight"].tobytes()

    @pytest.mark.parametrize("name", ["conv1", "first_conv", "group.conv", "layer1.0.conv2", "transition.conv"])
    def test_other_names_do_not(self, name):
        assert actions(arrays.fold({**weight(name, 6, 6, 2, 2), **norm("bn", 6)}, {"bn": name})[1]) == {"bn": FOLDED}

    def test_a_name_like_that_of_a_transposed_one(self):
        """Of a generator: 0 can only be transposed, so 3 may be."""
        state = {**weight("g.3", 4, 4, 4, 4), **norm("g.4", 4), **weight("g.0", 10, 4, 4, 4), **norm("g.1", 4)}
        state |= {**weight("conv", 4, 4, 3, 3), **norm("bn", 4)}
        _, report = arrays.fold(state)
        assert actions(report) == {"g.4": LEFT, "g.1": FOLDED, "bn": FOLDED}
        assert "its name is like that of a transposed convolution" in report.decisions[0].reason

    def test_a_name_is_not_asked_where_the_shape_tells(self):
        state = {**weight("up", 6, 5, 3, 3), **norm("bn", 6)}
        assert actions(arrays.fold(state, {"bn": "up"})[1]) == {"bn": FOLDED}

    def test_a_kernel_before_which_it_stands_that_may_be_depthwise(self):
        state = {**norm("bn", 4, keras=True), **weight("conv", 1, 1, 4, 2, leaf="kernel")}
        _, report = arrays.fold(state, before={"bn": "conv"}, eps=1e-3, transposed=())
        assert actions(report) == {"bn": LEFT}
        assert "HWIO or HWIM: say which by layouts= (--layouts)" in report.decisions[0].reason
        for layout in "HWIO", "HWIM":
            _, report = arrays.fold(state, before={"bn": "conv"}, eps=1e-3, transposed=(), layouts={"conv": layout})
            assert actions(report) == {"bn": FOLDED}

    def test_depthwise_is_the_same_either_way(self):
        state = {**weight("c", 6, 1, 3, 3), **norm("bn", 6)}
        results = [arrays.fold(state, {"bn": "c"}, transposed=said)[0] for said in (None, (), ["c"])]
        assert len({result["c.weight"].tobytes() for result in results}) == 1

    @pytest.mark.parametrize(
        ("shape", "channels", "layout"),
        [((5, 4), 4, "IO"), ((3, 2, 4), 4, "DIO"), ((3, 3, 2, 4), 4, "HWIO"), ((3, 3, 2, 4), 8, "HWIM")],
    )
    def test_kernels_lie_as_keras_has_them(self, shape, channels, layout):
        state = {**weight("conv", *shape, leaf="kernel"), **norm("bn", channels, keras=True)}
        new, _ = arrays.fold(state, {"bn": "conv"}, eps=1e-3, transposed=())
        fold = fastbn.fold_linear if len(shape) == 2 else fastbn.fold_conv
        expected = fold(state["conv.kernel"], None, params(state, "bn", 1e-3), layout=layout)
        assert new["conv.kernel"].tobytes() == expected.weight.tobytes()
        assert new["conv.bias"].tobytes() == expected.bias.tobytes()

    def test_transposed_kernels(self):
        state = {**weight("up", 3, 3, 4, 2, leaf="kernel"), **norm("bn", 4, keras=True)}
        new, _ = arrays.fold(state, {"bn": "up"}, eps=1e-3)
        expected = fastbn.fold_conv(state["up.kernel"], None, params(state, "bn", 1e-3), layout="HWOI", transposed=True)
        assert new["up.kernel"].tobytes() == expected.weight.tobytes()

    def test_layouts_given(self):
        state = {**weight("conv", 3, 3, 2, 4), **norm("bn", 4)}
        new, _ = arrays.fold(state, {"bn": "conv"}, layouts={"conv": "HWIO"}, transposed=())
        expected = fastbn.fold_conv(state["conv.weight"], None, params(state, "bn"), layout="HWIO")
        assert new["conv.weight"].tobytes() == expected.weight.tobytes()

    @pytest.mark.parametrize("layout", ["HWIO", "HWXO", "HHIO"])
    def test_layouts_refused(self, layout):
        state = {**weight("conv", 3, 2, 4), **norm("bn", 4)}
        with pytest.raises(ValueError, match="layouts: expected"):
            arrays.fold(state, {"bn": "conv"}, layouts={"conv": layout}, transposed=())


class TestLeft:
    """What must not be folded, with the reason."""

    def reason(self, state, *args, **options):
        new, report = arrays.fold(state, *args, **options)
        assert actions(report) == {"bn1": LEFT}
        assert new.keys() == state.keys()
        assert all(new[name].tobytes() == state[name].tobytes() for name in state)
        return report.decisions[0].reason

    def test_a_weight_under_two_names(self):
        state = CONV1 | {"tied.weight": CONV1["conv1.weight"]}
        assert "its weight is tied.weight too" in self.reason(state, {"bn1": "conv1"}, transposed=())

    def test_a_weight_of_integers(self):
        state = CONV1 | {"conv1.weight": np.ones((6, 3, 3, 3), np.int8)}
        assert "its weight is int8" in self.reason(state, {"bn1": "conv1"}, transposed=())

    def test_a_bias_of_another_dtype(self):
        state = CONV1 | {"conv1.bias": np.ones(6)}
        assert "its weight is float32, its bias float64" in self.reason(state, {"bn1": "conv1"}, transposed=())

    def test_weights_that_would_overflow(self):
        state = {name: a.astype(np.float16) for name, a in CONV1.items()}
        state |= {"conv1.weight": np.full((6, 3, 3, 3), 6e4, np.float16), "bn1.weight": np.full(6, 9, np.float16)}
        assert "its weights cannot hold it" in self.reason(state, {"bn1": "conv1"}, transposed=())

    def test_a_batch_norm_in_no_pair(self):
        assert self.reason(CONV1, {}) == "no pair names it"


class TestRefused:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"pairs": {"bn9": "conv1"}}, r"pairs: expected the name of a BatchNorm (bn1), got 'bn9'"),
            ({"pairs": {"bn1": "conv9"}}, r"pairs: expected the name of a layer (conv1), got 'conv9'"),
            ({"before": {"bn1": "conv9"}}, r"before: expected the name of a layer (conv1), got 'conv9'"),
            ({"pairs": {"bn1": "bn1"}}, r"pairs: expected the name of a layer"),
            ({"pairs": "infer"}, "pairs: expected a mapping or None, got 'infer'"),
            ({"pairs": {"bn1": "conv1"}, "before": {"bn1": "conv1"}}, "before: expected BatchNorms that are not in"),
            ({"pairs": {"bn1": "conv1"}, "transposed": ["up"]}, "transposed: expected names of layers (conv1), got"),
            ({"pairs": {"bn1": "conv1"}, "transposed": "conv1"}, "transposed: expected names of layers"),
            ({"pairs": {"bn1": "conv1"}, "unpadded": ["up"]}, "unpadded: expected names of layers"),
            ({"pairs": {"bn1": "conv1"}, "eps": -1.0}, "bn1: eps: expected"),
        ],
    )  # fmt: skip
    def test_arguments(self, arguments, message):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            arrays.fold(CONV1, **{"transposed": (), **arguments})

    def test_two_behind_one_layer(self):
        with pytest.raises(ValueError, match="pairs: expected one BatchNorm for conv1, got 2"):
            arrays.fold(CONV1 | norm("bn2", 6), {"bn1": "conv1", "bn2": "conv1"}, transposed=())

    @pytest.mark.parametrize(("key", "value"), [("running_var", np.nan), ("running_var", -1.0), ("weight", np.inf)])
    def test_parameters_that_are_none(self, key, value):
        state = CONV1 | {f"bn1.{key}": np.full(6, value, np.float32)}
        with pytest.raises(ValueError, match="bn1: "):
            arrays.fold(state, {"bn1": "conv1"}, transposed=())

    def test_a_variance_that_eps_saves(self):
        state = CONV1 | {"bn1.running_var": np.full(6, -1e-5, np.float32)}
        arrays.fold(state, {"bn1": "conv1"}, transposed=(), eps=1e-3)

    @pytest.mark.parametrize("missing", ["running_mean", "running_var"])
    def test_half_of_the_statistics(self, missing):
        state = {name: array for name, array in CONV1.items() if not name.endswith(missing)}
        with pytest.raises(ValueError, match="bn1: expected running_mean and running_var, got bn1.running_"):
            arrays.fold(state, {"bn1": "conv1"}, transposed=())

    def test_channels_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"conv1: expected channels that fit the weight .*, got 5 of bn2"):
            arrays.fold(CONV1 | norm("bn2", 5), {"bn2": "conv1"})

    def test_the_halves_of_a_separable_convolution(self):
        """The BatchNorm stands behind the second, and the bias, if there is one, has the name of both."""
        state = {"sep/depthwise_kernel": np.ones((3, 3, 4, 1)), "sep/pointwise_kernel": np.ones((1, 1, 4, 4))}
        state |= {"bn/moving_mean": np.ones(4), "bn/moving_variance": np.ones(4)}
        for name in "sep", "sep/pointwise":
            with pytest.raises(ValueError, match=f"pairs: expected the name of a layer \\(none\\), got '{name}'"):
                arrays.fold(state, {"bn": name}, eps=1e-3, transposed=())

    def test_depthwise_kernels_of_keras_2(self):
        state = {
            "dw/depthwise_kernel": np.ones((3, 3, 4, 2)),
            "bn/moving_mean": np.ones(8),
            "bn/moving_variance": np.ones(8),
        }
        new, _ = arrays.fold(state, {"bn": "dw"}, eps=3.0, transposed=())
        assert new["dw/depthwise_kernel"].tolist() == np.full((3, 3, 4, 2), 0.5).tolist()
        assert new["dw/bias"].tolist() == [-0.5] * 8

    def test_groups_that_do_not_fit(self):
        with pytest.raises(ValueError, match=r"conv: expected channels that fit the weight \(4, 3, 1\), got 9 of bn0"):
            arrays.fold({**norm("bn0", 9), **weight("conv", 4, 3, 1)}, before={"bn0": "conv"}, transposed=())

    def test_a_bias_that_does_not_fit(self):
        with pytest.raises(ValueError, match=r"conv1.bias: expected shape \(6,\), got \(5,\)"):
            arrays.fold(CONV1 | {"conv1.bias": np.ones(5, np.float32)}, {"bn1": "conv1"}, transposed=())

    def test_parameters_of_other_shapes(self):
        with pytest.raises(ValueError, match="bn1: "):
            arrays.fold(CONV1 | {"bn1.weight": np.ones(5, np.float32)}, {"bn1": "conv1"}, transposed=())

    def test_two_arrays_for_one_purpose(self):
        with pytest.raises(ValueError, match="bn1: expected one array for one purpose, got bn1.weight and bn1.gamma"):
            arrays.fold(CONV1 | {"bn1.gamma": np.ones(6)}, {"bn1": "conv1"}, transposed=())

    def test_two_arrays_of_almost_one_name(self):
        with pytest.raises(ValueError, match="bn1: expected one array for one purpose, got bn1.bias and bn1_bias"):
            arrays.fold(CONV1 | {"bn1_bias": np.ones(6)}, {"bn1": "conv1"}, transposed=())

    def test_a_layer_without_weights_is_none(self):
        with pytest.raises(ValueError, match="pairs: expected the name of a layer"):
            arrays.fold(CONV1 | {"no.weight": np.ones((6, 0))}, {"bn1": "no"}, transposed=())

    def test_eps_of_keras(self):
        state = {**weight("conv", 3, 2, 6, leaf="kernel"), **norm("bn", 6, keras=True)}
        for pairs in {"bn": "conv"}, None:
            with pytest.raises(ValueError, match=r"eps: expected a number for bn, .*eps=1e-3, --eps 1e-3"):
                arrays.fold(state, pairs, transposed=())

    @pytest.mark.parametrize("state", [{"a": [1.0]}, {3: np.ones(2)}])
    def test_other_things_than_names_and_arrays(self, state):
        with pytest.raises(TypeError, match="state: expected names and ndarrays"):
            arrays.fold(state)


# ---- pairs from names --------------------------------------------------------------------------------------


def inferred(*layers, listed="layer first", **options):
    """Fold square layers and BatchNorms with the names (BatchNorm, layer); return the layer of each BatchNorm."""
    state = {}
    for bn, layer in layers:
        parts = weight(layer, 4, 4, 1) if layer else {}, norm(bn, 4) if bn else {}
        for part in parts if listed == "layer first" else reversed(parts):
            state |= part
    if listed == "sorted":
        state = dict(sorted(state.items()))
    _, report = arrays.fold(state, transposed=(), **options)
    assert all("inferred from the names" in d.reason for d in report)
    return {d.node: d.into[0] if d.action == FOLDED else None for d in report}


class TestInferred:
    @pytest.mark.parametrize(
        ("bn", "layer"),
        [
            ("bn1", "conv1"), ("a.bn2", "a.conv2"), ("norm", "conv"), ("fc_bn", "fc"), ("bn_conv1", "conv1"),
            ("conv1_BN", "conv1"), ("conv1_bn", "conv1_conv"), ("bn3", "linear3"), ("stem.norm", "stem.proj"),
            ("features.1", "features.0"), ("layer1.0.downsample.1", "layer1.0.downsample.0"), ("x/bn", "x/conv"),
            ("batchnorm1", "conv1"), ("batch_norm1", "fc1"), ("10", "9"),
        ],
    )  # fmt: skip
    def test_names(self, bn, layer):
        state = {**weight(layer, 4, 4, 1), **norm(bn, 4)}
        _, report = arrays.fold(state)
        assert report.decisions[0].into == (layer,)
        assert "inferred from the names" in report.decisions[0].reason
        assert "eps 1e-05 by default" in report.decisions[0].reason

    @pytest.mark.parametrize(
        ("bn", "layer"),
        [
            ("bn1", "conv2"), ("a.bn1", "conv1"), ("a.bn1", "b.conv1"), ("features.2", "features.0"),
            ("features.0", "features.1"), ("batch_normalization_3", "conv2d_3"), ("subnormal1", "subconv1"), ("x", "y"),
            ("bn", "bn2.conv"),
        ],
    )  # fmt: skip
    def test_names_that_say_nothing(self, bn, layer):
        assert inferred((bn, layer)) == {bn: None}

    def test_two_layers_for_one(self):
        assert inferred(("bn1", "conv1"), (None, "fc1")) == {"bn1": None}

    def test_two_for_one_layer(self):
        assert inferred(("bn1", "conv1"), ("conv1_bn", None)) == {"bn1": None, "conv1_bn": None}

    def test_channels_that_contradict_a_rule_once_void_it(self):
        """Of DenseNet: normN stands before convN, and has as many channels as convN gives only by chance."""
        state = {**weight("a.conv1", 4, 4, 1), **norm("a.norm1", 4), **weight("b.conv1", 4, 8, 1), **norm("b.norm1", 8)}
        state |= {**weight("fc", 3, 4), **norm("fc_bn", 3)}
        _, report = arrays.fold(state, transposed=())
        assert actions(report) == {"a.norm1": LEFT, "b.norm1": LEFT, "fc_bn": FOLDED}
        assert "b.norm1 has 8 channels, b.conv1 a weight (4, 8, 1)" in report.decisions[0].reason

    def test_listed_before_its_layer(self):
        """Modules are mostly listed as they run; a sorted file lists nothing."""
        assert inferred(("conv1_bn", "conv1"), ("c2_bn", "c2")) == {"conv1_bn": "conv1", "c2_bn": "c2"}
        assert inferred(("conv1_bn", "conv1"), ("c2_bn", "c2"), listed="norm first") == {
            "conv1_bn": None,
            "c2_bn": None,
        }
        assert inferred(("bn1", "conv1"), ("bn2", "conv2"), listed="sorted") == {"bn1": "conv1", "bn2": "conv2"}

    def test_layers_that_take_nothing(self):
        """What is left although its pair was found says how that was found, too."""
        state = CONV1 | {"tied.weight": CONV1["conv1.weight"]}
        _, report = arrays.fold(state)
        assert report.decisions[0].reason.endswith("tied.weight too; the pair inferred from the names")

    @pytest.mark.parametrize("arguments", [{"pairs": {}}, {"before": {"bn0": "fc"}}, {"pairs": {"bn0": "fc"}}])
    def test_nothing_is_inferred_where_something_is_said(self, arguments):
        state = CONV1 | {**norm("bn0", 4), **weight("fc", 4, 4)}
        _, report = arrays.fold(state, **arguments)
        assert {d.node: d.reason for d in report}["bn1"] == "no pair names it"

    def test_patches_infer_alike(self):
        [(name, _, before, after)] = arrays.patches(CONV1, arrays.fold(CONV1)[0])
        assert name == "conv1"
        assert np.abs(before - after).max() <= 30 * EPS["float32"] * np.abs(before).max()


# ---- patches -----------------------------------------------------------------------------------------------


def layers():
    """A layer of each kind, the options, and the layer by its definition: (state, options, name, x, f(x))."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(2, 4, 5, 5))
    plain = {**weight("l", 6, 4, 3, 3, bias=6), **norm("bn", 6)}
    yield plain, {"pairs": {"bn": "l"}, "transposed": ()}, x, lambda s, x: conv(x, s["l.weight"], s.get("l.bias"))
    grouped = {**weight("l", 6, 2, 3, 3), **norm("bn", 6)}
    yield (
        grouped,
        {"pairs": {"bn": "l"}, "transposed": ()},
        x,
        lambda s, x: conv(x, s["l.weight"], s.get("l.bias"), groups=2),
    )
    up = {**weight("l", 4, 3, 2, 2), **norm("bn", 6)}
    yield (
        up,
        {"pairs": {"bn": "l"}, "transposed": ["l"]},
        x,
        lambda s, x: conv_transpose(x, s["l.weight"], s.get("l.bias"), groups=2),
    )
    linear = {**weight("l", 6, 4), **norm("bn", 6)}
    yield linear, {"pairs": {"bn": "l"}}, x[..., 0, 0], lambda s, x: dense(x, s["l.weight"], s.get("l.bias"))
    first = {**weight("l", 6, 2, 3, 3), **norm("bn", 4)}
    yield (
        first,
        {"before": {"bn": "l"}, "transposed": (), "unpadded": ["l"]},
        x,
        lambda s, x: conv(x, s["l.weight"], s.get("l.bias"), groups=2),
    )


@pytest.mark.parametrize("case", list(layers()))
def test_folded_layers_do_what_layer_and_batch_norm_did(case):
    state, options, x, run = case
    state = {name: array.astype(np.float64) for name, array in state.items()}
    new, _ = arrays.fold(state, **options)
    y = (
        run(state, batch_norm(x, params(state, "bn")))
        if "before" in options
        else batch_norm(run(state, x), params(state, "bn"))
    )
    got = run(new, x)
    assert np.abs(got - y).max() <= 100 * EPS["float64"] * np.abs(y).max()


@pytest.mark.parametrize("case", list(layers()))
def test_patches_agree_where_the_fold_is_right_and_differ_where_it_is_not(case):
    state, options, *_ = case
    new, _ = arrays.fold(state, **options)
    [(name, dtype, before, after)] = arrays.patches(state, new, **options)
    assert (name, dtype) == ("l", "float32")
    assert before.shape == after.shape == (16, 6)
    assert np.abs(before - after).max() <= 30 * EPS["float32"] * np.abs(before).max()
    for key in ("l.weight", "l.bias"):
        wrong = dict(new)
        wrong[key] = new[key] + np.float32(0.01)
        [(_, _, before, after)] = arrays.patches(state, wrong, **options)
        assert np.abs(before - after).max() > 1000 * EPS["float32"] * np.abs(before).max()
    assert list(arrays.patches(state, state, **options)) == []  # nothing is gone


def test_docstrings():
    results = doctest.testmod(arrays)
    assert results.attempted >= 5
    assert results.failed == 0


# ---- files -------------------------------------------------------------------------------------------------


def file(suffix, folder):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    if suffix in (".pt", ".pth"):
        pytest.importorskip("torch")
    return folder / f"state{suffix}"


@pytest.mark.parametrize("suffix", array_files.SUFFIXES)
class TestFiles:
    def test_there_and_back(self, suffix, tmp_path):
        path = file(suffix, tmp_path)
        half = np.arange(6, dtype=np.float16).reshape(2, 3).T
        state = {**CONV1, "file": np.ones(2), "a/b": np.arange(3), "half": half, "empty": np.ones((0, 2)),
                 "flag": np.array(True)}  # fmt: skip
        if suffix != ".npz":
            state["brain"] = np.array([1.5, -2], BFLOAT16)
        arrays.save(state, path)
        again = arrays.load(path)
        assert again.keys() == state.keys()
        for name, array in state.items():
            assert again[name].dtype == array.dtype
            assert again[name].shape == array.shape
            assert again[name].tobytes() == array.tobytes()

    def test_garbage_and_parts_are_refused(self, suffix, tmp_path):
        path = file(suffix, tmp_path)
        arrays.save(CONV1, path)
        whole = path.read_bytes()
        for content in (b"", b"garbage" * 9, whole[: len(whole) // 2], whole[:-1], whole[: len(whole) - 30]):
            path.write_bytes(content)
            with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: expected"):
                arrays.load(path)

    def test_no_such_file(self, suffix, tmp_path):
        with pytest.raises(FileNotFoundError):
            arrays.load(file(suffix, tmp_path))

    def test_no_such_folder(self, suffix, tmp_path):
        path = file(suffix, tmp_path / "none")
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
            arrays.save(CONV1, path)


def test_every_byte_counts(tmp_path):
    """A changed byte in the arrays of an .npz is noticed."""
    path = tmp_path / "a.npz"
    arrays.save(CONV1, path)
    content = bytearray(path.read_bytes())
    at = content.index(CONV1["conv1.weight"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        arrays.load(path)


def test_objects_are_not_loaded(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        arrays.load(path)


def test_members_that_are_no_arrays(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="readme.txt is no array"):
        arrays.load(path)


def test_absurd_sizes_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", header.getvalue() + b"1234")
    with pytest.raises(ValueError, match="a.npz: expected an .npz file"):
        arrays.load(path)


def test_bombs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros(1 << 20))
    assert arrays.load(path)["a"].size == 1 << 20
    monkeypatch.setattr(array_files, "LARGEST_SMALL", 1 << 20)
    with pytest.raises(ValueError, match="would grow to"):
        arrays.load(path)


def test_npz_refuses_what_it_would_forget(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(ValueError, match="expected dtypes that .npz can hold, got bfloat16 in a"):
        arrays.save({"a": np.ones(2, BFLOAT16)}, path)
    assert not path.exists()


def test_safetensors_keeps_its_metadata(tmp_path):
    path = file(".safetensors", tmp_path)
    state = arrays.State(CONV1)
    state.metadata = {"format": "pt", "author": "someone"}
    arrays.save(state, path)
    assert arrays.load(path).metadata == state.metadata
    arrays.save(CONV1, path)
    assert arrays.load(path).metadata is None


def test_checkpoints_with_a_state_dict_inside_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save({"epoch": 3, "optimizer": {}, "state_dict": {"a": torch.ones(2)}}, path)
    with pytest.raises(
        ValueError, match="a.pt: expected a state dict, got a checkpoint with one in it: .*'state_dict'"
    ):
        arrays.load(path)


def test_tied_tensors_of_a_state_dict_are_noticed(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    one = torch.nn.Linear(3, 4)
    model = torch.nn.ModuleDict({"fc": one, "again": one, "bn": torch.nn.BatchNorm1d(4)})
    torch.save(model.state_dict(), path)
    _, report = arrays.fold(arrays.load(path), {"bn": "fc"})
    assert "its weight is again.weight too" in report.decisions[0].reason


@pytest.mark.parametrize("function", [arrays.load, lambda path: arrays.save({}, path)])
def test_other_suffixes(function):
    with pytest.raises(ValueError, match="model.bin: expected a suffix of .npz, .safetensors, .pt, .pth, got '.bin'"):
        function("model.bin")


def test_missing_safetensors_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs safetensors: pip install "fastbn\[safetensors\]"'):
        arrays.save(CONV1, tmp_path / "a.safetensors")
