"""What the documentation shows is run: doctests of every module, the README's code."""

import doctest
import importlib
import os
import pkgutil
import re
from pathlib import Path

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
    fastbn.release_buffers()  # of other tests: an example shows how many bytes there are
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_public_functions_have_examples():
    finder = doctest.DocTestFinder()
    for name in ("batch_norm_train", "batch_norm_infer", "batch_norm_backward", "fold_linear", "fold_conv", "BatchNorm",
                 "Moments", "Standardizer", "set_num_threads", "num_threads"):  # fmt: skip
        public = getattr(fastbn, name)
        assert any(test.examples for test in finder.find(public)), f"{name} has no doctest"


CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXTRAS = ("dask", "keras", "onnx", "safetensors", "sklearn", "torch")
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
BLOCKS = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(CODE.findall((ROOT / page).read_text(encoding="utf-8")))
    if "mpi4py" not in block  # test_interop_mpi.py runs those, on two ranks
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the other packages' own
@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", os.environ.get("KERAS_BACKEND", "torch"))
    for extra in EXTRAS:
        if re.search(rf"^(import|from) {extra}\b", block, re.MULTILINE) or f"fastbn.interop.{extra}" in block:
            pytest.importorskip(extra)
    exec(compile(block, "a block of the documentation", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_be_filled_in(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert not re.findall(r"@@\w+@@|TODO|XXX", text)
