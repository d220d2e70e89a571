"""Guards of adversarial training: measure the student at intervals, store its best state, and return to that state
when the student collapses or forgets its captions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.adversarial.discriminator import Perturbation
from pipeline.adversarial.few_step import few_step
from pipeline.adversarial.losses import kernel_distance, mean_pairwise_distance
from pipeline.adversarial.step import AdversarialStep, GuardState
from pipeline.diffusion.seeds import Draw, seeded_noise
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import pyramid_levels
from pipeline.models.finite import require_finite_metrics
from pipeline.models.resample import pool, rescale
from pipeline.models.shape import Images, Shape, by_size, in_order, mean_over
from pipeline.training.distributed import broadcast, rank_and_size
from pipeline.training.state import Learner, TrainState


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """min_spread: lowest feature spread, relative to the real images. max_caption_error: highest caption error,
    relative to the student before refinement."""

    min_spread: float
    max_caption_error: float


@dataclass
class Guards:
    """Checks one-pass samples of the averaged student on fixed captions and seeds; stores its best state, and rolls
    back to it.

    A state is good when the feature spread (mean pairwise distance) and the caption error (RMSE of the twice pooled
    images to their real partners) are within the settings. The good state with the lowest distance is the best. A
    bad state rolls back to the best one and halves the learning rate; the second rollback ends the stage.

    Where captions do not tell images apart (`told_apart`), there is no caption error.

    images: real ones, standardised; text: their captions. distance: of standardised samples from real
    images; None: the kernel distance from `images` in the features of the discriminator."""

    step: AdversarialStep
    images: Images
    text: Conditioning
    settings: GuardSettings
    distance: Callable[[Images], float] | None = None

    def pooled_features(self, images: Images) -> Tensor:
        """Spatial means of the frozen features of n images, almost without noise: [n,d]."""
        pooled: dict[int, Tensor] = {}
        for places, alike in by_size(images):
            sigma = torch.full((len(alike),), 0.05, device=alike.device)
            noise = torch.zeros_like(rescale(alike, pyramid_levels(self.step.student)[0].resolution))
            text = self.text.select(torch.tensor(places))
            maps = self.step.features(alike, text, Perturbation(sigma, noise, (0, 0)))
            pooled |= zip(places, torch.cat([f.mean(dim=(2, 3)) for f in maps], dim=1), strict=True)
        return torch.stack([pooled[place] for place in range(len(images))])

    def samples(self) -> Images:
        """One-pass samples of the student, of the captions and shapes of the images."""
        student, made = self.step.student, dict[int, Tensor]()
        for places, alike in by_size(self.images):
            draw: Draw = seeded_noise(places, alike.device, Shape.of(alike, student.resolution))
            text = self.text.select(torch.tensor(places))
            estimates = few_step(student, text, draw, 1, self.step.settings.sigma_start)
            made |= zip(places, estimates[-1], strict=True)
        return in_order(made)

    def caption_error(self, samples: Images) -> Tensor:
        """RMSE of twice pooled samples to their real partners; 0 where captions do not tell these apart."""
        shown, away = told_apart(self.text), []
        for (places, own), (_, real) in zip(by_size(samples), by_size(self.images), strict=True):
            known = shown[torch.tensor(places)]
            if known.any():
                error = (pool(pool(own[known])) - pool(pool(real[known]))).square().mean()
                away.append((error, int(known.sum())))
        return mean_over(away).sqrt() if away else torch.zeros((), device=shown.device)

    @torch.no_grad()
    def measure(self, learner: Learner, average: Tensor) -> Tensor:
        """(distance, spread relative to the real images, caption error, or 0) of the averaged student: [3]."""
        with learner.using(average):
            samples = self.samples()
        real, fake = self.pooled_features(self.images), self.pooled_features(samples)
        mean, std = real.mean(dim=0), real.std(dim=0) + 1e-6
        real, fake = (real - mean) / std, (fake - mean) / std
        spread = (mean_pairwise_distance(fake) / mean_pairwise_distance(real)).double()
        score = (
            kernel_distance(fake, real)
            if self.distance is None
            else spread.new_tensor(self.distance(samples))
        )
        return torch.stack([score, spread, self.caption_error(samples).double()])

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Check now; updates state.extra and, on a rollback, the student. Returns metrics."""
        learner = state.learners["generator"]
        measured = torch.zeros(3, dtype=torch.float64, device=learner.weights.device)
        average = learner.whole(learner.emas["ema"])
        if rank_and_size()[0] == 0:
            measured.copy_(self.measure(learner, average))
        score, spread, error = broadcast(measured).tolist()
        metrics = {"score": score, "spread": spread, "caption_error": error}
        guard = GuardState.load(state)
        if all(map(math.isfinite, metrics.values())):
            guard = guard._replace(**metrics)
        if state.nimg == 0:
            require_finite_metrics(metrics, "refine: the model to refine", "run `dvc repro finetune`")
            guard = guard._replace(base_error=error)
        s = self.settings
        good = (
            math.isfinite(score)
            and spread >= s.min_spread
            and error <= s.max_caption_error * guard.base_error
        )
        if state.nimg == 0 or (good and score < guard.best_score):
            guard = guard._replace(best_score=score, best_nimg=state.nimg)
            state.extra["best"].copy_(learner.emas["ema"])
        elif not good:
            roll_back(state)
            guard = guard._replace(lr_scale=0.5 * guard.lr_scale, rollbacks=guard.rollbacks + 1)
            state.extra["finished"].fill_(guard.rollbacks >= 2)
        guard.store(state)
        return {**metrics, "rollbacks": guard.rollbacks}


def told_apart(text: Conditioning) -> Tensor:
    """Which images have a caption, bool [n]; none of them where all captions are the same."""
    known = text.mask.any(dim=1)
    return known & (len(text.pooled[known].unique(dim=0)) > 1)


def roll_back(state: TrainState) -> None:
    """Return the student and its average to their best state, with a fresh optimizer."""
    learner = state.learners["generator"]
    learner.set_weights(state.extra["best"])
    learner.emas["ema"].copy_(state.extra["best"])
    for tensor in learner.moments.values():
        tensor.zero_()


def guard_tensors(learner: Learner) -> dict[str, Tensor]:
    """Fresh extra tensors of a refinement run."""
    best = learner.emas["ema"].clone()
    return {"guard": GuardState().tensor(), "best": best, "finished": torch.tensor(False)}
