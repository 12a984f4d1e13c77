"""Models on disk: an .npz of one JSON text, the architecture, and one array per entry of the state.

Nothing is ever pickled or unpickled. A file is checked whole, names, shapes, dtypes and checksums, before a
layer is built from it.
"""

import json
import os
import zipfile
from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.lib import format as npy

from ..interrupts import interrupt_deferred
from ..paths import check_file, replacing
from ..untrusted import GROWTH, LARGEST_SMALL, check_archive
from .activations import ReLU, Sigmoid, Tanh
from .layers import BatchNorm, Dense, Standardizer

FORMAT, VERSION = "fastbn.nn", 1
ARCHITECTURE = "architecture"
MOST_LAYERS = 10_000
LAYERS = {layer.__name__: layer for layer in (Dense, BatchNorm, Standardizer, ReLU, Sigmoid, Tanh)}


def save(model, path):
    """Write `model`; `Sequential.save` is the documentation."""
    layers = [{"type": type(layer).__name__, **layer.config()} for layer in model.layers]
    text = json.dumps({"format": FORMAT, "version": VERSION, "layers": layers})
    # np.savez takes allow_pickle since NumPy 2.1 only
    with replacing(path) as [temporary], zipfile.ZipFile(temporary, "x") as archive:
        for name, array in {ARCHITECTURE: np.array(text), **model.state_dict()}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)


def read(path, build):
    """Return `build(*layers)` with the layers in the file at `path`; `nn.load` is the documentation."""
    path = check_file(path)
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                check_archive(archive, max(LARGEST_SMALL, GROWTH * os.path.getsize(path)))
                return _read(archive, build)
        except Exception as error:  # zipfile, zlib, json and NumPy raise a dozen kinds for damaged bytes
            raise ValueError(f"{path}: expected a model saved by fastbn.nn: {_reason(error)}") from error


def _reason(error):
    return f"missing {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def _read(archive, build):
    members = archive.namelist()
    names = [name.removesuffix(".npy") for name in members]
    if len(set(names)) != len(names) or members != [f"{name}.npy" for name in names]:
        raise ValueError("expected members that are .npy files, each once")
    if ARCHITECTURE not in names:
        raise ValueError(f"missing {ARCHITECTURE}")
    layers = _architecture(_array(archive, ARCHITECTURE))

    expected = {}
    for index, (kind, config) in enumerate(layers):
        try:
            arrays = kind.arrays_of(config)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"layers[{index}]: {_reason(error)}") from error
        expected |= {f"{index}.{name}": description for name, description in arrays.items()}
    found = set(names) - {ARCHITECTURE}
    if found != set(expected):
        missing, extra = sorted(set(expected) - found), sorted(found - set(expected))
        raise ValueError(f"arrays: missing {', '.join(missing) or 'none'}, unknown {', '.join(extra) or 'none'}")
    for name, (shape, dtype) in expected.items():
        got, kind = _header(archive, name)
        if (got, kind) != (shape, np.dtype(dtype)):
            raise ValueError(f"{name}: expected {dtype} of shape {shape}, got {kind} of shape {got}")
    state = {name: _array(archive, name) for name in expected}

    built = [kind.from_config(config) for kind, config in layers]
    load_state(built, state)
    return build(*built).eval()


def _architecture(array):
    """Return [(class, config)] from the JSON text."""
    if array.dtype.kind != "U" or array.shape != ():
        raise ValueError(f"{ARCHITECTURE}: expected one text, got {array.dtype} of shape {array.shape}")
    content = json.loads(str(array))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{ARCHITECTURE}: expected format {FORMAT!r}")
    if content.get("version") != VERSION:
        raise ValueError(f"{ARCHITECTURE}: expected version {VERSION}, got {content.get('version')!r}")
    if len(content["layers"]) > MOST_LAYERS:
        raise ValueError(f"{ARCHITECTURE}: expected at most {MOST_LAYERS} layers, got {len(content['layers'])}")
    layers = []
    for index, config in enumerate(content["layers"]):
        kind = config.pop("type")
        if kind not in LAYERS:
            raise ValueError(f"layers[{index}]: expected one of {', '.join(LAYERS)}, got {kind!r}")
        layers.append((LAYERS[kind], config))
    return layers


def _header(archive, name):
    """Return shape and dtype of an array without reading it, after checking that its data have that size."""
    with archive.open(f"{name}.npy") as file:
        version = npy.read_magic(file)
        readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name}: expected .npy version 1.0 or 2.0, got {version}")
        shape, _, dtype = readers[version](file)
        size = archive.getinfo(f"{name}.npy").file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name}: expected numbers, got Python objects, which are never unpickled")
    if size != dtype.itemsize * prod(shape):
        raise ValueError(f"{name}: expected as many bytes as {dtype} of shape {shape} has, got {size}")
    return shape, dtype.newbyteorder("=")  # the other byte order is converted


def _array(archive, name):
    _header(archive, name)
    with archive.open(f"{name}.npy") as file:
        array = npy.read_array(file, allow_pickle=False)
        file.read(1)  # at the end of the member zipfile compares the checksum
    return array


def load_state(layers, state, n_in=None):
    """Copy `state`, {"<index>.<name>": array}, into `layers`: all of it, or nothing and a ValueError."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping of names to arrays, got {type(state).__name__}")
    parts = {str(i): {} for i in range(len(layers))}
    for key, array in state.items():
        index, _, name = str(key).partition(".")
        if index not in parts or not name:
            raise ValueError(f"state: expected keys of layers 0 to {len(layers) - 1}, got {key!r}")
        parts[index][name] = array
    checked = []
    for index, (layer, part) in enumerate(zip(layers, parts.values(), strict=True)):
        try:
            checked.append(layer.check_state(part, n_in))
            layer.from_config(layer.config()).load_state_dict(checked[-1])  # on trial: it may refuse values
        except ValueError as error:
            raise ValueError(f"layers[{index}] ({type(layer).__name__}): {error}") from error
    with interrupt_deferred():
        for layer, part in zip(layers, checked, strict=True):
            layer.load_state_dict(part)
