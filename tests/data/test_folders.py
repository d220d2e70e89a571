"""Prepared data on an object store: the batches of local data, through a cache smaller than the set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import artifacts
from pipeline.data import folders
from pipeline.data.ahead import LookAhead
from pipeline.data.cache import Cache
from pipeline.data.dataset import Batches, PreparedDataset
from pipeline.data.folders import FarFolder, push
from pipeline.errors import AccessError, Busy, ConfigError, InputMissing, StorageError
from pipeline.prepare import shards
from tests.conftest import write_bucketed, write_prepared

KINDS = ("raw", "png", "buckets")


@pytest.fixture(scope="module", params=KINDS)
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set in several shards."""
    path = tmp_path_factory.mktemp(request.param) / "prepared"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 2 * 3 * 16**2)
        if request.param == "buckets":
            write_bucketed(path, [(16, 16), (12, 20)] * 12)
        else:
            write_prepared(path, encoding=request.param)
    return path


@pytest.fixture()
def one(tmp_path: Path) -> Path:
    """A prepared data set in several shards, raw."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHARD_BYTES", 5 * 3 * 16**2)
        write_prepared(tmp_path / "local/prepared")
    return tmp_path / "local/prepared"


def sizes_of(path: Path) -> dict[str, int]:
    return {name: about["size"] for name, about in artifacts.read_manifest(path)["files"].items()}


def send(path: Path, s3: str) -> str:
    return push(path, f"{s3}/prepared", lambda line: None)


def held(folder: Path) -> int:
    """Bytes in a cache."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("low", [False, True])
def test_batches_are_those_of_local_data_with_a_cache_that_holds_less_than_the_set(
    local: Path, low: bool, s3: str, tmp_path: Path
) -> None:
    cache = Cache(tmp_path, 2**30)
    sets = PreparedDataset(local), PreparedDataset(FarFolder(send(local, s3), cache))
    resolution, shuffled = (8, 4) if low else (None, 0)
    here, there = (Batches(each, "train", 0, 8, 2, resolution, None, shuffled) for each in sets)
    kind = "low" if low else "images"
    cache.max_bytes = sum(size for name, size in sizes_of(local).items() if name.startswith(kind)) // 2
    for nimg, shard in ((nimg, shard) for nimg in range(0, 40, 8) for shard in range(2)):
        ours, theirs = here.at(nimg, shard), there.at(nimg, shard)
        assert ours.images.dtype == theirs.images.dtype
        assert torch.equal(ours.images, theirs.images)
        assert all(torch.equal(a, b) for a, b in zip(ours.text[:3], theirs.text[:3], strict=True))
    assert 0 < held(tmp_path) <= cache.max_bytes
    assert sets[1].digest == artifacts.directory_digest(local)


@pytest.mark.parametrize(("shuffled", "fits"), [(0, False), (4, True), (5, False)])
def test_a_cache_that_would_have_files_fetched_for_every_batch_is_refused(
    one: Path, s3: str, tmp_path: Path, shuffled: int, fits: bool
) -> None:
    size = sum(size for name, size in sizes_of(one).items() if name.startswith("images"))
    cache = Cache(tmp_path, 2**30)
    far = PreparedDataset(FarFolder(send(one, s3), cache))
    cache.max_bytes = size // 2 + 2  # with 16 images for training
    if fits:
        Batches(far, "train", 0, 8, 2, None, None, shuffled)
    else:
        with pytest.raises(ConfigError, match="E-CFG-062 .*set shuffle_images .* to 4 or less"):
            Batches(far, "train", 0, 8, 2, None, None, shuffled)


def test_only_what_is_missing_is_sent_the_manifest_last(one: Path, s3: str) -> None:
    import s3fs

    files, lines = s3fs.S3FileSystem(), []
    url = push(one, f"{s3}/again", lines.append)
    files.rm_file(f"{url}/low-00001.npy")
    files.rm_file(f"{url}/manifest.json")
    before = {about["Key"]: about["LastModified"] for about in files.find(url, detail=True).values()}
    assert push(one, f"{s3}/again/", lines.append) == url
    after = {about["Key"]: about["LastModified"] for about in files.find(url, detail=True).values()}
    assert [line.split()[1] for line in lines] == [str(len(sizes_of(one))), "1"]
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 2
    assert push(one, f"{s3}/again", lines.append) == url and len(lines) == 2


@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_copy_is_fetched_again(one: Path, s3: str, tmp_path: Path, damage: bytes | None) -> None:
    cache, url = Cache(tmp_path / "cache", 2**30), send(one, s3)
    path = FarFolder(url, cache).path("images-00000.npy")
    content = path.read_bytes()
    path.write_bytes(damage if damage is not None else bytes([content[0] ^ 1]) + content[1:])
    assert FarFolder(url, cache).path("images-00000.npy").read_bytes() == content


def test_what_is_wrong_with_a_store_is_one_line(
    one: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setattr(folders, "WAITS", (0.01, 0.01))
    url, files = send(one, s3 + "/wrong"), s3fs.S3FileSystem()
    far = FarFolder(url, Cache(tmp_path / "cache", 2**30))
    name = "images-00000.npy"
    content = files.cat_file(f"{url}/{name}")
    files.pipe_file(f"{url}/{name}", content[::-1])
    with pytest.raises(StorageError, match=f"E-IO-062 {url}/{name}: differs from what was sent"):
        far.path(name)
    files.pipe_file(f"{url}/{name}", content[:-1])
    with pytest.raises(Busy, match="E-BUSY-062 .* of .* bytes"):
        far.path(name)
    files.rm_file(f"{url}/{name}")
    with pytest.raises(InputMissing, match=f"E-INP-012 {url}/{name}: is not in the store"):
        far.path(name)
    with pytest.raises(InputMissing, match="E-INP-012"):
        FarFolder(url + "0", Cache(tmp_path / "cache", 2**30))
    with pytest.raises(InputMissing, match="E-INP-012 s3://nowhere/"):
        push(one, "s3://nowhere", print)
    with pytest.raises(
        ConfigError, match="E-CFG-061 .*text.safetensors: has .* more than the cache may hold"
    ):
        FarFolder(url, Cache(tmp_path / "small", 1000))
    assert not list((tmp_path / "cache").rglob("*.part")) and held(tmp_path / "cache") == 0


@pytest.mark.parametrize(
    ("error", "failures", "kind", "attempts"),
    [
        (ConnectionResetError("cut"), 3, None, 4),
        (ConnectionResetError("cut"), 9, Busy, 5),
        (PermissionError("no"), 9, AccessError, 1),
    ],
)
def test_a_store_that_is_away_is_waited_for_and_one_that_refuses_is_not(
    one: Path,
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: OSError,
    failures: int,
    kind: type[Exception] | None,
    attempts: int,
) -> None:
    monkeypatch.setattr(folders, "WAITS", (0.01,) * 4)
    far = FarFolder(send(one, s3), Cache(tmp_path / "cache", 2**30))
    real, asked = far._store.get_file, []

    def flaky(*names: str) -> None:
        asked.append(names)
        if len(asked) <= failures:
            raise error
        real(*names)

    monkeypatch.setattr(far._store, "get_file", flaky)
    if kind is None:
        assert far.path("index.jsonl").read_bytes() == (one / "index.jsonl").read_bytes()
    else:
        with pytest.raises(kind):
            far.path("index.jsonl")
    assert len(asked) == attempts


class Recorder:
    """A folder that notes what is expected of it."""

    where, manifest = "here", dict[str, Any]()

    def __init__(self, room: int) -> None:
        self.room, self.names = room, list[str]()

    def open(self, names: Any, read: Any) -> Any:
        raise AssertionError

    def expect(self, names: Any) -> None:
        self.names += names


@pytest.mark.parametrize(("room", "first", "second"), [(0, "", ""), (25, "abc", "d"), (1000, "abcdef", "")])
def test_files_of_coming_batches_are_fetched_ahead_as_far_as_there_is_room(
    room: int, first: str, second: str
) -> None:
    folder = Recorder(room)
    ahead = LookAhead(folder, lambda nimg: {"abcdef"[nimg // 8 % 6]: 10}, 8, 48)
    ahead.move_to(0)
    assert "".join(folder.names) == first
    ahead.move_to(0)
    ahead.move_to(8)
    assert "".join(folder.names) == first + second
