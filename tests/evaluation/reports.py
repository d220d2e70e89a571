"""Everything that the report shows, from random evidence and random pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config.params import Params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import gate, metrics
from pipeline.evaluation.comparison import Comparison, ImageMeasures, RealImages
from pipeline.evaluation.conditions import CaptionSet, SampleCount
from pipeline.evaluation.contenders import Contender
from pipeline.evaluation.entry import Champion, Field
from pipeline.evaluation.estimates import estimates_of
from pipeline.evaluation.evidence import Evidence
from pipeline.evaluation.features import Extractor, Whitening
from pipeline.evaluation.group_classifier import Unavailable
from pipeline.evaluation.judging import thresholds_of
from pipeline.evaluation.memorisation import TrainingImages, thumbnails
from pipeline.evaluation.qualification import Qualification
from pipeline.evaluation.results import Results, build_results
from pipeline.evaluation.samples import Samples
from pipeline.evaluation.verdict import Baseline, Verdict, fewest_passed
from tests.conftest import write_prepared
from tests.evaluation.evidence import CANDIDATE, evidence, images

HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "{{7*7}} {% raw %} ${7*7}",
    "w" * 3000,
    "مرحبا بالعالم \u202e right to left \u2066",
    '" onload="alert(3)" & &amp; \' `',
    "-->]]><style>body{display:none}</style>",
    "",
]
NAMES = (CANDIDATE, "refined_2", "refined_4", "equal_cost_2", "equal_cost_4", "eight_calls", "finetuned")
HOW = {"equal_cost_2": (1, 1), "equal_cost_4": (1, 2), "eight_calls": (4, 4)}


@dataclass(frozen=True)
class Made:
    """The arguments of report.write."""

    results: Results
    comparison: Comparison
    samples: dict[str, dict[str, Samples]]
    caption_sets: list[CaptionSet]
    dataset: PreparedDataset

    def arguments(self) -> tuple[Any, ...]:
        """In order."""
        return self.results, self.comparison, self.samples, self.caption_sets, self.dataset


def make(
    folder: Path,
    params: Params,
    families: int = 30,
    resolution: int = 16,
    seed: int = 0,
    champion: Champion | None = None,
) -> Made:
    """The data set is written into `folder`. Few families leave rules undecided or refused."""
    write_prepared(folder, resolution=resolution)
    dataset = PreparedDataset(folder)
    found = _evidence(families, seed, NAMES if champion is None else (*NAMES, "champion"))
    caption_sets = [_caption_set(split, families, resolution) for split in ("heldout", "train")]
    names = found.description.how
    samples = {
        split: {
            name: Samples(_pictures(2 * families, resolution, i), 2 + i, 0.1 * (i + 1))
            for i, name in enumerate(names)
        }
        for split in ("heldout", "train")
    }
    comparison = _compare(found, samples, caption_sets, resolution)
    field = Field(
        contenders=[
            Contender(name, "refined", passes=int(name[-1]))
            if name.startswith("refined")
            else Contender(name, "finetuned", steps=HOW.get(name))
            for name in names
        ],
        snapshots={},
        folders={},
        costs={},
        candidates=found.description.candidates,
        tried={"equal_cost_1": {}, "equal_cost_2": {}, "eight_calls": {"4+4 steps, guidance off": 0.3}},
        champion=champion,
    )
    address = "models/finetuned" if champion is None else champion.address
    verdict = _verdict(found, params, Baseline(address, "d" * 64))
    extractor = Extractor("randconv", "1" * 64, False, lambda x: x, dim=8)
    missing = Unavailable("group-cls", "needs two groups <b>of</b> 8 images")
    count = SampleCount(2 * families + 7, 2 * families)
    results = build_results(verdict, estimates_of(found), comparison, field, [extractor, missing], count)
    return Made(results, comparison, samples, caption_sets, dataset)


def _evidence(families: int, seed: int, names: Sequence[str]) -> Evidence:
    plain = evidence(families, seed=seed)
    rng = np.random.default_rng(seed)
    measured = {}
    for split, known in plain.measured.items():
        more = {
            n: images(rng, 2 * families, 0.1 * i) for i, n in enumerate(["real", *names]) if n not in known
        }
        measured[split] = {n: m for n, m in (known | more).items() if n != "equal_cost_1"}
    about = replace(
        plain.description,
        candidates={1: CANDIDATE, 2: "refined_2", 4: "refined_4"},
        equal_cost={2: "equal_cost_2", 4: "equal_cost_4"},
        baseline=names[-1],
        nfe={name: 2 + i for i, name in enumerate(names)},
        multiply_adds={name: 10**7 * (1 + 3 * i) for i, name in enumerate(names)},
        how=dict.fromkeys(names, ""),
    )
    return replace(plain, description=about, measured=measured)


def _pictures(n: int, resolution: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, resolution, resolution), generator=generator, dtype=torch.uint8)


def _caption_set(split: str, families: int, resolution: int) -> CaptionSet:
    captions = [*HOSTILE, *(f"grinning face number {i}" for i in range(families))][:families]
    return CaptionSet(
        split=split,
        rows=np.arange(families),
        captions=captions,
        caption_ids=list(range(families)),
        families=[str(i) for i in range(families)],
        groups=["g"] * families,
        images=_pictures(families, resolution, 99),
        which=np.arange(2 * families) // 2,
        draw=np.arange(2 * families) % 2,
    )


def _compare(
    found: Evidence,
    samples: dict[str, dict[str, Samples]],
    caption_sets: list[CaptionSet],
    resolution: int,
) -> Comparison:
    rng = np.random.default_rng(1)
    pictures = _pictures(24, resolution, 100)
    raw = {"randconv": rng.standard_normal((24, 8))}
    whitening = {"randconv": Whitening.fit(raw["randconv"])}
    captions = [-1, *range(23)]
    judge: Any = None  # nothing of the report asks it
    names = [str(i) for i in range(24)]
    real = RealImages(pictures, names, ["g"] * 24, captions, np.arange(24), raw, whitening, judge)
    training = TrainingImages(pictures.__getitem__, np.arange(24))
    sets = {}
    for each in caption_sets:
        shown = {"real": each.images[each.which]} | {n: s.images for n, s in samples[each.split].items()}
        measured = found.measured[each.split]
        sets[each.split] = {
            name: ImageMeasures(measured[name], metrics.sharpness(image), training.nearest(thumbnails(image)))
            for name, image in shown.items()
        }
    table = tuple(("blur <2> px", metrics.Metric(value, 60, value - 1, value + 1)) for value in (1.0, 5.0))
    qualified = [Qualification("randconv", True, "", table)]
    power = {"noise, 4 grey levels": 0.9, "no copies: real images of other families": 0.1}
    return Comparison(found, real, sets, qualified, power)


def _verdict(found: Evidence, params: Params, baseline: Baseline) -> Verdict:
    verdicts = tuple(gate.judge(found, thresholds_of(params.promotion)))
    return Verdict(
        data_digest="a" * 64,
        model_digest="b" * 64,
        evidence_digest="c" * 64,
        baseline=baseline,
        is_refined=True,
        verdicts=verdicts,
        default_passes=fewest_passed(verdicts),
    )
