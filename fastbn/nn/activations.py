"""ReLU, Sigmoid and Tanh: elementwise, of any width."""

from abc import abstractmethod

import numpy as np

from ..preprocessing import as_floats
from .base import Layer


class Activation(Layer):
    """An elementwise function and, from its result y, its slope."""

    _y = None

    def __call__(self, x):
        self._y = self.infer(x)
        return self._y

    @np.errstate(all="ignore")  # infinity times 0
    def backward(self, dy):
        if self._y is None:
            raise ValueError("backward: expected a call of the layer before it, got none")
        dy = as_floats(dy, "dy")
        if dy.shape != self._y.shape:
            raise ValueError(f"dy: expected shape {self._y.shape}, got {dy.shape}")
        return self._times_slope(dy, self._y)

    @abstractmethod
    def _times_slope(self, dy, y):
        """Return dy·f′ where f = y."""


class ReLU(Activation):
    """max(x, 0); its gradient is 0 where y = 0, and NaN stays NaN."""

    def infer(self, x):
        x = as_floats(x)
        return np.maximum(x, x.dtype.type(0))

    def _times_slope(self, dy, y):
        return np.where(y == 0, dy.dtype.type(0), dy)


class Sigmoid(Activation):
    """1/(1 + e⁻ˣ), from e^(−|x|), which cannot overflow; backward dy·y·(1 − y)."""

    def infer(self, x):
        x = as_floats(x)
        with np.errstate(invalid="ignore"):  # NaN stays NaN, without a word
            decay = np.exp(-np.abs(x))
            return np.where(x >= 0, x.dtype.type(1), decay) / (1 + decay)

    def _times_slope(self, dy, y):
        return dy * (y * (1 - y))


class Tanh(Activation):
    """tanh x; backward dy·(1 − y²)."""

    def infer(self, x):
        return np.tanh(as_floats(x))

    def _times_slope(self, dy, y):
        return dy * (1 - y * y)
