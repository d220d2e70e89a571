"""Drills: when they kill, and what their receipt finds, of a stage that takes a second."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.cli.main import run
from pipeline.config.params import parse_params
from pipeline.config.strict_yaml import read_yaml
from pipeline.drill.drill import drill
from pipeline.drill.plan import STAGES, planned, scaled
from pipeline.errors import Busy, ConfigError
from tests.conftest import ROOT

# Counts to 12; goes on from a file. A wasteful one doubles a point, and leaves a file and another result.
STAGE = """
import json, os, sqlite3, sys, time
from pathlib import Path
kind, run = os.environ["TOY"], Path("runs/pretrain/0")
run.mkdir(parents=True, exist_ok=True)
if kind == "broken":
    sys.exit("E-TOY-001 toy: is broken. Fix: mend it")
state, again = run / "state", (run / "state").exists()
start = int(state.read_text()) if again else 0
with sqlite3.connect("mlflow.db") as store:
    store.execute("CREATE TABLE IF NOT EXISTS metrics (key, step, value, is_nan)")
    store.execute("CREATE TABLE IF NOT EXISTS runs (name UNIQUE, status)")
    store.execute("INSERT OR REPLACE INTO runs VALUES ('pretrain', 'RUNNING')")
for nimg in range(start + 1, 13):
    time.sleep(0.05)
    with sqlite3.connect("mlflow.db") as store:
        known = store.execute("SELECT 1 FROM metrics WHERE step = ?", (nimg,)).fetchall()
        if not known or kind == "wasteful":
            store.execute("INSERT INTO metrics VALUES ('loss', ?, 1.0, 0)", (nimg,))
    with open(run / "progress.jsonl", "a") as file:
        file.write(json.dumps({"nimg": nimg, "time": time.time(), "metrics": {}}) + "\\n")
    if kind == "sound" or nimg == 12:
        (run / "state.new").write_text(str(nimg))
        os.replace(run / "state.new", state)
    elif kind == "wasteful":
        (run / f"left-{os.getpid()}").touch()
Path("models/core").mkdir(parents=True, exist_ok=True)
Path("models/core/model").write_text(str(len(list(run.iterdir()))) if kind == "wasteful" else "12")
with sqlite3.connect("mlflow.db") as store:
    store.execute("UPDATE runs SET status = 'FINISHED'")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the toy stage."""
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    for name in ("stages", "data", "models/core", "pipeline", "infra/compute"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stages/pretrain.py").write_text(STAGE)
    (tmp_path / "infra/compute/process.yaml").write_text("workers: 0\n")
    return tmp_path


def drilled(project: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> Any:
    monkeypatch.setenv("TOY", kind)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return drill(project, "pretrain", 6, 1.0, "process", 3, lambda line: None)


def test_a_sound_stage_passes_and_leaves_only_its_receipt(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = drilled(project, monkeypatch, "sound")
    assert receipt.passed and receipt.images == 12 and receipt.points == 12, receipt.lines()
    assert len(receipt.kills) <= 6  # a busy machine misses some
    assert 0 < len(receipt.recoveries) <= len(receipt.kills) and min(receipt.recoveries) > 0
    assert f"(median of {len(receipt.recoveries)}; 95%: " in "\n".join(receipt.lines())
    folder = project / "runs/drill/pretrain"
    assert [path.name for path in folder.iterdir()] == ["receipt.json"]
    stored = json.loads((folder / "receipt.json").read_text())
    assert stored["passed"] and stored["digest_quiet"] == stored["digest_killed"]
    ((name, tag),) = receipt.tag("c0ffee0").items()
    assert name == "crescendo.drill.pretrain"
    assert json.loads(tag).items() >= {"passed": True, "kills": len(receipt.kills), "missing": 0}.items()


def test_other_bits_doubled_points_and_leftovers_are_found(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = drilled(project, monkeypatch, "wasteful")
    assert not receipt.passed and receipt.lines()[-1] == "FAILED"
    assert receipt.differing == ["models/core/model"] and receipt.digest_quiet != receipt.digest_killed
    assert receipt.repeated and not receipt.missing and not receipt.extra
    assert receipt.leftover_files and "left-" in receipt.leftover_files[0]
    assert (project / "runs/drill/pretrain/killed/drill.log").exists()


def test_a_stage_that_fails_by_itself_is_named_with_its_last_line(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        Busy, match=r"E-BUSY-150 pretrain: ends with status 1 .*\(E-TOY-001 toy: is broken. Fix"
    ):
        drilled(project, monkeypatch, "broken")


def test_a_cluster_is_not_drilled(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "infra/compute/far.yaml").write_text("address: http://head:8265\nstorage: /mnt/x\n")
    monkeypatch.chdir(project)
    monkeypatch.setenv("CRESCENDO_COMPUTE", "far")
    with pytest.raises(ConfigError, match="E-CFG-150"):
        run(["drill"])


@pytest.mark.parametrize("stage", STAGES)
def test_any_configuration_has_a_scale_for_drills(stage: str, tiny_tree: dict[str, Any]) -> None:
    for tree in (tiny_tree, read_yaml(ROOT / "params.yaml")):
        params = parse_params(scaled(tree, stage))
        section = getattr(params, stage)
        assert section.num_images == 24 * section.batch_size
        assert params.core == parse_params(tree).core


def test_moments_follow_from_the_seed_and_some_are_before_the_first_batch() -> None:
    plans = [planned("pretrain", 50, seed, list(range(8, 200, 8))) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    images = [kill.image for kill in plans[0] if kill.image]
    assert images == sorted(images) and 3 <= 50 - len(images) <= 20
    assert len({round(kill.wait, 6) for kill in plans[0]}) == 50
