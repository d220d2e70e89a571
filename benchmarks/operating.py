"""Operating characteristics of the gate: how often it fails good models and lets bad ones pass.

    python -m benchmarks.operating --project DIR [--draws 40] [--large-draws 20] [--out operating.json]

DIR is a project with a fine-tuned model and many test families, such as one with `data.subset: []` and
`data.split: {train: 0.5, val: 0.02, test: 0.48}` after `dvc repro finetune`. Its teacher draws each caption
three times: as the baseline, with other seeds, and with twice as many calls. Models with a known fault are
planted: the teacher's images of other seeds, damaged; or real images. Then families are drawn at random, as
many as the demo has and four times as many, and the gate judges every case on them. Features are computed
once; a draw takes a second or two.

`tests/benchmarks/test_operating.py` does the same in small, with a teacher made from real images.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import machine, table
from pipeline.config.params import load_params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import damage, gate, metrics, statistics
from pipeline.evaluation.comparison import CaptionJudge, Margin, RealImages, kid_margins, measure_real
from pipeline.evaluation.conditions import CaptionSet, build_caption_set
from pipeline.evaluation.contenders import Contender
from pipeline.evaluation.evaluate import margins_of, thresholds_of
from pipeline.evaluation.evidence import Conditions, Description, Evidence, Measured, Reference
from pipeline.evaluation.extractors import load_extractors
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.memorisation import TrainingImages, thumbnails, two_nearest
from pipeline.evaluation.metrics import Float64
from pipeline.evaluation.statistics import Int64
from pipeline.evaluation.verdict import PassVerdict
from pipeline.models.snapshot import load_snapshot

BASELINE, OTHER_SEEDS, MORE_CALLS, REAL = (
    "teacher",
    "teacher, other seeds",
    "teacher, more calls",
    "real images",
)
GOOD = (REAL, OTHER_SEEDS, MORE_CALLS)
COPY_SHARE = 0.2
COPIES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "20% copies, noised": lambda images: damage.add_noise(images, 8, seed=0),
    "20% copies, shifted": lambda images: damage.shift(images, 2),
    "20% copies, blurred": lambda images: damage.blur(images, 1.0),
}
DAMAGED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "blurred, 1 px": lambda images: damage.blur(images, 1.0),
    "over-sharpened": lambda images: damage.sharpen(images, 2.0),
    "dithered": lambda images: damage.dither(images, 8),
}
HALF, SHUFFLED, ONE = "half of the families missing", "captions shuffled", "one image for all"
BAD = (*DAMAGED, HALF, SHUFFLED, ONE, *COPIES)


@dataclass(frozen=True)
class CaseImages:
    """What one case measures on one caption set: as evidence, but with the distances to every training
    family, since which of them there are depends on the draw."""

    measured: Measured  # rho and distance are not filled in
    by_family: Float64  # [N,F] distance to the nearest image of each training family


@dataclass(frozen=True)
class Pool:
    """Measurements to draw families from."""

    sets: dict[str, CaptionSet]
    conditions: dict[str, Conditions]  # of the whole pool
    cases: dict[str, dict[str, CaseImages]]  # by caption set and case
    copies: dict[str, CaseImages]  # damaged training images, by case
    train_families: Int64  # [T] of the training images, numbered in the order of their names
    train_names: list[str]  # [F]
    train_groups: Int64  # [T]
    between: Float64  # [T,F] of training images; their own family too
    margins: dict[str, float]
    heldout_margins: dict[str, float]

    @property
    def num_families(self) -> dict[str, int]:
        """Families of captions, by caption set."""
        return {split: len(set(each.families)) for split, each in self.sets.items()}


# --- Measure once.


def plant(images: Mapping[str, Tensor], families: Int64, rng: np.random.Generator) -> dict[str, Tensor]:
    """All cases but the copies, of one caption set: from the images of BASELINE, OTHER_SEEDS, MORE_CALLS and
    REAL, in the same order of captions."""
    other = images[OTHER_SEEDS]
    n = len(other)
    missing = rng.permutation(int(families.max()) + 1)[families] % 2 == 1
    source = np.arange(n)
    source[missing] = rng.choice(np.flatnonzero(~missing), int(missing.sum()))
    half = torch.where(torch.from_numpy(missing)[:, None, None, None], images[BASELINE][source], other)
    return {
        **images,
        **{name: change(other) for name, change in DAMAGED.items()},
        HALF: half,
        SHUFFLED: other[torch.from_numpy(rng.permutation(n))],
        ONE: other[:1].expand(n, -1, -1, -1).contiguous(),
    }


def build_pool(
    dataset: PreparedDataset,
    extractors: Sequence[Extractor],
    draw: Callable[[CaptionSet], Mapping[str, Tensor]],
    margins: tuple[Margin, Margin],
    log: Callable[[str], None],
) -> Pool:
    """Measure every case on every family. `draw` gives the images of BASELINE, OTHER_SEEDS and MORE_CALLS;
    `margins` are the narrow and the wide one of KID."""
    real = measure_real(dataset, extractors, 0)
    names = sorted(set(real.groups))
    groups = np.array([names.index(group) for group in real.groups], dtype=np.int64)
    (families,), _ = statistics.number_families(real.families)
    training = TrainingImages(real.images.__getitem__, families)
    sets, conditions, cases = {}, {}, {}
    for split, source in (("train", "train"), ("heldout", "test")):
        count = len({row["base"] or row["id"] for row in dataset.rows if row["split"] == source})
        captions = sets[split] = build_caption_set(dataset, split, source, count, 0)
        (numbered, of_real), _ = statistics.number_families(
            captions.families, real.families if split == "train" else captions.families
        )
        images = {REAL: captions.images, **draw(captions)}
        judge = CaptionJudge.build(captions, dataset, real, extractors)
        rng = statistics.generator(0, f"plant/{split}")
        cases[split] = {
            name: _measure(each, real, extractors, judge, training)
            for name, each in plant(images, numbered, rng).items()
        }
        white = (
            {e.name: real.white(e.name) for e in extractors}
            if split == "train"
            else cases[split][REAL].measured.features
        )
        places = {name: i for i, name in enumerate(names)}
        own = np.array([places.get(group, -1) for group in captions.groups], dtype=np.int64)
        power = cases[split][REAL].measured.power
        conditions[split] = Conditions(numbered, own, power, white, of_real)
        log(f"measured {len(cases[split])} cases of {count} images on {split} captions")
    return Pool(
        sets,
        conditions,
        cases,
        {
            name: _measure(change(real.images), real, extractors, None, training)
            for name, change in COPIES.items()
        },
        families,
        sorted(set(real.families)),
        groups,
        training.by_family(thumbnails(real.images)),
        *kid_margins(extractors, real, margins),
    )


def _measure(
    images: Tensor,
    real: RealImages,
    extractors: Sequence[Extractor],
    judge: CaptionJudge | None,
    training: TrainingImages,
) -> CaseImages:
    raw = {each.name: each(images) for each in extractors}
    nothing = np.zeros(len(images))
    measured = Measured(
        {each.name: real.whitening[each.name](raw[each.name]) for each in extractors},
        metrics.sharpness(images).top_octave,
        judge.rank(raw) if judge is not None else nothing,
        nothing,
        nothing,
    )
    return CaseImages(measured, training.by_family(thumbnails(images)))


# --- Draw often.


def draw_evidence(
    pool: Pool, num_train: int, num_heldout: int, rng: np.random.Generator
) -> tuple[Evidence, list[str]]:
    """Evidence on random families, with every case as a candidate; and the cases in order."""
    chosen = {
        split: set(rng.choice(sorted(set(pool.sets[split].families)), count, replace=False).tolist())
        for split, count in (("train", num_train), ("heldout", num_heldout))
    }
    kept_train = np.array([i for i, name in enumerate(pool.train_names) if name in chosen["train"]])
    of_train = np.isin(pool.train_families, kept_train)
    names = [*GOOD, *BAD]
    conditions, measured = {}, {}
    for split, whole in pool.conditions.items():
        named = pool.sets[split].families
        rows = np.array([i for i, family in enumerate(named) if family in chosen[split]])
        real = of_train if split == "train" else np.isin(whole.real_families, whole.families[rows])
        drawn, of_real = whole.families[rows], whole.real_families[real]
        numbered = np.unique(np.concatenate([drawn, of_real]), return_inverse=True)[1]
        conditions[split] = Conditions(
            numbered[: len(drawn)],
            whole.groups[rows],
            whole.power[rows],
            {name: features[real] for name, features in whole.real.items()},
            numbered[len(drawn) :],
        )
        measured[split] = {name: _select(each, rows, kept_train) for name, each in pool.cases[split].items()}
        for name, copies in pool.copies.items():
            base = measured[split][OTHER_SEEDS]
            if split == "heldout":
                base = _mix(base, _select(copies, np.flatnonzero(of_train), kept_train), rng)
            measured[split][name] = base
    between = pool.between[of_train][:, kept_train]
    numbers = np.searchsorted(kept_train, pool.train_families[of_train])
    between[np.arange(len(between)), numbers] = np.inf
    d1, d2 = two_nearest(between)
    description = Description(
        seed=int(rng.integers(2**31)),
        extractors=list(pool.margins),
        margins=pool.margins,
        heldout_margins=pool.heldout_margins,
        floors={},
        candidates=dict(enumerate(names, 1)),
        equal_cost={},
        baseline=BASELINE,
        nfe=dict.fromkeys([*names, BASELINE], 1),
        multiply_adds={},
    )
    reference = Reference(d1 / np.maximum(d2, 1e-12), numbers, pool.train_groups[of_train])
    return Evidence(description, conditions, measured, reference), names


def _select(case: CaseImages, rows: Int64, kept_train: Int64) -> Measured:
    """Some images, with their nearest families among those kept."""
    d1, d2 = two_nearest(case.by_family[rows][:, kept_train])
    whole = case.measured
    return Measured(
        {name: features[rows] for name, features in whole.features.items()},
        whole.power[rows],
        whole.caption_rank[rows],
        d1 / np.maximum(d2, 1e-12),
        d1,
    )


def _mix(base: Measured, copies: Measured, rng: np.random.Generator) -> Measured:
    """`base` with COPY_SHARE of its images replaced by random ones of `copies`."""
    n = len(base.power)
    at = rng.permutation(n)[: round(COPY_SHARE * n)]
    source = rng.choice(len(copies.power), len(at))

    def put(into: Float64, other: Float64) -> Float64:
        out = into.copy()
        out[at] = other[source]
        return out

    return replace(
        base,
        features={name: put(each, copies.features[name]) for name, each in base.features.items()},
        power=put(base.power, copies.power),
        rho=put(base.rho, copies.rho),
        distance=put(base.distance, copies.distance),
    )


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
        for counter in (self.failed, self.undecided):
            kind = "failed" if counter is self.failed else "undecided"
            if verdict.outcome == kind:
                counter.update(rule.name for rule in verdict.rules if rule.outcome == kind)


def characterise(
    pool: Pool, thresholds: gate.Thresholds, num_train: int, num_heldout: int, draws: int
) -> dict[str, Outcomes]:
    """Judge every case on `draws` random choices of families."""
    results = {name: Outcomes(Counter(), Counter(), Counter()) for name in (*GOOD, *BAD)}
    for i in range(draws):
        rng = statistics.generator(i, f"draw/{num_train}/{num_heldout}")
        evidence, names = draw_evidence(pool, num_train, num_heldout, rng)
        for name, verdict in zip(names, gate.judge(evidence, thresholds), strict=True):
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
    """Draws the captions of a set with the project's fine-tuned model: `steps` of each level as BASELINE and
    OTHER_SEEDS, twice as many as MORE_CALLS. They are kept in runs/operating of the project."""
    snapshot = load_snapshot(project / "models" / "finetuned")
    levels = 1 + len(snapshot.config.shells)
    settings = replace(snapshot.config.sampling, guidance=1.0)

    def draw(captions: CaptionSet) -> dict[str, Tensor]:
        stored = project / "runs" / "operating" / f"{captions.split}-{steps}-{snapshot.digest[:16]}.npz"
        if stored.is_file():
            with np.load(stored) as arrays:
                return {name: torch.from_numpy(images) for name, images in arrays.items()}
        text = dataset.text([captions.caption_ids[i] for i in captions.which])
        images = {}
        for name, seed, count in ((BASELINE, 0, steps), (OTHER_SEEDS, 1, steps), (MORE_CALLS, 2, 2 * steps)):
            contender = Contender(name, "finetuned", settings=settings, steps=(count,) * levels)
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
    parser.add_argument("--steps", type=int, default=4, help="of the teacher at each level")
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
