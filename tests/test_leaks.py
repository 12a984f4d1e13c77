"""Memory stays flat over ten thousand calls of every public operation, those that fail included.

In a process of its own, three things are looked at: blocks of Python's allocator (an object that a call loses is one of
them, so 10,000 are), reference counts of what all calls share, and what the C library has given out, where memory that
Python knows nothing of shows; without glibc the resident size.
"""

import textwrap
from pathlib import Path

import pytest
from interpreter import run_python

MEASURE = """
import gc, io, os, sys, warnings
from contextlib import redirect_stdout, suppress

sys.path.insert(0, {tests!r})
import numpy as np
from calls import arrays_in
from memory import given_out
from odd_values import odd
from operations_models import OPERATIONS
from strategies import BFLOAT16

warnings.simplefilter("error")
def shared(calls):
    '''What every call refers to, and must let go: arguments, their arrays, dtypes, None.

    Not float64, of which NumPy itself loses a reference in every np.zeros(5).
    '''
    values = [value for call in calls for value in (*call.args.values(), *arrays_in([call.args, call.state]))]
    return [value for value in (*values, np.dtype("f2"), np.dtype("f4"), BFLOAT16, None) if value is not np.dtype("f8")]


def repeat(calls, times):
    for i in range(times):
        with suppress(TypeError, ValueError):
            calls[i % len(calls)]()


def left_behind(calls, objects, times):
    '''Return what so many calls leave behind: blocks, references to one of `objects`, bytes.'''
    counts, blocks, size = [sys.getrefcount(o) for o in objects], sys.getallocatedblocks(), given_out()
    repeat(calls, times)
    gc.collect()
    size, blocks = given_out() - size, sys.getallocatedblocks() - blocks
    return blocks, max(now - before for now, before in zip([sys.getrefcount(o) for o in objects], counts)), size


def report(name, calls, times):
    '''Print what calls leave behind in each window of a third of so many, where it is more than chance.'''
    repeat(calls, max(400, 50 * len(calls)))  # caches fill, slowly
    gc.collect()
    objects = shared(calls)
    windows = [left_behind(calls, objects, times // 3) for _ in range(6 if times < 10_000 else 3)]
    blocks, references, size = map(min, *windows)  # what is lost is lost in each
    # Half of what one of `calls` would lose, made in its turn; of 3,333 times the 80 bytes that malloc(64) takes, half
    if max(blocks, references) > times / len(calls) / 6 or size > 130_000:
        print(f"{{name}}: {{times // 3}} calls left {{blocks}} blocks, {{references}} references, {{size}} bytes")


def small(make, seed):
    call = make(np.random.default_rng(seed), 60)
    if "num_threads" in call.args:
        call.args["num_threads"] = 1
    return call


def slow(name):
    return name.startswith(("network", "fold", "questions"))  # a call takes milliseconds


{body}
print("done")
"""

GOOD = """
for name, make in list(OPERATIONS.items())[{part}]:
    # eight draws: with and without out, residual and ReLU; strided, misaligned, half types, foreign byte orders
    report(name, [small(make, seed) for seed in range(1 if slow(name) else 8)], 600 if slow(name) else 10_000)
"""

BAD = """
def spoilt(make, number):
    call, kind = small(make, 0), ("list of None", "generator", "ragged")[number % 3]
    argument = list(call.args)[number]
    call.args[argument] = odd(kind, np.random.default_rng(0), call.args[argument], call.near)
    return call


for name, make in OPERATIONS.items():
    if small(make, 0).args:
        calls = [spoilt(make, number) for number in range(len(small(make, 0).args))]
        report(name, calls, 600 if slow(name) else 10_000)
"""

LEAKS = {
    "an object": "kept.append(object())",
    "an array": "kept.append(np.empty(64, np.uint8))",
    "a reference": "ctypes.pythonapi.Py_IncRef(ctypes.py_object(x))",
    "memory that Python does not know": "ctypes.CDLL(None).malloc(64)",
}


def measure(body):
    tests = str(Path(__file__).parent)
    return run_python(MEASURE.format(tests=tests, body=textwrap.dedent(body)), OMP_NUM_THREADS="1").stdout


@pytest.mark.parametrize("part", [":6", "6:13", "13:"])
def test_calls_leave_nothing_behind(part):
    assert measure(GOOD.format(part=part)) == "done\n"


def test_failing_calls_leave_nothing_behind():
    assert measure(BAD) == "done\n"


@pytest.mark.parametrize("leak", LEAKS.values(), ids=LEAKS)
def test_a_leak_would_be_seen(leak):
    body = f"""
    import ctypes
    from calls import Call
    kept, x = [], np.ones(3)
    report("leak", [Call(lambda x: {leak}, {{"x": x}}, None)], 10_000)
    """
    assert measure(body).startswith("leak: 3333 calls left")
