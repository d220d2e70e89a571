"""Operating characteristics of the gate: how often it fails good models and lets bad ones pass.

    python -m benchmarks.operating --project DIR [--draws 40] [--large-draws 20] [--out operating.json]

DIR is a project with a fine-tuned model and many test families, such as one with `data.subset: []` and
`data.split: {train: 0.5, val: 0.02, test: 0.48}` after `dvc repro finetune`. Its teacher draws each caption
three times: as the baseline, with other seeds, and with twice as many calls, which is a good case only where
more calls make it no worse. Models with a known fault are planted (planted.py):
the teacher's images of other seeds, damaged or in the wrong places, or a fifth of them replaced by training
images. The teacher of other seeds is also what a model is compared with at equal cost; real images and
blurred ones stand in for a better model there, and for a better and a worse champion. Then families are drawn
at random, as many as the demo has and four times as many, and the gate judges every case on them. Features
are computed once; a draw takes a second or two.

`tests/benchmarks/test_operating.py` does the same in small, with a teacher made from real images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import machine, table
from benchmarks.planted import (
    BAD,
    BASELINE,
    GOOD,
    MORE_CALLS,
    OTHER_SEEDS,
    Case,
    Pool,
    build_pool,
    draw_evidence,
)
from pipeline.config.params import load_params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import gate, statistics
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.contenders import Contender
from pipeline.evaluation.evaluate import margins_of
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.extractors import load_extractors
from pipeline.evaluation.judging import thresholds_of
from pipeline.evaluation.verdict import PassVerdict
from pipeline.models.snapshot import load_snapshot


def judge_cases(
    evidence: Evidence, cases: Mapping[str, Case], thresholds: gate.Thresholds
) -> dict[str, PassVerdict]:
    """Verdicts on the cases, each compared with its own baseline."""
    verdicts: dict[str, PassVerdict] = {}
    for baseline in dict.fromkeys(case.baseline for case in cases.values()):
        these = {name: case for name, case in cases.items() if case.baseline == baseline}
        about = replace(
            evidence.description,
            candidates={n: case.images for n, case in enumerate(these.values(), 1)},
            equal_cost={n: case.equal_cost for n, case in enumerate(these.values(), 1)},
            baseline=baseline,
        )
        judged = gate.judge(replace(evidence, description=about), thresholds)
        verdicts |= zip(these, judged, strict=True)
    return verdicts


@dataclass
class Outcomes:
    """How a case was judged, over many draws."""

    outcomes: Counter[str]
    failed: Counter[str]  # rules, of draws that failed
    undecided: Counter[str]  # rules, of draws that were undecided
    draws: int = 0

    def add(self, verdict: PassVerdict) -> None:
        """Count one draw."""
        self.draws += 1
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome == "failed":
            self.failed.update(rule.name for rule in verdict.obstacles)
        if verdict.outcome == "undecided":
            self.undecided.update(rule.name for rule in verdict.obstacles)


def characterise(
    pool: Pool, thresholds: gate.Thresholds, num_train: int, num_heldout: int, draws: int
) -> dict[str, Outcomes]:
    """Judge every case on `draws` random choices of families."""
    cases = {**GOOD, **BAD}
    results = {name: Outcomes(Counter(), Counter(), Counter()) for name in cases}
    for i in range(draws):
        rng = statistics.generator(i, f"draw/{num_train}/{num_heldout}")
        evidence = draw_evidence(pool, num_train, num_heldout, rng)
        for name, verdict in judge_cases(evidence, cases, thresholds).items():
            results[name].add(verdict)
    return results


def as_table(results: Mapping[str, Outcomes]) -> str:
    """A row per case."""
    lines = []
    for name, each in results.items():
        reasons = each.failed if each.outcomes["failed"] else each.undecided
        shown = ", ".join(f"{rule} {count}" for rule, count in reasons.most_common(4))
        shares = [f"{each.outcomes[kind] / each.draws:.0%}" for kind in ("passed", "undecided", "failed")]
        lines.append(["good" if name in GOOD else "bad", name, *shares, shown])
    return table(["", "case", "passed", "undecided", "failed", "rules that decided"], lines)


# --- The command.


def teacher_images(
    project: Path, dataset: PreparedDataset, steps: int, log: Callable[[str], None]
) -> Callable[[CaptionSet], dict[str, Tensor]]:
    """Draws the captions of a set with the project's fine-tuned model: in `steps` as BASELINE and
    OTHER_SEEDS, twice as many as MORE_CALLS. They are kept in runs/operating of the project."""
    snapshot = load_snapshot(project / "models" / "finetuned")
    own = replace(snapshot.config.sampling, guidance=1.0)

    def draw(captions: CaptionSet) -> dict[str, Tensor]:
        stored = project / "runs" / "operating" / f"{captions.split}-{steps}-{snapshot.digest[:16]}.npz"
        if stored.is_file():
            with np.load(stored) as arrays:
                return {name: torch.from_numpy(images) for name, images in arrays.items()}
        text = dataset.text([captions.caption_ids[i] for i in captions.which])
        images = {}
        for name, seed, count in ((BASELINE, 0, steps), (OTHER_SEEDS, 1, steps), (MORE_CALLS, 2, 2 * steps)):
            contender = Contender(name, "finetuned", settings=replace(own, num_steps=count))
            images[name] = contender.sample(snapshot, text, captions.seeds(seed)).images
            log(f"sampled {len(text.pooled)} images of {name} on {captions.split} captions")
        stored.parent.mkdir(parents=True, exist_ok=True)
        np.savez(stored, **{name: each.numpy() for name, each in images.items()})
        return images

    return draw


def main() -> None:
    """Print two tables, and write the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument(
        "--families", type=int, nargs=2, default=(190, 65), help="train and test, as the demo has"
    )
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--large-draws", type=int, default=20, help="of four times as many families")
    parser.add_argument("--steps", type=int, default=8, help="of the teacher (8)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    params = load_params(args.project / "params.yaml")
    dataset = PreparedDataset(args.project / "data" / "prepared")

    def log(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    extractors, _ = load_extractors(params.evaluate.extractors, dataset)
    promotion = params.promotion
    draw = teacher_images(args.project, dataset, args.steps, log)
    pool = build_pool(dataset, extractors, draw, margins_of(promotion), log)
    print(f"{machine(['torch'])}\n")
    counts = {}
    for factor, draws in ((1, args.draws), (4, args.large_draws)):
        train, heldout = (factor * count for count in args.families)
        results = characterise(pool, thresholds_of(promotion), train, heldout, draws)
        print(
            f"{train} training and {heldout} test families, {draws} draws:\n\n{as_table(results)}\n",
            flush=True,
        )
        counts[f"{train}/{heldout}"] = {name: dict(each.outcomes) for name, each in results.items()}
    if args.out is not None:
        args.out.write_text(json.dumps(counts, indent=1) + "\n")


if __name__ == "__main__":
    main()
