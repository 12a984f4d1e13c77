"""Figures of what was measured: a roofline, and the peers' times over ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from .cases import Key, NormCase
from .report import by_case
from .timing import Timing

# Okabe & Ito's colours, which colour-blind readers tell apart (and two of Tol's); hatches say the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999", "#882255", "#999933")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "+++", "ooo", "***", "|||")
KINDS = {"train": "training", "infer": "inference", "backward": "backward", "optim": "optimizers", "fold": "folding"}
MARKERS = {"nchw": "o", "nhwc": "s", "rows": "^", "": "D"}
LABELS = {"nchw": "channels first", "nhwc": "channels last", "rows": "(rows, channels)", "": "other arrays"}


def unsupported(path: str) -> str:
    """Return what is wrong with the file's ending, or nothing."""
    formats = Figure().canvas.get_supported_filetypes()
    ending = Path(path).suffix.lstrip(".")
    return "" if ending.lower() in formats else f"expected a file ending in {', '.join(formats)}, got {path}"


def draw(path: str, measured: Mapping[Key, Timing], machine: Mapping[str, Any]) -> list[Path]:
    """Write the figures; return their paths."""
    cases = {case: times for case, times in by_case(measured).items() if "fastbn" in times}
    under = f"{machine['processor']}, {machine['instruction_set']}, threads: {machine['threads']}"
    target = Path(path)
    figures = {target: _roofline(cases, machine["caches"]["L3"], under)}
    if bars := _bars(cases, under):
        figures[target.with_stem(target.stem + "-peers")] = bars
    for name, figure in figures.items():
        figure.savefig(name, dpi=150)
    return list(figures)


def _layout(case: Any) -> str:
    return "" if not isinstance(case, NormCase) else "rows" if len(case.shape) == 2 else case.layout


def _operation(case: Any) -> str:
    return case.operation if isinstance(case, NormCase) else case.kind


def _size(item: tuple[Any, Any]) -> tuple[str, int]:
    """Sort by layout, large before small; optimizers and foldings stay as they are."""
    case = item[0]
    return _layout(case), -case.elements if isinstance(case, NormCase) else 0


def _plain(axis: Any) -> None:
    """Label a log axis with plain numbers."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _roofline(cases: Mapping[Any, Mapping[str, Timing]], cache: int, under: str) -> Figure:
    """Elements per second over the bytes that must move for each; the roofs are what a copy moves."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    # Fresh outputs measure the system's page faults as well: shown only where there is nothing else.
    given = {case: t for case, t in cases.items() if getattr(case, "preallocated", True)} or dict(cases)
    xs = sorted({case.bytes / case.elements for case in given})
    operations = [name for name in KINDS if name in {_operation(case) for case in given}]
    beside = {x: sorted({operations.index(_operation(c)) for c in given if c.bytes / c.elements == x}) for x in xs}
    for case, times in given.items():
        x, number = case.bytes / case.elements, operations.index(_operation(case))
        shift = 1.05 ** (beside[x].index(number) - (len(beside[x]) - 1) / 2)  # side by side
        colour = COLOURS[number]
        large = 2 * case.tensor_bytes > cache
        axes.plot(
            x * shift, case.elements / times["fastbn"].minimum / 1e9,
            MARKERS[_layout(case)], color=colour, markerfacecolor=colour if large else "white", markersize=7,
        )  # fmt: skip
    for name, style, large in (("past the cache", "-", True), ("in cache", "--", False)):
        rates = [
            2 * case.tensor_bytes / times["copy"].minimum / 1e9
            for case, times in cases.items()
            if "copy" in times and (2 * case.tensor_bytes > cache) == large
        ]
        if rates:
            ends = [xs[0] / 1.3, xs[-1] * 1.3]
            label = f"copy {name}: {max(rates):.0f} GB/s"
            axes.plot(ends, [max(rates) / x for x in ends], style, color="black", linewidth=1.2, label=label)
    axes.set(
        xscale="log", yscale="log", xticks=xs, xlabel="bytes that must move per element",
        ylabel="10⁹ elements per second", title=f"fastbn under the roof of a copy\n{under}",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    handles = axes.get_legend_handles_labels()[0]
    handles += [
        Line2D([], [], color=COLOURS[i], marker="o", linestyle="", label=KINDS[n]) for i, n in enumerate(operations)
    ]
    used = {_layout(case) for case in given}
    handles += [
        Line2D([], [], color="grey", marker=MARKERS[k], linestyle="", label=LABELS[k]) for k in MARKERS if k in used
    ]
    if any(2 * case.tensor_bytes <= cache for case in given):
        handles.append(
            Line2D([], [], color="grey", marker="o", markerfacecolor="white", linestyle="", label="hollow: in cache")
        )
    figure.legend(handles=handles, loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _bars(cases: Mapping[Any, Mapping[str, Timing]], under: str) -> Figure | None:
    """One panel per operation and kind of call; in it the cases, and a bar per peer from the 1× line."""
    panels: dict[str, dict[str, dict[str, float]]] = {}  # title -> case -> peer -> ratio
    for case, times in sorted(cases.items(), key=_size):
        ratios = {
            who: timing.minimum / times["fastbn"].minimum
            for who, timing in sorted(times.items())
            if who != "copy" and not who.startswith("fastbn")
        }
        if not ratios:
            continue
        title, label = KINDS[_operation(case)], case.name
        if isinstance(case, NormCase):
            fused = f" + {case.fused.replace('+', ' + ')}" if case.fused else ""
            dtype = "" if case.dtype == "float32" else f", {case.dtype}"
            title += f"{fused}, {'out=' if case.preallocated else 'fresh'}{dtype}"
            label = f"{'×'.join(map(str, case.shape))} {_layout(case)}"
        panels.setdefault(title, {})[label] = ratios
    if not panels:
        return None
    names = sorted({who for cases in panels.values() for ratios in cases.values() for who in ratios})
    peers = {who: number for number, who in enumerate(names)}
    columns = min(3, len(panels))
    titles = sorted(panels, key=lambda title: len(panels[title]))  # neighbours of like heights
    heights = [
        0.8 + max(0.15 * sum(len(ratios) + 1 for ratios in panels[title].values()) for title in titles[i : i + columns])
        for i in range(0, len(titles), columns)
    ]
    figure = Figure(figsize=(5.5 * columns, max(3, sum(heights) + 1.2)), layout="constrained")
    grid = list(figure.subplots(len(heights), columns, squeeze=False, height_ratios=heights).flat)
    for axes, title in zip(grid, titles, strict=False):
        _panel(axes, title, panels[title], peers)
    for axes in grid[len(titles) :]:
        axes.remove()
    handles = [
        Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=who)
        for who, colour, hatch in zip(peers, COLOURS, HATCHES, strict=False)
    ]
    figure.suptitle(f"How many times as long as fastbn the others take\n{under}", fontsize=12)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(columns * 2, len(peers)), frameon=False)
    return figure


def _panel(axes: Any, title: str, cases: Mapping[str, Mapping[str, float]], peers: Mapping[str, int]) -> None:
    position, ticks = 0.0, {}
    for label, ratios in cases.items():
        ticks[label] = position + (len(ratios) - 1) / 2
        for who, ratio in ratios.items():
            style = {"color": COLOURS[peers[who] % 10], "hatch": HATCHES[peers[who] % 10], "edgecolor": "white"}
            axes.barh(position, ratio - 1, left=1, height=0.9, linewidth=0, **style)
            right = ratio >= 1
            axes.annotate(
                f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}", (ratio, position), fontsize=6.5, va="center",
                ha="left" if right else "right", xytext=(2 if right else -2, 0), textcoords="offset points",
            )  # fmt: skip
            position += 1
        position += 1  # a gap
    every = [ratio for ratios in cases.values() for ratio in ratios.values()]
    axes.axvline(1, color="black", linewidth=1)
    axes.set(xscale="log", xlim=(min(0.5, min(every) / 1.5), max(2, max(every) * 1.5)))
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=7.5)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_title(title, fontsize=10)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    _plain(axes.xaxis)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", alpha=0.3)
