"""What every layer has: a forward and a backward pass, parameters, a configuration and a state."""

import operator
from abc import ABC, abstractmethod

import numpy as np


class Layer(ABC):
    """The interface of every layer; the defaults are those of a layer without parameters or state.

    Attributes
    ----------
    n_in, n_out : int or None
        Widths; None where the layer takes any and gives the same.
    training : bool
        Set by `train()` and `eval()`; only BatchNorm computes something else for it.
    """

    n_in = n_out = None
    training = True

    @abstractmethod
    def __call__(self, x):
        """Return y for `x`, shape (N, n_in), and remember what `backward` needs."""

    @abstractmethod
    def infer(self, x):
        """Return y at inference, whatever the mode; the layer itself stays untouched."""

    @abstractmethod
    def backward(self, dy):
        """Return dL/dx given dL/dy for the last call, and keep the gradients of the parameters."""

    def train(self, mode=True):
        """Set training mode (or, with False, inference); return self."""
        self.training = bool(mode)
        return self

    def eval(self):
        """Set inference mode; return self."""
        return self.train(False)

    def parameters(self):
        """Return the arrays that training changes, themselves and not copies."""
        return []

    def gradients(self):
        """Return the gradients from the last `backward`, in the order of `parameters` (None before it)."""
        return []

    def clone(self):
        """Return a new layer with the same configuration and a copy of the state, in training mode."""
        twin = self.from_config(self.config())
        twin.load_state_dict(self.state_dict())
        return twin

    def config(self):
        """Return the constructor's arguments, as JSON knows them."""
        return {}

    @classmethod
    def from_config(cls, config):
        """Return a new layer for what `config` returned."""
        return cls(**config)

    @classmethod
    def arrays_of(cls, config):
        """Return {name: (shape, dtype)} of the state of a layer with this `config`."""
        return {}

    def state_dict(self):
        """Return {name: copy of the array}, PyTorch's names."""
        return {}

    def load_state_dict(self, state):
        """Copy `state` into the layer; unless names and shapes are its own, ValueError, nothing changed."""
        self._set_state(self.check_state(state))

    def check_state(self, state, n_in=None):
        """Return `state` in the dtypes the layer keeps, or raise; `n_in` is the model's width where known."""
        return check_arrays(state, self.arrays_of(self.config()))

    def _set_state(self, state):
        """Copy what `check_state` returned."""
        for name, array in state.items():
            setattr(self, name, array)

    def __repr__(self):
        inner = ", ".join(f"{name}={value!r}" for name, value in self.config().items())
        return f"{type(self).__name__}({inner})"


def check_arrays(state, expected):
    """Return the arrays of `state` as `expected` has them ({name: (shape, dtype)}), or raise ValueError."""
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"state: expected {', '.join(expected)}; missing {', '.join(missing)}")
    if extra := [str(name) for name in state if name not in expected]:
        raise ValueError(f"state: expected {', '.join(expected) or 'nothing'}; got also {', '.join(extra)}")
    checked = {}
    for name, (shape, dtype) in expected.items():
        array = as_array(state[name], name)
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        if not np.can_cast(array.dtype, dtype, casting="same_kind"):
            raise ValueError(f"{name}: expected {np.dtype(dtype)}, got {array.dtype}")
        checked[name] = array.astype(dtype)
    return checked


def as_array(value, name):
    """Return `value` as NumPy sees it; the ValueError for rows of unequal length gets its `name`."""
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, got {type(value).__name__} ({error})") from error
    except Exception as error:  # whatever an __array__ of others raises
        raise TypeError(f"{name}: expected an array, got {type(value).__name__} ({error})") from error


def make_rng(seed):
    """Return the Generator for `seed`: None, an int of at least 0, or a Generator, which is used as it is."""
    if seed is None or isinstance(seed, np.random.Generator):
        return np.random.default_rng(seed)
    expected = f"seed: expected None, an int of at least 0 or a numpy.random.Generator, got {seed!r}"
    try:  # NumPy takes sequences too, and overflows the C stack on a np.matrix
        return np.random.default_rng(operator.index(None if isinstance(seed, (bool, np.bool_)) else seed))
    except ValueError:
        raise ValueError(expected) from None
    except Exception:  # a user's __index__ may raise anything
        raise TypeError(expected) from None
