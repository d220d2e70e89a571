"""Images by OpenAI's API: the pixels of the command line, whatever the batch, the size or the name asked for."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from pipeline.serving.model import Served

PATH = "/v1/images/generations"


def decoded(entry: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def generate(client: TestClient, **body: object) -> dict:
    answer = client.post(PATH, json={"prompt": "cat", "seed": 0} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_pixels_are_those_of_the_command_line_whatever_the_batch(client: TestClient, model: Served) -> None:
    asked = [
        {"prompt": prompt, "seed": 7 * i, "steps": steps, "n": 1 + i % 3, "size": size}
        for i, (prompt, steps, size) in enumerate(
            [
                ("cat", 1, "auto"),
                ("a much longer prompt, of a dog", 1, "auto"),
                ("", 2, "auto"),
                ("cat", 1, "40x24"),
            ]
            * 3
        )
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda body: generate(client, **body), asked))
    for body, answer in zip(asked, answers, strict=True):
        size = None if body["size"] == "auto" else (40, 24)
        for i, entry in enumerate(answer["data"]):
            seed = body["seed"] + i
            alone = model.generator.images([body["prompt"]], [seed], body["steps"], size=size)[0]
            assert entry["seed"] == seed
            assert torch.equal(torch.tensor(decoded(entry)).permute(2, 0, 1), alone)


@pytest.mark.parametrize(
    ("size", "served"),
    [
        (None, "32x32"),
        ("auto", "32x32"),
        ("40x24", "40x24"),
        ("1024x1024", "32x32"),
        ("256x256", "32x32"),
        ("1792x1024", "40x24"),
        ("1024x1536", "24x40"),
        ("99999x1", "64x16"),
        ("33x31", "32x32"),
        ("8x8", "32x32"),
    ],
)
def test_a_size_that_the_model_does_not_have_is_served_at_the_nearest(
    client: TestClient, size: str | None, served: str
) -> None:
    answer = generate(client, size=size)
    assert answer["size"] == served
    width, height = map(int, served.split("x"))
    assert decoded(answer["data"][0]).shape == (height, width, 3)
    assert bool(answer["notes"]) == (size not in (None, "auto", served))


def test_the_answer_says_what_was_served(client: TestClient, model: Served) -> None:
    answer = generate(client, model="dall-e-3", quality="hd", style="vivid")
    assert answer["digest"] == model.digest and answer["model"] == "tiny" and answer["steps"] == 1
    assert answer["notes"] == [
        f"model: dall-e-3 is not here, tiny ({model.digest[:12]}) was served",
        "without effect: quality, style",
    ]
    (card,) = client.get("/v1/models").json()["data"]
    assert card["digest"] == model.digest and card["sizes"] == ["32x32", "40x24", "24x40"]
    assert card["lineage"]["data"] == "d" * 64
    assert client.get("/v1/models/dall-e-3").json() == card


def test_images_are_given_as_text_or_by_url(client: TestClient) -> None:
    (both,) = generate(client)["data"]
    assert client.get(both["url"]).content == base64.b64decode(both["b64_json"])
    (entry,) = generate(client, response_format="url")["data"]
    assert set(entry) == {"url", "seed"} and client.get(entry["url"]).headers["content-type"] == "image/png"
    (entry,) = generate(client, response_format="b64_json")["data"]
    assert set(entry) == {"b64_json", "seed"}
    assert client.get("/images/none.png").status_code == 404


def test_seeds_are_drawn_where_none_is_given(client: TestClient) -> None:
    first, second = (generate(client, seed=None)["data"][0]["seed"] for _ in range(2))
    assert first != second
    (again,) = generate(client, seed=first)["data"]
    assert again["seed"] == first


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 5000}, "prompt"),
        ({"prompt": "x", "n": 0}, "n"),
        ({"prompt": "x", "n": 11}, "n"),
        ({"prompt": "x", "steps": 3}, "steps"),
        ({"prompt": "x", "steps": 1000}, "steps"),
        ({"prompt": "x", "seed": -1}, "seed"),
        ({"prompt": "x", "seed": 2**63 - 1, "n": 2}, "seed"),
        ({"prompt": "x", "size": "large"}, "size"),
        ({"prompt": "x", "response_format": "tiff"}, "response_format"),
        ({"prompt": "x", "stream": True}, "stream"),
    ],
)
def test_values_out_of_range_are_one_line_in_the_shape_of_the_api(
    client: TestClient, body: dict, param: str
) -> None:
    answer = client.post(PATH, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert len(error["message"].splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": "x", "\\ud800": 1, "steps": 3}', 400),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b"[" * 50_000, 400),
        (b" " * 70_000, 413),
    ],
)
def test_bodies_that_are_no_request_are_refused(client: TestClient, content: bytes, status: int) -> None:
    answer = client.post(PATH, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and set(answer.json()) == {"error"}


def test_a_body_without_a_length_is_cut_off(client: TestClient) -> None:
    answer = client.post(
        PATH, content=(b" " * 1000 for _ in range(100)), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "too_large"
