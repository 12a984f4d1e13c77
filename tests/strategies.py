"""What the tests draw: arrays of any shape, channel axis, dtype and place in memory, and data that is hard to sum.

Hypothesis draws the structure and a seed; the numbers come from ``np.random.default_rng(seed)``.
"""

import math
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT16, FLOAT32, FLOAT64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
DTYPES = [FLOAT32, FLOAT64, FLOAT16, BFLOAT16]

# Where the kernels change their ways. Only the reach of the tests depends on these, never what they expect.
LANES = 16
BLOCK_NCS = 16384  # elements of a block, summed by runs
BLOCK_LEAST, BLOCK_RC = 16384, 131072  # and by columns: an eighth of the array within these
ROW_GROUP, SHORT_RUN = 8, 256  # so many rows of runs so short are summed by columns
SIDE_BY_SIDE = 256  # short rows lie side by side up to this width
COLUMNS, SHORT_COLUMNS = 4096, 512  # long ones are cut to that; with runs, to this
PER_THREAD = 32768  # elements that pay for a thread

# (shape, channel axis): runs around the lanes and SHORT_RUN, few rows and many, one block and several
CHANNELS_FIRST = [
    ((2, 3, 7), 1),
    ((4, 24, 15), 1),
    ((8, 24, 15), 1),
    ((3, 144, 16), 1),
    ((9, 255, 17), 1),
    ((5, 960, 7, 7), 1),
    ((17, 130, 7, 7), 1),
    ((9, 3, 63), 1),
    ((3, 4, 8, 8), 1),
    ((8, 5, 65), 1),
    ((2, 2049, 9), 1),
    ((7, 3, SHORT_RUN), 1),
    ((8, 3, SHORT_RUN), 1),
    ((9, 3, SHORT_RUN + 1), 1),
    ((1800, 3, 49), 1),  # many blocks by columns
    ((8000, 2, 9), 1),  # the same, rows side by side
    ((120, 3, 300), 1),  # blocks of 54 runs
    ((1, 3, 128, 128), 1),  # one run of exactly a block
    ((2, 2, BLOCK_NCS + 1), 1),  # runs cut in two
    ((1, 2, 5 * 7 * 31, 41), 1),  # cut in three
    ((3, 1, 50), 1),  # one channel
    ((24, 300), 0),
]
CHANNELS_LAST = [
    ((7, 3), 1),
    ((2, 24), 1),
    ((5, 16), -1),
    ((33, 24), 1),
    ((6, 7, 7, 144), -1),
    ((257, 255), 1),
    ((64, 960), 1),
    ((3, 2049), 1),
    ((7, 17, 1), 1),
    ((90_000, 3), 1),  # many blocks of rows side by side
    ((1200, 144), 1),  # many blocks
    ((200, 2049), 1),  # many blocks, three tiles of columns
    ((20, BLOCK_NCS + 3), 1),
]


# ---- numbers ------------------------------------------------------------------------------------------------------


def heads(shape, axis):
    """Return which values of a channel come first in a block: the kernels shift a block's sums by its first value."""
    axis %= len(shape)
    n, c, s = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
    if c == 1:
        n, s = 1, n * s
    if s == 1 or (s <= SHORT_RUN and n >= ROW_GROUP and c > 1):
        side, whole = max(1, SIDE_BY_SIDE // (c * s)), LANES // math.gcd(c * s, LANES)  # so many rows are whole vectors
        side = min(side - (side % whole if side >= whole else 0), n)
        even = LANES // math.gcd(s, LANES)
        even = min(even, 8) if even * s > 4 * SHORT_COLUMNS else even
        tile = math.ceil(math.ceil(c / math.ceil(c * s / (COLUMNS if s == 1 else SHORT_COLUMNS))) / even) * even
        block = min(max(n * c * s // 8, BLOCK_LEAST), BLOCK_RC)
        rows = max(ROW_GROUP, block // (side * min(c, tile) * s)) * side
        return np.arange(0, n, rows) * s
    if s <= BLOCK_NCS:
        return np.arange(0, n * s, BLOCK_NCS // s * s)
    piece = math.ceil(math.ceil(s / math.ceil(s / BLOCK_NCS)) / LANES) * LANES
    return (np.arange(n)[:, None] * s + np.arange(0, s, piece)).ravel()


def _outliers(rng, m, c, first):
    x = rng.normal(size=(m, c))
    x[first] = 10.0 ** rng.integers(2, 7, c)
    return x


# name: function of (rng, values m, channels c, the first values of the blocks) -> (m, c)
KINDS = {
    "plain": lambda rng, m, c, first: rng.normal(size=(m, c)),
    "offset": lambda rng, m, c, first: rng.normal(size=(m, c)) + 10.0 ** rng.integers(3, 7, c),
    "outliers": _outliers,
    "step": lambda rng, m, c, first: np.where(np.arange(m)[:, None] < m // 2, 0.0, 1e5) + rng.normal(size=(m, c)),
    "ramp": lambda rng, m, c, first: np.arange(m)[:, None] / 7 + np.arange(c),
    "alternating": lambda rng, m, c, first: np.where(np.arange(m)[:, None] % 2, -1e5, 1e5) + rng.normal(size=(m, c)),
    "two values": lambda rng, m, c, first: np.where(rng.random((m, c)) < rng.uniform(0.05, 0.95, c), 1 / 3, -0.7),
    "heavy tails": lambda rng, m, c, first: np.clip(rng.standard_cauchy((m, c)), -1e6, 1e6),
    "huge": lambda rng, m, c, first: rng.normal(size=(m, c)) * 1e30,
    "tiny": lambda rng, m, c, first: rng.normal(size=(m, c)) * 1e-40,
    "constant": lambda rng, m, c, first: np.broadcast_to(rng.normal(size=c) * 1e3, (m, c)),
}


def numbers(rng, kind, shape, axis, dtype):
    """Return an array of a kind of numbers; each channel's values run in the order of a C-contiguous array."""
    c = shape[axis]
    others = tuple(np.delete(shape, axis))
    x = KINDS[kind](rng, math.prod(others), c, heads(shape, axis))
    if dtype == FLOAT16:
        x = np.clip(x, -6e4, 6e4)
    return np.ascontiguousarray(np.moveaxis(x.reshape(*others, c), -1, axis)).astype(dtype)


# ---- places in memory ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """How an array lies in memory: axes from the outermost, steps of slices, and the like."""

    order: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    misaligned: bool = False
    swapped: bool = False
    readonly: bool = False

    def put(self, values):
        """Return an array equal to `values` that lies so. What lies between its elements is NaN."""
        order = self.order or tuple(range(values.ndim))
        steps = self.steps or (1,) * values.ndim
        dtype = values.dtype.newbyteorder("S") if self.swapped and values.dtype != BFLOAT16 else values.dtype
        lengths = [n * abs(step) for n, step in zip(values.shape, steps, strict=True)]
        memory = np.full(math.prod(lengths) * dtype.itemsize + self.misaligned, 0xFF, np.uint8)
        whole = memory[int(self.misaligned) :].view(dtype).reshape([lengths[i] for i in order])
        view = whole.transpose(np.argsort(order))[tuple(slice(None, None, step) for step in steps)]
        view[...] = values
        view.flags.writeable = not self.readonly
        return view


def empty_place(place, shape, dtype):
    """Return (an array that lies so, the whole memory around it)."""
    view = place.put(np.zeros(shape, dtype))
    return view, view.base if view.base is not None else view


def places(ndim, *, output=False):
    """Draw a Place for arrays of `ndim` dimensions; an output is aligned, native and writable."""
    flags = {name: st.just(False) if output else st.booleans() for name in ("swapped", "readonly")}
    return st.builds(
        Place,
        order=st.one_of(st.none(), st.permutations(range(ndim)).map(tuple)),
        steps=st.one_of(st.none(), st.tuples(*[st.sampled_from([1, 1, 1, 2, 3, -1, -2])] * ndim)),
        misaligned=st.booleans(),
        **flags,
    )


# ---- shapes and whole problems ------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 49, 63, 64, 65, 100, 144, 255, 257]))


@st.composite
def shapes(draw, max_size=40_000, min_count=2):
    """Draw (shape, channel axis) with at least `min_count` values per channel; sometimes several blocks."""
    if draw(st.integers(0, 9)) == 0:
        usual = [(s, a) for s, a in CHANNELS_FIRST + CHANNELS_LAST if math.prod(s) <= 8 * max_size]
        return draw(st.sampled_from(usual))
    sizes = [draw(SIZES) for _ in range(draw(st.integers(2, 5)))]
    while math.prod(sizes) > max_size:
        sizes[sizes.index(max(sizes))] = draw(st.integers(1, 9))
    axis = draw(st.integers(0, len(sizes) - 1))
    if math.prod(sizes) // sizes[axis] < min_count:
        sizes[axis - 1] = max(sizes[axis - 1], min_count)
    return tuple(sizes), draw(st.sampled_from([axis, axis - len(sizes)]))


@dataclass
class Problem:
    """All arguments of one call, the arrays anywhere in memory."""

    x: np.ndarray
    axis: int
    gamma: np.ndarray | None
    beta: np.ndarray | None
    eps: float
    activation: str | None
    residual: np.ndarray | None
    dy: np.ndarray
    num_threads: int | None
    dtype: np.dtype
    about: str = field(default="")

    def __repr__(self):
        arrays = ", ".join(
            f"{name}: {a.shape} {a.dtype} strides {a.strides}"
            for name in ("x", "residual", "dy", "gamma", "beta")
            if (a := getattr(self, name)) is not None
        )
        return (
            f"Problem({self.about}; {arrays}; axis={self.axis}, eps={self.eps}, activation={self.activation}, "
            f"num_threads={self.num_threads})"
        )

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))  # Hypothesis would print whole arrays

    @property
    def channels(self):
        return self.x.shape[self.axis]

    @property
    def options(self):
        """The keyword arguments that fastbn and the oracle share."""
        return {"axis": self.axis, "eps": self.eps, "activation": self.activation, "residual": self.residual}


def parameters(rng, c, dtype):
    """Return a γ or β: of any sign, some 0, none so large that a float16 would overflow."""
    return (rng.normal(size=c) * rng.choice([0, 1, 1, 1, 8], c)).astype(dtype)


@st.composite
def problems(draw, dtypes=DTYPES, kinds=("plain", "offset", "outliers", "ramp"), max_size=40_000, dense=False):
    """Draw a Problem whose results no dtype overflows. `dense`: C-contiguous, aligned, native and writable arrays."""
    shape, axis = draw(shapes(max_size))
    dtype = draw(st.sampled_from(dtypes))
    kind, seed = draw(st.sampled_from(kinds)), draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    c = shape[axis]

    def somewhere(values):
        return values if dense else draw(places(values.ndim)).put(values)

    if not dense and draw(st.integers(0, 5)) == 0:  # a view of zero strides
        repeated = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        small = tuple(1 if again else n for n, again in zip(shape, repeated, strict=True))
        x = np.broadcast_to(somewhere(numbers(rng, kind, small, axis, dtype)), shape)
    else:
        x = somewhere(numbers(rng, kind, shape, axis, dtype))
    with_residual = draw(st.booleans())
    residual = somewhere(rng.normal(size=shape).astype(dtype)) if with_residual else None
    dy = somewhere(rng.normal(size=shape).astype(dtype))
    gamma, beta = (
        somewhere(parameters(rng, c, draw(st.sampled_from([FLOAT32, FLOAT64, FLOAT16, BFLOAT16]))))
        if draw(st.integers(0, 3))
        else None
        for _ in range(2)
    )
    eps = draw(st.sampled_from([1e-3, 1.0] if dtype == FLOAT16 else [1e-5, 1e-3, 1.0, 1e-10]))
    return Problem(
        x=x, axis=axis, gamma=gamma, beta=beta, eps=eps, activation=draw(st.sampled_from([None, "relu"])),
        residual=residual, dy=dy, num_threads=draw(st.sampled_from([None, 1, 2, 3])), dtype=dtype,
        about=f"{kind}, seed {seed}",
    )  # fmt: skip
