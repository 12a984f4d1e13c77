"""Time callables against each other: in one process, interleaved, as minimum and median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Timing(NamedTuple):
    minimum: float  # seconds
    median: float


def interleaved(
    calls: dict[str, Callable[[], object]], *, rounds: int, budget: float = 0.02, pause: float = 0.005
) -> dict[str, Timing]:
    """Time each callable once per round, after a pause and an untimed call of its own.

    Several OpenMP runtimes in one process spin against each other after each call: the pause lets the others go to
    sleep, the untimed call wakes the own threads. A fast callable is repeated within `budget` seconds, and its mean
    taken as one sample.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(1000, int(budget / max(time.perf_counter() - start, 1e-7))))
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(pause)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: Timing(min(values), statistics.median(values)) for name, values in samples.items()}
