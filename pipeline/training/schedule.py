"""Learning rates as functions of the number of training images seen."""


def linear_decay_lr(peak: float, nimg: int, num_images: int, warmup: int) -> float:
    """Linear warm-up, then constant, and a linear decay to 0 over the last 30% of the run.

    In short runs this beats EDM2's 1/sqrt decay (2312.02696, eq. 67), which ends at half the peak."""
    ramp = min((nimg + 1) / warmup, 1.0) if warmup else 1.0
    return peak * ramp * min((num_images - nimg) / (0.3 * num_images), 1.0)
