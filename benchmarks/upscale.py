"""Held-out images enlarged two or four times: by a fine-tuned and a refined model, bicubic and Lanczos.

    python -m benchmarks.upscale [--factor 2|4] [--model models/finetuned] [--refined models/refined]
                                 [--data data/prepared] [--limit 256] [--sheet FILE.png]

The small images are means over 2x2 or 4x4 px of the test split, rounded to bytes. PSNR and SSIM (Wang et al. 2004)
are means over images, against the originals; KID is on whitened features as in the evaluation (`randconv` and
`lite2`), between the test split and its enlarged images (the same images, so that no floor applies). Sharpness is
the log ratio of power in the top octave to the originals'; "off" is the maximum distance between a mean of the
enlarged image and the small image's pixel. Interpolation is Pillow's; "projected" corrects its means, as our
method does. LPIPS is left out: the weights of its networks come with no package that is installed here.

The sheet shows details of eight images, the same ones in every run on the same data: the small image, bicubic and
Lanczos interpolation, the fine-tuned model, the refined one, and the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.judging import compare, kids, model_parser, whitened
from benchmarks.measure import machine, table
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.features import lite2, randconv
from pipeline.evaluation.metrics import log_power_gap, sharpness
from pipeline.inference.upscaling import UpscaleSettings, project_to_low_band, upscale
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import pool
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.prepare.framing import box_mean

Pixels = NDArray[np.uint8]
Float64 = NDArray[np.float64]
Method = Callable[[Pixels, Conditioning], Pixels]  # (small [H,W,3], caption) to [fH,fW,3]

STEPS = (1, 2, 8, 16)
REFINED_STEPS = (1, 8)
SHEET = ("nearest", "bicubic", "lanczos", "fine-tuned, 8 steps", "refined, 1 step")
SHEET_ROWS = 8
SHEET_ZOOM = 3
HEADERS = ["PSNR", "SSIM", "KID randconv", "KID lite2", "sharpness", "off", "pictures/s"]


def psnr(x: Pixels, y: Pixels) -> float:
    """Peak signal-to-noise ratio of two images, in dB."""
    error = float(np.mean((x.astype(np.float64) - y) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def ssim(x: Pixels, y: Pixels) -> float:
    """Structural similarity of two images [H,W,3] (Wang et al. 2004, eq. 13): 11x11 Gaussian windows of 1.5 px
    that lie inside, K1 = 0.01, K2 = 0.03, on luma (Rec. 601)."""
    a, b = (torch.from_numpy(luma(image))[None, None] for image in (x, y))
    place = torch.arange(11, dtype=torch.float64) - 5
    line = (-(place**2) / (2 * 1.5**2)).exp()
    window = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(z: torch.Tensor) -> torch.Tensor:
        return F.conv2d(z, window)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ma, mb = mean(a), mean(b)
    va, vb, vab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    similar = (2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    return float(similar.mean())


def luma(image: Pixels) -> Float64:
    """[H,W] in 0..255."""
    grey: Float64 = image @ np.array([0.299, 0.587, 0.114])
    return grey


def resampled(filter: Image.Resampling, factor: int = 2) -> Method:
    """Interpolation by Pillow."""

    def enlarge(small: Pixels, _: Conditioning) -> Pixels:
        size = (factor * small.shape[1], factor * small.shape[0])
        return np.array(Image.fromarray(small).resize(size, filter))

    return enlarge


def projected(method: Method) -> Method:
    """`method`, its result corrected to have the small image as its means."""

    def fitted(high: Tensor, low: Tensor) -> Tensor:
        twice = high.shape[-1] == 2 * low.shape[-1]
        return project_to_low_band(high, low if twice else fitted(pool(high), low).clamp(0, 255))

    def enlarge(small: Pixels, text: Conditioning) -> Pixels:
        high, low = (torch.from_numpy(p).permute(2, 0, 1).float() for p in (method(small, text), small))
        pixels: Pixels = fitted(high, low).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return pixels

    return enlarge


def ours(
    snapshot: Snapshot, steps: int, caption: bool = True, project: bool = True, factor: int = 2
) -> Method:
    """The model, with the caption or without."""

    def enlarge(small: Pixels, text: Conditioning) -> Pixels:
        text = text if caption else text.drop_captions()
        return upscale(snapshot, small, text, 0, UpscaleSettings(factor, steps, project=project))

    return enlarge


def methods(snapshot: Snapshot, refined: Snapshot | None = None, factor: int = 2) -> dict[str, Method]:
    """The methods to compare, by name."""
    filters = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
    filters["lanczos"] = Image.Resampling.LANCZOS
    named = {name: resampled(filter, factor) for name, filter in filters.items()}
    for name in ("bicubic", "lanczos"):
        named[f"{name}, projected"] = projected(named[name])
    models: dict[str, tuple[Snapshot, tuple[int, ...], int]] = {"fine-tuned": (snapshot, STEPS, 8)}
    if refined is not None:
        models["refined"] = (refined, REFINED_STEPS, 1)
    for name, (model, counts, own) in models.items():
        named |= {f"{name}, {steps_of(count)}": ours(model, count, factor=factor) for count in counts}
        named[f"{name}, {steps_of(own)}, no caption"] = ours(model, own, caption=False, factor=factor)
        named[f"{name}, {steps_of(own)}, not projected"] = ours(model, own, project=False, factor=factor)
    return named


def steps_of(count: int) -> str:
    """The number in words."""
    return "1 step" if count == 1 else f"{count} steps"


def quality_table(
    snapshot: Snapshot,
    data: PreparedDataset,
    limit: int = 256,
    sheet: Path | None = None,
    factor: int = 2,
    refined: Snapshot | None = None,
) -> str:
    """The table over the first `limit` test images; `sheet` shows some of them."""
    size, rows = snapshot.resolution, data.split("test")[:limit]
    real = _at(data.images(rows), size)
    small = [box_mean(image, factor) for image in real]
    texts = [data.text([data.caption_of(int(row))]) for row in rows]
    features = whitened([randconv(size), lite2(size)], _batch(_at(data.images(data.split("train")), size)))

    def enlarge(method: Method) -> list[Pixels]:
        return [method(image, text) for image, text in zip(small, texts, strict=True)]

    def cells(name: str, images: list[Pixels], seconds: float) -> list[str]:
        octaves = (sharpness(_batch(each)).top_octave for each in (real, images))
        off = max(np.abs(_means(image, factor) - s).max() for image, s in zip(images, small, strict=True))
        return [
            name,
            f"{np.mean(list(map(psnr, images, real))):.2f}",
            f"{np.mean(list(map(ssim, images, real))):.4f}",
            *(f"{value:.3f}" for value in kids(features, _batch(real), _batch(images)).values()),
            f"{log_power_gap(*octaves):+.2f}",
            f"{off:.2f}",
            f"{len(images) / seconds:.3g}",
        ]

    compared = methods(snapshot, refined, factor)
    lines, results = compare({name: partial(enlarge, method) for name, method in compared.items()}, cells)
    if sheet is not None:
        by_name = dict(zip(compared, results, strict=True))
        _write_sheet(sheet, [*(by_name[name] for name in SHEET if name in by_name), real])
    return f"{len(real)} pictures of {size} px.\n\n" + table([f"{factor}x", *HEADERS], lines)


def _means(image: Pixels, factor: int) -> Float64:
    height, width, _ = image.shape
    means: Float64 = image.reshape(height // factor, factor, width // factor, factor, 3).mean((1, 3))
    return means


def _at(images: torch.Tensor, size: int) -> list[Pixels]:
    pixels = images.permute(0, 2, 3, 1).numpy()
    factor = pixels.shape[1] // size
    return [box_mean(image, factor) if factor > 1 else image for image in pixels]


def _batch(images: list[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _write_sheet(path: Path, columns: list[list[Pixels]]) -> None:
    """A column for each method: the middle half of evenly spaced images, enlarged."""
    chosen = np.linspace(0, len(columns[0]) - 1, min(SHEET_ROWS, len(columns[0]))).astype(int)
    rows = [np.concatenate([_middle(column[i]) for column in columns], axis=1) for i in chosen]
    sheet = Image.fromarray(np.concatenate(rows))
    size = (SHEET_ZOOM * sheet.width, SHEET_ZOOM * sheet.height)
    sheet.resize(size, Image.Resampling.NEAREST).save(path, optimize=True)


def _middle(image: Pixels) -> Pixels:
    """The middle half, in a white frame of one px."""
    height, width, _ = image.shape
    half = image[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return np.pad(half, ((1, 1), (1, 1), (0, 0)), constant_values=255)


def main() -> None:
    """Print the table."""
    parser = model_parser(__doc__)
    parser.add_argument("--factor", type=int, choices=(2, 4), default=2, help="(2)")
    parser.add_argument("--limit", type=int, default=256, help="maximum number of images (256)")
    parser.add_argument("--refined", type=Path, default=Path("models/refined"), help="(models/refined)")
    parser.add_argument("--sheet", type=Path, help="PNG file to write, for a look at details")
    args = parser.parse_args()
    print(machine(["torch", "pillow"]) + "\n")
    data = PreparedDataset(args.data)
    refined = load_snapshot(args.refined) if args.refined.exists() else None
    if refined is None or not refined.config.is_refined:
        print(f"{args.refined} is {'missing' if refined is None else 'not refined'}: left out.\n")
        refined = None
    print(quality_table(load_snapshot(args.model), data, args.limit, args.sheet, args.factor, refined))


if __name__ == "__main__":
    main()
