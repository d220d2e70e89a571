"""Exported folders: programs that agree with the model, a card, and a script that needs nothing of ours."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.errors import ConfigError, StorageError
from pipeline.export import convert
from pipeline.export.export import Licence, check_folder, export
from pipeline.export.programs import ImageProgram
from pipeline.inference.generator import Generator, load_generator
from pipeline.models.snapshot import Snapshot
from pipeline.models.statistics import Statistics
from pipeline.text.load import load_text_encoder
from tests.builders import build_pyramid, open_gains, snapshot_config

pytestmark = pytest.mark.slow
CORE = {"patch": 2, "channels": 8, "channel_mult": [1], "num_blocks": 1, "attention": [4], "kernels": "both"}
SHELL = {"patch": 1, "channels": 8, "num_blocks": 1, "bands": True, "regions": True}
LABELS = ["a cat", "a dog"]


def model(kind: str = "refined", **changes: Any) -> Generator:
    """Random weights with everything that a network may hold, at 8 and 16 px."""
    encoder = load_text_encoder("label", 1, LABELS)
    denoiser = (
        open_gains(build_pyramid(8, core=CORE, shell=SHELL, dim=encoder.dim)).eval().requires_grad_(False)
    )
    config = snapshot_config(
        denoiser,
        kind,
        CORE,
        [SHELL],
        text_encoder=encoder.info,
        statistics=Statistics((0.2, 0.0, -0.2), (0.6, 0.5, 0.4)),
        **{"passes": (1, 2), "sigma_start": 5.0} if kind == "refined" else {},
        **changes,
    )
    return Generator(Snapshot(denoiser, config, "0" * 64), encoder)


@pytest.fixture(scope="module", autouse=True)
def no_trace_of_torch() -> Iterator[None]:
    """Its records of every step of an export, which pytest would keep, take longer than the export."""
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A refined model, exported in one pass."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    export(model(), folder, 1, "OpenMoji, CC BY-SA 4.0", log=lambda line: None)
    return folder


def test_a_program_makes_the_images_of_the_model(exported: Path) -> None:
    """With the noise of `crescendo generate`, by torch and by ONNX Runtime, in a batch of another size."""
    from pipeline.diffusion.seeds import seeded_noise
    from pipeline.export import example

    facts = json.loads((exported / "export.json").read_text())
    prompts, seeds = ["a dog", "", "a cat", "a dog"], [3, 4, 5, 6]
    wanted = load_generator(exported).images(prompts, seeds, 1)
    draw = seeded_noise(seeds)
    noise = torch.cat(
        [draw(each["purpose"], each["resolution"]).flatten(1) for each in facts["noise"]], dim=1
    )
    for runtime, close in (("torch", 0), ("onnx", 1)):
        (found,) = example.load_program(exported, "generator", runtime)(
            *example.encode(exported, facts, prompts, runtime), noise.numpy()
        )
        assert np.abs(found.round() - wanted.numpy()).max() <= close
    assert facts["difference"].keys() == {"generator.pt2", "generator.onnx"}
    assert all(value < 0.1 for value in facts["difference"].values())


def test_the_script_runs_from_a_copy_without_this_project(exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "moved")
    for runtime in ("onnx", "torch"):
        command = [
            sys.executable,
            "-P",
            folder / "generate.py",
            "a dog",
            "--num",
            "2",
            "--out",
            f"{runtime}.png",
        ]
        subprocess.run([*command, "--runtime", runtime], cwd=tmp_path, check=True, env={}, timeout=120)
    from PIL import Image

    a, b = (np.asarray(Image.open(tmp_path / f"{each}.png")).astype(int) for each in ("onnx", "torch"))
    assert a.shape == (16, 32, 3) and np.abs(a - b).max() <= 1


def test_the_hub_reads_the_card(exported: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    assert (card.data.license, card.data.pipeline_tag) == ("cc-by-sa-4.0", "text-to-image")
    assert "in 1 network pass." in card.text and "2 labels" in card.text
    subprocess.run(["sha256sum", "-c", "--quiet", "manifest.sha256"], cwd=exported, check=True)


@pytest.mark.parametrize(
    ("text", "hub_id", "name"),
    [
        (None, "unknown", None),
        ("MIT", "mit", None),
        ("CC BY-NC-SA 4.0, Ann", "cc-by-nc-sa-4.0", None),
        ("my own", "other", "my own"),
    ],
)
def test_licences_of_the_hub_are_known(text: str | None, hub_id: str, name: str | None) -> None:
    assert Licence.of(text) == Licence(text, hub_id, name)


def test_a_folder_is_replaced_only_if_it_is_an_export(exported: Path, tmp_path: Path) -> None:
    check_folder(exported, force=True)
    with pytest.raises(ConfigError, match="E-CFG-092"):
        check_folder(exported, force=False)
    copy = shutil.copytree(exported, tmp_path / "copy")
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="E-CFG-091"):
        check_folder(copy, force=True)
    with pytest.raises(ConfigError, match="E-CFG-090"):
        check_folder(copy / "notes.txt", force=True)


def test_a_program_that_differs_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, name: str, module: ImageProgram, *rest: Any) -> None:
        shutil.copytree(tmp_path / "other", folder, dirs_exist_ok=True)

    (tmp_path / "other").mkdir()
    monkeypatch.setattr("pipeline.export.export.write_programs", write)
    monkeypatch.setattr(convert, "load_program", lambda *_: lambda *arrays: [np.full((1, 3, 16, 16), np.nan)])
    with pytest.raises(StorageError, match="E-IO-088 generator.pt2: differs from the model by nan"):
        export(model(), tmp_path / "out", log=lambda line: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize(("change", "code"), [({"sampler": "adaptive"}, 88), ({"guidance": 2.0}, 89)])
def test_what_decides_by_the_image_is_refused(change: dict[str, Any], code: int) -> None:
    from pipeline.models.config import SamplerSettings

    with pytest.raises(ConfigError, match=f"E-CFG-0{code}"):
        ImageProgram(model("finetuned", sampling=SamplerSettings(4, **change)).snapshot)


def test_a_sampler_is_unrolled_without_a_trace_of_its_batch() -> None:
    """Of a model that is not refined, with a stochastic sampler: by torch.export alone, to be quick."""
    from pipeline.models.config import SamplerSettings

    module = ImageProgram(model("finetuned", sampling=SamplerSettings(3, "sde_dpmpp_2m")).snapshot).eval()
    inputs = [
        torch.randn(2, 8),
        torch.randn(2, 1, 8),
        torch.ones(2, 1).bool(),
        torch.randn(2, sum(module.sizes)),
    ]
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(module, tuple(inputs), dynamic_shapes=[{0: batch} for _ in inputs])
        more = [torch.cat([each, each, each]) for each in inputs]
        assert torch.equal(program.module()(*more), module(*more))
