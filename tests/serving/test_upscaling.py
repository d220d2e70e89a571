"""Uploads: decoded apart, enlarged with the pixels of the command line, refused in one line."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipeline.inference.upscaling import UpscaleSettings
from pipeline.serving.limits import MAX_UPLOAD_BYTES
from pipeline.serving.model import Served

PATH = "/v1/images/edits"


def png(width: int = 24, height: int = 20, mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(0)
    channels = {"RGB": 3, "RGBA": 4}[mode]
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, channels), np.uint8)).save(file, "PNG")
    return file.getvalue()


def edit(client: TestClient, content: bytes, **fields: str) -> tuple[int, dict]:
    answer = client.post(PATH, data=fields, files={"image": ("../../x.png", content, "image/png")})
    return answer.status_code, answer.json()


@pytest.mark.parametrize(
    ("fields", "factor"), [({}, 2), ({"factor": "4"}, 4), ({"size": "1024x1024"}, 4), ({"size": "50x40"}, 2)]
)
def test_an_upload_is_enlarged_as_by_the_command_line(
    client: TestClient, model: Served, fields: dict, factor: int
) -> None:
    status, answer = edit(client, png(), prompt="cat", seed="5", **fields)
    assert status == 200, answer
    enlarged = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))
    pixels = np.array(Image.open(io.BytesIO(png())))
    np.testing.assert_array_equal(
        enlarged, model.generator.upscale(pixels, "cat", 5, UpscaleSettings(factor))
    )
    assert answer["size"] == f"{24 * factor}x{20 * factor}" and bool(answer["notes"]) == ("size" in fields)


def test_transparency_is_kept(client: TestClient) -> None:
    status, answer = edit(client, png(mode="RGBA"), seed="0")
    assert status == 200
    assert Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).mode == "RGBA"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E-IMG-001"),
        (b"no image", "E-IMG-003"),
        (png(2000, 600), "E-IMG-004"),
        (png()[:200], "E-IMG-005"),
        (png(4, 4), "E-IMG-006"),
    ],
)
def test_uploads_that_are_no_image_are_one_line(client: TestClient, content: bytes, code: str) -> None:
    status, answer = edit(client, content)
    assert (status, answer["error"]["code"]) == (400, code)
    assert len(answer["error"]["message"].splitlines()) == 1


@pytest.mark.parametrize(
    "fields", [{"factor": "3"}, {"strength": "nan"}, {"strength": "2"}, {"n": "11"}, {"seed": "x"}]
)
def test_fields_out_of_range_are_refused(client: TestClient, fields: dict) -> None:
    status, answer = edit(client, png(), **fields)
    assert (status, answer["error"]["param"]) == (400, *fields)


def test_what_is_too_large_or_no_form_is_refused(client: TestClient) -> None:
    assert edit(client, png(1000, 1000), factor="4", n="2")[1]["error"]["code"] == "too_large"
    assert edit(client, b"x" * MAX_UPLOAD_BYTES)[0] == 413
    assert client.post(PATH, json={"image": "x"}).status_code == 400
    assert client.post(PATH, data={"image": "/etc/passwd"}).status_code == 400
