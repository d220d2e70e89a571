"""What metrics.json holds: every metric by its name, with a number or the reason why there is none."""

from dataclasses import replace

import pytest

from pipeline.config.params import Params
from pipeline.evaluation.estimates import Estimates
from pipeline.evaluation.evidence import Measured
from pipeline.evaluation.results import build_table
from tests.evaluation.evidence import CANDIDATE
from tests.evaluation.reports import Made, make

OF_FEATURES = {
    "kid", "kid_difference", "fd", "precision", "recall", "density", "coverage",
    "clipped_density", "clipped_coverage", "sliced_w2",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tiny_params: Params, tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("data"), tiny_params, families=7)


def test_metrics_of_too_few_images_are_refused_by_their_names(made: Made) -> None:
    row = made.results.to_json()["train"][CANDIDATE]
    assert set(row) > OF_FEATURES
    assert row["clipped_density"] == {
        "value": None,
        "n": 7,
        "reason": "clipped_density: n=7, needs 50",
    }
    assert row["sliced_w2"]["reason"] == "sliced_w2: n=7, needs 50"


def test_metrics_of_other_extractors_have_their_names_before_them(made: Made) -> None:
    evidence = made.comparison.evidence

    def twice(measured: Measured) -> Measured:
        return replace(measured, features=measured.features | {"group-cls": measured.features["randconv"]})

    conditions = evidence.conditions["train"]
    real = conditions.real | {"group-cls": conditions.real["randconv"]}
    both = replace(
        evidence,
        description=replace(evidence.description, extractors=["randconv", "group-cls"]),
        conditions={"train": replace(conditions, real=real)},
        measured={"train": {name: twice(each) for name, each in evidence.measured["train"].items()}},
    )
    row = build_table(Estimates(both, "train"), made.comparison)[CANDIDATE]
    assert {key for key in row if key.startswith("group-cls")} == {f"group-cls_{key}" for key in OF_FEATURES}
