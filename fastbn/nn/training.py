"""The training loop: shuffle, forward, loss, backward, step, once per mini-batch; then validation."""

import numpy as np

from .._core import check
from ..interrupts import interrupt_deferred
from ..preprocessing import as_matrix
from .activations import Sigmoid
from .base import make_rng
from .layers import BatchNorm, Standardizer
from .losses import get_loss
from .progress import Progress


def fit(model, x, y, *, loss, optimizer, epochs, batch_size, validation_data, progress, seed):
    """Train `model`; `Sequential.fit` is the documentation. Everything is checked before anything changes."""
    epochs, batch_size = check.count("epochs", epochs), check.count("batch_size", batch_size)
    if not isinstance(progress, (bool, np.bool_)):
        raise TypeError(f"progress: expected a bool, got {progress!r}")
    rng = model.rng if seed is None else make_rng(seed)
    layers, x, targets = _prepare(model, x, y, loss)
    validation = _prepare_validation(model, validation_data, loss, x.shape[1])
    check_optimizer(model, optimizer)
    has_batch_norm = any(isinstance(layer, BatchNorm) for layer in layers)
    for name, rows in ("x", len(x)), ("batch_size", batch_size):
        if has_batch_norm and rows < 2:
            raise ValueError(f"{name}: expected at least 2 rows where BatchNorm takes a variance, got {rows}")

    if isinstance(model.layers[0], Standardizer) and not model.layers[0].fitted:
        model.layers[0].fit(x)
    names = ["loss"] if get_loss(loss).hits is None else ["loss", "accuracy"]
    names += [f"val_{name}" for name in names] if validation else []
    model.history = history = {name: [] for name in names}
    batches = split(len(x), batch_size, merge_single=has_batch_norm)
    sizes = [rows.stop - rows.start for rows in batches]
    model.train()
    try:
        # A training that diverges shows as inf and nan in the history, not as a stream of warnings
        with np.errstate(over="ignore", invalid="ignore"), Progress(progress, epochs, len(batches)) as bar:
            for _ in range(epochs):
                order, results = rng.permutation(len(x)), []
                for rows in batches:
                    chosen = order[rows]
                    results.append(_train_batch(model, layers, loss, x[chosen], targets[chosen], optimizer))
                    bar.batch()
                figures = np.average(results, axis=0, weights=sizes).tolist()
                figures += _measure(*validation, loss) if validation else []
                with interrupt_deferred():
                    for name, figure in zip(history, figures, strict=True):
                        history[name].append(figure)
                bar.epoch(history)
    finally:
        model.eval()
    return history


def evaluate(model, x, y, loss):
    """Return [loss] or [loss, accuracy] of `model` at inference."""
    return _measure(*_prepare(model, x, y, loss), loss)


def _train_batch(model, layers, loss, x, targets, optimizer):
    """Train on one mini-batch: all of it, or, whatever is raised, nothing."""
    norms = [layer for layer in layers if isinstance(layer, BatchNorm) and layer.track_running_stats]
    before, stepped = [norm.state_dict() for norm in norms], False
    try:
        for layer in layers:
            x = layer(x)
        figures, gradient = _figures(loss, x, targets)
        for layer in reversed(layers):
            gradient = layer.backward(gradient)
        with interrupt_deferred():
            optimizer.step(model.gradients())
            stepped = True
        return figures
    except BaseException:
        if not stepped:
            with interrupt_deferred():
                for norm, state in zip(norms, before, strict=True):
                    norm.load_state_dict(state)
        raise


def _measure(layers, x, targets, loss):
    for layer in layers:
        x = layer.infer(x)
    return _figures(loss, x, targets)[0]


@np.errstate(all="ignore")
def _figures(loss, outputs, targets):
    """Return [loss] or [loss, accuracy], and the gradient of the loss by the outputs."""
    loss = get_loss(loss)
    value, gradient = loss.value_and_gradient(outputs, targets)
    hits = [] if loss.hits is None else [float(loss.hits(outputs, targets).mean())]
    return [float(value), *hits], gradient


def _prepare(model, x, y, loss, names=("x", "y")):
    """Check a data set; return the layers whose output the loss takes, x as floats and the targets."""
    definition = get_loss(loss)
    x = as_matrix(x, model.n_in, names[0])
    if len(x) == 0:
        raise ValueError(f"{names[0]}: expected at least one row, got shape {x.shape}")
    layers = model.layers
    if loss == "binary_cross_entropy" and isinstance(layers[-1], Sigmoid):
        layers = layers[:-1]  # the loss applies the sigmoid itself, where it can do so without overflow
    return layers, x, definition.targets(y, len(x), model.n_out or x.shape[1], names[1])


def _prepare_validation(model, validation_data, loss, n_features):
    if validation_data is None:
        return None
    if not isinstance(validation_data, (tuple, list)) or len(validation_data) != 2:
        raise TypeError(f"validation_data: expected a pair (x, y), got {type(validation_data).__name__}")
    layers, x, targets = _prepare(model, *validation_data, loss, ("validation_data[0]", "validation_data[1]"))
    return layers, as_matrix(x, n_features, "validation_data[0]"), targets


def check_optimizer(model, optimizer):
    """Raise unless `optimizer` can step, and holds the parameters of `model` where it shows what it holds."""
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer: expected one of fastbn.optim, got {type(optimizer).__name__}")
    own, held = model.parameters(), getattr(optimizer, "params", None)
    if held is None:
        return
    if len(held) != len(own) or not all(a is b for a, b in zip(own, held, strict=True)):
        raise ValueError(
            f"optimizer: expected one built with this model's parameters(), {len(own)} arrays, "
            f"got one that holds {len(held)} arrays, other ones"
        )


def split(n, batch_size, merge_single):
    """Return the slices that cut n rows into mini-batches, the last one as long as what is left.

    With `merge_single` a last batch of one row joins the one before it: one value per channel has no
    variance, and leaving the row out would train on less than the data.
    """
    starts = list(range(0, n, batch_size))
    if merge_single and len(starts) > 1 and n - starts[-1] == 1:
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]
