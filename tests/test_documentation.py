"""What the documentation shows is run: doctests of every module, the README's code."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import fastbn

ROOT = Path(__file__).parents[1]


def modules():
    """Names of fastbn's Python modules."""
    found = pkgutil.walk_packages(fastbn.__path__, "fastbn.")
    return ["fastbn"] + [m.name for m in found if m.name not in ("fastbn.demo", "fastbn.__main__")]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.startswith("fastbn.interop.") and not str(error.name).startswith("fastbn"):
            pytest.skip(str(error))  # an extra that is not installed
        raise
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("batch_norm_train", "batch_norm_infer", "batch_norm_backward", "fold_linear", "fold_conv", "BatchNorm",
                 "Moments", "Standardizer", "set_num_threads", "num_threads"):  # fmt: skip
        public = getattr(fastbn, name)
        assert any(test.examples for test in finder.find(public)), f"{name} has no doctest"


CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXTRAS = ("keras", "onnx", "torch", "safetensors")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the other packages' own
@pytest.mark.parametrize("block", CODE.findall((ROOT / "docs" / "folding.md").read_text(encoding="utf-8")))
def test_code_about_folding_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    for extra in EXTRAS:
        if f"import {extra}" in block:
            pytest.importorskip(extra)
    exec(compile(block, "folding.md", "exec"), {})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = CODE.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        if all(importlib.util.find_spec(extra) for extra in EXTRAS if f"import {extra}" in block):
            exec(compile(block, "README.md", "exec"), {"np": np, "fastbn": fastbn})
