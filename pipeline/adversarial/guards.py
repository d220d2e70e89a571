"""Guards of adversarial training: measure the student, keep its best state, go back where it collapses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.adversarial.discriminator import Perturbation
from pipeline.adversarial.few_step import few_step
from pipeline.adversarial.losses import kernel_distance, mean_pairwise_distance
from pipeline.adversarial.step import (
    BASE_ERROR,
    BEST_NIMG,
    BEST_SCORE,
    ERROR,
    LR_SCALE,
    ROLLBACKS,
    SCORE,
    SPREAD,
    AdversarialStep,
)
from pipeline.diffusion.seeds import Draw, seeded_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.resample import pool
from pipeline.training.distributed import broadcast, rank_and_size
from pipeline.training.state import Learner, TrainState


@dataclass
class Guards:
    """Looks at fixed one-pass samples of the averaged student, keeps the best state, and rolls back.

    A state is good when its feature spread is at least `min_spread` of the real images' and its caption error
    (RMSE of the twice pooled images to their real partners) at most `max_caption_error` times that of the
    student before refinement. Among good states the least kernel distance wins. A bad state rolls back to the
    best and halves the learning rate; the second rollback ends the stage."""

    step: AdversarialStep
    images: Tensor  # real, standardised [n,3,R,R]
    text: Conditioning
    min_spread: float
    max_caption_error: float

    def describe(self, images: Tensor) -> Tensor:
        """Spatial means of the frozen features of [n,3,R,R] without noise: [n,d]."""
        n, size = len(images), pyramid_levels(self.step.student)[0].resolution
        sigma = torch.full((n,), 0.05, device=images.device)
        view = Perturbation(sigma, torch.zeros(n, 3, size, size, device=images.device), (0, 0))
        return torch.cat([f.mean(dim=(2, 3)) for f in self.step.features(images, self.text, view)], dim=1)

    @torch.no_grad()
    def measure(self, learner: Learner) -> Tensor:
        """(kernel distance, spread relative to real, caption error) of the averaged student: [3]."""
        draw: Draw = seeded_noise(range(len(self.images)), self.images.device)
        with learner.using(learner.emas["ema"]):
            made = few_step(self.step.student, self.text, draw, 1, self.step.sigma_start)[-1]
        real, fake = self.describe(self.images), self.describe(made)
        mean, std = real.mean(dim=0), real.std(dim=0) + 1e-6
        real, fake = (real - mean) / std, (fake - mean) / std
        error = (pool(pool(made)) - pool(pool(self.images))).square().mean().sqrt()
        relative = (mean_pairwise_distance(fake) / mean_pairwise_distance(real)).double()
        return torch.stack([kernel_distance(fake, real), relative, error.double()])

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Check now; updates state.extra and, on a rollback, the student."""
        learner, guard = state.learners["generator"], state.extra["guard"]
        found = torch.zeros(3, dtype=torch.float64, device=guard.device)
        if rank_and_size()[0] == 0:
            found.copy_(self.measure(learner))
        score, relative, error = broadcast(found).tolist()
        guard[SCORE], guard[SPREAD], guard[ERROR] = score, relative, error
        if state.nimg == 0:
            guard[BASE_ERROR] = error
        good = relative >= self.min_spread and error <= self.max_caption_error * float(guard[BASE_ERROR])
        if state.nimg == 0 or (good and score < float(guard[BEST_SCORE])):
            guard[BEST_SCORE], guard[BEST_NIMG] = score, state.nimg
            state.extra["best"].copy_(learner.emas["ema"])
        elif not good:
            self.roll_back(state)
        names = {"score": SCORE, "spread": SPREAD, "caption_error": ERROR, "rollbacks": ROLLBACKS}
        return {name: float(guard[i]) for name, i in names.items()}

    @staticmethod
    def roll_back(state: TrainState) -> None:
        """Return the student to its best state with half the learning rate."""
        learner, guard = state.learners["generator"], state.extra["guard"]
        learner.weights.data.copy_(state.extra["best"])
        learner.emas["ema"].copy_(state.extra["best"])
        for tensor in learner.adam.state[learner.weights].values():
            tensor.zero_()
        guard[LR_SCALE] *= 0.5
        guard[ROLLBACKS] += 1
        state.extra["finished"].fill_(bool(guard[ROLLBACKS] >= 2))


def guard_state(learner: Learner) -> dict[str, Tensor]:
    """Fresh extra tensors for a refinement run."""
    guard = torch.zeros(8, dtype=torch.float64)
    guard[LR_SCALE] = 1.0
    return {"guard": guard, "best": learner.emas["ema"].clone(), "finished": torch.tensor(False)}
