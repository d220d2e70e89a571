"""The length of the weight average, chosen after training (Karras et al., arXiv 2312.02696, section 3).

The averages that are tracked are stored at some moments of training, as folders `nimg-<12 digits>/` with
averages.safetensors; at the end they mix into averages of other lengths. Nothing here is part of the state: a
resumed run writes the same bits again. Only rank 0 writes and reads.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import artifacts
from pipeline.diffusion.ema import Profile, mixing_weights
from pipeline.training.distributed import rank_and_size
from pipeline.training.state import Learner, TrainState

CANDIDATES = 9  # lengths from half the least tracked one to twice the greatest
MOST_MISSED = 0.1  # of the norm of a length's profile, that the stored ones may miss


def moments_of(num_images: int, batch_size: int, count: int) -> list[int]:
    """The clock at `count` evenly spread updates, the last of which ends training."""
    steps = num_images // batch_size
    return sorted({-(-k * steps // count) * batch_size for k in range(1, count + 1)})


class Averages:
    """A hook that stores the averages of `learner` at some moments, and mixes them afterwards."""

    def __init__(self, folder: Path, learner: Learner, moments: Sequence[int]) -> None:
        self.folder, self.learner, self.moments = folder, learner, moments

    def path(self, nimg: int) -> Path:
        """Folder of one moment."""
        return self.folder / f"nimg-{nimg:012d}"

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Store when due."""
        if rank_and_size()[0] == 0 and state.nimg in self.moments:
            tensors = {name: tensor.cpu().clone() for name, tensor in self.learner.emas.items()}
            with artifacts.commit_directory(self.path(state.nimg), {"nimg": state.nimg}) as folder:
                save_file(tensors, folder / "averages.safetensors")

    def mixed(self, std: float) -> Tensor:
        """The average of relative width `std` at the last moment, flat float32 as the learner's weights; to be
        projected before use. Raises StorageError where a moment is missing or damaged."""
        factors = iter(mixing_weights(self.profiles(), Profile(std, self.moments[-1]))[0].tolist())
        total = torch.zeros_like(self.learner.weights.data, dtype=torch.float64)
        for nimg in self.moments:
            artifacts.verify_directory(self.path(nimg))
            tensors = load_file(self.path(nimg) / "averages.safetensors")
            for name in self.learner.emas:
                total.add_(tensors[name].to(total), alpha=next(factors))
        return total.float()

    def profiles(self) -> list[Profile]:
        """Of all that is stored, in the order in which it is mixed."""
        return [Profile(float(name), nimg) for nimg in self.moments for name in self.learner.emas]

    def candidates(self) -> Iterator[tuple[float, Tensor]]:
        """(relative width, average): those tracked, then, if any moments are stored, other lengths, by size, which
        they determine well enough (MOST_MISSED)."""
        yield from ((float(name), average) for name, average in self.learner.emas.items())
        if self.moments:
            tracked = [float(name) for name in self.learner.emas]
            stored, end = self.profiles(), self.moments[-1]
            for std in np.geomspace(min(tracked) / 2, min(2 * max(tracked), 0.25), CANDIDATES).tolist():
                if mixing_weights(stored, Profile(std, end))[1] <= MOST_MISSED:
                    yield std, self.mixed(std)
