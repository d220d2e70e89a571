"""Images that keep their shape, in all stages, with noise levels that differ by region: a resume in mid-epoch,
samples of the shapes of their captions."""

import base64
import io
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.params import parse_params
from pipeline.errors import ConfigError
from pipeline.evaluation.evaluate import evaluate
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain
from pipeline.workers.refine import refine
from tests.conftest import write_bucketed
from tests.workers.test_workers import config_of

WORKERS = {"pretrain": pretrain, "finetune": finetune, "refine": refine}
STAGES = {"pretrain": "core", "finetune": "finetuned", "refine": "refined"}


@pytest.fixture(scope="module")
def tree(tiny_tree: dict[str, Any]) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {
        "data": {"fit": "buckets", "bucket_step": 8},
        "regions": {"probability": 0.5, "maps": "bridge"},
        "sampling": {"sampler": "adaptive"},
    }
    return tiny_tree | {section: tiny_tree[section] | change for section, change in changes.items()}


@pytest.fixture(scope="module")
def trained(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with all models that take images of several sizes; runs in root/runs."""
    root = tmp_path_factory.mktemp("buckets")
    write_bucketed(root / "data/prepared", [(16, 16), (8, 24), (24, 8), (8, 24)] * 9)
    for stage, kind in STAGES.items():
        WORKERS[stage](config_of(tree, root, root / "runs" / stage))
        shutil.copytree(root / "runs" / stage / "result/model", root / "models" / kind)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_buckets_that_stops_in_mid_epoch_ends_with_the_bits_of_an_unbroken_one(
    trained: Path, tree: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def stop(name: str, nimg: int) -> None:
        if name == "step" and nimg == 40:
            raise KeyboardInterrupt

    config = config_of(tree, trained, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.training.context.failpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            WORKERS[stage](config)
    WORKERS[stage](config)
    names = ("model/model.safetensors", "reports/curves.csv", "reports/metrics.json", "reports/samples.png")
    for name in names:
        ours, theirs = tmp_path / "run/result" / name, trained / "runs" / stage / "result" / name
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_images_too_small_for_lite0_are_refused_in_one_line(
    trained: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    too_small = "lite0 takes images of 32 px a side or more; some have"
    for images, size in ((0, "24x8"), (8, "12x4 at the core's resolution of 8 px")):
        changed = tree | {"refine": tree["refine"] | {"core_images": images, "discriminators": ["lite0"]}}
        with pytest.raises(ConfigError, match=f"{too_small} {size}"):
            refine(config_of(changed, trained, tmp_path / "run"))


def test_the_sheet_of_samples_shows_the_shapes_of_their_images(trained: Path) -> None:
    sheet = np.asarray(Image.open(trained / "runs/finetune/result/reports/samples.png"))
    assert sheet.shape == (2 + 2 * 26, 2 + 8 * 26, 3), "16 pictures on canvases of 24 x 24 px"


def test_samples_are_judged_in_the_shapes_of_their_captions(trained: Path, tree: dict[str, Any]) -> None:
    log: list[str] = []
    numbers = evaluate(parse_params(tree), trained, trained / "reports", log.append)
    assert (
        all(math.isfinite(value) for value in numbers.values()) and "heldout/finetuned/top_octave" in numbers
    )
    page = (trained / "reports/evaluation/index.html").read_text()
    assert "3 shapes of about 16 × 16 pixels" in page
    encoded = re.findall('data:image/webp;base64,([^"]+)', page)
    sizes = {Image.open(io.BytesIO(base64.b64decode(each))).size for each in encoded}
    assert sizes == {(16, 16), (24, 8), (8, 24)}
