"""Learning-rate schedules: functions from the step, counted from 0, to the learning rate.

Any callable of that kind will do as an optimizer's ``schedule``; these are the customary ones. Each may begin
with a linear warm-up of w steps, lr₀·(t+1)/(w+1), after which the schedule proper starts with its own t = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ._core import check
from ._core.dispatch import optim_kernels

__all__ = ["Schedule", "constant", "cosine", "exponential", "inverse_time", "step_decay"]

Schedule = Callable[[int], float]


def constant(lr: float, *, warmup: int = 0) -> Schedule:
    """Return the schedule lr₀.

    Parameters
    ----------
    lr : float
        lr₀ ≥ 0.
    warmup : int
        Steps of linear warm-up.

    Examples
    --------
    >>> from fastbn.optim import constant
    >>> schedule = constant(0.1, warmup=1)
    >>> [schedule(t) for t in range(3)]
    [0.05, 0.1, 0.1]
    """
    lr = _rate("lr", lr)
    return _warmed(lr, warmup, lambda t: lr)


def inverse_time(lr: float, decay: float, *, warmup: int = 0) -> Schedule:
    """Return the schedule lr₀/(1 + decay·t).

    Parameters
    ----------
    lr, decay : float
        Both ≥ 0.
    warmup : int
        Steps of linear warm-up.

    Examples
    --------
    >>> from fastbn.optim import inverse_time
    >>> inverse_time(0.1, decay=1.0)(1)
    0.05
    """
    lr, decay = _rate("lr", lr), _rate("decay", decay)
    return _warmed(lr, warmup, lambda t: lr / (1 + decay * t))


def step_decay(lr: float, factor: float, every: int, *, warmup: int = 0) -> Schedule:
    """Return the schedule lr₀·factor^⌊t/every⌋.

    Parameters
    ----------
    lr : float
        lr₀ ≥ 0.
    factor : float
        In (0, 1].
    every : int
        Steps between two falls, 1 or more.
    warmup : int
        Steps of linear warm-up.

    Examples
    --------
    >>> from fastbn.optim import step_decay
    >>> schedule = step_decay(1.0, factor=0.5, every=2)
    >>> [schedule(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    lr, factor, every = _rate("lr", lr), _factor(factor), check.count("every", every)
    return _warmed(lr, warmup, lambda t: lr * optim_kernels.power(factor, t // every))


def exponential(lr: float, factor: float, *, warmup: int = 0) -> Schedule:
    """Return the schedule lr₀·factorᵗ.

    Parameters
    ----------
    lr : float
        lr₀ ≥ 0.
    factor : float
        In (0, 1].
    warmup : int
        Steps of linear warm-up.

    Examples
    --------
    >>> from fastbn.optim import exponential
    >>> exponential(1.0, factor=0.5)(3)
    0.125
    """
    lr, factor = _rate("lr", lr), _factor(factor)
    return _warmed(lr, warmup, lambda t: lr * optim_kernels.power(factor, t))


def cosine(lr: float, steps: int, final: float = 0.0, *, warmup: int = 0) -> Schedule:
    """Return half a cosine from lr₀ at t = 0 to the final rate at t = steps, which then stays.

    final + (lr₀ − final)·(1 + cos(π·t/steps))/2, without restarts (Loshchilov & Hutter 2017, eq. 5).
    The cosine is the C library's: its last bit may differ between systems.

    Parameters
    ----------
    lr, final : float
        Both ≥ 0.
    steps : int
        1 or more; a warm-up comes on top.
    warmup : int
        Steps of linear warm-up.

    Examples
    --------
    >>> from fastbn.optim import cosine
    >>> schedule = cosine(1.0, steps=4)
    >>> [round(schedule(t), 3) for t in (0, 1, 2, 4, 9)]
    [1.0, 0.854, 0.5, 0.0, 0.0]
    """
    lr, final, steps = _rate("lr", lr), _rate("final", final), check.count("steps", steps)
    fall = lr - final
    return _warmed(lr, warmup, lambda t: final + fall * (1 + math.cos(math.pi * min(t / steps, 1.0))) / 2)


def _rate(name: str, value: float) -> float:
    return check.number(name, value, "a finite number of 0 or more", 0.0)


def _factor(value: float) -> float:
    return check.number("factor", value, "a number in (0, 1]", 0.0, 1.0, open_low=True)


def _warmed(lr: float, warmup: int, schedule: Schedule) -> Schedule:
    warmup = check.count("warmup", warmup, 0)

    def warmed(step: int) -> float:
        return lr * (step + 1) / (warmup + 1) if step < warmup else schedule(step - warmup)

    return warmed
