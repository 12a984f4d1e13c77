"""A stack of layers, trained, used, folded and kept as one."""

from .._core import check
from ..interrupts import interrupt_deferred
from ..preprocessing import as_matrix
from . import folding, storage, training
from .activations import ReLU
from .base import Layer, make_rng
from .layers import BatchNorm, Dense, Standardizer


class Sequential:
    """A feed-forward network: each layer takes what the one before it gives.

    Parameters
    ----------
    *layers : Layer
        nn.Dense, nn.BatchNorm (before or after the activation), nn.ReLU, nn.Sigmoid, nn.Tanh; an
        nn.Standardizer can only come first. Each object once.
    seed : None, int or numpy.random.Generator
        From which the weights of new Dense layers are drawn, He et al. (2015) where the next activation is
        ReLU, Glorot & Bengio (2010) otherwise, and the order of the mini-batches after them: with a seed, a
        training is repeatable on the same machine. None takes the operating system's entropy. Layers that
        have weights keep them.

    Attributes
    ----------
    layers : tuple of Layer
        Also `model[i]`, `len(model)` and iteration.
    n_in, n_out : int or None
        Widths, None where the layers leave them open.
    history : dict
        Of the last `fit`, as far as it came.

    Raises
    ------
    TypeError
        For an argument that is not a layer of `fastbn.nn`.
    ValueError
        For no layers, one layer twice, a width that does not fit, a Standardizer that is not first.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> from fastbn import nn
    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(64, 2)).astype(np.float32)
    >>> y = (x[:, 0] > x[:, 1]).astype(int)
    >>> model = nn.Sequential(nn.Dense(2, 8, bias=False), nn.BatchNorm(8), nn.ReLU(), nn.Dense(8, 2), seed=0)
    >>> adam = fastbn.optim.Adam(model.parameters(), lr=0.05)
    >>> history = model.fit(x, y, loss="softmax_cross_entropy", optimizer=adam, epochs=20, progress=False)
    >>> model.evaluate(x, y, loss="softmax_cross_entropy")[1] > 0.95
    True
    >>> model.fold()
    Sequential(
      0: Dense(n_in=2, n_out=8, bias=True, dtype='float32')
      1: ReLU()
      2: Dense(n_in=8, n_out=2, bias=True, dtype='float32')
    )
    """

    def __init__(self, *layers, seed=None):
        self.n_in, self.n_out = _check_layers(layers)
        self.layers = layers
        self.rng = make_rng(seed)
        self.history = {}
        self.training = True
        for index, layer in enumerate(layers):
            if isinstance(layer, Dense) and not layer.drawn:
                layer.draw(self.rng, _scheme(layers[index + 1 :]))

    def __call__(self, x):
        """Return the outputs for `x`, shape (N, n_in), in the current mode; keep what `backward` needs."""
        x = as_matrix(x, self.n_in)
        for layer in self.layers:
            x = layer(x)
        return x

    def backward(self, dy):
        """Return dL/dx given dL/dy for the last call; the parameters' gradients are then in `gradients()`."""
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def parameters(self):
        """Return the arrays that training changes (not copies), layer by layer, for an optimizer to hold."""
        return [parameter for layer in self.layers for parameter in layer.parameters()]

    def gradients(self):
        """Return the gradients from the last `backward` in the order of `parameters()`."""
        return [gradient for layer in self.layers for gradient in layer.gradients()]

    def train(self, mode=True):
        """Set training mode (or, with False, inference) in every layer; return self."""
        with interrupt_deferred():
            self.training = bool(mode)
            for layer in self.layers:
                layer.train() if mode else layer.eval()
        return self

    def eval(self):
        """Set inference mode in every layer; return self."""
        return self.train(False)

    def fit(
        self, x, y, *, loss, optimizer, epochs=1, batch_size=32, validation_data=None, progress=True, seed=None,
    ):  # fmt: skip
        """Train on mini-batches: shuffle, forward, loss, backward, step; return the history.

        Parameters
        ----------
        x : array_like of shape (N, n_in)
        y : array_like
            "softmax_cross_entropy": integer labels (N,) from 0 to n_out − 1, or one-hot rows (N, n_out).
            "binary_cross_entropy": 0 and 1, shape (N, n_out), or (N,) for one output.
            "mse": numbers of the same shapes.
        loss : {"softmax_cross_entropy", "binary_cross_entropy", "mse"}
            The mean over the batch (and over the outputs, for the last two), in float64. Both
            cross-entropies take logits: end with a Dense. For "binary_cross_entropy" the model may also end
            with a Sigmoid, which the loss then takes in and `predict` applies.
        optimizer : object with `step(grads)`
            From `fastbn.optim`, built with this model's `parameters()`, which it updates in place.
        epochs, batch_size : int
            Sweeps over the data; rows per step. A last batch of one row joins the one before it where the
            model has BatchNorm, which needs two for a variance.
        validation_data : pair (x, y), optional
            Measured at inference after each epoch.
        progress : bool
            Show a bar on stderr (rich's, where it is installed).
        seed : None, int or numpy.random.Generator
            For the shuffling; None goes on with the model's own generator.

        Returns
        -------
        dict of lists of float, one value per epoch
            "loss" and, for the cross-entropies, "accuracy", as they were while training (each batch before
            its step, BatchNorm on the batch's statistics); "val_loss", "val_accuracy" with validation data.

        Raises
        ------
        ValueError, TypeError
            For anything above that does not fit, before anything is changed.

        Notes
        -----
        A Standardizer that is not fitted is fitted on x first. The model is left in inference mode. However
        fit ends, the parameters and running statistics are those after a whole number of mini-batches: one that
        Ctrl-C or an error cuts short leaves nothing behind. `model.history` has the epochs until then.
        """
        return training.fit(
            self, x, y, loss=loss, optimizer=optimizer, epochs=epochs, batch_size=batch_size,
            validation_data=validation_data, progress=progress, seed=seed,
        )  # fmt: skip

    def predict(self, x):
        """Return the outputs for `x` at inference, whatever the mode; nothing in the model changes.

        Shape (N, n_out); the last layer's values, so logits where the loss takes logits (`nn.softmax` makes
        probabilities of them).
        """
        x = as_matrix(x, self.n_in)
        for layer in self.layers:
            x = layer.infer(x)
        return x

    def evaluate(self, x, y, *, loss):
        """Return (loss, accuracy) at inference; accuracy is None for "mse". Arguments as for `fit`."""
        value, accuracy = [*training.evaluate(self, x, y, loss), None][:2]
        return value, accuracy

    def recalibrate(self, batches, method="pooled"):
        """Replace the running statistics of every BatchNorm by those of the training data, weights frozen.

        Parameters
        ----------
        batches : iterable of arrays of shape (m, n_in)
            The training data in mini-batches; an iterator is read once.
        method : {"pooled", "paper"}
            "pooled": the exact moments over all rows, layer by layer; what reaches a BatchNorm has passed
            the earlier ones at inference, with their new statistics. So each gets the statistics of the
            very values that it will see in `predict`, and how the data was cut into batches does not
            matter.
            "paper": Ioffe & Szegedy (2015), Algorithm 2, lines 7-10: batches go through the training
            network, so past the earlier ones with their own batch's statistics; the averages are of the
            batch means and of m/(m − 1) times the batch variances.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            For batches that do not fit, and for a BatchNorm with track_running_stats=False. Whatever is
            raised, by `batches` itself too, changes nothing; nor do no batches.
        """
        if not isinstance(method, str) or method not in ("pooled", "paper"):
            raise ValueError(f"method: expected 'pooled' or 'paper', got {method!r}")
        batches = check.iterator("batches", batches, "an iterable of arrays")
        values = [as_matrix(x, self.n_in, f"batches[{i}]") for i, x in enumerate(batches)]
        replacements = []
        for index, layer in enumerate(self.layers):
            forward = layer.infer
            if isinstance(layer, BatchNorm):
                if not layer.track_running_stats:
                    what = "expected running statistics, got none (track_running_stats=False)"
                    raise ValueError(f"layers[{index}] (BatchNorm): {what}")
                renewed = layer.clone()
                renewed.recalibrate(values, method)
                replacements.append((layer, renewed.state_dict()))
                forward = renewed.infer if method == "pooled" else layer.clone().train()
            values = [forward(x) for x in values]
        with interrupt_deferred():
            for layer, state in replacements:
                layer.load_state_dict(state)
        return self

    def fold(self):
        """Return the same function for inference as a new Sequential of Dense and activation layers only.

        A Standardizer and a BatchNorm are affine at inference: one after a Dense goes into it, one before a
        Dense (first in the model, or after an activation) into that one, chains of them too. Where there is
        neither, such as BatchNorm as the last layer after an activation, a diagonal Dense (n, n) takes its
        place. A BatchNorm with an activation leaves that activation behind.

        Returns
        -------
        Sequential
            In inference mode, sharing no memory with this model.

        Raises
        ------
        ValueError
            Where a Standardizer is not fitted, a BatchNorm has no running statistics, or a folded weight is
            larger than its dtype can hold; the message names the layer.

        Notes
        -----
        Weights are folded in float64 and rounded once, so each Dense computes bn(W·x + b) to within
        (n_in + 2)·u·(|W′|·|x| + |b′|), u the unit roundoff of its dtype: as near the exact function as the
        model itself. A folded Standardizer works in the first Dense's dtype where it used float64: with
        |mean| ≫ std, |W′|·|x| and with it the bound grow by |mean|/std.
        """
        return Sequential(*folding.fold(self.layers)).eval()

    def state_dict(self):
        """Return {"<index>.<name>": copy of the array}: the keys of the same torch.nn.Sequential."""
        states = [layer.state_dict() for layer in self.layers]
        return {f"{i}.{name}": array for i, state in enumerate(states) for name, array in state.items()}

    def load_state_dict(self, state):
        """Copy `state`, as from `state_dict`, into the layers; unless it fits, ValueError, nothing changed."""
        storage.load_state(self.layers, state, self.n_in)

    def save(self, path):
        """Write architecture, parameters and statistics to an .npz file at `path`, replacing it in one step.

        `path` is used as it stands. A failed save leaves an earlier file whole. The optimizer, the history
        and the generator's state are not kept. Never a pickle: NumPy arrays, and the architecture as JSON.
        """
        storage.save(self, path)

    def __len__(self):
        return len(self.layers)

    def __getitem__(self, index):
        return self.layers[index]

    def __iter__(self):
        return iter(self.layers)

    def __repr__(self):
        return "Sequential(\n" + "".join(f"  {i}: {layer!r}\n" for i, layer in enumerate(self.layers)) + ")"


def _check_layers(layers):
    """Return the widths (n_in, n_out) of a stack that fits together, or raise."""
    if not layers:
        raise ValueError("layers: expected at least one, got none")
    n_in = width = None
    seen = set()
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        if not isinstance(layer, Layer):
            raise TypeError(f"{name}: expected a layer of fastbn.nn, such as nn.Dense, got {layer!r}")
        if id(layer) in seen:
            raise ValueError(f"{name}: expected each layer once, got one that is in the model already")
        seen.add(id(layer))
        if isinstance(layer, Standardizer) and index > 0:
            raise ValueError(f"{name}: expected the Standardizer first, got it after another layer")
        if width is not None and layer.n_in not in (None, width):
            raise ValueError(f"{name}: expected n_in {width}, as the layer before it gives, got {layer.n_in}")
        n_in = layer.n_in if width is None else n_in
        width = layer.n_out or width
    return n_in, width


def _scheme(following):
    """Return how to draw a Dense before these layers: "he" if the next activation is ReLU, else "glorot"."""
    for layer in following:
        if isinstance(layer, ReLU) or getattr(layer, "activation", None) == "relu":
            return "he"
        if not isinstance(layer, BatchNorm) or layer.activation is not None:
            break
    return "glorot"
