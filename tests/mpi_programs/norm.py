"""SyncBatchNorm on real ranks: against the oracle for the whole batch, and against fastbn.BatchNorm."""

import copy

import ml_dtypes
import numpy as np
import reference
from harness import COMM, raised, rows_of, run, same_on_all

import fastbn
from fastbn.interop.mpi import SyncBatchNorm

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]


def batch(shape, dtype, seed=0, offset=3.0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=shape) + shift).astype(dtype) for shift in (offset, 0.0, 0.0)]  # x, residual, dy


def hold_to_the_oracle(comm, shape, axis, dtype, activation, with_residual, *, empty=False, offset=3.0):
    """A training step over the ranks, its rows on the first axis that is not the channels'."""
    dtype, rows_axis = np.dtype(dtype), 0 if axis % len(shape) else 1
    mine = [slice(None)] * len(shape)
    mine[rows_axis] = rows_of(shape[rows_axis], comm, empty=empty)
    mine = tuple(mine)
    x, residual, dy = batch(shape, dtype, offset=offset)
    residual = residual if with_residual else None
    c = shape[axis]
    bn = SyncBatchNorm(comm, c, axis=axis, activation=activation)
    bn.gamma[...], bn.beta[...] = np.linspace(-2, 3, c), np.linspace(1, -1, c)
    y = bn(x[mine], residual=residual if residual is None else residual[mine])
    dx = bn.backward(dy[mine])

    options = {"axis": axis, "activation": activation, "residual": residual}
    whole = reference.train(x, bn.gamma, bn.beta, **options)
    bound = reference.y_bound(whole, bn.gamma, bn.beta, dtype, axis, residual=residual)
    reference.assert_within(y, whole.y[mine], bound[mine], "y")
    passes = np.concatenate(comm.allgather(y > 0), rows_axis) if activation else True
    back = reference.backward(dy, x, bn.gamma, axis=axis, passes=passes)
    bound = reference.backward_bound(back, whole, bn.gamma, dtype, axis, np.float32)
    reference.assert_within(dx, back.dx[mine], bound.dx[mine], "dx")
    reference.assert_within(bn.grad_gamma, back.dgamma, bound.dgamma, "dgamma")
    reference.assert_within(bn.grad_beta, back.dbeta, bound.dbeta, "dbeta")
    if with_residual:
        np.testing.assert_array_equal(bn.grad_residual, back.dz[mine].astype(dtype))
    assert y.dtype == dx.dtype == dtype
    assert y.shape == dx.shape == x[mine].shape

    m = x.size // c
    np.testing.assert_allclose(bn.running_mean, np.float64(0.1 * whole.mean), rtol=1e-6)
    np.testing.assert_allclose(bn.running_var, np.float64(0.9 + 0.1 * whole.var * m / (m - 1)), rtol=1e-6)
    assert bn.num_batches_tracked == 1
    same_on_all(comm, bn.running_mean, bn.running_var, bn.grad_gamma, bn.grad_beta)


def every_dtype_activation_and_residual(comm):
    for dtype in DTYPES:
        for activation in None, "relu":
            for with_residual in False, True:
                hold_to_the_oracle(comm, (13, 6, 5, 5), 1, dtype, activation, with_residual)


def channels_last_and_first(comm):
    for shape, axis in [((11, 4, 4, 7), -1), ((29, 33), 1), ((6, 24), 0), ((9, 3, 300), 1)]:
        hold_to_the_oracle(comm, shape, axis, np.float32, "relu", False)


def a_rank_without_rows(comm):
    for activation, with_residual in (None, False), ("relu", False), ("relu", True):
        hold_to_the_oracle(comm, (9, 5, 7), 1, np.float32, activation, with_residual, empty=True)


def one_row_on_each_rank(comm):
    hold_to_the_oracle(comm, (comm.size, 40), 1, np.float32, None, False)


def a_mean_of_a_million_deviations(comm):
    hold_to_the_oracle(comm, (64, 9, 3), 1, np.float32, "relu", False, offset=1e6)


def several_steps_equal_one_process(comm):
    """Running statistics in every way of moving them, and inference with them."""
    for options in {"momentum": None}, {"momentum": 0.3, "unbiased": False}, {"dtype": np.float64, "affine": False}:
        bn, alone = SyncBatchNorm(comm, 5, **options), fastbn.BatchNorm(5, **options)
        for step in range(4):
            x = batch((12 + step, 5, 3), np.float64, seed=step)[0]
            bn(x[rows_of(len(x), comm)])
            alone(x)
        for key, value in alone.state_dict().items():
            rtol = 4 * np.finfo(bn.dtype).eps  # each move may round to the other side
            np.testing.assert_allclose(bn.state_dict()[key], value, rtol=rtol, err_msg=key)
        same_on_all(comm, *bn.state_dict().values())
        alone.load_state_dict(bn.state_dict())
        np.testing.assert_array_equal(bn.eval()(x), alone.eval()(x))  # each rank's own, the same bits


def inference_is_no_exchange_but_its_backward_is(comm):
    bn, alone = SyncBatchNorm(comm, 4).eval(), fastbn.BatchNorm(4).eval()
    for layer in bn, alone:
        layer.running_mean[...], layer.running_var[...] = 1.0, [1, 2, 3, 4]
    x, _, dy = batch((10, 4), np.float32)
    mine = rows_of(10, comm)
    if comm.rank == 0:
        bn(x)  # nobody else calls it
    np.testing.assert_array_equal(bn(x[mine]), alone(x)[mine])
    np.testing.assert_array_equal(bn.backward(dy[mine]), alone.backward(dy)[mine])
    u = 16 * np.finfo(np.float32).eps
    np.testing.assert_allclose(bn.grad_gamma, alone.grad_gamma, rtol=u, atol=u * abs(dy).sum())
    np.testing.assert_allclose(bn.grad_beta, alone.grad_beta, rtol=u, atol=u * abs(dy).sum())


def without_running_statistics_inference_takes_the_batch(comm):
    bn = SyncBatchNorm(comm, 4, track_running_stats=False).eval()
    x = batch((10, 4), np.float64)[0]
    mine = rows_of(10, comm)
    whole = fastbn.batch_norm_train(x)[0]
    np.testing.assert_allclose(bn(x[mine]), whole[mine], atol=64 * np.finfo(float).eps * abs(whole).max())


def outputs_in_given_memory(comm):
    x, _, dy = batch((9, 5, 2), np.float32)
    mine = rows_of(9, comm)
    bn = SyncBatchNorm(comm, 5)
    y, dx = bn(x[mine]), bn.backward(dy[mine])
    out, out_dx = np.empty_like(y), np.asfortranarray(dy[mine])
    assert bn(x[mine], out=out) is out
    assert bn.backward(out_dx, out=out_dx) is out_dx
    np.testing.assert_array_equal(out, y)
    np.testing.assert_array_equal(out_dx, dx)
    own = x[mine].copy()
    bn(own, out=own)
    np.testing.assert_array_equal(own, y)
    assert "overwrote" in str(raised(bn.backward, dy[mine]))


def inputs_of_any_kind_stay_as_they_are(comm):
    x, _, dy = batch((9, 5, 4), np.float32)
    mine = rows_of(9, comm)
    bn = SyncBatchNorm(comm, 5)
    y, dx = bn(x[mine]), bn.backward(dy[mine])
    for place in np.asfortranarray, lambda a: np.repeat(a, 2, axis=2)[:, :, ::2], lambda a: a[:, :, ::-1][:, :, ::-1]:
        other, other_dy = place(x[mine]), place(dy[mine])
        other.flags.writeable = other_dy.flags.writeable = False
        kept = other.tobytes()
        for result, expected in (bn(other), y), (bn.backward(other_dy), dx):  # sums in another order
            np.testing.assert_allclose(result, expected, rtol=0, atol=64 * np.finfo(np.float32).eps)
        assert other.tobytes() == kept


def the_same_ranks_give_the_same_bits(comm):
    results = []
    for threads in 1, 2, 1:
        bn = SyncBatchNorm(comm, 8, activation="relu")
        x, residual, dy = batch((40, 8, 90), np.float32)
        mine = rows_of(40, comm)
        y = bn(x[mine], residual=residual[mine], num_threads=threads)
        dx = bn.backward(dy[mine], num_threads=threads)
        arrays = y, dx, bn.grad_gamma, bn.grad_beta, bn.grad_residual, bn.running_mean, bn.running_var
        results.append([reference.bits(a) for a in arrays])
    assert results[0] == results[1] == results[2]


def a_channel_with_nan_spoils_no_other(comm):
    x, _, dy = batch((12, 5, 3), np.float32)
    spoilt = x.copy()
    spoilt[0, 2, 0], spoilt[-1, 4, 0] = np.nan, np.inf
    mine = rows_of(12, comm)
    results = []
    for data in x, spoilt:
        bn = SyncBatchNorm(comm, 5)
        results.append((bn(data[mine]), bn.backward(dy[mine]), bn.running_mean, bn.running_var))
    for clean, with_nan in zip(*results, strict=True):
        at = 1 if clean.ndim > 1 else 0
        np.testing.assert_array_equal(np.take(clean, [0, 1, 3], at), np.take(with_nan, [0, 1, 3], at))
    assert np.isnan(results[1][0][:, [2, 4]]).all()
    assert np.isnan(results[1][2][[2, 4]]).all()


def empty_on_all_ranks(comm):
    bn = SyncBatchNorm(comm, 5)
    before = bn.state_dict()
    y = bn(np.empty((0, 5, 3), np.float32))
    assert y.shape == bn.backward(y).shape == (0, 5, 3)
    assert not bn.grad_gamma.any()
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def population_statistics_of_all_ranks(comm):
    for method in "pooled", "paper":
        for unbiased in True, False:
            bn = SyncBatchNorm(comm, 3, unbiased=unbiased, dtype=np.float64)
            alone = fastbn.BatchNorm(3, unbiased=unbiased, dtype=np.float64)
            x = batch((31, 3), np.float64)[0]
            batches = [x[i : i + 4] for i in range(0, 31, 4)]
            own = batches[rows_of(len(batches), comm, empty=True)]
            bn.recalibrate([fastbn.Moments.of(b) for b in own] if unbiased else own, method)
            alone.recalibrate(batches, method)
            np.testing.assert_allclose(bn.running_mean, alone.running_mean, rtol=1e-14)
            np.testing.assert_allclose(bn.running_var, alone.running_var, rtol=1e-14)
            same_on_all(comm, bn.running_mean, bn.running_var)
    before = bn.running_mean.copy()
    bn.recalibrate([])
    np.testing.assert_array_equal(bn.running_mean, before)


def it_folds_copies_and_loads_as_a_batch_norm(comm):
    bn = SyncBatchNorm(comm, 3)
    x = batch((12, 3), np.float32)[0]
    bn(x[rows_of(12, comm)])
    plain = fastbn.BatchNorm(3)
    plain.load_state_dict(bn.state_dict())
    weight = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(fastbn.fold_linear(weight, None, bn).weight,
                                  fastbn.fold_linear(weight, None, plain).weight)  # fmt: skip
    np.testing.assert_array_equal(bn.to_affine(), plain.to_affine())
    twin = copy.deepcopy(bn)
    np.testing.assert_array_equal(twin(x), bn(x))
    assert repr(bn) == "SyncBatchNorm(3, axis=1, eps=1e-05, momentum=0.1)"


def its_messages_never_meet_the_programs_own(comm):
    bn, x = SyncBatchNorm(comm, 3), batch((4, 3), np.float32, seed=comm.rank)[0]
    for tag in 0, 7:
        request = comm.isend("mine", (comm.rank + 1) % comm.size, tag)
        bn(x)
        assert comm.recv(source=(comm.rank - 1) % comm.size, tag=tag) == "mine"
        request.wait()


def parts_of_a_communicator(comm):
    """Each half on its own, its ranks in the reverse order; and one rank alone is a plain BatchNorm, bit for bit."""
    half = comm.Split(comm.rank % 2, -comm.rank)
    hold_to_the_oracle(half, (7, 4, 3), 1, np.float32, "relu", False)
    half.Free()
    alone = comm.Split(comm.rank)
    x, residual, dy = batch((9, 5, 2), np.float32, seed=comm.rank)
    bn, plain = SyncBatchNorm(alone, 5, activation="relu"), fastbn.BatchNorm(5, activation="relu")
    alone.Free()  # a layer keeps what it needs
    for _ in range(2):
        np.testing.assert_array_equal(bn(x, residual=residual), plain(x, residual=residual))
        np.testing.assert_array_equal(bn.backward(dy), plain.backward(dy))
    np.testing.assert_array_equal(bn.running_var, plain.running_var)
    np.testing.assert_array_equal(bn.grad_gamma, plain.grad_gamma)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    run(
        every_dtype_activation_and_residual, channels_last_and_first, a_rank_without_rows, one_row_on_each_rank,
        a_mean_of_a_million_deviations, several_steps_equal_one_process, inference_is_no_exchange_but_its_backward_is,
        without_running_statistics_inference_takes_the_batch, outputs_in_given_memory,
        inputs_of_any_kind_stay_as_they_are, the_same_ranks_give_the_same_bits, a_channel_with_nan_spoils_no_other,
        empty_on_all_ranks, population_statistics_of_all_ranks, it_folds_copies_and_loads_as_a_batch_norm,
        its_messages_never_meet_the_programs_own, parts_of_a_communicator,
    )  # fmt: skip
    assert COMM.size > 1
