"""In how many steps a refined model upscales: measured on held-out images at the end of the refine stage."""

from typing import Any

import torch
from torch import Tensor

from pipeline.adversarial.random_features import RandomDistance
from pipeline.inference.upscaling import PLAIN_STEPS, UpscaleSettings, upscale
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import pool
from pipeline.models.shape import Images, in_order, map_images
from pipeline.models.snapshot import Snapshot
from pipeline.training.context import TrainContext
from pipeline.training.distributed import merged, own_share
from pipeline.workers.choices import UPSCALING

HELD_OUT = 16  # validation images


def measure_upscaling(
    run: TrainContext[Any], refined: Snapshot, unrefined: Snapshot, distance: RandomDistance
) -> dict[str, float]:
    """Distances of halved validation images, doubled again without captions, from the images themselves, in random
    features: of the refined model by number of steps, and of the model before refinement (0 steps). The means of
    2x2 boxes are the halved image in all, so that only the detail is compared. Empty for a model without shells."""
    if not refined.config.shells:
        return {}
    images, text = run.pictures_and_text(run.pick("val", HELD_OUT))
    text = text.select(slice(0, 1)).drop_captions()
    originals = map_images(Tensor.cpu, images)
    halved = map_images(lambda alike: pool(alike.float()).round().to(torch.uint8), originals)
    ways = {0: (unrefined, PLAIN_STEPS), 1: (refined, 1), PLAIN_STEPS: (refined, PLAIN_STEPS)}
    return {
        f"{UPSCALING}{n}": distance.paired(doubled(snapshot, halved, text, steps), originals)
        for n, (snapshot, steps) in ways.items()
    }


def doubled(snapshot: Snapshot, images: Images, text: Conditioning, steps: int) -> Images:
    """uint8 images on the CPU, twice as high and wide; `text` is one caption. Workers share the images."""
    settings = UpscaleSettings(num_steps=steps)
    own: dict[int, Tensor] = {}
    for place in own_share(range(len(images))):
        pixels = images[place].permute(1, 2, 0).numpy()
        own[place] = torch.from_numpy(upscale(snapshot, pixels, text, place, settings)).permute(2, 0, 1)
    return in_order(merged(own))
