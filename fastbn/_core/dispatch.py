"""Choose the instruction set once, at import; `FASTBN_ISA` forces one.

Every kernel source is compiled once per instruction set (`_kernels_v2`, `_kernels_v3`, …). All give the same bits,
so the choice is of speed alone.
"""

import importlib
import importlib.util
import os
from types import ModuleType
from typing import TYPE_CHECKING

try:
    from . import cpu
except ImportError:
    raise ImportError(
        f"{__package__}: not compiled here ({os.path.dirname(__file__)}): run Python elsewhere "
        "after 'pip install .', or build it in place with 'pip install -e .'"
    ) from None

_LEVELS = {"baseline": 0, "v2": 2, "v3": 3, "v4": 4}  # name: the x86-64 level it needs


def available() -> list[str]:
    """Return the instruction sets that are built here and that this CPU runs, the fastest last."""
    level = cpu.x86_level()
    return [
        name
        for name, needed in _LEVELS.items()
        if needed <= level and importlib.util.find_spec(f"{__package__}._kernels_{name}") is not None
    ]


def _choose() -> str:
    sets = available()
    if not sets:
        raise ImportError(
            "fastbn: no compiled kernels for this CPU: expected one of "
            f"{', '.join(_LEVELS)} built in {__package__}, which needs x86-64-v2 or another architecture"
        )
    wanted = os.environ.get("FASTBN_ISA", "")
    if wanted and wanted not in sets:
        raise ImportError(f"FASTBN_ISA: expected one of {', '.join(sets)} (built, and run by this CPU), got {wanted!r}")
    return wanted or sets[-1]


def load(source: str, isa: str) -> ModuleType:
    """Import the kernels of `source` ("kernels", "optim_kernels") compiled for `isa`."""
    return importlib.import_module(f"{__package__}._{source}_{isa}")


isa: str = _choose()
if TYPE_CHECKING:
    from . import kernels, optim_kernels
else:
    kernels = load("kernels", isa)
    optim_kernels = load("optim_kernels", isa)
