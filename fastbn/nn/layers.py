"""Dense, BatchNorm and Standardizer: affine maps at inference, which fold into one another."""

import numpy as np

from .. import layer, preprocessing
from .._core import check
from .._core.state import copies
from ..norm import Moments, batch_norm_infer, batch_norm_train
from ..preprocessing import as_matrix
from .base import Layer, check_arrays


class Dense(Layer):
    """Affine map of the features: y = x·Wᵀ + b.

    Backward: dW = dyᵀ·x, db = Σ dy over the rows, dx = dy·W.

    Parameters
    ----------
    n_in, n_out : int
        Features in and out, at least 1.
    bias : bool
        Whether there is b. A Dense followed by BatchNorm needs none: β takes its place (Ioffe & Szegedy
        2015, 3.2).
    dtype : float32 or float64
        Of the parameters and of the result; `x` is converted to it.

    Attributes
    ----------
    weight : ndarray of shape (n_out, n_in)
        PyTorch's layout, "OI" in folding. Drawn once: by the `Sequential` that takes the layer, from its
        seed, or on the first use before that, from the operating system's entropy. Assigning copies into
        the same array.
    bias : ndarray of shape (n_out,), zeros at first; or None
    grad_weight, grad_bias : ndarray or None
        New arrays from each `backward`.

    Raises
    ------
    ValueError, TypeError
        For a size that is not a positive integer, a `bias` that is not a bool, another dtype.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn import nn
    >>> dense = nn.Dense(2, 1)
    >>> dense.weight = [[2.0, 3.0]]
    >>> dense(np.array([[1.0, 10.0]])).tolist()
    [[32.0]]
    """

    def __init__(self, n_in, n_out, bias=True, *, dtype=np.float32):
        self.n_in, self.n_out = check.count("n_in", n_in), check.count("n_out", n_out)
        if not isinstance(bias, (bool, np.bool_)):
            raise TypeError(f"bias: expected a bool, got {bias!r}")
        try:
            self.dtype = np.dtype(dtype)
        except Exception:  # UnicodeEncodeError, of text that is none
            raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
        if self.dtype not in (np.float32, np.float64):
            raise ValueError(f"dtype: expected float32 or float64, got {self.dtype}")
        self._weight = None
        self._bias = np.zeros(self.n_out, self.dtype) if bias else None
        self.grad_weight = self.grad_bias = self._x = None

    @property
    def drawn(self):
        """Whether the weights have values: drawn, assigned or loaded."""
        return self._weight is not None

    def draw(self, rng, scheme="glorot"):
        """Draw the weights from the numpy Generator `rng`, and set the bias to zero.

        "he": N(0, 2/n_in), which keeps the variance through ReLU (He et al. 2015, eq. 10).
        "glorot": U(−a, a), a = √(6/(n_in + n_out)), for sigmoid, tanh and no activation (Glorot & Bengio
        2010, eq. 16). The draws are float64 ones, rounded, so that float32 and float64 models start alike.
        """
        shape = self.n_out, self.n_in
        if scheme == "he":
            drawn = rng.normal(0.0, np.sqrt(2.0 / self.n_in), shape)
        elif scheme == "glorot":
            limit = np.sqrt(6.0 / (self.n_in + self.n_out))
            drawn = rng.uniform(-limit, limit, shape)
        else:
            raise ValueError(f"scheme: expected 'he' or 'glorot', got {scheme!r}")
        self.weight = drawn
        if self._bias is not None:
            self._bias[...] = 0

    @property
    def weight(self):
        if self._weight is None:
            self.draw(np.random.default_rng())
        return self._weight

    @weight.setter
    def weight(self, values):
        values = check_arrays({"weight": values}, {"weight": ((self.n_out, self.n_in), self.dtype)})["weight"]
        if self._weight is None:
            self._weight = np.ascontiguousarray(values)
        else:
            self._weight[...] = values  # in place: an optimizer may hold the array

    @property
    def bias(self):
        return self._bias

    @bias.setter
    def bias(self, values):
        if self._bias is None:
            raise ValueError("bias: expected none in a Dense with bias=False")
        self._bias[...] = check_arrays({"bias": values}, {"bias": ((self.n_out,), self.dtype)})["bias"]

    def __call__(self, x):
        self._x = as_matrix(x, self.n_in).astype(self.dtype, copy=False)
        return self._affine(self._x)

    def infer(self, x):
        return self._affine(as_matrix(x, self.n_in).astype(self.dtype, copy=False))

    @np.errstate(all="ignore")  # infinities and NaN are results, as in the kernels
    def _affine(self, x):
        y = x @ self.weight.T
        if self._bias is not None:
            y += self._bias
        return y

    @np.errstate(all="ignore")
    def backward(self, dy):
        if self._x is None:
            raise ValueError("backward: expected a call of the layer before it, got none")
        dy = as_matrix(dy, self.n_out, "dy").astype(self.dtype, copy=False)
        if len(dy) != len(self._x):
            raise ValueError(f"dy: expected shape {(len(self._x), self.n_out)}, got {dy.shape}")
        self.grad_weight = dy.T @ self._x
        if self._bias is not None:
            self.grad_bias = dy.sum(axis=0, dtype=np.float64).astype(self.dtype)
        return dy @ self.weight

    def parameters(self):
        return [self.weight] if self._bias is None else [self.weight, self._bias]

    def gradients(self):
        return [self.grad_weight] if self._bias is None else [self.grad_weight, self.grad_bias]

    def config(self):
        has_bias = self._bias is not None
        return {"n_in": self.n_in, "n_out": self.n_out, "bias": has_bias, "dtype": self.dtype.name}

    @classmethod
    def arrays_of(cls, config):
        n_in, n_out = check.count("n_in", config["n_in"]), check.count("n_out", config["n_out"])
        arrays = {"weight": ((n_out, n_in), config["dtype"])}
        return arrays | ({"bias": ((n_out,), config["dtype"])} if config["bias"] else {})

    def state_dict(self):
        return {name: p.copy() for name, p in zip(("weight", "bias"), self.parameters(), strict=False)}


class BatchNorm(layer.BatchNorm, Layer):
    """`fastbn.BatchNorm` over the features of (N, num_features), with its arguments; `axis` can only be 1.

    It stands before or after the activation. `infer` uses the running statistics; without them
    (`track_running_stats=False`) the batch's own, as in PyTorch.
    """

    def __init__(self, num_features, *, axis=1, **options):
        if axis not in (1, -1):
            raise ValueError(f"axis: expected 1, the features of (N, F), got {axis!r}")
        super().__init__(num_features, axis=1, **options)
        self.n_in = self.n_out = self.num_features
        arrays = [array for array in (self.gamma, self.running_mean) if array is not None]
        self.dtype = arrays[0].dtype if arrays else np.dtype(np.float32)

    def __call__(self, x):
        return super().__call__(as_matrix(x, self.n_in))

    def backward(self, dy):
        dy = as_matrix(dy, self.n_out, "dy")
        return super().backward(dy if self._saved is None else dy.astype(self._saved.x.dtype, copy=False))

    def infer(self, x):
        x, options = as_matrix(x, self.n_in), {"eps": self.eps, "activation": self.activation}
        if not self.track_running_stats:
            return batch_norm_train(x, self.gamma, self.beta, **options)[0]
        return batch_norm_infer(x, *copies(self, ("running_mean", "running_var")), self.gamma, self.beta, **options)

    def parameters(self):
        return [self.gamma, self.beta] if self.affine else []

    def gradients(self):
        return [self.grad_gamma, self.grad_beta] if self.affine else []

    def config(self):
        names = "num_features", "momentum", "affine", "track_running_stats", "unbiased", "activation", "eps"
        return {name: getattr(self, name) for name in names} | {"dtype": self.dtype.name}

    @classmethod
    def arrays_of(cls, config):
        n = check.count("num_features", config["num_features"])
        names = ["weight", "bias"] if config["affine"] else []
        names += ["running_mean", "running_var"] if config["track_running_stats"] else []
        counter = {"num_batches_tracked": ((), "int64")} if config["track_running_stats"] else {}
        return dict.fromkeys(names, ((n,), config["dtype"])) | counter


class Standardizer(preprocessing.Standardizer, Layer):
    """`fastbn.Standardizer` as the first layer of a `Sequential`: z = (x − μ)/σ; backward dx = dy/σ.

    `Sequential.fit` fits one that is not fitted on its x, once, before the first epoch, and leaves a fitted
    one as it is. `Standardizer(scaler)` takes a copy of the statistics of a fitted `fastbn.Standardizer`.
    """

    def __init__(self, scaler=None):
        if scaler is None:
            return
        if not isinstance(scaler, preprocessing.Standardizer):
            raise TypeError(f"scaler: expected a fastbn.Standardizer, got {type(scaler).__name__}")
        if not scaler.fitted:
            raise ValueError("scaler: expected a fitted Standardizer, got one without statistics")
        self._set(Moments.from_dict(scaler.moments_.to_dict()))

    @property
    def n_in(self):
        return self.n_features_in_ if self.fitted else None

    n_out = n_in

    def __call__(self, x):
        return self.transform(x)

    infer = __call__

    def backward(self, dy):
        dy = as_matrix(dy, self.n_in, "dy")
        return (dy.astype(np.float64) / self.scale_).astype(dy.dtype)

    def config(self):
        return {"n_features": self.n_in}

    @classmethod
    def from_config(cls, config):
        return cls()

    @classmethod
    def arrays_of(cls, config):
        if config["n_features"] is None:
            return {}
        n = check.count("n_features", config["n_features"])
        return {"count": ((), "int64"), "mean": ((n,), "float64"), "m2": ((n,), "float64")}

    def state_dict(self):
        if not self.fitted:
            return {}
        count, mean, m2 = self.moments_.count, self.moments_.mean, self.moments_.m2
        return {"count": np.array(count, np.int64), "mean": mean.copy(), "m2": m2.copy()}

    def check_state(self, state, n_in=None):
        n_features = n_in or self.n_in or (np.size(state["mean"]) if "mean" in state else None)
        return check_arrays(state, self.arrays_of({"n_features": n_features}))

    def _set_state(self, state):
        if state:
            if (state["m2"] < 0).any():
                raise ValueError("m2: expected sums of squares, got a negative number")
            self._set(Moments.from_dict({**state, "count": int(state["count"])}))

    __repr__ = preprocessing.Standardizer.__repr__
