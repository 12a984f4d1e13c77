"""What only one format can do: ONNX models that read other files, grow, or go deep; Keras models with code, or with
weights elsewhere; .h5 files that claim to be huge. What archives, headers and the command have in common:
test_security.py."""

import io
import json
import os
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from interpreter import run_python

from fastbn.cli import main

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")


@pytest.fixture
def peak():
    """How many bytes were taken at most since the test began."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


class TestOnnx:
    @pytest.fixture(autouse=True)
    def _needs_onnx(self):
        self.onnx = pytest.importorskip("onnx")
        from onnx_models import build

        from fastbn.interop import onnx as front

        self.build, self.front = build, front

    def small(self, text="(T[n,4] x) => (T[n,4] y) { c = Gemm(x, w) y = BN(c, p) }", **weights):
        return self.build(text, **{"w": (4, 4), "p": 4, **weights})

    def external(self, tensor, location, **entries):
        tensor.ClearField("raw_data")
        tensor.data_location = self.onnx.TensorProto.EXTERNAL
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=str(value))

    def refused(self, match):
        with pytest.raises(ValueError, match=match) as caught:
            self.front.load("in.onnx")
        assert str(caught.value).startswith("in.onnx: ")
        assert main(["fold", "in.onnx", "out.onnx"]) == 2

    # Other files

    @pytest.mark.parametrize("location", ["a\0b", "a" * 300, "a" * 5000, "round", ".", "pipe", "/dev/zero", "a/" * 999])
    def test_locations_that_are_no_files(self, location):
        os.symlink("round", "round")
        os.mkfifo("pipe")
        model = self.small()
        self.external(model.graph.initializer[0], location)
        Path("in.onnx").write_bytes(model.SerializeToString())
        self.refused("initializer 'w': expected (external data in|its data in)")

    def test_a_location_that_is_no_text(self):
        model = self.small()
        self.external(model.graph.initializer[0], "weights.bin")
        content = model.SerializeToString()
        Path("in.onnx").write_bytes(content.replace(b"weights.bin", b"weights\xff\xfe\xfd\xfc"))
        self.refused("initializer 'w': expected external data in")

    @pytest.mark.parametrize("where", ["function", "training", "sparse", "subgraph", "attribute"])
    def test_no_tensor_is_forgotten(self, where):
        """Wherever a tensor stands, it reads no other file, and what is written asks for none."""
        Path("../secret").write_bytes(bytes(16))
        model, helper = self.small(), self.onnx.helper
        tensor = helper.make_tensor("t", 1, [4], [1.0, 2.0, 3.0, 4.0], raw=False)
        if where == "function":
            node = helper.make_node("Constant", [], ["c"], value=tensor)
            model.functions.append(helper.make_function("own", "f", [], ["c"], [node], model.opset_import))
            tensor = model.functions[0].node[0].attribute[0].t
        elif where == "training":
            model.training_info.add().algorithm.initializer.append(tensor)
            tensor = model.training_info[0].algorithm.initializer[0]
        elif where == "sparse":
            model.graph.sparse_initializer.add(dims=[9]).values.CopyFrom(tensor)
            tensor = model.graph.sparse_initializer[0].values
        else:
            node = model.graph.node.add(op_type="Own", domain="own", output=["z"])
            entry = node.attribute.add(name="a", type=self.onnx.AttributeProto.GRAPH)
            home = entry.g.initializer if where == "subgraph" else entry.tensors
            home.append(tensor)
            tensor = home[0]
        tensor.ClearField("float_data")
        self.external(tensor, "../secret")
        Path("in.onnx").write_bytes(model.SerializeToString())
        self.refused("initializer 't': expected external data in the model's folder")

    def test_one_file_for_many_tensors(self, peak):
        """A thousand tensors of 1 MB, all of them the same bytes of one file."""
        Path("data").write_bytes(bytes(MEGABYTE))
        model = self.small()
        for number in range(1000):
            tensor = model.graph.initializer.add(name=f"t{number}", data_type=1, dims=[MEGABYTE // 4])
            self.external(tensor, "data")
        Path("in.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ValueError, match="in.onnx: initializer 't[0-9]+': expected data of its own"):
            self.front.load("in.onnx")
        assert peak() < 400 * MEGABYTE

    # Growth

    @pytest.mark.parametrize(
        "constant",
        [
            "k = ConstantOfShape<value = float[1] {1.0}>(many)", "k = Expand(one, many)", "k = Add(column, row)",
            "k0 = ConstantOfShape<value = float[1] {1.0}>(some) k1 = Concat<axis=0>(k0, k0, k0, k0, k0, k0, k0, k0) "
            "k2 = Concat<axis=0>(k1, k1, k1, k1, k1, k1, k1, k1) k = Concat<axis=0>(k2, k2, k2, k2, k2, k2, k2, k2)",
            "k = Gather(row, wide)",
            " ".join(f"k{i} = ConstantOfShape<value = float[1] {{1.0}}>(eight)" for i in range(32))
            + f" k = Sum({', '.join(f'k{i}' for i in range(32))})",
        ],
    )  # fmt: skip
    def test_constants_that_grow(self, constant, peak):
        """A few bytes that stand for gigabytes are never computed; the model is folded all the same."""
        arrays = {
            "many": np.array([1 << 16, 1 << 16]), "some": np.array([1 << 20]), "one": np.ones(1, np.float32),
            "column": np.ones((1 << 14, 1), np.float32), "row": np.ones((1, 1 << 14), np.float32),
            "wide": np.zeros(1 << 14, np.int64), "eight": np.array([1 << 23]),
        }  # fmt: skip
        text = f"(T[n,4] x) => (T[n,4] y, T[a,b] z) {{ c = Gemm(x, w) y = BN(c, p) {constant} z = Mul(k, one) }}"
        used = {name: array for name, array in arrays.items() if name in constant or name == "one"}
        folded, report = self.front.fold(self.small(text, **used))
        assert len(report.folded) == 1
        assert [node.op_type for node in folded.graph.node][-1] == "Mul"
        assert peak() < 400 * MEGABYTE

    @pytest.mark.parametrize(
        "text",
        [
            "(int64[1073741824] k, T[n,4] x) => (T[n,4] y, float[a] z) { z = Cast<to=1>(k)",
            "(int64[1073741824] k, T[n,4] x) => (T[n,4] y, int64[a] z) { z = Concat<axis=0>(k, k)",
            "(T[1073741824,1] k, T[n,4] x) => (T[n,4] y, int64[a] z) "
            "{ s = Shape<start=0, end=1>(k) t = ConstantOfShape<value = int64[1] {1}>(s) z = Concat<axis=0>(t, t)",
            "(T[n,4] x) => (T[n,4] y, int64[a] z) { s0 = Shape(x) "
            + " ".join(f"s{i + 1} = Concat<axis=0>(s{i}, s{i})" for i in range(30)) + " z = Identity(s30)",
        ],
    )  # fmt: skip
    def test_long_vectors_take_no_memory_in_shape_inference(self, text):
        """In a process of its own: the memory is ONNX's."""
        self.front.save(self.small(text + " c = Gemm(x, w) y = BN(c, p) }"), "in.onnx")
        code = f"""
            import os, resource, sys
            from fastbn.interop import onnx
            os.chdir({os.getcwd()!r})
            model = onnx.load("in.onnx")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            assert len(onnx.fold(model)[1].folded) == 1
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < {100 * 1024}
        """
        run_python(code)

    def test_shapes_are_followed_through_what_is_computed_from_them(self):
        """A Reshape to what Shape, Gather and Concat give, an Add, and the same once more."""
        text = """(T[2,4,3,3] x) => (T[n,3,4,3] y) {
            s = Shape(x) j = Gather(s, zero) t = Concat<axis=0>(j, four, nine) r = Reshape(x, t)
            a = Add(r, r) u = Shape(a) f = Gather(u, zero) g = Concat<axis=0>(f, four, three, three)
            h = Reshape(a, g) c = Conv(h, w) d = BN(c, p) k = Shape(d) m = Gather(k, zero)
            o = Concat<axis=0>(m, four, nine) q = Reshape(d, o) z = Reshape(q, g) y = Transpose<perm=[0,2,1,3]>(z) }"""
        numbers = {"zero": [0], "four": [4], "nine": [9], "three": [3]}
        arrays = {name: np.array(value) for name, value in numbers.items()}
        from fastbn.interop.onnx_graph import shapes

        found = shapes(self.build(text, opset=17, w=(4, 4, 1, 1), p=4, **arrays))
        assert [found[name] for name in "rahqz"] == [(2, 4, 9), (2, 4, 9), (2, 4, 3, 3), (2, 4, 9), (2, 4, 3, 3)]

    def test_what_is_computed_from_constants_still_is(self):
        text = "(T[n,4] x) => (T[n,4] y) { o = ConstantOfShape<value = float[1] {0.5}>(s) v = Expand(h, s)"
        text += " m = Add(v, o) q = Gather(m, i) c = Gemm(x, w) y = BatchNormalization(c, o, v, m, q) }"
        numbers = {"s": np.array([4]), "i": np.array([3, 2, 1, 0]), "h": np.full(1, 2, np.float32)}
        folded, report = self.front.fold(self.build(text, w=(4, 4), **numbers))
        assert [node.op_type for node in folded.graph.node] == ["Gemm"], str(report)

    def test_shapes_that_are_said_to_be_huge(self):
        for place in "initializer", "body":
            model = self.small()
            home = model.graph.initializer
            if place == "body":
                entry = model.graph.node.add(op_type="Own", domain="own", output=["z"]).attribute.add(name="a", type=5)
                home = entry.g.initializer
            home.append(self.onnx.TensorProto(name="t", data_type=1, dims=[2**32, 2**32], raw_data=bytes(8)))
            with pytest.raises(ValueError, match="'t': expected the values of shape"):
                self.front.fold(model)

    # Depth

    def test_long_chains(self):
        """Of constants, and of layers: longer than Python can recurse."""
        length = 3000
        chain = [f"k{i + 1} = Identity(k{i})" for i in range(length)]
        data = [f"d{i + 1} = Relu(d{i})" for i in range(length)]
        text = f"""(T[n,4] x) => (T[n,4] y) {{ {" ".join(chain)} c = Gemm(x, w) d0 = BN(c, p) {" ".join(data)}
            y = Add(d{length}, k{length}) }}"""
        folded, report = self.front.fold(self.small(text, k0=np.ones(4, np.float32)))
        assert len(report.folded) == 1
        assert len(folded.graph.node) == length + 2

    @pytest.mark.parametrize("depth", [20, 400])
    def test_bodies_in_bodies(self, depth):
        """Protobuf reads no deeper than 100 messages; what it reads, is folded."""
        from google.protobuf.message import DecodeError

        def nested(content, number):  # field `number` of a message, by hand: no library would write it
            size, length = len(content), b""
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            return bytes([number << 3 | 2]) + length + bytes([size]) + content

        model = self.small()
        body = nested(nested(b"deep", 2), 1)  # a graph with a node with an output
        for _ in range(depth):
            attribute = nested(b"b", 1) + nested(body, 6) + b"\xa0\x01\x05"  # its name, its graph, its type
            body = nested(nested(b"k", 1) + nested(b"If", 4) + nested(attribute, 5), 1)
        content = model.SerializeToString() + nested(body, 7)
        Path("in.onnx").write_bytes(content)
        if depth == 400:
            self.refused("expected an ONNX model")
            with pytest.raises(DecodeError):
                self.onnx.load_model_from_string(content)
        else:
            assert main(["fold", "in.onnx", "out.onnx"]) in (0, 2)

    def test_what_cannot_be_saved_leaves_the_old_files(self, monkeypatch):
        model = self.small()
        self.front.save(model, "out.onnx")
        before = Path("out.onnx").read_bytes()
        monkeypatch.setattr(self.front.ModelProto, "SerializeToString", lambda _: 1 / 0)
        for location in None, "data":
            with pytest.raises(ZeroDivisionError):
                self.front.save(model, "out.onnx", location=location)
        assert os.listdir() == ["out.onnx"]
        assert Path("out.onnx").read_bytes() == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
class TestKeras:
    @pytest.fixture(autouse=True)
    def _needs_keras(self, monkeypatch):
        pytest.importorskip("torch")
        monkeypatch.setenv("KERAS_BACKEND", "torch")
        self.keras = pytest.importorskip("keras")
        self.h5py = pytest.importorskip("h5py")
        from fastbn.interop import keras as front

        self.front = front
        model = self.keras.Sequential([self.keras.Input((3,)), self.keras.layers.Dense(2, name="dense")])
        model.save("in.keras")
        model.save("in.h5")

    def refused(self, path, match):
        with pytest.raises(ValueError, match=match) as caught:
            self.front.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert not Path("sprung").exists()

    def change(self, path, layer=None, weights=None):
        """Give both kinds of file another layer's config, or change the HDF5 file that holds the weights."""

        def replaced(config):
            config = json.loads(config)
            if layer:
                config["config"]["layers"].append(layer)
            return json.dumps(config)

        if path == "in.h5":
            with self.h5py.File(path, "r+") as file:
                file.attrs["model_config"] = replaced(file.attrs["model_config"])
                if weights:
                    weights(file)
            return
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["config.json"] = replaced(members["config.json"])
        content = io.BytesIO(members["model.weights.h5"])
        if weights:
            with self.h5py.File(content, "r+") as file:
                weights(file)
        members["model.weights.h5"] = content.getvalue()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    @pytest.mark.parametrize("path", ["in.keras", "in.h5"])
    @pytest.mark.parametrize("kind", ["Lambda", "__lambda__", "TFSMLayer", "TorchModuleWrapper"])
    def test_layers_that_are_programs(self, path, kind):
        config = {"name": "a", "module": "x", "function": "x", "filepath": "x"}
        for nested in False, True:
            inner = {"class_name": kind, "module": "keras.layers", "config": config}
            self.change(path, {"class_name": "TimeDistributed", "config": {"layer": inner}} if nested else inner)
            self.refused(path, f"it has a {kind} layer, whose code is not run")

    @pytest.mark.parametrize("path", ["in.keras", "in.h5"])
    @pytest.mark.parametrize("how", ["link", "storage", "virtual"])
    def test_weights_in_other_files(self, path, how):
        Path("secret").write_bytes(bytes(64))

        def weights(file):
            if how == "link":
                file["outside"] = self.h5py.ExternalLink("secret.h5", "/")
            elif how == "storage":
                file.create_dataset("a/b", (2, 2), "f4", external=[("secret", 0, 16)])
            else:
                layout = self.h5py.VirtualLayout((4,), "f4")
                layout[:] = self.h5py.VirtualSource("secret.h5", "a", (4,))
                file.create_virtual_dataset("a/b", layout)

        self.front.load(path)
        self.change(path, weights=weights)
        self.refused(path, "it has weights in another file")

    @pytest.mark.parametrize("path", ["in.keras", "in.h5"])
    def test_arrays_that_claim_to_be_huge(self, path, peak):
        def weights(file):
            file.create_dataset("a", (1 << 40,), "f4", chunks=(1 << 10,))

        self.change(path, weights=weights)
        self.refused(path, "its arrays would grow to 4,398,[0-9,]+ bytes")
        assert peak() < 100 * MEGABYTE

    @pytest.mark.parametrize("name", ["a" * 256, "assets/" + "é" * 128 + "/a", "config.json/a"])
    def test_names_that_no_file_can_have_leave_nothing_unpacked(self, name, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with zipfile.ZipFile("in.keras", "a") as archive:
            archive.writestr("assets/a", "unpacked")
            archive.writestr(name, "")
        before = sorted(tmp_path.iterdir())
        self.refused("in.keras", "cannot be a file")
        assert sorted(tmp_path.iterdir()) == before

    def test_weights_of_a_kind_that_keras_does_not_write(self):
        with zipfile.ZipFile("in.keras", "a") as archive:
            archive.writestr("model.weights.npz", b"")
        self.refused("in.keras", "it has weights in model.weights.npz")

    @pytest.mark.parametrize("depth", [50, 100_000])
    def test_deep_configs(self, depth):
        with zipfile.ZipFile("in.keras", "w") as archive:
            archive.writestr("config.json", '{"config":' * depth + "1" + "}" * depth)
            archive.writestr("metadata.json", "{}")
        self.refused("in.keras", "expected a Keras model")
