"""The benchmarks measure what they say: a case calls the function it is named for, on arrays of its shape.

Nothing here asserts a speed.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbn

ROOT = str(Path(__file__).parents[1])
sys.path.append(ROOT)  # bench is not installed; fastbn is taken from where it was found already

from bench import cases, peers, report, targets, timing  # noqa: E402
from bench.__main__ import Run  # noqa: E402

FUNCTIONS = {"train": "batch_norm_train", "infer": "batch_norm_infer", "backward": "batch_norm_backward"}
ROWS = targets.rows(quick=False, cache=32 << 20, threads=2)


def bench(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(fastbn.__file__).parents[1])},
    )  # fmt: skip


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
    if case.operation != "backward":  # which has it from the forward pass
        assert ("activation" in kwargs) == bool(case.fused)
        assert ("residual" in kwargs) == (case.fused == "add+relu")
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


def test_names_are_unique():
    table = [c for shapes in cases.SHAPES.values() for c in cases.norm_cases(shapes, "float32")]
    every = {*table, *cases.optim_cases(), *cases.fold_cases()}
    assert len({case.name for case in every}) == len(every)


def test_bytes_are_those_of_the_tensors():
    norm = cases.NormCase
    image = 2 * 3 * 4 * 5
    assert norm("train", (2, 3, 4, 5)).bytes == 2 * 4 * image  # channels first: x and y
    assert norm("train", (2, 3, 4, 5), "nhwc").bytes == 3 * 4 * image  # x twice
    assert norm("train", (6, 4)).bytes == 3 * 4 * 24
    assert norm("backward", (2, 3, 4, 5), fused="add+relu").bytes == 4 * 4 * image
    assert norm("infer", (2, 3, 4, 5), dtype="bfloat16").bytes == 2 * 2 * image
    assert cases.OptimCase("Adam", "two", (10, 20), 7, clip=True).bytes == 8 * 4 * 30
    assert cases.FoldCase("conv", (2, 3, 1, 1)).bytes == 2 * 4 * 6


def test_resnet50_has_its_parameters():
    sizes = cases.resnet50_sizes()
    assert len(sizes) == 161
    assert sum(sizes) == 25_557_032


def test_copy_copies():
    source = np.arange(100_003, dtype=np.uint8)
    target = np.zeros_like(source)
    peers.kernels.copy(source, target, 2)
    assert (source == target).all()


def test_every_contestant_is_timed_in_an_order_of_the_round():
    calls = []
    times = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, budget=0, pause=0
    )
    assert set(times) == set("abc")
    assert all(0 <= t.minimum <= t.median for t in times.values())
    rounds = [tuple(calls[6 + i : 12 + i : 2]) for i in range(0, 24, 6)]  # 2 calls each to calibrate, 2 per sample
    assert {frozenset(order) for order in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1


class Raising:
    """A peer that fails at building one case, at the first call of another, and does not do the third."""

    def norm(self, case):
        if case.operation == "train":
            raise RuntimeError("no such layout\nand much more")
        return (lambda: 1 / 0) if case.operation == "backward" else None


def test_a_peer_that_raises_is_left_out_and_named_once(capsys):
    run = Run({"copy": peers.Copy(1), "peer": Raising()}, {"absent": "absent: not installed"}, rounds=1)
    table = cases.norm_cases([(6, 4)], "float32")
    for case in table:
        run.measure([(case, who) for who in ("copy", "peer", "absent")])
    assert set(run.measured) == {(case, "copy") for case in table}
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[2] for line in said] == [
        "RuntimeError: no such layout", "ZeroDivisionError: division by zero",
    ]  # fmt: skip
    by_operation = {case.operation: run.why_not((case, "peer")) for case in table}
    assert by_operation["train"] == "peer: RuntimeError: no such layout"
    assert by_operation["infer"] == "peer: does not do this"
    assert run.why_not((table[0], "absent")) == "absent: not installed"
    assert not run.broken


def test_fastbn_that_raises_is_an_error():
    run = Run({"fastbn": Raising()}, {}, rounds=1)
    run.measure([(case, "fastbn") for case in cases.norm_cases([(6, 4)], "float32")])
    assert run.broken


def test_table_shows_what_is_missing(capsys):
    table = report.Table(["case", "× peer"], 10, markdown=True)
    table.row(["train", report.number(report.quotient(None, timing.Timing(1.0, 1.0)))])
    assert capsys.readouterr().out.splitlines() == ["| case | × peer |", "|---|--:|", "| train | – |"]
    report.Table(["case", "× peer"], 10, markdown=False).row(["train", "1.50"])
    assert capsys.readouterr().out.splitlines() == ["case         × peer", "train          1.50"]


def test_targets_make_the_right_numbers():
    a, b = (cases.NormCase("train", shape) for shape in ((2, 4), (8, 4)))
    seconds = {
        (a, "fastbn"): 1e-6, (b, "fastbn"): 4e-6, (a, "torch"): 8e-6, (b, "torch"): 8e-6, (a, "copy"): 2e-6,
        (b, "onednn-nchw"): 5e-6, (b, "onednn-nhwc"): 3e-6,
    }  # fmt: skip

    def value(reduce, ratios):
        return pytest.approx(targets.Target("", reduce, ratios).value(seconds))

    assert value("mean", targets.faster([a, b], "torch")) == 4  # of 8 and 2
    assert value("least", targets.faster([a, b], "torch")) == 2
    assert value("least", targets.faster([b], *targets.ONEDNN)) == 0.75  # the fastest of those there are
    assert value("largest", targets.cost([a], "copy")) == 0.5
    assert value("largest", targets.against([b], [a])) == 1  # four times the time for four times the bytes
    assert value("largest", (targets.Ratio(((b, "fastbn"),)),)) == 4  # µs
    with pytest.raises(KeyError) as missing:
        targets.Target("", "mean", targets.cost([a, b], "copy")).value(seconds)
    assert missing.value.args[0] == (b, "copy")
    with pytest.raises(ValueError, match="empty|no data|at least one|requires"):
        targets.Target("", "mean", ()).value(seconds)


def test_verdicts():
    at_least = targets.Target("", "mean", (), "≥", 2.0)
    at_most = targets.Target("", "largest", (), "≤", 7.0, " µs")
    assert [at_least.verdict(value) for value in (1.99, 2.0)] == ["not met", "met"]
    assert [at_most.verdict(value) for value in (7.0, 7.01)] == ["met", "not met"]
    assert at_most.asked == "largest ≤ 7 µs"
    assert targets.Target("", "mean", ()).verdict(1.0) == "shown"


@pytest.mark.parametrize("row", [*ROWS, *targets.rows(quick=True, cache=1, threads=2)], ids=lambda row: row.text)
def test_every_row_evaluates(row):
    value = row.value(dict.fromkeys(row.keys, 1e-6))
    assert math.isfinite(value)
    assert value > 0
    assert row.verdict(value) in ("met", "not met", "shown")


def test_what_is_compared_is_measured_together():
    groups = targets.groups(ROWS)
    assert set(groups) == {key for row in ROWS for key in row.keys}
    for row in ROWS:
        for ratio in row.ratios:
            assert len({groups[key] for key in ratio.over + ratio.under}) == 1
    assert sum(map(len, set(groups.values()))) == len(groups)  # nothing twice


def test_rows_are_told_apart():
    assert len({(row.text, row.asked) for row in ROWS}) == len(ROWS)
    copies = [row for row in ROWS if "tensors > cache" in row.text]
    assert copies
    assert all(key[0].tensor_bytes > 32 << 20 for row in copies for key in row.keys)


def test_command_line(tmp_path):
    run = bench("--quick", "--peers", "numpy", "--threads", "1", "--json", str(tmp_path / "results.json"))
    assert run.returncode == 0, run.stderr
    assert "train 60×100" in run.stdout
    assert "× numpy" in run.stdout
    assert "Adam, MLP" in run.stdout
    assert "fold conv" in run.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"]["threads"] == 1
    assert all(row["seconds"]["fastbn"]["minimum"] > 0 for row in results["results"])


def test_command_line_writes_markdown():
    run = bench("fold", "--quick", "--peers", "none", "--threads", "1", "--markdown")
    assert run.returncode == 0, run.stderr
    first, _, _, _, headers, rules, row = run.stdout.splitlines()
    assert "`python -m bench fold --quick --peers none --threads 1 --markdown`" in first
    assert headers.count("|") == rules.count("|") == row.count("|") == 7


def test_command_line_shows_the_targets(tmp_path):
    run = bench("--targets", "--quick", "--peers", "numpy", "--markdown", "--json", str(tmp_path / "results.json"))
    assert run.returncode == 0, run.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["targets"]
    assert len(rows) == len(ROWS)
    assert f"{len(ROWS)} rows: " in run.stdout
    results = {row["target"]: row["result"] for row in rows}
    assert results["training, channels first, × PyTorch, fresh"] == "not measured (torch is not among --peers)"
    assert results["training BN+ReLU, channels first, in BN alone, out="] in ("met", "not met")


def test_command_line_draws(tmp_path):
    pytest.importorskip("matplotlib")
    run = bench("norm", "--quick", "--peers", "numpy", "--threads", "1", "--plot", str(tmp_path / "figure.png"))
    assert run.returncode == 0, run.stderr
    for name in ("figure.png", "figure-peers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--dtype", "int8"), ("--threads", "0"), ("--threads", "two"), ("--isa", "v9"), ("--shapes", "vgg"),
        ("--peers", "jax"), ("--rounds", "0"), ("--json", "no/such/folder.json"), ("--plot", "no/such/folder.png"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_command_line_names_a_wrong_option(arguments):
    run = bench("norm", "--quick", *arguments)
    assert run.returncode == 2
    assert arguments[0] in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr


def test_command_line_names_a_wrong_figure():
    pytest.importorskip("matplotlib")
    run = bench("norm", "--quick", "--plot", "figure.docx")
    assert run.returncode == 2
    assert "--plot: expected a file ending in" in run.stderr
