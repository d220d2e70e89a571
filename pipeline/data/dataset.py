"""Random access to a prepared data set, and the order in which training visits it.

The position in the data is a function of `nimg` alone: image p of training is entry p mod n of the p // n-th
permutation. Every image is seen once an epoch, and neither a resume nor the number of workers changes the
order. Needs torch, numpy and safetensors only.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor

from pipeline.artifacts import read_manifest
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
        self._shards = [np.load(file, mmap_mode="r") for file in sorted(self.path.glob("images-*.npy"))]
        self._starts = np.cumsum([0] + [len(shard) for shard in self._shards])
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
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(shard_of):
            where = shard_of == number
            out[where] = self._shards[number][rows[where] - self._starts[number]]
        return torch.from_numpy(out)

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
    """The training batches of one split, addressed by (nimg, shard)."""

    def __init__(self, dataset: PreparedDataset, split: str, seed: int, batch_size: int, shards: int) -> None:
        self.dataset = dataset
        self.rows = dataset.split(split)
        if not len(self.rows):
            raise InputMissing(
                "E-INP-011", str(dataset.path), f"split '{split}' is empty", "add images or change data.*"
            )
        self.seed = seed
        self.shard_size = batch_size // shards
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            generator = generator_for(self.seed, "order", epoch)
            order = torch.randperm(len(self.rows), generator=generator).numpy()
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch]

    def rows_at(self, nimg: int, shard: int) -> np.ndarray:
        """Row numbers of one shard of the batch that starts at image `nimg`."""
        first = nimg + shard * self.shard_size
        positions = range(first, first + self.shard_size)
        return np.array([self.rows[self._order(p // len(self.rows))[p % len(self.rows)]] for p in positions])

    def at(self, nimg: int, shard: int) -> tuple[Tensor, Text]:
        """Images uint8 [B/shards,3,R,R] and one caption each, drawn by (seed, nimg, shard)."""
        rows = self.rows_at(nimg, shard)
        generator = generator_for(self.seed, "caption", nimg, shard)
        draws = torch.randint(0, 1 << 30, (len(rows),), generator=generator).tolist()
        ids = [self.dataset.caption_of(row, draw) for row, draw in zip(rows.tolist(), draws, strict=True)]
        return self.dataset.images(rows), self.dataset.text(ids)
