"""All-reduce in rank order between the processes of a communicator, in which an error of one of them reaches all.

Every message says what it is part of and whether its sender, or one that its sender has heard of, has failed. So a
rank that fails sends its error in place of what it owes to the next exchange, whichever that is, and nobody waits for
it; and ranks that are at different exchanges, or bring data of different lengths, find out when they meet.

The reduction is a tree over the ranks in their order, neighbours first, then pairs of pairs. Both ranks of a meeting
combine the same two parts in the same order, so all of them end with the same bits, whatever the MPI library does.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from mpi4py.run import set_abort_status

from ..nn.training import interrupt_deferred

__all__ = ["Group", "RankError", "group_of"]

_DATA, _DIFFER, _FAILED = range(3)  # what is worse goes on
_NOTHING = np.empty(0, np.uint8)
_HEAD = struct.Struct("=4q")  # kind, rank, place, length of the text
_INSIDE = 1 << 62  # the place of an exchange that is not the end of a block

Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]


class RankError(RuntimeError):
    """Another rank has failed; `rank` is the first one that did, and the message its error."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(f"rank {rank}: {message}")
        self.rank = rank


class _Message(NamedTuple):
    kind: int
    rank: int  # the first of those it comes from, or of those that failed
    text: bytes  # what the data are, or what went wrong
    data: np.ndarray  # bytes; none with an error
    place: int = _INSIDE  # how deep in blocks its sender is at the end of one; of several, the deepest


class Group:
    """The ranks of a communicator on which nobody else sends messages."""

    _depth = 0  # of blocks
    _told: BaseException | None = None  # the error that all ranks have got
    _layers = 0  # made so far
    _broken = False  # an exchange ended half-way: there can be no other one

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm, self.rank, self.size = comm, comm.Get_rank(), comm.Get_size()

    def __deepcopy__(self, memo: dict[int, object]) -> Group:
        return self  # a copied layer talks to the same ranks

    def __reduce__(self) -> str:
        raise TypeError("pickle: expected what belongs to no process: save state_dict(), and load it into a new layer")

    def next_number(self) -> int:
        """Return a number that tells layers apart which all ranks make in the same order."""
        self._layers += 1
        return self._layers

    def reduce(self, what: str, part: np.ndarray, combine: Combine = np.add) -> np.ndarray:
        """Return the parts of all ranks combined, the same bits on every rank.

        Parameters
        ----------
        what : str
            What is reduced: ranks that bring something else are told so.
        part : ndarray of shape (n,), C-contiguous
        combine : callable
            (part of lower ranks, part of higher ranks) -> their combination, of the same shape and dtype.

        Raises
        ------
        RankError
            Another rank has failed.
        ValueError
            The ranks are not at the same exchange, or their parts differ in length or dtype.
        """
        dtype = part.dtype

        def combine_bytes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return combine(a.view(dtype), b.view(dtype)).view(np.uint8)

        what += f" ({len(part)} {dtype.name} numbers)" if len(part) else ""
        result = self._tree(_Message(_DATA, self.rank, what.encode(), part.view(np.uint8)), combine_bytes)
        if result.kind == _DATA:
            return result.data.view(dtype)
        self._told = _error_of(result)
        raise self._told

    def fail(self, error: BaseException) -> None:
        """Take part in the next exchange, whichever it is, with an error, which all ranks get then."""
        self._told = error
        self._tree(_Message(_FAILED, self.rank, _text_of(error), _NOTHING))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Tell the other ranks of what is raised in the block, unless an exchange has done so.

        For a block that makes an exchange, and whose errors come before or from it.
        """
        self._told = None
        try:
            yield
        except BaseException as error:
            if error is not self._told and not self._broken:
                self.fail(error)
            raise

    @contextmanager
    def block(self) -> Iterator[None]:
        """Meet the other ranks at the end of the block, whatever has been raised in it, here or there."""
        self._depth += 1
        try:
            try:
                yield
            except BaseException as error:
                if not self._broken:
                    self._end(_Message(_FAILED, self.rank, _text_of(error), _NOTHING, self._depth))
                raise
            result = self._end(_Message(_DATA, self.rank, b"the end of together", _NOTHING, self._depth))
            if result.kind != _DATA:
                raise _error_of(result)
        finally:
            self._depth -= 1

    def _end(self, mine: _Message) -> _Message:
        """Exchange until no rank is deeper inside; return the first of the results that is an error, or the last.

        A rank that has raised is here early. In the exchange that the others are at then they get its error; it waits
        for them to come, too, so that all have made equally many exchanges when they leave.
        """
        with interrupt_deferred():  # who left early would leave the others waiting
            first = result = self._tree(mine)
            while result.place > self._depth:
                result = self._tree(mine)
                first = result if first.kind == _DATA else first
        return first

    def _tree(self, mine: _Message, combine: Combine = np.add) -> _Message:
        """Return the messages of all ranks as one, by :meth:`_doubling`; what interrupts that breaks the group."""
        if self._broken:
            raise RuntimeError("comm: expected exchanges that ended, got one that was interrupted: start again")
        with interrupt_deferred():  # Ctrl-C acts when it has ended; a second one at once
            self._broken = True
            result = self._doubling(mine, combine)
            self._broken = False
        return result

    def _doubling(self, mine: _Message, combine: Combine) -> _Message:
        """Recursive doubling over a power of two of the ranks.

        Of the others, extra in number, each gives its part to the rank before it and gets the result from there; that
        is so among the first 2·extra ranks, so that what is combined is always neighbours.
        """
        extra = self.size - (1 << self.size.bit_length() - 1)
        paired = self.rank < 2 * extra
        if paired and self.rank % 2:
            self._post(mine, self.rank - 1).Wait()
            return self._receive(self.rank - 1)
        if paired:
            mine = _meet(mine, self._receive(self.rank + 1), combine)
        place = self.rank // 2 if paired else self.rank - extra
        step = 1
        while step < self.size - extra:
            across = place ^ step
            other = 2 * across if across < extra else across + extra
            request = self._post(mine, other)
            theirs = self._receive(other)
            request.Wait()
            mine = _meet(mine, theirs, combine) if place < across else _meet(theirs, mine, combine)
            step *= 2
        if paired:
            self._post(mine, self.rank + 1).Wait()
        return mine

    def _post(self, message: _Message, rank: int) -> MPI.Request:
        text = message.text + bytes(-len(message.text) % 8)  # so that data are aligned
        head = np.frombuffer(_HEAD.pack(message.kind, message.rank, message.place, len(message.text)) + text, np.uint8)
        return self._comm.Isend(np.concatenate([head, message.data]), rank)

    def _receive(self, rank: int) -> _Message:
        status = MPI.Status()
        incoming = self._comm.Mprobe(rank, 0, status)  # its length first: an error may come in place of data
        buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        incoming.Recv(buffer)
        kind, first, place, length = _HEAD.unpack_from(buffer.data)
        data = _HEAD.size + length + -length % 8
        return _Message(kind, first, buffer[_HEAD.size : _HEAD.size + length].tobytes(), buffer[data:], place)


def group_of(comm: MPI.Comm) -> Group:
    """Return the group of a communicator, made at the first use, by all of its ranks together."""
    if not isinstance(comm, MPI.Comm):
        raise TypeError(f"comm: expected an mpi4py communicator, got {type(comm).__name__}")
    if comm == MPI.COMM_NULL:
        raise ValueError("comm: expected a communicator, got COMM_NULL, which a freed one is too")
    if comm.Is_inter():
        raise ValueError("comm: expected an intra-communicator, whose ranks are one group, got an inter-communicator")
    group = comm.Get_attr(_key())
    if not isinstance(group, Group):
        if comm.Get_size() > 1:
            _abort_after_errors()
        group = Group(comm.Dup())
        comm.Set_attr(_key(), group)
    return group


@functools.cache
def _abort_after_errors() -> None:
    """Let an exception that ends this process end the other ranks too, which may be waiting for it."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        before(kind, error, traceback)
        set_abort_status(1)  # MPI_Abort when the interpreter ends

    sys.excepthook = hook


@functools.cache
def _key() -> int:
    """Return what a communicator keeps its group under."""
    return MPI.Comm.Create_keyval()


def _meet(low: _Message, high: _Message, combine: Combine) -> _Message:
    """Return two messages as one, that of the lower ranks first."""
    place = max(low.place, high.place)
    if not low.kind == high.kind == _DATA:
        return (high if high.kind > low.kind else low)._replace(place=place)
    if low.text != high.text:
        text = b"ranks differ: rank %d: %b; rank %d: %b" % (low.rank, low.text, high.rank, high.text)
        return _Message(_DIFFER, low.rank, text, _NOTHING, place)
    try:
        with np.errstate(all="ignore"):
            return low._replace(data=combine(low.data, high.data), place=place)
    except Exception as error:  # such as no memory; the others wait for an answer
        return _Message(_FAILED, low.rank, _text_of(error), _NOTHING, place)


def _error_of(message: _Message) -> Exception:
    text = message.text.decode(errors="replace")
    return RankError(message.rank, text) if message.kind == _FAILED else ValueError(text)


def _text_of(error: BaseException) -> bytes:
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # an error whose text is one
        text = ""
    return (f"{name}: {text}" if text else name).encode(errors="replace")
