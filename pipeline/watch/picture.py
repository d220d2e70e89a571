"""The numbers of judged snapshots as curves and as CSV, and a film strip: the same captions and seeds over time."""

from __future__ import annotations

import csv
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROWS = 12  # of the strip, at most: the first snapshot, the last one, and evenly spread ones
CURVES = {
    "watch/kid": "kernel distance, random features",
    "watch/top_octave": "log ratio of power, top octave",
}


def row_of(folder: Path, nimg: int) -> Path:
    """The PNG with the samples of one snapshot."""
    return folder / "rows" / f"nimg-{nimg:012d}.png"


def save_row(folder: Path, nimg: int, images: Tensor) -> None:
    """Write uint8 [n,3,r,r] of one snapshot side by side."""
    from PIL import Image

    path = row_of(folder, nimg)
    path.parent.mkdir(exist_ok=True)
    row = torch.cat(list(F.pad(images, (2, 2, 2, 2), value=255)), dim=2)  # [3, r + 4, n (r + 4)]
    Image.fromarray(row.permute(1, 2, 0).contiguous().numpy()).save(path)


def write_csv(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """The numbers over nimg, without times."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["nimg", "resolution", *(name.removeprefix("watch/") for name in CURVES)])
        for record in records:
            values = (f"{record['metrics'][name]:.6g}" for name in CURVES)
            writer.writerow([record["nimg"], record["resolution"], *values])


def draw(folder: Path, records: Sequence[dict[str, Any]], captions: Sequence[str]) -> None:
    """Write watch.png: the curves, and below them a row of samples for each of at most ROWS snapshots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(ROWS, len(records))
    shown = [records[i] for i in np.linspace(0, len(records) - 1, count).round().astype(int)]
    figure = Figure(figsize=(9, 3.4 + 1.1 * count), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 1, height_ratios=[2.8, 0.6 + 1.1 * count])
    above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    for axes, (name, title) in zip(above.subplots(1, 2), CURVES.items(), strict=True):
        draw_curve(axes, records, name)
        axes.set_title(title, fontsize=9)
    strip = np.atleast_1d(below.subplots(count, 1))
    for axes, record in zip(strip, shown, strict=True):
        draw_row(axes, row_of(folder, record["nimg"]), record["nimg"])
    write_captions(strip[0], captions)
    figure.savefig(folder / "watch.png")


def draw_curve(axes: Axes, records: Sequence[dict[str, Any]], name: str) -> None:
    """One metric over nimg; a line for each resolution. Both metrics are 0 for real images."""
    for resolution in sorted({record["resolution"] for record in records}):
        own = [record for record in records if record["resolution"] == resolution]
        values = [record["metrics"][name] for record in own]
        axes.plot([record["nimg"] for record in own], values, marker=".", label=f"{resolution} px")
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("training images", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7)


def draw_row(axes: Axes, path: Path, nimg: int) -> None:
    """The samples of one snapshot, beside its nimg."""
    from PIL import Image

    with Image.open(path) as image:
        axes.imshow(np.asarray(image), interpolation="nearest")
    axes.set_ylabel(f"{nimg:,}", fontsize=8, rotation=0, ha="right", va="center")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def write_captions(axes: Axes, captions: Sequence[str]) -> None:
    """The captions, above a row of as many samples."""
    left, right = axes.get_xlim()
    width = (right - left) / len(captions)
    for i, caption in enumerate(captions):
        words = "\n".join(textwrap.wrap(caption, 15, max_lines=3, placeholder="\u2026"))
        axes.text(left + (i + 0.5) * width, -0.04 * width, words, fontsize=7, ha="center", va="bottom")
