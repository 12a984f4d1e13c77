"""BatchNormMLPClassifier and BatchNormMLPRegressor: what they take for targets and make of outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils.multiclass import check_classification_targets, type_of_target

from .. import nn
from .sklearn_training import BatchNormMLP

__all__ = ["BatchNormMLPClassifier", "BatchNormMLPRegressor"]


class BatchNormMLPClassifier(ClassifierMixin, BatchNormMLP):
    """Multi-layer perceptron classifier with batch normalisation before each activation.

    The interface is MLPClassifier's. Each hidden layer computes act(BN(x·Wᵀ)) (Ioffe & Szegedy 2015), the last one
    x·Wᵀ + b; the loss is the cross-entropy. After training, every BatchNorm gets the statistics of the training set
    (ibid., Algorithm 2) and is folded into the weights, so that a prediction costs what it does without.

    Parameters
    ----------
    hidden_layer_sizes : int or sequence of int
        Widths of the hidden layers.
    activation : {"identity", "logistic", "tanh", "relu"}
    solver : {"adam", "adamw", "rmsprop", "sgd"}
        "sgd" with Nesterov momentum 0.9.
    alpha : float
        L2 penalty of the weights (γ, β and biases have none): alpha/(2·m)·Σw² joins the loss of a batch of m rows, as
        in MLPClassifier. For "adamw", the decoupled decay: w ← w·(1 - learning_rate_init·alpha) in each step.
    batch_size : int of at least 2, or "auto"
        Rows in a mini-batch at most (one more where a single row would be left); "auto" means 200. Batches are made
        nearly equal.
    learning_rate_init : float
        Learning rate of all steps.
    max_iter : int
        Epochs at most.
    random_state : int, RandomState instance or None
        Of weights, shuffling and the validation split. The same int gives the same bits on the same machine.
    tol, n_iter_no_change : float, int
        Training ends when more than `n_iter_no_change` epochs in a row improved the best loss, or validation score,
        by less than `tol`.
    verbose : bool
        Print losses and scores.
    warm_start : bool
        Whether `fit` goes on from the network of the last call.
    early_stopping : bool
        Hold out `validation_fraction` of the data, stop by the score there, keep the network that was best.
    validation_fraction : float in (0, 1)

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Or, for multilabel y, the numbers of its columns.
    n_features_in_, n_outputs_, n_layers_ : int
        n_outputs_ is 1 for two classes; n_layers_ counts input and output.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only where X had names that are all strings.
    out_activation_ : {"logistic", "softmax", "identity"}
    n_iter_ : int
        Epochs of the last call.
    loss_, best_loss_ : float
        Mean loss while training, without the penalty: in the last epoch, and the least one of the last call.
    loss_curve_ : list of float
        One per epoch, earlier calls' included where this one went on from them.
    validation_scores_ : list of float, or None
    best_validation_score_ : float, or None
    model_, folded_ : fastbn.nn.Sequential
        The trained network, and what predicts: Dense and activations only.

    Notes
    -----
    Computes in float32 for float32 X, otherwise in float64. Before `partial_fit` has seen many batches, its
    predictions use running averages of few.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop.sklearn import BatchNormMLPClassifier
    >>> X = np.random.default_rng(0).normal(size=(300, 2))
    >>> y = np.where(X[:, 0] > X[:, 1], "above", "below")
    >>> BatchNormMLPClassifier(learning_rate_init=0.01, tol=0.01, random_state=0).fit(X, y).score(X, y) > 0.95
    True
    """

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> BatchNormMLPClassifier:
        """Train for one epoch on X and y; return self.

        The first call needs `classes`, all labels that will come, unless y is multilabel. The optimizer's state and
        the running statistics go on from call to call. Errors as in `fit`, and ValueError for other classes later.
        """
        first = not hasattr(self, "model_")
        if first and classes is None and not type_of_target(y, input_name="y").startswith("multilabel"):
            raise ValueError("classes: expected all labels in the first call of partial_fit, got None")
        if not first and classes is not None and not np.array_equal(np.unique(classes), self.classes_):
            raise ValueError(f"classes: expected {self.classes_}, as in the first call, got {classes!r}")
        return self._partial_fit(X, y, classes)

    def _encode(self, y: Any, known: bool, classes: Any) -> tuple[np.ndarray, dict[str, Any]]:
        check_classification_targets(y)
        multilabel = type_of_target(y, input_name="y").startswith("multilabel")
        if y.ndim == 2 and not multilabel:
            raise ValueError(f"y: expected shape (n_samples,), or columns of 0 and 1, got others of shape {y.shape}")
        if known:
            classes = self.classes_
        elif multilabel:
            classes = np.arange(y.shape[1])
        elif classes is None:
            classes = y
        classes = np.unique(classes)
        if (known and multilabel != self._multilabel) or (multilabel and y.shape[1] != len(classes)):
            raise ValueError(f"y: expected labels as in the first call, got shape {y.shape}")
        if len(classes) < 2 and not multilabel:
            raise ValueError(f"y: expected 2 classes or more, got 1 class: {classes[0]!r}")
        if multilabel:
            targets = np.asarray(y)
        else:
            if len(strange := np.setdiff1d(y, classes)):
                raise ValueError(f"y: expected classes {classes}, got also {strange}")
            targets = np.searchsorted(classes, y)
        logistic = multilabel or len(classes) == 2
        return targets, {
            "classes_": classes, "_multilabel": multilabel, "n_outputs_": 1 if len(classes) == 2 and not multilabel
            else len(classes), "out_activation_": "logistic" if logistic else "softmax",
        }  # fmt: skip

    def _validation_score(self, model: nn.Sequential, X: np.ndarray, targets: np.ndarray, loss: str) -> float:
        if targets.ndim == 2:  # multilabel
            return float(((model.predict(X) > 0) == targets).all(axis=1).mean())  # what score() is
        return model.evaluate(X, targets, loss=loss)[1]

    def predict(self, X: Any) -> np.ndarray:
        """Return the labels, shape (n_samples,), or 0 and 1 of shape (n_samples, n_outputs_) for multilabel y."""
        p = self.predict_proba(X)
        return (p > 0.5).astype(int) if self._multilabel else self.classes_[p.argmax(axis=1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return probabilities, shape (n_samples, n_classes), in the order of `classes_`."""
        return self._activated(X, expit, softmax)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithms of `predict_proba`, finite also where that is rounded to 0."""
        return self._activated(X, log_expit, log_softmax)

    def _activated(self, X: Any, logistic: Any, over_classes: Any) -> np.ndarray:
        z = self._outputs(X)
        if self.out_activation_ == "softmax":
            return over_classes(z, axis=1)
        return logistic(z if self._multilabel else np.hstack([-z, z]))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class BatchNormMLPRegressor(RegressorMixin, BatchNormMLP):
    """Multi-layer perceptron regressor with batch normalisation before each activation.

    The interface is MLPRegressor's, for one output or several; the loss is the mean squared error (MLPRegressor's is
    half of it). Network, parameters and attributes are BatchNormMLPClassifier's, such as feature_names_in_, without
    classes_; the validation score is R². A y far from 0 or 1 in scale is better standardised, as by
    sklearn.compose.TransformedTargetRegressor.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop.sklearn import BatchNormMLPRegressor
    >>> X = np.random.default_rng(0).normal(size=(300, 2))
    >>> y = np.abs(X[:, 0] - X[:, 1])
    >>> BatchNormMLPRegressor(learning_rate_init=0.01, random_state=0).fit(X, y).score(X, y) > 0.9
    True
    """

    def partial_fit(self, X: Any, y: Any) -> BatchNormMLPRegressor:
        """Train for one epoch on X and y; return self. Errors as in `fit`."""
        return self._partial_fit(X, y)

    def _encode(self, y: Any, known: bool, classes: Any) -> tuple[np.ndarray, dict[str, Any]]:
        outputs = 1 if y.ndim == 1 else y.shape[1]
        if known and (outputs, y.ndim == 1) != (self.n_outputs_, self._flat):
            raise ValueError(f"y: expected {self.n_outputs_} outputs as before, got shape {y.shape}")
        return y.reshape(len(y), outputs), {
            "n_outputs_": outputs, "out_activation_": "identity", "_flat": y.ndim == 1
        }  # fmt: skip

    def _validation_score(self, model: nn.Sequential, X: np.ndarray, targets: np.ndarray, loss: str) -> float:
        return r2_score(targets, model.predict(X))

    def predict(self, X: Any) -> np.ndarray:
        """Return the outputs, shape (n_samples,), or (n_samples, n_outputs_) where y had two dimensions."""
        outputs = self._outputs(X)
        return outputs.ravel() if self._flat else outputs

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags
