"""Paths that callers give, and files that take their places whole."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from .interrupts import interrupt_deferred


def check_path(path: str | os.PathLike[str]) -> str:
    """Return `path` as text, or raise TypeError, or ValueError where no file can have that name."""
    try:
        text = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a str or os.PathLike, got {type(path).__name__}") from None
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError(f"path: expected text that the file system can encode, got {text!r:.80}") from None
    if "\0" in text:
        raise ValueError(f"path: expected a name without an embedded null byte, got {text!r:.80}")
    return text


def check_file(path: str | os.PathLike[str]) -> str:
    """Return :func:`check_path` of a file to read or replace; ValueError for what is no file, and may never end."""
    text = check_path(path)
    if os.path.exists(text) and not os.path.isfile(text) and not os.path.isdir(text):
        raise ValueError(f"path: expected a file, got a device, a pipe or a socket: {text!r}")
    return text


@contextmanager
def replacing(*paths: str | os.PathLike[str]) -> Iterator[list[str]]:
    """Give names of files to write, which take the places of `paths` if all goes well, and are gone if not.

    A file keeps its mode; a link is replaced, not what it leads to.
    """
    # No Path: pathlib interns a path's parts, which CPython 3.13t keeps for ever
    named = {}
    for path in map(check_file, paths):
        if not os.path.isdir(os.path.dirname(path) or "."):  # what writes the file might say anything
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        named[_beside(path)] = path
    try:
        yield list(named)
        place(list(named.items()))
    except BaseException as error:
        for temporary in named:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        if isinstance(error, OSError) and error.filename in named:
            with _named(named[error.filename]):
                raise
        raise


def place(moves: Sequence[tuple[str, str]]) -> None:
    """Move files to their places, all of them or none, to be there after a power cut too.

    One file's move is one step. Of several, what was there is put aside first: whoever looks in between finds some of
    them missing, never a model with the weights of another. No Ctrl-C comes between.
    """
    aside: dict[str, str] = {}
    placed: list[str] = []
    for temporary, file in moves:
        with _named(file):
            if os.path.isfile(file) and not os.path.islink(file):
                shutil.copymode(file, temporary)
            _sync(temporary, os.O_RDWR)
    with interrupt_deferred():
        try:
            for _, file in moves:
                if len(moves) > 1 and os.path.lexists(file):
                    with _named(file):
                        os.replace(file, old := _beside(file))
                    aside[file] = old
            for temporary, file in moves:
                with _named(file):
                    os.replace(temporary, file)
                placed.append(file)
        except BaseException:
            for file in set(placed).difference(aside):
                os.unlink(file)
            for file, old in aside.items():
                os.replace(old, file)
            raise
        for old in aside.values():
            os.unlink(old)
    if hasattr(os, "O_DIRECTORY"):
        for folder in {os.path.dirname(file) or "." for _, file in moves}:
            with suppress(OSError):  # all is in place; some file systems cannot
                _sync(folder, os.O_DIRECTORY)


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Let an OSError name a file that a user knows."""
    try:
        yield
    except OSError as error:
        error.filename = file
        del error.filename2
        raise


def _beside(path: str) -> str:
    """Return a name that no file has, in the same folder and with the same suffix."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".fastbn-{uuid.uuid4().hex}{name[name.rfind('.') :] if '.' in name else ''}")


def _sync(path: str, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
