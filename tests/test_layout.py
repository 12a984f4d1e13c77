"""Canonical views: the same elements, the same memory, and no copy where a view exists."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import fastbn
from fastbn._core import layout

quick = settings(max_examples=300, deadline=None)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)]


# ---- arrays of any strides ---------------------------------------------------------------------------------


@st.composite
def strided(draw, shape, dtype, *, zero=True):
    """Draw an array of a shape: axes in any order of memory, cut from a larger array, reversed, repeated."""
    ndim = len(shape)
    order = draw(st.permutations(range(ndim)))
    steps = draw(st.tuples(*[st.sampled_from([1, 1, 1, 2, 3, -1, -2])] * ndim))
    spare = draw(st.tuples(*[st.sampled_from([0, 0, 0, 1])] * ndim))
    repeated = draw(st.tuples(*[st.sampled_from([False, False, False, zero])] * ndim))
    full = [1 if repeated[i] else shape[i] * abs(steps[i]) + spare[i] for i in order]
    base = np.empty(full, dtype).transpose(np.argsort(order))
    begin = [None if repeated[i] or steps[i] < 0 else spare[i] for i in range(ndim)]
    cut = base[tuple(slice(begin[i], None, steps[i]) for i in range(ndim))][tuple(slice(n) for n in shape)]
    return np.broadcast_to(cut, shape) if any(repeated) else cut


@st.composite
def calls(draw, *, most=3):
    """Draw an axis and the arrays of one call: one shape and dtype, strides of their own or in common."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.sampled_from([1, 1, 2, 3, 4]), min_size=ndim, max_size=ndim)))
    dtype = draw(st.sampled_from(DTYPES))
    axis = draw(st.integers(0, ndim - 1))
    arrays = [draw(strided(shape, dtype))]
    for _ in range(draw(st.integers(0, most - 1))):
        kind = draw(st.sampled_from(["alike", "alike", "own", "contiguous"]))
        if kind == "alike":
            arrays.append(layout.empty_like(arrays[0]))
        elif kind == "own":
            arrays.append(draw(strided(shape, dtype)))
        else:
            arrays.append(np.empty(shape, dtype))
    return axis, arrays


def addresses(array):
    """The address of each element, as an array of the same shape."""
    result = np.full(array.shape, array.ctypes.data)
    for i, stride in enumerate(array.strides):
        steps = np.arange(array.shape[i]) * stride
        result += steps.reshape([-1 if j == i else 1 for j in range(array.ndim)])
    return result


def assert_canonical(views):
    """All of one shape: (n, c, s) with contiguous runs, or (rows, c) with contiguous channels."""
    assert len({view.shape for view in views}) == 1
    shape = views[0].shape
    assert len(shape) in (2, 3)
    if shape[-1] > 1:
        assert all(view.strides[-1] == view.itemsize for view in views)


def assert_same_elements(axis, arrays, views):
    """Per channel, the views run through the tuples (an element of each array) that share a logical index."""
    for channel in range(arrays[0].shape[axis]):
        expected = [addresses(pick(array, axis, channel)) for array in arrays]
        found = [addresses(view[:, channel]) for view in views]
        assert together(found) == together(expected)


def pick(array, axis, channel):
    return array[(slice(None),) * axis + (channel,)]


def together(parts):
    return sorted(zip(*(part.ravel().tolist() for part in parts), strict=True))


def has_canonical_views(axis, arrays):
    """Whether any order and direction of the axes gives canonical views of all arrays at once, by trying all.

    A run of one element counts only where the axes besides the channels have no more.
    """
    shape, itemsize = arrays[0].shape, arrays[0].itemsize
    axes = [i for i in range(len(shape)) if i != axis and shape[i] > 1]
    channels_touch = shape[axis] > 1 and all(array.strides[axis] == itemsize for array in arrays)

    def merges(part):  # into one axis: each axis steps over all of the next one
        return all(sign[i] * a.strides[i] == sign[j] * a.strides[j] * shape[j]
                   for a in arrays for i, j in itertools.pairwise(part))  # fmt: skip

    def runs(part):  # contiguously
        return all(sign[part[-1]] * a.strides[part[-1]] == itemsize for a in arrays)

    for order in itertools.permutations(axes):
        for signs in itertools.product((1, -1), repeat=len(axes)):
            sign = dict(zip(axes, signs, strict=True))
            if channels_touch and merges(order):
                return True
            for cut in range(len(order) + 1):
                rows, run = order[:cut], order[cut:]
                if merges(rows) and merges(run) and (runs(run) if run else not rows):
                    return True
    return False


# ---- plan --------------------------------------------------------------------------------------------------


@quick
@given(calls())
def test_views_hold_the_same_elements_in_the_same_memory(call):
    axis, arrays = call
    views = layout.plan(axis, *arrays)
    assume(views is not None)
    assert_canonical(views)
    assert_same_elements(axis, arrays, views)
    assert all(view.dtype == array.dtype for view, array in zip(views, arrays, strict=True))


@quick
@given(calls())
def test_there_are_views_exactly_where_some_order_of_the_axes_has_them(call):
    axis, arrays = call
    assert (layout.plan(axis, *arrays) is not None) == has_canonical_views(axis, arrays)


@quick
@given(calls(most=2))
def test_a_missing_array_stays_none_and_changes_nothing(call):
    axis, arrays = call
    without, with_none = layout.plan(axis, *arrays), layout.plan(axis, arrays[0], None, *arrays[1:])
    assert (without is None) == (with_none is None)
    if without is not None:
        assert with_none[1] is None
        for a, b in zip(without, (with_none[0], *with_none[2:]), strict=True):
            assert (a.ctypes.data, a.shape, a.strides) == (b.ctypes.data, b.shape, b.strides)


F4 = np.float32
NO_VIEW = None
PLANS = {
    "(N, C)": (np.empty((5, 7), F4), 1, (5, 7)),
    "(N, C), axis 0 is the channels": (np.empty((5, 7), F4), 0, (1, 5, 7)),
    "(C, N) in memory": (np.empty((7, 5), F4).T, 1, (1, 7, 5)),
    "(N, C, H, W)": (np.empty((2, 3, 4, 5), F4), 1, (2, 3, 20)),
    "channels last": (np.empty((2, 4, 5, 3), F4), -1, (40, 3)),
    "channels last, seen as (N, C, H, W)": (np.empty((2, 4, 5, 3), F4).transpose(0, 3, 1, 2), 1, (40, 3)),
    "(N, C, 1, 1)": (np.empty((5, 7, 1, 1), F4), 1, (5, 7)),
    "one channel": (np.empty((2, 1, 4, 5), F4), 1, (1, 1, 40)),
    "one channel of two axes": (np.empty((6, 1), F4), 1, (1, 1, 6)),
    "one channel of many": (np.empty((6, 3), F4)[:, 1:2], 1, NO_VIEW),
    "one channel of many, (N, C, H, W)": (np.empty((2, 3, 4, 5), F4)[:, 1:2], 1, (2, 1, 20)),
    "(1, C, H, W)": (np.empty((1, 3, 4, 5), F4), 1, (1, 3, 20)),
    "a slice of the batch": (np.empty((9, 3, 4, 5), F4)[::2], 1, (5, 3, 20)),
    "a slice of the channels": (np.empty((2, 9, 4, 5), F4)[:, ::3], 1, (2, 3, 20)),
    "a slice of the channels, last": (np.empty((2, 4, 5, 9), F4)[..., 2:5], 3, (40, 3)),
    "the batch reversed": (np.empty((4, 3, 8), F4)[::-1], 1, (4, 3, 8)),
    "all reversed but the channels": (np.empty((2, 3, 4, 5), F4)[::-1, :, ::-1, ::-1], 1, (2, 3, 20)),
    "the channels reversed": (np.empty((4, 3, 8), F4)[:, ::-1], 1, (4, 3, 8)),
    "W before H in memory": (np.empty((2, 3, 5, 4), F4).transpose(0, 1, 3, 2), 1, (2, 3, 20)),
    "rows repeated": (np.broadcast_to(np.empty(7, F4), (5, 7)), 1, (5, 7)),
    "a batch repeated": (np.broadcast_to(np.empty((3, 8), F4), (4, 3, 8)), 1, (4, 3, 8)),
    "a slice of the run": (np.empty((2, 3, 4, 10), F4)[..., ::2], 1, NO_VIEW),
    "a window of the plane": (np.empty((2, 3, 6, 7), F4)[..., 1:5, 1:6], 1, NO_VIEW),
    "a window of one image's plane": (np.empty((1, 3, 6, 7), F4)[..., 1:5, 1:6], 1, (4, 3, 5)),
    "channels last, every other": (np.empty((2, 4, 5, 6), F4)[..., ::2], 3, NO_VIEW),
    "channels last, reversed": (np.empty((5, 6), F4)[:, ::-1], 1, NO_VIEW),
    "a batch repeated, planes reversed": (
        np.broadcast_to(np.empty((3, 4, 8), F4), (4, 3, 4, 8))[..., ::-1, ::-1],
        1,
        (4, 3, 32),
    ),
    "one number": (np.broadcast_to(F4(1), (2, 3, 4)), 1, NO_VIEW),
}


@pytest.mark.parametrize("name", PLANS)
def test_the_view_is_the_smallest_canonical_problem(name):
    array, axis, expected = PLANS[name]
    views = layout.plan(axis % array.ndim, array)
    if expected is None:
        assert views is None
        return
    (view,) = views
    assert view.shape == expected
    assert_canonical(views)
    assert_same_elements(axis % array.ndim, [array], views)


def test_arrays_of_different_order_have_no_view_in_common():
    first, last = np.empty((2, 3, 4, 5), F4), np.empty((2, 4, 5, 3), F4).transpose(0, 3, 1, 2)
    assert layout.plan(1, first) is not None
    assert layout.plan(1, last) is not None
    assert layout.plan(1, first, last) is None
    assert layout.plan(1, last, first) is None


def test_a_repeated_array_hides_no_direction_of_the_others():
    repeated, backward = np.broadcast_to(np.empty(3, F4), (2, 4, 3)), np.empty((2, 4, 3), F4)[::-1, ::-1]
    for arrays in ((backward, repeated), (repeated, backward)):
        views = layout.plan(2, *arrays)
        assert views is not None
        assert views[0].shape == (8, 3)
        assert_same_elements(2, arrays, views)


def test_a_read_only_array_has_a_read_only_view():
    for array in (np.empty((4, 3, 8), F4)[::2], np.empty((5, 7), F4), np.empty((2, 3, 4, 5), F4)):
        array.flags.writeable = False
        (view,) = layout.plan(1, array)
        assert not view.flags.writeable


# ---- arrange -----------------------------------------------------------------------------------------------


@st.composite
def calls_with_output(draw):
    axis, arrays = draw(calls(most=2))
    shape, dtype = arrays[0].shape, arrays[0].dtype
    out = draw(st.one_of(strided(shape, dtype, zero=False), st.just(None)))
    return axis, arrays, layout.empty_like(arrays[0]) if out is None else out


@quick
@given(calls_with_output())
def test_arrange_gives_inputs_an_output_and_copies_only_without_views(call):
    axis, arrays, out = call
    before = [fill(array, 1000 * k) for k, array in enumerate(arrays)]
    (*views,), view, copied, _ = layout.arrange(axis, tuple(arrays), out)
    assert_canonical([*views, view])
    assert (copied is None) == (layout.plan(axis, *arrays, out) is not None)
    target = out if copied is None else copied
    sources = arrays if copied is None else before
    assert copied is None or copied.shape == out.shape
    # the output of each element lands where the element was
    view[...] = views[0]
    channels = range(out.shape[axis])
    assert [sorted(pick(target, axis, c).ravel().tolist()) for c in channels] == [
        sorted(pick(sources[0], axis, c).ravel().tolist()) for c in channels
    ]
    assert np.array_equal(target, sources[0])


def fill(array, start):
    """Number the elements of an array in place (repeated ones get one number); return a copy."""
    if not array.flags.writeable:  # what broadcast_to made
        base = array[tuple(slice(0, 1) if s == 0 else slice(None) for s in array.strides)]
        base.flags.writeable = True
        base[...] = start + np.arange(base.size).reshape(base.shape) % 900
        base.flags.writeable = False
    else:
        array[...] = start + np.arange(array.size).reshape(array.shape) % 900
    return array.copy()


def test_arrange_keeps_a_missing_input_missing():
    x = np.empty((2, 3, 4, 10), F4)
    for array in (x, x[..., ::2]):
        (x_view, residual), _, _, _ = layout.arrange(1, (array, None), layout.empty_like(array))
        assert residual is None
        assert x_view.shape == (2, 3, array[0, 0].size)


def misaligned(shape, dtype):
    memory = np.zeros(math.prod(shape) * dtype.itemsize + 1, np.uint8)
    array = memory[1:].view(dtype).reshape(shape)
    assert not array.flags.aligned
    return array


def test_a_misaligned_output_is_never_handed_to_a_kernel():
    x, out = np.arange(24, dtype=F4).reshape(2, 3, 4), misaligned((2, 3, 4), np.dtype(F4))
    (x_view,), view, copied, _ = layout.arrange(1, (x,), out)
    assert copied is not None
    assert view.flags.aligned
    assert x_view.flags.aligned
    assert not np.shares_memory(view, out)


# ---- outputs through the public functions ------------------------------------------------------------------


def make_out(kind, shape, dtype):
    if kind == "misaligned":
        return misaligned(shape, dtype)
    if kind == "every other":
        return np.full((*shape[:-1], 2 * shape[-1]), 9, dtype)[..., ::2]
    if kind == "reversed":
        return np.full(shape, 9, dtype)[..., ::-1]
    if kind == "transposed":
        return np.full(shape[::-1], 9, dtype).T
    raise AssertionError(kind)


OUTPUTS = ["misaligned", "every other", "reversed", "transposed"]


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_arrive_in_an_output_of_any_layout(kind, shape, dtype):
    rng = np.random.default_rng(7)
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    mean, var = np.zeros(shape[1]), np.ones(shape[1])

    y, saved = fastbn.batch_norm_train(x, activation="relu")
    dx = fastbn.batch_norm_backward(dy, saved).dx
    z = fastbn.batch_norm_infer(x, mean, var)
    for expected, call in (
        (y, lambda out: fastbn.batch_norm_train(x, activation="relu", out=out)[0]),
        (dx, lambda out: fastbn.batch_norm_backward(dy, saved, out=out).dx),
        (z, lambda out: fastbn.batch_norm_infer(x, mean, var, out=out)),
    ):
        out = make_out(kind, shape, dtype)
        assert call(out) is out
        assert np.array_equal(out, expected)


@pytest.mark.parametrize("kind", ["every other", "reversed", "transposed"])
def test_an_output_that_is_the_input_of_any_layout(kind):
    data = np.random.default_rng(8).normal(size=(4, 3, 8)).astype(F4)
    expected = fastbn.batch_norm_train(data)[0]
    x = make_out(kind, data.shape, data.dtype)
    x[...] = data
    y, saved = fastbn.batch_norm_train(x, out=x)
    assert y is x
    # another order of the sums
    np.testing.assert_allclose(x, expected, rtol=0, atol=8 * 2**-24 * (1 + abs(expected).max()))
    with pytest.raises(ValueError, match="^saved: "):
        fastbn.batch_norm_backward(data, saved)


def test_memory_between_the_elements_of_an_output_stays():
    x = np.random.default_rng(9).normal(size=(4, 3, 8)).astype(F4)
    memory = np.full((4, 3, 16), 9, F4)
    fastbn.batch_norm_train(x, out=memory[..., ::2])
    assert (memory[..., 1::2] == 9).all()
    memory = np.full((6, 5, 8), 9, F4)
    fastbn.batch_norm_train(x, out=memory[1:5, 1:4])
    inside = np.zeros(memory.shape, bool)
    inside[1:5, 1:4] = True
    assert (memory[~inside] == 9).all()
    assert (memory[inside] != 9).all()


@quick
@given(calls(most=1), st.data())
def test_any_layout_gives_the_statistics_of_its_values(call, data):
    axis, (x,) = call
    assume(x.size // x.shape[axis] >= 2)
    values = fill(x, data.draw(st.integers(-5, 5)))
    moments = fastbn.Moments.of(x, axis)
    y, saved = fastbn.batch_norm_train(x, axis=axis)
    others = tuple(i for i in range(x.ndim) if i != axis)
    # small integers, at most 4**5 of them: sums, products and squares are exact, only the divisions round
    mean, var = values.mean(axis=others, dtype=np.float64), values.var(axis=others, dtype=np.float64)
    n = x.size // x.shape[axis]
    largest = np.abs(values).max(initial=1).astype(np.float64)
    assert moments.count == saved.count == n
    assert np.abs(moments.mean - mean).max() <= 8 * 2.0**-53 * largest
    assert np.abs(saved.mean - mean).max() <= 8 * 2.0**-53 * largest
    assert np.abs(moments.var() - var).max() <= 8 * n * 2.0**-53 * largest**2
    assert y.shape == x.shape


# ---- new arrays --------------------------------------------------------------------------------------------


@quick
@given(calls(most=1))
def test_empty_like_keeps_shape_dtype_and_order(call):
    _, (x,) = call
    y = layout.empty_like(x)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.flags.writeable
    assert not np.shares_memory(x, y)
    # dense, and no axis inside another one that it encloses in x
    counting = [(abs(a), b, n) for a, b, n in zip(x.strides, y.strides, x.shape, strict=True) if n > 1]
    assert all(b > 0 for _, b, _ in counting)
    for (a, b, _), (other_a, other_b, _) in itertools.combinations(counting, 2):
        if a != other_a:
            assert (a > other_a) == (b > other_b)
    expected = x.itemsize
    for _, stride, n in sorted(counting, key=lambda axis: axis[1]):
        assert stride == expected
        expected *= n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)])
def test_large_results_begin_at_a_cache_line(dtype, order):
    for extra in range(8):  # NumPy alone would not be aligned eight times in a row
        shape = (4, 33, 64 + extra, 64)
        x = np.empty([shape[i] for i in order], dtype).transpose(np.argsort(order))
        y = layout.empty_like(x)
        assert y.shape == shape
        assert y.ctypes.data % 64 == 0
        assert y.flags.aligned
        assert layout.aligned_empty(shape, dtype).ctypes.data % 64 == 0


def test_aligned_memory_is_large_enough():
    for nbytes in ((1 << 16) - 1, 1 << 16, (1 << 16) + 1):
        array = layout.aligned_empty((nbytes,), np.dtype(np.uint8))
        assert array.shape == (nbytes,)
        assert array.flags.c_contiguous
        assert array.base is None or array.ctypes.data + nbytes <= end_of(array.base)
    assert layout.aligned_empty((1 << 16,), np.dtype(np.uint8)).ctypes.data % 64 == 0


def end_of(array):
    while array.base is not None:
        array = array.base
    return array.ctypes.data + array.nbytes


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 4), (0, 3, 4, 5)])
def test_empty_like_of_nothing(shape):
    assert layout.empty_like(np.empty(shape, F4)).shape == shape
    assert layout.empty_like(np.empty(shape[::-1], F4).T).shape == shape
