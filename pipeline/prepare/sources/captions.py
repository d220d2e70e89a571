"""Which captions the images in a tree of files have, and where each is from.

The first that exists counts, or the one that `data.captions` names:
    metadata: a row of a table in its folder or the nearest above (metadata.py);
    sidecar: a file of the same name beside it (sidecars.py);
    folder: the name of the sub-folder it lies in, without kohya's number of repeats (`10_red cat`);
    filename: its own name, only if asked for.
What looks like captions and is not read is noted.
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence

from pipeline.errors import BadData
from pipeline.prepare.photos import suffix_of
from pipeline.prepare.sources.files import File, Tree, listed, printable
from pipeline.prepare.sources.metadata import Described, clean_captions, is_metadata
from pipeline.prepare.sources.sidecars import Sidecars, owners

Sourced = tuple[tuple[str, ...], str]  # captions, and their origin in words
NO_ORIGIN, FOLDER_NAMES = "none", "folder names"
UNREAD = {
    ".cls", ".tag", ".tags", ".prompt", ".text", ".xml", ".yaml", ".yml", ".rtf", ".md", ".doc", ".docx", ".odt",
    ".xls", ".xlsx", ".ods",
}  # fmt: skip
_REPEATS = re.compile(r"\d+_(?=.)")


class Captions:
    """The captions of the images in a tree."""

    def __init__(
        self, tree: Tree, where: str, images: Sequence[str], documents: Sequence[File], rule: str
    ) -> None:
        """`where` is the tree's name, `rule` is `data.captions`.

        Raises BadData: E-CAP-004 and 007 to 009 for metadata of no use, E-CAP-011 where the rule finds none.
        """
        self._where, self._rule, self._images = where, rule, images
        sidecars = Sidecars(tree, where, images, documents)
        self._spare = [file for file in documents if file.name not in sidecars.names]
        self._beside = sidecars.names
        self._sidecars = sidecars if rule in {"auto", "sidecar"} else None
        self._described = (
            Described(tree, where, images, self._spare) if rule in {"auto", "metadata"} else None
        )
        missing = self._described is not None and not self._described.texts
        if (rule == "metadata" and missing) or (rule == "sidecar" and not sidecars.names):
            problem, fix = f"no image has captions by data.captions: {rule}", "add them, or write auto"
            raise BadData("E-CAP-011", where, problem, fix)

    def of(self, name: str, groups: Sequence[str]) -> Sourced:
        """Captions of an image in the sub-folders `groups`. Raises BadData where they are bad."""
        where = f"{self._where}/{printable(name)}"
        if self._described is not None and name in self._described.texts:
            texts, origin = self._described.texts[name]
            return clean_captions(texts, where), origin
        if self._sidecars is not None and (found := self._sidecars.of(name)) is not None:
            return found
        if self._rule == "filename":
            stem = posixpath.splitext(posixpath.basename(name))[0]
            return clean_captions([_words(printable(stem))], where), "file names"
        if self._rule in {"auto", "folder"} and groups:
            return clean_captions([_words(_REPEATS.sub("", groups[-1], count=1))], where), FOLDER_NAMES
        return (), NO_ORIGIN

    @property
    def used(self) -> set[str]:
        """Names of the files that captions are from, or would be."""
        return self._beside | (self._described.names if self._described else set())

    def notes(self) -> list[BadData]:
        """On what is not used, after all captions were asked for."""
        notes = list(self._described.notes) if self._described else []
        if self._sidecars is not None:
            notes += self._orphans()
        if self._described and self._sidecars:
            notes += self._overruled(self._described, self._sidecars)
        return notes + (self._unread() if self._rule == "auto" else [])

    def _at(self, name: str) -> str:
        return f"{self._where}/{printable(name)}"

    def _orphans(self) -> list[BadData]:
        """Text files that have no image beside them."""
        used = self._described.names if self._described else set()
        problem, fix = "has no image of its name beside it", "rename it, or remove it"
        return [
            BadData("E-CAP-005", self._at(file.name), problem, fix)
            for file in self._spare
            if suffix_of(file.name) in {".txt", ".caption"} and file.name not in used
        ]

    def _overruled(self, described: Described, sidecars: Sidecars) -> list[BadData]:
        """Text files of images that metadata describe."""
        images = sorted(name for name in described.texts if sidecars.has(name))
        if not images:
            return []
        names = listed(list(map(printable, images)), 3)
        problem = (
            f"{len(images)} images have a caption file, which is not used, and a row of metadata: {names}"
        )
        fix = "remove one of the two, or choose by data.captions: sidecar or metadata"
        return [BadData("E-CAP-010", self._where, problem, fix)]

    def _unread(self) -> list[BadData]:
        """Files that look like captions, but are of a kind that is not read."""
        beside = owners(self._images, self._spare)
        kinds: dict[str, list[str]] = defaultdict(list)
        for file in self._spare:
            if suffix_of(file.name) in UNREAD and (file.name in beside or is_metadata(file.name)):
                kinds[f"{suffix_of(file.name)} files"].append(printable(file.name))
        if self._sidecars is not None and self._sidecars.unread:
            kinds[".json files without a caption"] = sorted(map(printable, self._sidecars.unread))
        fix = "if they hold captions, save them as .txt beside the images, or as metadata.csv"
        return [
            BadData("E-CAP-006", self._where, f"{len(names)} {kind} are not read: {listed(names, 3)}", fix)
            for kind, names in kinds.items()
        ]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("-", " ")
