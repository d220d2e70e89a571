"""The whole evaluation: sample every model on held-out and on training captions, measure, judge, report.

Results (metrics.json, its summary, verdict.json) hold no time and are byte-equal for equal input; times are in
throughput.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config.params import Params, Promotion
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import figures, gate, metrics, report
from pipeline.evaluation.comparison import Comparison, Reference, Table, compare
from pipeline.evaluation.conditions import CaptionSet, build_caption_sets
from pipeline.evaluation.extractors import load_extractors
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.qualification import Qualification, qualify
from pipeline.evaluation.samples import BASELINE, Model, Samples, load_models, sample_all


def evaluate(
    params: Params, root: Path, log: Callable[[str], None] = print, device: str = "cpu"
) -> dict[str, float]:
    """Evaluate the models below `root`; write reports/evaluation/ and reports/verdict.json there.

    Reads data/prepared, models/finetuned and models/refined. Returns the numbers to track:
    `passed` (0 or 1) and `SPLIT/MODEL/METRIC` for every value in metrics.json.

    Raises:
        BadData: the test split has no captioned image, or there are fewer than 8 training images.
        InputMissing, StorageError: a model or the data set is missing or damaged.
    """
    dataset = PreparedDataset(root / "data" / "prepared")
    models = load_models(root / "models", params, device)
    caption_sets = build_caption_sets(dataset, params)
    extractors, unavailable = load_extractors(params.evaluate.extractors, dataset, device)
    for each in unavailable:
        log(f"extractor {each.name} is unavailable: {each.reason}")

    samples, throughput = sample_all(models, caption_sets, dataset, params, log)
    draws = min(params.evaluate.teacher_samples_per_caption, params.evaluate.samples_per_caption)
    comparison = compare(samples, caption_sets, dataset, extractors, draws, params.seed, log)

    candidate = next(model for model in models if not model.slow)
    rules = judge(comparison, candidate, params.promotion)
    data_digest = artifacts.directory_digest(dataset.path)
    verdict = gate.verdict(rules, candidate.snapshot.digest, data_digest)

    log("report: images and index.html")
    qualifications = qualify_all(comparison, caption_sets[0], extractors, log)
    results = as_results(comparison, extractors, qualifications, samples, candidate.name, verdict["passed"])
    results["unavailable_extractors"] = {each.name: each.reason for each in unavailable}
    page = report.render(
        results, verdict, throughput, caption_sets[0].captions, models[0].snapshot.resolution
    )
    with artifacts.commit_directory(root / "reports" / "evaluation", {"kind": "evaluation"}) as folder:
        (folder / "metrics.json").write_text(_as_json(results), encoding="utf-8")
        (folder / "summary.json").write_text(_as_json(summarise(comparison)), encoding="utf-8")
        (folder / "throughput.json").write_text(_as_json(throughput), encoding="utf-8")
        (folder / "index.html").write_text(page, encoding="utf-8")
        draw_samples(folder, samples, caption_sets)
        draw_neighbours(folder / "neighbours.png", comparison, samples, caption_sets[0], dataset, candidate)
        figures.draw_quality(folder / "quality.png", results)
    artifacts.write_atomic(root / "reports" / "verdict.json", _as_json(verdict))
    return {"passed": float(verdict["passed"])} | flatten(comparison.tables)


def qualify_all(
    comparison: Comparison,
    held_out: CaptionSet,
    extractors: Sequence[Extractor],
    log: Callable[[str], None],
) -> dict[str, Qualification]:
    """Which extractors order damage of the held-out images, by name."""
    reference = comparison.reference
    results = {}
    for extractor in extractors:
        name = extractor.name
        whitening, white = reference.whitening[name], reference.white(name)
        result = qualify(extractor, whitening, white, reference.families, held_out.images, held_out.families)
        log(
            f"extractor {name} is " + ("qualified" if result.qualified else f"not qualified: {result.reason}")
        )
        results[name] = result
    return results


def judge(comparison: Comparison, candidate: Model, promotion: Promotion) -> list[gate.Rule]:
    """The rules of the gate, applied to the candidate on held-out captions."""
    table = comparison.tables["heldout"]
    return gate.decide(
        table[candidate.name],
        table[BASELINE],
        table[candidate.name]["kid_difference"],
        comparison.floors["kid_half_half"],
        comparison.floors["sharpness_half_half"],
        all(bool(p.isfinite().all()) for p in candidate.snapshot.denoiser.parameters()),
        gate.Thresholds(**{name: getattr(promotion, name) for name in gate.Thresholds.__annotations__}),
    )


# --- What is written.


def flatten(tables: Mapping[str, Table]) -> dict[str, float]:
    """`SPLIT/MODEL/METRIC` for every metric that has a value."""
    return {
        f"{split}/{model}/{name}": value
        for split, table in tables.items()
        for model, row in table.items()
        for name, metric in row.items()
        if (value := metrics.rounded(metric.value)) is not None
    }


def as_results(
    comparison: Comparison,
    extractors: Sequence[Extractor],
    qualifications: Mapping[str, Qualification],
    samples: Mapping[str, Mapping[str, Samples]],
    candidate: str,
    passed: bool,
) -> dict[str, Any]:
    """The content of metrics.json: split / model / metric / value, n, low, high or reason."""
    return {
        **{
            split: {model: _row_as_json(row) for model, row in table.items()}
            for split, table in comparison.tables.items()
        },
        "floors": _row_as_json(comparison.floors),
        "nfe": {name: each.nfe for name, each in samples["heldout"].items()},
        "extractors": {
            each.name: _describe(each, comparison.reference, qualifications[each.name]) for each in extractors
        },
        "upsampling": "bicubic, antialiased, rounded to uint8, before features",  # images below the data's px
        "gate": {"candidate": candidate, "baseline": BASELINE, "passed": int(passed)},
    }


def _row_as_json(row: Mapping[str, Metric]) -> dict[str, Any]:
    return {name: metric.as_json() for name, metric in row.items()}


def _describe(extractor: Extractor, reference: Reference, judged: Qualification) -> dict[str, Any]:
    return {
        **{name: metrics.rounded(value) for name, value in extractor.details.items()},
        "sha256": extractor.sha256,
        "prefix": extractor.prefix,
        "related_to_discriminator": int(extractor.related_to_discriminator),
        "dim": extractor.dim,
        "whitened_dim": reference.white(extractor.name).shape[1],
        "qualified": int(judged.qualified),
        "reason": judged.reason,
        "damage": {case: metric.as_json() for case, metric in judged.table},
    }


def summarise(comparison: Comparison) -> dict[str, dict[str, float]]:
    """What `dvc metrics show` prints: model / metric / value on held-out captions, without missing values."""
    shown = ("kid", "recall", "coverage", "top_octave", "retrieval_top1")
    return {
        model: {
            name: value
            for name in shown
            if name in row and (value := metrics.rounded(row[name].value)) is not None
        }
        for model, row in comparison.tables["heldout"].items()
    }


def _as_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n"


def draw_samples(
    folder: Path, samples: Mapping[str, Mapping[str, Samples]], caption_sets: Sequence[CaptionSet]
) -> None:
    """Write a grid of samples beside real images for every caption set."""
    for caption_set in caption_sets:
        path = folder / f"{caption_set.split}_captions.png"
        native = {name: each.native for name, each in samples[caption_set.split].items()}
        figures.draw_captions(path, caption_set.captions, caption_set.images, native)


def draw_neighbours(
    path: Path,
    comparison: Comparison,
    samples: Mapping[str, Mapping[str, Samples]],
    held_out: CaptionSet,
    dataset: PreparedDataset,
    candidate: Model,
) -> None:
    """Write the candidate's held-out samples beside their nearest training images."""
    shown, reference = samples["heldout"][candidate.name], comparison.reference
    figures.draw_neighbours(
        path,
        shown.images,
        [held_out.captions[i] for i in shown.which],
        reference.images,
        [dataset.captions[i] if i >= 0 else "" for i in reference.captions],
        comparison.models["heldout"][candidate.name].neighbours,
    )
