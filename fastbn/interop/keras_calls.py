"""What Keras keeps of a model: the calls of its layers and operations, and the values of their variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras.src.models.functional import Functional  # has no public name


def is_transparent(op: Any) -> bool:
    """Say whether `op` is a model that does what Keras has recorded."""
    if isinstance(op, keras.Sequential):
        return type(op).call is keras.Sequential.call and op._functional is not None
    return isinstance(op, Functional) and type(op).call is Functional.call


def functional_of(model: Any) -> Any:
    """Return where Keras keeps the inputs, outputs and calls of `model`."""
    return model._functional if isinstance(model, keras.Sequential) else model


def calls_of(model: Any) -> Iterator[Any]:
    """Yield the calls that `model` makes, in the order Keras makes them: operation, arguments, outputs."""
    by_depth = functional_of(model)._nodes_by_depth
    known = {id(tensor) for tensor in functional_of(model).inputs}
    for depth in sorted(by_depth, reverse=True):
        for call in by_depth[depth]:
            if not call.is_input and all(id(tensor) in known for tensor in call.input_tensors):
                known.update(id(tensor) for tensor in call.outputs)
                yield call


def leaves_of(model: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """Yield every operation of `model` and of the models in it once, but those whose ids are in `seen`."""
    seen = set() if seen is None else seen
    for call in calls_of(model):
        op = call.operation
        if id(op) not in seen:
            seen.add(id(op))
            yield from leaves_of(op, seen) if is_transparent(op) else (op,)


def data_of(call: Any) -> Any:
    """Return what the operation is called on: a tensor, or a list of them."""
    arguments = call.arguments
    return arguments.args[0] if arguments.args else arguments.kwargs.get("inputs")


def source_of(call: Any) -> Any:
    """Return the one tensor that a layer or operation is called on, its mask apart."""
    data = data_of(call)
    return data if is_tensor(data) else call.input_tensors[0]


def is_tensor(value: Any) -> bool:
    return isinstance(value, keras.KerasTensor)


def to_array(value: Any) -> np.ndarray:
    """Return a copy of a variable or tensor, in its own dtype."""
    return np.array(keras.ops.convert_to_numpy(value))


def to_constant(value: Any, dtype: str) -> np.ndarray:
    """Return a constant as a computation in `dtype` sees it."""
    tensor = keras.ops.cast(keras.ops.convert_to_tensor(value), dtype)
    return to_array(tensor).astype(np.float64)
