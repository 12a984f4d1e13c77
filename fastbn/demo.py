"""`fastbn demo`: the course's exercise on real data, from raw inputs to a folded network.

The same network is trained (a) on raw inputs, (b) on standardised inputs, (c) on standardised inputs with BatchNorm;
then the best of them is recalibrated, folded into dense layers, compared with the unfolded one and timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits

from . import nn
from .optim import SGD

HIDDEN = (100, 100, 100)  # sigmoid units, as in Ioffe & Szegedy 2015, figure 1
BATCH = 60
LEARNING_RATE = 0.5

Curves = dict[str, np.ndarray]  # history key -> (seeds, epochs)


def _network(*, standardise: bool, batch_norm: bool, seed: int) -> nn.Sequential:
    layers: list[Any] = [nn.Standardizer()] if standardise else []
    width = 64
    for hidden in HIDDEN:
        layers.append(nn.Dense(width, hidden, bias=not batch_norm))
        layers += [nn.BatchNorm(hidden)] if batch_norm else []
        layers.append(nn.Sigmoid())
        width = hidden
    return nn.Sequential(*layers, nn.Dense(width, 10), seed=seed)


VARIANTS: dict[str, dict[str, bool]] = {
    "raw": {"standardise": False, "batch_norm": False},
    "standardised": {"standardise": True, "batch_norm": False},
    "standardised + BN": {"standardise": True, "batch_norm": True},
}


def _data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return x_train, y_train, x_test, y_test: 1,797 images of 8 × 8, a fifth of them for testing."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    x, y = digits.data[order].astype(np.float32), digits.target[order]
    test = len(x) // 5
    return x[test:], y[test:], x[:test], y[:test]


def _train(
    data: tuple[np.ndarray, ...], epochs: int, seeds: int, tick: Callable[[str], None]
) -> tuple[dict[str, Curves], nn.Sequential]:
    """Train every variant from every seed; return their curves, and the last network with BatchNorm."""
    x, y, x_test, y_test = data
    curves: dict[str, Curves] = {}
    for name, variant in VARIANTS.items():
        runs = []
        for seed in range(seeds):
            model = _network(**variant, seed=seed)
            optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
            runs.append(
                model.fit(
                    x, y, loss="softmax_cross_entropy", optimizer=optimizer, epochs=epochs, batch_size=BATCH,
                    validation_data=(x_test, y_test), progress=False,
                )
            )  # fmt: skip
            tick(name)
        curves[name] = {key: np.array([run[key] for run in runs]) for key in runs[0]}
    return curves, model


def _table(curves: dict[str, Curves], epochs: int, seeds: int) -> Table:
    table = Table(title=f"Digits: mean over {seeds} seeds of training loss and test accuracy")
    table.add_column("epoch", justify="right")
    for name in curves:
        table.add_column(f"{name}\nloss", justify="right")
        table.add_column("\naccuracy", justify="right")
    for epoch in sorted({e for e in (1, 2, 3, 5, 10, 20, 30, 50, 100, 200) if e < epochs} | {epochs}):
        row = [str(epoch)]
        for curve in curves.values():
            row += [f"{curve['loss'][:, epoch - 1].mean():.4f}", f"{curve['val_accuracy'][:, epoch - 1].mean():.1%}"]
        table.add_row(*row)
    return table


def _figure(curves: dict[str, Curves], path: str) -> None:
    """Draw loss and accuracy over epochs: the mean over the seeds, and their range as a band."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, label in zip(panels, ("loss", "val_accuracy"), ("training loss", "test accuracy"), strict=True):
        for name, curve in curves.items():
            values = curve[key]
            epoch = np.arange(1, values.shape[1] + 1)
            (line,) = axes.plot(epoch, values.mean(axis=0), label=name)
            axes.fill_between(epoch, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
        axes.set(xlabel="epoch", title=label)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def fold_bound(folded: nn.Sequential, x: np.ndarray) -> float:
    """Return how far two float32 computations of the same network, folded and not, may differ on `x`.

    Each dense layer of n inputs adds at most (n + 8)·u·(3·max|W||x| + 2|b|) to the error e it is given, which it
    multiplies by |W|; sigmoid shrinks it by 4, ReLU and tanh leave it. Both networks may be off by that much. The
    maximum over the data stands for |γ/σ·μ| in the unfolded network, μ being a mean over such data.
    """
    unit, error, values = float(np.finfo(np.float32).eps) / 2, np.zeros((1, 1)), x.astype(np.float64)
    for layer in folded:
        if isinstance(layer, nn.Dense):
            weight, bias = np.abs(layer.weight.astype(np.float64)), np.abs(layer.bias.astype(np.float64))
            size = 3 * (np.abs(values) @ weight.T).max(axis=0) + 2 * bias
            error = np.broadcast_to(error, values.shape) @ weight.T + (layer.n_in + 8) * unit * size
        elif isinstance(layer, nn.Sigmoid):
            error = error / 4 + unit
        values = layer.infer(values.astype(np.float32)).astype(np.float64)
    return 2 * float(error.max())


def _times(*calls: Callable[[], Any], rounds: int = 30) -> list[float]:
    """Return the median seconds of each call, interleaved."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in seconds]


def run(*, epochs: int, seeds: int, figure: str, progress: bool = True) -> int:
    """Run the demo; return 0 if the folded network predicts as the unfolded one within the bound, else 1."""
    matplotlib.use("agg")
    console = Console()
    data = _data()
    x, _, x_test, y_test = data
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=len(VARIANTS) * seeds)
        curves, model = _train(data, epochs, seeds, lambda name: bar.update(task, advance=1, description=name))
    console.print(_table(curves, epochs, seeds))

    model.recalibrate(np.array_split(x, len(x) // BATCH))
    folded = model.fold()
    everything = np.concatenate([x, x_test])
    before, after = model.predict(everything), folded.predict(everything)
    difference, bound = float(np.abs(after - before).max()), fold_bound(folded, everything)
    same = int((before.argmax(axis=1) == after.argmax(axis=1)).sum())
    accuracy = model.evaluate(x_test, y_test, loss="softmax_cross_entropy")[1]
    slow, fast = _times(lambda: model.predict(x_test), lambda: folded.predict(x_test))

    console.print(f"\nrecalibrated on {len(x)} training images; test accuracy {accuracy:.1%}")
    console.print(f"folded {len(model)} layers into {len(folded)}; the same class for {same} of {len(before)} images")
    verdict = "within" if difference <= bound else "NOT WITHIN"
    console.print(f"largest |folded - unfolded| logit: {difference:.2e}, {verdict} the bound {bound:.2e}")
    console.print(
        f"predicting {len(x_test)} images: {slow * 1e6:.0f} µs unfolded, {fast * 1e6:.0f} µs folded "
        f"({slow / fast:.2f}× as fast)"
    )
    _figure(curves, figure)
    console.print(f"figure: {figure}")
    return 0 if difference <= bound else 1
