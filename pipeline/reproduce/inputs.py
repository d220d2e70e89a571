"""What the stages of a version read and none of them makes: found by digest, and laid into the work tree.

Raw data are those of the work tree, or of the project's own folder where these have the digest, else of DVC's
cache or remote. Models and prepared data are found in the version, in the project, its runs, the registry, or
by DVC. What lies in the project is linked, and never written to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline import artifacts
from pipeline.errors import InputMissing, PipelineError
from pipeline.launch.fingerprint import digest_path, digest_url
from pipeline.launch.scratch import link
from pipeline.registry.package import Registry
from pipeline.reproduce.lock import Lock, Missing
from pipeline.reproduce.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """Where an input is taken from, in words. lay: puts it into the work tree. same: whether it has the
    digest."""

    path: str
    where: str
    lay: Callable[[], None]
    same: bool = True


class Inputs:
    """Finds inputs of a version for the work tree `tree` of the project at `root`. own: whether raw data of the
    project are used although they have another digest. scratch: a folder for what is fetched."""

    def __init__(
        self, root: Path, tree: Path, recipe: Recipe, registry: Registry, own: bool, scratch: Path
    ) -> None:
        self.root, self.tree, self.recipe, self.registry = root, tree, recipe, registry
        self.own, self.scratch = own, scratch
        self.lock = Lock(root, tree, recipe.files / "dvc.lock")

    def find(self, path: str, raw: bool) -> Source:
        """The source of an input. Raises InputMissing where it is nowhere.

        raw: no stage makes it."""
        digest = self.recipe.digest_of(path)
        if "://" in path:
            return self._far(path, digest)
        for source in self._candidates(path, digest):
            return source
        present = self.root / path
        if raw and self.own and present.exists():
            return Source(
                path, "the project, with other content", partial(self._link, path, present), same=False
            )
        if digest is None and raw and present.exists():
            where = "the project; the version does not say which content it had"
            return Source(path, where, partial(self._link, path, present))
        raise self._missing(path, digest, raw)

    def _candidates(self, path: str, digest: str | None) -> Iterator[Source]:
        for where, place in self._places(path, digest):
            known = place == self.tree / path if digest is None else _digest(place) == digest
            if known and place.exists():
                yield Source(path, where, partial(self._link, path, place))
        entry = self.lock.entry(path)
        if entry is not None and self.lock.may_have(entry):
            yield Source(path, self.lock.where(entry), partial(self._pull, path, digest))

    def _places(self, path: str, digest: str | None) -> Iterator[tuple[str, Path]]:
        yield "the work tree", self.tree / path
        if digest == self.recipe.digest:
            yield "the version", self.recipe.snapshot
        yield "the project", self.root / path
        if not path.startswith("models/"):
            return
        for manifest in sorted(self.root.glob(f"runs/*/*/result/*/{artifacts.MANIFEST}")):
            with contextlib.suppress(PipelineError):
                if artifacts.directory_digest(manifest.parent) == digest:
                    yield "a run of the project", manifest.parent
        name = self.recipe.uri.removeprefix("models:/").rpartition("/")[0]
        for version in self.registry.versions(name):
            if version.digest == digest:
                with contextlib.suppress(PipelineError):
                    yield version.uri, self.registry.fetch(version, self.scratch / version.number)

    def _link(self, path: str, place: Path) -> None:
        target = self.tree / path
        if place.resolve() != target.resolve():
            if target.exists() or target.is_symlink():
                artifacts.remove(target)
            link(target, place.resolve())

    def _pull(self, path: str, digest: str | None) -> None:
        try:
            self.lock.pull(path)
        except Missing as error:
            problem = f"is in neither the project nor DVC's cache or remote ({error})"
            raise InputMissing(
                "E-INP-165", path, problem, "run `dvc pull` where it is tracked, and `dvc push`"
            ) from None
        if digest is not None and (found := _digest(self.tree / path)) != digest:
            problem = f"dvc.lock of the version has content {str(found)[:12]}, its run read {digest[:12]}"
            raise InputMissing(
                "E-INP-166", path, problem, "put the content that the run read into the project"
            )

    def _far(self, path: str, digest: str | None) -> Source:
        same = digest is None or digest_url(path) == digest
        if not same and not self.own:
            problem = "what lies there has changed since the version was made"
            raise InputMissing(
                "E-INP-167", path, problem, "restore it, or use what is there with `--data here`"
            )
        return Source(path, "its address", lambda: None, same)

    def _missing(self, path: str, digest: str | None, raw: bool) -> InputMissing:
        present = self.root / path
        here = (
            f"{str(_digest(present))[:12]} in the project" if present.exists() else "missing in the project"
        )
        problem = (
            f"the version was made from {str(digest)[:12]}; it is {here}, and in no cache or remote of DVC"
        )
        fix = f"restore {path}"
        if not raw:
            fix += ", or run this without --only, which makes it"
        elif present.exists():
            fix += ", or use what the project has with `--data here`"
        return InputMissing("E-INP-168", path, problem, fix)


def _digest(place: Path) -> str | None:
    """Digest of what is at a place; None where there is nothing, or it is damaged."""
    try:
        return digest_path(place)
    except (PipelineError, OSError):
        return None
