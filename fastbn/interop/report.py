"""What became of every BatchNorm of a model: the second thing that each `fold` returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..fold import FoldReport

WHY = "why (backward: it stood behind that; forward: before it)"
FOLDED, MERGED, REWRITTEN, LEFT = "folded", "merged", "rewritten", "left"


class Decision(NamedTuple):
    """Say what became of one BatchNorm, and why.

    action is "folded" (gone, into the weights of the layers `into`), "merged" (gone, into the BatchNorms `into`),
    "rewritten" (it stays, and holds what it took from its neighbours) or "left" (it stays as it was). `reason` says
    why, in one line; `changes` holds one FoldReport for each layer in `into`, with what it did to the weights.
    """

    node: str
    action: str
    into: tuple[str, ...]
    reason: str
    changes: tuple[FoldReport, ...] = ()


@dataclass(frozen=True)
class ModelReport:
    """Hold the decisions about a model, and its size before and after; iterating gives the decisions.

    Attributes
    ----------
    decisions : tuple of Decision
        One for each BatchNorm, in the order of the model.
    nodes_before, nodes_after : int
        Nodes that are not constant (ONNX), operations (PyTorch), layers (Keras), arrays (state dicts).
    parameters_before, parameters_after : int
        Numbers held as weights, biases, BatchNorm's parameters and statistics.
    """

    decisions: tuple[Decision, ...]
    nodes_before: int
    nodes_after: int
    parameters_before: int
    parameters_after: int

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions)

    def __len__(self) -> int:
        return len(self.decisions)

    def count(self, action: str) -> int:
        """Return how many BatchNorms were "folded", "merged", "rewritten" or "left"."""
        return sum(decision.action == action for decision in self.decisions)

    @property
    def folded(self) -> tuple[Decision, ...]:
        """The BatchNorms that are gone: folded into weights, or merged into another BatchNorm."""
        return tuple(d for d in self.decisions if d.action in (FOLDED, MERGED))

    @property
    def left(self) -> tuple[Decision, ...]:
        """The BatchNorms that stay, rewritten or as they were."""
        return tuple(d for d in self.decisions if d.action in (REWRITTEN, LEFT))

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        sizes = ("nodes_before", "nodes_after", "parameters_before", "parameters_after")
        decisions = [
            decision._asdict() | {"into": list(decision.into), "changes": [c._asdict() for c in decision.changes]}
            for decision in self.decisions
        ]
        return {name: getattr(self, name) for name in sizes} | {"decisions": decisions}

    def summary(self) -> str:
        """Return the totals in one line."""
        counts = ", ".join(f"{n} {action}" for action in (FOLDED, MERGED, REWRITTEN, LEFT) if (n := self.count(action)))
        return (
            f"{len(self)} BatchNorm: {counts or 'nothing to fold'}; nodes {self.nodes_before} -> {self.nodes_after}, "
            f"parameters {self.parameters_before:,} -> {self.parameters_after:,}"
        )

    def __str__(self) -> str:
        """Return a table with one line for each BatchNorm, then the totals."""
        rows = [("BatchNorm", "", "into", WHY), *((d.node, d.action, ", ".join(d.into), d.reason) for d in self)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join([*(t.ljust(w) for t, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows]
        return "\n".join([*(lines if self.decisions else []), self.summary()])
