"""How many threads a call may use, and how many are worth their while.

The number never changes a result: blocks are fixed by the shape and merged in order.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ._core import check, openmp, state

__all__ = ["get_num_threads", "num_threads", "set_num_threads"]

# Elements that are worth a thread: `python -m bench thresholds` gave a gain of 1.1 at 65,536 for two, a loss at 32,768.
ELEMENTS_PER_THREAD = 32768
MOST = 1024  # threads of a call, whatever is asked for


def _cgroup_quota(root: str = "/sys/fs/cgroup", groups: str = "/proc/self/cgroup") -> float:
    """Return the CPUs that the control groups of this process grant (version 2 or 1), infinity without a limit."""
    try:
        lines = [line.split(":", 2) for line in Path(groups).read_text().splitlines()]
    except OSError:
        lines = []
    least = math.inf
    for _, controllers, group in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = Path(root, "cpu") if controllers else Path(root)
        own = base / group.strip("/")
        for folder in (own, *own.parents):  # inside a container the own group is the root of what is mounted
            least = min(least, _quota_of(folder))
            if folder == base:
                break
    return least


def _quota_of(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):
        return math.inf  # no such file, or "max"


def _usable_cpus() -> int:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _cgroup_quota())))


class _State(threading.local):
    """The override of the `num_threads` context, one per Python thread."""

    override: int | None = None


_state = _State()
_openmp_at_import = openmp.max_threads()
_default = _openmp_at_import if os.environ.get("OMP_NUM_THREADS") else min(_openmp_at_import, _usable_cpus())
_chosen: int | None = None
_serial = False  # after a fork that took place within a parallel region


def get_num_threads() -> int:
    """Return the number of threads that calls use at most.

    In this order: the enclosing :func:`num_threads`, what :func:`set_num_threads` chose, else ``OMP_NUM_THREADS``, else
    the usable CPUs (affinity and the control group's quota). A lower limit set through OpenMP, as threadpoolctl does,
    holds in any case. One without OpenMP.
    """
    if _serial or not openmp.version():
        return 1
    wanted = _state.override or _chosen or _default
    limit = openmp.max_threads()
    return min(wanted, limit) if limit < _openmp_at_import else wanted


def set_num_threads(n: int) -> None:
    """Set the number of threads that calls use at most, for the whole process.

    Parameters
    ----------
    n : int
        1 or more; it may exceed the number of CPUs. A call never has more than 1024.

    Raises
    ------
    TypeError, ValueError
        Where `n` is no integer, or below 1.

    Examples
    --------
    >>> import fastbn
    >>> before = fastbn.get_num_threads()
    >>> fastbn.set_num_threads(1)
    >>> fastbn.get_num_threads()
    1
    >>> fastbn.set_num_threads(before)
    """
    global _chosen
    _chosen = check.count("n", n)


@contextmanager
def num_threads(n: int) -> Iterator[None]:
    """Set the number of threads inside a ``with`` block, for the calling Python thread only.

    Parameters
    ----------
    n : int
        1 or more, as in :func:`set_num_threads`.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    before, _state.override = _state.override, check.count("n", n)
    try:
        yield
    finally:
        _state.override = before


def budget(elements: int, requested: int | None = None) -> int:
    """Return the threads for a call on that many elements; `requested` (its ``num_threads=``) is taken as it is."""
    if requested is None:
        n = elements // ELEMENTS_PER_THREAD
        if n < 2:
            return 1
        n = min(n, get_num_threads())
    else:
        n = check.count("num_threads", requested)
        if _serial or not openmp.version():
            return 1
    return min(n, MOST)


# A forked child has none of its parent's threads, but gcc's OpenMP runtime would go on waiting for them. So they end
# before the fork, and parent and child start their own when they need some.
_released = True


def _before_fork() -> None:
    global _released
    _released = openmp.release()


def _in_child() -> None:
    global _serial
    _serial = _serial or not _released
    state.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
