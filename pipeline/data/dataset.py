"""Random access to a prepared data set, and the order in which training visits it.

The position in the data is a function of `nimg` alone: image p of training is entry p mod n of permutation number
p // n. Every image is seen once per epoch, and neither a resume nor the number of workers changes the order. Needs
only torch, numpy and safetensors.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from pipeline.artifacts import read_manifest
from pipeline.data.augment import Augment, Transforms, apply, draw
from pipeline.data.storage import Pictures, open_array
from pipeline.errors import InputMissing
from pipeline.models.conditioning import Conditioning
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
        names = sorted({file.name.split(".")[0] for file in self.path.glob("images-*.npy")})
        self._shards = [Pictures(self.path, name) for name in names]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        self._low = [open_array(file) for file in sorted(self.path.glob("low-*.npy"))]
        self.low_resolution = int(self._low[0].shape[-1]) if self._low else self.resolution
        self._text = load_file(self.path / "text.safetensors")

    @property
    def text_encoder(self) -> dict[str, object]:
        """Name, sha256, dim and max_tokens of the encoder behind `text`."""
        return dict(self.manifest["meta"]["text_encoder"])

    def split(self, name: str) -> np.ndarray:
        """Row numbers of a split ("train", "val", "test"), int64 [n]."""
        return np.array([i for i, row in enumerate(self.rows) if row["split"] == name], dtype=np.int64)

    def images(self, rows: np.ndarray) -> Tensor:
        """Images of some rows: uint8 [n,3,R,R]."""
        out = np.empty((len(rows), 3, self.resolution, self.resolution), np.uint8)
        return self._gather([shard.row for shard in self._shards], rows, out)

    def low_sums(self, rows: np.ndarray) -> Tensor:
        """Box sums of some rows at `low_resolution`: uint16 [n,3,r,r], exact."""
        out = np.empty((len(rows), 3, self.low_resolution, self.low_resolution), np.uint16)
        return self._gather([shard.__getitem__ for shard in self._low], rows, out)

    def low_images(self, rows: np.ndarray) -> Tensor:
        """Exact box means of some rows at `low_resolution`, in 0 to 255: float32 [n,3,r,r]."""
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

    images: Tensor  # uint8 [n,3,R,R], or uint16: sums over boxes of pixels
    box_pixels: int  # pixels per box; 1 for plain images
    text: Conditioning  # float16
    transforms: Transforms | None  # augmentation

    def to(self, device: str | torch.device) -> tuple[Tensor, Conditioning]:
        """Augmented images in 0 to 255, float32 [n,3,R,R], and float32 captions with the augmentation labels."""
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
        self.low = resolution is not None and resolution <= dataset.low_resolution < dataset.resolution
        self.augment = augment if augment is not None and augment.probability > 0 else None
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            generator = generator_for(self.seed, "order", epoch)
            order = torch.randperm(len(self.rows), generator=generator).numpy()
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch]

    def places(self, nimg: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, row numbers), int64 [B/shards] each, of one shard of the batch that starts at image `nimg`."""
        first = nimg + shard * self.shard_size
        epochs, offsets = np.divmod(np.arange(first, first + self.shard_size), len(self.rows))
        rows = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            own = epochs == epoch
            rows[own] = self.rows[self._order(int(epoch))[offsets[own]]]
        return epochs, rows

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
