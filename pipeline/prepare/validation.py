"""The gate between data and training: Great Expectations over the table of prepared images.

Every image is a row. An expectation has a severity: if a critical one fails, the pipeline stops; a warning is only
shown. The digest of the result covers no times or ids, so that equal data give equal digests. Data Docs (Great
Expectations' own pages, and a short index page) are for people.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import artifacts
from pipeline.prepare.wording import failure
from pipeline.text.captions import MAX_CAPTION

MIN_STD = 1.0  # grey levels; below it an image counts as blank
MIN_ENTROPY = 0.1  # bits; a white image with one thin line has more
MIN_SHARPNESS = 5.0  # grey levels squared; an image enlarged four times has less
MAX_ASPECT = 3.0
USUAL_MODES = ("RGB", "RGBA", "L", "LA", "P", "SVG")
CAPTIONS = "every image has a caption"
_DETAILS = "details"  # Folder of Great Expectations' own pages.
_EXAMPLES = 8
MAX_ROWS = (
    25_000  # images that are validated; of a larger set a sample, since the table is in memory several times
)


@dataclass(frozen=True)
class Record:
    """One prepared image, as the expectations see it.

    side (the shorter one) and aspect (longer to shorter) are of the file, in pixels; `ImageMeasures` explains mean
    to phash. tokens counts the tokens of the caption before truncation, caption_flaws names what is odd about the
    captions, near_elsewhere counts other splits that hold a near duplicate.
    """

    id: str
    split: str
    family: str
    group: str
    subgroup: str
    caption: str | None
    num_captions: int
    caption_flaws: str
    tokens: int
    near_elsewhere: int
    aspect: float
    side: int
    pixels: str
    width: int
    height: int
    mode: str
    mean: float
    std: float
    entropy: float
    sharpness: float
    phash: str
    peak: int
    several: bool


@dataclass(frozen=True)
class Outcome:
    """The result of one expectation: its name, the number of rows, and some that differ."""

    name: str
    severity: str
    success: bool
    rows: int
    unexpected: int
    examples: tuple[str, ...]

    @property
    def failure(self) -> str:
        """What is wrong, if it failed."""
        return failure(self.name, self.unexpected, self.examples)


@dataclass(frozen=True)
class Report:
    """All answers, about `rows` of `images` images. `success` means that no critical expectation failed."""

    outcomes: tuple[Outcome, ...]
    rows: int = 0
    images: int = 0

    @property
    def success(self) -> bool:
        """Whether no critical expectation failed."""
        return not self.failed("critical")

    @property
    def sample(self) -> str:
        """In words, where not all images were looked at."""
        return f"of a sample of {self.rows:,} of {self.images:,} images" if self.rows < self.images else ""

    def failed(self, severity: str) -> list[Outcome]:
        """Failed expectations of one severity."""
        return [one for one in self.outcomes if not one.success and one.severity == severity]

    @property
    def digest(self) -> str:
        """Equal for equal answers; holds no time and no id."""
        return artifacts.digest([asdict(outcome) for outcome in self.outcomes])

    def as_meta(self) -> dict[str, Any]:
        """For the manifest of the prepared data: digest, success, names of warnings, and the rows of a sample."""
        meta = {
            "digest": self.digest,
            "success": self.success,
            "warnings": [outcome.name for outcome in self.failed("warning")],
        }
        return meta | ({"sample": self.rows} if self.sample else {})


def _expectations(resolution: int, max_tokens: int) -> list[Any]:
    import great_expectations.expectations as module

    gxe: Any = module

    def expect(severity: str, name: str, kind: Any, **settings: Any) -> Any:
        return kind(severity=severity, notes=name, meta={"name": name}, **settings)

    between, unique = gxe.ExpectColumnValuesToBeBetween, gxe.ExpectColumnValuesToBeUnique
    given, among = gxe.ExpectColumnValuesToNotBeNull, gxe.ExpectColumnValuesToBeInSet
    lengths, contain = gxe.ExpectColumnValueLengthsToBeBetween, gxe.ExpectColumnDistinctValuesToContainSet
    rows, splits = gxe.ExpectTableRowCountToBeBetween, ["train", "val", "test"]
    must, should = "critical", "warning"
    return [
        # An empty table passes all expectations about values, so it has one of its own.
        expect(must, "there is at least one image", rows, min_value=1),
        expect(must, "every image has an id", given, column="id"),
        expect(must, "ids are unique", unique, column="id"),
        expect(must, "no two images have equal pixels", unique, column="pixels"),
        expect(must, "at most 5% are blank", between, column="std", min_value=MIN_STD, mostly=0.95),
        expect(should, "no image is blank", between, column="std", min_value=MIN_STD),
        expect(should, "images are not nearly blank", between, column="entropy", min_value=MIN_ENTROPY),
        expect(should, "images are not blurred", between, column="sharpness", min_value=MIN_SHARPNESS),
        expect(
            should,
            f"files have at least {resolution} px a side, so that none is enlarged",
            between,
            column="side",
            min_value=resolution,
        ),
        expect(
            should,
            f"files are at most {MAX_ASPECT:g} times as long as wide",
            between,
            column="aspect",
            max_value=MAX_ASPECT,
        ),
        expect(should, "files have a usual pixel format", among, column="mode", value_set=list(USUAL_MODES)),
        expect(must, "every image is in train, val or test", among, column="split", value_set=splits),
        expect(must, "some images are for training", contain, column="split", value_set=["train"]),
        expect(should, "some images are held out", contain, column="split", value_set=["val", "test"]),
        expect(
            must, "variants of one motif are in one split", among, column="splits_of_family", value_set=[1]
        ),
        expect(should, "near duplicates are in one split", between, column="near_elsewhere", max_value=0),
        expect(
            must,
            f"captions have 1 to {MAX_CAPTION} characters",
            lengths,
            column="caption",
            min_value=1,
            max_value=MAX_CAPTION,
        ),
        expect(should, CAPTIONS, given, column="caption"),
        expect(should, "captions read like text", among, column="caption_flaws", value_set=[""]),
        expect(should, f"captions fit {max_tokens} tokens", between, column="tokens", max_value=max_tokens),
    ]


def validate(
    records: Sequence[Record], resolution: int, max_tokens: int, docs: Path | None = None, images: int = 0
) -> Report:
    """Ask every expectation about `records`.

    Args:
        records: prepared images, in order.
        resolution: px that they should have.
        max_tokens: tokens that a caption should fit.
        docs: folder to write Great Expectations' pages to (below `details/`); replaced.
        images: number of all prepared images, where `records` are a sample of them.
    """
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")  # Of pandas and marshmallow inside the library.
        expectations = _expectations(resolution, max_tokens)
        logging.getLogger("great_expectations").setLevel(logging.ERROR)
        results = _run(records, expectations, Path(scratch))
        if docs is not None:
            shutil.rmtree(docs / _DETAILS, ignore_errors=True)
            shutil.copytree(scratch, docs / _DETAILS)
    return Report(tuple(_outcome(result) for result in results), len(records), max(images, len(records)))


def _frame(records: Sequence[Record]) -> Any:
    import pandas as pd

    frame = pd.DataFrame([vars(record) for record in records], columns=list(Record.__dataclass_fields__))
    splits: dict[str, set[str]] = defaultdict(set)
    for record in records:
        splits[record.family].add(record.split)
    frame["splits_of_family"] = [len(splits[record.family]) for record in records]
    return frame


def _run(records: Sequence[Record], expectations: list[Any], site: Path) -> list[dict[str, Any]]:
    """Results as JSON values, in the order of the expectations; Data Docs go to `site`."""
    import great_expectations as module
    from great_expectations.data_context.types.base import ProgressBarsConfig

    gx: Any = module
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    for name in list(context.variables.data_docs_sites or {}):
        context.delete_data_docs_site(name)
    backend = {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(site)}
    builder = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": backend,
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "site_section_builders": {
            "expectations": "none",
            "profiling": "none",
        },  # the page of results holds both
    }
    context.add_data_docs_site(site_name="data_docs", site_config=builder)
    asset = context.data_sources.add_or_update_pandas("prepared").add_dataframe_asset(name="images")
    batch = asset.add_batch_definition_whole_dataframe("all")
    suite = context.suites.add_or_update(gx.ExpectationSuite(name="images", expectations=expectations))
    definition = context.validation_definitions.add_or_update(
        gx.ValidationDefinition(name="images", data=batch, suite=suite)
    )
    checkpoint = gx.Checkpoint(
        name="prepare",
        validation_definitions=[definition],
        actions=[gx.checkpoint.UpdateDataDocsAction(name="data_docs", site_names=["data_docs"])],
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": ["id"]},
    )
    answer = context.checkpoints.add_or_update(checkpoint).run(
        batch_parameters={"dataframe": _frame(records)}
    )
    (run,) = answer.run_results.values()
    results: list[dict[str, Any]] = [result.to_json_dict() for result in run.results]
    # The library answers in an order of its own.
    order = {expectation.meta["name"]: number for number, expectation in enumerate(expectations)}
    return sorted(results, key=lambda result: order[result["expectation_config"]["meta"]["name"]])


def _outcome(result: dict[str, Any]) -> Outcome:
    config, details = result["expectation_config"], result["result"] or {}
    if result["exception_info"].get("raised_exception"):
        raise RuntimeError(f"{config['type']}: {result['exception_info'].get('exception_message')}")
    indices = details.get("unexpected_index_list") or []
    return Outcome(
        name=config["meta"]["name"],
        severity=config["severity"],
        success=bool(result["success"]),
        rows=int(details.get("element_count", 0)),
        unexpected=int(details.get("unexpected_count", 0)),
        examples=tuple(str(index["id"]) for index in indices[:_EXAMPLES]),
    )


def write_index_page(
    docs: Path,
    report: Report,
    source: str,
    counts: dict[str, int],
    problems: dict[str, list[str]],
    sheet: str | None = None,
    thumbnails: Mapping[str, str] = {},
) -> None:
    """Write `docs/index.html`: counts, the contact sheet, every expectation, and what was left out and why.

    `problems` has the one-line reasons by code; `sheet` is the contact sheet's path relative to `docs`,
    `thumbnails` are data URIs by image id, for the examples of what failed.
    Everything that came from data is escaped.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("pipeline.prepare"), autoescape=True)  # its templates/
    page = environment.get_template("index.html.j2").render(
        report=report,
        source=source,
        counts=counts,
        problems=problems,
        sheet=sheet,
        thumbnails=thumbnails,
    )
    artifacts.write_atomic(docs / "index.html", page)
