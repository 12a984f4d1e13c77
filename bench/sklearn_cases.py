"""`python -m bench sklearn`: fastbn.interop.sklearn beside scikit-learn's own StandardScaler and MLPClassifier.

The perceptrons are compared at equal accuracy. Both see the same split, standardised, in float32, with the same
layers, batch size, learning rate and seed. Each is trained from scratch by `fit` for 1, 2, 3, 5, ... epochs, and
scored on the held-out rows; a longer training begins with the steps of the shorter one. The mark is the highest
accuracy that both reach: the lesser of the two's best. What counts is the time of the shortest `fit` that reaches it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits, make_classification
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

from fastbn.interop.sklearn import BatchNormMLPClassifier, Standardizer

from .report import Table, number
from .timing import Timing, interleaved

SHAPES, QUICK_SHAPES = [(100_000, 50), (10_000, 784), (1_000_000, 10)], [(1000, 50)]
SCALERS = {"fastbn": Standardizer, "scikit-learn": StandardScaler}
PERCEPTRONS = {"fastbn": BatchNormMLPClassifier, "scikit-learn": MLPClassifier}
EPOCHS, QUICK_EPOCHS = (1, 2, 3, 5, 8, 12, 20, 30, 50), (1, 2)
SEEDS, QUICK_SEEDS = range(5), range(1)


class Problem(NamedTuple):
    data: Callable[[], tuple[np.ndarray, np.ndarray]]
    hidden_layer_sizes: tuple[int, ...]
    learning_rate_init: float


def _classification() -> tuple[np.ndarray, np.ndarray]:
    return make_classification(
        6000, 40, n_informative=20, n_classes=4, n_clusters_per_class=3, class_sep=1.5, random_state=0
    )


def _digits() -> tuple[np.ndarray, np.ndarray]:
    return load_digits(return_X_y=True)


# One hidden layer at MLPClassifier's defaults, at ten times its learning rate, and a deep network
PROBLEMS = {
    f"{name}, {len(sizes)} × 100, lr {rate:g}": Problem(data, sizes, rate)
    for name, data in (("digits", _digits), ("make_classification", _classification))
    for sizes, rate in (((100,), 0.001), ((100,), 0.01), ((100,) * 4, 0.001))
}


def main(
    threads: int, rounds: int, *, markdown: bool = False, quick: bool = False, json_path: str | None = None
) -> int:
    """Print both tables; `quick` is a smoke test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unfinished training
        results = {"threads": threads, "scalers": _scalers(rounds, markdown, quick)}
        print()
        results["perceptrons"] = _perceptrons(markdown, quick)
    if json_path:
        Path(json_path).write_text(json.dumps(results, indent=1))
    return 0


def _scalers(rounds: int, markdown: bool, quick: bool) -> list[dict[str, Any]]:
    print(f"Standardizer: ms, the least of {rounds} interleaved rounds; ×: StandardScaler's time over it\n")
    calls = "fit", "partial_fit", "transform", "in place"
    lines = Table(["case", *(header for call in calls for header in (f"{call}, ms", "×"))], 26, markdown=markdown)
    lines.widths[1:] = [17, 9] * len(calls)
    found = []
    for dtype in "float32", "float64":
        for shape in QUICK_SHAPES if quick else SHAPES:
            x = (np.random.default_rng(0).standard_normal(shape, np.float32) * 3 + 5).astype(dtype)
            times = {call: interleaved(_calls(call, x), rounds=rounds) for call in calls}
            name = f"{shape[0]:,} × {shape[1]}, {dtype}"
            lines.row([name, *(cell for call in calls for cell in _cells(times[call]))])
            found.append({"case": name, "seconds": times})
    return found


def _calls(call: str, x: np.ndarray) -> dict[str, Callable[[], object]]:
    """Return {library: what it does to x}."""
    made = {}
    for who, kind in SCALERS.items():
        scaler = kind().fit(x)
        own = scaler.transform(x)
        still = kind().fit(own)  # in place again and again: what is standardised stays so
        made[who] = {
            "fit": lambda scaler=scaler: scaler.fit(x),
            "partial_fit": lambda scaler=scaler: scaler.partial_fit(x),
            "transform": lambda scaler=scaler: scaler.transform(x),
            "in place": lambda scaler=still, own=own: scaler.transform(own, copy=False),
        }[call]
    return made


def _cells(times: dict[str, Timing]) -> list[str]:
    own, peer = (times[who].minimum for who in SCALERS)
    return [f"{own * 1e3:.3g}", number(peer / own)]


def _perceptrons(markdown: bool, quick: bool) -> list[dict[str, Any]]:
    epochs, seeds = (QUICK_EPOCHS, QUICK_SEEDS) if quick else (EPOCHS, SEEDS)
    print(
        f"BatchNormMLPClassifier beside MLPClassifier, at equal accuracy, as medians of {len(seeds)} seeds, within\n"
        f"{epochs[-1]} epochs: the mark (the held-out accuracy that both reach), epochs and seconds of the fit, ×:\n"
        "MLPClassifier's seconds over fastbn's (least to most of the seeds), and the best accuracies\n"
    )
    headers = ["problem", "mark", "epochs", "peer's", "s", "peer's s", "×", "least", "most", "best", "peer's best"]
    lines = Table(headers, 40, markdown=markdown)
    found = []
    for name, problem in PROBLEMS.items():
        runs = [_race(problem, seed, epochs) for seed in seeds]
        ratios = [run["seconds"]["scikit-learn"] / run["seconds"]["fastbn"] for run in runs]
        middle = {
            (key, who): statistics.median(run[key][who] for run in runs)
            for key in ("epochs", "seconds", "best") for who in PERCEPTRONS
        }  # fmt: skip
        lines.row([
            name, number(statistics.median(run["mark"] for run in runs), ".3f"),
            *(number(middle["epochs", who], "g") for who in PERCEPTRONS),
            *(number(middle["seconds", who], ".3f") for who in PERCEPTRONS),
            *map(number, (statistics.median(ratios), min(ratios), max(ratios))),
            *(number(middle["best", who], ".3f") for who in PERCEPTRONS),
        ])  # fmt: skip
        found.append({"problem": name, "runs": runs})
    return found


def _race(problem: Problem, seed: int, epochs: tuple[int, ...]) -> dict[str, Any]:
    """Return the mark, and for each the epochs and seconds of the fit that reaches it, and the best accuracy."""
    x, y = problem.data()
    train, test, y_train, y_test = train_test_split(x.astype(np.float32), y, stratify=y, random_state=seed)
    scaler = Standardizer().fit(train)
    train, test = scaler.transform(train), scaler.transform(test)
    options = {
        "hidden_layer_sizes": problem.hidden_layer_sizes, "learning_rate_init": problem.learning_rate_init,
        "random_state": seed, "n_iter_no_change": math.inf,
    }  # fmt: skip
    accuracies: dict[str, list[float]] = {who: [] for who in PERCEPTRONS}
    seconds: dict[str, list[float]] = {who: [] for who in PERCEPTRONS}
    for number_of in epochs:
        for who, kind in PERCEPTRONS.items():
            model = kind(max_iter=number_of, **options)
            start = time.perf_counter()
            model.fit(train, y_train)
            seconds[who].append(time.perf_counter() - start)
            accuracies[who].append(model.score(test, y_test))
    mark = min(map(max, accuracies.values()))
    first = {who: next(i for i, a in enumerate(accuracies[who]) if a >= mark) for who in PERCEPTRONS}
    return {
        "seed": seed, "mark": mark, "accuracies": accuracies, "all_seconds": seconds,
        "epochs": {who: epochs[i] for who, i in first.items()},
        "seconds": {who: seconds[who][i] for who, i in first.items()},
        "best": {who: max(accuracies[who]) for who in PERCEPTRONS},
    }  # fmt: skip
