"""Load Keras models without running code in their files, and save them."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import PurePosixPath
from typing import Any

import keras

from ..paths import check_path, replacing
from ..untrusted import GROWTH, LARGEST_SMALL, check_archive

CODE = ("Lambda", "__lambda__", "TFSMLayer", "TorchModuleWrapper")  # classes whose configs are programs, or name one

LONGEST_NAME = 255  # bytes, on nearly all file systems


def load(path: str | os.PathLike[str]) -> Any:
    """Load a Keras model, not compiled; code in the file (Lambda layers and the like) is never run.

    Parameters
    ----------
    path : path of a .keras, .h5 or .hdf5 file

    Raises
    ------
    FileNotFoundError
    ValueError
        Naming the file, in one line: it holds no model, is cut off, needs classes that Keras does not know, or holds
        what is not loaded: code, weights in other files, or far more of them than its size.
    """
    path = check_path(path)
    if not path.endswith((".keras", ".h5", ".hdf5")):
        raise ValueError(f"{path}: expected a .keras, .h5 or .hdf5 file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected a file, found none")
    with open(path, "rb"):  # Keras and h5py would not say that it may not be read
        pass
    try:
        if path.endswith(".keras"):
            _inspect_archive(path)
        else:
            _inspect_hdf5(path, _most(path), model=True)
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # zipfile, h5py, json and Keras raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected a Keras model that Keras {keras.__version__} can load: {reason}") from error


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a Keras model as a .keras file; ValueError for another suffix: the formats before it lose settings."""
    path = check_path(path)
    if not path.endswith(".keras"):
        raise ValueError(f"{path}: expected a name that ends in .keras, the format Keras models are written in")
    with replacing(path) as [temporary]:
        model.save(temporary)


def _most(path: str) -> int:
    return max(LARGEST_SMALL, GROWTH * os.path.getsize(path))


def _inspect_archive(path: str) -> None:
    """Raise ValueError where a .keras file holds what must not be loaded, whatever the version of Keras would do."""
    if not zipfile.is_zipfile(path):  # Keras says that there is no file
        raise ValueError("it is no zip file, or truncated")
    with zipfile.ZipFile(path) as archive:
        check_archive(archive, most := _most(path))
        # Where unpacking fails, Keras leaves behind what it has unpacked by then
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"its member {damaged!r} is damaged")
        paths = [PurePosixPath(name) for name in archive.namelist() if not name.endswith("/")]
        folders = {folder for path in paths for folder in path.parents}
        for inside in paths:
            if inside in folders or any(len(os.fsencode(part)) > LONGEST_NAME for part in inside.parts):
                raise ValueError(f"its member {str(inside)[:99]!r} cannot be a file")
        _refuse_code(json.loads(archive.read("config.json")))
        for name in archive.namelist():
            if name.endswith(".npz"):
                raise ValueError(f"it has weights in {name}, which Keras does not write")
            if name.endswith(".h5"):
                with archive.open(name) as member:
                    _inspect_hdf5(member, most)


def _inspect_hdf5(where: Any, most: int, model: bool = False) -> None:
    """Raise ValueError where an HDF5 file points to other files, or has arrays of more than `most` bytes."""
    import h5py

    with h5py.File(where, "r") as file:
        size = 0

        def objection(name: str, link: Any) -> str | None:
            nonlocal size
            if isinstance(link, h5py.ExternalLink):
                return f"it has weights in another file ({name})"
            if isinstance(link, h5py.HardLink) and isinstance(data := file[name], h5py.Dataset):
                if data.external or data.is_virtual:
                    return f"it has weights in another file ({name})"
                if (size := size + data.nbytes) > most:
                    return f"its arrays would grow to {size:,} bytes"
            return None

        if why := file.visititems_links(objection):
            raise ValueError(why)
        if model:
            if (config := file.attrs.get("model_config")) is None:
                raise ValueError("it holds no model, at most the weights of one")
            _refuse_code(json.loads(config))


def _refuse_code(tree: Any) -> None:
    """Raise ValueError for layers whose code some versions of Keras run at once."""
    if isinstance(tree, dict):
        if (name := tree.get("class_name")) in CODE:
            raise ValueError(f"it has a {name} layer, whose code is not run")
        tree = list(tree.values())
    for value in tree if isinstance(tree, list) else ():
        _refuse_code(value)
