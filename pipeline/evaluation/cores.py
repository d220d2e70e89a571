"""Batches side by side on the cores of a CPU.

Operations of small networks are too small to share: a core for each batch is a fifth faster than all cores for one
batch after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST = 8  # batches at once, since each has activations of its own

T = TypeVar("T")
R = TypeVar("R")


def side_by_side(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
    """`work(task)` of each task, in their order; as many at once as this process may use threads, MOST at most.
    With a GPU one after the other.

    `work` runs in other threads, which start with gradients enabled. An error is raised here, and ends the rest."""
    threads = torch.get_num_threads()
    count = 1 if torch.cuda.is_available() else min(threads, len(tasks), MOST)
    if count <= 1:
        yield from map(work, tasks)
        return
    torch.set_num_threads(threads // count)  # of operations, in threads that start from here on
    pool = ThreadPoolExecutor(count)
    try:
        yield from pool.map(work, tasks)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
