"""`python -m bench dask`: statistics of a dask array larger than its workers' memory, beside dask's own mean and var.

Two tables: time and memory of a cluster of processes, which may not spill, and errors on float32 data far from zero.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .report import Table

ROWS, FEATURES = 65_536, 64  # of a chunk: 16 MiB in float32
LIMIT = 400 << 20  # bytes of a worker
RATIOS = (1e0, 1e4, 1e5, 1e6)


def main(
    threads: int, rounds: int, *, markdown: bool = False, quick: bool = False, json_path: str | None = None
) -> int:
    """Print both tables for a cluster of so many processes; `quick`: 256 MiB instead of 8 GiB, a smoke test."""
    try:
        import distributed  # noqa: F401

        from fastbn.interop import dask  # noqa: F401
    except ModuleNotFoundError as error:
        print(f'dask: needs {error.name}: pip install "fastbn[dask]"', file=sys.stderr)
        return 1
    results = {"cluster": _cluster(threads, rounds, 16 if quick else 512, markdown), "errors": _errors(quick, markdown)}
    if json_path:
        with open(json_path, "w") as file:
            json.dump(results, file, indent=1)
    return 0


def _load(seed: int, block_id: tuple[int, ...]) -> np.ndarray:
    """Return a chunk; cheap to make, as if it were read."""
    chunk = np.random.default_rng((seed, *block_id)).random((ROWS, FEATURES), np.float32)
    chunk += 1000
    return chunk


def _array(chunks: int, seed: int = 0) -> Any:
    import dask.array as da

    return da.map_blocks(_load, seed, chunks=((ROWS,) * chunks, (FEATURES,)), meta=np.empty((0, 0), np.float32))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _ways() -> dict[str, Callable[[Any], Any]]:
    import dask

    from fastbn.interop.dask import Standardizer

    return {
        "chunks made, nothing computed": lambda x: dask.compute(*(dask.delayed(len)(part) for part in _parts(x))),
        "fastbn Standardizer.fit": lambda x: Standardizer().fit(x),
        "dask x.mean(0), x.var(0)": lambda x: dask.compute(x.mean(0), x.var(0)),
        "the same of x.astype(float64)": lambda x: dask.compute(x.astype(float).mean(0), x.astype(float).var(0)),
    }


def _parts(x: Any) -> Any:
    return x.map_blocks(_nothing, meta=np.empty((0, 0), np.float32)).to_delayed().flat


def _nothing(chunk: np.ndarray) -> np.ndarray:
    return chunk[:1, :1].copy()


def _cluster(workers: int, rounds: int, chunks: int, markdown: bool) -> list[dict[str, Any]]:
    """Measure each way on workers of its own, whose peaks nobody else has raised."""
    import dask
    from distributed import Client, LocalCluster

    x, found = _array(chunks), []
    print(
        f"{x.nbytes / 2**30:.3g} GiB of float32 in chunks of {x.nbytes / chunks / 2**20:.3g} MiB; {workers} processes "
        f"of one thread and {LIMIT >> 20} MiB, which may not spill; least of {rounds} rounds\n"
    )
    table = Table(["", "seconds", "a worker's peak, MiB", "its growth"], 32, markdown=markdown)
    memory = {f"distributed.worker.memory.{what}": False for what in ("target", "spill", "pause")}
    for name, way in _ways().items():
        with tempfile.TemporaryDirectory() as scratch, dask.config.set(memory), LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, memory_limit=LIMIT, dashboard_address=None,
            local_directory=scratch,
        ) as cluster, Client(cluster) as client:  # fmt: skip
            way(_array(2 * workers))  # what is imported at the first task is no growth
            before, seconds = client.run(_peak), []
            for seed in range(rounds):
                x = _array(chunks, seed)  # the scheduler may still hold results of the last one
                start = time.perf_counter()
                way(x)
                seconds.append(time.perf_counter() - start)
            after = client.run(_peak)
        peak, growth = max(after.values()), max(after[worker] - before[worker] for worker in before)
        table.row([name, f"{min(seconds):.2f}", f"{peak / 2**20:.0f}", f"{growth / 2**20:.0f}"])
        found.append({"way": name, "bytes": x.nbytes, "seconds": seconds, "peak": peak, "growth": growth})
    print()
    return found


def _errors(quick: bool, markdown: bool) -> list[dict[str, Any]]:
    """Print the largest relative error of a feature's variance, against float64 in two passes over the same data."""
    import dask
    import dask.array as da

    from fastbn.interop.dask import moments

    rows, found = (20_000 if quick else 1_000_000), []
    print(f"float32, {rows:,} rows of 8 features: the largest relative error of a variance\n")
    table = Table(["mean/std", "fastbn", "dask x.var(0)", "of x.astype(float64)"], 10, markdown=markdown)
    for ratio in RATIOS:
        values = np.random.default_rng(0).normal(ratio, 1, (rows, 8)).astype(np.float32)
        centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
        exact = np.square(centred - centred.mean(axis=0)).mean(axis=0)
        x = da.from_array(values, chunks=(max(rows // 16, 1), 8))
        m, own, wide = dask.compute(moments(x), x.var(0), x.astype(np.float64).var(0))
        errors = [float(np.abs(var / exact - 1).max()) for var in (m.var(), own, wide)]
        table.row([f"{ratio:.0e}", *(f"{error:.1e}" for error in errors)])
        found.append({"ratio": ratio, "fastbn": errors[0], "dask": errors[1], "dask float64": errors[2]})
    return found
