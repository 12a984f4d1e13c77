# The entries of kernels.pyx, which is compiled as _kernels_v2, _kernels_v3, … : see dispatch.py.
from typing import Any

from numpy import float64
from numpy.typing import NDArray

_Data = NDArray[Any]
_Channels = NDArray[float64]
_Bits = tuple[_Data, _Data]  # of layout.bits_like

def copy(x: _Data, y: _Data, threads: int, stream: bool | None = None) -> None: ...
def moments(x: _Data, mean: _Channels, m2: _Channels, threads: int) -> None: ...
def normalize(
    x: _Data, residual: _Data | None, y: _Data, gamma: _Channels | None, beta: _Channels | None, eps: float,
    mean: _Channels, var: _Channels, relu: bool, bits: _Bits | None, threads: int,
) -> None: ...
def forward(
    x: _Data, residual: _Data | None, y: _Data, gamma: _Channels | None, beta: _Channels | None, eps: float,
    mean: _Channels, var: _Channels, rstd: _Channels, relu: bool, bits: _Bits | None, threads: int,
) -> None: ...
def backward(
    dy: _Data, x: _Data, dx: _Data | None, gamma: _Channels | None, beta: _Channels | None, mean: _Channels,
    rstd: _Channels, dgamma: _Channels, dbeta: _Channels, relu: bool, frozen: bool, bits: _Bits | None,
    masked: _Data | None, threads: int,
) -> None: ...
def input_gradient(
    dy: _Data, x: _Data, dx: _Data, gamma: _Channels | None, beta: _Channels | None, mean: _Channels, rstd: _Channels,
    dgamma_mean: _Channels, dbeta_mean: _Channels, relu: bool, frozen: bool, threads: int,
) -> None: ...
