"""Ctrl-C on purpose: at a numbered point between the instructions of Python, or from another thread after a while."""

import dis
import gc
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager

# CPython looks for signals when a frame starts, after a call, and when it jumps back.
STARTS = "CALL", "RESUME", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "JUMP_ABSOLUTE"
LOOKS = {code for name, code in dis.opmap.items() if name.startswith(STARTS) and "INTRINSIC" not in name}


def interrupt(call, number):
    """Run `call` with Ctrl-C at the point of that number; return where it was, or None if the call ended before."""
    where = None

    def point(code, line):
        nonlocal number, where
        number -= 1
        if number == 0:
            where = f"{code.co_filename}:{line} ({code.co_name})"
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    gc.disable()  # its callbacks, such as Hypothesis's, swallow exceptions
    try:
        with (monitored if hasattr(sys, "monitoring") else traced)(point):
            call()
            number = math.inf
    except KeyboardInterrupt:
        return where
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, handler)
    assert where is None, f"lost at {where}"
    return None


@contextmanager
def monitored(point):
    """Call `point` where this thread looks for signals: from CPython 3.12 on, whose settrace misses some (3.13)."""
    thread, previous = threading.get_ident(), {}
    monitoring, tool, events = sys.monitoring, sys.monitoring.DEBUGGER_ID, sys.monitoring.events

    def starts(code, offset):
        previous[id(sys._getframe(1))] = dis.opmap["RESUME"]

    def at(code, offset):
        frame = sys._getframe(1)
        looks = threading.get_ident() == thread and previous.get(id(frame)) in LOOKS
        previous[id(frame)] = code.co_code[offset]
        if looks:
            point(code, frame.f_lineno)

    monitoring.use_tool_id(tool, "interrupt")
    for event, function in ((events.PY_START, starts), (events.PY_RESUME, starts), (events.INSTRUCTION, at)):
        monitoring.register_callback(tool, event, function)
    try:
        monitoring.set_events(tool, events.PY_START | events.PY_RESUME | events.INSTRUCTION)
        yield
    finally:
        monitoring.set_events(tool, events.NO_EVENTS)
        monitoring.free_tool_id(tool)


@contextmanager
def traced(point):
    """Call `point` where this thread looks for signals."""

    def trace(frame, event, arg):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, previous = frame.f_code.co_code, None

        def at(frame, event, arg):
            nonlocal previous
            if event == "opcode":
                looks = previous is None or previous in LOOKS
                previous = code[frame.f_lasti]
                if looks:
                    point(frame.f_code, frame.f_lineno)
            return at

        return at

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


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
