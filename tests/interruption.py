"""Ctrl-C on purpose: at a numbered point between the instructions of Python, or from another thread after a while."""

import dis
import gc
import signal
import sys
import threading
import time

import pytest

# CPython looks for signals when a frame starts, after a call, and when it jumps back.
STARTS = "CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "JUMP_ABSOLUTE"
LOOKS = {code for name, code in dis.opmap.items() if name.startswith(STARTS) and "INTRINSIC" not in name}


def interrupt(call, number):
    """Run `call` with Ctrl-C at the point of that number; return where it was, or None if the call ended before.

    From 3.13 on a function's instructions are seen from its second call on: call it with a number of infinity first.
    """
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        pytest.skip("CPython 3.13t loses sight of instructions once they have run without being traced")
    where = None

    def trace(frame, event, arg):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, previous = frame.f_code.co_code, None

        def at(frame, event, arg):
            nonlocal previous, number, where
            if event == "opcode":
                if previous is None or previous in LOOKS:
                    number -= 1
                    if number == 0:
                        where = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
                        signal.raise_signal(signal.SIGINT)
                previous = code[frame.f_lasti]
            return at

        return at

    sys._getframe().f_trace_opcodes = True  # or, in 3.12, no frame's are
    before = sys.gettrace()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    gc.disable()  # its callbacks, such as Hypothesis's, swallow exceptions
    try:
        sys.settrace(trace)
        call()
    except KeyboardInterrupt:
        return where
    finally:
        sys.settrace(before)
        gc.enable()
        signal.signal(signal.SIGINT, handler)
    assert where is None, f"lost at {where}"
    return None


class CtrlC:
    """Sends SIGINT from another thread once the process has spent some CPU time in the block; expects it there."""

    def __init__(self, after):
        self.after, self.done, self.sent = after, threading.Event(), None

    def send(self):
        start = time.process_time()
        while time.process_time() - start < self.after:
            if self.done.wait(0.002):
                return
        self.sent = time.process_time()
        signal.raise_signal(signal.SIGINT)

    def __enter__(self):
        self.handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.thread = threading.Thread(target=self.send)
        self.thread.start()
        return self

    def __exit__(self, kind, error, traceback):
        self.spent = time.process_time() - (self.sent or 0)
        self.done.set()
        self.thread.join()
        signal.signal(signal.SIGINT, self.handler)
        return kind is KeyboardInterrupt
