"""From how many elements on a second thread pays: `python -m bench threads`."""

from __future__ import annotations

from functools import partial

import numpy as np

import fastbn

from .timing import interleaved


def main(threads: int, rounds: int) -> None:
    """Print the time of a training call on one thread over that on several, for growing arrays of 64 channels."""
    print(f"{'elements':>10}{'1 thread, µs':>14}{f'{threads} threads, µs':>15}{'gain':>7}")
    for rows in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        x = np.random.default_rng(0).standard_normal((rows, 64), dtype=np.float32)
        out = np.empty_like(x)
        calls = {str(n): partial(fastbn.batch_norm_train, x, out=out, num_threads=n) for n in (1, threads)}
        one, several = (timing.median * 1e6 for timing in interleaved(calls, rounds=rounds).values())
        print(f"{x.size:10}{one:14.1f}{several:15.1f}{one / several:7.2f}")
