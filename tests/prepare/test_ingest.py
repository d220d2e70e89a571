"""Taking in: each item once, whatever was done before, and however the run before ended."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.compute import ComputeProfile
from pipeline.errors import BadData
from pipeline.launch import execution
from pipeline.launch.session import ray_session
from pipeline.prepare import ingest as module
from pipeline.prepare.blocks import Layout
from pipeline.prepare.framing import Framing
from pipeline.prepare.ingest import IngestedItem, images_of, ingest, run_locally, stored_sums
from pipeline.prepare.shards import box_sums
from pipeline.prepare.sources.folder import Folder
from stages.prepare import needs_ray

LAYOUT = Layout(16, 8, "raw")


@pytest.fixture()
def source(tmp_path: Path) -> Folder:
    for number in range(20):
        write(tmp_path, number)
    (tmp_path / "raw/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return Folder(tmp_path, "raw", Framing(16, "crop", (255, 255, 255)))


def write(root: Path, number: int) -> None:
    (root / "raw").mkdir(exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / f"raw/{number:03d}.png")


class Counting:
    """A `TaskMapper` that notes how many items it was given; dies before block number `dies`."""

    def __init__(self, dies: int = 1000) -> None:
        self.items, self.dies = 0, dies

    def __call__(
        self, make: Callable[[], AbstractContextManager[Any]], blocks: Sequence[Any]
    ) -> Iterator[int]:
        for number, count in enumerate(run_locally(make, blocks)):
            if number == self.dies:
                raise KeyboardInterrupt
            self.items += count
            yield count


def take(
    source: Folder, cache: Path, spread: module.TaskMapper, layout: Layout = LAYOUT
) -> list[IngestedItem]:
    return ingest(source, source.listing().items, layout, cache, spread, 1, lambda done, total: None)


def test_every_item_ends_as_a_picture_or_a_problem(source: Folder, tmp_path: Path) -> None:
    taken = take(source, tmp_path / "cache", Counting())
    assert len(taken) == 21
    (bad,) = [each for each in taken if each.measured is None]
    assert (
        isinstance(bad.problem, BadData)
        and bad.item.id == "broken.png"
        and bad.problem.code.startswith("E-IMG")
    )
    good = [each for each in taken if each.measured is not None]
    for each, pixels, sums in zip(good, images_of(good), stored_sums(good), strict=True):
        assert np.array_equal(pixels, source.decode(source.read(each.item), "x").pixels)
        assert np.array_equal(sums, box_sums(pixels.transpose(2, 0, 1), 2))


def test_again_nothing_is_done_and_a_new_file_is_done_alone(source: Folder, tmp_path: Path) -> None:
    take(source, tmp_path / "cache", Counting())
    again = Counting()
    take(source, tmp_path / "cache", again)
    assert again.items == 0
    write(tmp_path, 99)
    write(tmp_path, 7)  # the same bytes, but another time of change: read again
    more = Counting()
    assert len(take(source, tmp_path / "cache", more)) == 22
    assert more.items == 2


def test_an_interrupted_run_continues_and_ends_with_the_same_pictures(
    source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ITEMS", 5)
    with pytest.raises(KeyboardInterrupt):
        take(source, tmp_path / "cache", Counting(dies=2))
    rest = Counting()
    taken = take(source, tmp_path / "cache", rest)
    assert rest.items == 21 - 15, "two blocks were told of, a third was committed"
    whole = take(source, tmp_path / "other", Counting())
    assert [(t.item, t.measured) for t in taken] == [(t.item, t.measured) for t in whole]


def test_a_damaged_block_is_made_again(source: Folder, tmp_path: Path) -> None:
    take(source, tmp_path / "cache", Counting())
    (block,) = (tmp_path / "cache").glob("block-*")
    (images,) = block.glob("images-*.npy")
    damaged = bytearray(images.read_bytes())
    damaged[-1] ^= 1
    images.write_bytes(bytes(damaged))
    again = Counting()
    take(source, tmp_path / "cache", again)
    assert again.items == 21


def test_what_is_no_longer_used_is_forgotten(source: Folder, tmp_path: Path) -> None:
    take(source, tmp_path / "cache", Counting())
    for file in (tmp_path / "raw").glob("*.png"):
        file.unlink()
    write(tmp_path, 3)
    take(source, tmp_path / "cache", Counting())
    assert len(list((tmp_path / "cache").glob("block-*"))) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_ray_takes_in_what_one_process_does(
    source: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_ITEMS", 6)

    def under_ray(make: Any, blocks: Any) -> Iterator[int]:
        with ray_session(2, tmp_path) as session:
            yield from execution.map_under_ray(session, make, blocks)

    encoded = Layout(16, 8, "png")
    spread, alone = (
        take(source, tmp_path / f"cache{i}", s, encoded) for i, s in enumerate((under_ray, run_locally))
    )
    assert [(t.item, t.row, t.measured) for t in spread] == [(t.item, t.row, t.measured) for t in alone]
    good, other = ([t for t in taken if t.measured is not None] for taken in (spread, alone))
    for ours, theirs in zip(images_of(good), images_of(other), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("workers", "cores", "job", "spread"),
    [
        (2, 2, False, False),
        (2, 64, False, True),
        (2, 2, True, True),
        (0, 64, False, False),
        (0, 2, True, False),
    ],
)
def test_ray_spreads_over_clusters_and_machines_of_many_cores(
    workers: int, cores: int, job: bool, spread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.prepare.cpu_count", lambda: cores)
    monkeypatch.setattr("stages.prepare.inside_ray_job", lambda: job)
    assert needs_ray(ComputeProfile(workers=workers)) == spread
