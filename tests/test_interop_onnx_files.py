"""Load and save: external data stay in the model's folder, and a damaged file never raises anything unclear."""

import os
import random
import re
import signal
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from onnx import TensorProto, numpy_helper  # noqa: E402
from onnx_models import assert_same, build, norms, operators  # noqa: E402

from fastbn.interop import onnx as interop  # noqa: E402
from fastbn.interop import onnx_files  # noqa: E402

TEXT = """(T[n,2,8,8] x) => (T[n,5] y) { c = Conv<pads=[1,1,1,1]>(x, w, b) d = BN<epsilon=0.001>(c, p) r = Relu(d)
    a = GlobalAveragePool(r) f = Flatten(a) e = BN(f, q) y = Gemm<transB=1>(e, u, v) }"""
WEIGHTS = {"w": (8, 2, 3, 3), "b": (8,), "p": 8, "q": 8, "u": (5, 8), "v": (5,)}
FOLDED = ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]


@pytest.fixture(scope="module")
def model():
    return build(TEXT, **WEIGHTS)


def external(model, path, location="weights.bin", **entries):
    """Save `model` with w's data elsewhere, and say of them what `entries` say."""
    model = build(TEXT, **WEIGHTS)
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    path.write_bytes(model.SerializeToString())
    return data


def test_round_trip(model, tmp_path):
    path = tmp_path / "model.onnx"
    assert interop.save(model, path) == [path]
    assert interop.load(path) == model
    assert interop.load(str(path)) == model
    assert interop.external_files(path) == []
    assert path.read_bytes() == model.SerializeToString()


def test_fold_takes_a_path(model, tmp_path):
    path = tmp_path / "model.onnx"
    interop.save(model, path)
    before = path.read_bytes()
    for where in (path, str(path)):
        folded, _ = interop.fold(where)
        assert operators(folded) == FOLDED
        assert folded == interop.fold(model)[0]
    assert path.read_bytes() == before


def test_round_trip_with_external_data(tmp_path):
    large = build("(T[n,64] x) => (T[n,64] y) { c = Gemm(x, w) y = BN(c, p) }", w=(64, 64), p=64)
    before = large.SerializeToString(deterministic=True)
    path, data = tmp_path / "model.onnx", tmp_path / "weights.bin"
    assert interop.save(large, path, location="weights.bin") == [data, path]
    assert large.SerializeToString(deterministic=True) == before
    assert data.stat().st_size >= 64 * 64 * 4
    assert path.stat().st_size < 64 * 64 * 4
    assert interop.external_files(path) == [data]
    loaded = interop.load(path)
    assert not any(t.data_location or t.external_data for t in loaded.graph.initializer)
    for one, other in zip(loaded.graph.initializer, large.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))
    folded, _ = interop.fold(path)
    assert operators(folded) == ["Gemm"]
    assert_same(large, folded)
    # Again into the same files, and into others.
    for location in "weights.bin", "other.bin":
        files = interop.save(folded, path, location=location)
        assert files == [tmp_path / location, path]
        assert_same(large, interop.load(path))
    assert data.stat().st_size < 2 * 64 * 64 * 4  # written, not appended to


def test_ctrl_c_never_comes_between_the_model_and_its_data(tmp_path, monkeypatch):
    """The data take their place first: with the old model they would be read as its own."""
    path, moved, replace = tmp_path / "model.onnx", [], os.replace

    def move(here, there):
        replace(here, there)
        moved.append(Path(there).name)
        if len(moved) == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(os, "replace", move)
    large = build("(T[n,64] x) => (T[n,64] y) { c = Gemm(x, w) y = BN(c, p) }", w=(64, 64), p=64)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interop.save(large, path, location="weights.bin")
    finally:
        signal.signal(signal.SIGINT, handler)
    assert moved == ["weights.bin", "model.onnx"]


def test_nothing_external_where_all_is_small(tmp_path):
    small = build("(T[n,2] x) => (T[n,2] y) { y = BN(x, p) }", p=2)
    path = tmp_path / "model.onnx"
    assert interop.save(small, path, location="weights.bin") == [path]
    assert interop.load(path) == small


@pytest.mark.parametrize("location", ["../weights.bin", "sub/weights.bin", "/weights.bin", "", ".", "..", "model.onnx"])
def test_a_location_is_the_name_of_a_file(model, tmp_path, location):
    with pytest.raises(ValueError, match="location: expected the name of a file in the same folder"):
        interop.save(model, tmp_path / "model.onnx", location=location)
    assert not list(tmp_path.iterdir())


def test_beyond_what_a_message_can_hold(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "LARGEST", 100)
    monkeypatch.setattr(onnx_files, "EMBEDDED", 64)
    path = tmp_path / "model.onnx"
    assert interop.save(model, path) == [tmp_path / "model.onnx.data", path]
    assert [operators(interop.fold(path)[0])] == [FOLDED]


def test_external_data_of_constants_and_subgraphs(tmp_path):
    text = """(T[n,2] x, bool k) => (T[n,2] y) { c = Constant<value = float[1,2] {1.0, 2.0}>() d = Mul(x, c)
        y = If(k)<then_branch = t () => (T[n,2] z) { e = Constant<value = float[2] {1.0, 2.0}>() z = Add(d, e) },
        else_branch = f () => (T[n,2] u) { u = Identity(d) }> }"""
    model = build(text)
    outer, inner = model.graph.node[0].attribute[0].t, model.graph.node[2].attribute[0].g.node[0].attribute[0].t
    data = b""
    for tensor in (outer, inner):
        raw = numpy_helper.to_array(tensor).tobytes()
        tensor.ClearField("float_data")
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "data", "offset": len(data), "length": len(raw)}.items():
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
        data += raw
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "data").write_bytes(data)
    assert interop.external_files(path) == [tmp_path / "data"]
    assert_same(build(text), interop.load(path))
    (tmp_path / "data").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="model.onnx: initializer"):
        interop.load(path)


# External data that are not where they should be --------------------------------------------------------------------

OUTSIDE = [
    "../weights.bin", "sub/../../weights.bin", "sub/../weights.bin", "..", "..\\weights.bin",
    "sub\\..\\..\\weights.bin",
    "/etc/passwd", "//server/weights.bin", "C:\\weights.bin", "C:weights.bin", "\\weights.bin",
    "\\\\server\\share\\weights.bin", "",
]  # fmt: skip


@pytest.mark.parametrize("location", OUTSIDE)
@pytest.mark.parametrize("read", [interop.load, interop.external_files, interop.fold])
def test_no_path_leads_out_of_the_folder(model, tmp_path, location, read):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    data = external(model, folder / "model.onnx", location)
    for place in (tmp_path, folder):
        (place / "weights.bin").write_bytes(data)
    expected = "expected external data in the model's folder, and no link that leads out of it"
    place = f"model.onnx: initializer 'w': {expected}, got location {location!r}"
    with pytest.raises(ValueError, match=re.escape(place)):
        read(folder / "model.onnx")


def test_no_link_leads_out_of_the_folder(model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    data = external(model, folder / "model.onnx", "weights.bin")
    (tmp_path / "secret").write_bytes(data)
    (folder / "weights.bin").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="expected external data in the model's folder"):
        interop.load(folder / "model.onnx")
    (folder / "weights.bin").unlink()
    (folder / "sub").symlink_to(tmp_path)
    external(model, folder / "model.onnx", "sub/secret")
    with pytest.raises(ValueError, match="expected external data in the model's folder"):
        interop.load(folder / "model.onnx")


def test_a_model_may_be_read_through_a_link(model, tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "weights.bin").write_bytes(external(model, folder / "model.onnx", "sub/weights.bin"))
    (tmp_path / "link").symlink_to(folder)
    assert operators(interop.fold(tmp_path / "link" / "model.onnx")[0]) == FOLDED


@pytest.mark.parametrize("read", [interop.load, interop.external_files])
def test_missing_data(model, tmp_path, read):
    external(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="initializer 'w': expected its data in 'weights.bin', got no such file"):
        read(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").mkdir()
    with pytest.raises(ValueError, match="initializer 'w': expected its data in 'weights.bin', got no such file"):
        read(tmp_path / "model.onnx")


@pytest.mark.parametrize("entries", [
    {"offset": -1}, {"length": -1}, {"offset": 10**30}, {"length": 10**30}, {"offset": 2**63},
    {"offset": 1, "length": 576},
    {"offset": "one"}, {"length": "0x10"}, {"offset": ""}, {"offset": 577}, {"length": 4}, {"length": 575},
    {"offset": 1},
    {"offset": "9" * 5000},
])  # fmt: skip
def test_places_that_are_not_in_the_file(model, tmp_path, entries):
    path = tmp_path / "model.onnx"
    (tmp_path / "weights.bin").write_bytes(external(model, path, **entries))
    with pytest.raises(ValueError, match="model.onnx: initializer 'w': "):
        interop.load(path)


def test_places_in_the_file(model, tmp_path):
    path = tmp_path / "model.onnx"
    data = external(model, path, offset=16, length=576)
    (tmp_path / "weights.bin").write_bytes(b"0" * 16 + data + b"more")
    assert operators(interop.fold(path)[0]) == FOLDED
    assert interop.external_files(path) == [tmp_path / "weights.bin"]
    external(model, path, checksum="0" * 40)
    (tmp_path / "weights.bin").write_bytes(data)
    assert_same(model, interop.load(path))


@pytest.mark.parametrize("size", [0, 575])
def test_too_little_data(model, tmp_path, size):
    path = tmp_path / "model.onnx"
    (tmp_path / "weights.bin").write_bytes(external(model, path)[:size])
    with pytest.raises(ValueError, match="model.onnx: initializer 'w'"):
        interop.load(path)


# Files that are no models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"a text\n", b"\x80\x02}q\x00.", b"PK\x03\x04" + bytes(100), bytes(1000), b"\xff" * 99]
)
def test_no_model(tmp_path, content):
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for read in (interop.load, interop.fold, interop.external_files):
        with pytest.raises(ValueError, match="model.onnx: expected an ONNX model"):
            read(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        interop.load(tmp_path / "none.onnx")
    with pytest.raises(OSError, match="directory|denied"):
        interop.load(tmp_path)
    with pytest.raises(OSError, match="none"):
        interop.save(build(TEXT, **WEIGHTS), tmp_path / "none" / "model.onnx")


@pytest.mark.skipif(os.name != "posix", reason="a folder's mode means nothing here")
def test_a_file_that_may_not_be_read(model, tmp_path):
    path = tmp_path / "model.onnx"
    interop.save(model, path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(OSError, match="denied"):
        interop.load(path)


def attempt(path):
    """Load and fold; return what became of it, which is a model, or an error that says which file or what node."""
    try:
        model = interop.load(path)
    except ValueError as error:
        return "not read" if str(path) in str(error) else f"not clear: {error}"
    try:
        folded, report = interop.fold(model)
    except ValueError:
        return "not folded"
    assert len(norms(folded)) <= len(norms(model))
    folded.SerializeToString()
    str(report)
    return "folded"


def mixed():
    """A model with something of everything that is read: constants, a subgraph, shapes, axes, old forms."""
    text = """(T[n,4,8] x, bool k) => (T[n,z] y) { s = Unsqueeze(w0, axes) w = Reshape(s, shape) h = Cast<to=1>(hb)
        c = Conv<group=2, pads=[1,1], strides=[1], dilations=[1]>(x, w, h) d = BN<epsilon=0.01>(c, p)
        i, j = Split<axis=1>(d, parts) o = Concat<axis=1>(j, i) l = MaxPool<kernel_shape=[2], strides=[2]>(o)
        e = BN(l, q) g = Pad(e, pads) r = Resize<mode="linear">(g, , scales) m = ReduceMean<axes=[-1], keepdims=0>(r)
        f = MatMul(m, u) a = Add(f, v) b = BN(a, t) t1 = Transpose<perm=[1,0]>(b) t2 = Transpose<perm=[1,0]>(t1)
        n1 = Slice(t2, zero, four, one) dr, mask = Dropout(n1) y = If(k)<
        then_branch = g1 () => (T[n,z] y1) { y1 = Relu(dr) },
        else_branch = g2 () => (T[n,z] y2) { y2 = BN(dr, z) }> }"""
    numbers = {
        "axes": [2],
        "shape": [6, 2, 1],
        "parts": [2, 4],
        "pads": [0, 0, 0, 0, 0, 1],
        "zero": [0],
        "four": [4],
        "one": [1],
    }
    arrays = {name: np.array(value) for name, value in numbers.items()}
    return build(
        text, opset=13, **arrays, w0=(6, 2), hb=np.arange(6, dtype=np.float16), scales=np.array([1, 1, 2], np.float32),
        p=6, q=6, u=(6, 4), v=(1, 4), t=4, z=4,
    )  # fmt: skip


@pytest.mark.parametrize("which", ["plain", "mixed"])
def test_truncated_files(model, tmp_path, which):
    path = tmp_path / "model.onnx"
    content = (model if which == "plain" else mixed()).SerializeToString()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        assert attempt(path) in ("not read", "not folded", "folded")


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("which", ["plain", "mixed"])
def test_damaged_bytes(model, tmp_path, which, seed):
    """Anywhere: in names, kinds, shapes, attributes and lengths, and in the weights."""
    path, rng = tmp_path / "model.onnx", random.Random(f"{which} {seed}")
    content = (model if which == "plain" else mixed()).SerializeToString()
    outcomes = set()
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at = rng.randrange(len(damaged))
            match rng.randrange(4):
                case 0:
                    damaged[at] ^= 1 << rng.randrange(8)
                case 1:
                    damaged[at] = rng.randrange(256)
                case 2:
                    del damaged[at : at + rng.randrange(1, 9)]
                case 3:
                    damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(damaged)
        outcomes.add(attempt(path))
    assert {"not read", "folded"} <= outcomes <= {"not read", "not folded", "folded"}


FIELDS = ["op_type", "input", "output", "attribute", "delete", "swap", "dims", "dtype", "value", "shape"]


@pytest.mark.parametrize("seed", range(6))
def test_damaged_fields(seed):
    """A model that is one to protobuf, but not to ONNX: every node and tensor is changed in its own way."""
    rng = random.Random(seed)
    outcomes = []
    for _ in range(40):
        model = mixed()
        graph = model.graph
        names = [name for node in graph.node for name in (*node.input, *node.output)] + ["", "nowhere"]
        for _ in range(rng.choice([1, 1, 2])):
            node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
            match rng.choice(FIELDS):
                case "op_type":
                    node.op_type = rng.choice(graph.node).op_type
                case "input" if node.input:
                    node.input[rng.randrange(len(node.input))] = rng.choice(names)
                case "output":
                    node.output[0] = rng.choice(names)
                case "attribute" if node.attribute:
                    entry = rng.choice(node.attribute)
                    entry.i, entry.f = rng.choice([-3, -1, 0, 1, 2, 7, 1000]), rng.choice([-1.0, 0.0, float("nan")])
                    if entry.ints:
                        entry.ints[0] = rng.choice([-3, -1, 0, 1, 2, 7, 1000])
                case "delete":
                    field = rng.choice([node.input, node.output, node.attribute, graph.initializer, graph.node])
                    if field:
                        del field[rng.randrange(len(field))]
                case "swap":
                    other = rng.randrange(len(graph.initializer))
                    tensor.name, graph.initializer[other].name = graph.initializer[other].name, tensor.name
                case "dims" if tensor.dims:
                    tensor.dims[0] = rng.choice([-1, 0, 1, 2, 3, 10**12])
                case "dtype":
                    tensor.data_type = rng.choice(range(25))
                case "value":
                    array = numpy_helper.to_array(rng.choice(mixed().graph.initializer))
                    factor = rng.choice([0, -1, 10] + [np.nan] * (array.dtype.kind == "f"))
                    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
                case "shape" if graph.input:
                    dims = rng.choice(graph.input).type.tensor_type.shape.dim
                    if dims:
                        rng.choice(dims).dim_value = rng.choice([-1, 0, 1, 5])
        try:
            folded, report = interop.fold(model)
        except ValueError as error:
            outcomes.append(str(error))
        else:
            assert len(norms(folded)) <= len(norms(model))
            str(report)
            outcomes.append("folded")
    assert "folded" in outcomes
    assert len(set(outcomes)) > 10


def test_names_that_are_no_text(model, tmp_path):
    path = tmp_path / "model.onnx"
    content = model.SerializeToString()
    assert b"BatchNormalization" in content
    path.write_bytes(content.replace(b"BatchNormalization", b"\xff\xfetchNormalization"))
    assert attempt(path) != "not folded"  # an operator that nobody knows
    path.write_bytes(content.replace(b"p_m", b"\xff\xfe\xfd"))
    attempt(path)


def test_nothing_is_left_behind(model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    external(model, folder / "model.onnx", "weights.bin", length=10**30)
    (folder / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="initializer 'w'"):
        interop.load(folder / "model.onnx")
    assert sorted(p.name for p in folder.iterdir()) == ["model.onnx", "weights.bin"]
