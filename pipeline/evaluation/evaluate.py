"""The whole evaluation: sample every contender on held-out and on training captions, measure, judge, report.

Results (metrics.json, its summary, evidence.safetensors, verdict.json) hold no time and are byte-equal for
equal input; times are in throughput.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from pipeline import artifacts
from pipeline.config.params import Evaluate, Params, Promotion
from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import gate, report
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
from pipeline.evaluation.entry import TEACHER, Champion, Field, enter
from pipeline.evaluation.estimates import Estimates, estimates_of
from pipeline.evaluation.evidence import Description, Evidence
from pipeline.evaluation.extractors import load_extractors
from pipeline.evaluation.features import Extractor
from pipeline.evaluation.results import as_json, build_results, flatten, summarise
from pipeline.evaluation.samples import Samples, TaskMapper, run_locally, sample_all, sampler, throughput
from pipeline.evaluation.verdict import PassVerdict, Verdict, fewest_passed


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
    samples = _sample(params, field, caption_sets, dataset, device, map_tasks, log)
    uncaptioned = {each.split: why for each in caption_sets if (why := each.uncaptioned_because)}
    for split, why in uncaptioned.items():
        log(f"{split} captions: not judged, {why}")
    describe = partial(_describe, params, field, real, extractors, uncaptioned)
    comparison = compare(samples, caption_sets, dataset, real, extractors, qualifications, describe, log)
    log("judging, and writing the report")
    with artifacts.commit_directory(reports / "evaluation", {"kind": "evaluation"}) as folder:
        path = folder / "evidence.safetensors"
        comparison.evidence.save(path)
        evidence = Evidence.load(path)  # as whoever judges again will read it
        estimates = estimates_of(evidence)
        verdict = build_verdict(estimates, artifacts.sha256_file(path), field, dataset, params)
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
    log: Callable[[str], None],
) -> dict[str, dict[str, Samples]]:
    """Images of all contenders, each in as many calls as its cost says."""
    make = partial(sampler, field.folders, device)
    seed, batch_size = params.seed, params.evaluate.batch_size
    samples = sample_all(field.contenders, caption_sets, dataset, seed, batch_size, make, map_tasks, log)
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
    )


def build_verdict(
    estimates: Mapping[str, Estimates], digest: str, field: Field, dataset: PreparedDataset, params: Params
) -> Verdict:
    """Judge by the estimates from the evidence, whose file has this digest."""
    judged = gate.judge_estimates(estimates, thresholds_of(params.promotion))
    verdicts = tuple(add_training_spread(each, params.evaluate) for each in judged)
    whole = Verdict(
        data_digest=dataset.digest,
        model_digest=field.snapshots["refined"].digest,
        evidence_digest=digest,
        baseline=field.baseline_of_verdict,
        is_refined=field.snapshots["refined"].config.is_refined,
        verdicts=verdicts,
        default_passes=fewest_passed(verdicts),
    )
    return whole if whole.default_passes or field.champion else _stand_in(whole, estimates, field, params)


def _stand_in(whole: Verdict, estimates: Mapping[str, Estimates], field: Field, params: Params) -> Verdict:
    """The verdict on the fine-tuned model, where no number of passes of the refined one passed and there is no
    champion yet: a first model is better than none. The same verdict where it does not pass either."""
    teacher = field.snapshots[TEACHER]
    steps, thresholds = teacher.config.sampling.num_steps, thresholds_of(params.promotion)
    only = gate.judge_contender(estimates, steps, TEACHER, thresholds)
    if only.outcome != "passed" or not whole.is_refined:
        return whole
    return replace(
        whole,
        model_digest=teacher.digest,
        is_refined=False,
        verdicts=(only,),
        default_passes=steps,
        refused=whole.verdicts,
    )


def add_training_spread(verdict: PassVerdict, section: Evaluate) -> PassVerdict:
    """The verdict with what `evaluate.training_spread` says of its rules."""
    known = {
        each.rule: half_width
        for each in section.training_spread
        for passes, half_width in zip(section.num_passes, each.half_widths, strict=True)
        if passes == verdict.passes
    }
    rules = tuple(replace(rule, training=known.get(rule.name)) for rule in verdict.rules)
    return replace(verdict, rules=rules)


def margins_of(promotion: Promotion) -> tuple[Margin, Margin]:
    """What defines the narrow and the wide margin of KID."""
    return (
        Margin(promotion.margin_jpeg, promotion.margin_noise),
        Margin(promotion.heldout_margin_jpeg, promotion.heldout_margin_noise),
    )


def thresholds_of(promotion: Promotion) -> gate.Thresholds:
    """The thresholds in params.yaml."""
    return gate.Thresholds(**{each.name: getattr(promotion, each.name) for each in fields(gate.Thresholds)})
