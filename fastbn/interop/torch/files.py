"""PyTorch's files: exported programs (.pt2) and state dicts (.pt, .pth), read without running what they hold.

torch.export.load falls back on an unrestricted unpickler, evaluates the text of symbolic sizes, and compiles Python
from the names in the file. So a file is looked through first, by the same reader: its tensors must be plain, its
sizes formulas, its names names.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

from ...paths import check_file, check_path, replacing
from ...untrusted import check_archive

_CALLS = {  # the classes of formulas; none that computes a number too long to hold, as LShift and PowByNatural can
    "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Mod", "PythonMod", "ModularIndexing", "Max", "Min",
    "FloorDiv", "CleanDiv", "CeilDiv", "IntTrueDiv", "FloatTrueDiv", "CeilToInt", "FloorToInt", "RoundToInt",
    "TruncToInt", "TruncToFloat", "ToFloat", "IsNonOverlappingAndDenseIndicator", "Identity", "Where", "Piecewise",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan",
    "GreaterThan", "And", "Or", "Not", "True", "False", "oo", "int_oo", "true", "false", "ceiling", "floor",
}  # fmt: skip
LARGEST_POWER = 1000  # what the exponents of a formula multiply to at most
_WORD = re.compile(r"[A-Za-z_]\w*")
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d+'(, \w+=(True|False))*\)|Integer\(-?\d+\)|Float\('-?[\d.e+-]+', \w+=\d+\)")
_LENGTH = re.compile(r"L(\['\w+'\]|\[\d+\])+\.(size\(\)|shape)\[\d+\]")  # L['x'].size()[0]
_FREE = {"stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom", "torch_version"}


def load(path: str | os.PathLike[str]) -> ExportedProgram:
    """Load an exported program that torch.export.save has written.

    Parameters
    ----------
    path : str or path
        A .pt2 file.

    Returns
    -------
    ExportedProgram

    Raises
    ------
    ValueError
        The file is no exported program, or holds more than a graph and plain tensors: pickled objects, tensors of
        subclasses, compiled code, text that is no formula where a size stands. None of it is loaded.
    OSError
        The file cannot be read.
    """
    path = check_file(path)
    with open(path, "rb") as file:
        content = file.read()
    try:
        _inspect(content, path)
        return torch.export.load(io.BytesIO(content))
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: expected an exported program (.pt2), got {_line(error)}") from error


def save(program: ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write an exported program to a .pt2 file.

    Parameters
    ----------
    program : torch.export.ExportedProgram
    path : str or path
        Its name must end in .pt2.

    Raises
    ------
    TypeError, ValueError
        `program` is none, or `path` ends otherwise.
    """
    if not isinstance(program, ExportedProgram):
        raise TypeError(f"program: expected an ExportedProgram, got {type(program).__name__}")
    if not (path := check_path(path)).endswith(".pt2"):
        raise ValueError(f"path: expected a name that ends in .pt2, got {path!r}")
    _write(path, lambda file: torch.export.save(program, file))


def load_state_dict(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a state dict that torch.save has written, on the CPU, with nothing unpickled but tensors and containers.

    Parameters
    ----------
    path : str or path
        A .pt or .pth file.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        The file holds something else: a pickled module, a TorchScript archive, an exported program, no dict.
    OSError
        The file cannot be read.
    """
    name = check_file(path)
    with open(name, "rb") as file:
        content = file.read()
    if content[:4] == b"PK\3\4":  # as PyTorch tells the two formats apart
        members = _members(content, f"{name}: expected a state dict")
        if any(member.endswith("constants.pkl") for member in members):
            raise ValueError(f"{name}: expected a state dict, got a TorchScript archive; {_ADVICE}")
        if any(member.endswith("archive_format") for member in members):
            raise ValueError(f"{name}: expected a state dict, got an exported program: name it .pt2")
    try:
        state = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(f"{name}: expected a state dict, got a pickled object that is not read; {_ADVICE}") from error
    except Exception as error:
        raise ValueError(f"{name}: expected a state dict, got {_line(error)}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{name}: expected a state dict, got {type(state).__name__}")
    return state


def save_state_dict(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a state dict, as torch.save does.

    Parameters
    ----------
    state : dict
    path : str or path
    """
    _write(path, lambda file: torch.save(state, file))


def _write(path: str | os.PathLike[str], save: Callable[[io.BytesIO], None]) -> None:
    """Write what `save` writes. By memory: PyTorch puts a file's name into it, and may abort where the disk is full."""
    save(content := io.BytesIO())
    with replacing(path) as [temporary], open(temporary, "wb") as file:
        file.write(content.getbuffer())


_ADVICE = "export the module with torch.export.export and torch.export.save it as .pt2"


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _members(content: bytes, expected: str) -> list[str]:
    """Return the names of an archive's members; they are no longer than the file, PyTorch compresses nothing."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            check_archive(archive, len(content))
            return archive.namelist()
    except Exception as error:  # zipfile has several
        raise ValueError(f"{expected}, got a broken file ({_line(error)})") from error


def _inspect(content: bytes, path: str) -> None:
    """Raise ValueError where a file holds what must not be loaded."""

    def refuse(what: str) -> None:
        raise ValueError(f"{path}: expected an exported program with plain tensors (.pt2), got {what}, not loaded")

    if "version" in _members(content, f"{path}: expected an exported program (.pt2)"):
        refuse("an older format")  # which torch.export.load turns to where it fails, and unpickles
    reader = torch._C.PyTorchFileReader(io.BytesIO(content))
    names = reader.get_all_records()
    if "archive_format" not in names or reader.get_record("archive_format") != b"pt2":
        refuse("another kind of file")
    if not any(name.startswith("models/") for name in names):
        refuse("no program in it")
    for name in names:
        if name.startswith("data/aotinductor/") or name.endswith((".so", ".pyd", ".dll")):
            refuse(f"compiled code ({name})")
        if name.startswith(("data/weights/", "data/constants/")):
            if name.endswith(".json"):
                for target, payload in json.loads(reader.get_record(name))["config"].items():
                    plain = re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]) and not payload["use_pickle"]
                    if not plain or not payload["tensor_meta"]:
                        refuse(f"a pickled object ({target})")
                    _check(payload["tensor_meta"], refuse)
            elif not re.fullmatch(r"data/(weights/weight|constants/tensor)_\d+", name):
                refuse(f"a pickled object ({name})")
        elif name.startswith("data/sample_inputs/") and (record := reader.get_record(name)):
            try:
                torch.load(io.BytesIO(record), weights_only=True)
            except pickle.UnpicklingError:
                refuse(f"pickled objects as example inputs ({name})")
        elif name.startswith("models/"):
            _check(json.loads(reader.get_record(name)), refuse)


def _check(tree: Any, refuse: Any) -> None:
    for key, text in _texts(tree, ""):
        if key == "expr_str":
            if not _is_formula(text):
                refuse(f"the size {text[:60]!r}, which is no formula")
        elif key == "guards_code":
            plain = re.fullmatch(r"([\d\s()+*/<>=!%.-]|\b(and|or|not|min|max)\b)*", _LENGTH.sub("0", text))
            if not plain or _grows(text):
                refuse(f"the guard {text[:60]!r}, which is no formula")
        elif key in ("in_spec", "out_spec"):
            _check(json.loads(text), refuse)
        elif key == "context":
            _check_context(text, refuse)
        elif key not in (*_FREE, "as_string", "as_strings") and not re.fullmatch(r"[\w.:<>#\[\] -]*", text):
            refuse(f"the name {text[:60]!r}")


def _check_context(text: str, refuse: Any) -> None:
    try:
        tree = json.loads(text)
    except ValueError:
        tree = text
    for _, word in _texts(tree, ""):
        if not re.fullmatch(r"[\w. -]*", word):
            refuse(f"the name {word[:60]!r}")


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yield every string of a JSON tree with the key it stands under."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, value in tree.items():
            if key not in _FREE and name not in _FREE:
                yield "", name
            if name not in _FREE:
                yield from _texts(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)


def _is_formula(text: str) -> bool:
    """Say whether nothing but numbers, symbols and the classes of formulas stands in `text`, and no huge power."""
    rest = _SYMBOL.sub("0", text)
    plain = re.fullmatch(r"[\w\s(),+*/<>=&|~-]*", rest) is not None and "__" not in rest
    known = all(word in _CALLS or re.fullmatch(r"[a-z]+\d+", word) for word in _WORD.findall(rest))
    return plain and known and not _grows(text) and _power(text) <= LARGEST_POWER


def _power(text: str) -> float:
    """Return what the exponents in a formula multiply to; infinity where one is not a digit, or all is no formula."""
    product = 1.0
    try:
        for node in ast.walk(ast.parse(text, mode="eval")):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Pow":
                digit = re.fullmatch(r"Integer\(-?(\d)\)", ast.unparse(node.args[-1])) if node.args else None
                product *= max(1, int(digit[1])) if digit else float("inf")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return float("inf")
    return product


def _grows(text: str) -> bool:
    """Say whether short text stands for a number that takes for ever: 9**9**9, 1 << 10**10, or just its digits."""
    return any(operator in text for operator in ("**", "<<", ">>")) or re.search(r"\d{30}", text) is not None
