"""What the two multi-layer perceptrons share: parameters, training and what is kept of it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Integral, Real
from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, check_scalar, column_or_1d
from sklearn.utils.validation import check_is_fitted, validate_data

from .. import nn, optim

_ACTIVATIONS = {"identity": None, "logistic": nn.Sigmoid, "relu": None, "tanh": nn.Tanh}  # ReLU is fused
_SOLVERS: dict[str, Any] = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "rmsprop": optim.RMSprop,
    "sgd": partial(optim.SGD, momentum=0.9, nesterov=True),
}
_LOSSES = {"logistic": "binary_cross_entropy", "softmax": "softmax_cross_entropy", "identity": "mse"}
_AUTO_BATCH = 200  # rows, as in MLPClassifier
_MOST_ROWS = 2**16  # for population statistics: their error is then below 1/256 of a standard deviation


@contextmanager
def unchanged_on_error(estimator: BaseEstimator) -> Iterator[None]:
    """Give an estimator its attributes back where a block raises: validate_data sets some before anything is learnt."""
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise


class BatchNormMLP(BaseEstimator):
    """A network of `fastbn.nn` behind scikit-learn's conventions; the documentation is BatchNormMLPClassifier's."""

    model_: nn.Sequential
    folded_: nn.Sequential
    loss_curve_: list[float]
    _rng: np.random.Generator
    _architecture: tuple[list[int], str]
    _optimizer_state: tuple[str, list[dict[str, Any]]]  # arrays, where an optimizer could not be pickled

    def __init__(
        self, hidden_layer_sizes: Any = (100,), activation: str = "relu", *, solver: str = "adam",
        alpha: float = 0.0001, batch_size: int | str = "auto", learning_rate_init: float = 0.001, max_iter: int = 200,
        random_state: Any = None, tol: float = 1e-4, verbose: bool = False, warm_start: bool = False,
        early_stopping: bool = False, validation_fraction: float = 0.1, n_iter_no_change: int = 10,
    ) -> None:  # fmt: skip
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change

    # ---- what the two kinds do differently

    def _encode(self, y: Any, known: bool, classes: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the targets as `fastbn.nn` takes them, and the attributes that they settle; or raise."""
        raise NotImplementedError

    def _validation_score(self, model: nn.Sequential, X: np.ndarray, targets: np.ndarray, loss: str) -> float:
        raise NotImplementedError

    # ---- training

    def fit(self, X: Any, y: Any) -> Any:
        """Train on X, shape (n_samples, n_features), and y until the loss no longer falls; return self.

        ConvergenceWarning where `max_iter` epochs were not enough.

        Raises
        ------
        ValueError, TypeError
            For a parameter out of its range, X or y that does not fit or holds NaN or infinity, one sample, one
            class; where training diverges. A trained network stays as it was then.
        """
        with unchanged_on_error(self):
            return self._fit(X, y)

    def _fit(self, X: Any, y: Any) -> Any:
        self._check_parameters()
        known = self.warm_start and hasattr(self, "model_")
        X, targets, settled = self._data(X, y, known, None)
        loss = _LOSSES[settled["out_activation_"]]
        rng = self._generator()
        model = self._new_model(X, settled, rng) if not known else self._old_model()
        validation = None
        if self.early_stopping:
            X, X_val, targets, targets_val = self._split(X, targets, rng)
            validation = X_val, targets_val
        optimizer = self._optimizer(model, len(X))
        curve, scores, best = self._descend(model, optimizer, X, targets, loss, rng, validation)
        if best is None:
            _calibrate(model, X, rng)
        else:
            model.load_state_dict(best)
        settled |= {
            "n_iter_": len(curve), "best_loss_": min(curve), "validation_scores_": scores or None,
            "best_validation_score_": max(scores, default=None),
        }  # fmt: skip
        return self._keep(model, optimizer, rng, curve, known, settled)

    def _partial_fit(self, X: Any, y: Any, classes: Any = None) -> Any:
        with unchanged_on_error(self):
            return self._fit_one_epoch(X, y, classes)

    def _fit_one_epoch(self, X: Any, y: Any, classes: Any) -> Any:
        self._check_parameters()
        if self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        known = hasattr(self, "model_")
        X, targets, settled = self._data(X, y, known, classes)
        loss = _LOSSES[settled["out_activation_"]]
        rng = copy.deepcopy(self._rng) if known else self._generator()
        model = self._old_model() if known else self._new_model(X, settled, rng)
        optimizer = self._optimizer(model, len(X))
        if known and self._optimizer_state[0] == self.solver:
            optimizer.load_state_dict(self._optimizer_state[1])
        curve = [self._epoch(model, optimizer, X, targets, loss, rng)]
        if not known:  # the running averages go on from the statistics of the first rows, not from 0 and 1
            _calibrate(model, X, rng)
        return self._keep(model, optimizer, rng, curve, known, settled | {"n_iter_": 1, "best_loss_": curve[0]})

    def _data(self, X: Any, y: Any, known: bool, classes: Any) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        X, y = validate_data(
            self, X, y, reset=not known, dtype=(np.float64, np.float32), multi_output=True,
            y_numeric=isinstance(self, RegressorMixin),
        )  # fmt: skip
        if issparse(y):
            y = y.toarray()
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if len(X) < 2:
            raise ValueError("X: expected 2 samples or more, which batch normalisation needs, got 1 sample")
        targets, settled = self._encode(y, known, classes)
        return X, targets, settled

    def _descend(
        self, model: nn.Sequential, optimizer: _Optimizer, X: np.ndarray, targets: np.ndarray, loss: str,
        rng: np.random.Generator, validation: tuple[np.ndarray, np.ndarray] | None,
    ) -> tuple[list[float], list[float], dict[str, np.ndarray] | None]:  # fmt: skip
        """Train for as many epochs as it takes; return losses, validation scores and the best state with them."""
        curve: list[float] = []
        scores: list[float] = []
        state = None
        reached, idle = -math.inf, 0  # the best score, or loss negated, so far; epochs without a better one
        try:
            for epoch in range(1, self.max_iter + 1):
                curve.append(self._epoch(model, optimizer, X, targets, loss, rng))
                score = -curve[-1]
                if self.verbose:
                    print(f"Iteration {epoch}, loss = {curve[-1]:.8f}")
                if validation:
                    _calibrate(model, X, rng)
                    score = self._validation_score(model, *validation, loss)
                    scores.append(score)
                    if self.verbose:
                        print(f"Validation score: {score:f}")
                idle = idle + 1 if score < reached + self.tol else 0
                if score > reached:
                    reached = score
                    state = model.state_dict() if validation else None
                if idle > self.n_iter_no_change:
                    break
            else:
                message = f"max_iter: training did not converge within {self.max_iter} epochs"
                warnings.warn(message, ConvergenceWarning, stacklevel=4)
        except KeyboardInterrupt:
            if not curve:
                raise
            warnings.warn("Training interrupted by user.", stacklevel=4)
        return curve, scores, state

    def _epoch(
        self, model: nn.Sequential, optimizer: _Optimizer, X: np.ndarray, targets: np.ndarray, loss: str,
        rng: np.random.Generator,
    ) -> float:  # fmt: skip
        history = model.fit(
            X, targets, loss=loss, optimizer=optimizer, batch_size=self._rows(len(X)), progress=False, seed=rng
        )
        value = history["loss"][0]
        if not math.isfinite(value) or not _finite(model.parameters()):  # the loss is that before the last step
            raise ValueError(
                f"training: expected finite weights and loss, got others (loss {value}): scale X, or reduce "
                "learning_rate_init"
            )
        return value

    def _rows(self, n: int) -> int:
        """Return how many of n rows make a batch, so that the last is not much shorter: its statistics count too."""
        most = _AUTO_BATCH if isinstance(self.batch_size, str) else self.batch_size
        return max(2, math.ceil(n / math.ceil(n / most)))

    def _new_model(self, X: np.ndarray, settled: dict[str, Any], rng: np.random.Generator) -> nn.Sequential:
        layers: list[nn.Layer] = []
        width = X.shape[1]
        for size in _sizes(self.hidden_layer_sizes):
            fused = "relu" if self.activation == "relu" else None
            layers += [nn.Dense(width, size, bias=False, dtype=X.dtype)]
            layers += [nn.BatchNorm(size, activation=fused, dtype=X.dtype)]
            if activation := _ACTIVATIONS[self.activation]:
                layers.append(activation())
            width = size
        return nn.Sequential(*layers, nn.Dense(width, settled["n_outputs_"], dtype=X.dtype), seed=rng)

    def _old_model(self) -> nn.Sequential:
        """Return a copy of the network to go on from, or raise where the parameters describe another one."""
        made, wanted = self._architecture, (_sizes(self.hidden_layer_sizes), self.activation)
        if made != wanted:
            raise ValueError(f"hidden_layer_sizes, activation: expected {made} as in the first call, got {wanted}")
        return _copy(self.model_)

    def _optimizer(self, model: nn.Sequential, n: int) -> _Optimizer:
        decay = self.alpha if self.solver == "adamw" else self.alpha / self._rows(n)
        return _Optimizer(model, self.solver, self.learning_rate_init, decay)

    def _generator(self) -> np.random.Generator:
        return np.random.default_rng(int(check_random_state(self.random_state).randint(2**31 - 1)))

    def _split(self, X: np.ndarray, targets: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        stratify = targets if isinstance(self, ClassifierMixin) and targets.ndim == 1 else None
        parts = train_test_split(
            X, targets, test_size=self.validation_fraction, stratify=stratify, random_state=int(rng.integers(2**31))
        )
        if min(len(parts[0]), len(parts[1])) < 2:
            raise ValueError(
                "validation_fraction: expected 2 samples or more in both parts, "
                f"got {len(parts[0])} to train on and {len(parts[1])} to validate with"
            )
        return parts

    def _keep(
        self, model: nn.Sequential, optimizer: _Optimizer, rng: np.random.Generator, curve: list[float], known: bool,
        settled: dict[str, Any],
    ) -> Any:  # fmt: skip
        """Set all attributes: nothing has changed until here."""
        if not _finite(model.state_dict().values()):
            raise ValueError("statistics: expected finite numbers, got others: scale X, or reduce learning_rate_init")
        folded = model.fold()
        self.model_, self.folded_ = _copy(model).eval(), folded  # a copy remembers no batch: it is pickled
        self._architecture = _sizes(self.hidden_layer_sizes), self.activation
        self.loss_ = curve[-1]
        self.loss_curve_ = [*(self.loss_curve_ if known else []), *curve]
        self.n_layers_ = sum(isinstance(layer, nn.Dense) for layer in folded) + 1
        self._rng, self._optimizer_state = rng, (self.solver, optimizer.state_dict())
        for name, value in settled.items():
            setattr(self, name, value)
        return self

    def _check_parameters(self) -> None:
        for size in _sizes(self.hidden_layer_sizes):
            check_scalar(size, "hidden_layer_sizes", Integral, min_val=1)
        for name, known in ("activation", _ACTIVATIONS), ("solver", _SOLVERS):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{name}: expected {', '.join(map(repr, known))}, got {value!r}")
        if self.batch_size != "auto":
            check_scalar(self.batch_size, "batch_size", Integral, min_val=2)
        check_scalar(self.max_iter, "max_iter", Integral, min_val=1)
        for name in "alpha", "tol":
            check_scalar(getattr(self, name), name, Real, min_val=0)
        check_scalar(self.learning_rate_init, "learning_rate_init", Real, min_val=0, include_boundaries="neither")
        check_scalar(self.validation_fraction, "validation_fraction", Real, min_val=0, max_val=1,
                     include_boundaries="neither")  # fmt: skip
        check_scalar(self.n_iter_no_change, "n_iter_no_change", Real, min_val=1)

    # ---- use

    def _outputs(self, X: Any) -> np.ndarray:
        """Return the folded network's outputs, shape (n_samples, n_outputs_)."""
        check_is_fitted(self)
        return self.folded_.predict(validate_data(self, X, reset=False, dtype=(np.float64, np.float32)))


class _Optimizer:
    """Two optimizers of one kind: the weights decay, what is not a matrix does not."""

    def __init__(self, model: nn.Sequential, solver: str, lr: float, decay: float) -> None:
        parameters = model.parameters()
        self._matrices = [i for i, p in enumerate(parameters) if p.ndim == 2]
        self._vectors = [i for i, p in enumerate(parameters) if p.ndim != 2]
        self._weights = _SOLVERS[solver]([parameters[i] for i in self._matrices], lr=lr, weight_decay=decay)
        self._others = _SOLVERS[solver]([parameters[i] for i in self._vectors], lr=lr, weight_decay=0.0)

    def step(self, grads: list[np.ndarray]) -> None:
        self._weights.step([grads[i] for i in self._matrices])
        self._others.step([grads[i] for i in self._vectors])

    def state_dict(self) -> list[dict[str, Any]]:
        return [self._weights.state_dict(), self._others.state_dict()]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        self._weights.load_state_dict(states[0])
        self._others.load_state_dict(states[1])


def _sizes(hidden_layer_sizes: Any) -> list[int]:
    return list(hidden_layer_sizes) if np.ndim(hidden_layer_sizes) else [hidden_layer_sizes]


def _finite(arrays: Iterable[np.ndarray]) -> bool:
    return all(np.isfinite(array).all() for array in arrays)


def _copy(model: nn.Sequential) -> nn.Sequential:
    """Return a new network with the same weights and statistics, and nothing of the batches it has seen."""
    return nn.Sequential(*(layer.clone() for layer in model.layers))


def _calibrate(model: nn.Sequential, X: np.ndarray, rng: np.random.Generator) -> None:
    """Give every BatchNorm the statistics of X, or of a part of it where that is enough."""
    model.recalibrate([X if len(X) <= _MOST_ROWS else X[rng.choice(len(X), _MOST_ROWS, replace=False)]])
