"""Population statistics and standardisation of Dask arrays that are larger than memory.

    moments        dask array -> lazy fastbn.Moments, merged over the chunks in a tree
    Standardizer   fastbn.Standardizer whose fit, transform, … take dask arrays too
    recalibrate    running statistics of a fastbn.BatchNorm from a dask array of its inputs

One task loads a chunk, reduces it to 2·C + 1 numbers and frees it, so a worker holds one chunk per thread. It runs with
`num_threads=1`, since Dask's own threads fill the CPUs. A task changes none of its inputs, so a scheduler may run it
again: what a killed worker had is computed anew, and every chunk counts once. Which parts are merged, and in which
order, follows from the chunks alone, not from workers, threads or time, and so do all bits of the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

try:
    import dask
    import dask.array as da
    from dask.base import tokenize
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('fastbn.interop.dask needs dask: pip install "fastbn[dask]"', name=error.name) from error

from .. import preprocessing
from .._core import check
from ..layer import BatchNorm
from ..norm import Moments

__all__ = ["Standardizer", "moments", "recalibrate"]

_MERGED_AT_ONCE = 8  # parts of one task of the tree; another number gives other last bits


def moments(x: da.Array, axis: int = 1) -> Delayed:
    """Return the moments of all values of a dask array per channel, lazily.

    μ = Σ x/n and M2 = Σ (x - μ)², first of each chunk, then merged, eight parts at a time in the order of the chunks:
    n = nₐ + n_b, δ = μ_b - μₐ, μ = μₐ + δ·n_b/n, M2 = M2ₐ + M2_b + δ²·nₐ·n_b/n (Chan, Golub & LeVeque 1979).

    Parameters
    ----------
    x : dask.array.Array of shape (N, C), (N, C, L), … ; float16, bfloat16, float32 or float64
        Two or more dimensions, chunked along any of them, also where the sizes of chunks are unknown (NaN), as those
        of a data frame are; integers become float64.
    axis : int
        The channel axis.

    Returns
    -------
    dask.delayed.Delayed
        Its ``compute()`` gives a `fastbn.Moments` on whatever scheduler is in use; it can be computed together with
        other things, as in ``dask.compute(moments(a), moments(b))``.

    Raises
    ------
    TypeError, ValueError
        At once: `x` is no dask array, its dtype is no real numbers, it has fewer than two dimensions, `axis` is none of
        them. From ``compute()``: what loading a chunk raises, and chunks that are not what the array says they are.

    Notes
    -----
    A thread of a worker needs the memory for making one chunk. One that is not C-contiguous or not of floats is copied,
    so that the last bits depend on neither strides nor the way through the network. NaN and infinity stay in their own
    channel. What Dask cannot make again, such as chunks that a client scattered, is lost with its worker; a chunk at
    which more workers die than ``distributed.scheduler.allowed-failures``, 3, is an error.

    Examples
    --------
    >>> import dask.array as da                                                                    # doctest: +SKIP
    >>> from fastbn.interop.dask import moments                                                    # doctest: +SKIP
    >>> m = moments(da.arange(12, chunks=4).reshape(6, 2)).compute()                               # doctest: +SKIP
    >>> m.count, m.mean                                                                            # doctest: +SKIP
    (6, array([5., 6.]))
    """
    _meta(x)
    channels = check.axis(axis, x.ndim)
    meta = np.empty((0,) * x.ndim, object)
    parts = da.map_blocks(_of_chunk, x, axis=axis, dtype=object, meta=meta).to_delayed()  # fused with what loads it
    runs = np.moveaxis(parts, channels, 0).reshape(parts.shape[channels], -1)  # one for each chunk of channels
    token = tokenize([part.key for part in parts.flat])
    graph: dict[Any, Any] = {}
    tops = [_tree(graph, (f"merge-{token}", i), [part.key for part in run]) for i, run in enumerate(runs)]
    key = f"moments-{token}"
    graph[key] = (_join, tops, x.shape, channels)
    return Delayed(key, HighLevelGraph.from_collections(key, graph, dependencies=[parts.flat[0]]), layer=key)


def _tree(graph: dict[Any, Any], name: tuple[str, int], keys: list[Any]) -> Any:
    """Add the tasks to a graph that merge those of the given keys, neighbours first; return the last one's key."""
    level = 0
    while len(keys) > 1:
        groups = [keys[i : i + _MERGED_AT_ONCE] for i in range(0, len(keys), _MERGED_AT_ONCE)]
        keys = [(*name, level, i) for i in range(len(groups))]
        graph |= {key: (_merge, group) for key, group in zip(keys, groups, strict=True)}
        level += 1
    return keys[0]


class Standardizer(preprocessing.Standardizer):
    """Standardise each feature of a dask array: z = (x − μ) / σ.

    The `fastbn.Standardizer` with its attributes and rules, whose methods take dask arrays too: `fit` and
    `partial_fit` compute :func:`moments` on the scheduler in use and keep 2·F + 1 numbers, `transform` and
    `inverse_transform` are lazy.

    Attributes
    ----------
    mean_, var_, scale_, n_samples_seen_, n_features_in_, moments_
        As in `fastbn.Standardizer`.

    Examples
    --------
    >>> import dask.array as da                                                                    # doctest: +SKIP
    >>> from fastbn.interop.dask import Standardizer                                               # doctest: +SKIP
    >>> x = da.from_array([[1.0, 7.0], [3.0, 7.0]], chunks=1)                                      # doctest: +SKIP
    >>> Standardizer().fit(x).transform(x).compute().tolist()                                      # doctest: +SKIP
    [[-1.0, 0.0], [1.0, 0.0]]
    """

    def fit(self, x: Any) -> Standardizer:
        """Take the statistics of `x`, shape (N, F) with N ≥ 1, forgetting earlier ones; return self."""
        if _is_local(x):
            return super().fit(x)
        _matrix(x)
        found = moments(x).compute()
        if found.count == 0:
            raise ValueError(f"x: expected at least one row, got shape {x.shape}")
        self._set(found)
        return self

    def partial_fit(self, x: Any) -> Standardizer:
        """Add the rows of `x`, shape (N, F), to the statistics; return self. No rows change nothing."""
        if _is_local(x):
            return super().partial_fit(x)
        if not self.fitted:
            return self.fit(x)
        _matrix(x, self.n_features_in_)
        found = moments(x).compute()
        if len(found.mean) != self.n_features_in_:
            raise ValueError(f"x: expected shape (N, {self.n_features_in_}), got {len(found.mean)} features")
        self._set(_merge([self.moments_, found]))
        return self

    def transform(self, x: Any) -> Any:
        """Return (x − μ)/σ of x's shape, chunks and dtype (integers: float64), lazily for a dask array.

        Raises
        ------
        ValueError
            Where nothing has been fitted, or `x` is not of shape (N, F) with the F of the fit.
        TypeError
            For a dtype that is not real numbers.
        """
        return super().transform(x) if _is_local(x) else self._lazily(_standardize, x)

    def inverse_transform(self, x: Any) -> Any:
        """Return x·σ + μ, the inverse of `transform`: shapes, dtypes and errors as there."""
        return super().inverse_transform(x) if _is_local(x) else self._lazily(_restore, x)

    def _lazily(self, function: Any, x: da.Array) -> da.Array:
        if not self.fitted:
            raise ValueError("Standardizer: expected statistics, got none: call fit(x) first")
        meta = _matrix(x, self.n_features_in_)
        if math.isnan(x.shape[1]):
            raise ValueError(f"x: expected shape (N, {self.n_features_in_}), got {x.shape}: call compute_chunk_sizes()")
        mean, scale = (da.from_array(vector, chunks=(x.chunks[1],)) for vector in (self.mean_, self.scale_))
        return da.map_blocks(function, x, mean, scale, rounded=meta.dtype, dtype=meta.dtype, meta=meta)


def recalibrate(bn: BatchNorm, x: da.Array) -> None:
    """Replace a layer's running statistics by those of a population, in place.

    As :meth:`fastbn.BatchNorm.recalibrate` with "pooled": mean and variance of all the values together, the variance
    over n - 1 where `bn.unbiased`, else over n.

    Parameters
    ----------
    bn : BatchNorm
        With running statistics.
    x : dask.array.Array
        All inputs of the layer, computed with frozen weights; its channel axis is `bn.axis`. No values change nothing.

    Raises
    ------
    TypeError, ValueError
        As :func:`moments`; `bn` is no BatchNorm or has no running statistics; another number of channels; one value
        per channel where `bn.unbiased`. The layer is unchanged then.

    References
    ----------
    Ioffe & Szegedy 2015, Algorithm 2, line 10; Chan, Golub & LeVeque 1979.
    """
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn: expected a fastbn.BatchNorm, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics, got track_running_stats=False")
    lazy = moments(x, bn.axis)
    if x.shape[bn.axis] != bn.num_features and not math.isnan(x.shape[bn.axis]):
        raise ValueError(f"x: expected {bn.num_features} channels on axis {bn.axis}, got shape {x.shape}")
    bn.recalibrate([lazy.compute()])


# What is checked before anything is computed ------------------------------------------------------------------------


def _is_local(x: Any) -> bool:
    """Say whether `x` is no dask array, but something that fastbn itself reads or refuses."""
    if isinstance(x, da.Array):
        return False
    if dask.is_dask_collection(x):  # reading it as an array would load all of it, here
        raise TypeError(f"x: expected a dask array, got a dask {type(x).__name__}")
    return True


def _meta(x: Any) -> np.ndarray:
    """Return an empty array of the dtype that the chunks have as floats, or raise TypeError."""
    if not isinstance(x, da.Array):
        raise TypeError(f"x: expected a dask array, got {type(x).__name__}")
    return check.array("x", x._meta)


def _matrix(x: da.Array, n_features: int | None = None) -> np.ndarray:
    """Return :func:`_meta` of an array of shape (N, F), F = `n_features` where both are known, or raise ValueError."""
    meta = _meta(x)
    if x.ndim != 2 or not (n_features in (None, x.shape[1]) or math.isnan(x.shape[1])):
        raise ValueError(f"x: expected shape (N, {'F' if n_features is None else n_features}), got {x.shape}")
    return meta


# Tasks: they run on workers, and change none of their inputs --------------------------------------------------------


def _of_chunk(chunk: Any, axis: int) -> Moments:
    # C-contiguous, as other strides sum in another order, and a chunk's strides may change on its way to a worker
    return Moments.of(np.ascontiguousarray(check.array("x", chunk)), axis, num_threads=1)


def _merge(parts: list[Moments]) -> Moments:
    widths = sorted({len(part.mean) for part in parts})
    if len(widths) > 1:
        raise ValueError(f"x: expected chunks of equally many channels, got some of {' and '.join(map(str, widths))}")
    total = Moments(widths[0], axis=parts[0].axis)
    for part in parts:
        total.merge(part)
    return total


def _join(parts: list[Moments], shape: tuple[float, ...], channels: int) -> Moments:
    """Return the moments of several runs of channels, side by side: all of an array of this shape."""
    parts = [part for part in parts if len(part.mean)] or parts[:1]
    counts = sorted({part.count for part in parts})
    if len(counts) > 1:
        raise ValueError(f"x: expected equally many values in all channels, got {' and '.join(map(str, counts))}")
    result = Moments(0, axis=parts[0].axis)
    result.count = counts[0]
    result.mean, result.m2 = (np.concatenate([getattr(part, name) for part in parts]) for name in ("mean", "m2"))
    expected = shape[channels], math.prod(n for i, n in enumerate(shape) if i != channels)
    for n, found in zip(expected, (len(result.mean), result.count), strict=True):
        if not math.isnan(n) and n != found and len(result.mean):  # without channels nothing can be counted
            got = f"{len(result.mean)} channels of {result.count} values"
            raise ValueError(f"x: expected {expected[0]} channels of {expected[1]} values as shaped, got {got}")
    return result


def _standardize(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, rounded: np.dtype) -> np.ndarray:
    wide = _wide(x, mean)
    with np.errstate(invalid="ignore", over="ignore"):
        return ((wide - mean) / scale).astype(rounded, copy=False)


def _restore(x: np.ndarray, mean: np.ndarray, scale: np.ndarray, rounded: np.dtype) -> np.ndarray:
    wide = _wide(x, mean)
    with np.errstate(invalid="ignore", over="ignore"):
        return (wide * scale + mean).astype(rounded, copy=False)


def _wide(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    x = check.array("x", x)
    if x.shape[1:] != mean.shape:
        raise ValueError(f"x: expected chunks of {len(mean)} features here, got shape {x.shape}")
    return x.astype(np.float64)
