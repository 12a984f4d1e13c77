"""Paths that callers give, and files that take the places of others: all of them or none."""

import errno
import os
import stat

import numpy as np
import pytest
from interpreter import run_python

from fastbn import nn
from fastbn.cli import main
from fastbn.paths import check_path, replacing


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def read(path):
    with open(path) as file:
        return file.read()


def names():
    return sorted(os.listdir())


@pytest.mark.parametrize("path", [b"a.npz", "a.npz", os.path.join("b", "a.npz")])
def test_paths_are_text(path):
    assert check_path(path) == os.fsdecode(path)


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        (None, TypeError, "path: expected a str or os.PathLike, got NoneType"),
        (3, TypeError, "path: expected a str or os.PathLike, got int"),
        ("a\0b", ValueError, "path: expected a name without an embedded null byte, got 'a\\\\x00b'"),
        ("\ud800", ValueError, "path: expected text that the file system can encode"),
    ],
)
def test_what_is_no_path_is_refused_by_its_name(path, error, message):
    with pytest.raises(error, match=message):
        check_path(path)


def test_a_file_takes_its_place_when_it_is_whole():
    write("model.npz", "before")
    with replacing("model.npz") as [temporary]:
        write(temporary, "after")
        assert read("model.npz") == "before"
    assert read("model.npz") == "after"
    assert names() == ["model.npz"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_what_fails_leaves_all_as_it_was(error):
    write("model.npz", "before")

    def attempt():
        with replacing("data.bin", "model.npz") as temporaries:
            for temporary in temporaries:
                write(temporary, "after")
            raise error

    with pytest.raises(error):
        attempt()
    assert read("model.npz") == "before"
    assert names() == ["model.npz"]


@pytest.mark.parametrize("there", [True, False], ids=["replaced", "new"])
@pytest.mark.parametrize("files", [["a"], ["data.bin", "model.onnx"], ["data.bin", "more.bin", "model.onnx"]], ids=len)
def test_all_files_are_moved_or_none(files, there, monkeypatch):
    """Whichever step fails, no file of before is left beside one of after, nor a temporary one."""
    real, steps, failing = os.replace, 0, None

    def replace(source, target):
        nonlocal steps
        steps += 1
        if steps - 1 == failing:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    def attempt():
        with replacing(*files) as temporaries:
            for temporary in temporaries:
                write(temporary, "after")

    monkeypatch.setattr(os, "replace", replace)
    for failing in range(len(files) * (1 + (there and len(files) > 1))):  # noqa: B007 replace() reads it
        for file in files if there else []:
            write(file, "before")
        steps = 0
        with pytest.raises(PermissionError) as caught:
            attempt()
        assert caught.value.filename in files
        assert names() == (sorted(files) if there else [])
        assert all(read(file) == "before" for file in names())
    attempt()  # without a failure
    assert names() == sorted(files)
    assert all(read(file) == "after" for file in names())


def test_no_model_is_seen_with_the_data_of_another(monkeypatch):
    """Between any two steps."""
    files = ["data.bin", "model.onnx"]
    for file in files:
        write(file, "before")
    seen = []

    def look():
        seen.append(tuple(read(file) if os.path.exists(file) else None for file in files))

    real = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (look(), real(*names), look()))
    with replacing(*files) as temporaries:
        for temporary in temporaries:
            write(temporary, "after")
    assert seen[0] == ("before", "before")
    assert seen[-1] == ("after", "after")
    assert ("after", "before") not in seen
    assert ("before", "after") not in seen


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_file_keeps_its_mode():
    write("model.npz", "before")
    os.chmod("model.npz", 0o600)
    model = nn.Sequential(nn.Dense(2, 2), seed=0)
    for name in ("model.npz", "new.npz"):
        model.save(name)
    write("ordinary", "")
    assert stat.S_IMODE(os.stat("model.npz").st_mode) == 0o600
    assert os.stat("new.npz").st_mode == os.stat("ordinary").st_mode


def test_a_link_is_replaced_and_what_it_leads_to_is_kept():
    write("other", "other")
    os.symlink("other", "link")
    with replacing("link") as [temporary]:
        write(temporary, "after")
    assert not os.path.islink("link")
    assert (read("link"), read("other")) == ("after", "other")


def test_places_that_no_file_can_take():
    os.mkdir("folder")
    for path, error in (("folder", IsADirectoryError), (os.path.join("none", "a"), FileNotFoundError)):
        with pytest.raises(error) as caught, replacing("data.bin", path):
            pytest.fail("the block has begun")
        assert caught.value.filename == path
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        with pytest.raises(ValueError, match="path: expected a file, got a device"), replacing("pipe"):
            pytest.fail("the block has begun")
    assert names() == ["folder", *(["pipe"] if hasattr(os, "mkfifo") else [])]


def test_the_temporary_file_has_the_suffix():
    for path in ("a.keras", "..keras", os.path.join(".", "b.c.pt2"), "d"):
        with replacing(path) as [temporary]:
            write(temporary, "")
            assert os.path.basename(temporary).startswith(".fastbn-")
            assert temporary.endswith(path[path.rfind(".") :] if "." in path else "")


FUNCTIONS = [
    ("fastbn.nn", "load", ()), ("fastbn.interop.arrays", "load", ()), ("fastbn.interop.arrays", "save", ({},)),
    ("fastbn.interop.onnx", "load", ()), ("fastbn.interop.onnx", "external_files", ()),
    ("fastbn.interop.onnx", "save", (None,)), ("fastbn.interop.keras", "load", ()),
    ("fastbn.interop.keras", "save", (None,)),
    ("fastbn.interop.torch", "load", ()), ("fastbn.interop.torch", "load_state_dict", ()),
    ("fastbn.interop.torch", "save_state_dict", ({},)),
]  # fmt: skip


@pytest.mark.parametrize(("module", "name", "first"), FUNCTIONS, ids=lambda value: str(value).rpartition(".")[2])
def test_every_function_checks_its_path(module, name, first):
    function = getattr(pytest.importorskip(module, exc_type=ModuleNotFoundError), name)
    for path, error in ((3, TypeError), ("a\0b.npz", ValueError), ("\ud800.npz", ValueError)):
        with pytest.raises(error, match="^path: expected"):
            function(*first, path)
    assert names() == []
    model = nn.Sequential(nn.Dense(2, 2), seed=0)
    with pytest.raises(ValueError, match="^path: expected"):
        model.save("\ud800")


def test_saved_state_dicts_are_equal():
    """PyTorch would write the name of the file into it, which is a new one each time."""
    torch = pytest.importorskip("torch")
    from fastbn.interop.torch import load_state_dict, save_state_dict

    state = {"weight": torch.arange(6.0).reshape(2, 3)}
    for name in ("a.pt", "b.pt"):
        save_state_dict(state, name)
    with open("a.pt", "rb") as a, open("b.pt", "rb") as b:
        assert a.read() == b.read()
    assert torch.equal(load_state_dict("a.pt")["weight"], state["weight"])


def test_an_onnx_model_that_cannot_be_written_keeps_its_weights(monkeypatch):
    onnx = pytest.importorskip("onnx")
    from fastbn.interop import onnx as interop

    def model(value):
        weight = onnx.numpy_helper.from_array(np.full(1000, value, np.float32), "w")
        inputs, outputs = ([onnx.helper.make_tensor_value_info(n, 1, [1000])] for n in "xy")
        nodes = [onnx.helper.make_node("Add", ["x", "w"], ["y"])]
        return onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", inputs, outputs, [weight]))

    interop.save(model(1.0), "model.onnx", location="weights")
    real, refused = os.replace, []

    def replace(source, target):
        if target == "model.onnx" and not refused:  # which comes after the weights
            assert os.path.exists("weights")
            refused.append(target)
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(PermissionError):
            interop.save(model(2.0), "model.onnx", location="weights")
    assert onnx.numpy_helper.to_array(interop.load("model.onnx").graph.initializer[0])[0] == 1.0
    assert names() == ["model.onnx", "weights"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs")
@pytest.mark.parametrize(("module", "name"), [(m, n) for m, n, first in FUNCTIONS if not first])
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".keras"])
def test_nothing_waits_for_a_pipe(module, name, suffix):
    function = getattr(pytest.importorskip(module, exc_type=ModuleNotFoundError), name)
    os.mkfifo(f"pipe{suffix}")
    with pytest.raises((ValueError, FileNotFoundError), match="pipe|suffix|expected a file"):
        function(f"pipe{suffix}")


def test_bfloat16_needs_no_import_of_the_callers():
    code = """
import fastbn
print(fastbn.BatchNorm(2, dtype="bfloat16").running_mean.dtype)
"""
    assert run_python(code).stdout.split() == ["float32"]
    pytest.importorskip("safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from fastbn.interop import arrays

    path = os.path.abspath("half.safetensors")
    arrays.save({"w": np.ones((2, 3), ml_dtypes.bfloat16)}, path)
    code = f"from fastbn.interop import arrays; print(arrays.load({path!r})['w'].dtype)"
    assert run_python(code).stdout.split() == ["bfloat16"]


def test_a_full_disk_and_a_file_that_may_not_be_read_are_oserrors(monkeypatch):
    safetensors = pytest.importorskip("safetensors.numpy")
    from fastbn.interop import arrays

    def full(*args, **kwargs):
        raise safetensors_error("Error while serializing: I/O error: No space left on device (os error 28)")

    safetensors_error = pytest.importorskip("safetensors").SafetensorError
    monkeypatch.setattr(safetensors, "save_file", full)
    with pytest.raises(OSError, match="No space left") as caught:
        arrays.save({"w": np.ones(3)}, "a.safetensors")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "a.safetensors")


def test_a_model_of_nn_is_not_folded_as_arrays():
    """Which would take another eps for its own, and leave a description of layers that are gone."""
    from fastbn.interop import arrays

    model = nn.Sequential(nn.Dense(2, 3, bias=False), nn.BatchNorm(3, eps=0.5), seed=0)
    model.save("model.npz")
    with pytest.raises(ValueError, match=r"^state: expected no model of fastbn.nn.*nn.load\(path\).fold\(\).save"):
        arrays.fold(arrays.load("model.npz"))
    assert main(["fold", "model.npz", "folded.npz"]) == 2
    assert names() == ["model.npz"]
