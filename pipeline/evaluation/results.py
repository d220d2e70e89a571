"""What the evaluation writes as numbers: metrics.json, its summary, and what is tracked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation import metrics
from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.conditions import SampleCount
from pipeline.evaluation.entry import Field
from pipeline.evaluation.estimates import Estimates
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.group_classifier import Unavailable
from pipeline.evaluation.metrics import Float64, Metric
from pipeline.evaluation.verdict import Verdict

Table = dict[str, dict[str, Metric]]  # by contender, or "real", and metric
SUMMARY = ("kid", "recall", "coverage", "top_octave", "caption_rank")
UPSAMPLING = "bicubic, antialiased, rounded to uint8, before features"  # of images below the data's px


@dataclass(frozen=True)
class Results:
    """The content of metrics.json."""

    verdict: Verdict
    tables: dict[str, Table]  # by caption set
    contenders: dict[str, dict[str, Any]]  # nfe, multiply_adds, how
    extractors: dict[str, dict[str, Any]]
    reference: dict[str, dict[str, float]]  # of the training images, by extractor
    tried: dict[str, dict[str, float]]  # KID of each setting of the fine-tuned model, by budget
    floors: dict[str, float]
    margins: dict[str, dict[str, float]]
    samples: dict[str, Any]  # how many, and why

    def to_json(self) -> dict[str, Any]:
        """Plain values, rounded to six digits."""
        tables = {
            split: {name: {key: m.as_json() for key, m in row.items()} for name, row in table.items()}
            for split, table in self.tables.items()
        }
        return {
            **tables,
            "contenders": self.contenders,
            "extractors": self.extractors,
            "reference": _rounded(self.reference),
            "tried": _rounded(self.tried),
            "floors": _rounded(self.floors),
            "margins": _rounded(self.margins),
            "samples": self.samples,
            "upsampling": UPSAMPLING,
            "outcome": self.verdict.outcome,
        }


def _rounded(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _rounded(value) for key, value in tree.items()}
    return metrics.rounded(float(tree))


def build_results(
    verdict: Verdict,
    estimates: Mapping[str, Estimates],
    comparison: Comparison,
    field: Field,
    extractors: Sequence[Extractor | Unavailable],
    count: SampleCount,
) -> Results:
    """Everything in numbers, given the estimates of each caption set."""
    evidence = estimates["train"].evidence
    about = evidence.description
    real = comparison.real
    return Results(
        verdict=verdict,
        tables={split: build_table(each, comparison) for split, each in estimates.items()},
        contenders={
            each.name: {
                "nfe": about.nfe[each.name],
                "multiply_adds": about.multiply_adds[each.name],
                "how": each.describe(),
                "passes": each.passes,
            }
            for each in field.contenders
        },
        extractors={each.name: _describe_extractor(each, comparison) for each in extractors},
        reference={name: metrics.describe_reference(real.raw[name]) for name in about.extractors},
        tried=field.tried,
        floors=about.floors,
        margins={"train": about.margins, "heldout": about.heldout_margins},
        samples={
            "per_contender_and_caption_set": count.count,
            "wanted": count.wanted,
            "note": count.note(),
            "families": {split: len(np.unique(each.families)) for split, each in evidence.conditions.items()},
        },
    )


def build_table(estimates: Estimates, comparison: Comparison) -> Table:
    """Every metric of every contender, and of the real images of the captions, on one caption set."""
    about = estimates.evidence.description
    table: Table = {}
    for name in estimates.measured:
        row: dict[str, Metric] = {}
        compared = name not in ("real", about.baseline)
        for i, extractor in enumerate(about.extractors):
            prefix = "" if i == 0 else f"{extractor}_"
            if name != "real":
                row |= _distances(estimates, name, extractor, prefix)
            if compared:
                row[f"{prefix}kid_difference"] = estimates.kid_difference(name, about.baseline, extractor)
        if name != "real":
            row["top_octave"] = estimates.top_octave(name)
            row |= _sharpness(comparison, estimates.split, name)
        if estimates.judges_captions:
            row["caption_rank"] = estimates.caption_rank(name)
            row["retrieval_top1"] = estimates.retrieved(name)
        if name != "real" or estimates.split == "heldout":
            row["alike"] = estimates.alike(name)
            row["replicas"] = estimates.replicas(name)
        table[name] = row
    return table


def _distances(estimates: Estimates, name: str, extractor: str, prefix: str) -> dict[str, Metric]:
    real, fake = estimates.conditions.real[extractor], estimates.measured[name].features[extractor]
    n = min(len(real), len(fake))
    row = {"kid": estimates.kid(name, extractor)}
    row["fd"] = (
        Metric(metrics.frechet_distance(real, fake), n)
        if metrics.enough("fd", n)
        else Metric.refused("fd", n)
    )
    row |= estimates.neighbourhood(name, extractor)
    real, fake = estimates.one_per_family(name, extractor)
    row |= _one_per_family(real, fake)
    return {f"{prefix}{key}": metric for key, metric in row.items()}


def _one_per_family(real: Float64, fake: Float64) -> dict[str, Metric]:
    """Metrics of features of one image of each family, beside those that have intervals."""
    n = min(len(real), len(fake))
    names = ("clipped_density", "clipped_coverage", "sliced_w2")
    if not all(metrics.enough(name, n) for name in names):
        return {name: Metric.refused(name, n) for name in names}
    values = metrics.clipped_density_coverage(real, fake)
    values["sliced_w2"] = metrics.sliced_wasserstein(real, fake)
    return {name: Metric(values[name], n) for name in names}


def _sharpness(comparison: Comparison, split: str, name: str) -> dict[str, Metric]:
    real, mine = (comparison.sets[split][each].sharpness for each in ("real", name))
    n = len(mine.top_octave)
    if not metrics.enough("sharpness", n):
        return {key: Metric.refused("sharpness", n) for key in ("laplacian", "gradient")}
    compared = metrics.compare_sharpness(real, mine)
    return {key: Metric(compared[key], n) for key in ("laplacian", "gradient")}


def _describe_extractor(extractor: Extractor | Unavailable, comparison: Comparison) -> dict[str, Any]:
    if isinstance(extractor, Unavailable):
        return {"qualified": False, "reason": f"not available: {extractor.reason}"}
    judged = next(each for each in comparison.qualifications if each.extractor == extractor.name)
    return {
        "sha256": extractor.sha256,
        "related_to_discriminator": int(extractor.related_to_discriminator),
        "dim": comparison.real.raw[extractor.name].shape[1],
        "whitened_dim": comparison.real.white(extractor.name).shape[1],
        "qualified": judged.qualified,
        "reason": judged.reason,
        "damage": {case: metric.as_json() for case, metric in judged.table},
        "details": _rounded(extractor.details),
    }


def flatten(results: Results) -> dict[str, float]:
    """`SPLIT/CONTENDER/METRIC` for every metric that has a value."""
    return {
        f"{split}/{name}/{key}": value
        for split, table in results.tables.items()
        for name, row in table.items()
        for key, metric in row.items()
        if (value := metrics.rounded(metric.value)) is not None
    }


def summarise(results: Results) -> dict[str, dict[str, float]]:
    """What `dvc metrics show` prints: contender / metric / value on training captions, without missing values."""
    return {
        name: {
            key: value
            for key in SUMMARY
            if key in row and (value := metrics.rounded(row[key].value)) is not None
        }
        for name, row in results.tables["train"].items()
    }


def as_json(tree: Mapping[str, Any]) -> str:
    """A file's content; equal trees give equal bytes."""
    return json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n"
