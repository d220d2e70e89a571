"""Images in one zip or tar archive, with captions in any layout that a folder may have.

The archive is never unpacked: members are read one by one, and those that an archive should not hold
(links, devices, names that lead out of it, bombs) are reported and left alone.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.prepare.framing import Framing
from pipeline.prepare.sources.archive_trees import open_archive
from pipeline.prepare.sources.folder import TreeSource


class Archive(TreeSource):
    """The images in the archive `root / path`."""

    def __init__(self, root: Path, path: str, framing: Framing, captions: str = "auto") -> None:
        """Raises InputMissing if there is no such file, BadData if it is not an archive."""
        super().__init__(open_archive(root / path, path), path, framing, captions)
