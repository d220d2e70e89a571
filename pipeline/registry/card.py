"""The model card of a registered model: README.md, the same as card.html in one file, and samples.

Written from what promotion has checked, and from the data and the evaluation where they are still those that were
judged; what is not there is said to be so. Nothing is picked by hand: captions are the first held-out ones in a
random order, with seeds from 0. Captions and names are data, and are escaped.
"""

from __future__ import annotations

import base64
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.errors import PipelineError, one_line
from pipeline.evaluation import wording
from pipeline.evaluation.verdict import PassVerdict, Verdict
from pipeline.inference.generator import Generator, load_generator, tile
from pipeline.inference.png import encode_png
from pipeline.models.config import SnapshotConfig
from pipeline.models.counting import count_parameters
from pipeline.registry.history import when

EVALUATION = "reports/evaluation"
PREPARED = "data/prepared"
CAPTIONS, SEEDS = 6, 4  # of the samples
MAX_CAPTION = 160  # characters shown
PLAIN = re.compile(r"[\w ,.]{1,60}", re.ASCII)  # a caption that needs no quoting in JSON and in a shell
QUALITY = ("kid", "fd", "precision", "recall", "coverage", "top_octave", "caption_rank", "retrieval_top1")
COPIES = ("alike", "replicas")
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class Subject:
    """What the card is about. lineage: as `provenance.write_lineage` wrote it. params: those of the signature."""

    name: str
    snapshot: Path
    config: SnapshotConfig
    verdict: Verdict
    lineage: Mapping[str, Any]
    params: Mapping[str, int | float]


def write_card(folder: Path, root: Path, subject: Subject) -> None:
    """Write README.md, card.html and samples/ of a model of the project at `root` to `folder`."""
    generator = load_generator(subject.snapshot, default_passes=subject.verdict.default_passes)
    captions = heldout_captions(root, subject)
    draw_samples(folder / "samples", generator, captions)
    facts = facts_of(root, subject, generator) | {
        "captions": captions,
        "example": next(filter(PLAIN.fullmatch, captions), "a prompt"),
    }
    text = _environment().get_template("card.md.j2").render(facts)
    text = re.sub(r"\n{3,}", "\n\n", text)
    (folder / "README.md").write_text(text, encoding="utf-8")
    (folder / "card.html").write_text(as_page(text, folder, subject.name), encoding="utf-8")


# --- Samples.


def heldout_captions(root: Path, subject: Subject) -> list[str]:
    """The first captions of the test split, in the random order of the evaluation; no caption, where the data are
    not those of the verdict, or have none."""
    if _data_of(root, subject) is None:
        return [""]
    from pipeline.data.dataset import PreparedDataset
    from pipeline.evaluation.conditions import build_caption_set

    dataset = PreparedDataset(root / PREPARED)
    found = build_caption_set(dataset, "heldout", "test", CAPTIONS, 0).captions
    return list(dict.fromkeys(found))[:CAPTIONS] or [""]


def draw_samples(folder: Path, generator: Generator, captions: list[str]) -> None:
    """A strip of SEEDS images for each caption: 1.png, 2.png, ..."""
    folder.mkdir(parents=True)
    prompts = [caption for caption in captions for _ in range(SEEDS)]
    images = generator.images(prompts, [*range(SEEDS)] * len(captions))
    for i, caption in enumerate(captions):
        strip = {"prompts": [caption], "seed": 0, "num": SEEDS, "columns": SEEDS}
        content = encode_png(tile(images[i * SEEDS : (i + 1) * SEEDS], SEEDS), generator.made() | strip)
        (folder / f"{i + 1}.png").write_bytes(content)


# --- Facts.


def facts_of(root: Path, subject: Subject, generator: Generator) -> dict[str, Any]:
    """What the template is filled with."""
    verdict, config = subject.verdict, subject.config
    judged = _judged(verdict)
    return {
        "name": subject.name,
        "config": config,
        "digest": verdict.model_digest,
        "parameters": count_parameters(generator.snapshot.denoiser),
        "params": subject.params,
        "max_caption": MAX_CAPTION,
        "seeds": SEEDS,
        "data": _data_of(root, subject),
        "verdict": verdict,
        "judged": judged,
        "tables": _tables_of(root, verdict, judged),
        "quality": QUALITY,
        "copies": COPIES,
        "splits": SPLITS,
        "lineage": subject.lineage,
        "encoder": config.text_encoder,
        "words": wording,
        "when": when,
    }


def _judged(verdict: Verdict) -> PassVerdict:
    """The verdict on what the model does by default."""
    by_passes = {each.passes: each for each in verdict.verdicts}
    return by_passes[verdict.default_passes or min(by_passes)]


def _data_of(root: Path, subject: Subject) -> dict[str, Any] | None:
    """What the prepared data say of themselves; None where they are not here, or are not those of the verdict."""
    try:
        manifest = artifacts.read_manifest(root / PREPARED)
    except PipelineError:
        return None
    same = manifest["digest"] == subject.verdict.data_digest
    meta: dict[str, Any] = manifest["meta"]
    return meta if same else None


def _tables_of(root: Path, verdict: Verdict, judged: PassVerdict) -> dict[str, dict[str, Any]] | None:
    """{split: {metric: number with interval}} of the model in its default, and below "real" of real images; None
    where the report of the evaluation is not here, or is not that of the verdict."""
    folder = root / EVALUATION
    try:
        files = artifacts.verify_directory(folder)["files"]
        if files["evidence.safetensors"]["sha256"] != verdict.evidence_digest:
            return None
        numbers = json.loads((folder / "metrics.json").read_bytes())
    except (PipelineError, OSError, KeyError, ValueError):
        return None
    name = f"refined_{judged.passes}" if verdict.is_refined else "finetuned"
    rows = {split: numbers.get(split, {}) for split in SPLITS}
    tables = {split: each.get(name, {}) for split, each in rows.items()}
    return tables | {f"real {split}": each.get("real", {}) for split, each in rows.items()}


# --- Text.


def escape(value: object, most: int = 1000) -> str:
    """A value as plain text in Markdown, also within a table, of at most so many characters."""
    text = one_line(value)
    shown = text if len(text) <= most else text[: most - 1] + "\u2026"
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", shown)


def estimate(metric: Mapping[str, Any] | None, share: bool = False) -> str:
    """As in `0.219 [0.131, 0.33]`, or why there is no number."""
    if not metric:
        return "\u2013"
    if metric.get("value") is None:
        return escape(wording.explain(metric.get("reason"))) or "\u2013"
    text = wording.number(metric["value"], share)
    low, high = metric.get("low"), metric.get("high")
    if low is None or high is None:
        return text
    return f"{text} [{wording.number(low, share)},\u00a0{wording.number(high, share)}]"


def as_page(markdown: str, folder: Path, name: str) -> str:
    """The card as HTML that refers to nothing outside itself."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    body = body.replace("<pre>", '<pre tabindex="0">').replace("</table>", "</table></div>")
    numbers = itertools.count(1)
    region = '<div class="scroll small" tabindex="0" role="region" aria-label="Table {}"><table>'
    body = re.sub("<table>", lambda _: region.format(next(numbers)), body)
    for path in sorted((folder / "samples").glob("*.png")):
        source = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="samples/{path.name}"', f'src="{source}"')
    return str(_environment().get_template("card.html.j2").render(body=body, name=name))


def _environment() -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader("pipeline.registry"), PackageLoader("pipeline.evaluation")]),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"md": escape, "estimate": estimate}
    return environment
