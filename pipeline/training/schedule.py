"""What all training steps share: their settings, and the learning rate as a function of images seen."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of every training step. Clocks count training images.

    batch_size: images per update over all workers. shards: equal parts of a batch, each with random streams of its
    own; a worker takes whole shards, so the result depends on their number, not on the number of workers."""

    seed: int
    batch_size: int
    shards: int
    num_images: int
    lr: float
    warmup_images: int


def linear_decay_lr(peak: float, nimg: int, num_images: int, warmup: int) -> float:
    """Linear warm-up, then constant, and a linear decay to 0 over the last 30% of the run.

    In short runs this beats EDM2's 1/sqrt decay (2312.02696, eq. 67), which ends at half the peak."""
    ramp = min((nimg + 1) / warmup, 1.0) if warmup else 1.0
    return peak * ramp * min((num_images - nimg) / (0.3 * num_images), 1.0)
