"""The whole evaluation: sample every contender on held-out and on training captions, measure, judge, report.

Results (metrics.json, its summary, evidence.safetensors, verdict.json) hold no time and are byte-equal for
equal input; times are in throughput.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from pipeline import artifacts
from pipeline.config.params import Params, Promotion
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import report
from pipeline.evaluation.comparison import (
    Margin,
    RealImages,
    compare,
    first_qualified,
    kid_margins,
    measure_real,
    qualify_all,
)
from pipeline.evaluation.conditions import (
    CaptionSet,
    build_caption_set,
    build_caption_sets,
    check_images,
    plan_samples,
    wanted_samples,
)
from pipeline.evaluation.contenders import is_finite
from pipeline.evaluation.entry import Champion, Field, enter
from pipeline.evaluation.estimates import estimates_of
from pipeline.evaluation.evidence import TEACHER, Description, Evidence, Subject
from pipeline.evaluation.extractors import load_extractors
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.judging import build_verdict
from pipeline.evaluation.results import as_json, build_results, flatten, summarise
from pipeline.evaluation.samples import Samples, TaskMapper, run_locally, sample_all, sampler, throughput
from pipeline.progress import ProgressBar


def evaluate(
    params: Params,
    root: Path,
    reports: Path,
    log: Callable[[str], None] = print,
    device: str = "cpu",
    map_tasks: TaskMapper = run_locally,
    champion: Champion | None = None,
) -> dict[str, float]:
    """Evaluate the models below `root`; write evaluation/ and verdict.json to `reports`.

    Reads data/prepared, models/finetuned and models/refined. `map_tasks` samples, here or on several
    machines. Returns the numbers to track: `passed` (0 or 1) and `SPLIT/CONTENDER/METRIC` for every value in
    metrics.json.

    Raises:
        BadData: there is no test image, or there are too few training images.
        InputMissing, StorageError: a model or the data set is missing or damaged.
        ConfigError: the champion has another text encoder, or a model cannot be sampled by its settings.
    """
    dataset = PreparedDataset(root / "data" / "prepared")
    check_images(dataset)
    extractors, unavailable = load_extractors(params.evaluate.extractors, dataset, device)
    for missing in unavailable:
        log(f"extractor {missing.name}: not available, {missing.reason}")
    real = measure_real(dataset, extractors, params.seed)
    wanted = wanted_samples(params.promotion.precision)
    held_out = build_caption_set(dataset, "heldout", "test", wanted, params.seed)
    qualifications = qualify_all(extractors, real, held_out, log)
    main = first_qualified(extractors, qualifications)
    field = enter(params, root / "models", dataset, real, main, device, champion, log)
    calls = sum(field.costs[each.name].nfe for each in field.contenders)
    count = plan_samples(params.promotion.precision, params.evaluate.max_calls, calls)
    if count.note():
        log(count.note())
    caption_sets = build_caption_sets(dataset, count.count, params.seed)
    samples = _sample(params, field, caption_sets, dataset, device, map_tasks)
    uncaptioned = {each.split: why for each in caption_sets if (why := each.uncaptioned_because)}
    for split, why in uncaptioned.items():
        log(f"{split} captions: not judged, {why}")
    describe = partial(_describe, params, field, real, extractors, uncaptioned, _subject(field, dataset))
    comparison = compare(samples, caption_sets, dataset, real, extractors, qualifications, describe, log)
    log("judging, and writing the report")
    with artifacts.commit_directory(reports / "evaluation", {"kind": "evaluation"}) as folder:
        path = folder / "evidence.safetensors"
        comparison.evidence.save(path)
        evidence = Evidence.load(path)  # as whoever judges again will read it
        estimates = estimates_of(evidence)
        verdict = build_verdict(estimates, artifacts.sha256_file(path), params)
        results = build_results(verdict, estimates, comparison, field, [*extractors, *unavailable], count)
        (folder / "metrics.json").write_text(as_json(results.to_json()), encoding="utf-8")
        (folder / "summary.json").write_text(as_json(summarise(results)), encoding="utf-8")
        (folder / "throughput.json").write_text(as_json(throughput(samples)), encoding="utf-8")
        report.write(folder, results, comparison, samples, caption_sets, dataset)
    artifacts.write_atomic(reports / "verdict.json", as_json(verdict.to_json()))
    return {"passed": float(verdict.outcome == "passed")} | flatten(results)


def _sample(
    params: Params,
    field: Field,
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
    device: str,
    map_tasks: TaskMapper,
) -> dict[str, dict[str, Samples]]:
    """Images of all contenders, each in as many calls as its cost says."""
    make = partial(sampler, field.folders, device)
    seed, batch_size = params.seed, params.evaluate.batch_size
    with ProgressBar("evaluate", "batches") as bar:
        samples = sample_all(field.contenders, caption_sets, dataset, seed, batch_size, make, map_tasks, bar)
    expected = {name: cost.nfe for name, cost in field.costs.items()}
    for by_name in samples.values():
        assert {name: each.nfe for name, each in by_name.items()} == expected
    return samples


def _describe(
    params: Params,
    field: Field,
    real: RealImages,
    extractors: Sequence[Extractor],
    uncaptioned: Mapping[str, str],
    subject: Subject,
    qualified: list[str],
    floors: dict[str, float],
) -> Description:
    """What the evidence is of, given the extractors that qualified and the noise floors."""
    used = [each for each in extractors if each.name in qualified]
    margins, heldout_margins = kid_margins(used, real, margins_of(params.promotion))
    return Description(
        seed=params.seed,
        extractors=qualified,
        margins=margins,
        heldout_margins=heldout_margins,
        floors=floors,
        candidates=field.candidates,
        equal_cost=field.equal_cost,
        baseline=field.baseline,
        nfe={name: cost.nfe for name, cost in field.costs.items()},
        multiply_adds={name: cost.multiply_adds for name, cost in field.costs.items()},
        how={each.name: each.describe() for each in field.contenders},
        not_finite=[each.name for each in field.contenders if not is_finite(field.snapshots[each.model])],
        uncaptioned=dict(uncaptioned),
        subject=subject,
    )


def _subject(field: Field, dataset: PreparedDataset) -> Subject:
    """What is judged, by digests, so that the verdict follows from the evidence alone."""
    return Subject(
        data_digest=dataset.digest,
        models={name: snapshot.digest for name, snapshot in field.snapshots.items()},
        baseline_address=field.baseline_address,
        teacher_steps=field.snapshots[TEACHER].config.sampling.num_steps,
    )


def margins_of(promotion: Promotion) -> tuple[Margin, Margin]:
    """What defines the narrow and the wide margin of KID."""
    return (
        Margin(promotion.margin_jpeg, promotion.margin_noise),
        Margin(promotion.heldout_margin_jpeg, promotion.heldout_margin_noise),
    )
