"""The order in which training visits images: a function of their number, bucket and the seed alone.

Every epoch has a permutation of all images. Each bucket takes its own images out of these permutations, in their
order. Batch j of a bucket holds images j B to (j + 1) B of what it took, the last ones of one epoch perhaps with
the first ones of the next; batches are visited in the order in which they are full. So a batch holds one bucket,
every image is seen once before any of its bucket is seen again, and no bucket is more than a batch behind. With one
bucket, image p of training is entry p mod n of permutation p div n.

Where files are fetched from afar, and do not all fit into a cache, a permutation may keep to some files at a time:
files are drawn in random order and put together until they have as many images as shall be shuffled, which is done
with each such group. WebDataset, and MosaicML's streaming (`py1b`), shuffle alike.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.rng import generator_for

Int64 = NDArray[np.int64]


class BatchOrder:
    """The batches of some images; `buckets` has the bucket of each, int64 [n], `files` the number of its file.

    shuffle_images: images, of whole files, that are shuffled together, at least; 0: all.
    """

    def __init__(
        self, buckets: Int64, batch_size: int, seed: int, files: Int64 | None = None, shuffle_images: int = 0
    ) -> None:
        assert files is not None or not shuffle_images
        self.buckets = buckets
        self.files = files
        self.shuffle_images = shuffle_images
        self.batch_size = batch_size
        self.seed = seed
        self.counts: Int64 = np.bincount(buckets)
        self._taken: dict[int, list[Int64]] = {}
        self._turns: tuple[int, list[tuple[int, int]]] = (-1, [])

    def _permutation(self, epoch: int) -> Int64:
        generator = generator_for(self.seed, "order", epoch)
        permutation: Int64 = torch.randperm(len(self.buckets), generator=generator).numpy()
        if self.files is None or not self.shuffle_images:
            return permutation
        counts = np.bincount(self.files)
        drawn = torch.randperm(len(counts), generator=generator).numpy()
        before = np.empty_like(counts)
        before[drawn] = np.cumsum(counts[drawn]) - counts[drawn]
        groups = (before // self.shuffle_images)[self.files]
        return permutation[np.argsort(groups[permutation], kind="stable")]

    def _taken_in(self, epoch: int) -> list[Int64]:
        """The images of each bucket in the order of an epoch."""
        if epoch not in self._taken:
            order = self._permutation(epoch)
            own = [order[self.buckets[order] == bucket] for bucket in range(len(self.counts))]
            self._taken = {e: o for e, o in self._taken.items() if e >= epoch - 1} | {epoch: own}
        return self._taken[epoch]

    def _full(self, epoch: int) -> Int64:
        """Batches of each bucket that are full before an epoch."""
        full: Int64 = epoch * self.counts // self.batch_size
        return full

    def _turn(self, batch: int) -> tuple[int, int]:
        """(bucket, how many batches of it came before) of a batch."""
        if len(self.counts) == 1:
            return 0, batch
        low, high = 0, (batch + len(self.counts)) * self.batch_size // len(self.buckets) + 2
        while low + 1 < high:  # to the last epoch before which no more than `batch` batches are full
            middle = (low + high) // 2
            low, high = (middle, high) if self._full(middle).sum() <= batch else (low, middle)
        before, after = self._full(low), self._full(low + 1)
        if self._turns[0] != low:
            order = self.buckets[self._permutation(low)]
            ends: list[tuple[int, int, int]] = []  # place in the permutation, bucket, turn
            for bucket, count in enumerate(self.counts.tolist()):
                turns = np.arange(before[bucket], after[bucket])
                last = np.flatnonzero(order == bucket)[(turns + 1) * self.batch_size - 1 - low * count]
                ends += [
                    (place, bucket, turn) for place, turn in zip(last.tolist(), turns.tolist(), strict=True)
                ]
            self._turns = low, [(bucket, turn) for _, bucket, turn in sorted(ends)]
        return self._turns[1][batch - int(before.sum())]

    def places(self, start: int, count: int) -> tuple[Int64, Int64]:
        """(epochs, images), int64 [count] each, of training images `start` to `start` + `count`, of one batch."""
        batch, inside = divmod(start, self.batch_size)
        bucket, turn = self._turn(batch)
        first = turn * self.batch_size + inside
        epochs, offsets = np.divmod(np.arange(first, first + count), self.counts[bucket])
        images = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            own = epochs == epoch
            images[own] = self._taken_in(int(epoch))[bucket][offsets[own]]
        return epochs, images
