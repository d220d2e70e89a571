"""Files in the reports of a training stage: sample grids, the plot of kernel sizes, curves as CSV."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.models.shape import Images, on_one_canvas

GRID = 8  # training captions in a sample grid, and as many held-out ones
COLUMNS = 8  # of a sample grid
SAMPLES = "samples"  # folder in a run folder, of the grids nimg-<12 digits>.png
PADDING = 2  # px between the images of a grid


def save_grid(path: Path, images: Images, columns: int) -> None:
    """Write uint8 images [3,H,W] as a PNG grid; smaller ones than others in the middle of their places. Readers see
    the whole file or none."""
    from PIL import Image
    from torchvision.utils import make_grid

    grid = make_grid(on_one_canvas(images), nrow=columns, padding=PADDING, pad_value=255)
    content = io.BytesIO()
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(content, "PNG")
    artifacts.write_atomic(path, content.getvalue())


def save_kernels(path: Path, sigmas: Sequence[float], curves: dict[str, list[float]]) -> None:
    """Plot {block: mean effective kernel in px} against ln sigma."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for block, sizes in curves.items():
        axes.plot([math.log(sigma) for sigma in sigmas], sizes, marker=".", label=block)
    axes.set(xlabel="ln sigma", ylabel="mean effective kernel, px")
    axes.legend(fontsize=7)
    figure.savefig(path)


def write_curves(path: Path, records: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Write the records that have all of `names` as CSV over nimg; without times, so that equal runs write equal
    files."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["nimg", *names])
        for record in records:
            if all(name in record["metrics"] for name in names):
                writer.writerow([record["nimg"], *(f"{record['metrics'][name]:.6g}" for name in names)])
