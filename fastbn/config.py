"""What this installation is: instruction sets, threads, OpenMP, caches, versions."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from ._core import caches, dispatch, openmp
from ._version import __version__
from .threads import get_num_threads

__all__ = ["show_config"]


def show_config() -> dict[str, Any]:
    """Print and return the configuration: instruction set, sets available, threads, OpenMP, caches, versions.

    Returns
    -------
    dict
        ``instruction_set``, ``instruction_sets_available``, ``threads``, ``openmp`` (the date of the standard compiled
        with, or False), ``caches`` (bytes that one core sees), ``versions``.
    """
    config: dict[str, Any] = {
        "instruction_set": dispatch.isa,
        "instruction_sets_available": dispatch.available(),
        "threads": get_num_threads(),
        "openmp": openmp.version() or False,
        "caches": {"L1": caches.L1, "L2": caches.L2, "L3": caches.L3},
        "versions": {"fastbn": __version__, "numpy": np.__version__, "python": platform.python_version()},
    }
    for key, value in config.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{k} {_size(v) if key == 'caches' else v}" for k, v in value.items())
        elif isinstance(value, list):
            shown = ", ".join(value)
        else:
            shown = str(value) if value is not False else "no: every call uses one thread"
        print(f"{key.replace('_', ' '):28}{shown}")
    return config


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"
