"""Load and save arrays by name: .npz and safetensors files, PyTorch state dicts. Nothing is unpickled."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")
LARGEST_SMALL = 1 << 30  # bytes that any .npz may grow to; a larger one to a hundred times itself


class State(dict[str, np.ndarray]):
    """Arrays by name, and the `metadata` (strings by name) of a safetensors file."""

    metadata: Mapping[str, str] | None = None


def load(path: str | os.PathLike[str]) -> State:
    """Load the arrays of an .npz or safetensors file, or of a PyTorch state dict (.pt, .pth).

    Parameters
    ----------
    path : str or path
        Its suffix says what it is. Pickled objects are never loaded.

    Returns
    -------
    State
        The arrays by name, and a safetensors file's metadata.

    Raises
    ------
    ValueError
        The file is not what its suffix says, is truncated, or holds something else than arrays.
    OSError
        The file cannot be read.
    ModuleNotFoundError
        safetensors, or PyTorch, is not installed.
    """
    path = Path(path)
    match _suffix(path):
        case ".npz":
            return State(_load_npz(path))
        case ".safetensors":
            return _load_safetensors(path)
        case _:
            return State(_load_state_dict(path))


def save(state: Mapping[str, np.ndarray], path: str | os.PathLike[str]) -> None:
    """Save arrays by name, as the suffix of `path` says: .npz, .safetensors, or a PyTorch state dict (.pt, .pth).

    Parameters
    ----------
    state : mapping of str to ndarray
        The `metadata` of a `State` goes into a safetensors file.
    path : str or path
        An existing file is replaced.

    Raises
    ------
    ValueError
        The suffix is another one, or the file cannot hold an array's dtype.
    OSError
        The file cannot be written.
    ModuleNotFoundError
        safetensors, or PyTorch, is not installed.
    """
    path = Path(path)
    match _suffix(path):
        case ".npz":
            _save_npz(state, path)
        case ".safetensors":
            _save_safetensors(state, path)
        case _:
            _save_state_dict(state, path)


def _suffix(path: Path) -> str:
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"{path}: expected a suffix of {', '.join(SUFFIXES)}, got {suffix!r}")
    return suffix


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip file, or truncated")
            with zipfile.ZipFile(file) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > max(LARGEST_SMALL, 100 * path.stat().st_size):
                raise ValueError(f"it would grow to {size:,} bytes")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files}
        for name, array in found.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is no array")
        return found
    except (ValueError, EOFError, KeyError, MemoryError, NotImplementedError, RuntimeError, SyntaxError) as error:
        raise ValueError(f"{path}: expected an .npz file, got one that cannot be read: {error}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected an .npz file, got a damaged one: {error}") from error


def _save_npz(state: Mapping[str, np.ndarray], path: Path) -> None:
    for name, array in state.items():
        if array.dtype.isbuiltin == 2:  # bfloat16: its name would be lost
            raise ValueError(f"{path}: expected dtypes that .npz can hold, got {array.dtype} in {name}")
    with zipfile.ZipFile(path, "w") as archive:  # np.savez cannot name an array "file"
        for name, array in state.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'fastbn.interop.arrays needs safetensors: pip install "fastbn[safetensors]"', name="safetensors"
        ) from error
    return safetensors


def _load_safetensors(path: Path) -> State:
    safetensors, state = _safetensors(), State()
    try:
        with safetensors.safe_open(path, framework="np") as file:
            state.metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118
                try:
                    state[name] = file.get_tensor(name)
                except (AttributeError, TypeError, KeyError) as error:
                    raise ValueError(f"NumPy has no dtype for {name} ({error})") from error
    except (ValueError, MemoryError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got one that cannot be read: {error}") from error
    return state


def _save_safetensors(state: Mapping[str, np.ndarray], path: Path) -> None:
    safetensors = _safetensors()
    metadata = getattr(state, "metadata", None)
    try:  # it writes the memory as it lies
        rows = {name: np.asarray(array, order="C") for name, array in state.items()}
        safetensors.numpy.save_file(rows, path, metadata=None if metadata is None else dict(metadata))
    except (ValueError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: expected dtypes that safetensors can hold: {error}") from error


def _load_state_dict(path: Path) -> dict[str, np.ndarray]:
    from .torch import load_state_dict
    from .torch.layers import to_array

    arrays, state = {}, load_state_dict(path)
    if inner := [name for name, value in state.items() if isinstance(value, dict)]:
        name = "state_dict" if "state_dict" in inner else inner[0]
        advice = f"torch.save what it holds under {name!r} as a file of its own"
        raise ValueError(f"{path}: expected a state dict, got a checkpoint with one in it: {advice}")
    for name, tensor in state.items():
        try:
            arrays[name] = to_array(tensor)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: expected tensors that NumPy can hold, got {name!r}: {error}") from error
    return arrays


def _save_state_dict(state: Mapping[str, np.ndarray], path: Path) -> None:
    import torch

    from .torch import save_state_dict

    tensors = {}
    for name, array in state.items():
        rows = np.array(array, order="C")
        bits = torch.from_numpy(rows.view(np.int16) if rows.dtype.name == "bfloat16" else rows)
        tensors[name] = bits.view(torch.bfloat16) if rows.dtype.name == "bfloat16" else bits
    save_state_dict(tensors, path)
