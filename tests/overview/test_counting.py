"""Counts equal what the workers really compute, image by image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.params import parse_params
from pipeline.data.dataset import PreparedDataset
from pipeline.launch.worker import WorkerConfig
from pipeline.models.counting import flops
from pipeline.overview.counting import Data, Workload, count_stages
from pipeline.training import fit
from pipeline.workers.finetune import finetune
from pipeline.workers.pretrain import pretrain
from pipeline.workers.refine import refine

WORKERS = {"pretrain": pretrain, "finetune": finetune, "refine": refine}
MODELS = {"pretrain": "core", "finetune": "finetuned", "refine": "refined"}


def tiny(tree: dict[str, Any], **changes: dict[str, Any]) -> dict[str, Any]:
    """Tiny params, with a penalty in every second update and two updates of each stage."""
    tree = {**tree, "evaluate": {**tree["evaluate"], "watch_images": dict.fromkeys(WORKERS, 0)}}
    for stage in WORKERS:
        images = 2 * tree[stage]["batch_size"]
        clocks = ("num_images", "checkpoint_images", "log_images", "sample_images", "warmup_images")
        tree[stage] = {**tree[stage], **dict.fromkeys(clocks, images)}
    images = tree["refine"]["num_images"]
    tree["refine"] |= {"penalty_interval": 2, "check_images": images, "core_images": images}
    return {
        name: {**section, **changes.get(name, {})} if isinstance(section, dict) else section
        for name, section in tree.items()
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"refine": {"passes": [2], "pass_probs": [1.0]}, "evaluate": {"num_passes": [2]}},
        {
            "regions": {"probability": 0.5, "maps": "random"},
            "augment": {"probability": 0.5},
            "finetune": {"core": "joint"},
            "refine": {"discriminators": ["pixels"], "passes": [1], "pass_probs": [1.0]},
            "evaluate": {"num_passes": [1]},
        },
    ],
    ids=["plain", "regions, joint"],
)
def test_updates_compute_what_is_counted(
    changes: dict[str, Any],
    tiny_tree: dict[str, Any],
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = parse_params(tiny(tiny_tree, **changes))
    done: list[int] = []

    def counted_fit(state: Any, step: Callable[[Any], Any], *rest: Any) -> None:
        def counted(state: Any) -> Any:
            results: list[Any] = []
            done.append(flops(lambda: results.append(step(state))))
            return results[0]

        fit.fit(state, counted, *rest)

    monkeypatch.setattr("pipeline.training.context.fit", counted_fit)
    (tmp_path / "data").symlink_to(tiny_root / "data")
    (tmp_path / "models").mkdir()
    expected = count_stages(params, Data.of(PreparedDataset(tmp_path / "data/prepared")))
    for stage, work in WORKERS.items():
        done.clear()
        run = tmp_path / "runs" / stage
        run.mkdir(parents=True)
        work(WorkerConfig(params, tmp_path, run, precision="float32"))
        (tmp_path / "models" / MODELS[stage]).symlink_to(run / "result" / "model")
        assert len(done) == (4 if stage == "refine" else 2), "two updates a round"
        assert sum(done) == pytest.approx(expected[stage].flops, rel=0.001), stage


def test_a_pinned_model_is_not_trained_again(tiny_tree: dict[str, Any]) -> None:
    tree = {**tiny_tree, "data": {**tiny_tree["data"], "resolution": 32}}
    params = parse_params({**tree, "shell": {**tree["shell"], "channels": [16, 8]}})
    data = Data.planned(params)
    whole, grown = count_stages(params, data), count_stages(params, data, start=16)
    assert whole["pretrain"].flops > 0 == grown["pretrain"].flops
    assert whole["finetune"].flops > grown["finetune"].flops > 0
    assert whole["refine"] == grown["refine"]
    assert count_stages(params, data, start=32)["finetune"].flops == 0, "which the stage itself refuses"


def test_a_bridge_adds_a_call_for_each_image_with_a_map(tiny_tree: dict[str, Any]) -> None:
    def of(maps: str) -> dict[str, Workload]:
        params = parse_params({**tiny_tree, "regions": {"probability": 0.5, "maps": maps}})
        return count_stages(params, Data.planned(params))

    random, bridge = of("random"), of("bridge")
    images = tiny_tree["pretrain"]["num_images"]
    assert bridge["pretrain"].flops - random["pretrain"].flops == pytest.approx(
        0.5 * images * 2 * (random["pretrain"].multiply_adds or 0), rel=0.01
    )
