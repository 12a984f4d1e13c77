"""A call of anything public that can be spoilt, made, and held to what all calls promise.

A result that is right, or a TypeError or ValueError that names an argument and has changed nothing; inputs, and the
memory around them, as they were. What there is to call is in operations.py, what spoils it in odd_values.py.
"""

import ctypes
import inspect
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Call:
    """A function, its arguments by name, and what is to be true of the result.

    `holds(arguments as they were, result)` says whether the oracle could be asked. `writes` names arguments that are
    written in place; `state` is what else a failed call may not change (a method returns it); `names` are further
    words that an error may begin with; `near` are arrays that an odd argument may share memory with.
    """

    function: Callable
    args: dict[str, Any]
    holds: Callable[[dict[str, Any], Any], bool]
    writes: tuple[str, ...] = ()
    state: Any = ()
    names: tuple[str, ...] = ()
    near: list[np.ndarray] = field(default_factory=list)

    def __call__(self, *, by_position=False):
        """Make the call, with all arguments that may be given by position given so, or none."""
        named, first = dict(self.args), []
        if by_position:
            for parameter in inspect.signature(self.function).parameters.values():
                if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or parameter.name not in named:
                    break
                first.append(named.pop(parameter.name))
        return self.function(*first, **named)


# ---- what every call promises -------------------------------------------------------------------------------------


def attempt(call, *, by_position=False):
    """Make a call and hold it to its promises; return (whether the oracle was asked, the error or None)."""
    memory = {place: bytes_at(place) for a in arrays_in([call.args, call.near]) if (place := whole_of(a))[1] <= 1 << 22}
    state, frozen = picture(call.state), freeze(call.args)
    written = ()
    refusal = None
    try:
        result = call(by_position=by_position)
    except (TypeError, ValueError) as error:
        refusal = error
    else:
        written = arrays_in([call.state, *(call.args[name] for name in call.writes)])
    for (start, size), before in memory.items():
        expected = bytearray(before)
        for a in written:
            if whole_of(a) == (start, size):  # what lies between its elements stays
                offset = a.__array_interface__["data"][0] - start
                np.ndarray(a.shape, a.dtype, expected, offset, a.strides)[...] = a
        assert bytes_at((start, size)) == expected, f"memory written by a call ({refusal!r})"
    if refusal is None:
        return call.holds(frozen, result), None
    words = "|".join(map(re.escape, [*call.args, *call.names]))
    assert re.match(rf"({words})\b", str(refusal)), f"names no argument: {refusal!r}"
    assert picture(call.state) == state, f"state changed by a call that failed: {refusal!r}"
    return False, refusal


def arrays_in(value):
    """Return all arrays in an argument, also in what it holds."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [a for item in value if item is not value for a in arrays_in(item)]
    return [a for a in members(value).values() if isinstance(a, np.ndarray)]


def members(value):
    """Return the attributes of an object of fastbn, by name."""
    if not type(value).__module__.startswith("fastbn"):
        return {}
    slots = [name for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    return {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})


def whole_of(array):
    """Return (address, bytes) of the outermost array that this one is a view of."""
    whole = array
    while array is not None:
        whole, array = (array if isinstance(array, np.ndarray) else whole), getattr(array, "base", None)
    low, high = np.lib.array_utils.byte_bounds(whole)
    return low, (high - low) * bool(whole.size)


def bytes_at(place):
    return ctypes.string_at(*place)


def freeze(value):
    """Return a copy of arguments, as deep as their arrays lie."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    if type(value) in (list, tuple) and not any(item is value for item in value):
        return type(value)(map(freeze, value))
    if hasattr(value, "__array__") and not isinstance(value, (type, np.generic)):
        with suppress(Exception):  # it may be anything; what it views may be an output
            return np.asarray(value).copy()
    return value


def picture(value):
    """Return something that is equal only where nothing in an object has changed."""
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, Mapping):
        return {key: picture(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [picture(item) for item in value]
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if inspect.ismethod(value):
        return picture(value())
    inner = members(value)
    return {name: picture(item) for name, item in inner.items()} if inner else value
