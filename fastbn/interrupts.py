"""Ctrl-C between changes, not within them. What one compiled call changes needs none of this."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; a second one acts at once.

    For changes that take several steps of Python: interrupted within, some parameters would be as before and some as
    after. Other threads than the main one never see the signal, and a handler that is not a Python function is
    left alone.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    received: list[tuple[Any, ...]] = []

    def hold(*arguments: Any) -> None:
        received.append(arguments)
        if len(received) > 1:
            handler(*arguments)

    def restore() -> None:
        try:
            signal.signal(signal.SIGINT, handler)
        except BaseException:  # of another signal's handler, which comes before
            restore()
            raise

    try:
        signal.signal(signal.SIGINT, hold)
        yield
    finally:
        restore()
        if received:
            handler(*received[0])
