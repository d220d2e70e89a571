"""Held-out pictures made two or four times as large: this model, bicubic and Lanczos interpolation.

    python -m benchmarks.upscale [--factor 2|4] [--model models/finetuned] [--data data/prepared] [--limit 256]

The small pictures are means of 2x2 or 4x4 px of the test split, rounded to bytes. PSNR and SSIM (Wang et al. 2004)
are means over pictures, against the originals; KID is on whitened features as in the evaluation (`randconv` and
`lite2`), between the test split and what was made of it (the same pictures, so that no floor applies). Sharpness is
the log ratio of power in the top octave, 0 being that of the originals; "off" is how far such a mean is from the
pixel it came from, at most. Interpolation is Pillow's; "projected" gives it that mean, as ours has it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measure import machine, table
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.features import Extractor, Whitening, lite2, randconv
from pipeline.evaluation.metrics import kid, log_power_gap, sharpness
from pipeline.inference.upscaling import SIGMA_LOW, project_to_low_band, upscale
from pipeline.models.conditioning import Conditioning
from pipeline.models.resample import pool
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.prepare.framing import box_mean

Pixels = NDArray[np.uint8]
Float64 = NDArray[np.float64]
Method = Callable[[Pixels, Conditioning], Pixels]  # (small [H,W,3], caption) to [fH,fW,3]

STEPS = (1, 2, 8, 16)
HEADERS = ["PSNR", "SSIM", "KID randconv", "KID lite2", "sharpness", "off", "pictures/s"]


def psnr(x: Pixels, y: Pixels) -> float:
    """Peak signal-to-noise ratio of two pictures, in dB."""
    error = float(np.mean((x.astype(np.float64) - y) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


def ssim(x: Pixels, y: Pixels) -> float:
    """Structural similarity of two pictures [H,W,3] (Wang et al. 2004, eq. 13): 11x11 Gaussian windows of 1.5 px
    that lie inside, K1 = 0.01, K2 = 0.03, on luma (Rec. 601)."""
    a, b = (torch.from_numpy(luma(picture))[None, None] for picture in (x, y))
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


def luma(picture: Pixels) -> Float64:
    """[H,W] in 0..255."""
    grey: Float64 = picture @ np.array([0.299, 0.587, 0.114])
    return grey


def resampled(filter: Image.Resampling, factor: int = 2) -> Method:
    """Interpolation by Pillow."""

    def enlarge(small: Pixels, _: Conditioning) -> Pixels:
        size = (factor * small.shape[1], factor * small.shape[0])
        return np.array(Image.fromarray(small).resize(size, filter))

    return enlarge


def projected(method: Method) -> Method:
    """What `method` makes, with the small picture as its means."""

    def fitted(high: Tensor, low: Tensor) -> Tensor:
        twice = high.shape[-1] == 2 * low.shape[-1]
        return project_to_low_band(high, low if twice else fitted(pool(high), low).clamp(0, 255))

    def enlarge(small: Pixels, text: Conditioning) -> Pixels:
        high, low = (torch.from_numpy(p).permute(2, 0, 1).float() for p in (method(small, text), small))
        made: Pixels = fitted(high, low).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return made

    return enlarge


def ours(
    snapshot: Snapshot, steps: int, caption: bool = True, project: bool = True, factor: int = 2
) -> Method:
    """The model, with the caption or without."""

    def enlarge(small: Pixels, text: Conditioning) -> Pixels:
        text = text if caption else text.without(torch.ones(1, dtype=torch.bool))
        return upscale(snapshot, small, text, 0, factor, steps, SIGMA_LOW, project)

    return enlarge


def methods(snapshot: Snapshot, factor: int = 2) -> dict[str, Method]:
    """What is compared, by name."""
    filters = {"nearest": Image.Resampling.NEAREST, "bicubic": Image.Resampling.BICUBIC}
    filters["lanczos"] = Image.Resampling.LANCZOS
    found = {name: resampled(filter, factor) for name, filter in filters.items()}
    found["lanczos, projected"] = projected(found["lanczos"])
    found |= {f"crescendo, {steps} steps": ours(snapshot, steps, factor=factor) for steps in STEPS}
    found["8 steps, no caption"] = ours(snapshot, 8, caption=False, factor=factor)
    found["8 steps, not projected"] = ours(snapshot, 8, project=False, factor=factor)
    return found


def quality_table(
    snapshot: Snapshot, data: PreparedDataset, limit: int = 256, sheet: Path | None = None, factor: int = 2
) -> str:
    """The table, over at most `limit` test pictures; `sheet` shows some of them."""
    size = snapshot.resolution
    rows = data.split("test")[:limit]
    real = _at(data.images(rows), size)
    small = [box_mean(picture, factor) for picture in real]
    texts = [data.text([data.caption_of(int(row))]) for row in rows]
    extractors = [randconv(size), lite2(size)]
    fitted = [Whitening.fit(e(_batch(_at(data.images(data.split("train")), size)))) for e in extractors]
    shown, lines = [], []
    for name, method in methods(snapshot, factor).items():
        start = time.perf_counter()
        made = [method(picture, text) for picture, text in zip(small, texts, strict=True)]
        seconds = time.perf_counter() - start
        shown.append(made)
        cells = [f"{np.mean(list(map(psnr, made, real))):.2f}", f"{np.mean(list(map(ssim, made, real))):.4f}"]
        cells += [f"{_kid(*pair, real, made):.3f}" for pair in zip(extractors, fitted, strict=True)]
        gap = log_power_gap(sharpness(_batch(real)).top_octave, sharpness(_batch(made)).top_octave)
        off = max(np.abs(_means(m, factor) - s).max() for m, s in zip(made, small, strict=True))
        lines.append([name, *cells, f"{gap:+.2f}", f"{off:.2f}", f"{len(made) / seconds:.3g}"])
    if sheet is not None:
        _write_sheet(sheet, [*shown, real])
    return f"{len(real)} pictures of {size} px.\n\n" + table([f"{factor}x", *HEADERS], lines)


def _means(picture: Pixels, factor: int) -> Float64:
    height, width, _ = picture.shape
    means: Float64 = picture.reshape(height // factor, factor, width // factor, factor, 3).mean((1, 3))
    return means


def _at(images: torch.Tensor, size: int) -> list[Pixels]:
    pictures = images.permute(0, 2, 3, 1).numpy()
    factor = pictures.shape[1] // size
    return [box_mean(picture, factor) if factor > 1 else picture for picture in pictures]


def _batch(pictures: list[Pixels]) -> torch.Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _kid(extract: Extractor, white: Whitening, real: list[Pixels], made: list[Pixels]) -> float:
    return kid(white(extract(_batch(real))), white(extract(_batch(made))))


def _write_sheet(path: Path, columns: list[list[Pixels]], count: int = 12) -> None:
    chosen = np.linspace(0, len(columns[0]) - 1, min(count, len(columns[0]))).astype(int)
    rows = [np.concatenate([column[i] for column in columns], axis=1) for i in chosen]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/finetuned"))
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    parser.add_argument("--factor", type=int, choices=(2, 4), default=2, help="(2)")
    parser.add_argument("--limit", type=int, default=256, help="pictures, at most (256)")
    parser.add_argument("--sheet", type=Path, help="PNG file: every method in turn, then the original")
    args = parser.parse_args()
    print(machine(["torch", "pillow"]) + "\n")
    data = PreparedDataset(args.data)
    print(quality_table(load_snapshot(args.model), data, args.limit, args.sheet, args.factor))


if __name__ == "__main__":
    main()
