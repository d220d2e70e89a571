"""The distance of images from what each of them should be, in random features."""

import torch

from pipeline.adversarial.random_features import RandomDistance
from pipeline.models.resample import pool, upsample


def test_the_paired_distance_grows_with_blur_and_with_other_images() -> None:
    images = torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    blurred = upsample(pool(images.float())).to(torch.uint8)
    half = (images.float() / 2 + blurred.float() / 2).to(torch.uint8)
    distance = RandomDistance(images)
    assert distance.paired(images, images) == 0
    assert 0 < distance.paired(half, images) < distance.paired(blurred, images)
    assert (
        distance.paired(images.roll(1, 0), images)
        > 0
        == distance.paired(images.roll(1, 0), images.roll(1, 0))
    )
