"""Random access to a prepared data set, and the order in which training visits it.

The position in the data is a function of `nimg` alone: image p of training is entry p mod n of permutation number
p // n. Every image is seen once per epoch, and neither a resume nor the number of workers changes the order. Where
images have several sizes, a batch holds one of them (order.py). Needs only torch, numpy and safetensors.
"""

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.ahead import LookAhead, require_room
from pipeline.data.augment import Augment, Transforms, apply, draw
from pipeline.data.folders import Folder, LocalFolder
from pipeline.data.order import BatchOrder
from pipeline.data.storage import (
    HEADER,
    Bucket,
    JsonLines,
    Pictures,
    open_array,
    open_safetensors,
    shard_counts,
)
from pipeline.errors import InputMissing
from pipeline.models.conditioning import Conditioning
from pipeline.models.shape import Images, Shape
from pipeline.rng import generator_for


class PreparedDataset:
    """A folder written by the prepare stage, here (read through memory maps), or behind a URL, whence shards are
    fetched when they are needed. In memory are some 30 bytes a row."""

    def __init__(self, folder: Path | str | Folder) -> None:
        """Open the folder. Raises InputMissing where there is none."""
        self.folder = LocalFolder(Path(folder)) if isinstance(folder, Path | str) else folder
        self.manifest = self.folder.manifest
        self.resolution = int(self.manifest["meta"]["resolution"])
        self.rows, self.captions = map(self._lines, ("index.jsonl", "captions.jsonl"))
        self._read_rows()
        known = self.manifest["meta"].get("buckets")
        square = Bucket(self.resolution, self.resolution, len(self.rows))
        self.buckets = [Bucket(**each) for each in known] if known else [square]
        self._ends = np.cumsum([bucket.num_images for bucket in self.buckets])
        files = self.manifest["files"]
        counts = shard_counts(files, self.buckets)
        self._starts = np.cumsum([0, *counts.values()])
        assert self._starts[-1] == len(self.rows), "sizes in the manifest tell how many images a shard has"
        self._shards = [[file for file in files if file.startswith(f"{name}.")] for name in counts]
        self._low = sorted(file for file in files if file.startswith("low-"))
        self.low_resolution = self.resolution // self._low_factor()
        vectors = "text.safetensors"
        self._text = self.folder.open([vectors], lambda path: open_safetensors(path / vectors))

    def _low_factor(self) -> int:
        """Side of the boxes of `low_sums`, px."""
        if not self._low or not self.rows:
            return 1
        pixels = (int(self.manifest["files"][self._low[0]]["size"]) - HEADER) // (
            2 * 3 * int(self._starts[1])
        )
        return math.isqrt(self.buckets[0].height * self.buckets[0].width // pixels)

    @property
    def where(self) -> str:
        """The folder, for messages."""
        return self.folder.where

    def check(self) -> None:
        """Raise Busy where the files have changed since the data set was opened."""
        self.folder.check()

    @property
    def digest(self) -> str:
        """Digest of the folder, from its manifest."""
        return str(self.manifest["digest"])

    def _lines(self, name: str) -> JsonLines:
        return self.folder.open([name], lambda path: JsonLines(path / name))

    def _read_rows(self) -> None:
        """Split and captions of each row, as numbers."""
        splits, ids, ends = bytearray(), array("i"), array("q", [0])
        self._splits: list[str] = []
        for row in self.rows:
            if row["split"] not in self._splits:
                self._splits.append(row["split"])
            splits.append(self._splits.index(row["split"]))
            ids.extend(row["captions"])
            ends.append(len(ids))
        self._split_of = np.frombuffer(splits, np.uint8)
        self._caption_ids, self._caption_ends = ids, ends

    @property
    def text_encoder(self) -> dict[str, object]:
        """Name, sha256, dim and max_tokens of the encoder behind `text`."""
        return dict(self.manifest["meta"]["text_encoder"])

    def split(self, name: str) -> np.ndarray:
        """Row numbers of a split ("train", "val", "test"), int64 [n]."""
        number = self._splits.index(name) if name in self._splits else -1
        return np.flatnonzero(self._split_of == number)

    def bucket_of(self, rows: np.ndarray) -> np.ndarray:
        """The number, in `buckets`, of each row: int64 [n]."""
        return np.searchsorted(self._ends, rows, side="right")

    def shape_of(self, row: int) -> Shape:
        """The shape of the image of a row."""
        bucket = self.buckets[int(self.bucket_of(np.array([row]))[0])]
        return Shape(bucket.height / self.resolution, bucket.width / self.resolution)

    def by_bucket(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Positions in `rows` of those of each bucket that has any, in the order of `buckets`: int64 [m] each."""
        numbers = self.bucket_of(rows)
        return (np.flatnonzero(numbers == number) for number in np.unique(numbers))

    def requests(self, rows: np.ndarray) -> Iterator[tuple[list[int], Conditioning, Shape]]:
        """What to ask a model for to get images like those of some rows, a bucket at a time: positions in `rows`,
        the encoded names of these, and their shape."""
        for own in self.by_bucket(rows):
            text = self.text([self.caption_of(row) for row in rows[own].tolist()])
            yield own.tolist(), text, self.shape_of(int(rows[own[0]]))

    def images(self, rows: np.ndarray) -> Tensor:
        """Images of some rows of one bucket: uint8 [n,3,H,W]."""
        out = np.empty((len(rows), 3, *self._size(rows)), np.uint8)
        return self._gather(self._images_of, rows, out)

    def pictures(self, rows: np.ndarray) -> Images:
        """Images of any rows: uint8 [n,3,H,W] or, where they are of several buckets, [3,H,W] each."""
        if len(np.unique(self.bucket_of(rows))) < 2:
            return self.images(rows)
        return [self.images(rows[i : i + 1])[0] for i in range(len(rows))]

    def low_sums(self, rows: np.ndarray) -> Tensor:
        """Box sums of some rows of one bucket at `low_resolution`: uint16 [n,3,h,w], exact."""
        factor = self.resolution // self.low_resolution
        out = np.empty((len(rows), 3, *(side // factor for side in self._size(rows))), np.uint16)
        return self._gather(self._low_of, rows, out)

    def _size(self, rows: np.ndarray) -> tuple[int, int]:
        """(height, width) of the images of some rows, px."""
        numbers = np.unique(self.bucket_of(rows))
        assert len(numbers) < 2, "images of one bucket at a time"
        bucket = self.buckets[int(numbers[0]) if len(numbers) else 0]
        return bucket.height, bucket.width

    def low_images(self, rows: np.ndarray) -> Tensor:
        """Exact box means of some rows of one bucket at `low_resolution`, in 0 to 255: float32 [n,3,h,w]."""
        return self.low_sums(rows).float() / self.box_pixels

    @property
    def box_pixels(self) -> int:
        """Number of pixels in a box of `low_sums`."""
        return (self.resolution // self.low_resolution) ** 2

    def _gather(
        self, open_shard: Callable[[int], Callable[[int], np.ndarray]], rows: np.ndarray, out: np.ndarray
    ) -> Tensor:
        """Copy each row from its shard to `out`, without further copies."""
        numbers = self.shard_of(rows)
        places = rows - self._starts[numbers]
        shards: dict[int, Callable[[int], np.ndarray]] = {}
        for i, (number, place) in enumerate(zip(numbers.tolist(), places.tolist(), strict=True)):
            if number not in shards:
                shards[number] = open_shard(number)
            out[i] = shards[number](place)
        return torch.from_numpy(out)

    def shard_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of each row's shard: int64 [n]."""
        return np.searchsorted(self._starts, rows, side="right") - 1

    def files_of(self, rows: np.ndarray, low: bool) -> dict[str, int]:
        """{name: bytes} of the files with the images, or box sums, of some rows; in the order of the rows."""
        numbers = dict.fromkeys(self.shard_of(rows).tolist())
        names = (
            [self._low[i] for i in numbers] if low else [name for i in numbers for name in self._shards[i]]
        )
        return {name: int(self.manifest["files"][name]["size"]) for name in names}

    def _images_of(self, number: int) -> Callable[[int], np.ndarray]:
        """A shard, which gives the image uint8 [3,H,W] at a place."""
        names = self._shards[number]
        return self.folder.open(names, lambda path: Pictures(path, names[0].split(".")[0])).row

    def _low_of(self, number: int) -> Callable[[int], np.ndarray]:
        """A shard of box sums, which gives those uint16 [3,h,w] at a place."""
        name = self._low[number]
        return self.folder.open([name], lambda path: open_array(path / name)).__getitem__

    def text(self, caption_ids: Sequence[int]) -> Conditioning:
        """Encoded captions: pooled [n,D], tokens [n,T,D] float32, mask [n,T]. An id of -1 is "no caption"."""
        return self.stored_text(caption_ids).float()

    def stored_text(self, caption_ids: Sequence[int]) -> Conditioning:
        """`text` in float16, as it is stored."""
        ids = np.maximum(np.asarray(caption_ids, dtype=np.int64), 0)
        known = np.asarray(caption_ids)[:, None] >= 0
        pooled, tokens, mask = (self._text[name][ids] for name in ("pooled", "tokens", "mask"))
        return Conditioning(
            torch.from_numpy(pooled), torch.from_numpy(tokens), torch.from_numpy(mask.astype(bool) & known)
        )

    def caption_of(self, row: int, draw: int = 0) -> int:
        """Caption id of a row: its name (draw 0) or another of its captions; -1 where it has none."""
        start, end = self._caption_ends[row], self._caption_ends[row + 1]
        return self._caption_ids[start + draw % (end - start)] if end > start else -1

    def pick(self, split: str, count: int) -> list[int]:
        """Up to `count` rows spread evenly over a split."""
        rows: list[int] = self.split(split).tolist()
        return [rows[i * len(rows) // count] for i in range(count)] if len(rows) > count else rows

    def names(self, rows: Sequence[int]) -> list[str]:
        """The names of some rows: their first captions, or nothing."""
        ids = map(self.caption_of, rows)
        return [self.captions[i] if i >= 0 else "" for i in ids]


class Batch(NamedTuple):
    """Images and encoded captions in their compact stored form; `to` converts them to what networks take."""

    images: Tensor  # uint8 [n,3,H,W], or uint16: sums over boxes of pixels
    box_pixels: int  # pixels per box; 1 for plain images
    text: Conditioning  # float16
    transforms: Transforms | None  # augmentation

    def to(self, device: str | torch.device) -> tuple[Tensor, Conditioning]:
        """Augmented images in 0 to 255, float32 [n,3,H,W], and float32 captions with the augmentation labels."""
        images, text = self.images.to(device).float() / self.box_pixels, self.text.to(device).float()
        if self.transforms is None:
            return images, text
        return apply(images, self.transforms), text._replace(augment=self.transforms.labels().to(device))


class BatchSource(Protocol):
    """Training batches."""

    def at(self, nimg: int, shard: int) -> Batch:
        """One shard of the batch at `nimg`."""


class Batches:
    """The training batches of one split, addressed by (nimg, shard).

    Images have the data set's resolution or, if `resolution` is at most that of its box sums, the latter. `augment`
    (None: not at all) changes them at this resolution, and is part of the conditioning. `shuffle_images`: see
    BatchOrder."""

    def __init__(
        self,
        dataset: PreparedDataset,
        split: str,
        seed: int,
        batch_size: int,
        shards: int,
        resolution: int | None = None,
        augment: Augment | None = None,
        shuffle_images: int = 0,
    ) -> None:
        self.dataset = dataset
        self.rows = dataset.split(split)
        if not len(self.rows):
            raise InputMissing(
                "E-INP-011", dataset.where, f"split '{split}' is empty", "add images or change data.*"
            )
        self.seed = seed
        self.shard_size = batch_size // shards
        buckets, files = dataset.bucket_of(self.rows), dataset.shard_of(self.rows)
        self._order = BatchOrder(buckets, batch_size, seed, files, shuffle_images)
        self.low = resolution is not None and resolution <= dataset.low_resolution < dataset.resolution
        self.augment = augment if augment is not None and augment.probability > 0 else None
        every = dataset.files_of(np.arange(len(dataset.rows)), self.low)
        require_room(dataset.folder, sum(every.values()), len(self.rows), shuffle_images)
        # One of its own, as an order remembers where it was asked last.
        ahead = BatchOrder(buckets, batch_size, seed, files, shuffle_images)

        def files_at(nimg: int) -> dict[str, int]:
            return dataset.files_of(self.rows[ahead.places(nimg, batch_size)[1]], self.low)

        self._look_ahead = LookAhead(dataset.folder, files_at, batch_size, len(self.rows))

    def places(self, nimg: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, row numbers), int64 [B/shards] each, of one shard of the batch that starts at image `nimg`."""
        epochs, places = self._order.places(nimg + shard * self.shard_size, self.shard_size)
        return epochs, self.rows[places]

    def at(self, nimg: int, shard: int) -> Batch:
        """B/shards images with one caption each, which is drawn by (seed, nimg, shard)."""
        self._look_ahead.move_to(nimg)
        epochs, rows = self.places(nimg, shard)
        generator = generator_for(self.seed, "caption", nimg, shard)
        draws = torch.randint(0, 1 << 30, (len(rows),), generator=generator).tolist()
        ids = [self.dataset.caption_of(row, draw) for row, draw in zip(rows.tolist(), draws, strict=True)]
        transforms = draw(self.augment, self.seed, epochs, rows) if self.augment else None
        text = self.dataset.stored_text(ids)
        if self.low:
            return Batch(self.dataset.low_sums(rows), self.dataset.box_pixels, text, transforms)
        return Batch(self.dataset.images(rows), 1, text, transforms)
