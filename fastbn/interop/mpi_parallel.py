"""Train a Sequential on batches that are spread over the ranks of a communicator."""

from __future__ import annotations

from typing import Any

import numpy as np
from mpi4py import MPI

from ..nn import BatchNorm, Sequential, Sigmoid, Standardizer
from ..nn.losses import get_loss
from ..nn.training import check_optimizer, interrupt_deferred
from ..norm import Saved
from ..preprocessing import as_matrix
from .mpi_exchange import group_of
from .mpi_norm import backward, forward, move

__all__ = ["DataParallel"]


class DataParallel:
    """A `fastbn.nn.Sequential` that the ranks train together, each on its rows of a batch.

    A step computes what one process would on all rows: its BatchNorms take the statistics of all ranks' rows, and the
    gradients are those of the mean loss over all rows, summed in rank order in one flat buffer. Parameters and
    running statistics stay the same, to the last bit, on all ranks.

    Parameters
    ----------
    model : fastbn.nn.Sequential
        The same layers on every rank. It gets rank 0's parameters and statistics, in place, and remains an ordinary
        model, to predict with, fold and save.
    comm : mpi4py.MPI.Comm
        An intra-communicator.

    Raises
    ------
    TypeError, ValueError
        For a model or communicator that is none, on the rank concerned; where the models differ, on every rank.
    RankError
        On the other ranks, where one has failed.

    Examples
    --------
    >>> model = nn.Sequential(nn.Dense(64, 64, bias=False), nn.BatchNorm(64), nn.ReLU(), nn.Dense(64, 10))
    ...                                                                                            # doctest: +SKIP
    >>> adam = fastbn.optim.Adam(model.parameters(), lr=1e-3)                                      # doctest: +SKIP
    >>> parallel = DataParallel(model, MPI.COMM_WORLD)                                             # doctest: +SKIP
    >>> loss = parallel.step(x, y, loss="softmax_cross_entropy", optimizer=adam)                   # doctest: +SKIP
    """

    def __init__(self, model: Sequential, comm: MPI.Comm) -> None:
        self._group = group_of(comm)
        with self._group.guard():
            if not isinstance(model, Sequential):
                raise TypeError(f"model: expected a fastbn.nn.Sequential, got {type(model).__name__}")
            if any(isinstance(layer, Standardizer) and not layer.fitted for layer in model):
                advice = "nn.Standardizer(fastbn.Standardizer().fit(x)), of the same x on all ranks"
                raise ValueError(f"model: expected a fitted Standardizer, such as {advice}; got one that is not fitted")
            self.model = model
            state = model.state_dict()
            layers = ", ".join(map(repr, model.layers))
            flat = np.concatenate([np.empty(0, np.uint8), *(_bytes(array) for array in state.values())])
            first = self._group.reduce(f"DataParallel of {layers}", flat, lambda low, high: low)
            ends = np.cumsum([array.nbytes for array in state.values()])
            parts = np.split(first, ends[:-1])
            model.load_state_dict({
                key: part.view(array.dtype).reshape(array.shape)
                for (key, array), part in zip(state.items(), parts, strict=True)
            })  # fmt: skip

    def step(self, x: Any, y: Any, *, loss: str, optimizer: Any) -> float:
        """Train on one batch: forward, loss, backward, one step of the optimizer; return the mean loss over all rows.

        Collective; any rank may have no rows, and the model is in training mode afterwards.

        Parameters
        ----------
        x : array_like of shape (N, n_in)
            This rank's rows.
        y, loss
            As in :meth:`fastbn.nn.Sequential.fit`.
        optimizer : object with `step(grads)`
            From `fastbn.optim`, built with the model's `parameters()`, alike on all ranks.

        Raises
        ------
        TypeError, ValueError
            For anything that does not fit, on the rank concerned; no rows, or one row before a BatchNorm, on all ranks.
        RankError
            On the other ranks, where one has failed. No running statistic has changed then, and no parameter, unless
            it was the optimizer that failed. (On a single rank, a step of `fit`, running statistics have moved.)
        """
        group, model = self._group, self.model
        with interrupt_deferred(), group.guard(), np.errstate(over="ignore", invalid="ignore"):
            layers, x, targets = self._prepare(x, y, loss)
            check_optimizer(model, optimizer)
            rows = group.reduce(f"a step with {loss}", np.array([float(len(x))]))[0]
            if rows == 0:
                raise ValueError("x: expected at least one row on some rank, got none")
            model.train()
            outputs, saved = self._forward(layers, x)
            value, gradient = 0.0, np.zeros_like(outputs)
            if len(x):
                value, gradient = get_loss(loss).value_and_gradient(outputs, targets)
            share = len(x) / rows
            self._backward(layers, gradient * gradient.dtype.type(share), saved)
            optimizer.step(self._summed(saved))
            mean_loss = float(group.reduce("the end of a step", np.array([value * share]))[0])
            for layer, statistics in saved.items():
                move(layer, statistics)
            return mean_loss

    def _prepare(self, x: Any, y: Any, loss: str) -> tuple[tuple[Any, ...], np.ndarray, np.ndarray]:
        """Return the layers whose output the loss takes, x as floats and the targets."""
        model, definition = self.model, get_loss(loss)
        x = as_matrix(x, model.n_in)
        layers = model.layers
        if loss == "binary_cross_entropy" and isinstance(layers[-1], Sigmoid):
            layers = layers[:-1]  # the loss applies it itself
        return layers, x, definition.targets(y, len(x), model.n_out or x.shape[1], "y")

    def _forward(self, layers: tuple[Any, ...], x: np.ndarray) -> tuple[np.ndarray, dict[BatchNorm, Saved]]:
        """Return the outputs, and what each BatchNorm that is shared with other ranks needs afterwards."""
        saved = {}
        for number, layer in enumerate(layers):
            if isinstance(layer, BatchNorm) and self._group.size > 1:
                x, saved[layer] = forward(layer, self._group, number, as_matrix(x, layer.n_in))
            else:
                x = layer(x)
        return x, saved

    def _backward(self, layers: tuple[Any, ...], dy: np.ndarray, saved: dict[BatchNorm, Saved]) -> None:
        for number, layer in reversed([*enumerate(layers)]):
            if layer in saved:
                x = saved[layer].x
                assert x is not None  # it is only where y has taken its memory
                dy = as_matrix(dy, layer.n_out, "dy").astype(x.dtype, copy=False)
                dy = backward(layer, self._group, number, saved[layer], dy)
            else:
                dy = layer.backward(dy)

    def _summed(self, saved: dict[BatchNorm, Saved]) -> list[np.ndarray]:
        """Return the gradients of the whole batch: those of a shared BatchNorm are, the others are summed."""
        layers = self.model.layers
        own = [gradient for layer in layers if layer not in saved for gradient in layer.gradients()]
        flat = np.concatenate([np.empty(0, np.float32), *(gradient.reshape(-1) for gradient in own)])
        flat = self._group.reduce("gradients", flat)
        parts = iter(np.split(flat, np.cumsum([gradient.size for gradient in own])[:-1]))
        return [
            gradient if layer in saved else next(parts).reshape(gradient.shape).astype(gradient.dtype, copy=False)
            for layer in layers
            for gradient in layer.gradients()
        ]


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
