"""Sources on an object store: S3 as the package moto serves it, in this process."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.params import Data
from pipeline.errors import AccessError, Busy, InputMissing, PipelineError
from pipeline.prepare.framing import Framing
from pipeline.prepare.sources import places
from pipeline.prepare.sources.archive import Archive
from pipeline.prepare.sources.folder import Folder
from pipeline.prepare.sources.load import data_of
from pipeline.prepare.sources.parquet import Parquet
from pipeline.prepare.sources.source import Source

FRAMING = Framing(16, "crop", (255, 255, 255))
MAKE = {"folder": Folder, "archive": Archive, "parquet": Parquet}


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return buffer.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def table(seeds: range) -> bytes:
    """As the Hugging Face hub converts a data set of images."""
    buffer = io.BytesIO()
    images = [{"bytes": png(seed), "path": f"{seed}.png"} for seed in seeds]
    pq.write_table(pa.table({"image": images, "text": [f"a {seed}" for seed in seeds]}), buffer)
    return buffer.getvalue()


OBJECTS = {
    "photos/a/1.png": png(1),
    "photos/a/1.txt": b"one",
    "photos/b/2.png": png(2),
    "shards/00000.tar": tar({"1.png": png(1), "1.txt": b"one"}),
    "shards/00001.tar": tar({"2.png": png(2), "2.txt": b"two"}),
    "shards/00001.parquet": b"the downloader's own table",
    "one.zip": zipped({"1.png": png(1), "2.png": png(2)}),
    "hub/default/train/0000.parquet": table(range(1, 2)),
    "hub/default/test/0000.parquet": table(range(2, 3)),
}


@pytest.fixture(scope="module")
def bucket(s3: str) -> str:
    """URL of a bucket with OBJECTS."""
    import s3fs

    files = s3fs.S3FileSystem()
    for name, content in OBJECTS.items():
        files.pipe_file(f"{s3}/{name}", content)
    return s3


def open_far(root: Path, url: str) -> Source:
    """As `crescendo data check URL` does."""
    data = data_of(Data.model_construct(source="folder", path="x", captions="auto"), url, root)
    source: Source = MAKE[data.source](root, data.path, FRAMING)
    return source


def read_all(source: Source) -> list[bytes]:
    return [source.read(item) for item in source.listing().items]


def copies(root: Path) -> dict[str, int]:
    """Copies on the disk, with the number of their file."""
    folder = root / places.COPIES
    return {path.name: path.stat().st_ino for path in folder.glob("*") if not path.suffix}


@pytest.mark.parametrize(
    ("place", "captions", "count"),
    [
        ("photos", ("one", "b"), 0),
        ("shards", ("one", "two"), 2),
        ("one.zip", (None, None), 1),
        ("hub", ("a 2", "a 1"), 2),
        ("hub/default/train/0000.parquet", ("a 1",), 1),
    ],
)
def test_every_kind_of_source_is_read_from_an_object_store(
    tmp_path: Path, bucket: str, place: str, captions: tuple[str | None, ...], count: int
) -> None:
    source = open_far(tmp_path, f"{bucket}/{place}")
    items = source.listing().items
    assert tuple(next(iter(item.captions), None) for item in items) == captions
    assert all(item.where.startswith(f"{bucket}/{place}") for item in items)
    seeds = {"one": 1, "two": 2, "b": 2, "a 1": 1, "a 2": 2}
    expected = [png(seeds[text] if text else number) for number, text in enumerate(captions, 1)]
    assert read_all(source) == expected
    kept = copies(tmp_path)
    assert len(kept) == count
    assert read_all(open_far(tmp_path, f"{bucket}/{place}")) == expected
    assert copies(tmp_path) == kept, "nothing is fetched twice"


def test_another_process_reads_a_source_that_was_listed_here(tmp_path: Path, bucket: str) -> None:
    source = Archive(tmp_path, f"{bucket}/shards", FRAMING)
    sent = pickle.dumps(source)  # before it is listed
    items = source.listing().items
    for name in copies(tmp_path):
        (tmp_path / places.COPIES / name).unlink()
    with get_context("spawn").Pool(1) as pool:
        assert pool.map(pickle.loads(sent).read, items) == [png(1), png(2)]


def test_a_file_that_changed_is_fetched_again_and_one_that_went_is_missing(
    tmp_path: Path, bucket: str
) -> None:
    import s3fs

    files, url = s3fs.S3FileSystem(), f"{bucket}/changing"
    files.pipe_file(f"{url}/a.tar", tar({"1.png": png(1)}))
    assert read_all(open_far(tmp_path, url)) == [png(1)]
    files.pipe_file(f"{url}/a.tar", tar({"1.png": png(2)}))
    assert read_all(open_far(tmp_path, url)) == [png(2)]
    files.rm(url, recursive=True)
    with pytest.raises(InputMissing, match=r"E-INP-068 s3://pictures/changing: holds no archives"):
        Archive(tmp_path, url, FRAMING).listing()
    with pytest.raises(InputMissing, match=r"E-INP-063 s3://pictures/changing/a.zip: is not a file"):
        Archive(tmp_path, f"{url}/a.zip", FRAMING)


def test_a_store_that_is_away_leaves_no_half_copy(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    async def cut(self: object, source: str, target: str, **more: object) -> None:
        Path(target).write_bytes(OBJECTS["one.zip"][:100])

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", cut)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(Busy, match=r"E-BUSY-062 s3://pictures/one.zip: cannot be fetched \(100 of "):
        Archive(tmp_path, f"{bucket}/one.zip", FRAMING)
    assert copies(tmp_path) == {}
    monkeypatch.undo()
    s3fs.S3FileSystem.clear_instance_cache()
    assert len(Archive(tmp_path, f"{bucket}/one.zip", FRAMING).listing().items) == 2


@pytest.mark.parametrize(
    ("url", "changes", "kind", "words"),
    [
        ("s3://nowhere/photos", {}, InputMissing, "E-INP-062 s3://nowhere/photos: cannot be listed (The"),
        ("s3://No_Bucket*", {}, InputMissing, "E-INP-062"),
        (
            "s3://pictures",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            Busy,
            "E-BUSY-062 s3://pictures: cannot be",
        ),
        (
            "s3://pictures",
            {"AWS_ACCESS_KEY_ID": ""},
            AccessError,
            "E-ACC-060 s3://pictures: cannot be listed",
        ),
        ("http://127.0.0.1:9/photos", {}, Busy, "E-BUSY-062"),
        ("http://127.0.0.1:9/one.zip", {}, Busy, "E-BUSY-062"),
    ],
)
def test_a_store_that_cannot_be_listed_is_missing_away_or_refuses(
    bucket: str,
    url: str,
    changes: dict[str, str],
    kind: type[PipelineError],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import s3fs

    quick = {"AWS_MAX_ATTEMPTS": "1", "AWS_EC2_METADATA_DISABLED": "true"}
    for name, value in (quick | changes).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(kind, match=re.escape(words)):
        places.open_place(Path(), url).files()
    s3fs.S3FileSystem.clear_instance_cache()
