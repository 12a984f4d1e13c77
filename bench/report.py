"""Tables as text or GitHub markdown, results as JSON, and how far the run is."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .cases import Key
from .timing import Timing

NOTHING = "–"  # not done, or not measured


class Table:
    """A table that is printed row by row: the first column to the left, numbers to the right, `last` to the left."""

    def __init__(self, headers: Sequence[str], first: int, *, markdown: bool, last: bool = False) -> None:
        self.markdown, self.last = markdown, last
        self.widths = [first, *(max(9, len(header) + 2) for header in headers[1:])]
        if markdown:
            print("| " + " | ".join(headers) + " |")
            rules = ["---", *["--:"] * (len(headers) - 1)]
            print("|" + "|".join([*rules[:-1], "---"] if last else rules) + "|", flush=True)
        else:
            self.row(headers)

    def row(self, cells: Sequence[str]) -> None:
        if self.markdown:
            print("| " + " | ".join(cells) + " |", flush=True)
            return
        padded = [cell.rjust(width) for cell, width in zip(cells, self.widths, strict=True)]
        padded[0] = cells[0].ljust(self.widths[0])
        if self.last:
            padded[-1] = "  " + cells[-1]
        print("".join(padded).rstrip(), flush=True)


def number(value: float | None, form: str = ".2f") -> str:
    return NOTHING if value is None else format(value, form)


def quotient(over: Timing | None, under: Timing | None) -> float | None:
    return over.minimum / under.minimum if over and under else None


def by_case(measured: Mapping[Key, Timing]) -> dict[Any, dict[str, Timing]]:
    """Return {case: {contestant: timing}}."""
    found: dict[Any, dict[str, Timing]] = {}
    for (case, who), timing in measured.items():
        found.setdefault(case, {})[who] = timing
    return found


def write_json(path: str, machine: dict[str, Any], measured: Mapping[Key, Timing], **more: object) -> None:
    results = [
        {"case": case.name, "bytes": case.bytes, "seconds": {who: t._asdict() for who, t in times.items()}}
        for case, times in by_case(measured).items()
    ]
    with open(path, "w") as file:
        json.dump({"machine": machine, "results": results, **more}, file, indent=1)


class Progress:
    """How far the run is, on stderr where that is a terminal; nothing is left of it when a row is printed.

    Nothing refreshes it in the background: that would take part in the measurement.
    """

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self.shown = sys.stderr.isatty()
        self.bar: Any = None
        if self.shown and importlib.util.find_spec("rich"):
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), auto_refresh=False, transient=True, redirect_stdout=False)
            self.task = self.bar.add_task("", total=total)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show `name` while the block runs."""
        if self.bar:
            self.bar.update(self.task, completed=self.done, description=name)
            with self.bar:
                self.bar.refresh()
                yield
        else:
            if self.shown:
                print(f"{self.done}/{self.total} {name}"[:79].ljust(79), end="\r", file=sys.stderr, flush=True)
            yield
            if self.shown:
                print(" " * 79, end="\r", file=sys.stderr, flush=True)
        self.done += 1
