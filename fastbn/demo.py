"""`fastbn demo`: the course's exercise on real data, from raw inputs to a folded network.

The same network is trained (a) on raw inputs, (b) on standardised inputs, (c) on standardised inputs with BatchNorm;
then the best of them is recalibrated, folded into dense layers, compared with the unfolded one and timed.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from threadpoolctl import threadpool_limits

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
    "(a) raw": {"standardise": False, "batch_norm": False},
    "(b) standardised": {"standardise": True, "batch_norm": False},
    "(c) standardised + BN": {"standardise": True, "batch_norm": True},
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
    table = Table(title=f"Training loss and test accuracy, mean over {seeds} seeds")
    table.add_column("epoch", justify="right")
    for letter in "abc":
        table.add_column(f"({letter}) loss", justify="right")
        table.add_column("accuracy", justify="right")
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
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    figure.suptitle("mean over the seeds; the bands are their range")
    panels[1].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _unwritable(path: str) -> str | None:
    """Return why no figure can be written to `path`, or None."""
    folder, kinds = Path(path).absolute().parent, FigureCanvasAgg.get_supported_filetypes()
    if Path(path).suffix[1:].lower() not in kinds:
        return f"expected a name that ends in .{', .'.join(sorted(kinds))}, got {path}"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"expected a folder that can be written to, got {folder}"
    return f"expected a file, got the folder {path}" if Path(path).is_dir() else None


def fold_bound(folded: nn.Sequential, x: np.ndarray) -> float:
    """Return how far two float32 computations of the same network, folded and not, may differ on `x`.

    Eight standard deviations, with rounding errors taken as independent (Higham & Mary 2019): a dense layer of n inputs
    adds (n + 8)·u²·(W²·x² + W²·x² averaged over the data + b²) to the variance of the error, each network its own. The
    average stands for the (γμ/σ)² of the unfolded network, whose μ is a mean of W·x over such data. A layer passes the
    error it is given on: dense ones times W², the sigmoid times its slope squared.
    """
    unit, variance, values = float(np.finfo(np.float32).eps) / 2, np.zeros_like(x, np.float64), x
    for layer in folded:
        outputs = layer.infer(values)
        if isinstance(layer, nn.Dense):
            squares = layer.weight.astype(np.float64).T ** 2
            size = values.astype(np.float64) ** 2 @ squares
            own = size + size.mean(axis=0) + layer.bias.astype(np.float64) ** 2
            variance = variance @ squares + (layer.weight.shape[1] + 8) * unit**2 * own
        else:
            variance = variance * (outputs * (1.0 - outputs)) ** 2 + unit**2
        values = outputs
    return 8 * float(np.sqrt(2 * variance.max()))


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
    """Run the demo; return 0 if the folded network predicts as the unfolded one within the bound, else 1.

    2 where `figure` cannot be written.
    """
    if reason := _unwritable(figure):  # before minutes of training
        print(f"fastbn demo: --figure: {reason}", file=sys.stderr)
        return 2
    # Matrices this small are multiplied faster by one thread, many times so where other work shares the cores.
    with threadpool_limits(1, user_api="blas"):
        return _run(epochs, seeds, figure, progress)


def _run(epochs: int, seeds: int, figure: str, progress: bool) -> int:
    matplotlib.use("agg")
    console = Console()
    data = _data()
    x, _, x_test, y_test = data
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=len(VARIANTS) * seeds)
        curves, model = _train(data, epochs, seeds, lambda name: bar.update(task, advance=1, description=name))
    width = "-".join(map(str, (64, *HIDDEN, 10)))
    console.print(f"digits; {width}, sigmoid; SGD with rate {LEARNING_RATE}, batches of {BATCH}")
    console.print("(a) raw inputs  (b) standardised  (c) standardised, BatchNorm\n")
    console.print(_table(curves, epochs, seeds))
    console.print("(a) ahead of (b) is no accident: pixels from 0 to 16 act on the first layer like a larger rate.")

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
