"""The training benchmark compares like with like: one network, one start, and a bound that can be missed.

Nothing here asserts a speed.
"""

import json
import math
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

sys.path.append(str(Path(__file__).parents[1]))  # bench is not installed; fastbn is taken from where it was found

from torch import nn  # noqa: E402

from bench import training  # noqa: E402
from fastbn.interop import torch as fastbn_torch  # noqa: E402

QUICK = training.QUICK
FUSED = {fastbn_torch.BatchNorm2d: 2, fastbn_torch.BatchNormReLU: 5, fastbn_torch.BatchNormAddReLU: 2}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    training.set_threads(1)
    yield
    training.set_threads(before)


def norms(kind):
    found = {}
    for module in training.build(QUICK, kind).modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            found[type(module)] = found.get(type(module), 0) + 1
    return found


def test_each_kind_has_its_modules():
    assert norms("plain") == {nn.BatchNorm2d: 9}
    assert norms("converted") == {fastbn_torch.BatchNorm2d: 9}
    assert norms("fused") == FUSED
    assert norms("bare") == {}


def test_kinds_start_alike():
    plain, converted, fused = (training.build(QUICK, kind).state_dict() for kind in ("plain", "converted", "fused"))
    assert list(plain) == list(converted) == list(fused)
    assert all(torch.equal(plain[key], other[key]) for other in (converted, fused) for key in plain)


RESNET50 = training.Network("ResNet-50", (3, 4, 6, 3), bottleneck=True, batch=1, size=224)


@pytest.mark.parametrize("network", [*training.NETWORKS, RESNET50], ids=lambda network: network.name)
def test_networks_are_those_of_the_paper(network):
    parameters = 25_557_032 if network.bottleneck else 11_689_512
    with torch.device("meta"):
        model = training.ResNet(network, "plain")
        assert sum(p.numel() for p in model.parameters()) == parameters
        x = torch.empty(2, 3, 224, 224)
        seen = []
        model.stages.register_forward_hook(lambda module, given, y: seen.append((given[0].shape[2:], y.shape[2:])))
        assert model(x).shape == (2, 1000)
        assert seen == [((56, 56), (7, 7))]


@pytest.mark.parametrize("layout", training.LAYOUTS)
@pytest.mark.parametrize("variant", training.VARIANTS, ids=lambda variant: variant.name)
def test_a_step_trains_in_the_layout(variant, layout):
    step = training.Training(QUICK, variant, layout)
    weights = step.model.stem[0].weight
    before, seen = weights.clone(), []
    for module in step.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, given, y: seen.append((given[0], y)))
    step()
    assert not torch.equal(weights, before)
    memory_format = training.LAYOUTS[layout]
    assert weights.is_contiguous(memory_format=memory_format)
    assert len(seen) == 9
    assert all(tensor.is_contiguous(memory_format=memory_format) for pair in seen for tensor in pair)


def test_nudged_images_are_neighbours():
    for (x, labels), (nudged, same) in zip(training.data(QUICK, False), training.data(QUICK, True), strict=True):
        assert torch.equal(labels, same)
        assert (x != nudged).all()
        back = torch.where(nudged > x, -torch.inf, torch.inf)
        assert torch.equal(torch.nextafter(nudged, back), x)


def test_distance():
    assert training.distance([1.0, 2.5, 3.0], [1.0, 2.0, 4.0]) == 0.25


def test_excess_counts_the_peers_until_the_step():
    truth = [1.0, 1.0, 1.0]
    peers = [[1.25, 1.0, 1.0], [1.0, 0.5, 1.0]]
    assert training.excess([1.0, 1.0, 1.0], truth, peers) == 0
    assert training.excess([1.25, 0.5, 1.5], truth, peers) == 1
    assert training.excess([0.5, 1.0, 1.0], truth, peers) == 2  # at first only 0.25 is reached
    assert training.excess([1.0, 1.0, 3.0], truth, peers) == 4
    assert training.excess([1 + 2**-22], [1.0], [[1.0]]) == 2  # units in the last place
    assert training.excess([1.0, math.nan, 1.0], truth, peers) == math.inf


def test_main(tmp_path, capsys):
    path = tmp_path / "results.json"
    assert training.main(1, 1, quick=True, markdown=True, json_path=str(path)) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "loss curves: all within the bound"
    table = [line for line in printed if line.startswith("|")]
    assert len(table) == 2 * (2 + len(training.VARIANTS) + 1)
    assert {line.count("|") for line in table} == {12}
    results = json.loads(path.read_text())["results"]
    assert [result["layout"] for result in results] == list(training.LAYOUTS)
    for result in results:
        *variants, bare = result["variants"]
        assert bare["variant"] == "convolutions alone"
        assert [row["variant"] for row in variants] == [variant.name for variant in training.VARIANTS]
        for row in variants:
            assert len(row["losses"]) == QUICK.steps
            assert 0 < row["seconds"]["minimum"] <= row["seconds"]["median"]
            if sys.platform.startswith("linux"):
                assert row["peak bytes"] > 4 * QUICK.batch * 3 * QUICK.size**2


def test_main_fails_where_a_curve_leaves_its_bound(monkeypatch, capsys):
    monkeypatch.setattr(training, "measure_peaks", lambda network, threads: {})
    monkeypatch.setattr(training, "times", lambda *_: dict.fromkeys(
        (variant.name for variant in (*training.VARIANTS, training.BARE)), training.Timing(1.0, 1.0)
    ))  # fmt: skip
    kind = fastbn_torch.BatchNormAddReLU
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, residual: forward(self, x, residual) * (1 + 2**-12))
    assert training.main(1, 1, quick=True) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "loss curves: NOT all within the bound"
    results = {line.split("  ")[0]: line.split()[-1] for line in lines if line.endswith(("within", "EXCEEDED"))}
    assert results == {
        "converted": "within", "fused modules": "EXCEEDED", "fused modules, fastbn's SGD": "EXCEEDED",
    }  # fmt: skip
