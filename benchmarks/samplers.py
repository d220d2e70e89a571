"""Samplers and guides of one trained model, on held-out captions.

    python -m benchmarks.samplers [--model models/finetuned] [--pictures 3]

All rows have the same seeds, `--pictures` of them for each caption. KID (against the test split, on features
whitened by the training split), precision, recall and caption top-1 are measured as in the ablations; "top octave"
is the log ratio of its power to the real images'. Rows with early weights need a model that keeps them
(`pretrain.early_images` and `finetune.early_images` in params.yaml).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.judging import (
    SHEET_COLUMNS,
    compare,
    fit_judges,
    held_out_requests,
    images_at,
    load_model,
    model_parser,
    sheet_rows,
)
from benchmarks.measure import machine, table
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import Generated, generate
from pipeline.evaluation.metrics import compare_sharpness, sharpness
from pipeline.models.snapshot import Snapshot
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
    guide: str = "unconditional"
    guidance: float = 1.5


WAYS = (
    Way("heun", 16),
    Way("heun", 24),
    Way("dpmpp_2m", 32),
    Way("sde_dpmpp_2m", 16),
    Way("sde_dpmpp_2m", 32),
    Way("sde_dpmpp_2m", 32, guidance=1.0),
    Way("sde_dpmpp_2m", 32, "early_weights", 1.3),
    Way("sde_dpmpp_2m", 32, "early_weights", 1.6),
    Way("sde_dpmpp_2m", 32, "low_band", 1.5),
    Way("heun", 16, "early_weights", 1.3),
)


def sampler_table(
    snapshot: Snapshot, dataset: PreparedDataset, draws: int, ways: Sequence[Way], sheet: Path | None
) -> str:
    """The table, of `draws` samples of each held-out caption; `sheet` shows some of them, a line for each way."""
    judges, requests = fit_judges(dataset, snapshot.resolution), held_out_requests(dataset, draws)
    captions = requests.captions.rows
    sharp = sharpness(images_at(dataset, captions, snapshot.resolution))

    def sample(way: Way) -> Generated:
        settings = replace(
            snapshot.config.sampling,
            num_steps=way.steps,
            sampler=way.sampler,
            guide=way.guide,
            guidance=way.guidance,
        )
        return generate(snapshot, requests.text, requests.seeds, settings)

    def cells(way: Way, samples: Generated, _: float) -> list[str]:
        numbers = judges.measure(samples.images, requests)
        octave = compare_sharpness(sharp, sharpness(samples.images))["top_octave"]
        return [
            f"{way.sampler}, {way.steps}",
            f"{way.guide}, {way.guidance:g}" if way.guidance != 1 else "none",
            str(samples.nfe),
            *(f"{numbers[name]:.3g}" for name in NUMBERS),
            f"{numbers['retrieval']:.1%}",
            f"{octave:.2f}",
        ]

    lines, results = compare({way: partial(sample, way) for way in ways}, cells)
    if sheet is not None:
        shown = torch.cat([result.images[sheet_rows(len(captions))] for result in results])
        save_grid(sheet, shown, columns=SHEET_COLUMNS)
    return f"{len(requests.seeds)} pictures.\n\n{table(HEADERS, lines)}"


def main() -> None:
    """Print the table."""
    parser = model_parser(__doc__)
    parser.add_argument("--pictures", type=int, default=3, help="of each held-out caption (3)")
    parser.add_argument("--sheet", type=Path, help="file for an image of some")
    args = parser.parse_args()
    snapshot = load_model(args.model)
    ways = [way for way in WAYS if snapshot.early is not None or way.guide != "early_weights"]
    print(f"{machine(['torch'])}\n")
    print(sampler_table(snapshot, PreparedDataset(args.data), args.pictures, ways, args.sheet))


if __name__ == "__main__":
    main()
