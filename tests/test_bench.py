"""The benchmarks measure what they say: a case calls the function it is named for, on arrays of its shape."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbn

ROOT = str(Path(__file__).parents[1])
sys.path.append(ROOT)  # bench is not installed; fastbn is taken from where it was found already

from bench import cases, peers  # noqa: E402

FUNCTIONS = {"train": "batch_norm_train", "infer": "batch_norm_infer", "backward": "batch_norm_backward"}


@pytest.mark.parametrize("case", cases.norm_cases([(4, 3, 5, 5), (6, 4)], "float32"), ids=lambda case: case.name)
def test_norm_case_calls_its_function(case, monkeypatch):
    call = peers.FastBN(1).norm(case)
    calls = []
    original = getattr(fastbn, FUNCTIONS[case.operation])

    def spy(*args, **kwargs):
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(fastbn, FUNCTIONS[case.operation], spy)
    call()
    ((args, kwargs),) = calls
    assert args[0].shape == case.shape
    assert args[0].dtype == case.dtype
    assert ("out" in kwargs) == case.preallocated
    channels_last = args[0].strides[1] == args[0].itemsize
    assert channels_last == (case.layout == "nhwc" or len(case.shape) == 2)


@pytest.mark.parametrize("case", cases.optim_cases(quick=True), ids=lambda case: case.name)
def test_optim_case_steps_its_optimizer(case, monkeypatch):
    kind = getattr(fastbn.optim, {"Nesterov": "SGD"}.get(case.operation, case.operation))
    steps = []
    original = kind.step
    monkeypatch.setattr(kind, "step", lambda self, grads: steps.append(type(self)) or original(self, grads))
    peers.FastBN(1).optim(case)()
    assert steps == [kind]


def test_resnet50_has_its_parameters():
    sizes = cases.resnet50_sizes()
    assert len(sizes) == 161
    assert sum(sizes) == 25_557_032


def test_copy_copies():
    source = np.arange(100_003, dtype=np.uint8)
    target = np.zeros_like(source)
    peers.kernels.copy(source, target, 2)
    assert (source == target).all()


def test_command_line():
    run = subprocess.run(
        [sys.executable, "-m", "bench", "norm", "--quick", "--peers", "numpy", "--rounds", "1"],
        cwd=ROOT, env={"PYTHONPATH": str(Path(fastbn.__file__).parents[1])}, capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "train 60×100" in run.stdout
