"""What the documentation shows is run: doctests of every module, the README's code."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest

import fastbn

ROOT = Path(__file__).parents[1]


def modules():
    """Names of fastbn's Python modules that need no extra."""
    found = pkgutil.walk_packages(fastbn.__path__, "fastbn.")
    return ["fastbn"] + [m.name for m in found if m.name not in ("fastbn.demo", "fastbn.__main__")]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("batch_norm_train", "batch_norm_infer", "batch_norm_backward", "fold_linear", "fold_conv", "BatchNorm",
                 "Moments", "Standardizer", "set_num_threads", "num_threads"):  # fmt: skip
        public = getattr(fastbn, name)
        assert any(test.examples for test in finder.find(public)), f"{name} has no doctest"


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"np": np, "fastbn": fastbn})
