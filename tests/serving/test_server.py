"""`crescendo serve` as a process: OpenAI's client, the page in a browser, its end; and what it refuses."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from pipeline.cli import main
from pipeline.errors import PipelineError
from pipeline.inference.generator import load_generator
from pipeline.inference.png import encode_png, read_png
from pipeline.serving.announce import Running, running
from pipeline.serving.server import Address, token_for
from tests.evaluation.browser import AUDIT, CHROMIUM, Browser, Typed, open_browser
from tests.registry.conftest import write_model
from tests.serving.test_upscaling import png

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-some-length"
# What a person does, as expressions of the page. None waits for ever.
UNTIL = """globalThis.at = (id) => document.getElementById(id); globalThis.until = async (ready) => {
  for (let i = 0; i < 3000 && !ready(); i++) await new Promise((done) => setTimeout(done, 20));
}"""
OPEN = """(async () => {
  await until(() => !at('access').hidden);
  at('token').value = 'TOKEN';
  at('access').requestSubmit();
  await until(() => at('size').options.length);
  return at('served').textContent;
})()""".replace("TOKEN", TOKEN)
DRAW = """(async () => {
  for (const [id, value] of [['prompt', 'cat'], ['seed', '3'], ['count', '3']]) at(id).value = value;
  at('generate').requestSubmit();
  await until(() => document.querySelectorAll('#gallery img').length == 3);
  return [...document.querySelectorAll('#gallery button')].map((each) => each.ariaLabel);
})()"""
LOOK = "document.querySelector('#gallery button').click()"
BACK = """(async () => {
  at('viewer').close();
  document.querySelector('#gallery button').click();
  history.back();
  await until(() => !at('viewer').open);
  return [at('viewer').open, document.querySelectorAll('#gallery img').length];
})()"""
UPSCALE = """(async () => {
  at('enlarge').click();
  await until(() => !at('comparison').hidden);
  await Promise.all(['before', 'after'].map((id) => at(id).decode()));
  at('divider').value = 25;
  at('divider').dispatchEvent(new Event('input'));
  const widths = ['before', 'after'].map((id) => at(id).naturalWidth);
  return [...widths, getComputedStyle(at('before')).clipPath, at('viewer').open];
})()"""
FAIL = """(async () => {
  at('size').append(new Option('bad', 'bad'));
  at('size').value = 'bad';
  at('generate').requestSubmit();
  await until(() => !at('error').hidden);
  at('error').scrollIntoView();
  return [at('error').textContent, at('error').role, at('gallery').children.length, at('status').textContent];
})()"""
FILMS = """(async () => {
  await until(() => document.querySelector('#films img'));
  at('training').open = true;
  return [...document.querySelectorAll('#films img')].map((each) => each.alt);
})()"""
NAMELESS = """[...document.querySelectorAll('input:not([type=hidden]), select, textarea, button')]
  .filter((each) => !each.labels?.length && !each.ariaLabel && !each.textContent.trim()).map((each) => each.id)"""
WIDTHS = "document.documentElement.scrollWidth <= innerWidth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    write_model(root / "models/refined", upscale_steps=1)
    (root / "reports/refine").mkdir(parents=True)
    (root / "reports/refine/film.png").write_bytes(png())
    return root / "models/refined"


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Of a server process that asks for TOKEN."""
    command = [sys.executable, "-m", "pipeline.cli", "serve", str(folder), "--port", "0"]
    env = {**os.environ, "CRESCENDO_TOKEN": TOKEN, "CRESCENDO_RUNS": str(folder.parent)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    found = re.search(r"http://\S+", process.stdout.readline())
    assert found is not None
    yield found[0]
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    process.stdout.close()


@pytest.mark.slow
def test_others_on_this_machine_see_what_a_service_says(address: str, folder: Path) -> None:
    left = folder.parent / "services" / f"{2**22 - 3}.json"  # of a process that is gone
    left.write_text(json.dumps({"url": "http://127.0.0.1:9/"}))
    (seen,) = running(folder.parent)
    digest = load_generator(folder).snapshot.digest
    assert seen == Running(address, answers=True, digest=digest)
    left.with_name(f"{os.getpid()}.json").write_text(json.dumps({"url": "http://127.0.0.1:9/"}))
    assert {each.answers for each in running(folder.parent)} == {True, False}
    left.with_name(f"{os.getpid()}.json").unlink()


def test_openais_client_draws_and_upscales(address: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{address}v1", api_key=TOKEN, max_retries=0)
    answer = client.images.generate(
        model="gpt-image-1",
        prompt="cat",
        size="1024x1024",
        n=2,
        quality="high",
        extra_body={"seed": 4, "steps": 2},
    )
    expected = load_generator(folder).images(["cat", "cat"], [4, 5], 2)
    served = [read_png(base64.b64decode(each.b64_json or "")) for each in answer.data or []]
    assert [pixels for _, pixels in served] == [read_png(encode_png(image))[1] for image in expected]
    assert [made and (made["model"], made["prompt"], made["seed"]) for made, _ in served] == [
        (folder.name, "cat", 4),
        (folder.name, "cat", 5),
    ]
    drawn = client.images.generate(model="dall-e-3", prompt="cat", response_format="url").data
    assert drawn is not None and drawn[0].url is not None
    with urllib.request.urlopen(drawn[0].url) as file:
        assert file.read(4) == b"\x89PNG"
    edited = client.images.edit(image=("x.png", png()), prompt="cat", extra_body={"factor": 4})
    assert edited.size == "96x80"
    assert client.models.list().data[0].id == "refined" and client.models.retrieve("x").id == "refined"
    with pytest.raises(openai.BadRequestError, match="choose one of: 1, 2, 4"):
        client.images.generate(prompt="cat", extra_body={"steps": 3})
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{address}v1", api_key="another", max_retries=0).models.list()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium or google-chrome on the path")
    with open_browser(tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_draws_upscales_shows_errors_and_has_no_fault_of_accessibility(
    browser: Browser, address: str, width: int, scheme: str
) -> None:
    steps = [
        UNTIL,
        AUDIT,
        OPEN,
        FILMS,
        DRAW,
        LOOK,
        AUDIT,
        BACK,
        LOOK,
        UPSCALE,
        AUDIT,
        FAIL,
        AUDIT,
        NAMELESS,
        WIDTHS,
    ]
    visit = browser.visit(address, width, scheme, [*steps])
    _, locked, served, films, labels, _, viewed, back, _, *after = visit.values
    upscaled, compared, failed, faults, nameless, fits = after
    assert back == [False, 3], "the way back closes an image, and stays on the page"
    assert served.startswith("refined · 32 px") and films == ["Film strip of the stage refine"]
    assert labels == [f"cat, seed {seed}: look closer" for seed in (3, 4, 5)]
    assert upscaled == [32, 64, "inset(0px 75% 0px 0px)", False]
    error, role, left, status = failed
    assert error.startswith("E-CFG-130 size: 'bad' is no size") and (role, left, status) == ("alert", 0, "")
    assert locked == viewed == compared == faults == nameless == [] and fits
    assert all(request.startswith((address, "blob:", "data:")) for request in visit.requests)


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(browser: Browser, address: str) -> None:
    steps = [
        UNTIL,
        "until(() => document.activeElement == at('token'))",
        Typed(TOKEN),
        Typed("Enter", "until(() => at('size').options.length).then(() => true)"),
        Typed("Tab", "document.activeElement.className == 'skip'"),
        Typed("Enter", "document.activeElement == at('prompt')"),
        Typed("cat"),
        Typed("Tab", "document.activeElement == at('count')"),
        Typed("2"),
        Typed("Enter", "until(() => document.querySelectorAll('#gallery img').length == 2).then(() => true)"),
        "[at('prompt').value, at('count').value, at('status').textContent]",
        Typed("Tab", "document.activeElement.parentElement.parentElement == at('gallery')"),
        Typed("Enter", "at('viewer').open"),
        Typed("ArrowRight", "at('caption').textContent.includes('cat')"),
        Typed("Escape", "!at('viewer').open"),
        "document.activeElement.ariaLabel",
        Typed("Enter", "at('viewer').open"),
        Typed("Tab", "document.activeElement == at('enlarge')"),
        Typed("Enter", "until(() => !at('comparison').hidden).then(() => true)"),
        Typed("Tab", "document.activeElement == at('divider')"),
        Typed("ArrowRight", "at('divider').value == 51"),
        "[at('upscale-status').textContent, at('before').style.clipPath]",
    ]
    visit = browser.visit(address, 1280, "light", steps)
    _, _, (prompt, count, status), opener, (upscaled, shown) = visit.values
    assert (prompt, count) == ("cat", "2") and status.startswith("2 of 2")
    assert opener.startswith("cat, seed")
    assert upscaled == "64x64" and shown == "inset(0px 49% 0px 0px)"


def test_a_service_that_others_can_reach_has_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.delenv("CRESCENDO_TOKEN", raising=False)
    assert token_for(Address("127.0.0.1", 0), lines.append) is None and lines == []
    token = token_for(Address("0.0.0.0", 0), lines.append)
    assert token is not None and len(token) >= 32 and token in lines[0]
    monkeypatch.setenv("CRESCENDO_TOKEN", TOKEN)
    assert token_for(Address("0.0.0.0", 0), lines.append) == TOKEN and len(lines) == 1
    monkeypatch.setenv("CRESCENDO_TOKEN", "secret")
    with pytest.raises(PipelineError, match="E-CFG-132"):
        token_for(Address("127.0.0.1", 0), lines.append)


def test_addresses_that_cannot_be_had_are_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(PipelineError, match="E-BUSY-130 127.0.0.1:.*: is in use"):
            Address("127.0.0.1", taken.getsockname()[1]).listen()
    for host in ("192.0.2.1", "no such host", "a" * 70 + ".example"):
        with pytest.raises(PipelineError, match="E-CFG-131"):
            Address(host, 0).listen()


def test_a_port_in_use_is_said_before_a_model_is_loaded(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PipelineError, match="E-BUSY-130"):
        main.run(["serve", "no/such/model", "--port", str(taken.getsockname()[1])])


@pytest.mark.parametrize("more", [["--port", "70000"], ["--queue", "0"], ["--poll", "nan"]])
def test_options_that_cannot_be_are_one_line(root: Path, more: list[str]) -> None:
    with pytest.raises(PipelineError):
        main.run(["serve", *more])
