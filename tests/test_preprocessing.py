"""fastbn.Standardizer: one fit and many, what it keeps of its input, and what it refuses."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import U32, U64, assert_within, bits

from fastbn import Moments, Standardizer


def features(n=50, f=3, seed=0, offset=5.0, dtype=np.float64):
    return np.random.default_rng([seed, n, f]).normal(offset, 2, (n, f)).astype(dtype)


def assert_moments(scaler, x, merges=0):
    """Hold μ and σ² to n·u of the sums they come from, the deviations being from a mean that is off by some u|μ|.

    A merge adds (μ₁ − μ₂)²·n₁n₂/n, with both means off by that much.
    """
    wide = x.astype(np.longdouble)
    mean, var = wide.mean(axis=0), wide.var(axis=0)
    rounding = len(x) * U64
    deviation = np.abs(wide - mean).max(axis=0)
    assert_within(scaler.mean_, mean, rounding * np.abs(wide).max(axis=0), "mean")
    bound = 8 * rounding * (deviation + U64 * np.abs(mean)) ** 2 + 8 * merges * U64 * np.abs(mean) * deviation
    assert_within(scaler.var_, var, bound, "variance")


@given(
    st.integers(1, 60), st.integers(1, 4), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 99),
    st.sampled_from([0.0, 5.0, 1e4]), st.sampled_from([np.float32, np.float64]),
)  # fmt: skip
def test_pieces_are_the_whole(n, f, cuts, seed, offset, dtype):
    x = features(n, f, seed, offset, dtype)
    whole, pieces = Standardizer().fit(x), Standardizer()
    for piece in np.split(x, sorted(min(cut, n) for cut in cuts)):
        if pieces.fitted or len(piece):
            assert pieces.partial_fit(piece) is pieces
    for scaler in (whole, pieces, Standardizer.from_moments(pieces.moments_)):
        assert_moments(scaler, x, merges=0 if scaler is whole else len(cuts))
        assert (scaler.n_samples_seen_, scaler.n_features_in_) == (n, f)
        assert bits(scaler.scale_) == bits(np.where(scaler.var_ == 0, 1, np.sqrt(scaler.var_)))


def test_fit_forgets_and_from_moments_copies():
    x = features()
    scaler = Standardizer().fit(features(7, 5)).fit(x)
    assert bits(scaler.mean_) == bits(Standardizer().fit(x).mean_)
    moments = Moments.of(x, axis=1)
    other = Standardizer.from_moments(moments)
    moments.merge(scaler.moments_)
    assert other.moments_.count == other.n_samples_seen_ == 50
    kept = other.moments_
    other.partial_fit(x + 1)
    assert (kept.count, other.moments_.count, other.n_samples_seen_) == (50, 100, 100)


@pytest.mark.parametrize(("dtype", "unit"), [(np.float32, U32), (np.float64, U64)])
def test_transform_and_back(dtype, unit):
    x = features(dtype=dtype)
    scaler = Standardizer().fit(x)
    z = scaler.transform(x)
    exact = (x.astype(np.float64) - scaler.mean_) / scaler.scale_
    assert z.dtype == dtype
    assert bits(z) == bits(exact.astype(dtype))
    assert bits(z) == bits(Standardizer().fit_transform(x))
    back = scaler.inverse_transform(z)
    assert back.dtype == dtype
    assert_within(back, x, 4 * unit * (np.abs(exact) * scaler.scale_ + np.abs(scaler.mean_)))


def test_integers_become_float64():
    x = np.array([[1, 10], [3, 30]], np.int16)
    scaler = Standardizer().fit(x)
    assert scaler.transform(x).tolist() == [[-1, -1], [1, 1]]
    assert scaler.transform(x).dtype == scaler.inverse_transform(x).dtype == np.float64
    assert Standardizer().fit([[1, 2], [3, 2]]).mean_.tolist() == [2, 2]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e300])
def test_a_constant_feature_has_scale_one(value):
    x = features()
    x[:, 1] = value
    scaler = Standardizer().fit(x[:20]).partial_fit(x[20:])
    assert scaler.scale_[1] == 1
    assert scaler.mean_[1] == value
    assert not scaler.transform(x)[:, 1].any()
    assert scaler.inverse_transform(scaler.transform(x))[:, 1].tolist() == [value] * 50


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_feature(value):
    x = features()
    clean = Standardizer().fit(x[:20]).partial_fit(x[20:])
    dirty = x.copy()
    dirty[[3, 30], 1] = value
    scaler = Standardizer().fit(dirty[:20]).partial_fit(dirty[20:])
    assert np.isnan(scaler.var_[1])
    assert not np.isfinite(scaler.mean_[1])
    assert np.isnan(scaler.transform(dirty)[3, 1])
    for kept in (0, 2):
        assert bits(scaler.transform(dirty)[:, kept]) == bits(clean.transform(x)[:, kept])


def test_inputs_are_not_modified():
    x = features()[::-2]
    x.flags.writeable = False
    before = bits(x)
    scaler = Standardizer().fit(x).partial_fit(x)
    results = [scaler.transform(x), scaler.inverse_transform(x), scaler.fit_transform(x)]
    assert bits(x) == before
    assert not any(np.shares_memory(x, result) for result in results)


WHOLE = Standardizer().fit(features())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Standardizer().transform(features()), ValueError, "Standardizer: expected statistics, got none"),
        (lambda: Standardizer().inverse_transform(features()), ValueError, "call fit(x) first"),
        (lambda: WHOLE.transform(features(5, 2)), ValueError, "x: expected shape (N, 3), got (5, 2)"),
        (lambda: WHOLE.inverse_transform(features(5, 2)), ValueError, "x: expected shape (N, 3), got (5, 2)"),
        (lambda: WHOLE.partial_fit(features(5, 2)), ValueError, "x: expected shape (N, 3), got (5, 2)"),
        (lambda: WHOLE.fit([1.0, 2.0]), ValueError, "x: expected shape (N, F), got (2,)"),
        (lambda: WHOLE.transform([1.0, 2.0, 3.0]), ValueError, "x: expected shape (N, 3), got (3,)"),
        (lambda: WHOLE.fit(np.zeros((0, 3))), ValueError, "x: expected at least one row"),
        (lambda: WHOLE.fit(np.zeros((2, 2, 2))), ValueError, "x: expected shape (N, F)"),
        (lambda: WHOLE.fit(np.zeros((2, 3), complex)), TypeError, "x"),
        (lambda: WHOLE.partial_fit(np.zeros((2, 3), complex)), TypeError, "x"),
        (lambda: WHOLE.transform(np.zeros((2, 3), object)), TypeError, "x"),
        (lambda: Standardizer.from_moments(3), TypeError, "moments"),
        (lambda: Standardizer.from_moments(Moments(3)), ValueError, "moments"),
    ],
)
def test_refused_and_nothing_changed(call, error, words):
    before = WHOLE.n_samples_seen_, bits(WHOLE.mean_), bits(WHOLE.scale_)
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert (WHOLE.n_samples_seen_, bits(WHOLE.mean_), bits(WHOLE.scale_)) == before


def test_is_scikit_learns():
    """Both within n·u of the exact moments, so within twice that of each other."""
    sklearn = pytest.importorskip("sklearn.preprocessing")
    x = features(200, 4)
    x[:, 2] = 7.0
    ours, theirs = Standardizer().fit(x[:90]).partial_fit(x[90:]), sklearn.StandardScaler().fit(x)
    rounding, size = 2 * len(x) * U64, np.abs(x).max(axis=0)
    assert_within(ours.mean_, theirs.mean_, rounding * size)
    assert_within(ours.var_, theirs.var_, 8 * rounding * size**2)
    assert_within(ours.scale_, theirs.scale_, 8 * rounding * size**2 / theirs.scale_)
    z = theirs.transform(x)
    assert_within(ours.transform(x), z, 16 * rounding * (size / theirs.scale_) ** 2 * (1 + np.abs(z)))
