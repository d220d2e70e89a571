"""Ways to sample one trained pyramid: coarse to fine at several lifts, at full resolution, with finished tiles.

    python -m benchmarks.coarse [--model models/finetuned] [--captions 128] [--out FOLDER]

Images of held-out captions, from the same seeds for all ways, with the model's own guidance; at full resolution
the noise has the same low band as coarse to fine at the model's own lift. Multiply-adds are counted during
sampling, guidance and halos of tiles included. KID is against the test split, on features whitened by the training
split (`lite2` where its package is installed). "moved" is the change that finished tiles make to images, in grey
levels: the mean, and the fraction of values that change by more than one. At full resolution every step runs the
whole pyramid; above the noise that a shell was trained for, its high band is a Wiener filter's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.judging import (
    SHEET_COLUMNS,
    Requests,
    compare,
    default_device,
    held_out_requests,
    kids,
    load_model,
    model_parser,
    sheet_rows,
    whitened,
)
from benchmarks.measure import machine, significant, table
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import generate
from pipeline.diffusion.guidance import Guided
from pipeline.diffusion.samplers import integrate
from pipeline.diffusion.schedule import grids, handover_of
from pipeline.diffusion.seeds import Draw, seeded_noise
from pipeline.errors import InputMissing
from pipeline.evaluation.features import Extractor, lite2, randconv
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, Estimate, ShellDenoiser, expand, pyramid_levels
from pipeline.models.resample import high_pass, pool, upsample
from pipeline.models.snapshot import Snapshot
from pipeline.training.reports import save_grid

LIFTS = (4.0, 8.0, 16.0)
BATCH = 32
HEADERS = [
    "way",
    "calls",
    "GMAC a picture",
    "ratio",
    "KID randconv",
    "KID lite2",
    "moved",
    "off",
    "pictures/s",
]


@dataclass
class WholePyramid:
    """All levels at every step, as one denoiser of the finest: sampling without coarse to fine."""

    finest: Denoiser
    handover: Sequence[float]

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise [B,3,R,R] at sigma [B]."""
        return self.estimate(self.finest, noisy, sigma, text).denoised

    def estimate(self, level: Denoiser, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Estimate:
        """Estimate of a level; F = 0 above the noise that it was trained for."""
        if not isinstance(level, ShellDenoiser):
            return level.estimate(noisy, sigma, text)
        below = self.estimate(level.below, pool(noisy), sigma / 2, text)
        estimate = level.add_octave(noisy, below, sigma, text)
        v, s = level.high_band_variance, expand(sigma, level.resolution)
        wiener = upsample(below.denoised) + high_pass(v / (v + s**2) * noisy)
        top = 2 * handover_of(self.handover, len(pyramid_levels(level)) - 2) * level.sigma_high_band
        return estimate._replace(denoised=torch.where(s > top, wiener, estimate.denoised))


def with_high_bands(low: Tensor, noise: Tensor) -> Tensor:
    """White noise [B,3,R,R] with the low band `low` [B,3,r,r] and the high bands of `noise`."""
    if low.shape[-1] == noise.shape[-1]:
        return low
    return upsample(with_high_bands(low, 2 * pool(noise))) / 2 + high_pass(noise)


@torch.no_grad()
def at_full_resolution(snapshot: Snapshot, text: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, int]:
    """Images uint8 [N,3,R,R] by the snapshot's sampler, and calls; the guide is the model without captions.

    The noise of a step has the same low band as coarse to fine, so that images differ in their high bands alone."""
    settings, denoiser, size = snapshot.config.sampling, snapshot.denoiser, snapshot.resolution
    device, pyramid = next(denoiser.parameters()).device, pyramid_levels(denoiser)
    scale = size / pyramid[0].resolution
    visited = grids(pyramid, settings)
    sigmas = torch.cat([visited[0], *(grid[1:] for grid in visited[1:])])
    coarse = [
        (level.resolution, i)
        for level, grid in zip(pyramid, visited, strict=True)
        for i in range(len(grid) - 1)
    ]
    whole = WholePyramid(denoiser, settings.handover)
    parts, nfe = [], 0
    for first in range(0, len(seeds), BATCH):
        rows = slice(first, first + BATCH)
        draw = seeded_noise(seeds[rows], device)

        def noise(step: int, draw: Draw = draw) -> Tensor:
            resolution, i = coarse[step]
            return with_high_bands(draw(f"step-{resolution}-{i}", resolution), draw(f"whole-{step}", size))

        guided = Guided(whole, settings.guidance, settings.guidance_interval, 1 / scale)
        x = with_high_bands(draw("noise", pyramid[0].resolution), draw("whole", size)) * float(sigmas[0])
        x = integrate(settings.sampler, guided, x, sigmas, text.select(rows).to(device), noise)
        parts.append(snapshot.statistics.to_uint8(x).cpu())
        nfe = guided.nfe
    return torch.cat(parts), nfe


def coarse_to_fine(
    snapshot: Snapshot, text: Conditioning, seeds: Sequence[int], **changes: Any
) -> tuple[Tensor, int]:
    """Images uint8 [N,3,R,R], and calls, with changes to the snapshot's sampling."""
    settings = replace(snapshot.config.sampling, guide="unconditional", **changes)
    generated = generate(snapshot, text, seeds, settings, BATCH)
    return generated.images, generated.nfe


Way = Callable[[Snapshot, Conditioning, Sequence[int]], tuple[Tensor, int]]


def ways(snapshot: Snapshot) -> dict[str, Way]:
    """By name; the others are compared with the first."""
    named: dict[str, Way] = {"full resolution": at_full_resolution}
    for c in LIFTS:
        named[f"lift {c:g}"] = partial(coarse_to_fine, handover=(c,), early_exit=False)
    named[f"lift {LIFTS[1]:g}, finish"] = partial(coarse_to_fine, handover=(LIFTS[1],), early_exit=True)
    return named


def extractors(resolution: int) -> list[Extractor]:
    """`randconv`, and `lite2` where it is installed."""
    try:
        return [randconv(resolution), lite2(resolution)]
    except InputMissing:
        return [randconv(resolution)]


class Counted(NamedTuple):
    """Samples uint8 [N,3,R,R], and what each took."""

    images: Tensor
    nfe: int
    macs: float  # multiply-adds


def counted(way: Way, snapshot: Snapshot, requests: Requests) -> Counted:
    """Sample, counting multiply-adds as they are done."""
    with FlopCounterMode(display=False) as counter:
        images, nfe = way(snapshot, requests.text, requests.seeds)
    return Counted(images, nfe, counter.get_total_flops() / 2 / len(images))


def coarse_table(snapshot: Snapshot, data: PreparedDataset, captions: int, folder: Path | None) -> str:
    """The table; images of each way, and a sheet of some, go to `folder`."""
    size, requests = snapshot.resolution, held_out_requests(data, 1, "coarse", captions)
    real = shrunk(data.images(data.split("test")), size)
    features = whitened(extractors(size), shrunk(data.images(data.split("train")), size))
    before: dict[str, Counted] = {}  # by way; for one with finished tiles, the same way without

    def cells(name: str, samples: Counted, seconds: float) -> list[str]:
        plain = before.setdefault(name.removesuffix(", finish"), samples)
        moved = (samples.images.int() - plain.images.int()).abs().double()
        kid = {e: f"{value:.3f}" for e, value in kids(features, real, samples.images).items()}
        return [
            name,
            str(samples.nfe),
            significant(samples.macs / 1e9),
            f"{next(iter(before.values())).macs / samples.macs:.2f}x",
            kid["randconv"],
            kid.get("lite2", ""),
            *(
                [f"{moved.mean():.2f}", f"{(moved > 1).double().mean():.1%}"]
                if plain is not samples
                else ["", ""]
            ),
            significant(len(samples.images) / seconds),
        ]

    named = ways(snapshot)
    lines, results = compare(
        {name: partial(counted, way, snapshot, requests) for name, way in named.items()}, cells
    )
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, samples in zip(named, results, strict=True):
            path = folder / f"{name.replace(', ', '-').replace(' ', '-')}.npz"
            np.savez_compressed(path, samples.images.numpy())
        shown = torch.cat([samples.images[sheet_rows(len(requests.seeds))] for samples in results])
        save_grid(folder / "ways.png", shown, columns=SHEET_COLUMNS)
    return f"{len(requests.seeds)} pictures of {size} px.\n\n" + table(HEADERS, lines)


def shrunk(images: Tensor, size: int) -> Tensor:
    """Box means of uint8 images [N,3,R,R] at `size` px, rounded."""
    while images.shape[-1] > size:
        images = torch.cat([pool(part.float()).round().to(torch.uint8) for part in images.split(256)])
    return images


def main() -> None:
    """Print the table."""
    parser = model_parser(__doc__)
    parser.add_argument("--captions", type=int, default=128, help="maximum number of held-out captions (128)")
    parser.add_argument("--out", type=Path, help="folder for images")
    args = parser.parse_args()
    device = default_device()
    name = f" {torch.cuda.get_device_name(device)}." if device.type == "cuda" else ""
    print(f"{machine(['torch'])}{name}\n")
    print(coarse_table(load_model(args.model), PreparedDataset(args.data), args.captions, args.out))


if __name__ == "__main__":
    main()
