"""Fold the BatchNorms of Keras 3 models, convert single layers, load and save models; whatever the backend.

    fold          Sequential and functional models, nested ones too       -> (new model, ModelReport)
    from_layer    keras.layers.BatchNormalization -> fastbn.BatchNorm
    to_layer      fastbn.BatchNorm -> keras.layers.BatchNormalization
    load, save    .keras, .h5 and .hdf5; .keras

A model is read twice from the record Keras keeps of its calls: first as the graph that folding knows, then to call
new layers in the same way, without those that the fold has removed.

    keras_calls    that record                           keras_graph    from a model to graphs and to changes
    keras_layers   what each layer is to folding         keras_models   from the changes to a new model
    keras_files    load and save
"""

from __future__ import annotations

from typing import Any

try:
    import keras
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'fastbn.interop.keras needs keras: pip install "fastbn[keras]"'
        if error.name == "keras"
        else f"fastbn.interop.keras: Keras's backend needs {error.name}; KERAS_BACKEND chooses another",
        name=error.name,
    ) from error

from ..layer import BatchNorm
from .keras_calls import is_transparent, leaves_of
from .keras_files import load, save
from .keras_graph import Reader
from .keras_layers import params_of
from .keras_models import Builder
from .report import ModelReport

__all__ = ["fold", "from_layer", "load", "save", "to_layer"]


def fold(model: Any) -> tuple[Any, ModelReport]:
    """Fold every BatchNormalization that can be into the weights beside it: f(x) = model(x) at inference.

    y = scale·x + shift per channel, scale = γ/√(σ² + ε), shift = β - scale·μ (Ioffe & Szegedy 2015, Algorithm 2,
    line 11), goes into the Dense, Conv1D-3D, their transposed, depthwise and separable kinds behind or in front of
    it, through Dropout, Flatten, Reshape, pooling, Concatenate and others that let it pass, or into another
    BatchNormalization.

    Parameters
    ----------
    model : keras.Sequential or functional keras.Model
        Built; it stays as it is. Such models inside it are folded too, one called several times on its own.

    Returns
    -------
    model : keras.Sequential or functional keras.Model
        New layers of the same names, with the same inputs and outputs, not compiled. A layer that was removed
        leaves a keras.layers.Identity of its name where it gave an output of a functional model its name, or
        another dtype than it read. Weights are rounded once, to their own dtypes.
    report : ModelReport
        Its nodes are layers and operations; those of a model "a" inside have names "a/b".

    Raises
    ------
    TypeError
        The model is no keras.Model, or has a call() of its own, which nothing can be known about.
    ValueError
        The model is not built; var + eps ≤ 0 or NaN in a BatchNormalization, which is named; a layer cannot be made
        again from its config.

    Notes
    -----
    What stays as it was, with the reason in the report: a layer called more than once, one whose variables another
    layer has too, quantised or with LoRA weights; a BatchNormalization called with training=True; everything in
    layers of other classes than Keras's own. A mask changes nothing that a BatchNormalization gives at inference.

    Examples
    --------
    >>> import keras, fastbn.interop.keras                                                         # doctest: +SKIP
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    ...                                                                                            # doctest: +SKIP
    >>> folded, report = fastbn.interop.keras.fold(model)                                          # doctest: +SKIP
    >>> [layer.name for layer in folded.layers], report.summary()                                  # doctest: +SKIP
    (['dense'], '1 BatchNorm: 1 folded; nodes 2 -> 1, parameters 16 -> 8')
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model: expected a Sequential or functional keras.Model, got {type(model).__name__}")
    if not is_transparent(model):
        if isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
            raise ValueError(f"model: expected one that is built for one input, got the Sequential {model.name!r}")
        raise TypeError(
            f"model: expected a Sequential or functional keras.Model, got {type(model).__name__}, whose call() is "
            "its own: its layers cannot be known"
        )
    reader = Reader(model)
    decisions = reader.fold()
    new = Builder(reader.changes).build(model)
    before, after = (sum(1 for _ in leaves_of(m)) for m in (model, new))
    return new, ModelReport(tuple(decisions), before, after, model.count_params(), new.count_params())


# Single layers --------------------------------------------------------------------------------------------------


def from_layer(layer: Any) -> BatchNorm:
    """Return a fastbn.BatchNorm that does what a Keras BatchNormalization does.

    y = γ·(x - μ)/√(σ² + ε) + β (Ioffe & Szegedy 2015, Algorithms 1 and 2), moving = (1 - m)·moving + m·batch.

    Parameters
    ----------
    layer : keras.layers.BatchNormalization
        Built, without renorm.

    Returns
    -------
    BatchNorm
        In inference mode, where a Keras layer is when called; its own arrays, in the dtype of the layer's variables
        (float32 for half types). momentum is 1 - m: Keras's m weighs the old value. unbiased=False: Keras's moving
        variance is that of σ². With one of scale and center only, γ = 1 or β = 0 becomes a parameter.

    Raises
    ------
    TypeError
        `layer` is no BatchNormalization.
    ValueError
        It is not built, or has renorm=True; epsilon is not positive.
    """
    if not isinstance(layer, keras.layers.BatchNormalization):
        raise TypeError(f"layer: expected a keras.layers.BatchNormalization, got {type(layer).__name__}")
    if not layer.built:
        raise ValueError(f"layer: expected one that is built, got {layer.name!r}, which has no variables yet")
    if getattr(layer, "renorm", False):
        raise ValueError(f"layer: expected renorm=False, got {layer.name!r} with renorm=True")
    params = params_of(layer)
    affine = params.gamma is not None or params.beta is not None
    bn = BatchNorm(
        len(params.mean), axis=layer.axis, eps=params.eps, momentum=1 - layer.momentum, affine=affine, unbiased=False,
        dtype=params.mean.dtype,
    )  # fmt: skip
    for new, old in (bn.gamma, params.gamma), (bn.beta, params.beta), (bn.running_mean, params.mean), \
            (bn.running_var, params.var):  # fmt: skip
        if new is not None and old is not None:
            new[...] = old
    return bn.eval()


def to_layer(bn: BatchNorm, *, ndim: int = 2) -> Any:
    """Return a Keras BatchNormalization, built and with its weights, that does what a fastbn.BatchNorm does.

    y = γ·(x - μ)/√(σ² + ε) + β (Ioffe & Szegedy 2015, Algorithms 1 and 2), moving = m·moving + (1 - m)·batch.

    Parameters
    ----------
    bn : BatchNorm
        With running statistics and without activation.
    ndim : int
        Axes of the inputs: a Keras layer is built for one number of them.

    Returns
    -------
    keras.layers.BatchNormalization
        Its momentum is 1 - bn.momentum: Keras's weighs the old value. Its moving variance is bn.running_var as it
        is; one with unbiased=True held σ²·m/(m - 1) and goes on with σ² if trained further, as Keras knows only that.

    Raises
    ------
    TypeError
        `bn` is no BatchNorm.
    ValueError
        momentum=None (a cumulative average), which Keras does not know; no running statistics; an activation;
        `ndim` axes do not hold bn.axis.
    """
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn: expected a fastbn.BatchNorm, got {type(bn).__name__}")
    if bn.momentum is None:
        raise ValueError("momentum: expected a number, got None (a cumulative average), which Keras does not know")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn: expected running statistics, got track_running_stats=False, which Keras does not know")
    if bn.activation is not None:
        raise ValueError(f"bn: expected no activation, got {bn.activation!r}: Keras needs a layer of its own for it")
    if not -ndim <= bn.axis < ndim:
        raise ValueError(f"ndim: expected so many axes that axis {bn.axis} is one, got {ndim}")
    layer = keras.layers.BatchNormalization(
        axis=bn.axis, momentum=1 - bn.momentum, epsilon=bn.eps, scale=bn.affine, center=bn.affine, dtype=bn.dtype.name
    )
    shape: list[int | None] = [None] * ndim
    shape[bn.axis] = bn.num_features
    layer.build(tuple(shape))
    arrays = [bn.gamma, bn.beta] if bn.affine else []
    layer.set_weights([*arrays, bn.running_mean, bn.running_var])
    return layer
