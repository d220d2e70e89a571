"""`group-cls`: a small classifier of the data set's own groups, as a feature extractor.

What tells the groups of this very data apart (a hand from a face, a clock from a heart) is what its features hold;
no discriminator shares its weights or its training. It learns from the train split only, is frozen then, and is
the same to the bit for the same images on the same machine.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.conditions import group_of
from pipeline.evaluation.features import Extractor
from pipeline.models.shape import squashed
from pipeline.rng import generator_for

RESOLUTION = 64  # px, the largest input; larger images are averaged over boxes
MIN_GROUP = 8  # images; two groups need as many
MAX_IMAGES = 8000  # training images of which it learns; more would only cost memory
NUM_IMAGES = 8000  # training images seen, repetitions counted: 10 s on one core
BATCH_SIZE = 32
LR = 2e-3
SEED = 0  # not the run's: the extractor is a function of the data alone
SLOPE = 0.2  # of leaky ReLU


@dataclass(frozen=True)
class Unavailable:
    """An extractor that the data at hand cannot have, and why."""

    name: str
    reason: str


def group_cls(dataset: PreparedDataset, device: str = "cpu") -> Extractor | Unavailable:
    """Train the classifier on the train split; its features are those of `Classifier.features`.

    A group is the `subgroup` of a row, or else its `group`; rare ones are learned, too. `details` of the extractor:
    numbers of groups and of training images; of the val split, if it has images: their number, the accuracy, and
    the frequency of its most common group, which is the accuracy of a constant guess."""
    rows = _choose_rows(dataset.split("train").tolist())
    labels = [group_of(dataset.rows[row]) for row in rows]
    counts = Counter(labels)
    if sum(count >= MIN_GROUP for count in counts.values()) < 2:
        reason = f"needs two groups of at least {MIN_GROUP} training images; the largest have"
        largest = ", ".join(f"{name!r} {count}" for name, count in counts.most_common(2))
        return Unavailable("group-cls", f"{reason} {largest or 'none'}")
    names = sorted(counts)
    targets = torch.tensor([names.index(label) for label in labels])
    net = train(_small_images(dataset, rows), targets, len(names))
    details: dict[str, float] = {"groups": len(names), "train_images": len(rows)}
    val: list[int] = dataset.split("val")[:MAX_IMAGES].tolist()
    if val:
        predicted = [names[i] for i in net.predict(_small_images(dataset, val)).tolist()]
        truth = [group_of(dataset.rows[row]) for row in val]
        details |= {
            "val_images": len(val),
            "val_accuracy": float(np.mean([a == b for a, b in zip(predicted, truth, strict=True)])),
            "val_most_common": max(Counter(truth).values()) / len(val),
        }
    sha256 = digest(net)
    net.to(device)
    return Extractor("group-cls", sha256, False, net.features, device, dim=net.dim, details=details)


class Classifier(nn.Module):
    """3x3 convolutions of stride 2 down to 4 px, at most four; the mean over space; a linear layer.

    Without normalisation, which would hide contrast and noise. Three quarters of the first filters start with zero
    mean, and none is larger than 3x3, so that they see edges and grain."""

    def __init__(self, resolution: int, num_groups: int, generator: torch.Generator) -> None:
        """`resolution` of its images, px; weights by He's initialisation."""
        super().__init__()
        self.resolution = resolution
        num_stages = min(max(resolution.bit_length() - 3, 1), 4)
        widths = (24, 48, 96, 96)[:num_stages]
        self.dim = 2 * sum(widths)  # number of features
        self.convs = nn.ModuleList()
        for fan_in, width in itertools.pairwise((3, *widths)):
            conv = skip_init(nn.Conv2d, fan_in, width, 3, stride=2, padding=1)
            nn.init.kaiming_normal_(conv.weight, a=SLOPE, generator=generator)
            nn.init.zeros_(conv.bias)
            if fan_in == 3:
                edges = conv.weight.data[: width * 3 // 4]
                edges -= edges.mean((2, 3), keepdim=True)
            self.convs.append(conv)
        self.head = skip_init(nn.Linear, widths[-1], num_groups)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps [B, width, r, r] of images in 0..255, [B,3,R,R] or stretched to that, fine to coarse."""
        if images.shape[2] != images.shape[3]:
            images = F.adaptive_avg_pool2d(images, self.resolution)
        x = (_box(images) - 127.5) / 63.75
        maps = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), SLOPE)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_groups]."""
        return self.head(self.stages(images)[-1].mean((2, 3)))

    def features(self, images: Tensor) -> Tensor:
        """Mean and standard deviation over space of every channel of every stage: [B, dim].

        The last stage alone, on which the groups are read, hardly changes when an image is blurred or noisy."""
        maps = self.stages(images)
        return torch.cat([f(x) for x in maps for f in (_mean, _std)], 1)

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Group numbers of uint8 images: int64 [N]."""
        return torch.cat([self(batch.float()).argmax(1) for batch in images.split(256)])


def train(images: Tensor, targets: Tensor, num_groups: int, num_images: int = NUM_IMAGES) -> Classifier:
    """A frozen classifier of uint8 images [N,3,R,R], trained on the CPU by AdamW with `num_images` images."""
    generator = generator_for(SEED, "evaluate/group-cls")
    net = Classifier(images.shape[-1], num_groups, generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.05)
    steps = max(num_images // BATCH_SIZE, 2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    epochs = -(-steps * BATCH_SIZE // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    for batch in order[: steps * BATCH_SIZE].split(BATCH_SIZE):
        logits = net(augment(images[batch].float(), generator))
        loss = F.cross_entropy(logits, targets[batch], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Float images [B,3,R,R], each scaled by up to 15%, shifted by up to 5% and its channels dimmed or brightened
    by up to 15%. Nothing blurs or adds noise: that is to be seen, not ignored."""
    u = 2 * torch.rand(len(images), 6, generator=generator) - 1  # -1..1
    affine = torch.zeros(len(images), 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = torch.exp2(0.2 * u[:, 0])
    affine[:, :, 2] = 0.1 * u[:, 1:3]  # the side is 2
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved * (1 + 0.15 * u[:, 3:, None, None])


def digest(net: nn.Module) -> str:
    """sha256 of all weights, float32 little-endian, in the order of the state dict."""
    sha256 = hashlib.sha256()
    for tensor in net.state_dict().values():
        sha256.update(tensor.numpy().astype("<f4").tobytes())
    return sha256.hexdigest()


def _mean(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def _std(x: Tensor) -> Tensor:
    return x.std((2, 3), correction=0)


def _box(images: Tensor) -> Tensor:
    """Float images of at most RESOLUTION px, by box means."""
    factor = images.shape[-1] // RESOLUTION
    return F.avg_pool2d(images, factor) if factor > 1 else images


def _small_images(dataset: PreparedDataset, rows: Sequence[int]) -> Tensor:
    """uint8 images of some rows, at most RESOLUTION px; few at a time are read in full."""
    parts = [
        _box(squashed(dataset.pictures(np.asarray(rows[i : i + 256])), dataset.resolution).float()).round()
        for i in range(0, len(rows), 256)
    ]
    return torch.cat(parts).to(torch.uint8)


def _choose_rows(rows: list[int]) -> list[int]:
    """At most MAX_IMAGES of `rows`, drawn without replacement, in order."""
    if len(rows) > MAX_IMAGES:
        generator = generator_for(SEED, "evaluate/group-cls/rows")
        chosen = torch.randperm(len(rows), generator=generator)[:MAX_IMAGES]
        return [rows[i] for i in sorted(chosen.tolist())]
    return rows
