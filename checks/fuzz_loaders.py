#!/usr/bin/env python3
"""Damage small valid model files in thousands of ways, and load, fold and save each: .npz, .safetensors, .onnx,
PyTorch's .pt and .pt2, Keras's .keras and .h5. Every file must work or raise ValueError or OSError that names it; the
command must end with 0, or with 2 and one line; nothing in a file is run, nothing else is written, memory and time are
bounded. Guided by coverage where atheris has a wheel for this Python. Each format has a process of its own: a crash has
a name.

    checks/fuzz_loaders.py [--quick | --seconds N] [--seed S] [--formats npz,onnx] [--here] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = "onnx,safetensors,torch,keras"
MODULES = {
    "npz": ["fastbn.interop.arrays"], "safetensors": ["fastbn.interop.arrays"], "onnx": ["fastbn.interop.onnx"],
    "pt": ["fastbn.interop.arrays", "fastbn.interop.torch"], "pt2": ["fastbn.interop.torch"],
    "keras": ["fastbn.interop.keras"], "h5": ["fastbn.interop.keras"], "nn": ["fastbn.nn"],
}  # fmt: skip
SUFFIXES = {"nn": "npz"}  # of formats that are not called by theirs
SHARES = {"npz": 4, "safetensors": 3, "onnx": 6, "pt": 3, "pt2": 2, "keras": 2, "h5": 2, "nn": 2}  # of the time
MEMORY, CPU, HANG = 1 << 30, 10.0, 90.0  # bytes and CPU seconds that one file may take; seconds until it is killed
QUICK, LONG = 60, 1200


# The parent: an environment, one process after another, what became of each ---------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_const", const=QUICK, dest="seconds", help=f"{QUICK} seconds")
    parser.add_argument("--seconds", type=int, help=f"default {LONG}")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--formats", default=",".join(SHARES))
    parser.add_argument("--here", action="store_true", help="use what this Python has; else a new environment is made")
    parser.add_argument("--keep", type=Path, help="where files that fail are kept (default: a new folder)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.seconds = options.seconds or LONG
    if options.child:
        return fuzz(options.child, options.seconds, options.seed, options.keep)
    if options.here:
        return run_all(options, sys.executable)
    with tempfile.TemporaryDirectory() as folder:
        return run_all(options, environment(Path(folder)))


def environment(folder: Path) -> str:
    """Make a virtual environment with fastbn, what it reads files with, and atheris if there is a wheel of it."""
    probe = subprocess.run([sys.executable, "-m", "venv", folder / "env"], capture_output=True, check=False)
    if probe.returncode or not shutil.which("gcc"):
        needed = ["gcc", "libc6-dev", "python3-dev", "python3-venv"]
        subprocess.run([ROOT / "checks" / "debian", *needed], check=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder / "env"], check=True)
    python = str(folder / "env" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*install, "torch==2.13.0", f"{ROOT}[{EXTRAS}]"], check=True)
    subprocess.run([*install, "--only-binary=:all:", "atheris"], check=False)
    return python


def run_all(options: argparse.Namespace, python: str) -> int:
    keep = options.keep or Path(tempfile.mkdtemp(prefix="fuzz-loaders-"))
    keep.mkdir(exist_ok=True, parents=True)
    formats = options.formats.split(",")
    total = sum(SHARES[name] for name in formats)
    results, started = {}, time.monotonic()
    for name in formats:
        results[name] = run_one(name, max(1, options.seconds * SHARES[name] // total), options.seed, keep, python)
        print(f"{name}: {dict(results[name])}", flush=True)
    files = ", ".join(f"{name} {result['files']}" for name, result in results.items())
    sums = sum(results.values(), Counter())
    guided = [name for name, result in results.items() if result["guided"]]
    how = "guided by coverage" if len(guided) == len(results) else "at random, atheris is not there"
    print(
        f"figures: loaders: {sums['files']} damaged files ({files}; {how}), {sums['clean']} clean errors, "
        f"{sums['loaded']} loaded, {sums['failures']} failures, {time.monotonic() - started:.0f} s, seed {options.seed}"
    )
    if sums["failures"]:
        print(f"what failed, and why: {keep}", file=sys.stderr)
    elif not options.keep:
        shutil.rmtree(keep)
    return 1 if sums["failures"] or not all(result["files"] for result in results.values()) else 0


def run_one(name: str, seconds: int, seed: int, keep: Path, python: str) -> Counter[str]:
    """Fuzz one format, in a new process after each that died; the last file is what it died of."""
    counts, end = Counter[str](), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and counts["crashes"] < 10:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder, "run")  # whose parent is looked at, too
            work.mkdir()
            process = subprocess.Popen(
                [python, __file__, f"--child={name}", f"--seconds={int(left) + 1}", f"--seed={seed}", f"--keep={keep}"],
                cwd=work, env=os.environ | {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "torch", "TMPDIR": str(work)},
                stdout=(work / "log").open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            last = time.monotonic()  # nothing has moved since
            while process.poll() is None:
                time.sleep(0.2)
                with contextlib.suppress(OSError):
                    age = time.time() - (work / "input").stat().st_mtime
                    last = max(last, time.monotonic() - age)
                if time.monotonic() - last > HANG:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            with contextlib.suppress(OSError, ValueError):
                counts.update(json.loads((work / "counts").read_text()))
            if not (work / "done").exists():
                counts.update(crashes=1, failures=1)
                seed += 1
                log = (work / "log").read_bytes()[-4000:].decode(errors="replace")
                content = (work / "input").read_bytes() if (work / "input").exists() else b""
                record(keep, name, content, f"the process ended with {process.returncode}\n{log}")
    return counts


def record(keep: Path, name: str, content: bytes, why: str) -> None:
    stem = f"{name}-{len(list(keep.glob('*.txt')))}"
    (keep / f"{stem}.{SUFFIXES.get(name, name)}").write_bytes(content)
    (keep / f"{stem}.txt").write_text(why)
    print(f"FAILED {stem}: {why.strip().splitlines()[-1][:300]}", flush=True)


# The child: one format ----------------------------------------------------------------------------------------------


def fuzz(name: str, seconds: int, seed: int, keep: Path) -> int:
    """Damage the seeds of one format until the time is up."""
    try:
        import atheris
    except ImportError:
        atheris = None
    warnings.simplefilter("ignore")
    faulthandler.enable()
    sys.path.insert(0, str(Path(__file__).parent))
    guided = ["fastbn", "zipfile", "numpy.lib._format_impl"]
    with atheris.instrument_imports(include=guided) if atheris is not None else contextlib.nullcontext():
        for module in MODULES[name]:  # first of all: what is imported already is not guided
            importlib.import_module(module)
    import fuzz_files

    work = Path.cwd()
    fuzz_files.within(work.parent)
    target = Target(name, work, keep)
    seeds = [target.prepare(content) for content in fuzz_files.SEEDS[name](work)]
    for content in seeds:  # all is imported and warm, and what is not damaged works
        target(content)
    if target.counts["loaded"] < len(seeds) or target.counts["failures"]:
        raise SystemExit(f"the undamaged files are not loaded: {dict(target.counts)}")
    target.begin(atheris is not None)
    mutate = fuzz_files.MUTATORS[name]
    if atheris is None:
        rng, end = random.Random(seed), time.monotonic() + seconds
        while time.monotonic() < end:
            target(mutate(rng.choice(seeds), rng))
    else:
        corpus = work / "corpus"
        corpus.mkdir()
        for index, content in enumerate(seeds):
            (corpus / str(index)).write_bytes(content)
        end = time.monotonic() + seconds

        def one(content: bytes) -> None:
            target(content)
            if time.monotonic() > end:
                target.end()

        def custom(content: bytes, most: int, number: int) -> bytes:
            rng = random.Random(number)
            return mutate(bytes(content) if rng.random() < 0.6 else rng.choice(seeds), rng)[:most]

        flags = [f"-seed={seed + 1}", "-max_len=1048576", "-rss_limit_mb=0", "-timeout=600", "-report_slow_units=600"]
        flags.append("-handle_segv=0")  # it is Python's faulthandler that tells where
        atheris.Setup(["fuzz_loaders", *flags, str(corpus)], one, custom_mutator=custom)
        atheris.Fuzz()
    target.end()
    return 0


class Target:
    """Load, fold and save a damaged file, and hold all of it to what is promised."""

    def __init__(self, name: str, work: Path, keep: Path) -> None:
        from fastbn import cli
        from fastbn.interop import files

        self.name, self.keep, self.work, self.cli = name, keep, work, cli
        self.counts: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.folder = work / "place"
        self.folder.mkdir()
        self.file = self.folder / f"in.{SUFFIXES.get(name, name)}"
        kind = f"interop.{files.FORMATS[self.file.suffix]}" if name != "nn" else "nn"
        self.front = importlib.import_module(f"fastbn.{kind}")
        self.out = self.folder / f"out{files.BECOMES.get(self.file.suffix, (self.file.suffix,))[0]}"
        self.least = 0

    def prepare(self, content: bytes) -> bytes:
        """Return a seed, which may have left a file of weights beside its place."""
        for beside in self.work.glob("*.bin"):
            beside.rename(self.folder / beside.name)
        return content

    def begin(self, guided: bool) -> None:
        self.counts = Counter(guided=guided)
        self.least = self.peak()
        self.before = self.listing()
        for path in (self.folder / "../../sprung", self.work / "sprung", *self.folder.glob("*.bin")):
            before = path.read_bytes() if path.exists() else None
            path.write_bytes(before or b"")
            if self.listing() == self.before:
                raise SystemExit(f"not noticed: {path} was written to")
            if before is None:
                path.unlink()
        self.before = self.listing()
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = space + 4 * MEMORY  # what goes beyond MEMORY is told; this keeps the machine alive
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def end(self) -> None:
        (self.work / "counts").write_text(json.dumps(self.counts))
        (self.work / "done").touch()
        os._exit(0)

    def __call__(self, content: bytes) -> None:
        (self.work / "input").write_bytes(content)
        self.file.write_bytes(content)
        started = time.process_time()
        failure = ""
        try:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                failure = self.library() or (self.command(out, err) if self.name != "nn" else "")
        except BaseException as error:  # Rust's panics are no Exceptions
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = traceback.format_exc()
        failure = failure or self.traces()
        if (spent := time.process_time() - started) > CPU:
            failure = failure or f"it took {spent:.0f} CPU seconds"
        if self.least and self.peak() - self.least > MEMORY:
            self.least = self.peak()
            failure = failure or f"memory grew by more than {MEMORY >> 20} MiB, to {self.least >> 20}"
        self.counts["files"] += 1
        if failure:
            self.counts["failures"] += 1
            place = [x for x in failure.splitlines() if x.startswith("  File")][-3:]
            if (mark := "".join(place) or failure[:60]) not in self.seen:
                self.seen.add(mark)
                record(self.keep, self.name, content, failure)
        if self.counts["files"] % 20 == 0 or failure:
            (self.work / "counts").write_text(json.dumps(self.counts))

    def library(self) -> str:
        """Load by the library; "" or what is wrong."""
        try:
            self.front.load(self.file)
        except (ValueError, OSError) as error:
            self.counts["clean"] += 1
            if "MemoryError" in chain(error):
                return f"more was asked for than there is: {error}"
            return "" if str(self.file) in str(error) else f"the message does not name the file: {error}"
        self.counts["loaded"] += 1
        return ""

    def command(self, out: io.StringIO, err: io.StringIO) -> str:
        report = self.folder / "report.json"
        code = self.cli.main(["fold", str(self.file), str(self.out), "--report", str(report)])
        said = out.getvalue() + err.getvalue()
        if code not in (0, 2):
            return f"the command ended with {code}: {said}"
        if any(not (char.isprintable() or char == "\n") for char in said):
            return f"what is printed has control characters: {said!r}"
        if code == 2:
            line = err.getvalue()
            fine = line.startswith("fastbn fold: ") and line.count("\n") == 1 and line.endswith("\n")
            return "" if fine else f"expected one line: {line!r}"
        self.counts["folded"] += 1
        json.loads(report.read_text())
        for path in (self.out, report, self.folder / f"{self.out.name}.data"):
            path.unlink(missing_ok=path not in (self.out, report))
        return ""

    def traces(self) -> str:
        """Say what is there now and was not before: something was written, or a trap in the file was sprung."""
        if not self.least or (now := self.listing()) == self.before:
            return ""
        changed = sorted({path for path, *_ in now ^ self.before})
        for path in map(Path, changed):  # a changed one is seen once
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.before = self.listing()
        return f"written besides, changed or gone: {changed}"

    def listing(self) -> set[tuple[str, int, int]]:
        """Return all files from the folder above on, but this check's own, with what shows that one was written to."""
        mine = {self.file, *(self.work / name for name in ("input", "counts", "log", "corpus"))}
        found = set()
        for folder, folders, names in os.walk(self.work.parent):
            folders[:] = [name for name in folders if Path(folder, name) not in mine]
            for path in (Path(folder, name) for name in (*folders, *names)):
                if path not in mine:
                    is_file = not path.is_dir()
                    status = path.lstat()
                    found.add((str(path), status.st_size * is_file, status.st_mtime_ns * is_file))
        return found

    @staticmethod
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def chain(error: BaseException | None) -> list[str]:
    names = []
    while error is not None:
        names.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return names


if __name__ == "__main__":
    sys.exit(main())
