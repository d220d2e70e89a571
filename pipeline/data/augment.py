"""Non-leaking augmentation of training images (EDM, arXiv 2206.00364, appendix F.2).

Images are mirrored, scaled, rotated, shifted and turned in hue, each at random. The network is conditioned on
labels of these changes, and sampled with the labels of none: it learns that rotated images have rotated labels, and
generates upright ones. The change to an image is a function of (seed, epoch, row of the data set) alone, drawn for
a whole batch at once.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pipeline.rng import key

LABELS = 8  # mirror, log2 scale, cos - 1 and sin of the angle, shift x and y, cos - 1 and sin of the hue
DRAWS = 9  # uniform numbers per image


class Augment(NamedTuple):
    """Strengths. `probability` applies to each kind of change; 0 turns all off."""

    probability: float
    mirror: bool
    scale: float  # standard deviation of log2 of the size
    rotate: float  # degrees, the maximum in either direction
    shift: float  # standard deviation, as a fraction of the side
    hue: float  # degrees, the maximum in either direction


def uniforms(
    seed: int, epochs: NDArray[np.int64], rows: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1): [n, count], row i a function of (seed, epochs[i], rows[i]).

    SplitMix64 as a counter-based generator (Steele, Lea and Flood, OOPSLA 2014), as one vector expression."""
    start = np.uint64(key(seed, "augment"))
    with np.errstate(over="ignore"):
        state = _mix(start + epochs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state + rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(state[:, None] + steps)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Transforms(NamedTuple):
    """The change of each image of a batch; float64 [n] each."""

    mirror: NDArray[np.float64]  # 0 or 1
    log_scale: NDArray[np.float64]  # log2
    angle: NDArray[np.float64]  # radians
    shift_x: NDArray[np.float64]  # fraction of the side
    shift_y: NDArray[np.float64]
    hue: NDArray[np.float64]  # radians

    def labels(self) -> Tensor:
        """The network's conditioning: float32 [n, LABELS], zero where nothing is changed."""
        columns = (
            self.mirror,
            self.log_scale,
            np.cos(self.angle) - 1,
            np.sin(self.angle),
            self.shift_x,
            self.shift_y,
            np.cos(self.hue) - 1,
            np.sin(self.hue),
        )
        return torch.from_numpy(np.stack(columns, axis=1).astype(np.float32))


def draw(augment: Augment, seed: int, epochs: NDArray[np.int64], rows: NDArray[np.int64]) -> Transforms:
    """Draw the changes of the images `rows` [n] as they are seen in `epochs` [n]."""
    u = uniforms(seed, epochs, rows, DRAWS).T
    happens = u[:4] < augment.probability  # geometry: scale, angle, shift; colour
    normal = _normal(u[4:7])
    return Transforms(
        mirror=np.where(augment.mirror & (u[7] < 0.5) & (augment.probability > 0), 1.0, 0.0),
        log_scale=np.where(happens[0], normal[0] * augment.scale, 0.0),
        angle=np.where(happens[1], (2 * u[8] - 1) * math.radians(augment.rotate), 0.0),
        shift_x=np.where(happens[2], normal[1] * augment.shift, 0.0),
        shift_y=np.where(happens[2], normal[2] * augment.shift, 0.0),
        # Given that it is below `probability`, this number is uniform up to there, so it also gives the angle.
        hue=np.where(
            happens[3], (2 * u[3] / max(augment.probability, 1e-9) - 1) * math.radians(augment.hue), 0.0
        ),
    )


def _normal(u: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard normal numbers by the inverse distribution function, clipped at 3.5 standard deviations."""
    clipped = torch.from_numpy(np.clip(u, 2.4e-4, 1 - 2.4e-4))
    normal: NDArray[np.float64] = torch.special.ndtri(clipped).numpy()
    return normal


def apply(images: Tensor, transforms: Transforms) -> Tensor:
    """Change float32 images [n,3,H,W] in 0 to 255; unchanged images keep their bits.

    Bilinear, with border pixels repeated outside. Hue is a rotation about the grey axis (Rec. 601 luma)."""
    device = images.device
    mirrored = torch.from_numpy(transforms.mirror > 0).to(device)[:, None, None, None]
    images = torch.where(mirrored, images.flip(-1), images)
    geometry = (transforms.log_scale, transforms.angle, transforms.shift_x, transforms.shift_y)
    moved = np.flatnonzero(np.any([values != 0 for values in geometry], axis=0))
    if len(moved):
        maps = _matrices(transforms, moved, images.shape[2] / images.shape[3]).to(device)
        grid = F.affine_grid(maps, [len(moved), *images.shape[1:]], align_corners=False)
        images[moved] = F.grid_sample(images[moved], grid, padding_mode="border", align_corners=False)
    turned = np.flatnonzero(transforms.hue != 0)
    if len(turned):
        maps = _hue_matrices(transforms.hue[turned]).to(device)
        images[turned] = torch.einsum("nij,njhw->nihw", maps, images[turned])
    return images


def _matrices(transforms: Transforms, rows: NDArray[np.int64], aspect: float) -> Tensor:
    """Inverse maps, from output to input coordinates in [-1, 1], of images of `aspect` height / width: float32
    [n, 2, 3]."""
    size, angle = 2.0 ** transforms.log_scale[rows], transforms.angle[rows]
    cos, sin = np.cos(angle) / size, np.sin(angle) / size
    x, y = -2 * transforms.shift_x[rows], -2 * transforms.shift_y[rows]
    down, across = sin * aspect, sin / aspect  # rotations are of pixels, coordinates of halves of the sides
    top, bottom = [cos, down, cos * x + down * y], [-across, cos, -across * x + cos * y]
    return torch.from_numpy(np.stack([*top, *bottom], axis=1).reshape(-1, 2, 3).astype(np.float32))


_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def _hue_matrices(hue: NDArray[np.float64]) -> Tensor:
    """Rotations of chroma: float32 [n, 3, 3]; each row sums to 1, so that greys stay."""
    turn = np.zeros((len(hue), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(hue)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(hue), np.sin(hue)
    return torch.from_numpy((np.linalg.inv(_TO_YIQ) @ turn @ _TO_YIQ).astype(np.float32))
