"""The command line: which model is taken, what is refused, how quickly help comes."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.config.params import load_params
from pipeline.errors import BadData, ConfigError, InputMissing, PipelineError, StorageError
from pipeline.inference.generator import load_generator
from pipeline.presets import apply_preset
from tests.conftest import ROOT, write_prepared

_spec = importlib.util.spec_from_file_location(
    "registry_fixtures", Path(__file__).parent / "registry/conftest.py"
)
assert _spec and _spec.loader
fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fixtures)
quiet_store, root = fixtures.quiet_store, fixtures.root


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_without_a_registry_the_refined_model_is_taken(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["generate", "cat", "--num", "5", "--steps", "1", "--out", "sub/grid.png"]) == 0
    out, err = capfd.readouterr()
    assert "model: models/refined (nothing is registered)" in out and err == ""
    assert pixels("sub/grid.png").shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    assert not (root / "mlflow.db").exists()


def test_the_champion_comes_before_the_candidate_and_it_before_the_folder(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = fixtures.artifacts.directory_digest(root / "models/refined")
    fixtures.write_verdict(root, first, passed=False)
    main.run(["promote", "--allow-candidate"])
    main.run(["generate", "cat", "--num", "1"])
    assert "models:/crescendo@candidate, version 1" in capsys.readouterr().out
    fixtures.write_verdict(root, first)
    main.run(["promote"])
    second = fixtures.write_model(root / "models/refined", seed=1)
    fixtures.write_verdict(root, second, passed=False)
    main.run(["promote", "--allow-candidate"])
    main.run(["generate", "cat", "--num", "1"])
    assert "models:/crescendo@champion, version 1" in capsys.readouterr().out
    main.run(["generate", "cat", "--num", "1", "--model", "models:/crescendo/2"])
    assert second[:12] in capsys.readouterr().out


def test_a_picture_depends_on_its_prompt_and_seed_alone(root: Path) -> None:
    model = ["--model", "models/refined", "--steps", "2"]
    main.run(["generate", "dog", "cat", "--num", "2", "--seed", "4", "--out", "both.png", *model])
    main.run(["generate", "cat", "--num", "1", "--seed", "5", "--out", "one.png", *model])
    np.testing.assert_array_equal(pixels("both.png")[36:68, 36:68], pixels("one.png")[2:-2, 2:-2])
    assert (pixels("both.png")[2:34, 36:68] != pixels("one.png")[2:-2, 2:-2]).any()


@pytest.mark.parametrize("kind", ["refined", "finetuned"])
def test_a_picture_does_not_depend_on_its_place_or_company(tmp_path: Path, kind: str) -> None:
    fixtures.write_model(tmp_path / "model", kind=kind)
    generator = load_generator(tmp_path / "model")
    prompts, seeds = [f"cat {i % 3}" for i in range(7)], list(range(7))
    made = generator.images(prompts, seeds, 2)
    for i in range(7):
        assert torch.equal(generator.images([prompts[i]], [seeds[i]], 2)[0], made[i])
    order = [5, 3, 0, 6, 1, 4, 2]
    again = generator.images([prompts[i] for i in order], [seeds[i] for i in order], 2)
    assert torch.equal(again, made[order])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3"], "choose one of: 1, 2, 4"),
        (["--num", "0"], "--num"),
        (["--num", "5000"], "--num"),
        (["--seed", "-1"], "seed"),
        (["--out", "grid.gif"], ".png"),
        (["--guidance", "nan"], "--guidance"),
        (["--resolution", "64"], "this model makes no 64 px. Fix: choose one of: 16, 32"),
        (["--guide", "bad"], "guide: 'bad' is unknown. Fix: choose one of: no_text, early, low"),
        (
            ["--sampler", "euler"],
            "sampler: 'euler' is unknown. Fix: choose one of: heun, dpmpp_2m, sde_dpmpp_2m, adaptive",
        ),
    ],
)
def test_values_that_cannot_be_are_refused(root: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main.run(["generate", "cat", *more])
    assert not list(root.glob("grid.*"))


@pytest.mark.parametrize("kind", ["refined", "finetuned"])
def test_any_level_of_a_model_makes_pictures(root: Path, kind: str) -> None:
    fixtures.write_model(root / "model", kind=kind)
    run = ["generate", "cat", "--num", "1", "--steps", "2", "--model", "model"]
    main.run([*run, "--out", "own.png"])
    main.run([*run, "--resolution", "32", "--out", "fine.png"])
    main.run([*run, "--resolution", "16", "--out", "coarse.png"])
    np.testing.assert_array_equal(pixels("own.png"), pixels("fine.png"))
    assert pixels("coarse.png").shape == (16 + 4, 16 + 4, 3)


def test_a_model_of_another_text_encoder_is_refused(root: Path) -> None:
    fixtures.write_model(root / "other", encoder="0" * 64)
    with pytest.raises(StorageError, match="trained with text encoder 000000000000"):
        main.run(["generate", "cat", "--model", "other"])


def test_a_teacher_is_sampled_in_steps_with_guidance(root: Path) -> None:
    fixtures.write_model(root / "teacher", kind="finetuned")
    run = ["generate", "cat", "--num", "1", "--model", "teacher", "--steps", "3"]
    main.run([*run, "--out", "a.png"])
    main.run([*run, "--guidance", "4", "--out", "b.png"])
    assert (pixels("a.png") != pixels("b.png")).any()
    main.run([*run, "--sampler", "heun", "--out", "heun.png"])
    np.testing.assert_array_equal(pixels("a.png"), pixels("heun.png"))
    with pytest.raises(ConfigError, match="'early' needs weights"):
        main.run([*run, "--guide", "early"])
    main.run([*run, "--sampler", "dpmpp_2m", "--out", "c.png"])
    assert (pixels("a.png") != pixels("c.png")).any()


@pytest.mark.parametrize("option", [["--guidance", "2"], ["--guide", "low"], ["--sampler", "heun"]])
def test_an_option_without_effect_is_told(
    root: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    main.run(["generate", "cat", "--num", "1", *option])
    assert f"{option[0]} has no effect" in capsys.readouterr().err


def test_a_missing_folder_is_named(root: Path) -> None:
    with pytest.raises(InputMissing, match="nowhere"):
        main.run(["generate", "cat", "--model", "nowhere"])


def test_errors_are_one_line_and_a_status(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.cli.main", "promote"]
    source = str(Path(main.__file__).parents[1])
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": source}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 66 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("E-INP-001")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from pipeline import cli\ntry: cli.run(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'mlflow', 'pydantic', 'numpy', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- Upscaling.


@pytest.fixture
def taught(root: Path) -> Path:
    """The folder, with a fine-tuned model that has learned to upscale."""
    fixtures.write_model(root / "models/finetuned", kind="finetuned", bands=True)
    return root


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(noise.squeeze())


def test_a_picture_of_any_size_is_enlarged(taught: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture(45, 19).save("small.png")
    assert main.run(["upscale", "small.png", "--steps", "2", "--out", "sub/big.png"]) == 0
    out, err = capfd.readouterr()
    assert "model: models/finetuned" in out and "wrote 90x38 px to sub/big.png" in out and err == ""
    big = pixels("sub/big.png")
    assert big.shape == (38, 90, 3)
    assert np.abs(big.reshape(19, 2, 45, 2, 3).mean((1, 3)) - pixels("small.png")).max() <= 1
    main.run(["upscale", "small.png", "--steps", "1", "--factor", "4", "--out", "four.png"])
    assert pixels("four.png").shape == (76, 180, 3)
    run = ["upscale", "small.png", "--steps", "2"]
    for number, more in enumerate(
        (["--prompt", "a cat"], ["--seed", "1"], ["--strength", "0.4"], ["--no-project"], ["--steps", "3"])
    ):
        main.run([*run, *more, "--out", f"{number}.png"])
        assert (pixels(f"{number}.png") != big).any(), more


def test_transparency_and_orientation_are_kept(taught: Path) -> None:
    small = picture(20, 12, "RGBA")
    small.save("small.png")
    main.run(["upscale", "small.png", "--steps", "1", "--out", "big.png"])
    big = pixels("big.png")
    expected = small.getchannel("A").resize((40, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(big[..., 3], np.asarray(expected))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    picture(20, 12).save("turned.jpg", exif=exif)
    main.run(["upscale", "turned.jpg", "--steps", "1", "--out", "big.png"])
    assert pixels("big.png").shape == (40, 24, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["small.png", "--out", "big.jpg"], ".png"),
        (["text.png"], "E-IMG-003 text.png"),
        (["wide.png", "--factor", "4"], "would have 9600x8000 pixels"),
        (["small.png", "--strength", "0.6"], "strength: 0.6 is out of range"),
        (["small.png", "--steps", "0"], "steps"),
        (["small.png", "--seed", "-1"], "seed"),
        (["small.png", "--model", "nowhere"], "nowhere"),
        (["small.png", "--model", "models/refined"], "a refined model"),
    ],
)
def test_what_cannot_be_upscaled_is_refused_and_leaves_nothing(
    taught: Path, more: list[str], message: str
) -> None:
    picture(20, 12).save("small.png")
    Image.new("L", (2400, 2000)).save("wide.png")
    Path("text.png").write_text("no picture")
    before = sorted(taught.rglob("*"))
    with pytest.raises(PipelineError, match=re.escape(message)) as caught:
        main.run(["upscale", *more])
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(taught.rglob("*")) == before


def test_a_model_that_was_not_trained_to_upscale_says_so(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixtures.write_model(root / "models/finetuned", kind="finetuned")
    picture(20, 12).save("small.png")
    assert main.run(["upscale", "small.png", "--steps", "1"]) == 0
    assert "not trained to upscale" in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_old_picture(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(20, 12).save("small.png")
    Path("upscaled.png").write_bytes(b"old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.cli.images._show_rows", stop)
    with pytest.raises(KeyboardInterrupt):
        main.run(["upscale", "small.png", "--steps", "1"])
    assert Path("upscaled.png").read_bytes() == b"old" and not list(taught.glob("*.tmp-*"))


# --- Data and presets.


def write_squares(folder: Path, count: int = 40) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number:02d}.png")


def test_checking_data_says_what_prepare_would_do_and_writes_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_squares(root / "mine/red cats")
    (root / "mine/red cats/07.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    before = sorted(root.rglob("*"))
    assert main.run(["data", "check", "mine"]) == 0
    out = capsys.readouterr().out
    assert "folder: 40 images, 39 usable, 1 to quarantine, 0 duplicates" in out
    assert "1 x E-IMG-00" in out and "mine/red cats/07.png" in out
    assert "prepare would write" in out and "1 captions" in out
    assert sorted(root.rglob("*")) == before


def test_checking_bad_data_ends_as_prepare_would(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_squares(root / "mine", 4)
    (root / "mine/broken.png").write_bytes(b"nothing")
    with pytest.raises(BadData, match="E-DAT-001 folder: 1 of 5 images are unusable"):
        main.run(["data", "check", "mine"])
    with pytest.raises(ConfigError, match="'nowhere' is neither there nor a known source"):
        main.run(["data", "check", "nowhere"])


def test_a_contact_sheet_shows_prepared_images(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_prepared(root / "data/prepared")
    assert main.run(["data", "show", "--num", "9", "--split", "train", "--out", "sheet.png"]) == 0
    assert "wrote 9 of 16 images of train to sheet.png" in capsys.readouterr().out
    assert pixels("sheet.png").shape == (2 * (128 + 54) + 6, 8 * (128 + 6) + 6, 3)
    with pytest.raises(ConfigError, match="no PNG file"):
        main.run(["data", "show", "--out", "sheet.jpg"])


def test_a_preset_changes_its_values_and_keeps_the_comments(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "presets", root / "presets")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    assert main.run(["preset"]) == 0
    assert "cifar10-128  CIFAR-10, enlarged to 128 px" in capsys.readouterr().out
    assert main.run(["preset", "cifar10-128"]) == 0
    assert "data.source: openmoji==17.0.0 -> torchvision:CIFAR10" in capsys.readouterr().out
    params = load_params(root / "params.yaml")
    assert (params.data.source, params.data.resolution, params.data.subset) == (
        "torchvision:CIFAR10",
        128,
        (),
    )
    kept = [line.partition("#")[2] for line in (root / "params.yaml").read_text().splitlines() if "#" in line]
    assert kept == [
        line.partition("#")[2] for line in (ROOT / "params.yaml").read_text().splitlines() if "#" in line
    ]
    with pytest.raises(ConfigError, match="there is no preset 'tiny'.*choose one of: .*cifar10-128"):
        main.run(["preset", "tiny"])


def test_a_preset_that_would_not_be_valid_changes_nothing(root: Path) -> None:
    (root / "presets").mkdir()
    (root / "presets/bad.yaml").write_text("# A bad one\ndata: {resolution: 100}\n")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    with pytest.raises(ConfigError, match="100 is not a power of two"):
        main.run(["preset", "bad"])
    assert (root / "params.yaml").read_text() == (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
def test_every_preset_is_valid(preset: str, root: Path) -> None:
    shutil.copytree(ROOT / "presets", root / "presets")
    shutil.copy(ROOT / "params.yaml", root / "params.yaml")
    assert apply_preset(root, preset)
    assert apply_preset(root, preset) == [], "nothing is left to change"
