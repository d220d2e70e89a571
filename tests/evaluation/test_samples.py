"""Sampling in batches: captions are encoded once, and no model is exchanged meanwhile."""

from pathlib import Path

import pytest
import torch

from pipeline.data.dataset import PreparedDataset
from pipeline.errors import StorageError
from pipeline.evaluation.conditions import build_caption_set
from pipeline.evaluation.contenders import Contender
from pipeline.evaluation.samples import SampleTask, run_locally, sample_all, sampler
from pipeline.models.conditioning import Conditioning
from pipeline.models.denoiser import build_core
from pipeline.models.snapshot import load_snapshot, save_snapshot
from tests.builders import snapshot_config
from tests.conftest import write_prepared

CORE = {"patch": 1, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [], "dropout": 0.0}
STEPS = (2,)


def write_model(path: Path, seed: int) -> tuple[str, str]:
    torch.manual_seed(seed)
    core = build_core(8, 384, CORE)
    save_snapshot(path, core, snapshot_config(core, "core", CORE, []))
    return str(path), load_snapshot(path).digest


def test_captions_are_encoded_once_and_shared_by_all_contenders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_prepared(tmp_path / "prepared", count=24)
    dataset = PreparedDataset(tmp_path / "prepared")
    captions = build_caption_set(dataset, "train", "train", 5, seed=0)
    encoded, encode = [], dataset.text
    monkeypatch.setattr(dataset, "text", lambda ids: encoded.append(len(ids)) or encode(ids))
    names = {name: write_model(tmp_path / name, seed) for seed, name in enumerate("ab")}
    contenders = [Contender(name, name, steps=STEPS) for name in names]
    progress: list[tuple[int, ...]] = []
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = sample_all(
        contenders,
        [captions],
        dataset,
        0,
        2,
        lambda: sampler(names, "cpu"),
        run_locally,
        lambda *done: progress.append(done),
    )
    assert encoded == [5]
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert {name: each.images.shape[0] for name, each in found["train"].items()} == {"a": 5, "b": 5}
    assert progress == [(done, 6) for done in range(7)], "batches of 2, 2 and 1 for each of two contenders"


def test_a_model_that_was_exchanged_is_refused(tmp_path: Path) -> None:
    folder, digest = write_model(tmp_path / "model", 0)
    write_model(tmp_path / "model", 1)
    text = Conditioning(torch.zeros(1, 384), torch.zeros(1, 2, 384), torch.ones(1, 2, dtype=torch.bool))
    task = SampleTask(0, Contender("a", "a", steps=STEPS), text, [0])
    with sampler({"a": (folder, digest)}, "cpu") as work:
        with pytest.raises(StorageError, match="E-IO-061 .*model: has changed since the evaluation began"):
            work(task)
