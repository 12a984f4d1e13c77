"""fastbn: batch normalisation on CPUs at the speed of memory, exact, and the same to the last bit on every machine.

Architecture
------------
Arrows go down only; a test reads the imports and enforces it::

    cli · demo                                    the shell
          │
          ▼
          nn                                      networks
          │
          ▼
    layer · fold · optim · preprocessing          state, models, optimizers
          │
          ▼
    norm · schedules · threads                    functions on arrays, learning rates, the thread budget
          │
          ▼
    _core: check · layout · buffers · dispatch    arguments, canonical views, memory, instruction sets
          │
          ▼
    _core: kernels.pyx · optim_kernels.pyx        threads and blocks, without the GIL, once per instruction set
          │
          ▼
    _core: span.h · optim_span.h                  serial loops over contiguous memory, once per dtype

Every public function is four hops, visible in its body: `check` raises or nobody does, `layout` finds the smallest
canonical problem, a kernel splits it into blocks that the shape alone fixes, a span loops over memory.
"""

from . import nn, optim
from ._core.buffers import release_buffers
from ._version import __version__
from .affine import BatchNormParams, to_affine
from .config import show_config
from .fold import fold_conv, fold_into_conv, fold_into_linear, fold_linear
from .layer import BatchNorm
from .norm import Gradients, Moments, Saved, batch_norm_backward, batch_norm_infer, batch_norm_train
from .preprocessing import Standardizer
from .threads import get_num_threads, num_threads, set_num_threads

__all__ = [
    "BatchNorm",
    "BatchNormParams",
    "Gradients",
    "Moments",
    "Saved",
    "Standardizer",
    "__version__",
    "batch_norm_backward",
    "batch_norm_infer",
    "batch_norm_train",
    "fold_conv",
    "fold_into_conv",
    "fold_into_linear",
    "fold_linear",
    "get_num_threads",
    "nn",
    "num_threads",
    "optim",
    "release_buffers",
    "set_num_threads",
    "show_config",
    "to_affine",
]
