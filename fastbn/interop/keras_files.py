"""Load Keras models without running code in their files, and save them."""

from __future__ import annotations

import json
import os
import zipfile
from typing import Any

import keras


def load(path: str | os.PathLike[str]) -> Any:
    """Load a Keras model, not compiled; code in the file (Lambda layers) is never run.

    Parameters
    ----------
    path : path of a .keras, .h5 or .hdf5 file

    Raises
    ------
    FileNotFoundError
    ValueError
        Naming the file, in one line: it holds no model, is cut off, or needs classes that Keras does not know.
    """
    path = os.fspath(path)
    if not path.endswith((".keras", ".h5", ".hdf5")):
        raise ValueError(f"{path}: expected a .keras, .h5 or .hdf5 file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: expected a file, found none")
    try:
        if not path.endswith(".keras"):
            _refuse_code(path)
        elif not zipfile.is_zipfile(path):  # Keras says that there is no file
            raise ValueError("it is no zip file, or truncated")
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # zipfile, h5py, json and Keras raise whatever they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected a Keras model that Keras {keras.__version__} can load: {reason}") from error


def save(model: Any, path: str | os.PathLike[str]) -> None:
    """Save a Keras model as a .keras file; ValueError for another suffix: the formats before it lose settings."""
    path = os.fspath(path)
    if not path.endswith(".keras"):
        raise ValueError(f"{path}: expected a name that ends in .keras, the format Keras models are written in")
    model.save(path)


def _refuse_code(path: str) -> None:
    """Raise ValueError for an HDF5 model with Lambda layers, whose code some versions of Keras run at once."""
    import h5py

    with h5py.File(path, "r") as file:
        config = file.attrs.get("model_config")
    if config is None:
        raise ValueError("it holds no model, at most the weights of one")

    def lambdas(tree: Any) -> bool:
        if isinstance(tree, dict):
            return tree.get("class_name") in ("Lambda", "__lambda__") or any(map(lambdas, tree.values()))
        return isinstance(tree, list) and any(map(lambdas, tree))

    if lambdas(json.loads(config)):
        raise ValueError("it has a Lambda layer, whose code is not run")
