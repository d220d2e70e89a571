"""How far a task has got, on one line, by tqdm. Every stage and command that takes long shows the same display,
and libraries show none of their own."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 15.0  # between lines where there is no terminal
LINE = "{desc} {n_fmt}/{total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left{postfix}"
BAR = "{desc} {n_fmt}/{total_fmt}{unit} |{bar:20}| {rate_noinv_fmt}, {remaining} left{postfix}"


class _Line(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A bar that is rewritten in place on a terminal, and printed now and then as a whole line elsewhere."""

    monitor_interval = 0  # Without tqdm's own thread: processes are forked beside a bar.
    disable: bool
    _printed: int | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self.fp.isatty():
            super().display(msg, pos)
        elif self.n != self._printed:
            self._printed = self.n
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        if self.fp.isatty():
            super().close()
        elif not self.disable:
            self.disable = True
            self.display()


class ProgressBar:
    """`on_progress(done, total)` of one task, as count, rate, time left and metrics on stderr.

    On a terminal the line is rewritten; elsewhere one is printed every `line_seconds`, and a last one by `close`,
    so that a task is never silent in a log. Use it as a context manager. The rate counts from the first call.
    """

    def __init__(
        self,
        task: str,
        unit: str = "images",
        out: TextIO | None = None,
        line_seconds: float = LINE_SECONDS,
    ) -> None:
        self._task, self._unit, self._out, self._seconds = task, unit, out or sys.stderr, line_seconds
        self._line: _Line | None = None

    def __call__(self, done: int, total: int, **metrics: float) -> None:
        """Show that `done` of `total` are done."""
        if self._line is None:
            self._line = self._open(done, total)
        self._line.set_postfix(metrics, refresh=False)
        self._line.total = total
        self._line.update(done - self._line.n)

    def _open(self, done: int, total: int) -> _Line:
        live = self._out.isatty()
        when: dict[str, Any] = {} if live else {"mininterval": self._seconds, "delay": self._seconds}
        return _Line(
            desc=self._task,
            unit=f" {self._unit}",
            total=total,
            initial=done,
            file=self._out,
            bar_format=BAR if live else LINE,
            dynamic_ncols=True,
            miniters=1,
            **when,
        )

    def close(self) -> None:
        """Print the last state, and end the line."""
        if self._line is not None:
            self._line.close()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' reports on loading, and its progress bars, off the terminal."""
    logging = importlib.import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
