"""Seeds of training: what is trained again and what is shared, and the spread over seeds."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

import pytest

from benchmarks import seeds
from pipeline.config.params import load_params
from pipeline.evaluation.verdict import Baseline, PassVerdict, Rule, Verdict
from pipeline.launch.fingerprint import stage_fingerprint
from pipeline.presets import change_params
from tests.conftest import ROOT, write_prepared
from tests.registry.conftest import write_model


def verdict(value: float, missing: bool = False) -> Verdict:
    outcome = "passed" if value < 2 else "failed"
    kid = Rule("kid", outcome, value, value - 0.5, value + 0.5)
    finite = Rule("finite", "passed", reason="all weights are finite")
    rules = (kid,) if missing else (kid, finite)
    one = PassVerdict(1, 1, outcome, rules)
    default = 1 if outcome == "passed" else None
    return Verdict("a" * 64, "b" * 64, "c" * 64, Baseline("", "d" * 64), True, (one,), default)


def test_the_spread_is_that_of_the_values_and_the_sampling_error_that_of_the_intervals() -> None:
    kid, finite = seeds.spreads([verdict(1.0), verdict(1.5), verdict(3.0, missing=True)])
    assert (kid.passes, kid.rule, kid.values) == (1, "kid", [1.0, 1.5, 3.0])
    assert kid.mean == pytest.approx(5.5 / 3) and kid.sampling_error == pytest.approx(0.5)
    assert kid.spread == pytest.approx(4.3027 * statistics.stdev([1.0, 1.5, 3.0]), rel=1e-4)
    assert kid.outcomes == ["passed", "passed", "failed"]
    assert finite.values == [None, None] and finite.mean is finite.spread is finite.sampling_error is None
    lines = seeds.table([kid, finite]).splitlines()
    assert "2 passed, 1 failed" in lines[2] and "\u2013" in lines[3]


def test_only_training_has_another_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pipeline", "stages", "infra"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    write_prepared(tmp_path / "data/prepared")
    write_model(tmp_path / "models/finetuned", kind="finetuned")
    (tmp_path / "mlflow.db").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    calls, fingerprints = [], set()

    def run(stage: str, folder: Path, root: Path) -> None:
        assert root == tmp_path
        params = load_params(folder / "params.yaml")
        calls.append((stage, folder.name, params.seed, params.evaluate.watch_images.refine))
        assert (folder / "models/finetuned/config.json").is_file() and not (folder / "mlflow.db").exists()
        if stage == "refine":
            fingerprints.add(stage_fingerprint("refine", folder))
            return
        value = float(folder.name.removeprefix("seed-"))
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports/verdict.json").write_text(json.dumps(verdict(value).to_json()))

    seeds.main(["--seeds", "2"], run)
    own = load_params(ROOT / "params.yaml").evaluate.watch_images.refine
    assert calls == [
        ("refine", "seed-0", 0, 0),
        ("evaluate", "seed-0", 0, own),
        ("refine", "seed-1", 1, 0),
        ("evaluate", "seed-1", 0, own),
    ]
    assert len(fingerprints) == 2
    tree = json.loads((tmp_path / "runs/seeds/seeds.json").read_text())
    assert tree["seeds"] == [0, 1] and tree["rules"][0]["values"] == [0.0, 1.0]
    out = capsys.readouterr().out
    assert out.startswith("2 seeds, 1 different models; ") and "| kid " in out
    shutil.rmtree(tmp_path / "runs")
    assert sorted(tmp_path.rglob("*")) == before, "nothing else of the project changes"


def test_the_spread_is_written_for_the_next_verdict(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    found = seeds.spreads([verdict(1.0), verdict(1.5)])
    change = {"evaluate": {"training_spread": seeds.as_param(found, (1, 2, 4))}}
    for _ in range(2):
        change_params(tmp_path, change, "params.yaml with the spread over seeds")
        (kid,) = load_params(tmp_path / "params.yaml").evaluate.training_spread
        assert kid.rule == "kid" and kid.half_widths == (pytest.approx(4.49, abs=1e-2), None, None)
    assert "    - {rule: kid, half_widths: [4.49, null, null]}" in (tmp_path / "params.yaml").read_text()


def test_one_seed_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        seeds.main(["--seeds", "1"])
    assert "2 or more" in capsys.readouterr().err


def test_a_stage_that_fails_ends_the_program(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        seeds.run_stage("nothing", tmp_path, tmp_path)
    assert stopped.value.code == 1


def test_a_stage_tracks_by_itself_and_reads_the_registry_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "seed-0/stages").mkdir(parents=True)
    (tmp_path / "seed-0/stages/__init__.py").touch()
    program = "import os; open('uris', 'w').write(' '.join(os.environ[f'MLFLOW_{n}_URI'] for n in %r))"
    (tmp_path / "seed-0/stages/show.py").write_text(program % (("TRACKING", "REGISTRY"),))
    seeds.run_stage("show", tmp_path / "seed-0", tmp_path)
    own, shared = (tmp_path / "seed-0/uris").read_text().split()
    assert own == f"sqlite:///{tmp_path}/seed-0/mlflow.db" and shared == f"sqlite:///{tmp_path}/mlflow.db"
