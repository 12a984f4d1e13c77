"""`python -m bench`: time fastbn and its installed peers on one table of cases, or against the targets."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case, Key
    from .targets import Target
    from .timing import Timing

_DTYPES = ("float32", "float64", "float16", "bfloat16")
_ARGUMENTS = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
_ARGUMENTS.add_argument("what", nargs="*", help="norm, optim, fold (default: all three), or alone one of "
                        "models, training, sklearn, mpi, dask, thresholds")  # fmt: skip
_ARGUMENTS.add_argument("--dtype", choices=_DTYPES, default="float32", help="of the norm cases (default %(default)s)")
_ARGUMENTS.add_argument("--threads", type=int, default=2, help="of every library (default %(default)s)")
_ARGUMENTS.add_argument("--isa", help="instruction set of fastbn, as FASTBN_ISA")
_ARGUMENTS.add_argument("--shapes", default="largest,small,rows", help="comma-separated (default %(default)s): "
                        "resnet50, largest, awkward, densenet, other, small, rows, quick")  # fmt: skip
_ARGUMENTS.add_argument("--peers", default="all", help="comma-separated, all, or none (default %(default)s)")
_ARGUMENTS.add_argument("--rounds", type=int, help="interleaved rounds (default 7; 2 with --quick)")
_ARGUMENTS.add_argument("--quick", action="store_true", help="small shapes, two rounds: a smoke test")
_ARGUMENTS.add_argument("--targets", action="store_true", help="what is asked, what is measured, whether it is met")
_ARGUMENTS.add_argument("--markdown", action="store_true", help="print the table as GitHub markdown")
_ARGUMENTS.add_argument("--json", metavar="FILE", help="write all results there")
_ARGUMENTS.add_argument("--plot", metavar="FILE", help="draw a roofline there, and the peers in FILE's name + -peers")


# Subjects of their own: the module whose `main` measures them
_ALONE = {
    "models": "models", "training": "training", "sklearn": "sklearn_cases", "mpi": "mpi_cases", "dask": "dask_cases",
}  # fmt: skip


class Run:
    """The contestants, why others are absent, and all that has been measured."""

    def __init__(self, contestants: dict[str, Any], absent: dict[str, str], rounds: int) -> None:
        self.contestants, self.absent, self.rounds = contestants, absent, rounds
        self.measured: dict[Key, Timing] = {}
        self.failures: dict[Key, str] = {}

    def measure(self, keys: Any) -> None:
        from .timing import measure

        # Sorted by dtype first: the contestants share the arrays of one shape and dtype.
        order = sorted(keys, key=lambda key: (getattr(key[0], "dtype", ""), key[0].name, key[1]))
        self.measured |= measure(self.contestants, order, self.rounds, self._failed)

    def _failed(self, key: Key, error: Exception) -> None:
        case, who = key
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if (who, reason) not in {(other[1], said) for other, said in self.failures.items()}:
            print(f"{who}: {case.name}: {reason}", file=sys.stderr)  # once per reason
        self.failures[key] = reason

    def why_not(self, key: Key) -> str:
        return self.absent.get(key[1]) or f"{key[1]}: {self.failures.get(key, 'does not do this')}"

    @property
    def broken(self) -> bool:
        """Whether fastbn itself failed, which is an error; a peer's failure, or no ml_dtypes, is a result."""
        return any(
            key[1].startswith("fastbn") and not reason.startswith("ModuleNotFoundError")
            for key, reason in self.failures.items()
        )


def main(arguments: list[str] | None = None) -> int:
    options = _ARGUMENTS.parse_args(arguments)
    _check(options)
    if options.isa:
        os.environ["FASTBN_ISA"] = options.isa  # before fastbn is imported
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if not any(Path("fastbn", "_core").glob("_kernels_*")):  # not built in place: the installed one is meant
        here = [folder for folder in sys.path if Path(folder).resolve() == Path.cwd()]
        sys.path = [folder for folder in sys.path if folder not in here] + here  # where other processes find bench
    try:
        import fastbn
    except ImportError as error:
        if not options.isa or "FASTBN_ISA" not in str(error):
            raise
        _ARGUMENTS.error(f"--isa: {error}")
    if options.plot:
        try:
            from . import figures
        except ModuleNotFoundError as error:
            _ARGUMENTS.error(f"--plot: needs {str(error.name).partition('.')[0]}: pip install 'fastbn[bench]'")
        if problem := figures.unsupported(options.plot):
            _ARGUMENTS.error(f"--plot: {problem}")
    from fastbn._core import caches

    from . import report, targets

    fastbn.set_num_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 7)
    if options.what == ["thresholds"]:
        from .thresholds import main as thresholds

        thresholds(options.threads, rounds)
        return 0
    if len(options.what) == 1 and options.what[0] in _ALONE:
        try:
            subject = importlib.import_module(f".{_ALONE[options.what[0]]}", __package__)
        except ModuleNotFoundError as error:
            _ARGUMENTS.error(f"{options.what[0]}: {error}")
        common = {"markdown": options.markdown, "quick": options.quick, "json_path": options.json}
        return subject.main(options.threads, rounds, **common)
    rows = targets.rows(quick=options.quick, cache=caches.L3, threads=options.threads) if options.targets else []
    table = [] if options.targets else _table(options)
    contestants, absent = _contestants(options, {who for row in rows for _, who in row.keys})
    run = Run(contestants, absent, rounds)
    machine = _machine(options.threads, contestants)
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    command = shlex.join(["python", "-m", "bench", *(sys.argv[1:] if arguments is None else arguments)])
    print(
        f"{machine['processor']}, {machine['instruction_set']}, threads: {options.threads}; {versions}; "
        f"least of {rounds} interleaved rounds: `{command}`\n"
    )
    if options.quick and options.targets:
        print("--quick: tiny arrays under the rows' names, a smoke test; the figures mean nothing\n")
    outcome = {"targets": _targets(options, run, rows)} if options.targets else _cases(options, run, table)
    if options.json:
        report.write_json(options.json, machine, run.measured, **outcome)
    if options.plot:
        for path in figures.draw(options.plot, run.measured, machine):
            print(f"drawn: {path}", file=sys.stderr)
    return int(run.broken)


def _check(options: argparse.Namespace) -> None:
    """Refuse what is wrong before anything is measured."""
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            _ARGUMENTS.error(f"--{name}: expected 1 or more, got {value}")
    for name in ("json", "plot"):
        folder = Path(getattr(options, name) or ".").parent
        if not folder.is_dir():
            _ARGUMENTS.error(f"--{name}: there is no folder {folder}")
    unknown = set(options.what) - {"norm", "optim", "fold"}
    alone = {*_ALONE, "thresholds"}
    if unknown and (len(options.what) > 1 or not unknown <= alone):
        got = ", ".join(sorted(unknown))
        _ARGUMENTS.error(f"what: expected norm, optim, fold, or alone one of {', '.join(sorted(alone))}; got {got}")
    if options.what and options.targets:
        _ARGUMENTS.error("--targets: has cases of its own; leave out what")


def _table(options: argparse.Namespace) -> list[Case]:
    from . import cases

    names = options.shapes.split(",")
    if set(names) - set(cases.SHAPES):
        _ARGUMENTS.error(f"--shapes: expected some of {', '.join(cases.SHAPES)}, got {options.shapes}")
    names = ["quick"] if options.quick else names
    what = options.what or ["norm", "optim", "fold"]
    table: list[Case] = []
    if "norm" in what:
        table += cases.norm_cases([shape for name in names for shape in cases.SHAPES[name]], options.dtype)
    if "optim" in what:
        table += cases.optim_cases(quick=options.quick)
    if "fold" in what:
        table += cases.fold_cases(quick=options.quick)
    return table


def _contestants(options: argparse.Namespace, needed: set[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return who takes part, by name, and why the others do not; with --targets only those `needed` do."""
    from fastbn._core import dispatch

    from . import peers

    named: dict[str, list[str]] = {"all": list(peers.PEERS), "none": []}
    wanted = named.get(options.peers, options.peers.split(","))
    if set(wanted) - set(peers.PEERS):
        _ARGUMENTS.error(f"--peers: expected all, none, or some of {', '.join(peers.PEERS)}, got {options.peers}")
    found: dict[str, Any] = {"copy": peers.Copy(options.threads), "fastbn": peers.FastBN()}
    absent = {name: f"{name} is not among --peers" for name in peers.PEERS if name not in wanted}
    skipped: dict[str, list[str]] = {}
    for name in [name for name in wanted if name in needed or not options.targets]:
        try:
            found[name] = peers.PEERS[name](options.threads)
        except Exception as error:
            absent[name] = f"{name}: {error}"
            hint = f" ({peers.PEERS[name].install})" if isinstance(error, ModuleNotFoundError) else ""
            skipped.setdefault(f"{error}{hint}", []).append(name)
    for why, names in skipped.items():
        print(f"skipped {', '.join(names)}: {why}", file=sys.stderr)
    if options.targets:
        if options.threads > 1:
            found["fastbn on 1 thread"] = peers.FastBN(1)
        absent["fastbn on 1 thread"] = "--threads 1"
        for isa in ("v2", "v3", "v4"):
            if isa in dispatch.available():
                found[f"fastbn {isa}"] = peers.FastBN(options.threads, isa)
            absent[f"fastbn {isa}"] = f"this CPU does not run {isa}, or it is not built"
    return found, absent


def _cases(options: argparse.Namespace, run: Run, table: list[Case]) -> dict[str, Any]:
    from .peers import Peer
    from .report import Progress, Table, number, quotient

    print("GB/s: of the bytes that must move; × copy: fastbn's time over a copy's; × peer: the peer's over fastbn's")
    kind, progress = "", Progress(len(table))
    for case in table:
        if case.kind != kind:  # a table of its own, with those who do such things
            kind = case.kind
            does = {who for who, c in run.contestants.items() if getattr(type(c), kind) is not getattr(Peer, kind)}
            others = [who for who in run.contestants if who in does - {"copy", "fastbn"}]
            headers = ["case", "min ms", "median", "MB", "GB/s", "× copy", *(f"× {name}" for name in others)]
            print()
            width = max(len(other.name) for other in table if other.kind == kind) + 1
            lines = Table(headers, width, markdown=options.markdown)
        with progress.step(case.name):
            run.measure([(case, who) for who in run.contestants])
        times = {who: run.measured.get((case, who)) for who in run.contestants}
        own = times["fastbn"]
        lines.row([
            case.name, number(own and own.minimum * 1e3, ".4g"), number(own and own.median * 1e3, ".4g"),
            number(case.bytes / 1e6, ".4g"), number(own and case.bytes / own.minimum / 1e9, ".1f"),
            number(quotient(own, times["copy"])), *(number(quotient(times[name], own)) for name in others),
        ])  # fmt: skip
    return {}


def _targets(options: argparse.Namespace, run: Run, rows: list[Target]) -> list[dict[str, Any]]:
    from .report import Progress, Table, number
    from .targets import groups as grouped

    groups = grouped(rows)
    lines = Table(["target", "asked", "measured", "result"], 104, markdown=options.markdown, last=True)
    lines.widths[1:3] = 16, 12
    outcome: list[dict[str, Any]] = []
    done: set[Key] = set()
    progress = Progress(len(set(groups.values())))
    for row in rows:
        for key in sorted(row.keys, key=lambda key: (key[0].name, key[1])):
            if key not in done:
                copies = {(case, "copy") for case, who in groups[key] if who == "fastbn"}  # the figure's roof
                with progress.step(key[0].name):
                    run.measure(groups[key] | copies)
                done |= groups[key]
        value = None
        try:
            value = row.value({key: timing.minimum for key, timing in run.measured.items()})
            result = row.verdict(value)
        except KeyError as error:
            result = f"not measured ({run.why_not(error.args[0])})"
        except ValueError:  # of no numbers
            result = "not measured (no tensor is larger than the last-level cache)"
        lines.row([row.text, row.asked, number(value) + row.unit * (value is not None), result])
        outcome.append({"target": row.text, "asked": row.asked, "measured": value, "result": result})
    results = [row["result"].split(" (")[0] for row in outcome]
    counts = ", ".join(f"{results.count(name)} {name}" for name in ("met", "not met", "not measured", "shown"))
    print(f"\n{len(results)} rows: {counts}")
    return outcome


def _machine(threads: int, contestants: dict[str, Any]) -> dict[str, Any]:
    import fastbn

    with contextlib.redirect_stdout(io.StringIO()):
        machine = {"processor": _processor(), "threads": threads, **fastbn.show_config()}
    machine["versions"] |= {c.module: c.version for c in contestants.values() if c.module != "fastbn"}
    return machine


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
