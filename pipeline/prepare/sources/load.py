"""The source that `data.source` names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.params import SOURCES, Data
from pipeline.errors import ConfigError
from pipeline.prepare.framing import Framing, Size
from pipeline.prepare.limits import Limits
from pipeline.prepare.sources.source import Source


def open_source(data: Data, root: Path, sizes: tuple[Size, ...] = ()) -> Source:
    """The source that the `data` section names; paths are relative to `root`. `sizes` are those of buckets."""
    limits = Limits(data.max_bytes, data.max_pixels)
    framing = Framing(data.resolution, data.fit, data.background, sizes, limits)
    kind, _, name = data.source.partition(":")
    if kind == "folder":
        from pipeline.prepare.sources.folder import Folder

        return Folder(root, data.path, framing, data.captions, data.link_roots)
    if kind == "archive":
        from pipeline.prepare.sources.archive import Archive

        return Archive(root, data.path, framing, data.captions)
    if kind == "parquet":
        from pipeline.prepare.sources.parquet import Parquet

        return Parquet(root, data.path, framing)
    if kind == "torchvision":
        from pipeline.prepare.sources.torchvision import Torchvision

        return Torchvision(root, data.path, name, framing)
    from pipeline.prepare.sources.openmoji import OpenMoji

    return OpenMoji(data.source.partition("==")[2], framing)


def _kind_of_folder(names: Sequence[str]) -> str:
    """A folder of archives alone, or of Parquet files with images, is a source of its own kind."""
    from pipeline.prepare.sources.archive import is_shard
    from pipeline.prepare.sources.folder import is_document

    if not all(is_document(name) for name in names):
        return "folder"
    if any(is_shard(name) for name in names):
        return "archive"
    return "parquet" if any(name.endswith(".parquet") for name in names) else "folder"


def data_of(data: Data, source: str, root: Path) -> Data:
    """`data` with another source: one as params.yaml names it, or the path of a folder or file.

    Raises ConfigError where it is neither.
    """
    path = root / source
    if re.fullmatch(SOURCES, source) and not path.exists():
        return data.model_copy(update={"source": source, "subset": ()})
    if "://" in source:
        from pipeline.prepare.sources.places import open_place

        kind = _kind_of_folder([file.name for file in open_place(root, source).files()])
    elif path.is_dir():
        kind = _kind_of_folder([file.name for file in path.iterdir() if not file.name.startswith(".")])
    elif path.is_file():
        kind = "parquet" if path.suffix == ".parquet" else "archive"
    else:
        fix = "give a folder, an archive, a Parquet file, torchvision:NAME or openmoji==VERSION"
        raise ConfigError("E-CFG-016", "SOURCE", f"{source!r} is neither there nor a known source", fix)
    return data.model_copy(update={"source": kind, "path": source, "subset": ()})
