"""Time callables against each other: in one process, interleaved, as minimum and median."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from .cases import Key

K = TypeVar("K", bound=Hashable)


class Timing(NamedTuple):
    minimum: float  # seconds
    median: float


def interleaved(
    calls: Mapping[K, Callable[[], object]], *, rounds: int, budget: float = 0.02, pause: float = 0.005
) -> dict[K, Timing]:
    """Time each callable once per round, after a pause and an untimed call of its own.

    Several OpenMP runtimes in one process spin against each other after each call: the pause lets the others go to
    sleep, the untimed call wakes the own threads. A fast callable is repeated within `budget` seconds, and its mean
    taken as one sample. Each round has an order of its own, so nobody always follows the same neighbour.
    """
    samples: dict[K, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(1000, int(budget / max(time.perf_counter() - start, 1e-7))))
    order, shuffle = list(calls), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            call = calls[name]
            time.sleep(pause)
            call()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            samples[name].append((time.perf_counter() - start) / repeats[name])
    return {name: Timing(min(values), statistics.median(values)) for name, values in samples.items()}


def measure(
    contestants: Mapping[str, Any], keys: Iterable[Key], rounds: int, failed: Callable[[Key, Exception], None]
) -> dict[Key, Timing]:
    """Interleave what the contestants make of the cases; leave out who does not do one, tell `failed` who raised.

    The arrays live no longer than this call: a case's may take 100 MB each, three per contestant.
    """
    calls: dict[Key, Callable[[], object]] = {}
    for case, who in keys:
        try:
            call = getattr(contestants[who], case.kind)(case) if who in contestants else None
            if call is not None:
                call()
                calls[case, who] = call
        except Exception as error:  # a peer's failure is an answer, never the end of the run
            failed((case, who), error)
    times = interleaved(calls, rounds=rounds)
    call = None
    calls.clear()
    gc.collect()  # optimizers and graphs are cycles
    return times
