"""How the report names and explains what is measured, in words that need no other page."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby

from pipeline.evaluation.verdict import PassVerdict, Rule, Verdict, count_of, families_needed

# Of metrics: a short name, what it means, and whether it is a share. An extractor's name may precede the key.
METRICS: dict[str, tuple[str, str, bool]] = {
    "kid": (
        "KID",
        "Kernel inception distance: how far the images as a whole are from real ones, in the features of an "
        "extractor. 0 means that the two sets cannot be told apart; it may fall slightly below by chance. "
        "Lower is better.",
        False,
    ),
    "kid_difference": (
        "KID difference",
        "KID minus that of the baseline, over the same captions and seeds. Below 0 is better than the baseline.",
        False,
    ),
    "fd": (
        "FD",
        "Fréchet distance between Gaussians fitted to the features of both sets. Lower is better; compare it "
        "within this table only, since it depends on the number of images.",
        False,
    ),
    "precision": (
        "precision",
        "Share of the images that lie within the neighbourhood of a real one: do they look real?",
        True,
    ),
    "recall": (
        "recall",
        "Share of the real images that lie within the neighbourhood of a drawn one: is anything missing?",
        True,
    ),
    "density": (
        "density",
        "How many real neighbourhoods an image lies in, of those it should; about 1 for real images.",
        False,
    ),
    "coverage": ("coverage", "Share of the real images with a drawn one in their neighbourhood.", True),
    "clipped_density": (
        "clipped density",
        "Density that outliers cannot raise: the equivalent share of good images.",
        False,
    ),
    "clipped_coverage": (
        "clipped coverage",
        "Coverage, calibrated likewise: 1 for real images, 1 − p if a share p is far from all of them.",
        False,
    ),
    "sliced_w2": (
        "sliced W2",
        "Squared Wasserstein distance along random directions of the features. Lower is better.",
        False,
    ),
    "top_octave": (
        "sharpness",
        "Log power of the finest details relative to real images of the same captions: 0 is equally sharp, "
        "below is blurrier, above is noisier.",
        False,
    ),
    "laplacian": (
        "Laplacian",
        "Variance of the Laplacian, a measure of fine contrast, relative to real images; 1 is equal.",
        False,
    ),
    "gradient": (
        "edges",
        "Difference between the strengths of edges in drawn and real images, in grey levels. Lower is better.",
        False,
    ),
    "caption_rank": (
        "caption rank",
        "Where an image's own caption ranks among all captions when they are matched to the image: 1 is first, "
        "0.5 is chance, 0 is last.",
        False,
    ),
    "retrieval_top1": ("own caption first", "Share of the images whose own caption ranks first.", True),
    "alike": (
        "alike",
        "Share of the images that are more than three times nearer to one training image (and its variants) "
        "than to all others.",
        True,
    ),
    "replicas": ("replicas", "Share of the images that are almost equal to a training image.", True),
}

# Of rules: a title, and what has to hold.
RULES: dict[str, tuple[str, str]] = {
    "finite": ("finite weights", "No weight of the model is NaN or infinite."),
    "extractors": (
        "a yardstick that works",
        "At least one feature extractor can tell slight from heavy damage on these data.",
    ),
    "kid": ("quality", "KID is not above that of the baseline by more than the margin; training captions."),
    "equal_cost": (
        "quality at equal cost",
        "KID is not above that of the fine-tuned model at equal cost by more than the margin; training captions.",
    ),
    "heldout": (
        "quality on held-out captions",
        "KID is not above that of the baseline by more than the margin; captions that no stage trained on.",
    ),
    "recall": ("recall", "The share of real images with drawn ones like them is near that of the baseline."),
    "coverage": (
        "coverage",
        "The share of real images that drawn ones come close to is near that of the baseline.",
    ),
    "sharpness": (
        "sharpness",
        "Fine detail is not further from that of real images than the baseline's by more than the margin.",
    ),
    "captions": (
        "captions",
        "Images show what their captions say: their caption rank is hardly below the baseline's.",
    ),
    "copies": (
        "copies",
        "Images are not more often much nearer to one training image than to all others than unseen real "
        "images are.",
    ),
    "replicas": ("replicas", "At most 1% of the images drawn are almost equal to a training image."),
}
HIGH_IS_GOOD = ("recall", "coverage", "captions")
SPLITS = {"heldout": "held-out captions", "train": "training captions"}
OUTCOMES = {
    "passed": ("✓", "passed"),
    "failed": ("✗", "failed"),
    "undecided": ("?", "undecided"),
    "not_applicable": ("–", "not applicable"),
}


def title_of(name: str) -> str:
    """The name of a contender as the report prints it: `refined_2` is `refined, 2 passes`."""
    kind, _, passes = name.rpartition("_")
    if passes.isdigit():
        of = count_of(int(passes))
        return f"fine-tuned, cost of {of}" if kind == "equal_cost" else f"{kind}, {of}"
    return {
        "finetuned": "fine-tuned, default",
        "eight_calls": "fine-tuned, at most 8 calls",
        "real": "real images",
    }.get(name, name)


def split_rule(name: str) -> tuple[str, str]:
    """Kind of a rule, and the extractor that it uses or "": `kid_group-cls` is `kid`, `group-cls`."""
    for kind in ("kid", "equal_cost", "heldout"):
        if name.startswith(f"{kind}_"):
            return kind, name.removeprefix(f"{kind}_")
    return name, ""


def title_of_rule(name: str) -> str:
    """As in `quality (randconv)`."""
    kind, extractor = split_rule(name)
    title = RULES.get(kind, (kind.replace("_", " "), ""))[0]
    return f"{title} ({extractor})" if extractor else title


def number(value: float | None, share: bool = False) -> str:
    """A number as the page shows it, of three significant digits; a dash for None."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.1%}" if share else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return text.replace("-", "−")


def with_prefix(value: float) -> str:
    """A count with the prefix of the SI: `41.2 M`."""
    for power, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= power:
            return f"{value / power:.3g}{prefix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """`14 ms`, `2.1 s`."""
    value, unit = (seconds * 1000, "ms") if seconds < 0.9995 else (seconds, "s")
    return f"{value:.2g} {unit}" if value < 10 else f"{value:.0f} {unit}"


def explain(reason: str | None) -> str:
    """Why there is no number or interval, for people: `fd: n=62, needs 200` is `too few images: 62, needs 200`."""
    without_name = re.sub(r"^\w+: (?=\d+ families, an interval needs)", "", reason or "")
    return re.sub(r"^\w+: n=(\d+), needs (\d+)$", r"too few images: \1, needs \2", without_name)


# --- The verdict in a sentence.


def headline(verdict: Verdict) -> str:
    """What was decided: `Passed with 2 passes: ...`, or why nothing did."""
    if not verdict.is_refined:
        (only,) = verdict.verdicts
        subject = verdict.title_of(only)
        end = "the refined model did not pass" if verdict.refused else "refinement gained nothing"
        if only.outcome == "passed":
            return f"Passed: {subject}; {end}"
        return f"Not promoted: {subject}: {_obstacles(only)}; {end}"
    for each in verdict.verdicts:
        if each.passes == verdict.default_passes:
            reason = next((r.reason for r in each.rules if r.name.startswith("kid_")), None)
            baseline = "the champion" if verdict.baseline.is_registered else "the fine-tuned model"
            why = (reason or "every rule holds").replace("the baseline", baseline)
            return f"Passed with {count_of(each.passes)}: {why}"
    return f"Not promoted: {by_passes(verdict.verdicts)}"


def by_passes(verdicts: Sequence[PassVerdict]) -> str:
    """Why nothing passed: `with 1 pass it fails on quality; with 2 or 4 passes undecided on ...`."""
    parts = []
    for obstacles, alike in groupby(verdicts, key=_obstacles):
        *fewer, last = (each.passes for each in alike)
        before = f"{', '.join(map(str, fewer))} or " if fewer else ""
        parts.append(f"with {before}{count_of(last)} {obstacles}")
    return "; ".join(parts)


def _obstacles(verdict: PassVerdict) -> str:
    kinds = list(dict.fromkeys(RULES.get(split_rule(r.name)[0], (r.name,))[0] for r in verdict.obstacles))
    rules = "1 more rule" if len(kinds) == 3 else f"{len(kinds) - 2} more rules"
    named = " and ".join(kinds) if len(kinds) < 3 else f"{', '.join(kinds[:2])} and {rules}"
    if verdict.outcome == "failed":
        return f"it fails on {named}"
    reason = explain(max(verdict.obstacles, key=_needed).reason)
    return f"undecided on {named} ({reason.removeprefix('undecided: ')})"


def _needed(rule: Rule) -> float:
    """How many families would decide a rule; infinite where none is known to."""
    if rule.value is None or rule.low is None or rule.high is None or rule.threshold is None:
        return math.inf
    return families_needed(rule.families or 0, rule.value, rule.low, rule.high, rule.threshold)
