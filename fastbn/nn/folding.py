"""Collapse the standardizer and every BatchNorm of a network into its Dense layers."""

import numpy as np

from ..affine import BatchNormParams
from ..fold import fold_into_linear, fold_linear
from .activations import ReLU, Sigmoid, Tanh
from .layers import BatchNorm, Dense, Standardizer

ACTIVATIONS = {"relu": ReLU, "sigmoid": Sigmoid, "tanh": Tanh}


class _Affine:
    """A Dense being folded: weight and bias in float64, rounded to the layer's dtype once, at the end."""

    def __init__(self, name, weight, bias, dtype):
        self.name, self.weight, self.bias, self.dtype = name, weight.astype(np.float64), bias, dtype

    def follow(self, params):
        """Take in the BatchNorm that stands after."""
        self.weight, self.bias = fold_linear(self.weight, self.bias, params)[:2]

    def precede(self, params):
        """Take in the BatchNorm that stands before."""
        self.weight, self.bias = fold_into_linear(params, self.weight, self.bias)[:2]

    def dense(self):
        n_out, n_in = self.weight.shape
        dense = Dense(n_in, n_out, bias=self.bias is not None, dtype=self.dtype)
        with np.errstate(over="ignore"):
            dense.weight = self.weight
            if self.bias is not None:
                dense.bias = self.bias
        if any(np.isinf(parameter).any() for parameter in dense.parameters()):
            raise ValueError(f"{self.name}: expected folded weights that {dense.dtype} can hold, got inf")
        return dense


def fold(layers):
    """Return new layers, Dense and activations only; `Sequential.fold` is the documentation."""
    folded = []  # _Affine and activations
    pending = []  # BatchNorms without a Dense before them: they go into the Dense that follows
    dtypes = [layer.dtype for layer in layers if isinstance(layer, (Dense, BatchNorm))]
    dtype = np.result_type(np.float32, *dtypes) if dtypes else np.float64

    def flush():
        """Give what is pending a Dense of its own, a diagonal one."""
        if pending:
            affine = _Affine(name, np.eye(len(pending[0].mean)), None, dtype)
            for params in pending:
                affine.follow(params)
            pending.clear()
            folded.append(affine)

    for index, layer in enumerate(layers):
        name = f"layers[{index}] ({type(layer).__name__})"
        try:
            if isinstance(layer, Dense):
                affine = _Affine(name, layer.weight, layer.bias, layer.dtype)
                while pending:
                    affine.precede(pending.pop())
                folded.append(affine)
            elif isinstance(layer, (BatchNorm, Standardizer)):
                if folded and isinstance(folded[-1], _Affine):
                    folded[-1].follow(_params(layer))
                else:
                    pending.append(_params(layer))
            activation = ACTIVATIONS.get(getattr(layer, "activation", None), type(layer))
            if activation in ACTIVATIONS.values():
                flush()
                folded.append(activation())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    flush()
    return [layer.dense() if isinstance(layer, _Affine) else layer for layer in folded]


def _params(layer):
    """Return the affine map of a BatchNorm or a Standardizer at inference, as folding takes it."""
    if isinstance(layer, Standardizer):
        if not layer.fitted:
            raise ValueError("expected statistics, got none: fit it, or the model, first")
        return BatchNormParams(None, None, layer.mean_, layer.scale_**2, eps=0.0)
    if layer.running_mean is None:
        raise ValueError("expected running statistics, got none (track_running_stats=False)")
    return BatchNormParams(layer.gamma, layer.beta, layer.running_mean, layer.running_var, layer.eps)
