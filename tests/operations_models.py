"""Folds, optimizers, standardisation, threads and networks: calls as in operations.py, which this completes."""

import contextlib
import io
import os
import tempfile

import numpy as np
import reference
from calls import Call
from operations import OPERATIONS, hold_moments, maybe, operation, ordinary, seen, some_layer, somewhere
from reference import U32, U64, assert_within
from reference_optim import Reference
from strategies import DTYPES, FLOAT32, FLOAT64

import fastbn
from fastbn import nn, optim

# ---- folding ------------------------------------------------------------------------------------------------------


def some_bn(rng, c):
    """Return a BatchNormParams or a layer of c channels."""
    if rng.random() < 0.3:
        return some_layer(rng, c)
    gamma, beta, mean = rng.normal(size=(3, c))
    return fastbn.BatchNormParams(maybe(rng, gamma, None), maybe(rng, beta, None), mean, rng.uniform(0.5, 2, c), 1e-5)


def hold_rounded_once(actual, exact, terms):
    """Hold a folded array to its exact values, which the oracle itself has from terms of that size."""
    unit = {FLOAT64: U64, FLOAT32: U32}.get(actual.dtype, 0)
    least = {FLOAT64: 1e-300, FLOAT32: 2.0**-149}.get(actual.dtype, 0)  # what is rounded to a subnormal number
    oracle = 16 * np.finfo(reference.WIDE).eps * (np.abs(exact) + terms) + least
    assert_within(actual, exact, unit * (np.abs(exact) + oracle) + reference.half_unit(exact, actual.dtype) + oracle)


def fold(name, function, conv, bn_last):
    """Register a fold; its oracle is scale·x + shift in wide arithmetic, for PyTorch's layouts and one group."""

    def make(rng, size):
        n_out, n_in = map(int, rng.integers(1, 7, 2))
        kernel = tuple(map(int, rng.integers(1, 4, rng.integers(1, 4)))) if conv else ()
        dtype = maybe(rng, *DTYPES)
        weight = somewhere(rng, rng.normal(size=(n_out, n_in, *kernel)).astype(dtype))
        bias = maybe(rng, rng.normal(size=n_out).astype(dtype), None)
        args = {"weight": weight, "bias": bias, "bn": some_bn(rng, n_out if bn_last else n_in), "layout": None}
        args |= {"groups": 1} if conv else {}
        args |= {"transposed": False} if conv and bn_last else {"padding": int(rng.integers(2))} if conv else {}
        args |= {"repeat": 1} if not conv and not bn_last else {}

        def holds(a, folded):
            w = seen(a["weight"])
            assert folded.weight.shape == w.shape
            assert folded.weight.dtype == w.dtype.newbyteorder("=")
            plain = a.get("groups", 1) == a.get("repeat", 1) == 1 and a.get("transposed", False) is False
            if a["layout"] is not None or not plain or not ordinary(w, a["bias"]):
                return False
            gamma, beta, mean, var, eps = fastbn.affine.parameters(a["bn"])
            gamma, beta = (d if v is None else v for v, d in ((gamma, 1.0), (beta, 0.0)))
            if not ordinary(gamma, beta, mean, var) or np.any(var + eps < 1e-3):
                return False
            scale = reference.wide(gamma) / np.sqrt(reference.wide(var) + reference.WIDE(eps))
            shift, of_shift = beta - scale * mean, np.abs(beta) + np.abs(scale * mean)
            w, b = reference.wide(w), 0 if a["bias"] is None else reference.wide(seen(a["bias"]))
            per_channel = (-1,) + (1,) * (w.ndim - 1 if bn_last else w.ndim - 2)
            hold_rounded_once(folded.weight, w * scale.reshape(per_channel), 0)
            if bn_last:
                hold_rounded_once(folded.bias, scale * b + shift, np.abs(scale * b) + of_shift)
            else:
                others = tuple(range(1, w.ndim))
                moved = (w * shift.reshape(per_channel)).sum(others)
                terms = (np.abs(w) * of_shift.reshape(per_channel)).sum(others) * w[0].size
                hold_rounded_once(folded.bias, b + moved, np.abs(b) + terms)
            return True

        words = ("gamma", "beta", "mean", "var", "running_mean", "running_var", "eps", "padding")
        return Call(function, args, holds, names=words)

    OPERATIONS[name] = make


fold("fold_linear", fastbn.fold_linear, False, True)
fold("fold_conv", fastbn.fold_conv, True, True)
fold("fold_into_linear", fastbn.fold_into_linear, False, False)
fold("fold_into_conv", fastbn.fold_into_conv, True, False)


@operation
def to_affine(rng, size):
    bn = some_bn(rng, int(rng.integers(1, 9)))

    def holds(a, result):
        scale, shift = result
        assert scale.dtype == shift.dtype == np.float64
        assert scale.shape == shift.shape
        assert np.isfinite([scale, shift]).all()
        return True

    words = ("gamma", "beta", "mean", "var", "running_mean", "running_var", "eps")
    return Call(fastbn.to_affine, {"bn": bn}, holds, names=words)


# ---- optimizers ---------------------------------------------------------------------------------------------------

VARIANTS = [
    ("SGD", {"lr": 0.1, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("RMSprop", {"centered": True, "momentum": 0.5, "eps": 1e-2}),
    ("RMSprop", {"alpha": 0.3, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.2, 0.9), "weight_decay": 0.1}),
    ("Adam", {"amsgrad": True, "lr": 0.01}),
    ("AdamW", {"lr": 0.01, "eps_inside_sqrt": True, "eps": 1e-3}),
]
CLIPPINGS = ({}, {"clip_value": 0.75}, {"clip_norm": 0.9}, {"clip_global_norm": 1.1})
OPTIMIZER_WORDS = ("params", "grads", "schedule", "betas", "step", "momentum_buffer", "square_avg", "grad_avg",
                   "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")  # fmt: skip


def some_arrays(rng, shapes, dtype):
    """Return arrays of values 0.5 to 2 in size, none of them 0."""
    return [np.asarray(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape)).astype(dtype) for shape in shapes]


def some_optimizer(rng, size):
    """Return (an optimizer after a few steps, its parameters, the reference after the same steps)."""
    longest = maybe(rng, 3, 4 + int(size**0.5))
    shapes = [tuple(map(int, rng.integers(1, longest, rng.integers(0, 3)))) for _ in range(3)]
    dtype, (method, options) = maybe(rng, *DTYPES), maybe(rng, *VARIANTS)
    options = options | maybe(rng, *CLIPPINGS) | maybe(rng, {}, {"schedule": optim.inverse_time(0.1, 0.5)})
    params = some_arrays(rng, shapes, dtype)
    follows = Reference(method, params, unit=reference.unit(dtype), **options)
    opt = getattr(optim, method)(params, **options)
    for _ in range(rng.integers(3)):
        grads = some_arrays(rng, shapes, dtype)
        opt.step(grads)
        follows.step(grads)
    return opt, params, follows


def hold_optimizer(opt, follows):
    """Hold parameters (of a half type: their masters) and state to twice the bound of the formulas."""
    state = opt.state_dict()
    assert state.pop("step") == follows.steps
    now = state.pop("master", opt.params)
    for i, (p, held, expected) in enumerate(zip(opt.params, now, follows.params, strict=True)):
        assert np.array_equal(p, held.astype(p.dtype), equal_nan=True)
        assert_within(held, expected.value, 2 * expected.error, f"params[{i}]")
        for slot, arrays in state.items():
            known = follows.state[i].get(slot)
            if known is None:  # there was no gradient yet
                assert not arrays[i].any()
            else:
                assert_within(arrays[i], known.value, 2 * known.error, slot)


@operation
def optimizer_step(rng, size):
    opt, params, follows = some_optimizer(rng, size)
    grads = [somewhere(rng, g) for g in some_arrays(rng, [p.shape for p in params], params[0].dtype)]
    if rng.random() < 0.3:
        grads[rng.integers(3)] = None

    def holds(a, result):
        given = [None if g is None else seen(g) for g in a["grads"]] if isinstance(a["grads"], list) else [np.nan]
        if not ordinary(*given):
            return False
        follows.step(given)
        hold_optimizer(opt, follows)
        return True

    args = {"grads": grads, "num_threads": maybe(rng, None, 1, 2)}
    return Call(opt.step, args, holds, state=(opt, params), names=OPTIMIZER_WORDS, near=params)


@operation
def optimizer_new(rng, size):
    method, options = maybe(rng, *VARIANTS)
    params = some_arrays(rng, [(3,), (2, 5), ()], maybe(rng, *DTYPES))
    args = {"params": params, **options, **maybe(rng, *CLIPPINGS), "schedule": maybe(rng, None, optim.constant(0.1))}

    def holds(a, opt):
        state = opt.state_dict()
        assert state.pop("step") == 0
        assert not any(np.any(array) for slot, arrays in state.items() if slot != "master" for array in arrays)
        return True

    return Call(getattr(optim, method), args, holds, names=OPTIMIZER_WORDS)


@operation
def optimizer_load_state_dict(rng, size):
    opt, params, _ = some_optimizer(rng, size)
    state = opt.state_dict() | {"step": 7}
    for slot in state.keys() - {"step", "master"}:
        state[slot] = some_arrays(rng, [p.shape for p in params], FLOAT32)

    def holds(a, result):
        assert opt.state_dict()["step"] == 7 or a["state"]["step"] != 7
        return True

    return Call(opt.load_state_dict, {"state": state}, holds, state=(opt, params), names=OPTIMIZER_WORDS)


@operation
def project_max_norm(rng, size):
    params = [somewhere(rng, a, output=True) for a in some_arrays(rng, [(3, 4), (5, 2)], maybe(rng, *DTYPES))]
    args = {"params": params, "max_norm": 1.5, "axis": maybe(rng, None, 0, 1)}

    def holds(a, result):
        if not (isinstance(a["params"], list) and ordinary(*a["params"])) or not 1e-3 < float(a["max_norm"]) < 1e3:
            return False
        for w in map(reference.wide, map(seen, call.args["params"])):
            others = None if a["axis"] is None else tuple(k for k in range(w.ndim) if k != int(a["axis"]) % w.ndim)
            assert np.all(np.sqrt(np.sum(w * w, axis=others)) <= float(a["max_norm"]) * (1 + 2.0**-6))
        return True

    call = Call(optim.project_max_norm, args, holds, ("params",))
    return call


@operation
def schedule(rng, size):
    function, args = maybe(
        rng,
        (optim.constant, {"lr": 0.1}), (optim.inverse_time, {"lr": 0.1, "decay": 0.5}),
        (optim.step_decay, {"lr": 1.0, "factor": 0.5, "every": 3}), (optim.exponential, {"lr": 1.0, "factor": 0.9}),
        (optim.cosine, {"lr": 1.0, "steps": 9, "final": 0.1}),
    )  # fmt: skip

    def holds(a, schedule):
        rates = [schedule(t) for t in (0, 1, 5, 1000)]
        highest = max(float(a["lr"]), float(a.get("final", 0)))
        if highest > 1e300:  # sums overflow, and the optimizer refuses what comes of it
            return False
        assert all(isinstance(rate, float) and 0 <= rate <= highest for rate in rates)
        return True

    return Call(function, args | {"warmup": int(rng.integers(3))}, holds)


# ---- standardisation and threads ----------------------------------------------------------------------------------


def standardizer(name):
    """Register a method of Standardizer."""

    def make(rng, size):
        f = int(rng.integers(1, 9))
        first, x = rng.normal(5, 2, (2, int(rng.integers(1, 30)), f))
        scaler = fastbn.Standardizer().fit(first)
        x = somewhere(rng, x.astype(maybe(rng, *DTYPES)))

        def holds(a, result):
            x = seen(a["x"])
            if name in ("fit", "partial_fit"):
                assert result is scaler
                whole = x if name == "fit" else np.concatenate([first, x.astype(np.float64)])
                return hold_moments(scaler.moments_, whole.astype(x.dtype) if name == "fit" else whole, 1)
            mean, scale = scaler.mean_, scaler.scale_
            wide = x.astype(np.float64)
            with np.errstate(all="ignore"):
                expected = wide * scale + mean if name == "inverse_transform" else (wide - mean) / scale
                expected = expected.astype(x.dtype)
            assert result.dtype == x.dtype.newbyteorder("=")
            assert np.array_equal(result, expected, equal_nan=True)
            return True

        return Call(getattr(scaler, name), {"x": x}, holds, state=scaler)

    OPERATIONS[f"standardizer_{name}"] = make


for method in ("fit", "partial_fit", "transform", "inverse_transform", "fit_transform"):
    standardizer(method)


@operation
def standardizer_from_moments(rng, size):
    moments = fastbn.Moments.of(rng.normal(size=(9, 3)))

    def holds(a, scaler):
        assert np.array_equal(scaler.mean_, moments.mean)
        return True

    return Call(fastbn.Standardizer.from_moments, {"moments": moments}, holds)


@operation
def threads_set(rng, size):
    def set_and_put_back(n):
        before = fastbn.get_num_threads()
        fastbn.set_num_threads(n)
        now = fastbn.get_num_threads()
        fastbn.set_num_threads(before)
        with fastbn.num_threads(n):
            assert fastbn.get_num_threads() == now
        return now

    def holds(a, now):
        assert now in (1, int(a["n"]))  # 1 in a forked child, and without OpenMP
        return True

    return Call(set_and_put_back, {"n": int(rng.integers(1, 5))}, holds)


@operation
def questions(rng, size):
    """What takes no argument."""

    def ask():
        with contextlib.redirect_stdout(io.StringIO()):
            return fastbn.show_config(), fastbn.release_buffers()

    def holds(a, result):
        assert result[0]["threads"] >= 1
        assert result[1] >= 0
        return True

    return Call(ask, {}, holds)


# ---- networks -----------------------------------------------------------------------------------------------------

NN_WORDS = ("x", "y", "dy", "state", "weight", "bias", "layers", "model", "optimizer", "validation_data", "batches",
            "running_mean", "running_var", "num_batches_tracked", "count", "mean", "m2")  # fmt: skip


def some_network(rng):
    """Return (a small network with statistics, rows, labels)."""
    x, labels = rng.normal(2, 3, (int(rng.integers(4, 40)), 3)), None
    labels = (x[:, 0] > 2).astype(int)
    dtype = maybe(rng, np.float32, np.float64)
    model = nn.Sequential(
        nn.Standardizer(), nn.Dense(3, 5, bias=False, dtype=dtype), nn.BatchNorm(5, activation="relu", dtype=dtype),
        maybe(rng, nn.ReLU, nn.Tanh, nn.Sigmoid)(), nn.Dense(5, 2, dtype=dtype), seed=int(rng.integers(99)),
    )  # fmt: skip
    model[0].fit(x)
    return model.recalibrate([x]), x.astype(maybe(rng, *DTYPES)), labels


def outputs(model, x, unit):
    """Return a network's outputs in wide arithmetic, and how far layers may be off that round to `unit`."""
    error = np.zeros_like(x)
    for layer in model.fold():
        if isinstance(layer, nn.Dense):
            weight, bias = reference.wide(layer.weight).T, reference.wide(layer.bias)
            sizes = (np.abs(x) + error) @ np.abs(weight) + np.abs(bias)  # weights are off by a rounding or two
            x, error = x @ weight + bias, error @ np.abs(weight) + 32 * unit * sizes
        else:
            x = reference.wide(layer.infer(x.astype(np.float64)))  # slopes are 1 at most
            error = error + 8 * unit
    return x, error


def network(method, arguments, holds, names=NN_WORDS):
    """Register a method of a network; `arguments` and `holds` take the network and its data first."""

    def make(rng, size):
        model, x, labels = some_network(rng)
        args = arguments(rng, model, x, labels)
        before = model.state_dict()
        return Call(
            getattr(model, method), args, lambda a, result: holds(model, a, result, before) is not False,
            state=model.state_dict, names=names,
        )  # fmt: skip

    OPERATIONS[f"network_{method.strip('_')}"] = make


def hold_outputs(model, a, y, before):
    x = seen(a["x"])
    assert y.shape == (len(x), 2)
    assert y.dtype == model[4].dtype
    if not ordinary(x) or x.dtype.itemsize < 4:  # the Standardizer rounds to a half type in between
        return False
    expected, bound = outputs(model, reference.wide(x), max(map(reference.unit, (x.dtype, y.dtype))))
    assert_within(y, expected, bound, "outputs")
    return True


def hold_history(model, a, history, before):
    assert all(len(values) == a["epochs"] for values in history.values())
    assert set(history) >= {"loss"}


def hold_state(model, a, result, before):
    now = model.state_dict()
    assert all(np.array_equal(now[k], seen(v).astype(now[k].dtype), equal_nan=True) for k, v in a["state"].items())


network("__call__", lambda rng, model, x, y: {"x": x}, lambda model, a, y, before: y.shape == (len(y), 2))
network("predict", lambda rng, model, x, y: {"x": x}, hold_outputs)
network(
    "evaluate", lambda rng, model, x, y: {"x": x, "y": y, "loss": "softmax_cross_entropy"},
    lambda model, a, result, before: len(result) == 2,
)  # fmt: skip
network(
    "fit",
    lambda rng, model, x, y: {
        "x": x, "y": y, "loss": "softmax_cross_entropy", "epochs": 2, "batch_size": 8, "progress": False, "seed": 3,
        "optimizer": optim.Adam(model.parameters(), lr=0.01), "validation_data": maybe(rng, None, (x, y)),
    },
    hold_history,
)  # fmt: skip
network(
    "recalibrate", lambda rng, model, x, y: {"batches": [x, x[:3]], "method": maybe(rng, "pooled", "paper")},
    lambda model, a, result, before: result is model,
)  # fmt: skip
network("load_state_dict", lambda rng, model, x, y: {"state": model.state_dict()}, hold_state)
network("fold", lambda rng, model, x, y: {}, lambda model, a, folded, before: len(folded) < len(model))


@operation
def network_new(rng, size):
    args = {"seed": int(rng.integers(9))}
    return Call(lambda seed: nn.Sequential(nn.Dense(2, 3), seed=seed), args, lambda a, model: model.n_in == 2)


@operation
def network_save_and_load(rng, size):
    """Write a network to a file and read it again."""
    model, x, _ = some_network(rng)

    def there_and_back(path):
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError):
            if isinstance(path, (str, bytes)):
                path = os.path.join(folder, os.fsdecode(path))
            model.save(path)
            return nn.load(path)

    def holds(a, other):
        assert other is None or np.array_equal(model.predict(x), other.predict(x))
        return other is not None

    return Call(there_and_back, {"path": "model.npz"}, holds, state=model.state_dict)


@operation
def dense_new(rng, size):
    bias, dtype = maybe(rng, True, False), maybe(rng, "f4", "f8")
    args = {"n_in": int(rng.integers(1, 9)), "n_out": 2, "bias": bias, "dtype": dtype}

    def holds(a, dense):
        assert dense.weight.shape == (a["n_out"], a["n_in"])
        return True

    return Call(nn.Dense, args, holds)


@operation
def dense_backward(rng, size):
    dense = nn.Dense(3, 2, dtype=maybe(rng, "f4", "f8"))
    x, dy = rng.normal(size=(7, 3)).astype(dense.dtype), rng.normal(size=(7, 2))
    dense(x)

    def holds(a, dx):
        dy = seen(a["dy"])
        if not ordinary(dy):
            return False
        size = 16 * reference.unit(dense.dtype)
        assert_within(dx, dy @ dense.weight.astype(np.float64), size * (np.abs(dy) @ np.abs(dense.weight)), "dx")
        bound = size * (np.abs(dy).T.astype(np.float64) @ np.abs(x))
        assert_within(dense.grad_weight, dy.T.astype(np.float64) @ x, bound, "grad_weight")
        return True

    return Call(dense.backward, {"dy": dy}, holds, state=dense)


@operation
def dense_weight(rng, size):
    dense = nn.Dense(3, 2)

    def assign(weight):
        dense.weight = weight

    def holds(a, result):
        assert np.array_equal(dense.weight, seen(a["weight"]).astype(np.float32), equal_nan=True)
        return True

    return Call(assign, {"weight": rng.normal(size=(2, 3))}, holds, state=dense)


@operation
def activation_layer(rng, size):
    layer = maybe(rng, nn.ReLU, nn.Tanh, nn.Sigmoid)()

    def there_and_back(x, dy):
        y = layer(x)
        return y, layer.backward(dy)

    def holds(a, results):
        y, dx = results
        assert y.shape == dx.shape == seen(a["x"]).shape
        return True

    x, dy = rng.normal(size=(2, 5, 3)).astype(maybe(rng, *DTYPES))
    return Call(there_and_back, {"x": x, "dy": dy}, holds)


@operation
def softmax(rng, size):
    def holds(a, p):
        if not ordinary(a["logits"]) or not p.size:
            return False
        assert np.all(np.abs(p.astype(np.float64).sum(axis=1) - 1) < 2.0**-6 * p.shape[1])
        return True

    return Call(nn.softmax, {"logits": rng.normal(size=(5, 3)).astype(maybe(rng, *DTYPES))}, holds)
