"""PyTorch's tensors as arrays, its modules as what `graph.fold` must know of them, and back.

A module whose parameters are not its own, or which does more than its class says, is never taken apart.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from ...affine import BatchNormParams
from ..graph import BatchNorm, Flatten, Layer, Node, Pool, Same, Value

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.modules.batchnorm._BatchNorm)
# Tensors and arrays ---------------------------------------------------------------------------------------------


def unusable(tensor: Any) -> str:
    """Say why the values of `tensor` cannot be read and replaced ("" where they can)."""
    if is_lazy(tensor):
        return "it has lazy parameters without values"
    if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
        return f"its parameters are of type {type(tensor).__name__}"
    if tensor.device.type != "cpu":
        return f"its parameters are on the device {tensor.device}, not on the CPU"
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        return f"its parameters are of {tensor.dtype}, {tensor.layout}"
    return ""


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """View the values of `tensor` as an array, bfloat16 as that of ml_dtypes."""
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ModuleNotFoundError as error:
        text = 'fastbn.interop.torch needs ml_dtypes for bfloat16: pip install "ml_dtypes"'
        raise ModuleNotFoundError(text, name="ml_dtypes") from error
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def to_tensor(array: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Copy an array to a tensor that lies in memory as `like` does, and is a parameter if that is one."""
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        values = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    else:
        values = torch.from_numpy(array)
    tensor = torch.empty_like(like, dtype=values.dtype, requires_grad=False) if like.shape == values.shape else None
    tensor = values.clone() if tensor is None else tensor.copy_(values)
    return nn.Parameter(tensor, like.requires_grad) if isinstance(like, nn.Parameter) else tensor


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if unusable(tensor) == "" and tensor.numel() else id(tensor)


def owners(root: nn.Module, original: nn.Module) -> Counter[int]:
    """Count where each module stands in the tree of `root`, and who shares the storage of its tensors in `original`.

    `root` is a copy of `original`, where parameters that were views of one storage are so no more.
    """
    places = Counter(id(module) for _, module in root.named_modules(remove_duplicate=False))
    shared: Counter[int] = Counter()
    for module in original.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                shared[storage(tensor)] += 1
    for module, twin in zip(root.modules(), original.modules(), strict=True):
        for name, tensor in (module._parameters | module._buffers).items():
            if tensor is not None:
                old = twin._parameters.get(name, twin._buffers.get(name))
                places[storage(tensor)] = shared[storage(old)] if old is not None else 1
    return places


# Modules --------------------------------------------------------------------------------------------------------


def has_hooks(module: nn.Module) -> bool:
    """Say whether something runs before, behind or instead of the forward of `module`."""
    hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
    calls = [hook for name in hooks for hook in getattr(module, name).values() if not isinstance(hook, RankCheck)]
    own = "forward" in vars(module) or has_own_call(module)
    return bool(calls) or own or hasattr(module, "parametrizations")


def has_own_call(module: nn.Module) -> bool:
    """Say whether a call of `module` is more than its hooks and forward; that of a GraphModule is not."""
    return type(module).__call__ is not nn.Module.__call__ and not isinstance(module, fx.GraphModule)


def is_leaf(module: nn.Module) -> bool:
    """Say whether tracing must not look into `module`."""
    return has_hooks(module) or isinstance(module, (*LAYERS, nn.modules.batchnorm._NormBase))


def norm_kind(module: nn.Module) -> type | None:
    """Return which BatchNorm a module is, or is derived from."""
    return kind_of(module, NORMS)


def kind_of(module: nn.Module, kinds: Iterable[type]) -> type | None:
    """Return which of `kinds` the module is, whether or not it has a forward of its own."""
    return next((kind for kind in kinds if isinstance(module, kind)), None)


def _held(module: nn.Module, kind: type, places: Counter[int]) -> str:
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    if has_hooks(module):
        return "it has hooks or a forward of its own"
    if any(getattr(type(module), name, None) is not getattr(kind, name, None) for name in ("forward", "_conv_forward")):
        return "it has a forward of its own"
    if places[id(module)] > 1:
        return "it stands in the model more than once"
    named = module._parameters | module._buffers
    tensors = [t for name, t in named.items() if t is not None and name != "num_batches_tracked"]
    if reason := next(filter(None, map(unusable, tensors)), ""):
        return reason
    if any(places[storage(tensor)] > 1 for tensor in tensors):
        return "it shares its parameters with another module"
    return ""


def module_op(module: nn.Module, places: Counter[int], guards: bool) -> Any:
    """Return what folding must know of a module, None for one that lets nothing pass."""
    if (norm := kind_of(module, NORMS)) is not None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        held = _held(module, norm, places) or norm_held(module.training, module.running_mean, module.running_var)
        if held:
            return BatchNorm(None, 1, held)  # type: ignore[arg-type]
        return norm_op(module.running_mean, module.running_var, module.weight, module.bias, module.eps)
    if (kind := kind_of(module, LAYERS)) is not None:
        held = _held(module, kind, places)
        if not held and not isinstance(module._parameters.get("weight"), nn.Parameter):
            held = "its weight is no parameter"
        if held:
            return held_layer(held)
        if kind is nn.Linear:
            return layer_op(module._parameters["weight"], module._parameters["bias"], guarded=guards)
        assert isinstance(module, nn.modules.conv._ConvNd)
        padding = module.padding if module.padding_mode == "zeros" else 0  # other modes pad with values of x
        return layer_op(
            module.weight, module.bias, padding, module.groups, transposed=module.transposed, guarded=guards
        )
    if has_hooks(module):
        return None
    match module:
        case nn.Identity():
            return Same()
        case nn.Dropout() | nn.Dropout1d() | nn.Dropout2d() | nn.Dropout3d() | nn.AlphaDropout():
            return None if module.training else Same()
        case nn.modules.padding._ReflectionPadNd() | nn.modules.padding._ReplicationPadNd():
            return pad_op(module.padding, "reflect")
        case nn.modules.padding._CircularPadNd():
            return pad_op(module.padding, "circular")
        case nn.modules.padding._ConstantPadNd():
            return pad_op(module.padding, "constant", module.value)
        case nn.Flatten(start_dim=1, end_dim=-1):
            return Flatten()
        case nn.AvgPool1d() | nn.AvgPool2d() | nn.AvgPool3d():
            n = int(type(module).__name__[-2])
            divisor = getattr(module, "divisor_override", None)
            return pool_op(n, module.padding, module.count_include_pad) if divisor is None else None
        case nn.AdaptiveAvgPool1d() | nn.AdaptiveAvgPool2d() | nn.AdaptiveAvgPool3d():
            return pool_op(int(type(module).__name__[-2]))
        case (
            nn.MaxPool1d() | nn.MaxPool2d() | nn.MaxPool3d()
            | nn.AdaptiveMaxPool1d() | nn.AdaptiveMaxPool2d() | nn.AdaptiveMaxPool3d()
        ) if not module.return_indices:  # fmt: skip
            return pool_op(int(type(module).__name__[-2]), largest=True)
    return None


def note_rank(module: nn.Module, values: Iterable[Value]) -> None:
    """Note how many axes the tensors around a BatchNorm have, where the module checks it."""
    for kind, rank in (nn.BatchNorm2d, 4), (nn.BatchNorm3d, 5):
        if isinstance(module, kind) and type(module)._check_input_dim is kind._check_input_dim:
            for value in values:
                value.shape = value.shape or (None,) * rank


def norm_held(training: Any, mean: Any, var: Any) -> str:
    """Say why a BatchNorm uses the statistics of the batch ("" where it does not)."""
    if training is not False:
        return "it is in training mode, which eval() ends"
    if mean is None or var is None:
        return "it has no running statistics (track_running_stats=False)"
    return ""


def norm_op(mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> BatchNorm:
    """Return the BatchNorm at inference with these tensors."""
    gamma, beta, mean, var = (None if t is None else to_array(t) for t in (weight, bias, mean, var))
    return BatchNorm(BatchNormParams(gamma, beta, mean, var, eps), 1)


def layer_op(
    weight: Any, bias: Any, padding: Any = 0, groups: int = 1, *, transposed: bool = False, guarded: bool = False,
    layout: str | None = None,
) -> Layer:  # fmt: skip
    """Return the linear layer or convolution with these tensors."""
    spatial = weight.ndim - 2
    layout = layout or ("IO" if transposed else "OI") + "DHW"[3 - spatial :]
    padded = padding == "same" and max(weight.shape[2:]) > 1 if isinstance(padding, str) else bool(np.any(padding))
    bias = None if bias is None else to_array(bias)
    axis = -(1 + spatial)
    return Layer(to_array(weight), bias, layout, axis, axis, groups, transposed, padded, guarded=guarded)


def held_layer(reason: str) -> Layer:
    """Return a layer that takes nothing."""
    return Layer(np.empty((0, 0)), None, "OI", -1, -1, held=reason)


def pool_op(n: int, padding: Any = 0, counts_padding: bool = True, largest: bool = False) -> Pool:
    """Return the pooling over the last n axes."""
    return Pool(tuple(range(-n, 0)), padded=bool(np.any(padding)) and counts_padding, largest=largest)


def pad_op(padding: Any, mode: str, value: Any = 0) -> Pool | None:
    """Return what puts zeros, or values that are there already, around the last axes."""
    constant = mode == "constant"
    return None if constant and value not in (0, None) else Pool(tuple(range(-len(padding) // 2, 0)), padded=constant)


class RankCheck:
    """A forward pre-hook: refuse inputs without `rank` axes, for which the folded layer would be another function."""

    def __init__(self, name: str, rank: int) -> None:
        self.name, self.rank = name, rank

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise ValueError where the input has another number of axes."""
        x = args[0] if args else kwargs["input"]
        if x.dim() != self.rank:
            raise ValueError(
                f"{self.name}: expected an input with {self.rank} axes, for which a BatchNorm was folded into it, got "
                f"shape {tuple(x.shape)}; fold with example_inputs= of this shape"
            )


class WholeCheck:
    """Hooks: what was folded inside a nn.Sequential runs only as a part of it, in its own forward."""

    def __init__(self, name: str) -> None:
        self.name, self._running = name, threading.local()

    def __getstate__(self) -> str:
        return self.name

    def __setstate__(self, name: str) -> None:
        self.name, self._running = name, threading.local()

    def watch(self, sequential: nn.Module, parts: Iterable[nn.Module]) -> None:
        """Let `parts` refuse calls from elsewhere than the forward of `sequential`."""
        sequential.register_forward_pre_hook(self.enter)
        sequential.register_forward_hook(self.leave, always_call=True)
        for part in parts:
            part.register_forward_pre_hook(self.check)

    def enter(self, module: nn.Module, args: Any) -> None:
        self._running.depth = getattr(self._running, "depth", 0) + 1

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._running.depth -= 1

    def check(self, module: nn.Module, args: Any) -> None:
        """Raise ValueError where the nn.Sequential is not running."""
        if not getattr(self._running, "depth", 0):
            raise ValueError(
                f"{self.name or 'the model'}: expected the nn.Sequential to be called as a whole, since BatchNorms "
                "were folded inside it, got a call of one of its parts; such a model has to stay as it is"
            )


def set_parameters(module: nn.Module, node: Node) -> None:
    """Give a module the parameters that its node has folded, or taken in, if any."""
    if isinstance(node.op, Layer) and node.op.folded is not None:
        _set_layer(module, node)
    elif isinstance(node.op, BatchNorm) and node.op.taken:
        _set_norm(module, node)


def _set_layer(module: nn.Module, node: Node) -> None:
    """Give a module the parameters that its node has folded."""
    old = module._parameters["weight"]
    assert old is not None
    bias = module._parameters.get("bias")
    module._parameters["weight"] = to_tensor(node.op.folded.weight, old)  # type: ignore[assignment]
    new = to_tensor(node.op.folded.bias, torch.empty(0) if bias is None else bias)
    module._parameters["bias"] = nn.Parameter(new, old.requires_grad if bias is None else bias.requires_grad)
    if node.op.needs_rank is not None:
        module.register_forward_pre_hook(RankCheck(node.name, node.op.needs_rank), with_kwargs=True)


def _set_norm(module: nn.Module, node: Node) -> None:
    """Give a BatchNorm module the parameters that it has after taking in others."""
    merged = node.op.merged()
    for name, values in ("weight", merged.gamma), ("bias", merged.beta):
        old = module._parameters[name]
        like = nn.Parameter(torch.empty(0), False) if old is None else old
        module._parameters[name] = to_tensor(values, like)  # type: ignore[assignment]
    mean = module._buffers["running_mean"]
    assert mean is not None
    module._buffers["running_mean"] = to_tensor(merged.mean, mean)
    module.affine = True  # type: ignore[assignment]
