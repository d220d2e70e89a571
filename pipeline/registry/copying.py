"""Copying a version to another store, such as from a staging server to the production server, and signing it.

Its files travel byte for byte, and are verified by digest before they are sent and after they were read back; its
signature goes along. Under the lock of the target, so that the same model becomes one version there, whoever sends
it. No alias moves.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError, one_line
from pipeline.registry import champions, registration, signing
from pipeline.registry.journal import Journal
from pipeline.registry.package import FROM_TAG, PACKAGE_TAG, Registry, Version
from pipeline.registry.packaging import package_digest
from pipeline.tracking import store

OWN_TAGS = ("crescendo.replaced", FROM_TAG)  # of a version in its own store


def copy(root: Path, address: str, to: str, log: Callable[[str], None] = print) -> Version:
    """Copy the version at `address` (models:/NAME/3, or an alias) to the store at the URI `to`; the version there,
    an older one where it already holds this model.

    Raises:
        ConfigError: `to` is no other store.
        InputMissing: there is no such version.
        StorageError: files are missing or damaged, here or there.
        Busy: another process took this one for dead.
    """
    here = store.tracking_uri(root)
    check_target(to, here)
    source = Registry(root)
    version = champions.resolve(source, address)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        package = source.verify(version, Path(scratch) / "source")
        kept = {key: value for key, value in version.tags.items() if key.startswith("crescendo.")}
        tags = {key: value for key, value in kept.items() if key not in OWN_TAGS}
        tags |= {PACKAGE_TAG: package_digest(package), FROM_TAG: f"{store.public_uri(here)} {version.uri}"}
        with store.other_store(to):
            return _receive(
                Registry(root), Version(version.name, version.number, tags), package, Path(scratch), log
            )


def sign_version(root: Path, address: str, private_key: Path, log: Callable[[str], None] = print) -> None:
    """Sign the version at `address`, once its files are verified; another signature is replaced."""
    registry = Registry(root)
    version = champions.resolve(registry, address)
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        folder = registry.verify(version, Path(scratch), signed=False)
        registry.set_tags(version, {signing.SIGNATURE_TAG: signing.sign(folder, private_key)})
    log(f"signed {version.uri}, snapshot {str(version.digest)[:12]}")


def check_target(to: str, here: str) -> None:
    """Raise ConfigError unless `to` is the address of a store, and not that of the store `here`."""
    shown = one_line(store.public_uri(to))
    if not re.match(r"https?://.|sqlite:///.|(postgresql|mysql|mssql)(\+\w+)?://.", to):
        fix = "write http://HOST:PORT or sqlite:////FOLDER/mlflow.db"
        raise ConfigError("E-CFG-093", "--to", f"{shown!r} is not the address of a store", fix)
    files = [store.database_of(uri) for uri in (to, here)]
    same_file = None not in files and len({file.resolve() for file in files if file}) == 1
    if same_file or to.rstrip("/") == here.rstrip("/"):
        raise ConfigError(
            "E-CFG-094", "--to", f"{shown} is the store that it would be copied from", "name another"
        )
    if files[0] is not None and not files[0].parent.is_dir():
        raise ConfigError(
            "E-CFG-095", "--to", f"there is no folder {files[0].parent}", "make it, or name another"
        )


def _receive(
    registry: Registry, version: Version, package: Path, scratch: Path, log: Callable[[str], None]
) -> Version:
    """Register the files and tags of `version` in another store."""
    name, digest, default = version.name, version.digest, version.default_passes
    assert digest is not None, "verified"
    with Journal(registry, name).turn("copy", log) as turn:
        found = registration.find(registry, name, digest, default, scratch / "outlines")
        if found is not None:
            signature = version.tags.get(signing.SIGNATURE_TAG)
            if signature and found.tags.get(PACKAGE_TAG) == version.tags[PACKAGE_TAG]:
                registry.set_tags(found, {signing.SIGNATURE_TAG: signature})
                found = registry.version(name, found.number)
            registry.verify(found, scratch / "found")
            log(f"{digest[:12]} already is {found.uri} there, and verifies")
            return found
        made = registration.register_copy(registry, turn, name, package, version.tags, scratch)
    log(f"copied version {version.number}, snapshot {digest[:12]}, to {made.uri} there; no alias was moved")
    return made
