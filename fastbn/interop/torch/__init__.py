"""PyTorch: BatchNorm modules and optimizers by fastbn's kernels; fold models; exchange layers and files.

    BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm      in place of PyTorch's; convert swaps those of a model
    BatchNormReLU, BatchNormAddReLU     fused with the addition of a residual and ReLU
    optim                               Adam, AdamW, SGD, RMSprop
    fold                                a module by torch.fx, an ExportedProgram (.pt2) by its graph
    from_state_dict, to_state_dict      one BatchNorm layer
    load, save                          exported programs; nothing in a file is unpickled but tensors
    load_state_dict, save_state_dict    parameters alone
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    text = 'fastbn.interop.torch needs torch: pip install "fastbn[torch]"'
    raise ModuleNotFoundError(text, name="torch") from error

from . import optim
from .conversion import ConvertReport, convert
from .files import load, load_state_dict, save, save_state_dict
from .folding import fold
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAddReLU, BatchNormReLU, batch_norm
from .state_dicts import from_state_dict, to_state_dict

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAddReLU",
    "BatchNormReLU",
    "ConvertReport",
    "batch_norm",
    "convert",
    "fold",
    "from_state_dict",
    "load",
    "load_state_dict",
    "optim",
    "save",
    "save_state_dict",
    "to_state_dict",
]
