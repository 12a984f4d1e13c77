"""fastbn.nn: gradients, training, recalibration, folding and files."""

import io
import json
import re
import signal
import sys
import threading
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import U32, U64, assert_within, bits

import fastbn
from fastbn import nn

F64 = {"dtype": np.float64}
LOSSES = "softmax_cross_entropy", "binary_cross_entropy", "mse"


def data(n=24, n_in=3, n_out=2, loss="mse", dtype=np.float64, seed=0):
    rng = np.random.default_rng([seed, n, n_in])
    x = rng.normal(0.5, 2, (n, n_in)).astype(dtype)
    y = {"mse": rng.normal(size=(n, n_out)), "softmax_cross_entropy": rng.integers(0, n_out, n)}
    return x, y.get(loss, rng.integers(0, 2, (n, n_out)))


def net(seed=0, dtype=np.float64, n_out=2, *last):
    """BN before an activation and after one."""
    return nn.Sequential(
        nn.Dense(3, 5, bias=False, dtype=dtype), nn.BatchNorm(5, dtype=dtype), nn.ReLU(), nn.Dense(5, 4, dtype=dtype),
        nn.Tanh(), nn.BatchNorm(4, dtype=dtype), nn.Dense(4, n_out, dtype=dtype), *last, seed=seed,
    )  # fmt: skip


def randomize(layers, seed=0):
    """Give biases, BatchNorm parameters and running statistics values that are nothing special."""
    rng = np.random.default_rng(seed)
    for layer in layers:
        if isinstance(layer, nn.Dense) and layer.bias is not None:
            layer.bias = rng.normal(size=layer.n_out)
        if isinstance(layer, nn.BatchNorm):
            layer.gamma[...], layer.beta[...], layer.running_mean[...] = rng.normal(size=(3, layer.n_out))
            layer.running_var[...] = rng.uniform(0.1, 4, layer.n_out)
    return layers


def snapshot(model):
    return {name: bits(array) for name, array in model.state_dict().items()} | {"training": model.training}


class Recorder:
    """An optimizer that keeps the gradients and steps nowhere."""

    def step(self, grads):
        self.grads = [g.copy() for g in grads]


def sgd(model, lr=0.1):
    return fastbn.optim.SGD(model.parameters(), lr=lr)


def fit(model, x, y, **options):
    defaults = {"loss": "mse", "optimizer": Recorder(), "progress": False, "batch_size": 8}
    return model.fit(x, y, **defaults | options)


# ---- gradients: central differences D(h) ---------------------------------------------------------------------

STEP = 2.0**-16


def assert_gradients(function, arrays, gradients, size):
    """Hold gradients to D(h) ± (|D(2h) − D(h)| + 32·u·size/h).

    The truncation error of D is c·h², a third of D(2h) − D(h); `function` adds terms of total magnitude `size`,
    each to within some 32 u.
    """
    for array, gradient in zip(arrays, gradients, strict=True):
        assert gradient.shape == array.shape
        assert gradient.dtype == array.dtype
        for index in np.ndindex(array.shape):
            kept, quotients = array[index], []
            for h in (STEP, 2 * STEP):
                ends = []
                for point in (kept + h, kept - h):
                    array[index] = point
                    ends.append(function())
                quotients.append((ends[0] - ends[1]) / (2 * h))
            array[index] = kept
            bound = abs(quotients[1] - quotients[0]) + 32 * U64 * size / STEP
            assert abs(gradient[index] - quotients[0]) <= bound, (index, gradient[index], quotients, bound)


def fitted_standardizer():
    return nn.Standardizer(fastbn.Standardizer().fit(data(9, 3)[0]))


@pytest.mark.parametrize("mode", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Dense(3, 2, **F64), lambda: nn.Dense(3, 2, bias=False, **F64), nn.ReLU, nn.Sigmoid, nn.Tanh,
        lambda: nn.BatchNorm(3, **F64), lambda: nn.BatchNorm(3, activation="relu", **F64),
        lambda: nn.BatchNorm(3, affine=False, **F64), fitted_standardizer, net,
    ],
)  # fmt: skip
def test_gradients_of_layers(make, mode):
    layer = make()
    for part in [layer] if isinstance(layer, nn.Layer) else layer:
        if isinstance(part, nn.Dense):
            part.draw(np.random.default_rng(0))
        if getattr(part, "affine", True):
            randomize([part])
    x = data(7, 3)[0]
    layer.train(mode)
    weights = np.random.default_rng(2).normal(size=layer(x).shape)
    dx = layer.backward(weights)
    arrays, gradients = [x, *layer.parameters()], [dx, *(g.copy() for g in layer.gradients())]
    size = np.abs(weights).sum() * (1 + np.abs(layer(x)).max())
    assert_gradients(lambda: (weights * layer(x)).sum(), arrays, gradients, size)


@pytest.mark.parametrize("make", [lambda *last: nn.Sequential(nn.Dense(3, 2, **F64), *last, seed=0),
                                  lambda *last: net(0, np.float64, 2, *last)], ids=["dense", "net"])  # fmt: skip
@pytest.mark.parametrize(("loss", "last"), [*((loss, ()) for loss in LOSSES), (LOSSES[1], (nn.Sigmoid,))])
def test_gradients_of_losses(make, loss, last):
    x, y = data(12, loss=loss)
    model, recorder = make(*(kind() for kind in last)), Recorder()
    randomize(model)

    def value():
        return fit(model, x, y, loss=loss, optimizer=recorder, batch_size=len(x), seed=0)["loss"][0]

    size = 1 + value() + np.abs(model.predict(x)).max() ** 2
    assert_gradients(value, model.parameters(), recorder.grads, size)


def test_losses_are_the_textbook_ones_and_finite_at_extremes():
    z = np.array([[1000.0, -1000.0], [0.0, 0.0]])
    identity = nn.Sequential(nn.Dense(2, 2, bias=False, **F64))
    identity[0].weight = np.eye(2)
    for loss, y, value, accuracy in ((LOSSES[0], [1, 0], (2000 + np.log(2)) / 2, 0.5),
                                     (LOSSES[1], [[0, 0], [1, 1]], (1000 + 2 * np.log(2)) / 4, 0.25)):  # fmt: skip
        actual = identity.evaluate(z, y, loss=loss)
        assert abs(actual[0] - value) <= 4 * U64 * value
        assert actual[1] == accuracy
    assert identity.evaluate(z, z + 2, loss="mse") == (4.0, None)
    assert identity.evaluate([[0.25, -0.25]], [[1, 0]], loss=LOSSES[1])[1] == 1  # decided at 0
    one_hot = identity.evaluate(z, np.eye(2)[[1, 0]], loss=LOSSES[0])
    assert one_hot == identity.evaluate(z, [1, 0], loss=LOSSES[0])
    probabilities = nn.Sequential(*identity.layers, nn.Sigmoid())
    for y in ([[0, 0], [1, 1]], [[1, 0], [0, 1]]):  # a Sigmoid at the end is part of the loss
        assert probabilities.evaluate(z, y, loss=LOSSES[1]) == identity.evaluate(z, y, loss=LOSSES[1])
    assert nn.softmax(z).tolist() == [[1, 0], [0.5, 0.5]]
    assert nn.Sigmoid()(z).tolist() == [[1, 0], [0.5, 0.5]]


# ---- folding ---------------------------------------------------------------------------------------------------

KINDS = "dense", "dense without bias", "bn", "bn with relu", "relu", "sigmoid", "tanh"
FUNCTIONS = {
    "ReLU": (lambda z: np.maximum(z, 0), 1), "Sigmoid": (lambda z: 1 / (1 + np.exp(-z)), 0.25), "Tanh": (np.tanh, 1),
}  # fmt: skip


def stack(kinds, widths, dtype, seed):
    """Return (model, x), with parameters and statistics that are nothing special."""
    x = np.random.default_rng(seed).normal(1, 3, (6, widths[0])).astype(dtype)
    layers, width = [], widths[0]
    for kind, n_out in zip(kinds, widths[1:], strict=True):
        if kind == "standardizer":
            layers.append(nn.Standardizer(fastbn.Standardizer().fit(x)))
        elif kind.startswith("dense"):
            layers.append(nn.Dense(width, n_out, bias=kind == "dense", dtype=dtype))
            width = n_out
        elif kind.startswith("bn"):
            layers.append(nn.BatchNorm(width, activation="relu" if kind == "bn with relu" else None, dtype=dtype))
        else:
            layers.append({"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[kind]())
    return nn.Sequential(*randomize(layers, seed), seed=seed), x


def exact(model, x):
    """Return the model's outputs at inference, and the bound of an evaluation in x's precision, folded or not.

    Through affine layers the magnitudes M add up as |A|·M + |c|; of k additions and products each is within k·u·M.
    The activations pass an error on times their Lipschitz constant and add 8u|y|.
    """
    u = U32 if x.dtype == np.float32 else U64
    wide = np.longdouble
    y = x.astype(wide)
    size, error = np.abs(y), np.zeros(y.shape, wide)
    for layer in model:
        name = type(layer).__name__
        if name == "Dense":
            weight, shift = layer.weight.astype(wide), 0 if layer.bias is None else layer.bias.astype(wide)
            y, size, error = y @ weight.T + shift, size @ abs(weight).T + abs(shift), error @ abs(weight).T
            error += (layer.n_in + 4) * u * size
        elif name in ("BatchNorm", "Standardizer"):
            if name == "BatchNorm":
                mean, shift = layer.running_mean.astype(wide), layer.beta.astype(wide)
                scale = layer.gamma / np.sqrt(layer.running_var.astype(wide) + layer.eps)
            else:
                mean, shift, scale = layer.mean_, 0, 1 / layer.scale_.astype(wide)
            y, size = (y - mean) * scale + shift, (size + abs(mean)) * abs(scale) + abs(shift)
            error = error * abs(scale) + (layer.n_in + 8) * u * size
        activation = "ReLU" if getattr(layer, "activation", None) == "relu" else name
        if activation in FUNCTIONS:
            function, slope = FUNCTIONS[activation]
            y = function(y)
            error = slope * error + 8 * u * np.abs(y)
            size = np.abs(y) + error
    return y, error


@st.composite
def stacks(draw):
    """Any order of layers, a Standardizer only first."""
    first = ["standardizer"] if draw(st.booleans()) else []
    kinds = first + draw(st.lists(st.sampled_from(KINDS), min_size=not first, max_size=7))
    widths = draw(st.lists(st.integers(1, 5), min_size=len(kinds) + 1, max_size=len(kinds) + 1))
    return stack(kinds, widths, draw(st.sampled_from([np.float32, np.float64])), draw(st.integers(0, 2**32)))


@given(stacks())
def test_fold_is_the_same_function(problem):
    assert_folds(*problem)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("kinds", "folded"),
    [
        ("standardizer bn bn dense bn relu dense", "Dense ReLU Dense"),
        ("bn bn dense without bias", "Dense"),
        ("dense without bias bn relu bn dense", "Dense ReLU Dense"),
        ("dense tanh bn", "Dense Tanh Dense"),
        ("dense bn with relu bn with relu dense", "Dense ReLU Dense ReLU Dense"),
        ("bn sigmoid bn bn", "Dense Sigmoid Dense"),
        ("standardizer", "Dense"),
        ("relu", "ReLU"),
    ],
)
def test_fold_of_stacks_that_matter(kinds, folded, dtype):
    kinds = re.findall("dense without bias|bn with relu|[a-z]+", kinds)
    model, x = stack(kinds, range(3, 4 + len(kinds)), dtype, 0)
    assert_folds(model, x)
    assert [type(layer).__name__ for layer in model.fold()] == folded.split()


def assert_folds(model, x):
    before = snapshot(model)
    folded = model.fold()
    assert {type(layer) for layer in folded} <= {nn.Dense, nn.ReLU, nn.Sigmoid, nn.Tanh}
    assert not folded.training
    expected, bound = exact(model, x)
    assert_within(model.predict(x), expected, bound, "model")
    assert_within(folded.predict(x), expected, bound, "folded")
    own = [value for layer in model for value in vars(layer).values() if isinstance(value, np.ndarray)]
    assert not any(np.shares_memory(a, b) for a in folded.parameters() for b in own)
    assert not {id(layer) for layer in folded} & {id(layer) for layer in model}
    assert snapshot(model) == before


def test_a_constant_feature_folds_with_scale_one():
    x = np.array([[1.0, 7.0], [3.0, 7.0], [3.0, 7.0]])
    model = nn.Sequential(nn.Standardizer().fit(x), nn.Dense(2, 3, **F64), seed=0)
    expected, bound = exact(model, x)
    assert_within(model.fold().predict(x), expected, bound)


def test_fold_refuses_what_it_cannot():
    with pytest.raises(ValueError, match=r"layers\[0\] \(Standardizer\).*fit"):
        nn.Sequential(nn.Standardizer(), nn.Dense(2, 1)).fold()
    with pytest.raises(ValueError, match=r"layers\[1\] \(BatchNorm\).*track_running_stats"):
        nn.Sequential(nn.Dense(2, 2), nn.BatchNorm(2, track_running_stats=False)).fold()
    model = nn.Sequential(nn.BatchNorm(1), nn.Dense(1, 1))
    model[0].gamma[...], model[1].weight = 1e30, [[1e30]]
    with pytest.raises(ValueError, match=r"layers\[1\] \(Dense\).*inf"):
        model.fold()


# ---- training --------------------------------------------------------------------------------------------------


def blobs(n=120, dtype=np.float32):
    rng = np.random.default_rng(5)
    labels = np.arange(n) % 3
    centres = np.array([[0, 0, 900], [40, 0, 900], [0, 40, 900]])
    return (centres[labels] + rng.normal(0, 4, (n, 3))).astype(dtype), labels


def classifier(seed=0, dtype=np.float32):
    return nn.Sequential(nn.Standardizer(), *net(seed, dtype, 3), seed=seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_training_learns_and_repeats(dtype):
    x, y = blobs(dtype=dtype)
    runs = []
    for seed in (0, 0, 1):
        model = classifier(seed, dtype)
        adam = fastbn.optim.Adam(model.parameters(), lr=0.02)
        options = {"loss": LOSSES[0], "optimizer": adam, "epochs": 15, "validation_data": (x[:30], y[:30])}
        history = fit(model, x, y, **options)
        assert list(history) == ["loss", "accuracy", "val_loss", "val_accuracy"]
        assert [len(values) for values in history.values()] == [15] * 4
        assert history is model.history
        assert not model.training
        loss, accuracy = model.evaluate(x, y, loss=LOSSES[0])
        assert accuracy >= 0.95
        assert history["val_loss"][-1] == model.evaluate(x[:30], y[:30], loss=LOSSES[0])[0]
        assert loss < history["loss"][0]
        runs.append((history, snapshot(model)))
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]
    assert runs[0][1] != runs[2][1]


def test_dense_layers_are_drawn_for_the_activation_that_follows():
    def he(rng, n_in, n_out):
        return rng.normal(0, np.sqrt(2 / n_in), (n_out, n_in))

    def glorot(rng, n_in, n_out):
        return rng.uniform(-np.sqrt(6 / (n_in + n_out)), np.sqrt(6 / (n_in + n_out)), (n_out, n_in))

    for following, scheme in (
        ([], glorot), ([nn.ReLU()], he), ([nn.BatchNorm(2), nn.ReLU()], he), ([nn.BatchNorm(2, activation="relu")], he),
        ([nn.Sigmoid()], glorot), ([nn.Tanh(), nn.ReLU()], glorot), ([nn.BatchNorm(2)], glorot),
        ([nn.Dense(2, 1), nn.ReLU()], glorot),
    ):  # fmt: skip
        for dtype in (np.float32, np.float64):
            drawn = nn.Sequential(nn.Dense(3, 2, dtype=dtype), *following, seed=7)[0]
            assert bits(drawn.weight) == bits(scheme(np.random.default_rng(7), 3, 2).astype(dtype))
            assert not drawn.bias.any()
            assert nn.Sequential(drawn, seed=8)[0].weight is drawn.weight  # weights that are there stay


def test_history_is_the_mean_over_rows_and_targets_of_one_output_may_be_flat():
    x, y = data(9, n_out=1)
    model = nn.Sequential(nn.Dense(3, 1, **F64), seed=0)
    for loss, targets in (("mse", y), (LOSSES[1], y > 0)):
        history = fit(model, x, targets[:, 0], loss=loss, batch_size=4)  # 4 + 4 + 1 rows, nothing learnt
        expected = model.evaluate(x, targets, loss=loss)
        assert abs(history["loss"][0] - expected[0]) <= 32 * U64 * expected[0]
        assert loss == "mse" or abs(history["accuracy"][0] - expected[1]) <= 4 * U64
        assert model.evaluate(x, targets[:, 0], loss=loss) == expected


def test_divergence_is_in_the_history_and_no_warning():
    x, y = data(dtype=np.float32, loss=LOSSES[0])
    model = net(0, np.float32)
    assert not np.isfinite(fit(model, x, y, loss=LOSSES[0], optimizer=sgd(model, 1e38), epochs=3)["loss"][-1])


def test_layers_of_several_dtypes():
    """A float64 BatchNorm, first, on float64 data; Dense layers in float32 behind it."""
    x, y = data(loss=LOSSES[0])
    model = nn.Sequential(nn.BatchNorm(3, **F64), nn.Dense(3, 4), nn.ReLU(), nn.Dense(4, 2, **F64), seed=0)
    history = fit(model, x * 1e-3 + 1e3, y, loss=LOSSES[0], optimizer=sgd(model), epochs=20)
    assert history["loss"][-1] < history["loss"][0]
    assert [p.dtype.char for p in model.parameters()] == list("ddffdd")
    assert [g.dtype.char for g in model.gradients()] == list("ddffdd")
    assert model.predict(x).dtype == np.float64


def test_seed_of_fit_is_the_order_of_the_rows():
    x, y = data()
    models = [net() for _ in range(4)]
    state = models[0].rng.bit_generator.state
    for model, seed in zip(models, (1, 1, 2, None), strict=True):
        fit(model, x, y, optimizer=sgd(model), seed=seed)
    assert snapshot(models[0]) == snapshot(models[1])
    assert snapshot(models[0]) != snapshot(models[2])
    assert models[0].rng.bit_generator.state == state
    assert models[3].rng.bit_generator.state != state


def test_history_without_validation_and_for_mse():
    x, y = data()
    assert {name: len(values) for name, values in fit(net(), x, y, epochs=3).items()} == {"loss": 3}
    assert list(fit(net(), x, y, validation_data=(x, y))) == ["loss", "val_loss"]
    assert list(fit(net(), x, y > 0, loss=LOSSES[1])) == ["loss", "accuracy"]


def test_standardizer_is_fitted_once():
    x, y = blobs()
    model = classifier()
    fit(model, x, y, loss=LOSSES[0])
    assert bits(model[0].mean_) == bits(fastbn.Standardizer().fit(x).mean_)
    fit(model, x + 1, y, loss=LOSSES[0])
    assert bits(model[0].mean_) == bits(fastbn.Standardizer().fit(x).mean_)


def test_a_trailing_row_joins_the_batch_before_only_with_batch_norm():
    x, y = data(9)
    model = net()
    assert np.isfinite(fit(model, x, y, batch_size=4)["loss"]).all()
    assert model[1].num_batches_tracked == 2
    plain = nn.Sequential(nn.Dense(3, 2, **F64), seed=0)
    counting = fastbn.optim.SGD(plain.parameters(), lr=0.01)
    fit(plain, x, y, batch_size=4, optimizer=counting)
    assert counting.state_dict()["step"] == 3


def test_parameters_and_gradients_in_order_and_updated_in_place():
    x, y = data()
    model, layers = net(), net()
    expected = [model[0].weight, model[1].gamma, model[1].beta, model[3].weight, model[3].bias,
                model[5].gamma, model[5].beta, model[6].weight, model[6].bias]  # fmt: skip
    assert all(a is b for a, b in zip(model.parameters(), expected, strict=True))
    assert layers.gradients() == [None] * 9
    recorder = Recorder()
    fit(layers, x, y, optimizer=recorder, batch_size=24, seed=0)
    before = [p.copy() for p in model.parameters()]
    fit(model, x, y, optimizer=sgd(model, 0.5), batch_size=24, seed=0)
    assert all(a is b for a, b in zip(model.parameters(), expected, strict=True))
    for p, old, g, mine in zip(expected, before, recorder.grads, model.gradients(), strict=True):
        assert bits(g) == bits(mine)
        assert_within(p, old - 0.5 * g, 2 * U64 * (np.abs(old) + np.abs(g)))


def test_predict_changes_nothing():
    x, _ = data()
    model = net()
    for mode in (True, False):
        model.train(mode)
        before = snapshot(model)
        assert model.predict(x).shape == (24, 2)
        assert snapshot(model) == before
        assert [layer.training for layer in model] == [mode] * len(model)
    assert bits(model(x)) == bits(model.predict(x))


class Stopping:
    """SGD that raises in step `stop`, before it updates; or lets Ctrl-C arrive in it."""

    def __init__(self, model, stop, error=None):
        self.inner, self.stop, self.error, self.calls = sgd(model, 0.01), stop, error, 0

    def step(self, grads):
        self.calls += 1
        if self.calls == self.stop:
            if self.error is not None:
                raise self.error
            signal.raise_signal(signal.SIGINT)
        self.inner.step(grads)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop"), None])
def test_a_training_cut_short_is_whole_steps_long(error, monkeypatch):
    x, y = data()
    model, whole = net(), net()
    fit(whole, x, y, optimizer=sgd(whole, 0.01), epochs=2, seed=0)  # 3 steps per epoch
    if error is None and threading.current_thread() is not threading.main_thread():
        pytest.skip("only the main thread gets signals")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt if error is None else type(error)):
            fit(model, x, y, optimizer=Stopping(model, 6 if error is None else 7, error), epochs=9, seed=0)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not model.training
    assert not any(layer.training for layer in model)
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in whole.parameters()]
    assert np.isfinite(model.predict(x)).all()
    assert len(model.history["loss"]) == (1 if error is None else 2)


def test_a_second_interrupt_comes_through_at_once():
    class Stuck:
        reached = 0

        def step(self, grads):
            for self.reached in (1, 2, 3):
                signal.raise_signal(signal.SIGINT)

    stuck, handler = Stuck(), signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(net(), *data(), optimizer=stuck)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert stuck.reached == 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ten_steps_are_pytorchs(dtype):
    """Bound: a step's gradients add n·width products, each to within some u; errors add up over the steps."""
    torch = pytest.importorskip("torch")
    n, steps, u = 16, 10, U32 if dtype == np.float32 else U64
    x, y = data(n, loss=LOSSES[0], dtype=dtype)
    model = nn.Sequential(nn.Dense(3, 8, dtype=dtype), nn.BatchNorm(8, dtype=dtype), nn.ReLU(),
                          nn.Dense(8, 2, dtype=dtype), seed=0)  # fmt: skip
    twin = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    twin.to(getattr(torch, np.dtype(dtype).name))
    state = {name: torch.from_numpy(np.array(array)) for name, array in model.state_dict().items()}
    twin.load_state_dict(state)
    fit(model, x, y, loss=LOSSES[0], optimizer=sgd(model), epochs=steps, batch_size=n)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    for name, array in twin.state_dict().items():
        expected, actual = array.numpy(), model.state_dict()[name]
        assert_within(actual, expected, steps * n * 8 * u * max(1, np.abs(expected).max()), name)


# ---- progress --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(monkeypatch, stream, rich):
    """Train with a progress bar on `stream`; return what was written and two figures that belong there."""
    monkeypatch.setattr(sys, "stderr", stream)
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # as if it were not installed
    x, y = data(loss=LOSSES[0])
    history = fit(net(), x, y, loss=LOSSES[0], epochs=2, progress=True, validation_data=(x, y))
    return stream.getvalue(), f"epoch 2/2: loss {history['loss'][1]:.4f}", f"{history['val_accuracy'][1]:.4f}"


def test_progress_is_one_line_in_a_log_without_rich(monkeypatch):
    text, *figures = shown(monkeypatch, io.StringIO(), rich=False)
    assert text.count("\n") == 1
    assert all(figure in text for figure in figures)


def test_progress_is_redrawn_on_a_terminal_without_rich(monkeypatch):
    text, *figures = shown(monkeypatch, Terminal(), rich=False)
    assert (text.count("\n"), text[0], text[-1]) == (1, "\r", "\n")
    assert "epoch 1/2" in text
    assert "[16%]" in text  # one of 2·3 mini-batches
    assert all(figure in text.rpartition("\r")[2] for figure in [*figures, "[100%]"])


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_with_rich(monkeypatch, stream):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    text, *figures = shown(monkeypatch, stream(), rich=True)
    assert all(figure in text for figure in figures)
    assert text.endswith("\n" if stream is io.StringIO else "\x1b[?25h")  # the cursor is back


@pytest.mark.parametrize("rich", [True, False])
def test_a_display_that_fails_stops_no_training(monkeypatch, rich):
    class Broken(Terminal):
        def write(self, text):
            raise OSError("gone")

    assert shown(monkeypatch, Broken(), rich)[0] == ""
    monkeypatch.setattr(sys, "stderr", None)
    fit(net(), *data(), progress=True)


def test_no_progress_writes_nothing(capsys):
    fit(net(), *data(), progress=False)
    assert capsys.readouterr() == ("", "")


# ---- recalibration ---------------------------------------------------------------------------------------------


def chunks(x, *cuts):
    return np.split(x, cuts)


def test_recalibrate_pooled_is_the_moments_of_what_reaches_each_layer():
    x = data(40)[0]
    model = net()
    randomize(model)
    assert model.recalibrate(iter(chunks(x, 7, 8, 30))) is model
    for index in (1, 5):
        inputs = nn.Sequential(*model.layers[:index]).predict(x)
        bn = model[index]
        mean, var = inputs.mean(axis=0), inputs.var(axis=0, ddof=int(bn.unbiased))
        size = np.abs(inputs).max(axis=0)
        assert_within(bn.running_mean, mean, 4 * len(x) * U64 * size, "mean")
        assert_within(bn.running_var, var, 8 * len(x) * U64 * size**2, "variance")


def test_recalibrate_paper_averages_unbiased_variances_of_training_batches():
    batches = chunks(data(40)[0], 7, 20)
    model = net()
    randomize(model)
    twin = net()
    twin.load_state_dict(model.state_dict())
    model.eval().recalibrate(batches, method="paper")
    assert [(layer.training, getattr(layer, "num_batches_tracked", 0)) for layer in model] == [(False, 0)] * 7
    twin.train()
    for index in (1, 5):  # what reaches the second has passed the first with each batch's own statistics
        inputs = [nn.Sequential(*twin.layers[:index])(x) for x in batches]
        size = np.max([np.abs(z).max(axis=0) for z in inputs], axis=0)
        bound = 40 * 8 * U64
        assert_within(model[index].running_mean, np.mean([z.mean(0) for z in inputs], axis=0), bound * size)
        var = np.mean([z.var(0) * len(z) / (len(z) - 1) for z in inputs], axis=0)
        assert_within(model[index].running_var, var, bound * size**2)


def test_recalibrate_that_fails_in_a_later_layer_changes_no_earlier_one():
    model = nn.Sequential(nn.BatchNorm(3), nn.BatchNorm(3, track_running_stats=False))
    before = snapshot(model)
    with pytest.raises(ValueError, match="running statistics"):
        model.recalibrate([data()[0]])
    assert snapshot(model) == before


def failing():
    yield data(8)[0]
    raise RuntimeError("gone")


@pytest.mark.parametrize(
    ("batches", "method", "error", "words"),
    [
        (failing, "pooled", RuntimeError, "gone"),
        (failing, "paper", RuntimeError, "gone"),
        (lambda: [data(8)[0]], "mean", ValueError, "method: expected 'pooled' or 'paper', got 'mean'"),
        (lambda: [data(8)[0], data(8, 2)[0]], "pooled", ValueError, "batches[1]: expected shape (N, 3)"),
        (lambda: [data(8)[0], data(1)[0]], "paper", ValueError, "2 or more"),
        (lambda: 3, "pooled", TypeError, ""),
        (lambda: 3, "pooled", TypeError, "batches: expected an iterable of arrays, got int"),
        (lambda: [], "pooled", None, ""),
    ],
)
def test_recalibrate_that_fails_changes_nothing(batches, method, error, words):
    model = net()
    randomize(model)
    before = snapshot(model)
    if error is None:
        model.recalibrate(batches(), method)
    else:
        with pytest.raises(error) as caught:
            model.recalibrate(batches(), method)
        assert words in str(caught.value)
    assert snapshot(model) == before


# ---- files -----------------------------------------------------------------------------------------------------


def trained(dtype=np.float32):
    x, y = blobs(dtype=dtype)
    model = classifier(0, dtype)
    fit(model, x, y, loss=LOSSES[0], optimizer=sgd(model))
    return model, x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_save_and_load_are_bit_equal(tmp_path, dtype):
    model, x = trained(dtype)
    last = [nn.BatchNorm(3, activation="relu", momentum=None, affine=False), nn.Sigmoid(), nn.Tanh()]
    for number, source in enumerate([model, model.fold(), nn.Sequential(*model.layers, *last).eval(),
                                     nn.Sequential(nn.Standardizer(), nn.Dense(2, 1))]):  # fmt: skip
        path = tmp_path / f"{number}.model"
        source.save(path)
        loaded = nn.load(str(path))
        assert not loaded.training
        assert repr(loaded) == repr(source)
        assert snapshot(loaded.eval()) == snapshot(source.eval())
        if source.layers[0].n_in == 3:
            assert bits(loaded.predict(x)) == bits(source.predict(x))
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("where", ["zipfile.ZipFile.open", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch, where, error):
    path = tmp_path / "m.npz"
    trained()[0].save(path)
    before = path.read_bytes()

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(where, fail)
    with pytest.raises(error):
        net().save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


OPENED = []


class Trap:
    def __reduce__(self):
        return OPENED.append, (1,)


def objects(arrays):
    arrays["1.weight"] = np.full(arrays["1.weight"].shape, Trap(), object)


def architecture(change):
    def edit(arrays):
        content = json.loads(str(arrays["architecture"]))
        change(content)
        arrays["architecture"] = np.array(json.dumps(content))

    return edit


def setting(name, change):
    return lambda arrays: arrays.update({name: change(arrays.get(name))})


DAMAGED_BYTES = {
    "empty": lambda old: b"",
    "not a zip": lambda old: b"no model " * 100,
    "cut short": lambda old: old[: len(old) // 2],
    "without its end": lambda old: old[:-1],
    "another zip": lambda old: b"PK\x05\x06" + bytes(18),
    "one bit": lambda old: old.replace(b"NUMPY\x01\x00", b"NUMPY\x09\x00", 1),
}
DAMAGED_ARRAYS = {
    "missing": (lambda a: a.pop("1.weight"), "1.weight"),
    "no architecture": (lambda a: a.pop("architecture"), "architecture"),
    "superfluous": (setting("9.weight", lambda _: np.zeros(1)), "9.weight"),
    "shape": (setting("1.weight", lambda w: w.T.copy()), "1.weight"),
    "dtype": (setting("1.weight", lambda w: w.astype(np.float64)), "1.weight"),
    "complex": (setting("1.weight", lambda w: w.astype(np.complex64)), "1.weight"),
    "objects": (objects, "never unpickled"),
    "architecture of objects": (setting("architecture", lambda _: np.array(Trap(), object)), "architecture"),
    "negative squares": (setting("0.m2", lambda m: -1 - m), "m2"),
    "negative count": (setting("0.count", lambda c: -c), "count"),
    "not JSON": (setting("architecture", lambda _: np.array("{")), ""),
    "version": (architecture(lambda c: c.update(version=2)), "version"),
    "format": (architecture(lambda c: c.update(format="other")), "format"),
    "layer": (architecture(lambda c: c["layers"][1].update(type="os.system")), "layers[1]"),
    "option": (architecture(lambda c: c["layers"][1].update(n_in=0)), "layers[1]"),
    "huge": (architecture(lambda c: c["layers"][1].update(n_in=2**60)), "1.weight"),
    "no option": (architecture(lambda c: c["layers"][1].pop("dtype")), "layers[1]"),
    "unknown option": (architecture(lambda c: c["layers"][1].update(colour=1)), "colour"),
    "width": (architecture(lambda c: c["layers"].pop()), "7.weight"),
    "layers": (architecture(lambda c: c.update(layers=3)), ""),
    "layer kind": (architecture(lambda c: c["layers"].insert(0, 3)), ""),
}


def assert_refused(path, words=""):
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{re.escape(words)}"):
        nn.load(path)
    assert OPENED == []


@pytest.mark.parametrize("damage", DAMAGED_BYTES)
def test_damaged_bytes_are_refused(tmp_path, damage):
    path = tmp_path / "m.npz"
    trained()[0].save(path)
    path.write_bytes(DAMAGED_BYTES[damage](path.read_bytes()))
    assert_refused(path)


def test_an_array_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "m.npz"
    trained()[0].save(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("1.weight.npy", archive.read("1.weight.npy"))
    assert_refused(path, "there twice")


def test_a_changed_weight_fails_its_checksum(tmp_path):
    path = tmp_path / "m.npz"
    model = trained()[0]
    model.save(path)
    weight = bits(model[1].weight)
    path.write_bytes(path.read_bytes().replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))
    assert_refused(path, "CRC")


@pytest.mark.parametrize("flip", [0x01, 0x80, 0xFF])
def test_no_flipped_byte_gives_another_model(tmp_path, flip):
    """Bytes that mean nothing (a time, an attribute) may differ; any other is noticed."""
    path = tmp_path / "m.npz"
    model = nn.Sequential(nn.Standardizer(), nn.Dense(1, 2, bias=False), nn.BatchNorm(2), nn.ReLU(), seed=0).eval()
    model[0].fit([[1.0], [2.0]])
    model.save(path)
    good, loaded, messages = path.read_bytes(), [], []
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ flip]) + good[place + 1 :])
        try:
            loaded.append(nn.load(path))
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert len(messages) > len(loaded)
    assert all(snapshot(other) == snapshot(model) and repr(other) == repr(model) for other in loaded)


@pytest.mark.parametrize("damage", DAMAGED_ARRAYS)
def test_damaged_models_are_refused(tmp_path, damage):
    path = tmp_path / "m.npz"
    trained()[0].save(path)
    with np.load(path) as file:
        arrays = dict(file)
    edit, words = DAMAGED_ARRAYS[damage]
    edit(arrays)
    np.savez(path, **arrays)
    assert_refused(path, words)


def test_a_file_of_the_other_byte_order_is_the_same_model(tmp_path):
    path = tmp_path / "m.npz"
    model = trained()[0]
    model.save(path)
    with np.load(path) as file:
        arrays = {name: array.astype(array.dtype.newbyteorder()) for name, array in file.items()}
    np.savez(path, **arrays)
    assert snapshot(nn.load(path)) == snapshot(model)


def test_paths(tmp_path):
    with pytest.raises(FileNotFoundError):
        nn.load(tmp_path / "none.npz")
    for name in ("none/m.npz", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises((FileNotFoundError, IsADirectoryError, PermissionError), match="folder|none") as caught:
            net().save(tmp_path / name)
        assert str(caught.value).endswith(f": {str(tmp_path / name)!r}")  # and not the name while it is written
    (tmp_path / "folder").rmdir()
    for call in (nn.load, net().save):
        with pytest.raises(TypeError, match="path"):
            call(3)
    net().save(str(tmp_path / "m.npz").encode())
    assert [path.name for path in tmp_path.iterdir()] == ["m.npz"]


def test_a_state_that_does_not_fit_changes_nothing():
    model = classifier()
    before = snapshot(model)
    good = trained()[0].state_dict()
    shorter = {name: array for name, array in good.items() if name != "7.bias"}
    changes = {"9.weight": np.zeros(1)}, {"7.weight": np.zeros((2, 2))}, {"3": 0}, {"7.bias": np.ones(3, complex)}
    changes += ({"2.num_batches_tracked": -1},)
    for state in (shorter, *(good | change for change in changes)):
        with pytest.raises(ValueError, match="state|expected"):
            model.load_state_dict(state)
        assert snapshot(model) == before
    with pytest.raises(TypeError, match="state"):
        model.load_state_dict([1])
    held = model.parameters()
    model.load_state_dict(good)
    model[1].weight = np.array(good["1.weight"])
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))  # an optimizer may hold them
    assert snapshot(model.eval()) == snapshot(trained()[0])


# ---- bad arguments ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nn.Sequential(), ValueError, "layers: expected at least one"),
        (lambda: nn.Sequential(nn.ReLU), TypeError, "layers[0]"),
        (lambda: nn.Sequential(fastbn.BatchNorm(2)), TypeError, "layers[0]"),
        (lambda: nn.Sequential(*[nn.ReLU()] * 2), ValueError, "layers[1]: expected each layer once"),
        (lambda: nn.Sequential(nn.ReLU(), nn.Standardizer()), ValueError, "layers[1]: expected the Standardizer first"),
        (lambda: nn.Sequential(nn.Dense(2, 3), nn.ReLU(), nn.Dense(2, 1)), ValueError, "layers[2]: expected n_in 3"),
        (lambda: nn.Sequential(nn.Dense(2, 3), nn.BatchNorm(2)), ValueError, "layers[1]: expected n_in 3"),
        (lambda: nn.Sequential(nn.ReLU(), seed=-1), ValueError, "seed"),
        (lambda: nn.Sequential(nn.ReLU(), seed="a"), TypeError, "seed"),
        (lambda: nn.Dense(0, 1), ValueError, "n_in"),
        (lambda: nn.Dense(1, 2.0), TypeError, "n_out"),
        (lambda: nn.Dense(True, 1), TypeError, "n_in"),
        (lambda: nn.Dense(1, 1, bias=1), TypeError, "bias"),
        (lambda: nn.Dense(1, 1, dtype=np.float16), ValueError, "dtype"),
        (lambda: nn.Dense(1, 1, dtype="f99"), TypeError, "dtype"),
        (lambda: setattr(nn.Dense(2, 1), "weight", [1.0]), ValueError, "weight: expected shape (1, 2)"),
        (lambda: setattr(nn.Dense(2, 1, bias=False), "bias", [1.0]), ValueError, "bias"),
        (lambda: nn.Dense(2, 1).draw(np.random.default_rng(0), "lecun"), ValueError, "scheme"),
        (lambda: nn.BatchNorm(2, axis=0), ValueError, "axis"),
        (lambda: nn.Standardizer(3), TypeError, "scaler"),
        (lambda: nn.Standardizer(fastbn.Standardizer()), ValueError, "scaler"),
        (lambda: nn.softmax([1.0]), ValueError, "logits"),
        (lambda: nn.Dense(2, 1).backward([[1.0]]), ValueError, "backward"),
        (lambda: nn.ReLU().backward([[1.0]]), ValueError, "backward"),
        (lambda: net()(np.zeros((4, 2))), ValueError, "x: expected shape (N, 3), got (4, 2)"),
        (lambda: net().predict(np.zeros(3)), ValueError, "x: expected shape (N, 3)"),
        (lambda: net().predict(np.zeros((4, 3), complex)), TypeError, "x"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


X = data()[0]
LABELS = data(loss=LOSSES[0])[1]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"loss": "hinge"}, ValueError, "loss: expected 'softmax_cross_entropy', 'binary_cross_entropy', 'mse', got"),
        ({"loss": None}, ValueError, "'mse'"),
        ({"y": LABELS + 1}, ValueError, "y: expected class labels from 0 to 1, got 2"),
        ({"y": LABELS - 1}, ValueError, "got -1"),
        ({"y": LABELS * 1.0}, TypeError, "y: expected integer class labels"),
        ({"y": LABELS[1:]}, ValueError, "y: expected shape (24,)"),
        ({"y": [[1], [0, 1]]}, ValueError, "y: expected an array, got list"),
        ({"y": np.ones((24, 2))}, ValueError, "y: expected one-hot rows"),
        ({"y": LABELS, "loss": "mse"}, ValueError, "y: expected shape (24, 2)"),
        ({"y": X[:, :2], "loss": LOSSES[1]}, ValueError, "y: expected labels 0 and 1"),
        ({"y": np.full((24, 2), "a"), "loss": "mse"}, TypeError, "y: expected real numbers"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"epochs": 1.0}, TypeError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"batch_size": 1}, ValueError, "batch_size: expected at least 2 rows"),
        ({"batch_size": True}, TypeError, "batch_size"),
        ({"progress": "yes"}, TypeError, "progress"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"x": X[:, :2]}, ValueError, "x: expected shape (N, 3), got (24, 2)"),
        ({"x": X[:0], "y": LABELS[:0]}, ValueError, "x: expected at least one row"),
        ({"x": X[:1], "y": LABELS[:1]}, ValueError, "x: expected at least 2 rows"),
        ({"validation_data": X}, TypeError, "validation_data"),
        ({"validation_data": (X[:, :2], LABELS)}, ValueError, "validation_data[0]"),
        ({"validation_data": (X, LABELS + 5)}, ValueError, "validation_data[1]"),
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"optimizer": sgd(net())}, ValueError, "optimizer: expected one built with this model's parameters()"),
        ({"optimizer": fastbn.optim.SGD([np.zeros(2)], lr=0.1)}, ValueError, "holds 1 arrays"),
    ],
)
def test_fit_refuses_before_anything_changes(options, error, words):
    model = nn.Sequential(nn.Standardizer(), *net(), seed=0)
    before, state = snapshot(model), model.rng.bit_generator.state
    with pytest.raises(error) as caught:
        fit(model, **{"x": X, "y": LABELS, "loss": LOSSES[0]} | options)
    assert words in str(caught.value)
    assert snapshot(model) == before
    assert model.rng.bit_generator.state == state
