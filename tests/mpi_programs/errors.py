"""What goes wrong on one rank: its own error there, a clear one on all others, nothing changed, and work goes on."""

import pickle
import warnings

import numpy as np
from harness import raised, run, same_on_all
from mpi4py import MPI

from fastbn.interop.mpi import DataParallel, RankError, SyncBatchNorm, together


def expect(comm, culprit, error, own, message):
    """Hold what was raised to: `own` with the message on the culprit, a RankError that names it elsewhere."""
    if comm.rank == culprit:
        assert type(error) is own, repr(error)
        assert message in str(error), repr(error)
    else:
        assert type(error) is RankError, repr(error)
        assert str(error).startswith(f"rank {culprit}: {own.__name__}: "), repr(error)
        assert message in str(error), repr(error)
        assert error.rank == culprit


def still_works(comm, bn):
    """Nothing has been left between the ranks, nor in the layer."""
    state = SyncBatchNorm(comm, bn.num_features).state_dict()
    for key, value in bn.state_dict().items():
        np.testing.assert_array_equal(value, state[key])
    x = np.arange(2.0 * bn.num_features).reshape(2, -1) + comm.rank
    bn(x)
    bn.backward(x)
    same_on_all(comm, bn.running_mean, bn.grad_gamma)


def a_bad_input_on_any_rank(comm):
    good = np.ones((3, 4), np.float32)
    bad = [
        (np.ones((3, 5), np.float32), ValueError, "x: expected 4 channels on axis 1, got shape (3, 5)"),
        (np.ones(4, np.float32), ValueError, "x: expected 2 or more dimensions, got 1"),
        (np.ones((3, 4), complex), TypeError, "x: expected an array of float16"),
        (None, TypeError, "x: expected"),
    ]
    for culprit in range(comm.size):
        bn = SyncBatchNorm(comm, 4)
        for x, own, message in bad:
            expect(comm, culprit, raised(bn, x if comm.rank == culprit else good), own, message)
        for options, own, message in [
            ({"residual": good[:2]}, ValueError, "residual: expected shape (3, 4), got (2, 4)"),
            ({"out": good[:2]}, ValueError, "out: expected shape (3, 4), got (2, 4)"),
            ({"num_threads": 0}, ValueError, "num_threads: expected an integer of 1 or more, got 0"),
        ]:
            error = raised(bn, good, **(options if comm.rank == culprit else {}))
            expect(comm, culprit, error, own, message)
        still_works(comm, bn)


def a_bad_gradient_on_any_rank(comm):
    for culprit in range(comm.size):
        bn = SyncBatchNorm(comm, 4, track_running_stats=False)
        expect_all = raised(bn.backward, np.ones((3, 4)))
        assert "expected a call of the layer before it" in str(expect_all)
        bn(np.arange(12.0).reshape(3, 4))
        for dy, own, message in [
            (np.ones((2, 4)), ValueError, "dy: expected shape (3, 4), got (2, 4)"),
            (np.ones((3, 4), np.float32), ValueError, "dy: expected dtype float64, got float32"),
        ]:
            out = np.full((3, 4), 7.0)
            error = raised(bn.backward, dy if comm.rank == culprit else np.ones((3, 4)), out=out)
            expect(comm, culprit, error, own, message)
            assert (out == 7).all()
            assert bn.grad_gamma is None
        bn.backward(np.ones((3, 4)))


def several_ranks_fail(comm):
    bn = SyncBatchNorm(comm, 4)
    error = raised(bn, np.ones((3, 5 + comm.rank)))  # all of them: each has its own
    assert str(error).endswith(f"got shape (3, {5 + comm.rank})")
    if comm.size > 2:  # the first one that failed is named
        error = raised(bn, np.ones((3, 4 if comm.rank == 0 else 5 + comm.rank)))
        assert str(error).endswith("got shape (3, 6)") if comm.rank < 2 else type(error) is ValueError
        assert type(error) is (ValueError if comm.rank else RankError)
    still_works(comm, bn)


def ranks_that_differ(comm):
    """What only shows when ranks are compared: on every rank, and with both sides in the message."""
    last, first = comm.rank == comm.size - 1, comm.rank == 0
    for options in (
        {"eps": 1e-3}, {"momentum": None}, {"momentum": 0.2}, {"activation": "relu"}, {"affine": False},
        {"unbiased": False}, {"track_running_stats": False}, {"dtype": np.float64}, {"axis": -1},
    ):  # fmt: skip
        error = raised(SyncBatchNorm, comm, 4, **(options if last else {}))
        assert type(error) is ValueError, repr(error)
        assert ": SyncBatchNorm(4, axis=1, eps=1e-05, momentum=0.1); rank " in str(error), str(error)
        assert f"{next(iter(options))}=" in str(error).partition("; ")[2], str(error)
    for mine in 64, 32:
        error = raised(SyncBatchNorm, comm, mine if first else 96 - mine)
        assert type(error) is ValueError
        assert f"rank 0: SyncBatchNorm({mine}, " in str(error)
        assert f"rank 1: SyncBatchNorm({96 - mine}, " in str(error)

    bn = SyncBatchNorm(comm, 4)
    error = raised(bn, np.ones((3, 4), np.float32 if first else np.float64))
    assert type(error) is ValueError
    assert f"rank 0: forward of layer {bn._number}, 4 channels of float32" in str(error)
    assert f"rank 1: forward of layer {bn._number}, 4 channels of float64" in str(error)
    error = raised(bn, np.ones((1 if last else 0, 4)))
    assert type(error) is ValueError
    assert "expected 2 or more values per channel over all ranks, got 1" in str(error)
    still_works(comm, bn)

    # The same layer, another call; another layer; another mode
    other = SyncBatchNorm(comm, 6)
    for call in (
        lambda: bn(np.ones((3, 4))) if first else bn.backward(np.ones((2, 4))),
        lambda: bn(np.ones((3, 4))) if first else other(np.ones((3, 6))),
        lambda: bn(np.ones((3, 4))) if first else bn.recalibrate([np.ones((3, 4))]),
    ):
        error = raised(call)
        assert type(error) is ValueError, repr(error)
        expected = f"ranks differ: rank 0: forward of layer {bn._number}, 4 channels of float64"
        assert str(error).startswith(expected), repr(error)
    still_works(comm, SyncBatchNorm(comm, 3))


def a_bad_option_on_one_rank(comm):
    for options, own, message in [
        ({"eps": 0.0}, ValueError, "eps: expected a finite number above 0, got 0.0"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of None, 'relu', got 'gelu'"),
        ({"momentum": 2}, ValueError, "momentum: expected None or a number from 0 to 1, got 2"),
        ({"dtype": int}, TypeError, "dtype: expected float16"),
    ]:
        error = raised(SyncBatchNorm, comm, 4, **(options if comm.rank == 1 else {}))
        expect(comm, 1, error, own, message)
    error = raised(SyncBatchNorm, comm, 0 if comm.rank == 1 else 4)
    expect(comm, 1, error, ValueError, "num_features: expected an integer of 1 or more, got 0")


def no_communicator(comm):
    freed = comm.Dup()
    freed.Free()
    half = comm.Split(comm.rank % 2)
    between = half.Create_intercomm(0, comm, 1 - comm.rank % 2)
    for what, own, message in [
        (None, TypeError, "comm: expected an mpi4py communicator, got NoneType"),
        ("world", TypeError, "comm: expected an mpi4py communicator, got str"),
        (MPI, TypeError, "comm: expected an mpi4py communicator, got module"),
        (MPI.COMM_NULL, ValueError, "comm: expected a communicator, got COMM_NULL"),
        (freed, ValueError, "comm: expected a communicator, got COMM_NULL"),
        (between, ValueError, "got an inter-communicator"),
    ]:
        for make in lambda c: SyncBatchNorm(c, 4), lambda c: DataParallel(None, c), lambda c: together(c).__enter__():
            error = raised(make, what)
            assert type(error) is own, repr(error)
            assert message in str(error), repr(error)
    for culprit in range(comm.size):  # on one rank only
        def construct(culprit=culprit):
            with together(comm):
                SyncBatchNorm(None if comm.rank == culprit else comm, 4)

        expect(comm, culprit, raised(construct), TypeError, "comm: expected an mpi4py communicator, got NoneType")


def an_error_of_the_caller(comm):
    """Before any exchange, between two, after the last, in the others' absence: nobody waits."""
    x = np.arange(8.0).reshape(2, 4)
    for culprit in range(comm.size):
        for step in range(4):
            bn = SyncBatchNorm(comm, 4)

            def block(bn=bn, step=step, culprit=culprit):
                with together(comm):
                    for number, call in enumerate([bn, bn, bn.backward, lambda x: None]):
                        if comm.rank == culprit and number == step:
                            raise OSError(f"no data for step {step}")
                        call(x)

            expect(comm, culprit, raised(block), OSError, f"no data for step {step}")
            same_on_all(comm, bn.running_mean)
    with together(comm):
        same_on_all(comm, bn(x))


def errors_that_are_caught(comm):
    """A caller may go on after an error that all know of, or replace it by another."""
    x = np.arange(8.0).reshape(2, 4)
    bn = SyncBatchNorm(comm, 4)
    with together(comm):
        for bad in range(comm.size):
            error = raised(bn, x[:, :3] if comm.rank == bad else x)
            assert isinstance(error, RankError) == (comm.rank != bad)
        bn(x)

    def replace(explicit):
        with together(comm):
            try:
                bn(x[:, :3] if comm.rank == 1 else x)
            except ValueError as error:
                raise KeyError("mine") from (error if explicit else None)

    for explicit in True, False:
        error = raised(replace, explicit)
        assert type(error) is (KeyError if comm.rank == 1 else RankError), repr(error)

    def nested():
        with together(comm), together(comm):
            if comm.rank == 1:
                raise SystemExit("enough")

    error = raised(nested)
    assert f"{type(error).__name__}: {error}" == (
        "SystemExit: enough" if comm.rank == 1 else "RankError: rank 1: SystemExit: enough"
    )
    still_works(comm, SyncBatchNorm(comm, 4))


def an_error_in_a_part_of_the_ranks_reaches_the_block_of_all(comm):
    part = comm.Split(comm.rank // 2)
    bn = SyncBatchNorm(part, 4)

    def wrong():
        with together(comm):
            bn(np.ones((3, 5 if comm.rank == 1 else 4)))

    error = raised(wrong)
    assert type(error) is (ValueError if comm.rank == 1 else RankError)
    assert "expected 4 channels on axis 1, got shape (3, 5)" in str(error)

    def nested():
        with together(comm), together(part):
            if comm.rank == 1:
                raise OSError("missing file")

    expect(comm, 1, raised(nested), OSError, "missing file") if comm.size < 3 else raised(nested)
    part.Free()


def an_error_while_another_is_handled(comm):
    bn = SyncBatchNorm(comm, 4)

    def again():
        with together(comm):
            try:
                bn(np.ones((3, 5 if comm.rank == 1 else 4)))
            except Exception:
                if comm.rank == 0:
                    raise OSError("disk is full") from None

    expect(comm, 0, raised(again), OSError, "disk is full")
    still_works(comm, bn)


def the_same_error_twice_and_one_without_a_text(comm):
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    for error in [ValueError("kept"), Mute()]:
        for _ in range(2):

            def wrong(error=error):
                with together(comm):
                    if comm.rank == 1:
                        raise error

            found = raised(wrong)
            assert found is error if comm.rank == 1 else type(found) is RankError


def what_overflows_in_an_exchange_is_no_warning(comm):
    bn = SyncBatchNorm(comm, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn(np.arange(12.0).reshape(3, 4) + comm.rank)
        bn.backward(np.full((3, 4), np.inf if comm.rank == 0 else -np.inf))
    assert np.isnan(bn.grad_beta).all()


def layers_in_another_order(comm):
    first, second = SyncBatchNorm(comm, 4), SyncBatchNorm(comm, 4)
    error = raised((first if comm.rank else second).__call__, np.ones((3, 4)))
    assert type(error) is ValueError
    assert "ranks differ: rank 0: forward of layer" in str(error)


def nothing_is_pickled(comm):
    assert "save state_dict()" in str(raised(pickle.dumps, SyncBatchNorm(comm, 4)))


def a_bad_batch_for_recalibration(comm):
    def batches(fail):
        yield np.ones((3, 4))
        if fail:
            raise OSError("disk")

    for culprit in range(comm.size):
        bn = SyncBatchNorm(comm, 4)
        error = raised(bn.recalibrate, batches(comm.rank == culprit))
        expect(comm, culprit, error, OSError, "disk")
        error = raised(bn.recalibrate, [np.ones((3, 5 if comm.rank == culprit else 4))])
        expect(comm, culprit, error, ValueError, "batches: expected 4 channels on axis 1, got 5")
        error = raised(bn.recalibrate, [np.ones((1 if comm.rank == culprit else 0, 4))])
        assert "expected 2 or more values per channel on all ranks, got 1" in str(error)
        still_works(comm, bn)


if __name__ == "__main__":
    run(
        a_bad_input_on_any_rank, a_bad_gradient_on_any_rank, several_ranks_fail, ranks_that_differ,
        a_bad_option_on_one_rank, no_communicator, an_error_of_the_caller, errors_that_are_caught,
        a_bad_batch_for_recalibration, an_error_in_a_part_of_the_ranks_reaches_the_block_of_all,
        an_error_while_another_is_handled, the_same_error_twice_and_one_without_a_text,
        what_overflows_in_an_exchange_is_no_warning, layers_in_another_order, nothing_is_pickled,
    )  # fmt: skip
