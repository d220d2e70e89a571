"""The least that `prepare` accepts goes through all stages, without a caption too."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.params import parse_params
from pipeline.evaluation.evaluate import evaluate
from pipeline.evaluation.verdict import Verdict
from pipeline.launch.worker import WorkerConfig
from pipeline.prepare.prepare import prepare
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain
from pipeline.workers.refine import refine

STAGES = {"pretrain": (pretrain, "core"), "finetune": (finetune, "finetuned"), "refine": (refine, "refined")}


def write_pictures(folder: Path, alone: int, alike: int) -> None:
    """So many pictures that look different, and pictures of one of them with a little noise."""
    folder.mkdir(parents=True)
    for number in range(alone + alike):
        draw = np.random.default_rng(min(number, alone))
        squares = draw.integers(0, 256, (4, 4, 3)).repeat(6, 0).repeat(6, 1)
        noise = np.random.default_rng(number).integers(-2, 3, squares.shape)
        Image.fromarray((squares + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number:03d}.png")


@pytest.mark.parametrize(("alone", "alike"), [(12, 0), (5, 30)])
def test_few_images_without_captions_end_in_a_model_and_a_verdict(
    alone: int, alike: int, tiny_tree: dict[str, Any], tmp_path: Path
) -> None:
    write_pictures(tmp_path / "data/raw", alone, alike)
    data = {
        **tiny_tree["data"],
        "source": "folder",
        "path": "data/raw",
        "subset": [],
        "text_encoder": "label",
    }
    budget = {**tiny_tree["evaluate"], "max_calls": 1000}
    params = parse_params({**tiny_tree, "data": data, "evaluate": budget})
    metrics = prepare(params, tmp_path, tmp_path / "work")
    assert sum(metrics["families"].values()) == alone + bool(alike)
    for stage, (train, kind) in STAGES.items():
        run_dir = tmp_path / "runs" / stage
        run_dir.mkdir(parents=True)
        train(WorkerConfig(params, tmp_path, run_dir, precision="float32"))
        shutil.copytree(run_dir / "result/model", tmp_path / "models" / kind)
    evaluate(params, tmp_path, tmp_path / "reports", log=lambda line: None)
    (*_, last) = Verdict.read(tmp_path / "reports/verdict.json").verdicts
    assert {rule.name: rule.outcome for rule in last.rules}["captions"] == "not_applicable"
