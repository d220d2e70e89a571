"""Random access to a prepared data set, and the order in which training visits it.

The position in the data is a function of `nimg` alone: image p of training is entry p mod n of permutation number
p // n. Every image is seen once per epoch, and neither a resume nor the number of workers changes the order. Where
images have several sizes, a batch holds one of them (order.py). Needs only torch, numpy and safetensors.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from pipeline.artifacts import read_manifest
from pipeline.data.augment import Augment, Transforms, apply, draw
from pipeline.data.order import BatchOrder
from pipeline.data.storage import Bucket, Pictures, open_array
from pipeline.errors import InputMissing
from pipeline.models.conditioning import Conditioning
from pipeline.models.shape import Images, Shape
from pipeline.rng import generator_for


class PreparedDataset:
    """A folder written by the prepare stage. Images stay on disk (memory maps); encoded captions are in memory."""

    def __init__(self, path: Path | str) -> None:
        """Open the folder. Raises InputMissing where there is none; its files are not verified (see artifacts)."""
        self.path = Path(path)
        if not (self.path / "manifest.json").is_file():
            raise InputMissing("E-INP-010", str(path), "no prepared data set here", "run `dvc repro prepare`")
        self.manifest = read_manifest(self.path)
        self.resolution = int(self.manifest["meta"]["resolution"])
        lines = (self.path / "index.jsonl").read_text().splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.captions = [json.loads(line) for line in (self.path / "captions.jsonl").read_text().splitlines()]
        known = self.manifest["meta"].get("buckets")
        square = Bucket(self.resolution, self.resolution, len(self.rows))
        self.buckets = [Bucket(**each) for each in known] if known else [square]
        self._ends = np.cumsum([bucket.num_images for bucket in self.buckets])
        names = sorted({file.name.split(".")[0] for file in self.path.glob("images-*.npy")})
        self._shards = [Pictures(self.path, name) for name in names]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self._low = [open_array(file) for file in sorted(self.path.glob("low-*.npy"))]
        low_width = int(self._low[0].shape[-1]) if self._low else self.buckets[0].width
        self.low_resolution = self.resolution * low_width // self.buckets[0].width
        self._text = load_file(self.path / "text.safetensors")

    @property
    def text_encoder(self) -> dict[str, object]:
        """Name, sha256, dim and max_tokens of the encoder behind `text`."""
        return dict(self.manifest["meta"]["text_encoder"])

    def split(self, name: str) -> np.ndarray:
        """Row numbers of a split ("train", "val", "test"), int64 [n]."""
        return np.array([i for i, row in enumerate(self.rows) if row["split"] == name], dtype=np.int64)

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
        return self._gather([shard.row for shard in self._shards], rows, out)

    def pictures(self, rows: np.ndarray) -> Images:
        """Images of any rows: uint8 [n,3,H,W] or, where they are of several buckets, [3,H,W] each."""
        if len(np.unique(self.bucket_of(rows))) < 2:
            return self.images(rows)
        return [self.images(rows[i : i + 1])[0] for i in range(len(rows))]

    def low_sums(self, rows: np.ndarray) -> Tensor:
        """Box sums of some rows of one bucket at `low_resolution`: uint16 [n,3,h,w], exact."""
        factor = self.resolution // self.low_resolution
        out = np.empty((len(rows), 3, *(side // factor for side in self._size(rows))), np.uint16)
        return self._gather([shard.__getitem__ for shard in self._low], rows, out)

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
        self, shards: Sequence[Callable[[int], np.ndarray]], rows: np.ndarray, out: np.ndarray
    ) -> Tensor:
        """Copy each row from its shard to `out`, without further copies."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[numbers]
        for i, (number, place) in enumerate(zip(numbers.tolist(), places.tolist(), strict=True)):
            out[i] = shards[number](place)
        return torch.from_numpy(out)

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
        ids = self.rows[row]["captions"]
        return int(ids[draw % len(ids)]) if ids else -1


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


class Batches:
    """The training batches of one split, addressed by (nimg, shard).

    Images have the data set's resolution or, if `resolution` is at most that of its box sums, the latter. `augment`
    (None: not at all) changes them at this resolution, and is part of the conditioning."""

    def __init__(
        self,
        dataset: PreparedDataset,
        split: str,
        seed: int,
        batch_size: int,
        shards: int,
        resolution: int | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.dataset = dataset
        self.rows = dataset.split(split)
        if not len(self.rows):
            raise InputMissing(
                "E-INP-011", str(dataset.path), f"split '{split}' is empty", "add images or change data.*"
            )
        self.seed = seed
        self.shard_size = batch_size // shards
        self._order = BatchOrder(dataset.bucket_of(self.rows), batch_size, seed)
        self.low = resolution is not None and resolution <= dataset.low_resolution < dataset.resolution
        self.augment = augment if augment is not None and augment.probability > 0 else None

    def places(self, nimg: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, row numbers), int64 [B/shards] each, of one shard of the batch that starts at image `nimg`."""
        epochs, places = self._order.places(nimg + shard * self.shard_size, self.shard_size)
        return epochs, self.rows[places]

    def at(self, nimg: int, shard: int) -> Batch:
        """B/shards images with one caption each, which is drawn by (seed, nimg, shard)."""
        epochs, rows = self.places(nimg, shard)
        generator = generator_for(self.seed, "caption", nimg, shard)
        draws = torch.randint(0, 1 << 30, (len(rows),), generator=generator).tolist()
        ids = [self.dataset.caption_of(row, draw) for row, draw in zip(rows.tolist(), draws, strict=True)]
        transforms = draw(self.augment, self.seed, epochs, rows) if self.augment else None
        text = self.dataset.stored_text(ids)
        if self.low:
            return Batch(self.dataset.low_sums(rows), self.dataset.box_pixels, text, transforms)
        return Batch(self.dataset.images(rows), 1, text, transforms)
