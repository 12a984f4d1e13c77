"""The same bits as on the machine where tests/bits.txt was recorded: the promise that no single machine can show."""

from pathlib import Path

import bits
import pytest

RECORDED = [line.split(" ", 1) for line in Path(__file__).with_name("bits.txt").read_text().splitlines()]
GROUPS = dict(bits.groups())


def test_every_group_is_recorded():
    assert [name for _, name in RECORDED] == list(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_the_bits_are_the_recorded_ones(name):
    assert bits.compute(GROUPS[name]) == {about: recorded for recorded, about in RECORDED}[name]


def test_threads_do_not_show():
    """What is recorded for one thread is recorded for three."""
    by_name = {about: recorded for recorded, about in RECORDED}
    pairs = [(by_name[name], by_name[name.replace("1 thread", "3 threads")]) for name in by_name if "1 thread" in name]
    assert pairs
    assert all(one == three for one, three in pairs)
