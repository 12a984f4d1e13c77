"""PyTorch and fastbn in one process: the threads that a call uses, and the OpenMP runtimes that are loaded."""

import sys

import pytest
from interpreter import run_python

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

COUNT = """
    import os
    import numpy as np
    torch_threads, fastbn_threads = int(os.environ["TORCH_THREADS"]), int(os.environ["FASTBN_THREADS"])
    if os.environ["FIRST"] == "torch":
        import torch, fastbn
    else:
        import fastbn, torch
    from fastbn.interop.torch import BatchNorm2d
    torch.set_num_threads(torch_threads)
    fastbn.set_num_threads(fastbn_threads)
    x, dy = (torch.from_numpy(np.ones((8, 64, 56, 56), np.float32)) for _ in range(2))  # by no thread of PyTorch's
    x.requires_grad_()
    bn = BatchNorm2d(64)

    def tasks():
        return len(os.listdir("/proc/self/task"))

    before = tasks()  # OpenBLAS and others may have started some
    for _ in range(3):
        bn(x)
    bn.eval()
    bn(x)
    torch.ops.fastbn.batch_norm_backward(dy, x, None, None, *[torch.ones(64, dtype=torch.float64)] * 3,
                                         torch.empty(0, dtype=torch.uint8), x.stride(), 1e-5, False, False, False)
    print(tasks() - before)
"""


@pytest.mark.parametrize(
    ("first", "torch_threads", "fastbn_threads"), [("torch", 1, 4), ("fastbn", 4, 2), ("torch", 3, 3), ("fastbn", 3, 3)]
)
def test_a_call_starts_no_more_threads_than_the_smaller_number(first, torch_threads, fastbn_threads):
    started = run_python(
        COUNT, FIRST=first, TORCH_THREADS=str(torch_threads), FASTBN_THREADS=str(fastbn_threads), OMP_NUM_THREADS="4"
    ).stdout
    assert int(started) <= min(torch_threads, fastbn_threads) - 1
    if (torch_threads, fastbn_threads) == (3, 3):
        assert int(started) > 0, "the kernels ran on one thread, so this test shows nothing"


ALTERNATE = """
    import os
    if os.environ["FIRST"] == "torch":
        import torch, fastbn
    else:
        import fastbn, torch
    from fastbn.interop.torch import BatchNorm2d
    torch.set_num_threads(3)
    fastbn.set_num_threads(3)
    before = len(os.listdir("/proc/self/task"))
    bn, x = BatchNorm2d(64), torch.randn(8, 64, 56, 56)
    with torch.no_grad():
        for _ in range(5):
            torch.relu(bn(torch.sigmoid(x)))
    runtimes = set()
    with open("/proc/self/maps") as maps:
        for line in maps:
            name = os.path.basename(line.split()[-1])
            if name.startswith(("libgomp", "libomp", "libiomp5")):
                runtimes.add(line.split()[-1])
    print(len(runtimes), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.parametrize("first", ["torch", "fastbn"])
def test_alternating_they_share_one_pool_of_threads_where_they_share_the_runtime(first):
    done = run_python(ALTERNATE, FIRST=first, OMP_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1")
    runtimes, threads = map(int, done.stdout.split())
    assert runtimes >= 1
    assert threads <= 2 * runtimes


BITS = """
    import hashlib, os
    import torch
    from fastbn.interop.torch import BatchNormAddReLU
    torch.set_num_threads(int(os.environ["TORCH_THREADS"]))
    generator = torch.Generator().manual_seed(1)
    x, r, dy = (torch.randn(8, 33, 41, 23, generator=generator) for _ in range(3))
    bn = BatchNormAddReLU(33)
    x.requires_grad_(), r.requires_grad_()
    y = bn(x, r)
    y.backward(dy)
    digest = hashlib.sha256()
    for tensor in (y.detach(), x.grad, r.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var):
        digest.update(tensor.numpy().tobytes())
    print(digest.hexdigest())
"""


def test_the_bits_do_not_depend_on_the_threads_of_either():
    assert len({run_python(BITS, TORCH_THREADS=str(n), OMP_NUM_THREADS="4").stdout for n in (1, 3)}) == 1
