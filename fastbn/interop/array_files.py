"""Load and save arrays by name: .npz and safetensors files, PyTorch state dicts. Nothing is unpickled."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from ..paths import check_file, check_path, replacing
from ..untrusted import GROWTH, LARGEST_SMALL, check_archive

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")


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
    path = Path(check_file(path))
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
        An existing file is replaced, once the new one is whole.

    Raises
    ------
    ValueError
        The suffix is another one, or the file cannot hold an array's dtype.
    OSError
        The file cannot be written.
    ModuleNotFoundError
        safetensors, or PyTorch, is not installed.
    """
    path = Path(check_path(path))
    write = {".npz": _save_npz, ".safetensors": _save_safetensors}.get(_suffix(path), _save_state_dict)
    with replacing(path) as [temporary]:
        try:
            write(state, temporary)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected dtypes that {path.suffix} can hold, got {error}") from error


def _suffix(path: Path) -> str:
    if (suffix := path.suffix.lower()) not in SUFFIXES:
        raise ValueError(f"{path}: expected a suffix of {', '.join(SUFFIXES)}, got {suffix!r}")
    return suffix


def _most(path: Path) -> int:
    """Return how many bytes the contents of a file may grow to."""
    return max(LARGEST_SMALL, GROWTH * path.stat().st_size)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    with open(path, "rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                raise ValueError("it is no zip file, or truncated")
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, _most(path))
                return {m.filename.removesuffix(".npy"): _load_npy(archive, m) for m in archive.infolist()}
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected an .npz file, got a damaged one: {error}") from error
        except Exception as error:  # zipfile, tokenize and NumPy raise a dozen kinds for damaged bytes
            raise ValueError(f"{path}: expected an .npz file, got one that cannot be read: {error}") from error


def _load_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Load an array whose data are as long as its header says: memory is never taken for what is not there."""
    name = member.filename
    if not name.endswith(".npy"):
        raise ValueError(f"{name} is no array")
    with archive.open(member) as file:
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if (version := npy.read_magic(file)) not in readers:
            raise ValueError(f"{name} is no array of numbers (.npy version {version})")
        shape, _, dtype = readers[version](file)
        size = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name}: Object arrays cannot be loaded, nothing is unpickled")
    if not dtype.itemsize or dtype.itemsize * prod(shape) != size:
        raise ValueError(f"{name} has {size} bytes, not those of {str(dtype)[:60]} of shape {str(shape)[:60]}")
    with archive.open(member) as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read(1)  # at the end of the member zipfile compares the checksum
    return array


def _save_npz(state: Mapping[str, np.ndarray], path: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:  # np.savez cannot name an array "file"
        for name, array in state.items():
            if array.dtype.isbuiltin == 2:  # bfloat16: its name would be lost
                raise ValueError(f"{array.dtype} in {name}")
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def _safetensors() -> Any:
    try:
        import ml_dtypes  # noqa: F401  or NumPy does not know bfloat16
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'fastbn.interop.arrays needs safetensors: pip install "fastbn[safetensors]"', name="safetensors"
        ) from error
    return safetensors


def _load_safetensors(path: Path) -> State:
    safetensors, state = _safetensors(), State()
    with open(path, "rb"):  # it would call a file missing that may not be read
        pass
    try:
        with safetensors.safe_open(path, framework="np") as file:
            state.metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118
                try:
                    state[name] = file.get_tensor(name)
                except (AttributeError, TypeError, KeyError) as error:
                    raise ValueError(f"NumPy has no dtype for {name} ({error})") from error
    except OSError:
        raise
    except Exception as error:  # its own, NumPy's and json's
        raise ValueError(f"{path}: expected a safetensors file, got one that cannot be read: {error}") from error
    return state


def _save_safetensors(state: Mapping[str, np.ndarray], path: str) -> None:
    safetensors = _safetensors()
    metadata = getattr(state, "metadata", None)
    rows = {name: np.asarray(array, order="C") for name, array in state.items()}  # it writes the memory as it lies
    try:
        safetensors.numpy.save_file(rows, path, metadata=None if metadata is None else dict(metadata))
    except safetensors.SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), path) from error
        raise ValueError(str(error)) from error


def _load_state_dict(path: Path) -> dict[str, np.ndarray]:
    from .torch import load_state_dict
    from .torch.layers import to_array

    arrays, state = {}, load_state_dict(path)
    if inner := [name for name, value in state.items() if isinstance(value, dict)]:
        name = "state_dict" if "state_dict" in inner else inner[0]
        advice = f"torch.save what it holds under {name!r} as a file of its own"
        raise ValueError(f"{path}: expected a state dict, got a checkpoint with one in it: {advice}")
    tensors = [value for value in state.values() if hasattr(value, "element_size")]  # whose strides may be 0
    if (size := sum(tensor.numel() * tensor.element_size() for tensor in tensors)) > _most(path):
        raise ValueError(f"{path}: expected a state dict, got one that would grow to {size:,} bytes")
    for name, tensor in state.items():
        try:
            arrays[name] = to_array(tensor)
        except (AttributeError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: expected tensors that NumPy can hold, got {name!r}: {error}") from error
    return arrays


def _save_state_dict(state: Mapping[str, np.ndarray], path: str) -> None:
    import torch

    from .torch import save_state_dict

    tensors = {}
    for name, array in state.items():
        rows = np.array(array, order="C")
        bits = torch.from_numpy(rows.view(np.int16) if rows.dtype.name == "bfloat16" else rows)
        tensors[name] = bits.view(torch.bfloat16) if rows.dtype.name == "bfloat16" else bits
    save_state_dict(tensors, path)
