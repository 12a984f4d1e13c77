"""The `fastbn` command: demo, info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ._version import __version__
from .config import show_config


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalisation on CPUs at the speed of memory.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{demo,info}")

    demo = commands.add_parser(
        "demo",
        help="train on real digits with and without BatchNorm, fold it away, compare (needs the demo extra)",
        description="Train one network on scikit-learn's digits three times: on raw inputs, on standardised inputs, "
        "and on standardised inputs with BatchNorm. Then fold BatchNorm into the weights and compare.",
    )
    demo.add_argument("--epochs", type=_positive, default=30, help="sweeps over the training set (default 30)")
    demo.add_argument("--seeds", type=_positive, default=5, help="runs with different initial weights (default 5)")
    demo.add_argument("--figure", default="fastbn-demo.png", help="where to write the figure (default %(default)s)")
    demo.add_argument("--quick", action="store_true", help="3 epochs, 2 seeds: a check that all works")
    demo.add_argument("--no-progress", action="store_true", help="no progress bar")

    commands.add_parser("info", help="print instruction set, threads, caches, OpenMP, versions")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command == "info":
        show_config()
        return 0
    try:
        from . import demo
    except ModuleNotFoundError as error:
        print(f'fastbn demo: {error.name} is not installed: pip install "fastbn[demo]"', file=sys.stderr)
        return 1
    epochs, seeds = (3, 2) if options.quick else (options.epochs, options.seeds)
    return demo.run(epochs=epochs, seeds=seeds, figure=options.figure, progress=not options.no_progress)
