"""Samplers and guides of one trained model, on held-out captions.

    python -m benchmarks.samplers [--model models/finetuned] [--pictures 3]

The same seeds for all rows, as many pictures of each caption as `--pictures` says. KID (against the test split, on
features whitened by the training split), precision, recall and caption top-1 are those of the ablations; the top
octave is the log ratio of its power to that of real pictures. Rows with early weights need a model that keeps them
(`pretrain.early_images` and `finetune.early_images` in params.yaml).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.ablations import run
from benchmarks.measure import machine, table
from pipeline.adversarial.few_step import generate_images
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation.metrics import compare_sharpness, sharpness
from pipeline.models.denoiser import set_dtype
from pipeline.models.snapshot import Snapshot, load_snapshot
from pipeline.training.context import precision
from pipeline.training.reports import save_grid

NUMBERS = ("kid_randconv", "kid_lite2", "precision", "recall")
HEADERS = [
    "sampler, steps",
    "guide, w",
    "calls",
    "KID randconv",
    "KID lite2",
    *NUMBERS[2:],
    "top-1",
    "top octave",
]


class Way(NamedTuple):
    """One row."""

    sampler: str
    steps: int
    guide: str = "no_text"
    guidance: float = 1.5


WAYS = (
    Way("heun", 16),
    Way("heun", 24),
    Way("dpmpp_2m", 32),
    Way("sde_dpmpp_2m", 16),
    Way("sde_dpmpp_2m", 32),
    Way("sde_dpmpp_2m", 32, guidance=1.0),
    Way("sde_dpmpp_2m", 32, "early", 1.3),
    Way("sde_dpmpp_2m", 32, "early", 1.6),
    Way("sde_dpmpp_2m", 32, "low", 1.5),
    Way("heun", 16, "early", 1.3),
)


def compare(
    snapshot: Snapshot, dataset: PreparedDataset, pictures: int, ways: Sequence[Way], sheet: Path | None
) -> str:
    """The table; with `sheet` a picture of some, a line for each row."""
    by = run.judges(dataset, snapshot.resolution)
    condition, which, seeds, text = run.wanted(dataset, "", pictures)
    real = run.images_at(dataset, condition.rows, snapshot.resolution)

    def vectors(ids: Sequence[int]) -> np.ndarray:
        return dataset.text(ids).pooled.double().numpy()

    sharp, lines, shown = sharpness(real), [], []
    for way in ways:
        made = generate_images(
            snapshot, text, seeds, way.steps, way.guidance, sampler=way.sampler, guide=way.guide
        )
        found = run.measure(made.images, which, condition, real, by, vectors)
        octave = compare_sharpness(sharp, sharpness(made.images))
        lines.append(
            [
                f"{way.sampler}, {way.steps}",
                f"{way.guide}, {way.guidance:g}" if way.guidance != 1 else "none",
                str(made.nfe),
                *(f"{found[name]:.3g}" for name in NUMBERS),
                f"{found['retrieval']:.1%}",
                f"{octave['top_octave']:.2f}",
            ]
        )
        print(", ".join(lines[-1]), file=sys.stderr, flush=True)
        shown.append(made.images[torch.linspace(0, len(condition.rows) - 1, 12).long()])
    if sheet is not None:
        save_grid(sheet, torch.cat(shown), columns=12)
    return f"{len(seeds)} pictures.\n\n{table(HEADERS, lines)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path("models/finetuned"))
    parser.add_argument("--data", type=Path, default=Path("data/prepared"))
    parser.add_argument("--pictures", type=int, default=3, help="of each held-out caption (3)")
    parser.add_argument("--sheet", type=Path, help="file for a picture of some")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    snapshot = load_snapshot(args.model, device)
    for denoiser in filter(None, (snapshot.denoiser, snapshot.early)):
        set_dtype(denoiser, precision("auto", device))
    ways = [way for way in WAYS if snapshot.early is not None or way.guide != "early"]
    print(f"{machine(['torch'])}\n")
    print(compare(snapshot, PreparedDataset(args.data), args.pictures, ways, args.sheet))


if __name__ == "__main__":
    main()
