"""The whole evaluation: sample every model on held-out and on training captions, measure, judge, report.

Results (metrics.json, its summary, verdict.json) hold no time and are byte-equal for equal input; times are in
throughput.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config.params import Params
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import gate, memorisation, metrics, report
from pipeline.evaluation.comparison import (
    ModelMeasures,
    Reference,
    add_differences,
    build_real_images,
    build_reference,
    measure,
    measure_floors,
    measure_real,
)
from pipeline.evaluation.conditions import build_caption_sets
from pipeline.evaluation.features import Extractor, lite2, randconv
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.samples import BASELINE, Samples, _speed_line, latency, load_models, sample, speed

Log = Callable[[str], None]


# --- All of it.


def evaluate(params: Params, root: Path, say: Log = print, device: str = "cpu") -> dict[str, float]:
    """Evaluate the models below `root`; write reports/evaluation/ and reports/verdict.json there.

    Reads data/prepared, models/finetuned and models/refined. Returns the numbers to track:
    `passed` (0 or 1) and `SPLIT/MODEL/METRIC` for all of metrics.json that was not refused.

    Raises:
        BadData: the test split has no captioned image, or there are fewer than 8 training images.
        InputMissing, StorageError: a model or the data set is missing or damaged.
    """
    dataset = PreparedDataset(root / "data" / "prepared")
    models = load_models(root / "models", params, device)
    conditions = build_caption_sets(dataset, params)
    held_out = conditions[0]
    extractors = [randconv(dataset.resolution, device=device), lite2(dataset.resolution, device)]

    samples: dict[str, dict[str, Samples]] = {}
    throughput: dict[str, Any] = {}
    for condition in conditions:
        samples[condition.split] = {}
        for model in models:
            made = sample(model, condition, dataset, params)
            samples[condition.split][model.name] = made
            throughput[f"{condition.split}/{model.name}"] = speed(
                len(made.images), made.nfe, made.share, made.seconds
            )
            say(_speed_line(model.name, condition.split, made))
    for model in models:
        if not model.slow:
            throughput[f"one_image/{model.name}"] = latency(model, dataset, held_out)

    say(f"features: {' and '.join(each.name for each in extractors)}")
    reference = build_reference(dataset, extractors, params.seed)
    held_raw = {extractor.name: extractor(held_out.images) for extractor in extractors}
    held_white = {name: reference.whitening[name](raw) for name, raw in held_raw.items()}
    held_neighbours = memorisation.nearest(held_out.images, reference.images, reference.bases)
    floors = measure_floors(reference, held_out, held_white, extractors, params.seed)

    measured: dict[str, dict[str, ModelMeasures]] = {}
    tables: dict[str, dict[str, dict[str, Metric]]] = {}
    for condition in conditions:
        real = build_real_images(condition, dataset, reference, held_white, params.seed)
        own = condition.split == "heldout"
        draws = min(params.evaluate.teacher_samples_per_caption, params.evaluate.samples_per_caption)
        measured[condition.split] = {
            name: measure(made, condition, real, reference, extractors, draws, held_neighbours)
            for name, made in samples[condition.split].items()
        }
        add_differences(measured[condition.split], extractors)
        tables[condition.split] = {
            "real": measure_real(condition, real, reference, held_raw if own else None)
        } | {name: each.metrics for name, each in measured[condition.split].items()}
        say(f"metrics: {condition.split}, {len(condition.rows)} captions, {len(models)} models")

    candidate = next(model for model in models if not model.slow)
    rules = gate.decide(
        tables["heldout"][candidate.name],
        tables["heldout"][BASELINE],
        tables["heldout"][candidate.name]["kid_difference"],
        floors["kid_half_half"],
        floors["sharpness_half_half"],
        all(bool(p.isfinite().all()) for p in candidate.snapshot.denoiser.parameters()),
        gate.Thresholds(
            **{name: getattr(params.promotion, name) for name in gate.Thresholds.__annotations__}
        ),
    )
    data_digest = artifacts.directory_digest(dataset.path)
    verdict = gate.verdict(rules, candidate.snapshot.digest, data_digest)
    results = as_results(tables, floors, extractors, reference, samples, candidate.name, verdict["passed"])

    say("report: pictures and index.html")
    with artifacts.commit_directory(root / "reports" / "evaluation", {"kind": "evaluation"}) as folder:
        (folder / "metrics.json").write_text(_as_json(results), encoding="utf-8")
        (folder / "summary.json").write_text(_as_json(summarise(tables["heldout"])), encoding="utf-8")
        (folder / "throughput.json").write_text(_as_json(throughput), encoding="utf-8")
        for condition in conditions:
            shown = {name: made.native for name, made in samples[condition.split].items()}
            report.draw_captions(
                folder / f"{condition.split}_captions.png", condition.captions, condition.images, shown
            )
        best = samples["heldout"][candidate.name]
        neighbours = measured["heldout"][candidate.name].neighbours
        report.draw_neighbours(
            folder / "neighbours.png",
            best.images,
            [held_out.captions[i] for i in best.which],
            reference.images,
            [dataset.captions[i] if i >= 0 else "" for i in reference.captions],
            neighbours,
        )
        report.draw_quality(folder / "quality.png", results)
        page = report.render(results, verdict, throughput, held_out.captions, models[0].snapshot.resolution)
        (folder / "index.html").write_text(page, encoding="utf-8")
    artifacts.write_atomic(root / "reports" / "verdict.json", _as_json(verdict))
    return {"passed": float(verdict["passed"])} | flatten(tables)


def flatten(tables: dict[str, dict[str, dict[str, Metric]]]) -> dict[str, float]:
    """`SPLIT/MODEL/METRIC` for every number that was not refused."""
    return {
        f"{split}/{model}/{name}": value
        for split, models in tables.items()
        for model, found in models.items()
        for name, metric in found.items()
        if (value := metrics.rounded(metric.value)) is not None
    }


def as_results(
    tables: dict[str, dict[str, dict[str, Metric]]],
    floors: dict[str, Metric],
    extractors: list[Extractor],
    reference: Reference,
    samples: dict[str, dict[str, Samples]],
    candidate: str,
    passed: bool,
) -> dict[str, Any]:
    """What metrics.json holds: split / model / metric / value, n, low, high or reason."""
    described = {
        extractor.name: {
            "sha256": extractor.sha256,
            "related_to_discriminator": int(extractor.related_to_discriminator),
            "dim": reference.raw[extractor.name].shape[1],
            "whitened_dim": reference.white(extractor.name).shape[1],
        }
        for extractor in extractors
    }
    return {
        **{
            split: {
                model: {name: metric.as_json() for name, metric in found.items()}
                for model, found in models.items()
            }
            for split, models in tables.items()
        },
        "floors": {name: metric.as_json() for name, metric in floors.items()},
        "nfe": {name: made.nfe for name, made in samples["heldout"].items()},
        "extractors": described,
        "upsampling": "bicubic, antialiased, rounded to uint8, before features",  # images below the data's px
        "gate": {"candidate": candidate, "baseline": BASELINE, "passed": int(passed)},
    }


def summarise(tables: Mapping[str, Mapping[str, Metric]]) -> dict[str, dict[str, float]]:
    """What `dvc metrics show` prints: model / metric / value, without what was refused."""
    shown = ("kid", "recall", "coverage", "top_octave", "retrieval_top1")
    return {
        model: {
            name: value
            for name in shown
            if name in found and (value := metrics.rounded(found[name].value)) is not None
        }
        for model, found in tables.items()
    }


def _as_json(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=1, sort_keys=True, allow_nan=False) + "\n"
