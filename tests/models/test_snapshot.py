"""Snapshots: what older versions wrote still loads, and a config survives its file."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import artifacts
from pipeline.adversarial.few_step import generate_images
from pipeline.errors import StorageError
from pipeline.models.conditioning import Conditioning
from pipeline.models.config import Lineage, SamplerSettings, SnapshotConfig
from pipeline.models.snapshot import at_resolution, load_snapshot, save_snapshot

# Random models of older versions, and their images: of `refined` as the version that wrote it made them, of the
# others with the same weights on the sampler's grid of today. `finetuned` and `refined` name the sampler's settings
# as before their renaming; `oldest` lacks the sampler, its guide and whatever came later.
GOLDEN = Path(__file__).parent / "golden"
SETTINGS = SamplerSettings(6, "sde_dpmpp_2m", "low_band", 1.5, (0.3, 5.0), (6.0,), early_exit=False)
SAMPLING = {
    "finetuned": SETTINGS,
    "refined": SETTINGS,
    "oldest": replace(SETTINGS, sampler="heun", guide="unconditional"),
}


def captions(n: int) -> Conditioning:
    g = torch.Generator().manual_seed(7)
    mask = torch.ones(n, 3, dtype=torch.bool)
    return Conditioning(torch.randn(n, 4, generator=g), torch.randn(n, 3, 4, generator=g), mask)


@pytest.mark.parametrize("name", SAMPLING)
def test_a_snapshot_of_an_older_version_loads_and_makes_the_same_images(name: str) -> None:
    snapshot = load_snapshot(GOLDEN / name)
    assert snapshot.config.sampling == SAMPLING[name]
    images = generate_images(snapshot, captions(2), [3, 4]).images
    expected = torch.from_numpy(np.load(GOLDEN / f"{name}.npy"))
    assert images.shape == (2, 3, 16, 16)
    assert (images.int() - expected.int()).abs().max() <= 1  # other processors round differently


def test_the_config_of_an_older_version_is_read_in_full() -> None:
    refined, finetuned, oldest = (
        load_snapshot(GOLDEN / n).config for n in ("refined", "finetuned", "oldest")
    )
    assert (refined.kind, refined.is_refined, refined.passes, refined.sigma_start) == (
        "refined",
        True,
        (1, 2, 4),
        5,
    )
    assert refined.upscale_steps is None
    assert (finetuned.kind, finetuned.is_refined, finetuned.ema_std) == ("finetuned", False, 0.05)
    assert finetuned.resolution == 16 and finetuned.text_dim == 4 and finetuned.core.net["channels"] == 2
    assert finetuned.lineage == Lineage("d" * 64, "f" * 64, "e" * 64, "models/core", "b" * 64)
    assert oldest.lineage == Lineage("d" * 64, parent="e" * 64) and oldest.ema_std == 0.1
    assert load_snapshot(GOLDEN / "finetuned").early is not None


@pytest.mark.parametrize("name", SAMPLING)
def test_a_config_is_written_as_it_was_but_for_renamed_settings(name: str, tmp_path: Path) -> None:
    before = (GOLDEN / name / "config.json").read_text()
    snapshot = load_snapshot(GOLDEN / name)
    save_snapshot(tmp_path / "again", snapshot.denoiser, snapshot.config)
    after = (tmp_path / "again/config.json").read_text()
    tree = json.loads(before)
    tree["sampling"] = asdict(SAMPLING[name])
    assert after == json.dumps(tree, indent=1, sort_keys=True) + "\n"
    assert load_snapshot(tmp_path / "again").config == snapshot.config
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (GOLDEN / name / weights).read_bytes()


def test_entries_that_are_not_known_are_kept() -> None:
    tree = json.loads((GOLDEN / "finetuned/config.json").read_text()) | {"cost": {"seconds": 3}}
    config = SnapshotConfig.from_json(tree)
    assert config.extra == {"cost": {"seconds": 3}} == {"cost": config.to_json()["cost"]}


def rewrite(source: Path, target: Path, **changes: Any) -> None:
    """A snapshot with other entries in its config; None removes one."""
    tree = json.loads((source / "config.json").read_text()) | changes
    with artifacts.commit_directory(target, {"kind": "finetuned"}) as folder:
        shutil.copy(source / "model.safetensors", folder)
        kept = {key: value for key, value in tree.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "changes", [{"core": None}, {"sampling": {}}, {"core": {"px": 8}}, {"statistics": 5}]
)
def test_a_config_that_cannot_be_read_is_refused_in_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    rewrite(GOLDEN / "oldest", tmp_path / "model", **changes)
    with pytest.raises(StorageError, match=r"config.json: this version cannot read it .*\. Fix: ") as caught:
        load_snapshot(tmp_path / "model")
    assert len(str(caught.value).splitlines()) == 1


def test_a_level_inside_of_a_model_has_a_config_of_its_own() -> None:
    core = at_resolution(load_snapshot(GOLDEN / "finetuned"), 8)
    assert core.config.resolution == core.resolution == 8 and core.config.shells == ()
    assert core.config.to_json()["resolution"] == 8
