"""DataParallel on real ranks: the steps of one process on the whole batch, the same bits on all ranks, errors."""

import numpy as np
from harness import raised, rows_of, run, same_on_all

import fastbn
from fastbn import nn
from fastbn.interop.mpi import DataParallel, RankError
from fastbn.nn.losses import get_loss

OUTPUTS = {"softmax_cross_entropy": 3, "binary_cross_entropy": 1, "mse": 2}


def network(seed, loss, dtype=np.float64):
    last = [nn.Sigmoid()] if loss == "binary_cross_entropy" else []
    return nn.Sequential(
        nn.Standardizer(fastbn.Standardizer().fit(data(loss)[0])), nn.Dense(6, 9, bias=False, dtype=dtype),
        nn.BatchNorm(9, dtype=dtype), nn.ReLU(), nn.Dense(9, 8, dtype=dtype),
        nn.BatchNorm(8, activation="relu", dtype=dtype), nn.Dense(8, OUTPUTS[loss], dtype=dtype), *last, seed=seed,
    )  # fmt: skip


def data(loss, n=53, dtype=np.float64):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(n, 6)) + 2).astype(dtype)
    if loss == "softmax_cross_entropy":
        return x, rng.integers(0, 3, n)
    return x, (rng.normal(size=(n, 2)) if loss == "mse" else rng.integers(0, 2, (n, 1)))


def alone(model, optimizer, x, y, loss):
    """The step of one process, as Sequential.fit takes it; return the loss."""
    layers = model.layers[:-1] if loss == "binary_cross_entropy" else model.layers
    model.train()
    for layer in layers:
        x = layer(x)
    value, gradient = get_loss(loss).value_and_gradient(x, get_loss(loss).targets(y, len(y), OUTPUTS[loss], "y"))
    for layer in reversed(layers):
        gradient = layer.backward(gradient)
    optimizer.step(model.gradients())
    return float(value)


def steps_equal_those_of_one_process(comm):
    """Five steps amplify a rounding error of the first by some factor: far below 10⁴ for these networks."""
    for loss in OUTPUTS:
        for dtype, empty in (np.float64, False), (np.float64, True), (np.float32, False):
            x, y = data(loss, dtype=dtype)
            one, many = network(0, loss, dtype), network(comm.rank, loss, dtype)
            own, shared = (fastbn.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (one, many))
            parallel = DataParallel(many, comm)
            tolerance = 1e4 * np.finfo(dtype).eps
            for _ in range(5):
                expected = alone(one, own, x, y, loss)
                mine = rows_of(len(x), comm, empty=empty)
                value = parallel.step(x[mine], y[mine], loss=loss, optimizer=shared)
                np.testing.assert_allclose(value, expected, rtol=tolerance)
                same_on_all(comm, *many.state_dict().values(), np.array(value))
            for key, array in one.state_dict().items():
                np.testing.assert_allclose(many.state_dict()[key], array, rtol=tolerance, atol=tolerance)


def it_starts_from_rank_0(comm):
    model = network(comm.rank, "mse")
    model[2].running_mean[...] = comm.rank + 5
    held = model.parameters()
    DataParallel(model, comm)
    expected = network(0, "mse").state_dict() | {"2.running_mean": np.full(9, 5.0)}
    for key, array in model.state_dict().items():
        np.testing.assert_array_equal(array, expected[key])
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))  # an optimizer may hold them


def the_same_ranks_give_the_same_bits(comm):
    x, y = data("mse", dtype=np.float32)
    mine, results = rows_of(len(x), comm), []
    for _ in range(2):
        model = network(0, "mse", np.float32)
        adam = fastbn.optim.Adam(model.parameters(), lr=1e-2)
        parallel = DataParallel(model, comm)
        losses = [parallel.step(x[mine], y[mine], loss="mse", optimizer=adam) for _ in range(5)]
        results.append((losses, [array.tobytes() for array in model.state_dict().values()]))
    assert results[0] == results[1]


def on_one_rank_it_is_a_step_of_fit(comm):
    self_comm = comm.Split(comm.rank)
    x, y = data("mse")
    one, same = network(0, "mse"), network(0, "mse")
    own, other = (fastbn.optim.SGD(m.parameters(), lr=0.1) for m in (one, same))
    parallel = DataParallel(same, self_comm)
    for _ in range(3):
        assert alone(one, own, x, y, "mse") == parallel.step(x, y, loss="mse", optimizer=other)
    for key, array in one.state_dict().items():
        np.testing.assert_array_equal(same.state_dict()[key], array)


def a_model_without_batch_norm_or_without_parameters(comm):
    x, y = data("mse")
    mine = rows_of(len(x), comm)
    one, many = (nn.Sequential(nn.Dense(6, 2, dtype=np.float64), seed=seed) for seed in (0, comm.rank))
    own, shared = (fastbn.optim.SGD(m.parameters(), lr=0.1) for m in (one, many))
    expected, value = (
        alone(one, own, x, y, "mse"),
        DataParallel(many, comm).step(x[mine], y[mine], loss="mse", optimizer=shared),
    )
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(many[0].weight, one[0].weight, rtol=1e-13, atol=1e-15)

    only = nn.Sequential(nn.BatchNorm(6), nn.ReLU())
    DataParallel(only, comm).step(
        x[mine], x[mine], loss="mse", optimizer=fastbn.optim.SGD(only.parameters(), lr=0.1)
    )
    same_on_all(comm, *only.parameters())


def layers_of_different_dtypes(comm):
    x, y = data("mse", dtype=np.float32)
    mine = rows_of(len(x), comm)

    def mixed(seed):
        return nn.Sequential(nn.Dense(6, 5), nn.BatchNorm(5), nn.Dense(5, 2, dtype=np.float64), seed=seed)

    one, many = mixed(0), mixed(comm.rank)
    own, shared = (fastbn.optim.SGD(m.parameters(), lr=0.1) for m in (one, many))
    expected = alone(one, own, x, y, "mse")
    value = DataParallel(many, comm).step(x[mine], y[mine], loss="mse", optimizer=shared)
    tolerance = 1e3 * np.finfo(np.float32).eps
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    for key, array in one.state_dict().items():
        np.testing.assert_allclose(many.state_dict()[key], array, rtol=tolerance, atol=tolerance)
        assert many.state_dict()[key].dtype == array.dtype


def an_error_on_one_rank_changes_nothing_on_any(comm):
    class Failing:
        """An optimizer without the parameters: only what it raises matters."""

        def step(self, grads):
            if comm.rank == 1:
                raise OSError("in the optimizer")

    x, y = data("mse")
    mine = rows_of(len(x), comm)
    x, y = x[mine], y[mine]
    model = network(0, "mse")
    sgd = fastbn.optim.SGD(model.parameters(), lr=0.1)
    other = fastbn.optim.SGD(network(0, "mse").parameters(), lr=0.1)
    parallel = DataParallel(model, comm)
    before = model.state_dict()
    for change, message in [
        ({"x": x[:, :5]}, "ValueError: x: expected shape (N, 6), got"),
        ({"y": y[:, :1]}, "ValueError: y: expected shape"),
        ({"loss": "mae"}, "ValueError: loss: expected 'softmax_cross_entropy'"),
        ({"optimizer": other}, "ValueError: optimizer: expected one built with this model's parameters()"),
        ({"optimizer": None}, "TypeError: optimizer: expected one of fastbn.optim"),
        ({"optimizer": Failing()}, "OSError: in the optimizer"),
    ]:
        arguments = {"x": x, "y": y, "loss": "mse", "optimizer": Failing()} | (change if comm.rank == 1 else {})
        error = raised(lambda x, y, **options: parallel.step(x, y, **options), **arguments)
        if comm.rank == 1:
            assert f"{type(error).__name__}: {error}".startswith(message), repr(error)
        else:
            assert type(error) is RankError, repr(error)
            assert str(error).startswith(f"rank 1: {message}"), repr(error)
        if change.get("optimizer").__class__ is not Failing:
            for key, array in model.state_dict().items():
                np.testing.assert_array_equal(array, before[key])
    parallel.step(x, y, loss="mse", optimizer=sgd)
    same_on_all(comm, *model.state_dict().values())


def what_only_shows_on_all_ranks(comm):
    x, y = data("mse")
    model = network(0, "mse")
    sgd = fastbn.optim.SGD(model.parameters(), lr=0.1)
    parallel = DataParallel(model, comm)
    error = raised(parallel.step, x[:0], y[:0], loss="mse", optimizer=sgd)
    assert str(error) == "x: expected at least one row on some rank, got none"
    n = int(comm.rank == 1)
    error = raised(parallel.step, x[:n], y[:n], loss="mse", optimizer=sgd)
    assert "expected 2 or more values per channel over all ranks, got 1" in str(error)
    assert model[2].num_batches_tracked == 0
    small = nn.Sequential(nn.Dense(6, 3 if comm.rank == 1 else 2))
    error = raised(DataParallel, small, comm)
    assert type(error) is ValueError
    assert str(error).startswith("ranks differ: rank 0: DataParallel of Dense(n_in=6, n_out=2, ")
    error = raised(DataParallel, model if comm.rank else [model], comm)
    assert type(error) is (RankError if comm.rank else TypeError)
    assert "model: expected a fastbn.nn.Sequential, got list" in str(error)
    unfitted = nn.Sequential(nn.Standardizer() if comm.rank == 1 else nn.Standardizer(model[0]), nn.Dense(6, 2))
    error = raised(DataParallel, unfitted, comm)
    assert type(error) is (ValueError if comm.rank == 1 else RankError)
    assert "model: expected a fitted Standardizer, such as nn.Standardizer(fastbn.Standardizer().fit(x))" in str(error)


if __name__ == "__main__":
    run(
        steps_equal_those_of_one_process, it_starts_from_rank_0, the_same_ranks_give_the_same_bits,
        on_one_rank_it_is_a_step_of_fit, a_model_without_batch_norm_or_without_parameters,
        layers_of_different_dtypes, an_error_on_one_rank_changes_nothing_on_any, what_only_shows_on_all_ranks,
    )  # fmt: skip
