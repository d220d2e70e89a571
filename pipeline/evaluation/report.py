"""The report for people: index.html, one file that refers to nothing outside itself, and PNG files for `dvc plots`.

Captions are data, and escaped in HTML. Equal results give equal bytes, but for the times of sampling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.data.dataset import PreparedDataset
from pipeline.evaluation import figures, pictures, wording
from pipeline.evaluation.charts import Point, draw_quality, quality_svg
from pipeline.evaluation.comparison import Comparison
from pipeline.evaluation.conditions import CaptionSet
from pipeline.evaluation.evidence import TEACHER
from pipeline.evaluation.metrics import Metric
from pipeline.evaluation.results import UPSAMPLING, Results
from pipeline.evaluation.samples import Samples
from pipeline.evaluation.verdict import Rule, Verdict

if TYPE_CHECKING:
    from jinja2 import Template

OF_FEATURES = (
    "kid", "kid_difference", "fd", "precision", "recall", "density", "coverage",
    "clipped_density", "clipped_coverage", "sliced_w2",
)  # fmt: skip
SplitSamples = Mapping[str, Mapping[str, Samples]]


def write(
    folder: Path,
    results: Results,
    comparison: Comparison,
    samples: SplitSamples,
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
) -> None:
    """Write index.html and the figures."""
    points = {each.split: build_points(results, samples, each.split) for each in caption_sets}
    draw_quality(folder / "quality.png", points, linear_below(comparison))
    for each in caption_sets:
        shown = {name: samples[each.split][name].images for name in results.contenders}
        figures.draw_captions(folder / f"{each.split}_captions.png", each.captions, each.images, shown)
    _draw_neighbours(folder / "neighbours.png", results, comparison, samples, caption_sets, dataset)
    page = render(results, comparison, samples, caption_sets, dataset, points)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _draw_neighbours(
    path: Path,
    results: Results,
    comparison: Comparison,
    samples: SplitSamples,
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
) -> None:
    name = shown_candidate(results, comparison)
    held_out = next(each for each in caption_sets if each.split == "heldout")
    found = comparison.sets["heldout"][name].neighbours
    figures.draw_neighbours(
        path,
        samples["heldout"][name].images,
        [held_out.captions[i] for i in held_out.which],
        dataset.pictures(found.row),
        [pictures.name_of(dataset, int(row)) for row in found.row],
        found.rho,
    )


def render(
    results: Results,
    comparison: Comparison,
    samples: SplitSamples,
    caption_sets: Sequence[CaptionSet],
    dataset: PreparedDataset,
    points: Mapping[str, Sequence[Point]],
) -> str:
    """The page. All values are escaped."""
    from markupsafe import Markup

    held_out = next(each for each in caption_sets if each.split == "heldout")
    about = comparison.evidence.description
    best = shown_candidate(results, comparison)
    names = list(results.contenders)
    threshold = linear_below(comparison)
    charts = {
        kind: Markup(quality_svg(points, threshold, stacked=kind == "narrow")) for kind in ("wide", "narrow")
    }
    return _template().render(
        results=results,
        verdict=results.verdict,
        about=about,
        captioned={each.split: each.is_captioned for each in caption_sets},
        words=wording,
        headline=wording.headline(results.verdict),
        best=best,
        best_samples=pictures.best_samples(best, samples["heldout"][best], held_out),
        charts=charts,
        chart_alt=_chart_alt(points),
        threshold=threshold,
        points={split: {p.name: p for p in here} for split, here in points.items()},
        verdicts=[*results.verdict.verdicts, *results.verdict.refused],
        without_equal=[
            each.passes
            for each in (results.verdict.refused or results.verdict.verdicts)
            if results.contenders[about.candidates[each.passes]]["passes"]
            and each.passes not in about.equal_cost
        ],
        bar_of=bar_of,
        advice=_advice(results),
        seeds_known=any(rule.training is not None for rule in _all_rules(results.verdict)),
        grids=[pictures.compare_captions(names, samples[each.split], each) for each in caption_sets],
        suspects={
            name: pictures.find_suspects(name, comparison, samples["heldout"][name], held_out, dataset)
            for _, name in sorted(about.candidates.items())
        },
        power=comparison.copy_power,
        tables=build_tables(results, about.extractors),
        counts=_counts(dataset),
        dataset=dataset,
        upsampling=UPSAMPLING,
        max_px=pictures.MAX_PX,
    )


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("pipeline.evaluation")  # its folder templates/
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "number": wording.number,
        "title_of": wording.title_of,
        "prefixed": wording.with_prefix,
        "duration": wording.duration,
    }
    return environment.get_template("report.html.j2")


# --- What the page shows, in numbers.


def shown_candidate(results: Results, comparison: Comparison) -> str:
    """The model in the fewest passes that passed, else in those of least KID, else in the fewest."""
    candidates = comparison.evidence.description.candidates
    if results.verdict.refused:
        return TEACHER
    if results.verdict.default_passes is not None:
        return candidates[results.verdict.default_passes]

    def distance(passes: int) -> tuple[float, int]:
        kid = _metric(results, "train", candidates[passes], "kid")
        return (float("inf") if kid is None or kid.value is None else kid.value, passes)

    return candidates[min(candidates, key=distance)]


def _metric(results: Results, split: str, name: str, key: str) -> Metric | None:
    return results.tables[split][name].get(key)


def build_points(results: Results, samples: SplitSamples, split: str) -> list[Point]:
    """All contenders on one caption set."""
    return [
        Point(
            name,
            each["multiply_adds"],
            each["nfe"],
            samples[split][name].seconds / max(len(samples[split][name].images), 1),
            _metric(results, split, name, "kid"),
        )
        for name, each in results.contenders.items()
    ]


def linear_below(comparison: Comparison) -> float:
    """The KID below which charts are drawn to scale, and above which by its logarithm: what is a margin, or
    noise."""
    about = comparison.evidence.description
    known = [*about.margins.values(), *about.heldout_margins.values(), *about.floors.values()]
    return max([value for value in known if value > 0], default=1.0)


def _chart_alt(points: Mapping[str, Sequence[Point]]) -> str:
    parts = []
    for split, here in points.items():
        values = (
            f"{wording.title_of(p.name)} {wording.number(p.kid.value if p.kid else None)}" for p in here
        )
        parts.append(f"{wording.SPLITS[split]}: {', '.join(values)}")
    return f"KID by multiply-adds per image. {'; '.join(parts)}. The table below has the same numbers."


@dataclass(frozen=True)
class Bar:
    """A drawing of an interval; places and widths in percent of the drawing."""

    low: float
    width: float
    value: float
    threshold: float
    good_from: float
    good_width: float


def bar_of(rule: Rule) -> Bar | None:
    """The drawing for a rule; None where it has no interval."""
    if rule.value is None or rule.low is None or rule.high is None or rule.threshold is None:
        return None
    least, most = min(rule.low, rule.threshold), max(rule.high, rule.threshold)
    room = 0.12 * (most - least) or 1.0

    def place(value: float) -> float:
        return round(100 * (value - least + room) / (most - least + 2 * room), 2)

    low, high, threshold = place(rule.low), place(rule.high), place(rule.threshold)
    above = rule.name in wording.HIGH_IS_GOOD
    good = (threshold, 100 - threshold) if above else (0.0, threshold)
    return Bar(low, round(high - low, 2), place(rule.value), threshold, *(round(each, 2) for each in good))


def _all_rules(verdict: Verdict) -> list[Rule]:
    return [rule for each in (*verdict.verdicts, *verdict.refused) for rule in each.rules]


def _advice(results: Results) -> list[str]:
    """How to get the evidence that is missing; empty where every rule is decided."""
    if all(rule.outcome != "undecided" for rule in _all_rules(results.verdict)):
        return []
    note = results.samples["note"]
    more = (
        f"More images: {note}. Raise evaluate.max_calls."
        if note
        else "More images: lower promotion.precision, and raise evaluate.max_calls with it."
    )
    return [
        "More families: an interval narrows with the root of the number of families (an image with all its "
        "variants). Give the test split a larger share by data.split, or add images.",
        more,
    ]


@dataclass(frozen=True)
class Table:
    """One table of metrics: its title, the keys and names of its columns, and rows of cells by contender."""

    split: str
    title: str
    columns: list[tuple[str, bool]]  # name, and whether it is a share
    rows: list[tuple[str, list[Metric | None]]]


def build_tables(results: Results, extractors: Sequence[str]) -> list[Table]:
    """For each caption set, one table for each extractor, and one for what needs none."""
    tables = []
    for split, table in results.tables.items():
        others = [key for key in wording.METRICS if key not in OF_FEATURES]
        parts = [
            (f"by {extractor}", "" if i == 0 else f"{extractor}_", OF_FEATURES)
            for i, extractor in enumerate(extractors)
        ]
        for title, prefix, keys in [*parts, ("sharpness, captions, copies", "", others)]:
            present = [key for key in keys if any(prefix + key in row for row in table.values())]
            names = [name for name in ("real", *results.contenders) if name in table]
            rows: list[tuple[str, list[Metric | None]]] = [
                (name, [table[name].get(prefix + key) for key in present])
                for name in names
                if any(prefix + key in table[name] for key in present)
            ]
            columns = [(wording.METRICS[key][0], wording.METRICS[key][2]) for key in present]
            tables.append(Table(split, title, columns, rows))
    return tables


def _counts(dataset: PreparedDataset) -> dict[str, int]:
    """Images by split, and captions."""
    splits: dict[str, int] = {}
    for row in dataset.rows:
        splits[row["split"]] = splits.get(row["split"], 0) + 1
    return dict(sorted(splits.items())) | {"captions": len(dataset.captions)}
