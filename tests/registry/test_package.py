"""The package of a registered model: what is planted in it is refused, and odd requests to MLflow are one line."""

import contextlib
import importlib.util
import json
import marshal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pipeline.config.params import load_params
from pipeline.errors import StorageError
from pipeline.registry.package import Registry
from pipeline.registry.packaging import NO_CACHE
from pipeline.registry.promote import promote

NAME = "crescendo"
LOAD = """
import sys, mlflow
try:
    print(mlflow.pyfunc.load_model(sys.argv[1]).predict({"prompt": "cat"}, params={"n": 2}).shape)
except Exception as error:
    print(error)
"""


@pytest.fixture
def package(root: Path) -> Path:
    """The files of a champion in a store on this machine."""
    promote(root, load_params(root / "params.yaml"), log=lambda line: None)
    folder = Registry(root).folder_of(Registry(root).version(NAME, "1"))
    assert folder is not None
    return folder


def plant_byte_code(source: Path, marker: Path) -> None:
    """Byte code in place of `source`, of a kind that Python never compares with it; it leaves a marker."""
    code = compile(f"open({str(marker)!r}, 'w').close()", str(source), "exec")
    cache = source.parent / NO_CACHE
    cache.unlink()
    cache.mkdir()
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
    Path(importlib.util.cache_from_source(str(source))).write_bytes(head + marshal.dumps(code))


def mlflow_says(package: Path) -> str:
    """What loading and using a package in another Python prints."""
    command = [sys.executable, "-c", LOAD, str(package)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def refusal(root: Path) -> str:
    """Why the registry refuses version 1; "" if it does not."""
    registry = Registry(root)
    try:
        registry.verify(registry.version(NAME, "1"), root / "scratch")
    except StorageError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_loading_leaves_no_byte_code_and_runs_none_that_was_planted(root: Path, package: Path) -> None:
    assert mlflow_says(package) == "(2, 1)"
    assert not [path for path in package.rglob(NO_CACHE) if path.is_dir()]
    assert refusal(root) == ""
    marker = root / "marker"
    plant_byte_code(package / "code/pipeline/rng.py", marker)
    assert f"code/pipeline/{NO_CACHE}" in refusal(root)
    assert "E-IO-190" in mlflow_says(package) and not marker.exists()


@pytest.mark.parametrize(
    "name", ["code/click.py", "code/pipeline/rng.so", "code/more", "artifacts/project/more"]
)
def test_a_file_or_a_link_more_is_refused(root: Path, package: Path, name: str) -> None:
    path = package / name
    path.write_text("") if path.suffix else path.symlink_to(package / "code/pipeline")
    assert f"{name}, which was added" in refusal(root)


@pytest.mark.slow
def test_mlflow_refuses_requests_of_wrong_types_in_one_line(root: Path, package: Path) -> None:
    wrong = {
        '{"inputs": {"prompt": [3]}}': "E-CFG-071 prompt: 3 in row 0 is no text",
        '{"inputs": {"prompt": ["cat"]}, "params": {"steps": "x"}}': "E-CFG-190 steps: 'x' is no whole number",
        "{": "E-CFG-192 request: 'JSONDecodeError",
        '{"inputs": {"text": ["cat"]}}': "E-CFG-192 request: Model is missing inputs ['prompt']",
    }
    script = """
import json, mlflow, sys, click
from mlflow.pyfunc import scoring_server as server
for content in json.loads(sys.argv[2]):
    open("request.json", "w").write(content)
    try:
        server._predict(sys.argv[1], "request.json", None, "json")
    except click.ClickException as error:
        print(error.status, error.serialize_as_json())
try:
    server.invocations(b"\\xff", "text/csv", mlflow.pyfunc.load_model(sys.argv[1]), None)
except click.ClickException as error:
    print(error.status, error.serialize_as_json())
"""
    expected = [*wrong.values(), "E-CFG-192 request: 'UnicodeDecodeError"]
    command = [sys.executable, "-c", script, str(package), json.dumps(list(wrong))]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line, said in zip(done.stdout.splitlines(), expected, strict=True):
        status, _, answer = line.partition(" ")
        assert status == "78" and json.loads(answer)["message"].startswith(said)


def test_a_download_that_fails_leaves_nothing_that_other_threads_still_write(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of MLflow's does, where a listing fails after the first files have been asked for."""
    begun = threading.Event()

    def write(folder: Path) -> None:
        for number in range(400):
            with contextlib.suppress(FileNotFoundError):
                (folder / f"{number}").write_text("late")
            begun.set()
            time.sleep(0.001)

    def fail(artifact_uri: str, dst_path: str) -> str:
        thread.append(threading.Thread(target=write, args=(Path(dst_path),)))
        thread[0].start()
        begun.wait()
        raise OSError("the listing failed")

    thread: list[threading.Thread] = []
    monkeypatch.setattr("mlflow.artifacts.download_artifacts", fail)
    with pytest.raises(StorageError, match="the listing failed"), tempfile.TemporaryDirectory() as scratch:
        Registry(root).download("models:/crescendo/1", Path(scratch))
    thread[0].join()
    assert not Path(scratch).exists()
