"""Files that somebody made to do harm: nothing in them is run, no memory is taken for what they do not hold, nothing is
read or written outside their place, and no terminal obeys them. SECURITY.md is the list of what is held here."""

import ast
import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import textwrap
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from interpreter import UNDER_TEST, run_python

import fastbn
from fastbn import untrusted
from fastbn.cli import main
from fastbn.interop import array_files, arrays, files

STATE = {
    "conv1.weight": np.arange(1, 13, dtype=np.float32).reshape(3, 4, 1, 1),
    **{f"bn1.{name}": np.ones(3, np.float32) for name in ("weight", "bias", "running_mean", "running_var")},
}
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self):
        return open, ("sprung", "w")


def refused(path, match, load=None):
    """Load a file, which must be refused by a ValueError that names it, in little memory, with nothing left behind."""
    before = sorted(os.listdir())
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            (load or arrays.load)(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert peak < 32 * MEGABYTE
    assert sorted(os.listdir()) == before


# Nothing is run -----------------------------------------------------------------------------------------------------

SAFE = {"load": ("allow_pickle", "weights_only"), "load_model": ("safe_mode",)}
RUNS = {"eval", "exec", "compile", "__import__"}
STRANGERS = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "imp", "code"}


def test_no_source_unpickles_or_evaluates():
    """By the syntax tree: pickle gives its error class only, and what could unpickle is always told not to."""
    seen = set()
    for path in sorted(Path(fastbn.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            place = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                assert not {name.name.split(".")[0] for name in node.names} & STRANGERS, place
            if isinstance(node, ast.ImportFrom):
                assert node.module not in {"pickle", *STRANGERS}, place
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pickle":
                assert node.attr == "UnpicklingError", place
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only", "safe_mode", "shell"):
                assert ast.literal_eval(node.value) is (node.arg in ("weights_only", "safe_mode")), place
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                assert not (isinstance(node.func, ast.Name) and name in RUNS), place
                owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
                if owner in ("np", "torch", "keras.saving") and name in SAFE:
                    assert {word.arg for word in node.keywords} & {*SAFE[name]}, place
                    seen.add(owner)
    assert seen == {"np", "torch", "keras.saving"}


def test_the_trap_springs():
    pickle.loads(pickle.dumps(Trap())).close()
    assert os.path.exists("sprung")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pt", ".pth", ".onnx", ".pt2", ".keras", ".h5"])
def test_a_pickle_of_any_name_is_not_read(suffix, capsys, monkeypatch):
    for package in {".safetensors": ["safetensors"], ".npz": [], ".onnx": ["onnx"]}.get(suffix, ["torch"]):
        pytest.importorskip(package)
    if suffix in (".keras", ".h5"):
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        pytest.importorskip("keras")
    name = f"in{suffix}"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member in ("data.pkl", "archive/data.pkl", "archive/version", "byteorder", "a.npy", "config.json"):
            archive.writestr(member, pickle.dumps(Trap(), protocol=2))
    for content in pickle.dumps(Trap()), pickle.dumps({"a": Trap()}, protocol=2), out.getvalue():
        Path(name).write_bytes(content)
        assert main(["fold", name, "--dry-run"]) == 2
        assert name in capsys.readouterr().err
    assert os.listdir() == [name]


def test_objects_in_arrays_are_not_read():
    np.savez("in.npz", a=np.array([Trap()], dtype=object))
    refused("in.npz", "Object arrays cannot be loaded")


# Archives -----------------------------------------------------------------------------------------------------------


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as out:
        for name, content in members:
            out.writestr(name, content)


@pytest.fixture(params=[".npz", ".pt", ".pt2", ".keras"])
def model(request, monkeypatch):
    """A valid archive of each kind: path and load."""
    path = f"in{request.param}"
    if request.param == ".npz":
        arrays.save(STATE, path)
        return path, arrays.load
    torch = pytest.importorskip("torch")
    if request.param == ".pt":
        arrays.save(STATE, path)
        return path, arrays.load
    if request.param == ".pt2":
        from fastbn.interop import torch as front

        front.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(3, 2),)), path)
        return path, front.load
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras")
    from fastbn.interop import keras as front

    front.save(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), path)
    return path, front.load


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
class TestArchives:
    @pytest.mark.parametrize("name", ["../a.npy", "/tmp/a.npy", "a/../../b.npy", "..\\a.npy", "C:\\a.npy", "."])
    def test_names_that_lead_out(self, model, name):
        path, load = model
        archive(path, [*members_of(path).items(), (name, b"")])
        refused(path, "would be outside", load)

    def test_members_that_are_there_twice(self, model):
        path, load = model
        members = list(members_of(path).items())
        archive(path, [*members, members[-1]])
        refused(path, "is there twice", load)

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_compression_without_a_bound(self, model, method):
        path, load = model
        archive(path, [*members_of(path).items(), ("b.npy", bytes(MEGABYTE))], method)
        refused(path, "neither stored nor deflated|would grow to", load)

    def test_too_many_members(self, model, monkeypatch):
        path, load = model
        monkeypatch.setattr(untrusted, "MEMBERS", 50)
        archive(path, [*members_of(path).items(), *((f"{i}.npy", b"") for i in range(50))])
        refused(path, "it has [0-9]+ members", load)

    def test_bombs(self, model, monkeypatch):
        path, load = model
        archive(path, [*members_of(path).items(), ("b.npy", bytes(300 * MEGABYTE))], zipfile.ZIP_DEFLATED)
        assert os.path.getsize(path) < MEGABYTE
        refused(path, "would grow to", load)

    def test_what_is_deflated_but_no_bomb(self, model):
        path, load = model
        archive(path, members_of(path).items(), zipfile.ZIP_DEFLATED)
        if path.endswith((".npz", ".keras")):  # PyTorch compresses nothing, and its reader decides
            load(path)


def test_sizes_that_an_archive_only_claims():
    arrays.save({"a": np.ones(3)}, "in.npz")
    content = bytearray(Path("in.npz").read_bytes())
    struct.pack_into("<I", content, content.index(b"PK\x01\x02") + 24, 100 * MEGABYTE)
    Path("in.npz").write_bytes(content)
    refused("in.npz", "expected an .npz file")


def test_archives_in_archives():
    arrays.save(STATE, "inner.npz")
    archive("in.npz", [("inner.npz", Path("inner.npz").read_bytes())])
    refused("in.npz", "inner.npz is no array")


# Headers ------------------------------------------------------------------------------------------------------------


def npy(header, data, version):
    text = header.encode("latin1")
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version == b"\1\0" else 4, "little") + text + data


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (268435456,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296)}",  # 2⁶⁴ is 0 in 64 bits
        "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1180591620717411303424,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000000,)}",
        "{'descr': '|V0', 'fortran_order': False, 'shape': ()}",
        "{'descr': [('a', '<f4', (100000,)), ('b', '<f8')], 'fortran_order': False, 'shape': (100,)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': __import__('os').mkdir('sprung'), 'shape': (2,)}",
        "(" * 150, "-" * 5000 + "1", "[" * 90 + "]" * 90, "{'descr'", "{'shape': 'x'", "\0", "{}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), " + " " * 20000 + "}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("version", [b"\1\0", b"\2\0", b"\3\0", b"\x09\0"])
def test_headers_of_arrays(header, version):
    for data in bytes(8), b"":
        archive("in.npz", [("a.npy", npy(header, data, version))])
        refused("in.npz", "expected an .npz file")


@pytest.mark.parametrize(
    "content",
    [
        (2**63).to_bytes(8, "little") + b"{}", (10**9).to_bytes(8, "little") + b"{}", b"\xff" * 8, b"",
        b'{"a":' * 3000, b'{"a":{"dtype":"F32","shape":[1073741824,1073741824,16],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}', b'{"__metadata__":{"a":[[[[]]]]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', b'{"\x1b[2J":{"dtype":"\x1b]0;a\x07"}}',
    ],
)  # fmt: skip
def test_headers_of_safetensors(content):
    pytest.importorskip("safetensors")
    inside = content[:1] == b"{"
    Path("in.safetensors").write_bytes((len(content).to_bytes(8, "little") if inside else b"") + content + bytes(4))
    refused("in.safetensors", "expected a safetensors file")


def test_tensors_that_repeat_one_number():
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(1).expand(1 << 15, 1 << 15)}, "in.pt")
    refused("in.pt", "would grow to 4,294,967,296 bytes")


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("Add(Symbol('s0', positive=True, integer=True), Integer(1))", True), ("s0 + 1", True), ("Integer(-3)", True),
        ("Mul(Integer(2), Pow(Symbol('s77', integer=True), Integer(2)))", True), ("floor(s0/2)", True),
        ("Pow(FloorDiv(Symbol('s0', integer=True), Integer(2)), Integer(2))", True), ("Pow(s0, Integer(10))", False),
        ("Pow(Integer(9), Pow(Integer(9), Integer(9)))", False), ("Pow(Symbol('s0'), Symbol('s1'))", False),
        ("Pow(Pow(Pow(Pow(Integer(9), Integer(9)), Integer(9)), Integer(9)), Integer(9))", False), ("Add(s0", False),
        ("Pow(Pow(Integer(9), Integer(0)), s0)", False), ("Pow()", False), ("9**9**9**9", False),
        ("LShift(Integer(1), Integer(99999))", False),
        ("1 << 999999999", False), ("9" * 5000, False), ("Lambda(s0, s0)", False), ("factorial(99)", False),
        ("Function('f')(s0)", False), ("__import__('os')", False), ("Poly(s0)", False),
    ],
)  # fmt: skip
def test_formulas(text, fine):
    pytest.importorskip("torch")
    from fastbn.interop.torch.files import _is_formula

    assert _is_formula(text) is fine


# Where is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", array_files.SUFFIXES)
def test_what_cannot_be_saved_leaves_the_old_file(suffix):
    pytest.importorskip({".safetensors": "safetensors", ".npz": "numpy"}.get(suffix, "torch"))
    path = Path(f"out{suffix}")
    arrays.save(STATE, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"^out{suffix}: expected dtypes"):
        arrays.save({**STATE, "objects": np.array([{}], dtype=object)}, path)
    assert path.read_bytes() == before
    assert os.listdir() == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
class TestTemporaryFiles:
    def test_links_are_replaced_and_the_umask_holds(self):
        arrays.save(STATE, "in.npz")
        Path("precious").write_text("as it was")
        Path("out.npz").symlink_to("precious")
        before = os.umask(0o027)
        try:
            assert main(["fold", "in.npz", "out.npz"]) == 0
            arrays.save(STATE, "other.npz")
        finally:
            os.umask(before)
        assert Path("precious").read_text() == "as it was"
        assert not Path("out.npz").is_symlink()
        assert [Path(name).stat().st_mode & 0o777 for name in ("out.npz", "other.npz")] == [0o640, 0o640]

    def test_the_folder_is_private_and_has_no_name_to_guess(self, monkeypatch):
        arrays.save(STATE, "in.npz")
        seen, save = [], arrays.save

        def spy(state, path):
            seen.append((path.parent.name, path.parent.stat().st_mode & 0o777, path.parent.resolve().parent))
            save(state, path)

        monkeypatch.setattr(arrays, "save", spy)
        for _ in range(3):
            assert main(["fold", "in.npz", "out.npz"]) == 0
        names, modes, places = zip(*seen, strict=True)
        assert len(set(names)) == 3
        assert set(modes) == {0o700}
        assert set(places) == {Path.cwd()}

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
    def test_signals_leave_nothing(self, name):
        arrays.save(STATE, "in.npz")
        code = """
            import signal, sys, time
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
            for name in ("SIGTERM", "SIGHUP"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            from fastbn.cli import main
            from fastbn.interop import arrays
            save = arrays.save
            def slow(state, path):
                save(state, path)
                print("there", flush=True)
                time.sleep(60)
            arrays.save = slow
            sys.exit(main(["fold", "in.npz", "out.npz"]))
        """
        environment = os.environ | {"PYTHONPATH": str(UNDER_TEST)}
        command = [sys.executable, "-c", textwrap.dedent(code)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while b"there" not in process.stdout.readline():
                assert process.poll() is None
            assert len(os.listdir()) == 2
            process.send_signal(number := getattr(signal, name))
            _, error = process.communicate(timeout=30)
        assert process.returncode == 128 + number
        assert error.decode().strip() == f"fastbn fold: {'interrupted' if name == 'SIGINT' else f'stopped by {name}'}"
        assert os.listdir() == ["in.npz"]

    def test_signals_are_as_they_were(self):
        arrays.save(STATE, "in.npz")
        kept = signal.signal(signal.SIGTERM, handler := lambda *_: None)
        try:
            main(["fold", "in.npz", "--dry-run"])
            assert signal.getsignal(signal.SIGTERM) is handler
        finally:
            signal.signal(signal.SIGTERM, kept)
        main(["fold", "in.npz", "--dry-run"])
        assert signal.getsignal(signal.SIGTERM) is kept


# What is shown --------------------------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07\r\n\u202egnp.bn1\x9b1m"


def shown(text):
    return all(char.isprintable() or char == "\n" for char in text)


def test_names_do_nothing_to_a_terminal(capsys):
    prefix = EVIL.replace("\n", "") + "."
    arrays.save({f"{prefix}{name}": array for name, array in STATE.items()}, "in.npz")
    assert main(["fold", "in.npz", "out.npz", "--verify", "--report", "report.json"]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2J" in out
    assert shown(out)
    report = Path("report.json").read_text()
    assert report.isascii()
    assert shown(report)
    assert json.loads(report)["decisions"][0]["node"].startswith("\x1b[2J")  # there it is data


def test_names_make_no_lines_of_their_own(monkeypatch, capsys):
    decision = files.Decision("bn\nverification passed: really", "left", ("a\nb",), "why\r\x1b[A")
    files._show(files.ModelReport((decision,), 1, 1, 1, 1))
    assert len(capsys.readouterr().out.splitlines()) == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    files._show(files.ModelReport((decision,), 1, 1, 1, 1))
    assert "\x1b[A" not in capsys.readouterr().out


def test_errors_do_nothing_to_a_terminal(capsys):
    archive("in.npz", [(EVIL, b"")])
    assert main(["fold", "in.npz", "out.npz"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert shown(error)


def test_verifications_do_nothing_to_a_terminal():
    from fastbn.interop.verify import Difference, Verification

    difference = Difference(EVIL, "float32", 1, 0, 0, 1)
    assert shown(str(Verification(f"how {EVIL}", (difference,))))
    assert shown(str(Verification("how", (), failure=EVIL)))


def test_importing_reads_no_file_of_the_working_folder(tmp_path):
    (tmp_path / "numpy.pth").write_text("import os; os.mkdir('sprung')")
    run_python(f"import os; os.chdir({str(tmp_path)!r}); import fastbn, fastbn.cli, fastbn.interop.arrays")
    assert os.listdir(tmp_path) == ["numpy.pth"]
