"""Whether the registry holds what was registered, and tidying up after promotions that were killed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import PipelineError, StorageError
from pipeline.registry.history import strays
from pipeline.registry.journal import Entry, Journal, changed_tag
from pipeline.registry.package import NAME_TAG, Registry, Version
from pipeline.tracking import relocation

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Log = Callable[[str], None]


def verify(root: Path, name: str, everything: bool = False, log: Log = print) -> None:
    """Check the files of the versions that aliases point to, or of all; a line for each.

    Raises StorageError, after all lines, if a version does not verify or an alias is not where the journal has
    it."""
    registry = Registry(root)
    entries, aliases = Journal(registry, name).entries(), registry.aliases(name)
    bad, versions = 0, registry.versions(name)
    chosen = [version for version in versions if everything or version.number in aliases.values()]
    for version in chosen:
        names = [alias for alias, number in sorted(aliases.items()) if number == version.number]
        problem = _problem(registry, version, entries)
        bad += problem is not None
        shown = f"version {version.number} ({', '.join(names)})" if names else f"version {version.number}"
        log(f"{shown}: {problem or f'verified, snapshot {str(version.digest)[:12]}'}")
    lines = strays(registry, name, entries)
    for line in lines:
        log(line)
    if bad or lines:
        problem = (
            f"{bad} of {len(chosen)} versions do not verify, {len(lines)} aliases are not as they were set"
        )
        raise StorageError("E-IO-047", f"models:/{name}", problem, "see the lines above")


def _problem(registry: Registry, version: Version, entries: Sequence[Entry]) -> str | None:
    """Why a version does not verify; None if it does."""
    changed = changed_tag(version, entries)
    if changed is not None:
        return changed
    try:
        with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
            registry.verify(version, Path(folder))
    except PipelineError as error:
        return str(error)
    return None


def fsck(root: Path, name: str, log: Log = print) -> None:
    """Complete or roll back what killed promotions left; a line for each.

    Their entries are settled by what they did (`Journal.turn`), models that no version refers to are removed with
    their files, and their runs are ended. Aliases that are gone are named."""
    registry = Registry(root)
    journal = Journal(registry, name)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        log(line)

    with journal.turn("fsck", say):
        client, experiment = registry.connection
        with registry.failing():
            for line in (*_sweep_models(client, experiment, name), *_end_runs(client, experiment, name)):
                say(line)
        for line in (*_duplicates(registry, name), *strays(registry, name, journal.entries())):
            say(line)
    if not said:
        log(f"{name}: nothing was left behind")


def _sweep_models(client: MlflowClient, experiment: str, name: str) -> Iterator[str]:
    """Remove logged models that were meant for `name`, and which no version refers to."""
    sources = {str(version.source) for version in client.search_model_versions(f"name = '{name}'")}
    condition = f"tags.`{NAME_TAG}` = '{name}'"
    for model in list(client.search_logged_models([experiment], filter_string=condition)):
        if f"models:/{model.model_id}" not in sources:
            _remove_files(str(model.artifact_location))
            client.delete_logged_model(model.model_id)
            yield f"removed model {model.model_id}, which was uploaded and not registered"


def _remove_files(location: str) -> None:
    """Remove a logged model's artifacts, also its folder where that is on this machine."""
    folder = relocation.folder_of(location)
    if folder is None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        get_artifact_repository(location).delete_artifacts()
        return
    folder = folder.parent if folder.name == "artifacts" else folder
    if folder.is_dir():
        shutil.rmtree(folder)


def _end_runs(client: MlflowClient, experiment: str, name: str) -> Iterator[str]:
    """End runs of promotions that still count as running."""
    condition = f"attributes.status = 'RUNNING' and tags.`{NAME_TAG}` = '{name}'"
    for run in client.search_runs([experiment], condition):
        client.set_terminated(run.info.run_id, "KILLED")
        yield f"ended run {run.info.run_id} of a promotion that was killed"


def _duplicates(registry: Registry, name: str) -> Iterator[str]:
    """Versions of equal snapshot and default, which promotions without a lock have made."""
    first: dict[tuple[str | None, int | None], str] = {}
    for version in registry.versions(name):
        number = first.setdefault((version.digest, version.default_passes), version.number)
        if number != version.number:
            yield f"version {version.number} is the same model as version {number}, which promotions use"
