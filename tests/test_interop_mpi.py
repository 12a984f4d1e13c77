"""fastbn.interop.mpi: laws of the exchange and of the layer between threads, and programs on real ranks.

Threads that pass messages stand in for ranks where Hypothesis draws cases; `mpiexec` runs mpi_programs/*.py.
"""

import functools
import json
import math
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import UNDER_TEST, run_python
from strategies import FLOAT32, FLOAT64, KINDS, numbers, parameters, shapes

import fastbn

pytest.importorskip("mpi4py", reason="mpi4py is not installed")
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    pytest.skip(f"no MPI library: {error}", allow_module_level=True)

from fastbn.interop import mpi_norm
from fastbn.interop.mpi_exchange import Group, RankError

PROGRAMS = Path(__file__).parent / "mpi_programs"
TIME_LIMIT = 120  # seconds until ranks count as hanging


# ---- threads for ranks --------------------------------------------------------------------------------------------


class Sent:
    """A request that is done."""

    def Wait(self):
        pass


class ThreadGroup(Group):
    """A rank whose messages go through queues to other threads."""

    def __init__(self, rank, size, mail):
        self.rank, self.size, self._mail = rank, size, mail

    def _post(self, message, rank):
        self._mail[self.rank, rank].put(message._replace(data=message.data.copy()))
        return Sent()

    def _receive(self, rank):
        return self._mail[rank, self.rank].get(timeout=20)


def on_ranks(size, function, kind=ThreadGroup):
    """Return what function(group) returned or raised on each of `size` ranks; no message is left over."""
    mail = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
    results = [None] * size

    def work(rank):
        try:
            results[rank] = function(kind(rank, size, mail))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(q.qsize() for q in mail.values()), "messages that nobody took"
    return results


def raise_first(results):
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


SIZES = st.integers(1, 9)


@given(SIZES, st.integers(0, 2**32 - 1))
def test_parts_are_combined_in_rank_order_and_every_rank_gets_the_result(size, seed):
    """A product of integer matrices, exact, tells the order; neighbours come before pairs of pairs, as documented."""
    matrices = np.random.default_rng(seed).integers(-9, 10, (size, 2, 2))

    def product(a, b):
        return (a.reshape(2, 2) @ b.reshape(2, 2)).reshape(4)

    results = raise_first(on_ranks(size, lambda g: g.reduce("product", matrices[g.rank].reshape(4), product)))
    expected = functools.reduce(np.matmul, matrices).reshape(4)
    for result in results:
        np.testing.assert_array_equal(result, expected)


@given(SIZES, st.integers(0, 100), st.sampled_from([np.float32, np.float64]), st.integers(0, 2**32 - 1))
def test_sums_have_the_same_bits_on_all_ranks(size, n, dtype, seed):
    parts = np.random.default_rng(seed).standard_cauchy((size, n)).astype(dtype)
    results = raise_first(on_ranks(size, lambda g: g.reduce("sum", parts[g.rank])))
    assert len({result.tobytes() for result in results}) == 1
    assert results[0].dtype == dtype
    bound = size * np.finfo(dtype).eps * np.abs(parts.astype(float)).sum(axis=0)
    assert (np.abs(results[0] - parts.astype(float).sum(axis=0)) <= bound).all()


@pytest.mark.parametrize("size", range(1, 18))
def test_the_number_of_messages_grows_with_the_logarithm(size):
    """One per round of doubling, and the result for a rank too many: what the cost model counts."""
    posted = [0] * size

    class Counting(ThreadGroup):
        def _post(self, message, rank):
            posted[self.rank] += 1
            return super()._post(message, rank)

    raise_first(on_ranks(size, lambda g: g.reduce("sum", np.ones(3)), Counting))
    assert max(posted) == math.floor(math.log2(size)) + (size & (size - 1) > 0)


@given(st.integers(2, 9), st.data())
def test_an_error_reaches_all_and_the_first_is_named(size, data):
    failing = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    length = data.draw(st.lists(st.sampled_from([3, 3, 3, 5]), min_size=size, max_size=size))

    def work(group):
        with group.guard():
            if group.rank in failing:
                raise OSError(f"of rank {group.rank}")
            return group.reduce("sum", np.zeros(length[group.rank]))

    def twice(group):
        errors = []
        for _ in range(2):  # the second time shows that nothing was left over
            with pytest.raises((OSError, RankError)) as info:
                work(group)
            errors.append(info.value)
        return errors

    for rank, errors in enumerate(raise_first(on_ranks(size, twice))):
        for error in errors:
            if rank in failing:
                assert str(error) == f"of rank {rank}"
            else:
                assert isinstance(error, RankError)
                first = min(failing)
                assert (error.rank, str(error)) == (first, f"rank {first}: OSError: of rank {first}")


@given(st.integers(2, 9), st.data())
def test_ranks_that_bring_different_things_all_learn_of_it(size, data):
    things = [("sum", 3, np.float64), ("sum", 4, np.float64), ("sum", 3, np.float32), ("other", 3, np.float64)]
    brought = [data.draw(st.sampled_from(things)) for _ in range(size)]

    def work(group):
        what, n, dtype = brought[group.rank]
        return group.reduce(what, np.ones(n, dtype))

    results = on_ranks(size, work)
    if len(set(brought)) == 1:
        assert all((result == size).all() for result in results)
        return
    for result in results:
        assert type(result) is ValueError
        assert str(result).startswith("ranks differ: rank ")
    assert len({str(result) for result in results}) == 1


# ---- the layer between threads ------------------------------------------------------------------------------------


@st.composite
def spread_batches(draw):
    """Draw a whole batch of any kind of numbers and how its first other axis is cut, empty parts among them."""
    shape, axis = draw(shapes(max_size=6000))
    rows_axis = 0 if axis % len(shape) else 1
    size = draw(st.integers(2, 5))
    cuts = sorted(draw(st.lists(st.integers(0, shape[rows_axis]), min_size=size - 1, max_size=size - 1)))
    mine = [[slice(None)] * len(shape) for _ in range(size)]
    for part, start, stop in zip(mine, [0, *cuts], [*cuts, shape[rows_axis]], strict=True):
        part[rows_axis] = slice(start, stop)
    dtype = draw(st.sampled_from([FLOAT32, FLOAT32, FLOAT64, np.dtype(np.float16)]))
    kinds = ["plain", "offset", "outliers", "ramp"] if dtype.itemsize == 2 else sorted(KINDS)
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 2**32 - 1))
    return shape, axis, [tuple(part) for part in mine], dtype, kind, seed


@given(spread_batches())
def test_merged_moments_are_those_of_the_whole_batch(case):
    shape, axis, mine, dtype, kind, seed = case
    x = numbers(np.random.default_rng(seed), kind, shape, axis, dtype)

    def work(group):
        part = mpi_norm.pack_moments(fastbn.Moments.of(x[mine[group.rank]], axis))
        return mpi_norm.unpack_moments(group.reduce("moments", part, mpi_norm.merge_moments))

    mean, var, _ = reference.moments(x, axis)
    whole = fastbn.Moments.of(x, axis)
    for moments in raise_first(on_ranks(len(mine), work)):
        assert moments.count == whole.count
        # float64 throughout: as far from the truth as rounding x - mean is, where the parts' means are large
        size = reference.over_channels(np.max, np.abs(reference.wide(x)), axis)
        reference.assert_within(moments.mean, mean, 64 * reference.U64 * size, "mean")
        bound = 64 * reference.U64 * (var + size * np.sqrt(var)) + (64 * reference.U64 * size) ** 2
        reference.assert_within(moments.var(), var, bound, "var")


@settings(max_examples=2 * settings.default.max_examples)
@given(spread_batches(), st.sampled_from([None, "relu"]), st.booleans())
def test_ranks_keep_the_bounds_of_the_whole_batch(case, activation, with_residual):
    """The bounds that fastbn promises for one process, for any cut of the batch."""
    shape, axis, mine, dtype, kind, seed = case
    rng = np.random.default_rng(seed)
    x, c = numbers(rng, kind, shape, axis, dtype), shape[axis]
    residual = rng.normal(size=shape).astype(dtype) if with_residual else None
    dy, gamma, beta = rng.normal(size=shape).astype(dtype), parameters(rng, c, FLOAT32), parameters(rng, c, FLOAT32)

    def work(group):
        bn, own = fastbn.BatchNorm(c, axis=axis, activation=activation), mine[group.rank]
        bn.gamma[...], bn.beta[...] = gamma, beta
        y, saved = mpi_norm.forward(bn, group, 1, x[own], None if residual is None else residual[own], None, 1)
        dx = mpi_norm.backward(bn, group, 1, saved, dy[own], None, 1)
        mpi_norm.move(bn, saved)
        return y, dx, bn.grad_residual, bn.grad_gamma, bn.grad_beta, bn.running_mean, bn.running_var

    results = raise_first(on_ranks(len(mine), work))
    y, dx, dresidual = (np.empty(shape, dtype) for _ in range(3))
    for own, result in zip(mine, results, strict=True):
        y[own], dx[own] = result[:2]
        if with_residual:
            dresidual[own] = result[2]
        assert [a.tobytes() for a in result[3:]] == [a.tobytes() for a in results[0][3:]]

    options = {"axis": axis, "activation": activation, "residual": residual}
    whole = reference.train(x, gamma, beta, **options)
    reference.assert_within(y, whole.y, reference.y_bound(whole, gamma, beta, dtype, axis, residual=residual), "y")
    passes = ~(y <= 0) if activation else True
    expected = reference.backward(dy, x, gamma, axis=axis, passes=passes)
    bound = reference.backward_bound(expected, whole, gamma, dtype, axis, np.float32)
    reference.assert_within(dx, expected.dx, bound.dx, "dx")
    reference.assert_within(results[0][3], expected.dgamma, bound.dgamma, "dgamma")
    reference.assert_within(results[0][4], expected.dbeta, bound.dbeta, "dbeta")
    if with_residual:
        assert reference.bits(dresidual) == reference.bits(np.where(passes, dy, np.zeros((), dtype)))


# ---- real ranks ---------------------------------------------------------------------------------------------------


def mpiexec():
    """Return the launcher of the MPI library in use, with its options: the one beside Python, else on the path."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("no mpiexec")
    # Open MPI refuses root and more ranks than cores; ranks that wait shall leave the core to others
    return [found, *(["--oversubscribe"] if "Open MPI" in MPI.Get_library_version() else [])]


OPEN_MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}


def launch(ranks, *arguments, time_limit=TIME_LIMIT):
    """Return (output, exit code or None after the time limit) of Python on so many ranks; none is left running."""
    path = os.pathsep.join(filter(None, (str(UNDER_TEST), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [*mpiexec(), "-n", str(ranks), sys.executable, *arguments],
        env=os.environ | OPEN_MPI | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=tempfile.gettempdir(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        return process.communicate(timeout=time_limit)[0], process.returncode
    except subprocess.TimeoutExpired:
        process.terminate()  # it ends its ranks, which are process groups of their own
        try:
            return process.communicate(timeout=10)[0], None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.communicate()[0], None


@functools.cache
def outcome(program, ranks):
    """Return {check: {rank: traceback}} of a program, or fail with what it has said."""
    output, code = launch(ranks, str(PROGRAMS / f"{program}.py"))
    lines = [line for line in output.splitlines() if line.startswith('{"check"')]
    done = {result["check"]: result["failures"] for result in map(json.loads, lines)}
    return done, f"exit code {code} (None: time limit) after {list(done)}:\n{output}"


def checks_of(program):
    """Return the names of a program's checks."""
    text = (PROGRAMS / f"{program}.py").read_text(encoding="utf-8")
    return [line[4 : line.index("(")] for line in text.splitlines() if line.startswith("def ") and "(comm):" in line]


CHECKS = [(program, check) for program in ("norm", "errors", "parallel") for check in checks_of(program)]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("program", "check"), CHECKS)
def test_on_ranks(program, check, ranks):
    done, said = outcome(program, ranks)
    assert check in done, f"{check} did not end: {said}"
    assert not done[check], "\n".join(f"rank {rank}: {text}" for rank, text in done[check].items())


@pytest.mark.parametrize("program", ["norm", "errors", "parallel"])
def test_programs_end_well(program):
    assert "exit code 0 " in outcome(program, 2)[1]


@pytest.mark.parametrize("runner", [[], ["-m", "mpi4py"]], ids=["python", "mpi4py"])
def test_an_error_outside_of_together_ends_all(tmp_path, runner):
    script = tmp_path / "script.py"
    script.write_text(
        "from mpi4py import MPI\n"
        "from fastbn.interop.mpi import SyncBatchNorm\n"
        "import numpy as np\n"
        "bn = SyncBatchNorm(MPI.COMM_WORLD, 2)\n"
        "if MPI.COMM_WORLD.rank == 1:\n"
        "    raise OSError('no data')\n"
        "bn(np.ones((2, 2)))\n"
    )
    output, code = launch(2, *runner, str(script), time_limit=30)
    assert code not in (0, None), output
    assert "no data" in output


def test_ranks_that_hang_are_ended(tmp_path):
    """So a hang is a failure of these tests and not their end: nobody is left at the file afterwards."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from mpi4py import MPI\n"
        "name = f'{sys.argv[1]}/{MPI.COMM_WORLD.rank}'\n"
        "while True:\n"
        "    open(name, 'w').write('here')\n"
        "    time.sleep(0.1)\n"
    )
    _, code = launch(2, str(script), str(tmp_path), time_limit=5)
    assert code is None
    time.sleep(1)
    for rank in range(2):
        (tmp_path / str(rank)).unlink(missing_ok=True)
    time.sleep(1)
    assert not list(tmp_path.glob("[01]"))


def test_one_process_needs_no_mpiexec():
    run_python("""
        import numpy as np, fastbn
        from mpi4py import MPI
        from fastbn.interop.mpi import SyncBatchNorm
        x = np.random.default_rng(0).normal(size=(9, 4, 5)).astype(np.float32)
        layers = SyncBatchNorm(MPI.COMM_WORLD, 4, activation="relu"), fastbn.BatchNorm(4, activation="relu")
        y, expected = (layer(x) for layer in layers)
        assert y.tobytes() == expected.tobytes()
        dx, expected = (layer.backward(x) for layer in layers)
        assert dx.tobytes() == expected.tobytes()
    """)


def test_a_missing_mpi4py_is_named():
    process = run_python("""
        import sys
        sys.modules["mpi4py"] = None
        try:
            import fastbn.interop.mpi
        except ModuleNotFoundError as error:
            print(error)
    """)
    assert process.stdout.strip() == 'fastbn.interop.mpi needs mpi4py: pip install "fastbn[mpi]"'


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [b for page in PAGES for b in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)]


@pytest.mark.parametrize("block", [block for block in BLOCKS if "mpi4py" in block])
def test_the_code_of_the_documents_runs(block, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(block)
    output, code = launch(2, "-m", "mpi4py", str(script))
    assert code == 0, output
