"""fastbn.interop.sklearn: StandardScaler's interface over exact statistics, perceptrons with batch normalisation."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import run_python
from reference import U32, U64, WIDE
from strategies import FLOAT16, FLOAT32, FLOAT64, numbers, places

pytest.importorskip("sklearn")
from scipy import sparse
from scipy.special import expit, softmax
from sklearn import datasets
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastbn import nn
from fastbn.interop import sklearn_training
from fastbn.interop.sklearn import BatchNormMLPClassifier, BatchNormMLPRegressor, Standardizer

quick = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@quick
@parametrize_with_checks([Standardizer(), BatchNormMLPClassifier(), BatchNormMLPRegressor()])
def test_the_checks_of_scikit_learn_hold(estimator, check):
    check(estimator)


def test_the_tags_say_what_the_estimators_can():
    """They decide which of the checks above there are."""
    assert get_tags(Standardizer()).input_tags.allow_nan
    assert get_tags(Standardizer()).transformer_tags.preserves_dtype == ["float64", "float32", "float16"]
    assert get_tags(BatchNormMLPClassifier()).classifier_tags.multi_label
    assert get_tags(BatchNormMLPRegressor()).target_tags.multi_output
    assert not get_tags(BatchNormMLPClassifier()).classifier_tags.poor_score
    assert not get_tags(BatchNormMLPRegressor()).regressor_tags.poor_score


def test_without_scikit_learn_the_error_says_what_to_install():
    process = run_python("import sys; sys.modules['sklearn'] = None; import fastbn.interop.sklearn", check=False)
    expected = 'ModuleNotFoundError: fastbn.interop.sklearn needs scikit-learn: pip install "fastbn[sklearn]"'
    assert process.stderr.strip().splitlines()[-1] == expected


# ---- Standardizer: against an oracle -----------------------------------------------------------------------------


def oracle(x, weights=None):
    """Return mean, var and z of the columns in WIDE; NaN does not count."""
    wide = x.astype(np.float64).astype(WIDE)
    w = np.where(np.isnan(wide), 0, np.ones(len(x), WIDE)[:, None] if weights is None else weights[:, None])
    n = w.sum(axis=0)
    centre = wide[0]
    centre = np.where(np.isnan(centre), 0, centre)
    first = np.where(w > 0, w * (wide - centre), 0).sum(axis=0) / n  # a sum of differences, then of what is left
    d = (wide - centre) - first
    rest = np.where(w > 0, w * d, 0).sum(axis=0) / n
    var = np.where(w > 0, w * (d - rest) ** 2, 0).sum(axis=0) / n
    std = np.sqrt(np.where(var > 0, var, 1))
    return centre + first + rest, var, (d - rest) / std


def bound(dtype, mean, var, z):
    """Return the bound that batch normalisation has, for γ = 1, β = 0 (the half type: and half a unit of z)."""
    std = np.sqrt(np.where(var > 0, var, 1))
    most = np.nanmax(np.abs(z), axis=0)
    if dtype == FLOAT64:
        return 32 * U64 * (1 + most + np.abs(mean) / std)
    half = np.ldexp(np.maximum(most, 2**-14), -11) if dtype == FLOAT16 else 0  # 11 bits, from 2**-14 on
    return 4 * U32 * (1 + most) + half


DATA = ["plain", "offset", "outliers", "step", "ramp", "alternating", "two values", "heavy tails"]
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def matrices(draw, dtypes=(FLOAT32, FLOAT64, FLOAT16), kinds=DATA):
    """Draw (rows, features) anywhere in memory."""
    shape = draw(st.integers(2, 300)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(dtypes))
    kind = draw(st.sampled_from(kinds if dtype != FLOAT16 else ["plain", "ramp", "two values"]))
    x = numbers(np.random.default_rng(draw(SEEDS)), kind, shape, 1, dtype)
    place = draw(places(2))
    return (place if not place.swapped else type(place)(order=place.order, steps=place.steps)).put(x)


@given(matrices())
def test_transform_is_within_the_bound_of_batch_normalisation(x):
    before = x.copy()
    scaler = Standardizer().fit(x)
    mean, var, z = oracle(x)
    got = scaler.transform(x)
    assert got.dtype == x.dtype
    assert np.array_equal(x, before)
    assert (np.abs(got - z) <= bound(x.dtype, mean, var, z)).all()
    # Shifted sums in float64: the error of the mean is that of its own rounding and of the deviations' sum
    assert (np.abs(scaler.mean_ - mean) <= 8 * U64 * (np.abs(mean) + 16 * np.sqrt(var) + 8 * np.abs(z).max(0))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_from_zero_the_results_are_as_near_as_standard_scalers(dtype):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(5000, 8)) + 1e6).astype(dtype)
    mean, var, z = oracle(x)
    own, peer = (np.abs(scaler().fit_transform(x) - z).max() for scaler in (Standardizer, StandardScaler))
    assert own <= bound(np.dtype(dtype), mean, var, z).max()
    if dtype == np.float64:  # in float32 that depends on the version: the newer ones round the mean to it
        assert own <= peer


@given(matrices())
def test_inverse_transform_undoes_transform(x):
    scaler = Standardizer().fit(x)
    back = scaler.inverse_transform(scaler.transform(x))
    mean, var, z = oracle(x)
    unit = {FLOAT16: 2.0**-11, FLOAT32: U32, FLOAT64: U64}[x.dtype]
    std = np.sqrt(np.where(var > 0, var, 1))
    # z is off by its bound, σ times that; then σ·z + μ is three rounded parameters and two rounded operations
    allowed = bound(x.dtype, mean, var, z) * std
    allowed = allowed + 5 * unit * (np.abs(mean) + std * np.abs(z).max(axis=0)) + (x.dtype == FLOAT16) * 2.0**-24
    assert back.dtype == x.dtype
    assert (np.abs(back.astype(WIDE) - x) <= allowed).all()


# ---- Standardizer: laws ------------------------------------------------------------------------------------------


def holes(rng, x):
    """Return x with a tenth of its values missing, though never a whole column."""
    missing = rng.random(x.shape) < 0.1
    missing[rng.integers(len(x), size=x.shape[1]), np.arange(x.shape[1])] = False
    return np.where(missing, np.nan, x).astype(x.dtype)


def close(a, b, x):
    """Whether two fitted standardizers agree to float64's rounding of a sum over the rows of x."""
    spread = np.nanmax(np.abs(x - np.nanmean(x, axis=0)), axis=0) + np.sqrt(a.var_)
    unit = 8 * U64 * math.sqrt(len(x))
    np.testing.assert_array_less(np.abs(a.mean_ - b.mean_), unit * (spread + np.abs(a.mean_)) + 1e-300)
    # merging takes the difference of two means, each rounded
    np.testing.assert_array_less(np.abs(a.var_ - b.var_), unit * (spread + np.abs(a.mean_)) * spread + 1e-300)
    np.testing.assert_array_equal(a.n_samples_seen_, b.n_samples_seen_)


@given(matrices(kinds=["plain", "offset", "ramp"]), st.data(), st.booleans(), st.booleans())
def test_partial_fit_over_any_split_is_fit(x, data, missing, weighted):
    rng = np.random.default_rng(data.draw(SEEDS))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(x) - 1), max_size=5)))
    x = holes(rng, x) if missing else x
    weights = rng.integers(1, 4, len(x)).astype(float) if weighted else None
    whole, pieces = Standardizer().fit(x, sample_weight=weights), Standardizer()
    for start, stop in zip([0, *cuts], [*cuts, len(x)], strict=True):
        pieces.partial_fit(x[start:stop], sample_weight=None if weights is None else weights[start:stop])
    close(whole, pieces, x.astype(np.float64))


@given(matrices(kinds=["plain", "offset"]), SEEDS)
def test_the_order_of_rows_does_not_matter(x, seed):
    shuffled = x[np.random.default_rng(seed).permutation(len(x))]
    close(Standardizer().fit(x), Standardizer().fit(shuffled), x.astype(np.float64))


@given(matrices(), SEEDS)
def test_columns_do_not_know_of_each_other(x, seed):
    """Neither a column of NaNs nor one with some changes a bit of the others, in statistics or results."""
    x = np.ascontiguousarray(x)  # another layout may sum in another order
    clean = Standardizer().fit(x)
    spoiled, rng = x.copy(), np.random.default_rng(seed)
    column = rng.integers(x.shape[1])
    spoiled[rng.random(len(x)) < 0.5, column] = np.nan
    scaler = Standardizer().fit(spoiled)
    others = np.arange(x.shape[1]) != column
    for name in ("mean_", "var_", "scale_"):
        assert np.array_equal(getattr(scaler, name)[others], getattr(clean, name)[others])
    assert np.array_equal(scaler.transform(spoiled)[:, others], clean.transform(x)[:, others])
    assert np.array_equal(np.isnan(scaler.transform(spoiled)[:, column]), np.isnan(spoiled[:, column]))


@given(matrices(kinds=["plain", "offset", "ramp"]), SEEDS)
def test_missing_values_are_as_if_they_were_not_there(x, seed):
    x = holes(np.random.default_rng(seed), x)
    scaler = Standardizer().fit(x)
    mean, var, z = oracle(x)
    got = scaler.transform(x)
    assert np.array_equal(np.isnan(got), np.isnan(x))
    assert (np.abs(got - z) <= bound(x.dtype, mean, var, z))[~np.isnan(x)].all()
    assert np.array_equal(np.broadcast_to(scaler.n_samples_seen_, x.shape[1]), (~np.isnan(x)).sum(axis=0))


@given(matrices(kinds=["plain", "offset"]), SEEDS, st.booleans())
def test_a_weight_is_a_number_of_repetitions(x, seed, missing):
    rng = np.random.default_rng(seed)
    x = holes(rng, x) if missing else x
    weights = np.concatenate([rng.integers(0, 4, len(x) - 1), [1]])
    repeated = np.repeat(x, weights, axis=0)
    if np.isnan(repeated).all(axis=0).any():
        return
    by_weight = Standardizer().fit(x, sample_weight=weights)
    close(Standardizer().fit(repeated), by_weight, repeated.astype(np.float64))
    assert isinstance(np.asarray(by_weight.n_samples_seen_).flat[0], float)


def test_a_weight_can_be_any_fraction_and_one_number_for_all():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(70_000, 5)) + 1e3, rng.random(70_000)  # several blocks
    scaler = Standardizer().fit(x, sample_weight=weights)
    mean, var, _ = oracle(x, weights)
    assert (np.abs(scaler.mean_ - mean) <= 8 * U64 * np.abs(mean)).all()
    assert (np.abs(scaler.var_ - var) <= 64 * U64 * math.sqrt(len(x)) * var).all()
    assert np.isclose(scaler.n_samples_seen_, weights.sum(), rtol=len(x) * U64)
    same = Standardizer().fit(x, sample_weight=0.5)
    close(Standardizer().fit(x, sample_weight=np.full(len(x), 0.5)), same, x)
    assert same.n_samples_seen_ == len(x) / 2


# ---- Standardizer: against StandardScaler ------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("with_mean", "with_std"), [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_everything_is_as_in_standard_scaler(dtype, with_mean, with_std, weighted, missing):
    rng = np.random.default_rng(0)
    x = (100 * rng.normal(size=(200, 6)) + 50).astype(dtype)
    x[:, 3] = 7
    if missing and dtype != np.int64:
        x = holes(rng, x)
    weights = rng.random(200) if weighted else None
    own, peer = (kind(with_mean=with_mean, with_std=with_std) for kind in (Standardizer, StandardScaler))
    for scaler in own, peer:
        scaler.fit(x[:120], sample_weight=None if weights is None else weights[:120])
        scaler.partial_fit(x[120:], sample_weight=None if weights is None else weights[120:])
    names = ["mean_", "var_", "scale_"]
    if with_mean or with_std:  # otherwise StandardScaler counts rows, whatever their weights
        names.append("n_samples_seen_")
    for name in names:
        expected, got = getattr(peer, name), getattr(own, name)
        if expected is None:
            assert got is None
        else:
            assert np.shape(expected) == np.shape(got)
            unit = U32 if weighted and dtype == np.float32 else U64
            np.testing.assert_allclose(got, expected, rtol=1000 * unit, atol=(1000 * unit) ** 2)  # of a constant: (7u)²
    for method in ("transform", "inverse_transform"):
        expected, got = getattr(peer, method)(x), getattr(own, method)(x)
        assert got.dtype == expected.dtype
        unit = U32 if dtype == np.float32 else U64
        np.testing.assert_allclose(got, expected, rtol=0, atol=1000 * unit * np.nanmax(np.abs(expected)))


CONSTANTS = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda v: v == 0 or abs(v) > 1e-30)


@given(CONSTANTS, st.integers(1, 400), st.integers(1, 5), st.sampled_from([FLOAT32, FLOAT64]), st.booleans(), SEEDS)
def test_a_constant_feature_becomes_exactly_zero(value, rows, pieces, dtype, missing, seed):
    rng = np.random.default_rng(seed)
    x = np.full((rows, 3), value * 1.1 if dtype == FLOAT64 else value, dtype)
    x = holes(rng, x) if missing else x
    scaler, weighted = Standardizer(), Standardizer()
    for _ in range(pieces):
        scaler.partial_fit(x)
        weighted.partial_fit(x, sample_weight=rng.random(rows) + 0.1)
    for fitted in scaler, weighted:
        assert (fitted.scale_ == 1).all()
        assert (fitted.var_ == 0).all()
        assert np.array_equal(fitted.transform(x), np.where(np.isnan(x), np.nan, 0), equal_nan=True)


def test_a_row_of_no_weight_makes_no_feature_vary():
    rng = np.random.default_rng(0)
    x, weights = np.repeat(rng.normal(size=(1, 100)), 50, axis=0), rng.random(50)
    x[0], weights[0] = 9.0, 0.0
    assert (Standardizer().fit(x, sample_weight=weights).var_ == 0).all()


def test_a_feature_varies_however_little_it_does():
    """StandardScaler calls such a feature constant, since its own sums could not tell."""
    x = np.array([[1e6], [1e6 + 2.0**-20], [1e6 - 2.0**-20]])
    z = Standardizer().fit_transform(x)
    np.testing.assert_allclose(z.ravel(), np.sqrt(1.5) * np.array([0, 1, -1]), rtol=8 * U64, atol=0)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_float32_near_the_ends_of_its_range(scale):
    x = (np.random.default_rng(0).normal(size=(300, 4)) * scale).astype(np.float32)
    mean, var, z = oracle(x)
    scaler = Standardizer().fit(x)
    got = scaler.transform(x)
    assert got.dtype == np.float32
    assert (np.abs(got - z) <= bound(FLOAT32, mean, var, z)).all()
    least = 2.0**-150  # half of float32's smallest number: what rounding σ, μ and the results to it costs
    allowed = 16 * U32 * np.abs(x).max() + least * (3 + np.abs(z).max())
    assert (np.abs(scaler.inverse_transform(got) - x.astype(WIDE)) <= allowed).all()


def test_a_feature_without_values_is_nan_until_it_gets_some():
    x = np.array([[1.0, np.nan], [3.0, np.nan]])
    scaler = Standardizer().fit(x)
    assert np.array_equal(scaler.scale_, [1, np.nan], equal_nan=True)
    assert np.array_equal(scaler.transform(x), [[-1, np.nan], [1, np.nan]], equal_nan=True)
    scaler.partial_fit([[5.0, 4.0], [3.0, 6.0]])
    assert scaler.n_samples_seen_.tolist() == [4, 2]
    assert scaler.mean_.tolist() == [3, 5]
    assert scaler.scale_[1] == 1
    assert Standardizer().fit(x).partial_fit(x).n_samples_seen_.tolist() == [4, 0]
    before = scaler.mean_, scaler.var_
    scaler.partial_fit([[np.nan, np.nan]])
    assert np.array_equal((scaler.mean_, scaler.var_), before)


def test_statistics_set_by_hand_are_used():
    scaler = Standardizer().fit(np.eye(2))
    scaler.mean_, scaler.scale_ = np.array([1.0, 2.0]), np.array([4.0, 8.0])
    assert scaler.transform([[5.0, 18.0]]).tolist() == [[1.0, 2.0]]
    assert scaler.inverse_transform([[1.0, 2.0]]).tolist() == [[5.0, 18.0]]


# ---- Standardizer: what comes in and goes out --------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("method", ["transform", "inverse_transform"])
def test_copy_false_writes_into_x(method, order):
    x = np.random.default_rng(0).normal(size=(50, 3)).copy(order=order)
    for by_parameter in True, False:
        scaler = Standardizer(copy=not by_parameter).fit(x)
        call = getattr(scaler, method)
        expected, into = call(x, copy=True), x.copy(order=order)
        assert np.array_equal(x, into)
        got = call(into) if by_parameter else call(into, copy=False)
        assert np.shares_memory(got, into)
        assert np.array_equal(into, expected)
        into = x.copy(order=order)
        into.flags.writeable = False
        assert np.array_equal(call(into, copy=False), expected)
        assert np.array_equal(into, x)


def test_pandas_and_names():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(20, 2)), columns=["a", "b"], index=range(5, 25))
    scaler = Standardizer().set_output(transform="pandas").fit(frame)
    assert scaler.feature_names_in_.tolist() == ["a", "b"]
    assert scaler.get_feature_names_out().tolist() == ["a", "b"]
    out = scaler.transform(frame)
    assert out.columns.tolist() == ["a", "b"]
    assert out.index.equals(frame.index)
    assert np.array_equal(out.to_numpy(), Standardizer().fit_transform(frame.to_numpy()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaler.inverse_transform(out.to_numpy())  # arrays too: no names are asked for
    for wrong in frame[["b", "a"]], frame.rename(columns={"a": "c"}), frame[["a"]]:
        with pytest.raises(ValueError, match="feature names") as own:
            scaler.transform(wrong)
        with pytest.raises(ValueError, match="feature names") as peer:
            StandardScaler().fit(frame).transform(wrong)
        assert str(own.value) == str(peer.value)


def test_polars_output():
    pl = pytest.importorskip("polars")
    out = Standardizer().set_output(transform="polars").fit_transform(pl.DataFrame({"a": [1.0, 3.0], "b": [2.0, 2.0]}))
    assert out.to_dict(as_series=False) == {"a": [-1.0, 1.0], "b": [0.0, 0.0]}


@pytest.mark.parametrize("copied", [clone, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_standardizer_can_be_copied(copied):
    x = holes(np.random.default_rng(0), np.random.default_rng(1).normal(size=(50, 3)).astype(np.float32))
    scaler = Standardizer(with_std=False).fit(x)
    twin = copied(scaler)
    assert twin.get_params() == scaler.get_params() == {"copy": True, "with_mean": True, "with_std": False}
    if copied is clone:
        assert not hasattr(twin, "mean_")
        twin.fit(x)
    assert np.array_equal(twin.transform(x), scaler.transform(x), equal_nan=True)
    assert np.array_equal(twin.partial_fit(x).mean_, scaler.partial_fit(x).mean_)


GOOD = np.arange(12.0).reshape(6, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.transform(np.full((2, 2), np.inf)), ValueError, "Input X contains infinity"),
        (lambda s: s.inverse_transform(np.full((2, 2), np.inf)), ValueError, "Input X contains infinity"),
        (lambda s: s.partial_fit([[1.0, np.inf], [1.0, np.nan]]), ValueError, "Input X contains infinity"),
        (lambda s: s.partial_fit([[1.0, -np.inf]], sample_weight=[2]), ValueError, "Input X contains infinity"),
        (lambda s: s.partial_fit(np.empty((0, 2))), ValueError, "Found array with 0 sample"),
        (lambda s: s.partial_fit(GOOD[:, :1]), ValueError, "X has 1 features, but Standardizer is expecting 2"),
        (lambda s: s.transform(GOOD[:, :1]), ValueError, "X has 1 features, but Standardizer is expecting 2"),
        (lambda s: s.inverse_transform(GOOD[:, :1]), ValueError, r"X: expected 2 features, got shape \(6, 1\)"),
        (lambda s: s.transform(GOOD[0]), ValueError, "Expected 2D array, got 1D array"),
        (lambda s: s.partial_fit(sparse.csr_array(GOOD)), TypeError, "Sparse data was passed"),
        (lambda s: s.transform(sparse.csr_array(GOOD)), TypeError, "Sparse data was passed"),
        (lambda s: s.partial_fit(GOOD * 1j), ValueError, "Complex data not supported"),
        (lambda s: s.partial_fit(GOOD, sample_weight=[1, 2]), ValueError, r"sample_weight: expected shape \(6,\), got"),
        (lambda s: s.partial_fit(GOOD, sample_weight=[-1] * 6), ValueError, "sample_weight: expected numbers of 0 or"),
        (lambda s: s.partial_fit(GOOD, sample_weight=[0] * 6), ValueError, "sample_weight: expected a number above 0"),
        (lambda s: s.partial_fit(GOOD, sample_weight=[np.nan] * 6), ValueError, "Input sample_weight contains NaN"),
        (lambda s: Standardizer().transform(GOOD), NotFittedError, "not fitted yet"),
        (lambda s: Standardizer().inverse_transform(GOOD), NotFittedError, "not fitted yet"),
    ],
)
def test_a_refused_call_of_a_standardizer_changes_nothing(call, error, message):
    scaler = Standardizer().fit(GOOD)
    before = pickle.dumps(scaler)
    with pytest.raises(error, match=message):
        call(scaler)
    assert pickle.dumps(scaler) == before


# ---- perceptrons: what they learn --------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(300, 4))
SIDES = (POINTS[:, 0] * POINTS[:, 1] > 0).astype(int)
CORNERS = SIDES + 2 * (POINTS[:, 2] > 0)
SURFACE = np.abs(POINTS[:, 0]) - np.maximum(POINTS[:, 1], POINTS[:, 2])
FAST = {"hidden_layer_sizes": (32,), "learning_rate_init": 0.02, "batch_size": 50, "max_iter": 60, "random_state": 0}


def standard_error(p, n):
    return math.sqrt(p * (1 - p) / n)


@quick
@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic"])
@pytest.mark.parametrize("solver", ["adam", "adamw", "rmsprop", "sgd"])
def test_every_solver_and_activation_learns(solver, activation):
    options = FAST | {"learning_rate_init": 0.2 if solver == "sgd" else 0.02}
    classifier = BatchNormMLPClassifier(solver=solver, activation=activation, **options).fit(POINTS, CORNERS)
    assert classifier.score(POINTS, CORNERS) > 0.9
    assert min(classifier.loss_curve_[-3:]) < classifier.loss_curve_[0] / 2


@quick
def test_an_identity_learns_what_is_linear():
    y = (POINTS @ [1, -2, 0, 1] > 0).astype(int)
    assert BatchNormMLPClassifier(activation="identity", **FAST).fit(POINTS, y).score(POINTS, y) > 0.95
    y = POINTS @ [1, 2, 3, 4] + 5
    linear = BatchNormMLPRegressor(hidden_layer_sizes=(), learning_rate_init=0.05).fit(POINTS, y)
    assert linear.score(POINTS, y) > 0.99
    assert len(linear.folded_) == 1


@quick
def test_as_right_as_the_peer_on_handwritten_digits():
    x, y = datasets.load_digits(return_X_y=True)
    train, test, y_train, y_test = train_test_split(x / 16, y, random_state=0)
    options = {"learning_rate_init": 0.01, "max_iter": 20, "random_state": 0}
    own = BatchNormMLPClassifier(**options).fit(train, y_train).score(test, y_test)
    peer = MLPClassifier(**options).fit(train, y_train).score(test, y_test)
    assert own > peer - 3 * math.sqrt(2) * standard_error(peer, len(y_test))


@quick
@pytest.mark.parametrize("labels", [["no", "yes"], [-5, 7], [False, True], ["a", "b", "c", "d"], [3, 1, 4, 2]])
def test_labels_of_any_kind(labels):
    numbers = CORNERS if len(labels) == 4 else SIDES
    y = np.array(labels)[numbers]
    classifier = BatchNormMLPClassifier(**FAST).fit(POINTS, y)
    assert classifier.classes_.tolist() == sorted(labels)
    assert classifier.n_outputs_ == (1 if len(labels) == 2 else 4)
    assert classifier.out_activation_ == ("logistic" if len(labels) == 2 else "softmax")
    p, predicted = classifier.predict_proba(POINTS), classifier.predict(POINTS)
    assert predicted.dtype == y.dtype
    assert np.array_equal(predicted, classifier.classes_[p.argmax(axis=1)])
    assert accuracy_score(y, predicted) > 0.9
    assert p.shape == (300, len(labels))
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=len(labels) * 4 * U64)
    np.testing.assert_allclose(np.exp(classifier.predict_log_proba(POINTS)), p, rtol=64 * U64, atol=1e-300)


@quick
def test_log_probabilities_are_finite_where_probabilities_are_zero():
    far = 1e5 * POINTS
    for y in SIDES, CORNERS:
        classifier = BatchNormMLPClassifier(**FAST).fit(POINTS, y)
        assert (classifier.predict_proba(far) == 0).any()
        assert np.isfinite(classifier.predict_log_proba(far)).all()


@quick
def test_a_class_of_one_sample():
    y = SIDES.copy()
    y[17] = 9
    classifier = BatchNormMLPClassifier(**FAST | {"max_iter": 5}).fit(POINTS, y)
    assert classifier.predict_proba(POINTS).shape == (300, 3)


@quick
def test_several_labels_at_once():
    y = np.stack([SIDES, POINTS[:, 2] > 0, POINTS[:, 3] > 1], axis=1).astype(int)
    classifier = BatchNormMLPClassifier(**FAST).fit(POINTS, y)
    p = classifier.predict_proba(POINTS)
    assert p.shape == classifier.predict(POINTS).shape == (300, 3)
    assert np.array_equal(classifier.predict(POINTS), p > 0.5)
    assert (classifier.predict(POINTS) == y).mean() > 0.95
    assert classifier.classes_.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="y: expected labels as in the first call"):
        classifier.partial_fit(POINTS, y[:, :2])
    with pytest.raises(ValueError, match="y: expected labels as in the first call"):
        classifier.partial_fit(POINTS, SIDES)
    sparsely = BatchNormMLPClassifier(**FAST).fit(POINTS, sparse.csr_array(y))
    assert same_network(sparsely, classifier)
    first = BatchNormMLPClassifier(**FAST).partial_fit(POINTS, y)
    assert first.predict(POINTS).shape == (300, 3)
    two = BatchNormMLPClassifier(**FAST | {"max_iter": 2}).fit(POINTS, y[:, :2])
    assert two.predict_proba(POINTS).shape == (300, 2)
    assert two.n_outputs_ == 2


@quick
def test_regression_of_one_output_and_several():
    one = BatchNormMLPRegressor(**FAST).fit(POINTS, SURFACE)
    assert one.predict(POINTS).shape == (300,)
    assert one.score(POINTS, SURFACE) > 0.9
    with pytest.warns(DataConversionWarning):
        column = BatchNormMLPRegressor(**FAST).fit(POINTS, SURFACE[:, None])
    assert np.array_equal(column.predict(POINTS), one.predict(POINTS))
    both = np.stack([SURFACE, POINTS[:, 3] ** 2], axis=1)
    two = BatchNormMLPRegressor(**FAST).fit(POINTS, both)
    assert two.predict(POINTS).shape == (300, 2)
    assert two.n_outputs_ == 2
    assert two.score(POINTS, both) > 0.9
    for wrong in SURFACE, both[:, [0, 1, 1]]:
        with pytest.raises(ValueError, match="y: expected 2 outputs as before"):
            two.partial_fit(POINTS, wrong)


# ---- perceptrons: against the formulas ---------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["relu", "tanh", "logistic"])
def test_predictions_are_those_of_the_network_with_the_statistics_of_the_training_set(activation, dtype):
    x = POINTS.astype(dtype)
    classifier = BatchNormMLPClassifier(
        **FAST | {"hidden_layer_sizes": (16, 8), "max_iter": 3, "activation": activation}
    ).fit(x, CORNERS)
    act = {"relu": lambda a: np.maximum(a, 0), "tanh": np.tanh, "logistic": expit}[activation]
    dense = [layer for layer in classifier.model_ if isinstance(layer, nn.Dense)]
    norms = [layer for layer in classifier.model_ if isinstance(layer, nn.BatchNorm)]
    h, unit = x.astype(np.float64), U32 if dtype == np.float32 else U64
    for layer, norm in zip(dense[:2], norms, strict=True):
        assert layer.weight.dtype == norm.gamma.dtype == dtype
        assert layer.bias is None
        a = h @ layer.weight.T.astype(np.float64)
        np.testing.assert_allclose(norm.running_mean, a.mean(axis=0), rtol=0, atol=64 * unit * np.abs(a).max())
        np.testing.assert_allclose(norm.running_var, a.var(axis=0, ddof=1), rtol=0, atol=64 * unit * (a * a).max())
        h = act(norm.gamma * (a - a.mean(axis=0)) / np.sqrt(a.var(axis=0, ddof=1) + norm.eps) + norm.beta)
    z = h @ dense[2].weight.T.astype(np.float64) + dense[2].bias
    p = classifier.predict_proba(x)
    assert p.dtype == dtype
    np.testing.assert_allclose(p, softmax(z, axis=1), rtol=0, atol=256 * unit * max(1, np.abs(z).max()))
    assert not any(isinstance(layer, nn.BatchNorm) for layer in classifier.folded_)
    assert classifier.n_layers_ == 4


def trained_once(solver, alpha, lr, rows=40):
    options = {"hidden_layer_sizes": (5,), "max_iter": 1, "batch_size": rows, "random_state": 3}
    model = BatchNormMLPRegressor(solver=solver, alpha=alpha, learning_rate_init=lr, **options)
    return model.fit(POINTS[:rows], SURFACE[:rows]).model_


@quick
def test_alpha_is_a_penalty_of_the_weights_alone():
    """One step of SGD with Nesterov momentum 0.9 is 1.9·lr·(g + alpha/m·w); AdamW shrinks by lr·alpha first."""
    rows, lr, alpha = 40, 2.0**-7, 8.0
    start = trained_once("sgd", 0.0, 1e-300)
    for solver, factor in ("sgd", 1.9 * lr * alpha / rows), ("adamw", lr * alpha):
        without, with_penalty = trained_once(solver, 0.0, lr), trained_once(solver, alpha, lr)
        for p, q, p0 in zip(
            without.parameters(), with_penalty.parameters(), start.parameters(), strict=True
        ):
            expected = factor * p0 if p0.ndim == 2 else np.zeros_like(p0)
            np.testing.assert_allclose(p - q, expected, rtol=0, atol=16 * U64 * max(1, np.abs(p0).max()))
    assert not np.array_equal(trained_once("adam", 0.0, lr)[0].weight, trained_once("adam", alpha, lr)[0].weight)


@quick
def test_the_loss_is_that_of_the_network_while_training():
    """At a learning rate of nothing, in one batch: cross-entropy, and mean squared error, of the first network."""
    options = FAST | {"batch_size": 300, "max_iter": 1, "learning_rate_init": 1e-300}
    classifier = BatchNormMLPClassifier(**options).fit(POINTS, CORNERS)
    norm = copy.deepcopy(classifier.model_).train()
    log_p = np.log(softmax(norm(POINTS), axis=1))[np.arange(300), CORNERS]
    assert classifier.loss_ == pytest.approx(-log_p.mean(), rel=300 * U64)
    assert classifier.loss_curve_ == [classifier.loss_]
    regressor = BatchNormMLPRegressor(**options).fit(POINTS, SURFACE)
    outputs = copy.deepcopy(regressor.model_).train()(POINTS).ravel()
    assert regressor.loss_ == pytest.approx(np.mean((outputs - SURFACE) ** 2), rel=300 * U64)


# ---- perceptrons: training ---------------------------------------------------------------------------------------


def same_network(a, b):
    """Whether the predicting networks and the trained ones have the same bits."""
    pairs = [(a.model_.state_dict(), b.model_.state_dict()), (a.folded_.state_dict(), b.folded_.state_dict())]
    return all(s.keys() == t.keys() and all(np.array_equal(s[k], t[k]) for k in s) for s, t in pairs)


@quick
def test_a_random_state_gives_the_same_bits():
    def trained(random_state, **more):
        options = FAST | {"max_iter": 3, "random_state": random_state} | more
        return BatchNormMLPClassifier(**options).fit(POINTS, CORNERS)

    first = trained(5)
    assert same_network(first, trained(5))
    assert same_network(first, trained(np.random.RandomState(5)))
    assert same_network(trained(5, early_stopping=True), trained(5, early_stopping=True))
    assert not same_network(first, trained(6))
    shared = np.random.RandomState(5)
    assert not same_network(trained(shared), trained(shared))
    before = np.random.get_state()  # noqa: NPY002 (scikit-learn's None means the global state)
    try:
        np.random.seed(5)  # noqa: NPY002
        assert same_network(first, trained(None))
        assert not same_network(first, trained(None))
    finally:
        np.random.set_state(before)  # noqa: NPY002


def stops_at(scores, tol, patience):
    """Return the number of epochs after which training ends, replayed from what it reached in each."""
    best, idle = -math.inf, 0
    for epoch, score in enumerate(scores, 1):
        idle = idle + 1 if score < best + tol else 0
        best = max(best, score)
        if idle > patience:
            return epoch
    return None


@pytest.mark.parametrize("early_stopping", [False, True])
def test_training_ends_when_nothing_improves(early_stopping):
    options = FAST | {"tol": 0.01, "n_iter_no_change": 4, "early_stopping": early_stopping, "max_iter": 500}
    model = BatchNormMLPRegressor(**options).fit(POINTS, SURFACE)  # no ConvergenceWarning, which would be an error
    scores = model.validation_scores_ if early_stopping else [-loss for loss in model.loss_curve_]
    assert model.n_iter_ == len(model.loss_curve_) == len(scores) == stops_at(scores, 0.01, 4) < 500
    assert model.best_loss_ == min(model.loss_curve_)
    assert model.loss_ == model.loss_curve_[-1]
    assert model.best_validation_score_ == (max(scores) if early_stopping else None)


def test_too_few_epochs_are_said():
    with pytest.warns(ConvergenceWarning, match="max_iter: training did not converge within 2 epochs") as caught:
        BatchNormMLPClassifier(max_iter=2).fit(POINTS, SIDES)
    assert caught[0].filename == __file__
    with pytest.warns(ConvergenceWarning):
        endless = BatchNormMLPClassifier(max_iter=40, tol=10.0, n_iter_no_change=np.inf).fit(POINTS, SIDES)
    assert endless.n_iter_ == 40


@quick
@pytest.mark.parametrize("kind", [BatchNormMLPClassifier, BatchNormMLPRegressor])
def test_early_stopping_keeps_the_network_that_was_best(kind, monkeypatch):
    held = []

    def split(*arrays, **options):
        held.append((train_test_split(*arrays, **options), options))
        return held[-1][0]

    monkeypatch.setattr(sklearn_training, "train_test_split", split)
    y = CORNERS if kind is BatchNormMLPClassifier else SURFACE
    model = kind(**FAST | {"early_stopping": True, "validation_fraction": 0.25, "max_iter": 30}).fit(POINTS, y)
    ((x_train, x_val, _, y_val), options) = held[0]
    assert (len(x_train), len(x_val)) == (225, 75)
    assert (options["stratify"] is None) == (kind is BatchNormMLPRegressor)
    assert model.best_validation_score_ == max(model.validation_scores_) > model.validation_scores_[0]
    assert model.score(x_val, y_val.ravel()) == pytest.approx(model.best_validation_score_, rel=64 * U64)
    norm = model.model_[1]
    np.testing.assert_allclose(norm.running_mean, (x_train @ model.model_[0].weight.T).mean(axis=0), atol=64 * U64)


@quick
@pytest.mark.parametrize("through", [lambda model: model, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("solver", ["adam", "adamw", "rmsprop", "sgd"])
def test_partial_fit_goes_on_where_it_was(solver, through):
    """k calls on the same rows train the same weights as k epochs of fit, also with a pickle in between."""
    options = FAST | {"solver": solver, "max_iter": 4}
    whole = BatchNormMLPClassifier(**options).fit(POINTS, CORNERS)
    parts = BatchNormMLPClassifier(**options)
    for _ in range(4):
        parts = through(parts.partial_fit(POINTS, CORNERS, classes=[0, 1, 2, 3]))
        assert parts.n_iter_ == 1
    assert all(map(np.array_equal, parts.model_.parameters(), whole.model_.parameters()))
    assert parts.loss_curve_ == whole.loss_curve_


@quick
def test_partial_fit_takes_chunks():
    parts = BatchNormMLPClassifier(**FAST)
    with pytest.raises(ValueError, match="classes: expected all labels in the first call of partial_fit, got None"):
        parts.partial_fit(POINTS, CORNERS)
    for _ in range(25):
        for start in range(0, 300, 60):
            parts.partial_fit(POINTS[start : start + 60], CORNERS[start : start + 60], classes=np.arange(4))
    assert parts.score(POINTS, CORNERS) > 0.85
    before = pickle.dumps(parts)
    with pytest.raises(ValueError, match="y: expected classes .* got also"):
        parts.partial_fit(POINTS, CORNERS + 1)
    with pytest.raises(ValueError, match="classes: expected .* as in the first call"):
        parts.partial_fit(POINTS, CORNERS, classes=[0, 1, 2])
    with pytest.raises(ValueError, match="scale X, or reduce learning_rate_init"):
        parts.set_params(learning_rate_init=1e300).partial_fit(POINTS, CORNERS)
    parts.set_params(learning_rate_init=FAST["learning_rate_init"])
    assert pickle.dumps(parts) == before
    parts.set_params(solver="sgd").partial_fit(POINTS, CORNERS)  # a new optimizer, the same network
    one = BatchNormMLPRegressor(**FAST).partial_fit(POINTS[:2], SURFACE[:2])
    assert one.partial_fit(POINTS, SURFACE).predict(POINTS).shape == (300,)
    with pytest.raises(ValueError, match="partial_fit does not support early_stopping=True"):
        one.set_params(early_stopping=True).partial_fit(POINTS, SURFACE)


@quick
def test_the_first_partial_fit_predicts_with_the_statistics_of_its_rows():
    model = BatchNormMLPRegressor(**FAST).partial_fit(POINTS + 100, SURFACE)
    a = (POINTS + 100) @ model.model_[0].weight.T
    np.testing.assert_allclose(model.model_[1].running_mean, a.mean(axis=0), rtol=0, atol=64 * U64 * np.abs(a).max())


@quick
def test_warm_start_goes_on_from_the_network():
    cold = BatchNormMLPClassifier(**FAST | {"max_iter": 10}).fit(POINTS, CORNERS)
    warm = BatchNormMLPClassifier(warm_start=True, **FAST | {"max_iter": 10}).fit(POINTS, CORNERS)
    assert same_network(cold, warm)
    warm.fit(POINTS, CORNERS)
    assert len(warm.loss_curve_) == 20
    assert warm.n_iter_ == 10
    assert warm.loss_curve_[10] < warm.loss_curve_[0] / 2
    assert warm.best_loss_ == min(warm.loss_curve_[10:])
    with pytest.raises(ValueError, match="X has 2 features, but BatchNormMLPClassifier is expecting 4"):
        warm.fit(POINTS[:, :2], CORNERS)
    with pytest.raises(ValueError, match="y: expected classes"):
        warm.fit(POINTS, CORNERS * 10)
    cold.fit(POINTS, CORNERS * 10)
    assert cold.classes_.tolist() == [0, 10, 20, 30]
    assert len(cold.loss_curve_) == 10


@quick
@pytest.mark.parametrize(
    ("n", "batch_size", "rows"),
    [(402, "auto", 134), (300, "auto", 150), (100, "auto", 100), (201, 200, 101), (9, 1000, 9), (2, 2, 2), (3, 2, 2)],
)
def test_batches_are_nearly_equal(n, batch_size, rows, monkeypatch):
    sizes, fit = [], nn.Sequential.fit
    monkeypatch.setattr(nn.Sequential, "fit", lambda *a, **k: sizes.append(k["batch_size"]) or fit(*a, **k))
    x = np.random.default_rng(0).normal(size=(n, 3))
    BatchNormMLPRegressor(batch_size=batch_size, max_iter=1).fit(x, x[:, 0])
    assert sizes == [rows]


@quick
def test_statistics_come_from_a_part_of_very_many_rows(monkeypatch):
    monkeypatch.setattr(sklearn_training, "_MOST_ROWS", 200)
    x = np.sort(POINTS, axis=0)  # the first rows alone would not do
    model = BatchNormMLPRegressor(**FAST | {"max_iter": 1}).fit(x, SURFACE)
    a = x @ model.model_[0].weight.T
    error = np.abs(model.model_[1].running_mean - a.mean(axis=0)) / a.std(axis=0)
    assert (error > 0).all()
    assert (error < 5 / math.sqrt(200)).all()


@quick
def test_an_interrupted_training_keeps_what_it_has(monkeypatch):
    fit, count = nn.Sequential.fit, iter(range(100))

    def interrupted(*arguments, **options):
        if next(count) == 3:
            raise KeyboardInterrupt
        return fit(*arguments, **options)

    monkeypatch.setattr(nn.Sequential, "fit", interrupted)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        model = BatchNormMLPClassifier(**FAST).fit(POINTS, SIDES)
    assert model.n_iter_ == 3
    assert model.predict(POINTS).shape == (300,)
    count = iter([3])
    with pytest.raises(KeyboardInterrupt):
        BatchNormMLPClassifier(**FAST).fit(POINTS, SIDES)


@quick
def test_verbose_prints_a_line_per_epoch(capsys):
    BatchNormMLPRegressor(**FAST | {"max_iter": 2, "early_stopping": True, "verbose": True}).fit(POINTS, SURFACE)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" = ")[0].split(":")[0] for line in lines] == [
        "Iteration 1, loss", "Validation score", "Iteration 2, loss", "Validation score",
    ]  # fmt: skip
    BatchNormMLPRegressor(**FAST | {"max_iter": 2}).fit(POINTS, SURFACE)
    assert capsys.readouterr() == ("", "")


# ---- perceptrons: in scikit-learn --------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("fitted", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_perceptron_can_be_copied(copied, fitted):
    model = BatchNormMLPClassifier(**FAST | {"max_iter": 2})
    if fitted:
        model.fit(POINTS, CORNERS)
    twin = copied(model)
    assert twin.get_params() == model.get_params()
    if fitted:
        assert same_network(twin, model)
        assert np.array_equal(twin.predict_proba(POINTS), model.predict_proba(POINTS))
        model.partial_fit(POINTS, CORNERS)
        assert not same_network(twin, model)  # no memory in common
        assert same_network(twin.partial_fit(POINTS, CORNERS), model)
    assert not hasattr(clone(model), "model_")


@quick
def test_a_pickle_holds_no_data():
    x = np.random.default_rng(0).normal(size=(5000, 20))
    model = BatchNormMLPRegressor(max_iter=2, batch_size=5000).fit(x, x[:, 0])
    parameters = sum(p.nbytes for p in model.model_.parameters())
    assert len(pickle.dumps(model)) < 5 * parameters + 8192  # the network, folded, and two moments of Adam


@quick
def test_pipeline_and_grid_search():
    pipeline = make_pipeline(Standardizer(), BatchNormMLPClassifier(**FAST | {"max_iter": 5}))
    grid = {"standardizer__with_std": [True, False], "batchnormmlpclassifier__hidden_layer_sizes": [(8,), (8, 8)]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(POINTS * 50 + 7, CORNERS)
    assert len(search.cv_results_["params"]) == 4
    assert search.predict(POINTS * 50 + 7).shape == (300,)
    assert search.best_score_ > 0.4


@quick
def test_the_same_scores_from_processes_side_by_side():
    for model, y in (BatchNormMLPClassifier(**FAST | {"max_iter": 5, "tol": 10}), CORNERS), \
            (BatchNormMLPRegressor(**FAST | {"n_iter_no_change": 1, "tol": 10}), SURFACE):  # fmt: skip
        pipeline = make_pipeline(Standardizer(), model)
        one, two = (cross_val_score(pipeline, POINTS, y, cv=2, n_jobs=n, error_score="raise") for n in (1, 2))
        np.testing.assert_allclose(one, two, rtol=0, atol=0.05)  # BLAS may round otherwise with other threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search = GridSearchCV(model, {"alpha": [0, 1e-3]}, cv=2, n_jobs=2, error_score="raise").fit(POINTS, SURFACE)
    assert search.best_estimator_.predict(POINTS).shape == (300,)


@quick
def test_names_of_features():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(POINTS, columns=list("abcd"))
    model = BatchNormMLPClassifier(**FAST | {"max_iter": 2}).fit(frame, pd.Series(CORNERS))
    assert model.feature_names_in_.tolist() == list("abcd")
    with pytest.raises(ValueError, match="The feature names should match those that were passed during fit"):
        model.predict(frame[list("dcba")])
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        model.predict(POINTS)


# ---- perceptrons: bad input --------------------------------------------------------------------------------------

NAN, INF = (np.where(np.arange(1200).reshape(300, 4) == 77, bad, POINTS) for bad in (np.nan, np.inf))


@quick
@pytest.mark.parametrize(
    ("options", "x", "y", "error", "message"),
    [
        ({"hidden_layer_sizes": (8, 0)}, POINTS, SIDES, ValueError, "hidden_layer_sizes == 0, must be >= 1"),
        ({"hidden_layer_sizes": 2.5}, POINTS, SIDES, TypeError, "hidden_layer_sizes must be an instance of int"),
        ({"activation": "gelu"}, POINTS, SIDES, ValueError, "activation: expected 'identity', .*, got 'gelu'"),
        ({"solver": "lbfgs"}, POINTS, SIDES, ValueError, "solver: expected 'adam', .*, got 'lbfgs'"),
        ({"solver": ["adam"]}, POINTS, SIDES, ValueError, "solver: expected 'adam'"),
        ({"batch_size": 1}, POINTS, SIDES, ValueError, "batch_size == 1, must be >= 2"),
        ({"batch_size": "all"}, POINTS, SIDES, TypeError, "batch_size must be an instance of int"),
        ({"alpha": -1}, POINTS, SIDES, ValueError, "alpha == -1, must be >= 0"),
        ({"tol": -1}, POINTS, SIDES, ValueError, "tol == -1, must be >= 0"),
        ({"learning_rate_init": 0}, POINTS, SIDES, ValueError, "learning_rate_init == 0, must be > 0"),
        ({"max_iter": 0}, POINTS, SIDES, ValueError, "max_iter == 0, must be >= 1"),
        ({"n_iter_no_change": 0}, POINTS, SIDES, ValueError, "n_iter_no_change == 0, must be >= 1"),
        ({"validation_fraction": 1}, POINTS, SIDES, ValueError, "validation_fraction == 1, must be < 1"),
        ({"early_stopping": True, "validation_fraction": 0.003}, POINTS, CORNERS, ValueError, "test_size = 1 should"),
        ({"random_state": "x"}, POINTS, SIDES, ValueError, "cannot be used to seed"),
        ({}, NAN, SIDES, ValueError, "Input X contains NaN"),
        ({}, INF, SIDES, ValueError, "Input X contains infinity"),
        ({}, POINTS, SIDES[:-1], ValueError, "inconsistent numbers of samples"),
        ({}, POINTS, np.where(SIDES, np.nan, 1.0), ValueError, "Input y contains NaN"),
        ({}, POINTS, SURFACE, ValueError, "Unknown label type"),
        ({}, POINTS, np.stack([SIDES, CORNERS], axis=1), ValueError, r"y: expected shape \(n_samples,\), or columns"),
        ({}, POINTS[:1], SIDES[:1], ValueError, "X: expected 2 samples or more, .* got 1 sample"),
        ({}, POINTS, SIDES * 0, ValueError, "y: expected 2 classes or more, got 1 class"),
        ({}, sparse.csr_array(POINTS), SIDES, TypeError, "Sparse data was passed"),
        ({"learning_rate_init": 1e300}, POINTS, SIDES, ValueError, "training: expected finite weights and loss, got"),
    ],
)  # fmt: skip
def test_a_refused_fit_leaves_the_network_as_it_was(options, x, y, error, message):
    model = BatchNormMLPClassifier(**FAST | {"max_iter": 2}).fit(POINTS, CORNERS)
    before = model.predict_proba(POINTS)
    with pytest.raises(error, match=message):
        model.set_params(**options).fit(x, y)
    assert np.array_equal(model.predict_proba(POINTS), before)
    assert model.classes_.tolist() == [0, 1, 2, 3]


@quick
@pytest.mark.parametrize(("rate", "what"), [(1e308, "training"), (1e200, "statistics")])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_last_step_that_diverges_is_refused(rate, what, early_stopping):
    """The loss is that before the step; finite weights can still have a variance that is not."""
    options = FAST | {"solver": "sgd", "learning_rate_init": rate, "max_iter": 1, "batch_size": 300}
    model, y = (BatchNormMLPRegressor, 100 * SURFACE) if what == "training" else (BatchNormMLPClassifier, SIDES)
    with pytest.raises(ValueError, match=f"{what}: expected finite"):
        model(early_stopping=early_stopping, **options).fit(POINTS, y)


def test_a_validation_set_of_one_row_has_no_r2():
    model = BatchNormMLPRegressor(early_stopping=True, validation_fraction=0.003)
    with pytest.raises(ValueError, match="validation_fraction: expected 2 samples or more in both parts, got 299 to"):
        model.fit(POINTS, SURFACE)


def test_what_is_not_fitted_does_not_predict():
    for model in BatchNormMLPClassifier(), BatchNormMLPRegressor():
        with pytest.raises(NotFittedError, match="not fitted yet"):
            model.predict(POINTS)


@pytest.mark.parametrize(
    ("first", "then"),
    [({"with_std": False}, {"with_std": True}), ({"with_std": False, "with_mean": False}, {"with_mean": True})],
)
def test_statistics_that_were_not_kept_cannot_be_added_to(first, then):
    scaler = Standardizer(**first).partial_fit([[1.0], [3.0]]).set_params(**then)
    with pytest.raises(ValueError, match="with_mean, with_std: expected what they were in the first call"):
        scaler.partial_fit([[5.0], [7.0]])


def test_a_variance_beyond_float64_is_refused():
    scaler = Standardizer().fit([[1.0], [3.0]])
    with pytest.raises(ValueError, match=r"got larger ones in features \[0\]"):
        scaler.fit([[1e300], [-1e300], [0.0]])
    assert scaler.mean_ == 2


def test_parameters_are_checked():
    with pytest.raises(ValueError, match="with_mean"):
        Standardizer(with_mean="x").fit([[1.0], [2.0]])


def test_a_warm_start_goes_on_with_the_same_network_only():
    X, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = BatchNormMLPClassifier((5,), max_iter=2, warm_start=True).fit(X, y)
        before = model.predict_proba(X)
        model.set_params(hidden_layer_sizes=(4, 4))
        with pytest.raises(ValueError, match=r"expected \(\[5\], 'relu'\) as in the first call, got \(\[4, 4\], "):
            model.fit(X, y)
    assert np.array_equal(model.predict_proba(X), before)


@pytest.mark.parametrize("kind", [Standardizer, BatchNormMLPRegressor])
def test_a_refused_fit_leaves_the_features_of_the_last_one(kind):
    X = np.random.default_rng(0).normal(size=(40, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (kind() if kind is Standardizer else kind(max_iter=2)).fit(X, X[:, 0])
        with pytest.raises(ValueError, match="inf"):
            model.fit(np.full((40, 5), np.inf), X[:, 0])
    assert model.n_features_in_ == 3
    (model.transform if kind is Standardizer else model.predict)(X)
