"""Two versions side by side, as lines and as one page."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.cli import main

HOSTILE = "<script>alert(1)</script>"


def test_two_versions_are_compared_in_lines_and_on_a_page_of_its_own(
    root: Path, remake: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote"])
    params = root / "params.yaml"
    params.write_text(params.read_text().replace("seed: 0", "seed: 3", 1))
    remake(1, "failed", "passed", "passed")
    main.run(["promote"])
    capsys.readouterr()
    main.run(["diff", "models:/crescendo/1", "models:/crescendo@champion", "--prompts", "a cat", HOSTILE])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "models:/crescendo/1 -> models:/crescendo/2"
    assert "  seed: 0 -> 3" in lines and "  default passes: 1 -> 2" in lines
    assert "  1 passes: recall: passed 0.5 -> failed 0.5" in lines
    assert lines[-1] == "wrote diff.html"
    page = (root / "diff.html").read_text()
    assert page.count('<img src="data:image/webp') == 4 and HOSTILE not in page and "&lt;script&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page) and "http" not in page
    assert "<strong>failed 0.5</strong>" in page
    main.run(["diff", "models:/crescendo/1", "models:/crescendo/1", "--prompts", "a cat"])
    assert "Rules with 95% intervals: equal" in capsys.readouterr().out
