"""The first weight average of each learner: what is shown while training goes on, and kept early on as a guide."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from pipeline.models.denoiser import Denoiser, pyramid_levels
from pipeline.models.snapshot import Snapshot, Weights
from pipeline.training.distributed import Slices
from pipeline.training.state import Learner, TrainState


def first_average(learner: Learner) -> Tensor:
    """The weight average of the first width in the settings, or this worker's slice of it."""
    return next(iter(learner.emas.values()))


def first_averages(learners: Sequence[Learner]) -> list[Tensor]:
    """The first weight average of each learner, whole. All workers call it together."""
    return [learner.whole(first_average(learner)) for learner in learners]


@contextmanager
def lend(learners: Sequence[Learner], averages: Sequence[Tensor]) -> Iterator[None]:
    """Give each learner an average, whole, inside the block."""
    with ExitStack() as averaged:
        for learner, average in zip(learners, averages, strict=True):
            averaged.enter_context(learner.using(average))
        yield


class EarlyWeights:
    """A hook that copies the first weight average of some learners once `nimg` images have been seen.

    The copies lie in the state's extra tensors, as "early" + suffix."""

    def __init__(self, learners: Mapping[str, Learner], nimg: int, batch_size: int) -> None:
        """`learners` by suffix; none where `nimg` is 0."""
        self.learners = {f"early{suffix}": learner for suffix, learner in learners.items()} if nimg else {}
        self.nimg, self.batch_size = nimg, batch_size

    def tensors(self) -> dict[str, Tensor]:
        """Fresh extra tensors of the state."""
        return {name: first_average(learner).clone() for name, learner in self.learners.items()}

    def slices(self) -> dict[str, Slices]:
        """How these are laid out over the workers."""
        return {name: learner.slices for name, learner in self.learners.items()}

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Copy when due."""
        if state.nimg - self.batch_size < self.nimg <= state.nimg:
            for name, learner in self.learners.items():
                state.extra[name].copy_(first_average(learner))

    def whole(self, state: TrainState) -> dict[str, Tensor]:
        """The early weights by name, whole. All workers call it together."""
        return {name: learner.whole(state.extra[name]) for name, learner in self.learners.items()}

    def state_dict(
        self, denoiser: Denoiser, early_weights: Mapping[str, Tensor], parent: Snapshot | None
    ) -> Weights | None:
        """State of `denoiser` with the early weights; levels that are not fresh have those of `parent`. None where
        none are kept."""
        if not self.nimg:
            return None
        with ExitStack() as early:
            for name, learner in self.learners.items():
                early.enter_context(learner.using(early_weights[name]))
            weights = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
        if parent is not None and parent.early is not None:
            below = "below." * (len(pyramid_levels(denoiser)) - len(pyramid_levels(parent.early)))
            weights |= {f"{below}{name}": tensor for name, tensor in parent.early.state_dict().items()}
        return weights
