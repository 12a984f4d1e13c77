"""Fold what is only arrays with names: .npz and safetensors files, PyTorch state dicts.

    arrays, report = fold(load("model.safetensors"), {"bn1": "conv1"}, transposed=())
    save(arrays, "folded.safetensors")

Such a file holds neither the order in which its layers run, nor what stands between them, nor eps: which BatchNorm
stands behind which layer is said, or else inferred from the names, and the report tells which.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..affine import SIGNIFICAND_BITS, Affine, BatchNormParams
from .array_files import State, load, save
from .graph import Layer, Stays, join
from .report import FOLDED, LEFT, Decision, ModelReport

__all__ = ["State", "fold", "load", "patches", "save"]

EPS = 1e-5  # PyTorch's default, and fastbn's

# The last part of a name says what an array is: PyTorch's names, or Keras's.
GAMMA, BETA, BIAS, COUNTER = ("weight", "gamma", "scale"), ("bias", "beta"), "bias", "num_batches_tracked"
MEAN, VAR = ("running_mean", "moving_mean"), ("running_var", "moving_variance", "moving_var")
WEIGHT = ("weight", "kernel", "depthwise_kernel")
_LEAVES = "|".join({*GAMMA, *BETA, *MEAN, *VAR, *WEIGHT, COUNTER})
_KEY = re.compile(rf"(?P<prefix>.+?)(?P<separator>[./_])(?P<leaf>{_LEAVES})")
_NUMBER = re.compile(r"\d+")

# What BatchNorms are called, and the layers beside them.
_NORM = re.compile(r"(?<![a-z])(?:batch_?norm(?:[123]d)?|bn|norm)(?![a-z])", re.IGNORECASE)
_LAYERS = ("conv", "fc", "linear", "lin", "dense", "deconv", "proj", "res", "up", "upconv")
_TRANSPOSED = re.compile(
    r"deconv|decoder|transpos|trans_?conv|conv_?tr?(?![a-z])|(?<![a-z])(?:t_?conv|up)", re.IGNORECASE
)


class _Part:
    """The arrays whose names begin alike: what they are -> their key."""

    def __init__(self, name: str, separator: str) -> None:
        self.name, self.separator, self.keys = name, separator, dict[str, str]()

    def one(self, leaves: Sequence[str]) -> str | None:
        """Return the key of the only one of these that there is."""
        found = [self.keys[leaf] for leaf in leaves if leaf in self.keys]
        if len(found) > 1:
            raise ValueError(f"{self.name}: expected one array for one purpose, got {' and '.join(found)}")
        return found[0] if found else None

    @property
    def is_norm(self) -> bool:
        return any(leaf in self.keys for leaf in MEAN + VAR)

    @property
    def bias(self) -> str:
        return self.keys.get(BIAS, self.name + self.separator + BIAS)


class _Reading(NamedTuple):
    """One way to see a weight."""

    layout: str
    transposed: bool = False
    groups: int = 1


class _Names:
    """What the names of `state` tell: its BatchNorms, and what can be layers beside them."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        parts: dict[str, _Part] = {}
        for key, array in state.items():
            if not isinstance(key, str) or not isinstance(array, np.ndarray):
                raise TypeError(f"state: expected names and ndarrays, got {key!r}: {type(array).__name__}")
            if match := _KEY.fullmatch(key):
                part = parts.setdefault(match["prefix"], _Part(match["prefix"], match["separator"]))
                if (other := part.keys.setdefault(match["leaf"], key)) != key:
                    raise ValueError(f"{part.name}: expected one array for one purpose, got {other} and {key}")
        self.state = state
        self.norms = {name: part for name, part in parts.items() if part.is_norm}
        separable = {name for name, part in parts.items() if f"{name}{part.separator}pointwise" in parts}
        halves = separable | {f"{name}{parts[name].separator}pointwise" for name in separable}  # they share a bias
        self.layers = {
            name: part
            for name, part in parts.items()
            if name not in halves and not part.is_norm and sum(leaf in part.keys for leaf in WEIGHT) == 1
        }
        weights = {name: self.weight(name) for name in self.layers}
        self.layers = {name: self.layers[name] for name, w in weights.items() if 2 <= w.ndim <= 5 and w.size}

    def norm(self, name: str, eps: float | None) -> BatchNormParams:
        """Return a BatchNorm's parameters."""
        part = self.norms[name]
        mean, var = part.one(MEAN), part.one(VAR)
        if mean is None or var is None:
            raise ValueError(f"{name}: expected running_mean and running_var, got {mean or var} only")
        if eps is None and "running_mean" not in part.keys:
            raise ValueError(
                f"eps: expected a number for {name}, whose names are not PyTorch's "
                "(Keras's default is eps=1e-3, --eps 1e-3)"
            )
        gamma, beta = (None if key is None else self.state[key] for key in (part.one(GAMMA), part.one(BETA)))
        return BatchNormParams(gamma, beta, self.state[mean], self.state[var], EPS if eps is None else eps)

    def channels(self, norm: str) -> int:
        part = self.norms[norm]
        key = part.one(MEAN) or part.one(VAR)
        return self.state[key].size  # type: ignore[index]

    def weight(self, layer: str) -> np.ndarray:
        return self.state[self.layers[layer].one(WEIGHT)]  # type: ignore[index]

    def readings(
        self, layer: str, behind: int | None, before: int | None, transposed: bool | None, layout: str | None = None
    ) -> list[_Reading]:
        """Return the ways to see a layer's weight that fit BatchNorms of so many channels behind and before it."""
        shape, keras = self.weight(layer).shape, "weight" not in self.layers[layer].keys
        spatial = "DHW"[5 - len(shape) :] if len(shape) > 2 else ""
        conv = spatial + "IO" if keras else "OI" + spatial
        ways = [(layout or conv, False)] if transposed is not True or not spatial else []
        if keras and spatial and not layout and ways:
            ways.append((spatial + "IM", False))
        if transposed is not False and spatial:
            ways.append((layout or (spatial + "OI" if keras else "IO" + spatial), True))
        found: list[_Reading] = []
        for letters, is_transposed in ways:
            if sorted(letter for letter in letters if letter in "OIM") not in (["I", "O"], ["I", "M"]):
                raise ValueError(f"layouts: expected letters as in OIHW for {layer}, got {letters!r}")
            if len(letters) != len(shape) or len(set(letters)) != len(letters):
                raise ValueError(f"layouts: expected {len(shape)} different letters for {layer}, got {letters!r}")
            groups = _groups(dict(zip(letters, shape, strict=True)), is_transposed, behind, before)
            alike = found and shape[letters.index("I" if "M" in letters else "O")] == 1  # one channel per group
            if groups and not alike:
                found.append(_Reading(letters, is_transposed, groups))
        return found


def _groups(size: dict[str, int], transposed: bool, behind: int | None, before: int | None) -> int:
    """Return how many groups a weight must have to fit, 0 if it cannot."""
    if "M" in size:
        fits = behind in (None, size["I"] * size["M"]) and before in (None, size["I"])
        return size["I"] if fits else 0
    own, shared, there, here = ("I", "O", before, behind) if transposed else ("O", "I", behind, before)
    if there not in (None, size[own]):
        return 0
    groups, rest = (1, 0) if here is None else divmod(here, size[shared])
    return groups if groups and not rest and size[own] % groups == 0 else 0


# Pairs ----------------------------------------------------------------------------------------------------------


class _Guess(NamedTuple):
    layer: str
    rule: str


def _inferred(names: _Names, transposed: Collection[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the pairs that the names suggest, and for each other BatchNorm why there is none."""
    guesses: dict[str, _Guess] = {}
    reasons: dict[str, str] = {}
    for norm in names.norms:
        match list(_candidates(names, norm)):
            case []:
                reasons[norm] = "no layer's name fits its own"
            case [guess]:
                guesses[norm] = guess
            case several:
                reasons[norm] = f"the names of {' and '.join(guess.layer for guess in several)} fit its own"
    misled: dict[str, str] = {}
    for norm, (layer, rule) in guesses.items():
        said = None if transposed is None else layer in transposed
        if not names.readings(layer, names.channels(norm), None, said):
            channels, shape = names.channels(norm), names.weight(layer).shape
            misled.setdefault(rule, f"{norm} has {channels} channels, {layer} a weight {shape}")
        elif _listed_first(names, norm, layer):
            misled.setdefault(rule, f"{norm} is listed before {layer}")
    claims = Counter(guess.layer for guess in guesses.values())
    pairs = {}
    for norm, (layer, rule) in guesses.items():
        if rule in misled:  # a network that normalises first has the same names
            reasons[norm] = f"the names do not say that it stands behind {layer}: {misled[rule]}"
        elif claims[layer] > 1:
            reasons[norm] = f"another BatchNorm's name fits {layer} too"
        else:
            pairs[norm] = layer
    return pairs, reasons


def _candidates(names: _Names, norm: str) -> Iterator[_Guess]:
    """Give the layers beside `norm` whose names fit its own: 0 and 1 of a Sequential, conv1 and bn1, conv1_bn."""
    at = max(norm.rfind("."), norm.rfind("/")) + 1
    parent, last = norm[:at], norm[at:]
    guesses = {}
    if last.isdigit():
        guesses[str(int(last) - 1)] = "n, n + 1"
    elif word := _NORM.search(last):
        start, end = last[: word.start()], last[word.end() :]
        for layer in _LAYERS:
            guesses[start + layer + end] = f"{layer}, {word[0]}"
        rest = start.rstrip("_-") + end if start else end.lstrip("_-")
        guesses[rest] = f"without {word[0]}"
    for layer, rule in guesses.items():
        if parent + layer in names.layers:
            yield _Guess(parent + layer, rule)


def _listed_first(names: _Names, norm: str, layer: str) -> bool:
    """Say whether `norm` comes before `layer` in a file that is not sorted by name."""
    mean, weight = names.norms[norm].one(MEAN), names.layers[layer].one(WEIGHT)
    dtype = names.state[weight].dtype  # type: ignore[index]
    keys = [key for key, array in names.state.items() if array.dtype == dtype]  # safetensors sorts by dtype first
    return mean in keys and keys != sorted(keys) and keys.index(mean) < keys.index(weight)  # type: ignore[arg-type]


def _listed(names: Collection[str], most: int = 6) -> str:
    shown = ", ".join(list(names)[:most]) or "none"
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


class _Pairs(NamedTuple):
    """Which BatchNorms stand behind which layer, and before which layers; why the others are left."""

    behind: dict[str, str]
    before: dict[str, tuple[str, ...]]
    left: dict[str, str]
    how: str


def _pairs(
    names: _Names,
    pairs: Mapping[str, str] | None,
    before: Mapping[str, str | Sequence[str]] | None,
    transposed: Collection[str] | None,
) -> _Pairs:
    if isinstance(pairs, str):
        raise ValueError(f"pairs: expected a mapping or None, got {pairs!r}")
    left, how = dict.fromkeys(names.norms, "no pair names it"), "the pair given"
    if pairs is None and before is None:
        pairs, reasons = _inferred(names, transposed)
        left |= {norm: f"no pair inferred from the names: {why}" for norm, why in reasons.items()}
        how = "the pair inferred from the names"
    behind = dict(pairs or {})
    fronts = {norm: (to,) if isinstance(to, str) else tuple(to) for norm, to in (before or {}).items()}
    for argument, norms, layers in (
        ("pairs", list(behind), list(behind.values())),
        ("before", list(fronts), [layer for to in fronts.values() for layer in to]),
    ):
        for known, kind, given in (names.norms, "BatchNorm", norms), (names.layers, "layer", layers):
            if unknown := [name for name in given if name not in known]:
                raise ValueError(f"{argument}: expected the name of a {kind} ({_listed(known)}), got {unknown[0]!r}")
        for layer, count in Counter(layers).items():
            if count > 1:
                raise ValueError(f"{argument}: expected one BatchNorm for {layer}, got {count}")
    if both := behind.keys() & fronts.keys():
        raise ValueError(f"before: expected BatchNorms that are not in pairs too, got {_listed(both)}")
    return _Pairs(behind, fronts, {n: why for n, why in left.items() if n not in behind and n not in fronts}, how)


def _layers(
    names: _Names,
    pairs: _Pairs,
    transposed: Collection[str] | None,
    layouts: Mapping[str, str],
    unpadded: Collection[str],
) -> tuple[dict[str, Layer], set[str]]:
    """Return the layers of the pairs as folding wants them, and which are only assumed not to be transposed."""
    behind = {layer: norm for norm, layer in pairs.behind.items()}
    before = {layer: norm for norm, layers in pairs.before.items() for layer in layers}
    places: dict[int, list[str]] = defaultdict(list)
    for key, array in names.state.items():
        if array.size:
            places[array.__array_interface__["data"][0]].append(key)
    for argument, said in ("transposed", transposed or ()), ("layouts", layouts), ("unpadded", unpadded):
        if isinstance(said, str) or (unknown := [name for name in said if name not in names.layers]):
            got = said if isinstance(said, str) else unknown[0]
            raise ValueError(f"{argument}: expected names of layers ({_listed(names.layers)}), got {got!r}")
    found, assumed = {}, set()
    for layer in (name for name in names.layers if name in behind or name in before):
        n_behind, n_before = (names.channels(of[layer]) if layer in of else None for of in (behind, before))
        said_transposed = None if transposed is None else layer in transposed
        readings = names.readings(layer, n_behind, n_before, said_transposed, layouts.get(layer))
        part, weight = names.layers[layer], names.weight(layer)
        if not readings:
            got = ", ".join(f"{names.channels(of[layer])} of {of[layer]}" for of in (behind, before) if layer in of)
            kind = "transposed convolution " if said_transposed else ""
            raise ValueError(f"{layer}: expected channels that fit the {kind}weight {weight.shape}, got {got}")
        bias = names.state.get(part.bias)
        layout, is_transposed, groups = readings[0]
        axis = -1 if weight.ndim == 2 else 1
        op = Layer(weight, bias, layout, axis, axis, groups, is_transposed)
        op.padded = (
            weight.ndim > 2
            and layer not in unpadded
            and any(n > 1 for n, letter in zip(weight.shape, layout, strict=True) if letter not in "OIM")
        )
        if bias is not None and bias.shape != (op.out_channels,):
            raise ValueError(f"{part.bias}: expected shape {(op.out_channels,)}, got {bias.shape}")
        shared = [key for key in places[weight.__array_interface__["data"][0]] if key != part.one(WEIGHT)]
        if shared:
            op.held = f"its weight is {_listed(shared)} too"
        elif weight.dtype.name not in SIGNIFICAND_BITS:
            op.held = f"its weight is {weight.dtype}"
        elif bias is not None and bias.dtype != weight.dtype:
            op.held = f"its weight is {weight.dtype}, its bias {bias.dtype}"
        elif len(readings) > 1 and not readings[1].transposed:
            op.held = f"its axes can be {layout} or {readings[1].layout}: say which by layouts= (--layouts)"
        elif len(readings) > 1:
            assumed.add(layer)
        found[layer] = op
    alike = {_NUMBER.sub("", layer) for layer, op in found.items() if op.transposed}
    for layer in assumed:
        if _TRANSPOSED.search(layer) or _NUMBER.sub("", layer) in alike:
            found[layer].held = (
                "its name is like that of a transposed convolution, its shape fits both kinds: "
                "say by transposed= (--transposed) which layers are transposed, () (none) if none is"
            )
    return found, assumed


# Folding --------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    names: _Names
    pairs: _Pairs
    layers: dict[str, Layer]
    assumed: set[str]  # of them, not to be transposed
    params: dict[str, BatchNormParams]


def _plan(
    state: Mapping[str, np.ndarray],
    pairs: Mapping[str, str] | None,
    before: Mapping[str, str | Sequence[str]] | None,
    eps: float | None,
    transposed: Collection[str] | None,
    layouts: Mapping[str, str] | None,
    unpadded: Collection[str],
) -> _Plan:
    names = _Names(state)
    paired = _pairs(names, pairs, before, transposed)
    layers, assumed = _layers(names, paired, transposed, layouts or {}, unpadded)
    params = {norm: names.norm(norm, eps) for norm in names.norms if norm not in paired.left}
    return _Plan(names, paired, layers, assumed, params)


def fold(
    state: Mapping[str, np.ndarray],
    pairs: Mapping[str, str] | None = None,
    *,
    before: Mapping[str, str | Sequence[str]] | None = None,
    eps: float | None = None,
    transposed: Collection[str] | None = None,
    layouts: Mapping[str, str] | None = None,
    unpadded: Collection[str] = (),
) -> tuple[State, ModelReport]:
    """Fold BatchNorms into the weights beside them, given as arrays by name.

    Behind a layer: W' = scale·W, b' = scale·b + shift; before it: W' = W·scale, b' = b + Σ W·shift, with
    scale = γ/√(σ² + ε), shift = β - scale·μ (Ioffe & Szegedy 2015, Algorithm 2, line 11). "conv1.weight" is the
    weight of the layer "conv1"; "bn1.running_mean" makes "bn1" a BatchNorm (or moving_mean, with gamma and beta).
    The parts of a name are separated by ".", "/" or "_".

    Parameters
    ----------
    state : mapping of str to ndarray
        It stays as it is.
    pairs : mapping of str to str, or None
        For each BatchNorm the layer behind which it stands, and nothing between them: {"bn1": "conv1"}. None, where
        `before` is None too, takes what the names suggest: bn1 and conv1, conv1_bn and conv1, 0 and 1 of a Sequential,
        if one layer's name fits only, the channels fit, and neither the channels nor the order of the arrays
        contradict the same rule elsewhere; the other BatchNorms are left. That no ReLU and no second reader stands
        between is then for the caller to know. {} infers nothing.
    before : mapping of str to str, or to a sequence of str, or None
        For each BatchNorm all the layers that read its output, where it stands before them: {"bn0": "fc1"}.
    eps : float, or None
        ε of every BatchNorm in a pair; arrays do not hold it. None is 1e-5 for PyTorch's names, else an error.
        Where there are several, fold in several calls.
    transposed : collection of str, or None
        The layers that are transposed convolutions; () if none is. None takes for one what nothing else fits; where
        both kinds fit, none is taken for one (the report says so), and names like deconv, up or decoder,
        or that of another transposed one but for numbers, are left.
    layouts : mapping of str to str, or None
        Axes of weights in another order than PyTorch's ("weight") or Keras's ("kernel"), as for `fastbn.fold_conv`.
    unpadded : collection of str
        The convolutions of `before`, larger than 1, that are known to pad with no zeros: only they take a shift.

    Returns
    -------
    state : State
        Copies of all arrays, without those of the folded BatchNorms, with new weights, and biases where there were
        none ("conv1.bias"), in the dtypes they had. It is for a model in which BatchNorms are left out.
    report : ModelReport
        What became of each BatchNorm, and why; its nodes are arrays.

    Raises
    ------
    ValueError
        A name is unknown, channels do not fit the pair given, `eps` is missing, a BatchNorm's parameters are not
        finite, or var + eps is not positive; or it is a model saved by `fastbn.nn`.
    TypeError
        `state` holds something else than names and arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.interop import arrays
    >>> state = {"fc.weight": [[2.0]], "bn.running_mean": [3.0], "bn.running_var": [4.0]}
    >>> state, report = arrays.fold({name: np.array(a) for name, a in state.items()}, {"bn": "fc"}, eps=0.0)
    >>> state
    {'fc.weight': array([[1.]]), 'fc.bias': array([-1.5])}
    """
    if '"fastbn.nn"' in str(state.get("architecture", "")):
        raise ValueError("state: expected no model of fastbn.nn, which folds itself: nn.load(path).fold().save(other)")
    plan = _plan(state, pairs, before, eps, transposed, layouts, unpadded)
    decisions = [_decision(plan, norm, eps) for norm in plan.names.norms]
    gone = {key for d in decisions if d.action == FOLDED for key in plan.names.norms[d.node].keys.values()}
    new: dict[str, np.ndarray] = {}
    for name, op in plan.layers.items():
        if op.folded:
            part = plan.names.layers[name]
            new[part.one(WEIGHT)] = op.folded.weight.astype(op.weight.dtype, copy=False)  # type: ignore[index]
            new[part.bias] = op.folded.bias.astype(op.weight.dtype, copy=False)
    biases = {plan.names.layers[name].one(WEIGHT): plan.names.layers[name].bias for name in plan.layers}
    folded = State()
    folded.metadata = getattr(state, "metadata", None)
    for key, array in state.items():
        if key not in gone:
            folded[key] = new[key] if key in new else array.copy()
            if (bias := biases.get(key)) in new and bias not in state:
                folded[bias] = new[bias]
    sizes = [sum(a.size for key, a in arrays.items() if not key.endswith(COUNTER)) for arrays in (state, folded)]
    return folded, ModelReport(tuple(decisions), len(state), len(folded), *sizes)


def _decision(plan: _Plan, norm: str, eps: float | None) -> Decision:
    """Fold one BatchNorm, or say why it is left."""
    if norm in plan.pairs.left:
        return Decision(norm, LEFT, (), plan.pairs.left[norm])
    stands_behind = norm in plan.pairs.behind
    into = (plan.pairs.behind[norm],) if stands_behind else plan.pairs.before[norm]
    try:
        affine = Affine.of(plan.params[norm])
    except (ValueError, TypeError) as error:
        raise type(error)(f"{norm}: {error}") from error
    moves = []
    try:
        for name in into:
            op = plan.layers[name]
            _check_taker(name, op, affine, stands_behind)
            maps = (op.before, join(op.after, affine)) if stands_behind else (join(affine, op.before), op.after)
            try:
                moves.append((op, maps, op.fold(*maps)))
            except Stays as stays:
                raise Stays(f"{name}: {stays}") from stays
    except Stays as stays:
        return Decision(norm, LEFT, (), f"{stays}; {plan.pairs.how}")
    for op, maps, folded in moves:
        (op.before, op.after), op.folded = maps, folded
    reason = f"{'behind' if stands_behind else 'before'} it, {plan.pairs.how}; eps {plan.params[norm].eps:g}"
    if eps is None:
        reason += " by default"
    reason += "".join(f"; {n} transposed, {op.groups} groups" for n in into if (op := plan.layers[n]).transposed)
    reason += "".join(f"; {n} taken as a convolution that is not transposed" for n in into if n in plan.assumed)
    return Decision(norm, FOLDED, into, reason, tuple(folded.report for _, _, folded in moves))


def _check_taker(name: str, op: Layer, affine: Affine, stands_behind: bool) -> None:
    if op.held:
        raise Stays(f"{name} must stay as it is: {op.held}")
    if stands_behind:
        return
    if op.transposed:
        raise Stays(f"{name} is transposed: the number of its taps that reach an output varies")
    if op.padded and any(affine.shift):
        advice = "where it does not, name it in unpadded= (--unpadded)"
        raise Stays(f"{name} may pad with zeros, which the shift would have to change: {advice}")


def patches(
    state: Mapping[str, np.ndarray],
    folded: Mapping[str, np.ndarray],
    pairs: Mapping[str, str] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Give, for every layer that took something, its name, dtype and outputs on random patches: before, and folded.

    Before: the layer of `state` and the BatchNorms beside it that `folded` lacks, by their formula, in float64. A
    patch is what a convolution sees at one place. `pairs` and `options` are those of `fold`. This says that the
    arrays hold what they should, not that the pairs are right: there is no model to run.
    """
    options = {"before": None, "eps": None, "transposed": None, "layouts": None, "unpadded": ()} | options
    plan = _plan(state, pairs, **options)
    gone = {norm for norm, part in plan.names.norms.items() if not part.keys.values() & folded.keys()}
    rng = np.random.default_rng(seed)
    for name, op in plan.layers.items():
        behind = [norm for norm, layer in plan.pairs.behind.items() if layer == name and norm in gone]
        before = [norm for norm, layers in plan.pairs.before.items() if name in layers and norm in gone]
        if behind or before:
            weight, part = _canonical(op, op.weight), plan.names.layers[name]
            x = rng.standard_normal((16, *weight.shape[:1], *weight.shape[2:]))  # patch, group, channel, tap
            y = x
            for norm in before:
                y = _batch_norm(y.reshape(len(y), -1, weight.shape[3]), plan.params[norm]).reshape(x.shape)
            y = _run(weight, op.bias, y)
            for norm in behind:
                y = _batch_norm(y, plan.params[norm])
            new = folded[part.one(WEIGHT)]  # type: ignore[index]
            yield name, op.weight.dtype.name, y, _run(_canonical(op, new), folded[part.bias], x)


def _canonical(op: Layer, weight: np.ndarray) -> np.ndarray:
    """Return a weight as float64 of shape (groups, out/groups, in/groups, taps)."""
    first, second = ("I", "M") if "M" in op.layout else ("I", "O") if op.transposed else ("O", "I")
    spatial = [axis for axis, letter in enumerate(op.layout) if letter not in "OIM"]
    weight = weight.astype(np.float64).transpose(op.layout.index(first), op.layout.index(second), *spatial)
    n, m = weight.shape[:2]
    if "M" in op.layout:
        return weight.reshape(n, m, 1, -1)
    weight = weight.reshape(op.groups, n // op.groups, m, -1)
    return weight.swapaxes(1, 2) if op.transposed else weight


def _run(weight: np.ndarray, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    y = np.einsum("goit,ngit->ngo", weight, x).reshape(len(x), -1)
    return y if bias is None else y + bias.astype(np.float64)


def _batch_norm(x: np.ndarray, params: BatchNormParams) -> np.ndarray:
    """Return the formula over axis 1."""
    per_channel = (-1, *(1 for _ in x.shape[2:]))
    arrays = [None if a is None else np.asarray(a).astype(np.float64).reshape(per_channel) for a in params[:4]]
    gamma, beta, mean, var = arrays
    y = (x - mean) / np.sqrt(var + params.eps)  # type: ignore[operator]
    y = y if gamma is None else gamma * y
    return y if beta is None else y + beta
