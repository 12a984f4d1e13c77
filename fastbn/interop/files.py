"""Fold a model in one file into another: what the command `fastbn fold` does.

A new file is written beside its place, in a temporary folder, verified there if that is asked for, and moved to its
place only when all is well; the input is never written to.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import warnings
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from .._version import __version__
from ..paths import place
from ..untrusted import printable
from .report import Decision, ModelReport
from .verify import Verification, verify

__all__ = ["run"]

OK, DIFFERS, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
LINE = 1000  # characters of a message; runtimes can say more

FORMATS = {
    ".onnx": "onnx", ".pt2": "torch", ".keras": "keras", ".h5": "keras", ".hdf5": "keras",
    ".npz": "arrays", ".safetensors": "arrays", ".pt": "arrays", ".pth": "arrays",
}  # fmt: skip
BECOMES = {".h5": (".keras",), ".hdf5": (".keras",), ".pt": (".pt", ".pth"), ".pth": (".pt", ".pth")}
ARRAYS_ONLY = ("pairs", "before", "eps", "transposed", "layouts", "unpadded")  # options


class _Refused(Exception):
    """What is wrong, in one line, with the name of the file."""


class _Stopped(BaseException):
    """A signal that would end the process at once, and leave the temporary folder."""


def run(options: Namespace) -> int:
    """Fold the file `options.input`; return the exit code: 0, 1 not verified, 2 bad input, 128 + n for signal n."""
    try:
        with _stopping(), warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # what libraries say of each other
            return _run(options)
    except _Refused as refused:
        line = printable(" ".join(str(refused).split()))
        _say(f"fastbn fold: {line if len(line) <= LINE else line[: LINE - 1] + '…'}", "stderr")
        return BAD_INPUT
    except KeyboardInterrupt:
        _say("fastbn fold: interrupted", "stderr")
        return INTERRUPTED
    except _Stopped as stopped:
        number = stopped.args[0]
        _say(f"fastbn fold: stopped by {signal.Signals(number).name}", "stderr")
        return 128 + number


@contextmanager
def _stopping() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind, so that nothing temporary stays."""

    def stop(number: int, _: Any) -> None:
        raise _Stopped(number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only the main thread may
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores one
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


class _Job(NamedTuple):
    """What is read and written, checked before anything is done."""

    kind: str
    front: ModuleType  # its module: load, fold, save
    source: Path
    external: list[Path]  # the model's weights outside `source`
    inputs: list[Path]  # to run it on
    target: Path | None
    report: Path | None

    def check_place(self, file: Path) -> None:
        """Refuse what must not be written to; what an earlier run has left may be replaced."""
        _check_place(file, [self.source, *self.external, *self.inputs])
        data_alone = self.target is not None and file == _external(self.target) and not os.path.lexists(self.target)
        if data_alone and os.path.lexists(file):
            raise _Refused(f"{file}: expected no such file yet: it would hold the weights of {self.target}")


def _run(options: Namespace) -> int:
    job = _job(options)
    folding = _arrays_options(options) if job.kind == "arrays" else {}
    with _refusing(job.source, ValueError, TypeError, MemoryError):
        folded, report = job.front.fold(job.front.load(job.source), **folding)
    _show(report)
    if job.kind == "arrays" and options.pairs is None and options.before is None and report.folded:
        _say("inferred from the names: whether a ReLU or anything else stands between, the file does not show")

    verification: Verification | None = None
    moves: list[tuple[Path, Path]] = []  # from, to
    with _temporary_folder(None if options.dry_run else job.target) as folder:
        if options.verify or not options.dry_run:
            path = folder / (job.target or Path("folded" + _becomes(job.source)[0])).name
            # RuntimeError is PyTorch's, where the disk is full
            with _refusing(job.target or job.source, ValueError, MemoryError, RuntimeError):
                files = _save(job, folded, path)
            del folded  # its memory: it is loaded again
        if options.verify:
            with _refusing(job.source, ValueError, MemoryError):
                verification = verify(
                    job.kind, job.source, path, shapes=dict(options.shapes), inputs=job.inputs,
                    tolerance=options.tolerance, threads=options.threads, **folding,
                )  # fmt: skip
            _say(str(verification))
            if not verification.passed:
                _say(f"fastbn fold: {job.source}: the folded model differs, nothing is written", "stderr")
                return DIFFERS
        if job.target is not None and not options.dry_run:
            moves = [(file, job.target.with_name(file.name)) for file in files]
        for _, file in moves:
            job.check_place(file)
        if job.report is None:
            _place(moves)
        else:
            with _temporary_folder(job.report) as report_folder:
                text = _as_json(job.source, job.target if moves else None, report, verification)
                with _refusing(job.report):
                    (report_folder / job.report.name).write_text(text)
                _place([(report_folder / job.report.name, job.report), *moves])
    if moves:
        _say(f"written: {', '.join(str(file) for _, file in reversed(moves))}")
    return OK


def _job(options: Namespace) -> _Job:
    source = Path(options.input)
    if (suffix := source.suffix.lower()) not in FORMATS:
        raise _Refused(f"{source}: expected a file of {', '.join(FORMATS)}, got {suffix or 'none of these'}")
    kind = FORMATS[suffix]
    with _refusing(source):
        if not source.is_file():
            got = "a folder or a device" if source.exists() else "no such file"
            raise _Refused(f"{source}: expected a model, got {got}")
    target, report = (None if name is None else Path(name) for name in (options.output, options.report))
    _check_options(options, kind, target)
    with _refusing(source, ValueError):
        if kind == "keras":
            _choose_backend()
        front = importlib.import_module(f".{kind}", __package__)
        external = front.external_files(source) if kind == "onnx" else []
    job = _Job(kind, front, source, external, [Path(name) for name in options.inputs], target, report)
    if target is not None:
        job.check_place(target)
        if external:
            job.check_place(_external(target))
    if report is not None:
        job.check_place(report)
        for other in () if target is None else (target, _external(target)):
            if _same(report, other):
                raise _Refused(f"{report}: expected another file than {other}, where the model goes")
    return job


def _becomes(source: Path) -> tuple[str, ...]:
    """Return the suffixes that the folded model of a file can have."""
    suffix = source.suffix.lower()
    return BECOMES.get(suffix, (suffix,))


def _external(target: Path) -> Path:
    """Return where weights outside the model go."""
    return target.with_name(f"{target.name}.data")


def _choose_backend() -> None:
    """Let Keras run on what there is, where nobody has said otherwise and its default is missing."""
    if "KERAS_BACKEND" not in os.environ and importlib.util.find_spec("tensorflow") is None:
        found = [name for name in ("torch", "jax") if importlib.util.find_spec(name) is not None]
        os.environ.update({"KERAS_BACKEND": found[0]} if found else {})


# What is refused ------------------------------------------------------------------------------------------------


@contextmanager
def _refusing(file: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors into a line that names the file."""
    try:
        yield
    except _Refused:
        raise
    except ModuleNotFoundError as error:
        raise _Refused(f"{file}: {error}") from error
    except OSError as error:
        raise _Refused(f"{file}: {error.strerror or error}") from error
    except errors as error:
        text = str(error) or type(error).__name__
        raise _Refused(text if text.startswith(str(file)) else f"{file}: {text}") from error


def _check_options(options: Namespace, kind: str, target: Path | None) -> None:
    given = [name for name in ARRAYS_ONLY if getattr(options, name) is not None]
    if kind != "arrays" and given:
        raise _Refused(f"{options.input}: expected --{given[0]} only for arrays (.npz, .safetensors, .pt, .pth)")
    running = [name for name in ("shapes", "inputs", "threads") if getattr(options, name)]
    for name in running + (["tolerance"] if options.tolerance is not None else []):
        option = "--" + {"shapes": "shape", "inputs": "input"}.get(name, name)
        if not options.verify:
            raise _Refused(f"{options.input}: expected --verify with {option}")
        if kind == "arrays" and name in running:
            raise _Refused(f"{options.input}: expected no {option}: arrays are no model that runs")
    if target is None:
        if not options.dry_run:
            raise _Refused(f"{options.input}: expected the name of a file to write, or --dry-run")
    elif target.suffix.lower() not in (allowed := _becomes(Path(options.input))):
        raise _Refused(f"{target}: expected the suffix {' or '.join(allowed)} for what {options.input} becomes")


def _arrays_options(options: Namespace) -> dict[str, Any]:
    """Return what `arrays.fold` takes."""
    return {
        "pairs": options.pairs, "before": options.before, "eps": options.eps,
        "transposed": options.transposed, "layouts": options.layouts, "unpadded": options.unpadded or (),
    }  # fmt: skip


def _check_place(file: Path, others: Iterable[Path]) -> None:
    """Refuse to write to a file that is one of the others, or that cannot be one."""
    with _refusing(file):
        for other in others:
            if _same(file, other):
                raise _Refused(f"{file}: expected another file than {other}, which is only read")
        if not file.parent.is_dir():
            raise _Refused(f"{file}: expected a folder to write to, got no such folder")
        if file.is_dir():
            raise _Refused(f"{file}: expected the name of a file, got a folder")
        if file.exists() and not file.is_file():  # a device: replacing it would take it from everybody
            raise _Refused(f"{file}: expected the name of a file, got a device, a pipe or a socket")


def _same(file: Path, other: Path) -> bool:
    """Say whether two names are of one file, by whatever links, or would be."""
    if file.exists() and other.exists():
        return file.samefile(other)
    return os.path.realpath(file) == os.path.realpath(other)


# What is written ------------------------------------------------------------------------------------------------


@contextmanager
def _temporary_folder(target: Path | None) -> Iterator[Path]:
    """Make a folder beside `target`, or anywhere, that is gone in the end."""
    with _refusing(target or Path(tempfile.gettempdir())):
        folder = tempfile.TemporaryDirectory(prefix=".fastbn-", dir=None if target is None else target.parent)
    with folder as name:
        yield Path(name)


def _save(job: _Job, model: Any, path: Path) -> list[Path]:
    """Save a model in an empty folder; return the files there are then, the model's own last."""
    if job.external:
        job.front.save(model, path, location=_external(path).name)
    else:
        job.front.save(model, path)
    return sorted(path.parent.iterdir(), key=lambda file: file == path)


def _place(moves: Iterable[tuple[Path, Path]]) -> None:
    """Move files to their places, all of them or none."""
    try:
        place([(str(temporary), str(file)) for temporary, file in moves])
    except OSError as error:
        raise _Refused(f"{error.filename}: {error.strerror or error}") from error


# What is said ---------------------------------------------------------------------------------------------------


def _as_json(source: Path, target: Path | None, report: ModelReport, verification: Verification | None) -> str:
    result = {
        "fastbn": __version__, "input": str(source), "output": None if target is None else str(target),
        **report.to_dict(), "verification": None if verification is None else verification.to_dict(),
    }  # fmt: skip
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def _say(text: str, where: str = "stdout") -> None:
    """Print a line; where it cannot be written (nobody reads on, the disk is full), go on without."""
    stream = getattr(sys, where)
    if stream is None or stream.closed:
        return
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:  # what is still buffered must not fail at exit
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError):  # a stream that is no file
            os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _show(report: ModelReport) -> None:
    """Print the report: as a table where rich is there and somebody looks on, else as plain text."""
    report = replace(report, decisions=tuple(map(_printable, report)))
    if report.decisions and sys.stdout is not None and sys.stdout.isatty():
        try:
            from rich.console import Console
            from rich.table import Column, Table
        except ModuleNotFoundError:
            pass
        else:
            headers = Column("BatchNorm", overflow="fold"), Column(""), Column("into", overflow="fold"), Column("why")
            table = Table(*headers, box=None, pad_edge=False)
            colours = {"folded": "green", "merged": "green", "rewritten": "yellow", "left": "yellow"}
            for decision in report:
                style = f"[{colours[decision.action]}]{decision.action}"
                table.add_row(_plain(decision.node), style, _plain(", ".join(decision.into)), _plain(decision.reason))
            console = Console()
            with console.capture() as rendered:
                console.print(table)
            _say(rendered.get() + report.summary())
            return
    _say(str(report))


def _printable(decision: Decision) -> Decision:
    """Return a decision whose names, which the file has given, do nothing to a terminal."""
    into = tuple(map(printable, decision.into))
    return decision._replace(node=printable(decision.node), into=into, reason=printable(decision.reason))


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
