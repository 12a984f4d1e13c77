"""The `fastbn` command: fold, demo, info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from ._version import __version__
from .config import show_config


def _positive(text: str) -> int:
    with suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, got {text}")


def _number(text: str) -> float:
    with suppress(ValueError):
        if 0 <= (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text}")


def _names(text: str) -> list[str]:
    """Read "a,b", or "none"."""
    return [] if text == "none" else text.split(",")


def _couples(text: str) -> list[tuple[str, str]]:
    """Read "a=b,c=d"."""
    couples = [couple.split("=") for couple in text.split(",")]
    if not all(len(couple) == 2 and all(couple) for couple in couples):
        raise argparse.ArgumentTypeError(f"expected NAME=NAME,..., got {text}")
    return [(first, second) for first, second in couples]


def _mapping(text: str) -> dict[str, str]:
    couples = _couples(text)
    if len(mapping := dict(couples)) < len(couples):
        raise argparse.ArgumentTypeError(f"expected each name once before an =, got {text}")
    return mapping


def _multimapping(text: str) -> dict[str, list[str]]:
    mapping: dict[str, list[str]] = {}
    for first, second in _couples(text):
        mapping.setdefault(first, []).append(second)
    return mapping


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    name, _, sizes = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"expected NAME=SIZE,SIZE,..., got {text}")
    try:
        shape = tuple(int(size) for size in sizes.split(",") if sizes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected integers behind the =, got {text}") from error
    if any(size < 1 for size in shape):
        raise argparse.ArgumentTypeError(f"expected sizes of 1 or more, got {text}")
    return name, shape


_FOLD = """\
Fold the BatchNorms of a trained model into the weights beside them: the same function, with fewer nodes. What cannot
be folded stays a BatchNorm, and the table says why.

  .onnx                          ONNX (pip install "fastbn[onnx]")
  .pt2                           a PyTorch program, by torch.export.save (pip install "fastbn[torch]")
  .keras, .h5, .hdf5             Keras; what is written is .keras (pip install "fastbn[keras]")
  .safetensors, .npz, .pt, .pth  arrays by name; which BatchNorm stands where: see below"""

_FOLD_ENDS = """\
examples:
  fastbn fold model.onnx folded.onnx --verify
  fastbn fold model.onnx --dry-run
  fastbn fold net.safetensors out.safetensors
  fastbn fold net.safetensors out.safetensors --pairs bn1=conv1,bn2=conv2 --transposed none

exit codes: 0 done; 1 the models differ, nothing is written; 2 bad input, nothing is written; 130 interrupted;
143, 129 ended by SIGTERM, SIGHUP"""


def _add_fold(commands: Any) -> None:
    fold = commands.add_parser(
        "fold",
        help="fold the BatchNorms of an ONNX, PyTorch or Keras model into its weights, and verify it",
        description=_FOLD, epilog=_FOLD_ENDS, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    fold.add_argument("input", metavar="IN", help="the model; it is never written to")
    fold.add_argument("output", metavar="OUT", nargs="?", help="the folded model; replaced if it exists")
    fold.add_argument("--dry-run", action="store_true", help="say what would be folded, and write no model")
    fold.add_argument("--report", metavar="FILE", help="write what was done, and how it was verified, as JSON")

    checks = fold.add_argument_group("verification")
    checks.add_argument(
        "--verify", action="store_true",
        help="run the model and what was written on random inputs; compare outputs and speed; write nothing if they "
        "differ",
    )  # fmt: skip
    checks.add_argument(
        "--input", metavar="FILE", action="append", default=[], dest="inputs",
        help="real inputs beside the random ones: .npz by the inputs' names, or .npy for the only input",
    )  # fmt: skip
    checks.add_argument(
        "--shape", metavar="NAME=1,3,224,224", action="append", default=[], type=_shape, dest="shapes",
        help="the shape of an input whose sizes may vary; without it, likely ones are tried",
    )  # fmt: skip
    checks.add_argument(
        "--tolerance", type=_number, metavar="T",
        help="largest difference, relative to the largest |output| (default: 1000 eps of the output's dtype, 32 for "
        "float16, 16 for bfloat16, or 16 times what one eps in the inputs makes; integers must be equal)",
    )  # fmt: skip
    checks.add_argument("--threads", type=_positive, metavar="N", help="threads of the runtime (default: its own)")

    arrays = fold.add_argument_group("arrays (.safetensors, .npz, .pt, .pth)")
    arrays.add_argument(
        "--pairs", type=_mapping, metavar="BN=LAYER,...",
        help="each BatchNorm and the layer before it; without --pairs and --before the names decide (bn1 and conv1, "
        "0 and 1 of a Sequential), where channels and order do not contradict them; that nothing stands between the "
        "two is then for you to know",
    )  # fmt: skip
    arrays.add_argument(
        "--before", type=_multimapping, metavar="BN=LAYER,...",
        help="each BatchNorm and the layer behind it; where several layers read it, name it with each",
    )  # fmt: skip
    arrays.add_argument(
        "--eps", type=_number, metavar="E", help="eps of the BatchNorms (default 1e-5 for PyTorch's names)"
    )
    arrays.add_argument(
        "--transposed", type=_names, metavar="LAYER,...",
        help='the transposed convolutions, or "none"; without it, one whose shape fits both kinds is taken for none, '
        "and left if its name is like deconv, up or decoder",
    )  # fmt: skip
    arrays.add_argument(
        "--layouts", type=_mapping, metavar="LAYER=OIHW,...", help="axes of weights in another order than usual"
    )
    arrays.add_argument(
        "--unpadded", type=_names, metavar="LAYER,...", help="convolutions of --before that pad with no zeros"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalisation on CPUs at the speed of memory.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="{fold,demo,info}")
    _add_fold(commands)

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
    if options.command == "fold":
        from .interop import files

        return files.run(options)
    try:
        from . import demo
    except ModuleNotFoundError as error:
        print(f'fastbn demo: {error.name} is not installed: pip install "fastbn[demo]"', file=sys.stderr)
        return 1
    epochs, seeds = (3, 2) if options.quick else (options.epochs, options.seeds)
    return demo.run(epochs=epochs, seeds=seeds, figure=options.figure, progress=not options.no_progress)
