"""What all training steps share: their settings, and what happens when, as functions of images seen."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """Settings of every training step. Clocks count training images.

    batch_size: images per update over all workers. shards: equal parts of a batch, each with random streams of its
    own; a worker takes whole shards, so the result depends on their number, not on the number of workers.
    shuffle_images: of whole files, that are shuffled together; 0: all (pipeline/data/order.py)."""

    seed: int
    batch_size: int
    shards: int
    num_images: int
    lr: float
    warmup_images: int
    shuffle_images: int = 0


def due(nimg: int, interval: int, batch_size: int) -> bool:
    """True once per `interval` images: at the first step that reaches each multiple."""
    return nimg // interval > (nimg - batch_size) // interval


DECAY = 0.3  # of the run, its end


def decay(nimg: int, num_images: int) -> float:
    """The factor of the learning rate that falls from 1 to 0 over the last DECAY of the run."""
    return min((num_images - nimg) / (DECAY * num_images), 1.0)


def linear_decay_lr(peak: float, nimg: int, num_images: int, warmup: int) -> float:
    """Linear warm-up, then constant, and a linear decay to 0 over the last 30% of the run.

    In short runs this beats EDM2's 1/sqrt decay (2312.02696, eq. 67), which ends at half the peak."""
    ramp = min((nimg + 1) / warmup, 1.0) if warmup else 1.0
    return peak * ramp * decay(nimg, num_images)


def before_decay(nimg: int, batch_size: int, num_images: int) -> bool:
    """Whether a run of `num_images` goes on from image `nimg`, and has come there by updates of the full rate: then
    runs of other lengths of which this holds, too, are in the same state there."""
    return nimg < num_images and decay(nimg - batch_size, num_images) == 1.0


def moments_of(num_images: int, batch_size: int, count: int) -> list[int]:
    """The values of nimg at which averages are stored: after `count` evenly spread updates, including the last."""
    steps = num_images // batch_size
    return sorted({-(-k * steps // count) * batch_size for k in range(1, count + 1)})
