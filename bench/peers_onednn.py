"""oneDNN's batch normalization primitive through its C API, in three layouts of its own."""

from __future__ import annotations

import ctypes
import importlib.metadata
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint, c_void_p
from typing import Any

import numpy as np

from fastbn._core import layout

from .cases import NormCase
from .peers import BETA, EPS, GAMMA, Call, Peer, arrays

# From dnnl_types.h and dnnl_common_types.h of oneDNN 3
CPU, IN_ORDER, UNIMPLEMENTED = 1, 1, 3
DTYPES = {"float16": 1, "bfloat16": 2, "float32": 3}
PROPAGATION = {"train": 64, "infer": 96, "backward": 128}
GLOBAL_STATS, USE_SCALE, USE_SHIFT = 1, 2, 4
FUSED = {"": 0, "relu": 8, "add+relu": 16}
SRC, SRC_1, DST, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE = 1, 2, 17, 49, 50, 51, 52, 64
DIFF_SRC, DIFF_SRC_1, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 130, 145, 255, 256
INPUTS = (SRC, SRC_1, MEAN, VARIANCE, SCALE, SHIFT, WORKSPACE, DIFF_DST)
OUTPUTS = (DST, DIFF_SRC, DIFF_SRC_1, DIFF_SCALE, DIFF_SHIFT)  # and, in training, MEAN, VARIANCE and WORKSPACE
QUERY_ARGUMENT, QUERY_NAME = 255, 8
BLOCK = 16  # channels of the blocked layout


class _Version(ctypes.Structure):
    _fields_ = (("major", c_int), ("minor", c_int), ("patch", c_int))


class _Argument(ctypes.Structure):
    _fields_ = (("index", c_int), ("memory", c_void_p))


class Primitive:
    """A batch normalization with its arguments: given arrays, and zeros of the size it asks for."""

    def __init__(self, peer: OneDNN, operation: str, case: NormCase, given: dict[int, np.ndarray], hint: Any = None):
        check, lib, engine = peer.check, peer.lib, peer.engine
        data, self.descriptor = peer.memory_descriptor(case), c_void_p()
        flags = USE_SCALE | USE_SHIFT | FUSED[case.fused] | (GLOBAL_STATS if operation == "infer" else 0)
        kind = c_int(PROPAGATION[operation])
        if operation == "backward":
            check(lib.dnnl_batch_normalization_backward_primitive_desc_create(
                byref(self.descriptor), engine, kind, data, data, data, c_float(EPS), c_uint(flags), hint, None
            ))  # fmt: skip
        else:
            check(lib.dnnl_batch_normalization_forward_primitive_desc_create(
                byref(self.descriptor), engine, kind, data, data, c_float(EPS), c_uint(flags), None
            ))  # fmt: skip
        self.arrays: dict[int, np.ndarray] = {}
        self._primitive, memories = c_void_p(), []
        check(lib.dnnl_primitive_create(byref(self._primitive), self.descriptor))
        for index in INPUTS + OUTPUTS:
            if operation == "backward" and index == SHIFT:
                continue  # described, but refused as one input too many
            wanted = lib.dnnl_primitive_desc_query_md(self.descriptor, QUERY_ARGUMENT, index)
            if size := lib.dnnl_memory_desc_get_size(wanted):
                array = given.get(index)
                if array is None:
                    array = layout.aligned_empty((size,), np.dtype(np.uint8))
                    array[...] = 0
                assert array.nbytes == size, (index, array.nbytes, size)
                self.arrays[index], memory = array, c_void_p()
                check(lib.dnnl_memory_create(byref(memory), wanted, engine, c_void_p(array.ctypes.data)))
                memories.append(_Argument(index, memory))
        self._arguments = (_Argument * len(memories))(*memories)
        self._lib, self._stream = lib, peer.stream
        self._run, self._wait = lib.dnnl_primitive_execute, lib.dnnl_stream_wait

    def __call__(self) -> dict[int, np.ndarray]:
        if self._run(self._primitive, self._stream, len(self._arguments), self._arguments) or self._wait(self._stream):
            raise RuntimeError("oneDNN: a primitive failed")
        return self.arrays

    @property
    def implementation(self) -> str:
        name = c_char_p()
        self._lib.dnnl_primitive_desc_query(self.descriptor, QUERY_NAME, 0, byref(name))
        return (name.value or b"").decode()

    def __del__(self) -> None:
        for argument in getattr(self, "_arguments", ()):
            self._lib.dnnl_memory_destroy(c_void_p(argument.memory))
        if hasattr(self, "_lib"):
            self._lib.dnnl_primitive_destroy(self._primitive)
            self._lib.dnnl_primitive_desc_destroy(self.descriptor)


class OneDNN(Peer):
    """oneDNN in one layout, whatever layout the case has: that gives the shape. It writes into given memory only."""

    module, install = "onednn-cpu-gomp", "pip install onednn-cpu-gomp"
    tag = ""  # of the memory format, for axes a, b, then `…`
    rows = False  # takes rows of channels

    def __init__(self, threads: int) -> None:
        try:
            files = importlib.metadata.files(self.module) or []
            path = next(file.locate() for file in files if file.name == "libdnnl.so.3")
            self.lib = lib = ctypes.CDLL(str(path))
        except (StopIteration, OSError) as error:
            raise ModuleNotFoundError(f"{self.name}: {self.module} has no library that loads here: {error}") from error
        lib.dnnl_version.restype = POINTER(_Version)
        version = lib.dnnl_version().contents
        self._version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != 3:
            raise ModuleNotFoundError(f"{self.name}: expected oneDNN 3, got {self._version}")
        lib.omp_set_num_threads(threads)  # found in the OpenMP runtime that the library is linked to
        lib.dnnl_fmt_tag2str.restype = c_char_p
        lib.dnnl_primitive_desc_query_md.restype = c_void_p
        lib.dnnl_memory_desc_get_size.restype, lib.dnnl_memory_desc_get_size.argtypes = c_size_t, (c_void_p,)
        lib.dnnl_memory_create.argtypes = (c_void_p,) * 4
        self.engine, self.stream = c_void_p(), c_void_p()
        self.check(lib.dnnl_engine_create(byref(self.engine), CPU, c_size_t(0)))
        self.check(lib.dnnl_stream_create(byref(self.stream), self.engine, IN_ORDER))

    @property
    def version(self) -> str:
        return self._version

    @staticmethod
    def check(status: int) -> None:
        if status == UNIMPLEMENTED:
            raise NotImplementedError("oneDNN has no implementation of this on this CPU")
        if status:
            raise RuntimeError(f"oneDNN: status {status}")

    def dims(self, case: NormCase) -> tuple[int, ...]:
        return (*case.shape, 1, 1) if len(case.shape) == 2 else case.shape

    def memory_descriptor(self, case: NormCase) -> c_void_p:
        dims = self.dims(case)
        name = self.tag.replace("…", "cde"[: len(dims) - 2]).encode()
        tag = next(number for number in range(2, 4096) if self.lib.dnnl_fmt_tag2str(number) == name)
        descriptor = c_void_p()
        self.check(self.lib.dnnl_memory_desc_create_with_tag(
            byref(descriptor), len(dims), (c_int64 * 12)(*dims), DTYPES[case.dtype], tag
        ))  # fmt: skip
        return descriptor

    def pack(self, array: np.ndarray) -> np.ndarray:
        """Return a new array with the values of `array`, (N, C, …), in this layout's order in memory."""
        raise NotImplementedError("each layout packs its own way")

    def norm(self, case: NormCase) -> Call | None:
        if case.dtype not in DTYPES or not case.preallocated:
            return None
        if len(case.shape) == 2 and not self.rows:
            return None
        c = case.shape[1]
        x, dy, residual = (self.pack(array) for array in arrays(case, 3))
        given = {
            SRC: x, SRC_1: residual, DIFF_DST: dy, SCALE: np.full(c, GAMMA, np.float32),
            SHIFT: np.full(c, BETA, np.float32),
        }  # fmt: skip
        if case.operation == "infer":
            given |= {MEAN: np.zeros(c, np.float32), VARIANCE: np.ones(c, np.float32)}
        try:
            forward = Primitive(self, "infer" if case.operation == "infer" else "train", case, given)
            if case.operation != "backward":
                return forward
            saved = forward()
            given |= {index: saved[index] for index in (MEAN, VARIANCE, WORKSPACE) if index in saved}
            return Primitive(self, "backward", case, given, forward.descriptor)
        except NotImplementedError:
            return None


class OneDNNChannelsFirst(OneDNN):
    """Plain NCHW."""

    name, tag = "onednn-nchw", "ab…"

    def pack(self, array: np.ndarray) -> np.ndarray:
        return _copied(array)


class OneDNNChannelsLast(OneDNN):
    """NHWC, and rows of channels as images of one pixel."""

    name, tag, rows = "onednn-nhwc", "a…b", True

    def pack(self, array: np.ndarray) -> np.ndarray:
        return _copied(np.moveaxis(array, 1, -1))


class OneDNNRows(OneDNNChannelsLast):
    """Rows of channels as the pixels of one image: with few channels or rows much faster, with many of both slower."""

    name = "onednn-rows"

    def dims(self, case: NormCase) -> tuple[int, ...]:
        return (1, case.shape[1], case.shape[0], 1)

    def norm(self, case: NormCase) -> Call | None:
        return super().norm(case) if len(case.shape) == 2 else None


class OneDNNBlocked(OneDNN):
    """Blocks of 16 channels, oneDNN's own layout where there is AVX-512; zeros fill the last block."""

    name, tag = "onednn-blocked", f"aB…{BLOCK}b"

    def pack(self, array: np.ndarray) -> np.ndarray:
        n, c, *spatial = array.shape
        blocks = -(-c // BLOCK)
        padded = np.zeros((n, blocks * BLOCK, *spatial), array.dtype)
        padded[:, :c] = array
        return _copied(np.moveaxis(padded.reshape(n, blocks, BLOCK, *spatial), 2, -1))


def _copied(array: np.ndarray) -> np.ndarray:
    copy = layout.aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
