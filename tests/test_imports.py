"""Who imports what: the core stays light, importing does nothing, dvc.yaml names each stage's import closure."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = {
    f"pipeline/{name}.py"
    for name in ("errors", "launch", "tracking", "cli", "registry/pins", "registry/package")
}
STAGES = ("prepare", "pretrain", "finetune", "refine", "evaluate")
CORE = sorted(
    str(path.relative_to(ROOT))
    for folder in ("models", "diffusion", "training")
    for path in (ROOT / "pipeline" / folder).glob("*.py")
    if path.stem not in ("__init__", "workers")
) + ["pipeline/data/dataset.py"]
HEAVY = (
    "ray",
    "mlflow",
    "great_expectations",
    "dvc",
    "pydantic",
    "PIL",
    "transformers",
    "pandas",
    "torchvision",
)


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files_of(module: str) -> Iterator[Path]:
    """Files that importing a module of ours runs, without the empty ones of packages."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            yield path.with_suffix(".py")
        elif (path / "__init__.py").is_file():
            body = ast.parse((path / "__init__.py").read_text()).body
            if any(not isinstance(node, ast.Expr) for node in body):
                yield path / "__init__.py"


def closure(start: Path) -> set[str]:
    """Our own modules that `start` needs, through those which are compared."""
    todo, seen = [start], set()
    while todo:
        path = todo.pop()
        name = path.relative_to(ROOT).as_posix()
        if name in seen or name in NOT_COMPARED:
            continue
        seen.add(name)
        todo += [file for module in imported(path) for file in files_of(module)]
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_are_its_import_closure(stage: str) -> None:
    entries = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"][stage]["deps"]
    named = {entry for entry in entries if entry.endswith(".py")}
    assert named == closure(ROOT / "stages" / f"{stage}.py")


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", ("pipeline/launch.py", "pipeline/serving/")),
        ("mlflow", ("pipeline/tracking.py", "pipeline/registry/")),
        ("great_expectations", ("pipeline/data/validation.py",)),
    ],
)
def test_a_platform_is_imported_in_its_own_place_only(library: str, allowed: tuple[str, ...]) -> None:
    for folder in ("pipeline", "stages"):
        for path in (ROOT / folder).rglob("*.py"):
            name = path.relative_to(ROOT).as_posix()
            users = {module.split(".")[0] for module in imported(path)}
            assert library not in users or name.startswith(allowed), name


def test_the_core_needs_torch_numpy_and_safetensors_alone() -> None:
    modules = [name.removesuffix(".py").replace("/", ".") for name in CORE]
    code = f"import sys\nfor m in {modules!r}: __import__(m)\nprint(*set({HEAVY!r}) & set(sys.modules))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert answer.stdout.strip() == ""


def test_importing_every_module_does_nothing_visible(tmp_path: Path) -> None:
    modules = [
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        for folder in ("pipeline", "stages")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.stem != "__init__" and "pyfunc" not in path.stem
    ]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfor m in {modules!r}: __import__(m)"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
