"""Work on a GPU that is recorded once and then replayed (CUDA graphs): a training update launches thousands of
small kernels, and a host that launches them one by one is slower than the device."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording: libraries choose their algorithms and allocate in the first ones


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tensor, or of a tuple of such, at any depth."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for item in tree:
            yield from leaves(item)


def cloned(tree: Any) -> Any:
    """A copy with tensors of its own; all else, and the kinds of tuples, stay."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if not isinstance(tree, tuple):
        return tree
    items = [cloned(item) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


class Recorded:
    """`work(*given)` on tensors and tuples of them, and on what it holds, such as weights and gradients, in place.

    Its first calls are done as they are, then one is recorded, and from there on all are replayed: on other values,
    but of the same shapes, in the same places. `work` may not wait for the device. Results are overwritten by the
    next call. Random numbers are drawn from torch's own generator as without a recording."""

    def __init__(self, work: Callable[..., Tensor]) -> None:
        self.work = work
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.given: Any = ()
        self.made: Tensor | None = None

    def __call__(self, *given: Any) -> Tensor:
        """Do the work."""
        self.calls += 1
        if self.calls <= WARM_UP:
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                made = self.work(*given)
            main.wait_stream(side)
            return made
        if self.graph is None:
            self.given, self.graph = cloned(given), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # nothing is computed yet
                self.made = self.work(*self.given)
        for own, new in zip(leaves(self.given), leaves(given), strict=True):
            own.copy_(new)
        self.graph.replay()
        assert self.made is not None
        return self.made
