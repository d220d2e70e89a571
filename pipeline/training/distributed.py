"""What worker processes of a distributed run exchange: shards of the batch, sums, broadcasts and slices of vectors.

Everything works in a single process without torch.distributed, too. Sums run over shards in their order, never over
workers, so that their bits do not depend on the number of workers.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

CHUNK = 2**24  # numbers of a vector that are exchanged at once, which bounds the memory for it
ALIGNED = 64  # slices begin at its multiples; a CPU may round differently in what then remains of a vector


def rank_and_size() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) outside a distributed run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_shards(shards: int) -> range:
    """The consecutive shards of the global batch that this worker takes, each as a whole."""
    rank, size = rank_and_size()
    assert shards % size == 0, "the driver refuses such a number of workers"
    return range(rank * shards // size, (rank + 1) * shards // size)


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """Broadcast in place from the worker of rank `source` and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1 and tensor.numel():
        dist.broadcast(tensor, source)
    return tensor


def own_share(work: Sequence[T]) -> Sequence[T]:
    """The pieces of work that are this worker's: each takes the next in turn. `merged` puts results together."""
    rank, size = rank_and_size()
    return work[rank::size]


def merged(own: Mapping[int, T]) -> dict[int, T]:
    """What all workers have made, by keys that are nobody else's. All call it together."""
    _, size = rank_and_size()
    parts = [dict(own)] * size
    if size > 1:
        dist.all_gather_object(parts, dict(own))
    return {key: value for part in parts for key, value in part.items()}


def sum_over_shards(own: Sequence[Tensor]) -> Tensor:
    """The sum over all shards of the batch, in their order, of a small tensor each; `own` are those of this
    worker's shards."""
    parts = torch.stack(list(own))
    _, size = rank_and_size()
    if size > 1:
        gathered = parts.new_empty((size * len(parts), *parts.shape[1:]))
        dist.all_gather_into_tensor(gathered, parts)
        parts = gathered
    total = torch.zeros_like(parts[0])
    for part in parts:
        total += part
    return total


def add_in_order(own: Sequence[Tensor]) -> None:
    """Sum over all shards of the batch, in their order, of a vector [n] each; `own` are those of this worker's
    shards, the last of which becomes the sum.

    Each worker adds up one slice for all: as much traffic as a ring all-reduce if each has one shard. An all-reduce
    of more than two adds in an order that depends on the number of workers, and with it the last bits."""
    rank, size = rank_and_size()
    total = own[-1]
    if size * len(own) == 2:
        dist.all_reduce(total)
        return
    for start in range(0, len(total), CHUNK):
        place = slice(start, start + CHUNK)
        parts = torch.stack([part[place] for part in own]) if len(own) > 1 else total[None, place]
        parts = F.pad(parts, (0, -parts.shape[1] % size))
        sent = parts.view(len(own), size, -1).transpose(0, 1).contiguous()  # [to worker, shard, slice]
        received = torch.empty_like(sent)  # [from worker, shard, slice]
        dist.all_to_all_single(received, sent)
        added, *others = received.flatten(0, 1)
        for part in others:
            added += part
        whole = added.new_empty(size * len(added))
        dist.all_gather_into_tensor(whole, added)
        total[place] = whole[: len(total[place])]


class Slices:
    """How vectors of `length` numbers are laid out over the workers: each holds all of them; or, if they are
    `sharded`, one slice, of which the last ones may be shorter or empty."""

    def __init__(self, length: int, sharded: bool) -> None:
        rank, size = rank_and_size() if sharded else (0, 1)
        step = -(-length // (size * ALIGNED)) * ALIGNED
        self.length = length
        self.places = [slice(min(i * step, length), min((i + 1) * step, length)) for i in range(size)]
        self.own = self.places[rank]

    def exchange_(self, vector: Tensor) -> None:
        """Give every worker the slices of the others, which have changed theirs. All call it together."""
        if len(self.places) > 1:
            for source, place in enumerate(self.places):
                broadcast(vector[place], source)

    def whole(self, own: Tensor) -> Tensor:
        """The vector of which `own` is this worker's slice: in the host's memory, where it is sharded; else `own`
        itself. All workers call it together."""
        if len(self.places) == 1:
            return own
        vector = torch.empty(self.length, dtype=own.dtype)
        for source, place in enumerate(self.places):
            for start in range(place.start, place.stop, CHUNK):
                piece = slice(start, min(start + CHUNK, place.stop))
                part = own.new_empty(piece.stop - start)
                if place == self.own:
                    part.copy_(own[start - place.start :][: len(part)])
                vector[piece] = broadcast(part, source)
        return vector
