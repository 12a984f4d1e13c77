"""Python threads at once on shared arrays and layers: the bits of one thread, and never half of an update."""

import faulthandler
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbn
from fastbn import optim, threads

THREADS = 8
TIME_LIMIT = 100  # seconds until a thread counts as hanging


@pytest.fixture(autouse=True)
def often_switched(monkeypatch):
    monkeypatch.setattr(threads, "_chosen", threads._chosen)  # what a thread chooses is not to outlive the test
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*works):
    """Run functions each in a thread, started together; return their results."""
    start = threading.Barrier(len(works))

    def run(work):
        start.wait(TIME_LIMIT)
        return work()

    faulthandler.dump_traceback_later(TIME_LIMIT, exit=True, file=sys.__stderr__)  # the pool waits for all its threads
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            return [future.result() for future in [pool.submit(run, work) for work in works]]
    finally:
        faulthandler.cancel_dump_traceback_later()


# ---- everything public at once -----------------------------------------------------------------------------

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6, 9, 11)).astype(np.float32)
ROWS = RNG.normal(size=(300, 301))
MEAN, VAR = RNG.normal(size=6), RNG.random(6) + 0.1
GAMMA, BETA = RNG.normal(size=(2, 6)).astype(np.float32)
CONV, DENSE = RNG.normal(size=(6, 4, 3, 3)).astype(np.float32), RNG.normal(size=(6, 5)).astype(np.float32)
LARGE = np.broadcast_to(RNG.normal(size=256).astype(np.float32), (1 << 15, 256))  # its results are 32 MiB
SAVED = fastbn.batch_norm_train(X, GAMMA, BETA, activation="relu", residual=X)[1]
LAYER = fastbn.BatchNorm(6)
LAYER(X)
LAYER.eval()
NEXT = fastbn.BatchNorm(4)
SCALER = fastbn.Standardizer().fit(ROWS)
PARTS = [fastbn.Moments.of(part) for part in np.array_split(X, 5)]


def train_into_own():
    out = np.empty_like(X)
    return fastbn.batch_norm_train(X, GAMMA, BETA, out=out)[0], out


def backward_into_own():
    out = np.empty_like(X)
    return (*fastbn.batch_norm_backward(X, SAVED, out=out), out)


def merged():
    total = fastbn.Moments(6)
    for part in PARTS:
        total.merge(part)
    return total.count, total.mean, total.m2, total.update(X).var(1)


def own_training():
    bn = fastbn.BatchNorm(6)
    params = [np.ones(1000, np.float32), bn.gamma]
    opt = optim.Adam(params, clip_norm=1.0)
    for _ in range(3):
        dx = bn.backward(bn(X) ** 2)
        opt.step([np.full(1000, 0.5, np.float32), bn.grad_gamma])
    optim.project_max_norm(params, 0.1)
    bn.recalibrate([X, PARTS[0]])
    return (dx, *params, *bn.state_dict().values(), *opt.state_dict()["exp_avg"])


def chosen_threads():
    fastbn.set_num_threads(2)
    with fastbn.num_threads(3):
        return fastbn.batch_norm_train(ROWS)[0]


def large_results():
    y, saved = fastbn.batch_norm_train(LARGE, np.ones(256), np.arange(256))
    fastbn.release_buffers()
    dx = fastbn.batch_norm_backward(y, saved).dx
    return y[::1000].copy(), y[-1].copy(), dx[::1000].copy(), dx[-1].copy()


WORK = {
    "train": lambda: fastbn.batch_norm_train(X, GAMMA, BETA, activation="relu", num_threads=2)[0],
    "train, statistics": lambda: [getattr(fastbn.batch_norm_train(ROWS)[1], name) for name in ("mean", "var", "rstd")],
    "train into its own": train_into_own,
    "infer": lambda: fastbn.batch_norm_infer(X, MEAN, VAR, GAMMA, BETA, residual=X),
    "backward": lambda: fastbn.batch_norm_backward(X, SAVED),
    "backward into its own": backward_into_own,
    "moments": lambda: [fastbn.Moments.of(X, num_threads=3).m2, fastbn.Moments.of(ROWS).mean],
    "merge": merged,
    "shared layer": lambda: [LAYER(X), *LAYER.state_dict().values(), *LAYER.to_affine()],
    "to_affine": lambda: fastbn.to_affine(LAYER),
    "fold_conv": lambda: fastbn.fold_conv(CONV, None, LAYER)[:2],
    "fold_linear": lambda: fastbn.fold_linear(DENSE, BETA, LAYER)[:2],
    "fold_into_conv": lambda: fastbn.fold_into_conv(NEXT, CONV, BETA)[:2],
    "fold_into_linear": lambda: fastbn.fold_into_linear(LAYER, DENSE.T, None)[:2],
    "standardizer": lambda: [SCALER.transform(ROWS), SCALER.inverse_transform(ROWS)],
    "own training": own_training,
    "threads": chosen_threads,
    "configuration": lambda: sorted(key for key in fastbn.show_config() if key != "threads"),
    "large results": large_results,
}


def digest(result):
    if isinstance(result, np.ndarray):
        return result.dtype.str, result.shape, result.tobytes()
    return tuple(map(digest, result)) if isinstance(result, (list, tuple)) else result


def test_everything_at_once_gives_the_bits_of_one_thread(capsys):
    alone = {name: digest(work()) for name, work in WORK.items()}

    def all_from(k):
        names = [*WORK][2 * k :] + [*WORK][: 2 * k]
        with fastbn.num_threads(1 + k % 3):
            results = [(name, digest(WORK[name]())) for _ in range(2) for name in names]
            return results, fastbn.get_num_threads()

    for k, (results, chosen) in enumerate(at_once(*[lambda k=k: all_from(k) for k in range(THREADS)])):
        assert chosen == 1 + k % 3
        for name, result in results:
            assert result == alone[name], name
    fastbn.release_buffers()


# ---- one layer in many threads -----------------------------------------------------------------------------

CHANNELS = 1 << 14  # NumPy lets other threads run within a copy so long


def two_batches():
    """Two batches with whole numbers as statistics, so that mean and variance say which of them they are of."""
    signs = np.array([[-1.0], [1.0]], np.float32) * np.ones(CHANNELS, np.float32)
    return 1 + signs, 2 + 2 * signs  # mean 1, variance 1; mean 2, variance 4


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
def test_updates_from_many_threads_are_updates_one_after_the_other(momentum):
    x = np.random.default_rng(1).normal(size=(4, CHANNELS)).astype(np.float32)
    shared, alone = (fastbn.BatchNorm(CHANNELS, momentum=momentum) for _ in range(2))
    each = 10
    at_once(*[lambda: [shared(x) for _ in range(each)] for _ in range(THREADS)])
    for _ in range(each * THREADS):
        alone(x)
    assert shared.num_batches_tracked == each * THREADS
    assert shared.running_mean.tobytes() == alone.running_mean.tobytes()
    assert shared.running_var.tobytes() == alone.running_var.tobytes()


def test_updates_with_different_batches_end_in_some_order():
    """With momentum 1 the last batch is all that remains: one thread's, mean and variance, in every channel."""
    shared = fastbn.BatchNorm(CHANNELS, momentum=1.0, unbiased=False)
    for _ in range(20):
        at_once(*[lambda x=x: [shared(x) for _ in range(3)] for x in two_batches()])
        mean, var = np.unique(shared.running_mean), np.unique(shared.running_var)
        assert (mean.tolist(), var.tolist()) in (([1.0], [1.0]), ([2.0], [4.0]))


def whole_statistics(mean, var):
    return [*np.unique(mean), *np.unique(var)] in ([1.0, 1.0], [2.0, 4.0])


def watched(shared, change, watch):
    """Return what two threads find by `watch`, over and over, while three do what `change` gives them."""
    found, changers, failed = ([], []), [0, 1, 2], threading.Event()

    def changing(k):
        try:
            for number in itertools.count():
                if number >= 60 and (failed.is_set() or min(map(len, found)) > 10):
                    break
                change(k)
        finally:
            changers.pop()

    def watching(mine):
        try:
            while changers:
                mine.append(watch())
        except BaseException:
            failed.set()
            raise

    at_once(*[lambda k=k: changing(k) for k in range(3)], *[lambda mine=mine: watching(mine) for mine in found])
    return found[0] + found[1]


def shared_layer():
    shared = fastbn.BatchNorm(CHANNELS, momentum=1.0, unbiased=False, affine=False)
    shared(two_batches()[0])
    return shared


STATES = [
    {"running_mean": np.full(CHANNELS, float(k)), "running_var": np.full(CHANNELS, float(k * k)),
     "num_batches_tracked": k}
    for k in (1, 2)
]  # fmt: skip
CHANGES = {
    "training": lambda shared, k: shared(two_batches()[k % 2]),
    "load_state_dict": lambda shared, k: shared.load_state_dict(STATES[k % 2]),
    "recalibrate": lambda shared, k: shared.recalibrate([two_batches()[k % 2]]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_dict_never_pairs_a_mean_with_anothers_variance(change):
    shared = shared_layer()

    def watch():
        state = shared.state_dict()
        return whole_statistics(state["running_mean"], state["running_var"])

    found = watched(shared, lambda k: CHANGES[change](shared, k), watch)
    assert all(found)


@pytest.mark.parametrize("change", ["load_state_dict", "recalibrate"])
def test_inference_never_pairs_a_mean_with_anothers_variance(change):
    """x = 5: (5 - 1)/1 = 4 or (5 - 2)/2 = 1.5; with another's variance 2 or 3, or some of each channel."""
    shared = shared_layer()
    shared.eval()
    shared.eps = 1e-12
    x = np.full((2, CHANNELS), 5.0)
    found = watched(shared, lambda k: CHANGES[change](shared, k), lambda: np.unique(shared(x).round(6)).tolist())
    assert {tuple(values) for values in found} <= {(4.0,), (1.5,)}


def test_to_affine_never_pairs_a_mean_with_anothers_variance():
    shared = shared_layer()
    shared.eps = 1e-12

    def watch():
        scale, shift = shared.to_affine()
        return tuple(np.unique(np.concatenate([scale, shift]).round(6)))

    found = watched(shared, lambda k: CHANGES["load_state_dict"](shared, k), watch)
    assert set(found) <= {(-1.0, 1.0), (-1.0, 0.5)}


def test_moments_gathered_by_many_threads_lose_no_part():
    """Whole numbers: the sums are exact in any order."""
    total = fastbn.Moments(CHANNELS)
    lock = threading.Lock()
    x = two_batches()[0]

    def gather():
        own = fastbn.Moments(CHANNELS)
        for _ in range(8):
            own.update(x)
        with lock:
            total.merge(own)

    at_once(*[gather] * THREADS)
    assert total.count == 2 * 8 * THREADS
    assert (total.mean == 1).all()
    assert (total.m2 == total.count).all()


def test_training_one_layer_in_threads_never_crashes():
    """Whose forward pass a backward pass belongs to is not promised: gradients fit some thread's call, or it is an
    error that says what does not fit."""
    shared = fastbn.BatchNorm(CHANNELS)
    batches = [np.random.default_rng(k).normal(size=(2 + k % 3, CHANNELS)).astype(np.float32) for k in range(THREADS)]

    def train(k):
        errors = []
        for _ in range(10):
            y = shared(batches[k])
            try:
                dx = shared.backward(y)
            except ValueError as error:
                errors.append(str(error))
            else:
                assert dx.shape == y.shape
                assert np.isfinite(dx).all()
        return errors

    for errors in at_once(*[lambda k=k: train(k) for k in range(THREADS)]):
        assert all(error.startswith("dy: expected shape") for error in errors)
    assert shared.num_batches_tracked == 10 * THREADS
    assert all(np.isfinite(array).all() for array in shared.state_dict().values())
