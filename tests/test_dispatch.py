"""Instruction sets: which are built, which one is chosen, and that the choice never shows in a result."""

import importlib
import importlib.util
import platform
from pathlib import Path

import numpy as np
import pytest
from interpreter import run_python

import fastbn
from fastbn._core import caches, cpu, dispatch, openmp

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
EXPECTED_SETS = ["v2", "v3", "v4"] if IS_X86 else ["baseline"]
CPUINFO = Path("/proc/cpuinfo")

# The psABI's levels, in the names of Linux's /proc/cpuinfo: pni is SSE3, abm is LZCNT
LEVELS = {
    2: "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3",
    3: "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave",
    4: "avx512bw avx512cd avx512dq avx512f avx512vl",
}

# One digest of every kernel: layouts ncs and rc, whole lanes and tails, one block and many, every dtype.
DIGEST = """
    import hashlib
    import ml_dtypes
    import numpy as np
    import fastbn
    from fastbn._core import dispatch

    def data(shape, dtype, seed):
        return np.random.default_rng(seed).normal(3, 2, shape).astype(dtype)

    digest = hashlib.sha256()
    cases = [((5, 37), 1), ((700, 300), 1), ((3, 4, 25), 1), ((2, 3, 20011), 1), ((9, 13, 7), -1)]
    for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
        for shape, axis in cases:
            x, dy, residual = (data(shape, dtype, seed) for seed in range(3))
            gamma, beta = data((2, shape[axis]), np.float32, 3)
            for given in ({}, {"activation": "relu"}, {"activation": "relu", "residual": residual}):
                y, saved = fastbn.batch_norm_train(x, gamma, beta, axis=axis, **given)
                gradients = fastbn.batch_norm_backward(dy, saved)
                z = fastbn.batch_norm_infer(x, saved.mean, saved.var, gamma, beta, axis=axis, **given)
                moments = fastbn.Moments.of(x, axis)
                results = (y, z, saved.mean, saved.var, saved.rstd, *gradients[:3], moments.mean, moments.m2)
                for result in results:
                    digest.update(np.ascontiguousarray(result).tobytes())
    print(dispatch.isa, dispatch.kernels.__name__, digest.hexdigest())
"""


# ---- what is built -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", EXPECTED_SETS)
def test_every_source_is_built_for_every_expected_set(isa):
    core = Path(dispatch.__file__).parent
    sources = sorted(path.stem for path in core.glob("*kernels.pyx")) or ["kernels"]
    for source in sources:
        assert importlib.util.find_spec(f"fastbn._core._{source}_{isa}") is not None, source


def test_no_set_but_the_expected_ones_is_built():
    core = Path(dispatch.__file__).parent
    built = {path.name.split(".")[0] for path in core.glob("_kernels_*") if path.suffix in (".so", ".pyd")}
    assert built == {f"_kernels_{isa}" for isa in EXPECTED_SETS}


def test_available_are_the_built_sets_that_the_cpu_runs_the_fastest_last():
    runs = [isa for isa in EXPECTED_SETS if isa == "baseline" or int(isa[1:]) <= cpu.x86_level()]
    assert dispatch.available() == runs


# ---- the level of the CPU ----------------------------------------------------------------------------------


@pytest.mark.skipif(not IS_X86 or not CPUINFO.exists(), reason="needs an x86 CPU and Linux's /proc/cpuinfo")
def test_level_is_the_one_that_the_flags_of_the_cpu_give():
    line = next(line for line in CPUINFO.read_text().splitlines() if line.startswith("flags"))
    flags = set(line.split(":", 1)[1].split())
    level = 1
    for candidate, needed in LEVELS.items():
        if level == candidate - 1 and flags.issuperset(needed.split()):
            level = candidate
    assert cpu.x86_level() == level


@pytest.mark.skipif(IS_X86, reason="for other architectures")
def test_level_of_another_architecture_is_0():
    assert cpu.x86_level() == 0


# ---- the choice --------------------------------------------------------------------------------------------


def test_every_set_gives_the_same_bytes():
    pytest.importorskip("ml_dtypes")
    digests = {}
    for isa in dispatch.available():
        chosen, module, digests[isa] = run_python(DIGEST, FASTBN_ISA=isa).stdout.split()
        assert (chosen, module) == (isa, f"fastbn._core._kernels_{isa}")
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("unset", [{}, {"FASTBN_ISA": ""}], ids=["absent", "empty"])
def test_without_the_variable_the_fastest_set_is_chosen(unset):
    code = "from fastbn._core import dispatch; print(dispatch.isa, dispatch.kernels.__name__)"
    fastest = dispatch.available()[-1]
    assert run_python(code, **unset).stdout.split() == [fastest, f"fastbn._core._kernels_{fastest}"]


@pytest.mark.parametrize("name", ["v9", "V2", "avx512", "v2,v3", " "])
def test_an_unknown_set_is_an_import_error_that_lists_what_there_is(name):
    process = run_python("import fastbn", check=False, FASTBN_ISA=name)
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FASTBN_ISA: expected one of " + ", ".join(dispatch.available()))
    assert last.endswith(f"got {name!r}")


@pytest.mark.skipif(not IS_X86, reason="only x86 has levels")
@pytest.mark.parametrize("level", [2, 3])
def test_a_set_that_the_cpu_does_not_run_is_an_import_error(monkeypatch, level):
    monkeypatch.setattr(cpu, "x86_level", lambda: level)
    monkeypatch.setenv("FASTBN_ISA", f"v{level + 1}")
    usable = [f"v{n}" for n in range(2, level + 1)]
    assert dispatch.available() == usable
    with pytest.raises(
        ImportError, match=rf"^FASTBN_ISA: expected one of {', '.join(usable)} .*got 'v{level + 1}'$"
    ):
        dispatch._choose()
    monkeypatch.delenv("FASTBN_ISA")
    assert dispatch._choose() == f"v{level}"


@pytest.mark.skipif(not IS_X86, reason="elsewhere the baseline always runs")
@pytest.mark.parametrize("level", [0, 1])
def test_a_cpu_below_every_built_set_is_an_import_error(monkeypatch, level):
    monkeypatch.setattr(cpu, "x86_level", lambda: level)
    monkeypatch.delenv("FASTBN_ISA", raising=False)
    with pytest.raises(ImportError, match="^fastbn: no compiled kernels for this CPU.*x86-64-v2"):
        dispatch._choose()


def test_a_set_that_was_not_built_is_not_available(monkeypatch):
    missing = f"fastbn._core._kernels_{EXPECTED_SETS[0]}"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    assert EXPECTED_SETS[0] not in dispatch.available()


def test_load_gives_the_module_of_a_set():
    for isa in dispatch.available():
        assert dispatch.load("kernels", isa) is importlib.import_module(f"fastbn._core._kernels_{isa}")


# ---- show_config -------------------------------------------------------------------------------------------


def test_show_config_returns_what_is(capsys):
    config = fastbn.show_config()
    assert config == {
        "instruction_set": dispatch.isa,
        "instruction_sets_available": dispatch.available(),
        "threads": fastbn.get_num_threads(),
        "openmp": openmp.version() or False,
        "caches": {"L1": caches.L1, "L2": caches.L2, "L3": caches.L3},
        "versions": {
            "fastbn": fastbn.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
    assert capsys.readouterr().out


def test_show_config_prints_one_line_per_entry(capsys, monkeypatch):
    for name, size in (("L1", 48 << 10), ("L2", 1 << 20), ("L3", 96 << 20)):
        monkeypatch.setattr(caches, name, size)
    with fastbn.num_threads(3):
        fastbn.show_config()
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    shown = {key: value.strip() for key, value in lines.items()}
    versions = {"fastbn": fastbn.__version__, "numpy": np.__version__, "python": platform.python_version()}
    assert shown == {
        "instruction set": dispatch.isa,
        "instruction sets available": ", ".join(dispatch.available()),
        "threads": "3" if openmp.version() else "1",
        "openmp": str(openmp.version() or "no: every call uses one thread"),
        "caches": "L1 48 KiB, L2 1 MiB, L3 96 MiB",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def test_show_config_says_so_without_openmp(capsys, monkeypatch):
    monkeypatch.setattr(openmp, "version", lambda: 0)
    config = fastbn.show_config()
    assert config["openmp"] is False
    assert config["threads"] == 1
    assert "no: every call uses one thread" in capsys.readouterr().out


# ---- caches ------------------------------------------------------------------------------------------------


def write_cache(folder, index, **files):
    (folder / f"index{index}").mkdir(parents=True)
    for name, text in files.items():
        (folder / f"index{index}" / name).write_text(f"{text}\n")


def test_caches_of_a_described_cpu(tmp_path):
    write_cache(tmp_path, 0, type="Data", level=1, size="48K")
    write_cache(tmp_path, 1, type="Instruction", level=1, size="64K")
    write_cache(tmp_path, 2, type="Unified", level=2, size="2048K")
    write_cache(tmp_path, 3, type="Unified", level=3, size="96M")
    assert caches.read(str(tmp_path)) == {"L1": 48 << 10, "L2": 2 << 20, "L3": 96 << 20}


def test_caches_that_nobody_describes_are_typical(tmp_path):
    assert caches.read(str(tmp_path / "none")) == {"L1": 32 << 10, "L2": 1 << 20, "L3": 16 << 20}


@pytest.mark.parametrize("size", ["", "K", "512", "half", "1G", "-"])
def test_a_cache_line_not_understood_leaves_the_typical_size(tmp_path, size):
    write_cache(tmp_path, 0, type="Data", level=1, size=size)
    write_cache(tmp_path, 2, type="Unified", level=2, size="512K")
    (tmp_path / "index3").mkdir()
    assert caches.read(str(tmp_path)) == {"L1": 32 << 10, "L2": 512 << 10, "L3": 16 << 20}


def test_caches_in_use_are_positive_and_grow():
    assert 0 < caches.L1 <= caches.L2
    assert caches.L3 > 0
