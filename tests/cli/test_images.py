"""`crescendo generate` and `crescendo upscale`: what they write, and which values they refuse."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.errors import ConfigError, PipelineError
from pipeline.inference.generator import load_generator
from pipeline.progress import ProgressBar
from tests.registry.conftest import write_model, write_verdict


def pixels(path: str) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_an_image_depends_on_its_prompt_and_seed_alone(root: Path) -> None:
    model = ["--model", "models/refined", "--steps", "2"]
    main.run(["generate", "dog", "cat", "--num", "2", "--seed", "4", "--out", "both.png", *model])
    main.run(["generate", "cat", "--num", "1", "--seed", "5", "--out", "one.png", *model])
    np.testing.assert_array_equal(pixels("both.png")[36:68, 36:68], pixels("one.png")[2:-2, 2:-2])
    assert (pixels("both.png")[2:34, 36:68] != pixels("one.png")[2:-2, 2:-2]).any()


def test_a_file_of_prompts_gives_a_picture_each_that_a_list_names(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["\ufeffcat", "", " dog, sitting/there ", "cat", "Cat", "../../etc", "\U0001f600", "é" * 200]
    Path("prompts.txt").write_text("\r\n".join(lines), encoding="utf-8")
    model = ["--model", "models/refined", "--steps", "2"]
    main.run(["generate", "--prompts", "prompts.txt", "--num", "2", "--seed", "4", "--out", "many", *model])
    assert "12 images of 6 prompts" in (answer := capsys.readouterr().out)
    assert "1 repeated and 1 empty lines passed over" in answer
    named = [json.loads(line) for line in Path("many/prompts.jsonl").read_text().splitlines()]
    assert sorted(path.name for path in Path("many").glob("*.png")) == sorted(each["file"] for each in named)
    files = {each["prompt"]: each["file"] for each in named if each["seed"] == 5}
    assert files["dog, sitting/there"] == "dog-sitting-there-5.png"
    assert files["../../etc"] == "etc-5.png" and files["Cat"] == "Cat~2-5.png"
    main.run(["generate", "cat", "--num", "1", "--seed", "5", "--out", "one.png", *model])
    np.testing.assert_array_equal(pixels("many/cat-5.png"), pixels("one.png")[2:-2, 2:-2])


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (b"\xff\xfe", [], "E-DAT-080 prompts.txt: is not UTF-8 at byte 0"),
        (b"\n \n", [], "E-DAT-081 prompts.txt: holds no prompt"),
        (b"cat", ["dog"], "E-CFG-082 generate: prompts are given twice"),
        (b"cat", ["--out", "prompts.txt"], "E-CFG-083 --out: prompts.txt is a file"),
        (b"cat", ["--num", "0"], "E-CFG-043 --num"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(
    root: Path, content: bytes, more: list[str], message: str
) -> None:
    Path("prompts.txt").write_bytes(content)
    with pytest.raises(PipelineError, match=message):
        main.run(["generate", "--prompts", "prompts.txt", *more])
    assert not Path("images").exists()


@pytest.mark.parametrize("kind", ["refined", "finetuned"])
def test_an_image_does_not_depend_on_its_place_or_company(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path / "model", kind=kind)
    generator = load_generator(tmp_path / "model")
    prompts, seeds = [f"cat {i % 3}" for i in range(7)], list(range(7))
    images = generator.images(prompts, seeds, 2)
    for i in range(7):
        assert torch.equal(generator.images([prompts[i]], [seeds[i]], 2)[0], images[i])
    order = [5, 3, 0, 6, 1, 4, 2]
    again = generator.images([prompts[i] for i in order], [seeds[i] for i in order], 2)
    assert torch.equal(again, images[order])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "3"], "choose one of: 1, 2, 4"),
        (["--num", "0"], "--num"),
        (["--num", "5000"], "--num"),
        (["--seed", "-1"], "seed"),
        (["--out", "grid.gif"], ".png"),
        (["--guidance", "nan"], "E-CFG-045 guidance"),
        (["--resolution", "64"], "this model makes no 64 px. Fix: choose one of: 16, 32"),
        (
            ["--guide", "bad"],
            "guide: 'bad' is unknown. Fix: choose one of: unconditional, early_weights, low_band",
        ),
        (["--size", "32"], "size: '32' is no size. Fix: write auto, or WIDTHxHEIGHT such as 128x128"),
        (
            ["--size", "44x24"],
            "44x24 px: sides of this model are multiples of 8, up to 128 px. Fix: choose 48x24",
        ),
        (["--guide", "low"], "guide: 'low' was renamed. Fix: write low_band"),
        (
            ["--sampler", "euler"],
            "sampler: 'euler' is unknown. Fix: choose one of: heun, dpmpp_2m, sde_dpmpp_2m, adaptive",
        ),
    ],
)
def test_values_out_of_range_are_refused(root: Path, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main.run(["generate", "cat", *more])
    assert not list(root.glob("grid.*"))


@pytest.mark.parametrize("kind", ["refined", "finetuned"])
def test_any_level_of_a_model_generates_images(root: Path, kind: str) -> None:
    write_model(root / "model", kind=kind)
    run = ["generate", "cat", "--num", "1", "--steps", "2", "--model", "model"]
    main.run([*run, "--out", "own.png"])
    main.run([*run, "--resolution", "32", "--out", "fine.png"])
    main.run([*run, "--resolution", "16", "--out", "coarse.png"])
    np.testing.assert_array_equal(pixels("own.png"), pixels("fine.png"))
    assert pixels("coarse.png").shape == (16 + 4, 16 + 4, 3)
    main.run([*run, "--size", "32x32", "--out", "square.png"])
    main.run([*run, "--size", "40x24", "--out", "wide.png"])
    np.testing.assert_array_equal(pixels("own.png"), pixels("square.png"))
    assert pixels("wide.png").shape == (24 + 4, 40 + 4, 3)


def test_a_teacher_is_sampled_in_steps_with_guidance(root: Path) -> None:
    write_model(root / "teacher", kind="finetuned")
    run = ["generate", "cat", "--num", "1", "--model", "teacher", "--steps", "3"]
    main.run([*run, "--out", "a.png"])
    main.run([*run, "--guidance", "4", "--out", "b.png"])
    assert (pixels("a.png") != pixels("b.png")).any()
    main.run([*run, "--sampler", "heun", "--out", "heun.png"])
    np.testing.assert_array_equal(pixels("a.png"), pixels("heun.png"))
    with pytest.raises(ConfigError, match="'early_weights' needs weights"):
        main.run([*run, "--guide", "early_weights"])
    main.run([*run, "--sampler", "dpmpp_2m", "--out", "c.png"])
    assert (pixels("a.png") != pixels("c.png")).any()


@pytest.mark.parametrize("option", [["--guidance", "2"], ["--guide", "low_band"], ["--sampler", "heun"]])
def test_an_option_without_effect_is_reported(
    root: Path, capsys: pytest.CaptureFixture[str], option: list[str]
) -> None:
    main.run(["generate", "cat", "--num", "1", *option])
    assert f"{option[0]} has no effect" in capsys.readouterr().err


@pytest.fixture
def upscaling_root(root: Path) -> Path:
    """The folder, with a fine-tuned model trained to upscale."""
    write_model(root / "models/finetuned", kind="finetuned", bands=True)
    return root


def noise_image(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(noise.squeeze())


def test_an_image_of_any_size_is_enlarged(upscaling_root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    noise_image(45, 19).save("small.png")
    model = ["--model", "models/finetuned"]
    assert main.run(["upscale", "small.png", "--steps", "2", "--out", "sub/big.png", *model]) == 0
    out, err = capfd.readouterr()
    assert "model: models/finetuned" in out and "wrote 90x38 px to sub/big.png" in out
    assert re.fullmatch(r"upscale (\d+)/\1 rows, .* left\n", err)
    big = pixels("sub/big.png")
    assert big.shape == (38, 90, 3)
    assert np.abs(big.reshape(19, 2, 45, 2, 3).mean((1, 3)) - pixels("small.png")).max() <= 1
    main.run(["upscale", "small.png", "--steps", "1", "--factor", "4", "--out", "four.png", *model])
    assert pixels("four.png").shape == (76, 180, 3)
    run = ["upscale", "small.png", "--steps", "2", *model]
    for number, more in enumerate(
        (["--prompt", "a cat"], ["--seed", "1"], ["--strength", "0.4"], ["--no-project"], ["--steps", "3"])
    ):
        main.run([*run, *more, "--out", f"{number}.png"])
        assert (pixels(f"{number}.png") != big).any(), more


def test_transparency_and_orientation_are_kept(upscaling_root: Path) -> None:
    small = noise_image(20, 12, "RGBA")
    small.save("small.png")
    main.run(["upscale", "small.png", "--steps", "1", "--out", "big.png"])
    big = pixels("big.png")
    expected = small.getchannel("A").resize((40, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(big[..., 3], np.asarray(expected))
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    noise_image(20, 12).save("turned.jpg", exif=exif)
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
        (["small.png", "--model", "models/refined"], "E-CFG-050 upscale: this refined model"),
    ],
)
def test_what_cannot_be_upscaled_is_refused_and_nothing_is_written(
    upscaling_root: Path, more: list[str], message: str
) -> None:
    noise_image(20, 12).save("small.png")
    Image.new("L", (2400, 2000)).save("wide.png")
    Path("text.png").write_text("not an image")
    before = sorted(upscaling_root.rglob("*"))
    with pytest.raises(PipelineError, match=re.escape(message)) as caught:
        main.run(["upscale", *more])
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(upscaling_root.rglob("*")) == before


def test_a_model_that_was_not_trained_to_upscale_says_so(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(root / "models/finetuned", kind="finetuned")
    noise_image(20, 12).save("small.png")
    assert main.run(["upscale", "small.png", "--steps", "1"]) == 0
    assert "not trained to upscale" in capsys.readouterr().err


def test_a_refined_model_that_upscales_better_is_the_default(
    upscaling_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_image(20, 12).save("small.png")
    main.run(["upscale", "small.png", "--out", "plain.png"])  # models/refined has no record
    out, err = capsys.readouterr()
    assert out.splitlines()[-2:] == ["model: models/finetuned", "wrote 40x24 px to plain.png"]
    assert "does not say that it upscales better" in err
    config = json.loads(Path("models/refined/config.json").read_text())
    shutil.rmtree("models/refined")
    write_model(upscaling_root / "models/refined", upscale_steps=1)
    assert json.loads(Path("models/refined/config.json").read_text()) == {**config, "upscale_steps": 1}
    main.run(["upscale", "small.png", "--out", "refined.png"])
    out, err = capsys.readouterr()
    assert "model: models/refined (nothing is registered)" in out and "not trained to upscale" not in err
    main.run(["upscale", "small.png", "--out", "one.png", "--steps", "1"])
    main.run(["upscale", "small.png", "--out", "two.png", "--steps", "2"])
    np.testing.assert_array_equal(pixels("refined.png"), pixels("one.png"))
    assert (pixels("refined.png") != pixels("two.png")).any()
    assert (pixels("refined.png") != pixels("plain.png")).any()
    shutil.rmtree("models/refined")
    main.run(["upscale", "small.png", "--out", "again.png"])
    np.testing.assert_array_equal(pixels("again.png"), pixels("plain.png"))


@pytest.mark.slow
def test_the_refined_model_upscales_for_a_champion_it_was_refined_from(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise_image(20, 12).save("small.png")
    champion = write_model(root / "models/finetuned", kind="finetuned")
    write_verdict(root, champion)
    main.run(["promote"])
    for parent, expected in ((champion, "model: models/refined"), ("f" * 64, "models:/crescendo@champion")):
        shutil.rmtree("models/refined")
        write_model(root / "models/refined", upscale_steps=1, parent=parent)
        capsys.readouterr()
        main.run(["upscale", "small.png", "--steps", "1"])
        out, err = capsys.readouterr()
        assert expected in out.splitlines()[-2]
        assert ("upscales better" in err) == (parent == champion)


def test_an_interrupted_run_leaves_the_old_image(
    upscaling_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise_image(20, 12).save("small.png")
    Path("upscaled.png").write_bytes(b"old")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBar, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        main.run(["upscale", "small.png", "--steps", "1"])
    assert Path("upscaled.png").read_bytes() == b"old" and not list(upscaling_root.glob("*.tmp-*"))
