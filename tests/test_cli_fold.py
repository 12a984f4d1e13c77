"""`fastbn fold`: what it writes, says and refuses, and that nothing is left behind where it fails."""

import json
import os
import stat
import sys

import numpy as np
import pytest
from interpreter import run_python

import fastbn
from fastbn.cli import main
from fastbn.interop import array_files, arrays, files, verify

EPS32 = 2.0**-23


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "SECONDS", 0.0)


@pytest.fixture
def folder(tmp_path):
    """The folder, to compare what is in it: names, contents, and what is hidden."""
    return lambda: {
        str(path.relative_to(tmp_path)): path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")
    }


def state(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "conv1.weight": rng.normal(size=(6, 3, 3, 3)).astype(np.float32),
        "bn1.weight": rng.normal(size=6).astype(np.float32),
        "bn1.bias": rng.normal(size=6).astype(np.float32),
        "bn1.running_mean": rng.normal(size=6).astype(np.float32),
        "bn1.running_var": rng.uniform(0.5, 2, 6).astype(np.float32),
        "bn1.num_batches_tracked": np.array(9),
        "norm.running_mean": np.zeros(2, np.float32),
        "norm.running_var": np.ones(2, np.float32),
    }


PAIRS = ("--pairs", "bn1=conv1", "--transposed", "none")


def arrays_file(name="in.npz", **changes):
    arrays.save(state() | changes, name)
    return name


def fold(*arguments, code=0):
    assert main(["fold", *map(str, arguments)]) == code


def refused(capsys, *arguments):
    """Run what must be refused in one line; return the line."""
    fold(*arguments, code=files.BAD_INPUT)
    error = capsys.readouterr().err
    assert error.startswith("fastbn fold: ")
    assert error.count("\n") == 1
    return error


# ---- arrays: all that is the same for every format -----------------------------------------------------------


class TestArrays:
    @pytest.mark.parametrize("suffix", array_files.SUFFIXES)
    def test_it_writes_what_the_library_folds(self, suffix, capsys):
        if suffix == ".safetensors":
            pytest.importorskip("safetensors")
        elif suffix != ".npz":
            pytest.importorskip("torch")
        source = arrays_file(f"in{suffix}")
        fold(source, f"out{suffix}", *PAIRS, "--verify")
        expected, _ = arrays.fold(state(), {"bn1": "conv1"}, transposed=())
        got = arrays.load(f"out{suffix}")
        assert got.keys() == expected.keys()
        assert all(got[name].tobytes() == expected[name].tobytes() for name in got)
        assert sorted(os.listdir()) == [f"in{suffix}", f"out{suffix}"]
        out = capsys.readouterr().out
        assert "bn1        folded  conv1  behind it, the pair given; eps 1e-05 by default" in out
        assert "norm       left           no pair names it" in out
        assert "2 BatchNorm: 1 folded, 1 left; nodes 8 -> 4, parameters" in out
        assert "verification passed: the arithmetic alone, by each folded layer on random patches" in out
        assert f"written: out{suffix}" in out

    def test_inferred_pairs_and_eps(self, capsys):
        fold(arrays_file(), "out.npz", "--eps", "0.25", "--transposed", "none")
        expected, _ = arrays.fold(state(), {"bn1": "conv1"}, eps=0.25)
        assert arrays.load("out.npz")["conv1.weight"].tobytes() == expected["conv1.weight"].tobytes()
        out = capsys.readouterr().out
        assert "the pair inferred from the names; eps 0.25\n" in out
        assert "whether a ReLU or anything else stands between, the file does not show" in out

    def test_all_options_reach_the_library(self, monkeypatch):
        got = {}
        monkeypatch.setattr(arrays, "fold", lambda state, **options: got.update(options) or (state, report()))
        fold(
            arrays_file(), "--dry-run", "--pairs", "a=b,c=d", "--before", "e=f,e=g,h=i", "--transposed", "b,d",
            "--layouts", "b=HWIO", "--unpadded", "f,g", "--eps", "1e-3",
        )  # fmt: skip
        assert got == {
            "pairs": {"a": "b", "c": "d"}, "before": {"e": ["f", "g"], "h": ["i"]}, "transposed": ["b", "d"],
            "layouts": {"b": "HWIO"}, "unpadded": ["f", "g"], "eps": 1e-3,
        }  # fmt: skip

    @pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt"])
    def test_without_options_the_names_decide_and_it_says_so(self, suffix, capsys):
        if suffix != ".npz":
            pytest.importorskip({".pt": "torch"}.get(suffix, suffix[1:]))
        square = {"conv1.weight": np.random.default_rng(1).normal(size=(6, 6, 3, 3)).astype(np.float32)}
        fold(arrays_file(f"in{suffix}", **square), f"out{suffix}", "--verify")
        expected, _ = arrays.fold(state() | square, {"bn1": "conv1"}, transposed=())
        got = arrays.load(f"out{suffix}")
        assert got.keys() == expected.keys()
        assert all(got[name].tobytes() == expected[name].tobytes() for name in got)
        out = capsys.readouterr().out
        assert "the pair inferred from the names; eps 1e-05 by default; conv1 taken as a convolution that is not" in out
        assert "norm       left           no pair inferred from the names: no layer's name fits its own" in out
        assert out.count("whether a ReLU or anything else stands between, the file does not show") == 1
        assert "verification passed" in out

    @pytest.mark.parametrize("options", [("--pairs", "bn1=conv1"), ("--before", "bn1=fc")])
    def test_nothing_is_inferred_where_something_is_said(self, options, capsys):
        fold(arrays_file(**{"fc.weight": np.ones((2, 6), np.float32)}), "out.npz", *options)
        out = capsys.readouterr().out
        assert "1 folded" in out
        assert "inferred" not in out

    @pytest.mark.parametrize("text", ["bn1", "bn1=", "=conv1", "a=b=c", "a=b,", "a=b,a=c"])
    def test_pairs_that_are_none(self, text, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["fold", "in.npz", "out.npz", "--pairs", text])
        assert stop.value.code == 2
        assert "argument --pairs" in capsys.readouterr().err

    def test_metadata_is_kept(self):
        pytest.importorskip("safetensors")
        source = arrays.State(state())
        source.metadata = {"format": "pt"}
        arrays.save(source, "in.safetensors")
        fold("in.safetensors", "out.safetensors", *PAIRS)
        assert arrays.load("out.safetensors").metadata == {"format": "pt"}


def report():
    return fastbn.interop.report.ModelReport((), 1, 1, 1, 1)


class TestDryRun:
    def test_it_writes_nothing(self, folder, capsys):
        arrays_file()
        before = folder()
        fold("in.npz", "--dry-run", *PAIRS)
        fold("in.npz", "out.npz", "--dry-run", "--verify", *PAIRS)
        assert folder() == before
        out = capsys.readouterr().out
        assert out.count("1 folded") == 2
        assert out.count("verification passed") == 1
        assert "written" not in out

    def test_a_report_is_written_where_it_is_asked_for(self, tmp_path):
        fold(arrays_file(), "--dry-run", "--report", "r.json", *PAIRS)
        assert json.loads((tmp_path / "r.json").read_text())["output"] is None
        assert sorted(os.listdir()) == ["in.npz", "r.json"]


class TestReport:
    def test_it_holds_the_decisions_and_the_verification(self):
        fold(arrays_file(), "out.npz", "--report", "r.json", "--verify", *PAIRS)
        with open("r.json") as file:
            result = json.load(file)
        assert (result["input"], result["output"], result["fastbn"]) == ("in.npz", "out.npz", fastbn.__version__)
        _, expected = arrays.fold(state(), {"bn1": "conv1"}, transposed=())
        assert result["decisions"] == json.loads(json.dumps(expected.to_dict()))["decisions"]
        assert result["nodes_before"] == 8
        verification = result["verification"]
        assert verification["passed"] is True
        [difference] = verification["differences"]
        assert difference["output"] == "conv1"
        assert difference["relative"] <= difference["limit"] == 1000 * EPS32

    @pytest.mark.parametrize("name", ["in.npz", "./in.npz", "out.npz", "link.json", "in.json"])
    def test_it_is_neither_input_nor_output(self, name, capsys, folder):
        arrays_file()
        os.symlink("in.npz", "link.json")
        os.link("in.npz", "in.json")
        before = folder()
        error = refused(capsys, "in.npz", "out.npz", "--report", name, *PAIRS)
        assert f"{os.path.normpath(name)}: expected another file than" in error
        assert folder() == before

    def test_it_is_not_the_external_data_of_the_output(self, capsys):
        error = refused(capsys, arrays_file(), "out.npz", "--report", "out.npz.data", *PAIRS)
        assert "expected another file" in error

    def test_one_that_exists_is_replaced(self, tmp_path):
        arrays_file()
        (tmp_path / "r.json").write_text("old")
        fold("in.npz", "out.npz", "--report", "r.json", *PAIRS)
        assert json.loads((tmp_path / "r.json").read_text())["output"] == "out.npz"

    def test_one_that_cannot_be_written_leaves_no_model(self, capsys, monkeypatch, folder):
        arrays_file()
        before = folder()
        replace = os.replace

        def fails(source, target):
            if str(target) == "r.json":
                raise OSError(28, "No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", fails)
        error = refused(capsys, "in.npz", "out.npz", "--report", "r.json", *PAIRS)
        assert "r.json: No space left on device" in error
        assert folder() == before


# ---- where it writes -----------------------------------------------------------------------------------------


class TestPlaces:
    def test_output_that_exists_is_replaced(self, tmp_path):
        arrays_file()
        (tmp_path / "out.npz").write_bytes(b"old")
        fold("in.npz", "out.npz", *PAIRS)
        assert "conv1.bias" in arrays.load("out.npz")

    @pytest.mark.parametrize("kind", ["same", "dotted", "symlink", "hard link", "folder link", "link to link"])
    def test_the_input_is_never_the_output(self, kind, capsys, tmp_path, folder):
        arrays_file()
        name = {"same": "in.npz", "dotted": "./sub/../in.npz", "folder link": "sub/here/in.npz"}.get(kind, "out.npz")
        (tmp_path / "sub").mkdir()
        if kind == "symlink":
            os.symlink("in.npz", "out.npz")
        elif kind == "hard link":
            os.link("in.npz", "out.npz")
        elif kind == "folder link":
            os.symlink(tmp_path, "sub/here")
        elif kind == "link to link":
            os.symlink("in.npz", "step.npz")
            os.symlink("step.npz", "out.npz")
        before = (tmp_path / "in.npz").read_bytes()
        assert "expected another file than in.npz, which is only read" in refused(capsys, "in.npz", name, *PAIRS)
        assert (tmp_path / "in.npz").read_bytes() == before

    def test_the_input_by_a_link(self, capsys):
        arrays_file()
        os.symlink("in.npz", "link.npz")
        assert "expected another file" in refused(capsys, "link.npz", "in.npz", *PAIRS)

    def test_a_link_to_another_file_is_replaced_and_that_file_kept(self, tmp_path):
        (tmp_path / "other.npz").write_bytes(b"mine")
        os.symlink("other.npz", "out.npz")
        fold(arrays_file(), "out.npz", *PAIRS)
        assert (tmp_path / "other.npz").read_bytes() == b"mine"
        assert not os.path.islink("out.npz")

    def test_folders(self, capsys, tmp_path):
        arrays_file()
        assert "no/out.npz: expected a folder" in refused(capsys, "in.npz", "no/out.npz", *PAIRS)
        (tmp_path / "out.npz").mkdir()
        assert "out.npz: expected the name of a file" in refused(capsys, "in.npz", "out.npz", *PAIRS)
        (tmp_path / "sub").mkdir()
        fold("in.npz", "sub/out.npz", *PAIRS)
        assert os.listdir("sub") == ["out.npz"]

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
    @pytest.mark.parametrize("link", [False, True])
    @pytest.mark.parametrize("argument", ["output", "report"])
    def test_what_is_no_regular_file_is_not_replaced(self, argument, link, capsys, tmp_path):
        """As root, a rename over /dev/null would take it from everybody."""
        arrays_file()
        os.mkfifo("pipe.npz")
        if link:
            os.symlink("pipe.npz", "link.npz")
        name = "link.npz" if link else "pipe.npz"
        places = ("in.npz", name) if argument == "output" else ("in.npz", "out.npz", "--report", name)
        assert f"{name}: expected the name of a file, got a device, a pipe or a socket" in refused(capsys, *places)
        assert (tmp_path / "pipe.npz").is_fifo()
        assert not os.path.exists("out.npz")

    def test_reports_to_devices_are_refused(self, capsys):
        if not os.path.exists("/dev/null"):
            pytest.skip("no /dev/null")
        os.symlink("/dev/null", "r.json")
        error = refused(capsys, arrays_file(), "--dry-run", "--report", "r.json")
        assert "r.json: expected the name of a file" in error

    @pytest.mark.parametrize("place", ["in", "out", "report"])
    def test_names_that_are_too_long(self, place, capsys):
        arrays_file()
        long = f"{'a' * 300}.npz"
        names = {"in": (long, "out.npz"), "out": ("in.npz", long), "report": ("in.npz", "o.npz", "--report", long)}
        error = refused(capsys, *names[place])
        assert long in error
        assert os.listdir() == ["in.npz"]

    @pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
    def test_mode_is_that_of_a_new_file_or_stays(self, tmp_path):
        (tmp_path / "new").touch()
        for mode in (tmp_path / "new").stat().st_mode, stat.S_IFREG | 0o600:
            fold(arrays_file(), "out.npz", "--report", "r.json", *PAIRS)
            for name in "out.npz", "r.json":
                assert os.stat(name).st_mode == mode
                os.chmod(name, 0o600)

    def test_a_link_to_the_input_that_comes_up_meanwhile_is_refused(self, capsys, tmp_path, monkeypatch):
        arrays_file()
        save = arrays.save
        monkeypatch.setattr(arrays, "save", lambda *a: save(*a) or os.link("in.npz", "out.npz"))
        assert "out.npz: expected another file than in.npz" in refused(capsys, "in.npz", "out.npz", *PAIRS)
        assert sorted(os.listdir()) == ["in.npz", "out.npz"]

    def test_it_is_written_on_the_disk_where_it_will_be(self, tmp_path, monkeypatch):
        """So that moving it there is one step."""
        (tmp_path / "sub").mkdir()
        arrays_file()
        save, places = arrays.save, []
        monkeypatch.setattr(arrays, "save", lambda state, path: places.append(path) or save(state, path))
        fold("in.npz", "sub/out.npz", *PAIRS)
        assert [path.parent.parent.resolve() for path in places] == [(tmp_path / "sub").resolve()]

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing is forbidden to root")
    def test_a_folder_without_permission(self, capsys, tmp_path):
        (tmp_path / "sub").mkdir(mode=0o500)
        assert "sub/out.npz: Permission denied" in refused(capsys, arrays_file(), "sub/out.npz", *PAIRS)

    @pytest.mark.parametrize("when", ["making the folder", "saving", "moving"])
    @pytest.mark.parametrize(
        "error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")]
    )
    def test_the_disk_fails(self, when, error, capsys, monkeypatch, folder):
        arrays_file()
        before = folder()

        def fails(*_, **__):
            if when == "saving":
                with open(_[1], "wb") as file:
                    file.write(b"half of it")
            raise error

        target = {"making the folder": (files.tempfile, "TemporaryDirectory"), "saving": (arrays, "save"),
                  "moving": (files.os, "replace")}  # fmt: skip
        monkeypatch.setattr(*target[when], fails)
        assert f"out.npz: {error.strerror}" in refused(capsys, "in.npz", "out.npz", *PAIRS)
        assert folder() == before

    @pytest.mark.parametrize("when", [(arrays, "load"), (arrays, "fold"), (arrays, "save"), (files, "verify"),
                                      (files.os, "replace"), (files.os, "fsync")], ids=lambda w: w[1])  # fmt: skip
    def test_interrupted(self, when, capsys, monkeypatch, folder):
        arrays_file()
        before = folder()

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr(*when, interrupt)
        fold("in.npz", "out.npz", "--verify", "--report", "r.json", *PAIRS, code=130)
        assert capsys.readouterr().err == "fastbn fold: interrupted\n"
        monkeypatch.undo()
        assert {name.rpartition("/")[2] for name in folder()} == {name.rpartition("/")[2] for name in before}


# ---- what comes in -------------------------------------------------------------------------------------------


class TestInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["in.bin", "out.bin"], "in.bin: expected a file of .onnx, .pt2, .keras"),
            (["in", "out.npz"], "in: expected a file of .onnx"),
            (["none.npz", "out.npz"], "none.npz: expected a model, got no such file"),
            (["in.npz"], "in.npz: expected the name of a file to write, or --dry-run"),
            (["in.npz", "out.safetensors", *PAIRS], "out.safetensors: expected the suffix .npz"),
            (["in.npz", "out", *PAIRS], "out: expected the suffix .npz"),
            (["in.npz", "out.npz", "--pairs", "bn9=conv1"], "in.npz: pairs: expected the name of a BatchNorm"),
            (["in.npz", "out.npz", "--pairs", "norm=conv1"], "in.npz: conv1: expected channels that fit"),
            (["in.npz", "out.npz", "--tolerance", "1"], "in.npz: expected --verify with --tolerance"),
            (["in.npz", "out.npz", "--shape", "x=1"], "in.npz: expected --verify with --shape"),
            (["in.npz", "out.npz", "--input", "a.npy"], "in.npz: expected --verify with --input"),
            (["in.npz", "out.npz", "--verify", "--shape", "x=1"], "in.npz: expected no --shape: arrays are no model"),
            (["in.npz", "out.npz", "--verify", "--threads", "1"], "in.npz: expected no --threads"),
            (["m.onnx", "out.onnx", "--eps", "0"], "m.onnx: expected --eps only for arrays"),
            (["m.onnx", "out.onnx", "--transposed", "none"], "m.onnx: expected --transposed only for arrays"),
            (["m.h5", "out.h5"], "out.h5: expected the suffix .keras"),
        ],
    )  # fmt: skip
    def test_refused(self, arguments, message, capsys, tmp_path, folder):
        arrays_file()
        for name in "in.bin", "in", "m.onnx", "m.h5":
            (tmp_path / name).write_bytes(b"something")
        before = folder()
        assert refused(capsys, *arguments).startswith(f"fastbn fold: {message}")
        assert folder() == before

    def test_a_folder(self, capsys, tmp_path):
        (tmp_path / "in.npz").mkdir()
        assert "in.npz: expected a model, got a folder or a device" in refused(capsys, "in.npz", "out.npz")

    @pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".keras", ".h5", ".npz", ".safetensors", ".pt"])
    @pytest.mark.parametrize("content", [b"", b"garbage" * 30], ids=["empty", "garbage"])
    def test_files_that_are_no_model(self, suffix, content, capsys, tmp_path, folder, monkeypatch):
        needed = {".pt2": "torch", ".pt": "torch", ".h5": "keras", ".npz": "numpy"}.get(suffix, suffix[1:])
        if needed == "keras":
            pytest.importorskip("h5py")
            pytest.importorskip("torch")
            monkeypatch.setenv("KERAS_BACKEND", "torch")
        pytest.importorskip(needed)
        (tmp_path / f"in{suffix}").write_bytes(content)
        before = folder()
        output = "out.keras" if suffix == ".h5" else f"out{suffix}"
        assert refused(capsys, f"in{suffix}", output).startswith(f"fastbn fold: in{suffix}: expected")
        assert folder() == before

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("content", ["truncated", "random", "another zip"])
    def test_keras_files_that_are_no_model(self, content, capsys, tmp_path, folder, monkeypatch):
        """Keras says of some of them that there is no such file."""
        pytest.importorskip("torch")
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        keras = pytest.importorskip("keras")
        path = tmp_path / "in.keras"
        keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save(path)
        if content == "another zip":
            np.savez(path.with_suffix(".npz"), a=np.ones(2))
            path.with_suffix(".npz").rename(path)
        else:
            random = np.random.default_rng(0).bytes(3000)
            path.write_bytes(random if content == "random" else path.read_bytes()[:-200])
        before = folder()
        error = refused(capsys, "in.keras", "out.keras")
        assert error.startswith("fastbn fold: in.keras: expected a Keras model")
        assert "not found: filepath" not in error
        assert ("it is no zip file, or truncated" in error) == (content != "another zip")
        assert folder() == before

    @pytest.mark.parametrize("value", [np.nan, -1.0])
    def test_statistics_that_are_none(self, value, capsys, folder):
        arrays_file(**{"bn1.running_var": np.full(6, value, np.float32)})
        before = folder()
        assert "in.npz: bn1: " in refused(capsys, "in.npz", "out.npz", *PAIRS)
        assert folder() == before

    @pytest.mark.parametrize(("suffix", "package"), [(".onnx", "onnx"), (".pt2", "torch"), (".keras", "keras"),
                                                     (".safetensors", "safetensors"), (".pt", "torch")])  # fmt: skip
    def test_missing_packages_are_named(self, suffix, package, capsys, tmp_path, monkeypatch):
        (tmp_path / f"in{suffix}").write_bytes(b"something")
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        for name in [name for name in sys.modules if name.startswith("fastbn.interop.") and package in name]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)
        if hasattr(fastbn.interop, package):
            monkeypatch.delattr(fastbn.interop, package)
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        error = refused(capsys, f"in{suffix}", f"out{suffix}")
        assert f'pip install "fastbn[{package}]"' in error
        assert os.listdir() == [f"in{suffix}"]


# ---- verification --------------------------------------------------------------------------------------------


def break_weights(front, monkeypatch, change):
    """Let `front.fold` return what `change` makes of the folded model."""
    right = front.fold

    def wrong(*args, **options):
        model, report = right(*args, **options)
        change(model)
        return model, report

    monkeypatch.setattr(front, "fold", wrong)


class TestVerify:
    @pytest.mark.parametrize("key", ["conv1.weight", "conv1.bias"])
    def test_a_wrong_fold_is_not_written(self, key, capsys, monkeypatch, folder):
        arrays_file()
        before = folder()
        break_weights(arrays, monkeypatch, lambda model: model[key].__iadd__(np.float32(0.05)))
        fold("in.npz", "out.npz", "--verify", "--report", "r.json", *PAIRS, code=1)
        out, err = capsys.readouterr()
        assert "verification FAILED" in out
        assert "too much" in out
        assert err == "fastbn fold: in.npz: the folded model differs, nothing is written\n"
        assert folder() == before
        fold("in.npz", "out.npz", "--verify", "--tolerance", "1", *PAIRS)

    def test_the_tolerance_decides(self, capsys, folder):
        fold(arrays_file(), "--dry-run", "--verify", "--tolerance", "0", *PAIRS, code=1)
        assert "(limit 0): too much" in capsys.readouterr().out

    def test_what_is_verified_is_the_file(self, monkeypatch, folder):
        """A writer that loses something is noticed, too."""
        arrays_file()
        before, save = folder(), arrays.save
        monkeypatch.setattr(arrays, "save", lambda state, path: save(state | {"conv1.bias": np.zeros(6, "f")}, path))
        fold("in.npz", "out.npz", "--verify", *PAIRS, code=1)
        assert folder() == before


def difference(before, after, tolerance=None, dtype="float32"):
    runs = [[verify.Output("y", dtype, np.asarray(run))] for run in (before, after)]
    return verify._difference(*runs, tolerance)


class TestDifference:
    @pytest.mark.parametrize(("dtype", "limit"), [("float64", 1000 * 2.0**-52), ("float32", 1000 * EPS32),
                                                  ("float16", 2.0**-5), ("bfloat16", 2.0**-3)])  # fmt: skip
    def test_limits(self, dtype, limit):
        assert difference([4.0], [4.0 * (1 + 0.99 * limit)], dtype=dtype).passed
        assert not difference([4.0, 1.0], [4.0, 1.0 + 4.01 * limit], dtype=dtype).passed
        assert difference([4.0, 1.0], [4.0, 1.0 + 3.99 * limit], dtype=dtype).passed

    def test_numbers(self):
        got = difference([-8.0, 1.0], [-8.0, 3.0], tolerance=0.5)
        assert (got.largest, got.absolute, got.relative, got.limit, got.passed) == (8.0, 2.0, 0.25, 0.5, True)

    def test_what_is_not_finite(self):
        values = [np.nan, np.inf, -np.inf, 1.0]
        assert difference(values, values).passed
        for i in range(3):
            assert not difference(values, [*values[:i], 1.0, *values[i + 1 :]], tolerance=1e9).passed
            assert not difference([*values[:i], 1.0, *values[i + 1 :]], values, tolerance=1e9).passed
        assert not difference([np.inf], [-np.inf], tolerance=1e9).passed
        assert not difference([np.inf], [np.nan], tolerance=1e9).passed

    def test_zeros(self):
        assert difference([0.0], [-0.0]).passed
        assert not difference([0.0], [1e-30]).passed

    def test_integers_and_booleans_are_equal_or_not(self):
        assert difference([3, 4], [3, 4], dtype="int64").passed
        assert not difference([3, 4000], [3, 4001], dtype="int64").passed
        assert not difference([True], [False], dtype="bool").passed
        assert difference(["a"], ["a"], dtype="str").passed
        assert not difference(["a"], ["b"], dtype="str").passed

    def test_shapes_and_dtypes(self):
        assert not difference([1.0], [[1.0]], tolerance=1e9).passed
        runs = verify.Output("y", "float32", np.ones(2)), verify.Output("y", "float16", np.ones(2))
        assert not verify._difference(*([run] for run in runs), 1e9).passed

    def test_over_several_inputs_the_largest_count(self):
        runs = [[[1.0], [100.0]], [[1.001], [100.0]]]
        outputs = [[verify.Output("y", "float32", np.array(value)) for value in values] for values in runs]
        assert verify._difference(*outputs, None).relative == pytest.approx(1e-5)

    def test_the_last_bits_of_the_inputs_limit_what_can_be_known(self):
        def outputs(*values):
            return [verify.Output("y", "float32", np.array(value)) for value in values]

        before, after = outputs([1e-6], [2e-6]), outputs([1e-6], [2.1e-6])
        assert not verify._difference(before, after, None).passed
        got = verify._difference(before, after, None, outputs([1e-6], [2.02e-6]))
        assert got.passed
        assert got.limit == pytest.approx(16 * 0.01)
        assert "one eps in the inputs makes 0.01" in str(got)
        assert not verify._difference(before, after, None, outputs([1e-6], [2.006e-6])).passed
        assert not verify._difference(before, after, 1e-3, outputs([1e-6], [2.02e-6])).passed
        assert not verify._difference(before, outputs([1e-6], [0.0]), None, outputs([1e-6], [2.02e-6])).passed
        assert not verify._difference(outputs([0.0]), outputs([1.0]), None, outputs([1.0])).passed

    def test_inputs_are_moved_by_one_eps_and_no_more(self):
        inputs = [verify.Input("x", "float32", (1000,)), verify.Input("i", "int64", (3,)),
                  verify.Input("h", "bfloat16", (9,))]  # fmt: skip
        feed = {"x": np.linspace(1, 2, 1000, dtype=np.float32), "i": np.arange(3), "h": np.ones(9, np.float32)}
        moved = verify._moved(verify.Model(inputs, print), feed, 0)
        assert moved["i"].tobytes() == feed["i"].tobytes()
        assert moved["x"].dtype == np.float32
        assert (moved["x"] != feed["x"]).any()
        assert np.abs(moved["x"] / feed["x"].astype(float) - 1).max() <= 1.5 * EPS32
        assert 0 < np.abs(moved["h"] - 1).max() <= 2.0**-7

    def test_an_output_that_never_varies_is_told(self):
        same = [verify.Output("y", "float32", np.ones(2))] * 2
        assert "the same for all inputs" in str(verify._difference(same, same, None))


# ---- the command itself --------------------------------------------------------------------------------------


def test_as_a_process(tmp_path):
    arrays_file()
    code = f"""
        import os, sys
        os.chdir({str(tmp_path)!r})
        from fastbn.cli import main
        sys.exit(main(["fold", "in.npz", "out.npz", "--pairs", "bn1=conv1", "--transposed", "none", "--verify"]))
    """
    process = run_python(code)
    assert "written: out.npz" in process.stdout
    assert process.stderr == ""
    process = run_python(code.replace('"out.npz"', '"in.npz"'), check=False)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == "fastbn fold: in.npz: expected another file than in.npz, which is only read\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["out.npz", "--verify"], ["none/out.npz"]], ids=["done", "refused"])
@pytest.mark.parametrize("where", ["pipe that nobody reads", "/dev/full", "closed"])
def test_work_goes_on_where_nothing_can_be_printed(where, arguments, tmp_path):
    arrays_file(**{f"extra{i}.running_{key}": np.ones(2) for i in range(3000) for key in ("mean", "var")})
    code = f"""
        import os, subprocess, sys
        os.chdir({str(tmp_path)!r})
        command = [sys.executable, "-c", "import sys; from fastbn.cli import main; sys.exit(main(sys.argv[1:]))",
                   "fold", "in.npz", *{arguments!r}]
        reads, writes = os.pipe()
        os.close(reads)
        stream = writes if {where!r}.startswith("pipe") else open("/dev/full", "w")
        if {where!r} == "closed":
            command = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *command]
        process = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True)
        print(process.returncode, process.stderr, end="")
    """
    out = run_python(code, PYTHONUNBUFFERED="").stdout
    if arguments[0] == "out.npz":
        assert out == "0 "
        assert "conv1.bias" in arrays.load("out.npz")
    else:
        assert out == "2 fastbn fold: none/out.npz: expected a folder to write to, got no such folder\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_errors_that_cannot_be_printed(tmp_path):
    code = f"""
        import subprocess, sys
        command = [sys.executable, "-c", "import sys; from fastbn.cli import main; sys.exit(main(sys.argv[1:]))",
                   "fold", "none.npz", "out.npz"]
        print(subprocess.run(command, cwd={str(tmp_path)!r}, stderr=open("/dev/full", "w")).returncode)
    """
    assert run_python(code, PYTHONUNBUFFERED="").stdout == "2\n"


def test_names_that_the_terminal_cannot_show(tmp_path):
    arrays_file("größe.npz")
    code = f"""
        import os, sys
        os.chdir({str(tmp_path)!r})
        from fastbn.cli import main
        sys.exit(main(["fold", "größe.npz", "maß.npz"]))
    """
    assert r"written: ma\xdf.npz" in run_python(code, PYTHONIOENCODING="ascii").stdout


def test_help_names_the_formats_the_options_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fold", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in (*files.FORMATS, "--verify", "--pairs", "exit codes: 0 done", 'pip install "fastbn[onnx]"'):
        assert text in out


def test_on_a_terminal_it_is_a_table(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    fold(arrays_file(**{"odd[0].running_mean": np.zeros(2)}), "--dry-run", *PAIRS)
    out = capsys.readouterr().out
    assert "odd[0]" in out
    assert "behind it, the pair given; eps 1e-05 by default" in out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    fold("in.npz", "--dry-run", *PAIRS)
    assert "bn1        folded  conv1  behind it" in capsys.readouterr().out


# ---- ONNX ----------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx():
    pytest.importorskip("onnxruntime")
    return pytest.importorskip("onnx")


NET = (
    "x) => (float[N, 6, H2, W2] y, float[2000] z) "
    "{ c = Conv(x, w)  b = BatchNormalization(c, g, s, m, v)  y = Relu(b)  z = Neg(extra) }"
)


def onnx_file(onnx, name="in.onnx", text=f"g (float[N, 3, H, W] {NET}", external=None, dtype=np.float32, **changes):
    """Write a model whose weights are `state`'s, and some that are large enough to be stored outside."""
    arrays_ = state() | {"extra": np.ones(2000, np.float32)}
    names = {"w": "conv1.weight", "g": "bn1.weight", "s": "bn1.bias", "m": "bn1.running_mean", "v": "bn1.running_var"}
    weights = {short: arrays_[long].astype(dtype) for short, long in names.items()} | {"extra": arrays_["extra"]}
    weights |= changes
    graph = onnx.parser.parse_graph(text)
    graph.initializer.extend(onnx.numpy_helper.from_array(array, key) for key, array in weights.items())
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    if external is None:
        onnx.save(model, name)
    else:
        onnx.save(model, name, save_as_external_data=True, location=external, size_threshold=0)
    return name


def operations(onnx, name):
    return [node.op_type for node in onnx.load(name).graph.node]


class TestOnnx:
    def test_from_end_to_end(self, onnx, capsys, folder):
        source = onnx_file(onnx)
        fold(source, "out.onnx", "--verify", "--threads", "1", "--report", "r.json")
        assert operations(onnx, "out.onnx") == ["Conv", "Relu", "Neg"]
        out = capsys.readouterr().out
        assert "verification passed: 3 random inputs (x float32 [2, 3, 64, 64])" in out
        assert "y float32: largest |difference|" in out
        assert "times as fast (ONNX Runtime, its graph optimisation on; medians of 3 interleaved runs)" in out
        with open("r.json") as file:
            result = json.load(file)
        assert result["verification"]["rounds"] == 3
        assert result["verification"]["median_seconds"]["before"] > 0
        assert set(folder()) == {"in.onnx", "out.onnx", "r.json"}

    def test_both_are_compared_as_they_are_and_timed_as_they_run(self, onnx, monkeypatch):
        load, loaded = verify._onnx, []

        def recorded(path, threads, optimised=False):
            loaded.append((path.name, threads, optimised))
            return load(path, threads, optimised)

        monkeypatch.setattr(verify, "_onnx", recorded)
        fold(onnx_file(onnx), "out.onnx", "--verify", "--threads", "1")
        assert loaded == [(name, 1, optimised) for optimised in (False, True) for name in ("in.onnx", "out.onnx")]

    def test_external_data_go_beside_the_output(self, onnx, folder):
        source = onnx_file(onnx, external="in.weights")
        before = folder()
        fold(source, "out.onnx", "--verify", "--threads", "1")
        after = folder()
        assert set(after) - set(before) == {"out.onnx", "out.onnx.data"}
        assert {name: after[name] for name in before} == before
        locations = {e.value for t in onnx.load("out.onnx", load_external_data=False).graph.initializer
                     for e in t.external_data if e.key == "location"}  # fmt: skip
        assert locations == {"out.onnx.data"}
        os.unlink("in.weights")
        onnx.checker.check_model("out.onnx")
        assert operations(onnx, "out.onnx") == ["Conv", "Relu", "Neg"]

    @pytest.mark.parametrize("kind", ["same", "symlink"])
    def test_external_data_never_replace_the_inputs(self, onnx, kind, capsys, folder):
        source = onnx_file(onnx, external="other" if kind == "symlink" else "out.onnx.data")
        if kind == "symlink":
            os.symlink("other", "out.onnx.data")
        before = folder()
        assert "out.onnx.data: expected another file than" in refused(capsys, source, "out.onnx")
        assert folder() == before

    def test_external_data_replace_no_other_file(self, onnx, capsys, tmp_path, folder):
        source = onnx_file(onnx, external="in.weights")
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "out.onnx.data").write_bytes(b"mine")
        before = folder()
        assert "sub/out.onnx.data: expected no such file yet" in refused(capsys, source, "sub/out.onnx")
        assert folder() == before
        (tmp_path / "sub" / "out.onnx").write_bytes(b"of an earlier run")
        fold(source, "sub/out.onnx")
        assert len((tmp_path / "sub" / "out.onnx.data").read_bytes()) >= 8000

    def test_the_output_is_not_the_inputs_data(self, onnx, capsys, folder):
        source = onnx_file(onnx, external="data.onnx")
        before = folder()
        assert "data.onnx: expected another file than" in refused(capsys, source, "data.onnx")
        assert folder() == before

    def test_data_are_taken_back_where_the_model_cannot_be_moved(self, onnx, capsys, monkeypatch, folder):
        source = onnx_file(onnx, external="in.weights")
        before, replace, moved = folder(), os.replace, []

        def fails(here, there):
            if os.sep not in str(there):  # not within the hidden folder
                moved.append(str(there))
            if str(there) == "out.onnx":
                raise OSError(5, "Input/output error")
            replace(here, there)

        monkeypatch.setattr(os, "replace", fails)
        assert "out.onnx: Input/output error" in refused(capsys, source, "out.onnx")
        assert moved == ["out.onnx.data", "out.onnx"]  # a model never stands there without its data
        assert folder() == before

    def test_missing_external_data(self, onnx, capsys):
        source = onnx_file(onnx, external="in.weights")
        os.unlink("in.weights")
        assert "in.onnx: initializer 'w'" in refused(capsys, source, "out.onnx")

    def test_a_truncated_model(self, onnx, capsys, tmp_path):
        path = tmp_path / onnx_file(onnx)
        path.write_bytes(path.read_bytes()[:500])
        assert refused(capsys, "in.onnx", "out.onnx").startswith("fastbn fold: in.onnx: expected an ONNX model")

    @pytest.mark.parametrize("value", [np.nan, -1.0])
    def test_a_node_whose_statistics_are_none(self, onnx, value, capsys, folder):
        source = onnx_file(onnx, v=np.full(6, value, np.float32))
        before = folder()
        error = refused(capsys, source, "out.onnx")
        assert error.startswith("fastbn fold: in.onnx: BatchNormalization")
        assert folder() == before

    @pytest.mark.parametrize("change", ["weight", "bias"])
    def test_a_wrong_fold_is_not_written(self, onnx, change, monkeypatch, capsys, folder):
        from fastbn.interop import onnx as front

        def damage(model):
            [conv] = [node for node in model.graph.node if node.op_type == "Conv"]
            name = conv.input[1 if change == "weight" else 2]
            [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * np.float32(1.01), name))

        source = onnx_file(onnx)
        before = folder()
        break_weights(front, monkeypatch, damage)
        fold(source, "out.onnx", "--verify", "--threads", "1", code=1)
        assert "too much" in capsys.readouterr().out
        assert folder() == before

    def test_a_folded_model_that_does_not_run(self, onnx, monkeypatch, capsys, folder):
        from fastbn.interop import onnx as front

        source = onnx_file(onnx)
        before = folder()
        break_weights(front, monkeypatch, lambda model: model.graph.initializer.pop())
        break_weights(
            front, monkeypatch, lambda model: [model.graph.initializer.pop() for _ in model.graph.initializer]
        )
        fold(source, "out.onnx", "--verify", "--threads", "1", code=1)
        assert "the folded model does not do what the model does" in capsys.readouterr().out
        assert folder() == before

    def test_shapes_given(self, onnx, capsys):
        fold(onnx_file(onnx), "--dry-run", "--verify", "--threads", "1", "--shape", "x=1,3,9,7")
        assert "(x float32 [1, 3, 9, 7])" in capsys.readouterr().out
        with pytest.raises(SystemExit):  # nothing would be compared
            fold("in.onnx", "--dry-run", "--verify", "--shape", "x=0,3,9,7")
        assert "--shape: expected sizes of 1 or more, got x=0,3,9,7" in capsys.readouterr().err
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--shape", "q=1")
        assert "--shape: expected the name of an input (x), got 'q'" in error
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--shape", "x=1,4,9,7")
        assert "expected inputs that the model runs on (give --shape or --input)" in error

    def test_sizes_are_tried_until_the_model_runs(self, onnx, capsys):
        text = f"g (float[N, D, H, W] {NET}".replace("y = Relu(b)", "r = Relu(b)  y = Reshape(r, t)")
        shape = np.array([1, 6, 30, 30])
        onnx_file(onnx, text=text.replace("[N, D, H, W]", "[N, 3, H, W]"), t=shape)
        fold("in.onnx", "--dry-run", "--verify", "--threads", "1")
        assert "(x float32 [1, 3, 32, 32])" in capsys.readouterr().out

    def test_one_name_is_one_size(self, onnx, capsys):
        text = f"g (float[K, K, 2] k, float[N, 3, H, W] {NET}".replace("{ c", "{ kk = MatMul(k, p)  c")
        onnx_file(onnx, text=text, p=np.ones((2, 1), np.float32))
        fold("in.onnx", "--dry-run", "--verify", "--threads", "1")
        assert "(k float32 [2, 2, 2], x float32 [2, 3, 64, 64])" in capsys.readouterr().out

    def test_integers_and_booleans(self, onnx, capsys):
        text = (f"g (int64[N, 2] i, bool[N] t, float[N, 3, H, W] {NET}"
                .replace("z) {", "z, int64[N, 2] j, bool[N] n) { j = Add(i, i)  n = Not(t)"))  # fmt: skip
        onnx_file(onnx, text=text)
        fold("in.onnx", "--dry-run", "--verify", "--threads", "1")
        out = capsys.readouterr().out
        assert "j int64: largest |difference| 0, 0 of the largest |value| (limit 0)" in out
        assert "n bool: largest |difference| 0" in out

    def test_real_inputs(self, onnx, capsys, tmp_path):
        onnx_file(onnx)
        x = np.random.default_rng(0).normal(size=(1, 3, 8, 8))
        np.save("x.npy", x)
        np.savez("x.npz", x=x.astype(np.float32))
        fold("in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "x.npy", "--input", "x.npz")
        assert "3 random inputs (x float32 [1, 3, 8, 8]) and x.npy and x.npz" in capsys.readouterr().out
        np.save("bad.npy", x[0])
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "bad.npy")
        assert "in.onnx: bad.npy: expected inputs that the model runs on" in error
        np.savez("bad.npz", wrong=x)
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "bad.npz")
        assert "bad.npz: expected arrays for the inputs x, got wrong" in error
        (tmp_path / "bad.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-30])
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "bad.npz")
        assert "bad.npz: expected an .npz or .npy file" in error
        np.savez("bad.npz", y=x, z=x)
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "bad.npz")
        assert "bad.npz: expected arrays for the inputs x, got y, z" in error
        np.save("bad.npy", x.astype(complex))
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "bad.npy")
        assert "bad.npy: expected float32 for the input 'x', got complex128" in error
        (tmp_path / "bad.npy").write_bytes(b"x" * 99)
        error = refused(capsys, "in.onnx", "--dry-run", "--verify", "--threads", "1", "--input", "bad.npy")
        assert "bad.npy: expected an .npz or .npy file" in error

    def test_the_output_is_not_a_real_input(self, onnx, capsys):
        onnx_file(onnx)
        onnx_file(onnx, "x.onnx")
        error = refused(capsys, "in.onnx", "x.onnx", "--verify", "--input", "x.onnx")
        assert "x.onnx: expected another file than x.onnx" in error

    def test_nan_in_the_same_places_is_equal(self, onnx, capsys):
        w = state()["conv1.weight"].copy()
        onnx_file(onnx, text=f"g (float[N, 3, H, W] {NET}".replace("Relu(b)", "Sqrt(b)"), w=w)
        fold("in.onnx", "--dry-run", "--verify", "--threads", "1", "--tolerance", "1e-2")
        assert "verification passed" in capsys.readouterr().out

    def test_float16(self, onnx, capsys):
        text = f"g (float16[N, 3, H, W] {NET}".replace("=> (float[", "=> (float16[")
        onnx_file(onnx, text=text, dtype=np.float16)
        fold("in.onnx", "out.onnx", "--verify", "--threads", "1")
        assert "y float16: " in capsys.readouterr().out

    def test_verification_needs_onnxruntime(self, onnx, capsys, monkeypatch, folder):
        source = onnx_file(onnx)
        before = folder()
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        error = refused(capsys, source, "out.onnx", "--verify")
        assert '--verify needs onnxruntime: pip install "fastbn[onnx]"' in error
        assert folder() == before


# ---- PyTorch and Keras ---------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return torch


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
class TestTorch:
    def program(self, torch, **options):
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)

            def forward(self, x, scale, *, mask=None):
                y = self.bn(self.conv(x)) * scale
                return {"y": y if mask is None else y * mask, "shape": x.sum((1, 2, 3))}

        net = Net()
        net(torch.randn(8, 3, 9, 9), 2.0)
        batch = torch.export.Dim("batch", min=3, max=7)
        program = torch.export.export(
            net.eval(), (torch.randn(4, 3, 9, 9), 2.0), {"mask": torch.ones(4, 1, 1, 1, dtype=torch.bool)},
            dynamic_shapes={"x": {0: batch}, "scale": None, "mask": {0: batch}}, **options,
        )  # fmt: skip
        torch.export.save(program, "in.pt2")

    def test_from_end_to_end(self, torch, capsys, folder):
        self.program(torch)
        fold("in.pt2", "out.pt2", "--verify", "--threads", "1")
        out = capsys.readouterr().out
        assert "1 folded" in out
        assert "x float32 [" in out
        assert "mask bool [" in out
        assert "y float32: largest" in out
        assert "shape float32: largest |difference| 0" in out
        assert "(PyTorch; medians" in out
        assert set(folder()) == {"in.pt2", "out.pt2"}

    def test_a_wrong_fold_is_not_written(self, torch, monkeypatch, folder):
        from fastbn.interop import torch as front

        self.program(torch)
        before = folder()
        break_weights(front, monkeypatch, lambda program: program.state_dict["conv.bias"].data.add_(0.1))
        fold("in.pt2", "out.pt2", "--verify", "--threads", "1", code=1)
        assert folder() == before

    def test_bfloat16(self, torch, capsys):
        pytest.importorskip("ml_dtypes")
        net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).eval().bfloat16()
        torch.export.save(torch.export.export(net, (torch.ones(3, 5, dtype=torch.bfloat16),)), "in.pt2")
        fold("in.pt2", "out.pt2", "--verify", "--threads", "1")
        assert "output bfloat16: largest" in capsys.readouterr().out


@pytest.fixture
def keras(torch, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
class TestKeras:
    def model(self, keras, name):
        x, z = keras.Input((8, 8, 3), name="x"), keras.Input((4,), name="z")
        y = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
        y = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(y))
        model = keras.Model([x, z], [keras.layers.Add()([y, z]), z])
        rng = np.random.default_rng(0)
        model.set_weights([rng.uniform(0.5, 2, w.shape) for w in model.get_weights()])
        model.save(name)

    @pytest.mark.parametrize("suffix", [".keras", ".h5"])
    def test_from_end_to_end(self, keras, suffix, capsys, folder):
        if suffix == ".h5":
            pytest.importorskip("h5py")
        self.model(keras, f"in{suffix}")
        fold(f"in{suffix}", "out.keras", "--verify", "--threads", "1")
        out = capsys.readouterr().out
        assert "1 folded" in out
        assert "x float32 [2, 8, 8, 3], z float32 [2, 4]" in out
        assert "output[1] float32: largest |difference| 0" in out
        assert "(Keras; medians" in out
        assert set(folder()) == {f"in{suffix}", "out.keras"}

    def sequential(self, keras, name):
        layers = keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.Flatten()
        model = keras.Sequential([keras.Input((8, 8, 3), name="x"), *layers, keras.layers.Dense(2)])
        rng = np.random.default_rng(0)
        model.set_weights([rng.uniform(0.5, 2, w.shape) for w in model.get_weights()])
        model.save(name)
        return name

    @pytest.mark.parametrize("suffix", [".keras", ".h5"])
    def test_a_sequential_from_end_to_end(self, keras, suffix, capsys, folder):
        if suffix == ".h5":
            pytest.importorskip("h5py")
        source = self.sequential(keras, f"in{suffix}")
        np.save("x.npy", np.ones((2, 8, 8, 3)))
        fold(source, "out.keras", "--verify", "--threads", "1", "--input", "x.npy")
        out = capsys.readouterr().out
        assert "1 folded" in out
        assert "verification passed: 3 random inputs (" in out
        assert " float32 [2, 8, 8, 3]) and x.npy" in out
        assert not any("batch" in layer.name for layer in keras.saving.load_model("out.keras").layers)
        assert set(folder()) == {source, "out.keras", "x.npy"}

    @pytest.mark.parametrize("suffix", [".keras", ".h5"])
    def test_a_wrong_fold_of_a_sequential_is_not_written(self, keras, suffix, capsys, monkeypatch, folder):
        from fastbn.interop import keras as front

        if suffix == ".h5":
            pytest.importorskip("h5py")
        source = self.sequential(keras, f"in{suffix}")
        before = folder()
        break_weights(front, monkeypatch, lambda model: model.weights[0].assign(model.weights[0] * 1.01))
        fold(source, "out.keras", "--verify", "--threads", "1", code=1)
        assert "verification FAILED" in capsys.readouterr().out
        assert folder() == before

    @pytest.mark.parametrize(
        ("said", "installed", "chosen"),
        [(None, ["torch", "jax"], "torch"), (None, ["jax"], "jax"), (None, ["torch", "tensorflow"], None),
         ("jax", ["torch", "jax"], "jax"), (None, [], None)],
    )  # fmt: skip
    def test_keras_runs_on_what_there_is(self, said, installed, chosen, capsys, tmp_path, monkeypatch):
        monkeypatch.setenv("KERAS_BACKEND", said or "")
        if said is None:
            monkeypatch.delenv("KERAS_BACKEND")
        monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: name if name in installed else None)
        monkeypatch.setattr(files.importlib, "import_module", lambda *_: (_ for _ in ()).throw(ValueError("stop here")))
        (tmp_path / "in.keras").touch()
        assert "stop here" in refused(capsys, "in.keras", "out.keras")
        assert os.environ.get("KERAS_BACKEND") == chosen

    def test_a_wrong_fold_is_not_written(self, keras, monkeypatch, folder):
        from fastbn.interop import keras as front

        self.model(keras, "in.keras")
        before = folder()
        break_weights(front, monkeypatch, lambda model: model.weights[0].assign(model.weights[0] * 1.01))
        fold("in.keras", "out.keras", "--verify", "--threads", "1", code=1)
        assert folder() == before
