"""Fold the BatchNorms of a module by torch.fx, or of an exported program by its graph."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .. import graph as folding
from ..report import LEFT, Decision, ModelReport
from . import ops
from .conversion import restore
from .fx_graph import Translation, operations, remove, rewrite
from .layers import (
    WholeCheck,
    has_hooks,
    has_own_call,
    is_leaf,
    module_op,
    norm_kind,
    note_rank,
    owners,
    set_parameters,
    storage,
    unusable,
)
from .modules import FastBatchNorm
from .programs import fold_program
from .shapes import infer_shapes

__all__ = ["fold"]

Model = TypeVar("Model", nn.Module, ExportedProgram)


def fold(module: Any, *, example_inputs: Any = None) -> tuple[Any, ModelReport]:
    """Fold the BatchNorms of a model into the layers around them: the same function at inference, fewer operations.

    W' = scale·W, b' = scale·b + shift for a layer in front, W' = W·scale, b' = b + Σ W·shift for one behind.

    Parameters
    ----------
    module : torch.nn.Module or torch.export.ExportedProgram
        In inference mode (`module.eval()`), for a BatchNorm in training mode stays. Not changed.
    example_inputs : tensor or tuple of tensors, optional
        What `module` is called with. Run through a copy, they tell the number of axes of every tensor, of the
        inputs to come too, and their sizes but that of the batch. Without them a BatchNorm1d is folded into a layer
        that raises ValueError for inputs whose number of axes makes the two differ. A program needs none.

    Returns
    -------
    module : torch.fx.GraphModule or ExportedProgram
        It shares no memory with the argument. Where torch.fx cannot trace a module, a copy of it in which
        each nn.Sequential is folded, with nn.Identity for BatchNorms that are gone; called in parts, it then raises
        ValueError. With `example_inputs` all stays if that, or anything else, makes it another function.
    report : ModelReport
        What became of each BatchNorm, and why.

    Raises
    ------
    TypeError
        `module` is of another type.
    ValueError
        var + eps of a BatchNorm is not positive, its statistics are not finite, its shapes do not fit; the model
        fails on `example_inputs`; a program was exported from a model of fastbn's modules.

    Notes
    -----
    Ioffe & Szegedy 2015, Algorithm 2, line 11, gives scale and shift. All is exact until it is rounded to the
    weights' dtype, once. Layers with hooks, parametrizations, shared parameters or a forward of their own stay.

    Examples
    --------
    >>> import torch
    >>> from fastbn.interop.torch import fold
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> folded, report = fold(model)
    >>> print(report.summary())
    1 BatchNorm: 1 folded; nodes 3 -> 2, parameters 256 -> 224
    """
    if isinstance(module, ExportedProgram):
        if any(node.target is ops.forward for node in module.graph.nodes):
            raise ValueError(
                "module: expected a program of PyTorch's operators, got one with fastbn.batch_norm: fold the module, "
                "then export what comes out"
            )
        return fold_program(module)
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        kind = type(module).__name__
        raise TypeError(f"module: expected a torch.nn.Module that is no TorchScript or an ExportedProgram, got {kind}")
    inputs = None
    if example_inputs is not None:
        inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if any(isinstance(part, FastBatchNorm) for part in module.modules()):
        module = restore(_copied(module))
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):  # whose tensors cannot be traced
        return _fold_module(module, inputs)


def _copied(module: nn.Module) -> nn.Module:
    """Copy a module, also where it keeps tensors that are results (weight_norm, before its next call)."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for buffer in part._buffers.values():
            if isinstance(buffer, nn.UninitializedBuffer):  # has no copy of its own
                memo[id(buffer)] = type(buffer)(device=buffer.device, dtype=buffer.dtype)  # type: ignore[call-arg]
    return copy.deepcopy(module, memo)


def _fold_module(original: nn.Module, inputs: tuple[Any, ...] | None) -> tuple[nn.Module, ModelReport]:
    module = _copied(original)
    if has_hooks(module):
        why = "the model has hooks, parametrizations or a forward of its own"
        return module, _report(module, [], {}, why, nodes=(_count(module),) * 2, parameters=(_parameters(module),) * 2)
    try:
        traced = _traced(module, inputs)
    except Exception as error:  # whatever the model's own Python raises on proxies
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        folded, report = _fold_sequentials(original, why)  # tracing may have left its traces in the copy
        return (folded, report) if inputs is None else _checked(original, folded, report, inputs)
    nodes, parameters = operations(traced.graph), _parameters(module)
    read = {str(node.target).rpartition(".")[0] for node in traced.graph.nodes if node.op == "get_attr"}
    if inputs is not None:
        _propagate(traced, inputs)
    places = owners(module, original)
    constants = _ModuleConstants(traced, places)
    modules = dict(traced.named_modules(remove_duplicate=False))
    translation = Translation(traced.graph, constants, modules, places, guards=inputs is None)
    decisions = folding.fold(translation.graph)
    for node in translation.graph.nodes:
        target = node.origin.target
        is_module = node.origin.op == "call_module"
        if node.removed:
            remove(node, translation, constants)
            if is_module:
                parent, _, name = target.rpartition(".")
                del traced.get_submodule(parent)._modules[name]
        elif is_module:
            set_parameters(modules[target], node)
        else:
            rewrite(node, constants)
    traced.graph.lint()
    traced.recompile()
    names = read | {decision.node for decision in decisions}  # what is read is a function's
    report = _report(
        module, decisions, names, "it is not called, or inside a module with hooks or a forward that is not traced",
        nodes=(nodes, operations(traced.graph)), parameters=(parameters, _parameters(traced)),
    )  # fmt: skip
    return traced, report


# Reports --------------------------------------------------------------------------------------------------------


def _report(
    module: nn.Module, decisions: Sequence[Decision], known: Any, why: str, nodes: tuple[int, int],
    parameters: tuple[int, int],
) -> ModelReport:  # fmt: skip
    """Report the decisions, and that every other BatchNorm of the module is left."""
    others = [name for name, part in module.named_modules() if norm_kind(part) and name not in known]
    left = [Decision(name, LEFT, (), why) for name in others]
    return ModelReport((*decisions, *left), *nodes, *parameters)


def _count(module: nn.Module) -> int:
    return sum(not any(m.children()) and not isinstance(m, nn.Identity) for m in module.modules())


def _parameters(module: nn.Module) -> int:
    tensors = [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
    return sum(tensor.numel() for tensor in tensors if not is_lazy(tensor))


# Traced modules -------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return is_leaf(module) or super().is_leaf_module(module, name)


def _traced(module: nn.Module, inputs: tuple[Any, ...] | None) -> fx.GraphModule:
    """Trace a module; the result has all of its parts, under their names."""
    if is_leaf(module):
        raise ValueError(f"{type(module).__name__} is a single layer")
    if own := next((m for m in module.modules() if has_own_call(m)), None):
        raise ValueError(f"{type(own).__name__} has a __call__ of its own")
    fixed = {}
    arguments = inspect.signature(module.forward).parameters
    for place, (name, parameter) in enumerate(arguments.items()):
        given = inputs is not None and place < len(inputs)
        if not given and (parameter.default is None or isinstance(parameter.default, (bool, int, float))):
            fixed[name] = parameter.default  # the result asserts that a caller leaves it at that
    state, tensors = torch.get_rng_state(), [*module.parameters(), *module.buffers()]
    versions = [tensor._version for tensor in tensors]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what forward does to proxies; those who run the model saw its own
        graph = _Tracer().trace(module, fixed or None)
        if not torch.equal(state, torch.get_rng_state()):
            raise ValueError("its forward draws random numbers that would become constants")
        if versions != [tensor._version for tensor in tensors]:
            raise ValueError("its forward writes to its parameters or buffers")
        for node in graph.nodes:  # torch.fx renames what is fixed, and callers would have to
            if node.op == "placeholder" and node.target not in arguments:
                node.target = node.target.removesuffix("_1")
        traced = fx.GraphModule(module, graph, type(module).__name__)
    for name, part in module.named_modules():
        _adopt(traced, name, part)
    return traced


def _adopt(traced: fx.GraphModule, name: str, part: nn.Module) -> None:
    """Give `traced` what it has not got of one part of the module, and that part's mode."""
    parent, _, leaf = name.rpartition(".")
    if name and leaf not in traced.get_submodule(parent)._modules:
        traced.get_submodule(parent).add_module(leaf, part)
    own = traced.get_submodule(name)
    own.training = part.training
    for key, parameter in part._parameters.items():
        if key not in own._parameters:
            own.register_parameter(key, parameter)
    for key, buffer in part._buffers.items():
        if key not in own._buffers:
            own.register_buffer(key, buffer, persistent=key not in part._non_persistent_buffers_set)


class _Propagation(fx.Interpreter):
    """Run a traced module, and keep the shapes of all it computes."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n.name] = tuple(result.shape), result.dtype
        elif isinstance(result, (tuple, list)) and all(isinstance(part, torch.Tensor) for part in result):
            self.shapes[n.name] = [tuple(part.shape) for part in result], None
        return result


def _propagate(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Note the shape of every tensor; None for its first size where that is the one of every input."""
    run = _Propagation(copy.deepcopy(traced).eval())
    try:
        with torch.no_grad():
            run.run(*copy.deepcopy(inputs))
    except Exception as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"example_inputs: expected what the model can be called with, got an error: {text}") from error
    batches = {tensor.shape[0] for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.ndim}
    batch = batches.pop() if len(batches) == 1 else -1

    def sizes(shape: tuple[int, ...]) -> tuple[int | None, ...]:
        return (None, *shape[1:]) if shape[:1] == (batch,) else shape

    for node in traced.graph.nodes:
        shape, dtype = run.shapes.get(node.name, (None, None))
        if isinstance(shape, list):
            node.meta["fastbn_shapes"] = [sizes(part) for part in shape]
        elif shape is not None:
            node.meta |= {"fastbn_shape": sizes(shape), "fastbn_dtype": dtype}


class _ModuleConstants:
    """The parameters and buffers that the nodes get_attr of a traced module read."""

    def __init__(self, module: fx.GraphModule, places: Mapping[int, int]) -> None:
        self.module, self.places = module, places

    def _place(self, node: fx.Node) -> tuple[nn.Module, str]:
        parent, _, name = str(node.target).rpartition(".")
        return self.module.get_submodule(parent), name

    def get(self, node: fx.Node) -> torch.Tensor | None:
        if node.op != "get_attr":
            return None
        module, name = self._place(node)
        value = getattr(module, name, None)
        return value if isinstance(value, torch.Tensor) else None

    def path(self, node: fx.Node) -> str:
        return str(node.target)

    def own(self, node: fx.Node) -> bool:
        readers = [n for n in self.module.graph.nodes if n.op == "get_attr" and n.target == node.target]
        tensor = self.get(node)
        assert tensor is not None
        alone = unusable(tensor) == "" and self.places[storage(tensor)] == 1
        called = [str(n.target) for n in self.module.graph.nodes if n.op == "call_module"]
        outside = not any(str(node.target).startswith(f"{target}.") for target in called)
        return readers == [node] and len(node.users) == 1 and alone and outside

    def set(self, node: fx.Node, tensor: torch.Tensor) -> None:
        module, name = self._place(node)
        setattr(module, name, tensor)

    def add(self, like: fx.Node, name: str, tensor: torch.Tensor) -> fx.Node:
        module, old = self._place(like)
        name = f"{old}_{name}"
        while hasattr(module, name):
            name += "_"
        same = self.get(like)
        assert same is not None
        module.register_parameter(name, nn.Parameter(tensor, same.requires_grad))
        parent = str(like.target).rpartition(".")[0]
        with self.module.graph.inserting_after(like):
            return self.module.graph.get_attr(f"{parent}.{name}" if parent else name)

    def drop(self, node: fx.Node) -> None:
        self.module.graph.erase_node(node)
        if not any(n.op == "get_attr" and n.target == node.target for n in self.module.graph.nodes):
            module, name = self._place(node)
            if name in module._parameters or name in module._buffers or name in vars(module):
                delattr(module, name)


# Modules that cannot be traced ----------------------------------------------------------------------------------


def _fold_sequentials(original: nn.Module, why: str) -> tuple[nn.Module, ModelReport]:
    """Fold inside each nn.Sequential of a copy."""
    module = _copied(original)
    sizes = (_count(module), _parameters(module))
    places, decisions = owners(module, original), list[Decision]()
    seen: set[nn.Module] = set()
    names = {id(part): name for name, part in module.named_modules()}
    for name, part in module.named_modules():
        if part in seen or not _is_plain_sequential(part, places):
            continue
        graph = folding.Graph()
        value = folding.Value(name)
        for child in _flattened(part, places, seen):
            op = module_op(child, places, guards=True)
            out = folding.Value(names[id(child)])
            graph.add(type(child).__name__, out.name, op, [value], [out], child)
            if isinstance(op, folding.BatchNorm) and not op.held:
                note_rank(child, (value, out))
            value = out
        value.is_output = True
        infer_shapes(graph)
        decisions += folding.fold(graph)
        changed: list[nn.Module] = []
        for node in graph.nodes:
            if node.removed:
                parent, _, leaf = node.name.rpartition(".")
                changed.append(nn.Identity())
                module.get_submodule(parent)._modules[leaf] = changed[-1]
            elif getattr(node.op, "folded", None) is not None or getattr(node.op, "taken", False):
                set_parameters(node.origin, node)
                changed.append(node.origin)
        if changed:
            WholeCheck(name).watch(part, changed)
    note = f"its nn.Sequential is taken to be called as a whole, for the model cannot be traced ({why})"
    decisions = [decision._replace(reason=f"{decision.reason}; {note}") for decision in decisions]
    left = f"it is in no nn.Sequential that is folded, and the model cannot be traced ({why})"
    report = _report(
        module, decisions, {decision.node for decision in decisions}, left,
        nodes=(sizes[0], _count(module)), parameters=(sizes[1], _parameters(module)),
    )  # fmt: skip
    return module, report


def _checked(
    original: nn.Module, folded: nn.Module, report: ModelReport, inputs: tuple[Any, ...]
) -> tuple[nn.Module, ModelReport]:
    """Return what was folded inside each nn.Sequential if it does the same on the inputs, else a copy of the model."""
    outputs = []
    for module in (_copied(original), copy.deepcopy(folded)):
        try:
            with torch.no_grad():
                outputs.append(pytree.tree_leaves(module(*copy.deepcopy(inputs))))
        except Exception as error:
            if not outputs:
                text = f"expected what the model can be called with, got an error: {error}"
                raise ValueError(f"example_inputs: {text}") from error
            outputs.append([])
    if len(outputs[0]) == len(outputs[1]) and all(map(_is_close, *outputs)):
        return folded, report
    why = "the model cannot be traced, and with its nn.Sequential folded it does something else on example_inputs"
    left = tuple(Decision(decision.node, LEFT, (), why) for decision in report)
    sizes = (report.nodes_before,) * 2 + (report.parameters_before,) * 2
    return _copied(original), ModelReport(left, *sizes)


def _is_close(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor):
        return not isinstance(b, torch.Tensor)
    if not isinstance(b, torch.Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return True
    limit = min(1000 * torch.finfo(a.dtype).eps, 0.05) * a.double().abs().max()  # roundings of many layers
    return torch.allclose(a.double(), b.double(), rtol=0.0, atol=float(limit), equal_nan=True) if a.numel() else True


def _is_plain_sequential(part: nn.Module, places: Mapping[int, int]) -> bool:
    plain = isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward
    return plain and not has_hooks(part) and places[id(part)] == 1


def _flattened(part: nn.Module, places: Mapping[int, int], seen: set[nn.Module]) -> list[nn.Module]:
    """Return the children in the order of the calls, those of a nn.Sequential inside in its place."""
    seen.add(part)
    children: list[nn.Module] = []
    for child in part.children() if len(set(part._modules.values())) == len(part._modules) else ():
        children += _flattened(child, places, seen) if _is_plain_sequential(child, places) else [child]
    return children
