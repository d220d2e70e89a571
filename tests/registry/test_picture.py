"""Pictures that say how they were made, and the way back to the version that drew them."""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline import artifacts
from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.inference.png import KEY, read_png
from pipeline.registry.package import Registry
from tests.registry.conftest import write_model, write_verdict


def traced(path: str, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    main.run(["trace", path, "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_picture_leads_to_its_version_and_can_be_made_again(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["promote"])
    Path("prompts.txt").write_text("-x\ncat 'é'\n")
    main.run(["generate", "--prompts", "prompts.txt", "--seed", "3", "--size", "40x24", "--out", "many"])
    main.run(["generate", "dog", "cat", "--num", "2", "--resolution", "16", "--out", "sheet.png"])
    digest = Registry(root).version("crescendo", "1").digest
    for path in ("many/cat-é-3.png", "many/x-3.png", "sheet.png"):
        facts = traced(path, capsys)
        made = facts["made"]
        assert facts["unchanged"] and (made["model"], made["digest"]) == ("models:/crescendo/1", digest)
        assert made["passes"] == 1 and facts["version"]["aliases"] == ["candidate", "champion"]
        program, *words = shlex.split(facts["again"])
        assert main.run([*words[:1], "--out", "again.png", *words[1:]]) == 0 and program == "crescendo"
        again, first = (np.asarray(Image.open(name)) for name in ("again.png", path))
        np.testing.assert_array_equal(again if "num" in made else again[2:-2, 2:-2], first)
    assert Path("again.png").read_bytes() == Path("sheet.png").read_bytes(), "no clock, no folder"
    capsys.readouterr()
    main.run(["trace", "many/cat-é-3.png"])
    lines = [line.strip("│├└─ ") for line in capsys.readouterr().out.splitlines()]
    assert lines[:4] == ["many/cat-é-3.png", "prompt  cat 'é'", "seed  3", "drawn with  40x24 px, passes 1"]
    assert lines[5] == "pixels  as they were made" and lines[7].startswith("models:/crescendo/1 (candidate")


def test_an_enlarged_picture_names_its_source_and_a_folder_leads_to_the_version_of_its_digest(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_verdict(root, write_model(root / "models/refined", upscale_steps=1))
    main.run(["generate", "cat", "--num", "1", "--model", str(root / "models/refined")])
    main.run(["upscale", "grid.png", "--model", "models/refined"])
    facts = traced("upscaled.png", capsys)
    source = facts["made"]["of"]
    assert source["sha256"] == artifacts.sha256_file("grid.png") and source["made"]["prompts"] == ["cat"]
    assert (facts["made"]["strength"], facts["made"]["model"], facts["version"]) == (
        0.2,
        "models/refined",
        None,
    )
    main.run(["trace", "upscaled.png"])
    assert "none in this registry has that snapshot" in capsys.readouterr().out
    main.run(["promote"])
    assert traced("upscaled.png", capsys)["version"]["version"] == "models:/crescendo/1"


def test_pictures_that_were_changed_or_say_nothing_are_said_so(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main.run(["generate", "cat", "--num", "1", "--model", "models/refined", "--out", "a.png"])
    image = Image.open("a.png")
    text = image.text[KEY]
    image.save("stripped.png")
    Image.open("a.png").convert("RGB").save("b.jpg")
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:-200])
    for path, words in {
        "stripped.png": "E-INP-073 stripped.png: does not say how it was made",
        "b.jpg": "E-DAT-070 b.jpg: cannot be read as a PNG file",
        "broken.png": "E-DAT-070 broken.png",
    }.items():
        with pytest.raises(PipelineError, match=words) as error:
            main.run(["trace", path])
        assert len(str(error.value).splitlines()) == 1
    edited = np.array(image)
    edited[5, 5] ^= 1
    hostile = {
        "prompt": "a\nb\x1b[31m",
        "digest": 7,
        "model": "models:/x' or 1/3",
        "seed": [],
        "of": 3,
        "num": {},
    }
    for facts in (json.loads(text), hostile, {"prompts": [], "of": {"made": [1]}}):
        info = PngInfo()
        info.add_text(KEY, json.dumps(facts))
        Image.fromarray(edited).save("edited.png", pnginfo=info)
        capsys.readouterr()
        main.run(["trace", "edited.png"])
        out = capsys.readouterr().out
        assert "not those that were made: changed since" in out and "\x1b" not in out
    made, _ = read_png(Path("a.png").read_bytes())
    assert made is not None and "/" not in made["model"].removeprefix("models/")
