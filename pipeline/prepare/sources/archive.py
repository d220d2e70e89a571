"""Images in zip and tar archives, with captions in any layout that a folder may have.

An archive is never unpacked: members are read one by one, and those that an archive should not hold
(links, devices, names that lead out of it, bombs) are reported and left alone. A folder of archives is one source,
such as the shards of webdataset and img2dataset; the tables beside them are not read.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from pipeline.errors import InputMissing
from pipeline.prepare.framing import Framing
from pipeline.prepare.sources.archive_trees import open_archive
from pipeline.prepare.sources.files import File, Tree, missing
from pipeline.prepare.sources.folder import TreeSource
from pipeline.prepare.sources.places import Place, name_in, open_place

SHARDS = (".tar", ".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


def is_shard(name: str) -> bool:
    """Whether a file's name is that of an archive that is read."""
    return name.lower().endswith(SHARDS)


class _Shards:
    """The files in all archives of a folder, below the names of their archives."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._trees: dict[str, Tree] = {}
        self.ignored: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type[_Shards], tuple[Place]]:
        return type(self), (self._place,)

    def _tree(self, shard: str, path: Path) -> Tree:
        if shard not in self._trees:
            self._trees[shard] = open_archive(path, name_in(self._place, shard))
        return self._trees[shard]

    def files(self) -> list[File]:
        """See `Tree.files`."""
        found = self._place.files()
        shards = [file for file in found if is_shard(file.name)]
        flaw = next((file.flaw for file in shards if file.flaw is not None), None)
        if flaw is not None:
            raise flaw
        others = Counter(Path(file.name).suffix.lower() for file in found if not is_shard(file.name))
        files: list[File] = []
        for shard, path in self._place.paths([file.name for file in shards]):
            tree = self._tree(shard, path)
            files += [member._replace(name=f"{shard}/{member.name}") for member in tree.files()]
            others += tree.ignored
        if not shards:
            raise InputMissing(
                "E-INP-068", self._place.name, "holds no archives", "put .tar or .zip files there"
            )
        self.ignored = others + self._place.ignored
        return files

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`."""
        parts = name.split("/")
        for count in range(1, len(parts)):
            shard = "/".join(parts[:count])
            if is_shard(shard) and self._place.has(shard):
                tree = self._tree(shard, self._place.path(shard))
                return tree.read("/".join(parts[count:]), limit)
        raise missing(name_in(self._place, name))


class Archive(TreeSource):
    """The images in the archive `root / path`, or in all archives of that folder; either may be behind a URL."""

    def __init__(self, root: Path, path: str, framing: Framing, captions: str = "auto") -> None:
        """Raises InputMissing if there is no such file, BadData if it is not an archive."""
        place = open_place(root, path)
        if not place.single:
            super().__init__(_Shards(place), path, framing, captions, shards=True)
            return
        names = [file.name for file in place.files()]
        if not names:
            raise InputMissing("E-INP-063", path, "is not a file", "put a zip or tar archive there")
        super().__init__(open_archive(place.path(names[0]), path), path, framing, captions)
