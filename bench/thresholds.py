"""Where a second thread and a store past the cache begin to pay: `python -m bench thresholds`."""

from __future__ import annotations

from functools import partial

import numpy as np

import fastbn
from fastbn._core import layout
from fastbn._core.dispatch import kernels

from .timing import interleaved


def main(threads: int, rounds: int) -> None:
    """Print both tables: the constants they set are `threads.ELEMENTS_PER_THREAD` and kernels.pyx's `choose_paths`."""
    print(f"{'elements':>10}{'1 thread, µs':>14}{f'{threads} threads, µs':>15}{'gain':>7}")
    for rows in (64, 128, 256, 512, 1024, 2048, 4096, 8192):
        x = np.random.default_rng(0).standard_normal((rows, 64), dtype=np.float32)
        out = np.empty_like(x)
        calls = {str(n): partial(fastbn.batch_norm_train, x, out=out, num_threads=n) for n in (1, threads)}
        one, several = (timing.median * 1e6 for timing in interleaved(calls, rounds=rounds).values())
        print(f"{x.size:10}{one:14.1f}{several:15.1f}{one / several:7.2f}")
    print(f"\n{'MiB':>10}{'copied and read, µs':>21}{'streamed and read, µs':>23}{'gain':>7}")
    for mib in (1, 2, 4, 8, 12, 16, 24, 32, 64, 96):
        source, target = (layout.aligned_empty((mib << 18,), np.dtype(np.float32)) for _ in range(2))
        source[...] = 1
        calls = {str(stream): partial(_copy_and_read, source, target, threads, stream) for stream in (False, True)}
        plain, streamed = (timing.median * 1e6 for timing in interleaved(calls, rounds=rounds).values())
        print(f"{mib:10}{plain:21.1f}{streamed:23.1f}{plain / streamed:7.2f}")


def _copy_and_read(source: np.ndarray, target: np.ndarray, threads: int, stream: bool) -> None:
    kernels.copy(source, target, threads, stream)
    kernels.moments(target.reshape(1, 1, -1), np.empty(1), np.empty(1), threads)
