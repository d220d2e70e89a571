"""What worker processes of a distributed run exchange: shards of the batch, sums, broadcasts, gradients.

Everything works, and does nothing, in a single process without torch.distributed.
"""

import torch.distributed as dist
from torch import Tensor

from pipeline.errors import ConfigError


def rank_and_size() -> tuple[int, int]:
    """(rank, number of workers); (0, 1) outside a distributed run."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def local_shards(shards: int) -> range:
    """The consecutive shards of the global batch that this worker takes, each as a whole.

    Raises ConfigError where the shards do not divide evenly among the workers."""
    rank, size = rank_and_size()
    if shards % size:
        problem = f"{shards} shards do not divide evenly among {size} workers"
        raise ConfigError("E-CFG-025", "params.yaml", problem, "change shards")
    return range(rank * shards // size, (rank + 1) * shards // size)


def sum_over_workers(tensor: Tensor) -> Tensor:
    """All-reduce in place and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> Tensor:
    """Broadcast in place from rank 0 and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def average_gradient(grad: Tensor, shards: int) -> None:
    """Turn per-worker sums over shards into the mean over all shards, in place."""
    sum_over_workers(grad).div_(shards)
