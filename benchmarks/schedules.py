"""Schedules and numbers of steps of one trained model, on training captions.

    python -m benchmarks.schedules [--model models/finetuned] [--images 196] [--steps 4 8 12] [--schedules karras]

All rows have the same captions and seeds. KID to the training images is computed over pairs of different families,
with 95% intervals by families, in the features of each of `evaluate.extractors`; "captions" is the mean rank of the
true caption among all; "top octave" is the log ratio of its power to the real images'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.judging import compare, load_model, model_parser
from benchmarks.measure import machine, table
from pipeline.config.params import load_params
from pipeline.data.dataset import PreparedDataset
from pipeline.diffusion.generate import Generated, generate
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.evaluation import statistics
from pipeline.evaluation.comparison import CaptionJudge, measure_real
from pipeline.evaluation.conditions import build_caption_set
from pipeline.evaluation.extractors import load_extractors
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.metrics import compare_sharpness, sharpness
from pipeline.models.snapshot import Snapshot

STEPS = (2, 3, 4, 6, 8, 12, 16, 24, 40)


class Way(NamedTuple):
    """One row."""

    schedule: str
    steps: int
    guidance: float


def schedule_table(
    snapshot: Snapshot,
    dataset: PreparedDataset,
    extractors: Sequence[Extractor],
    ways: Sequence[Way],
    count: int,
) -> str:
    """The table, of `count` samples for each way."""
    real = measure_real(dataset, extractors, 0)
    captions = build_caption_set(dataset, "train", "train", count, 0)
    text, seeds = dataset.text([captions.caption_ids[i] for i in captions.which]), captions.seeds(0)
    judge = CaptionJudge.build(captions, dataset, real, extractors)
    drawn = [captions.families[i] for i in captions.which]
    (of_real, of_drawn), total = statistics.number_families(real.families, drawn)
    counts = statistics.resample_counts(total, statistics.generator(0, "schedules"))
    sharp = sharpness(real.images)

    def sample(way: Way) -> Generated:
        changes = {"schedule": way.schedule, "num_steps": way.steps, "guidance": way.guidance}
        return generate(snapshot, text, seeds, replace(snapshot.config.sampling, **changes))

    def cells(way: Way, samples: Generated, _: float) -> list[str]:
        raw = {each.name: each(samples.images) for each in extractors}
        kids = []
        for name, features in raw.items():
            white = real.whitening[name](features)
            kid = statistics.KidSamples.measure(real.white(name), of_real, white, of_drawn, counts).metric
            assert kid.low is not None and kid.high is not None
            kids.append(f"{kid.value:.3f} [{kid.low:.3f}, {kid.high:.3f}]")
        octave = compare_sharpness(sharp, sharpness(samples.images))["top_octave"]
        rank = f"{float(np.mean(judge.rank(raw))):.3f}"
        guided = f"{way.guidance:g}" if way.guidance != 1 else "none"
        return [way.schedule, str(way.steps), guided, str(samples.nfe), *kids, rank, f"{octave:+.2f}"]

    headers = ["schedule", "steps", "guidance", "calls", *(f"KID {each.name}" for each in extractors)]
    lines, _ = compare({way: partial(sample, way) for way in ways}, cells)
    families = len(set(drawn))
    return f"{count} images of {families} families.\n\n{table([*headers, 'captions', 'top octave'], lines)}"


def main() -> None:
    """Print the table."""
    parser = model_parser(__doc__)
    parser.add_argument("--images", type=int, default=196, help="of each way (196)")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES[:1], choices=SCHEDULES)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0], help="1 is none")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    args = parser.parse_args()
    snapshot, dataset = load_model(args.model), PreparedDataset(args.data)
    extractors, _ = load_extractors(load_params(args.params).evaluate.extractors, dataset)
    ways = [Way(*way) for way in product(args.schedules, args.steps, args.guidance)]
    print(f"{machine(['torch'])}\n")
    print(schedule_table(snapshot, dataset, extractors, ways, args.images))


if __name__ == "__main__":
    main()
