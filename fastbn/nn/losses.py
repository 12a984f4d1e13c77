"""The losses: softmax cross-entropy, binary cross-entropy on logits, mean squared error.

Each is the mean over the batch, computed in float64; the gradient comes back in the dtype of the outputs,
so that 1/N is part of it. Both cross-entropies take logits: no exponential overflows and no logarithm sees
a zero.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..preprocessing import as_matrix
from .activations import Sigmoid
from .base import as_array


class Loss(NamedTuple):
    """What a training loop needs of a loss; `targets` is called once, on all y, before anything changes."""

    targets: Callable  # (y, n, n_out, name) -> the checked targets, one row per sample
    value_and_gradient: Callable  # (outputs, targets) -> float, array like outputs
    hits: Callable | None  # (outputs, targets) -> which predictions are right, if there is such a thing


def softmax(logits):
    """Return exp(z_k)/Σ exp(z_j) for each row of `logits`, shape (N, K), in its dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import nn
    >>> nn.softmax(np.array([[1000.0, 1000.0]])).tolist()
    [[0.5, 0.5]]
    """
    logits = as_matrix(logits, name="logits")
    return np.exp(_log_softmax(logits)).astype(logits.dtype)


@np.errstate(all="ignore")
def _log_softmax(logits):
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def _cross_entropy(logits, labels):
    """L = −(1/N) Σ log p[label],  p = softmax(z);  dL/dz = (p − onehot)/N."""
    rows = np.arange(len(labels))
    log_p = _log_softmax(logits)
    gradient = np.exp(log_p)
    gradient[rows, labels] -= 1.0
    return -log_p[rows, labels].mean(), (gradient / len(labels)).astype(logits.dtype)


def _binary_cross_entropy(logits, targets):
    """L = mean of max(z, 0) − z·t + log(1 + e^(−|z|));  dL/dz = (σ(z) − t)/N."""
    z = logits.astype(np.float64)
    losses = np.maximum(z, 0.0) - z * targets + np.log1p(np.exp(-np.abs(z)))
    return losses.mean(), ((Sigmoid().infer(z) - targets) / z.size).astype(logits.dtype)


def _mean_squared_error(outputs, targets):
    """L = mean of (y − t)² over rows and columns;  dL/dy = 2(y − t)/(N·n_out)."""
    difference = outputs.astype(np.float64) - targets
    return (difference * difference).mean(), (2.0 / difference.size * difference).astype(outputs.dtype)


def _class_labels(y, n, n_out, name):
    """Return labels of shape (N,) from integer labels or one-hot rows (N, n_out)."""
    y = as_array(y, name)
    if y.ndim == 2 and y.dtype.kind in "biuf":
        _check_shape(y, [(n, n_out)], name)
        if not (((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all()):
            raise ValueError(f"{name}: expected one-hot rows, a single 1 among zeros, got other values")
        return y.argmax(axis=1)
    if y.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integer class labels, or one-hot rows (N, {n_out}), got {y.dtype}")
    _check_shape(y, [(n,), (n, n_out)], name)
    if (wrong := (y < 0) | (y >= n_out)).any():
        raise ValueError(f"{name}: expected class labels from 0 to {n_out - 1}, got {y[wrong][0]}")
    return y.astype(np.intp)


def _numbers(y, n, n_out, name):
    """Return targets of shape (N, n_out); for a single output, shape (N,) serves too."""
    y = as_array(y, name)
    if y.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, got {y.dtype}")
    _check_shape(y, [(n, n_out)] + [(n,)] * (n_out == 1), name)
    return y.reshape(n, n_out).astype(np.float64, copy=False)


def _binary_labels(y, n, n_out, name):
    y = _numbers(y, n, n_out, name)
    if (wrong := (y != 0) & (y != 1)).any():
        raise ValueError(f"{name}: expected labels 0 and 1, got {y[wrong][0]}")
    return y


def _check_shape(y, shapes, name):
    if y.shape not in shapes:
        raise ValueError(f"{name}: expected shape {' or '.join(map(str, shapes))}, got {y.shape}")


LOSSES = {
    "softmax_cross_entropy": Loss(_class_labels, _cross_entropy, lambda z, t: z.argmax(axis=1) == t),
    "binary_cross_entropy": Loss(_binary_labels, _binary_cross_entropy, lambda z, t: (z > 0) == t),
    "mse": Loss(_numbers, _mean_squared_error, None),
}


def get_loss(name):
    """Return the Loss of that name; a ValueError lists the names there are."""
    if not isinstance(name, str) or name not in LOSSES:
        raise ValueError(f"loss: expected {', '.join(map(repr, LOSSES))}, got {name!r}")
    return LOSSES[name]
