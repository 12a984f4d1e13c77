"""What every instruction set's build of optim_kernels.pyx offers."""

import numpy as np

ELEMENTS_PER_CHUNK: int
DTYPES: dict[str, int]

class Table:
    steps: int
    lr: float
    def __init__(self, params: list[np.ndarray], state: list[list[np.ndarray | None]]) -> None: ...
    @property
    def size(self) -> int: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...
    def mine(self) -> bool: ...
    def bind(self, grads: list[np.ndarray | None], first: int = 0) -> int: ...
    def holds(self, i: int) -> bool: ...
    def near(self, low: int, high: int) -> bool: ...

def count_fork() -> None: ...
def clip_flat(table: Table, limit: float, whole: bool, num_threads: int) -> None: ...
def sgd_flat(
    table: Table,
    lr: float,
    clip_value: float,
    decay: float,
    momentum: float,
    fresh: float,
    nesterov: bool,
    scheduled: float,
    num_threads: int,
) -> None: ...
def rmsprop_flat(
    table: Table,
    lr: float,
    clip_value: float,
    decay: float,
    alpha: float,
    momentum: float,
    eps_inside: float,
    eps_outside: float,
    scheduled: float,
    num_threads: int,
) -> None: ...
def adam_flat(
    table: Table,
    lr: float,
    clip_value: float,
    decay: float,
    shrink: float,
    beta1: float,
    beta2: float,
    correction: float,
    eps_inside: float,
    eps_outside: float,
    scheduled: float,
    num_threads: int,
) -> None: ...
def power(base: float, exponent: int) -> float: ...
