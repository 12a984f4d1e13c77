"""A progress bar on stderr: rich where it is installed, else one plain line."""

import sys


class Progress:
    """Show epoch, losses and accuracy while training; a context manager.

    On a terminal the line is redrawn as training goes; elsewhere (a log file) it is written once, at the end.
    Showing progress must never stop a training: a display that fails is dropped.
    """

    def __init__(self, enabled, epochs, batches):
        self._epochs, self._batches = epochs, batches
        self._done, self._text = 0, ""
        self._stride = max(1, batches // 50)  # redrawing for each of thousands of batches would cost time
        self._display = None
        if enabled:
            try:
                self._display = _Rich(epochs * batches)
            except Exception:  # not installed, too old, or no stream to write to
                self._display = _Plain(epochs * batches)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._draw("close")

    def batch(self):
        """Count one mini-batch."""
        self._done += 1
        if self._done % self._stride == 0:
            self._draw("show")

    def epoch(self, history):
        """Take over the figures of the epoch that has just ended."""
        names = [name for name in ("loss", "val_loss", "accuracy", "val_accuracy") if history.get(name)]
        figures = ", ".join(f"{name} {history[name][-1]:.4f}" for name in names)
        self._text = f"epoch {len(history['loss'])}/{self._epochs}: {figures}"
        self._draw("show")

    def _draw(self, method):
        if self._display is None:
            return
        try:
            getattr(self._display, method)(self._done, self._text or f"epoch 0/{self._epochs}")
        except Exception:
            self._display = None


class _Rich:
    def __init__(self, total):
        from rich.console import Console  # here, not above: rich is an extra, and importing it takes time
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total)
        self._bar.start()

    def show(self, done, text):
        self._bar.update(self._task, completed=done, description=text)

    def close(self, done, text):
        try:
            self.show(done, text)
        finally:
            self._bar.stop()  # or the terminal stays without a cursor


class _Plain:
    def __init__(self, total):
        self._total = total

    def show(self, done, text):
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{text} [{done * 100 // self._total}%]")
            sys.stderr.flush()

    def close(self, done, text):
        self.show(done, text)
        sys.stderr.write("\n" if sys.stderr.isatty() else text + "\n")
