"""Functions recorded once on a GPU and then replayed (CUDA graphs).

A training update launches thousands of small kernels. Launching them one by one takes the host longer than the GPU
needs to run them; replaying a recording takes one launch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, in which libraries choose algorithms and allocate memory


def leaves(tree: Any) -> Iterator[Tensor]:
    """The tensors in a tensor or a nested tuple."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for item in tree:
            yield from leaves(item)


def cloned(tree: Any) -> Any:
    """A copy of a nested tuple with its tensors cloned; named tuples keep their types."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if not isinstance(tree, tuple):
        return tree
    items = [cloned(item) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


class Recorded:
    """Calls `function(*inputs)`, where inputs are tensors and nested tuples of them.

    The first calls (WARM_UP) run normally, the next is recorded, and all after it are replayed: with other values
    of the same shapes, and in place on tensors that `function` holds, such as weights and gradients. `function`
    must not wait for the device. The next call overwrites the returned tensor. Random numbers are drawn from
    torch's own generator as in a normal call."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_inputs: Any = ()
        self.static_output: Tensor | None = None

    def __call__(self, *inputs: Any) -> Tensor:
        """Call, record or replay."""
        self.calls += 1
        if self.calls <= WARM_UP:
            side, main = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                output = self.function(*inputs)
            main.wait_stream(side)
            return output
        if self.graph is None:
            self.static_inputs, self.graph = cloned(inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records only, without computing
                self.static_output = self.function(*self.static_inputs)
        for own, new in zip(leaves(self.static_inputs), leaves(inputs), strict=True):
            own.copy_(new)
        self.graph.replay()
        assert self.static_output is not None
        return self.static_output


class RecordedBySize:
    """`Recorded`, with a recording of its own for inputs of other shapes: a bucket each."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self.recorded: dict[tuple[torch.Size, ...], Recorded] = {}

    def __call__(self, *inputs: Any) -> Tensor:
        """Call, record or replay."""
        shapes = tuple(leaf.shape for leaf in leaves(inputs))
        if shapes not in self.recorded:
            self.recorded[shapes] = Recorded(self.function)
        return self.recorded[shapes](*inputs)
