"""Run checks on all ranks, one after the other, and report each: what failed, and on which rank.

A check is a function of the communicator. What it raises on one rank reaches the others by `together`; each check
ends with one line of JSON from rank 0. A rank that hangs says where, and ends.
"""

import faulthandler
import json
import traceback

import numpy as np
from mpi4py import MPI

from fastbn.interop.mpi import RankError, together

COMM = MPI.COMM_WORLD
TIME_LIMIT = 90  # seconds of all checks


def run(*checks):
    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True)
    for check in checks:
        failure = None
        try:
            with together(COMM):
                check(COMM)
        except RankError:
            pass  # the other rank reports it
        except Exception:
            failure = traceback.format_exc()
        failures = {rank: text for rank, text in enumerate(COMM.gather(failure) or []) if text}
        if COMM.rank == 0:
            print(json.dumps({"check": check.__name__, "failures": failures}), flush=True)


def rows_of(n, comm, *, empty=False):
    """Return this rank's slice of n rows, of unequal lengths; with `empty`, the first rank has none."""
    weights = np.arange(comm.size) + (0 if empty and comm.size > 1 else 1)
    ends = np.concatenate([[0], np.cumsum(weights) * n // weights.sum()])
    return slice(int(ends[comm.rank]), int(ends[comm.rank + 1]))


def same_on_all(comm, *arrays):
    """Say that the ranks hold the same bits."""
    mine = b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)
    others = comm.allgather(mine)
    assert others == [mine] * comm.size, f"rank {comm.rank} holds other bits than rank 0"


def raised(function, *arguments, **options):
    """Return what a call raises."""
    try:
        function(*arguments, **options)
    except (Exception, SystemExit) as error:
        return error
    raise AssertionError(f"{function} raised nothing")
