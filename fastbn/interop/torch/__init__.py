"""PyTorch: fold models, exchange single layers, files of programs and parameters.

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

from .files import load, load_state_dict, save, save_state_dict
from .folding import fold
from .state_dicts import from_state_dict, to_state_dict

__all__ = ["fold", "from_state_dict", "load", "load_state_dict", "save", "save_state_dict", "to_state_dict"]
