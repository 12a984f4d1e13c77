"""What `fastbn demo` refuses before it trains; that it works is for CI to run, with the demo's extra."""

import os
import re

import pytest

from fastbn.cli import main

for module in ("matplotlib", "rich", "sklearn", "threadpoolctl"):
    pytest.importorskip(module)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none/a.png", "a folder that can be"), ("a.txt", r"ends in .*\.png.*got a.txt"), ("folder.png", "a file")],
)
def test_a_figure_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, capsys, name, reason):
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.png")
    monkeypatch.setattr("fastbn.demo._data", lambda: pytest.fail("it went on"))
    assert main(["demo", "--figure", name]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastbn demo: --figure: expected")
    assert err.count("\n") == 1
    assert re.search(reason, err)
