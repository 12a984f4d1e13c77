#!/usr/bin/env python3
"""Hours of mixed calls in one process: every result held to the oracle, memory flat.

Calls of everything public, with arguments good and bad, small and large; from several Python threads at once; in forked
children; with other numbers of threads and other instruction sets, which must give the same bits. Installs fastbn in a
virtual environment of its own, or with --here uses what this Python has. A failure prints what repeats it.

    checks/soak.py [--minutes 60 | --quick] [--seed N] [--call N] [--here]
"""

import argparse
import ctypes
import gc
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from array import array
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT = 16, 0.05  # bytes and blocks of Python's that a call may leave: less than one of 64 bytes in every fourth does
JUDGED = 20  # minutes from which on that can be told from caches that fill
M_TRIM_THRESHOLD = -1  # of malloc.h
THREADS = 4  # Python threads that call at once
CHILD_LIMIT = 60  # seconds until a forked child counts as hanging
SAME_BITS = (
    "batch_norm_train", "batch_norm_infer", "batch_norm_backward", "moments_of", "layer_call", "optimizer_step"
)  # fmt: skip


def asked_for():
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60, help="default 60")
    parser.add_argument("--quick", action="store_true", help="one minute")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    parser.add_argument("--call", type=int, help="repeat the call of this number only")
    parser.add_argument("--here", action="store_true", help="use this Python's fastbn, else one is installed apart")
    return parser.parse_args()


def main(options):
    """Call for as long as is asked; return the exit code."""
    warnings.simplefilter("error")  # in all threads: a warning is a failure
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # or glibc keeps up to 64 MiB at the end of each thread's arena
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 17)
    soak = Soak(options.seed)
    if options.call is not None:
        soak.one(options.call)
        return 0
    return soak.run(1 if options.quick else options.minutes)


def in_an_environment_of_its_own(arguments):
    """Install fastbn from this checkout in a new virtual environment and run there."""
    if not all(importlib.util.find_spec(module) for module in ("ensurepip", "venv")):
        needed = ["gcc", "libc6-dev", "python3-dev", "python3-venv"]
        subprocess.run([ROOT / "checks" / "debian", *needed], check=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run([python, "-m", "pip", "install", "-q", f"{ROOT}[test]"], check=True)
        return subprocess.run([python, __file__, "--here", *arguments], cwd=folder, check=False).returncode


def sizes():
    """Return, once what nothing uses is given back: resident MiB, MiB given out by the C library, Python's blocks."""
    fastbn.release_buffers()
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc: of the arenas of threads that have ended, too
        libc.malloc_trim(0)
    return memory.resident() / 2**20, memory.given_out() / 2**20, sys.getallocatedblocks()


def told(resident, given_out, blocks):
    return f"{resident:.0f} MiB resident, {given_out:.1f} MiB given out, {blocks:.0f} blocks"


class Soak:
    """Calls numbered from 0: number and seed decide everything about a call."""

    def __init__(self, seed):
        self.seed, self.number, self.calls, self.asked, self.refused, self.children = seed, 0, 0, 0, 0, 0
        self.lock = threading.Lock()
        self.failure = None
        self.optimizer = operations_models.some_optimizer(np.random.default_rng(seed), 3000)

    def run(self, minutes):
        """Call for so long; return the exit code."""
        start = said = time.monotonic()
        seen = [array("d") for _ in range(4)]  # calls, sizes: tuples would be blocks of Python's themselves
        while time.monotonic() < start + 60 * minutes and self.failure is None:
            self.try_out(self.several, self.take(200))
            self.at_once()
            self.forked()
            self.try_out(self.same_bits, *self.take(1))
            self.try_out(self.one_more_step, *self.take(1))
            if len(seen[0]) % 40 == 20:
                self.try_out(self.large, *self.take(1))
            now = sizes()
            for column, number in zip(seen, (self.calls, *now), strict=True):
                column.append(number)
            if time.monotonic() - said >= 60:
                said = time.monotonic()
                print(f"{(said - start) / 60:.0f} min: {self.calls} calls, {told(*now)}", flush=True)
        if self.failure is not None:
            print(f"{self.failure}\nsoak: failed with --seed {self.seed}")
            return 1
        calls, *kinds = (column[len(column) // 3 :] for column in seen)  # caches and large arrays have had their time
        resident, given_out, blocks = (statistics.linear_regression(calls, kind).slope for kind in kinds)
        left = 2**20 * max(resident, given_out)
        first = told(*(kind[0] for kind in kinds))
        print(
            f"figures: soak: {self.calls} calls ({self.refused} refused, {self.children} forked children), "
            f"{(time.monotonic() - start) / 60:.1f} minutes, {self.asked} checked against the oracle; a call left "
            f"{left:.1f} bytes and {blocks:.4f} blocks; memory from {first} to {told(*now)} "
            f"(seed {self.seed})"
        )
        if minutes < JUDGED:
            print(f"memory is not judged in less than {JUDGED} minutes; tests/test_leaks.py does that")
            return 0
        return 0 if left < LEFT[0] and blocks < LEFT[1] else 1

    def take(self, count):
        """Return the numbers of the next calls."""
        self.number += count
        return range(self.number - count, self.number)

    def try_out(self, function, *arguments):
        """Run a part; keep the first failure of any thread."""
        try:
            function(*arguments)
        except BaseException as error:
            with self.lock:
                self.failure = self.failure or f"{function.__name__}: {traceback.format_exc()}"
            if not isinstance(error, Exception):
                raise

    def several(self, numbers, apart=()):
        """Make the calls of these numbers, one after another."""
        for number in numbers:
            self.one(number, apart)

    def one(self, number, apart=()):
        """Make the call of this number, good or spoilt, and hold it to its promises."""
        rng = np.random.default_rng([self.seed, number])
        name = list(OPERATIONS)[rng.integers(len(OPERATIONS))]
        if name in apart:
            return
        call = OPERATIONS[name](rng, int(rng.choice([60, 600, 600, 40_000, 400_000], p=[0.3, 0.4, 0.2, 0.09, 0.01])))
        changes = []
        for argument in rng.permutation(list(call.args))[: rng.integers(1, 3) if rng.random() < 0.4 else 0].tolist():
            changes.append((argument, [*ODD, *ALIASES][rng.integers(len(ODD) + len(ALIASES))]))
            call.args[argument] = odd(changes[-1][1], rng, call.args[argument], call.near)
        try:
            asked, refusal = attempt(call, by_position=rng.random() < 0.5)
            assert refusal is None or changes, f"refused: {refusal!r}"
        except BaseException:
            print(f"call {number}: {name}, {changes}; to repeat: --here --seed {self.seed} --call {number}", flush=True)
            raise
        with self.lock:
            self.calls += 1
            self.asked += asked
            self.refused += refusal is not None

    def at_once(self):
        """Make calls from several Python threads at once; without those that change the whole process."""
        apart = ("threads_set", "questions")
        threads = [
            threading.Thread(target=self.try_out, args=(self.several, self.take(30), apart)) for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def forked(self):
        """Let a child make calls: it must come to its end."""
        numbers = self.take(10)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 says that a process with threads should not fork
            child = os.fork()
        if child == 0:
            signal.alarm(CHILD_LIMIT)  # a child that hangs is killed
            self.try_out(self.several, numbers)
            if self.failure:
                print(self.failure, flush=True)
            os._exit(self.failure is not None)
        self.children += 1
        status = os.waitpid(child, 0)[1]
        if status:
            self.failure = self.failure or f"a forked child ended with status {status} (calls from {numbers[0]})"

    def same_bits(self, number):
        """Hold a call to the same bits with other numbers of threads and every instruction set."""
        name = SAME_BITS[number % len(SAME_BITS)]
        results = set()
        for isa in dispatch.available():
            norm.kernels, optim.optim_kernels = (dispatch.load(source, isa) for source in ("kernels", "optim_kernels"))
            for threads in (1, 2, 3):
                call = OPERATIONS[name](np.random.default_rng([self.seed, number]), 40_000)
                call.args["num_threads"] = threads
                result = call()
                left = call.state if isinstance(call.state, tuple) else (call.state,)
                left = [part.state_dict() if hasattr(part, "state_dict") else part for part in left]
                results.add(repr([picture(result), picture(left)]))
        norm.kernels, optim.optim_kernels = dispatch.kernels, dispatch.optim_kernels
        assert len(results) == 1, f"{name}, number {number}: other bits with other threads or instruction sets"

    def one_more_step(self, number):
        """Let one optimizer live as long as the soak, beside the reference."""
        opt, params, follows = self.optimizer
        rng = np.random.default_rng([self.seed, number])
        grads = operations_models.some_arrays(rng, [p.shape for p in params], params[0].dtype)
        opt.step(grads)
        follows.step(grads)
        operations_models.hold_optimizer(opt, follows)
        if follows.steps > 500:
            self.optimizer = operations_models.some_optimizer(rng, 3000)

    def large(self, number):
        """Hold a pass over arrays beyond the caches to the bits of one thread; the oracle would take minutes."""
        x = np.random.default_rng([self.seed, number]).standard_normal((42, 64, 56, 56), np.float32)  # 32 MiB
        y, saved = fastbn.batch_norm_train(x, activation="relu")
        alone, saved_alone = fastbn.batch_norm_train(x, activation="relu", num_threads=1)
        assert np.array_equal(y, alone)
        gradients = [fastbn.batch_norm_backward(y, s, num_threads=n) for s, n in ((saved, None), (saved_alone, 1))]
        assert all(np.array_equal(a, b) for a, b in zip(gradients[0][:3], gradients[1][:3], strict=True))


if __name__ == "__main__":
    options = asked_for()
    if not options.here:
        sys.exit(in_an_environment_of_its_own(sys.argv[1:]))
    sys.path[:0] = [str(ROOT / "tests")]
    import memory
    import numpy as np
    import operations_models
    from calls import attempt, picture
    from odd_values import ALIASES, ODD, odd
    from operations_models import OPERATIONS

    import fastbn
    from fastbn import norm, optim
    from fastbn._core import dispatch

    sys.exit(main(options))
