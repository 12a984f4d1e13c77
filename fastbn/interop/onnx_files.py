"""Load and save ONNX models, with the files beside them that hold their weights; no path leads out of the folder."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, external_data_helper, numpy_helper

from ..paths import check_file, check_path, replacing
from ..untrusted import GROWTH, LARGEST_SMALL

LARGEST = 2**31 - 1  # bytes of one protobuf message
SHARED = 4  # times the length of the files beside a model that its tensors may be in all: few are tied
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
    path = Path(check_file(path))
    model, left = _read(path), GROWTH * path.stat().st_size + LARGEST_SMALL
    files: set[Path] = set()
    for tensor in tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            where, length = _external(path, tensor)
            if where not in files:
                files.add(where)
                left += SHARED * where.stat().st_size
            if (left := left - length) < 0:
                raise ValueError(f"{path}: initializer {tensor.name!r}: expected data of its own, got others' again")
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
    path = Path(check_file(path))
    found = [_external(path, t)[0] for t in tensors(_read(path)) if t.data_location == TensorProto.EXTERNAL]
    return list(dict.fromkeys(found))


def save(model: ModelProto, path: str | os.PathLike[str], *, location: str | None = None) -> list[Path]:
    """Write a model; return the files written, the model's own the last.

    location : str or None
        The name of a file beside `path` for the weights of more than 1 kB. Beyond 2 GB, where a model cannot hold them
        itself, None means `path`'s name with ".data" behind it; else None keeps them in the model.
    """
    path = Path(check_path(path))
    if location is None and model.ByteSize() > LARGEST:
        location = f"{path.name}.data"
    if location is None:
        with replacing(path) as [temporary], open(temporary, "wb") as file:
            file.write(model.SerializeToString())
        return [path]
    if not isinstance(location, str):
        raise TypeError(f"location: expected the name of a file, got {type(location).__name__}")
    if Path(location).name != location or location in ("", "..", path.name) or "\0" in location:
        raise ValueError(f"location: expected the name of a file in the same folder, got {location!r}")
    copy, data = ModelProto(), path.parent / location
    copy.CopyFrom(model)
    large = [t for t in tensors(copy) if t.data_type != TensorProto.STRING and t.ByteSize() > EMBEDDED]
    files = [data, path] if large else [path]  # the model's own last, as returned; all or none is moved
    with replacing(*files) as [*beside, temporary]:
        if large:
            with open(beside[0], "wb") as file:
                for tensor in large:
                    if not tensor.HasField("raw_data"):
                        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
                    external_data_helper.set_external_data(tensor, location, file.tell(), len(tensor.raw_data))
                    file.write(tensor.raw_data)
                    tensor.ClearField("raw_data")
        with open(temporary, "wb") as file:
            file.write(copy.SerializeToString())
    return files


def _read(path: Path) -> ModelProto:
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: expected an ONNX model, got a file that is none, or a part of one") from error
    if not model.ir_version or not model.HasField("graph") or not model.opset_import:
        raise ValueError(f"{path}: expected an ONNX model, got a file without a graph")
    return model


def _external(path: Path, tensor: TensorProto) -> tuple[Path, int]:
    """Return the file that holds a tensor's data, in the model's folder and long enough, and their length."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    name = f"{path}: initializer {tensor.name!r}"
    folder = path.parent.resolve()
    try:
        posix, windows = PurePosixPath(location), PureWindowsPath(location)
        steps = {*posix.parts, *windows.parts}
        absolute = posix.is_absolute() or windows.drive or location.startswith("\\")
        file = folder / location
        outside = not location or absolute or ".." in steps or not file.resolve().is_relative_to(folder)
        missing = not outside and not file.is_file()
    except (OSError, RuntimeError, TypeError, ValueError):  # too long, links in circles, no text, a NUL
        outside = True
    if outside:
        expected = "expected external data in the model's folder, and no link that leads out of it"
        raise ValueError(f"{name}: {expected}, got location {location!r}")
    if missing:
        raise ValueError(f"{name}: expected its data in {location!r}, got no such file")
    size = file.stat().st_size
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", 0))
    except ValueError as error:
        raise ValueError(f"{name}: expected an offset and a length in bytes, got {entries}") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise ValueError(f"{name}: expected {length} bytes from {offset} on in {location!r}, got a file of {size}")
    return file, length or size - offset


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a model: of its graphs, their subgraphs, its functions, its training."""
    trained = [graph for info in model.training_info for graph in (info.initialization, info.algorithm)]
    for graph in (model.graph, *trained):
        yield from _of_graph(graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[NodeProto]) -> Iterator[TensorProto]:
    for entry in (entry for node in nodes for entry in node.attribute):
        yield from entry.tensors
        if entry.HasField("t"):
            yield entry.t
        for sparse in (*entry.sparse_tensors, *([entry.sparse_tensor] if entry.HasField("sparse_tensor") else [])):
            yield from (sparse.values, sparse.indices)
        for graph in (*entry.graphs, *([entry.g] if entry.HasField("g") else [])):
            yield from _of_graph(graph)
