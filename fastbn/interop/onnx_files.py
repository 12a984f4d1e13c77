"""Load and save ONNX models, with the files beside them that hold their weights; no path leads out of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto, external_data_helper, numpy_helper

LARGEST = 2**31 - 1  # bytes of one protobuf message
EMBEDDED = 1024  # bytes of a tensor that stays inside the model all the same: shapes and other small constants


def load(path: str | os.PathLike[str]) -> ModelProto:
    """Load a model with its external data.

    Raises
    ------
    ValueError
        The file is no ONNX model, or truncated; an initializer's data are missing, too short, or outside the
        model's folder: the message names file and initializer.
    OSError
        The file cannot be read.
    """
    path = Path(path)
    model = _read(path)
    for tensor in _tensors(model.graph):
        if tensor.data_location == TensorProto.EXTERNAL:
            where = _external(path, tensor)
            try:
                external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
                numpy_helper.to_array(tensor)  # as many bytes as its shape needs
            except Exception as error:
                raise ValueError(f"{path}: initializer {tensor.name!r}: {where} cannot be read: {error}") from error
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def external_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files beside a model that hold its weights."""
    path = Path(path)
    found = [_external(path, t) for t in _tensors(_read(path).graph) if t.data_location == TensorProto.EXTERNAL]
    return list(dict.fromkeys(found))


def save(model: ModelProto, path: str | os.PathLike[str], *, location: str | None = None) -> list[Path]:
    """Write a model; return the files written, the model's own the last.

    location : str or None
        The name of a file beside `path` for the weights. Beyond 2 GB, where a model cannot hold them itself, None
        means `path`'s name with ".data" behind it; else None keeps them in the model.
    """
    path = Path(path)
    if location is None and model.ByteSize() > LARGEST:
        location = f"{path.name}.data"
    if location is None:
        path.write_bytes(model.SerializeToString())
        return [path]
    if Path(location).name != location or location in ("", "..", path.name):
        raise ValueError(f"location: expected the name of a file in the same folder, got {location!r}")
    copy, data = ModelProto(), path.parent / location
    copy.CopyFrom(model)
    large = [t for t in _tensors(copy.graph) if t.data_type != TensorProto.STRING and t.ByteSize() > EMBEDDED]
    if large:
        with data.open("wb") as file:
            for tensor in large:
                if not tensor.HasField("raw_data"):
                    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
                external_data_helper.set_external_data(tensor, location, file.tell(), len(tensor.raw_data))
                file.write(tensor.raw_data)
                tensor.ClearField("raw_data")
    path.write_bytes(copy.SerializeToString())
    return [data, path] if large else [path]


def _read(path: Path) -> ModelProto:
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: expected an ONNX model, got a file that is none, or a part of one") from error
    if not model.ir_version or not model.HasField("graph") or not model.opset_import:
        raise ValueError(f"{path}: expected an ONNX model, got a file without a graph")
    return model


def _external(path: Path, tensor: TensorProto) -> Path:
    """Return the file that holds a tensor's data; it must lie in the model's folder and be long enough."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = f"{path}: initializer {tensor.name!r}"
    steps = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive or location.startswith("\\")
    folder = path.parent.resolve()
    file = folder / location
    if not location or absolute or ".." in steps or not file.resolve().is_relative_to(folder):
        raise ValueError(f"{name}: expected external data in the model's folder, got location {location!r}")
    if not file.is_file():
        raise ValueError(f"{name}: expected its data in {location!r}, got no such file")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as error:
        raise ValueError(f"{name}: expected an offset and a length in bytes, got {entries}") from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        size = file.stat().st_size
        raise ValueError(f"{name}: expected {length} bytes from {offset} on in {location!r}, got a file of {size}")
    return file


def _tensors(graph: GraphProto) -> Iterator[TensorProto]:
    """Yield every tensor of a graph and of its subgraphs."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for entry in node.attribute:
            if entry.HasField("t"):
                yield entry.t
            yield from entry.tensors
            for inner in ([entry.g] if entry.HasField("g") else []) + list(entry.graphs):
                yield from _tensors(inner)
