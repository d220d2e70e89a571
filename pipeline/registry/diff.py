"""Two registered versions side by side: parameters, data, rules with their intervals, and images of equal captions
and seeds. As lines, and as one page that refers to nothing outside itself.

Facts are those stored with the versions (provenance.py); what a version does not hold is a dash.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.config.strict_yaml import read_yaml
from pipeline.evaluation.pictures import Picture, picture
from pipeline.inference.generator import load_generator
from pipeline.registry import champions
from pipeline.registry.package import Registry, Version
from pipeline.registry.trace import read_lineage
from pipeline.tracking.entries import flatten

MISSING = "-"
PROMPTS = 8  # captions by default


@dataclass(frozen=True)
class Row:
    """One fact of both."""

    name: str
    first: str
    second: str

    @property
    def differs(self) -> bool:
        """Whether the two are not equal."""
        return self.first != self.second


@dataclass(frozen=True)
class Difference:
    """origin: code, data, parents and verdict. params: those that differ. rules: by number of passes."""

    first: Version
    second: Version
    origin: list[Row]
    params: list[Row]
    rules: list[Row]


def compare(root: Path, first: str, second: str) -> Difference:
    """Compare the versions at two addresses. Raises as `champions.resolve` does."""
    registry = Registry(root)
    versions = [champions.resolve(registry, uri) for uri in (first, second)]
    lineages = [read_lineage(registry, version) or {} for version in versions]
    origin = [_origin(version, lineage) for version, lineage in zip(versions, lineages, strict=True)]
    params = _rows(*(_params(registry, version) for version in versions))
    rules = _rows(*(_rules(lineage) for lineage in lineages))
    return Difference(versions[0], versions[1], _rows(*origin), [row for row in params if row.differs], rules)


def _rows(first: Mapping[str, str], second: Mapping[str, str]) -> list[Row]:
    return [
        Row(name, first.get(name, MISSING), second.get(name, MISSING))
        for name in dict.fromkeys([*first, *second])
    ]


def _origin(version: Version, lineage: Mapping[str, Any]) -> dict[str, str]:
    tags = {key.removeprefix("crescendo."): value for key, value in version.tags.items()}
    facts = {
        "snapshot": version.digest,
        "default passes": version.default_passes,
        "commit": tags.get("git_commit"),
        "data": tags.get("data_digest"),
        "validation": tags.get("validation"),
        "parent": tags.get("parent_digest"),
        "verdict": tags.get("verdict"),
    }
    if lineage:
        baseline = lineage["verdict"]["baseline"]
        facts["compared with"] = f"{baseline['address']} {baseline['model_digest'][:12]}"
        facts |= lineage["files"]
    return {name: _short(str(value)) for name, value in facts.items() if value is not None}


def _short(value: str) -> str:
    return value[:12] if len(value) in (40, 64) else value


def _params(registry: Registry, version: Version) -> dict[str, str]:
    with tempfile.TemporaryDirectory(prefix="crescendo-") as scratch:
        path = registry.file(version, "artifacts/project/params.yaml", Path(scratch))
        return {} if path is None else flatten(read_yaml(path))


def _rules(lineage: Mapping[str, Any]) -> dict[str, str]:
    verdict = lineage.get("verdict", {"verdicts": [], "refused": []})
    refined = verdict.get("is_refined")
    rules = {}
    for each in verdict["refused"] + verdict["verdicts"]:
        unit = "passes" if refined or each in verdict["refused"] else "steps"
        for rule in each["rules"]:
            rules[f"{each['passes']} {unit}: {rule['name']}"] = _outcome(rule)
    return rules


def _outcome(rule: Mapping[str, Any]) -> str:
    text = str(rule["outcome"])
    if rule["value"] is not None:
        text += f" {rule['value']:.4g}"
    if rule["low"] is not None and rule["high"] is not None:
        text += f" [{rule['low']:.4g}, {rule['high']:.4g}]"
    return text


def describe(difference: Difference) -> list[str]:
    """What differs, a line each."""
    lines = [f"{difference.first.uri} -> {difference.second.uri}"]
    for title, every in _tables(difference):
        rows = [row for row in every if row.differs]
        lines.append(f"{title}:" if rows else f"{title}: equal")
        lines += [f"  {row.name}: {row.first} -> {row.second}" for row in rows]
    return lines


def write_page(root: Path, difference: Difference, path: Path, prompts: Sequence[str] | None = None) -> None:
    """Write the page. `prompts` default to held-out captions of data/prepared, or none.

    Raises as loading a model does."""
    prompts = list(prompts or _captions(root))
    registry = Registry(root)
    columns = [_draw(registry, version, prompts) for version in (difference.first, difference.second)]
    page = _template().render(
        difference=difference, rows=list(zip(prompts, *columns, strict=True)), tables=_tables(difference)
    )
    artifacts.write_atomic(path, page)


def _tables(difference: Difference) -> list[tuple[str, list[Row]]]:
    return [
        ("Code, data, verdict", difference.origin),
        ("Parameters", difference.params),
        ("Rules with 95% intervals", difference.rules),
    ]


def _captions(root: Path) -> list[str]:
    if not (root / "data/prepared").is_dir():
        return [""] * PROMPTS
    from pipeline.data.dataset import PreparedDataset
    from pipeline.evaluation.conditions import build_caption_set

    dataset = PreparedDataset(root / "data/prepared")
    return build_caption_set(dataset, "heldout", "test", PROMPTS, 0).captions[:PROMPTS]


def _draw(registry: Registry, version: Version, prompts: Sequence[str]) -> list[Picture]:
    """An image of each prompt, in the default passes of the version; image i has seed i."""
    with tempfile.TemporaryDirectory(prefix="crescendo-") as folder:
        snapshot = registry.fetch(version, Path(folder))
        generator = load_generator(snapshot, default_passes=version.default_passes)
    images = generator.images(prompts, range(len(prompts)))
    return [picture(image, prompt, version.uri) for image, prompt in zip(images, prompts, strict=True)]


def _template() -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader("pipeline.registry"), PackageLoader("pipeline.evaluation")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("diff.html.j2")
