"""Exported programs (.pt2): folded in their graph, whose signature, state and dynamic sizes stay as they are."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from .. import graph as folding
from ..report import ModelReport
from .fx_graph import Translation, operations, remove, rewrite
from .layers import unusable


class _ProgramConstants:
    """The tensors that a program's placeholders stand for."""

    def __init__(self, graph: fx.Graph, program: ExportedProgram) -> None:
        self.graph = graph
        self.specs = list(program.graph_signature.input_specs)
        memo: dict[int, Any] = {}
        self.state: dict[str, Any] = copy.deepcopy(dict(program.state_dict), memo)
        self.constants: dict[str, Any] = copy.deepcopy(dict(program.constants), memo)
        kinds = InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR
        self.targets = {spec.arg.name: spec.target for spec in self.specs if spec.kind in kinds}
        self.mutable = {spec.target for spec in program.graph_signature.output_specs if spec.target is not None}
        tensors = [t for t in (*self.state.values(), *self.constants.values()) if isinstance(t, torch.Tensor)]
        self.storages = [tensor.untyped_storage().data_ptr() for tensor in tensors if not unusable(tensor)]

    def _home(self, target: str) -> dict[str, Any]:
        return self.state if target in self.state else self.constants

    def get(self, node: fx.Node) -> torch.Tensor | None:
        target = self.targets.get(node.name) if node.op == "placeholder" else None
        if target is None or target in self.mutable:
            return None
        value = self._home(target).get(target)
        return value if isinstance(value, torch.Tensor) else None

    def path(self, node: fx.Node) -> str:
        return str(self.targets[node.name])

    def own(self, node: fx.Node) -> bool:
        tensor = self.get(node)
        alone = tensor is not None and self.storages.count(tensor.untyped_storage().data_ptr()) == 1
        return alone and len(node.users) == 1

    def set(self, node: fx.Node, tensor: torch.Tensor) -> None:
        target = self.targets[node.name]
        assert target is not None
        self._home(target)[target] = tensor

    def add(self, like: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        beside = self.targets[like.name]
        assert beside is not None
        prefix = beside.rpartition(".")[0]
        target = f"{prefix}.{name}" if prefix else name
        while target in self.state or target in self.constants:
            target += "_"
        old = self.get(like)
        assert old is not None
        parameter = nn.Parameter(tensor, old.requires_grad)
        with self.graph.inserting_after(like):
            node = self.graph.placeholder(f"p_{target.replace('.', '_')}")
        node.meta["val"] = like.meta["val"].fake_mode.from_tensor(parameter, static_shapes=True)
        place = next(i for i, spec in enumerate(self.specs) if spec.arg.name == like.name)
        self.specs.insert(place + 1, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), target))
        self.targets[node.name], self.state[target] = target, parameter
        node.target = node.name
        return node

    def drop(self, node: fx.Node) -> None:
        target = self.targets.pop(node.name)
        assert target is not None
        self.graph.erase_node(node)
        self.specs = [spec for spec in self.specs if spec.arg.name != node.name]
        if target not in self.targets.values():
            self._home(target).pop(target, None)
        prefix, _, name = target.rpartition("running_mean")
        counter = f"{prefix}num_batches_tracked"
        if name == "" and target.endswith("running_mean") and counter in self.targets.values():
            unused = [n for n in self.graph.nodes if self.targets.get(n.name) == counter and not n.users]
            for other in unused:
                self.drop(other)


def fold_program(program: ExportedProgram) -> tuple[ExportedProgram, ModelReport]:
    graph = copy.deepcopy(program.graph)
    for node, old in zip(graph.nodes, program.graph.nodes, strict=True):
        node.name = old.name  # the signature has it, and a copy renames what Python has a function of that name for
    constants = _ProgramConstants(graph, program)

    def parameters() -> int:
        held = [t for t in (*constants.state.values(), *constants.constants.values()) if isinstance(t, torch.Tensor)]
        return sum(tensor.numel() for tensor in held if tensor.is_floating_point())

    before = operations(graph), parameters()
    translation = Translation(graph, constants, {}, Counter(), guards=False)
    decisions = folding.fold(translation.graph)
    for node in translation.graph.nodes:
        if node.removed:
            remove(node, translation, constants)
        else:
            rewrite(node, constants)
    results = next(node for node in graph.nodes if node.op == "output").args[0]
    outputs = [
        replace(spec, arg=TensorArgument(node.name)) if isinstance(spec.arg, TensorArgument) else spec
        for spec, node in zip(program.graph_signature.output_specs, results, strict=True)
    ]
    graph.lint()
    folded = ExportedProgram(
        root=program.graph_module, graph=graph,
        graph_signature=type(program.graph_signature)(constants.specs, outputs),
        state_dict=constants.state, range_constraints=dict(program.range_constraints),
        module_call_graph=[copy.copy(entry) for entry in program.module_call_graph],
        example_inputs=copy.deepcopy(program.example_inputs), constants=constants.constants,
        verifiers=program.verifiers,
    )  # fmt: skip
    folded._guards_code = list(program._guards_code)  # of the inputs, which are the same
    return folded, ModelReport(tuple(decisions), before[0], operations(graph), before[1], parameters())
