"""Presets as whole recipes: their first lines say what they need and cost, and each of them trains."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipes import preset_params, recipe_of, summary
from pipeline.config.params import Params, parse_params
from pipeline.launch.worker import WorkerConfig
from pipeline.presets import presets
from pipeline.training.records import read_records
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain
from pipeline.workers.refine import refine
from tests.conftest import ROOT

NAMES = sorted(presets(ROOT))
WORKERS = {"pretrain": pretrain, "finetune": finetune, "refine": refine}
MODELS = {"pretrain": "core", "finetune": "finetuned", "refine": "refined"}
UPDATES = 2


@pytest.mark.parametrize("name", NAMES)
def test_the_first_lines_of_a_preset_say_what_it_needs_and_costs(name: str) -> None:
    lines = [line.lstrip("# ") for line in (ROOT / f"presets/{name}.yaml").read_text().splitlines()]
    expected = summary(name, recipe_of(preset_params(name)))
    assert lines[1 : 1 + len(expected)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_are_frequent_and_intervals_fit(name: str) -> None:
    params = preset_params(name)
    for section in (params.pretrain, params.finetune, params.refine):
        assert section.warmup_images <= section.num_images / 10
        assert section.checkpoint_images <= section.num_images / 2
        assert section.log_images <= section.checkpoint_images


def shrunken(params: Params) -> Params:
    """The recipe with networks of one level and 16 channels, from 8 to 16 px, one image a shard and two updates a
    stage. Rates, noise, dropout, augmentation, shards and losses stay."""
    tree: dict[str, Any] = params.model_dump(mode="json")
    tree["data"] |= {"resolution": 16}
    tree["core"] |= {"resolution": 8, "channels": 16, "channel_mult": [1], "num_blocks": 1, "attention": []}
    tree["shell"] |= {"patch": [1], "channels": [16], "num_blocks": 1}
    for stage in WORKERS:
        batch = tree[stage]["shards"]
        clocks = ("num_images", "checkpoint_images", "log_images", "sample_images")
        tree[stage] |= {"batch_size": batch, "warmup_images": batch} | dict.fromkeys(clocks, UPDATES * batch)
    tree["refine"] |= {
        "discriminators": ["self"],
        "core_images": UPDATES * tree["refine"]["shards"],
        "check_images": UPDATES * tree["refine"]["shards"],
        "check_samples": 8,
    }
    tree["sampling"] |= {"num_steps": 2}
    tree["evaluate"]["watch_images"] = dict.fromkeys(WORKERS, 0)
    return parse_params(tree)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_trains(name: str, tiny_root: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tiny_root / "data")
    params = shrunken(preset_params(name))
    for stage, work in WORKERS.items():
        run_dir = tmp_path / "runs" / stage
        run_dir.mkdir(parents=True)
        work(WorkerConfig(params, tmp_path, run_dir, precision="float32"))
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / MODELS[stage]).symlink_to(run_dir / "result" / "model")
        rounds = 2 if stage == "refine" else 1
        trained = read_records(run_dir / "progress.jsonl")[-1]["nimg"]
        assert trained == rounds * UPDATES * getattr(params, stage).batch_size
