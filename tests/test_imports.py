"""Who imports what: rows without circles, a light core, quiet imports, and deps that hold what a stage needs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from pipeline.config.strict_yaml import read_yaml

ROOT = Path(__file__).resolve().parents[1]
# Rows of the house: a package imports only from rows below its own.
ROWS = (
    ("stages", "cli"),
    ("overview",),
    ("housekeeping", "serving"),
    ("reproduce",),
    ("workers", "registry", "drill"),
    ("launch", "watch", "export"),
    ("inference", "evaluation"),
    ("adversarial",),
    ("training", "prepare"),
    ("diffusion", "data"),
    ("models", "text", "compute", "presets", "tracking"),
    ("config", "artifacts"),
    ("errors", "rng", "processes", "progress", "project"),
)
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}
NOT_COMPARED = (
    "launch", "tracking", "registry", "drill", "reproduce", "overview", "housekeeping", "cli", "compute", "presets",
    "processes", "progress", "project", "errors",
)  # fmt: skip
STAGES = ("prepare", "pretrain", "finetune", "refine", "evaluate")  # in order
CORE = sorted(
    str(path.relative_to(ROOT))
    for folder in ("models", "diffusion", "training", "adversarial", "data")
    for path in (ROOT / "pipeline" / folder).glob("*.py")
    if path.stem != "__init__"
)
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


def unit(path: str) -> str:
    """The package or module of the house that a file belongs to."""
    parts = Path(path).with_suffix("").parts
    return parts[1] if parts[0] == "pipeline" else parts[0]


def files_of(module: str) -> Iterator[str]:
    """Files that importing a module of ours runs, without the empty ones of packages."""
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            yield path.with_suffix(".py").relative_to(ROOT).as_posix()
        elif (path / "__init__.py").is_file() and not is_empty(path / "__init__.py"):
            yield (path / "__init__.py").relative_to(ROOT).as_posix()


def is_empty(path: Path) -> bool:
    """Whether a file holds nothing but words."""
    return all(isinstance(node, ast.Expr) for node in ast.parse(path.read_text()).body)


def graph() -> dict[str, set[str]]:
    """{file: files of ours that it imports}."""
    files = [
        path for folder in ("pipeline", "stages", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    return {
        path.relative_to(ROOT).as_posix(): {file for module in imported(path) for file in files_of(module)}
        for path in files
    }


GRAPH = graph()


def closure(start: str) -> set[str]:
    """Our own files that `start` needs, through those which are compared; without empty ones."""
    todo, seen = [start], set()
    while todo:
        name = todo.pop()
        if name not in seen and unit(name) not in NOT_COMPARED:
            seen.add(name)
            todo += GRAPH[name]
    return seen


def deps_of(stage: str, dvc_yaml: Path = ROOT / "dvc.yaml") -> list[str]:
    """Code that dvc.yaml names for a stage, relative to the root."""
    entries = read_yaml(dvc_yaml)["stages"][stage]["deps"]
    paths = [(dvc_yaml.parent / entry).resolve() for entry in entries if "$" not in entry]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return [name for name in names if name.startswith(("pipeline/", "stages/", "benchmarks/"))]


def files_below(names: list[str]) -> set[str]:
    """Python files that are named, or lie below named folders; without empty ones."""
    paths = [
        path
        for name in names
        for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    ]
    return {path.relative_to(ROOT).as_posix() for path in paths if not is_empty(path)}


@pytest.mark.parametrize("stage", STAGES)
def test_the_deps_of_a_stage_hold_what_it_imports_and_nothing_that_no_stage_so_far_does(stage: str) -> None:
    named, needed = files_below(deps_of(stage)), closure(f"stages/{stage}.py")
    assert needed <= named, "missing in dvc.yaml"
    before = [closure(f"stages/{name}.py") for name in STAGES[: STAGES.index(stage) + 1]]
    assert named <= set().union(*before), "not needed in dvc.yaml"


@pytest.mark.parametrize(
    ("changed", "fresh"),
    [
        ("pipeline/adversarial/losses.py", {"prepare", "pretrain", "finetune"}),
        ("pipeline/adversarial/few_step.py", {"prepare", "pretrain", "finetune"}),
        ("pipeline/evaluation/gate.py", {"prepare", "pretrain", "finetune", "refine"}),
        ("pipeline/compute.py", set(STAGES)),
        ("pipeline/watch/judge.py", set(STAGES)),
        ("pipeline/presets.py", set(STAGES)),
        ("pipeline/launch/jobs.py", set(STAGES)),
        ("pipeline/prepare/decoder.py", set(STAGES) - {"prepare"}),
        ("pipeline/workers/finetune.py", set(STAGES) - {"finetune"}),
        ("pipeline/diffusion/loss.py", {"prepare"}),
    ],
)
def test_a_changed_file_leaves_stages_fresh(changed: str, fresh: set[str]) -> None:
    """By its own deps; what a changed stage makes anew is another matter."""
    assert {stage for stage in STAGES if changed not in files_below(deps_of(stage))} == fresh


def params_of(stage: str) -> list[str]:
    """Keys of params.yaml that dvc.yaml names for a stage; a key stands for all below it."""
    return list(read_yaml(ROOT / "dvc.yaml")["stages"][stage]["params"])


@pytest.mark.parametrize(
    ("changed", "fresh"),
    [
        ("sampling.num_steps", set(STAGES) - {"finetune"}),
        ("sampling.guidance", set(STAGES) - {"finetune"}),
        ("refine.anchor", set(STAGES) - {"refine"}),
        ("evaluate.batch_size", set(STAGES) - {"evaluate"}),
        ("evaluate.watch_images.pretrain", set(STAGES) - {"evaluate"}),
        ("finetune.lr", set(STAGES) - {"finetune"}),
        ("core.channels", {"prepare", "finetune", "refine", "evaluate"}),
        ("seed", set()),
    ],
)
def test_a_changed_parameter_leaves_stages_fresh(changed: str, fresh: set[str]) -> None:
    """As above: what follows from a stage that runs again is another matter."""
    assert {s for s in STAGES if not any(f"{changed}.".startswith(f"{k}.") for k in params_of(s))} == fresh


def test_a_package_imports_only_from_rows_below_its_own() -> None:
    wrong = [
        f"{file} imports {other}"
        for file, others in GRAPH.items()
        if not file.startswith("benchmarks/")
        for other in others
        if "pipeline/__init__.py" not in (file, other) and unit(file) != unit(other)
        if ROW_OF[unit(other)] <= ROW_OF[unit(file)]
    ]
    assert wrong == []


def test_no_files_import_each_other_in_a_circle() -> None:
    order = TopologicalSorter(GRAPH)
    order.prepare()  # raises CycleError, which names them


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("ray", ("pipeline/launch/", "pipeline/serving/replicas.py")),
        ("mlflow", ("pipeline/tracking/", "pipeline/registry/")),
        ("great_expectations", ("pipeline/prepare/validation.py",)),
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


@pytest.mark.parametrize(
    "modules",
    [
        *(
            f"stages.{stage}, pipeline.launch.execution, pipeline.launch.backend"
            for stage in ("pretrain", "finetune", "refine")
        ),
        "pipeline.registry.champions, pipeline.registry.trace, pipeline.registry.repair",
    ],
)
def test_drivers_rays_controller_and_commands_that_only_read_the_registry_need_no_torch(modules: str) -> None:
    code = f"import sys, {modules}\nprint(*{{'torch', 'mlflow'}} & set(sys.modules))"
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
