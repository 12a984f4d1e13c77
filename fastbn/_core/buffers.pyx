# cython: language_level=3, freethreading_compatible=True
"""Memory of large results, used again: a bounded store of what earlier ones gave back.

The C library returns the pages of a large array to the system when the array goes, and the next one pays a page fault
for each of its own: nearly half of the time of a call. Here the memory of a result waits, once nothing refers to it,
for the next result that it fits. Without locks: each step on the dict is atomic. Compiled, for where an array goes
Python would swallow a Ctrl-C that comes in a method of Python's.
"""

import os

import numpy as np


def _limit(str text):
    """Return how many bytes are kept; `text` is in MiB."""
    try:
        return max(0, int(text)) << 20
    except ValueError:
        raise ValueError(f"FASTBN_BUFFERS: expected MiB, an integer, got {text!r}") from None


FROM = 32 << 20  # bytes; the C library keeps smaller ones itself (glibc's largest threshold for mmap)
LIMIT = _limit(os.environ.get("FASTBN_BUFFERS") or "256")  # bytes kept unused

cdef dict kept = {}  # by id, the last given back comes last


cdef class Lease:
    """Owns the memory of one result; gives it back when the last array over it goes."""

    cdef object memory

    def __cinit__(self, memory):
        self.memory = memory

    @property
    def __array_interface__(self):
        return self.memory.__array_interface__

    def __dealloc__(self):
        kept[id(self.memory)] = self.memory
        for key in list(kept):  # the oldest first; another thread may have taken it meanwhile
            if sum([memory.nbytes for memory in list(kept.values())]) <= LIMIT:
                break
            kept.pop(key, None)


def take(nbytes):
    """Return that many bytes, uninitialised: kept ones if they are enough and not twice as many, else new ones."""
    for key, memory in reversed(list(kept.items())):
        if nbytes <= memory.nbytes <= 2 * nbytes and kept.pop(key, None) is not None:
            break
    else:
        memory = np.empty(nbytes, np.uint8)
    return np.asarray(Lease(memory))[:nbytes]


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
    size = sum([memory.nbytes for memory in list(kept.values())])
    kept.clear()
    return size
