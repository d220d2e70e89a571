"""Where the workers of a stage meet under Ray: their process group, made by themselves rather than by Ray.

Ray's own group listens at all interfaces, and takes in every worker. Here the store at which they meet (TCPStore)
listens at the address that Ray knows the node of the first worker by: 127.0.0.1 where Ray is private. And where an
elastic profile has started a number of workers that does not divide the shards of a batch, only as many compute as
do; the others are not needed until the next restart.

Imports ray and torch; workers import it when they meet.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from ray.train import get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import get_device
from ray.util import get_node_ip_address
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it without saying so to mypy

TIMEOUT = timedelta(minutes=30)  # of a collective, as Ray and PyTorch have it


def computing(shards: int, workers: int) -> int:
    """How many of `workers` share the shards of a batch: the largest number that divides them."""
    return max(number for number in range(1, workers + 1) if shards % number == 0)


def meet(shards: int | None, backend: str) -> int:
    """Join the process group, `gloo` or `nccl`, of the workers that compute, in each of all workers; their number.
    A worker of higher rank is not among them. With NCCL each also takes its GPU, of those of its node. shards: of a
    batch; None: all workers compute."""
    if backend == "nccl":
        torch.cuda.set_device(get_device())
    rank, workers = get_context().get_world_rank(), get_context().get_world_size()
    size = workers if shards is None else computing(shards, workers)
    if size == 1:
        return size
    listener: socket.socket | None = None
    address = ("", 0)
    if rank == 0:
        host = get_node_ip_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        address = (host, listener.getsockname()[1])
    host, port = broadcast_from_rank_zero(address)
    if rank >= size:
        return size
    handle = None if listener is None else listener.detach()  # the store closes it
    store = TCPStore(host, port, size, rank == 0, TIMEOUT, master_listen_fd=handle)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    return size
