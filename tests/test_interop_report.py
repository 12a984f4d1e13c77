"""What a fold reports: a table to read, a dictionary for JSON, and counts that agree."""

import json

import numpy as np

from fastbn import BatchNormParams, fold_linear
from fastbn.interop.report import FOLDED, LEFT, MERGED, REWRITTEN, Decision, ModelReport

BN = BatchNormParams([0.0, -2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], 0.0)
CHANGE = fold_linear(np.ones((2, 2), np.float32), None, BN).report
DECISIONS = (
    Decision("bn_first", FOLDED, ("conv", "a longer name"), "forward", (CHANGE, CHANGE)),
    Decision("bn", FOLDED, ("conv",), "backward", (CHANGE,)),
    Decision("middle", MERGED, ("last",), "forward through pool 'p'"),
    Decision("last", REWRITTEN, (), "backward: relu"),
    Decision("alone", LEFT, (), "it trains"),
)
REPORT = ModelReport(DECISIONS, 9, 6, 12345, 1200)
EMPTY = ModelReport((), 1, 1, 7, 7)


def test_counts():
    assert tuple(REPORT) == DECISIONS
    assert len(REPORT) == 5
    assert [REPORT.count(action) for action in (FOLDED, MERGED, REWRITTEN, LEFT)] == [2, 1, 1, 1]
    assert REPORT.folded == DECISIONS[:3]
    assert REPORT.left == DECISIONS[3:]
    assert (len(EMPTY), EMPTY.folded, EMPTY.left, EMPTY.count(FOLDED)) == (0, (), (), 0)


def test_the_table():
    expected = """\
BatchNorm             into                 why (backward: it stood behind that; forward: before it)
bn_first   folded     conv, a longer name  forward
bn         folded     conv                 backward
middle     merged     last                 forward through pool 'p'
last       rewritten                       backward: relu
alone      left                            it trains
5 BatchNorm: 2 folded, 1 merged, 1 rewritten, 1 left; nodes 9 -> 6, parameters 12,345 -> 1,200"""
    assert str(REPORT) == expected
    assert REPORT.summary() == expected.splitlines()[-1]
    assert str(EMPTY) == "0 BatchNorm: nothing to fold; nodes 1 -> 1, parameters 7 -> 7"
    assert "0 " not in ModelReport(DECISIONS[:1], 1, 1, 1, 1).summary()


def test_json():
    for report in REPORT, EMPTY:
        as_dict = report.to_dict()
        assert json.loads(json.dumps(as_dict)) == json.loads(json.dumps(as_dict, allow_nan=False))
        assert as_dict["decisions"] == [
            d._asdict() | {"into": list(d.into), "changes": [c._asdict() for c in d.changes]} for d in report
        ]
    as_dict = json.loads(json.dumps(REPORT.to_dict()))
    sizes = {"nodes_before": 9, "nodes_after": 6, "parameters_before": 12345, "parameters_after": 1200}
    assert {name: as_dict[name] for name in sizes} == sizes
    assert set(as_dict) == {*sizes, "decisions"}
    assert as_dict["decisions"][1] == {
        "node": "bn",
        "action": "folded",
        "into": ["conv"],
        "reason": "backward",
        "changes": [
            {
                "max_relative_change": 3.0,
                "max_scale": 2.0,
                "min_scale": 0.0,
                "zero_gamma": [0],
                "negative_gamma": [1],
            }
        ],
    }
