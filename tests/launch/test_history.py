"""What a new run says of the one before, and how much of it is shared."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts
from pipeline.launch import continuation, history
from pipeline.training.schedule import before_decay, linear_decay_lr

LENGTHS = [8, 16, 48, 64, 100, 640, 36800]
MADE: dict[str, Any] = {
    "params": {
        "seed": 0,
        "pretrain": {"num_images": 48, "batch_size": 8, "checkpoint_images": 16, "lr": 0.1},
    },
    "deps": {"data/prepared": "a", "pipeline/models": "b"},
    "files": {"pipeline/models/unet.py": "c"},
    "format": 3,
}


def store_checkpoints(folder: Path, *clocks: int) -> None:
    for nimg in clocks:
        with artifacts.commit_directory(folder / f"checkpoints/nimg-{nimg:012d}", {"nimg": nimg}) as path:
            (path / "state").write_text(str(nimg))
    (folder / "progress.jsonl").write_text(
        "".join(json.dumps({"nimg": n, "total": 48, "time": 1.0, "metrics": {}}) + "\n" for n in clocks)
    )


@pytest.mark.parametrize("num_images", LENGTHS)
def test_before_the_decay_the_rates_are_those_of_any_longer_run(num_images: int) -> None:
    shared = [nimg for nimg in range(8, num_images + 8, 8) if before_decay(nimg, 8, num_images)]
    rates = [linear_decay_lr(0.03, nimg, num_images, 80) for nimg in range(0, max(shared, default=0), 8)]
    assert rates == [linear_decay_lr(0.03, nimg, 10 * num_images, 80) for nimg in range(0, 8 * len(rates), 8)]
    assert shared == [] or shared[-1] >= min(0.7 * num_images, num_images - 8)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"params": {"seed": 0, "pretrain": {**MADE["params"]["pretrain"], "lr": 0.2}}}, "pretrain.lr 0.1 -> 0.2"),
        ({"deps": {**MADE["deps"], "data/prepared": "z"}}, "data/prepared"),
        ({"files": {"pipeline/models/unet.py": "z"}}, "pipeline/models/unet.py"),
        ({"format": 4}, "the format of checkpoints"),
    ],
)  # fmt: skip
def test_a_new_run_names_what_changed_and_what_is_left_behind(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    stage = tmp_path / "runs/pretrain"
    assert history.begin("pretrain", stage / "old", MADE) is None
    store_checkpoints(stage / "old", 16, 32)
    assert history.begin("pretrain", stage / "old", MADE) is None, "it goes on"
    line = history.begin("pretrain", stage / "new", {**MADE, **changed})
    left = "left behind: runs/pretrain/old (unfinished, at image 32)"
    assert line == f"pretrain: a new run for {words}; {left}"
    assert not (stage / "new/checkpoints").exists()


@pytest.mark.parametrize(
    ("wanted", "shared", "changes"),
    [(64, 32, {}), (20, 16, {}), (64, None, {"lr": 0.2}), (96, 32, {"ema_snapshots": 3})],
)
def test_a_run_of_another_length_begins_with_the_newest_checkpoint_before_both_decay(
    wanted: int, shared: int | None, changes: dict[str, float], tmp_path: Path
) -> None:
    stage = tmp_path / "runs/pretrain"
    snapshots = {"ema_snapshots": changes.get("ema_snapshots", 0)}
    old = {**MADE, "params": {"pretrain": MADE["params"]["pretrain"] | snapshots}}
    history.begin("pretrain", stage / "old", old)
    store_checkpoints(stage / "old", 16, 24, 32, 40, 48)
    (stage / "old/averages/nimg-000000000032").mkdir(parents=True)
    new = {**MADE, "params": {"pretrain": {**old["params"]["pretrain"], **changes, "num_images": wanted}}}
    line = history.begin("pretrain", stage / "new", new) or ""
    assert f"pretrain.num_images 48 -> {wanted}" in line
    found = [path.name for path in stage.glob("new/checkpoints/*")]
    assert found == ([] if shared is None else [f"nimg-{shared:012d}"])
    assert len(list(stage.glob("old/checkpoints/*"))) == 5
    assert len(list(stage.glob("new/averages/*"))) == (1 if snapshots["ema_snapshots"] else 0)
    if shared is not None:
        assert f"continues from image {shared} of runs/pretrain/old" in line
        records = [json.loads(each) for each in (stage / "new/progress.jsonl").read_text().splitlines()]
        assert records[-1]["nimg"] == shared and {each["total"] for each in records} == {wanted}


def test_a_run_that_is_being_trained_is_left_alone(tmp_path: Path) -> None:
    store_checkpoints(tmp_path / "old", 16)
    with artifacts.lease(tmp_path / "old/lease"):
        section = MADE["params"]["pretrain"]
        longer = {**section, "num_images": 64}
        assert continuation.continue_from(tmp_path / "old", tmp_path / "new", section, longer) is None


def test_runs_of_which_one_refines_the_core_first_share_nothing(tmp_path: Path) -> None:
    store_checkpoints(tmp_path / "old/to-16", 16)
    before = {**MADE["params"]["pretrain"], "core_images": 0}
    first = {**before, "core_images": 48}
    assert continuation.continue_from(tmp_path / "old", tmp_path / "new", before, first) is None
