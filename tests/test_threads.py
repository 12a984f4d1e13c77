"""The number of threads: who decides it, what it may never change, and that other threads live."""

import math
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from interpreter import ROOT, run_python

import fastbn
from fastbn import threads
from fastbn._core import openmp

PARALLEL = openmp.version() > 0
needs_openmp = pytest.mark.skipif(not PARALLEL, reason="built without OpenMP: one thread is all there is")
needs_task_list = pytest.mark.skipif(
    not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc to count threads"
)


@pytest.fixture(autouse=True)
def untouched_settings(monkeypatch):
    """No choice of this process counts, nor does one that a test makes outlive it."""
    monkeypatch.setattr(threads, "_chosen", None)
    monkeypatch.setattr(threads, "_default", 4)


# ---- who decides -------------------------------------------------------------------------------------------


@needs_openmp
def test_the_choice_is_returned():
    assert fastbn.get_num_threads() == 4
    for n in (1, 7, np.int64(3)):
        fastbn.set_num_threads(n)
        assert fastbn.get_num_threads() == n
        assert type(fastbn.get_num_threads()) is int
    assert fastbn.set_num_threads(2) is None


@needs_openmp
def test_the_context_goes_before_the_choice_and_ends():
    fastbn.set_num_threads(5)
    with fastbn.num_threads(2):
        assert fastbn.get_num_threads() == 2
        fastbn.set_num_threads(6)
        assert fastbn.get_num_threads() == 2
    assert fastbn.get_num_threads() == 6


@needs_openmp
def test_contexts_nest():
    with fastbn.num_threads(3):
        with fastbn.num_threads(1):
            assert fastbn.get_num_threads() == 1
            with fastbn.num_threads(8):
                assert fastbn.get_num_threads() == 8
            assert fastbn.get_num_threads() == 1
        assert fastbn.get_num_threads() == 3
    assert fastbn.get_num_threads() == 4


@needs_openmp
def test_an_exception_ends_the_context_and_comes_out():
    with pytest.raises(KeyError, match="inside"), fastbn.num_threads(2):
        raise KeyError("inside")
    assert fastbn.get_num_threads() == 4


@needs_openmp
def test_the_context_decorates():
    assert fastbn.num_threads(2)(fastbn.get_num_threads)() == 2
    assert fastbn.get_num_threads() == 4


@needs_openmp
def test_other_python_threads_do_not_see_the_context():
    inside, done, seen = threading.Event(), threading.Event(), []

    def other():
        assert inside.wait(30)
        seen.append(fastbn.get_num_threads())
        with fastbn.num_threads(6):
            seen.append(fastbn.get_num_threads())
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with fastbn.num_threads(2):
        inside.set()
        assert done.wait(30)
        assert fastbn.get_num_threads() == 2
    thread.join()
    assert seen == [4, 6]


@needs_openmp
def test_other_python_threads_see_the_choice():
    fastbn.set_num_threads(3)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fastbn.get_num_threads).result() == 3


BAD_NUMBERS = [
    (0, ValueError),
    (-1, ValueError),
    (True, TypeError),
    (1.0, TypeError),
    ("2", TypeError),
    (None, TypeError),
    (math.nan, TypeError),
    ([2], TypeError),
]


@pytest.mark.parametrize(("n", "error"), BAD_NUMBERS)
def test_a_number_that_is_none_is_refused(n, error):
    before = fastbn.get_num_threads()
    with pytest.raises(error, match="^n: expected an integer of 1 or more, got "):
        fastbn.set_num_threads(n)
    with pytest.raises(error, match="^n: expected an integer of 1 or more, got "), fastbn.num_threads(n):
        pytest.fail("the context was entered")
    assert fastbn.get_num_threads() == before


X = np.arange(24, dtype=np.float32).reshape(6, 4)
CALLS = {
    "train": lambda n: fastbn.batch_norm_train(X, num_threads=n),
    "infer": lambda n: fastbn.batch_norm_infer(X, np.zeros(4), np.ones(4), num_threads=n),
    "backward": lambda n: fastbn.batch_norm_backward(X, fastbn.batch_norm_train(X)[1], num_threads=n),
    "moments": lambda n: fastbn.Moments.of(X, num_threads=n),
    "layer": lambda n: fastbn.BatchNorm(4)(X, num_threads=n),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("n", "error"), [bad for bad in BAD_NUMBERS if bad[0] is not None])
def test_a_call_refuses_such_a_number(call, n, error):
    with pytest.raises(error, match="^num_threads: expected an integer of 1 or more, got "):
        CALLS[call](n)


# ---- the budget --------------------------------------------------------------------------------------------

WORTH = threads.ELEMENTS_PER_THREAD


@needs_openmp
@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        (0, 1), (1, 1), (WORTH, 1), (2 * WORTH - 1, 1), (2 * WORTH, 2), (3 * WORTH - 1, 2), (3 * WORTH, 3),
        (4 * WORTH, 4), (5 * WORTH, 4), (1 << 40, 4),
    ],
)  # fmt: skip
def test_a_thread_is_used_where_it_pays(elements, expected):
    assert threads.budget(elements) == expected


@needs_openmp
def test_the_budget_is_within_context_and_choice():
    fastbn.set_num_threads(3)
    assert threads.budget(1 << 40) == 3
    with fastbn.num_threads(2):
        assert threads.budget(1 << 40) == 2
        assert threads.budget(1) == 1


@needs_openmp
def test_a_call_gets_what_it_asks_for():
    with fastbn.num_threads(1):
        assert threads.budget(1, 5) == 5
        assert threads.budget(1, 10**18) == threads.MOST


def test_without_openmp_there_is_one_thread(monkeypatch):
    monkeypatch.setattr(openmp, "version", lambda: 0)
    fastbn.set_num_threads(5)
    with fastbn.num_threads(3):
        assert fastbn.get_num_threads() == 1
        assert threads.budget(1 << 40) == 1
        assert threads.budget(1 << 40, 5) == 1
        with pytest.raises(ValueError, match="^num_threads: "):
            threads.budget(1 << 40, 0)


# ---- the environment ---------------------------------------------------------------------------------------


@needs_openmp
@pytest.mark.parametrize("n", [1, 3, 16])
def test_omp_num_threads_is_the_default(n):
    assert (
        run_python("import fastbn; print(fastbn.get_num_threads())", OMP_NUM_THREADS=str(n)).stdout
        == f"{n}\n"
    )


FEW_CPUS = """
    import os
    os.sched_getaffinity = lambda pid: set(range({cpus}))
    import fastbn
    print(fastbn.get_num_threads())
"""


@needs_openmp
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize(
    ("given", "expected"), [({}, 1), ({"OMP_NUM_THREADS": "3"}, 3)], ids=["unset", "set"]
)
def test_the_default_is_the_usable_cpus_unless_omp_num_threads_says_more(given, expected):
    assert run_python(FEW_CPUS.format(cpus=1), **given).stdout == f"{expected}\n"


@needs_openmp
def test_a_choice_may_exceed_omp_num_threads():
    code = "import fastbn; fastbn.set_num_threads(4); print(fastbn.get_num_threads())"
    assert run_python(code, OMP_NUM_THREADS="2").stdout == "4\n"


@needs_openmp
def test_limits_of_threadpoolctl_hold():
    pytest.importorskip("threadpoolctl")
    code = """
        import fastbn, threadpoolctl
        from fastbn import threads
        seen = [fastbn.get_num_threads()]
        assert any(pool["user_api"] == "openmp" for pool in threadpoolctl.threadpool_info())
        with threadpoolctl.threadpool_limits(limits=2, user_api="openmp"):
            seen += [fastbn.get_num_threads(), threads.budget(1 << 40)]
            fastbn.set_num_threads(3)
            seen += [fastbn.get_num_threads()]
            with fastbn.num_threads(1):
                seen += [fastbn.get_num_threads()]
        seen += [fastbn.get_num_threads()]
        print(seen)
    """
    assert run_python(code, OMP_NUM_THREADS="4").stdout == "[4, 2, 2, 2, 1, 3]\n"


# What fastbn starts is counted, not believed: threads of the process before and after a call.
COUNT_THREADS = """
    import os
    from contextlib import nullcontext
    import numpy as np
    import fastbn

    def running():
        return len(os.listdir("/proc/self/task"))

    x = np.ones((6 * {worth} // 64, 64), np.float32)
    saved = fastbn.batch_norm_train(x, num_threads=1)[1]
    calls = dict(
        train=lambda **n: fastbn.batch_norm_train(x, **n),
        infer=lambda **n: fastbn.batch_norm_infer(x, np.zeros(64), np.ones(64), **n),
        backward=lambda **n: fastbn.batch_norm_backward(x, saved, **n),
        moments=lambda **n: fastbn.Moments.of(x, **n),
        layer=lambda **n: fastbn.BatchNorm(64)(x, **n),
        layer_eval=lambda **n: fastbn.BatchNorm(64).eval()(x, **n),
    )
    call = calls["{call}"]
    before = running()
    {how}
    print(running() - before)
"""
KINDS = ["train", "infer", "backward", "moments", "layer", "layer_eval"]


def threads_started(call, how, **environment):
    return int(run_python(COUNT_THREADS.format(worth=WORTH, call=call, how=how), **environment).stdout)


@needs_openmp
@needs_task_list
@pytest.mark.parametrize("call", KINDS)
def test_a_call_runs_on_as_many_threads_as_chosen(call):
    assert threads_started(call, "fastbn.set_num_threads(4); call()") == 3


@needs_openmp
@needs_task_list
@pytest.mark.parametrize("call", KINDS)
def test_a_call_runs_on_as_many_threads_as_it_asks_for(call):
    assert threads_started(call, "fastbn.set_num_threads(1); call(num_threads=3)") == 2


@needs_openmp
@needs_task_list
def test_a_context_of_one_starts_no_thread():
    assert threads_started("train", "with fastbn.num_threads(1): call()", OMP_NUM_THREADS="4") == 0


@needs_openmp
@needs_task_list
def test_a_limit_of_threadpoolctl_starts_no_thread():
    pytest.importorskip("threadpoolctl")
    how = 'from threadpoolctl import threadpool_limits; threadpool_limits(1, "openmp"); call()'
    assert threads_started("train", how, OMP_NUM_THREADS="4") == 0


# ---- usable CPUs -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no CPU affinity")
@pytest.mark.parametrize(
    ("cpus", "quota", "expected"),
    [(8, math.inf, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.2, 1), (2, 5.0, 2), (1, math.inf, 1)],
)
def test_usable_cpus_are_within_affinity_and_quota(monkeypatch, cpus, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: quota)
    assert threads._usable_cpus() == expected


def test_usable_cpus_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(threads, "_cgroup_quota", lambda: math.inf)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads._usable_cpus() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads._usable_cpus() == 1


class ControlGroups:
    """A fake /sys/fs/cgroup and /proc/self/cgroup."""

    def __init__(self, folder):
        self.root, self.groups = folder / "cgroup", folder / "self"
        self.root.mkdir()

    def member_of(self, *lines):
        self.groups.write_text("".join(f"{line}\n" for line in lines))
        return self

    def v2(self, group, text):
        (self.root / group).mkdir(parents=True, exist_ok=True)
        (self.root / group / "cpu.max").write_text(f"{text}\n")
        return self

    def v1(self, group, quota, period):
        folder = self.root / "cpu" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (folder / "cpu.cfs_period_us").write_text(f"{period}\n")
        return self

    def quota(self):
        return threads._cgroup_quota(str(self.root), str(self.groups))


@pytest.fixture
def control_groups(tmp_path):
    return ControlGroups(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("150000 100000", 1.5), ("50000 100000", 0.5), ("max 100000", math.inf)]
)
def test_version_2_grants_quota_by_period(control_groups, text, expected):
    assert control_groups.member_of("0::/job").v2("job", text).quota() == expected


def test_version_2_takes_the_least_of_a_group_and_those_above(control_groups):
    control_groups.member_of("0::/a/b/c").v2("a/b/c", "max 100000").v2("a/b", "400000 100000").v2(
        "a", "300000 100000"
    )
    assert control_groups.quota() == 3
    assert control_groups.v2("a/b/c", "200000 100000").quota() == 2
    assert control_groups.v2("", "100000 100000").quota() == 1


def test_version_2_does_not_count_another_group(control_groups):
    assert (
        control_groups.member_of("0::/mine").v2("mine", "max 100000").v2("other", "1000 100000").quota()
        == math.inf
    )


def test_version_2_in_a_container_the_mounted_root_counts(control_groups):
    assert control_groups.member_of("0::/docker/not-mounted-here").v2("", "250000 100000").quota() == 2.5


@pytest.mark.parametrize(("quota", "expected"), [(150000, 1.5), (-1, math.inf), (0, math.inf)])
@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct", "cpuacct,cpu"])
def test_version_1_grants_quota_by_period(control_groups, controllers, quota, expected):
    control_groups.member_of("5:memory:/m", f"4:{controllers}:/job", "1:name=systemd:/s").v1(
        "job", quota, 100000
    )
    assert control_groups.quota() == expected


def test_version_1_reads_only_the_cpu_controller(control_groups):
    control_groups.member_of("4:cpuset,cpuacct:/job", "3:cpu:/free").v1("job", 1000, 100000).v1(
        "free", -1, 100000
    )
    assert control_groups.quota() == math.inf


def test_version_1_takes_the_least_of_a_group_and_those_above(control_groups):
    control_groups.member_of("4:cpu:/a/b").v1("a/b", 300000, 100000).v1("a", 100000, 50000).v1("", -1, 100000)
    assert control_groups.quota() == 2
    assert control_groups.v1("", 100000, 100000).quota() == 1


def test_the_mixed_hierarchy_counts_both(control_groups):
    control_groups.member_of("4:cpu:/a", "0::/b").v1("a", 300000, 100000).v2("b", "200000 100000")
    assert control_groups.quota() == 2


@pytest.mark.parametrize("text", ["", "100000", "x y", "100000 0", "1 2 3"])
def test_a_quota_not_understood_is_no_limit(control_groups, text):
    assert control_groups.member_of("0::/job").v2("job", text).quota() == math.inf


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert threads._cgroup_quota(str(tmp_path), str(tmp_path / "none")) == math.inf


def test_nothing_above_the_mount_is_read(control_groups):
    (control_groups.root.parent / "cpu.max").write_text("1000 100000\n")
    assert control_groups.member_of("0::/job").v2("job", "max 100000").quota() == math.inf


# ---- at the same time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(700, 301), (4, 6, 9001)], ids=["rc", "ncs"])
def test_python_threads_at_once_get_the_bits_of_one(shape):
    start = threading.Barrier(8)

    def work(seed):
        x, dy = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
        start.wait(30)
        results = []
        for n in (2, None, 3):
            y, saved = fastbn.batch_norm_train(x, num_threads=n)
            results += [y, saved.mean, saved.var, *fastbn.batch_norm_backward(dy, saved, num_threads=n)[:3]]
            results.append(fastbn.batch_norm_infer(x, saved.mean, saved.var, num_threads=n))
        return [result.tobytes() for result in results]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(8)))
    start = threading.Barrier(1)
    alone = [work(seed) for seed in range(8)]
    assert together == alone


def test_more_threads_than_the_machine_or_the_work_has():
    x = np.arange(60, dtype=np.float32).reshape(20, 3)
    expected = fastbn.batch_norm_train(x, num_threads=1)[0].tobytes()
    for n in (2, 3, 61):
        assert fastbn.batch_norm_train(x, num_threads=n)[0].tobytes() == expected


def test_an_absurd_number_of_threads_neither_crashes_nor_overflows():
    code = """
        import numpy as np
        import fastbn
        x = np.arange(60, dtype=np.float32).reshape(20, 3)
        expected = fastbn.batch_norm_train(x, num_threads=1)[0].tobytes()
        for n in (100_000, 2**31, 10**18):
            assert fastbn.batch_norm_train(x, num_threads=n)[0].tobytes() == expected
    """
    run_python(code)


# ---- a build without OpenMP --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")
@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang", "cl"))), reason="needs a C compiler")
def test_a_build_without_openmp_is_the_same_on_one_thread(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "fastbn", tmp_path / "fastbn", ignore=ignore)
    shutil.copytree(ROOT / "licenses", tmp_path / "licenses")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    build = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tmp_path, env=os.environ | {"FASTBN_OPENMP": "0"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert build.returncode == 0, build.stderr
    assert "without OpenMP" in build.stdout

    code = """
        import hashlib
        import numpy as np
        import fastbn
        from fastbn import threads
        x = (np.arange(300 * 512, dtype=np.float32) % 97).reshape(300, 512)
        y, saved = fastbn.batch_norm_train(x, num_threads=4)
        dx, dgamma, dbeta, _ = fastbn.batch_norm_backward(x, saved, num_threads=4)
        digest = hashlib.sha256(b"".join(a.tobytes() for a in (y, dx, dgamma, dbeta))).hexdigest()
        fastbn.set_num_threads(4)
        numbers = fastbn.get_num_threads(), threads.budget(1 << 40), fastbn._core.openmp.version()
        print(fastbn.__file__, digest, *numbers)
    """
    with_openmp = run_python(code).stdout.split()
    without = run_python(code, PYTHONPATH=str(tmp_path)).stdout.split()
    assert Path(without[0]).parents[1] == tmp_path
    assert without[1] == with_openmp[1]
    assert without[2:] == ["1", "1", "0"]
