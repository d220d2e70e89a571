"""The report for people: index.html, which shows the figures and all numbers.

Captions are data, and escaped in HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.figures import GRID_CAPTIONS, title_of

COLUMNS = {
    "kid": ("KID", "kernel distance to the real images; lower is better, 0 for samples of one distribution"),
    "kid_difference": ("KID difference", "paired by family; below 0 is better than the fine-tuned model"),
    "fd": ("FD", "Frechet distance; lower is better"),
    "precision": ("precision", "fraction of samples that look real"),
    "recall": ("recall", "fraction of real images that lie within the neighbourhood of a sample"),
    "density": ("density", "number of real neighbourhoods around a sample; about 1 for real images"),
    "coverage": ("coverage", "fraction of real images with a sample in their neighbourhood"),
    "top_octave": (
        "sharpness",
        "log power of the finest octave relative to the real images; 0 is equally sharp",
    ),
    "laplacian": ("Laplacian", "variance relative to the real images; 1 is equally sharp"),
    "gradient": ("edges", "distance between gradient histograms, grey levels; lower is better"),
    "retrieval_top1": (
        "retrieval",
        "fraction of samples whose caption ranks first among all captions of the split",
    ),
    "retrieval_top5": ("top 5", "fraction of samples whose caption is among the first five"),
    "copies": ("copies", "fraction of samples that copy a training image (d1/d2 < 1/3)"),
    "copying_score": ("C_T", "below -3: closer to the training set than real images are"),
}
PERCENT = {"precision", "recall", "coverage", "retrieval_top1", "retrieval_top5", "copies"}


def number(value: float | None, percent: bool = False) -> str:
    """A number as the page shows it; a dash for None."""
    if value is None:
        return "\u2013"
    return f"{value:.1%}" if percent else f"{value:.3g}"


def render(
    results: Mapping[str, Any],
    verdict: Mapping[str, Any],
    throughput: Mapping[str, Any],
    captions: Sequence[str],
    core_resolution: int,
) -> str:
    """The page; it refers to the images in its own folder, and to nothing else. All values are escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    def cell(metric: Mapping[str, Any] | None, key: str) -> Markup:
        if metric is None:
            return Markup("")
        percent = key in PERCENT or key.split("_", 1)[-1] in PERCENT
        if metric["value"] is None:
            return Markup('<span class="none">{}</span>').format(metric.get("reason", "none"))
        note = f"n={metric['n']}"
        if "low" in metric:
            note = f"{number(metric['low'])} \u2026 {number(metric['high'])}, {note}"
        return Markup("{}<small>{}</small>").format(number(metric["value"], percent), note)

    def columns(split: str, prefix: str) -> list[tuple[str, str, str]]:
        present = {key for row in results[split].values() for key in row}
        return [(prefix + key, *text) for key, text in COLUMNS.items() if prefix + key in present]

    models = list(results["heldout"])
    splits = [split for split in ("heldout", "train") if split in results]
    loader = PackageLoader("pipeline.evaluation")  # its folder templates/
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        results=results,
        verdict=verdict,
        throughput=throughput,
        titles={name: title_of(name) for name in [*models, *splits]},
        failed=[rule["name"].replace("_", " ") for rule in verdict["rules"] if not rule["passed"]],
        facts=_facts(results, throughput),
        tables=[
            (split, name, each["prefix"]) for split in splits for name, each in results["extractors"].items()
        ],
        columns=columns,
        cell=cell,
        number=number,
        speed_name=_speed_name,
        copying=_copying(results, splits),
        has_train="train" in results,
        heldout_alt="Grid of held-out captions: " + ", ".join(captions[:GRID_CAPTIONS]),
        core_resolution=core_resolution,
    )


def _speed_name(key: str) -> str:
    """`heldout/refined_1` as `refined, 1 pass; held-out captions`."""
    what, model = key.split("/")
    kind = "one image alone" if what == "one_image" else f"{title_of(what)} captions"
    return f"{title_of(model)}; {kind}"


def _facts(results: Mapping[str, Any], throughput: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The headline numbers, as (label, value)."""
    candidate, baseline = results["gate"]["candidate"], results["gate"]["baseline"]
    mine, teacher = results["heldout"][candidate], results["heldout"][baseline]
    fast, slow = (throughput[f"heldout/{name}"]["images_per_second"] for name in (candidate, baseline))
    retrieval = results["heldout"]["real"]["retrieval_top1"]["value"]
    facts = [
        (f"KID; {number(teacher['kid']['value'])} {title_of(baseline)}", number(mine["kid"]["value"])),
        (
            f"captions retrieved; {number(retrieval, True)} for real images",
            number(mine["retrieval_top1"]["value"], True),
        ),
        ("of held-out samples are copies", number(mine["copies"]["value"], True)),
        (f"images/s; {slow:.3g} {title_of(baseline)}", f"{fast:.3g}"),
    ]
    alone = throughput.get(f"one_image/{candidate}")
    return facts + ([("for one image alone", f"{alone['seconds'] * 1000:.0f} ms")] if alone else [])


def _copying(results: Mapping[str, Any], splits: Sequence[str]) -> list[str]:
    lines = []
    for split in splits:
        for model, row in results[split].items():
            copies = row.get("copies")
            if copies:
                text = copies.get("reason") or f"{number(copies['value'], True)} of {copies['n']}"
                lines.append(f"{title_of(split)} captions, {title_of(model)}: {text}")
    return lines
