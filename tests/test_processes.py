"""Other processes: forked ones work, with threads, whatever the parent was doing, and pools of them do.

Each scenario runs in a process of its own with a time limit, since what may go wrong is to hang.
"""

import os
import textwrap

import pytest
from interpreter import run_python

from fastbn._core import openmp

needs_openmp = pytest.mark.skipif(openmp.version() == 0, reason="built without OpenMP: one thread is all there is")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
needs_task_list = pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc to count threads"
)

# A module of its own, so that processes that do not inherit memory can import it.
TASK = """
    import hashlib, os, signal, sys, threading, time, warnings
    import numpy as np
    import fastbn

    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)  # Python says so itself from 3.12 on
    X = (np.arange(300 * 512, dtype=np.float32) % 97).reshape(300, 512)

    def work(n=None):
        y, saved = fastbn.batch_norm_train(X, num_threads=n)
        z = fastbn.batch_norm_infer(X, saved.mean, saved.var, num_threads=n)
        dx = fastbn.batch_norm_backward(y, saved, num_threads=n).dx
        m2 = fastbn.Moments.of(X, num_threads=n).m2
        params = [np.ones(100_000, np.float32)]
        opt = fastbn.optim.Adam(params)
        opt.step([np.full(100_000, 0.5, np.float32)], num_threads=n)
        return hashlib.sha256(b"".join(a.tobytes() for a in (y, z, dx, m2, *params))).hexdigest()

    def running():
        return len(os.listdir("/proc/self/task"))

    def threads_in_use():
        work(4)
        return running()

    def child(task):
        "Fork, run the task in the child; return what the child's exit says."
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)  # a child that hangs is killed
            os._exit(0 if task() else 3)
        return os.waitpid(pid, 0)[1]
"""


@pytest.fixture
def run(tmp_path):
    """Run code that finds `task` as a module, here and in the processes that it starts."""
    (tmp_path / "task.py").write_text(textwrap.dedent(TASK))

    def run(code, **environment):
        head = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom task import *\n"
        return run_python(head + textwrap.dedent(code), OMP_NUM_THREADS="4", **environment).stdout

    return run


# ---- forks -------------------------------------------------------------------------------------------------


@needs_fork
def test_a_forked_child_works_after_the_parent_used_threads(run):
    run("""
        expected = work(1)
        assert work(4) == expected
        fastbn.set_num_threads(4)
        for _ in range(3):
            assert child(lambda: work() == expected) == 0
            assert child(lambda: work(4) == expected) == 0
            assert work(4) == expected
        threads = fastbn.get_num_threads()
        assert child(lambda: fastbn.get_num_threads() == threads) == 0
        assert fastbn.get_num_threads() == threads
    """)


@needs_fork
@needs_openmp
@needs_task_list
@pytest.mark.parametrize("used", ["", "work(4)"], ids=["before any threads", "after threads"])
def test_a_forked_child_has_threads_of_its_own_and_the_parent_its_own_again(run, used):
    run(f"""
        {used}
        assert child(lambda: running() == 1 and threads_in_use() == 4) == 0
        assert threads_in_use() == 4
        assert child(lambda: threads_in_use() == 4) == 0
    """)


@needs_fork
def test_a_child_of_a_child_works(run):
    run("""
        expected = work(4)
        def generation(left):
            assert work(4) == expected
            assert left == 0 or child(lambda: generation(left - 1)) == 0
            return work(4) == expected
        assert generation(4)
    """)


@needs_fork
def test_a_fork_while_other_threads_are_inside_kernels(run):
    run("""
        expected = work(4)
        done = threading.Event()
        wrong = []
        def busy(n):
            while not done.is_set():
                wrong.extend([n] * (work(n) != expected))
        threads = [threading.Thread(target=busy, args=(n,)) for n in (1, 2, 3, 4)]
        for thread in threads: thread.start()
        for n in range(24):
            assert child(lambda: work(1 + n % 4) == expected) == 0
        done.set()
        for thread in threads: thread.join()
        assert not wrong
    """)


@needs_fork
def test_forks_from_other_threads_that_use_threads(run):
    run("""
        from concurrent.futures import ThreadPoolExecutor
        expected = work(4)
        def forking(n):
            return [work(n) == expected and child(lambda: work(4) == expected) for _ in range(8)]
        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(forking, (2, 3, 4))) == [[0] * 8] * 3
        assert work(4) == expected
    """)


@needs_fork
@pytest.mark.parametrize("first", ["torch", "fastbn"])
def test_a_fork_after_pytorch_used_threads(run, first):
    pytest.importorskip("torch")
    run(f"""
        if "{first}" == "fastbn":
            work(4)
        import torch
        torch.set_num_threads(4)
        big = torch.ones(2000, 2000)
        big.sum(); big @ big; big.add_(1)
        expected = work(4)
        for _ in range(3):
            assert child(lambda: work() == expected and work(4) == expected) == 0
        big.sum(); big.add_(1)
        assert work(4) == expected
    """)


@needs_fork
def test_a_child_and_its_parent_exit_as_any_process_does(run):
    """Not by os._exit: what runs at exit runs, and neither hangs; large results and their store are in use."""
    assert run("""
        import atexit
        x = np.ones((1 << 16, 160), np.float32)
        held = fastbn.batch_norm_infer(x, np.zeros(160), np.ones(160), num_threads=4)
        released = fastbn.batch_norm_infer(x, np.zeros(160), np.ones(160), num_threads=4)
        del released
        expected = work(4)
        atexit.register(lambda: work(4) == expected and print("out", flush=True))
        signal.alarm(60)
        if os.fork() == 0:
            assert work(4) == expected
            again = fastbn.batch_norm_infer(x, np.zeros(160), np.ones(160), num_threads=4)
            assert (again == held).all()
            sys.exit()
        assert os.wait()[1] == 0
    """) == "out\n" * 2  # fmt: skip


@needs_fork
def test_a_daemon_outlives_the_processes_that_started_it(run):
    assert run("""
        expected = work(4)
        reading, writing = os.pipe()
        if os.fork() == 0:
            os.setsid()
            middle = os.getpid()
            if os.fork() == 0:
                signal.alarm(30)
                while os.getppid() == middle:
                    time.sleep(0.01)
                os.write(writing, b"daemon: the same" if work(4) == expected else b"daemon: other bits")
                os._exit(0)
            os._exit(0)
        os.close(writing)
        os.wait()
        print(os.read(reading, 100).decode(), end="")
    """) == "daemon: the same"  # fmt: skip


@needs_fork
def test_processes_started_by_subprocess_and_by_posix_spawn(run):
    run("""
        import subprocess
        expected = work(4)
        code = "import sys; sys.path[:] = %r; from task import *; sys.exit(work(4) != %r)" % (sys.path, expected)
        for options in {}, {"preexec_fn": os.setsid}, {"preexec_fn": lambda: work(4)}, {"start_new_session": True}:
            assert subprocess.run([sys.executable, "-c", code], timeout=60, **options).returncode == 0
            assert work(4) == expected
        pid = os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
        assert os.waitpid(pid, 0)[1] == 0
    """)


@needs_fork
def test_many_forks_leave_the_parent_as_it_was(run):
    run("""
        assert child(lambda: True) == 0  # NumPy's BLAS ends its threads before a fork
        expected = work(4)
        before = running() if os.path.isdir("/proc/self/task") else 0
        for n in range(40):
            assert child(lambda: work(1 + n % 3) == expected) == 0
            if n % 8 == 0:
                assert work(4) == expected
        assert work(4) == expected
        for _ in range(100):  # threads that have ended are listed a while
            if not before or running() == before:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(f"{before} threads before, {running()} after")
    """)


# ---- pools of processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_pools_of_multiprocessing(run, method):
    run(f"""
        import multiprocessing
        if __name__ == "__main__" and "{method}" in multiprocessing.get_all_start_methods():
            expected = work(4)
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                assert pool.map_async(work, [None, 1, 2, 4] * 2).get(timeout=60) == [expected] * 8
            assert work(4) == expected
    """)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_process_pool_executors(run, method):
    """The executor's own threads run in the parent while it forks."""
    run(f"""
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        if __name__ == "__main__" and "{method}" in multiprocessing.get_all_start_methods():
            expected = work(4)
            with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("{method}")) as pool:
                assert list(pool.map(work, [None, 1, 2, 4] * 2, timeout=60)) == [expected] * 8
    """)


@pytest.mark.parametrize("backend", ["loky", "multiprocessing", "threading"])
def test_joblib(run, backend):
    pytest.importorskip("joblib")
    run(f"""
        import joblib
        expected = work(4)
        jobs = [joblib.delayed(work)(n) for n in (None, 1, 2, 4)] * 2
        assert joblib.Parallel(n_jobs=2, backend="{backend}", timeout=60)(jobs) == [expected] * 8
        assert work(4) == expected
    """)


@needs_fork
def test_layers_go_through_a_pool_and_back(run):
    run("""
        import multiprocessing
        bn = fastbn.BatchNorm(512)
        y = bn(X)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for there in pool.map_async(fastbn.BatchNorm.train, [bn] * 4).get(timeout=60):
                assert there.backward(y).tobytes() == bn.backward(y).tobytes()
                assert there(X).tobytes() == y.tobytes()
                assert there.num_batches_tracked == 2
            parts = pool.map_async(fastbn.Moments.of, np.array_split(X, 5)).get(timeout=60)
        total = fastbn.Moments(512)
        for part in parts:
            total.merge(part)
        assert total.count == 300 and np.allclose(total.mean, X.mean(0, np.float64))
        assert bn.num_batches_tracked == 1
    """)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_shared_memory_is_read_and_written_in_place(run, method, tmp_path):
    (tmp_path / "fill.py").write_text(textwrap.dedent("""
        from multiprocessing import shared_memory
        from task import *

        def fill(names):
            memories = [shared_memory.SharedMemory(name) for name in names]
            x, out = (np.ndarray(X.shape, X.dtype, memory.buf) for memory in memories)
            y = fastbn.batch_norm_train(x, out=out, num_threads=4)[0]
            same = y is out
            del x, out, y
            for memory in memories: memory.close()
            return same
    """))  # fmt: skip
    run(f"""
        import multiprocessing
        from fill import fill, shared_memory
        if __name__ == "__main__" and "{method}" in multiprocessing.get_all_start_methods():
            memories = [shared_memory.SharedMemory(create=True, size=X.nbytes) for _ in range(2)]
            x, out = (np.ndarray(X.shape, X.dtype, memory.buf) for memory in memories)
            x[...] = X
            with multiprocessing.get_context("{method}").Pool(1) as pool:
                assert pool.apply_async(fill, [[memory.name for memory in memories]]).get(timeout=60)
            assert out.tobytes() == fastbn.batch_norm_train(X)[0].tobytes()
            del x, out
            for memory in memories:
                memory.close()
                memory.unlink()
    """)
