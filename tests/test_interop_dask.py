"""fastbn.interop.dask: whatever the chunks, the scheduler and the accidents, the moments of the whole array, once."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpreter import UNDER_TEST, run_python
from reference import U64, assert_within, bits, over_channels, unit
from reference import moments as oracle
from strategies import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, numbers

import fastbn

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

from fastbn.interop.dask import Standardizer, moments, recalibrate  # noqa: E402


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def all_bits(m):
    return m.count, m.axis, bits(m.mean), bits(m.m2)


def features(n=50, f=3, dtype=np.float64, offset=5.0):
    return np.random.default_rng([n, f]).normal(offset, 2, (n, f)).astype(dtype)


def lazy(x, chunks=(7, 2)):
    return da.from_array(x, chunks=chunks)


# ---- any chunks ---------------------------------------------------------------------------------------------------


@st.composite
def cuts(draw, length):
    """Draw chunk sizes of an axis, now and then 0."""
    inner = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    return tuple(np.diff([0, *inner, length]).tolist())


@st.composite
def chunked(draw):
    """Draw (NumPy array, channel axis, the same as a dask array)."""
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=2, max_size=4)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    dtype = draw(st.sampled_from([FLOAT64, FLOAT32, FLOAT16, BFLOAT16]))
    kind = draw(st.sampled_from(["plain", "offset", "outliers", "ramp", "constant"]))
    x = numbers(np.random.default_rng(draw(st.integers(0, 2**32 - 1))), kind, shape, axis, dtype)
    return x, axis, da.from_array(x, chunks=tuple(draw(cuts(n)) for n in shape))


@given(chunked())
def test_any_chunks_give_the_moments_of_the_whole(problem):
    """A chunk's mean is off by 4u·t·std ≤ 16u·r, r the largest deviation; that shifts each δ² ≤ (2r)² between chunks.

    Float64 adds u|μ| for each chunk's mean and merge, and u·M2 for each merge.
    """
    x, axis, array = problem
    found = moments(array, axis).compute()
    mean, var, centred = oracle(x, axis)
    u, merges = unit(x.dtype), int(np.prod(array.numblocks))
    r = over_channels(np.max, np.abs(centred), axis)
    off = 16 * u * r + 4 * merges * U64 * (np.abs(mean) + r)
    assert found.axis == axis
    assert found.count == x.size // x.shape[axis]
    assert found.mean.dtype == found.m2.dtype == np.float64
    assert_within(found.mean, mean, off, "mean")
    assert_within(found.var(), var, (8 * u + 16 * merges * U64) * r**2 + 8 * off * r + 4 * off**2, "variance")


@given(st.lists(st.integers(0, 9), min_size=1, max_size=90), st.sampled_from([1.0, 1e6]))
def test_the_tree_is_the_sequence_of_merges(rows, offset):
    """Up to the rounding of float64: no chunk twice, none left out, however deep the tree."""
    x = features(sum(rows), 3, np.float32, offset)
    found = moments(da.from_array(x, chunks=(tuple(rows), 3))).compute()
    expected = fastbn.Moments(3)
    for piece in np.split(x, np.cumsum(rows)[:-1]):
        expected.update(piece)
    assert found.count == expected.count == len(x)
    r = np.ptp(x, axis=0).astype(np.float64) if len(x) else np.zeros(3)
    off = 8 * len(rows) * U64 * (np.abs(expected.mean) + r)
    assert_within(found.mean, expected.mean, off)
    assert_within(found.m2, expected.m2, len(x) * (4 * off * r + off**2) + 16 * len(rows) * U64 * expected.m2)


def test_one_chunk_is_moments_of():
    x = features(400, 5, np.float32)
    assert all_bits(moments(lazy(x, -1)).compute()) == all_bits(fastbn.Moments.of(x))


def test_unknown_chunks_as_of_a_mask_or_a_data_frame():
    x = features(60, 4)
    rows = x[:, 0] > 5
    array = lazy(x, (7, 2))
    masked = array[array[:, 0] > 5]
    assert np.isnan(masked.shape[0])
    pieces = [x[i : i + 7][rows[i : i + 7]] for i in range(0, 60, 7)]
    known = da.concatenate([da.from_array(piece, chunks=(-1, 2)) for piece in pieces])
    assert all_bits(moments(masked).compute()) == all_bits(moments(known).compute())
    assert moments(masked).compute().count == rows.sum()
    nothing = array[array[:, 0] > 1e9]
    assert moments(nothing).compute().count == 0
    columns = array[:, da.from_array(np.array([True, False, True, True]), chunks=2)]
    assert np.isnan(columns.shape[1])
    assert len(moments(columns).compute().mean) == 3


@pytest.mark.parametrize(
    ("shape", "chunks", "count"), [((0, 3), -1, 0), ((5, 0), -1, 0), ((5, 3), ((0, 5), (3, 0)), 5), ((0, 0), -1, 0)]
)
def test_empty_arrays_and_chunks(shape, chunks, count):
    found = moments(da.ones(shape, chunks=chunks)).compute()
    assert (found.count, len(found.mean)) == (count, shape[1])


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.int64, np.bool_])
def test_integers_become_float64(dtype):
    x = (np.arange(60) % 2).reshape(20, 3).astype(dtype)
    found = moments(lazy(x)).compute()
    assert_within(found.mean, np.full(3, 0.5), 20 * U64)
    assert_within(found.var(), np.full(3, 0.25), 20 * U64)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_channel(value):
    x = features(60, 4, np.float32)
    dirty = x.copy()
    dirty[[3, 30], 1] = value
    found, clean = moments(lazy(dirty)).compute(), moments(lazy(x)).compute()
    assert not np.isfinite(found.mean[1])
    assert np.isnan(found.m2[1])
    kept = [0, 2, 3]
    assert bits(found.mean[kept]) == bits(clean.mean[kept])
    assert bits(found.m2[kept]) == bits(clean.m2[kept])


def test_inputs_are_not_modified_and_may_be_read_only():
    x = features()
    x.flags.writeable = False
    before = bits(x)
    Standardizer().fit(lazy(x)).transform(lazy(x)).compute()
    assert bits(x) == before


# ---- the same bits ------------------------------------------------------------------------------------------------


def dawdle(block, seed):
    time.sleep(np.random.default_rng([seed, int(block.flat[0] * 1e6)]).uniform(0, 0.004))
    return block


@pytest.mark.parametrize("seed", range(3))
def test_schedulers_threads_and_timing_change_no_bit(seed):
    x = da.from_array(np.abs(features(300, 40, np.float32)), chunks=(9, 20))
    expected = all_bits(moments(x).compute(scheduler="synchronous"))
    slow = x.map_blocks(dawdle, seed=seed, dtype=x.dtype)
    for workers in (1, 2, 8):
        assert all_bits(moments(slow).compute(scheduler="threads", num_workers=workers)) == expected


def test_strides_change_no_bit():
    x = np.random.default_rng(0).normal(100, 1, (90, 16, 30)).astype(np.float32)
    ways = [np.ascontiguousarray, np.asfortranarray, lambda block: np.repeat(block, 2, axis=1)[:, ::2],
            lambda block: np.moveaxis(np.moveaxis(block, 1, -1).copy(), -1, 1)]  # fmt: skip
    assert len({bits(fastbn.Moments.of(way(x)).m2) for way in ways}) > 1  # else this tests nothing
    arrays = [lazy(x, (40, 8, 30)).map_blocks(way, dtype=x.dtype) for way in ways]
    assert len({all_bits(moments(array).compute()) for array in arrays}) == 1


def test_the_threads_of_fastbn_stay_out_of_it():
    """Workers' threads are enough: each task asks for one."""
    code = """
        import dask.array as da, fastbn, os
        from fastbn.interop.dask import moments
        fastbn.set_num_threads(4)
        moments(da.ones((4_000, 64), chunks=(2_000, 64))).compute(scheduler="synchronous")
        print(len(os.listdir("/proc/self/task")))
    """
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc")
    alone = run_python("import dask.array, fastbn.interop.dask, os; print(len(os.listdir('/proc/self/task')))")
    assert run_python(code).stdout == alone.stdout


# ---- lazy, and pure -----------------------------------------------------------------------------------------------


def test_moments_are_lazy_and_compose():
    loaded = []
    x, y = features(), features(30, 3)
    a = da.map_blocks(lambda block: (loaded.append(1), block)[1], lazy(x), dtype=x.dtype, meta=x[:0])
    parts = moments(a), moments(lazy(y)), moments(a).var(correction=1)
    assert not loaded
    first, second, var = dask.compute(*parts)
    assert len(loaded) == a.npartitions  # one load for both uses
    assert bits(var) == bits(first.var(correction=1))
    assert moments(lazy(x)).key == moments(lazy(x)).key != moments(lazy(y)).key
    both = dask.delayed(lambda p, q: fastbn.Moments(3).merge(p).merge(q))(*parts[:2]).compute()
    assert (first.count, second.count, both.count) == (50, 30, 80)


def test_tasks_do_not_change_their_inputs():
    """Else a task that runs again, after a worker is lost, would count twice: every result is kept till the end."""
    graph = dict(moments(lazy(features(60, 4), (3, 2))).dask)
    together = zip(graph, dask.get(graph, list(graph)), strict=True)
    results = {key: all_bits(result) for key, result in together if isinstance(result, fastbn.Moments)}
    assert len(results) > 2 * 20
    assert {key: all_bits(dask.get(graph, key)) for key in results} == results


def test_each_chunk_is_one_task_with_its_load():
    """The chunk itself is no result of a task, so no scheduler holds it."""
    loaded = da.concatenate([da.from_delayed(dask.delayed(np.ones)((10, 3)), (10, 3), float) for _ in range(5)])
    for x in (da.random.default_rng(0).random((100, 4), chunks=(10, 2)), np.sqrt(loaded[:, ::-1] + 1)):
        results = dask.get(dict(moments(x).dask), list(moments(x).dask))
        assert not [r for r in results if isinstance(r, np.ndarray) and r.shape[0] == 10]


# ---- Standardizer -------------------------------------------------------------------------------------------------


def same_statistics(a, b):
    names = ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_")
    return all(bits(getattr(a, name)) == bits(getattr(b, name)) for name in names)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32, ">f4"])
@pytest.mark.parametrize("chunks", [(7, 2), (50, 3), (1, 1)])
def test_fit_transform_and_back(dtype, chunks):
    x = features(dtype=dtype)
    x[:, 2] = 7
    array = lazy(x, chunks)
    scaler = Standardizer()
    assert scaler.fit(array) is scaler
    local = fastbn.Standardizer.from_moments(moments(array).compute())
    assert same_statistics(scaler, local)
    assert scaler.scale_[2] == 1
    for ours, theirs in (scaler.transform, local.transform), (scaler.inverse_transform, local.inverse_transform):
        z = ours(array)
        assert isinstance(z, da.Array)
        assert z.chunks == array.chunks
        assert z.dtype == z._meta.dtype == z.compute().dtype == theirs(x).dtype
        assert bits(z.compute()) == bits(theirs(x))
        assert bits(ours(x)) == bits(theirs(x))  # NumPy arrays as ever
    assert bits(Standardizer().fit_transform(array).compute()) == bits(local.transform(x))


def test_fit_forgets_and_partial_fit_adds():
    x = features()
    scaler = Standardizer().partial_fit(lazy(x[:20]))
    assert same_statistics(scaler, Standardizer().fit(lazy(x[:20])))
    kept = scaler.moments_
    assert scaler.partial_fit(lazy(x[20:])) is scaler
    assert (kept.count, scaler.n_samples_seen_) == (20, 50)
    parts = [moments(lazy(part)).compute() for part in (x[:20], x[20:])]
    assert same_statistics(scaler, fastbn.Standardizer.from_moments(parts[0].merge(parts[1])))
    before = all_bits(scaler.moments_)
    scaler.partial_fit(lazy(x)[:0])
    scaler.partial_fit(lazy(x)[lazy(x)[:, 0] > 1e9])
    assert all_bits(scaler.moments_) == before
    scaler.partial_fit(x)  # NumPy
    assert scaler.n_samples_seen_ == 100
    assert same_statistics(scaler.fit(lazy(x)), Standardizer().fit(lazy(x)))


def test_transform_is_lazy_and_keeps_what_was_fitted_then():
    x = features()
    scaler = Standardizer().fit(lazy(x))
    z, expected = scaler.transform(lazy(x)), scaler.transform(x)
    scaler.fit(lazy(x) + 100)
    assert bits(z.compute()) == bits(expected)
    unknown = lazy(x)[lazy(x)[:, 1] > 5]
    assert bits(scaler.transform(unknown).compute()) == bits(scaler.transform(x[x[:, 1] > 5]))
    assert bits(scaler.transform(lazy(x)[:0]).compute()) == b""


def test_not_finite_values_and_overflow_raise_no_warnings():
    x = features(dtype=np.float32)
    x[:, 2] *= 1e-6
    x[3, 1] = np.inf
    scaler = Standardizer().fit(lazy(x))
    assert np.isfinite(scaler.mean_[[0, 2]]).all()
    x[:, [0, 2]] = 3e38
    z, back = scaler.transform(lazy(x)).compute(), scaler.inverse_transform(lazy(x)).compute()
    assert np.isnan(z[:, 1]).all()
    assert np.isinf(z[:, 2]).all()
    assert np.isinf(back[:, 0]).all()


def test_a_standardizer_is_fastbns_and_pickles():
    scaler = Standardizer().fit(lazy(features()))
    assert isinstance(scaler, fastbn.Standardizer)
    assert isinstance(Standardizer.from_moments(scaler.moments_), Standardizer)
    assert repr(scaler) == "Standardizer(3 features)"
    assert same_statistics(pickle.loads(pickle.dumps(scaler)), scaler)


# ---- recalibrate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "unbiased"), [(1, True), (-1, False)])
def test_recalibrate_is_the_layers_own(axis, unbiased):
    x = np.random.default_rng(0).normal(3, 2, (12, 5, 4, 5)).astype(np.float32)
    ours, theirs = (fastbn.BatchNorm(5, axis=axis, unbiased=unbiased, dtype=np.float64) for _ in range(2))
    arrays = ours.running_mean, ours.running_var
    assert recalibrate(ours, lazy(x, (5, 2, 3, 2))) is None
    theirs.recalibrate([x])
    mean, var, centred = oracle(x, axis)
    n, r = x.size // 5, np.abs(centred).max()
    assert_within(ours.running_mean, mean, np.full(5, 16 * unit(x.dtype) * r))
    assert_within(ours.running_var, var * n / (n - unbiased), np.full(5, 150 * unit(x.dtype) * r**2))
    assert_within(ours.running_var, theirs.running_var, np.full(5, 150 * unit(x.dtype) * r**2))
    assert arrays[0] is ours.running_mean
    assert arrays[1] is ours.running_var
    before = bits(ours.running_mean), bits(ours.running_var)
    recalibrate(ours, lazy(x, -1)[:0])
    assert (bits(ours.running_mean), bits(ours.running_var)) == before


def test_recalibrate_is_silent_where_float32_overflows():
    bn = fastbn.BatchNorm(2)
    recalibrate(bn, lazy(np.array([[1.0, 1e30], [2.0, -1e30]]), (1, 1)))
    assert bn.running_var.tolist() == [0.5, np.inf]


# ---- errors: before anything is computed where the metadata allow it, and nothing is changed ----------------------


def broken(block):
    if block.size and block[0, 0] > 0:
        raise OSError("disk 7 is on fire")
    return block


def burning():
    x = features()
    return da.map_blocks(broken, lazy(x), dtype=x.dtype, meta=x[:0])


def never(block):
    raise AssertionError("was computed")


def unloaded(x):
    """Return a dask array that must not be computed."""
    return da.map_blocks(never, da.from_array(x, chunks=2), dtype=x.dtype, meta=x[:0])


FITTED = Standardizer().fit(features())
LAYER = fastbn.BatchNorm(3)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: moments(features()), TypeError, "x: expected a dask array, got ndarray"),
        (lambda: moments(unloaded(features()), 2), ValueError, "axis: expected -2 to 1 for an array of 2 dimensions"),
        (lambda: moments(unloaded(features()), 1.0), TypeError, "axis: expected an integer, got 1.0"),
        (lambda: moments(unloaded(np.ones(5))), ValueError, "x: expected 2 or more dimensions, got 1"),
        (lambda: moments(unloaded(np.ones((5, 2), complex))), TypeError, "x: expected an array of float16"),
        (lambda: moments(unloaded(np.ones((5, 2), object))), TypeError, "got dtype object"),
        (lambda: moments(da.ma.masked_array(np.ones((5, 2)))), TypeError, "got a masked array"),
        (lambda: FITTED.fit(unloaded(np.ones((4, 3), complex))), TypeError, "x: expected an array of float16"),
        (lambda: FITTED.fit(unloaded(np.ones((4, 3, 2)))), ValueError, "x: expected shape (N, F), got (4, 3, 2)"),
        (lambda: FITTED.fit(unloaded(np.ones(4))), ValueError, "x: expected shape (N, F), got (4,)"),
        (lambda: FITTED.fit(lazy(features())[:0]), ValueError, "x: expected at least one row, got shape (0, 3)"),
        (lambda: FITTED.fit(lazy(features())[lazy(features())[:, 0] > 99]), ValueError, "at least one row, got shape"),
        (lambda: FITTED.fit(dask.delayed(features())), TypeError, "x: expected a dask array, got a dask Delayed"),
        (lambda: FITTED.transform(dask.delayed(features())), TypeError, "x: expected a dask array, got a dask Delayed"),
        (lambda: FITTED.partial_fit(unloaded(features(4, 2))), ValueError, "x: expected shape (N, 3), got (4, 2)"),
        (lambda: FITTED.partial_fit(unloaded(np.ones((4, 3), "U1"))), TypeError, "x: expected an array of float16"),
        (lambda: FITTED.partial_fit(hidden(features(4, 2))), ValueError, "x: expected shape (N, 3), got 2 features"),
        (lambda: FITTED.transform(unloaded(features(4, 2))), ValueError, "x: expected shape (N, 3), got (4, 2)"),
        (lambda: FITTED.inverse_transform(unloaded(np.ones(3))), ValueError, "x: expected shape (N, 3), got (3,)"),
        (lambda: FITTED.transform(unloaded(np.ones((4, 3), complex))), TypeError, "x: expected an array of float16"),
        (lambda: FITTED.transform(hidden(features())), ValueError, "got (50, nan): call compute_chunk_sizes()"),
        (lambda: Standardizer().transform(unloaded(features())), ValueError, "call fit(x) first"),
        (lambda: FITTED.fit(burning()), OSError, "disk 7 is on fire"),
        (lambda: FITTED.partial_fit(burning()), OSError, "disk 7 is on fire"),
        (lambda: FITTED.fit(liar(lambda b: b[:, :1])), ValueError, "expected chunks of equally many channels, got"),
        (lambda: FITTED.fit(liar(lambda b: b[:3], (50, 1))), ValueError, "equally many values in all channels, got"),
        (lambda: FITTED.fit(liar(lambda b: b * 1j)), TypeError, "x: expected an array of float16"),
        (lambda: recalibrate(FITTED, lazy(features())), TypeError, "bn: expected a fastbn.BatchNorm, got Standardizer"),
        (lambda: recalibrate(LAYER, features()), TypeError, "x: expected a dask array, got ndarray"),
        (lambda: recalibrate(LAYER, unloaded(features(4, 2))), ValueError, "3 channels on axis 1, got shape (4, 2)"),
        (lambda: recalibrate(LAYER, hidden(features(4, 2))), ValueError, "expected 3 channels on axis 1, got 2"),
        (lambda: recalibrate(LAYER, lazy(features(1, 3))), ValueError, "expected 2 or more values per channel in"),
        (lambda: recalibrate(LAYER, burning()), OSError, "disk 7 is on fire"),
        (lambda: recalibrate(fastbn.BatchNorm(3, track_running_stats=False), lazy(features())), ValueError,
         "bn: expected running statistics, got track_running_stats=False"),
    ],
)  # fmt: skip
def test_refused_and_nothing_changed(call, error, words):
    def state():
        return (*all_bits(FITTED.moments_), bits(FITTED.mean_), bits(FITTED.scale_), FITTED.n_samples_seen_,
                bits(LAYER.running_mean), bits(LAYER.running_var))  # fmt: skip

    before = state()
    with pytest.raises(error, match=re.escape(words)):
        call()
    assert state() == before


def hidden(x):
    """Return a dask array that does not know how many columns it has."""
    return lazy(x)[:, da.from_array(np.ones(x.shape[1], bool), chunks=2)]


def liar(function, chunks=(7, 2)):
    """Return a dask array whose first chunk is what `function` makes of it, not what its metadata say."""
    x = features(50, 3)

    def first(block, block_info=None):
        return function(block) if set(block_info[0]["chunk-location"]) == {0} else block

    return da.map_blocks(first, lazy(x, chunks), dtype=x.dtype, meta=x[:0])


def test_without_dask_the_extra_is_named():
    code = """
        import sys
        sys.modules["dask"] = None
        import fastbn.interop.dask
    """
    process = run_python(code, check=False)
    assert 'ModuleNotFoundError: fastbn.interop.dask needs dask: pip install "fastbn[dask]"' in process.stderr


# ---- beside dask's own --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_is_dasks_own_in_float64(offset):
    x = features(500, 4, offset=offset)
    array, found = lazy(x, (33, 2)), moments(lazy(x, (33, 2))).compute()
    off, r = 500 * U64 * np.abs(x).max(), np.abs(x - x.mean(0)).max()
    assert_within(found.mean, array.mean(0).compute(), np.full(4, 2 * off))
    assert_within(found.var(), array.var(0).compute(), np.full(4, 4000 * U64 * r**2 + 32 * off * r))


# ---- a cluster of processes ---------------------------------------------------------------------------------------

CLUSTER = """
    import json, os, signal, sys, threading, time
    import dask, numpy as np
    import dask.array as da
    from distributed import Client, LocalCluster
    import fastbn
    from fastbn.interop.dask import Standardizer, moments

    def cluster(n_workers, **options):
        return LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None,
                            local_directory=os.getcwd(), **options)

    def text(m):
        return [m.count, m.mean.tobytes().hex(), m.m2.tobytes().hex()]

    def tell(**found):
        print(json.dumps(found), flush=True)
"""
TIME_LIMIT = 100  # seconds until a cluster counts as hanging


def on_a_cluster(code, folder):
    """Return what a script tells that starts a LocalCluster in a session of its own, which is ended if it hangs."""
    pytest.importorskip("distributed")
    path = os.pathsep.join(filter(None, (str(UNDER_TEST), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CLUSTER) + textwrap.dedent(code)], cwd=folder, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end after {TIME_LIMIT} s\n{out}\n{err}") from None
    assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    return json.loads(out.splitlines()[-1])


def test_processes_change_no_bit_and_errors_come_back(tmp_path):
    found = on_a_cluster(
        """
        def dawdle(block, seed):
            time.sleep(np.random.default_rng([seed, int(block.flat[0] * 1e6)]).uniform(0, 0.02))
            return block

        def broken(block):
            if block.size and block.flat[0] == 7:
                raise OSError("disk 7 is on fire")
            return block

        values = np.abs(np.random.default_rng(0).normal(5, 2, (6, 300, 40))).astype(np.float32)
        x = da.from_array(values, chunks=(3, 30, 20))
        alone = text(moments(x, 2).compute(scheduler="synchronous"))
        results = [text(moments(x, 2).compute(scheduler="processes", num_workers=2))]
        with cluster(2) as group, Client(group):
            results += [text(moments(x.map_blocks(dawdle, seed=seed, dtype=x.dtype), 2).compute()) for seed in (1, 2)]
            kept = da.asarray(np.asfortranarray(values), chunks=x.chunks).persist()  # chunks that workers hold
            results.append(text(moments(kept, 2).compute()))
            flat = x.reshape(-1, 40)
            scaler = Standardizer().fit(flat)
            z = scaler.transform(flat).compute()
            before, errors = text(scaler.moments_), []
            bad = da.map_blocks(broken, da.from_array(np.arange(20.0).reshape(10, 2), chunks=1), meta=np.empty((0, 0)))
            liar = da.map_blocks(lambda b: b[:, :1] if b[0, 0] < 5 else b, da.ones((10, 40), chunks=(5, 40)).cumsum(0),
                                 dtype=float, meta=np.empty((0, 0)))
            for call in (lambda: scaler.fit(bad), lambda: scaler.partial_fit(liar)):
                try:
                    call()
                except Exception as error:
                    errors.append([type(error).__name__, str(error)])
            unchanged = text(scaler.moments_) == before
        local = fastbn.Standardizer.from_moments(scaler.moments_).transform(flat.compute())
        tell(alone=alone, results=results, errors=errors, unchanged=unchanged, same=z.tobytes() == local.tobytes())
        """,
        tmp_path,
    )
    assert found["results"] == [found["alone"]] * 4
    assert found["alone"][0] == 6 * 300
    assert found["errors"] == [
        ["OSError", "disk 7 is on fire"],
        ["ValueError", "x: expected chunks of equally many channels, got some of 1 and 40"],
    ]
    assert found["unchanged"]
    assert found["same"]


def test_a_killed_worker_loses_nothing_and_nothing_counts_twice(tmp_path):
    """SIGKILL in the middle of the fit: the chunk at work and the parts that the worker held are computed anew."""
    found = on_a_cluster(
        """
        CHUNKS, ROWS, LOG = 60, 50, os.path.join(os.getcwd(), "loaded")

        def load(number):
            with open(LOG, "a") as log:
                log.write(f"{number} {os.getpid()}\\n")
            time.sleep(0.05)
            return np.random.default_rng(number).normal(1e4, 1, (ROWS, 8)).astype(np.float32)

        def loaded():
            return [line.split() for line in open(LOG)] if os.path.exists(LOG) else []

        chunks = [da.from_delayed(dask.delayed(load)(i), (ROWS, 8), np.float32) for i in range(CHUNKS)]
        x = da.concatenate(chunks)
        undisturbed = text(moments(x).compute(scheduler="synchronous"))
        os.remove(LOG)
        killed = []

        def kill():
            while len(loaded()) < CHUNKS // 3:
                time.sleep(0.005)
            killed.append(loaded()[-1][1])
            os.kill(int(killed[0]), signal.SIGKILL)

        with cluster(2) as group, Client(group):
            killer = threading.Thread(target=kill, daemon=True)
            killer.start()
            scaler = Standardizer().fit(x)
            killer.join()
        log = loaded()
        tell(undisturbed=undisturbed, found=text(scaler.moments_), killed=killed, loads=len(log),
             by_the_killed=sum(pid == killed[0] for _, pid in log), numbers=len({number for number, _ in log}))
        """,
        tmp_path,
    )
    assert found["by_the_killed"] > 2
    assert found["numbers"] == 60
    assert found["loads"] > 60  # something was lost, and computed again
    assert found["found"][0] == 60 * 50
    assert found["found"] == found["undisturbed"]


def test_memory_stays_bounded(tmp_path):
    """2 GiB through two workers of 400 MiB that may not spill: each grows by less than four chunks."""
    found = on_a_cluster(
        """
        import resource

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

        def load(block_id):
            block = np.random.default_rng(block_id).random((65_536, 64), np.float32)
            block += 1000
            return block

        def array(chunks):
            return da.map_blocks(load, chunks=((65_536,) * chunks, (64,)), meta=np.empty((0, 0), np.float32))

        memory = "distributed.worker.memory."
        with dask.config.set({memory + "target": False, memory + "spill": False, memory + "pause": False}):
            with cluster(2, memory_limit=400 << 20) as group, Client(group) as client:
                Standardizer().fit(array(4))  # what is imported at the first task is no growth
                before = client.run(peak)
                x = array(128)
                scaler = Standardizer().fit(x)
                after = client.run(peak)
        tell(array=x.nbytes, chunk=x.nbytes // 128, limit=400 << 20, count=scaler.n_samples_seen_,
             mean=scaler.mean_.tolist(), growth=[after[worker] - before.get(worker, 0) for worker in after])
        """,
        tmp_path,
    )
    assert found["array"] == 2 << 30
    assert found["array"] > 5 * found["limit"]
    assert found["count"] == 128 * 65_536
    assert np.abs(np.array(found["mean"]) - 1000.5).max() < 1e-3
    assert len(found["growth"]) == 2
    assert max(found["growth"]) < 4 * found["chunk"]
