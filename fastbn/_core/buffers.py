"""Memory of large results, used again: a bounded store of what earlier ones gave back.

The C library returns the pages of a large array to the system when the array goes, and the next one pays a page fault
for each of its own: nearly half of the time of a call. Here the memory of a result waits, once nothing refers to it,
for the next result that it fits. Without locks: each step on the dict is atomic.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

FROM = 32 << 20  # bytes; the C library keeps smaller ones itself (glibc's largest threshold for mmap)
LIMIT = int(os.environ.get("FASTBN_BUFFERS", "256")) << 20  # bytes kept unused; the variable is in MiB

_kept: dict[int, np.ndarray] = {}  # by id, the last given back comes last


class _Lease:
    """Owns the memory of one result; gives it back when the last array over it goes."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.__array_interface__: dict[str, Any] = memory.__array_interface__

    def __del__(self, kept: dict[int, np.ndarray] = _kept) -> None:  # bound early: at exit the globals go first
        kept[id(self.memory)] = self.memory
        for key in list(kept):  # the oldest first; another thread may have taken it meanwhile
            if sum(memory.nbytes for memory in list(kept.values())) <= LIMIT:
                break
            kept.pop(key, None)


def take(nbytes: int) -> np.ndarray:
    """Return that many bytes, uninitialised: kept ones if they are enough and not twice as many, else new ones."""
    for key, memory in reversed(list(_kept.items())):
        if nbytes <= memory.nbytes <= 2 * nbytes and _kept.pop(key, None) is not None:
            break
    else:
        memory = np.empty(nbytes, np.uint8)
    return np.asarray(_Lease(memory))[:nbytes]


def release_buffers() -> int:
    """Return to the system the memory that is kept for large results, and how many bytes that was.

    Results of 32 MiB and more, once nothing refers to them, leave their memory for the next ones, up to 256 MiB in all
    (``FASTBN_BUFFERS`` says how many MiB; 0 keeps none).

    Examples
    --------
    >>> import fastbn
    >>> fastbn.release_buffers()
    0
    """
    size = sum(memory.nbytes for memory in list(_kept.values()))
    _kept.clear()
    return size
