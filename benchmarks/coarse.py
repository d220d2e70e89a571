"""Ways to sample one trained pyramid: coarse to fine at several lifts, whole at every step, tiles finished.

    python -m benchmarks.coarse [--model models/finetuned] [--captions 128] [--out FOLDER]

Pictures of held-out captions, the same seeds for all ways, guidance as the model has it; at full resolution noise
has the low band that it has coarse to fine at the model's own lift. Multiply-adds are counted while pictures are
made, guidance and halos of tiles included. KID is against the test split, on features whitened by the training
split (`lite2` where its package is installed). "moved" is how far finished tiles move pictures from those without,
in grey levels: the mean, and the share of values that are off by more than one. At full resolution every step runs
the whole pyramid; where the noise is above what a shell was trained for, the high band is its Wiener filter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import machine, significant, table
from benchmarks.scale import steps_at_levels
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import generate
from pipeline.diffusion.guidance import Guided
from pipeline.diffusion.noise import karras_sigmas
from pipeline.diffusion.pyramid import handover_of
from pipeline.diffusion.samplers import integrate
from pipeline.diffusion.seeds import Draw, seeded_noise
from pipeline.errors import InputMissing
from pipeline.evaluation.conditions import build_caption_set
from pipeline.evaluation.features import Extractor, Whitening, lite2, randconv
from pipeline.evaluation.metrics import kid
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import Denoiser, Estimate, ShellDenoiser, expand, pyramid_levels, set_dtype
from pipeline.models.resample import high_pass, pool, upsample
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.rng import key
from pipeline.training.context import precision
from pipeline.training.levels import SIGMA_MAX
from pipeline.training.reports import save_grid

LIFTS = (4.0, 8.0, 16.0)
SIGMA_MIN = 0.002
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
    """All levels at every step, as one denoiser of the finest: what there is without coarse to fine."""

    finest: Denoiser
    lift_at: float | Sequence[float]

    def __call__(self, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Tensor:
        """Denoise [B,3,R,R] at sigma [B]."""
        return self.estimate(self.finest, noisy, sigma, text).denoised

    def estimate(self, level: Denoiser, noisy: Tensor, sigma: Tensor, text: Conditioning) -> Estimate:
        """Of a level: F = 0 at noise that it was not trained for."""
        if not isinstance(level, ShellDenoiser):
            return level.estimate(noisy, sigma, text)
        below = self.estimate(level.below, pool(noisy), sigma / 2, text)
        made = level.add_octave(noisy, below, sigma, text)
        v, s = level.high_band_variance, expand(sigma, level.resolution)
        wiener = upsample(below.denoised) + high_pass(v / (v + s**2) * noisy)
        top = 2 * handover_of(self.lift_at, len(pyramid_levels(level)) - 2) * level.sigma_high_band
        return made._replace(denoised=torch.where(s > top, wiener, made.denoised))


def with_high_bands(low: Tensor, noise: Tensor) -> Tensor:
    """White noise [B,3,R,R]: its low band is the white noise `low` [B,3,r,r], its high bands those of `noise`."""
    if low.shape[-1] == noise.shape[-1]:
        return low
    return upsample(with_high_bands(low, 2 * pool(noise))) / 2 + high_pass(noise)


@torch.no_grad()
def at_full_resolution(snapshot: Snapshot, text: Conditioning, seeds: Sequence[int]) -> tuple[Tensor, int]:
    """Pictures uint8 [N,3,R,R] by the snapshot's sampler, and calls; guided without captions.

    The noise of a step has the low band that it has coarse to fine: pictures differ in their high bands alone."""
    sampling, denoiser, size = snapshot.config["sampling"], snapshot.denoiser, snapshot.resolution
    device, pyramid = next(denoiser.parameters()).device, pyramid_levels(denoiser)
    scale = size / pyramid[0].resolution
    sigmas = karras_sigmas(sampling["num_steps"], SIGMA_MAX * scale, SIGMA_MIN)
    counts = steps_at_levels(denoiser, sampling["num_steps"], sampling["lift"])
    coarse = [(level.resolution, i) for level, n in zip(pyramid, counts, strict=True) for i in range(n)]
    whole = WholePyramid(denoiser, sampling["lift"])
    parts, nfe = [], 0
    for first in range(0, len(seeds), BATCH):
        rows = slice(first, first + BATCH)
        draw = seeded_noise(seeds[rows], device)

        def noise(step: int, draw: Draw = draw) -> Tensor:
            resolution, i = coarse[step]
            return with_high_bands(draw(f"step-{resolution}-{i}", resolution), draw(f"whole-{step}", size))

        guided = Guided(whole, sampling["guidance"], tuple(sampling["guidance_interval"]), 1 / scale)
        x = with_high_bands(draw("noise", pyramid[0].resolution), draw("whole", size)) * float(sigmas[0])
        x = integrate(sampling["sampler"], guided, x, sigmas, text.select(rows).to(device), noise)
        parts.append(snapshot.statistics.to_uint8(x).cpu())
        nfe = guided.nfe
    return torch.cat(parts), nfe


def coarse_to_fine(
    snapshot: Snapshot, text: Conditioning, seeds: Sequence[int], **changes: Any
) -> tuple[Tensor, int]:
    """Pictures uint8 [N,3,R,R], and calls, with something of the snapshot's sampling changed."""
    config = snapshot.config | {"sampling": snapshot.config["sampling"] | changes}
    made = generate(snapshot._replace(config=config), text, seeds, batch_size=BATCH, guide="no_text")
    return made.images, made.nfe


Way = Callable[[Snapshot, Conditioning, Sequence[int]], tuple[Tensor, int]]


def ways(snapshot: Snapshot) -> dict[str, Way]:
    """By name; the first is what the others are compared with."""
    found: dict[str, Way] = {"full resolution": at_full_resolution}
    for c in LIFTS:
        found[f"lift {c:g}"] = partial(coarse_to_fine, lift=c, finish=False)
    return found | {f"lift {LIFTS[1]:g}, finish": partial(coarse_to_fine, lift=LIFTS[1], finish=True)}


def extractors(resolution: int) -> list[Extractor]:
    """`randconv`, and `lite2` where it is installed."""
    try:
        return [randconv(resolution), lite2(resolution)]
    except InputMissing:
        return [randconv(resolution)]


def compare(snapshot: Snapshot, data: PreparedDataset, captions: int, folder: Path | None) -> str:
    """The table; pictures of each way, and a sheet of some, go to `folder`."""
    size = snapshot.resolution
    condition = build_caption_set(data, "heldout", "test", captions, captions, 0)
    text, seeds = data.text(condition.caption_ids), [key(0, f"coarse/{name}") for name in condition.captions]
    real, known = (
        shrunk(data.images(data.split("test")), size),
        shrunk(data.images(data.split("train")), size),
    )
    judges = [(judge, Whitening.fit(judge(known))) for judge in extractors(size)]
    lines, sheet, most = [], [], 0.0
    same: dict[str, Tensor] = {}  # pictures of each way, but for tiles that were finished
    for name, way in ways(snapshot).items():
        with FlopCounterMode(display=False) as counter:
            start = time.perf_counter()
            made, nfe = way(snapshot, text, seeds)
            seconds = time.perf_counter() - start
        macs = counter.get_total_flops() / 2 / len(made)
        most = most or macs
        moved = (made.int() - same.setdefault(name.removesuffix(", finish"), made).int()).abs().double()
        found = {e.name: f"{kid(white(e(real)), white(e(made))):.3f}" for e, white in judges}
        lines.append(
            [
                name,
                str(nfe),
                significant(macs / 1e9),
                f"{most / macs:.2f}x",
                found["randconv"],
                found.get("lite2", ""),
                *(
                    [f"{moved.mean():.2f}", f"{(moved > 1).double().mean():.1%}"]
                    if "finish" in name
                    else ["", ""]
                ),
                significant(len(made) / seconds),
            ]
        )
        sheet.append(made[torch.linspace(0, len(made) - 1, 12).long()])
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(folder / f"{name.replace(', ', '-').replace(' ', '-')}.npz", made.numpy())
    if folder is not None:
        save_grid(folder / "ways.png", torch.cat(sheet), columns=12)
    return f"{len(seeds)} pictures of {size} px.\n\n" + table(HEADERS, lines)


def shrunk(images: Tensor, size: int) -> Tensor:
    """Box means of uint8 images [N,3,R,R] at `size` px, rounded."""
    while images.shape[-1] > size:
        images = torch.cat([pool(part.float()).round().to(torch.uint8) for part in images.split(256)])
    return images


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/finetuned"))
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    parser.add_argument("--captions", type=int, default=128, help="held-out ones, at most (128)")
    parser.add_argument("--out", type=Path, help="folder for pictures")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot = load_snapshot(args.model, device)
    set_dtype(snapshot.denoiser, precision("auto", device))
    name = f" {torch.cuda.get_device_name(device)}." if device.type == "cuda" else ""
    print(f"{machine(['torch'])}{name}\n")
    print(compare(snapshot, PreparedDataset(args.data), args.captions, args.out))


if __name__ == "__main__":
    main()
