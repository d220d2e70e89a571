"""Random access to a prepared data set, and the order in which training visits it.

The position in the data is a function of `nimg` alone: image p of training is entry p mod n of the p // n-th
permutation. Every image is seen once an epoch, and neither a resume nor the number of workers changes the
order. Needs torch, numpy and safetensors only.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from pipeline.artifacts import read_manifest
from pipeline.data.augment import Augment, apply, draw
from pipeline.data.store import Pictures
from pipeline.errors import InputMissing
from pipeline.models.layers import Text
from pipeline.rng import generator_for


class PreparedDataset:
    """A folder written by the prepare stage. Images stay on disk (memory maps); texts are held in memory."""

    def __init__(self, path: Path | str) -> None:
        """Open the folder. Raises InputMissing where there is none; verifies nothing else (see artifacts)."""
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
        self._low = [np.load(file, mmap_mode="r") for file in sorted(self.path.glob("low-*.npy"))]
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
        out = np.empty((len(rows), 3, self.resolution, self.resolution), dtype=np.uint8)
        for number, where, inside in self._places(rows):
            out[where] = self._shards[number].take(inside)
        return torch.from_numpy(out)

    def low_images(self, rows: np.ndarray) -> Tensor:
        """Exact box means of some rows at `low_resolution`, in grey levels: float32 [n,3,r,r]."""
        out = np.empty((len(rows), 3, self.low_resolution, self.low_resolution), dtype=np.uint16)
        for number, where, inside in self._places(rows):
            out[where] = self._low[number][inside]
        factor = self.resolution // self.low_resolution
        return torch.from_numpy(out.astype(np.float32)) / factor**2

    def _places(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(shard, which of `rows` lie in it, their places there)."""
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of):
            where = shard_of == number
            yield int(number), where, rows[where] - self._starts[number]

    def text(self, caption_ids: Sequence[int]) -> Text:
        """Encoded captions: pooled [n,D], tokens [n,T,D] float32, mask [n,T]. An id of -1 is "no caption"."""
        ids = np.maximum(np.asarray(caption_ids, dtype=np.int64), 0)
        known = np.asarray(caption_ids)[:, None] >= 0
        pooled, tokens, mask = (self._text[name] for name in ("pooled", "tokens", "mask"))
        return Text(
            torch.from_numpy(pooled[ids].astype(np.float32)),
            torch.from_numpy(tokens[ids].astype(np.float32)),
            torch.from_numpy(mask[ids].astype(bool) & known),
        )

    def caption_of(self, row: int, draw: int = 0) -> int:
        """Caption id of a row: its name (draw 0) or another of its captions; -1 where it has none."""
        ids = self.rows[row]["captions"]
        return int(ids[draw % len(ids)]) if ids else -1


class Batches:
    """The training batches of one split, addressed by (nimg, shard).

    Images come at the data set's resolution or, if `resolution` is that of its box sums, from those. `augment`
    (None: not at all) changes them there, and tells the network how."""

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

    def at(self, nimg: int, shard: int) -> tuple[Tensor, Text]:
        """Images in grey levels, float32 [B/shards,3,R,R], and one caption each, drawn by (seed, nimg, shard)."""
        epochs, rows = self.places(nimg, shard)
        generator = generator_for(self.seed, "caption", nimg, shard)
        draws = torch.randint(0, 1 << 30, (len(rows),), generator=generator).tolist()
        ids = [self.dataset.caption_of(row, draw) for row, draw in zip(rows.tolist(), draws, strict=True)]
        images = self.dataset.low_images(rows) if self.low else self.dataset.images(rows).float()
        text = self.dataset.text(ids)
        if self.augment is None:
            return images, text
        drawn = draw(self.augment, self.seed, epochs, rows)
        return apply(images, drawn), text._replace(augment=drawn.labels())
