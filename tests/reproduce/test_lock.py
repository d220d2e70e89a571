"""What dvc.lock of a version names comes from the project's cache, and code that is not the lock's is told."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.config.strict_yaml import read_yaml
from pipeline.reproduce.lock import Lock

DVC_YAML = (
    "stages: {prepare: {cmd: x, deps: [data/raw, pipeline/code.py], params: [seed], outs: [data/prepared]}}"
)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_raw_data_come_from_the_cache_of_the_project_and_changed_code_is_named(tmp_path: Path) -> None:
    root, tree = tmp_path / "project", tmp_path / "tree"
    (root / "data/raw").mkdir(parents=True)
    (root / "data/raw/x").write_text("images")
    (root / "pipeline").mkdir()
    (root / "pipeline/code.py").write_text("new = 1")
    (root / "params.yaml").write_text("seed: 1")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    with Repo.init(str(root)) as repo:
        repo.add(str(root / "data/raw"))
    (raw,) = read_yaml(root / "data/raw.dvc")["outs"]
    (root / "data/raw.dvc").unlink()
    (root / "dvc.yaml").write_text(DVC_YAML)
    shutil.copytree(root, tree, ignore=lambda folder, _: ["raw", "cache", "tmp"])
    code = {"path": "pipeline/code.py", "hash": "md5", "md5": "0" * 32, "size": 1}
    entry = {"cmd": "x", "deps": [{**raw, "path": "data/raw"}, code], "params": {"params.yaml": {"seed": 2}}}
    for path in (tree / "dvc.lock", tmp_path / "dvc.lock"):
        YAML(typ="safe").dump({"schema": "2.0", "stages": {"prepare": entry}}, path)
    shutil.rmtree(root / "data/raw")
    before = files_below(root / ".dvc/cache")
    lock = Lock(root, tree, tmp_path / "dvc.lock")
    lock.lay()
    found = lock.entry("data/raw")
    assert found is not None and lock.where(found) == "DVC's cache"
    lock.pull("data/raw")
    assert (tree / "data/raw/x").read_text() == "images"
    assert files_below(root / ".dvc/cache") == before and not (root / "data/raw").exists()
    assert lock.changes(["prepare"]) == {"prepare": ["pipeline/code.py", "seed"]}
    assert lock.changes(["other"]) == {}
    assert Lock(tmp_path, tree, tmp_path / "none").entry("data/raw") is None
