"""The display of progress: one rewritten line on a terminal, whole lines elsewhere."""

import io
import re

from pipeline.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_last_line_of_a_short_task() -> None:
    out = io.StringIO()
    with ProgressBar("toy", out=out) as on_progress:
        for done in range(0, 501, 100):
            on_progress(done, 500, loss=0.25)
        assert out.getvalue() == ""
    assert re.fullmatch(r"toy 500/500 images, +[0-9.]+ images/s, 00:00 left, loss=0.25\n", out.getvalue())


def test_a_log_gets_a_line_now_and_then_and_none_twice() -> None:
    out = io.StringIO()
    with ProgressBar("toy", "rows", out, line_seconds=0.0) as on_progress:
        for done in (0, 1, 1, 2):
            on_progress(done, 4)
    counts = [line.split(",")[0] for line in out.getvalue().splitlines()]
    assert counts == ["toy 0/4 rows", "toy 1/4 rows", "toy 2/4 rows"]


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    out = Terminal()
    with ProgressBar("toy", out=out) as on_progress:
        for done in (0, 1, 2):
            on_progress(done, 2)
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")
    assert "toy 2/2 images |" in out.getvalue().rpartition("\r")[2]


def test_a_task_without_progress_shows_nothing() -> None:
    out = Terminal()
    with ProgressBar("toy", out=out):
        pass
    assert out.getvalue() == ""
