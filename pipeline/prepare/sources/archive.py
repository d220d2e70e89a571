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
from pipeline.prepare.sources.files import File, Tree, missing, printable
from pipeline.prepare.sources.folder import TreeSource
from pipeline.prepare.sources.local import LocalTree

SHARDS = (".tar", ".zip", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")


def is_shard(name: str) -> bool:
    """Whether a file's name is that of an archive that is read."""
    return name.lower().endswith(SHARDS)


class _Shards:
    """The files in all archives of a folder, below the names of their archives."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._trees: dict[str, Tree] = {}
        self.ignored: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type[_Shards], tuple[Path, str]]:
        return type(self), (self._folder, self._name)

    def _tree(self, shard: str) -> Tree:
        if shard not in self._trees:
            self._trees[shard] = open_archive(self._folder / shard, f"{self._name}/{printable(shard)}")
        return self._trees[shard]

    def files(self) -> list[File]:
        """See `Tree.files`."""
        here = LocalTree(self._folder, self._name)
        files: list[File] = []
        others: Counter[str] = Counter()
        for file in here.files():
            if not is_shard(file.name):
                others[Path(file.name).suffix.lower()] += 1
            elif file.flaw is not None:
                raise file.flaw
            else:
                tree = self._tree(file.name)
                files += [member._replace(name=f"{file.name}/{member.name}") for member in tree.files()]
                others += tree.ignored
        self.ignored = others + here.ignored
        return files

    def read(self, name: str, limit: int) -> bytes:
        """See `Tree.read`."""
        parts = name.split("/")
        for count in range(1, len(parts)):
            shard = "/".join(parts[:count])
            if is_shard(shard) and (self._folder / shard).is_file():
                return self._tree(shard).read("/".join(parts[count:]), limit)
        raise missing(f"{self._name}/{printable(name)}")


class Archive(TreeSource):
    """The images in the archive `root / path`, or in all archives of that folder."""

    def __init__(self, root: Path, path: str, framing: Framing, captions: str = "auto") -> None:
        """Raises InputMissing if there is no such file, BadData if it is not an archive."""
        place = root / path
        if not place.is_dir():
            super().__init__(open_archive(place, path), path, framing, captions)
            return
        if not any(is_shard(file.name) for file in place.rglob("*")):
            raise InputMissing("E-INP-068", path, "holds no archives", "put .tar or .zip files there")
        super().__init__(_Shards(place, path.rstrip("/")), path, framing, captions, shards=True)
