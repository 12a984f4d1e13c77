"""`python -m bench`: time fastbn and its installed peers on one table of cases."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

_ARGUMENTS = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
_ARGUMENTS.add_argument("what", nargs="*", help="norm, optim (default: both), or threads alone")
_ARGUMENTS.add_argument("--dtype", default="float32", help="of the norm cases (default %(default)s)")
_ARGUMENTS.add_argument("--threads", type=int, default=2, help="of every library (default %(default)s)")
_ARGUMENTS.add_argument("--isa", help="instruction set of fastbn, as FASTBN_ISA")
_ARGUMENTS.add_argument("--shapes", default="resnet50,rows", help="comma-separated: resnet50, largest, rows, quick")
_ARGUMENTS.add_argument("--peers", default="numpy,torch", help="comma-separated, or none (default %(default)s)")
_ARGUMENTS.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default %(default)s)")
_ARGUMENTS.add_argument("--quick", action="store_true", help="two shapes, three rounds")
_ARGUMENTS.add_argument("--json", metavar="FILE", help="write all results there")


def main(arguments: list[str] | None = None) -> int:
    options = _ARGUMENTS.parse_args(arguments)
    if options.isa:
        os.environ["FASTBN_ISA"] = options.isa  # before fastbn is imported
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if not any(Path("fastbn", "_core").glob("_kernels_*")):  # not built in place: the installed one is meant
        sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path.cwd()]
    import fastbn

    from . import cases, peers
    from .timing import interleaved

    if options.what == ["threads"]:
        from .threads import main as threads

        threads(options.threads, options.rounds)
        return 0
    unknown = set(options.what) - {"norm", "optim"}
    if unknown:
        _ARGUMENTS.error(f"what: expected norm, optim, or threads alone, got {', '.join(sorted(unknown))}")
    what = options.what or ["norm", "optim"]
    names = ["quick"] if options.quick else options.shapes.split(",")
    if set(names) - set(cases.SHAPES):
        _ARGUMENTS.error(f"--shapes: expected some of {', '.join(cases.SHAPES)}, got {options.shapes}")
    table: list[Any] = []
    if "norm" in what:
        table += cases.norm_cases([shape for name in names for shape in cases.SHAPES[name]], options.dtype)
    if "optim" in what:
        table += cases.optim_cases(quick=options.quick)

    contestants: list[Any] = [peers.Copy(options.threads), peers.FastBN(options.threads)]
    for name in options.peers.split(",") if options.peers != "none" else []:
        if name not in peers.PEERS:
            _ARGUMENTS.error(f"--peers: expected some of {', '.join(peers.PEERS)}, got {name}")
        try:
            contestants.append(peers.PEERS[name](options.threads))
        except ModuleNotFoundError:
            print(f"skipped {name}: not installed ({peers.PEERS[name].install})", file=sys.stderr)

    machine = {"processor": _processor(), "threads": options.threads, **fastbn.show_config()}
    machine["versions"] |= {c.name: sys.modules[c.module].__version__ for c in contestants if c.module in sys.modules}
    print(f"processor: {machine['processor']}; times are the least of {options.rounds} interleaved rounds\n")
    others = [c.name for c in contestants[2:]]
    print(f"{'case':52}{'ms':>9}{'GB/s':>7}{'× copy':>8}" + "".join(f"{'× ' + n:>9}" for n in others))
    results = []
    for number, case in enumerate(table, 1):
        print(f"{number}/{len(table)} {case.name}", end="\r", file=sys.stderr, flush=True)
        kind = "norm" if isinstance(case, cases.NormCase) else "optim"
        calls = {c.name: call for c in contestants if (call := getattr(c, kind)(case)) is not None}
        times = interleaved(calls, rounds=3 if options.quick else options.rounds)
        own = times["fastbn"].minimum
        ratios = "".join(f"{times[n].minimum / own:9.2f}" if n in times else f"{'–':>9}" for n in others)
        rate = case.bytes / own / 1e9
        print(f"{case.name:52}{own * 1e3:9.3f}{rate:7.1f}{own / times['copy'].minimum:8.2f}{ratios}", flush=True)
        results.append({"case": case.name, "bytes": case.bytes, "seconds": {n: t._asdict() for n, t in times.items()}})
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)
    return 0


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
