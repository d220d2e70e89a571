"""The documentation names only what is there: links, paths, commands, and the rows of packages."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli.main import build_parser
from tests.test_imports import ROWS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("infra", "benchmarks", "data")),
]
FOLDERS = ("pipeline", "stages", "tests", "benchmarks", "infra", "docs", "presets")
HISTORY = ("docs/log.md", "CHANGELOG.md")  # they name files as they were called at the time


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def commands() -> set[str]:
    """`preset`, `data`, `data check`: what may follow the word `crescendo`."""

    def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        found = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0].choices) if found else {}

    top = below(build_parser())
    return {*top, *(f"{name} {inner}" for name, own in top.items() for inner in below(own))}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_resolves(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} is missing"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_every_path_of_the_project_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*", text)
    for path in (path.rstrip(".") for path in paths if "NAME" not in path):
        assert any(ROOT.glob(path)), f"{path} is missing"


@pytest.mark.parametrize("page", [page for page in PAGES if name_of(page) not in HISTORY], ids=name_of)
def test_every_name_is_in_the_file_that_a_page_gives_for_it(page: Path) -> None:
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    for name, path in re.findall(r"`([A-Za-z_]+)`(?: in | \()`([a-z_/]+\.py)`", text):
        assert re.search(rf"^(?:class |def )?{name}\b", (ROOT / path).read_text(), re.MULTILINE), (
            f"{name}, {path}"
        )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_exists(page: Path) -> None:
    known = commands()
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    for quoted in re.findall(r"`crescendo ([a-z]+(?: [a-z]+)?)", text):
        assert quoted in known or quoted.split()[0] in known - {"data"}, f"crescendo {quoted}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_example_of_a_command_has_valid_arguments(page: Path) -> None:
    for line in re.findall(r"^ {4}crescendo (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        build_parser().parse_args(shlex.split(line, comments=True))  # leaves by SystemExit where they are not


def test_the_diagram_of_packages_has_the_rows_that_the_imports_obey() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    diagram = page.partition("## Packages")[2].partition("\n- ")[0]
    drawn = [tuple(line.split()) for line in diagram.splitlines() if line.startswith("    ")]
    there = {path.stem for path in (ROOT / "pipeline").iterdir()} | {"stages"}
    assert drawn == [tuple(name for name in row if name in there) for row in ROWS]
