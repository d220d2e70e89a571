"""dvc.lock of a version: what it names can be taken from DVC's cache or remote, and it tells where code has
changed."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.config.strict_yaml import read_yaml
from pipeline.errors import reason
from pipeline.launch.fingerprint import is_code


class Missing(Exception):
    """DVC cannot bring a file; the reason, in a line."""


class Lock:
    """The lock file `path`, for the work tree `tree` of the project at `root`, whose cache and remotes are
    used."""

    def __init__(self, root: Path, tree: Path, path: Path) -> None:
        self.root, self.tree = root, tree
        self._stages: dict[str, Any] = (read_yaml(path).get("stages") or {}) if path.is_file() else {}
        self._config = _config_of(root)

    def entry(self, path: str) -> Mapping[str, Any] | None:
        """What the lock has of a path: md5, size, and nfiles of a folder."""
        for stage in self._stages.values():
            for entry in [*stage.get("deps", ()), *stage.get("outs", ())]:
                if entry["path"] == path and "md5" in entry:
                    return dict(entry)
        return None

    def cached(self, entry: Mapping[str, Any]) -> bool:
        """Whether DVC's cache has an entry; of a folder, its list."""
        cache, md5 = self._config.get("cache", {}).get("dir"), entry["md5"]
        return cache is not None and Path(cache, "files/md5", md5[:2], md5[2:]).exists()

    def may_have(self, entry: Mapping[str, Any]) -> bool:
        """Whether the cache has an entry, or there is a remote that may."""
        return self.cached(entry) or bool(self._config.get("remote"))

    def where(self, entry: Mapping[str, Any]) -> str:
        """Of an entry, in words."""
        return "DVC's cache" if self.cached(entry) else "DVC's remote, if it has it"

    def pull(self, path: str) -> None:
        """Bring a path into the work tree. Raises Missing."""
        entry, target = self.entry(path), path
        assert entry is not None, "there is an entry"
        with self._opened() as repo:
            made = {out["path"] for stage in self._stages.values() for out in stage.get("outs", ())}
            if path not in made:
                target = self._track(path, entry)
            try:
                repo.pull(targets=[str(self.tree / target)], force=True)
            except Exception as error:  # DVC's, or that of any store
                raise Missing(reason(error)) from error
        if not (self.tree / path).exists():
            raise Missing("DVC brought nothing")

    def _track(self, path: str, entry: Mapping[str, Any]) -> str:
        """Write the .dvc file of a dependency, as `dvc add` would."""
        known = {key: entry[key] for key in ("md5", "size", "nfiles") if key in entry}
        place = self.tree / f"{path}.dvc"
        place.parent.mkdir(parents=True, exist_ok=True)
        YAML(typ="safe").dump({"outs": [{**known, "hash": "md5", "path": Path(path).name}]}, place)
        return f"{path}.dvc"

    def changes(self, stages: Sequence[str]) -> dict[str, list[str]]:
        """{stage: code and parameters in the work tree that are not those of the lock}: the stored files do not
        describe how it was run."""
        found: dict[str, list[str]] = {}
        if not self._stages or not self._config:
            return found
        with self._opened() as repo, repo.lock:
            for stage in repo.index.stages:
                name = str(getattr(stage, "name", ""))  # of those of dvc.yaml
                if name in stages:
                    changed = [path for entries in stage.status().values() for path in _changed(entries)]
                    found |= {name: changed} if changed else {}
        return found

    def lay(self) -> None:
        """Let the work tree use the project's cache, also for links that lead there."""
        if self._config:
            local = self.tree / ".dvc/config.local"
            local.parent.mkdir(exist_ok=True)
            local.write_text(f"[cache]\n    dir = {self._config['cache']['dir']}\n", encoding="utf-8")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)
        with Repo(str(self.tree), config=self._config) as repo:
            yield repo


def _changed(entries: Sequence[Any]) -> Iterator[str]:
    """Code and parameters among what `dvc status` finds of a stage."""
    for entry in entries:
        changed = entry.get("changed deps", {}) if isinstance(entry, Mapping) else {}
        for path, how in changed.items():
            if path == "params.yaml" and isinstance(how, Mapping):
                yield from how
            elif is_code(path):
                yield path


def _config_of(root: Path) -> dict[str, Any]:
    """Cache and remotes of the project, with absolute paths; nothing where it is no DVC repository."""
    if not (root / ".dvc").is_dir() or shutil.which("git") is None:
        return {}
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            remotes = {name: _plain(remote) for name, remote in repo.config["remote"].items()}
            default = repo.config["core"].get("remote")
            core = {"remote": default} if default else {}
            return {"cache": {"dir": repo.cache.local_cache_dir}, "remote": remotes, "core": core}
    except DvcException:
        return {}


def _plain(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, str) else value for name, value in section.items()}
