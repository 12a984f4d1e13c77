"""From the changes that folding makes to a new Keras model."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import keras

from .keras_calls import calls_of, functional_of, is_tensor, is_transparent, source_of, to_array
from .keras_graph import Change
from .keras_layers import LAYOUTS


class Builder:
    """Makes a model again, with new layers, without those that are gone."""

    def __init__(self, changes: dict[int, Change]) -> None:
        self._changes = changes
        self._new: dict[int, Any] = {}  # by the id of the old one
        self._pairs: list[tuple[Any, Any]] = []

    def build(self, model: Any) -> Any:
        """Return the new model, with all its values."""
        new = self._model(model)
        for old, made in self._pairs:
            if isinstance(old, keras.Layer) and not is_transparent(old):
                self._copy(old, made)
        for old, made in [(model, new), *reversed(self._pairs)]:  # a model hands it down to those it calls
            if isinstance(old, keras.Layer) and made.trainable != old.trainable:
                made.trainable = old.trainable
        return new

    def _model(self, model: Any) -> Any:
        make = self._sequential if isinstance(model, keras.Sequential) else self._graph
        return make(model)

    def _sequential(self, model: Any) -> Any:
        of = {id(call.operation): call for call in calls_of(model)}
        calls = [of[id(layer)] for layer in model.layers]  # the others make masks
        layers = [self._layer(call) for call in calls if not self._vanishes(call)] or [self._layer(calls[-1])]
        first = functional_of(model).inputs[0]._keras_history.operation
        return keras.Sequential([self._op(first), *layers], name=model.name)

    def _graph(self, model: Any) -> Any:
        tensors = {id(tensor): self._op(tensor._keras_history.operation).output for tensor in model.inputs}
        outputs = {id(tensor) for tensor in model.outputs}

        def put(tree: Any) -> Any:
            return keras.tree.map_structure(lambda leaf: tensors[id(leaf)] if is_tensor(leaf) else leaf, tree)

        for call in calls_of(model):
            if self._change(call.operation).gone:
                made = put(source_of(call))
                if not self._vanishes(call) or id(call.outputs[0]) in outputs:
                    made = self._layer(call)(made)
            else:
                made = self._layer(call)(*put(call.arguments.args), **put(call.arguments.kwargs))
            tensors |= {id(old): new for old, new in zip(call.outputs, keras.tree.flatten(made), strict=True)}
        return keras.Model(put(model.input), put(model.output), name=model.name)

    def _change(self, op: Any) -> Change:
        return self._changes.get(id(op), Change())

    def _vanishes(self, call: Any) -> bool:
        """Say whether nothing need be left of a call that is gone: it changed no dtype."""
        return self._change(call.operation).gone and source_of(call).dtype == call.outputs[0].dtype

    def _layer(self, call: Any) -> Any:
        """Return the new operation for a call, an Identity where it is gone."""
        op = call.operation
        if self._change(op).gone:
            return keras.layers.Identity(name=op.name, dtype=call.outputs[0].dtype)
        return self._op(op)

    def _op(self, op: Any) -> Any:
        """Return the new operation for an old one."""
        if id(op) not in self._new:
            self._new[id(op)] = made = self._model(op) if is_transparent(op) else self._made(op)
            self._pairs.append((op, made))
        return self._new[id(op)]

    def _made(self, op: Any) -> Any:
        if type(op) is keras.layers.Lambda:  # in memory already: its code needs no leave to be read from a config
            shape = op._output_shape
            return keras.layers.Lambda(op.function, shape, op.mask, op.arguments, name=op.name, dtype=op.dtype_policy)
        activation = None
        if (type(op) in LAYOUTS or type(op) is keras.layers.Activation) and not isinstance(op.activation, keras.Layer):
            activation = op.activation
        try:
            with keras.saving.custom_object_scope(_custom_objects(op)), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
                config = op.get_config() | self._change(op).settings
                made = type(op).from_config(config | {"activation": None} if activation else config)
        except Exception as error:
            reason = " ".join(str(error).rpartition("Exception encountered: ")[2].split())
            what = f"{type(op).__name__} {op.name!r}"
            raise ValueError(f"{what}: expected a layer that its config makes again, got: {reason}") from error
        if activation:
            made.activation = activation  # any function, also one that no config can name
        return made

    def _copy(self, old: Any, new: Any) -> None:
        """Give a new layer its values: those of the old one, but where the fold has others."""
        if arrays := self._change(old).arrays:
            values = {variable.name: variable for variable in old.variables}
            changed = {id(getattr(new, name)): array for name, array in arrays.items()}
            for variable in new.variables:
                array = changed.get(id(variable))
                variable.assign(to_array(values[variable.name]) if array is None else array)
            return
        shapes = [[tuple(v.shape) for v in layer.variables] for layer in (old, new)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{type(old).__name__} {old.name!r}: expected variables of shapes {shapes[0]} when made again from its "
                f"config, got {shapes[1]}"
            )
        for source, target in zip(old.variables, new.variables, strict=True):
            target.assign(to_array(source))
        for source, target in zip(old._flatten_layers(), new._flatten_layers(), strict=True):
            _copy_rest(source, target)


def _custom_objects(op: Any) -> dict[str, Any]:
    """Return the classes and functions that the config of `op` may name and Keras may not know."""
    layers = op._flatten_layers() if isinstance(op, keras.Layer) else ()
    objects = [x for layer in layers for x in (type(layer), getattr(layer, "activation", None))]
    return {x.__name__: x for x in objects if x is not None and hasattr(x, "__name__")}


def _copy_rest(old: Any, new: Any) -> None:
    """Copy what a layer keeps beside its variables: vocabularies, what Normalization makes of its variables."""
    if hasattr(old, "save_assets") and hasattr(old, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    if hasattr(new, "finalize_state"):
        new.finalize_state()
