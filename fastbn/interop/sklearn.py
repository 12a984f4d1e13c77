"""scikit-learn estimators over fastbn: a faster StandardScaler, and multi-layer perceptrons with batch normalisation.

    Standardizer                                      StandardScaler's interface over fastbn.Moments
    BatchNormMLPClassifier, BatchNormMLPRegressor     MLPClassifier's and MLPRegressor's, over fastbn.nn:
                                                      sklearn_mlp, sklearn_training
"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import numpy as np

try:
    from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin
except ModuleNotFoundError as error:
    if str(error.name).partition(".")[0] != "sklearn":
        raise
    raise ModuleNotFoundError(
        'fastbn.interop.sklearn needs scikit-learn: pip install "fastbn[sklearn]"', name=error.name
    ) from error

from sklearn.utils import assert_all_finite, check_array
from sklearn.utils.validation import check_is_fitted, validate_data

from ..norm import Moments, batch_norm_infer
from .sklearn_mlp import BatchNormMLPClassifier, BatchNormMLPRegressor
from .sklearn_training import unchanged_on_error

__all__ = ["BatchNormMLPClassifier", "BatchNormMLPRegressor", "Standardizer"]

_DTYPES = (np.float64, np.float32, np.float16)  # kept as they are; others become the first
_BLOCK = 2**18  # values that the statistics of weighted rows take at once: a few megabytes of float64


class Standardizer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):
    """Standardise each feature as scikit-learn's StandardScaler does: z = (x - μ)/σ.

    The interface is StandardScaler's, so swapping the import is enough, for dense X. NaN counts as missing: left out
    of the statistics, kept by `transform`. Infinity is refused. A constant feature has scale 1 and becomes exactly 0.

    Parameters
    ----------
    copy : bool
        With False, `transform` and `inverse_transform` write into X itself where it is a writable array of floats.
    with_mean, with_std : bool
        Whether to subtract μ, and to divide by σ.

    Attributes
    ----------
    mean_, var_, scale_ : ndarray of shape (n_features,), float64, or None
        μ, the biased σ², and σ, or 1 where σ² = 0; NaN for a feature that had no values. var_ and scale_ are None
        with `with_std=False`, mean_ as well if `with_mean=False` too.
    n_samples_seen_ : int, float or ndarray of shape (n_features,)
        Rows, or the sum of their weights; an array where NaNs make a difference between the features.
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features,)
        Only where X had names that are all strings.

    Notes
    -----
    Statistics are float64 whatever X is, and merged by Chan, Golub & LeVeque (1979), so the pieces given to
    `partial_fit` do not matter beyond rounding. `transform` is :func:`fastbn.batch_norm_infer`: for float32 within
    4·2⁻²⁴·(1 + max abs(z)) also where the mean is 10⁶ standard deviations, the same bits for any number of threads.

    What differs from StandardScaler: a feature is constant where its variance is 0, and not already where it is
    within the rounding errors of a less exact sum; sparse X is refused; negative weights are.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop.sklearn import Standardizer
    >>> Standardizer().fit_transform(np.array([[1.0, 7.0], [3.0, 7.0]])).tolist()
    [[-1.0, 0.0], [1.0, 0.0]]
    """

    _parameter_constraints = {"copy": ["boolean"], "with_mean": ["boolean"], "with_std": ["boolean"]}  # noqa: RUF012

    mean_: Any
    var_: Any
    scale_: Any
    n_samples_seen_: Any

    def __init__(self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Standardizer:
        """Take the statistics of X, shape (n_samples, n_features), forgetting earlier ones; return self.

        `sample_weight`, shape (n_samples,), says how many times each row counts; `y` is ignored.
        ValueError for infinity, no rows, a weight below 0 or weights of another number.
        """
        return self._learn(X, sample_weight, fresh=True)

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> Standardizer:
        """Add the rows of X to the statistics; return self. Arguments and errors as in `fit`."""
        return self._learn(X, sample_weight, fresh=not hasattr(self, "n_samples_seen_"))

    def _learn(self, X: Any, sample_weight: Any, fresh: bool) -> Standardizer:
        with unchanged_on_error(self):
            return self._add(X, sample_weight, fresh)

    def _add(self, X: Any, sample_weight: Any, fresh: bool) -> Standardizer:
        self._validate_params()
        if not fresh and ((self.with_std and self.var_ is None) or (self.with_mean and self.mean_ is None)):
            raise ValueError("with_mean, with_std: expected what they were in the first call: its statistics are gone")
        # The moments tell whether there is anything but numbers: no pass over X of its own for that.
        X = validate_data(self, X, reset=fresh, dtype=_DTYPES, ensure_all_finite=False)
        part = _statistics(X, sample_weight)
        if not fresh:
            nothing = np.zeros(self.n_features_in_)
            mean, var = (nothing if a is None else a for a in (self.mean_, self.var_))
            part = _merge(_Statistics(self.n_samples_seen_, mean, var * self.n_samples_seen_), part)
        if np.isinf(part.m2).any():
            features = np.flatnonzero(np.isinf(part.m2)).tolist()
            raise ValueError(f"X: expected variances that float64 can hold, got larger ones in features {features}")
        n = np.asarray(part.n)
        self.n_samples_seen_ = n.flat[0].item() if (n == n.flat[0]).all() else n
        self.mean_ = part.mean if self.with_mean or self.with_std else None
        self.var_ = self.scale_ = None
        if self.with_std:
            with np.errstate(invalid="ignore"):  # a feature without values: 0/0
                self.var_ = part.m2 / n
            self.scale_ = np.sqrt(self.var_)
            self.scale_[self.var_ == 0] = 1.0
        return self

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """Return (x - mean_)/scale_ in X's dtype (integers: float64); `copy` overrides the parameter.

        NotFittedError before `fit`; ValueError for another number or other names of features, and for infinity.
        """
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=_DTYPES, ensure_all_finite="allow-nan")
        scale = 1 / self.scale_ if self.with_std else None
        return self._affine(X, copy, self.mean_ if self.with_mean else None, scale, None)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> np.ndarray:
        """Return x·scale_ + mean_, the inverse of `transform`; errors as there."""
        check_is_fitted(self)
        X = check_array(X, dtype=_DTYPES, ensure_all_finite="allow-nan", input_name="X")
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"X: expected {self.n_features_in_} features, got shape {X.shape}")
        scale = self.scale_ if self.with_std else None
        return self._affine(X, copy, None, scale, self.mean_ if self.with_mean else None)

    def _affine(
        self, x: np.ndarray, copy: bool | None, mean: np.ndarray | None, scale: np.ndarray | None,
        shift: np.ndarray | None,
    ) -> np.ndarray:  # fmt: skip
        """Return (x - mean)·scale + shift: inference with variance 1, so that no scale is squared."""
        out = x if not (self.copy if copy is None else copy) and x.flags.writeable else None
        zeros, ones = np.zeros(x.shape[1]), np.ones(x.shape[1])
        given = (zeros if mean is None else mean), ones, scale, shift
        if scale is None or x.dtype == np.float64 or not (scale > np.finfo(np.float32).max).any():
            return batch_norm_infer(x, *given, eps=0.0, out=out)
        with np.errstate(over="ignore"):  # deviations so small that float32 cannot hold their reciprocals
            return batch_norm_infer(x.astype(np.float64), *given, eps=0.0).astype(x.dtype)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = [np.dtype(dtype).name for dtype in _DTYPES]
        return tags


# ---- statistics with a count for each feature ------------------------------------------------------------------


class _Statistics(NamedTuple):
    """fastbn.Moments has one count for all channels; missing values and weights need one per feature."""

    n: Any  # int, float or ndarray of shape (n_features,)
    mean: np.ndarray
    m2: np.ndarray


def _statistics(x: np.ndarray, sample_weight: Any) -> _Statistics:
    """Return the statistics of the columns, or raise where there is infinity."""
    if sample_weight is not None:
        assert_all_finite(x, allow_nan=True, input_name="X")
        return _weighted(x, _weights(sample_weight, len(x)))
    moments = Moments.of(x, axis=1)
    odd = ~np.isfinite(moments.m2)
    if not odd.any():
        return _Statistics(moments.count, moments.mean, moments.m2)
    assert_all_finite(x, allow_nan=True, input_name="X")
    n, mean, m2 = np.full(len(odd), moments.count), moments.mean, moments.m2
    n[odd], mean[odd], m2[odd] = _weighted(x[:, odd], np.ones(len(x)))
    return _Statistics(n, mean, m2)


def _weights(sample_weight: Any, n: int) -> np.ndarray:
    weights = np.full(n, sample_weight) if isinstance(sample_weight, Real) else sample_weight
    weights = check_array(weights, dtype=np.float64, ensure_2d=False, input_name="sample_weight")
    if weights.shape != (n,):
        raise ValueError(f"sample_weight: expected shape ({n},), got {weights.shape}")
    if (weights < 0).any():
        raise ValueError(f"sample_weight: expected numbers of 0 or more, got {weights.min()}")
    if not weights.any():
        raise ValueError("sample_weight: expected a number above 0, got only zeros")
    return weights


def _weighted(x: np.ndarray, weights: np.ndarray) -> _Statistics:
    """Return the statistics of columns without their NaNs, each row counting as often as its weight says.

    In float64, two passes over each block: differences from a value of the block, so that a constant column has
    exactly m2 = 0, then from their mean.
    """
    counts = weights > 0
    if not counts.all():
        x, weights = x[counts], weights[counts]
    nothing = np.zeros(x.shape[1])
    total = _Statistics(nothing, nothing * np.nan, nothing)
    rows = max(1, _BLOCK // x.shape[1])
    for start in range(0, len(x), rows):
        block, w = x[start : start + rows].astype(np.float64), weights[start : start + rows, None]
        there = ~np.isnan(block)
        base = np.take_along_axis(block, there.argmax(axis=0)[None], axis=0)
        n = np.sum(w * there, axis=0)
        with np.errstate(all="ignore"):  # columns of NaN only, and overflow, which shows in the result
            d = np.where(there, block - base, 0.0)
            first = np.sum(w * d, axis=0) / n
            d = np.where(there, d - first, 0.0)
            m2 = np.sum(w * d * d, axis=0)
        total = _merge(total, _Statistics(n, base[0] + first, m2))
    return total


def _merge(a: _Statistics, b: _Statistics) -> _Statistics:
    """Return the statistics of both parts (Chan, Golub & LeVeque 1979); one without values changes nothing."""
    n = a.n + b.n
    with np.errstate(all="ignore"):
        delta, share = b.mean - a.mean, np.divide(b.n, n)
        mean, m2 = a.mean + delta * share, a.m2 + b.m2 + delta * delta * (a.n * share)
    for empty, other in ((b.n == 0, a), (a.n == 0, b)):
        mean, m2 = np.where(empty, other.mean, mean), np.where(empty, other.m2, m2)
    return _Statistics(n, mean, m2)
