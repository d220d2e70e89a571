"""A snapshot as an MLflow model: code (`served.py` and what that imports), requirements, config, model card, and a
manifest of all its files. It names no folder of the machine that made it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifacts
from pipeline.config.strict_yaml import parse_yaml
from pipeline.errors import PipelineError, StorageError

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.tracking import MlflowClient

    from pipeline.models.config import SnapshotConfig

CONFIG_KEY = "default_passes"  # in the model's own configuration; 0 is none (served.py)
PROJECT = "project"  # what the project says of itself, beside the snapshot (provenance.py)
CARD = "card"  # beside that folder, while the package is made (card.py)
ADDED = ("registered_model_meta",)  # by MLflow, to what it downloads
# In every folder of code a file of this name keeps Python from reading byte code there, or writing any: what is not
# written cannot be told from what was planted.
NO_CACHE = "__pycache__"
NO_CACHE_TEXT = "In place of a folder of byte code, so that Python neither reads nor writes any here.\n"
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
    """The default passes that a packaged model was given; None for 0, and for what `build` did not write."""
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
    """Digest of all files of a packaged model, links as such, but those that downloading it adds."""
    present = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return artifacts.digest(
        {
            name: f"link to {os.readlink(path)}" if path.is_symlink() else artifacts.sha256_file(path)
            for name, path in present.items()
            if name not in ADDED and (path.is_symlink() or path.is_file())
        }
    )


def changed_file(folder: Path) -> str | None:
    """The first file of a package that its manifest names, and that is gone or has other bytes, or that it does not
    name; None if there is none, or no manifest that can be read."""
    try:
        files = artifacts.read_manifest(folder)["files"]
    except StorageError:
        return None
    known = {*files, artifacts.MANIFEST, *ADDED}
    for name, each in files.items():
        if not (folder / name).is_file() or artifacts.sha256_file(folder / name) != each["sha256"]:
            return str(name)
    present = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file())
    names = (path.relative_to(folder).as_posix() for path in present)
    return next((f"{name}, which was added" for name in names if name not in known), None)


def defaults(config: SnapshotConfig, default_passes: int | None) -> dict[str, int | float]:
    """Params of a packaged model with the values that it has of its own. resolution 0: the finest level."""
    own = min(config.passes) if config.is_refined else config.sampling.num_steps
    return {
        "seed": 0,
        "steps": default_passes or own,
        "guidance": config.sampling.guidance,
        "width": config.resolution,
        "height": config.resolution,
        "n": 1,
        "resolution": 0,
    }


def signature_of(values: Mapping[str, int | float]) -> ModelSignature:
    """From a prompt to PNG files, with these params."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    kinds = {int: DataType.long, float: DataType.double}
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([ParamSpec(name, kinds[type(value)], value) for name, value in values.items()]),
    )


def build(
    folder: Path,
    snapshot: Path,
    project: Path,
    config: SnapshotConfig,
    default_passes: int | None,
    requirements: str,
) -> None:
    """Write the package to `folder`, with its manifest.

    project: a folder of facts (provenance.py). What is in the folder CARD beside that comes to the top."""
    import mlflow
    from mlflow.models import Model

    card, model = project.parent / CARD, Model()
    pinned = [line.removesuffix("\\").strip() for line in requirements.splitlines() if line[:1].strip()]
    with artifacts.commit_directory(folder, {"default_passes": default_passes}, forced=False) as path:
        with tempfile.TemporaryDirectory(dir=project.parent) as code, _quiet():
            mlflow.pyfunc.save_model(
                path=str(path),
                mlflow_model=model,
                python_model=str(SERVED),
                code_paths=[str(copy_code(Path(code)))],
                artifacts={"snapshot": str(snapshot.resolve()), PROJECT: str(project.resolve())},
                signature=signature_of(defaults(config, default_passes)),
                model_config={CONFIG_KEY: default_passes or 0},
                pip_requirements=pinned,
            )
        keep_byte_code_out(path)
        flavor: dict[str, Any] = model.flavors["python_function"]
        flavor["model_code_path"] = SERVED.name
        for each in flavor["artifacts"].values():
            each["uri"] = each["path"]
        model.save(str(path / "MLmodel"))
        (path / "requirements.txt").write_text(requirements, encoding="utf-8")
        if card.is_dir():
            shutil.copytree(card, path, dirs_exist_ok=True)


def keep_byte_code_out(package: Path) -> None:
    """Put a file NO_CACHE into every folder of code, in place of the byte code there."""
    for cache in list(package.rglob(NO_CACHE)):
        shutil.rmtree(cache)
    for folder in {path.parent for path in package.rglob("*.py")}:
        (folder / NO_CACHE).write_text(NO_CACHE_TEXT, encoding="utf-8")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's warning that it cannot infer a signature, which is given."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        yield


def upload(
    client: MlflowClient, experiment: str, run: str, folder: Path, tags: Mapping[str, str]
) -> tuple[str, str]:
    """Log a package as an output of `run`; its model id and the URI of its files. Raises MLflow's exceptions."""
    from mlflow.entities import LoggedModelOutput

    logged = client.create_logged_model(experiment, name="generator", source_run_id=run, tags=dict(tags))
    client.log_outputs(run_id=run, models=[LoggedModelOutput(logged.model_id, step=0)])
    client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, "READY")
    return logged.model_id, f"models:/{logged.model_id}"
