"""Input standardisation: every feature shifted and scaled by the training set's own mean and deviation."""

import numpy as np

from ._core import check
from ._core.state import store
from .norm import Moments


def as_floats(x, name="x"):
    """Return `x` as an array of floats (integers: float64), or raise TypeError."""
    return check.array(name, x)


def as_matrix(x, n_features=None, name="x"):
    """Return `x` as floats, or raise ValueError unless its shape is (N, F), F = `n_features` where given."""
    x = check.array(name, x)
    if x.ndim != 2 or x.shape[1] == 0 or n_features not in (None, x.shape[1]):
        expected = f"(N, {'F' if n_features is None else n_features})"
        raise ValueError(f"{name}: expected shape {expected}, got {x.shape}")
    return x


class Standardizer:
    """Standardise each feature: z = (x − μ) / σ.

    μ and σ² are the mean and the population variance (divided by N) of the feature over everything that
    `fit` and `partial_fit` have seen; every set, training, validation or test, is transformed with those.
    A constant feature has σ = 0: its scale is 1, so it becomes exactly 0 and nothing is divided by zero.

    Attributes
    ----------
    mean_, var_, scale_ : ndarray of shape (F,), float64
        μ, σ² and σ (1 where σ² = 0). They exist once the standardizer is fitted.
    n_samples_seen_, n_features_in_ : int
        Rows seen and F.
    moments_ : Moments
        Count, mean and sum of squares, from which the rest follows; part sums gathered elsewhere (other
        processes, other files) come in through `from_moments`.

    Notes
    -----
    The statistics are the float64 moments of `fastbn.Moments`, merged by the pairwise rule of Chan, Golub &
    LeVeque (1979): pieces of any size give the result of the whole up to rounding in float64, also where
    |mean|/std is large. NaN and infinity stay in their own feature. A call that fails changes nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import Standardizer
    >>> scaler = Standardizer().fit(np.array([[1.0, 7.0], [3.0, 7.0]]))
    >>> scaler.transform(np.array([[1.0, 7.0], [5.0, 8.0]])).tolist()
    [[-1.0, 0.0], [3.0, 1.0]]
    """

    moments_: Moments
    mean_: np.ndarray
    var_: np.ndarray
    scale_: np.ndarray
    n_samples_seen_: int
    n_features_in_: int

    @classmethod
    def from_moments(cls, moments):
        """Return a standardizer fitted with `moments` (a `fastbn.Moments`, which is copied)."""
        if not isinstance(moments, Moments):
            raise TypeError(f"moments: expected a fastbn.Moments, got {type(moments).__name__}")
        if moments.count < 1:
            raise ValueError("moments: expected a count of at least 1, got 0")
        scaler = cls()
        scaler._set(Moments.from_dict(moments.to_dict()))
        return scaler

    @property
    def fitted(self):
        """Whether there are statistics to transform with."""
        return hasattr(self, "moments_")

    def fit(self, x):
        """Take the statistics of `x`, shape (N, F) with N ≥ 1, forgetting earlier ones; return self."""
        x = as_matrix(x)
        if len(x) == 0:
            raise ValueError(f"x: expected at least one row, got shape {x.shape}")
        self._set(Moments.of(x, axis=1))
        return self

    def partial_fit(self, x):
        """Add the rows of `x`, shape (N, F), to the statistics; return self. No rows change nothing."""
        if not self.fitted:
            return self.fit(x)
        x = as_matrix(x, self.n_features_in_)
        with np.errstate(invalid="ignore"):  # inf − inf is that feature's NaN, not a warning
            self._set(Moments.from_dict(self.moments_.to_dict()).merge(Moments.of(x, axis=1)))
        return self

    def transform(self, x):
        """Return (x − μ)/σ in a new array of x's shape and dtype (integers: float64).

        Computed in float64 and rounded once, so a float32 result is the float64 one correctly rounded.

        Raises
        ------
        ValueError
            Where nothing has been fitted, or `x` is not of shape (N, F) with the F of the fit.
        TypeError
            For a dtype that is not real numbers.
        """
        return self._apply(x, lambda wide: (wide - self.mean_) / self.scale_)

    def inverse_transform(self, x):
        """Return x·σ + μ, the inverse of `transform`: shapes, dtypes and errors as there."""
        return self._apply(x, lambda wide: wide * self.scale_ + self.mean_)

    def fit_transform(self, x):
        """Return `fit(x).transform(x)`."""
        return self.fit(x).transform(x)

    def _apply(self, x, function):
        if not self.fitted:
            raise ValueError("Standardizer: expected statistics, got none: call fit(x) first")
        x = as_matrix(x, self.n_features_in_)
        with np.errstate(invalid="ignore", over="ignore"):
            return function(x.astype(np.float64)).astype(x.dtype, copy=False)

    def _set(self, moments):
        var = moments.var()
        scale = np.sqrt(var)
        scale[var == 0] = 1.0
        store(
            self, moments_=moments, mean_=moments.mean.copy(), var_=var, scale_=scale,
            n_samples_seen_=int(moments.count), n_features_in_=len(scale),
        )  # fmt: skip

    def __repr__(self):
        inner = f"{self.n_features_in_} features" if self.fitted else ""
        return f"{type(self).__name__}({inner})"
