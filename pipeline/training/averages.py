"""Post-hoc EMA: the width of the weight average, chosen after training (arXiv 2312.02696, section 3).

The tracked averages are stored several times during training, as folders `nimg-<12 digits>/` with
averages.safetensors; at the end, linear combinations of them approximate averages of other widths. They are no part
of the training state: a resumed run writes the same bits again. Only rank 0 writes and reads. A damaged one is
named, and narrows the choice.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import artifacts
from pipeline.diffusion.ema import Profile, mixing_weights
from pipeline.errors import StorageError
from pipeline.models.finite import require_finite
from pipeline.training.distributed import rank_and_size
from pipeline.training.records import notice
from pipeline.training.state import Learner, TrainState

CANDIDATES = 9  # widths, from half the smallest tracked one to twice the largest
MAX_RESIDUAL = 0.1  # of the approximation of a width, relative to the norm of its profile


class Averages:
    """A hook that stores the averages of `learner` when nimg is in `moments`, and combines them afterwards."""

    def __init__(self, folder: Path, learner: Learner, moments: Sequence[int]) -> None:
        self.folder, self.learner, self.moments = folder, learner, moments

    def path(self, nimg: int) -> Path:
        """Folder of the averages stored at `nimg`."""
        return self.folder / f"nimg-{nimg:012d}"

    def __call__(self, state: TrainState, metrics: dict[str, Tensor]) -> None:
        """Store when due."""
        if state.nimg not in self.moments:
            return
        whole = self.tracked()
        if rank_and_size()[0] == 0:
            path, tensors = self.path(state.nimg), {name: average.cpu() for name, average in whole.items()}
            require_finite(tensors, str(path), "run it again: it continues from the last checkpoint")
            with artifacts.commit_directory(path, {"nimg": state.nimg}) as folder:
                save_file(tensors, folder / "averages.safetensors")

    def tracked(self) -> dict[str, Tensor]:
        """The averages as they are now, whole. All workers call it together."""
        return {name: self.learner.whole(average) for name, average in self.learner.emas.items()}

    def mixed(self, std: float) -> Tensor:
        """The average of relative width `std` at the last moment, flat float32 like the learner's weights. Its
        filters are not normalised (`Learner.using` does that). Raises StorageError where a stored average is
        missing or damaged."""
        factors = iter(mixing_weights(self.profiles(), Profile(std, self.moments[-1]))[0].tolist())
        total = torch.zeros_like(self.learner.weights.data, dtype=torch.float64)
        for nimg in self.moments:
            artifacts.verify_directory(self.path(nimg))
            tensors = load_file(self.path(nimg) / "averages.safetensors")
            for name in self.learner.emas:
                total.add_(tensors[name].to(total), alpha=next(factors))
        return total.float()

    def profiles(self) -> list[Profile]:
        """Profiles of the stored averages, in the order in which `mixed` reads them."""
        return [Profile(float(name), nimg) for nimg in self.moments for name in self.learner.emas]

    def usable(self) -> "Averages":
        """The stored averages that verify; the others are named on stderr, and left out of what is mixed."""
        kept = []
        for nimg in self.moments:
            try:
                artifacts.verify_directory(self.path(nimg))
                kept.append(nimg)
            except StorageError as error:
                text = f"{error.code} {error.where}: {error.problem}; the weight averages are mixed from the others"
                notice(self.folder.parent, nimg, text)
        return Averages(self.folder, self.learner, kept)

    def candidates(self, tracked: Mapping[str, Tensor]) -> Iterator[tuple[float, Tensor]]:
        """(relative width, average): those `tracked`, then, if any are stored, other widths in ascending order that
        are approximated well enough (MAX_RESIDUAL)."""
        yield from ((float(name), average) for name, average in tracked.items())
        usable = self.usable()
        if usable.moments and usable.moments[-1] == self.moments[-1]:
            widths = [float(name) for name in tracked]
            stored, end = usable.profiles(), self.moments[-1]
            for std in np.geomspace(min(widths) / 2, min(2 * max(widths), 0.25), CANDIDATES).tolist():
                if mixing_weights(stored, Profile(std, end))[1] <= MAX_RESIDUAL:
                    yield std, usable.mixed(std)
