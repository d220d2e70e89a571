"""Registering a snapshot: uploaded, read back and verified, and only then a version.

Under the lock (journal.py), so that a snapshot with its default number of passes becomes one version, whoever
registers it from wherever. What a crash leaves before there is a version is a logged model that no version refers
to, which `fsck` removes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from pipeline import artifacts
from pipeline.errors import StorageError
from pipeline.models.snapshot import read_config
from pipeline.registry.journal import Journal, Turn
from pipeline.registry.package import (
    DEFAULT_TAG,
    DIGEST_TAG,
    IDENTITY,
    NAME_TAG,
    PACKAGE_TAG,
    Registry,
    Version,
)
from pipeline.registry.packaging import (
    ADDED,
    PROJECT,
    build,
    find_snapshot,
    package_digest,
    packaged_default,
    upload,
)
from pipeline.registry.requirements import requirements
from pipeline.tracking import runs


def find(registry: Registry, name: str, digest: str, default: int | None, scratch: Path) -> Version | None:
    """The oldest version with this snapshot and this default, by its files where its tags are not those of its
    registration: a changed tag hides no version."""
    registered = {
        entry.registered["version"]: {key: entry.registered.get(key) for key in IDENTITY}
        for entry in Journal(registry, name).entries()
        if entry.registered
    }
    for version in registry.versions(name):
        tags = {key: version.tags.get(key) for key in IDENTITY}
        trusted = registered.get(version.number) == tags
        known = (version.digest, version.default_passes) if trusted else identity(registry, version, scratch)
        if known == (digest, default):
            return version
    return None


def identity(registry: Registry, version: Version, scratch: Path) -> tuple[str | None, int | None]:
    """Digest and default passes by the version's own files, whatever its tags say; by these, where it has none."""
    folder = registry.folder_of(version) or _outline(registry, version, scratch / version.number)
    snapshot = find_snapshot(folder)
    if snapshot is None or not (snapshot / artifacts.MANIFEST).is_file():
        return version.digest, version.default_passes
    return artifacts.directory_digest(snapshot), packaged_default(folder / "MLmodel")


def _outline(registry: Registry, version: Version, folder: Path) -> Path:
    """Download the configuration of a version and the manifest of its snapshot, without weights."""
    names = [name for name in registry.list_names(f"{version.uri}/artifacts") if name != PROJECT]
    for name in ("MLmodel", *(f"artifacts/{name}/{artifacts.MANIFEST}" for name in names)):
        registry.download(f"{version.uri}/{name}", (folder / name).parent)
    return folder


def restore_tags(
    registry: Registry, version: Version, digest: str, default: int | None, log: Callable[[str], None]
) -> Version:
    """The version, whose tags `digest` and `default` are set again if they were changed."""
    if (version.digest, version.default_passes) == (digest, default):
        return version
    log(
        f"version {version.number}: its tags said snapshot {str(version.digest)[:12]} with default passes "
        f"{version.default_passes}; its files are {digest[:12]} with {default}, which they say again"
    )
    tags = {DIGEST_TAG: digest, DEFAULT_TAG: "" if default is None else str(default)}
    registry.set_tags(version, tags)
    return replace(version, tags={**version.tags, **tags})


def register(
    registry: Registry,
    turn: Turn,
    name: str,
    snapshot: Path,
    project: Path,
    tags: Mapping[str, str],
    default: int | None,
) -> Version:
    """Package `snapshot` with the folder `project` (provenance.py), beside which it writes, and the model card that
    lies there, and register it as a new version with these tags.

    Raises StorageError if what was uploaded is not what was packaged."""
    digest = artifacts.directory_digest(snapshot)
    tags = {**tags, DIGEST_TAG: digest, **({} if default is None else {DEFAULT_TAG: str(default)})}
    config, package = read_config(snapshot / "config.json"), project.parent / "package"
    encoder = str(config.text_encoder["name"])
    build(package, snapshot, project, config, default, requirements(registry.root, encoder))
    client, experiment = registry.connection
    with registry.failing():
        pipeline = runs.this_pipeline(registry.root)
        run, _ = runs.child_run(client, experiment, pipeline, "promote", "promote", digest)
        client.set_tag(run, NAME_TAG, name)
        model_id, uri = upload(client, experiment, run, package, {**tags, NAME_TAG: name})
        client.set_terminated(run)
    uploaded = registry.download(uri, project.parent / "uploaded")
    copy = find_snapshot(uploaded)
    if copy is None or artifacts.verify_directory(copy)["digest"] != digest:
        problem = f"does not hold snapshot {digest[:12]} after its upload"
        raise StorageError("E-IO-046", uri, problem, "check the artifact store, then run it again")
    tags = {**tags, PACKAGE_TAG: package_digest(uploaded)}
    return _number(registry, turn, Uploaded(name, run, model_id, uri), tags)


def register_copy(
    registry: Registry, turn: Turn, name: str, package: Path, tags: Mapping[str, str], scratch: Path
) -> Version:
    """Upload `package`, all files of a version of another store, as they are, and register them as a new version
    with its tags, which hold the digest of the package.

    Raises StorageError if what was uploaded is not that."""
    clean = scratch / "clean"
    shutil.copytree(package, clean, ignore=shutil.ignore_patterns(*ADDED))
    client, experiment = registry.connection
    with registry.failing():
        key = {"crescendo.kind": "copy", "crescendo.run": tags[PACKAGE_TAG], NAME_TAG: name}
        run = runs.find_or_create_run(client, experiment, key, "copy")
        uploaded = Uploaded(name, run, *upload(client, experiment, run, clean, {NAME_TAG: name}))
        client.set_terminated(run)
    digest = package_digest(registry.download(uploaded.uri, scratch / "uploaded"))
    if digest != tags[PACKAGE_TAG]:
        problem = f"holds files {digest[:12]} after their upload, not {tags[PACKAGE_TAG][:12]}"
        raise StorageError("E-IO-090", uploaded.uri, problem, "check the artifact store, then run it again")
    return _number(registry, turn, uploaded, tags)


class Uploaded(NamedTuple):
    """Files in a store that are to become a version of the model `name`."""

    name: str
    run: str
    model_id: str
    uri: str


def _number(registry: Registry, turn: Turn, uploaded: Uploaded, tags: Mapping[str, str]) -> Version:
    """Make uploaded and verified files a version, which can be seen from now on."""
    name, run, model_id, uri = uploaded
    registry.create_model(name, "Text to image, made by crescendo")
    turn.check()
    with registry.failing():
        version = registry.connection[0].create_model_version(
            name, uri, run, tags=dict(tags), model_id=model_id
        )
    registered = Version(name, str(version.version), tags, int(version.creation_timestamp))
    turn.note_registered(registered)
    return registered
