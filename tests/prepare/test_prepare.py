"""The prepare stage as a whole, on a real folder of good and bad files and on a little of OpenMoji."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from pipeline import artifacts
from pipeline.config.params import parse_params
from pipeline.errors import BadData, ConfigError
from pipeline.prepare import prepare as stage
from pipeline.text.load import load_text_encoder


@pytest.fixture(scope="module", autouse=True)
def one_encoder(request):
    """Load the text encoder once for all runs of the stage in this file."""
    encoder = load_text_encoder("minilm", 16)
    patch = pytest.MonkeyPatch()
    patch.setattr(stage, "load_text_encoder", lambda name, max_tokens, captions: encoder)
    yield
    patch.undo()


def params_with(tree, **data):
    return parse_params({**tree, "data": {**tree["data"], "subset": [], "path": "data/raw", **data}})


def raw_folder(root, count=40, bad=1) -> None:
    raw = root / "data" / "raw"
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        path = raw / ("cats" if number % 2 else "dogs") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (raw / "cats" / "zz_copy.png").write_bytes((raw / "cats" / "001.png").read_bytes())
    for number in range(bad):
        (raw / f"broken{number}.png").write_bytes((raw / "cats" / "001.png").read_bytes()[: 100 + number])


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, tiny_tree):
    root = tmp_path_factory.mktemp("prepared")
    raw_folder(root)
    calls = []
    params = params_with(tiny_tree, source="folder")
    metrics = stage.prepare(
        params, root, root / "work", on_progress=lambda done, total: calls.append((done, total))
    )
    return root, metrics, calls


def test_every_item_is_ok_quarantined_or_duplicate(prepared) -> None:
    root, metrics, _ = prepared
    counts = metrics["counts"]
    assert counts["n_in"] == 42 == counts["n_ok"] + counts["n_quarantined"] + counts["n_duplicate"]
    assert (counts["n_ok"], counts["n_quarantined"], counts["n_duplicate"]) == (40, 1, 1)
    assert counts["train"] + counts["val"] + counts["test"] == 40
    assert json.loads((root / "reports/prepare/metrics.json").read_text()) == metrics


def test_the_prepared_folder_verifies_and_holds_what_its_format_says(prepared, tiny_tree) -> None:
    root, metrics, _ = prepared
    manifest = artifacts.verify_directory(root / "data/prepared")
    assert manifest["meta"]["counts"] == metrics["counts"]
    assert manifest["meta"]["text_encoder"]["name"] == "minilm"
    assert manifest["meta"]["validation"]["success"] is True
    size = tiny_tree["data"]["resolution"]
    images = np.load(root / "data/prepared/images-00000.npy", allow_pickle=False)
    assert images.shape == (40, 3, size, size) and images.dtype == np.uint8 and images.flags["C_CONTIGUOUS"]
    rows = [json.loads(line) for line in (root / "data/prepared/index.jsonl").read_text().splitlines()]
    names = [json.loads(line) for line in (root / "data/prepared/captions.jsonl").read_text().splitlines()]
    assert names == ["cats", "dogs"] and {row["group"] for row in rows} == {"cats", "dogs"}
    assert all(names[row["captions"][0]] == row["group"] for row in rows)
    text = load_file(root / "data/prepared/text.safetensors")
    assert {name: (array.shape, array.dtype) for name, array in text.items()} == {
        "pooled": ((2, 384), np.float16),
        "tokens": ((2, 16, 384), np.float16),
        "mask": ((2, 16), np.uint8),
    }


def test_the_data_set_of_the_training_stages_reads_it(prepared) -> None:
    from pipeline.data.dataset import PreparedDataset

    dataset = PreparedDataset(prepared[0] / "data/prepared")
    assert len(dataset.rows) == 40
    assert len(dataset.split("train")) + len(dataset.split("val")) + len(dataset.split("test")) == 40
    assert dataset.images(dataset.split("test")).shape[1] == 3
    assert dataset.text([0, 1]).mask.any(1).all()


def test_unusable_files_keep_their_bytes_and_tell_their_reason(prepared) -> None:
    root, _, _ = prepared
    rows = [json.loads(line) for line in (root / "data/quarantine/report.jsonl").read_text().splitlines()]
    bad, double = rows
    assert bad["file"] == "data/raw/broken0.png" and bad["code"] == "E-IMG-005"
    kept = root / "data/quarantine" / bad["kept"]
    assert kept.read_bytes() == (root / "data/raw/broken0.png").read_bytes()
    assert kept.name == f"{bad['sha256']}.png" and kept.parent.name == "E-IMG-005"
    assert double["action"] == "duplicate" and "data/raw/cats/001.png" in double["reason"]


def test_reports_are_there_to_look_at(prepared) -> None:
    root, _, calls = prepared
    page = (root / "reports/data_docs/index.html").read_text()
    assert "E-IMG-005" in page and "../prepare/contact.png" in page
    assert (root / "reports/data_docs/details/index.html").is_file()
    assert Image.open(root / "reports/prepare/contact.png").width > 16 * 16
    assert calls[-1] == (42, 42)


def test_a_second_run_writes_the_same_bytes(prepared, tiny_tree) -> None:
    root, _, _ = prepared
    folders = ["data/prepared", "data/quarantine", "reports/prepare"]
    before = {name: contents(root / name) for name in folders}
    stage.prepare(params_with(tiny_tree, source="folder"), root, root / "other_work")
    assert {name: contents(root / name) for name in folders} == before


def test_too_many_bad_files_stop_the_stage_and_leave_the_old_data(tmp_path, tiny_tree) -> None:
    raw_folder(tmp_path, count=10, bad=3)
    (tmp_path / "data/prepared").mkdir()
    (tmp_path / "data/prepared/old").write_text("old")
    with pytest.raises(BadData, match="E-DAT-001 folder: 3 of 14 images are unusable") as caught:
        stage.prepare(params_with(tiny_tree, source="folder"), tmp_path, tmp_path / "work")
    assert caught.value.exit_status == 65
    assert (tmp_path / "data/prepared/old").read_text() == "old"
    assert len((tmp_path / "data/quarantine/report.jsonl").read_text().splitlines()) == 4


def test_a_failed_critical_expectation_stops_the_stage_after_writing_docs(tmp_path, tiny_tree) -> None:
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    for level in range(10):
        Image.new("RGB", (16, 16), (level, level, level)).save(raw / f"{level}.png")
    with pytest.raises(BadData, match="10 images are blank, more than 5% .0.png, 1.png, 2.png and 7 more"):
        stage.prepare(params_with(tiny_tree, source="folder"), tmp_path, tmp_path / "work")
    assert "did not pass" in (tmp_path / "reports/data_docs/index.html").read_text()
    assert not (tmp_path / "data/prepared").exists()


def test_images_without_captions_are_learned_without(tmp_path, tiny_tree) -> None:
    raw_folder(tmp_path, count=12, bad=0)
    for path in sorted((tmp_path / "data/raw").glob("*/*.png")):
        path.rename(tmp_path / "data/raw" / path.name)
    metrics = stage.prepare(params_with(tiny_tree, source="folder"), tmp_path, tmp_path / "work")
    assert metrics["captions"] == 0
    meta = artifacts.verify_directory(tmp_path / "data/prepared")["meta"]
    assert "every image has a caption" in meta["validation"]["warnings"]
    rows = (tmp_path / "data/prepared/index.jsonl").read_text().splitlines()
    assert all(json.loads(row)["captions"] == [] for row in rows)
    assert not load_file(tmp_path / "data/prepared/text.safetensors")["mask"].any()


def test_too_few_images_stop_the_stage_with_the_number_that_is_needed(tmp_path, tiny_tree) -> None:
    raw_folder(tmp_path, count=8, bad=0)
    with pytest.raises(BadData, match="E-DAT-005 folder: 5 images are for training, 8 are needed; 1 more"):
        stage.prepare(params_with(tiny_tree, source="folder"), tmp_path, tmp_path / "work")
    assert not (tmp_path / "data/prepared").exists()


def test_a_subset_of_openmoji_keeps_variants_together(tmp_path, tiny_tree) -> None:
    params = params_with(tiny_tree, subset=["hand-fingers-closed", "cat-face"])
    metrics = stage.prepare(params, tmp_path, tmp_path / "work")
    assert metrics["counts"]["n_in"] == 45 and metrics["counts"]["n_quarantined"] == 0
    rows = [json.loads(line) for line in (tmp_path / "data/prepared/index.jsonl").read_text().splitlines()]
    assert {row["subgroup"] for row in rows} == {"hand-fingers-closed", "cat-face"}
    fists = {row["split"] for row in rows if row["base"] == "270A"}
    assert len(fists) == 1


def test_a_subset_that_selects_nothing_is_answered_with_a_near_name(tmp_path, tiny_tree) -> None:
    with pytest.raises(ConfigError, match="'cat-faces' is not a group or subgroup.*did you mean 'cat-face'"):
        stage.prepare(params_with(tiny_tree, subset=["cat-faces"]), tmp_path, tmp_path / "work")
