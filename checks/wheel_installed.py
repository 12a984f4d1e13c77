"""What an installed fastbn does in fresh processes; for checks/wheel, in the environment where the wheel is installed.

    wheel_installed.py import                the time of `import fastbn` over NumPy's, and what it brings
    wheel_installed.py beside torch sklearn  those libraries' OpenMP runtimes and fastbn's own in one process
"""

import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

PROCESSES, SLOWEST = 25, 60.0  # how often the import is timed, each in its process; its milliseconds at most
HANG = 120  # seconds
# Python's own modules that cost time at every start; what else may be imported, tests/test_architecture.py holds
HEAVY = {"asyncio", "concurrent", "email", "http", "logging", "multiprocessing", "pydoc", "socket", "sqlite3", "ssl"}
HEAVY |= {"subprocess", "tkinter", "unittest", "xml"}

TIMED = """
import time
import numpy
before = time.process_time(), time.perf_counter()
import fastbn
print((time.process_time() - before[0]) * 1e3, (time.perf_counter() - before[1]) * 1e3)
"""
MODULES = "import sys, numpy; before = set(sys.modules); import fastbn; print(*(set(sys.modules) - before))"


def python(*arguments, **variables):
    run = subprocess.run(
        [sys.executable, *arguments], env=os.environ | variables,
        capture_output=True, text=True, timeout=HANG, check=False,
    )  # fmt: skip
    assert run.returncode == 0, f"exit code {run.returncode}\n{run.stdout}\n{run.stderr}"
    return run


def time_import():
    modules = set(python("-c", MODULES).stdout.split())
    heavy = {name for name in modules for root in HEAVY if name == root or name.startswith(root + ".")}
    assert not heavy, f"import fastbn brings {', '.join(sorted(heavy))}"
    report = python("-X", "importtime", "-c", "import numpy, fastbn").stderr.splitlines()
    rows = [[cell.strip() for cell in line.removeprefix("import time:").split("|")] for line in report]
    own = [(int(self_time), name) for self_time, _, name in rows[1:] if name in modules]
    for microseconds, name in sorted(own, reverse=True)[:5]:
        print(f"{microseconds / 1e3:6.1f} ms  {name}")
    # The processor's time decides: the clock's says as much about what else the machine does. But not the time in
    # which the threads that NumPy's OpenBLAS has started wait for work: twice as much, where cores are idle.
    runs = [map(float, python("-c", TIMED, OPENBLAS_NUM_THREADS="1").stdout.split()) for _ in range(PROCESSES)]
    cpu, clock = (statistics.median(times) for times in zip(*runs, strict=True))
    assert cpu < SLOWEST, f"import fastbn: expected less than {SLOWEST} ms over NumPy's import, got {cpu:.1f}"
    print(f"import {cpu:.1f} ms over NumPy's, {clock:.1f} by the clock (medians of {PROCESSES} processes)")


def use_fastbn():
    """Return the bytes of results that two threads share in."""
    import numpy as np

    import fastbn

    x = np.random.default_rng(0).standard_normal((64, 64, 28, 28), dtype=np.float32)
    y, saved = fastbn.batch_norm_train(x, activation="relu", num_threads=2)
    gradients = fastbn.batch_norm_backward(np.cos(x), saved, num_threads=2)
    return y.tobytes() + saved.var.tobytes() + gradients.dx.tobytes()


def use_torch():
    import torch

    torch.set_num_threads(2)
    x = torch.arange(1 << 20, dtype=torch.float32).reshape(16, 64, 32, 32).sin()
    return torch.nn.functional.batch_norm(x, None, None, training=True).numpy().tobytes()


def use_sklearn():
    import numpy as np
    from sklearn.cluster import KMeans

    x = np.random.default_rng(0).standard_normal((20000, 8))
    return KMeans(4, n_init=1, max_iter=10, random_state=0).fit(x).cluster_centers_.round(6).tobytes()


USES = {"torch": use_torch, "sklearn": use_sklearn}


def runtimes():
    """The OpenMP runtimes in this process's memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if "/" in line}
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}


def beside(libraries):
    alone = use_fastbn()
    own = runtimes()
    assert len(own) == 1, f"expected the bundled OpenMP runtime alone, got {own or 'none'}"
    assert "fastbn.libs" in own.pop(), "the OpenMP runtime of the system is in use, not the wheel's"
    others = {library: USES[library]() for library in libraries}
    for _ in range(20):
        assert use_fastbn() == alone, "other bits beside another OpenMP runtime"
        for library, before in others.items():
            assert USES[library]() == before, f"{library}: other bits beside fastbn"
    assert len(runtimes()) > 1, "expected a second OpenMP runtime in the process"

    child = os.fork()
    if child == 0:
        signal.alarm(HANG)  # a child that hangs is ended
        os._exit(0 if use_fastbn() == alone else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the forked child: expected 0, got {status} ({-signal.SIGALRM} is a hang)"
    assert use_fastbn() == alone, "other bits after a fork"
    names = ", ".join(sorted(Path(path).name for path in runtimes()))
    print(f"same bits in 20 rounds and in a forked child beside {' and '.join(libraries)}: {names}")


if __name__ == "__main__":
    if sys.argv[1] == "import":
        time_import()
    else:
        beside(sys.argv[2:])
