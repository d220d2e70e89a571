"""Gradients, added up over the shards of the batch in their order: the same bits on any number of workers."""

from collections.abc import Sequence

from torch import Tensor

from pipeline.training.distributed import add_in_order, rank_and_size
from pipeline.training.state import Learner


class GradientSum:
    """The gradients of some learners over one batch: `begin_shard` before the backward pass of each of this
    worker's shards, and `finish` after the last one.

    One worker leaves it to autograd, which adds a shard after the other to what is there. Several keep the
    gradients of their shards apart, to add them in the order of all shards."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        self.learners = learners
        self.begun = False
        self.earlier: list[list[Tensor]] = [[] for _ in learners]  # of shards before the current one
        if rank_and_size()[0]:
            # What is there is the same on all workers, and comes before the first shard.
            self.clear()

    def clear(self) -> None:
        """Set the gradients to zero."""
        for learner in self.learners:
            learner.grad.zero_()

    def begin_shard(self) -> None:
        """Keep the gradients of the shard before."""
        if self.begun and rank_and_size()[1] > 1:
            for learner, kept in zip(self.learners, self.earlier, strict=True):
                kept.append(learner.grad.clone())
            self.clear()
        self.begun = True

    def finish(self) -> None:
        """Turn the gradients into the sums over all shards, on every worker.

        A state that is not finite on any worker makes them NaN on all, so that all skip the step alike."""
        for learner, earlier in zip(self.learners, self.earlier, strict=True):
            learner.grad[0] += learner.fault()
            if rank_and_size()[1] > 1:
                add_in_order([*earlier, learner.grad])
