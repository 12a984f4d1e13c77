"""Pickles and deep copies: they hold all that the original holds, and go on apart from it."""

import copy
import pickle

import numpy as np
import pytest

import fastbn
from fastbn import nn, optim

ROWS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
COPIES = {"pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "deepcopy": copy.deepcopy}


def content(thing):
    """Return everything in an object, down to the bytes of its arrays."""
    if isinstance(thing, np.ndarray):
        return thing.dtype.str, thing.shape, thing.tobytes()
    if isinstance(thing, dict):
        return {key: content(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [content(value) for value in thing]
    names = [*getattr(thing, "__dict__", ()), *getattr(type(thing), "__slots__", ())]
    return {name: content(getattr(thing, name)) for name in names} if names else thing


def layer():
    bn = fastbn.BatchNorm(3, activation="relu", momentum=None, eps=0.01)
    bn.backward(bn(ROWS, residual=ROWS))
    return bn


def network():
    layers = nn.Standardizer(), nn.Dense(3, 2), nn.BatchNorm(2), nn.ReLU(), nn.Sigmoid(), nn.Tanh()
    model = nn.Sequential(*layers, seed=0)
    model[0].fit(ROWS)
    model.backward(model(ROWS))
    return model


THINGS = {
    "moments": lambda: fastbn.Moments.of(ROWS),
    "standardizer": lambda: fastbn.Standardizer().fit(ROWS),
    "saved": lambda: fastbn.batch_norm_train(ROWS, ROWS[0], activation="relu")[1],
    "gradients": lambda: fastbn.batch_norm_backward(ROWS, fastbn.batch_norm_train(ROWS)[1]),
    "parameters": lambda: fastbn.BatchNormParams(None, None, ROWS[0], ROWS[0] ** 2, 1e-5),
    "folded": lambda: fastbn.fold_linear(np.eye(3), None, fastbn.BatchNorm(3)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", THINGS)
def test_a_copy_has_all_that_the_original_has(name, how):
    original = THINGS[name]()
    twin = COPIES[how](original)
    assert type(twin) is type(original)
    assert content(twin) == content(original)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("make", [layer, network])
def test_a_copy_goes_on_as_the_original_and_apart_from_it(make, how):
    original = make()
    twin = COPIES[how](original)
    before = content(original.state_dict())
    assert content(twin.state_dict()) == before
    dy = np.ones((6, 3 if make is layer else 2), np.float32)
    assert content(twin.backward(dy)) == content(original.backward(dy))
    y = content(twin(ROWS))
    assert content(original.state_dict()) == before != content(twin.state_dict())
    assert content(original(ROWS)) == y
    assert content(original.state_dict()) == content(twin.state_dict())


@pytest.mark.parametrize("how", [*COPIES.values(), copy.copy], ids=[*COPIES, "copy"])
@pytest.mark.parametrize("kind", [optim.SGD, optim.RMSprop, optim.Adam, optim.AdamW])
def test_an_optimizer_is_not_copied_since_its_arrays_are_elsewhere(kind, how):
    opt = kind([ROWS.copy()], lr=0.1)
    with pytest.raises(TypeError, match=rf"^{kind.__name__}: expected its state_dict\(\)"):
        how(opt)


@pytest.mark.parametrize("how", COPIES)
def test_the_state_of_an_optimizer_goes_on_elsewhere(how):
    params = [ROWS.copy(), ROWS[0].astype(np.float16)]
    opt = optim.Adam(params)
    opt.step([np.ones_like(p) for p in params])
    elsewhere, state = COPIES[how]((params, opt.state_dict()))
    twin = optim.Adam(elsewhere)
    twin.load_state_dict(state)
    for optimizer, arrays in ((opt, params), (twin, elsewhere)):
        optimizer.step([np.full_like(p, 0.5) for p in arrays])
    assert content(elsewhere) == content(params)
    assert content(twin.state_dict()) == content(opt.state_dict())
