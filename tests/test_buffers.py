"""The memory of large results: used again once nothing refers to them, bounded, and never while somebody looks."""

import threading

import numpy as np
import pytest
from interpreter import run_python

import fastbn
from fastbn._core import buffers, layout

LARGE = (buffers.FROM // 4 + 1000,)
F4 = np.dtype(np.float32)


@pytest.fixture(autouse=True)
def empty_store():
    fastbn.release_buffers()
    yield
    fastbn.release_buffers()


def address(array):
    return array.ctypes.data


def test_a_large_result_leaves_its_memory_to_the_next():
    first = layout.aligned_empty(LARGE, F4)
    where = address(first)
    del first
    assert address(layout.aligned_empty(LARGE, F4)) == where


def test_memory_in_use_is_never_given_away():
    first = layout.aligned_empty(LARGE, F4)
    first[...] = 1
    view = first[5:8]
    del first
    second = layout.aligned_empty(LARGE, F4)
    second[...] = 2
    assert not np.shares_memory(view, second)
    assert (view == 1).all()


def test_small_results_take_no_part():
    small = layout.aligned_empty((1 << 20,), F4)
    del small
    assert fastbn.release_buffers() == 0


def test_what_is_kept_is_bounded(monkeypatch):
    monkeypatch.setattr(buffers, "LIMIT", 3 * LARGE[0] * 4)
    arrays = [layout.aligned_empty(LARGE, F4) for _ in range(5)]
    del arrays
    assert 0 < fastbn.release_buffers() <= buffers.LIMIT
    assert fastbn.release_buffers() == 0


def test_nothing_is_kept_with_a_limit_of_zero(monkeypatch):
    monkeypatch.setattr(buffers, "LIMIT", 0)
    array = layout.aligned_empty(LARGE, F4)
    del array
    assert fastbn.release_buffers() == 0


def test_much_larger_memory_is_not_taken_for_a_smaller_result():
    array = layout.aligned_empty((3 * LARGE[0],), F4)
    del array
    array = layout.aligned_empty(LARGE, F4)
    assert array.nbytes < 3 * LARGE[0] * 4 <= fastbn.release_buffers()


def test_results_in_used_memory_are_the_same():
    x = np.random.default_rng(0).standard_normal((LARGE[0] // 64 + 1, 64), dtype=np.float32)
    expected = fastbn.batch_norm_train(x)[0].tobytes()
    for _ in range(3):
        assert fastbn.batch_norm_train(x)[0].tobytes() == expected
    assert fastbn.release_buffers() > 0


def test_threads_take_different_memory():
    for _ in range(6):
        arrays = [layout.aligned_empty(LARGE, F4) for _ in range(4)]
        del arrays
        taken = []
        threads = [
            threading.Thread(target=lambda kept=taken: kept.append(layout.aligned_empty(LARGE, F4))) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({address(array) for array in taken}) == 4


@pytest.mark.parametrize(("mib", "kept"), [("0", False), ("64", True)])
def test_the_environment_sets_the_limit(mib, kept):
    code = """
import numpy as np, fastbn
from fastbn._core import layout
array = layout.aligned_empty((10 << 20,), np.dtype("f4"))
del array
print(fastbn.release_buffers() > 0)
array = layout.aligned_empty((10 << 20,), np.dtype("f4"))  # given back at exit, without a word
"""
    done = run_python(code, FASTBN_BUFFERS=mib)
    assert done.stdout.split() == [str(kept)]
    assert done.stderr == ""


def test_an_empty_limit_is_none():
    code = "from fastbn._core.buffers import LIMIT; print(LIMIT >> 20)"
    assert run_python(code, FASTBN_BUFFERS="").stdout.split() == ["256"]


def test_a_limit_that_is_no_number_is_named():
    done = run_python("import fastbn", FASTBN_BUFFERS="lots", check=False)
    assert "ValueError: FASTBN_BUFFERS: expected MiB, an integer, got 'lots'" in done.stderr
