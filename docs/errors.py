"""Make docs/errors.md from the code: every error that a user may meet, with what it says and what to do.

    python docs/errors.py > docs/errors.md

An error is a call, or a tuple, that begins with a code such as "E-CFG-001", or a text that does. Values that are
filled in are shown as `...`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"E-[A-Z]+-\d{3}")
SUBJECTS = {
    "ACC": ("Permission", 77),
    "ARC": ("Archives", 65),
    "BUSY": ("In use, or away for now", 75),
    "CAP": ("Captions", 65),
    "CFG": ("Parameters, compute profiles, the command line", 78),
    "DAT": ("Data", 65),
    "GATE": ("The promotion gate", 1),
    "IMG": ("Images", 65),
    "INP": ("What is missing", 66),
    "IO": ("Disks, servers, damaged files", 74),
    "TVS": ("Data sets of torchvision", 65),
    "PAR": ("Parquet files", 65),
    "STOP": ("Stopped runs", 75),
    "SVG": ("Drawings", 65),
}
TABLE = ("| code | what it says | what to do |", "|---|---|---|")
HEAD = """# Errors

Every error is one line: its code, where, what is wrong, and what to do. This page is made from the code by
`python docs/errors.py`; `...` stands for a value. The status is that of the command which ends with the error.
Warnings and verdicts on single images or captions have codes of the same kind, and end nothing.

A line without a code is a bug: it comes with a traceback and status 70. `crescendo doctor` looks for what is wrong
with a project before a stage does.
"""


class Error(NamedTuple):
    """An error as the code words it."""

    code: str
    says: str
    cure: str


class Scope:
    """The texts that names stand for at a line of a function: those assigned last before it, or in the module."""

    def __init__(self, module: ast.Module, body: list[ast.stmt], line: int) -> None:
        self.names = dict(assigned(module.body, shallow=True))
        self.names |= {name: value for name, value in assigned(body) if value.lineno <= line}

    def text(self, node: ast.expr, inside: frozenset[str] = frozenset()) -> str:
        """A text with `...` for what is filled in. `inside`: names that are being looked up."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.FormattedValue):
            return self.text(node.value, inside)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.text(part, inside) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.text(node.left, inside) + self.text(node.right, inside)
        if isinstance(node, ast.IfExp):
            return " / ".join(filter(None, (self.text(part, inside) for part in (node.body, node.orelse))))
        if isinstance(node, ast.Name) and node.id in self.names and node.id not in inside:
            return self.text(self.names[node.id], inside | {node.id})
        return "..."


def assigned(body: list[ast.stmt], shallow: bool = False) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of assignments, in the order of lines; `shallow`: of these statements only."""
    below = body if shallow else (node for statement in body for node in ast.walk(statement))
    found = [node for node in below if isinstance(node, ast.Assign) and len(node.targets) == 1]
    for node in sorted(found, key=lambda node: node.lineno):
        yield from unpacked(node.targets[0], node.value)


def unpacked(target: ast.expr, value: ast.expr) -> Iterator[tuple[str, ast.expr]]:
    """`a, b = x, y` as (a, x) and (b, y)."""
    if isinstance(target, ast.Name):
        yield target.id, value
    elif (
        isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts)
    ):
        for each, own in zip(target.elts, value.elts, strict=True):
            yield from unpacked(each, own)


def errors_in(path: Path) -> Iterator[Error]:
    """The errors of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    seen: set[int] = set()
    for scope in [*reversed(functions), tree]:  # inner functions come first
        for node in ast.walk(scope):
            if id(node) in seen or not may_be_error(node):
                continue
            own = Scope(tree, scope.body, node.lineno)
            text = own.text(node)
            error = from_parts(parts_of(node), own) if text == "..." else whole_line(text)
            if error is not None:
                seen.add(id(node))
                yield error


def may_be_error(node: ast.AST) -> TypeGuard[ast.expr]:
    """Whether a node begins with what looks like a code, or a name for one."""
    first = next(iter(node.values if isinstance(node, ast.JoinedStr) else parts_of(node)), None)
    if isinstance(first, ast.Constant):
        return isinstance(first.value, str) and CODE.match(first.value) is not None
    return isinstance(first, ast.Name) and first.id.isupper()


def parts_of(node: ast.AST) -> list[ast.expr]:
    """Arguments of a call, or the parts of a tuple."""
    if isinstance(node, ast.Call):
        return node.args
    return node.elts if isinstance(node, ast.Tuple) else []


def from_parts(parts: list[ast.expr], own: Scope) -> Error | None:
    """code, says, cure; or code, where, says, cure."""
    if len(parts) < 3 or CODE.fullmatch(own.text(parts[0])) is None:
        return None
    code, *_, says, cure = (own.text(part) for part in parts[:4])
    return Error(code, says, cure)


def whole_line(text: str) -> Error | None:
    """A text such as `E-IO-002 ...: .... Fix: check the path`."""
    match = re.fullmatch(rf"({CODE.pattern}) (.*?)\. Fix: (.*)", text)
    return None if match is None else Error(*match.groups())


def page() -> str:
    """docs/errors.md."""
    paths = sorted([*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("stages/*.py")])
    found = sorted({error for path in paths for error in errors_in(path)})
    lines = [HEAD]
    for kind, (title, status) in SUBJECTS.items():
        own = [error for error in found if error.code.split("-")[1] == kind]
        lines += [
            f"## {title} (E-{kind}, status {status})\n",
            "| code | what it says | what to do |",
            "|---|---|---|",
        ]
        lines += [f"| {error.code} | {cell(error.says)} | {cell(error.cure)} |" for error in own] + [""]
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text in a table of Markdown."""
    plain = re.sub(r"(\.\.\.)+", "...", " ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
    return plain if plain != "..." else "(it depends)"


if __name__ == "__main__":
    sys.stdout.write(page())
