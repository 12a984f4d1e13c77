"""What fuzz_loaders.py damages, and how: valid files of every format, and mutators that know zip archives, .npy
headers, JSON and ONNX messages, so that damage gets past checksums and lengths. Some put in pickles and texts that
would leave a file named "sprung" if they were run."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

NUMBERS = [-1, 0, 1, 2, 7, 127, 128, 255, 1000, 2**15, 2**16, 10**9, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63]
NUMBERS += [2**64, -(2**63), 10**30]
TEXTS = ["", ".", "..", "../../sprung", "/sprung", "C:\\sprung", "a\0b", "\x1b[2J", "\u202e", "a" * 5000, "\udc80"]
TEXTS += ["conv1.weight", "bn1.running_var", "[" * 2000, "9**9**9**9", "__import__('os').mkdir('sprung')"]
DTYPES = ["<f4", ">f4", "<f8", "<f2", "|O", "<U0", "|V0", "|V2", "<i8", "|b1", "<M8[ns]", "|S9", "<U100000000"]


def within(folder: Path) -> None:
    """Let the absolute path among the texts lead into a folder that is looked at."""
    TEXTS[TEXTS.index("/sprung")] = str(folder / "sprung")


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("sprung", "w")


# Bytes --------------------------------------------------------------------------------------------------------------


def damage(content: bytes, rng: Random) -> bytes:
    """Change a few bytes: bits, lengths, digits, what is cut out, cut off, put in or said twice."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice([1, 2, 4, 8, 30, 300]))
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                width = rng.choice([1, 2, 4, 8])
                number = rng.choice(NUMBERS) % 256**width
                data[at : at + width] = number.to_bytes(width, rng.choice(["little", "little", "big"]))
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = rng.randbytes(end - at)
            case 5:
                data[at:at] = data[at:end]
            case 6:
                del data[at:]
            case 7 if digits := list(re.finditer(rb"\d+", data)):
                run = rng.choice(digits)
                data[run.start() : run.end()] = str(rng.choice(NUMBERS)).encode()
    return bytes(data)


def damage_numbers(data: bytes, rng: Random) -> bytes:
    """Change bytes, not their number: zero, NaN, infinity, negative variances."""
    at = rng.randrange(len(data) + 1) & -4
    number = rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf"), rng.gauss(0, 1)])
    return (data[:at] + struct.pack("<f", number) + data[at + 4 :])[: len(data)]


# JSON ---------------------------------------------------------------------------------------------------------------


def damage_json(text: bytes, rng: Random) -> bytes:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return damage(text, rng)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
            places.append((node, key))
            walk(value)

    walk(tree)
    for _ in range(rng.choice([1, 1, 2])):
        if not places:
            break
        node, key = rng.choice(places)
        if key not in (node if isinstance(node, dict) else range(len(node))):
            continue
        match rng.randrange(6):
            case 0:
                del node[key]
            case 1:
                node[key] = rng.choice(NUMBERS)
            case 2:
                node[key] = rng.choice(TEXTS)
            case 3:
                other, name = rng.choice(places)
                with contextlib.suppress(LookupError):
                    node[key] = copy.deepcopy(other[name])
            case 4:
                node[key] = rng.choice([None, True, [], {}, 0.5, [node[key]], {"a": node[key]}])
            case 5:
                for _ in range(rng.choice([3, 60, 400])):
                    node[key] = [node[key]]
    try:
        return json.dumps(tree).encode()
    except RecursionError:
        return b"[" * 5000 + text


# Archives -----------------------------------------------------------------------------------------------------------


def members_of(content: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def archive_of(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name or "a"), content, method)
    return out.getvalue()


def damage_npy(content: bytes, rng: Random) -> bytes:
    """Give an array another header, of the right length, or other numbers."""
    if content[:6] != b"\x93NUMPY" or rng.random() < 0.3:
        return damage(content, rng)
    at = 10 + int.from_bytes(content[8:10], "little")
    data = content[at:]
    if rng.random() < 0.4:
        return content[:at] + damage_numbers(data, rng)
    shape = [rng.choice([*NUMBERS, 1, 2, 3]) for _ in range(rng.choice([0, 1, 1, 2, 40]))]
    descr: Any = rng.choice(DTYPES)
    if rng.random() < 0.2:
        descr = [("a", descr, tuple(shape[:1])), ("b", [("c", "<f4")])]
    header = repr({"descr": descr, "fortran_order": rng.random() < 0.2, "shape": tuple(shape)})
    if rng.random() < 0.3:
        header = rng.choice(["(" * 150, "-" * 3000 + "1", "{" * 90, header[:-9], header.replace(",", "L,"), "9" * 5000])
    text = header.encode("latin1", "replace") + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def damage_member(name: str, content: bytes, rng: Random) -> bytes:
    if name.endswith(".npy"):
        return damage_npy(content, rng)
    if name.endswith(".json"):
        return damage_json(content, rng)
    if name.endswith(".pkl") and rng.random() < 0.1:
        return pickle.dumps(Trap(), protocol=2)
    return damage(content, rng)


def damage_archive(content: bytes, rng: Random) -> bytes:
    """Change an archive's members, or what it says of them, or just bytes."""
    try:
        members = members_of(content)
    except Exception:  # it is damaged already
        return damage(content, rng)
    if not members or rng.random() < 0.15:
        return damage(content, rng)
    method = zipfile.ZIP_STORED
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(members))
        name, data = members[at]
        match rng.choice("cccccccccccrrdtnbmzp"):
            case "c":
                members[at] = name, damage_member(name, data, rng)
            case "r":
                new = rng.choice([*TEXTS, members[0][0], f"{name}.npy", name.upper()])
                members[at] = new.replace("\udc80", "?"), data
            case "d":
                del members[at : at + 1]
                members = members or [("a.npy", b"")]
            case "t":
                members.insert(rng.randrange(len(members)), (name, data))
            case "n":
                members.append((rng.choice(["a.npy", "a.zip", "assets/a"]), archive_of(members)))
            case "b":
                members.append(("bomb.npy", bytes(1 << 22)))
                method = zipfile.ZIP_DEFLATED
            case "m":
                method = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
            case "z":
                members += [(f"{i}.npy", b"") for i in range(rng.choice([10, 300]))]
            case "p":
                members.append((rng.choice(["a.npy", "a.pkl", "data.pkl"]), pickle.dumps([Trap()])))
    content = archive_of(members, method)
    if rng.random() < 0.2 and (at := content.find(b"PK\x01\x02")) >= 0:  # sizes and offset in the central directory
        field = at + rng.choice([10, 16, 20, 24, 28, 30, 32, 42])
        content = content[:field] + struct.pack("<I", rng.choice(NUMBERS) % 2**32) + content[field + 4 :]
    return content


# ONNX ---------------------------------------------------------------------------------------------------------------


def damage_onnx(content: bytes, rng: Random) -> bytes:
    """Change the fields of a model's message anywhere, so that it is one still; or bytes."""
    import onnx

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # it is damaged already
        return damage(content, rng)
    if rng.random() < 0.25:
        return damage(content, rng)
    for _ in range(rng.choice([1, 1, 2, 3])):
        messages = list(messages_in(model))
        damage_field(rng.choice(messages), messages, rng)
    if rng.random() < 0.05 and model.graph.node:  # bodies in bodies, further down than anybody reads
        for _ in range(rng.choice([5, 20])):
            inner = onnx.GraphProto()
            inner.CopyFrom(model.graph)
            del model.graph.node[:]
            node = model.graph.node.add(op_type="If", input=inner.node[0].input, output=inner.node[-1].output)
            node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g.CopyFrom(inner)
    return model.SerializeToString()


def messages_in(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for entry in value if field.is_repeated else [value]:
                yield from messages_in(entry)


def damage_field(message: Any, messages: list[Any], rng: Random) -> None:
    fields = list(message.DESCRIPTOR.fields) if rng.random() < 0.15 else [field for field, _ in message.ListFields()]
    if not fields:
        return
    field = rng.choice(fields)
    with contextlib.suppress(ValueError, TypeError, OverflowError):  # a number that the field cannot hold
        if field.message_type is not None:
            alike = [m for m in messages if m.DESCRIPTOR.full_name == field.message_type.full_name]
            if not alike or rng.random() < 0.3:
                message.ClearField(field.name)
                return
            other = copy.deepcopy(rng.choice(alike))  # it may be what it goes into
            if field.is_repeated:
                getattr(message, field.name).append(other)
            else:
                getattr(message, field.name).CopyFrom(other)
            return
        values = getattr(message, field.name)
        others = [getattr(m, field.name) for m in messages if m.DESCRIPTOR == message.DESCRIPTOR]
        old = (values[0] if values else None) if field.is_repeated else values
        match old:
            case str():
                new = rng.choice([*TEXTS, *(o for o in others if isinstance(o, str)), *map(str, NUMBERS)])
            case bytes():
                new = damage(old, rng)
            case float():
                new = rng.choice([0.0, -1.0, 1e38, float("nan"), float("inf")])
            case _:
                new = rng.choice([*range(-2, 24), *NUMBERS])
        if not field.is_repeated:
            setattr(message, field.name, rng.choice([new, new, rng.choice(others)]))
        elif values and rng.random() < 0.6:
            values[rng.randrange(len(values))] = new
        else:
            values.extend([new] * rng.choice([1, 2, 70]))


def damage_safetensors(content: bytes, rng: Random) -> bytes:
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.3 or size > len(content):
        return damage(content, rng)
    if rng.random() < 0.3:
        return content[: 8 + size] + damage_numbers(content[8 + size :], rng)
    header = damage_json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def damage_pt(content: bytes, rng: Random) -> bytes:
    return damage_archive(content, rng) if content[:2] == b"PK" else damage(content, rng)


# Valid files --------------------------------------------------------------------------------------------------------


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = "weight", "bias", "running_mean", "running_var"
    norm = {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in names}
    return {
        "conv1.weight": rng.normal(size=(4, 2, 3, 3)).astype(np.float32),
        **{f"bn1.{name}": array for name, array in norm.items()},
        "bn1.num_batches_tracked": np.array(9),
        "fc.weight": rng.normal(size=(3, 4)),
    }


def saved(folder: Path, suffix: str) -> list[bytes]:
    from fastbn.interop import arrays as front

    path = folder / f"seed{suffix}"
    front.save(arrays(), path)
    content = path.read_bytes()
    path.unlink()
    return [content]


def npz(folder: Path) -> list[bytes]:
    compressed = io.BytesIO()
    np.savez_compressed(compressed, **arrays())
    return [*saved(folder, ".npz"), compressed.getvalue()]


def onnx_models(folder: Path) -> list[bytes]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    body = """(float[n,2,8,8] x, bool k) => (float[n,z] y) {
        t = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>() s = Unsqueeze(w, axes) w1 = Reshape(s, shape)
        c = Conv<pads=[1,1,1,1]>(x, w1) d = BatchNormalization<epsilon=0.001>(c, g, b, m, v)
        i, j = Split<axis=1>(d, parts)
        o = Concat<axis=1>(j, i) l = MaxPool<kernel_shape=[2,2], strides=[2,2]>(o)
        e = BatchNormalization(l, t, b, m, v) q = Pad(e, pads) r = Resize<mode="linear">(q, , scales)
        h = Relu(r) a = GlobalAveragePool(h) f = Flatten(a) p = MatMul(f, u) p1 = Add(p, u1)
        p2 = BatchNormalization(p1, t, b, m, v) ee = Expand(one, four)
        zz = ConstantOfShape<value = float[1] {0.5}>(four)
        p3 = Mul(p2, ee) p4 = Add(p3, zz) y = If(k)<then_branch = g1 () => (float[n,z] y1) { y1 = Relu(p4) },
        else_branch = g2 () => (float[n,z] y2) { y2 = BatchNormalization(p4, g, b, m, v) }> }"""
    rng = np.random.default_rng(0)
    integers = {"axes": [3], "shape": [4, 2, 3, 3], "parts": [2, 2], "pads": [0] * 7 + [1], "four": [4]}
    weights = {name: np.array(value) for name, value in integers.items()}
    weights |= {name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in "gbmv"}
    weights |= {"w": rng.normal(size=(8, 3, 3)), "u": rng.normal(size=(4, 4)), "u1": rng.normal(size=4)}
    weights |= {"one": np.ones(1), "scales": np.array([1, 1, 2, 2])}
    graph = onnx.parser.parse_graph(f"g {body}")
    for name, array in weights.items():
        array = array if name in integers else array.astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(array, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    inside = model.SerializeToString()
    data = b""
    for tensor in graph.initializer:
        model.graph.initializer[list(weights).index(tensor.name)].data_location = TensorProto.EXTERNAL
    for tensor in model.graph.initializer:
        entries = {"location": "weights.bin", "offset": len(data), "length": len(tensor.raw_data)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        data += tensor.raw_data
        tensor.ClearField("raw_data")
    (folder / "weights.bin").write_bytes(data)
    return [inside, model.SerializeToString()]


def pt(folder: Path) -> list[bytes]:
    import torch

    state = {name: torch.from_numpy(array.copy()) for name, array in arrays().items()}
    state["strided"], state["half"] = torch.ones(3, 4).t(), torch.ones(2, dtype=torch.bfloat16)
    old = io.BytesIO()
    torch.save(state, old, _use_new_zipfile_serialization=False)
    return [*saved(folder, ".pt"), old.getvalue()]


def pt2(folder: Path) -> list[bytes]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).eval()
    batch = torch.export.Dim("batch", min=2, max=7)
    program = torch.export.export(net, (torch.ones(3, 2, 4, 4),), dynamic_shapes=[{0: batch}])
    out = io.BytesIO()
    torch.export.save(program, out)
    return [out.getvalue()]


def keras_model(folder: Path, suffix: str) -> list[bytes]:
    import keras

    x = keras.Input((6, 6, 2), name="x")
    y = keras.layers.ReLU()(keras.layers.BatchNormalization()(keras.layers.Conv2D(3, 3)(x)))
    model = keras.Model(x, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(y)))
    path = folder / f"seed{suffix}"
    model.save(path)
    content = path.read_bytes()
    path.unlink()
    return [content]


def models(folder: Path) -> list[bytes]:
    import fastbn
    from fastbn import nn

    path = folder / "seed.npz"
    first = nn.Standardizer(fastbn.Standardizer().fit(np.eye(4)))
    nn.Sequential(first, nn.Dense(4, 3), nn.BatchNorm(3), nn.ReLU(), nn.Dense(3, 2)).save(path)
    content = path.read_bytes()
    path.unlink()
    return [content]


SEEDS: dict[str, Callable[[Path], list[bytes]]] = {
    "npz": npz, "safetensors": lambda folder: saved(folder, ".safetensors"), "onnx": onnx_models, "pt": pt, "pt2": pt2,
    "keras": lambda folder: keras_model(folder, ".keras"), "h5": lambda folder: keras_model(folder, ".h5"),
    "nn": models,
}  # fmt: skip
MUTATORS: dict[str, Callable[[bytes, Random], bytes]] = {
    "npz": damage_archive, "safetensors": damage_safetensors, "onnx": damage_onnx, "pt": damage_pt,
    "pt2": damage_archive, "keras": damage_archive, "h5": damage, "nn": damage_archive,
}  # fmt: skip
