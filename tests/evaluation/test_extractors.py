"""From params.yaml to extractors: the form of the setting, the order, and what cannot be had."""

from typing import Any

import pytest

from pipeline.config.params import Params, parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.errors import ConfigError
from pipeline.evaluation import group_classifier
from pipeline.evaluation.extractors import load_extractors
from tests.conftest import write_prepared

SHA = "a" * 64


def with_extractors(tree: dict[str, Any], extractors: Any) -> Params:
    return parse_params({**tree, "evaluate": {**tree["evaluate"], "extractors": extractors}})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """60 images of one group."""
    folder = tmp_path_factory.mktemp("data") / "prepared"
    write_prepared(folder, count=60)
    return PreparedDataset(folder)


def test_a_name_or_a_mapping_is_a_setting_and_survives_a_round_trip(tiny_tree: dict[str, Any]) -> None:
    file = {"name": "dinov2", "weights": "facebook/dinov2-small", "sha256": SHA}
    params = with_extractors(tiny_tree, ["randconv", file])
    assert [each.name for each in params.evaluate.extractors] == ["randconv", "dinov2"]
    assert params.evaluate.extractors[1].weights == "facebook/dinov2-small"
    assert parse_params(params.model_dump(mode="json")) == params


@pytest.mark.parametrize(
    ("extractors", "message"),
    [
        (["randcon"], r"E-CFG-002 params.yaml: evaluate.extractors\[0\].name: 'randcon' is not valid. Fix: "),
        ([7], r"E-CFG-002 params.yaml: evaluate.extractors\[0\]: 7 is not valid"),
        ("randconv", r"E-CFG-002 params.yaml: evaluate.extractors: 'randconv' is not valid"),
        ([], r"E-CFG-002 params.yaml: evaluate.extractors: \(\) is not valid"),
        (["lite2", "lite2"], r"E-CFG-004 params.yaml: evaluate.extractors: an entry is given twice"),
        (
            ["randconv", "clip"],
            r"extractors\[1\].weights: is empty, clip needs a folder, or a name on the hub",
        ),
        (
            [{"name": "clip", "weights": "x", "sha256": ""}],
            r"\[0\].sha256: is empty, clip needs that of its weights",
        ),
        ([{"name": "clip", "weights": "x", "sha256": "A"}], r"extractors\[0\].sha256: 'A' is not valid"),
        ([{"name": "lite2", "weights": "x", "sha256": ""}], r"extractors\[0\].weights: lite2 takes none"),
        (
            [{"name": "clip", "weights": "x"}],
            r"E-CFG-003 params.yaml: evaluate.extractors\[0\].sha256: missing",
        ),
        (
            [{"name": "clip", "weight": "x", "sha256": SHA}],
            r"E-CFG-001 params.yaml: evaluate.extractors\[0\].weight: unknown key. Fix: did you mean 'weights'\?",
        ),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    tiny_tree: dict[str, Any], extractors: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        with_extractors(tiny_tree, extractors)
    assert len(str(caught.value).splitlines()) == 1


def test_extractors_come_in_the_order_of_the_settings(
    tiny_tree: dict[str, Any], dataset: PreparedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_classifier, "NUM_IMAGES", 64)
    monkeypatch.setattr(
        dataset, "rows", [row | {"subgroup": "ab"[i % 2]} for i, row in enumerate(dataset.rows)]
    )
    settings = with_extractors(tiny_tree, ["group-cls", "randconv", "lite2"]).evaluate.extractors
    extractors, unavailable = load_extractors(settings, dataset)
    assert [each.name for each in extractors] == ["group-cls", "randconv", "lite2"]
    assert unavailable == []


def test_an_extractor_that_the_data_cannot_have_is_named_and_the_next_one_is_the_first(
    tiny_tree: dict[str, Any], dataset: PreparedDataset
) -> None:
    settings = with_extractors(tiny_tree, ["group-cls", "randconv"]).evaluate.extractors
    extractors, unavailable = load_extractors(settings, dataset)
    assert [each.name for each in extractors] == ["randconv"]
    assert [each.name for each in unavailable] == ["group-cls"]
    with pytest.raises(ConfigError, match="E-CFG-054 evaluate.extractors: group-cls needs two groups"):
        load_extractors(settings[:1], dataset)


def test_the_default_extractors_need_no_file(tiny_params: Params) -> None:
    assert all(not each.weights for each in tiny_params.evaluate.extractors)
