"""Train, use, fold and keep feed-forward networks with BatchNorm: pure Python over the rest of fastbn.

    base         Layer, the interface              activations, layers    what a Sequential is made of
    sequential   Sequential, the documentation     losses, training, progress    behind Sequential.fit
    folding      behind Sequential.fold            storage    behind Sequential.save and load

Matrix products are NumPy's, so BLAS's: unlike batch_norm_*, their last bits may differ between machines.
"""

from . import storage as _storage
from .activations import ReLU, Sigmoid, Tanh
from .base import Layer
from .layers import BatchNorm, Dense, Standardizer
from .losses import softmax
from .sequential import Sequential

__all__ = [
    "BatchNorm",
    "Dense",
    "Layer",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "Standardizer",
    "Tanh",
    "load",
    "softmax",
]


def load(path):
    """Return the model that `Sequential.save` wrote to `path`, in inference mode, with bit-equal predictions.

    Raises
    ------
    ValueError
        With the path and the reason, for a file that is damaged or not a model: not a zip, cut short, a wrong
        checksum, an array missing, superfluous, of the wrong shape or dtype, or a pickle, which is never
        opened.
    OSError
        As `open` raises it: FileNotFoundError, PermissionError, ...
    """
    return _storage.read(path, Sequential)
